"""A layer between two fixed shuffles of its features, kept as index buffers."""

from collections.abc import Sequence

import torch
from jaxtyping import Inexact, Int
from torch import Tensor, nn

Order = Sequence[int] | Int[Tensor, "n"] | None


class Shuffled(nn.Module):
    """`y = layer(x[..., cols])[..., rows]`: the weight W[rows][:, inverse of cols] of a layer with weight W.

    A network has as many shuffles as its labels name; all others, in front and behind, are these buffers. They are
    saved with the model, move with it, and are no parameters. Inside, the layer is as any other: conversion, reports,
    rank changes and optimizers see it.

    Args:
        layer: any tensor layer (or torch layer) that maps the last axis, or channels.
        rows: a permutation of the output features, in gather form: output k is output rows[k] of the layer.
        cols: a permutation of the input features: input k of the layer is x[..., cols[k]].
        dim: axis of the features in x and y: -1, or 1 for convolutions.

    Raises:
        ValueError: an order that is no permutation, or of another length than the layer has features.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import Monarch
        >>> inner = tnlayers.Linear(16, 16, network=tnlayers.random_network(Monarch, rank=1, order=2))
        >>> layer = Shuffled(inner, rows=torch.randperm(16), cols=torch.randperm(16))
        >>> layer(torch.randn(3, 16)).shape, sorted(layer.state_dict())[0]
        (torch.Size([3, 16]), 'cols')
    """

    def __init__(self, layer: nn.Module, rows: Order = None, cols: Order = None, *, dim: int = -1) -> None:
        super().__init__()
        self.layer = layer
        self.dim = dim
        widths = _widths(layer)
        self.rows: Tensor | None
        self.cols: Tensor | None
        self.register_buffer("rows", _permutation("rows", rows, widths[0]))
        self.register_buffer("cols", _permutation("cols", cols, widths[1]))

    def forward(self, x: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """Shuffle, apply the layer, shuffle."""
        x = x if self.cols is None else x.index_select(self.dim, self.cols)
        y: Tensor = self.layer(x)
        return y if self.rows is None else y.index_select(self.dim, self.rows)

    @property
    def weight(self) -> Tensor:
        """The dense weight of the whole, differentiable."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        weight = weight if self.rows is None else weight.index_select(0, self.rows)
        return weight if self.cols is None else weight.index_select(1, torch.argsort(self.cols))

    def extra_repr(self) -> str:
        """Which sides are shuffled."""
        sides = [name for name in ("rows", "cols") if getattr(self, name) is not None]
        return f"{', '.join(sides) or 'no'} shuffled, dim={self.dim}"


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Output and input features of a layer."""
    for out, into in (("out_features", "in_features"), ("out_channels", "in_channels")):
        if hasattr(layer, out) and hasattr(layer, into):
            return int(getattr(layer, out)), int(getattr(layer, into))
    raise ValueError(
        f"Shuffled: expected a layer with in_features and out_features (or channels), got {type(layer).__name__}"
    )


def _permutation(name: str, order: Order, width: int) -> Tensor | None:
    if order is None:
        return None
    found = torch.as_tensor(order)
    whole = found.ndim == 1 and not found.is_floating_point() and not found.is_complex() and found.dtype != torch.bool
    if not whole or sorted(found.tolist()) != list(range(width)):
        raise ValueError(
            f"Shuffled: {name} must be a permutation of 0..{width - 1}, the layer's features on that side, got "
            f"{str(found.tolist())[:60]}"
        )
    return found.to(torch.int64).clone()
