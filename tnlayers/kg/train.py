"""Training of knowledge-graph models: batches, steps, validation, checkpoints; on one process or under torchrun."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from decompositions.progress import Progress, reporting
from tnlayers.kg.answers import Answers
from tnlayers.kg.batches import Batches, Sampling, derived
from tnlayers.kg.checkpoints import Checkpoint, RunState, generators, set_generators
from tnlayers.kg.chunks import MEMORY, Batch
from tnlayers.kg.history import Epoch, EpochLog, History, from_plain, measured, to_plain
from tnlayers.kg.losses import Loss, NegativeSampling
from tnlayers.kg.model import KGModel
from tnlayers.kg.optimizers import Asked, make_optimizer, plain_options
from tnlayers.kg.ranking import evaluate
from tnlayers.kg.training_options import check_training, loss_of
from tnlayers.kg.triples import Triples
from tnlayers.kg.workers import Together, joined, told
from tnlayers.optim import compact
from tnlayers.optim.engine import NetworkOptimizer

LOOK = 64
"""Steps on a GPU after which losses are looked at: each look waits for the device."""


def train(
    model: KGModel,
    triples: Triples,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: int | float = 1e-3,
    loss: str | Loss = "1-N",
    label_smoothing: int | float = 0.1,
    smoothing: str = "uniform",
    optimizer: Asked = None,
    weight_decay: int | float = 0.0,
    lr_decay: int | float = 1.0,
    schedule: Callable[[int, int], float] | None = None,
    clip: int | float | None = None,
    every: int | None = None,
    patience: int | None = None,
    validation: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: int | float = 60.0,
    progress: bool | Progress = False,
    log: str | os.PathLike[str] | None = None,
    tensorboard: str | os.PathLike[str] | None = None,
    amp: bool = False,
    memory: int = MEMORY,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    max_seconds: int | float | None = None,
) -> History:
    """Train a model on the training split, in place.

    Batches are slices of a permutation of the distinct queries (h, r), those of inverse relations among them, each with
    all its answers; or of the triples, for negative sampling. Inside a batch queries are sorted by relation. Of a graph
    without inverse relations (h, r, ?) alone is trained, by every loss: heads are ranked by the same scores, but no
    step has asked for them. `inverse=True`, the default of `load_triples`, trains both.

    With validation (`every` or `patience`) the model holds the weights of the epoch with the highest filtered MRR when
    this returns, otherwise those of the last step. Networks trained by an optimizer of ours are left at the ranks it
    found (see `tnlayers.compact`).

    With a checkpoint an interrupted run, whether by Ctrl-C, `max_seconds` or kill -9, goes on where the file was last
    written: on one CPU process it ends with the same weights bit for bit. Ctrl-C writes the file first. With more or
    fewer epochs than before, ranks still settle at the step of the first call.

    Under torchrun every worker takes its part of each batch and gradients are summed: the loss is that of one process
    (batch norm sees a worker's part). Files are written by worker 0, checkpoints between epochs.

    Args:
        model: made from these triples.
        triples: the graph.
        epochs: passes over the training queries, earlier ones of the checkpoint included.
        batch_size: queries a step, of all workers together.
        lr: learning rate.
        loss: "1-N" (binary cross-entropy of all entities), "softmax" (multi-label), "1-vs-all", "negative sampling"; or
            a `Loss` with options of its own.
        label_smoothing: eps of a loss by name; negative sampling has none.
        smoothing: formula of "1-N": "uniform", "published" or "others", see `one_to_n_loss`.
        optimizer: a name, or a mapping such as `{"name": "RankAdaptive", "tol": 0.05}`, or what else `make_optimizer`
            takes; AdamW by default.
        weight_decay: of an optimizer by name.
        lr_decay: the learning rate is multiplied by it after every epoch.
        schedule: called as (step, steps), gives another factor of the learning rate.
        clip: largest norm of the gradient.
        every: epochs between validations; the last epoch is validated too.
        patience: validations without a better MRR after which training stops.
        validation: options of `evaluate`, such as `{"direction": "tail"}` or `{"split": "test"}`.
        checkpoint: file to go on from where it is there, and to write.
        checkpoint_seconds: between two writes; it is written at the end too.
        progress: True for a bar; or called as (steps done, steps in all, text).
        log: JSON lines, one an epoch; those of epochs that are done again are dropped.
        tensorboard: folder.
        amp: score in bfloat16; parameters, losses and optimizer states stay as they are.
        memory: bytes of logits and their gradients, above which the entity axis is cut into chunks: the same loss.
        seed: of orders, negatives and dropout; torch's own generators are left as they were.
        generator: gives the seed where there is none; None: torch's.
        max_seconds: after which training stops between two steps (under torchrun: epochs).

    Returns:
        Loss, seconds and validation figures of every epoch, the best epoch, and why training ended.

    Raises:
        ValueError: options that make no sense, a graph that is not the model's, an empty split, a relation without
            training triples, a loss that is not finite (with epoch and batch), the checkpoint of another run.
        TypeError: not a `KGModel`; numbers and mappings that are something else.

    Example:
        >>> from tnlayers.kg import KGModel, load_triples
        >>> triples = load_triples({"train": [("a", "r", "b"), ("b", "r", "c")], "valid": [("a", "r", "c")]})
        >>> class Dot(KGModel):
        ...     def __init__(self, of):
        ...         super().__init__(of.num_entities, of.num_relations, inverse=of.inverse)
        ...         self.entities, self.relations = (nn.Embedding(n, 4) for n in (of.num_entities, of.num_relations))
        ...     def query(self, heads, relations):
        ...         return self.entities(heads) * self.relations(relations)
        ...     def against(self, query, entities=None):
        ...         return query @ self.entities.weight[slice(None) if entities is None else entities].mT
        >>> history = train(Dot(triples), triples, epochs=3, batch_size=2, lr=0.1, every=1, seed=0)
        >>> len(history.losses), history.stopped
        (3, 'epochs')
    """
    reporting("train", progress)  # refused before any work
    found = loss_of(loss, label_smoothing, smoothing)
    every, validation = check_training(
        model,
        triples,
        {"epochs": epochs, "batch_size": batch_size, "every": every, "patience": patience, "memory": memory},
        {"lr": lr, "lr_decay": lr_decay, "clip": clip},
        {"checkpoint_seconds": checkpoint_seconds, "max_seconds": max_seconds},
        validation,
    )
    # numpy's numbers would make a checkpoint that torch does not read
    epochs, batch_size, seed = int(epochs), int(batch_size), None if seed is None else int(seed)
    lr, weight_decay, lr_decay = float(lr), float(weight_decay), float(lr_decay)
    clip = None if clip is None else float(clip)
    fresh = int(torch.randint(1 << 62, (), generator=generator)) if seed is None else seed
    before = generators(model)
    with joined():
        together = Together(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        answers = Answers.of(triples.directed("train"), triples.num_entities, triples.num_relations).to(device)
        sampling = Sampling(found.count, found.filtered) if isinstance(found, NegativeSampling) else None
        batches = Batches(answers, batch_size, sampling=sampling, worker=together.worker, workers=together.workers)
        made = make_optimizer(model, optimizer, lr=lr, weight_decay=weight_decay, steps=epochs * len(batches))
        identity = {
            "model": type(model).__name__, "entities": model.num_entities, "relations": model.num_relations,
            "triples": sha256(triples.train.cpu().numpy().tobytes()).hexdigest()[:16],
            "rows": batches.rows, "batch_size": batch_size, "optimizer": type(made).__name__,
            "options": plain_options(optimizer),
            "loss": type(found).__name__ if type(found).__repr__ is object.__repr__ else repr(found),
            "lr": lr, "weight_decay": weight_decay, "lr_decay": lr_decay, "clip": clip, "amp": amp,
            "seed": seed, "workers": together.workers, "scheduled": epochs if schedule is not None else None,
        }  # fmt: skip
        run = _Run(
            model=model, triples=triples, batches=batches, loss=found, optimizer=made, together=together,
            state=RunState(
                told(fresh), [group["lr"] for group in made.param_groups], settle=getattr(made, "settle_at", None)
            ),
            epochs=epochs,
            lr_decay=lr_decay, schedule=schedule, clip=clip, every=every, patience=patience, validation=validation,
            checkpoint=None if checkpoint is None else Checkpoint(checkpoint, identity),
            checkpoint_seconds=checkpoint_seconds, memory=memory, max_seconds=max_seconds,
            context=partial(torch.autocast, device.type, torch.bfloat16) if amp else nullcontext,
            look=1 if device.type == "cpu" else LOOK,
        )  # fmt: skip
        training = [(module, module.training) for module in model.modules()]
        try:
            return run.run(progress, log, tensorboard)
        finally:
            set_generators(before)
            for module, mode in training:
                module.training = mode


class _Run:
    """One training run: its parts, and the loop over them."""

    def __init__(
        self,
        *,
        model: KGModel,
        triples: Triples,
        batches: Batches,
        loss: Loss,
        optimizer: Optimizer,
        together: Together,
        state: RunState,
        epochs: int,
        lr_decay: float,
        schedule: Callable[[int, int], float] | None,
        clip: float | None,
        every: int | None,
        patience: int | None,
        validation: dict[str, Any],
        checkpoint: Checkpoint | None,
        checkpoint_seconds: float,
        memory: int,
        max_seconds: float | None,
        context: Callable[[], AbstractContextManager[Any]],
        look: int,
    ) -> None:
        self.model, self.triples, self.batches, self.loss, self.optimizer = model, triples, batches, loss, optimizer
        self.together, self.state, self.epochs, self.clip = together, state, epochs, clip
        self.lr_decay, self.schedule, self.every, self.patience = lr_decay, schedule, every, patience
        self.validation, self.checkpoint, self.checkpoint_seconds = validation, checkpoint, checkpoint_seconds
        self.memory, self.context, self.look = memory, context, look
        self.begin = self.written = time.monotonic()
        self.until = math.inf if max_seconds is None else self.begin + max_seconds
        self.report: Progress = lambda done, whole, text: None
        self.log: EpochLog | None = None
        self.text = ""
        self._by_closure = bool(getattr(optimizer, "_by_closure", False))
        self._interrupted = self._stepping = False
        self._waiting: list[tuple[Tensor, int]] = []

    # --- the run ---

    def run(self, progress: bool | Progress, log: Any, tensorboard: Any) -> History:
        """Everything, from where the checkpoint says to the best weights."""
        if self.checkpoint is not None:
            self.state = self.checkpoint.read(self.model, self.optimizer) or self.state
            if self.state.settle is not None:
                self.optimizer.settle_at = self.state.settle  # type: ignore[attr-defined]
        first = self.together.worker == 0
        with (
            EpochLog(log if first else None, tensorboard if first else None, self.state.epoch) as self.log,
            reporting("train", progress if first else False) as self.report,
            self._listening(),
        ):
            try:
                stopped = self._loop()
            except KeyboardInterrupt:
                # between two steps, or in a validation: nothing is half done
                if not self._stepping:
                    self._write()
                raise
        self._settle()
        epochs = tuple(map(from_plain, self.state.epochs))
        return History(epochs, self.state.best or None, stopped)

    def _loop(self) -> str:
        state, stopped = self.state, "epochs"
        while state.epoch < self.epochs:
            if self._patience_spent():
                stopped = "patience"
                break
            if not self._steps():
                stopped = "max_seconds"
                break
            self._end_epoch()
            if self._interrupted:
                raise KeyboardInterrupt
            if self.together.agreed(time.monotonic() >= self.until) and state.epoch < self.epochs:
                stopped = "max_seconds"
                break
            if self.together.agreed(time.monotonic() - self.written >= self.checkpoint_seconds):
                self._write()
        if stopped == "epochs" and self._patience_spent():
            stopped = "patience"
        self._write()
        return stopped

    def _patience_spent(self) -> bool:
        mrr = [epoch for epoch in self.state.epochs if "mrr" in epoch]
        stale = sum(epoch["epoch"] > self.state.best for epoch in mrr)
        return self.patience is not None and stale >= self.patience

    def _steps(self) -> bool:
        """The steps of the present epoch that are left; whether they were all made."""
        state, alone, each = self.state, self.together.workers == 1, len(self.batches)
        if state.step == 0:
            torch.manual_seed(derived(state.seed, state.epoch, "dropout", self.together.worker))
        self.model.train()
        start = time.perf_counter()
        for batch in self.batches.epoch(derived(state.seed, state.epoch, "order"), state.step, state.negatives):
            self._set_rates()
            self._stepping = True
            value = self._step(batch)
            self._waiting.append((value, batch.size))
            state.step += 1
            state.negatives = self.batches.generator.get_state() if self.loss.sampled else None
            now = time.perf_counter()
            state.seconds, start = state.seconds + now - start, now
            self._stepping = False
            if len(self._waiting) >= self.look:
                self._look()
            self.report(state.epoch * each + state.step, self.epochs * each, self.text)
            if self._interrupted:
                raise KeyboardInterrupt
            if alone and state.step < each:
                if time.monotonic() >= self.until:
                    return False
                if time.monotonic() - self.written >= self.checkpoint_seconds:
                    self._write()
        self._look()
        return True

    def _step(self, batch: Batch) -> Tensor:
        """One step; the loss of the whole batch."""
        optimizer = self.optimizer

        def gradients() -> Tensor:
            optimizer.zero_grad()
            with self.together.quiet():
                found = self.loss.backward(self.model, batch, self.context, self.memory)
            found = self.together.reduce(found)
            if self.look == 1 and not math.isfinite(found):
                self._refuse(float(found), self.state.step + 1)
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            return found

        if self._by_closure:
            with torch.enable_grad():
                closure: Any = gradients
                return torch.as_tensor(optimizer.step(closure))
        value = gradients()
        optimizer.step()
        return value

    def _set_rates(self) -> None:
        factor = self.lr_decay**self.state.epoch
        if self.schedule is not None:
            step = self.state.epoch * len(self.batches) + self.state.step
            factor *= self.schedule(step, self.epochs * len(self.batches))
        for group, rate in zip(self.optimizer.param_groups, self.state.rates, strict=True):
            group["lr"] = rate * factor

    def _look(self) -> None:
        """Add up the losses that were not looked at; one that is not finite is refused."""
        if not self._waiting:
            return
        values = torch.stack([value.double() for value, _ in self._waiting]).tolist()
        for k, value in enumerate(values):
            if not math.isfinite(value):
                self._refuse(value, self.state.step - len(values) + k + 1)
        self.state.loss += sum(value * size for value, (_, size) in zip(values, self._waiting, strict=True))
        self._waiting.clear()

    def _refuse(self, value: float, batch: int) -> None:
        state = self.state
        raise ValueError(
            f"train: the loss must stay finite, got {value} in epoch {state.epoch + 1}, batch {batch} of "
            f"{len(self.batches)} (lr = {self.optimizer.param_groups[0]['lr']:g}); lower lr, or clip gradients"
        )

    # --- between epochs ---

    def _end_epoch(self) -> None:
        """Validate, keep the best weights, count the epoch."""
        state, number = self.state, self.state.epoch + 1
        self.together.share_buffers()
        figures: dict[str, Any] = {}
        if self.every is not None and (number % self.every == 0 or number == self.epochs):
            figures = self._validated()
        shown = self.optimizer.ranks() if hasattr(self.optimizer, "ranks") else None
        lr = self.optimizer.param_groups[0]["lr"]
        self._stepping = True  # what follows happens altogether
        epoch = Epoch(number, state.loss / self.batches.rows, state.seconds, lr, **figures, ranks=shown)
        best = max((other["mrr"] for other in state.epochs if "mrr" in other), default=-math.inf)
        if epoch.mrr is not None and epoch.mrr > best:
            state.best = number
            state.weights = {key: value.clone() for key, value in self._compact().state_dict().items()}
        state.epochs.append(to_plain(epoch))
        state.epoch, state.step, state.loss, state.seconds, state.negatives = number, 0, 0.0, 0.0, None
        self._stepping = False
        if self.log is not None:
            self.log.add(epoch)
        mrr = "" if not state.best else f", valid MRR {state.epochs[state.best - 1]['mrr']:.4f}"
        self.text = f"epoch {number}, loss {epoch.loss:.4g}{mrr}"

    def _validated(self) -> dict[str, Any]:
        """Figures of worker 0, on all; what it raises, all raise."""
        found: Any = None
        if self.together.worker == 0:
            try:
                found = measured(evaluate(self._compact(), self.triples, **self.validation))
            except Exception as error:
                if self.together.workers == 1:
                    raise
                found = str(error)
        found = told(found)
        if isinstance(found, str):
            raise ValueError(found)
        figures: dict[str, Any] = found
        return figures

    def _compact(self) -> nn.Module:
        """What is measured and kept: without reserve directions, where an optimizer of networks trains."""
        return compact(self.model) if isinstance(self.optimizer, NetworkOptimizer) else self.model

    def _settle(self) -> None:
        """The best weights, or the last; windows of networks are closed."""
        if self.state.weights is not None:
            self.model.load_state_dict(self.state.weights)
        elif isinstance(self.optimizer, NetworkOptimizer):
            self.model.load_state_dict(self._compact().state_dict())

    def _write(self) -> None:
        self._look()
        if self.checkpoint is not None and self.together.worker == 0:
            self.checkpoint.write(self.model, self.optimizer, self.state)
        self.written = time.monotonic()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Ctrl-C waits for the end of the step where a checkpoint is written; a second one does not."""
        alone = self.together.workers == 1
        if self.checkpoint is None or not alone or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def heard(number: int, frame: Any) -> None:
            if not self._stepping or self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        signal.signal(signal.SIGINT, heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
