"""Steps of knowledge-graph models: an epoch of TuckER against PyKEEN, a WN18RR step against a bare one.

python benchmarks/kg_steps.py umls | kinships | wn18rr       one row each (PyKEEN where it is installed)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from timing import low
from torch import Tensor, nn

from tnlayers.kg import TuckER

WN18RR = SimpleNamespace(num_entities=40_943, num_relations=22, inverse=True)
PER_QUERY = 2  # true tails a query, about


class SparseBCE(torch.autograd.Function):
    """`sum softplus(x) - sum x[positive]`; the gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, tails: Tensor) -> Tensor:
        ctx.x, ctx.where = x.detach(), (rows, tails)
        total = torch.stack([F.softplus(part).sum() for part in x.split(16)]).sum()
        return total - x[rows, tails].sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, (rows, tails) = ctx.x.sigmoid_(), ctx.where
        x[rows, tails] -= 1
        return x.mul_(g), None, None


class Bare(nn.Module):
    """TuckER as one writes it: a map for every row of the batch; with the published norms and dropouts, or without."""

    def __init__(self, n: int, relations: int, d: int, k: int, published: bool) -> None:
        super().__init__()
        self.e, self.r = nn.Embedding(n, d), nn.Embedding(relations, k)
        self.w = nn.Parameter(torch.rand(k, d, d) * 2 - 1)
        self.norms = nn.ModuleList(nn.BatchNorm1d(d) if published else nn.Identity() for _ in range(2))
        self.drops = nn.ModuleList(nn.Dropout(p) if published else nn.Identity() for p in (0.2, 0.2, 0.3))
        nn.init.xavier_normal_(self.e.weight)
        nn.init.xavier_normal_(self.r.weight)

    def score_all(self, h: Tensor, r: Tensor) -> Tensor:
        d = self.e.embedding_dim
        x = self.drops[0](self.norms[0](self.e(h)))
        maps = self.drops[1]((self.r(r) @ self.w.view(len(self.w), -1)).view(-1, d, d))
        y = torch.bmm(x[:, None], maps)[:, 0]
        return self.drops[2](self.norms[1](y)) @ self.e.weight.T


def queries(triples: Tensor, relations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct (head, relation) with inverse relations; the tails of query q are tails[offsets[q]:offsets[q + 1]]."""
    h, r, t = triples.T
    both = torch.cat([triples, torch.stack([t, r + relations, h], 1)]).unique(dim=0)  # sorted
    keys, counts = both[:, :2].unique_consecutive(dim=0, return_counts=True)
    return keys, F.pad(counts.cumsum(0), (1, 0)), both[:, 2]


def epoch(model: nn.Module, optimizer: Any, keys: Tensor, offsets: Tensor, tails: Tensor, batch: int = 128) -> None:
    """One pass over the queries in random order: mean BCE without smoothing."""
    count = offsets.diff()
    for own in torch.randperm(len(keys)).split(batch):
        many = count[own]
        rows = torch.arange(len(own)).repeat_interleave(many)
        within = torch.arange(len(rows)) - (many.cumsum(0) - many)[rows]
        logits = model.score_all(keys[own, 0], keys[own, 1])
        scale = 1 / logits.numel()
        loss = SparseBCE.apply(logits, rows, tails[offsets[own][rows] + within]) * scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def epoch_row(name: str, epochs: int = 5) -> dict[str, Any]:
    """Seconds an epoch of TuckER 100/30 on one of PyKEEN's sets, batch 128; PyKEEN's own loop beside it."""
    from pykeen.datasets import get_dataset
    from pykeen.models import TuckER as Theirs
    from pykeen.training import LCWATrainingLoop

    data = get_dataset(dataset=name, dataset_kwargs={"create_inverse_triples": True})
    training: Any = data.training
    keys, offsets, tails = queries(training.mapped_triples, training.real_num_relations)
    graph = SimpleNamespace(num_entities=data.num_entities, num_relations=2 * training.real_num_relations, inverse=True)
    ours = TuckER(graph, 100, 30)
    adam = torch.optim.Adam(ours.parameters(), lr=3e-3, fused=True)
    theirs = Theirs(
        triples_factory=training, embedding_dim=100, relation_dim=30, dropout_0=0.2, dropout_1=0.2, dropout_2=0.2
    )
    loop = LCWATrainingLoop(
        model=theirs, triples_factory=training, optimizer=torch.optim.Adam(theirs.parameters(), lr=3e-3)
    )
    times: dict[str, list[float]] = {"ours": [], "pykeen": []}
    for round_ in range(epochs + 1):  # in turn, the first to warm up
        start = time.perf_counter()
        epoch(ours, adam, keys, offsets, tails)
        middle = time.perf_counter()
        loop.train(
            triples_factory=training,
            num_epochs=round_ + 1,
            batch_size=128,
            label_smoothing=0.1,
            use_tqdm=False,
            clear_optimizer=False,
            continue_training=round_ > 0,
        )
        if round_:
            times["ours"].append(middle - start)
            times["pykeen"].append(time.perf_counter() - middle)
    mine, peer = low(times["ours"]), low(times["pykeen"])
    return {"row": f"TuckER 100/30 {name}", "seconds": mine, "pykeen": peer, "ratio": mine / peer, "queries": len(keys)}


def one_arm(arm: str, steps: int = 8) -> dict[str, float]:
    """Seconds of a WN18RR step (200/30, batch 128), and bytes at its peak above the model and Adam's moments."""
    torch.manual_seed(0)
    n, batch = WN18RR.num_entities, 128
    model: Any = TuckER(WN18RR, 200, 30) if arm == "ours" else Bare(n, 22, 200, 30, arm == "published")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=arm == "ours")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    h, rows = torch.randint(n, (batch,)), torch.arange(batch).repeat_interleave(PER_QUERY)
    r = torch.multinomial(torch.rand(22) ** 2, batch, replacement=True)
    tails = torch.randint(n, (len(rows),))

    def step() -> None:
        logits = model.score_all(h, r)
        if arm == "ours":
            loss = SparseBCE.apply(logits, rows, tails) / logits.numel()
        else:
            targets = torch.zeros(batch, n)
            targets[rows, tails] = 1
            loss = F.binary_cross_entropy_with_logits(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _status("VmRSS")
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": low(times[1:]), "peak": _status("VmHWM") - before}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def wn18rr_row() -> dict[str, Any]:
    """A step of ours (norms, dropouts, sparse targets) against bare ones with dense targets, a process each."""
    found = {}
    for arm in ("ours", "bare", "published"):
        command = [sys.executable, __file__, "--arm", arm]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[arm] = json.loads(done.stdout.splitlines()[-1])
    ours = found["ours"]
    return {
        "row": "TuckER 200/30 WN18RR step",
        **ours,
        **{f"seconds / {arm}": ours["seconds"] / found[arm]["seconds"] for arm in ("bare", "published")},
        **{f"peak / {arm}": ours["peak"] / found[arm]["peak"] for arm in ("bare", "published")},
        "arms": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=["umls", "kinships", "wn18rr"])
    parser.add_argument("--arm", choices=["ours", "bare", "published"])
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(one_arm(args.arm)))
        return
    for name in args.rows:
        print(json.dumps(wn18rr_row() if name == "wn18rr" else epoch_row(name)), flush=True)


if __name__ == "__main__":
    main()
