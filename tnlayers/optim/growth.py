"""More directions for a rounded tree: orthonormal ones with singular value zero, on which a gradient can act."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from decompositions import Network
from decompositions.formats.network import tree_edges
from decompositions.geometry.blocks import flatten, normal_basis, unflatten
from decompositions.lockstep import Job

N = TypeVar("N", bound=Network)


def widening(net: N, sizes: Mapping[str, int], root: int, generator: torch.Generator) -> Job[N]:
    """The same tensor with larger bonds: random orthonormal directions beside the old ones, zeros where they are read.

    A job: many networks are widened in lockstep.

    Args:
        net: a tree whose cores but the root are isometries toward it.
        sizes: bond -> size wanted; smaller than the present one changes nothing, larger than possible gives what is.
        root: the center of the tree.
        generator: on the CPU, of the new directions.

    Example:
        >>> from decompositions import LowRank, orthogonalize, to_dense
        >>> from decompositions.lockstep import alone
        >>> net = orthogonalize(LowRank.random(row_modes=(6,), col_modes=(5,), rank=2), 1)
        >>> job = widening(net, {bond: 3 for bond in net.bonds}, 1, torch.Generator().manual_seed(0))
        >>> wide = alone(job)
        >>> wide.ranks, bool(torch.allclose(to_dense(wide), to_dense(net), atol=1e-6))
        ((3, 3), True)
    """
    cores: list[Tensor] = list(net.cores)
    for edge in reversed(tree_edges(net.legs, net.rows, net.cols, root)):
        core, axis = cores[edge.child], net.legs[edge.child].index(edge.bond)
        more = sizes.get(edge.bond, 0) - core.shape[axis]
        basis = flatten(core, axis)
        more = min(more, basis.shape[0] - basis.shape[1])
        if more <= 0:
            continue
        fresh = torch.randn(basis.shape[0], more, generator=generator, dtype=torch.float64)
        fresh = fresh.to(device=basis.device, dtype=basis.dtype)
        # normal to the basis twice: what is left of a random vector where little room remains is not, after once
        for _ in range(2):
            fresh = fresh - basis @ (basis.mH @ fresh)
            fresh = fresh / torch.linalg.vector_norm(fresh, dim=0).clamp_min(torch.finfo(basis.dtype).tiny)
        added = yield from normal_basis(basis, fresh)
        wide = torch.cat([basis, added], 1)
        shape = list(core.shape)
        shape[axis] = wide.shape[1]
        cores[edge.child] = unflatten(wide, shape, axis)
        other = net.legs[edge.parent].index(edge.bond)
        parent = list(cores[edge.parent].shape)
        parent[other] = more
        cores[edge.parent] = torch.cat([cores[edge.parent], cores[edge.parent].new_zeros(parent)], other)
    return net._unchecked(cores, net.legs, net.rows, net.cols)
