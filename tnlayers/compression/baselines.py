"""Published one-shot methods by their short names, as `compress(method=...)` takes them: for comparison."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from decompositions import ActivationFactor, LowRank, svd
from decompositions.calibrated import asvd, fisher_low_rank, output_pca, utilized_rank, whitened_svd
from tnlayers.compression.calibration import ActivationScale, LayerStatistics


def _plain(weight: Tensor, layer: LayerStatistics, rank: int) -> LowRank:
    """Truncated SVD: what the data say does not matter."""
    made: Any = svd(weight, rank=rank)
    return made


def _asvd(weight: Tensor, layer: LayerStatistics, rank: int) -> LowRank:
    """ASVD by mean magnitudes where they were collected (mode "diagonal"), else by root mean squares."""
    held = layer.inputs
    if isinstance(held, ActivationScale):
        return asvd(weight, (held.magnitudes / max(1, held.count)).to(weight.device), rank=rank)
    return asvd(weight, _factor("asvd", layer), rank=rank)


def _with_factor(weight: Tensor, layer: LayerStatistics, rank: int, *, method: Any, name: str) -> LowRank:
    """Methods of (weight, factor, rank)."""
    made: LowRank = method(weight, _factor(name, layer), rank=rank)
    return made


def _fisher(weight: Tensor, layer: LayerStatistics, rank: int) -> LowRank:
    """FWSVD with the squared gradients of the outputs: Fisher weights of the rows where inputs are alike."""
    held = layer.gradients
    if held is None:
        raise ValueError("compress: method='fisher' needs gradients; collect(..., gradients=True)")
    squares = held.squares if isinstance(held, ActivationScale) else held.factor.double().square().sum(0)
    return fisher_low_rank(weight, squares.to(weight.device), rank=rank)


def _factor(name: str, layer: LayerStatistics) -> ActivationFactor:
    if not isinstance(layer.inputs, ActivationFactor):
        raise ValueError(f"compress: method={name!r} needs factors of the inputs; collect(..., mode='factor')")
    return layer.inputs


METHODS: dict[str, Callable[[Tensor, LayerStatistics, int], LowRank]] = {
    "plain": _plain,
    "asvd": _asvd,
    "svd_llm": partial(_with_factor, method=whitened_svd, name="svd_llm"),
    "output_pca": partial(_with_factor, method=output_pca, name="output_pca"),
    "utilized_rank": partial(_with_factor, method=utilized_rank, name="utilized_rank"),
    "fisher": _fisher,
}
"""(weight, what its layer saw, rank) -> network; another method is one more row."""
