"""Save and load models with tensor layers: safetensors for the numbers, JSON for the structure, never code.

The structure is also kept in the safetensors header, so that the one file that is renamed into place is complete; the
JSON beside it is for people and tools.
"""

import copy
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.network import check_labels
from tnlayers.files import atomic_target, write_atomic
from tnlayers.layer import NetworkLayer, Structure
from tnlayers.surgery import network_layers, replace, sites, stand_in_for

FORMAT_VERSION = 1
KEY = "tnlayers"
PLAN = "tnlayers.json"
"""File of a folder that says which class the model is of."""
ALIGNMENT = 64
"""Of what torch allocates on a CPU, in bytes."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's numbers and structure to `path` (safetensors), the structure also to `path.json`.

    Tied tensors are stored once and listed. Both files are written under temporary names, synced and renamed: a
    killed process leaves the old file or the new one. Every tensor carries a checksum. Dense models can be saved too.

    Args:
        model: any module without extra state.
        path: file name; `.safetensors` is appended where it is missing.

    Returns:
        The path of the safetensors file.

    Raises:
        ValueError: tensors on the meta device or of a dtype that safetensors has not, or a folder that does not exist.

    Example:
        >>> import tempfile, tnlayers
        >>> from torch import nn
        >>> from decompositions import LowRank
        >>> net = nn.Sequential(tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=2)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = tnlayers.save(net, f"{folder}/net")
        ...     again = tnlayers.load(file, nn.Sequential(nn.Linear(8, 8)))
        >>> file.name, again[0].network.ranks
        ('net.safetensors', (2, 2))
    """
    from safetensors.torch import save_file

    if not isinstance(model, nn.Module):
        raise TypeError(f"save: expected a torch.nn.Module, got {type(model).__name__}")
    file = _with_suffix(path)
    beside = file.with_name(f"{file.name}.json")
    if not file.parent.is_dir() or file.is_dir() or beside.is_dir():
        raise ValueError(f"save: expected a file name in a folder that exists, got {str(path)!r}")
    tensors, ties = _unique_tensors(model)
    plan = {
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "layers": {name: _describe(layer) for name, layer in network_layers(model)},
        "ties": ties,
        "tensors": {
            name: [list(t.shape), str(t.dtype).removeprefix("torch."), _checksum(t)] for name, t in tensors.items()
        },
    }
    text = json.dumps(plan, indent=1, sort_keys=True)
    with atomic_target(file) as temporary:
        try:
            save_file(tensors, temporary, metadata={KEY: text, "sha256": _digest(text)})
        except KeyError as error:  # the table of dtypes of safetensors
            raise ValueError(
                f"save: safetensors has no dtype {error}; convert the model, complex128 to complex64"
            ) from None
    write_atomic(beside, text + "\n")
    return file


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str = "cpu"
) -> nn.Module:
    """Give a model the structure and the numbers of a saved one; or build it, from a folder that says its class.

    `model` is an instance of the same class, dense or tensorized, on any device, the meta device included; its layers
    are replaced where the file says so and the tensors are assigned, so dense weights of a meta model are never
    allocated. Labels and shapes are checked before anything is allocated; nothing is changed if a check fails.

    Args:
        path: what `save` was given or returned; or a folder that `save_folder` or `tnlayers compress` wrote.
        model: changed in place (unless it is itself a layer to replace: use what is returned). A folder of a model of
            transformers or timm needs none: it is built on the meta device.
        device: where the tensors go.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, another version, layers, settings or tensors that the model does not have; by name.
        TypeError: a file without a model.

    Example:
        >>> import tempfile, torch, tnlayers
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = tnlayers.save(nn.Linear(2, 2), f"{folder}/plain")
        ...     with torch.device("meta"):
        ...         model = nn.Linear(2, 2)
        ...     tnlayers.load(file, model).weight.device.type
        'cpu'
    """
    if (Path(path) / PLAN).is_file():
        from tnlayers.pretrained.folder import load_folder

        return load_folder(Path(path), device=device, model=model).model
    if model is None:
        raise TypeError(
            f"load: a file holds numbers and networks but no class, expected model= (on the meta device, say), got "
            f"{str(path)!r} alone; folders of save_folder need none"
        )
    file = Path(path) if Path(path).is_file() else _with_suffix(path)
    if not file.is_file():
        found = "which is a folder" if Path(path).is_dir() else "which does not exist"
        raise FileNotFoundError(f"load: expected a file written by tnlayers.save, got {str(path)!r}, {found}")
    plan, shapes = _read_header(file)
    changes = _plan_changes(file, plan, shapes, model)
    names = {site.name: site.names for site in sites(model)}
    made = {
        f"{alias}.{key}".lstrip("."): tensor
        for name, layer in changes.items()
        for alias in names[name]
        for key, tensor in layer.state_dict().items()
    }
    replaced = tuple(f"{alias}." for name in changes for alias in names[name] if alias)
    expected = {} if "" in changes else {k: t for k, t in model.state_dict().items() if not k.startswith(replaced)}
    expected = {**expected, **made}
    ties = plan["ties"]
    _check_keys(file, expected, shapes, ties)
    left = [name for name, tensor in model.named_buffers() if tensor.is_meta and name not in expected]
    left = [name for name in left if not name.startswith(replaced)]
    if left:
        raise ValueError(
            f"load: every tensor must come from the file, but these non-persistent buffers are on the meta device: "
            f"{left[:5]}; build the model on a real device"
        )
    values = _read_tensors(file, plan, device)
    by_name = {site.name: site for site in sites(model)}
    for name, layer in changes.items():
        if name:
            replace(model, by_name[name], layer)
        else:
            model = layer
    model.load_state_dict({key: values[ties.get(key, key)] for key in expected}, assign=True)
    for other, first in ties.items():
        _tie(model, other, first)
    return model


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix == ".safetensors" or not file.name else file.with_name(f"{file.name}.safetensors")


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes: against damage, not against forgery."""
    if tensor.numel() == 0:
        return 0
    return zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _check_keys(
    file: Path, expected: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], ties: dict[str, str]
) -> None:
    """Refuse a file that holds other tensors than the model will have."""
    stored = set(shapes) | set(ties)
    missing, unexpected = sorted(expected.keys() - stored), sorted(stored - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"load: {file.name} must hold the tensors of the model, missing {missing[:5]} ({len(missing)}), "
            f"unexpected {unexpected[:5]} ({len(unexpected)}); is it the same model class?"
        )
    for key, tensor in sorted(expected.items()):
        have = shapes[ties.get(key, key)]
        if have != tuple(tensor.shape):
            raise ValueError(f"load: {key} must have shape {tuple(tensor.shape)}, got {have} in {file.name}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(layer: NetworkLayer) -> dict[str, Any]:
    net = layer.network
    return {
        "layer": type(layer).__name__,
        "settings": layer.settings(),
        "format": type(net).__name__,
        "legs": [list(leg) for leg in net.legs],
        "rows": list(net.rows),
        "cols": list(net.cols),
        "ranks": list(net.ranks),
    }


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict without repetitions, contiguous; and for each repeated name the name under which it is stored."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"save: expected tensors alone in the state dict, got {type(value).__name__} at {name!r}")
        if value.is_meta:
            raise ValueError(f"save: {name} is on the meta device and has no numbers; load or initialise it first")
        data = value.detach().resolve_conj().resolve_neg()
        if data.layout != torch.strided:
            raise ValueError(f"save: expected dense storage, got {data.layout} for {name}; call to_dense() on it first")
        key = (data.data_ptr(), data.dtype, tuple(data.shape), data.stride(), data.device)
        if data.numel() and key in first:
            ties[name] = first[key]
            continue
        first[key] = name
        tensors[name] = data.contiguous()
    owners: dict[int, str] = {}  # views of one storage cannot be stored as they are: safetensors wants them apart
    for name, data in tensors.items():
        storage = data.untyped_storage().data_ptr()
        if data.numel() and owners.setdefault(storage, name) != name:
            tensors[name] = data.clone()
    return tensors, ties


def _read_header(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Structure and shapes, without allocating a tensor; damaged and foreign files are refused by name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load: {file.name} is not a readable safetensors file ({error}); it may be cut short"
        ) from None
    text = metadata.get(KEY)
    if text is None:
        raise ValueError(
            f"load: {file.name} has no tnlayers structure in its header (found {sorted(metadata)}), expected a file "
            "written by tnlayers.save; use safetensors.torch.load_file and load_state_dict for others"
        )
    if metadata.get("sha256") != _digest(text):
        raise ValueError(f"load: the structure in {file.name} does not match its checksum; the file is damaged")
    plan = json.loads(text)
    if not isinstance(plan, dict) or plan.get("format_version") != FORMAT_VERSION:
        version = plan.get("format_version") if isinstance(plan, dict) else None
        raise ValueError(
            f"load: {file.name} has format version {version}, expected {FORMAT_VERSION}; "
            "use the version of tnlayers that wrote it"
        )
    for key in ("layers", "ties", "tensors"):
        if not isinstance(plan.get(key), dict):
            raise ValueError(f"load: the structure in {file.name} must have {key!r}, got {sorted(plan)}")
    unknown = [name for name in plan["ties"].values() if name not in shapes]
    if unknown:
        raise ValueError(f"load: tensors tied to {unknown[:5]} must be stored in {file.name}, which has no such")
    return plan, shapes


def _plan_changes(
    file: Path, plan: dict[str, Any], shapes: dict[str, tuple[int, ...]], model: nn.Module
) -> dict[str, NetworkLayer]:
    """New layers on the meta device for every tensor layer of the file; the model is not touched."""
    modules = dict(model.named_modules())
    ties = plan["ties"]
    changes: dict[str, NetworkLayer] = {}
    for name, row in plan["layers"].items():
        where = f"load: layer {name!r} of {file.name}"
        if name not in modules:
            raise ValueError(f"{where} must exist in the model, got {type(model).__name__} without it")
        module = modules[name]
        layer_class: Any = type(module) if isinstance(module, NetworkLayer) else stand_in_for(module)
        if layer_class is None or layer_class.__name__ != row["layer"]:
            raise ValueError(f"{where} must be a {row['layer']} layer, got {type(module).__name__} in the model")
        format = Network.formats.get(row["format"])
        if format is None:
            raise ValueError(
                f"{where} has the format {row['format']!r}, expected one of {sorted(Network.formats)}; "
                "import the module that defines it"
            )
        keys = [f"{name}.cores.{k}".lstrip(".") for k in range(len(row["legs"]))]
        keys = [ties.get(key, key) for key in keys]
        if any(key not in shapes for key in keys):
            raise ValueError(f"{where} lacks cores: expected {keys}, got {sorted(k for k in keys if k in shapes)}")
        structure = Structure(format, tuple(map(tuple, row["legs"])), tuple(row["rows"]), tuple(row["cols"]))
        core_shapes = [shapes[key] for key in keys]
        check_labels(where, core_shapes, *structure[1:])
        net = format._unchecked([torch.empty(shape, device="meta") for shape in core_shapes], *structure[1:])
        net._check()
        source: Any = copy.deepcopy(module).to("meta").to_dense_module() if isinstance(module, NetworkLayer) else module
        made = net.to(source.weight.dtype)
        try:  # settings of the model, shapes of the file
            layer = layer_class.from_dense(source, lambda _, net=made: net)
        except ValueError as error:
            raise ValueError(f"{where} must fit the model: {error}") from None
        own, theirs = layer.settings(), row["settings"]
        differ = [f"{key}={theirs.get(key)} (model: {own[key]})" for key in own if own[key] != theirs.get(key)]
        if differ:
            raise ValueError(f"{where} must have the model's settings, got {', '.join(differ)}")
        changes[name] = layer
    return changes


def _read_tensors(file: Path, plan: dict[str, Any], device: torch.device | str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load: {file.name} cannot be read ({error})") from None
    for name, (_, _, checksum) in plan["tensors"].items():
        if name in values and _checksum(values[name]) != checksum:
            raise ValueError(f"load: tensor {name} in {file.name} does not match its checksum; the file is damaged")
    return {name: _placed(tensor, device) for name, tensor in values.items()}


def _placed(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device, in memory as torch allocates it: products of unaligned numbers differ in the last bit."""
    moved = tensor.to(device)
    return moved.clone() if moved.data_ptr() % ALIGNMENT else moved


def _tie(model: nn.Module, other: str, first: str) -> None:
    """Make two names one Parameter again."""
    source_name, _, source_key = first.rpartition(".")
    target_name, _, target_key = other.rpartition(".")
    source, target = model.get_submodule(source_name), model.get_submodule(target_name)
    if source_key in source._parameters and target_key in target._parameters:
        target._parameters[target_key] = source._parameters[source_key]
