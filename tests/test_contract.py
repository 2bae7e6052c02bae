"""Pairwise contraction: any equation, einsum's values, and the very layout that was asked for."""

import itertools
import random

import pytest
import reference
import torch

from decompositions.formats.contract import batch_letters, contract, split_equation


def equations(count: int):
    """Random equations of up to four letters a side, sizes 1 to 4 (0 at times)."""
    draw = random.Random(3)
    for _ in range(count):
        left, right = ("".join(draw.sample("abcdef", draw.randint(1, 4))) for _ in range(2))
        out = [letter for letter in sorted(set(left + right)) if draw.random() < 0.7]
        draw.shuffle(out)
        sizes = {letter: draw.choice([1, 2, 3, 4]) for letter in "abcdef"}
        if draw.random() < 0.05:
            sizes[draw.choice("abcdef")] = 0
        yield f"{left},{right}->{''.join(out)}", sizes


def test_any_equation_equals_einsum(rng):
    laid_out = 0
    for equation, sizes in equations(2000):
        left, right, out = split_equation(equation)
        a, b = (
            torch.randn([sizes[x] for x in letters], dtype=torch.float64, generator=rng) for letters in (left, right)
        )
        got, expected = contract(equation, a, b), torch.einsum(equation, a, b)
        assert got.shape == expected.shape, equation
        assert torch.allclose(got, expected, atol=1e-12), equation
        if batch_letters(left, right, out) is not None:
            laid_out += 1
            assert got.is_contiguous(), equation
    assert laid_out > 300


def test_batches_are_given_to_the_library_whole(monkeypatch, rng):
    """torch.bmm loops on a CPU, and copies, where the matrices of a batch are interleaved."""
    given = []

    def spy(a, b, *, out=None, product=torch.bmm):
        given.extend((a, b))
        return product(a, b) if out is None else product(a, b, out=out)

    monkeypatch.setattr(torch, "bmm", spy)
    left, right = torch.randn(6, 7, 5, generator=rng), torch.randn(7, 4, 5, generator=rng)
    for order in itertools.permutations(range(3)):  # the same operands with every layout in memory
        inverse = [order.index(k) for k in range(3)]
        a, b = (x.permute(order).contiguous().permute(inverse) for x in (left, right))
        for equation in ("abc,bdc->cad", "abc,bdc->bcad", "abc,bdc->bad"):
            assert torch.allclose(contract(equation, a, b), torch.einsum(equation, a, b), atol=1e-5)
    assert given
    for x in given:
        (_, m, n), (_, row, col) = x.shape, x.stride()
        assert (col == 1 and row >= n) or (row == 1 and col >= m)


def test_views_go_in_and_gradients_come_back(rng):
    x = torch.randn(5, 3, 4, dtype=torch.float64, generator=rng).permute(2, 0, 1).requires_grad_()
    factor = torch.randn(6, 3, dtype=torch.float64, generator=rng, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: contract("cba,ra->brc", a, b), (x, factor))
    assert torch.autograd.gradcheck(lambda a: contract("abc->ca", a), (x,))


@pytest.mark.parametrize(
    ("equation", "prefix"),
    [
        ("bac,cr->arb", 1),  # x is repeated over nothing, the factor over a: no copy of either
        ("ab,bc->ac", 0),
        ("ab,bc->ca", 0),
        ("hab,hbc->hac", 1),
        ("ka,kb->kab", 1),
        ("iajr,rkb->iakjb", None),  # interleaved: einsum's own order
        ("ab,cd->acbd", None),
        ("hab,bc->hac", 0),
    ],
)
def test_which_letters_become_a_batch(equation, prefix):
    assert batch_letters(*split_equation(equation)) == prefix


def test_one_operand_is_a_view_or_a_sum(rng):
    x = torch.randn(2, 3, 4, generator=rng)
    assert contract("abc->cab", x).data_ptr() == x.data_ptr()
    assert reference.relative(contract("abc->b", x), x.sum((0, 2))) < 1e-6
