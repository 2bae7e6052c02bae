"""Right-hand sides of `Y' = F(t, Y)`, seen from one core of a tree whose other cores are isometries toward it.

Every scheme needs a field in one way only: with the other cores fixed, as an ODE for the center core,

    C' = E_v[F(t, Y(C))],    E_v: contraction with the conjugates of all cores but v.

A dense field makes Y for that. An operator on networks never does: what its subtrees contribute is contracted once and
remembered as long as no core below changes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from decompositions import Network, to_dense
from decompositions.formats.network import Labels
from decompositions.formats.plan import bucket, plan_path, run
from decompositions.formats.program import Step

Steps = tuple[Step, ...]


@lru_cache(maxsize=4096)
def _path(inputs: tuple[Labels, ...], sizes: tuple[tuple[str, int], ...], out: Labels, itemsize: int) -> Steps:
    return plan_path(inputs, dict(sizes), out, itemsize).steps


def path(inputs: Sequence[Labels], sizes: Mapping[str, int], out: Labels, itemsize: int) -> Steps:
    """Steps of a contraction, remembered for all sizes of the same powers of two: ranks change in every step."""
    named = {label for leg in inputs for label in leg}
    buckets = tuple(sorted((label, bucket(size)) for label, size in sizes.items() if label in named))
    return _path(tuple(inputs), buckets, out, itemsize)


CoreField = Callable[[float, Tensor], Tensor]
"""(t, center core) -> its derivative."""


def refuse_complex(what: str, found: torch.dtype, wanted: torch.dtype) -> None:
    """Refuse complex values where Y is real: its imaginary part would be lost.

    Raises:
        ValueError: they are.
    """
    if found.is_complex and not wanted.is_complex:
        raise ValueError(
            f"integrate: {what} must be real where Y is, expected {wanted}, got {found}; start from "
            "y0.to(torch.complex128)"
        )


@runtime_checkable
class Field(Protocol):
    """A right-hand side that can be restricted to one core."""

    def restrict(self, net: Network, core: int) -> CoreField:
        """Derivative of core `core` of a tree whose other cores are fixed isometries toward it."""

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """Dense right-hand side, for references and small problems."""


class DenseField:
    """A function (t, dense Y) -> dense F; every evaluation makes Y.

    Args:
        function: takes a time and a tensor of the shape of the network, returns one of that shape.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> from tnlayers.integrators import DenseField
        >>> net = LowRank(torch.eye(3, 1), torch.ones(1, 1), torch.eye(4, 1))
        >>> DenseField(lambda t, y: 2 * y).restrict(net, 1)(0.0, net.S).item()
        2.0
    """

    def __init__(self, function: Callable[[float, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """The function's value, its shape checked."""
        value = self.function(t, y)
        if not isinstance(value, Tensor) or value.shape != y.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"integrate: the field must return a tensor like Y, expected {tuple(y.shape)}, got {got}")
        refuse_complex("the field", value.dtype, y.dtype)
        return value.to(y.dtype)

    def restrict(self, net: Network, core: int) -> CoreField:
        """See `Field`."""
        others = [k for k in range(len(net.cores)) if k != core]
        conjugates = [net.cores[k].conj() for k in others]
        inputs = [net.outside, *(net.legs[k] for k in others)]
        back = path(inputs, net.sizes, net.legs[core], net.dtype.itemsize)

        def derivative(t: float, value: Tensor) -> Tensor:
            cores = [value if k == core else fixed for k, fixed in enumerate(net.cores)]
            dense = to_dense(net._unchecked(cores, net.legs, net.rows, net.cols))
            if len(cores) == 1:
                dense = dense.clone()  # it is the core itself; a function may write to its argument
            return run(back, [self(t, dense), *conjugates]).reshape(value.shape)

        return derivative
