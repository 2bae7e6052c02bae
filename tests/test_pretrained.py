"""Models of transformers: opened, compressed, saved and loaded on the meta device; sources that are refused."""

import json
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from tiny_transformers import CASES, POSITIONS, WORDS, compressed, dense_folder, run  # noqa: E402

import tnlayers  # noqa: E402
from decompositions import svd  # noqa: E402
from tnlayers.pretrained.exported import export_dense  # noqa: E402
from tnlayers.pretrained.folder import load_folder, save_folder  # noqa: E402
from tnlayers.pretrained.hub import PretrainedWarning  # noqa: E402
from tnlayers.pretrained.model import open_pretrained  # noqa: E402


@pytest.fixture
def saved(tmp_path):
    return save_folder(compressed(tmp_path), tmp_path / "saved", plan={"keep": 0.5})


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


def test_image_processors_travel(tmp_path):
    pytest.importorskip("PIL")
    held = compressed(tmp_path, "vit")
    assert held.image_processor is None
    held.image_processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    again = load_folder(save_folder(held, tmp_path / "out", plan={}))
    picture = (torch.arange(3 * 20 * 20).reshape(20, 20, 3) % 255).byte().numpy()
    seen = [found.image_processor(picture, return_tensors="pt").pixel_values for found in (held, again)]
    assert seen[0].shape == (1, 3, 16, 16)
    assert torch.equal(*seen)


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
