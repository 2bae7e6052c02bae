"""Folders of transformers: opened, compressed, saved, loaded on the meta device, exported; and attacked."""

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
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

import tnlayers  # noqa: E402
from decompositions import svd, ttm_svd  # noqa: E402
from tnlayers import folder as folders  # noqa: E402
from tnlayers import two_layers  # noqa: E402
from tnlayers.exported import as_two_linear, export_dense, export_two_linear  # noqa: E402
from tnlayers.folder import load_folder, save_folder  # noqa: E402
from tnlayers.hub import PretrainedWarning  # noqa: E402
from tnlayers.pretrained import open_pretrained  # noqa: E402

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = {**SIZES, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
POSITIONS = {"max_position_embeddings": 16, "pad_token_id": 0}
IDS = torch.arange(18).reshape(2, 9) % 57 + 3


def ids_to_logits(model):
    return model(IDS).logits


def ids_to_states(model):
    return model(IDS).last_hidden_state


def pair_to_logits(model):
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


def image_to_logits(model):
    return model(torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16).to(model.dtype)).logits


def gpt2(**kwargs):
    return transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16, bos_token_id=1, eos_token_id=2, **kwargs
    )


def bart():
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    return transformers.BartConfig(d_model=32, vocab_size=60, max_position_embeddings=32, **heads, **sizes)


CASES = {
    "bert": ("BertModel", lambda: transformers.BertConfig(**WORDS, **POSITIONS), ids_to_states),
    "bert-mlm": ("BertForMaskedLM", lambda: transformers.BertConfig(**WORDS, **POSITIONS), ids_to_logits),
    "gpt2": ("GPT2LMHeadModel", gpt2, ids_to_logits),
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**WORDS, num_key_value_heads=1), ids_to_logits),
    "qwen2-tied": (
        "Qwen2ForCausalLM",
        lambda: transformers.Qwen2Config(**WORDS, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0),
        ids_to_logits,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(
            d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=60, decoder_start_token_id=0
        ),
        pair_to_logits,
    ),
    "bart": ("BartModel", bart, ids_to_states),
    "vit": (
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**SIZES, image_size=16, patch_size=4),
        image_to_logits,
    ),
}


def dense_folder(where, name="bert", dtype=torch.float32):
    """A folder as save_pretrained writes it, of random numbers that are large enough to matter."""
    class_name, config, _ = CASES[name]
    model = getattr(transformers, class_name)(config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(where)
    return where


def compressed(tmp_path, name="bert", recipe=None, dtype=torch.float32):
    held = open_pretrained(dense_folder(tmp_path / "dense-source", name, dtype))
    tnlayers.tensorize(held.model, recipe or partial(svd, rank=4), spectra=False)
    return held


@pytest.fixture
def saved(tmp_path):
    return save_folder(compressed(tmp_path), tmp_path / "saved", plan={"keep": 0.5})


def run(model, name):
    with torch.no_grad():
        return CASES[name][2](model)


def relative(value, reference):
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


# --- there and back ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_saved_models_come_back_bit_by_bit(tmp_path, name, dtype):
    held = compressed(tmp_path, name, dtype=dtype)
    assert type(held.model).__name__ == CASES[name][0]
    assert not held.model.training
    expected = run(held.model, name)
    file = save_folder(held, tmp_path / "out", plan={"keep": 0.5, "ranks": {"a": 4}})
    again = load_folder(file)
    assert torch.equal(run(again.model, name), expected)
    assert expected.dtype == dtype
    assert again.plan == {"keep": 0.5, "ranks": {"a": 4}}
    assert type(again.model) is type(held.model)
    assert not again.model.training
    assert not [n for n, t in (*again.model.named_parameters(), *again.model.named_buffers()) if t.is_meta]
    count = sum(p.numel() for p in held.model.parameters())
    assert sum(p.numel() for p in again.model.parameters()) == count, "ties stay ties"


def test_a_tied_head_shares_the_cores_of_the_embedding(tmp_path):
    held = compressed(tmp_path, "gpt2")
    again = load_folder(save_folder(held, tmp_path / "out", plan={})).model
    assert again.lm_head.cores[0] is again.transformer.wte.cores[0]
    assert isinstance(again.transformer.h[0].attn.c_attn, tnlayers.Linear)


def test_buffers_keep_the_dtype_they_were_cast_to(tmp_path):
    held = compressed(tmp_path, "llama")
    held.model.bfloat16()  # rotary frequencies too, which from_pretrained(dtype=) leaves in float32
    expected = run(held.model, "llama")
    again = load_folder(save_folder(held, tmp_path / "out", plan={}))
    buffers = dict(again.model.named_buffers())
    assert buffers["model.rotary_emb.inv_freq"].dtype == torch.bfloat16
    assert torch.equal(run(again.model, "llama"), expected)


def test_attention_is_computed_as_before(tmp_path):
    held = compressed(tmp_path)
    held.model.set_attn_implementation("eager")
    again = load_folder(save_folder(held, tmp_path / "out", plan={}))
    assert again.model.config._attn_implementation == "eager"


def test_buffers_that_a_class_does_not_make_are_stored(tmp_path, monkeypatch):
    held = compressed(tmp_path)
    monkeypatch.setattr(transformers.BertModel, "_init_weights", lambda self, module: None)
    expected = run(held.model, "bert")
    out = save_folder(held, tmp_path / "out", plan={})
    assert (out / "buffers.safetensors").is_file()
    assert torch.equal(run(load_folder(out).model, "bert"), expected)
    (out / "buffers.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"buffers.safetensors cannot be read"):
        load_folder(out)
    (out / "buffers.safetensors").unlink()
    with pytest.raises(ValueError, match=r"does not make its buffers .*position_ids.* again"):
        load_folder(out)


class Largest(TorchDispatchMode):
    """The largest floating tensor that is made on a real device."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


def test_loading_allocates_no_dense_weight(tmp_path):
    config = transformers.BertConfig(**{**WORDS, "vocab_size": 500}, **POSITIONS)
    transformers.BertModel(config).save_pretrained(tmp_path / "a")
    with Largest() as watch:
        held = open_pretrained(tmp_path / "a")
    assert watch.numel >= 500 * 32
    tnlayers.tensorize(held.model, partial(svd, rank=2), spectra=False)
    out = save_folder(held, tmp_path / "b", plan={})
    largest = max(p.numel() for p in held.model.parameters())
    with Largest() as watch:
        load_folder(out)
    assert 0 < watch.numel <= largest < 32 * 32 + 1


def test_open_pretrained_reads_a_compressed_folder(saved):
    assert open_pretrained(saved).plan == {"keep": 0.5}
    with pytest.raises(ValueError, match=r"drop task, dtype"):
        open_pretrained(saved, dtype="bfloat16")


def test_a_bare_model_is_enough(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**WORDS, **POSITIONS)).eval()
    tnlayers.tensorize(model, partial(svd, rank=4), spectra=False)
    again = load_folder(save_folder(model, tmp_path / "out", plan={}))
    assert torch.equal(run(again.model, "bert"), run(model, "bert"))
    assert again.kind == "transformers"


# --- what lies around the weights ---


def small_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *"abcdefgh"]
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def sentence_folder(where, pooling, path="1_Pooling"):
    rows = [("", "Transformer"), (path, "Pooling"), ("2_Normalize", "Normalize")]
    rows = [{"idx": k, "path": p, "type": f"sentence_transformers.models.{t}"} for k, (p, t) in enumerate(rows)]
    (where / "modules.json").write_text(json.dumps(rows))
    (where / "1_Pooling").mkdir()
    (where / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_tokenizer_pooling_and_generation_config_travel(tmp_path):
    source = dense_folder(tmp_path / "a")
    small_tokenizer().save_pretrained(source)
    sentence_folder(source, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    held = open_pretrained(source)
    assert held.pooling == "mean"
    out = save_folder(held, tmp_path / "out", plan={})
    again = load_folder(out)
    dense = open_pretrained(export_dense(out, tmp_path / "dense"))
    for found in (again, dense):
        assert found.pooling == "mean"
        assert found.tokenizer("a c x").input_ids == held.tokenizer("a c x").input_ids == [2, 4, 1]
    causal = compressed(tmp_path, "llama")
    causal.model.generation_config.max_new_tokens = 7
    again = load_folder(save_folder(causal, tmp_path / "causal", plan={}))
    assert again.model.generation_config.max_new_tokens == 7


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
    ],
)
def test_pooling_is_read_or_said_to_be_another(tmp_path, settings, pooling):
    source = dense_folder(tmp_path / "a")
    sentence_folder(source, settings)
    if pooling is None:
        with pytest.warns(PretrainedWarning, match=r"neither 'mean' nor 'cls'"):
            assert open_pretrained(source).pooling is None
    else:
        assert open_pretrained(source).pooling == pooling


def test_modules_stay_in_their_folder(tmp_path):
    source = dense_folder(tmp_path / "a")
    sentence_folder(source, {"pooling_mode_cls_token": True}, path="../elsewhere")
    with pytest.raises(ValueError, match=r"folders inside its own, got '../elsewhere'"):
        open_pretrained(source)


def test_older_sentence_folders_keep_the_model_one_level_down(tmp_path):
    outer = tmp_path / "a"
    outer.mkdir()
    dense_folder(outer / "0_Transformer")
    sentence_folder(outer, {"pooling_mode_cls_token": True})
    rows = json.loads((outer / "modules.json").read_text())
    rows[0]["path"] = "0_Transformer"
    (outer / "modules.json").write_text(json.dumps(rows))
    assert open_pretrained(outer).pooling == "cls"


def test_dtype_device_and_task(tmp_path):
    source = dense_folder(tmp_path / "a", dtype=torch.bfloat16)
    assert open_pretrained(source).model.dtype == torch.bfloat16
    assert open_pretrained(source, dtype="float32").model.dtype == torch.float32
    assert open_pretrained(source, task="embedding").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype must be a floating point dtype"):
        open_pretrained(source, dtype="int8")
    with pytest.raises(ValueError, match=r"task must be one of"):
        open_pretrained(source, task="poetry")
    with pytest.raises(ValueError, match=r"is a bert model, which has no AutoModelForSeq2SeqLM"):
        open_pretrained(source, task="seq2seq-lm")


def test_tensors_that_are_missing_or_left_out_are_named(tmp_path):
    source = dense_folder(tmp_path / "a")
    with (
        pytest.warns(
            PretrainedWarning, match=r"no values for 2 tensors of BertForSequenceClassification.*classifier.bias"
        ),
    ):
        held = open_pretrained(source, task="sequence-classification")
    assert held.new_tensors == ("classifier.bias", "classifier.weight")
    source = dense_folder(tmp_path / "b", "bert-mlm")
    with pytest.warns(PretrainedWarning) as told:
        held = open_pretrained(source, task="embedding")
    assert [len(held.new_tensors), len(held.unused_tensors) > 0, len(told)] == [2, True, 2]
    from safetensors.torch import save_file

    save_file({"something.else": torch.ones(3)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must fit BertForMaskedLM, but .* tensors are missing"):
        open_pretrained(source)


# --- sources that are refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Net"}}, "needs code of its own"),
        ({"text_config": {"auto_map": {"AutoModel": "modeling.Net"}}}, "needs code of its own"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantized \(gptq\); dequantize it first"),
        ({"model_type": "unheard-of"}, "model_type that transformers knows, got 'unheard-of'"),
        ({"model_type": None}, "model_type that transformers knows, got None"),
        ({"architectures": ["system"]}, "expected a model class of transformers .*, got 'system'"),
        ({"architectures": ["BertConfig"]}, "expected a model class"),
        ({"architectures": ["__builtins__"]}, "expected a model class"),
        ({"attn_implementation": "somebody/kernel"}, "a kernel from the hub"),
        ({"transformers_weights": "../../other.safetensors"}, "a weight file of its own folder"),
        ({"hidden_size": 48}, "cannot be read as BertModel"),
    ],
)
def test_configurations_that_are_refused(tmp_path, change, message):
    source = dense_folder(tmp_path / "a")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message) as told:
        open_pretrained(source)
    assert "\n" not in str(told.value)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder, and it cannot be fetched"):
        open_pretrained("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected a config.json in"):
        open_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"merge it into its base model first"):
        open_pretrained(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"which is a file"):
        open_pretrained(tmp_path / "file")
    (tmp_path / "empty" / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"cannot be read as JSON .*; the file is damaged"):
        open_pretrained(tmp_path / "empty")


def test_damaged_weights_and_tokenizers_of_a_source(tmp_path):
    source = dense_folder(tmp_path / "a")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be read") as told:
        open_pretrained(source)
    assert "\n" not in str(told.value)
    (source / "tokenizer.json").unlink()
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read as BertModel"):
        open_pretrained(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read as BertModel"):
        open_pretrained(source)


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
