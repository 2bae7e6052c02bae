"""Rank-adaptive training in an ordinary loop: resuming, clipping, scaling, ties, copies, budgets, refusals."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loops import batch, loop, small_model
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank, TTMatrix
from decompositions import round as cut
from tnlayers import RankAdaptive, RankChangeWarning, compact


def network(format, **options):
    return tnlayers.random_network(format, **options)


@pytest.mark.parametrize(
    "options", [{}, {"every": 4}, {"every": 4, "window": "center"}, {"budget": 500}, {"every": 3, "settle": 5}]
)
@pytest.mark.parametrize("stop", [6, 7])
def test_a_resumed_run_agrees_bit_for_bit(options, stop, tmp_path):
    first = small_model()
    optimizer = RankAdaptive(first, 0.01, tol=0.1, **options)
    loop(first, optimizer, range(stop))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    loop(first, optimizer, range(stop, 14))

    second = small_model(seed=5)
    again = RankAdaptive(second, 0.5, tol=0.1, **options)
    saved = torch.load(tmp_path / "x.pt")
    second.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    loop(second, again, range(stop, 14))
    assert again.ranks() == optimizer.ranks()
    assert again.history == optimizer.history
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_dict_is_the_weight_of_the_moment():
    """Also in the middle of a window, at doubled ranks; it loads into a plain model."""
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.1, every=5)
    loop(model, optimizer, range(7))
    plain = small_model(seed=3)
    plain.load_state_dict(model.state_dict())
    x, _ = batch(99)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any("probe" in key for key in model.state_dict())


def test_clipping_accumulation_scaling_and_schedulers_see_one_optimizer():
    def run(change) -> Tensor:
        model = small_model()
        optimizer = RankAdaptive(model, 0.01, tol=0.1, betas=(0.9, None))
        change(model, optimizer)
        return model(batch(99)[0]).detach()

    def plain(model, optimizer):
        loop(model, optimizer, range(5))

    def accumulated(model, optimizer):
        for k in range(5):
            x, y = batch(k)
            optimizer.zero_grad()
            for part in (slice(0, 16), slice(16, 32)):
                (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
            optimizer.step()

    def scaled(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for k in range(5):
            x, y = batch(k)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

    want = run(plain)
    for change in (accumulated, scaled):
        torch.testing.assert_close(run(change), want, rtol=1e-4, atol=1e-4)

    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.1)
    x, y = batch(0)
    (1000 * F.cross_entropy(model(x), y)).backward()
    before = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert float(before) > 1
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    assert abs(float(torch.stack([g.norm() for g in grads]).norm()) - 1) < 1e-3
    assert all(core.grad is None for layer in model if isinstance(layer, tnlayers.NetworkLayer) for core in layer.cores)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005] * len(optimizer.param_groups)
    assert optimizer.inner is not None
    assert optimizer.inner.param_groups[0]["lr"] == 0.005


def test_an_overflow_skips_the_step():
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    x, y = batch(0)
    before = model(x).detach()
    scaler.scale(F.cross_entropy(model(x), y) * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model(x), before)


def test_autocast_trains_in_low_precision_with_bases_in_single():
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.1)
    losses = []
    for k in range(20):
        x, y = batch(k % 2)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(core.dtype == torch.float32 for core in model[0].cores)


def test_bases_stay_orthonormal_in_single_precision():
    torch.manual_seed(0)
    layer = tnlayers.Linear(24, 20, network=network(LowRank, rank=3))
    optimizer = RankAdaptive(layer, 1e-2, tol=0.05)
    x, w = torch.randn(64, 24), torch.randn(20, 24) / 5
    for k in range(10_000):
        optimizer.zero_grad()
        target = x @ (w + 0.3 * math.sin(k / 50) * w.flip(0)).T
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    at = layer._window.at
    for k in (0, 2):
        u = at.up[k]
        assert float((u.T @ u - torch.eye(u.shape[1])).abs().max()) < 1e-5


def test_a_layer_without_gradient_stays_and_frozen_ones_are_left_alone():
    model = nn.ModuleDict({"used": small_model()[0], "idle": small_model()[0], "frozen": small_model()[0]})
    for core in model["frozen"].cores:
        core.requires_grad_(False)
    optimizer = RankAdaptive(model, 0.01, tol=0.1, weight_decay=0.1)
    assert sorted(optimizer.ranks()) == ["idle", "used"]
    idle, frozen = model["idle"].weight.detach(), model["frozen"].weight.detach()
    model["used"](batch(0)[0]).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model["idle"].weight, idle, rtol=1e-6, atol=1e-6)
    assert torch.equal(model["frozen"].weight, frozen)


def test_tied_layers_share_their_window():
    model = small_model()
    twin = tnlayers.Linear(16, 24, network=network(LowRank, rank=4))
    twin.cores = model[0].cores
    both = nn.ModuleList([model[0], twin])
    optimizer = RankAdaptive(both, 0.01, tol=0.05, betas=(0.0, None))
    x, _ = batch(0)
    for _ in range(3):
        optimizer.zero_grad()
        (both[0](x) + both[1](2 * x)).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(both[0].weight, both[1].weight)
    assert optimizer.ranks()["0"] == optimizer.ranks()["1"]
    small = compact(both)
    torch.testing.assert_close(small[0].weight, small[1].weight)
    assert small[0].cores[0] is small[1].cores[0]


def test_batch_norm_sees_one_forward_and_dropout_one_mask():
    model = nn.Sequential(small_model()[0], nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 5))
    optimizer = RankAdaptive(model, 0.01, tol=0.1)
    loop(model, optimizer, range(4))
    assert int(model[1].num_batches_tracked) == 4


def test_compact_is_what_the_optimizer_reports():
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.2, every=3)
    loop(model, optimizer, range(8))
    small = compact(model)
    assert {name: small.get_submodule(name).network.ranks for name in optimizer.ranks()} == optimizer.ranks()
    assert not any("probes" in name for name, _ in small.named_parameters())
    for name in optimizer.ranks():
        a, b = model.get_submodule(name).weight.detach(), small.get_submodule(name).weight.detach()
        assert float((a - b).norm()) <= 0.4 * float(a.norm())
    del small
    loop(model, optimizer, range(8, 12))  # the training goes on


def test_budget_holds_over_all_layers():
    model = small_model()
    optimizer = RankAdaptive(model, 0.02, tol=0.0, budget=400)
    loop(model, optimizer, range(10))
    small = compact(model)
    assert sum(m.numel() for m in small.modules() if isinstance(m, tnlayers.NetworkLayer)) <= 400
    model = small_model()
    with pytest.raises(ValueError, match="budget must hold the networks at their least ranks"):
        RankAdaptive(model, 0.02, budget=20)


def test_copies_are_pointed_out_and_a_replaced_weight_is_taken():
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.3)
    average = copy.deepcopy(model)
    with pytest.warns(RankChangeWarning, match="averaged model"):
        loop(model, optimizer, range(30))
    model[0].set_network(cut(model[0].network.detach(), rank=2))
    loop(model, optimizer, range(30, 33))
    assert average(batch(0)[0]).shape == (32, 5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr must be a number"),
        ({"tol": 1.5}, "tol must be a number in"),
        ({"tol": "a"}, "tol must be"),
        ({"theta": -1.0}, "theta must be"),
        ({"reserve": -1}, "reserve must be an int"),
        ({"reserve": 1.5}, "reserve must be an int"),
        ({"settle": 0}, "settle must be an int"),
        ({"min_rank": 0}, "min_rank must be"),
        ({"min_rank": 4, "max_rank": 2}, "max_rank must be an int >= min_rank"),
        ({"budget": 0}, "budget must be"),
        ({"every": 0}, "every must be"),
        ({"every": True}, "every must be"),
        ({"window": "wide"}, "window must be"),
        ({"method": "magic"}, "method must be"),
        ({"betas": (1.0, 0.9)}, "betas must be"),
        ({"betas": 0.9}, "betas must be"),
        ({"weight_decay": float("nan")}, "weight_decay must be"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        RankAdaptive(small_model(), **{"lr": 0.1, **options})


def test_models_that_cannot_be_served_are_refused():
    with pytest.raises(TypeError, match="expected the model"):
        RankAdaptive(small_model().parameters(), 0.1)
    with pytest.raises(ValueError, match="must have a layer whose weight is a tree network"):
        RankAdaptive(nn.Linear(3, 3), 0.1)
    with pytest.raises(ValueError, match="must be of this model"):
        RankAdaptive(small_model(), 0.1).load_state_dict(RankAdaptive(small_model()[0], 0.1).state_dict())


def test_a_model_that_moves_goes_on():
    """To another dtype between two steps, in the middle of a window too; a move to where it is changes nothing."""
    for every in (1, 4):
        runs = []
        for change in (lambda model: model, lambda model: model.to("cpu").float()):
            model = small_model()
            optimizer = RankAdaptive(model, 0.01, tol=0.1, every=every)
            loop(model, optimizer, range(6))
            change(model)
            loop(model, optimizer, range(6, 12))
            runs.append(model(batch(99)[0]).detach())
        assert torch.equal(runs[0], runs[1])
        model = small_model()
        optimizer = RankAdaptive(model, 0.01, tol=0.1, every=every, inner=partial(torch.optim.SGD, lr=0.01))
        loop(model, optimizer, range(6))
        model.double()  # torch's own AdamW does not follow, SGD does
        for k in range(4):
            x, y = batch(k)
            optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
        assert all(core.is_contiguous() for core in model[0].cores)
        assert model[0].weight.dtype == torch.float64
        assert all(core.dtype == torch.float64 for core in compact(model)[0].cores)


def test_weights_of_several_layers_may_be_replaced():
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.1)
    loop(model, optimizer, range(3))
    model.load_state_dict(model.state_dict())
    assert set(optimizer.ranks()) == {"0", "3"}
    loop(model, optimizer, range(3, 5))
    for layer in (model[0], model[3]):
        layer.reset_parameters()
    loop(model, optimizer, range(5, 7))
    probes = [*model[0].probes, *model[3].probes]
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], probes, strict=True))


@pytest.mark.parametrize("every", [1, 5])
def test_a_second_optimizer_starts_from_the_weight_as_it_is(every):
    model = small_model()
    loop(model, RankAdaptive(model, 0.01, tol=0.01, every=every), range(4))
    x, _ = batch(50)
    before = model(x).detach()
    RankAdaptive(model, 0.01, tol=0.1, every=every)
    assert float((model(x) - before).detach().norm()) < 0.05 * float(before.norm())


@pytest.mark.parametrize("every", [1, 5])
def test_a_foreign_optimizer_trains_the_probes(every):
    model = small_model()
    loop(model, RankAdaptive(model, 0.01, tol=0.1, every=every), range(5))
    weight = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for k in range(5):
        optimizer.zero_grad()
        x, y = batch(k)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert float((model[0].weight.detach() - weight).norm()) > 1e-2


def test_functional_calls_and_transforms_see_the_probes():
    model = nn.Sequential(*list(small_model())[:1]).double()
    RankAdaptive(model, 0.01, tol=0.1)
    x = batch(0)[0].double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    moved = {name: p + 0.5 if "probes" in name else p for name, p in parameters.items()}
    assert float((torch.func.functional_call(model, moved, (x,)) - model(x)).detach().norm()) > 0.1
    gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if "probes" in name:
            torch.testing.assert_close(gradient[name], p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("format", [LowRank, TTMatrix])
def test_a_penalty_on_the_gradient_of_x(format):
    """Derivatives of the gradient of x go through the probes too, by every route."""
    torch.manual_seed(0)
    modes = {"row_modes": (16, 16), "col_modes": (16, 16)} if format is TTMatrix else {}
    layer = tnlayers.Linear(256, 256, network=network(format, rank=2, **modes)).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(256, 1).double())
    RankAdaptive(model, 0.01, tol=0.1)
    x = torch.randn(8, 256, dtype=torch.float64, requires_grad=True)
    found = []
    for moved in (False, True):
        if moved:
            layer.window_moved()
        for p in layer.probes:
            p.grad = None
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        g.square().sum().backward()
        found.append([p.grad.clone() for p in layer.probes])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_an_empty_batch():
    layer = tnlayers.Linear(256, 200, network=network(LowRank, rank=2))
    optimizer = RankAdaptive(layer, 1e-3, tol=0.1)
    y = layer(torch.randn(0, 256))
    assert y.shape == (0, 200)
    y.sum().backward()
    optimizer.step()


def test_further_parameters_go_to_the_inner_optimizer():
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.1)
    scale = nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": [scale]})
    for k in range(3):
        x, y = batch(k)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * scale).backward()
        optimizer.step()
    assert float(scale.detach()) != 1.0
    alone = RankAdaptive(tnlayers.Linear(8, 8, bias=False, network=network(LowRank, rank=2)), 0.01, tol=0.1)
    with pytest.raises(ValueError, match="there is no inner optimizer"):
        alone.add_param_group({"params": [scale]})


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"every": 3, "window": "center"}])
def test_nan_gradients_are_refused_before_anything_moves(options):
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.1, **options)
    loop(model, optimizer, range(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = batch(9)
    optimizer.zero_grad()
    (F.cross_entropy(model(x), y) * float("nan")).backward()
    with pytest.raises(ValueError, match="gradients must be finite, got NaN or infinity in 0"):
        optimizer.step()
    assert optimizer.steps == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loop(model, optimizer, range(4, 8))


def test_a_frozen_weight_follows_a_step():
    model = small_model()
    optimizer = RankAdaptive(model, 0.01, tol=0.1, every=5)
    loop(model, optimizer, range(2))
    x, y = batch(9)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model.eval()
    tnlayers.freeze(model)
    optimizer.step()
    with torch.no_grad():
        after = model(x)
        tnlayers.thaw(model)
        torch.testing.assert_close(after, model(x))


@pytest.mark.parametrize("options", [{"budget": 900}, {"budget": 1500, "every": 3}, {"reserve": 100, "settle": 8}])
def test_bonds_hold_nothing_that_their_neighbours_make_redundant(options):
    """Two bonds of one matrix keep one rank, under a budget and at settling too, on every route of the gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(
        tnlayers.Linear(16, 24, network=network(LowRank, rank=2)),
        nn.ReLU(),
        tnlayers.Linear(24, 64, network=network(LowRank, rank=3)),
        nn.ReLU(),
        tnlayers.Linear(64, 5, network=network(LowRank, rank=2)),
    )
    optimizer = RankAdaptive(model, 0.02, tol=0.02, **options)
    for k in range(12):
        loop(model, optimizer, range(k, k + 1))
        for ranks in optimizer.ranks().values():
            assert ranks[0] == ranks[1]
        for layer in (model[0], model[2], model[4]):
            assert layer._window.point.ranks[0] == layer._window.point.ranks[1]
