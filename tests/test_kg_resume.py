"""Training that is interrupted and goes on, bit for bit; and on several workers, as one process."""

import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from kg_models import Bilinear, Mapped, answers_of, bits, equal, graph
from workers import launch

from tnlayers import RankAdaptive
from tnlayers.kg import NegativeSampling, evaluate, train
from tnlayers.kg.batches import Batches

F64 = torch.float64
ROOT = Path(__file__).parents[1]
module = sys.modules["tnlayers.kg.train"]  # `tnlayers.kg.train` is the function


# --- interruptions ---


RUNS = {
    "1-N, dropout, batch norm": (Bilinear, {"loss": "1-N"}),
    "negative sampling": (Bilinear, {"loss": NegativeSampling(5, temperature=1.0)}),
    "1-vs-all in chunks": (Bilinear, {"loss": "1-vs-all", "memory": 1000}),
    "rank-adaptive": (Mapped, {"optimizer": "RankAdaptive"}),
    "rank-adaptive, settling": (Mapped, {"optimizer": {"name": "RankAdaptive", "tol": 0.3, "settle": 5}}),
    "Riemannian": (Mapped, {"optimizer": "RiemannianAdam"}),
    "Adagrad, decay, schedule": (
        Bilinear,
        {"optimizer": "Adagrad", "lr_decay": 0.9, "schedule": lambda k, n: 1 - k / n},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_stopped_at_every_step_the_run_ends_the_same(name, tmp_path):
    kind, options = RUNS[name]
    triples = graph(count=70)
    common = {"epochs": 4, "batch_size": 24, "lr": 0.03, "every": 2, "seed": 3, **options}
    whole = kind(triples, dropout=0.2, norm=True)
    wanted = train(whole, triples, log=tmp_path / "whole.jsonl", **common)
    for calls in itertools.count(1):
        model = kind(triples, dropout=0.2, norm=True, seed=calls - 1)  # the file replaces other starts
        torch.manual_seed(calls)
        found = train(
            model, triples, checkpoint=tmp_path / "run.pt", log=tmp_path / "run.jsonl", max_seconds=0.0, **common
        )
        if found.stopped == "epochs":
            break
        assert found.stopped == "max_seconds"
    assert calls > 8
    assert equal(bits(model), bits(whole))
    assert found.losses == wanted.losses
    assert (found.mrr, found.best) == (wanted.mrr, wanted.best)
    logs = [(tmp_path / f"{log}.jsonl").read_text().splitlines() for log in ("whole", "run")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] == list(wanted.losses)
    again = kind(triples, dropout=0.2, norm=True)  # nothing is left to do
    assert train(again, triples, checkpoint=tmp_path / "run.pt", **common) == found
    assert equal(bits(again), bits(whole))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from kg_models import Bilinear, graph
from tnlayers.kg import train
import torch
torch.set_num_threads(1)

def report(done, whole, text):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

triples = graph()
model = Bilinear(triples, dropout=0.2, norm=True)
train(model, triples, epochs=6, batch_size=16, lr=0.03, every=2, seed=3, checkpoint=sys.argv[2],
      checkpoint_seconds=0.0, progress=report)
"""


def test_killed_and_continued_is_the_same_bit_for_bit(tmp_path):
    file = tmp_path / "run.pt"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    command = [sys.executable, "-c", KILLED, str(ROOT / "tests"), str(file), "11"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    triples = graph()
    common = {"epochs": 6, "batch_size": 16, "lr": 0.03, "every": 2, "seed": 3}
    steps, each = torch.load(file, weights_only=True)["progress"], len(Batches(answers_of(triples), 16))
    assert steps["epoch"] * each + steps["step"] == 10  # that of the 11th was not written
    model, whole = (Bilinear(triples, dropout=0.2, norm=True) for _ in range(2))
    train(model, triples, checkpoint=file, **common)
    train(whole, triples, **common)
    assert equal(bits(model), bits(whole))


@pytest.mark.parametrize("where", ["step", "report", "validation"])
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(where, tmp_path, monkeypatch):
    triples, calls = graph(), itertools.count()

    def strike():
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    class Struck(Bilinear):
        def query(self, heads, relations):
            if where == "step":
                strike()
            return super().query(heads, relations)

    def looked(*args, **options):
        if where == "validation" and options["split"] == "valid":
            strike()
        return evaluate(*args, **options)

    monkeypatch.setattr(module, "evaluate", looked)
    common = {"epochs": 6, "batch_size": 16, "lr": 0.03, "every": 1, "seed": 3}
    file, handler = tmp_path / "run.pt", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(
            Struck(triples, dropout=0.2), triples, checkpoint=file,
            progress=(lambda *_: strike()) if where == "report" else False, **common,
        )  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is handler
    steps = torch.load(file, weights_only=True)["progress"]
    each = len(Batches(answers_of(triples), 16))
    assert steps["epoch"] * each + steps["step"] == (5 * each if where == "validation" else 5)
    monkeypatch.undo()
    model, whole = Struck(triples, dropout=0.2), Struck(triples, dropout=0.2)
    found = train(model, triples, checkpoint=file, **common)
    wanted = train(whole, triples, **common)
    assert equal(bits(model), bits(whole))
    assert found.losses == wanted.losses


def test_checkpoints_from_another_thread(tmp_path):
    """Signals are the main thread's; training elsewhere does without."""
    done = []
    thread = threading.Thread(
        target=lambda: done.append(train(Bilinear(graph()), graph(), epochs=1, checkpoint=tmp_path / "run.pt"))
    )
    thread.start()
    thread.join()
    assert done[0].stopped == "epochs"


def test_more_epochs_continue(tmp_path):
    triples, common = graph(), {"batch_size": 16, "lr": 0.03, "seed": 3}
    model, whole = Bilinear(triples), Bilinear(triples)
    train(model, triples, epochs=2, checkpoint=tmp_path / "run.pt", **common)
    found = train(model, triples, epochs=4, checkpoint=tmp_path / "run.pt", **common)
    assert found.losses == train(whole, triples, epochs=4, **common).losses
    assert equal(bits(model), bits(whole))


def test_ranks_settle_at_the_step_of_the_first_call(tmp_path):
    """By name it is a part of the steps; another number of epochs, later on, does not move it."""
    triples = graph()
    common = {"batch_size": 16, "lr": 0.05, "seed": 3}
    file, each = tmp_path / "run.pt", len(Batches(answers_of(triples), 16))
    settle = round(0.6 * 10 * each)
    assert settle > 5 * each  # so that five epochs alone would settle long before
    asked = {"name": "RankAdaptive", "tol": 0.3}
    model, whole = Mapped(triples), Mapped(triples)
    train(model, triples, epochs=10, optimizer=asked, checkpoint=file, max_seconds=0.0, **common)
    found = train(model, triples, epochs=5, optimizer=asked, checkpoint=file, **common)
    wanted = train(whole, triples, epochs=5, optimizer={**asked, "settle": settle}, **common)
    assert found.losses == wanted.losses
    assert equal(bits(model), bits(whole))


def test_another_tolerance_is_another_run(tmp_path):
    triples, common = graph(), {"epochs": 1, "batch_size": 16, "seed": 0, "checkpoint": tmp_path / "run.pt"}
    train(Mapped(triples), triples, optimizer={"name": "RankAdaptive", "tol": 0.1}, **common)
    with pytest.raises(ValueError, match=r"options = \{'tol': 0.2\} \(the file: \{'tol': 0.1\}\)"):
        train(Mapped(triples), triples, optimizer=functools.partial(RankAdaptive, tol=0.2), **common)


def test_files_of_other_runs_and_damaged_ones_are_refused(tmp_path):
    triples, file = graph(), tmp_path / "run.pt"
    train(Bilinear(triples), triples, epochs=1, batch_size=16, seed=0, checkpoint=file)
    with pytest.raises(ValueError, match=r"of another run: batch_size = 32 \(the file: 16\); remove it"):
        train(Bilinear(triples), triples, epochs=1, batch_size=32, seed=0, checkpoint=file)
    with pytest.raises(ValueError, match=r"loss = \"OneToN\(smoothing=0.2, .*\)\" \(the file"):
        train(Bilinear(triples), triples, epochs=1, batch_size=16, label_smoothing=0.2, seed=0, checkpoint=file)
    other = dataclasses.replace(triples, train=triples.train[torch.arange(len(triples.train)) - 1])
    with pytest.raises(ValueError, match=r"of another run: triples = '[0-9a-f]{16}' \(the file"):
        train(Bilinear(other), other, epochs=1, batch_size=16, seed=0, checkpoint=file)
    for wide in (Bilinear(triples, norm=True), Bilinear(triples).requires_grad_(False)):
        wide.relations.requires_grad_(True)
        kept = bits(wide)
        with pytest.raises(ValueError, match="a model of other sizes, or with other parts frozen"):
            train(wide, triples, epochs=2, batch_size=16, seed=0, checkpoint=file)
        assert equal(bits(wide), kept)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    start = Bilinear(triples)
    before = bits(start)
    with pytest.raises(ValueError, match="the checkpoint cannot be read, expected a file of train"):
        train(start, triples, epochs=1, batch_size=16, seed=0, checkpoint=file)
    assert equal(bits(start), before)


def test_numbers_of_numpy_are_kept_as_numbers(tmp_path):
    asked = {"name": "SGD", "momentum": np.float64(0.5)}
    given = {"batch_size": np.int64(16), "lr": np.float32(0.5), "seed": np.int64(3), "optimizer": asked}
    plain = {"batch_size": 16, "lr": 0.5, "seed": 3, "optimizer": {"name": "SGD", "momentum": 0.5}}
    train(Bilinear(graph()), graph(), epochs=1, checkpoint=tmp_path / "run.pt", **given)
    assert len(train(Bilinear(graph()), graph(), epochs=2, checkpoint=tmp_path / "run.pt", **plain).losses) == 2


# --- several workers ---


CASES = (("1-N", None), ("1-vs-all", None), ("negative sampling", None), ("1-N", "RankAdaptive"))


def as_one(worker, folder):
    """Each case, then two epochs more from its checkpoint."""
    seen = []
    for number, (loss, optimizer) in enumerate(CASES):
        kind = Bilinear if optimizer is None else Mapped
        loss = NegativeSampling(4) if loss == "negative sampling" else loss
        triples = graph()
        file = folder / f"{number}.pt"
        common = {"batch_size": 16, "lr": 0.02, "loss": loss, "optimizer": optimizer, "seed": 3, "clip": 0.1}
        common |= {"checkpoint": file, "every": 2, "memory": 2000}
        model = kind(triples, dtype=F64, seed=worker or 0)  # that of worker 0 counts
        first = train(model, triples, epochs=4, log=folder / f"{number}-{worker}.jsonl", **common)
        weights = bits(model)
        again = kind(triples, dtype=F64, seed=7)
        more = train(again, triples, epochs=6, **common)
        seen.append(
            {"losses": first.losses, "more": more.losses, "mrr": more.mrr, "weights": weights, "end": bits(again)}
        )
    return seen


@pytest.mark.dist
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_workers_are_one_process(tmp_path):
    (tmp_path / "two").mkdir()
    results = launch(as_one, 2, tmp_path, tmp_path / "two")
    (tmp_path / "one").mkdir()
    for number, (one, two, alone) in enumerate(zip(*results, as_one(None, tmp_path / "one"), strict=True)):
        for key in ("weights", "end"):
            assert equal(one[key], two[key])
        assert (one["losses"], one["more"], one["mrr"]) == (two["losses"], two["more"], two["mrr"])
        for key in ("losses", "more"):
            torch.testing.assert_close(list(one[key]), list(alone[key]), rtol=1e-9, atol=1e-11)
        assert one["mrr"] == alone["mrr"]
        if CASES[number][1] is None:  # cores of networks may be others for the same weight
            for key, value in alone["end"].items():
                torch.testing.assert_close(one["end"][key], value, rtol=1e-7, atol=1e-9)
        assert (tmp_path / "two" / f"{number}-0.jsonl").exists()
        assert not (tmp_path / "two" / f"{number}-1.jsonl").exists()  # worker 0 alone writes
