"""Coding of cores: bit planes come back exactly, the printed error is a bound, the budget is kept, files are small."""

import lzma

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decompositions import TT, LowRank, TTMatrix, Tucker, norm, to_dense
from decompositions.formats.gauge import orthogonalize
from tnlayers.grids.coding import Coded, code
from tnlayers.grids.planes import pack_planes, unpack_planes

NETWORKS = {
    "matrix": lambda g: LowRank.random(row_modes=(9,), col_modes=(12,), rank=4, generator=g),
    "order 1": lambda g: TT([torch.randn(7, generator=g)]),
    "tt": lambda g: TT.random(row_modes=(8, 9, 7, 6), rank=5, generator=g),
    "tucker": lambda g: Tucker.random(row_modes=(8, 9, 7), rank=(3, 5, 4), generator=g),
    "tucker-2": lambda g: Tucker.random(row_modes=(8, 9, 7), rank=(3, 4), modes=(0, 2), generator=g),
    "matrix train": lambda g: TTMatrix.random(row_modes=(3, 4, 3), col_modes=(2, 3, 4), rank=4, generator=g),
}


def decaying(net, factor=0.3):
    """The same network with singular values that fall: what real grids look like."""
    cores = []
    for core, leg in zip(net.cores, net.legs, strict=True):
        for axis, label in enumerate(leg):
            if label in net.bonds:
                weights = factor ** torch.arange(core.shape[axis], dtype=core.dtype)
                core = core * weights.reshape([-1 if k == axis else 1 for k in range(core.ndim)])
        cores.append(core)
    return net.replace(cores)


def dense(net):
    return to_dense(net.to(torch.float64))


# --- bit planes ---


@given(st.data())
def test_planes_come_back(data):
    exponents = data.draw(st.lists(st.integers(0, 61), max_size=200))
    rng = np.random.default_rng(len(exponents))
    numbers = np.array([int(rng.integers(-(2**e), 2**e + 1)) for e in exponents], dtype=np.int64)
    packed = pack_planes(numbers)
    found = unpack_planes(packed, len(numbers))
    assert found.dtype == np.int64
    assert np.array_equal(found, numbers)


def test_zeros_cost_nothing_and_sparse_numbers_little():
    assert len(pack_planes(np.zeros(100_000, dtype=np.int64))) <= 2
    numbers = np.zeros(100_000, dtype=np.int64)
    numbers[:50] = np.arange(50) - 25
    assert len(pack_planes(numbers)) < 400


@given(st.integers(0, 10**6))
def test_damaged_planes_are_refused_or_at_least_bounded(seed):
    """Any byte changed, any length cut: a ValueError or other numbers, never more of them and no other exception."""
    rng = np.random.default_rng(seed)
    numbers = (rng.standard_normal(300) * 40 * rng.random(300) ** 4).astype(np.int64)
    packed = bytearray(pack_planes(numbers))
    if seed % 2:
        packed[int(rng.integers(len(packed)))] ^= 1 << int(rng.integers(8))
    else:
        del packed[int(rng.integers(len(packed))) :]
    refused = None
    try:
        assert len(unpack_planes(bytes(packed), 300)) == 300
    except ValueError as error:
        refused = str(error)
    assert refused is None or "damaged" in refused
    if seed % 2 == 0:
        assert refused is not None  # every cut is seen


def test_a_plane_that_would_grow_without_bound_is_cut_at_its_size():
    """A few bytes of LZMA that stand for a gigabyte."""
    from tnlayers.grids.planes import FILTERS

    bomb = lzma.compress(bytes(1 << 24), format=lzma.FORMAT_RAW, filters=FILTERS)
    data = bytes([1]) + len(bomb).to_bytes(4, "little") + bomb
    assert not unpack_planes(data + bytes(0), 8).any()  # the first byte of zeros is all that is looked at


def test_planes_refuse():
    with pytest.raises(ValueError, match=r"one axis of integers below 2\^62"):
        pack_planes(np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"below 2\^62"):
        pack_planes(np.array([1 << 62]))
    with pytest.raises(ValueError, match="expected at most 62 planes, got 255"):
        unpack_planes(b"\xff", 3)
    with pytest.raises(ValueError, match="expected their end, got 1 bytes"):
        unpack_planes(pack_planes(np.array([1, 2])) + b"x", 2)


# --- errors ---


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("decay", [1.0, 0.3])
@pytest.mark.parametrize("relative", [0.5, 1e-1, 1e-2, 1e-4, 1e-9])
def test_the_error_is_a_bound_and_within_the_budget(name, decay, relative, rng):
    net = decaying(NETWORKS[name](rng).to(torch.float64), decay)
    budget = relative * float(norm(net))
    coded = code(net, "planes", budget)
    error = float(torch.linalg.vector_norm(dense(coded.network()) - dense(net)))
    assert error <= coded.error * (1 + 1e-6) + 1e-14 * float(norm(net))
    assert coded.error <= budget
    if relative <= 1e-2:  # small errors: the bound is nearly the error, and nearly the budget
        assert error >= 0.98 * coded.error
        assert coded.error >= 0.75 * budget  # with few numbers the error jumps


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("decay", [1.0, 0.3])
def test_int8_says_its_error(name, decay, rng):
    net = decaying(NETWORKS[name](rng).to(torch.float64), decay)
    coded = code(net, "int8")
    error = float(torch.linalg.vector_norm(dense(coded.network()) - dense(net)))
    assert error <= coded.error * (1 + 1e-6)
    assert error >= 0.9 * coded.error
    assert coded.error <= 0.05 * float(norm(net))
    assert all(level.dtype == torch.uint8 for level in coded.levels)
    assert sum(level.numel() for level in coded.levels) == sum(core.numel() for core in coded.network().cores)


def test_the_refit_is_what_makes_the_errors_add(rng, monkeypatch):
    """Without it the bound is broken: so the test above can fail."""
    from tnlayers.grids import coding

    net = decaying(NETWORKS["tt"](rng).to(torch.float64), 0.7)
    plain = torch.linalg.pinv
    monkeypatch.setattr(torch.linalg, "pinv", lambda matrix, rtol: plain(matrix, rtol=rtol) * 1.05)
    trial = coding._Task(net).run(0.02)
    coded = coding._Task(net).packed(trial)
    assert float(torch.linalg.vector_norm(dense(coded.network()) - dense(net))) > trial.error


def test_the_gauge_does_not_matter(rng):
    net = NETWORKS["tt"](rng).to(torch.float64)
    for center in range(4):
        other = orthogonalize(net, center)
        assert code(other, "planes", 0.1).nbytes == pytest.approx(code(net, "planes", 0.1).nbytes, rel=0.05)


def test_bonds_that_do_not_pay_are_left_out(rng):
    net = decaying(NETWORKS["tucker"](rng).to(torch.float64), 0.01)
    coded = code(net, "planes", 0.05 * float(norm(net)))
    assert coded.network().ranks < net.ranks
    assert coded.error <= 0.05 * float(norm(net))


def test_zero_and_rank_deficient_networks(rng):
    zero = TT([torch.zeros(4, 2), torch.zeros(2, 5)])
    for coding in ("planes", "int8"):
        assert not to_dense(code(zero, coding).network()).any()
    column = torch.randn(6, 1, dtype=torch.float64, generator=rng)
    net = TT([column.expand(6, 3).contiguous(), torch.randn(3, 7, dtype=torch.float64, generator=rng)])  # rank 1 of 3
    for coding in ("planes", "int8"):
        coded = code(net, coding, 0.1 * float(norm(net)))
        assert float(torch.linalg.vector_norm(dense(coded.network()) - dense(net))) <= coded.error * (1 + 1e-6)


def test_float32_networks_and_dtypes(rng):
    net = NETWORKS["tucker"](rng)
    coded = code(net, "planes", 1e-2 * float(norm(net)))
    assert coded.network().dtype == torch.float64
    assert coded.network(torch.float32).dtype == torch.float32


def test_numbers_of_different_size_share_one_step(rng):
    """At a hundredth of the norm a decaying network takes far less than the 32 bits of its numbers."""
    net = decaying(TT.random(row_modes=(40, 40, 40), rank=20, generator=rng, dtype=torch.float64), 0.6)
    coded = code(net, "planes", 0.01 * float(norm(net)))
    assert coded.nbytes < 0.12 * 4 * sum(core.numel() for core in net.cores)
    assert coded.nbytes < 0.5 * code(net, "int8").nbytes


# --- refusals ---


def test_code_refuses(rng):
    net = NETWORKS["tt"](rng)
    with pytest.raises(ValueError, match="coding must be one of int8, planes, got 'zip'"):
        code(net, "zip")
    for error in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="error must be a number above 0"):
            code(net, "planes", error)
    with pytest.raises(ValueError, match=r"int8 changes this network by .*, expected at most"):
        code(net, "int8", 1e-6)
    with pytest.raises(ValueError, match="expected an error of at least about 1e-13 of the norm"):
        code(net, "planes", 1e-18 * float(norm(net)))
    with pytest.raises(ValueError, match="expected real cores"):
        code(net.to(torch.complex64), "planes")


def test_decoding_refuses_what_does_not_fit(rng):
    coded = code(NETWORKS["tt"](rng), "planes", 0.1)
    with pytest.raises(ValueError, match="expected one of the formats"):
        Coded(**{**vars(coded), "format": "Rope"}).network()
    short = (coded.scales[0][:-1], *coded.scales[1:])
    with pytest.raises(ValueError, match=r"must have .* scales"):
        Coded(**{**vars(coded), "scales": short}).network()
    cut = (coded.levels[0][:-1], *coded.levels[1:])
    with pytest.raises(ValueError, match="damaged"):
        Coded(**{**vars(coded), "levels": cut}).network()


def test_a_tucker_tensor_of_one_mode(rng):
    net = Tucker.random(row_modes=(40,), rank=1, dtype=torch.float64)
    for coding in ("planes", "int8"):
        coded = code(net, coding, error=0.1 * float(norm(net)))
        lost = float((dense(coded.network()) - dense(net)).norm())
        assert lost <= coded.error * (1 + 1e-9) <= 0.1 * float(norm(net)) * (1 + 1e-9)
