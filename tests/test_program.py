"""Execution of plans: the planned forward and backward against the dense reference and against autograd's own."""

from math import prod

import pytest
import reference
import torch
from cases import OPERATORS

from decompositions import TTMatrix, Tucker, apply, plan_apply, to_matrix
from decompositions.formats import plan as plan_module
from decompositions.formats.program import multiply

OPERATOR = pytest.mark.parametrize("case", OPERATORS, ids=repr)
CLOSE = {"atol": 1e-10, "rtol": 1e-9}


@pytest.fixture
def small_slices(monkeypatch):
    """Slice even tiny weights; plans made with the usual size are forgotten before and after."""
    monkeypatch.setattr(plan_module, "CHUNK_BYTES", 64)
    plan_module._plan_apply.cache_clear()
    yield
    plan_module._plan_apply.cache_clear()


def problem(net, batch, rng):
    """x, bias, cores (leaves) and the gradient of y."""
    x = torch.randn(batch, *net.col_modes, dtype=torch.float64, generator=rng, requires_grad=True)
    bias = torch.randn(prod(net.row_modes), dtype=torch.float64, generator=rng, requires_grad=True)
    cores = [core.clone().requires_grad_() for core in net.cores]
    return x, bias, cores, torch.randn(batch, *net.row_modes, dtype=torch.float64, generator=rng)


def dense(net, x, bias, cores):
    flat = x.reshape(x.shape[0], prod(net.col_modes))
    return (flat @ to_matrix(net.replace(cores)).T + bias).reshape(x.shape[0], *net.row_modes)


@OPERATOR
@pytest.mark.parametrize("batch", [0, 1, 3, 17])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_every_plan_has_the_dense_value_and_gradients(case, batch, recompute, rng, small_slices):
    net = case()
    x, bias, cores, gy = problem(net, batch, rng)
    expected = dense(net, x, bias, cores)
    gradients = torch.autograd.grad(expected, [x, bias, *cores], gy)
    plans = plan_apply(net, max(batch, 1))
    for plan in plans:
        y = multiply(plan, x, cores, bias, recompute=recompute)
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected, **CLOSE)
        for got, wanted in zip(torch.autograd.grad(y, [x, bias, *cores], gy), gradients, strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)
        with torch.no_grad():
            torch.testing.assert_close(multiply(plan, x, cores, bias), expected, **CLOSE)


def test_slicing_was_tested(small_slices):
    sliced = [plan for case in OPERATORS for plan in plan_apply(case(), 3) if plan.chunk]
    assert {plan.strategy for plan in sliced} == {"merge"}
    assert len(sliced) > 10


@OPERATOR
def test_only_the_wanted_gradients_are_computed(case, rng, small_slices):
    """Any subset of x, the bias and the cores: the others get None, and the wanted ones are right."""
    net = case()
    x, bias, cores, gy = problem(net, 5, rng)
    expected = torch.autograd.grad(dense(net, x, bias, cores), [x, bias, *cores], gy)
    leaves = [x, bias, *cores]
    for pick in ([0], [1], [2], [len(leaves) - 1], [0, 2], list(range(2, len(leaves)))):
        inputs = [leaf.detach().requires_grad_(k in pick) for k, leaf in enumerate(leaves)]
        for plan in plan_apply(net, 5):
            y = multiply(plan, inputs[0], inputs[2:], inputs[1])
            got = torch.autograd.grad(y, [inputs[k] for k in pick], gy)
            for k, value in zip(pick, got, strict=True):
                torch.testing.assert_close(value, expected[k], **CLOSE)


@pytest.mark.parametrize("case", OPERATORS[::4], ids=repr)
def test_gradients_can_be_differentiated_again(case, rng, small_slices):
    net = case()
    x, bias, cores, _ = problem(net, 2, rng)
    for plan in plan_apply(net, 2):
        assert torch.autograd.gradgradcheck(lambda x, b, *c, plan=plan: multiply(plan, x, c, b), (x, bias, *cores))


def test_transforms_take_the_plain_route(rng):
    net = TTMatrix.random(row_modes=(2, 3), col_modes=(3, 2), rank=2, dtype=torch.float64, generator=rng)
    x = torch.randn(4, 5, 3, 2, dtype=torch.float64, generator=rng)
    mapped = torch.vmap(lambda x: apply(net, x))(x)
    torch.testing.assert_close(mapped, apply(net, x), **CLOSE)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: apply(net, x).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    apply(net, leaf).square().sum().backward()
    torch.testing.assert_close(per_sample, leaf.grad, **CLOSE)
    value, tangent = torch.func.jvp(lambda x: apply(net, x), (x,), (x,))
    torch.testing.assert_close(value, tangent, **CLOSE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(apply(net, dual)).tangent
        torch.testing.assert_close(tangent, value, **CLOSE)


def kept_bytes(run, operands) -> int:
    """Bytes that autograd holds between forward and backward, beside the operands."""
    seen: dict[int, int] = {}
    own = {operand.untyped_storage().data_ptr() for operand in operands}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return sum(seen.values())


@OPERATOR
def test_memory_kept_for_backward_is_as_planned(case, rng):
    net = case()
    x, bias, cores, _ = problem(net, 9, rng)
    operands = [x, bias, *cores]
    for plan in plan_apply(net, 9):
        assert kept_bytes(lambda plan=plan: multiply(plan, x, cores, bias), operands) <= plan.kept
        assert kept_bytes(lambda plan=plan: multiply(plan, x, cores, bias, recompute=True), operands) == 0


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_accumulates_in_single_precision(low, rng, small_slices):
    """The error of a long sum stays near the rounding of its operands, not of the partial sums."""
    nets = [
        TTMatrix.random(row_modes=(8, 8), col_modes=(32, 32), rank=8, generator=rng, std=0.03),
        Tucker.random(row_modes=(8, 8), col_modes=(32, 32), rank=6, generator=rng, std=0.03),
    ]
    for net in nets:
        x = torch.randn(64, 32, 32, generator=rng, requires_grad=True)
        cores = [core.clone().requires_grad_() for core in net.cores]
        leaves = [x, *cores]
        gy = torch.randn(64, 8, 8, generator=rng)
        exact = multiply(plan_apply(net, 64)[0], x, cores)
        gradients = torch.autograd.grad(exact, leaves, gy)
        for plan in plan_apply(net, 64):
            with torch.autocast("cpu", dtype=low):
                y = multiply(plan, x, cores)
            assert y.dtype == low
            limit = 6 * torch.finfo(low).eps
            assert reference.relative(y.float(), exact) < limit
            got = torch.autograd.grad(y, leaves, gy.to(low))
            for value, wanted in zip(got, gradients, strict=True):
                assert value.dtype == torch.float32
                assert reference.relative(value, wanted) < 2 * limit


def test_results_do_not_depend_on_the_call_before(rng):
    """A layer used twice before its backward: nothing is held that the second call could overwrite."""
    net = TTMatrix.random(row_modes=(16, 16), col_modes=(16, 16), rank=20, dtype=torch.float64, generator=rng)
    x, bias, cores, gy = problem(net, 7, rng)
    for plan in plan_apply(net, 7):
        both = multiply(plan, multiply(plan, x, cores, bias).reshape(x.shape), cores, bias)
        got = torch.autograd.grad(both, [x, *cores], gy)
        expected = torch.autograd.grad(
            dense(net, dense(net, x, bias, cores).reshape(x.shape), bias, cores), [x, *cores], gy
        )
        for value, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(value, wanted, **CLOSE)
