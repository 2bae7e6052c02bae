"""`CondLR`: the bound on condition numbers under adversarial steps, the step as mathematics, and ordinary loops."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnlayers
from decompositions import TT, LowRank, Network, Tree, TTMatrix, Tucker, to_dense
from decompositions.geometry import Tangent, center_gradients, gauges, project
from tnlayers import CondLR
from tnlayers.optim.matrices import clamp_condition, middle_of, singular_gauges

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(format, **options):
    return tnlayers.random_network(format, **options)


def linear(m: int, n: int, rank: int, dtype: torch.dtype = F64, seed: int = 0) -> tnlayers.Linear:
    net = LowRank.random(row_modes=(m,), col_modes=(n,), rank=rank, dtype=dtype, generator=generator(seed))
    return tnlayers.Linear(n, m, bias=False, network=net)


def check_promise(layer: tnlayers.NetworkLayer, condition: float) -> None:
    """The bound on the numbers stored, orthonormal bases, and the bound on the weight itself up to rounding."""
    u, s, v = layer.network.detach().cores
    sigma = s.diagonal()
    assert torch.equal(s, torch.diag(sigma))
    assert 0 < float(sigma.min())
    assert float(sigma.max()) / float(sigma.min()) <= condition
    small = 100 * torch.finfo(s.dtype).eps
    for basis in (u, v):
        assert float((basis.mT @ basis - torch.eye(len(sigma), dtype=s.dtype)).abs().max()) < small
    values = torch.linalg.svdvals(layer.network.to(F64).U.detach() @ s.double() @ v.double().mT)[: len(sigma)]
    assert float(values[0] / values[-1]) <= condition * (1 + 100 * small)


# --- the promise ---


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(9, 4, 3), (4, 9, 3), (5, 5, 5), (7, 3, 1), (1, 1, 1), (30, 20, 12)])
@pytest.mark.parametrize("condition", [1, 1.0 + 1e-7, 1.1, 1.5, 50.0])
def test_the_condition_is_bounded_after_every_step(dtype, shape, condition):
    m, n, rank = shape
    layer = linear(m, n, rank, dtype)
    optimizer = CondLR(layer, 0.1, condition=condition, momentum=0.5, weight_decay=0.01)
    check_promise(layer, condition)
    draw = generator(1)
    for k in range(40):
        optimizer.zero_grad()
        x = torch.randn(6, n, dtype=dtype, generator=draw)
        direction = torch.randn(6, m, dtype=dtype, generator=draw)
        if k % 4 == 1:  # a gradient of rank one
            direction = direction[:, :1].expand(6, m) * x[:, :1]
        if k % 7 == 3:
            direction = direction * 0  # none
        optimizer.param_groups[0]["lr"] = (1e-6, 1e-2, 1.0, 1e4)[k % 4]
        (layer(x) * direction).sum().backward()
        optimizer.step()
        check_promise(layer, condition)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("seed", range(3))
def test_clamping_keeps_its_word_to_the_last_bit(dtype, seed):
    draw = generator(seed)
    for k in range(300):
        sigma = torch.rand(1 + k % 5, dtype=dtype, generator=draw) * 10.0 ** (k % 60 - 30)
        condition = 1 + 10.0 ** float(8 * torch.rand((), generator=draw) - 6) * (k % 10 > 0)
        found = clamp_condition(sigma, condition)
        assert float(found.max()) / float(found.min()) <= condition
        mean = sigma.double().mean()
        delta = mean * (condition - 1) / (condition + 1)
        want = sigma.double().clamp(mean - delta, mean + delta).to(dtype)
        torch.testing.assert_close(found, want, rtol=100 * torch.finfo(dtype).eps, atol=0.0)


def test_a_deficient_start_gets_its_full_rank():
    u, v = torch.randn(8, 4), torch.randn(6, 4)
    s = torch.zeros(4, 4)
    s[0, 0] = 2.0
    layer = tnlayers.Linear(6, 8, network=LowRank(u, s, v))
    CondLR(layer, 0.1, condition=1.5)
    check_promise(layer, 1.5)
    assert layer.network.ranks == (4, 4)


def test_unequal_and_excessive_ranks_become_one_that_the_matrix_has():
    layer = tnlayers.Linear(5, 3, network=LowRank(torch.randn(3, 4), torch.randn(4, 6), torch.randn(5, 6)))
    CondLR(layer, 0.1, condition=2.0)
    check_promise(layer, 2.0)
    assert layer.network.ranks == (3, 3)


def test_bases_stay_orthonormal_in_single_precision():
    torch.manual_seed(0)
    layer = linear(14, 18, 4, torch.float32)
    optimizer = CondLR(layer, 0.1, condition=1.5, momentum=0.9)
    w = torch.randn(14, 18)
    for k in range(10_000):
        target = w + 0.3 * math.sin(k / 50) * w.flip(0)  # it never comes to rest
        found = center_gradients(layer._window.at, layer.weight.detach() - target)
        for probe, gradient in zip(layer.probes, found, strict=True):
            probe.grad = gradient
        optimizer.step()
    for basis in (layer.network.U.detach(), layer.network.V.detach()):
        assert float((basis.T @ basis - torch.eye(4)).abs().max()) < 1e-5
    check_promise(layer, 1.5)


# --- the step ---


class Reference:
    """The method on a dense matrix in float64: every formula as it is written, SVD of W for the bases."""

    def __init__(self, w: Tensor, rank: int, condition: float, momentum: float, decay: float) -> None:
        self.rank, self.condition, self.momentum, self.decay = rank, condition, momentum, decay
        self.xi = torch.zeros_like(w)
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        self.u, self.s, self.v = u[:, :rank], self.clamp(s[:rank]), vh[:rank].mT

    @property
    def w(self) -> Tensor:
        return self.u @ torch.diag(self.s) @ self.v.mT

    def clamp(self, s: Tensor) -> Tensor:
        mean = s.mean()
        delta = mean * (self.condition - 1) / (self.condition + 1)
        return s.clamp(mean - delta, mean + delta)

    def project(self, z: Tensor) -> Tensor:
        p, q = self.u @ self.u.mT, self.v @ self.v.mT
        return p @ z + z @ q - p @ z @ q

    def step(self, g: Tensor, lr: float) -> None:
        def orth(a: Tensor) -> Tensor:
            q, r = torch.linalg.qr(a)
            return q * r.diagonal().sign()

        u, v = self.u, self.v
        xi = self.momentum * self.project(self.xi) + self.project(g)
        inverse = torch.diag(1 / self.s)
        left = u - lr * (xi @ v - u @ (u.mT @ xi @ v)) @ inverse
        right = v - lr * (xi.mT @ u - v @ (v.mT @ xi.mT @ u)) @ inverse
        p, s, qh = torch.linalg.svd((1 - lr * self.decay) * torch.diag(self.s) - lr * u.mT @ xi @ v)
        self.u, self.s, self.v, self.xi = orth(left @ p), self.clamp(s), orth(right @ qh.mT), xi


TALL_TREE = {"row_modes": (8,), "col_modes": (12,)}
LAYERS = {
    "linear": (lambda: tnlayers.Linear(9, 7, network=network(LowRank, rank=3)), (5, 9)),
    "linear wide": (lambda: tnlayers.Linear(300, 256, network=network(LowRank, rank=4)), (64, 300)),
    "linear tree": (lambda: tnlayers.Linear(12, 8, network=network(Tree, rank=3, **TALL_TREE)), (2, 5, 12)),
    "convolution": (lambda: tnlayers.Conv2d(6, 8, 3, padding=1, stride=2, network=network(LowRank, rank=3)), (2, 6, 7, 7)),
    "convolution 1d": (lambda: tnlayers.Conv1d(4, 6, 3, groups=2, network=network(LowRank, rank=3)), (2, 4, 9)),
    "transposed": (lambda: tnlayers.ConvTranspose1d(6, 4, 3, network=network(LowRank, rank=2)), (2, 6, 7)),
}  # fmt: skip


def dense_gradient(layer: tnlayers.NetworkLayer, x: Tensor) -> Tensor:
    dense = layer.to_dense_module().double()
    loss(dense, x).backward()
    assert dense.weight.grad is not None
    return dense.weight.grad.reshape(layer.network.shape)


def loss(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).square().mean() / 2 + layer(x).sin().mean()


def matrix(layer: tnlayers.NetworkLayer) -> Tensor:
    return to_dense(layer.network).detach()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("momentum", "decay", "condition"), [(0.0, 0.0, 1.5), (0.9, 0.1, 1.2), (0.5, 0.0, 1.0)])
def test_steps_are_those_of_the_formulas_on_a_dense_matrix(name, momentum, decay, condition):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.randn(*shape, dtype=F64)
    want = Reference(matrix(layer), layer.network.ranks[0], condition, momentum, decay)
    optimizer = CondLR(
        layer, 1.0, condition=condition, momentum=momentum, weight_decay=decay, inner=partial(torch.optim.SGD, lr=0.0)
    )
    for k in range(6):
        lr = 0.3 / (1 + k)
        optimizer.param_groups[0]["lr"] = lr
        torch.testing.assert_close(matrix(layer), want.w, rtol=1e-9, atol=1e-9)
        want.step(dense_gradient(layer, x), lr)
        optimizer.zero_grad()
        loss(layer, x).backward()
        optimizer.step()
        check_promise_of(layer, condition)
    assert float((matrix(layer) - want.w).norm()) < 1e-9 * float(want.w.norm())


def check_promise_of(layer: tnlayers.NetworkLayer, condition: float) -> None:
    sigma = layer.network.cores[middle_of(layer.network).center].detach().diagonal()
    assert float(sigma.max() / sigma.min()) <= condition


def test_a_step_without_clamp_is_that_of_the_projected_gradient_to_second_order():
    g = torch.randn(9, 7, dtype=F64, generator=generator(1))
    errors = []
    for lr in (1e-2, 5e-3, 2.5e-3):
        u, v = (torch.linalg.qr(torch.randn(k, 3, dtype=F64, generator=generator(k))).Q for k in (9, 7))
        core = torch.diag(torch.tensor([1.3, 1.0, 0.8], dtype=F64))
        layer = tnlayers.Linear(7, 9, bias=False, network=LowRank(u, core, v))
        optimizer = CondLR(layer, lr, condition=1e9)
        before = matrix(layer)
        want = before - lr * project(layer.network.detach(), g).to_dense()
        (layer.weight * g).sum().backward()
        optimizer.step()
        errors.append(float((matrix(layer) - want).norm()))
    assert errors[0] > 1e-7
    for a, b in zip(errors, errors[1:], strict=False):
        assert 3.5 < a / b < 4.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("condition", [1.0, 1.5])
def test_iterates_do_not_depend_on_the_cores_of_the_start(momentum, condition):
    net = LowRank.random(row_modes=(11,), col_modes=(8,), rank=4, dtype=F64, generator=generator(0))
    a, b = (torch.randn(4, 4, dtype=F64, generator=generator(k)) + 3 * torch.eye(4, dtype=F64) for k in (1, 2))
    other = LowRank(net.U @ a, torch.linalg.inv(a) @ net.S @ b, net.V @ torch.linalg.inv(b).mT)
    torch.testing.assert_close(to_dense(other), to_dense(net))
    x, y = torch.randn(16, 8, dtype=F64, generator=generator(3)), torch.randn(16, 11, dtype=F64, generator=generator(4))
    weights = []
    for start in (net, other):
        layer = tnlayers.Linear(8, 11, bias=False, network=start)
        optimizer = CondLR(layer, 0.5, condition=condition, momentum=momentum, weight_decay=0.1)
        for _ in range(12):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        weights.append(matrix(layer))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-7, atol=1e-7)


def test_momentum_is_projected_onto_the_new_tangent_space():
    layer = linear(9, 7, 3)
    optimizer = CondLR(layer, 0.2, condition=1.5, momentum=0.9)
    track = optimizer._tracks[0]
    g = torch.randn(9, 7, dtype=F64)
    old = layer.network.detach()
    (layer.weight * g).sum().backward()
    optimizer.step()
    want = project(layer.network.detach(), project(old, g).to_dense()).to_dense()
    torch.testing.assert_close(Tangent(track.window.at, tuple(track.moment)).to_dense(), want)
    assert float((want - project(old, g).to_dense()).norm()) > 1e-3  # it is another tangent space


def test_gauges_made_from_singular_values_are_those_of_the_sweeps():
    net = LowRank.random(row_modes=(7,), col_modes=(9,), rank=3, dtype=F64)
    at = middle_of(net)
    u, s, vh = torch.linalg.svd(to_dense(net), full_matrices=False)
    made = singular_gauges(net, at, u[:, :3].contiguous(), s[:3], vh[:3].mT.contiguous())
    swept = gauges(made.net, at.center, gauged=True)
    assert made.edges == swept.edges
    for a, b in zip([*made.up, *made.center, *made.links.values()], [*swept.up, *swept.center, *swept.links.values()], strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)
    for a, b in zip(made.down, swept.down, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_weight_that_others_conditioned_gives_the_same_iterates_from_other_cores():
    """Clamped singular values are equal in groups, which leaves the bases of a start open; the steps do not see them."""
    start = linear(9, 8, 5, seed=3)
    CondLR(start, 0.1, condition=1.1)
    u, s, v = start.network.detach().cores
    a, b = (torch.linalg.qr(torch.randn(5, 5, dtype=F64, generator=generator(k))).Q for k in (1, 2))
    weights = []
    for net in (LowRank(u, s, v), LowRank(u @ a, a.mT @ s @ b, v @ b)):
        layer = tnlayers.Linear(8, 9, bias=False, network=net)
        optimizer = CondLR(layer, 0.2, condition=1.1, momentum=0.5)
        for k in range(8):
            optimizer.zero_grad()
            (layer.weight * torch.randn(9, 8, dtype=F64, generator=generator(k))).sum().backward()
            optimizer.step()
        weights.append(matrix(layer))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-9)


def test_embeddings_are_stepped_too():
    layer = tnlayers.Embedding(12, 8, network=network(LowRank, rank=3)).double()
    tokens = torch.tensor([[0, 3, 3], [11, 5, 0]])
    optimizer = CondLR(layer, 0.1, condition=1.5)
    before = matrix(layer)
    layer(tokens).square().sum().backward()
    optimizer.step()
    check_promise_of(layer, 1.5)
    assert float((matrix(layer) - before).norm()) > 1e-3


def test_a_teacher_within_the_bound_is_found():
    target = linear(12, 10, 3, seed=5)
    CondLR(target, 0.0, condition=1.3)
    layer = linear(12, 10, 3, seed=6)
    optimizer = CondLR(layer, 0.5, condition=1.5, momentum=0.5)
    x = torch.randn(64, 10, dtype=F64)
    for _ in range(600):
        optimizer.zero_grad()
        ((layer(x) - target(x).detach()).square().sum() / (2 * 64)).backward()
        optimizer.step()
    assert float((matrix(layer) - matrix(target)).norm()) < 1e-6 * float(matrix(target).norm())


# --- loops ---


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        tnlayers.Linear(16, 24, network=network(LowRank, rank=4)),
        nn.ReLU(),
        nn.LayerNorm(24),
        tnlayers.Linear(24, 12, network=network(LowRank, rank=3)),
        nn.ReLU(),
        nn.Linear(12, 5),
    )


def batch(seed: int, count: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 16, generator=generator(seed)), torch.randint(
        0, 5, (count,), generator=generator(seed + 1)
    )


def loop(model: nn.Module, optimizer: CondLR, steps: range) -> None:
    for k in steps:
        x, y = batch(k)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


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
    check_promise(model[0], 1.5)


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
    assert model[0].weight.dtype == F64
    check_promise_of(model[0], 1.5)


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
    spoiled = model[3].probes[1] if where == "network" else model[5].bias
    spoiled.grad[0] = float("nan")
    with pytest.raises(ValueError, match=f"must be finite, got NaN or infinity in {'3' if where == 'network' else 'o'}"):
        optimizer.step()
    assert optimizer.steps == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for a, b in zip(optimizer.state_dict()["tracks"], state["tracks"], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["moment"], b["moment"], strict=True))
    loop(model, optimizer, range(4, 8))


def test_steps_to_zero_or_infinity_are_refused_before_anything_moves():
    for spoil, text in (
        (lambda model, group: [p.grad.mul_(0) for p in model[3].probes] and group.update(lr=1.0, weight_decay=1.0), "3"),
        (lambda model, group: [p.grad.fill_(1e38) for p in model[0].probes] and group.update(lr=1e3), "0"),
    ):  # fmt: skip
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
    with pytest.raises(ValueError, match="must have a layer .* found none"):
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
        CondLR(linear(4, 4, 2), 0.1).add_param_group({"params": [factor]})
