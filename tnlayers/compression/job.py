"""`tnlayers compress`: open, calibrate, choose, replace, recover, measure before and after, save."""

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.calling import hidden_of
from tnlayers.compression.calibration import Calibration
from tnlayers.compression.candidates import check_formats
from tnlayers.compression.collect import collect
from tnlayers.compression.compress import compress
from tnlayers.compression.inputs import Inputs, read_inputs
from tnlayers.compression.policies import POLICIES
from tnlayers.compression.problems import weigh
from tnlayers.evaluation.evaluate import evaluate
from tnlayers.evaluation.result import Evaluation, compare
from tnlayers.files import write_atomic
from tnlayers.pretrained.folder import save_folder
from tnlayers.pretrained.model import Pretrained, open_pretrained
from tnlayers.recovery import distill, reconstruct
from tnlayers.report import Report
from tnlayers.texts import read_texts, sample

Progress = Callable[[int, int, str], None]
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
        lr: of recovery.
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
    lr: float = 1e-3
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
        if self.out is None and not self.dry_run:
            raise ValueError("compress: expected --out FOLDER, or --dry-run for the plan alone")
        if self.out is not None and not self.dry_run and self.out.exists() and not self.overwrite:
            raise ValueError(f"compress: {self.out} exists; give another --out, or --overwrite")
        for name, known in (("weighting", WEIGHTINGS), ("recover", RECOVERIES), ("ranks", POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"compress: --{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_formats("compress", self.formats)
        for name in ("count", "length", "batch_size", "measured"):
            if getattr(self, name) < 1:
                raise ValueError(f"compress: {name} must be at least 1, got {getattr(self, name)}")
        if self.recover != "none" and (self.calib is None or not (isfinite(self.seconds) and self.seconds > 0)):
            raise ValueError("compress: recovery needs --calib, and --seconds above 0")
        if self.sequential and self.calib is None:
            raise ValueError("compress: --sequential collects again after every block; give --calib")


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
    """

    report: Report
    folder: Path | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    recovery: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    conditions: str = ""

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
        }

    def text(self) -> str:
        """For people: the layers, then before and after in one table."""
        parts = [self.report.table()]
        if self.conditions:
            parts.append(f"calibration: {self.conditions}")
        if self.before is not None and self.after is not None:
            parts.append(compare(self.before, self.after))
        return "\n\n".join(parts)


def run(config: CompressConfig, progress: Progress | None = None) -> CompressResult:
    """Compress a pretrained model and save it; a killed calibration or recovery goes on when the same is run again.

    Beside OUT lie `OUT.calibration.safetensors`, which later runs at other sizes reuse, and while it runs
    `OUT.recovery.pt`.
    """
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal clock
        seconds[phase] = time.perf_counter() - clock
        clock = time.perf_counter()

    held = open_pretrained(config.source, task=config.task, dtype=config.dtype, device=config.device)
    model = held.model
    known = _inputs(config, held)
    lap("open")
    calibration = None if known is None else _calibrate(config, held, known, progress)
    lap("calibrate")
    targets, exclude = list(config.targets) or None, list(config.exclude)
    weighed = weigh(
        model, calibration, targets=targets if calibration is None else None, exclude=exclude,
        formats=config.formats, multiple=config.multiple, by_speed=config.speed is not None, progress=progress,
    )  # fmt: skip
    goal = {name: getattr(config, name) for name in GOALS}
    options: dict[str, Any] = {
        **goal, "ranks": config.ranks, "method": config.method, "mu": config.mu, "weighed": weighed,
    }  # fmt: skip
    if config.dry_run:
        report = compress(model, **options, dry_run=True)
        lap("choose")
        return CompressResult(report, seconds=seconds, conditions="" if known is None else known.told)
    teacher = copy.deepcopy(model)
    if config.sequential and known is not None:
        options |= {"sequential": True, "batches": known.batches}
    report = compress(model, **options, progress=progress)
    lap("compress")
    recovery = _recover(config, held, teacher, known, progress)
    if recovery:
        lap("recover")
    before, after = _measure(config, held, teacher, known, progress)
    lap("measure")
    assert config.out is not None
    plan = {
        "report": report.to_dict(spectra=False), "calibration": "" if known is None else known.told,
        "settings": {f.name: _jsonable(getattr(config, f.name)) for f in dataclasses.fields(config)},
    }  # fmt: skip
    folder = save_folder(held, config.out, plan=plan, overwrite=config.overwrite)
    report.html(folder / "report.html")
    result = CompressResult(report, folder, before, after, recovery, seconds, "" if known is None else known.told)
    write_atomic(folder / "compress.txt", result.text() + "\n")
    _beside(config, "recovery.pt").unlink(missing_ok=True)
    lap("save")
    return result


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
    made.batches = [_moved(batch, config.device) for batch in made.batches]
    return made


def _moved(batch: Any, device: str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _calibrate(config: CompressConfig, held: Pretrained, known: Inputs, progress: Progress | None) -> Calibration:
    file = None if config.out is None else _beside(config, "calibration.safetensors")
    gradients: Any = preserved_of(held) if config.gradients else False
    told = f"{config.source}: {known.told}, weighting {config.weighting}, gradients {config.gradients}"
    if file is not None and file.exists() and Calibration.load(file).source != told:
        file.unlink()  # of other texts or another model: ours to write anew
    mode: Any = WEIGHTINGS[config.weighting]
    return collect(
        held.model, known.batches, list(config.targets) or None, mode, exclude=list(config.exclude),
        gradients=gradients, seed=config.seed, checkpoint=file, every=8, source=told, progress=progress,
    )  # fmt: skip


def _recover(
    config: CompressConfig, held: Pretrained, teacher: nn.Module, known: Inputs | None, progress: Progress | None
) -> dict[str, Any]:
    if config.recover == "none" or known is None:
        return {}
    file = _beside(config, "recovery.pt")
    generator = torch.Generator().manual_seed(config.seed)
    if config.recover == "blocks":
        made = reconstruct(
            held.model, teacher, known.batches, seconds=config.seconds, lr=config.lr, checkpoint=file,
            progress=progress, generator=generator,
        )  # fmt: skip
    else:
        causal = _is_causal(held)
        made = distill(
            held.model, teacher, known.batches, loss="logits" if causal else "output", seconds=config.seconds,
            lr=config.lr, checkpoint=file, progress=progress, generator=generator,
        )  # fmt: skip
    found: dict[str, Any] = made.to_dict()
    return found


def _is_causal(held: Pretrained) -> bool:
    return "CausalLM" in type(held.model).__name__ or "LMHead" in type(held.model).__name__


def _measure(
    config: CompressConfig, held: Pretrained, teacher: nn.Module, known: Inputs | None, progress: Progress | None
) -> tuple[Evaluation | None, Evaluation | None]:
    """Before and after, on texts that calibration has not seen."""
    path = config.test or config.calib
    if path is None or path.is_dir() or held.tokenizer is None:
        metrics = config.metrics or ("size",)
        texts = None if known is None else known.batches
        shared: dict[str, Any] = {"metrics": metrics, "texts": texts, "progress": progress}
        before = evaluate(teacher, None, title="before", **shared)
        return before, evaluate(held.model, None, title="after", **shared)
    skip = config.count if config.test is None else 0
    pool = read_texts(path, column=config.column)
    texts = sample(pool, min(len(pool), skip + config.measured), config.seed)[skip:]
    if not len(texts):
        texts = sample(pool, min(len(pool), config.measured), config.seed)  # nothing is left: say so by the same texts
    causal = _is_causal(held)
    metrics = config.metrics or (("size", "perplexity") if causal else ("size", "similarity"))
    shared = {
        "texts": texts, "metrics": metrics, "max_length": config.length, "batch_size": config.batch_size,
        "pooling": held.pooling or "mean", "progress": progress,
        "reference": teacher if "similarity" in metrics else None,
    }  # fmt: skip
    if causal:
        shared["batch_size"] = None
    before = evaluate(teacher, held.tokenizer, title="before", **shared)
    return before, evaluate(held.model, held.tokenizer, title="after", **shared)


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
