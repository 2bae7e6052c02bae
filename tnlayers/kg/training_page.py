"""The page of a training job: figures, tables by relation, and settings; it fetches nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from tnlayers.kg.figures import entity_map, history_figure
from tnlayers.kg.history import History
from tnlayers.kg.metrics import Metrics
from tnlayers.kg.model import KGModel
from tnlayers.kg.triples import Triples
from tnlayers.page import (
    Cell,
    Column,
    compact,
    figure_png,
    gallery,
    html_page,
    html_table,
    inline_image,
    paragraph,
    text_table,
    tiles,
    unfolded,
)

CLASSES = ("1-1", "1-N", "N-1", "N-N")


def metrics_columns(metrics: Metrics) -> list[Column]:
    """Columns of a table of evaluations.

    Args:
        metrics: gives the k of Hits@k.
    """
    hits = [Column(f"H@{k}", f"share of true answers ranked {k} or better", numeric=True) for k in metrics.hits_at]
    return [
        Column("", flexible=True),
        Column("MRR", "mean reciprocal rank of the true answer among candidates not known to be right", numeric=True),
        *hits,
        Column("MR", "mean rank", numeric=True),
        Column("AMRI", "adjusted mean rank index: 1 is perfect, 0 is chance", numeric=True),
        Column("queries", "head and tail questions", numeric=True),
    ]


def metrics_row(name: str, metrics: Metrics) -> list[Cell]:
    """One row.

    Args:
        name: first cell.
        metrics: of the row.
    """
    return [
        Cell(name),
        _figure(metrics.mrr),
        *(_figure(metrics.hits[k]) for k in metrics.hits_at),
        Cell(f"{metrics.mr:.1f}", metrics.mr),
        _figure(metrics.amri),
        Cell(f"{metrics.count:,}", metrics.count),
    ]


def overview_rows(metrics: Metrics) -> list[list[Cell]]:
    """Rows of the three treatments of ties, the two directions, and the classes of relations.

    Args:
        metrics: an evaluation.
    """
    named = {"realistic": metrics.realistic, "optimistic": metrics.optimistic, "pessimistic": metrics.pessimistic}
    named |= {f"{name}s": part for name, part in metrics.by_direction.items()} if len(metrics.by_direction) > 1 else {}
    named |= {f"relations {kind}": metrics.by_cardinality[kind] for kind in CLASSES if kind in metrics.by_cardinality}
    return [metrics_row(name, part) for name, part in named.items()]


def relation_rows(metrics: Metrics, limit: int | None = None) -> list[list[Cell]]:
    """Rows of the relations, those with most queries first.

    Args:
        metrics: an evaluation.
        limit: rows at most.
    """
    parts = sorted(metrics.by_relation.items(), key=lambda item: -item[1].count)
    return [metrics_row(name, part) for name, part in parts[:limit]]


def evaluation_text(metrics: Metrics, by_relation: bool = False) -> str:
    """An evaluation as text: ties, directions, classes, and relations where asked.

    Args:
        metrics: an evaluation.
        by_relation: whether the relations follow.
    """
    columns = metrics_columns(metrics)
    found = text_table(columns, overview_rows(metrics))
    return f"{found}\n\n{text_table(columns, relation_rows(metrics))}" if by_relation else found


def training_page(
    model: KGModel, triples: Triples, history: History, metrics: Mapping[str, Metrics], settings: Mapping[str, Any]
) -> str:
    """Everything a training job found, as one page.

    Args:
        model: trained.
        triples: its graph.
        history: of the training.
        metrics: split -> evaluation.
        settings: of the job.
    """
    kind = type(model).__name__
    shown: list[tuple[str, str, str]] = []
    if history.epochs:
        shown.append(
            _shown("Training", f"{len(history.epochs)} epochs", history_figure({kind: history}, size=(4.6, 3.6)))
        )
    with contextlib.suppress(ValueError):  # a network that holds all scores has no table to draw
        shown.append(_shown("Entities", "coloured by degree", entity_map(model, triples, "", size=(4.6, 3.8))))
    sections: list[tuple[str, str]] = [("", tiles(_tiles(model, history, metrics)))]
    sections.append(("Figures", gallery(shown)))
    for split, found in metrics.items():
        columns = metrics_columns(found)
        body = html_table(columns, overview_rows(found), caption=split) + paragraph(
            "Filtered: other answers known from any split are not counted. Ties: realistic is the mean of the best and "
            "the worst rank. Figures of directions, classes and relations are realistic ones."
        )
        body += html_table(columns, relation_rows(found), caption=f"{split}, by relation")
        sections.append((f"Evaluation, {split}", body))
    lines = [f"{key}: {value}" for key, value in settings.items()]
    sections.append(("Settings", unfolded("of this run", lines) + _plain(triples)))
    return html_page(f"tnlayers: {kind} on {triples.name or 'triples'}", sections, lead=_lead(triples))


def _figure(value: float) -> Cell:
    return Cell(f"{value:.4f}", value)


def _shown(caption: str, remark: str, figure: Any) -> tuple[str, str, str]:
    return caption, remark, inline_image(figure_png(figure, transparent=True), caption)


def _tiles(model: KGModel, history: History, metrics: Mapping[str, Metrics]) -> Sequence[tuple[str, str, str]]:
    found = [
        (f"MRR, {split}", f"{part.mrr:.4f}", f"Hits@10 {part.hits.get(10, float('nan')):.4f}, {part.count:,} queries")
        for split, part in metrics.items()
    ]
    found.append(("parameters", compact(model.parameter_count()), f"{model.parameter_count():,}"))
    if history.epochs:
        each = history.seconds / len(history.epochs)
        found.append(("training", f"{history.seconds:.0f} s", f"{each:.2f} s an epoch, ended by {history.stopped}"))
    return found


def _plain(triples: Triples) -> str:
    return unfolded("of the data", str(triples.describe()).splitlines())


def _lead(triples: Triples) -> str:
    return (
        f"{triples.num_entities:,} entities, {len(triples.relation_to_id):,} relations"
        f"{' and their inverses' if triples.inverse else ''}, {len(triples.train):,} training triples."
    )
