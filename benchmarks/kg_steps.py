"""A step of TuckER on WN18RR, with the loss that `train` uses, against bare torch steps with dense targets.

python benchmarks/kg_steps.py               the row
python benchmarks/kg_steps.py --arm bare    one arm of it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from timing import low
from torch import Tensor, nn

from tnlayers.kg import OneToN, TuckER
from tnlayers.kg.chunks import MEMORY, Batch

WN18RR = SimpleNamespace(num_entities=40_943, num_relations=22, inverse=True)
SMOOTHING = 0.1
PER_QUERY = 2  # true tails a query, about

ARMS = {
    "ours": "ours: norms, dropouts, sparse targets",
    "ours bfloat16": "ours, products in bfloat16 (amp)",
    "bare": "bare torch step: dense targets, no norms or dropouts, Adam as it comes",
    "bare fused": "the same, Adam(fused=True) as ours",
    "published": "bare torch step with the published norms and dropouts",
}
"""Each with what it is."""


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


def one_arm(arm: str, steps: int = 8, memory: int = MEMORY) -> dict[str, float]:
    """Seconds of a WN18RR step (200/30, batch 128), and bytes at its peak above the model and Adam's moments."""
    torch.manual_seed(0)
    n, batch = WN18RR.num_entities, 128
    ours, fused = arm.startswith("ours"), True if arm.startswith("ours") or "fused" in arm else None
    model: Any = TuckER(WN18RR, 200, 30) if ours else Bare(n, 22, 200, 30, arm == "published")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=fused)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    h, rows = torch.randint(n, (batch,)), torch.arange(batch).repeat_interleave(PER_QUERY)
    r = torch.multinomial(torch.rand(22) ** 2, batch, replacement=True).sort().values
    tails = torch.randint(n, (len(rows),))
    loss = OneToN(SMOOTHING, "published")
    context = partial(torch.autocast, "cpu", torch.bfloat16) if "bfloat16" in arm else nullcontext
    asked = Batch(h, r, rows, tails, batch, len(rows))

    def step() -> None:
        optimizer.zero_grad()
        if ours:
            loss.backward(model, asked, context, memory)
        else:
            targets = torch.zeros(batch, n)
            targets[rows, tails] = 1
            targets = (1 - SMOOTHING) * targets + 1 / n
            F.binary_cross_entropy_with_logits(model.score_all(h, r), targets).backward()
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
    """Every arm in a process of its own."""
    found = {}
    for arm in ARMS:
        command = [sys.executable, __file__, "--arm", arm]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[arm] = json.loads(done.stdout.splitlines()[-1])
    return {"row": "TuckER 200/30 WN18RR step", "arms": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=list(ARMS))
    arm = parser.parse_args().arm
    print(json.dumps(one_arm(arm) if arm else wn18rr_row()))


if __name__ == "__main__":
    main()
