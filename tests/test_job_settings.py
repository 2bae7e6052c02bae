"""Settings of the commands on pretrained models, checked before anything is opened; needs no transformers."""

import random
from pathlib import Path

import pytest
import torch
from test_cli import call, one_line
from torch import nn

from tnlayers.compression.inputs import choose_inputs, fingerprint, open_model, padding_tokenizer
from tnlayers.compression.job import CompressConfig
from tnlayers.compression.measuring import Measure
from tnlayers.evaluation.job import EvalConfig
from tnlayers.pretrained.model import Pretrained


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["exactly one of --keep, --max-error, --max-params, --speed, got none"]),
        (["--keep", "0.5", "--max-error", "0.1"], ["exactly one of", "got keep, max_error"]),
        (["--keep", "0"], ["--keep must be in (0, 1], got 0.0"]),
        (["--keep", "1.5"], ["--keep must be in (0, 1], got 1.5"]),
        (["--keep", "nan"], ["--keep must be in (0, 1], got nan"]),
        (["--max-error", "-1"], ["--max-error must be above 0"]),
        (["--max-params", "0"], ["--max-params must be above 0"]),
        (["--speed", "inf", "--calib", "x.txt"], ["--speed must be above 0"]),
        (["--keep", "0.5"], ["expected --out FOLDER, or --dry-run"]),
        (["--keep", "0.5", "--dry-run", "--weighting", "some"], ["--weighting", "full, diagonal, none", "'some'"]),
        (["--keep", "0.5", "--dry-run", "--recover", "magic"], ["--recover", "none, distill, blocks", "'magic'"]),
        (["--keep", "0.5", "--dry-run", "--ranks", "best"], ["--ranks", "'best'"]),
        (["--keep", "0.5", "--dry-run", "--method", "best"], ["--method", "weighted, ", "'best'"]),
        (["--keep", "0.5", "--dry-run", "--formats", "tt"], ["'tt'"]),
        (["--keep", "0.5", "--dry-run", "--metrics", "size,accuracy"], ["--metrics", "'accuracy'"]),
        (["--keep", "0.5", "--dry-run", "--n", "0"], ["--n must be at least 1, got 0"]),
        (["--keep", "0.5", "--dry-run", "--len", "0"], ["--len must be at least 1, got 0"]),
        (["--keep", "0.5", "--dry-run", "--batch-size", "0"], ["--batch-size must be at least 1"]),
        (["--keep", "0.5", "--dry-run", "--measure", "-3"], ["--measure must be at least 1"]),
        (["--keep", "0.5", "--dry-run", "--multiple", "0"], ["--multiple must be at least 1"]),
        (["--keep", "0.5", "--dry-run", "--mu", "-1"], ["--mu must be a number >= 0 or 'adaptive'"]),
        (["--keep", "0.5", "--dry-run", "--mu", "nan"], ["--mu must be a number >= 0 or 'adaptive'"]),
        (["--keep", "0.5", "--dry-run", "--mu", "some"], ["--mu must be a number or 'adaptive', got 'some'"]),
        (["--keep", "0.5", "--dry-run", "--seconds", "0"], ["--seconds and --lr must be above 0"]),
        (["--keep", "0.5", "--dry-run", "--lr", "nan"], ["--seconds and --lr must be above 0"]),
        (["--keep", "0.5", "--dry-run", "--recover", "distill"], ["--recover needs data", "give --calib"]),
        (["--keep", "0.5", "--dry-run", "--sequential"], ["--sequential needs data", "give --calib"]),
        (["--speed", "2", "--dry-run"], ["--speed needs data", "give --calib"]),
        (["--keep", "0.5", "--dry-run", "--ranks", "loss"], ["--ranks loss needs data"]),
        (["--keep", "0.5", "--dry-run", "--method", "asvd"], ["--method asvd needs data"]),
        (
            ["--keep", "0.5", "--dry-run", "--calib", "x.txt", "--ranks", "loss", "--no-gradients"],
            ["--ranks loss needs gradients", "drop --no-gradients"],
        ),
    ],
)
def test_compress_is_told_by_one_line(arguments, parts):
    one_line(call("compress", "no/such/model", *arguments), 2, *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["nothing to measure on", "--texts, --document or --labelled"]),
        (["--metrics", "size,speed"], ["nothing to measure on"]),
        (["--texts", "a.txt", "--document", "b.txt"], ["--texts or --document, not both"]),
        (["--texts", "a.txt", "--bos", "maybe"], ["--bos must be one of auto, yes, no, start, got 'maybe'"]),
        (["--document", "a.txt", "--reference", "b"], ["--reference compares embeddings", "give --texts"]),
        (["--texts", "no/such/file.txt"], ["no/such/file.txt", "does not exist"]),
        (["--texts", "no/such/file.pdf"], ["no/such/file.pdf"]),
        (["--metrics", "size"], ["no/such/model"]),
        (["--metrics", "size", "--device", "abacus"], ["--device must be one of this machine"]),
    ],
)
def test_eval_is_told_by_one_line(arguments, parts):
    one_line(call("eval", "no/such/model", *arguments), 2, *parts)


def test_export_is_told_by_one_line(tmp_path):
    one_line(call("export", "a", "b"), 2, "exactly one of --dense and --two-linear")
    one_line(call("export", "a", "b", "--dense", "--two-linear"), 2, "exactly one of")
    one_line(call("export", tmp_path / "no" / "model", tmp_path / "out", "--dense"), 2, "check the path")
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_right_pass():
    assert CompressConfig("a", keep=1.0, dry_run=True).calib is None
    assert CompressConfig("a", speed=2.0, dry_run=True, calib=Path("x")).speed == 2.0
    assert EvalConfig("a", metrics=("size",)).texts is None


def test_a_device_is_refused_before_the_model_is_opened():
    with pytest.raises(ValueError, match=r"eval: --device must be one of this machine, got 'abacus'"):
        open_model("eval", "no/such/model", device="abacus")


def test_samples_for_calibration_and_for_measuring_are_apart(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"line {k}" for k in range(50)))
    first, _ = choose_inputs(file, count=20, seed=3)
    rest, told = choose_inputs(file, count=100, seed=3, skip=20)
    assert sorted([*first, *rest]) == sorted(f"line {k}" for k in range(50))
    assert "30 of 50" in told
    assert "after 20" in told
    again, told = choose_inputs(file, count=10, seed=3, skip=50)
    assert list(again) == list(first)[:10]
    assert "the same as for calibration" in told


def test_pictures_are_found_at_any_depth_and_in_one_order(tmp_path):
    for name in ("b.png", "x/a.JPG", "x/y/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    taken, told = choose_inputs(tmp_path, count=9, seed=0)
    assert sorted(p.name for p in taken) == ["a.JPG", "b.png", "c.webp"]
    assert "3 of 3" in told


def test_a_fingerprint_sees_every_number_and_no_address():
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    batches = [{"x": torch.arange(6).reshape(2, 3)}]
    seen = fingerprint(model, batches, "words", 1, ("a",))
    assert seen == fingerprint(other, [{"x": batches[0]["x"].clone()}], "words", 1, ("a",))
    with torch.no_grad():
        other[0].weight[2, 1] += 1e-6
    others = [
        fingerprint(other, batches, "words", 1, ("a",)),
        fingerprint(model, batches, "words", 1, ("b",)),
        fingerprint(model, batches, "words", 2, ("a",)),
        fingerprint(model, batches, "words", 1, ("a", "a")),
        fingerprint(model, [{"x": batches[0]["x"].reshape(3, 2)}], "words", 1, ("a",)),
        fingerprint(model, [{"x": batches[0]["x"].float()}], "words", 1, ("a",)),
        fingerprint(model, [{"y": batches[0]["x"]}], "words", 1, ("a",)),
        fingerprint(model, batches * 2, "words", 1, ("a",)),
        fingerprint(model.bfloat16(), batches, "words", 1, ("a",)),
    ]
    assert len({seen, *others}) == len(others) + 1
    assert fingerprint(("a", "b"), "c") != fingerprint(("a",), ("b", "c"))
    assert fingerprint(torch.tensor(1.0), torch.zeros(0)) == fingerprint(torch.tensor(1.0), torch.zeros(0))


def test_padding_is_the_end_of_a_text_where_there_is_none():
    class Tokenizer:
        pad_token = pad_token_id = None
        eos_token = "</s>"

    given = Tokenizer()
    made = padding_tokenizer(given)
    assert made.pad_token == "</s>"
    assert given.pad_token is None  # which is saved beside the model
    given.pad_token_id = 3
    assert padding_tokenizer(given) is given
    assert padding_tokenizer(None) is None


def test_before_is_compared_with_itself_and_after_with_before(tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image

    draw = random.Random(0)
    for k in range(5):
        Image.frombytes("RGB", (4, 4), draw.randbytes(48)).save(tmp_path / f"{k}.png")

    class Processor:
        def __call__(self, picture, return_tensors):
            import numpy

            return {"pixel_values": torch.tensor(numpy.asarray(picture) / 255.0, dtype=torch.float32)[None]}

    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    held = Pretrained(model, kind="module", image_processor=Processor())
    measure = Measure(held, None, tmp_path, count=9, skip=0, seed=0, length=8, batch_size=2)
    before = measure("before")
    assert before["cosine, worst"].value == pytest.approx(1)
    assert before["cosine, mean"].count == 5
    with torch.no_grad():
        model[1].weight.neg_()
        model[1].bias.neg_()
    assert measure("after")["cosine, mean"].value == pytest.approx(-1)
