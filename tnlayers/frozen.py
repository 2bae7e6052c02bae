"""What a frozen layer holds: its weight merged into non-persistent buffers, and when these may be used.

`freeze.py` chooses and installs, the layers ask `frozen_weight` (or `frozen_linear`) first in their forward. Nothing
here looks at versions or addresses of tensors: the buffers stand for the very core Parameters they were made from.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from math import prod
from operator import is_
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from decompositions import Network
from decompositions.formats.network import Labels
from decompositions.formats.plan import BATCH, plan_path, run

T = TypeVar("T", bound="Freezable")
BUFFERS = ("frozen_inner", "frozen_weight")
"""Non-persistent buffers of a frozen layer (the first only where the weight is kept as a product of two matrices)."""

FREE_CORES = 8
"""Cores without outside labels up to which every cut between columns and rows is tried."""


_holders: "WeakSet[Freezable]" = WeakSet()  # the frozen layers of this process
_hook: Any = None


class Cut(NamedTuple):
    """A network as a product of two matrices, `W = outer inner`: which cores make which, and the bonds between."""

    inner: tuple[int, ...]  # cores of the column side
    outer: tuple[int, ...]  # cores of the row side
    bonds: Labels
    rank: int


class Form(NamedTuple):
    """One way to freeze a layer: `cut` None means the dense weight; `seconds` of one forward pass are predicted."""

    kind: str
    seconds: float
    bytes: int
    cut: Cut | None = None


class Forms(NamedTuple):
    """Predicted seconds of the layer as it is, and the ways to freeze it."""

    live: float
    ways: tuple[Form, ...]


class Freezable(nn.Module):
    """What every layer has to be frozen: the state, and the ends of it that torch's own methods bring about."""

    cores: nn.ParameterList
    _frozen_from: tuple[nn.Parameter | None, ...] = ()
    _frozen_under_budget_only = False  # whether `freeze` needs max_bytes to merge this kind of layer
    _forced: Any = None  # a plan under measurement

    @property
    def frozen(self) -> bool:
        """Whether `tnlayers.freeze` has merged this layer's weight."""
        return "frozen_weight" in self._buffers

    def _frozen_forms(self, batch: int | None) -> Forms:
        """Ways to freeze this layer for `batch` rows; a kind of layer that has none is left as it is."""
        return Forms(0.0, ())

    def _merge(self, form: Form) -> tuple[Tensor, Tensor | None]:
        """The merged tensors of one of `_frozen_forms`, of torch's shapes and contiguous."""
        raise TypeError(f"{type(self).__name__}._merge: this kind of layer has no merged form")

    def train(self: T, mode: bool = True) -> T:
        """Set the mode as torch does; training mode drops what `tnlayers.freeze` merged."""
        if mode:
            release(self)
        return super().train(mode)

    def _apply(self: T, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> T:
        release(self)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: cores and settings, nothing that was merged."""
        buffers = {name: buffer for name, buffer in self._buffers.items() if name not in BUFFERS}
        plain = {"_buffers": buffers, "_non_persistent_buffers_set": self._non_persistent_buffers_set - set(BUFFERS)}
        return {**self.__dict__, **plain, "_frozen_from": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        remember(self)


def best_cut(net: Network) -> Cut | None:
    """The cut of smallest rank that separates the columns from the rows; None where a core has both.

    `W = U S V^T` is cut on either side of S, so that S goes where it is free; a Tucker operator at its core; a chain at
    its middle bond. Cores that carry no outside label go to the side that makes the rank smallest.

    Example:
        >>> from decompositions import LowRank, TTMatrix
        >>> best_cut(LowRank.random(row_modes=(6,), col_modes=(4,), rank=2))
        Cut(inner=(1, 2), outer=(0,), bonds=('a',), rank=2)
        >>> best_cut(TTMatrix.random(row_modes=(2, 2), col_modes=(2, 2), rank=2)) is None
        True
    """
    rows, cols, sizes = set(net.rows), set(net.cols), net.sizes
    inner = [k for k, leg in enumerate(net.legs) if cols.intersection(leg)]
    outer = [k for k, leg in enumerate(net.legs) if rows.intersection(leg)]
    if not inner or not outer or set(inner) & set(outer):
        return None
    free = [k for k in range(len(net.legs)) if k not in inner and k not in outer]
    sides = product((0, 1), repeat=len(free)) if len(free) <= FREE_CORES else ((s,) * len(free) for s in (0, 1))
    best = None
    for side in sides:
        left = (*inner, *(k for k, s in zip(free, side, strict=True) if s == 0))
        right = (*outer, *(k for k, s in zip(free, side, strict=True) if s == 1))
        there = {label for k in right for label in net.legs[k]}
        bonds = tuple(dict.fromkeys(label for k in sorted(left) for label in net.legs[k] if label in there))
        rank = prod(sizes[label] for label in bonds)
        if best is None or rank < best.rank:
            best = Cut(tuple(sorted(left)), tuple(sorted(right)), bonds, rank)
    return best


def product_seconds(rows: int, width: int, out: int, itemsize: int) -> float:
    """Predicted time of one matrix product (rows, width) x (width, out)."""
    legs = ((BATCH, "j"), ("i", "j"))
    return plan_path(legs, {BATCH: rows, "j": width, "i": out}, (BATCH, "i"), itemsize).seconds


def merge(net: Network, cut: Cut | None) -> tuple[Tensor, Tensor | None]:
    """Contract the cores: the dense tensor (row_modes + col_modes), or the matrices (rows, rank) and (rank, columns).

    In float32 or better, whatever autocast or inference mode it is called under; half precision is rounded once.
    """
    dtype = net.dtype
    precise = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    device = net.device.type
    exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), exact:
        net = net.detach().to(precise)
        if cut is None:
            return _contract(net, range(len(net.cores)), net.outside).reshape(net.shape).to(dtype), None
        weight = _contract(net, cut.outer, (*net.rows, *cut.bonds)).reshape(prod(net.row_modes), cut.rank)
        inner = _contract(net, cut.inner, (*cut.bonds, *net.cols)).reshape(cut.rank, prod(net.col_modes))
        return weight.to(dtype), inner.to(dtype)


def _contract(net: Network, members: Sequence[int], result: Labels) -> Tensor:
    """Contract some cores to contiguous memory of its own: a lone core must not be aliased, it may change in place."""
    plan = plan_path([net.legs[k] for k in members], net.sizes, result, net.dtype.itemsize)
    made = run(plan.steps, [net.cores[k] for k in members])
    return made.clone(memory_format=torch.contiguous_format) if len(members) == 1 else made.contiguous()


def install(layer: "Freezable", weight: Tensor, inner: Tensor | None) -> None:
    """Let a layer hold merged tensors, instead of earlier ones, and remember what cores they stand for."""
    drop(layer)
    layer._frozen_from = tuple(layer.cores._parameters.values())
    if inner is not None:
        layer.register_buffer("frozen_inner", inner, persistent=False)
    layer.register_buffer("frozen_weight", weight, persistent=False)
    remember(layer)


def drop(layer: "Freezable") -> None:
    """Let go of the merged tensors; no-op on a layer that is not frozen."""
    for name in reversed(BUFFERS):  # the weight is last to come and first to go: `frozen_linear` relies on it
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    layer._frozen_from = ()
    _holders.discard(layer)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Drop what was merged from Parameters that an optimizer is about to change (through a tied layer, say)."""
    if not _holders:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    for holder in list(_holders):
        if stepped.intersection(map(id, holder._frozen_from)):
            drop(holder)


def release(layer: "Freezable") -> None:
    """Before the cores of a layer change: drop what was merged from them, also where tied layers hold it."""
    own = set(map(id, layer.cores._parameters.values()))
    for holder in list(_holders):
        if own.intersection(map(id, holder._frozen_from)):
            drop(holder)
    drop(layer)


def remember(layer: "Freezable") -> None:
    """Note a layer that has buffers, made or deep-copied, and watch optimizers from the first one on."""
    global _hook
    if "frozen_weight" not in layer._buffers:
        return
    _holders.add(layer)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)


def serves(layer: "Freezable") -> bool:
    """Whether the buffers stand for the cores that this call uses; refuses a core that wants a gradient.

    Other cores than those merged (`functional_call`, `torch.func.grad`, parametrized or reassigned ones) are computed
    with as if the layer were not frozen. Export replaces parameters and buffers alike, hence serves the buffers.

    Raises:
        RuntimeError: a core requires grad while grad mode is on.
    """
    held: Any = layer._modules["cores"]._parameters  # type: ignore[union-attr]  # not by attribute, which costs as much as the rest of this
    own = layer._frozen_from
    if (len(held) != len(own) or not all(map(is_, held.values(), own))) and not torch.compiler.is_exporting():
        return False
    if layer._forced is not None:  # its plans are being measured
        return False
    if torch.is_grad_enabled():
        for name, core in held.items():
            if core is not None and core.requires_grad:
                raise RuntimeError(
                    f"{type(layer).__name__}: a frozen layer cannot train, expected cores that require no grad, got "
                    f"requires_grad=True for cores.{name} in grad mode; tnlayers.thaw(model) to train, or call it "
                    "under torch.no_grad() or torch.inference_mode(), or freeze after requires_grad_(False)"
                )
    return True


def frozen_weight(layer: "Freezable") -> Tensor | None:
    """The merged dense weight, None if the layer is not frozen or this call uses other cores."""
    weight = layer._buffers.get("frozen_weight")
    return weight if weight is not None and serves(layer) else None


def frozen_linear(layer: Any, x: Tensor) -> Tensor | None:
    """`x W^T + b` with the merged weight: torch's own layer, or two where the weight is kept as a product."""
    buffers = layer._buffers
    weight = buffers.get("frozen_weight")
    if weight is None or not serves(layer):
        return None
    inner = buffers.get("frozen_inner")
    if buffers.get("frozen_weight") is not weight:  # thawed (and frozen again) by another thread in between
        return None
    if inner is not None:
        x = F.linear(x, inner)
    return F.linear(x, weight, layer.bias)
