"""Mode factorizations of any width, primes included; and what every format checks about its modes."""

from collections.abc import Sequence
from functools import lru_cache
from operator import index

Modes = tuple[tuple[int, ...], tuple[int, ...]]


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


def paired_default_modes(shape: tuple[int, ...], order: int) -> Modes:
    """`order` balanced modes a side; kernel axes follow as column modes beside row modes 1."""
    out, width, *kernel = shape
    return (*balanced_modes(out, order), *(1 for _ in kernel)), (*balanced_modes(width, order), *kernel)


def paired_modes(row_modes: tuple[int, ...], col_modes: tuple[int, ...]) -> Modes:
    """Modes that pair up: the shorter side is filled with ones."""
    order = max(len(row_modes), len(col_modes))
    return row_modes + (1,) * (order - len(row_modes)), col_modes + (1,) * (order - len(col_modes))


def check_paired(name: str, row_modes: Sequence[int], col_modes: Sequence[int]) -> None:
    """Refuse sides of different lengths."""
    if len(row_modes) != len(col_modes):
        raise ValueError(
            f"{name}: row_modes and col_modes pair up, expected equal lengths, got {tuple(row_modes)} and "
            f"{tuple(col_modes)}; fill with ones"
        )


def check_axes(name: str, axes: Sequence[int] | None, order: int) -> tuple[int, ...]:
    """The dense axis that each core of a chain or ring carries; in their order for None."""
    found = tuple(range(order)) if axes is None else tuple(axes)
    if sorted(found) != list(range(order)):
        raise ValueError(f"{name}: axes must be a permutation of 0..{order - 1} (one per core), got {found}")
    return found


def as_integer(value: object) -> int | None:
    """An int, also numpy's; None for what is none (True is none, though Python counts with it)."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_num_rows(name: str, num_rows: int | None, order: int) -> int:
    """How many leading axes are rows; all of them for None."""
    if num_rows is None:
        return order
    found = as_integer(num_rows)
    if found is None:
        raise TypeError(f"{name}: num_rows must be an int or None, got {num_rows!r}")
    if not 0 <= found <= order:
        raise ValueError(f"{name}: num_rows must be in 0..{order} (the order), got {num_rows}")
    return found
