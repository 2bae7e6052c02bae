"""Linear layers against nn.Linear: time of forward and backward, frozen forward, bf16, memory kept for backward.

python benchmarks/layers.py            3 processes, about 5 minutes (peers where they are installed: make bench-env)
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import Gate, compare, gemm_rate, in_processes, low, markdown, median_of, publish, seconds
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker
from decompositions.measure import merge_floor

Network = Any


def low_rank(out: int, width: int, rank: int) -> Network:
    return LowRank.random(row_modes=(out,), col_modes=(width,), rank=rank, std=0.02)


def tucker(out: tuple[int, ...], width: tuple[int, ...], rank: Any) -> Network:
    return Tucker.random(row_modes=out, col_modes=width, rank=rank, std=0.02)


def ttm(out: tuple[int, ...], width: tuple[int, ...], rank: Any) -> Network:
    return TTMatrix.random(row_modes=out, col_modes=width, rank=rank, std=0.02)


# name: (out, in, batch, network, reach, aim, row whose reach a neighbouring size is held against)
EIGHT, FOUR = (4, 4, 8, 8), (32, 32)
ROWS: dict[str, tuple[int, int, int, Callable[[], Network], float, float, str | None]] = {
    "LowRank 1024 b128": (1024, 1024, 128, lambda: low_rank(1024, 1024, 51), 0.27, 0.22, None),
    "LowRank 4096 b512": (4096, 4096, 512, lambda: low_rank(4096, 4096, 204), 0.13, 0.115, None),
    "Tucker 8-mode 1024 b128": (1024, 1024, 128, lambda: tucker(EIGHT, EIGHT, (3, 3, 6, 6) * 2), 0.68, 0.50, None),
    "Tucker 4-mode 1024 b128": (1024, 1024, 128, lambda: tucker(FOUR, FOUR, 18), 0.53, 0.42, None),
    "Tucker 8-mode 4096 b512": (4096, 4096, 512, lambda: tucker((8,) * 4, (8,) * 4, 6), 0.22, 0.17, None),
    "TTMatrix 4096 b512 r113": (4096, 4096, 512, lambda: ttm((8,) * 4, (8,) * 4, 113), 1.08, 1.03, None),
    "TTMatrix 4096 b512 r204": (4096, 4096, 512, lambda: ttm((8,) * 4, (8,) * 4, 204), 1.08, 1.03, None),
    "TTMatrix 1024 b128": (1024, 1024, 128, lambda: ttm(EIGHT, (8, 8, 4, 4), 35), 2.0, 1.6, None),
    "TTMatrix 1024 b4096": (1024, 1024, 4096, lambda: ttm(EIGHT, (8, 8, 4, 4), 35), 1.10, 1.04, None),
    "LowRank 1536x1000 b96": (1536, 1000, 96, lambda: low_rank(1536, 1000, 60), 0.27, 0.22, "LowRank 1024 b128"),
    "Tucker 4-mode 1536x1000 b96": (
        1536,
        1000,
        96,
        lambda: tucker((32, 48), (25, 40), (18, 20, 16, 18)),
        0.53,
        0.42,
        "Tucker 4-mode 1024 b128",
    ),
    "LowRank 5000x4000 b700": (5000, 4000, 700, lambda: low_rank(5000, 4000, 222), 0.13, 0.115, "LowRank 4096 b512"),
    "Tucker 8-mode 5000x4000 b700": (
        5000,
        4000,
        700,
        lambda: tucker((5, 10, 10, 10), (5, 8, 10, 10), (4, 7, 7, 7, 4, 6, 7, 7)),
        0.22,
        0.17,
        "Tucker 8-mode 4096 b512",
    ),
    "TTMatrix 5000x4000 b700": (
        5000,
        4000,
        700,
        lambda: ttm((5, 10, 10, 10), (5, 8, 10, 10), 110),
        1.08,
        1.03,
        "TTMatrix 4096 b512 r113",
    ),
}
PER_FLOOR = ("TTMatrix 4096", "TTMatrix 5000")  # their reach is in units of the floor 1 + r / batch
GROUPS = [(1024, 1024, 128), (4096, 4096, 512), (1024, 1024, 4096), (1536, 1000, 96), (5000, 4000, 700)]


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    """Forward and backward with gradients of x and of all parameters, made anew as after `zero_grad`."""

    def run() -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        layer(x).backward(gradient)

    return run


def autocast_step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    def run() -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.backward(gradient)

    return run


def peers(out: int, width: int) -> dict[str, nn.Module]:
    """tensorly-torch's layers at 10x, where it is installed."""
    if (out, width) != (1024, 1024):
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tltorch
    except ImportError:
        return {}
    modes = (4, 4, 8, 8)
    made = {}
    for name in ("tucker", "blocktt"):
        made[f"tltorch {name} 1024 b128"] = tltorch.FactorizedLinear(modes, modes, factorization=name, rank=0.1)
    for layer in made.values():
        layer.weight.normal_(0, 0.02)  # its own start of blocktt is zero
    return made


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Parameters, and what autograd holds between forward and backward besides them."""
    seen = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(seen.values())


def one(quick: bool) -> dict[str, Any]:
    """All rows once, in this process."""
    torch.manual_seed(0)
    gate, found = Gate(), {}
    for out, width, batch in GROUPS:
        names = [name for name, row in ROWS.items() if row[:3] == (out, width, batch)]
        x, gradient = torch.randn(batch, width, requires_grad=True), torch.randn(batch, out)
        dense = nn.Linear(width, out)
        layers = {name: tnlayers.Linear(width, out, network=ROWS[name][3]()) for name in names}
        for layer in layers.values():
            layer.plan(batch=batch)
        others = peers(out, width) if batch == 128 else {}
        calls = {name: step(layer, x, gradient) for name, layer in (*layers.items(), *others.items())}
        base, ratios = compare(step(dense, x, gradient), calls, gate, budget=1.0 if quick else 8.0)
        held = kept_bytes(dense, x)
        for name, layer in layers.items():
            plan = layer.plan()
            row: dict[str, Any] = {**ratios[name], "dense": base, "strategy": plan.strategy}
            row["kept"] = kept_bytes(layer, x) / (held + 4 * sum(core.numel() for core in layer.cores))
            row["recompute"] = (layer.plan(memory="recompute"), kept_bytes(layer, x) / held)[1]
            row["gflops"] = 3 * plan.flops / row["seconds"] / 1e9
            row["floor"] = merge_floor(layer.network, batch) if plan.strategy == "merge" else None
            row["parameters"] = layer.numel() / (out * width)
            found[name] = row
        for name in others:
            found[name] = {**ratios[name], "dense": base, "strategy": "peer"}
    found.update(frozen(gate, quick))
    found.update(low_precision(gate, quick))
    found["gemm"] = {"gflops": gemm_rate(), "held back": gate.held}
    return found


def frozen(gate: Gate, quick: bool) -> dict[str, Any]:
    found = {}
    for width in (512, 1024, 4096):
        modes = (8, 8, width // 64)
        for batch in (1, 16, 128, 512) if width < 4096 else (1, 128):
            dense = nn.Linear(width, width).eval()
            x = torch.randn(batch, width)
            layers = {
                "TTMatrix": tnlayers.Linear(width, width, network=ttm(modes, modes, 16)),
                "Tucker": tnlayers.Linear(width, width, network=tucker(modes, modes, 4)),
                "LowRank": tnlayers.Linear(width, width, network=low_rank(width, width, width // 20)),
            }
            for layer in layers.values():
                tnlayers.freeze(layer.eval(), batch=batch)
            with torch.inference_mode():
                count = enough(dense, x)  # the same number of calls for all
                calls = {name: many(layer, x, count) for name, layer in layers.items()}
                base, ratios = compare(many(dense, x, count), calls, gate, budget=0.3 if quick else 1.0, most=200)
            for name, row in ratios.items():
                found[f"frozen {name} {width} b{batch}"] = {**row, "dense": base, "strategy": "frozen"}
    return found


def enough(layer: nn.Module, x: Tensor, least: float = 2e-4) -> int:
    """How many calls a clock of microseconds needs."""
    layer(x)
    return max(1, round(least / low([seconds(lambda: layer(x)) for _ in range(9)])))


def many(layer: nn.Module, x: Tensor, count: int) -> Callable[[], object]:
    return lambda: [layer(x) for _ in range(count)]


def low_precision(gate: Gate, quick: bool) -> dict[str, Any]:
    x, gradient = torch.randn(512, 4096, requires_grad=True), torch.randn(512, 4096, dtype=torch.bfloat16)
    dense, layer = nn.Linear(4096, 4096), tnlayers.Linear(4096, 4096, network=low_rank(4096, 4096, 204))
    layer.plan(batch=512)
    call = {"both": autocast_step(layer, x, gradient)}
    base, ratios = compare(autocast_step(dense, x, gradient), call, gate, budget=1.0 if quick else 6.0)
    return {"LowRank r204 4096 b512, both bf16 autocast": {**ratios["both"], "dense": base, "strategy": "path"}}


def reach(name: str) -> tuple[float, float] | None:
    """(reach, aim) of a row."""
    if name in ROWS:
        *_, passed, aim, neighbour = ROWS[name]
        return (1.5 * passed, aim) if neighbour else (passed, aim)
    if name.startswith("frozen"):
        return (0.2, 0.2) if "LowRank" in name and not name.endswith("b1") else (1.05, 1.05)
    return (0.15, 0.11) if "bf16" in name else None


def main(count: int, quick: bool) -> None:
    runs = in_processes(__file__, ["--quick"] if quick else [], count)
    names = [name for name in runs[0] if name != "gemm"]
    table, rows = [], {}
    for name in names:
        same = [run[name] for run in runs]
        row: dict[str, Any] = {key: median_of(same, key) for key in ("ratio", "median", "seconds", "dense")}
        row |= {"strategy": same[0]["strategy"], "processes": [round(run["ratio"], 4) for run in same]}
        floor = same[0].get("floor")
        figure = row["ratio"] / floor if floor and name.startswith(PER_FLOOR) else row["ratio"]
        goal = reach(name)
        row |= {"figure": figure, "floor": floor, "reach": goal and goal[0]}
        row |= {key: same[0][key] for key in ("kept", "recompute", "parameters") if key in same[0]}
        if "gflops" in same[0]:
            row["gflops"] = median_of(same, "gflops")
        rows[name] = row
        table.append(
            [
                name,
                row["strategy"],
                f"{row['ratio']:.3f}" + (f" = {figure:.2f} x floor {floor:.2f}" if figure != row["ratio"] else ""),
                "" if goal is None else f"{goal[0]:.3g}{' x floor' if name.startswith(PER_FLOOR) else ''}",
                "" if goal is None else ("reached" if figure <= goal[0] else "**missed**"),
                f"{row['median']:.3f}",
                f"{1e3 * row['seconds']:.3g} / {1e3 * row['dense']:.3g}",
                f"{row['gflops']:.0f}" if "gflops" in row else "",
                f"{row['kept']:.2f} / {row['recompute']:.2f}" if "kept" in row else "",
            ]
        )
    head = ["row", "plan", "ratio", "reach", "", "median", "ms / dense ms", "GFLOP/s", "kept / recompute"]
    gemm = median_of([run["gemm"] for run in runs], "gflops")
    notes = [
        "Forward and backward with the gradient of the input (frozen: forward), float32. *ratio*: 20th percentiles,"
        f" median of {count} processes; *median*: of paired ratios. A large product runs at {gemm:.0f} GFLOP/s here."
        " *kept*: parameters and what backward needs, relative to the dense layer's and the cores; with"
        " memory='recompute', relative to the dense layer's.",
    ]
    publish("layers", "Linear layers against nn.Linear", markdown(head, table), rows, notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls")
    parser.add_argument("--one", action="store_true", help="one process, JSON on the last line")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.quick)))
    else:
        main(options.processes, options.quick)
