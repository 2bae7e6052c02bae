"""One model with every kind of layer, for what is too slow to be asked of each: compilation, export, ONNX."""

from functools import partial

import torch
from torch import nn

import tnlayers
from decompositions import TT, LowRank, TTMatrix, Tucker, plan_apply

FORMATS = {
    "low_rank": partial(tnlayers.random_network, LowRank, 3),
    "tucker": partial(tnlayers.random_network, Tucker, 2),
    "tucker2": partial(tnlayers.random_network, Tucker, 2),
    "tt": partial(tnlayers.random_network, TT, 3),
    "ttm": partial(tnlayers.random_network, TTMatrix, 3, order=2),
    "ttm4": partial(tnlayers.random_network, TTMatrix, 2, order=4),
}
KERNELS = {**FORMATS, "tucker2": partial(tnlayers.random_network, Tucker, (4, 2), modes=(0, 1))}


class Everything(nn.Module):
    """Linear (prime widths, three axes), Conv1d/2d/3d, Embedding; each of its own input."""

    def __init__(self, format: str) -> None:
        super().__init__()
        network, kernel = FORMATS[format], KERNELS[format]
        self.linear = tnlayers.Linear(13, 7, network=network())
        self.wide = tnlayers.Linear(24, 32, bias=False, network=network())
        self.conv1 = tnlayers.Conv1d(4, 6, 3, padding="same", network=kernel())
        self.conv2 = tnlayers.Conv2d(4, 8, 3, stride=2, groups=2, padding=1, network=kernel())
        self.conv3 = tnlayers.Conv3d(2, 4, (3, 1, 2), network=kernel())
        self.embedding = tnlayers.Embedding(31, 8, padding_idx=2, network=network())

    def forward(self, x, wide, x1, x2, x3, tokens):
        return (
            self.linear(x),
            self.wide(wide),
            self.conv1(x1),
            self.conv2(x2),
            self.conv3(x3),
            self.embedding(tokens),
        )

    def force(self, merged: bool) -> None:
        """Make every stored plan the best one that merges the cores first, or the best one that does not."""
        for layer in (self.linear, self.wide):
            self._store(layer, plan_apply(layer.network, 8), merged)
        for conv in (self.conv1, self.conv2, self.conv3):
            self._store(conv, conv._plans_at(8, (8,) * conv.spatial_dims), merged)
        tokens = 10**6 if merged else 1
        self.embedding._stored = self.embedding._make_plan(tokens)

    @staticmethod
    def _store(layer, plans, merged) -> None:
        layer._stored = next((plan for plan in plans if (plan.strategy == "merge") == merged), plans[0])


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    """An input for each layer; the last axes of the convolutions are as short as they may be."""
    return (
        torch.randn(batch, 2, 13),
        torch.randn(batch, 24),
        torch.randn(batch, 4, 5),
        torch.randn(batch, 4, 4, 3),
        torch.randn(batch, 2, 3, 1, 2),
        torch.randint(0, 31, (batch, 3)),
    )


def close(first, second, tolerance: float = 1e-5) -> bool:
    """Whether two tuples of results agree, relative to the largest entry of each."""
    return all(
        a.shape == b.shape
        and torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max().clamp_min(1)))
        for a, b in zip(first, second, strict=True)
    )
