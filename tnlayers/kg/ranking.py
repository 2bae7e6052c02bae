"""Filtered ranking: where the true head and the true tail of each triple stand among all candidates, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tnlayers.kg.answers import Answers
from tnlayers.kg.foreign import as_model
from tnlayers.kg.metrics import HITS, Metrics, Ranks
from tnlayers.kg.scoring import Scorer
from tnlayers.kg.triples import Triples

Candidates = Int[Tensor, "n"] | Int[Tensor, "q k"] | Mapping[str, Tensor] | None
DIRECTIONS = {"both": ("head", "tail"), "head": ("head",), "tail": ("tail",)}
BUFFER = 48 << 20
"""Bytes that the scores of a batch, and what they are compared in, may take by default."""
COUNTED = 1 << 22
"""Columns counted at once: a sum of ones below 2^24 is exact in float32."""


class _Side(NamedTuple):
    """Queries (first, relation, ?) in one direction, with the true answers and all known ones."""

    name: str
    first: Tensor
    relation: Tensor
    truth: Tensor
    known: Answers


def evaluate(
    model: nn.Module,
    triples: Triples,
    split: str | Tensor = "test",
    *,
    direction: str = "both",
    batch_size: int | None = None,
    entity_chunk: int | None = None,
    candidates: Candidates = None,
    filtered: bool = True,
    exact: bool = True,
    hits_at: Sequence[int] = HITS,
) -> Metrics:
    """Rank the true heads and tails of a split among all entities, other known answers left out.

    For (h, r, t) the tail t is ranked for (h, r, ?) and the head h for (?, r, t), which models with inverse relations
    answer as (t, r^-1, ?). Other answers known from train, valid and test are not counted. Scores are logits. Ties:
    optimistic rank 1 + #(s > s*), pessimistic 1 + #(s >= s*), realistic their mean; see `Metrics`.

    With `exact` the model scores in float64 (in a copy), and two scores are tied when they agree after rounding to
    24 bits (to 32 for a float64 model). What the shape of a product and the place in it change is 2^-53 of its
    terms, so neither batch_size, entity_chunk nor the order of the entities moves a rank, and equal entities are tied,
    unless a score is that near to the middle between two rounded numbers (1 in some 10^8).
    Otherwise scores are compared as the model's own arithmetic gives them, and near ties may fall either way.

    Cost: one `query` and one row of `against` for each distinct (first entity, relation), and a few passes over it.
    Heads of a model without inverse relations and without `query_heads`: a query for every entity and relation.

    Args:
        model: a `KGModel`, or a PyKEEN model trained on the same numbers. It is left in the mode it is in.
        triples: the graph; its entities and relations must be those of the model.
        split: "train", "valid" or "test"; or triples (n, 3) of the graph.
        direction: "both", "tail" or "head".
        batch_size: distinct queries scored together; None: as many as 48 MiB hold.
        entity_chunk: entities scored together: it limits what the model needs, the scores of a batch are kept whole.
        candidates: entities ranked: ids (n,) for every query; ids (queries, k), a row for each triple of the split, for
            one direction, of which one that stands there twice counts twice; or a mapping of "head" and "tail" to
            either. The truth is always among them. None: all.
        filtered: False counts other known answers as mistakes.
        exact: see above.
        hits_at: the k of `Metrics.hits`.

    Raises:
        ValueError: an empty split, a graph that is not the model's, scores that are NaN or infinite (by name).
        TypeError: no model of a known kind; triples or candidates that are no int64 tensor.

    References:
        A. Bordes et al., "Translating embeddings for modeling multi-relational data", NeurIPS 2013 (filtered setting).

    Example:
        >>> from tnlayers.kg import KGModel, load_triples
        >>> triples = load_triples({"train": [("a", "r", "b"), ("b", "r", "c")], "test": [("a", "r", "c")]})
        >>> class Last(KGModel):  # prefers entities with a higher number
        ...     def query(self, heads, relations):
        ...         return torch.ones(len(heads), 1)
        ...     def against(self, query, entities=None):
        ...         return query * torch.arange(3.0)[entities]
        >>> evaluate(Last(3, 2, inverse=True), triples).hits
        {1: 0.5, 3: 1.0, 10: 1.0}
    """
    hits_at = tuple(hits_at)
    if not all(map(_is_count, hits_at)):
        raise ValueError(f"evaluate: hits_at must be ints >= 1, got {hits_at!r}; take (1, 3, 10)")
    ranks = rank(
        model,
        triples,
        split,
        direction=direction,
        batch_size=batch_size,
        entity_chunk=entity_chunk,
        candidates=candidates,
        filtered=filtered,
        exact=exact,
    )
    return Metrics.of(ranks, triples, hits_at)


def rank(
    model: nn.Module,
    triples: Triples,
    split: str | Tensor = "test",
    *,
    direction: str = "both",
    batch_size: int | None = None,
    entity_chunk: int | None = None,
    candidates: Candidates = None,
    filtered: bool = True,
    exact: bool = True,
) -> Ranks:
    """The ranks that `evaluate` averages, heads first, each direction in the order of the split; see `evaluate`.

    Example:
        >>> from tnlayers.kg import KGModel, load_triples
        >>> triples = load_triples({"train": [("a", "r", "b"), ("b", "r", "c")], "test": [("a", "r", "c")]})
        >>> class Flat(KGModel):
        ...     def query(self, heads, relations):
        ...         return torch.zeros(len(heads), 3)
        ...     def against(self, query, entities=None):
        ...         return query[:, entities]
        >>> ranks = rank(Flat(3, 2, inverse=True), triples, direction="tail")
        >>> ranks.optimistic.item(), ranks.pessimistic.item(), ranks.options.item()
        (1, 2, 2)
    """
    ours = as_model(model)
    asked = _checked(ours, triples, split, direction, batch_size, entity_chunk)
    with torch.no_grad(), Scorer(ours, exact) as scorer:
        found = []
        for name in DIRECTIONS[direction]:
            chosen = _candidates(candidates, name, direction, len(asked), triples.num_entities)
            side = _side(name, asked, triples)
            if chosen is not None and chosen.ndim == 2:
                counts = _among_own(scorer, side, chosen, triples, batch_size, filtered)
            else:
                counts = _among_all(scorer, side, chosen, triples, batch_size, entity_chunk, filtered)
            found.append(Ranks(asked, torch.full((len(asked),), name == "head"), *counts))
    parts = [[getattr(part, field) for part in found] for field in Ranks.__dataclass_fields__]
    return Ranks(*map(torch.cat, parts))


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _checked(
    model: Any, triples: Triples, split: str | Tensor, direction: str, batch_size: int | None, chunk: int | None
) -> Tensor:
    """The triples asked for, after every check that needs no score."""
    if direction not in DIRECTIONS:
        raise ValueError(f"evaluate: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    for what, value in (("batch_size", batch_size), ("entity_chunk", chunk)):
        if value is not None and not _is_count(value):
            raise ValueError(f"evaluate: {what} must be an int >= 1, or None, got {value!r}")
    own = model.num_relations // 2 if model.inverse else model.num_relations
    if model.num_entities != triples.num_entities or own != len(triples.relation_to_id):
        raise ValueError(
            f"evaluate: the model has {model.num_entities} entities and {own} relations, the graph "
            f"{triples.num_entities} and {len(triples.relation_to_id)}; evaluate on the triples it was made from"
        )
    asked = triples.split(split) if isinstance(split, str) else split
    if not isinstance(asked, Tensor) or asked.dtype != torch.int64:
        what = str(asked.dtype) if isinstance(asked, Tensor) else type(asked).__name__
        raise TypeError(f"evaluate: triples to rank are int64 ids in a tensor, got {what}; torch.tensor(ids) makes one")
    asked = asked.cpu()
    if not len(asked):
        raise ValueError(f"evaluate: the split {split if isinstance(split, str) else ''} is empty; nothing to rank")
    limit = torch.tensor([triples.num_entities, len(triples.relation_to_id), triples.num_entities])
    if asked.ndim != 2 or asked.shape[1] != 3 or bool(((asked < 0) | (asked >= limit)).any()):
        raise ValueError(
            f"evaluate: triples to rank are (n, 3) with ids of the graph, below {limit.tolist()}, got the shape "
            f"{tuple(asked.shape)}; inverse relations are not asked for by id"
        )
    return asked


def _candidates(given: Candidates, name: str, direction: str, count: int, num_entities: int) -> Tensor | None:
    """Candidates of one direction: None, distinct ids (n,), or ids a query (q, k)."""
    if isinstance(given, Mapping):
        unknown = set(given) - {"head", "tail"}
        if unknown:
            raise ValueError(f"evaluate: candidates have the keys head and tail, got {', '.join(given)}")
        chosen = given.get(name)
    else:
        chosen = given
        if isinstance(chosen, Tensor) and chosen.ndim == 2 and direction == "both":
            raise ValueError("evaluate: candidates a query are for one direction; pass {'head': ..., 'tail': ...}")
    if chosen is None:
        return None
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.int64:
        what = str(chosen.dtype) if isinstance(chosen, Tensor) else type(chosen).__name__
        raise TypeError(f"evaluate: candidates are int64 ids in a tensor, got {what}; torch.tensor(ids) makes one")
    chosen = chosen.cpu()
    if chosen.ndim not in (1, 2) or not chosen.numel() or (chosen.ndim == 2 and len(chosen) != count):
        raise ValueError(
            f"evaluate: candidates are ids (n,) or ({count}, k), a row for each triple, got {tuple(chosen.shape)}"
        )
    if int(chosen.amin()) < 0 or int(chosen.amax()) >= num_entities:
        raise ValueError(
            f"evaluate: candidates must be below {num_entities} entities, got {int(chosen.amin())} to "
            f"{int(chosen.amax())}"
        )
    return chosen.unique() if chosen.ndim == 1 else chosen


def _side(name: str, asked: Tensor, triples: Triples) -> _Side:
    turned = (lambda part: part.flip(1)) if name == "head" else (lambda part: part)
    first, relation, truth = turned(asked).unbind(1)
    known = Answers.of(turned(triples.known), triples.num_entities, len(triples.relation_to_id))
    return _Side(name, first, relation, truth, known)


def _among_all(
    scorer: Scorer,
    side: _Side,
    chosen: Tensor | None,
    triples: Triples,
    batch_size: int | None,
    chunk: int | None,
    filtered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimistic ranks, pessimistic ranks and options among the same candidates for all; distinct queries once."""
    device, total = scorer.device, triples.num_entities
    key, group = (side.relation * total + side.first).unique(return_inverse=True)  # by relation: cores are shared
    order = group.argsort(stable=True)
    offsets = torch.cat([group.new_zeros(1), torch.bincount(group, minlength=len(key)).cumsum(0)])
    # truths that are no candidates get a column each, so that every score comes from the same product
    columns = None if chosen is None else torch.cat([chosen, side.truth]).unique()
    width = total if columns is None else len(columns)
    place, outside = torch.arange(total), torch.zeros(0, dtype=torch.int64)
    if columns is not None and chosen is not None:
        place = torch.full((total,), -1)
        place[columns] = torch.arange(width)
        outside = (~torch.isin(columns, chosen)).nonzero()[:, 0]
    rows = batch_size or max(16, min(1024, BUFFER // (2 * width * scorer.itemsize)))
    chunk = chunk or max(1024, (1 << 20) // rows)
    scores = torch.empty(min(rows, len(key)), width, dtype=scorer.dtype, device=device)
    work = torch.empty_like(scores)
    better, tied, options = (torch.empty(len(group), dtype=torch.int64) for _ in range(3))
    for begin in range(0, len(key), rows):
        end = min(begin + rows, len(key))
        first, relation = key[begin:end] % total, key[begin:end] // total
        held = scores[: end - begin]
        query = scorer.ask(side.name, first.to(device), relation.to(device))
        for left in range(0, width, chunk):
            part = slice(left, min(left + chunk, width))
            scorer.fill(held[:, part], query, part if columns is None else columns[part].to(device))
        _refuse_non_finite(held, side.name, first, relation, columns, triples)
        mine = order[offsets[begin] : offsets[end]]
        row = group[mine] - begin
        where = place[side.truth[mine]]
        truth = held[row.to(device), where.to(device)]
        held[:, outside.to(device)] = -torch.inf
        left_out = torch.zeros(end - begin, dtype=torch.int64)
        itself = torch.ones(len(mine), dtype=torch.int64)
        if filtered:
            answered, answer = side.known.lookup(first, relation)
            answer = place[answer]
            answered, answer = answered[answer >= 0], answer[answer >= 0]
            held[answered.to(device), answer.to(device)] = -torch.inf
            counted = ~torch.isin(answer, outside)
            left_out += torch.bincount(answered[counted], minlength=end - begin)
            # a truth that is no known answer (triples from elsewhere) still stands in its own row
            itself = (~side.known.contains(side.first[mine], side.relation[mine], side.truth[mine])).long()
        itself = torch.where(torch.isin(where, outside), 0, itself)
        above, equal = _count(held, row.to(device), truth, work)
        better[mine], tied[mine] = 1 + above, 1 + equal - itself
        options[mine] = (width - len(outside)) - left_out[row] + 1 - itself
    return better, tied, options


def _among_own(
    scorer: Scorer, side: _Side, chosen: Tensor, triples: Triples, batch_size: int | None, filtered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where every query has candidates of its own."""
    rows = batch_size or 1024
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for begin in range(0, len(chosen), rows):
        part = slice(begin, begin + rows)
        first, relation, truth = side.first[part], side.relation[part], side.truth[part, None]
        offered = chosen[part]
        query = scorer.ask(side.name, first.to(scorer.device), relation.to(scorer.device))
        scores = scorer.pairs(query, torch.cat([truth, offered], 1).to(scorer.device))
        _refuse_non_finite(scores, side.name, first, relation, torch.cat([truth, offered], 1), triples)
        kept = offered != truth
        if filtered:
            shape = offered.shape
            kept &= ~side.known.contains(first[:, None].expand(shape), relation[:, None].expand(shape), offered)
        kept = kept.to(scorer.device)
        above = ((scores[:, 1:] > scores[:, :1]) & kept).sum(1)
        equal = ((scores[:, 1:] >= scores[:, :1]) & kept).sum(1)
        found.append((1 + above.cpu(), 1 + equal.cpu(), 1 + kept.sum(1).cpu()))
    better, tied, options = zip(*found, strict=True)
    return torch.cat(better), torch.cat(tied), torch.cat(options)


def _count(scores: Tensor, row: Tensor, truth: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    """Scores above, and not below, each truth in its row. Rows are ascending; a row may have several truths."""
    above, equal = (torch.empty(len(row), dtype=torch.int64) for _ in range(2))
    fresh = torch.ones_like(row, dtype=torch.bool)
    fresh[1:] = row[1:] != row[:-1]
    again = (~fresh).nonzero()[:, 0]
    blocks = [(fresh.nonzero()[:, 0], scores), *((some, None) for some in again.split(len(scores)) if len(again))]
    for chosen, held in blocks:  # the first truth of every row needs no copy of the row
        rows = scores[row[chosen]] if held is None else held
        limit = truth[chosen, None]
        for out, test in ((above, torch.gt), (equal, torch.ge)):
            total = torch.zeros(len(chosen), dtype=torch.int64)
            for part in rows.split(COUNTED, 1):
                ones = part.new_ones(part.shape[1])
                mask = test(part, limit, out=work[: len(chosen), : part.shape[1]])
                total += (mask @ ones).long().cpu()
            out[chosen.cpu()] = total
    return above, equal


def _refuse_non_finite(
    scores: Tensor, name: str, first: Tensor, relation: Tensor, columns: Tensor | None, triples: Triples
) -> None:
    """NaN compares as worse than everything: a diverged model would be perfect."""
    low, high = torch.aminmax(scores)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
    entity = column if columns is None else int(columns[row, column] if columns.ndim == 2 else columns[column])
    known, label = triples.entity_labels[int(first[row])], triples.relation_labels[int(relation[row])]
    query = f"(?, {label}, {known})" if name == "head" else f"({known}, {label}, ?)"
    raise ValueError(
        f"evaluate: scores must be finite, got {scores[row, column].item()} for {query} at "
        f"{triples.entity_labels[entity]}; look for a diverged training"
    )
