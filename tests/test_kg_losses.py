"""Losses with sparse targets against torch's on dense ones: values, gradients, chunks of the entity axis."""

import copy

import pytest
import torch
import torch.nn.functional as F
from kg_models import Bilinear, graph
from torch.autograd import gradcheck

from tnlayers.kg import (
    Answers,
    Batch,
    KGModel,
    Loss,
    NegativeSampling,
    OneToN,
    Softmax,
    chunks,
    negative_loss,
    one_to_n_loss,
    softmax_loss,
)
from tnlayers.kg.chunks import MEMORY
from tnlayers.kg.losses import BLOCK

F64 = torch.float64


def made(rng, count=7, entities=11, dtype=F64, scale=20.0):
    """Logits, some of them saturated, and answers: none in the first row, all in the second."""
    logits = torch.randn(count, entities, generator=rng, dtype=F64) * scale
    logits[2, :3] = torch.tensor([-800.0, 800.0, 40.0])
    dense = (torch.rand(count, entities, generator=rng) < 0.3).to(F64)
    dense[0], dense[1], dense[2, :3] = 0, 1, torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    rows, tails = dense.nonzero().unbind(1)
    return logits.to(dtype).requires_grad_(), dense.to(dtype), rows, tails


def both(loss, logits):
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def smoothed(dense, eps, formula):
    n = dense.shape[1]
    if eps == 0:
        return dense
    if formula == "others":
        return (1 - eps) * dense + (1 - dense) * eps / (n - 1)
    return (1 - eps) * dense + (eps if formula == "uniform" else 1) / n


@pytest.mark.parametrize("formula", ["uniform", "published", "others"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.7])
def test_one_to_n_is_dense_cross_entropy(eps, formula, rng, monkeypatch):
    for block in (1, 25, 1 << 18):  # rows that are made together change nothing
        monkeypatch.setitem(BLOCK, "cpu", block)
        logits, dense, rows, tails = made(rng)
        value, gradient = both(one_to_n_loss(logits, rows, tails, smoothing=eps, formula=formula), logits)
        wanted, slope = both(F.binary_cross_entropy_with_logits(logits, smoothed(dense, eps, formula)), logits)
        assert abs(value - wanted) <= 1e-12 * abs(wanted)
        assert (gradient - slope).abs().max() <= 1e-12 * slope.abs().max()


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("by", ["query", "answer"])
def test_softmax_is_dense_cross_entropy(eps, by, rng):
    logits, dense, rows, tails = made(rng)
    value, gradient = both(softmax_loss(logits, rows, tails, smoothing=eps, by=by), logits)
    counts = dense.sum(1)
    some = counts > 0
    targets = (1 - eps) * dense[some] / counts[some, None] + eps / dense.shape[1]
    each = F.cross_entropy(logits[some], targets, reduction="none")
    wanted = each.sum() / len(dense) if by == "query" else (each * counts[some]).sum() / counts.sum()
    wanted, slope = both(wanted, logits)
    assert abs(value - wanted) <= 1e-12 * abs(wanted)
    assert (gradient - slope).abs().max() <= 1e-12 * slope.abs().max()
    if by == "answer" and eps == 0:  # what it stands for: a row for each triple
        torch.testing.assert_close(value, F.cross_entropy(logits[rows], tails).detach(), rtol=1e-12, atol=0)


def test_gradients_scale_and_check(rng):
    logits, _, rows, tails = made(rng, 3, 5, scale=1.0)
    with torch.no_grad():
        logits.clamp_(-3, 3)
    for loss in (one_to_n_loss, softmax_loss):
        assert gradcheck(lambda x, loss=loss: 3 * loss(x, rows, tails, smoothing=0.2), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_that_of_the_logits(dtype, rng):
    """The loss is float32 or better; a gradient is rounded to the logits' dtype once."""
    logits, dense, rows, tails = made(rng, 40, 300, dtype, scale=8.0)
    for found, wanted in (
        (one_to_n_loss(logits, rows, tails, smoothing=0.1), None),
        (softmax_loss(logits, rows, tails, by="answer"), F.cross_entropy(logits.double()[rows], tails)),
    ):
        if wanted is None:
            wanted = F.binary_cross_entropy_with_logits(logits.double(), smoothed(dense.double(), 0.1, "uniform"))
        value, gradient = both(found, logits)
        wanted, slope = both(wanted, logits)
        assert value.dtype == torch.float32
        assert abs(value - wanted) <= 4e-7 * abs(wanted)
        assert gradient.dtype == dtype
        eps = torch.finfo(dtype).eps
        error = (gradient.double() - slope.double()).abs()
        assert bool((error <= 2 * eps * slope.double().abs() + 4e-7 * slope.abs().max()).all())


def test_small_probabilities_are_exact():
    """softplus(s) far below zero keeps its relative accuracy: no 1 + exp(s)."""
    logits = torch.full((1, 4), -30.0)
    none = torch.zeros(0, dtype=torch.int64)
    assert abs(one_to_n_loss(logits, none, none) / torch.tensor(-30.0).exp() - 1) < 1e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_negative_loss_is_what_it_says(temperature, weight, rng):
    positive, negative = torch.randn(5, generator=rng, dtype=F64), torch.randn(5, 4, generator=rng, dtype=F64) * 3
    kept = torch.rand(5, 4, generator=rng) < 0.6
    kept[0], kept[1] = False, True
    positive.requires_grad_()
    negative.requires_grad_()
    loss = negative_loss(positive, negative, kept, temperature=temperature, weight=weight)
    wanted = torch.zeros((), dtype=F64)
    for b in range(5):
        own = [j for j in range(4) if kept[b, j]]
        shares = torch.softmax(temperature * negative.detach()[b, own], 0)
        ours = F.binary_cross_entropy_with_logits(positive[b], torch.ones((), dtype=F64))
        theirs = sum((w * F.softplus(negative[b, j]) for w, j in zip(shares, own, strict=True)), torch.zeros(()))
        wanted = wanted + (ours + weight * theirs) / (1 + weight) / 5
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    for x in (positive, negative):
        torch.testing.assert_close(
            *(torch.autograd.grad(value, x, retain_graph=True)[0] for value in (loss, wanted)), rtol=1e-12, atol=1e-14
        )
    with_all = negative_loss(positive, negative, weight=4.0)
    pairs = torch.cat([positive[:, None], negative], 1)
    ones = torch.zeros(5, 5, dtype=F64)
    ones[:, 0] = 1
    torch.testing.assert_close(with_all, F.binary_cross_entropy_with_logits(pairs, ones), rtol=1e-12, atol=0)


# --- a batch of a model, whole and in chunks ---


class PairQuery(Bilinear):
    """A query of several parts, one of which needs no gradient."""

    def query(self, heads, relations):
        return super().query(heads, relations), (self.relations[relations, 0], heads)

    def against(self, query, entities=None):
        left, (shift, heads) = query
        return super().against(left, entities) * (1 + shift[:, None]) + 0.01 * heads[:, None]


def batch_of(triples, *, count=9):
    answers = Answers.of(triples.directed("train"), triples.num_entities, triples.num_relations)
    h, r = answers.queries[:count].unbind(1)
    rows, tails = answers.lookup(h, r)
    return Batch(h, r, rows, tails, count, len(tails))


def descended(loss, model, batch, memory=MEMORY):
    model = copy.deepcopy(model)
    value = loss.backward(model, batch, memory=memory)
    return value, [p.grad for p in model.parameters()]


LOSSES = [OneToN(0.1), OneToN(0.1, "published"), OneToN(), Softmax(0.1), Softmax(by="answer")]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("kind", [Bilinear, PairQuery])
def test_chunks_equal_the_whole_and_the_dense_loss(loss, kind):
    triples = graph()
    model, batch = kind(triples, dtype=F64, norm=True), batch_of(triples)
    value, _ = descended(loss, model, batch)
    dense = copy.deepcopy(model)
    logits = dense.score_all(batch.heads, batch.relations)
    if isinstance(loss, OneToN):
        wanted = one_to_n_loss(logits, batch.rows, batch.tails, smoothing=loss.smoothing, formula=loss.formula)
    else:
        wanted = softmax_loss(logits, batch.rows, batch.tails, smoothing=loss.smoothing, by=loss.by)
    wanted.backward()
    for memory in (MEMORY, 2 * 9 * 8 * 10, 2 * 9 * 8 * 2, 1):  # 1, 3, 12 and 23 chunks
        found, slopes = descended(loss, model, batch, memory)
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=0)
        for one, two in zip(slopes, (p.grad for p in dense.parameters()), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-15)
    assert value.dtype == F64


@pytest.mark.parametrize("loss", LOSSES[:1] + LOSSES[3:4], ids=repr)
def test_one_chunk_of_logits_is_alive(loss):
    """The widest score is that of a chunk, and as few chunks are made as the bytes allow."""
    triples = graph(entities=200)
    seen = []

    class Watched(Bilinear):
        def against(self, query, entities=None):
            scores = super().against(query, entities)
            seen.append(tuple(scores.shape))
            return scores

    batch = batch_of(triples)
    loss.backward(Watched(triples), batch, memory=2 * 9 * 4 * 70)
    assert {width for _, width in seen} == {67, 66}
    assert len(seen) == (3 if isinstance(loss, OneToN) else 6)


def test_losses_of_parts_add_up():
    triples = graph()
    model, batch = Bilinear(triples, dtype=F64), batch_of(triples)
    negatives = torch.randint(23, (9, 4))
    sampled = Batch(batch.heads, batch.relations, torch.arange(9), batch.tails[:9], 9, 9, negatives)
    for loss in [*LOSSES, NegativeSampling(4, temperature=0.5), NegativeSampling(4, weight=None)]:
        whole = sampled if loss.sampled else batch
        value, gradients = descended(loss, model, whole)
        total, sums = 0.0, [torch.zeros_like(g) for g in gradients]
        for part in (slice(0, 4), slice(4, 9)):
            own = (whole.rows >= part.start) & (whole.rows < part.stop)
            drawn = None if whole.negatives is None else whole.negatives[part]
            parts = (whole.heads[part], whole.relations[part], whole.rows[own] - part.start, whole.tails[own])
            found, slopes = descended(loss, model, Batch(*parts, whole.size, whole.answers, drawn))
            total, sums = total + found, [a + b for a, b in zip(sums, slopes, strict=True)]
        torch.testing.assert_close(total, value, rtol=1e-12, atol=0)
        for one, two in zip(sums, gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-15)


def test_bf16_scores_float32_loss():
    triples = graph()
    model, batch = Bilinear(triples), batch_of(triples)

    def context():
        return torch.autocast("cpu", torch.bfloat16)

    for loss in LOSSES:
        exact, slopes = descended(loss, model, batch)
        for memory in (MEMORY, 9 * 8 * 10):
            other = copy.deepcopy(model)
            value = loss.backward(other, batch, context, memory)
            assert abs(value - exact) < 0.02 * abs(exact)
            assert value.dtype == F64
            for p, slope in zip(other.parameters(), slopes, strict=True):
                assert p.grad.dtype == torch.float32
                assert (p.grad - slope).norm() < 0.05 * slope.norm()


class Tables(KGModel):
    """Heads and tails in one plain table, or in two; dropout on the entities."""

    def __init__(self, triples, shared=True, dropout=0.0):
        super().__init__(triples.num_entities, triples.num_relations, inverse=True)
        self.tails, self.relations = torch.nn.Embedding(23, 4), torch.nn.Embedding(6, 4)
        self.heads = self.tails if shared else torch.nn.Embedding(23, 4)
        self.dropout = torch.nn.Dropout(dropout)

    def query(self, heads, relations):
        return self.heads(heads) * self.relations(relations)

    def against(self, query, entities=None):
        return query @ self.dropout(self.tails.weight[slice(None) if entities is None else entities]).mT


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("loss", [OneToN(0.1), Softmax(0.1)], ids=repr)
@pytest.mark.parametrize("memory", [MEMORY, 1000])
def test_rows_that_were_looked_up_are_added_to_the_dense_gradient(shared, loss, memory, monkeypatch):
    triples = graph()
    model, batch = Tables(triples, shared), batch_of(triples, count=40)
    monkeypatch.setattr(chunks, "LARGE", 1 << 20)
    value, gradients = descended(loss, model, batch, memory)
    monkeypatch.setattr(chunks, "LARGE", 1)
    kinds = []
    model.heads.weight.register_hook(lambda grad: kinds.append(grad.is_sparse))
    found = loss.backward(model, batch, memory=memory)
    assert True in kinds  # or the test sees nothing
    assert torch.equal(found, value)
    for p, slope in zip(model.parameters(), gradients, strict=True):
        assert not p.grad.is_sparse
        torch.testing.assert_close(p.grad, slope, rtol=1e-5, atol=1e-8)
    assert not any(part.sparse for part in model.modules() if isinstance(part, torch.nn.Embedding))


def test_both_passes_of_a_softmax_in_chunks_draw_the_same_dropout():
    """Otherwise probabilities would not add up to 1: the gradient of the logits sums to 0 in every row."""
    triples = graph()
    model, batch = Tables(triples, dropout=0.5), batch_of(triples)
    seen = []

    class Watched(Tables):
        def against(self, query, entities=None):
            scores = super().against(query, entities)
            if scores.requires_grad:
                scores.register_hook(lambda grad: seen.append(grad.sum(1)))
            return scores

    model.__class__ = Watched
    Softmax().backward(model, batch, memory=1000)
    assert len(seen) > 1
    assert torch.stack(seen).sum(0).abs().max() < 1e-7


# --- refusals ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OneToN(1.0), r"smoothing must lie in \[0, 1\), got 1.0"),
        (lambda: OneToN(0.1, "tucker"), "formula must be one of uniform, published, others, got 'tucker'"),
        (lambda: Softmax(-0.1), r"smoothing must lie in \[0, 1\), got -0.1"),
        (lambda: Softmax(by="triple"), "by must be query or answer, got 'triple'"),
        (lambda: NegativeSampling(0), "count >= 1, temperature >= 0 and weight > 0, got 0, 0.0 and 1.0"),
        (lambda: NegativeSampling(weight=0), "got 50, 0.0 and 0"),
        (
            lambda: NegativeSampling().backward(Bilinear(graph()), batch_of(graph())),
            r"the batch must hold negatives \(B, k\), got none",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kind_of_loss_must_be_written():
    with pytest.raises(TypeError, match="a loss must write backward"):
        Loss().backward(Bilinear(graph()), batch_of(graph()))
