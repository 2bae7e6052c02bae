"""What a model costs: throughput, and the peak of memory of any piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.calling import call, device_of, evaluating, to_device

SELF = Path("/proc/self")
SAMPLE_SECONDS = 0.001
LEAST_CALLS = 3


@dataclass(frozen=True)
class Throughput:
    """Speed of one batch, called again and again.

    Args:
        seconds: median of a call.
        low: lower quartile.
        high: upper quartile.
        calls: calls measured.
        samples: rows of the batch.
        tokens: tokens that are not padding; None if the batch holds none.
        threads: CPU threads of torch.
        dtype: of the parameters, "float32".
        device: "cpu", "cuda:0".

    Example:
        >>> found = Throughput(0.5, 0.4, 0.6, 7, samples=4, tokens=100, threads=2, dtype="float32", device="cpu")
        >>> print(found)
        200 tokens/s (500 ms a batch of 4, quartiles 400 to 600 ms, 7 calls; 2 threads, float32, cpu)
    """

    seconds: float
    low: float
    high: float
    calls: int
    samples: int
    tokens: int | None
    threads: int
    dtype: str
    device: str

    @property
    def rate(self) -> float:
        """Tokens a second, samples a second where there are no tokens."""
        return (self.samples if self.tokens is None else self.tokens) / self.seconds

    @property
    def unit(self) -> str:
        """What `rate` counts."""
        return "samples/s" if self.tokens is None else "tokens/s"

    def __str__(self) -> str:
        return (
            f"{self.rate:.4g} {self.unit} ({1e3 * self.seconds:.4g} ms a batch of {self.samples}, quartiles "
            f"{1e3 * self.low:.4g} to {1e3 * self.high:.4g} ms, {self.calls} calls; {self.threads} threads, "
            f"{self.dtype}, {self.device})"
        )


@dataclass(frozen=True)
class PeakMemory:
    """Peak of memory above what was held before, in bytes, and how it was found.

    Args:
        bytes: peak less what was held at the beginning.
        before: held at the beginning.
        method: what was measured, in words.

    Example:
        >>> print(PeakMemory(3 << 20, 0, "allocated by torch on cuda:0"))
        3 MiB (allocated by torch on cuda:0)
    """

    bytes: int
    before: int
    method: str

    def __str__(self) -> str:
        return f"{self.bytes / 2**20:.4g} MiB ({self.method})"


def throughput(
    model: nn.Module, batch: Any, *, seconds: float | int = 3, warmup: int = 3, threads: int | None = None
) -> Throughput:
    """Median time of a call, in evaluation mode without gradients; a GPU is waited for at each call.

    Args:
        model: called as in `embeddings`.
        batch: one batch (a tensor, a tuple, a dict of keyword arguments).
        seconds: measure at least that long, and at least 3 calls.
        warmup: calls before the clock starts.
        threads: CPU threads meanwhile; None: torch's number. It is set back afterwards.

    Raises:
        ValueError: seconds < 0, warmup < 0, threads < 1, or a batch without tensors.

    Example:
        >>> throughput(nn.Linear(4, 4), torch.ones(8, 4), seconds=0, warmup=0).samples
        8
    """
    if not (math.isfinite(seconds) and seconds >= 0) or warmup < 0 or (threads is not None and threads < 1):
        raise ValueError(
            f"throughput: expected seconds >= 0, warmup >= 0, threads >= 1, got {seconds}, {warmup}, {threads}"
        )
    samples, tokens = _size(batch)
    device = device_of(model)
    batch = to_device(batch, device)
    times: list[float] = []
    with evaluating(model), _threads(threads):
        used = torch.get_num_threads()
        for _ in range(warmup):
            call(model, batch)
        _wait(device)
        start = now = time.perf_counter()
        while now - start < seconds or len(times) < LEAST_CALLS:
            call(model, batch)
            _wait(device)
            then, now = now, time.perf_counter()
            times.append(now - then)
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = str(torch.get_default_dtype() if parameter is None else parameter.dtype).removeprefix("torch.")
    return Throughput(
        float(middle), float(low), float(high), len(times), samples, tokens, used, dtype, str(device)
    )  # fmt: skip


def peak_memory(work: Callable[[], object], *, device: torch.device | str = "cpu") -> PeakMemory:
    """Run `work` once and measure how far memory grows above what is held before.

    On a GPU: bytes allocated by torch there. On the CPU: resident memory of this process, by the kernel's own
    high-water mark where Linux lets a process reset it (so that no spike is missed), else sampled every millisecond,
    else the growth of the highest mark so far (`getrusage`). Free memory that the allocator holds would be used again
    without growth; with glibc it is handed back first, elsewhere the number is a lower bound: compare fresh processes.

    Args:
        work: called without arguments; its result is thrown away, its exceptions pass.
        device: where it allocates.

    Returns:
        Bytes, and the method.

    Raises:
        ValueError: a device other than the CPU or CUDA.

    Example:
        >>> peak_memory(lambda: torch.ones(1 << 20)).bytes >= 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _on_gpu(work, device)
    if device.type != "cpu":
        raise ValueError(f"peak_memory: expected device cpu or cuda, got {device}")
    gc.collect()
    _trim()
    for measure in (_high_water, _sampled):
        found = measure(work)
        if found is not None:
            return found
    return _highest(work)


def _on_gpu(work: Callable[[], object], device: torch.device) -> PeakMemory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return PeakMemory(peak - before, before, f"allocated by torch on {device}")


def _trim() -> None:
    """Give free memory back to the kernel (glibc alone can)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _high_water(work: Callable[[], object]) -> PeakMemory | None:
    """The kernel's mark; None (before any work) where it cannot be reset or does not say."""
    try:
        (SELF / "clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _status("VmHWM")
    except (OSError, KeyError, ValueError):
        return None
    work()
    return PeakMemory(max(0, _status("VmHWM") - before), before, "growth of resident memory, the kernel's peak")


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in (SELF / "status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _sampled(work: Callable[[], object]) -> PeakMemory | None:
    """Resident memory seen by a thread; None (before any work) where /proc does not tell it."""
    try:
        before = _resident()
    except (OSError, ValueError, IndexError):
        return None
    peak, stop = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(SAMPLE_SECONDS):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
        peak = max(peak, _resident())
    finally:
        stop.set()
        watcher.join()
    return PeakMemory(peak - before, before, "growth of resident memory, sampled every millisecond")


def _resident() -> int:
    return int((SELF / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _highest(work: Callable[[], object]) -> PeakMemory:
    try:
        import resource
    except ImportError as error:
        raise ImportError("peak_memory: this system tells no resident memory; measure on Linux or macOS") from error

    unit = 1 if sys.platform == "darwin" else 1024

    def mark() -> int:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit

    before = mark()
    work()
    return PeakMemory(mark() - before, before, "growth of the highest resident memory so far, getrusage")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def _size(batch: Any) -> tuple[int, int | None]:
    """Samples, and tokens that are not padding (None for a batch without token ids)."""
    named = batch if isinstance(batch, dict) else {}
    parts = batch.values() if named else batch if isinstance(batch, tuple | list) else [batch]
    first = next((part for part in parts if isinstance(part, Tensor) and part.ndim), None)
    if first is None:
        raise ValueError(f"throughput: expected a batch that holds a tensor, got {type(batch).__name__}")
    ids = named.get("input_ids", first)
    if ids.is_floating_point() or ids.is_complex() or ids.ndim != 2:
        return len(first), None
    mask = named.get("attention_mask")
    return len(ids), int((mask != 0).sum()) if mask is not None and mask.ndim == 2 else ids.numel()
