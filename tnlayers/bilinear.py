"""A bilinear map whose weight is a network."""

from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompositions import Network, as_operator
from decompositions.formats.plan import BATCH, Plan, plan_path, run
from tnlayers.dense import NetworkFactory, Recipe, copy_settings, exactly, run_recipe, unchanged_rng
from tnlayers.init import RandomNetwork
from tnlayers.layer import NetworkLayer, Shapes


class Bilinear(NetworkLayer):
    """`torch.nn.Bilinear`, `y_k = sum_ij W_kij x1_i x2_j + b_k`, whose weight (out, in1, in2) is a network.

    Both inputs meet the cores along a planned path, batched over rows; the dense weight is not formed. A Tucker network
    is the score of TuckER, a CP network that of CP and DistMult. The dense weight starts with the standard deviation of
    torch's.

    Args:
        in1_features: width of x1.
        in2_features: width of x2.
        out_features: width of y.
        bias: whether to add a bias.
        device: of the cores and the bias.
        dtype: of the cores and the bias.
        network: a Network with row modes that multiply to out and column modes to in1, then in2; or a callable
            ((out, in1, in2), dtype, device) -> Network such as `tnlayers.random_network(Tucker, rank=8)`.
        recipe: a callable dense weight -> Network.

    Raises:
        ValueError: sizes below 1; neither or both of network and recipe; a network whose modes do not line up.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import Tucker
        >>> layer = tnlayers.Bilinear(6, 5, 7, network=tnlayers.random_network(Tucker, rank=(4, 3, 2)))
        >>> layer(torch.ones(2, 3, 6), torch.ones(2, 3, 5)).shape, layer.network.ranks
        (torch.Size([2, 3, 7]), (4, 3, 2))
    """

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        if min(in1_features, in2_features, out_features) < 1:
            raise ValueError(
                f"Bilinear: widths must be at least 1, got in1 = {in1_features}, in2 = {in2_features}, "
                f"out = {out_features}"
            )
        self.in1_features, self.in2_features, self.out_features = in1_features, in2_features, out_features
        if isinstance(network, RandomNetwork):
            network = network.or_modes((out_features,), (in1_features, in2_features))
        shape = (out_features, in1_features, in2_features)
        self._start(shape, network, recipe, dtype, device, self._bound / 3**0.5)
        first = self.cores[0]
        self.bias = nn.Parameter(torch.empty(out_features, dtype=first.dtype, device=first.device)) if bias else None
        self._reset_rest()

    @property
    def _bound(self) -> float:
        """Torch draws weight and bias from U(-b, b)."""
        return float(self.in1_features**-0.5)

    def _reset_rest(self, generator: torch.Generator | None = None) -> None:
        if self.bias is not None:
            nn.init.uniform_(self.bias, -self._bound, self._bound, generator=generator)

    def _fit(self, net: Network) -> Network:
        """Refuse a network whose modes are not those of the weight, or split ones."""
        if not isinstance(net, Network):
            raise TypeError(f"Bilinear: network must be a decompositions.Network, got {type(net).__name__}")
        if not net.cols and net.order == 3:
            net = as_operator(net, 1)
        cols, (out, first, second) = net.col_modes, self.weight_shape
        splits = [k for k in range(1, len(cols)) if prod(cols[:k]) == first and prod(cols[k:]) == second]
        if prod(net.row_modes) != out or not splits:
            raise ValueError(
                f"Bilinear: the modes of the network must be those of the weight, expected rows {out} and columns "
                f"{first}, {second} (or split ones), got rows {net.row_modes} and columns {cols}"
            )
        self._split = splits[0]
        return net

    @classmethod
    def from_dense(cls, bilinear: nn.Module, recipe: Recipe) -> "Bilinear":
        """Layer that stands in for a trained `nn.Bilinear`: weight by recipe, bias and settings kept.

        Args:
            bilinear: an `nn.Bilinear`.
            recipe: a callable dense weight (out, in1, in2) -> Network.

        Raises:
            TypeError: another module.

        Example:
            >>> from functools import partial
            >>> from torch import nn
            >>> from decompositions import hosvd
            >>> Bilinear.from_dense(nn.Bilinear(4, 5, 6), partial(hosvd, rank=3)).network.ranks
            (3, 3, 3)
        """
        if not isinstance(bilinear, nn.Bilinear):
            raise TypeError(f"Bilinear.from_dense: expected a torch.nn.Bilinear, got {type(bilinear).__name__}")
        weight, bias = bilinear.weight, bilinear.bias
        net = run_recipe("Bilinear.from_dense", recipe, weight.detach())
        with unchanged_rng(weight.device):
            layer = cls(weight.shape[1], weight.shape[2], weight.shape[0], bias is not None, network=net)
        copy_settings(bilinear, layer, weight, bias)
        return layer

    def to_dense_module(self) -> nn.Bilinear:
        """Return the `nn.Bilinear` with the same function."""
        first = self.cores[0]
        with unchanged_rng(first.device):
            dense = nn.Bilinear(**self.settings(), device=first.device, dtype=first.dtype)
        with torch.no_grad(), exactly(first.device):
            dense.weight.copy_(self.weight)
        copy_settings(self, dense, first, self.bias)
        return dense

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in1, in2), differentiable with respect to the cores."""
        return self._dense().reshape(self.weight_shape)

    def forward(self, x1: Float[Tensor, "*batch n1"], x2: Float[Tensor, "*batch n2"]) -> Float[Tensor, "*batch m"]:
        """Contract both inputs with the cores, for any equal leading axes."""
        if x1.shape[-1:] != (self.in1_features,) or x2.shape != (*x1.shape[:-1], self.in2_features):
            raise ValueError(
                f"Bilinear: expected x1 (..., {self.in1_features}) and x2 (..., {self.in2_features}) with equal "
                f"leading axes, got {tuple(x1.shape)} and {tuple(x2.shape)}"
            )
        batch = x1.shape[:-1]
        rows, modes = prod(batch), self._col_modes
        plan, cores = self._plan_for(rows), self._core_list()
        x1, x2 = x1.reshape(rows, *modes[: self._split]), x2.reshape(rows, *modes[self._split :])
        second = x2
        y = self._recomputed(lambda x: run(plan.steps, [x, second, *cores]), x1)
        y = y.reshape(*batch, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def alternatives(self, batch: int | None = None) -> tuple[Plan, ...]:
        """The planned path over both inputs and the cores."""
        net, rows = self.network, batch or self._hint or 1024
        legs = ((BATCH, *net.cols[: self._split]), (BATCH, *net.cols[self._split :]), *net.legs)
        path = plan_path(legs, {**net.sizes, BATCH: rows}, (BATCH, *net.rows), net.dtype.itemsize)
        return (path._replace(seconds=3 * path.forward_seconds),)

    def example_input(self, batch: int) -> Any:
        """Random inputs of `batch` rows, both."""
        first = self.cores[0]
        widths = (self.in1_features, self.in2_features)
        return tuple(torch.rand(batch, width, device=first.device).to(first.dtype) for width in widths)

    def flops(self, batch: int = 1) -> int:
        """Multiply-adds times two of one forward pass over `batch` rows, without the bias."""
        return self._make_plan(batch).flops

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Dense multiply-adds times two of one sample, all its rows: the weight with x2, then with x1."""
        out, first, second = weight_shape
        return 2 * out * first * (second + 1) * (1 if seen is None else prod(seen.input[1:-1]))

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        return self._make_plan(1 if seen is None else max(1, prod(seen.input[1:-1]))), 1

    def plan_for_shapes(self, seen: Shapes) -> None:
        """Make the stored plan for a call with these shapes: all leading axes are rows."""
        self.plan(batch=max(1, prod(seen.input[:-1])))

    def settings(self) -> dict[str, Any]:
        """Widths and whether there is a bias."""
        names = ("in1_features", "in2_features", "out_features")
        return {**{name: getattr(self, name) for name in names}, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Widths, bias, format and equation."""
        return (
            f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._repr_network()}"
        )
