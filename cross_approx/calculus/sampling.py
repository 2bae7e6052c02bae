"""Exact independent samples from the square of a train, or from a train that is non-negative."""

import warnings
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cross_approx.calculus.chains import Chain, chain_of
from decompositions.formats.modes import as_integer
from decompositions.formats.network import Network

ENTRIES = 1 << 21
"""Numbers that the weights of one chunk of samples may hold."""


class Samples(NamedTuple):
    """Samples and the logarithms of their probabilities.

    Example:
        >>> import torch
        >>> from cross_approx import sample
        >>> from decompositions import TT
        >>> sample(TT([torch.tensor([0.0, 2.0])]), 2)
        Samples(indices=tensor([[1],
                [1]]), log_prob=tensor([0., 0.], dtype=torch.float64))
    """

    indices: Int[Tensor, "B d"]
    log_prob: Float[Tensor, "B"]


def sample(
    network: Network,
    count: int,
    *,
    kind: Literal["squared", "nonnegative"] = "squared",
    negative: Literal["error", "clip"] = "error",
    generator: torch.Generator | None = None,
) -> Samples:
    """Independent samples of indices: `p(i) = |W(i)|^2 / ‖W‖^2`, or `p(i) = W(i) / sum W` of a non-negative network.

    Index by index from conditional probabilities, exact up to rounding: no chain to burn in, no rejection. Squared:
    with the cores ahead orthonormal, `p(i_1, ..., i_k)` is the squared norm of the product of the first k cores.
    Non-negative: it is that product times the sums of the cores ahead.
    Cost: O(d n r^3) once and O(d n r^2) a sample; memory in chunks of 16 MiB.

    Args:
        network: a chain of cores (TT, TTMatrix, ...), QTT too; complex ones for "squared" alone.
        count: number of samples B.
        kind: "squared" or "nonnegative".
        negative: what a negative probability does in a network that should have none. Those below rounding (1e-12 of
            the largest in float64, 1e-5 in float32, 3e-2 in half precision) count as zero. "error" refuses others;
            "clip" takes them for zero and warns of their mass: `log_prob` is then that of the clipped conditionals.
        generator: None is torch's global one.

    Returns:
        Samples: indices (B, d), log_prob (B,) in float64, that of the distribution drawn from. Without gradients: the
        log-probability of given samples is `2 log|gather(W, index)| - 2 log norm(W)`, or `log gather - log integrate`.

    Raises:
        ValueError: not a chain, a zero tensor, a negative count, negative probabilities.
        TypeError: a complex network that should be non-negative.

    References:
        A. Ferris, G. Vidal, Perfect sampling with unitary tensor networks, 2012, arXiv 1201.3974; S. Dolgov,
        K. Anaya-Izquierdo, C. Fox, R. Scheichl, Approximation and sampling of multivariate probability distributions in
        the tensor train decomposition, 2020, arXiv 1810.01212.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> indices, log_prob = sample(TT.random(row_modes=(4, 5, 6), rank=2), 1000)
        >>> indices.shape, bool((log_prob <= 0).all())
        (torch.Size([1000, 3]), True)
    """
    if kind not in ("squared", "nonnegative") or negative not in ("error", "clip"):
        raise ValueError(
            "sample: kind must be 'squared' or 'nonnegative' and negative 'error' or 'clip', "
            f"got {kind!r} and {negative!r}"
        )
    number = as_integer(count)
    if number is None or number < 0:
        raise ValueError(f"sample: count must be an int >= 0, got {count!r}")
    if kind == "nonnegative" and network.dtype.is_complex:
        raise TypeError(f"sample: a non-negative network is real, got {network.dtype}; kind='squared' takes it")
    chain = chain_of("sample", network)
    chain = chain.gauged() if kind == "squared" else _summed_ahead(chain)
    floor = {torch.float64: 1e-12, torch.float32: 1e-5}.get(network.dtype, 3e-2)
    draw = _Draw(chain, kind == "squared", floor, negative == "clip", generator)
    widest = max(n * s for _, n, s in (core.shape for core in chain.cores))
    step = max(1, ENTRIES // widest)
    parts = [draw.chunk(min(step, number - start)) for start in range(0, number, step)] or [draw.chunk(0)]
    if draw.clipped > 0:
        warnings.warn(
            f"sample: negative probabilities were taken for zero, on average {draw.clipped / number:.1e} of the mass "
            "along the way to a sample; log_prob is that of what was drawn from",
            stacklevel=2,
        )
    return Samples(chain.index(torch.cat([digits for digits, _ in parts])), torch.cat([logs for _, logs in parts]))


def _summed_ahead(chain: Chain) -> Chain:
    """Cores with the sums of all cores ahead multiplied in: (r, n, s) with a last column of marginal weights."""
    ahead = torch.ones(1, dtype=chain.cores[0].dtype, device=chain.cores[0].device)
    cores = []
    for core in reversed(chain.cores):
        marginal = torch.einsum("rns,s->rn", core, ahead)
        cores.append(torch.cat([core, marginal[:, :, None]], 2))
        ahead = marginal.sum(1)
        ahead = ahead / ahead.abs().max().clamp(min=torch.finfo(ahead.dtype).tiny)
    return Chain(cores[::-1], chain.axes, chain.shape)


class _Draw:
    """Draws chunks of samples, core after core."""

    def __init__(
        self, chain: Chain, squared: bool, floor: float, clip: bool, generator: torch.Generator | None
    ) -> None:
        self.chain, self.squared, self.floor, self.clip, self.generator = chain, squared, floor, clip, generator
        self.clipped = 0.0

    def chunk(self, count: int) -> tuple[Tensor, Tensor]:
        """Mode indices (count, number of cores) and log-probabilities (count,)."""
        first = self.chain.cores[0]
        rows = torch.ones(count, 1, dtype=first.dtype, device=first.device)
        logs = torch.zeros(count, dtype=torch.float64, device=first.device)
        digits = []
        which = torch.arange(count, device=first.device)
        for core in self.chain.cores:
            ahead = torch.einsum("br,rns->bns", rows, core)
            if self.squared:
                weights = ahead.abs().square().sum(2)
            else:
                weights = self._non_negative(ahead[:, :, -1])
                ahead = ahead[:, :, :-1]
            sums = weights.cumsum(1)
            total = sums[:, -1:]
            if not bool((total > 0).all()):
                raise ValueError(
                    "sample: the probabilities must have a positive sum, got 0 (or a negative sum): the tensor is zero"
                )
            device = self.generator.device if self.generator is not None else first.device
            uniform = torch.rand(count, 1, dtype=torch.float64, device=device, generator=self.generator)
            level = (uniform.to(first.device) * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
            at = (sums > level).int().argmax(1)  # a weight of zero never is the first above
            logs += (weights[which, at] / total[:, 0]).log()
            rows = ahead[which, at]
            rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(logs.dtype).tiny)
            digits.append(at)
        return torch.stack(digits, 1), logs

    def _non_negative(self, weights: Tensor) -> Tensor:
        """Weights without their negative part, which is refused or noted unless it is rounding."""
        below = weights < -self.floor * weights.abs().amax(1, keepdim=True)
        if bool(below.any()):
            mass = (-weights * below).sum(1) / weights.abs().sum(1)
            if not self.clip:
                raise ValueError(
                    "sample: a non-negative network has no negative marginals, got one of "
                    f"{float(mass.max()):.1e} of the mass beside it; negative='clip' takes them for zero"
                )
            self.clipped += float(mass.sum())
        return weights.clamp(min=0)
