"""Freezing: the same function, merged where that is faster; never a stale weight, whatever happens around it."""

import copy
from functools import partial
from itertools import combinations
from math import prod

import pytest
import torch
import torch.nn.functional as F
from cases import ALL, OPERATORS
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import tnlayers
from decompositions import TT, LowRank, TTMatrix, Tucker, scale, to_matrix
from decompositions import round as cut
from tnlayers.freeze import DOUBT
from tnlayers.frozen import best_cut, install, merge
from tnlayers.surgery import tie_cores

FORMATS = {
    "low_rank": (LowRank, {}),
    "tucker": (Tucker, {}),
    "tt": (TT, {}),
    "ttm": (TTMatrix, {}),
    "ttm4": (TTMatrix, {"order": 4}),
}


def make(format=TTMatrix, rank=3, **options):
    return tnlayers.random_network(format, rank, **options)


def linear(width=512, out=None, *, rank=8, **options) -> tnlayers.Linear:
    """A layer that `freeze` merges: at the batch it is planned for, a TT-matrix is slower than the dense weight."""
    layer = tnlayers.Linear(width, out or width, network=make(TTMatrix, rank, order=2), **options).eval()
    layer.plan(batch=512)  # and not for the first batch of a test
    return layer


def low_rank(width=512, rank=16) -> tnlayers.Linear:
    return tnlayers.Linear(width, width, network=make(LowRank, rank)).eval()


def layers(format, options, dtype=torch.float64):
    """Every kind of layer with an input, prime and padded widths among them."""
    network = partial(make, format, 3, **options)
    return [
        (tnlayers.Linear(13, 7, network=network(), dtype=dtype), torch.randn(2, 5, 13, dtype=dtype)),
        (tnlayers.Linear(16, 24, bias=False, network=network(), dtype=dtype), torch.randn(16, dtype=dtype)),
        (tnlayers.Conv1d(4, 6, 3, padding="same", network=network(), dtype=dtype), torch.randn(2, 4, 9, dtype=dtype)),
        (
            tnlayers.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="circular", network=network(), dtype=dtype),
            torch.randn(2, 4, 6, 5, dtype=dtype),
        ),
        (tnlayers.Conv3d(2, 4, (3, 1, 2), network=network(), dtype=dtype), torch.randn(2, 4, 4, 4, dtype=dtype)),
        (
            tnlayers.ConvTranspose2d(4, 6, 3, stride=2, padding=1, network=network(), dtype=dtype),
            torch.randn(2, 4, 5, 4, dtype=dtype),
        ),
        (
            tnlayers.EmbeddingBag(31, 9, mode="sum", padding_idx=4, network=network(), dtype=dtype),
            torch.tensor([[0, 4, 7], [30, 4, 4]]),
        ),
        (tnlayers.Embedding(31, 9, padding_idx=4, network=network(), dtype=dtype), torch.tensor([[0, 4], [30, 4]])),
    ]


class Names(TorchDispatchMode):
    """Names of the operations that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.__dict__.setdefault("names", []).append(str(func).removeprefix("aten.").split(".")[0])
        return func(*args, **kwargs or {})


# --- the same function ---


@pytest.mark.parametrize(("format", "options"), FORMATS.values(), ids=FORMATS)
def test_every_form_of_every_layer_is_the_layer(format, options):
    for layer, x in layers(format, options):
        layer.eval().requires_grad_(False)
        wanted = layer(x)
        weight = layer.weight
        forms = layer._frozen_forms(None).ways
        assert [form.kind for form in forms] in (["dense"], ["dense", "factors"])
        for form in forms:
            install(layer, *layer._merge(form))
            assert layer.frozen
            assert torch.allclose(layer(x), wanted, atol=1e-12)
            assert layer(x).dtype == wanted.dtype
            held = [tensor for name, tensor in layer.named_buffers() if name.startswith("frozen")]
            assert sum(t.numel() * t.itemsize for t in held) == form.bytes
            assert all(t.is_contiguous() and not t.requires_grad for t in held)
            assert torch.equal(layer.weight, weight)
            tnlayers.thaw(layer)
            assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("case", OPERATORS, ids=repr)
def test_linear_with_every_network(case):
    net = case()
    layer = tnlayers.Linear(prod(net.col_modes), prod(net.row_modes), network=net).eval().requires_grad_(False)
    x = torch.randn(4, prod(net.col_modes), dtype=net.dtype)
    wanted = layer(x)
    for form in layer._frozen_forms(8).ways:
        install(layer, *layer._merge(form))
        assert torch.allclose(layer(x), wanted, atol=1e-10 * float(wanted.abs().max() + 1))


@pytest.mark.parametrize("case", ALL, ids=repr)
def test_the_best_cut_is_exact_and_of_least_rank(case):
    net = case()
    found = best_cut(net)
    rows, cols = set(net.rows), set(net.cols)
    inner = {k for k, leg in enumerate(net.legs) if cols.intersection(leg)}
    outer = {k for k, leg in enumerate(net.legs) if rows.intersection(leg)}
    if found is None:
        assert not inner or not outer or inner & outer
        return
    weight, factor = merge(net, found)
    assert torch.allclose(weight @ factor, to_matrix(net), atol=1e-10 * float(to_matrix(net).abs().max() + 1))
    assert set(found.inner) >= inner
    assert set(found.outer) >= outer
    free = [k for k in range(len(net.legs)) if k not in inner | outer]
    for count in range(len(free) + 1 if len(free) <= 8 else 0):
        for chosen in combinations(free, count):
            left = inner | set(chosen)
            there = {label for k in range(len(net.legs)) if k not in left for label in net.legs[k]}
            bonds = {label for k in left for label in net.legs[k]} & there
            assert found.rank <= prod(net.sizes[label] for label in bonds)


def test_a_frozen_linear_is_torch_s_linear_and_nothing_else():
    x = torch.randn(3, 512)
    for layer, calls in ((linear(), 1), (low_rank(), 2)):
        tnlayers.freeze(layer)
        with torch.inference_mode(), Names() as seen:
            layer(x)
        assert seen.names == ["linear"] * calls


def test_plans_decide():
    """A TT-matrix is merged; LowRank stays low-rank, its middle matrix in one side; Tucker may stay as it is."""
    model = nn.ModuleDict(
        {
            "ttm": linear(1024, rank=32),
            "low_rank": low_rank(1024, rank=51),
            "tucker": tnlayers.Linear(1024, 1024, network=make(Tucker, 4, order=4)).eval(),
            "conv": tnlayers.Conv2d(64, 64, 3, network=make(Tucker, 8, modes=(0, 1))).eval(),
            "merged_conv": tnlayers.Conv2d(64, 64, 3, network=make(TTMatrix, 64, order=2)).eval(),
            "embedding": tnlayers.Embedding(1000, 64, network=make(TTMatrix, 16)).eval(),
            "dense": nn.Linear(4, 4),
        }
    )
    frozen = tnlayers.freeze(model, batch=512)
    forms = {row.name: row.form for row in frozen.rows}
    assert forms["ttm"] == "dense"
    assert forms["low_rank"] == "factors"
    assert forms["tucker"] == forms["conv"] == "left"
    assert forms["merged_conv"] == "dense"
    assert forms["embedding"] == "left"
    assert model["low_rank"].frozen_weight.shape == (1024, 51)
    assert model["low_rank"].frozen_inner.shape == (51, 1024)
    held = sum(b.numel() * b.itemsize for n, b in model.named_buffers() if "frozen" in n)
    assert frozen.bytes_after - frozen.bytes_before == held == sum(row.bytes for row in frozen.rows)
    text = str(frozen)
    assert "3 of 6 layers frozen" in text
    assert "embedding: its table takes 256k bytes; give max_bytes" in text
    assert "tucker: its plan is faster as it is" in text
    assert str(tnlayers.freeze(nn.ReLU())).endswith("no layer of this model is a network")


# --- within a budget ---


def test_max_bytes_bounds_all_buffers_and_the_largest_gain_per_byte_comes_first():
    model = nn.Sequential(linear(512), linear(1024, rank=32), low_rank(1024, rank=51)).eval()
    sizes = {"0": 4 * 512**2, "1": 4 * 1024**2, "2": 4 * 51 * 2048}
    rates = {}
    for row in tnlayers.freeze(model).rows:
        rates[row.name] = (DOUBT * row.seconds_live - row.seconds) / row.bytes
        assert row.bytes == sizes[row.name]
    order = sorted(rates, key=rates.get, reverse=True)
    for budget in (0, sizes["2"] - 1, sizes["2"], 2 * 10**6, 5 * 10**6, 10**7):
        frozen = tnlayers.freeze(model, max_bytes=budget)
        spent, wanted = 0, set()
        for name in order:
            if spent + sizes[name] <= budget:
                spent, wanted = spent + sizes[name], wanted | {name}
        assert {row.name for row in frozen.rows if row.form != "left"} == wanted
        assert {name for name in sizes if model[int(name)].frozen} == wanted
        assert frozen.bytes_after - frozen.bytes_before == spent
        assert all("max_bytes: it needs" in row.reason for row in frozen.rows if row.form == "left")


def test_an_embedding_is_merged_under_a_budget_only():
    layer = tnlayers.Embedding(1000, 64, padding_idx=3, network=make(TTMatrix, 16)).eval()
    tokens = torch.tensor([[0, 999], [3, 3]])
    with torch.no_grad():
        layer.padding_vector.fill_(5.0)
        wanted = layer(tokens)
        tnlayers.freeze(layer)
        assert not layer.frozen
        tnlayers.freeze(layer, max_bytes=10**6)
        assert layer.frozen
        assert torch.allclose(layer(tokens), wanted, atol=1e-5)
        layer.padding_vector.fill_(6.0)  # no part of what was merged
        assert torch.equal(layer(tokens)[1], torch.full((2, 64), 6.0))
        with pytest.raises(IndexError, match=r"0\.\.999"):
            layer(torch.tensor([1000]))


def test_arguments_are_refused_by_name(unchecked):
    model = nn.Sequential(linear())
    for wrong in ({"max_bytes": -1}, {"max_bytes": 1.5}, {"batch": 0}):
        with pytest.raises(ValueError, match=f"freeze: {next(iter(wrong))} must be None or an integer"):
            tnlayers.freeze(model, **wrong)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got Linear|got Tensor"):
        tnlayers.freeze(torch.zeros(3))
    model.train()
    with pytest.raises(ValueError, match=r"expected training=False, got True for '0'; call model\.eval\(\) first"):
        tnlayers.freeze(model)
    assert not model[0].frozen


# --- what ends it ---


ENDS = {
    "thaw": lambda layer: tnlayers.thaw(layer),
    "train": lambda layer: layer.train(),
    "set_network": lambda layer: layer.set_network(cut(layer.network.detach(), rank=2)),
    "set_network_same_ranks": lambda layer: layer.set_network(scale(layer.network.detach(), 2.0)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "load_assign": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}, assign=True),
    "load_across_ranks": lambda layer: layer.load_state_dict(linear(rank=3).state_dict()),
    "load_not_strict": lambda layer: layer.load_state_dict({"cores.0": 0 * layer.cores[0].detach()}, strict=False),
    "to_dtype": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "to_meta": lambda layer: layer.to("meta"),
    "share_memory": lambda layer: layer.share_memory(),
    "reset_parameters": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_drops_the_buffers(end):
    model = nn.Sequential(linear()).eval()
    tnlayers.freeze(model)
    assert model[0].frozen
    end(model[0])
    assert not model[0].frozen
    assert [name for name, _ in model.named_buffers()] == []
    assert not model[0]._non_persistent_buffers_set
    layer = model[0]
    if layer.cores[0].is_meta:
        return
    x = torch.randn(3, 512, dtype=layer.cores[0].dtype)
    with torch.no_grad():
        tolerance = 1e-4 if layer.cores[0].itemsize >= 4 else 0.2
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=tolerance)


def test_the_parent_s_train_and_moves_reach_the_layer_and_eval_keeps_it():
    model = nn.Sequential(nn.Sequential(linear()))
    model.eval()
    tnlayers.freeze(model)
    model.eval()
    assert model[0][0].frozen
    model.train()
    assert not model[0][0].frozen
    model.eval()
    tnlayers.freeze(model)
    model.double()
    assert not model[0][0].frozen


def test_a_failed_load_leaves_no_stale_weight():
    layer = linear()
    tnlayers.freeze(layer)
    with pytest.raises(RuntimeError):
        layer.load_state_dict({"cores.0": torch.zeros(3, 3)})
    assert not layer.frozen


# --- what it refuses, and what it computes with other cores ---


def test_a_frozen_layer_refuses_to_train_by_name():
    model = nn.Sequential(linear())
    tnlayers.freeze(model)
    x = torch.randn(2, 512)
    with pytest.raises(RuntimeError, match=r"Linear: a frozen layer cannot train, expected cores that require no grad"):
        model(x)
    with torch.no_grad():
        wanted = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), wanted)
    model[0].cores.requires_grad_(False)
    y = model(x.requires_grad_())
    y.sum().backward()  # the input and the bias may have gradients: the buffers are constants to both
    assert torch.allclose(x.grad, model[0].weight.sum(0).expand_as(x), atol=1e-5)
    assert torch.equal(model[0].bias.grad, torch.full((512,), 2.0))
    model[0].cores.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"cores\.0"):
        model(x)
    tnlayers.thaw(model)
    model(x).sum().backward()
    assert all(core.grad is not None for core in model[0].cores)


def test_convolutions_and_embeddings_refuse_too():
    conv = tnlayers.Conv2d(64, 64, 3, network=make(TTMatrix, 64, order=2)).eval()
    embedding = tnlayers.Embedding(1000, 64, network=make(TTMatrix, 16)).eval()
    for layer, x in ((conv, torch.randn(1, 64, 5, 5)), (embedding, torch.tensor([1]))):
        assert tnlayers.freeze(layer, max_bytes=10**7).rows[0].form == "dense"
        with pytest.raises(RuntimeError, match=f"{type(layer).__name__}: a frozen layer cannot train"):
            layer(x)


@pytest.mark.parametrize("build", [linear, low_rank])
def test_other_cores_are_computed_with_not_the_buffer(build):
    layer, other = build(), build()
    tnlayers.freeze(layer)
    x = torch.randn(3, 512)
    call = partial(torch.func.functional_call, layer, args=(x,))
    with torch.no_grad():
        cores = {name: p for name, p in other.named_parameters() if name.startswith("cores")}
        wanted = F.linear(x, other.weight, layer.bias)
        assert torch.allclose(call(cores), wanted, atol=1e-5)
        assert torch.allclose(
            call({"cores.0": layer.cores[0] * 2}), F.linear(x, 2 * layer.weight, layer.bias), atol=1e-4
        )
        assert torch.equal(call(dict(layer.named_parameters())), layer(x))
        assert torch.allclose(call({"bias": torch.zeros(512)}), layer(x) - layer.bias, atol=1e-5)
        # buffers handed over with other cores are not used either: they stand for the old ones
        both = {**{k: 2 * v for k, v in cores.items()}, **{k: b.clone() for k, b in layer.named_buffers()}}
        assert torch.allclose(call(both), F.linear(x, 2 ** len(layer.cores) * other.weight, layer.bias), atol=1e-3)
    gradients = torch.func.grad(lambda state: call(state).square().sum())(dict(layer.named_parameters()))
    tnlayers.thaw(layer)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-3)


def test_reassigned_tied_and_parametrized_cores():
    layer, other = linear(), linear()
    x = torch.randn(3, 512)
    with torch.no_grad():
        tnlayers.freeze(layer)
        tie_cores(other, layer)
        assert torch.allclose(layer(x), F.linear(x, other.weight, layer.bias), atol=1e-5)
        layer = linear()
        tnlayers.freeze(layer)
        parametrize.register_parametrization(layer.cores, "0", nn.Tanh())
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
        frozen = tnlayers.freeze(layer)
        assert "parametrize" in frozen.rows[0].reason
        assert not layer.frozen


def test_replicas_of_data_parallel_compute_with_their_own_cores():
    layer = linear()
    tnlayers.freeze(layer)
    replica = layer._replicate_for_data_parallel()
    replica.cores = layer.cores._replicate_for_data_parallel()
    for name, core in layer.cores.named_parameters():
        setattr(replica.cores, name, (2 * core).detach())
    replica.bias = layer.bias.detach()
    x = torch.randn(3, 512)
    with torch.no_grad():
        assert torch.allclose(replica(x), F.linear(x, 2 ** len(layer.cores) * layer.weight, layer.bias), atol=1e-3)


def test_vmap_over_inputs_and_over_models():
    layer = linear()
    x = torch.randn(4, 3, 512)
    with torch.no_grad():
        tnlayers.freeze(layer)
        assert torch.allclose(torch.vmap(layer)(x), layer(x), atol=1e-5)
        models = [linear() for _ in range(3)]
        for model in models:
            tnlayers.freeze(model)
        state = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0])

        def call(parameters, buffers, x):
            return torch.func.functional_call(base, (parameters, buffers), (x,))

        y = torch.vmap(call, in_dims=(0, 0, None))(*state, x[0])
        assert torch.allclose(y, torch.stack([model(x[0]) for model in models]), atol=1e-5)
