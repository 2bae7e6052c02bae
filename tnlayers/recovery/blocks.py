"""Block after block fitted to that of the original: least squares, then descent."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from decompositions.progress import Progress
from tnlayers.linear import Linear
from tnlayers.recovery.capture import block_error, both, call_order, find_blocks, layer_pairs, run_to
from tnlayers.recovery.descent import Limits, Schedule, Standing, descend
from tnlayers.recovery.feed import (
    Feed,
    Masker,
    Store,
    attention_mask,
    call,
    check_batches,
    device_of,
    length_of,
    main_output,
    rows_that_count,
)
from tnlayers.recovery.least_squares import solve_pairs, why_not_solved
from tnlayers.recovery.options import check_limits, draw_seed, warn_early
from tnlayers.recovery.result import BlockRow, Moment, Recovery
from tnlayers.recovery.session import HALF, Checkpoint, Clock, at_work, check_models, copied
from tnlayers.surgery import owners_of_parameters

STEPS = 200
"""Steps a block where neither steps nor seconds are given."""
RIDGE = 1e-4
EARLY = "stopped early"


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: str | Sequence[str] | None = None,
    steps: int | None = None,
    seconds: int | float | None = None,
    lr: int | float = 1e-3,
    sequential: bool = True,
    closed_form: bool = True,
    schedule: Schedule = "cosine",
    mask: Masker = attention_mask,
    cache_bytes: int = 2**30,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 50,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
) -> Recovery:
    """Fit every block of a compressed model, in place, to that of the original: `min ‖block'(x') - block(x)‖^2`.

    x are the original's inputs of the block and x' those of the compressed model as fitted so far (`sequential`), so
    that a block also makes up for those before it; else x' = x. First every network layer of the block is solved by
    least squares (see `solve_linear`) for what its original gives, and kept so where the error of the block falls;
    then AdamW descends on the trainable parameters of the block.
    No block ends with a larger error on the calibration data than it began with. Tokens of padding do not count. The
    original is never changed; both models compute in evaluation mode (no dropout) and get their modes back; a model
    in 16 bits is fitted in float32 and cast back. Frozen parameters stay; gradients are dropped.
    Cost: two passes up to every block, then `steps` passes of the block; in memory the inputs and outputs of one
    block, beyond `cache_bytes` in a temporary file.

    Args:
        model: the compressed model.
        teacher: the original: modules of the same names.
        batches: a re-iterable of what the models take (a tensor, a tuple or a dict of keyword arguments).
        blocks: names or patterns ("encoder.layer.*", one level a dot); by default see `find_blocks`. They are taken in
            the order in which they are called.
        steps: of descent a block, 200 by default where no seconds are given; 0 for least squares alone.
        seconds: limit for all blocks together, shared equally among those that are left; at most half of it goes to
            least squares.
        lr: peak learning rate.
        sequential: see above.
        closed_form: whether to solve layers by least squares first.
        schedule: "cosine", "linear", "constant" (after a rise over a twentieth), or a callable part -> factor.
        mask: a batch -> its tokens that count (batch, tokens), or None; its `attention_mask` by default.
        cache_bytes: of activations in memory.
        checkpoint: file that is written every `every` steps and between blocks. If it is there, the run goes on where
            it stopped (with steps and a sequence of batches, to the same bits); a finished one is loaded.
        every: steps between entries of the history, looks at the error and checkpoints.
        progress: called as (done, total, text).
        generator: of the order of batches; torch's global one by default.

    Returns:
        Recovery; before and after are of the model's output, `‖y' - y‖^2 / ‖y‖^2`.

    Raises:
        ValueError: no batches; blocks that are missing, or not called exactly once a pass; a teacher that shares
            memory with the model; a checkpoint of another run; outputs that are not finite.
        TypeError: no modules, one batch instead of several.

    References:
        Y. Li et al., BRECQ: pushing the limit of post-training quantization by block reconstruction, ICLR 2021,
        arXiv 2102.05426.

    Example:
        >>> import copy, torch, tnlayers
        >>> from functools import partial
        >>> from decompositions import svd
        >>> teacher = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        >>> model = copy.deepcopy(teacher)
        >>> _ = tnlayers.tensorize(model, partial(svd, rank=4))
        >>> done = reconstruct(model, teacher, [torch.randn(64, 16)], steps=20)
        >>> [row.name for row in done.blocks], done.after < done.before
        (['0', '2'], True)
    """
    check_models("reconstruct", model, teacher)
    check_batches("reconstruct", "batches", batches)
    steps = STEPS if steps is None and seconds is None else steps
    check_limits("reconstruct", steps, seconds, lr, every, schedule, cache_bytes)
    names = find_blocks(model, blocks)
    for name in names:
        if name not in dict(teacher.named_modules()):
            raise ValueError(f"reconstruct: the teacher must have the model's modules, got none named {name!r}")
    config = {
        "blocks": names,
        "steps": steps,
        "seconds": seconds,
        "lr": float(lr),
        "sequential": sequential,
        "closed_form": closed_form,
        "schedule": schedule if isinstance(schedule, str) else "callable",
        "every": every,
        "batches": length_of(batches),
    }
    file = Checkpoint("reconstruct", checkpoint, config, model)
    with at_work(model, teacher):
        run = _Run(model, teacher, batches, names, file, steps, seconds, float(lr), every, mask, cache_bytes)
        run.sequential, run.closed_form, run.schedule, run.progress = sequential, closed_form, schedule, progress
        seed = draw_seed(generator)
        finished = run.finished()
        if finished is None:
            finished = run.all_blocks(torch.Generator().manual_seed(seed))
    return finished


@dataclass
class _Run:
    """One call of `reconstruct`."""

    model: nn.Module
    teacher: nn.Module
    batches: Iterable[Any]
    names: list[str]
    file: Checkpoint
    steps: int | None
    seconds: int | float | None
    lr: float
    every: int
    mask: Masker
    cache_bytes: int
    sequential: bool = True
    closed_form: bool = True
    schedule: Schedule = "cosine"
    progress: Progress | None = None

    def finished(self) -> Recovery | None:
        """What a finished checkpoint holds; the model is set to it."""
        found = self.file.found
        if found is None or "result" not in found:
            return None
        self.model.load_state_dict(found["state"])
        return Recovery.from_dict(found["result"])

    def all_blocks(self, generator: torch.Generator) -> Recovery:
        """Every block in the order of calls."""
        clock, found = Clock(), self.file.found
        names = call_order(self.teacher, self.names, next(iter(self.batches)))
        history: list[Moment] = []
        rows: list[BlockRow] = []
        inner: dict[str, Any] | None = None
        if found is not None:
            self.model.load_state_dict(found["state"])
            history = [Moment(*one) for one in found["history"]]
            rows = [BlockRow.from_dict(one) for one in found["rows"]]
            inner, before = found["inner"], found["before"]
            generator.set_state(found["generator"])
            clock = Clock(found["elapsed"])
        else:
            before = self.output_error()
            if self.seconds is not None:  # the same will be measured at the end: within the time too
                self.seconds = max(self.seconds - clock.elapsed, 0.5 * self.seconds)

        def save(inner: dict[str, Any] | None) -> None:
            self.file.write(
                state=dict(self.model.state_dict()),
                history=[list(one) for one in history],
                rows=[row.to_dict() for row in rows],
                inner=inner,
                before=before,
                elapsed=clock.elapsed,
                generator=generator.get_state(),
            )

        for k in range(len(rows), len(names)):
            row, moments = self.one_block(names, k, inner, save, clock, generator)
            inner = None
            rows.append(row)
            history += moments
            save(None)
        early = [row for row in rows if row.reason.startswith(EARLY)]
        reason = f"all {len(rows)} blocks are done" if not early else f"{early[0].name}: {early[0].reason}"
        result = Recovery(
            "reconstruct",
            "relative squared error of the output",
            before,
            self.output_error(),
            sum(row.steps for row in rows),
            clock.elapsed,
            reason,
            tuple(history),
            tuple(rows),
        )
        self.file.write(state=dict(self.model.state_dict()), result=result.to_dict())
        return result

    def one_block(
        self,
        names: list[str],
        k: int,
        inner: dict[str, Any] | None,
        save: Callable[[dict[str, Any] | None], None],
        clock: Clock,
        generator: torch.Generator,
    ) -> tuple[BlockRow, list[Moment]]:
        """Fit one block, or go on with it."""
        name = names[k]
        block, original = self.model.get_submodule(name), self.teacher.get_submodule(name)
        moving = [p for p in block.parameters() if p.requires_grad]
        start = clock.elapsed
        end = None if self.seconds is None else start + max(0.0, self.seconds - start) / (len(names) - k)
        with Store(self.cache_bytes) as store:
            power, count = self.collect(store, block, original)
            if not moving:
                error = block_error(block, store, power)
                return BlockRow(name, error, error, error, (), 0, "nothing to train"), []
            feed = Feed(range(len(store)), generator)
            if inner is None:
                before = block_error(block, store, power)
                if not before < float("inf"):
                    raise ValueError(f"reconstruct: outputs of {name} must be finite, got a relative error of {before}")
                until = None if end is None else start + 0.5 * (end - start)
                solved, layers = self.solve(block, original, store, power, before, clock, until)
                standing = Standing(best=copied(block), value=solved)
            else:
                before, solved, layers = inner["before"], inner["solved"], tuple(inner["layers"])
                standing = Standing.of(inner["standing"])
                feed.load(inner["feed"])
            optimizer = torch.optim.AdamW(moving, lr=self.lr, weight_decay=0.0)
            if inner is not None:
                optimizer.load_state_dict(inner["optimizer"])

            def save_inside() -> None:
                save(
                    {
                        "before": before,
                        "solved": solved,
                        "layers": list(layers),
                        "standing": standing.state(),
                        "feed": feed.state(),
                        "optimizer": optimizer.state_dict(),
                    }
                )

            def tell(step: int, loss: float) -> None:
                if self.progress is not None:
                    text = f"{name}: error {loss:.3g}"
                    if self.steps is not None:
                        self.progress(k * self.steps + step, len(names) * self.steps, text)
                    elif self.seconds is not None:
                        self.progress(int(clock.elapsed), int(self.seconds), text)

            def loss_of(place: int | None, index: Any) -> Tensor:
                made, target = both(block, store[index])
                return (made - target).square().sum() * (count / (max(1, target.numel()) * power))

            ended = descend(
                block,
                optimizer,
                feed,
                loss_of,
                standing,
                Limits(self.steps, start, end),
                clock,
                schedule=self.schedule,
                bases=[self.lr],
                every=self.every,
                name=name,
                judge=lambda: block_error(block, store, power),
                save=save_inside,
                tell=tell,
            )
        if not ended.good:
            warn_early("reconstruct", f"{name}: {ended.reason}", self.lr)
        reason = ended.reason if ended.good else f"{EARLY}: {ended.reason}"
        return BlockRow(name, before, solved, standing.value, layers, standing.step, reason), standing.history

    def collect(self, store: Store, block: nn.Module, original: nn.Module) -> tuple[float, int]:
        """Inputs and outputs of a block for every batch; `‖y‖^2` of the outputs, and how many numbers count."""
        power, count = 0.0, 0
        with torch.no_grad():
            for batch in self.batches:
                given, made = run_to(self.teacher, original, batch, output=True)
                own = (
                    run_to(self.model, block, batch)[0]
                    if self.sequential
                    else tree_map_only(Tensor, self.placed, given)
                )
                kept = given if self.closed_form else None
                target, mask = main_output(made), self.mask(batch)
                rows = rows_that_count(target, mask)
                power, count = power + float(rows.double().square().sum()), count + rows.numel()
                store.append({"given": own, "original": kept, "target": target, "mask": mask})
        if not power < float("inf"):
            raise ValueError("reconstruct: outputs of the teacher must be finite, got NaN or infinity in a block")
        return power or 1.0, count

    def placed(self, x: Tensor) -> Tensor:
        """An input of the teacher as the model takes it."""
        return x.to(device_of(self.model), torch.float32 if x.dtype in HALF else x.dtype)

    def solve(
        self,
        block: nn.Module,
        original: nn.Module,
        store: Store,
        power: float,
        error: float,
        clock: Clock,
        until: float | None,
    ) -> tuple[float, tuple[str, ...]]:
        """Solve the layers of a block one by one, while there is time; each is kept where the block's error falls."""
        if not self.closed_form:
            return error, ()
        owners, done = owners_of_parameters(self.model), []
        dense = dict(original.named_modules())
        for name, layer in list(block.named_modules()):
            tied = any(len(owners[id(core)]) > 1 for core in getattr(layer, "cores", ()))
            if until is not None and clock.elapsed > until:
                break
            if why_not_solved(layer) or tied or name not in dense:
                continue
            assert isinstance(layer, Linear)
            with Store(self.cache_bytes) as pairs, torch.no_grad():
                if not layer_pairs(pairs, block, layer, original, dense[name], store):
                    continue
                kept, new = copied(layer), math.inf
                try:
                    solve_pairs(layer, pairs.entries, RIDGE)
                    new = block_error(block, store, power)
                finally:  # also where it was interrupted
                    if not new < error:
                        layer.load_state_dict(kept)
            if new < error:
                error = new
                done.append(name or type(layer).__name__)
        return error, tuple(done)

    def output_error(self) -> float:
        """Relative squared error of the model's output over all batches."""
        wrong = whole = 0.0
        with torch.no_grad():
            for batch in self.batches:
                mask = self.mask(batch)
                y = rows_that_count(main_output(call(self.teacher, batch)), mask).double()
                made = rows_that_count(main_output(call(self.model, batch)), mask).to(y)
                wrong, whole = wrong + float((made - y).square().sum()), whole + float(y.square().sum())
        if not wrong + whole < float("inf"):
            raise ValueError("reconstruct: outputs of both models must be finite, got NaN or infinity")
        return wrong / (whole or 1.0)
