"""The commands `tnlayers kg ...`: parse and print, no logic. Exit codes are those of the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="kg",
    help="Knowledge graphs: train a model on triples, evaluate it exactly, ask it, export its tables.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN_EXAMPLES = """[bold]Examples[/bold]

  tnlayers kg train DATA --out runs/first

  tnlayers kg train DATA --model TuckER --set entity_dim=100 --set relation_dim=30 --lr 3e-3 --out runs/tucker

  tnlayers kg train DATA --recipe tucker-wn18rr --epochs 50 --out runs/wn18rr

  tnlayers kg train umls --optimizer RankAdaptive --epochs 200 --every 10 --out runs/adaptive

  tnlayers kg train umls --model RTuckER --set ranks=10,20 --optimizer "R-TuckER Adam" --lr .03 --out runs/r-tucker

  tnlayers kg train umls --model RTuckER --set ranks=5,10 --set adaptive=true --optimizer "R-TuckER Adam" --lr .03
  --set-optimizer tol=.1 --out runs/found

  tnlayers kg train DATA --model MIGTF --base runs/tucker --set hyperbolic_dim=20 --out runs/migtf

  tnlayers kg train DATA --train loss=softmax --train label_smoothing=0.2 --out runs/softmax

DATA is a folder with train, valid and test (.tsv .csv .txt .nt, also packed), a file, or the name of a PyKEEN dataset.
The same command again goes on from its checkpoint, bit for bit, after Ctrl-C and even kill -9.
"""

EVAL_EXAMPLES = """[bold]Examples[/bold]

  tnlayers kg eval runs/first

  tnlayers kg eval runs/first --split valid --by-relation
"""

PREDICT_EXAMPLES = """[bold]Examples[/bold]

  tnlayers kg predict runs/first --head virus --relation causes

  tnlayers kg predict runs/first --relation causes --tail disease_or_syndrome --new

  tnlayers kg predict runs/first --head virus --tail disease_or_syndrome
"""

EXPORT_EXAMPLES = """[bold]Examples[/bold]

  tnlayers kg export runs/first --out tables

  tnlayers kg export runs/first --form w2v --what entities --out tables
"""

Folder = Annotated[Path, typer.Argument(help="A folder that kg train wrote.")]
Device = Annotated[str, typer.Option(help="Where the model runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    data: Annotated[str, typer.Argument(help="Folder or file of triples, or the name of a PyKEEN dataset.")],
    out: Annotated[Path, typer.Option(help="Folder for all results.")],
    model: Annotated[
        str | None, typer.Option(help="TuckER (default), RTuckER, MIGTF, RotH, MEIM, ComplEx, ...")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Model, options and training of a paper: tucker-wn18rr, ...")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the model; may be repeated.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder of a trained model that MIGTF is made on.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training queries; 100 by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Queries a step; 128 by default.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; 1e-3 by default.")] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="AdamW, Adam, Adagrad, SGD, RiemannianSGD, RiemannianAdam, RankAdaptive; 'R-TuckER Adam' or 'R-TuckER "
            "SGD' for an RTuckER."
        ),
    ] = None,
    set_optimizer: Annotated[
        list[str] | None,
        typer.Option("--set-optimizer", help="KEY=VALUE of --optimizer, such as tol=.1; may be repeated."),
    ] = None,
    every: Annotated[int | None, typer.Option(help="Epochs between validations.")] = None,
    patience: Annotated[int | None, typer.Option(help="Validations without a better MRR that end training.")] = None,
    further: Annotated[
        list[str] | None, typer.Option("--train", help="KEY=VALUE of tnlayers.kg.train; may be repeated.")
    ] = None,
    inverse: Annotated[bool, typer.Option(help="Answer heads as tails of inverse relations.")] = True,
    columns: Annotated[str, typer.Option(help="Order of head, relation, tail; - leaves one out.")] = "hrt",
    unseen: Annotated[str, typer.Option(help="Test triples of something never trained: keep, drop or error.")] = "keep",
    seed: Annotated[int, typer.Option(help="Of the start, orders, dropout.")] = 0,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget what OUT holds.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a model, evaluate it, and write model, log, figures and a page."""
    from tnlayers.cli import REFUSED, _guard, _print_json, _teller

    def work() -> None:
        from tnlayers.kg.folder import parse_options
        from tnlayers.kg.job import TrainConfig, run
        from tnlayers.kg.training_page import evaluation_text

        own = parse_options(tuple(set_optimizer or ()))
        if own and optimizer is None:
            raise ValueError(
                f"kg train: --set-optimizer gives options of --optimizer, expected both, got {own} alone; name one"
            )
        asked = {"name": optimizer, **own} if own else optimizer
        named = {
            "epochs": epochs, "batch_size": batch_size, "lr": lr, "optimizer": asked, "every": every,
            "patience": patience,
        }  # fmt: skip
        training: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
        config = TrainConfig(
            data, out, model=model, recipe=recipe, options=parse_options(tuple(option or ())), base=base,
            training=parse_options(tuple(further or ())) | training, inverse=inverse, columns=columns, unseen=unseen,
            seed=seed, device=device, threads=threads, overwrite=overwrite,
        )  # fmt: skip
        with _teller(quiet) as tell:
            result = run(config, tell)
        if as_json:
            _print_json(result.to_dict())
            return
        typer.echo(str(result.history))
        for split, metrics in result.metrics.items():
            typer.echo(f"\n{split}\n{evaluation_text(metrics)}")
        typer.echo(f"\n{result.parameters:,} parameters; {out / 'index.html'} written in {result.seconds:.0f} s")

    _guard(work, "interrupted; the same command goes on from the checkpoint", REFUSED)


@app.command("eval", epilog=EVAL_EXAMPLES)
def evaluate(
    folder: Folder,
    data: Annotated[str | None, typer.Option(help="Other triples of the same vocabulary.")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    direction: Annotated[str, typer.Option(help="both, head or tail.")] = "both",
    raw: Annotated[bool, typer.Option("--raw", help="Count other known answers as mistakes.")] = False,
    by_relation: Annotated[bool, typer.Option("--by-relation", help="Also a row for every relation.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Queries scored together.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Filtered ranking in both directions: realistic, optimistic, pessimistic, by class of relation."""
    from tnlayers.cli import REFUSED, _guard, _print_json

    def work() -> None:
        from tnlayers.kg.job import EvalConfig, run_eval
        from tnlayers.kg.training_page import evaluation_text

        found = run_eval(EvalConfig(folder, data, split, direction, not raw, batch_size, device))
        if as_json:
            _print_json(found.to_dict())
        else:
            typer.echo(evaluation_text(found, by_relation))

    _guard(work, "interrupted", REFUSED)


@app.command(epilog=PREDICT_EXAMPLES)
def predict(
    folder: Folder,
    head: Annotated[str | None, typer.Option(help="Name; leave it out to ask for heads.")] = None,
    relation: Annotated[str | None, typer.Option(help="Name; leave it out to ask for relations.")] = None,
    tail: Annotated[str | None, typer.Option(help="Name; leave it out to ask for tails.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="Answers listed.")] = 10,
    new: Annotated[bool, typer.Option("--new", help="Leave known answers out; else they are marked.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Rank what completes a triple of which two parts are given."""
    from tnlayers.cli import REFUSED, _guard, _print_json

    def work() -> None:
        from tnlayers.kg.job import PredictConfig, run_predict

        found = run_predict(PredictConfig(folder, head, relation, tail, count, new, device))
        if as_json:
            _print_json(found.to_dict())
        else:
            typer.echo(str(found))

    _guard(work, "interrupted", REFUSED)


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[str, typer.Option(help="npy, parquet (pandas and pyarrow) or w2v (text of word2vec).")] = "npy",
    what: Annotated[str, typer.Option(help="entities, relations or both.")] = "both",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Write the rows of entities and relations for other programs."""
    from tnlayers.cli import REFUSED, _guard

    def work() -> None:
        from tnlayers.kg.job import ExportConfig, run_export

        for file in run_export(ExportConfig(folder, out, form, what, overwrite)):
            typer.echo(f"{file} written")

    _guard(work, "interrupted; files are written whole or not at all", REFUSED)
