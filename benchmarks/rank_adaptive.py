"""Rank-adaptive training: accuracy at a given size against the papers and against fixed ranks, and the price of a step.

python benchmarks/rank_adaptive.py            short rows: 3 epochs, 2 seeds; about 25 minutes
python benchmarks/rank_adaptive.py --full     20 epochs, 5 seeds; hours, continues where it was interrupted
python benchmarks/rank_adaptive.py --only step,lenet

Every finished run is kept in --out; the same command continues there. All arms of a row get the same epochs, batches,
schedule, and the same trials of their learning rate (seed 100, one epoch of 20,000 images, 10,000 others held out).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Gate, compare, in_processes, markdown, median_of, publish
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, svd, ttm_svd, tucker2
from tnlayers.files import write_atomic
from tnlayers.main_job.data import Dataset, load_data
from tnlayers.main_job.training import accuracy, learning_rate
from tnlayers.optim.ranks import Ranks, within_budget

BATCH = 128
SETTLE = 0.6
TRIALS = (1e-3, 2e-3, 4e-3)
SMALL = 0.1
"""Start of the networks, of torch's standard deviation: a full one would be what the tolerance measures."""

REACH = {  # (net, share) -> published by DLRT after 20 epochs (mean of 5), and the figure to reach there
    ("lenet", 0.07): ("98.21 ± .44", "98.7"),
    ("lenet", 0.05): ("98.14 ± .33", "98.6"),
    ("lenet", 0.03): ("98.12 ± .34", "98.3"),
    ("mlp", 0.05): ("97.5 to 98.5", "98.2"),
    ("vgg6", 0.10): ("within 1-2 of dense", "dense - 1"),
}

Make = Callable[[int, int], nn.Module]


# --- networks: every dense layer is made by `linear` or `conv`, so that one function serves all arms ---


def lenet(linear: Callable[[int, int], nn.Module], conv: Callable[[int, int, int], nn.Module]) -> nn.Sequential:
    """20-50-500-10, 430,500 weights; the first convolution (500) and the last layer (5,000) stay dense."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), conv(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def mlp(linear: Callable[[int, int], nn.Module], conv: Any) -> nn.Sequential:
    """784-500-500-500-500-10; the last layer stays dense."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (784, 500, 500, 500):
        layers += [linear(width, 500), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(500, 10))


def vgg6(linear: Any, conv: Callable[[int, int, int], nn.Module]) -> nn.Sequential:
    """Five 3 x 3 convolutions 32-64-64-128-128 with batch norm, three pools and a mean, one linear layer."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    for n, m, pool in ((32, 64, False), (64, 64, True), (64, 128, False), (128, 128, True)):
        layers += [conv(n, m, 3), nn.BatchNorm2d(m), nn.ReLU()] + ([nn.MaxPool2d(2)] if pool else [])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 10))


NETS = {"lenet": lenet, "mlp": mlp, "vgg6": vgg6}
PADDED = {"lenet": 0, "mlp": 0, "vgg6": 1}
MODES = {(800, 500): ((5, 10, 10), (8, 10, 10)), (784, 500): ((5, 10, 10), (7, 14, 8)), (500, 500): ((5, 10, 10),) * 2}


def dense(net: str) -> nn.Sequential:
    return NETS[net](nn.Linear, lambda n, m, k: nn.Conv2d(n, m, k, padding=PADDED[net]))


def tensor_net(net: str, format: str, rank: int) -> nn.Sequential:
    """Linear layers as `low_rank` or `ttm`, convolutions as Tucker-2, from small random networks."""

    def linear(width: int, out: int) -> nn.Module:
        std = SMALL / math.sqrt(3 * width)
        rows, cols = MODES[width, out]
        factory = (
            tnlayers.random_network(LowRank, rank=min(rank, out), std=std)
            if format == "low_rank"
            else tnlayers.random_network(TTMatrix, rank=rank, std=std, row_modes=rows, col_modes=cols)
        )
        return tnlayers.Linear(width, out, network=factory)

    def conv(width: int, out: int, side: int) -> nn.Module:
        std = SMALL / math.sqrt(3 * width * side**2)
        ranks = (min(rank, out), min(rank, width))
        factory = tnlayers.random_network(Tucker, rank=ranks, modes=(0, 1), std=std)
        return tnlayers.Conv2d(width, out, side, padding=PADDED[net], network=factory)

    return NETS[net](linear, conv)


def networks(model: nn.Module) -> list[tnlayers.NetworkLayer]:
    return [module for module in model.modules() if isinstance(module, tnlayers.NetworkLayer)]


def parameters(model: nn.Module) -> int:
    """Numbers stored, each network as its format counts (LowRank merged)."""
    inside = {id(p) for layer in networks(model) for p in layer.cores}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return rest + sum(layer.numel() for layer in networks(model))


def tolerance_of(model: nn.Module, share: float, whole: int) -> int:
    """Parameters that the networks may hold, so that the whole model keeps `share` of the dense one."""
    return int(share * whole) - (parameters(model) - sum(layer.numel() for layer in networks(model)))


# --- arms: each takes data, a share of the parameters and a learning rate, and returns the trained model ---


class Loop:
    """Epochs of one schedule over one data set."""

    def __init__(self, data: Dataset, epochs: int, seed: int) -> None:
        self.data, self.epochs = data, epochs
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = epochs * math.ceil(len(data.train_x) / BATCH)
        self.flip = data.shape[0] == 3

    def run(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, begin: float = 0, end: float = 1
    ) -> None:
        """The part of the schedule from `begin` to `end` of the steps."""
        model.train()
        first, last, step = round(begin * self.steps), round(end * self.steps), 0
        for _ in range(self.epochs):
            order = torch.randperm(len(self.data.train_x), generator=self.generator)
            for rows in order.split(BATCH):
                step += 1
                if not first < step <= last:
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step - 1, self.steps, lr)
                x = self.data.train_x[rows]
                if self.flip:
                    mirrored = torch.rand(len(x), 1, 1, 1, generator=self.generator) < 0.5
                    x = torch.where(mirrored, x.flip(-1), x)
                loss = F.cross_entropy(model(x), self.data.train_y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)


def train_dense(net: str, loop: Loop, lr: float, **_: Any) -> nn.Module:
    model = dense(net)
    loop.run(model, adamw(model, lr), lr)
    return model


def train_adaptive(
    net: str, loop: Loop, lr: float, *, share: float, whole: int, format: str, start: int = 2, every: int = 1
) -> nn.Module:
    model = tensor_net(net, format, start)
    optimizer = tnlayers.RankAdaptive(
        model,
        lr,
        tol=0.1,
        reserve=2,
        every=every,
        budget=tolerance_of(model, share, whole),
        settle=round(SETTLE * loop.steps),
        weight_decay=0.01,
    )
    loop.run(model, optimizer, lr)
    return tnlayers.compact(model)


def uniform_rank(net: str, format: str, share: float, whole: int) -> int:
    rank = 1
    while parameters(tensor_net(net, format, rank + 1)) <= share * whole:
        rank += 1
    return rank


def train_fixed(net: str, loop: Loop, lr: float, *, share: float, whole: int, format: str) -> nn.Module:
    """The largest uniform rank that fits, AdamW on the factors, torch's standard deviation."""
    model = tensor_net(net, format, uniform_rank(net, format, share, whole))
    for layer in networks(model):
        layer.reset_parameters()
    loop.run(model, adamw(model, lr), lr)
    return model


def cut_to_share(model: nn.Module, share: float, whole: int) -> None:
    """Round every network so that all together keep the share: least singular values of all layers first."""
    from decompositions import round as cut
    from decompositions.formats.gauge import cut_by

    found, nets = [], []
    for layer in networks(model):
        own = Ranks(0.0, None, 0, 1, None)
        net, _ = cut_by(layer.network.detach(), own.chooser(layer.network.detach(), fixed=False))
        found.append(own)
        nets.append(net)
    chosen = within_budget(nets, found, tolerance_of(model, share, whole))
    for layer, net, ranks in zip(networks(model), nets, chosen, strict=True):
        layer.set_network(cut(net, rank=ranks))


def train_pruned(net: str, loop: Loop, lr: float, *, share: float, whole: int, format: str) -> nn.Module:
    """High ranks by AdamW for the first part, then the least singular values are cut, then the rest of the schedule."""
    model = tensor_net(net, format, 32)
    for layer in networks(model):
        layer.reset_parameters()
    loop.run(model, adamw(model, lr), lr, 0, SETTLE)
    cut_to_share(model, share, whole)
    loop.run(model, adamw(model, lr), lr, SETTLE, 1)
    return model


def train_svd(net: str, loop: Loop, lr: float, *, share: float, whole: int, format: str) -> nn.Module:
    """The dense network for the first part, then decomposed and cut to the share, then the rest of the schedule."""
    start = dense(net)
    loop.run(start, adamw(start, lr), lr, 0, SETTLE)
    model = tensor_net(net, format, 1)
    for a, b in zip(start, model, strict=True):
        if isinstance(b, tnlayers.Conv2d):
            b_new = tnlayers.Conv2d.from_dense(a, partial(tucker2, tol=1e-3))
        elif isinstance(b, tnlayers.Linear):
            rows, cols = MODES[b.in_features, b.out_features]
            recipe = (
                partial(svd, tol=1e-3)
                if format == "low_rank"
                else partial(ttm_svd, tol=1e-3, row_modes=rows, col_modes=cols)
            )
            b_new = tnlayers.Linear.from_dense(a, recipe)
        else:
            b.load_state_dict(a.state_dict())
            continue
        model[list(model).index(b)] = b_new
    cut_to_share(model, share, whole)
    loop.run(model, adamw(model, lr), lr, SETTLE, 1)
    return model


ARMS = {
    "dense": train_dense,
    "rank-adaptive": train_adaptive,
    "fixed rank": train_fixed,
    "prune ranks": train_pruned,
    "SVD, then fine-tune": train_svd,
}


# --- rows ---


class Store:
    """Finished runs, in one file that is replaced whole."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.runs: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, key: Sequence[object], make: Callable[[], Any]) -> Any:
        name = json.dumps(list(key))
        if name not in self.runs:
            begin = time.perf_counter()
            value = make()
            self.runs[name] = {"value": value, "seconds": round(time.perf_counter() - begin, 1)}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file, json.dumps(self.runs, indent=1) + "\n")
            print(name, value, f"{self.runs[name]['seconds']} s", file=sys.stderr, flush=True)
        return self.runs[name]["value"]


def tuned(store: Store, data: Dataset, net: str, arm: str, options: dict[str, Any]) -> float:
    """The learning rate of the trials with the best held-out accuracy."""
    small = Dataset(**{**data.__dict__, "train_x": data.train_x[:20_000], "train_y": data.train_y[:20_000],
                       "test_x": data.train_x[-10_000:], "test_y": data.train_y[-10_000:]})  # fmt: skip

    def one(lr: float) -> float:
        torch.manual_seed(100)
        return accuracy(ARMS[arm](net, Loop(small, 1, 100), lr, **options), small.test_x, small.test_y)

    found = {lr: store.get(["trial", net, arm, _plain(options), lr], lambda lr=lr: one(lr)) for lr in TRIALS}
    return max(found, key=lambda lr: found[lr])


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "whole"}


def row(store: Store, data: Dataset, net: str, arm: str, epochs: int, seeds: int, **options: Any) -> dict[str, Any]:
    whole = parameters(dense(net))
    if arm != "dense":
        options["whole"] = whole
    trial = {k: v for k, v in options.items() if k != "start"}  # one tuning for all starts
    lr = tuned(store, data, net, arm, trial)

    def one(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = ARMS[arm](net, Loop(data, epochs, seed), lr, **options)
        ranks = [list(layer.network.ranks) for layer in networks(model)]
        return {"accuracy": accuracy(model, data.test_x, data.test_y), "parameters": parameters(model), "ranks": ranks}

    runs = [
        store.get([net, arm, _plain(options), epochs, lr, seed], lambda seed=seed: one(seed)) for seed in range(seeds)
    ]
    values = [100 * run["accuracy"] for run in runs]
    return {
        "net": net,
        "arm": arm,
        **_plain(options),
        "lr": lr,
        "epochs": epochs,
        "accuracy": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "accuracies": values,
        "keep": statistics.fmean(run["parameters"] for run in runs) / whole,
        "ranks": [run["ranks"] for run in runs],
    }


# --- the price of a step ---


def step_case(
    width: int = 2048, rank: int = 64
) -> tuple[Callable[[], object], dict[str, Callable[[], object]], dict[str, int]]:
    torch.manual_seed(0)
    x, y = torch.randn(256, width), torch.randint(0, 10, (256,))

    def model(make: Make) -> nn.Sequential:
        hidden = [part for _ in range(4) for part in (make(width, width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    def stepper(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

        return step

    def low(rank: int) -> nn.Sequential:
        return model(lambda n, m: tnlayers.Linear(n, m, network=tnlayers.random_network(LowRank, rank=rank)))

    base = model(nn.Linear)
    reference = stepper(base, torch.optim.AdamW(base.parameters(), lr=1e-3, fused=True))
    plain = low(rank)
    found = {"plain LowRank, AdamW": stepper(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True))}
    memory = {"dense": 3 * sum(p.numel() for p in base.parameters()) * 4}
    for name, options in (
        ("every=1", {}),
        ("every=10, center windows", {"every": 10, "window": "center"}),
        ("every=10, tangent windows", {"every": 10}),
    ):
        net = low(rank - 2)
        optimizer = tnlayers.RankAdaptive(net, 1e-5, tol=1e-9, reserve=2, max_rank=rank, **options)
        step = stepper(net, optimizer)
        if name == "every=1":
            found[name] = step
        else:  # ten steps with their rounding are one call
            found[name] = lambda step=step: [step() for _ in range(10)]
        step()
        track = optimizer._tracks
        moments = sum(m.numel() for t in track for m in (*t.moment, *t.second))
        gradients = sum(p.grad.numel() for p in net.parameters() if p.grad is not None)
        probes = sum(p.numel() for t in track for p in t.layer.probes)
        memory[name] = 4 * (moments + gradients + probes)
    return reference, found, memory


def step_one() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    gate = Gate()
    reference, found, memory = step_case()
    seconds, rows = compare(reference, found, gate, budget=60, least=9, most=40)
    for name, entry in rows.items():
        if name.startswith("every=10"):
            entry["ratio"], entry["seconds"] = entry["ratio"] / 10, entry["seconds"] / 10
    return {"dense": seconds, "rows": rows, "memory": memory}


# --- tables ---


def quality(store: Store, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    epochs, seeds = (20, 5) if arguments.full else (3, 2)
    only, rows = arguments.only, []
    data = load_data(f"mnist:{arguments.mnist}") if {"lenet", "mlp"} & set(only) else None
    if "lenet" in only:
        rows.append(row(store, data, "lenet", "dense", epochs, seeds))
        sizes = [(0.07, "low_rank"), (0.05, "low_rank"), (0.03, "ttm")]
        if arguments.full:
            sizes += [(0.07, "ttm"), (0.05, "ttm"), (0.03, "low_rank")]
        for share, format in sizes:
            rows.append(row(store, data, "lenet", "rank-adaptive", epochs, seeds, share=share, format=format))
        for arm in ("fixed rank", "prune ranks", "SVD, then fine-tune"):
            rows.append(row(store, data, "lenet", arm, epochs, seeds, share=0.03, format="ttm"))
    if "mlp" in only:
        rows.append(row(store, data, "mlp", "dense", epochs, seeds))
        for start in (8, 64, 256):
            rows.append(
                row(store, data, "mlp", "rank-adaptive", epochs, seeds, share=0.05, format="low_rank", start=start)
            )
        for arm in ("fixed rank", "prune ranks", "SVD, then fine-tune"):
            rows.append(row(store, data, "mlp", arm, epochs, seeds, share=0.05, format="low_rank"))
    if "cifar" in only:
        data = load_data(f"cifar10:{arguments.cifar}")
        seeds = seeds if arguments.full else 1
        rows.append(row(store, data, "vgg6", "dense", epochs, seeds))
        rows.append(row(store, data, "vgg6", "rank-adaptive", epochs, seeds, share=0.10, format="low_rank"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", action="store_true", help="one process of the step row; prints JSON")
    parser.add_argument("--full", action="store_true", help="20 epochs, 5 seeds")
    parser.add_argument("--only", default="step,lenet,mlp,cifar", help="which rows")
    parser.add_argument("--mnist", default="../shared/data/mnist")
    parser.add_argument("--cifar", default="../shared/data/cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-rank-adaptive.json"))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(step_one()))
        return
    arguments.only = arguments.only.split(",")
    warnings.simplefilter("ignore", tnlayers.RankLimitWarning)
    store = Store(arguments.out)
    parts, notes, rows = [], [], {}
    if "step" in arguments.only:
        runs = store.get(["step"], lambda: in_processes(__file__, [], 3))
        rows["step"] = runs
        reach = {"every=1": ".52", "every=10, center windows": ".18"}
        table = [
            [
                name,
                reach.get(name, ""),
                f"{median_of([run['rows'][name] for run in runs], 'ratio'):.3f}",
                "" if name not in runs[0]["memory"] else f"{runs[0]['memory'][name] / runs[0]['memory']['dense']:.3f}",
            ]
            for name in runs[0]["rows"]
        ]
        parts.append(markdown(["step of 4 x 2048, batch 256, rank 64", "reach", "of dense AdamW", "memory"], table))
        notes.append(
            "Memory: gradients, moments and probes of the optimizer against gradients and two moments of dense AdamW "
            "(reach .15). Steps of windows are means over ten, their rounding included."
        )
    found = quality(store, arguments)
    if found:
        rows["quality"] = found
        table = [
            [
                entry["net"],
                entry["arm"],
                entry.get("format", ""),
                entry.get("start", ""),
                f"{100 * entry['keep']:.1f} %",
                f"{entry['accuracy']:.2f}" + ("" if entry["spread"] is None else f" ± {entry['spread']:.2f}"),
                *(REACH[entry["net"], entry["share"]] if entry["arm"] == "rank-adaptive" else ("", "")),
                f"{entry['lr']:g}",
            ]
            for entry in found
        ]
        parts.append(
            markdown(
                ["net", "arm", "format", "start", "parameters kept", "test accuracy", "published", "reach", "lr"], table
            )
        )
        notes.append(
            f"{found[0]['epochs']} epochs, batch {BATCH}, one cycle, weight decay .01; learning rate of every arm the "
            f"best of {', '.join(f'{lr:g}' for lr in TRIALS)} on 10,000 held-out images after an epoch of 20,000."
        )
    name = "rank_adaptive" + ("_full" if arguments.full else "")
    publish(name, "Rank-adaptive training", "\n\n".join(parts), rows, notes)


if __name__ == "__main__":
    main()
