"""Linear layer: `y = x W^T + b` with W a network."""

from math import prod
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor, nn

from decompositions import Network, Plan, plan_apply
from decompositions.formats.plan import bucket
from decompositions.formats.program import multiply
from tnlayers.dense import NetworkFactory, Recipe, copy_settings, exactly, run_recipe, unchanged_rng
from tnlayers.frozen import Form, Forms, best_cut, frozen_linear, merge, product_seconds
from tnlayers.init import default_std
from tnlayers.layer import NetworkLayer, Shapes


class Linear(NetworkLayer):
    """`torch.nn.Linear` whose weight is a network: `y = x W^T + b`, W of shape (out_features, in_features).

    Modes may cover more than the widths (prime widths): x is padded with zeros and y cut. Cost of a call: that of the
    plan, see `layer.plan()` and `decompositions.explain(layer.network)`.

    Args:
        in_features: width of x.
        out_features: width of y.
        bias: whether to add a bias; False stays without.
        device: of the cores and the bias.
        dtype: of the cores and the bias.
        network: a Network, or a callable (shape, dtype, device) -> Network such as `tnlayers.random_network(...)`.
        recipe: a callable dense weight -> Network, applied to a weight drawn like torch's; the result is rescaled to
            its standard deviation.

    Raises:
        ValueError: neither or both of network and recipe; a network that does not cover the weight.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import TTMatrix
        >>> layer = tnlayers.Linear(20, 12, network=tnlayers.random_network(TTMatrix, rank=3))
        >>> layer(torch.ones(7, 20)).shape, layer.weight.shape
        (torch.Size([7, 12]), torch.Size([12, 20]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Linear: widths must be at least 1, got in={in_features}, out={out_features}")
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self._start(shape, network, recipe, dtype, device, default_std(shape))
        first = self.cores[0]
        self.bias = nn.Parameter(torch.empty(out_features, dtype=first.dtype, device=first.device)) if bias else None
        self._reset_rest()

    @classmethod
    def from_dense(cls, linear: nn.Module, recipe: Recipe) -> "Linear":
        """Layer that stands in for a trained `nn.Linear`: weight by recipe, bias and settings kept.

        Args:
            linear: an `nn.Linear` (out x in), or a Hugging Face `Conv1D`, whose weight is in x out.
            recipe: a callable dense weight (out, in) -> Network.

        Raises:
            TypeError: not such a layer.

        Example:
            >>> from functools import partial
            >>> from torch import nn
            >>> from decompositions import svd
            >>> Linear.from_dense(nn.Linear(6, 4, bias=False), partial(svd, rank=2)).bias is None
            True
        """
        weight = dense_linear_weight(linear)
        net = run_recipe("Linear.from_dense", recipe, weight.detach())
        bias = linear.bias
        with unchanged_rng(weight.device):
            layer = cls(weight.shape[1], weight.shape[0], bias is not None, network=net)
        copy_settings(linear, layer, linear.weight, bias)  # type: ignore[arg-type]
        return layer

    def to_dense_module(self) -> nn.Linear:
        """Return the `nn.Linear` with the same function."""
        first = self.cores[0]
        with unchanged_rng(first.device):
            dense = nn.Linear(
                self.in_features, self.out_features, self.bias is not None, device=first.device, dtype=first.dtype
            )
        with torch.no_grad(), exactly(first.device):
            dense.weight.copy_(self.weight)
        copy_settings(self, dense, first, self.bias)
        return dense

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features), differentiable with respect to the cores."""
        return self._shaped(self._dense())

    def _shaped(self, dense: Tensor) -> Tensor:
        return dense.reshape(prod(self._row_modes), -1)[: self.out_features, : self.in_features]

    def forward(self, x: Inexact[Tensor, "*batch n"]) -> Inexact[Tensor, "*batch m"]:
        """Return `x W^T + b`, for any leading axes, an empty batch included."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Linear: the last axis of x must be in_features, expected {self.in_features}, got {tuple(x.shape)}"
            )
        if (y := frozen_linear(self, x)) is not None:
            return y
        batch_shape = x.shape[:-1]
        batch, width, out = prod(batch_shape), prod(self._col_modes), prod(self._row_modes)
        if width > self.in_features:
            x = torch.nn.functional.pad(x, (0, width - self.in_features))
        x = x.reshape(batch, *self._col_modes)
        exact = out == self.out_features
        bias = self.bias if exact else None
        if self._window is not None and (moved := self._in_window(x, batch)) is not None:
            return moved.reshape(*batch_shape, self.out_features)
        plan, memory = self._plan_for(batch), self._workspace
        y = multiply(plan, x, self._core_list(), bias, recompute=self._recompute, workspace=memory).reshape(batch, out)
        if not exact:
            y = y[:, : self.out_features]
            if self.bias is not None:
                y = y + self.bias.to(y.dtype)  # under autocast y is in the low precision, as torch's is
        return y.reshape(*batch_shape, self.out_features)

    def _in_window(self, x: Tensor, batch: int) -> Tensor | None:
        """The product at the point of a window that has not moved, by the gradient's cheapest route; None otherwise."""
        window, bias, probes = self._window, self.bias, self._active_probes()
        plain = x.dtype == self.cores[0].dtype and not torch.is_autocast_enabled(x.device.type)
        if window is None or not window.at_point(probes) or not plain:
            return None
        if self._point_plan(batch) == "merge":
            y = x.flatten(1) @ self._dense().reshape(prod(self._row_modes), -1).mT
        else:
            made = window.multiply(x.flatten(1), probes)
            if made is None:
                return None
            y = made
        y = y[:, : self.out_features]
        return y if bias is None else y + bias.to(y.dtype)

    def _point_plan(self, batch: int) -> str:
        """Strategy of the fastest plan at the point of the window, whose ranks are not doubled."""
        window = self._window
        assert window is not None
        key = bucket(batch), "point"
        if key not in self._plans:
            self._plans[key] = min(plan_apply(window.at.net, key[0]), key=self.rank_plan).strategy
        found: str = self._plans[key]
        return found

    def alternatives(self, batch: int | None = None) -> tuple[Plan, ...]:
        """All plans considered for `batch` rows, best predicted first (forward and backward)."""
        return plan_apply(self.network, batch or self._hint or 1024)

    def example_input(self, batch: int) -> Tensor:
        """A random input of `batch` rows."""
        first = self.cores[0]
        return torch.rand(batch, self.in_features, device=first.device).to(first.dtype)

    def _frozen_forms(self, batch: int | None) -> Forms:
        """The dense weight, and the product of two matrices where a cut separates columns from rows."""
        rows = bucket(batch or self._hint or 1024)
        item, out, width = self.cores[0].itemsize, self.out_features, self.in_features
        dense = Form("dense", product_seconds(rows, width, out, item), item * out * width)
        live = min(plan.forward_seconds for plan in self.alternatives(rows))
        cut = best_cut(self.network)
        if cut is None:
            return Forms(live, (dense,))
        seconds = product_seconds(rows, width, cut.rank, item) + product_seconds(rows, cut.rank, out, item)
        return Forms(live, (dense, Form("factors", seconds, item * cut.rank * (out + width), cut)))

    def _merge(self, form: Form) -> tuple[Tensor, Tensor | None]:
        weight, inner = merge(self.network, form.cut)
        if inner is not None:
            return weight[: self.out_features].contiguous(), inner[:, : self.in_features].contiguous()
        return self._shaped(weight).contiguous(), None

    def flops(self, batch: int = 1) -> int:
        """Multiply-adds times two of one forward pass over `batch` rows, without the bias."""
        return self._make_plan(batch).flops

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Dense multiply-adds times two of one sample, all its rows."""
        return 2 * prod(weight_shape) * (1 if seen is None else prod(seen.input[1:-1]))

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        """All rows of one sample."""
        return self._make_plan(1 if seen is None else max(1, prod(seen.input[1:-1]))), 1

    def plan_for_shapes(self, seen: Shapes) -> None:
        """Make the stored plan for a call with these shapes: all leading axes of x are rows."""
        self.plan(batch=max(1, prod(seen.input[:-1])))

    def settings(self) -> dict[str, Any]:
        """Widths and whether there is a bias."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Widths, bias, format and equation."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._repr_network()}"
        )


def dense_linear_weight(linear: nn.Module) -> Tensor:
    """Weight (out, in) of an `nn.Linear`, or of a transposed one as Hugging Face's `Conv1D`."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(f"Linear.from_dense: expected a torch.nn.Linear, got {type(linear).__name__}")
    if isinstance(linear, nn.Linear):
        return weight
    if type(linear).__name__ == "Conv1D" and hasattr(linear, "nf"):
        return weight.T
    raise TypeError(f"Linear.from_dense: expected a torch.nn.Linear or Conv1D, got {type(linear).__name__}")
