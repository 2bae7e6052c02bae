"""Compression: budgets kept, errors predicted and measured, ties, blocks, and models that stay as they were."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import tnlayers
from decompositions import svd, to_dense, weighted_low_rank
from decompositions.weighted import CalibrationWarning
from tnlayers.compression.baselines import METHODS
from tnlayers.compression.compress import default_blocks

F64 = torch.float64


def mlp(seed=0, widths=(12, 16, 14, 5)):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def data(seed=0, width=12, count=600):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, dtype=F64, generator=rng) * torch.logspace(0, -2, width, dtype=F64)
    return list((torch.randn(count, width, dtype=F64, generator=rng) @ mix).split(100))


def calibrated(net, batches, **options):
    return tnlayers.collect(net, batches, dtype=F64, **options)


def relative(net, other, batches):
    x = torch.cat(batches)
    with torch.no_grad():
        return float((net(x) - other(x)).norm() / other(x).norm())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(40, 12), nn.Linear(12, 12), nn.Linear(12, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


@pytest.mark.parametrize("ranks", ["auto", "loss", "knapsack", "energy", "welore", "effective", "uniform"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_the_budget_is_kept_by_every_policy(ranks, keep):
    net, batches = mlp(), data()
    whole = sum(p.numel() for p in net.parameters())
    weights = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    report = tnlayers.compress(net, keep=keep, ranks=ranks, calibration=calibrated(net, batches, gradients=True))
    before, now = report.targeted
    assert before == weights
    assert now <= keep * weights
    assert report.params_dense == whole
    assert report.params == whole - weights + now
    merged = sum(min(layer.network.ranks) * sum(layer.weight_shape) for layer in net if hasattr(layer, "cores"))
    dense = sum(layer.weight.numel() for layer in net if type(layer) is nn.Linear)
    assert now == merged + dense


def test_the_chosen_ranks_are_the_best_there_are():
    """Against every choice of candidates, with the predicted error computed from the data themselves."""
    net, batches = mlp(widths=(6, 7, 5)), data(width=6)
    held = calibrated(net, batches, gradients=True)
    weighed = tnlayers.weigh(net, held)
    report = tnlayers.compress(copy.deepcopy(net), keep=0.6, weighed=weighed)
    allowed = 0.6 * report.targeted[0]
    best = min(
        sum(c.error for c in chosen)
        for chosen in itertools.product(*weighed.options)
        if sum(c.price for c in chosen) <= allowed
    )
    assert report.error == pytest.approx((best / held.power) ** 0.5, rel=1e-9)
    for problem, options in zip(weighed.problems, weighed.options, strict=True):
        for option in options[1:]:
            rest = problem.weight - to_dense(option.make(problem))
            g, x = problem.outputs, problem.inputs
            exact = (g @ rest @ x.mT).square().sum() / problem.tokens
            assert float(exact) <= option.error * (1 + 1e-9)  # the ridge only adds


@pytest.mark.parametrize("seed", range(3))
def test_what_is_predicted_is_what_happens(seed):
    """Tokens alone, one layer, a small change: to first order nothing is left out but the ridge and the draws."""
    net, batches = mlp(seed), data(seed, count=4000)
    held = calibrated(net, batches, targets="4", gradients=True)
    small = copy.deepcopy(net)
    report = tnlayers.compress(small, keep=0.85, calibration=held)
    assert len(report.converted) == 1
    assert relative(small, net, batches) == pytest.approx(report.error, rel=0.1)


def test_gradients_find_better_ranks_than_the_same_share_everywhere():
    net, batches = mlp(widths=(12, 40, 40, 5)), data()
    net[4].weight.data *= 0.01  # nothing behind it matters much ... and
    net[2].weight.data[:, 20:] = 0  # half of what the first layer makes is not read
    held = calibrated(net, batches, gradients=True)
    errors = {}
    for ranks in ("loss", "uniform"):
        small = copy.deepcopy(net)
        tnlayers.compress(small, keep=0.4, calibration=held, ranks=ranks)
        errors[ranks] = relative(small, net, data(seed=1))
    assert errors["loss"] < 0.7 * errors["uniform"]


def test_goals():
    net, batches = mlp(), data()
    held = calibrated(net, batches, gradients=True)
    whole = sum(p.numel() for p in net.parameters())
    small = copy.deepcopy(net)
    report = tnlayers.compress(small, max_params=int(0.7 * whole), calibration=held)
    assert report.params <= int(0.7 * whole)
    assert report.params > 0.6 * whole
    report = tnlayers.compress(copy.deepcopy(net), max_error=0.2, calibration=held)
    assert 0.1 < report.error <= 0.2
    report = tnlayers.compress(copy.deepcopy(net), max_error=0.2, calibration=held, ranks="knapsack")
    assert 0.05 < report.error <= 0.2
    small = copy.deepcopy(net)
    report = tnlayers.compress(small, speed=1.5, calibration=held)
    assert report.targeted[1] <= report.targeted[0] / 1.5  # every layer sees every token


def test_speed_counts_tokens():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 20)).double()
    x = [torch.randn(8, 3, 6, 6, dtype=F64)]
    held = calibrated(net, x, gradients=True)
    work = {"0": 16 * 27 * 36, "3": 16 * 36 * 20}
    small = copy.deepcopy(net)
    with pytest.warns(CalibrationWarning, match="fewer tokens"):
        tnlayers.compress(small, speed=2, calibration=held, formats="low_rank")
    now = 0
    for name, layer in small.named_children():
        if name in work:
            share = layer.numel() / layer.weight.numel() if hasattr(layer, "cores") else 1
            now += share * work[name]
    assert now <= sum(work.values()) / 2


def test_a_plan_is_what_would_happen():
    net, batches = mlp(), data()
    held = calibrated(net, batches, gradients=True)
    before = copy.deepcopy(net.state_dict())
    plan = tnlayers.compress(net, keep=0.5, calibration=held, dry_run=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(hasattr(m, "cores") for m in net.modules())
    report = tnlayers.compress(net, keep=0.5, calibration=held)
    assert (plan.params, plan.targeted, plan.error, plan.frontier) == (
        report.params,
        report.targeted,
        report.error,
        report.frontier,
    )
    for planned, done in zip(plan.rows, report.rows, strict=True):
        assert (planned.name, planned.status, planned.params) == (done.name, done.status, done.params)
        if done.status == "converted":
            assert planned.ranks[0] == done.ranks[0]
            assert (planned.weighted_error, planned.share) == (done.weighted_error, done.share)


def test_the_frontier_is_that_of_five_budgets():
    net, batches = mlp(), data()
    weighed = tnlayers.weigh(net, calibrated(net, batches, gradients=True))
    report = tnlayers.compress(copy.deepcopy(net), keep=0.7, weighed=weighed)
    assert [point.keep for point in report.frontier] == [0.9, 0.8, 0.7, 0.6, 0.5]
    for point in report.frontier:
        other = tnlayers.compress(copy.deepcopy(net), keep=point.keep, weighed=weighed)
        assert point.params == other.params
        assert point.error == pytest.approx(other.error)
    assert sum(row.share for row in report.rows) == pytest.approx(1)


def test_rows_say_what_the_data_say():
    net, batches = mlp(), data()
    held = calibrated(net, batches)
    small = copy.deepcopy(net)
    report = tnlayers.compress(small, keep=0.5, calibration=held)
    for row in report.converted:
        x = held.layers[row.name].inputs.factor
        w, made = net.get_submodule(row.name).weight, small.get_submodule(row.name).weight
        assert row.weighted_error == pytest.approx(float((((w - made) @ x.mT).norm() / (w @ x.mT).norm()).detach()))
        (values,) = row.weighted.values()
        assert torch.allclose(torch.tensor(values, dtype=F64), torch.linalg.svdvals(w.detach() @ x.mT), atol=1e-9)
        assert row.break_even_rank == (w.numel() - 1) // sum(w.shape)


def test_one_layer_is_the_weighted_low_rank():
    net, batches = mlp(), data()
    held = calibrated(net, batches)
    weight = net[0].weight.detach()
    small = copy.deepcopy(net)
    tnlayers.compress(small, keep=0.5, calibration=held, targets="0")
    rank = int(0.5 * 12 * 16 / 28)
    expected = weighted_low_rank(weight, held.layers["0"].inputs, rank=rank)
    assert torch.allclose(small[0].weight, to_dense(expected), atol=1e-10)


def test_mu():
    net, x = mlp(), data()[0]
    few = calibrated(net, [x[:6]])
    weight, held = net[2].weight.detach(), few.layers["2"].inputs
    for mu, given in (("adaptive", "adaptive"), (0.5, 0.5 * float(held.factor.square().sum()) / 16)):
        small = copy.deepcopy(net)
        with pytest.warns(CalibrationWarning, match="fewer tokens"):
            tnlayers.compress(small, keep=0.5, calibration=few, targets="2", mu=mu)
        expected = weighted_low_rank(weight, held, rank=int(0.5 * 16 * 14 / 30), mu=given)
        assert torch.allclose(small[2].weight, to_dense(expected), atol=1e-9)


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    net = Tied().double()
    ids = list(torch.randint(0, 30, (64, 5)).split(16))
    held = calibrated(net, ids, gradients=True)
    whole = sum(p.numel() for p in net.parameters())
    report = tnlayers.compress(net, keep=0.6, calibration=held)
    assert report.targeted[0] == 40 * 12 + 12 * 12
    assert report.params == whole - report.targeted[0] + report.targeted[1]
    assert report.targeted[1] <= 0.6 * report.targeted[0]
    assert net.embed.cores[0] is net.head.cores[0]
    assert net(ids[0]).shape == (16, 5, 40)


def test_a_table_is_weighed_by_its_uses():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3)).double()
    ids = torch.multinomial(1 / torch.arange(1.0, 31.0) ** 2, 4000, True)
    held = calibrated(net, [ids], targets="0")
    small = copy.deepcopy(net)
    tnlayers.compress(small, keep=0.6, calibration=held)
    weight, made = net[0].weight.detach(), small[0].weight.detach()
    rank = small[0].network.ranks[0]
    d = held.layers["0"].inputs.smoothed.sqrt()[:, None]
    tail = torch.linalg.svdvals(d * weight)[rank:].norm()
    assert torch.allclose((d * (weight - made)).norm(), tail)
    plain = to_dense(svd(weight, rank=rank))
    assert float((weight[ids] - made[ids]).norm()) < float((weight[ids] - plain[ids]).norm())


def test_kernels_become_tucker_or_low_rank():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3)).double()
    core = torch.einsum("oa,abij,cb->ocij", torch.randn(16, 3), torch.randn(3, 4, 3, 3), torch.randn(24, 4))
    net[2].weight.data = core.double()
    x = [torch.randn(4, 8, 9, 9, dtype=F64) for _ in range(4)]
    held = calibrated(net, x, targets="2", gradients=True)
    small = copy.deepcopy(net)
    report = tnlayers.compress(small, keep=0.1, calibration=held)
    assert [row.format for row in report.rows if row.name == "2"] == ["Tucker"]
    assert relative(small, net, x) < 1e-6
    for formats in ("low_rank", "ttm", "kronecker"):
        other = copy.deepcopy(net)
        assert tnlayers.compress(other, keep=0.5, calibration=held, formats=formats).targeted[1] <= 0.5 * 16 * 24 * 9


def test_blocks_in_order_see_what_the_smaller_model_makes():
    """The inputs of the last layer are collected again, behind the layers that have become smaller."""
    net, batches = mlp(), data()
    held = calibrated(net, batches)
    small = copy.deepcopy(net)
    report = tnlayers.compress(small, keep=0.4, calibration=held, sequential=True, batches=batches)
    assert default_blocks(net) == ["0", "1", "2", "3", "4"]
    assert {row.name for row in report.converted} == {"0", "2", "4"}
    front = nn.Sequential(*list(small)[:4])
    x = torch.cat([front(batch).detach() for batch in batches])
    weight, rank = net[4].weight.detach(), small[4].network.ranks[0]
    expected = weighted_low_rank(weight, x, rank=rank)
    assert torch.allclose(small[4].weight, to_dense(expected), atol=1e-9)


def test_a_failure_leaves_the_model_as_it_was():
    net, batches = mlp(), data()
    held = calibrated(net, batches)
    modules = list(net)

    def fails(weight, layer, rank):
        if len(weight) == 5:
            raise RuntimeError("no")
        return svd(weight, rank=rank)

    for options in ({}, {"sequential": True, "batches": batches}):
        with pytest.raises(Exception, match="no"):
            tnlayers.compress(net, keep=0.4, calibration=held, method=fails, **options)
        assert all(a is b for a, b in zip(net, modules, strict=True))


@pytest.mark.parametrize("method", list(METHODS))
def test_baselines_make_networks_of_the_same_ranks(method):
    net, batches = mlp(), data()
    held = calibrated(net, batches, gradients=True, outputs=True)
    small, ours = copy.deepcopy(net), copy.deepcopy(net)
    report = tnlayers.compress(small, keep=0.5, calibration=held, method=method, ranks="uniform")
    wanted = tnlayers.compress(ours, keep=0.5, calibration=held, ranks="uniform")
    assert report.targeted == wanted.targeted
    assert all(torch.isfinite(p).all() for p in small.parameters())


def test_without_a_calibration_plain_errors_count():
    net = mlp()
    small = copy.deepcopy(net)
    tnlayers.compress(small, keep=0.5)
    rank = small[0].network.ranks[0]
    assert torch.allclose(small[0].weight, to_dense(svd(net[0].weight.detach(), rank=rank)), atol=1e-10)


def test_layers_without_data_are_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.used(x)

    net = Two().double()
    held = calibrated(net, data(), gradients=True)
    with pytest.warns(CalibrationWarning, match=r"knows nothing of 1 layers \(unused\)"):
        tnlayers.compress(net, keep=0.4, calibration=held)
    assert torch.isfinite(net.unused.weight).all()
    zeros = mlp()
    with pytest.warns(CalibrationWarning, match=r"knows nothing of 1 layers \(0\)"):
        tnlayers.compress(zeros, keep=0.4, calibration=calibrated(zeros, [torch.zeros(50, 12, dtype=F64)], targets="0"))


def test_a_budget_that_needs_nothing_changes_nothing():
    net, batches = mlp(), data()
    report = tnlayers.compress(net, keep=1.0, calibration=calibrated(net, batches, gradients=True))
    assert report.targeted[0] == report.targeted[1]
    assert not report.converted
    assert "worth more dense" in report.rows[0].reason


def test_bad_input_is_refused_before_any_work():
    net, batches = mlp(), data()
    held = calibrated(net, batches)
    for options, message in (
        ({}, "exactly one of keep, max_error, max_params, speed, got none"),
        ({"keep": 0.5, "speed": 2}, "got keep, speed"),
        ({"keep": 1.5}, r"a number in \(0, 1\]"),
        ({"keep": True}, r"a number in \(0, 1\]"),
        ({"max_error": float("nan")}, "a finite number > 0"),
        ({"max_params": float("inf")}, "a finite number > 0"),
        ({"keep": 0.5, "method": "svd_llm"}, "got none; collect one"),
        ({"keep": 0.5, "sequential": True, "batches": batches}, "needs a calibration of the inputs"),
        ({"keep": 0.5, "ranks": "best"}, "ranks must be one of"),
        ({"keep": 0.5, "ranks": "loss", "calibration": held}, "needs gradients"),
        ({"keep": 0.5, "method": "gptq"}, "method must be one of"),
        ({"keep": 0.5, "mu": -1}, "mu must be"),
        ({"keep": 0.5, "formats": "tensor"}, "formats must be some of"),
        ({"keep": 0.5, "targets": "encoder.*"}, "every pattern must match"),
        ({"keep": 0.5, "sequential": True, "calibration": held}, "give batches="),
        ({"keep": 0.5, "sequential": True, "batches": iter(batches), "calibration": held}, "a list"),
        ({"keep": 0.001, "calibration": held}, "expected at least"),
        ({"max_params": 10, "calibration": held}, "expected at least"),
        ({"speed": 2}, "collect one"),
        ({"keep": 0.5, "multiple": 0}, "multiple must be"),
    ):
        with pytest.raises(ValueError, match=message):
            tnlayers.compress(net, **options)
    with pytest.raises(TypeError, match="must come from collect"):
        tnlayers.compress(net, keep=0.5, calibration={})
    with pytest.raises(ValueError, match="must be of this model"):
        tnlayers.compress(mlp(widths=(12, 16, 5)), keep=0.5, calibration=held)
    with pytest.raises(ValueError, match="must be of this model"):
        tnlayers.compress(mlp(widths=(12, 10, 14, 5)), keep=0.5, calibration=held)
    weighed = tnlayers.weigh(net, held)
    with pytest.raises(ValueError, match="weigh again"):
        tnlayers.compress(mlp(seed=1), keep=0.5, weighed=weighed)
    with pytest.raises(ValueError, match="by_speed"):
        tnlayers.compress(net, speed=2, weighed=weighed)
    assert all(type(m) in (nn.Linear, nn.Tanh) for m in net)


def test_ranks_can_be_multiples():
    net, batches = mlp(widths=(24, 40, 40, 24)), data(width=24)
    held = calibrated(net, batches, gradients=True)
    tnlayers.compress(net, keep=0.6, calibration=held, multiple=4)
    assert all(layer.network.ranks[0] % 4 == 0 for layer in net if hasattr(layer, "cores"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    net, batches = mlp().to(dtype), [x.to(dtype) for x in data()]
    reference = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tnlayers.compress(net, keep=0.7, calibration=tnlayers.collect(net, batches, gradients=True))
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert relative(net.double(), reference.double(), data()) < 0.5
