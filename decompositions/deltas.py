"""A fine-tuned model stored as low-rank differences from its base."""

from collections.abc import Mapping

import torch
from torch import Tensor

from decompositions.formats.algebra import to_matrix
from decompositions.formats.low_rank import LowRank
from decompositions.linalg import check_finite
from decompositions.low_rank import svd


def delta_low_rank(
    fine_tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], *, rank: int | None = None, tol: float | None = None
) -> dict[str, LowRank | Tensor]:
    """A fine-tuned model as differences from its base: of low rank where that is smaller, dense otherwise.

    For every matrix (a kernel is taken as out x rest) the truncated SVD of `W_tuned - W_base`, `tol` relative to the
    norm of the difference; vectors, and matrices for which rank (m + n) is not below m n, as dense differences;
    tensors without a difference are left out. `apply_delta` puts them together.

    Args:
        fine_tuned: name -> tensor, such as a `state_dict`.
        base: the same names and shapes.
        rank: cap for every matrix.
        tol: relative error of every difference.

    Returns:
        Name -> LowRank, or a dense difference, in the dtype of the fine-tuned tensor.

    Raises:
        ValueError: other names or shapes, NaN or infinity, neither rank nor tol.

    References:
        S. Ryu, S. Seo, J. Yoo, Efficient storage of fine-tuned models via low-rank approximation of weight residuals
        (ERE), 2023, arXiv 2305.18425. Its quantization of the factors is not part of this; one `tol` for all layers
        stands for its allocation of ranks.

    Example:
        >>> import torch
        >>> base = {"weight": torch.randn(8, 6), "bias": torch.zeros(8)}
        >>> tuned = {"weight": base["weight"] + torch.outer(torch.ones(8), torch.ones(6)), "bias": torch.zeros(8)}
        >>> delta = delta_low_rank(tuned, base, tol=1e-3)
        >>> {name: net.ranks for name, net in delta.items()}
        {'weight': (1, 1)}
    """
    if rank is None and tol is None:
        raise ValueError("delta_low_rank: give a rank or a tol, got neither")
    if set(fine_tuned) != set(base):
        odd = sorted(set(fine_tuned) ^ set(base))
        raise ValueError(f"delta_low_rank: both models must have the same names, got {odd[:4]} in one of them only")
    made: dict[str, LowRank | Tensor] = {}
    for name, tuned in fine_tuned.items():
        if tuned.shape != base[name].shape:
            raise ValueError(
                f"delta_low_rank: {name} must have one shape, expected {tuple(base[name].shape)}, got "
                f"{tuple(tuned.shape)}"
            )
        if not (tuned.is_floating_point() or tuned.is_complex()):
            if not torch.equal(tuned, base[name].to(tuned)):  # counters, masks: no arithmetic
                raise ValueError(
                    f"delta_low_rank: {name} is {tuned.dtype} and differs between the models; store it apart"
                )
            continue
        work = torch.promote_types(tuned.dtype, torch.float32)
        difference = tuned.detach().to(work) - base[name].detach().to(tuned.device, work)
        check_finite(f"delta_low_rank: {name}", difference) if difference.numel() else None
        if not bool(difference.any()):
            continue
        made[name] = difference.to(tuned.dtype)
        if tuned.ndim >= 2:
            net = svd(difference, rank=rank, tol=tol if rank is None else None)
            if rank is not None and tol is not None:
                loose = svd(difference, tol=tol)
                net = loose if loose.ranks < net.ranks else net
            m, n = difference.flatten(1).shape
            if net.ranks[0] * (m + n) < m * n:
                made[name] = net.to(tuned.dtype)
    return made


def apply_delta(base: Mapping[str, Tensor], delta: Mapping[str, LowRank | Tensor]) -> dict[str, Tensor]:
    """The tensors that `delta_low_rank` stood for: `W_base + difference`.

    Args:
        base: name -> tensor.
        delta: name -> LowRank, or a dense difference.

    Raises:
        ValueError: a name that the base does not have.

    Example:
        >>> import torch
        >>> apply_delta({"bias": torch.ones(2)}, {"bias": torch.ones(2)})
        {'bias': tensor([2., 2.])}
    """
    unknown = sorted(set(delta) - set(base))
    if unknown:
        raise ValueError(f"apply_delta: the base has no tensors named {unknown[:4]}")
    made = dict(base)
    for name, change in delta.items():
        dense = change if isinstance(change, Tensor) else to_matrix(change)
        work = torch.promote_types(base[name].dtype, torch.float32)
        total = base[name].to(work) + dense.reshape(base[name].shape).to(base[name].device, work)
        made[name] = total.to(base[name].dtype)
    return made
