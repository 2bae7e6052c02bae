"""Integrators on trees as mathematics: exactness, order, conservation, descent, robustness."""

from functools import lru_cache, partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from decompositions import (
    TT,
    LowRank,
    Network,
    Tree,
    TruncationWarning,
    TTMatrix,
    Tucker,
    add,
    inner,
    norm,
    scale,
    to_dense,
)
from decompositions import round as cut
from decompositions.geometry import gauges, project
from tnlayers.integrators import DenseField, KroneckerField, OperatorField, integrate, kronecker_sum
from tnlayers.integrators.bug import _augmented
from tnlayers.integrators.integrate import default_root
from tnlayers.integrators.parallel import _parallel, parallel, widen
from tnlayers.integrators.schemes import SCHEMES
from tnlayers.integrators.steps import SUBSTEPS, Stepper, Truncate

F64, C128 = torch.float64, torch.complex128
SHAPES = {
    "low-rank": partial(LowRank.random, row_modes=(9,), col_modes=(7,), rank=3),
    "tucker": partial(Tucker.random, row_modes=(5, 4), col_modes=(6,), rank=(2, 3, 2)),
    "tucker2": partial(Tucker.random, row_modes=(6,), col_modes=(5, 2, 2), rank=(3, 2), modes=(0, 1)),
    "tt": partial(TT.random, row_modes=(4, 3), col_modes=(3, 4), rank=2),
    "tt-matrix": partial(TTMatrix.random, row_modes=(3, 2, 2), col_modes=(2, 3, 2), rank=2),
    "binary": partial(Tree.random, row_modes=(3, 4), col_modes=(4, 3), rank=2),
    "degree-four": partial(
        Tree.random, row_modes=(3, 2), col_modes=(2, 3, 3), rank=2, tree=(((0,), 1), (2,), (3,), (4,))
    ),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ill_conditioned(shape, ratio: float, seed: int = 0) -> Network:
    """A tree of the shape whose bonds have singular values from 1 down to `ratio`."""
    big = shape(dtype=F64, generator=generator(seed))
    net = gauges(cut(big)).net
    cores = list(net.cores)
    for k, core in enumerate(cores):
        for axis, label in enumerate(net.legs[k]):
            if label in net.bonds and k == min(j for j, leg in enumerate(net.legs) if label in leg):
                size = core.shape[axis]
                values = (
                    torch.logspace(0, torch.log10(torch.tensor(ratio)).item(), size, dtype=F64)
                    if size > 1
                    else torch.ones(1, dtype=F64)
                )
                view = [1] * core.ndim
                view[axis] = size
                cores[k] = cores[k] * values.reshape(view)
    made = net.replace(cores)
    return scale(made, 1 / float(norm(made)))


@shapes
@pytest.mark.parametrize("method", ["splitting", "bug", "augmented", "corrected"])
def test_exact_where_the_solution_has_the_rank(shape, method):
    """Theorem of exactness, at sigma_min / sigma_max = 1e-9: increments of a path of trees of these ranks."""
    path = [ill_conditioned(shape, 1e-9)]
    turned = path[0]
    for k in range(3):
        cores = list(turned.cores)
        for v, leg in enumerate(turned.legs):
            for axis, label in enumerate(leg):
                if label in turned.outside:
                    n = cores[v].shape[axis]
                    a = torch.randn(n, n, dtype=F64, generator=generator(10 * k + axis))
                    q = torch.linalg.matrix_exp(0.3 * (a - a.T))
                    cores[v] = torch.tensordot(cores[v], q, dims=([axis], [1])).movedim(-1, axis)
        turned = turned.replace(cores)
        path.append(turned)
    points = [to_dense(net) for net in path]

    def field(t: float, y: Tensor) -> Tensor:
        k = min(int(t + 1e-9), 2)
        return points[k + 1] - points[k]

    done = integrate(field, path[0], (0.0, 3.0), 3, method=method, substep="euler")
    assert float((to_dense(done.network) - points[-1]).norm()) <= 1e-13


def test_parallel_is_not_exact_but_of_local_order_two():
    shape = SHAPES["low-rank"]
    start = ill_conditioned(shape, 1e-3)
    errors = []
    for h in (0.1, 0.05, 0.025):
        a, b = (torch.randn(n, n, dtype=F64, generator=generator(n)) for n in start.shape)
        left, right = (torch.linalg.matrix_exp(h * (m - m.T)) for m in (a, b))
        end = left @ to_dense(start) @ right.T
        increment = (end - to_dense(start)) / h
        done = integrate(lambda t, y, d=increment: d, start, (0.0, h), 1, method="parallel", substep="euler")
        errors.append(float((to_dense(done.network) - end).norm()))
    assert errors[0] > 1e-4
    assert all(1.7 < a / b / 2 < 2.4 for a, b in pairwise(errors))


@shapes
def test_untruncated_parallel_euler_step_is_the_projected_step(shape):
    net = cut(shape(dtype=F64, generator=generator(1)))
    g = torch.randn(net.shape, dtype=F64, generator=generator(2))
    h = 0.37
    for root in range(len(net.cores)):
        step = Stepper(DenseField(lambda t, y: -g), SUBSTEPS["euler"], Truncate(0.0, None, None), root)
        made = SCHEMES["parallel"](step, net, 0.0, h)
        want = to_dense(net) - h * project(gauges(net, root), g).to_dense()
        assert float((to_dense(made) - want).norm()) <= 1e-13 * float(want.norm())


@shapes
def test_truncation_at_zero_changes_nothing(shape):
    net = shape(dtype=F64, generator=generator(3))
    still = integrate(lambda t, y: 0 * y, net, (0.0, 1.0), 2, method="augmented", tol=0.0)
    assert float((to_dense(still.network) - to_dense(net)).norm()) <= 1e-14 * float(norm(net))


@shapes
@pytest.mark.parametrize("method", list(SCHEMES))
def test_every_method_follows_a_smooth_flow(shape, method):
    """A linear flow of Kronecker structure, whose exact solution keeps the ranks; dense and operator fields agree."""
    net = cut(shape(dtype=F64, generator=generator(4)))
    order = len(net.shape)
    matrices = [torch.randn(n, n, dtype=F64, generator=generator(n + 7)) / n for n in net.shape]
    operator = kronecker_sum(net, [{k: m} for k, m in enumerate(matrices)])
    field = OperatorField(operator)
    exact = to_dense(net)
    for k in range(order):
        flow = torch.linalg.matrix_exp(0.5 * matrices[k])
        exact = torch.tensordot(exact, flow, dims=([k], [1])).movedim(-1, k)
    options = {} if method in ("splitting", "strang", "bug") else {"tol": 1e-9}
    errors = []
    for steps in (4, 8):
        done = integrate(field, net, (0.0, 0.5), steps, method=method, **options)
        dense = integrate(DenseField(field), net, (0.0, 0.5), steps, method=method, **options)
        assert float((to_dense(done.network) - to_dense(dense.network)).norm()) <= 1e-9 * float(exact.norm())
        errors.append(float((to_dense(done.network) - exact).norm() / exact.norm()))
    assert errors[1] < 0.2
    assert errors[1] <= errors[0] * 0.7 or errors[1] < 1e-5


def potential(n: int) -> tuple[Tensor, Tensor]:
    """The discrete Schroedinger problem: tridiagonal kinetic part, cosine potential."""
    d = (2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)).to(F64) / 2
    j = torch.arange(-n // 2, n - n // 2, dtype=F64)
    return d, torch.diag(1 - torch.cos(2 * torch.pi * j / n))


def schroedinger(n: int = 100, ratio: float = 0.1):
    d, v = potential(n)
    d, v = d.to(C128), v.to(C128)

    def field(t: float, y: Tensor) -> Tensor:
        return -1j * (d @ y + y @ d.T + v @ y @ v)

    u, w = (torch.linalg.qr(torch.randn(n, 8, dtype=C128, generator=generator(k))).Q for k in (1, 2))
    s = torch.diag(ratio ** torch.arange(8, dtype=F64)).to(C128)
    return field, LowRank(u, s / s.norm(), w), (d, v)


@lru_cache
def reference(ratio: float) -> Tensor:
    """Dense Runge-Kutta, fine enough for 1e-10."""
    field, start, _ = schroedinger(ratio=ratio)
    y, h = to_dense(start), 1 / 800
    for _ in range(800):
        y = SUBSTEPS["rk4"](field, y, 0.0, h)
    return y


def observed(method: str, steps: tuple[int, ...], theta: float, ratio: float = 0.1) -> list[float]:
    field, start, _ = schroedinger(ratio=ratio)
    errors = []
    for n in steps:
        if method == "parallel":  # the order is that of the plain scheme: repeated steps make errors small, irregular
            made = plain_parallel(DenseField(field), start, n, theta / n)
        else:
            options = {} if method in ("splitting", "strang", "bug") else {"theta": theta / n}
            made = integrate(field, start, (0.0, 1.0), n, method=method, **options).network
        errors.append(float((to_dense(made) - reference(ratio)).norm()))
    return errors


def plain_parallel(field, net: Network, n: int, theta: float, retries: int = 0) -> Network:
    step = Stepper(field, SUBSTEPS["rk4"], Truncate(None, theta, None), default_root(net))
    for k in range(n):
        net = parallel(step, net, k / n, 1 / n, retries=retries)
    return net


def orders(errors: list[float]) -> list[float]:
    return [float(torch.log2(torch.tensor(a / b))) for a, b in pairwise(errors)]


@pytest.mark.parametrize(
    ("method", "steps", "theta", "low", "high"),
    [
        ("parallel", (20, 40, 80), 1e-5, 0.9, 1.1),
        ("parallel2", (20, 40, 80), 1e-6, 1.8, 2.25),
        ("midpoint", (5, 10, 20), 1e-6, 1.8, 9.0),
        ("augmented", (20, 40, 80), 1e-5, 0.9, 9.0),
        ("corrected", (20, 40, 80), 1e-5, 0.9, 9.0),
    ],
)
def test_order_on_the_schroedinger_problem(method, steps, theta, low, high):
    errors = observed(method, steps, theta)
    assert all(low <= slope <= high for slope in orders(errors)), (errors, orders(errors))


@pytest.mark.parametrize("method", ["augmented", "parallel", "midpoint", "corrected"])
def test_errors_do_not_grow_with_small_singular_values(method):
    sizes = [observed(method, (20,), 1e-6, ratio)[0] for ratio in (0.5, 0.03)]  # smallest: 1e-2 and 1e-10
    assert sizes[1] <= 2 * sizes[0] + 1e-4


def test_conservation_of_the_augmented_scheme():
    field, start, (d, v) = schroedinger()
    start = scale(start, 1 / float(norm(start)))

    def energy(y: Tensor) -> float:
        return float(torch.vdot(y.reshape(-1), (d @ y + y @ d.T + v @ y @ v).reshape(-1)).real)

    y0 = to_dense(start)
    done = integrate(field, start, (0.0, 1.0), 100, method="augmented", theta=1e-8)
    y = to_dense(done.network)
    assert abs(float(y.norm()) - float(y0.norm())) <= 1e-8
    assert abs(energy(y) - energy(y0)) <= 1e-7
    fixed = to_dense(integrate(field, start, (0.0, 1.0), 100, method="bug").network)
    assert abs(float(fixed.norm()) - float(y0.norm())) > 1e-5  # the test tells schemes apart


def masked(n: int = 30, m: int = 20):
    """0.5 ‖M (W - T)‖^2 with M in [0.5, 1.5]: gradient and Lipschitz constant are known."""
    mask = 0.5 + torch.rand(n, m, dtype=F64, generator=generator(5))
    u, v = (torch.linalg.qr(torch.randn(k, 10, dtype=F64, generator=generator(k))).Q for k in (n, m))
    target = u @ torch.diag(0.5 ** torch.arange(10, dtype=F64)) @ v.T

    def loss(y: Tensor) -> float:
        return float((mask * (y - target)).square().sum() / 2)

    return loss, lambda t, y: -(mask.square() * (y - target)), float(mask.square().max())


@pytest.mark.parametrize("method", ["augmented", "parallel"])
def test_descent_before_truncation(method):
    """No violation in 400 steps of size 1 / Lipschitz: the loss before truncation is below the loss before the step."""
    loss, field, lipschitz = masked()
    net = LowRank.random(row_modes=(30,), col_modes=(20,), rank=3, dtype=F64, generator=generator(6))
    h = 1 / lipschitz
    step = Stepper(DenseField(field), SUBSTEPS["euler"], Truncate(0.05, None, None), 1)
    for _ in range(400):
        before = loss(to_dense(net))
        if method == "augmented":
            free = _augmented(step, net, 0.0, h)
        else:
            free = _parallel(step, gauges(net, 1), 0.0, h).to_network(point=True)
        assert loss(to_dense(free)) <= before + 1e-15
        net = step.truncate(free, 1)


def test_wider_gauges_represent_the_same_point():
    """Bases on both sides of every bond begin with the old ones, stay orthonormal, and Y0 is not changed."""
    for shape in SHAPES.values():
        net = cut(shape(dtype=F64, generator=generator(8)))
        at = gauges(net)
        xi = project(at, torch.randn(net.shape, dtype=F64, generator=generator(9)))
        wide = widen(xi)
        assert float((to_dense(wide.net) - to_dense(net)).norm()) <= 1e-13 * float(norm(net))
        for edge in wide.edges:
            for core, own in ((wide.up[edge.child], edge.child), (wide.down[edge.child], edge.parent)):
                assert core is not None
                matrix = core.movedim(wide.axis(own, edge.bond), -1).flatten(0, -2)
                eye = torch.eye(matrix.shape[1], dtype=F64)
                assert float((matrix.T @ matrix - eye).norm()) <= 1e-12
        for v in range(len(net.cores)):
            assert float((to_dense(wide.centered(v)) - to_dense(net)).norm()) <= 1e-12 * float(norm(net))


def ising(d: int, tree: Network) -> Network:
    """Long-range transverse Ising: sum_{i<j} Z_i Z_j / |i - j| + sum_i X_i."""
    x, z = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64), torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=F64)
    terms = [{i: z, j: z} for i in range(d) for j in range(i + 1, d)] + [{i: x} for i in range(d)]
    strength = [1.0 / (j - i) for i in range(d) for j in range(i + 1, d)] + [1.0] * d
    return kronecker_sum(tree, terms, coefficients=strength)


def coupled(shape, n: int, d: int) -> tuple[Network, OperatorField, Tensor]:
    """D particles on n points with pairwise coupling, singular values of the start down to 1e-4; the exact solution."""
    net = ill_conditioned(shape, 1e-4).to(C128)
    k, v = potential(n)
    terms = [{a: k} for a in range(d)] + [{a: v, b: v} for a in range(d) for b in range(a + 1, d)]
    strength = [0.05] * d + [0.125] * (d * (d - 1) // 2)
    field = OperatorField(kronecker_sum(net, terms, coefficients=strength), -1j)
    h = to_dense(field.operator).reshape(n**d, n**d)
    values, vectors = torch.linalg.eigh((h + h.T) / 2)
    vectors = vectors.to(C128)
    exact = vectors @ (torch.exp(-1j * values) * (vectors.mH @ to_dense(net).reshape(-1)))
    return net, field, exact.reshape(net.shape)


PROBLEMS = {
    "tucker": (partial(Tucker.random, row_modes=(10,) * 3, rank=3), 10, 3),
    "tt": (partial(TT.random, row_modes=(6,) * 4, rank=3), 6, 4),
    "tree": (partial(Tree.random, row_modes=(6,) * 4, rank=3), 6, 4),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
@pytest.mark.parametrize(
    ("method", "steps", "low", "high"),
    [("parallel2", (20, 40), 1.8, 2.2), ("midpoint", (5, 10), 1.8, 9.0), ("augmented", (10, 40), 0.9, 9.0)],
)
def test_order_on_trees(problem, method, steps, low, high):
    net, field, exact = coupled(*problem)
    errors = []
    for n in steps:
        done = integrate(field, net, (0.0, 1.0), n, method=method, theta=1e-6 / n)
        errors.append(float((to_dense(done.network) - exact).norm()))
    slope = orders(errors)[0] / float(torch.log2(torch.tensor(steps[1] / steps[0])))
    assert low <= slope <= high, (errors, slope)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_parallel_is_of_order_one_on_trees_and_repeated_steps_help(problem):
    net, field, exact = coupled(*problem)

    def error(n: int, retries: int) -> float:
        return float((to_dense(plain_parallel(field, net, n, 1e-6 / n, retries)) - exact).norm())

    errors = [error(n, 0) for n in (10, 20, 40)]
    assert all(0.9 <= slope <= 1.1 for slope in orders(errors)), errors
    assert error(20, 3) < errors[1] / 10


def test_long_range_ising_from_a_product_state():
    """Eight sites, TT and tree: ranks grow from 1, the energy stays; the first step misses what no basis holds yet."""
    for format in (TT, Tree):
        start = format.random(row_modes=(2,) * 8, rank=1, dtype=C128, generator=generator(3))
        start = scale(start, 1 / float(norm(start)))
        operator = ising(8, start)
        h = to_dense(operator).reshape(256, 256)
        exact = torch.linalg.matrix_exp(-0.2j * h.to(C128)) @ to_dense(start).reshape(-1)
        done = integrate(OperatorField(operator, -1j), start, (0.0, 0.2), 40, method="midpoint", theta=1e-8)
        y = to_dense(done.network).reshape(-1)
        assert float((y - exact).norm()) <= 2e-3
        assert done.ranks[0] == (1,) * len(start.bonds)
        assert max(done.ranks[-1]) >= 4
        energy = [float(torch.vdot(z, h.to(C128) @ z).real) for z in (to_dense(start).reshape(-1), y)]
        assert energy[0] == pytest.approx(energy[1], abs=2e-3)


def test_kronecker_sum_is_the_sum():
    net = Tree.random(row_modes=(2, 3, 2), rank=2, dtype=F64)
    a, b = torch.randn(2, 2, dtype=F64), torch.randn(3, 3, dtype=F64)
    op = to_dense(kronecker_sum(net, [{0: a, 1: b}, {2: a}], coefficients=[2.0, -1.0])).reshape(12, 12)
    eye2, eye3 = torch.eye(2, dtype=F64), torch.eye(3, dtype=F64)
    want = 2 * torch.kron(torch.kron(a, b), eye2) - torch.kron(torch.kron(eye2, eye3), a)
    assert float((op - want).norm()) <= 1e-12 * float(want.norm())


def test_adaptive_steps_meet_the_error_and_events_stop():
    field, start, _ = schroedinger(30)
    done = integrate(field, start, (0.0, 1.0), 4, method="midpoint", theta=1e-8, adaptive=1e-4)
    assert done.times[-1] == pytest.approx(1.0)
    assert max(done.errors) <= 1e-4 * 1.001
    assert len(done.ranks) == len(done.times) == len(done.errors) + 1
    early = integrate(field, start, (0.0, 1.0), 10, method="bug", events=[lambda t, y: t > 0.35])
    assert early.stopped
    assert early.times[-1] == pytest.approx(0.4)
    back = integrate(
        field, integrate(field, start, (0.0, 0.5), 50, method="strang").network, (0.5, 0.0), 50, method="strang"
    )
    assert float((to_dense(back.network) - to_dense(start)).norm()) <= 1e-4


def test_max_rank_caps_and_ranks_grow_by_tolerance():
    field, start, _ = schroedinger(30)
    grown = integrate(field, start, (0.0, 0.5), 10, method="augmented", tol=1e-6)
    assert max(grown.network.ranks) > max(start.ranks)
    with pytest.warns(match="tolerance"):
        capped = integrate(field, start, (0.0, 0.5), 10, method="augmented", tol=1e-6, max_rank=9)
    assert max(max(r) for r in capped.ranks) <= 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, "method must be one of"),
        ({"substep": "rk5"}, "substep must be one of"),
        ({"steps": 0}, "at least one step"),
        ({"t_span": (0.0, float("nan"))}, "finite times"),
        ({"method": "bug", "tol": 1e-3}, "keeps the ranks of y0"),
        ({"tol": -1.0}, "tol must be a number >= 0"),
        ({"adaptive": 0.0}, "adaptive must be positive"),
        ({"max_rank": 0}, "max_rank must be an int"),
        ({"field": lambda t, y: y[:1]}, "return a tensor like Y"),
        ({"y0": torch.ones(3, 3)}, "must be a tree network"),
        ({"field": lambda t, y: y * float("inf")}, "not finite"),
    ],
)
def test_refusals(options, message):
    net = LowRank.random(row_modes=(4,), col_modes=(5,), rank=2, dtype=F64)
    arguments = {"field": lambda t, y: -y, "y0": net, "t_span": (0.0, 1.0), "steps": 2} | options
    with pytest.raises(ValueError, match=message):
        integrate(**arguments)


def test_operator_on_another_tree_is_refused():
    net = TT.random(row_modes=(2, 2, 2), rank=2, dtype=F64)
    other = kronecker_sum(Tucker.random(row_modes=(2, 2, 2), rank=2, dtype=F64), [{0: torch.eye(2)}])
    with pytest.raises(ValueError, match="on the tree of Y"):
        integrate(OperatorField(other), net, (0.0, 1.0), 1)
    assert float(inner(net, add(net, net))) == pytest.approx(2 * float(inner(net, net)))


@shapes
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_a_field_of_kronecker_terms_is_its_dense_field_at_every_core(shape, dtype):
    net = cut(shape(dtype=dtype, generator=generator(5)))
    last = len(net.shape) - 1
    a = [torch.randn(n, n, dtype=dtype, generator=generator(n + k)) for k, n in enumerate(net.shape)]
    terms = [{}, {0: a[0]}, {last: a[last]}, {0: a[0], last: a[last].to_sparse_coo()}, dict(enumerate(a))]
    coefficients = [0.5, 2.0, -1.0, 1.5, 0.25]
    field = KroneckerField(terms, coefficients=coefficients, factor=lambda t: 1 + t)
    dense_terms = [{k: m.to_dense() for k, m in term.items()} for term in terms]
    operator = OperatorField(kronecker_sum(net, dense_terms, coefficients=coefficients), lambda t: 1 + t)
    dense = DenseField(field)
    for root in range(len(net.cores)):
        at = gauges(net, root)
        for v in range(len(net.cores)):
            tree = at.centered(v)
            want = dense.restrict(tree, v)(0.3, tree.cores[v])
            for found in (field, operator):
                got = found.restrict(tree, v)(0.3, tree.cores[v])
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_kronecker_field_refuses_what_does_not_fit():
    eye = torch.eye(3, dtype=F64)
    net = LowRank.random(row_modes=(3,), col_modes=(4,), rank=2, dtype=F64)
    with pytest.raises(ValueError, match="at least one term"):
        KroneckerField([])
    with pytest.raises(ValueError, match="one coefficient a term"):
        KroneckerField([{0: eye}], coefficients=[1.0, 2.0])
    for term in ({1: eye}, {2: eye}, {-1: eye}):
        with pytest.raises(ValueError, match="square matrices of the modes"):
            integrate(KroneckerField([term]), net, (0.0, 1.0), 1)


def test_a_binding_cap_is_said_once_for_a_run():
    net = LowRank.random(row_modes=(8,), col_modes=(8,), rank=4, dtype=F64, generator=generator(1))
    drive = torch.randn(8, 8, dtype=F64, generator=generator(2))
    with pytest.warns(TruncationWarning, match="3 of 3 steps.*max_rank=4 binds") as caught:
        integrate(lambda t, y: drive, net, (0.0, 1.0), 3, tol=1e-8, max_rank=4)
    assert len(caught) == 1


@shapes
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_that_misses_the_field_is_repeated_on_every_tree(shape, sign):
    """A constant field normal to both sides of every bond: invisible to the plain step, found by repeating it."""
    net = cut(shape(dtype=F64, generator=generator(6)))
    net = scale(net, 1 / float(norm(net)))
    drive = torch.randn(net.shape, dtype=F64, generator=generator(7))
    want = to_dense(net) + 0.1 * drive
    t_span = (0.0, 0.1) if sign > 0 else (0.1, 0.0)
    for root in range(len(net.cores)):
        step = Stepper(DenseField(lambda t, y: sign * drive), SUBSTEPS["rk4"], Truncate(None, 1e-6, None), root)
        plain = parallel(step, net, t_span[0], t_span[1] - t_span[0], retries=0)
        missed = float((to_dense(plain) - want).norm())
        for cap in (None, 100):
            made = integrate(
                lambda t, y: sign * drive, net, t_span, 1, method="parallel", theta=1e-6, root=root, max_rank=cap
            )
            assert float((to_dense(made.network) - want).norm()) < max(0.5 * missed, 1e-5)
