"""Small random models of transformers, one a kind, and how they are run."""

import os
from functools import partial

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

import tnlayers  # noqa: E402
from decompositions import svd  # noqa: E402
from tnlayers.pretrained.model import open_pretrained  # noqa: E402

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


def run(model, name):
    with torch.no_grad():
        return CASES[name][2](model)


def relative(value, reference):
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())
