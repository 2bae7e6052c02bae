"""The gauge in which one step size suits all cores."""

from functools import singledispatch

import torch

from decompositions.formats.low_rank import LowRank
from decompositions.formats.network import Network
from decompositions.linalg import accumulate_dtype, safe_svd


@singledispatch
def balanced(net: Network) -> tuple[Network, tuple[int, ...]]:
    """The same tensor with its size spread over the cores, and the numbers of cores that are identities then.

    First-order methods with one step size (AdamW) move every core alike; after a decomposition one core holds all of
    the tensor's size and the others are isometries. A format without such a gauge comes back as it is.

    Returns:
        (network, cores that need not be trained).

    Example:
        >>> from decompositions import svd, to_dense
        >>> x = torch.randn(6, 5, dtype=torch.float64)
        >>> net, still = balanced(svd(x, rank=3))
        >>> still, torch.allclose(to_dense(net), to_dense(svd(x, rank=3)))
        ((1,), True)
        >>> torch.allclose(net.cores[0].T @ net.cores[0], net.cores[2].T @ net.cores[2])
        True
    """
    return net, ()


@balanced.register
def _(net: LowRank) -> tuple[LowRank, tuple[int, ...]]:
    """`U s^(1/2), I, V s^(1/2)` with the SVD of the whole matrix: `U^H U = V^H V = s`."""
    u, left = torch.linalg.qr(net.U.to(accumulate_dtype(net.dtype)))
    v, right = torch.linalg.qr(net.V.to(u.dtype))
    a, s, bh = safe_svd(left @ net.S.to(u.dtype) @ right.mT)
    root = s.sqrt().to(u.dtype)
    eye = torch.eye(len(s), dtype=net.dtype, device=s.device)
    return LowRank((u @ a * root).to(net.dtype), eye, (v @ bh.mT * root).to(net.dtype)), (1,)
