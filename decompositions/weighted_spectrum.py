"""The singular values of a weight between activations and output gradients: every rank from one factorization."""

from math import frexp, isfinite, sqrt

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.low_rank import LowRank
from decompositions.linalg import accumulate_dtype, check_finite, check_kind, positive_qr, safe_svd
from decompositions.weighted import completed

RIDGE = 0.1
"""Ridge of the output side, relative to its mean square."""


class WeightedSpectrum:
    """`L W R^H` of a weight W, with R the factor of its inputs and L that of the gradients at its outputs.

    To first order a change of W by D changes what the gradients belong to by an expected square of
    `‖L D R^H‖^2 / tokens`, where inputs and gradients are independent (as K-FAC takes them to be). The network of rank
    r with the least `‖L (W - W') R^H‖` is `W' = L^-1 U_r U_r^H L W`, U_r the leading left singular vectors of
    `L W R^H`: the inputs' side is never inverted, however singular; the outputs' side is, made well conditioned by a
    ridge, `L^H L + mu I` with `mu = ridge ‖L‖^2 / m`. Its error is exactly the tail of `values`.
    Without L this is `weighted_low_rank`, without both the truncated SVD; rank that the data do not need goes to the
    rest of W. A vector stands for a diagonal, such as the counts that the inputs of an embedding are. Units do not
    matter: all three are scaled by powers of two before they are multiplied.
    Cost: QR of the long side and an SVD of the short one, once for all ranks.

    Args:
        weight: W, (m, n), or a kernel (m, *n) taken as a matrix.
        inputs: R, (k, n) with `R^H R = X^H X`, or (n,); None is the identity.
        outputs: L, (p, m) with `L^H L = G^H G`, or (m,); None is the identity.
        ridge: >= 0, see above; 0 needs an L of full rank.

    Raises:
        ValueError: NaN or infinity; factors of other widths; a ridge that is negative or infinite, or too small for L.

    References:
        U. Parkina, M. Rakhuba, COALA, NeurIPS 2025, arXiv 2507.07580; J. Martens, R. Grosse, Optimizing neural networks
        with Kronecker-factored approximate curvature, ICML 2015, arXiv 1503.05671.

    Example:
        >>> weight, x, g = torch.randn(5, 6), torch.randn(40, 6), torch.randn(40, 5)
        >>> held = WeightedSpectrum(weight, x, g)
        >>> net = held.network(3)
        >>> from decompositions import to_dense
        >>> net.ranks, abs(held.error(to_dense(net)) - float(held.values[3:].norm())) < 1e-3 * float(held.values[0])
        ((3, 3), True)
    """

    def __init__(
        self,
        weight: Inexact[Tensor, "m *n"],
        inputs: Inexact[Tensor, "k n"] | Inexact[Tensor, "n"] | None = None,
        outputs: Inexact[Tensor, "p m"] | Inexact[Tensor, "m"] | None = None,
        *,
        ridge: int | float = RIDGE,
    ) -> None:
        check_kind("WeightedSpectrum", weight, min_order=2)
        check_finite("WeightedSpectrum", weight)
        if not (ridge >= 0 and isfinite(ridge)):
            raise ValueError(f"WeightedSpectrum: ridge must be a number >= 0, got {ridge!r}")
        flat = weight.detach().flatten(1)
        m, n = flat.shape
        for what, factor, width in (("inputs", inputs, n), ("outputs", outputs, m)):
            if factor is not None:
                if factor.ndim not in (1, 2) or factor.shape[-1] != width:
                    raise ValueError(
                        f"WeightedSpectrum: the factor of the {what} must be (k, {width}), got {tuple(factor.shape)}"
                    )
                if factor.numel():
                    check_finite("WeightedSpectrum", factor)
        work = accumulate_dtype(weight.dtype)
        for factor in (inputs, outputs):
            work = work if factor is None else torch.promote_types(work, accumulate_dtype(factor.dtype))
        self.dtype: torch.dtype = weight.dtype
        """Of the networks."""
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None
        right = left = 1.0
        self._unit, self._weight = _scaled(flat.to(work))
        if inputs is not None:
            right, self._inputs = _scaled(inputs.detach().to(flat.device, work))
        if outputs is not None:
            left, scaled = _scaled(outputs.detach().to(flat.device, work))
            self._outputs = _regular(scaled, float(ridge))
        self._units: float = self._unit * right * left
        self._left = _weighed(self._outputs, self._weight)
        whole = _times(self._left, self._inputs)
        if whole.shape[1] > whole.shape[0]:
            whole = torch.linalg.qr(whole.mH, mode="r").R.mH
        self._basis, values, _ = safe_svd(whole)
        noise = sqrt(max(m, n)) * torch.finfo(work).eps
        values = values[: min(m, n)]
        self._alive: int = int((values > values[0] * noise).sum())
        self.values: Tensor = torch.zeros(min(m, n), dtype=torch.float64, device=flat.device)
        """Singular values of `L W R^H`, (min(m, n),), in descending order and double precision."""
        self.values[: len(values)] = values.double() * self._units

    def network(self, rank: int) -> LowRank:
        """The best network of a rank, U and V orthonormal.

        Raises:
            ValueError: a rank that is not between 1 and the smaller side; an L that is singular, without a ridge.
        """
        most = len(self.values)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
            raise ValueError(f"WeightedSpectrum.network: rank must be an int in 1..{most}, got {rank!r}")
        basis = self._basis[:, : min(rank, self._alive)]
        if rank > self._alive:
            basis = completed(basis, self._left, rank)
        inner = basis.mH @ self._left
        if self._outputs is not None:
            whole = self._outputs.ndim == 2
            basis = (
                torch.linalg.solve_triangular(self._outputs, basis, upper=True)
                if whole
                else basis / self._outputs.unsqueeze(1)
            )
            if not bool(torch.isfinite(basis).all()):
                raise ValueError("WeightedSpectrum.network: the factor of the outputs is singular; give a ridge > 0")
        u, left = positive_qr(basis)
        v, right = positive_qr(inner.mH)
        middle = (left @ right.mH).contiguous() * self._unit
        return LowRank(u.to(self.dtype), middle.to(self.dtype), v.conj().to(self.dtype))

    def error(self, matrix: Inexact[Tensor, "m *n"]) -> float:
        """`‖L (W - W') R^H‖` of any W', with the ridge in L."""
        rest = self._weight - matrix.detach().flatten(1).to(self._weight) / self._unit
        whole = _times(_weighed(self._outputs, rest), self._inputs)
        return float(torch.linalg.vector_norm(whole, dtype=_double(whole))) * self._units


def _double(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float64)


def _scaled(matrix: Tensor) -> tuple[float, Tensor]:
    """A power of two near the largest entry, within what single precision can invert, and the matrix divided by it."""
    if matrix.shape[0] == 0:  # no activation at all
        return 1.0, matrix.new_zeros(1, matrix.shape[1])
    power = frexp(float(matrix.abs().max()))[1] - 1
    unit = 2.0 ** max(-120, min(120, power))
    return unit, matrix / unit


def _weighed(factor: Tensor | None, matrix: Tensor) -> Tensor:
    """`L matrix`."""
    if factor is None:
        return matrix
    return factor.unsqueeze(1) * matrix if factor.ndim == 1 else factor @ matrix


def _times(matrix: Tensor, factor: Tensor | None) -> Tensor:
    """`matrix R^H`."""
    if factor is None:
        return matrix
    return matrix * factor.conj() if factor.ndim == 1 else matrix @ factor.mH


def _regular(factor: Tensor, ridge: float) -> Tensor:
    """Square triangle of `[L; sqrt(mu) I]`; the identity for a factor of zeros, which says nothing."""
    m = factor.shape[-1]
    size = float(torch.linalg.vector_norm(factor, dtype=_double(factor)))
    if factor.ndim == 1:
        return torch.hypot(factor.abs(), factor.new_tensor(sqrt(ridge / m) * size)) if size else torch.ones_like(factor)
    eye = torch.eye(m, dtype=factor.dtype, device=factor.device)
    if size == 0:
        return eye
    return torch.linalg.qr(torch.cat([factor, eye * (sqrt(ridge / m) * size)]), mode="r").R
