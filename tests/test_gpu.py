"""The same numbers on a CUDA device; skipped where there is none."""

from functools import partial

import pytest
import torch
from torch import nn

import tnlayers
from decompositions import TT, LowRank, TTMatrix, Tucker, svd, to_dense, tt_svd, ttm_svd, tucker2
from decompositions import round as cut
from tnlayers.surgery import stand_in_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FORMATS = (LowRank, Tucker, TT, TTMatrix)


@pytest.mark.parametrize("recipe", [svd, tt_svd, tucker2, partial(ttm_svd, order=2)])
def test_layers_equal_their_dense_layers(recipe):
    for dense, x in (
        (nn.Linear(20, 13), torch.randn(4, 20)),
        (nn.Conv2d(8, 12, 3, padding=1, groups=2), torch.randn(2, 8, 9, 9)),
        (nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2, output_padding=1), torch.randn(2, 8, 5, 5)),
        (nn.Embedding(30, 8, padding_idx=1), torch.randint(0, 30, (3, 4))),
        (nn.EmbeddingBag(30, 8, mode="sum", padding_idx=1), torch.randint(0, 30, (3, 4))),
        (nn.EmbeddingBag(30, 8, mode="max", padding_idx=1), torch.randint(0, 30, (3, 4))),
    ):
        dense = dense.double().cuda()
        x = x.cuda() if x.dtype == torch.int64 else x.double().cuda()
        layer = stand_in_for(dense).from_dense(dense, recipe)
        assert layer.network.device.type == "cuda"
        assert torch.allclose(layer(x), dense(x), atol=1e-11)


@pytest.mark.parametrize("format", FORMATS)
def test_moves_rank_changes_and_training(format):
    layer = tnlayers.Linear(24, 18, network=tnlayers.random_network(format, rank=4), device="cuda")
    wanted = layer.cpu()(torch.ones(2, 24))
    layer.cuda()
    assert torch.allclose(layer(torch.ones(2, 24, device="cuda")).cpu(), wanted, atol=1e-4)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(2, 24, device="cuda")).sum().backward()
    optimizer.step()
    layer.set_network(cut(layer.network.detach(), rank=2))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        layer(torch.ones(2, 24, device="cuda")).float().sum().backward()
    assert bool(torch.isfinite(to_dense(layer.network)).all())


def test_files_load_on_the_device(tmp_path):
    model = nn.Sequential(tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=2), device="cuda"))
    again = tnlayers.load(tnlayers.save(model, tmp_path / "net"), nn.Sequential(nn.Linear(8, 8)), device="cuda")
    assert torch.equal(again[0].weight, model[0].weight)
