"""Several workers: engines, files, torchrun, refusals."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss
from workers import all_equal, batch, cores_of, digest, launch, part, small_net

import tnlayers
from decompositions import LowRank, TTMatrix
from decompositions import round as cut
from tnlayers import RankAdaptive, cli
from tnlayers.distributed import clip_grad_norm_, load_state, no_sync, param_groups, prepare, save_state
from tnlayers.surgery import network_layers

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
    ),
]
ROOT = Path(__file__).parents[1]


# --- FSDP ---


def sharded(worker, folder):
    """The mixture: cores and probes whole, the rest sharded; against DDP with the same batches."""
    seen = {}
    for engine in ("ddp", "fsdp"):
        net = small_net(torch.float64, seed=1)
        blocks = {"blocks": [net[-1]]} if engine == "fsdp" else {}
        model = prepare(net, engine, **blocks)
        kinds = {type(p).__name__ for p in net.parameters()}
        assert kinds == ({"Parameter"} if engine == "ddp" else {"Parameter", "DTensor"})
        cores = len(cores_of(net))  # beside them biases of the three layers, and the head
        wanted = [cores + 5] if engine == "ddp" else [cores, 5]
        assert [len(group["params"]) for group in param_groups(net)] == wanted
        optimizer = RankAdaptive(net, lr=0.02, tol=0.1)
        norms, digests = [], []
        for step in range(12):
            x, y = batch(step, dtype=torch.float64)
            optimizer.zero_grad()
            if step == 5:
                with no_sync(model):
                    mse_loss(model(part(x, worker)), part(y, worker)).backward()
            mse_loss(model(part(x, worker)), part(y, worker)).backward()
            norms.append(float(clip_grad_norm_(net.parameters(), 0.5)))
            optimizer.step()
            digests.append(digest(cores_of(net)))
        save_state(folder / f"{engine}.pt", model, optimizer, step=12)
        weights = [layer.weight.detach().clone() for _, layer in network_layers(net)]
        head = net[-1].weight.detach()
        seen[engine] = {
            "norms": norms, "digests": digests, "ranks": repr(optimizer.ranks()),
            "weights": [*weights, head.full_tensor() if engine == "fsdp" else head],
        }  # fmt: skip
    with pytest.raises(ValueError, match="DDP and FSDP wait for a backward"):
        model.reduction.synchronize()
    return seen


def continued(worker, folder, engine):
    """Go on from a file on another number of workers, or another engine; worker None is one process."""
    net = small_net(torch.float64, seed=2)
    model = net if worker is None else prepare(net, engine)
    optimizer = RankAdaptive(net, lr=0.02, tol=0.1)
    first = load_state(folder / "ddp.pt", model, optimizer)["step"]
    for step in range(first, first + 5):
        x, y = batch(step, dtype=torch.float64)
        if worker is not None:
            x, y = part(x, worker), part(y, worker)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return {"weights": [layer.weight.detach().clone() for _, layer in network_layers(net)]}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder with the states of both engines, and what the workers saw."""
    folder = tmp_path_factory.mktemp("engines")
    return folder, launch(sharded, 2, folder, folder)


def test_fsdp_is_ddp(both):
    folder, results = both
    for engine in ("ddp", "fsdp"):
        assert all_equal([result[engine]["digests"] for result in results])
    for result in results:
        one, two = result["ddp"], result["fsdp"]
        assert one["ranks"] == two["ranks"]
        torch.testing.assert_close(one["norms"], two["norms"], rtol=1e-8, atol=0)
        torch.testing.assert_close(one["weights"], two["weights"], rtol=1e-8, atol=1e-10)
    saved = [torch.load(folder / f"{engine}.pt", weights_only=True) for engine in ("ddp", "fsdp")]
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, saved), strict=True):  # alike, whoever sharded
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("workers", "engine"), [(4, "ddp"), (2, "fsdp")])
def test_a_state_goes_on_elsewhere(workers, engine, both, tmp_path):
    folder, _ = both
    alone = continued(None, folder, None)["weights"]
    for result in launch(continued, workers, tmp_path, folder, engine):
        torch.testing.assert_close(result["weights"], alone, rtol=1e-7, atol=1e-9)


def resized(worker, engine):
    """`set_network` at another rank after every backward, with an ordinary optimizer; DDP made by the caller too."""
    net = small_net(torch.float64, seed=worker)
    model = prepare(net, engine)
    if engine is None:
        model = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(param_groups(net), lr=0.05)
    seen = []
    for step in range(8):
        x, y = batch(step, dtype=torch.float64)
        alone = small_net(torch.float64)
        for (_, own), (_, layer) in zip(network_layers(alone), network_layers(net), strict=True):
            own.set_network(layer.network.detach())
        whole = [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in net.parameters()]
        for p, value in zip(alone.parameters(), whole, strict=True):
            p.data.copy_(value)
        mse_loss(alone(x), y).backward()
        optimizer.zero_grad()
        mse_loss(model(part(x, worker)), part(y, worker)).backward()
        for p, own in zip(net.parameters(), alone.parameters(), strict=True):
            found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(found, own.grad, rtol=1e-9, atol=1e-12)
        optimizer.step()
        for _, layer in network_layers(net):
            layer.set_network(cut(layer.network.detach(), rank=1 + step % 2))
        seen.append(digest(cores_of(net)))
    return {"seen": seen}


@pytest.mark.parametrize("engine", ["ddp", "fsdp", None])
def test_a_rank_change_after_every_backward(engine, tmp_path):
    assert all_equal(launch(resized, 2, tmp_path, engine))


def checkpointed_by_torch(worker, folder):
    """`torch.distributed.checkpoint` of the mixture: weights, and an ordinary optimizer's state."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    def start(seed):
        net = small_net(torch.float64, seed=seed)
        model = prepare(net, "fsdp")
        return model, torch.optim.AdamW(param_groups(model), lr=0.01)

    def train(model, optimizer, steps):
        for step in steps:
            x, y = batch(step, dtype=torch.float64)
            optimizer.zero_grad()
            mse_loss(model(part(x, worker)), part(y, worker)).backward()
            optimizer.step()
        return digest(cores_of(model)), digest(p.to_local() for p in model[-1].parameters())

    model, optimizer = start(1)
    train(model, optimizer, range(3))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "dcp")
    wanted = train(model, optimizer, range(3, 5))
    again, other = start(2)
    state = {"model": get_model_state_dict(again), "optimizer": get_optimizer_state_dict(again, other)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, other, state["optimizer"])
    assert train(again, other, range(3, 5)) == wanted
    ours = RankAdaptive(again, lr=0.01)
    again.zero_grad()
    with pytest.raises(ValueError, match=r"tnlayers\.distributed\.save_state writes it"):
        get_optimizer_state_dict(again, ours)
    assert ours.steps == 0
    return wanted[0]


def test_torchs_own_checkpoints_of_the_mixture(tmp_path):
    assert all_equal(launch(checkpointed_by_torch, 2, tmp_path, tmp_path))


# --- torchrun ---

DIES_ONCE = """
import os, signal, sys, warnings
sys.path.insert(0, sys.argv[1])
import ddp_training
made = ddp_training.data

def data(count, step):
    if step == int(sys.argv[2]) and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return made(count, step)

ddp_training.data = data
ddp_training.main(quick=True, folder=sys.argv[3])
"""


def torchrun(folder, *arguments, workers=2):
    """What it prints, its messages, and its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarted workers may find the addresses of dead ones
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False, timeout=120)
    return done.stdout, done.stderr, done.returncode


def said(printed):
    """Accuracy and ranks."""
    found = re.search(r"accuracy (.*) %, ranks ({[^}]*})", printed)
    return float(found[1]), found[2]


def test_the_example_under_torchrun_goes_on_after_a_kill(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES_ONCE)
    run = [str(script), str(ROOT / "examples")]
    killed, messages, code = torchrun(tmp_path, *run, "45", str(tmp_path))
    assert code == 1
    assert "Signal 9 (SIGKILL)" in messages
    assert (tmp_path / "ddp_training.pt").exists()
    whole, _, code = torchrun(tmp_path, "--max-restarts=1", *run, "50", str(tmp_path))
    assert code == 0
    assert whole.count("goes on after step 40") == 2  # after the first job, and after the kill at step 50
    assert not killed
    alone, _, code = torchrun(tmp_path, *run, "-1", str(tmp_path), workers=1)
    assert code == 0
    assert said(alone)[0] == pytest.approx(said(whole)[0], abs=0.5)  # float32: sums in another order
    assert said(alone)[1] == said(whole)[1]


# --- `tnlayers train` under torchrun ---

JOB_DIES_ONCE = """
import os, signal, sys
from tnlayers import cli
from tnlayers.main_job import training
step, left = training._step, [int(sys.argv[1])]

def dying(*args):
    left[0] -= 1
    if left[0] == 0 and os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)

training._step = dying
cli.main(sys.argv[2:])
"""


def rows_of(folder):
    """What does not depend on the clock."""
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    return [
        {
            key: row[key]
            for key in ("net", "variant", "seed", "accuracy", "parameters", "flops", "epochs", "curve", "networks")
        }
        for row in rows
    ]


def test_the_main_job_on_two_workers_is_that_of_one(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB_DIES_ONCE)
    # 65 images: a batch of one leaves a worker without any
    job = ["train", "--limit", "65", "--nets", "mlp", "--epochs", "4", "--rank-adaptive", "--threads", "1"]
    job += ["--checkpoint-every", "2"]
    cli.app([*job, "--out", str(tmp_path / "one")], standalone_mode=False)
    printed, messages, code = torchrun(tmp_path, str(script), "-1", *job, "--out", "two")
    assert code == 0, messages
    assert printed.count("mlp  dense") == 1  # worker 0 alone prints
    first, second = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for one, two in zip(first, second, strict=True):  # float32: sums in another order, an image or two of 65
        for key in ("accuracy", "curve"):
            assert one.pop(key) == pytest.approx(two[key], abs=0.04)
        assert one.items() <= two.items()

    # three rows of 12 steps (the conversion: fewer), then the fifth rank-adaptive step
    done = sum(3 * row["epochs"] for row in first[:3]) + 5
    _, messages, code = torchrun(tmp_path, str(script), str(done), *job, "--out", "killed")
    assert code == 1
    assert "SIGKILL" in messages
    assert (tmp_path / "killed" / "checkpoints").is_dir()
    _, messages, code = torchrun(tmp_path, str(script), "-1", *job, "--out", "killed")
    assert code == 0, messages
    assert "continues after step 4 of 12" in messages
    assert rows_of(tmp_path / "killed") == second
    _, messages, code = torchrun(tmp_path, "--max-restarts=1", str(script), str(done), *job, "--out", "again")
    assert code == 0, messages
    assert rows_of(tmp_path / "again") == second


def test_a_folder_that_the_main_job_cannot_use_is_refused_by_all(tmp_path):
    (tmp_path / "there").write_text("")
    _, messages, code = torchrun(tmp_path, "-m", "tnlayers.cli", "train", "--limit", "50", "--out", "there")
    assert code == 1
    assert "tnlayers: train: --out must be a folder" in messages
    assert "Traceback" not in messages.split("torch.distributed.elastic")[0].split("torch/distributed/elastic")[0]


# --- refusals, in this process ---


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_prepare_refuses_by_name(group):
    net = small_net()
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        prepare([net])
    with pytest.raises(ValueError, match="engine must be 'ddp', 'fsdp' or None, got 'horovod'"):
        prepare(net, "horovod")
    with pytest.raises(ValueError, match=r"without an engine there are no options, got \['bucket_cap_mb'\]"):
        prepare(net, None, bucket_cap_mb=1)
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"mp_policy\.param_dtype must be None, got torch\.bfloat16"):
        prepare(net, "fsdp", mp_policy=policy)
    RankAdaptive(net, lr=0.01)
    with pytest.raises(ValueError, match="prepare first, then make the optimizer"):
        prepare(net)
    with pytest.raises(ValueError, match="no_sync: expected what tnlayers"):
        no_sync(net)


def test_prepare_needs_a_group():
    with pytest.raises(ValueError, match="expected a process group, got none; call torch"):
        prepare(small_net())


def test_states_of_other_files_are_refused(tmp_path):
    net = small_net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="expected a file written by save_state"):
        load_state(tmp_path / "net.pt", net, torch.optim.SGD(net.parameters()))
    with pytest.raises(OSError, match="worker 0 could not write"):
        save_state(tmp_path / "nowhere" / "state.pt", net, torch.optim.SGD(net.parameters()))


@pytest.mark.parametrize("engine", ["ddp", None])
def test_a_copy_is_nobodys_worker(group, engine):
    net = small_net()
    model = prepare(net, engine)
    made = RankAdaptive(net, lr=0.01)
    x, y = batch(0)
    mse_loss(model(x), y).backward()
    made.step()
    before = model.reduction.count
    other = tnlayers.compact(net)
    mse_loss(other(x), y).backward()
    assert model.reduction.count == before


def test_workers_that_have_parted_go_on_alone(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    net = small_net()
    model = prepare(net)
    optimizer = RankAdaptive(net, lr=0.01)
    for step in range(2):
        x, y = batch(step)
        optimizer.zero_grad()
        mse_loss((model, net)[step](x), y).backward()
        optimizer.step()
        if step == 0:
            torch.distributed.destroy_process_group()
    optimizer.settle()
    assert model.reduction.count == 1
    assert optimizer.steps == 2


def unlike(worker):
    torch.manual_seed(0)
    kind = (LowRank, TTMatrix)[worker]
    with pytest.raises(ValueError, match="all workers must have the same layers"):
        prepare(tnlayers.Linear(16, 16, network=tnlayers.random_network(kind, rank=2)))
    return worker


def test_workers_with_other_layers_are_refused(tmp_path):
    assert launch(unlike, 2, tmp_path) == [0, 1]
