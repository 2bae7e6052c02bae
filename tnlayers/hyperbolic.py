"""Points of hyperbolic space: the Lorentz and the Poincaré model, at any curvature. Functions only.

`curvature` is a number c > 0 (or a tensor that broadcasts against the points without their last axis): the space has
sectional curvature -c. The Lorentz model is `-x_0^2 + |x|^2 = -1/c` with the time coordinate x_0 > 0 first, the
Poincaré model the ball `c |p|^2 < 1`. Papers that write `-x_0^2 + |x|^2 = -β` mean c = 1/β.

What rounding allows (G. Mishne, Z. Wan, Y. Wang, S. Yang, The numerical stability of hyperbolic representation
learning, arXiv 2211.00181): a point at distance ρ from the origin has Lorentz coordinates of size exp(√c ρ), and lies
exp(-√c ρ) from the boundary of the ball. So parametrize points by tangent vectors at the origin, or by the space part
of Lorentz coordinates (`lift` computes the time): both represent every point up to the range of the exponent, as long
as the square of x_0 = cosh(√c ρ) / √c is a number: √c ρ <= 40 in float32 for c >= .001 (36 for c = 1e-6) and <= 340 in
float64 (beyond, distances are NaN). A tangent vector at such a point has coordinates as large as the point's, so that
`lorentz_exp` and `lorentz_log` from it err by exp(√c ρ) eps, relatively. The ball ends at √c ρ of about 14 and 34,
where `poincare_project` puts what lies beyond.
"""

from collections.abc import Callable
from math import inf, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

Curvature = int | float | Tensor


def lift(space: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d1"]:
    """Lorentz point with the given space coordinates: `(sqrt(1/c + |x|^2), x)`.

    The constraint holds to rounding whatever the coordinates: this is also the projection of a point that has drifted.

    Args:
        space: (..., d) space coordinates, any numbers.
        curvature: c > 0.

    Raises:
        ValueError: a curvature that is not positive.

    Example:
        >>> import torch
        >>> lift(torch.tensor([3.0]), curvature=1 / 16)
        tensor([5., 3.])
    """
    return _lift(space, _curvature("lift", curvature, space))


def lorentz_project(x: Float[Tensor, "*b d1"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d1"]:
    """Point of the Lorentz model with the space coordinates of x.

    Example:
        >>> import torch
        >>> lorentz_project(torch.tensor([9.0, 0.0]))
        tensor([1., 0.])
    """
    return _lift(x[..., 1:], _curvature("lorentz_project", curvature, x))


def lorentz_inner(x: Float[Tensor, "*b d1"], y: Float[Tensor, "*b d1"]) -> Float[Tensor, "*b"]:
    """Minkowski form `<x, y> = -x_0 y_0 + x·y`.

    Example:
        >>> import torch
        >>> x = lift(torch.tensor([0.5, 2.0]))
        >>> bool((lorentz_inner(x, x) + 1).abs() < 1e-5)
        True
    """
    return (x[..., 1:] * y[..., 1:]).sum(-1) - x[..., 0] * y[..., 0]


def lorentz_square_distance(
    x: Float[Tensor, "*b d1"], y: Float[Tensor, "*b d1"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b"]:
    """Squared Lorentzian distance `<x - y, x - y> = -2/c - 2 <x, y> = (4/c) sinh^2(√c d(x, y) / 2)`.

    It equals `2 (|x| - |y|)^2 / (1 + c x_0 y_0 + c |x||y|) + |x||y| |x/|x| - y/|y||^2` of the space parts, a sum of
    squares: points close to each other, or far out, lose no more than their coordinates have lost already. Smooth
    everywhere, also at x = y.

    Args:
        x, y: points (their time coordinates are computed anew, so that drift does no harm).
        curvature: c > 0.

    References:
        M. Law, R. Liao, J. Snell, R. Zemel, Lorentzian distance learning for hyperbolic representations, ICML 2019.

    Example:
        >>> import torch
        >>> x, y = lift(torch.zeros(2)), lift(torch.tensor([0.0, 1.0]))
        >>> bool((lorentz_square_distance(x, y) - (2 * 2**0.5 - 2)).abs() < 1e-6)
        True
    """
    c = _curvature("lorentz_square_distance", curvature, x)
    return 2 * _half_square(x, y, c)[..., 0]


def lorentz_distance(
    x: Float[Tensor, "*b d1"], y: Float[Tensor, "*b d1"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b"]:
    """Geodesic distance `arcosh(-c <x, y>) / √c`, computed as `(2/√c) arsinh(√c |x - y|_L / 2)`.

    The gradient at x = y, where the distance has a kink, is 0.

    Example:
        >>> import torch
        >>> v = torch.tensor([3.0, 4.0])
        >>> torch.round(lorentz_distance(lorentz_exp0(v), lorentz_exp0(-v)), decimals=4)
        tensor(10.)
    """
    c = _curvature("lorentz_distance", curvature, x)
    return (2 / c.sqrt() * torch.arcsinh(c.sqrt() / 2 * _root(2 * _half_square(x, y, c))))[..., 0]


def lorentz_exp(
    x: Float[Tensor, "*b d1"], v: Float[Tensor, "*b d1"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d1"]:
    """Exponential map at x: `cosh(√c |v|) x + sinh(√c |v|) / (√c |v|) v`, then the constraint is restored.

    Args:
        x: point.
        v: tangent vector at x, `<x, v> = 0` (see `lorentz_project_tangent`).
        curvature: c > 0.

    Example:
        >>> import torch
        >>> x = lift(torch.zeros(2))
        >>> torch.round(lorentz_exp(x, torch.tensor([0.0, 1.0, 0.0])), decimals=3)
        tensor([1.5430, 1.1750, 0.0000])
    """
    c = _curvature("lorentz_exp", curvature, x)
    length = c.sqrt() * _tangent_norm(x[..., 1:], v[..., 1:], c)
    return _lift((torch.cosh(length) * x + _sinhc(length) * v)[..., 1:], c)


def lorentz_log(
    x: Float[Tensor, "*b d1"], y: Float[Tensor, "*b d1"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d1"]:
    """Logarithm at x, the v with exp_x(v) = y: `d (y - x - c D x) / sqrt(2 D + c D^2)` with 2 D = <x - y, x - y>.

    Example:
        >>> import torch
        >>> x, y = lift(torch.tensor([0.3, 0.0])), lift(torch.tensor([1.0, -2.0]))
        >>> torch.allclose(lorentz_exp(x, lorentz_log(x, y)), y, atol=1e-5)
        True
    """
    c = _curvature("lorentz_log", curvature, x)
    half = _half_square(x, y, c)
    half_sinh = c.sqrt() / 2 * _root(2 * half)  # sinh(√c d / 2)
    # d / sqrt(2 D + c D^2) = 2 arsinh(s) / (2 s sqrt(1 + s^2)), which is 1 at s = 0
    arc, cosh = _arcsinhc(half_sinh), (1 + half_sinh.square()).sqrt()
    return arc / cosh * (y - x) - arc * (c * half / cosh) * x  # neither D x, nor its gradient D g, which may overflow


def lorentz_exp0(v: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d1"]:
    """Point at the end of the geodesic from the origin along v: space part `sinh(√c |v|) / (√c |v|) v`.

    Args:
        v: (..., d) space part of a tangent vector at the origin (its time part is 0).
        curvature: c > 0.

    Example:
        >>> import torch
        >>> lorentz_exp0(torch.zeros(2), curvature=4.0)
        tensor([0.5000, 0.0000, 0.0000])
    """
    c = _curvature("lorentz_exp0", curvature, v)
    return _lift(_sinhc(c.sqrt() * _root(v.square().sum(-1, keepdim=True))) * v, c)


def lorentz_log0(x: Float[Tensor, "*b d1"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Inverse of `lorentz_exp0`: `arsinh(√c |x|) / (√c |x|) x` of the space part.

    Example:
        >>> import torch
        >>> v = torch.tensor([3.0, -4.0])
        >>> torch.allclose(lorentz_log0(lorentz_exp0(v)), v)
        True
    """
    c = _curvature("lorentz_log0", curvature, x)
    space = x[..., 1:]
    return _arcsinhc(c.sqrt() * _root(space.square().sum(-1, keepdim=True))) * space


def lorentz_project_tangent(
    x: Float[Tensor, "*b d1"], v: Float[Tensor, "*b d1"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d1"]:
    """Tangent part at x of any vector: `v + c <x, v> x`.

    Example:
        >>> import torch
        >>> x = lift(torch.tensor([1.0, 2.0]))
        >>> bool(lorentz_inner(x, lorentz_project_tangent(x, torch.ones(3))).abs() < 1e-5)
        True
    """
    c = _curvature("lorentz_project_tangent", curvature, x)
    return v + c * lorentz_inner(x, v)[..., None] * x


def lorentz_transport(
    x: Float[Tensor, "*b d1"], y: Float[Tensor, "*b d1"], v: Float[Tensor, "*b d1"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d1"]:
    """Parallel transport of the tangent vector v from x to y: `v + c <y, v> / (1 - c <x, y>) (x + y)`; an isometry.

    Example:
        >>> import torch
        >>> x, y = lift(torch.tensor([1.0, 2.0])), lift(torch.tensor([0.0, -1.0]))
        >>> v = lorentz_project_tangent(x, torch.ones(3))
        >>> bool(lorentz_inner(y, lorentz_transport(x, y, v)).abs() < 1e-4)
        True
    """
    c = _curvature("lorentz_transport", curvature, x)
    # <y, v> = <y - x, v>, the times by the spaces: its terms of the size |y||v| would cancel where y is close to x
    apart, times = y[..., 1:] - x[..., 1:], x[..., :1] + y[..., :1]
    rise = (apart * (x[..., 1:] + y[..., 1:])).sum(-1, keepdim=True) / times
    v0 = (x[..., 1:] * v[..., 1:]).sum(-1, keepdim=True) / x[..., :1]
    inner = (apart * v[..., 1:]).sum(-1, keepdim=True) - rise * v0
    return v + c * inner / (2 + c * _half_square(x, y, c)) * (x + y)  # 1 - c <x, y> = 2 + c D


def lorentz_add(
    x: Float[Tensor, "*b d1"], y: Float[Tensor, "*b d1"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d1"]:
    """Möbius sum x ⊕ y in the Lorentz model: the boost that carries the origin to x, applied to y.

    Space part `y + (√c y_0 + c (x·y) / (1 + √c x_0)) x`; an isometry in y. Unlike `mobius_add` it has no edge to stay
    away from.

    Example:
        >>> import torch
        >>> x = lift(torch.tensor([3.0, 4.0]))
        >>> torch.allclose(lorentz_add(x, lift(torch.zeros(2))), x)
        True
    """
    c = _curvature("lorentz_add", curvature, x)
    inner = (x[..., 1:] * y[..., 1:]).sum(-1, keepdim=True)
    along = c.sqrt() * y[..., :1] + c * inner / (1 + c.sqrt() * x[..., :1])
    return _lift(y[..., 1:] + along * x[..., 1:], c)


def lorentz_to_poincare(x: Float[Tensor, "*b d1"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Stereographic projection `x / (1 + √c x_0)`, put inside the ball as `poincare_project` does.

    Example:
        >>> import torch
        >>> lorentz_to_poincare(lift(torch.tensor([0.75])))
        tensor([0.3333])
    """
    c = _curvature("lorentz_to_poincare", curvature, x)
    return _inside(x[..., 1:] / (1 + c.sqrt() * x[..., :1]), c)


def poincare_to_lorentz(p: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d1"]:
    """Inverse of the stereographic projection: space part `2 p / (1 - c |p|^2)`.

    Example:
        >>> import torch
        >>> poincare_to_lorentz(torch.tensor([0.5]))
        tensor([1.6667, 1.3333])
    """
    c = _curvature("poincare_to_lorentz", curvature, p)
    return _lift(2 * p / _gap(p, c), c)


def poincare_project(p: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Points of the ball unchanged, others moved along their radius to `√c |p| = 1 - 8 eps`, eps of the dtype.

    Example:
        >>> import torch
        >>> poincare_project(torch.tensor([[0.6, 0.0], [3.0, 4.0]])).tolist()[0]
        [0.6000000238418579, 0.0]
    """
    c = _curvature("poincare_project", curvature, p)
    return _inside(p, c)


def poincare_distance(
    p: Float[Tensor, "*b d"], q: Float[Tensor, "*b d"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b"]:
    """Geodesic distance `(2/√c) arsinh(√c |p - q| / sqrt((1 - c |p|^2) (1 - c |q|^2)))`; its gradient at p = q is 0.

    Example:
        >>> import torch
        >>> torch.round(poincare_distance(torch.tensor([0.5, 0.0]), torch.tensor([-0.5, 0.0])), decimals=4)
        tensor(2.1972)
    """
    c = _curvature("poincare_distance", curvature, p)
    apart = _root((p - q).square().sum(-1, keepdim=True))
    return (2 / c.sqrt() * torch.arcsinh(c.sqrt() * apart / (_gap(p, c) * _gap(q, c)).sqrt()))[..., 0]


def mobius_add(p: Float[Tensor, "*b d"], q: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Möbius sum `((1 + 2c p·q + c|q|^2) p + (1 - c|p|^2) q) / (1 + 2c p·q + c^2 |p|^2 |q|^2)`, inside the ball.

    References:
        A. Ungar, A gyrovector space approach to hyperbolic geometry, 2009; O. Ganea, G. Becigneul, T. Hofmann,
        Hyperbolic neural networks, NeurIPS 2018, arXiv 1805.09112.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.3, -0.4])
        >>> mobius_add(-p, p)
        tensor([0., 0.])
    """
    c = _curvature("mobius_add", curvature, p)
    return _sum(p, q, c)


def poincare_exp0(v: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Exponential map at the origin, where the metric is 4 times the Euclidean one: `tanh(√c |v|) / (√c |v|) v`.

    The point lies at distance 2 |v|.

    Example:
        >>> import torch
        >>> p = poincare_exp0(torch.tensor([0.6, 0.8]))
        >>> torch.round(poincare_distance(torch.zeros(2), p), decimals=4)
        tensor(2.)
    """
    c = _curvature("poincare_exp0", curvature, v)
    return _inside(_tanhc(c.sqrt() * _root(v.square().sum(-1, keepdim=True))) * v, c)


def poincare_log0(p: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Inverse of `poincare_exp0`: `artanh(√c |p|) / (√c |p|) p`.

    Example:
        >>> import torch
        >>> v = torch.tensor([1.0, -2.0])
        >>> torch.allclose(poincare_log0(poincare_exp0(v)), v, atol=1e-4)
        True
    """
    c = _curvature("poincare_log0", curvature, p)
    return _arctanhc(c.sqrt() * _root(p.square().sum(-1, keepdim=True))) * p


def poincare_exp(
    p: Float[Tensor, "*b d"], v: Float[Tensor, "*b d"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d"]:
    """Exponential map at p: `p ⊕ exp_0(v / (1 - c |p|^2))`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.3, 0.0]), torch.tensor([-0.2, 0.5])
        >>> torch.allclose(poincare_exp(p, poincare_log(p, q)), q, atol=1e-6)
        True
    """
    c = _curvature("poincare_exp", curvature, p)
    w = v / _gap(p, c)
    return _sum(p, _inside(_tanhc(c.sqrt() * _root(w.square().sum(-1, keepdim=True))) * w, c), c)


def poincare_log(
    p: Float[Tensor, "*b d"], q: Float[Tensor, "*b d"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d"]:
    """Logarithm at p: `(1 - c |p|^2) log_0(-p ⊕ q)`.

    Example:
        >>> import torch
        >>> poincare_log(torch.tensor([0.3, 0.0]), torch.tensor([0.3, 0.0]))
        tensor([0., 0.])
    """
    c = _curvature("poincare_log", curvature, p)
    w = _sum(-p, q, c)
    return _gap(p, c) * _arctanhc(c.sqrt() * _root(w.square().sum(-1, keepdim=True))) * w


def poincare_transport(
    p: Float[Tensor, "*b d"], q: Float[Tensor, "*b d"], v: Float[Tensor, "*b d"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d"]:
    """Parallel transport of v from p to q: `(1 - c |q|^2) / (1 - c |p|^2) gyr[q, -p] v`, an isometry.

    Example:
        >>> import torch
        >>> p, q, v = torch.tensor([0.1, 0.2]), torch.tensor([0.5, -0.3]), torch.tensor([1.0, 1.0])
        >>> back = poincare_transport(q, p, poincare_transport(p, q, v))
        >>> torch.allclose(back, v, atol=1e-6)
        True
    """
    c = _curvature("poincare_transport", curvature, p)
    # gyr[q, -p] v (Ungar 2009) in terms of apart = q - p: its terms cancel where p and q are close to the boundary
    apart = q - p
    pv, av, ap = ((x * y).sum(-1, keepdim=True) for x, y in ((p, v), (apart, v), (apart, p)))
    aa, pp = (x.square().sum(-1, keepdim=True) for x in (apart, p))
    here, there = _gap(p, c), _gap(q, c)
    along_apart = c * (2 * ap * pv - pp * av) - here * pv
    along_p = here * av - c * pv * aa
    return (v + 2 * c * (along_apart * apart + along_p * p) / (here * there + c * aa)) * there / here


def _curvature(name: str, curvature: Curvature, points: Tensor) -> Tensor:
    """The curvature with one more axis, for the coordinates. A tensor's sign is not looked at: a device would wait."""
    if not points.is_floating_point():
        raise TypeError(f"{name}: points must be floating, got {points.dtype}; call .float()")
    if isinstance(curvature, Tensor):
        return curvature.to(points.dtype)[..., None]
    if not 0 < curvature < inf:
        raise ValueError(f"{name}: curvature c must be a positive number (the space has -c), got {curvature}; take 1.0")
    return torch.full((1,), float(curvature), dtype=points.dtype, device=points.device)


def _lift(space: Tensor, c: Tensor) -> Tensor:
    return torch.cat([(1 / c + space.square().sum(-1, keepdim=True)).sqrt(), space], -1)


def _half_square(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """D = -1/c - <x, y>, the axis of coordinates kept: values free of cancellation, gradients of the formula."""
    x, y = x[..., 1:], y[..., 1:]
    x0, y0 = ((1 / c + z.square().sum(-1, keepdim=True)).sqrt() for z in (x, y))
    # |x - y|^2 - (x_0 - y_0)^2 with the difference of times by that of the spaces: its gradient, x - y - (x_0 - y_0) x
    # / x_0, is exact for points close to each other, its value not for points far out
    apart = x - y
    plain = (apart.square().sum(-1, keepdim=True) - ((apart * (x + y)).sum(-1, keepdim=True) / (x0 + y0)).square()) / 2
    with torch.no_grad():
        size, other = (torch.linalg.vector_norm(z, dim=-1, keepdim=True) for z in (x, y))
        small, large = torch.minimum(size, other), torch.maximum(size, other)
        product, most = small * large, torch.where(large > 0, large, 1)
        # the difference of the norms, and |x||y| times that of the directions, from x - y: neither cancels
        outward = (apart * (x / most + y / most)).sum(-1, keepdim=True) / (1 + small / most)
        direction = torch.where(size <= other, x, y) / torch.where(small > 0, small, 1)
        across = apart - outward * direction
        # across is large (n - m) for directions n, m: its part along n, large (1 - cos), drowns in rounding of outward
        along = (across * direction).sum(-1, keepdim=True)
        square, rest = (z.square().sum(-1, keepdim=True) for z in (across, across - along * direction))
        square = torch.where(along.abs() < most, 2 * rest / (2 - along.abs() / most), square)
        stable = outward.square() / (c * (x0 * y0 + product) + 1)
        stable = stable + small / most * square / 2
    return plain - plain.detach() + stable.detach()  # forward-mode derivatives pass through no_grad


def _tangent_norm(x: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """Norm of the tangent vector at the point with space part x whose space part is v, free of cancellation.

    With n = x / |x|: `<v, v> = |v - (v·n) n|^2 + (v·n)^2 / (1 + c |x|^2)`.
    """
    square = x.square().sum(-1, keepdim=True)
    direction = x / torch.where(square > 0, square, 1).sqrt()
    along = (v * direction).sum(-1, keepdim=True)
    across = v - along * direction
    return _root(across.square().sum(-1, keepdim=True) + along.square() / (1 + c * square))


def _gap(p: Tensor, c: Tensor) -> Tensor:
    """1 - c |p|^2 of points in the ball, as (1 - √c|p|)(1 + √c|p|)."""
    size = c.sqrt() * _root(p.square().sum(-1, keepdim=True))
    return (1 - size) * (1 + size)


def _inside(p: Tensor, c: Tensor) -> Tensor:
    most = (1 - 8 * torch.finfo(p.dtype).eps) / c.sqrt()
    size = _root(p.square().sum(-1, keepdim=True))
    return torch.where(size > most, p / torch.where(size > 0, size, 1) * most, p)


def _sum(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
    # 1 + 2c p·q + c|q|^2 and 1 + 2c p·q + c^2 |p|^2 |q|^2 cancel near q = -p; these forms do not
    both, here = p + q, _gap(p, c)
    square = c * both.square().sum(-1, keepdim=True)
    return _inside((square * p + here * both) / (square + here * _gap(q, c)), c)


def _root(square: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0 * square)  # a NaN stays one


def _over(function: Callable[[Tensor], Tensor], third: float, z: Tensor) -> Tensor:
    """function(z) / z for z >= 0, with its series 1 + third z^2 where that is exact."""
    small = z < 0.1 * sqrt(torch.finfo(z.dtype).eps)
    safe = torch.where(small, 1, z)
    return torch.where(small, 1 + third * z.square(), function(safe) / safe)


def _sinhc(z: Tensor) -> Tensor:
    return _over(torch.sinh, 1 / 6, z)


def _arcsinhc(z: Tensor) -> Tensor:
    return _over(torch.arcsinh, -1 / 6, z)


def _tanhc(z: Tensor) -> Tensor:
    return _over(torch.tanh, -1 / 3, z)


def _arctanhc(z: Tensor) -> Tensor:
    return _over(torch.arctanh, 1 / 3, z)
