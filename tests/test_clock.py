"""Where the time of a job goes."""

import time

from tnlayers.clock import Clock


def test_every_moment_belongs_to_one_phase(monkeypatch):
    moments = iter([10.0, 11.0, 13.0, 17.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = Clock()
    assert clock.seconds == {}
    for phase in ("open", "measure", "open"):
        clock.lap(phase)
    assert clock.seconds == {"open": 5.0, "measure": 2.0}
    assert sum(clock.seconds.values()) == 17.0 - 10.0
