"""From labels and shapes to a printable contraction plan, and its execution.

A plan is made of plain tuples, from shapes only: it is made once, outside traced code, and run many times.
Labels are re-lettered within each pairwise step, so that a network may have more labels than einsum has letters.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from string import ascii_letters
from typing import Any, NamedTuple, TypeVar

import opt_einsum
import torch
from torch import Tensor

from decompositions.formats.network import Labels, Network

BATCH = "@"
"""Label of the flattened batch axis of a layer's input."""

# First version of the cost model: seconds = calls * CALL + flops / FLOP_RATE + bytes / BYTE_RATE.
# The constants are those of one CPU class (two cores, float32); only their ratios matter for the choice.
CALL_SECONDS = 13e-6
FLOP_RATE = 300e9
BYTE_RATE = 25e9


class Step(NamedTuple):
    """Contract two earlier operands into a new one; `right` is -1 where the step has one operand only."""

    left: int
    right: int
    equation: str


class Plan(NamedTuple):
    """How to contract a list of operands: pairwise steps (operands are numbered, results appended) and their cost.

    `flops` are multiply-adds times two of one forward pass, `bytes` the operands read and results written.
    """

    strategy: str
    steps: tuple[Step, ...]
    flops: int
    bytes: int

    @property
    def calls(self) -> int:
        """Number of pairwise contractions."""
        return len(self.steps)

    @property
    def seconds(self) -> float:
        """Predicted time of one forward pass, for comparison between plans only."""
        return self.calls * CALL_SECONDS + self.flops / FLOP_RATE + self.bytes / BYTE_RATE


def _letters(*operands: Labels) -> dict[str, str]:
    labels = dict.fromkeys(label for labels in operands for label in labels)
    return {label: ascii_letters[k] for k, label in enumerate(labels)}


def _equation(inputs: Sequence[Labels], output: Labels) -> str:
    letter = _letters(*inputs)
    return (
        ",".join("".join(letter[label] for label in labels) for labels in inputs)
        + "->"
        + "".join(letter[label] for label in output)
    )


class _Builder:
    """Appends pairwise steps and adds up their cost."""

    def __init__(self, inputs: Sequence[Labels], sizes: dict[str, int], output: Labels, itemsize: int) -> None:
        self.operands: list[Labels | None] = list(inputs)
        self.sizes, self.output, self.itemsize = sizes, output, itemsize
        self.steps: list[Step] = []
        self.flops = self.bytes = 0

    def numel(self, labels: Labels) -> int:
        return prod(self.sizes[label] for label in labels)

    def contract(self, left: int, right: int, result: Labels | None = None) -> int:
        """Contract two operands (or reduce one, `right = -1`); labels nobody needs any more are summed."""
        pair = [labels for k in (left, right) if k >= 0 and (labels := self.operands[k]) is not None]
        self.operands[left] = None
        if right >= 0:
            self.operands[right] = None
        rest = {label for labels in self.operands if labels is not None for label in labels} | set(self.output)
        involved = tuple(dict.fromkeys(label for labels in pair for label in labels))
        if result is None:
            last = not any(labels is not None for labels in self.operands)
            result = self.output if last else tuple(label for label in involved if label in rest)
        self.steps.append(Step(left, right, _equation(pair, result)))
        self.flops += (2 if right >= 0 else 1) * self.numel(involved)
        self.bytes += self.itemsize * (sum(map(self.numel, pair)) + self.numel(result))
        self.operands.append(result)
        return len(self.operands) - 1

    def path(self, members: Sequence[int], result: Labels) -> int:
        """Contract the given operands to `result` in opt_einsum's order."""
        live = list(members)
        if len(live) == 1:
            if self.operands[live[0]] == result:
                return live[0]
            return self.contract(live[0], -1, result)
        terms = [self.operands[k] or () for k in live]
        symbol = {
            label: opt_einsum.get_symbol(k)
            for k, label in enumerate(dict.fromkeys(label for labels in terms for label in labels))
        }
        equation = (
            ",".join("".join(symbol[label] for label in labels) for labels in terms)
            + "->"
            + "".join(symbol[label] for label in result)
        )
        shapes = [tuple(self.sizes[label] for label in labels) for labels in terms]
        order, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")
        for pair in order:
            chosen = [live[p] for p in sorted(pair, reverse=True)]
            for p in sorted(pair, reverse=True):
                del live[p]
            while len(chosen) > 1:  # opt_einsum may name more than two when they are few
                right, left = chosen.pop(), chosen.pop()
                final = result if not live and not chosen else None
                chosen.append(self.contract(left, right, final))
            live.append(chosen[0])
        return live[0]

    def plan(self, strategy: str) -> Plan:
        return Plan(strategy, tuple(self.steps), self.flops, self.bytes)


Sizes = tuple[tuple[str, int], ...]
F = TypeVar("F", bound=Callable[..., Any])


def _constant_while_tracing(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which would import dynamo here and double the time of `import torch`.

    The mark is all that it sets; the tests under the mark `compile` fail where torch changes it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@lru_cache(maxsize=8192)
def _plan_path(inputs: tuple[Labels, ...], sizes: Sizes, output: Labels, itemsize: int) -> Plan:
    build = _Builder(inputs, dict(sizes), output, itemsize)
    build.path(range(len(inputs)), output)
    return build.plan("path")


@lru_cache(maxsize=8192)
def _plan_apply(
    legs: tuple[Labels, ...], rows: Labels, cols: Labels, sizes: Sizes, batch: int, itemsize: int
) -> tuple[Plan, ...]:
    table = {**dict(sizes), BATCH: batch}
    x, output = (BATCH, *cols), (BATCH, *rows)
    path = _plan_path((x, *legs), tuple(table.items()), output, itemsize)
    build = _Builder((x, *legs), table, output, itemsize)
    merged = build.path(range(1, len(legs) + 1), rows + cols)
    build.contract(0, merged, output)
    # of equals the merge comes first: where the path merges the cores too, that is what the plan is
    return tuple(sorted((build.plan("merge"), path), key=lambda plan: plan.seconds))


# Plans are constants of the traced program: under torch.compile they are made while tracing, from shapes.
# (Plain functions: dynamo looks through an lru_cache wrapper, mark included, and would trace opt_einsum.)
@_constant_while_tracing
def _plan_path_constant(inputs: tuple[Labels, ...], sizes: Sizes, output: Labels, itemsize: int) -> Plan:
    return _plan_path(inputs, sizes, output, itemsize)


@_constant_while_tracing
def _plan_apply_constant(
    legs: tuple[Labels, ...], rows: Labels, cols: Labels, sizes: Sizes, batch: int, itemsize: int
) -> tuple[Plan, ...]:
    return _plan_apply(legs, rows, cols, sizes, batch, itemsize)


def plan_path(inputs: Sequence[Labels], sizes: dict[str, int], output: Labels, itemsize: int = 4) -> Plan:
    """Plan the contraction of operands with the given labels to `output`, in opt_einsum's order."""
    return _plan_path_constant(tuple(inputs), tuple(sizes.items()), output, itemsize)


def plan_dense(net: Network) -> Plan:
    """Plan for the dense tensor; the operands are the cores."""
    return plan_path(net.legs, net.sizes, net.outside, net.dtype.itemsize)


def plan_apply(net: Network, batch: int = 1024) -> tuple[Plan, ...]:
    """All plans for `apply(net, x)` with `batch` rows, best predicted first.

    Operands are `(x, *cores)`, x flattened to `(batch, *col_modes)`. *merge* contracts the cores to the dense weight
    and multiplies once; *path* contracts x and the cores in the order opt_einsum finds.

    Example:
        >>> from decompositions import LowRank, plan_apply
        >>> best = plan_apply(LowRank.random(row_modes=(512,), col_modes=(512,), rank=4), batch=8)[0]
        >>> best.strategy, best.calls, best.flops == 2 * 8 * (512 * 4 + 4 * 4 + 4 * 512)
        ('path', 3, True)
    """
    return _plan_apply_constant(net.legs, net.rows, net.cols, tuple(net.sizes.items()), batch, net.dtype.itemsize)


def bucket(batch: int) -> int:
    """The power of two that serves `batch` rows: plans are made for buckets, not for every batch."""
    return 1 << max(batch - 1, 0).bit_length()


def extend(steps: Sequence[Step], operands: Sequence[Tensor]) -> list[Tensor]:
    """Execute steps; return the operands with every step's result appended, as the steps number them."""
    values = list(operands)
    for left, right, equation in steps:
        pair = (values[left],) if right < 0 else (values[left], values[right])
        values.append(torch.einsum(equation, *pair))
    return values


def run(steps: Sequence[Step], operands: Sequence[Tensor]) -> Tensor:
    """Execute a plan's steps; the result of the last one is returned."""
    return extend(steps, operands)[-1]
