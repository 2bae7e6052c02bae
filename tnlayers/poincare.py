"""Points of the Poincaré ball `c |p|^2 < 1`, maps to the Lorentz model and what both share; see `tnlayers.hyperbolic`.

Rounding p by an eps moves a point at distance ρ from the origin by up to exp(√c ρ) eps / (2 √c): what is said of
results here holds up to that, and the edge, where results beyond it are put, lies at √c ρ of about 14 in float32 and 34
in float64.
"""

from collections.abc import Callable
from math import inf, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

Curvature = int | float | Tensor


def poincare_project(p: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Points of the ball unchanged, others moved along their radius to `√c |p| = 1 - 8 eps`, eps of the dtype.

    Right for all finite coordinates, however large. An infinite or NaN coordinate makes its whole point NaN, as its
    direction is lost. Cost: O(d) a point.

    Args:
        p: (..., d) coordinates, any numbers.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d), `c |p|^2 < 1`.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    Example:
        >>> import torch
        >>> poincare_project(torch.tensor([[0.5, 0.0], [3e30, 4e30]]))
        tensor([[0.5000, 0.0000],
                [0.6000, 0.8000]])
    """
    c = _curvature("poincare_project", curvature, p)
    return _inside(_bounded(p, c), c)


def poincare_distance(
    p: Float[Tensor, "*b d"], q: Float[Tensor, "*b d"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b"]:
    """Geodesic distance `(2/√c) arsinh(√c |p - q| / sqrt((1 - c |p|^2) (1 - c |q|^2)))`; its gradient at p = q is 0.

    Equals `arcosh(1 + 2c |p - q|^2 / ((1 - c |p|^2)(1 - c |q|^2))) / √c` without its cancellation. Cost: O(d) a pair.

    Args:
        p, q: (..., d) points of the ball; others give NaN or no distance.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (...).

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        M. Nickel, D. Kiela, Poincare embeddings for learning hierarchical representations, NIPS 2017, arXiv 1705.08039.

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

    Computed without the cancellation near q = -p, where it is exactly 0. Cost: O(d) a pair.

    Args:
        p, q: (..., d) points of the ball.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d), inside the ball.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

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

    The point lies at distance 2 |v|, or on the edge if that is nearer. Right for all finite v, however long; an
    infinite coordinate makes its whole point NaN. Cost: O(d) a point.

    Args:
        v: (..., d) tangent vectors at the origin.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d), inside the ball.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        O. Ganea, G. Becigneul, T. Hofmann, Hyperbolic neural networks, NeurIPS 2018, arXiv 1805.09112.

    Example:
        >>> import torch
        >>> p = poincare_exp0(torch.tensor([0.6, 0.8]))
        >>> torch.round(poincare_distance(torch.zeros(2), p), decimals=4)
        tensor(2.)
    """
    c = _curvature("poincare_exp0", curvature, v)
    return _exp0(v, c)


def poincare_log0(p: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Inverse of `poincare_exp0`: `artanh(√c |p|) / (√c |p|) p`, half as long as the distance to the origin.

    Cost: O(d) a point.

    Args:
        p: (..., d) points of the ball; others give NaN.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d) tangent vectors at the origin.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        O. Ganea, G. Becigneul, T. Hofmann, Hyperbolic neural networks, NeurIPS 2018, arXiv 1805.09112.

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
    """Exponential map at p: `p ⊕ exp_0(v / (1 - c |p|^2))`, inside the ball.

    Long v end on the edge; `v / (1 - c |p|^2)` must be finite. Cost: O(d) a point.

    Args:
        p: (..., d) points of the ball.
        v: (..., d) tangent vectors at p, of length `2 |v| / (1 - c |p|^2)`.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d), inside the ball.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        O. Ganea, G. Becigneul, T. Hofmann, Hyperbolic neural networks, NeurIPS 2018, arXiv 1805.09112.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.3, 0.0]), torch.tensor([-0.2, 0.5])
        >>> torch.allclose(poincare_exp(p, poincare_log(p, q)), q, atol=1e-6)
        True
    """
    c = _curvature("poincare_exp", curvature, p)
    return _sum(p, _exp0(v / _gap(p, c), c), c)


def poincare_log(
    p: Float[Tensor, "*b d"], q: Float[Tensor, "*b d"], curvature: Curvature = 1.0
) -> Float[Tensor, "*b d"]:
    """Logarithm at p, the v with exp_p(v) = q: `(1 - c |p|^2) log_0(-p ⊕ q)`; exactly 0 for q = p.

    Cost: O(d) a pair.

    Args:
        p, q: (..., d) points of the ball.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d) tangent vectors at p.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        O. Ganea, G. Becigneul, T. Hofmann, Hyperbolic neural networks, NeurIPS 2018, arXiv 1805.09112.

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

    From p to p it leaves v as it is, and it is finite up to the edge. Cost: O(d) a vector.

    Args:
        p, q: (..., d) points of the ball.
        v: (..., d) tangent vectors at p.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d) tangent vectors at q.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        A. Ungar, A gyrovector space approach to hyperbolic geometry, 2009; G. Becigneul, O. Ganea, Riemannian
        adaptive optimization methods, ICLR 2019, arXiv 1810.00760.

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


def poincare_to_lorentz(p: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d1"]:
    """Inverse of the stereographic projection: space part `2 p / (1 - c |p|^2)`.

    At distance ρ from the origin it errs by exp(√c ρ) eps, relatively: the ball knows no better. Cost: O(d) a point.

    Args:
        p: (..., d) points of the ball.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d + 1).

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        M. Nickel, D. Kiela, Learning continuous hierarchies in the Lorentz model, ICML 2018, arXiv 1806.03417.

    Example:
        >>> import torch
        >>> poincare_to_lorentz(torch.tensor([0.5]))
        tensor([1.6667, 1.3333])
    """
    c = _curvature("poincare_to_lorentz", curvature, p)
    return _lift(2 * p / _gap(p, c), c)


def lorentz_to_poincare(x: Float[Tensor, "*b d1"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Stereographic projection `x / (1 + √c x_0)`, put inside the ball as `poincare_project` does.

    Distances stay up to the edge, √c ρ of 14 in float32 and 34 in float64. A point whose x_0 is infinite has no image.
    Cost: O(d) a point.

    Args:
        x: (..., d + 1) points.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d), `c |p|^2 < 1`.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        M. Nickel, D. Kiela, Learning continuous hierarchies in the Lorentz model, ICML 2018, arXiv 1806.03417.

    Example:
        >>> import torch
        >>> lorentz_to_poincare(torch.tensor([1.25, 0.75]))
        tensor([0.3333])
    """
    c = _curvature("lorentz_to_poincare", curvature, x)
    return _inside(x[..., 1:] / (1 + c.sqrt() * x[..., :1]), c)


def _lift(space: Tensor, c: Tensor) -> Tensor:
    return torch.cat([(1 / c + space.square().sum(-1, keepdim=True)).sqrt(), space], -1)


def _curvature(name: str, curvature: Curvature, points: Tensor) -> Tensor:
    """The curvature with one more axis, for the coordinates. A tensor's sign is not looked at: a device would wait."""
    if not points.is_floating_point():
        raise TypeError(f"{name}: points must be floating, got {points.dtype}; call .float()")
    if isinstance(curvature, Tensor):
        return curvature.to(points.dtype)[..., None]
    if not 0 < curvature < inf:
        raise ValueError(f"{name}: curvature c must be a positive number (the space has -c), got {curvature}; take 1.0")
    return torch.full((1,), float(curvature), dtype=points.dtype, device=points.device)


def _gap(p: Tensor, c: Tensor) -> Tensor:
    """1 - c |p|^2 of points in the ball, as (1 - √c|p|)(1 + √c|p|)."""
    size = c.sqrt() * _root(p.square().sum(-1, keepdim=True))
    return (1 - size) * (1 + size)


def _inside(p: Tensor, c: Tensor) -> Tensor:
    most = (1 - 8 * torch.finfo(p.dtype).eps) / c.sqrt()
    size = _root(p.square().sum(-1, keepdim=True))
    return torch.where(size <= most, p, p / torch.where(size == 0, 1, size) * most)  # all NaN if a coordinate is


def _bounded(x: Tensor, c: Tensor) -> Tensor:
    """Vectors with a coordinate beyond 64/√c (and 1) scaled down to it, for functions of their direction alone there.

    Then no square overflows. The scale needs no gradient. What has an infinite coordinate gets a NaN.
    """
    bound = (64 / c.detach().sqrt()).clamp_min(1)  # tanh is 1 there in every precision; largest / bound is finite
    largest = x.detach().abs().amax(-1, keepdim=True)
    return x / torch.where(largest > bound, largest / bound, 1)


def _exp0(v: Tensor, c: Tensor) -> Tensor:
    v = _bounded(v, c)
    return _inside(_tanhc(c.sqrt() * _root(v.square().sum(-1, keepdim=True))) * v, c)


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
