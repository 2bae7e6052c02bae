"""Measured, not predicted: the constants of this machine for the cost model, and the times of plans."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from decompositions.formats.contract import contract
from decompositions.formats.cost import BLOCK_BYTES, Rates, cache_file, machine_key, remember
from decompositions.formats.network import Network
from decompositions.formats.plan import Plan, plan_apply
from decompositions.formats.program import multiply
from decompositions.formats.workspace import Workspace

SHORTLIST = 1.6
"""Plans predicted within this factor of the best are worth a measurement."""


def _quantile(run: Callable[[], object], device: torch.device, *, seconds: float = 0.05, least: int = 5) -> float:
    """20th percentile of the time of a call: interference only ever adds."""
    run()
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < 200):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 5]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wait_until_quiet(device: torch.device, seconds: float = 10.0) -> None:
    """On a busy processor threads wait for one another and every number is nonsense: wait, then refuse."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return
    a = torch.rand(256, 256)
    end = time.monotonic() + seconds
    while True:
        together = _quantile(lambda: torch.mm(a, a), device, least=20)
        torch.set_num_threads(1)
        try:
            alone = _quantile(lambda: torch.mm(a, a), device, least=20)
        finally:
            torch.set_num_threads(threads)
        if together < 1.5 * alone:
            return
        if time.monotonic() > end:
            raise RuntimeError(
                f"calibrate: the processor must be idle, expected {threads} threads to be no slower than one "
                f"({alone * 1e6:.0f} us), got {together * 1e6:.0f} us; stop other work and call it again"
            )
        time.sleep(0.5)


def calibrate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, save: bool = True) -> Rates:
    """Measure the constants of the cost model on this machine, use them from now on, and store them for later ones.

    Matrix products with a thin side, batched ones, copies in order, in blocks and scattered, and the start of one
    operation. Takes a few seconds. Plans made afterwards follow the new constants (existing layers keep theirs until
    they plan again); the constants are stored per device, dtype, number of threads and version of torch in a file of
    their own, written whole or not at all, so that processes may calibrate at the same time.

    Args:
        device: where to measure.
        dtype: of the operands.
        save: store the result under `TNLAYERS_CACHE`, else the user's cache folder. A folder that cannot be written is
            no error: the constants then serve this process alone.

    Returns:
        The measured constants.

    Raises:
        ValueError: a dtype without matrix products.
        RuntimeError: other processes kept the processor busy for ten seconds; nothing is changed or stored.

    Example:
        >>> from decompositions import calibrate
        >>> calibrate("cpu").rows[-1]  # doctest: +SKIP
        (1024, 204000000000.0)
    """
    device = torch.device(device)
    if not dtype.is_floating_point:
        raise ValueError(f"calibrate: dtype must be a real floating type, got {dtype}; try torch.float32")
    _wait_until_quiet(device)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device).to(dtype)

    def product_rate(m: int, k: int, n: int) -> float:
        a, b = random(m, k), random(k, n)
        return 2 * m * k * n / _quantile(lambda: torch.mm(a, b), device)

    def batched_rate(size: int) -> float:
        wide = max(64, size)
        count = max(4, (1 << 22) // (size * wide))
        a, b = random(count, size, size), random(count, size, wide)
        return 2 * count * size * size * wide / _quantile(lambda: torch.bmm(a, b), device)

    sizes = (1, 4, 8, 16, 32, 64, 256)
    wide = 1024
    numbers = (16 << 20) // dtype.itemsize
    block = BLOCK_BYTES // dtype.itemsize
    side = int((numbers // block) ** 0.5)
    flat, into = random(side * side * block), torch.empty(side * side * block, dtype=dtype, device=device)
    blocks = flat.reshape(side, side, block).transpose(0, 1)
    edge = int(numbers**0.5)
    square = random(edge, edge)
    small = random(4, 4)
    moved = 2 * dtype.itemsize
    rates = Rates(
        call=_quantile(lambda: contract("ab,bc->ac", small, small), device),
        rows=tuple((size, product_rate(size, wide, wide)) for size in (*sizes, wide)),
        depth=tuple((size, product_rate(wide, size, wide)) for size in (*sizes, wide)),
        cols=tuple((size, product_rate(wide, wide, size)) for size in (*sizes, wide)),
        batched=tuple((size, batched_rate(size)) for size in sizes),
        stream=moved * flat.numel() / _quantile(lambda: into.copy_(flat), device),
        blocks=moved * flat.numel() / _quantile(lambda: into.view(side, side, block).copy_(blocks), device),
        scatter=moved * square.numel() / _quantile(lambda: square.T.contiguous(), device),
    )
    key = (device.type, str(dtype).removeprefix("torch."))
    remember(key, rates)
    if save:
        _store(cache_file(key), rates, machine_key(key))
    return rates


def _store(path: Path, rates: Rates, machine: str) -> bool:
    """Write the constants whole or not at all; False where the folder cannot be written."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = file.name
            json.dump({"machine": machine, **rates._asdict()}, file, indent=1)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


def time_plans(
    net: Network, batch: int, plans: Sequence[Plan] | None = None, *, rounds: int = 5, backward: bool = True
) -> list[tuple[Plan, float]]:
    """Measure plans for `apply(net, x)` with `batch` rows, interleaved; fastest first.

    Args:
        net: the network; its numbers are not changed.
        batch: rows of x.
        plans: candidates; by default those predicted within 1.6 of the best, heavy ones at their burden.
        rounds: measurements of each plan; the 20th percentile counts.
        backward: time forward and backward with the gradients of x and all cores, else forward alone.

    Returns:
        Pairs (plan, seconds).

    Raises:
        ValueError: fewer than one row or round.

    Example:
        >>> from decompositions import LowRank
        >>> from decompositions.measure import time_plans
        >>> measured = time_plans(LowRank.random(row_modes=(64,), col_modes=(64,), rank=4), batch=8)
        >>> measured[0][1] <= measured[-1][1]
        True
    """
    if batch < 1 or rounds < 1:
        raise ValueError(f"time_plans: batch and rounds must be at least 1, got batch={batch}, rounds={rounds}")
    if plans is None:
        candidates = plan_apply(net, batch)
        plans = [plan for plan in candidates if plan.burden <= SHORTLIST * candidates[0].burden]
    device = net.device
    x = torch.rand(batch, *net.col_modes, device=device).to(net.dtype).requires_grad_(backward)
    cores = [core.detach().clone().requires_grad_(backward) for core in net.cores]
    gradient = torch.rand(batch, *net.row_modes, device=device).to(net.dtype)

    workspace = Workspace()

    def once(plan: Plan) -> float:
        _wait(device)
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = multiply(plan, x, cores, workspace=workspace)
        if backward:
            torch.autograd.grad(y, [x, *cores], gradient)
        _wait(device)
        return time.perf_counter() - start

    for plan in plans:
        once(plan)
    times: list[list[float]] = [[] for _ in plans]
    for _ in range(rounds):
        for k, plan in enumerate(plans):
            times[k].append(once(plan))
    measured = [(plan, sorted(t)[len(t) // 5]) for plan, t in zip(plans, times, strict=True)]
    return sorted(measured, key=lambda pair: pair[1])


def merge_floor(net: Network, batch: int) -> float:
    """Least time of a merged weight relative to a dense one, forward and backward: 1 + (FLOPs of merging) / (of x W^T).

    For a TT-matrix cut in the middle at rank r it is 1 + r / batch: what factors save in memory, merging pays in time.

    Example:
        >>> from decompositions import TTMatrix
        >>> net = TTMatrix.random(row_modes=(64, 64), col_modes=(64, 64), rank=128)
        >>> round(merge_floor(net, 512), 2)
        1.25
    """
    merge = next(plan for plan in plan_apply(net, batch) if plan.strategy == "merge")
    return merge.flops / (2 * batch * prod(net.row_modes) * prod(net.col_modes))
