"""Networks that are chains, as cores (left, mode, right) with boundary ranks 1: what walks along a train needs."""

from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from decompositions.formats.network import Network


@dataclass(frozen=True)
class Chain:
    """Cores (r, n, s) in chain order; the mode of a core is all its outside legs together, of size 1 if it has none.

    Args:
        cores: in double precision, without gradients.
        axes: the dense axes of every core, in the order in which its mode runs through them.
        shape: of the dense tensor.
    """

    cores: list[Tensor]
    axes: list[tuple[int, ...]]
    shape: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """Mode of every core."""
        return [core.shape[1] for core in self.cores]

    def index(self, digits: Tensor) -> Tensor:
        """Dense multi-indices (B, d) of mode indices (B, number of cores)."""
        index = digits.new_zeros(len(digits), len(self.shape))
        for k, axes in enumerate(self.axes):
            rest = digits[:, k]
            for axis in reversed(axes):
                index[:, axis] = rest % self.shape[axis]
                rest = rest // self.shape[axis]
        return index

    def turned(self) -> "Chain":
        """The same chain read from its other end."""
        return Chain([core.permute(2, 1, 0) for core in reversed(self.cores)], self.axes[::-1], self.shape)

    def gauged(self) -> "Chain":
        """All cores but the first with orthonormal rows, and a tensor of norm 1 (or 0).

        Norms of what is ahead then are 1: the norm of a product of the first k cores at given indices is that of the
        part of the tensor with these indices.
        """
        cores = list(self.cores)
        for k in range(len(cores) - 1, 0, -1):
            r, n, s = cores[k].shape
            q, upper = torch.linalg.qr(cores[k].reshape(r, n * s).mH)
            cores[k] = q.mH.reshape(-1, n, s)
            cores[k - 1] = _scaled(torch.einsum("rns,st->rnt", cores[k - 1], upper.mH))
        cores[0] = _scaled(cores[0])
        return Chain(cores, self.axes, self.shape)


def chain_of(name: str, net: Network) -> Chain:
    """The network as a chain, each core scaled by itself (the factor is lost: it changes no place and no ratio).

    Raises:
        ValueError: not a tree, or a core with more than two neighbours.
    """
    outside = set(net.outside)
    bonds = [[label for label in leg if label not in outside] for leg in net.legs]
    if not net.is_tree or any(len(own) > 2 for own in bonds):
        raise ValueError(
            f"{name}: expected a chain of cores (a TT, a TTMatrix, or a tree in which no core has more than two "
            f"neighbours), got {type(net).__name__} {net.equation}; cross_approx.tt_cross or apply_function makes a "
            "train of it"
        )
    k = next(k for k, own in enumerate(bonds) if len(own) < 2)
    double = torch.promote_types(net.dtype, torch.float64)
    cores, axes, left = [], [], None
    while True:
        leg, core = net.legs[k], net.cores[k].detach().to(double)
        right = next((bond for bond in bonds[k] if bond != left), None)
        own = [label for label in leg if label in outside]
        ends = [[leg.index(bond)] if bond is not None else [] for bond in (left, right)]
        core = core.permute(*ends[0], *(leg.index(label) for label in own), *ends[1])
        r = core.shape[0] if left is not None else 1
        s = core.shape[-1] if right is not None else 1
        size = prod(net.sizes[label] for label in own)
        cores.append(_scaled(core.reshape(r, size, s)) * sqrt(size * s))  # entries of a random chain stay near 1
        axes.append(tuple(net.outside.index(label) for label in own))
        if right is None:
            break
        left, k = right, next(j for j, own in enumerate(bonds) if j != k and right in own)
    if not all(bool(core.isfinite().all()) for core in cores):
        raise ValueError(f"{name}: cores must be finite, got NaN or infinity in {net!r}")
    return Chain(cores, axes, net.shape)


def _scaled(core: Tensor) -> Tensor:
    """The core over its norm, in two steps: neither squares nor the norm leave the range."""
    largest = core.abs().max()
    core = core / torch.where(largest > 0, largest, 1.0)
    size = torch.linalg.vector_norm(core)
    return core / torch.where(size > 0, size, 1.0)
