"""The main job: dense networks, conversions, tensor layers from scratch and at ranks found; trained alike, compared.

`run` trains every (network, variant, seed), writes each finished row at once, and can be interrupted and resumed;
rank-adaptive rows also in their middle.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tnlayers.checkpoint import load, save
from tnlayers.convert import tensorize
from tnlayers.main_job.adaptive import Checkpoint, train_adaptive
from tnlayers.main_job.config import JobConfig, hardware_facts, settings_of
from tnlayers.main_job.data import Dataset, load_data
from tnlayers.main_job.nets import adaptive_net, choose_recipes, dense_net, parameter_count, scratch_net
from tnlayers.main_job.rank_log import in_words, log_name
from tnlayers.main_job.result import JobResult
from tnlayers.main_job.results_page import write_outputs
from tnlayers.main_job.rows import ADAPTIVE, DENSE, SCRATCH, TENSORIZED, JobError, Key, Row, RowStore
from tnlayers.main_job.training import (
    INFERENCE_BATCH,
    StepProgress,
    Training,
    accuracy,
    flops_per_sample,
    inference_ms,
    train,
)
from tnlayers.main_job.workers import Followed, joined, number, opened, told
from tnlayers.optim import RankAdaptive
from tnlayers.surgery import network_layers


@dataclass(frozen=True)
class Event:
    """What `run` tells its progress callback.

    Args:
        kind: "data" (decoding), "step" (training), "row" (one finished), "skip" (one found finished) or "resume" (one
            continues from its checkpoint).
        label: what is being done, for people.
        done: images or epochs so far, over the whole job.
        total: images or epochs in all.
    """

    kind: str
    label: str
    done: float = 0.0
    total: float = 0.0


Watch = Callable[[Event], None]


def run(config: JobConfig, progress: Watch | None = None) -> JobResult:
    """Train and compare; write rows, models, conversion reports, figures and the page `index.html` to `config.out`.

    Every finished row is written at once. The same call again skips the rows that are there; an interruption
    (KeyboardInterrupt) loses no finished row. A rank-adaptive row continues from its last checkpoint, even after
    `kill -9`, and ends with the same weights bit for bit.

    Under torchrun every batch is shared by the workers; rows are those of one process up to rounding. Worker 0 measures
    times, calls `progress`, writes, and has the rows; the result of the others is empty.

    Args:
        config: what to do.
        progress: called with an `Event`.

    Raises:
        DataError: data that cannot be read.
        JobError: settings that cannot be met, or a folder that holds results of other settings.
        TrainingError: the loss is no longer finite.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = run(JobConfig(out=folder, nets=("mlp",), limit=100, epochs=1))
        >>> [(row.net, row.variant) for row in result.rows]
        [('mlp', 'dense'), ('mlp', 'tensorized'), ('mlp', 'scratch')]
    """
    with joined():
        return _run(config, progress if progress is not None and number() == 0 else lambda event: None)


def _run(config: JobConfig, watch: Watch) -> JobResult:
    start = time.perf_counter()
    before = torch.get_num_threads()
    try:
        data = _load(config, watch)
        config = config.complete(data)
        assert config.threads is not None
        torch.set_num_threads(config.threads)
        _check_nets(config, data)
        settings = settings_of(config, data)
        with opened(config, settings) as store:
            trained = _Runner(config, data, store, watch).run()
            if isinstance(store, Followed):
                return JobResult((), settings, {}, store.folder, trained, time.perf_counter() - start)
            rows = store.select(config.nets, config.seed_list, config.variants)
            hardware = hardware_facts()
            result = JobResult(rows, settings, hardware, store.folder, trained, time.perf_counter() - start)
            write_outputs(result, data)
            return result
    finally:
        torch.set_num_threads(before)


def _load(config: JobConfig, watch: Watch) -> Dataset:
    return load_data(
        config.data,
        limit=config.limit,
        size=config.size,
        progress=lambda what, done, total: watch(Event("data", what, done, total)),
    )


def _check_nets(config: JobConfig, data: Dataset) -> None:
    """Find out before any training whether the networks and their shares are possible."""
    for net in config.nets:
        try:
            with torch.random.fork_rng(devices=[]):
                scratch_net(net, data.shape, len(data.classes), config.scratch_share)
                choose_recipes(dense_net(net, data.shape, len(data.classes)), config.tensorized_share)
        except ValueError as error:
            raise JobError(f"train: {net} on {config.data}: {error}") from None


@dataclass
class _Runner:
    """The loop over networks, seeds and variants."""

    config: JobConfig
    data: Dataset
    store: RowStore | Followed
    watch: Watch
    done: float = 0.0
    last_tick: float = 0.0

    def run(self) -> int:
        """Train what is missing; the number of rows trained."""
        jobs = [(net, seed) for net in self.config.nets for seed in self.config.seed_list]
        keys = [(net, variant, seed) for net, seed in jobs for variant in self.config.variants]
        missing = [key for key in keys if key not in self.store]
        for net, variant, seed in keys:
            if number() == 0 and variant == ADAPTIVE and (self.config.overwrite or (net, variant, seed) in self.store):
                self._checkpoint(net, seed).remove()
        told(None)  # nobody looks for a checkpoint before worker 0 has removed the old ones
        self.total = float(sum(self._epochs(variant) for _, variant, _ in missing))
        for net, variant, seed in keys:
            if (net, variant, seed) not in missing:
                self.watch(Event("skip", f"{net} {variant}, seed {seed}: found finished", self.done, self.total))
        for net, seed in jobs:
            self._train_missing(net, seed)
        return len(missing)

    def _train_missing(self, net: str, seed: int) -> None:
        todo = [variant for variant in self.config.variants if (net, variant, seed) not in self.store]
        dense: nn.Module | None = None
        if DENSE in todo:
            dense = self._dense(net, seed, record=True)
        if TENSORIZED in todo:
            self._tensorized(net, seed, dense if dense is not None else self._dense_again(net, seed))
        if SCRATCH in todo:
            self._scratch(net, seed)
        if ADAPTIVE in todo:
            self._adaptive(net, seed)

    def _epochs(self, variant: str) -> int:
        epochs = self.config.finetune_epochs if variant == TENSORIZED else self.config.epochs
        assert epochs is not None
        return epochs

    def _dense(self, net: str, seed: int, *, record: bool) -> nn.Module:
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = dense_net(net, self.data.shape, len(self.data.classes))
        trained = self._fit(model, net, DENSE, seed)
        if record:
            self._finish(model, net, DENSE, seed, trained, start)
        return model

    def _dense_again(self, net: str, seed: int) -> nn.Module:
        """Give the dense network of a finished row: from its file, or trained once more where that is gone."""
        model = dense_net(net, self.data.shape, len(self.data.classes))
        try:
            return load(self._model_file(net, DENSE, seed), model)
        except (ValueError, OSError):
            return self._dense(net, seed, record=False)

    def _tensorized(self, net: str, seed: int, dense: nn.Module) -> None:
        start = time.perf_counter()
        model = copy.deepcopy(dense)
        recipes = choose_recipes(model, self.config.tensorized_share)
        report = tensorize(model, recipes, example_input=self.data.train_x[: self.config.batch_size])
        report = replace(report, title=f"{net} on {self.data.name}, seed {seed}: conversion")
        page = f"reports/{net}-seed{seed}.html"
        if number() == 0:
            report.html(self.store.path(page))
        before = accuracy(model, self.data.test_x, self.data.test_y)
        trained = self._fit(model, net, TENSORIZED, seed)
        self._finish(model, net, TENSORIZED, seed, trained, start, before=before, report=page)

    def _scratch(self, net: str, seed: int) -> None:
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = scratch_net(net, self.data.shape, len(self.data.classes), self.config.scratch_share)
        trained = self._fit(model, net, SCRATCH, seed)
        self._finish(model, net, SCRATCH, seed, trained, start)

    def _adaptive(self, net: str, seed: int) -> None:
        start, epochs, config = time.perf_counter(), self._epochs(ADAPTIVE), self.config
        assert config.batch_size is not None
        shape, classes = self.data.shape, len(self.data.classes)
        checkpoint = self._checkpoint(net, seed)

        def resumed(done: int, steps: int) -> None:
            label = f"{net} {ADAPTIVE}, seed {seed}: continues after step {done} of {steps}"
            self.watch(Event("resume", label, self.done + epochs * done / steps, self.total))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, trained = train_adaptive(
                lambda: adaptive_net(net, shape, classes, config.scratch_share),
                self.data,
                epochs=epochs,
                batch_size=config.batch_size,
                lr=config.lr,
                seed=seed,
                log=self.store.path(log_name(net, seed)),
                checkpoint=checkpoint,
                progress=lambda optimizer: self._ticker(net, ADAPTIVE, seed, optimizer),
                resumed=resumed,
            )
        self.done += epochs
        self._finish(model, net, ADAPTIVE, seed, trained, start)
        if number() == 0:
            checkpoint.remove()

    def _checkpoint(self, net: str, seed: int) -> Checkpoint:
        key: Key = (net, ADAPTIVE, seed)
        identity = {"settings": self.store.settings, "row": list(key)}
        file = self.store.path(f"checkpoints/{net}-{ADAPTIVE}-seed{seed}.pt")
        return Checkpoint(file, identity, self.config.checkpoint_every)

    def _fit(self, model: nn.Module, net: str, variant: str, seed: int) -> Training:
        epochs, config = self._epochs(variant), self.config
        assert config.batch_size is not None
        assert config.finetune_lr is not None
        lr = config.finetune_lr if variant == TENSORIZED else config.lr
        tick = self._ticker(net, variant, seed)
        trained = train(model, self.data, epochs=epochs, batch_size=config.batch_size, lr=lr, seed=seed, progress=tick)
        self.done += epochs
        return trained

    def _ticker(self, net: str, variant: str, seed: int, optimizer: RankAdaptive | None = None) -> StepProgress:
        """Tell how far a row is, ten times a second; with its ranks, where they change."""
        base, epochs = self.done, self._epochs(variant)

        def tick(done: int, steps: int) -> None:
            now = time.perf_counter()
            if now - self.last_tick > 0.1 or done == steps:
                self.last_tick = now
                epoch = min(epochs, done * epochs // steps + 1)
                label = f"{net} {variant}, seed {seed}, epoch {epoch}/{epochs}"
                if optimizer is not None:
                    label += f", ranks {in_words(optimizer.ranks())}"
                self.watch(Event("step", label, base + epochs * done / steps, self.total))

        return tick

    def _model_file(self, net: str, variant: str, seed: int) -> Path:
        return self.store.path(f"models/{net}-{variant}-seed{seed}.safetensors")

    def _finish(
        self,
        model: nn.Module,
        net: str,
        variant: str,
        seed: int,
        trained: Training,
        start: float,
        *,
        before: float | None = None,
        report: str = "",
    ) -> None:
        """Measure, save the model, and only then write the row: on worker 0."""
        if isinstance(self.store, Followed):
            self.store.keys.add((net, variant, seed))
            return
        images = self.data.test_x[:INFERENCE_BATCH]
        file = save(model, self._model_file(net, variant, seed))
        row = Row(
            net=net,
            variant=variant,
            seed=seed,
            accuracy=trained.curve[-1],
            accuracy_before=before,
            parameters=parameter_count(model),
            parameters_dense=parameter_count(dense_net(net, self.data.shape, len(self.data.classes))),
            flops=flops_per_sample(model, images),
            step_ms=trained.step_ms,
            inference_ms=inference_ms(model, images),
            inference_batch=len(images),
            file_bytes=file.stat().st_size,
            epochs=self._epochs(variant),
            seconds=time.perf_counter() - start + trained.earlier,
            curve=trained.curve,
            networks={name: repr(layer.network) for name, layer in network_layers(model)},
            file=file.relative_to(self.store.folder).as_posix(),
            report=report,
        )
        self.store.add(row)
        label = f"{net} {variant}, seed {seed}: {100 * row.accuracy:.2f} %"
        if variant == ADAPTIVE:
            label += f", ranks {in_words({name: layer.network.ranks for name, layer in network_layers(model)}, 80)}"
        self.watch(Event("row", label, self.done, self.total))
