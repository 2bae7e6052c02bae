"""Differentiable cross: exact on its cross, true gradients at frozen pivots, and only the entries of the cross."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from cross_approx import DifferentiableCross, as_source, differentiable_cross
from cross_approx.differentiable import SingularCrossing, interpolation
from cross_approx.frozen import FrozenCross, frozen_cross
from decompositions import TT, to_dense

F64, C128 = torch.float64, torch.complex128


def gather(x):
    return lambda index: x[tuple(index.unbind(1))]


def total(network):
    return to_dense(network).sum()


def crossed(pivots, shape):
    """Every multi-index of the cross, by loops over the definition."""
    d = len(shape)
    before = [[()], *(p.tolist() for p in pivots[: d - 1])]
    after = [*(p.tolist() for p in pivots[d - 1 :]), [()]]
    return [
        (*left, i, *right)
        for k in range(d)
        for left, i, right in itertools.product(before[k], range(shape[k]), after[k])
    ]


class Counting:
    """A callable that counts its rows, those with and those without gradient."""

    def __init__(self, function):
        self.function, self.without, self.with_, self.largest = function, 0, [], 0

    def __call__(self, index):
        self.largest = max(self.largest, len(index))
        if torch.is_grad_enabled():
            self.with_ += [tuple(row) for row in index.tolist()]
        else:
            self.without += len(index)
        return self.function(index)


# --- the interpolant ---


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((7,), 1), ((6, 9), 3), ((1, 1, 1), 1), ((4, 5, 6, 3), 4), ((3, 4, 3, 4, 3), 6), ((2,) * 10, 5)],
)
@pytest.mark.parametrize("dtype", [F64, C128])
def test_exact_at_the_true_rank(shape, rank, dtype, rng):
    net = TT.random(row_modes=shape, rank=rank, generator=rng, dtype=dtype)
    x = to_dense(net)
    result = differentiable_cross(x, tol=1e-11, generator=rng)
    assert result.converged, result.reason
    assert (to_dense(result.network) - x).norm() <= 1e-10 * x.norm()
    assert result.network.ranks == net.ranks
    assert all(core.abs().max() <= 1.01 + 1e-9 for core in result.network.cores[:-1])


def test_interpolates_on_the_cross_what_it_does_not_resolve(rng):
    """At a rank below the tensor's, and after the tensor has changed altogether: exact on every fiber of the cross."""
    shape = (5, 4, 6, 3)
    x, y = torch.randn(2, *shape, generator=rng, dtype=F64)
    pivots = differentiable_cross(x, rank=(3, 4, 2), generator=rng, max_sweeps=4).pivots
    for tensor in (x, y):
        result = differentiable_cross(tensor, pivots=pivots)
        dense = to_dense(result.network)
        index = torch.tensor(crossed(pivots, shape)).unbind(1)
        assert (dense[index] - tensor[index]).abs().max() < 1e-9
        assert (dense - tensor).norm() > 0.1 * tensor.norm()
        cross = FrozenCross.of_pivots("test", pivots, shape)
        for k, core in enumerate(result.network.cores[:-1]):
            selected = core.reshape(-1, core.shape[-1])[cross.rows(k)]
            assert torch.equal(selected, torch.eye(len(selected), dtype=F64))


def test_known_ranks():
    def field(index):
        return torch.sin(0.4 * index[:, 0]) + index[:, 1] ** 2 / 9 - torch.exp(-0.2 * index[:, 2]) + index[:, 3] % 3

    sums = differentiable_cross(lambda i: field(i.double()), shape=(9, 8, 7, 6), tol=1e-10)
    assert sums.network.ranks == (2, 2, 2)
    sines = differentiable_cross(lambda i: torch.sin(0.3 * i.double().sum(1)), shape=(2,) * 16, tol=1e-10)
    assert sines.network.ranks == (2,) * 15
    assert sums.converged
    assert sines.converged


def test_the_pivots_of_a_train_make_it_interpolate(rng):
    net = TT.random(row_modes=(6, 5, 4, 7), rank=(3, 6, 4), generator=rng, dtype=F64)
    cross = frozen_cross(net, 1e-12)
    assert [block[2] for block in cross.blocks] == [3, 6, 4, 1]
    index = torch.cat(list(cross.batches(7)))
    assert [tuple(row) for row in index.tolist()] == crossed(cross.pivots, net.shape)
    assert len(index) == cross.numel == 1 * 6 * 3 + 3 * 5 * 6 + 6 * 4 * 4 + 4 * 7 * 1
    x = to_dense(net)
    assert (to_dense(differentiable_cross(x, pivots=cross.pivots).network) - x).norm() < 1e-12 * x.norm()


# --- gradients ---


@pytest.mark.parametrize("dtype", [F64, C128])
def test_gradcheck_of_the_selected_inverse(dtype, rng):
    fibers = torch.randn(9, 3, generator=rng, dtype=dtype)
    rows = torch.tensor([7, 0, 4])
    assert torch.equal(interpolation(fibers, rows)[rows], torch.eye(3, dtype=dtype))
    assert (interpolation(fibers, rows) @ fibers[rows] - fibers).norm() < 1e-12
    fibers.requires_grad_()
    assert gradcheck(lambda v: interpolation(v, rows), fibers)
    assert gradgradcheck(lambda v: interpolation(v, rows), fibers)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_gradcheck_with_respect_to_a_tensor_in_memory(dtype, rng):
    shape = (3, 4, 3)
    x = torch.randn(shape, generator=rng, dtype=dtype)
    pivots = differentiable_cross(x, rank=2, generator=rng, max_sweeps=3).pivots
    weights = torch.randn(shape, generator=rng, dtype=dtype)

    def loss(x):
        return (to_dense(differentiable_cross(as_source(x), pivots=pivots).network) * weights).abs().square().sum()

    x.requires_grad_()
    assert gradcheck(loss, x)
    assert gradgradcheck(loss, x)
    (gradient,) = torch.autograd.grad(loss(x), x)
    on_cross = torch.zeros(shape, dtype=torch.bool)
    on_cross[torch.tensor(crossed(pivots, shape)).unbind(1)] = True
    assert (gradient != 0).any()
    assert (gradient[~on_cross] == 0).all()


def test_gradient_at_the_true_rank_is_that_of_the_tensor(rng):
    """A family of tensors of rank 2 is reproduced wherever the parameter is, so its derivative is too."""
    frequency = torch.tensor(0.3, dtype=F64, requires_grad=True)
    shape = (6, 7, 8)

    def field(index):
        return torch.sin(frequency * index.sum(1))

    grid = torch.cartesian_prod(*(torch.arange(n) for n in shape))
    weights = torch.randn(shape, generator=rng, dtype=F64)
    network = differentiable_cross(field, shape=shape, tol=1e-11, generator=rng).network
    loss, truth = ((weights * dense).square().sum() for dense in (to_dense(network), field(grid).reshape(shape)))
    for _ in range(2):
        (got,) = torch.autograd.grad(loss, frequency, create_graph=True)
        (expected,) = torch.autograd.grad(truth, frequency, create_graph=True)
        assert got.item() == pytest.approx(expected.item(), rel=1e-8)
        loss, truth = got, expected


def test_gradients_reach_the_parameters_of_an_encoder(rng):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    shape = (6, 6, 6)

    def field(index):
        return encoder(index.double() / 6)[:, 0]

    pivots = differentiable_cross(field, shape=shape, rank=3, generator=rng).pivots
    gradients = []
    for options in ({}, {"batch": 5}, {"batch": 7, "checkpoint": True}):
        counted = Counting(field)
        loss = total(differentiable_cross(counted, shape=shape, pivots=pivots, **options).network).square()
        assert counted.largest <= options.get("batch", 1000)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, encoder.parameters())]))
    assert gradients[0].norm() > 0
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-10 * gradients[0].norm()
    # along one direction of the parameters against differences, the pivots frozen
    direction = [torch.randn(p.shape, generator=rng, dtype=F64) for p in encoder.parameters()]
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, change in zip(encoder.parameters(), direction, strict=True):
                p += step * change
            values.append(total(differentiable_cross(field, shape=shape, pivots=pivots).network).square())
            for p, change in zip(encoder.parameters(), direction, strict=True):
                p -= step * change
    slope = sum(
        (g * change).sum()
        for g, change in zip(
            torch.autograd.grad(
                total(differentiable_cross(field, shape=shape, pivots=pivots).network).square(), encoder.parameters()
            ),
            direction,
            strict=True,
        )
    )
    assert slope.item() == pytest.approx((values[0] - values[1]).item() / 2e-5, rel=1e-5)


# --- what is evaluated and kept ---


def test_only_the_entries_of_the_cross_are_evaluated_with_gradient(rng):
    shape = (8, 7, 6, 5)
    x = to_dense(TT.random(row_modes=shape, rank=3, generator=rng, dtype=F64))
    counted = Counting(gather(x.clone().requires_grad_()))
    result = differentiable_cross(counted, shape=shape, tol=1e-9, generator=rng)
    r = (1, *result.network.ranks, 1)
    assert len(counted.with_) == sum(r[k] * shape[k] * r[k + 1] for k in range(4))
    assert counted.with_ == crossed(result.pivots, shape)
    assert result.evaluations == len(counted.with_) + counted.without
    assert result.bytes_read == 8 * result.evaluations

    again = Counting(counted.function)
    fixed = differentiable_cross(again, shape=shape, pivots=result.pivots)
    assert (len(again.with_), again.without) == (fixed.evaluations, 0)
    assert fixed.error != fixed.error
    assert (fixed.held_out, fixed.converged, fixed.history) == (0, False, ())

    again = Counting(counted.function)
    fixed = differentiable_cross(again, shape=shape, pivots=result.pivots, held_out=100, generator=rng)
    assert 90 < again.without == fixed.evaluations - len(again.with_) <= fixed.held_out == 100
    assert fixed.converged


def test_held_out_entries_are_none_of_the_cross(rng):
    """A tensor that is exact on the cross and wrong elsewhere is seen to be wrong."""
    shape = (10, 10, 10)
    x = to_dense(TT.random(row_modes=shape, rank=2, generator=rng, dtype=F64))
    pivots = differentiable_cross(x, tol=1e-10, generator=rng).pivots
    other = x + 1.0
    index = torch.tensor(crossed(pivots, shape)).unbind(1)
    other[index] = x[index]
    result = differentiable_cross(other, pivots=pivots, held_out=200, generator=rng)
    assert not result.converged
    outside = torch.ones(shape, dtype=torch.bool)
    outside[index] = False
    assert result.error > 0.2 / float(other[outside].square().mean().sqrt())


def test_memory_of_a_graph_is_that_of_the_cross(rng):
    """With checkpointing no call leaves more than its index and values behind."""
    kept = []

    def wide(index):
        return torch.tanh(index.double().sum(1, keepdim=True) * torch.linspace(0, 1, 500, dtype=F64)).mean(1)

    weight = torch.ones((), dtype=F64, requires_grad=True)
    pivots = differentiable_cross(wide, shape=(12,) * 4, tol=1e-4, generator=rng).pivots
    for checkpoint in (False, True):
        size = 0

        def pack(x):
            nonlocal size
            size += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            differentiable_cross(lambda i: wide(i * weight), shape=(12,) * 4, pivots=pivots, checkpoint=checkpoint)
        kept.append(size)
    numel = FrozenCross.of_pivots("test", pivots, (12,) * 4).numel
    assert kept[0] > 500 * 8 * numel
    assert kept[1] < 20 * 8 * numel


def test_sources_with_their_counters(rng):
    x = to_dense(TT.random(row_modes=(6, 5, 4), rank=2, generator=rng, dtype=F64)).requires_grad_()
    source = as_source(x)
    source.entries(torch.zeros(3, 3, dtype=torch.int64))
    result = differentiable_cross(source, tol=1e-10, generator=rng)
    assert result.evaluations == source.evaluations - 3
    assert result.bytes_read == 8 * result.evaluations
    total(result.network).backward()
    assert x.grad is not None


# --- tensors without rank, and ranks that change ---


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_constants(value):
    a = torch.tensor(value, dtype=F64, requires_grad=True)
    result = differentiable_cross(lambda i: a.expand(len(i)), shape=(5, 6, 7), tol=1e-10)
    assert result.network.ranks == (1, 1)
    assert result.converged
    torch.testing.assert_close(to_dense(result.network), torch.full((5, 6, 7), value, dtype=F64), rtol=1e-14, atol=0)
    total(result.network).backward()
    assert a.grad.isfinite()
    if value:
        assert a.grad.item() == pytest.approx(5 * 6 * 7)


def test_a_tensor_that_lost_its_rank_is_refused_at_old_pivots():
    def field(a):
        return lambda i: 2 + a * torch.sin(i.double().sum(1))

    result = differentiable_cross(field(1.0), shape=(8, 8, 8), tol=1e-10)
    assert result.network.ranks == (3, 3)
    with pytest.raises(SingularCrossing, match=r"crossing of bond 0 must not be singular.*search new pivots"):
        differentiable_cross(field(0.0), shape=(8, 8, 8), pivots=result.pivots)
    cross = DifferentiableCross((8, 8, 8), tol=1e-10, every=None)
    sizes = [cross(field(a)).ranks for a in (1.0, 0.5, 0.0, 0.0, 1.0)]
    assert sizes == [(3, 3), (3, 3), (1, 1), (1, 1), (1, 1)]
    assert cross.searches == 2


def test_the_noise_floor_of_single_precision(rng):
    def field(index):
        return 1 / (1 + index.float().square().sum(1)).sqrt()

    for tol in (1e-7, 1e-5):
        result = differentiable_cross(field, shape=(20,) * 5, tol=tol, generator=rng)
        assert result.network.dtype == torch.float32
        assert result.error < 3e-5
    assert result.reason
    low = differentiable_cross(field, shape=(20,) * 5, tol=1e-3, generator=rng)
    assert low.converged


# --- the object ---


def moving(t):
    """A ridge that moves through the grid."""
    return lambda i: 1 / (1 + (i.double().sum(1) / 10 - t).square())


def bump(t):
    """A bump that moves along the diagonal, beside a fixed one; no rank is exact."""
    return lambda i: sum(1 / (1 + 200 * ((i.double() / 31 - s) ** 2).sum(1)) for s in (0.2, t))


def test_pivots_are_searched_every_few_calls(rng):
    shape = (12, 12, 12)
    cross = DifferentiableCross(shape, tol=1e-6, every=4, generator=rng)
    searched, evaluations = [], 0
    for call in range(10):
        before = cross.searches
        counted = Counting(moving(0.02 * call))
        network = cross(counted)
        searched.append(cross.searches - before)
        evaluations += len(counted.with_) + counted.without
        assert cross.result.network.ranks == network.ranks
        if not searched[-1]:
            r = (1, *network.ranks, 1)
            assert (len(counted.with_), counted.without) == (sum(12 * a * b for a, b in itertools.pairwise(r)), 0)
    assert searched == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert cross.evaluations == evaluations
    assert cross.calls == 10


def test_an_error_above_its_bound_brings_new_pivots(rng):
    shape, grid = (32, 32, 32), torch.cartesian_prod(*[torch.arange(32)] * 3)
    cross = DifferentiableCross(shape, tol=1e-3, every=None, max_error=5e-3, generator=rng)
    frozen = DifferentiableCross(shape, tol=1e-3, every=None, generator=rng)
    errors = []
    for t in (0.4, 0.401, 0.9, 0.901):
        x = bump(t)(grid).reshape(shape)
        errors.append([float((to_dense(c(bump(t))) - x).norm() / x.norm()) for c in (cross, frozen)])
        assert cross.result.held_out >= 200
    assert max(error for error, _ in errors) < 1e-2
    assert errors[2][1] > 0.1
    assert (cross.searches, frozen.searches) == (2, 1)
    assert frozen.result.held_out == 0


def test_a_search_that_starts_at_the_old_pivots_takes_fewer_sweeps(rng):
    cross = DifferentiableCross((24,) * 5, tol=1e-5, every=1, generator=rng)
    sweeps = []
    for t in (2.0, 2.01, 2.02, 2.03):
        cross(moving(t))
        assert cross.result.error <= 2e-5
        sweeps.append(len(cross.result.history))
    assert max(sweeps[1:]) < sweeps[0]


def test_a_training_loop_compresses_a_field_while_it_is_learned(rng):
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    cross = DifferentiableCross((16, 16, 16), tol=1e-3, rank=8, every=10, generator=rng)
    losses = []
    for _ in range(60):
        network = cross(lambda index: encoder(index.double() / 15)[:, 0])
        mean = torch.einsum("ia,ajb,bk->", *network.cores) / 16**3
        loss = (mean - 0.7).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    grid = torch.cartesian_prod(*[torch.arange(16)] * 3)
    assert encoder(grid.double() / 15).mean().item() == pytest.approx(0.7, abs=0.02)
    assert losses[-1] < 1e-3 * losses[0]
    assert all(not core.requires_grad for core in cross.result.network.cores)


def test_state(rng, tmp_path):
    cross = DifferentiableCross((9, 9, 9), tol=1e-5, every=3, generator=rng)
    cross(moving(1.0))
    torch.save(cross.state_dict(), tmp_path / "cross.pt")
    other = DifferentiableCross((9, 9, 9), tol=1e-5, every=3, generator=rng)
    other.load_state_dict(torch.load(tmp_path / "cross.pt", weights_only=True))
    a, b = cross(moving(1.01)), other(moving(1.01))
    assert all(torch.equal(x, y) for x, y in zip(a.cores, b.cores, strict=True))
    assert (other.calls, other.searches, other.evaluations) == (cross.calls, cross.searches, cross.evaluations)
    with pytest.raises(ValueError, match="within"):
        DifferentiableCross((2, 9, 9)).load_state_dict(cross.state_dict())
    other.load_state_dict(DifferentiableCross((9, 9, 9)).state_dict())
    other(moving(1.0))
    assert other.searches == 1


# --- refusals ---


def test_refusals(unchecked):
    x = torch.ones(3, 4, dtype=F64)
    pivots = differentiable_cross(x).pivots
    cases = [
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"held_out": -1}, "held_out must be an integer >= 0, got -1"),
        ({"tol": -1.0}, "tol"),
        ({"pivots": pivots[:1]}, r"expected 2 \(d - 1\) = 2 pivot sets, got 1"),
        ({"pivots": (pivots[0], pivots[1].repeat(2, 1))}, r"bond 0 takes pivots \(r, 1\) and \(r, 1\)"),
        ({"pivots": (pivots[0] + 7, pivots[1])}, r"pivots of bond 0 must be integers within \(3, 4\)"),
        ({"pivots": pivots, "rank": 2}, "expected rank=None with pivots="),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            differentiable_cross(x, **options)
    with pytest.raises(ValueError, match="shape="):
        differentiable_cross(lambda i: i)
    with pytest.raises(TypeError, match="expected a tensor, an array"):
        differentiable_cross(3)
    one, two = torch.tensor([[1]]), torch.tensor([[0, 0]])
    with pytest.raises(ValueError, match="must be nested"):
        differentiable_cross(torch.ones(3, 3, 3), pivots=(one, two, torch.tensor([[1, 1]]), one))
    for options, kind, message in [
        ({"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
        ({"held_out": 1}, ValueError, "held_out"),
        ({"max_error": 1e-9}, ValueError, "max_error must be at least tol = 1e-06"),
        ({"sweeps": 2}, TypeError, "got sweeps"),
    ]:
        with pytest.raises(kind, match=message):
            DifferentiableCross((3, 3), **options)


def test_a_value_that_is_not_finite_is_named():
    pivots = differentiable_cross(torch.ones(3, 4, dtype=F64)).pivots
    i, j = pivots[0].item(), pivots[1].item()

    def field(index):
        values = torch.ones(len(index), dtype=F64)
        values[(index == torch.tensor([i, j])).all(1)] = float("nan")
        return values

    with pytest.raises(ValueError, match=rf"must be finite, got nan at index \({i}, {j}\)"):
        differentiable_cross(field, shape=(3, 4), pivots=pivots)
