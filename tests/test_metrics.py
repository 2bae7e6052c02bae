"""Embeddings, similarity and accuracy against slow truths; every refusal by its message."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import SENTENCES, Encoder, Words
from torch import nn

from tnlayers.calling import evaluating, hidden_of
from tnlayers.evaluation.metrics import Accuracy, accuracy, embedding_similarity, embeddings, probe_accuracy, spearman
from tnlayers.evaluation.perplexity import perplexity
from tnlayers.texts import batches


def slow_embedding(model, tokenizer, text, pooling):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with evaluating(model):
        hidden = hidden_of(model(input_ids=ids, attention_mask=torch.ones_like(ids)))[0].double()
    return {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_pool_what_is_no_padding(pooling, side):
    model, tokenizer = Encoder(), Words(side=side)
    truth = torch.stack([slow_embedding(model, tokenizer, text, pooling) for text in SENTENCES])
    for size in (1, 2, 6):
        for sort in (False, True):
            made = batches(SENTENCES, tokenizer, batch_size=size, sort=sort)
            found = embeddings(model, made, pooling=pooling, normalize=False)
            torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
            unit = embeddings(model, made, pooling=pooling)
            torch.testing.assert_close(unit.double(), F.normalize(truth, dim=-1), rtol=1e-5, atol=1e-6)


def test_embeddings_of_other_outputs_and_batches():
    ids = torch.ones(2, 3, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(2)}
    wanted = embeddings(Encoder(), [batch]).shape
    assert wanted == (2, 6)
    torch.manual_seed(0)
    one = embeddings(Encoder(), [batch])
    torch.manual_seed(0)
    assert torch.equal(embeddings(Encoder(lambda h: (h, None)), [batch]), one)
    custom = embeddings(Encoder(), [batch], pooling=lambda hidden, mask: hidden[:, 1] * mask[:, :1], normalize=False)
    assert custom.shape == (2, 6)
    assert embeddings(nn.Linear(3, 2), [torch.ones(4, 3), (torch.ones(1, 3),)]).shape == (5, 2)
    assert embeddings(Encoder(dtype=torch.float64), [batch]).dtype == torch.float64
    assert embeddings(Encoder(dtype=torch.bfloat16), [batch]).dtype == torch.float32
    seen = []
    embeddings(nn.Linear(3, 2), iter([torch.ones(1, 3)] * 2), progress=lambda *told: seen.append(told))
    assert seen == [(1, 0, "embeddings"), (2, 0, "embeddings")]


def test_embeddings_refuse():
    ids = torch.ones(2, 3, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids}
    with pytest.raises(ValueError, match=r"one of \('mean', 'cls', 'last'\), got 'max'"):
        embeddings(Encoder(), [batch], pooling="max")
    with pytest.raises(ValueError, match="a text of batch 1 is padding alone"):
        embeddings(Encoder(), [batch, {**batch, "attention_mask": ids * torch.tensor([[1], [0]])}])
    with pytest.raises(ValueError, match=r"from 0 to 39 .*got 40"):
        embeddings(Encoder(), [{**batch, "input_ids": 40 * ids}])
    with pytest.raises(ValueError, match="batch 0 must be finite"):
        embeddings(Encoder(lambda h: h * math.nan), [batch])
    with pytest.raises(TypeError, match=r"returns last_hidden_state, got SimpleNamespace; use the model below"):
        embeddings(Encoder(lambda h: SimpleNamespace(logits=h)), [batch])
    with pytest.raises(ValueError, match="one pass only"):
        embeddings(Encoder(), [])
    with pytest.raises(ValueError, match=r"vectors \(batch, features\), got \(2, 3, 6\)"):
        embeddings(Encoder(), [batch], pooling=lambda hidden, mask: hidden)
    with pytest.raises(ValueError, match=r"attention mask \(2, 6\), got \(2, 3\)"):
        embeddings(Encoder(lambda h: torch.cat([h, h], 1)), [batch])


# --- similarity ---


def test_similarity_is_what_scipy_says(rng):
    a, b = (torch.randn(40, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    b = a + 0.5 * b
    found = embedding_similarity(nn.Identity(), b, [a[:13], a[13:]])
    unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]
    cosines = (unit[0] * unit[1]).sum(1).numpy()
    above = np.triu_indices(40, 1)
    rank = scipy.stats.spearmanr(*((x @ x.T).numpy()[above] for x in unit)).statistic
    assert found.mean == pytest.approx(cosines.mean(), rel=1e-12)
    assert found.low == pytest.approx(np.quantile(cosines, 0.05), rel=1e-12)
    assert (found.worst, found.worst_at) == (pytest.approx(cosines.min(), rel=1e-12), cosines.argmin())
    assert found.neighbours == pytest.approx(rank, rel=1e-10)
    assert (found.count, found.compared) == (40, 40)
    assert "40 texts" in str(found)


def test_similarity_knows_rotations_from_changes(rng):
    a = torch.randn(30, 6, generator=rng, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64)).Q
    same_ = embedding_similarity(nn.Identity(), a, [a])
    assert (same_.mean, same_.neighbours) == (pytest.approx(1, abs=1e-14), pytest.approx(1, abs=1e-12))
    turned = embedding_similarity(nn.Identity(), a, [a @ q])
    assert turned.neighbours == pytest.approx(1, abs=1e-8)
    assert turned.mean < 0.9


def test_similarity_of_two_models_and_its_edges(monkeypatch):
    model = nn.Linear(3, 2)
    x = torch.eye(3)
    assert embedding_similarity(model, model, [x]).mean == pytest.approx(1, abs=1e-12)
    assert embedding_similarity(nn.Identity(), x[:2], [x[:2]]).neighbours is None
    assert embedding_similarity(nn.Identity(), x, [x]).neighbours is None  # all cosines are 0
    assert "neighbours unknown" in str(embedding_similarity(nn.Identity(), x, [x]))
    monkeypatch.setattr("tnlayers.evaluation.metrics.MAX_NEIGHBOURS", 4)
    assert embedding_similarity(nn.Identity(), torch.rand(9, 3), [torch.rand(9, 3)]).compared == 4
    with pytest.raises(ValueError, match="two passes; give a list"):
        embedding_similarity(model, model, iter([x]))
    with pytest.raises(ValueError, match=r"\(4, 3\) as the reference has, got \(3, 3\)"):
        embedding_similarity(nn.Identity(), torch.ones(4, 3), [x])
    with pytest.raises(ValueError, match="text 1 of the reference must have a finite vector other than zero"):
        embedding_similarity(nn.Identity(), x * torch.tensor([[1], [0], [1]]), [x])
    with pytest.raises(ValueError, match="text 2 of the model"):
        embedding_similarity(nn.Identity(), x, [x * torch.tensor([[1], [1], [0]])])


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.data())
def test_spearman_with_ties(a, data):
    b = data.draw(st.lists(st.integers(-3, 3), min_size=len(a), max_size=len(a)))
    found = spearman(torch.tensor(a).double(), torch.tensor(b).double())
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


# --- accuracy ---


def test_accuracy_counts_over_batches_of_every_kind(rng):
    x, y = torch.randn(25, 4, generator=rng), torch.randint(4, (25,), generator=rng)
    right = int((x.argmax(1) == y).sum())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=7)
    assert accuracy(nn.Identity(), loader).correct == right
    dicts = [{"input": x[:20], "labels": y[:20]}, {"input": x[20:], "labels": y[20:]}]
    assert accuracy(nn.Identity(), dicts) == Accuracy.of(right, 25)
    assert set(dicts[0]) == {"input", "labels"}  # the batch is not emptied
    assert accuracy(nn.Identity(), [(x, y.tolist())]).correct == right
    seen = []
    accuracy(nn.Identity(), loader, progress=lambda *told: seen.append(told))
    assert seen[-1] == (4, 4, "accuracy")


def test_accuracy_of_labelled_texts_in_any_order():
    class Guess(Encoder):
        def forward(self, input_ids, attention_mask):
            return (torch.stack([attention_mask.sum(1) - 4.5, 4.5 - attention_mask.sum(1)], 1),)

    for sort in (False, True):
        made = batches(SENTENCES, Words(), batch_size=2, sort=sort)
        assert accuracy(Guess(), made).correct == 2  # 1 where at most two words: texts 0 and 1


def test_accuracy_refuses():
    x, y = torch.eye(3), torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match=r"\(inputs, labels\) or a dict with 'labels'"):
        accuracy(nn.Identity(), [x])
    with pytest.raises(TypeError, match="with 'labels'"):
        accuracy(nn.Identity(), [{"input": x}])
    with pytest.raises(ValueError, match=r"from 0 to 2 .*got 0 to 3"):
        accuracy(nn.Identity(), [(x, torch.tensor([0, 1, 3]))])
    with pytest.raises(ValueError, match=r"got \(3, 3\) and \(2,\); is this a classifier"):
        accuracy(nn.Identity(), [(x, y[:2])])
    with pytest.raises(ValueError, match="logits of batch 1 must be finite"):
        accuracy(nn.Identity(), [(x, y), (x * math.nan, y)])
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(nn.Identity(), [])


@given(st.integers(1, 400), st.data())
def test_wilson_is_scipys(count, data):
    correct = data.draw(st.integers(0, count))
    found = Accuracy.of(correct, count)
    truth = scipy.stats.binomtest(correct, count).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == (pytest.approx(truth.low, abs=1e-12), pytest.approx(truth.high, abs=1e-12))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_accuracy_of_impossible_counts():
    for correct, count in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"got {correct} of {count}"):
            Accuracy.of(correct, count)


def test_probe(rng):
    pytest.importorskip("sklearn")
    y = torch.arange(80) % 2
    x = torch.randn(80, 3, generator=rng) + 3 * y[:, None]
    assert probe_accuracy(x[:60], y[:60], x[60:], y[60:].tolist()).value > 0.9
    noise = probe_accuracy(torch.randn(60, 3, generator=rng), y[:60], x[60:] * 0, y[60:])
    assert noise.correct == 10
    with pytest.raises(ValueError, match=r"two classes to tell apart, got \[1\] alone"):
        probe_accuracy(x, [1] * 80, x, y)
    with pytest.raises(ValueError, match=r"one label a vector, got \(79,\)"):
        probe_accuracy(x, y[1:], x, y)


def test_probe_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'tnlayers\[examples\]'"):
        probe_accuracy(torch.eye(2), [0, 1], torch.eye(2), [0, 1])


def test_embeddings_of_bert_are_the_masked_mean():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config)
    tokenizer = Words()
    found = embeddings(model, batches(SENTENCES, tokenizer, batch_size=4))
    rows = []
    for text in SENTENCES:
        with evaluating(model):
            rows.append(model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0))
    torch.testing.assert_close(found, F.normalize(torch.stack(rows), dim=-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no causal language model"):
        perplexity(transformers.BertForMaskedLM(config), [3, 4, 5, 6, 7, 8])
