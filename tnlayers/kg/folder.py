"""Folders of trained models: weights, vocabulary and triples, written whole or not at all; no code is run."""

from __future__ import annotations

import ast
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tnlayers import checkpoint, kg
from tnlayers.kg.model import KGModel
from tnlayers.kg.triples import Triples
from tnlayers.pretrained.folder import WEIGHTS_FILE, versions, written_folder
from tnlayers.pretrained.hub import one_line, read_json

PLAN_FILE, NAMES_FILE, TRIPLES_FILE = "kg.json", "names.json", "triples.safetensors"
INNER = "model"
FOLDER_VERSION = 1


@dataclass(frozen=True, eq=False)
class SavedKG:
    """What `load_kg` gives back.

    Args:
        model: in evaluation mode.
        triples: the graph it was trained on.
        name: of its class.
        options: it was made with.
        about: what else was kept (settings, figures), plain JSON.

    Example:
        >>> SavedKG(torch.nn.Identity(), None, "TuckER").options
        {}
    """

    model: KGModel
    triples: Triples
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def model_class(name: str) -> type[KGModel]:
    """The model of this name among those of `tnlayers.kg`.

    Args:
        name: of the class, in any case: "tucker" is TuckER.

    Raises:
        ValueError: no such model; with the names there are.

    Example:
        >>> model_class("perceptron")
        Traceback (most recent call last):
        ValueError: kg: no model is called 'perceptron', expected one of ...
    """
    known = {
        key: value
        for key, value in vars(kg).items()
        if inspect.isclass(value) and issubclass(value, KGModel) and _makes_itself(value)
    }
    found = {key.lower(): value for key, value in known.items()}.get(name.lower())
    if found is None:
        raise ValueError(f"kg: no model is called {name!r}, expected one of {', '.join(sorted(known))}")
    return found


def _makes_itself(kind: type[KGModel]) -> bool:
    """Whether a model is made of triples, or of another model, and options with defaults."""
    first, *others = inspect.signature(kind).parameters.values()
    return (first.name == "triples" or _inner(kind) is not None) and all(p.default is not p.empty for p in others)


def _inner(kind: type[KGModel]) -> str | None:
    """The option that is another model, such as `tucker` of MIGTF."""
    first = next(iter(inspect.signature(kind).parameters.values()))
    return first.name if first.annotation in (KGModel, "KGModel") else None


def inner_option(name: str) -> str | None:
    """The option of a model that is another, trained model: `tucker` of MIGTF; None for most.

    Args:
        name: see `model_class`.

    Example:
        >>> inner_option("MIGTF"), inner_option("TuckER")
        ('tucker', None)
    """
    return _inner(model_class(name))


def make_model(name: str, triples: Any, options: Mapping[str, Any] | None = None) -> KGModel:
    """A model by name, with options of its constructor.

    Args:
        name: see `model_class`.
        triples: what has num_entities, num_relations and inverse.
        options: keyword arguments that JSON holds. A model on top of another one, such as MIGTF, has that as an option:
            a model, or what makes one, `{"model": "TuckER", "options": {...}}`.

    Raises:
        ValueError: an unknown model, an option it does not have (with those it has) or refuses.

    Example:
        >>> from tnlayers.kg import load_triples
        >>> make_model("TuckER", load_triples({"train": [("a", "r", "b")]}), {"entity_size": 3})
        Traceback (most recent call last):
        ValueError: kg: TuckER has no option 'entity_size', expected one of ...
    """
    kind: Any = model_class(name)
    inner, given = _inner(kind), dict(options or {})
    first = triples
    if inner is not None:
        first = given.pop(inner, None)
        if isinstance(first, Mapping) and {"model"} <= set(first) <= {"model", "options"}:
            first = make_model(first["model"], triples, first.get("options"))
        if not isinstance(first, KGModel):
            raise ValueError(
                f"kg: {kind.__name__} is made on a trained model, expected one as the option {inner!r} "
                f"(kg train: --base FOLDER), got {first!r:.60}"
            )
    allowed = [key for key in list(inspect.signature(kind).parameters)[1:] if key not in ("generator", "device")]
    for key in given:
        if key not in allowed:
            raise ValueError(f"kg: {kind.__name__} has no option {key!r}, expected one of {', '.join(allowed)}")
    made: KGModel = kind(first, **_plain(given))
    return made


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists are tuples, and its dtypes strings."""
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if isinstance(found.get("dtype"), str):
        if found["dtype"] not in ("float32", "float64", "bfloat16"):
            raise ValueError(f"kg: dtype must be float32, float64 or bfloat16, got {found['dtype']!r}")
        found["dtype"] = getattr(torch, found["dtype"])
    return found


def check_device(caller: str, device: torch.device | str) -> None:
    """Refuse a device that this machine, or this torch, does not have.

    Args:
        caller: who asks, for the message.
        device: its name.

    Raises:
        ValueError: no such device.

    Example:
        >>> check_device("load_kg", "quantum")
        Traceback (most recent call last):
        ValueError: load_kg: device must be one of this machine, such as cpu, got 'quantum' (...)
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{caller}: device must be one of this machine, such as cpu, got {str(device)!r} ({one_line(error)})"
        ) from None


def parse_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Options written as text: `entity_dim=64`, `dropouts=.2,.2,.3`, `entity_bias=true`, anything else a string.

    Args:
        pairs: KEY=VALUE each.

    Raises:
        ValueError: no "=" in one, or one key twice.

    Example:
        >>> parse_options(("entity_dim=64", "dropouts=.2,.2,.3", "entity_bias=true", "masks=row"))
        {'entity_dim': 64, 'dropouts': [0.2, 0.2, 0.3], 'entity_bias': True, 'masks': 'row'}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = (part.strip() for part in pair.partition("="))
        if not sign or not key or key in found:
            raise ValueError(f"kg: an option is KEY=VALUE, each key once, got {pair!r}")
        words: dict[str, Any] = {"true": True, "false": False, "none": None}
        try:
            value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        found[key] = list(value) if isinstance(value, tuple) else value
    return found


def save_kg(
    model: KGModel,
    folder: str | os.PathLike[str],
    triples: Triples,
    *,
    options: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model with its graph, as a folder that `load_kg` rebuilds alone.

    The folder holds `model.safetensors` (as `tnlayers.save` writes it, with checksums), `kg.json` (class, options,
    versions), `names.json` (entities and relations in order) and `triples.safetensors`. It is written under a temporary
    name beside, synced and renamed: a killed process leaves no half folder.

    Args:
        model: of a class of `tnlayers.kg`.
        folder: where to; its parent must exist.
        triples: what it was trained on.
        options: the keyword arguments it was made with, plain JSON.
        about: anything else JSON holds.
        overwrite: replace a folder that holds a model.

    Returns:
        The path of the folder.

    Raises:
        ValueError: options that make another model, a folder in the way, what JSON cannot hold.

    Example:
        >>> import tempfile
        >>> from tnlayers.kg import TuckER, load_triples
        >>> graph = load_triples({"train": [("a", "r", "b"), ("b", "r", "c")]})
        >>> model = TuckER(graph, entity_dim=4, relation_dim=2)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = save_kg(model, f"{parent}/net", graph, options={"entity_dim": 4, "relation_dim": 2})
        ...     again = load_kg(folder)
        >>> again.name, again.triples.entity_labels, bool((again.model.entities.weight == model.entities.weight).all())
        ('TuckER', ['a', 'b', 'c'], True)
    """
    from safetensors.torch import save_file

    name = type(model).__name__
    plan: dict[str, Any] = {
        "format_version": FOLDER_VERSION,
        "versions": versions(),
        "class": name,
        "options": dict(options),
        "data": triples.name,
        "inverse": triples.inverse,
        "about": dict(about or {}),
    }
    try:
        text = json.dumps(plan, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_kg: options and about must be plain JSON without NaN ({one_line(error)})") from None
    names = {"entities": triples.entity_labels, "relations": triples.relation_labels}
    with written_folder(Path(folder), overwrite, "save_kg") as temporary:
        checkpoint.save(model, temporary / WEIGHTS_FILE)
        save_file(
            {split: triples.split(split).contiguous().clone() for split in ("train", "valid", "test")},
            temporary / TRIPLES_FILE,
        )
        (temporary / NAMES_FILE).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
        (temporary / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
        try:
            load_kg(temporary)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"save_kg: {name} made with the options {dict(options)} must take back every tensor, but {error}"
            ) from None
    return Path(folder)


def load_kg(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> SavedKG:
    """Rebuild a model that `save_kg` or `tnlayers kg train` wrote, with its graph.

    Args:
        folder: that was written, or the one that holds it as `model`.
        device: where the model goes.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a damaged file, another version, tensors that do not fit, by name; a device that is not there.

    Example:
        >>> load_kg("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: load_kg: expected a folder with kg.json, as save_kg writes it, got 'no/such/folder'; check the path
    """  # noqa: E501
    check_device("load_kg", device)
    root = Path(folder)
    root = root / INNER if (root / INNER / PLAN_FILE).is_file() else root
    if not (root / PLAN_FILE).is_file():
        raise FileNotFoundError(
            f"load_kg: expected a folder with {PLAN_FILE}, as save_kg writes it, got {str(folder)!r}; check the path"
        )
    plan: dict[str, Any] = read_json("load_kg", root / PLAN_FILE)
    if plan.get("format_version") != FOLDER_VERSION:
        raise ValueError(
            f"load_kg: {folder} has format version {plan.get('format_version')!r}, expected {FOLDER_VERSION}; use the "
            "version of tnlayers that wrote it"
        )
    shape = {"class": str, "options": dict, "data": str, "inverse": bool, "about": dict, "versions": dict}
    if not all(isinstance(plan.get(key), kind) for key, kind in shape.items()):
        raise ValueError(f"load_kg: {root / PLAN_FILE} must hold {', '.join(shape)}; the file is damaged")
    for file in (NAMES_FILE, TRIPLES_FILE, WEIGHTS_FILE):
        if not (root / file).is_file():
            raise FileNotFoundError(f"load_kg: expected {file} in {folder}, found none; the folder is not whole")
    triples = _read_triples(root, plan)
    with torch.random.fork_rng(devices=[]):
        model = make_model(plan["class"], triples, plan["options"])
    made: Any = checkpoint.load(root / WEIGHTS_FILE, model, device=device)
    return SavedKG(made.to(device).eval(), triples, plan["class"], plan["options"], plan["about"])


def _read_triples(root: Path, plan: Mapping[str, Any]) -> Triples:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = read_json("load_kg", root / NAMES_FILE)
    lists = [names.get(key) for key in ("entities", "relations")]
    if not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in lists):
        raise ValueError(f"load_kg: {root / NAMES_FILE} must hold lists of entities and relations; it is damaged")
    entities, relations = ({name: k for k, name in enumerate(part)} for part in lists if part is not None)
    try:
        parts = load_file(root / TRIPLES_FILE)
        made = Triples(
            parts["train"], parts["valid"], parts["test"], entities, relations, plan["inverse"], plan["data"]
        )
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"load_kg: {root / TRIPLES_FILE} cannot be read ({one_line(error)}); the file is damaged"
        ) from None
    return made
