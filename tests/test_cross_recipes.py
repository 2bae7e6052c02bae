"""Crosses as recipes of layers, and on a weight that stays in its file."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tnlayers
from cross_approx import SafetensorsSource, skeleton, tt_cross
from decompositions import to_matrix


def low_rank(rows, columns, rank, rng):
    left, right = torch.randn(rows, rank, generator=rng), torch.randn(rank, columns, generator=rng)
    return left @ right / rank**0.5


@pytest.mark.parametrize("cross", [tt_cross, skeleton])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.Linear])
def test_a_cross_is_a_recipe(cross, kind, rng):
    model = nn.ModuleDict({"emb": kind(120, 64)})
    weight = low_rank(*model["emb"].weight.shape, 5, rng)
    model["emb"].weight.data.copy_(weight)
    tnlayers.tensorize(model, {"emb": partial(cross, tol=1e-3, generator=rng)})
    assert isinstance(model["emb"], tnlayers.Embedding | tnlayers.Linear)
    assert max(model["emb"].network.ranks) == 5
    with torch.no_grad():
        assert float((model["emb"].weight - weight).norm() / weight.norm()) <= 1e-3


def test_a_weight_that_stays_in_its_file(tmp_path, rng):
    weight = low_rank(6_000, 40, 3, rng)
    save_file({"emb.weight": weight, "other": torch.zeros(3)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(
        tmp_path / "model.safetensors", "emb.weight", chunk_bytes=20 * 40 * 4, cache_bytes=1 << 20
    )
    result = skeleton(source, tol=1e-4, held_out=40, generator=rng)
    assert result.converged
    assert result.evaluations < weight.numel() // 3
    assert result.bytes_read <= weight.numel() * 4  # every piece of the file at most once
    layer = tnlayers.Embedding(*weight.shape, network=lambda shape, dtype, device: result.network)
    with torch.no_grad():
        assert float((layer.weight - weight).norm() / weight.norm()) <= 1e-4
    assert to_matrix(result.network).shape == weight.shape
