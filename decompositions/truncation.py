"""What every decomposition shares: input checks, scaling, the error budget, and the honest end."""

from dataclasses import dataclass, field
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from decompositions.formats.algebra import scale as scale_network
from decompositions.formats.algebra import to_dense
from decompositions.formats.network import Network
from decompositions.linalg import (
    METHODS,
    Basis,
    Method,
    basis,
    check_tensor,
    check_tol,
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

    A float32 tensor is cut in float64 where `tol` is below 1e-4, because rounding would spend the tolerance;
    values so large or small that squares leave the range are scaled first and scaled back in the result.
    """

    name: str
    x: Tensor
    cuts: int
    tol: float | None
    method: Method = "auto"
    generator: torch.Generator | None = None
    work: Tensor = field(init=False)
    scale: float = field(init=False, default=1.0)
    norm: float = field(init=False)
    discarded: float = field(init=False, default=0.0)
    capped: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        check_tensor(self.name, self.x)
        check_tol(self.name, self.tol)
        if self.method not in METHODS:
            raise ValueError(f"{self.name}: method must be one of {METHODS}, got {self.method!r}")
        work = self.x.detach().to(work_dtype(self.x.dtype, self.tol))
        largest = float(work.abs().max())
        low, high = (1e-10, 1e10) if work.dtype in (torch.float32, torch.complex64) else (1e-100, 1e100)
        if largest > 0 and not low <= largest <= high:
            self.scale = largest
            work = work / largest
        self.work = work
        self.norm = float(torch.linalg.vector_norm(work, dtype=torch.promote_types(work.dtype, torch.float64)))
        self._left = self.cuts

    @property
    def effective_tol(self) -> float | None:
        """`tol` less what rounding the cores to their dtype may add."""
        return None if self.tol is None else usable_tol(self.tol, self.x.dtype, self.cuts)

    def cut(self, matrix: Tensor, cap: int) -> Basis:
        """Truncated basis of the next unfolding, at most `cap` columns, within the budget."""
        budget = None
        if self.effective_tol is not None:
            budget = max(0.0, (self.effective_tol * self.norm) ** 2 - self.discarded) / self._left
        found = basis(matrix, cap=cap, budget=budget, tol=self.tol, method=self.method, generator=self.generator)
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
