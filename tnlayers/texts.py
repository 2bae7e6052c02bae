"""Texts for calibration and evaluation: sampled, tokenized into padded batches or into windows of one long text."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from tnlayers.text_files import Texts as Texts
from tnlayers.text_files import read_document as read_document
from tnlayers.text_files import read_texts as read_texts

T = TypeVar("T")
Bos = bool | Literal["auto", "start"]

SANE_LENGTH = 10**6
"""Hugging Face writes 1e30 where a tokenizer knows no maximum."""


@overload
def sample(texts: Texts, n: int, seed: int = 0) -> Texts: ...  # type: ignore[overload-overlap]
@overload
def sample(texts: Sequence[T], n: int, seed: int = 0) -> list[T]: ...
def sample(texts: Any, n: int, seed: int = 0) -> Any:
    """`n` texts without replacement, in an order that the seed alone decides.

    A longer sample begins with the shorter ones of the same seed, so that `sample(texts, 256 + 512)` splits into a part
    to calibrate on and another to measure on. Places are distinct; equal texts of a file are not looked for.

    Args:
        texts: `Texts`, or any sequence.
        n: at most as many as there are.
        seed: the same on every platform and version of Python.

    Returns:
        `Texts` (with labels) of `Texts`, a list otherwise.

    Raises:
        ValueError: n is negative or larger than the number of texts.

    Example:
        >>> sample("abcdefgh", 3, seed=1) == sample("abcdefgh", 5, seed=1)[:3]
        True
    """
    if not 0 <= n <= len(texts):
        raise ValueError(f"sample: expected 0 <= n <= {len(texts)} (number of texts), got {n}")
    draw = random.Random(seed).random  # the one stream that Python promises not to change
    order = list(range(len(texts)))
    for k in range(n):
        swap = k + int(draw() * (len(order) - k))
        order[k], order[swap] = order[swap], order[k]
    return texts.take(order[:n]) if isinstance(texts, Texts) else [texts[k] for k in order[:n]]


@dataclass(frozen=True)
class Batches(Sequence[dict[str, Tensor]]):
    """Padded batches of one list of texts; each is a dict of keyword arguments of a model. May be iterated again.

    Args:
        items: `input_ids`, `attention_mask` and whatever else the tokenizer makes, each (batch, length).
        order: number of the text behind every row, batches joined.
        labels: class numbers in the order of the texts; None without labels.
        tokens: tokens that are not padding, special ones included.
        max_length: texts were cut there; None: nowhere.
        cut: texts of `max_length` tokens, cut or just as long.

    Example:
        >>> ids = torch.ones(1, 3, dtype=torch.int64)
        >>> made = Batches(({"input_ids": ids, "attention_mask": ids},), order=(0,), tokens=3)
        >>> len(made), [tuple(batch["input_ids"].shape) for batch in made]
        (1, [(1, 3)])
    """

    items: tuple[dict[str, Tensor], ...]
    order: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    tokens: int = 0
    max_length: int | None = None
    cut: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: Any) -> Any:
        return self.items[at]

    def restore(self, rows: Tensor) -> Tensor:
        """Rows computed batch by batch, in the order of the texts.

        Args:
            rows: (texts, ...), the results of all batches joined.
        """
        if len(rows) != len(self.order):
            raise ValueError(f"Batches.restore: expected {len(self.order)} rows (one a text), got {len(rows)}")
        places = torch.tensor(self.order, device=rows.device)
        return torch.empty_like(rows).index_copy_(0, places, rows)

    def labelled(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """(batch, its labels) pairs, as a data loader gives them."""
        if self.labels is None:
            raise ValueError("Batches.labelled: these texts have no labels; read them with labelled=True")
        at = 0
        for item in self.items:
            ids = item["input_ids"]
            rows = self.order[at : at + len(ids)]
            at += len(ids)
            yield item, torch.tensor([self.labels[k] for k in rows], device=ids.device)


def batches(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    device: torch.device | str | None = None,
    sort: bool = False,
) -> Batches:
    """Tokenize texts (special tokens as the model was trained with) and pad them batch by batch.

    Args:
        texts: strings, or `Texts` (labels are carried along).
        tokenizer: called as Hugging Face's: `tokenizer(list, truncation=, max_length=)` returns lists of ids under
            "input_ids"; its `pad_token_id` and `padding_side` are used.
        batch_size: rows of a batch; the last one may be smaller.
        max_length: longer texts are cut. None: the tokenizer's own maximum if it states one.
        device: where the batches lie; None: the CPU (the functions of `evaluate` move them).
        sort: texts of similar length share a batch, which saves padding; `Batches.order` says where each text went.

    Raises:
        TypeError: texts is one string, or the tokenizer cannot be called like that.
        ValueError: no texts, a text without tokens (by its number), or no padding token where one is needed.

    Example:
        >>> class Letters:
        ...     pad_token_id = 0
        ...     def __call__(self, texts, truncation, max_length):
        ...         return {"input_ids": [[ord(c) - 96 for c in text][:max_length] for text in texts]}
        >>> made = batches(["cab", "a", "be"], Letters(), batch_size=2, sort=True)
        >>> made.order, made[0]["input_ids"].tolist(), made[0]["attention_mask"].tolist()
        ((1, 2, 0), [[1, 0], [2, 5]], [[1, 0], [1, 1]])
    """
    if isinstance(texts, str):
        raise TypeError("batches: expected a list of texts, got one string; put it into a list")
    if not len(texts):
        raise ValueError("batches: expected at least one text, got none")
    if batch_size < 1:
        raise ValueError(f"batches: expected batch_size >= 1, got {batch_size}")
    if max_length is None:
        known = getattr(tokenizer, "model_max_length", None)
        max_length = int(known) if known is not None and known <= SANE_LENGTH else None
    elif max_length < 1:
        raise ValueError(f"batches: expected max_length >= 1, got {max_length}")
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None and batch_size > 1:
        raise ValueError(
            "batches: the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token "
            "(the attention mask hides it), or use batch_size=1"
        )
    options: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length}
    fields = _fields(tokenizer, list(texts), options)
    lengths = [len(ids) for ids in fields["input_ids"]]
    empty = next((k for k, length in enumerate(lengths) if not length), None)
    if empty is not None:
        raise ValueError(f"batches: the tokenizer makes no token of text {empty}, {texts[empty][:40]!r}; is it right?")
    order = sorted(range(len(texts)), key=lengths.__getitem__) if sort else list(range(len(texts)))
    fields.setdefault("attention_mask", [[1] * length for length in lengths])
    fill = {"input_ids": pad or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    left = getattr(tokenizer, "padding_side", "right") == "left"
    items = [
        {name: _padded([rows[k] for k in chosen], fill.get(name, 0), left, device) for name, rows in fields.items()}
        for chosen in (order[at : at + batch_size] for at in range(0, len(order), batch_size))
    ]
    tokens = sum(int(item["attention_mask"].sum()) for item in items)
    cut = sum(length == max_length for length in lengths)
    return Batches(tuple(items), tuple(order), getattr(texts, "labels", None), tokens, max_length, cut)


@dataclass(frozen=True)
class Windows(Sequence[tuple[Tensor, int]]):
    """One long sequence of tokens cut into windows; window k is `(input_ids (length,), n)`: its last n are scored.

    Window k begins at token k * stride. A token is scored once, in the first window that has context for it; a token
    without any (the first of the sequence, and of every window that does not overlap) is scored only after a BOS.

    Args:
        ids: (tokens,) int64, the BOS at the start of the sequence included.
        window: tokens the model sees at once, its BOS included.
        stride: tokens between the beginnings of two windows.
        bos: "none", "start" (one BOS before the whole sequence) or "window" (one before every window).
        bos_id: the token put before every window; None otherwise.

    Raises:
        ValueError: a window below 2, a stride that skips tokens, nothing to score.

    Example:
        >>> windows = Windows(torch.arange(7), window=4, stride=2)
        >>> [(ids.tolist(), n) for ids, n in windows]
        [([0, 1, 2, 3], 3), ([2, 3, 4, 5], 2), ([4, 5, 6], 1)]
        >>> windows.scored
        6
    """

    ids: Tensor
    window: int
    stride: int
    bos: Literal["none", "start", "window"] = "none"
    bos_id: int | None = None
    spans: tuple[tuple[int, int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != torch.int64:
            raise ValueError(f"Windows: expected ids (tokens,) int64, got {tuple(self.ids.shape)} {self.ids.dtype}")
        if self.window < 2:
            raise ValueError(f"Windows: expected window >= 2 (context and a token to score), got {self.window}")
        extra = int(self.bos_id is not None)
        room = self.window - extra
        if not 1 <= self.stride <= room:
            raise ValueError(
                f"Windows: expected 1 <= stride <= {room} (the tokens of a window{', less its BOS' if extra else ''}), "
                f"got {self.stride}; a larger one would skip tokens"
            )
        spans, total, done = [], len(self.ids), 0
        for begin in range(0, total, self.stride):
            end = min(begin + room, total)
            first = max(done, begin + 1 - extra)
            if first < end:
                spans.append((begin, end, first))
            done = end
            if end == total:
                break
        if not spans:
            raise ValueError(f"Windows: expected at least {2 - extra} tokens to score one, got {total}")
        object.__setattr__(self, "spans", tuple(spans))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[k] for k in range(*at.indices(len(self)))]
        begin, end, first = self.spans[at]
        ids = self.ids[begin:end]
        if self.bos_id is not None:
            ids = torch.cat([ids.new_tensor([self.bos_id]), ids])
        return ids, end - first

    @property
    def scored(self) -> int:
        """Tokens that are scored, all windows together."""
        return sum(end - first for _, end, first in self.spans)

    @property
    def conditions(self) -> str:
        """Window, stride and BOS in words."""
        return window_words(self.window, self.stride, self.bos)


def token_windows(
    texts: str | Sequence[str] | Tensor | Sequence[int],
    tokenizer: Any = None,
    *,
    window: int,
    stride: int | None = None,
    bos: Bos = "auto",
    bos_id: int | None = None,
    separator: str = "\n\n",
) -> Windows:
    """Join texts, tokenize them once, and cut the tokens into windows for `perplexity`.

    Args:
        texts: one text, several (joined by `separator`), or token ids as they are.
        tokenizer: called as Hugging Face's: `tokenizer(text, add_special_tokens=False)` returns ids under "input_ids".
            Not needed for ids.
        window: tokens the model sees at once.
        stride: tokens between the beginnings of two windows; None: windows that do not overlap.
        bos: True: a BOS before every window (it takes one of its places and is never scored), the right choice for
            models that were never trained without it. "start": one before the whole sequence, as published tables
            for LLaMA count. False: none. "auto": "start" if the tokenizer puts one before a text by itself, else none.
        bos_id: the BOS token; None: the tokenizer's.
        separator: between two texts.

    Returns:
        `Windows`, which counts tokens and scored tokens.

    Raises:
        TypeError: texts without a tokenizer, or ids that are not integers.
        ValueError: no BOS token where one is asked for, no token at all, a bad window or stride.

    Example:
        >>> letters = lambda text, add_special_tokens: {"input_ids": [ord(c) - 96 for c in text]}
        >>> windows = token_windows("abcde", letters, window=4, bos=True, bos_id=0)
        >>> [(ids.tolist(), n) for ids, n in windows], windows.conditions
        ([([0, 1, 2, 3], 3), ([0, 4, 5], 2)], 'window 4, stride 3, a BOS before every window')
    """
    if bos not in (True, False, "auto", "start"):
        raise ValueError(f"token_windows: bos must be True, False, 'auto' or 'start', got {bos!r}")
    ids = _stream(texts, tokenizer, separator)
    if bos_id is None:
        bos_id = getattr(tokenizer, "bos_token_id", None)
    if bos == "auto":
        bos = "start" if tokenizer is not None and _adds_bos(tokenizer, bos_id) and _is_text(texts) else False
    if bos is not False and bos_id is None:
        raise ValueError(f"token_windows: bos={bos!r} needs a BOS token, and the tokenizer has none; give bos_id=")
    if bos == "start":
        ids = torch.cat([ids.new_tensor([bos_id]), ids])
    before = bos_id if bos is True else None
    how: Any = {True: "window", "start": "start", False: "none"}[bos]
    return Windows(ids, window, window - (before is not None) if stride is None else stride, how, before)


def check_tokens(model: nn.Module, inputs: Any, *, caller: str = "check_tokens") -> None:
    """Refuse token ids that the model's embedding does not have (another model's tokenizer), and rows too long for it.

    Args:
        model: with an embedding or a configuration that states its sizes; what it does not state is not checked.
        inputs: token ids, or keyword arguments with "input_ids"; anything else passes. Lengths are checked of keyword
            arguments alone.
        caller: function named in the message.

    Raises:
        ValueError: an id below 0 or beyond the vocabulary, a row longer than the model's positions, with both numbers.

    Example:
        >>> class Model(nn.Module):
        ...     def get_input_embeddings(self):
        ...         return nn.Embedding(10, 2)
        >>> check_tokens(Model(), torch.tensor([3, 12]))
        Traceback (most recent call last):
        ValueError: check_tokens: expected token ids from 0 to 9 (vocabulary of Model), got 12; ...
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or not ids.numel() or ids.is_floating_point() or ids.is_complex():
        return
    size, low, high = vocabulary_size(model), int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        known = "the vocabulary" if size is None else f"{size - 1} (vocabulary of {type(model).__name__})"
        raise ValueError(
            f"{caller}: expected token ids from 0 to {known}, got {low if low < 0 else high}; "
            "is this the model's own tokenizer?"
        )
    longest = max_positions(model)
    if isinstance(inputs, Mapping) and longest is not None and ids.shape[-1] > longest:
        raise ValueError(
            f"{caller}: expected at most {longest} tokens (positions of {type(model).__name__}), got {ids.shape[-1]}; "
            f"make the batches with max_length={longest}"
        )


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of rows of the token embedding, else `config.vocab_size`, else None.

    Example:
        >>> vocabulary_size(nn.Linear(2, 2)) is None
        True
    """
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        table = None
    size = getattr(table, "num_embeddings", None)
    return size if size is not None else _setting(model, "vocab_size")


def max_positions(model: nn.Module) -> int | None:
    """Longest input the model's configuration allows (`max_position_embeddings`, `n_positions`), None if unknown.

    Example:
        >>> max_positions(nn.Linear(2, 2)) is None
        True
    """
    return _setting(model, "max_position_embeddings", "n_positions")


def window_words(window: int, stride: int, bos: str) -> str:
    """The conditions of a perplexity in words.

    Example:
        >>> window_words(2048, 512, "none")
        'window 2048, stride 512, no BOS'
    """
    said = {"none": "no BOS", "start": "one BOS at the start", "window": "a BOS before every window"}
    return f"window {window}, stride {stride}, {said[bos]}"


def _setting(model: nn.Module, *names: str) -> int | None:
    """A positive integer of the configuration, of its text part where it has several."""
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in names:
            value = part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _fields(tokenizer: Any, text: str | list[str], options: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer returns, as a dict with "input_ids"."""
    if not callable(tokenizer):
        raise TypeError(f"texts: expected a tokenizer that can be called with texts, got {type(tokenizer).__name__}")
    with contextlib.suppress(ValueError):  # some callables have no signature
        if "verbose" in inspect.signature(tokenizer).parameters:
            options = {**options, "verbose": False}  # Hugging Face would warn of texts that windows are about to cut
    made = tokenizer(text, **options)
    if not isinstance(made, Mapping) or "input_ids" not in made:
        raise TypeError(f"texts: expected the tokenizer to return input_ids, got {type(made).__name__}")
    return dict(made)


def _is_text(texts: Any) -> bool:
    return isinstance(texts, str) or (isinstance(texts, Sequence) and len(texts) > 0 and isinstance(texts[0], str))


def _stream(texts: Any, tokenizer: Any, separator: str) -> Tensor:
    """All tokens in a row, int64 on the CPU."""
    if _is_text(texts):
        if tokenizer is None:
            raise TypeError("token_windows: texts need a tokenizer, got None; or give token ids")
        whole = texts if isinstance(texts, str) else separator.join(texts)
        texts = _fields(tokenizer, whole, {"add_special_tokens": False})["input_ids"]
        if not len(texts):
            raise ValueError(f"token_windows: the tokenizer makes no token of {whole[:40]!r}; is it the right one?")
    ids = torch.as_tensor(texts).detach().cpu()
    ids = ids if ids.numel() else ids.to(torch.int64)  # an empty list has no dtype of its own
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"token_windows: token ids must be integers, got {ids.dtype}")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    return ids.to(torch.int64)


def _adds_bos(tokenizer: Any, bos_id: int | None) -> bool:
    """Whether the tokenizer puts its BOS before a text by itself."""
    if bos_id is None:
        return False
    bare = _fields(tokenizer, "a", {"add_special_tokens": False})["input_ids"]
    full = _fields(tokenizer, "a", {"add_special_tokens": True})["input_ids"]
    return len(full) > len(bare) and full[0] == bos_id


def _padded(rows: Sequence[Sequence[int]], fill: int, left: bool, device: torch.device | str | None) -> Tensor:
    longest = max(map(len, rows))
    out = torch.full((len(rows), longest), fill, dtype=torch.int64)
    for k, row in enumerate(rows):
        out[k, longest - len(row) if left else 0 : None if left else len(row)] = torch.as_tensor(row)
    return out.to(device) if device is not None else out
