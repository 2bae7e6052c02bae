"""From a network to a file that meets a target: what is cut off and what coding may change share the budget."""

import warnings
from collections.abc import Sequence
from math import sqrt

import torch

from cross_approx import Quantization
from decompositions.formats.algebra import norm
from decompositions.formats.gauge import round as round_network
from decompositions.formats.network import Network
from decompositions.linalg import TruncationWarning
from tnlayers.grids.coding import Coded, code
from tnlayers.grids.store import grid_bytes

SHARE = 0.75
"""Part of the squared error that cutting ranks may take where cores are coded. On the MNI volume (Tucker and TT, errors
.15 to .04) the smallest files lie between .5 and .85, 2 to 25 % smaller than at .3."""


def fit_error(net: Network, error: float, tol: float, coding: str) -> Network | Coded:
    """Cut and code a network that is within `error` of a grid so that it stays within `tol` of it.

    The two errors are added as squares, which is exact where `net` is an orthogonal projection of the grid and what
    changes lies in its span, and nearly so else; the file is measured afterwards in any case.

    Args:
        net: of the grid.
        error: relative error of `net` against the grid.
        tol: relative error of what is returned.
        coding: "none", "int8" or "planes".

    Raises:
        ValueError: `tol` is not above `error`, or int8 cannot meet it.

    Example:
        >>> from decompositions import TT
        >>> fit_error(TT.random(row_modes=(8, 8, 8), rank=3), 0.0, 0.1, "planes").error > 0
        True
    """
    if not tol > error:
        raise ValueError(f"fit: the network's own error {error:.3g} must be below the target {tol:.3g}")
    share = 1.0 if coding == "none" else SHARE
    spare = sqrt(max(0.0, share * tol**2 - error**2))
    cut = net
    if spare > 1e-3 * tol:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            cut = round_network(net.to(torch.float64), tol=spare)
    if coding == "none":
        return cut.to(torch.float32) if tol > 1e-5 else cut
    scale = float(norm(net.to(torch.float64)))
    if scale == 0:
        return code(cut, coding)
    lost = _distance(net, cut) / scale
    if coding == "int8":
        return _int8(net, scale, error, tol)
    return code(cut, coding, scale * sqrt(max(tol**2 - error**2 - lost**2, (0.1 * tol) ** 2)))


def _int8(net: Network, scale: float, error: float, tol: float) -> Coded:
    """The cut that leaves room for what int8 changes: its error hardly depends on the ranks."""
    whole = code(net, "int8")
    room = tol**2 - error**2 - (1.05 * whole.error / scale) ** 2
    if room <= 0:
        raise ValueError(
            f"grid compress: --coding int8 alone changes the grid by {whole.error / scale:.2g}, which "
            f"leaves nothing of the target {tol:.2g}; take --coding planes"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return code(round_network(net.to(torch.float64), tol=sqrt(room)), "int8")


def _distance(a: Network, b: Network) -> float:
    """`‖A - B‖` where B is A rounded: an orthogonal projection."""
    first, second = (float(norm(net.to(torch.float64))) for net in (a, b))
    return sqrt(max(0.0, first**2 - second**2))


def fit_bytes(
    net: Network, error: float, most: int, coding: str, *, shape: Sequence[int], quantization: Quantization | None
) -> tuple[Network | Coded, float]:
    """The most exact file of at most so many bytes: a bisection over the error it aims at.

    Returns:
        What is stored, and the error aimed at.

    Raises:
        ValueError: even an error of 99 % takes more.
    """

    def tried(tol: float) -> tuple[Network | Coded | None, int]:
        try:
            made = fit_error(net, error, tol, coding)
        except ValueError:  # int8 cannot be that exact
            return None, 1 << 62
        return made, len(grid_bytes(made, shape=shape, quantization=quantization)[0])

    high = 0.99
    best, size = tried(max(high, error * 1.0001))
    if best is None or size > most:
        least = "" if best is None else f"; the smallest is {size} bytes"
        raise ValueError(f"grid compress: --bytes {most} is too small for any network of this grid{least}")
    low = max(error * 1.0001, 1e-7)
    made, size = tried(low)
    if made is not None and size <= most:
        return made, low
    found = high
    while high / low > 1.01:
        middle = sqrt(low * high)
        made, size = tried(middle)
        if made is not None and size <= most:
            best, high, found = made, middle, middle
        else:
            low = middle
    assert best is not None
    return best, found
