"""The main job: networks and their budgets, training, rows that resume, figures and the page."""

import copy
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers.main_job.data import DataError, Dataset, load_data
from tnlayers.main_job.job import Event, JobConfig, run
from tnlayers.main_job.nets import choose_recipes, dense_net, major_layers, parameter_count, scratch_net
from tnlayers.main_job.results_page import accuracy_figure, curves_figure
from tnlayers.main_job.rows import JobError, Row, RowStore, footnote, summarize, table
from tnlayers.main_job.training import TrainingError, accuracy, flops_per_sample, learning_rate, train
from tnlayers.page import figure_png

QUICK = {"limit": 100, "epochs": 1, "finetune_epochs": 1, "threads": 1}
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 48), (2, 13, 9)]


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nets_and_their_budgets(net, shape):
    dense = dense_net(net, shape, 7)
    total = parameter_count(dense)
    x = torch.randn(3, *shape)
    assert dense(x).shape == (3, 7)
    scratch = scratch_net(net, shape, 7, share=0.08)
    assert scratch(x).shape == (3, 7)
    assert 0.03 * total < parameter_count(scratch) <= 0.08 * total
    assert {name for name, _ in scratch.named_children()} == {name for name, _ in dense.named_children()}
    converted = copy.deepcopy(dense)
    report = tnlayers.tensorize(converted, choose_recipes(dense, share=0.10), spectra=False)
    assert {row.name for row in report.rows if row.status == "converted"} == set(major_layers(dense))
    assert 0.05 * total < parameter_count(converted) <= 0.10 * total
    assert converted(x).shape == (3, 7)


def test_lenet_is_the_usual_one():
    assert parameter_count(dense_net("cnn", (1, 28, 28), 10)) == 431_080


def test_choose_recipes_prefers_what_matters():
    torch.manual_seed(0)
    model = dense_net("mlp", (1, 8, 8), 10)
    with torch.no_grad():  # a weight of rank 3 needs no more than three
        model.fc2.weight.copy_(torch.randn(512, 3) @ torch.randn(3, 512))
    recipes = choose_recipes(model, share=0.1)
    assert recipes["fc1"].keywords["rank"] > 30
    converted = copy.deepcopy(model)
    rows = {row.name: row for row in tnlayers.tensorize(converted, recipes, spectra=False).rows}
    assert rows["fc2"].error < 1e-5
    assert rows["fc1"].error < 1


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: dense_net("rnn", (1, 8, 8), 10), ["'mlp', 'cnn'", "'rnn'"]),
        (lambda: dense_net("cnn", (1, 7, 9), 10), ["8 x 8", "7 x 9", "mlp"]),
        (lambda: scratch_net("mlp", (1, 8, 8), 10, 0.01), ["1.0%", "301,066", "raise the share"]),
        (lambda: choose_recipes(dense_net("mlp", (1, 8, 8), 10), 0.01), ["1.0%", "301,066", "raise the share"]),
    ],
)
def test_net_refusals(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    assert all(part in str(error.value) for part in parts)


# -- training ----------------------------------------------------------------------------------------------------------


def test_learning_rate_is_one_cycle():
    rates = [learning_rate(step, 50, 1.0) for step in range(50)]
    top = rates.index(max(rates))
    assert max(rates) == 1.0
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.01
    assert all(0 < learning_rate(step, steps, 1.0) <= 1 for steps in (1, 2, 3) for step in range(steps))


def test_training_learns_and_is_deterministic():
    data = load_data("digits", limit=300)
    curves = []
    for _ in range(2):
        torch.manual_seed(3)
        model = scratch_net("mlp", data.shape, 10, 0.08)
        found = train(model, data, epochs=4, batch_size=32, lr=2e-3, seed=3)
        curves.append((found.curve, [p.detach().clone() for p in model.parameters()]))
    assert curves[0][0] == curves[1][0]
    assert all(torch.equal(a, b) for a, b in zip(curves[0][1], curves[1][1], strict=True))
    assert found.steps == 4 * math.ceil(300 / 32)
    assert found.curve[-1] > 0.6
    assert found.curve[-1] == accuracy(model, data.test_x, data.test_y)


def test_training_stops_at_nan():
    x, y = torch.full((4, 1, 2, 2), math.inf), torch.zeros(4, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TrainingError, match=r"epoch 1, step 1.*lower --lr"):
        train(model, Dataset("x", x, y, x, y, ("a", "b")), epochs=1, batch_size=2, lr=0.1, seed=0)


def test_flops_are_those_executed():
    x = torch.randn(8, 1, 28, 28)
    lenet = 2 * (20 * 25 * 24 * 24 + 50 * 20 * 25 * 8 * 8 + 800 * 500 + 500 * 10)
    assert flops_per_sample(dense_net("cnn", (1, 28, 28), 10), x) == lenet


# -- the job -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job") / "out"
    events: list[Event] = []
    result = run(JobConfig(out=folder, seeds=2, **QUICK), events.append)
    return result, events


def test_job_rows(finished):
    result, events = finished
    assert [(row.net, row.variant, row.seed) for row in result.rows] == [
        (net, variant, seed)
        for net in ("mlp", "cnn")
        for variant in ("dense", "tensorized", "scratch")
        for seed in (0, 1)
    ]
    assert result.trained == 12
    for row in result.rows:
        limit = {"dense": 1.0, "tensorized": 0.10, "scratch": 0.08}[row.variant]
        assert row.parameters <= limit * row.parameters_dense
        assert row.file_bytes == (result.out / row.file).stat().st_size >= 4 * row.parameters
        assert row.curve[-1] == row.accuracy
        assert bool(row.networks) == (row.variant != "dense")
        assert (row.accuracy_before is not None) == (row.variant == "tensorized")
        assert min(row.step_ms, row.inference_ms, row.flops, row.seconds) > 0
    steps = [event.done for event in events if event.kind == "step"]
    assert steps == sorted(steps)
    assert steps[-1] == events[-1].total == 12
    json.dumps(result.to_dict(), allow_nan=False)


def test_job_files(finished):
    result, _ = finished
    names = {"index.html", "accuracy.png", "curves-mlp.png", "curves-cnn.png", "table.txt", "rows.json"}
    assert names <= {entry.name for entry in result.out.iterdir()}
    page = (result.out / "index.html").read_text()
    assert "://" not in page
    assert page.count("data:image/png;base64,") == 3
    links = re.findall(r'href="(reports/[^"]+)"', page)
    assert len(links) == 4
    assert all((result.out / link).is_file() for link in links)
    data = load_data("digits", limit=100)
    for row in result.rows:
        model = tnlayers.load(result.out / row.file, dense_net(row.net, data.shape, 10))
        assert accuracy(model, data.test_x, data.test_y) == row.accuracy


def test_summaries(finished):
    result, _ = finished
    summaries = {(s.net, s.variant): s for s in result.summaries}
    rows = [row for row in result.rows if (row.net, row.variant) == ("cnn", "scratch")]
    found = summaries["cnn", "scratch"]
    a, b = (row.accuracy for row in rows)
    assert found.accuracy == pytest.approx((a + b) / 2)
    assert found.spread == pytest.approx(abs(a - b) / math.sqrt(2))
    assert found.gap == pytest.approx(100 * (found.accuracy - summaries["cnn", "dense"].accuracy))
    assert summaries["mlp", "dense"].gap == 0
    text = table(result.summaries)
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("scratch") == 2
    assert "2 seeds" in footnote(result.settings, result.hardware, result.summaries)
    (single,) = summarize(rows[:1])
    assert single.spread is None
    assert single.gap is None
    table([single])


def test_resume_skips_finished_rows_and_repeats_lost_ones(finished, tmp_path):
    result, _ = finished
    rows_file = result.out / "rows.json"
    whole = json.loads(rows_file.read_text())
    config = JobConfig(out=result.out, seeds=2, **QUICK)
    again = run(config)
    assert again.trained == 0
    assert again.rows == result.rows
    lost = {("cnn", "tensorized", 0), ("mlp", "scratch", 1), ("mlp", "dense", 0)}
    kept = [row for row in whole["rows"] if (row["net"], row["variant"], row["seed"]) not in lost]
    rows_file.write_text(json.dumps({**whole, "rows": kept}))
    (result.out / "models" / "cnn-dense-seed0.safetensors").write_bytes(b"damaged")  # is trained once more
    repeated = run(config)
    assert repeated.trained == 3
    for old, new in zip(result.rows, repeated.rows, strict=True):
        assert (old.key, old.curve, old.accuracy_before, old.parameters) == (
            new.key, new.curve, new.accuracy_before, new.parameters,
        )  # fmt: skip


def test_one_seed_more_is_no_other_setting(finished):
    result, _ = finished
    more = run(JobConfig(out=result.out, seeds=1, seed=1, nets=("mlp",), **QUICK))
    assert more.trained == 0
    assert [row.key for row in more.rows] == [("mlp", v, 1) for v in ("dense", "tensorized", "scratch")]


def test_interruption_keeps_rows(tmp_path):
    def stop(event: Event) -> None:
        if event.kind == "step" and "scratch" in event.label:
            raise KeyboardInterrupt

    config = JobConfig(out=tmp_path, nets=("mlp",), **QUICK)
    with pytest.raises(KeyboardInterrupt):
        run(config, stop)
    kept = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["variant"] for row in kept] == ["dense", "tensorized"]
    result = run(config)
    assert result.trained == 1
    assert [row.key[1] for row in result.rows] == ["dense", "tensorized", "scratch"]


def refused(config: JobConfig, *parts: str, error: type[Exception] = JobError) -> None:
    with pytest.raises(error) as found:
        run(config)
    message = str(found.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_folder_refusals(finished, tmp_path):
    result, _ = finished
    config = JobConfig(out=result.out, **QUICK)
    before = (result.out / "rows.json").read_bytes()
    refused(replace(config, lr=0.5), "lr = 0.002 there and 0.5 here", "finetune_lr", "--overwrite")
    refused(replace(config, limit=120), "data_sha256", "limit")
    assert (result.out / "rows.json").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("precious")
    refused(replace(config, out=tmp_path), "thesis.tex", "--overwrite")
    refused(replace(config, out=tmp_path / "thesis.tex"), "thesis.tex")
    for content in ("", "{}", "[1]", '{"kind": "tnlayers rows", "version": 1, "settings": {}, "rows": [{"net": 1}]}'):
        (tmp_path / "rows.json").write_text(content)
        refused(replace(config, out=tmp_path), "rows.json", "cannot be read")
    (tmp_path / "models").write_text("a file")
    refused(replace(config, out=tmp_path, overwrite=True), "models", "can be written")
    (tmp_path / "models").unlink()
    done = run(replace(config, out=tmp_path, nets=("mlp",), overwrite=True))
    assert done.trained == 3
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_two_runs_do_not_share_a_folder(tmp_path):
    with RowStore.open(tmp_path, {}):
        refused(JobConfig(out=tmp_path, **QUICK), "in use by another run")
    with RowStore.open(tmp_path, {}) as store:
        assert list(store) == []


def test_rows_survive_the_file(finished, tmp_path):
    result, _ = finished
    for row in result.rows:
        assert Row.from_dict(json.loads(json.dumps(asdict(row)))) == row
    row = asdict(result.rows[0])
    for name, value in (("seed", "0"), ("accuracy", "high"), ("variant", "other"), ("curve", ["x"])):
        with pytest.raises(ValueError):
            Row.from_dict({**row, name: value})


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"epochs": 0}, ["epochs", "got 0"]),
        ({"seeds": 0}, ["seeds", "got 0"]),
        ({"seed": -1}, ["seed", "got -1"]),
        ({"batch_size": -4}, ["batch_size", "got -4"]),
        ({"lr": math.nan}, ["lr", "nan"]),
        ({"lr": -1.0}, ["lr", "-1.0"]),
        ({"tensorized_share": 0.0}, ["tensorized_share", "0.0"]),
        ({"scratch_share": 1.5}, ["scratch_share", "1.5"]),
        ({"nets": ()}, ["mlp, cnn"]),
        ({"nets": ("mlp", "mlp")}, ["distinct", "mlp, mlp"]),
        ({"nets": ("rnn",)}, ["rnn"]),
        ({"threads": 0}, ["threads", "got 0"]),
    ],
)
def test_config_refusals(options, parts):
    with pytest.raises(JobError) as error:
        JobConfig(**options)
    assert all(part in str(error.value) for part in parts)


def test_impossible_settings_are_found_before_training(tmp_path):
    refused(JobConfig(out=tmp_path / "a", scratch_share=0.01, **QUICK), "mlp on digits", "raise the share")
    refused(JobConfig(out=tmp_path / "b", data="mnist:/nowhere"), "/nowhere", error=DataError)
    refused(JobConfig(out=tmp_path / "c", lr=1e30, **QUICK), "lower --lr", error=TrainingError)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    assert json.loads((tmp_path / "c" / "rows.json").read_text())["rows"] == []


def test_threads_are_given_back(tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1] if asked else 3)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run(JobConfig(out=tmp_path, nets=("mlp",), **{**QUICK, "threads": None}))
    assert asked == [1, 3]  # small data: one thread
    with pytest.raises(DataError):
        run(JobConfig(out=tmp_path, data="mnist:/nowhere", threads=2))
    assert asked[-1] == 3


def test_figures_of_odd_rows(finished):
    result, _ = finished
    row = result.rows[0]
    for rows in ([row], [replace(row, curve=(1.0,), accuracy=1.0)], [replace(row, curve=(0.0,), accuracy=0.0)]):
        assert figure_png(curves_figure(rows, "one")).startswith(b"\x89PNG")
        assert figure_png(accuracy_figure(summarize(rows), "one")).startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.data
def test_mnist_benchmark_runs(tmp_path):
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[1]
    place = root / "../shared/data/mnist"
    if not place.is_dir():
        pytest.skip(f"{place} is absent")
    command = [sys.executable, "benchmarks/mnist.py", "--quick", "--threads", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--data", f"mnist:{place}"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "scratch" in done.stdout
