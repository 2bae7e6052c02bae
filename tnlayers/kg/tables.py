"""Entity tables: dense ones, or networks whose rows are contracted from slices."""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompositions import Network
from tnlayers.embedding import Embedding
from tnlayers.kg.model import Entities

Table = nn.Embedding | Embedding
"""What has a `weight` (entities, d) and returns rows for ids."""


def make_table(
    count: int,
    width: int,
    network: str | Network | Callable[..., Any] = "dense",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Table:
    """An entity table (count, width).

    Args:
        count: entities.
        width: numbers an entity.
        network: "dense"; a Network; or a callable (shape, dtype, device) -> Network.
        dtype: of the numbers.
        device: of the numbers.

    Raises:
        ValueError: another word than "dense".

    Example:
        >>> import tnlayers
        >>> from decompositions import TTMatrix
        >>> table = make_table(1000, 64, tnlayers.random_network(TTMatrix, rank=4))
        >>> rows_of(table, torch.tensor([3, 5])).shape
        torch.Size([2, 64])
    """
    if isinstance(network, str):
        if network != "dense":
            raise ValueError(
                f"make_table: entity_table must be 'dense', a Network or a callable (shape, dtype, device) -> Network, "
                f"got {network!r}; for example tnlayers.random_network(TTMatrix, rank=8)"
            )
        return nn.Embedding(count, width, dtype=dtype, device=device)
    return Embedding(count, width, network=network, dtype=dtype, device=device)


def reset_table(table: Table, generator: torch.Generator | None = None, std: int | float | None = None) -> None:
    """Draw a table anew, entries of the given standard deviation; Xavier's `sqrt(2 / (count + width))` by default.

    Example:
        >>> table = make_table(300, 200)
        >>> reset_table(table, torch.Generator().manual_seed(0))
        >>> round(float(table.weight.detach().std()) / (2 / 500) ** 0.5, 1)
        1.0
    """
    std = sqrt(2 / (table.num_embeddings + table.embedding_dim)) if std is None else std
    if isinstance(table, nn.Embedding):
        nn.init.normal_(table.weight, std=std, generator=generator)
        return
    table._std = float(std)
    table.reset_parameters(generator)


def rows_of(table: Table, entities: Entities = None) -> Float[Tensor, "n d"]:
    """Rows of a table: those of ids, of a range, or all.

    Example:
        >>> rows_of(make_table(6, 2), slice(2, 5)).shape
        torch.Size([3, 2])
    """
    if isinstance(entities, Tensor):
        return table(entities)
    if entities is None:
        return table.weight
    if isinstance(table, nn.Embedding):
        return table.weight[entities]
    return table(torch.arange(table.num_embeddings, device=table.cores[0].device)[entities])
