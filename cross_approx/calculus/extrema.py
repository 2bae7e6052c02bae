"""Where a train is largest and smallest."""

from typing import NamedTuple

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from cross_approx.calculus.chains import Chain, chain_of
from cross_approx.calculus.entries import Corner, values_at
from cross_approx.maxvol import dominant_rows
from decompositions.formats.modes import as_integer
from decompositions.formats.network import Network

PASSES = 100
"""Passes of the local search at most."""

STARTS = 32
"""Candidates that the local search starts from."""


class Extremum(NamedTuple):
    """A place and the value there.

    Example:
        >>> import torch
        >>> from cross_approx import argmax
        >>> from decompositions import TT
        >>> argmax(TT([torch.tensor([1.0, 3.0, -4.0])]))
        Extremum(indices=tensor([1]), value=tensor(3.))
    """

    indices: Int[Tensor, "d"]
    value: Inexact[Tensor, ""]


def argmax(network: Network, *, beam: int = 100, magnitude: bool = False) -> Extremum:
    """The largest entry of a train, or the one of largest magnitude, by beam search, maxvol and local search.

    Finding it is NP-hard in general. The value returned is an entry, at the index returned, and no change of one index
    (of one core, where a core carries several) improves it, up to rounding. It is the largest if all ranks are 1, or
    if `beam >= n_1 ... n_d / max(n_1, n_d)`, as then nothing is dropped. A larger beam is not always better: it orders
    what it keeps by norms of parts of the tensor.
    Candidates: both directions of a beam search that keeps the `beam` beginnings with the largest norm of the part of
    the tensor that begins so; the same on `W - min` where the sign counts, whose largest magnitude is at the maximum;
    crosses of dominant volume of all unfoldings.
    Cost: O(d n r^2 beam) operations, of which a few such passes are made.

    Args:
        network: a chain of cores (TT, TTMatrix, ...), as QTT too.
        beam: beginnings kept.
        magnitude: largest |value| instead; the only choice for complex networks.

    Returns:
        Extremum: indices (d,), value () in the dtype of the network, differentiable in the cores with the index fixed.

    Raises:
        ValueError: not a chain, beam below 1, cores that are not finite.
        TypeError: a complex network without `magnitude`.

    References:
        A. Chertkov, G. Ryzhakov, G. Novikov, I. Oseledets, Optimization of functions given in the tensor train format,
        2022, arXiv 2209.14808.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> x = torch.linspace(-1, 1, 21)
        >>> net = TT([torch.stack([-(x**2), torch.ones(21)], 1), torch.stack([torch.ones(21), -((x - 0.5) ** 2)])])
        >>> argmax(net).indices.tolist()
        [10, 15]
    """
    return _extremum("argmax", network, beam, magnitude, 1.0)


def argmin(network: Network, *, beam: int = 100) -> Extremum:
    """The smallest entry of a train: `argmax` of its negative, with the same guarantees and cost.

    Args:
        network: a real chain of cores.
        beam: beginnings kept.

    Returns:
        Extremum: indices (d,), value ().

    Raises:
        ValueError: not a chain, beam below 1, cores that are not finite.
        TypeError: a complex network.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> argmin(TT([torch.tensor([1.0, 3.0, -4.0])])).indices.tolist()
        [2]
    """
    return _extremum("argmin", network, beam, False, -1.0)


def _extremum(name: str, network: Network, beam: int, magnitude: bool, sign: float) -> Extremum:
    width = as_integer(beam)
    if width is None or width < 1:
        raise ValueError(f"{name}: beam must be an int >= 1, got {beam!r}")
    if network.dtype.is_complex and not magnitude:
        raise TypeError(f"{name}: complex values have no order, got {network.dtype}; argmax(..., magnitude=True)")
    chain = chain_of(name, network)
    search = _Search(chain, sign, magnitude)
    found = _beams(chain, width) + [_crosses(chain)]
    if not magnitude:
        lowest = search.best(torch.cat(found), -1.0)
        found += _beams(_shifted(chain, lowest), width)
    digits = search.improved(torch.cat(found).unique(dim=0))
    index = chain.index(digits[None]).to(network.device)
    value = values_at(network, [[Corner(column, None)] for column in index.unbind(1)], 1)
    return Extremum(index[0], value[0])


def _beams(chain: Chain, beam: int) -> list[Tensor]:
    """The ends of a beam search in either direction, (beam, number of cores) mode indices each."""
    return [_beam(chain.gauged(), beam), _beam(chain.turned().gauged(), beam).flip(1)]


def _beam(chain: Chain, beam: int) -> Tensor:
    """Beginnings whose part of the tensor has the largest norm; on bonds of rank 1 also the extreme signed ones.

    Where the rank is 1, the extreme values of the whole tensor begin with the largest or the smallest number.
    """
    rows = torch.ones(1, 1, dtype=chain.cores[0].dtype, device=chain.cores[0].device)
    digits = torch.zeros(1, 0, dtype=torch.long, device=rows.device)
    for core in chain.cores:
        n, s = core.shape[1:]
        candidates = torch.einsum("kr,rns->kns", rows, core).reshape(-1, s)
        kept = torch.linalg.vector_norm(candidates, dim=1).topk(min(beam, len(candidates))).indices
        if s == 1 and not candidates.is_complex():
            extreme = torch.stack([candidates[:, 0].argmax(), candidates[:, 0].argmin()])
            kept = torch.cat([extreme, kept]).unique()
        rows = candidates[kept]
        digits = torch.cat([digits[kept // n], (kept % n)[:, None]], 1)
        rows = rows / rows.abs().max().clamp(min=torch.finfo(rows.real.dtype).tiny)
    return digits


def _shifted(chain: Chain, digits: Tensor) -> Chain:
    """The tensor minus the constant of its value at one place."""
    ends = torch.ones(1, dtype=chain.cores[0].dtype, device=chain.cores[0].device)
    for core, at in zip(chain.cores, digits.tolist(), strict=True):
        ends = ends @ core[:, at]
    cores = []
    last = len(chain.cores) - 1
    for k, core in enumerate(chain.cores):
        r, n, s = core.shape
        constant = torch.ones(1, n, 1, dtype=core.dtype, device=core.device) * (-ends if k == 0 else 1.0)
        if last == 0:
            cores.append(core + constant)
        elif k == 0:
            cores.append(torch.cat([core, constant], 2))
        elif k == last:
            cores.append(torch.cat([core, constant], 0))
        else:
            both = core.new_zeros(r + 1, n, s + 1)
            both[:r, :, :s], both[r:, :, s:] = core, constant
            cores.append(both)
    return Chain(cores, chain.axes, chain.shape)


def _crosses(chain: Chain) -> Tensor:
    """The largest entry of the cross of dominant rows and columns at every core."""
    lefts, rights = _dominant(chain), [part.flip(1) for part in reversed(_dominant(chain.turned()))]
    found = []
    for k, core in enumerate(chain.cores):
        left, right = lefts[k], rights[k + 1]
        values = torch.einsum("ar,rns,bs->anb", _rows(chain, left), core, _rows(chain.turned(), right.flip(1)))
        n, b = values.shape[1:]
        at = values.abs().flatten().topk(min(4, values.numel())).indices
        mode = (at // b % n)[:, None]
        found.append(torch.cat([left[at // (b * n)], mode, right[at % b]], 1))
    return torch.cat(found)


def _dominant(chain: Chain) -> list[Tensor]:
    """Nested sets of beginnings: of every bond the rows of dominant volume among those of the bond before."""
    sets = [torch.zeros(1, 0, dtype=torch.long, device=chain.cores[0].device)]
    rows = torch.ones(1, 1, dtype=chain.cores[0].dtype, device=chain.cores[0].device)
    for core in chain.cores:
        n, s = core.shape[1:]
        candidates = torch.einsum("kr,rns->kns", rows, core).reshape(-1, s)
        if len(candidates) > s and bool(candidates.abs().max() > 0):
            chosen = dominant_rows(candidates, 0.1)[0]
        else:
            chosen = torch.arange(min(s, len(candidates)), device=candidates.device)
        rows = candidates[chosen]
        rows = rows / rows.abs().max().clamp(min=torch.finfo(rows.real.dtype).tiny)
        sets.append(torch.cat([sets[-1][chosen // n], (chosen % n)[:, None]], 1))
    return sets


def _rows(chain: Chain, digits: Tensor) -> Tensor:
    """Products of the first cores at given beginnings, (B, r)."""
    rows = torch.ones(len(digits), 1, dtype=chain.cores[0].dtype, device=chain.cores[0].device)
    for core, column in zip(chain.cores, digits.unbind(1), strict=False):
        rows = torch.einsum("br,rbs->bs", rows, core[:, column])
    return rows


class _Search:
    """What is looked for, and the local search for it."""

    def __init__(self, chain: Chain, sign: float, magnitude: bool) -> None:
        self.chain, self.sign, self.magnitude = chain, sign, magnitude

    def score(self, values: Tensor) -> Tensor:
        """Larger is better."""
        return values.abs() if self.magnitude else self.sign * values

    def best(self, digits: Tensor, direction: float = 1.0) -> Tensor:
        """The place of the best value among these, or of the worst."""
        return digits[(direction * self.score(_rows(self.chain, digits)[:, 0])).argmax()]

    def improved(self, digits: Tensor) -> Tensor:
        """From the best of these, one index changed after another, as long as the value grows; the best of all."""
        score = self.score(_rows(self.chain, digits)[:, 0])
        digits = digits[score.topk(min(STARTS, len(score))).indices]
        turned = self.chain.turned()
        for _ in range(PASSES):
            before = digits
            behind = [_rows(turned, digits.flip(1)[:, :k]) for k in range(digits.shape[1])][::-1]
            front = torch.ones_like(behind[-1][:, :1])
            columns = []
            for k, core in enumerate(self.chain.cores):
                values = self.score(torch.einsum("br,rns,bs->bn", front, core, behind[k]))
                now = digits[:, k]
                present = values.gather(1, now[:, None])[:, 0]
                best, at = values.max(1)
                now = torch.where(best > present + 1e-14 * best.abs(), at, now)
                columns.append(now)
                front = torch.einsum("br,rbs->bs", front, core[:, now])
            digits = torch.stack(columns, 1)
            if torch.equal(digits, before):
                break
        return self.best(digits)
