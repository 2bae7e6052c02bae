"""Image data sets for the main job: one call, from a short text such as `mnist:PATH` to normalized tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tnlayers.main_job.cifar import read_cifar10
from tnlayers.main_job.readers import (
    MAX_BYTES,
    DataError,
    Progress,
    Split,
    fail,
    read_imagefolder,
    read_mnist,
)

__all__ = ["SPECS", "DataError", "Dataset", "load_data"]

SPECS = ("digits", "mnist:PATH", "fashion-mnist:PATH", "cifar10:PATH", "imagefolder:PATH")
DIGITS = tuple("0123456789")
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
DIGITS_TEST = 447
"""Test images of `digits`: a quarter, the same ones whatever the seed."""

Parts = tuple[Split, Split, tuple[str, ...]]


@dataclass(frozen=True)
class Dataset:
    """Images and labels for training and test.

    Pixels are centred and scaled channel by channel with the mean and the standard deviation of the training images.

    Args:
        name: the first part of the spec.
        train_x: float32 (n, channels, height, width).
        train_y: int64 (n,).
        test_x: as train_x.
        test_y: as train_y.
        classes: names of the labels 0, 1, ...
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width


def load_data(
    spec: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    size: int | tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set.

    Args:
        spec: `digits` (scikit-learn's, nothing to download), or `mnist:PATH`, `fashion-mnist:PATH` (a folder with the
            four idx files, gzipped or not), `cifar10:PATH` (the npz pair of JPEG bytes, or the python batches),
            `imagefolder:PATH` (PATH/train/CLASS/*.png and PATH/test or PATH/val).
        seed: of the choice that `limit` makes; the split into training and test never depends on it.
        limit: keep that many training images and as many test images, balanced over the classes.
        size: height and width to resize to, for imagefolder alone.
        progress: called as (what, done, total) while images are decoded.

    Raises:
        DataError: an unknown spec; a file that is missing, damaged or of another kind. One line that names the file.
        ImportError: scikit-learn or pillow is missing; the message names the extra.

    Example:
        >>> data = load_data("digits", limit=100)
        >>> tuple(data.train_x.shape), data.classes[:3], load_data("digits").test_y.bincount().tolist()[:3]
        ((100, 1, 8, 8), ('0', '1', '2'), [45, 46, 44])
    """
    name, path = _parse(spec)
    if size is not None and name != "imagefolder":
        raise DataError(f"load_data: size is for imagefolder alone, expected None for {name}, got {size}")
    parts = _read(name, path, (size, size) if isinstance(size, int) else size)
    train, test, classes = parts
    rows = [_choose(split, limit, seed, len(classes)) for split in (train, test)]
    total = 4 * sum(len(chosen) for chosen in rows) * int(np.prod(train.shape))
    if total > MAX_BYTES:
        raise fail(spec, f"expected at most {MAX_BYTES >> 30} GiB in memory, got {total / 2**30:.1f}; use --limit")
    if train.shape != test.shape:
        raise fail(spec, f"images of train and test must be of one shape, got {train.shape} and {test.shape}")
    report = progress or (lambda what, done, total: None)
    train_x, test_x = (
        torch.from_numpy(split.images(chosen, report).astype(np.float32))
        for split, chosen in zip((train, test), rows, strict=True)
    )
    mean, std = train_x.mean((0, 2, 3), keepdim=True), train_x.std((0, 2, 3), keepdim=True, correction=0)
    std = torch.where(std > 0, std, 1.0)
    train_y, test_y = (
        torch.from_numpy(split.labels[chosen]) for split, chosen in zip((train, test), rows, strict=True)
    )
    return Dataset(name, (train_x - mean) / std, train_y, (test_x - mean) / std, test_y, classes)


def _parse(spec: str) -> tuple[str, Path]:
    name, colon, path = spec.partition(":")
    names = [known.partition(":")[0] for known in SPECS]
    if name not in names:
        raise DataError(f"load_data: expected one of {', '.join(SPECS)}, got {spec!r}")
    if (name == "digits") == bool(colon) or (colon and not path):
        wanted = SPECS[names.index(name)]
        raise DataError(f"load_data: expected {wanted}, got {spec!r}")
    return name, Path(path).expanduser()


def _read(name: str, path: Path, size: tuple[int, int] | None) -> Parts:
    readers: dict[str, Callable[[], Parts]] = {
        "digits": _read_digits,
        "mnist": lambda: (*read_mnist(path), DIGITS),
        "fashion-mnist": lambda: (*read_mnist(path), FASHION),
        "cifar10": lambda: read_cifar10(path),
        "imagefolder": lambda: read_imagefolder(path, size),
    }
    try:
        return readers[name]()
    except PermissionError as error:
        raise fail(path, f"expected files that can be read, got {error}") from None


def _read_digits() -> Parts:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("load_data: digits needs scikit-learn; pip install 'tnlayers[examples]'") from error
    bunch = load_digits()
    images, labels = np.asarray(bunch.images, np.float32)[:, None], np.asarray(bunch.target, np.int64)
    order = _balanced(labels, np.random.default_rng(0))
    test, train = np.sort(order[:DIGITS_TEST]), np.sort(order[DIGITS_TEST:])
    return (
        Split.in_memory(images[train], labels[train], "digits"),
        Split.in_memory(images[test], labels[test], "digits"),
        DIGITS,
    )


def _balanced(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Random order of the rows whose every beginning holds the classes in the proportions of the whole."""
    order = generator.permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        place[rows] = (np.arange(len(rows)) + generator.random()) / len(rows)
    return np.argsort(place, kind="stable")


def _choose(split: Split, limit: int | None, seed: int, classes: int) -> np.ndarray:
    if limit is None or limit >= len(split.labels):
        return np.arange(len(split.labels))
    if limit < classes:
        raise DataError(f"load_data: limit must be at least {classes}, one image a class, got {limit}")
    return np.sort(_balanced(split.labels, np.random.default_rng(seed))[:limit])
