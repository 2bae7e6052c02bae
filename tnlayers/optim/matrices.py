"""Networks that are one matrix between two bases: how labels show them, their singular form, their condition."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.network import tree_edges
from decompositions.geometry import Gauges
from decompositions.geometry.blocks import along, flatten, unflatten
from decompositions.linalg import positive_qr, safe_svd
from decompositions.lockstep import Job
from tnlayers.layer import NetworkLayer


class Middle(NamedTuple):
    """Where the matrix of a network is: the core without outside indices; the cores at its first and second axis."""

    left: int
    center: int
    right: int


def middle_of(net: Network) -> Middle | None:
    """The cores of `W = U S V^T`, read off the labels: two bonds that meet in a core without outside indices.

    Example:
        >>> from decompositions import TT, LowRank
        >>> middle_of(LowRank.random(row_modes=(6,), col_modes=(5,), rank=2))
        Middle(left=0, center=1, right=2)
        >>> middle_of(TT.random(row_modes=(6, 2, 5), rank=2)) is None
        True
    """
    if not net.is_tree or len(net.bonds) != 2:
        return None
    for k, leg in enumerate(net.legs):
        if set(leg) == set(net.bonds):
            left, right = (next(j for j, own in enumerate(net.legs) if j != k and bond in own) for bond in leg)
            return Middle(left, k, right)
    return None


def require_middle(name: str, layer: str, net: Network) -> Middle:
    """`middle_of`, or a refusal that names the layer.

    Raises:
        ValueError: a network of another structure.

    Example:
        >>> from decompositions import LowRank
        >>> require_middle("doc", "fc", LowRank.random(row_modes=(6,), col_modes=(5,), rank=2)).center
        1
    """
    found = middle_of(net)
    if found is None:
        raise ValueError(
            f"{name}: the network of {layer or 'the layer'} must be one matrix between two bases, as condition numbers "
            f"of several unfoldings cannot be set at once; expected two bonds that meet in a core without outside "
            f"indices, got {type(net).__name__} ({net.equation}); use LowRank there, or freeze its cores"
        )
    return found


def trained(model: nn.Module) -> list[tuple[str, NetworkLayer]]:
    """Layers with trainable cores, of layers that share a network the first.

    Example:
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> model = nn.Sequential(nn.ReLU(), tnlayers.Linear(6, 4, network=tnlayers.random_network(LowRank, rank=2)))
        >>> [name for name, _ in trained(model)]
        ['1']
    """
    found: dict[int, tuple[str, NetworkLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, NetworkLayer) and all(core.requires_grad for core in module.cores):
            found.setdefault(id(module.cores[0]), (name, module))
    return list(found.values())


def factors(net: Network, at: Middle) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r, s), V (n, s) of a network.

    Example:
        >>> from decompositions import LowRank
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2)
        >>> [tuple(factor.shape) for factor in factors(net, middle_of(net))]
        [(6, 2), (2, 2), (5, 2)]
    """
    first, second = net.legs[at.center]
    u = flatten(net.cores[at.left], net.legs[at.left].index(first))
    v = flatten(net.cores[at.right], net.legs[at.right].index(second))
    return u, net.cores[at.center], v


def singular_form(u: Tensor, s: Tensor, v: Tensor) -> Job[tuple[Tensor, Tensor, Tensor]]:
    """`U S V^T = P diag(sigma) Q^T` with orthonormal P, Q and descending sigma; as many as the factors allow.

    A job: many networks are brought there in lockstep.

    Example:
        >>> from decompositions.lockstep import alone
        >>> p, sigma, q = alone(singular_form(torch.ones(4, 2), torch.eye(2), torch.ones(3, 2)))
        >>> p.shape, sigma.shape, bool(torch.allclose(p * sigma @ q.T, torch.full((4, 3), 2.0)))
        (torch.Size([4, 2]), torch.Size([2]), True)
    """
    left, a = yield positive_qr, u
    right, b = yield positive_qr, v
    p, sigma, qh = yield safe_svd, a @ s @ b.mT
    return left @ p, sigma, right @ qh.mT


def clamp_condition(sigma: Tensor, condition: int | float) -> Tensor:
    """Clamp singular values into [mean - delta, mean + delta], `delta = mean (c - 1) / (c + 1)`.

    Guarantee: the largest is at most c times the smallest, rounding included; c = 1 makes them equal.

    Args:
        sigma: non-negative; a mean of zero gives zeros.
        condition: c >= 1.

    Example:
        >>> [round(value, 6) for value in clamp_condition(torch.tensor([3.0, 2.0, 1.0]), 1.5).tolist()]
        [2.4, 2.0, 1.6]
    """
    low = (2 * sigma.double().mean() / (condition + 1)).to(sigma.dtype)
    # a unit of rounding inwards, so that the quotient of the rounded ends is at most c
    high = torch.nextafter((low.double() * condition).to(sigma.dtype), torch.zeros_like(low))
    return sigma.clamp(low, torch.maximum(low, high))


def singular_gauges(like: Network, at: Middle, u: Tensor, sigma: Tensor, v: Tensor) -> Gauges[Any]:
    """Gauges of `U diag(sigma) V^T` on the cores of `like`: nothing is left to factor.

    Example:
        >>> from decompositions import LowRank
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2)
        >>> g = singular_gauges(net, middle_of(net), torch.eye(6, 2), torch.ones(2), torch.eye(5, 2))
        >>> g.net.S.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    legs, s = like.legs, torch.diag(sigma)
    cores = list(like.cores)
    center: list[Tensor] = list(cores)
    cores[at.center] = center[at.center] = s
    for k, basis, bond in zip((at.left, at.right), (u, v), legs[at.center], strict=True):
        axis = legs[k].index(bond)
        shape = list(cores[k].shape)
        shape[axis] = len(sigma)
        assert prod(shape) == basis.numel()
        cores[k] = unflatten(basis, shape, axis).contiguous()
        center[k] = along(cores[k], axis, s)
    one = torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
    down = tuple(None if k == at.center else one for k in range(len(cores)))
    net = like._unchecked(tuple(cores), legs, like.rows, like.cols)
    edges = tree_edges(legs, like.rows, like.cols, at.center)
    return Gauges(net, at.center, edges, tuple(cores), down, tuple(center), dict.fromkeys(like.bonds, s))
