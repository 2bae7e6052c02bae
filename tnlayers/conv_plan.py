"""How a network acts as a convolution kernel: a chain of small convolutions, planned from labels.

The kernel's column labels are matched with the axes (in, k_1, ..., k_d) of the weight and its row labels with
(groups, out / groups); a mode that spans several axes is split. Then the cores are absorbed into x one after another:
a core's share of the channels is contracted, its kernel axes become a small convolution, its other legs become
channels. Labels that later steps still need stay as channels, as groups, or move into the batch. Small cores may be
contracted with each other first. Every order is tried and the cheapest plan kept; the dense kernel is one of them.

A transposed convolution is the transpose of that chain: x brings the row channels, each step transposes a small
convolution, and the column channels come out.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from math import prod
from typing import NamedTuple

from decompositions.formats.network import Labels
from decompositions.formats.plan import Sizes, Step, Work, plan_path

# Rough constants of one CPU class; only their ratios matter for the choice.
CALL_SECONDS = 13e-6
FLOP_RATE = 300e9
BYTE_RATE = 25e9

GROUP = "@g"
MAX_SEARCH = 6
"""Cores up to which every order of absorption is tried; longer chains are absorbed in the order of the cores."""


class Split(NamedTuple):
    """View one axis of a core as several; within a core the last axes come first."""

    core: int
    axis: int
    sizes: tuple[int, ...]


class Alignment(NamedTuple):
    """Labels of a network matched with the axes of a convolution weight."""

    splits: tuple[Split, ...]
    sizes: dict[str, int]  # of the parts too
    legs: tuple[Labels, ...]  # after the splits
    rows: Labels  # channels of axis 0 of the weight, the group label first where there is one
    channels: Labels  # channels of axis 1
    kernel: tuple[str | None, ...]  # label of each kernel axis; None: size 1 and no label


class ConvStep(NamedTuple):
    """Absorb one operand. Positions index x's channel labels at that point; axes index the operand's axes.

    `dims` are the spatial axes on which this step does what the whole does (stride, padding, dilation); on the others
    it is pointwise.
    """

    operand: int
    order: tuple[int, ...]  # channel positions: free, kept, contracted
    free: int
    kept: int
    axes: tuple[int, ...]  # operand axes: kept, new, contracted, kernel
    new: int
    contracted: int
    own: tuple[bool, ...]  # kernel axes that this operand carries
    dims: tuple[bool, ...]


class ConvPlan(NamedTuple):
    """`steps` contract cores among themselves (operands appended), `chain` absorbs operands into x.

    With the strategy "merge" the chain is empty and the dense kernel is used.
    """

    strategy: str
    steps: tuple[Step, ...]
    chain: tuple[ConvStep, ...]
    splits: tuple[Split, ...]
    channels: tuple[int, ...]  # sizes of x's channel labels, the group first where there is one
    permute: tuple[int, ...]  # channel positions in the order of the weight's axis, at the end
    flops: int
    bytes: int
    kept: int = 0  # bytes of intermediate results that backward needs
    work: Work = ()  # the FLOPs of each step, and the labels that they are a product of

    @property
    def calls(self) -> int:
        """Number of kernels started."""
        return len(self.steps) + max(1, len(self.chain))

    @property
    def forward_seconds(self) -> float:
        """Predicted time of one forward pass, for comparison between plans only."""
        return self.calls * CALL_SECONDS + self.flops / FLOP_RATE + self.bytes / BYTE_RATE

    @property
    def seconds(self) -> float:
        """Predicted time of forward and backward: two products of the same size for each one forward."""
        return 3 * self.forward_seconds


class ConvShape(NamedTuple):
    """What the cost of a convolution depends on besides the network."""

    batch: int
    spatial: tuple[int, ...]
    out_spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int
    transposed: bool = False


def align(
    legs: tuple[Labels, ...],
    rows: Labels,
    cols: Labels,
    sizes: dict[str, int],
    weight_shape: Sequence[int],
    groups: int,
) -> Alignment | None:
    """Match labels with the axes of a weight (out, in / groups, *kernel); None where they do not line up."""
    out, width, *kernel = weight_shape
    splits: dict[str, list[tuple[str, int]]] = {}
    row_parts = _match(rows, sizes, [groups, out // groups] if groups > 1 else [out], splits)
    col_parts = _match(cols, sizes, [width, *kernel], splits)
    if row_parts is None or col_parts is None:
        return None
    size = {**sizes, **{name: n for parts in splits.values() for name, n in parts}}
    channels, kernel_labels = list(col_parts[0]), []
    for length, labels in zip(kernel, col_parts[1:], strict=True):
        own = [label for label in labels if size[label] == length][:1]
        if not own and length > 1:
            return None  # a kernel axis made of several modes has no convolution of its own
        kernel_labels.append(own[0] if own else None)
        channels.extend(label for label in labels if label not in own)  # stray modes of size 1
    names = {label: tuple(name for name, _ in parts) for label, parts in splits.items()}
    views = tuple(
        Split(k, axis, tuple(n for _, n in splits[leg[axis]]))
        for k, leg in enumerate(legs)
        for axis in reversed(range(len(leg)))
        if leg[axis] in splits
    )
    group = {row_parts[0][0]: GROUP} if groups > 1 and len(row_parts[0]) == 1 else {}
    if groups > 1 and not group:
        return None
    new_legs = tuple(
        tuple(group.get(part, part) for label in leg for part in names.get(label, (label,))) for leg in legs
    )
    if any(label is not None and sum(label in leg for leg in new_legs) != 1 for label in kernel_labels):
        return None  # a kernel axis on a hyper-edge
    row_labels = tuple(group.get(label, label) for part in row_parts for label in part)
    size[GROUP] = groups
    return Alignment(views, size, new_legs, row_labels, tuple(channels), tuple(kernel_labels))


def _match(
    labels: Labels, sizes: dict[str, int], targets: list[int], splits: dict[str, list[tuple[str, int]]]
) -> list[list[str]] | None:
    """Deal labels out to axes of the given sizes, in order; a label that spans a boundary is split (into `splits`)."""
    parts: list[list[str]] = [[] for _ in targets]
    axis, left = 0, targets[0]
    for label in labels:
        pieces: list[tuple[str, int]] = []
        size = sizes[label]
        while True:
            if left == 1 and axis + 1 < len(targets) and (size > 1 or parts[axis] or pieces):
                axis, left = axis + 1, targets[axis + 1]
                continue
            take = size if left % size == 0 else left if size % left == 0 else 0
            if take == 0:
                return None
            name = label if take == size and not pieces else f"{label}.{len(pieces)}"
            pieces.append((name, take))
            parts[axis].append(name)
            left, size = left // take, size // take
            if size == 1:
                break
            if axis + 1 >= len(targets):
                return None
        if len(pieces) > 1:
            splits[label] = pieces
    if left != 1 or any(target != 1 for target in targets[axis + 1 :]):
        return None
    return parts


@lru_cache(maxsize=2048)
def conv_plans(
    legs: tuple[Labels, ...],
    rows: Labels,
    cols: Labels,
    sizes: Sizes,
    weight_shape: tuple[int, ...],
    shape: ConvShape,
    itemsize: int,
) -> tuple[ConvPlan, ...]:
    """All plans considered for this convolution, best predicted first; merging the dense kernel is always one."""
    table = dict(sizes)
    plans = [_merge_plan(legs, rows, cols, table, weight_shape, shape, itemsize)]
    found = align(legs, rows, cols, table, weight_shape, shape.groups)
    if found is not None:
        plans.extend(_chain_plans(found, shape, itemsize))
    return tuple(sorted(plans, key=lambda plan: plan.seconds))


def _merge_plan(
    legs: tuple[Labels, ...],
    rows: Labels,
    cols: Labels,
    sizes: dict[str, int],
    weight_shape: tuple[int, ...],
    shape: ConvShape,
    itemsize: int,
) -> ConvPlan:
    dense = plan_path(legs, sizes, rows + cols, itemsize)
    wide, narrow = prod(shape.spatial), prod(shape.out_spatial)  # positions at axis 1 and at axis 0 of the weight
    if shape.transposed:
        wide, narrow = narrow, wide
    flops = 2 * shape.batch * narrow * prod(weight_shape)
    channels = shape.groups * weight_shape[1]
    moved = shape.batch * (wide * channels + narrow * weight_shape[0]) + prod(weight_shape)
    kept = itemsize * prod(weight_shape)
    work = (*dense.work, (flops, rows + cols))
    moved = dense.bytes + itemsize * moved
    return ConvPlan("merge", dense.steps, (), (), (), (), dense.flops + flops, moved, kept, work)


def _chain_plans(found: Alignment, shape: ConvShape, itemsize: int) -> list[ConvPlan]:
    """Best chain for every way of contracting neighbouring cores first."""
    count = len(found.legs)
    outside = set(found.rows) | set(found.channels) | {k for k in found.kernel if k is not None}
    bonds = dict.fromkeys(label for leg in found.legs for label in leg if label not in outside)
    pairs = [tuple(k for k, leg in enumerate(found.legs) if bond in leg) for bond in bonds]
    subsets = [()] if count > MAX_SEARCH else [c for n in range(count) for c in combinations(pairs, n)]
    best: dict[tuple[tuple[int, ...], ...], ConvPlan] = {}
    for chosen in subsets:
        clusters = _clusters(count, chosen)
        if len(clusters) == 1 and count > 1:
            continue  # all cores in one is the merge plan
        if clusters not in best:
            plan = _Search(found, shape, itemsize, clusters).best()
            if plan is not None:
                best[clusters] = plan
    return list(best.values())


def _clusters(count: int, joined: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    owner = list(range(count))
    for members in joined:
        roots = {owner[k] for k in members}
        owner = [min(roots) if root in roots else root for root in owner]
    return tuple(tuple(k for k in range(count) if owner[k] == root) for root in sorted(set(owner)))


class _Search:
    """Depth-first search over the orders in which clusters of cores are absorbed into x."""

    def __init__(
        self,
        found: Alignment,
        shape: ConvShape,
        itemsize: int,
        clusters: tuple[tuple[int, ...], ...],
    ) -> None:
        self.found, self.sizes, self.shape, self.itemsize = found, found.sizes, shape, itemsize
        self.operands: list[Labels] = []
        self.indices: list[int] = []
        self.steps: list[Step] = []
        self.bytes = 0
        self.work: Work = ()
        total = len(found.legs)
        for cluster in clusters:
            if len(cluster) == 1:
                self.operands.append(found.legs[cluster[0]])
                self.indices.append(cluster[0])
                continue
            others = [found.legs[k] for k in range(total) if k not in cluster]
            wanted = {label for leg in others for label in leg} | set(found.rows) | set(found.channels)
            wanted |= {label for label in found.kernel if label is not None}
            labels = dict.fromkeys(label for k in cluster for label in found.legs[k])
            result = tuple(label for label in labels if label in wanted)
            plan = plan_path([found.legs[k] for k in cluster], found.sizes, result, itemsize)
            position = list(cluster)
            for step in plan.steps:
                self.steps.append(Step(position[step.left], position[step.right], step.equation))
                position.append(total + len(self.steps) - 1)
            self.operands.append(result)
            self.indices.append(position[-1])
            self.work += plan.work
            self.bytes += plan.bytes
        self.kernel = {label: d for d, label in enumerate(found.kernel) if label is not None}
        columns = ((GROUP,) if shape.groups > 1 else ()) + found.channels
        self.start, self.end = (found.rows, columns) if shape.transposed else (columns, found.rows)

    def best(self) -> ConvPlan | None:
        self.winner: ConvPlan | None = None
        every = tuple(range(len(self.operands)))
        self._descend(self.start, every, (), self.shape.spatial, self.work, self.bytes, 0)
        return self.winner

    def _descend(
        self,
        channels: Labels,
        left: tuple[int, ...],
        chain: tuple[ConvStep, ...],
        spatial: tuple[int, ...],
        work: Work,
        moved: int,
        kept: int,
    ) -> None:
        flops = sum(part for part, _ in work)
        if not left:
            if set(channels) != set(self.end):
                return
            permute = tuple(channels.index(label) for label in self.end)
            if permute != tuple(range(len(permute))):
                moved += 2 * self.itemsize * self.shape.batch * self._size(channels) * prod(spatial)
            sizes = tuple(self.sizes[label] for label in self.start)
            views, steps = self.found.splits, tuple(self.steps)
            plan = ConvPlan("chain", steps, chain, views, sizes, permute, flops, moved, kept, work)
            if self.winner is None or plan.seconds < self.winner.seconds:
                self.winner = plan
            return
        touching = [k for k in left if set(self.operands[k]) & set(channels)]
        choices = (touching or left) if len(self.operands) <= MAX_SEARCH else (touching or left)[:1]
        for k in choices:
            rest = tuple(j for j in left if j != k)
            # a stride without a kernel acts where it leaves the least work: at once, or last where it widens
            edge = not rest if self.shape.transposed else not chain
            step, after, flop, byte, now = self._step(k, channels, rest, edge, spatial)
            lower = (flops + flop) / FLOP_RATE + (moved + byte) / BYTE_RATE + (len(chain) + 1) * CALL_SECONDS
            if self.winner is not None and lower >= self.winner.forward_seconds:
                continue
            copied = step.free > 0 or step.order != tuple(range(len(step.order)))
            held = self.itemsize * self.shape.batch * self._size(channels) * prod(spatial) if chain or copied else 0
            part = (flop, (*channels, *(label for label in self.operands[k] if label not in channels)))
            self._descend(after, rest, (*chain, step), now, (*work, part), moved + byte, kept + held)

    def _step(
        self, k: int, channels: Labels, rest: tuple[int, ...], edge: bool, spatial: tuple[int, ...]
    ) -> tuple[ConvStep, Labels, int, int, tuple[int, ...]]:
        labels = self.operands[k]
        later = {label for j in rest for label in self.operands[j]} | set(self.end)
        shared = [label for label in channels if label in labels]
        kept = [label for label in shared if label in later]
        contracted = [label for label in shared if label not in later]
        free = [label for label in channels if label not in labels]
        new = [label for label in labels if label not in channels and label not in self.kernel]
        axes = [self.kernel[label] for label in labels if label in self.kernel]
        dims = tuple(d in axes or (edge and self.found.kernel[d] is None) for d in range(len(spatial)))
        now = tuple(self.shape.out_spatial[d] if dims[d] else n for d, n in enumerate(spatial))
        order = tuple(channels.index(label) for label in (*free, *kept, *contracted))
        kernel_axes = [labels.index(self.found.kernel[d] or "") for d in range(len(spatial)) if d in axes]
        core_axes = (*(labels.index(label) for label in (*kept, *new, *contracted)), *kernel_axes)
        own = tuple(d in axes for d in range(len(spatial)))
        step = ConvStep(self.indices[k], order, len(free), len(kept), core_axes, len(new), len(contracted), own, dims)
        after = (*free, *kept, *new)
        lengths = prod(self.shape.kernel_size[d] for d in axes)
        rows = self.shape.batch * self._size(free) * self._size(kept)
        places = prod(spatial if self.shape.transposed else now)  # where the small kernel is laid
        flops = 2 * rows * self._size(new) * self._size(contracted) * lengths * places
        volume_in = self.shape.batch * self._size(channels) * prod(spatial)
        volume_out = self.shape.batch * self._size(after) * prod(now)
        copies = 2 if order != tuple(range(len(order))) or free else 0  # leaves the layout of a plain convolution
        return step, after, flops, self.itemsize * ((1 + copies) * volume_in + volume_out), now

    def _size(self, labels: Sequence[str]) -> int:
        return prod(self.sizes[label] for label in labels)
