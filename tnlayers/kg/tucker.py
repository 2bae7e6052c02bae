"""TuckER, and its relative for graphs of many relations."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from decompositions import Network, Tucker
from tnlayers.dense import unchanged_rng
from tnlayers.kg.bilinear import Bilinear, Masks, check_sizes
from tnlayers.kg.foreign import take


class TuckER(Bilinear):
    """TuckER: `score(h, r, t) = W x_1 R[r] x_2 E[h] x_3 E[t]`, with batch norm and dropout as published.

    In the order of the paper's code: x = drop(BN0(E[h])); M = drop(sum_k R[r, k] W[k]); y = drop(BN1(x M)); y E^T.
    The start is the published one: W from U(-1, 1), tables by Xavier's normal law. R and W are one Tucker network
    (`model.maps`, a tree: RankAdaptive finds the relation rank). Parameters: N d_e + R d_r + d_r d_e^2, 4 d_e for the
    norms, N for the bias, N d_e more for separate tables.

    One deviation, in dropout alone: by default rows of a batch with one relation share the mask of its map; every row
    by itself has the published law. `masks="row"` is the published joint law.

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        entity_dim: d_e.
        relation_dim: d_r.
        shared: whether heads and tails have one table, as published.
        batch_norm: whether BN0 and BN1 are there.
        dropouts: rates for the head, the maps, and the query.
        masks: "relation" or "row", see above.
        entity_bias: a bias for each tail, which the published WN18RR run had.
        entity_table: "dense"; or a network of the table, a callable (shape, dtype, device) -> Network such as
            `tnlayers.random_network(TTMatrix, rank=8)`.
        generator: of the start.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: sizes below 1, rates outside [0, 1).

    References:
        I. Balazevic, C. Allen, T. Hospedales, TuckER: tensor factorization for knowledge graph completion, EMNLP 2019,
        eq. 2, arXiv 1901.09590.

    Example:
        >>> from types import SimpleNamespace
        >>> umls = SimpleNamespace(num_entities=135, num_relations=92, inverse=True)
        >>> TuckER(umls, entity_dim=100, relation_dim=30).parameter_count()
        316660
    """

    def __init__(
        self,
        triples: Any,
        entity_dim: int = 200,
        relation_dim: int = 30,
        *,
        shared: bool = True,
        batch_norm: bool = True,
        dropouts: Sequence[int | float] = (0.2, 0.2, 0.3),
        masks: Masks = "relation",
        entity_bias: bool = False,
        entity_table: str | Network | Callable[..., Any] = "dense",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        name = type(self).__name__
        check_sizes(name, entity_dim=entity_dim, relation_dim=relation_dim)
        core = torch.empty(relation_dim, entity_dim, entity_dim, dtype=dtype, device=device)
        relations = core.new_empty(triples.num_relations, relation_dim)
        for tensor in (core, relations):
            nn.init.zeros_(tensor)
        super().__init__(
            triples,
            maps=Tucker(core, [relations], modes=(0,), num_rows=2),
            entity_dim=entity_dim,
            shared=shared,
            batch_norm=batch_norm,
            dropouts=dropouts,
            masks=masks,
            entity_bias=entity_bias,
            entity_table=entity_table,
            dtype=dtype,
            device=device,
        )
        self.reset_parameters(generator)

    @classmethod
    def from_pykeen(cls, model: nn.Module) -> "TuckER":
        """A trained `pykeen.models.TuckER` as a model of ours: the same scores, norms with their statistics, dropouts.

        PyKEEN has norms and dropouts where this class has them; its core is (head, relation, tail). Regularizers and
        constraints, which act in training alone, are left behind. Relations are renumbered (r^-1 is r + R / 2 here).

        Args:
            model: a PyKEEN model with a `TuckERInteraction`; it is copied.

        Raises:
            TypeError: another model.
            ValueError: tables that are normalized or dropped in every forward pass.

        Example:
            >>> TuckER.from_pykeen(torch.nn.Linear(2, 2))
            Traceback (most recent call last):
            TypeError: TuckER.from_pykeen: expected a PyKEEN model with a TuckERInteraction, got Linear
        """
        graph, theirs, entities, relations = take(f"{cls.__name__}.from_pykeen", model, "TuckERInteraction")
        core = theirs.core_tensor.detach().transpose(0, 1)
        drops = (theirs.head_dropout, theirs.relation_dropout, theirs.head_relation_dropout)
        with unchanged_rng(core.device):
            made = cls(
                graph,
                core.shape[1],
                core.shape[0],
                batch_norm=theirs.head_batch_norm is not None,
                dropouts=[drop.p for drop in drops],
                dtype=core.dtype,
                device=core.device,
            )
        made.norm0, made.norm1 = map(deepcopy, (theirs.head_batch_norm, theirs.head_relation_batch_norm))
        with torch.no_grad():
            for mine, value in zip((*made.maps.cores, made.entities.weight), (core, relations, entities), strict=True):
                mine.copy_(value)
        return made.train(model.training)

    def _reset_maps(self, generator: torch.Generator | None) -> None:
        core, relations = self.maps.cores
        nn.init.uniform_(core, -1, 1, generator=generator)
        nn.init.xavier_normal_(relations, generator=generator)


class TTER(Bilinear):
    """TuckER whose core is a tensor train, head - relation - tail: for graphs that need a large relation_dim.

    `W[k, i, j] = sum_ab A[i, a] B[a, k, b] C[j, b]`: (a + b) d_e + a d_r b numbers in place of d_r d_e^2, and a map
    costs as many multiplications as it has entries in B. With R, the maps are a tree of four cores. The start has the
    variance of TuckER's core, 1/3 an entry, in every entry of W; tables by Xavier's normal law.

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        entity_dim: d_e.
        relation_dim: d_r.
        rank: (a, b), or one number for both.
        shared: whether heads and tails have one table.
        batch_norm: whether BN0 and BN1 are there.
        dropouts: rates for the head, the maps, and the query.
        masks: as of `TuckER`.
        entity_bias: a bias for each tail.
        entity_table: as of `TuckER`.
        generator: of the start.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: sizes below 1, rates outside [0, 1).

    Example:
        >>> from types import SimpleNamespace
        >>> graph = SimpleNamespace(num_entities=135, num_relations=92, inverse=True)
        >>> model = TTER(graph, entity_dim=100, relation_dim=60, rank=20)
        >>> model.parameter_count(), model.maps.network.is_tree
        (47420, True)
    """

    def __init__(
        self,
        triples: Any,
        entity_dim: int = 200,
        relation_dim: int = 200,
        rank: int | tuple[int, int] = 50,
        *,
        shared: bool = True,
        batch_norm: bool = True,
        dropouts: Sequence[int | float] = (0.2, 0.2, 0.3),
        masks: Masks = "relation",
        entity_bias: bool = False,
        entity_table: str | Network | Callable[..., Any] = "dense",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        a, b = (rank, rank) if isinstance(rank, int) else rank
        check_sizes("TTER", entity_dim=entity_dim, relation_dim=relation_dim, rank=min(a, b))
        middle = torch.zeros(relation_dim, a, b, dtype=dtype, device=device)
        sides = (triples.num_relations, entity_dim, entity_dim)
        factors = [middle.new_zeros(n, r) for n, r in zip(sides, middle.shape, strict=True)]
        super().__init__(
            triples,
            maps=Tucker(middle, factors, num_rows=2),
            entity_dim=entity_dim,
            shared=shared,
            batch_norm=batch_norm,
            dropouts=dropouts,
            masks=masks,
            entity_bias=entity_bias,
            entity_table=entity_table,
            dtype=dtype,
            device=device,
        )
        self.reset_parameters(generator)

    def _reset_maps(self, generator: torch.Generator | None) -> None:
        middle, relations, first, second = self.maps.cores
        _, a, b = middle.shape
        nn.init.uniform_(middle, -1, 1, generator=generator)
        nn.init.xavier_normal_(relations, generator=generator)
        for factor, rank in ((first, a), (second, b)):
            nn.init.normal_(factor, std=rank**-0.5, generator=generator)
