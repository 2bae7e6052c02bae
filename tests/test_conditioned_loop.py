"""`CondLR` in an ordinary loop: resuming, clipping, scaling, schedulers, ties, replaced weights, refusals."""

import copy
from functools import partial

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import batch, loop
from torch import Tensor, nn

import tnlayers
from decompositions import TT, LowRank, Network, TTMatrix, Tucker
from tnlayers import CondLR


def network(format, **options):
    return tnlayers.random_network(format, **options)


small_model = partial(loops.small_model, matrices=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_resumed_run_agrees_bit_for_bit(momentum, tmp_path):
    first = small_model()
    optimizer = CondLR(first, 0.05, momentum=momentum, weight_decay=1e-3)
    loop(first, optimizer, range(6))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    loop(first, optimizer, range(6, 14))

    second = small_model(seed=5)
    again = CondLR(second, 0.5, momentum=momentum)
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert all(torch.equal(value, saved["model"][name]) for name, value in second.state_dict().items())
    loop(second, again, range(6, 14))
    assert again.steps == optimizer.steps == 14
    assert again.conditions() == optimizer.conditions()
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_dict_loads_into_a_plain_model_and_compact_is_the_same_function():
    model = small_model()
    loop(model, CondLR(model, 0.05), range(3))
    plain = small_model(seed=3)
    plain.load_state_dict(model.state_dict())
    x, _ = batch(99)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    shipped = tnlayers.compact(model)
    torch.testing.assert_close(shipped(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any("probe" in name for name, _ in shipped.named_parameters())
    assert not any("probe" in key for key in model.state_dict())


def test_clipping_accumulation_scaling_and_schedulers_see_one_optimizer():
    def run(change) -> Tensor:
        model = small_model()
        change(model, CondLR(model, 0.05, momentum=0.9))
        return model(batch(99)[0]).detach()

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
            scaler.step(optimizer)
            scaler.update()

    def closures(model, optimizer):
        for k in range(5):
            x, y = batch(k)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                value = F.cross_entropy(model(x), y)
                value.backward()
                return value

            assert optimizer.step(closure) > 0

    want = run(lambda model, optimizer: loop(model, optimizer, range(5)))
    for change in (accumulated, scaled, closures):
        torch.testing.assert_close(run(change), want, rtol=1e-4, atol=1e-4)

    model = small_model()
    optimizer = CondLR(model, 0.05)
    x, y = batch(0)
    (1000 * F.cross_entropy(model(x), y)).backward()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) > 1
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    assert abs(float(torch.stack([g.norm() for g in grads]).norm()) - 1) < 1e-3
    assert all(core.grad is None for layer in (model[0], model[3]) for core in layer.cores)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] * len(optimizer.param_groups)
    assert optimizer.inner is not None
    assert optimizer.inner.param_groups[0]["lr"] == 0.025


def test_one_cycle_moves_the_momentum_too():
    model = small_model()
    optimizer = CondLR(model, 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    seen = set()
    for k in range(9):
        loop(model, optimizer, range(k, k + 1))
        schedule.step()
        seen.add(round(optimizer.param_groups[0]["momentum"], 6))
    assert len(seen) > 3
    assert max(optimizer.conditions().values()) <= 1.5


def test_autocast_trains_in_low_precision_with_bases_in_single():
    model = small_model()
    optimizer = CondLR(model, 0.3, momentum=0.5)
    losses = []
    for k in range(40):
        x, y = batch(k % 2)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = F.cross_entropy(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(core.dtype == torch.float32 for core in model[0].cores)
    assert max(optimizer.conditions().values()) <= 1.5


def test_a_step_inside_autocast_is_made_in_full_precision():
    found = []
    for enabled in (False, True):
        model = small_model()
        optimizer = CondLR(model, 0.3, momentum=0.5)
        for k in range(3):
            x, y = batch(k)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        found.append(model[0].weight.detach())
    assert torch.equal(found[0], found[1])


def test_a_layer_without_gradient_stays_and_frozen_ones_are_left_alone():
    model = nn.ModuleDict({"used": small_model()[0], "idle": small_model()[0], "frozen": small_model()[0]})
    for core in model["frozen"].cores:
        core.requires_grad_(False)
    optimizer = CondLR(model, 0.1, weight_decay=0.1)
    assert sorted(optimizer.conditions()) == ["idle", "used"]
    idle, used, frozen = (model[name].weight.detach().clone() for name in ("idle", "used", "frozen"))
    model["used"](batch(0)[0]).sum().backward()
    optimizer.step()
    assert torch.equal(model["idle"].weight, idle)
    assert torch.equal(model["frozen"].weight, frozen)
    assert not torch.allclose(model["used"].weight, used)


def test_tied_layers_share_their_network():
    model = small_model()
    twin = tnlayers.Linear(16, 24, bias=False, network=network(LowRank, rank=4))
    twin.cores = model[0].cores
    both = nn.ModuleList([model[0], twin])
    alone = copy.deepcopy(model[0])
    optimizer = CondLR(both, 0.01, momentum=0.9)
    x, _ = batch(0)
    single = CondLR(alone, 0.01, momentum=0.9)
    for _ in range(3):
        for used, own in ((both[0], optimizer), (alone, single)):
            own.zero_grad()
            twice = both[1](2 * x) if used is both[0] else alone(2 * x) - alone.bias
            (used(x) + twice).square().sum().mul(1e-3).backward()
            own.step()
        assert torch.equal(both[0].weight, both[1].weight)
    torch.testing.assert_close(both[0].weight, alone.weight, rtol=1e-4, atol=1e-5)
    assert set(optimizer.conditions()) == {"0", "1"}


def test_a_replaced_weight_is_taken_at_its_own_rank():
    model = small_model()
    optimizer = CondLR(model, 0.05, momentum=0.9)
    loop(model, optimizer, range(3))
    model[0].set_network(network(LowRank, rank=6)((24, 16), torch.float32, torch.device("cpu")))
    x, y = batch(3)
    F.cross_entropy(model(x), y).backward()  # of the cores themselves: this step leaves that layer where it is
    optimizer.step()
    assert model[0].network.ranks == (6, 6)
    assert max(optimizer.conditions().values()) <= 1.5
    model[0].reset_parameters()
    before = model[0].weight.detach().clone()
    loop(model, optimizer, range(4, 5))  # taken by zero_grad: no step is lost
    assert not torch.allclose(before, model[0].weight, atol=1e-3)
    probes = [*model[0].probes, *model[3].probes]
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], probes, strict=True))


def test_a_model_that_moves_goes_on():
    model = small_model()
    optimizer = CondLR(model, 0.05, momentum=0.9)
    loop(model, optimizer, range(3))
    model.double()
    for k in range(3):
        x, y = batch(k)
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    assert model[0].weight.dtype == torch.float64
    assert max(optimizer.conditions().values()) <= 1.5


@pytest.mark.parametrize("where", ["network", "other"])
def test_gradients_that_are_not_finite_are_refused_before_anything_moves(where):
    model = small_model()
    optimizer = CondLR(model, 0.05, momentum=0.9)
    loop(model, optimizer, range(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    x, y = batch(9)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    spoiled, name = (model[3].probes[1], "3") if where == "network" else (model[5].bias, "other parameters")
    spoiled.grad[0] = float("nan")
    with pytest.raises(ValueError, match=f"must be finite, got NaN or infinity in {name} at step 5"):
        optimizer.step()
    assert optimizer.steps == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for a, b in zip(optimizer.state_dict()["tracks"], state["tracks"], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["moment"], b["moment"], strict=True))
    loop(model, optimizer, range(4, 8))


def test_steps_to_zero_or_infinity_are_refused_before_anything_moves():
    def vanish(model, group):
        for p in model[3].probes:
            p.grad.zero_()
        group.update(lr=1.0, weight_decay=1.0)

    def explode(model, group):
        for p in model[0].probes:
            p.grad.fill_(1e38)
        group.update(lr=1e3)

    def explode_in_the_norm(model, group):
        for p in model[3].probes:
            p.grad.fill_(3e37)
        group.update(lr=10.0)

    for spoil, text in ((vanish, "3"), (explode, "0"), (explode_in_the_norm, "3")):
        model = small_model()
        optimizer = CondLR(model, 0.05, momentum=0.9)
        loop(model, optimizer, range(2))
        x, y = batch(9)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for track in optimizer._tracks:
            track.moment = [0 * delta for delta in track.moment]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        spoil(model, optimizer.param_groups[0])
        with pytest.raises(ValueError, match=f"step 3 would make the weight of {text} zero or infinite"):
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(float(delta.abs().max()) == 0 for track in optimizer._tracks for delta in track.moment)
        optimizer.param_groups[0].update(lr=0.05, weight_decay=0.0)
        loop(model, optimizer, range(2, 4))


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr must be a number >= 0, got -1"),
        ({"lr": "a"}, "lr must be"),
        ({"condition": 0.9}, r"condition must be a finite number >= 1 .*got 0.9"),
        ({"condition": float("inf")}, "condition must be a finite"),
        ({"condition": float("nan")}, "condition must be a finite"),
        ({"condition": True}, "condition must be a finite"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"weight_decay": -1}, "weight_decay must be"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        CondLR(small_model(), **{"lr": 0.1, **options})


WRONG: dict[str, Network] = {
    "tt": TT.random(row_modes=(6,), col_modes=(2, 4), rank=2),
    "tt-matrix": TTMatrix.random(row_modes=(2, 3), col_modes=(2, 4), rank=2),
    "tucker": Tucker.random(row_modes=(6,), col_modes=(2, 4), rank=2),
    "tucker of rank one": Tucker.random(row_modes=(6,), col_modes=(2, 4), rank=1),
}


@pytest.mark.parametrize("name", WRONG)
def test_networks_that_are_not_one_matrix_are_refused_by_name(name):
    model = nn.ModuleDict({"fc": tnlayers.Linear(8, 6, network=WRONG[name])})
    for make in (lambda: CondLR(model, 0.1), lambda: tnlayers.condition_penalty(model)):
        with pytest.raises(ValueError, match=r"the network of fc must be one matrix.*two bonds.*got T.*use LowRank"):
            make()
    for core in model["fc"].cores:
        core.requires_grad_(False)
    with pytest.raises(ValueError, match="found none"):
        CondLR(model, 0.1)


def test_models_that_cannot_be_served_are_refused():
    with pytest.raises(TypeError, match="expected the model"):
        CondLR(small_model().parameters(), 0.1)
    with pytest.raises(ValueError, match=r"must have a layer .* found none"):
        CondLR(nn.Linear(3, 3), 0.1)
    with pytest.raises(ValueError, match="must be of this model"):
        CondLR(small_model(), 0.1).load_state_dict(CondLR(small_model()[0], 0.1).state_dict())
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"float32 or float64, got {dtype} in 0.*autocast"):
            CondLR(small_model().to(dtype), 0.1)
    zero = LowRank(torch.ones(6, 2), torch.zeros(2, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match="a weight of zero has no condition number, got one in the layer"):
        CondLR(tnlayers.Linear(5, 6, network=zero), 0.1)
    broken = small_model()
    with torch.no_grad():
        broken[3].cores[0][0, 0] = float("inf")
    with pytest.raises(ValueError, match="weights must be finite, got NaN or infinity in 3"):
        CondLR(broken, 0.1)


def test_layers_that_another_optimizer_has_taken_are_not_touched():
    model = small_model()
    first = CondLR(model, 0.05)
    loop(model, first, range(2))
    second = tnlayers.RankAdaptive(model, 0.01, tol=0.1)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = model[0].weight.detach().clone()
    for call in (first.step, first.zero_grad, first.conditions):
        with pytest.raises(ValueError, match="0 is moved by another optimizer that was made after this one"):
            call()
    assert torch.equal(model[0].weight, before)
    loop(model, second, range(3))
    loop(model, CondLR(model, 0.05), range(3, 5))
    assert max(CondLR(model, 0.05).conditions().values()) <= 1.5


def test_further_parameters_go_to_the_inner_optimizer():
    model = small_model()
    optimizer = CondLR(model, 0.05)
    factor = nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": [factor]})
    x, y = batch(0)
    (F.cross_entropy(model(x), y) * factor).backward()
    optimizer.step()
    assert float(factor.detach()) != 1.0
    with pytest.raises(ValueError, match="there is no inner optimizer"):
        CondLR(tnlayers.Linear(8, 8, bias=False, network=network(LowRank, rank=2)), 0.1).add_param_group(
            {"params": [factor]}
        )
