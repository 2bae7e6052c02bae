"""`tnlayers compress`, end to end on tiny models of transformers: results and plans."""

import json
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_jobs import (  # noqa: E402
    FEW,
    done,
    image_model,
    pictures,
    place,
    plain,
    same,
    settings,
    text_model,
    texts_file,
    weights,
)

import tnlayers  # noqa: E402
from tnlayers.compression import job  # noqa: E402
from tnlayers.compression.job import CompressConfig, run  # noqa: E402
from tnlayers.convert import parameter_count  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::decompositions.weighted.CalibrationWarning")
__all__ = ["place", "plain"]  # fixtures


@pytest.fixture(scope="module")
def seen(place):
    """The same with a model of pictures."""
    image_model(place / "vit")
    pictures(place / "pictures")
    return place


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


def inputs_of(name):
    if name == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16)}
    return {"input_ids": torch.arange(18).reshape(2, 9) % 57 + 3}


def answer(model, name):
    with torch.no_grad():
        return next(iter(model(**inputs_of(name)).values()))


# --- whole runs ---


@pytest.mark.parametrize(
    ("name", "data", "metric", "layer"),
    [
        ("bert", "texts.jsonl", "cosine, mean", "encoder.layer.0.intermediate.dense"),
        ("gpt2", "texts.jsonl", "perplexity", "transformer.h.0.mlp.c_fc"),
        ("vit", "pictures", "cosine, mean", "vit.layers.0.mlp.fc2"),
    ],
)
def test_a_model_is_compressed_measured_and_loaded_again(seen, tmp_path, opened, name, data, metric, layer):
    out = tmp_path / "small"
    dense = parameter_count(tnlayers.open_pretrained(seen / name).model)
    result = done("compress", seen / name, "--keep", "0.6", "--calib", seen / data, "--out", out, *FEW)
    assert metric in result.stdout
    assert f"{out} written, with report.html" in result.stdout
    assert {p.name for p in out.iterdir()} >= {"report.html", "compress.txt", "tnlayers.json", "model.safetensors"}
    assert layer in (out / "report.html").read_text()
    assert {p.stat().st_mode for p in out.iterdir() if p.is_file()} == {(out / "config.json").stat().st_mode}
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
