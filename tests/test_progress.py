"""`progress=` of whatever searches, passes or trains: a bar on stderr, nothing, or the caller's own."""

import sys
import threading

import numpy as np
import pytest
import torch

from cross_approx import (
    PassError,
    differentiable_cross,
    qtt_cross,
    read_boxes,
    tt_cross,
    tt_gram,
    tt_sketch,
    ttm_cross,
    tucker_cross,
    tucker_gram,
    tucker_sketch,
)
from cross_approx.sources.chunked import ChunkedSource, regular
from decompositions import to_dense
from decompositions.progress import reporting

F64 = torch.float64


def bars(seconds: float = 10) -> list[threading.Thread]:
    """Threads that redraw a bar; one that was told to end is given time for it."""
    found = [thread for thread in threading.enumerate() if type(thread).__module__.startswith("rich")]
    for thread in found:
        thread.join(seconds)
    return [thread for thread in found if thread.is_alive()]


def function(index):
    return 1 / (1 + index.double().sum(1))


def generator():
    return torch.Generator().manual_seed(0)


GRID = torch.rand(6, 5, 4, dtype=F64, generator=generator())
WORK = {
    "tt_cross": lambda f, **o: tt_cross(f, shape=(6, 5, 4), tol=1e-6, generator=generator(), **o),
    "tucker_cross": lambda f, **o: tucker_cross(f, shape=(6, 5, 4), tol=1e-6, generator=generator(), **o),
    "ttm_cross": lambda f, **o: ttm_cross(f, shape=(8, 9), order=2, tol=1e-6, generator=generator(), **o),
    "qtt_cross": lambda f, **o: qtt_cross(f, shape=(8, 16), tol=1e-6, generator=generator(), **o),
    "differentiable_cross": lambda f, **o: differentiable_cross(
        f, shape=(6, 5, 4), tol=1e-6, generator=generator(), **o
    ),
    "tucker_gram": lambda f, **o: tucker_gram(f, shape=(6, 5, 4), tol=1e-6, box_bytes=200, **o),
    "tt_gram": lambda f, **o: tt_gram(f, shape=(6, 5, 4), tol=1e-6, box_bytes=200, **o),
    "tucker_sketch": lambda f, **o: tucker_sketch(f, 2, shape=(6, 5, 4), box_bytes=200, generator=generator(), **o),
    "tt_sketch": lambda f, **o: tt_sketch(f, 2, shape=(6, 5, 4), box_bytes=200, generator=generator(), **o),
}


@pytest.mark.parametrize("name", WORK)
def test_a_bar_nothing_or_a_callable(name, capfd):
    """The result is the same bit for bit; the bar shows the last text that a callable is told."""
    lines = []
    told = WORK[name](function, progress=lambda *line: lines.append(line))
    quiet = [WORK[name](function, progress=progress) for progress in (False, None)]
    assert capfd.readouterr() == ("", "")
    drawn = WORK[name](function, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert lines[-1][2][:12] in err
    assert err.count("%") >= 1
    assert bars() == []
    assert all(1 <= done <= whole for done, whole, _ in lines)
    for result in (*quiet, drawn):
        assert torch.equal(to_dense(result.network), to_dense(told.network))
        assert result.evaluations == told.evaluations


@pytest.mark.parametrize("progress", [1, 0, "yes", [print], object()], ids=["1", "0", "text", "list", "object"])
@pytest.mark.parametrize("name", WORK)
def test_anything_else_is_refused_before_an_entry_is_asked_for(name, progress, unchecked):
    asked = []

    def seen(index):
        asked.append(index)
        return function(index)

    with pytest.raises(TypeError, match="progress must be True, False or a callable, got"):
        WORK[name](seen, progress=progress)
    assert asked == []


def test_every_pass_has_its_own_bar(capfd):
    lines = []
    tt_sketch(GRID, 2, box_bytes=200, generator=generator(), progress=lambda *line: lines.append(line))
    last = {text.partition(":")[0]: (done, whole) for done, whole, text in lines}
    assert len(last) == 2
    assert all(done == whole for done, whole in last.values())
    tt_sketch(GRID, 2, box_bytes=200, generator=generator(), progress=True)
    err = capfd.readouterr().err
    assert err.count("100%") == 2
    assert all(text in err for text in last)


class Broken(ChunkedSource):
    """Its last chunk cannot be read."""

    def __init__(self):
        super().__init__((4, 4), F64, regular((4, 4), (2, 2)), retries=0)

    def _read(self, key, region):
        if key == (1, 1):
            raise OSError("disk on fire")
        return np.ones((2, 2))


def test_the_bar_ends_with_the_work_however_that_ends(capfd):
    with pytest.raises(PassError):
        tucker_gram(Broken(), rank=1, box_bytes=1, progress=True)
    assert bars() == []
    with pytest.raises(PassError):
        list(read_boxes(Broken(), box_bytes=1, progress=True))
    assert bars() == []
    left = read_boxes(GRID, box_bytes=200, progress=True)
    next(left)
    next(left)
    assert len(bars(seconds=0.3)) == 1
    left.close()
    assert bars() == []

    def fails(index):
        if len(index) > 1:
            raise ArithmeticError
        return function(index)

    with pytest.raises(ArithmeticError):
        tucker_cross(fails, shape=(6, 5, 4), progress=True)
    assert bars() == []
    with reporting("work", True) as report, pytest.raises(ZeroDivisionError):
        report(1, 1 // 0, "")
    assert bars() == []
    assert capfd.readouterr().out == ""


def test_texts_are_shown_as_they_are(capfd):
    """Square brackets are no markup, an unknown number in all is no division by zero."""
    with reporting("work", True) as report:
        report(1, 0, "layer [red]w[0]")
        report(3, 4, "layer [bold]w[1]")
    err = capfd.readouterr().err
    assert "layer [bold]w[1]" in err
    assert "75%" in err


def test_without_rich_a_bar_is_refused_and_nothing_else(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"^tt_cross: progress=True draws its bar with rich.*pip install rich"):
        tt_cross(function, shape=(6, 5, 4), progress=True)
    seen = []
    assert tt_cross(function, shape=(6, 5, 4), progress=lambda *line: seen.append(line)).converged
    assert seen
