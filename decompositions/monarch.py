"""The nearest Monarch matrix, block by block."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.modes import balanced_modes
from decompositions.formats.monarch import Monarch, block_ranks, factor_legs
from decompositions.linalg import check_kind, check_ranks, fold_matrix, full_precision, safe_svd, truncation_rank
from decompositions.randomized import randomized_basis
from decompositions.truncation import Truncation


@full_precision
def monarch_projection(
    weight: Inexact[Tensor, "m *n"],
    row_modes: Sequence[int] | None = None,
    col_modes: Sequence[int] | None = None,
    rank: int | Sequence[int] | None = None,
    tol: float | None = None,
    *,
    order: int = 2,
    method: Literal["exact", "randomized"] = "exact",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> Monarch | tuple[Monarch, float]:
    """The nearest Monarch matrix: a truncated SVD of every block, all blocks at once.

    For two factors it is the best of its ranks, exactly: blocks do not overlap. For more the factors are split off one
    after another, as in TT-SVD: the squared errors add, and the error is within sqrt(d - 1) of the best. With `tol`,
    `‖W - Ŵ‖ <= tol ‖W‖`, all blocks of a shuffle having the same rank, the least that fits. Modes whose products exceed
    the width pad the matrix with zero rows and columns.
    Cost: O(m n min(m_1, n_2)) for two factors, O(m n rank) randomized.

    Args:
        weight: (out, in); a convolution kernel (out, in, *kernel) is taken as the matrix out x (in kernel).
        row_modes: modes of the rows, product at least m; None chooses balanced ones.
        col_modes: modes of the columns, as many; None chooses balanced ones.
        rank: cap for the rank of the blocks, or an entry a shuffle; 1 where neither it nor `tol` is given.
        tol: relative Frobenius error.
        order: number of factors where the modes are not given.
        method: "exact", or "randomized" (needs `rank`), which takes sketches of large blocks of small rank.
        with_error: return `(network, relative error of the padded matrix)`.
        generator: of the randomized sketches.

    Returns:
        Monarch; the singular values of the blocks are in the factor that is applied first.

    Raises:
        ValueError: products smaller than the matrix, lengths that differ, NaN or infinity, an impossible rank.

    References:
        T. Dao et al., ICML 2022, arXiv 2204.00595, section 3.3; M. Gorbunov et al., NeurIPS 2024, arXiv 2406.10019.

    Example:
        >>> import torch
        >>> from decompositions import to_matrix
        >>> w = to_matrix(Monarch.random(row_modes=(4, 3), col_modes=(2, 6), dtype=torch.float64))
        >>> monarch_projection(w, (4, 3), (2, 6), with_error=True)[1] < 1e-14
        True
    """
    check_kind("monarch_projection", weight, min_order=2)
    out, width = weight.shape[0], prod(weight.shape[1:])
    count = next((len(modes) for modes in (row_modes, col_modes) if modes is not None), order)
    rows = tuple(balanced_modes(out, count) if row_modes is None else row_modes)
    cols = tuple(balanced_modes(width, count) if col_modes is None else col_modes)
    d = len(rows)
    if len(cols) != d:
        raise ValueError(
            f"monarch_projection: row_modes and col_modes pair up, expected equal lengths, got {rows} and {cols}; "
            "fill with ones"
        )
    padded = fold_matrix("monarch_projection", weight, rows, cols)
    caps = check_ranks("monarch_projection", 1 if rank is None and tol is None else rank, block_ranks(rows, cols))
    if method not in ("exact", "randomized"):
        raise ValueError(f"monarch_projection: method must be 'exact' or 'randomized', got {method!r}")
    if method == "randomized" and (rank is None or tol is not None):
        raise ValueError(
            f"monarch_projection: method='randomized' needs a rank and no tol, got rank={rank} and tol={tol}; use "
            "method='exact'"
        )
    task = Truncation("monarch_projection", padded, cuts=max(1, d - 1), tol=tol)
    sizes = {f"i{k}": n for k, n in enumerate(rows)} | {f"j{k}": n for k, n in enumerate(cols)}
    rest, labels = task.work, (*(f"i{k}" for k in range(d)), *(f"j{k}" for k in range(d)))
    legs, cores = factor_legs(d), []
    budget = None if task.effective_tol is None else (task.effective_tol * task.norm) ** 2
    for t in range(d - 1):
        # blocks: all that factor t does not change; rows: what it makes; columns: what the later factors see
        blocks = [*(f"j{s}" for s in range(t + 1)), *(f"i{s}" for s in range(t + 1, d))]
        made = [f"i{t}", *(f"r{s}" for s in (t - 1,) if s >= 0)]
        seen = [f"j{s}" for s in range(t + 1, d)]
        axes = [labels.index(label) for label in (*blocks, *made, *seen)]
        shape = [sizes[label] for label in (*blocks, *made, *seen)]
        stack = rest.permute(axes).reshape(prod(shape[: len(blocks)]), prod(sizes[x] for x in made), -1)
        if method == "exact":
            u, s, vh = safe_svd(stack)
        else:
            q = randomized_basis(stack, caps[t], generator=generator)
            u, s, vh = safe_svd(q.mH @ stack)
            u = q @ u
        squares = s.double().square().sum(0)  # rank r in every block drops the values from r on in all
        keep = min(caps[t], len(squares))
        if budget is not None:
            free = truncation_rank(squares, max(0.0, budget - task.discarded) / (d - 1 - t), len(squares))
            task.capped = task.capped or keep < free
            keep = min(keep, free)
        task.discarded += float(squares[keep:].sum())
        sizes[f"r{t}"] = keep
        have = (*blocks, *made, f"r{t}")
        core = u[..., :keep].reshape(*[sizes[label] for label in have])
        cores.append(core.permute([have.index(label) for label in legs[t]]))
        rest = (s[:, :keep, None] * vh[:, :keep]).reshape(*[sizes[x] for x in (*blocks, f"r{t}", *seen)])
        labels = (*blocks, f"r{t}", *seen)
    cores.append(rest.permute([labels.index(label) for label in legs[-1]]))
    task.x = weight
    net = Monarch([core.contiguous() for core in cores])
    return task.finish(net, with_error, target=padded.detach())
