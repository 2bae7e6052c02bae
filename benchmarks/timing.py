"""How everything here is timed: candidates in turn with their reference, in several processes, on a quiet machine.

A candidate call stands between two calls of the reference in the same process, so that both see the same machine. The
20th percentile of candidate over that of the reference is the figure (interference only adds, and adds more to longer
calls); the median of paired ratios stands beside it. A probe holds a round back while other work keeps the cores busy.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tnlayers.files import write_atomic
from tnlayers.main_job.config import hardware_facts

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], object]


def low(values: Sequence[float]) -> float:
    """20th percentile."""
    return sorted(values)[len(values) // 5]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Call) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


class Gate:
    """Holds a round back while a small parallel product takes much longer than it did at its best."""

    def __init__(self) -> None:
        self.a = torch.rand(384, 384)
        self.best = min(seconds(self.probe) for _ in range(50))
        self.held = 0

    def probe(self) -> object:
        return torch.mm(self.a, self.a)

    def pass_through(self, patience: float = 20.0) -> None:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            now = statistics.median(seconds(self.probe) for _ in range(5))
            self.best = min(self.best, now)
            if now < 2 * self.best:
                return
            self.held += 1
            time.sleep(0.05)


def compare(
    reference: Call, candidates: dict[str, Call], gate: Gate, *, budget: float = 6.0, least: int = 7, most: int = 60
) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of the reference, and for every candidate `ratio` (20th percentiles), `median` of pairs and `seconds`."""
    found, bases = {}, []
    for name, call in candidates.items():  # one by one: both operands of a comparison are as warm in the caches
        for warm in (reference, call, reference, call):
            warm()
        base: list[float] = []
        times: list[float] = []
        pairs: list[float] = []
        start = time.monotonic()
        before = seconds(reference)
        while len(times) < least or (time.monotonic() - start < budget / len(candidates) and len(times) < most):
            gate.pass_through()
            now = seconds(call)
            after = seconds(reference)
            base.append(after)
            times.append(now)
            pairs.append(2 * now / (before + after))
            before = after
        bases.append(low(base))
        found[name] = {
            "ratio": low(times) / low(base),
            "median": statistics.median(pairs),
            "seconds": low(times),
        }
    return statistics.median(bases), found


def gemm_rate(size: int = 2048) -> float:
    """GFLOP/s of a large square product: what the FLOPs of a layer can be held against."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    torch.mm(a, b)
    return 2 * size**3 / low([seconds(lambda: torch.mm(a, b)) for _ in range(7)]) / 1e9


def in_processes(script: str, arguments: Sequence[str], count: int) -> list[Any]:
    """Run `script --one` several times and read the JSON on the last line of what each prints."""
    found = []
    for k in range(count):
        command = [sys.executable, script, "--one", *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ})
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"process {k + 1} of {count} done", file=sys.stderr, flush=True)
    return found


def median_of(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def publish(name: str, title: str, table: str, rows: Any, notes: Sequence[str]) -> None:
    """Print, and write results/NAME.json and results/NAME.md."""
    facts = hardware_facts()
    foot = (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    text = "\n\n".join([f"# {title}", table, *notes, foot]) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    write_atomic(RESULTS / f"{name}.json", json.dumps({"rows": rows, "hardware": facts}, indent=1) + "\n")
    write_atomic(RESULTS / f"{name}.md", text)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
