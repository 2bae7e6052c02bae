"""What a contraction costs on a device: a model with few measured constants, for comparing plans.

seconds = calls x overhead + FLOPs / (rate of a product of that shape) + bytes copied / (rate of such copies).
FLOPs alone mislead: a product with a thin side runs at a fraction of the peak (which side matters), and moving the last
axis of a tensor is an order slower than reading it. The constants below stand in until `calibrate` has measured the
machine's own.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, isfinite, log, prod
from pathlib import Path
from typing import NamedTuple

import torch

from decompositions.formats.contract import batch_letters
from decompositions.formats.network import Labels

Table = tuple[tuple[int, float], ...]


class Rates(NamedTuple):
    """Constants of one device, dtype and number of threads."""

    call: float  # seconds to start one operation
    rows: Table  # FLOP/s of a matrix product (m, k) x (k, n) with n and k large, by m
    depth: Table  # the same by k
    cols: Table  # the same by n, the last axis of the result
    batched: Table  # FLOP/s of products in a batch, by the smallest dimension of one
    stream: float  # bytes/s of reading and writing in order
    blocks: float  # bytes/s of a permuted copy that keeps runs of BLOCK_BYTES together
    scatter: float  # bytes/s of a permuted copy that moves every number on its own


# One CPU class (two cores, float32). Only ratios matter for a choice between plans.
DEFAULT = Rates(
    call=4e-6,
    rows=((1, 36e9), (4, 40e9), (8, 80e9), (16, 110e9), (32, 130e9), (64, 150e9), (256, 185e9), (1024, 200e9)),
    depth=((1, 35e9), (4, 24e9), (8, 48e9), (16, 90e9), (32, 120e9), (64, 150e9), (256, 185e9), (1024, 200e9)),
    cols=((1, 35e9), (4, 20e9), (8, 38e9), (16, 90e9), (32, 120e9), (64, 140e9), (256, 185e9), (1024, 200e9)),
    batched=((1, 8e9), (4, 35e9), (8, 60e9), (16, 80e9), (32, 120e9), (64, 150e9), (256, 180e9)),
    stream=50e9,
    blocks=60e9,
    scatter=4e9,
)


def rate_at(table: Table, size: int) -> float:
    """Read a table of rates between its points, linearly in the logarithms.

    Example:
        >>> round(rate_at(((1, 1e9), (4, 4e9)), 2) / 1e9, 6)
        2.0
    """
    if size <= table[0][0]:
        return table[0][1]
    for (a, low), (b, high) in pairwise(table):
        if size <= b:
            share = log(size / a) / log(b / a)
            return exp((1 - share) * log(low) + share * log(high))
    return table[-1][1]


BLOCK_BYTES = 128
"""Runs of this length are copied at full speed."""


class Cost(NamedTuple):
    """Predicted seconds of one contraction, its FLOPs, and the bytes that have to be copied first."""

    seconds: float
    flops: int
    copied: int


def _is_run(order: Labels, group: Sequence[str], sizes: Mapping[str, int]) -> bool:
    """Whether the labels of a group lie next to each other in memory, in that order (sizes of 1 do not count)."""
    wanted = [label for label in group if sizes[label] > 1]
    if len(wanted) <= 1:
        return True
    real = [label for label in order if sizes[label] > 1]
    start = real.index(wanted[0])
    return real[start : start + len(wanted)] == wanted


def copy_seconds(order: Labels, target: Labels, sizes: Mapping[str, int], itemsize: int, rates: Rates) -> float:
    """Predicted time of a permuted copy; 0 where the order is the same.

    Example:
        >>> copy_seconds(("a", "b"), ("a", "b"), {"a": 2, "b": 3}, 4, DEFAULT)
        0.0
    """
    real = [label for label in order if sizes[label] > 1]
    wanted = [label for label in target if sizes[label] > 1]
    if real == wanted:
        return 0.0
    moved = 2 * itemsize * prod(sizes[label] for label in real)
    block = itemsize  # bytes that stay together
    for mine, other in zip(reversed(real), reversed(wanted), strict=True):
        if mine != other:
            break
        block *= sizes[mine]
    return rates.call + moved / rate_at(((itemsize, rates.scatter), (BLOCK_BYTES, rates.blocks)), block)


class _Layout(NamedTuple):
    batch: Labels
    block: Labels
    summed: Labels


def _operand_seconds(
    order: Labels, layout: _Layout, sizes: Mapping[str, int], itemsize: int, rates: Rates
) -> tuple[float, int]:
    """Time and bytes of bringing an operand into its matrix layout; free where strides allow a view."""
    real = [label for label in order if sizes[label] > 1]
    if not real:
        return 0.0, 0
    inner = real[-1] not in layout.batch
    if inner and all(_is_run(order, group, sizes) for group in layout):
        return 0.0, 0
    target = layout.batch + layout.block + layout.summed
    moved = itemsize * prod(sizes[label] for label in real)
    return max(copy_seconds(order, target, sizes, itemsize, rates), rates.call + moved / rates.blocks), moved


def product_cost(
    left: Labels, right: Labels, out: Labels, sizes: Mapping[str, int], itemsize: int, rates: Rates
) -> Cost:
    """Cost of `contract` for operands that lie in memory in the order of their labels.

    Example:
        >>> sizes = {"b": 64, "j": 32, "r": 8}
        >>> product_cost(("b", "j"), ("j", "r"), ("b", "r"), sizes, 4, DEFAULT).flops == 2 * 64 * 32 * 8
        True
    """
    in_left, in_right = set(left), set(right)
    volume = prod(sizes[label] for label in in_left | in_right)
    flops = 2 * volume
    result = prod(sizes[label] for label in out)
    written = itemsize * result / rates.stream
    p = batch_letters(left, right, out)
    if p is None:
        # torch.einsum: its own order, and a permuted result that somebody copies
        moved = itemsize * (prod(sizes[x] for x in left) + prod(sizes[x] for x in right) + result)
        smallest = max(1, min(result, volume // max(1, result)))
        seconds = 3 * rates.call + flops / rate_at(rates.batched, smallest) + 2 * moved / rates.scatter
        return Cost(seconds, flops, moved)
    prefix, outer = out[:p], set(out)
    summed = tuple(label for label in left if label in in_right and label not in outer)
    block = out[p:]
    blocks = tuple(label for label in block if label in in_left), tuple(label for label in block if label in in_right)
    total, copied = rates.call + written, 0
    for order, own, inside in ((left, blocks[0], in_left), (right, blocks[1], in_right)):
        batch = tuple(label for label in prefix if label in inside)
        seconds, moved = _operand_seconds(order, _Layout(batch, own, summed), sizes, itemsize, rates)
        total, copied = total + seconds, copied + moved
    count = prod(sizes[label] for label in prefix)
    m, n = (prod(sizes[label] for label in own) for own in blocks)
    depth = prod(sizes[label] for label in summed)
    if count > 1:
        total += flops / rate_at(rates.batched, min(m, n, depth))
    else:
        total += flops / min(rate_at(rates.rows, m), rate_at(rates.depth, depth), rate_at(rates.cols, n))
    return Cost(total, flops, copied)


_measured: dict[tuple[str, str, int], Rates | None] = {}


def machine_key(key: tuple[str, str]) -> str:
    """What constants depend on: device, dtype, threads and the version of torch.

    Example:
        >>> machine_key(("cpu", "float32")).startswith("cpu ")
        True
    """
    device, dtype = key
    if device == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()} cores"
    return f"{device} {name}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}"


def cache_file(key: tuple[str, str]) -> Path:
    """File that holds the constants of this machine, under `TNLAYERS_CACHE` or the user's cache folder.

    Example:
        >>> cache_file(("cpu", "float32")).name.startswith("rates-")
        True
    """
    named, shared = os.environ.get("TNLAYERS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    home = Path(os.path.expanduser("~"))
    folder = Path(named) if named else (Path(shared) if shared else home / ".cache") / "tnlayers"
    digest = hashlib.sha256(machine_key(key).encode()).hexdigest()[:16]
    return folder / f"rates-{digest}.json"


def remember(key: tuple[str, str], rates: Rates) -> None:
    """Use these constants from now on in this process."""
    _measured[(*key, torch.get_num_threads())] = rates


def rates_for(key: tuple[str, str] | None) -> Rates:
    """Constants for a (device type, dtype name): measured ones where there are some, else the built-in ones.

    The file is read once a process, so that plans do not change under way. One that is damaged counts as absent.

    Example:
        >>> rates_for(None) is DEFAULT
        True
    """
    if key is None:
        return DEFAULT
    device, dtype = ("cpu" if key[0] == "meta" else key[0]), key[1]
    for name in dict.fromkeys((dtype, "float32")):  # an unmeasured dtype is compared as single precision is
        place = (device, name, torch.get_num_threads())
        if place not in _measured:
            _measured[place] = _load(cache_file((device, name)), machine_key((device, name)))
        found = _measured[place]
        if found is not None:
            return found
    return DEFAULT


def _load(path: Path, machine: str) -> Rates | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("machine") != machine:
            return None
        rows, depth, cols, batched = (
            tuple((int(size), float(rate)) for size, rate in data.pop(k)) for k in ("rows", "depth", "cols", "batched")
        )
        numbers = {name: float(value) for name, value in data.items()}
        rates = Rates(rows=rows, depth=depth, cols=cols, batched=batched, **numbers)
        tables = (rows, depth, cols, batched)
        positive = [*numbers.values(), *(rate for table in tables for _, rate in table)]
        rising = [[size for size, _ in table] for table in tables]
        sound = all(isfinite(x) and x > 0 for x in positive) and all(o and o == sorted(set(o)) for o in rising)
        return rates if sound else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
