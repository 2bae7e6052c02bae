"""Entries of a source, each asked for once, under limits of evaluations, bytes and time."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import hypot, inf, prod
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from cross_approx.sources.source import as_source
from decompositions.linalg import check_finite

F64 = torch.float64

BATCH = 1 << 17
"""Entries asked for in one call at most."""

LARGEST = 64
"""How many of the largest entries are remembered."""


def norm(values: Inexact[Tensor, "..."]) -> float:
    """`‖values‖_2` whatever their scale: squares of 1e200 overflow, those of 1e-200 vanish."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not 0 < largest < inf:
        return largest
    return largest * float(torch.linalg.vector_norm(values / largest))


class LimitReached(Exception):
    """Reading on would pass a limit; the message is the reason of the result."""


def open_source(name: str, source: Any, shape: Sequence[int] | None) -> Any:
    """What `as_source` makes of the argument, or the argument where it is a source already; never empty."""
    if hasattr(source, "entries") and hasattr(source, "shape"):
        opened = source
    elif callable(source) and shape is None:
        raise ValueError(f"{name}: a callable source needs its mode sizes, expected shape=(n_1, ..., n_d), got None")
    elif callable(source):
        if isinstance(shape, Integral):
            raise ValueError(f"{name}: expected mode sizes in a sequence, got shape={shape}; pass shape=({shape},)")
        opened = as_source(source, shape=_sizes(name, tuple(shape or ())))
    else:
        opened = as_source(source.detach() if isinstance(source, Tensor) else source)
    sizes = _sizes(name, tuple(opened.shape))
    if shape is not None and tuple(shape) != sizes:
        raise ValueError(f"{name}: shape must be that of the source, expected {sizes}, got {tuple(shape)}")
    return opened


def check_limits(name: str, **limits: int | float | None) -> None:
    """Refuse a limit that is not positive, and a count that is no integer; None is no limit."""
    for what, limit in limits.items():
        if limit is not None and not limit > 0:
            raise ValueError(f"{name}: {what} must be positive, got {limit}")
        if limit is not None and what != "max_seconds" and (isinstance(limit, bool) or not isinstance(limit, Integral)):
            raise TypeError(f"{name}: {what} is a count, expected an integer, got {limit!r}")


@runtime_checkable
class Entries(Protocol):
    """What searches and held-out samples ask: of a `Reader`, or of one seen through a change of modes."""

    @property
    def source(self) -> Any:
        """Where the entries come from."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the modes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        ...

    @property
    def evaluations(self) -> int:
        """Entries asked for so far."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        ...

    @property
    def norm(self) -> float:
        """Of all values read."""
        ...

    @property
    def max_evals(self) -> int | None:
        """The limit of evaluations."""
        ...

    @property
    def left(self) -> int:
        """Evaluations that the limit leaves."""
        ...

    def whole_limit(self) -> AbstractContextManager[None]:
        """Within, what is reserved of the limit may be used as well."""
        ...

    @property
    def largest(self) -> Tensor:
        """Indices of the largest entries read."""
        ...

    def read(self, index: Tensor, *, use: bool = True) -> Tensor:
        """Values, in double precision."""
        ...

    def used(self, index: Tensor) -> Tensor:
        """Which rows were read, and not only to be held out."""
        ...


def _sizes(name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in sizes):
        raise ValueError(f"{name}: expected mode sizes >= 1 and an order >= 1, got shape {sizes}")
    return sizes


class Reader:
    """Reads entries in double precision, remembers them, counts what was asked for, and stops at a limit.

    A batch that would pass `max_evals` is not begun; time and bytes are looked at before every batch. Of `max_evals`
    up to a quarter, `reserve` at most, is kept for reads within `whole_limit`.
    Cost: O(N log N) for N entries in all, 40 bytes of memory each.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        max_evals: int | None = None,
        max_bytes: int | None = None,
        max_seconds: int | float | None = None,
        reserve: int = 0,
    ) -> None:
        self.name, self.source = name, source
        self.sizes = tuple(int(n) for n in source.shape)
        self.max_evals, self.max_bytes, self.max_seconds = max_evals, max_bytes, max_seconds
        self.reserved = 0 if max_evals is None else min(reserve, max_evals // 4)
        self.evaluations = 0
        self.norm = 0.0  # of all values read; their squares may overflow or vanish
        self.largest = torch.zeros(0, len(self.sizes), dtype=torch.long)
        self._largest_sizes = torch.zeros(0, dtype=torch.float64)
        self._runs: list[tuple[Tensor, ...]] = []  # sorted keys, second keys, values, whether used; lengths fall
        self._raw_dtype: torch.dtype | None = None
        self._start, self._bytes_before = time.monotonic(), getattr(source, "bytes_read", 0)
        generator = torch.Generator().manual_seed(0)
        whole = 2**62
        self._weights = torch.randint(-whole, whole, (len(self.sizes), 2), generator=generator) * 2 + 1
        if prod(self.sizes) < whole:  # an exact key; otherwise 128 bits of a linear hash
            self._weights[:, 0] = torch.tensor([prod(self.sizes[k + 1 :]) for k in range(len(self.sizes))])
        self._take_probe()

    @property
    def left(self) -> int:
        """Evaluations that `max_evals` leaves, reserved ones included."""
        return 2**62 if self.max_evals is None else self.max_evals - self.evaluations

    @contextmanager
    def whole_limit(self) -> Iterator[None]:
        """Within, what is reserved of `max_evals` may be used as well."""
        before, self.reserved = self.reserved, 0
        try:
            yield
        finally:
            self.reserved = before

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values as the source gives them; integers count as torch's default dtype."""
        dtype = self.source.dtype
        return dtype if dtype.is_floating_point or dtype.is_complex else torch.get_default_dtype()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        reported = getattr(self.source, "bytes_read", None)
        if reported is not None:
            return int(reported) - int(self._bytes_before)
        return self.evaluations * self.source.dtype.itemsize

    @property
    def largest_value(self) -> float:
        """Largest absolute value read."""
        return float(self._largest_sizes[0]) if len(self._largest_sizes) else 0.0

    def read(self, index: Int[Tensor, "B d"], *, use: bool = True) -> Inexact[Tensor, "B"]:
        """Values in float64 or complex128, from memory where they were read before. Rows may repeat.

        Entries read with `use=False` are held out until they are read with `use=True`.

        Raises:
            LimitReached: a limit binds; nothing of this call was asked for beyond it.
            ValueError: a value is NaN or infinite.
        """
        keys, checks = self._keys(index)
        found, _, values = self._find(keys, checks, use)
        if not bool(found.all()):
            new = (~found).nonzero()[:, 0]
            new = new[keys[new].argsort(stable=True)]  # sorted: neighbours are close to one another in the source
            first = torch.ones(len(new), dtype=torch.bool)
            first[1:] = keys[new[1:]] != keys[new[:-1]]
            new = new[first]
            self._ask(index[new], keys[new], checks[new], use)
            values = self._find(keys, checks, use)[2]
        return values

    def used(self, index: Int[Tensor, "B d"]) -> Tensor:
        """Which rows were read, and not only to be held out."""
        return self._find(*self._keys(index), False)[1]

    def _take_probe(self) -> None:
        """A function that was just asked for one value, to see its dtype, need not give that one again."""
        probed = getattr(self.source, "probed", None)
        if probed is None or self.source.evaluations != 1:
            return
        self.evaluations = 1
        self._bytes_before = 0
        if bool(torch.isfinite(probed).all()):  # where it is not, the entry may never be asked for
            index = torch.zeros(1, len(self.sizes), dtype=torch.long)
            self._remember(index, *self._keys(index), probed.cpu().to(torch.promote_types(probed.dtype, F64)), False)

    def _keys(self, index: Tensor) -> tuple[Tensor, Tensor]:
        keys = [(index * self._weights[:, k]).sum(1) for k in range(2)]  # wraps around
        return keys[0], keys[1]

    def _find(self, keys: Tensor, checks: Tensor, use: bool) -> tuple[Tensor, Tensor, Tensor]:
        found, used = torch.zeros(len(keys), dtype=torch.bool), torch.zeros(len(keys), dtype=torch.bool)
        values = torch.zeros(len(keys), dtype=self._runs[0][2].dtype if self._runs else torch.float64)
        for run_keys, run_checks, run_values, run_used in self._runs:
            at = torch.searchsorted(run_keys, keys).clamp_max_(len(run_keys) - 1)
            here = (run_keys[at] == keys) & (run_checks[at] == checks)
            values = torch.where(here, run_values[at], values)
            if use:
                run_used[at[here]] = True
            used |= here & run_used[at]
            found |= here
        return found, used, values

    def _batch(self) -> int:
        """Entries to ask for in one call: under a limit of time, half of what the rate so far leaves time for."""
        if self.max_seconds is None:
            return BATCH
        spent = time.monotonic() - self._start
        fits = self.evaluations / max(spent, 1e-9) * (self.max_seconds - spent) / 2
        return int(min(BATCH, max(16, fits)))

    def _ask(self, index: Tensor, keys: Tensor, checks: Tensor, use: bool) -> None:
        if self.max_evals is not None and self.evaluations + len(index) > self.max_evals - self.reserved:
            raise LimitReached(f"max_evals = {self.max_evals}")
        parts = []
        begin = 0
        while begin < len(index):
            part = index[begin : begin + self._batch()]
            begin += len(part)
            if self.max_seconds is not None and time.monotonic() - self._start >= self.max_seconds:
                raise LimitReached(f"max_seconds = {self.max_seconds}")
            if self.max_bytes is not None and self.bytes_read >= self.max_bytes:
                raise LimitReached(f"max_bytes = {self.max_bytes}")
            self.evaluations += len(part)
            raw = self.source.entries(part.clone().to(self.source.device)).detach().cpu()  # it may write into its own
            self._raw_dtype = self._raw_dtype or raw.dtype
            if raw.dtype != self._raw_dtype:
                raise TypeError(
                    f"{self.name}: a source gives values of one dtype, expected {self._raw_dtype} as in its first "
                    f"batch, got {raw.dtype}"
                )
            double = torch.promote_types(raw.dtype, torch.float64)
            values = raw.to(double)
            bad = (~torch.isfinite(values)).nonzero()[:, 0]
            if len(bad):
                at = bad[0]
                raise ValueError(
                    f"{self.name}: entries must be finite, got {values[at].item()} at index "
                    f"{tuple(part[at].tolist())} ({len(bad)} of {len(part)} in this batch)"
                )
            parts.append(values)
        values = torch.cat(parts)
        check_finite(self.name, values)
        self._remember(index, keys, checks, values, use)

    def _remember(self, index: Tensor, keys: Tensor, checks: Tensor, values: Tensor, use: bool) -> None:
        magnitudes = values.abs()
        self.norm = hypot(self.norm, norm(magnitudes))
        sizes = torch.cat([self._largest_sizes, magnitudes])
        top = sizes.topk(min(LARGEST, len(sizes)))
        self.largest = torch.cat([self.largest, index])[top.indices]
        self._largest_sizes = top.values
        run: tuple[Tensor, ...] = (keys, checks, values, torch.full((len(keys),), use))
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            both = [torch.cat(pair) for pair in zip(self._runs.pop(), run, strict=True)]
            order = both[0].argsort()
            run = tuple(part[order] for part in both)
        self._runs.append(run)
