"""What a cross approximation returns, and says about itself."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from cross_approx.digits import Quantization
from decompositions.formats.network import Network


class Sweep(NamedTuple):
    """One line of the history: after which sweep, how many evaluations, the held-out error, the largest rank."""

    sweep: int
    evaluations: int
    error: float
    rank: int


@dataclass(frozen=True, eq=False)
class CrossResult:
    """A network made from few entries of a tensor, and how far it can be trusted.

    `error` is the relative error on entries that no core was made from: the larger one of a uniform half and of a half
    drawn near the largest values read. A uniform sample of k entries misses a region that holds the fraction 3 / k of
    all entries with probability 5 %, and a smaller one more often: `converged` means that no such region was seen to be
    wrong, not that there is none.

    Args:
        network: in the dtype of the source.
        evaluations: entries asked for, held-out ones included.
        bytes_read: as the source reports them, else evaluations times the size of an entry.
        error: held-out relative error; over all entries where every one was read.
        held_out: number of entries behind `error`.
        converged: whether `error <= tol`.
        reason: why the search ended.
        history: one `Sweep` a sweep.
        pivots: what interpolates: index sets, as described by the function.
        quantization: the digits that the modes of the network are (`qtt_cross`), or None.

    Example:
        >>> import torch
        >>> from cross_approx import tt_cross
        >>> result = tt_cross(lambda i: i.sum(1).double(), shape=(8, 8, 8), tol=1e-8)
        >>> result.converged, result.network.ranks, result.reason
        (True, (2, 2), 'the held-out error meets tol')
    """

    network: Network
    evaluations: int
    bytes_read: int
    error: float
    held_out: int
    converged: bool
    reason: str
    history: tuple[Sweep, ...] = ()
    pivots: tuple[Tensor, ...] = field(default=(), repr=False)
    quantization: Quantization | None = None
