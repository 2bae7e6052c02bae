"""Published one-shot methods by their short names, as `compress(method=...)` takes them: for comparison."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from decompositions import LowRank, svd
from tnlayers.compression.calibration import LayerStatistics


def plain(weight: Tensor, layer: LayerStatistics, rank: int) -> LowRank:
    """Truncated SVD: what the data say does not matter."""
    net: Any = svd(weight, rank=rank)
    return net


METHODS: dict[str, Callable[[Tensor, LayerStatistics, int], LowRank]] = {"plain": plain}
