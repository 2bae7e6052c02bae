"""One pairwise contraction, executed in the very layout that its equation names.

`torch.einsum` chooses the order of the axes in memory by itself and returns a permuted view; whoever reads that view
next may have to copy it. Here the order of the result's letters is the order in memory: leading letters that the
matrix product cannot hold become a batch of products (of one operand alone if need be, the other being repeated
without a copy), and what follows is one block of each operand. Plans rely on it; einsum is the oracle of the tests.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

THIN = 16
"""CPU libraries run a product whose result has fewer columns than this up to ten times slower than its transpose."""

PLAIN = (Tensor, torch.nn.Parameter)

F = TypeVar("F", bound=Callable[..., Any])


def constant_while_tracing(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which would import dynamo here and double the time of `import torch`.

    The mark is all that it sets; the tests under the mark `compile` fail where torch changes it. (For plain functions:
    dynamo looks through an lru_cache wrapper, mark included.)
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Product(NamedTuple):
    """How an equation runs as one matrix product; axes index the operands' own.

    `first` and `second` are the operands (0: left, 1: right) in the order of their blocks in the result; each is
    permuted to its batch axes, then block and summed axes (summed and block for the second).
    """

    first: int
    batch: tuple[tuple[int, ...], tuple[int, ...]]  # of first, of second; () where the operand is repeated
    blocks: tuple[tuple[int, ...], tuple[int, ...]]
    summed: tuple[tuple[int, ...], tuple[int, ...]]
    prefix: tuple[tuple[int, int], ...]  # (operand, axis) of each batch letter of the result


def split_equation(equation: str) -> tuple[str, str, str]:
    """Letters of left, right and result; right is '' for a step with one operand.

    Example:
        >>> split_equation("ab,bc->ac")
        ('ab', 'bc', 'ac')
    """
    inputs, out = equation.split("->")
    left, _, right = inputs.partition(",")
    return left, right, out


def batch_letters(left: Sequence[str], right: Sequence[str], out: Sequence[str]) -> int | None:
    """Number of leading result letters to batch over, or None where no single matrix product gives that layout.

    Example:
        >>> batch_letters("bac", "cr", "arb"), batch_letters("ia", "aj", "ij"), batch_letters("ab", "cd", "acbd")
        (1, 0, None)
    """
    if any(letter not in right and letter not in out for letter in left) or any(
        letter not in left and letter not in out for letter in right
    ):
        return None  # a letter is summed inside one operand
    kept = [k for k, letter in enumerate(out) if letter in left and letter in right]
    start = kept[-1] + 1 if kept else 0
    for p in range(start, len(out) + 1):
        sides = [letter in left for letter in out[p:]]
        if sum(a != b for a, b in pairwise(sides)) <= 1:
            owners = {(letter in left, letter in right) for letter in out[:p]}
            # letters of one operand and common ones together would repeat the other operand in memory
            return p if len(owners) <= 1 else None
    return None


@lru_cache(maxsize=16384)
def _product(equation: str) -> Product | None:
    left, right, out = split_equation(equation)
    if not right:
        return None
    p = batch_letters(left, right, out)
    if p is None:
        return None
    operands = (left, right)
    block = out[p:]
    first = 0 if not block or block[0] in left else 1
    second = 1 - first
    blocks = tuple([letter for letter in block if letter in operands[k]] for k in (first, second))
    summed = [letter for letter in left if letter in right and letter not in out]

    def axes(k: int, letters: Any) -> tuple[int, ...]:
        return tuple(operands[k].index(letter) for letter in letters)

    prefix = out[:p]
    batch = tuple(axes(k, [letter for letter in prefix if letter in operands[k]]) for k in (first, second))
    owner = tuple((0, left.index(letter)) if letter in left else (1, right.index(letter)) for letter in prefix)
    return Product(
        first,
        (batch[0], batch[1]),
        (axes(first, blocks[0]), axes(second, blocks[1])),
        (axes(first, summed), axes(second, summed)),
        owner,
    )


@constant_while_tracing
def _product_constant(equation: str) -> Product | None:
    return _product(equation)


class Recipe(NamedTuple):
    """One product for operands of given shapes: how each becomes a matrix (or a batch of them), and the result's shape.

    None stands for nothing to do. An operand with an `expand` is repeated over the batch without a copy.
    """

    first: int
    permute: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    reshape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    expand: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    size: tuple[int, ...]  # of the product: (m, n) or (batch, m, n)
    shape: tuple[int, ...] | None
    thin: bool


def _make_recipe(product: Product, left: Sequence[int], right: Sequence[int], *, symbolic: bool = False) -> Recipe:
    """The recipe for these shapes; `symbolic` sizes are not compared, for a comparison would fix them."""
    shapes = (left, right)
    first, second = product.first, 1 - product.first
    m_shape = [shapes[first][k] for k in product.blocks[0]]
    n_shape = [shapes[second][k] for k in product.blocks[1]]
    m, n, depth = prod(m_shape), prod(n_shape), prod([shapes[first][k] for k in product.summed[0]])
    prefix = [shapes[k][axis] for k, axis in product.prefix]
    count = prod(prefix)
    orders = (
        product.batch[0] + product.blocks[0] + product.summed[0],
        product.batch[1] + product.summed[1] + product.blocks[1],
    )
    matrices: list[tuple[int, ...]] = [(m, depth), (depth, n)]
    expand: list[tuple[int, ...] | None] = [None, None]
    if prefix:
        for side, own in enumerate(product.batch):
            expand[side] = None if own else (count, *matrices[side])
            matrices[side] = (count if own else 1, *matrices[side])
    permute: list[tuple[int, ...] | None] = []
    reshape: list[tuple[int, ...] | None] = []
    for k, order, matrix in zip((first, second), orders, matrices, strict=True):
        still = order == tuple(range(len(order)))
        permute.append(None if still else order)
        reshape.append(None if not symbolic and tuple(shapes[k][axis] for axis in order) == matrix else matrix)
    size = (count, m, n) if prefix else (m, n)
    shape = (*prefix, *m_shape, *n_shape)
    return Recipe(
        first,
        (permute[0], permute[1]),
        (reshape[0], reshape[1]),
        (expand[0], expand[1]),
        size,
        None if not symbolic and shape == size else shape,
        not symbolic and not prefix and n < THIN <= m,
    )


@lru_cache(maxsize=32768)
def _recipe(equation: str, left: torch.Size, right: torch.Size) -> Recipe | None:
    product = _product(equation)
    return None if product is None else _make_recipe(product, left, right)


def _as_matrix(x: Tensor, recipe: Recipe, side: int) -> Tensor:
    permute, reshape, expand = recipe.permute[side], recipe.reshape[side], recipe.expand[side]
    if permute is not None:
        x = x.permute(permute)
    if reshape is not None:
        x = x.reshape(reshape)
    return x if expand is None else x.expand(expand)


def _for_batches(x: Tensor) -> Tensor:
    """A batch of matrices that MKL takes as it is: torch would loop over any other, and copy every matrix by itself."""
    _, m, n = x.shape
    _, row, col = x.stride()
    if (col == 1 and row >= n) or (row == 1 and col >= m):
        return x
    return x.contiguous()


def contract(equation: str, left: Tensor, right: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Contract two operands (or permute and sum one); the result is laid out in memory as the equation says.

    A step with one operand that only permutes is a view; equations that no single matrix product can lay out go
    through `torch.einsum`, which returns a permuted view. `out` is contiguous memory that a matrix product may write
    its result to (where another route serves better, the result is elsewhere: use what is returned).

    Example:
        >>> import torch
        >>> x, factor = torch.ones(2, 3, 5), torch.ones(5, 4)
        >>> contract("bac,cr->arb", x, factor).shape, contract("bac,cr->arb", x, factor).is_contiguous()
        (torch.Size([3, 4, 2]), True)
    """
    if right is None:
        source, _, target = split_equation(equation)
        if len(source) == len(target):
            return left.permute([source.index(letter) for letter in target])
        return torch.einsum(equation, left)
    if torch.compiler.is_compiling() or type(left) not in PLAIN or type(right) not in PLAIN:
        product = _product_constant(equation)  # sizes may be symbols, which no cache can hold
        recipe = None if product is None else _make_recipe(product, left.shape, right.shape, symbolic=True)
    else:
        recipe = _recipe(equation, left.shape, right.shape)
    if recipe is None:
        return torch.einsum(equation, left, right)
    a, b = (left, right) if recipe.first == 0 else (right, left)
    a, b = _as_matrix(a, recipe, 0), _as_matrix(b, recipe, 1)
    if len(recipe.size) == 3 and a.device.type == "cpu" and type(a) in PLAIN and type(b) in PLAIN:
        a, b = _for_batches(a), _for_batches(b)
    if recipe.thin and a.device.type == "cpu":
        result = torch.mm(b.T, a.T).T.contiguous()
    elif out is not None:
        out = out.view(recipe.size)
        result = torch.mm(a, b, out=out) if len(recipe.size) == 2 else torch.bmm(a, b, out=out)
    else:
        result = torch.mm(a, b) if len(recipe.size) == 2 else torch.bmm(a, b)
    return result if recipe.shape is None else result.reshape(recipe.shape)
