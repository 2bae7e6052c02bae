"""Manifolds of fixed ranks for geoopt's optimizers, which is imported when it is asked for."""

from importlib import import_module
from typing import Any

from torch import Tensor

from decompositions import Network
from decompositions.geometry.manifold import FixedRank


def geoopt_manifold(like: Network) -> Any:
    """A `geoopt.Manifold` of dense tensors of a tree's modes and ranks: `FixedRank` under geoopt's base class.

    `geoopt.ManifoldParameter(x, manifold=...)` then works with `geoopt.optim.RiemannianAdam`, `RiemannianSGD` and
    line search, beside geoopt's own manifolds. Points are dense: for layers use `tnlayers.RiemannianAdam`, which moves
    the cores.

    Args:
        like: a tree of the modes and ranks wanted.

    Raises:
        ImportError: without geoopt (`pip install geoopt`).
        ValueError: a network that is no tree.

    Example:
        >>> from decompositions import LowRank
        >>> try:
        ...     manifold = geoopt_manifold(LowRank.random(row_modes=(6,), col_modes=(5,), rank=2))
        ...     name = manifold.name
        ... except ImportError:
        ...     name = "FixedRank"
        >>> name
        'FixedRank'
    """
    own = FixedRank(like)
    try:
        base: Any = import_module("geoopt.manifolds.base").Manifold
    except ImportError as error:
        raise ImportError("geoopt_manifold: needs geoopt; pip install geoopt") from error

    class FixedRankManifold(base):
        """See `geoopt_manifold`."""

        name = FixedRank.name
        reversible = FixedRank.reversible
        ndim = own.ndim

        def __init__(self) -> None:
            super().__init__()
            self.fixed = own

        def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Any:
            off = own.off_manifold(x)
            return off <= atol + rtol, None if off <= atol + rtol else f"x is {off:.1e} of its norm off the ranks"

        def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Any:
            off = own.off_tangent(x, u)
            return off <= atol + rtol, None if off <= atol + rtol else f"u is {off:.1e} of its norm off the tangent"

        def __eq__(self, other: object) -> bool:
            return getattr(other, "fixed", None) == own

        def __hash__(self) -> int:
            return hash(own)

        def __repr__(self) -> str:
            return repr(own)

    for method in ("projx", "proju", "egrad2rgrad", "retr", "expmap", "transp", "retr_transp", "inner", "random"):
        setattr(FixedRankManifold, method, _delegate(method))
    FixedRankManifold.__abstractmethods__ = frozenset()
    return FixedRankManifold()


def _delegate(method: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.fixed, method)(*args, **kwargs)

    call.__name__ = method
    return call
