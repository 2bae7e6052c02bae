"""Quantized trains on finer and coarser grids: one digit more or less."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Literal

import torch
from torch import Tensor

from cross_approx.calculus.functions import integrate
from cross_approx.calculus.interpolation import check_axes
from cross_approx.digits import Quantization
from decompositions.formats.gauge import round as round_network
from decompositions.formats.modes import as_integer
from decompositions.formats.network import Network
from decompositions.formats.tt import TT


def upsample_digits(
    network: TT,
    quantization: Quantization,
    *,
    axes: int | Sequence[int] | None = None,
    base: int = 2,
    mode: Literal["linear", "constant"] = "linear",
    align: Literal["cells", "corners"] = "cells",
    tol: int | float | None = None,
) -> tuple[TT, Quantization]:
    """A quantized train (QTT) on a grid `base` times as fine along some axes: a digit more for each.

    Constant: the new core is an identity, no rank grows. Linear: the new digit chooses weights of W(i), W(i + 1) and
    W(i - 1), and the shifts i + 1, i - 1 are carries through the digits of the axis: an operator of rank 6 (cells) or 4
    (corners) at most, followed by rounding. Equal to `upsample` of the tensor by `factor=base` for cells; for corners
    new entry `base k` is old entry k, the last cell being constant (n becomes `base n`, not `base (n - 1) + 1`). The
    boundary is that of `shape`: entries of the padding take no part.
    The new digit follows the last of its axis; where the digits of axes are interleaved it is appended to the train.
    Cost: O(m b (6 r)^3) for m digits.

    Args:
        network: a TT with one core a digit, in the order of `quantization.modes`.
        quantization: how the axes are written as digits (`qtt_cross(...).quantization`, or `Quantization.of`).
        axes: axes of the tensor that are refined; all by default.
        base: size of the new digits.
        mode: "linear" or "constant".
        align: as in `upsample`.
        tol: relative error of the rounding after linear steps; 20 m machine epsilons an axis by default.

    Returns:
        The train, and its quantization: `shape` and the sizes of the refined axes are `base` times the old ones.

    Raises:
        TypeError: no quantization.
        ValueError: digits that do not fit the train or the shape, an unknown mode, a base below 2.

    References:
        F. Loeschcke et al., Coarse-to-fine tensor trains for compact visual representations, 2024, arXiv 2406.04332;
        V. Kazeev, B. Khoromskij, Low-rank explicit QTT representation of the Laplace operator, 2012.

    Example:
        >>> import torch
        >>> from decompositions import to_dense
        >>> net = TT([torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])])  # 0, 1, 2, 3
        >>> fine, q = upsample_digits(net, Quantization((4,), ((0, 2), (0, 2))), align="corners")
        >>> q.shape, [round(x, 4) for x in to_dense(fine).flatten().abs().tolist()]
        ((8,), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0])
    """
    name = "upsample_digits"
    if mode not in ("linear", "constant") or align not in ("cells", "corners"):
        raise ValueError(
            f"{name}: expected mode 'linear' or 'constant' and align 'cells' or 'corners', got {mode!r} and {align!r}"
        )
    if (as_integer(base) or 0) < 2:
        raise ValueError(f"{name}: base must be an int >= 2, got {base!r}")
    shape, modes = _check(name, network, quantization)
    cores = _cores(name, network)
    refined = check_axes(name, axes, len(shape))
    for axis in refined:
        cores, modes = _refined(cores, modes, axis, shape[axis], _weights(base, mode, align))
        shape = (*shape[:axis], base * shape[axis], *shape[axis + 1 :])
        if mode == "linear":  # axis by axis: states of interleaved axes would multiply
            least = 20 * len(modes) * torch.finfo(network.dtype).eps
            cut = round_network(_train(cores), tol=least if tol is None else float(tol) / len(refined))
            cores = _cores(name, cut)
    return _train(cores), Quantization(shape, modes)


def downsample_digits(
    network: TT, quantization: Quantization, *, axes: int | Sequence[int] | None = None
) -> tuple[Network, Quantization]:
    """A quantized train on a coarser grid: means over the last digit of some axes. No rank grows.

    Undoes `upsample_digits(mode="constant")`.

    Args:
        network: a TT with one core a digit, in the order of `quantization.modes`.
        quantization: as in `upsample_digits`.
        axes: axes of the tensor that are coarsened; all by default.

    Returns:
        The train, and its quantization.

    Raises:
        TypeError: no quantization.
        ValueError: an axis without digits, or of a size that its last digit does not divide (a mean would see padding);
            no digit left.

    Example:
        >>> import torch
        >>> from decompositions import to_dense
        >>> net = TT([torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])])  # 0, 1, 2, 3
        >>> to_dense(downsample_digits(net, Quantization((4,), ((0, 2), (0, 2))))[0]).tolist()
        [0.5, 2.5]
    """
    shape, modes = _check("downsample_digits", network, quantization)
    gone = []
    for axis in check_axes("downsample_digits", axes, len(shape)):
        digits = [k for k, (owner, _) in enumerate(modes) if owner == axis]
        last = modes[digits[-1]][1] if digits else 0
        if not digits or shape[axis] % last:
            raise ValueError(
                f"downsample_digits: axis {axis} needs a digit, and a size that its last digit divides, "
                f"got size {shape[axis]} and digits {tuple(modes[k][1] for k in digits)}"
            )
        gone.append(digits[-1])
        shape = (*shape[:axis], shape[axis] // last, *shape[axis + 1 :])
    if len(gone) == len(modes):
        raise ValueError(f"downsample_digits: no digit would be left of {modes}; integrate(network, weights='mean')")
    coarse = integrate(network, gone, "mean")
    assert isinstance(coarse, Network)
    return coarse, Quantization(shape, tuple(mode for k, mode in enumerate(modes) if k not in gone))


Modes = tuple[tuple[int, int], ...]


def _check(name: str, network: Network, quantization: Quantization) -> tuple[tuple[int, ...], Modes]:
    if not isinstance(quantization, Quantization):
        raise TypeError(
            f"{name}: expected a Quantization, got {type(quantization).__name__}; qtt_cross(...).quantization is one"
        )
    shape, modes = quantization.shape, quantization.modes
    if tuple(size for _, size in modes) != network.shape:
        raise ValueError(f"{name}: the digits must be the modes of the train, expected {network.shape}, got {modes}")
    return shape, modes


def _cores(name: str, network: Network) -> list[Tensor]:
    """Cores (r, n, s) of a train in the order of its modes, boundary ranks included."""
    bonds = [tuple(label for label in leg if label not in network.outside) for leg in network.legs]
    last = len(bonds) - 1
    joints = [set(left) & set(right) for left, right in pairwise(bonds)]
    expected = [
        (*(joints[k - 1] if k else ()), label, *(joints[k] if k < last else ()))
        for k, label in enumerate(network.outside[: last + 1])
    ]
    if list(network.legs) != expected or len(network.outside) != last + 1:
        raise ValueError(f"{name}: expected a train with one core a mode, in their order, got {network.equation}")
    cores = [network.cores[0].unsqueeze(0), *network.cores[1:]]
    return [*cores[:-1], cores[-1].unsqueeze(-1)]


def _train(cores: Sequence[Tensor]) -> TT:
    cores = [cores[0].squeeze(0), *cores[1:]]
    return TT([*cores[:-1], cores[-1].squeeze(-1)])


SAME, CARRY, BORROW, TOP, BEYOND, BOTTOM = range(6)
"""What the digits to the right of a bond ask for: the index itself, one more, one less, or corrections at the boundary.

At the top, index n - 1 stays (TOP), and what reads the padding at n is taken back (BEYOND); at the bottom index 0 stays
(BOTTOM). A carry out of the first digit is dropped.
"""

STATES = 6


def _weights(base: int, mode: str, align: str) -> Tensor:
    """Weights (states, base) for every value of the new digit."""
    weights = torch.zeros(STATES, base, dtype=torch.float64)
    for b in range(base):
        offset = 0.0 if mode == "constant" else b / base if align == "corners" else (2 * b + 1 - base) / (2 * base)
        weights[SAME, b] = 1 - abs(offset)
        weights[[CARRY, TOP], b] = max(offset, 0.0)
        weights[BEYOND, b] = -max(offset, 0.0)
        weights[[BORROW, BOTTOM], b] = max(-offset, 0.0)
    return weights


def _steps(sizes: Sequence[int], n: int) -> list[Tensor]:
    """The operator at every digit of an axis of n entries: (out, in, state on the left, state on the right)."""
    steps = []
    last, beyond = _digits(n - 1, sizes), _digits(n, sizes)
    for size, top, over in zip(sizes, last, beyond, strict=True):
        step = torch.zeros(size, size, STATES, STATES, dtype=torch.float64)
        for out in range(size):
            step[out, out, SAME, SAME] = 1
            step[out, (out + 1) % size, CARRY if out == size - 1 else SAME, CARRY] = 1
            step[out, (out - 1) % size, BORROW if out == 0 else SAME, BORROW] = 1
        step[top, top, TOP, TOP] = step[top, over, BEYOND, BEYOND] = step[0, 0, BOTTOM, BOTTOM] = 1
        steps.append(step)
    return steps


def _digits(number: int, sizes: Sequence[int]) -> list[int]:
    digits = []
    for size in reversed(sizes):
        digits.append(number % size)
        number //= size
    return digits[::-1]


def _refined(cores: list[Tensor], modes: Modes, axis: int, n: int, weights: Tensor) -> tuple[list[Tensor], Modes]:
    """Apply the operator of one axis, and append its new digit. Operators run from the first digit to the new one."""
    digits = {owner: [k for k, (other, _) in enumerate(modes) if other == owner] for owner, _ in modes}
    apart = all(own[-1] - own[0] == len(own) - 1 for own in digits.values())
    own = digits.get(axis, [])
    place = own[-1] + 1 if own and apart else len(modes)
    sizes = [modes[k][1] for k in own]
    weights = weights.clone()
    if prod(sizes) == n:
        weights[BEYOND] = 0  # there the carry leaves the first digit
    used = [state for state in range(STATES) if state == SAME or bool((weights[state] != 0).any())]
    steps = dict(zip(own, _steps(sizes, n), strict=True))
    ends = [float(state not in (CARRY, BORROW)) for state in used]
    made = []
    for k, core in enumerate(cores):
        if own and own[0] <= k < place:
            if k in steps:
                step = steps[k][:, :, used][..., used]
            else:
                step = torch.einsum("oi,lm->oilm", torch.eye(core.shape[1]), torch.eye(len(used))).double()
            if k == own[0]:
                step = torch.einsum("l,oilm->oim", torch.tensor(ends).double(), step)[:, :, None]
            r, _, s = core.shape
            out, _, left, right = step.shape
            core = torch.einsum("ris,oilm->rlosm", core, step.to(core)).reshape(r * left, out, s * right)
        made.append(core)
    end = weights[used] if own else torch.ones(1, weights.shape[1])  # one entry: all of them read it
    s = cores[place - 1].shape[2]
    new = torch.einsum("st,zb->szbt", torch.eye(s).to(cores[0]), end.to(cores[0]))
    made.insert(place, new.reshape(-1, end.shape[1], s))
    return made, (*modes[:place], (axis, end.shape[1]), *modes[place:])
