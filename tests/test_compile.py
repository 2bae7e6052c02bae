"""torch.compile and tnlayers.compile: the eager model's values and gradients, and no compilation for a rank change."""

import copy
import pickle

import pytest
import torch
from everything import FORMATS, Everything, close, inputs
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, add, scale
from decompositions import round as cut

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()


def gradients(model, results):
    """Gradients of every parameter for one fixed function of the results."""
    loss = sum(y.square().mean() for y in results)
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize(
    ("format", "compiler"),
    [
        *(pytest.param(format, torch.compile, id=f"torch-{format}") for format in FORMATS),
        pytest.param("tucker2", tnlayers.compile, id="tnlayers-tucker2"),
    ],
)
def test_values_and_gradients_of_every_layer(format, compiler):
    """On plans that do not merge the cores first; export tests have both."""
    model = Everything(format)
    model.force(merged=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiler(model, fullgraph=True, backend=counter)
    batches = (3, 5, 7) if compiler is torch.compile else (3,)  # many symbols take long to compile
    for batch in batches:  # 8 and more take another convolution kernel of torch's, and another compilation
        x = inputs(batch)
        y, z = compiled(*x), model(*x)
        assert close(y, z)
        assert close(gradients(model, y), gradients(model, z))
    assert counter.frame_count == min(2, len(batches))  # the second batch makes the batch dynamic


@pytest.mark.parametrize("compiler", [torch.compile, tnlayers.compile], ids=["torch", "tnlayers"])
def test_inductor(compiler):
    model = nn.Sequential(
        tnlayers.Linear(24, 16, network=tnlayers.random_network(LowRank, 4)),
        nn.ReLU(),
        tnlayers.Linear(16, 12, network=tnlayers.random_network(TTMatrix, 3)),
    )
    compiled = compiler(model, fullgraph=True)
    x = torch.randn(6, 24)
    y, z = compiled(x), model(x)
    assert close((y,), (z,))
    assert close(gradients(model, (y,)), gradients(model, (z,)))


@pytest.mark.parametrize(
    ("format", "options", "backend"),
    [
        (LowRank, {}, "inductor"),
        (Tucker, {"order": 1}, "aot_eager"),
        (TTMatrix, {"order": 2}, "aot_eager"),
    ],
    ids=["low_rank-inductor", "tucker", "ttm"],
)
def test_twenty_rank_changes_in_each_of_four_layers_cost_one_compilation(format, options, backend):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(tnlayers.Linear(32, 32, network=tnlayers.random_network(format, 8, **options)) for _ in range(4))
    )
    counter = CompileCounterWithBackend(backend)
    compiled = tnlayers.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(6, 32)
    seen = set()
    for change in range(80):  # one layer at a time, then all at once
        y = compiled(x)
        if change % 8 == 0:
            z = model(x)
            assert close((y,), (z,))
            assert close(gradients(model, (y,)), gradients(model, (z,)), 1e-4)
        layer = model[change // 20]
        net = layer.network.detach()
        layer.set_network(cut(scale(add(net, net), 0.5), rank=2 + change * 7 % 11))
        seen.add(layer.network.ranks)
    assert len(seen) > 6
    assert counter.frame_count == 1


def trained(format, options, settings, backend, steps=60):
    """Two models in training side by side, one compiled; their ranks change at every rounding."""
    counter = CompileCounterWithBackend(backend)
    models, optimizers, calls = [], [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(tnlayers.Linear(16, 16, network=tnlayers.random_network(format, 4, **options)) for _ in range(4))
        )
        models.append(model)
        optimizers.append(tnlayers.RankAdaptive(model, 0.002, tol=0.1, **settings))
        calls.append(tnlayers.compile(model, fullgraph=True, backend=counter) if compiled else model)
    changes, before = [0] * 4, [None] * 4
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(12, 16, generator=g), torch.randn(12, 16, generator=g)
        results = []
        for call, optimizer in zip(calls, optimizers, strict=True):
            for track in optimizer._tracks:  # another tolerance every time: ranks go up and down
                track.ranks.tol = (0.05, 0.4, 0.15)[step // settings["every"] % 3]
            optimizer.zero_grad()
            results.append(call(x))
            (results[-1] - y).square().mean().backward()
            optimizer.step()
        assert close((results[0],), (results[1],), 1e-3)
        ranks = [track.window.point.ranks for track in optimizers[1]._tracks]
        changes = [n + (a != b) for n, a, b in zip(changes, before, ranks, strict=True)]
        before = ranks
    for a, b in zip(*models, strict=True):
        assert torch.allclose(a.weight, b.weight, atol=1e-3)
    return counter.frame_count, min(changes) - 1


@pytest.mark.parametrize(
    ("format", "options", "settings", "backend", "steps"),
    [
        (LowRank, {}, {"every": 1}, "aot_eager", 60),
        (LowRank, {}, {"every": 4}, "inductor", 140),
        (TTMatrix, {"order": 2}, {"every": 1}, "aot_eager", 60),
    ],
    ids=["low_rank", "windows-inductor", "ttm"],
)
def test_training_at_changing_rank_compiles_at_most_three_times(format, options, settings, backend, steps):
    frames, changes = trained(format, options, settings, backend, steps)
    assert changes >= 20
    assert frames <= 3


def test_riemannian_training_compiles_twice_at_most():
    counter = CompileCounterWithBackend("aot_eager")
    models, optimizers, calls = [], [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(tnlayers.Linear(16, 16, network=tnlayers.random_network(LowRank, 4)) for _ in range(2)))
        models.append(model)
        optimizers.append(tnlayers.RiemannianAdam(model, lr=0.002, stabilize_every=3))
        calls.append(tnlayers.compile(model, fullgraph=True, backend=counter) if compiled else model)
    for step in range(10):
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
        for call, optimizer in zip(calls, optimizers, strict=True):
            optimizer.zero_grad()
            (call(x) - x).square().mean().backward()
            optimizer.step()
    for a, b in zip(*models, strict=True):
        assert torch.allclose(a.weight, b.weight, atol=1e-4)
    assert counter.frame_count <= 2


def test_plain_compile_specialises_on_ranks():
    """What tnlayers.compile is for; where torch stops doing this, it is needed no more."""
    layer = tnlayers.Linear(32, 32, network=tnlayers.random_network(TTMatrix, 12, order=2))
    layer.pin_plan()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for rank in (9, 6, 3):
        layer.set_network(cut(layer.network.detach(), rank=rank))
        compiled(torch.randn(4, 32))
    assert counter.frame_count == 3


def test_convolutions_and_embeddings_change_ranks_too():
    model = Everything("tucker2")
    model.force(merged=False)
    counter = CompileCounterWithBackend("eager")
    compiled = tnlayers.compile(model, fullgraph=True, backend=counter)
    x = inputs(3)
    for rank in (3, 2):
        assert close(compiled(*x), model(*x))
        for layer in (model.conv2, model.conv3, model.embedding):
            layer.set_network(cut(layer.network.detach(), rank=rank))
    assert close(compiled(*x), model(*x))
    assert counter.frame_count == 1


def test_settings_of_other_models_are_left_alone():
    import torch.fx.experimental._config as symbolic

    layer = tnlayers.Linear(16, 16, network=tnlayers.random_network(LowRank, 4))
    during = []

    def backend(graph, example):
        during.append((torch._dynamo.config.force_parameter_static_shapes, symbolic.use_duck_shape))
        return graph.forward

    before = (torch._dynamo.config.force_parameter_static_shapes, symbolic.use_duck_shape)
    compiled = tnlayers.compile(layer, backend=backend)
    assert before == (torch._dynamo.config.force_parameter_static_shapes, symbolic.use_duck_shape)
    compiled(torch.randn(2, 16))
    with pytest.raises(ValueError, match="last axis"):
        layer(torch.randn(2, 15))
    assert before == (torch._dynamo.config.force_parameter_static_shapes, symbolic.use_duck_shape) == (True, True)
    assert during == [(False, False)]


def test_pinned_plans_stay_until_another_one_is_asked_for():
    layer = tnlayers.Linear(64, 64, network=tnlayers.random_network(LowRank, 40))
    tnlayers.compile(layer, backend="eager")
    plan = layer.plan()
    layer.set_network(cut(layer.network.detach(), rank=2))
    layer(torch.randn(3, 64))
    assert layer.plan() is plan
    assert layer.plan(batch=4096) is not plan
    again = layer.plan()
    layer.set_network(cut(layer.network.detach(), rank=1))
    assert layer.plan() is again
    assert copy.deepcopy(layer)._pinned


def test_copies_and_pickles_of_a_compiled_model():
    model = nn.Sequential(tnlayers.Linear(32, 32, network=tnlayers.random_network(LowRank, 12)))
    x = torch.randn(3, 32)
    compiled = tnlayers.compile(model, backend="eager")
    compiled(x)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.allclose(other(x), model(x), atol=1e-6)
        layer, counter = other._orig_mod[0], []
        for rank in (9, 6, 3):
            layer.set_network(cut(layer.network.detach(), rank=rank))
            other(x)
            counter.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert counter[1] == counter[2]
        assert list(other.state_dict()) == [f"_orig_mod.{name}" for name in model.state_dict()]
    assert model[0].network.ranks == (12, 12)


def test_frozen_models_compile_and_come_back():
    model = nn.Sequential(tnlayers.Linear(512, 512, network=tnlayers.random_network(TTMatrix, 8, order=2))).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = tnlayers.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(3, 512)
    with torch.no_grad():
        wanted = model(x)
        for _ in range(2):
            tnlayers.freeze(compiled)
            assert torch.allclose(compiled(x), wanted, atol=1e-4)
            tnlayers.thaw(model)
            assert torch.allclose(compiled(x), wanted, atol=1e-4)
    assert counter.frame_count == 2


def test_disabled():
    layer = tnlayers.Linear(16, 16, network=tnlayers.random_network(LowRank, 4))
    assert torch.allclose(tnlayers.compile(layer, disable=True)(torch.ones(2, 16)), layer(torch.ones(2, 16)))


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        tnlayers.compile(lambda x: x)
