"""Mode factorizations of every width."""

from math import prod

import pytest

from decompositions import balanced_modes


@pytest.mark.parametrize("order", range(1, 6))
def test_every_width_is_covered_with_little_padding(order):
    for width in range(1, 3001):
        modes = balanced_modes(width, order)
        product = prod(modes)
        assert len(modes) == order
        assert modes == tuple(sorted(modes))
        assert modes[0] >= 1
        assert width <= product <= max(width + 2, int(width * 1.3) + 1)
        if order == 1:
            assert modes == (width,)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_modes_are_balanced(order):
    """Never far from the ideal: the sum of the modes is near order * width^(1/order), for primes too."""
    for width in range(8**order, 8**order + 1000):
        assert sum(balanced_modes(width, order)) < 1.6 * order * width ** (1 / order)


def test_known_widths():
    assert balanced_modes(768, 3) == (8, 8, 12)
    assert balanced_modes(64, 3) == (4, 4, 4)
    assert balanced_modes(1, 4) == (1, 1, 1, 1)
    assert prod(balanced_modes(1024, 5)) == 1024
    assert prod(balanced_modes(50_257, 3)) < 1.02 * 50_257  # GPT-2's vocabulary, no good factors


def test_deterministic_without_the_cache():
    first = [balanced_modes(width, 3) for width in range(1, 300)]
    balanced_modes.cache_clear()
    assert [balanced_modes(width, 3) for width in reversed(range(1, 300))][::-1] == first


@pytest.mark.parametrize(("width", "order"), [(0, 2), (-3, 2), (5, 0)])
def test_refusals(width, order):
    with pytest.raises(ValueError, match=f"got width={width}, order={order}"):
        balanced_modes(width, order)
