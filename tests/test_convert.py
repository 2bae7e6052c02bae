"""Whole models: policies, ties, settings, refusals by name, and a report whose numbers are true."""

import copy
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import tnlayers
from decompositions import (
    LowRank,
    cp_als,
    kronecker_svd,
    monarch_projection,
    numel,
    svd,
    to_matrix,
    tr_svd,
    tt_svd,
    ttm_svd,
    tucker2,
)
from tnlayers.convert import break_even_rank
from tnlayers.layer import NetworkLayer


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=(2, 1), padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding="same", padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(32 * 4 * 8, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Residual(nn.Module):
    """A ResNet basic block with its shortcut."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def test_full_rank_leaves_a_model_unchanged():
    model = small_net().double()
    dense = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    report = tnlayers.tensorize(
        model, {nn.Conv2d: tucker2, "4": partial(ttm_svd, order=3), "6": svd}, skip_if_no_gain=False
    )
    assert [row.status for row in report.rows] == ["converted"] * 4
    assert torch.allclose(model(x), dense(x), atol=1e-12)
    assert all(row.error < 1e-14 for row in report.rows)


def test_report_rows_are_true():
    torch.manual_seed(0)
    model = small_net()
    dense = copy.deepcopy(model)
    example = torch.randn(5, 3, 8, 8)
    report = tnlayers.tensorize(
        model, {nn.Conv2d: partial(tucker2, rank=4), "4": partial(svd, rank=8)}, example_input=example
    )
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["0", "2", "4", "6"]
    assert rows["6"].status == "kept"
    assert rows["6"].reason == "no rule matches"
    for name in ("0", "2", "4"):
        row, layer, source = rows[name], model[int(name)], dense[int(name)]
        exact = source.weight.detach().double()
        difference = layer.weight.detach().double() - exact
        assert row.error == pytest.approx(float(difference.norm() / exact.norm()), rel=1e-6)
        bias = 0 if source.bias is None else source.bias.numel()
        assert row.params == numel(layer.network) + bias
        assert row.params_dense == source.weight.numel() + bias
        assert row.ranks == layer.network.ranks
    assert rows["4"].flops_dense == 2 * 1024 * 64
    assert rows["4"].flops == 2 * 8 * (1024 + 64) + 2 * 8 * 8  # x V, S, U
    assert rows["2"].flops_dense == 2 * 32 * 16 * 9 * 4 * 8
    assert rows["2"].flops == 2 * 4 * 8 * (16 * 4 + 4 * 4 * 9 + 4 * 32)
    assert report.params_dense == sum(p.numel() for p in dense.parameters())
    assert report.params == sum(row.params for row in report.rows)
    low = rows["4"]
    wanted = torch.linalg.svdvals(dense[4].weight.detach().double())
    (bond,) = low.spectra
    assert torch.allclose(torch.tensor(low.spectra[bond], dtype=torch.float64), wanted, atol=1e-6)
    assert low.cuts == {bond: 8}
    assert low.break_even_rank == 64 * 1024 // (64 + 1024)


def test_output_bounds_hold_on_adversarial_inputs():
    """Power iteration on the difference of the layers finds the worst x; the bound must stand above it."""
    torch.manual_seed(1)
    settings = [
        nn.Linear(20, 30),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Conv2d(4, 8, (3, 1), groups=2, padding=(1, 0), stride=(1, 2)),
        nn.Conv1d(4, 6, 5, dilation=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        nn.ConvTranspose2d(4, 8, (3, 1), groups=2, padding=(1, 0), stride=(1, 2)),
        nn.ConvTranspose1d(4, 6, 5, dilation=2, padding=3),
    ]
    for dense in settings:
        model = nn.Sequential(copy.deepcopy(dense)).double()
        reference = copy.deepcopy(model)
        (row,) = tnlayers.tensorize(model, partial(svd, rank=1), skip_if_no_gain=False).rows
        shape = (1, 20) if isinstance(dense, nn.Linear) else (1, 4, *(11,) * (dense.weight.ndim - 2))
        x = torch.randn(shape, dtype=torch.float64)

        def change(x, model=model, reference=reference):
            return model(x) - reference(x)

        for _ in range(60):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(change(x).square().sum(), x)
            x = gradient / gradient.norm()
        worst = float(change(x.detach()).detach().norm())
        assert 0 < worst <= row.output_bound * (1 + 1e-9)
        if isinstance(dense, nn.Linear):
            assert worst == pytest.approx(row.output_bound, rel=1e-3)


def test_policy_first_match_wins_and_exclude():
    model = small_net()
    report = tnlayers.tensorize(
        model,
        {"4": partial(svd, rank=3), nn.Linear: partial(svd, rank=2), nn.Conv2d: tucker2},
        exclude=["2"],
        skip_if_no_gain=False,
    )
    rows = {row.name: row for row in report.rows}
    assert rows["4"].ranks == (3, 3)
    assert rows["6"].ranks == (2, 2)
    assert rows["2"].reason == "excluded"
    assert isinstance(model[2], nn.Conv2d)
    assert model[0].stride == (2, 1)
    assert model[0].bias is None


def test_no_gain_is_skipped_and_said():
    model = nn.Sequential(nn.Linear(8, 8))
    (row,) = tnlayers.tensorize(model, partial(svd, rank=7)).rows
    assert row.status == "kept"
    assert "112 parameters" in row.reason
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ({"encoder.*": svd}, {}, r"'encoder.\*'"),
        ({nn.LSTM: svd}, {}, "LSTM"),
        ({"4": svd}, {"exclude": ["fc1"]}, "'fc1'"),
        ({"4": 7}, {}, "callable"),
        (3, {}, "mapping"),
        ({5: svd}, {}, "nn.Module types"),
    ],
)
def test_bad_policies_are_refused_before_anything_changes(policy, options, message, unchecked):
    model = small_net()
    before = str(model)
    with pytest.raises((ValueError, TypeError), match=message):
        tnlayers.tensorize(model, policy, **options)
    assert str(model) == before


def test_a_failing_recipe_names_the_layer_and_leaves_the_model_as_it_was():
    model = small_net()
    before, state = str(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"tensorize: 6 \(Linear \(10, 64\)\): .*row_modes=\(2, 2\)"):
        tnlayers.tensorize(
            model, {"4": partial(svd, rank=2), "6": partial(ttm_svd, row_modes=(2, 2), col_modes=(8, 8))}
        )
    with torch.no_grad():
        model[4].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"tensorize: 4 .*1 infinite"):
        tnlayers.tensorize(model, partial(svd, rank=2))
    assert str(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key != "4.weight")


def test_what_cannot_be_replaced_is_kept_by_name():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "parametrized": parametrizations.weight_norm(nn.Linear(8, 8)),
            "hooked": hooked,
            "lazy": nn.LazyLinear(8),
            "meta": nn.Linear(8, 8, device="meta"),
            "normed": nn.Embedding(10, 8, max_norm=1.0),
            "sparse": nn.Embedding(10, 8, sparse=True),
            "scaled": Scaled(8, 8),
            "plain": nn.Linear(8, 8),
        }
    )
    report = tnlayers.tensorize(model, partial(svd, rank=1))
    reasons = {row.name: row.reason for row in report.rows}
    assert "parametrize" in reasons["parametrized"]
    assert "hooks" in reasons["hooked"]
    assert "not initialised" in reasons["lazy"]
    assert "meta device" in reasons["meta"]
    assert "max_norm=1.0" in reasons["normed"]
    assert "sparse=True" in reasons["sparse"]
    assert "scaled" not in reasons  # another forward is another function
    assert reasons["plain"] == ""
    assert isinstance(model["plain"], NetworkLayer)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.inner = nn.Linear(16, 16)
        self.again = self.inner  # one module under two names
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.again(F.relu(self.inner(self.embed(tokens)))))


def test_tied_weights_stay_tied():
    model = Tied()
    report = tnlayers.tensorize(model, partial(svd, rank=4))
    assert all(a is b for a, b in zip(model.embed.cores, model.head.cores, strict=True))
    assert model.inner is model.again
    assert [row.name for row in report.rows] == ["embed", "inner", "head"]
    tokens = torch.randint(0, 40, (3, 5))
    model(tokens).sum().backward()
    assert torch.allclose(model.embed.weight, model.head.weight)
    assert report.params == sum(p.numel() for p in model.parameters()) - 2 * 16  # S of two LowRanks counts merged
    tnlayers.densify(model)
    assert model.embed.weight is model.head.weight
    assert model.inner is model.again


def test_a_tie_to_something_dense_keeps_both_dense():
    model = Tied()
    report = tnlayers.tensorize(model, partial(svd, rank=4), exclude=["head"])
    reasons = {row.name: row.reason for row in report.rows}
    assert "tied to head.weight" in reasons["embed"]
    assert model.embed.weight is model.head.weight
    model = Tied()
    model.extra = model.embed.weight  # a bare Parameter elsewhere
    reasons = {row.name: row.reason for row in tnlayers.tensorize(model, partial(svd, rank=4)).rows}
    assert "tied to" in reasons["embed"]
    assert "tied to" in reasons["head"]


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_tensorizes_and_runs(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    dense = copy.deepcopy(model)
    full = copy.deepcopy(model)
    x = torch.randn(3, 5, 32)
    report = tnlayers.tensorize(full, svd, skip_if_no_gain=False)
    assert {row.kind for row in report.rows} == {"Linear", "NonDynamicallyQuantizableLinear"}
    with torch.set_grad_enabled(training):
        assert torch.allclose(full(x), dense(x), atol=1e-5)
    report = tnlayers.tensorize(
        model, {"*.linear?": partial(ttm_svd, order=2, rank=6), "*.out_proj": partial(svd, rank=4)}
    )
    assert sum(row.status == "converted" for row in report.rows) == 6
    assert model(x).shape == dense(x).shape
    if training:
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_multihead_attention_tensorizes_and_runs():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention})
    dense = copy.deepcopy(attention)
    tnlayers.tensorize(model, svd, skip_if_no_gain=False)
    x = torch.randn(2, 4, 16)
    assert isinstance(model["attention"].out_proj, NetworkLayer)
    assert torch.allclose(model["attention"](x, x, x)[0], dense(x, x, x)[0], atol=1e-5)


def test_resnet_block_tensorizes_and_runs():
    model = nn.Sequential(Residual(8, 16, 2), Residual(16, 16, 1)).eval()
    dense = copy.deepcopy(model)
    x = torch.randn(2, 8, 9, 9)
    full = copy.deepcopy(model)
    tnlayers.tensorize(full, tt_svd, skip_if_no_gain=False)
    assert torch.allclose(full(x), dense(x), atol=1e-5)
    report = tnlayers.tensorize(model, partial(tucker2, rank=4))
    assert report.params < report.params_dense
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hugging_face_conv1d_is_transposed(monkeypatch):
    class Conv1D(nn.Module):
        """Same interface as transformers.pytorch_utils.Conv1D: weight (in, out), `nf` outputs."""

        def __init__(self, nf, nx):
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    package, module = types.ModuleType("transformers"), types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    model = nn.Sequential(Conv1D(24, 12))
    dense = copy.deepcopy(model)
    (row,) = tnlayers.tensorize(model, svd, skip_if_no_gain=False).rows
    x = torch.randn(5, 12)
    assert torch.allclose(model(x), dense(x), atol=1e-4)
    assert model[0].weight.shape == (24, 12)
    assert row.shape == (12, 24)
    assert row.error < 1e-6


def test_the_model_itself_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match=r"Linear\.from_dense"):
        tnlayers.tensorize(nn.Linear(8, 8), partial(svd, rank=1))


def test_densify_and_summary():
    model = small_net()
    tnlayers.tensorize(model, partial(svd, rank=4))
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    text = tnlayers.summary(model)
    assert "LowRank(64 | 1024, ranks=(4, 4)" in text
    assert "4,352" in text
    tnlayers.densify(model)
    assert not any(isinstance(module, NetworkLayer) for module in model.modules())
    assert torch.allclose(model(x), y, atol=1e-5)
    assert model[2].padding_mode == "circular"
    assert model[2].padding == "same"


def test_example_input_sets_the_plans_and_leaves_modes_alone():
    model = small_net()
    model[1].eval()
    tnlayers.tensorize(model, partial(svd, rank=4), example_input=torch.randn(7, 3, 8, 8))
    assert model[4]._hint == 7
    assert model.training
    assert not model[1].training


def test_progress_is_told():
    calls = []
    tnlayers.tensorize(small_net(), partial(svd, rank=2), progress=lambda *args: calls.append(args))
    assert calls == [(0, 4, "0"), (1, 4, "2"), (2, 4, "4"), (3, 4, "6")]


def test_break_even_rank_is_where_the_count_crosses():
    for net in (
        LowRank.random(row_modes=(60,), col_modes=(90,), rank=1),
        ttm_svd(torch.randn(60, 90), rank=2),
        tucker2(torch.randn(30, 20, 3, 3), rank=2),
    ):
        dense = to_matrix(net).numel()
        rank = break_even_rank(net, dense)
        format = type(net)
        options = {"modes": (0, 1)} if net.order == 4 else {}
        if format.__name__ == "TTMatrix" or options or format is LowRank:
            make = partial(format.random, row_modes=net.row_modes, col_modes=net.col_modes, **options)
            assert numel(make(rank=rank)) < dense
            assert numel(make(rank=rank + 1)) >= dense or make(rank=rank + 1).ranks == make(rank=rank).ranks


def test_other_functions_are_not_replaced():
    class Doubled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    patched = nn.Linear(16, 16)
    original = patched.forward
    patched.forward = lambda x: 2 * original(x)
    model = nn.Sequential(
        Doubled(16, 16, 3), patched, torch.compile(nn.Linear(16, 16), backend="eager"), nn.Linear(16, 16)
    )
    rows = {row.name: row for row in tnlayers.tensorize(model, partial(svd, rank=1)).rows}
    assert "0" not in rows
    assert "forward was replaced" in rows["1"].reason
    assert "before torch.compile" in rows["2._orig_mod"].reason
    assert rows["3"].status == "converted"


def test_a_tie_without_gain_stays_a_tie():
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32, bias=False))
    model[1].weight = model[0].weight
    rows = tnlayers.tensorize(model, {"0": partial(svd, rank=16), "1": partial(svd, rank=2)}).rows
    assert [row.status for row in rows] == ["kept", "kept"]
    assert "no gain" in rows[0].reason
    assert "tied to 0.weight" in rows[1].reason
    assert model[0].weight is model[1].weight


def test_ties_that_cannot_be_shared_stay_dense(monkeypatch):
    class Conv1D(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.nf, self.weight, self.bias = 16, weight, None

        def forward(self, x):
            return x @ self.weight

    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    first = nn.Linear(16, 16, bias=False)
    model = nn.Sequential(first, Conv1D(first.weight), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[3].bias = model[2].bias
    model[4].register_buffer("scale", torch.ones(1))
    rows = tnlayers.tensorize(model, partial(svd, rank=2)).rows
    assert [row.status for row in rows] == ["kept"] * 5
    assert "transposed" in rows[0].reason
    assert "bias is tied" in rows[2].reason
    assert "scale" in rows[4].reason
    (row,) = tnlayers.tensorize(
        nn.Sequential(Conv1D(nn.Parameter(torch.randn(16, 16)))), svd, skip_if_no_gain=False
    ).rows
    assert row.error < 1e-6  # a square weight must be compared the right way round


def test_failures_leave_everything_as_it_was():
    model = small_net()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    before = str(model)

    def in_place(weight):
        weight.zero_()
        raise KeyError("gone")

    with pytest.raises(ValueError, match=r"tensorize: 4 .*the recipe raised KeyError"):
        tnlayers.tensorize(model, {"4": in_place})
    with pytest.raises(RuntimeError):
        tnlayers.tensorize(model, partial(svd, rank=2), example_input=torch.zeros(1, 3, 5, 5))
    nan = LowRank(torch.full((64, 1), float("nan")), torch.ones(1, 1), torch.ones(1024, 1))
    with pytest.raises(ValueError, match="finite cores"):
        tnlayers.tensorize(model, {"4": lambda _: nan})
    with pytest.raises(TypeError, match="keep the dtype"):
        tnlayers.tensorize(model, {"4": lambda weight: svd(weight.double(), rank=2)})
    assert str(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    tnlayers.tensorize(model, partial(svd, rank=2))
    tnlayers.densify(model)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_container_is_not_a_layer():
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 32)), nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match=r"'0', which matches none of 1; perhaps '0\.\*'"):
        tnlayers.tensorize(model, {"0": partial(svd, rank=1)})
    with pytest.raises(ValueError, match="Bilinear"):
        tnlayers.tensorize(model, {nn.Bilinear: partial(svd, rank=1)})


def test_densify_keeps_hooks_and_padding_rows():
    model = nn.Sequential(nn.Linear(12, 30, bias=False), nn.Embedding(30, 12, padding_idx=4))
    with torch.no_grad():
        model[1].weight[4] = 5.0
    model[0].weight = model[1].weight
    tnlayers.tensorize(model, partial(svd, rank=3))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    tnlayers.densify(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[1].weight[4], torch.full((12,), 5.0))
    model[0](torch.randn(2, 12))
    handle.remove()
    model[0](torch.randn(2, 12))
    assert calls == [1]


def test_a_model_that_contains_itself_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("self", model)
    with pytest.raises(ValueError, match="contain itself"):
        tnlayers.tensorize(model, partial(svd, rank=1))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_conversion_inside_autocast_keeps_the_precision(low):
    """What is decomposed or merged in an autocast region has the numbers it would have outside."""
    dense = nn.Sequential(nn.Linear(32, 24), nn.Conv2d(4, 6, 3), nn.Embedding(30, 8), nn.EmbeddingBag(30, 8))
    recipes = {"0": svd, "1": tucker2, "2": partial(ttm_svd, order=2), "3": svd}
    plain, inside = copy.deepcopy(dense), copy.deepcopy(dense)
    tnlayers.tensorize(plain, recipes, skip_if_no_gain=False)
    with torch.autocast("cpu", dtype=low):
        tnlayers.tensorize(inside, recipes, skip_if_no_gain=False)
        tnlayers.densify(inside)
    tnlayers.densify(plain)
    for one, other, original in zip(plain, inside, dense, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.allclose(other.weight, original.weight, atol=1e-5)


def test_the_report_states_the_floor_of_training():
    """1 + r / batch for a merged TT-matrix, at the rows the example brought; none for what is never merged."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    recipes = {"0": partial(ttm_svd, rank=64, order=2), "2": partial(svd, rank=16)}
    report = tnlayers.tensorize(model, recipes, example_input=torch.zeros(96, 1024))
    merged, factored = report.rows
    assert merged.floor == pytest.approx(1 + 64 / 96, rel=0.05)
    assert factored.floor is None
    assert "0: at least 1.6" in str(report)
    assert "a larger batch or smaller ranks would help" in str(report)


# --- one budget for all layers ---


def budget_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    with torch.no_grad():  # a layer of small rank: it needs little of the budget
        model[5].weight.copy_(torch.randn(32, 2) @ torch.randn(2, 48))
    return model


def budget_policy():
    return {nn.Conv2d: partial(tucker2, tol=1e-4), nn.Linear: partial(svd, tol=1e-6)}


@pytest.mark.parametrize("budget", [900, 2000, 0.2, 0.5])
def test_a_budget_is_met_by_all_networks_together(budget):
    model = budget_model()
    dense = sum(model[k].weight.numel() for k in (0, 3, 5))
    report = tnlayers.tensorize(model, budget_policy(), budget=budget, skip_if_no_gain=False)
    held = sum(layer.numel() for layer in model.modules() if isinstance(layer, tnlayers.NetworkLayer))
    allowed = budget if isinstance(budget, int) else int(budget * dense)
    assert 0.93 * allowed <= held <= allowed
    assert model[5].network.ranks[0] == 2
    lines = report.budget.splitlines()
    assert lines[0].startswith(f"budget: {held:,} of {allowed:,}")
    assert any(line.startswith("5.a: rank 2, cuts") for line in lines)
    assert lines[0] in str(report)
    assert tnlayers.Report.from_dict(report.to_dict()).budget == report.budget


def test_a_budget_is_spent_better_than_equal_ranks():
    """The same parameters, ranks chosen together: a smaller sum of relative squared errors."""

    def error(model):
        rest = zip((model[3], model[5]), (budget_model()[3], budget_model()[5]), strict=True)
        return sum(float(((a.weight - b.weight).norm() / b.weight.norm()) ** 2) for a, b in rest)

    together, equal = budget_model(), budget_model()
    tnlayers.tensorize(equal, {nn.Linear: partial(svd, rank=6)})
    spent = equal[3].numel() + equal[5].numel()
    tnlayers.tensorize(together, {nn.Linear: partial(svd, tol=1e-6)}, budget=spent)
    assert together[3].numel() + together[5].numel() <= spent
    with torch.no_grad():
        assert error(together) < 0.9 * error(equal)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.8, 1.0])
def test_a_budget_of_flops_is_met_as_the_report_counts_them(share):
    x = torch.randn(1, 8, 4, 4)
    dense = tnlayers.tensorize(budget_model(), budget_policy(), exclude=["*"], example_input=x).rows
    allowed = int(share * sum(row.flops_dense for row in dense))
    report = tnlayers.tensorize(
        budget_model(), budget_policy(), budget={"flops": share}, example_input=x, skip_if_no_gain=False
    )
    spent = sum(row.flops for row in report.rows)
    assert 0.85 * allowed <= spent <= allowed
    assert "FLOPs a sample" in report.budget
    same = tnlayers.tensorize(
        budget_model(), budget_policy(), budget={"flops": allowed}, example_input=x, skip_if_no_gain=False
    )
    assert [row.ranks for row in same.rows] == [row.ranks for row in report.rows]


@pytest.mark.parametrize("budget", [2500, {"flops": 0.6}, {"error": 0.4}])
def test_ranks_under_a_budget_can_be_multiples(budget):
    model = budget_model()
    report = tnlayers.tensorize(
        model, budget_policy(), budget=budget, multiple=4, example_input=torch.randn(1, 8, 4, 4), skip_if_no_gain=False
    )
    largest = {"0": (16, 8), "3": (48, 48), "5": (2, 2)}  # of the layer that has rank 2, its own
    for row in report.rows:
        assert all(r % 4 == 0 or r == top for r, top in zip(row.ranks, largest[row.name], strict=True)), row.ranks


def test_a_budget_of_bytes_is_one_of_parameters():
    first, second = budget_model().double(), budget_model().double()
    by_count = tnlayers.tensorize(first, budget_policy(), budget=1000)
    by_bytes = tnlayers.tensorize(second, budget_policy(), budget={"bytes": 8000})
    assert [row.ranks for row in by_count.rows] == [row.ranks for row in by_bytes.rows]
    third = budget_model().double()
    assert tnlayers.tensorize(third, budget_policy(), budget={"parameters": 1000}).budget == by_count.budget


@pytest.mark.parametrize("error", [0.05, 0.2, 0.5])
def test_a_budget_of_error_is_kept_with_few_parameters(error):
    model = budget_model()
    report = tnlayers.tensorize(model, budget_policy(), budget={"error": error}, skip_if_no_gain=False)
    errors = torch.tensor([row.error for row in report.rows])
    assert float(errors.square().mean().sqrt()) <= error
    assert f"of {error:.3g}" in report.budget
    held = sum(layer.numel() for layer in model.modules() if isinstance(layer, tnlayers.NetworkLayer))
    # the budget of parameters that it comes to is spent as well by the other entry
    twin = tnlayers.tensorize(budget_model(), budget_policy(), budget=held, skip_if_no_gain=False)
    assert float(torch.tensor([row.error for row in twin.rows]).square().mean().sqrt()) <= error


def test_a_budget_and_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
            self.b.weight = self.a.weight

    model = Tied()
    tnlayers.tensorize(model, partial(svd, tol=1e-6), budget=600)
    assert all(p is q for p, q in zip(model.a.cores, model.b.cores, strict=True))
    assert model.a.numel() + model.c.numel() <= 600


def test_budgets_that_make_no_sense(unchecked):
    for budget in (0, -5, 1.5, 0.0, True, "half", float("nan")):
        with pytest.raises(ValueError, match="tensorize: budget must be a number of parameters"):
            tnlayers.tensorize(budget_model(), budget_policy(), budget=budget)
    for budget in ({}, {"time": 3}, {"flops": 0.5, "bytes": 3}):
        with pytest.raises(ValueError, match="a budget has one of the keys"):
            tnlayers.tensorize(budget_model(), budget_policy(), budget=budget)
    for budget in ({"error": 0.0}, {"error": 1.0}, {"error": True}):
        with pytest.raises(ValueError, match="budget must be a relative error"):
            tnlayers.tensorize(budget_model(), budget_policy(), budget=budget)
    with pytest.raises(ValueError, match=r"needs the sizes that layers see, got no call of 0; give example_input="):
        tnlayers.tensorize(budget_model(), budget_policy(), budget={"flops": 0.5})
    with pytest.raises(ValueError, match=r"must hold the least ranks, expected at least .* FLOPs a sample"):
        tnlayers.tensorize(
            budget_model(), budget_policy(), budget={"flops": 0.01}, example_input=torch.randn(1, 8, 4, 4)
        )
    model = budget_model()
    with pytest.raises(ValueError, match="the budget must hold the least ranks"):
        tnlayers.tensorize(model, budget_policy(), budget=50)
    assert isinstance(model[3], nn.Linear)
    assert not isinstance(model[3], tnlayers.NetworkLayer)
    with pytest.raises(ValueError, match=r"budget= rounds networks, which must be trees, got Monarch.* for 3"):
        tnlayers.tensorize(model, {"3": monarch_projection}, budget=5000)


@pytest.mark.parametrize("name", ["cp_als", "tr_svd", "kronecker_svd", "monarch_projection"])
def test_the_later_formats_convert_report_and_travel(name, tmp_path):
    recipe = {
        "cp_als": partial(cp_als, rank=3, num_rows=1),
        "tr_svd": partial(tr_svd, rank=3, num_rows=1),
        "kronecker_svd": partial(kronecker_svd, rank=2),
        "monarch_projection": monarch_projection,
    }[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 12))
    report = tnlayers.tensorize(model, recipe, skip_if_no_gain=False)
    assert [row.status for row in report.rows] == ["converted", "converted"]
    assert all(0 < row.error < 1 for row in report.rows)
    assert report.rows[0].format in str(report)
    report.html(tmp_path / "report.html")
    tnlayers.save(model, tmp_path / "model")
    again = tnlayers.load(tmp_path / "model", nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 12)))
    x = torch.randn(5, 24)
    assert torch.equal(again(x), model(x))
