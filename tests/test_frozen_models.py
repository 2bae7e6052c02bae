"""What happens around a frozen model: copies, files, ties, contexts, dtypes, threads, compilation."""

import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_freeze import ENDS, linear, low_rank, make
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix, scale, svd, ttm_svd
from tnlayers.frozen import drop, install
from tnlayers.layer import NetworkLayer
from tnlayers.surgery import tie_cores

# --- copies, files, ties ---


@pytest.mark.parametrize("build", [linear, low_rank])
def test_a_deep_copy_is_frozen_and_its_own_a_pickle_is_thawed(build):
    model = nn.Sequential(build(), nn.ReLU()).eval()
    x = torch.randn(2, 512)
    with torch.no_grad():
        live = len(pickle.dumps(model))
        tnlayers.freeze(model)
        wanted = model(x)
        copied = copy.deepcopy(model)
        assert copied[0].frozen
        assert torch.equal(copied(x), wanted)
        assert copied[0].frozen_weight is not model[0].frozen_weight
        assert [name for name, _ in copied.named_buffers()] == [name for name, _ in model.named_buffers()]
        tnlayers.thaw(model)
        assert torch.equal(copied(x), wanted)
        tnlayers.freeze(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
            nn.Sequential(copy.copy(model[0]), nn.ReLU()),
        ):
            assert not other[0].frozen
            assert torch.allclose(other(x), wanted, atol=1e-5)
            tnlayers.freeze(other)
            assert torch.allclose(other(x), wanted, atol=1e-5)
        assert model[0].frozen
        assert len(pickle.dumps(model)) <= live + 512
    with pytest.raises(RuntimeError, match="cannot train"):
        copied(x)


def test_state_dicts_and_files_hold_cores_only(tmp_path):
    model = nn.Sequential(linear()).eval()
    keys = list(model.state_dict())
    tnlayers.freeze(model)
    assert list(model.state_dict()) == keys == ["0.bias", "0.cores.0", "0.cores.1"]
    path = tnlayers.save(model, tmp_path / "model.safetensors")
    assert path.stat().st_size < 4 * 512**2 / 4
    x = torch.randn(2, 512)
    with torch.no_grad():
        other = tnlayers.load(path, nn.Sequential(nn.Linear(512, 512))).eval()
        assert torch.allclose(other(x), model(x), atol=1e-5)
        again = nn.Sequential(linear(rank=3)).eval()
        tnlayers.freeze(again)
        again = tnlayers.load(path, again)
        assert torch.allclose(again(x), model(x), atol=1e-5)
    dense = model[0].to_dense_module()
    assert torch.allclose(dense.weight, model[0].frozen_weight, atol=1e-6)
    assert isinstance(tnlayers.densify(model)[0], nn.Linear)


def test_layers_that_share_cores_share_one_buffer():
    first, other = linear(), linear()
    tie_cores(first, other)
    model = nn.Sequential(first, other, first).eval()
    frozen = tnlayers.freeze(model)
    assert [row.name for row in frozen.rows] == ["0", "1"]
    assert [row.bytes for row in frozen.rows] == [4 * 512**2, 0]
    assert first.frozen_weight is other.frozen_weight
    assert frozen.bytes_after - frozen.bytes_before == 4 * 512**2
    copied = copy.deepcopy(model)
    assert copied[0].frozen_weight is copied[1].frozen_weight
    tnlayers.thaw(first)
    assert other.frozen
    with torch.no_grad():
        x = torch.randn(2, 512)
        assert torch.allclose(model(x), copied(x), atol=1e-4)
    # within a budget for one: the second costs nothing
    assert tnlayers.freeze(model, max_bytes=4 * 512**2).bytes_after == frozen.bytes_after


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("copied", [False, True], ids=["tied", "copied"])
def test_what_ends_one_of_two_tied_layers_ends_both(end, copied):
    first, other = linear(), linear()
    tie_cores(first, other)
    tnlayers.freeze(nn.Sequential(first, other).eval())
    if copied:
        first, other = copy.deepcopy((first, other))
    assert other.frozen
    end(first)
    assert not first.frozen
    if end is ENDS["thaw"]:
        assert other.frozen  # thawing changes no cores
        return
    assert not other.frozen
    if not other.cores[0].is_meta:
        with torch.no_grad():
            x = torch.randn(2, 512, dtype=other.cores[0].dtype)
            other.bias.data = other.bias.to(x.dtype)
            assert torch.allclose(other(x), F.linear(x, other.weight, other.bias), atol=1e-4 if x.itemsize > 2 else 0.2)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_an_optimizer_s_step_through_a_tied_layer_drops_the_buffer(optimizer):
    first, other, stranger = linear(64, rank=2), linear(64, rank=2), linear()
    tie_cores(first, other)
    install(first, *first._merge(first._frozen_forms(None).ways[0]))
    tnlayers.freeze(stranger)
    step = optimizer(other.parameters(), lr=0.1)
    x = torch.randn(4, 64)

    def closure():
        step.zero_grad()
        loss = other(x).square().sum()
        loss.backward()
        return loss

    if optimizer is torch.optim.LBFGS:
        step.step(closure)
    else:
        closure()
        step.step()
    assert not first.frozen
    assert stranger.frozen
    with torch.no_grad():
        assert torch.allclose(first(x), F.linear(x, other.weight, first.bias), atol=1e-5)


def test_a_tied_embedding_and_head_share_their_table():
    embedding = nn.Embedding(500, 64, padding_idx=0)
    head = nn.Linear(64, 500, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    tnlayers.tensorize(model, partial(ttm_svd, rank=32, order=2))
    model.eval()
    frozen = tnlayers.freeze(model, max_bytes=4 * 500 * 64)
    assert [row.form for row in frozen.rows] == ["dense", "dense"]
    assert model["embedding"].frozen_weight is model["head"].frozen_weight


def test_a_module_in_two_models_is_frozen_and_thawed_for_both():
    shared = linear()
    first, other = nn.Sequential(shared).eval(), nn.Sequential(nn.Identity(), shared).eval()
    with tnlayers.freeze(first):
        assert shared.frozen
        with tnlayers.freeze(other):
            assert shared.frozen
        assert shared.frozen  # it had been before the inner one
    assert not shared.frozen


# --- the context manager ---


def test_contexts_thaw_what_they_froze_also_after_an_exception():
    model = nn.Sequential(linear(), low_rank()).eval()
    tnlayers.freeze(model[0])
    with pytest.raises(KeyError), tnlayers.freeze(model) as frozen:  # noqa: PT012
        assert isinstance(frozen, tnlayers.Freeze)
        assert model[0].frozen
        assert model[1].frozen
        raise KeyError
    assert model[0].frozen  # as it was before
    assert not model[1].frozen
    tnlayers.thaw(model)
    with tnlayers.freeze(model):
        model.train()  # dropped inside: nothing left to do at exit
    assert not model[0].frozen
    model.eval()
    with tnlayers.freeze(model), tnlayers.freeze(model, max_bytes=0):
        assert not model[0].frozen
    tnlayers.thaw(model)
    tnlayers.thaw(model)


def test_a_set_network_inside_a_context_is_not_lost():
    layer = linear()
    x = torch.randn(2, 512)
    with torch.no_grad(), tnlayers.freeze(layer):
        before = layer(x)
        layer.set_network(scale(layer.network, 2.0))
        after = layer(x)
        assert torch.allclose(after - layer.bias, 2 * (before - layer.bias), atol=1e-4)
        tnlayers.freeze(layer)
        assert torch.allclose(layer(x), after, atol=1e-4)
    assert not layer.frozen


def test_freezing_again_merges_anew():
    layer = linear()
    x = torch.randn(2, 512)
    with torch.no_grad():
        tnlayers.freeze(layer)
        before = layer(x)
        layer.cores[0].mul_(2)
        assert torch.equal(layer(x), before)  # changed by hand: not noticed, as documented
        tnlayers.freeze(layer)
        assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), atol=1e-4)


def test_nothing_is_installed_when_a_merge_fails(monkeypatch):
    model = nn.Sequential(linear(), linear()).eval()

    def fail(form):
        raise MemoryError("no room")

    monkeypatch.setattr(model[1], "_merge", fail, raising=False)
    with pytest.raises(MemoryError):
        tnlayers.freeze(model)
    assert not model[0].frozen


# --- precision, modes, devices, threads ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    layer = tnlayers.Linear(512, 512, dtype=dtype, network=make(TTMatrix, 8, order=2)).eval()
    x = torch.randn(4, 512, dtype=dtype)
    with torch.no_grad():
        assert tnlayers.freeze(layer).rows[0].form == "dense"
        assert layer.frozen_weight.dtype == dtype
        exact = copy.deepcopy(layer).double()
        error = (layer.frozen_weight.double() - exact.weight).abs()
        # float32 products, rounded once: half a unit in the last place, where half-precision steps would add theirs
        assert bool((error <= 0.51 * torch.finfo(dtype).eps * exact.weight.abs() + 1e-7).all())
        assert torch.allclose(layer(x).double(), exact(x.double()), atol=20 * torch.finfo(dtype).eps)


def test_complex_layers():
    layer = tnlayers.Linear.from_dense(nn.Linear(64, 64, dtype=torch.complex128), partial(ttm_svd, order=2))
    layer.eval().requires_grad_(False)
    x = torch.randn(3, 64, dtype=torch.complex128)
    wanted = layer(x)
    install(layer, *layer._merge(layer._frozen_forms(None).ways[0]))
    assert torch.allclose(layer(x), wanted, atol=1e-12)


def test_freezing_under_autocast_and_inference_mode_merges_in_full_precision():
    layer = linear()
    tnlayers.freeze(layer)
    wanted = layer.frozen_weight
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        tnlayers.freeze(layer)
        y = layer(torch.randn(2, 512))
    assert y.dtype == torch.bfloat16
    assert torch.equal(layer.frozen_weight, wanted)
    assert not layer.frozen_weight.is_inference()
    layer.requires_grad_(False)
    x = torch.randn(2, 512, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_meta_layers_freeze_without_memory():
    layer = tnlayers.Linear(2**14, 2**14, device="meta", network=make(TTMatrix, 128, order=2)).eval()
    assert tnlayers.freeze(layer).rows[0].bytes == 4 * 2**28
    assert layer.frozen_weight.is_meta
    layer.to_empty(device="meta")
    assert not layer.frozen


def test_channels_last_and_unbatched_convolutions():
    layer = tnlayers.Conv2d(64, 64, 3, padding=1, network=make(TTMatrix, 64, order=2)).eval()
    x = torch.randn(2, 64, 7, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = layer(x)
        assert tnlayers.freeze(layer).rows[0].form == "dense"
        assert torch.allclose(layer(x), wanted, atol=1e-4)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(layer(x[0]), wanted[0], atol=1e-4)
        assert layer(torch.zeros(0, 64, 7, 6)).shape == (0, 64, 7, 6)


def test_empty_batches_and_wrong_widths():
    for layer in (linear(), low_rank()):
        tnlayers.freeze(layer)
        with torch.no_grad():
            assert layer(torch.zeros(0, 512)).shape == (0, 512)
            assert layer(torch.zeros(512)).shape == (512,)
            assert layer(torch.zeros(2, 0, 512)).shape == (2, 0, 512)
            with pytest.raises(ValueError, match="last axis of x must be in_features"):
                layer(torch.zeros(2, 511))


def test_threads_see_a_whole_weight_while_it_comes_and_goes():
    layer = low_rank()
    x = torch.randn(3, 512)
    with torch.no_grad():
        wanted = layer(x)

    def call(_):
        with torch.no_grad():
            return max(float((layer(x) - wanted).abs().max()) for _ in range(300))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(call, k) for k in range(3)]
            tnlayers.freeze(layer)
            made = layer.frozen_weight, layer.frozen_inner
            while not all(job.done() for job in running):
                install(layer, *(tensor.clone() for tensor in made))
                drop(layer)
            assert max(job.result() for job in running) < 1e-5
    finally:
        sys.setswitchinterval(interval)


def test_a_weight_that_goes_while_it_is_asked_for(monkeypatch):
    layer = low_rank()
    x = torch.randn(3, 512)
    with torch.no_grad():
        wanted = layer(x)
        tnlayers.freeze(layer)
        made = [tensor.clone() for tensor in (layer.frozen_weight, layer.frozen_inner)]
        for meanwhile in (
            lambda: drop(layer),
            lambda: install(layer, *made),
            lambda: install(layer, made[0] @ made[1], None),
        ):
            install(layer, *made)
            monkeypatch.setattr("tnlayers.frozen.serves", lambda _, meanwhile=meanwhile: meanwhile() is None)
            assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_layers_without_a_merged_form_are_left():
    class Own(tnlayers.Linear):
        def _frozen_forms(self, batch):
            return NetworkLayer._frozen_forms(self, batch)

    layer = Own(8, 8, network=make(LowRank, 2)).eval()
    assert "no merged form" in tnlayers.freeze(layer).rows[0].reason


def test_hooks_run_and_a_converted_model_freezes():
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))
    tnlayers.tensorize(model, partial(svd, rank=16), example_input=torch.randn(64, 512))
    model.eval()
    called = []
    model[0].register_forward_hook(lambda *args: called.append(1))
    x = torch.randn(5, 512)
    with torch.no_grad():
        wanted = model(x)
        with tnlayers.freeze(model) as frozen:
            assert [row.form for row in frozen.rows] == ["factors", "factors"]
            assert torch.allclose(model(x), wanted, atol=1e-5)
    assert len(called) == 2


# --- compiled ---


@pytest.mark.compile
@pytest.mark.parametrize("build", [linear, low_rank])
def test_compiled_frozen_layers(build, unchecked):
    torch._dynamo.reset()
    layer, other = build(), build()
    x = torch.randn(3, 512)
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend="eager")
    swapped = torch.compile(
        lambda state, x: torch.func.functional_call(layer, state, (x,)), fullgraph=True, backend="eager"
    )
    cores = {name: p.detach() for name, p in other.named_parameters() if name.startswith("cores")}
    with torch.no_grad():
        wanted = compiled(x)
        tnlayers.freeze(layer)
        assert torch.allclose(compiled(x), wanted, atol=1e-5)
        layer.cores[0].mul_(2)  # not seen, which shows that the buffer is what the program reads
        assert torch.allclose(compiled(x), wanted, atol=1e-5)
        assert torch.allclose(swapped(cores, x), F.linear(x, other.weight, layer.bias), atol=1e-5)
        assert torch.allclose(swapped(dict(layer.named_parameters()), x), wanted, atol=1e-5)
        layer.set_network(scale(layer.network, 0.5))
        assert torch.allclose(compiled(x), wanted, atol=1e-4)
        tnlayers.freeze(compiled)
        assert layer.frozen
        copied, pickled = copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))
        assert copied._orig_mod[0].frozen
        assert not pickled._orig_mod[0].frozen
        for again in (copied, pickled):
            assert torch.allclose(again(x), wanted, atol=1e-4)
        tnlayers.thaw(compiled)
        assert torch.allclose(compiled(x), wanted, atol=1e-4)


@pytest.mark.compile
def test_a_compiled_frozen_layer_refuses_to_train():
    torch._dynamo.reset()
    layer = linear()
    tnlayers.freeze(layer)
    with pytest.raises(RuntimeError, match="a frozen layer cannot train"):
        torch.compile(layer, backend="eager")(torch.randn(2, 512))
