"""Does the chosen plan win? Random networks x batches, every plan measured, the choice held against the best.

python benchmarks/plans.py --networks 500        about 25 minutes; resumes from runs/bench-plans.jsonl

Two figures: the plan predicted best (no measurement), and the one that a probe of the shortlist takes (plans predicted
within 1.6 of the best are timed once, outside `forward`). The probe and the measurement of record are separate timings.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from timing import Gate, markdown, publish

from decompositions import TT, LowRank, Network, TTMatrix, Tucker, calibrate, plan_apply
from decompositions.formats.modes import balanced_modes
from decompositions.measure import SHORTLIST, time_plans

ROUNDS = 7


def draw(seed: int) -> tuple[str, Network, int]:
    """A random network of 2 to 20 percent of the dense size (more for TT-matrices), and a batch."""
    rng = random.Random(seed)
    sides = [rng.choice([256, 384, 512, 768, 1000, 1024, 1536, 2048]) for _ in range(2)]
    batch = rng.choice([1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
    kind = rng.choice(["LowRank", "Tucker", "TT", "TTMatrix"])
    order = rng.choice([2, 3, 4]) if kind != "LowRank" else 1
    rows, cols = (balanced_modes(side, order) for side in sides)
    generator = torch.Generator().manual_seed(seed)
    share = rng.uniform(0.02, 0.2)
    size = sides[0] * sides[1]
    if kind == "LowRank":
        rank: Any = max(1, round(share * size / sum(sides)))
        net: Network = LowRank.random(row_modes=rows, col_modes=cols, rank=rank, generator=generator)
    elif kind == "Tucker":
        keep = share ** (1 / (2 * order))
        rank = tuple(max(1, round(keep * n)) for n in (*rows, *cols))
        net = Tucker.random(row_modes=rows, col_modes=cols, rank=rank, generator=generator)
    elif kind == "TT":
        rank = max(2, round((share * size / (sum(rows) + sum(cols))) ** 0.5))
        net = TT.random(row_modes=rows, col_modes=cols, rank=min(rank, 256), generator=generator)
    else:
        pairs = sum(m * n for m, n in zip(rows, cols, strict=True))
        rank = max(2, round((share * size / pairs) ** (0.5 if order > 2 else 1.0)))
        net = TTMatrix.random(row_modes=rows, col_modes=cols, rank=min(rank, 256), generator=generator)
    return f"{kind} {rows}|{cols} {net.ranks}", net, batch


def measure(seed: int, gate: Gate) -> dict[str, Any]:
    name, net, batch = draw(seed)
    kept = plan_apply(net, batch)[0]
    plans = sorted(plan_apply(net, batch), key=lambda plan: plan.seconds)
    gate.pass_through()
    shortlist = [plan for plan in plans if plan.seconds <= SHORTLIST * plans[0].seconds]
    probed = time_plans(net, batch, shortlist, rounds=5)[0][0]
    gate.pass_through()
    # plans predicted at ten times the best are timed once: the search stays exhaustive at a bearable price
    near = [plan for plan in plans if plan.seconds <= 10 * plans[0].seconds]
    far = [plan for plan in plans if plan not in near]
    times = dict(time_plans(net, batch, near, rounds=ROUNDS))
    if far:
        times |= dict(time_plans(net, batch, far, rounds=1))
    best = min(times.values())
    return {
        "seed": seed,
        "network": name,
        "batch": batch,
        "plans": [[plan.strategy, plan.seconds, times[plan]] for plan in plans],
        "predicted": times[plans[0]] / best,
        "probed": times[probed] / best,
        "light": times[kept] / best,
        "merge": min((times[plan] for plan in plans if plan.strategy == "merge"), default=best) / best,
        "path": min((times[plan] for plan in plans if plan.strategy == "path"), default=best) / best,
        "flops": times[min(plans, key=lambda plan: plan.flops)] / best,
    }


def summary(rows: list[dict[str, Any]], key: str) -> list[str]:
    ratios = sorted(row[key] for row in rows)
    within = sum(ratio <= 1.15 for ratio in ratios) / len(ratios)
    mean = torch.tensor(ratios, dtype=torch.float64).log().mean().exp().item()
    return [f"{within:.1%}", f"{mean:.3f}", f"{ratios[int(0.99 * (len(ratios) - 1))]:.2f}", f"{ratios[-1]:.2f}"]


def main(count: int) -> None:
    path = Path("runs/bench-plans.jsonl")
    path.parent.mkdir(exist_ok=True)
    done = {row["seed"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    calibrate("cpu", save=False)
    gate = Gate()
    with path.open("a") as file:
        for seed in range(count):
            if seed not in done:
                done[seed] = measure(seed, gate)
                print(json.dumps(done[seed]), file=file, flush=True)
            if seed % 25 == 24:
                print(f"{seed + 1} of {count}: {summary(list(done.values()), 'predicted')}", flush=True)
    rows = [done[seed] for seed in range(count)]
    choosers = {
        "plan predicted best": "predicted",
        "probe of the shortlist": "probed",
        "default: predicted best, a quarter against plans that hold more than the dense layer": "light",
        "fewest FLOPs": "flops",
        "always merge": "merge",
        "always opt_einsum's path": "path",
    }
    head = ["chooser", "within 1.15 of the best", "geometric mean", "99th percentile", "worst"]
    table = [[name, *summary(rows, key)] for name, key in choosers.items()]
    large = [row for row in rows if row["batch"] >= 8]
    table += [[f"{name}, batch >= 8", *summary(large, key)] for name, key in list(choosers.items())[:2]]
    notes = [
        f"{count} random networks (LowRank, Tucker, TT, TT-matrix; sides 256 to 2048; batch 1 to 2048), float32, both"
        " ways with the gradient of x; every plan measured (20th percentile of interleaved calls). Reach: 95 %"
        " within 1.15, worst 1.5, with a probe allowed."
    ]
    publish("plans", "Choice of the plan", markdown(head, table), rows, notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=500)
    main(parser.parse_args().networks)
