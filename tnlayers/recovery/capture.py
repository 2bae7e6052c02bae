"""Blocks of a model: which there are, what they are called with and give, how far they are from their originals."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.recovery.feed import Store, call, main_output, rows_that_count


class _Reached(BaseException):
    """The pass has come to the place that was asked for; no `except Exception` of a model stops it."""


def find_blocks(model: nn.Module, blocks: str | Sequence[str] | None = None) -> list[str]:
    """Names of blocks: those given or matched, or the children of the `nn.ModuleList` or `nn.Sequential` that holds
    the most parameters (children without parameters left out).

    Raises:
        ValueError: a name or pattern that matches nothing; no such list in the model.

    Example:
        >>> find_blocks(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
        ['0', '2']
    """
    names = [name for name, _ in model.named_modules() if name]
    if blocks is not None:
        found: list[str] = []
        for pattern in [blocks] if isinstance(blocks, str) else blocks:
            matched = [name for name in names if fnmatchcase(name, pattern) and name.count(".") == pattern.count(".")]
            if not matched:
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
                hint = f"; perhaps {', '.join(map(repr, near))}" if near else ""
                raise ValueError(f"find_blocks: every pattern must match a module, got {pattern!r}{hint}")
            found += [name for name in matched if name not in found]
        return found
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    if not lists:
        raise ValueError(
            "find_blocks: the model holds no nn.ModuleList or nn.Sequential; give blocks=, names or patterns such as "
            "'encoder.layer.*'"
        )
    # a list of one child says nothing
    name, most = max(lists, key=lambda one: (len(one[1]) > 1, sum(p.numel() for p in one[1].parameters())))
    start = f"{name}." if name else ""
    return [f"{start}{child}" for child, m in most.named_children() if any(True for _ in m.parameters())]


def call_order(model: nn.Module, names: Sequence[str], batch: Any) -> list[str]:
    """The blocks in the order of their calls in one pass.

    Raises:
        ValueError: a block that is not called, or more than once.
    """
    called: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, n=name: called.append(n)) for name in names
    ]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if called.count(name) != 1:
            raise ValueError(
                f"reconstruct: a block must be called once a pass, got {called.count(name)} calls of {name!r}; give "
                "blocks= that are, or use distill"
            )
    return called


def run_to(model: nn.Module, module: nn.Module, batch: Any, *, output: bool = False) -> tuple[Any, Any]:
    """Arguments of a module in a pass of the model, and its output if asked; the pass ends there."""
    seen: list[Any] = [None, None]

    def before(m: nn.Module, args: Any, kwargs: Any) -> None:
        seen[0] = (args, kwargs)
        if not output:
            raise _Reached

    def after(m: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
        seen[1] = made
        raise _Reached

    with _hooked(module, before, after if output else None):
        try:
            call(model, batch)
        except _Reached:
            return seen[0], seen[1]
    raise ValueError("reconstruct: a block was called for one batch and not for another; give other blocks=")


@contextmanager
def _hooked(module: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    if after is not None:
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_pairs(
    pairs: Store, block: nn.Module, layer: nn.Module, original: nn.Module, dense: nn.Module, store: Store
) -> bool:
    """Inputs of a layer in the block and what its original gives, for every batch; whether each is called once."""
    x: list[Tensor] = []
    y: list[Tensor] = []
    with (
        _hooked(layer, lambda m, args, kwargs: x.append(args[0]) if args else None, None),
        _hooked(dense, lambda m, args, kwargs: None, lambda m, args, kwargs, made: y.append(made)),
    ):
        for k in range(len(store)):
            entry = store[k]
            mask = entry["mask"]
            x.clear()
            y.clear()
            args, kwargs = entry["given"]
            block(*args, **kwargs)
            args, kwargs = entry["original"]
            original(*args, **kwargs)
            if len(x) != 1 or len(y) != 1 or not isinstance(y[0], Tensor) or x[0].shape[:-1] != y[0].shape[:-1]:
                return False
            pairs.append((rows_that_count(x[0], mask), rows_that_count(y[0], mask)))
    return True


def both(block: nn.Module, entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a block gives and what it should, the rows that count."""
    args, kwargs = entry["given"]
    made = rows_that_count(main_output(block(*args, **kwargs)), entry["mask"])
    return made, rows_that_count(entry["target"], entry["mask"]).to(made)


@torch.no_grad()
def block_error(block: nn.Module, store: Store, power: float) -> float:
    """`‖block'(x') - y‖^2 / ‖y‖^2` over the stored batches."""
    wrong = 0.0
    for k in range(len(store)):
        made, target = both(block, store[k])
        wrong += float((made.double() - target.double()).square().sum())
    return wrong / power
