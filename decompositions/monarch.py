"""The nearest Monarch matrix, block by block; and group-and-shuffle matrices as Monarch matrices."""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Inexact, Int
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


class Shuffles(NamedTuple):
    """A matrix `W[rows][:, inverse of cols]` of a Monarch matrix W: what its labels cannot say is in two orders."""

    network: Monarch
    rows: Int[Tensor, "m"]
    cols: Int[Tensor, "n"]


def group_and_shuffle(
    left: Inexact[Tensor, "kl a s"],
    right: Inexact[Tensor, "kr t b"],
    inner: Sequence[int] | Int[Tensor, "n"] | None = None,
    *,
    rows: Sequence[int] | Int[Tensor, "m"] | None = None,
    cols: Sequence[int] | Int[Tensor, "n"] | None = None,
) -> Shuffles:
    """`A = P_rows diag(L_1, ..., L_k) P_inner diag(R_1, ..., R_l) P_cols` for any shuffles, as a Monarch matrix.

    A shuffle in gather form takes entry order[i] of its input to place i. Block (a, b) of L P R, between block a of L
    and block b of R, is a sum of as many outer products as P has lines from R_b to L_a; the largest number of lines is
    the rank of the Monarch matrix, blocks with fewer being filled with zeros (training may use them). A shuffle that
    deals every block out evenly, such as `P_(k, n)`, costs nothing. `tnlayers.Shuffled` keeps the two orders as buffers
    around a layer.

    Args:
        left: blocks of L, applied last.
        right: blocks of R.
        inner: the shuffle between; None is the transpose of the blocks of R, `P_(l, n)`.
        rows: the shuffle of the outputs.
        cols: the shuffle of the inputs.

    Raises:
        ValueError: blocks that do not fit one another, orders that are no permutations.

    References:
        M. Gorbunov, N. Yudin, V. Soboleva, A. Alanov, A. Naumov, M. Rakhuba, Group and shuffle, NeurIPS 2024, arXiv
        2406.10019, definition 3.1 and proposition 2.

    Example:
        >>> import torch
        >>> left, right = torch.randn(4, 3, 6), torch.randn(6, 4, 5)
        >>> net, rows, cols = group_and_shuffle(left, right, torch.randperm(24))
        >>> from decompositions import to_matrix
        >>> to_matrix(net).shape, len(rows), len(cols)
        (torch.Size([12, 30]), 12, 30)
    """
    (kl, a, s), (kr, t, b) = left.shape, right.shape
    if kl * s != kr * t:
        raise ValueError(
            f"group_and_shuffle: L must take what R gives, expected {kl} x {s} = {kl * s} inputs, got {kr} x {t} = "
            f"{kr * t}"
        )
    if inner is None:
        inner = torch.arange(kr * t).reshape(kr, t).T.flatten()
    order = _order("inner", inner, kl * s)
    to, place = torch.arange(kl * s) // s, torch.arange(kl * s) % s  # block of L, and its input there
    of, line = order // t, order % t  # block of R, and its output there
    lines = torch.zeros(kl, kr, dtype=torch.int64)
    number = torch.empty_like(order)  # of a line, among those between the same two blocks
    for k in range(kl * s):
        number[k] = lines[to[k], of[k]]
        lines[to[k], of[k]] += 1
    rank = int(lines.max())
    last, first = left.new_zeros(kl, a, kr, rank), right.new_zeros(kr, kl, rank, b)
    last[to, :, of, number] = left[to, :, place]
    first[of, to, number] = right[of, line]
    # Monarch's outputs run over the rows of L's blocks first, then over its blocks
    own = torch.arange(a * kl).reshape(a, kl).T.flatten()
    outer = own if rows is None else own[_order("rows", rows, a * kl)]
    return Shuffles(Monarch([last, first]), outer, _order("cols", range(kr * b) if cols is None else cols, kr * b))


def _order(name: str, order: Sequence[int] | Tensor, count: int) -> Tensor:
    found = torch.as_tensor(list(order) if not isinstance(order, Tensor) else order).cpu()
    if found.shape != (count,) or sorted(found.tolist()) != list(range(count)):
        raise ValueError(
            f"group_and_shuffle: {name} must be a permutation of 0..{count - 1}, got {str(found.tolist())[:60]}"
        )
    return found
