"""The command `tnlayers`: parses and prints, no logic.

Exit codes: 0 done, 1 unexpected error, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="tnlayers",
    help="Tensor-network layers: train and compare them, look into weight files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN_EXAMPLES = """[bold]Examples[/bold]

  tnlayers train

  tnlayers train --seeds 3 --out runs/three

  tnlayers train --rank-adaptive

  tnlayers train --data mnist:PATH --nets cnn --epochs 6

  tnlayers train --data cifar10:PATH --limit 5000 --json > result.json

  torchrun --standalone --nproc-per-node 2 -m tnlayers.cli train --rank-adaptive

The same command again skips finished rows; Ctrl-C keeps them. A rank-adaptive row goes on from its last checkpoint, bit
for bit, even after kill -9. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

GONE = ("gloo", "connection", "peer", "timed out")
"""Words of a collective whose partner has died."""

INSPECT_EXAMPLES = """[bold]Examples[/bold]

  tnlayers inspect model.safetensors

  tnlayers inspect checkpoint.pt --html spectra.html

  tnlayers inspect model.safetensors --json | jq .
"""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"tnlayers {version('tnlayers')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Tensor-network layers: train and compare them, look into weight files."""


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    data: Annotated[
        str,
        typer.Option(help="digits, mnist:PATH, fashion-mnist:PATH, cifar10:PATH or imagefolder:PATH."),
    ] = "digits",
    out: Annotated[Path | None, typer.Option(help="Folder for all results; runs/NAME by default.")] = None,
    nets: Annotated[str, typer.Option(help="Networks, separated by commas.")] = "mlp,cnn",
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(help="Number of seeds; the table shows mean and spread.")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Of dense and scratch; 30 for small data, else 6.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="After the conversion; 3 for small data, else 1.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step; 32 for small data, else 128.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-3,
    tensorized_share: Annotated[float, typer.Option(help="Parameters kept by the conversion, at most.")] = 0.10,
    scratch_share: Annotated[float, typer.Option(help="Parameters of the net from scratch, at most.")] = 0.08,
    rank_adaptive: Annotated[
        bool,
        typer.Option(
            "--rank-adaptive/--no-rank-adaptive",
            help="Also train tensor layers at ranks that the training finds, within the share from scratch.",
        ),
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints of a rank-adaptive row, from which it goes on.")
    ] = 200,
    limit: Annotated[int | None, typer.Option(help="Keep that many training and test images.")] = None,
    size: Annotated[int | None, typer.Option(help="Resize to SIZE x SIZE (imagefolder).")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 1 for small data, else torch's number.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget what OUT holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train dense nets, their conversions and tensor layers from scratch; write one table, figures and a page."""

    def work() -> None:
        from tnlayers.main_job.job import JobConfig, run

        config = JobConfig(
            data=data,
            out=Path("runs") / data.partition(":")[0] if out is None else out,
            seed=seed,
            seeds=seeds,
            nets=tuple(name.strip() for name in nets.split(",")),
            epochs=epochs,
            finetune_epochs=finetune_epochs,
            batch_size=batch_size,
            lr=lr,
            tensorized_share=tensorized_share,
            scratch_share=scratch_share,
            rank_adaptive=rank_adaptive,
            checkpoint_every=checkpoint_every,
            limit=limit,
            size=size,
            threads=threads,
            overwrite=overwrite,
        )
        with _watcher(quiet) as watch:
            result = run(config, watch)
        if os.environ.get("RANK", "0") != "0":  # under torchrun worker 0 prints
            return
        if as_json:
            _print_json(result.to_dict())
        else:
            from tnlayers.main_job.rows import footnote, table

            typer.echo(table(result.summaries))
            typer.echo(footnote(result.settings, result.hardware, result.summaries))
            typer.echo(f"{result.out / 'index.html'} written in {result.seconds:.0f} s")

    interrupted = "interrupted; finished rows are kept, and the same command continues"
    _guard(work, interrupted)


@app.command(epilog=INSPECT_EXAMPLES)
def inspect(
    file: Annotated[Path, typer.Argument(help="A safetensors file, or a state dict saved by torch.")],
    html: Annotated[Path | None, typer.Option(help="Also write the page with all spectra.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Singular values of a weight file: stable and effective rank, ranks to convert at."""

    def work() -> None:
        from tnlayers.inspection import inspect_file
        from tnlayers.main_job.job import Event

        with _watcher(quiet or not sys.stderr.isatty()) as watch:

            def tell(done: int, total: int, name: str) -> None:
                if watch is not None:
                    watch(Event("step", name, done, total))

            inspection = inspect_file(file, progress=tell)
        if html is not None:
            inspection.html(html)
        if as_json:
            _print_json(inspection.to_dict())
        else:
            typer.echo(inspection.table())
            if html is not None:
                typer.echo(f"{html} written")

    _guard(work, "interrupted; nothing was written", (ValueError, OSError))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script: runs the command and exits with its code."""
    app(args=None if arguments is None else list(arguments))


def _guard(work: Callable[[], None], interrupted: str, refused: tuple[type[Exception], ...] = ()) -> None:
    """Run a command's work; user errors become one line and exit code 2, Ctrl-C exit code 130.

    Anything else is a fault of ours and keeps its traceback (exit code 1).
    """
    from tnlayers.main_job.data import DataError
    from tnlayers.main_job.rows import JobError
    from tnlayers.main_job.training import TrainingError

    bad_input: tuple[type[Exception], ...] = (DataError, JobError, TrainingError, ImportError, *refused)
    try:
        work()
    except KeyboardInterrupt:
        _fail(interrupted, 130)
    except bad_input as error:
        _fail(str(error), 2)
    except RuntimeError as error:
        gone = os.environ.get("WORLD_SIZE", "1") != "1" and any(word in str(error).lower() for word in GONE)
        if not gone:
            raise
        _fail(
            f"another worker is gone ({error}); finished rows are kept, and the same command continues; "
            "torchrun --max-restarts=N starts it again by itself",
            1,
        )
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody reads the output any more
            raise
        _fail(f"{error}; what was finished before is kept", 1)


def _fail(message: str, code: int) -> None:
    worker = os.environ.get("RANK", "0")
    who = "tnlayers" if worker == "0" else f"tnlayers, worker {worker}"
    typer.echo(f"{who}: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, allow_nan=False))


def _watcher(quiet: bool) -> AbstractContextManager[Callable[[Any], None] | None]:
    if quiet or os.environ.get("RANK", "0") != "0":
        return nullcontext(None)
    return _Bar() if sys.stderr.isatty() else nullcontext(_print_rows)


def _print_rows(event: Any) -> None:
    """Without a terminal: one line a finished row."""
    if event.kind in ("row", "skip", "resume"):
        typer.echo(event.label, err=True)


class _Bar:
    """Progress on stderr: one bar for the whole job, one line a finished row above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column

        # where the line is narrow the bar gives way first, then the end of the text (ranks can be many)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None, table_column=Column(max_width=40)),
            TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=Console(stderr=True),
        )

    def __enter__(self) -> Callable[[Any], None]:
        self._progress.__enter__()
        self._task = self._progress.add_task("starting", total=None)
        return self._show

    def __exit__(self, *details: Any) -> None:
        self._progress.__exit__(*details)

    def _show(self, event: Any) -> None:
        if event.kind in ("row", "skip", "resume"):
            self._progress.console.print(event.label, markup=False, highlight=False)
        self._progress.update(
            self._task, description=event.label.partition(":")[0], completed=event.done, total=event.total or None
        )


if __name__ == "__main__":
    main()
