"""Readers of image files on disk: idx files and folders of images; what every reader shares.

No reader trusts a file: sizes are checked before memory is asked for, and no pickle is executed.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Progress = Callable[[str, int, int], None]
"""(what, done, total); called often."""

MAX_BYTES = 8 << 30
"""Largest size of a data set in memory, as float32."""
IDX_MAGIC = {"images": 2051, "labels": 2049}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
GRAY_MODES, COLOR_MODES = ("1", "L"), ("P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "PA")


class DataError(ValueError):
    """A data set that cannot be read: one line that names the file and the rule."""


@dataclass(frozen=True)
class Split:
    """Labels of one part of a data set, and a way to get the images of chosen rows.

    Args:
        labels: int64, one a row.
        shape: (channels, height, width) of every image.
        images: (rows, progress) -> array (len(rows), channels, height, width).
        source: what messages call it.
    """

    labels: np.ndarray
    shape: tuple[int, ...]
    images: Callable[[np.ndarray, Progress], np.ndarray]
    source: str

    @classmethod
    def in_memory(cls, images: np.ndarray, labels: np.ndarray, source: str) -> Split:
        """Split of an array (n, channels, height, width) that is already in memory."""
        return cls(labels.astype(np.int64), tuple(images.shape[1:]), lambda rows, _: images[rows], source)


def fail(path: str | os.PathLike[str], rule: str) -> DataError:
    """Error of one line about `path`."""
    return DataError(f"load_data: {path}: {' '.join(rule.split())}")


def need_pillow() -> Any:
    """PIL.Image, or one line that says which extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("load_data: pillow is needed to read images; pip install 'tnlayers[examples]'") from error
    return Image


# -- idx -------------------------------------------------------------------------------------------------------------


def read_mnist(folder: Path) -> tuple[Split, Split]:
    """Train and test split of the four idx files of MNIST or Fashion-MNIST, gzipped or not.

    Args:
        folder: holds `train-images-idx3-ubyte` and its three companions, with or without `.gz`, or a subfolder `raw`.

    Raises:
        DataError: a file that is missing, damaged, cut short, of another kind, or labels that do not fit the images.
    """
    if not folder.is_dir():
        raise fail(folder, f"expected a folder with the four idx files, got {_what_is(folder)}")
    train, test = _idx_split(folder, "train"), _idx_split(folder, "t10k")
    if train.shape != test.shape:
        raise fail(folder, f"images of train and test must be of one size, got {train.shape[1:]} and {test.shape[1:]}")
    return train, test


def _idx_split(folder: Path, part: str) -> Split:
    image_file, label_file = _find_idx(folder, f"{part}-images", 3), _find_idx(folder, f"{part}-labels", 1)
    images, labels = read_idx(image_file, "images"), read_idx(label_file, "labels")
    if len(images) != len(labels):
        raise fail(label_file, f"expected {len(images)} labels, one an image of {image_file.name}, got {len(labels)}")
    check_labels(labels, 10, label_file)
    return Split.in_memory(images[:, None], labels, str(image_file))


def _find_idx(folder: Path, stem: str, dims: int) -> Path:
    names = [f"{stem}{dash}idx{dims}-ubyte{end}" for dash in "-." for end in ("", ".gz")]
    for place in (folder, folder / "raw", folder / "MNIST" / "raw", folder / "FashionMNIST" / "raw"):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise fail(folder, f"expected the idx file {names[0]} (or .gz), found none; give the folder that holds it")


def read_idx(path: Path, kind: str) -> np.ndarray:
    """uint8 array of an idx file: (n, height, width) for "images", (n,) for "labels"; gzip is found by its magic.

    Raises:
        DataError: a wrong magic number, sizes that do not fit the data, damaged compression.
    """
    try:
        with path.open("rb") as probe:
            opener: Any = gzip.open if probe.read(2) == b"\x1f\x8b" else open
        with opener(path, "rb") as handle:
            return _parse_idx(handle, path, kind)
    except (OSError, EOFError, zlib.error) as error:
        raise fail(path, f"expected a readable idx file, got {type(error).__name__} ({error})") from None


def _parse_idx(handle: Any, path: Path, kind: str) -> np.ndarray:
    head = handle.read(4)
    magic, wanted = int.from_bytes(head, "big"), IDX_MAGIC[kind]
    if len(head) < 4 or magic != wanted:
        other = {number: name for name, number in IDX_MAGIC.items()}.get(magic)
        hint = f", which is a file of {other}; are the files swapped?" if other and len(head) == 4 else ""
        raise fail(path, f"expected an idx file of {kind} (magic = {wanted}), got magic = {magic}{hint}")
    count = wanted & 0xFF
    raw = handle.read(4 * count)
    if len(raw) < 4 * count:
        raise fail(path, f"expected a header of {4 + 4 * count} bytes, got {4 + len(raw)}; the file is cut short")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4"))
    size = prod(shape)
    if size == 0 or size * 4 > MAX_BYTES:
        raise fail(path, f"expected sizes >= 1 and at most {MAX_BYTES >> 2:,} pixels, got {shape} in the header")
    data = _read_up_to(handle, size + 1)
    if len(data) != size:
        state = "is cut short" if len(data) < size else "has bytes left over"
        raise fail(path, f"the header {shape} promises {size:,} bytes of {kind}, and the file {state}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_up_to(handle: Any, size: int) -> bytes:
    """At most `size` bytes, in pieces: a header that lies costs no memory."""
    pieces, left = [], size
    while left and (piece := handle.read(min(left, 1 << 24))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def check_labels(labels: np.ndarray, classes: int, source: str | os.PathLike[str]) -> None:
    """Refuse labels outside 0..classes-1.

    Raises:
        DataError: no labels, or one out of range.
    """
    if labels.size == 0:
        raise fail(source, "expected at least one label, got none")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        row = int(np.argmax((labels < 0) | (labels >= classes)))
        raise fail(source, f"labels must lie in 0..{classes - 1}, got {int(labels[row])} at row {row}")


# -- folders of images -----------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """What the headers of a folder of images say."""

    sizes: dict[tuple[int, int], Path]
    gray: bool


def read_imagefolder(root: Path, size: tuple[int, int] | None) -> tuple[Split, Split, tuple[str, ...]]:
    """Train split, test split and class names of `root/train/CLASS/*.png` and `root/test` (or `val`).

    Args:
        root: the folder.
        size: (height, width) to resize to; None requires that all images agree.

    Raises:
        DataError: missing folders, classes that differ between the parts, files that are no images, several sizes.
    """
    if not root.is_dir():
        raise fail(root, f"expected a folder with train and test (or val), got {_what_is(root)}")
    train_root = root / "train"
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for place in (train_root, test_root):
        if not place.is_dir():
            raise fail(place, "expected a folder with one folder a class, found none")
    classes, test_classes = (_class_folders(place) for place in (train_root, test_root))
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise fail(root, f"the classes of {train_root.name} and {test_root.name} must agree, got {odd} in one of them")
    if len(classes) < 2:
        raise fail(train_root, f"expected at least 2 folders of classes, got {classes}")
    files = {place: _image_files(place, classes) for place in (train_root, test_root)}
    look = _look([path for part in files.values() for path, _ in part], wide_ok=size is not None)
    if size is None and len(look.sizes) > 1:
        (a, first), (b, second) = list(look.sizes.items())[:2]
        raise fail(root, f"images must be of one size, got {a} ({first}) and {b} ({second}); give --size")
    height, width = next(iter(look.sizes)) if size is None else size
    shape = (1 if look.gray else 3, height, width)
    train, test = (_folder_split(place, files[place], shape, size is not None) for place in files)
    return train, test, tuple(classes)


def _class_folders(place: Path) -> list[str]:
    return sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(place: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    found = []
    for label, name in enumerate(classes):
        folder = sorted(place.joinpath(name).iterdir())
        paths = [p for p in folder if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
        if not paths:
            raise fail(place / name, f"expected images ({', '.join(IMAGE_SUFFIXES)}), found none")
        found += [(path, label) for path in paths]
    return found


def _look(paths: Sequence[Path], *, wide_ok: bool) -> _Look:
    """Sizes and kind of all images, from their headers alone; stops at a second size unless that is allowed."""
    image = need_pillow()
    sizes: dict[tuple[int, int], Path] = {}
    gray = True
    for path in paths:
        try:
            with image.open(path) as picture:
                mode, (width, height) = picture.mode, picture.size
        except Exception as error:  # PIL raises SyntaxError, struct.error and others on damaged files
            raise fail(path, f"expected an image, got {type(error).__name__} ({error})") from None
        if mode not in (*GRAY_MODES, *COLOR_MODES):
            raise fail(path, f"expected 8-bit gray or colour, got mode {mode}; convert the image")
        gray = gray and mode in GRAY_MODES
        sizes.setdefault((height, width), path)
        if len(sizes) > 1 and not wide_ok:
            break
    return _Look(sizes, gray)


def _folder_split(place: Path, files: list[tuple[Path, int]], shape: tuple[int, int, int], resize: bool) -> Split:
    def images(rows: np.ndarray, progress: Progress) -> np.ndarray:
        pictures = ((str(files[k][0]), files[k][0]) for k in rows)
        return decode(pictures, len(rows), shape, progress, f"decode {place.name}", resize=resize)

    return Split(np.asarray([label for _, label in files], np.int64), shape, images, str(place))


def decode(
    pictures: Iterable[tuple[str, Any]],
    count: int,
    shape: tuple[int, int, int],
    progress: Progress,
    what: str,
    *,
    resize: bool = False,
) -> np.ndarray:
    """uint8 array (count, *shape) of pictures, each a (name, file) that PIL can open.

    Raises:
        DataError: a picture that cannot be decoded, or of another size.
    """
    image = need_pillow()
    channels, height, width = shape
    out = np.empty((count, *shape), np.uint8)
    for row, (name, file) in enumerate(pictures):
        try:
            with image.open(file) as opened:
                picture = opened.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # see _look
            raise fail(name, f"expected an image, got {type(error).__name__} ({error})") from None
        if resize:
            picture = picture.resize((width, height), image.Resampling.BILINEAR)
        if picture.size != (width, height):
            raise fail(name, f"expected {height} x {width} pixels, got {picture.size[1]} x {picture.size[0]}")
        pixels = np.asarray(picture)
        out[row] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        if row % 256 == 255 or row + 1 == count:
            progress(what, row + 1, count)
    return out


def _what_is(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "a file" if path.exists() else "a path that does not exist"
