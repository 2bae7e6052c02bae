"""Rank-adaptive training: ranks of teachers, the step as mathematics, and what an ordinary loop does around it."""

import math
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnlayers
from decompositions import (
    TT,
    LowRank,
    Network,
    Tree,
    TTMatrix,
    Tucker,
    add,
    bond_singular_values,
    norm,
    scale,
    to_dense,
)
from decompositions import round as cut
from decompositions.geometry import gauges, project
from decompositions.lockstep import alone
from tnlayers import RankAdaptive, RankLimitWarning
from tnlayers.integrators.integrate import default_root
from tnlayers.optim.growth import widening
from tnlayers.optim.ranks import Ranks, within_budget

F64 = torch.float64
TOL, LR, STEPS, SETTLE = 0.01, 0.1, 260, 160
"""One tolerance and one learning rate for all starts, seeds and formats."""

FAMILIES = {
    "matrix": (partial(LowRank.random, row_modes=(16,), col_modes=(20,)), 3),
    "tucker-convolution": (partial(Tucker.random, row_modes=(12,), col_modes=(10, 3, 3), modes=(0, 1)), (4, 3)),
    "tt-matrix": (partial(TTMatrix.random, row_modes=(4, 4, 4), col_modes=(4, 3, 4)), (4, 3)),
    "tree": (partial(Tree.random, row_modes=(4, 4), col_modes=(4, 4)), 3),
}
STARTS = {"one": 0.0, "half": 0.5, "twice": 2.0, "full": 100.0}
families = pytest.mark.parametrize("family", FAMILIES)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def teacher(family: str, seed: int) -> Network:
    make, rank = FAMILIES[family]
    net = cut(make(rank=rank, dtype=F64, generator=generator(seed)))
    return scale(net, 1 / float(norm(net)))


def student(family: str, seed: int, factor: float) -> Network:
    """A small random network at a multiple of the teacher's ranks."""
    make, _ = FAMILIES[family]
    wanted = [max(1, math.floor(factor * r)) for r in teacher(family, seed).ranks]
    net = make(rank=100 if family != "tucker-convolution" else (12, 10), dtype=F64, generator=generator(1000 + seed))
    net = cut(net, rank=[min(a, b) for a, b in zip(wanted, net.ranks, strict=True)])
    return scale(net, 0.1 / float(norm(net)))


class Regression:
    """y = x W^T with W a teacher, or a convolution with it; `noise` relative to the teacher."""

    def __init__(self, family: str, seed: int, start: Network, *, noise: float = 0.0, full: bool = False) -> None:
        self.net, self.noise, self.full = teacher(family, seed), noise, full
        self.generator = generator(seed + 77)
        dense = to_dense(self.net)
        self.weight = dense.reshape(math.prod(self.net.row_modes), -1)
        if family == "tucker-convolution":
            self.layer: tnlayers.NetworkLayer = tnlayers.Conv2d(10, 12, 3, bias=False, network=start)
            self.weight = dense
        else:
            rows, cols = self.weight.shape
            self.layer = tnlayers.Linear(cols, rows, bias=False, network=start)

    def loss(self) -> Tensor:
        if self.full:  # the expectation over white inputs
            return (self.layer.weight - self.weight).square().sum() / 2
        if self.weight.ndim == 4:
            x = torch.randn(8, 10, 6, 6, dtype=F64, generator=self.generator)
            y, count = F.conv2d(x, self.weight), 8 * 16
        else:
            x = torch.randn(128, self.weight.shape[1], dtype=F64, generator=self.generator)
            y, count = x @ self.weight.T, 128
        if self.noise:
            y = y + self.noise * y.square().mean().sqrt() * torch.randn(y.shape, dtype=F64, generator=self.generator)
        return (self.layer(x) - y).square().sum() / (2 * count)

    def error(self) -> float:
        return float((self.layer.weight.detach() - self.weight).norm() / self.weight.norm())

    def train(self, steps: int = STEPS, **options: object) -> RankAdaptive:
        options = {"lr": LR, "tol": TOL, "betas": (0.0, None), "settle": SETTLE, **options}
        optimizer = RankAdaptive(self.layer, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return optimizer


def bounds(net: Network, noise: float, samples: int) -> tuple[float, float, float]:
    """Least singular value of a teacher, and what tol must lie between (trees.md)."""
    least = min(float(s[r - 1]) for s, r in zip(bond_singular_values(net).values(), net.ranks, strict=True))
    bonds, (n, m) = len(net.bonds), (math.prod(net.row_modes), math.prod(net.col_modes))
    low = math.sqrt(bonds) * noise * (math.sqrt(n) + math.sqrt(m)) / math.sqrt(samples * n)
    return least, low, math.sqrt(bonds) * least


@families
@pytest.mark.parametrize("seed", range(5))
def test_the_ranks_of_a_teacher_are_found(family, seed):
    least, low, high = bounds(teacher(family, seed), 0.0, 128)
    print(f"{family} seed {seed}: ranks {teacher(family, seed).ranks}, least singular value {least:.3f}, "
          f"{low:.3f} < tol = {TOL} < {high:.3f}")  # fmt: skip
    for start, factor in STARTS.items():
        problem = Regression(family, seed, student(family, seed, factor))
        found = problem.train().ranks()[""]
        assert found == problem.net.ranks, (start, found)
        assert problem.error() < 1e-6, start


@families
@pytest.mark.parametrize("start", ["one", "full"])
def test_the_ranks_are_found_under_noise_and_with_windows(family, start):
    for options in ({}, {"every": 10, "lr": 0.05}, {"every": 10, "window": "center", "lr": 0.2}):
        problem = Regression(family, 0, student(family, 0, STARTS[start]), noise=0.01)
        longer = {"steps": 600, "settle": 400, "tol": 0.02} if options else {}  # windows round less often
        assert problem.train(**longer, **options).ranks()[""] == problem.net.ranks, options


@families
def test_a_stationary_point_of_lower_rank_is_left(family):
    """At the best network of half the ranks the tangent gradient is zero: the reserve is all there is."""
    target = teacher(family, 1)
    half = cut(target, rank=[max(1, r // 2) for r in target.ranks])
    for _ in range(300):  # alternating projections: stationary to rounding
        half = cut(add(half, project(half, to_dense(target) - to_dense(half)).to_network()), rank=half.ranks)
    gap = to_dense(target) - to_dense(half)
    assert float(project(half, gap).norm()) < 1e-9 * float(gap.norm())
    for reserve, grows in ((1, True), (0, False)):
        problem = Regression(family, 1, half, full=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RankLimitWarning)
            found = problem.train(reserve=reserve).ranks()[""]
        assert (found == target.ranks) == grows, (reserve, found)


@families
def test_ten_times_the_tolerance_fails_where_the_bound_says_so(family):
    """The same tolerance times ten, on the teacher with the least singular value: found if and only if it is below."""
    seed = min(range(5), key=lambda s: bounds(teacher(family, s), 0.0, 128)[2])
    problem = Regression(family, seed, student(family, seed, 0.0))
    below = bounds(problem.net, 0.0, 128)[2] > 10 * TOL
    assert (problem.train(tol=10 * TOL).ranks()[""] == problem.net.ranks) == below
    assert (problem.error() < 1e-6) == below


@families
def test_a_tolerance_ten_times_too_large_fails(family):
    """Above the right bound a direction of the teacher is cut."""
    seed = min(range(5), key=lambda s: bounds(teacher(family, s), 0.0, 128)[2])
    problem = Regression(family, seed, student(family, seed, 0.0))
    tol = 10 * bounds(problem.net, 0.0, 128)[2] / math.sqrt(len(problem.net.bonds))
    assert problem.train(tol=min(tol, 0.9)).ranks()[""] != problem.net.ranks
    assert problem.error() > 1e-3


FOUR = {"row_modes": (4, 2), "col_modes": (3, 4)}
LAYERS = {
    "linear low rank": (lambda: tnlayers.Linear(9, 7, network=network(LowRank, rank=3)), (5, 9)),
    "linear tucker": (lambda: tnlayers.Linear(12, 8, network=network(Tucker, rank=2, **FOUR)), (5, 12)),
    "linear tt-matrix": (lambda: tnlayers.Linear(12, 8, network=network(TTMatrix, rank=3, **FOUR)), (5, 12)),
    "linear tree": (lambda: tnlayers.Linear(12, 8, network=network(Tree, rank=2, **FOUR)), (5, 12)),
    "padded linear": (lambda: tnlayers.Linear(11, 7, network=network(TTMatrix, rank=3, **FOUR)), (2, 5, 11)),
    "convolution": (
        lambda: tnlayers.Conv2d(6, 8, 3, padding=1, stride=2, network=network(Tucker, rank=(3, 2), modes=(0, 1))),
        (2, 6, 7, 7),
    ),
    "convolution tt": (lambda: tnlayers.Conv2d(6, 8, 3, network=network(TT, rank=2)), (2, 6, 7, 7)),
    "transposed": (lambda: tnlayers.ConvTranspose1d(6, 4, 3, network=network(LowRank, rank=2)), (2, 6, 7)),
}


def network(format, **options):
    return tnlayers.random_network(format, **options)


def dense_loss(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).square().sum() / 2 + layer(x).sum()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("every", [1, 2])
def test_an_untruncated_step_is_the_projected_gradient_step(name, every):
    """W - lr P(W) G in every kind of layer; and the second step of a window is that of the moved weight."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.randn(*shape, dtype=F64)
    lr = 1e-3
    at = gauges(layer.network.detach(), default_root(layer.network))
    optimizer = RankAdaptive(
        layer, lr, tol=0.0, reserve=0, betas=(0.0, None), every=every, inner=partial(torch.optim.SGD, lr=0.0)
    )
    for _ in range(every):
        dense = layer.to_dense_module().double()
        dense_loss(dense, x).backward()
        gradient = full_gradient(layer, dense)
        before = full_weight(layer)
        optimizer.zero_grad()
        dense_loss(layer, x).backward()
        optimizer.step()
        want = before - lr * project(at, gradient).to_dense()
        torch.testing.assert_close(full_weight(layer), want, rtol=1e-11, atol=1e-11)


def full_weight(layer) -> Tensor:
    return to_dense(layer.network).detach()


def full_gradient(layer, dense) -> Tensor:
    """The gradient of the dense layer in the network's modes, zeros where the network covers more."""
    net = layer.network
    whole = torch.zeros(math.prod(net.row_modes), math.prod(net.col_modes), dtype=F64)
    flat = dense.weight.grad.reshape(dense.weight.shape[0], -1)
    whole[: flat.shape[0], : flat.shape[1]] = flat
    return whole.reshape(net.shape)


def test_embedding_step():
    torch.manual_seed(0)
    layer = tnlayers.Embedding(12, 8, network=network(TTMatrix, rank=2, row_modes=(3, 4), col_modes=(4, 2))).double()
    tokens = torch.tensor([[0, 3, 3], [11, 5, 0]])
    at = gauges(layer.network.detach(), default_root(layer.network))
    optimizer = RankAdaptive(layer, 1e-3, tol=0.0, reserve=0, betas=(0.0, None))
    dense = layer.to_dense_module()
    dense_loss(dense, tokens).backward()
    before = full_weight(layer)
    dense_loss(layer, tokens).backward()
    optimizer.step()
    want = before - 1e-3 * project(at, full_gradient(layer, dense)).to_dense()
    torch.testing.assert_close(full_weight(layer), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("window", ["tangent", "center"])
def test_the_step_does_not_depend_on_the_cores_chosen(every, window):
    """The same W from other cores (every bond re-factored by an ill-conditioned matrix): the same iterates."""
    make = partial(TTMatrix.random, row_modes=(3, 4, 2), col_modes=(4, 2, 3), rank=3, dtype=F64)
    net = cut(make(generator=generator(0)))
    cores = list(net.cores)
    for k, bond in enumerate(net.bonds):
        factor = torch.randn(net.ranks[k], net.ranks[k], dtype=F64, generator=generator(k)) + 3 * torch.eye(
            net.ranks[k]
        )
        a, b = (j for j, leg in enumerate(net.legs) if bond in leg)
        cores[a] = torch.tensordot(cores[a], factor, dims=([net.legs[a].index(bond)], [0])).movedim(
            -1, net.legs[a].index(bond)
        )
        inverse = torch.linalg.inv(factor)
        cores[b] = torch.tensordot(inverse, cores[b], dims=([1], [net.legs[b].index(bond)])).movedim(
            0, net.legs[b].index(bond)
        )
    x = torch.randn(16, 24, dtype=F64, generator=generator(9))
    y = torch.randn(16, 24, dtype=F64, generator=generator(10))
    weights = []
    for start in (net, net.replace(cores)):
        layer = tnlayers.Linear(24, 24, bias=False, network=start)
        optimizer = RankAdaptive(layer, 1e-2, tol=1e-3, reserve=0, every=every, window=window, weight_decay=0.1)
        for _ in range(12):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("window", ["tangent", "center"])
@pytest.mark.parametrize("every", [1, 3])
def test_weight_decay_is_that_of_the_weight(window, every):
    layer = tnlayers.Linear(
        9, 7, bias=False, network=network(TTMatrix, rank=2, row_modes=(7, 1), col_modes=(3, 3))
    ).double()
    before = full_weight(layer)
    optimizer = RankAdaptive(layer, 0.1, tol=0.0, every=every, window=window, weight_decay=0.5)
    for _ in range(6):
        optimizer.zero_grad()
        (layer(torch.zeros(2, 9, dtype=F64))).sum().backward()
        optimizer.step()
    torch.testing.assert_close(full_weight(layer), before * (1 - 0.05) ** 6, rtol=1e-10, atol=1e-12)


def test_max_rank_and_stuck_ranks_are_said_once():
    problem = Regression("matrix", 0, student("matrix", 0, 0.0))
    with pytest.warns(RankLimitWarning, match="max_rank=2 binds") as caught:
        problem.train(steps=60, max_rank=2)
    assert len(caught) == 1
    problem = Regression("matrix", 0, student("matrix", 0, 0.0))
    with pytest.warns(RankLimitWarning, match="cannot grow.*reserve=1") as caught:
        problem.train(steps=150, reserve=0, tol=0.2, lr=0.005)
    assert len(caught) == 1


def test_ranks_do_not_thrash():
    """A singular value that wanders around the tolerance by ten per cent changes the rank once at most."""
    own = Ranks(0.1, None, 0, 1, None)
    net = LowRank.random(row_modes=(10,), col_modes=(10,), rank=3)
    own.start(net)
    own.found = dict.fromkeys(net.bonds, 1)
    choose, seen = own.chooser(net, fixed=False), []
    for k in range(40):
        small = 0.1 / math.sqrt(2) * (1 + 0.1 * math.sin(k))
        seen.append(choose(net.bonds[0], torch.tensor([1.0, small**2, 0.0], dtype=F64), 1.0))
    assert sum(a != b for a, b in pairwise(seen)) <= 1
    assert choose(net.bonds[0], torch.tensor([1.0, 1e-4, 0.0], dtype=F64), 1.0) == 1


def test_widened_bonds_keep_the_tensor_and_give_orthonormal_directions():
    for family in FAMILIES:
        net = teacher(family, 3)
        root = default_root(net)
        at = gauges(net, root)
        wide = alone(widening(at.net, dict.fromkeys(net.bonds, 99), root, generator(0)))
        torch.testing.assert_close(to_dense(wide), to_dense(net), rtol=1e-12, atol=1e-12)
        for edge in at.edges:
            axis = net.legs[edge.child].index(edge.bond)
            u = wide.cores[edge.child].movedim(axis, -1).flatten(0, -2)
            torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1], dtype=F64), rtol=0, atol=1e-12)
            assert u.shape[1] > at.net.cores[edge.child].shape[axis] or u.shape[0] == u.shape[1]


def test_the_budget_cuts_the_least_singular_values_first():
    """Against the order of one sorted list, over random spectra."""
    nets = [
        LowRank.random(row_modes=(10,), col_modes=(8,), rank=5),
        LowRank.random(row_modes=(6,), col_modes=(9,), rank=4),
    ]
    for seed in range(20):
        own = []
        for k, net in enumerate(nets):
            values = (
                torch.rand(net.ranks[0], generator=generator(seed + 100 * k), dtype=F64).sort(descending=True).values
            )
            ranks = Ranks(
                0.1, None, 1, 1, None, spectra={b: values.square() for b in net.bonds}, norm=float(values.norm())
            )
            ranks.start(net)
            own.append(ranks)
        chosen = within_budget(nets, own, 80)
        kept = [found["a"] if "a" in found else next(iter(found.values())) for found in chosen]
        values = [r.spectra[next(iter(r.spectra))].sqrt() / r.norm for r in own]
        dropped = [float(v[k:].max()) for v, k in zip(values, kept, strict=True) if k < len(v)]
        stay = [float(v[k - 1]) for v, k in zip(values, kept, strict=True) if k > 1]
        assert sum(18 * k if j == 0 else 15 * k for j, k in enumerate(kept)) <= 80
        assert dropped
        assert max(dropped) <= min(stay, default=1.0)
