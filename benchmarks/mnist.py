"""The MNIST rows of the README: LeNet-5 dense, converted to 10 % and fine-tuned one epoch, and from scratch at 8 %.

    python benchmarks/mnist.py --data mnist:PATH            about 15 minutes on 2 cores, 3 seeds
    python benchmarks/mnist.py --data mnist:PATH --quick    a smoke run, writes no results

Every (variant, seed) that is finished is kept in --out; the same command continues there after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tnlayers.files import write_atomic
from tnlayers.main_job.data import DataError
from tnlayers.main_job.job import Event, JobConfig, run
from tnlayers.main_job.result import JobResult
from tnlayers.main_job.rows import SCRATCH, TENSORIZED, JobError, Summary, footnote, table

RESULTS = Path(__file__).parent / "results"
TARGETS = {SCRATCH: (0.08, 0.3), TENSORIZED: (0.10, 0.2)}
"""variant -> (largest share of the dense parameters, largest loss of accuracy in points)"""


def config(arguments: argparse.Namespace) -> JobConfig:
    quick = arguments.quick
    return JobConfig(
        data=arguments.data,
        out=arguments.out or ("runs/bench-mnist-quick" if quick else "runs/bench-mnist"),
        nets=("cnn",),
        seeds=1 if quick else 3,
        epochs=1 if quick else 6,
        finetune_epochs=1,
        batch_size=128,
        lr=2e-3,
        tensorized_share=TARGETS[TENSORIZED][0],
        scratch_share=TARGETS[SCRATCH][0],
        limit=2000 if quick else None,
        threads=arguments.threads,
        overwrite=arguments.overwrite,
    )


def verdict(summary: Summary) -> dict[str, Any]:
    share, loss = TARGETS[summary.variant]
    assert summary.gap is not None
    return {
        "row": f"{summary.net} {summary.variant}",
        "share": summary.share,
        "share_allowed": share,
        "gap_points": summary.gap,
        "gap_allowed": -loss,
        "reached": summary.share <= share and summary.gap >= -loss,
    }


def verdict_line(found: dict[str, Any]) -> str:
    share = f"{100 * found['share']:.2f} % of the dense parameters (at most {100 * found['share_allowed']:g} %)"
    gap = f"{found['gap_points']:+.2f} points (at least {found['gap_allowed']:+.1f})"
    return f"{found['row']}: {share}, {gap}: {'reached' if found['reached'] else 'MISSED'}"


def write_results(folder: Path, result: JobResult, verdicts: Sequence[dict[str, Any]], text: str) -> None:
    content = {key: value for key, value in result.to_dict().items() if key not in ("out", "page", "trained")}
    content["settings"] = {**content["settings"], "data": "mnist"}  # where the files lay does not matter
    content["seconds"] = round(sum(row.seconds for row in result.rows))  # of all rows, also those of earlier calls
    content["verdicts"] = list(verdicts)
    write_atomic(folder / "mnist.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / "mnist.md", f"# MNIST\n\n```\n{text}\n```\n")


def show(event: Event) -> None:
    if event.kind in ("row", "skip"):
        print(event.label, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="mnist:PATH, the folder of the four idx files")
    parser.add_argument("--out", help="folder for rows, models, figures and the page; runs/bench-mnist by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for mnist.json and mnist.md")
    parser.add_argument("--overwrite", action="store_true", help="forget what OUT holds")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 2,000 images; writes no results")
    arguments = parser.parse_args(argv)
    try:
        result = run(config(arguments), show)
    except (DataError, JobError, ImportError) as error:
        print(f"mnist: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mnist: interrupted; finished rows are kept, and the same command continues", file=sys.stderr)
        return 130
    verdicts = [verdict(summary) for summary in result.summaries if summary.variant in TARGETS]
    lines = [table(result.summaries), footnote(result.settings, result.hardware, result.summaries)]
    if not arguments.quick:
        lines += ["", *map(verdict_line, verdicts)]
        arguments.results.mkdir(parents=True, exist_ok=True)
        write_results(arguments.results, result, verdicts, "\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
