"""Transposed convolutions whose kernel is a network: the chain of the convolution, transposed step by step."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Inexact
from torch import Tensor, nn

from decompositions import Network
from tnlayers.conv import HINT_SIDE, ConvolutionLayer, Window
from tnlayers.conv_plan import ConvShape
from tnlayers.dense import NetworkFactory, Recipe
from tnlayers.frozen import frozen_weight
from tnlayers.init import default_std
from tnlayers.layer import Shapes


class _ConvTransposeNd(ConvolutionLayer):
    """What ConvTranspose1d, ConvTranspose2d and ConvTranspose3d share."""

    arguments = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
        "padding_mode",
    )
    _conv_transpose: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if padding_mode != "zeros":
            raise ValueError(f"{name}: padding_mode must be 'zeros', as in torch, got {padding_mode!r}")
        if isinstance(padding, str):
            raise ValueError(f"{name}: padding must be integers, got {padding!r}; a transposed convolution crops by it")
        self._start_conv((in_channels, out_channels), kernel_size, stride, dilation, groups)
        self.padding_mode = padding_mode
        self.padding = self._per_axis("padding", padding, 0)
        self.output_padding = self._per_axis("output_padding", output_padding, 0)
        for extra, step, spread in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if extra >= max(step, spread):
                raise ValueError(
                    f"{name}: output_padding must be below stride or dilation, got output_padding="
                    f"{self.output_padding}, stride={self.stride}, dilation={self.dilation}"
                )
        shape = (in_channels, out_channels // groups, *self.kernel_size)
        self._start(shape, network, recipe, dtype, device, default_std(shape))
        self._start_bias(bias)

    def out_spatial(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the output for those of the input."""
        return tuple(
            least + extra for least, extra in zip(self._least_spatial(spatial), self.output_padding, strict=True)
        )

    def _least_spatial(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the output without output_padding."""
        settings = zip(spatial, self.stride, self.padding, self.dilation, self.kernel_size, strict=True)
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in settings)

    def _shape(self, batch: int, spatial: Sequence[int]) -> ConvShape:
        spatial = tuple(max(n, 1) for n in spatial)
        out = tuple(max(n, 1) for n in self.out_spatial(spatial))
        return ConvShape(batch, spatial, out, self.kernel_size, self.groups, transposed=True)

    def forward(self, x: Inexact[Tensor, "..."], output_size: Sequence[int] | None = None) -> Inexact[Tensor, "..."]:
        """Transpose the convolution.

        Args:
            x: (batch, in_channels, *spatial) or (in_channels, *spatial).
            output_size: spatial sizes of y, or its whole shape: a strided convolution maps `stride` sizes onto x's,
                and this chooses one of them in place of output_padding.

        Returns:
            (batch, out_channels, *out_spatial), of size (n - 1) stride - 2 padding + dilation (k - 1) + 1 +
            output_padding along each axis.

        Raises:
            ValueError: shapes that do not fit, or an output_size out of range.
        """
        batched = self._batched(x)
        spatial = x.shape[-self.spatial_dims :]
        least = self._least_spatial(spatial)
        extra = self.output_padding if output_size is None else self._extra(output_size, least, x.ndim)
        out = tuple(low + more for low, more in zip(least, extra, strict=True))
        if min(spatial) < 1 or min(out) < 1:
            raise ValueError(
                f"{type(self).__name__}: x and y must have at least one position, got {tuple(spatial)} -> {out} for x "
                f"of {tuple(x.shape)} with padding={self.padding}"
            )
        y = self._recomputed(lambda x: self._transpose(x, extra), x if batched else x.unsqueeze(0))
        return y if batched else y.squeeze(0)

    def _extra(self, output_size: Sequence[int], least: Sequence[int], ndim: int) -> tuple[int, ...]:
        """Output padding that gives the size asked for."""
        name = type(self).__name__
        sizes = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,)
        if len(sizes) == ndim:
            sizes = sizes[-self.spatial_dims :]
        if len(sizes) != self.spatial_dims:
            raise ValueError(
                f"{name}: output_size needs {self.spatial_dims} entries, or {ndim} with those before, got {sizes}"
            )
        most = tuple(low + step - 1 for low, step in zip(least, self.stride, strict=True))
        if any(not low <= size <= high for low, size, high in zip(least, sizes, most, strict=True)):
            raise ValueError(
                f"{name}: output_size must be between {tuple(least)} and {most} for this input, got {sizes}"
            )
        return tuple(size - low for size, low in zip(sizes, least, strict=True))

    def _transpose(self, x: Tensor, extra: tuple[int, ...]) -> Tensor:
        kernel = frozen_weight(self)
        plan = self._conv_plan(x) if kernel is None else None
        if plan is None or plan.strategy == "merge":
            run, kernel = type(self)._conv_transpose, self.weight if kernel is None else kernel
            return run(x, kernel, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)
        return self._run_chain(plan, x, Window(self.stride, self.padding, self.dilation, extra))

    def _small(self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
        """Pointwise steps are plain convolutions: of a 1 x 1 kernel nothing is transposed but the channels."""
        if window == window.only((False,) * self.spatial_dims) and prod(weight.shape[3:]) == 1:
            return type(self)._conv(x, weight.flatten(0, 1).contiguous(), bias, groups=groups)
        weight = weight.transpose(1, 2).flatten(0, 1).contiguous()
        return type(self)._conv_transpose(
            x, weight, bias, window.stride, window.padding, window.output_padding, groups, window.dilation
        )

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Dense multiply-adds times two of one sample; of one input position where nothing was seen."""
        dims = len(weight_shape) - 2
        return 2 * prod(weight_shape) * (1 if seen is None else prod(seen.input[-dims:]))

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        """One sample; the input positions of a 32-sided input where nothing was seen."""
        side = (HINT_SIDE,) * self.spatial_dims if seen is None else seen.input[-self.spatial_dims :]
        return self._plans_at(1, side)[0], 1 if seen is not None else prod(side)


class ConvTranspose1d(_ConvTransposeNd):
    """`torch.nn.ConvTranspose1d` whose kernel is a network; see `ConvTranspose2d`.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import TT
        >>> layer = tnlayers.ConvTranspose1d(4, 6, 4, stride=2, padding=1, network=tnlayers.random_network(TT, rank=2))
        >>> layer(torch.ones(2, 4, 10)).shape
        torch.Size([2, 6, 20])
    """

    spatial_dims = 1
    dense_class = nn.ConvTranspose1d
    _conv = staticmethod(F.conv1d)
    _conv_transpose = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_ConvTransposeNd):
    """`torch.nn.ConvTranspose2d` whose kernel is a network, run as a chain of small convolutions.

    The linear map is the transpose of the convolution with the same kernel (in_channels, out_channels / groups, kh,
    kw), and so is the chain: see `Conv2d`. Channel legs are contracted pointwise, kernel legs are transposed
    convolutions along their own axes, each with that axis' stride, padding, output_padding and dilation. The order is
    chosen by predicted cost, the merged dense kernel being one candidate (`layer.plan()`).

    Args:
        in_channels: channels of x.
        out_channels: channels of y.
        kernel_size: as in torch, as are stride, padding, output_padding, groups and dilation.
        stride: see torch.
        padding: see torch: the output is cropped by it.
        output_padding: see torch; below stride or dilation.
        groups: see torch; the network stands for the kernel (in, out / groups, kh, kw).
        bias: whether to add a bias.
        dilation: see torch.
        padding_mode: "zeros", as in torch.
        device: of the cores and the bias.
        dtype: of the cores and the bias.
        network: a Network, or a callable (shape, dtype, device) -> Network such as `tnlayers.random_network(...)`. Its
            rows are the input channels: axis 0 of torch's weight.
        recipe: a callable dense kernel -> Network.

    Raises:
        ValueError: settings that torch refuses, or a network that does not fit the kernel.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import Tucker
        >>> factory = tnlayers.random_network(Tucker, rank=(4, 2), modes=(0, 1))
        >>> layer = tnlayers.ConvTranspose2d(8, 4, 3, stride=2, padding=1, network=factory)
        >>> layer(torch.ones(2, 8, 5, 5)).shape, layer(torch.ones(2, 8, 5, 5), output_size=(10, 9)).shape
        (torch.Size([2, 4, 9, 9]), torch.Size([2, 4, 10, 9]))
    """

    spatial_dims = 2
    dense_class = nn.ConvTranspose2d
    _conv = staticmethod(F.conv2d)
    _conv_transpose = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_ConvTransposeNd):
    """`torch.nn.ConvTranspose3d` whose kernel is a network; see `ConvTranspose2d`.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.ConvTranspose3d(2, 4, 3, network=tnlayers.random_network(LowRank, rank=2))
        >>> layer(torch.ones(1, 2, 5, 5, 5)).shape
        torch.Size([1, 4, 7, 7, 7])
    """

    spatial_dims = 3
    dense_class = nn.ConvTranspose3d
    _conv = staticmethod(F.conv3d)
    _conv_transpose = staticmethod(F.conv_transpose3d)
