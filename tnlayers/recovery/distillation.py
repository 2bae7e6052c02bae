"""The whole compressed model trained to do what the original does."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from decompositions import numel
from decompositions.balance import balanced
from decompositions.progress import Progress
from tnlayers.optim import RankAdaptive, compact
from tnlayers.optim.models import trees
from tnlayers.recovery.capture import find_blocks
from tnlayers.recovery.descent import Limits, Schedule, Standing, descend
from tnlayers.recovery.feed import (
    Feed,
    Masker,
    attention_mask,
    call,
    check_batches,
    length_of,
    main_output,
)
from tnlayers.recovery.losses import Loss, logits_loss, output_loss, relative_error, watched
from tnlayers.recovery.options import check_limits, draw_seed, warn_early
from tnlayers.recovery.result import Recovery
from tnlayers.recovery.session import Checkpoint, Clock, at_work, check_models, copied
from tnlayers.surgery import network_layers, weight_key

LOSSES = ("hidden", "logits", "output")
OPTIMIZERS = ("adamw", "rank_adaptive")
SETTLE = 0.6
"""Part of the way after which the ranks found by "rank_adaptive" stay."""
JUDGED = 8
"""Batches by which before and after are measured where none are kept back."""


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    loss: str | Loss = "output",
    epochs: int | None = None,
    steps: int | None = None,
    seconds: int | float | None = None,
    optimizer: str | Callable[[nn.Module], Optimizer] = "adamw",
    lr: int | float = 3e-4,
    hidden: str | Sequence[str] | None = None,
    weight_hidden: int | float = 1.0,
    temperature: int | float = 2.0,
    schedule: Schedule = "cosine",
    mask: Masker = attention_mask,
    validate: Iterable[Any] | None = None,
    cache_bytes: int = 2**28,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 50,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
) -> Recovery:
    """Train a compressed model, in place, to give what the original gives for the same batches; no labels.

    "output": `‖y' - y‖^2 / ‖y‖^2 + mean(1 - cos)`, the cosine of the outputs averaged over tokens (embeddings);
    "hidden": that, and `weight_hidden` times the mean of `‖h' - h‖^2 / ‖h‖^2` over the outputs h of inner modules, as
    PELA does; "logits": `T^2 KL` of the softened classes. Tokens of padding do not count.
    `seconds=300` means at most five minutes, with the learning rate falling to zero by then. With `validate` the model
    is left at the state of least loss on these batches, never worse than at the start.
    If the loss leaves the finite numbers, it stops with a RecoveryWarning at the last state looked at; an interrupt
    leaves the model so too. The teacher is never changed; both models compute in evaluation mode (no dropout) and get
    their modes back; a model in 16 bits is trained in float32 and cast back. Frozen parameters stay; gradients are
    dropped; gradients are clipped at norm one.
    Cost: a pass of the teacher (once a batch, where its outputs fit into `cache_bytes`), forward and backward of the
    model, for every batch.

    Args:
        model: the compressed model.
        teacher: the original.
        batches: a re-iterable of what the models take (a tensor, a tuple or a dict of keyword arguments); a sequence is
            shuffled before every pass.
        loss: one of the above, or a callable (output, teacher's output, batch) -> loss.
        epochs: passes over the batches; or steps.
        steps: batches.
        seconds: time limit; whichever comes first.
        optimizer: "adamw" (no weight decay, from the gauge of `decompositions.balance`); "rank_adaptive":
            `tnlayers.RankAdaptive`, which moves ranks between the layers while the networks together hold no more
            parameters than at the start; or a callable model -> optimizer, whose learning rates are then the peaks.
        lr: peak learning rate; of "rank_adaptive" in its own sense. Cores of pretrained weights want less than layers
            trained from scratch: 3e-4 to 5e-4; several times that undoes what the decomposition had kept.
        hidden: names or patterns of the inner modules of "hidden", the same in both models; by default the blocks of
            `find_blocks`.
        weight_hidden: see above.
        temperature: T of "logits".
        schedule: "cosine", "linear", "constant" (after a rise over a twentieth), or a callable part -> factor.
        mask: a batch -> its tokens that count (batch, tokens), or None; its `attention_mask` by default.
        validate: batches kept back.
        cache_bytes: of the teacher's outputs kept in memory (where `batches` is a sequence).
        checkpoint: file that is written every `every` steps. If it is there, the run goes on where it stopped (with
            steps and a sequence of batches, to the same bits, ranks that changed included); a finished one is loaded.
        every: steps between entries of the history, validations and checkpoints.
        progress: called as (done, total, text): steps, or seconds where only these are limited.
        generator: of the order of batches; torch's global one by default.

    Returns:
        Recovery; before and after are the loss on `validate`, or on the first 8 batches.

    Raises:
        ValueError: no limit, no batches, unknown words, modules that are missing; a teacher that shares memory with
            the model; a checkpoint of another run; a loss that is not finite at the start.
        TypeError: no modules, one batch instead of several, another loss or optimizer.

    References:
        Y. Guo et al., PELA: learning parameter-efficient models with low-rank approximation, CVPR 2024,
        arXiv 2310.10700.

    Example:
        >>> import copy, torch, tnlayers
        >>> from functools import partial
        >>> from decompositions import svd
        >>> teacher = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        >>> model = copy.deepcopy(teacher)
        >>> _ = tnlayers.tensorize(model, partial(svd, rank=4))
        >>> done = distill(model, teacher, list(torch.randn(128, 16).split(32)), steps=40, lr=3e-3)
        >>> done.steps, done.after < done.before
        (40, True)
    """
    check_models("distill", model, teacher)
    check_batches("distill", "batches", batches)
    if validate is not None:
        check_batches("distill", "validate", validate)
    count = length_of(batches)
    steps = _steps(epochs, steps, seconds, count)
    check_limits("distill", steps, seconds, lr, every, schedule, cache_bytes)
    _check_words(loss, optimizer, weight_hidden, temperature)
    names = find_blocks(model, hidden) if loss == "hidden" else []
    for name in names:
        if name not in dict(teacher.named_modules()):
            raise ValueError(f"distill: the teacher must have the model's modules, got none named {name!r}")
    config = {
        "loss": loss if isinstance(loss, str) else "callable",
        "steps": steps,
        "seconds": seconds,
        "optimizer": optimizer if isinstance(optimizer, str) else "callable",
        "lr": float(lr),
        "hidden": names,
        "weight_hidden": float(weight_hidden),
        "temperature": float(temperature),
        "schedule": schedule if isinstance(schedule, str) else "callable",
        "every": every,
        "batches": count,
        "validate": validate is not None,
    }
    file = Checkpoint("distill", checkpoint, config, model)
    side = _Teacher(teacher, loss, names, float(weight_hidden), float(temperature), mask, cache_bytes)
    with at_work(model, teacher):
        if file.found is not None and "result" in file.found:
            model.load_state_dict(file.found["state"])
            return Recovery.from_dict(file.found["result"])
        run = _Run(model, side, batches, validate, file, Limits(steps), seconds, every, schedule, progress)
        return run(optimizer, float(lr), torch.Generator().manual_seed(draw_seed(generator)))


def _balance(model: nn.Module) -> list[nn.Parameter]:
    """Networks in the gauge in which AdamW's one step size suits all cores; the cores that are identities there rest.

    Returns:
        The cores that rest; they ask for gradients again when training is over.
    """
    rested: list[nn.Parameter] = []
    seen: set[Any] = set()
    for _, layer in network_layers(model):
        if weight_key(layer) in seen or not all(core.requires_grad for core in layer.cores):
            continue
        seen.add(weight_key(layer))
        net, still = balanced(layer.network.detach())
        layer.set_network(net)
        rested += [layer.cores[k] for k in still]
    for core in rested:
        core.requires_grad_(False)
    return rested


def _steps(epochs: int | None, steps: int | None, seconds: int | float | None, count: int | None) -> int | None:
    """Steps of so many passes."""
    if epochs is not None and steps is not None:
        raise ValueError(f"distill: give epochs or steps, got epochs={epochs!r} and steps={steps!r}")
    if epochs is None:
        if steps is None and seconds is None:
            raise ValueError("distill: give a limit, expected epochs=, steps= or seconds=, got none; seconds=300")
        return steps
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"distill: epochs must be an int >= 0, got {epochs!r}")
    if count is None:
        raise ValueError("distill: epochs need batches with a length, got none; give steps= or seconds=")
    return epochs * count


def _check_words(loss: Any, optimizer: Any, weight_hidden: Any, temperature: Any) -> None:
    for key, value, known in (("loss", loss, LOSSES), ("optimizer", optimizer, OPTIMIZERS)):
        if isinstance(value, str) and value not in known:
            raise ValueError(f"distill: {key} must be one of {known} or a callable, got {value!r}")
        if not isinstance(value, str) and not callable(value):
            raise TypeError(f"distill: {key} must be one of {known} or a callable, got {type(value).__name__}")
    if not 0 <= weight_hidden < float("inf"):
        raise ValueError(f"distill: weight_hidden must be a finite number >= 0, got {weight_hidden!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"distill: temperature must be a finite number > 0, got {temperature!r}")


@dataclass
class _Teacher:
    """The loss of a batch, and what the teacher gives for it, held where that is asked for again."""

    teacher: nn.Module
    loss: str | Loss
    names: Sequence[str]
    weight: float
    temperature: float
    mask: Masker
    budget: int
    held: dict[Any, tuple[Any, dict[str, Tensor]]] = field(default_factory=dict)

    def gives(self, key: Any, batch: Any) -> tuple[Any, dict[str, Tensor]]:
        """Output and hidden states; `key` None: not to be held."""
        if key in self.held:
            return self.held[key]
        with torch.no_grad(), watched(self.teacher, self.names) as seen:
            output = call(self.teacher, batch)
        if isinstance(self.loss, str):
            output = main_output(output)
        found = output, dict(seen)
        if key is not None and isinstance(output, Tensor):
            size = sum(t.numel() * t.element_size() for t in (output, *seen.values()))
            if size <= self.budget:
                self.budget -= size
                self.held[key] = found
        return found

    def __call__(self, model: nn.Module, key: Any, batch: Any) -> Tensor:
        """Loss of the model for a batch."""
        target, states = self.gives(key, batch)
        with watched(model, self.names) as seen:
            output = call(model, batch)
        if not isinstance(self.loss, str):
            made = self.loss(output, target, batch)
            if not isinstance(made, Tensor) or made.numel() != 1:
                raise TypeError(f"distill: loss must return a tensor of one number, got {made!r}")
            return made.reshape(())
        mask, output = self.mask(batch), main_output(output)
        if output.shape != target.shape:
            raise ValueError(
                f"distill: outputs of model and teacher must have one shape, got {tuple(output.shape)} and "
                f"{tuple(target.shape)}; give loss=, a callable"
            )
        if self.loss == "logits":
            return logits_loss(output, target, mask, self.temperature)
        total = output_loss(output, target, mask)
        for name in self.names:
            total = total + self.weight / len(self.names) * relative_error(seen[name], states[name], mask)
        return total


@dataclass
class _Run:
    """One call of `distill`."""

    model: nn.Module
    side: _Teacher
    batches: Iterable[Any]
    validate: Iterable[Any] | None
    file: Checkpoint
    limits: Limits
    seconds: int | float | None
    every: int
    schedule: Schedule
    progress: Progress | None

    def judge(self) -> float:
        """Mean loss on what is kept back, or on the first batches, at the ranks that are kept in the end."""
        model = compact(self.model) if self.adaptive is not None else self.model
        judged = islice(self.batches, JUDGED) if self.validate is None else self.validate
        indexed = self.validate is not None and hasattr(self.validate, "__getitem__")
        losses = []
        with torch.no_grad():
            for k, batch in enumerate(judged):
                losses.append(float(self.side(model, ("validate", k) if indexed else None, batch)))
        return sum(losses) / len(losses)

    adaptive: RankAdaptive | None = None

    rested: list[nn.Parameter] = field(default_factory=list)

    def __call__(self, made: str | Callable[[nn.Module], Optimizer], lr: float, generator: torch.Generator) -> Recovery:
        """Train, or go on."""
        try:
            return self._train(made, lr, generator)
        finally:
            for core in self.rested:
                core.requires_grad_(True)

    def _train(self, made: str | Callable[[nn.Module], Optimizer], lr: float, generator: torch.Generator) -> Recovery:
        clock, found, model = Clock(), self.file.found, self.model
        before = self.judge()
        checked = clock.elapsed
        if not abs(before) < float("inf"):
            raise ValueError(f"distill: the loss must be finite before the first step, got {before}")
        standing = Standing(best=copied(model), value=before if self.validate is not None else float("inf"))
        feed = Feed(self.batches, generator)
        try:
            self.rested = _balance(model) if made == "adamw" else []
            optimizer = self._optimizer(made, lr)  # with the budget of the ranks at the start
            bases = [float(group["lr"]) for group in optimizer.param_groups]
            if found is not None:
                clock, before, standing = Clock(found["elapsed"]), found["before"], Standing.of(found["standing"])
                model.load_state_dict(found["state"])
                optimizer.load_state_dict(found["optimizer"])
                feed.load(found["feed"])
        except BaseException:
            model.load_state_dict(standing.best)
            raise

        def save() -> None:
            self.file.write(
                state=dict(model.state_dict()),
                optimizer=optimizer.state_dict(),
                standing=standing.state(),
                feed=feed.state(),
                before=before,
                elapsed=clock.elapsed,
            )

        def tell(step: int, value: float) -> None:
            if self.progress is not None:
                by_time = self.limits.steps is None
                done, total = (int(clock.elapsed), self.seconds) if by_time else (step, self.limits.steps)
                self.progress(done, int(total or 0), f"loss {value:.3g}")

        def settle(part: float) -> None:
            if self.adaptive is not None and part >= SETTLE and not self.adaptive.fixed:
                self.adaptive.settle()

        def as_loaded() -> None:
            # gauges made anew and gauges of a saved tree differ in the last bits: both runs go on from the latter
            optimizer.load_state_dict(optimizer.state_dict())

        # a last look, with validation, comes after the last step: within the time too
        end = None if self.seconds is None else max(float(self.seconds) - checked, 0.5 * float(self.seconds))
        ended = descend(
            model,
            optimizer,
            feed,
            lambda index, batch: self.side(model, index, batch),
            standing,
            self.limits._replace(end=end),
            clock,
            schedule=self.schedule,
            bases=bases,
            every=self.every,
            judge=self.judge if self.validate is not None else None,
            state_of=lambda module: copied(module) if self.adaptive is None else copied(compact(module)),
            stepped=settle,
            settled=as_loaded if self.adaptive is not None else None,
            save=save,
            tell=tell,
        )
        self.adaptive = None
        if not ended.good:
            warn_early("distill", ended.reason, lr)
        kept = len(list(islice(self.batches, JUDGED))) if self.validate is None else length_of(self.validate)
        what = f"loss on the first {kept} batches" if self.validate is None else "loss on the batches kept back"
        result = Recovery(
            "distill",
            what,
            before,
            self.judge() if self.validate is None else standing.value,
            standing.step,
            clock.elapsed,
            ended.reason if ended.good else f"stopped early: {ended.reason}",
            tuple(standing.history),
        )
        self.file.write(state=dict(model.state_dict()), result=result.to_dict())
        return result

    def _optimizer(self, made: str | Callable[[nn.Module], Optimizer], lr: float) -> Optimizer:
        if made == "rank_adaptive":
            nets = [layers[0].network for _, layers in trees(self.model).values()]
            if not nets:
                raise ValueError(
                    "distill: optimizer='rank_adaptive' needs a layer whose weight is a tree network, got none; 'adamw'"
                )
            budget = sum(numel(net) for net in nets)
            self.adaptive = RankAdaptive(self.model, lr=lr, budget=budget, every=10)
            return self.adaptive
        if callable(made):
            optimizer = made(self.model)
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"distill: optimizer must return a torch optimizer, got {type(optimizer).__name__}")
            self.adaptive = optimizer if isinstance(optimizer, RankAdaptive) else None
            return optimizer
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(wanted, lr=lr, weight_decay=0.0, fused=True)
