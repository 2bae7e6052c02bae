"""`CondLR`: the bound on condition numbers under adversarial steps, the step as mathematics, and ordinary loops."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank, Tree, to_dense
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
    assert float(sigma.min()) > 0
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


@pytest.mark.slow
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
    "convolution": (lambda: tnlayers.Conv2d(6, 8, 3, stride=2, network=network(LowRank, rank=3)), (2, 6, 7, 7)),
    "convolution 1d": (lambda: tnlayers.Conv1d(4, 6, 3, groups=2, network=network(LowRank, rank=3)), (2, 4, 9)),
    "transposed": (lambda: tnlayers.ConvTranspose1d(6, 4, 3, network=network(LowRank, rank=2)), (2, 6, 7)),
}


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
    for a, b in pairwise(errors):
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
    for found, want in ((made.up, swept.up), (made.center, swept.center)):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)
    for bond in net.bonds:
        torch.testing.assert_close(made.links[bond], swept.links[bond])
    for a, b in zip(made.down, swept.down, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_weight_that_others_conditioned_gives_the_same_iterates_from_other_cores():
    """Clamped singular values are equal in groups, which leaves the bases of a start open; steps do not see them."""
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
