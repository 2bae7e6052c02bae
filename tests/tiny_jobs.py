"""Folders and files for the commands on pretrained models: tiny models with a tokenizer, texts, pictures."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from tiny_transformers import dense_folder, transformers
from typer.testing import CliRunner

from tnlayers.cli import app
from tnlayers.compression.job import CompressConfig

WORDS = [f"w{k}" for k in range(56)]
FEW = ["--n", "48", "--measure", "24", "--batch-size", "8", "-q"]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "TERM": "dumb"})


def done(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stderr == ""
    return result


def one_line(result, code, *parts):
    assert result.exit_code == code, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tnlayers: ")
    assert result.stdout == ""
    for part in parts:
        assert part in lines[0], lines[0]


def words_tokenizer(causal=False, words=WORDS):
    """A word a token, 60 in all as the tiny models have; that of a decoder has no padding, as GPT-2's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = {word: k for k, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words])}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "eos_token": "[SEP]", "bos_token": "[CLS]"}
    if not causal:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        special["pad_token"] = "[PAD]"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], **special
    )


def text_model(where, name="bert", pooling=None):
    dense_folder(where, name)
    words_tokenizer(causal="gpt2" in name).save_pretrained(where)
    if pooling is not None:
        rows = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        rows = [{"idx": k, "path": p, "type": f"sentence_transformers.models.{t}"} for k, (p, t) in enumerate(rows)]
        (where / "modules.json").write_text(json.dumps(rows))
        (where / "1_Pooling").mkdir()
        (where / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return where


def image_model(where):
    pytest.importorskip("PIL")
    dense_folder(where, "vit")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(where)
    return where


def pictures(where, count=48):
    from PIL import Image

    draw = random.Random(1)
    (where / "inner").mkdir(parents=True)
    for k in range(count):
        made = Image.frombytes("RGB", (20, 18), draw.randbytes(20 * 18 * 3))
        made.save(where / ("inner" if k % 2 else ".") / f"{k:03}.png")
    return where


def sentences(count=96, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 11))) for _ in range(count)]


def texts_file(where, count=96, seed=0):
    rows = [json.dumps({"text": text, "label": len(text) % 2}) for text in sentences(count, seed)]
    where.write_text("\n".join(rows) + "\n")
    return where


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and data that no test changes."""
    where = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    text_model(where / "bert", "bert", "mean_tokens")
    text_model(where / "gpt2", "gpt2")
    texts_file(where / "texts.jsonl")
    return where


@pytest.fixture
def plain(monkeypatch):
    """No report: drawing it takes longer than all the rest."""
    monkeypatch.setattr("tnlayers.report.Report.html", lambda self, path: "")


def settings(place, out, **changes):
    given = {"keep": 0.6, "calib": place / "texts.jsonl", "count": 48, "measured": 24, "batch_size": 8, **changes}
    return CompressConfig(str(place / "bert"), out, **given)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
