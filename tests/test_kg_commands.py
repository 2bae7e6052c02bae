"""`tnlayers kg` as its users meet it: the commands, R-TuckER by name, refusals in one line, nothing half written."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from kg_models import bits, equal, family, written
from typer.testing import CliRunner

from tnlayers import kg
from tnlayers.cli import app

SMALL = ("--set", "entity_dim=4", "--set", "relation_dim=2", "--epochs", 2, "--threads", 1)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return written(tmp_path_factory.mktemp("seen"), family(unseen=False))


@pytest.fixture(scope="module")
def trained(seen, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    done = call("train", seen, *SMALL, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def call(*arguments):
    return CliRunner().invoke(app, ["kg", *map(str, arguments)], env={"COLUMNS": "120", "TERM": "dumb"})


def refused(result, *parts: str):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_commands(trained, tmp_path):
    out, result = trained
    found = call("eval", out, "--by-relation")
    assert found.exit_code == 0, found.output
    rows = {line[:14].strip(): line.split() for line in found.stdout.splitlines()}
    assert {"realistic", "optimistic", "pessimistic", "heads", "tails"} <= rows.keys()
    assert rows["realistic"][1] == f"{result['test']['mrr']:.4f}"
    assert "grandparent of" in found.stdout
    assert json.loads(call("eval", out, "--json").stdout)["mrr"] == result["test"]["mrr"]
    asked = call("predict", out, "--head", "person 2", "--relation", "parent of", "-n", "3")
    assert asked.exit_code == 0
    assert asked.stdout.splitlines()[0] == "(person 2, parent of, ?): 2 known"
    assert len(asked.stdout.splitlines()) == 6
    as_json = json.loads(
        call("predict", out, "--relation", "parent of", "--tail", "person 4", "--new", "--json").stdout
    )
    assert as_json["known"] == 1
    assert "person 2" not in [answer["name"] for answer in as_json["answers"]]
    written = call("export", out, "--form", "w2v", "--out", tmp_path / "tables")
    assert written.exit_code == 0
    assert written.stdout.count(" written") == 2
    refused(call("predict", out, "--head", "persn 2", "--relation", "parent of"), "like it: person 2")
    refused(call("eval", out, "--split", "tets"), "train, valid, test")
    refused(call("eval", tmp_path), "expected a folder with kg.json")
    refused(call("export", out, "--form", "csv", "--out", tmp_path), "npy, parquet, w2v")
    for command in ("train", "eval", "predict", "export"):
        assert f"tnlayers kg {command}" in call(command, "--help").stdout


def test_train_as_a_command(seen, tmp_path):
    arguments = ["train", seen, *SMALL]
    result = call(*arguments, "--train", "label_smoothing=0.2", "--out", tmp_path / "a", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["epochs"] == 2
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert settings["training"] == {"epochs": 2, "batch_size": 128, "lr": 0.001, "label_smoothing": 0.2}
    result = call(*arguments, "--out", tmp_path / "b")
    assert "2 epochs in" in result.stdout
    assert f"{tmp_path / 'b' / 'index.html'} written" in " ".join(result.stdout.split())
    refused(call(*arguments, "--out", tmp_path / "a"), "holds another run", "--overwrite")
    refused(call(*arguments, "--set", "depth=3", "--out", tmp_path / "c"), "TuckER has no option 'depth'")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.tsv").write_text("a\tr\tb\na\tr\n")
    refused(call("train", tmp_path / "bad", "--out", tmp_path / "d"), "train.tsv")
    assert not (tmp_path / "c").exists()


# --- R-TuckER ---


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("R-TuckER Adam", {"ranks": "2,3"}),
        ("R-TuckER Adam", {"ranks": "1,2", "adaptive": "true"}),
        ("R-TuckER Adam", {"ranks": "1,2", "adaptive": "true", "shared": "false"}),
        ("R-TuckER SGD", {"ranks": "1,2", "adaptive": "true"}),
    ],
)
def test_an_r_tucker_from_the_command_line_to_its_tables(method, options, seen, tmp_path):
    """At fixed ranks, and at ranks that a tolerance finds; saved, asked and exported at those it ended with."""
    out, adapts = tmp_path / "out", "adaptive" in options
    arguments = ["train", seen, "--model", "RTuckER", "--optimizer", method, "--lr", 0.05, "--epochs", 6, "--every", 3]
    arguments += ["--train", "batch_size=16", "--threads", 1, "--out", out, "--quiet"]
    for key, value in options.items():
        arguments += ["--set", f"{key}={value}"]
    if adapts:
        arguments += ["--set-optimizer", "tol=.1", "--set-optimizer", "settle=.5"]
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    told, held = json.loads(done.stdout), kg.load_kg(out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    ranks = [epoch["ranks"][""] for epoch in log]
    assert list(held.model.network.ranks) == ranks[told["best_epoch"] - 1]
    assert (ranks[0] != [1, 2, 2]) if adapts else (ranks == [[2, 3, 3]] * 6)
    assert ranks[3:] == [ranks[3]] * 3  # settled
    settings = json.loads((out / "settings.json").read_text())["training"]["optimizer"]
    assert settings == ({"name": method, "tol": 0.1, "settle": 0.5} if adapts else method)
    assert json.loads(call("eval", out, "--json").stdout)["mrr"] == told["test"]["mrr"]
    asked = json.loads(call("predict", out, "--head", "person 2", "--relation", "parent of", "-n", 99, "--json").stdout)
    h, r = held.triples.entity_ids(["person 2"]), held.triples.relation_ids(["parent of"])
    scores = held.model.score_all(h, r)[0].double().sort(descending=True).values
    torch.testing.assert_close(torch.tensor([a["score"] for a in asked["answers"]], dtype=torch.float64), scores)
    assert call("export", out, "--what", "relations", "--out", tmp_path / "tables").exit_code == 0
    table = np.load(tmp_path / "tables" / "relations.npy")
    assert table.shape == (held.triples.num_relations, held.model.network.ranks[0])
    assert call(*arguments).exit_code == 0  # nothing is left to do
    again = kg.load_kg(out).model
    assert again.network.ranks == held.model.network.ranks
    assert equal(bits(again), bits(held.model))


def test_optimizer_options_are_refused_by_name(seen, tmp_path):
    start = ("train", seen, "--model", "RTuckER", "--set", "ranks=2,3", "--out", tmp_path / "x")
    adam = ("--optimizer", "R-TuckER Adam")
    refused(call(*start, "--set-optimizer", "tol=.1"), "--set-optimizer gives options of --optimizer, expected both")
    refused(
        call(*start, *adam, "--set-optimizer", "toll=.1"), "R-TuckER Adam has no option 'toll' here", "tol, reserve"
    )
    refused(call(*start, *adam, "--set-optimizer", "lr=.1"), "no option 'lr'", "lr and weight_decay are given to train")
    refused(call(*start, *adam, "--set-optimizer", "tol=.1"), "adaptive=True")
    adapt = (*start, "--set", "adaptive=true", *adam, "--set-optimizer")
    refused(call(*adapt, "settle=1.5"), "settle must be a part of the steps between 0 and 1, a step (int), or None")
    refused(call(*adapt, "settle=0"), "settle must be an int >= 1 (a step), or None, got 0")
    refused(call(*start, "--optimizer", "RankAdaptive"), "share a table", "R-TuckER SGD, R-TuckER Adam")
    assert list(tmp_path.iterdir()) == []


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optimizer", "adamw"], ["optimizer must be one of AdamW", "got 'adamw'"]),
        (["--lr", -1], ["lr must be a number above 0, got -1.0"]),
        (["--train", "loss=bce"], ["loss must be one of 1-N", "got 'bce'"]),
        (["--train", "clip=little"], ["clip must be a number, got 'little'"]),
        (["--train", "patience=1.5"], ["patience must be an int, got 1.5"]),
        (["--train", "max_seconds=soon"], ["max_seconds must be a number, got 'soon'"]),
        (["--train", "validation=5"], ["validation must be a mapping of options of evaluate, got 5"]),
        (["--train", "validation={'splt': 'test'}"], ["validation has no option 'splt', expected one of split"]),
        (["--train", "validation={'split': 'tets'}", "--every", 1], ["train, valid, test", "got 'tets'"]),
        (["--device", "quantum"], ["device must be one of this machine", "got 'quantum'"]),
        (["--threads", 0], ["threads must be an int >= 1", "got 0"]),
    ],
)
def test_a_slip_costs_nothing(arguments, parts, seen, trained, tmp_path, unchecked):
    """No folder appears, and one that is there keeps what it holds, even where it is to be forgotten."""
    training = ["train", seen, "--set", "entity_dim=4", "--set", "relation_dim=2", "--threads", 1, *arguments]
    refused(call(*training, "--out", tmp_path / "new"), *parts)
    before = contents(trained[0])
    refused(call(*training, "--overwrite", "--out", trained[0]), *parts)
    assert contents(trained[0]) == before
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_which_nothing_was_kept_gives_its_folder_back(seen, tmp_path):
    start = ("train", seen, *SMALL, "--optimizer", "SGD", "--out", tmp_path / "out")
    refused(call(*start, "--lr", 1e30), "the loss must stay finite, got nan in epoch 2", "lower lr")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    assert call(*start, "--lr", 0.01).exit_code == 0
    refused(call(*start, "--lr", 0.02), "holds another run", "--overwrite")


def test_overwrite_forgets_the_old_model_at_once(seen, trained, tmp_path):
    """A new run that fails leaves no model of other settings behind; what a killed write left goes too."""
    out = shutil.copytree(trained[0], tmp_path / "out")
    (out / ".checkpoint.pt.0123456789ab.tmp").write_bytes(b"torn")
    (out / ".model.0123456789ab.tmp").mkdir()
    result = call("train", seen, *SMALL, "--optimizer", "SGD", "--lr", 1e30, "--overwrite", "--out", out)
    refused(result, "the loss must stay finite")
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "settings.json"]
    refused(call("eval", out), "expected a folder with kg.json")


def test_settings_of_another_program_are_left_alone(seen, tmp_path):
    (tmp_path / "settings.json").write_text('{"theme": "dark"}')
    (tmp_path / "log.jsonl").write_text("mine")
    before = contents(tmp_path)
    for more in ((), ("--overwrite",)):
        refused(call("train", seen, *SMALL, "--out", tmp_path, *more), "holds something else")
    assert contents(tmp_path) == before


def test_a_full_disk_is_told_and_nothing_is_half_written(seen, tmp_path):
    """Files that may not grow stand for it: the checkpoint is the largest."""
    out, (soft, hard) = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        result = call("train", seen, *SMALL, "--out", out, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    assert "checkpoint.pt cannot be written, is the disk full?" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "settings.json"]
    assert call("train", seen, *SMALL, "--out", out).exit_code == 0  # with room the same command goes on


def test_what_is_asked_of_a_folder_is_refused_in_one_line(seen, trained, tmp_path):
    out = trained[0]
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(seen / "train.tsv", only)
    assert call("train", only, *SMALL, "--out", tmp_path / "out", "--quiet").exit_code == 0
    refused(call("eval", tmp_path / "out"), "the split test is empty")
    refused(call("eval", out, "--device", "quantum"), "device must be one of this machine")
    refused(call("predict", out, "--head", "person 2", "--relation", "cousin of"), "no relation 'cousin of'")
    refused(call("predict", out, "--head", "person 2"), "two of head, relation and tail must be given, got 1")
    refused(call("predict", tmp_path, "--head", "a", "--relation", "b"), "expected a folder with kg.json")
    refused(call("export", tmp_path, "--out", tmp_path / "t"), "expected a folder with kg.json")
    assert not (tmp_path / "t").exists()
