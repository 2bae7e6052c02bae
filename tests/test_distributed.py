"""Several workers train as one: gradients reduced during backward, ranks decided once."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint
from workers import all_equal, batch, cores_of, digest, launch, part, small_net

import tnlayers
from decompositions import LowRank, TTMatrix
from tnlayers import RankAdaptive
from tnlayers.distributed import no_sync, prepare

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
    ),
]
ROOT = Path(__file__).parents[1]


# --- the same bits everywhere, while ranks change ---


def changing_ranks(worker, steps):
    net = small_net()
    model = prepare(net)
    optimizer = RankAdaptive(net, lr=0.02, tol=0.1, generator=torch.Generator().manual_seed(worker))
    seen, sizes, loads = [digest(cores_of(net))], [], []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        mse_loss(model(part(x, worker)), part(y, worker)).backward()
        moving = [p for _, layer in tnlayers.surgery.network_layers(net) for p in layer._active_probes()]
        loads.append((model.reduction.bytes, 4 * (sum(p.numel() for p in moving) + len(moving))))
        optimizer.step()
        seen.append(digest([*cores_of(net), *(p for name, p in net.named_parameters() if "probes" not in name)]))
        sizes.append(list(optimizer.ranks().values()))
    return {"seen": seen, "sizes": [repr(size) for size in sizes], "loads": loads}


@pytest.mark.parametrize("workers", [2, 4])
def test_cores_are_the_same_bits_after_every_step(workers, tmp_path):
    results = launch(changing_ranks, workers, tmp_path, 200)
    assert all_equal([result["seen"] for result in results])
    sizes = results[0]["sizes"]
    assert sum(a != b for a, b in itertools.pairwise(sizes)) >= 10
    assert len(set(results[0]["seen"])) == 201
    for sent, of_probes in results[0]["loads"]:  # one number more a Parameter: whether it has a gradient
        assert sent == of_probes


def disagreeing(worker, every, method):
    net = small_net()
    prepare(net)
    options = {"method": method} if method != "parallel" else {"every": every}
    optimizer = RankAdaptive(net, lr=0.02, tol=(0.1, 0.4)[worker], **options)
    if method == "parallel" and worker == 1:  # what another LAPACK would do: other signs, another last bit
        rounding = optimizer._rounding

        def other(track, settling):
            made = yield from rounding(track, settling)
            return made._unchecked([-core * (1 + 1e-7) for core in made.cores], made.legs, made.rows, made.cols)

        optimizer._rounding = other
    seen = []
    for step in range(4 * every):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = mse_loss(net(part(x, worker)), part(y, worker))
            loss.backward()
            return loss

        if method == "parallel":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
        seen.append(digest(cores_of(net)))
    optimizer.settle()
    return {
        "seen": [*seen, digest(cores_of(net))],
        "ranks": repr(optimizer.ranks()),
        "history": repr(optimizer.history),
    }


@pytest.mark.parametrize(("every", "method"), [(1, "parallel"), (3, "parallel"), (1, "augmented")])
def test_worker_0_decides(every, method, tmp_path):
    results = launch(disagreeing, 2, tmp_path, every, method)
    assert all_equal(results)


def fixed_ranks(worker, kind):
    net = small_net(seed=worker) if kind != "condlr" else nn.Sequential(*small_net(seed=worker)[5:])
    prepare(net)
    optimizer = {
        "sgd": lambda: tnlayers.RiemannianSGD(net, 0.05, momentum=0.9),
        "adam": lambda: tnlayers.RiemannianAdam(net, 0.01),
        "condlr": lambda: tnlayers.CondLR(net, 0.05, momentum=0.9),
    }[kind]()
    seen = [digest(cores_of(net))]
    for step in range(8):
        if worker == 1:  # another machine: other bits, of a sign or the last one
            with torch.no_grad():
                optimizer._tracks[0].moment = [-(1 + 1e-6) * m for m in optimizer._tracks[0].moment]
        x, y = batch(step)
        x = x if kind != "condlr" else x.flatten(1)[:, :24]
        optimizer.zero_grad()
        mse_loss(net(part(x, worker)), part(y, worker)).backward()
        optimizer.step()
        seen.append(digest(cores_of(net)))
    return seen


@pytest.mark.parametrize("kind", ["sgd", "adam", "condlr"])
def test_optimizers_at_fixed_ranks_agree_too(kind, tmp_path):
    results = launch(fixed_ranks, 2, tmp_path, kind)
    assert all_equal(results)
    assert len(set(results[0])) == 9


# --- as one process with the global batch ---


def trained(worker, kind, steps=12):
    """Losses and weights; worker None is one process."""
    net = small_net(torch.float64, seed=3 if worker in (None, 0) else 4)
    model = net if worker is None else prepare(net)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    else:
        optimizer = RankAdaptive(net, lr=0.02, tol=0.1, every=int(kind), weight_decay=0.01)
    losses = []
    for step in range(steps):
        x, y = batch(step, dtype=torch.float64)
        if worker is not None:
            x, y = part(x, worker), part(y, worker)
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)  # between backward and step
        optimizer.step()
        losses.append(loss.item())
    weights = [layer.weight.detach().clone() for _, layer in tnlayers.surgery.network_layers(net)]
    return {"losses": losses, "weights": [*weights, net[-1].weight.detach().clone(), net[3].bias.detach().clone()]}


@pytest.mark.parametrize(("workers", "kind"), [(2, "adamw"), (2, "1"), (4, "3")])
def test_losses_and_weights_are_those_of_one_process(workers, kind, tmp_path):
    results = launch(trained, workers, tmp_path, kind)
    alone = trained(None, kind)
    means = torch.tensor([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(means, torch.tensor(alone["losses"]), rtol=1e-5, atol=0)
    for result in results:
        for a, b in zip(result["weights"], alone["weights"], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


# --- ordinary loops ---


def mean_gradients(net, x, y):
    """Of one process with the global batch."""
    alone = copy.deepcopy(net)
    mse_loss(alone(x), y).backward()
    return [p.grad for p in alone.parameters()]


def gradients(net):
    return [p.grad.clone() for p in net.parameters()]


def plain_loops(worker):
    """Every way that gradients come about, with cores that an ordinary optimizer moves; asserted in the workers."""
    net = small_net(torch.float64, seed=worker)
    model = prepare(net)
    x, y = batch(0, dtype=torch.float64)
    mine, ours = part(x, worker), part(y, worker)

    def same(found, wanted):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    wanted = mean_gradients(net, x, y)
    mse_loss(model(mine), ours).backward()
    same(gradients(net), wanted)
    before = model.reduction.count

    for skip in (lambda: no_sync(model), model.no_sync):  # accumulation: one reduction, in the last backward
        model.zero_grad()
        with skip():
            for half in range(2):
                mse_loss(model(mine[half::3]), ours[half::3]).backward()
        assert model.reduction.count == before
        mse_loss(model(mine[2::3]), ours[2::3]).backward()
        before += 1
        assert model.reduction.count == before
        own = copy.deepcopy(net)
        own.zero_grad()
        for shift in range(3):
            for share in range(2):
                (mse_loss(own(part(x, share)[shift::3]), part(y, share)[shift::3]) / 2).backward()
        same(gradients(net), [p.grad for p in own.parameters()])

    model.zero_grad()  # an empty batch counts as zero
    rows = mine[: 0 if worker == 1 else None]
    (model(rows) - ours[: len(rows)]).square().sum().backward()
    own = copy.deepcopy(net)
    own.zero_grad()
    ((own(part(x, 0)) - part(y, 0)).square().sum() / 2).backward()
    same(gradients(net), [p.grad for p in own.parameters()])

    with pytest.raises(ValueError, match=r"run an empty batch, model\(x\[:0\]\)"):
        model.reduction.synchronize()
    with pytest.raises(ValueError, match="prepared before"):
        prepare(net)
    return gradients(net)[1:]


def test_gradients_of_ordinary_loops(tmp_path):
    first, second = launch(plain_loops, 2, tmp_path)
    assert digest(first) == digest(second)


def only_layers(worker):
    """A model of tensor layers alone: no DDP; one worker may run no backward, or reach other layers than the rest."""
    torch.manual_seed(worker)
    rank = 2 + worker  # worker 0's is taken
    random = tnlayers.random_network
    first = tnlayers.Linear(12, 12, False, network=random(LowRank, rank=rank), dtype=torch.float64)
    second = tnlayers.Linear(12, 12, False, network=random(TTMatrix, rank=2), dtype=torch.float64)

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = first, second, nn.BatchNorm1d(12, affine=False, dtype=torch.float64)

        def forward(self, x, which=None):
            return self.norm(x + 1) if which is None else getattr(self, which)(x)

    net = Either()
    model = prepare(net)
    assert not isinstance(model, nn.parallel.DistributedDataParallel)
    assert first.network.ranks == (2, 2)
    x = torch.randn(6, 12, dtype=torch.float64)
    x.requires_grad_()

    def count():
        return [sum(p.grad is not None for p in layer.parameters()) for layer in (first, second)]

    rows = x.detach().clone().requires_grad_()
    rows.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a backward that fails leaves nothing queued
        model(rows, "first").sum().backward()
    assert model.reduction.count == 0
    model.zero_grad()
    model(x, "first").square().sum().backward()
    assert model.reduction.count == 1
    assert count() == [3, 0]  # nobody has one of the second: none there, as in one process
    own = [torch.autograd.grad(net.first(x).square().sum(), list(first.cores))]
    model.zero_grad()
    model(x, ("first", "second")[worker]).square().sum().backward()
    assert count() == [3, len(second.cores)]
    if worker == 0:
        for a, b in zip(first.cores, own[0], strict=True):
            torch.testing.assert_close(a.grad, b / 2)
    model.zero_grad()
    model(x, "first" if worker == 0 else None).square().sum().backward()  # reaches no core on worker 1
    assert count() == [3, 0]
    model.zero_grad()
    if worker == 0:
        model(x, "first").square().sum().backward()
    else:
        model.reduction.synchronize()
    assert count() == [3, 0]
    assert digest(net.buffers()) != digest([torch.zeros(12), torch.ones(12), torch.tensor(0)])
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return {"cores": digest(cores_of(net)), "grads": digest(p.grad for p in first.cores), "norm": digest(net.buffers())}


def test_a_model_of_tensor_layers_only(tmp_path):
    assert all_equal(launch(only_layers, 2, tmp_path))


def overflowing(worker):
    """Loss scaling: infinity on one worker makes all skip the step."""
    net = small_net()
    model = prepare(net)
    optimizer = RankAdaptive(net, lr=0.02, tol=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    steps, scales = [], []
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = mse_loss(model(part(x, worker)), part(y, worker))
        if step == 3 and worker == 1:
            loss = loss * torch.tensor(float("inf"))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        steps.append(optimizer.steps)
        scales.append(scaler.get_scale())
    return {"steps": steps, "scales": scales, "cores": digest(cores_of(net))}


def test_an_overflow_on_one_worker_is_skipped_by_all(tmp_path):
    results = launch(overflowing, 2, tmp_path)
    assert all_equal(results)
    assert results[0]["steps"] == [1, 2, 3, 3, 4, 5]
    assert results[0]["scales"][3] == 32.0


def tied(worker, reentrant):
    """Layers that share a weight, some of them under activation checkpointing, at changing rank."""
    torch.manual_seed(worker)
    first = tnlayers.Linear(16, 16, network=tnlayers.random_network(LowRank, rank=2))
    net = nn.ModuleList([first, tnlayers.Linear(16, 16, network=first.network), nn.Linear(16, 6)])
    tnlayers.surgery.tie_cores(net[0], net[1])

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            for layer in self.net[:2]:
                x = torch.tanh(checkpoint(layer, x, use_reentrant=reentrant))
            return self.net[2](x)

    model = prepare(Chain())
    optimizer = RankAdaptive(model, lr=0.02, tol=0.05)
    seen = []
    for step in range(8):
        x, y = batch(step)
        optimizer.zero_grad()
        x = part(x, worker).flatten(1)[:, :16].requires_grad_()
        mse_loss(model(x), part(y, worker)).backward()
        optimizer.step()
        seen.append(digest(model.parameters()))
        assert net[0].cores[0] is net[1].cores[0]
    return {"seen": seen, "count": model.reduction.count}


@pytest.mark.parametrize("reentrant", [False, True])
def test_tied_layers_under_checkpointing(reentrant, tmp_path):
    results = launch(tied, 2, tmp_path, reentrant)
    assert all_equal(results)
    assert results[0]["count"] == 8


# --- calibration: every worker sees its own data, all hold the same bits ---


def gathered(worker):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    batches = [torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(k)) for k in range(5)]
    held = tnlayers.collect(net, batches[worker::2], gradients=True, dtype=torch.float64)
    held.gather()
    whole = tnlayers.collect(net, batches, dtype=torch.float64)
    factors = [held.layers[name].inputs.factor for name in ("1", "3")]
    gaps = [
        float((f.mT @ f - whole.layers[name].inputs.factor.mT @ whole.layers[name].inputs.factor).norm())
        for f, name in zip(factors, ("1", "3"), strict=True)
    ]
    tensors, _ = held.state()
    counts = held.layers["0"].inputs.counts.equal(whole.layers["0"].inputs.counts)
    return {"bits": digest(tensors.values()), "gaps": gaps, "tokens": held.layers["3"].tokens, "counts": counts}


def test_calibrations_of_all_workers_are_one(tmp_path):
    results = launch(gathered, 2, tmp_path)
    assert results[0]["bits"] == results[1]["bits"]
    for result in results:
        assert result["tokens"] == 30
        assert result["counts"]
        assert max(result["gaps"]) < 1e-12
