"""What a model without a next token is worth: similarity of embeddings, accuracy, a linear probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Inexact
from torch import Tensor, nn

from decompositions.progress import Progress
from tnlayers.calling import call, device_of, evaluating, hidden_of, logits_of, to_device
from tnlayers.texts import Batches, check_tokens

MAX_NEIGHBOURS = 2000
Z95 = 1.959963984540054

Pooling = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Similarity:
    """How close embeddings are to those of a reference, text by text, cosines between -1 and 1.

    Args:
        mean: mean cosine.
        low: its 5 % quantile.
        worst: the smallest.
        worst_at: number of that text.
        neighbours: Spearman correlation of all pairwise cosines before and after: 1 if texts keep the order of their
            neighbours. None below three texts, or where all cosines are equal.
        count: texts.
        compared: texts of which the pairs were taken (the first ones, at most 2000).

    Example:
        >>> print(Similarity(0.95, 0.9, 0.8, 3, 0.97, 512, 512))
        cosine 0.95 mean, 0.9 at 5 %, 0.8 worst (text 3); neighbours 0.97; 512 texts
    """

    mean: float
    low: float
    worst: float
    worst_at: int
    neighbours: float | None
    count: int
    compared: int

    def __str__(self) -> str:
        near = "unknown" if self.neighbours is None else f"{self.neighbours:.5g}"
        return (
            f"cosine {self.mean:.5g} mean, {self.low:.5g} at 5 %, {self.worst:.5g} worst (text {self.worst_at}); "
            f"neighbours {near}; {self.count} texts"
        )


def embeddings(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    pooling: Pooling = "mean",
    normalize: bool = True,
    progress: Progress | None = None,
) -> Inexact[Tensor, "texts features"]:
    """One vector a text: hidden states pooled over the tokens that are not padding.

    Args:
        model: returns hidden states (batch, length, features): a tensor, a tuple that begins with it, or an output with
            `.last_hidden_state`; or vectors (batch, features), which are taken as they are.
        batches: `Batches`, or any iterable of what the model takes (a tensor, a tuple, a dict of keyword arguments
            whose "attention_mask" says what is padding; "labels" are left out).
        pooling: "mean", "cls" (first token that is not padding), "last" (last such token), or a function of hidden
            states and mask (batch, length) that returns (batch, features).
        normalize: to length one.
        progress: called as (batches done, batches or 0, "embeddings").

    Returns:
        On the CPU, float32 (float64 of a float64 model); in the order of the texts for `Batches`.

    Raises:
        TypeError: the model returns no hidden states.
        ValueError: no batch, a text of padding alone, values that are not finite (by batch number).

    Example:
        >>> ids, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, attention_mask):
        ...         return torch.eye(3)[input_ids]
        >>> embeddings(Model(), [{"input_ids": ids, "attention_mask": mask}], normalize=False)
        tensor([[0.0000, 0.5000, 0.5000]])
    """
    if isinstance(pooling, str) and pooling not in POOLINGS:
        raise ValueError(f"embeddings: pooling must be a function or one of {tuple(POOLINGS)}, got {pooling!r}")
    pool = POOLINGS[pooling] if isinstance(pooling, str) else pooling
    device, rows = device_of(model), []
    total = _length(batches)
    with evaluating(model):
        for k, batch in enumerate(batches):
            inputs, _ = _without_labels(batch)
            inputs = to_device(inputs, device)
            check_tokens(model, inputs, caller="embeddings")
            hidden = hidden_of(call(model, inputs))
            hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
            if hidden.ndim == 3:
                mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
                mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.to(hidden.device)
                if mask.shape != hidden.shape[:2]:
                    raise ValueError(
                        f"embeddings: expected an attention mask {tuple(hidden.shape[:2])}, got {tuple(mask.shape)}"
                    )
                if not bool((mask != 0).any(1).all()):
                    raise ValueError(f"embeddings: a text of batch {k} is padding alone; drop empty texts")
                hidden = pool(hidden, mask != 0)
            if hidden.ndim != 2:
                raise ValueError(f"embeddings: expected vectors (batch, features), got {tuple(hidden.shape)}")
            if not bool(hidden.isfinite().all()):
                raise ValueError(f"embeddings: batch {k} must be finite, got NaN or infinity")
            rows.append((F.normalize(hidden, dim=-1) if normalize else hidden).cpu())
            if progress is not None:
                progress(k + 1, total, "embeddings")
    if not rows:
        raise ValueError("embeddings: expected at least one batch, got none; an iterator serves one pass only?")
    joined = torch.cat(rows)
    return batches.restore(joined) if isinstance(batches, Batches) else joined


def embedding_similarity(
    model: nn.Module,
    reference: nn.Module | Inexact[Tensor, "texts features"],
    batches: Iterable[Any],
    *,
    pooling: Pooling = "mean",
    progress: Progress | None = None,
) -> Similarity:
    """Compare embeddings with those of a reference: cosines text by text, and whether neighbours stay neighbours.

    Args:
        model: see `embeddings`.
        reference: a model, or what `embeddings` returned for it on the same batches.
        batches: must serve a second pass if the reference is a model.
        pooling: of both.
        progress: as in `embeddings`.

    Raises:
        ValueError: other numbers of texts or features, a vector of zeros.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> found = embedding_similarity(model, model, [torch.eye(3)])
        >>> round(found.mean, 6), found.count
        (1.0, 3)
    """
    if not isinstance(reference, Tensor):
        if iter(batches) is batches:
            raise ValueError("embedding_similarity: two models need batches that serve two passes; give a list")
        reference = embeddings(reference, batches, pooling=pooling, progress=progress)
    made = embeddings(model, batches, pooling=pooling, progress=progress)
    if made.shape != reference.shape:
        raise ValueError(
            f"embedding_similarity: expected embeddings {tuple(reference.shape)} as the reference has, "
            f"got {tuple(made.shape)}; were they made from these texts?"
        )
    now, then = made.double(), reference.detach().cpu().double()
    for name, vectors in (("model", now), ("reference", then)):
        lengths = vectors.norm(dim=-1)
        bad = ((lengths == 0) | ~lengths.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"embedding_similarity: text {int(bad[0])} of the {name} must have a finite vector other than zero"
            )
    now, then = F.normalize(now, dim=-1), F.normalize(then, dim=-1)
    cosines = (now * then).sum(-1)
    compared = min(len(now), MAX_NEIGHBOURS)
    above = torch.triu_indices(compared, compared, 1)
    pairs = [(part[:compared] @ part[:compared].T)[above[0], above[1]] for part in (now, then)]
    return Similarity(
        mean=float(cosines.mean()),
        low=float(cosines.quantile(0.05)),
        worst=float(cosines.min()),
        worst_at=int(cosines.argmin()),
        neighbours=spearman(*pairs) if compared > 2 else None,
        count=len(now),
        compared=compared,
    )


def spearman(a: Inexact[Tensor, n], b: Inexact[Tensor, n]) -> float | None:
    """Rank correlation of two vectors, ties at their mean rank; None if one is constant.

    Example:
        >>> spearman(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 8, 27]))
        1.0
    """
    x, y = (_ranks(v) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else None


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its 95 % Wilson interval.

    Args:
        value: correct / count.
        correct: right answers.
        count: all.
        low: lower end of the interval.
        high: upper end.

    References:
        E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927) 209-212.

    Example:
        >>> print(Accuracy.of(9, 10))
        accuracy 0.9 (95 % interval 0.596 to 0.982; 9 of 10)
    """

    value: float
    correct: int
    count: int
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, count: int) -> Accuracy:
        """From the counts.

        Raises:
            ValueError: not 0 <= correct <= count, or count = 0.
        """
        if not 0 <= correct <= count or count == 0:
            raise ValueError(f"Accuracy: expected 0 <= correct <= count and count >= 1, got {correct} of {count}")
        share, z2 = correct / count, Z95**2
        middle = (share + z2 / (2 * count)) / (1 + z2 / count)
        half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
        # rounding must not put the ends beside 0 and 1, where they lie exactly
        low, high = 0.0 if correct == 0 else middle - half, 1.0 if correct == count else middle + half
        return cls(share, correct, count, low, high)

    def __str__(self) -> str:
        return (
            f"accuracy {self.value:.4g} (95 % interval {self.low:.3g} to {self.high:.3g}; "
            f"{self.correct} of {self.count})"
        )


def accuracy(model: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None) -> Accuracy:
    """Share of samples whose largest logit is that of their label.

    Args:
        model: returns logits (batch, classes): a tensor, a tuple that begins with it, or an output with `.logits`.
        batches: `Batches` of labelled texts, or any iterable of (inputs, labels) pairs, or dicts with "labels".
        progress: called as (batches done, batches or 0, "accuracy").

    Raises:
        TypeError: batches without labels.
        ValueError: no batch, labels beyond the classes, logits that are not finite (by batch number).

    Example:
        >>> accuracy(nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 0]))]).correct
        2
    """
    device, correct, count = device_of(model), 0, 0
    total = _length(batches)
    pairs = batches.labelled() if isinstance(batches, Batches) else batches
    with evaluating(model):
        for k, batch in enumerate(pairs):
            inputs, labels = _without_labels(batch) if isinstance(batch, Mapping) else _pair(batch)
            if labels is None:
                raise TypeError(f"accuracy: expected (inputs, labels) or a dict with 'labels', got {type(batch)}")
            inputs = to_device(inputs, device)
            check_tokens(model, inputs, caller="accuracy")
            logits = logits_of(call(model, inputs))
            labels = torch.as_tensor(labels).to(logits.device)
            if logits.ndim != 2 or labels.shape != logits.shape[:1]:
                raise ValueError(
                    f"accuracy: expected logits (batch, classes) and labels (batch,), got {tuple(logits.shape)} "
                    f"and {tuple(labels.shape)}; is this a classifier?"
                )
            if not bool(logits.isfinite().all()):
                raise ValueError(f"accuracy: the logits of batch {k} must be finite, got NaN or infinity")
            if not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
                raise ValueError(
                    f"accuracy: expected labels from 0 to {logits.shape[1] - 1} (classes of the model), got "
                    f"{int(labels.min())} to {int(labels.max())}; give read_texts the classes in the model's order"
                )
            correct, count = correct + int((logits.argmax(1) == labels).sum()), count + len(labels)
            if progress is not None:
                progress(k + 1, total, "accuracy")
    if not count:
        raise ValueError("accuracy: expected at least one sample, got none; an iterator serves one pass only?")
    return Accuracy.of(correct, count)


def probe_accuracy(
    train: Inexact[Tensor, "train features"],
    train_labels: Sequence[int] | Tensor,
    test: Inexact[Tensor, "test features"],
    test_labels: Sequence[int] | Tensor,
) -> Accuracy:
    """Accuracy of a logistic regression on embeddings: what a model without a classifier knows about the labels.

    Raises:
        ImportError: scikit-learn is missing; the message names the extra.
        ValueError: other numbers of labels than of vectors, or one class alone in the training part.

    Example:
        >>> train, test = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-2.0], [3.0]])
        >>> probe_accuracy(train, [0, 1], test, [0, 1]).correct
        2
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("probe_accuracy needs scikit-learn; pip install 'tnlayers[examples]'") from error
    parts = [(x.detach().cpu().double().numpy(), torch.as_tensor(y).cpu()) for x, y in
             ((train, train_labels), (test, test_labels))]  # fmt: skip
    for x, y in parts:
        if y.shape != x.shape[:1] or not len(x):
            raise ValueError(f"probe_accuracy: expected one label a vector, got {tuple(y.shape)} for {x.shape}")
    (x, y), (x_test, y_test) = parts
    if len(y.unique()) < 2:
        raise ValueError(f"probe_accuracy: expected two classes to tell apart, got {y.unique().tolist()} alone")
    probe = LogisticRegression(max_iter=5000).fit(x, y.numpy())
    return Accuracy.of(int((probe.predict(x_test) == y_test.numpy()).sum()), len(y_test))


# --- small parts ---


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    kept = hidden.masked_fill(~mask[..., None], 0)  # not a product: padding may hold NaN
    return kept.sum(1) / mask.sum(1, keepdim=True)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(1)]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _first(hidden.flip(1), mask.flip(1))


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "cls": _first, "last": _last}


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values at their mean."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2).double()[place]


def _length(batches: Any) -> int:
    return len(batches) if hasattr(batches, "__len__") else 0


def _without_labels(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a dict; anything else as it is."""
    if not isinstance(batch, Mapping):
        return batch, None
    return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")


def _pair(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of what a data loader gives: (x, y), or (x, z, y)."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        return batch, None
    return batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]
