"""From labels and shapes to a printable contraction plan, forward and backward.

A plan is made of plain tuples, from shapes only: it is made once, outside traced code, and run many times.
Labels are re-lettered within each pairwise step, so that a network may have more labels than einsum has letters.
Three kinds of plan compete, by the cost model of `cost.py`:

- *merge*: contract the cores to the dense weight, then one matrix product with x;
- *path*: contract x and the cores pairwise in opt_einsum's order;
- *sweep* and *fused*: x meets the cores (fused: small groups of cores, multiplied first) one after another, in layouts
  that need no copies (`search.py`).
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from string import ascii_letters
from typing import NamedTuple

import opt_einsum
from torch import Tensor

from decompositions.formats.contract import constant_while_tracing, contract
from decompositions.formats.cost import Cost, Rates, copy_seconds, product_cost, rates_for
from decompositions.formats.network import Labels, Network
from decompositions.formats.search import Chain, core_gradient, search_backward, search_chains

BATCH = "@"
"""Label of the flattened batch axis of a layer's input."""

CHAINS = 4
"""Chains that get a backward plan and compete."""

CHUNK_BYTES = 8 << 20
"""Size of the slices in which a large dense weight is merged: memory of that size is reused warm between calls."""


HEAVY = 1.25
"""A plan that keeps more for backward than the dense layer would must be faster by this factor to be chosen."""


Work = tuple[tuple[int, Labels], ...]
"""What a plan does, a part a step: its FLOPs, and the labels whose sizes they are the product of (times a factor)."""


class Step(NamedTuple):
    """Contract two earlier operands into a new one; `right` is -1 where the step has one operand only."""

    left: int
    right: int
    equation: str


class Plan(NamedTuple):
    """How to contract a list of operands: pairwise steps (operands are numbered, results appended) and their cost.

    `flops` are multiply-adds times two of one forward pass, `bytes` the operands read and results written, `kept` the
    bytes held for backward beside the operands. `backward` continues the numbering after the gradient of the result;
    `grads` says where the gradient of each operand is. `forward_seconds` and `seconds` (forward and backward) are
    predictions, for comparison between plans only. `chunk` is how many lines of the dense weight are merged at a time
    (0: all at once). A `heavy` plan keeps more for backward than the dense weight, the cores and a quarter of x.
    `work` says which labels the FLOPs of each forward step are a product of.
    """

    strategy: str
    steps: tuple[Step, ...]
    flops: int
    bytes: int
    forward_seconds: float = 0.0
    seconds: float = 0.0
    kept: int = 0
    backward: tuple[Step, ...] = ()
    grads: tuple[int, ...] = ()
    chunk: int = 0
    heavy: bool = False
    work: Work = ()

    @property
    def burden(self) -> float:
        """What plans are ranked by where memory counts too: `seconds`, a quarter more for a heavy plan."""
        return self.seconds * (HEAVY if self.heavy else 1.0)

    @property
    def calls(self) -> int:
        """Number of pairwise contractions of one forward pass."""
        return len(self.steps)

    def __str__(self) -> str:
        steps = "\n".join(f"  {step.left:>2} {step.right:>2}  {step.equation}" for step in self.steps)
        return (
            f"{self.strategy}: {self.flops:,} FLOPs in {self.calls} calls, {self.kept:,} bytes kept for backward, "
            f"predicted {self.forward_seconds * 1e3:.3g} ms forward, {self.seconds * 1e3:.3g} ms with backward\n{steps}"
        )


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

    def __init__(
        self, inputs: Sequence[Labels], sizes: dict[str, int], output: Labels, itemsize: int, rates: Rates
    ) -> None:
        self.live: list[Labels | None] = list(inputs)  # operands not used yet
        self.labels: list[Labels] = list(inputs)
        self.sizes, self.output, self.itemsize, self.rates = sizes, output, itemsize, rates
        self.steps: list[Step] = []
        self.bytes = 0
        self.work: list[tuple[int, Labels]] = []
        self.seconds = 0.0
        self.order: dict[str, int] = {}  # preferred order of the labels of intermediates

    def numel(self, labels: Labels) -> int:
        return prod(self.sizes[label] for label in labels)

    def cost(self, left: int, right: int, result: Labels) -> Cost:
        """Predicted cost of one step."""
        first = self.labels[left]
        if right < 0:
            kept = tuple(label for label in first if label in result)  # the others are summed
            seconds = copy_seconds(kept, result, self.sizes, self.itemsize, self.rates)
            if len(kept) < len(first):
                seconds += self.itemsize * self.numel(first) / self.rates.stream
            return Cost(self.rates.call + seconds, self.numel(first), 0)
        return product_cost(first, self.labels[right], result, self.sizes, self.itemsize, self.rates)

    def append(self, left: int, right: int, result: Labels) -> int:
        """Add a step without asking who else needs its operands."""
        pair = [self.labels[k] for k in (left, right) if k >= 0]
        self.steps.append(Step(left, right, _equation(pair, result)))
        self.seconds += self.cost(left, right, result).seconds
        self.labels.append(result)
        self.live.append(result)
        return len(self.labels) - 1

    def contract(self, left: int, right: int, result: Labels | None = None) -> int:
        """Contract two operands (or reduce one, `right = -1`); labels nobody needs any more are summed."""
        pair = [self.labels[k] for k in (left, right) if k >= 0]
        self.live[left] = None
        if right >= 0:
            self.live[right] = None
        rest = {label for labels in self.live if labels is not None for label in labels} | set(self.output)
        involved = tuple(dict.fromkeys(label for labels in pair for label in labels))
        if result is None:
            last = not any(labels is not None for labels in self.live)
            result = self.output if last else tuple(label for label in involved if label in rest)
            if self.order and not last:
                result = tuple(sorted(result, key=lambda label: self.order.get(label, len(self.order))))
        self.work.append(((2 if right >= 0 else 1) * self.numel(involved), involved))
        self.bytes += self.itemsize * (sum(map(self.numel, pair)) + self.numel(result))
        return self.append(left, right, result)

    def path(self, members: Sequence[int], result: Labels) -> int:
        """Contract the given operands to `result` in opt_einsum's order."""
        live = list(members)
        if len(live) == 1:
            if self.labels[live[0]] == result:
                return live[0]
            return self.contract(live[0], -1, result)
        terms = [self.labels[k] for k in live]
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

    def chain(self, found: Chain) -> None:
        """Absorb groups of cores into operand 0; core k is operand k + 1."""
        operand = []
        for group, layout in zip(found.groups, found.layouts, strict=True):
            alone = len(group) == 1
            operand.append(group[0] + 1 if alone else self.path([k + 1 for k in group], found.expand(layout)))
        x = 0
        for product in found.products:
            x = self.contract(x, operand[product.group], found.expand(product.after))
        if self.labels[x] != self.output:
            self.contract(x, -1, self.output)

    def forward(self, strategy: str) -> Plan:
        flops, work = sum(flops for flops, _ in self.work), tuple(self.work)
        return Plan(strategy, tuple(self.steps), flops, self.bytes, self.seconds, self.seconds, work=work)

    def differentiate(self, strategy: str, found: Chain | None = None, plain: int = 0) -> Plan:
        """Append the backward steps; along a chain in the layouts that `search_backward` chose.

        The gradients of the last `plain` steps are laid out like their operands.
        """
        forward, count = tuple(self.steps), len(self.labels)
        flops, work, moved, seconds = sum(n for n, _ in self.work), tuple(self.work), self.bytes, self.seconds
        inputs = count - len(forward)
        self.labels.append(self.output)  # the gradient of the result
        self.live.append(self.output)
        gradient = {count - 1: count}
        plan = {} if found is None else self._returns(found, forward, inputs)
        for position in reversed(range(len(forward))):
            left, right, _ = forward[position]
            out = inputs + position
            if right < 0:
                gradient[left] = self.append(gradient[out], -1, self.labels[left])
                continue
            if position in plan:
                before, core, summed = plan[position]
            elif position >= len(forward) - plain:
                before, core, summed = self.labels[left], self.labels[right], 0
            else:
                before, sides = self.labels[left], (self.labels[left], self.labels[gradient[out]], self.labels[right])
                _, core, summed = core_gradient(*sides, self.sizes, self.itemsize, self.rates)
            gradient[left] = self.append(gradient[out], right, before)
            weight = self.append(left, gradient[out], core)
            if summed:
                weight = self.append(weight, -1, core[summed:])
            if self.labels[weight] != self.labels[right]:
                weight = self.append(weight, -1, self.labels[right])
            gradient[right] = weight
        for k in range(inputs):
            if self.labels[gradient[k]] != self.labels[k]:
                gradient[k] = self.append(gradient[k], -1, self.labels[k])
        backward = tuple(self.steps[len(forward) :])
        used = {k for step in backward for k in (step.left, step.right)}
        kept = self.itemsize * sum(self.numel(self.labels[k]) for k in used if inputs <= k < count)
        grads = tuple(gradient[k] for k in range(inputs))
        return Plan(strategy, forward, flops, moved, seconds, self.seconds, kept, backward, grads, work=work)

    def _returns(self, found: Chain, forward: tuple[Step, ...], inputs: int) -> dict[int, tuple[Labels, Labels, int]]:
        """Layouts of the gradients at the steps of a chain: (of x's side, of the core before its sums, how many)."""
        positions, x = [], 0
        for position, step in enumerate(forward):
            if step.left == x and step.right >= 0:
                positions.append(position)
                x = inputs + position
        returns = search_backward(found, self.output, self.sizes, self.itemsize, self.rates)
        result = {}
        for position, back in zip(reversed(positions), returns, strict=True):
            core = found.expand(back.core)
            result[position] = (found.expand(back.before), core, len(found.expand(back.core[: back.summed])))
        return result


Sizes = tuple[tuple[str, int], ...]


@lru_cache(maxsize=8192)
def _plan_path(inputs: tuple[Labels, ...], sizes: Sizes, output: Labels, itemsize: int, rates: Rates) -> Plan:
    build = _Builder(inputs, dict(sizes), output, itemsize, rates)
    build.path(range(len(inputs)), output)
    return build.forward("path")


@lru_cache(maxsize=8192)
def _plan_apply(
    legs: tuple[Labels, ...], rows: Labels, cols: Labels, sizes: Sizes, batch: int, itemsize: int, rates: Rates
) -> tuple[Plan, ...]:
    table = {**dict(sizes), BATCH: batch}
    start, end = (BATCH, *cols), (BATCH, *rows)

    def builder() -> _Builder:
        return _Builder((start, *legs), table, end, itemsize, rates)

    plans = [_merge_plan(builder(), rows, cols), _merge_plan(builder(), cols, rows)]
    path = builder()
    path.path(range(len(legs) + 1), end)
    plans.append(path.differentiate("path"))
    for found in search_chains(legs, rows, start, end, table, itemsize, rates)[:CHAINS]:
        build = builder()
        build.chain(found)
        alone = all(len(group) == 1 for group in found.groups)
        plans.append(build.differentiate("sweep" if alone else "fused", found))
    volume = [prod(table[label] for label in labels) for labels in ((*rows, *cols), *legs)]
    spare = itemsize * (sum(volume) + prod(table[label] for label in start) // 4)
    plans = [plan._replace(heavy=True) if plan.kept > spare else plan for plan in plans]
    distinct: dict[tuple[Step, ...], Plan] = {}
    for plan in sorted(plans, key=lambda plan: plan.burden):
        # of equals the merge comes first: where the path merges the cores too, that is what the plan is
        distinct.setdefault(plan.steps, plan)
    return tuple(distinct.values())


def _merge_plan(build: _Builder, outer: Labels, inner: Labels) -> Plan:
    """The dense weight in the memory order outer, inner, in slices where it is large, and one product with x."""
    order = (*outer, *inner)
    # factors with their outer labels in front: what is copied into the weight then keeps long runs together
    build.order = {label: k for k, label in enumerate(order)}
    weight = build.path(range(1, len(build.labels)), order)
    position = len(build.steps) - 1
    build.contract(0, weight, build.output)
    plan = build.differentiate("merge", plain=2)
    sizes, item, rates = build.sizes, build.itemsize, build.rates
    size = item * build.numel(order)
    if position < 0 or build.steps[position].right < 0 or not outer or size <= CHUNK_BYTES // 16:
        return plan
    left, right, _ = plan.steps[position]
    first, second = build.labels[left], build.labels[right]
    natural = natural_order(first, second, order)
    copy = copy_seconds(natural, order, sizes, item, rates)
    once = product_cost(first, second, natural, sizes, item, rates).seconds - build.cost(left, right, order).seconds
    back = 0.0
    for one, other in ((first, second), (second, first)):
        back += product_cost(natural, other, one, sizes, item, rates).seconds
        back -= product_cost(order, other, one, sizes, item, rates).seconds
    return plan._replace(
        chunk=max(1, CHUNK_BYTES // (item * build.numel(inner))),
        kept=size,
        forward_seconds=plan.forward_seconds + once + copy,
        seconds=plan.seconds + once + 2 * copy + back,
    )


def natural_order(left: Labels, right: Labels, out: Labels) -> Labels:
    """The layout that a product of two operands writes without a copy: common labels, then a block of each.

    Example:
        >>> natural_order(("i", "j", "r"), ("r", "k", "l"), ("i", "k", "j", "l"))
        ('i', 'j', 'k', 'l')
    """
    kept = tuple(label for label in left if label in right and label in out)
    first = tuple(label for label in left if label not in right)
    return kept + first + tuple(label for label in right if label not in left)


# Plans are constants of the traced program: under torch.compile they are made while tracing, from shapes.
@constant_while_tracing
def _plan_path_constant(inputs: tuple[Labels, ...], sizes: Sizes, output: Labels, itemsize: int) -> Plan:
    return _plan_path(inputs, sizes, output, itemsize, rates_for(None))


@constant_while_tracing
def _plan_apply_constant(
    legs: tuple[Labels, ...], rows: Labels, cols: Labels, sizes: Sizes, batch: int, itemsize: int, key: tuple[str, str]
) -> tuple[Plan, ...]:
    return _plan_apply(legs, rows, cols, sizes, batch, itemsize, rates_for(key))


def plan_path(inputs: Sequence[Labels], sizes: dict[str, int], output: Labels, itemsize: int = 4) -> Plan:
    """Plan the contraction of operands with the given labels to `output`, in opt_einsum's order."""
    return _plan_path_constant(tuple(inputs), tuple(sizes.items()), output, itemsize)


def plan_dense(net: Network) -> Plan:
    """Plan for the dense tensor; the operands are the cores."""
    return plan_path(net.legs, net.sizes, net.outside, net.dtype.itemsize)


def plan_apply(net: Network, batch: int = 1024) -> tuple[Plan, ...]:
    """All plans for `apply(net, x)` with `batch` rows, best predicted first (forward and backward together).

    A heavy plan, which would keep more memory for backward than a dense weight, has to be faster by a quarter.

    Operands are `(x, *cores)`, x flattened to `(batch, *col_modes)`. *merge* contracts the cores to the dense weight
    and multiplies once; *path* contracts x and the cores in the order opt_einsum finds; *sweep* and *fused* absorb the
    cores (or products of a few) into x one after another, in layouts that need no copies.

    Example:
        >>> from decompositions import LowRank, plan_apply
        >>> best = plan_apply(LowRank.random(row_modes=(512,), col_modes=(512,), rank=4), batch=8)[0]
        >>> best.strategy != "merge", best.flops < 2 * 8 * 512 * 512 / 10
        (True, True)
    """
    key = (net.device.type, str(net.dtype).removeprefix("torch."))
    return _plan_apply_constant(net.legs, net.rows, net.cols, tuple(net.sizes.items()), batch, net.dtype.itemsize, key)


def bucket(batch: int) -> int:
    """The power of two that serves `batch` rows: plans are made for buckets, not for every batch."""
    return 1 << max(batch - 1, 0).bit_length()


def extend(steps: Sequence[Step], operands: Sequence[Tensor]) -> list[Tensor]:
    """Execute steps; return the operands with every step's result appended, as the steps number them."""
    values = list(operands)
    for left, right, equation in steps:
        values.append(contract(equation, values[left], None if right < 0 else values[right]))
    return values


def run(steps: Sequence[Step], operands: Sequence[Tensor]) -> Tensor:
    """Execute a plan's steps; the result of the last one is returned."""
    return extend(steps, operands)[-1]
