"""`tnlayers compress`, end to end on tiny models of transformers: results, plans, what is stored and used again."""

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

from safetensors.torch import load_file  # noqa: E402
from tiny_jobs import (  # noqa: E402
    call,
    done,
    image_model,
    pictures,
    sentences,
    text_model,
    texts_file,
    words_tokenizer,
)

import tnlayers  # noqa: E402
from tnlayers.compression import job  # noqa: E402
from tnlayers.compression.job import CompressConfig, run  # noqa: E402
from tnlayers.convert import parameter_count  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::decompositions.weighted.CalibrationWarning")

ROOT = Path(__file__).resolve().parents[1]
FEW = ["--n", "48", "--measure", "24", "--batch-size", "8", "-q"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and data that no test changes."""
    where = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    text_model(where / "bert", "bert", "mean_tokens")
    text_model(where / "gpt2", "gpt2")
    image_model(where / "vit")
    texts_file(where / "texts.jsonl")
    pictures(where / "pictures")
    return where


@pytest.fixture
def plain(monkeypatch):
    """No report: drawing it takes longer than all the rest."""
    monkeypatch.setattr("tnlayers.report.Report.html", lambda self, path: "")


def settings(place, out, **changes):
    given = {"keep": 0.6, "calib": place / "texts.jsonl", "count": 48, "measured": 24, "batch_size": 8, **changes}
    return CompressConfig(str(place / "bert"), out, **given)


@pytest.fixture
def opened(monkeypatch):
    """Every model that the job opens: compressed in place when it has ended."""
    found = []

    def keep(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    original = job.open_model
    monkeypatch.setattr(job, "open_model", keep)
    return found


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


def inputs_of(name):
    if name == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16)}
    return {"input_ids": torch.arange(18).reshape(2, 9) % 57 + 3}


def answer(model, name):
    with torch.no_grad():
        return next(iter(model(**inputs_of(name)).values()))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- whole runs ---


@pytest.mark.parametrize(
    ("name", "data", "metric", "layer"),
    [
        ("bert", "texts.jsonl", "cosine, mean", "encoder.layer.0.intermediate.dense"),
        ("gpt2", "texts.jsonl", "perplexity", "transformer.h.0.mlp.c_fc"),
        ("vit", "pictures", "cosine, mean", "vit.layers.0.mlp.fc2"),
    ],
)
def test_a_model_is_compressed_measured_and_loaded_again(place, tmp_path, opened, name, data, metric, layer):
    out = tmp_path / "small"
    dense = parameter_count(tnlayers.open_pretrained(place / name).model)
    result = done("compress", place / name, "--keep", "0.6", "--calib", place / data, "--out", out, *FEW)
    assert metric in result.stdout
    assert f"{out} written, with report.html" in result.stdout
    assert {p.name for p in out.iterdir()} >= {"report.html", "compress.txt", "tnlayers.json", "model.safetensors"}
    assert layer in (out / "report.html").read_text()
    assert metric in (out / "compress.txt").read_text()
    model = tnlayers.load(out)
    assert isinstance(model.get_submodule(layer), tnlayers.Linear)
    assert torch.equal(answer(model, name), answer(opened[-1].model, name))
    assert parameter_count(model) < dense
    plan = json.loads((out / "tnlayers.json").read_text())["plan"]
    assert plan["settings"]["keep"] == 0.6
    assert not [p for p in tmp_path.iterdir() if p.name not in ("small", "small.calibration.safetensors")]


def test_json_is_all_there_is_on_stdout_and_agrees_with_the_model(place, tmp_path):
    out = tmp_path / "small"
    result = done(
        "compress", place / "gpt2", "--keep", "0.6", "--calib", place / "texts.jsonl", "--out", out, *FEW, "--json"
    )
    found = json.loads(result.stdout)
    assert set(found) == {
        "report", "folder", "before", "after", "recovery", "seconds", "calibration", "measured",
    }  # fmt: skip
    assert found["folder"] == str(out)
    values = [{m["name"]: m["value"] for m in found[side]["metrics"]} for side in ("before", "after")]
    model = tnlayers.load(out)
    assert values[1]["parameters"] == parameter_count(model) < values[0]["parameters"]
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert values[1]["MiB of weights"] == pytest.approx(stored / 2**20)
    assert sum(p.numel() for p in model.parameters()) > parameter_count(model)  # the gauge is stored, and is no size
    assert "48 of 96" in found["calibration"]
    assert "24 of 96 in texts.jsonl, after 48" in found["measured"]
    assert min(found["seconds"].values()) >= 0


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(("goal", "value"), [("keep", 0.5), ("max_error", 0.02), ("max_params", 15000), ("speed", 1.5)])
def test_every_goal_is_kept(place, tmp_path, name, goal, value):
    config = CompressConfig(
        str(place / name), None, dry_run=True, calib=place / "texts.jsonl", count=48, batch_size=8, **{goal: value}
    )
    report = run(config).report
    if goal == "keep":
        assert 0.9 * value < report.targeted[1] / report.targeted[0] <= value
    elif goal == "max_error":
        assert report.error <= value
        assert report.params < report.params_dense
    elif goal == "max_params":
        assert report.params <= value
    else:
        assert report.params < report.params_dense


@pytest.mark.usefixtures("plain")
def test_a_dry_run_writes_nothing_and_changes_nothing(place, tmp_path, opened):
    source = tmp_path / "model"
    shutil.copytree(place / "bert", source)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    out = tmp_path / "small"
    data = ["--calib", place / "texts.jsonl", "--out", out, *FEW]
    result = done("compress", source, "--keep", "0.6", *data, "--dry-run")
    assert "compress (plan)" in result.stdout
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    untouched = tnlayers.open_pretrained(source).model
    assert same(opened[-1].model.state_dict(), untouched.state_dict())
    # with a calibration of other layers beside it, too: it is neither used nor thrown away
    file = tmp_path / "small.calibration.safetensors"
    run(settings(place, out))
    kept = file.read_bytes()
    done("compress", source, "--keep", "0.6", *data, "--dry-run", "--targets", "encoder.layer.0.*")
    assert file.read_bytes() == kept


@pytest.mark.usefixtures("plain")
def test_a_dry_run_is_the_plan_that_is_carried_out(place, tmp_path):
    plan = run(settings(place, None, dry_run=True)).report
    made = run(settings(place, tmp_path / "small")).report
    assert plan.params == made.params
    assert plan.targeted == made.targeted
    assert {r.name: r.ranks for r in plan.rows} != {}
    assert {r.name for r in plan.rows if r.status == "converted"} == {
        r.name for r in made.rows if r.status == "converted"
    }


def test_without_data_plain_errors_count(place, tmp_path):
    out = tmp_path / "small"
    result = done("compress", place / "bert", "--keep", "0.6", "--out", out, "-q")
    assert "parameters" in result.stdout
    assert "cosine" not in result.stdout
    assert not (tmp_path / "small.calibration.safetensors").exists()
    assert answer(tnlayers.load(out), "bert").isfinite().all()


@pytest.mark.usefixtures("plain")
def test_sequential_fits_later_blocks_to_what_they_are_given(place, tmp_path):
    layers = {"targets": ("encoder.*",)}
    one = run(settings(place, tmp_path / "one", keep=0.4, **layers))
    two = run(settings(place, tmp_path / "two", keep=0.4, sequential=True, **layers))
    ranks = [{row.name: row.params for row in result.report.rows if row.status == "converted"} for result in (one, two)]
    assert ranks[0] == ranks[1]
    first, later = (f"encoder.layer.{k}.intermediate.dense.cores.0" for k in (0, 1))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert torch.equal(one[first], two[first])
    assert not torch.equal(one[later], two[later])


@pytest.mark.usefixtures("plain")
def test_texts_that_are_left_are_measured_and_else_it_is_said(place, tmp_path):
    whole = run(settings(place, tmp_path / "one", count=90))
    assert "6 of 96 in texts.jsonl, after 90" in whole.measured
    none = run(settings(place, tmp_path / "two", count=96))
    assert "the same as for calibration" in none.measured
    assert "the same as for calibration" in none.text()
    other = run(settings(place, tmp_path / "three", test=texts_file(tmp_path / "other.jsonl", 20, seed=5)))
    assert "20 of 20 in other.jsonl" in other.measured
    assert "the same" not in other.measured


@pytest.mark.filterwarnings("ignore::tnlayers.pretrained.hub.PretrainedWarning")
@pytest.mark.usefixtures("plain")
def test_a_head_is_left_out_where_sentences_are_embedded(tmp_path, place):
    source = text_model(tmp_path / "mlm", "bert-mlm", "mean_tokens")
    options = {"calib": place / "texts.jsonl", "count": 48, "batch_size": 8}
    run(CompressConfig(str(source), tmp_path / "small", keep=0.6, **options))
    file = tmp_path / "small.calibration.safetensors"
    stamp = file.stat().st_mtime_ns
    run(CompressConfig(str(source), tmp_path / "small", keep=0.5, overwrite=True, **options))
    assert type(tnlayers.load(tmp_path / "small")).__name__ == "BertModel"
    assert file.stat().st_mtime_ns == stamp  # its pooler is random, and is the same in every run


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
