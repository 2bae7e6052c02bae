"""The query of a batch against the entities, in chunks of the entity axis, and the gradients back through both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tnlayers.kg.model import KGModel

MEMORY = 1 << 29
"""Bytes that the logits of a batch and their gradients may take before the entity axis is cut."""

LARGE = 1 << 20
"""Numbers in a table of entities whose looked-up rows get a sparse gradient."""

Context = Callable[[], AbstractContextManager[Any]]
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits, rows, tails) -> a sum that is the loss, or a chunk's part of it, and its gradient."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Queries and their answers, or triples and their negatives: a worker's part of what one step learns from.

    Args:
        heads: (B,) of the queries, sorted by relation.
        relations: (B,).
        rows: (A,) the query of each answer; of sampled losses 0 to B - 1.
        tails: (A,) answers.
        size: queries of all workers.
        answers: answers of all workers.
        negatives: (B, k) entities, of sampled losses.
        kept: (B, k) which of them are no known answers; None: all.
    """

    heads: Int[Tensor, B]
    relations: Int[Tensor, B]
    rows: Int[Tensor, A]
    tails: Int[Tensor, A]
    size: int
    answers: int
    negatives: Int[Tensor, "B k"] | None = None
    kept: Bool[Tensor, "B k"] | None = None


class Asked:
    """The query of a batch, cut off the graph: scores of chunks go down to it first, and from it to the parameters.

    So one chunk of logits is alive, and the table of entities has its full gradient before the rows that the query has
    looked up are added: on a CPU these are then kept sparse, in place of a second gradient of the table's size.

    Args:
        model: in training mode.
        batch: its queries are asked.
        context: under which the model scores (autocast).
        memory: bytes of the logits and their gradients; above, there are several `parts`.
    """

    def __init__(self, model: KGModel, batch: Batch, context: Context, memory: int) -> None:
        self.model, self.batch, self.context = model, batch, context
        self.tables = _large_tables(model)
        for table in self.tables:
            table.sparse = True
        try:
            with context():
                query = model.query(batch.heads, batch.relations)
        finally:
            for table in self.tables:
                table.sparse = False
        self.leaves, tree = tree_flatten(query)
        self.cut = [leaf.detach().requires_grad_() if _moves(leaf) else leaf for leaf in self.leaves]
        self.query = tree_unflatten(self.cut, tree)
        size = max([4, *(leaf.element_size() for leaf in self.leaves if isinstance(leaf, Tensor))])
        row = 2 * max(1, len(batch.heads)) * size  # logits and their gradient
        width = max(1, -(-model.num_entities // max(1, -(-model.num_entities * row // max(row, memory)))))
        every = range(0, model.num_entities, width)
        self.parts = [slice(at, min(at + width, model.num_entities)) for at in every]

    def scores(self, part: slice) -> Tensor:
        """Logits of a chunk of the entities."""
        with self.context():
            return self.model.against(self.query, None if len(self.parts) == 1 else part)

    def descend(self, kernel: Kernel) -> Tensor:
        """Sum of a kernel over the chunks, and its gradient into the parameters."""
        rows, tails = self.batch.rows, self.batch.tails
        total = torch.zeros((), dtype=torch.float64, device=tails.device)
        for part in self.parts:
            logits = self.scores(part)
            if len(self.parts) == 1:
                value, gradient = kernel(logits.detach(), rows, tails)
            else:
                inside = (tails >= part.start) & (tails < part.stop)
                value, gradient = kernel(logits.detach(), rows[inside], tails[inside] - part.start)
            logits.backward(gradient)
            total += value
            del logits, gradient
        pairs = [(old, new.grad) for old, new in zip(self.leaves, self.cut, strict=True) if _moves(old)]
        pairs = [(old, grad) for old, grad in pairs if grad is not None]
        if pairs:
            torch.autograd.backward([old for old, _ in pairs], [grad for _, grad in pairs])
        for table in self.tables:  # one that nothing but the query reads
            if table.weight.grad is not None and table.weight.grad.is_sparse:
                table.weight.grad = table.weight.grad.to_dense()
        return total


def _large_tables(model: KGModel) -> list[nn.Embedding]:
    """Plain tables of the entities on a CPU, large enough for a second gradient of their size to cost time."""
    return [
        module
        for module in model.modules()
        if type(module) is nn.Embedding
        and module.num_embeddings == model.num_entities
        and module.weight.numel() >= LARGE
        and module.weight.device.type == "cpu"
        and module.weight.is_leaf
        and not (module.sparse or module.scale_grad_by_freq)
    ]


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
