"""What a layer's weight is multiplied with, as rows: the inputs of a matrix, the patches of a kernel."""

from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor, nn

from tnlayers.contraction_layers import TensorRegression
from tnlayers.conv import Conv1d, Conv2d, Conv3d
from tnlayers.embedding import Embedding
from tnlayers.embedding_bag import EmbeddingBag
from tnlayers.layer import NetworkLayer
from tnlayers.linear import Linear
from tnlayers.surgery import stand_in_for

MATRICES: tuple[type[NetworkLayer], ...] = (Linear, TensorRegression)
KERNELS: tuple[type[NetworkLayer], ...] = (Conv1d, Conv2d, Conv3d)
TABLES: tuple[type[NetworkLayer], ...] = (Embedding, EmbeddingBag)


def kind_of(module: nn.Module) -> str:
    """How a module meets its weight: "matrix", "kernel", "table" (rows are picked), or "" for another way.

    Example:
        >>> kind_of(nn.Linear(3, 2)), kind_of(nn.Conv2d(3, 2, 3)), kind_of(nn.Embedding(9, 2)), kind_of(nn.ReLU())
        ('matrix', 'kernel', 'table', '')
    """
    layer = stand_in_for(module)
    for kind, classes in (("matrix", MATRICES), ("kernel", KERNELS), ("table", TABLES)):
        if layer in classes:
            return kind
    return ""


def features_of(module: nn.Module) -> tuple[int, int]:
    """Widths of the rows of inputs and of outputs.

    Example:
        >>> features_of(nn.Linear(3, 2)), features_of(nn.Conv2d(4, 6, 3, groups=2)), features_of(nn.Embedding(9, 2))
        ((3, 2), (18, 6), (9, 2))
    """
    weight: Any = module.weight
    if kind_of(module) == "table" or not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return weight.shape[0], weight.shape[1]  # tables, and matrices kept as (in, out)
    return weight[0].numel(), weight.shape[0]


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Rows (..., features) that the weight is multiplied with; a view where there is one.

    For a kernel (out, in / groups, *k) these are its patches, (batch, *positions, groups, in / groups * prod(k)), the
    channel outermost, as in `torch.nn.functional.unfold`. Groups are pooled, each patch of a group a row of its
    own: all outputs are weighed by the mean over the groups, though each reads its own group alone.

    Example:
        >>> conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
        >>> x = torch.randn(5, 4, 8, 8)
        >>> rows = input_rows(conv, x)
        >>> by_hand = torch.einsum("...gf,gof->...go", rows, conv.weight.reshape(2, 3, -1)).flatten(-2) + conv.bias
        >>> rows.shape, torch.allclose(by_hand, conv(x).movedim(1, -1), atol=1e-5)
        (torch.Size([5, 4, 4, 2, 18]), True)
    """
    if kind_of(module) != "kernel":
        features = features_of(module)[0]
        return x if x.shape[-1] == features else x.flatten(-_trailing(x, features))
    conv: Any = module
    sides = len(conv.kernel_size)
    if x.ndim == sides + 1:  # without a batch
        x = x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(conv._reversed_padding_repeated_twice):
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    batch, channels = x.shape[:2]
    positions, kernel = x.shape[2 : 2 + sides], x.shape[2 + sides :]
    x = x.unflatten(1, (conv.groups, channels // conv.groups)).movedim((1, 2), (1 + sides, 2 + sides))
    return x.reshape(batch, *positions, conv.groups, channels // conv.groups * kernel.numel())


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Rows (..., out) of an output.

    Example:
        >>> output_rows(nn.Conv2d(4, 6, 3), torch.zeros(5, 6, 7, 8)).shape
        torch.Size([5, 7, 8, 6])
    """
    if kind_of(module) == "kernel":
        sides = y.ndim - 2 if y.ndim == len(module.kernel_size) + 2 else y.ndim - 1  # type: ignore[arg-type]
        return y.movedim(-1 - sides, -1)
    width = features_of(module)[1]
    return y if y.ndim and y.shape[-1] == width else y.flatten(-_trailing(y, width))


def _trailing(x: Tensor, features: int) -> int:
    """How many of the last axes hold the features together."""
    count, size = 0, 1
    while size < features and count < x.ndim:
        count += 1
        size *= x.shape[-count]
    if size != features:
        raise ValueError(f"calibration: the last axes must hold {features} features, got shape {tuple(x.shape)}")
    return max(count, 1)


def rows_in(module: nn.Module, x: Tensor) -> int:
    """How many rows `input_rows` has; positions where a module meets its weight in another way.

    Example:
        >>> rows_in(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(5, 4, 8, 8))
        360
    """
    features = features_of(module)[0]
    if kind_of(module) in ("kernel", "matrix"):
        x = input_rows(module, torch.empty_like(x, device="meta"))
    return x.numel() // features


def uses(module: nn.Module, x: Inexact[Tensor, "..."] | Tensor) -> Tensor:
    """How often every row of a table is picked, (rows,), in float64; the padding row never.

    Example:
        >>> uses(nn.Embedding(4, 2, padding_idx=0), torch.tensor([[1, 1, 3, 0]])).tolist()
        [0.0, 2.0, 0.0, 1.0]
    """
    table: Any = module
    if x.numel() and not (int(x.min()) >= 0 and int(x.max()) < len(table.weight)):
        got = int(x.max()) if int(x.max()) >= len(table.weight) else int(x.min())
        raise ValueError(
            f"numbers of rows must be in 0..{len(table.weight) - 1}, got {got}; is it the model's own tokenizer?"
        )
    counts = torch.bincount(x.reshape(-1), minlength=len(table.weight)).double()
    if table.padding_idx is not None:
        counts[table.padding_idx] = 0
    return counts
