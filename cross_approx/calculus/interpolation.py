"""Networks between their grid points, on finer grids and on coarser ones: each mode by itself, on its core."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from cross_approx.calculus.entries import Corner, values_at
from cross_approx.calculus.legs import transform, with_own_legs
from decompositions.formats.modes import as_integer
from decompositions.formats.network import Network

N = TypeVar("N", bound=Network)
Align = Literal["index", "corners", "cells"]
Outside = Literal["error", "clamp", "zero", "extrapolate"]


def check_axes(name: str, axes: int | Sequence[int] | None, order: int) -> list[int]:
    """Distinct axes counted from 0, in the order given; all of them for None."""
    given = range(order) if axes is None else axes if isinstance(axes, Sequence) else [axes]
    found = [as_integer(axis) for axis in given]
    if any(axis is None or not -order <= axis < order for axis in found):
        raise ValueError(f"{name}: axes must be ints in {-order}..{order - 1}, got {axes!r}")
    numbers = [int(axis) % order for axis in given]
    if len(set(numbers)) < len(numbers) or not numbers:
        raise ValueError(f"{name}: expected at least one axis and none twice, got {axes!r}")
    return numbers


def interpolate(
    network: Network,
    points: Float[Tensor, "B d"],
    *,
    align: Align = "index",
    nodes: Sequence[Float[Tensor, "_n"]] | None = None,
    outside: Outside = "error",
) -> Inexact[Tensor, "B"]:
    """Multilinear interpolation of a network at real points: `sum over the 2^d corners of prod (weights) W(corner)`.

    The weights factorize, so that each core is interpolated by itself: O(B d r^2) for a train, not 2^d entries a point.
    Equal to `gather` at grid points, exact for multilinear functions. Differentiable in the cores, in the points (the
    slope of the cell; at a grid point that of the cell above) and in the nodes.

    Args:
        network: of any format.
        points: (B, d), in the order of the axes (`torch.nn.functional.grid_sample` takes them reversed).
        align: what the coordinates of a mode with n entries mean. "index": entry k is at k. "corners": the first entry
            is at -1 and the last at 1 (`align_corners=True`). "cells": entries are centers of n equal cells of [-1, 1],
            entry k at (2 k + 1) / n - 1 (`align_corners=False`).
        nodes: instead of `align`, the increasing coordinates (n_k,) of the entries of every mode, in any spacing.
        outside: beyond the first and last entry. "error" refuses (rounding of the coordinates counts as inside),
            "clamp" takes the nearest boundary point, "zero" lets values fall linearly to 0 within one spacing and
            stay 0, "extrapolate" continues the first or last cell.

    Returns:
        (B,) values in the dtype of the network.

    Raises:
        TypeError: points that are not floating.
        ValueError: points of another shape, NaN, out of range where that is an error; nodes that do not fit.

    Example:
        >>> import torch
        >>> from decompositions import CP
        >>> x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
        >>> interpolate(CP([x, x]), torch.tensor([[0.5, 3.25]], dtype=torch.float64)).item() == 0.125 * 0.8125
        True
    """
    if align not in get_args(Align) or outside not in get_args(Outside):
        raise ValueError(
            f"interpolate: align must be one of {get_args(Align)} and outside one of {get_args(Outside)}, "
            f"got {align!r} and {outside!r}"
        )
    if not points.is_floating_point():
        raise TypeError(f"interpolate: points must be floating, got {points.dtype}; integer ones are for gather")
    if points.ndim != 2 or points.shape[1] != network.order:
        raise ValueError(f"interpolate: expected points of shape (B, d = {network.order}), got {tuple(points.shape)}")
    bad = ~points.detach().isfinite().all(1)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(f"interpolate: points must be finite, got {points[row].tolist()} in row {row}")
    if nodes is not None:
        _check_nodes(nodes, network.shape, align)
    corners = []
    for k, (column, n) in enumerate(zip(points.to(network.device).double().unbind(1), network.shape, strict=True)):
        x = _position(column, n, align) if nodes is None else _position_between(column, nodes[k].to(column))
        # rounding of coordinates near n
        slack = 8 * n * torch.finfo(points.dtype).eps
        off = (x.detach() < -slack) | (x.detach() > n - 1 + slack)
        if outside == "error" and bool(off.any()):
            row = int(off.int().argmax())
            raise ValueError(
                f"interpolate: points must be on the grid, expected positions in 0..{n - 1} along axis {k}, "
                f"got {float(x[row])} (coordinate {float(column[row])}) in row {row}; outside= says what else to do"
            )
        corners.append(_corners(x, n, outside))
    return values_at(with_own_legs(network, range(network.order)), corners, len(points))


def _check_nodes(nodes: Sequence[Tensor], shape: tuple[int, ...], align: Align) -> None:
    if align != "index":
        raise ValueError(f"interpolate: nodes say where the entries are, got align={align!r} too; leave it out")
    if len(nodes) != len(shape):
        raise ValueError(f"interpolate: nodes needs one vector an axis, expected {len(shape)}, got {len(nodes)}")
    for k, (vector, n) in enumerate(zip(nodes, shape, strict=True)):
        if vector.shape != (n,) or not bool((vector.diff() > 0).all() & vector.isfinite().all()):
            raise ValueError(
                f"interpolate: nodes of axis {k} must be a strictly increasing vector ({n},), got {tuple(vector.shape)}"
            )


def _position(x: Tensor, n: int, align: Align) -> Tensor:
    """Coordinates as positions, entry k at k."""
    if align == "index":
        return x
    return (x + 1) / 2 * (n - 1) if align == "corners" else ((x + 1) * n - 1) / 2


def _position_between(x: Tensor, nodes: Tensor) -> Tensor:
    if len(nodes) == 1:
        return x - nodes[0]
    low = (torch.searchsorted(nodes.detach(), x.detach().contiguous(), right=True) - 1).clamp(0, len(nodes) - 2)
    return low + (x - nodes[low]) / (nodes[low + 1] - nodes[low])


def _corners(x: Tensor, n: int, outside: Outside) -> list[Corner]:
    """The two entries beside every position, and their weights."""
    if n == 1:
        weight = (1 - x.abs()).clamp(min=0) if outside == "zero" else torch.ones_like(x) + 0 * x
        return [Corner(torch.zeros_like(x, dtype=torch.long), weight)]
    if outside == "zero":
        low = x.detach().floor()
        pairs = []
        for at, weight in ((low, 1 - (x - low)), (low + 1, x - low)):
            inside = (at >= 0) & (at < n)
            pairs.append(Corner(at.clamp(0, n - 1).long(), torch.where(inside, weight, 0.0)))
        return pairs
    if outside != "extrapolate":
        x = x.clamp(0, n - 1)
    low = x.detach().floor().clamp(0, n - 2)
    weight = x - low
    return [Corner(low.long(), 1 - weight), Corner(low.long() + 1, weight)]


def upsample(
    network: N,
    factor: int | Sequence[int] | None = None,
    *,
    size: int | Sequence[int] | None = None,
    axes: int | Sequence[int] | None = None,
    mode: Literal["linear", "constant"] = "linear",
    align: Literal["cells", "corners"] = "cells",
) -> N:
    """The network on a finer grid, by linear interpolation of each core along its outside leg: exact prolongation.

    `to_dense(upsample(W)) = ` the multilinear interpolation of `to_dense(W)`, as
    `torch.nn.functional.interpolate` has it; no rank changes. Cost: the size of the new cores. Differentiable.

    Args:
        network: of any format.
        factor: n becomes `factor * n` for cells, `factor * (n - 1) + 1` for corners (old entries stay every factor-th).
        size: instead of it, the new sizes.
        axes: those axes alone, in the order of `factor` or `size`; all by default.
        mode: "linear", or "constant" for the entry of the cell that a new cell begins in.
        align: "cells": entries are cells of equal width, old and new ones cover the same interval, and values beyond
            the outer centers are constant (`align_corners=False`). "corners": the first and last entries stay
            (`align_corners=True`).

    Returns:
        A network of the same format and ranks.

    Raises:
        ValueError: neither or both of factor and size, wrong numbers of them, an unknown mode.

    References:
        F. Loeschcke et al., Coarse-to-fine tensor trains for compact visual representations, 2024, arXiv 2406.04332.

    Example:
        >>> import torch
        >>> from decompositions import TT, to_dense
        >>> to_dense(upsample(TT([torch.tensor([0.0, 2.0, 4.0])]), 2, align="corners")).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    if mode not in ("linear", "constant") or align not in ("cells", "corners"):
        raise ValueError(
            f"upsample: expected mode 'linear' or 'constant' and align 'cells' or 'corners', got {mode!r} and {align!r}"
        )
    if (factor is None) == (size is None):
        raise ValueError(f"upsample: expected either factor or size, got factor={factor!r} and size={size!r}")
    if mode == "constant" and align == "corners":
        raise ValueError("upsample: mode 'constant' repeats cells, expected align='cells', got 'corners'")
    found = check_axes("upsample", axes, network.order)
    if factor is not None:
        factors = per_axis("upsample", "factor", factor, len(found))
        sizes = tuple(
            f * network.shape[axis] if align == "cells" else f * (network.shape[axis] - 1) + 1
            for f, axis in zip(factors, found, strict=True)
        )
    else:
        assert size is not None
        sizes = per_axis("upsample", "size", size, len(found))
    actions: dict[int, Callable[[Tensor, int], Tensor]] = {}
    for axis, new in zip(found, sizes, strict=True):
        actions[axis] = _prolongation(network.shape[axis], new, mode, align)
    return transform(network, actions)  # type: ignore[return-value]


def _prolongation(n: int, new: int, mode: str, align: str) -> Callable[[Tensor, int], Tensor]:
    j = torch.arange(new, dtype=torch.float64)
    if mode == "constant":
        which = (torch.arange(new) * n) // new
        return lambda core, at: core.index_select(at, which.to(core.device))
    x = (j + 0.5) * n / new - 0.5 if align == "cells" else j * ((n - 1) / max(new - 1, 1))
    x = x.clamp(0, n - 1)
    low = x.floor().clamp(0, max(n - 2, 0))
    weight, below, above = x - low, low.long(), (low.long() + 1).clamp(max=n - 1)

    def act(core: Tensor, at: int) -> Tensor:
        w = weight.to(core.device, core.real.dtype).reshape(-1, *[1] * (core.ndim - 1 - at))
        first, second = (core.index_select(at, k.to(core.device)) for k in (below, above))
        return first + w * (second - first)

    return act


def downsample(
    network: N,
    factor: int | Sequence[int],
    *,
    axes: int | Sequence[int] | None = None,
    mode: Literal["mean", "stride"] = "mean",
) -> N:
    """The network on a coarser grid: means over boxes, or every factor-th entry, taken of the cores; no rank changes.

    Means undo `upsample(mode="constant")`, strides undo `upsample(align="corners")`. Differentiable.
    Cost: one reading of the cores.

    Args:
        network: of any format.
        factor: entries a box along every axis; n becomes `ceil(n / factor)`, the last box has what is left.
        axes: those axes alone, in the order of `factor`; all by default.
        mode: "mean" or "stride".

    Returns:
        A network of the same format and ranks.

    Raises:
        ValueError: factors below 1 or of another number, an unknown mode.

    Example:
        >>> import torch
        >>> from decompositions import TT, to_dense
        >>> to_dense(downsample(TT([torch.arange(5.0)]), 2)).tolist()
        [0.5, 2.5, 4.0]
    """
    if mode not in ("mean", "stride"):
        raise ValueError(f"downsample: mode must be 'mean' or 'stride', got {mode!r}")
    found = check_axes("downsample", axes, network.order)
    factors = per_axis("downsample", "factor", factor, len(found))
    actions = {
        axis: (lambda core, at, f=f: core[(slice(None),) * at + (slice(None, None, f),)])
        if mode == "stride"
        else (lambda core, at, f=f: _box_means(core, at, f))
        for axis, f in zip(found, factors, strict=True)
    }
    return transform(network, actions)  # type: ignore[return-value]


def _box_means(core: Tensor, at: int, factor: int) -> Tensor:
    n = core.shape[at]
    whole = n - n % factor
    parts = [core.narrow(at, 0, whole).unflatten(at, (-1, factor)).mean(at + 1)] if whole else []
    if whole < n:
        parts.append(core.narrow(at, whole, n - whole).mean(at, keepdim=True))
    return torch.cat(parts, at)


def per_axis(name: str, what: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One int >= 1 an axis, from one number or from one for each."""
    given = tuple(value) if isinstance(value, Sequence) else (value,) * count
    found = [as_integer(x) for x in given]
    if len(found) != count or any(x is None or x < 1 for x in found):
        raise ValueError(f"{name}: {what} must be one int >= 1, or one for each of the {count} axes, got {value!r}")
    return tuple(int(x) for x in given)
