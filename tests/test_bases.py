"""Bases of unfoldings: views, precision by tolerance, and what the Krylov certificate promises on measured spectra."""

from math import sqrt

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decompositions import bases, st_hosvd, svd, tt_svd
from decompositions.bases import basis, project
from decompositions.linalg import blocks, frobenius, gram, side_by_side, triangle, usable_tol
from decompositions.randomized import block_krylov

METHODS = ("auto", "exact", "gram", "randomized")


class Allocations(TorchDispatchMode):
    """The most entries of any tensor that an operation made, float64 ones counted apart."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = {False: 0, True: 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in held:
                wide = made.dtype in (torch.float64, torch.complex128)
                self.largest[wide] = max(self.largest[wide], made.numel())
        return result


def spectrum(name: str, n: int, rank: int) -> torch.Tensor:
    """Decaying, flat, stepped and clustered spectra around a rank."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "1/i": 1 / i,
        "1/sqrt(i)": i**-0.5,
        "1/i^2": i**-2,
        "1/i^3": i**-3,
        "geometric": 0.9 ** (i - 1) + 1e-4,
        "flat": torch.ones(n, dtype=torch.float64),
        "step": torch.where(i <= rank, 1.0, 1e-2).double(),
        "small step": torch.where(i <= rank, 1.0, 0.5).double(),
        "plateau": torch.where(i <= 2 * rank, 1.0, 0.1).double(),
        "cluster at the cut": torch.where(i <= rank - 2, 10.0, torch.where(i <= rank + 3, 1.0, 0.01)).double(),
        "signal and noise": torch.where(i <= rank, 1 / i, 1e-3 / sqrt(n)),
        "exact": torch.where(i <= rank, 1 / i, 0.0),
        "deficient": torch.where(i <= rank // 2, 1 / i, 0.0),
    }[name]


SPECTRA = pytest.mark.parametrize(
    "name",
    ["1/i", "1/sqrt(i)", "1/i^2", "1/i^3", "geometric", "flat", "step", "small step", "plateau"]
    + ["cluster at the cut", "signal and noise", "exact", "deficient"],
)


# --- slices ---


@pytest.mark.parametrize("shape", [(1, 5, 40), (7, 5, 1), (3, 5, 4), (40, 3, 70), (2, 3, 9000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64], ids=str)
@pytest.mark.parametrize("entries", [1, 300, 1 << 18])
def test_blocks_cover_and_products_agree(shape, dtype, entries, rng, monkeypatch):
    x = torch.randn(shape, dtype=dtype, generator=rng)
    seen = torch.zeros(shape[0], shape[2])
    for first, last in blocks(x, entries):
        seen[first, last] += 1
    assert bool((seen == 1).all())
    monkeypatch.setattr("decompositions.linalg.BLOCK", entries)
    double = torch.promote_types(dtype, torch.float64)
    matrix = side_by_side(x).to(double)
    for single, bound in ((False, 1e-13), (True, 1e-13 if dtype == torch.float64 else 1e-6)):
        assert reference.relative(gram(x, single=single), matrix @ matrix.mH) < bound
    lower = triangle(x)
    assert reference.relative(lower @ lower.mH, matrix @ matrix.mH) < 1e-13
    for u in (torch.randn(shape[1], 2, dtype=dtype, generator=rng),):
        assert reference.relative(side_by_side(project(u, x)), u.mH.to(double) @ matrix) < 1e-5
        wide = project(u.to(double), x)
        assert wide.dtype == dtype
        assert reference.relative(side_by_side(wide), u.mH.to(double) @ matrix) < torch.finfo(dtype).eps


@pytest.mark.parametrize("m", [64, 65, 130])
def test_gram_by_halves(m, rng):
    x = torch.randn(2, m, 5000, generator=rng)
    matrix = side_by_side(x).double()
    assert reference.relative(gram(x), matrix @ matrix.T) < 1e-13
    assert reference.relative(gram(x, single=True), matrix @ matrix.T) < 1e-6


def test_gram_in_single_precision_errs_less_than_assumed(rng):
    """Random, graded, constant and few-valued entries, by the measure that the choice of the rank rests on."""
    shape = (64, 1 << 17)
    uniform, integers = torch.rand(shape, generator=rng), torch.randint(0, 7, shape, generator=rng)
    left = torch.randint(1, 9, (64, 1), generator=rng).float()
    for x in (
        torch.randn(shape, generator=rng),
        uniform,
        uniform * torch.logspace(0, -6, 64)[:, None],
        torch.full(shape, 0.1),
        integers * 0.1,
        left * (integers[:1] * 0.1),
    ):
        exact = gram(x)
        error = gram(x, single=True) - exact
        values, vectors = torch.linalg.eigh(exact)
        for k in (1, 8, 32, 64):
            trace = float((vectors[:, -k:].T @ error @ vectors[:, -k:]).trace())
            assert abs(trace) < bases.SINGLE_GRAM_ERROR * float(values.sum())
            rest = float((vectors[:, :-k].T @ error @ vectors[:, :-k]).trace())
            assert abs(rest) < bases.SINGLE_GRAM_ERROR * float(values.sum())
        assert float(torch.linalg.norm(error)) < bases.SINGLE_GRAM_ERROR * float(values.sum())


def test_frobenius_by_runs(rng):
    for x in (
        torch.randn(100_003, generator=rng),
        torch.randn(17, 3, generator=rng, dtype=torch.float64),
        torch.randn(64, 129, generator=rng, dtype=torch.complex64)[:, ::2],
        torch.zeros(5000),
        torch.full((70_000,), 0.1),
    ):
        exact = float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float64)))
        assert frobenius(x) == pytest.approx(exact, rel=2e-7)


# --- the basis ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 6, 50), (9, 6, 1), (4, 6, 5), (1, 20, 8), (3, 20, 2)], ids=str)
@pytest.mark.parametrize("precise", [False, True])
def test_basis_of_slices_is_that_of_the_unfolding(method, shape, precise, rng):
    x = torch.randn(shape, generator=rng)
    found = basis(x, cap=3, budget=None, tol=None, method=method, precise=precise, generator=rng)
    matrix = side_by_side(x).double()
    u = found.u.double()
    assert found.rest.shape == (shape[0], 3, shape[2])
    assert found.rest.dtype == torch.float32
    assert found.u.dtype == (torch.float64 if precise and method != "randomized" else found.u.dtype)
    assert float((u.T @ u - torch.eye(3)).abs().max()) < 1e-5
    assert reference.relative(side_by_side(found.rest), u.T @ matrix) < 1e-5
    best = reference.tail(matrix, [0], 3) ** 2
    size = float(matrix.square().sum())
    assert found.discarded == pytest.approx(float((matrix - u @ (u.T @ matrix)).square().sum()), abs=1e-5 * size)
    assert found.discarded <= best * (1.1 if method == "randomized" else 1.0) + 1e-5 * size


@pytest.mark.parametrize("tol", [3e-2, 8e-3, 1e-3, 2e-4, 5e-5, 1e-5, 3e-6])
@pytest.mark.parametrize("decompose", [tt_svd, st_hosvd], ids=lambda f: f.__name__)
def test_tolerance_on_a_tensor_that_is_read_in_single_precision(decompose, tol, rng):
    """A million entries: the float32 Gram matrix, its refusals, the float64 one and QR all get their turn."""
    x = reference.graded((32, 32, 32, 36), 6.0, torch.float32, rng)
    x = x / torch.linalg.vector_norm(x) + 2e-3 * tol * torch.randn(x.shape, generator=rng) / sqrt(x.numel())
    net, error = decompose(x, tol=tol, with_error=True)
    assert error <= tol
    exact = decompose(x.double(), tol=usable_tol(tol, torch.float32, 4))
    assert all(a <= b + 1 for a, b in zip(net.ranks, exact.ranks, strict=True))


@pytest.mark.parametrize("decompose", [tt_svd, st_hosvd], ids=lambda f: f.__name__)
def test_no_unfolding_is_copied_and_nothing_is_widened_whole(decompose, rng):
    truth = tt_svd(torch.randn(4, 4, 4, 4, generator=rng), rank=2)
    factors = [torch.randn(64, 4, generator=rng) for _ in range(3)] + [torch.randn(40, 4, generator=rng)]
    x = reference.dense(truth)
    for k, factor in enumerate(factors):
        x = torch.movedim(torch.tensordot(factor, x.float(), dims=([1], [k])), 0, k)
    x = x.contiguous()  # 10 million entries
    for tol in (1e-2, 1e-5, 8e-6):
        with Allocations() as made:
            net = decompose(x, tol=tol)
        assert max(net.ranks) <= 8
        assert made.largest[True] <= x.numel() // 16, tol
        assert made.largest[False] <= x.numel() // 8, tol


def test_a_single_precision_gram_is_refused_where_it_would_lose(rng, monkeypatch):
    x = reference.with_spectrum(64, 20_000, [10.0 ** (-k / 4) for k in range(64)], torch.float32, rng)[None]
    energy = 2 * float(x.square().sum())
    assert bases._from_single_gram(x, 4, None) is not None
    assert bases._from_single_gram(x, 40, None) is None  # sigma_40 / sigma_1 = 2e-10
    assert bases._from_single_gram(x, 64, 1e-4 * energy) is not None
    assert bases._from_single_gram(x, 64, 1e-6 * energy) is None
    calls = []
    monkeypatch.setattr(bases, "_from_single_gram", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(bases, "BLOCK", 1 << 10)
    arguments = {"cap": 4, "budget": None, "tol": None}
    basis(x, **arguments)
    assert len(calls) == 1
    basis(x, **arguments, precise=True)
    basis(x, **arguments, approximate=False)
    basis(x.double(), **arguments)
    basis(x, cap=4, budget=1.0, tol=5e-4)
    torch.set_float32_matmul_precision("high")  # TF32: products of three digits
    try:
        basis(x, **arguments)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(calls) == 1


# --- the Krylov space ---


@SPECTRA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_rank_alone_is_within_half_a_percent_of_the_best(name, dtype, rng):
    n = 320
    for rank in (3, 16, 40):
        values = spectrum(name, n, rank)
        a = reference.with_spectrum(n, n + 30, values.tolist(), dtype, rng)
        net, error = svd(a, rank=rank, with_error=True)
        best = float(values[rank:].norm() / values.norm())
        assert net.ranks == (rank, rank)
        assert error <= 1.005 * best + 100 * torch.finfo(dtype).eps


@SPECTRA
def test_the_bound_for_what_is_missed_holds_at_every_step(name, rng):
    n, rank = 300, 24
    values = spectrum(name, n, rank)
    a = reference.with_spectrum(n, n, values.tolist(), torch.float64, rng)
    total = float(values.square().sum())
    best = float(values[:rank].square().sum())
    for watch in (0, 36):
        for space in block_krylov(a, 10, limit=150, watch=watch, size=sqrt(total), generator=rng):
            d = len(space.inner)
            if d < rank or not space.power:
                continue
            ritz, vectors = bases._descending(space.inner)
            outside = bases._residual(a, space)
            assert float((space.basis @ space.basis.T - torch.eye(d)).abs().max()) < 1e-12
            assert reference.relative(space.products, space.basis @ a) < 1e-12
            held = float(ritz[:rank].sum())
            missed = bases._missed(ritz.clamp_min(0), vectors, space, rank, outside, total)
            assert best - held <= missed + 1e-13 * total


def test_flat_spectra_fall_back_to_the_exact_method(rng):
    a = torch.randn(400, 400, generator=rng)
    assert bases._from_krylov(a[None], 45, None, 8) is None
    best = reference.tail(a.double(), [0], 45) / float(torch.linalg.vector_norm(a.double()))
    assert svd(a, rank=45, with_error=True)[1] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("name", ["1/i", "geometric", "signal and noise", "step", "exact", "deficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tolerance_from_a_krylov_space_gives_the_smallest_rank(name, dtype, rng):
    values = spectrum(name, 320, 20)
    a = reference.with_spectrum(320, 340, values.tolist(), dtype, rng)
    for tol in (0.5, 0.2, 0.05, 0.01, 1e-3):
        net, error = svd(a, tol=tol, with_error=True)
        smallest = next(k for k in range(1, 321) if float(values[k:].norm()) <= tol * float(values.norm()))
        assert error <= tol
        assert smallest <= net.ranks[0] <= smallest + (error > 0.999 * tol or tol < 2e-3)


def test_two_calls_agree_and_leave_the_global_generator_alone(rng):
    a = reference.with_spectrum(320, 320, spectrum("1/i", 320, 8).tolist(), torch.float32, rng)
    assert bases._from_krylov(a[None], 8, None, 8) is not None
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = svd(a, rank=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    second = svd(a, rank=8)
    assert all(torch.equal(x, y) for x, y in zip(first.cores, second.cores, strict=True))


def test_a_krylov_space_ends_where_it_is_invariant(rng):
    for rank in (5, 12):
        a = reference.with_spectrum(200, 150, spectrum("exact", 150, rank).tolist(), torch.float64, rng)
        spaces = list(block_krylov(a, 10, limit=100, size=float(a.norm()), generator=rng))
        assert len(spaces) <= 3
        last = spaces[-1]
        assert float((last.basis @ last.basis.T - torch.eye(len(last.basis))).abs().max()) < 1e-12
        assert bases._residual(a, last) < 1e-28
