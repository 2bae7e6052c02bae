"""Mode factorizations of any width, primes included."""

from functools import lru_cache


@lru_cache(maxsize=1024)
def balanced_modes(width: int, order: int) -> tuple[int, ...]:
    """`order` mode sizes whose product is at least `width`, near each other, with little padding.

    Minimizes the sum of the modes, times 1.1 + 2 (product - width) / width where it pads: an exact factorization wins
    where one is balanced, and a prime width is padded to a number nearby that factors well. Deterministic, ascending.

    Args:
        width: number of entries to cover, at least 1.
        order: number of modes, at least 1.

    Example:
        >>> balanced_modes(784, 4), balanced_modes(13, 2), balanced_modes(10, 2)
        ((4, 4, 7, 7), (3, 5), (2, 5))
    """
    if width < 1 or order < 1:
        raise ValueError(f"balanced_modes: width and order must be at least 1, got width={width}, order={order}")
    ideal = width ** (1 / order)
    best: tuple[float, tuple[int, ...]] | None = None
    for total in range(width, max(width + 2, int(width * 1.3) + 1) + 1):
        padding = (total - width) / width
        if best is not None and order * ideal * (1.1 + 2 * padding) > best[0]:
            break  # even a perfect factorization of a larger product could not win
        modes = _factorize(total, order)
        score = sum(modes) * (1.1 + 2 * padding if padding else 1.0)
        if best is None or score < best[0]:
            best = (score, modes)
    assert best is not None
    return best[1]


@lru_cache(maxsize=65536)
def _factorize(n: int, order: int) -> tuple[int, ...]:
    """Exact factorization into `order` ascending factors with the least sum."""
    if order == 1:
        return (n,)
    best = (1,) * (order - 1) + (n,)
    first = 1
    while first**order <= n:
        if n % first == 0:
            rest = _factorize(n // first, order - 1)
            candidate = tuple(sorted((first, *rest)))
            if sum(candidate) < sum(best):
                best = candidate
        first += 1
    return best
