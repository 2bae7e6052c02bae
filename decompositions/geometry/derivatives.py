"""Riemannian gradients and Hessians of functions of a network, by automatic differentiation."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from decompositions.formats.network import Network
from decompositions.geometry.blocks import flatten, unflatten
from decompositions.geometry.gauges import Gauges, gauges, gauges_of
from decompositions.geometry.tangent import Tangent, center_gradients, gauge_fix, project
from decompositions.linalg import accumulate_dtype, check_finite, full_precision

N = TypeVar("N", bound=Network)
Loss = Callable[[Any], Tensor]
"""A real function of a network: anything that autograd can differentiate with respect to the cores."""


@full_precision
def riemannian_gradient(point: N | Gauges[N], euclidean: Tensor | Network | Loss) -> Tangent[N]:
    """Riemannian gradient: the projection of the Euclidean one, `P(G)`.

    Args:
        point: a tree, or its `gauges`.
        euclidean: the gradient G as a dense tensor or a network, or the loss itself, a function Network -> real scalar
            that autograd can differentiate: then nothing dense is formed that the loss does not form, and the network
            it is called with has doubled ranks (the point, with zero deltas as probes).

    Returns:
        The tangent vector xi with `d/dt f(R(t eta)) = Re <xi, eta>` at t = 0.

    Raises:
        TypeError: a gradient that is neither a tensor, nor a network, nor a function.
        ValueError: a loss that does not return one real number, or that does not depend on the network; a loss under
            `torch.inference_mode()`; a complex gradient at a real point.

    Example:
        >>> import torch
        >>> from decompositions import TT, inner
        >>> from decompositions.geometry import riemannian_gradient
        >>> net = TT.random(row_modes=(3, 4, 3), rank=2, dtype=torch.float64)
        >>> g = riemannian_gradient(net, lambda w: inner(w, w) / 2)  # the gradient is W itself, a tangent vector
        >>> bool(torch.isclose(g.norm(), inner(net, net).sqrt()))
        True
    """
    if isinstance(euclidean, Tensor | Network):
        return project(gauges_of(point), euclidean)
    if not callable(euclidean):
        raise TypeError(
            "riemannian_gradient: expected a dense gradient, a network or a loss (a function Network -> real number), "
            f"got {type(euclidean).__name__}; "
            + ("project(point, xi) takes a tangent vector" if isinstance(euclidean, Tangent) else "see torch.as_tensor")
        )
    at = gauges_of(point)
    return gauge_fix(at, _probe_gradients("riemannian_gradient", at, euclidean, create_graph=False))


def _check_recorded(name: str, at: Gauges[Any]) -> None:
    if torch.is_inference_mode_enabled() or any(core.is_inference() for core in at.center):
        raise ValueError(
            f"{name}: a loss is differentiated by autograd, which torch.inference_mode() forbids; "
            "leave inference_mode, and make the network outside of it"
        )


def _probe_gradients(name: str, at: Gauges[N], loss: Loss, *, create_graph: bool) -> list[Tensor]:
    """`E_v` as the derivatives of the loss by zero deltas."""
    _check_recorded(name, at)
    probes = [torch.zeros_like(core).requires_grad_() for core in at.center]
    with torch.enable_grad():
        value = loss(Tangent(at, tuple(probes)).to_network(point=True))
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            shown = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: the loss must return one real number, got {shown}")
        if not value.requires_grad:
            raise ValueError(f"{name}: the loss must depend on the network it is given")
        return list(torch.autograd.grad(value.reshape(()), probes, create_graph=create_graph, materialize_grads=True))


def check_full_rank(name: str, at: Gauges[Any]) -> None:
    """Refuse a point where the manifold of its ranks is not smooth."""
    for bond, link in at.links.items():
        if link.shape[0] != link.shape[1] or not bool(torch.linalg.cond(link) < 1 / torch.finfo(link.dtype).eps):
            raise ValueError(
                f"{name}: the point must have full rank at every bond, got a singular link at {bond!r} of {at.net!r}; "
                "round it first"
            )


@full_precision
def hessian_vector_product(point: N | Gauges[N], loss: Loss, xi: Tangent[N]) -> Tangent[N]:
    """Riemannian Hessian of a loss times a tangent vector: `P(D grad f(W)[xi])`, curvature of the manifold included.

    `<H xi, xi> = d^2/dt^2 f(R(t xi))` at t = 0 for the retraction of this module. By automatic differentiation of the
    projected gradient along a curve with velocity xi; the curvature term contains the inverses of the links S_e, so
    its accuracy falls with the smallest singular value, and at a point of deficient rank there is no Hessian.

    Args:
        point: a tree of full ranks, or its `gauges`, which must be those of xi.
        loss: function Network -> real scalar, twice differentiable.
        xi: tangent vector at the point.

    Raises:
        TypeError: a loss that is no function, an xi that is no tangent vector; half precision, which has no use here.
        ValueError: xi at another point; a bond whose link is singular; NaN or infinity.

    References:
        P.-A. Absil, R. Mahony, J. Trumpf, An extrinsic look at the Riemannian Hessian, GSI 2013.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, inner
        >>> from decompositions.geometry import gauges, hessian_vector_product, project
        >>> at = gauges(LowRank.random(row_modes=(6,), col_modes=(5,), rank=2, dtype=torch.float64))
        >>> xi = project(at, torch.randn(6, 5, dtype=torch.float64))
        >>> h = hessian_vector_product(at, lambda w: inner(w, w) / 2, xi)
        >>> bool(torch.allclose(h.to_dense(), xi.to_dense()))  # the gradient W is tangent: no curvature term
        True
    """
    if not callable(loss):
        raise TypeError(f"hessian_vector_product: loss must be a function of a network, got {type(loss).__name__}")
    if not isinstance(xi, Tangent):
        raise TypeError(f"hessian_vector_product: xi must be a Tangent, got {type(xi).__name__}; see project")
    at = gauges_of(point)
    if accumulate_dtype(at.net.dtype) != at.net.dtype:
        raise TypeError(
            f"hessian_vector_product: expected single or double precision, got {at.net.dtype}, whose rounding hides a "
            "curvature; use point.to(torch.float32)"
        )
    _check_recorded("hessian_vector_product", at)
    if xi.at is not at:
        raise ValueError("hessian_vector_product: xi must belong to the point, give gauges(net) once and to both")
    for core in (*at.center, *xi.deltas):
        check_finite("hessian_vector_product", core)
    check_full_rank("hessian_vector_product", at)
    # velocity of the cores in the root gauge: delta_v S_e^-1 along the bond to the parent
    velocity = list(xi.deltas)
    for edge in at.edges:
        axis = at.axis(edge.child, edge.bond)
        matrix = torch.linalg.solve(at.links[edge.bond], flatten(velocity[edge.child], axis), left=False)
        velocity[edge.child] = unflatten(matrix, velocity[edge.child].shape, axis)
    with torch.enable_grad():
        cores = [core.detach().requires_grad_() for core in at.net.cores]
        moving = gauges(at.net.replace(cores), at.root)
        gradient = gauge_fix(moving, _probe_gradients("hessian_vector_product", moving, loss, create_graph=True))
        here = center_gradients(at, gradient)  # coordinates at the fixed point of the gradient at the moving one
        # derivative of `here` along the velocity, by differentiating a backward pass (linear in `weights`) once more
        weights = [torch.zeros_like(value).requires_grad_() for value in here]
        pulled = _pull(here, cores, weights, create_graph=True)
        along_curve = _pull(pulled, weights, velocity)
    return gauge_fix(at, along_curve)


def _pull(
    values: Sequence[Tensor], by: Sequence[Tensor], weights: Sequence[Tensor], *, create_graph: bool = False
) -> Sequence[Tensor]:
    """Derivatives of `sum <weights, values>`; values that nothing moves (a linear loss on one core) have none."""
    moved = [k for k, value in enumerate(values) if value.requires_grad]
    if not moved:
        return [torch.zeros_like(value) for value in by]
    outputs, own = [values[k] for k in moved], [weights[k] for k in moved]
    return torch.autograd.grad(outputs, by, own, create_graph=create_graph, materialize_grads=True)
