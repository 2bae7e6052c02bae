"""Every layer, with every format, against its torch layer: value, gradients, settings, dtypes, ranks that change."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from decompositions import (
    TT,
    LowRank,
    Network,
    TTMatrix,
    Tucker,
    add,
    hosvd,
    norm,
    numel,
    svd,
    to_dense,
    tt_svd,
    ttm_svd,
    tucker2,
)
from decompositions import round as cut
from tnlayers.conv_plan import align
from tnlayers.layer import NetworkLayer

# Recipes at full rank: the layer must not change at all.
FULL = {
    "svd": svd,
    "tucker2": tucker2,
    "hosvd": hosvd,
    "tt": tt_svd,
    "ttm2": partial(ttm_svd, order=2),
    "ttm3": partial(ttm_svd, order=3),
}
FRESH = {
    "low_rank": (LowRank, {}),
    "tucker": (Tucker, {}),
    "tt": (TT, {}),
    "ttm": (TTMatrix, {}),
    "ttm4": (TTMatrix, {"order": 4}),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def same(layer: NetworkLayer, dense: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Value, gradient with respect to x and to the cores (through the dense weight's), against the dense layer."""
    scale = TOLERANCE[dtype]
    first = x.clone().requires_grad_()
    second = x.clone().requires_grad_()
    y, z = layer(first), dense(second)
    assert y.shape == z.shape
    assert y.dtype == z.dtype
    assert torch.allclose(y, z, rtol=scale, atol=scale * float(z.detach().abs().max().clamp_min(1)))
    (y.square().sum()).backward()
    (z.square().sum()).backward()
    limit = 10 * scale * float(second.grad.abs().max().clamp_min(1))
    assert torch.allclose(first.grad, second.grad, rtol=scale, atol=limit)
    if layer.bias is not None:
        assert torch.allclose(layer.bias.grad, dense.bias.grad, rtol=scale, atol=limit)
    # chain rule through the dense weight, by autograd of to_dense alone
    wanted = torch.autograd.grad(layer.weight, list(layer.cores), dense.weight.grad.reshape(layer.weight.shape))
    for core, gradient in zip(layer.cores, wanted, strict=True):
        assert torch.allclose(core.grad, gradient, rtol=100 * scale, atol=100 * scale * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", FULL.values(), ids=FULL)
@pytest.mark.parametrize(("width", "out", "bias"), [(20, 12, True), (13, 7, False), (1, 5, True), (6, 1, True)])
def test_linear_at_full_rank(recipe, dtype, width, out, bias):
    dense = nn.Linear(width, out, bias=bias, dtype=dtype)
    layer = tnlayers.Linear.from_dense(dense, recipe)
    assert (layer.bias is None) == (not bias)
    same(layer, dense, torch.randn(4, 3, width, dtype=dtype), dtype)
    assert torch.allclose(layer(torch.zeros(2, width, dtype=dtype)), dense(torch.zeros(2, width, dtype=dtype)))


CONV_SETTINGS = [
    {},
    {"stride": (2, 1)},
    {"padding": "same"},
    {"padding": "valid", "bias": False},
    {"padding": (1, 2), "padding_mode": "circular", "dilation": (1, 2)},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "replicate"},
    {"groups": 4},
    {"groups": 2, "stride": 2, "padding": 1, "bias": False},
    {"groups": 8},
    {"kernel_size": 1, "stride": 2, "padding": 1},
    {"kernel_size": (1, 3), "padding": (0, 1)},
]


@pytest.mark.parametrize("recipe", FULL.values(), ids=FULL)
@pytest.mark.parametrize("settings", CONV_SETTINGS, ids=str)
def test_conv2d_at_full_rank_by_every_plan(recipe, settings):
    settings = {"kernel_size": 3, **settings}
    dense = nn.Conv2d(8, 16, **settings, dtype=torch.float64)
    layer = tnlayers.Conv2d.from_dense(dense, recipe)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    plans = layer._plans_at(2, (8, 8))
    assert any(plan.strategy == "merge" for plan in plans)
    for plan in plans:
        layer._plans = {(2, 8, 8): plan}
        layer.zero_grad()
        dense.zero_grad()
        same(layer, dense, x, torch.float64)
    assert layer(x[0]).shape == dense(x[0]).shape


@pytest.mark.parametrize("recipe", FULL.values(), ids=FULL)
@pytest.mark.parametrize("dims", [1, 3])
def test_conv1d_and_conv3d_at_full_rank(recipe, dims):
    dense_class = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer_class = (tnlayers.Conv1d, tnlayers.Conv2d, tnlayers.Conv3d)[dims - 1]
    dense = dense_class(4, 6, 3, stride=2, padding=1, dtype=torch.float64)
    same(layer_class.from_dense(dense, recipe), dense, torch.randn(2, 4, *(7, 6, 5)[:dims]).double(), torch.float64)


def test_convolutions_line_up_and_run_as_chains():
    """The chain is not a decoration: these kernels run as small convolutions, in the layout they came in."""
    for factory in (partial(tt_svd, axes=(1, 2, 3, 0), rank=4), partial(tucker2, rank=4)):
        layer = tnlayers.Conv2d.from_dense(nn.Conv2d(64, 64, 3, padding=1), factory)
        plan = layer.plan(batch=32)
        assert plan.strategy == "chain"
        assert len(plan.chain) == 3  # 1x1, k x k (the small kernel cores of TT contracted first), 1x1
        x = torch.randn(2, 64, 9, 8).to(memory_format=torch.channels_last)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_a_mode_that_spans_axes_is_split_and_a_padded_one_is_merged():
    net = LowRank.random(row_modes=(12,), col_modes=(8, 3, 3), rank=2)
    found = align(net.legs, net.rows, net.cols, net.sizes, (12, 8, 3, 3), 4)
    assert found is not None
    assert [split.sizes for split in found.splits] == [(4, 3), (8, 3, 3)]
    wide = TTMatrix.random(row_modes=(4, 4, 1, 1), col_modes=(2, 4, 3, 3), rank=2)
    assert align(wide.legs, wide.rows, wide.cols, wide.sizes, (13, 8, 3, 3), 1) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = tnlayers.Conv2d.from_dense(nn.Conv2d(8, 13, 3), partial(ttm_svd, order=2))
    assert layer(torch.randn(1, 8, 5, 5)).shape == (1, 13, 3, 3)


@pytest.mark.parametrize("recipe", FULL.values(), ids=FULL)
def test_embedding_at_full_rank(recipe):
    dense = nn.Embedding(101, 12, padding_idx=3, dtype=torch.float64)
    with torch.no_grad():
        dense.weight[3] = 7.0  # a padding row that is not zero keeps its values
    layer = tnlayers.Embedding.from_dense(dense, recipe)
    tokens = torch.randint(0, 101, (5, 6))
    tokens[0, 0] = 3
    for rows in (1, 4096):  # gathered slices for few tokens, the merged table for many
        layer._plans = {32: layer._make_plan(rows)}
        layer.zero_grad()
        y = layer(tokens)
        assert torch.allclose(y, dense(tokens), atol=1e-12)
        assert torch.equal(y[0, 0], torch.full((12,), 7.0, dtype=torch.float64))
        y.square().sum().backward()
        wanted = torch.autograd.grad(F.embedding(tokens, layer.weight).square().sum(), list(layer.cores))
        for core, gradient in zip(layer.cores, wanted, strict=True):
            assert torch.allclose(core.grad, gradient, atol=1e-10)
    assert torch.allclose(layer.weight, dense.weight, atol=1e-12)


def test_embedding_padding_sends_no_gradient_and_starts_at_zero():
    layer = tnlayers.Embedding(10, 4, padding_idx=-1, network=tnlayers.random_network(LowRank, rank=2))
    assert layer.padding_idx == 9
    assert torch.equal(layer(torch.tensor([9])), torch.zeros(1, 4))
    layer(torch.tensor([9, 9])).sum().backward()
    assert all(float(core.grad.abs().max()) == 0 for core in layer.cores)
    assert float(layer.weight[9].detach().abs().max()) == 0


def test_embedding_refuses_tokens_outside_even_in_the_padded_range(unchecked):
    layer = tnlayers.Embedding(13, 4, network=tnlayers.random_network(TTMatrix, rank=2, order=2))
    assert layer.network.row_modes[0] * layer.network.row_modes[1] > 13
    for bad in (13, -1):
        with pytest.raises(IndexError, match=r"0\.\.12"):
            layer(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match="float32"):
        layer(torch.tensor([0.0]))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_refuses_by_name(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        tnlayers.Embedding(10, 4, **option, network=tnlayers.random_network(LowRank, rank=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("format", "options"), FRESH.values(), ids=FRESH)
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_fresh_layers_have_exactly_torch_s_deviation(format, options, rank, dtype):
    make = partial(tnlayers.random_network, format, rank, **options)
    exact = 0.02 if dtype == torch.bfloat16 else 1e-5
    for seed in range(3):
        torch.manual_seed(seed)
        layers = [
            (tnlayers.Linear(60, 40, network=make(), dtype=dtype), (3 * 60) ** -0.5),
            (tnlayers.Conv2d(6, 10, 3, network=make(), dtype=dtype), (3 * 54) ** -0.5),
            (tnlayers.ConvTranspose2d(6, 10, 3, network=make(), dtype=dtype), (3 * 90) ** -0.5),
            (tnlayers.Embedding(50, 12, network=make(), dtype=dtype), 1.0),
            (tnlayers.EmbeddingBag(50, 12, network=make(), dtype=dtype), 1.0),
            (tnlayers.TensorRegression((6, 10), (4,), network=make(), dtype=dtype), (3 * 60) ** -0.5),
        ]
        for layer, std in layers:
            dense = to_dense(layer.network).detach().double()
            assert float(dense.square().mean().sqrt()) == pytest.approx(std, rel=exact)


def test_a_fresh_layer_trains_and_block_tt_is_not_zero():
    """tensorly-torch's BlockTT starts at 1e-9 and its loss stays where it is."""
    torch.manual_seed(0)
    make = tnlayers.random_network(TTMatrix, rank=8, row_modes=(4, 4, 8, 8), col_modes=(4, 4, 8, 8))
    layer = tnlayers.Linear(1024, 1024, network=make)
    x, target = torch.randn(64, 1024), torch.randn(64, 1024)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_no_layer_is_made_of_uninitialised_memory():
    """Poison what the allocator hands out next, then make layers: nothing of it may show."""
    for _ in range(3):
        blocks = [torch.full((n,), float("nan")) for n in (64, 640, 4096, 40000) for _ in range(20)]
        del blocks
        for format, options in FRESH.values():
            for layer in (
                tnlayers.Linear(16, 16, network=tnlayers.random_network(format, 4, **options)),
                tnlayers.Conv2d(8, 8, 3, network=tnlayers.random_network(format, 4, **options)),
                tnlayers.ConvTranspose2d(8, 8, 3, network=tnlayers.random_network(format, 4, **options)),
                tnlayers.EmbeddingBag(8, 8, network=tnlayers.random_network(format, 4, **options)),
                tnlayers.TensorRegression((4, 4), (8,), network=tnlayers.random_network(format, 4, **options)),
                tnlayers.TensorContraction((4, 4), (2, 8)),
            ):
                assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())


def test_recipe_in_the_constructor_keeps_the_deviation():
    layer = tnlayers.Linear(50, 40, recipe=partial(svd, rank=3))
    assert float(norm(layer.network.detach())) == pytest.approx((50 * 40 / (3 * 50)) ** 0.5, rel=1e-5)
    assert layer.network.ranks == (3, 3)


def test_empty_batches_have_torch_s_shapes():
    for format, options in FRESH.values():
        make = partial(tnlayers.random_network, format, 3, **options)
        assert tnlayers.Linear(16, 6, network=make())(torch.zeros(0, 16)).shape == (0, 6)
        assert tnlayers.Linear(16, 6, network=make())(torch.zeros(2, 0, 16)).shape == (2, 0, 6)
        assert tnlayers.Conv2d(4, 6, 3, network=make())(torch.zeros(0, 4, 8, 8)).shape == (0, 6, 6, 6)
        assert tnlayers.Embedding(16, 6, network=make())(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 6)
    layer = tnlayers.Linear(16, 6, network=make())
    layer(torch.zeros(0, 16)).sum().backward()
    assert all(core.grad is not None for core in layer.cores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layers_from_dense(dtype):
    dense = nn.Linear(24, 16).to(dtype)
    layer = tnlayers.Linear.from_dense(dense, partial(ttm_svd, order=2))
    x = torch.randn(5, 24, dtype=dtype)
    assert layer(x).dtype == dtype
    assert torch.allclose(layer(x).float(), dense(x).float(), atol=0.05)


def test_autocast_runs_in_bfloat16_and_keeps_float32_gradients():
    for format, options in FRESH.values():
        layer = tnlayers.Linear(32, 24, network=tnlayers.random_network(format, 4, **options))
        x = torch.randn(8, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype in (torch.bfloat16, torch.float32)
        assert torch.allclose(y.float(), layer(x), atol=0.1)
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_complex_layers():
    weight = nn.Linear(12, 10, dtype=torch.complex128)
    layer = tnlayers.Linear.from_dense(weight, partial(ttm_svd, order=2))
    x = torch.randn(3, 12, dtype=torch.complex128)
    assert torch.allclose(layer(x), weight(x), atol=1e-12)


@pytest.mark.parametrize(("format", "options"), FRESH.values(), ids=FRESH)
def test_copies_pickles_and_state_dicts(format, options):
    layer = tnlayers.Linear(24, 18, network=tnlayers.random_network(format, 4, **options))
    x = torch.randn(3, 24)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert all(a is not b for a, b in zip(other.cores, layer.cores, strict=True))
    assert sorted(layer.state_dict()) == ["bias", *(f"cores.{k}" for k in range(len(layer.cores)))]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("format", "options"), FRESH.values(), ids=FRESH)
def test_load_state_dict_across_ranks(format, options, assign):
    make = partial(tnlayers.random_network, format, **options)
    small = nn.Sequential(tnlayers.Linear(24, 18, network=make(rank=2)))
    large = nn.Sequential(tnlayers.Linear(24, 18, network=make(rank=5)))
    x = torch.randn(3, 24)
    file = io.BytesIO()
    torch.save(large.state_dict(), file)
    file.seek(0)
    small.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert small[0].network.ranks == large[0].network.ranks
    assert torch.equal(small(x), large(x))
    copied = copy.deepcopy(small)  # the hook follows the copy
    copied.load_state_dict(nn.Sequential(tnlayers.Linear(24, 18, network=make(rank=3))).state_dict())
    assert copied[0].network.ranks != small[0].network.ranks or format is LowRank


def test_load_state_dict_refuses_cores_that_do_not_fit():
    layer = tnlayers.Linear(24, 18, network=tnlayers.random_network(LowRank, rank=2))
    state = layer.state_dict()
    state["cores.0"] = torch.zeros(18, 7)
    with pytest.raises(RuntimeError, match="must have one size, expected 7"):
        layer.load_state_dict(state)
    state = tnlayers.Linear(20, 18, network=tnlayers.random_network(LowRank, rank=2)).state_dict()
    with pytest.raises(RuntimeError, match="24, got 20"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_a_rank_change_after_every_backward_in_the_ordinary_loop(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(
        tnlayers.Conv2d(3, 8, 3, padding=1, network=tnlayers.random_network(Tucker, rank=3, modes=(0, 1))),
        nn.Flatten(),
        tnlayers.Linear(8 * 16, 12, network=tnlayers.random_network(TTMatrix, rank=3, order=2)),
        nn.Tanh(),
        tnlayers.Linear(12, 4, network=tnlayers.random_network(LowRank, rank=3)),
    )
    layers = [module for module in model if isinstance(module, NetworkLayer)]
    parameters = [id(p) for p in model.parameters()]
    opt = optimizer(model.parameters(), lr=1e-3)
    seen = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            opt.zero_grad()
            loss = model(torch.randn(4, 3, 4, 4)).square().mean()
            loss.backward(retain_graph=True)
            opt.step()
            moments = [(p, opt.state[p]) for p in model.parameters() if p in opt.state]
            assert all(m["exp_avg"].shape == p.shape for p, m in moments if "exp_avg" in m)
            for layer in layers:
                net = layer.network.detach()
                layer.set_network(cut(add(net, net), rank=3) if step % 2 else cut(net, rank=2))
                assert all(p.grad is None for p in layer.cores)
            seen.add(layers[1].network.ranks)
        assert bool(torch.isfinite(loss))
    messages = [w for w in caught if issubclass(w.category, tnlayers.RankChangeWarning)]
    stateful = optimizer is not torch.optim.SGD
    assert len(messages) == int(stateful)  # said once, and only where there was state to lose
    assert seen == {(2,), (3,)}
    assert [id(p) for p in model.parameters()] == parameters


def test_an_old_graph_may_stay_alive_through_a_rank_change():
    """`p.data = ...` raises at the next backward while the old loss is alive; `set_` does not."""
    layer = tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=4))
    loss = layer(torch.randn(2, 8)).square().sum()
    loss.backward()
    layer.set_network(cut(layer.network, rank=2))
    again = layer(torch.randn(2, 8)).square().sum()
    again.backward()
    assert loss.item() >= 0
    assert layer.cores[0].grad.shape == (8, 2)


def test_set_network_refuses_what_would_break_the_layer(unchecked):
    layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=2))
    with pytest.raises(ValueError, match="float64"):
        layer.set_network(layer.network.to(torch.float64))
    with pytest.raises(ValueError, match="expected 3 cores, got 2"):
        layer.set_network(ttm_svd(torch.randn(6, 8), rank=2, order=2))
    with pytest.raises(ValueError, match="only ranks may change"):
        layer.set_network(tucker2(torch.randn(6, 8), rank=2))
    with pytest.raises(ValueError, match=r"rows >= 6 and columns >= 8"):
        layer.set_network(LowRank.random(row_modes=(5,), col_modes=(8,), rank=2))
    with pytest.raises(TypeError, match="Tensor"):
        layer.set_network(torch.zeros(6, 8))


def test_constructors_refuse_by_name():
    with pytest.raises(ValueError, match="exactly one of network="):
        tnlayers.Linear(4, 4)
    with pytest.raises(ValueError, match="exactly one of network="):
        tnlayers.Linear(4, 4, network=tnlayers.random_network(LowRank, 2), recipe=svd)
    with pytest.raises(ValueError, match="rows >= 4 and columns >= 4"):
        tnlayers.Linear(4, 4, network=LowRank.random(row_modes=(3,), col_modes=(4,), rank=1))
    with pytest.raises(ValueError, match="groups=3"):
        tnlayers.Conv2d(4, 4, 3, groups=3, network=tnlayers.random_network(LowRank, 2))
    with pytest.raises(ValueError, match="stride"):
        tnlayers.Conv2d(4, 4, 3, padding="same", stride=2, network=tnlayers.random_network(LowRank, 2))
    with pytest.raises(ValueError, match="nonsense"):
        tnlayers.Conv2d(4, 4, 3, padding_mode="nonsense", network=tnlayers.random_network(LowRank, 2))
    with pytest.raises(ValueError, match=r"expected 8, got \(2, 9\)"):
        tnlayers.Linear(8, 4, network=tnlayers.random_network(LowRank, 2))(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="with 4 channels"):
        tnlayers.Conv2d(4, 4, 3, network=tnlayers.random_network(LowRank, 2))(torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match="got ReLU"):
        tnlayers.Linear.from_dense(nn.ReLU(), svd)
    dense = nn.Linear(4, 4)
    with torch.no_grad():
        dense.weight[0, :2] = float("nan")
    with pytest.raises(ValueError, match="2 NaN"):
        tnlayers.Linear.from_dense(dense, svd)


def test_settings_survive_from_dense():
    dense = nn.Linear(8, 6)
    dense.weight.requires_grad_(False)
    dense.eval()
    layer = tnlayers.Linear.from_dense(dense, svd)
    assert not any(core.requires_grad for core in layer.cores)
    assert layer.bias.requires_grad
    assert not layer.training
    back = layer.to_dense_module()
    assert not back.weight.requires_grad
    assert torch.allclose(back.weight, dense.weight, atol=1e-6)


def test_gradcheck_of_every_layer():
    for format, options in FRESH.values():
        make = partial(tnlayers.random_network, format, 2, **options)
        layer = tnlayers.Linear(6, 5, network=make(), dtype=torch.float64)
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

        def value(x, *cores, layer=layer):
            state = {f"cores.{k}": core for k, core in enumerate(cores)}
            return torch.func.functional_call(layer, state, (x,))

        assert torch.autograd.gradcheck(value, (x, *layer.cores))
        conv = tnlayers.Conv1d(4, 6, 3, padding=1, groups=2, network=make(), dtype=torch.float64)
        assert torch.autograd.gradcheck(conv, (torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True),))


def test_vmap_and_functional_call():
    layer = tnlayers.Linear(12, 6, network=tnlayers.random_network(TTMatrix, rank=2, order=2))
    x = torch.randn(5, 12)
    assert torch.allclose(torch.vmap(layer)(x), layer(x), atol=1e-6)
    gradients = torch.func.grad(lambda state: torch.func.functional_call(layer, state, (x,)).sum())(
        dict(layer.named_parameters())
    )
    assert {key: g.shape for key, g in gradients.items()} == {key: p.shape for key, p in layer.named_parameters()}


def test_the_plan_is_made_for_the_batch_and_shows_itself():
    layer = tnlayers.Linear(1024, 1024, network=tnlayers.random_network(LowRank, rank=51))
    assert layer.plan().strategy == "path"
    assert layer.plan(batch=64) == layer.plan()
    assert layer.flops(1) < 2 * 1024 * 1024 / 4
    assert "LowRank(1024 | 1024, ranks=(51, 51)" in repr(layer)
    assert numel(layer.network) == layer.numel() == 51 * 2048


def test_reset_parameters_draws_at_the_present_ranks():
    layer = tnlayers.Linear(30, 20, network=tnlayers.random_network(TTMatrix, rank=4, order=2))
    layer.set_network(cut(layer.network, rank=2))
    before = layer.weight.detach().clone()
    layer.reset_parameters(torch.Generator().manual_seed(3))
    assert layer.network.ranks == (2,)
    assert not torch.allclose(before, layer.weight)
    dense = to_dense(layer.network).detach()
    assert float(dense.square().mean().sqrt()) == pytest.approx((3 * 30) ** -0.5, rel=1e-5)


def test_meta_device_needs_no_memory():
    layer = tnlayers.Embedding(
        10**9, 1024, device="meta", network=tnlayers.random_network(TTMatrix, rank=16, order=4), dtype=torch.bfloat16
    )
    assert layer.cores[0].is_meta
    assert layer.numel() < 10**6


def test_hand_made_networks_as_weights():
    """A layer takes any network: a hyper-edge (CP-like) has no gauge but multiplies."""
    a, b, c = torch.randn(6, 3), torch.randn(4, 3), torch.randn(5, 3)
    net = Network((a, b, c), (("i", "r"), ("j", "r"), ("k", "r")), ("i",), ("j", "k"))
    layer = tnlayers.Linear(20, 6, network=net)
    x = torch.randn(7, 20)
    weight = torch.einsum("ir,jr,kr->ijk", a, b, c).reshape(6, 20)
    assert torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-4)
    kernel = Network(
        (a, b, torch.randn(3, 3), torch.randn(3, 3)),
        (("o", "r"), ("c", "r"), ("h", "r"), ("w", "r")),
        ("o",),
        ("c", "h", "w"),
    )
    conv = tnlayers.Conv2d(4, 6, 3, padding=1, network=kernel)
    x = torch.randn(2, 4, 8, 8)
    wanted = F.conv2d(x, torch.einsum("or,cr,hr,wr->ochw", *kernel.cores), conv.bias, padding=1)
    for plan in conv._plans_at(2, (8, 8)):
        conv._plans = {(2, 8, 8): plan}
        assert torch.allclose(conv(x), wanted, atol=1e-4)
    assert any(plan.strategy == "chain" for plan in conv._plans_at(2, (8, 8)))


@pytest.mark.compile
@pytest.mark.parametrize(("format", "options"), FRESH.values(), ids=FRESH)
def test_compile_fullgraph_with_a_dynamic_batch(format, options):
    torch._dynamo.reset()
    make = partial(tnlayers.random_network, format, 3, **options)
    model = nn.Sequential(
        tnlayers.Conv2d(3, 8, 3, padding=1, network=make()),
        nn.Flatten(),
        tnlayers.Linear(8 * 16, 10, network=make()),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 4, 4)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.compile
def test_compiled_embedding():
    torch._dynamo.reset()
    layer = tnlayers.Embedding(30, 8, padding_idx=1, network=tnlayers.random_network(TTMatrix, rank=3, order=2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4,), (2, 3)):
        tokens = torch.randint(0, 30, shape)
        assert torch.allclose(compiled(tokens), layer(tokens), atol=1e-6)


def test_moments_go_once_and_never_into_another_network():
    make = tnlayers.random_network(LowRank, rank=4)
    for optimizer in (partial(torch.optim.Adafactor, lr=0.1), partial(torch.optim.Adam, lr=0.1, amsgrad=True)):
        layer = tnlayers.Linear(8, 8, network=make)
        opt = optimizer(layer.parameters())

        def step(layer=layer, opt=opt):
            opt.zero_grad()
            layer(torch.ones(2, 8)).square().sum().backward()
            opt.step()

        step()
        step()
        layer.set_network(cut(layer.network.detach(), rank=2))
        net = layer.network.detach()
        layer.set_network(add(net, net))  # 4 -> 2 -> 4 between two steps: the shapes fit again, the moments do not
        with pytest.warns(tnlayers.RankChangeWarning, match="moments of 3"):
            step()
        step()  # nothing more to drop, nothing more to say
        assert [int(opt.state[p]["step"]) for p in layer.cores] == [2, 2, 2]
        assert int(opt.state[layer.bias]["step"]) == 4


def test_lbfgs_survives_a_rank_change():
    layer = tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=4))
    opt = torch.optim.LBFGS(layer.parameters())

    def closure():
        opt.zero_grad()
        loss = layer(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    layer.set_network(cut(layer.network.detach(), rank=2))
    with pytest.warns(tnlayers.RankChangeWarning, match="LBFGS"):
        opt.step(closure)


def test_averaged_models_are_pointed_out_once():
    layer = tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=4))
    layer.set_network(cut(layer.network.detach(), rank=3))  # nobody else is there: nothing to say
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    with pytest.warns(tnlayers.RankChangeWarning, match="averaged"):
        layer.set_network(cut(layer.network.detach(), rank=2))
    layer.set_network(cut(layer.network.detach(), rank=1))
    assert averaged.module.network.ranks == (3, 3)


def test_reset_after_to_empty_leaves_no_uninitialised_memory():
    with torch.device("meta"):
        model = nn.Sequential(
            tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=2)),
            tnlayers.Embedding(8, 8, padding_idx=0, network=tnlayers.random_network(LowRank, rank=2)),
        )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    for module in model:
        module.reset_parameters()
    assert all(bool(torch.isfinite(t).all()) for t in (*model.parameters(), *model.buffers()))


def test_autocast_output_has_the_low_precision_as_torch_s():
    for layer, x in (
        (tnlayers.Linear(12, 8, network=tnlayers.random_network(TTMatrix, rank=2)), torch.randn(3, 12)),
        (tnlayers.Conv2d(4, 6, 3, network=tnlayers.random_network(TTMatrix, rank=2)), torch.randn(2, 4, 6, 6)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_dtype_asked_for_is_the_dtype_had():
    net = LowRank.random(row_modes=(4,), col_modes=(4,), rank=2)
    with pytest.raises(TypeError, match=r"expected torch\.float64 .* got torch\.float32"):
        tnlayers.Linear(4, 4, dtype=torch.float64, network=net)
    assert tnlayers.Linear(4, 4, network=net.to(torch.float64)).bias.dtype == torch.float64


def test_the_weight_cannot_be_assigned_and_nan_not_set():
    layer = tnlayers.Linear(4, 4, network=tnlayers.random_network(LowRank, rank=2))
    with pytest.raises(AttributeError, match="set_network"):
        layer.weight = nn.Parameter(torch.zeros(4, 4))
    net = layer.network.detach()
    with pytest.raises(ValueError, match="finite"):
        layer.set_network(net.replace([core * float("nan") for core in net.cores]))
    with pytest.raises(RuntimeError, match="got a dense weight"):
        layer.load_state_dict(nn.Linear(4, 4).state_dict())


def test_forced_chain_plans_take_empty_batches_and_one_output_channel():
    for dtype in (torch.float64, torch.complex128):
        dense = nn.Conv2d(4, 1, (3, 1), dtype=dtype)
        layer = tnlayers.Conv2d.from_dense(dense, partial(ttm_svd, order=2))
        for plan in layer._plans_at(2, (8, 8)):
            layer._plans = {(rows, 8, 8): plan for rows in (1, 2)}
            assert layer(torch.zeros(0, 4, 8, 8, dtype=dtype)).shape == (0, 1, 6, 8)
            layer(torch.randn(2, 4, 8, 8, dtype=dtype)).abs().sum().backward()


def test_a_format_s_name_cannot_be_taken_over():
    with pytest.raises(TypeError, match="'TTMatrix' exists already"):
        type("TTMatrix", (Network,), {"__module__": "elsewhere"})


def test_optimizers_resume_before_and_after_a_rank_change():
    """Old moments never reach a step, wherever they come from; good ones are never lost."""

    def step(layer, opt):
        opt.zero_grad()
        layer(torch.ones(2, 8)).square().sum().backward()
        opt.step()

    layer = tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=4))
    opt = torch.optim.Adam(layer.parameters())
    step(layer, opt)
    layer.set_network(cut(layer.network.detach(), rank=2))
    pair = copy.deepcopy((layer, opt))  # between the change and the step
    state = copy.deepcopy((layer.state_dict(), opt.state_dict()))
    fresh = tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=4))
    resumed = torch.optim.Adam(fresh.parameters())
    fresh.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for one, other in ((layer, opt), pair, (fresh, resumed)):
        with pytest.warns(tnlayers.RankChangeWarning, match="moments of"):
            step(one, other)
    again = torch.optim.Adam(layer.parameters())
    again.load_state_dict(opt.state_dict())
    step(layer, again)  # made after the change: its moments are good and stay
    assert [int(again.state[p]["step"]) for p in layer.cores] == [2, 2, 2]
    layer.load_state_dict(tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=3)).state_dict())
    with pytest.warns(tnlayers.RankChangeWarning, match="moments of"):
        step(layer, again)
