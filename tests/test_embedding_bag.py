"""EmbeddingBag against torch's with the dense table: every network, mode, plan and way of giving bags."""

import copy
from functools import partial
from math import prod

import pytest
import torch
from cases import OPERATORS
from test_layers import FRESH, FULL
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix, svd, ttm_svd
from decompositions import round as cut
from tnlayers.layer import Shapes, probed

MODES = ("sum", "mean", "max")


def same(layer: tnlayers.EmbeddingBag, *args: torch.Tensor | None, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Value and gradients (cores, per-sample weights) by every plan, against torch's module."""
    dense = layer.to_dense_module()
    theirs = None if weights is None else weights.clone().requires_grad_()
    z = dense(*args, per_sample_weights=theirs)
    z.square().sum().backward()
    wanted = torch.autograd.grad(layer.weight, list(layer.cores), dense.weight.grad)
    strategies = set()
    for plan in layer._bag_plans(64, 8):
        strategies.add(plan.strategy)
        layer._forced = plan
        ours = None if weights is None else weights.clone().requires_grad_()
        layer.zero_grad()
        y = layer(*args, per_sample_weights=ours)
        assert y.shape == z.shape
        assert torch.allclose(y, z, atol=1e-11)
        y.square().sum().backward()
        for core, gradient in zip(layer.cores, wanted, strict=True):
            assert torch.allclose(core.grad, gradient, atol=1e-9 * float(1 + gradient.abs().max()))
        if ours is not None:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-9)
    layer._forced = None
    assert strategies == {"merge", "rows"} | (set() if layer.mode == "max" else {"sums"})
    return z


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", OPERATORS, ids=repr)
def test_every_network_by_every_plan(case, mode, padding_idx):
    net = case()
    rows, width = prod(net.row_modes), prod(net.col_modes)
    layer = tnlayers.EmbeddingBag(rows, width, mode=mode, padding_idx=padding_idx, network=net)
    tokens = torch.randint(0, rows, (12,))
    tokens[::5] = 0
    offsets = torch.tensor([0, 3, 3, 4, 11])
    weights = torch.randn(12, dtype=torch.float64) if mode == "sum" else None
    z = same(layer, tokens, offsets, weights=weights)
    assert not z[1].any()  # an empty bag
    same(layer, tokens.reshape(4, 3), weights=None if weights is None else weights.reshape(4, 3))
    same(layer, tokens.reshape(4, 3).int())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", FULL.values(), ids=FULL)
def test_at_full_rank_every_setting_survives(recipe, mode):
    dense = nn.EmbeddingBag(101, 12, mode=mode, include_last_offset=True, padding_idx=3, dtype=torch.float64)
    with torch.no_grad():
        dense.weight[3] = 7.0
    layer = tnlayers.EmbeddingBag.from_dense(dense.eval(), recipe)
    assert not layer.training
    tokens, offsets = torch.randint(0, 101, (20,)), torch.tensor([0, 0, 7, 20, 20])
    tokens[7:9] = 3
    assert torch.allclose(layer(tokens, offsets), dense(tokens, offsets), atol=1e-11)
    assert torch.allclose(layer.weight, dense.weight, atol=1e-11)  # the padding row too, which no bag reads
    again = layer.to_dense_module()
    for name in ("num_embeddings", "embedding_dim", "mode", "include_last_offset", "padding_idx"):
        assert getattr(again, name) == getattr(layer, name) == getattr(dense, name)
    same(layer, tokens, offsets)


def test_bags_of_nothing():
    """Torch refuses bags of length 0 (step must be nonzero) and takes the others."""
    for (format, options), mode in zip(FRESH.values(), (*MODES, "sum", "max"), strict=True):
        network = tnlayers.random_network(format, 3, **options)
        layer = tnlayers.EmbeddingBag(16, 6, mode=mode, padding_idx=2, network=network)
        for plan in layer._bag_plans(4, 4):
            layer._forced = plan
            none = torch.zeros(0, dtype=torch.long)
            for y, bags in (
                (layer(none, none), 0),
                (layer(none, torch.zeros(3, dtype=torch.long)), 3),
                (layer(none.reshape(0, 4)), 0),
                (layer(none.reshape(4, 0)), 4),
                (layer(torch.full((2, 3), 2)), 2),  # padding alone
            ):
                assert y.shape == (bags, 6)
                assert not y.any()
                layer.zero_grad()
                y.sum().backward()
                assert all(core.grad is not None for core in layer.cores)


def test_a_sum_of_low_rank_rows_is_taken_in_rank_space():
    """The dense table is never made, nor the rows: 10,240 tokens cost their additions and 512 rows of products."""
    layer = tnlayers.EmbeddingBag(10**6, 256, mode="sum", network=tnlayers.random_network(LowRank, rank=8))
    plan = layer._bag_plans(20 * 512, 512)[0]
    assert plan.strategy == "sums"
    assert plan.flops == 20 * 512 * 8 + 2 * 8 * 8 * 256 + 2 * 512 * 8 * 256  # bags, S V^T once, and its product
    tokens = torch.randint(0, 10**6, (512, 20))
    wanted = layer.network.U[tokens].sum(1) @ layer.network.S @ layer.network.V.T
    assert torch.allclose(layer(tokens), wanted, atol=1e-3)
    assert layer.plan().strategy == "sums"
    assert layer.flops(512, 20) == plan.flops


def test_plans_are_made_for_what_was_seen():
    layer = tnlayers.EmbeddingBag(1000, 32, network=tnlayers.random_network(TTMatrix, rank=4))
    layer.plan_for_shapes(Shapes((64, 9), (64, 32)))
    assert (layer._hint, layer._hint_length) == (64, 9)
    assert layer.sample_flops(Shapes((64, 9), (64, 32))) == layer.flops(1, 9)
    assert layer.dense_flops((1000, 32), Shapes((64, 9), (64, 32))) == 9 * 32


def test_explain_and_probes():
    layer = tnlayers.EmbeddingBag(100, 16, network=tnlayers.random_network(LowRank, rank=4))
    try:
        assert layer.plan(batch=8, probe=True) in layer.alternatives(8)
    finally:
        probed.clear()
    text = tnlayers.explain(layer, batch=8)
    assert all(name in text for name in ("sums", "rows", "merge"))
    assert "merging costs" not in text  # a dense table is read, not multiplied


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_of_the_report_holds(mode):
    dense = nn.EmbeddingBag(40, 9, mode=mode)
    layer = tnlayers.EmbeddingBag.from_dense(dense, partial(svd, rank=3))
    bound = layer.output_bound((layer.weight - dense.weight).detach())
    for _ in range(50):
        tokens = torch.randint(0, 40, (1, 1 if mode == "sum" else 6))
        assert float((layer(tokens) - dense(tokens)).detach().norm()) <= bound * (1 + 1e-5)


def test_conversion_files_and_ties(tmp_path):
    def build() -> nn.ModuleDict:
        model = nn.ModuleDict({"bag": nn.EmbeddingBag(60, 16, mode="sum", padding_idx=1), "look": nn.Embedding(60, 16)})
        model["look"].weight = model["bag"].weight
        return model

    model = build()
    report = tnlayers.tensorize(model, partial(svd, rank=4))
    assert [row.status for row in report.rows] == ["converted", "converted"]
    assert [row.kind for row in report.rows] == ["EmbeddingBag", "Embedding"]
    assert model["bag"].cores[0] is model["look"].cores[0]
    assert "EmbeddingBag" in tnlayers.summary(model)
    tokens = torch.randint(2, 60, (3, 4))
    wanted = model["bag"](tokens), model["look"](tokens)
    again = tnlayers.load(tnlayers.save(model, tmp_path / "net"), build())
    assert again["bag"].cores[0] is again["look"].cores[0]
    assert torch.equal(again["bag"](tokens), wanted[0])
    other = nn.ModuleDict({"bag": nn.EmbeddingBag(60, 16, padding_idx=1), "look": nn.Embedding(60, 16)})
    with pytest.raises(ValueError, match=r"mode=sum \(model: mean\)"):
        tnlayers.load(tmp_path / "net", other)
    tnlayers.densify(model)
    assert type(model["bag"]) is nn.EmbeddingBag
    assert model["bag"].weight is model["look"].weight
    assert torch.allclose(model["bag"](tokens), wanted[0], atol=1e-5)
    kept = tnlayers.tensorize(nn.Sequential(nn.EmbeddingBag(60, 16, sparse=True)), partial(svd, rank=2)).rows[0]
    assert kept.status == "kept"
    assert "sparse=True" in kept.reason


def test_ranks_change_copies_and_half_precision():
    layer = tnlayers.EmbeddingBag(30, 8, mode="sum", network=tnlayers.random_network(LowRank, rank=4))
    layer.set_network(cut(layer.network.detach(), rank=2))
    tokens = torch.randint(0, 30, (4, 3))
    assert torch.equal(copy.deepcopy(layer)(tokens), layer(tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(tokens, per_sample_weights=torch.ones(4, 3))
    assert torch.allclose(y.float(), layer(tokens), atol=0.2)
    for mode in MODES:
        dense = nn.EmbeddingBag(30, 8, mode=mode, padding_idx=0).to(torch.bfloat16)
        half = tnlayers.EmbeddingBag.from_dense(dense, partial(ttm_svd, order=2))
        assert torch.allclose(half(tokens).float(), dense(tokens).float(), atol=0.1)


def test_options_are_refused_by_name():
    make = tnlayers.random_network(LowRank, rank=2)
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        with pytest.raises(ValueError, match=rf"EmbeddingBag: {next(iter(option))} .*torch\.nn\.EmbeddingBag"):
            tnlayers.EmbeddingBag(10, 4, **option, network=make)
    with pytest.raises(ValueError, match="mode must be one of"):
        tnlayers.EmbeddingBag(10, 4, mode="median", network=make)
    with pytest.raises(ValueError, match="padding_idx must be within 10 rows, got 10"):
        tnlayers.EmbeddingBag(10, 4, padding_idx=10, network=make)
    with pytest.raises(TypeError, match="must be real"):
        tnlayers.EmbeddingBag(10, 4, network=make, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.EmbeddingBag, got Embedding"):
        tnlayers.EmbeddingBag.from_dense(nn.Embedding(10, 4), svd)


def test_bad_bags_are_refused_by_name(unchecked):
    """Descending offsets make torch read memory of others; here they are an error."""
    make = tnlayers.random_network(TTMatrix, rank=2, order=2)
    layer = tnlayers.EmbeddingBag(13, 4, mode="sum", network=make)
    last = tnlayers.EmbeddingBag(13, 4, mode="mean", include_last_offset=True, network=make)
    tokens = torch.tensor([1, 2, 12])
    for offsets in ([0, 2, 1], [1, 2], [0, 4], [-1, 0], [0, -1]):
        with pytest.raises(ValueError, match="offsets must ascend from 0 to the number of tokens, 3"):
            layer(tokens, torch.tensor(offsets))
    for offsets in ([0, 2], [0, 4], [3]):
        with pytest.raises(ValueError, match="offsets must ascend"):
            last(tokens, torch.tensor(offsets))
    with pytest.raises(ValueError, match="at least one offset"):
        last(tokens, torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="offsets must ascend"):
        layer(tokens, torch.zeros(0, dtype=torch.long))  # tokens in no bag
    for bad in (13, -1):
        with pytest.raises(IndexError, match=r"EmbeddingBag: tokens must be in 0\.\.12"):
            layer(torch.tensor([[0, bad]]))
    with pytest.raises(TypeError, match=r"tokens must be int64 or int32, got torch\.float32"):
        layer(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="offsets must be int64 or int32"):
        layer(tokens, torch.zeros(1))
    with pytest.raises(ValueError, match="take no offsets"):
        layer(tokens.reshape(1, 3), torch.tensor([0]))
    for wrong in (None, torch.zeros(1, 1, dtype=torch.long), torch.tensor(0)):
        with pytest.raises(ValueError, match="need offsets of 1 axis"):
            layer(tokens, wrong)
    for shape in ((), (1, 1, 3)):
        with pytest.raises(ValueError, match=r"must be \(bags, length\) or \(n,\) with offsets"):
            layer(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="needs mode='sum', got mode='mean'"):
        last(tokens, torch.tensor([0, 3]), torch.ones(3))
    with pytest.raises(ValueError, match=r"shape of tokens, expected \(3,\), got \(2,\)"):
        layer(tokens, torch.tensor([0]), torch.ones(2))
    with pytest.raises(TypeError, match=r"expected torch\.float32, got torch\.float64"):
        layer(tokens, torch.tensor([0]), torch.ones(3, dtype=torch.float64))


def test_gradcheck():
    network = tnlayers.random_network(TTMatrix, rank=2, order=2)
    layer = tnlayers.EmbeddingBag(12, 4, mode="sum", padding_idx=1, network=network, dtype=torch.float64)
    tokens, weights = torch.tensor([[0, 1], [11, 5]]), torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def value(weights, *cores):
        state = {f"cores.{k}": core for k, core in enumerate(cores)}
        return torch.func.functional_call(layer, state, (tokens, None, weights))

    assert torch.autograd.gradcheck(value, (weights, *layer.cores))


@pytest.mark.compile
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", [LowRank, TTMatrix])
def test_compile_fullgraph_with_dynamic_bags(format, mode):
    layer = tnlayers.EmbeddingBag(30, 8, mode=mode, padding_idx=1, network=tnlayers.random_network(format, rank=3))
    for plan in layer._bag_plans(8, 2):
        torch._dynamo.reset()
        layer._stored = plan
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for offsets in ([0, 2, 4], [0, 3, 3, 5]):
            tokens = torch.randint(0, 30, (2 * offsets[-1],))
            assert torch.allclose(
                compiled(tokens, torch.tensor(offsets)), layer(tokens, torch.tensor(offsets)), atol=1e-5
            )
        for bags in (2, 5):
            tokens = torch.randint(0, 30, (bags, 3))
            y = compiled(tokens)
            assert torch.allclose(y, layer(tokens), atol=1e-5)
            y.sum().backward()
