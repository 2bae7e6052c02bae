"""Ranks under a budget: exact against brute force, greedy against exact, budgets met, rules that know the noise."""

import itertools
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decompositions import (
    CP,
    TT,
    LowRank,
    Tree,
    TTMatrix,
    Tucker,
    energy_rank,
    evbmf_rank,
    hosvd,
    numel,
    parameter_terms,
    plan_apply,
    ranks_under,
    round,
    select_ranks,
    svd,
    to_dense,
    tt_svd,
)
from decompositions.prices import Term, flop_terms

F64 = torch.float64


def spectrum(rng, n, decay=None):
    decay = rng.uniform(0.2, 3) if decay is None else decay
    return np.sort(rng.random(n) * np.arange(1, n + 1) ** -decay)[::-1]


def price(terms, ranks):
    return sum(term.factor * prod(ranks[b] for b in term.bonds) for term in terms)


def brute_force(spectra, terms, budget):
    best = np.inf
    for ranks in itertools.product(*[range(1, len(s) + 1) for s in spectra.values()]):
        named = dict(zip(spectra, ranks, strict=True))
        if price(terms, named) <= budget:
            best = min(best, sum(float((s[r:] ** 2).sum()) for s, r in zip(spectra.values(), ranks, strict=True)))
    return best / max(float((s**2).sum()) for s in spectra.values())


NETWORKS = {
    "tucker": Tucker.random(row_modes=(6, 5, 7), rank=(6, 5, 7)),
    "tucker-4": Tucker.random(row_modes=(5, 4, 5, 4), rank=4),
    "tt": TT.random(row_modes=(5, 6, 4, 5), rank=(5, 8, 5)),
    "ttm": TTMatrix.random(row_modes=(3, 4, 2), col_modes=(2, 3, 4), rank=6),
    "tree": Tree.random(row_modes=(4, 5), col_modes=(3, 4), rank=4),
    "low-rank": LowRank.random(row_modes=(9,), col_modes=(7,), rank=7),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
def test_exact_is_brute_force(name, seed):
    rng = np.random.default_rng(seed)
    net = NETWORKS[name]
    terms = parameter_terms(net)
    priced = {bond for term in terms for bond in term.bonds}
    spectra = {b: spectrum(rng, r) for b, r in zip(net.bonds, net.ranks, strict=True) if b in priced}
    least, most = price(terms, dict.fromkeys(spectra, 1)), price(terms, {b: len(s) for b, s in spectra.items()})
    for share in (0.05, 0.2, 0.5, 0.9, 1.0):
        budget = int(least + share * (most - least))
        choice = select_ranks(spectra, terms, budget)
        assert choice.optimal
        assert choice.price == price(terms, choice.ranks) <= budget
        assert choice.error**2 == pytest.approx(brute_force(spectra, terms, budget), rel=1e-9, abs=1e-14)
        greedy = select_ranks(spectra, terms, budget, method="greedy")
        assert greedy.price <= budget
        assert greedy.error >= choice.error * (1 - 1e-9)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_ranks_within_an_error_are_brute_force(name, seed):
    rng = np.random.default_rng(100 + seed)
    net = NETWORKS[name]
    terms = parameter_terms(net)
    priced = {bond for term in terms for bond in term.bonds}
    spectra = {b: spectrum(rng, r) for b, r in zip(net.bonds, net.ranks, strict=True) if b in priced}
    spectra = {b: s / np.linalg.norm(s) for b, s in spectra.items()}
    for error in (0.02, 0.1, 0.3, 0.7, 3.0):
        options = itertools.product(*[range(1, len(s) + 1) for s in spectra.values()])
        fits = [
            price(terms, dict(zip(spectra, ranks, strict=True)))
            for ranks in options
            if sum(float((s[r:] ** 2).sum()) for s, r in zip(spectra.values(), ranks, strict=True)) <= error**2
        ]
        exact = select_ranks(spectra, terms, error=error)
        assert exact.optimal
        assert exact.price == min(fits)
        assert exact.error <= error
        greedy = select_ranks(spectra, terms, error=error, method="greedy")
        assert greedy.error <= error
        assert exact.price <= greedy.price <= 1.25 * exact.price
        assert f"{exact.price:,}, error <= " in exact.explain()


@pytest.mark.parametrize("seed", range(4))
def test_squares_of_ranks(seed):
    """A bond named twice in a term, as the FLOPs of U S V^T name it."""
    rng = np.random.default_rng(seed)
    spectra = {b: spectrum(rng, 7) for b in "abc"}
    terms = [Term(2, ("a", "a")), Term(3, ("a", "b")), Term(1, ("b", "b", "c")), Term(5, ("c",)), Term(11, ())]
    most = price(terms, dict.fromkeys(spectra, 7))
    for share in (0.1, 0.3, 0.7):
        budget = int(22 + share * (most - 22))
        exact, greedy = (select_ranks(spectra, terms, budget, method=m) for m in ("exact", "greedy"))
        assert exact.optimal
        assert exact.error**2 == pytest.approx(brute_force(spectra, terms, budget), rel=1e-9, abs=1e-14)
        assert greedy.price == price(terms, greedy.ranks) <= budget


def same_strategy(net, other, batch):
    """A plan of `other` with the steps of each plan of `net`."""
    for plan in plan_apply(net, batch):
        for twin in plan_apply(other, batch):
            if [s.equation for s in twin.steps] == [s.equation for s in plan.steps]:
                yield plan, twin


@pytest.mark.parametrize(
    "make",
    [
        lambda r: LowRank.random(row_modes=(40,), col_modes=(30,), rank=r),
        lambda r: Tucker.random(row_modes=(8, 6), col_modes=(7, 5), rank=r),
        lambda r: TT.random(row_modes=(8, 6), col_modes=(7, 5), rank=r),
        lambda r: TTMatrix.random(row_modes=(8, 6, 5), col_modes=(7, 5, 4), rank=r),
    ],
)
def test_flops_are_a_sum_of_products_of_ranks(make):
    """The terms of a plan at one rank give the FLOPs of the same plan at another rank."""
    compared = 0
    for plan, twin in same_strategy(make(4), make(3), 16):
        terms = flop_terms(make(4), plan.work)
        assert price(terms, dict(zip(make(4).bonds, make(4).ranks, strict=True))) == plan.flops
        assert price(terms, dict(zip(make(3).bonds, make(3).ranks, strict=True))) == twin.flops
        compared += 1
    assert compared


def test_large_models_take_seconds():
    """24 layers of 768 ranks: a heap, not a search over all layers at every step."""
    rng = np.random.default_rng(0)
    spectra = {f"{k}": spectrum(rng, 768, 0.3 + 0.05 * k) for k in range(24)}
    spectra = {b: s / np.linalg.norm(s) for b, s in spectra.items()}
    terms = [Term(1536, (b,)) for b in spectra]
    choice = select_ranks(spectra, terms, 24 * 768 * 300, method="greedy")
    assert 24 * 768 * 300 * 0.999 <= choice.price <= 24 * 768 * 300
    exact = select_ranks(spectra, terms, 24 * 768 * 300)
    assert exact.error <= choice.error <= 1.0001 * exact.error


def test_greedy_is_within_a_percent_of_exact():
    """100 random spectra of Tucker tensors, half of them with unequal decays: what is kept of the squared norm."""
    worst = []
    for seed in range(100):
        rng = np.random.default_rng(1000 + seed)
        modes = rng.integers(8, 40, size=rng.integers(3, 5))
        spectra = {f"r{k}": spectrum(rng, n, 1.0 if seed % 2 else None) for k, n in enumerate(modes)}
        spectra = {b: s / np.linalg.norm(s) for b, s in spectra.items()}
        terms = [Term(1, tuple(spectra)), *(Term(int(n), (b,)) for n, b in zip(modes, spectra, strict=True))]
        budget = max(int(prod(modes) * rng.uniform(0.005, 0.2)), int(1 + modes.sum()))
        exact = select_ranks(spectra, terms, budget)
        greedy = select_ranks(spectra, terms, budget, method="greedy")
        assert exact.optimal
        assert greedy.price <= budget
        kept = [len(modes) - choice.error**2 for choice in (greedy, exact)]
        worst.append((kept[0] / kept[1], greedy.error / exact.error))
    assert min(share for share, _ in worst) > 0.99
    assert float(np.mean([error for _, error in worst])) < 1.01  # of the error itself, on average


@given(data=st.data())
def test_any_prices_any_spectra(data):
    count = data.draw(st.integers(1, 4))
    bonds = [f"b{k}" for k in range(count)]
    spectra = {b: sorted(data.draw(st.lists(st.floats(0, 10), min_size=1, max_size=5)), reverse=True) for b in bonds}
    terms = [
        Term(data.draw(st.floats(0.5, 20)), tuple(data.draw(st.sets(st.sampled_from(bonds)))))
        for _ in range(data.draw(st.integers(0, 4)))
    ]
    least = price(terms, dict.fromkeys(bonds, 1))
    budget = int(least + 1 + data.draw(st.floats(0, 100)))
    for method in ("exact", "greedy"):
        choice = select_ranks(spectra, terms, budget, method=method)
        assert price(terms, choice.ranks) <= budget + 0.5
        assert all(1 <= r <= len(spectra[b]) for b, r in choice.ranks.items())
        assert len(choice.explain().splitlines()) == 1 + count


def test_the_bound_holds_for_the_decomposition():
    x = torch.randn(8, 9, 10, dtype=F64, generator=torch.Generator().manual_seed(0))
    spectra = {f"r{k}": torch.linalg.svdvals(x.movedim(k, 0).flatten(1)) / x.norm() for k in range(3)}
    choice = select_ranks(spectra, parameter_terms(Tucker.random(row_modes=(8, 9, 10), rank=2)), 300)
    net, error = hosvd(x, rank=tuple(choice.ranks.values()), with_error=True)
    assert numel(net) == choice.price <= 300
    assert error <= choice.error * (1 + 1e-9)


def test_multiples():
    spectra = {"a": np.geomspace(1, 1e-3, 50), "b": np.geomspace(1, 1e-2, 30)}
    terms = [Term(1, ("a", "b")), Term(50, ("a",)), Term(30, ("b",))]
    for method in ("exact", "greedy"):
        ranks = select_ranks(spectra, terms, 2000, method=method, multiple=8).ranks
        assert all(r % 8 == 0 or r == len(spectra[b]) for b, r in ranks.items())
    assert select_ranks(spectra, terms, 10_000, multiple=64).ranks == {"a": 50, "b": 30}


@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_a_joint_budget_over_networks_is_met_within_a_percent(method, rng):
    decays = (0.2, 1.0, 3.0)
    matrices = []
    for decay in decays:
        q, _ = torch.linalg.qr(torch.randn(60, 60, dtype=F64, generator=rng))
        p, _ = torch.linalg.qr(torch.randn(50, 50, dtype=F64, generator=rng))
        matrices.append(q[:, :50] * torch.arange(1, 51, dtype=F64) ** -decay @ p)
    tensor = torch.randn(6, 7, 8, dtype=F64, generator=rng)
    nets = [*(svd(m) for m in matrices), tt_svd(tensor)]
    for budget in (1000, 3000, 8000):
        ranks, choice = ranks_under(nets, budget, method=method)
        cut = [round(net, rank=own) for net, own in zip(nets, ranks, strict=True)]
        assert sum(map(numel, cut)) == choice.price <= budget
        assert choice.price >= 0.9 * budget
        for net, small in zip(nets, cut, strict=True):
            error = float((to_dense(net) - to_dense(small)).norm() / to_dense(net).norm())
            assert error <= choice.error * (1 + 1e-9)
    fine = ranks_under([svd(torch.randn(60, 50, dtype=F64, generator=rng)) for _ in range(6)], 11_050, method=method)
    assert fine[1].price >= 0.99 * 11_050


def test_weights_shift_ranks(rng):
    nets = [svd(torch.randn(20, 20, dtype=F64, generator=rng)) for _ in range(2)]
    plain = ranks_under(nets, 600)[0]
    favoured = ranks_under(nets, 600, weights=(9.0, 1.0))[0]
    assert favoured[0]["a"] > plain[0]["a"]
    assert favoured[0]["a"] == favoured[0]["b"]


def test_energy_rank():
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert [energy_rank(values, share) for share in (0.1, 4 / 6, 0.67, 5 / 6, 0.99, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert energy_rank(torch.zeros(3)) == 1


@pytest.mark.parametrize(("shape", "rank"), [((60, 80), 4), ((100, 100), 10), ((30, 200), 1), ((200, 40), 6)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_evbmf_finds_the_rank_in_white_noise(shape, rank, scale, rng):
    m, n = shape
    signal = torch.randn(m, rank, dtype=F64, generator=rng) @ torch.randn(rank, n, dtype=F64, generator=rng)
    w = scale * (signal + 0.3 * torch.randn(m, n, dtype=F64, generator=rng))
    values = torch.linalg.svdvals(w)
    assert evbmf_rank(values, shape) == rank
    assert evbmf_rank(values, shape, noise=0.3 * scale) == rank


def test_evbmf_finds_nothing_in_noise(rng):
    w = torch.randn(80, 120, dtype=F64, generator=rng)
    assert evbmf_rank(torch.linalg.svdvals(w), (80, 120)) == 0
    assert evbmf_rank(torch.zeros(4), (4, 9)) == 0


def test_refusals(unchecked, rng):
    terms = [Term(10, ("a",))]
    with pytest.raises(ValueError, match=r"expected at least 10 for \{'a': 1\}, got 5"):
        select_ranks({"a": [1.0, 0.5]}, terms, 5)
    with pytest.raises(ValueError, match="must be in descending order"):
        select_ranks({"a": [0.5, 1.0]}, terms, 50)
    with pytest.raises(ValueError, match="finite numbers >= 0"):
        select_ranks({"a": [1.0, float("nan")]}, terms, 50)
    with pytest.raises(ValueError, match=r"expected \['a'\], got \['b'\]"):
        select_ranks({"a": [1.0]}, [Term(1, ("b",))], 50)
    for budget, error in ((None, None), (50, 0.1)):
        with pytest.raises(ValueError, match="give a budget or an error"):
            select_ranks({"a": [1.0]}, terms, budget, error=error)
    for error in (0.0, -1, True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="error must be a finite number > 0"):
            select_ranks({"a": [1.0]}, terms, error=error)
    with pytest.raises(ValueError, match="terms must be a list a network, expected 1, got 0"):
        ranks_under([LowRank.random(row_modes=(4,), col_modes=(4,), rank=2)], 50, terms=[])
    with pytest.raises(ValueError, match="method must be"):
        select_ranks({"a": [1.0]}, terms, 50, method="best")
    with pytest.raises(ValueError, match="multiple must be an int >= 1"):
        select_ranks({"a": [1.0]}, terms, 50, multiple=0)
    with pytest.raises(ValueError, match="budget must be a finite number"):
        select_ranks({"a": [1.0]}, terms, float("inf"))
    with pytest.raises(ValueError, match="ranks_under: method must be 'exact' or 'greedy', got 'best'"):
        ranks_under([LowRank.random(row_modes=(4,), col_modes=(4,), rank=2)], 50, method="best")
    with pytest.raises(ValueError, match="weights must be a positive number a network"):
        ranks_under([LowRank.random(row_modes=(4,), col_modes=(4,), rank=2)], 50, weights=(0.0,))
    with pytest.raises(ValueError, match="ranks_under: the network must be a tree"):
        ranks_under([CP.random(row_modes=(4, 4, 4), rank=2)], 50)
    with pytest.raises(ValueError, match=r"energy must be in \(0, 1\]"):
        energy_rank(torch.ones(2), 0.0)
    with pytest.raises(ValueError, match="has 4 singular values, got 3"):
        evbmf_rank(torch.ones(3), (4, 5))
