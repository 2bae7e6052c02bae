"""Rank-adaptive rows of the main job: sizes, log, figure, page, TensorBoard, and runs that are killed and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tnlayers
from tnlayers.cli import _Bar
from tnlayers.main_job import adaptive
from tnlayers.main_job.data import load_data
from tnlayers.main_job.job import Event, JobConfig, run
from tnlayers.main_job.nets import adaptive_net, dense_net, parameter_count
from tnlayers.main_job.rank_log import RankLog, in_words, read_log
from tnlayers.main_job.results_page import ranks_figure
from tnlayers.main_job.rows import VARIANTS, JobError
from tnlayers.main_job.training import TrainingError, accuracy
from tnlayers.page import figure_png

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"limit": 100, "epochs": 5, "finetune_epochs": 1, "threads": 1}  # 20 steps of a rank-adaptive row
LOG, MODEL = "logs/mlp-rank-adaptive-seed0.jsonl", "models/mlp-rank-adaptive-seed0.safetensors"
CHECKPOINT = "checkpoints/mlp-rank-adaptive-seed0.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptive") / "out"
    events: list[Event] = []
    return run(JobConfig(out=folder, rank_adaptive=True, checkpoint_every=7, **SMALL), events.append), events


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_the_start_is_small_and_the_budget_is_that_of_scratch(net, shape):
    model, budget = adaptive_net(net, shape, 7, share=0.08)
    total = parameter_count(dense_net(net, shape, 7))
    layers = dict(tnlayers.surgery.network_layers(model))
    inside = sum(core.numel() for layer in layers.values() for core in layer.cores)
    assert inside < 0.5 * budget
    assert parameter_count(model) - inside + budget == int(0.08 * total)
    assert all(max(layer.network.ranks) <= 2 for layer in layers.values())
    assert model(torch.randn(3, *shape)).shape == (3, 7)
    with pytest.raises(ValueError, match="raise the share"):
        adaptive_net(net, shape, 7, share=0.001)


# --- a finished job ---


def test_rows_are_those_of_the_compact_model(finished):
    result, events = finished
    assert [(row.net, row.variant) for row in result.rows] == [(n, v) for n in ("mlp", "cnn") for v in VARIANTS]
    data = load_data("digits", limit=100)
    for row in result.rows:
        if row.variant == "rank-adaptive":
            assert row.parameters <= 0.08 * row.parameters_dense
            model = tnlayers.load(result.out / row.file, dense_net(row.net, data.shape, 10))
            assert accuracy(model, data.test_x, data.test_y) == row.accuracy == row.curve[-1]
            assert parameter_count(model) == row.parameters
            assert len(row.curve) == row.epochs == 5
            ranks = {name: layer.network.ranks for name, layer in tnlayers.surgery.network_layers(model)}
            last = read_log(result.out / f"logs/{row.net}-rank-adaptive-seed0.jsonl")[-1]
            assert {name: tuple(values) for name, values in last["ranks"].items()} == ranks
    assert not (result.out / "checkpoints").exists()
    labels = [event.label for event in events if event.kind == "step" and "rank-adaptive" in event.label]
    assert all(re.fullmatch(r"mlp .*, epoch \d/5, ranks fc1 \d+, fc2 \d+", label) for label in labels if "mlp" in label)
    assert any("cnn" in label for label in labels)
    assert [event.label for event in events if event.kind == "row"][3].endswith(f"fc2 {ranks_of(result)['fc2'][0]}")


def ranks_of(result) -> dict[str, list[int]]:
    return read_log(result.out / LOG)[-1]["ranks"]


def test_log_figure_and_page(finished):
    result, _ = finished
    lines = [json.loads(line) for line in (result.out / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(set(line) == {"step", "loss", "settled", "ranks"} for line in lines)
    assert [line["settled"] for line in lines] == [step >= 12 for step in range(1, 21)]
    assert lines[0]["ranks"] != lines[11]["ranks"] == lines[-1]["ranks"]
    page = (result.out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    links = re.findall(r'href="((?:logs/|ranks)[^"]+)"', page)
    assert len(links) == 4
    assert all((result.out / link).is_file() for link in links)
    for logs in ([], [read_log(result.out / LOG)], [read_log(result.out / LOG), read_log(result.out / LOG)[:3]]):
        assert figure_png(ranks_figure(logs, "ranks")).startswith(b"\x89PNG")


def test_old_folders_take_the_new_rows(finished, tmp_path):
    """Rows of a job without the flag are kept, and the same numbers come of a job in two parts."""
    first, _ = finished
    config = JobConfig(out=tmp_path, nets=("mlp",), **SMALL)
    plain = run(config)
    assert [row.variant for row in plain.rows] == ["dense", "tensorized", "scratch"]
    assert not (tmp_path / "logs").exists()
    assert "rank_adaptive" not in plain.settings
    more = run(replace(config, rank_adaptive=True))
    assert more.trained == 1
    assert more.rows[:3] == plain.rows
    assert more.rows[3].curve == first.rows[3].curve
    assert (tmp_path / LOG).read_text() == (first.out / LOG).read_text()
    again = run(config)
    assert again.trained == 0
    assert again.rows == plain.rows


def test_log_lines_are_dropped_and_torn_ones_too(tmp_path):
    file = tmp_path / "logs" / "x.jsonl"
    with RankLog(file) as log:
        for step in range(1, 6):
            log.add(step, 0.5, {"a": (step, 2)}, settled=step > 4)
        assert len(read_log(file)) == 5  # on disk before the log is closed
    with file.open("a") as lines:
        lines.write('{"step": 6, "lo')
    with RankLog(file, after=3) as log:
        log.add(4, 0.25, {"a": (9, 2)}, settled=False)
    found = read_log(file)
    assert [(line["step"], line["loss"], line["ranks"]["a"][0]) for line in found][2:] == [(3, 0.5, 3), (4, 0.25, 9)]
    for content in ("", "[]\n", '{"step": 1}\n', '{"step": 1, "loss": 1, "settled": 0, "ranks": [1]}\n', "\xff"):
        file.write_text(content, encoding="latin-1")
        assert read_log(file) == []


def test_ranks_in_words():
    assert in_words({}) == ""
    assert in_words({"": (4,)}) == "4"
    many = {f"blocks.{k}.attention": (k, 10 * k) for k in range(30)}
    assert in_words(many) == "blocks.0.attention 0x0, +29"
    assert len(in_words(many, 80)) <= 80


def test_tensorboard_gets_the_same(tmp_path, monkeypatch):
    boards: list = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            self.folder, self.purge_step, self.scalars, self.open = folder, purge_step, [], True
            boards.append(self)

        def add_scalar(self, *entry):
            self.scalars.append(entry)

        def close(self):
            self.open = False

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RankLog(tmp_path / "net.jsonl") as log:
        log.add(1, 0.5, {"fc1": (2,), "conv2": (3, 4)}, settled=False)
    assert boards[0].scalars == [
        ("loss", 0.5, 1), ("ranks/fc1", 2, 1), ("ranks/conv2/bond0", 3, 1), ("ranks/conv2/bond1", 4, 1),
    ]  # fmt: skip
    assert not boards[0].open
    assert boards[0].folder == str(tmp_path / "tensorboard" / "net")
    RankLog(tmp_path / "net.jsonl", after=1).__exit__(None, None, None)
    assert [board.purge_step for board in boards] == [1, 2]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    with RankLog(tmp_path / "net.jsonl") as log:
        log.add(1, 0.5, {"fc1": (2,)}, settled=False)


def test_the_live_line_shows_ranks():
    with _Bar() as show:
        bar = show.__self__._progress
        show(Event("step", "mlp rank-adaptive, seed 0, epoch 1/5, ranks fc1 2, fc2 3", 1, 5))
        assert bar.tasks[0].description.endswith("ranks fc1 2, fc2 3")


# --- interrupted and resumed ---


class Stop(Exception):
    pass


def stopped_at(config: JobConfig, step: int) -> None:
    """Run a job until the rank-adaptive row has done so many steps; leave everything as it is then."""
    add = RankLog.add
    with pytest.MonkeyPatch.context() as patch:

        def stop(self, now, *rest, **options):
            if now > step:
                raise Stop
            add(self, now, *rest, **options)

        patch.setattr(RankLog, "add", stop)
        with pytest.raises(Stop):
            run(config)


@pytest.fixture
def config(finished, tmp_path):
    """A job whose rank-adaptive row is missing; a checkpoint every three steps."""
    shutil.copytree(finished[0].out, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    rows["rows"] = rows["rows"][:3]
    (tmp_path / "out" / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "out" / LOG).unlink()
    return JobConfig(out=tmp_path / "out", nets=("mlp",), rank_adaptive=True, checkpoint_every=3, **SMALL)


def continued(config: JobConfig):
    """The result, and the steps after which rows went on."""
    events: list[Event] = []
    result = run(config, events.append)
    labels = [event.label for event in events if event.kind == "resume"]
    return result, [
        int(re.fullmatch(r"mlp rank-adaptive, seed 0: continues after step (\d+) of 20", x)[1]) for x in labels
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / MODEL)


def same_row(result, other) -> None:
    """Weights, accuracies, ranks and log agree bit for bit."""
    a, b = weights(result.out), weights(other.out)
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (result.out / LOG).read_text() == (other.out / LOG).read_text()
    assert result.rows[3].curve == other.rows[3].curve
    assert result.rows[3].networks == other.rows[3].networks


@pytest.mark.parametrize("step", [0, 2, 3, 4, 7, 8, 12, 13, 19])
def test_stopped_at_any_step_the_same_weights(finished, config, step):
    """Before the first checkpoint, at one, between two, at the ends of epochs (4, 8), around settling (12)."""
    stopped_at(config, step)
    assert (config.out / CHECKPOINT).exists() == (step >= 3)
    result, steps = continued(config)
    assert steps == ([step // 3 * 3] if step >= 3 else [])
    assert result.trained == 1
    same_row(result, finished[0])
    assert not (config.out / "checkpoints").exists()


def test_twice_stopped_and_what_a_killed_write_leaves(finished, config):
    stopped_at(config, 5)
    stopped_at(replace(config, checkpoint_every=4), 11)  # no setting that numbers depend on
    file = config.out / CHECKPOINT
    (file.parent / f".{file.name}.0123.tmp").write_bytes(file.read_bytes()[:9])
    result, steps = continued(config)
    assert steps == [8]
    same_row(result, finished[0])
    assert not file.parent.exists()


def test_checkpoints_that_are_refused(finished, config):
    """Of other settings, incomplete, of another kind, damaged: the row starts anew."""
    stopped_at(config, 5)
    file, other = config.out / CHECKPOINT, config.out / "other.pt"
    kept, rows = file.read_bytes(), (config.out / "rows.json").read_text()
    whole = torch.load(file)
    contents = [kept[: len(kept) // 2], b""]
    for content in ({**whole, "identity": "{}"}, {**whole, "optimizer": {}}, {**whole, "course": {}}, [1]):
        torch.save(content, other)
        contents.append(other.read_bytes())
    for content in contents:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        (config.out / "rows.json").write_text(rows)
        result, steps = continued(config)
        assert steps == []
        same_row(result, finished[0])


def test_another_recipe_is_another_row(config, monkeypatch):
    stopped_at(config, 5)
    monkeypatch.setitem(adaptive.RECIPE, "tol", 0.3)
    assert continued(config)[1] == []


def test_overwrite_starts_anew_and_finished_rows_leave_nothing(config):
    stopped_at(config, 5)
    kept = (config.out / CHECKPOINT).read_bytes()
    assert continued(replace(config, overwrite=True))[1] == []
    (config.out / "checkpoints").mkdir()
    (config.out / CHECKPOINT).write_bytes(kept)  # killed after the row was written, before the checkpoint was removed
    assert run(config).trained == 0
    assert not (config.out / "checkpoints").exists()


def command(folder: Path) -> list[str]:
    options = {"--out": folder, "--nets": "mlp", "--limit": 100, "--epochs": 5, "--finetune-epochs": 1, "--threads": 1}
    flags = [str(part) for pair in {**options, "--checkpoint-every": 3}.items() for part in pair]
    return [sys.executable, "-m", "tnlayers.cli", "train", "--rank-adaptive", *flags]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_kill_9_in_the_middle_of_a_row(finished, config):
    """The same command after SIGKILL: the weights of a run that nobody disturbed, bit for bit."""
    for step in (5, 11):
        process = subprocess.Popen(command(config.out), cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(read_log(config.out / LOG)) < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert (config.out / CHECKPOINT).exists()
        assert len(json.loads((config.out / "rows.json").read_text())["rows"]) == 3
    done = subprocess.run(command(config.out), cwd=ROOT, check=True, capture_output=True, text=True)
    found = re.search(r"mlp rank-adaptive, seed 0: continues after step (\d+) of 20", done.stderr)
    assert found is not None
    assert int(found[1]) >= 9
    same_row(run(config), finished[0])


# --- refusals ---


def test_refusals(tmp_path):
    with pytest.raises(JobError, match="checkpoint_every must be at least 1, got 0"):
        JobConfig(checkpoint_every=0)
    data = load_data("digits", limit=50)
    keep = adaptive.Checkpoint(tmp_path / "c" / "x.pt", {}, 100)
    with pytest.raises(TrainingError, match="lower --lr"):
        adaptive.train_adaptive(
            lambda: adaptive_net("mlp", data.shape, 10, 0.08), data, epochs=20, batch_size=16, lr=1e30, seed=0,
            log=tmp_path / "x.jsonl", checkpoint=keep,
        )  # fmt: skip
