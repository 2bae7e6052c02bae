"""Weaknesses that were measured in other libraries, each as a test that must pass here (numbers in the names)."""

from functools import partial

import pytest
import torch
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, hosvd, st_hosvd, svd, to_matrix, tt_svd, ttm_svd, tucker2

MODES = {"row_modes": (4, 4, 8, 8), "col_modes": (4, 4, 8, 8)}


def test_01_tt_matrix_initialisation_is_not_zero():
    """Seen: weight deviation 1.9e-9 where 0.018 was asked, gradients 6e-14."""
    layer = tnlayers.Linear(1024, 1024, network=tnlayers.random_network(TTMatrix, rank=8, **MODES))
    assert float(to_matrix(layer.network.detach()).std()) == pytest.approx((3 * 1024) ** -0.5, rel=1e-3)
    layer(torch.randn(32, 1024)).square().mean().backward()
    assert min(float(core.grad.norm()) for core in layer.cores) > 1e-3


def test_03_no_bias_stays_no_bias():
    """Seen: a random bias instead, output norm 0.91 at x = 0."""
    layer = tnlayers.Linear.from_dense(nn.Linear(16, 16, bias=False), svd)
    assert float(layer(torch.zeros(1, 16)).detach().norm()) == 0


def test_04_conv_settings_survive():
    """Seen: stride (2, 1) became (2, 2), circular padding was ignored, groups and "same" raised."""
    for settings in (
        {"stride": (2, 1)},
        {"padding": 1, "padding_mode": "circular"},
        {"groups": 4},
        {"padding": "same"},
    ):
        dense = nn.Conv2d(8, 8, 3, **settings).double()
        x = torch.randn(1, 8, 9, 8, dtype=torch.float64)
        assert torch.allclose(tnlayers.Conv2d.from_dense(dense, tucker2)(x), dense(x), atol=1e-12)


def test_05_the_padding_row_is_the_padding_row():
    """Seen: norm 1.23 instead of 0."""
    dense = nn.Embedding(20, 8, padding_idx=2)
    assert float(tnlayers.Embedding.from_dense(dense, partial(svd, rank=2))(torch.tensor([2])).detach().norm()) == 0


@pytest.mark.usefixtures("unchecked")
def test_08_ranks_larger_than_modes_and_prime_sizes():
    """Seen: rank 99 on a mode of 4 accepted, rank 0.0001 a ZeroDivisionError, primes an IndexError."""
    x = torch.randn(4, 5, 6)
    with pytest.raises(ValueError, match=r"rank of mode 0 must be in 1\.\.4 .*, got 99"):
        hosvd(x, rank=(99, 5, 6))
    assert st_hosvd(x, rank=99).ranks == (4, 5, 6)  # an int is a cap for all
    with pytest.raises(TypeError, match=r"0\.0001"):
        Tucker.random(row_modes=(4, 4), rank=0.0001)
    layer = tnlayers.Linear.from_dense(nn.Linear(7, 13), partial(ttm_svd, order=2))
    assert layer(torch.zeros(3, 7)).shape == (3, 13)


def test_09_empty_batch():
    """Seen: RuntimeError, ambiguous reshape."""
    layer = tnlayers.Linear(16, 4, network=tnlayers.random_network(TTMatrix, rank=2))
    assert layer(torch.zeros(0, 16)).shape == (0, 4)


def test_10_bfloat16_weights_decompose_and_other_ranks_load():
    """Seen: linalg_svd not implemented for BFloat16; a state dict of another rank raised."""
    dense = nn.Linear(16, 16, dtype=torch.bfloat16)
    assert tnlayers.Linear.from_dense(dense, partial(svd, rank=4)).network.dtype == torch.bfloat16
    small = tnlayers.Linear(16, 16, network=tnlayers.random_network(LowRank, rank=2))
    large = tnlayers.Linear(16, 16, network=tnlayers.random_network(LowRank, rank=5))
    small.load_state_dict(large.state_dict())
    assert small.network.ranks == (5, 5)


def test_11_every_conversion_reports_its_error():
    """Seen: 64 % error and no report."""
    (row,) = tnlayers.tensorize(nn.Sequential(nn.Linear(64, 64)), partial(svd, rank=4)).rows
    assert 0.5 < row.error < 1


@pytest.mark.parametrize("decompose", [svd, hosvd, st_hosvd, tt_svd, tucker2, ttm_svd])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_14_22_infinite_and_nan_entries_are_refused_at_once(decompose, value):
    """Seen: non-finite factors in silence, or a hang."""
    x = torch.randn(6, 6)
    x[2, 3] = value
    with pytest.raises(ValueError, match="must be finite, got"):
        decompose(x)


def test_14_zero_tensors_are_fine():
    """Seen: LinAlgError, singular."""
    for decompose in (svd, hosvd, tt_svd, tucker2, partial(ttm_svd, order=2)):
        net = decompose(torch.zeros(6, 6), tol=0.1)
        assert float(to_matrix(net).abs().max()) == 0
        assert set(net.ranks) == {1}


def test_15_ranks_are_never_larger_than_the_tensor_has():
    """Seen: a 9^3 core for a 6^3 tensor."""
    assert hosvd(torch.randn(6, 6, 6), rank=9).core.shape == (6, 6, 6)


def test_20_a_tolerance_below_the_dtype_is_said():
    """Seen: eps 1e-10 in float32 gave 1.5e-6 without a word."""
    from decompositions import TruncationWarning

    with pytest.warns(TruncationWarning, match="expected relative error <= 1e-10, got"):
        tt_svd(torch.randn(6, 6, 6), tol=1e-10)
