"""The core of a linear layer that owns its rows, solved exactly for given inputs and outputs."""

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.plan import plan_path, run
from tnlayers.linear import Linear

CHUNK = 2**22
"""Numbers of the largest array that a chunk of rows makes."""

Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Makes the pairs (inputs, targets) again for every pass."""


class LeastSquares(NamedTuple):
    """What `solve_linear` did.

    Args:
        before: `‖y - layer(x)‖^2 / ‖y‖^2` with the weight as it was.
        after: with the new one; never larger.
        core: which core was solved.
        tokens: rows of x that counted.
    """

    before: float
    after: float
    core: int
    tokens: int


class _System:
    """`y = z C + b` for the core that owns most rows: C is linear, z are x contracted with all other cores.

    Labels of the core: rows that other cores carry too number independent systems, rows of its own are right-hand
    sides, all others (bonds, columns) are features; rows that only other cores carry multiply the equations.
    """

    def __init__(self, net: Network) -> None:
        rows = set(net.rows)
        self.net, self.sizes = net, dict(net.sizes)
        self.core = max(range(len(net.cores)), key=lambda k: prod(net.sizes[r] for r in net.legs[k] if r in rows))
        leg = net.legs[self.core]
        elsewhere = {label for k, other in enumerate(net.legs) if k != self.core for label in other}
        self.systems = [label for label in leg if label in rows and label in elsewhere]
        self.own = [label for label in leg if label in rows and label not in elsewhere]
        self.features = [label for label in leg if label not in rows]
        self.others = [label for label in net.rows if label not in leg]
        self.token = "*" * (1 + max(len(label) for label in net.sizes))
        self.shape = tuple(prod(self.sizes[label] for label in group) for group in (self.systems, self.others))
        self.width = prod(self.sizes[label] for label in self.features)
        self.right = prod(self.sizes[label] for label in self.own)

    def inner(self, x: Tensor) -> Tensor:
        """Z (systems, tokens, others, features) of x (tokens, columns)."""
        net = self.net
        legs = [leg for k, leg in enumerate(net.legs) if k != self.core]
        cores = [core.detach().double() for k, core in enumerate(net.cores) if k != self.core]
        output = (*self.systems, self.token, *self.others, *self.features)
        plan = plan_path([(self.token, *net.cols), *legs], {**self.sizes, self.token: len(x)}, output, 8)
        return run(plan.steps, [x.reshape(-1, *net.col_modes), *cores]).reshape(self._split(len(x), self.width))

    def outer(self, y: Tensor) -> Tensor:
        """(systems, tokens, others, own) of y (tokens, rows)."""
        y, labels = y.reshape(-1, *self.net.row_modes), (self.token, *self.net.rows)
        order = [labels.index(label) for label in (*self.systems, self.token, *self.others, *self.own)]
        return y.permute(order).reshape(self._split(len(y), self.right))

    def rows(self, y: Tensor) -> Tensor:
        """Inverse of `outer`."""
        labels = (*self.systems, self.token, *self.others, *self.own)
        sizes = {**self.sizes, self.token: y.shape[1]}
        order = [labels.index(label) for label in (self.token, *self.net.rows)]
        return y.reshape([sizes[label] for label in labels]).permute(order).reshape(y.shape[1], -1)

    def matrix(self, core: Tensor) -> Tensor:
        """(systems, features, own) of the core."""
        leg = self.net.legs[self.core]
        order = [leg.index(label) for label in (*self.systems, *self.features, *self.own)]
        return core.detach().double().permute(order).reshape(self.shape[0], self.width, self.right)

    def tensor(self, matrix: Tensor) -> Tensor:
        """Inverse of `matrix`."""
        labels, leg = (*self.systems, *self.features, *self.own), self.net.legs[self.core]
        shaped = matrix.reshape([self.sizes[label] for label in labels])
        return shaped.permute([labels.index(label) for label in leg]).contiguous()

    def _split(self, tokens: int, last: int) -> tuple[int, int, int, int]:
        return self.shape[0], tokens, self.shape[1], last


def solve_linear(
    layer: Linear,
    inputs: Float[Tensor, "*batch n"],
    targets: Float[Tensor, "*batch m"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    ridge: int | float = 1e-4,
) -> LeastSquares:
    """Set one core and the bias of a layer to the best ones for given data: `min ‖z C + b - y‖^2 + l^2 ‖C - C_now‖^2`.

    For any network: the output is linear in each core, and C is the one that owns most rows (U of `U S V^T`); z are
    the inputs contracted with the other cores. Solved by streaming QR in float64, bias and core together; `l` is
    `sqrt(ridge)` times the root mean square of a feature over all tokens, so that directions without data stay.
    The error on the data never grows: where rounding leaves no gain, the layer stays as it is.
    Cost: 2 tokens F^2 + 4 tokens F m operations, F the size of the core without its rows.

    Args:
        layer: a `tnlayers.Linear`; a bias that is frozen, or absent, stays so.
        inputs: x.
        targets: y, what the layer should give.
        mask: which of the leading axes count, True for those that do.
        ridge: >= 0; with 0 the features must have full rank.

    Raises:
        TypeError: another layer, or complex numbers.
        ValueError: shapes, a core that is frozen, NaN or infinity, no tokens; an ill-posed system with ridge=0.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(6, 4, network=tnlayers.random_network(LowRank, rank=2)).double()
        >>> x = torch.randn(50, 6, dtype=torch.float64)
        >>> done = solve_linear(layer, x, torch.ones(50, 4, dtype=torch.float64))
        >>> done.after < 1e-6 < done.before
        True
    """
    if not isinstance(layer, Linear):
        raise TypeError(f"solve_linear: layer must be a tnlayers.Linear, got {type(layer).__name__}")
    for what, x, width in (("inputs", inputs, layer.in_features), ("targets", targets, layer.out_features)):
        if x.ndim == 0 or x.shape[-1] != width:
            raise ValueError(f"solve_linear: {what} must have {width} features last, got shape {tuple(x.shape)}")
    if inputs.shape[:-1] != targets.shape[:-1] or (mask is not None and mask.shape != inputs.shape[:-1]):
        shapes = [tuple(t.shape) for t in (inputs, targets, mask) if t is not None]
        raise ValueError(f"solve_linear: inputs, targets and mask must have the same leading axes, got {shapes}")
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"solve_linear: ridge must be a finite number >= 0, got {ridge!r}")
    x, y = (t.reshape(-1, t.shape[-1]) if mask is None else t[mask] for t in (inputs.detach(), targets.detach()))
    why = why_not_solved(layer)
    if why:
        raise (TypeError if layer.cores[0].is_complex() else ValueError)(f"solve_linear: {why}")
    return solve_pairs(layer, lambda: [(x, y)], ridge)


def why_not_solved(layer: nn.Module) -> str:
    """Say why a layer has no core to solve for; empty if it has."""
    if not isinstance(layer, Linear):
        return f"expected a tnlayers.Linear, got {type(layer).__name__}"
    if layer.cores[0].is_complex():
        return "expected real cores, got complex ones"
    if layer._window is not None:
        return "the layer is in training by an optimizer that finds ranks; give tnlayers.compact(model)"
    core = _System(layer.network).core
    if not layer.cores[core].requires_grad:
        return f"core {core}, which owns most rows, is frozen; requires_grad_(True)"
    return ""


@torch.no_grad()
def solve_pairs(layer: Linear, pairs: Pairs, ridge: float) -> LeastSquares:
    """`solve_linear` on pairs of matrices (tokens, features), read three times."""
    system, core = _System(layer.network.detach()), None
    present = system.matrix(layer.cores[system.core])
    bias = layer.bias
    centered = bias is not None and bias.requires_grad

    def chunks(matrix: Tensor, shift: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """z, and what is missing to the targets; rows that are cut from the output miss nothing."""
        systems, others = system.shape
        step = max(1, CHUNK // (systems * others * max(system.width, system.right)))
        for x_all, y_all in pairs():
            if len(x_all) == 0:
                continue
            for x, y in zip(x_all.split(step), y_all.split(step), strict=True):
                x, y = x.to(matrix.device).double(), y.to(matrix.device).double()
                z = system.inner(nn.functional.pad(x, (0, prod(system.net.col_modes) - x.shape[1])))
                made = z @ matrix.unsqueeze(1)
                missing = y - system.rows(made)[:, : y.shape[1]]
                if shift is not None:
                    missing = missing - shift
                yield z, system.outer(nn.functional.pad(missing, (0, prod(system.net.row_modes) - y.shape[1])))

    shift = None if bias is None else bias.detach().double()
    whole = sum(float(y.double().square().sum()) for _, y in pairs())
    tokens, before = 0, 0.0
    means: list[Tensor] = []
    for z, e in chunks(present, shift):
        tokens, before = tokens + z.shape[1], before + float(e.square().sum())
        sums = [z.sum(1, keepdim=True), e.sum(1, keepdim=True)]
        means = [m + s for m, s in zip(means, sums, strict=True)] if means else sums
    if tokens == 0:
        raise ValueError("solve_linear: expected at least one token, got none (or all of them masked)")
    if before != before or before == float("inf"):
        raise ValueError("solve_linear: inputs and targets must be finite, got NaN or infinity")
    z_mean, e_mean = (m / tokens if centered else torch.zeros_like(m) for m in means)
    triangle = present.new_zeros(system.shape[0], 0, system.width)
    right = present.new_zeros(system.shape[0], 0, system.right)
    for z, e in chunks(present, shift):
        z, e = (z - z_mean).flatten(1, 2), (e - e_mean).flatten(1, 2)
        q, triangle = torch.linalg.qr(torch.cat([triangle, z], 1))
        right = q.mT @ torch.cat([right, e], 1)
    change = _solved(triangle, right, ridge)
    if change is None:
        if ridge == 0:
            raise ValueError(
                f"solve_linear: with ridge=0 the features must have full rank, expected {system.width}, got fewer from "
                f"{tokens} tokens; more data, or ridge=1e-4"
            )
        return LeastSquares(before / (whole or 1.0), before / (whole or 1.0), system.core, tokens)
    core = layer.cores[system.core]
    kept = core.detach().clone(), None if bias is None else bias.detach().clone()
    core.copy_(system.tensor(present + change))
    if centered and bias is not None:
        # rows that are cut from the output have a mean of zero data and no bias
        bias.add_(system.rows(e_mean - z_mean @ change.unsqueeze(1))[0, : len(bias)].to(bias.dtype))
    new_shift = None if bias is None else bias.detach().double()
    after = sum(float(e.square().sum()) for _, e in chunks(system.matrix(core), new_shift))
    if not after <= before:
        core.copy_(kept[0])
        if bias is not None and kept[1] is not None:
            bias.copy_(kept[1])
        after = before
    return LeastSquares(before / (whole or 1.0), after / (whole or 1.0), system.core, tokens)


def _solved(triangle: Tensor, right: Tensor, ridge: float) -> Tensor | None:
    """`argmin ‖R D - E‖^2 + l^2 ‖D‖^2`, None where R says nothing, or too little without a ridge."""
    width = triangle.shape[-1]
    size = float(torch.linalg.vector_norm(triangle))
    if size == 0:
        return None
    if ridge == 0:
        diagonal = triangle.diagonal(dim1=-2, dim2=-1).abs()
        if diagonal.shape[-1] < width or float(diagonal.min()) < 1e-12 * float(diagonal.max()):
            return None
        return torch.linalg.solve_triangular(triangle, right, upper=True)
    shift = (ridge / width / triangle.shape[0]) ** 0.5 * size
    eye = shift * torch.eye(width, dtype=triangle.dtype, device=triangle.device).expand(len(triangle), -1, -1)
    q, upper = torch.linalg.qr(torch.cat([triangle, eye], 1))
    return torch.linalg.solve_triangular(upper, q[:, : triangle.shape[1]].mT @ right, upper=True)
