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

    @property
    def text(self) -> str:
        """For people."""
        return f"error {self.error:.1e}, rank {self.rank}, {self.evaluations} evaluations"


@dataclass(frozen=True, eq=False)
class CrossResult:
    """A network made from few entries of a tensor, and how far it can be trusted.

    `error` is the relative error on entries that no core was made from: the larger one of a uniform half and of a half
    drawn near the largest values read. A uniform sample of k entries misses a region that holds the fraction 3 / k of
    all entries with probability 5 %, and a smaller one more often: `converged` means that no such region was seen to be
    wrong, not that there is none.

    Gram passes and sketches read every entry. Their `error` is then that of all entries, `held_out` counting them; one
    pass of a sketch estimates it from `held_out` random entries and from random functionals of all. There `converged`
    is `error <= tol`, and True where no tol is given: the ranks asked for are what was asked for.

    Args:
        network: in the dtype of the source.
        evaluations: entries asked for, held-out ones included; of passes, those of every pass.
        bytes_read: as the source reports them, else evaluations times the size of an entry.
        error: relative error: on held-out entries, over all entries where every one was read, or estimated.
        held_out: number of entries behind `error`.
        converged: whether `error <= tol`; True where neither function nor caller sets a tol.
        reason: why the search ended.
        history: one `Sweep` a sweep or pass; its error is infinite where none was known by then.
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
