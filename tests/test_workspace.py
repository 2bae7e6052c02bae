"""Memory that layers reuse between calls: never lent while something still needs what is in it."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable

import pytest
import torch

import tnlayers
from decompositions import TTMatrix, apply, plan_apply, to_dense
from decompositions.formats.program import multiply
from decompositions.formats.workspace import Workspace

CPU = torch.device("cpu")


def make(dtype: torch.dtype = torch.float64) -> tnlayers.Linear:
    """A layer whose merged weight (1.1 MB and more) is kept in the workspace."""
    torch.manual_seed(0)
    net = TTMatrix.random(row_modes=(12, 32), col_modes=(16, 24), rank=40, dtype=dtype)
    layer = tnlayers.Linear(384, 384, network=net, dtype=dtype)
    merged = next(plan for plan in plan_apply(net, 64) if plan.strategy == "merge")
    assert merged.chunk > 0
    layer._forced = merged
    return layer


def gradients(layer: tnlayers.Linear, loss: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [*layer.cores, *others], retain_graph=True))


def expected(layer: tnlayers.Linear, *inputs: torch.Tensor) -> list[torch.Tensor]:
    assert layer.bias is not None
    loss = sum((x @ layer.weight.T + layer.bias).square().sum() for x in inputs)
    assert isinstance(loss, torch.Tensor)
    return list(torch.autograd.grad(loss, [*layer.cores, *inputs]))


def test_the_block_is_reused() -> None:
    layer = make()
    x = torch.randn(64, 384, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer._workspace.nbytes >= 8 * 384 * 384
    block = layer._workspace._block
    for _ in range(3):
        layer(x).square().sum().backward()
        assert layer._workspace._block is block


@pytest.mark.parametrize("calls", [2, 3])
def test_several_calls_before_backward(calls: int) -> None:
    layer = make()
    inputs = [torch.randn(64, 384, dtype=torch.float64, requires_grad=True) for _ in range(calls)]
    loss = sum(layer(x).square().sum() for x in inputs)
    assert isinstance(loss, torch.Tensor)
    for got, want in zip(gradients(layer, loss, *inputs), expected(layer, *inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_retained_graph_keeps_its_numbers() -> None:
    layer = make()
    x = torch.randn(64, 384, dtype=torch.float64, requires_grad=True)
    loss = layer(x).square().sum()
    first = gradients(layer, loss, x)
    with torch.no_grad():
        before = [core.clone() for core in layer.cores]
    other = layer(torch.randn(64, 384, dtype=torch.float64)).square().sum()
    other.backward()
    for got, want in zip(gradients(layer, loss, x), first, strict=True):
        assert torch.equal(got, want)
    assert all(torch.equal(core, old) for core, old in zip(layer.cores, before, strict=True))


def test_a_graph_that_outlives_its_layer() -> None:
    layer = make()
    x = torch.randn(64, 384, dtype=torch.float64, requires_grad=True)
    want = expected(layer, x)
    cores, loss = list(layer.cores), layer(x).square().sum()
    del layer
    gc.collect()
    junk = [torch.full((1 << 16,), torch.nan) for _ in range(64)]
    for got, ref in zip(torch.autograd.grad(loss, [*cores, x]), want, strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-10)
    assert junk


def test_a_call_without_gradients_gives_the_block_back() -> None:
    layer = make()
    x = torch.randn(64, 384, dtype=torch.float64)
    loss = layer(x).square().sum()
    want = [g.clone() for g in gradients(layer, loss)]
    with torch.no_grad():
        layer(x)
    assert layer._workspace.nbytes == 0
    layer(x + 1).square().sum().backward()  # a new block, while the old one is still in use
    for got, ref in zip(gradients(layer, loss), want, strict=True):
        assert torch.equal(got, ref)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_blocks_of_their_own(duplicate: Callable[[tnlayers.Linear], tnlayers.Linear]) -> None:
    layer = make()
    x = torch.randn(64, 384, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    other = duplicate(layer)
    assert other._workspace.nbytes == 0
    loss = layer(x).square().sum() + other(x).square().sum()
    got = torch.autograd.grad(loss, list(layer.cores) + list(other.cores))
    for one, two in zip(got[: len(got) // 2], got[len(got) // 2 :], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_and_back(dtype: torch.dtype) -> None:
    layer = make(torch.float32)
    x = torch.randn(64, 384, requires_grad=True)
    for low in (dtype, torch.bfloat16, torch.float32):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low == torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        want = torch.autograd.grad((x @ layer.weight.T).sum(), list(layer.cores))
        for core, ref in zip(layer.cores, want, strict=True):
            assert core.grad is not None
            tolerance = 0.05 if low == torch.bfloat16 else 1e-4
            assert (core.grad - ref).norm() <= tolerance * ref.norm()


def test_lent_to_one_thread_only() -> None:
    workspace, wrong = Workspace(), []

    def use(number: int) -> None:
        for _ in range(300):
            mine = workspace.take(50_000, torch.float32, CPU).fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
def test_shape_dtype_and_alignment(dtype: torch.dtype) -> None:
    workspace = Workspace()
    for numel in (0, 1, 7, 4096):
        taken = workspace.take(numel, dtype, CPU)
        assert (taken.dtype, taken.shape) == (dtype, (numel,))
        assert numel == 0 or taken.data_ptr() % 64 == 0


def test_multiply_with_and_without_it_agree() -> None:
    net = TTMatrix.random(row_modes=(12, 32), col_modes=(16, 24), rank=40, dtype=torch.float64)
    x = torch.randn(64, 16, 24, dtype=torch.float64)
    for plan in plan_apply(net, 64):
        cores = [core.clone().requires_grad_() for core in net.cores]
        y = multiply(plan, x, cores, workspace=Workspace())
        torch.testing.assert_close(y, apply(net, x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(y.flatten(1), x.flatten(1) @ to_dense(net).reshape(384, 384).T, rtol=1e-9, atol=1e-9)
