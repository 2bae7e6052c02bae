"""The command `tnlayers`: parses and prints, no logic.

Exit codes: 0 done, 1 unexpected error, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from tnlayers.cli_grid import app as _grid
from tnlayers.cli_kg import app as _kg

app = typer.Typer(
    name="tnlayers",
    help="Tensor-network layers: train and compare them, compress pretrained models, look into weight files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(_grid)
app.add_typer(_kg)

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

COMPRESS_EXAMPLES = """[bold]Examples[/bold]

  tnlayers compress PATH --keep 0.7 --calib texts.jsonl --out small

  tnlayers compress PATH --keep 0.7 --calib texts.jsonl --dry-run

  tnlayers compress PATH --max-error 0.1 --calib texts.txt --recover distill --seconds 300 --out small

  tnlayers compress timm:resnet18.a1_in1k --speed 2 --calib pictures --out small

keep is the share of the targeted weights; the share of the whole model stands beside it. The calibration is stored
beside OUT and serves every other size. In Python: tnlayers.load(OUT).
"""

EVAL_EXAMPLES = """[bold]Examples[/bold]

  tnlayers eval small --document wiki.txt --window 1024

  tnlayers eval small --against PATH --texts texts.jsonl --metrics size,perplexity,speed,memory

  tnlayers eval small --reference PATH --texts texts.jsonl

  tnlayers eval small --labelled sst2.tsv --label label
"""

EXPORT_EXAMPLES = """[bold]Examples[/bold]

  tnlayers export small ordinary --dense

  tnlayers export small plain --two-linear
"""

REFUSED = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
"""What the library raises where the input is at fault; a full disk is not."""


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


@app.command(epilog=COMPRESS_EXAMPLES)
def compress(
    source: Annotated[str, typer.Argument(help="A folder of transformers, a name on its hub, or timm:NAME.")],
    keep: Annotated[float | None, typer.Option(help="Share of the targeted weights' numbers to keep.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Instead: predicted relative error of the outputs.")] = None,
    max_params: Annotated[int | None, typer.Option(help="Instead: parameters of the whole model.")] = None,
    speed: Annotated[float | None, typer.Option(help="Instead: how many times fewer multiplications.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Texts (.txt .jsonl .tsv .csv, also .gz .xz), or a folder of pictures.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Texts to measure on; by default the rest of --calib.")] = None,
    column: Annotated[str | None, typer.Option(help="Where the text is: a field or a column.")] = None,
    n: Annotated[int, typer.Option("--n", help="Texts or pictures to calibrate on.")] = 256,
    measure: Annotated[int, typer.Option(help="Texts to measure on.")] = 512,
    length: Annotated[int, typer.Option("--len", help="Tokens a text is cut at.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the samples and probes.")] = 0,
    targets: Annotated[str, typer.Option(help="Name patterns, separated by commas; all layers by default.")] = "",
    exclude: Annotated[str, typer.Option(help="Name patterns to leave alone.")] = "",
    formats: Annotated[str, typer.Option(help="Of low_rank, tucker, ttm, kronecker.")] = "low_rank,tucker",
    ranks: Annotated[
        str, typer.Option(help="loss, knapsack, energy, welore, effective, uniform; auto: loss with gradients.")
    ] = "auto",
    method: Annotated[
        str, typer.Option(help="weighted; plain, asvd, svd_llm, output_pca, utilized_rank, fisher to compare.")
    ] = "weighted",
    mu: Annotated[str, typer.Option(help="Ridge of the inputs relative to their mean square, or adaptive.")] = "0",
    multiple: Annotated[int, typer.Option(help="Ranks are multiples of it.")] = 1,
    weighting: Annotated[str, typer.Option(help="Of inputs: full, diagonal or none.")] = "full",
    gradients: Annotated[bool, typer.Option(help="Weigh errors by what they do to the model's outputs.")] = True,
    sequential: Annotated[bool, typer.Option("--sequential", help="Collect again after every block.")] = False,
    recover: Annotated[str, typer.Option(help="none, distill or blocks.")] = "none",
    seconds: Annotated[float, typer.Option(help="Of recovery.")] = 300.0,
    lr: Annotated[float | None, typer.Option(help="Of recovery; 3e-4 of distill, 1e-3 of blocks by default.")] = None,
    metrics: Annotated[str, typer.Option(help="See tnlayers eval; by default those that suit the model.")] = "",
    task: Annotated[str | None, typer.Option(help="causal-lm, embedding, sequence-classification, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, change nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make a pretrained model smaller: calibrate, choose ranks for all layers, replace, measure before and after."""

    def work() -> None:
        from tnlayers.compression.job import CompressConfig, run

        config = CompressConfig(
            source=source, out=out, keep=keep, max_error=max_error, max_params=max_params, speed=speed, calib=calib,
            test=test, column=column, count=n, measured=measure, length=length, batch_size=batch_size, seed=seed,
            targets=_names(targets), exclude=_names(exclude), formats=_names(formats), ranks=ranks, method=method,
            mu="adaptive" if mu == "adaptive" else _number(mu, "--mu"), multiple=multiple, weighting=weighting,
            gradients=gradients, sequential=sequential, recover=recover, seconds=seconds, lr=lr,
            metrics=_names(metrics) or None, task=task, dtype=dtype, device=device, dry_run=dry_run,
            overwrite=overwrite,
        )  # fmt: skip
        with _teller(quiet) as tell:
            result = run(config, tell)
        if as_json:
            _print_json(result.to_dict())
        else:
            typer.echo(result.text())
            if result.folder is not None:
                typer.echo(f"\n{result.folder} written, with report.html, in {sum(result.seconds.values()):.0f} s")

    kept = "nothing was written" if dry_run else "what was calibrated or recovered is kept; the same command continues"
    _guard(work, f"interrupted; {kept}", REFUSED)


@app.command("eval", epilog=EVAL_EXAMPLES)
def evaluate(
    source: Annotated[str, typer.Argument(help="A folder of transformers or of tnlayers, or a name on the hub.")],
    texts: Annotated[Path | None, typer.Option(help="Texts: .txt .jsonl .tsv .csv, also .gz .xz.")] = None,
    document: Annotated[Path | None, typer.Option(help="One long .txt for perplexity, blank lines kept.")] = None,
    labelled: Annotated[Path | None, typer.Option(help="Texts with labels, for accuracy.")] = None,
    label: Annotated[str | None, typer.Option(help="Where the label is; by default label.")] = None,
    column: Annotated[str | None, typer.Option(help="Where the text is.")] = None,
    reference: Annotated[str | None, typer.Option(help="Model that embeddings are compared with.")] = None,
    metrics: Annotated[str, typer.Option(help="Of size, perplexity, similarity, accuracy, probe, speed, memory.")] = "",
    n: Annotated[int | None, typer.Option("--n", help="Texts taken; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    window: Annotated[int | None, typer.Option(help="Of perplexity; 2048 or what the model has.")] = None,
    stride: Annotated[int | None, typer.Option(help="Of perplexity; the window by default.")] = None,
    bos: Annotated[str, typer.Option(help="Before windows: auto, yes (each), start (once) or no.")] = "auto",
    length: Annotated[int | None, typer.Option("--len", help="Tokens a text is cut at.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Texts, or windows, a batch.")] = None,
    against: Annotated[str | None, typer.Option(help="Another model: both in one table.")] = None,
    task: Annotated[str | None, typer.Option(help="causal-lm, embedding, sequence-classification, ...")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure a model: perplexity, similarity of embeddings, accuracy, tokens a second, memory."""

    def work() -> None:
        from tnlayers.evaluation.job import EvalConfig, run

        config = EvalConfig(
            source=source, texts=texts, document=document, labelled=labelled, label=label, column=column,
            reference=reference, metrics=_names(metrics) or None, count=n, seed=seed, window=window, stride=stride,
            bos=bos, length=length, batch_size=batch_size, against=against, task=task, device=device,
        )  # fmt: skip
        with _teller(quiet) as tell:
            found = run(config, tell)
        if as_json:
            _print_json([one.to_dict() for one in found])
        else:
            from tnlayers.evaluation.result import compare

            typer.echo(found[0].table() if len(found) == 1 else compare(*found))

    _guard(work, "interrupted; nothing was written", REFUSED)


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    source: Annotated[Path, typer.Argument(help="A folder that tnlayers compress wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dense: Annotated[bool, typer.Option("--dense", help="Ordinary weights, for any program.")] = False,
    two_linear: Annotated[bool, typer.Option("--two-linear", help="Pairs of plain layers, as small as ours.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write a compressed model as an ordinary folder, or with pairs of plain layers."""

    def work() -> None:
        if dense == two_linear:
            raise ValueError("export: give exactly one of --dense and --two-linear")
        from tnlayers.pretrained.exported import export_dense, export_two_linear

        if dense:
            typer.echo(f"{export_dense(source, out, overwrite=overwrite)} written")
            return
        folder, stayed = export_two_linear(source, out, overwrite=overwrite)
        typer.echo(f"{folder} written")
        for name, why in stayed.items():
            typer.echo(f"  {name} became dense: {why}")

    _guard(work, "interrupted; nothing was written", REFUSED)


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
        with warnings.catch_warnings():
            warnings.showwarning = _warn
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


def _warn(message: Warning | str, category: type[Warning], *details: Any, **more: Any) -> None:
    """A warning as one line, without the place in the code."""
    typer.echo(f"tnlayers: {' '.join(str(message).split())}", err=True)


def _fail(message: str, code: int) -> None:
    worker = os.environ.get("RANK", "0")
    who = "tnlayers" if worker == "0" else f"tnlayers, worker {worker}"
    typer.echo(f"{who}: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, allow_nan=False))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} must be a number or 'adaptive', got {text!r}") from None


@contextmanager
def _teller(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Progress of the library, (done, total, text), on the bar; without a terminal none."""
    from tnlayers.main_job.job import Event

    with _watcher(quiet or not sys.stderr.isatty()) as watch:
        if watch is None:
            yield None
        else:
            show = watch
            yield lambda done, total, text: show(Event("step", text, done, total))


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
