"""Convolutions whose kernel is a network, run as a chain of small convolutions."""

from collections.abc import Callable, Sequence
from math import ceil, prod, sqrt
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Inexact
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.plan import bucket, extend, plan_dense
from decompositions.linalg import spectral_bound
from tnlayers.conv_plan import ConvPlan, ConvShape, ConvStep, conv_plans
from tnlayers.dense import NetworkFactory, Recipe, copy_settings, exactly, run_recipe, unchanged_rng
from tnlayers.frozen import Form, Forms, frozen_weight, merge
from tnlayers.init import default_std
from tnlayers.layer import NetworkLayer, Shapes, probed

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
HINT_SIDE = 32
"""Spatial size that a plan is made for before the layer has seen an input."""


C = TypeVar("C", bound="ConvolutionLayer")


class Window(NamedTuple):
    """How a kernel is laid over x, one entry a spatial axis; `output_padding` is that of transposed convolutions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    def only(self, dims: Sequence[bool]) -> "Window":
        """Return the window that does the same on the chosen axes and nothing on the others."""
        return Window(*(_where(dims, own, idle) for own, idle in zip(self, (1, 0, 1, 0), strict=True)))


class ConvolutionLayer(NetworkLayer):
    """What convolutions and transposed ones share; `spatial_dims` is the number of kernel axes."""

    spatial_dims: ClassVar[int]
    dense_class: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]
    """Names, besides bias, that torch's constructor, ours and the attributes share: the settings."""
    _conv: ClassVar[Callable[..., Tensor]]

    def _start_conv(
        self,
        channels: tuple[int, int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
    ) -> None:
        """Check and keep the settings that both kinds read in the same way."""
        name = type(self).__name__
        self.in_channels, self.out_channels = channels
        if groups < 1 or min(channels) < 1 or any(count % groups for count in channels):
            raise ValueError(
                f"{name}: groups must divide both channel counts, got in_channels={channels[0]}, "
                f"out_channels={channels[1]}, groups={groups}"
            )
        self.groups = groups
        self.kernel_size = self._per_axis("kernel_size", kernel_size, 1)
        self.stride = self._per_axis("stride", stride, 1)
        self.dilation = self._per_axis("dilation", dilation, 1)
        self._hint_spatial = (HINT_SIDE,) * self.spatial_dims

    def _start_bias(self, bias: bool) -> None:
        first = self.cores[0]
        fresh = torch.empty(self.out_channels, dtype=first.dtype, device=first.device)
        self.bias = nn.Parameter(fresh) if bias else None
        self._reset_rest()

    def _per_axis(self, what: str, value: int | Sequence[int], least: int) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, Sequence) else (value,) * self.spatial_dims
        if len(values) != self.spatial_dims or any(not isinstance(v, int) or v < least for v in values):
            raise ValueError(
                f"{type(self).__name__}: {what} needs {self.spatial_dims} integers >= {least}, got {value!r}"
            )
        return values

    @classmethod
    def from_dense(cls: type[C], conv: nn.Module, recipe: Recipe) -> C:
        """Layer that stands in for a trained convolution: kernel by recipe, every setting kept.

        Args:
            conv: the `torch.nn` convolution of the same dimension.
            recipe: a callable dense kernel, of torch's shape -> Network.

        Raises:
            TypeError: another module.
        """
        if not isinstance(conv, cls.dense_class):
            raise TypeError(
                f"{cls.__name__}.from_dense: expected a torch.nn.{cls.dense_class.__name__}, got {type(conv).__name__}"
            )
        source: Any = conv
        net = run_recipe(f"{cls.__name__}.from_dense", recipe, source.weight.detach())
        make: Any = cls
        with unchanged_rng(source.weight.device):
            settings = {name: getattr(source, name) for name in cls.arguments}
            layer: C = make(**settings, bias=source.bias is not None, network=net)
        copy_settings(source, layer, source.weight, source.bias)
        return layer

    def to_dense_module(self) -> nn.Module:
        """Return the `torch.nn` convolution with the same function."""
        first = self.cores[0]
        with unchanged_rng(first.device):
            settings = {name: getattr(self, name) for name in self.arguments}
            dense: Any = self.dense_class(
                **settings, bias=self.bias is not None, device=first.device, dtype=first.dtype
            )
        with torch.no_grad(), exactly(first.device):
            dense.weight.copy_(self.weight)
        copy_settings(self, dense, first, self.bias)
        return dense

    @property
    def weight(self) -> Tensor:
        """The dense kernel, of torch's shape, differentiable with respect to the cores."""
        return self._shaped(self._dense())

    def _shaped(self, dense: Tensor) -> Tensor:
        matrix = dense.reshape(prod(self._row_modes), -1)
        return matrix[: self.weight_shape[0]].reshape(self.weight_shape)

    def out_spatial(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the output for those of the input."""
        raise TypeError("ConvolutionLayer.out_spatial: expected a layer, got the base")

    def _shape(self, batch: int, spatial: Sequence[int]) -> ConvShape:
        """What plans depend on, for an input of this size."""
        raise TypeError("ConvolutionLayer._shape: expected a layer, got the base")

    def _small(self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
        """Run one step of a chain: `weight` is (groups, out / groups, in / groups, *kernel)."""
        raise TypeError("ConvolutionLayer._small: expected a layer, got the base")

    def alternatives(self, batch: int | None = None) -> tuple[ConvPlan, ...]:
        """All plans considered for `batch` inputs of the size the stored plan was made for, best predicted first."""
        return self._plans_at(batch or self._hint or 1024, self._hint_spatial)

    def example_input(self, batch: int) -> Tensor:
        """A random batch of the size the stored plan was made for."""
        first = self.cores[0]
        return torch.rand(batch, self.in_channels, *self._hint_spatial, device=first.device).to(first.dtype)

    def _hint_sizes(self) -> tuple[int, ...]:
        return self._hint_spatial

    def plan_for_shapes(self, seen: Shapes) -> None:
        """Make the stored plan for a call with these shapes, spatial sizes included."""
        self._hint_spatial = seen.input[-self.spatial_dims :]
        self.plan(batch=seen.input[0] if len(seen.input) == self.spatial_dims + 2 else 1)

    def _plans_at(self, batch: int, spatial: Sequence[int]) -> tuple[ConvPlan, ...]:
        net, shape = self.network, self._shape(batch, spatial)
        sizes = tuple(net.sizes.items())
        return conv_plans(net.legs, net.rows, net.cols, sizes, self.weight_shape, shape, net.dtype.itemsize)

    def _conv_plan(self, x: Tensor) -> ConvPlan:
        """The stored plan while tracing, else the one for the powers of two above this batch and these sizes."""
        if torch.compiler.is_compiling():
            return self._stored
        if self._forced is not None:
            return self._forced
        rows, sizes = bucket(x.shape[0]), tuple(x.shape[2:])
        key = (rows, *map(bucket, sizes))
        plan = self._plans.get(key)
        if plan is None:
            plan = probed.get(self._probe_key(rows)) if probed and sizes == self._hint_spatial else None
            plan = self._plans[key] = plan or self._plans_at(rows, key[1:])[0]
            if self._hint is None and x.shape[0] > 0:
                self._hint, self._hint_spatial, self._stored = x.shape[0], tuple(x.shape[2:]), plan
        return plan

    def _batched(self, x: Tensor) -> bool:
        """Whether x has a batch axis; other shapes are refused."""
        dims = self.spatial_dims
        if x.ndim not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            axes = ", ".join("HWD"[:dims]) if dims > 1 else "L"
            raise ValueError(
                f"{type(self).__name__}: x must be ([batch,] channels, {axes}) with {self.in_channels} channels, "
                f"got {tuple(x.shape)}"
            )
        return x.ndim == dims + 2

    def _run_chain(self, plan: ConvPlan, x: Tensor, window: Window) -> Tensor:
        cores = self._core_list()
        for split in plan.splits:
            cores[split.core] = cores[split.core].unflatten(split.axis, split.sizes)
        operands = extend(plan.steps, cores)
        channels = list(plan.channels)
        plain = plan.permute == tuple(range(len(plan.permute)))
        for position, step in enumerate(plan.chain):
            last = position == len(plan.chain) - 1 and plain and step.free == 0
            x, channels = self._absorb(step, operands[step.operand], x, channels, window, self.bias if last else None)
        if not plain:
            spatial = x.shape[2:]
            x = x.reshape(x.shape[0], *channels, *spatial)
            order = [0, *(1 + k for k in plan.permute), *range(1 + len(channels), x.ndim)]
            x = x.permute(order).reshape(x.shape[0], prod(channels), *spatial)
        fused = plain and plan.chain[-1].free == 0
        if self.bias is not None and not fused:
            x = x + self.bias.to(x.dtype).reshape(-1, *(1 for _ in range(self.spatial_dims)))
        return x

    def _absorb(
        self,
        step: ConvStep,
        core: Tensor,
        x: Tensor,
        channels: list[int],
        window: Window,
        bias: Tensor | None,
    ) -> tuple[Tensor, list[int]]:
        """One small convolution: free channels ride in the batch, kept ones are groups, contracted ones are summed."""
        batch, spatial = x.shape[0], x.shape[2:]
        core = core.permute(step.axes)
        shape = core.shape
        kept, new = shape[: step.kept], shape[step.kept : step.kept + step.new]
        contracted = shape[step.kept + step.new : step.kept + step.new + step.contracted]
        kernel = _where(step.own, self.kernel_size, 1)
        weight = core.reshape(prod(kept), prod(new), prod(contracted), *kernel)
        free = [channels[k] for k in step.order[: step.free]]
        if step.free or step.order != tuple(range(len(step.order))):
            x = x.reshape(batch, *channels, *spatial)
            order = [0, *(1 + k for k in step.order), *range(1 + len(channels), x.ndim)]
            x = x.permute(order).reshape(batch * prod(free), prod(kept) * prod(contracted), *spatial)
        y = self._small(x, weight, bias, window.only(step.dims), prod(kept))
        if step.free:
            y = y.reshape(batch, prod(free) * prod(kept) * prod(new), *y.shape[2:])
        return y, [*free, *kept, *new]

    def _frozen_forms(self, batch: int | None) -> Forms:
        """The dense kernel, at the spatial sizes of the stored plan."""
        plans, cores = self.alternatives(bucket(batch or self._hint or 1024)), plan_dense(self.network)
        merged = next(plan for plan in plans if plan.strategy == "merge")
        made = merged._replace(steps=(), flops=merged.flops - cores.flops, bytes=merged.bytes - cores.bytes)
        form = Form("dense", made.forward_seconds, self.cores[0].itemsize * prod(self.weight_shape))
        return Forms(plans[0].forward_seconds, (form,))

    def _merge(self, form: Form) -> tuple[Tensor, Tensor | None]:
        return self._shaped(merge(self.network, None)[0]).contiguous(), None

    def flops(self, batch: int = 1, *spatial: int) -> int:
        """Multiply-adds times two of one forward pass over `batch` inputs of the given size (default: 32 a side)."""
        return self._plans_at(batch, spatial or (HINT_SIDE,) * self.spatial_dims)[0].flops

    def output_bound(self, difference: Tensor) -> float:
        """Bound of `‖y - y'‖ / ‖padded x‖`: an entry of x meets at most prod ceil(k / stride) kernel positions."""
        repeats = prod(ceil(k / s) for k, s in zip(self.kernel_size, self.stride, strict=True))
        return sqrt(repeats) * spectral_bound(difference.flatten(1))

    def settings(self) -> dict[str, Any]:
        """Everything torch's constructor takes."""
        plain = {name: getattr(self, name) for name in self.arguments}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
        return {**plain, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Torch's line, then format and equation."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for what, default in (("padding", 0), ("output_padding", 0), ("dilation", 1)):
            if getattr(self, what, default) not in (default, (default,) * self.spatial_dims):
                text += f", {what}={getattr(self, what)}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, bias={self.bias is not None}, {self._repr_network()}"


def _where(chosen: Sequence[bool], values: Sequence[int], otherwise: int) -> tuple[int, ...]:
    return tuple(value if here else otherwise for here, value in zip(chosen, values, strict=True))


class _ConvNd(ConvolutionLayer):
    """What Conv1d, Conv2d and Conv3d share."""

    arguments = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"{type(self).__name__}: padding_mode must be one of {tuple(PADDING_MODES)}, got {padding_mode!r}"
            )
        self._start_conv((in_channels, out_channels), kernel_size, stride, dilation, groups)
        self.padding_mode = padding_mode
        self.padding, self._pads = self._read_padding(padding)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._start(shape, network, recipe, dtype, device, default_std(shape))
        self._start_bias(bias)

    def _read_padding(
        self, padding: int | str | Sequence[int]
    ) -> tuple[str | tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Return torch's attribute, and the zeros before and after each axis."""
        if not isinstance(padding, str):
            widths = self._per_axis("padding", padding, 0)
            return widths, tuple((width, width) for width in widths)
        if padding == "valid":
            return padding, ((0, 0),) * self.spatial_dims
        if padding != "same":
            raise ValueError(f"{type(self).__name__}: padding must be integers, 'same' or 'valid', got {padding!r}")
        if any(stride != 1 for stride in self.stride):
            raise ValueError(f"{type(self).__name__}: padding='same' needs stride 1, got stride={self.stride}")
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return padding, tuple((total // 2, total - total // 2) for total in totals)

    def out_spatial(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the output for those of the input."""
        return tuple(
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, (before, after), d, k, s in zip(
                spatial, self._pads, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )

    def _shape(self, batch: int, spatial: Sequence[int]) -> ConvShape:
        at_least = [max(n, d * (k - 1) + 1) for n, d, k in zip(spatial, self.dilation, self.kernel_size, strict=True)]
        return ConvShape(batch, tuple(at_least), self.out_spatial(at_least), self.kernel_size, self.groups)

    def forward(self, x: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """Convolve: x is (batch, in_channels, *spatial) or (in_channels, *spatial), as for torch's layer."""
        batched = self._batched(x)
        y = self._recomputed(self._convolve, x if batched else x.unsqueeze(0))
        return y if batched else y.squeeze(0)

    def _convolve(self, x: Tensor) -> Tensor:
        kernel = frozen_weight(self)
        plan = self._conv_plan(x) if kernel is None else None
        padding = tuple(before for before, _ in self._pads)
        uneven = any(before != after for before, after in self._pads)
        if self.padding_mode != "zeros" or uneven:
            widths = [width for pair in reversed(self._pads) for width in pair]
            x = F.pad(x, widths, mode=PADDING_MODES[self.padding_mode])
            padding = (0,) * self.spatial_dims
        if plan is None or plan.strategy == "merge":
            conv, kernel = type(self)._conv, self.weight if kernel is None else kernel
            return conv(x, kernel, self.bias, self.stride, padding, self.dilation, self.groups)
        return self._run_chain(plan, x, Window(self.stride, padding, self.dilation, (0,) * self.spatial_dims))

    def _small(self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
        # contiguous: some backward kernels refuse a transposed weight
        weight = weight.flatten(0, 1).contiguous()
        return type(self)._conv(x, weight, bias, window.stride, window.padding, window.dilation, groups)

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Dense multiply-adds times two of one sample; of one output position where nothing was seen."""
        dims = len(weight_shape) - 2
        return 2 * prod(weight_shape) * (1 if seen is None else prod(seen.output[-dims:]))

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        """One sample; the output positions of a 32-sided input where nothing was seen."""
        side = (HINT_SIDE,) * self.spatial_dims if seen is None else seen.input[-self.spatial_dims :]
        return self._plans_at(1, side)[0], 1 if seen is not None else max(1, prod(self.out_spatial(side)))


class Conv1d(_ConvNd):
    """`torch.nn.Conv1d` whose kernel is a network; see `Conv2d`.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import TT
        >>> layer = tnlayers.Conv1d(4, 6, 3, padding="same", network=tnlayers.random_network(TT, rank=2))
        >>> layer(torch.ones(2, 4, 10)).shape
        torch.Size([2, 6, 10])
    """

    spatial_dims = 1
    dense_class = nn.Conv1d
    _conv = staticmethod(F.conv1d)


class Conv2d(_ConvNd):
    """`torch.nn.Conv2d` whose kernel is a network, run as a chain of small convolutions.

    Every core is absorbed into x in turn: its channel legs are contracted, its kernel legs are convolved. Tucker-2
    runs as 1x1, k x k, 1x1; a TT with axes (1, 2, 3, 0) as 1x1, k x 1, 1 x k, 1x1; networks that do not line up with
    the axes of the kernel use the merged dense kernel. The order is chosen by predicted cost (`layer.plan()`).

    Args:
        in_channels: channels of x.
        out_channels: channels of y.
        kernel_size: as in torch, as are stride, padding ("same" and "valid" too), dilation, groups and padding_mode.
        stride: see torch.
        padding: see torch.
        dilation: see torch.
        groups: see torch; the network stands for the kernel (out, in / groups, kh, kw).
        bias: whether to add a bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: of the cores and the bias.
        dtype: of the cores and the bias.
        network: a Network, or a callable (shape, dtype, device) -> Network such as `tnlayers.random_network(...)`.
        recipe: a callable dense kernel -> Network.

    Raises:
        ValueError: settings that torch refuses too; neither or both of network and recipe; a network that does not
            cover the kernel.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import Tucker
        >>> factory = tnlayers.random_network(Tucker, rank=(4, 2), modes=(0, 1))
        >>> layer = tnlayers.Conv2d(3, 8, 3, stride=(2, 1), padding=1, network=factory)
        >>> layer(torch.ones(2, 3, 8, 8)).shape, layer.weight.shape
        (torch.Size([2, 8, 4, 8]), torch.Size([8, 3, 3, 3]))
    """

    spatial_dims = 2
    dense_class = nn.Conv2d
    _conv = staticmethod(F.conv2d)


class Conv3d(_ConvNd):
    """`torch.nn.Conv3d` whose kernel is a network; see `Conv2d`.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Conv3d(2, 4, 3, network=tnlayers.random_network(LowRank, rank=2))
        >>> layer(torch.ones(1, 2, 5, 5, 5)).shape
        torch.Size([1, 4, 3, 3, 3])
    """

    spatial_dims = 3
    dense_class = nn.Conv3d
    _conv = staticmethod(F.conv3d)
