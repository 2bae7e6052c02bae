"""Batches: how a model is called with one, which tokens of it count, in which order they come, what is stored."""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

MAIN_OUTPUTS = ("last_hidden_state", "logits")
"""Where the main output is in models that return several by name."""

Masker = Callable[[Any], Tensor | None]
"""A batch -> which of its tokens count, (batch, tokens) and True for those that do; None: all."""


def check_batches(name: str, what: str, batches: Any) -> None:
    """Refuse what is no re-iterable of batches, or empty.

    Raises:
        TypeError: one batch instead of several; an iterator, which a second pass would find empty.
        ValueError: no batches.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name}: {what} must be a list of batches or another re-iterable, got {type(batches).__name__}; "
            "give [batch], or tensor.split(32)"
        )
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{name}: {what} are read several times, expected a list or another re-iterable, got a "
            f"{type(batches).__name__} that can be read once; give list(...)"
        )
    if next(iter(batches), None) is None:
        raise ValueError(f"{name}: expected at least one batch, got no {what}")


def length_of(batches: Iterable[Any]) -> int | None:
    """Number of batches where that is known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def half_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model whose first floating parameter is of 16 bits."""
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return first if first in (torch.float16, torch.bfloat16) else None


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a tensor, a tuple (or list) of arguments, or a mapping of keyword arguments.

    Tensors come to the model's device, floating ones to float32, or to the 16 bits of a model that computes in them.
    """
    device, half = device_of(model), half_of(model)

    def place(x: Tensor) -> Tensor:
        if half is not None and x.is_floating_point():
            return x.to(device, half)
        return x.to(device, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x.to(device)

    if isinstance(batch, Mapping):
        return model(**{key: tree_map_only(Tensor, place, value) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        return model(*(tree_map_only(Tensor, place, value) for value in batch))
    return model(tree_map_only(Tensor, place, batch))


def main_output(output: Any, where: str = "the model") -> Tensor:
    """The tensor that counts: the output itself, `last_hidden_state`, `logits`, or the first floating tensor.

    Raises:
        TypeError: there is none.

    Example:
        >>> main_output({"loss": 3, "logits": torch.ones(2)})
        tensor([1., 1.])
    """
    if isinstance(output, Tensor):
        return output
    values: Sequence[Any] = ()
    if isinstance(output, Mapping):
        values = [output[key] for key in MAIN_OUTPUTS if key in output] + list(output.values())
    elif isinstance(output, tuple | list):
        values = output
    else:
        values = [getattr(output, key, None) for key in MAIN_OUTPUTS]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError(f"recovery: {where} must return a floating tensor (or a tuple, a mapping of such), got {output!r}")


def attention_mask(batch: Any) -> Tensor | None:
    """Which tokens count: the `attention_mask` (batch, tokens) of a batch given by keywords, where there is one.

    Example:
        >>> attention_mask({"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[ True,  True, False]])
    """
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return found.bool() if isinstance(found, Tensor) and found.ndim == 2 else None


def rows_that_count(x: Tensor, mask: Tensor | None) -> Tensor:
    """Vectors (rows, n) of an output (..., n), those of padding left out."""
    if mask is None or x.ndim < 3 or x.shape[:2] != mask.shape:
        return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    return x[mask.to(x.device)].reshape(-1, x.shape[-1])


class Feed:
    """Batches without end, pass after pass; a sequence is shuffled before every pass. Its place can be saved.

    Example:
        >>> feed = Feed(["a", "b", "c"], torch.Generator().manual_seed(0))
        >>> sorted(next(feed)[1] for _ in range(3))
        ['a', 'b', 'c']
    """

    def __init__(self, batches: Iterable[Any], generator: torch.Generator) -> None:
        self.batches, self.generator = batches, generator
        self.indexed = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
        self._begin()

    def _begin(self) -> None:
        self._before, self._place = self.generator.get_state(), 0
        self._order: list[int] | None = None
        self._iterator: Iterator[Any] | None = None
        if self.indexed:
            count = len(self.batches)  # type: ignore[arg-type]
            self._order = torch.randperm(count, generator=self.generator).tolist()
        else:
            self._iterator = iter(self.batches)

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> tuple[int | None, Any]:
        """(index in the sequence or None, batch)."""
        if self._order is not None:
            if self._place == len(self._order):
                self._begin()
            assert self._order is not None
            index = self._order[self._place]
            self._place += 1
            return index, self.batches[index]  # type: ignore[index]
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._begin()
            batch = next(self._iterator)
        self._place += 1
        return None, batch

    def state(self) -> dict[str, Any]:
        """Where the feed stands."""
        return {"generator": self._before, "place": self._place}

    def load(self, state: dict[str, Any]) -> None:
        """Go on there: exact for a sequence, and for an iterable that gives the same batches every time."""
        self.generator.set_state(state["generator"])
        self._begin()
        if self._iterator is not None:
            for _ in range(state["place"]):
                next(self._iterator, None)
        self._place = state["place"]


class Store:
    """Nested tensors, one entry a batch: in memory up to a budget of bytes, then in files of a temporary folder.

    Example:
        >>> with Store(budget=0) as store:
        ...     store.append({"x": torch.ones(2), "n": None})
        ...     store[0]["x"], store[0]["n"]
        (tensor([1., 1.]), None)
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.held = budget, 0
        self._entries: list[tuple[Any, ...]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, value: Any) -> None:
        """Add an entry; its tensors are detached."""
        leaves, structure = tree_flatten(value)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if self.held + size <= self.budget:
            self.held += size
            self._entries.append((tensors, rest, structure))
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tnlayers-")
        path = Path(self._folder.name) / f"{len(self._entries)}.pt"
        torch.save([t.clone() for t in tensors], path)  # a view would be saved with its whole base
        self._entries.append((path, rest, structure))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Any:
        tensors, rest, structure = self._entries[index]
        if isinstance(tensors, Path):
            tensors = torch.load(tensors, weights_only=True)
        found = iter(tensors)
        return tree_unflatten([next(found) if one is None else one[0] for one in rest], structure)

    def entries(self) -> Iterator[Any]:
        """All entries, one at a time."""
        return (self[k] for k in range(len(self)))

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entries.clear()
        if self._folder is not None:
            self._folder.cleanup()
