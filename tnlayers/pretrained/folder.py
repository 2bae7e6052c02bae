"""Folders of compressed models: written whole or not at all, read on the meta device, without running code."""

import copy
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers import checkpoint
from tnlayers.layer import NetworkLayer
from tnlayers.pretrained.hub import (
    check_config,
    import_transformers,
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
from tnlayers.pretrained.model import PLAN_FILE, Pretrained
from tnlayers.surgery import network_layers

FOLDER_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
BUFFERS_FILE = "buffers.safetensors"
KINDS = ("transformers", "timm", "module")
MARKS = ("config.json", PLAN_FILE, WEIGHTS_FILE)
"""A folder that holds none of these is no model's, and is never overwritten."""


def save_folder(
    model: Pretrained | nn.Module,
    folder: str | Path,
    *,
    plan: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    factory: str | None = None,
) -> Path:
    """Write a model, compressed or not, as a folder that `load_folder` (and `tnlayers.load`) rebuilds.

    The folder holds `model.safetensors` (as `tnlayers.save` writes it), `config.json`, tokenizer and image processor,
    and `tnlayers.json`: versions, class, source, pooling, and `plan`. It is written under a temporary name beside,
    synced and renamed: a killed process leaves no half folder. With `overwrite` the old folder steps aside first;
    between the two renames a reader finds none.

    Args:
        model: what `open_pretrained` gave, with its model compressed in place; or a bare model.
        folder: where to; its parent must exist.
        plan: anything JSON holds, kept as it is; names under its key "layers" must be modules of the model.
        overwrite: replace a folder that holds a model.
        factory: for a user's own model, the "package.module:function" that builds it: a note for people, never run.

    Returns:
        The path of the folder.

    Raises:
        ValueError: a folder that is not empty, a plan JSON cannot hold or that names layers the model has not, a model
            whose class would not take its tensors back.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     made = save_folder(nn.Linear(2, 2), f"{parent}/net", plan={"keep": 1.0})
        ...     sorted(p.name for p in made.iterdir()), load_folder(made, model=nn.Linear(2, 2)).plan
        (['model.safetensors', 'model.safetensors.json', 'tnlayers.json'], {'keep': 1.0})
    """
    held = as_pretrained("save_folder", model)
    net = held.model
    text = _plan_text(dict(plan or {}))
    _check_layers("save_folder", plan or {}, net)
    if factory is not None and (held.kind != "module" or not re.fullmatch(r"[\w.]+:[\w.]+", factory)):
        raise ValueError(
            f"save_folder: factory must be 'package.module:function' of a user's own model, got {factory!r} for a "
            f"model of kind {held.kind!r}"
        )
    target = free_target("save_folder", folder, overwrite)
    about: dict[str, Any] = {
        "format_version": FOLDER_VERSION,
        "versions": versions(),
        "kind": held.kind,
        "class": type(net).__name__,
        "source": held.source,
        "pooling": held.pooling,
        "factory": factory,
        "plan": json.loads(text),
    }
    if held.kind == "transformers":
        about["attention"] = getattr(held.config, "_attn_implementation", None)
    stored: dict[str, Tensor] = {}
    if held.kind != "module":
        skeleton = make_skeleton("save_folder", held)
        _check_fits(held, skeleton)
        own = {name: buffer for name, buffer in _passing_buffers(net) if not buffer.is_meta}
        about["buffers"] = {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in sorted(own.items())}
        stored = {name: own[name].contiguous().clone() for name in sorted(remake_buffers(skeleton, "cpu") & own.keys())}
    with written_folder(target, overwrite) as temporary:
        write_beside(held, temporary)
        checkpoint.save(net, temporary / WEIGHTS_FILE)
        if stored:
            from safetensors.torch import save_file

            save_file(stored, temporary / BUFFERS_FILE)
        (temporary / PLAN_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return target


def load_folder(
    folder: str | Path, *, device: torch.device | str = "cpu", model: nn.Module | None = None
) -> Pretrained:
    """Rebuild a model that `save_folder` wrote.

    The class is made on the meta device from its configuration, its layers are replaced there, and the tensors of the
    file are assigned: no dense weight of a replaced layer is ever allocated. Buffers that no file of weights holds
    (positions, rotary frequencies) are made by the class again. No code of the folder is run.

    Args:
        folder: what `save_folder` was given or returned.
        device: where the tensors go.
        model: an instance to load into, changed in place; needed for a user's own class, as its factory is never run.

    Returns:
        Pretrained: the model in evaluation mode, with `plan` as it was given.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a damaged file, another version, tensors that do not fit, by name.

    Example:
        >>> load_folder("no/such/folder")
        Traceback (most recent call last):
        ...
        FileNotFoundError: load_folder: expected a folder with tnlayers.json, as save_folder writes it, got 'no/such/folder'; check the path
    """  # noqa: E501
    root = Path(folder)
    about = _read_about(root, str(folder))
    kind, source = about["kind"], str(about.get("source") or folder)
    if not (root / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"load_folder: expected {WEIGHTS_FILE} in {folder}, found none; the folder is not whole"
        )
    if kind == "module":
        if model is None:
            hint = f" (it was made by {about['factory']})" if about.get("factory") else ""
            raise ValueError(
                f"load_folder: {folder} holds a {about['class']} of a user's own code{hint}, which is not run; build "
                "the model and give it as model="
            )
        made = checkpoint.load(root / WEIGHTS_FILE, model, device=device)
        held = Pretrained(made.eval(), kind, source)
    else:
        held = Pretrained(nn.Identity(), kind, source, _read_config(root, kind, str(folder)))
        skeleton = make_skeleton("load_folder", held, about) if model is None else model
        _restore_buffers(skeleton, root, about, device)
        try:
            held.model = checkpoint.load(root / WEIGHTS_FILE, skeleton, device=device).eval()
        except ValueError as error:
            here = versions()
            differ = [f"{k} {v} (here {here.get(k)})" for k, v in about["versions"].items() if here.get(k) != v]
            raise ValueError(f"{error}{'; written with ' + ', '.join(differ) if differ else ''}") from None
        if kind == "transformers":
            held.config = getattr(held.model, "config", held.config)
            _read_beside(held, root, str(folder))
    held.plan = about["plan"]
    _check_layers("load_folder", held.plan, held.model)
    return held


def as_pretrained(who: str, model: Any) -> Pretrained:
    """What is known of a bare model: of transformers, or a user's own."""
    if isinstance(model, Pretrained):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected a Pretrained or a torch.nn.Module, got {type(model).__name__}")
    config = getattr(model, "config", None)
    if type(model).__module__.startswith("transformers.") and hasattr(config, "to_dict"):
        return Pretrained(model, "transformers", str(getattr(config, "_name_or_path", "") or ""), config)
    return Pretrained(model, "module")


def make_skeleton(who: str, held: Pretrained, about: Mapping[str, Any] | None = None) -> Any:
    """The dense model of a configuration on the meta device: names, shapes and ties, no numbers."""
    if held.kind == "timm":
        with torch.device("meta"):
            return timm_model(who, held.config["architecture"], held.config["model_args"], pretrained=False)
    name = type(held.model).__name__ if about is None else str(about["class"])
    model_class = named_class(who, name)
    if not isinstance(held.config, model_class.config_class or ()):
        raise ValueError(f"{who}: {name} takes a {model_class.config_class}, got a {type(held.config).__name__}")
    config = copy.deepcopy(held.config)
    if about is not None and about.get("attention") in ("eager", "sdpa"):
        config._attn_implementation = about["attention"]
    try:
        with quiet(), torch.device("meta"):
            made = model_class._from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ValueError(f"{who}: {name} cannot be built from its configuration ({one_line(error)})") from None
    return made


def remake_buffers(model: Any, device: torch.device | str) -> set[str]:
    """Give the non-persistent buffers of a meta model their values again, as its class does; return those it cannot.

    transformers writes them in `initialize_weights`, timm in `init_non_persistent_buffers`. Each is written twice over
    different numbers: one that keeps them was not written.
    """
    marked = [*model.parameters(), *(b for b in model.buffers() if b is not None)]
    found = [(name, buffer) for name, buffer in _passing_buffers(model) if buffer.is_meta]
    passes: list[dict[str, Tensor]] = []
    for filling in (0, 1):
        made: dict[int, Tensor] = {}
        for name, buffer in found:
            parent, _, key = name.rpartition(".")
            fresh = made.setdefault(id(buffer), torch.full_like(buffer, filling, device=device))
            model.get_submodule(parent)._buffers[key] = fresh
        _write_buffers(model, marked)
        passes.append({name: model.get_buffer(name).clone() for name, _ in found})
    return {name for name, value in passes[0].items() if not _same(value, passes[1][name])}


def _write_buffers(model: Any, marked: list[Tensor]) -> None:
    if hasattr(model, "initialize_weights"):
        for tensor in marked:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers: leave it as it is
        for module in model.modules():
            vars(module).pop("_is_hf_initialized", None)
        model.initialize_weights()
    for module in model.modules():
        write = getattr(module, "init_non_persistent_buffers", None)
        if callable(write):
            write()


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) if a.is_floating_point() else torch.equal(a, b)


def _passing_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state dict leaves out; those of tensor layers are caches."""
    for name, module in model.named_modules():
        if not isinstance(module, NetworkLayer):
            for key in sorted(module._non_persistent_buffers_set):
                buffer = module._buffers.get(key)
                if buffer is not None:
                    yield f"{name}.{key}".lstrip("."), buffer


def _restore_buffers(skeleton: nn.Module, root: Path, about: Mapping[str, Any], device: torch.device | str) -> None:
    """Make the buffers again, take from the folder those the class cannot make, and cast as they were."""
    lacking = remake_buffers(skeleton, device)
    dtypes = about.get("buffers")
    if not isinstance(dtypes, dict):
        raise ValueError(f"load_folder: {PLAN_FILE} must hold 'buffers' with the dtype of each, got {dtypes!r:.80}")
    stored = _read_stored(root)
    unknown = sorted(lacking - stored.keys())
    if unknown:
        raise ValueError(
            f"load_folder: {type(skeleton).__name__} does not make its buffers {unknown[:5]} again and the folder does "
            f"not hold them; use the versions that wrote it: {about['versions']}"
        )
    for name, buffer in _passing_buffers(skeleton):
        dtype = getattr(torch, str(dtypes.get(name)), buffer.dtype)
        value = stored[name] if name in lacking else buffer
        if not isinstance(dtype, torch.dtype) or value.shape != buffer.shape:
            raise ValueError(f"load_folder: buffer {name} must be {tuple(buffer.shape)}, got {tuple(value.shape)}")
        if value.dtype != dtype or value is not buffer:
            parent, _, key = name.rpartition(".")
            skeleton.get_submodule(parent)._buffers[key] = value.to(device=device, dtype=dtype)


def _read_stored(root: Path) -> dict[str, Tensor]:
    file = root / BUFFERS_FILE
    if not file.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_folder: {file} cannot be read ({one_line(error)}); the file is damaged") from None


def _check_fits(held: Pretrained, skeleton: nn.Module) -> None:
    """What is written must find its place again when the class is made from its configuration."""
    net = held.model
    replaced = tuple(f"{name}." for name, _ in network_layers(net))
    named = {name for name, _ in skeleton.named_modules(remove_duplicate=False)}
    aliases = tuple(
        f"{name}." for name, module in net.named_modules(remove_duplicate=False) if isinstance(module, NetworkLayer)
    )
    own = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith(aliases)}
    theirs = {k: tuple(v.shape) for k, v in skeleton.state_dict().items() if not k.startswith(aliases)}
    strange = sorted({k for k, v in own.items() if theirs.get(k) != v} | {k for k in replaced if k[:-1] not in named})
    lacking = sorted(theirs.keys() - own.keys())
    if strange or lacking:
        raise ValueError(
            f"save_folder: {type(net).__name__} made from its configuration must take back every tensor, but has no "
            f"place for {strange[:3]} and lacks {lacking[:3]}; save a model changed otherwise with tnlayers.save"
        )


def write_beside(held: Pretrained, folder: Path, config: Any = None) -> None:
    """Configuration, tokenizer, image processor and the files of sentence-transformers."""
    if held.kind == "timm":
        (folder / "config.json").write_text(json.dumps(held.config, indent=1) + "\n", encoding="utf-8")
    elif held.kind == "transformers":
        config = copy.deepcopy(held.config) if config is None else config
        config.architectures = [type(held.model).__name__]
        config.dtype = next((p.dtype for p in held.model.parameters() if p.is_floating_point()), config.dtype)
        with quiet():
            config.save_pretrained(folder)
            generation = getattr(held.model, "generation_config", None)
            if generation is not None and held.model.can_generate():  # type: ignore[operator]
                generation.save_pretrained(folder)
            for part in (held.tokenizer, held.image_processor):
                if part is not None:
                    part.save_pretrained(folder)
    for name, text in held.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _read_beside(held: Pretrained, root: Path, name: str) -> None:
    held.tokenizer = open_tokenizer("load_folder", name, root)
    held.image_processor = open_image_processor("load_folder", name, root)
    held.files = sentence_files(name, root)
    held.pooling = read_pooling(name, held.files)
    model: Any = held.model
    if (root / "generation_config.json").is_file() and model.can_generate():
        read_json("load_folder", root / "generation_config.json")
        with quiet():
            model.generation_config = import_transformers("load_folder").GenerationConfig.from_pretrained(root)


def _read_config(root: Path, kind: str, name: str) -> Any:
    file = root / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"load_folder: expected a config.json in {name}, found none; the folder is not whole")
    raw = read_json("load_folder", file)
    if kind == "timm":
        if not isinstance(raw.get("architecture"), str) or not isinstance(raw.get("model_args"), dict):
            raise ValueError(f"load_folder: {file} must hold 'architecture' and 'model_args', got {sorted(raw)}")
        return raw
    check_config("load_folder", name, raw)
    transformers = import_transformers("load_folder")
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"load_folder: {file} cannot be read ({one_line(error)})") from None


def _read_about(root: Path, name: str) -> dict[str, Any]:
    if not (root / PLAN_FILE).is_file():
        raise FileNotFoundError(
            f"load_folder: expected a folder with {PLAN_FILE}, as save_folder writes it, got {name!r}; check the path"
        )
    about: dict[str, Any] = read_json("load_folder", root / PLAN_FILE)
    found = about.get("format_version")
    if found != FOLDER_VERSION:
        raise ValueError(
            f"load_folder: {name} has format version {found!r}, expected {FOLDER_VERSION}; use the version of tnlayers "
            "that wrote it"
        )
    right = about.get("kind") in KINDS and isinstance(about.get("class"), str)
    if not right or not all(isinstance(about.get(key), dict) for key in ("versions", "plan")):
        raise ValueError(f"load_folder: {name}/{PLAN_FILE} must hold kind, class, versions and plan; it is damaged")
    return about


def _check_layers(who: str, plan: Mapping[str, Any], model: nn.Module) -> None:
    layers = plan.get("layers")
    if isinstance(layers, Mapping | list | tuple):
        known = {name for name, _ in model.named_modules(remove_duplicate=False)}
        unknown = [str(name) for name in layers if name not in known]
        if unknown:
            raise ValueError(
                f"{who}: the layers of the plan must be modules of the model, got {unknown[:5]}, which "
                f"{type(model).__name__} has not"
            )


def _plan_text(plan: dict[str, Any]) -> str:
    try:
        return json.dumps(plan, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save_folder: plan must be plain JSON without NaN ({one_line(error)})") from None


def versions() -> dict[str, str]:
    """Versions of what the result depends on, those that are installed."""
    found = {}
    for name in ("tnlayers", "torch", "transformers", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def free_target(who: str, folder: str | Path, overwrite: bool, marks: Sequence[str] = MARKS) -> Path:
    """The real path of a folder to write; refused where something else would be lost.

    Raises:
        FileNotFoundError: its parent does not exist.
        ValueError: a file; a folder that is not empty without `overwrite`, or that holds none of the `marks`.

    Example:
        >>> free_target("save", "no/such/place", False)
        Traceback (most recent call last):
        ...
        FileNotFoundError: save: the parent of the folder must exist, got no/such/place; create it with mkdir
    """
    target = Path(os.path.realpath(folder))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{who}: the parent of the folder must exist, got {folder}; create it with mkdir")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{who}: expected the name of a folder, got {folder}, which is a file")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{who}: {folder} must be empty or new; give overwrite=True to replace it")
        if not any((target / mark).is_file() for mark in marks):
            kind = "model" if marks == MARKS else "grid"
            raise ValueError(f"{who}: {folder} holds no {kind} and is not overwritten; give another folder")
    return target


@contextmanager
def written_folder(
    folder: str | Path, overwrite: bool = False, who: str = "save_folder", marks: Sequence[str] = MARKS
) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name when the block ends; nothing remains of one that fails.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with written_folder(f"{parent}/new") as temporary:
        ...         _ = (temporary / "x").write_text("1")
        ...     [str(p.relative_to(parent)) for p in Path(parent).rglob("*")]
        ['new', 'new/x']
    """
    target = free_target(who, folder, overwrite, marks)
    mark = secrets.token_hex(6)
    temporary, aside = (target.with_name(f".{target.name[:40]}.{mark}.{end}") for end in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        moved = target.is_dir() and any(target.iterdir())
        if moved:
            target.rename(aside)
        elif target.is_dir():
            target.rmdir()
        try:
            temporary.rename(target)
        except OSError:
            if moved:
                aside.rename(target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)
    if moved:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
