"""Tables of a trained model: which tensors hold a row for every entity or relation, and where they lie in the ball."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tnlayers.hyperbolic import lift, lorentz_to_poincare
from tnlayers.kg.mixed import LPITF, MIGTF
from tnlayers.kg.model import KGModel
from tnlayers.kg.rotations import RotH


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Rows of a model by name of the table: those of entities, and those of relations (inverse ones last).

    Args:
        entities: name -> (num_entities, d); a row of several axes is flattened.
        relations: name -> (num_relations, d).

    Example:
        >>> Embeddings({"entities": torch.zeros(3, 2)}, {}).entities["entities"].shape
        torch.Size([3, 2])
    """

    entities: dict[str, Float[Tensor, "N d"]]
    relations: dict[str, Float[Tensor, "R e"]]

    def __repr__(self) -> str:
        shapes = ({name: tuple(rows.shape) for name, rows in of.items()} for of in (self.entities, self.relations))
        return "Embeddings(entities={}, relations={})".format(*shapes)


def embeddings(model: KGModel) -> Embeddings:
    """The tables of a model, found by what they do: row k matters to the scores of entity (relation) k alone.

    A Parameter of at least two axes or a module with `num_embeddings` (a network of a table: its rows are formed), with
    as many rows as the graph has entities or relations. Those of equal size that are something else, a core say, are
    told apart by the gradient of a score. Biases are left out.

    Args:
        model: any; its mode and gradients stay as they are.

    Raises:
        ValueError: no table of entities, as where one network holds all scores.

    Example:
        >>> class Dot(KGModel):
        ...     def __init__(self):
        ...         super().__init__(5, 4, inverse=True)
        ...         self.items = torch.nn.Embedding(5, 3)
        ...         self.scales = torch.nn.Parameter(torch.randn(4, 3))
        ...     def query(self, heads, relations):
        ...         return self.items(heads) * self.scales[relations]
        ...     def against(self, query, entities=None):
        ...         return query @ (self.items.weight if entities is None else self.items.weight[entities]).mT
        >>> found = embeddings(Dot())
        >>> list(found.entities), list(found.relations)
        (['items'], ['scales'])
    """
    tables = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "num_embeddings", None) in (model.num_entities, model.num_relations)
    }
    inside = tuple(f"{name}." for name in tables)
    kept = {name: value for name, value in model.named_parameters() if not name.startswith(inside) and value.ndim > 1}
    touched = _touched(model, kept)
    entities: dict[str, Tensor] = {}
    relations: dict[str, Tensor] = {}
    for found, count, own in ((entities, model.num_entities, (0, 1)), (relations, model.num_relations, (0,))):
        for name, module in tables.items():
            if module.num_embeddings == count:
                found[name] = _rows(module, count)
        for name, value in kept.items():
            if len(value) == count and touched[name] <= set(own):
                found[name] = value.detach().reshape(count, -1)
    if not entities:
        raise ValueError(
            f"embeddings: {type(model).__name__} holds no table of its {model.num_entities} entities; its networks "
            "stand for all scores together"
        )
    return Embeddings(entities, relations)


def degrees(triples: Float[Tensor, "n 3"], num_entities: int) -> Float[Tensor, N]:
    """How many triples each entity is in, as head or tail.

    Args:
        triples: head, relation, tail.
        num_entities: N.

    Example:
        >>> degrees(torch.tensor([[0, 0, 1], [0, 0, 2]]), 4)
        tensor([2, 1, 1, 0])
    """
    return torch.bincount(triples[:, 0], minlength=num_entities) + torch.bincount(triples[:, 2], minlength=num_entities)


@functools.singledispatch
def ball_points(model: nn.Module) -> Float[Tensor, "N d"] | None:
    """Entities of a hyperbolic model in the unit Poincaré ball; None for a model of flat space.

    A kind of model registers how its table is read: `ball_points.register(RotH)`.

    Args:
        model: any.

    Example:
        >>> ball_points(torch.nn.Linear(2, 2)) is None
        True
    """
    return None


@ball_points.register(LPITF)
def _lorentz_points(model: LPITF) -> Tensor:
    c = torch.as_tensor(model.curvature(), dtype=torch.float64).detach().cpu()
    return lorentz_to_poincare(lift(model.entities.detach().double().cpu(), c), c) * c.sqrt()


@ball_points.register(MIGTF)
def _hyperbolic_part(model: MIGTF) -> Tensor:
    return _lorentz_points(model.hyperbolic)


@ball_points.register(RotH)
def _tangent_points(model: RotH) -> Tensor:
    """Every relation has a curvature of its own; drawn at their geometric mean."""
    c = model.curvatures().detach().double().cpu().log().mean().exp()
    v = c.sqrt() * model.entities.detach().double().cpu()
    norm = v.norm(dim=1, keepdim=True)
    return torch.tanh(norm) / norm.clamp_min(torch.finfo(torch.float64).tiny) * v


def _rows(module: nn.Module, count: int) -> Tensor:
    device = next(module.parameters()).device
    with torch.no_grad():
        found: Tensor = module(torch.arange(count, device=device))
    return found.reshape(count, -1)


def _touched(model: KGModel, parameters: dict[str, nn.Parameter]) -> dict[str, set[int]]:
    """Rows of each parameter that the score of the triple (0, 0, 1) depends on."""
    if not parameters:
        return {}
    modes = {module: module.training for module in model.modules()}
    asked = {value: value.requires_grad for value in parameters.values()}
    device = next(iter(asked)).device
    try:
        model.eval()
        for value in asked:
            value.requires_grad_(True)
        head, relation = torch.zeros(2, 1, dtype=torch.int64, device=device)
        with torch.enable_grad():
            score = model(head, relation, head + (1 if model.num_entities > 1 else 0)).sum()
        slopes = torch.autograd.grad(score, list(asked), allow_unused=True)
    finally:
        for value, needed in asked.items():
            value.requires_grad_(needed)
        for module, mode in modes.items():
            module.training = mode
    return {
        name: set() if slope is None else set(slope.flatten(1).any(1).nonzero()[:, 0].tolist())
        for name, slope in zip(parameters, slopes, strict=True)
    }
