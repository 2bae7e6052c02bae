"""`tnlayers kg`: train a model on a graph, evaluate, ask, export; every step from files to files."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from decompositions.progress import Progress
from tnlayers.files import write_atomic
from tnlayers.kg.export import export_embeddings
from tnlayers.kg.folder import INNER, check_device, inner_option, load_kg, make_model, model_class, save_kg
from tnlayers.kg.history import History
from tnlayers.kg.metrics import Metrics
from tnlayers.kg.model import KGModel
from tnlayers.kg.prediction import Prediction, predict
from tnlayers.kg.ranking import evaluate
from tnlayers.kg.recipes import RECIPES
from tnlayers.kg.train import train
from tnlayers.kg.training_page import training_page
from tnlayers.kg.triples import Triples, load_triples
from tnlayers.main_job.config import hardware_facts
from tnlayers.optim.options import integer
from tnlayers.pretrained.hub import read_json

CHECKPOINT, LOG, METRICS, SETTINGS, PAGE = "checkpoint.pt", "log.jsonl", "metrics.json", "settings.json", "index.html"
OWN = ("seed", "generator", "checkpoint", "log", "progress", "schedule")
"""Arguments of `train` that the job gives itself, or that no JSON holds."""
OURS = (CHECKPOINT, LOG, METRICS, SETTINGS, PAGE)
DEFAULT_TRAINING: dict[str, Any] = {"epochs": 100, "batch_size": 128, "lr": 1e-3}


@dataclass(frozen=True)
class TrainConfig:
    """What `tnlayers kg train` is told.

    Args:
        data: folder, file, or name of a PyKEEN dataset.
        out: folder of everything that is written; its parent must exist.
        model: name of a model of `tnlayers.kg`; None: that of the recipe, or TuckER.
        recipe: name in `tnlayers.kg.recipes.RECIPES`: its model, options and training, unless they are given here.
        options: of its constructor, plain JSON.
        base: folder of a trained model that the model is made on (MIGTF).
        training: keyword arguments of `train`, plain JSON; where one is missing its default counts.
        inverse: whether heads are tails of inverse relations.
        columns: order of the columns, see `load_triples`.
        unseen: what is done with triples of something never trained, see `load_triples`.
        seed: of the start and of everything that training draws.
        device: "cpu", "cuda", ...
        threads: of the CPU; None: torch's number.
        overwrite: forget what `out` holds; otherwise the same settings go on, others are refused.

    Raises:
        ValueError: an unknown model or device, no threads, training settings that are the job's own.

    Example:
        >>> TrainConfig("umls", "runs/umls", training={"epochs": 3}).training
        {'epochs': 3}
    """

    data: str
    out: str | Path
    model: str | None = None
    recipe: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    inverse: bool = True
    columns: str = "hrt"
    unseen: str = "keep"
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.recipe is not None and self.recipe not in RECIPES:
            raise ValueError(f"kg train: no recipe is called {self.recipe!r}, expected one of {', '.join(RECIPES)}")
        model_class(self.kind)
        if self.threads is not None and not integer(self.threads, 1):
            raise ValueError(f"kg train: threads must be an int >= 1, or None for torch's number, got {self.threads!r}")
        check_device("kg train", self.device)
        known = [name for name in list(inspect.signature(train).parameters)[2:] if name not in OWN]
        for name in self.training:
            if name not in known:
                raise ValueError(f"kg train: no training option {name!r}, expected one of {', '.join(known)}")

    @property
    def kind(self) -> str:
        """Name of the model."""
        return self.model or ("TuckER" if self.recipe is None else RECIPES[self.recipe].model)

    @property
    def made_with(self) -> dict[str, Any]:
        """Options of the model: those given, over the recipe's where it is for this model."""
        held = None if self.recipe is None else RECIPES[self.recipe]
        own = held is not None and model_class(self.kind) is model_class(held.model)
        return {**(held.options if held is not None and own else {}), **self.options}

    @property
    def trained_with(self) -> dict[str, Any]:
        """Arguments of `train`: those given, over the recipe's, over the defaults."""
        return (
            DEFAULT_TRAINING | dict({} if self.recipe is None else RECIPES[self.recipe].training) | dict(self.training)
        )

    def settings(self) -> dict[str, Any]:
        """What the result depends on, plain JSON."""
        names = ("data", "recipe", "base", "inverse", "columns", "unseen", "seed", "device")
        found = {name: getattr(self, name) for name in names}
        found |= {"model": model_class(self.kind).__name__, "options": self.made_with, "training": self.trained_with}
        plain: dict[str, Any] = json.loads(json.dumps(found, default=repr))  # a Loss of a recipe is told by its repr
        return plain


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a training job left behind.

    Args:
        folder: that holds it.
        history: of the training.
        metrics: split -> its evaluation; empty where neither valid nor test has triples.
        parameters: numbers that are trained.
        seconds: of the whole job.

    Example:
        >>> TrainResult(Path("out"), History((), None, "epochs"), {}, 8, 0.5).to_dict()["parameters"]
        8
    """

    folder: Path
    history: History
    metrics: dict[str, Metrics]
    parameters: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "parameters": self.parameters,
            "epochs": len(self.history.epochs),
            "stopped": self.history.stopped,
            "best_epoch": self.history.best,
            "training_seconds": self.history.seconds,
            **{split: metrics.to_dict() for split, metrics in self.metrics.items()},
        }


def run(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train, evaluate, and write model, log, figures and page to `config.out`.

    The folder then holds `model` (which `load_kg` rebuilds alone), `log.jsonl` (a line an epoch), `metrics.json`,
    `settings.json`, `index.html` and `checkpoint.pt`. The same call goes on from the checkpoint, after Ctrl-C or
    kill -9; with the training done it evaluates again. Every file is written whole or not at all.

    Args:
        config: what to do.
        progress: called as (steps done, steps in all, text).

    Raises:
        FileNotFoundError: no such data, or the parent of `out` is missing.
        ValueError: data, options or settings that make no sense; a folder of other settings. All of this before a
            file in `out` is touched.
        OSError: a full disk. What was written before stays, whole.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.tsv").write_text("a\\tr\\tb\\nb\\tr\\tc\\n")
        >>> _ = (folder / "test.tsv").write_text("a\\tr\\tc\\n")
        >>> config = TrainConfig(str(folder), folder / "out", options={"entity_dim": 4}, training={"epochs": 2})
        >>> run(config).metrics["test"].count
        2
    """
    begin, before = time.perf_counter(), torch.get_num_threads()
    out = Path(config.out)
    settings = config.settings()
    triples = load_triples(config.data, config.inverse, config.columns, unseen=config.unseen)
    model, options = _model(config, triples)
    _refuse_early(config, model, triples)
    _open(out, settings | {"facts": _facts(triples)}, config.overwrite)
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        history = train(
            model,
            triples,
            **config.trained_with,
            seed=config.seed,
            checkpoint=out / CHECKPOINT,
            log=out / LOG,
            progress=progress or False,
        )
        metrics = {split: evaluate(model, triples, split) for split in ("valid", "test") if len(triples.split(split))}
    finally:
        torch.set_num_threads(before)
    result = TrainResult(out, history, metrics, model.parameter_count(), time.perf_counter() - begin)
    figures = result.to_dict()
    about = {"settings": settings, "metrics": {split: metrics[split]._numbers() for split in metrics}}
    save_kg(model, out / INNER, triples, options=options, about=about, overwrite=True)
    document = {"settings": settings, "hardware": hardware_facts(), **figures}
    write_atomic(out / METRICS, json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_atomic(out / PAGE, training_page(model, triples, history, metrics, settings))
    return result


def _model(config: TrainConfig, triples: Triples) -> tuple[KGModel, dict[str, Any]]:
    """The model at its start, and the options that make it again."""
    given, kept = config.made_with, config.made_with
    if config.base is not None:
        held = load_kg(config.base)
        inner = inner_option(config.kind)
        if inner is None:
            raise ValueError(f"kg train: {config.kind} is not made on another model; leave the base out")
        same = held.triples.entity_to_id == triples.entity_to_id, held.triples.relation_to_id == triples.relation_to_id
        if not all(same) or held.triples.inverse != triples.inverse:
            raise ValueError(f"kg train: {config.base} was trained on another graph than {config.data}")
        given[inner], kept[inner] = held.model, {"model": held.name, "options": held.options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make_model(config.kind, triples, given).to(config.device), kept


def _refuse_early(config: TrainConfig, model: KGModel, triples: Triples) -> None:
    """What training refuses, it refuses before anything in `out` is touched: a trial on a copy, without an epoch."""
    training = config.trained_with
    epochs = training["epochs"]
    none = {"epochs": 0 if integer(epochs, 0) else epochs, "tensorboard": None}
    train(copy.deepcopy(model), triples, **training | none, seed=config.seed)


def _facts(triples: Triples) -> dict[str, int]:
    """Sizes by which data of the same name are told apart."""
    splits = {split: len(triples.split(split)) for split in ("train", "valid", "test")}
    return {"entities": triples.num_entities, "relations": len(triples.relation_to_id), **splits}


def _open(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """A folder for these settings: new, one they were run in, or one where nothing was kept of other ones."""
    if not out.is_dir() and (out.exists() or not out.parent.is_dir()):
        raise FileNotFoundError(f"kg train: OUT must be a folder, or a new one in a folder that exists, got {out}")
    file = out / SETTINGS
    kept = json.loads(json.dumps(settings))
    if out.is_dir() and any(out.iterdir()):
        there = read_json("kg train", file) if file.is_file() else {}
        if not kept.keys() <= there.keys():
            raise ValueError(f"kg train: {out} holds something else; give another folder")
        for name in (*OURS, INNER):  # what kill -9 left of writes
            for left in out.glob(f".{name}.*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if overwrite or not any((out / name).exists() for name in (CHECKPOINT, METRICS, INNER)):
            shutil.rmtree(out / INNER, ignore_errors=True)  # an old model is none of the new settings
            for name in OURS:
                if name != SETTINGS:  # replaced below: without it the folder would be taken for another's
                    (out / name).unlink(missing_ok=True)
        else:
            other = [key for key in {**there, **kept} if there.get(key) != kept.get(key)]
            if other:
                told = ", ".join(f"{key} = {kept.get(key)!r} (there: {there.get(key)!r})" for key in other)
                raise ValueError(f"kg train: {out} holds another run: {told}; give overwrite=True (--overwrite)")
    try:
        out.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(kept, indent=1, allow_nan=False) + "\n")
    except PermissionError as error:
        raise PermissionError(
            f"kg train: OUT must be a folder that can be written, got {out} ({error.strerror}); give another"
        ) from None


@dataclass(frozen=True)
class EvalConfig:
    """What `tnlayers kg eval` is told.

    Args:
        folder: of a trained model.
        data: other data with the vocabulary of the model; None: those of the folder.
        split: "train", "valid" or "test".
        direction: "both", "head" or "tail".
        filtered: False counts other known answers as mistakes.
        batch_size: queries scored together.
        device: where the model runs.

    Example:
        >>> EvalConfig("runs/umls").split
        'test'
    """

    folder: str | Path
    data: str | None = None
    split: str = "test"
    direction: str = "both"
    filtered: bool = True
    batch_size: int | None = None
    device: str = "cpu"


def run_eval(config: EvalConfig) -> Metrics:
    """Evaluate a saved model.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a damaged folder, data of another vocabulary, an empty split.
    """
    held = load_kg(config.folder, device=config.device)
    triples = held.triples
    if config.data is not None:
        triples = load_triples(config.data, held.triples.inverse)
        same = triples.entity_to_id == held.triples.entity_to_id, triples.relation_to_id == held.triples.relation_to_id
        if not all(same):
            raise ValueError(
                f"kg eval: {config.data} must have the entities and relations of the model, expected "
                f"{held.triples.num_entities} and {len(held.triples.relation_to_id)}, got {triples.num_entities} and "
                f"{len(triples.relation_to_id)} or others; leave the data out to take those of the folder"
            )
    return evaluate(
        held.model,
        triples,
        config.split,
        direction=config.direction,
        filtered=config.filtered,
        batch_size=config.batch_size,
    )


@dataclass(frozen=True)
class PredictConfig:
    """What `tnlayers kg predict` is told.

    Args:
        folder: of a trained model.
        head: name, or None to ask for heads.
        relation: name, or None to ask for relations.
        tail: name, or None to ask for tails.
        count: answers listed.
        filtered: leave known answers out; False marks them.
        device: where the model runs.

    Example:
        >>> PredictConfig("runs/umls", head="virus", relation="causes").count
        10
    """

    folder: str | Path
    head: str | None = None
    relation: str | None = None
    tail: str | None = None
    count: int = 10
    filtered: bool = False
    device: str = "cpu"


def run_predict(config: PredictConfig) -> Prediction:
    """Ask a saved model; see `predict`."""
    held = load_kg(config.folder, device=config.device)
    return predict(
        held.model,
        held.triples,
        head=config.head,
        relation=config.relation,
        tail=config.tail,
        count=config.count,
        filtered=config.filtered,
    )


@dataclass(frozen=True)
class ExportConfig:
    """What `tnlayers kg export` is told.

    Args:
        folder: of a trained model.
        out: folder to write.
        form: "npy", "parquet" or "w2v".
        what: "entities", "relations" or "both".
        overwrite: replace files that are there.

    Example:
        >>> ExportConfig("runs/umls", "tables").form
        'npy'
    """

    folder: str | Path
    out: str | Path
    form: str = "npy"
    what: str = "both"
    overwrite: bool = False


def run_export(config: ExportConfig) -> list[Path]:
    """Write the tables of a saved model; see `export_embeddings`."""
    held = load_kg(config.folder)
    return export_embeddings(
        held.model, held.triples, config.out, form=config.form, what=config.what, overwrite=config.overwrite
    )
