"""CP, Monarch, rings and Kronecker sums as layers against nn.Linear; the choice of a Tucker core shape.

python benchmarks/formats.py            3 processes, about 5 minutes
python benchmarks/formats.py --quick    one process
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from layers import step
from timing import Gate, compare, in_processes, markdown, median_of, publish
from torch import nn

import tnlayers
from decompositions import (
    CP,
    KroneckerSum,
    Monarch,
    TensorRing,
    Tucker,
    hosvd,
    numel,
    parameter_terms,
    select_ranks,
    st_hosvd,
    unfold,
)
from decompositions.linalg import gram

EIGHT, LARGE = (4, 8, 4, 8), (8, 8, 8, 8)


def made(format: Any, rows: tuple[int, ...], cols: tuple[int, ...], rank: int) -> Any:
    return format.random(row_modes=rows, col_modes=cols, rank=rank, std=0.02)


# name: (width, batch, network, reach)
ROWS: dict[str, tuple[int, int, Callable[[], Any], float | None]] = {
    "CP rank 64, 4096 b512": (4096, 512, lambda: made(CP, LARGE, LARGE, 64), 0.08),
    "CP rank 256, 4096 b512": (4096, 512, lambda: made(CP, LARGE, LARGE, 256), 0.18),
    "CP rank 64, 1024 b128": (1024, 128, lambda: made(CP, EIGHT, EIGHT, 64), 0.45),
    "CP rank 2185 (a tenth of the parameters), 1024 b128": (1024, 128, lambda: made(CP, EIGHT, EIGHT, 2185), None),
    "Monarch 32, 1024 b128": (1024, 128, lambda: made(Monarch, (32, 32), (32, 32), 1), 0.40),
    "Monarch 64, 4096 b512": (4096, 512, lambda: made(Monarch, (64, 64), (64, 64), 1), 0.11),
    "KroneckerSum rank 51, 1024 b128": (1024, 128, lambda: made(KroneckerSum, (32, 32), (32, 32), 51), None),
    "TensorRing rank 6, 1024 b128": (1024, 128, lambda: made(TensorRing, EIGHT, EIGHT, 6), None),
}


def one() -> dict[str, Any]:
    """All rows once, in this process."""
    torch.manual_seed(0)
    gate, found = Gate(), {}
    for width, batch in dict.fromkeys((row[0], row[1]) for row in ROWS.values()):
        x = torch.randn(batch, width, requires_grad=True)
        gradient = torch.randn(batch, width)
        dense = nn.Linear(width, width)
        candidates = {}
        for name, (n, b, make, _) in ROWS.items():
            if (n, b) == (width, batch):
                layer = tnlayers.Linear(width, width, network=make())
                layer.plan(batch=batch, probe=True)
                candidates[name] = step(layer, x, gradient)
        _, rows = compare(step(dense, x, gradient), candidates, gate, budget=60, least=9, most=40)
        for name, entry in rows.items():
            network = ROWS[name][2]()
            found[name] = {**entry, "keep": numel(network) / width**2}
    return found


def core_shape() -> dict[str, Any]:
    """64^4 with falling spectra, a hundredth of its parameters: from stored spectra, and by decomposing each time."""
    generator = torch.Generator().manual_seed(0)
    n, d = 64, 4
    x = torch.randn((n,) * d, generator=generator)
    for k, decay in enumerate((0.5, 1.0, 1.5, 2.0)):  # graded in a random basis of every mode
        q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
        x = torch.tensordot(x, q * torch.arange(1, n + 1) ** -decay, dims=([0], [1]))
        assert x.shape[-1] == n, k
    budget = n**d // 100
    terms = parameter_terms(Tucker.random(row_modes=(n,) * d, rank=2))
    begin = time.perf_counter()
    spectra = {
        f"r{k}": torch.linalg.eigvalsh(gram(unfold(x, k))).flip(0).clamp_min(0).sqrt() / x.norm() for k in range(d)
    }
    once = time.perf_counter() - begin
    result: dict[str, Any] = {"spectra_seconds": once, "budget": budget, "rows": {}}
    for method in ("greedy", "exact"):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            choice = select_ranks(spectra, terms, budget, method=method)
            times.append(time.perf_counter() - begin)
        ranks = tuple(choice.ranks.values())
        error = hosvd(x, rank=ranks, with_error=True)[1]
        result["rows"][method] = {"seconds": sorted(times)[2], "ranks": ranks, "error": error, "price": choice.price}

    def price(ranks: list[int]) -> int:
        core = 1
        for r in ranks:
            core *= r
        return core + n * sum(ranks)

    ranks, tried = [1] * d, 0
    begin = time.perf_counter()
    best = st_hosvd(x, rank=ranks, with_error=True)[1]
    while True:
        options = []
        for k in range(d):
            more = [r + (j == k) for j, r in enumerate(ranks)]
            if more[k] <= n and price(more) <= budget:
                error = st_hosvd(x, rank=more, with_error=True)[1]
                tried += 1
                options.append(((best**2 - error**2) / (price(more) - price(ranks)), error, more))
        if not options:
            break
        _, best, ranks = max(options, key=lambda option: option[0])
    seconds = time.perf_counter() - begin
    error = hosvd(x, rank=ranks, with_error=True)[1]
    result["rows"]["greedy that decomposes each time"] = {
        "seconds": seconds,
        "ranks": tuple(ranks),
        "error": error,
        "price": price(ranks),
        "decompositions": tried,
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", action="store_true", help="one process of the layer rows; prints JSON")
    parser.add_argument("--quick", action="store_true", help="one process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one()))
        return
    runs = in_processes(__file__, [], 1 if arguments.quick else 3)
    table = [
        [
            name,
            f"{100 * runs[0][name]['keep']:.1f} %",
            "" if ROWS[name][3] is None else f"{ROWS[name][3]:.2f}",
            f"{median_of([run[name] for run in runs], 'ratio'):.3f}",
        ]
        for name in runs[0]
    ]
    shape = core_shape()
    slow = shape["rows"]["greedy that decomposes each time"]
    choices = [
        [
            name,
            f"{row['seconds']:.3g} s",
            f"{slow['seconds'] / row['seconds']:,.0f} x",
            f"{slow['seconds'] / (row['seconds'] + shape['spectra_seconds']):,.0f} x",
            f"{row['error']:.4f}",
            f"{row['price']:,}",
            "x".join(map(str, row["ranks"])),
        ]
        for name, row in shape["rows"].items()
    ]
    text = "\n\n".join(
        [
            markdown(["layer, forward and backward", "parameters", "reach", "of dense"], table),
            markdown(
                ["core shape of 64^4 at 1 %", "time", "faster", "with its spectra", "error of HOSVD", "price", "ranks"],
                choices,
            ),
        ]
    )
    notes = [
        f"Core shape: reach 300 x, error no larger. The spectra take {shape['spectra_seconds']:.2f} s once; the greedy "
        f"that decomposes each time runs {slow['decompositions']} ST-HOSVDs.",
    ]
    publish("formats", "Formats", text, {"layers": runs, "core_shape": shape}, notes)


if __name__ == "__main__":
    main()
