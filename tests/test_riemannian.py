"""Optimizers on the manifold of fixed ranks: the step as mathematics, invariance, transport, and ordinary loops."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loops import batch, generator, loop, small_model
from torch import Tensor, nn

import tnlayers
from decompositions import TT, LowRank, Monarch, Network, Tree, TTMatrix, Tucker, norm, scale, to_dense
from decompositions import round as cut
from decompositions.geometry import Tangent, gauges, project, transport
from decompositions.geometry.gauges import gauging
from decompositions.geometry.retraction import follow, galerkin_retract, galerkin_retracting
from decompositions.geometry.tangent import gauge_fix
from decompositions.lockstep import alone
from tnlayers import RankAdaptive, RiemannianAdam, RiemannianSGD
from tnlayers.integrators.integrate import default_root

F64 = torch.float64
FAMILIES = {
    "matrix": (partial(LowRank.random, row_modes=(16,), col_modes=(20,)), 3),
    "tucker-convolution": (partial(Tucker.random, row_modes=(12,), col_modes=(10, 3, 3), modes=(0, 1)), (4, 3)),
    "tt": (partial(TT.random, row_modes=(4, 4), col_modes=(5, 4)), 3),
    "tt-matrix": (partial(TTMatrix.random, row_modes=(4, 4, 4), col_modes=(4, 3, 4)), (4, 3)),
    "tree": (partial(Tree.random, row_modes=(4, 4), col_modes=(4, 4)), 3),
}
families = pytest.mark.parametrize("family", FAMILIES)


def weight(family: str, seed: int, dtype: torch.dtype = F64) -> Network:
    make, rank = FAMILIES[family]
    net = cut(make(rank=rank, dtype=dtype, generator=generator(seed)))
    return scale(net, 1 / float(norm(net)))


def layer_of(net: Network) -> tnlayers.NetworkLayer:
    if isinstance(net, Tucker):
        return tnlayers.Conv2d(10, 12, 3, bias=False, network=net)
    rows, cols = (int(torch.tensor(modes).prod()) for modes in (net.row_modes, net.col_modes))
    return tnlayers.Linear(cols, rows, bias=False, network=net)


def dense(layer: tnlayers.NetworkLayer) -> Tensor:
    return layer.weight.detach().clone()


def regauged(net: Network, seed: int) -> Network:
    """Other cores for the same tensor: an invertible matrix on every bond."""
    cores, g = list(net.cores), generator(seed)
    for bond in net.bonds:
        (i, j) = (k for k, leg in enumerate(net.legs) if bond in leg)
        a, b = net.legs[i].index(bond), net.legs[j].index(bond)
        change = torch.randn(net.sizes[bond], net.sizes[bond], dtype=net.dtype, generator=g) + 2 * torch.eye(
            net.sizes[bond], dtype=net.dtype
        )
        cores[i] = torch.tensordot(cores[i], change, ([a], [0])).movedim(-1, a)
        cores[j] = torch.tensordot(cores[j], torch.linalg.inv(change), ([b], [1])).movedim(-1, b)
    return net.replace(cores)


def loss_of(layer: tnlayers.NetworkLayer, step: int) -> Tensor:
    """A new batch every step, the same for every layer of these shapes."""
    g = generator(1000 + step)
    if layer.weight.ndim == 4:
        x = torch.randn(8, 10, 5, 5, dtype=F64, generator=g)
        target = torch.randn(8, 12, 3, 3, dtype=F64, generator=g)
    else:
        x = torch.randn(32, layer.weight.shape[1], dtype=F64, generator=g)
        target = torch.randn(32, layer.weight.shape[0], dtype=F64, generator=g)
    return (layer(x) - target).square().mean()


def train(layer, optimizer, steps):
    for k in steps:
        optimizer.zero_grad()
        loss_of(layer, k).backward()
        optimizer.step()


# --- the retraction and the transport ---


@families
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("near", [False, True])
def test_the_galerkin_retraction_is_a_retraction_from_every_root(family, dtype, near, rng):
    net = weight(family, 0, dtype)
    for root in range(len(net.cores)):
        at = gauges(net, root)
        xi = project(at, torch.randn(net.shape, dtype=dtype, generator=rng))
        errors = []
        for t in (1e-2, 1e-3, 1e-4):
            moved = alone(galerkin_retracting(xi * t, near=near))
            again = gauges(moved.net, root, gauged=True)
            for edge in again.edges:  # isometries toward the root, and the overlaps are those of dense bases
                basis = again.up[edge.child].movedim(again.axis(edge.child, edge.bond), -1).flatten(0, -2)
                eye = torch.eye(basis.shape[1], dtype=dtype)
                assert torch.allclose(basis.mH @ basis, eye, atol=1e-12)
            assert moved.net.ranks == net.ranks
            errors.append(float((to_dense(moved.net) - to_dense(net) - (xi * t).to_dense()).norm()))
        if errors[0] > 1e-12:
            assert errors[1] < 0.03 * errors[0]
            assert errors[2] < 0.03 * errors[1]


@families
def test_moments_that_follow_their_bases_are_transported(family, rng):
    """Against transport by projection: equal up to the size of the move; and equal where nothing moves."""
    net = weight(family, 0)
    for root in range(len(net.cores)):
        at = gauges(net, root)
        xi, eta = (project(at, torch.randn(net.shape, dtype=F64, generator=rng)) for _ in range(2))
        for t, bound in ((0.0, 1e-12), (1e-5, 3e-3)):
            moved = alone(galerkin_retracting(xi * t))
            new = alone(gauging(moved.net, root, gauged=True))
            found = gauge_fix(new, follow(new, at, moved.overlaps, eta.deltas))
            exact = transport(new, eta)
            assert float((found.to_dense() - exact.to_dense()).norm()) <= bound * float(eta.to_dense().norm())


@families
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_retraction_at_singular_points_and_large_steps(family, size, rng):
    """Ranks beyond those of W (singular links): finite, orthonormal, and near W + xi."""
    net = weight(family, 0)
    cores = [core.clone() for core in net.cores]
    bond = net.bonds[0]
    k = next(k for k, leg in enumerate(net.legs) if bond in leg)
    cores[k].movedim(net.legs[k].index(bond), 0)[-1] = 0  # one direction of the bond is not there
    at = gauges(net.replace(cores), default_root(net))
    xi = project(at, torch.randn(net.shape, dtype=F64, generator=rng)) * size
    for near in (False, True):
        moved = alone(galerkin_retracting(xi, near=near)).net
        assert all(bool(torch.isfinite(core).all()) for core in moved.cores)
        again = gauges(moved, at.root, gauged=True)
        for edge in again.edges:
            basis = again.up[edge.child].movedim(again.axis(edge.child, edge.bond), -1).flatten(0, -2)
            assert torch.allclose(basis.mH @ basis, torch.eye(basis.shape[1], dtype=F64), atol=1e-11)
        # W is singular here, so that the error may be of first order: what is lost is never more than what was added
        lost = to_dense(moved) - to_dense(at.net) - xi.to_dense()
        assert float(lost.norm()) <= 2 * float(xi.to_dense().norm())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_fast_basis_is_the_slow_one(dtype, rng):
    """Where it is taken, `near` gives the same tensor to rounding, from well and from badly conditioned points."""
    for condition in (1.0, 1e2, 1e4, 1e8):
        u, _ = torch.linalg.qr(torch.randn(60, 6, dtype=F64, generator=rng))
        v, _ = torch.linalg.qr(torch.randn(50, 6, dtype=F64, generator=rng))
        s = torch.logspace(0, -float(torch.tensor(condition).log10()), 6, dtype=F64)
        net = LowRank(u, torch.diag(s), v).to(dtype)
        at = gauges(net, 1)
        for size in (1e-6, 1e-3, 1e-1, 10.0):
            xi = project(at, torch.randn(60, 50, dtype=dtype, generator=rng))
            xi = xi * (size / float(xi.to_dense().norm()))
            slow, fast = (alone(galerkin_retracting(xi, near=near)) for near in (False, True))
            whole = to_dense(net) + xi.to_dense()
            rounding = 200 * torch.finfo(dtype).eps * float(whole.norm())
            errors = [float((to_dense(made.net) - whole).norm()) for made in (slow, fast)]
            assert errors[1] <= 1.01 * errors[0] + rounding  # as near to W + xi
            if size * condition < 0.1:  # and the same point, where the retraction is smooth
                apart = float((to_dense(slow.net) - to_dense(fast.net)).norm())
                assert apart <= rounding * max(1.0, condition * size)
            for core in (fast.net.cores[0], fast.net.cores[2]):
                eye = torch.eye(6, dtype=dtype)
                assert float((core.mT @ core - eye).norm()) < 30 * torch.finfo(dtype).eps


# --- the step ---


@families
def test_a_step_without_momentum_is_the_projected_gradient(family):
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        net = weight(family, 1)
        layer = layer_of(net)
        before = dense(layer)
        other = before.clone().requires_grad_()
        x = torch.randn(8, 10, 5, 5, dtype=F64, generator=generator(5)) if before.ndim == 4 else None
        if x is None:
            rows = torch.randn(16, before.shape[1], dtype=F64, generator=generator(5))
            (F.linear(rows, other).sin().sum()).backward()
        else:
            F.conv2d(x, other).sin().sum().backward()
        wanted = before - lr * project(net, other.grad.reshape(net.shape)).to_dense().reshape(before.shape)
        optimizer = RiemannianSGD(layer, lr)
        layer(rows if x is None else x).sin().sum().backward()
        optimizer.step()
        errors.append(float((dense(layer) - wanted).norm()))
    assert errors[1] < 0.03 * errors[0]
    assert errors[2] < 0.03 * errors[1]


@families
@pytest.mark.parametrize(
    "make",
    [
        partial(RiemannianSGD, lr=0.3, momentum=0.9, weight_decay=0.01),
        partial(RiemannianAdam, lr=0.02, weight_decay=0.01),
    ],
)
def test_iterates_depend_on_the_tensor_alone(family, make):
    net = weight(family, 2)
    weights = []
    for start in (net, regauged(net, 3), regauged(scale(net, 1.0), 4)):
        layer = layer_of(start)
        train(layer, make(layer), range(25))
        weights.append(dense(layer))
    moved = float((weights[0] - dense(layer_of(net))).norm())
    assert moved > 0.1  # they went somewhere
    for other in weights[1:]:
        assert float((other - weights[0]).norm()) < 1e-8 * moved


def test_the_tests_notice_a_second_moment_of_every_entry():
    """Plain Adam on the cores does depend on them."""
    net = weight("matrix", 2)
    weights = []
    for start in (net, regauged(net, 3)):
        layer = layer_of(start)
        train(layer, torch.optim.Adam(layer.parameters(), 0.02), range(25))
        weights.append(dense(layer))
    assert float((weights[0] - weights[1]).norm()) > 1e-2


@families
@pytest.mark.parametrize(
    "make",
    [
        partial(RiemannianSGD, lr=0.2, momentum=0.8),
        partial(RiemannianAdam, lr=0.01),
    ],
)
def test_teachers_are_learnt(family, make):
    target = layer_of(weight(family, 5)).weight.detach()
    layer = layer_of(scale(weight(family, 6), 0.5))
    optimizer = make(layer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        ((layer.weight - target).square().sum() / 2).backward()
        optimizer.step()
        schedule.step()
    assert float((dense(layer) - target).norm()) < 1e-3 * float(target.norm())


@pytest.mark.parametrize("make", [RiemannianSGD, RiemannianAdam])
def test_weight_decay_is_that_of_the_tensor(make):
    for family in FAMILIES:
        layer = layer_of(weight(family, 7))
        before = dense(layer)
        optimizer = make(layer, lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            (0.0 * layer.weight.sum()).backward()
            optimizer.step()
        assert torch.allclose(dense(layer), before * 0.95**3, atol=1e-12)


def test_adam_moves_every_core_by_the_learning_rate():
    """The first step has no other size than lr: root mean square of the change of an entry, one core at a time."""
    for family in FAMILIES:
        net = weight(family, 8)
        layer = layer_of(net)
        optimizer = RiemannianAdam(layer, lr=1e-6)
        at = gauges(net, optimizer._tracks[0].root)
        loss_of(layer, 0).backward()
        before = dense(layer)
        optimizer.step()
        xi = project(at, (dense(layer) - before).reshape(net.shape))
        for delta in xi.deltas:
            if float(delta.norm()) > 1e-12:
                alone_ = float(delta.norm()) / before.numel() ** 0.5
                assert alone_ == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize(
    "make",
    [
        partial(RiemannianSGD, lr=0.5, momentum=0.9),
        partial(RiemannianAdam, lr=0.05),
        partial(RiemannianAdam, lr=0.05, stabilize_every=1),
        partial(RiemannianAdam, lr=0.05, stabilize_every=10_000),
    ],
)
def test_bases_stay_orthonormal_in_single_precision(make):
    torch.manual_seed(0)
    model = small_model()
    optimizer = make(model)
    for k in range(400):
        x, y = batch(k % 20)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for track in optimizer._tracks:
        at = track.window.at
        for edge in at.edges:
            basis = at.up[edge.child].movedim(at.axis(edge.child, edge.bond), -1).flatten(0, -2)
            assert float((basis.mT @ basis - torch.eye(basis.shape[1])).abs().max()) < 1e-5


# --- ordinary loops ---


MAKERS = [partial(RiemannianSGD, lr=0.05, momentum=0.9, weight_decay=1e-3), partial(RiemannianAdam, lr=0.01)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("stop", [1, 6])
def test_a_resumed_run_agrees_bit_for_bit(make, stop, tmp_path):
    first = small_model()
    optimizer = make(first)
    loop(first, optimizer, range(stop))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    loop(first, optimizer, range(stop, 12))
    second = small_model(5)
    resumed = make(second)
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    loop(second, resumed, range(stop, 12))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    with pytest.raises(ValueError, match="the state must be of this model"):
        make(nn.Sequential(nn.Identity(), *small_model())).load_state_dict(saved["optimizer"])


@pytest.mark.parametrize("make", MAKERS)
def test_clipping_accumulation_scaling_and_schedulers_see_one_optimizer(make):
    plain, other = small_model(), small_model()
    one, two = make(plain), make(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k in range(4):
        x, y = batch(k)
        one.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_([p for group in one.param_groups for p in group["params"]], 0.05)
        one.step()
        two.zero_grad()
        for part in (slice(0, 16), slice(16, 32)):  # accumulation, scaled
            scaler.scale(F.cross_entropy(other(x[part]), y[part]) / 2).backward()
        scaler.unscale_(two)
        total = nn.utils.clip_grad_norm_([p for group in two.param_groups for p in group["params"]], 0.05)
        assert float(total) > 0.05
        scaler.step(two)
        scaler.update()
    for a, b in zip(plain.parameters(), other.parameters(), strict=False):
        assert a.shape == b.shape
    for k in (0, 3):
        assert torch.allclose(plain[k].weight, other[k].weight, atol=1e-5)
    schedule = torch.optim.lr_scheduler.StepLR(one, 1, 0.5)
    before = [group["lr"] for group in one.param_groups]
    one.step()
    schedule.step()
    assert [group["lr"] for group in one.param_groups] == [lr / 2 for lr in before]


@pytest.mark.parametrize("make", MAKERS)
def test_an_overflow_skips_the_step_and_nan_is_refused(make):
    model = small_model()
    optimizer = make(model)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    x, y = batch(0)
    scaler.scale(F.cross_entropy(model(x * torch.inf), y)).backward()
    scaler.step(optimizer)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    optimizer.zero_grad()
    (model(x).sum() * torch.nan).backward()
    with pytest.raises(ValueError, match=r"gradients must be finite, got NaN or infinity in 0 at step 1; nothing"):
        optimizer.step()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("make", MAKERS)
def test_layers_without_gradient_ties_and_replaced_weights(make):
    model = small_model()
    model.append(tnlayers.Linear(24, 16, network=tnlayers.random_network(LowRank, rank=2)))  # not in the forward below
    body = model[:6]
    optimizer = make(model)
    idle = dense(model[6])
    loop(body, optimizer, range(3))
    assert torch.equal(dense(model[6]), idle)
    fresh = tnlayers.Linear(16, 24, network=tnlayers.random_network(LowRank, rank=2)).network.detach()
    model[0].set_network(fresh)
    loop(body, optimizer, range(3, 6))
    assert model[0].network.ranks == (2, 2)
    assert not torch.equal(dense(model[0]), to_dense(fresh))
    tied = nn.Sequential(*(tnlayers.Linear(12, 12, network=weight_of(12)) for _ in range(2)))
    for k, core in enumerate(tied[0].cores):
        tied[1].cores[k] = core
    optimizer = make(tied)
    for k in range(3):
        optimizer.zero_grad()
        tied(torch.randn(8, 12, generator=generator(k))).square().mean().backward()
        optimizer.step()
    assert torch.equal(dense(tied[0]), dense(tied[1]))
    assert len(optimizer._tracks) == 1


def weight_of(width: int) -> Network:
    return LowRank.random(row_modes=(width,), col_modes=(width,), rank=3, std=0.1, generator=generator(0))


def test_the_inner_optimizer_is_the_users():
    model = small_model()
    optimizer = RiemannianAdam(model, 0.01, inner=partial(torch.optim.SGD, lr=0.3))
    assert isinstance(optimizer.inner, torch.optim.SGD)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.3]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == len(optimizer.inner.param_groups) + 1
    loop(model, optimizer, range(3))
    assert optimizer.ranks() == {"0": (4, 4), "3": (3,)}
    alone_ = RiemannianSGD(tnlayers.Linear(8, 6, bias=False, network=tnlayers.random_network(LowRank, rank=2)), 0.1)
    with pytest.raises(ValueError, match=r"RiemannianSGD.add_param_group: there is no inner optimizer"):
        alone_.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_refusals(unchecked):
    model = small_model()
    for options, text in (
        ({"lr": -1}, "lr must be a number >= 0, got -1"),
        ({"lr": float("nan")}, "lr must be a number >= 0, got nan"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay must be a number >= 0"),
        ({"lr": 0.1, "stabilize_every": 0}, "stabilize_every must be an int >= 1, got 0"),
    ):
        for make in (RiemannianSGD, RiemannianAdam):
            with pytest.raises(ValueError, match=text):
                make(model, **options)
    with pytest.raises(ValueError, match=r"momentum must be a number in \[0, 1\), got 1.0"):
        RiemannianSGD(model, 0.1, momentum=1.0)
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"):
        RiemannianAdam(model, 0.1, betas=(0.9, 1.0))
    with pytest.raises(TypeError, match=r"RiemannianAdam: expected the model .*, got generator"):
        RiemannianAdam(model.parameters(), 0.1)
    ring = tnlayers.Linear(16, 16, network=tnlayers.random_network(Monarch, rank=1, order=2))
    for bad in (nn.Linear(3, 3), ring):
        with pytest.raises(ValueError, match="must have a layer whose weight is a tree network"):
            RiemannianSGD(bad, 0.1)


@pytest.mark.parametrize("side", [0, 2])
@pytest.mark.parametrize("near", [False, True])
def test_a_step_of_one_basis_alone_is_exact(side, near, rng):
    at = gauges(weight("matrix", 0), 1)
    xi = project(at, torch.randn(16, 20, dtype=F64, generator=rng))
    alone_ = Tangent(at, tuple(d if k == side else torch.zeros_like(d) for k, d in enumerate(xi.deltas)))
    for size in (1e-3, 1.0, 100.0):
        moved = alone(galerkin_retracting(alone_ * size, near=near)).net
        whole = to_dense(at.net) + (alone_ * size).to_dense()
        assert float((to_dense(moved) - whole).norm()) < 1e-12 * float(whole.norm())


@families
@pytest.mark.parametrize("lr", [0.003, 0.03])
def test_rank_adaptive_is_stable_with_one_scale_a_core(family, lr):
    """With moments that were projected from point to point it diverged: trees from .001 on, TT-matrices from .01 on."""
    lr = min(lr, 0.01) if family == "tt-matrix" else lr
    target = dense(layer_of(weight(family, 5)))
    layer = layer_of(scale(weight(family, 6), 0.5))
    optimizer = RankAdaptive(layer, lr, tol=1e-12, reserve=0)
    optimizer.settle()
    errors = []
    for _ in range(200):
        optimizer.zero_grad()
        ((layer.weight - target).square().sum() / 2).backward()
        optimizer.step()
        errors.append(float((dense(layer) - target).norm()))
    assert max(errors) < 3 * float(target.norm())
    assert errors[-1] < 0.02 * float(target.norm())


def test_the_galerkin_retraction_against_the_best_one(rng):
    """Both are retractions: their distance is second order, that of `retract` to W + t xi the smaller one."""
    from decompositions.geometry import retract

    at = gauges(weight("matrix", 0), 1)
    xi: Tangent = project(at, torch.randn(16, 20, dtype=F64, generator=rng))
    for t in (1e-2, 1e-3):
        point = to_dense(at.net) + (xi * t).to_dense()
        best, quick = (float((to_dense(made(xi * t)) - point).norm()) for made in (retract, galerkin_retract))
        assert best <= quick * (1 + 1e-9) <= 30 * best
