"""Layers between tensors: contract the axes of an activation without flattening them away."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Inexact
from torch import Tensor, nn

from decompositions import Network, Plan, TTMatrix, as_operator, plan_apply
from decompositions.formats.program import multiply
from tnlayers.dense import NetworkFactory, Recipe, copy_settings, exactly, run_recipe, unchanged_rng
from tnlayers.init import RandomNetwork, default_std, random_network
from tnlayers.layer import NetworkLayer, Shapes

L = TypeVar("L", bound="TensorRegression")


class FlatLinear(nn.Linear):
    """`nn.Linear` between tensors: the dense module that stands for a TensorRegression or a TensorContraction.

    The last axes of x, `in_modes`, are flattened; y has `out_modes` in their place. The weight is (prod(out_modes),
    prod(in_modes)).

    Args:
        in_modes: sizes of the last axes of x.
        out_modes: sizes of the last axes of y; () for one number.
        bias: whether to add a bias.
        device: of the weight and the bias.
        dtype: of the weight and the bias.

    Example:
        >>> import torch
        >>> FlatLinear((3, 4), (2, 5))(torch.ones(7, 3, 4)).shape
        torch.Size([7, 2, 5])
    """

    def __init__(
        self,
        in_modes: Sequence[int],
        out_modes: Sequence[int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(prod(in_modes), prod(out_modes), bias, device, dtype)
        self.in_modes, self.out_modes = tuple(in_modes), tuple(out_modes)

    def forward(self, x: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """Flatten, multiply, give y its modes."""
        batch = x.shape[: x.ndim - len(self.in_modes)]
        return super().forward(x.reshape(*batch, self.in_features)).reshape(batch + self.out_modes)

    def extra_repr(self) -> str:
        """Modes and bias."""
        return f"in_modes={self.in_modes}, out_modes={self.out_modes}, bias={self.bias is not None}"


class TensorRegression(NetworkLayer):
    """Tensor regression layer: `y[.., m..] = sum over n.. of W[m.., n..] x[.., n..] + b[m..]` with W a network.

    The axes of x keep their meaning: W, of modes out_modes + in_modes, may be a Tucker, a TT, or any other network, and
    x is contracted with its cores without being flattened. Modes of the network may split or join neighbouring axes,
    as long as they line up (a LowRank takes all of them as one). Cost: that of the plan, `layer.plan()`.

    Args:
        in_modes: sizes of the last axes of x, those that are contracted.
        out_modes: sizes of the last axes of y; () for one number.
        bias: whether to add a bias.
        device: of the cores and the bias.
        dtype: of the cores and the bias.
        network: a Network with columns in_modes and rows out_modes, or a callable (out_modes + in_modes, dtype,
            device) -> Network such as `tnlayers.random_network(Tucker, rank=4)`.
        recipe: a callable dense tensor of shape out_modes + in_modes -> Network, applied to one drawn like the weight
            of `nn.Linear`.

    Raises:
        ValueError: modes below 1; neither or both of network and recipe; a network whose modes do not line up.

    References:
        J. Kossaifi, Z. Lipton, A. Kolbeinsson, A. Khanna, T. Furlanello, A. Anandkumar, Tensor regression networks,
        JMLR 2020, eq. 10, arXiv 1707.08308.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import Tucker
        >>> factory = tnlayers.random_network(Tucker, rank=(5, 4, 3, 3))
        >>> layer = tnlayers.TensorRegression((16, 7, 7), (10,), network=factory)
        >>> layer(torch.ones(2, 16, 7, 7)).shape, layer.network.row_modes, layer.network.col_modes
        (torch.Size([2, 10]), (10,), (16, 7, 7))
    """

    default: ClassVar[RandomNetwork | None] = None
    """Network of a fresh layer for which none was asked; None asks for one."""

    def __init__(
        self,
        in_modes: Sequence[int],
        out_modes: Sequence[int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        self.in_modes = self._read_modes("in_modes", in_modes, 1)
        self.out_modes = self._read_modes("out_modes", out_modes, 0)
        modes = (*self.out_modes, *self.in_modes)
        if network is None and recipe is None:
            network = self.default
        if isinstance(network, RandomNetwork):
            network = network.or_modes(self.out_modes, self.in_modes)
        elif network is not None and not isinstance(network, Network):
            make = network
            network = lambda _, dtype, device: make(modes, dtype, device)  # noqa: E731
        if recipe is not None:
            fit = recipe
            recipe = lambda matrix: fit(matrix.reshape(modes))  # noqa: E731
        shape = (prod(self.out_modes), prod(self.in_modes))
        self._start(shape, network, recipe, dtype, device, default_std(shape))
        first = self.cores[0]
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=first.dtype, device=first.device)) if bias else None
        self._reset_rest()

    def _read_modes(self, what: str, modes: Sequence[int], least: int) -> tuple[int, ...]:
        values = tuple(modes) if isinstance(modes, Sequence) else None
        if values is None or len(values) < least or any(not isinstance(n, int) or n < 1 for n in values):
            raise ValueError(f"{type(self).__name__}: {what} must be sizes >= 1, at least {least}, got {modes!r}")
        return values

    def _fit(self, net: Network) -> Network:
        """Refuse a network whose modes are not those of the layer, split or joined."""
        name = type(self).__name__
        if not isinstance(net, Network):
            raise TypeError(f"{name}: network must be a decompositions.Network, got {type(net).__name__}")
        if not net.cols and net.order > len(self.out_modes):
            net = as_operator(net, len(self.out_modes))
        if not (_line_up(net.row_modes, self.out_modes) and _line_up(net.col_modes, self.in_modes)):
            raise ValueError(
                f"{name}: the modes of the network must line up with the layer's, expected rows {self.out_modes} and "
                f"columns {self.in_modes} (split, or neighbours joined), got rows {net.row_modes} and columns "
                f"{net.col_modes}"
            )
        return net

    @classmethod
    def from_dense(
        cls: type[L],
        linear: nn.Module,
        recipe: Recipe,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
    ) -> L:
        """Layer that stands in for a trained linear map of flattened activations.

        Args:
            linear: a `FlatLinear` (what `to_dense_module` returns), or an `nn.Linear` that was applied to flattened x.
            recipe: a callable dense tensor of shape out_modes + in_modes -> Network.
            in_modes: how in_features was flattened; needed for an `nn.Linear`.
            out_modes: how out_features is to be read; (out_features,) by default.

        Raises:
            TypeError: another module.
            ValueError: modes that do not multiply to the widths.

        Example:
            >>> from functools import partial
            >>> from torch import nn
            >>> from decompositions import hosvd
            >>> dense = nn.Linear(8 * 5 * 5, 10)  # behind nn.Flatten
            >>> TensorRegression.from_dense(dense, partial(hosvd, rank=4), in_modes=(8, 5, 5)).network.ranks
            (4, 4, 4, 4)
        """
        name = f"{cls.__name__}.from_dense"
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name}: expected a torch.nn.Linear, got {type(linear).__name__}")
        known: Any = linear if isinstance(linear, FlatLinear) else None
        if in_modes is None and known is None:
            raise ValueError(
                f"{name}: expected in_modes, how in_features = {linear.in_features} was flattened, got None"
            )
        columns = tuple(known.in_modes if in_modes is None else in_modes)
        if out_modes is None:
            out_modes = (linear.out_features,) if known is None else known.out_modes
        rows = tuple(out_modes)
        if prod(columns) != linear.in_features or prod(rows) != linear.out_features:
            raise ValueError(
                f"{name}: modes must multiply to the widths, expected {linear.in_features} and "
                f"{linear.out_features}, got in_modes={columns} and out_modes={rows}"
            )
        net = run_recipe(name, recipe, linear.weight.detach().reshape(*rows, *columns))
        with unchanged_rng(linear.weight.device):
            layer = cls(columns, rows, linear.bias is not None, network=net)
        copy_settings(linear, layer, linear.weight, linear.bias)
        return layer

    def to_dense_module(self) -> FlatLinear:
        """Return the dense module with the same function."""
        first = self.cores[0]
        with unchanged_rng(first.device):
            dense = FlatLinear(self.in_modes, self.out_modes, self.bias is not None, first.device, first.dtype)
        with torch.no_grad(), exactly(first.device):
            dense.weight.copy_(self.weight)
        copy_settings(self, dense, first, self.bias)
        return dense

    @property
    def weight(self) -> Tensor:
        """The dense weight as a matrix (prod(out_modes), prod(in_modes)), differentiable with respect to the cores."""
        return self._dense().reshape(self.weight_shape)

    def forward(self, x: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """Contract the last axes of x: (*batch, *in_modes) -> (*batch, *out_modes), for any batch axes or none."""
        name, first, order = type(self).__name__, self.cores[0], len(self.in_modes)
        if tuple(x.shape[-order:]) != self.in_modes:
            raise ValueError(
                f"{name}: the last axes of x must be in_modes, expected (..., {', '.join(map(str, self.in_modes))}), "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != first.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: x must have the dtype of the cores, expected {first.dtype}, got {x.dtype}")
        batch_shape = x.shape[: x.ndim - order]
        batch = prod(batch_shape)
        y = multiply(
            self._plan_for(batch),
            x.reshape(batch, *self._col_modes),
            self._core_list(),
            self.bias,
            recompute=self._recompute,
            workspace=self._workspace,
        )
        return y.reshape(batch_shape + self.out_modes)

    def alternatives(self, batch: int | None = None) -> tuple[Plan, ...]:
        """All plans considered for `batch` rows, best predicted first (forward and backward)."""
        return plan_apply(self.network, batch or self._hint or 1024)

    def example_input(self, batch: int) -> Tensor:
        """A random input of `batch` rows."""
        first = self.cores[0]
        return torch.rand(batch, *self.in_modes, device=first.device).to(first.dtype)

    def flops(self, batch: int = 1) -> int:
        """Multiply-adds times two of one forward pass over `batch` rows, without the bias."""
        return self._make_plan(batch).flops

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Dense multiply-adds times two of one sample, all its rows."""
        return 2 * prod(weight_shape) * _rows(seen, weight_shape[1])

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        """All rows of one sample."""
        return self._make_plan(_rows(seen, self.weight_shape[1])), 1

    def plan_for_shapes(self, seen: Shapes) -> None:
        """Make the stored plan for a call with these shapes: all leading axes of x are rows."""
        self.plan(batch=max(1, prod(seen.input) // self.weight_shape[1]))

    def settings(self) -> dict[str, Any]:
        """Modes and whether there is a bias."""
        return {"in_modes": list(self.in_modes), "out_modes": list(self.out_modes), "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Modes, bias, format and equation."""
        return (
            f"in_modes={self.in_modes}, out_modes={self.out_modes}, bias={self.bias is not None}, "
            f"{self._repr_network()}"
        )


class TensorContraction(TensorRegression):
    """Tensor contraction layer: every axis of an activation is multiplied by a matrix, `y = x x_1 U_1 ... x_d U_d + b`.

    The operator is a Kronecker product of d matrices (out_modes[k], in_modes[k]): a TT-matrix of rank 1, and that is
    the default network; it keeps its axes, so that the ranks may be raised later (`set_network`), and any other network
    with columns in_modes and rows out_modes will do. Parameters: sum_k m_k n_k. Where one side has fewer modes, the
    others are contracted with a vector.

    Args:
        in_modes: sizes of the last axes of x.
        out_modes: sizes of the last axes of y.
        bias: whether to add a bias.
        device: of the cores and the bias.
        dtype: of the cores and the bias.
        network: another Network, or a callable as for `TensorRegression`; a product of matrices by default.
        recipe: a callable dense tensor of shape out_modes + in_modes -> Network.

    Raises:
        ValueError: as `TensorRegression`.

    References:
        J. Kossaifi, A. Khanna, Z. Lipton, T. Furlanello, A. Anandkumar, Tensor contraction layers for parsimonious deep
        nets, CVPR workshops 2017, eq. 5, arXiv 1706.00439.

    Example:
        >>> import torch, tnlayers
        >>> layer = tnlayers.TensorContraction((16, 7, 7), (8, 3, 3))
        >>> layer(torch.ones(2, 16, 7, 7)).shape, layer.numel() == 16 * 8 + 7 * 3 + 7 * 3
        (torch.Size([2, 8, 3, 3]), True)
    """

    default = random_network(TTMatrix, rank=1)


def _line_up(modes: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether the modes are the axes, each split or neighbours joined: (4, 3) is neither of (3, 4)."""
    have, need = (set(accumulate(sizes, mul, initial=1)) for sizes in (modes, axes))
    return prod(modes) == prod(axes) and (have <= need or have >= need)


def _rows(seen: Shapes | None, width: int) -> int:
    """Rows of one sample: its leading axes."""
    return 1 if seen is None else max(1, prod(seen.input[1:]) // width)
