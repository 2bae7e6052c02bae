"""Integrators at the edges: times, adaptive steps, stale memory, bad input."""

import pytest
import torch

from decompositions import TT, LowRank, Tree, norm, scale, to_dense, transpose
from decompositions.geometry import gauges
from tnlayers.integrators import KroneckerField, OperatorField, integrate, kronecker_sum
from tnlayers.integrators.schemes import SCHEMES

F64, C128 = torch.float64, torch.complex128


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_times():
    """Short, long, far and empty spans take the steps asked for; the last time is the end."""
    net = LowRank.random(row_modes=(4,), col_modes=(3,), rank=2, dtype=F64, generator=generator(1))
    for t_span, steps in (((0.0, 1e-13), 100), ((1e5 + 0.1, 0.3), 1), ((1e6 + 0.1, 0.3), 3), ((1e7, 0.1), 10)):
        rate = 1 / (t_span[1] - t_span[0])
        done = integrate(lambda t, y, rate=rate: -rate * y, net, t_span, steps)
        assert len(done.times) == steps + 1
        assert done.times[-1] == t_span[1]
        assert float((to_dense(done.network) - to_dense(net) / 2.718281828459045).norm()) < 3e-2 * float(norm(net))
        adaptive = integrate(lambda t, y, rate=rate: -rate * y, net, t_span, steps, adaptive=1e-6)
        assert float((to_dense(adaptive.network) - to_dense(net) / 2.718281828459045).norm()) < 1e-4 * float(norm(net))
    still = integrate(lambda t, y: y, net, (1.0, 1.0), 3)
    assert still.times == (1.0,)
    assert not still.stopped


def test_adaptive_steps_start_from_zero_and_survive_overflow():
    zero = scale(LowRank.random(row_modes=(4,), col_modes=(3,), rank=2, dtype=F64), 0.0)
    assert len(integrate(lambda t, y: 0 * y, zero, (0.0, 1.0), 10, adaptive=1e-3).times) < 10
    with pytest.raises(ValueError, match="fell below rounding"):  # a jump, and nothing to compare it with
        integrate(lambda t, y: torch.ones_like(y) * (t > 0.5), zero, (0.0, 1.0), 10, adaptive=1e-3, tol=1e-8)
    net = LowRank.random(row_modes=(4,), col_modes=(3,), rank=2, dtype=F64, generator=generator(2))
    stiff = integrate(lambda t, y: -1e3 * y**5, net, (0.0, 10.0), 1, adaptive=1e-3, tol=1e-6, method="augmented")
    assert stiff.rejected > 0
    assert bool(torch.isfinite(to_dense(stiff.network)).all())


def test_euler_inside_makes_every_estimate_one_of_order_one():
    net = LowRank.random(row_modes=(5,), col_modes=(4,), rank=2, dtype=F64, generator=generator(3))
    options = {"adaptive": 1e-4, "substep": "euler", "tol": 1e-10, "method": "midpoint"}
    done = integrate(lambda t, y: -y, net, (0.0, 1.0), 10, **options)
    error = float((to_dense(done.network) - to_dense(net) / 2.718281828459045).norm())
    assert error < 2 * sum(done.errors)


def test_fields_keep_nothing_stale():
    """Messages along bonds follow in-place changes, another tree with the same cores, and gradients."""
    net = Tree.random(
        row_modes=(2, 2), col_modes=(2, 2), rank=2, tree=(0, 2, (1, 3)), dtype=F64, generator=generator(4)
    )
    net = gauges(net).net
    a = torch.randn(2, 2, dtype=F64, generator=generator(5))
    terms = [{0: a}, {1: a @ a}, {3: a.T}]

    def operator() -> OperatorField:
        return OperatorField(kronecker_sum(net, terms))

    for make in (operator, lambda: KroneckerField(terms)):
        field = make()
        for tree in (net, transpose(net), net):
            now, fresh = (f.restrict(tree, 0)(0.0, tree.cores[0]) for f in (field, make()))
            torch.testing.assert_close(now, fresh)
    moved = gauges(LowRank.random(row_modes=(4,), col_modes=(4,), rank=2, dtype=F64), 0).net
    field = KroneckerField([{1: torch.randn(4, 4, dtype=F64)}])
    before = field.restrict(moved, 0)(0.0, moved.cores[0])
    moved.cores[2].mul_(2)
    torch.testing.assert_close(field.restrict(moved, 0)(0.0, moved.cores[0]), 4 * before)
    with torch.no_grad():
        field.restrict(moved, 0)
    live = moved.replace([moved.cores[0], moved.cores[1], moved.cores[2].requires_grad_()])
    assert field.restrict(live, 0)(0.0, live.cores[0]).requires_grad


def test_a_function_that_writes_to_its_argument_spoils_nothing():
    net = TT([torch.ones(3, dtype=F64)])
    done = integrate(lambda t, y: y.mul_(-1.0), net, (0.0, 1.0), 20)
    assert torch.equal(net.cores[0], torch.ones(3, dtype=F64))
    assert float((done.network.cores[0] - 0.36788).abs().max()) < 1e-3


COMPLEX = torch.eye(4, dtype=C128) * 1j


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"field": None}, TypeError, "field must be a function"),
        ({"field": OperatorField}, TypeError, "field must be a function"),
        ({"field": lambda t, y: y * 1j}, ValueError, "the field must be real where Y is"),
        ({"field": KroneckerField([{0: COMPLEX}])}, ValueError, "must be real where Y is"),
        ({"field": KroneckerField([{}], factor=1j)}, ValueError, "the factor must be real where Y is"),
        ({"field": lambda t, y: y[:1]}, ValueError, "return a tensor like Y"),
        ({"field": lambda t, y: y.numpy()}, ValueError, "return a tensor like Y"),
        ({"field": lambda t, y: y * float("nan")}, ValueError, "not finite"),
        ({"t_span": (0.0,)}, ValueError, "t_span must be two numbers"),
        ({"t_span": 1.0}, ValueError, "t_span must be two numbers"),
        ({"t_span": (0.0, float("inf"))}, ValueError, "finite times"),
        ({"steps": 0}, ValueError, "at least one step"),
        ({"steps": 2.0}, ValueError, "at least one step"),
        ({"method": ["bug"]}, ValueError, "method must be one of"),
        ({"substep": "rk5"}, ValueError, "substep must be one of"),
        ({"tol": "a"}, ValueError, "integrate: tol must be a number"),
        ({"tol": True}, ValueError, "integrate: tol must be a number"),
        ({"theta": -1.0}, ValueError, "integrate: theta must be a number"),
        ({"adaptive": 0.0}, ValueError, "adaptive must be positive"),
        ({"max_rank": 0}, ValueError, "max_rank must be an int"),
        ({"method": "bug", "tol": 0.1}, ValueError, "keeps the ranks of y0"),
        ({"events": lambda t, y: False}, ValueError, "events must be a sequence"),
        ({"root": 7}, ValueError, "root must name one of the 3 cores"),
        ({"root": 1.0}, ValueError, "root must name one of the 3 cores"),
        ({"y0": torch.ones(3, 3)}, ValueError, "y0 must be a tree network"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, text):
    net = LowRank.random(row_modes=(4,), col_modes=(3,), rank=2, dtype=F64, generator=generator(1))
    given = {"field": lambda t, y: -y, "y0": net, "t_span": (0.0, 1.0), "steps": 2, **change}
    positional = [given.pop(name) for name in ("field", "y0", "t_span", "steps")]
    with pytest.raises(error, match=text):
        integrate(*positional, **given)


def test_nan_and_complex_operators_are_refused():
    net = LowRank.random(row_modes=(4,), col_modes=(4,), rank=2, dtype=F64, generator=generator(1))
    broken = net.replace([net.cores[0] * float("nan"), *net.cores[1:]])
    for method in SCHEMES:
        with pytest.raises(ValueError, match="y0 must be finite"):
            integrate(lambda t, y: -y, broken, (0.0, 1.0), 1, method=method)
    operator = kronecker_sum(net, [{0: COMPLEX}])
    with pytest.raises(ValueError, match="operator must be real where Y is"):
        integrate(OperatorField(operator), net, (0.0, 1.0), 1)
    with pytest.raises(ValueError, match="factor must be real where Y is"):
        integrate(OperatorField(kronecker_sum(net, [{0: torch.eye(4)}]), -1j), net, (0.0, 1.0), 1)
    turned = kronecker_sum(net, [{0: torch.eye(4, dtype=F64)}], coefficients=[torch.tensor(1j)])
    assert turned.dtype == C128
    assert abs(float(norm(turned)) - 4) < 1e-12
    with pytest.raises(TypeError, match="terms must be mappings"):
        kronecker_sum(net, {0: torch.eye(4)})


def test_long_chains_and_half_precision():
    net = TT.random(row_modes=(2,) * 400, rank=2, dtype=F64, generator=generator(1))
    net = scale(net, 1 / float(norm(net)))
    field = OperatorField(kronecker_sum(net, [{k: torch.diag(torch.tensor([0.1, -0.1]))} for k in range(0, 400, 100)]))
    assert abs(float(norm(integrate(field, net, (0.0, 0.01), 1, tol=1e-6).network)) - 1) < 0.1
    half = LowRank.random(row_modes=(8,), col_modes=(6,), rank=2, generator=generator(1)).to(torch.bfloat16)
    for method in SCHEMES:
        done = integrate(lambda t, y: -y, half, (0.0, 1.0), 4, method=method)
        assert done.network.dtype == torch.bfloat16
        assert float((to_dense(done.network).float() - to_dense(half).float() / 2.718).norm()) < 0.2


def test_max_rank_alone_does_not_grow():
    net = LowRank.random(row_modes=(9,), col_modes=(9,), rank=3, dtype=F64, generator=generator(1))
    drive = torch.randn(9, 9, dtype=F64, generator=generator(2))
    assert integrate(lambda t, y: drive, net, (0.0, 1.0), 3, max_rank=9).ranks[-1] == (3, 3)
    assert integrate(lambda t, y: drive, net, (0.0, 1.0), 3, max_rank=2).ranks[-1] == (2, 2)


def test_splitting_of_a_matrix_asks_three_times():
    """K, -S, L as published: the middle core of LowRank takes no steps of its own."""
    net = LowRank.random(row_modes=(5,), col_modes=(4,), rank=2, dtype=F64, generator=generator(1))
    for method, wanted in (("splitting", 3), ("strang", 6), ("bug", 3)):
        calls = []
        integrate(lambda t, y, calls=calls: calls.append(t) or -y, net, (0.0, 0.1), 1, method=method, substep="euler")
        assert len(calls) == wanted, method
