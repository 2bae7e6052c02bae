"""Folders of compressed models of transformers: attacked, written, exported."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tiny_transformers import CASES, IDS, compressed, dense_folder, relative, run  # noqa: E402

import tnlayers  # noqa: E402
from decompositions import svd, ttm_svd  # noqa: E402
from tnlayers.pretrained import folder as folders  # noqa: E402
from tnlayers.pretrained import two_layers  # noqa: E402
from tnlayers.pretrained.exported import as_two_linear, export_dense, export_two_linear  # noqa: E402
from tnlayers.pretrained.folder import load_folder, save_folder  # noqa: E402
from tnlayers.pretrained.model import open_pretrained  # noqa: E402


@pytest.fixture
def saved(tmp_path):
    return save_folder(compressed(tmp_path), tmp_path / "saved", plan={"keep": 0.5})


# --- folders that are attacked ---


def rewrite(path, **changes):
    about = json.loads(path.read_text())
    about.update(changes)
    path.write_text(json.dumps({key: value for key, value in about.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format version 2, expected 1"),
        ({"format_version": ...}, "has format version None"),
        ({"kind": "pickle"}, "must hold kind, class, versions and plan"),
        ({"plan": [1]}, "must hold kind, class, versions and plan"),
        ({"class": "os.system"}, "expected a model class of transformers"),
        ({"class": "PreTrainedTokenizer"}, "expected a model class of transformers"),
        ({"class": "GPT2Model"}, "GPT2Model takes a .*GPT2Config.*, got a BertConfig"),
        ({"class": "BertForMaskedLM"}, "must exist in the model, got BertForMaskedLM without it"),
        ({"buffers": ...}, "must hold 'buffers'"),
        ({"buffers": {"embeddings.position_ids": "nn"}}, "buffer embeddings.position_ids must be"),
        ({"plan": {"layers": {"encoder.layer.9": 4}}}, r"modules of the model, got \['encoder.layer.9'\]"),
    ],
)
def test_changed_plans_are_refused(saved, changes, message):
    rewrite(saved / "tnlayers.json", **changes)
    with pytest.raises(ValueError, match=message) as told:
        load_folder(saved)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["tnlayers.json", "config.json"])
@pytest.mark.parametrize("text", ["", '{"a": 1', "[1]", "\udcff", "[" * 100_000])
def test_damaged_json_is_refused_by_name(saved, name, text):
    (saved / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"{name} (cannot be read as JSON|must hold a JSON dict)"):
        load_folder(saved)


@pytest.mark.parametrize("name", ["tnlayers.json", "config.json", "model.safetensors"])
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"expected .*{name}"):
        load_folder(saved)


def test_a_configuration_with_code_is_refused_in_a_saved_folder(saved):
    rewrite(saved / "config.json", auto_map={"AutoModel": "modeling.Net"})
    (saved / "modeling.py").write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match=r"needs code of its own"):
        load_folder(saved)


def test_cut_and_flipped_weights_are_refused(saved):
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"not a readable safetensors file"):
        load_folder(saved)
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"does not match its checksum"):
        load_folder(saved)


def change_weights(file, change):
    """Rewrite a file with a valid checksum over a changed structure."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, framework="pt") as handle:
        plan = json.loads(handle.metadata()["tnlayers"])
    tensors = load_file(file)
    change(plan, tensors)
    text = json.dumps(plan)
    save_file(tensors, file, metadata={"tnlayers": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def test_a_missing_tensor_is_named(saved):
    change_weights(saved / "model.safetensors", lambda plan, tensors: tensors.pop("pooler.dense.bias"))
    with pytest.raises(ValueError, match=r"missing \['pooler.dense.bias'\]"):
        load_folder(saved)


@pytest.mark.parametrize("name", ["encoder.layer.7.output.dense", "../../x", "__class__"])
def test_a_layer_that_does_not_exist_is_named(saved, name):
    def change(plan, tensors):
        plan["layers"][name] = plan["layers"].pop("pooler.dense")

    change_weights(saved / "model.safetensors", change)
    with pytest.raises(ValueError, match=f"layer '{name}' of model.safetensors must exist in the model"):
        load_folder(saved)


def test_versions_are_told_when_tensors_do_not_fit(saved):
    rewrite(saved / "tnlayers.json", versions={"transformers": "4.0"})
    change_weights(saved / "model.safetensors", lambda plan, tensors: tensors.pop("pooler.dense.bias"))
    with pytest.raises(ValueError, match=r"written with transformers 4.0 \(here"):
        load_folder(saved)


# --- writing ---


def test_a_plan_must_be_json_and_name_layers(tmp_path):
    held = compressed(tmp_path)
    for plan, message in (
        ({"keep": float("nan")}, "plain JSON without NaN"),
        ({"weight": torch.ones(1)}, "plain JSON without NaN"),
        ({"layers": {"no.such": 3}}, r"modules of the model, got \['no.such'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            save_folder(held, tmp_path / "out", plan=plan)
    with pytest.raises(ValueError, match=r"factory must be"):
        save_folder(held, tmp_path / "out", plan={}, factory="a.b:c")
    assert not (tmp_path / "out").exists()


def test_a_model_its_class_would_not_take_back_is_refused(tmp_path):
    held = compressed(tmp_path)
    held.model.pooler.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"has no place for \['pooler.extra.bias', 'pooler.extra.weight'\]"):
        save_folder(held, tmp_path / "out", plan={})
    del held.model.pooler.extra
    as_two_linear(held.model)
    with pytest.raises(ValueError, match=r"has no place for"):
        save_folder(held, tmp_path / "out", plan={})
    assert not (tmp_path / "out").exists()


def test_the_source_folder_can_be_overwritten(tmp_path):
    held = compressed(tmp_path)
    expected = run(held.model, "bert")
    out = save_folder(held, tmp_path / "dense-source", plan={}, overwrite=True)
    assert torch.equal(run(load_folder(out).model, "bert"), expected)
    assert sorted(os.listdir(tmp_path)) == ["dense-source"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, saved):
    before = sorted(os.listdir(tmp_path))
    content = {path.name: path.read_bytes() for path in saved.iterdir()}
    held = load_folder(saved)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.checkpoint, "save", fail)
    for target, overwrite in ((saved, True), (tmp_path / "new", False)):
        with pytest.raises(KeyboardInterrupt):
            save_folder(held, target, plan={}, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == before
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == content


# --- exports ---


@pytest.mark.parametrize("name", CASES)
def test_dense_exports_are_ordinary_folders(tmp_path, name):
    held = compressed(tmp_path, name)
    expected = run(held.model, name)
    out = export_dense(held, tmp_path / "dense")
    model, info = type(held.model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not [m for m in model.modules() if isinstance(m, tnlayers.NetworkLayer)]
    assert relative(run(model, name), expected) < 1e-5
    assert torch.equal(run(held.model, name), expected), "the source is as it was"
    assert transformers.AutoModel.from_pretrained(out).config.model_type == held.config.model_type


def test_a_dense_export_of_a_folder_in_bfloat16(tmp_path):
    held = compressed(tmp_path, "gpt2", dtype=torch.bfloat16)
    saved = save_folder(held, tmp_path / "saved", plan={})
    again = open_pretrained(export_dense(saved, tmp_path / "dense"))
    assert again.model.dtype == torch.bfloat16
    assert again.model.lm_head.weight is again.model.transformer.wte.weight
    assert relative(run(again.model, "gpt2"), run(held.model, "gpt2")) < 0.05


def test_a_padding_row_unties_the_dense_head(tmp_path):
    held = compressed(tmp_path, "qwen2-tied")
    again = open_pretrained(export_dense(held, tmp_path / "dense")).model
    assert not again.config.tie_word_embeddings
    own, head = again.model.embed_tokens.weight, again.lm_head.weight
    assert torch.equal(own[1:], head[1:])
    assert not torch.equal(own[0], head[0])


@pytest.mark.parametrize("name", CASES)
def test_pairs_of_plain_layers(tmp_path, name):
    held = compressed(tmp_path, name)
    expected = run(held.model, name)
    out, dense = export_two_linear(held, tmp_path / "pairs")
    assert dense == {}
    again = two_layers.load(out)
    assert relative(run(again, name), expected) < 1e-5
    assert torch.equal(run(held.model, name), expected), "the source is as it was"
    with pytest.raises(ValueError, match=r"load\(folder\) of its load_two_linear.py"):
        open_pretrained(out)


def test_pairs_are_loaded_where_tnlayers_is_not(tmp_path):
    held = compressed(tmp_path, "llama")
    out, _ = export_two_linear(held, tmp_path / "pairs")
    torch.save(run(held.model, "llama"), tmp_path / "expected.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    code = (
        "import sys, torch; sys.modules['tnlayers'] = sys.modules['decompositions'] = None; import load_two_linear; "
        "model = load_two_linear.load('.'); y = model(torch.load('../ids.pt')).logits; "
        "e = torch.load('../expected.pt'); print(float((y - e).norm() / e.norm()))"
    )
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=out, env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) < 1e-5


def test_other_formats_become_dense_between_pairs(tmp_path):
    chain = partial(ttm_svd, rank=2, row_modes=(4, 8), col_modes=(4, 8))
    held = open_pretrained(dense_folder(tmp_path / "a", "gpt2"))
    tnlayers.tensorize(held.model, {"*.attn.c_proj": chain, "*.mlp.*": partial(svd, rank=4)}, spectra=False)
    expected = run(held.model, "gpt2")
    out, dense = export_two_linear(held, tmp_path / "pairs")
    assert sorted(dense) == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    assert "no product of two matrices" in dense["transformer.h.0.attn.c_proj"]
    assert relative(run(two_layers.load(out), "gpt2"), expected) < 1e-5
    assert json.loads((out / "two_linear.json").read_text())["dense"] == dense


def test_exports_do_not_overwrite(tmp_path, saved):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("text")
    for write in (export_dense, export_two_linear):
        with pytest.raises(ValueError, match=r"must be empty or new"):
            write(saved, saved)
        with pytest.raises(ValueError, match=r"holds no model and is not overwritten"):
            write(saved, other, overwrite=True)
    assert (other / "thesis.txt").is_file()
    shutil.rmtree(other)
    assert Path(export_dense(saved, saved, overwrite=True)) == saved
    assert open_pretrained(saved).kind == "transformers"
