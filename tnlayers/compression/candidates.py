"""What a weight can be replaced by: for every format, networks with their price and the error that they leave."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompositions import LowRank, Network, numel, to_dense, transpose
from decompositions.linalg import accumulate_dtype
from decompositions.weighted_formats import weighted_kronecker, weighted_ttm, weighted_tucker2
from decompositions.weighted_spectrum import WeightedSpectrum

OPTIONS = 512
"""Ranks of one matrix that are considered at most."""

TOLERANCES = tuple(0.75 * 0.72**k for k in range(11))
"""Relative errors at which formats are tried that have no spectrum of their own."""


@dataclass(frozen=True)
class Problem:
    """A weight, what it is worth between its inputs and its outputs, and what numbers cost.

    Args:
        weight: as a recipe sees it: (out, in), a kernel (out, in, *k), a table (rows, width).
        inputs: factor of its inputs; (rows,) for a table; None where nothing is known.
        outputs: factor of the gradients at its outputs; None where nothing is known.
        table: whether rows are picked: `inputs` then belong to the rows and `outputs` to the columns.
        tokens: that the factors hold; 1 where there are none.
        scale: factor of all squared errors, so that those of several layers can be added.
        price: of one number of a network.
        dense_price: of the weight as it is.
        multiple: low ranks are multiples of it.

    Example:
        >>> problem = Problem(torch.randn(6, 8), torch.randn(30, 8), tokens=30)
        >>> problem.spectrum.values.shape, problem.total > 0
        (torch.Size([6]), True)
    """

    weight: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    table: bool = False
    tokens: int = 1
    scale: float = 1.0
    price: int = 1
    dense_price: int | None = None
    multiple: int = 1

    @cached_property
    def matrix(self) -> Tensor:
        """The weight with its inputs as columns."""
        flat = self.weight.detach().flatten(1)
        return flat.T if self.table else flat

    @cached_property
    def spectrum(self) -> WeightedSpectrum:
        """Singular values between inputs and outputs."""
        return WeightedSpectrum(self.matrix, self.inputs, self.outputs)

    @cached_property
    def total(self) -> float:
        """Squared error of a weight of zeros."""
        return float(self.spectrum.values.double().square().sum()) * self.scale / max(self.tokens, 1)

    def error(self, net: Network) -> float:
        """Squared error of a network."""
        made = to_dense(net.detach()).reshape(-1)
        rows = self.weight.shape[0]
        dense = made.reshape(prod(net.row_modes), -1)[:rows, : self.weight[0].numel()]
        return self.spectrum.error(dense.T if self.table else dense) ** 2 * self.scale / max(self.tokens, 1)

    def scaled(self, factor: float) -> "Problem":
        """The same with squared errors times a factor."""
        return replace(self, scale=self.scale * factor)

    @property
    def whole_price(self) -> int:
        """Of the dense weight."""
        return self.weight.numel() * self.price if self.dense_price is None else self.dense_price


class Candidate(NamedTuple):
    """One network that a weight can become; it is made when it is chosen.

    `make` takes the problem, whose factors may have changed since (`compress(sequential=True)`).
    """

    format: str
    ranks: tuple[int, ...]
    price: int
    error: float
    make: Callable[[Problem], Network] | None


def dense(problem: Problem) -> Candidate:
    """The weight as it is."""
    return Candidate("dense", (), problem.whole_price, 0.0, None)


def low_rank(problem: Problem) -> Iterator[Candidate]:
    """Ranks below break-even (all, or 512 evenly spaced), from one spectrum; the errors are exact.

    Example:
        >>> held = list(low_rank(Problem(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])), tokens=1)))
        >>> [(c.ranks[0], c.price, round(c.error, 2)) for c in held]
        [(1, 8, 5.25)]
    """
    m, n = problem.matrix.shape
    squares = problem.spectrum.values.double().square()
    tails = squares.flip(0).cumsum(0).flip(0) * (problem.scale / max(problem.tokens, 1))
    even = min(len(squares), (problem.whole_price - 1) // max(1, (m + n) * problem.price))
    step = problem.multiple * max(1, -(-even // (OPTIONS * problem.multiple)))
    for rank in range(problem.multiple, even + 1, step):
        error = float(tails[rank]) if rank < len(tails) else 0.0
        yield Candidate("low_rank", (rank,), rank * (m + n) * problem.price, error, partial(_low_rank, rank=rank))


def _low_rank(problem: Problem, rank: int) -> LowRank:
    net = problem.spectrum.network(rank)
    return transpose(net) if problem.table else net  # type: ignore[return-value]


def sampled(format: str, recipe: Callable[..., Any], problem: Problem) -> Iterator[Candidate]:
    """A recipe at a few tolerances, its errors measured: for formats whose ranks interact."""
    seen: set[tuple[int, ...]] = set()
    for tol in TOLERANCES:
        net = recipe(problem.weight.detach(), _known(problem), tol=tol)
        price = numel(net) * problem.price
        if price >= problem.whole_price:
            return
        if net.ranks not in seen:
            seen.add(net.ranks)
            make = partial(_again, recipe=recipe, tol=tol, made=(problem, net))
            yield Candidate(format, net.ranks, price, problem.error(net), make)


def _again(problem: Problem, recipe: Callable[..., Any], tol: float, made: tuple[Problem, Network]) -> Network:
    """The network that was priced; for other factors than then one of the same ranks."""
    if problem is made[0]:
        return made[1]
    net = made[1]
    rank = net.ranks if len(net.ranks) > 1 else net.ranks[0]
    again: Network = recipe(problem.weight.detach(), _known(problem), rank=rank)
    return again


def _known(problem: Problem) -> Tensor:
    """Factor of the inputs; the identity where there is none."""
    if problem.inputs is not None:
        return problem.inputs if problem.inputs.ndim == 2 else torch.diag(problem.inputs)
    n = problem.matrix.shape[1]
    return torch.eye(n, device=problem.weight.device, dtype=accumulate_dtype(problem.weight.dtype))


def tucker(problem: Problem) -> Iterator[Candidate]:
    """Tucker-2 of a kernel."""
    if problem.weight.ndim > 2 and not problem.table:
        yield from sampled("tucker", weighted_tucker2, problem)


def ttm(problem: Problem) -> Iterator[Candidate]:
    """TT-matrix of a matrix or kernel."""
    if not problem.table:
        yield from sampled("ttm", weighted_ttm, problem)


def kronecker(problem: Problem) -> Iterator[Candidate]:
    """Sum of Kronecker products of a matrix or kernel."""
    if not problem.table:
        yield from sampled("kronecker", weighted_kronecker, problem)


FAMILIES: dict[str, Callable[[Problem], Iterator[Candidate]]] = {
    "low_rank": low_rank,
    "tucker": tucker,
    "ttm": ttm,
    "kronecker": kronecker,
}
"""Formats by their short name; another one is one more row."""


def candidates(problem: Problem, formats: Sequence[str]) -> list[Candidate]:
    """Everything that a weight can become, itself first; a format that is named twice counts once.

    Example:
        >>> [c.format for c in candidates(Problem(torch.randn(4, 4)), ("low_rank",))]
        ['dense', 'low_rank']
    """
    return [dense(problem), *(made for name in dict.fromkeys(formats) for made in FAMILIES[name](problem))]


def check_formats(name: str, formats: Sequence[str] | str) -> tuple[str, ...]:
    """Refuse a name that is no family."""
    given = (formats,) if isinstance(formats, str) else tuple(formats)
    unknown = [one for one in given if one not in FAMILIES]
    if unknown or not given:
        raise ValueError(f"{name}: formats must be some of {', '.join(FAMILIES)}, got {unknown or 'none'}")
    return given


def effective_rank(problem: Problem) -> float:
    """Exp of the entropy of the weighted singular values divided by their sum.

    Example:
        >>> round(effective_rank(Problem(torch.eye(4))), 6)
        4.0
    """
    values = problem.spectrum.values.double()
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.exp(torch.special.entr(shares).sum()))
