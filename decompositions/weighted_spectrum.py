"""The singular values of a weight between activations and output gradients: every rank from one factorization."""

from math import sqrt

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.low_rank import LowRank
from decompositions.linalg import accumulate_dtype, check_finite, check_kind, positive_qr, safe_svd

RIDGE = 1e-2
"""Ridge of the output side, relative to its mean square."""


class WeightedSpectrum:
    """`L W R^H` of a weight W, with R the factor of its inputs and L that of the gradients at its outputs.

    To first order a change of W by D changes what the gradients belong to by an expected square of
    `‖L D R^H‖^2 / tokens`, where inputs and gradients are independent (as K-FAC takes them to be). The network of rank
    r with the least `‖L (W - W') R^H‖` is `W' = L^-1 U_r U_r^H L W`, U_r the leading left singular vectors of
    `L W R^H`: the inputs' side is never inverted, however singular; the outputs' side is, made well conditioned by a
    ridge, `L^H L + mu I` with `mu = ridge ‖L‖^2 / m`. Its error is exactly the tail of `values`.
    Without L this is `weighted_low_rank`, without both the truncated SVD. A vector stands for a diagonal, such as the
    counts that the inputs of an embedding are.
    Cost: QR of the long side and an SVD of the short one, once for all ranks.

    Args:
        weight: W, (m, n), or a kernel (m, *n) taken as a matrix.
        inputs: R, (k, n) with `R^H R = X^H X`, or (n,); None is the identity.
        outputs: L, (p, m) with `L^H L = G^H G`, or (m,); None is the identity.
        ridge: >= 0, see above.

    Raises:
        ValueError: NaN or infinity; factors of other widths; a negative ridge.

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
        if not ridge >= 0:
            raise ValueError(f"WeightedSpectrum: ridge must be a number >= 0, got {ridge!r}")
        flat = weight.detach().flatten(1)
        m, n = flat.shape
        for what, factor, width in (("inputs", inputs, n), ("outputs", outputs, m)):
            if factor is not None:
                if factor.ndim not in (1, 2) or factor.shape[-1] != width:
                    raise ValueError(
                        f"WeightedSpectrum: the factor of the {what} must be (k, {width}), got {tuple(factor.shape)}"
                    )
                check_finite("WeightedSpectrum", factor)
        work = accumulate_dtype(weight.dtype)
        for factor in (inputs, outputs):
            work = work if factor is None else torch.promote_types(work, accumulate_dtype(factor.dtype))
        self.dtype: torch.dtype = weight.dtype
        """Of the networks."""
        self._weight = flat.to(work)
        self._inputs = None if inputs is None else inputs.detach().to(device=flat.device, dtype=work)
        self._outputs = None if outputs is None else _regular(outputs.detach().to(flat.device, work), float(ridge))
        self._left = _weighed(self._outputs, self._weight)
        whole = _times(self._left, self._inputs)
        if whole.shape[1] > whole.shape[0]:
            whole = torch.linalg.qr(whole.mH, mode="r").R.mH
        self._basis, self.values, _ = safe_svd(whole)
        """Singular values of `L W R^H`, in descending order."""

    def network(self, rank: int) -> LowRank:
        """The best network of a rank, U and V orthonormal.

        Raises:
            ValueError: a rank that is not between 1 and the smaller side.
        """
        most = len(self.values)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
            raise ValueError(f"WeightedSpectrum.network: rank must be an int in 1..{most}, got {rank!r}")
        basis = self._basis[:, :rank]
        inner = basis.mH @ self._left
        if self._outputs is not None:
            whole = self._outputs.ndim == 2
            basis = (
                torch.linalg.solve_triangular(self._outputs, basis, upper=True)
                if whole
                else basis / self._outputs.unsqueeze(1)
            )
        u, left = positive_qr(basis)
        v, right = positive_qr(inner.mH)
        middle = (left @ right.mH).contiguous()
        return LowRank(u.to(self.dtype), middle.to(self.dtype), v.conj().to(self.dtype))

    def error(self, matrix: Inexact[Tensor, "m *n"]) -> float:
        """`‖L (W - W') R^H‖` of any W'."""
        rest = self._weight - matrix.detach().flatten(1).to(self._weight)
        return float(torch.linalg.vector_norm(_times(_weighed(self._outputs, rest), self._inputs).double()))


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
    size = float(torch.linalg.vector_norm(factor.double()))
    if factor.ndim == 1:
        return torch.hypot(factor.abs(), factor.new_tensor(sqrt(ridge / m) * size)) if size else torch.ones_like(factor)
    eye = torch.eye(m, dtype=factor.dtype, device=factor.device)
    if size == 0:
        return eye
    return torch.linalg.qr(torch.cat([factor, eye * (sqrt(ridge / m) * size)]), mode="r").R
