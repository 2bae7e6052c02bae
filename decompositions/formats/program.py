"""Execution of an `apply` plan: forward and the planned backward as one autograd function.

The plain route (`run`) records every step with autograd; it serves tracing, transforms and higher derivatives, and is
the oracle. The planned route runs the very same forward steps and the backward steps that were planned with them, with
a third of the calls' overhead, in layouts that need no copies, and with large dense weights merged slice by slice.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from decompositions.formats.contract import contract, split_equation
from decompositions.formats.plan import Plan, Step, run
from decompositions.formats.workspace import Workspace


def multiply(
    plan: Plan,
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    recompute: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """`y = x W^T + b` for x of shape (batch, *col_modes) by a plan of `plan_apply`; y has (batch, *row_modes).

    Under autocast all operands are cast to the low precision first, as `torch.nn.functional.linear` does; matrix
    products accumulate in float32.

    Args:
        plan: one of `plan_apply(net, batch)`.
        x: (batch, *col_modes).
        cores: of the network.
        bias: one number for each row, flat, or None.
        recompute: keep nothing but the operands for backward, and run the forward steps again there.
        workspace: memory for a large dense weight that backward will need, reused by later calls; a call without
            gradients gives it back.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        x, cores = x.to(low), [core.to(low) for core in cores]
        bias = None if bias is None else bias.to(low)
        with torch.autocast(device, enabled=False):
            return _multiply(plan, x, cores, bias, recompute, workspace)
    return _multiply(plan, x, cores, bias, recompute, workspace)


def _multiply(
    plan: Plan,
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    recompute: bool,
    workspace: Workspace | None,
) -> Tensor:
    if _needs_plain_route(x):
        y = run(plan.steps, (x, *cores))
        return y if bias is None else y + bias.reshape(y.shape[1:])
    tracked = torch.is_grad_enabled() and (
        x.requires_grad or any(core.requires_grad for core in cores) or (bias is not None and bias.requires_grad)
    )
    if not tracked:
        if workspace is not None:
            workspace.release()
        return _forward(plan, x, cores, bias, None)
    result: Tensor = _Planned.apply(plan, recompute, workspace, x, bias, *cores)
    return result


def _needs_plain_route(x: Tensor) -> bool:
    """Tracing, function transforms, forward-mode derivatives, tensor subclasses and complex numbers."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_complex()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _forward(
    plan: Plan,
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    kept: list[Any] | None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Run the forward steps; results go to `kept`, numbered as in the plan (None instead of x and the cores)."""
    if plan.chunk:
        return _merged_forward(plan, x, cores, bias, kept, workspace)
    values: list[Any] = [x, *cores]
    steps = plan.steps
    for left, right, equation in steps:
        values.append(contract(equation, values[left], None if right < 0 else values[right]))
    y: Tensor = values[-1]
    if bias is not None:
        rows = bias.reshape(y.shape[1:])
        if y.is_contiguous() and steps[-1].right >= 0:  # fresh memory of the last product
            y = y.add_(rows)
        else:
            y = torch.add(y, rows, out=torch.empty(y.shape, dtype=y.dtype, device=y.device))
    if kept is not None:
        kept.extend(values[1 + len(cores) : -1])
        kept.append(None)
    return y.contiguous()


class _Planned(torch.autograd.Function):
    """y by the plan's steps, gradients by its backward steps."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        recompute: bool,
        workspace: Workspace | None,
        x: Tensor,
        bias: Tensor | None,
        *cores: Tensor,
    ) -> Tensor:
        kept: list[Any] | None = None if recompute else []
        y = _forward(plan, x, cores, bias, kept, workspace)
        needed = _needed(plan, tuple(ctx.needs_input_grad[k] for k in (3, *range(5, 5 + len(cores)))))
        # of a merged weight only the slices are kept: its factors are products of cores, cheap to make again
        used = needed[1] if not plan.chunk else {plan.steps[-1].right} & needed[1]
        held: list[Tensor] = []
        ctx.slots = []
        for position, value in enumerate(kept or []):
            number = 1 + len(cores) + position
            values = value if isinstance(value, tuple) else (value,)
            if number in used and value is not None:
                ctx.slots.append((number, len(held), len(held) + len(values), isinstance(value, tuple)))
                held.extend(values)
        ctx.save_for_backward(x, bias, *cores, *held)
        ctx.plan, ctx.recompute, ctx.count, ctx.needed = plan, recompute, len(cores), needed[0]
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors
        x, bias, cores, held = saved[0], saved[1], saved[2 : 2 + ctx.count], saved[2 + ctx.count :]
        plan, wants = ctx.plan, ctx.needs_input_grad[3:]  # of x, the bias, the cores
        if torch.is_grad_enabled():  # a graph of the gradients is asked for: autograd's own
            return (None, None, None, *_differentiable(plan, wants, x, bias, cores, gradient))
        grads: list[Any] = [None] * (2 + ctx.count)
        if bias is not None and wants[1]:
            grads[1] = gradient.sum(0).reshape(bias.shape)
        values: list[Any] = [x, *cores] + [None] * len(plan.steps)
        if ctx.recompute or plan.chunk:
            for position, (left, right, equation) in enumerate(plan.steps[: -2 if plan.chunk else -1]):
                result = contract(equation, values[left], None if right < 0 else values[right])
                values[1 + ctx.count + position] = result
        for number, start, stop, many in ctx.slots:
            values[number] = held[start:stop] if many else held[start]
        values.append(gradient.contiguous())
        _backward(plan, ctx.needed, values)
        for k, number in enumerate(plan.grads):
            position = 0 if k == 0 else 1 + k
            if wants[position]:
                grads[position] = values[number].contiguous()
        return (None, None, None, *grads)


@lru_cache(maxsize=4096)
def _needed(plan: Plan, wanted: tuple[bool, ...]) -> tuple[tuple[bool, ...], frozenset[int]]:
    """Which backward steps lead to a wanted gradient, and which operands these read."""
    base = 1 + len(plan.grads) + len(plan.steps)  # after x, the cores, the results and the gradient of the last
    asked = {number for number, want in zip(plan.grads, wanted, strict=True) if want}
    steps = [False] * len(plan.backward)
    read: set[int] = set()
    for position in reversed(range(len(plan.backward))):
        if base + position in asked:
            steps[position] = True
            pair = {k for k in plan.backward[position][:2] if k >= 0}
            asked |= pair
            read |= pair
    return tuple(steps), frozenset(read)


def _backward(plan: Plan, needed: tuple[bool, ...], values: list[Any]) -> None:
    """Run the needed backward steps; results are appended to `values`."""
    steps = plan.backward
    start = 0
    if plan.chunk:
        start = 4 if steps[0].left >= 0 else 0
        values.extend(_merged_backward(plan, needed, values))
    for (left, right, equation), need in zip(steps[start:], needed[start:], strict=True):
        if not need:
            values.append(None)
            continue
        values.append(contract(equation, values[left], None if right < 0 else values[right]))


def _differentiable(
    plan: Plan, wants: Sequence[bool], x: Tensor, bias: Tensor | None, cores: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, by the plain route."""
    inputs = {k: value for k, value in enumerate([x, bias, *cores]) if value is not None}
    asked = [k for k in inputs if wants[k]]
    y = run(plan.steps, (x, *cores))
    if bias is not None:
        y = y + bias.reshape(y.shape[1:])
    found = torch.autograd.grad(y, [inputs[k] for k in asked], gradient, create_graph=True, allow_unused=True)
    grads: list[Tensor | None] = [None] * len(wants)
    for k, value in zip(asked, found, strict=True):
        grads[k] = value
    return tuple(grads)


# --- merging in slices: the dense weight is never permuted as a whole, nor is its gradient ever held ---


_SCRATCH = (Workspace(), Workspace(), Workspace())
"""Slices in the making, for the length of a call: some 20 MB in all, lent to one call at a time."""


class _Slices:
    """Slices of the dense weight along its first axis, as the product of its last two factors.

    The weight lies in memory as (rows, columns) or as (columns, rows); its leading side is cut.
    """

    def __init__(self, plan: Plan, values: Sequence[Any]) -> None:
        step: Step = plan.steps[-2]
        left, right, self.out = split_equation(step.equation)
        # laid out once as they are called: a permuted factor would be copied for every slice
        self.operands = values[step.left].contiguous(), values[step.right].contiguous()
        self.letters = left, right
        x, weight, y = split_equation(plan.steps[-1].equation)
        # the same axes have other letters in the two equations
        self.by_rows = weight[0] in y
        outer = len(y) - 1 if self.by_rows else len(x) - 1
        kept = [a for a in left if a in right and a in self.out]
        self.natural = "".join([*kept, *(a for a in left if a not in right), *(a for a in right if a not in left)])
        self.sizes = {
            letter: size
            for letters, operand in zip(self.letters, self.operands, strict=True)
            for letter, size in zip(letters, operand.shape, strict=True)
        }
        self.order = [self.natural.index(letter) for letter in self.out]
        self.inverse = [self.out.index(letter) for letter in self.natural]
        self.height = prod(self.sizes[letter] for letter in self.out[:outer])
        self.width = prod(self.sizes[letter] for letter in self.out[outer:])
        self.row_modes = [self.sizes[letter] for letter in (self.out[:outer] if self.by_rows else self.out[outer:])]
        # leading letters are fixed one by one until what is left is short enough; the last of them is cut in pieces
        depth, lines = 0, self.height // self.sizes[self.out[0]]
        while lines > plan.chunk and depth + 1 < outer:
            depth += 1
            lines //= self.sizes[self.out[depth]]
        many, count = max(1, plan.chunk // lines), self.sizes[self.out[depth]]
        pieces = [range(k, min(k + many, count)) for k in range(0, count, many)]
        fixed = product(*(range(self.sizes[letter]) for letter in self.out[:depth]))
        self.cuts: list[dict[str, range]] = [
            {**{self.out[k]: range(v, v + 1) for k, v in enumerate(values)}, self.out[depth]: piece}
            for values in fixed
            for piece in pieces
        ]
        ends = list(accumulate(lines * len(cut[self.out[depth]]) for cut in self.cuts))
        self.bounds = list(zip([0, *ends], ends, strict=False))

    def part(self, operand: Tensor, letters: str, cut: dict[str, range]) -> Tensor:
        """A factor (or its gradient), cut to a slice where it carries the cut letters."""
        for letter, values in cut.items():
            if letter in letters:
                operand = operand.narrow(letters.index(letter), values.start, len(values))
        return operand

    def parts(self, cut: dict[str, range]) -> list[Tensor]:
        """Both factors, cut to a slice."""
        pairs = zip(self.operands, self.letters, strict=True)
        return [self.part(operand, letters, cut) for operand, letters in pairs]

    def scratch(self, which: int) -> Tensor:
        """Memory for the largest slice, warm from earlier calls of any layer: fresh memory is mapped page by page."""
        lines = max(high - low for low, high in self.bounds)
        first = self.operands[0]
        return _SCRATCH[which].take(lines * self.width, first.dtype, first.device)

    def weight(self, cut: dict[str, range], into: Tensor, scratch: Tensor) -> Tensor:
        """A slice of the dense weight as a matrix, written to `into` (lines, width)."""
        first, second = self.parts(cut)
        left, right = self.letters
        equation = f"{left},{right}->{self.natural}"
        if self.natural == self.out:
            made = contract(equation, first, second, into)
            return made.reshape(into.shape)
        whole = contract(equation, first, second, scratch[: into.numel()]).permute(self.order)
        into.view(whole.shape).copy_(whole)
        return into


def _merged_forward(
    plan: Plan,
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    kept: list[Any] | None,
    workspace: Workspace | None,
) -> Tensor:
    values: list[Any] = [x, *cores]
    for left, right, equation in plan.steps[:-2]:
        values.append(contract(equation, values[left], None if right < 0 else values[right]))
    slices = _Slices(plan, values)
    batch = x.shape[0]
    flat = x.reshape(batch, slices.width if slices.by_rows else slices.height)
    y = torch.empty(batch, slices.height if slices.by_rows else slices.width, dtype=x.dtype, device=x.device)
    if not slices.by_rows:
        if bias is None:
            y.zero_()
        else:
            y.copy_(bias)
    weights, height, width = [], slices.height, slices.width
    product, single = slices.scratch(0), slices.scratch(1) if kept is None else None
    held = product
    if kept is not None and workspace is not None:
        held = workspace.take(height * width, product.dtype, product.device)
    elif kept is not None:
        held = torch.empty(height * width, dtype=product.dtype, device=product.device)
    for cut, (low, high) in zip(slices.cuts, slices.bounds, strict=True):
        into = held.view(height, width)[low:high] if single is None else single[: (high - low) * width].view(-1, width)
        weight = slices.weight(cut, into, product)
        if not slices.by_rows:
            y.addmm_(flat[:, low:high], weight)
        elif bias is None:
            torch.mm(flat, weight.T, out=y[:, low:high])
        else:
            torch.addmm(bias[low:high], flat, weight.T, out=y[:, low:high])
        if kept is not None:
            weights.append(weight)
    if kept is not None:
        kept.extend(values[1 + len(cores) :])
        kept.append(tuple(weights))
        kept.append(None)
    return y.reshape(batch, *slices.row_modes)


def _merged_backward(plan: Plan, needed: tuple[bool, ...], values: list[Any]) -> list[Tensor | None]:
    """The first four backward steps (of x, the weight, and the weight's two factors), slice by slice."""
    want_x, want_factors = needed[0], needed[2:4]
    x, gradient, weights = values[0], values[-1], values[plan.steps[-1].right]
    slices = _Slices(plan, values)
    batch = x.shape[0]
    flat = x.reshape(batch, slices.width if slices.by_rows else slices.height)
    rows = gradient.reshape(batch, slices.height if slices.by_rows else slices.width)
    outer, inner = (rows, flat) if slices.by_rows else (flat, rows)
    gx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    factors: list[Tensor | None] = [None, None]  # gradients of the weight's two factors
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    product, other = slices.scratch(0), slices.scratch(1)
    summand = _SCRATCH[2].take(max(operand.numel() for operand in slices.operands), x.dtype, x.device)
    for position, (cut, (low, high)) in enumerate(zip(slices.cuts, slices.bounds, strict=True)):
        shape = (high - low, slices.width)
        if want_x:
            matrix = other[: prod(shape)].view(shape)
            weight = slices.weight(cut, matrix, product) if weights is None else weights[position]
            if slices.by_rows:
                gx.addmm_(rows[:, low:high], weight, beta=min(position, 1))
            else:
                torch.mm(rows, weight.T, out=gx[:, low:high])
        if not any(want_factors):
            continue
        sizes = [len(cut[letter]) if letter in cut else slices.sizes[letter] for letter in slices.out]
        whole = torch.mm(outer[:, low:high].T, inner, out=product[: prod(shape)].view(shape))
        whole = whole.view(sizes).permute(slices.inverse)
        if not whole.is_contiguous():
            whole = other[: prod(shape)].view(whole.shape).copy_(whole)
        parts = slices.parts(cut)
        for own, want in enumerate(want_factors):
            if not want:
                continue
            letters, others = slices.letters[own], slices.letters[1 - own]
            piece = summand[: parts[own].numel()]
            piece = contract(f"{slices.natural},{others}->{letters}", whole, parts[1 - own], piece)
            target = factors[own]
            if target is None:  # slices are summed in float32 where the operands are shorter
                target = factors[own] = torch.zeros(slices.operands[own].shape, dtype=wide, device=x.device)
            slices.part(target, letters, cut).add_(piece)
    found = [None if value is None else value.to(x.dtype) for value in factors]
    return [gx.reshape(x.shape) if want_x else None, None, *found]
