"""Entries, parts, integrals and functions of networks over a grid, without the grid.

Whatever acts on one mode of the tensor acts on the core that carries it, so that these work for every format.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from cross_approx.calculus.entries import Corner, check_index, values_at
from cross_approx.calculus.interpolation import check_axes, downsample, per_axis
from cross_approx.calculus.legs import contract_away, pick
from cross_approx.result import CrossResult
from cross_approx.tt import tt_cross
from decompositions.formats.algebra import to_dense
from decompositions.formats.modes import as_integer
from decompositions.formats.network import Network
from decompositions.formats.plan import plan_dense

Key = Any
"""Of one axis: an int, a slice, a 1-D integer tensor or sequence; Ellipsis stands for all axes left out."""


def gather(network: Network, index: Int[Tensor, "B d"]) -> Inexact[Tensor, "B"]:
    """Entries of a network at B multi-indices, `W[index[b, 0], ..., index[b, d - 1]]`, rows first, then columns.

    Differentiable in the cores. Cost: a train O(B d r^2), any tree O(B) times its cores without their outside legs
    (one matrix product for all rows that share an index, where many do); hyper-edges and loops in opt_einsum's order.
    Memory: chunks of B of 16 MiB (gradients keep what they need).

    Args:
        network: of any format.
        index: (B, d) integers, 0 <= index[:, k] < shape[k].

    Returns:
        (B,) values in the dtype of the network.

    Raises:
        TypeError: an index that is no integer tensor.
        ValueError: an index of another shape or out of range.

    Example:
        >>> import torch
        >>> from decompositions import TT, to_dense
        >>> net = TT.random(row_modes=(4, 5, 6), rank=2)
        >>> index = torch.tensor([[0, 1, 2], [3, 4, 5]])
        >>> bool(torch.allclose(gather(net, index), to_dense(net)[tuple(index.T)], atol=1e-6))
        True
    """
    index = check_index("gather", index, network.shape).to(network.device)
    return values_at(network, [[Corner(column, None)] for column in index.unbind(1)], len(index))


def subtensor(network: Network, key: Key) -> Network | Tensor:
    """A part of a network as a network: `W[key]` with the axes chosen one by one.

    Cores are cut along their outside legs; a core that an int leaves without one is absorbed by a neighbour, so that
    ranks do not grow. Views where torch slices are; O(d n r^2) otherwise. Differentiable in the cores.

    Args:
        network: of any format.
        key: an entry an axis, in a tuple if more than one: an int (the axis is gone; negative ones count from the end),
            a slice (any step), a 1-D integer tensor or a sequence of ints (in that order, each axis by itself as in
            `numpy.ix_`), or Ellipsis for the axes left out. Axes left out at the end are whole.

    Returns:
        A network of the remaining modes: of the same format for TT, Tucker, CP, TensorRing, Tree, and for every format
        where no axis is gone; a TT for a TTMatrix with one mode a core left; else a `Network`. A tensor () if all are
        gone.

    Raises:
        TypeError: an entry that is none of these.
        ValueError: too many entries, an index out of range, an axis of which nothing is left.

    Example:
        >>> from decompositions import TT
        >>> net = TT.random(row_modes=(4, 5, 6), rank=2)
        >>> subtensor(net, (1, slice(None), slice(0, 6, 2)))
        TT(5x3, ranks=(2,), float32)
    """
    return _subtensor("subtensor", network, key)


def _subtensor(name: str, network: Network, key: Key) -> Network | Tensor:
    picks = {}
    for axis, (entry, n) in enumerate(zip(_entries(name, key, network.order), network.shape, strict=True)):
        found = _picked(name, entry, n, axis)
        if found is not None:
            picks[axis] = found
    return pick(network, picks)


def _entries(name: str, key: Key, order: int) -> list[Key]:
    """One entry an axis."""
    entries = list(key) if isinstance(key, tuple) else [key]
    dots = [k for k, entry in enumerate(entries) if entry is Ellipsis]
    if len(dots) > 1:
        raise ValueError(f"{name}: a key may hold one Ellipsis, got {len(dots)}")
    missing = order - len(entries) + len(dots)
    if missing < 0:
        raise ValueError(f"{name}: expected at most one entry an axis (d = {order}), got {len(entries) - len(dots)}")
    at = dots[0] if dots else len(entries)
    return entries[:at] + [slice(None)] * missing + entries[at + len(dots) :]


def _picked(name: str, entry: Key, n: int, axis: int) -> int | Tensor | None:
    """An int, the indices that are kept, or None for all of them."""
    number = as_integer(entry) if not isinstance(entry, Tensor) or entry.ndim == 0 else None
    if number is not None:
        if not -n <= number < n:
            raise ValueError(f"{name}: the index of axis {axis} must be in {-n}..{n - 1}, got {number}")
        return number % n
    if isinstance(entry, slice):
        kept = range(*entry.indices(n))
        if kept == range(n):
            return None
        chosen = torch.arange(kept.start, kept.stop, kept.step) if kept and kept.step > 0 else torch.tensor(list(kept))
    elif isinstance(entry, Tensor | np.ndarray | list | range):
        chosen = torch.as_tensor(list(entry) if isinstance(entry, range) else entry)
        if chosen.ndim != 1 or chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
            raise TypeError(
                f"{name}: indices of an axis must be a 1-D integer tensor, got {chosen.dtype} of shape "
                f"{tuple(chosen.shape)} for axis {axis}"
            )
        bad = (chosen < -n) | (chosen >= n)
        if bool(bad.any()):
            raise ValueError(f"{name}: indices of axis {axis} must be in {-n}..{n - 1}, got {int(chosen[bad][0])}")
        chosen = chosen.long() % n
    else:
        raise TypeError(f"{name}: an axis takes an int, a slice or a 1-D integer tensor, got {entry!r} for axis {axis}")
    if len(chosen) == 0:
        raise ValueError(f"{name}: sizes of a network are at least 1, got nothing of axis {axis} ({entry!r}, n = {n})")
    return chosen


def decode(
    network: Network,
    key: Key = Ellipsis,
    *,
    average: int | Sequence[int] = 1,
    max_bytes: int = 1 << 28,
    blocks: Sequence[int] | None = None,
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """The dense tensor of a part of a network, block by block: pairs of a place and its values.

    `result[place] = values` over all pairs is `W[key]`, or its means over boxes. Strides and means are taken of the
    cores, so that nothing finer than the result is ever made. Memory: `max_bytes` for a block together with the
    intermediates of its contraction; a block that the caller still holds comes on top.

    Args:
        network: of any format.
        key: as in `subtensor`; strided slices give a strided decode. Axes chosen by an int are gone.
        average: means over boxes of so many entries, a number or one for each remaining axis, as in `downsample`.
        max_bytes: for the contraction of one block, at least one entry's.
        blocks: sizes of the blocks, such as the chunks of the store that takes them; they are cut where they do not
            fit `max_bytes`. The whole by default.

    Yields:
        (place, values): one slice an axis of the result, in C order of the blocks, and the block.

    Raises:
        TypeError: as `subtensor`.
        ValueError: as `subtensor`; blocks or averages of another length or below 1; one entry above `max_bytes`.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> net = TT([torch.ones(4, 1), torch.ones(1, 5, 1), torch.ones(1, 6)])
        >>> [(place[0], tuple(values.shape)) for place, values in decode(net, (..., slice(0, 6, 3)), blocks=(2, 5, 2))]
        [(slice(0, 2, None), (2, 5, 2)), (slice(2, 4, None), (2, 5, 2))]
    """
    if as_integer(max_bytes) is None or max_bytes < 1:
        raise ValueError(f"decode: max_bytes must be a positive int, got {max_bytes!r}")
    part = _subtensor("decode", network, key)
    if isinstance(part, Tensor):
        return iter([((), part)])
    factors = per_axis("decode", "average", average, part.order)
    if max(factors) > 1:
        part = downsample(part, factors)
    sizes = part.shape if blocks is None else per_axis("decode", "blocks", tuple(blocks), part.order)
    block = [min(size, n) for size, n in zip(sizes, part.shape, strict=True)]
    while (needed := _block_bytes(part, block)) > max_bytes:
        k = max(range(part.order), key=block.__getitem__)  # the first of the largest: blocks stay long at the end
        if block[k] == 1:
            raise ValueError(f"decode: one entry takes {needed} bytes, expected max_bytes of that, got {max_bytes}")
        block[k] = -(-block[k] // 2)
    return _decoded(part, block)


def _decoded(net: Network, block: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    for starts in product(*(range(0, n, size) for n, size in zip(net.shape, block, strict=True))):
        place = tuple(slice(a, min(a + size, n)) for a, size, n in zip(starts, block, net.shape, strict=True))
        part = pick(net, {axis: torch.arange(s.start, s.stop) for axis, s in enumerate(place)})
        assert isinstance(part, Network)
        yield place, to_dense(part)


def _block_bytes(net: Network, block: Sequence[int]) -> int:
    """Bytes of all results of the contraction of one block."""
    sizes = {**net.sizes, **dict(zip(net.outside, block, strict=True))}
    small = Network._unchecked(
        [torch.empty([sizes[x] for x in leg], dtype=net.dtype, device="meta") for leg in net.legs],
        net.legs, net.rows, net.cols,
    )  # fmt: skip
    operands: list[tuple[int, ...]] = [tuple(core.shape) for core in small.cores]
    total = prod(block)
    for left, right, equation in plan_dense(small).steps:
        inputs, out = equation.split("->")
        letters: dict[str, int] = {}
        for names, k in zip(inputs.split(","), (left, right), strict=False):
            letters |= zip(names, operands[k], strict=True)
        operands.append(tuple(letters[x] for x in out))
        total += prod(operands[-1])
    return total * net.dtype.itemsize


def integrate(
    network: Network,
    axes: int | Sequence[int] | None = None,
    weights: Literal["sum", "mean"] | Sequence[Inexact[Tensor, "_n"]] = "sum",
) -> Network | Tensor:
    """Sums, means and weighted sums over some axes: `sum over i of prod_k w_k(i_k) W(i)`.

    With the weights of a quadrature rule it is the integral of a function known on the nodes. Cores are contracted
    with the weights and absorbed by their neighbours: O(d n r^2) and no rank grows. Differentiable in both.

    Args:
        network: of any format.
        axes: an axis or several, negative ones counted from the end; all by default.
        weights: "sum", "mean", or a vector (n_k,) for each of the axes in their order.

    Returns:
        The network of the axes left, of a format as `subtensor` says; a tensor () if there are none.

    Raises:
        TypeError: complex weights for a real network.
        ValueError: an axis out of range or twice, weights of another length.

    Example:
        >>> import torch
        >>> from decompositions import CP
        >>> x = torch.linspace(0, 1, 101)[:, None]
        >>> w = quadrature(x[:, 0], "simpson")
        >>> round(integrate(CP([x, x**2, torch.ones_like(x)]), weights=[w, w, w]).item(), 6)
        0.166667
    """
    found = check_axes("integrate", axes, network.order)
    if isinstance(weights, str):
        if weights not in ("sum", "mean"):
            raise ValueError(f"integrate: weights must be 'sum', 'mean' or vectors, got {weights!r}")
        if weights == "mean":
            return contract_away(network, dict.fromkeys(found, lambda core, at: core.mean(at)))
        return contract_away(network, dict.fromkeys(found, lambda core, at: core.sum(at)))
    if len(weights) != len(found):
        raise ValueError(f"integrate: expected one vector of weights an axis, {len(found)}, got {len(weights)}")
    actions = {}
    for axis, w in zip(found, weights, strict=True):
        if w.shape != (network.shape[axis],):
            raise ValueError(
                f"integrate: weights of axis {axis} must have shape ({network.shape[axis]},), got {tuple(w.shape)}"
            )
        if w.is_complex() and not network.dtype.is_complex:
            raise TypeError(f"integrate: a network of {network.dtype} needs real weights, got {w.dtype}; convert it")
        vector = w.to(network.device, network.dtype)
        actions[axis] = lambda core, at, vector=vector: torch.tensordot(core, vector, dims=([at], [0]))
    return contract_away(network, actions)


def quadrature(
    nodes: Float[Tensor, "n"],
    rule: Literal["trapezoid", "simpson", "polynomial"] = "trapezoid",
    interval: tuple[float, float] | None = None,
) -> Float[Tensor, "n"]:
    """Weights of a quadrature rule on given nodes.

    *trapezoid* integrates piecewise linear functions exactly, *simpson* quadratic ones on any nodes (cubic ones on an
    odd number of equidistant nodes; with an even number the last interval takes the parabola of the last three), and
    *polynomial* all of degree n - 1: it gives the Gauss weights on Gauss nodes, and is for nodes of that kind (Lobatto,
    Clenshaw-Curtis), since on many equidistant ones its weights alternate and grow.

    Args:
        nodes: strictly increasing, at least 2 (3 for simpson, 1 for polynomial).
        rule: which one.
        interval: for polynomial, the interval (a, b); from the first node to the last by default. Gauss nodes do not
            reach its ends: name it.

    Returns:
        (n,) weights in the dtype of the nodes.

    Raises:
        ValueError: nodes that do not increase or are too few, an unknown rule.

    References:
        K. Cartwright, Simpson's rule cumulative integration with MS Excel and irregularly-spaced data, 2017.

    Example:
        >>> import torch
        >>> quadrature(torch.tensor([0.0, 1.0, 3.0])).tolist()
        [0.5, 1.5, 1.0]
    """
    least = {"trapezoid": 2, "simpson": 3, "polynomial": 1}
    if rule not in least:
        raise ValueError(f"quadrature: rule must be one of {tuple(least)}, got {rule!r}")
    if interval is not None and rule != "polynomial":
        raise ValueError(f"quadrature: interval is for the rule 'polynomial', got rule={rule!r}; leave it out")
    if nodes.ndim != 1 or len(nodes) < least[rule] or not bool((nodes.diff() > 0).all() & nodes.isfinite().all()):
        raise ValueError(
            f"quadrature: {rule} needs a strictly increasing vector of at least {least[rule]} nodes, "
            f"got shape {tuple(nodes.shape)}"
        )
    x = nodes.double()
    if rule == "polynomial":
        a, b = (float(x[0]), float(x[-1])) if interval is None else interval
        if not b > a:
            raise ValueError(f"quadrature: interval must be (a, b) with a < b, got {(a, b)}; name it for one node")
        scaled = ((2 * x - a - b) / (b - a)).cpu().numpy()
        moments = np.zeros(len(x))
        moments[0] = b - a  # Legendre polynomials are orthogonal to 1
        w = torch.from_numpy(np.linalg.solve(np.polynomial.legendre.legvander(scaled, len(x) - 1).T, moments))
        return w.to(nodes.device, nodes.dtype)
    h = x.diff()
    w = torch.zeros_like(x)
    if rule == "trapezoid":
        w[:-1] += h / 2
        w[1:] += h / 2
        return w.to(nodes.dtype)
    pairs = (len(x) - 1) // 2
    first, second = h[0 : 2 * pairs : 2], h[1 : 2 * pairs : 2]
    w[0 : 2 * pairs : 2] += (first + second) * (2 - second / first) / 6
    w[1 : 2 * pairs : 2] += (first + second) ** 3 / (6 * first * second)
    w[2 : 2 * pairs + 1 : 2] += (first + second) * (2 - first / second) / 6
    if len(x) % 2 == 0:
        p, q = h[-2], h[-1]
        w[-1] += (2 * q**2 + 3 * p * q) / (6 * (p + q))
        w[-2] += (q**2 + 3 * p * q) / (6 * p)
        w[-3] -= q**3 / (6 * p * (p + q))
    return w.to(nodes.dtype)


def apply_function(
    function: Callable[..., Tensor], *networks: Network, tol: int | float = 1e-6, **options: Any
) -> CrossResult:
    """A train for `f(A(i), B(i), ...)`, entry by entry, from few entries: exp, sqrt, products, quotients.

    `tt_cross` on `gather`; its guarantee, limits and reasons are those of the result. Cost: its evaluations, each
    O(d r^2) a network, instead of the ranks r_A r_B of a product followed by rounding.

    Args:
        function: takes a tensor (B,) of values a network, returns (B,).
        networks: one or more of the same shape, of any formats.
        tol: relative error to be met on held-out entries.
        options: of `tt_cross`: rank, max_evals, max_seconds, start, generator, ...

    Returns:
        CrossResult with a TT of all axes as rows; not differentiable in the networks.

    Raises:
        TypeError: no network.
        ValueError: networks of different shapes; a function value that is not finite, with its index.

    Example:
        >>> import torch
        >>> from decompositions import CP
        >>> x = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
        >>> result = apply_function(torch.exp, CP([x, x, x]), tol=1e-8)
        >>> result.converged, max(result.network.ranks) <= 12
        (True, True)
    """
    if not networks or not all(isinstance(net, Network) for net in networks):
        raise TypeError(f"apply_function: expected one or more networks after the function, got {networks!r}")
    shape = networks[0].shape
    for net in networks[1:]:
        if net.shape != shape:
            raise ValueError(f"apply_function: networks must have the same modes, expected {shape}, got {net.shape}")

    def source(index: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*(gather(net, index) for net in networks))

    return tt_cross(source, shape=shape, tol=tol, **options)
