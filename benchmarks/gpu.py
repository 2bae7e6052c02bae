"""The tables of layers, convolutions, decompositions and plans on a CUDA device, in float32, tf32 and bf16.

python benchmarks/gpu.py               one run, under 8 minutes; every section writes its rows as it ends
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, calibrate, plan_apply, st_hosvd, svd, tt_svd
from decompositions.measure import time_plans
from tnlayers.files import write_atomic
from tnlayers.main_job.config import hardware_facts

Call = Callable[[], object]
MODES = ("float32", "tf32", "bf16")


def milliseconds(call: Call, rounds: int = 15) -> float:
    """20th percentile by the device's own clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 5]


def set_mode(mode: str) -> torch.dtype:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode == "tf32"
    return torch.bfloat16 if mode == "bf16" else torch.float32


def step(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Call:
    def run() -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        layer(x).backward(gradient)

    return run


def against(dense: nn.Module, layers: dict[str, nn.Module], x: torch.Tensor) -> list[list[str]]:
    """Rows (name, plan, ratio, ms, dense ms, peak memory of a step over the dense one)."""
    x = x.detach().requires_grad_()
    gradient = torch.randn_like(dense(x))

    def peak(layer: nn.Module) -> int:
        run = step(layer, x, gradient)
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    base, base_peak = milliseconds(step(dense, x, gradient)), peak(dense)
    rows = []
    for name, layer in layers.items():
        time_ = milliseconds(step(layer, x, gradient))
        again = milliseconds(step(dense, x, gradient))
        reference = statistics.mean((base, again))
        base = again
        rows.append(
            [
                name,
                layer.plan().strategy,  # type: ignore[operator]
                f"{time_ / reference:.3f}",
                f"{time_:.3f}",
                f"{reference:.3f}",
                f"{peak(layer) / max(base_peak, 1):.2f}",
            ]
        )
    return rows


def linear_rows(mode: str) -> list[list[str]]:
    dtype, rows = set_mode(mode), []
    place: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    for width, batch, modes in ((1024, 128, (4, 4, 8, 8)), (4096, 512, (8, 8, 8, 8)), (4096, 8192, (8, 8, 8, 8))):
        factories = {
            "LowRank": tnlayers.random_network(LowRank, rank=width // 20),
            "Tucker": lambda *a, m=modes, w=width: Tucker.random(
                row_modes=m, col_modes=m, rank=(3, 3, 6, 6) * 2 if w == 1024 else 6, std=0.02, **place
            ),
            "TTMatrix": tnlayers.random_network(TTMatrix, rank=35 if width == 1024 else 113, order=4),
        }
        dense = nn.Linear(width, width, **place)
        layers = {}
        for name, factory in factories.items():
            layer = tnlayers.Linear(width, width, network=factory, **place)
            layer.plan(batch=batch, probe=True)
            layers[f"{name} {width} b{batch} {mode}"] = layer
        rows += against(dense, layers, torch.randn(batch, width, **place))
    return rows


def conv_rows(mode: str) -> list[list[str]]:
    dtype, rows = set_mode(mode), []
    place: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    for channels, side, rank in ((64, 32, 16), (256, 8, 64), (256, 56, 64)):
        factory = tnlayers.random_network(Tucker, rank=(rank, rank), modes=(0, 1))
        for memory in (torch.contiguous_format, torch.channels_last):
            dense = nn.Conv2d(channels, channels, 3, padding=1, **place).to(memory_format=memory)
            layer = tnlayers.Conv2d(channels, channels, 3, padding=1, network=factory, **place)
            x = torch.randn(32, channels, side, side, **place).to(memory_format=memory)
            layer(x)
            kind = "channels_last" if memory is torch.channels_last else "contiguous"
            rows += against(dense, {f"Tucker2 {channels}ch {side}x{side} r{rank} {kind} {mode}": layer}, x)
    return rows


def decomposition_rows() -> list[list[str]]:
    set_mode("float32")
    core = torch.randn(8, 8, 8, 8, device="cuda")
    factors = [torch.linalg.qr(torch.randn(64, 8, device="cuda")).Q for _ in range(4)]
    x = torch.einsum("abcd,ia,jb,kc,ld->ijkl", core, *factors)
    x = x + 1e-3 * x.std() * torch.randn_like(x)
    u, v = (torch.linalg.qr(torch.randn(4096, 4096, device="cuda")).Q for _ in range(2))
    matrix = (u / torch.arange(1, 4097, device="cuda")) @ v.T
    cases: list[tuple[str, Callable[[], Any], Call]] = [
        ("st_hosvd 64^4 r8", lambda: st_hosvd(x, rank=8, with_error=True), lambda: st_hosvd(x, rank=8)),
        ("tt_svd 64^4 r8", lambda: tt_svd(x, rank=8, with_error=True), lambda: tt_svd(x, rank=8)),
        ("svd 4096 r64", lambda: svd(matrix, rank=64, with_error=True), lambda: svd(matrix, rank=64)),
    ]
    rows = []
    for name, once, call in cases:
        rows.append([name, "-", "", f"{milliseconds(call, 5):.3f}", "", f"error {once()[1]:.4g}"])
    lowrank = milliseconds(lambda: torch.svd_lowrank(matrix, q=80, niter=2), 5)
    rows.append(["torch.svd_lowrank 4096 q80", "-", "", f"{lowrank:.3f}", "", ""])
    return rows


def plan_rows(count: int) -> list[list[str]]:
    """How often the plan predicted best, and the probed one, is within 1.15 of the best."""
    from plans import draw

    set_mode("float32")
    predicted, probed = [], []
    for seed in range(count):
        _, net, batch = draw(seed)
        net = net.to("cuda")
        plans = plan_apply(net, batch)
        choice = time_plans(net, batch)[0][0]
        times = dict(time_plans(net, batch, plans, rounds=5))
        best = min(times.values())
        predicted.append(times[plans[0]] / best)
        probed.append(times[choice] / best)
    return [
        [f"{name}, {count} networks", "-", f"{statistics.geometric_mean(found):.3f}", "", "",
         f"within 1.15: {sum(r <= 1.15 for r in found) / count:.0%}, worst {max(found):.2f}"]
        for name, found in (("predicted plan", predicted), ("probed plan", probed))
    ]  # fmt: skip


def main(out: Path, networks: int) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: needs a CUDA device, got none")
    torch.manual_seed(0)
    start = time.monotonic()
    for dtype in (torch.float32, torch.bfloat16):
        calibrate("cuda", dtype, save=False)
    sections: dict[str, list[list[str]]] = {}
    jobs: dict[str, Callable[[], list[list[str]]]] = {
        **{f"linear, {mode}": lambda mode=mode: linear_rows(mode) for mode in MODES},
        **{f"convolutions, {mode}": lambda mode=mode: conv_rows(mode) for mode in MODES},
        "decompositions": decomposition_rows,
        "plans": lambda: plan_rows(networks),
    }
    out.mkdir(parents=True, exist_ok=True)
    head = ["row", "plan", "ratio", "ms", "dense ms", "peak memory / dense"]
    for name, job in jobs.items():
        sections[name] = job()
        print(f"{name} ({time.monotonic() - start:.0f} s)", flush=True)
        for row in sections[name]:
            print("  " + "  ".join(row), flush=True)
        facts = {**hardware_facts(), "device": torch.cuda.get_device_name()}
        write_atomic(out / "gpu.json", json.dumps({"sections": sections, "hardware": facts}, indent=1) + "\n")
        lines = [f"# On {facts['device']}, torch {facts['torch']}", ""]
        for title, rows in sections.items():
            lines += [f"## {title}", ""]
            lines += ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)] + [""]
        write_atomic(out / "gpu.md", "\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--networks", type=int, default=60)
    options = parser.parse_args()
    main(options.out, options.networks)
