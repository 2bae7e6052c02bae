"""Measured constants and times: stored safely, used from then on, and never by a forward pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tnlayers
from decompositions import TT, LowRank, TTMatrix, Tucker, calibrate, plan_apply
from decompositions.formats import cost
from decompositions.formats.cost import DEFAULT, cache_file, rates_for
from decompositions.measure import merge_floor, time_plans
from tnlayers import layer as layer_module

KEY = ("cpu", "float32")
QUICK = """
import decompositions.measure as m
m._quantile = lambda run, device, **_: (run(), 1e-3)[1]  # the clock is not under test
m._wait_until_quiet = lambda device: None
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a calibration whose clock is fixed."""
    monkeypatch.setenv("TNLAYERS_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "_measured", {})
    monkeypatch.setattr("decompositions.measure._quantile", lambda run, device, **_: (run(), 1e-3)[1])
    monkeypatch.setattr("decompositions.measure._wait_until_quiet", lambda device: None)
    return tmp_path


def test_constants_are_stored_and_found_again(cache):
    assert rates_for(KEY) == DEFAULT
    rates = calibrate("cpu")
    assert rates_for(KEY) == rates != DEFAULT
    assert rates.call == 1e-3
    assert rates.rows[-1] == (1024, 2 * 1024**3 / 1e-3)
    cost._measured.clear()  # a later process
    assert rates_for(KEY) == rates
    assert rates_for(("cpu", "bfloat16")) == rates  # an unmeasured dtype is compared as float32 is
    assert rates_for(("meta", "float32")) == rates
    assert rates_for(("cuda", "float32")) == DEFAULT
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_plans_follow_the_constants_and_are_deterministic(cache):
    net = TTMatrix.random(row_modes=(8, 8), col_modes=(8, 8), rank=8, device="meta")
    before = plan_apply(net, 64)
    cost.remember(KEY, DEFAULT._replace(call=1.0))  # calls are all that counts
    after = plan_apply(net, 64)
    assert after == plan_apply(net, 64)
    assert after[0].calls + len(after[0].backward) == min(plan.calls + len(plan.backward) for plan in after)
    assert {plan.steps for plan in before} & {plan.steps for plan in after}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"machine": "another"}', "MACHINE", "NEGATIVE", "UNSORTED", "EXTRA", "\x00\xff"],
    ids=["empty", "cut", "list", "null", "another machine", "no numbers", "negative", "unsorted", "extra", "binary"],
)
def test_a_damaged_file_counts_as_absent(cache, content):
    calibrate("cpu")
    path = cache_file(KEY)
    data = json.loads(path.read_text())
    changed = {
        "MACHINE": {"machine": data["machine"]},
        "NEGATIVE": {**data, "stream": -1.0},
        "UNSORTED": {**data, "cols": data["cols"][::-1]},
        "EXTRA": {**data, "more": 1.0},
    }
    path.write_bytes(json.dumps(changed[content]).encode() if content in changed else content.encode("latin-1"))
    cost._measured.clear()
    assert rates_for(KEY) == DEFAULT


def test_a_folder_that_cannot_be_written_is_no_error(cache, monkeypatch):
    blocked = cache / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TNLAYERS_CACHE", str(blocked))
    rates = calibrate("cpu")
    assert rates_for(KEY) == rates
    assert [path.name for path in cache.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_nothing(cache, monkeypatch):
    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    calibrate("cpu")
    assert list(cache.iterdir()) == []


def test_two_processes_calibrate_at_once(cache):
    code = QUICK + "m.calibrate('cpu')"
    environment = {**os.environ, "TNLAYERS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["call"] == 1e-3


def test_calibrate_refuses_what_it_cannot_measure(cache, monkeypatch):
    with pytest.raises(ValueError, match=r"must be a real floating type, got torch\.int64"):
        calibrate("cpu", torch.int64)
    with pytest.raises(ValueError, match="complex64"):
        calibrate("cpu", torch.complex64)
    monkeypatch.undo()
    clock = iter([5e-3, 1e-3] * 100)
    monkeypatch.setattr("decompositions.measure._quantile", lambda run, device, **_: next(clock))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    from decompositions.measure import _wait_until_quiet

    with pytest.raises(RuntimeError, match=r"the processor must be idle.*1000 us.*got 5000 us"):
        _wait_until_quiet(torch.device("cpu"), seconds=0.0)


def test_time_plans_measures_the_shortlist_and_keeps_the_network(rng):
    net = Tucker.random(row_modes=(8, 8), col_modes=(8, 8), rank=3, generator=rng)
    copies = [core.clone() for core in net.cores]
    every = plan_apply(net, 16)
    measured = time_plans(net, 16, every, rounds=2)
    assert {plan for plan, _ in measured} == set(every)
    assert [seconds for _, seconds in measured] == sorted(seconds for _, seconds in measured)
    assert all(seconds > 0 for _, seconds in time_plans(net, 16, backward=False))
    assert all(torch.equal(a, b) for a, b in zip(net.cores, copies, strict=True))
    with pytest.raises(ValueError, match="got batch=0"):
        time_plans(net, 0)


def test_the_floor_of_merging():
    net = TTMatrix.random(row_modes=(32, 32), col_modes=(32, 32), rank=64, device="meta")
    assert merge_floor(net, 128) == 1 + 64 / 128
    assert merge_floor(net, 4096) == 1 + 64 / 4096


# --- layers ---

LAYERS = {
    "linear": lambda: tnlayers.Linear(48, 32, network=tnlayers.random_network(TTMatrix, rank=4)),
    "conv": lambda: tnlayers.Conv2d(
        8, 8, 3, padding=1, network=tnlayers.random_network(Tucker, rank=(3, 3), modes=(0, 1))
    ),
    "transposed": lambda: tnlayers.ConvTranspose1d(8, 4, 4, stride=2, network=tnlayers.random_network(TT, rank=3)),
    "bag": lambda: tnlayers.EmbeddingBag(100, 16, mode="sum", network=tnlayers.random_network(TTMatrix, rank=3)),
    "contraction": lambda: tnlayers.TensorContraction((4, 5), (3, 2)),
    "regression": lambda: tnlayers.TensorRegression((4, 5), (3,), network=tnlayers.random_network(Tucker, rank=2)),
    "embedding": lambda: tnlayers.Embedding(100, 16, network=tnlayers.random_network(TTMatrix, rank=3)),
}


@pytest.fixture
def layer(request):
    torch.manual_seed(0)
    made = LAYERS[request.param]()
    if request.param == "conv":
        made._hint_spatial = (8, 8)
    return made


EACH = pytest.mark.parametrize("layer", LAYERS, indirect=True)


@EACH
def test_explain_names_every_plan(layer):
    text = tnlayers.explain(layer, batch=4)
    plans = layer.alternatives(4)
    assert len(plans) > 1
    assert text.splitlines()[0] == repr(layer)
    for plan in plans:
        assert f"{plan.flops:>16,} {plan.kept:>14,}" in text
    assert sum(line.startswith("->") for line in text.splitlines()) >= 1
    assert "measured" not in text
    measured = tnlayers.explain(layer, batch=4, measured=True)
    assert "measured" in measured
    assert layer._forced is None


@EACH
def test_explain_disturbs_nothing(layer):
    state = torch.get_rng_state()
    tnlayers.explain(layer, batch=4, measured=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in layer.parameters())
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        tnlayers.explain(layer, batch=0)


def test_explain_of_something_else(unchecked):
    with pytest.raises(TypeError, match="expected a layer of tnlayers, got Linear"):
        tnlayers.explain(torch.nn.Linear(2, 2))


def test_explain_warns_where_merging_is_slow():
    """The bond is as large as the batch: a merged weight costs twice the dense layer."""
    layer = tnlayers.Linear(64, 64, network=TTMatrix.random(row_modes=(8, 8), col_modes=(8, 8), rank=64))
    layer._forced = None
    merge = next(plan for plan in layer.alternatives(64) if plan.strategy == "merge")
    layer_module.probed[layer._probe_key(64)] = merge
    try:
        text = tnlayers.explain(layer, batch=64)
    finally:
        layer_module.probed.clear()
    assert "merging costs at least 2 times the dense layer at this batch" in text


@EACH
def test_a_probed_plan_is_used_by_equal_layers(layer):
    layer_module.probed.clear()
    chosen = layer.plan(batch=4, probe=True)
    assert chosen in layer.alternatives(4)
    other = layer.alternatives(4)[-1]
    layer_module.probed[layer._probe_key(4)] = other  # whatever was measured wins
    try:
        assert layer.plan(batch=4) == other
        x = layer.example_input(4)
        y = layer(x)
        assert other in layer._plans.values()
    finally:
        layer_module.probed.clear()
    layer.plan(batch=4)
    torch.testing.assert_close(layer(x), y)


@EACH
def test_recomputing_keeps_less_and_changes_nothing(layer):
    layer.double()

    def run():
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            y = layer(x)
        grads = torch.autograd.grad(y, list(layer.parameters()), torch.ones_like(y), allow_unused=True)
        own = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), x]}
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return y, grads, sum(size for pointer, size in kept.items() if pointer not in own)

    x = layer.example_input(6)
    y, grads, kept = run()
    layer.plan(memory="recompute")
    again, others, less = run()
    torch.testing.assert_close(y, again)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b)
    assert less < kept
    with pytest.raises(ValueError, match="memory must be 'keep', 'any' or 'recompute', got 'all'"):
        layer.plan(memory="all")
    with pytest.raises(ValueError, match="batch must be at least 1"):
        layer.plan(probe=True)


def test_cached_folder_is_the_user_s_own(monkeypatch):
    monkeypatch.delenv("TNLAYERS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("base")))
    assert cache_file(KEY).parent == Path("base") / "tnlayers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "home")
    assert cache_file(KEY).parent == Path("home") / ".cache" / "tnlayers"


def test_low_rank_keeps_its_small_result_only():
    net = LowRank.random(row_modes=(256,), col_modes=(256,), rank=8, device="meta")
    assert plan_apply(net, 64)[0].kept < 4 * (3 * 64 * 8 + 2 * 256 * 8)


def test_new_layers_are_made_after_a_probe():
    """A plan is looked up by settings while a layer is still being built: its bias is not there yet."""
    make = tnlayers.random_network(TTMatrix, rank=2, order=2)
    try:
        tnlayers.Linear(16, 16, network=make).plan(batch=4, probe=True)
        assert layer_module.probed
        for bias in (True, False):
            assert (tnlayers.Linear(16, 16, bias, network=make).bias is not None) == bias
            assert (tnlayers.Conv2d(4, 4, 3, bias=bias, network=make).bias is not None) == bias
            assert (tnlayers.TensorContraction((4, 4), (2, 2), bias).bias is not None) == bias
    finally:
        layer_module.probed.clear()


def test_memory_any_takes_the_fastest_predicted_plan():
    net = TTMatrix.random(row_modes=(4, 4, 8, 8), col_modes=(8, 8, 4, 4), rank=(32, 35, 32))
    layer = tnlayers.Linear(1024, 1024, network=net)
    kept = layer.plan(batch=128)
    fastest = layer.plan(memory="any")
    assert fastest.heavy
    assert not kept.heavy
    assert fastest == min(layer.alternatives(128), key=lambda plan: plan.seconds)
    assert layer._plan_for(128) == fastest
    assert layer.plan(memory="keep") == kept
