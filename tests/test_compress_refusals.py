"""What `tnlayers compress` refuses: one line on stderr, exit code 2, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_jobs import call, image_model, one_line, pictures, text_model, texts_file, words_tokenizer  # noqa: E402

from tnlayers.compression import job  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::decompositions.weighted.CalibrationWarning")

FEW = ["--n", "16", "--measure", "8", "--batch-size", "8", "-q"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    text_model(where / "bert")
    image_model(where / "vit")
    texts_file(where / "texts.jsonl", 40)
    pictures(where / "pictures", 6)
    (where / "texts.tsv").write_text("sentence\tlabel\nw1 w2 w3\t0\nw2 w4\t1\n")
    rows = (where / "texts.jsonl").read_text().splitlines()
    (where / "bad.jsonl").write_text("\n".join([*rows[:6], '{"text": "w1', *rows[6:]]))
    return where


def refused(place, tmp_path, *arguments, source="bert", calib="texts.jsonl", keep="0.6"):
    goal = [] if keep is None else ["--keep", keep]
    data = [] if calib is None else ["--calib", place / calib]
    return call("compress", place / source, *goal, *data, "--out", tmp_path / "out", *FEW, *arguments)


@pytest.mark.parametrize(
    ("changes", "arguments", "parts"),
    [
        ({"source": "nothing/at/all"}, [], ["nothing/at/all", "check the path"]),
        ({"source": "texts.jsonl"}, [], ["texts.jsonl", "which is a file"]),
        ({"source": "pictures"}, [], ["expected a config.json"]),
        ({"keep": None}, [], ["exactly one of --keep, --max-error, --max-params, --speed, got none"]),
        ({}, ["--speed", "2"], ["exactly one of", "got keep, speed"]),
        ({"calib": "nothing.jsonl"}, [], ["expected a file of texts or a folder of pictures", "nothing.jsonl"]),
        ({"calib": "texts.tsv"}, ["--column", "review"], ["['sentence', 'label']", "got 'review'"]),
        ({}, ["--column", "review"], ["line 1", "expected the field review", "['label', 'text']"]),
        ({"calib": "bad.jsonl"}, [], ["bad.jsonl, line 7: expected a JSON object"]),
        ({}, ["--targets", "encoder.layer.9.*"], ["encoder.layer.9.*"]),
        ({}, ["--exclude", "decoder.*"], ["decoder.*"]),
        ({}, ["--test", "nowhere.jsonl"], ["nowhere.jsonl"]),
        ({}, ["--device", "abacus"], ["--device must be one of this machine, got 'abacus'"]),
        ({}, ["--dtype", "int8"], ["floating point dtype", "int8"]),
        ({}, ["--task", "poetry"], ["task must be one of", "poetry"]),
        ({"source": "vit"}, [], ["texts need a tokenizer, got none beside"]),
        ({"calib": "pictures"}, [], ["pictures need an image processor, got none beside"]),
        ({"source": "vit", "calib": "pictures"}, ["--metrics", "perplexity"], ["perplexity is of texts"]),
        ({"calib": "bert"}, [], ["expected pictures", "got none"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(place, tmp_path, changes, arguments, parts):
    one_line(refused(place, tmp_path, *arguments, **changes), 2, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "arguments", "parts"),
    [
        ({"keep": "0.001"}, [], ["expected at least", "keep more, or target fewer layers"]),
        ({"keep": None}, ["--max-params", "1000"], ["expected at least", "keep more"]),
        ({"keep": None}, ["--speed", "1000"], ["expected at least"]),
    ],
)
def test_a_budget_out_of_reach_is_one_line(place, tmp_path, changes, arguments, parts):
    one_line(refused(place, tmp_path, *arguments, **changes), 2, *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["out.calibration.safetensors"]  # which a larger budget will use


def test_the_output_is_checked_before_any_work(place, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "open_model", lambda *_, **__: pytest.fail("the model was opened"))
    taken = tmp_path / "out"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine")
    one_line(refused(place, tmp_path), 2, str(taken), "exists", "--overwrite")
    one_line(refused(place, tmp_path, "--overwrite"), 2, "holds no model and is not overwritten")
    one_line(refused(place, tmp_path, "--out", tmp_path / "no" / "out"), 2, "the parent of the folder must exist")
    one_line(refused(place, tmp_path, "--out", place / "bert", "--overwrite"), 2, "must not be the model itself")
    assert (taken / "letter.txt").read_text() == "mine"
    one_line(call("compress", place / "bert", "--keep", "0.6"), 2, "expected --out FOLDER, or --dry-run")


def test_a_tokenizer_of_another_model(place, tmp_path):
    source = tmp_path / "bert"
    shutil.copytree(place / "bert", source)
    words_tokenizer(words=[f"x{k}" for k in range(100)] + [f"w{k}" for k in range(56)]).save_pretrained(source)
    result = refused(place, tmp_path, source=source)
    one_line(result, 2, "expected token ids from 0 to 59 (vocabulary of BertModel)", "the model's own tokenizer?")
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


def test_a_quantized_model(place, tmp_path):
    source = tmp_path / "bert"
    shutil.copytree(place / "bert", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    one_line(refused(place, tmp_path, source=source), 2, "is quantized (gptq)", "dequantize it first")


def test_a_picture_that_is_none(place, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(place / "pictures", folder)
    (folder / "inner" / "zebra.png").write_bytes(b"no picture")
    result = refused(place, tmp_path, source="vit", calib=folder)
    one_line(result, 2, str(folder / "inner" / "zebra.png"), "cannot be read as a picture")
    cut = sorted(folder.glob("*.png"))[0]
    (folder / "inner" / "zebra.png").unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    one_line(refused(place, tmp_path, source="vit", calib=folder), 2, cut.name, "cannot be read as a picture")


def test_a_calibration_that_is_none_is_not_thrown_away(place, tmp_path):
    file = tmp_path / "out.calibration.safetensors"
    file.write_bytes(b"something else")
    one_line(refused(place, tmp_path), 2, str(file), "cannot be read")
    assert file.read_bytes() == b"something else"


def test_a_full_disk_is_no_bad_input(place, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "save_folder", full)
    one_line(refused(place, tmp_path), 1, "No space left on device", "what was finished before is kept")
    assert [p.name for p in tmp_path.iterdir()] == ["out.calibration.safetensors"]


@pytest.mark.filterwarnings("always")
def test_warnings_are_one_line_each(tmp_path, place):
    source = Path(shutil.copytree(place / "bert", tmp_path / "bert"))
    model = transformers.BertModel.from_pretrained(source, add_pooling_layer=False)
    model.save_pretrained(source)
    result = call("compress", source, "--keep", "0.6", "--dry-run")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("tnlayers: open_pretrained: ")
    assert "pooler.dense.weight" in line
