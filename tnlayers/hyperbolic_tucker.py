"""The hyperbolic-Tucker layer: a Tucker score, and the Lorentz interaction of both inputs with a point an output."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompositions import Network, Tucker
from tnlayers.bilinear import Bilinear
from tnlayers.dense import NetworkFactory, Recipe
from tnlayers.hyperbolic import lift
from tnlayers.init import random_network
from tnlayers.lorentz_interaction import Curvature, interaction_query, interaction_scores


class HyperbolicTucker(nn.Module):
    """`y_k = sum_ij W_kij x1_i x2_j + b_k + S(A x1, B x2, v_k)`, the layer of MIG-TF, called as `nn.Bilinear`.

    W is a network (a Tucker one by default; `layer.tucker`, a `tnlayers.Bilinear` that every optimizer of the library
    moves), A and B map the inputs to space coordinates of hyperbolic points, v_k is a point an output, and S is the
    Lorentz interaction (`tnlayers.lorentz_interaction`): for curvature -> 0 it ranks outputs as the translation score
    `-|A x1 + B x2 - v_k|^2` does. Points are held by their space coordinates: they cannot leave the hyperboloid.
    -3 < S < 2 whatever the coordinates (their limits: see there); called with x1 (..., in1) and x2 (..., in2).
    Cost: that of the Tucker score, and one product (batch, d + 1) x (d + 1, out) with an outer sum.

    Args:
        in1_features: width of x1.
        in2_features: width of x2.
        out_features: width of y.
        rank: of the Tucker network, an int or one for each of (out, in1, in2); None with `network` or `recipe`.
        curvature: c > 0, points satisfy -x_0^2 + |x|^2 = -1/c. The papers' c is 1/curvature: their 1.3 is 1/1.3 here.
        hyperbolic_dim: d, space coordinates of a point.
        bias: whether to add a bias.
        device: of all parameters.
        dtype: of all parameters.
        learn_curvature: train c, as exp of a parameter.
        std: of the points at the start; with 0 the order of the outputs is that of the Tucker score.
        network: a Network or a callable, as for `tnlayers.Bilinear`.
        recipe: a callable dense weight -> Network.

    Raises:
        ValueError: sizes below 1, a negative std, a curvature that is not positive; not exactly one of rank, network
            and recipe.

    References:
        MIG-TF, mixed-geometry tensor factorization: arXiv 2504.02589.

    Example:
        >>> import torch, tnlayers
        >>> layer = tnlayers.HyperbolicTucker(6, 5, 7, rank=3, curvature=1.0, hyperbolic_dim=4)
        >>> layer(torch.ones(2, 6), torch.ones(2, 5)).shape, layer.tucker.network.ranks
        (torch.Size([2, 7]), (3, 3, 3))
    """

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        rank: int | Sequence[int] | None = None,
        curvature: int | float = 1.0,
        hyperbolic_dim: int = 50,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        learn_curvature: bool = False,
        std: int | float = 0.2,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (rank, network, recipe)) != 1:
            raise ValueError(
                f"HyperbolicTucker: expected exactly one of rank, network and recipe, got rank={rank!r}, "
                f"network={network!r} and recipe={recipe!r}; for example rank=16"
            )
        if rank is not None:
            network = random_network(Tucker, rank)
        tucker = Bilinear(in1_features, in2_features, out_features, bias, device, dtype, network=network, recipe=recipe)
        self._finish(tucker, curvature, hyperbolic_dim, learn_curvature, std)

    def _finish(self, tucker: Bilinear, c: int | float, dim: int, learn: bool, std: int | float) -> None:
        if dim < 1 or std < 0:
            raise ValueError(
                f"HyperbolicTucker: expected hyperbolic_dim >= 1 and std >= 0, got hyperbolic_dim={dim} and std={std}"
            )
        first = tucker.cores[0]
        factory: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
        self.tucker = tucker
        self.std = std
        self.first, self.second = (
            nn.Linear(width, dim, bias=False, **factory) for width in (tucker.in1_features, tucker.in2_features)
        )
        self.points = nn.Parameter(torch.empty(tucker.out_features, dim, **factory))
        nn.init.normal_(self.points, std=std)
        self.curvature = Curvature(c, learn, **factory)

    @classmethod
    def from_tucker(
        cls,
        tucker: Network | Bilinear | nn.Module,
        curvature: int | float = 1.0,
        hyperbolic_dim: int = 50,
        *,
        learn_curvature: bool = False,
    ) -> "HyperbolicTucker":
        """Add a hyperbolic part to a trained Tucker score, with all points at the origin.

        Every row of y gets one number more, the same for all its outputs: their order stays as it was (scores nearer
        to each other than rounding of the sum may become equal). The points have a gradient from the start.

        Args:
            tucker: a network with modes (out, in1, in2), without bias; or a `tnlayers.Bilinear`, which the layer holds
                from now on; or an `nn.Bilinear`, kept exactly, as a core without factors.
            curvature: c > 0.
            hyperbolic_dim: space coordinates of a point.
            learn_curvature: train c.

        Raises:
            TypeError: something else.
            ValueError: a network of another order than 3.

        Example:
            >>> import torch
            >>> from decompositions import Tucker
            >>> net = Tucker.random(row_modes=(7,), col_modes=(6, 5), rank=3)
            >>> layer, x1, x2 = HyperbolicTucker.from_tucker(net), torch.randn(4, 6), torch.randn(4, 5)
            >>> torch.equal(layer(x1, x2).argsort(), layer.tucker(x1, x2).argsort())
            True
        """
        if isinstance(tucker, nn.Bilinear):
            tucker = Bilinear.from_dense(tucker, _as_core)
        if isinstance(tucker, Network):
            if tucker.order != 3:
                raise ValueError(
                    f"HyperbolicTucker.from_tucker: expected a network of order 3, modes (out, in1, in2), got "
                    f"{tucker.shape}; pass a tnlayers.Bilinear for split modes"
                )
            out, first, second = tucker.shape
            tucker = Bilinear(first, second, out, bias=False, network=tucker)
        if not isinstance(tucker, Bilinear):
            raise TypeError(
                "HyperbolicTucker.from_tucker: expected a network or a bilinear layer, got "
                f"{type(tucker).__name__}; pass the network of its weight (out, in1, in2)"
            )
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._finish(tucker, curvature, hyperbolic_dim, learn_curvature, 0.0)
        return made.train(tucker.training)

    def forward(self, x1: Float[Tensor, "*batch n1"], x2: Float[Tensor, "*rows n2"]) -> Float[Tensor, "*batch m"]:
        """Scores y (..., out) of x1 (..., in1) and x2 (..., in2), for any equal leading axes."""
        score: Tensor = self.tucker(x1, x2)
        return score + self.interaction(x1, x2)

    def interaction(self, x1: Float[Tensor, "*batch n1"], x2: Float[Tensor, "*rows n2"]) -> Float[Tensor, "*batch m"]:
        """S alone, (..., out), in the precision of the points."""
        c = self.curvature()
        query = interaction_query(self.first(x1).to(self.points.dtype), self.second(x2).to(self.points.dtype), c)
        scores = interaction_scores(query.reshape(-1, query.shape[-1]), self.points, c)
        return scores.reshape(*x1.shape[:-1], -1)

    def lorentz_points(self) -> Float[Tensor, "m d1"]:
        """The points v_k of the outputs in Lorentz coordinates, (out, d + 1), time first."""
        return lift(self.points, self.curvature())

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw everything anew, as at the start: at the present ranks, the points at their std."""
        self.tucker.reset_parameters(generator)
        for linear in (self.first, self.second):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        nn.init.normal_(self.points, std=self.std, generator=generator)
        self.curvature.reset_parameters()

    def extra_repr(self) -> str:
        """Size of the points."""
        return f"hyperbolic_dim={self.points.shape[1]}"


def _as_core(weight: Tensor) -> Network:
    """A dense weight as the core of a Tucker network without factors."""
    return Tucker(weight, [], modes=(), num_rows=1)
