"""Hierarchical singular value decomposition on any dimension tree."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.modes import check_num_rows
from decompositions.formats.tree import DimensionTree, Tree, balanced_tree, read_tree, tree_ranks
from decompositions.linalg import Method, check_kind, full_precision
from decompositions.truncation import Truncation


@full_precision
def tree_svd(
    x: Inexact[Tensor, "..."],
    rank: int | Sequence[int] | None = None,
    tol: float | None = None,
    *,
    tree: DimensionTree | None = None,
    num_rows: int | None = None,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> Tree | tuple[Tree, float]:
    """Hierarchical SVD: a truncated basis for every subtree, from the leaves to the root (hierarchical Tucker).

    `‖X - X̂‖ <= tol ‖X‖`, the squared errors of the cuts adding exactly; with ranks given,
    `‖X - X̂‖ <= sqrt(#bonds) ‖X - best of those ranks‖` (`sqrt(2 d - 3)` on a binary tree with d leaves, whose root
    bonds are one cut). Exact where the ranks suffice. On the tree of a train this is TT-SVD, on a star ST-HOSVD.
    Cost: one product of the tensor with every leaf's basis, each on what the earlier ones left.

    Args:
        x: a tensor of any order >= 1.
        rank: cap for every bond, or an entry for each, in the order of `bonds`.
        tol: relative Frobenius error.
        tree: dimension tree, see `Tree`; a balanced binary one by default.
        num_rows: leading axes of x that are rows of the network; all by default.
        method: "exact", "gram", "randomized" (needs rank) or "auto".
        with_error: return `(network, relative error)`.
        generator: of the randomized sketch.

    Returns:
        Tree whose cores are isometries toward the root, core 0, the center.

    Raises:
        TypeError: no floating or complex tensor; num_rows that is not an int.
        ValueError: NaN or infinity, an empty mode, an impossible rank, a tree that does not carry the axes of x.

    References:
        L. Grasedyck, SIAM J. Matrix Anal. Appl. 2010, theorem 3.11 and the root-to-leaves remark after it; cuts from
        the leaves as in D. Kressner, C. Tobler, htucker, ACM Trans. Math. Softw. 2014, algorithm 5.

    Example:
        >>> import torch
        >>> x = torch.arange(24.0).reshape(2, 3, 4)
        >>> net, error = tree_svd(x, tol=1e-6, tree=((0,), ((1,), (2,))), with_error=True)
        >>> net.ranks, error < 1e-6
        ((2, 2, 2, 2), True)
    """
    check_kind("tree_svd", x)
    if method == "randomized" and rank is None:
        raise ValueError("tree_svd: method='randomized' needs a rank, got rank=None; use method='auto' with tol")
    num_rows = check_num_rows("tree_svd", num_rows, x.ndim)
    tree = balanced_tree(x.ndim) if tree is None else tree
    nodes = read_tree("tree_svd", tree, x.ndim)
    caps = tree_ranks("tree_svd", nodes, x.shape, rank)
    # axes in the order of the tree: what a subtree carries then stays together, whatever is cut before
    order: list[int] = []
    finish: list[int] = []  # cores, children before their parents
    stack: list[tuple[int | None, int | None, bool]] = [(None, 0, False)]
    while stack:
        axis, node, done = stack.pop()
        if axis is not None:
            order.append(axis)
        elif node is not None and done:
            finish.append(node)
        elif node is not None:
            stack.append((None, node, True))
            stack.extend((axis, child, False) for axis, child in reversed(nodes[node].entries))
    task = Truncation("tree_svd", x.permute(order), max(1, len(nodes) - 1), tol, method, generator)
    rest = task.work
    held: list[tuple[int | None, int | None]] = [(axis, None) for axis in order]  # what each axis of `rest` is
    sizes = list(rest.shape)
    cores: dict[int, Tensor] = {}
    for k in finish[:-1]:
        entries = nodes[k].entries
        start = held.index(entries[0])
        stop = start + len(entries)
        inside = sizes[start:stop]
        found = task.cut(rest.reshape(prod(sizes[:start]), prod(inside), prod(sizes[stop:])), caps[k - 1])
        kept = found.u.shape[1]
        cores[k] = found.u.to(rest.dtype).mT.reshape(kept, *inside)
        rest, held[start:stop], sizes[start:stop] = found.rest, [(None, k)], [kept]
    cores[0] = rest.reshape(sizes)
    task.x = x
    return task.finish(Tree([cores[k] for k in range(len(nodes))], tree, num_rows), with_error)
