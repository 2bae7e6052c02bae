"""Pretrained models by name or from a folder: `transformers` and timm, without running code that comes with them.

What a model needs around its numbers (tokenizer, image processor, pooling) is read beside it; what does not fit is
said in one line. Compressed folders are written and read in `folder.py`, ordinary ones written in `exported.py`.
"""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnlayers.pretrained.hub import (
    PretrainedWarning,
    check_config,
    fetch,
    import_transformers,
    inside,
    modules_of,
    named_class,
    one_line,
    open_image_processor,
    open_tokenizer,
    quiet,
    read_json,
    read_pooling,
    sentence_files,
    timm_model,
)

PLAN_FILE = "tnlayers.json"
"""What marks a folder as written by `save_folder`."""

TASKS = {
    "embedding": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
"""Which auto class of transformers a task asks for."""

HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")


@dataclass
class Pretrained:
    """A model with what belongs to it.

    Example:
        >>> from torch import nn
        >>> Pretrained(nn.Linear(2, 2), kind="module").pooling is None
        True
    """

    model: nn.Module
    """In evaluation mode."""
    kind: str
    """"transformers", "timm" or "module" (a user's own)."""
    source: str = ""
    """Name or folder it was opened from."""
    config: Any = None
    """The configuration of transformers; for timm a dict with architecture and model_args."""
    tokenizer: Any = None
    image_processor: Any = None
    pooling: str | None = None
    """How sentence-transformers makes a sentence of the tokens: "mean", "cls", or None."""
    new_tensors: tuple[str, ...] = ()
    """Tensors that the files lack: they hold random numbers."""
    unused_tensors: tuple[str, ...] = ()
    """Tensors of the files that this class has no place for."""
    plan: dict[str, Any] = field(default_factory=dict)
    """What `save_folder` was given, for a model that comes from there."""
    files: dict[str, str] = field(default_factory=dict, repr=False)
    """Small text files of sentence-transformers, kept as they are."""


def open_pretrained(
    source: str | Path,
    *,
    task: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """Open a model of `transformers` by name or folder, a timm model, or a folder that `save_folder` wrote.

    No code of the source is run: a configuration that brings its own classes is refused. Folders are read without the
    network. The class is the one the configuration names, the auto class of `task` if that is given, else the bare
    model. Tensors that the files lack are named in a PretrainedWarning (and in `new_tensors`).

    Args:
        source: a folder, a name on the hub (`"bert-base-uncased"`), or `"timm:resnet18.a1_in1k"`.
        task: one of "embedding", "causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification",
            "token-classification", "question-answering", "multiple-choice", "image-classification",
            "audio-classification".
        dtype: of the weights; that of the files by default.
        device: where the model goes.

    Returns:
        Pretrained: the model in evaluation mode, its tokenizer and image processor or None, pooling, configuration.

    Raises:
        FileNotFoundError: no such folder, and no model of that name within reach.
        ValueError: code in the configuration, an unknown model type, quantized weights, files that do not fit the class.
        ImportError: transformers or timm is missing.

    Example:
        >>> open_pretrained("no/such/folder/here")
        Traceback (most recent call last):
        ...
        FileNotFoundError: open_pretrained: expected a folder or the name of a model, got 'no/such/folder/here', which is neither; check the path
    """  # noqa: E501
    name, folder = str(source), Path(source)
    if task is not None and task not in TASKS:
        raise ValueError(f"open_pretrained: task must be one of {sorted(TASKS)}, got {task!r}")
    dtype = _dtype(dtype)
    if name.startswith("timm:"):
        return _open_timm(name, {"architecture": name[5:], "model_args": {}}, None, task, dtype, device)
    if not folder.is_dir() and (folder.exists() or not HUB_NAME.fullmatch(name)):
        found = "which is a file" if folder.exists() else "which is neither"
        raise FileNotFoundError(
            f"open_pretrained: expected a folder or the name of a model, got {name!r}, {found}; check the path"
        )
    if (folder / PLAN_FILE).is_file():
        from tnlayers.pretrained.folder import load_folder

        if task is not None or dtype is not None:
            raise ValueError(
                f"open_pretrained: {name} holds a compressed model of a class of its own; drop task, dtype"
            )
        return load_folder(folder, device=device)
    if (folder / "two_linear.json").is_file():
        raise ValueError(
            f"open_pretrained: {name} holds pairs of plain layers; build it with load(folder) of its load_two_linear.py"
        )
    local = _inner_folder(folder) if folder.is_dir() else None
    raw = _raw_config(name, local)
    if local is not None and "architecture" in raw and "model_type" not in raw:
        return _open_timm(name, raw, local, task, dtype, device)
    return _open_transformers(name, local, raw, task, dtype, device)


def _open_transformers(
    name: str, local: Path | None, raw: dict[str, Any], task: str | None, dtype: torch.dtype | None, device: Any
) -> Pretrained:
    check_config("open_pretrained", name, raw)
    where = name if local is None else str(local)
    offline = {"local_files_only": True} if local is not None else {}
    transformers = import_transformers("open_pretrained")
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **offline)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"open_pretrained: the configuration of {name} cannot be read ({one_line(error)})"
            ) from None
        model_class = _class_for(name, config, task)
        try:
            model, info = model_class.from_pretrained(
                where,
                config=config,
                dtype=dtype or "auto",
                output_loading_info=True,
                trust_remote_code=False,
                **offline,
            )
        except Exception as error:  # OSError, RuntimeError, SafetensorError, UnpicklingError: as the file is broken
            if isinstance(error, MemoryError):
                raise
            raise ValueError(
                f"open_pretrained: the weights of {name} cannot be read as {model_class.__name__} ({one_line(error)})"
            ) from None
    new, unused = tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"]))
    _tell_unmatched(name, model, new, unused)
    root = Path(name) if local is not None else None
    files = sentence_files(name, root)
    return Pretrained(
        model.to(device).eval(),
        "transformers",
        name,
        model.config,
        open_tokenizer("open_pretrained", name, local),
        open_image_processor("open_pretrained", name, local),
        read_pooling(name, files),
        new,
        unused,
        files=files,
    )


def _tell_unmatched(name: str, model: nn.Module, new: tuple[str, ...], unused: tuple[str, ...]) -> None:
    """Refuse files that hold another model; name what is random and what was left out."""
    shapes = {key: value.numel() for key, value in model.state_dict().items()}
    lacking = sum(shapes.get(key, 0) for key in new)
    if 2 * lacking > sum(shapes.values()):
        raise ValueError(
            f"open_pretrained: the weights of {name} must fit {type(model).__name__}, but {len(new)} tensors are "
            f"missing, such as {list(new[:3])}; the files hold {list(unused[:3])}; give another task="
        )
    if new:
        warnings.warn(
            f"open_pretrained: {name} has no values for {len(new)} tensors of {type(model).__name__}, which are random "
            f"now: {', '.join(new[:5])}{', ...' if len(new) > 5 else ''}; give task= for the class that was trained",
            PretrainedWarning,
            stacklevel=4,
        )
    if unused:
        warnings.warn(
            f"open_pretrained: {type(model).__name__} leaves out {len(unused)} tensors of {name}: "
            f"{', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''}",
            PretrainedWarning,
            stacklevel=4,
        )


def _class_for(name: str, config: Any, task: str | None) -> Any:
    """The model class: by task, by the name in the configuration, or the bare model."""
    named = getattr(config, "architectures", None) or []
    if task is None and named:
        return named_class("open_pretrained", str(named[0]))
    auto = TASKS[task or "embedding"]
    mapping = getattr(import_transformers("open_pretrained"), auto)._model_mapping
    if type(config) not in mapping:
        raise ValueError(
            f"open_pretrained: {name} is a {config.model_type} model, which has no {auto}; give another task="
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def _raw_config(name: str, local: Path | None) -> dict[str, Any]:
    if local is not None:
        if not (local / "config.json").is_file():
            advice = ""
            if (local / "adapter_config.json").is_file():
                advice = "; it holds an adapter: merge it into its base model first (merge_and_unload in peft)"
            raise FileNotFoundError(f"open_pretrained: expected a config.json in {name}, found none{advice}")
        return read_json("open_pretrained", local / "config.json")
    path = fetch(name, "config.json", required=True)
    assert path is not None
    return read_json("open_pretrained", path)


def _inner_folder(folder: Path) -> Path:
    """Where the model lies: older folders of sentence-transformers keep it one level down."""
    if not (folder / "config.json").is_file() and (folder / "modules.json").is_file():
        for row in modules_of(folder / "modules.json"):
            if str(row.get("type", "")).endswith(".Transformer"):
                return folder / inside(str(row.get("path", "")))
    return folder


def _open_timm(
    name: str, raw: dict[str, Any], local: Path | None, task: str | None, dtype: torch.dtype | None, device: Any
) -> Pretrained:
    """A timm model by its name, or from a folder in timm's own layout."""
    if task not in (None, "image-classification", "embedding"):
        raise ValueError(f"open_pretrained: {name} is a timm model, expected task 'image-classification', got {task!r}")
    arguments = dict(raw.get("model_args") or {})
    if local is not None and isinstance(raw.get("num_classes"), int):
        arguments.setdefault("num_classes", raw["num_classes"])
    model = timm_model("open_pretrained", str(raw["architecture"]), arguments, pretrained=local is None)
    if local is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = local / "model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"open_pretrained: expected a model.safetensors in {name}, found none")
        try:
            model.load_state_dict(load_file(file))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(
                f"open_pretrained: the weights of {name} cannot be read as {raw['architecture']} ({one_line(error)})"
            ) from None
    elif isinstance(getattr(model, "num_classes", None), int):
        arguments["num_classes"] = model.num_classes
    config = {"architecture": str(raw["architecture"]), "model_args": arguments}
    return Pretrained(model.to(device=device, dtype=dtype).eval(), "timm", name, config)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"open_pretrained: dtype must be a floating point dtype such as 'bfloat16', got {dtype!r}")
    return found
