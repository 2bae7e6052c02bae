"""Folders and exports of users' own models, and pairs of plain layers; without transformers."""

import ast
import json
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import tnlayers
from decompositions import LowRank, cp_als, hosvd, svd, ttm_svd
from tnlayers.pretrained import two_layers
from tnlayers.pretrained.exported import as_two_linear, export_dense, export_two_linear
from tnlayers.pretrained.folder import load_folder, save_folder, written_folder
from tnlayers.pretrained.hub import check_config, inside
from tnlayers.pretrained.model import Pretrained, open_pretrained


def relative(value, reference):
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def small():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6)).eval()


# --- pairs of plain layers ---


def skewed(shape, rank, extra):
    """A network whose middle matrix is rank x (rank + extra), with the columns of a convolution merged."""
    m, n = shape[0], torch.Size(shape[1:]).numel()
    factors = (torch.randn(m, rank), torch.randn(rank, rank + extra), torch.randn(n, rank + extra))
    return LowRank(*(factor.double() for factor in factors))


X1, X2 = torch.randn(2, 4, 11).double(), torch.randn(2, 4, 7, 8).double()
LAYERS = {
    "linear": (nn.Linear(9, 5), torch.randn(3, 2, 9).double()),
    "no bias": (nn.Linear(5, 9, bias=False), torch.randn(3, 5).double()),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), X1),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), dilation=2, padding="same", padding_mode="circular"), X2),
    "conv3d": (nn.Conv3d(4, 6, 2, bias=False), torch.randn(2, 4, 3, 4, 5).double()),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=3, output_padding=1), X1),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, (2, 3), stride=2, padding=1, dilation=2), X2),
    "embedding": (nn.Embedding(30, 8), torch.randint(30, (3, 4))),
    "padding": (nn.Embedding(30, 8, padding_idx=3), torch.tensor([[3, 1, 29], [0, 3, 3]])),
}


@pytest.mark.parametrize("extra", [-1, 0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_pair_has_the_function_and_the_weight_of_the_layer(name, extra):
    dense, x = LAYERS[name]
    dense = dense.double()
    if name == "padding":
        dense.weight.data[3] = torch.randn(8)
    model = nn.Sequential(dense).eval()
    layer = tnlayers.surgery.stand_in_for(dense).from_dense(dense, lambda w: skewed(w.shape, 3, extra))
    model[0] = layer
    expected, weight = model(x).detach(), layer.weight.detach()
    made, kept = as_two_linear(model)
    assert made is model
    assert kept == {}
    pair = model[0]
    assert isinstance(pair, nn.Sequential)
    assert all(type(part).__module__.startswith("torch.nn") for part in pair)
    assert relative(model(x), expected) < 1e-12
    assert relative(pair.weight, weight) < 1e-12
    assert pair[0].weight.numel() + pair[1].weight.numel() == (3 + min(0, extra) + (name == "padding")) * (
        weight.shape[0] + weight[0].numel()
    ), "S lies on the side where it is free; a padding vector outside the span costs a column"
    assert (pair.bias is None) == (getattr(dense, "bias", None) is None)
    assert not pair.training
    names = ("in_features", "out_features", "in_channels", "out_channels", "num_embeddings", "embedding_dim")
    for name in (*names, "padding_idx", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(pair, name, None) == getattr(dense, name, None), name


def test_a_padding_vector_within_the_span_costs_nothing():
    table = nn.Embedding(20, 6, padding_idx=2).double()  # its padding row is zero
    model = nn.Sequential(tnlayers.Embedding.from_dense(table, partial(svd, rank=2)))
    as_two_linear(model)
    assert model[0][0].embedding_dim == 2
    tokens = torch.tensor([2, 5])
    assert torch.equal(model(tokens)[0], torch.zeros(6).double())
    model(tokens).sum().backward()
    assert not model[0][0].weight.grad[2].any(), "the padding row sends no gradient, as before"


def test_ties_hooks_and_frozen_parts_stay():
    model = nn.ModuleDict({"a": nn.Embedding(40, 8), "b": nn.Linear(8, 40, bias=False)})
    model["b"].weight = model["a"].weight
    tnlayers.tensorize(model, partial(svd, rank=3), spectra=False)
    model["a"].cores.requires_grad_(False)
    calls = []
    model["b"].register_forward_hook(lambda *_: calls.append(1))
    as_two_linear(model)
    assert model["a"][0].weight is model["b"][1].weight
    assert not model["a"][0].weight.requires_grad
    model["b"](torch.ones(2, 8))
    assert calls == [1]


def test_what_is_no_product_of_two_matrices_stays_and_is_listed():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv2d(4, 8, 3, groups=2), nn.Linear(16, 16))
    chain = partial(ttm_svd, rank=2, row_modes=(4, 4), col_modes=(4, 4))
    recipes = {"0": chain, "1": partial(svd, rank=2), "2": partial(svd, rank=1), "3": partial(cp_als, rank=3)}
    tnlayers.tensorize(model, recipes, spectra=False, skip_if_no_gain=False)
    before = {name: model[name] for name in (0, 2)}
    _, kept = as_two_linear(model)
    assert sorted(kept) == ["0", "2"], "a matrix in CP form is a product too"
    assert "no product of two matrices" in kept["0"]
    assert "groups=2" in kept["2"]
    assert all(model[name] is layer for name, layer in before.items())


def test_formats_that_a_cut_separates_are_pairs_too():
    model = nn.Sequential(nn.Linear(16, 12))
    tnlayers.tensorize(model, partial(hosvd, rank=4), spectra=False)
    x = torch.randn(5, 16)
    expected = model(x).detach()
    _, kept = as_two_linear(model)
    assert kept == {}
    assert relative(model(x), expected) < 1e-5


def test_half_precision_pairs_are_products_in_single():
    dense = nn.Linear(64, 64).bfloat16()
    layer = tnlayers.Linear.from_dense(dense, partial(svd, rank=8))
    exact = layer.network.U.double() @ layer.network.S.double() @ layer.network.V.double().mT
    pair, _ = as_two_linear(layer)
    product = pair[1].weight.double() @ pair[0].weight.double()
    assert relative(product, exact) < 2**-8, "one rounding of S V^T"


# --- folders of users' own models ---


def test_a_users_own_model_needs_the_user(tmp_path):
    model = small()
    tnlayers.tensorize(model, partial(svd, rank=2), spectra=False)
    x = torch.randn(3, 12)
    out = save_folder(model, tmp_path / "net", plan={"layers": {"0": 2}}, factory="os:abort")
    with pytest.raises(
        ValueError, match=r"made by os:abort\), which is not run; build the model and give it as model="
    ):
        load_folder(out)
    for device in ("cpu", "meta"):
        with torch.device(device):
            fresh = small()
        again = load_folder(out, model=fresh)
        assert torch.equal(again.model(x), model(x))
    assert again.kind == "module"
    assert json.loads((out / "tnlayers.json").read_text())["factory"] == "os:abort"


def test_exports_of_a_users_own_model(tmp_path):
    from safetensors.torch import load_file

    model = small()
    tnlayers.tensorize(model, partial(svd, rank=2), spectra=False)
    x = torch.randn(3, 12)
    fresh = small()
    fresh.load_state_dict(load_file(export_dense(model, tmp_path / "dense") / "model.safetensors"))
    assert relative(fresh(x), model(x)) < 1e-5
    out, dense = export_two_linear(model, tmp_path / "pairs")
    assert dense == {}
    assert relative(two_layers.load(out, small())(x), model(x)) < 1e-5
    with pytest.raises(ValueError, match=r"give it as model="):
        two_layers.load(out)
    about = json.loads((out / "two_linear.json").read_text())
    about["layers"]["0"] = [{"type": "Module", "arguments": {}}]
    (out / "two_linear.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"a layer must be one of .*, got 'Module'"):
        two_layers.load(out, small())
    (out / "two_linear.json").write_text(json.dumps({**about, "format_version": 9}))
    with pytest.raises(ValueError, match=r"expected format version 1, got 9"):
        two_layers.load(out, small())
    with pytest.raises(ValueError, match=r"put it into an nn.Sequential"):
        export_two_linear(model[0], tmp_path / "one")


def test_the_loader_of_pairs_imports_nothing_of_ours():
    tree = ast.parse(Path(two_layers.__file__).read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in found} <= {*sys.stdlib_module_names, "torch", "safetensors"}


# --- timm, or what looks like it ---


class Patches(nn.Module):
    """A model with buffers that no state dict holds: one it makes again when asked, one it does not."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.num_classes, self.head = num_classes, nn.Linear(16, num_classes)
        self.body = nn.Linear(16, 16)
        self.register_buffer("grid", torch.empty(16), persistent=False)
        self.register_buffer("index", torch.arange(16), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self):
        self.grid.copy_(torch.linspace(0, 1, 16, device=self.grid.device))

    def forward(self, x):
        return self.head(self.body(x * self.grid)[:, self.index])


@pytest.fixture
def timm(monkeypatch):
    module = types.ModuleType("timm")

    def create_model(name, pretrained=False, **kwargs):
        if name != "patches.small":
            raise RuntimeError(f"Unknown model ({name})")
        return Patches(**kwargs)

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("timm")
def test_timm_models_there_and_back(tmp_path):
    held = open_pretrained("timm:patches.small", dtype="float64")
    assert (held.kind, held.config) == (
        "timm",
        {"architecture": "patches.small", "model_args": {"num_classes": 5}},
    )
    tnlayers.tensorize(held.model, partial(svd, rank=2), spectra=False)
    x = torch.randn(3, 16).double()
    out = save_folder(held, tmp_path / "net", plan={"keep": 0.3})
    again = load_folder(out)
    assert torch.equal(again.model(x), held.model(x))
    assert (again.kind, again.plan, again.config) == ("timm", {"keep": 0.3}, held.config)
    dense = open_pretrained(export_dense(out, tmp_path / "dense"), dtype="float64")
    assert relative(dense.model(x), held.model(x)) < 1e-5
    pairs, _ = export_two_linear(held, tmp_path / "pairs")
    assert relative(two_layers.load(pairs).double()(x), held.model(x)) < 1e-5
    (out / "config.json").write_text('{"architecture": "os.system"}')
    with pytest.raises(ValueError, match=r"must hold 'architecture' and 'model_args'"):
        load_folder(out)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", ["unknown", "hf-hub:somebody/model", "local-dir:../x", "../x"])
def test_timm_names_are_names_of_timm(name):
    with pytest.raises(ValueError, match=r"timm cannot make 'unknown' \(Unknown|expected the name of a timm model"):
        open_pretrained(f"timm:{name}")


def test_a_missing_timm_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm is needed for 'resnet18'; pip install timm"):
        open_pretrained("timm:resnet18")


def test_missing_transformers_are_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ImportError, match=r"transformers is needed for this; pip install tnlayers\[hf\]"):
        open_pretrained(tmp_path)


# --- configurations and paths ---


def test_quantized_configurations_are_named():
    for settings, name in (({"quant_method": "awq"}, "awq"), ({"bits": 4}, "unknown method")):
        with pytest.raises(ValueError, match=rf"x is quantized \({name}\); dequantize it first"):
            check_config("open_pretrained", "x", {"model_type": "bert", "quantization_config": settings})


@pytest.mark.parametrize("path", ["/etc", "..", "a/../../b", "C:\\x", "..\\x"])
def test_paths_out_of_a_folder_are_refused(path):
    with pytest.raises(ValueError, match=r"folders inside its own"):
        inside(path)


# --- folders are written whole ---


def test_what_is_overwritten_and_what_is_not(tmp_path):
    model = small()
    out = save_folder(model, tmp_path / "net", plan={"a": 1})
    with pytest.raises(ValueError, match=r"must be empty or new; give overwrite=True"):
        save_folder(model, out, plan={})
    assert load_folder(save_folder(model, out, plan={"a": 2}, overwrite=True), model=small()).plan == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    (tmp_path / "mine").mkdir()
    assert save_folder(model, tmp_path / "mine", plan={}).is_dir(), "an empty folder is as good as none"
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    save_folder(model, tmp_path / "link", plan={})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "tnlayers.json").is_file()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_text("x")
    with pytest.raises(ValueError, match=r"holds no model and is not overwritten"):
        save_folder(model, tmp_path / "photos", plan={}, overwrite=True)
    with pytest.raises(ValueError, match=r"which is a file"):
        save_folder(model, tmp_path / "photos" / "me.png", plan={})
    with pytest.raises(FileNotFoundError, match=r"the parent of the folder must exist"):
        save_folder(model, tmp_path / "no" / "net", plan={})


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
        as_two_linear("model")
    with pytest.raises(TypeError, match=r"expected a Pretrained or a torch.nn.Module, got str"):
        save_folder("net", tmp_path / "other", plan={})


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail():
        with written_folder(tmp_path / "new") as temporary:
            (temporary / "half").write_text("")
            assert not (tmp_path / "new").exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_the_old_folder(tmp_path):
    out = save_folder(small(), tmp_path / "net", plan={"a": 1})
    code = (
        "import os, torch; from tnlayers.pretrained import folder; folder.checkpoint.save = lambda *_: os._exit(9)\n"
        f"folder.save_folder(torch.nn.Linear(2, 2), {str(out)!r}, plan={{'a': 2}}, overwrite=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == 9
    assert load_folder(out, model=small()).plan == {"a": 1}


def test_pretrained_is_a_plain_record():
    held = Pretrained(small(), "module")
    assert (held.tokenizer, held.image_processor, held.pooling, held.plan) == (None, None, None, {})
