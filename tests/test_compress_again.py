"""`tnlayers compress` again: what is stored and used again, what broke off and goes on, what is interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_jobs import (  # noqa: E402
    FEW,
    call,
    done,
    place,
    plain,
    same,
    sentences,
    settings,
    texts_file,
    weights,
    words_tokenizer,
)

import tnlayers  # noqa: E402
from tnlayers.compression import job  # noqa: E402
from tnlayers.compression.job import CompressConfig, run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::decompositions.weighted.CalibrationWarning")
__all__ = ["place", "plain"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def collected(monkeypatch):
    """Forward passes of BERT with gradients: calibration's alone."""
    passes = []
    original = transformers.BertModel.forward

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled():
            passes.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(transformers.BertModel, "forward", forward)
    return passes


# --- what is stored ---


@pytest.mark.usefixtures("plain")
def test_a_second_size_reads_the_stored_calibration(place, tmp_path, collected):
    out = tmp_path / "small"
    run(settings(place, out))
    assert len(collected) == 6  # 48 texts by 8
    run(settings(place, out, keep=0.5, overwrite=True))
    assert len(collected) == 6
    again = weights(out)
    fresh = tmp_path / "fresh"
    run(settings(place, fresh, keep=0.5))
    assert len(collected) == 12
    assert same(again, weights(fresh))


@pytest.mark.usefixtures("plain")
def test_a_calibration_of_anything_else_is_thrown_away(place, tmp_path, collected):
    out = tmp_path / "small"
    source = tmp_path / "model"
    shutil.copytree(place / "bert", source)
    texts = texts_file(tmp_path / "texts.jsonl")

    def passes(**changes):
        collected.clear()
        given = {"keep": 0.6, "calib": texts, "count": 48, "measured": 8, "batch_size": 8, "metrics": ("size",)}
        run(CompressConfig(str(source), out, overwrite=True, **{**given, **changes}))
        return len(collected)

    assert passes() == 6
    assert passes() == 0
    assert passes(targets=("encoder.*",)) == 6
    assert passes(targets=("encoder.*",), exclude=("*.query",)) == 6
    assert passes(exclude=("*.query",)) == 6
    assert passes(batch_size=16) == 3
    assert passes(length=6) == 6
    assert passes(length=6, weighting="diagonal") == 6
    assert passes(length=6, seed=1) == 6
    assert passes() == 6
    texts_file(texts, seed=9)
    assert passes() == 6
    model = transformers.BertModel.from_pretrained(source)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] += 1
    model.save_pretrained(source)
    assert passes() == 6
    words_tokenizer(words=[f"w{k}" for k in reversed(range(56))]).save_pretrained(source)
    assert passes() == 6
    assert passes() == 0


class Stop(Exception):
    pass


def stopping(at, text="calibration"):
    def progress(number, total, label):
        if label == text and number == at:
            raise Stop

    return progress


@pytest.mark.usefixtures("plain")
def test_a_calibration_that_broke_off_goes_on_to_the_same_result(place, tmp_path, collected):
    whole = run(settings(place, tmp_path / "whole", batch_size=2))
    assert len(collected) == 24
    collected.clear()
    with pytest.raises(Stop):
        run(settings(place, tmp_path / "small", batch_size=2), stopping(19))
    assert not (tmp_path / "small").exists()
    collected.clear()
    again = run(settings(place, tmp_path / "small", batch_size=2))
    assert len(collected) == 24 - 16
    assert again.report.to_dict() == whole.report.to_dict()
    assert same(weights(tmp_path / "small"), weights(tmp_path / "whole"))


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, "tests")
import tiny_transformers
from pathlib import Path
from tnlayers.compression.job import CompressConfig, run
torch.set_num_threads(1)
place, out = map(Path, sys.argv[1:])
def progress(number, total, label):
    if label == "calibration" and number == 19:
        os.kill(os.getpid(), signal.SIGKILL)
run(CompressConfig(str(place / "bert"), out, keep=0.6, calib=place / "texts.jsonl", count=48, measured=24,
                   batch_size=2), progress)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("plain")
def test_a_killed_calibration_goes_on_to_the_same_result(place, tmp_path, collected):
    command = [sys.executable, "-c", KILLED, str(place), str(tmp_path / "small")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["small.calibration.safetensors"]
    run(settings(place, tmp_path / "small", batch_size=2))
    assert len(collected) == 24 - 16
    run(settings(place, tmp_path / "whole", batch_size=2))
    assert same(weights(tmp_path / "small"), weights(tmp_path / "whole"))


# --- recovery ---


@pytest.mark.parametrize("kind", ["distill", "blocks"])
@pytest.mark.usefixtures("plain")
def test_recovery_improves_and_leaves_no_file(place, tmp_path, kind):
    out = tmp_path / "small"
    data = ["--calib", place / "texts.jsonl", "--out", out, *FEW]
    result = done("compress", place / "bert", "--keep", "0.3", *data, "--recover", kind, "--seconds", "1", "--json")
    found = json.loads(result.stdout)
    assert found["recovery"]["kind"] == {"distill": "distill", "blocks": "reconstruct"}[kind]
    assert found["recovery"]["after"] < found["recovery"]["before"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "small.calibration.safetensors"]
    before = run(settings(place, tmp_path / "plain", keep=0.3)).after
    after = {m["name"]: m["value"] for m in found["after"]["metrics"]}
    assert after["cosine, mean"] > before["cosine, mean"].value
    assert after["parameters"] == before["parameters"].value


@pytest.mark.parametrize("kind", ["distill", "blocks"])
@pytest.mark.usefixtures("plain")
def test_a_recovery_that_broke_off_goes_on(place, tmp_path, monkeypatch, kind):
    out = tmp_path / "small"
    given = {"keep": 0.3, "recover": kind, "seconds": 2.0}
    run(settings(place, out, keep=0.5))  # so that the file of another run's calibration is there

    def progress(number, total, label):
        if list(tmp_path.glob("small.recovery.*.pt")):
            raise Stop

    with pytest.raises(Stop):
        run(settings(place, out, overwrite=True, **given), progress)
    (file,) = tmp_path.glob("small.recovery.*.pt")
    earlier = torch.load(file, weights_only=True)["elapsed"]
    assert earlier > 0
    # other settings do not go on with it
    stale = tmp_path / "small.recovery.0123.pt"
    stale.write_bytes(b"of another run")

    def fail(self, title):
        if title == "after":
            raise Stop
        return original(self, title)

    original = job.Measure.__call__
    monkeypatch.setattr(job.Measure, "__call__", fail)
    with pytest.raises(Stop):
        run(settings(place, out, overwrite=True, **given))
    monkeypatch.undo()
    assert not stale.exists()
    ended = torch.load(file, weights_only=True)
    result = run(settings(place, out, overwrite=True, **given))  # ends at once, with the same
    assert result.recovery == ended["result"]
    assert result.recovery["seconds"] > earlier
    state = tnlayers.load(out).state_dict()
    assert all(torch.equal(state[key], value) for key, value in ended["state"].items())
    assert not list(tmp_path.glob("small.recovery.*"))


@pytest.mark.usefixtures("plain")
def test_other_settings_begin_another_recovery(place, tmp_path):
    out = tmp_path / "small"

    def progress(number, total, label):
        if list(tmp_path.glob("small.recovery.*.pt")):
            raise Stop

    files = []
    for mu in (0.0, 0.5):  # the ranks, and so all shapes, are the same
        with pytest.raises(Stop):
            run(settings(place, out, mu=mu, keep=0.3, recover="distill", seconds=2.0), progress)
        files += tmp_path.glob("small.recovery.*.pt")
        files[-1].rename(tmp_path / "aside")
    assert files[0] != files[1]


@pytest.mark.usefixtures("plain")
def test_the_original_is_held_for_recovery_alone(place, tmp_path, monkeypatch):
    copies = []
    original = job.copy.deepcopy

    def counted(x, *args):
        if isinstance(x, transformers.BertModel):
            copies.append(1)
        return original(x, *args)

    monkeypatch.setattr(job.copy, "deepcopy", counted)
    run(settings(place, tmp_path / "one"))
    assert copies == []
    run(settings(place, tmp_path / "two", recover="distill", seconds=0.2))
    assert copies == [1]


# --- interrupted ---


def test_nothing_half_is_left_where_saving_breaks_off(place, tmp_path, monkeypatch):
    out = tmp_path / "small"
    arguments = ["compress", place / "bert", "--keep", "0.6", "--calib", place / "texts.jsonl", "--out", out, *FEW]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for target in ("tnlayers.report.Report.html", "tnlayers.compression.job.save_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupted)
            result = call(*arguments)
        assert result.exit_code == 130
        assert result.stdout == ""
        assert "the same command continues" in result.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["small.calibration.safetensors"]
    done(*arguments)
    kept = (out / "compress.txt").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("tnlayers.report.Report.html", interrupted)
        assert call(*arguments, "--overwrite").exit_code == 130
    assert (out / "compress.txt").read_text() == kept


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_in_one_line_and_the_same_command_continues(place, tmp_path):
    texts = tmp_path / "many.txt"
    texts.write_text("\n".join(sentences(1500)))
    out = tmp_path / "small"
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from tnlayers.cli import main; main()"
    )
    arguments = ["compress", place / "bert", "--keep", "0.6", "--calib", texts, "--out", out, "--n", "1500",
                 "--batch-size", "1", "--metrics", "size"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 100
    file = tmp_path / "small.calibration.safetensors"
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out_text, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out_text == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("tnlayers: interrupted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many.txt", "small.calibration.safetensors"]
