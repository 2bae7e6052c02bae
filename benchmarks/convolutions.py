"""Convolutions against nn.Conv2d, forward and backward: contiguous and channels_last, Tucker2 and other formats.

python benchmarks/convolutions.py      3 processes, about 4 minutes
"""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial
from typing import Any

import torch
from timing import Gate, compare, in_processes, markdown, median_of, publish
from torch import nn

import tnlayers
from decompositions import TT, LowRank, Tucker

Step = Any
# name: (channels, side, factory, channels_last, against a dense layer in channels_last, reach, aim)
two = partial(tnlayers.random_network, Tucker, modes=(0, 1))
ROWS: dict[str, tuple[int, int, Any, bool, bool, float | None, float | None]] = {
    "Tucker2 64ch r16 contiguous": (64, 32, lambda: two(rank=(16, 16)), False, False, 0.55, 0.42),
    "Tucker2 64ch r16 channels_last": (64, 32, lambda: two(rank=(16, 16)), True, False, 0.28, 0.22),
    "Tucker2 64ch r16, both channels_last": (64, 32, lambda: two(rank=(16, 16)), True, True, 0.36, 0.28),
    "Tucker2 256ch r64 channels_last": (256, 8, lambda: two(rank=(64, 64)), True, False, 0.24, 0.19),
    "Tucker2 256ch r32 channels_last": (256, 8, lambda: two(rank=(32, 32)), True, False, 0.16, 0.12),
    "TT chain 64ch r18 channels_last": (
        64,
        32,
        lambda: tnlayers.random_network(TT, rank=18, axes=(1, 2, 3, 0)),
        True,
        False,
        None,
        None,
    ),
    "LowRank 64ch r6 channels_last": (
        64,
        32,
        lambda: tnlayers.random_network(LowRank, rank=6),
        True,
        False,
        None,
        None,
    ),
}


def step(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Step:
    def run() -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        layer(x).backward(gradient)

    return run


def peers(channels: int) -> dict[str, nn.Module]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tltorch

            dense = nn.Conv2d(channels, channels, 3, padding=1)
            made = {}
            for kind in ("factorized", "reconstructed"):
                made[f"tltorch tucker {kind} {channels}ch contiguous"] = tltorch.FactorizedConv.from_conv(
                    dense, rank=0.12, factorization="tucker", implementation=kind, fixed_rank_modes="spatial"
                )
            return made
    except ImportError:
        return {}


def one(quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    gate, found = Gate(), {}
    for channels, side in ((64, 32), (256, 8)):
        x = torch.randn(32, channels, side, side)
        gradient = torch.randn(32, channels, side, side)
        leaf = x.clone().requires_grad_()
        last, last_gradient = (t.to(memory_format=torch.channels_last) for t in (x, gradient))
        last = last.detach().requires_grad_()
        dense = nn.Conv2d(channels, channels, 3, padding=1)
        dense_last = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)
        for against_last in (False, True):
            reference = step(dense_last, last, last_gradient) if against_last else step(dense, leaf, gradient)
            calls, plans = {}, {}
            for name, (width, _, factory, channels_last, flag, _, _) in ROWS.items():
                if (width, flag) != (channels, against_last):
                    continue
                layer = tnlayers.Conv2d(channels, channels, 3, padding=1, network=factory())
                calls[name] = step(layer, *((last, last_gradient) if channels_last else (leaf, gradient)))
                calls[name]()
                plans[name] = layer
            if not against_last:
                calls |= {name: step(layer, leaf, gradient) for name, layer in peers(channels).items()}
                calls[f"nn.Conv2d {channels}ch channels_last"] = step(dense_last, last, last_gradient)
            if not calls:
                continue
            base, ratios = compare(reference, calls, gate, budget=1.5 if quick else 9.0)
            for name, row in ratios.items():
                layer = plans.get(name)
                found[name] = {**row, "dense": base, "strategy": layer.plan().strategy if layer else "-"}
                if layer:
                    found[name]["parameters"] = layer.numel() / dense.weight.numel()
    return found


def main(count: int, quick: bool) -> None:
    runs = in_processes(__file__, ["--quick"] if quick else [], count)
    table, rows = [], {}
    for name in runs[0]:
        same = [run[name] for run in runs]
        row: dict[str, Any] = {key: median_of(same, key) for key in ("ratio", "median", "seconds", "dense")}
        row |= {"strategy": same[0]["strategy"], "processes": [round(run["ratio"], 4) for run in same]}
        row["reach"] = ROWS[name][5] if name in ROWS else None
        rows[name] = row
        goal = row["reach"]
        table.append(
            [
                name,
                row["strategy"],
                f"{same[0]['parameters']:.1%}" if "parameters" in same[0] else "",
                f"{row['ratio']:.3f}",
                "" if goal is None else f"{goal:.3g}",
                "" if goal is None else ("reached" if row["ratio"] <= goal else "**missed**"),
                f"{row['median']:.3f}",
                f"{1e3 * row['seconds']:.3g} / {1e3 * row['dense']:.3g}",
            ]
        )
    notes = [
        "3 x 3 kernels, batch 32, 32 x 32 (64 channels) and 8 x 8 (256), float32, forward and backward with the"
        f" gradient of the input, against a contiguous nn.Conv2d unless the row says both. 20th percentiles,"
        f" median of {count} processes."
    ]
    head = ["row", "plan", "parameters", "ratio", "reach", "", "median", "ms / dense ms"]
    publish("convolutions", "Convolutions against nn.Conv2d", markdown(head, table), rows, notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a sixth of the calls")
    parser.add_argument("--one", action="store_true", help="one process, JSON on the last line")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.quick)))
    else:
        main(options.processes, options.quick)
