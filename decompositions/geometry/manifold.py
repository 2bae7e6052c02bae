"""Tensors of fixed ranks as an embedded manifold whose points are dense tensors: for optimizers that are not ours."""

from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.algebra import to_dense
from decompositions.formats.gauge import require_tree
from decompositions.formats.network import Network, tree_edges
from decompositions.geometry.blocks import unflatten
from decompositions.geometry.gauges import Gauges, gauges
from decompositions.geometry.tangent import project
from decompositions.linalg import safe_svd, unfold


class FixedRank:
    """Dense tensors whose unfolding at every bond of a tree has the rank of that bond, with the Euclidean metric.

    The operations that Riemannian optimizers ask for, under the names of geoopt (`projx, proju, egrad2rgrad, retr,
    expmap, transp, retr_transp, inner, norm`); `tnlayers.geoopt_manifold` makes a `geoopt.Manifold` of them. A point
    may have the shape (*row_modes, *col_modes), that of the matrix rows x columns, or any other of as many entries.
    `RiemannianSGD` and `RiemannianAdam` move the cores themselves and never make a point dense: this class is for
    small tensors, for other optimizers, and for comparison with them.
    Cost: a truncated SVD of every unfolding for each new point.

    Args:
        like: a tree of the modes and ranks wanted; its values do not matter.

    Raises:
        ValueError: a network that is no tree.

    References:
        B. Vandereycken, SIAM J. Optim. 2013 (matrices); C. Lubich, T. Rohwedder, R. Schneider, B. Vandereycken, SIAM J.
        Matrix Anal. Appl. 2013 (trees); M. Kochurov, R. Karimov, S. Kozlukov, Geoopt, 2020, arXiv 2005.02819.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> from decompositions.geometry.manifold import FixedRank
        >>> manifold = FixedRank(LowRank.random(row_modes=(6,), col_modes=(5,), rank=2))
        >>> x = manifold.projx(torch.randn(6, 5))
        >>> u = manifold.proju(x, torch.randn(6, 5))
        >>> int(torch.linalg.matrix_rank(manifold.retr(x, u), rtol=1e-5))
        2
    """

    name = "FixedRank"
    reversible = False

    def __init__(self, like: Network) -> None:
        require_tree("FixedRank", like)
        self.like: Network = like.detach().to("meta")

    @property
    def ndim(self) -> int:
        """Axes of a point."""
        return 2 if self.like.cols else len(self.like.shape)

    def __repr__(self) -> str:
        return f"FixedRank({self.like!r})"

    def __eq__(self, other: object) -> bool:
        mine = (self.like.legs, self.like.rows, self.like.cols, self.like.sizes)
        return isinstance(other, FixedRank) and mine == (
            other.like.legs,
            other.like.rows,
            other.like.cols,
            other.like.sizes,
        )

    def __hash__(self) -> int:
        return hash((self.like.legs, self.like.rows, self.like.cols))

    def network(self, x: Inexact[Tensor, "..."]) -> Network:
        """The tree nearest to x up to a factor sqrt(#bonds): leading singular vectors from the leaves up."""
        legs = self.like.legs
        edges = tree_edges(legs, self.like.rows, self.like.cols, 0)
        rest, labels = x.detach().reshape(self.like.shape), self.like.outside
        cores: list[Any] = [None] * len(legs)
        for edge in reversed(edges):
            below = [label for label in legs[edge.child] if label != edge.bond]
            axes = [labels.index(label) for label in below]
            matrix = unfold(rest, axes)
            u, s, vh = safe_svd(matrix)
            rank = self.like.sizes[edge.bond]
            if u.shape[1] < rank:  # a rank that its side does not allow: the rest of the basis is empty
                u, s = (torch.nn.functional.pad(t, (0, rank - u.shape[1])) for t in (u, s))
                vh = torch.nn.functional.pad(vh, (0, 0, 0, rank - vh.shape[0]))
            others = [label for label in labels if label not in below]
            sizes = dict(zip(labels, rest.shape, strict=True))
            shape = [self.like.sizes[label] for label in legs[edge.child]]
            cores[edge.child] = unflatten(u[:, :rank], shape, legs[edge.child].index(edge.bond))
            rest = (s[:rank, None] * vh[:rank]).reshape(rank, *(sizes[label] for label in others))
            labels = (edge.bond, *others)
        cores[0] = rest.permute([labels.index(label) for label in legs[0]])
        return self.like._unchecked(cores, legs, self.like.rows, self.like.cols)

    def _at(self, x: Tensor) -> Gauges[Any]:
        return gauges(self.network(x))

    def projx(self, x: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """A point near x: leading singular vectors of every unfolding."""
        return to_dense(self.network(x)).reshape(x.shape)

    def proju(self, x: Inexact[Tensor, "..."], u: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """Orthogonal projection of u on the tangent space at x."""
        found = project(self._at(x), u.reshape(self.like.shape)).to_dense()
        return found.reshape(x.shape)

    def egrad2rgrad(self, x: Inexact[Tensor, "..."], u: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """Riemannian gradient of a Euclidean one: its projection."""
        return self.proju(x, u)

    def retr(self, x: Inexact[Tensor, "..."], u: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """`projx(x + u)`."""
        return self.projx(x + u)

    def expmap(self, x: Inexact[Tensor, "..."], u: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """The retraction: geodesics have no closed form."""
        return self.retr(x, u)

    def transp(
        self, x: Inexact[Tensor, "..."], y: Inexact[Tensor, "..."], v: Inexact[Tensor, "..."]
    ) -> Inexact[Tensor, "..."]:
        """Transport of a tangent vector v from x to y by projection."""
        return self.proju(y, v)

    def retr_transp(
        self, x: Inexact[Tensor, "..."], u: Inexact[Tensor, "..."], v: Inexact[Tensor, "..."]
    ) -> tuple[Inexact[Tensor, "..."], Inexact[Tensor, "..."]]:
        """The new point, and v there."""
        y = self.retr(x, u)
        return y, self.transp(x, y, v)

    def inner(
        self, x: Tensor, u: Inexact[Tensor, "..."], v: Inexact[Tensor, "..."] | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Euclidean inner product of tangent vectors."""
        found = (u * (u if v is None else v).conj()).sum()
        return found.reshape((1,) * u.ndim) if keepdim else found

    def norm(self, x: Tensor, u: Inexact[Tensor, "..."], *, keepdim: bool = False) -> Tensor:
        """Norm of a tangent vector."""
        return self.inner(x, u, keepdim=keepdim).real.sqrt()

    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **_: Any
    ) -> Tensor:
        """A random point, of the shape asked for."""
        shape = size or self.like.shape
        return self.projx(torch.randn(shape, dtype=dtype, device=device))

    def off_manifold(self, x: Inexact[Tensor, "..."]) -> float:
        """`‖x - projx(x)‖ / ‖x‖`."""
        norm = float(torch.linalg.vector_norm(x))
        return float(torch.linalg.vector_norm(x - self.projx(x))) / (norm or 1.0)

    def off_tangent(self, x: Inexact[Tensor, "..."], u: Inexact[Tensor, "..."]) -> float:
        """`‖u - proju(x, u)‖ / ‖u‖`."""
        norm = float(torch.linalg.vector_norm(u))
        return float(torch.linalg.vector_norm(u - self.proju(x, u))) / (norm or 1.0)
