"""Data-aware low-rank decompositions by others, as published: baselines, and methods for those who know them.

`weighted_low_rank` is the optimum that several of them approximate; use it unless you want one of these.
"""

import warnings
from collections.abc import Mapping, Sequence
from math import sqrt
from numbers import Integral, Real
from typing import Literal

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.activation_factor import ActivationFactor
from decompositions.deltas import apply_delta as apply_delta
from decompositions.deltas import delta_low_rank as delta_low_rank
from decompositions.formats.low_rank import LowRank
from decompositions.linalg import check_finite, check_kind, check_ranks, positive_qr, safe_svd, truncation_rank
from decompositions.weighted import CalibrationWarning, upper, weighting

Weight = Inexact[Tensor, "m *n"]
Factor = ActivationFactor | Inexact[Tensor, "k n"]


def asvd(
    weight: Weight, statistics: ActivationFactor | Inexact[Tensor, "n"], *, rank: int, alpha: int | float = 0.5
) -> LowRank:
    """ASVD: columns scaled by `d^alpha` before the SVD and back after, d the size of each input feature.

    `W' = svd_r(W D) D^-1`. The best of rank r in the norm `‖(W - W') D‖`: the weighted optimum where features are
    uncorrelated, of root mean square d, and alpha = 1.

    Args:
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        statistics: mean magnitudes of the features (n,), as published; of a factor root mean squares are taken.
        rank: r.
        alpha: exponent.

    Returns:
        LowRank(U, S, V) with orthonormal U and V; S is square, not diagonal.

    Raises:
        ValueError: NaN or infinity, another width, magnitudes below 0, a rank below 1.

    References:
        Z. Yuan et al., ASVD: activation-aware singular value decomposition for compressing large language models,
        2023, arXiv 2312.05821. The search of a ratio for each layer is not part of this.

    Example:
        >>> import torch
        >>> asvd(torch.randn(4, 3), torch.tensor([5.0, 1.0, 0.1]), rank=2).ranks
        (2, 2)
    """
    w, cap = _start("asvd", weight, rank)
    if isinstance(statistics, ActivationFactor):
        size = torch.linalg.vector_norm(weighting("asvd", statistics, w.shape[1]), dim=0) / sqrt(
            max(statistics.count, 1)
        )
    else:
        size = statistics.detach()
    size = _magnitudes("asvd", size, w.shape[1]).to(w.device)
    scale = _positive(size.pow(float(alpha)))
    return _network(weight, *_truncated(w * scale, cap), 1 / scale)


def whitened_svd(
    weight: Weight,
    factor: Factor,
    *,
    rank: int,
    root: Literal["cholesky", "eigen"] = "cholesky",
    dtype: torch.dtype = torch.float64,
) -> LowRank:
    """SVD-LLM: `W' = svd_r(W S) S^-1` with a root S of the Gram matrix, `S S^H = X^H X`, by Cholesky ("eigen": V2).

    The weighted optimum where the Gram matrix is well conditioned in `dtype`. A Cholesky factorization that fails is
    tried again with `eps I` added, eps doubling from 1e-9, and a CalibrationWarning states the eps that was needed.
    Kept as the baseline that it is: a Gram matrix squares the condition number, and the inverse brings it back.

    Args:
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        factor: of the activations; or any (k, n) matrix F with `F^H F = X^H X`.
        rank: r.
        root: "cholesky" (SVD-LLM) or "eigen" (V2: the root of the eigenvalues, and its reciprocals).
        dtype: of the Gram matrix and all that follows; double precision in the authors' code.

    Returns:
        LowRank(U, S, V) with orthonormal U and V; S is square, not diagonal.

    Raises:
        ValueError: NaN or infinity, another width, a rank below 1, an unknown root.

    References:
        X. Wang et al., SVD-LLM, 2024, arXiv 2403.07378; SVD-LLM V2, 2025, arXiv 2503.12340. The doubling of eps is
        that of the comparison in COALA's code.

    Example:
        >>> import torch
        >>> w, x = torch.randn(4, 3), torch.randn(20, 3)
        >>> whitened_svd(w, x, rank=2).ranks
        (2, 2)
    """
    w, cap = _start("whitened_svd", weight, rank)
    if root not in ("cholesky", "eigen"):
        raise ValueError(f"whitened_svd: root must be 'cholesky' or 'eigen', got {root!r}")
    r = weighting("whitened_svd", factor, w.shape[1]).to(device=w.device, dtype=dtype)
    w, gram = w.to(dtype), r.mH @ r
    if root == "eigen":
        values, vectors = torch.linalg.eigh(gram)
        roots = values.clamp_min(float(values[-1]) * torch.finfo(dtype).eps ** 2 or 1.0).sqrt()
        scale, inverse = vectors * roots, (vectors / roots).mH
    else:
        eps, eye = 0.0, torch.eye(len(gram), dtype=dtype, device=w.device)
        scale, failed = torch.linalg.cholesky_ex(gram)
        while int(failed):
            eps = 2 * eps or 1e-9
            scale, failed = torch.linalg.cholesky_ex(gram + eps * eye)
        if eps:
            warnings.warn(
                f"whitened_svd: the Gram matrix is singular in {dtype}, {eps:.3g} was added to its diagonal; "
                "weighted_low_rank needs no such thing",
                CalibrationWarning,
                stacklevel=2,
            )
        inverse = torch.linalg.solve_triangular(scale, eye, upper=False)
    u, s, vh = _truncated(w @ scale, cap)
    return _network(weight, u, s, vh @ inverse)


def output_pca(
    weight: Weight, factor: Factor, *, rank: int, centered: bool = False, with_bias: bool = False
) -> LowRank | tuple[LowRank, Tensor]:
    """Atomic feature mimicking, reduced order modelling: the principal directions V of the outputs, `W' = V V^H W`.

    `centered` takes the covariance of the outputs around their mean, as feature mimicking does; the mean is then
    restored by `(I - V V^H) W mean(x)`, to be added to the bias: without it every output is off by that constant. Not
    centered it is `weighted_low_rank` at mu = 0, by a Gram matrix.

    Args:
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        factor: of the activations; or any (k, n) matrix F with `F^H F = X^H X` (not centered).
        rank: r.
        centered: subtract the mean; needs an ActivationFactor, which knows it.
        with_bias: return `(network, what to add to the bias (m,))`; zeros if not centered.

    Returns:
        LowRank(U, S, V) with orthonormal U and V; S is square, not diagonal.

    Raises:
        ValueError: NaN or infinity, another width, a rank below 1; centered without a mean.

    References:
        H. Yu, J. Wu, Compressing transformers: features are low-rank, but weights are not!, AAAI 2023; A. Chavan et
        al., Rethinking compression: reduced order modelling of latent features in large language models, 2023,
        arXiv 2312.07046.

    Example:
        >>> import torch
        >>> held = ActivationFactor(3)
        >>> held.update(torch.randn(20, 3) + 5)
        >>> net, bias = output_pca(torch.randn(4, 3), held, rank=2, centered=True, with_bias=True)
        >>> net.ranks, bias.shape
        ((2, 2), torch.Size([4]))
    """
    w, cap = _start("output_pca", weight, rank)
    r = weighting("output_pca", factor, w.shape[1]).to(device=w.device, dtype=w.dtype)
    outputs = w @ r.mH
    covariance = outputs @ outputs.mH
    bias = torch.zeros(len(w), dtype=w.dtype, device=w.device)
    if centered:
        if not isinstance(factor, ActivationFactor):
            raise ValueError("output_pca: centered=True needs an ActivationFactor, which knows the mean, got a matrix")
        bias = w @ factor.mean.to(w)
        covariance = covariance - factor.count * torch.outer(bias, bias.conj())
    _, vectors = torch.linalg.eigh(covariance)
    v = vectors[:, -cap:]
    net = _network(weight, v, torch.ones(cap, dtype=w.real.dtype, device=w.device), v.mH @ w)
    return (net, (bias - v @ (v.mH @ bias)).to(weight.dtype)) if with_bias else net


def utilized_rank(
    weight: Weight,
    factor: Factor,
    *,
    rank: int | None = None,
    energy: int | float = 0.999,
    output_energy: int | float | None = None,
) -> LowRank:
    """The weight between the spaces that data use: `W' = P_out W P_in`, projections that hold a share of the energy.

    `P_in` spans the leading directions of the activations with at least `energy` of their sum of squares, `P_out`
    those of the outputs `P_in` lets through. The rank found is the smaller dimension of the two.

    Args:
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        factor: of the activations; or any (k, n) matrix F with `F^H F = X^H X`.
        rank: cap for the dimension of both.
        energy: share of the squares of the activations, in (0, 1].
        output_energy: of the outputs; `energy` by default.

    Returns:
        LowRank(U, S, V) with orthonormal U and V, bases of the two spaces; S has their dimensions and need not be
        square.

    Raises:
        ValueError: NaN or infinity, another width, a rank below 1, shares outside of (0, 1].

    References:
        I. Garg et al., Revealing the utilized rank of subspaces of learning in neural networks, 2024,
        arXiv 2407.04797. The fine-tuning and the search of thresholds are not part of this.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 2) @ torch.randn(2, 6)
        >>> utilized_rank(torch.randn(5, 6), x).ranks
        (2, 2)
    """
    w, cap = _start("utilized_rank", weight, rank)
    shares = energy, energy if output_energy is None else output_energy
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"utilized_rank: an energy must be in (0, 1], got {share!r}")
    r = upper(weighting("utilized_rank", factor, w.shape[1]).to(device=w.device, dtype=w.dtype))

    def leading(matrix: Tensor, share: int | float) -> Tensor:
        u, s, _ = safe_svd(matrix)
        squares = s.square()
        budget = max(1 - float(share), 1e-14) * float(squares.sum())
        most = len(s) if rank is None else cap
        return u[:, : min(most, truncation_rank(squares, budget, len(s)))]

    v = leading(r.mH, shares[0])
    u = leading(w @ v @ (v.mH @ r.mH), shares[1])
    return LowRank(u.to(weight.dtype), (u.mH @ w @ v).to(weight.dtype), v.conj().to(weight.dtype))


def fisher_low_rank(weight: Weight, fisher: Inexact[Tensor, "m ..."], *, rank: int) -> LowRank:
    """FWSVD: rows weighted by the root of their Fisher information before the SVD, and back after.

    `W' = I^-1 svd_r(I W)`, the best of rank r in `‖I (W - W')‖`, I the diagonal of the roots of the row sums.
    `WeightedSpectrum` takes a full matrix, and activations beside.

    Args:
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        fisher: squared gradients, summed over samples: of every entry (m, n), or of the rows (m,).
        rank: r.

    Returns:
        LowRank(U, S, V) with orthonormal U and V; S is square, not diagonal.

    Raises:
        ValueError: NaN or infinity, another shape, information below 0, a rank below 1.

    References:
        Y.-C. Hsu et al., Language model compression with weighted low-rank factorization, ICLR 2022,
        arXiv 2207.00112.

    Example:
        >>> import torch
        >>> fisher_low_rank(torch.randn(4, 3), torch.rand(4, 3), rank=2).ranks
        (2, 2)
    """
    w, cap = _start("fisher_low_rank", weight, rank)
    fisher = fisher.detach()
    whole = fisher.ndim > 1 and fisher.flatten(1).shape == w.shape
    rows = fisher.double().flatten(1).sum(1) if whole else fisher
    if whole and bool((fisher < 0).any()):
        raise ValueError("fisher_low_rank: squared gradients must be >= 0, got one below")
    scale = _positive(_magnitudes("fisher_low_rank", rows, len(w)).to(w.device).sqrt())
    u, s, vh = _truncated(scale.unsqueeze(1) * w, cap)
    return _network(weight, u / scale.unsqueeze(1), s, vh)


def welore_ranks(
    spectra: Mapping[str, Sequence[float] | Tensor],
    *,
    keep: int | float | None = None,
    threshold: int | float | None = None,
) -> dict[str, int]:
    """WeLore: one threshold for the normalized singular values of all layers; what is above is a layer's rank.

    Singular values are divided by the largest of their layer. Given `keep`, the threshold is the one at which that
    share of all singular values is above (or as few more as ranks of at least 1 and equal values ask for).

    Args:
        spectra: layer -> singular values.
        keep: share of the sum of full ranks, in (0, 1].
        threshold: instead: the normalized value above or at which directions are kept.

    Returns:
        Layer -> rank, at least 1.

    Raises:
        ValueError: both or neither of `keep` and `threshold`, or one out of range; an empty or negative spectrum.

    References:
        A. Jaiswal et al., From low rank gradient subspace stabilization to low-rank weights: observations, theories,
        and applications (WeLore), 2024, arXiv 2407.11239.

    Example:
        >>> welore_ranks({"flat": [2.0, 2.0, 1.9], "steep": [9.0, 1.0, 0.1]}, keep=0.67)
        {'flat': 3, 'steep': 1}
    """
    if (keep is None) == (threshold is None):
        raise ValueError(f"welore_ranks: give keep or threshold, got keep={keep!r} and threshold={threshold!r}")
    for name, value in (("keep", keep), ("threshold", threshold)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1):
            raise ValueError(f"welore_ranks: {name} must be in (0, 1], got {value!r}")
    normalized = {}
    for layer, values in spectra.items():
        one = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        if one.ndim != 1 or one.numel() == 0 or not bool((torch.isfinite(one) & (one >= 0)).all()):
            raise ValueError(f"welore_ranks: a spectrum must be a sequence of finite numbers >= 0, got {layer}: {one}")
        normalized[layer] = one / (float(one.max()) or 1.0)
    if not normalized:
        return {}
    if keep is not None:
        together = torch.cat(list(normalized.values())).sort(descending=True).values
        threshold = float(together[max(1, round(float(keep) * len(together))) - 1])
    assert threshold is not None
    return {layer: max(1, int((one >= threshold).sum())) for layer, one in normalized.items()}


def eora(weight: Weight, approximation: Weight, factor: Factor, *, rank: int, cutoff: int | float = 1e-10) -> LowRank:
    """EoRA: a low-rank correction of a layer that was quantized or pruned, in the eigenspace of its activations.

    With `E = W - What` and the eigenvectors Q of `X^H X`, `E Q Lambda^(1/2)` is truncated to rank r and mapped back by
    `Lambda^(-1/2) Q^H`: the least `‖(E - C) X‖`, as far as eigenvalues exceed `cutoff` of the largest (the others are
    dropped on both sides). Eigenvectors come from the SVD of the triangular factor, not from a Gram matrix.
    `weighted_low_rank(W - What, factor, rank=r)` reaches the same error without an inverse.

    Args:
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        approximation: What, of the same shape: dequantized, or with zeros where it was pruned.
        factor: of the activations; or any (k, n) matrix F with `F^H F = X^H X`.
        rank: r.
        cutoff: relative to the largest eigenvalue, >= 0.

    Returns:
        LowRank C(U, S, V) with orthonormal U and V, for the layer `What + C`; S is square, not diagonal.

    Raises:
        ValueError: NaN or infinity, other shapes, a rank below 1, a cutoff below 0.

    References:
        S.-Y. Liu et al., EoRA: fine-tuning-free compensation for compressed LLM with eigenspace low-rank
        approximation, 2024, arXiv 2410.21271.

    Example:
        >>> import torch
        >>> w, x = torch.randn(6, 4), torch.randn(30, 4)
        >>> eora(w, w.round(), x, rank=1).ranks
        (1, 1)
    """
    w, cap = _start("eora", weight, rank)
    if approximation.shape != weight.shape:
        raise ValueError(
            f"eora: the approximation must have the shape of the weight, expected {tuple(weight.shape)}, got "
            f"{tuple(approximation.shape)}"
        )
    check_finite("eora", approximation)
    if isinstance(cutoff, bool) or not isinstance(cutoff, Real) or not 0 <= cutoff < 1:
        raise ValueError(f"eora: cutoff must be in [0, 1), got {cutoff!r}")
    r = upper(weighting("eora", factor, w.shape[1]).to(device=w.device, dtype=w.dtype))
    difference = w - approximation.detach().flatten(1).to(w)
    _, s, qh = safe_svd(r)
    kept = s > float(s[0]) * max(sqrt(cutoff), torch.finfo(s.dtype).eps)
    if not bool(kept.any()):
        warnings.warn(
            "eora: no activations, or all of them zero: the plain truncated SVD of the difference was taken",
            CalibrationWarning,
            stacklevel=2,
        )
        return _network(weight, *_truncated(difference, cap))
    s, qh = s[kept], qh[kept]
    u, values, vh = _truncated(difference @ (qh.mH * s), cap)
    return _network(weight, u, values, (vh / s) @ qh)


def _start(name: str, weight: Tensor, rank: int | None) -> tuple[Tensor, int]:
    """The matrix in double precision, and the rank as a cap."""
    check_kind(name, weight, min_order=2)
    check_finite(name, weight)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral)):
        raise TypeError(f"{name}: rank must be an int, got {rank!r}")
    flat = weight.detach().flatten(1)
    (cap,) = check_ranks(name, rank, [min(flat.shape)])
    return flat.to(torch.promote_types(weight.dtype, torch.float64)), cap


def _magnitudes(name: str, values: Tensor, count: int) -> Tensor:
    if values.ndim != 1 or len(values) != count:
        raise ValueError(f"{name}: expected {count} magnitudes, got shape {tuple(values.shape)}")
    check_finite(name, values)
    if bool((values < 0).any()):
        raise ValueError(f"{name}: magnitudes must be >= 0, got {float(values.min()):.3g}")
    return values.double()


def _positive(scale: Tensor) -> Tensor:
    """No division by zero: silent rows or columns get 1e-6 of the largest."""
    return scale.clamp_min(1e-6 * (float(scale.max()) or 1e6))


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = safe_svd(matrix)
    return u[:, :rank], s[:rank], vh[:rank]


def _network(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, columns: Tensor | None = None) -> LowRank:
    """`u s vh` (columns scaled) with orthonormal outer factors, in the dtype of the weight."""
    left, a = positive_qr(u)
    right, b = positive_qr((vh if columns is None else vh * columns).mH)
    middle = (a * s) @ b.mH
    return LowRank(left.to(weight.dtype), middle.to(weight.dtype), right.conj().to(weight.dtype))
