"""A soft bound on condition numbers: RobustDLRT's penalty on the core matrix of every network."""

import torch
from torch import Tensor, nn

from decompositions.linalg import accumulate_dtype
from decompositions.lockstep import alone
from tnlayers.layer import NetworkLayer
from tnlayers.optim.matrices import factors, require_middle, singular_form, trained


def condition_penalty(model: nn.Module) -> Tensor:
    """`sum over networks of R(S) = ‖S^T S - (‖S‖^2 / r) I‖_F`, to be added to the loss: `loss + beta * penalty`.

    S is the core of `W = U S V^T` between orthonormal bases, so that R depends on the singular values of W alone
    (`R^2 = sum_i (sigma_i^2 - mean)^2`), whatever the cores: it serves layers trained by any optimizer, and the affine
    weight inside a window of `RankAdaptive` or `CondLR`, where r is the rank without the directions in reserve.

    Guarantees: `cond(S) <= exp(R / (sqrt(2) sigma_min^2))`; R >= 0, with equality where all singular values are equal;
    the gradient is finite everywhere, W = 0 and R = 0 (where it is a subgradient) included. The bases are constants of
    the derivative, which is exact to first order; there are no second derivatives.
    Cost: two QRs (m x r and n x r) and an SVD (r x r) a network; of doubled rank in a window.

    Args:
        model: its layers with trainable cores are found; layers that share a network count once.

    Returns:
        A scalar; beta of .05 to .2 is usual.

    Raises:
        ValueError: a layer that is not one matrix between two bases; no layer with trainable cores.

    References:
        S. Schotthoefer, H. L. Yang, S. Schnake, Dynamical low-rank compression of neural networks with robustness
        under adversarial attacks (RobustDLRT), NeurIPS 2025, arXiv 2505.08022.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> core = torch.diag(torch.tensor([1.0, 1.0, 1.0, 3.0]))
        >>> layer = tnlayers.Linear(4, 4, network=LowRank(torch.eye(4), core, torch.eye(4)))
        >>> round(tnlayers.condition_penalty(layer).item(), 4)  # of the squares 1, 1, 1, 9
        6.9282
    """
    found = [_penalty(name, layer) for name, layer in trained(model)]
    if not found:
        raise ValueError(
            "condition_penalty: the model must have a layer whose weight is one matrix between two bases with "
            "trainable cores, found none; tensorize the model to LowRank first"
        )
    return torch.stack([value.to(found[0]) for value in found]).sum()


def _penalty(name: str, layer: NetworkLayer) -> Tensor:
    net, window = layer._contracted, layer._window
    at = require_middle("condition_penalty", name, net)
    with torch.autocast(net.device.type, enabled=False):
        u, s, v = (factor.to(accumulate_dtype(net.dtype)) for factor in factors(net, at))
        with torch.no_grad():
            left, sigma, right = alone(singular_form(u, s, v))
            rank = len(sigma) if window is None else min(len(sigma), *window.ranks.values())
        # singular values move by u_i^T dW v_i: with the leading bases held, S is that to first order
        core = (left[:, :rank].mT @ u) @ s @ (v.mT @ right[:, :rank])
        mean = core.square().sum() / rank
        return torch.linalg.vector_norm(core.mT @ core - mean * torch.eye(rank, dtype=core.dtype, device=core.device))
