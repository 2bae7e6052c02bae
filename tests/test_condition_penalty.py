"""`condition_penalty`: its value and gradient against dense references, its bound by sampling, and training with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank, Tree
from decompositions.geometry import center_gradients
from tnlayers import CondLR, RankAdaptive, condition_penalty

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(m: int, n: int, rank: int, seed: int = 0, dtype: torch.dtype = F64) -> tnlayers.Linear:
    net = LowRank.random(row_modes=(m,), col_modes=(n,), rank=rank, dtype=dtype, generator=generator(seed))
    return tnlayers.Linear(n, m, bias=False, network=net)


def dense_penalty(weight: Tensor, rank: int) -> Tensor:
    """From the singular values of the dense weight, differentiable."""
    squares = torch.linalg.svdvals(weight)[:rank].square()
    return (squares - squares.mean()).square().sum().sqrt()


@pytest.mark.parametrize("shape", [(9, 4, 3), (4, 9, 4), (5, 5, 5), (7, 6, 2)])
def test_value_and_gradient_are_those_of_the_dense_weight(shape):
    layer, rank = linear(*shape), shape[2]
    value = condition_penalty(layer)
    value.backward()
    found = [core.grad.clone() for core in layer.cores]
    layer.zero_grad()
    want = dense_penalty(layer.cores[0] @ layer.cores[1] @ layer.cores[2].mT, rank)
    want.backward()
    torch.testing.assert_close(value, want)
    for gradient, core in zip(found, layer.cores, strict=True):
        torch.testing.assert_close(gradient, core.grad, rtol=1e-8, atol=1e-8)


def test_gradient_by_differences():
    layer = linear(6, 5, 3)
    names = [f"cores.{k}" for k in range(3)]

    def value(*cores: Tensor) -> Tensor:
        return torch.func.functional_call(
            Penalized(layer), dict(zip([f"layer.{n}" for n in names], cores, strict=True))
        )

    cores = [core.detach().clone().requires_grad_() for core in layer.cores]
    assert torch.autograd.gradcheck(value, cores)


class Penalized(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return condition_penalty(self.layer)


def test_the_cores_chosen_do_not_matter():
    layer = linear(7, 6, 3)
    a, b = (torch.randn(3, 3, dtype=F64) + 3 * torch.eye(3, dtype=F64) for _ in range(2))
    u, s, v = layer.network.detach().cores
    other = tnlayers.Linear(
        6, 7, network=LowRank(u @ a, torch.linalg.inv(a) @ s @ b, v @ torch.linalg.inv(b).mT), bias=False
    )
    torch.testing.assert_close(condition_penalty(layer), condition_penalty(other))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("moved", [False, True])
def test_in_a_window_the_rank_is_that_without_the_reserve(every, moved):
    """Value at the found rank, and gradients of the probes: the center gradients of that of the dense weight."""
    layer = linear(16, 14, 3)
    optimizer = RankAdaptive(layer, 0.05, tol=1e-6, reserve=2, every=every, betas=(0.0, None))
    if moved:
        (layer.weight * torch.randn(16, 14, dtype=F64)).sum().backward()
        optimizer.step()
    rank = max(optimizer.ranks()[""])
    assert rank < layer.network.ranks[0] <= 2 * (rank + 2)
    optimizer.zero_grad()
    value = condition_penalty(layer)
    weight = layer.weight.detach().requires_grad_()
    want = dense_penalty(weight, rank)
    torch.testing.assert_close(value, want)
    value.backward()
    want.backward()
    assert all(core.grad is None for core in layer.cores)
    at_point = every == 1 or not moved
    if at_point:
        for probe, e in zip(layer.probes, center_gradients(layer._window.at, weight.grad), strict=True):
            torch.testing.assert_close(probe.grad, e, rtol=1e-8, atol=1e-8)
    # and along a direction, whatever the point
    direction = [torch.randn_like(p) for p in layer.probes]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(layer.probes, direction, strict=True))
    ends = []
    for step in (1e-6, -1e-6):
        pairs = enumerate(zip(layer.probes, direction, strict=True))
        shifted = {f"layer.probes.{k}": p.detach() + step * d for k, (p, d) in pairs}
        moved_weight = torch.func.functional_call(Weight(layer), shifted)
        ends.append(float(dense_penalty(moved_weight, rank)))
    assert abs((ends[0] - ends[1]) / 2e-6 - slope) < 1e-5 * (1 + abs(slope))


class Weight(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.weight.detach()


def test_the_gradient_is_finite_where_the_penalty_is_not_smooth():
    cases = {
        "all equal": LowRank(torch.eye(5, 3), 2 * torch.eye(3), torch.eye(4, 3)),
        "zero": LowRank(torch.zeros(5, 3), torch.zeros(3, 3), torch.zeros(4, 3)),
        "zero side": LowRank(torch.zeros(5, 3), torch.eye(3), torch.randn(4, 3)),
        "deficient": LowRank(torch.ones(5, 3), torch.eye(3), torch.randn(4, 3)),
        "rank one": LowRank(torch.randn(5, 1), torch.ones(1, 1), torch.randn(4, 1)),
        "equal groups": LowRank(torch.eye(5, 3), torch.diag(torch.tensor([2.0, 2.0, 1.0])), torch.eye(4, 3)),
    }
    for name, net in cases.items():
        layer = tnlayers.Linear(4, 5, network=net)
        value = condition_penalty(layer)
        value.backward()
        assert math.isfinite(float(value.detach())), name
        assert all(bool(core.grad.isfinite().all()) for core in layer.cores), name
        if name in ("all equal", "zero", "zero side", "rank one"):
            assert float(value.detach()) < 1e-5, name


def test_the_condition_is_bounded_by_the_penalty():
    draw = generator(0)
    for k in range(400):
        rank = 1 + k % 6
        sigma = torch.rand(rank, dtype=F64, generator=draw) * 10 ** (3 * torch.rand((), dtype=F64, generator=draw) - 2)
        sigma = sigma + 0.1 * torch.rand((), dtype=F64, generator=draw)
        u, v = torch.eye(7, rank, dtype=F64), torch.eye(8, rank, dtype=F64)
        layer = tnlayers.Linear(8, 7, network=LowRank(u, torch.diag(sigma), v))
        penalty = float(condition_penalty(layer).detach())
        bound = penalty / (math.sqrt(2) * float(sigma.min()) ** 2)
        assert math.log(float(sigma.max() / sigma.min())) <= bound + 1e-12


def test_two_singular_values_reach_what_the_bound_is_made_of():
    """`R = (sigma_1^2 - sigma_2^2) / sqrt(2)` at rank two: the bound is exp of half the relative gap of the squares."""
    layer = tnlayers.Linear(2, 2, network=LowRank(torch.eye(2), torch.diag(torch.tensor([3.0, 2.0])), torch.eye(2)))
    assert float(condition_penalty(layer).detach()) == pytest.approx(5 / math.sqrt(2), rel=1e-6)


def test_networks_are_summed_and_shared_ones_counted_once():
    a, b = linear(6, 5, 3, 1), linear(5, 6, 2, 2)
    twin = tnlayers.Linear(5, 6, bias=False, network=a.network.detach())
    twin.cores = a.cores
    frozen = linear(5, 6, 2, 3)
    for core in frozen.cores:
        core.requires_grad_(False)
    model = nn.Sequential(a, b, twin, frozen, nn.Linear(3, 3))
    torch.testing.assert_close(condition_penalty(model), condition_penalty(a) + condition_penalty(b))
    tree = tnlayers.Linear(5, 6, network=Tree.random(row_modes=(6,), col_modes=(5,), rank=2, dtype=F64))
    torch.testing.assert_close(condition_penalty(tree), dense_penalty(tree.weight, 2))
    with pytest.raises(ValueError, match=r"condition_penalty: the model must have a layer.*found none"):
        condition_penalty(nn.Linear(3, 3))


@pytest.mark.parametrize("optimizer", ["adamw", "adaptive", "condlr"])
def test_training_with_the_penalty_lowers_the_condition(optimizer):
    def run(beta: float) -> float:
        torch.manual_seed(0)
        layer = linear(12, 10, 4, seed=1, dtype=torch.float32)
        if optimizer == "adamw":
            made: torch.optim.Optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-3)
        elif optimizer == "adaptive":
            made = RankAdaptive(layer, 5e-3, tol=1e-3, reserve=0, settle=1)
        else:
            made = CondLR(layer, 0.05, condition=100.0)
        x, w = torch.randn(64, 10), torch.randn(12, 10) @ torch.diag(torch.linspace(2, 0.2, 10))
        for _ in range(200):
            made.zero_grad()
            (F.mse_loss(layer(x), x @ w.T) + beta * condition_penalty(layer)).backward()
            made.step()
        s = torch.linalg.svdvals(tnlayers.compact(layer).weight.detach())[:4]
        return float(s[0] / s[3])

    assert run(0.3) < 0.8 * run(0.0)


def test_half_precision_and_autocast():
    layer = linear(8, 6, 3, dtype=torch.float32)
    want = condition_penalty(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(condition_penalty(layer), want)
    half = linear(8, 6, 3, dtype=torch.float32).bfloat16()
    value = condition_penalty(half)
    value.backward()
    assert value.dtype == torch.float32
    assert all(bool(core.grad.isfinite().all()) for core in half.cores)
