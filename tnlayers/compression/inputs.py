"""Data for a pretrained model: texts through its tokenizer, pictures through its processor."""

import hashlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnlayers.pretrained.model import Pretrained
from tnlayers.texts import Texts, batches, check_tokens, read_texts, sample

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Inputs:
    """Batches for a model, and where they come from.

    Args:
        batches: of what the model takes; with a Sized length.
        labels: class of every row, or ().
        count: texts or pictures.
        told: the source in words, with a digest of the file: what a stored calibration is checked against.

    Example:
        >>> Inputs([torch.zeros(2, 3)], (), 2, "two vectors").count
        2
    """

    def __init__(self, batches: Sequence[Any], labels: Sequence[int], count: int, told: str) -> None:
        self.batches, self.labels, self.count, self.told = batches, tuple(labels), count, told


def text_inputs(
    held: Pretrained,
    texts: Texts | Sequence[str],
    *,
    length: int,
    batch_size: int,
    told: str = "",
    sort: bool = True,
) -> Inputs:
    """Texts as batches of the model's own tokenizer.

    Raises:
        ValueError: a model without a tokenizer, or one whose ids the model does not know.
    """
    if held.tokenizer is None:
        raise ValueError(
            f"compress: texts need a tokenizer, got none beside {held.source or 'the model'}; save it there"
        )
    made = batches(texts, held.tokenizer, batch_size=batch_size, max_length=length, sort=sort)
    for batch in made:
        check_tokens(held.model, batch, caller="compress")
    return Inputs(list(made), (), len(texts), told)


def picture_inputs(held: Pretrained, files: Sequence[Path], *, batch_size: int, told: str = "") -> Inputs:
    """Pictures as batches of the model's own processor: resized, cropped and normalized as it was trained.

    Raises:
        ValueError: a model without an image processor; a file that is no picture, by name.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImportError("compress: pictures need pillow; pip install tnlayers[hf]") from None

    transform = _transform(held)
    made: list[Any] = []
    for start in range(0, len(files), batch_size):
        rows = []
        for file in files[start : start + batch_size]:
            try:
                with Image.open(file) as picture:
                    rows.append(transform(picture.convert("RGB")))
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"compress: {file} cannot be read as a picture ({error})") from None
        x = torch.stack(rows)
        made.append({"pixel_values": x} if held.kind == "transformers" else x)
    return Inputs(made, (), len(files), told)


def _transform(held: Pretrained) -> Any:
    """Picture -> tensor (channels, height, width)."""
    if held.kind == "timm":
        data = import_module("timm.data")
        return data.create_transform(**data.resolve_model_data_config(held.model), is_training=False)
    if held.image_processor is None:
        raise ValueError(f"compress: pictures need an image processor, got none beside {held.source or 'the model'}")

    def processed(picture: Any) -> Tensor:
        made: Tensor = held.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        return made

    return processed


def read_inputs(
    held: Pretrained,
    path: Path,
    *,
    count: int,
    length: int,
    batch_size: int,
    seed: int,
    column: str | None = None,
    skip: int = 0,
) -> Inputs:
    """`count` texts of a file, or pictures of a folder, after the first `skip` of the same order.

    Args:
        held: the model.
        path: a file of texts (see `read_texts`), or a folder with pictures at any depth.
        count: how many; fewer where there are no more.
        length: tokens a text is cut at.
        batch_size: rows of a batch.
        seed: of the order.
        column: of the texts.
        skip: how many to pass over: those that another call with the same seed took.

    Raises:
        FileNotFoundError: no such path.
        ValueError: nothing left to take; see `read_texts`.
    """
    if not path.exists():
        raise FileNotFoundError(f"compress: expected a file of texts or a folder of pictures, got {path}")
    pool: Any = sorted(f for f in path.rglob("*") if f.suffix.lower() in PICTURES) if path.is_dir() else None
    if pool is None:
        pool = read_texts(path, column=column)
    elif not pool:
        raise ValueError(f"compress: expected pictures ({', '.join(PICTURES)}) below {path}, got none")
    taken = sample(pool, min(len(pool), skip + count), seed)[skip:]
    if not len(taken):
        raise ValueError(
            f"compress: {path} holds {len(pool)}, of which {min(skip, len(pool))} are taken; give more, or another file"
        )
    told = f"{path.name} ({_digest(path, pool)}), {len(taken)} after {skip}, seed {seed}, length {length}"
    if path.is_dir():
        return picture_inputs(held, taken, batch_size=batch_size, told=told)
    return text_inputs(held, taken, length=length, batch_size=batch_size, told=told)


def _digest(path: Path, pool: Any) -> str:
    """First letters of a digest: of the file, or of the names below the folder."""
    made = hashlib.sha256()
    if path.is_dir():
        for file in pool:
            made.update(str(file.relative_to(path)).encode())
    else:
        with path.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                made.update(chunk)
    return made.hexdigest()[:12]
