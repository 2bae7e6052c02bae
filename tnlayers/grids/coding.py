"""Cores of a tree coded with few bits: int8 with scales, or bit planes of one common step, with the error known."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod, sqrt

import numpy as np
import torch
from torch import Tensor

from decompositions.formats.gauge import bond_singular_values, require_tree
from decompositions.formats.gauge import round as round_network
from decompositions.formats.network import Labels, Network, TreeEdge, check_labels, tree_edges
from decompositions.linalg import full_precision
from tnlayers.grids.planes import pack_planes, unpack_planes

CODINGS = ("none", "int8", "planes")
OCTAVE = 8
"""Scales of columns are powers of 2^(-1/8), one byte each; what their rounding takes is in the coded numbers."""
INT8 = 127
SMALLEST = 1e-13
"""Step relative to the norm below which double precision has no bits left."""


@dataclass(frozen=True, eq=False)
class Coded:
    """A tree whose cores are coded: what a file holds, and the network it stands for.

    With "planes" a number is `level * step / scale` with an integer level and, for the index it has in the bond toward
    the center, the scale `2^(-exponent / 8)`; in the center it is `level * step * norm`. With "int8" the levels are
    bytes, and every index of the bond toward the center (in the center: of its longest axis) has a factor instead.

    Args:
        format: name of the network's class.
        legs: of its cores.
        rows: outside labels.
        cols: outside labels.
        shapes: of the cores.
        coding: "int8" or "planes".
        step: of the levels, relative to the norm.
        norm: of the network.
        levels: one byte tensor a core: packed planes, or int8 numbers in C order.
        scales: one a core: exponents (uint8) or factors (float32), along `axes`.
        axes: the axis of each core that its scales belong to; -1 for none.
        error: bound of the Frobenius norm of what coding changed.

    Example:
        >>> from decompositions import TT
        >>> coded = code(TT.random(row_modes=(9, 9, 9), rank=3), "planes", error=1.0)
        >>> coded.error <= 1.0, coded.network().shape
        (True, (9, 9, 9))
    """

    format: str
    legs: tuple[Labels, ...]
    rows: Labels
    cols: Labels
    shapes: tuple[tuple[int, ...], ...]
    coding: str
    step: float
    norm: float
    levels: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    axes: tuple[int, ...]
    error: float

    @property
    def nbytes(self) -> int:
        """Bytes of levels and scales."""
        return sum(t.numel() * t.element_size() for t in (*self.levels, *self.scales))

    def network(self, dtype: torch.dtype = torch.float64) -> Network:
        """The network, decoded.

        Raises:
            ValueError: labels that do not fit the shapes, levels or scales that are damaged.
        """
        kind = Network.formats.get(self.format)
        if kind is None:
            raise ValueError(f"decode: expected one of the formats {sorted(Network.formats)}, got {self.format!r}")
        check_labels("decode", self.shapes, self.legs, self.rows, self.cols)
        for k, (shape, axis) in enumerate(zip(self.shapes, self.axes, strict=True)):
            size = 0 if axis == -1 else shape[axis] if 0 <= axis < len(shape) else -1
            if self.scales[k].numel() != size:
                raise ValueError(f"decode: core {k} must have {size} scales, got {self.scales[k].numel()}")
        cores = [self._bytes_core(k) if self.coding == "int8" else self._planes_core(k) for k in range(len(self.legs))]
        net = kind._unchecked([core.to(dtype) for core in cores], self.legs, self.rows, self.cols)
        net.__post_init__()
        return net

    def _bytes_core(self, k: int) -> Tensor:
        shape = self.shapes[k]
        if self.levels[k].numel() != prod(shape):
            raise ValueError(f"decode: core {k} must have {prod(shape)} levels, got {self.levels[k].numel()}")
        return self.levels[k].view(torch.int8).double().reshape(shape) * _along(
            self.scales[k].double(), self.axes[k], len(shape)
        )

    def _planes_core(self, k: int) -> Tensor:
        shape, axis = self.shapes[k], self.axes[k]
        exponents = {leg[a]: own for leg, a, own in zip(self.legs, self.axes, self.scales, strict=True) if a >= 0}
        found = unpack_planes(self.levels[k].numpy().tobytes(), prod(shape))
        flat = np.empty(len(found))
        flat[_order(shape, [exponents.get(label) for label in self.legs[k]])] = found
        numbers = torch.from_numpy(flat).reshape(shape) * self.step
        return numbers * self.norm if axis < 0 else numbers / _along(_powers(self.scales[k]), axis, len(shape))


def code(net: Network, coding: str, error: int | float = inf) -> Coded:
    r"""Code a tree with at most so large an error.

    Let `W` be the tree with all cores but the center isometries, in the gauge in which a bond's indices are singular
    vectors, with singular values s_j. **Planes**: core v is coded as `q = round(M / step)`, `M = core_v diag(s)` (the
    center: M = center) with one step for all cores, since a change E of `M` changes `W` by `‖E‖` to first order: so
    every coded number of every core costs the same error, `step^2 / 12` where it is large and its own square where it
    becomes 0. A number takes about `log2(|M| / step)` bits: rows of small singular values take none.

    The error is known exactly, not to first order. Cores are coded from the leaves to the center, and each parent is
    refitted to the coded bases B̂ of its children (B̂^+ B in the bond). So coding a core v amounts to an orthogonal
    projection P_v of W onto the span of the coded basis, the projections commute (their subspaces belong to disjoint or
    nested sets of modes), and the errors add as squares:

        ‖W - Ŵ‖^2  =  sum_v ‖(1 - P_v) Π_{u before v} P_u W‖^2 + ‖Q E‖^2
                  <=  sum_v sum_j s_j^2 ‖(1 - P_v) b_j‖^2 + ‖Q E‖^2

    with b_j the columns of the core in the bases of its children as they are coded, E the rounding of the center and Q
    its basis. The last line is `Coded.error` (on real grids within 1 % of the true error); the step is
    the largest (within 1 %) for which it is at most `error`. A column that becomes 0 leaves its bond.

    **int8**: levels in -127..127 and a factor for every index of the bond toward the center; its error is what it is,
    bounded in the same way; the same refit.

    Cost: a round of the network, then about 20 codings of O(sum_v n_v r^(deg + 1)) each.

    Args:
        net: a tree of any real floating dtype.
        coding: "int8" or "planes".
        error: largest absolute Frobenius error of the coded network against this one.

    Returns:
        Coded, whose `error` is at most `error`.

    Raises:
        ValueError: no tree, complex cores, an error that is not positive, or one that int8 or 62 planes cannot reach.

    References:
        R. Ballester-Ripoll, P. Lindstrom, R. Pajarola, TTHRESH: tensor compression for multidimensional visual data,
        IEEE TVCG 2020, arXiv 1806.05952 (bit planes of the Tucker core, weights of the factors).

    Example:
        >>> import torch
        >>> from decompositions import Tucker, norm
        >>> net = Tucker.random(row_modes=(20, 20, 20), rank=6)
        >>> coded = code(net, "planes", error=0.01 * float(norm(net)))
        >>> coded.nbytes < 0.4 * 4 * sum(core.numel() for core in net.cores)
        True
    """
    if coding not in CODINGS[1:]:
        raise ValueError(f"code: coding must be one of {', '.join(CODINGS[1:])}, got {coding!r}")
    if not error > 0:
        raise ValueError(f"code: error must be a number above 0, got {error}")
    require_tree("code", net)
    if net.dtype.is_complex:
        raise ValueError(f"code: expected real cores, got {net.dtype}; store them with coding none")
    task = _Task(net)
    if coding == "int8":
        trial = task.run(None)
        if trial.error > error:
            raise ValueError(
                f"code: int8 changes this network by {trial.error:.3g}, expected at most {error:.3g}; take planes"
            )
        return task.packed(trial)
    return task.packed(_largest_step(task, error / (task.norm or 1.0)))


def _largest_step(task: "_Task", error: float) -> "_Trial":
    """The coarsest coding whose bound is at most `error`, relative to the norm."""
    high = 4 * min(error, 1.0)  # with fewer than twelve numbers of half a step each one may be there
    best = task.run(high)
    if best.error <= error * task.norm:
        return best
    low = high
    while best.error > error * task.norm:
        low, high = low / 4, low
        if low < SMALLEST:
            raise ValueError(f"code: expected an error of at least about {SMALLEST:.0e} of the norm, got {error:.3g}")
        best = task.run(low)
    while high / low > 1.01:
        middle = sqrt(low * high)
        trial = task.run(middle)
        if trial.error <= error * task.norm:
            low, best = middle, trial
        else:
            high = middle
    return best


def _powers(exponents: Tensor) -> Tensor:
    return torch.exp2(-exponents.double() / OCTAVE)


def _along(values: Tensor, axis: int, order: int) -> Tensor:
    return values.reshape([-1 if k == axis else 1 for k in range(order)])


def _order(shape: Sequence[int], exponents: Sequence[Tensor | None]) -> np.ndarray:
    """Places of a core's numbers, expected large ones first: by the sum of the exponents of its bonds."""
    total = np.zeros(tuple(shape), dtype=np.int64)
    for axis, own in enumerate(exponents):
        if own is not None:
            total += own.numpy().astype(np.int64).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return np.argsort(total, axis=None, kind="stable")


@dataclass(frozen=True, eq=False)
class _Trial:
    """Levels (float64 integers), scales and their axes, and the bound of the error."""

    step: float | None
    levels: list[Tensor]
    scales: list[Tensor]
    axes: list[int]
    error: float


class _Task:
    """A tree in its canonical gauge and of norm 1, to be coded at several steps (None: int8)."""

    @full_precision
    def __init__(self, net: Network) -> None:
        sizes = [core.numel() for core in net.cores]
        self.center = sizes.index(max(sizes))
        net = round_network(net.detach().to(torch.float64), center=self.center)
        self.norm = float(torch.linalg.vector_norm(net.cores[self.center]))
        cores = list(net.cores)
        cores[self.center] = cores[self.center] / (self.norm or 1.0)
        self.net = net.replace(cores)
        self.spectra = bond_singular_values(self.net)
        self.edges: tuple[TreeEdge, ...] = tree_edges(net.legs, net.rows, net.cols, self.center)
        self.exponents = {
            bond: (-OCTAVE * torch.log2(values.clamp(1e-300, 1))).round().clamp(0, 255).to(torch.uint8)
            for bond, values in self.spectra.items()
        }

    @full_precision
    def run(self, step: float | None) -> _Trial:
        """Code from the leaves to the center."""
        net, count = self.net, len(self.net.cores)
        nothing = torch.empty(0, dtype=torch.uint8)
        levels, scales, axes = [nothing] * count, [nothing] * count, [-1] * count
        refit: dict[str, Tensor] = {}  # bond -> B̂^+ B
        gauge: dict[str, Tensor] = {}  # bond -> R of B̂ = Q R
        overlap: dict[str, Tensor] = {}  # bond -> Q^T B
        squares = 0.0
        for edge in reversed(self.edges):
            k, bond, axis = edge.child, edge.bond, net.legs[edge.child].index(edge.bond)
            core = net.cores[k]
            levels[k], scales[k], coded = self._coded(self._applied(core, k, refit), axis, step, self.exponents[bond])
            axes[k] = axis
            basis, truth = (
                self._applied(*pair).movedim(axis, -1).reshape(-1, pair[0].shape[axis])
                for pair in ((coded, k, gauge), (core, k, overlap))
            )
            isometry, gauge[bond] = torch.linalg.qr(basis)
            overlap[bond] = isometry.mT @ truth
            refit[bond] = torch.linalg.pinv(gauge[bond], rtol=1e-13) @ overlap[bond]
            lost = (truth - isometry @ overlap[bond]).square().sum(0)
            squares += float((lost * self.spectra[bond].square()).sum())
        k = self.center
        fitted = self._applied(net.cores[k], k, refit)
        if step is None:
            axes[k] = max(range(fitted.ndim), key=lambda a: fitted.shape[a])
        levels[k], scales[k], coded = self._coded(fitted, axes[k], step, None)
        squares += float(self._applied(coded - fitted, k, gauge).square().sum())
        return _Trial(step, levels, scales, axes, self.norm * sqrt(squares))

    def packed(self, trial: _Trial) -> Coded:
        """A trial as bytes."""
        net, shapes = self.net, tuple(tuple(q.shape) for q in trial.levels)
        exponents = {net.legs[k][axis]: trial.scales[k] for k, axis in enumerate(trial.axes) if axis >= 0}
        levels, scales = [], list(trial.scales)
        for leg, q in zip(net.legs, trial.levels, strict=True):
            if trial.step is None:
                levels.append(q.to(torch.int8).flatten().view(torch.uint8))
                continue
            order = _order(tuple(q.shape), [exponents.get(label) for label in leg])
            packed = pack_planes(q.flatten().numpy()[order].astype(np.int64))
            levels.append(torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy()))
        return Coded(
            type(net).__name__, net.legs, net.rows, net.cols, shapes, "int8" if trial.step is None else "planes",
            trial.step or 1.0, self.norm, tuple(levels), tuple(scales), tuple(trial.axes), trial.error,
        )  # fmt: skip

    def _coded(
        self, core: Tensor, axis: int, step: float | None, exponents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, scales, and the core that they stand for."""
        if step is None:
            largest = core.abs().movedim(axis, 0).reshape(core.shape[axis], -1).amax(1)
            unit = self.norm if exponents is None else 1.0  # of the center: what is stored has the norm in it
            scale = (largest * unit / INT8).float()
            spread = _along(scale.double() / (unit or 1.0), axis, core.ndim)
            level = torch.where(spread > 0, core / spread, 0.0).round().clamp(-INT8, INT8)
            return level, scale, level * spread
        if exponents is None:
            level = (core / step).round()
            return level, torch.empty(0, dtype=torch.uint8), level * step
        weight = _along(_powers(exponents), axis, core.ndim)
        level = (core * weight / step).round()
        used = level.movedim(axis, 0).reshape(level.shape[axis], -1).any(1)
        used[0] |= not bool(used.any())  # a bond has at least one index
        where = used.nonzero()[:, 0]
        level, weight = level.index_select(axis, where), weight.index_select(axis, where)
        return level, exponents[where], level * step / weight

    def _applied(self, core: Tensor, k: int, matrices: dict[str, Tensor]) -> Tensor:
        """A core multiplied by a matrix in each bond that has one: its own children's."""
        for axis, label in enumerate(self.net.legs[k]):
            if label in matrices:
                core = torch.tensordot(matrices[label], core, dims=([1], [axis])).movedim(0, axis)
        return core
