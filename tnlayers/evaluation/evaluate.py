"""Evaluate a model: several metrics in one call. The metrics themselves may be imported from here too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from decompositions.progress import Progress
from tnlayers.calling import call, device_of, evaluating, to_device
from tnlayers.convert import parameter_count
from tnlayers.evaluation.metrics import Accuracy as Accuracy
from tnlayers.evaluation.metrics import Pooling
from tnlayers.evaluation.metrics import Similarity as Similarity
from tnlayers.evaluation.metrics import accuracy as accuracy
from tnlayers.evaluation.metrics import embedding_similarity as embedding_similarity
from tnlayers.evaluation.metrics import embeddings as embeddings
from tnlayers.evaluation.metrics import probe_accuracy as probe_accuracy
from tnlayers.evaluation.perplexity import Perplexity as Perplexity
from tnlayers.evaluation.perplexity import perplexity as perplexity
from tnlayers.evaluation.resources import PeakMemory as PeakMemory
from tnlayers.evaluation.resources import Throughput as Throughput
from tnlayers.evaluation.resources import peak_memory as peak_memory
from tnlayers.evaluation.resources import throughput as throughput
from tnlayers.evaluation.result import Evaluation as Evaluation
from tnlayers.evaluation.result import Metric as Metric
from tnlayers.evaluation.result import compare as compare
from tnlayers.texts import SANE_LENGTH, Batches, Bos, Texts, batches, check_tokens, max_positions, sample

DEFAULT_BATCH = 32


def evaluate(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    texts: str | Sequence[str] | Sequence[Any] | None = None,
    labelled: Texts | Iterable[Any] | None = None,
    reference: nn.Module | Tensor | None = None,
    metrics: Sequence[str] | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
    max_length: int | None = None,
    batch_size: int | None = None,
    pooling: Pooling = "mean",
    seconds: float | int = 3,
    threads: int | None = None,
    seed: int = 0,
    title: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Several metrics of one model in one call; the model is left as it was.

    Args:
        model: a language model, an encoder, a classifier; on any device.
        tokenizer: its own; None: texts and labelled are batches already (of images, say).
        texts: one text or several, for perplexity, similarity, speed and memory; batches without a tokenizer.
        labelled: `Texts` with labels, or batches with labels, for accuracy and probe. Names of classes are matched with
            the model's `config.label2id` where it has them all.
        reference: the model to be similar to, or what `embeddings` gave of it on these texts.
        metrics: of "size", "perplexity", "similarity", "accuracy", "probe" (logistic regression on the embeddings of
            half of the labelled texts, measured on the other half), "speed", "memory" (both on the largest batch).
            None: size and what is given for: similarity with a reference, else perplexity with a tokenizer and texts;
            accuracy with labelled.
        window: see `perplexity`.
        stride: see `perplexity`.
        bos: see `token_windows`.
        max_length: tokens a text is cut at, except for perplexity.
        batch_size: texts a call, 32 by default; windows a call for perplexity.
        pooling: see `embeddings`.
        seconds: how long to measure speed.
        threads: CPU threads while speed is measured.
        seed: of the halves of the probe.
        title: name of the model in tables; its class by default.
        progress: called as (done, total, label).

    Raises:
        ValueError: an unknown metric, a metric without what it needs, and what the metrics refuse.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> found = evaluate(model, texts=[torch.eye(3)], reference=model)
        >>> [(metric.name, metric.count) for metric in found.metrics][:3]
        [('parameters', 2), ('MiB of weights', 2), ('cosine, mean', 3)]
    """
    if metrics is None:
        alone = texts is not None and tokenizer is not None and reference is None
        given = {"similarity": reference is not None, "perplexity": alone, "accuracy": labelled is not None}
        metrics = ("size", *(name for name in METRICS if given.get(name)))
    metrics = (metrics,) if isinstance(metrics, str) else tuple(dict.fromkeys(metrics))
    _check_needs(metrics, tokenizer, texts, labelled, reference)
    task = _Task(
        model, tokenizer, texts, labelled, reference, window, stride, bos, max_length, batch_size, pooling, seconds,
        threads, seed, progress,
    )  # fmt: skip
    rows: list[Metric] = []
    conditions = {}
    for metric in metrics:
        made, said = METRICS[metric](task)
        rows += made
        if said:
            conditions[metric] = said
    return Evaluation(tuple(rows), conditions, title or type(model).__name__)


# --- one function a metric: rows and conditions ---


@dataclass(frozen=True)
class _Task:
    """The arguments of `evaluate`, and what several metrics make of them."""

    model: nn.Module
    tokenizer: Any
    texts: Any
    labelled: Any
    reference: Any
    window: int | None
    stride: int | None
    bos: Bos
    max_length: int | None
    batch_size: int | None
    pooling: Pooling
    seconds: float | int
    threads: int | None
    seed: int
    progress: Progress | None

    def batched(self, texts: Any, *, sort: bool = True) -> Any:
        """Batches of texts within the model's positions; without a tokenizer they are batches already."""
        if self.tokenizer is None:
            return list(texts)
        known = (getattr(self.tokenizer, "model_max_length", None), max_positions(self.model))
        longest = min((n for n in known if n is not None and n <= SANE_LENGTH), default=None)
        return batches(
            [texts] if isinstance(texts, str) else texts,
            self.tokenizer,
            batch_size=DEFAULT_BATCH if self.batch_size is None else self.batch_size,
            max_length=longest if self.max_length is None else self.max_length,
            sort=sort,
        )

    @cached_property
    def encoded(self) -> Any:
        """Batches of `texts`, made once."""
        return self.batched(self.texts)

    @cached_property
    def largest(self) -> Any:
        """The batch with the most tokens (the first one if they are not ours), on the model's device."""
        if isinstance(self.encoded, Batches):
            batch: Any = max(self.encoded, key=lambda item: item["input_ids"].numel())
        else:
            batch = next(iter(self.encoded), None)
        if batch is None:
            raise ValueError("evaluate: expected at least one batch, got none")
        check_tokens(self.model, batch, caller="evaluate")
        return to_device(batch, device_of(self.model))

    @property
    def pooled(self) -> str:
        """Name of the pooling."""
        return self.pooling if isinstance(self.pooling, str) else getattr(self.pooling, "__name__", "custom")


Part = tuple[list[Metric], dict[str, Any]]


def _size(task: _Task) -> Part:
    """Parameters as formats count them, and bytes as they are stored (a gauge is stored too); tied tensors once."""
    tensors = list(task.model.parameters())
    weight = sum(p.numel() * p.element_size() for p in tensors)
    return [
        Metric("parameters", "size", parameter_count(task.model), len(tensors)),
        Metric("MiB of weights", "size", weight / 2**20, len(tensors)),
    ], {"parameters": "as the formats count them", "MiB": "of all numbers stored"}


def _perplexity(task: _Task) -> Part:
    found = perplexity(
        task.model, task.texts, task.tokenizer, window=task.window, stride=task.stride, bos=task.bos,
        batch_size=task.batch_size, progress=task.progress,
    )  # fmt: skip
    said = {"window": found.window, "stride": found.stride, "bos": found.bos, "scored tokens": found.tokens}
    return [Metric("perplexity", "perplexity", found.value, found.tokens)], said


def _similarity(task: _Task) -> Part:
    s = embedding_similarity(task.model, task.reference, task.encoded, pooling=task.pooling, progress=task.progress)
    values = {"cosine, mean": s.mean, "cosine, 5 %": s.low, "cosine, worst": s.worst, "neighbours": s.neighbours}
    rows = [Metric(name, "similarity", value, s.count, change="absolute") for name, value in values.items()]
    return rows, {"texts": s.count, **_about(task.encoded), "pooling": task.pooled}


def _accuracy(task: _Task) -> Part:
    pairs = task.labelled
    if isinstance(pairs, Texts) and task.tokenizer is not None:
        pairs = task.batched(_renumbered(pairs, task.model))
    found = accuracy(task.model, pairs, progress=task.progress)
    row = Metric("accuracy", "accuracy", found.value, found.count, found.low, found.high, "absolute")
    return [row], {"samples": found.count, **_about(pairs), "interval": "Wilson, 95 %"}


def _probe(task: _Task) -> Part:
    if not isinstance(task.labelled, Texts):
        raise ValueError(f"evaluate: the metric probe needs labelled Texts, got {type(task.labelled).__name__}")
    mixed = sample(task.labelled, len(task.labelled), task.seed)
    assert mixed.labels is not None
    half = len(mixed) // 2
    encoded = task.batched(mixed)
    vectors = embeddings(task.model, encoded, pooling=task.pooling, progress=task.progress)
    found = probe_accuracy(vectors[:half], mixed.labels[:half], vectors[half:], mixed.labels[half:])
    row = Metric("probe accuracy", "probe", found.value, found.count, found.low, found.high, "absolute")
    said = {"trained on": half, "measured on": found.count, "seed": task.seed, **_about(encoded)}
    return [row], {**said, "pooling": task.pooled}


def _speed(task: _Task) -> Part:
    found = throughput(task.model, task.largest, seconds=task.seconds, threads=task.threads)
    low, high = (found.rate * found.seconds / end for end in (found.high, found.low))
    said = {"batch": found.samples, "tokens": found.tokens, "threads": found.threads, "device": found.device}
    return [Metric(found.unit, "speed", found.rate, found.calls, low, high)], {**said, "spread": "quartiles"}


def _memory(task: _Task) -> Part:
    inputs = task.largest

    def work() -> None:
        with evaluating(task.model):
            call(task.model, inputs)

    work()  # workspaces and packed weights that libraries keep are allocated once, by the first call
    peak = peak_memory(work, device=device_of(task.model))
    said = {"batch": len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs), "measured": peak.method}
    return [Metric("peak MiB of a call", "memory", peak.bytes / 2**20, 1)], said


METRICS: dict[str, Callable[[_Task], Part]] = {
    "size": _size,
    "perplexity": _perplexity,
    "similarity": _similarity,
    "accuracy": _accuracy,
    "probe": _probe,
    "memory": _memory,
    "speed": _speed,
}
"""Another metric is one more row."""

NEEDS = {
    "perplexity": ("texts",),
    "similarity": ("texts", "reference"),
    "accuracy": ("labelled",),
    "probe": ("labelled", "tokenizer"),
    "speed": ("texts",),
    "memory": ("texts",),
}


def _check_needs(metrics: Sequence[str], tokenizer: Any, texts: Any, labelled: Any, reference: Any) -> None:
    given = {"tokenizer": tokenizer, "texts": texts, "labelled": labelled, "reference": reference}
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"evaluate: metrics must be of {tuple(METRICS)}, got {metric!r}")
        missing = [name for name in NEEDS.get(metric, ()) if given[name] is None]
        if missing:
            raise ValueError(f"evaluate: the metric {metric} needs {' and '.join(missing)}, got none")
    if isinstance(labelled, Texts) and labelled.labels is None and {"accuracy", "probe"} & set(metrics):
        raise ValueError("evaluate: labelled texts must have labels; read them with labelled=True")


def _about(encoded: Any) -> dict[str, Any]:
    if not isinstance(encoded, Batches):
        return {}
    return {"tokens": encoded.tokens, "max_length": encoded.max_length, "texts that long": encoded.cut}


def _renumbered(labelled: Texts, model: nn.Module) -> Texts:
    """Labels by the model's own numbers, where it knows all names of the classes."""
    numbers: Any = getattr(getattr(model, "config", None), "label2id", None) or {}
    known = {str(name).lower(): int(number) for name, number in numbers.items()}
    if labelled.labels is None or not labelled.classes or any(c.lower() not in known for c in labelled.classes):
        return labelled
    labels = tuple(known[labelled.classes[k].lower()] for k in labelled.labels)
    return replace(labelled, labels=labels, classes=())
