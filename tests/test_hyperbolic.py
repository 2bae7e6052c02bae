"""Points of hyperbolic space against 60 digits, near and far, and the identities of the geometry."""

import math

import mpmath
import pytest
import torch

from tnlayers import hyperbolic as H

F64 = torch.float64
CURVATURES = [0.25, 1.0, 3.0]


def points(count, d, radius, c, rng, dtype=F64):
    v = torch.randn(count, d, generator=rng, dtype=F64)
    v = v / v.norm(dim=1, keepdim=True) * torch.rand(count, 1, generator=rng, dtype=F64) * radius
    return H.lorentz_exp0(v, c).to(dtype)


def exact_distance(x, y, c):
    """Of the space coordinates as they are, in 60 digits."""
    with mpmath.workdps(60):
        x, y = ([mpmath.mpf(float(t)) for t in z[1:]] for z in (x, y))
        c = mpmath.mpf(c)
        lifted = [mpmath.sqrt(1 / c + sum(t * t for t in z)) for z in (x, y)]
        inner = lifted[0] * lifted[1] - sum(a * b for a, b in zip(x, y, strict=True))
        return mpmath.acosh(c * inner) / mpmath.sqrt(c)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_lorentz_distances_near_and_far(c, dtype, rng):
    """As exact as the coordinates: moving each by an eps changes the distance as much."""
    eps = torch.finfo(dtype).eps
    for radius in (1e-6, 1.0, 8.0, 40.0 if dtype == torch.float32 else 300.0):
        x = points(20, 4, radius / math.sqrt(c), c, rng, dtype)
        y = points(20, 4, radius / math.sqrt(c), c, rng, dtype)
        near = x.clone()
        near[:, 1] += near[:, 1].abs() * 1e-3
        for z in (y, near, -near):
            z = H.lorentz_project(z, c)
            found = H.lorentz_distance(x, z, c)
            for i in range(len(x)):
                exact = exact_distance(x[i], z[i], c)
                # the distance that a relative change of eps in the coordinates makes, and rounding of the result
                moved = exact_distance(x[i], z[i] * (1 + torch.linspace(-4, 4, 5, dtype=F64) * eps), c)
                allowed = 40 * eps * exact + 4 * abs(moved - exact) + 1e-300
                assert abs(mpmath.mpf(float(found[i])) - exact) <= allowed, (radius, i, float(found[i]), float(exact))


@pytest.mark.parametrize("c", CURVATURES)
def test_limits_that_the_module_states(c):
    """√c ρ of 40 and 340 in the Lorentz model; beyond 14 and 34 the ball puts points on its edge."""
    direction = torch.tensor([0.6, -0.8], dtype=F64)
    for dtype, far, edge in ((torch.float32, 40.0, 14.0), (F64, 340.0, 34.0)):
        v = (direction * far / math.sqrt(c)).to(dtype)
        x = H.lorentz_exp0(v, c)
        assert torch.allclose(H.lorentz_log0(x, c), v, rtol=1e-5)
        origin = H.lorentz_exp0(torch.zeros(2, dtype=dtype), c)
        assert math.isclose(float(H.lorentz_distance(origin, x, c)), far / math.sqrt(c), rel_tol=1e-5)
        assert math.isclose(
            float(H.lorentz_distance(x, H.lorentz_exp0(-v, c), c)), 2 * far / math.sqrt(c), rel_tol=1e-5
        )
        inside = (direction * edge / math.sqrt(c)).to(dtype) / 2  # poincare_exp0(v) lies at distance 2 |v|
        p = H.poincare_exp0(inside, c)
        assert math.isclose(float(H.poincare_log0(p, c).norm()), float(inside.norm()), rel_tol=0.05)
        beyond = H.poincare_exp0(4 * inside, c)
        assert float(beyond.norm()) * math.sqrt(c) < 1
        assert torch.isfinite(H.poincare_distance(beyond, -beyond, c))


@pytest.mark.parametrize("c", CURVATURES)
def test_exponential_logarithm_and_transport(c, rng):
    x, y, z = (points(50, 3, 3.0, c, rng) for _ in range(3))
    v = H.lorentz_log(x, y, c)
    assert float(H.lorentz_inner(x, v).abs().max()) <= 1e-9
    assert torch.allclose(H.lorentz_inner(v, v).clamp_min(0).sqrt(), H.lorentz_distance(x, y, c), atol=1e-9)
    assert torch.allclose(H.lorentz_exp(x, v, c), y, atol=1e-8)
    w = H.lorentz_project_tangent(x, torch.randn(50, 4, dtype=F64, generator=rng), c)
    moved = H.lorentz_transport(x, z, w, c)
    assert float(H.lorentz_inner(z, moved).abs().max()) <= 1e-8 * float(moved.abs().max() * z.abs().max())
    assert torch.allclose(H.lorentz_inner(moved, moved), H.lorentz_inner(w, w), rtol=1e-7, atol=1e-7)
    assert torch.allclose(H.lorentz_transport(z, x, moved, c), w, atol=1e-7)


@pytest.mark.parametrize("c", CURVATURES)
def test_the_models_agree(c, rng):
    x, y = (points(50, 3, 2.0, c, rng) for _ in range(2))
    p, q = (H.lorentz_to_poincare(z, c) for z in (x, y))
    assert torch.allclose(H.poincare_to_lorentz(p, c), x, rtol=1e-9, atol=1e-9)
    assert torch.allclose(H.poincare_distance(p, q, c), H.lorentz_distance(x, y, c), rtol=1e-9, atol=1e-9)
    v = H.poincare_log(p, q, c)
    assert torch.allclose(H.poincare_exp(p, v, c), q, atol=1e-9)
    length = 2 * v.norm(dim=1) / (1 - c * p.square().sum(1))
    assert torch.allclose(length, H.poincare_distance(p, q, c), rtol=1e-8)
    assert torch.allclose(H.mobius_add(-p, H.mobius_add(p, q, c), c), q, atol=1e-9)
    w = torch.randn(50, 3, dtype=F64, generator=rng)
    moved = H.poincare_transport(p, q, w, c)
    scale = (1 - c * p.square().sum(1)) / (1 - c * q.square().sum(1))
    assert torch.allclose(moved.norm(dim=1) * scale, w.norm(dim=1), rtol=1e-8)
    # the differential of the projection carries one transport into the other
    lifted = torch.func.jvp(lambda t: H.poincare_to_lorentz(t, c), (p,), (w,))[1]
    both = torch.func.jvp(lambda t: H.lorentz_to_poincare(t, c), (y,), (H.lorentz_transport(x, y, lifted, c),))[1]
    assert torch.allclose(both, moved, rtol=1e-7, atol=1e-7)


def test_a_tensor_of_curvatures_acts_point_by_point(rng):
    c = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    v = torch.randn(3, 2, dtype=F64, generator=rng)
    together = H.lorentz_exp0(v, c)
    for i in range(3):
        assert torch.equal(together[i], H.lorentz_exp0(v[i], float(c[i])))
    distances = H.lorentz_distance(together, H.lorentz_exp0(-v, c), c)
    assert torch.allclose(distances, 2 * v.norm(dim=1))


@pytest.mark.parametrize("name", ["lorentz_distance", "lorentz_square_distance", "lorentz_log", "lorentz_exp"])
def test_gradients(name, rng):
    x, y = (torch.randn(4, 3, dtype=F64, generator=rng).requires_grad_() for _ in range(2))
    c = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def function(x, y, c):
        first = H.lift(x, c)
        second = H.lift(y, c)
        if name == "lorentz_exp":
            second = H.lorentz_project_tangent(first, second, c)
        return getattr(H, name)(first, second, c)

    assert torch.autograd.gradcheck(function, (x, y, c))


@pytest.mark.parametrize("name", ["poincare_distance", "mobius_add", "poincare_log", "poincare_exp"])
def test_gradients_in_the_ball(name, rng):
    p, q = (torch.randn(4, 3, dtype=F64, generator=rng) * 0.2 for _ in range(2))
    assert torch.autograd.gradcheck(lambda p, q: getattr(H, name)(p, q, 0.7), (p.requires_grad_(), q.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e-9, 1e-3])
def test_gradients_at_and_near_coincident_points_are_finite(dtype, size):
    for start in (torch.zeros(3, dtype=dtype), torch.tensor([0.3, -0.2, 0.1], dtype=dtype)):
        x = start.clone().requires_grad_()
        y = (start + size).clone().requires_grad_()
        for value in (
            H.lorentz_distance(H.lift(x), H.lift(y)),
            H.lorentz_square_distance(H.lift(x), H.lift(y)),
            H.lorentz_log(H.lift(x), H.lift(y)).sum(),
            H.lorentz_log0(H.lorentz_exp0(y)).sum(),
            H.poincare_distance(x, y),
            H.poincare_log0(H.poincare_exp0(y)).sum(),
            H.poincare_log(x, y).sum(),
        ):
            x.grad = y.grad = None
            value.backward(retain_graph=True)
            for leaf in (x, y):
                assert leaf.grad is None or bool(torch.isfinite(leaf.grad).all())


def test_the_square_distance_is_smooth_at_the_origin():
    """Its value is put together from norms and directions, its gradient is not: -y at x = 0."""
    x = torch.zeros(3, dtype=F64, requires_grad=True)
    y = torch.tensor([0.3, -2.0, 0.5], dtype=F64)
    H.lorentz_square_distance(H.lift(x), H.lift(y)).backward()
    assert torch.allclose(x.grad, -2 * y)


def test_a_step_from_a_far_point_is_as_exact_as_its_tangent_vector():
    """Length and end of exp from √c ρ = 8 in float32, 16 in float64: exp(√c ρ) eps, where <v, v> loses its square."""
    for dtype, far in ((torch.float32, 8.0), (F64, 16.0)):
        for c in CURVATURES:
            v = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0], [0.0, 0.3, 0.0]], dtype=F64)
            start = H.lorentz_exp0((torch.tensor([0.36, -0.48, 0.8]).double() * far / math.sqrt(c)).to(dtype), c)
            start = start.expand(3, -1)
            origin = H.lift(torch.zeros(3, 3, dtype=F64), c)
            tangent = H.lorentz_transport(origin, start.double(), torch.nn.functional.pad(v, (1, 0)), c)
            end = H.lorentz_exp(start, tangent.to(dtype), c)
            moved = H.lorentz_distance(start.double(), end.double(), c)
            error = float((moved / v.norm(dim=1) - 1).abs().max())
            assert error <= 4 * math.exp(far) * torch.finfo(dtype).eps, (dtype, c, error)


@pytest.mark.parametrize("separation", [1e-1, 1e-3, 1e-5])
def test_gradients_of_points_close_to_each_other(separation):
    """Of the difference, not of the product of coordinates: float32 against float64 of the same numbers."""
    for size in (1.0, 5.0, 30.0):
        found = []
        x = torch.tensor([size, 0.3, -0.2])
        y = x + separation * torch.tensor([0.5, 0.7, -0.5])
        for dtype in (torch.float32, F64):
            leaf = x.detach().clone().to(dtype).requires_grad_()
            H.lorentz_distance(H.lift(leaf), H.lift(y.to(dtype))).backward()
            found.append(leaf.grad.double())
        assert float((found[0] - found[1]).norm()) <= 1e-4 * float(found[1].norm()), size


@pytest.mark.parametrize("name", ["lorentz_distance", "lorentz_square_distance", "lorentz_log", "lorentz_add"])
def test_forward_mode_agrees_with_reverse_mode(name, rng):
    x, y, direction = (torch.randn(3, 2, dtype=F64, generator=rng) for _ in range(3))

    def function(x):
        return getattr(H, name)(H.lift(x), H.lift(y))

    tangent = torch.func.jvp(function, (x,), (direction,))[1]
    jacobian = torch.autograd.functional.jacobian(function, x)
    assert torch.allclose(tangent, torch.einsum("...ij,ij->...", jacobian, direction), atol=1e-12)
    assert torch.autograd.gradgradcheck(function, (x.requires_grad_(),))


def test_overflow_is_not_a_distance_of_zero():
    x = torch.tensor([60.0, 0.0])
    for dtype, scale in ((torch.float32, 1.0), (F64, 10.0)):
        v = x.to(dtype) * scale
        assert bool(H.lorentz_distance(H.lorentz_exp0(v), H.lorentz_exp0(-v)).isnan())
    near = H.lorentz_exp0(torch.tensor([39.0, 0.0]))
    assert bool(torch.isfinite(H.lorentz_log(near, H.lorentz_exp0(torch.tensor([-39.0, 0.0])))).all())


@pytest.mark.parametrize("c", CURVATURES)
def test_the_sum_of_both_models_is_one(c, rng):
    x, y, z = (points(50, 3, 2.0, c, rng) for _ in range(3))
    p, q = (H.lorentz_to_poincare(t, c) for t in (x, y))
    assert torch.allclose(H.lorentz_to_poincare(H.lorentz_add(x, y, c), c), H.mobius_add(p, q, c), atol=1e-12)
    moved = H.lorentz_distance(H.lorentz_add(x, y, c), H.lorentz_add(x, z, c), c)
    assert torch.allclose(moved, H.lorentz_distance(y, z, c), rtol=1e-9)


def test_the_constraint_after_ten_thousand_steps(rng):
    x = H.lorentz_exp0(torch.randn(8, 4, generator=rng))
    for _ in range(10_000):
        step = H.lorentz_project_tangent(x, torch.randn(8, 5, generator=rng) * 0.02)
        x = H.lorentz_exp(x, step)
        if float(x.abs().max()) > 50:
            x = H.lorentz_exp0(0.5 * H.lorentz_log0(x))
    exact = x.double()
    drift = (H.lorentz_inner(exact, exact) + 1).abs() / exact[:, 0].square()
    assert float(drift.max()) <= 1e-6


def test_refusals():
    with pytest.raises(ValueError, match=r"curvature c must be a positive number .* got -1"):
        H.lift(torch.zeros(2), -1)
    with pytest.raises(ValueError, match="got nan"):
        H.lorentz_distance(torch.zeros(3), torch.zeros(3), float("nan"))
    with pytest.raises(TypeError, match=r"points must be floating, got torch.int64"):
        H.poincare_exp0(torch.zeros(2, dtype=torch.long))


# --- far out, near the edge, and at any curvature ---

EXTREME = [1e-6, 1e-3, 1.0, 1e3]


@pytest.mark.parametrize("c", EXTREME)
@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 36.0), (F64, 340.0)])
def test_logarithms_and_their_gradients_are_finite_as_far_as_points_are(c, dtype, far):
    far = 40.0 if dtype == torch.float32 and c >= 1e-3 else far
    v = torch.tensor([0.6, -0.8, 0.1], dtype=F64)
    v = (v / v.norm() * far / math.sqrt(c)).to(dtype)
    x = H.lorentz_exp0(v, c)
    assert torch.allclose(H.lorentz_log0(x, c), v, rtol=1e-5)
    for other in (-v, v.flip(0), v * (1 - 1e-3), v):
        leaves = [z[1:].clone().requires_grad_() for z in (x, H.lorentz_exp0(other, c))]
        for name in ("lorentz_log", "lorentz_distance"):
            value = getattr(H, name)(*(H.lift(leaf, c) for leaf in leaves), c)
            assert bool(torch.isfinite(value).all()), (name, other)
            for gradient in torch.autograd.grad(value.sum(), leaves):
                assert bool(torch.isfinite(gradient).all()), (name, other)


@pytest.mark.parametrize("c", EXTREME)
@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 36.0), (F64, 300.0)])
def test_distances_along_a_ray_are_exact(c, dtype, far):
    """Points of one line: what rounding leaves across it must not count |x||y| times."""
    eps = torch.finfo(dtype).eps
    for distance in (1.0, 0.5 * far, far):
        x = H.lorentz_exp0(torch.tensor([distance / math.sqrt(c)], dtype=dtype), c)
        for factor in (1 + 8 * eps, 1 + 1e-4, 3.0, -1.0):
            y = H.lift(x[1:] * factor, c)
            with mpmath.workdps(60):
                ends = [mpmath.asinh(mpmath.sqrt(c) * mpmath.mpf(float(z[1]))) for z in (x, y)]
                exact = float(abs(ends[0] - ends[1]) / mpmath.sqrt(c))
            assert math.isclose(float(H.lorentz_distance(x, y, c)), exact, rel_tol=40 * eps), (distance, factor)


@pytest.mark.parametrize("c", EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_transport_between_points_that_are_equal_or_close_far_out(c, dtype, rng):
    """A vector is left as it is from x to x; 12 is where eps exp(2 √c ρ) is 10^3 in float32."""
    x = H.lorentz_exp0(torch.tensor([0.36, -0.48, 0.8], dtype=F64) * 12 / math.sqrt(c), c).to(dtype)
    v = H.lorentz_project_tangent(x.double(), torch.randn(4, dtype=F64, generator=rng), c).to(dtype)
    assert torch.allclose(H.lorentz_transport(x, x, v, c), v, rtol=1e-6, atol=0)
    y = H.lift(x[1:] * (1 + 1e-5), c)
    exact = H.lorentz_transport(x.double(), y.double(), v.double(), c)
    error = (H.lorentz_transport(x, y, v, c).double() - exact).norm() / exact.norm()
    assert float(error) <= 4 * torch.finfo(dtype).eps * math.exp(12)


@pytest.mark.parametrize("c", EXTREME)
@pytest.mark.parametrize(("dtype", "edge"), [(torch.float32, 13.0), (torch.float32, 99.0), (F64, 33.0), (F64, 99.0)])
def test_sums_and_transport_at_the_edge_of_the_ball(c, dtype, edge, rng):
    for d in (1, 3, 20):
        v = torch.randn(d, dtype=F64, generator=rng)
        p = H.poincare_exp0((v / v.norm() * edge / 2 / math.sqrt(c)).to(dtype), c)
        w = torch.randn(d, dtype=dtype, generator=rng)
        assert torch.allclose(H.poincare_transport(p, p, w, c), w, rtol=1e-6, atol=0)
        for q in (p, -p, p * (1 - 1e-6), p.flip(0)):
            assert bool(torch.isfinite(H.poincare_transport(p, q, w, c)).all())
            leaves = [z.clone().requires_grad_() for z in (p, q)]
            for name in ("mobius_add", "poincare_log", "poincare_distance"):
                value = getattr(H, name)(*leaves, c)
                for gradient in torch.autograd.grad(value.sum(), leaves):
                    assert bool(torch.isfinite(gradient).all()), (name, d)


@pytest.mark.parametrize("c", [1e-8, *EXTREME, 1e8, torch.tensor(0.5, dtype=F64)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ["poincare_project", "poincare_exp0"])
def test_coordinates_whose_squares_overflow_end_on_the_edge_in_their_direction(name, dtype, c):
    """With the gradient of `x / |x|`: of the size 1 / |x|, across x."""
    info = torch.finfo(dtype)
    direction = torch.tensor([0.48, -0.6, 0.64], dtype=dtype)
    root = math.sqrt(float(c))
    for size in (info.max**0.6, info.max**0.9, info.max):
        x = (direction * size).requires_grad_()
        p = getattr(H, name)(x, c)
        assert torch.allclose(p * root, direction, rtol=1e-5 if dtype == torch.float32 else 1e-12)
        assert float(p.detach().double().norm()) * root < 1
        gradient = torch.autograd.grad(p[0] * root, x)[0] * size  # (e_0 - n_0 n) / |x|, by parts in the range
        expected = torch.tensor([1.0, 0, 0], dtype=dtype) - direction[0] * direction
        if size < info.max**0.8:  # beyond, the gradient is smaller than the smallest normal number at some c
            assert torch.allclose(gradient, expected, atol=1e-4)
    together = torch.stack([direction * info.max, direction / root / 2])  # row by row, the second is in the ball
    assert torch.equal(getattr(H, name)(together, c)[1], getattr(H, name)(together[1], c))


@pytest.mark.parametrize("name", ["poincare_project", "poincare_exp0"])
def test_infinite_coordinates_make_their_point_nan(name):
    x = torch.tensor([[math.inf, 1.0], [0.1, 0.2], [math.nan, 1.0], [-math.inf, math.inf]])
    assert getattr(H, name)(x).isnan().tolist() == [[True, True], [False, False], [True, True], [True, True]]
