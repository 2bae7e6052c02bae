"""What a job reads: a pretrained model, texts through its tokenizer, pictures through its processor."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.pretrained.model import PLAN_FILE, Pretrained, open_pretrained
from tnlayers.texts import SANE_LENGTH, Texts, batches, check_tokens, max_positions, read_texts, sample

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Inputs:
    """Batches for a model, and where they come from.

    Args:
        batches: of what the model takes; with a Sized length.
        labels: class of every row, or ().
        count: texts or pictures.
        told: the source in words.

    Example:
        >>> Inputs([torch.zeros(2, 3)], 2, "two vectors").count
        2
    """

    def __init__(self, batches: Sequence[Any], count: int, told: str) -> None:
        self.batches, self.count, self.told = batches, count, told


def open_model(
    caller: str, source: str, *, task: str | None = None, dtype: str | None = None, device: str = "cpu"
) -> Pretrained:
    """`open_pretrained` for a job: with a token to pad with, and without the head of a model that embeds sentences.

    Tokenizers of decoders often have no padding token; the end of a text serves, which the attention mask hides. The
    tokenizer that is saved beside the model stays as it is (see `padding_tokenizer`).

    Args:
        caller: the command, for messages.
        source: see `open_pretrained`, as for the others.
        task: see there.
        dtype: see there.
        device: see there.

    Raises:
        ValueError: a device that cannot be used; see `open_pretrained`.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{caller}: --device must be one of this machine, got {device!r} ({error})") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the files lack is random: the same in every run, or no calibration would fit again
        held = open_pretrained(source, task=task, dtype=dtype, device=device)
        headed = body_of(held.model) is not held.model
        if held.pooling is not None and headed and task is None and not (Path(source) / PLAN_FILE).is_file():
            # sentence-transformers pools hidden states, whatever class the configuration names
            held = open_pretrained(source, task="embedding", dtype=dtype, device=device)
    return held


def body_of(model: nn.Module) -> nn.Module:
    """The model below its head, where transformers has one; else the model.

    Example:
        >>> body_of(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    found = getattr(model, "base_model", None)
    return found if isinstance(found, nn.Module) else model


def padding_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer; a copy that pads with the end of a text where it has no padding token."""
    if tokenizer is None or getattr(tokenizer, "pad_token_id", None) is not None:
        return tokenizer
    if getattr(tokenizer, "eos_token", None) is None:
        return tokenizer
    made = copy.deepcopy(tokenizer)
    made.pad_token = made.eos_token
    return made


def longest_text(held: Pretrained, length: int) -> int:
    """Tokens a text is cut at: as asked, and what tokenizer and model can take."""
    known = (length, getattr(held.tokenizer, "model_max_length", None), max_positions(held.model))
    return min(int(n) for n in known if n is not None and n <= SANE_LENGTH)


def fingerprint(*parts: Any) -> str:
    """Twelve letters that stand for models, batches and words: what a stored calibration must agree with.

    Cost: every number is read once.

    Example:
        >>> x = torch.arange(3.0)
        >>> fingerprint("a", [{"x": x}]) == fingerprint("a", [{"x": x.clone()}])
        True
        >>> fingerprint("a", [{"x": x}]) == fingerprint("a", [{"x": x + 1}])
        False
    """
    made = hashlib.blake2b(digest_size=6)

    def add(part: Any) -> None:
        if isinstance(part, nn.Module):
            add(type(part).__name__)
            add(dict(part.named_parameters()))
            add(dict(part.named_buffers()))
        elif isinstance(part, Mapping):
            for key, value in part.items():
                add(str(key))
                add(value)
        elif isinstance(part, list | tuple):
            for value in (len(part), *part):
                add(value)
        elif isinstance(part, Tensor):
            made.update(f"{part.dtype} {tuple(part.shape)};".encode())
            made.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            made.update(f"{part!r};".encode())

    add(parts)
    return made.hexdigest()


def text_inputs(
    held: Pretrained,
    texts: Texts | Sequence[str],
    *,
    length: int,
    batch_size: int,
    told: str = "",
) -> Inputs:
    """Texts as batches of the model's own tokenizer, those of similar length together.

    Raises:
        ValueError: a model without a tokenizer, or one whose ids the model does not know.
    """
    if held.tokenizer is None:
        raise ValueError(
            f"compress: texts need a tokenizer, got none beside {held.source or 'the model'}; save it there"
        )
    tokenizer, longest = padding_tokenizer(held.tokenizer), longest_text(held, length)
    made = batches(texts, tokenizer, batch_size=batch_size, max_length=longest, sort=True)
    for batch in made:
        check_tokens(held.model, batch, caller="compress")
    return Inputs(list(made), len(texts), told)


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
    return Inputs(made, len(files), told)


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
    """`count` texts of a file, or pictures of a folder, after the first `skip` of the same order, as batches.

    Args:
        held: the model.
        path: see `choose_inputs`, as for the others.
        count: see there.
        length: tokens a text is cut at; fewer where the model takes fewer.
        batch_size: rows of a batch.
        seed: of the order.
        column: of the texts.
        skip: see `choose_inputs`.

    Raises:
        FileNotFoundError: no such path.
        ValueError: nothing to take; see `read_texts`, `text_inputs` and `picture_inputs`.
    """
    taken, told = choose_inputs(path, count=count, seed=seed, column=column, skip=skip)
    if path.is_dir():
        return picture_inputs(held, taken, batch_size=batch_size, told=told)
    told += f", at most {longest_text(held, length)} tokens"
    return text_inputs(held, taken, length=length, batch_size=batch_size, told=told)


def choose_inputs(path: Path, *, count: int, seed: int, column: str | None = None, skip: int = 0) -> tuple[Any, str]:
    """`count` texts of a file, or files of pictures of a folder, and the choice in words.

    Args:
        path: a file of texts (see `read_texts`), or a folder with pictures at any depth.
        count: how many; fewer where there are no more.
        seed: of the order.
        column: of the texts.
        skip: how many to pass over: those that another call with the same seed took. Where that leaves none, the first
            ones are taken again, and the words say so.

    Raises:
        FileNotFoundError: no such path.
        ValueError: no picture in the folder; see `read_texts`.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "lines.txt"
        >>> _ = file.write_text("one\\ntwo\\nthree")
        >>> first, rest = (choose_inputs(file, count=2, seed=0, skip=k) for k in (0, 2))
        >>> sorted([*first[0], *rest[0]]), rest[1]
        (['one', 'three', 'two'], '1 of 3 in lines.txt, after 2, seed 0')
        >>> choose_inputs(file, count=2, seed=0, skip=3)[1]
        '2 of 3 in lines.txt, seed 0, the same as for calibration: there are no others'
    """
    if not path.exists():
        raise FileNotFoundError(f"compress: expected a file of texts or a folder of pictures, got {path}")
    pool: Any = sorted(f for f in path.rglob("*") if f.suffix.lower() in PICTURES) if path.is_dir() else None
    if pool is None:
        pool = read_texts(path, column=column)
    elif not pool:
        raise ValueError(f"compress: expected pictures ({', '.join(PICTURES)}) below {path}, got none")
    again = skip >= len(pool)
    after = 0 if again else skip
    taken = sample(pool, min(len(pool), after + count), seed)[after:]
    told = f"{len(taken)} of {len(pool)} in {path.name}" + (f", after {after}" if after else "") + f", seed {seed}"
    return taken, told + (", the same as for calibration: there are no others" if again and skip else "")
