"""`tnlayers compress`: open, calibrate, choose, replace, recover, measure before and after, save."""

import copy
import dataclasses
import glob
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decompositions.progress import Progress
from tnlayers.calling import hidden_of, to_device
from tnlayers.clock import Clock
from tnlayers.compression.baselines import METHODS
from tnlayers.compression.calibration import Calibration
from tnlayers.compression.candidates import check_formats
from tnlayers.compression.collect import collect
from tnlayers.compression.compress import compress
from tnlayers.compression.inputs import Inputs, fingerprint, open_model, read_inputs
from tnlayers.compression.measuring import METRICS, Measure, is_causal
from tnlayers.compression.policies import POLICIES
from tnlayers.compression.problems import weigh
from tnlayers.evaluation.result import Evaluation, compare
from tnlayers.pretrained.folder import free_target, save_folder, written_folder
from tnlayers.pretrained.model import Pretrained
from tnlayers.recovery import distill, reconstruct
from tnlayers.report import Report

GOALS = ("keep", "max_error", "max_params", "speed")
WEIGHTINGS = {"full": "factor", "diagonal": "diagonal", "none": "none"}
RECOVERIES = ("none", "distill", "blocks")


@dataclass(frozen=True)
class CompressConfig:
    """What `tnlayers compress` is told.

    Args:
        source: name or folder of the model.
        out: folder to write; None for a plan alone.
        keep: see `compress`, as for the other goals.
        max_error: predicted relative error of the outputs.
        max_params: parameters of the whole model.
        speed: how many times fewer multiplications.
        calib: file of texts or folder of pictures; None: plain errors of the weights count.
        count: texts or pictures to calibrate on.
        measured: others of the same source (or of `test`) to measure on.
        test: file or folder to measure on, in place of the rest of `calib`.
        length: tokens a text is cut at.
        batch_size: rows of a batch.
        seed: of the samples and the probes.
        column: of the texts.
        targets: name patterns.
        exclude: name patterns.
        formats: families of networks.
        ranks: policy.
        method: "weighted", or a baseline.
        mu: ridge, or "adaptive".
        multiple: of ranks.
        weighting: "full", "diagonal" or "none".
        gradients: whether errors are measured where they matter.
        sequential: collect again after every block.
        recover: "none", "distill" or "blocks".
        seconds: of recovery.
        lr: of recovery; None for the default of `distill` or `reconstruct`.
        metrics: names, see `evaluate`; None for those that suit the model.
        task: see `open_pretrained`.
        dtype: of the weights.
        device: where the model runs.
        dry_run: print the plan, change nothing.
        overwrite: replace a folder that is there.

    Raises:
        ValueError: settings that contradict each other.

    Example:
        >>> CompressConfig("model", Path("small"), keep=0.7, calib=Path("texts.jsonl")).ranks
        'auto'
    """

    source: str
    out: Path | None = None
    keep: float | None = None
    max_error: float | None = None
    max_params: int | None = None
    speed: float | None = None
    calib: Path | None = None
    count: int = 256
    measured: int = 512
    test: Path | None = None
    length: int = 256
    batch_size: int = 32
    seed: int = 0
    column: str | None = None
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("low_rank", "tucker")
    ranks: str = "auto"
    method: str = "weighted"
    mu: float | str = 0.0
    multiple: int = 1
    weighting: str = "full"
    gradients: bool = True
    sequential: bool = False
    recover: str = "none"
    seconds: float = 300.0
    lr: float | None = None
    metrics: tuple[str, ...] | None = None
    task: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    dry_run: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            told = ", ".join(given) or "none"
            raise ValueError(f"compress: give exactly one of --keep, --max-error, --max-params, --speed, got {told}")
        ((goal, value),) = ((name, getattr(self, name)) for name in given)
        if not (isfinite(value) and value > 0) or (goal == "keep" and value > 1):
            limit = "in (0, 1]" if goal == "keep" else "above 0"
            raise ValueError(f"compress: --{goal.replace('_', '-')} must be {limit}, got {value}")
        if self.out is None and not self.dry_run:
            raise ValueError("compress: expected --out FOLDER, or --dry-run for the plan alone")
        if self.out is not None and not self.dry_run:
            self._check_out(self.out)
        words = (
            ("weighting", WEIGHTINGS), ("recover", RECOVERIES), ("ranks", POLICIES), ("method", ("weighted", *METHODS)),
        )  # fmt: skip
        for name, known in words:
            if getattr(self, name) not in known:
                raise ValueError(f"compress: --{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        unknown = [name for name in self.metrics or () if name not in METRICS]
        if unknown:
            raise ValueError(
                f"compress: --metrics must be of {', '.join(METRICS)}, got {unknown[0]!r}; see tnlayers eval"
            )
        check_formats("compress", self.formats)
        for name, flag in (("count", "n"), ("length", "len"), ("batch_size", "batch-size"), ("measured", "measure"),
                           ("multiple", "multiple")):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"compress: --{flag} must be at least 1, got {getattr(self, name)}")
        if not isinstance(self.mu, str) and not (isfinite(self.mu) and self.mu >= 0):
            raise ValueError(f"compress: --mu must be a number >= 0 or 'adaptive', got {self.mu}")
        lr = 1.0 if self.lr is None else self.lr
        if not (isfinite(self.seconds) and self.seconds > 0 and isfinite(lr) and lr > 0):
            raise ValueError(f"compress: --seconds and --lr must be above 0, got {self.seconds} and {self.lr}")
        self._check_data()

    def _check_out(self, out: Path) -> None:
        if out.exists() and not self.overwrite:
            raise ValueError(f"compress: {out} exists; give another --out, or --overwrite")
        if Path(self.source).exists() and out.resolve() == Path(self.source).resolve():
            raise ValueError(f"compress: --out must not be the model itself, got {out} for both; give another folder")
        free_target("compress", out, self.overwrite)

    def _check_data(self) -> None:
        """What needs data, and which."""
        if self.calib is None:
            needs = {
                "--recover": self.recover != "none", "--sequential": self.sequential, "--speed": self.speed is not None,
                "--ranks loss": self.ranks == "loss",
                f"--method {self.method}": self.method not in ("weighted", "plain"),
            }  # fmt: skip
            asked = [name for name, wanted in needs.items() if wanted]
            if asked:
                raise ValueError(f"compress: {asked[0]} needs data to calibrate on, got none; give --calib")
        elif self.ranks == "loss" and not self.gradients:
            raise ValueError("compress: --ranks loss needs gradients; drop --no-gradients, or take --ranks knapsack")


@dataclass
class CompressResult:
    """What `tnlayers compress` did.

    Args:
        report: of the layers.
        folder: that was written, or None.
        before: metrics of the model as it was, or None.
        after: metrics of the compressed one.
        recovery: what recovery says of itself; empty without.
        seconds: by phase.
        conditions: what the calibration was.
        measured: what before and after were measured on.
    """

    report: Report
    folder: Path | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    recovery: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    conditions: str = ""
    measured: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "report": self.report.to_dict(spectra=False),
            "folder": None if self.folder is None else str(self.folder),
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "recovery": self.recovery,
            "seconds": self.seconds,
            "calibration": self.conditions,
            "measured": self.measured,
        }

    def text(self) -> str:
        """For people: the layers, then before and after in one table."""
        parts = [self.report.table()]
        if self.conditions:
            parts.append(f"calibration: {self.conditions}")
        if self.before is not None and self.after is not None:
            parts.append(compare(self.before, self.after))
        if self.measured:
            parts.append(f"measured on: {self.measured}")
        return "\n\n".join(parts)


def run(config: CompressConfig, progress: Progress | None = None) -> CompressResult:
    """Compress a pretrained model and save it; a killed calibration or recovery goes on when the same is run again.

    Beside OUT lie `OUT.calibration.safetensors`, which later runs at other sizes reuse, and while it runs
    `OUT.recovery.*.pt`. Both are thrown away where they are of another model, other data or other settings.
    Memory: the model, its calibration and spectra; with recovery the original too. A dry run writes nothing.
    """
    clock = Clock()
    held = open_model("compress", config.source, task=config.task, dtype=config.dtype, device=config.device)
    known = _inputs(config, held)
    told = "" if known is None else known.told
    measure = None if config.dry_run else _measure(config, held, progress)
    clock.lap("open")
    before = None if measure is None else measure("before")
    if measure is None:
        report = _smaller(config, held, known, progress, clock)
        return CompressResult(report, seconds=clock.seconds, conditions=told)
    clock.lap("measure")
    teacher = None if config.recover == "none" else copy.deepcopy(held.model)
    recovered_from = "" if teacher is None else _recovery_name(config, held, known)
    report = _smaller(config, held, known, progress, clock)
    recovery: dict[str, Any] = {}
    if teacher is not None and known is not None:
        recovery = _recover(config, held, teacher, known, recovered_from, progress)
        del teacher
        clock.lap("recover")
    after = measure("after")
    clock.lap("measure")
    assert config.out is not None
    result = CompressResult(report, config.out, before, after, recovery, clock.seconds, told, measure.told)
    plan = {
        "report": report.to_dict(spectra=False), "calibration": told,
        "settings": {f.name: _jsonable(getattr(config, f.name)) for f in dataclasses.fields(config)},
    }  # fmt: skip
    with written_folder(config.out, config.overwrite, "compress") as temporary:
        save_folder(held, temporary, plan=plan)
        report.html(temporary / "report.html")
        (temporary / "compress.txt").write_text(result.text() + "\n", encoding="utf-8")
    _forget_recoveries(config)
    clock.lap("save")
    return result


def _smaller(
    config: CompressConfig, held: Pretrained, known: Inputs | None, progress: Progress | None, clock: Clock
) -> Report:
    """Calibrate, weigh, replace; what that needs in memory is gone afterwards."""
    calibration = None if known is None else _calibrate(config, held, known, progress)
    clock.lap("calibrate")
    weighed = weigh(
        held.model, calibration, targets=(list(config.targets) or None) if calibration is None else None,
        exclude=config.exclude, formats=config.formats, multiple=config.multiple, by_speed=config.speed is not None,
        progress=progress,
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(config, name) for name in (*GOALS, "ranks", "method", "mu", "dry_run")}
    if config.sequential and known is not None:
        options |= {"sequential": True, "batches": known.batches}
    report = compress(held.model, **options, weighed=weighed, progress=progress)
    clock.lap("compress")
    return report


def preserved_of(held: Pretrained) -> bool | Callable[[Any, Any], Tensor]:
    """What compression should preserve: sentence embeddings where the model is for them, else its outputs."""
    if held.pooling is None:
        return True

    def embedding(outputs: Any, batch: Any) -> Tensor:
        hidden = hidden_of(outputs)
        if held.pooling == "cls":
            return nn.functional.normalize(hidden[:, 0], dim=-1)
        mask = batch["attention_mask"].to(hidden.device, hidden.dtype).unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1)

    return embedding


def _beside(config: CompressConfig, suffix: str) -> Path:
    assert config.out is not None
    return config.out.with_name(f"{config.out.name}.{suffix}")


def _inputs(config: CompressConfig, held: Pretrained) -> Inputs | None:
    if config.calib is None:
        return None
    made = read_inputs(
        held, config.calib, count=config.count, length=config.length, batch_size=config.batch_size, seed=config.seed,
        column=config.column,
    )  # fmt: skip
    made.batches = [to_device(batch, torch.device(config.device)) for batch in made.batches]
    return made


def _measure(config: CompressConfig, held: Pretrained, progress: Progress | None) -> Measure:
    """On texts that calibration does not take."""
    return Measure(
        held, config.metrics, config.test or config.calib, count=config.measured,
        skip=config.count if config.test is None else 0, seed=config.seed, length=config.length,
        batch_size=config.batch_size, column=config.column, progress=progress,
    )  # fmt: skip


def _calibrate(config: CompressConfig, held: Pretrained, known: Inputs, progress: Progress | None) -> Calibration:
    """The stored one if it is of this model, these data and these layers; else a new one, not stored by a dry run."""
    file = None if config.out is None else _beside(config, "calibration.safetensors")
    seen = fingerprint(
        held.model, known.batches, held.pooling, config.targets, config.exclude, config.weighting, config.gradients,
        config.seed,
    )  # fmt: skip
    told = f"{known.told}, weighting {config.weighting}, gradients {config.gradients}, {seen}"
    if file is not None and file.exists():
        found = Calibration.load(file)
        if found.source == told and found.batches == len(known.batches):
            return found
        if found.source != told and not config.dry_run:
            file.unlink()  # of other texts, layers or another model: ours to write anew
    mode: Any = WEIGHTINGS[config.weighting]
    gradients: Any = preserved_of(held) if config.gradients else False
    return collect(
        held.model, known.batches, list(config.targets) or None, mode, exclude=config.exclude, gradients=gradients,
        seed=config.seed, checkpoint=None if config.dry_run else file, every=8, source=told, progress=progress,
    )  # fmt: skip


ELSEWHERE = ("out", "overwrite", "source", "calib", "test", "measured", "metrics", "column")
"""Settings that a recovery does not depend on, or that its batches stand for."""


def _recovery_name(config: CompressConfig, held: Pretrained, known: Inputs | None) -> str:
    """What a recovery depends on, in few letters: the original, the data, the settings."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ELSEWHERE}
    return fingerprint(held.model, [] if known is None else known.batches, settings)


def _forget_recoveries(config: CompressConfig, but: Path | None = None) -> None:
    assert config.out is not None
    for file in config.out.parent.glob(f"{glob.escape(config.out.name)}.recovery.*.pt"):
        if file != but:
            file.unlink()


def _recover(
    config: CompressConfig, held: Pretrained, teacher: nn.Module, known: Inputs, name: str, progress: Progress | None
) -> dict[str, Any]:
    file = _beside(config, f"recovery.{name}.pt")
    _forget_recoveries(config, but=file)
    options: dict[str, Any] = {
        "seconds": config.seconds, "checkpoint": file, "progress": progress,
        "generator": torch.Generator().manual_seed(config.seed),
    }  # fmt: skip
    if config.lr is not None:
        options["lr"] = config.lr
    if config.recover == "blocks":
        made = reconstruct(held.model, teacher, known.batches, **options)
    else:
        made = distill(held.model, teacher, known.batches, loss="logits" if is_causal(held) else "output", **options)
    found: dict[str, Any] = made.to_dict()
    return found


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
