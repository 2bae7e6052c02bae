"""Throughput by a clock of our own, and peaks of memory that are known."""

import math
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from tiny import SENTENCES, Encoder, Words, stop
from torch import nn

from tnlayers.evaluation import resources
from tnlayers.evaluation.resources import peak_memory, throughput
from tnlayers.texts import batches


def test_throughput_counts(monkeypatch):
    seconds = iter([0, 1, 3, 4, 14, 15])  # the start, then the end of every call
    monkeypatch.setattr(resources, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    calls = []

    class Watched(nn.Linear):
        def forward(self, x):
            calls.append((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
            return super().forward(x)

    model, before = Watched(3, 3), torch.get_num_threads()
    found = throughput(model, torch.ones(5, 3), seconds=15, warmup=2, threads=2)
    assert calls == [(False, False, 2)] * (2 + 5)
    assert model.training
    assert torch.get_num_threads() == before
    assert (found.low, found.seconds, found.high) == (1, 1, 2)  # of 1, 2, 1, 10, 1
    assert (found.calls, found.samples, found.tokens, found.threads, found.rate) == (5, 5, None, 2, 5)
    assert (found.dtype, found.device, found.unit) == ("float32", "cpu", "samples/s")
    seconds = iter(range(9))
    assert throughput(model, torch.ones(5, 3), seconds=0, warmup=0).calls == 3


def test_throughput_counts_tokens_that_are_no_padding():
    (batch,) = batches(SENTENCES, Words())
    found = throughput(Encoder(dtype=torch.bfloat16), batch, seconds=0, warmup=0)
    assert (found.samples, found.tokens, found.dtype) == (6, int(batch["attention_mask"].sum()), "bfloat16")
    assert found.rate == found.tokens / found.seconds
    assert "tokens/s" in str(found)
    assert throughput(nn.Embedding(4, 2), torch.ones(2, 3, dtype=torch.int64), seconds=0, warmup=0).tokens == 6


def test_throughput_restores_after_an_error_and_refuses():
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("broken")

    model, before = Fails(1, 1), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        throughput(model, torch.ones(1, 1), threads=2)
    assert model.training
    assert torch.get_num_threads() == before
    for options in ({"seconds": -1}, {"seconds": math.nan}, {"warmup": -1}, {"threads": 0}):
        with pytest.raises(ValueError, match="expected seconds >= 0, warmup >= 0, threads >= 1"):
            throughput(nn.Linear(1, 1), torch.ones(1, 1), **options)
    with pytest.raises(ValueError, match="holds a tensor, got list"):
        throughput(nn.Linear(1, 1), [])


@pytest.mark.parametrize("measure", [resources._high_water, resources._sampled])
def test_peak_memory_finds_what_was_there_for_a_moment(measure):
    def work():
        block = torch.ones(16 << 20)
        del block

    resources._trim()
    found = measure(work)
    if found is None:
        pytest.skip("this system does not tell")
    if measure is resources._high_water:
        assert 0.9 * (64 << 20) < found.bytes < 1.3 * (64 << 20)
    assert found.bytes < 1.3 * (64 << 20)
    assert found.before > 0


def test_peak_memory_falls_back_and_says_so(monkeypatch, tmp_path):
    assert "kernel's peak" in peak_memory(lambda: None).method or sys.platform != "linux"
    monkeypatch.setattr(resources, "_high_water", lambda work: None)
    assert "sampled" in peak_memory(lambda: None).method or sys.platform != "linux"
    monkeypatch.undo()
    monkeypatch.setattr(resources, "SELF", tmp_path / "none")
    ran = []
    assert "getrusage" in peak_memory(lambda: ran.append(1)).method
    assert ran == [1]  # once, whatever the method
    with pytest.raises(ValueError, match="device cpu or cuda, got meta"):
        peak_memory(lambda: None, device="meta")


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_getrusage_counts_kilobytes_except_on_a_mac(monkeypatch, platform, unit):
    import resource

    marks = iter([SimpleNamespace(ru_maxrss=100), SimpleNamespace(ru_maxrss=130)])
    monkeypatch.setattr(resource, "getrusage", lambda who: next(marks))
    monkeypatch.setattr(sys, "platform", platform)
    found = resources._highest(lambda: None)
    assert (found.bytes, found.before) == (30 * unit, 100 * unit)


@pytest.mark.parametrize("measure", [resources._high_water, resources._sampled, resources._highest])
def test_exceptions_pass_through_peak_memory(measure):
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        measure(stop)
    assert threading.active_count() == before
