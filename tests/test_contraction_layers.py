"""Tensor contraction and regression layers, in every format, against nn.Linear over flattened modes."""

import copy
import pickle
from functools import partial
from math import prod

import pytest
import torch
from cases import OPERATORS
from test_layers import same
from torch import nn

import tnlayers
from decompositions import TT, LowRank, Network, TTMatrix, Tucker, hosvd, norm, svd, to_dense, tt_svd
from decompositions import round as cut
from tnlayers.contraction_layers import FlatLinear

FORMATS = {"low_rank": LowRank, "tucker": Tucker, "tt": TT, "ttm": TTMatrix}
SHAPES = [((4, 5), (2, 3)), ((3, 4, 2), (5,)), ((6,), (4,)), ((7,), ()), ((3, 2), ()), ((1, 5), (1, 1, 3))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("in_modes", "out_modes"), SHAPES)
def test_regression_in_every_format(in_modes, out_modes, format, dtype):
    layer = tnlayers.TensorRegression(in_modes, out_modes, network=tnlayers.random_network(format, rank=2), dtype=dtype)
    dense = layer.to_dense_module()
    same(layer, dense, torch.randn(3, *in_modes, dtype=dtype), dtype)
    assert layer(torch.zeros(2, 3, *in_modes, dtype=dtype)).shape == (2, 3, *out_modes)
    assert layer(torch.zeros(in_modes, dtype=dtype)).shape == out_modes
    assert layer(torch.zeros(0, *in_modes, dtype=dtype)).shape == (0, *out_modes)


@pytest.mark.parametrize("case", OPERATORS, ids=repr)
def test_regression_with_every_network_by_every_plan(case):
    """Trees, rings, hyper-edges: whatever has columns and rows is a layer."""
    net = case()
    x = torch.randn(4, *net.col_modes, dtype=torch.float64, requires_grad=True)
    wanted = torch.einsum("bj,ij->bi", x.flatten(1), to_dense(net).reshape(prod(net.row_modes), -1))
    layer = tnlayers.TensorRegression(net.col_modes, net.row_modes, network=net)
    dense = layer.to_dense_module()
    for plan in layer.alternatives(4):
        layer._forced = plan
        assert torch.allclose(layer(x).flatten(1) - layer.bias, wanted, atol=1e-10)
        layer.zero_grad()
        dense.zero_grad()
        same(layer, dense, x.detach(), torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_contraction_multiplies_every_axis_by_a_matrix(bias):
    """tensorly-torch's TCL((4, 5), (2, 3), bias=True) raises AttributeError."""
    layer = tnlayers.TensorContraction((4, 5, 6), (2, 3, 4), bias, dtype=torch.float64)
    assert isinstance(layer.network, TTMatrix)
    assert layer.network.is_tree
    assert layer.numel() == 4 * 2 + 5 * 3 + 6 * 4
    a, b, c = (core.reshape(m, n) for core, m, n in zip(layer.cores, (2, 3, 4), (4, 5, 6), strict=True))
    x = torch.randn(7, 4, 5, 6, dtype=torch.float64)
    wanted = torch.einsum("zijk,ai,bj,ck->zabc", x, a, b, c)
    if bias:
        wanted = wanted + layer.bias.reshape(2, 3, 4)
    assert torch.allclose(layer(x), wanted, atol=1e-12)
    same(layer, layer.to_dense_module(), x, torch.float64)


def test_contraction_with_separate_factors_fewer_modes_and_growing_rank():
    factors = torch.randn(2, 4), torch.randn(3, 5)
    net = Network(factors, (("a", "i"), ("b", "j")), ("a", "b"), ("i", "j"))
    layer = tnlayers.TensorContraction((4, 5), (2, 3), network=net, bias=False)
    x = torch.randn(6, 4, 5)
    assert torch.allclose(layer(x), factors[0] @ x @ factors[1].T, atol=1e-5)
    layer = tnlayers.TensorContraction((4, 5, 6), (3,))
    assert layer.network.row_modes == (3, 1, 1)
    assert layer(torch.randn(2, 4, 5, 6)).shape == (2, 3)
    layer = tnlayers.TensorContraction((4, 5), (2, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.set_network(TTMatrix.random(row_modes=(2, 3), col_modes=(4, 5), rank=3))
    layer(torch.randn(2, 4, 5)).square().sum().backward()
    optimizer.step()
    assert layer.network.ranks == (3,)
    layer.set_network(cut(layer.network.detach(), rank=1))


def test_modes_may_be_split_or_joined_but_not_exchanged():
    make = partial(TTMatrix.random, rank=2)
    layer = tnlayers.TensorRegression((4, 6), (6,), network=make(row_modes=(2, 3, 1), col_modes=(4, 2, 3)))
    same(layer, layer.to_dense_module(), torch.randn(3, 4, 6), torch.float32)
    joined = tnlayers.TensorRegression((4, 6), (2, 3), network=make(row_modes=(2, 3), col_modes=(24, 1)))
    assert joined(torch.ones(1, 4, 6)).shape == (1, 2, 3)
    for rows, cols in (((3, 2), (4, 6)), ((2, 3), (6, 4)), ((6, 1), (4, 7)), ((2, 3), (8, 3))):
        with pytest.raises(ValueError, match="must line up"):
            tnlayers.TensorRegression((4, 6), (2, 3), network=make(row_modes=rows, col_modes=cols))


@pytest.mark.parametrize(("in_modes", "out_modes"), SHAPES)
def test_the_output_has_the_deviation_of_a_dense_layer(in_modes, out_modes):
    wanted = (3 * prod(in_modes)) ** -0.5
    for format in FORMATS.values():
        layer = tnlayers.TensorRegression(in_modes, out_modes, network=tnlayers.random_network(format, rank=3))
        assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(wanted, rel=1e-5)
        assert float(layer.bias.detach().abs().max()) <= prod(in_modes) ** -0.5
    layer = tnlayers.TensorContraction(in_modes, out_modes)
    assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(wanted, rel=1e-5)
    layer.reset_parameters()
    assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(wanted, rel=1e-5)


def test_recipes_and_factories_see_the_tensor():
    seen = []

    def factory(shape, dtype, device):
        seen.append(shape)
        return Tucker.random(row_modes=(4,), col_modes=(3, 5), rank=2, dtype=dtype, device=device)

    def recipe(weight):
        seen.append(tuple(weight.shape))
        return tt_svd(weight, rank=2)

    tnlayers.TensorRegression((3, 5), (4,), network=factory)
    layer = tnlayers.TensorRegression((3, 5), (4,), recipe=recipe)
    assert seen == [(4, 3, 5), (4, 3, 5)]
    assert float(norm(layer.network.detach())) == pytest.approx((4 / 3) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("recipe", [svd, hosvd, tt_svd])
def test_it_replaces_a_linear_layer_behind_flatten(recipe):
    dense = nn.Linear(4 * 3 * 5, 6, dtype=torch.float64)
    dense.weight.requires_grad_(False)
    layer = tnlayers.TensorRegression.from_dense(dense, recipe, in_modes=(4, 3, 5))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert torch.allclose(layer(x), dense(x.flatten(1)), atol=1e-10)
    assert not any(core.requires_grad for core in layer.cores)
    again = tnlayers.TensorRegression.from_dense(layer.to_dense_module(), recipe)
    assert (again.in_modes, again.out_modes) == ((4, 3, 5), (6,))
    assert torch.allclose(again(x), layer(x), atol=1e-10)
    for options, message in (({}, "expected in_modes"), ({"in_modes": (4, 3, 6)}, "must multiply")):
        with pytest.raises(ValueError, match=message):
            tnlayers.TensorRegression.from_dense(dense, recipe, **options)
    with pytest.raises(TypeError, match="got Conv1d"):
        tnlayers.TensorRegression.from_dense(nn.Conv1d(3, 4, 1), recipe, in_modes=(3,))


def test_conversion_files_and_copies(tmp_path):
    model = nn.Sequential(
        tnlayers.TensorContraction((4, 5), (3, 3)),
        tnlayers.TensorRegression((3, 3), (2,), network=tnlayers.random_network(Tucker, rank=2)),
    )
    x = torch.randn(6, 4, 5)
    text = tnlayers.summary(model)
    assert "TensorContraction" in text
    assert "TensorRegression" in text
    fresh = nn.Sequential(
        tnlayers.TensorContraction((4, 5), (3, 3)),
        tnlayers.TensorRegression((3, 3), (2,), network=tnlayers.random_network(LowRank, rank=1)),
    )
    file = tnlayers.save(model, tmp_path / "net")
    assert torch.equal(tnlayers.load(file, fresh)(x), model(x))
    other = nn.Sequential(tnlayers.TensorContraction((5, 4), (3, 3)), FlatLinear((3, 3), (2,)))
    with pytest.raises(ValueError, match=r"layer '0' of net\.safetensors must fit the model: .* line up"):
        tnlayers.load(file, other)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    wanted = model(x)
    dense = tnlayers.densify(model)
    assert [type(module) for module in dense] == [FlatLinear, FlatLinear]
    assert torch.allclose(dense(x), wanted, atol=1e-6)
    report = tnlayers.tensorize(dense, hosvd, skip_if_no_gain=False, example_input=x)
    assert [row.status for row in report.rows] == ["converted", "converted"]
    assert report.rows[0].flops_dense == 2 * 20 * 9
    assert all(isinstance(module, tnlayers.TensorRegression) for module in dense)
    assert torch.allclose(dense(x), wanted, atol=1e-5)


def test_bad_input_is_refused_by_name(unchecked):
    make = tnlayers.random_network(Tucker, rank=2)
    for modes in ((), (3, 0), 5, (2.0, 3)):
        with pytest.raises(ValueError, match="in_modes must be sizes"):
            tnlayers.TensorRegression(modes, (2,), network=make)
    with pytest.raises(ValueError, match="out_modes must be sizes"):
        tnlayers.TensorContraction((2, 3), (2, -1))
    with pytest.raises(ValueError, match="exactly one of network="):
        tnlayers.TensorRegression((2, 3), (2,))
    layer = tnlayers.TensorRegression((2, 3), (2,), network=make)
    for shape in ((4, 3, 2), (4, 6), (3,), ()):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 2, 3\)"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected 4 cores, got 2"):
        layer.set_network(Tucker.random(row_modes=(2,), col_modes=(6,), rank=2, modes=(0,)))


def test_other_dtypes(unchecked):
    layer = tnlayers.TensorContraction((2, 3), (2, 2))
    for dtype in (torch.complex64, torch.float64, torch.int64):
        with pytest.raises(TypeError, match=r"expected torch\.float32"):
            layer(torch.zeros(1, 2, 3, dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(4, 2, 3)).dtype == torch.bfloat16
    layer = tnlayers.TensorContraction((2, 3), (2, 2), dtype=torch.complex128)
    x = torch.randn(4, 2, 3, dtype=torch.complex128)
    assert torch.allclose(layer(x), layer.to_dense_module()(x), atol=1e-12)


def test_gradcheck_and_vmap():
    layer = tnlayers.TensorContraction((2, 3), (2, 2), dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def value(x, *cores):
        return torch.func.functional_call(layer, {f"cores.{k}": core for k, core in enumerate(cores)}, (x,))

    assert torch.autograd.gradcheck(value, (x, *layer.cores))
    assert torch.allclose(torch.vmap(layer)(x), layer(x))


@pytest.mark.compile
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_compile_fullgraph_with_a_dynamic_batch(format):
    torch._dynamo.reset()
    make = tnlayers.random_network(format, rank=2)
    model = nn.Sequential(
        tnlayers.TensorContraction((4, 5), (3, 3)), tnlayers.TensorRegression((3, 3), (2,), network=make)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 4, 5)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
        compiled(x).sum().backward()
