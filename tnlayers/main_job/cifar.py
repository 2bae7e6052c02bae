"""CIFAR-10 on disk: the npz pair of JPEG bytes, and the python batches, read without executing a pickle."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnlayers.main_job.readers import DataError, Progress, Split, check_labels, decode, fail

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_cifar10(path: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Train split, test split and class names of CIFAR-10: the npz pair of JPEG bytes, or the python batches.

    Args:
        path: the folder, or one of its files.

    Raises:
        DataError: files that are missing, damaged or of another layout.
    """
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise fail(path, "expected the folder of CIFAR-10, got a path that does not exist")
    if path.is_file() and not (path.suffix == ".npz" or path.name.startswith(("data_batch", "test_batch"))):
        raise fail(path, "expected cifar10_train_jpeg.npz or a python batch such as data_batch_1, got another file")
    npz = [folder / f"cifar10_{part}_jpeg.npz" for part in ("train", "test")]
    if any(file.is_file() for file in npz):
        train, test = _npz_split(npz[0]), _npz_split(npz[1])
        if train[1] != test[1]:
            raise fail(npz[1], f"expected the classes of the train file {train[1]}, got {test[1]}")
        return train[0], test[0], train[1]
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").is_file():
            names = [place / f"data_batch_{k}" for k in range(1, 6)]
            return _batches(names), _batches([place / "test_batch"]), CIFAR_CLASSES
    raise fail(folder, "expected cifar10_train_jpeg.npz and cifar10_test_jpeg.npz, or data_batch_1..5 and test_batch")


def _npz_split(path: Path) -> tuple[Split, tuple[str, ...]]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            missing = {"jpeg", "offset", "label", "classes"} - set(file.files)
            if missing:
                raise fail(path, f"expected the arrays jpeg, offset, label, classes, got no {sorted(missing)}")
            jpeg, offset, label = (np.asarray(file[name]) for name in ("jpeg", "offset", "label"))
            classes = tuple(str(name) for name in file["classes"].ravel())
    except DataError:
        raise
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise fail(path, f"expected a readable npz file, got {type(error).__name__} ({error})") from None
    if (
        jpeg.dtype != np.uint8
        or any(a.ndim != 1 for a in (jpeg, offset, label))
        or any(a.dtype.kind not in "iu" for a in (offset, label))
    ):
        raise fail(path, f"expected vectors of integers (jpeg of uint8), got {jpeg.dtype}{jpeg.shape}, {offset.dtype}")
    offset = offset.astype(np.int64)
    if len(offset) != len(label) + 1 or offset[0] != 0 or offset[-1] != len(jpeg) or (np.diff(offset) < 1).any():
        raise fail(
            path,
            f"offset must rise from 0 to {len(jpeg)} (bytes of jpeg) in {len(label) + 1} steps, got {len(offset)} "
            f"entries from {offset[0] if len(offset) else None} to {offset[-1] if len(offset) else None}",
        )
    check_labels(label, len(classes), path)

    def images(rows: np.ndarray, progress: Progress) -> np.ndarray:
        pictures = ((f"{path}, image {k}", io.BytesIO(jpeg[offset[k] : offset[k + 1]].tobytes())) for k in rows)
        return decode(pictures, len(rows), (3, 32, 32), progress, f"decode {path.name}")

    return Split(label.astype(np.int64), (3, 32, 32), images, str(path)), classes


class _Array:
    """Stand-in for a pickled numpy array: no code of the file runs, only the bytes of integer arrays are kept."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if fortran or not isinstance(raw, bytes) or not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array of another layout")
        self.value = np.frombuffer(raw, dtype.name).reshape(tuple(int(n) for n in shape))


class _Dtype:
    """Stand-in for a pickled numpy dtype."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name
        if self.name not in ("u1", "i1", "i4", "i8"):
            raise pickle.UnpicklingError(f"an array of dtype {self.name!r}")

    def __setstate__(self, state: Any) -> None:
        """Ignore the byte order: pixels are single bytes."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, coding: str = "latin1") -> bytes:
    if coding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text of coding {coding!r}")
    return text.encode("latin1")


class _BatchUnpickler(pickle.Unpickler):
    """Knows numbers, strings, lists, dicts and the bytes of numpy arrays; any other name is refused unseen."""

    allowed: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in for a name of the file."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"the name {module}.{name}, which is refused; the file may be hostile")
        return self.allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references out of the file."""
        raise pickle.UnpicklingError("a persistent id")


def _batches(paths: Sequence[Path]) -> Split:
    parts = [_read_batch(path) for path in paths]
    images, labels = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    return Split.in_memory(images, labels, str(paths[0].parent))


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) and labels of one python batch, without executing what the pickle asks for."""
    try:
        with path.open("rb") as handle:
            content = _BatchUnpickler(handle, encoding="bytes").load()
    except OSError as error:
        raise fail(path, f"expected a python batch of CIFAR-10, got {type(error).__name__} ({error})") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise fail(path, f"expected a pickled batch of images and labels, got {error}") from None
    if not isinstance(content, dict):
        raise fail(path, f"expected a pickled dict, got {type(content).__name__}")
    entry = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    data, labels = getattr(entry.get("data"), "value", None), entry.get("labels")
    if data is None or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise fail(path, f"expected data of uint8 (n, 3072), got {None if data is None else (data.dtype, data.shape)}")
    if not isinstance(labels, list) or len(labels) != len(data) or any(type(k) is not int for k in labels):
        found = f"{len(labels)} entries" if isinstance(labels, list) else f"{type(labels).__name__} as labels"
        raise fail(path, f"expected a list of {len(data)} integers as labels, one an image, got {found}")
    array = np.asarray(labels, np.int64)
    check_labels(array, 10, path)
    return data.reshape(-1, 3, 32, 32), array
