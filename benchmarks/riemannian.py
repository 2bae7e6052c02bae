"""The price of Riemannian optimizers: whole steps and the optimizer alone, against AdamW on the same cores and geoopt.

python benchmarks/riemannian.py            3 processes, about 4 minutes
python benchmarks/riemannian.py --one      one process; prints JSON
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from timing import Gate, in_processes, markdown, median_of, publish
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank

WIDTH, RANK, LAYERS = 2048, 64, 3
BATCHES = (128, 512)
REACH = 1.5


def model() -> nn.Sequential:
    """The MLP whose cores all optimizers move."""
    torch.manual_seed(0)
    hidden: list[nn.Module] = []
    for _ in range(LAYERS):
        network = tnlayers.random_network(LowRank, rank=RANK)
        hidden += [tnlayers.Linear(WIDTH, WIDTH, network=network), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


class Arm:
    """A model in training: `prepare` makes the gradients, `step` is the optimizer's."""

    def __init__(self, make: Callable[[nn.Module], torch.optim.Optimizer], batch: int) -> None:
        self.model = model()
        self.optimizer = make(self.model)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(batch, WIDTH, generator=generator)
        self.y = torch.randint(0, 10, (batch,), generator=generator)

    def prepare(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()

    def step(self) -> None:
        self.optimizer.step()


class Factors:
    """The same tensors under geoopt: U and V on Stiefel manifolds, S and biases Euclidean; or under torch's Adam."""

    def __init__(self, make: Callable[[list[Tensor]], torch.optim.Optimizer], stiefel: bool) -> None:
        torch.manual_seed(0)
        self.points: list[Any] = []
        for _ in range(LAYERS):
            for shape in ((WIDTH, RANK), (RANK, RANK), (WIDTH, RANK), (WIDTH,)):
                value = torch.randn(shape) / WIDTH**0.5
                if stiefel and shape == (WIDTH, RANK):
                    geoopt = import_module("geoopt")
                    point = geoopt.ManifoldParameter(torch.linalg.qr(value).Q, manifold=geoopt.Stiefel())
                else:
                    point = nn.Parameter(value)
                self.points.append(point)
        self.gradients = [1e-3 * torch.randn(point.shape) for point in self.points]
        self.optimizer = make(self.points)

    def prepare(self) -> None:
        for point, gradient in zip(self.points, self.gradients, strict=True):
            point.grad = gradient.clone()

    def step(self) -> None:
        self.optimizer.step()


def medians(arms: dict[str, Any], gate: Gate, *, rounds: int = 40) -> dict[str, dict[str, float]]:
    """Seconds of the whole step and of the optimizer alone, all arms in turn in every round."""
    whole: dict[str, list[float]] = {name: [] for name in arms}
    alone: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 3):
        for name, arm in arms.items():
            gate.pass_through()
            begin = time.perf_counter()
            arm.prepare()
            middle = time.perf_counter()
            arm.step()
            end = time.perf_counter()
            if turn >= 3:
                whole[name].append(end - begin)
                alone[name].append(end - middle)
    return {name: {"whole": statistics.median(whole[name]), "alone": statistics.median(alone[name])} for name in arms}


def one() -> dict[str, Any]:
    gate, found = Gate(), {}
    for batch in BATCHES:
        arms: dict[str, Any] = {
            "AdamW": Arm(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4), batch),
            "RiemannianAdam": Arm(lambda m: tnlayers.RiemannianAdam(m, 1e-5), batch),
            "RiemannianSGD": Arm(lambda m: tnlayers.RiemannianSGD(m, 1e-4, momentum=0.9), batch),
            "RankAdaptive, every=1": Arm(_settled, batch),
        }
        found[str(batch)] = medians(arms, gate)
    try:
        geoopt = import_module("geoopt")
    except ImportError:
        return found
    found["factors"] = medians(
        {
            "Adam": Factors(lambda points: torch.optim.Adam(points, lr=1e-4), stiefel=False),
            f"geoopt {geoopt.__version__} RiemannianAdam": Factors(
                lambda points: geoopt.optim.RiemannianAdam(points, lr=1e-4), stiefel=True
            ),
        },
        gate,
    )
    return found


def _settled(net: nn.Module) -> tnlayers.RankAdaptive:
    optimizer = tnlayers.RankAdaptive(net, 1e-5, tol=1e-9, reserve=0)
    optimizer.settle()
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", action="store_true", help="one process; prints JSON")
    parser.add_argument("--full", action="store_true", help="the same, 5 processes")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one()))
        return
    runs = in_processes(__file__, ["--one"], 5 if arguments.full else 3)
    rows, table = [], []
    for part in runs[0]:
        base = next(iter(runs[0][part]))
        for name in runs[0][part]:
            ratios = {
                key: median_of([{"r": run[part][name][key] / run[part][base][key]} for run in runs], "r")
                for key in ("whole", "alone")
            }
            seconds = {key: median_of([run[part][name] for run in runs], key) for key in ("whole", "alone")}
            rows.append({"part": part, "arm": name, **seconds, "whole_ratio": ratios["whole"],
                         "alone_ratio": ratios["alone"]})  # fmt: skip
            both = part != "factors"
            table.append(
                [
                    f"batch {part}" if both else "optimizer alone, U and V on Stiefel",
                    name,
                    f"{1e3 * seconds['whole']:.1f} ms" if both else "",
                    f"{ratios['whole']:.2f}" if both else "",
                    f"{1e3 * seconds['alone']:.2f} ms",
                    f"{ratios['alone']:.1f}",
                ]
            )
    notes = [
        f"MLP of {LAYERS} layers {WIDTH} x {WIDTH}, LowRank at rank {RANK}, float32. A whole step is forward, backward "
        f"and the optimizer; reach {REACH} x AdamW. Ratios are medians over processes of medians over 40 rounds, all "
        "arms in turn.",
    ]
    publish(
        "riemannian",
        "Riemannian optimizers",
        markdown(["", "optimizer", "whole step", "ratio", "optimizer alone", "ratio"], table),
        rows,
        notes,
    )


if __name__ == "__main__":
    main()
