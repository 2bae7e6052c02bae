"""The least-squares solution of one core against dense references."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from decompositions import as_operator, kronecker_svd, svd, to_matrix, ttm_svd
from tests.cases import CASES
from tests.loops import generator
from tnlayers.recovery import solve_linear

RECIPES = {
    "svd": partial(svd, rank=3),
    "ttm": partial(ttm_svd, rank=3, row_modes=(3, 4), col_modes=(5, 2)),
    "padded": partial(ttm_svd, rank=3, row_modes=(4, 4), col_modes=(4, 3)),
    "kronecker": partial(kronecker_svd, rank=2, row_modes=(3, 4), col_modes=(5, 2)),
}


def padded(weight: torch.Tensor, recipe):
    """The recipe on a weight with zero rows and columns up to its modes."""
    rows, cols = (
        torch.Size(recipe.keywords.get(f"{side}_modes", (n,)))
        for side, n in zip(("row", "col"), weight.shape, strict=True)
    )
    return recipe(F.pad(weight, (0, cols.numel() - weight.shape[1], 0, rows.numel() - weight.shape[0])))


def double_layer(kind: str, *, bias: bool = True):
    weight = torch.randn(12, 10, dtype=torch.float64, generator=generator(1))
    layer = tnlayers.Linear(10, 12, bias, network=padded(weight, RECIPES[kind]))
    return layer.double()


def jacobian_of(layer, core, x):
    """Dense columns of the output in one core (and the bias), by autograd: the slow truth."""
    parts = [layer.cores[core]] + ([] if layer.bias is None else [layer.bias])

    def made(*values):
        names = [f"cores.{core}"] + ([] if layer.bias is None else ["bias"])
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).flatten()

    found = torch.autograd.functional.jacobian(made, tuple(p.detach() for p in parts))
    return torch.cat([part.flatten(1) for part in found], 1), made(*(p.detach() for p in parts)).detach()


@torch.no_grad()
def relative(layer, x, y) -> float:
    return float((layer(x) - y).double().square().sum() / y.double().square().sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", RECIPES)
def test_solve_linear_is_the_optimum_over_its_core(kind, bias):
    layer = double_layer(kind, bias=bias)
    x = torch.randn(80, 10, dtype=torch.float64, generator=generator(2))
    y = torch.randn(80, 12, dtype=torch.float64, generator=generator(3))
    before = copy.deepcopy(layer)
    done = solve_linear(layer, x, y, ridge=1e-14)
    columns, now = jacobian_of(before, done.core, x)
    change = torch.linalg.lstsq(columns, (y.flatten() - now), driver="gelsd").solution
    best = float((y.flatten() - now - columns @ change).square().sum() / y.square().sum())
    assert done.after == pytest.approx(relative(layer, x, y), rel=1e-9)
    assert done.before == pytest.approx(relative(before, x, y), rel=1e-9)
    if kind == "padded":  # rows that are cut stay put, so that this is a bound
        assert best * (1 - 1e-9) <= done.after < done.before
    else:
        assert done.after == pytest.approx(best, rel=1e-7)
    changed = [not torch.equal(a, b) for a, b in zip(before.cores, layer.cores, strict=True)]
    assert changed == [k == done.core for k in range(len(changed))]


def test_solve_linear_recovers_a_weight_of_the_same_inner_space():
    layer = double_layer("svd")
    truth = copy.deepcopy(layer)
    with torch.no_grad():
        truth.cores[0].normal_(generator=generator(4))
        truth.bias.normal_(generator=generator(5))
    x = torch.randn(5, 8, 10, dtype=torch.float64, generator=generator(6))
    done = solve_linear(layer, x, truth(x).detach(), ridge=1e-16)
    assert done.after < 1e-20 < done.before
    assert torch.allclose(layer.weight, truth.weight, atol=1e-9)
    assert torch.allclose(layer.bias, truth.bias, atol=1e-9)
    assert done.tokens == 40


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("ridge", [1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("kind", RECIPES)
def test_solve_linear_never_increases_the_error(kind, ridge, tokens):
    layer = double_layer(kind).float()
    x = torch.randn(tokens, 10, generator=generator(7))
    y = layer(x).detach() + 1e-3 * torch.randn(tokens, 12, generator=generator(8))
    before = relative(layer, x, y)
    done = solve_linear(layer, x, y, ridge=ridge)
    after = relative(layer, x, y)
    assert after <= before * (1 + 1e-4)  # float32 in the forward that this test makes
    assert done.after <= done.before
    assert all(bool(core.isfinite().all()) for core in layer.cores)


def test_a_large_ridge_keeps_the_present_core():
    layer = double_layer("svd", bias=False)
    kept = layer.cores[0].detach().clone()
    x = torch.randn(30, 10, dtype=torch.float64, generator=generator(7))
    y = torch.randn(30, 12, dtype=torch.float64, generator=generator(8))
    changes = []
    for ridge in (1e-4, 1e2, 1e8):
        with torch.no_grad():
            layer.cores[0].copy_(kept)
        solve_linear(layer, x, y, ridge=ridge)
        changes.append(float((layer.cores[0].detach() - kept).norm()))
    assert changes[0] > changes[1] > changes[2]
    assert changes[2] < 1e-5


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_solve_linear_on_every_format(case):
    net = case()
    if not net.cols:
        net = as_operator(net, 1)
    if not net.cols or net.dtype.is_complex:
        pytest.skip("no operator of real numbers")
    rows, cols = to_matrix(net).shape
    layer = tnlayers.Linear(cols, rows, network=net)
    x = torch.randn(60, cols, dtype=torch.float64, generator=generator(2))
    y = torch.randn(60, rows, dtype=torch.float64, generator=generator(3))
    before = copy.deepcopy(layer)
    done = solve_linear(layer, x, y, ridge=1e-13)
    columns, now = jacobian_of(before, done.core, x)
    change = torch.linalg.lstsq(columns, y.flatten() - now, driver="gelsd").solution
    best = float((y.flatten() - now - columns @ change).square().sum() / y.square().sum())
    assert done.after == pytest.approx(best, rel=1e-5, abs=1e-12)


def test_masked_tokens_do_not_count():
    layer = double_layer("svd")
    other = copy.deepcopy(layer)
    x = torch.randn(4, 9, 10, dtype=torch.float64, generator=generator(2))
    y = torch.randn(4, 9, 12, dtype=torch.float64, generator=generator(3))
    mask = torch.rand(4, 9, generator=generator(4)) < 0.6
    done = solve_linear(layer, torch.where(mask[..., None], x, 1e6), torch.where(mask[..., None], y, 1e6), mask=mask)
    assert done.tokens == int(mask.sum())
    solve_linear(other, x[mask], y[mask])
    assert torch.equal(layer.cores[0], other.cores[0])


def test_solve_linear_refuses(unchecked):
    layer = double_layer("svd")
    x, y = torch.randn(20, 10, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"must be a tnlayers\.Linear, got Linear"):
        solve_linear(nn.Linear(10, 12), x, y)
    with pytest.raises(ValueError, match="inputs must have 10 features last"):
        solve_linear(layer, y, y)
    with pytest.raises(ValueError, match="same leading axes"):
        solve_linear(layer, x, y[:3])
    with pytest.raises(ValueError, match="ridge must be a finite number >= 0, got -1"):
        solve_linear(layer, x, y, ridge=-1)
    with pytest.raises(ValueError, match="must be finite"):
        solve_linear(layer, x * float("nan"), y)
    with pytest.raises(ValueError, match="at least one token"):
        solve_linear(layer, x, y, mask=torch.zeros(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="ridge=0 the features must have full rank, expected 3"):
        solve_linear(layer, x[:2], y[:2], ridge=0)
    layer.cores[0].requires_grad_(False)
    with pytest.raises(ValueError, match="core 0, which owns most rows, is frozen"):
        solve_linear(layer, x, y)
