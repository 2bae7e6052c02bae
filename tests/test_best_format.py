"""Every format tried at one budget: what fits fits, what is printed is true, and a member is recognized."""

import pytest
import reference
import torch

from decompositions import (
    TT,
    LowRank,
    Monarch,
    Network,
    TTMatrix,
    best_format,
    numel,
    to_dense,
    to_matrix,
)

F64 = torch.float64


@pytest.mark.parametrize("shape", [(36, 30), (23, 17), (8, 6, 3, 3)])
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_what_is_printed_is_true(shape, share, rng):
    w = torch.randn(shape, dtype=F64, generator=rng)
    trials = best_format(w, share, generator=rng)
    formats = {type(row.network).__name__ for row in trials.rows if row.network is not None}
    assert len(formats) >= 4
    matrix = w.flatten(1)
    for row in trials.rows:
        if row.network is None:
            assert row.parameters > trials.budget
            continue
        assert numel(row.network) == row.parameters <= trials.budget == int(share * w.numel())
        padded = torch.zeros(to_matrix(row.network).shape, dtype=F64)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        assert row.error == pytest.approx(reference.relative(to_matrix(row.network), padded), rel=1e-9)
    errors = [row.error for row in trials.rows]
    assert errors == sorted(errors)
    assert isinstance(trials.best, Network)
    lines = str(trials).splitlines()
    assert len(lines) == 2 + len(trials.rows)
    assert lines[2].startswith(trials.rows[0].name)


@pytest.mark.parametrize(
    "truth",
    [
        LowRank.random(row_modes=(36,), col_modes=(36,), rank=2, dtype=F64),
        TTMatrix.random(row_modes=(6, 6), col_modes=(6, 6), rank=2, dtype=F64),
        Monarch.random(row_modes=(6, 6), col_modes=(6, 6), dtype=F64),
        TT.random(row_modes=(6, 6), col_modes=(6, 6), rank=3, dtype=F64),
    ],
    ids=lambda net: type(net).__name__,
)
def test_a_member_is_recognized(truth):
    w = to_matrix(truth)
    generator = torch.Generator().manual_seed(0)
    trials = best_format(w, numel(truth), orders=(2,), sweeps=300, generator=generator)
    assert trials.rows[0].error < 1e-3
    assert reference.relative(to_dense(trials.best).reshape(36, 36), w) < 1e-3


def test_refusals(unchecked):
    w = torch.randn(12, 12)
    with pytest.raises(ValueError, match="best_format: the budget must hold rank 1 of some format, expected at least"):
        best_format(w, 3)
    with pytest.raises(ValueError, match="budget must be a positive number, got -1"):
        best_format(w, -1)
    with pytest.raises(ValueError, match="entries must be finite"):
        best_format(w * torch.nan, 50)
    with pytest.raises(ValueError, match="expected a tensor of order >= 2"):
        best_format(w[0], 50)
