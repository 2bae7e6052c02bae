"""Models of ours inside PyKEEN: as an Interaction, as an ERModel, tables as Representations; and back."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from tnlayers.kg.foreign import PyKEENModel
from tnlayers.kg.model import KGModel

EXTRA = "PyKEEN is needed; pip install 'tnlayers[kg]'"


def interaction(model: KGModel, *, fresh: bool = False) -> Any:
    """A model of ours as a PyKEEN `Interaction`, trained in place by PyKEEN's `pipeline`.

    The interaction holds the model itself, all its tables included, shared or separate, dense, hyperbolic or networks;
    what PyKEEN passes around in place of embeddings are numbers of entities and relations (`.representations()`). So a
    query is contracted once with everything but the candidates, in any broadcast shape, and batch norm and dropout act
    on queries alone, as in our own training. For an optimizer of ours see `pipeline_optimizer`.

    Args:
        model: any KGModel.
        fresh: PyKEEN calls `reset_parameters` when it builds a model and when training begins. True: the model draws
            its parameters anew then (from PyKEEN's `random_seed`); False: it goes back to those it has now.

    Returns:
        pykeen.nn.modules.Interaction, with `.model` (the model) and `.representations()`, the arguments of `ERModel`:
        `pipeline(model=ERModel, model_kwargs=interaction(model).representations(), training_loop="lcwa", ...)`. The
        triples need `create_inverse_triples=model.inverse`.

    Raises:
        ImportError: PyKEEN is not installed.
        TypeError: no KGModel; with `fresh`, one without `reset_parameters`.

    Example:
        >>> interaction(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: interaction: expected a KGModel, got Linear
    """
    _check("interaction", model)
    if fresh and not hasattr(model, "reset_parameters"):
        raise TypeError(f"interaction: fresh=True needs reset_parameters(), which {type(model).__name__} has not")
    return _classes()["KGInteraction"](model, fresh)


def er_model(model: KGModel, triples_factory: Any, *, fresh: bool = False, **options: Any) -> Any:
    """A model of ours as a PyKEEN `ERModel`, for `pipeline(model=...)` and all else that takes a model of PyKEEN.

    Args:
        model: any KGModel, numbered as the factory numbers (see `load_triples` of a PyKEEN dataset).
        triples_factory: PyKEEN's training triples.
        fresh: as of `interaction`.
        options: other arguments of `ERModel`: `loss`, `loss_kwargs`, `random_seed`, `predict_with_sigmoid`.

    Returns:
        pykeen.models.ERModel that scores as the model does; `own_model` gives the model back.

    Raises:
        ImportError: PyKEEN is not installed.
        TypeError: no KGModel.
        ValueError: a factory of other entities, relations, or without the inverse triples that the model has.

    Example:
        >>> er_model(torch.nn.Linear(2, 2), None)
        Traceback (most recent call last):
        TypeError: er_model: expected a KGModel, got Linear
    """
    _check("er_model", model)
    theirs = tuple(int(getattr(triples_factory, name)) for name in ("num_entities", "num_relations"))
    inverse = bool(getattr(triples_factory, "create_inverse_triples", False))
    if theirs != (model.num_entities, model.num_relations) or inverse != model.inverse:
        raise ValueError(
            f"er_model: the factory must have the entities and relations of the model, expected {model.num_entities} "
            f"and {model.num_relations} with create_inverse_triples={model.inverse}, got {theirs[0]} and {theirs[1]} "
            f"with {inverse}"
        )
    made = interaction(model, fresh=fresh)
    models: Any = importlib.import_module("pykeen.models")
    return models.ERModel(triples_factory=triples_factory, **made.representations(), **options)


def pipeline_optimizer(model: KGModel, make: Callable[..., Optimizer]) -> type[Optimizer]:
    """An optimizer of ours for PyKEEN's `pipeline`, as the class that it wants to instantiate itself.

    PyKEEN makes an optimizer from parameters, anew after every reset; ours take the model. Projection, retraction and
    rank changes happen inside `step()`.

    Args:
        model: the one given to `interaction` or `er_model`.
        make: called with the model, `functools.partial(RiemannianAdam, lr=0.01)` say.

    Returns:
        A class for `pipeline(optimizer=...)`; options of `optimizer_kwargs` other than `lr` belong into `make`.

    Raises:
        TypeError: no KGModel.

    Example:
        >>> from tnlayers.kg import TuckER, load_triples
        >>> from tnlayers.optim import RiemannianAdam
        >>> model = TuckER(load_triples({"train": [("a", "r", "b")]}), entity_dim=3, relation_dim=2)
        >>> kind = pipeline_optimizer(model, functools.partial(RiemannianAdam, lr=0.01))
        >>> kind(model.parameters()).param_groups[0]["lr"]
        0.01
    """
    _check("pipeline_optimizer", model)

    class Within(Optimizer):
        """One of ours, made of the model whatever the parameters."""

        def __init__(self, params: Any, lr: float | int | None = None) -> None:
            del params  # those of the model
            self._made = make(model)
            super().__init__(model.parameters(), {} if lr is None else {"lr": lr})
            self.param_groups, self.state = self._made.param_groups, self._made.state
            for group in self.param_groups if lr is not None else ():
                group["lr"] = lr

        def zero_grad(self, set_to_none: bool = True) -> None:
            self._made.zero_grad(set_to_none)

        def step(self, closure: Any = None) -> Any:
            return self._made.step() if closure is None else self._made.step(closure)

        def state_dict(self) -> dict[str, Any]:
            return {"state": self._made.state_dict(), "param_groups": [{"lr": self.param_groups[0]["lr"]}]}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._made.load_state_dict(state_dict["state"])

    Within.__name__ = getattr(getattr(make, "func", make), "__name__", "Optimizer")
    return Within


def own_model(model: nn.Module, into: KGModel | None = None) -> KGModel:
    """What PyKEEN trained, as a model of ours.

    Args:
        model: an `ERModel` over `interaction(...)`, for instance `pipeline(...).model`.
        into: a model of the same kind and sizes, which gets a copy of all parameters and buffers; None returns the
            very model that PyKEEN trained. Another model of PyKEEN's comes back as a `PyKEENModel`, to be evaluated.

    Raises:
        TypeError: no model of PyKEEN's; `into` for one whose parameters are PyKEEN's own.

    Example:
        >>> own_model(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: own_model: expected a PyKEEN model, got Linear
    """
    held = getattr(getattr(model, "interaction", None), "model", None)
    if isinstance(held, KGModel):
        if into is None:
            return held
        if type(into) is not type(held):
            raise TypeError(f"own_model: into must be a {type(held).__name__}, as trained, got {type(into).__name__}")
        into.load_state_dict(held.state_dict())
        return into
    if not (hasattr(model, "score_t") and hasattr(model, "score_h")):
        raise TypeError(f"own_model: expected a PyKEEN model, got {type(model).__name__}")
    if into is not None:
        raise TypeError(f"own_model: the parameters of {type(model).__name__} are PyKEEN's own; leave into out")
    return PyKEENModel(model)


def representation(table: Tensor | nn.Module) -> Any:
    """A table of ours as a PyKEEN `Representation`, for models of PyKEEN's: dense, hyperbolic, or a network.

    The rows are those of the table, trained in place. `ERModel` does not draw a Parameter anew, so that one on a
    manifold stays on it; of a module it calls `reset_parameters`, where there is one.

    Args:
        table: (n, ...) Parameter, or a module ids -> rows with `num_embeddings`, such as `tnlayers.Embedding`.

    Returns:
        pykeen.nn.representation.Representation of `max_id` n.

    Raises:
        ImportError: PyKEEN is not installed.
        TypeError: no table.

    Example:
        >>> representation(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: representation: expected a tensor (n, ...) or a module with num_embeddings, got Linear
    """
    if not (isinstance(table, Tensor) and table.ndim > 1) and not hasattr(table, "num_embeddings"):
        raise TypeError(
            f"representation: expected a tensor (n, ...) or a module with num_embeddings, got {type(table).__name__}"
        )
    return _classes()["TableRepresentation"](table)


def broadcast_scores(
    model: KGModel, heads: Int[Tensor, "*h"], relations: Int[Tensor, "*r"], tails: Int[Tensor, "*t"]
) -> Float[Tensor, "*hrt"]:
    """Scores of broadcast ids, a query for each distinct place of (heads, relations), before any tail is seen.

    One product where all queries meet the same tails, their own products otherwise; where relations are the
    candidates, a query for each of them, and for each head where the model has no closed form for heads.

    Args:
        model: any.
        heads: ids.
        relations: ids, broadcastable with the heads.
        tails: ids, broadcastable with both.

    Example:
        >>> class Sum(KGModel):
        ...     def query(self, heads, relations):
        ...         return (heads + 10 * relations)[:, None].float()
        ...     def against(self, query, entities=None):
        ...         return query + 100 * torch.arange(4)[entities]
        >>> heads, tails = torch.tensor([[1], [2]]), torch.arange(3)[None]
        >>> broadcast_scores(Sum(4, 2, inverse=False), heads, torch.ones(2, 1, dtype=torch.long), tails)
        tensor([[ 11., 111., 211.],
                [ 12., 112., 212.]])
    """
    given = heads, relations, tails
    asked = torch.broadcast_shapes(heads.shape, relations.shape)
    whole = torch.broadcast_shapes(asked, tails.shape)
    asked, there = ((1,) * (len(whole) - len(s)) + tuple(s) for s in (asked, tails.shape))
    heads, relations = (ids.expand(asked).reshape(-1) for ids in (heads, relations))
    if not whole:
        return model(heads, relations, tails.reshape(-1)).reshape(())
    if _heads_alone_vary(model, *given, whole):
        rows = torch.broadcast_tensors(*given[1:])
        query = model.query_heads(*(ids.reshape(-1) for ids in rows))
        return model.against(query, given[0].reshape(-1)).reshape(whole)
    query = model.query(heads, relations)
    if asked[-1] == 1 and all(size == 1 for size in there[:-1]):
        tails = tails.reshape(-1)
        everything = len(tails) == model.num_entities and bool((tails.diff() == 1).all()) and int(tails[0]) == 0
        return model.against(query, None if everything else tails).reshape(whole)
    if asked[:-1] == whole[:-1] and asked[-1] == 1:
        return model.paired(query, tails.expand(whole).reshape(len(heads), -1)).reshape(whole)
    if asked != whole:  # a query meets several tails that lie in other axes: side by side with it
        places = torch.arange(len(heads), device=heads.device).reshape(asked).expand(whole).reshape(-1)
        query = _taken(query, places)
    return model.paired(query, tails.expand(whole).reshape(-1, 1)).reshape(whole)


def _heads_alone_vary(model: KGModel, heads: Tensor, relations: Tensor, tails: Tensor, whole: tuple[int, ...]) -> bool:
    """Whether every (?, r, t) meets the same heads, in the last axis, and has a closed form with this very score."""
    return (
        not model.inverse
        and model._asks_heads()
        and whole[-1] == heads.shape[-1] == heads.numel()
        and all(not ids.ndim or ids.shape[-1] == 1 for ids in (relations, tails))
        and torch.broadcast_shapes(relations.shape, tails.shape)[:-1] == whole[:-1]
    )


def _taken(query: Any, places: Tensor) -> Any:
    """Rows of a query."""
    return query[places] if isinstance(query, Tensor) else tuple(_taken(part, places) for part in query)


def _check(who: str, model: Any) -> None:
    if not isinstance(model, KGModel):
        raise TypeError(f"{who}: expected a KGModel, got {type(model).__name__}")


@functools.cache
def _classes() -> dict[str, Any]:
    """The classes, made when first needed: their bases are PyKEEN's. They are found as attributes of this module."""
    try:
        modules: Any = importlib.import_module("pykeen.nn.modules")
        representations: Any = importlib.import_module("pykeen.nn.representation")
    except ImportError as error:
        raise ImportError(f"interaction: {EXTRA}") from error

    class KGInteraction(modules.Interaction):
        """Scores of a KGModel; its representations are ids (see `interaction`)."""

        entity_shape = ("",)
        relation_shape = ("",)

        def __init__(self, model: KGModel, fresh: bool) -> None:
            super().__init__()
            self.model, self.fresh = model, fresh
            # PyKEEN resets from the innermost module outwards, so what it redrew is put back last
            self._kept = None if fresh else {name: value.clone() for name, value in model.state_dict().items()}

        def forward(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return broadcast_scores(self.model, h, r, t)

        def reset_parameters(self) -> None:
            model: Any = self.model
            if self.fresh:
                model.reset_parameters()
            elif self._kept is not None:
                model.load_state_dict(self._kept)

        def representations(self) -> dict[str, Any]:
            """Arguments of `ERModel`: this interaction, and the numbers that it reads."""
            held = self.model
            return {
                "interaction": self,
                "entity_representations": IdRepresentation(held.num_entities, False),
                "relation_representations": IdRepresentation(held.num_relations, held.inverse),
            }

    class IdRepresentation(representations.Representation):
        """Numbers in place of embeddings; of relations in our order, PyKEEN's being r, r^-1, s, s^-1, ..."""

        def __init__(self, max_id: int, interleaved: bool) -> None:
            super().__init__(max_id=max_id, shape=(), unique=False)
            self.interleaved = interleaved
            self.register_buffer("ids", torch.arange(max_id), persistent=False)

        def _plain_forward(self, indices: Tensor | None = None) -> Tensor:
            ids: Any = self.ids if indices is None else indices
            return ids // 2 + ids % 2 * (self.max_id // 2) if self.interleaved else ids

    class TableRepresentation(representations.Representation):
        """Rows of a table of ours (see `representation`)."""

        def __init__(self, table: Any) -> None:
            dense = isinstance(table, Tensor)
            count = len(table) if dense else table.num_embeddings
            shape = table.shape[1:] if dense else table(torch.zeros(1, dtype=torch.int64)).shape[1:]
            super().__init__(max_id=count, shape=tuple(shape), unique=not dense)
            self.table = table

        def _plain_forward(self, indices: Tensor | None = None) -> Tensor:
            if isinstance(self.table, Tensor):
                return self.table if indices is None else self.table[indices]
            found: Tensor = self.table(torch.arange(self.max_id, device=self.device) if indices is None else indices)
            return found

    made = {kind.__name__: kind for kind in (KGInteraction, IdRepresentation, TableRepresentation)}
    for kind in made.values():  # pickled by name
        kind.__module__, kind.__qualname__ = __name__, kind.__name__
    return made


def __getattr__(name: str) -> Any:
    if name in ("KGInteraction", "IdRepresentation", "TableRepresentation"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
