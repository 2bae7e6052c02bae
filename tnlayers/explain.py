"""Why a layer runs as it does: every plan it considered, with predicted and measured times."""

import time
from math import prod
from typing import Any

import torch
from torch import Tensor

from decompositions.measure import SHORTLIST, merge_floor
from tnlayers.layer import NetworkLayer


def measure(layer: NetworkLayer, batch: int, *, rounds: int = 7, every: bool = False) -> list[tuple[Any, float]]:
    """Time a layer's plans forward and backward at `batch`, interleaved: pairs (plan, seconds), fastest first.

    Gradients are computed (of the input too) but stored nowhere, and the generators of random numbers keep their state.

    Args:
        layer: any layer of ours.
        batch: rows (images, tokens) of the input.
        rounds: calls of each plan; their 20th percentile counts.
        every: time all alternatives, else those predicted within 1.6 of the best.
    """
    plans = layer.alternatives(batch)
    best = min(layer.rank_plan(plan) for plan in plans)
    chosen = [plan for plan in plans if every or layer.rank_plan(plan) <= SHORTLIST * best]
    device = layer.cores[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        made: Any = layer.example_input(batch)
        inputs = [x.requires_grad_(x.is_floating_point()) for x in (made if isinstance(made, tuple) else (made,))]
        leaves = [leaf for leaf in (*inputs, *layer.parameters()) if leaf.requires_grad]
        times: list[list[float]] = [[] for _ in chosen]
        try:
            for count in range(rounds + 1):
                for k, plan in enumerate(chosen):
                    layer._forced = plan
                    seconds = _once(layer, inputs, leaves)
                    if count:  # the first call warms up
                        times[k].append(seconds)
        finally:
            layer._forced = None
    pairs = [(plan, sorted(t)[len(t) // 5]) for plan, t in zip(chosen, times, strict=True)]
    return sorted(pairs, key=lambda pair: pair[1])


def _once(layer: NetworkLayer, inputs: list[Tensor], leaves: list[Tensor]) -> float:
    device = inputs[0].device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    y = layer(*inputs)
    if leaves:
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    wait()
    return time.perf_counter() - start


def explain(layer: NetworkLayer, batch: int | None = None, *, measured: bool = False) -> str:
    """Describe how a layer runs: each plan with FLOPs, memory kept for backward, predicted and measured time.

    An arrow marks the one that is used. A merged dense weight never trains faster than its floor, which is printed.

    Args:
        layer: any layer of ours.
        batch: rows (images, tokens); by default the batch that the stored plan was made for.
        measured: time every plan here, forward and backward.

    Returns:
        Text to print.

    Raises:
        TypeError: not a layer of ours.

    Example:
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(64, 64, network=tnlayers.random_network(LowRank, rank=4))
        >>> print(tnlayers.explain(layer, batch=8).splitlines()[1])
        512 parameters in 3 cores; batch 8
    """
    if not isinstance(layer, NetworkLayer):
        raise TypeError(
            f"explain: expected a layer of tnlayers, got {type(layer).__name__}; see tnlayers.summary(model)"
        )
    rows = layer._hint or 1024 if batch is None else batch
    if rows < 1:
        raise ValueError(f"explain: batch must be at least 1, got {batch}")
    lines = [repr(layer), f"{layer.numel():,} parameters in {len(layer.cores)} cores; batch {rows}"]
    times = dict(measure(layer, rows, every=True)) if measured else {}
    heading = f"   {'strategy':<8} {'FLOPs':>16} {'kept, bytes':>14} {'forward':>10} {'and backward':>13}"
    lines.append(heading + (f" {'measured':>10}" if measured else ""))
    used = layer._make_plan(rows)
    for plan in layer.alternatives(rows):
        mark = "->" if plan == used else "  "
        line = f"{mark} {plan.strategy:<8} {plan.flops:>16,} {plan.kept:>14,} {_ms(plan.forward_seconds)} "
        line += f"{_ms(plan.seconds):>13}"
        lines.append(line + (f" {_ms(times[plan])}" if measured else ""))
    floor = layer_floor(layer, rows)
    if floor is not None and used.strategy == "merge":
        warning = "; a larger batch or smaller ranks would help" if floor > 4 / 3 else ""
        lines.append(f"merging costs at least {floor:.3g} times the dense layer at this batch{warning}")
    return "\n".join(lines)


def layer_floor(layer: NetworkLayer, batch: int) -> float | None:
    """Least time of this layer's merged weight relative to the dense layer; None where it is not one matrix product."""
    product = layer.dense_flops(layer.weight_shape, None) == 2 * prod(layer.weight_shape)  # a table is read, not so
    return merge_floor(layer.network, batch) if len(layer.weight_shape) == 2 and product else None


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:>7.3g} ms"
