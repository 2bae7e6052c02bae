"""The triangular factor of activations, streamed: all that a weighted decomposition needs of them."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Inexact
from torch import Tensor

from decompositions.linalg import BLOCK, accumulate_dtype

_SMALL = 1 << 16
"""Entries below which a buffer costs nothing: narrow layers fold thousands of tokens at once."""


class ActivationFactor:
    """Upper triangle R of activations, `X^H X = R^H R` for X (tokens, n), by streaming QR: never a Gram matrix.

    All that a weighted decomposition needs of X, in n^2 numbers whatever the number of tokens; beside it their sum and
    their count. Tokens are written below the triangle, and the whole is factored in place once it is full: what
    happens depends on the order of the tokens alone, so that their division into chunks changes no bit of R.
    Guarantee: at most 4 n^2 numbers are held at any time, `.factor` included, and a block of 2^18 numbers; R carries a
    relative error of about `eps` of its dtype in the norm of every column.
    Cost: 2.9 tokens n^2 multiplications (2 would be the least, with a buffer without end); n^2 numbers after `.factor`,
    2.5 n^2 while tokens come, about the tokens themselves until there are n.

    Args:
        features: n.
        dtype: of R; float32 by default, half types are computed in float32.
        device: of R.

    Raises:
        ValueError: fewer than one feature.

    References:
        J. Demmel, L. Grigori, M. Hoemmen, J. Langou, Communication-optimal parallel and sequential QR and LU
        factorizations, SIAM J. Sci. Comput. 2012 (TSQR); COALA, NeurIPS 2025, arXiv 2507.07580.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 4, dtype=torch.float64)
        >>> held = ActivationFactor(4, dtype=torch.float64)
        >>> for chunk in x.split(30):
        ...     held.update(chunk)
        >>> held.count, torch.allclose(held.factor.T @ held.factor, x.T @ x), torch.allclose(held.mean, x.mean(0))
        (100, True, True)
    """

    def __init__(
        self, features: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ValueError(f"ActivationFactor: features must be an int >= 1, got {features!r}")
        self.features: int = features
        self.count: int = 0
        """Tokens seen, those that were masked left out."""
        work = accumulate_dtype(torch.float32 if dtype is None else dtype)
        # column-major: row k of the transpose is feature k of all rows held; LAPACK factors that in place
        self._columns: Tensor = torch.zeros(features, 0, dtype=work, device=device)
        self._filled = 0
        self._triangle = 0  # rows of the triangle at the top; tokens below
        double = torch.promote_types(work, torch.float64)
        self.total: Tensor = torch.zeros(features, dtype=double, device=device)
        """Sum of the tokens, (n,), in double precision."""

    def update(self, x: Inexact[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add activations (..., n); `mask` (...) says which tokens count.

        Raises:
            ValueError: another width, a mask of another shape, NaN or infinity; nothing was added then.
        """
        if x.ndim < 1 or x.shape[-1] != self.features:
            raise ValueError(
                f"ActivationFactor.update: the last axis must hold the features, expected {self.features}, got shape "
                f"{tuple(x.shape)}"
            )
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(
                f"ActivationFactor.update: the mask must have one entry a token, expected {tuple(x.shape[:-1])}, got "
                f"{tuple(mask.shape)}"
            )
        rows = x.detach().reshape(-1, self.features)
        size = max(1, BLOCK // self.features)  # a whole chunk is neither converted nor masked at once
        spans = [slice(k, k + size) for k in range(0, len(rows), size)]
        kept = None if mask is None else mask.reshape(-1).to(rows.device)

        def piece(span: slice) -> Tensor:
            return rows[span] if kept is None else rows[span][kept[span]]

        most = torch.finfo(self._columns.dtype).max
        for span in spans:
            part = piece(span)
            entries = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
            if part.numel() and not all(abs(float(end)) <= most for end in torch.aminmax(entries)):
                raise ValueError(
                    "ActivationFactor.update: activations must be finite, got NaN or infinity; calibrate in float32 or "
                    "bfloat16, and look at the layer before"
                )
        for span in spans:
            part = piece(span)
            self.count += len(part)
            self.total += part.sum(0, dtype=self.total.dtype).to(self.total.device)
            self._append(part)

    def _append(self, rows: Tensor) -> None:
        """Write rows below those held, folding whenever the buffer is full."""
        start = 0
        while start < len(rows):
            self._grow(self._filled + len(rows) - start)
            taken = min(len(rows) - start, self._columns.shape[1] - self._filled)
            below = self._columns.mT[self._filled : self._filled + taken]
            below.copy_(rows[start : start + taken])
            self._filled += taken
            start += taken
            if self._filled == self._full():
                self._fold()

    def _full(self) -> int:
        """Rows of the buffer: the triangle, and tokens below."""
        return self.features + max(3 * self.features // 2, _SMALL // self.features, 1)

    def _first(self) -> int:
        """Rows up to which the buffer grows by doubling; a copy of as many fits beside the full one."""
        return max(self.features, self._full() // 3)

    def _grow(self, needed: int) -> None:
        """Room for `needed` rows, or all the room there is."""
        room, first = self._columns.shape[1], self._first()
        if needed <= room:
            return
        target = min(first, max(needed, 2 * room)) if needed <= first else self._full()
        columns = self._columns.new_zeros(self.features, max(room, target))
        columns[:, : self._filled] = self._columns[:, : self._filled]
        self._columns = columns

    def _fold(self) -> None:
        """Triangle and tokens into one triangle, in place."""
        if self._filled == self._triangle:
            return
        n = self.features
        if self._filled <= self._first():  # few rows are factored alone, whatever room there is: bits follow the tokens
            self._columns = self._columns[:, : self._filled].contiguous()
        else:
            self._columns[:, self._filled :] = 0  # what an earlier factorization left there
        matrix = self._columns.mT
        tau = matrix.new_empty(min(matrix.shape))
        torch.geqrf(matrix, out=(matrix, tau))
        self._triangle = self._filled = min(self._filled, n)
        for k in range(0, self._triangle, 64):  # clear below the diagonal without a mask of n^2 entries
            corner = self._columns[k : k + 64, k : k + 64]
            corner.copy_(corner.tril())
            self._columns[k : k + 64, k + 64 : n] = 0

    def _compact(self) -> Tensor:
        """The triangle alone, its rows in column-major order; the room for tokens is given back."""
        self._fold()
        if self._columns.shape[1] > self._triangle:
            self._columns = self._columns[:, : self._triangle].contiguous()
        return self._columns.mT

    def merge(self, other: "ActivationFactor") -> None:
        """Add what another factor has seen (another worker's, another file's).

        Raises:
            ValueError: another number of features.
        """
        if other.features != self.features:
            raise ValueError(f"ActivationFactor.merge: expected {self.features} features as here, got {other.features}")
        rows = other._compact()
        self.count += other.count
        self.total = self.total + other.total.to(self.total)
        self._append(rows.clone() if other is self else rows)

    @property
    def factor(self) -> Tensor:
        """R, (n, n) and upper triangular; rows of zeros where fewer than n tokens were seen."""
        rows = self._compact()
        r = rows.new_zeros(self.features, self.features)
        r[: len(rows)] = rows
        return r

    @property
    def mean(self) -> Tensor:
        """Mean of the tokens, (n,), in double precision; zeros before the first."""
        return self.total / max(self.count, 1)

    def state(self) -> dict[str, Tensor]:
        """What goes into a file: plain tensors, from which `from_state` goes on bit for bit.

        Nothing is folded, so that saving does not change the result either; read `.factor` before for a state without
        pending tokens.

        Returns:
            `triangle` (at most n, n), `pending` tokens (k, n), `total` (n,), `count` (int64, no axes).
        """
        rows = self._columns.mT[: self._filled]
        return {
            "triangle": rows[: self._triangle].clone(memory_format=torch.contiguous_format),
            "pending": rows[self._triangle :].clone(memory_format=torch.contiguous_format),
            "total": self.total.clone(),
            "count": torch.tensor(self.count),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, device: torch.device | str | None = None) -> "ActivationFactor":
        """The factor that a `state` describes.

        Raises:
            ValueError: tensors that are missing, or whose shapes do not fit one another.
        """
        missing = {"triangle", "pending", "total", "count"} - set(state)
        if missing:
            raise ValueError(f"ActivationFactor.from_state: the state lacks {sorted(missing)}, got {sorted(state)}")
        triangle, pending, total, count = (state[key] for key in ("triangle", "pending", "total", "count"))
        n = total.numel()
        fits = total.ndim == 1 and triangle.ndim == pending.ndim == 2 and triangle.shape[1] == pending.shape[1] == n
        if not fits or len(triangle) > n or count.numel() != 1 or int(count) < 0:
            raise ValueError(
                "ActivationFactor.from_state: expected triangle (at most n, n), pending (k, n), total (n,) and a "
                f"count >= 0, got {tuple(triangle.shape)}, {tuple(pending.shape)}, {tuple(total.shape)} and "
                f"{count.tolist()}"
            )
        made = cls(n, dtype=triangle.dtype, device=triangle.device if device is None else device)
        made._append(triangle)
        made._triangle = len(triangle)
        made._append(pending)
        made.count, made.total = int(count), total.to(made.total.device, made.total.dtype, copy=True)
        return made

    def __repr__(self) -> str:
        return f"ActivationFactor({self.features} features, {self.count} tokens)"
