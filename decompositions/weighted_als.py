"""Any network in the norm of activations: alternating least squares on `(W - W') X`."""

import warnings
from collections.abc import Sequence
from math import prod
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.activation_factor import ActivationFactor
from decompositions.als import check_sweeps
from decompositions.formats.algebra import to_dense
from decompositions.formats.gauge import orthogonalize
from decompositions.formats.network import Labels, Network
from decompositions.formats.plan import plan_path, run
from decompositions.linalg import accumulate_dtype, check_finite, check_kind, fold_matrix, full_precision
from decompositions.weighted import CalibrationWarning, check_mu, damped, upper, weighting

N = TypeVar("N", bound=Network)

_SHIFT = 1e-12
"""Proximal term, in parts of the largest diagonal entry: below it the right-hand sides are rounding."""


class Metric(NamedTuple):
    """A target W in the shape of a network, and the norm `‖E F^H‖` of differences E from it.

    Args:
        target: W, rows and columns.
        factor: F, the activations and what damps them.
        gram: `F^H F`.
        product: `W F^H F`, in the shape of the target.
        size: `‖W F^H‖`.
        cols: modes of the columns.
        data: the activations alone.
        layouts: copies of the Gram matrix that cores have asked for.
    """

    target: Tensor
    factor: Tensor
    gram: Tensor
    product: Tensor
    size: float
    cols: tuple[int, ...]
    data: Tensor
    layouts: dict[tuple[int, ...], Tensor]

    def coupling(self, first: tuple[int, ...]) -> Tensor:
        """The Gram matrix by modes, both indices of the modes `first` before those of the others.

        It is the largest operand of a sweep: as a core needs it, it is copied once.
        """
        if first not in self.layouts:
            count = len(self.cols)
            rest = [k for k in range(count) if k not in first]
            order = [*first, *(count + k for k in first), *rest, *(count + k for k in rest)]
            self.layouts[first] = self.gram.reshape(*self.cols, *self.cols).permute(order).contiguous()
        return self.layouts[first]

    def error(self, net: Network) -> float:
        """`‖(W - W') F^H‖`, absolute."""
        return float(
            torch.linalg.vector_norm((self.target - to_dense(net)).reshape(-1, len(self.gram)) @ self.factor.mH)
        )

    def on_data(self, net: Network) -> float:
        """`‖(W - W') X‖ / ‖W X‖`."""
        whole = self.target.reshape(-1, len(self.gram))
        difference = whole - to_dense(net).to(whole.dtype).reshape(whole.shape)
        size = float(torch.linalg.vector_norm(whole @ self.data.mH))
        return float(torch.linalg.vector_norm(difference @ self.data.mH)) / (size or 1.0)

    def relative(self, error: float) -> float:
        """In parts of `‖W F^H‖`."""
        return error / self.size if self.size > 0 else error


@full_precision
def weighted_als(
    start: N,
    weight: Inexact[Tensor, "m *n"],
    factor: ActivationFactor | Inexact[Tensor, "k n"],
    *,
    mu: int | float = 0.0,
    max_sweeps: int = 20,
    improvement: int | float = 1e-4,
    with_error: bool = False,
) -> N | tuple[N, float]:
    """Refine a network, of any format, toward the least `‖(W - W') X‖^2 + mu ‖W - W'‖^2`, core after core.

    A core enters W' linearly: each is corrected by least squares for the others, in the norm of the activations. The
    error never grows (a sweep that rounding would make harmful is undone), and what no activation determines stays
    nearly as the start has it. The corrections solve normal equations of the residual in double precision, with a
    proximal term of 1e-12, and mu is at least `(eps ‖X‖_2)^2` of the coarser dtype: directions of activations below
    1e-6 of the largest count in the error, but are refined slowly or, below 1e-8, not at all.
    Cost: m n^2 multiplications a sweep, products of the cores with the n x n Gram matrix, and for each core a system
    of as many unknowns as it has beside its row modes.

    Args:
        start: a network with columns; its products of modes may exceed m and n (zero rows and columns are added).
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        factor: of the activations (of a kernel: of its patches, channel outermost as in `torch.nn.functional.unfold`);
            or any (k, n) matrix F with `F^H F = X^H X`.
        mu: weight of the plain error, >= 0.
        max_sweeps: upper bound on the number of sweeps.
        improvement: stop when a sweep lowers the error by less than this share of it.
        with_error: return `(network, ‖(W - W') X‖ / ‖W X‖)`.

    Returns:
        A network like `start`, in the dtype of the weight; a tree has its center in core 0.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, a mu that is negative, counts that make no sense.
        TypeError: a start that is no network.

    References:
        The unweighted sweeps are those of `als`; the norm is that of COALA, arXiv 2507.07580. Their union for any
        network is our own.

    Example:
        >>> import torch
        >>> from decompositions import TTMatrix, ttm_svd
        >>> x = torch.randn(99, 6, dtype=torch.float64) * torch.tensor([9.0, 3, 1, 1, 0.1, 0.1])
        >>> w = torch.randn(6, 6, dtype=torch.float64)
        >>> start = ttm_svd(w, (2, 3), (2, 3), rank=2)
        >>> net, error = weighted_als(start, w, x, with_error=True)
        >>> error < float(((w - to_dense(start).reshape(6, 6)) @ x.T).norm() / (w @ x.T).norm())
        True
    """
    name = "weighted_als"
    check_kind(name, weight, min_order=2)
    if not isinstance(start, Network):
        raise TypeError(f"{name}: start must be a Network, got {type(start).__name__}; a recipe makes one")
    if not start.cols:
        raise ValueError(f"{name}: the network must have columns, got {start!r}; see as_operator")
    if mu == "adaptive":
        raise ValueError(f"{name}: mu must be a number >= 0, got 'adaptive'; the recipes know it")
    check_sweeps(name, max_sweeps, improvement)
    check_mu(name, mu)
    metric = metric_of(name, weight, factor, float(mu), start.row_modes, start.col_modes)
    made, _ = refine(metric, start.detach().to(metric.target.device, metric.target.dtype), max_sweeps, improvement)
    made = made.to(weight.dtype)
    return (made, metric.on_data(made)) if with_error else made


def metric_of(
    name: str,
    weight: Tensor,
    factor: ActivationFactor | Tensor,
    mu: float,
    rows: Sequence[int],
    cols: Sequence[int],
) -> Metric:
    """Target and norm in double precision, in the modes of a network."""
    check_finite(name, weight)
    flat = weight.detach().flatten(1)
    n = flat.shape[1]
    held = weighting(name, factor, n)
    work = torch.promote_types(torch.promote_types(weight.dtype, held.dtype), torch.float64)
    target = fold_matrix(name, flat.to(work), rows, cols)
    r = upper(held.to(flat.device, accumulate_dtype(held.dtype))).to(work)
    if not bool(r.any()):
        warnings.warn(
            f"{name}: no activations, or all of them zero: the plain error was taken; calibrate on other data, or skip "
            "this layer",
            CalibrationWarning,
            stacklevel=3,
        )
        r = torch.eye(n, dtype=work, device=flat.device)
    eps = max(torch.finfo(weight.dtype).eps, torch.finfo(held.dtype).eps)
    # large entries that cancel on the data would not survive the dtypes: they cost what rounding makes of them
    floor = (eps * float(torch.linalg.matrix_norm(r, 2))) ** 2
    data, r = (
        torch.nn.functional.pad(one, (0, prod(cols) - n))  # what pads the input is zero
        for one in (r, damped(r, max(mu, floor)))
    )
    on_data = target.reshape(-1, r.shape[1]) @ r.mH
    size = float(torch.linalg.vector_norm(on_data))
    return Metric(target, r, r.mH @ r, (on_data @ r).reshape(target.shape), size, tuple(cols), data, {})


def refine(metric: Metric, net: N, max_sweeps: int, improvement: int | float) -> tuple[N, float]:
    """Cores in turn, until a sweep gains little; the network and its absolute error."""
    best, error = net, metric.error(net)
    for _ in range(max_sweeps):
        for k in range(len(net.cores)):
            if net.is_tree:  # isometries around the core: its system is as well conditioned as the activations are
                net = orthogonalize(net, k)
            net = _corrected(metric, net, k)
        before, after = error, metric.error(net)
        if after < error:
            best, error = net, after
        if not before - after > improvement * before:
            break
    return (orthogonalize(best, 0) if best.is_tree else best), error


def _corrected(metric: Metric, net: N, k: int) -> N:
    """The network with core k moved to the least weighted error, as far as the activations determine it.

    Labels of the core: bonds and columns are the unknowns of one system (activations couple columns); rows that other
    cores carry too number independent systems; rows of its own number right-hand sides.
    """
    others = [j for j in range(len(net.cores)) if j != k]
    elsewhere, leg = {label for j in others for label in net.legs[j]}, net.legs[k]
    systems = [label for label in leg if label in net.rows and label in elsewhere]
    own = [label for label in leg if label in net.rows and label not in elsewhere]
    unknown = [label for label in leg if label not in net.rows]
    sizes = net.sizes
    mark = "*" * (1 + max(len(label) - len(label.lstrip("*")) for label in sizes))  # no label begins with as many
    twin = {label: label if label in net.rows else mark + label for label in sizes}
    sizes = {**sizes, **{twin[label]: size for label, size in sizes.items()}}
    same = {label: label for label in sizes}
    plain = [net.legs[j] for j in others]
    double: list[Labels] = [tuple(twin[label] for label in labels) for labels in plain]
    made = [net.cores[j] for j in others]
    conjugates = [core.conj() for core in made]

    def contract(inputs: Sequence[Labels], operands: Sequence[Tensor], output: Sequence[str]) -> Tensor:
        return run(plan_path(inputs, sizes, tuple(output), metric.target.dtype.itemsize).steps, operands)

    order = [*systems, *unknown, *own]
    right = contract([net.outside, *plain], [metric.product, *conjugates], order)
    first = tuple(k for k, label in enumerate(net.cols) if label in leg)
    rest = tuple(k for k, label in enumerate(net.cols) if label not in leg)
    between = tuple(names[net.cols[k]] for part in (first, rest) for names in (twin, same) for k in part)
    output = [*systems, *unknown, *(twin[label] for label in unknown)]
    inputs, operands = [*plain, *double], [*conjugates, *made]
    bonds = [label for label in unknown if label not in net.cols]
    middle = (*systems, *bonds, *(twin[label] for label in bonds), *between[2 * len(first) :])
    apart = bool(others) and not elsewhere & {net.cols[k] for k in first}
    if apart and prod(sizes[label] for label in middle) <= max(metric.gram.numel(), 1 << 16):
        # the other cores first, then one matrix product with the Gram matrix as it lies
        inputs, operands = [middle], [contract(inputs, operands, middle)]
    system = contract([*inputs, between], [*operands, metric.coupling(first)], output)
    batch, count = [sizes[label] for label in systems], prod(sizes[label] for label in unknown)
    system = system.reshape(*batch, count, count)
    back = [order.index(label) for label in leg]
    held = net.cores[k].permute([leg.index(label) for label in order]).reshape(*batch, count, -1)
    # the residual: W' of the other cores and this one is the system applied to it
    change = _proximal(system, right.reshape(*batch, count, -1) - system @ held)
    change = change.reshape([sizes[label] for label in order]).permute(back)
    cores = list(net.cores)
    cores[k] = cores[k] + change
    return net.replace(cores)


def _proximal(system: Tensor, right: Tensor) -> Tensor:
    """Solve semidefinite systems with a small shift of the diagonal: undetermined directions do not move."""
    diagonal = system.diagonal(dim1=-2, dim2=-1).real
    largest = float(diagonal.max())
    if not largest > 0:
        return torch.zeros_like(right)
    shift = max(_SHIFT, 4 * system.shape[-1] * torch.finfo(system.dtype).eps) * largest
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    while True:
        root, failed = torch.linalg.cholesky_ex(system + shift * eye)
        if not bool(failed.any()):
            return torch.cholesky_solve(right, root)
        shift *= 10
