"""Result folders of grids: one safetensors file that holds the network and its structure, JSON beside it for people."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cross_approx import Quantization
from decompositions.formats.network import Network, check_labels
from tnlayers import checkpoint
from tnlayers.files import write_atomic
from tnlayers.grids.coding import CODINGS, Coded
from tnlayers.pretrained.folder import versions, written_folder

GRID_VERSION = 1
KEY = "tnlayers.grid"
GRID_FILE = "grid.safetensors"
ABOUT_FILE = "grid.json"
PAGE_FILE = "report.html"
PACKED, SMALL = 1 << 16, 1 << 24
"""Numbers that a byte of planes stands for at most (LZMA takes zeros 7000 to 1, a bit each); cores of fewer than SMALL
numbers are not looked at."""
MARKS = (GRID_FILE, ABOUT_FILE)
"""A folder that holds none of these is no grid's, and is never overwritten."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A compressed grid: a network of its shape, and what is known about it.

    Args:
        network: decoded.
        shape: of the grid.
        quantization: of a quantized train; None where the outside labels of the network are the axes of the grid.
        coding: of the stored cores.
        nbytes: of the file.
        about: source, settings, measures and versions, as JSON has them.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> Grid(TT([torch.ones(2, 1), torch.ones(1, 3)]), (2, 3)).block((slice(0, 1), slice(0, 3, 2)))
        tensor([[1., 1.]])
    """

    network: Network
    shape: tuple[int, ...]
    quantization: Quantization | None = None
    coding: str = "none"
    nbytes: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def block(self, slices: Sequence[slice]) -> Tensor:
        """Values of a box, one slice (0 <= start <= stop <= size, step >= 1) an axis; nothing else is decoded.

        Cost: the contraction of the cores cut to the box. Of a quantized train: that of the dyadic boxes that cover it.
        """
        from tnlayers.grids.blocks import decode_block

        return decode_block(self.network, self.shape, self.quantization, slices)


def save_grid(
    folder: str | Path,
    network: Network | Coded,
    *,
    shape: Sequence[int],
    quantization: Quantization | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a grid as a folder: whole or not at all.

    `grid.safetensors` is complete: cores or coded cores, a checksum of each, and the structure in its header.
    `grid.json` repeats the structure and holds `about`. The folder is written under a temporary name beside, synced and
    renamed; a killed process leaves that name (`.NAME.*.tmp`) at most.

    Args:
        folder: to write; its parent must exist.
        network: as it is to be stored (its dtype included), or coded.
        shape: of the grid.
        quantization: of a quantized train.
        about: what JSON can hold.
        overwrite: replace a folder of a grid.

    Raises:
        ValueError: a folder that is not empty, or holds something else.
        FileNotFoundError: its parent does not exist.

    Example:
        >>> import tempfile
        >>> from decompositions import TT
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     made = save_grid(f"{parent}/g", TT.random(row_modes=(4, 5), rank=2), shape=(4, 5))
        ...     load_grid(made).network.ranks
        (2,)
    """
    with grid_folder(folder, overwrite) as temporary:
        write_grid(temporary, network, shape=shape, quantization=quantization, about=about)
    return Path(folder)


@contextmanager
def grid_folder(folder: str | Path, overwrite: bool = False, who: str = "grid compress") -> Iterator[Path]:
    """A temporary folder beside, which takes the name `folder` when the block ends."""
    with written_folder(folder, overwrite, who, MARKS) as temporary:
        yield temporary


def write_grid(
    folder: Path,
    network: Network | Coded,
    *,
    shape: Sequence[int],
    quantization: Quantization | None = None,
    about: Mapping[str, Any] | None = None,
) -> int:
    """The files of `save_grid` into a folder that exists; returns the bytes of `grid.safetensors`."""
    data, structure = grid_bytes(network, shape=shape, quantization=quantization)
    write_atomic(folder / GRID_FILE, data)
    write_about(folder, {"grid": structure, "bytes": len(data), "versions": versions(), **(about or {})})
    return len(data)


def grid_bytes(
    network: Network | Coded, *, shape: Sequence[int], quantization: Quantization | None = None
) -> tuple[bytes, dict[str, Any]]:
    """The content of `grid.safetensors`, and the structure in its header."""
    from safetensors.torch import save

    tensors, structure = _parts(network)
    pairs = None if quantization is None else [list(pair) for pair in quantization.modes]
    structure |= {"version": GRID_VERSION, "shape": list(shape), "digits": pairs}
    structure["tensors"] = {name: checkpoint._checksum(t) for name, t in tensors.items()}
    text = json.dumps(structure, sort_keys=True, separators=(",", ":"))
    return save(tensors, {KEY: text, "sha256": checkpoint._digest(text)}), structure


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """The JSON beside the numbers; what is not finite is written as text."""
    write_atomic(folder / ABOUT_FILE, json.dumps(plain(about), indent=1, allow_nan=False) + "\n")


def load_grid(folder: str | Path, dtype: torch.dtype | None = None) -> Grid:
    """Read a folder that `save_grid` wrote; no code is run, and shapes are checked before anything is allocated.

    Args:
        folder: the path.
        dtype: of the network; None keeps that of the cores, and takes float64 where they are coded.

    Raises:
        FileNotFoundError: no such folder, or one without a grid.
        ValueError: a damaged file, another version, labels that do not fit; by name.

    Example:
        >>> load_grid("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: grid: expected a folder written by tnlayers grid compress, got no/such/folder (missing)
    """
    root = Path(folder)
    file = root / GRID_FILE
    if not file.is_file():
        what = f"no {GRID_FILE} in it" if root.is_dir() else "missing" if not root.exists() else "a file"
        raise FileNotFoundError(f"grid: expected a folder written by tnlayers grid compress, got {folder} ({what})")
    structure, shapes = _header(file)
    with _named(file):
        shape, quantization = _checked_shape(structure)
        coded = _checked_structure(structure, shapes)
        tensors = _tensors(file, structure)
        if coded is None:
            kind = Network.formats[structure["format"]]
            cores = [tensors[f"core.{k}"] for k in range(len(structure["legs"]))]
            net = kind._unchecked(cores, *_labels(structure))
            net.__post_init__()
            net = net if dtype is None else net.to(dtype)
        else:
            counts = [_scales(*pair) for pair in zip(coded.shapes, coded.axes, strict=True)]
            levels, scales = tensors["levels"].split(structure["lengths"]), tensors["scales"].split(counts)
            coded = replace(coded, levels=levels, scales=scales)
            net = coded.network(dtype or torch.float64)
    return Grid(net, shape, quantization, structure["coding"], file.stat().st_size, _about(root))


def _parts(network: Network | Coded) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the structure."""
    structure: dict[str, Any] = {"legs": [list(leg) for leg in network.legs]}
    structure |= {"rows": list(network.rows), "cols": list(network.cols)}
    if not isinstance(network, Coded):
        tensors = {f"core.{k}": core.detach().cpu().contiguous().clone() for k, core in enumerate(network.cores)}
        return tensors, structure | {"format": type(network).__name__, "coding": "none"}
    names = ("format", "coding", "step", "norm", "error")
    structure |= {name: getattr(network, name) for name in names}
    structure |= {"axes": list(network.axes), "shapes": [list(shape) for shape in network.shapes]}
    structure |= {"lengths": [t.numel() for t in network.levels]}
    # one tensor for all cores: a header of many names would be larger than what they hold
    return {"levels": torch.cat(network.levels), "scales": torch.cat(network.scales)}, structure


def _header(file: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]:
    """Structure, and shape and dtype of every tensor, without allocating one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"grid: {file} is not a readable safetensors file ({error}); it may be cut short") from None
    text = metadata.get(KEY)
    if text is None:
        raise ValueError(f"grid: {file} holds no grid (its header has {sorted(metadata)}); write it with grid compress")
    if metadata.get("sha256") != checkpoint._digest(text):
        raise ValueError(f"grid: the structure in {file} does not match its checksum; the file is damaged")
    structure = json.loads(text)
    version = structure.get("version") if isinstance(structure, dict) else None
    if version != GRID_VERSION:
        raise ValueError(f"grid: {file} has version {version}, expected {GRID_VERSION}; use the tnlayers that wrote it")
    return structure, shapes


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """What is wrong inside is said with the name of the file."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"grid: {file} has a structure that does not fit ({error!r}); write it again") from None
    except ValueError as error:
        raise ValueError(f"grid: {file} is damaged: {error}") from None


def _labels(structure: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...], tuple[str, ...]]:
    return tuple(tuple(leg) for leg in structure["legs"]), tuple(structure["rows"]), tuple(structure["cols"])


def _checked_shape(structure: Mapping[str, Any]) -> tuple[tuple[int, ...], Quantization | None]:
    shape = tuple(int(n) for n in structure["shape"])
    if not shape or min(shape) < 1:
        raise ValueError(f"expected sizes >= 1, got shape {shape}")
    if structure["digits"] is None:
        return shape, None
    return shape, Quantization(shape, tuple((int(axis), int(size)) for axis, size in structure["digits"]))


def _checked_structure(structure: Mapping[str, Any], stored: Mapping[str, tuple[tuple[int, ...], str]]) -> Coded | None:
    """Labels, shapes, names and dtypes agree; the coded network without its numbers, or None where it is plain."""
    legs, rows, cols = _labels(structure)
    if structure["coding"] not in CODINGS or structure["format"] not in Network.formats:
        raise ValueError(f"unknown coding {structure['coding']!r} or format {structure['format']!r}")
    plain = structure["coding"] == "none"
    if set(structure["tensors"]) != set(stored):
        raise ValueError(f"expected the tensors {sorted(structure['tensors'])}, got {sorted(stored)}")
    if plain:
        shapes: list[tuple[int, ...]] = [stored[f"core.{k}"][0] for k in range(len(legs))]
    else:
        shapes = [tuple(int(n) for n in shape) for shape in structure["shapes"]]
    sizes = check_labels("structure", shapes, legs, rows, cols)
    outside = [sizes[label] for label in (*rows, *cols)]
    expected = structure["shape"] if structure["digits"] is None else [size for _, size in structure["digits"]]
    if outside != list(expected):
        raise ValueError(f"the outside labels must have the sizes {expected}, got {outside}")
    if plain:
        return None
    int8 = structure["coding"] == "int8"
    axes = [int(axis) for axis in structure["axes"]]
    if set(stored) != {"levels", "scales"} or len(axes) != len(shapes):
        raise ValueError(f"expected levels, scales and {len(shapes)} axes, got {sorted(stored)} and {len(axes)}")
    lengths = [int(n) for n in structure["lengths"]]
    expected_lengths = [prod(shape) for shape in shapes] if int8 else lengths
    if stored["levels"] != ((sum(lengths),), "U8") or lengths != expected_lengths or len(lengths) != len(shapes):
        raise ValueError(f"levels of the lengths {lengths} do not fit cores {shapes}, got {stored['levels']}")
    for shape, length in zip(shapes, lengths, strict=True):
        if not int8 and prod(shape) > max(SMALL, PACKED * length):
            raise ValueError(f"{length} bytes cannot hold the planes of a core of shape {shape}")
    count = sum(_scales(*pair) for pair in zip(shapes, axes, strict=True))
    if stored["scales"] != ((count,), "F32" if int8 else "U8"):
        raise ValueError(f"expected {count} scales, got {stored['scales']}")
    numbers = [float(structure[name]) for name in ("step", "norm", "error")]
    if not all(isfinite(n) and n >= 0 for n in numbers):
        raise ValueError(f"expected a finite step, norm and error, got {numbers}")
    step, norm, error = numbers
    return Coded(
        structure["format"],
        legs,
        rows,
        cols,
        tuple(shapes),
        structure["coding"],
        step,
        norm,
        (),
        (),
        tuple(axes),
        error,
    )


def _tensors(file: Path, structure: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"it cannot be read ({error})") from None
    for name, checksum in structure["tensors"].items():
        if checkpoint._checksum(values[name]) != checksum:
            raise ValueError(f"tensor {name} does not match its checksum")
    return values


def _scales(shape: Sequence[int], axis: int) -> int:
    """How many scales a core has."""
    if not -1 <= axis < len(shape):
        raise ValueError(f"expected an axis of a core of shape {tuple(shape)}, got {axis}")
    return 0 if axis == -1 else shape[axis]


def _about(root: Path) -> dict[str, Any]:
    file = root / ABOUT_FILE
    if not file.is_file():
        return {}  # the numbers are complete without it
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"grid: {file} is damaged ({error}); the numbers beside it may be whole") from None
    if not isinstance(about, dict):
        raise ValueError(f"grid: {file} must hold an object, got {type(about).__name__}")
    return about


def plain(value: Any) -> Any:
    """What JSON can hold: tuples and paths as lists and text, numbers that are not finite as text.

    Example:
        >>> plain({"a": (1, float("inf"))})
        {'a': [1, 'inf']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
