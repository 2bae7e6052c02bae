"""Knowledge graphs: steps and evaluation against PyKEEN and a bare loop, and what papers claim, with equal tuning.

python benchmarks/kg.py                               under 30 minutes on 2 cores
python benchmarks/kg.py --only epochs,mixed           some parts
python benchmarks/kg.py --full                        hours: long runs of MIG-TF, and WN18RR

Rows are kept in runs/bench-kg.json: a part that is there is not run again (--again runs it), one that was broken off
goes on. PyKEEN, with its own UMLS
and Kinships, comes with make bench-env.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kg_evaluation
import kg_mixed
import kg_picture
import kg_steps
import kg_wn18rr
import torch
from kg_runs import EPOCHS, Row, fit, spread, tucker
from timing import markdown, publish

from tnlayers.files import write_atomic
from tnlayers.kg import RTuckER, Triples, load_triples

ROOT = Path(__file__).parent.parent
STORE = ROOT / "runs" / "bench-kg.json"

# --- an epoch of TuckER, ours and PyKEEN's ---


def pykeen_run(name: str, seed: int) -> Row:
    import logging

    logging.disable(logging.WARNING)
    from pykeen.pipeline import pipeline

    result = pipeline(
        dataset=name,
        model="tucker",
        model_kwargs={"embedding_dim": 100, "relation_dim": 30, "dropout_0": 0.2, "dropout_1": 0.2, "dropout_2": 0.2},
        dataset_kwargs={"create_inverse_triples": True},
        training_loop="lcwa",
        loss="bcewithlogits",
        optimizer="adam",
        optimizer_kwargs={"lr": 3e-3},
        training_kwargs={"num_epochs": EPOCHS, "batch_size": 128, "label_smoothing": 0.1, "use_tqdm": False},
        evaluation_kwargs={"use_tqdm": False},
        random_seed=seed,
    )
    return {
        "seed": seed,
        "seconds": result.train_seconds,
        "epochs": EPOCHS,
        "parameters": result.model.num_parameters,
        "mrr": float(result.metric_results.get_metric("both.realistic.inverse_harmonic_mean_rank")),
        "hits@1": float(result.metric_results.get_metric("both.realistic.hits_at_1")),
        "hits@10": float(result.metric_results.get_metric("both.realistic.hits_at_10")),
    }


def ours_run(triples: Triples, seed: int) -> Row:
    """The same model, joint law of dropout and smoothing included."""
    return fit(tucker(triples, seed, masks="row"), triples, seed, smoothing="others")


def epochs_part() -> list[Row]:
    """Ours and PyKEEN's in turn, seed by seed."""
    found = []
    for name in ("umls", "kinships"):
        triples = load_triples(name)
        for seed in range(3):
            found.append({"set": name, "method": "ours", **ours_run(triples, seed)})
            found.append({"set": name, "method": "PyKEEN", **pykeen_run(name, seed)})
            print(found[-2:], file=sys.stderr, flush=True)
    return found


def epochs_table(found: list[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["set"] for row in found):
        of = {
            method: [row for row in found if (row["set"], row["method"]) == (name, method)]
            for method in ("ours", "PyKEEN")
        }
        seconds = {k: statistics.median(row["seconds"] / row["epochs"] for row in rows) for k, rows in of.items()}
        for method, rows in of.items():
            lines.append(
                [
                    name,
                    method,
                    f"{seconds[method]:.3f} s",
                    f"{seconds[method] / seconds['PyKEEN']:.2f}",
                    "0.25" if method == "ours" else "",
                    *(spread([row[key] for row in rows]) for key in ("mrr", "hits@1", "hits@10")),
                    f"{rows[0]['parameters']:,}",
                ]
            )
    head = ["set", "who", "an epoch", "ratio", "reach", "test MRR", "Hits@1", "Hits@10", "parameters"]
    return (
        f"## TuckER d_e 100, d_r 30, batch 128, {EPOCHS} epochs\n\nBCE with label smoothing .1 as PyKEEN's, "
        "Adam 3e-3, three dropouts of .2 with a mask a row, batch norm; 3 seeds, ours and PyKEEN's in turn.\n\n"
        + markdown(head, lines)
    )


# --- WN18RR: a step, an evaluation ---


def step_part() -> list[Row]:
    return [kg_steps.wn18rr_row()]


def step_table(found: list[Row]) -> str:
    arms = found[0]["arms"]
    lines = []
    for arm, name in kg_steps.ARMS.items():
        own, line = arms[arm], [name]
        for key, text in (
            ("seconds", "{:.0f} ms".format(1e3 * own["seconds"])),
            ("peak", f"{own['peak'] / 2**20:.0f} MB"),
        ):
            ratios = [f"{arms[ours][key] / own[key]:.2f}" for ours in ("ours", "ours bfloat16")]
            line += [text, *(ratios if not arm.startswith("ours") else ["", ""])]
        lines.append(line)
    head = [
        "step",
        "time",
        "ours / this",
        "bfloat16 / this",
        "peak above model and moments",
        "ours / this",
        "bfloat16 / this",
    ]
    return (
        "## A step of TuckER 200/30 on WN18RR, batch 128\n\nReach: .6 of the time and .5 of the memory of a bare torch "
        "step with dense targets. Ours is the loss and the backward pass of `train`; label smoothing .1 in all. Three "
        "float32 products are most of a step of either, so that what is left to gain beside fused Adam is small.\n\n"
        + markdown(head, lines)
    )


def evaluation_part(arguments: argparse.Namespace) -> list[Row]:
    return kg_evaluation.rows(arguments.data / "wn18rr", share=1.0, rounds=1)


def evaluation_table(found: list[Row]) -> str:
    lines = [
        [
            row["evaluation"] + (f", batch {row['batch']}" if row["batch"] else ""),
            row["queries"],
            f"{row['seconds']:.2f} s",
            f"{row['ratio']:.3f}",
            f"{row['mrr']:.6f}",
        ]
        for row in found
    ]
    head = ["evaluation", "queries", "time", "/ PyKEEN", "MRR (random weights)"]
    return (
        "## Filtered evaluation of the WN18RR test set, TuckER 200/30\n\nReach .3; PyKEEN at the best of three batch "
        "sizes.\n\n" + markdown(head, lines)
    )


# --- claims of papers: equal parameters, equal tuning ---

SETS = ("umls", "kinships")


def decayed(step: int, steps: int) -> float:
    """To a tenth at the end."""
    return 0.1 ** (step / steps)


def adaptive_part(arguments: argparse.Namespace, done: list[Row], keep: Keep) -> list[Row]:
    """R-TuckER with ranks found by a tolerance against fixed ranks; the same learning rates tried for every arm."""
    found = list(done)
    arms: dict[str, Row] = {f"fixed {ranks}": {"ranks": ranks} for ranks in ((15, 20), (20, 30), (30, 40))}
    arms |= {f"adaptive, tol {tol}": {"ranks": (30, 40), "tol": tol} for tol in (0.08, 0.1, 0.12)}
    for name in SETS:
        triples = load_triples(name)

        def run(seed: int, lr: float, options: Row, triples: Triples = triples) -> Row:
            tol = options.get("tol")
            generator = torch.Generator().manual_seed(seed)
            model = RTuckER(triples, options["ranks"], adaptive=tol is not None, generator=generator)
            optimizer = {"name": "R-TuckER Adam"} | ({} if tol is None else {"tol": tol, "settle": 0.4})
            asked: Row = {"epochs": arguments.adaptive_epochs, "optimizer": optimizer, "schedule": decayed}
            return fit(model, triples, seed, lr=lr, **asked) | {"ranks": list(model.network.ranks)}

        for arm, options in arms.items():
            if any((row["set"], row["arm"]) == (name, arm) for row in found):
                continue
            rates = (0.02, 0.04)
            trials = {lr: run(0, lr, options) for lr in rates}
            best = max(rates, key=lambda lr: trials[lr]["valid"])
            for seed in range(3):
                row = trials[best] if seed == 0 else run(seed, best, options)
                found.append({"set": name, "arm": arm, "lr": best, **row})
            print(found[-1], file=sys.stderr, flush=True)
            keep(found)
    return found


def adaptive_table(found: list[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["set"] for row in found):
        arms: dict[str, list[Row]] = {}
        for row in found:
            if row["set"] == name:
                arms.setdefault(row["arm"], []).append(row)
        fixed = {arm: statistics.mean(row["valid"] for row in rows) for arm, rows in arms.items() if "fixed" in arm}
        best = arms[max(fixed, key=lambda arm: fixed[arm])]
        size = statistics.mean(row["parameters"] for row in best)
        for arm, rows in arms.items():
            own = statistics.mean(row["parameters"] for row in rows)
            ranks = " ".join("x".join(map(str, row["ranks"])) for row in rows) if "adaptive" in arm else ""
            lines.append(
                [name, arm + (" (best)" if rows is best else ""), f"{own:,.0f}", f"{own / size:.2f}",
                 spread([row["mrr"] for row in rows]), spread([row["hits@10"] for row in rows]), rows[0]["lr"], ranks]
            )  # fmt: skip
    head = ["set", "arm", "parameters", "of the best fixed", "test MRR", "Hits@10", "lr", "ranks found"]
    return (
        "## R-TuckER: ranks found by a tolerance against the best fixed rank\n\nReach: the same MRR within the spread "
        "at .7 of the parameters. Shared tables, Adam on the manifold, 3 seeds; the best fixed rank by validation.\n\n"
        + markdown(head, lines)
    )


Keep = Callable[[list[Row]], None]
Work = Callable[[argparse.Namespace, list[Row], Keep], list[Row]]
PARTS: dict[str, tuple[Work, Callable[[list[Row]], str]]] = {
    "epochs": (lambda arguments, done, keep: epochs_part(), epochs_table),
    "step": (lambda arguments, done, keep: step_part(), step_table),
    "evaluation": (lambda arguments, done, keep: evaluation_part(arguments), evaluation_table),
    "mixed": (lambda arguments, done, keep: kg_mixed.rows(90, done, keep), kg_mixed.table),
    "mixed-long": (lambda arguments, done, keep: kg_mixed.rows(300, done, keep), kg_mixed.table),
    "adaptive": (adaptive_part, adaptive_table),
    "wn18rr": (
        lambda arguments, done, keep: kg_wn18rr.rows(arguments.data / "wn18rr", STORE.parent / "kg-wn18rr", done, keep),
        kg_wn18rr.table,
    ),
}
"""Part -> its rows, given those done before and what keeps them on the way; and their table."""
LONG = ("mixed-long", "wn18rr")
"""Hours: with --full, or by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="parts by commas: " + ", ".join(PARTS))
    parser.add_argument("--full", action="store_true", help="the parts of hours too: " + ", ".join(LONG))
    parser.add_argument("--again", action="store_true", help="run parts that are there once more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--adaptive-epochs", type=int, default=60)
    arguments = parser.parse_args()
    usual = [part for part in PARTS if arguments.full or part not in LONG]
    chosen = usual if arguments.only is None else arguments.only.split(",")
    for part in chosen:
        if part not in PARTS:
            parser.error(f"no part {part!r}, expected some of {', '.join(PARTS)}")
    if importlib.util.find_spec("pykeen") is None:
        parser.error("pykeen is not installed (make bench-env)")
    torch.set_num_threads(arguments.threads)
    for part in chosen:
        done = [] if arguments.again else stored().get(part, [])
        if not done or part not in stored().get("complete", []):
            start = time.perf_counter()
            found = PARTS[part][0](arguments, done, partial(keep, part, complete=False))
            keep(part, found, complete=True)
            print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    store = stored()
    text = "\n\n".join(table(store[part]) for part, (_, table) in PARTS.items() if store.get(part))
    for name in SETS if {"epochs", "mixed", "adaptive"} <= set(store["complete"]) else ():
        print(kg_picture.draw(store, name), file=sys.stderr)
    publish("kg", "Knowledge graphs", text, store, [f"pykeen {version('pykeen')}"])


def stored() -> dict[str, Any]:
    """Rows by part; "complete" names the parts that were run to the end."""
    found: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    return found


def keep(part: str, found: list[Row], *, complete: bool) -> None:
    """Write the rows of a part beside the others, which another run may have written meanwhile."""
    store = stored()
    done = set(store.get("complete", [])) - {part}
    store[part] = found
    store["complete"] = sorted(done | {part} if complete else done)
    STORE.parent.mkdir(exist_ok=True)
    write_atomic(STORE, json.dumps(store, indent=1) + "\n")


if __name__ == "__main__":
    main()
