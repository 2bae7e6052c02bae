"""The command: exit codes, one line for user errors, one JSON document on stdout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tnlayers.cli import app

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--limit", "100", "--epochs", "1", "--finetune-epochs", "1", "--threads", "1", "--nets", "mlp"]


def call(*arguments: str | Path):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "TERM": "dumb"})


def one_line(result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tnlayers: ")
    assert result.stdout == ""
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    result = call("train", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    return out, result


def test_help_has_examples():
    for command, example in (("train", "tnlayers train --data mnist:PATH"), ("inspect", "tnlayers inspect model")):
        result = call(command, "--help")
        assert result.exit_code == 0
        assert "Examples" in result.stdout
        assert example in result.stdout
    assert "train" in call("--help").stdout
    assert call("--version").stdout.startswith("tnlayers ")


def test_train_prints_one_table(folder):
    out, result = folder
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["net", "variant", "accuracy"]
    assert [line.split()[1] for line in lines[2:5]] == ["dense", "tensorized", "scratch"]
    assert str(out / "index.html") in lines[-1]
    assert result.stderr.count("mlp") == 3  # one line a finished row
    assert (out / "index.html").is_file()


def test_train_again_skips_and_prints_json(folder):
    out, _ = folder
    result = call("train", "--out", out, *QUICK, "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["trained"] == 0
    assert [row["variant"] for row in content["rows"]] == ["dense", "tensorized", "scratch"]
    assert content["settings"]["epochs"] == 1
    assert result.stderr.count("found finished") == 3
    silent = call("train", "--out", out, *QUICK, "--json", "--quiet")
    assert silent.stderr == ""
    assert json.loads(silent.stdout)["rows"] == content["rows"]


def test_rank_adaptive_rows_join_those_that_are_there(folder):
    out, _ = folder
    result = call("train", "--out", out, *QUICK, "--rank-adaptive", "--checkpoint-every", "2")
    assert result.exit_code == 0, result.output
    assert [line.split()[1] for line in result.stdout.splitlines()[2:6]] == [
        "dense", "tensorized", "scratch", "rank-adaptive",
    ]  # fmt: skip
    assert result.stderr.count("found finished") == 3
    assert ", ranks fc1 " in result.stderr
    assert (out / "ranks-mlp.png").is_file()
    content = json.loads(call("train", "--out", out, *QUICK, "--no-rank-adaptive", "--json", "-q").stdout)
    assert [row["variant"] for row in content["rows"]] == ["dense", "tensorized", "scratch"]


def test_other_settings_are_refused_unless_overwritten(folder):
    out, _ = folder
    one_line(call("train", "--out", out, *QUICK, "--lr", "0.01"), 2, str(out), "lr = 0.002", "--overwrite")
    done = call("train", "--out", out, *QUICK, "--lr", "0.01", "--overwrite", "--json", "-q")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["trained"] == 3
    assert call("train", "--out", out, *QUICK, "--overwrite", "-q").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data", "mnist:/nowhere"], ["/nowhere", "does not exist"]),
        (["--data", "cifar10:/nowhere"], ["/nowhere", "does not exist"]),
        (["--data", "imagefolder:/nowhere"], ["/nowhere", "does not exist"]),
        (["--data", "unknown"], ["digits, mnist:PATH", "'unknown'"]),
        (["--epochs", "0"], ["epochs", "got 0"]),
        (["--nets", "mlp,rnn"], ["mlp, rnn"]),
        (["--lr", "nan"], ["lr", "nan"]),
        (["--checkpoint-every", "0"], ["checkpoint_every", "got 0"]),
        (["--lr", "1e30", "--limit", "50", "--nets", "mlp"], ["lower --lr"]),
        (["--limit", "2"], ["limit", "at least 10"]),
        (["--scratch-share", "0.001"], ["0.1%", "raise the share"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, parts):
    one_line(call("train", "--out", tmp_path / "out", "-q", *arguments), 2, *parts)


@pytest.mark.parametrize("arguments", [["train", "--epochs", "many"], ["train", "--nothing"], ["nothing"], ["inspect"]])
def test_usage_errors(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_broken_files_are_one_line(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x01\x05")
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x01\x05")
    result = call("train", "--data", f"mnist:{folder}", "--out", tmp_path / "out")
    one_line(result, 2, "train-images-idx3-ubyte", "swapped")
    assert not (tmp_path / "out").exists()


def test_missing_extra_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    one_line(call("train", "--out", tmp_path / "out"), 2, "pip install 'tnlayers[examples]'")


def test_fault_of_ours_is_no_user_error(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a fault")

    monkeypatch.setattr("tnlayers.main_job.job.load_data", broken)
    result = call("train", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_disk_full_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tnlayers.main_job.job.save", full)
    one_line(call("train", "--out", tmp_path / "out", "-q", *QUICK), 1, "No space left")


def test_inspect(folder, tmp_path):
    out, _ = folder
    file = out / "models" / "mlp-dense-seed0.safetensors"
    page = tmp_path / "page.html"
    result = call("inspect", file, "--html", page)
    assert result.exit_code == 0, result.output
    assert "fc2.weight" in result.stdout
    assert "fc2.weight" in page.read_text()
    content = json.loads(call("inspect", file, "--json").stdout)
    assert any(row["name"] == "fc2.weight" for row in content["rows"])
    torch.save({"w": torch.eye(6)}, tmp_path / "state.pt")
    assert call("inspect", tmp_path / "state.pt").exit_code == 0


def test_inspect_refusals(tmp_path):
    one_line(call("inspect", tmp_path / "nothing.pt"), 2, "nothing.pt")
    one_line(call("inspect", tmp_path), 2, str(tmp_path))
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    one_line(call("inspect", tmp_path / "broken.safetensors"), 2, "broken.safetensors")
    torch.save({"w": torch.eye(6)}, tmp_path / "state.pt")
    one_line(call("inspect", tmp_path / "state.pt", "--html", tmp_path / "no" / "page.html"), 2, "no")


def start(*arguments: str | Path) -> subprocess.Popen:
    # a suite started in the background inherits "SIGINT is ignored"; a terminal's child does not
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from tnlayers.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_process_exit_code_and_streams(tmp_path):
    process = start("train", "--data", "mnist:/nowhere", "--out", tmp_path / "out")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_keeps_finished_rows(tmp_path):
    arguments = [
        "train",
        "--out",
        tmp_path / "out",
        "--threads",
        "1",
        "--nets",
        "mlp",
        "--epochs",
        "400",
        "--limit",
        "300",
    ]
    process = start(*arguments)
    rows = tmp_path / "out" / "rows.json"
    deadline = time.monotonic() + 100
    while not rows.exists() and time.monotonic() < deadline:  # the folder is opened right before training starts
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("tnlayers: interrupted")
    assert "Traceback" not in err
    assert json.loads(rows.read_text())["kind"] == "tnlayers rows"
