"""THE TABLE: one row a format instance. Every generic suite runs over it; a later format needs one row here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from decompositions import (
    CP,
    TT,
    KroneckerSum,
    LowRank,
    Monarch,
    Network,
    TensorRing,
    Tree,
    TTMatrix,
    Tucker,
    fill_random,
    hooi,
    hosvd,
    kronecker_svd,
    st_hosvd,
    svd,
    tr_svd,
    transpose,
    tree_svd,
    tt_svd,
    ttm_svd,
    tucker2,
)


@dataclass(frozen=True)
class Case:
    """A name, and how to draw the network: `build(dtype=, generator=)`."""

    id: str
    build: Callable[..., Network]
    summable: bool = True  # every core is joined to the others by summed bonds, so that `add` exists

    def __call__(self, dtype: torch.dtype = torch.float64, generator: torch.Generator | None = None) -> Network:
        return self.build(dtype=dtype, generator=generator or torch.Generator().manual_seed(7))

    def __repr__(self) -> str:
        return self.id


def unequal_low_rank(*, dtype: torch.dtype, generator=None) -> LowRank:
    """S need not be square."""
    shapes = ((5, 2), (2, 3), (4, 3))
    return fill_random(LowRank(*(torch.empty(s, device="meta") for s in shapes)), dtype=dtype, generator=generator)


def transposed_chain(*, dtype: torch.dtype, generator=None) -> TT:
    """A train whose rows are at its far end."""
    return transpose(TT.random(row_modes=(3, 2), col_modes=(4, 2), rank=3, dtype=dtype, generator=generator))


CASES = [
    Case("lowrank", partial(LowRank.random, row_modes=(6,), col_modes=(5,), rank=3)),
    Case("lowrank-tall-rank1", partial(LowRank.random, row_modes=(9,), col_modes=(2,), rank=1)),
    Case("lowrank-wide-full", partial(LowRank.random, row_modes=(2,), col_modes=(9,), rank=2)),
    Case("lowrank-1x1", partial(LowRank.random, row_modes=(1,), col_modes=(1,), rank=1)),
    Case("lowrank-unequal", unequal_low_rank),
    Case("tucker-order1", partial(Tucker.random, row_modes=(5,), rank=1)),
    Case("tucker", partial(Tucker.random, row_modes=(4, 3), col_modes=(5,), rank=(2, 3, 2))),
    Case("tucker-mode1", partial(Tucker.random, row_modes=(4,), col_modes=(1, 3), rank=(2, 1, 2))),
    Case("tucker-fat-core", partial(Tucker.random, row_modes=(6,), col_modes=(2, 1), rank=(6, 1, 1))),
    Case("tucker2", partial(Tucker.random, row_modes=(6,), col_modes=(4, 3, 2), rank=(3, 2), modes=(0, 1))),
    Case("tt-order1", partial(TT.random, row_modes=(5,), rank=1)),
    Case("tt", partial(TT.random, row_modes=(3, 4), col_modes=(2, 5), rank=(2, 4, 3))),
    Case("tt-rank1", partial(TT.random, row_modes=(2,), col_modes=(3, 2), rank=1)),
    Case("tt-mode1-order6", partial(TT.random, row_modes=(2, 1, 3), col_modes=(1, 2, 2), rank=3)),
    Case("tt-conv-chain", partial(TT.random, row_modes=(6,), col_modes=(4, 3, 2), rank=(2, 3, 4), axes=(1, 2, 3, 0))),
    Case("tt-transposed", transposed_chain),
    Case("ttm-order1", partial(TTMatrix.random, row_modes=(3,), col_modes=(4,), rank=1)),
    Case("ttm", partial(TTMatrix.random, row_modes=(2, 3, 2), col_modes=(3, 1, 2), rank=(3, 2))),
    Case("ttm-tall", partial(TTMatrix.random, row_modes=(4, 3), col_modes=(1, 2), rank=2)),
    Case("tree-balanced", partial(Tree.random, row_modes=(3, 4), col_modes=(2, 5), rank=2)),
    Case("tree-order1", partial(Tree.random, row_modes=(4,), rank=1)),
    Case(
        "tree-user",
        partial(Tree.random, row_modes=(3, 2), col_modes=(2, 4, 3), rank=(3, 3, 2, 2), tree=((4, (1,)), 2, ((3,), 0))),
    ),
    Case(
        "tree-degree5",
        partial(Tree.random, row_modes=(2, 3), col_modes=(2, 2, 3), rank=2, tree=(*((k,) for k in range(5)),)),
    ),
    Case("cp", partial(CP.random, row_modes=(4, 3), col_modes=(5,), rank=4)),
    Case("cp-order1", partial(CP.random, row_modes=(4,), rank=1)),
    Case("cp-matrix", partial(CP.random, row_modes=(4,), col_modes=(3,), rank=2)),
    Case("cp-mode1-rank1", partial(CP.random, row_modes=(2, 1), col_modes=(1, 3), rank=1)),
    Case("tensor-ring", partial(TensorRing.random, row_modes=(3, 4), col_modes=(2, 5), rank=(2, 3, 4, 2))),
    Case("tensor-ring-order1", partial(TensorRing.random, row_modes=(4,), rank=1)),
    Case("tensor-ring-matrix", partial(TensorRing.random, row_modes=(4,), col_modes=(3,), rank=2)),
    Case(
        "tensor-ring-turned", partial(TensorRing.random, row_modes=(4,), col_modes=(1, 3, 2), rank=2, axes=(2, 0, 3, 1))
    ),
    Case("kronecker-two", partial(KroneckerSum.random, row_modes=(3, 2), col_modes=(2, 4), rank=3)),
    Case("kronecker-three", partial(KroneckerSum.random, row_modes=(2, 3, 2), col_modes=(2, 1, 3), rank=2)),
    Case("kronecker-order1-rank1", partial(KroneckerSum.random, row_modes=(3,), col_modes=(4,), rank=1)),
    Case("monarch-two", partial(Monarch.random, row_modes=(4, 3), col_modes=(2, 5), rank=2)),
    Case("monarch-rank1", partial(Monarch.random, row_modes=(3, 2), col_modes=(2, 3))),
    Case("monarch-three", partial(Monarch.random, row_modes=(2, 3, 2), col_modes=(3, 1, 2), rank=(2, 2))),
    Case("monarch-one", partial(Monarch.random, row_modes=(3,), col_modes=(4,))),
    Case("ttm-wide-rank1", partial(TTMatrix.random, row_modes=(1, 2), col_modes=(4, 3), rank=1)),
]


def network(equation: str, default: int = 3, *, dtype: torch.dtype, generator=None, **sizes: int) -> Network:
    """A base-class network from an equation such as 'ir,jr,kr->ij|k' (rows|cols), one letter a label."""
    inputs, output = equation.split("->")
    rows, cols = output.split("|")
    legs = tuple(tuple(leg) for leg in inputs.split(","))
    cores = tuple(torch.empty([sizes.get(label, default) for label in leg], device="meta") for leg in legs)
    return fill_random(Network(cores, legs, tuple(rows), tuple(cols)), dtype=dtype, generator=generator)


def long_chain(length: int = 31, *, dtype: torch.dtype, generator=None) -> Network:
    """A chain of 61 labels, more than einsum has letters; modes are 1 but for every ninth, bonds are 2."""
    outside = [f"i{k}" for k in range(length)]
    bonds = [f"b{k}" for k in range(length - 1)]
    legs = tuple((*bonds[max(k - 1, 0) : k], outside[k], *bonds[k : k + 1]) for k in range(length))
    sizes = dict.fromkeys(bonds, 2) | {label: 1 if k % 9 else 2 for k, label in enumerate(outside)}
    cores = tuple(torch.empty([sizes[label] for label in leg], device="meta") for leg in legs)
    half = length // 2
    skeleton = Network(cores, legs, tuple(outside[:half]), tuple(outside[half:]))
    return fill_random(skeleton, dtype=dtype, generator=generator)


NETWORKS = [
    # trees: two children of the root with children of their own; outside legs on inner cores
    Case("tree-irregular", partial(network, "iab,jacd,bke,cl,d,em->il|jkm", default=2, i=3, k=3, l=4)),
    Case("tree-degree4", partial(network, "abcd,ia,jbe,kc,dl,em->ij|klm", default=2, i=3, a=3, m=3)),
    Case("tree-no-cols", partial(network, "ia,abj,bk->ijk|", default=2, a=5)),
    Case("tree-fat-bonds", partial(network, "ia,ajb,bk->ij|k", default=2, a=7, b=9)),
    Case("kronecker-pair", partial(network, "rik,rjl->ij|kl", default=2, i=3, l=4)),
    Case("chain-61-labels", long_chain),
    # no trees
    Case("hyper-edge", partial(network, "ir,jr,kr->ij|k", r=4, i=2)),
    Case("ring", partial(network, "aib,bjc,cka->ij|k", default=2, k=3)),
    Case("double-bond", partial(network, "iab,abj->i|j", default=2, i=4)),
    Case("monarch", partial(network, "kji,jlk->lj|ki", default=2, i=3, l=4), summable=False),
    Case("hadamard-outside", partial(network, "kri,krl->kl|i", default=2, k=3)),
]

ALL = CASES + NETWORKS
TREES = [case for case in ALL if case().is_tree]
LOOPS = [case for case in ALL if not case().is_tree]
OPERATORS = [case for case in ALL if case().cols]


@dataclass(frozen=True)
class Decomposition:
    """A decomposition that takes `rank`, `tol`, `method`, `with_error`, `generator`, and how many cuts it makes."""

    id: str
    run: Callable[..., Any]
    cuts: Callable[[int], int]
    min_order: int = 1
    methods: tuple[str, ...] = ("auto", "exact", "gram", "randomized")
    balanced: bool = False  # the norm is spread over the cores, not kept in one

    def __call__(self, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        return self.run(x, *args, **options)

    def target(self, x: torch.Tensor, net: Network) -> torch.Tensor:
        """`x` in the shape of the network: a matrix where the format has one, padded with zeros where modes cover more.

        Only shapes are looked at, so that a later format needs its row alone.
        """
        if net.shape == tuple(x.shape):
            return x
        matrix = x.flatten(1)
        rows, cols = prod(net.row_modes), prod(net.col_modes)
        padded = torch.zeros(rows, cols, dtype=x.dtype)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        return padded.reshape(net.shape)

    def __repr__(self) -> str:
        return self.id


DECOMPOSITIONS = [
    Decomposition("svd", svd, lambda order: 1, min_order=2),
    Decomposition("hosvd", hosvd, lambda order: order),
    Decomposition("st_hosvd", st_hosvd, lambda order: order),
    Decomposition("hooi", hooi, lambda order: order),
    Decomposition("tucker2", tucker2, lambda order: 2, min_order=2),
    Decomposition("tt_svd", tt_svd, lambda order: max(1, order - 1)),
    Decomposition(
        "tt_svd-reversed", lambda x, *a, **k: tt_svd(x, *a, axes=range(getattr(x, "ndim", 0))[::-1], **k), lambda d: d
    ),
    Decomposition("tr_svd", tr_svd, lambda order: max(1, order - 1)),
    Decomposition(
        "kronecker_svd",
        lambda x, rank=None, tol=None, **k: kronecker_svd(x, None, None, rank, tol, **k),
        lambda d: 1,
        2,
        balanced=True,
    ),
    Decomposition("tree_svd", tree_svd, lambda order: max(1, 2 * order - 2)),
    Decomposition(
        "ttm_svd", lambda x, rank=None, tol=None, **k: ttm_svd(x, None, None, rank, tol, **k), lambda d: 4, 2
    ),
]
