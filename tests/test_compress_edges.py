"""Compression where numbers are easily wrong: goals, ties, baselines, odd weights, other precisions, interruptions."""

import copy
import warnings

import pytest
import torch
from test_compress import F64, Tied, calibrated, data, mlp, relative
from torch import nn

import tnlayers
from decompositions.weighted import CalibrationWarning


@pytest.mark.parametrize("ranks", ["knapsack", "energy", "welore", "effective", "uniform"])
@pytest.mark.parametrize("goal", [0.05, 0.2, 0.5])
def test_the_reported_error_keeps_the_goal_with_every_policy(ranks, goal):
    net, batches = mlp(), data()
    net[0].weight.data *= 100  # errors of layers in very different units
    report = tnlayers.compress(net, max_error=goal, ranks=ranks, calibration=calibrated(net, batches))
    assert report.error <= goal
    errors = [row.weighted_error or 0.0 for row in report.rows]
    assert report.error == pytest.approx((sum(e**2 for e in errors) / len(errors)) ** 0.5)


@pytest.mark.parametrize(
    "options", [{"method": "plain"}, {"method": "svd_llm"}, {"mu": 1.0}, {"mu": "adaptive"}, {"sequential": True}]
)
def test_rows_hold_the_errors_of_the_networks_that_were_made(options):
    net, batches = mlp(), data()
    held = calibrated(net, batches)
    small = copy.deepcopy(net)
    if "sequential" in options:
        options = options | {"batches": batches}
    report = tnlayers.compress(small, keep=0.5, calibration=held, **options)
    assert [row.name for row in report.rows] == ["0", "2", "4"]
    for row in report.converted:
        x = held.layers[row.name].inputs.factor
        w, made = net.get_submodule(row.name).weight.detach(), small.get_submodule(row.name).weight.detach()
        assert row.weighted_error == pytest.approx(float(((w - made) @ x.mT).norm() / (w @ x.mT).norm()))


def test_inputs_that_were_not_collected_count_as_white():
    """Mode "none" with gradients: right where the inputs are white, whatever the number of tokens."""
    rng = torch.Generator().manual_seed(0)
    batches = list(torch.randn(4000, 12, dtype=F64, generator=rng).split(500))
    net = mlp()
    for mode in ("factor", "none"):
        small = copy.deepcopy(net)
        held = calibrated(net, batches, targets="0", mode=mode, gradients=True)
        report = tnlayers.compress(small, keep=0.8, calibration=held)
        assert relative(small, net, batches) == pytest.approx(report.error, rel=0.35)


def test_a_tie_to_what_is_not_targeted_keeps_a_layer_dense():
    net = Tied().double()
    ids = list(torch.randint(0, 40, (64, 5)).split(16))
    held = calibrated(net, ids)
    whole = sum(p.numel() for p in net.parameters())
    with pytest.raises(ValueError, match=r"got none \(head: its weight is tied to embed\.weight, which stays dense\)"):
        tnlayers.compress(net, keep=0.5, calibration=held, targets="head")
    report = tnlayers.compress(net, keep=0.5, calibration=held, exclude="embed")
    assert report.targeted[0] == 144
    assert report.params == whole - report.targeted[0] + report.targeted[1]
    assert net.head.weight is net.embed.weight
    assert {row.name: row.reason for row in report.rows if row.status == "kept"} == {
        "embed": "not targeted",
        "head": "its weight is tied to embed.weight, which stays dense",
    }


def test_ties_of_every_kind():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
            self.b.weight = self.a.weight  # one weight, two layers
            self.again = self.c  # one layer, two names

        def forward(self, x):
            return self.again(torch.tanh(self.c(self.b(torch.tanh(self.a(x))))))

    torch.manual_seed(0)
    net, batches = Net().double(), data()
    for options in ({}, {"sequential": True, "batches": batches, "blocks": ["a", "c"]}):
        for gradients in (False, True):
            small = copy.deepcopy(net)
            held = calibrated(small, batches, gradients=gradients)
            report = tnlayers.compress(small, keep=0.6, calibration=held, **options)
            assert report.targeted[0] == 288
            assert report.targeted[1] <= 0.6 * 288
            assert small.a.cores[0] is small.b.cores[0]
            assert small.c is small.again
            assert relative(small, net, batches) < 0.9


def test_weights_that_were_changed_in_place_are_weighed_again():
    net, batches = mlp(), data()
    weighed = tnlayers.weigh(net, calibrated(net, batches))
    tnlayers.compress(copy.deepcopy(net), keep=0.5, weighed=weighed)
    with torch.no_grad():
        net[2].weight[0, 0] += 1
    with pytest.raises(ValueError, match="got others at 2; weigh again"):
        tnlayers.compress(net, keep=0.5, weighed=weighed)


def test_kernels_with_diagonals_and_groups():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.Tanh(), nn.Conv2d(16, 12, 3, padding="same")).double()
    x = [torch.randn(6, 8, 9, 9, dtype=F64) for _ in range(3)]
    for options in ({"mode": "diagonal"}, {"gradients": True}, {"mode": "none", "gradients": True}):
        small = copy.deepcopy(net)
        report = tnlayers.compress(
            small, keep=0.5, calibration=calibrated(net, x, **options), formats=("tucker", "low_rank", "tucker")
        )
        assert report.targeted[1] <= 0.5 * report.targeted[0]
        assert torch.isfinite(small(x[0])).all()


def test_the_plan_for_a_speed_names_numbers():
    net, batches = mlp(), data()
    held = calibrated(net, batches, gradients=True)
    plan = tnlayers.compress(net, speed=2, calibration=held, dry_run=True)
    report = tnlayers.compress(net, speed=2, calibration=held)
    assert [row.params for row in plan.rows] == [row.params for row in report.rows]
    assert (plan.params, plan.targeted) == (report.params, report.targeted)


def test_multiples_beyond_break_even_leave_layers_dense():
    net, batches = mlp(widths=(8, 8, 40, 40)), data(width=8)
    report = tnlayers.compress(net, keep=0.7, calibration=calibrated(net, batches), multiple=8)
    kept = {row.name for row in report.rows if row.status == "kept"}
    assert "0" in kept
    assert all(row.ranks[0] % 8 == 0 for row in report.converted)
    with pytest.raises(ValueError, match="expected at least"):
        tnlayers.compress(mlp(), keep=0.7, multiple=64)


def test_odd_weights_and_scales():
    for shape in ((1, 1), (1, 30), (30, 1)):
        net = nn.Sequential(nn.Linear(*shape), nn.Linear(shape[1], 20), nn.Linear(20, 20))
        net[1].weight.data.zero_()
        net[2].weight.data = torch.outer(torch.randn(20), torch.randn(20))  # rank 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            tnlayers.compress(net, keep=0.8, calibration=tnlayers.collect(net, [torch.randn(90, shape[0])]))
        assert torch.isfinite(net(torch.randn(3, shape[0]))).all()
    for scale in (1e-20, 1e20):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(12, 12, bias=False)), torch.randn(100, 12) @ torch.randn(12, 12)
        held = tnlayers.collect(net, [x], gradients=True)
        small = copy.deepcopy(net)
        expected = tnlayers.compress(small, keep=0.5, calibration=held)
        net[0].weight.data *= scale
        report = tnlayers.compress(net, keep=0.5, calibration=tnlayers.collect(net, [x], gradients=True))
        assert report.error == pytest.approx(expected.error, rel=1e-3)
        assert torch.allclose(net[0].weight / scale, small[0].weight, atol=1e-5)
    net = nn.Sequential(nn.Linear(12, 12))
    for bad in (float("nan"), float("inf")):
        net[0].weight.data[0, 0] = bad
        with pytest.raises(ValueError, match="weights must be finite, got NaN or infinity at 0"):
            tnlayers.compress(net, keep=0.5)


def test_a_padding_row_stays_empty():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(40, 12, padding_idx=3), nn.Linear(12, 3))
    tnlayers.compress(net, keep=0.4, calibration=tnlayers.collect(net, [torch.randint(0, 40, (9, 30))], "0"))
    assert net[0].padding_idx == 3
    assert not net[0](torch.tensor([3])).any()
    assert net[0](torch.tensor([4])).any()


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_progress_that_raises_changes_nothing(when):
    net, batches = mlp(), data()
    held, modules = calibrated(net, batches), list(net)
    for options in ({}, {"sequential": True, "batches": batches}):
        seen = []

        def stop(done, total, text, seen=seen):
            seen.append(text)
            if len(seen) == 3 + when + 1:  # after the spectra
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tnlayers.compress(net, keep=0.4, calibration=held, progress=stop, **options)
        assert all(a is b for a, b in zip(net, modules, strict=True))


def test_a_calibration_serves_other_precisions(tmp_path):
    net, batches = mlp(), data()
    held = calibrated(net, batches, gradients=True)
    loaded = tnlayers.Calibration.load(held.save(tmp_path / "held.safetensors"))
    single = copy.deepcopy(net).float()
    one, other = (tnlayers.compress(n, keep=0.5, calibration=loaded) for n in (net, single))
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert [row.ranks for row in one.rows] == [row.ranks for row in other.rows]
    for a, b in zip(net[::2], single[::2], strict=True):
        assert torch.allclose(a.weight.float(), b.weight, atol=1e-5)


def test_compiled_modules_are_refused():
    net, batches = mlp(), data()
    compiled = torch.compile(net, backend="eager")
    held = calibrated(compiled, batches)
    with pytest.raises(ValueError, match="inside a compiled module"):
        tnlayers.compress(compiled, keep=0.5, calibration=held)
