"""Losses over all entities with sparse targets, and over sampled ones; exact in chunks of the entity axis.

`one_to_n_loss`, `softmax_loss` and `negative_loss` are functions of logits. `OneToN`, `Softmax` and `NegativeSampling`
are what `train` calls: they score a batch, in chunks where memory is short, and leave the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from tnlayers.kg.checkpoints import generators, set_generators
from tnlayers.kg.chunks import MEMORY, Asked, Batch, Context
from tnlayers.kg.model import KGModel

FORMULAS = ("uniform", "published", "others")
BLOCK = {"cpu": 1 << 18}
"""Logits whose loss and gradient are made together: on a CPU they stay in cache."""
ELSEWHERE = 1 << 25


# --- logits known: value and gradient in one pass ---


def _blocks(logits: Tensor, gradient: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows that are in cache together: which, in float32 or better, and where their gradient goes."""
    step = max(1, BLOCK.get(logits.device.type, ELSEWHERE) // max(1, logits.shape[1]))
    for begin in range(0, len(logits), step):
        part = slice(begin, begin + step)
        x = logits[part]
        yield part, x if x.dtype in (torch.float32, torch.float64) else x.float(), gradient[part]


def _bce(logits: Tensor, rows: Tensor, tails: Tensor, weight: float, low: float, scale: float) -> tuple[Tensor, Tensor]:
    """Scale * sum of softplus(s) - y s with y = low, at the answers low + weight; and its gradient."""
    gradient = torch.empty_like(logits)
    total = logits.new_zeros((), dtype=torch.float64)
    for _, x, out in _blocks(logits, gradient):
        p = torch.sigmoid(x, out=out) if x.dtype == out.dtype else torch.sigmoid(x)
        # softplus(s) = max(s, 0) - log(1 - min(p, 1 - p)): to the last bits at both ends, and p is needed anyway
        tail = torch.minimum(1 - p, p).neg_().log1p_()
        total += x.clamp_min(0).sum() - tail.sum()
        if low:
            total -= low * x.sum()
        p.sub_(low).mul_(scale)
        if x.dtype != out.dtype:
            out.copy_(p)
    chosen = logits[rows, tails]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    total -= weight * chosen.sum()
    gradient[rows, tails] = ((torch.sigmoid(chosen) - (low + weight)) * scale).to(gradient.dtype)
    return total * scale, gradient


def _softmax(
    logits: Tensor, rows: Tensor, tails: Tensor, lse: Tensor, by_row: Tensor, weight: Tensor, low: float
) -> tuple[Tensor, Tensor]:
    """Sum over rows of by_row (-low sum of s - weight sum of s at the answers), and the gradient of it with lse."""
    gradient = torch.empty_like(logits)
    total = logits.new_zeros((), dtype=torch.float64)
    for part, x, out in _blocks(logits, gradient):
        p = torch.sub(x, lse[part, None]).exp_()
        if low:
            total -= low * (x.sum(1) * by_row[part]).sum()
            p.sub_(low)
        torch.mul(p, by_row[part, None], out=p)
        out.copy_(p)
    chosen = logits[rows, tails].to(lse.dtype)
    total -= (chosen * (by_row * weight)[rows]).sum()
    exact = ((chosen - lse[rows]).exp() - low - weight[rows]) * by_row[rows]
    gradient[rows, tails] = exact.to(gradient.dtype)
    return total, gradient


def _lse(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits if logits.dtype == torch.float64 else logits.float(), 1)


class _Given(torch.autograd.Function):
    """A value whose gradient with respect to the logits is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def one_to_n_loss(
    logits: Float[Tensor, "B N"],
    rows: Int[Tensor, A],
    tails: Int[Tensor, A],
    *,
    smoothing: int | float = 0.0,
    formula: str = "uniform",
) -> Float[Tensor, ""]:
    """Mean binary cross-entropy over all queries and entities, from the positions of the ones.

    L = (1 / (B N)) (sum softplus(s) - sum y' s) with y = 1 at the answers, 0 elsewhere, and y' = (1 - eps) y + eps / N
    ("uniform"), (1 - eps) y + 1 / N ("published": what the code of TuckER computes; y' = y for eps = 0), or (1 - eps) y
    + (1 - y) eps / (N - 1) ("others": PyKEEN's).

    Equal to `binary_cross_entropy_with_logits` on the dense targets, value and gradient. No target matrix is made; the
    gradient is made in the same pass, so memory is that of the logits twice. It cannot be differentiated twice.

    Args:
        logits: scores of every entity; bfloat16 is taken as float32.
        rows: the query of each answer.
        tails: the entity of each answer; a pair (row, tail) occurs once.
        smoothing: eps in [0, 1).
        formula: "uniform", "published" or "others".

    Raises:
        ValueError: smoothing outside [0, 1), an unknown formula.

    References:
        I. Balazevic, C. Allen, T. Hospedales, "TuckER: Tensor factorization for knowledge graph completion", EMNLP
        2019, arXiv:1901.09590; T. Dettmers et al., "Convolutional 2D knowledge graph embeddings", AAAI 2018.

    Example:
        >>> one_to_n_loss(torch.zeros(2, 3), torch.tensor([0]), torch.tensor([1]))  # log 2 where nothing is known
        tensor(0.6931)
    """
    made = OneToN(smoothing, formula)
    value, gradient = made._kernel(logits.detach(), rows, tails, logits.shape[1], len(logits))
    found: Tensor = _Given.apply(logits, value, gradient)
    return found


def softmax_loss(
    logits: Float[Tensor, "B N"],
    rows: Int[Tensor, A],
    tails: Int[Tensor, A],
    *,
    smoothing: int | float = 0.0,
    by: str = "query",
) -> Float[Tensor, ""]:
    """Cross-entropy of the softmax over all entities, for queries with any number of answers.

    With k_b answers of query b, l_b = logsumexp(s_b) - ((1 - eps) / k_b) sum_answers s - (eps / N) sum_all s. "query":
    the mean of l_b over the queries (multi-label softmax); "answer": sum k_b l_b / sum k_b, the mean over triples of
    -log softmax(s)[tail] (1-vs-all), without repeating a query. Equal to `cross_entropy` with dense probabilities.

    Args:
        logits: scores of every entity; bfloat16 is taken as float32.
        rows: the query of each answer; a query without answers counts nothing.
        tails: the entity of each answer; a pair (row, tail) occurs once.
        smoothing: eps in [0, 1), spread uniformly.
        by: "query" or "answer".

    Raises:
        ValueError: smoothing outside [0, 1), an unknown `by`.

    References:
        D. Ruffinelli, S. Broscheit, R. Gemulla, "You CAN teach an old dog new tricks!", ICLR 2020 (1vsAll, KvsAll).

    Example:
        >>> softmax_loss(torch.zeros(2, 4), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2])).exp()
        tensor(4.)
    """
    made, (count, entities) = Softmax(smoothing, by), logits.shape
    batch = Batch(rows, rows, rows, tails, count, len(tails))
    plan = made._plan(_lse(logits.detach()), batch, entities)
    value, gradient = plan.kernel(logits.detach(), rows, tails)
    found: Tensor = _Given.apply(logits, plan.constant + value, gradient)
    return found


def negative_loss(
    positive: Float[Tensor, B],
    negative: Float[Tensor, "B k"],
    kept: Bool[Tensor, "B k"] | None = None,
    *,
    temperature: int | float = 0.0,
    weight: int | float = 1.0,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of triples against sampled ones.

    L = mean_b (softplus(-s_b) + weight sum_j w_bj softplus(s_bj)) / (1 + weight) with sum_j w_bj = 1 over the negatives
    that are kept: equal weights, or w_b = softmax(temperature s_b), not differentiated (self-adversarial). weight = 1
    is the form of RotatE, weight = k the mean over all 1 + k scores.

    Args:
        positive: scores of the triples.
        negative: scores of the samples of each.
        kept: False where a sample is a known triple: it counts nothing.
        temperature: of the weights; 0 weighs all alike.
        weight: of the negatives together.

    References:
        Z. Sun, Z. Deng, J. Nie, J. Tang, "RotatE", ICLR 2019, arXiv:1902.10197, equation 5.

    Example:
        >>> negative_loss(torch.zeros(2), torch.zeros(2, 5))
        tensor(0.6931)
    """
    positive, negative = (s if s.dtype == torch.float64 else s.float() for s in (positive, negative))
    logits = (temperature * negative).detach()
    if kept is not None:
        logits = logits.masked_fill(~kept, -torch.inf)
    shares = torch.softmax(logits, 1)
    if kept is not None:
        shares = torch.where(kept, shares, 0.0)  # a row where nothing is kept is NaN
    losses = -logsigmoid(positive) - weight * (shares * logsigmoid(-negative)).sum(1)
    return losses.mean() / (1 + weight)


# --- a batch of a model ---


class Loss:
    """What `train` minimizes: `backward` adds the gradients of a batch and returns its loss.

    Losses of the workers' parts of a batch add up to that of the batch. A kind writes `backward`; `sampled` says that
    its batches hold triples with `count` negatives each, not queries with all their answers.
    """

    sampled: bool = False

    def backward(
        self, model: KGModel, batch: Batch, context: Context = nullcontext, memory: int = MEMORY
    ) -> Float[Tensor, ""]:
        """Gradients into the model's parameters, and the loss, without a graph.

        Args:
            model: in training mode.
            batch: what to learn from.
            context: under which the model scores (autocast).
            memory: bytes of logits and their gradients; above, entities are scored in chunks, which changes neither
                loss nor gradient but by rounding.
        """
        raise TypeError(f"{type(self).__name__}: a loss must write backward(model, batch, context, memory)")


@dataclass(frozen=True)
class OneToN(Loss):
    """`one_to_n_loss` of all entities: every entity is right or wrong for every query.

    Args:
        smoothing: eps in [0, 1).
        formula: "uniform", "published" or "others", see `one_to_n_loss`.

    Raises:
        ValueError: smoothing outside [0, 1), an unknown formula.

    Example:
        >>> OneToN(0.1)
        OneToN(smoothing=0.1, formula='uniform')
    """

    smoothing: int | float = 0.0
    formula: str = "uniform"

    def __post_init__(self) -> None:
        _check_smoothing("OneToN", self.smoothing)
        if self.formula not in FORMULAS:
            raise ValueError(f"OneToN: formula must be one of {', '.join(FORMULAS)}, got {self.formula!r}")

    def _kernel(self, logits: Tensor, rows: Tensor, tails: Tensor, entities: int, size: int) -> tuple[Tensor, Tensor]:
        eps = self.smoothing
        low = {"uniform": eps / entities, "published": 1 / entities, "others": eps / max(1, entities - 1)}[self.formula]
        low = low if eps else 0.0
        weight = 1 - eps - (low if self.formula == "others" else 0.0)
        return _bce(logits, rows, tails, weight, low, 1 / max(1, size * entities))

    def backward(
        self, model: KGModel, batch: Batch, context: Context = nullcontext, memory: int = MEMORY
    ) -> Float[Tensor, ""]:
        """See `Loss.backward`: chunks add up, and nothing is computed twice."""
        size, entities = batch.size, model.num_entities
        asked = Asked(model, batch, context, memory)
        return asked.descend(lambda logits, r, t: self._kernel(logits, r, t, entities, size))


@dataclass(frozen=True)
class Softmax(Loss):
    """`softmax_loss` over all entities.

    Args:
        smoothing: eps in [0, 1).
        by: "query": multi-label softmax; "answer": 1-vs-all.

    Raises:
        ValueError: smoothing outside [0, 1), an unknown `by`.

    Example:
        >>> Softmax(by="answer")
        Softmax(smoothing=0.0, by='answer')
    """

    smoothing: int | float = 0.0
    by: str = "query"

    def __post_init__(self) -> None:
        _check_smoothing("Softmax", self.smoothing)
        if self.by not in ("query", "answer"):
            raise ValueError(f"Softmax: by must be query or answer, got {self.by!r}")

    def _plan(self, lse: Tensor, batch: Batch, entities: int) -> _SoftmaxPlan:
        counts = torch.bincount(batch.rows, minlength=len(lse)).to(lse.dtype)
        whole = batch.answers if self.by == "answer" else batch.size
        by_row = (counts if self.by == "answer" else (counts > 0).to(lse.dtype)) / max(1, whole)
        weight = (1 - self.smoothing) / counts.clamp_min(1)
        return _SoftmaxPlan(lse, by_row, weight, self.smoothing / entities)

    def backward(
        self, model: KGModel, batch: Batch, context: Context = nullcontext, memory: int = MEMORY
    ) -> Float[Tensor, ""]:
        """See `Loss.backward`. In chunks the logits are computed twice: once for the logsumexp."""
        asked = Asked(model, batch, context, memory)
        if len(asked.parts) == 1:

            def kernel(logits: Tensor, rows: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
                plan = self._plan(_lse(logits), batch, model.num_entities)
                value, gradient = plan.kernel(logits, rows, tails)
                return plan.constant + value, gradient

            return asked.descend(kernel)
        random = generators(model)  # dropout on the entities draws the same both times
        lse = None
        with torch.no_grad():
            for part in asked.parts:
                found = _lse(asked.scores(part))
                lse = found if lse is None else torch.logaddexp(lse, found)
        set_generators(random)
        assert lse is not None
        plan = self._plan(lse, batch, model.num_entities)
        return plan.constant + asked.descend(plan.kernel)


@dataclass(frozen=True, eq=False)
class _SoftmaxPlan:
    """What the softmax loss of a batch needs to know of all entities."""

    lse: Tensor
    by_row: Tensor
    weight: Tensor
    low: float

    @property
    def constant(self) -> Tensor:
        return (self.lse * self.by_row).sum().double()

    def kernel(self, logits: Tensor, rows: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        return _softmax(logits, rows, tails, self.lse, self.by_row, self.weight, self.low)


@dataclass(frozen=True)
class NegativeSampling(Loss):
    """`negative_loss` with tails drawn uniformly; with inverse relations heads are tails too.

    Args:
        count: negatives of each triple.
        filtered: leave out samples that are known answers of training.
        temperature: of self-adversarial weights, see `negative_loss`.
        weight: of the negatives together; None: as many as there are (the mean over all scores).

    Raises:
        ValueError: no negatives, a negative temperature or weight.

    Example:
        >>> NegativeSampling(50, temperature=1.0)
        NegativeSampling(count=50, filtered=True, temperature=1.0, weight=1.0)
    """

    count: int = 50
    filtered: bool = True
    temperature: int | float = 0.0
    weight: int | float | None = 1.0
    sampled = True

    def __post_init__(self) -> None:
        if self.count < 1 or self.temperature < 0 or (self.weight is not None and not self.weight > 0):
            raise ValueError(
                "NegativeSampling: expected count >= 1, temperature >= 0 and weight > 0, got "
                f"{self.count}, {self.temperature} and {self.weight}"
            )

    def backward(
        self, model: KGModel, batch: Batch, context: Context = nullcontext, memory: int = MEMORY
    ) -> Float[Tensor, ""]:
        """See `Loss.backward`; there is no entity axis to cut."""
        if batch.negatives is None:
            raise ValueError("NegativeSampling: the batch must hold negatives (B, k), got none")
        with context():
            query = model.query(batch.heads, batch.relations)
            scores = model.paired(query, torch.cat([batch.tails[:, None], batch.negatives], 1))
        weight = float(self.count if self.weight is None else self.weight)
        loss = negative_loss(scores[:, 0], scores[:, 1:], batch.kept, temperature=self.temperature, weight=weight)
        loss = loss * (len(batch.heads) / batch.size)
        loss.backward()
        return loss.detach()


def _check_smoothing(name: str, smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"{name}: smoothing must lie in [0, 1), got {smoothing}")
