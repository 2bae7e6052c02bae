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

import torch
from jaxtyping import Float
from torch import Tensor

from tnlayers.poincare import Curvature as Curvature
from tnlayers.poincare import _arcsinhc, _curvature, _lift, _root, _sinhc
from tnlayers.poincare import lorentz_to_poincare as lorentz_to_poincare
from tnlayers.poincare import mobius_add as mobius_add
from tnlayers.poincare import poincare_distance as poincare_distance
from tnlayers.poincare import poincare_exp as poincare_exp
from tnlayers.poincare import poincare_exp0 as poincare_exp0
from tnlayers.poincare import poincare_log as poincare_log
from tnlayers.poincare import poincare_log0 as poincare_log0
from tnlayers.poincare import poincare_project as poincare_project
from tnlayers.poincare import poincare_to_lorentz as poincare_to_lorentz
from tnlayers.poincare import poincare_transport as poincare_transport


def lift(space: Float[Tensor, "*b d"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d1"]:
    """Lorentz point with the given space coordinates: `(sqrt(1/c + |x|^2), x)`.

    The constraint holds to rounding whatever the coordinates, up to |x| of 1e19 in float32 and 1e154 in float64: x_0 is
    infinite beyond. Cost: O(d) a point.

    Args:
        space: (..., d) space coordinates, any numbers.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d + 1), time first.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    Example:
        >>> import torch
        >>> lift(torch.tensor([3.0]), curvature=1 / 16)
        tensor([5., 3.])
    """
    return _lift(space, _curvature("lift", curvature, space))


def lorentz_project(x: Float[Tensor, "*b d1"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d1"]:
    """Point of the Lorentz model with the space coordinates of x: `lift(x[..., 1:])`; for a point that has drifted.

    Not the closest point: the time is computed anew, the space part is kept exactly. Cost: O(d) a point.

    Args:
        x: (..., d + 1), its time is not read.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d + 1).

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    Example:
        >>> import torch
        >>> lorentz_project(torch.tensor([9.0, 0.0]))
        tensor([1., 0.])
    """
    return _lift(x[..., 1:], _curvature("lorentz_project", curvature, x))


def lorentz_inner(x: Float[Tensor, "*b d1"], y: Float[Tensor, "*b d1"]) -> Float[Tensor, "*b"]:
    """Minkowski form `<x, y> = -x_0 y_0 + x·y`, as it stands: it cancels, by x_0 y_0 eps.

    For distances take `lorentz_distance`, which does not. Cost: O(d) a pair.

    Args:
        x, y: (..., d + 1) vectors, points or tangent.

    Returns:
        (...).

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
    everywhere, also at x = y. Range: that of the module. Cost: O(d) a pair.

    Args:
        x, y: (..., d + 1) points (their times are computed anew, so that drift does no harm).
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (...).

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

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

    As exact as the coordinates: it errs by 40 eps, relatively, and by what a change of all coordinates by a few eps
    does. The gradient at x = y, where the distance has a kink, is 0. Beyond the range of the module: NaN. Cost: O(d) a
    pair.

    Args:
        x, y: (..., d + 1) points.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (...).

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        M. Nickel, D. Kiela, Learning continuous hierarchies in the Lorentz model, ICML 2018, arXiv 1806.03417.

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

    At a point at distance ρ from the origin the step errs by 4 exp(√c ρ) eps, relatively. Cost: O(d) a point.

    Args:
        x: (..., d + 1) points.
        v: (..., d + 1) tangent vectors at x, `<x, v> = 0` (see `lorentz_project_tangent`).
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

    v errs by a few eps, relatively, as far as its coordinates go (`<x, v>` is 0 up to x_0 |v| times that); v and its
    gradients are finite in the whole range of the module. Cost: O(d) a pair.

    Args:
        x, y: (..., d + 1) points.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d + 1) tangent vectors at x.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        Y. Nagano, S. Yamaguchi, Y. Fujita, M. Koyama, A wrapped normal distribution on hyperbolic space, ICML 2019,
        arXiv 1902.02992.

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

    The point lies at distance |v|; its coordinates err by √c |v| eps, relatively, in the range of the module.
    Cost: O(d) a point.

    Args:
        v: (..., d) space parts of tangent vectors at the origin (their time is 0).
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
        >>> lorentz_exp0(torch.zeros(2), curvature=4.0)
        tensor([0.5000, 0.0000, 0.0000])
    """
    c = _curvature("lorentz_exp0", curvature, v)
    return _lift(_sinhc(c.sqrt() * _root(v.square().sum(-1, keepdim=True))) * v, c)


def lorentz_log0(x: Float[Tensor, "*b d1"], curvature: Curvature = 1.0) -> Float[Tensor, "*b d"]:
    """Inverse of `lorentz_exp0`: `arsinh(√c |x|) / (√c |x|) x` of the space part.

    Right to a few eps in the range of the module; meaningless where |x|^2 is no number. Cost: O(d) a point.

    Args:
        x: (..., d + 1) points.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d).

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        Y. Nagano, S. Yamaguchi, Y. Fujita, M. Koyama, A wrapped normal distribution on hyperbolic space, ICML 2019,
        arXiv 1902.02992.

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
    """Tangent part at x of any vector: `v + c <x, v> x`, orthogonal to x in the Minkowski form.

    It cancels far out: `<x, result>` is 0 up to 4 c x_0^3 |v| eps. Cost: O(d) a point.

    Args:
        x: (..., d + 1) points.
        v: (..., d + 1) any vectors.
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

    From x to x it leaves v as it is; between close points at distance ρ from the origin it errs by 4 exp(√c ρ) eps,
    relatively. Cost: O(d) a vector.

    Args:
        x, y: (..., d + 1) points.
        v: (..., d + 1) tangent vectors at x.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d + 1) tangent vectors at y.

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        Y. Nagano, S. Yamaguchi, Y. Fujita, M. Koyama, A wrapped normal distribution on hyperbolic space, ICML 2019,
        arXiv 1902.02992.

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
    away from; sums of points far out in opposite directions cancel. Cost: O(d) a pair.

    Args:
        x, y: (..., d + 1) points.
        curvature: c > 0, a number or a tensor (...).

    Returns:
        (..., d + 1).

    Raises:
        TypeError: coordinates that are not floating.
        ValueError: a number as curvature that is not positive.

    References:
        A. Ungar, A gyrovector space approach to hyperbolic geometry, 2009.

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
