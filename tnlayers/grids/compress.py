"""`tnlayers grid compress`: open, decompose, code, write, read back, measure, draw."""

from dataclasses import dataclass, field, fields
from math import isfinite, prod
from pathlib import Path
from typing import Any, Literal, cast

import torch

from cross_approx import CrossResult, Quantization, Source
from cross_approx.digits import Order
from decompositions.formats.network import Network
from decompositions.progress import Progress
from tnlayers.clock import Clock
from tnlayers.grids.coding import CODINGS, Coded
from tnlayers.grids.fitting import SHARE, fit_bytes, fit_error
from tnlayers.grids.making import DENSE_BYTES, FORMATS, METHODS, chosen_method, make_network, rank_for_bytes
from tnlayers.grids.measures import Measures, compare_grid, statistics, tolerance_of_psnr
from tnlayers.grids.opening import open_grid_source, stored_bytes, stored_dtype
from tnlayers.grids.store import MARKS, PAGE_FILE, Grid, grid_folder, load_grid, plain, write_about, write_grid
from tnlayers.pretrained.folder import free_target

TARGETS = ("tol", "psnr", "bytes")
ORDERS = ("auto", "C", "F", "interleaved")
WHOLE = 1 << 26
"""Grids of at most so many entries are verified on all of them."""
SAMPLE = 20_000
"""Entries that larger ones are verified on."""
ATTEMPTS = 4
MARGIN = 0.98


class TargetMissed(Exception):
    """The file does not meet the error it was made for, as measured on the file; what was made is kept elsewhere."""


@dataclass(frozen=True)
class GridConfig:
    """What `tnlayers grid compress` is told.

    Args:
        source: path of the grid, see `open_grid_source`.
        out: folder to write.
        format: "tucker", "tt" or "qtt".
        tol: relative Frobenius error to be met.
        psnr: instead: dB over the range of the data.
        bytes: instead: size of the file of numbers at most.
        method: "dense", "gram", "sketch", "cross" or "auto".
        coding: "none" (float32 cores), "int8" or "planes".
        name: of the array in a file that holds several.
        rank: cap of every bond.
        order: of the digits of a quantized train.
        max_evals: entries that a cross asks for at most.
        max_bytes: that it reads.
        max_seconds: that it takes.
        fill_value: stored number that means missing.
        missing: value of missing entries.
        background: value that is not foreground.
        verify: "auto", "full", "sample", or a number of entries.
        memory: bytes of a grid that method auto reads whole.
        cache: bytes of chunks that are kept.
        seed: of samples and sketches.
        overwrite: replace a grid that is there.

    Raises:
        ValueError: settings that contradict each other.

    Example:
        >>> GridConfig("volume.npy", Path("small"), tol=0.05).coding
        'planes'
    """

    source: str
    out: Path
    format: str = "tucker"
    tol: float | None = None
    psnr: float | None = None
    bytes: int | None = None
    method: str = "auto"
    coding: str = "planes"
    name: str | None = None
    rank: int | None = None
    order: str = "auto"
    max_evals: int | None = None
    max_bytes: int | None = None
    max_seconds: float | None = None
    fill_value: float | None = None
    missing: float | None = None
    background: float = 0.0
    verify: str = "auto"
    memory: int = DENSE_BYTES
    cache: int = 1 << 28
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            told = ", ".join(f"--{name}" for name in given) or "none"
            raise ValueError(f"grid compress: give exactly one of --tol, --psnr, --bytes, got {told}")
        value = getattr(self, given[0])
        if not (isfinite(value) and value > 0) or (given[0] == "tol" and value >= 1):
            limit = "between 0 and 1" if given[0] == "tol" else "above 0"
            raise ValueError(f"grid compress: --{given[0]} must be {limit}, got {value}")
        words = (("format", FORMATS), ("method", METHODS), ("coding", CODINGS), ("order", ORDERS))
        for name, known in words:
            if getattr(self, name) not in known:
                raise ValueError(
                    f"grid compress: --{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name in ("rank", "max_evals", "max_bytes", "max_seconds", "memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"grid compress: --{name.replace('_', '-')} must be above 0, got {value}")
        if self.order != "auto" and self.format != "qtt":
            raise ValueError(f"grid compress: --order is for --format qtt, got {self.format}; leave it out")
        if self.method == "sketch" and self.rank is None and self.bytes is None:
            raise ValueError(
                "grid compress: --method sketch needs --rank (or --bytes), got neither; gram takes --tol alone"
            )
        if self.verify not in ("auto", "full", "sample") and not (self.verify.isdigit() and int(self.verify) > 0):
            raise ValueError(f"grid compress: --verify must be auto, full, sample or a number, got {self.verify!r}")
        if self.out.exists() and Path(self.source).exists() and self.out.resolve() == Path(self.source).resolve():
            raise ValueError(f"grid compress: --out must not be the source itself, got {self.out}; give another folder")
        free_target("grid compress", self.out, self.overwrite, MARKS)

    @property
    def target(self) -> tuple[str, float]:
        """Which of the three, and its value."""
        return next((name, getattr(self, name)) for name in TARGETS if getattr(self, name) is not None)


@dataclass
class GridResult:
    """What `tnlayers grid compress` did.

    Args:
        folder: that was written.
        grid: as read back.
        measures: of the file, against the source.
        about: what `grid.json` holds.
        seconds: by phase.
    """

    folder: Path
    grid: Grid
    measures: Measures
    about: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"folder": str(self.folder), **plain(self.about)}

    def text(self) -> str:
        """For people."""
        from tnlayers.grids.info import describe

        return describe(self.grid, self.about)


def run(config: GridConfig, progress: Progress | None = None) -> GridResult:
    """Compress a grid into a folder, and verify the target on the file as it is read back.

    Where the file misses the error, coding and cuts are tightened, and where the network itself is too far off it is
    made again, 4 times at most. The folder takes its name only when the target is met; else TargetMissed is raised and
    the last file is kept as OUT.missed (unless something else has that name).
    Memory: method dense a few times the grid; the others a few chunks and the network.

    Raises:
        TargetMissed: with the target and what was achieved.
        ValueError: a source or settings that do not fit.
        FileNotFoundError: no such source.
    """
    clock = Clock()
    source = open_grid_source(
        "grid compress", config.source, name=config.name, fill_value=config.fill_value, missing=config.missing,
        cache_bytes=config.cache,
    )  # fmt: skip
    method = chosen_method(source, config.format, config.method, config.memory)
    job = _Job(config, source, method, progress, clock)
    with grid_folder(config.out, config.overwrite) as temporary:
        result, met = job.written(temporary)
        if met:
            return GridResult(config.out, result.grid, result.measures, result.about, clock.seconds)
        kept = _kept(config.out, temporary)
        where = f"; what was made is kept as {kept}" if kept else ""
        raise TargetMissed(f"{job.verdict(result.measures)}{where}")


def _kept(out: Path, temporary: Path) -> Path | None:
    """A copy of the folder under the name OUT.missed, where that is free or an earlier one."""
    other = out.with_name(f"{out.name}.missed")
    try:
        with grid_folder(other, True) as place:
            for file in temporary.iterdir():
                (place / file.name).write_bytes(file.read_bytes())
    except (ValueError, OSError):
        return None
    return other


@dataclass
class _Attempt:
    grid: Grid
    measures: Measures
    about: dict[str, Any]


class _Job:
    """A source on its way to a file."""

    def __init__(
        self, config: GridConfig, source: Source, method: str, progress: Progress | None, clock: Clock
    ) -> None:
        self.config, self.source, self.method, self.progress, self.clock = config, source, method, progress, clock
        self.generator = torch.Generator().manual_seed(config.seed)
        self.kind, self.value = config.target
        self.limits = {name: getattr(config, name) for name in ("max_evals", "max_bytes", "max_seconds")}
        self.read: dict[str, int] = {}

    def written(self, folder: Path) -> tuple[_Attempt, bool]:
        """Try until the file meets the target; the files of the last attempt are in the folder."""
        tol = self.tolerance()
        aim, made = tol, None
        attempt = None
        for number in range(ATTEMPTS):
            if made is None:
                made = self.network(aim)
            result, quantization = made
            stored, promised = self.fitted(result, quantization, aim)
            attempt = self.file(folder, result, quantization, stored, promised)
            achieved = attempt.measures.relative_error
            if tol is None or self.met(attempt.measures):
                self.page(folder, attempt)
                return attempt, True
            assert aim is not None
            aim *= MARGIN * min(1.0, tol / achieved)
            if not result.error < 0.95 * aim:
                if self.method != "dense" and any(self.limits.values()):
                    break  # a limit was given: the best within it has been measured
                made = None
            if number and achieved > 3 * tol:
                break
        assert attempt is not None
        self.page(folder, attempt)
        return attempt, False

    def tolerance(self) -> float | None:
        """The relative error that the target means; None for a size."""
        if self.kind == "bytes":
            return None
        if self.kind == "tol":
            return self.value
        sampled = SAMPLE if self.method == "cross" else None
        found = statistics(self.source, entries=sampled, generator=self.generator, progress=self.progress)
        self.clock.lap("range")
        tol = tolerance_of_psnr(self.value, found.low, found.high, found.norm**2 / found.entries)
        if not tol > 0:
            raise ValueError(f"grid compress: --psnr needs data with a range, got {found.low} alone; give --tol")
        return min(tol, 0.999)

    def network(self, aim: float | None) -> tuple[CrossResult, Quantization | None]:
        """The network, a little closer than the target where coding needs room."""
        config = self.config
        share = 1.0 if config.coding == "none" else SHARE**0.5 if config.coding == "planes" else 0.5
        rank = config.rank
        if self.kind == "bytes":
            most = rank_for_bytes(self.source.shape, config.format, config.coding, int(self.value))
            rank = most if rank is None else min(rank, most)
        before = self.source.evaluations, self.source.chunks_read, self.source.bytes_read
        made = make_network(
            self.source, config.format, self.method, tol=None if aim is None else 0.999 * share * aim, rank=rank,
            order=cast(Order | Literal["auto"], config.order), limits=self.limits, generator=self.generator,
            progress=self.progress,
        )  # fmt: skip
        self.read = {
            "evaluations": self.source.evaluations - before[0],
            "chunks_read": self.source.chunks_read - before[1],
            "bytes_read": self.source.bytes_read - before[2],
        }
        self.clock.lap("decompose")
        return made

    def fitted(
        self, result: CrossResult, quantization: Quantization | None, aim: float | None
    ) -> tuple[Network | Coded, float]:
        """What is stored, and the error aimed at."""
        config, net = self.config, result.network
        try:
            if aim is None:
                return fit_bytes(
                    net,
                    result.error,
                    int(self.value),
                    config.coding,
                    shape=self.source.shape,
                    quantization=quantization,
                )
            if result.error < 0.999 * aim:
                return fit_error(net, result.error, aim, config.coding), aim
            # the network alone misses the target: it is stored with little more, measured, and the job says so
            return fit_error(net, 0.0, 0.1 * aim, "none" if config.coding == "none" else "planes"), aim
        finally:
            self.clock.lap("code")

    def file(
        self,
        folder: Path,
        result: CrossResult,
        quantization: Quantization | None,
        stored: Network | Coded,
        promised: float,
    ) -> _Attempt:
        """Write, read back, measure."""
        shape = self.source.shape
        about = self.about(result, promised)
        write_grid(folder, stored, shape=shape, quantization=quantization, about=about)
        grid = load_grid(folder)
        self.clock.lap("write")
        entries = {"full": None, "sample": SAMPLE}.get(self.config.verify, 0)
        if entries == 0:
            every = prod(shape) <= WHOLE and (self.method != "cross" or prod(shape) <= WHOLE // 16)
            entries = int(self.config.verify) if self.config.verify.isdigit() else None if every else SAMPLE
        measures = compare_grid(
            self.source, grid, background=self.config.background, entries=entries,
            generator=torch.Generator().manual_seed(self.config.seed + 1), progress=self.progress,
        )  # fmt: skip
        self.clock.lap("verify")
        about = {**grid.about, "measured": measures.to_dict(), "seconds": dict(self.clock.seconds)}
        about["target"]["met"] = self.met(measures)
        about["ratio"] = about["source"]["bytes"] / grid.nbytes
        write_about(folder, about)
        return _Attempt(grid, measures, about)

    def met(self, measures: Measures) -> bool:
        """Whether the file meets the target, by what was measured on it."""
        if self.kind == "tol":
            return measures.relative_error <= self.value
        return self.kind == "bytes" or measures.psnr >= self.value

    def verdict(self, measures: Measures) -> str:
        """Target and what was achieved."""
        achieved = f"{measures.relative_error:.4g}" if self.kind == "tol" else f"{measures.psnr:.2f} dB"
        asked = f"--tol {self.value:g}" if self.kind == "tol" else f"--psnr {self.value:g}"
        where = "all entries" if measures.whole else f"{measures.entries} entries"
        return f"grid compress: {asked} was missed, measured on {where} of the file: {achieved}"

    def about(self, result: CrossResult, promised: float) -> dict[str, Any]:
        """How the grid was made."""
        config, source = self.config, self.source
        return {
            "source": {
                "path": config.source, "name": config.name, "shape": source.shape, "dtype": stored_dtype(source),
                "bytes": stored_bytes(source), "chunks": source.chunks,
            },
            "settings": {f.name: getattr(config, f.name) for f in fields(config)},
            "method": self.method, "target": {"kind": self.kind, "value": self.value}, "promised": promised,
            "network_error": result.error, "held_out": result.held_out, "reason": result.reason,
            "read": self.read | {"hit_rate": source.hit_rate},
        }  # fmt: skip

    def page(self, folder: Path, attempt: _Attempt) -> None:
        """The page beside the numbers."""
        from tnlayers.grids.page import grid_page

        (folder / PAGE_FILE).write_text(grid_page(attempt.grid, attempt.about, self.source), encoding="utf-8")
        self.clock.lap("page")
