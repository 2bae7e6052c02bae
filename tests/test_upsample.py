"""Finer and coarser grids, of networks and of quantized trains, against torch's own interpolation."""

from dataclasses import dataclass
from math import prod

import pytest
import torch
from cases import ALL

from cross_approx import downsample, downsample_digits, interpolate, upsample, upsample_digits
from decompositions import CP, TT, Tucker, to_dense, tt_svd

F64 = torch.float64
every = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)


def resized(x, axis, size, mode, corners):
    """One axis of a dense tensor by torch.nn.functional.interpolate."""
    moved = x.movedim(axis, -1)
    options = {"align_corners": corners} if mode == "linear" else {}
    flat = torch.nn.functional.interpolate(moved.reshape(1, -1, moved.shape[-1]), size=size, mode=mode, **options)
    return flat.reshape(*moved.shape[:-1], size).movedim(-1, axis)


@every
@pytest.mark.parametrize(("mode", "align"), [("linear", "cells"), ("linear", "corners"), ("constant", "cells")])
def test_upsample_is_that_of_the_dense_tensor(case, mode, align, rng):
    net = case()
    net = net.replace([core.detach().requires_grad_() for core in net.cores])
    axes = list(range(net.order))[:4]
    fine = upsample(net, [k % 3 + 1 for k in axes], axes=axes, mode=mode, align=align)
    expected = to_dense(net)
    for k in axes:
        n, factor = net.shape[k], k % 3 + 1
        size = factor * n if align == "cells" else factor * (n - 1) + 1
        expected = resized(expected, k, size, "linear" if mode == "linear" else "nearest", align == "corners")
    assert fine.shape == tuple(expected.shape)
    torch.testing.assert_close(to_dense(fine), expected, rtol=1e-11, atol=1e-11)
    if net.is_tree:
        assert type(fine) is type(net)
        assert fine.ranks == net.ranks
    probe = torch.randn(expected.shape, dtype=F64, generator=rng)
    gradients = [
        torch.autograd.grad((value * probe).sum(), net.cores, retain_graph=True) for value in (to_dense(fine), expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("align", ["cells", "corners"])
def test_any_size(align, rng):
    net = Tucker.random(row_modes=(5, 1, 7), rank=(3, 1, 3), dtype=torch.complex128, generator=rng)
    fine = upsample(net, size=(8, 3, 4), align=align)
    x = to_dense(net)
    for k, size in enumerate((8, 3, 4)):
        parts = [resized(part, k, size, "linear", align == "corners") for part in (x.real, x.imag)]
        x = torch.complex(*parts)
    torch.testing.assert_close(to_dense(fine), x)


def test_upsample_is_interpolation(rng):
    net = TT.random(row_modes=(4, 5), rank=3, dtype=F64, generator=rng)
    fine = to_dense(upsample(net, 3, align="corners"))
    grid = torch.cartesian_prod(*(torch.arange(n, dtype=F64) / 3 for n in fine.shape))
    torch.testing.assert_close(fine.flatten(), interpolate(net, grid))


def test_restriction_undoes_prolongation(rng):
    net = TT.random(row_modes=(4, 1, 5), rank=3, dtype=F64, generator=rng)
    x = to_dense(net)
    for factor in (2, (3, 2, 1)):
        torch.testing.assert_close(to_dense(downsample(upsample(net, factor, mode="constant"), factor)), x)
        back = downsample(upsample(net, factor, align="corners"), factor, mode="stride")
        torch.testing.assert_close(to_dense(back), x)


@every
def test_downsample_is_that_of_the_dense_tensor(case):
    net = case()
    if net.order > 8:
        pytest.skip("modes of 1")
    for mode in ("mean", "stride"):
        expected = to_dense(net)
        for axis in range(net.order):
            parts = expected.split(2, axis)
            expected = torch.stack(
                [part.mean(axis) if mode == "mean" else part.select(axis, 0) for part in parts], axis
            )
        torch.testing.assert_close(to_dense(downsample(net, 2, mode=mode)), expected, rtol=1e-11, atol=1e-11)


def test_long_modes_take_no_matrix():
    """A mode of a million entries: its prolongation as a matrix would take 16 TB."""
    net = CP([torch.ones(1 << 20, 1), torch.ones(2, 1)])
    assert upsample(net, 2, axes=0).shape == (1 << 21, 2)
    assert downsample(net, 4, axes=0).shape == (1 << 18, 2)


def test_refusals(unchecked):
    net = TT.random(row_modes=(4, 5), rank=2)
    for call, message in (
        (lambda: upsample(net), "either factor or size"),
        (lambda: upsample(net, 2, size=8), "either factor or size"),
        (lambda: upsample(net, (2,)), "factor must be one int >= 1, or one for each of the 2 axes"),
        (lambda: upsample(net, 0), "factor must be one int >= 1"),
        (lambda: upsample(net, 2, mode="cubic"), "expected mode 'linear' or 'constant'"),
        (lambda: upsample(net, 2, mode="constant", align="corners"), "repeats cells"),
        (lambda: upsample(net, 2, axes=5), "axes must be ints in -2..1"),
        (lambda: downsample(net, 2, mode="max"), "mode must be 'mean' or 'stride'"),
        (lambda: downsample(net, 1.5), "factor must be one int"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- quantized trains ---


@dataclass(frozen=True)
class Digits:
    """What a quantization has to have."""

    shape: tuple[int, ...]
    modes: tuple[tuple[int, int], ...]


def quantized(x, modes, rng):
    """An exact train of a dense tensor padded with noise: values of the padding must not be seen."""
    d = x.ndim
    padded = [prod(size for axis, size in modes if axis == k) for k in range(d)]
    full = torch.randn(padded, dtype=x.dtype, generator=rng)
    full[tuple(slice(0, n) for n in x.shape)] = x
    own = [[k for k, (axis, _) in enumerate(modes) if axis == a] for a in range(d)]
    order = [k for digits in own for k in digits]
    folded = full.reshape([modes[k][1] for k in order])
    return tt_svd(folded.permute([order.index(k) for k in range(len(modes))]), tol=1e-14)


def unquantized(net, q):
    order = [k for a in range(len(q.shape)) for k, (axis, _) in enumerate(q.modes) if axis == a]
    padded = [prod(size for axis, size in q.modes if axis == k) for k in range(len(q.shape))]
    return to_dense(net).permute(order).reshape(padded)[tuple(slice(0, n) for n in q.shape)]


LAYOUTS = [
    ((8,), ((0, 2), (0, 2), (0, 2))),
    ((5,), ((0, 2), (0, 2), (0, 2))),  # padded
    ((4,), ((0, 2), (0, 2), (0, 2))),  # padded by half: index n has another first digit
    ((3,), ((0, 3),)),
    ((6, 4), ((0, 3), (0, 2), (1, 2), (1, 2))),
    ((6, 4), ((1, 2), (1, 2), (0, 2), (0, 3))),  # Fortran order
    ((4, 3), ((0, 2), (1, 2), (0, 2), (1, 2))),  # interleaved and padded
    ((1, 4, 2), ((1, 2), (2, 2), (1, 2))),  # an axis without digits
]


@pytest.mark.parametrize(("shape", "modes"), LAYOUTS)
@pytest.mark.parametrize("base", [2, 3])
@pytest.mark.parametrize(("mode", "align"), [("linear", "cells"), ("linear", "corners"), ("constant", "cells")])
def test_a_digit_more(shape, modes, base, mode, align, rng):
    x = torch.randn(shape, dtype=F64, generator=rng)
    net = quantized(x, modes, rng)
    fine, q = upsample_digits(net, Digits(shape, modes), base=base, mode=mode, align=align)
    assert q.shape == tuple(base * n for n in shape)
    expected = x
    for k, n in enumerate(shape):
        if align == "corners":
            expected = resized(expected, k, base * (n - 1) + 1, "linear", True)
            last = expected.select(k, -1).unsqueeze(k)
            expected = torch.cat([expected, *[last] * (base - 1)], k)
        else:
            expected = resized(expected, k, base * n, "linear" if mode == "linear" else "nearest", False)
    torch.testing.assert_close(unquantized(fine, q), expected, rtol=1e-8, atol=1e-8)
    if mode == "constant":
        assert max(fine.ranks, default=1) <= max(net.ranks, default=1)
        back, same = downsample_digits(fine, q)
        assert (same.shape, same.modes) == (shape, modes)
        torch.testing.assert_close(unquantized(back, same), x, rtol=1e-8, atol=1e-8)


def test_order_of_the_new_digits(rng):
    x = torch.randn(4, 4, dtype=F64, generator=rng)
    apart, mixed = ((0, 2), (0, 2), (1, 2), (1, 2)), ((0, 2), (1, 2), (0, 2), (1, 2))
    assert upsample_digits(quantized(x, apart, rng), Digits((4, 4), apart))[1].modes == (
        *apart[:2], (0, 2), *apart[2:], (1, 2)
    )  # fmt: skip
    assert upsample_digits(quantized(x, mixed, rng), Digits((4, 4), mixed))[1].modes == (*mixed, (0, 2), (1, 2))
    only = upsample_digits(quantized(x, apart, rng), Digits((4, 4), apart), axes=1)[1]
    assert only.shape == (4, 8)


def test_smooth_functions_keep_small_ranks(rng):
    """From 2^6 to 2^12 points: exp stays at rank 2 (piecewise linear in it), a line at rank 2."""
    x = torch.arange(64, dtype=F64) / 64
    for values, most in ((torch.ones(64), 1), (x, 2), (torch.exp(-x), 3)):
        net = tt_svd(values.double().reshape((2,) * 6), tol=1e-13)
        q = Digits((64,), ((0, 2),) * 6)
        for _ in range(6):
            net, q = upsample_digits(net, q, align="corners")
        assert q.shape == (4096,)
        assert max(net.ranks) <= most + 2
        error = (unquantized(net, q)[:4033] - resized(values.double(), 0, 4033, "linear", True)).abs().max()
        assert float(error) <= 1e-8


def test_refused_digits(unchecked, rng):
    net = quantized(torch.randn(4, 4, dtype=F64, generator=rng), ((0, 2), (0, 2), (1, 2), (1, 2)), rng)
    good = Digits((4, 4), ((0, 2), (0, 2), (1, 2), (1, 2)))
    for call, message in (
        (lambda: upsample_digits(net, Digits((4, 4), ((0, 2), (0, 2), (1, 4)))), "the digits must be the modes"),
        (lambda: upsample_digits(net, Digits((5, 4), good.modes)), "digits of axis 0 must cover its size 5"),
        (lambda: upsample_digits(net, good, base=1), "base must be an int >= 2"),
        (lambda: upsample_digits(net, good, mode="cubic"), "expected mode 'linear' or 'constant'"),
        (lambda: upsample_digits(Tucker.random(row_modes=(2,) * 4, rank=2), good), "a train with one core a mode"),
        (lambda: downsample_digits(net, Digits((3, 4), good.modes)), "a size that its last digit divides, got size 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="expected a quantization with shape and modes, got tuple"):
        upsample_digits(net, good.modes)
