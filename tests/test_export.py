"""torch.export and ONNX: one program for every batch, the cores as its weights, nothing dense unless frozen."""

import io

import pytest
import torch
from everything import FORMATS, Everything, close, inputs
from test_freeze import linear, low_rank
from torch import nn
from torch.export import Dim

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker

pytestmark = pytest.mark.compile  # traced: the shape-checked job leaves it out

BATCH = Dim("batch")
ONNX_FORMATS = ("low_rank", "tucker2", "tt", "ttm")


def export(model, x, dims=None, **options):
    return torch.export.export(model, x, dynamic_shapes=dims or tuple({0: BATCH} for _ in x), **options)


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def sizes(program) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that a program carries."""
    return {k: tuple(v.shape) for k, v in (*program.state_dict.items(), *program.constants.items())}


@pytest.mark.parametrize("merged", [False, True], ids=["path", "merge"])
@pytest.mark.parametrize("format", FORMATS)
def test_one_program_serves_every_batch_and_is_saved(format, merged):
    model = Everything(format).eval()
    model.force(merged)
    program = export(model, inputs(3))
    loaded = reloaded(program).module()
    module = program.module()
    for batch in (1, 7, 4096):
        x = inputs(batch)
        wanted = model(*x)
        assert close(module(*x), wanted)
        assert close(loaded(*x), wanted)
    assert sizes(program) == {k: tuple(v.shape) for k, v in model.state_dict().items()}  # cores, nothing dense


def test_the_batch_of_the_example_and_earlier_calls_have_no_say():
    for network in (tnlayers.random_network(LowRank, 3), tnlayers.random_network(TTMatrix, 3, order=3)):
        layer = tnlayers.Linear(24, 32, network=network)
        for calls in ((), (1, 4096)):
            for batch in calls:
                layer(torch.randn(batch, 24))
            for example in (2, 9):
                module = export(layer, (torch.randn(example, 24),)).module()
                for batch in (1, 7, 4096):
                    x = torch.randn(batch, 24)
                    assert close((module(x),), (layer(x),))


def test_several_dynamic_axes_and_strict_mode():
    layer = tnlayers.Linear(13, 7, network=tnlayers.random_network(TTMatrix, 3, order=2))
    conv = tnlayers.Conv2d(4, 6, 3, padding=1, network=tnlayers.random_network(Tucker, (3, 2), modes=(0, 1)))
    embedding = tnlayers.Embedding(31, 8, network=tnlayers.random_network(TTMatrix, 3, order=3))
    length, height, width = Dim("length"), Dim("height", min=4), Dim("width", min=4)
    for model, draw, dims, others in (
        (layer, lambda b, n: torch.randn(b, n, 13), {0: BATCH, 1: length}, ((1, 1), (7, 300))),
        (conv, lambda b, n: torch.randn(b, 4, n, n + 3), {0: BATCH, 2: height, 3: width}, ((1, 5), (7, 40))),
        (embedding, lambda b, n: torch.randint(0, 31, (b, n)), {0: BATCH, 1: length}, ((1, 1), (7, 300))),
    ):
        for strict in (False, True):
            module = export(model, (draw(3, 6),), (dims,), strict=strict).module()
            for batch, other in others:
                x = draw(batch, other)
                assert close((module(x),), (model(x),))


def test_an_exported_program_trains_its_cores():
    layer = tnlayers.Linear(24, 16, network=tnlayers.random_network(TTMatrix, 3, order=2))
    module = export(layer, (torch.randn(3, 24),)).module()
    x = torch.randn(5, 24)
    module(x).square().sum().backward()
    layer(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter.grad, layer.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "buffers"), [(linear, {"frozen_weight"}), (low_rank, {"frozen_weight", "frozen_inner"})]
)
def test_a_frozen_model_is_exported_as_frozen(build, buffers):
    model = nn.Sequential(build()).eval()
    x = torch.randn(3, 512)
    with torch.no_grad():
        live = model(x)
        tnlayers.freeze(model)
        program = export(model, (x,))
        assert {name.rpartition(".")[2] for name in program.constants} == buffers
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert [name for name in called if "sym" not in name] == ["aten.linear.default"] * len(buffers)
        loaded = reloaded(program).module()
        for batch in (1, 7, 4096):
            x = torch.randn(batch, 512)
            assert torch.allclose(loaded(x), model(x), atol=1e-5)
        tnlayers.thaw(model)
        assert torch.allclose(model(x[:3]), loaded(x[:3]), atol=1e-4)
        assert live.shape == (3, 512)
    tnlayers.freeze(model)
    with pytest.raises(RuntimeError, match="a frozen layer cannot train"):  # export for inference: under no_grad
        export(model, (x,))


# --- ONNX ---

# torch's exporter calls what torch deprecates, and names one axis of several that share a dimension
tolerant = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", "ignore::DeprecationWarning", "ignore:.*axis name.* will not be used"
)


def session(model, x, path, **options):
    """Export with a dynamic batch, and run what was written."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    torch.onnx.export(
        model,
        x,
        path,
        dynamo=True,
        dynamic_shapes=tuple({0: BATCH} for _ in x),
        verbose=False,
        external_data=False,
        **options,
    )
    running = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in running.get_inputs()]

    def run(*x):
        arrays = running.run(None, {name: value.numpy() for name, value in zip(names, x, strict=True)})
        return tuple(map(torch.from_numpy, arrays))

    return run


@tolerant
@pytest.mark.parametrize("merged", [False, True], ids=["path", "merge"])
@pytest.mark.parametrize("format", ONNX_FORMATS)
def test_onnxruntime_computes_the_same(format, merged, tmp_path):
    model = Everything(format).eval()
    model.force(merged)
    run = session(model, inputs(3), tmp_path / "model.onnx")
    with torch.no_grad():
        for batch in (1, 7, 4096):
            x = inputs(batch)
            assert close(run(*x), model(*x), 1e-4)


@tolerant
def test_onnx_files_hold_cores_or_the_merged_weight(tmp_path):
    model = nn.Sequential(linear()).eval()
    x = torch.randn(3, 512)
    dense = 4 * 512**2
    with torch.no_grad():
        wanted = model(x)
        plans = model[0].alternatives(512)
        path = next(plan for plan in plans if plan.strategy != "merge")
        merge = next(plan for plan in plans if plan.strategy == "merge")
        for name, plan, options, low, high in (
            ("path", path, {}, 0, dense / 8),
            ("merge", merge, {"optimize": False}, 0, dense / 8),
            ("folded", merge, {}, dense, 1.1 * dense),  # by torch's optimizer of ONNX graphs, as documented
            ("frozen", None, {}, dense, 1.1 * dense),
        ):
            if plan is None:
                tnlayers.freeze(model)
            else:
                model[0]._stored = plan
            file = tmp_path / f"{name}.onnx"
            run = session(model, (x,), file, **options)
            assert close(run(x), (wanted,), 1e-4)
            assert low <= file.stat().st_size < high
