"""Recovery that diverges, is interrupted, killed and resumed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from tests.loops import generator
from tests.recovering import error, mlp, same, shortened, vectors
from tnlayers.recovery import Recovery, RecoveryWarning, distill, reconstruct

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("optimizer", ["adamw", "rank_adaptive"])
def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(optimizer):
    teacher = mlp()
    model = shortened(teacher, rank=8)
    count = 0

    def loss(made, target, batch):
        nonlocal count
        count += torch.is_grad_enabled()
        return F.mse_loss(made, target) * (float("nan") if count > 25 else 1.0)

    with pytest.warns(RecoveryWarning, match=r"stopped early, the loss is nan after step 25.*Lower lr"):
        done = distill(model, teacher, vectors(0), loss=loss, steps=100, every=10, optimizer=optimizer)
    assert done.steps == 25
    assert done.reason == "stopped early: the loss is nan after step 25"
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert error(model, teacher, vectors(0)) < error(shortened(teacher, rank=8), teacher, vectors(0))


def test_a_block_that_diverges_keeps_what_it_had():
    teacher = mlp()
    model = shortened(teacher, rank=8)
    with pytest.warns(RecoveryWarning, match="reconstruct: stopped early, [024]: the loss is"):
        done = reconstruct(model, teacher, vectors(0), steps=30, every=5, lr=1e30)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(row.after <= row.before for row in done.blocks)
    assert done.reason.startswith("0: stopped early")


class Stop(Exception):
    pass


def stopping(at: int, exception: type[BaseException] = Stop):
    calls = []

    def progress(done, total, text):
        calls.append(done)
        if len(calls) == at:
            raise exception

    return progress


@pytest.mark.parametrize("method", ["distill", "rank_adaptive", "reconstruct"])
def test_an_interrupt_leaves_a_good_model(method):
    teacher = mlp()
    model = shortened(teacher, rank=8).train()
    ranks = [layer.network.ranks for layer in model if isinstance(layer, tnlayers.Linear)]
    start = error(shortened(teacher, rank=8), teacher, vectors(0))
    run = reconstruct if method == "reconstruct" else distill
    more = {"optimizer": method} if method == "rank_adaptive" else {}
    with pytest.raises(KeyboardInterrupt):
        run(model, teacher, vectors(0), steps=50, every=5, progress=stopping(33, KeyboardInterrupt), **more)
    assert model.training
    assert error(model, teacher, vectors(0)) < start
    if method != "rank_adaptive":
        assert [layer.network.ranks for layer in model if isinstance(layer, tnlayers.Linear)] == ranks
    assert all(getattr(module, "_window", None) is None for module in model.modules())
    model(vectors(0)[0]).sum().backward()


@pytest.mark.parametrize("stops", [[7], [13, 20], [1, 2, 25]])
@pytest.mark.parametrize("method", ["distill", "rank_adaptive", "reconstruct"])
def test_a_resumed_run_gives_the_same_bits(method, stops, tmp_path):
    teacher = mlp()
    path = tmp_path / "run.pt"

    def run(**options):
        torch.manual_seed(5)
        model = shortened(teacher, rank=6)
        if method == "reconstruct":
            done = reconstruct(model, teacher, vectors(0), steps=12, every=4, generator=generator(1), **options)
        else:
            kind = "adamw" if method == "distill" else method
            extra = {"optimizer": kind, "validate": vectors(50, 2), "lr": 5e-3}
            done = distill(model, teacher, vectors(0), steps=32, every=4, generator=generator(1), **extra, **options)
        return model, done

    whole, done = run()
    for stop in stops:
        with pytest.raises(Stop):
            run(checkpoint=path, progress=stopping(stop))
    model, resumed = run(checkpoint=path)
    assert same(model, whole)
    assert (resumed.before, resumed.after, resumed.steps) == (done.before, done.after, done.steps)
    assert [m._replace(seconds=0) for m in resumed.history] == [m._replace(seconds=0) for m in done.history]
    assert resumed.blocks == done.blocks
    again, loaded = run(checkpoint=path, progress=stopping(1))  # it is finished: no step is taken
    assert same(again, whole)
    assert loaded == resumed
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


KILLED = """
import os, signal, sys
from tests.loops import generator
from tests.recovering import mlp, shortened, vectors
import torch, tnlayers
from tnlayers.recovery import distill
torch.set_num_threads(1)
def progress(done, total, text):
    if done == 17:
        os.kill(os.getpid(), signal.SIGKILL)
teacher = mlp()
distill(shortened(teacher), teacher, vectors(0), steps=30, every=5, optimizer="rank_adaptive", generator=generator(1),
        checkpoint=sys.argv[1], progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_run_resumes(tmp_path):
    path = tmp_path / "run.pt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    teacher = mlp()
    made: list[tuple[nn.Module, int]] = []
    first: list[int] = []
    for checkpoint in (path, None):
        model = shortened(teacher)
        options = {"steps": 30, "every": 5, "optimizer": "rank_adaptive", "checkpoint": checkpoint}
        told = len(first)
        distill(model, teacher, vectors(0), generator=generator(1), progress=lambda *a: first.append(a[0]), **options)
        made.append((model, first[told]))
    assert [step for _, step in made] == [16, 1]
    assert same(made[0][0], made[1][0])


def test_checkpoints_of_another_run_are_refused(tmp_path):
    teacher, path = mlp(), tmp_path / "run.pt"
    distill(shortened(teacher), teacher, vectors(0), steps=3, checkpoint=path)
    with pytest.raises(ValueError, match=r"is of another run: lr is 0\.002 here, 0\.0003 there; delete it"):
        distill(shortened(teacher), teacher, vectors(0), steps=3, lr=2e-3, checkpoint=path)
    with pytest.raises(ValueError, match=r"is of another run: 0\.cores\.0 is \[32, 5\] here, \[32, 6\] there"):
        distill(shortened(teacher, rank=5), teacher, vectors(0), steps=3, checkpoint=path)
    with pytest.raises(ValueError, match="is of another run: task is 'reconstruct' here, 'distill' there"):
        reconstruct(shortened(teacher), teacher, vectors(0), steps=3, checkpoint=path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is damaged or of another kind"):
        distill(shortened(teacher), teacher, vectors(0), steps=3, checkpoint=path)
    torch.save({"kind": "x"}, path)
    with pytest.raises(ValueError, match="expected a checkpoint of a recovery"):
        distill(shortened(teacher), teacher, vectors(0), steps=3, checkpoint=path)


def test_recovery_prints_and_survives_json():
    import json

    teacher = mlp()
    done = reconstruct(shortened(teacher), teacher, vectors(0), steps=2, every=1)
    text = str(done)
    assert text.startswith("reconstruct: relative squared error of the output ")
    assert "block" in text
    assert "6 steps in" in text
    assert Recovery.from_dict(json.loads(json.dumps(done.to_dict()))) == done
    assert [moment.block for moment in done.history] == ["0", "0", "2", "2", "4", "4"]
