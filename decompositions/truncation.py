"""What every decomposition shares: input checks, scaling, the error budget, and the honest end."""

from dataclasses import dataclass, field
from math import sqrt
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from decompositions.bases import Basis, basis
from decompositions.formats.algebra import scale as scale_network
from decompositions.formats.algebra import to_dense
from decompositions.formats.network import Network
from decompositions.linalg import (
    METHODS,
    Method,
    accumulate_dtype,
    check_finite,
    check_tol,
    frobenius,
    gram_is_safe,
    is_tight,
    relative_error,
    usable_tol,
    warn_truncation,
    work_dtype,
)

N = TypeVar("N", bound=Network)


@dataclass
class Truncation:
    """One decomposition in progress: the tensor in its working dtype, and what may still be discarded.

    The squared tails of successive orthogonal cuts add up, so each cut may spend an equal share of what is left:
    never less than tol^2 / #cuts, and what one cut leaves goes to the next.

    Where `tol` is below 1e-4 the bases of a float32 tensor are computed in float64, because rounding would spend the
    tolerance; the tensor itself is read by blocks and never copied to float64. Values so large or small that squares
    leave the range are scaled first and scaled back in the result.
    """

    name: str
    x: Tensor
    cuts: int
    tol: float | None
    method: Method = "auto"
    generator: torch.Generator | None = None
    work: Tensor = field(init=False)
    precise: bool = field(init=False)
    scale: float = field(init=False, default=1.0)
    norm: float = field(init=False)
    discarded: float = field(init=False, default=0.0)
    capped: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        check_tol(self.name, self.tol)
        if self.method not in METHODS:
            raise ValueError(f"{self.name}: method must be one of {METHODS}, got {self.method!r}")
        self.work = self.x.detach().to(accumulate_dtype(self.x.dtype))
        self.precise = work_dtype(self.work.dtype, self.tol) != self.work.dtype
        self.norm = frobenius(self.work)
        low, high = (1e-10, 1e10) if self.work.dtype in (torch.float32, torch.complex64) else (1e-100, 1e100)
        if not low * sqrt(self.work.numel()) <= self.norm <= high:  # also where an entry is NaN or infinite
            largest = check_finite(self.name, self.x)
            if largest > 0 and not low <= largest <= high:
                self.scale = largest
                self.work = self.work / largest
            self.norm = frobenius(self.work)
        self._left = self.cuts

    @property
    def effective_tol(self) -> float | None:
        """`tol` less what rounding the cores to their dtype may add."""
        return None if self.tol is None else usable_tol(self.tol, self.x.dtype, self.cuts)

    def cut(self, x: Tensor, cap: int, *, ordered: bool = False) -> Basis:
        """Truncated basis of the next unfolding, given as slices (p, m, q), at most `cap` columns, within the budget.

        Where nothing may be cut it is the identity, unless the columns are to be `ordered` by singular values.
        """
        if self.effective_tol is None and cap >= x.shape[1] and not ordered:
            self._left -= 1
            return Basis(torch.eye(x.shape[1], dtype=x.dtype, device=x.device), x, 0.0)
        budget = None
        if self.effective_tol is not None:
            budget = max(0.0, (self.effective_tol * self.norm) ** 2 - self.discarded) / self._left
        found = basis(
            x,
            cap=cap,
            budget=budget,
            tol=self.tol,
            method=self.method,
            precise=self.precise,
            generator=self.generator,
        )
        if budget is not None and found.discarded > budget * (1 + 1e-9):
            self.capped = True
        self.discarded += found.discarded
        self._left -= 1
        return found

    @overload
    def finish(self, net: N, with_error: Literal[False], target: Tensor | None = None) -> N: ...
    @overload
    def finish(self, net: N, with_error: bool, target: Tensor | None = None) -> N | tuple[N, float]: ...
    def finish(self, net: N, with_error: bool, target: Tensor | None = None) -> N | tuple[N, float]:
        """Cast back, warn if the tolerance was missed, and return the network (with its measured error if asked).

        `target` is the tensor in the network's own shape where that differs from the input's.
        """
        net = net if self.scale == 1.0 else scale_network(net, self.scale)
        held = {t.untyped_storage().data_ptr() for t in (self.x, self.x if target is None else target)}
        cores = [core.to(self.x.dtype) for core in net.cores]
        # never a view of the caller's tensor: training the network in place must not change it
        net = net.replace([core.clone() if core.untyped_storage().data_ptr() in held else core for core in cores])
        if not all(bool(torch.isfinite(core).all()) for core in net.cores):
            raise ValueError(
                f"{self.name}: the cores do not fit {self.x.dtype}, got a tensor of norm {self.norm * self.scale:.3g}; "
                "decompose it in float32"
            )
        exact = self.x.detach() if target is None else target
        error: float | None = None
        double = torch.promote_types(self.x.dtype, torch.float64)
        unsure = self.tol is not None and (
            is_tight(self.tol, self.x.dtype, self.cuts)
            or (self.method == "gram" and not gram_is_safe(self.work.dtype, self.tol))
        )
        if with_error or self.capped or unsure:
            error = relative_error(to_dense(net.to(double)), exact)
        if self.tol is not None and error is not None and error > self.tol:
            reason = "the rank binds" if self.capped else f"method={self.method!r} in {self.x.dtype} resolves no less"
            warn_truncation(self.name, error, self.tol, reason)
        if with_error:
            assert error is not None
            return net, error
        return net
