"""What lies around the weights of a pretrained model: files, configuration, tokenizer; read without running code."""

import importlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""What sentence-transformers keeps beside a model, besides the folder of its pooling."""

TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?")


class PretrainedWarning(UserWarning):
    """Something of a pretrained model was made anew, left out, or cannot be used; the message names it."""


def import_transformers(who: str) -> Any:
    """The package transformers, or one line that says how to get it."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ImportError(f"{who}: transformers is needed for this; pip install tnlayers[hf]") from None


def read_json(who: str, path: Path, kind: type = dict) -> Any:
    """A JSON file that holds an object (or `kind`); a damaged one is refused by name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {path} cannot be read as JSON ({one_line(error)}); the file is damaged") from None
    if not isinstance(found, kind):
        raise ValueError(f"{who}: {path} must hold a JSON {kind.__name__}, got {type(found).__name__}")
    return found


def one_line(error: BaseException) -> str:
    """The first line of a message, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Neither log lines nor progress bars of transformers: what matters is said in our own words."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def named_class(who: str, name: str) -> Any:
    """A model class of transformers by its name; nothing else of that package, and nothing from elsewhere.

    Raises:
        ValueError: no such class.
    """
    transformers = import_transformers(who)
    found = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"{who}: expected a model class of transformers {transformers.__version__}, got {name!r}; code that comes "
            "with a model is not run: give task= for a class of transformers, or install the version that has it"
        )
    return found


def check_config(who: str, name: str, raw: Mapping[str, Any]) -> None:
    """Refuse a configuration that brings code, holds quantized weights, or is of a type transformers does not know.

    Example:
        >>> check_config("open_pretrained", "x", {"model_type": "bert", "auto_map": {"AutoModel": "m.Net"}})
        Traceback (most recent call last):
        ...
        ValueError: open_pretrained: x needs code of its own (auto_map), which is not run; use a model of transformers
    """
    for key, value in _walk(raw):
        if key == "auto_map" and value:
            raise ValueError(
                f"{who}: {name} needs code of its own (auto_map), which is not run; use a model of transformers"
            )
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method", "unknown method") if isinstance(value, Mapping) else value
            raise ValueError(
                f"{who}: {name} is quantized ({method}); dequantize it first (load it and call model.dequantize(), or "
                "take the original weights)"
            )
        if str(key).strip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
            raise ValueError(f"{who}: {name} asks for a kernel from the hub ({value}), which is code and is not run")
        if key == "transformers_weights" and value and PurePosixPath(str(value)).name != str(value):
            raise ValueError(f"{who}: {name} must name a weight file of its own folder, got {value!r}")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in import_transformers(who).CONFIG_MAPPING:
        raise ValueError(
            f"{who}: {name} must have a model_type that transformers knows, got {kind!r}; update transformers, or load "
            "the model in your own code and give it to tnlayers.tensorize"
        )


def _walk(raw: Any) -> Iterator[tuple[Any, Any]]:
    """Every key with its value, those of nested configurations too."""
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            yield key, value
            if key not in ("label2id", "id2label", "task_specific_params"):
                yield from _walk(value)


def timm_model(who: str, name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> Any:
    """Make a timm model by its name.

    Raises:
        ValueError: a name timm does not know.
        ImportError: timm is missing.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ImportError(f"{who}: timm is needed for {name!r}; pip install timm") from None
    if not TIMM_NAME.fullmatch(name):
        raise ValueError(f"{who}: expected the name of a timm model such as 'resnet18.a1_in1k', got {name!r}")
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{who}: timm cannot make {name!r} ({one_line(error)})") from None


def fetch(name: str, file: str, required: bool = False) -> Path | None:
    """A file of a model on the hub, from the cache if it is there."""
    import_transformers("open_pretrained")
    cached_file = importlib.import_module("transformers.utils").cached_file
    try:
        with quiet():
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=required)
    except (OSError, ValueError) as error:
        if not required:
            return None
        raise FileNotFoundError(
            f"open_pretrained: expected a folder or the name of a model, got {name!r}: no such folder, and it cannot "
            f"be fetched ({one_line(error)})"
        ) from None
    return None if found is None else Path(found)


def sentence_files(name: str, root: Path | None) -> dict[str, str]:
    """The text files of sentence-transformers by their relative names; none for another model."""
    modules = root / "modules.json" if root is not None else fetch(name, "modules.json")
    if modules is None or not modules.is_file():
        return {}
    wanted = [*SENTENCE_FILES]
    wanted += [f"{inside(str(row.get('path', '')))}/config.json" for row in modules_of(modules) if row.get("path")]
    files = {}
    for file in wanted:
        path = root / file if root is not None else fetch(name, file)
        if path is not None and path.is_file():
            files[file] = path.read_text(encoding="utf-8")
    return files


def read_pooling(name: str, files: Mapping[str, str]) -> str | None:
    """How sentence-transformers makes a sentence of tokens: "mean", "cls" or None; other ways are said and left out."""
    if "modules.json" not in files:
        return None
    for row in json.loads(files["modules.json"]):
        kind, path = str(row.get("type", "")).rpartition(".")[2], f"{row.get('path', '')}/config.json"
        if kind == "Pooling" and path in files:
            try:
                settings = json.loads(files[path])
            except json.JSONDecodeError:
                raise ValueError(f"open_pretrained: {path} of {name} is no JSON; the file is damaged") from None
            modes = {POOLINGS.get(key, key) for key, value in settings.items() if "pooling_mode_" in key and value}
            modes |= {settings["pooling_mode"]} if isinstance(settings.get("pooling_mode"), str) else set()
            if len(modes) == 1 and modes <= set(POOLINGS.values()):
                return str(modes.pop())
            warnings.warn(
                f"open_pretrained: {name} pools by {', '.join(sorted(modes)) or 'nothing'}, which is neither 'mean' "
                "nor 'cls'; pooling is None",
                PretrainedWarning,
                stacklevel=4,
            )
        elif kind not in ("Transformer", "Pooling", "Normalize"):
            warnings.warn(
                f"open_pretrained: {name} has a module {kind} after the model, which is left out",
                PretrainedWarning,
                stacklevel=4,
            )
    return None


def modules_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a modules.json."""
    rows = read_json("open_pretrained", path, list)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"open_pretrained: {path.name} must list modules, got {rows!r:.80}")
    return list(rows)


def inside(path: str) -> str:
    """A relative path that stays in its folder."""
    parts = PurePosixPath(path.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in path:
        raise ValueError(f"open_pretrained: modules.json must name folders inside its own, got {path!r}")
    return str(parts)


def open_tokenizer(who: str, name: str, local: Path | None) -> Any:
    """The tokenizer beside a model, None where there are no files of one."""
    if not any((local / file).is_file() if local is not None else fetch(name, file) for file in TOKENIZER_FILES):
        return None
    transformers = import_transformers(who)
    where, offline = (str(local), {"local_files_only": True}) if local is not None else (name, {})
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False, **offline)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{who}: the tokenizer of {name} cannot be read ({one_line(error)})") from None


def open_image_processor(who: str, name: str, local: Path | None) -> Any:
    """The image processor beside a model; None where there is none, or where what it runs on is not installed."""
    file = "preprocessor_config.json"
    path = local / file if local is not None else fetch(name, file)
    if path is None or not path.is_file() or "image_processor_type" not in read_json(who, path):
        return None
    transformers = import_transformers(who)
    where, offline = (str(local), {"local_files_only": True}) if local is not None else (name, {})
    with quiet():
        try:
            return transformers.AutoImageProcessor.from_pretrained(where, trust_remote_code=False, **offline)
        except ImportError as error:
            warnings.warn(f"{who}: no image processor ({one_line(error)})", PretrainedWarning, stacklevel=3)
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{who}: the image processor of {name} cannot be read ({one_line(error)})") from None
