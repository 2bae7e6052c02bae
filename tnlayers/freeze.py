"""Freeze a model for inference: merged weights where that is faster, within a budget of bytes; thaw it again."""

from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnlayers.frozen import BUFFERS, Form, drop, install
from tnlayers.layer import NetworkLayer
from tnlayers.page import Cell, Column, compact, number, text_table
from tnlayers.surgery import network_layers, sites, weight_key

DOUBT = 2.0
"""A layer is left as it is where it is predicted this many times faster: many small steps cost more than is predicted,
and a merged weight costs memory only."""


class FreezeRow(NamedTuple):
    """One network layer of a frozen model: `form` is "dense", "factors", or "left" with a reason.

    `bytes` are those of its buffers (0 where they are shared with an earlier row); `seconds` of one forward pass are
    predictions, for comparison only: as it was, and now.
    """

    name: str
    kind: str
    form: str
    reason: str
    bytes: int
    seconds_live: float
    seconds: float


class Freeze:
    """What `freeze` did, layer by layer; as a context manager it thaws at exit what it froze.

    Attributes:
        rows: one `FreezeRow` a network layer, in model order.
        bytes_before: bytes of the model's parameters and buffers, merged ones left out, tied ones once.
        bytes_after: the same with the merged ones.

    Example:
        >>> import tnlayers
        >>> from torch import nn
        >>> from decompositions import LowRank
        >>> model = nn.Sequential(tnlayers.Linear(512, 512, network=tnlayers.random_network(LowRank, rank=32))).eval()
        >>> with tnlayers.freeze(model) as frozen:
        ...     frozen.rows[0].form, frozen.bytes_after - frozen.bytes_before
        ('factors', 131072)
        >>> model[0].frozen
        False
    """

    def __init__(self, rows: tuple[FreezeRow, ...], fresh: list[NetworkLayer], before: int, after: int) -> None:
        self.rows, self.bytes_before, self.bytes_after = rows, before, after
        self._fresh = fresh

    def __enter__(self) -> "Freeze":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._fresh:
            drop(layer)

    def __str__(self) -> str:
        frozen = sum(row.form != "left" for row in self.rows)
        head = (
            f"freeze: {frozen} of {len(self.rows)} layers frozen, bytes {_size(self.bytes_before)} -> "
            f"{_size(self.bytes_after)}"
        )
        if not self.rows:
            return f"{head}\nno layer of this model is a network"
        lines = [head, "", text_table(_COLUMNS, [_cells(row) for row in self.rows])]
        left = [f"  {row.name or '(model)'}: {row.reason}" for row in self.rows if row.reason]
        return "\n".join([*lines, *(["", "left as they are:", *left] if left else [])])


_COLUMNS = (
    Column("layer", flexible=True),
    Column("kind"),
    Column("form"),
    Column("bytes", numeric=True),
    Column("live ms", numeric=True),
    Column("frozen ms", numeric=True),
)


def _size(count: int) -> str:
    return compact(float(count))


def _cells(row: FreezeRow) -> list[Cell]:
    times = [number(1e3 * seconds) for seconds in (row.seconds_live, row.seconds)]
    texts = (row.name or "(model)", row.kind, row.form, _size(row.bytes), *times)
    return [Cell(text) for text in texts]


def freeze(model: nn.Module, max_bytes: int | None = None, batch: int | None = None) -> Freeze:
    """Merge weights into non-persistent buffers, in place, in the layers whose inference plan says that it is faster.

    A layer's choices are its plan as it is, the dense weight, and (linear layers) the product of two matrices at the
    cut of smallest rank, which is how a low-rank layer stays low-rank with its middle matrix merged into one side. An
    embedding's table is merged only under `max_bytes`: by itself it would undo the point of the layer. Under
    `max_bytes`, the largest predicted gain per byte comes first.

    Guarantee: a frozen layer computes the function of the cores it had when `freeze` was called. `train()`,
    `set_network`, `reset_parameters`, `load_state_dict`, moves of device or dtype, `thaw` drop the buffers; so do all
    but `thaw` on a layer tied to it, and the step of an optimizer that has its cores. Called with other cores
    (`functional_call`, `torch.func`), a frozen layer computes with those, as if it were not frozen. Cores changed in
    place by other means (by hand, by the update of an averaged model) are not noticed: call `freeze` again, which
    merges anew. A state dict, a file written by `save` and a pickle hold cores only; a deep copy is frozen like its
    original.

    Layers that share all cores share one buffer; a module used twice, or in two models, is frozen for both.

    Cost: one merge a layer; nothing is installed before everything is merged.

    Args:
        model: in evaluation mode; modules that are no network layers are left alone.
        max_bytes: budget of all buffers together; None: no limit, but embeddings stay as they are.
        batch: rows a layer is called with (images of a convolution, tokens of an embedding); None: those of its plan.

    Returns:
        What was done, printable; a context manager that thaws at exit the layers that were not frozen before.

    Raises:
        TypeError: not a module.
        ValueError: a network layer in training mode; a negative budget, or a batch below 1.

    Example:
        >>> import torch, tnlayers
        >>> from torch import nn
        >>> from decompositions import TTMatrix
        >>> layer = tnlayers.Linear(512, 512, network=tnlayers.random_network(TTMatrix, rank=16, order=2))
        >>> model = nn.Sequential(layer, nn.ReLU()).eval()
        >>> frozen = tnlayers.freeze(model)
        >>> frozen.rows[0].form, frozen.bytes_after - frozen.bytes_before, len(model.state_dict())
        ('dense', 1048576, 3)
        >>> tnlayers.thaw(model)
    """
    for what, value, least in (("max_bytes", max_bytes, 0), ("batch", batch, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"freeze: {what} must be None or an integer >= {least}, got {value!r}")
    sites(model)  # refuses by name what is no model
    layers = list(network_layers(model))
    training = next((name for name, layer in layers if layer.training), None)
    if training is not None:
        raise ValueError(
            f"freeze: layers must be in evaluation mode, expected training=False, got True for "
            f"{training or '(model)'!r}; call model.eval() first"
        )
    chosen, reasons, lives = _choose([layer for _, layer in layers], max_bytes, batch)
    made: dict[Any, tuple[Tensor, Tensor | None]] = {}
    with torch.inference_mode(False), torch.no_grad():  # inference tensors would not serve other calls
        for _, layer in layers:
            form = chosen.get(id(layer))
            if form is not None and _key(layer, form) not in made:
                made[_key(layer, form)] = layer._merge(form)
    before = _bytes(model)
    fresh = [layer for _, layer in layers if not layer.frozen and id(layer) in chosen]
    rows, counted = [], set()
    for name, layer in layers:
        drop(layer)
        form, live = chosen.get(id(layer)), lives[id(layer)]
        kind = type(layer).__name__
        if form is None:
            rows.append(FreezeRow(name, kind, "left", reasons[id(layer)], 0, live, live))
            continue
        key = _key(layer, form)
        install(layer, *made[key])
        rows.append(FreezeRow(name, kind, form.kind, "", 0 if key in counted else form.bytes, live, form.seconds))
        counted.add(key)
    return Freeze(tuple(rows), fresh, before, before + sum(row.bytes for row in rows))


def thaw(model: nn.Module) -> None:
    """Drop the merged weights of every layer of the model, which computes with its cores again.

    Example:
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=2)).eval()
        >>> frozen = tnlayers.freeze(layer)
        >>> tnlayers.thaw(layer)
        >>> layer.frozen
        False
    """
    sites(model)
    for _, layer in network_layers(model):
        drop(layer)


def _choose(
    layers: list[NetworkLayer], max_bytes: int | None, batch: int | None
) -> tuple[dict[int, Form], dict[int, str], dict[int, float]]:
    """Form of each layer to freeze, reason of each other one, and predicted seconds of all; by the layers' ids."""
    wanted: list[tuple[float, int, NetworkLayer, list[Form]]] = []
    reasons: dict[int, str] = {}
    lives: dict[int, float] = {}
    for position, layer in enumerate(layers):
        live, ways = layer._frozen_forms(batch)
        lives[id(layer)] = live
        faster = sorted((way for way in ways if way.seconds <= DOUBT * live), key=lambda way: way.seconds)
        if len(layer.cores._parameters) != len(layer.cores):
            reasons[id(layer)] = "its cores are computed (torch.nn.utils.parametrize); remove_parametrizations first"
        elif not ways:
            reasons[id(layer)] = "this kind of layer has no merged form"
        elif not faster:
            best = min(way.seconds for way in ways)
            reasons[id(layer)] = f"its plan is faster as it is, predicted {live * 1e3:.3g} ms to {best * 1e3:.3g} ms"
        elif max_bytes is None and layer._frozen_under_budget_only:
            reasons[id(layer)] = f"its table takes {_size(faster[0].bytes)} bytes; give max_bytes to have it merged"
        else:
            rate = (DOUBT * live - faster[0].seconds) / max(1, faster[0].bytes)
            wanted.append((-rate, position, layer, faster))
    chosen: dict[int, Form] = {}
    paid: set[Any] = set()
    spent = 0
    for _, _, layer, faster in sorted(wanted, key=lambda entry: entry[:2]):
        for form in faster:
            price = 0 if _key(layer, form) in paid else form.bytes
            if max_bytes is None or spent + price <= max_bytes:
                chosen[id(layer)] = form
                paid.add(_key(layer, form))
                spent += price
                break
        else:
            assert max_bytes is not None
            least = min(form.bytes for form in faster)
            reasons[id(layer)] = f"max_bytes: it needs {_size(least)} bytes, {_size(max_bytes - spent)} are left"
    return chosen, reasons, lives


def _key(layer: NetworkLayer, form: Form) -> Any:
    """What two layers that can share one buffer have in common."""
    return (*weight_key(layer), form.cut)


def _bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once, without those that freezing made."""
    merged = {id(layer._buffers.get(name)) for _, layer in network_layers(model) for name in BUFFERS}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in merged}
    return sum(t.numel() * t.itemsize for t in tensors.values() if not nn.parameter.is_lazy(t))
