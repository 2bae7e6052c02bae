"""Transposed convolutions against torch's: value, gradients, settings, every plan, output sizes, bad input."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_layers import FRESH, FULL, same
from torch import nn

import tnlayers
from decompositions import LowRank, Network, Tucker, svd, tt_svd, ttm_svd, tucker2
from decompositions import round as cut

LAYERS = (tnlayers.ConvTranspose1d, tnlayers.ConvTranspose2d, tnlayers.ConvTranspose3d)
DENSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

SETTINGS = [
    {},
    {"stride": (2, 1)},
    {"padding": (1, 2), "bias": False},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": (3, 2), "output_padding": (2, 0), "dilation": (1, 2)},
    {"dilation": 2, "output_padding": 1},
    {"groups": 4},
    {"groups": 2, "stride": 2, "padding": 1, "output_padding": (0, 1), "bias": False},
    {"groups": 8, "dilation": (2, 1)},
    {"kernel_size": 1, "stride": 2, "output_padding": 1},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": (1, 3), "stride": 2, "padding": (0, 1)},
    {"kernel_size": (2, 4), "stride": (2, 3), "padding": (1, 0)},
]


@pytest.mark.parametrize("recipe", FULL.values(), ids=FULL)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_at_full_rank_by_every_plan(recipe, settings):
    settings = {"kernel_size": 3, **settings}
    dense = nn.ConvTranspose2d(8, 16, **settings, dtype=torch.float64)
    layer = tnlayers.ConvTranspose2d.from_dense(dense, recipe)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    plans = layer._plans_at(2, (8, 8))
    assert any(plan.strategy == "merge" for plan in plans)
    for plan in plans:
        layer._forced = plan
        layer.zero_grad()
        dense.zero_grad()
        same(layer, dense, x, torch.float64)
    assert layer(x[0]).shape == dense(x[0]).shape
    assert layer.out_spatial((5, 6)) == tuple(dense(x).shape[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", FULL.values(), ids=FULL)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_two_and_three_dimensions(recipe, dims, dtype):
    dense = DENSE[dims - 1](4, 6, 3, stride=2, padding=1, output_padding=1, dtype=dtype)
    layer = LAYERS[dims - 1].from_dense(dense, recipe)
    x = torch.randn(2, 4, *(5, 4, 3)[:dims], dtype=dtype)
    for plan in layer._plans_at(2, (8, 4, 4)[:dims]):
        layer._forced = plan
        layer.zero_grad()
        dense.zero_grad()
        same(layer, dense, x, dtype)


def test_it_is_the_transpose_of_the_convolution_with_the_same_network():
    """<conv(x), y> = <x, conv_transpose(y)>, chain against chain."""
    network = Tucker.random(row_modes=(6,), col_modes=(4, 3, 3), rank=(3, 2), modes=(0, 1), dtype=torch.float64)
    conv = tnlayers.Conv2d(4, 6, 3, stride=2, padding=1, bias=False, network=network)
    back = tnlayers.ConvTranspose2d(6, 4, 3, stride=2, padding=1, bias=False, network=network)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    y = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    chains = [
        [plan for plan in layer._plans_at(2, side) if plan.strategy == "chain"]
        for layer, side in ((conv, (16, 8)), (back, (8, 4)))
    ]
    assert all(chains)
    conv._forced, back._forced = chains[0][0], chains[1][0]
    one, other = (conv(x) * y).sum(), (x * back(y, output_size=x.shape)).sum()
    assert float((one - other).detach()) == pytest.approx(0, abs=1e-10)


def test_they_line_up_and_run_as_chains():
    """Tucker-2 and the chain TT run as 1 x 1, k x k, 1 x 1, pointwise before and after the strided step."""
    for recipe in (partial(tucker2, rank=8), partial(tt_svd, axes=(0, 2, 3, 1), rank=8)):
        layer = tnlayers.ConvTranspose2d.from_dense(nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1), recipe)
        plan = layer.plan(batch=32)
        assert plan.strategy == "chain"
        assert any(step.dims == (True, True) for step in plan.chain)
        assert plan.flops < 0.2 * 32 * layer.dense_flops(layer.weight_shape, None) * 32 * 32
        x = torch.randn(2, 64, 5, 6)
        wanted = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2, padding=1)
        assert torch.allclose(layer(x), wanted, atol=1e-4)


def test_a_stride_without_a_kernel_comes_last():
    layer = tnlayers.ConvTranspose2d(16, 16, 1, stride=3, network=tnlayers.random_network(LowRank, rank=2))
    for plan in layer._plans_at(8, (16, 16)):
        if plan.strategy == "chain":
            assert [any(step.dims) for step in plan.chain] == [False] * (len(plan.chain) - 1) + [True]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_output_size_chooses_among_the_sizes_that_a_stride_allows(dims):
    dense = DENSE[dims - 1](3, 4, 4, stride=3, padding=1)
    layer = LAYERS[dims - 1].from_dense(dense, svd)
    x = torch.randn(2, 3, *(4, 3, 2)[:dims])
    low = layer.out_spatial(x.shape[2:])
    for extra in range(3):
        sizes = [size + extra for size in low]
        for asked in (sizes, torch.Size((2, 4, *sizes))):
            assert torch.allclose(layer(x, asked), dense(x, list(asked)), atol=1e-5)
        assert torch.allclose(layer(x[0], output_size=sizes), dense(x[0], output_size=sizes), atol=1e-5)
    for asked in ([size + 3 for size in low], [size - 1 for size in low]):
        with pytest.raises(ValueError, match="output_size must be between"):
            layer(x, output_size=asked)
    with pytest.raises(ValueError, match=f"output_size needs {dims} entries"):
        layer(x, output_size=[5] * (dims + 1))


def test_every_setting_survives_the_way_there_and_back():
    """Peers drop stride and padding_mode in silence."""
    dense = nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, False, (1, 2))
    layer = tnlayers.ConvTranspose2d.from_dense(dense, svd)
    again = layer.to_dense_module()
    for name in ("kernel_size", "stride", "padding", "output_padding", "groups", "dilation", "padding_mode"):
        assert getattr(layer, name) == getattr(dense, name) == getattr(again, name)
    assert again.bias is None
    assert torch.allclose(again.weight, dense.weight, atol=1e-5)
    assert layer.settings()["output_padding"] == [1, 2]
    assert "output_padding=(1, 2)" in repr(layer)
    with pytest.raises(TypeError, match=r"ConvTranspose2d\.from_dense: expected a torch\.nn\.ConvTranspose2d"):
        tnlayers.ConvTranspose2d.from_dense(nn.Conv2d(4, 6, 3), svd)


def test_it_starts_like_torch_s():
    torch.manual_seed(0)
    dense = nn.ConvTranspose2d(32, 64, 3)
    layer = tnlayers.ConvTranspose2d(32, 64, 3, network=tnlayers.random_network(Tucker, rank=8))
    assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(
        float(dense.weight.detach().std()), rel=0.02
    )
    assert float(layer.bias.detach().abs().max()) <= (64 * 9) ** -0.5


def test_networks_that_do_not_line_up_are_merged():
    """Padded modes, and a hand-made network with a hyper-edge."""
    dense = nn.ConvTranspose2d(13, 7, 3, stride=2, dtype=torch.float64)
    layer = tnlayers.ConvTranspose2d.from_dense(dense, partial(ttm_svd, order=2))
    same(layer, dense, torch.randn(2, 13, 4, 4, dtype=torch.float64), torch.float64)
    a, b, c, d = torch.randn(6, 3), torch.randn(4, 3), torch.randn(3, 3), torch.randn(2, 3)
    legs = (("o", "r"), ("c", "r"), ("h", "r"), ("w", "r"))
    layer = tnlayers.ConvTranspose2d(6, 4, (3, 2), network=Network((a, b, c, d), legs, ("o",), ("c", "h", "w")))
    x = torch.randn(2, 6, 5, 5)
    wanted = F.conv_transpose2d(x, torch.einsum("or,cr,hr,wr->ochw", a, b, c, d), layer.bias)
    for plan in layer._plans_at(2, (8, 8)):
        layer._forced = plan
        assert torch.allclose(layer(x), wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_empty_batches_and_complex_kernels_by_every_plan(dtype):
    dense = nn.ConvTranspose2d(4, 2, (3, 1), stride=2, groups=2, dtype=dtype)
    layer = tnlayers.ConvTranspose2d.from_dense(dense, partial(ttm_svd, order=2))
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    for plan in layer._plans_at(2, (8, 8)):
        layer._forced = plan
        assert layer(x[:0]).shape == (0, 2, 17, 15)
        assert torch.allclose(layer(x), dense(x), atol=1e-10)
        layer(x).abs().sum().backward()


def test_backward_recomputes_on_demand():
    layer = tnlayers.ConvTranspose2d(8, 6, 3, stride=2, network=tnlayers.random_network(Tucker, rank=4))
    x = torch.randn(2, 8, 4, 4)
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.cores[0])
    layer.plan(batch=2, memory="recompute")
    (again,) = torch.autograd.grad(layer(x).square().sum(), layer.cores[0])
    assert torch.allclose(wanted, again, atol=1e-4)


def test_low_precision():
    dense = nn.ConvTranspose2d(8, 8, 3, stride=2).to(torch.bfloat16)
    layer = tnlayers.ConvTranspose2d.from_dense(dense, tucker2)
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)
    assert torch.allclose(layer(x).float(), dense(x).float(), atol=0.05)
    layer = tnlayers.ConvTranspose2d(8, 8, 3, network=tnlayers.random_network(Tucker, rank=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 8, 4, 4)).dtype == torch.bfloat16


def test_bad_settings_and_input_are_refused_by_name(unchecked):
    make = tnlayers.random_network(LowRank, rank=2)
    for options, message in (
        ({"output_padding": 1}, "output_padding must be below stride or dilation"),
        ({"stride": 2, "output_padding": (1, 2)}, "output_padding must be below stride or dilation"),
        ({"padding_mode": "reflect"}, "padding_mode must be 'zeros'"),
        ({"padding": "same"}, "padding must be integers"),
        ({"padding": -1}, "padding needs 2 integers >= 0"),
        ({"groups": 3}, "groups must divide"),
        ({"stride": 0}, "stride needs 2 integers >= 1"),
        ({"stride": 2.0}, "stride needs 2 integers >= 1"),
        ({"dilation": (1, 1, 1)}, "dilation needs 2 integers"),
    ):
        with pytest.raises(ValueError, match=message):
            tnlayers.ConvTranspose2d(4, 6, 3, network=make, **options)
    layer = tnlayers.ConvTranspose2d(4, 6, 3, padding=4, network=make)
    for shape in ((2, 3, 8, 8), (4, 8), (2, 2, 4, 8, 8)):
        with pytest.raises(ValueError, match="with 4 channels"):
            layer(torch.zeros(shape))
    for shape, got in (((1, 4, 5, 8), r"\(5, 8\) -> \(-1, 2\)"), ((1, 4, 0, 8), r"\(0, 8\) ->")):
        with pytest.raises(ValueError, match=f"at least one position, got {got}"):
            layer(torch.zeros(shape))


def test_ranks_change_and_gradcheck():
    layer = tnlayers.ConvTranspose1d(
        4, 6, 3, stride=2, groups=2, network=tnlayers.random_network(LowRank, rank=3), dtype=torch.float64
    )
    layer.set_network(cut(layer.network, rank=2))
    assert torch.autograd.gradcheck(layer, (torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True),))


def test_a_decoder_and_a_bag_convert_and_come_back():
    """Settings that peers lose (stride, padding, output_padding, groups, mode) survive the way there and back."""
    model = nn.Sequential(
        nn.EmbeddingBag(50, 32, mode="sum"),
        nn.Unflatten(1, (8, 2, 2)),
        nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    ).double()
    dense = copy.deepcopy(model)
    tokens = torch.randint(0, 50, (3, 7))
    policy = {nn.ConvTranspose2d: tucker2, nn.EmbeddingBag: svd}
    report = tnlayers.tensorize(model, policy, skip_if_no_gain=False, example_input=tokens)
    assert [row.status for row in report.rows] == ["converted"] * 3
    assert torch.allclose(model(tokens), dense(tokens), atol=1e-11)
    bag, first, second = report.rows
    assert (bag.kind, bag.flops_dense) == ("EmbeddingBag", 7 * 32)
    assert first.flops_dense == 2 * 8 * 12 * 16 * 2 * 2  # every input position meets the whole kernel
    assert second.flops_dense == 2 * 12 * 3 * 9 * 4 * 4
    assert all(row.error < 1e-14 and row.output_bound < 1e-12 for row in report.rows)
    low = copy.deepcopy(dense)
    rows = tnlayers.tensorize(
        low, {nn.ConvTranspose2d: partial(tucker2, rank=2), nn.EmbeddingBag: partial(svd, rank=2)}
    ).rows
    assert all(row.params < row.params_dense and row.spectra for row in rows)
    back = tnlayers.densify(model)
    assert [type(a) for a in back] == [type(b) for b in dense]
    assert [repr(a) for a in back] == [repr(b) for b in dense]
    assert torch.allclose(back(tokens), dense(tokens), atol=1e-11)


@pytest.mark.compile
@pytest.mark.parametrize(("format", "options"), FRESH.values(), ids=FRESH)
def test_compile_fullgraph_with_a_dynamic_batch(format, options):
    torch._dynamo.reset()
    network = tnlayers.random_network(format, 3, **options)
    layer = tnlayers.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, network=network)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 4, 3, 4)
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)
        assert torch.allclose(compiled(x, output_size=(8, 10)), layer(x, output_size=(8, 10)), atol=1e-5)
