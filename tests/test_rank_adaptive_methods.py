"""Rank-adaptive training by the schemes of `tnlayers.integrators`: the code that trains is the code that is tested."""

import math
import threading
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, to_dense
from decompositions import round as cut
from tnlayers import RankAdaptive, compact
from tnlayers.integrators import DenseField, integrate
from tnlayers.integrators.integrate import default_root
from tnlayers.integrators.schemes import FIXED, SCHEMES

F64 = torch.float64
METHODS = [method for method in SCHEMES if method != "parallel"]
NETS = {
    "matrix": partial(LowRank.random, row_modes=(8,), col_modes=(10,), rank=3),
    "tucker": partial(Tucker.random, row_modes=(4, 3), col_modes=(5, 2), rank=2),
    "tt-matrix": partial(TTMatrix.random, row_modes=(3, 2, 2), col_modes=(2, 3, 2), rank=3),
}


def start(name: str, seed: int = 0):
    return cut(NETS[name](dtype=F64, generator=torch.Generator().manual_seed(seed)))


def layer_of(net) -> tnlayers.Linear:
    return tnlayers.Linear(math.prod(net.col_modes), math.prod(net.row_modes), bias=False, network=net)


def quadratic(layer, optimizer, target: Tensor):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (layer.weight.reshape(target.shape) - target).square().sum() / 2
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_a_step_in_a_layer_is_a_step_of_integrate(method, name):
    """Gradient flow of a quadratic loss, three steps, against the dense field."""
    net, target = start(name), to_dense(start(name, 1))
    layer = layer_of(net)
    options = {} if method in FIXED else {"tol": 0.05}
    optimizer = RankAdaptive(layer, 0.1, method=method, **options)
    closure = quadratic(layer, optimizer, target)
    for _ in range(3):
        optimizer.step(closure)
    field, root = DenseField(lambda t, y: target - y), default_root(net)
    want = integrate(field, net, (0.0, 0.3), 3, method=method, substep="euler", root=root, **options)
    torch.testing.assert_close(to_dense(layer.network).detach(), to_dense(want.network), rtol=1e-10, atol=1e-10)
    assert optimizer.ranks()[""] == want.network.ranks


@pytest.mark.parametrize("method", METHODS)
def test_all_layers_advance_together(method):
    """As many calls as the deepest network asks for, not their sum; the loss falls; other parameters move too."""
    torch.manual_seed(0)
    factory = tnlayers.random_network
    model = nn.Sequential(
        tnlayers.Linear(12, 16, network=factory(LowRank, rank=2)),
        nn.Tanh(),
        tnlayers.Linear(16, 12, network=factory(TTMatrix, rank=2, row_modes=(3, 4), col_modes=(4, 4))),
        nn.Tanh(),
        nn.Linear(12, 3),
    )
    x, y = torch.randn(64, 12), torch.randn(64, 3)
    options = {} if method in FIXED else {"tol": 0.02, "max_rank": 6}
    optimizer = RankAdaptive(model, 0.2, method=method, inner=partial(torch.optim.SGD, lr=0.1), **options)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    closure()
    optimizer.step(closure)
    if method == "augmented":  # one pass for the bases of all layers and one for their roots
        assert len(losses) - 1 == 2
    assert len(losses) <= 16
    for _ in range(30):
        optimizer.step(closure)
    assert losses[-1] < losses[0]
    assert max(max(r) for r in optimizer.ranks().values()) <= 6
    torch.testing.assert_close(compact(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_weight_decay_and_settling():
    layer = layer_of(start("matrix"))
    before = layer.weight.detach().clone()
    optimizer = RankAdaptive(layer, 0.1, method="augmented", tol=1e-12, weight_decay=0.5, settle=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(torch.zeros(2, 10, dtype=F64)).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(layer.weight.detach(), before * 0.95**3, rtol=1e-10, atol=1e-12)
    assert optimizer.fixed


def test_a_resumed_run_agrees(tmp_path):
    target = to_dense(start("tt-matrix", 1))

    def run(layer, optimizer) -> None:
        for _ in range(3):
            optimizer.step(quadratic(layer, optimizer, target))

    first = layer_of(start("tt-matrix"))
    one = RankAdaptive(first, 0.1, method="augmented", tol=0.05)
    run(first, one)
    torch.save({"model": first.state_dict(), "optimizer": one.state_dict()}, tmp_path / "x.pt")
    run(first, one)
    second = layer_of(start("tt-matrix", 5))
    two = RankAdaptive(second, 0.1, method="augmented", tol=0.05)
    saved = torch.load(tmp_path / "x.pt")
    second.load_state_dict(saved["model"])
    two.load_state_dict(saved["optimizer"])
    run(second, two)
    assert torch.equal(first.weight, second.weight)


def test_a_failing_closure_ends_all_threads():
    model = nn.ModuleList([layer_of(start("matrix")), layer_of(start("tucker"))])
    optimizer = RankAdaptive(model, 0.1, method="augmented", tol=0.1)
    count = threading.active_count()

    def closure() -> Tensor:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    assert threading.active_count() == count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", [1, 2])
def test_an_interrupted_step_has_not_happened(method, when):
    layer, target = layer_of(start("tt-matrix")), to_dense(start("tt-matrix", 1))
    optimizer = RankAdaptive(layer, 0.1, method=method)
    run = quadratic(layer, optimizer, target)
    optimizer.step(run)
    before, ranks, calls = layer.weight.detach().clone(), optimizer.ranks(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt
        return run()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-14, atol=1e-14)
    assert optimizer.ranks() == ranks
    optimizer.step(run)


def test_closures_are_asked_for_and_options_of_windows_refused():
    layer = layer_of(start("matrix"))
    optimizer = RankAdaptive(layer, 0.1, method="augmented", tol=0.1)
    with pytest.raises(ValueError, match="needs several gradients a step"):
        optimizer.step()
    for options in ({"every": 2}, {"budget": 100}, {"window": "center"}, {"min_rank": 2}):
        with pytest.raises(ValueError, match="has no windows and no budget"):
            RankAdaptive(layer, 0.1, method="augmented", **options)
    with pytest.raises(ValueError, match="keeps the ranks"):
        RankAdaptive(layer, 0.1, method="bug", tol=0.1)


def test_equal_networks_move_alike_whatever_the_order_of_the_threads():
    net, target = start("tt-matrix"), to_dense(start("tt-matrix", 1)).reshape(12, 12)
    both = nn.ModuleList([layer_of(net), layer_of(net)])
    optimizer = RankAdaptive(both, 0.1, method="midpoint", tol=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((layer.weight - target).square().sum() / 2 for layer in both)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert torch.equal(both[0].weight, both[1].weight)
