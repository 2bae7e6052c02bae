"""Baselines: each against the property that defines it, in double precision."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decompositions import ActivationFactor, LowRank, svd, to_matrix, weighted_low_rank
from decompositions.calibrated import (
    apply_delta,
    asvd,
    delta_low_rank,
    eora,
    fisher_low_rank,
    output_pca,
    utilized_rank,
    welore_ranks,
    whitened_svd,
)
from decompositions.weighted import CalibrationWarning

F64 = torch.float64
SHAPES = {"m": st.integers(1, 7), "n": st.integers(1, 7), "rank": st.integers(1, 7), "seed": st.integers(0, 10**6)}


def drawn(m, n, seed, tokens=20):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, dtype=F64, generator=g)
    x = torch.randn(tokens, n, dtype=F64, generator=g) @ torch.randn(n, n, dtype=F64, generator=g)
    return w, x, g


def held_of(x):
    held = ActivationFactor(x.shape[1], dtype=x.dtype)
    held.update(x)
    return held


def orthonormal(net):
    near = 1e-9
    eye = [torch.eye(core.shape[1], dtype=core.dtype) for core in (net.U, net.V)]
    return torch.allclose(net.U.mH @ net.U, eye[0], atol=near) and torch.allclose(net.V.mH @ net.V, eye[1], atol=near)


@given(**SHAPES, alpha=st.sampled_from([0.0, 0.5, 1.0]))
def test_asvd_is_the_best_in_the_scaled_norm(m, n, rank, seed, alpha):
    w, x, _ = drawn(m, n, seed)
    rank, size = min(rank, m, n), x.abs().mean(0)
    net = asvd(w, size, rank=rank, alpha=alpha)
    scaled = (w - to_matrix(net)) * size**alpha
    tail = torch.linalg.svdvals(w * size**alpha)[rank:].norm()
    assert float(scaled.norm()) == pytest.approx(float(tail), abs=1e-9 * float((w * size).norm() + 1))
    assert orthonormal(net)
    if alpha == 0:
        assert torch.allclose(to_matrix(net), to_matrix(svd(w, rank=rank)), atol=1e-8)
    mean_square = x.square().mean(0).sqrt()
    assert torch.allclose(to_matrix(asvd(w, held_of(x), rank=rank)), to_matrix(asvd(w, mean_square, rank=rank)))


def test_asvd_and_silent_features(rng):
    w = torch.randn(6, 5, dtype=F64, generator=rng)
    net = asvd(w, torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0]), rank=3)
    assert bool(torch.isfinite(to_matrix(net)).all())
    assert torch.allclose(to_matrix(asvd(w, torch.zeros(5), rank=2)), to_matrix(svd(w, rank=2)), atol=1e-9)
    with pytest.raises(ValueError, match=r"asvd: expected 5 magnitudes, got shape \(4,\)"):
        asvd(w, torch.ones(4), rank=1)
    with pytest.raises(ValueError, match="asvd: magnitudes must be >= 0, got -1"):
        asvd(w, -torch.ones(5), rank=1)


@given(**SHAPES, root=st.sampled_from(["cholesky", "eigen"]))
def test_whitening_is_the_optimum_where_the_gram_matrix_allows(m, n, rank, seed, root):
    w, _, g = drawn(m, n, seed)
    x = torch.randn(40, n, dtype=F64, generator=g)
    rank = min(rank, m, n)
    net = whitened_svd(w, held_of(x), rank=rank, root=root)
    tail = float(torch.linalg.svdvals(w @ x.mT)[rank:].norm())
    assert float(((w - to_matrix(net)) @ x.mT).norm()) == pytest.approx(tail, abs=1e-8 * float(x.norm() * w.norm()))
    assert orthonormal(net)


def test_whitening_falls_back_as_published(rng):
    w = torch.randn(6, 5, dtype=F64, generator=rng)
    x = torch.randn(3, 5, dtype=F64, generator=rng)  # fewer tokens than features
    with pytest.warns(CalibrationWarning, match="whitened_svd: the Gram matrix is singular in torch.float64, 1e-09"):
        net = whitened_svd(w, x, rank=3)
    assert float(((w - to_matrix(net)) @ x.mT).norm()) < 1e-2 * float((w @ x.mT).norm())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whitened_svd(w, torch.zeros(2, 5), rank=2, dtype=torch.float32)
        whitened_svd(w, torch.zeros(2, 5), rank=2, root="eigen")
    assert len(caught) == 1


@given(**SHAPES)
def test_output_pca(m, n, rank, seed):
    w, x, g = drawn(m, n, seed)
    x = x + 5 * torch.randn(n, dtype=F64, generator=g)
    rank = min(rank, m, n)
    outputs = x @ w.mT
    size = float(outputs.norm())
    plain = output_pca(w, held_of(x), rank=rank)
    best = weighted_low_rank(w, x, rank=rank)
    errors = [float(((w - to_matrix(one)) @ x.mT).norm()) for one in (plain, best)]
    assert errors[0] == pytest.approx(errors[1], abs=1e-6 * size)
    net, bias = output_pca(w, held_of(x), rank=rank, centered=True, with_bias=True)
    mean = outputs.mean(0)
    tail = float(torch.linalg.svdvals(outputs - mean)[rank:].norm())
    found = x @ to_matrix(net).mT + bias
    assert float((outputs - found).norm()) == pytest.approx(tail, abs=1e-6 * size)  # PCA with its mean: the best affine
    assert torch.allclose(found.mean(0), mean, atol=1e-9 * size)
    assert orthonormal(net)


def test_output_pca_without_a_mean(rng):
    w, x = torch.randn(4, 3, dtype=F64, generator=rng), torch.randn(9, 3, dtype=F64, generator=rng)
    assert bool((output_pca(w, x, rank=2, with_bias=True)[1] == 0).all())
    with pytest.raises(ValueError, match="centered=True needs an ActivationFactor"):
        output_pca(w, x, rank=2, centered=True)


@given(**SHAPES, energy=st.floats(0.2, 1))
def test_utilized_rank_keeps_the_energy(m, n, rank, seed, energy):
    w, x, _ = drawn(m, n, seed)
    net = utilized_rank(w, x, energy=energy)
    inputs = net.V.conj() @ net.V.mT
    total = float(x.square().sum())
    assert float((x @ inputs.mT).square().sum()) >= energy * total * (1 - 1e-9)
    values = torch.linalg.svdvals(x).square()
    k = net.V.shape[1]
    assert k == 1 or float(values[: k - 1].sum()) < energy * total * (1 + 1e-9)  # no smaller space holds as much
    outputs = x @ inputs.mT @ w.mT
    kept = outputs @ net.U @ net.U.mT
    assert float(kept.square().sum()) >= energy * float(outputs.square().sum()) * (1 - 1e-9)
    assert torch.allclose(to_matrix(net), net.U @ net.U.mT @ w @ inputs, atol=1e-9)
    assert max(utilized_rank(w, x, rank=rank).ranks) <= rank


def test_utilized_rank_is_exact_on_low_rank_data(rng):
    w = torch.randn(8, 7, dtype=F64, generator=rng)
    x = torch.randn(50, 3, dtype=F64, generator=rng) @ torch.randn(3, 7, dtype=F64, generator=rng)
    net = utilized_rank(w, x, energy=1.0)
    assert net.ranks == (3, 3)
    assert torch.allclose(to_matrix(net) @ x.mT, w @ x.mT, atol=1e-9)
    assert utilized_rank(w, x, energy=1.0, output_energy=0.1).ranks[0] < 3
    with pytest.raises(ValueError, match=r"an energy must be in \(0, 1\], got 0"):
        utilized_rank(w, x, energy=0)


@given(**SHAPES, entries=st.booleans())
def test_fisher_is_the_best_in_the_weighted_norm(m, n, rank, seed, entries):
    w, _, g = drawn(m, n, seed)
    fisher = torch.rand(m, n, dtype=F64, generator=g) + 1e-3
    rank, root = min(rank, m, n), fisher.sum(1).sqrt().unsqueeze(1)
    net = fisher_low_rank(w, fisher if entries else fisher.sum(1), rank=rank)
    tail = float(torch.linalg.svdvals(root * w)[rank:].norm())
    assert float((root * (w - to_matrix(net))).norm()) == pytest.approx(tail, abs=1e-9 * float((root * w).norm()))
    assert orthonormal(net)


def test_fisher_refuses_and_forgives(rng):
    w = torch.randn(4, 3, dtype=F64, generator=rng)
    assert torch.allclose(to_matrix(fisher_low_rank(w, torch.zeros(4), rank=2)), to_matrix(svd(w, rank=2)), atol=1e-9)
    with pytest.raises(ValueError, match="squared gradients must be >= 0"):
        fisher_low_rank(w, -torch.ones(4, 3), rank=1)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    keep=st.floats(0.05, 1),
    equal=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_welore_is_one_threshold(sizes, keep, equal, seed):
    g = torch.Generator().manual_seed(seed)
    spectra = {
        f"layer{k}": torch.rand(size, generator=g).sort(descending=True).values * 10**k + 0.1
        for k, size in enumerate(sizes)
    }
    if equal:
        spectra = {layer: torch.ones_like(values) for layer, values in spectra.items()}
    ranks = welore_ranks(spectra, keep=keep)
    normalized = {layer: values.double() / float(values.max()) for layer, values in spectra.items()}
    above = min(float(values[ranks[layer] - 1]) for layer, values in normalized.items())
    below = [float(values[ranks[layer]]) for layer, values in normalized.items() if ranks[layer] < len(values)]
    assert all(value < above for value in below)
    assert sum(ranks.values()) >= round(keep * sum(sizes))
    if not equal:
        assert sum(ranks.values()) <= max(round(keep * sum(sizes)), len(sizes))
    assert welore_ranks(spectra, threshold=above) == ranks
    assert welore_ranks({}, keep=keep) == {}


def test_welore_refuses():
    for arguments in ({}, {"keep": 0.5, "threshold": 0.5}):
        with pytest.raises(ValueError, match="give keep or threshold"):
            welore_ranks({"a": [1.0]}, **arguments)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        welore_ranks({"a": [1.0]}, keep=0)
    for wrong in ([], [1.0, -1.0], [float("nan")]):
        with pytest.raises(ValueError, match="got a:"):
            welore_ranks({"a": wrong}, keep=0.5)


@given(**SHAPES)
def test_eora_is_the_optimum_of_what_is_missing(m, n, rank, seed):
    w, x, _ = drawn(m, n, seed)
    rank, rough = min(rank, m, n), (2 * w).round() / 2
    net = eora(w, rough, held_of(x), rank=rank, cutoff=0)
    tail = float(torch.linalg.svdvals((w - rough) @ x.mT)[rank:].norm())
    size = float((w @ x.mT).norm())
    assert float(((w - rough - to_matrix(net)) @ x.mT).norm()) == pytest.approx(tail, abs=1e-7 * size)
    assert orthonormal(net)
    # with a cutoff, what is dropped was small: sqrt(cutoff) of the largest direction
    loose = eora(w, rough, x, rank=rank, cutoff=1e-4)
    dropped = 1e-2 * float(torch.linalg.svdvals(x)[0]) * float((w - rough).norm())
    assert float(((w - rough - to_matrix(loose)) @ x.mT).norm()) <= tail + dropped + 1e-7 * size


def test_eora_on_singular_and_empty_data(rng):
    w = torch.randn(6, 5, dtype=F64, generator=rng)
    rough, one = w.round(), torch.randn(1, 5, dtype=F64, generator=rng)
    net = eora(w, rough, one, rank=1)
    assert float(((w - rough - to_matrix(net)) @ one.mT).norm()) < 1e-12
    with pytest.warns(CalibrationWarning, match="eora: no activations"):
        plain = eora(w, rough, ActivationFactor(5), rank=2)
    assert torch.allclose(to_matrix(plain), to_matrix(svd(w - rough, rank=2)), atol=1e-9)
    with pytest.raises(ValueError, match=r"cutoff must be in \[0, 1\), got -1"):
        eora(w, rough, one, rank=1, cutoff=-1)


def test_differences_of_a_fine_tuned_model(rng):
    base = {
        "a.weight": torch.randn(12, 10, generator=rng),
        "b.weight": torch.randn(8, 4, 3, 3, generator=rng),
        "full.weight": torch.randn(5, 5, generator=rng),
        "same.weight": torch.randn(6, 6, generator=rng),
        "bias": torch.randn(12, generator=rng),
        "steps": torch.tensor(3),
    }
    tuned = {name: value.clone() for name, value in base.items()}
    tuned["a.weight"] += 0.1 * torch.randn(12, 2, generator=rng) @ torch.randn(2, 10, generator=rng)
    tuned["b.weight"] += 0.1 * torch.randn(8, 1, 1, 1, generator=rng) * torch.randn(1, 4, 3, 3, generator=rng)
    tuned["full.weight"] += torch.randn(5, 5, generator=rng)
    tuned["bias"] += 1
    delta = delta_low_rank(tuned, base, tol=1e-3)
    assert set(delta) == {"a.weight", "b.weight", "full.weight", "bias"}
    assert {name: net.ranks for name, net in delta.items() if isinstance(net, LowRank)} == {
        "a.weight": (2, 2),
        "b.weight": (1, 1),
    }
    back = apply_delta(base, delta)
    for name, value in tuned.items():
        assert torch.allclose(back[name], value, atol=2e-3)
    assert back["same.weight"] is base["same.weight"]
    capped = delta_low_rank(tuned, base, rank=1, tol=1e-3)
    assert capped["a.weight"].ranks == (1, 1)
    best = to_matrix(svd(tuned["a.weight"] - base["a.weight"], rank=1))
    assert torch.allclose(to_matrix(capped["a.weight"]), best, atol=1e-5)
    with pytest.raises(ValueError, match=r"the same names, got \['bias'\]"):
        delta_low_rank(tuned, {name: value for name, value in base.items() if name != "bias"}, rank=1)
    with pytest.raises(ValueError, match=r"bias must have one shape, expected \(3,\), got \(12,\)"):
        delta_low_rank(tuned, {**base, "bias": torch.zeros(3)}, rank=1)
    with pytest.raises(ValueError, match=r"steps is torch\.int64 and differs"):
        delta_low_rank({**tuned, "steps": torch.tensor(4)}, base, rank=1)
    with pytest.raises(ValueError, match="delta_low_rank: bias: entries must be finite"):
        delta_low_rank({**tuned, "bias": torch.full((12,), torch.nan)}, base, rank=1)
    with pytest.raises(ValueError, match="give a rank or a tol"):
        delta_low_rank(tuned, base)
    with pytest.raises(ValueError, match=r"no tensors named \['odd'\]"):
        apply_delta(base, {"odd": torch.ones(1)})


def test_kernels_half_types_and_refusals(rng, unchecked):
    kernel = torch.randn(6, 3, 2, 2, generator=rng).to(torch.bfloat16)
    x = torch.randn(30, 12, generator=rng)
    for made in (
        asvd(kernel, x.abs().mean(0), rank=6),
        whitened_svd(kernel, x, rank=6),
        output_pca(kernel, x, rank=6),
        fisher_low_rank(kernel, torch.rand(kernel.shape), rank=6),
        utilized_rank(kernel, x, energy=1.0),
    ):
        assert made.dtype == torch.bfloat16
        assert torch.allclose(to_matrix(made.to(torch.float32)), kernel.flatten(1).float(), atol=0.1)
    for function, second in ((asvd, torch.ones(12)), (whitened_svd, x), (output_pca, x), (eora, kernel)):
        more = (x,) if function is eora else ()
        with pytest.raises(ValueError, match=f"{function.__name__}: entries must be finite"):
            function(kernel * torch.nan, second, *more, rank=1)
        with pytest.raises(ValueError, match=f"{function.__name__}: rank must be at least 1, got 0"):
            function(kernel, second, *more, rank=0)
        with pytest.raises(TypeError, match=f"{function.__name__}: rank must be an int, got 1.5"):
            function(kernel, second, *more, rank=1.5)
    with pytest.raises(ValueError, match="root must be 'cholesky' or 'eigen', got 'qr'"):
        whitened_svd(kernel, x, rank=1, root="qr")
    with pytest.raises(ValueError, match=r"whitened_svd: .*expected \(k, 12\), got \(30, 5\)"):
        whitened_svd(kernel, x[:, :5], rank=1)
    with pytest.raises(ValueError, match=r"the shape of the weight, expected \(6, 3, 2, 2\), got \(6, 12\)"):
        eora(kernel, kernel.flatten(1), x, rank=1)
    with pytest.raises(ValueError, match=r"expected 6 magnitudes, got shape \(3,\)"):
        fisher_low_rank(kernel, torch.ones(3), rank=1)
