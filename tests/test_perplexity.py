"""Perplexity against a double loop in float64, and the mistakes that are common elsewhere."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, TinyLM, Words, tokens
from torch import nn

from tnlayers.calling import evaluating, logits_of
from tnlayers.evaluation.perplexity import perplexity
from tnlayers.texts import token_windows


@pytest.fixture
def lm(rng):
    return TinyLM().eval()


def slow_nll(model, ids, window, stride, bos):
    """Token by token: each is scored in the first window that has something before it."""
    stream = [1, *ids.tolist()] if bos == "start" else ids.tolist()
    room = window - (bos is True)
    scores = {}
    begin = 0
    while True:
        content = stream[begin : begin + room]
        row = [1, *content] if bos is True else content
        with torch.no_grad():
            logits = logits_of(model(torch.tensor([row])))[0]
        for k in range(1, len(row)):
            at = begin + k - (bos is True)
            probabilities = [math.exp(float(v) - float(logits[k - 1].max())) for v in logits[k - 1]]
            scores.setdefault(at, -math.log(probabilities[row[k]] / sum(probabilities)))
        if begin + room >= len(stream):
            return math.fsum(scores.values()), len(scores)
        begin += stride


@pytest.mark.parametrize("bos", [False, True, "start"])
@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 5), (7, 1), (2, 1), (16, 15), (13, None)])
def test_perplexity_is_the_double_loop(lm, rng, window, stride, bos):
    ids = tokens(rng)
    found = [
        perplexity(lm, ids, window=window, stride=stride, bos=bos, bos_id=1, batch_size=size) for size in (1, 2, 5, 99)
    ]
    nll, count = slow_nll(lm, ids, window, found[0].stride, bos)
    for one in found:
        assert one.tokens == count
        assert one.nll == pytest.approx(nll, rel=1e-12)
        assert one.value == pytest.approx(math.exp(nll / count), rel=1e-12)
    assert (found[0].window, found[0].bos) == (window, {False: "none", True: "window", "start": "start"}[bos])


def test_perplexity_weighs_tokens_not_windows(lm, rng):
    """The mean of the windows' means differs where the last window is short; the mean over tokens does not."""
    ids = tokens(rng, 19)
    found = perplexity(lm, ids, window=16)
    parts = [slow_nll(lm, ids[:16], 16, 16, False), slow_nll(lm, ids[16:], 16, 16, False)]
    assert [n for _, n in parts] == [15, 2]
    assert found.nll == pytest.approx(parts[0][0] + parts[1][0], rel=1e-12)
    wrong = math.exp(sum(nll / n for nll, n in parts) / 2)
    assert abs(wrong - found.value) > 1e-3 * found.value


def test_perplexity_scores_an_overlap_once(lm, rng):
    ids = tokens(rng, 40)
    once = perplexity(lm, ids, window=10, stride=5)
    assert once.tokens == 39
    every = [slow_nll(lm, ids[k : k + 10], 10, 10, False) for k in range(0, 31, 5)]
    twice = math.exp(sum(nll for nll, _ in every) / sum(n for _, n in every))
    assert abs(twice - once.value) > 1e-3 * once.value


class Counter(nn.Module):
    """Sure that the next token is one more than this."""

    def forward(self, ids):
        return 50.0 * F.one_hot((ids + 1) % VOCABULARY, VOCABULARY).double()


def test_perplexity_is_not_off_by_one():
    up = torch.arange(60) % VOCABULARY
    assert perplexity(Counter(), up, window=8).value == pytest.approx(1, abs=1e-12)
    assert perplexity(Counter(), up.flip(0), window=8).nll == pytest.approx(50 * (60 - 8), rel=1e-12)
    assert perplexity(Counter(), [3, 3, 3, 4], window=8).nll == pytest.approx(100, rel=1e-12)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, "cache"),
        lambda x: SimpleNamespace(logits=x, loss=None),
        lambda x: {"logits": x},
        lambda x: x.float(),
    ],
)
def test_perplexity_of_every_kind_of_output(rng, wrap):
    torch.manual_seed(0)
    plain = TinyLM()
    other = copy.deepcopy(plain)
    other.wrap = wrap
    ids = tokens(rng)
    assert perplexity(other, ids, window=9).value == pytest.approx(perplexity(plain, ids, window=9).value, rel=1e-6)


def test_log_softmax_of_low_precision_is_taken_in_float32(rng):
    model = TinyLM(dtype=torch.bfloat16)
    ids = tokens(rng, 16)
    with evaluating(model):
        logits = model(ids[None])[0].double()
    exact = F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    assert perplexity(model, ids, window=16).nll == pytest.approx(float(exact), rel=1e-6)
    rough = F.cross_entropy(logits[:-1].bfloat16(), ids[1:], reduction="sum")
    assert abs(float(rough) - float(exact)) > 1e-4 * float(exact)


def test_chunks_of_logits_change_nothing(lm, rng, monkeypatch):
    whole = perplexity(lm, tokens(rng), window=16)
    monkeypatch.setattr("tnlayers.evaluation.perplexity.CHUNK", 3 * VOCABULARY)
    parts = perplexity(lm, tokens(rng.manual_seed(rng.initial_seed())), window=16)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-13)


def test_windows_are_called_together_and_told(lm, rng):
    seen = []
    perplexity(lm, tokens(rng, 37), window=8, batch_size=3, progress=lambda *told: seen.append(told))
    assert lm.calls == [(2, 8), (3, 8), (1, 8), (1, 5)]  # two rows that test causality first
    assert seen == [(3, 5, "perplexity"), (4, 5, "perplexity"), (5, 5, "perplexity")]


def test_default_window_and_ready_windows(lm, rng):
    ids = tokens(rng)
    assert perplexity(lm, ids).window == 16
    assert perplexity(Counter(), ids).window == 2048
    windows = token_windows(ids, window=9, stride=4)
    assert perplexity(lm, windows) == perplexity(lm, ids, window=9, stride=4)
    assert perplexity(lm, ids, bos=True).bos == "window"  # the BOS of the model's configuration
    found = perplexity(lm, "a b c d e f", Words(), window=4)
    assert found.bos == "start"
    assert "over 5 tokens; 2 windows; window 4, stride 4, one BOS at the start)" in str(found)


def test_perplexity_refuses(lm, rng):
    ids = tokens(rng)
    with pytest.raises(ValueError, match=r"window <= 16 \(positions of TinyLM\), got 17; use window=16"):
        perplexity(lm, ids, window=17)
    with pytest.raises(ValueError, match=r"from 0 to 22 .*got 23"):
        perplexity(lm, torch.tensor([1, 23, 2]), window=4)
    with pytest.raises(ValueError, match=r"from 0 to 22 .*got 99"):
        perplexity(lm, ids, window=4, bos=True, bos_id=99)
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        perplexity(lm, ids, batch_size=0)
    with pytest.raises(ValueError, match="no causal language model"):
        perplexity(TinyLM(causal=False), ids)
    with pytest.raises(ValueError, match=r"expected logits \(1, 16, 'vocabulary'\), got \(1, 23\)"):
        perplexity(TinyLM(wrap=lambda x: x[:, -1]), ids, batch_size=1)
    with pytest.raises(TypeError, match="returns logits, got SimpleNamespace; use a model with a language"):
        perplexity(TinyLM(wrap=lambda x: SimpleNamespace(last_hidden_state=x)), ids)
    with pytest.raises(ValueError, match="on the meta device"):
        perplexity(TinyLM().to("meta"), ids)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_logits_that_are_not_finite_are_named_by_window(rng, value, size):
    class Broken(nn.Module):
        def forward(self, ids):
            logits = torch.zeros(*ids.shape, VOCABULARY)
            return torch.where((ids == 22)[..., None], torch.full_like(logits, value), logits)

    ids = torch.arange(20) % 20
    ids[13] = 22
    with pytest.raises(ValueError, match="logits of window 3 must be finite"):
        perplexity(Broken(), ids, window=4, batch_size=size)


def test_a_masked_vocabulary_is_fine_and_an_impossible_token_is_not():
    class Masked(nn.Module):
        def forward(self, ids):
            logits = torch.zeros(*ids.shape, VOCABULARY)
            logits[..., 20:] = -math.inf
            return logits

    assert perplexity(Masked(), [1, 2, 3], window=3).value == pytest.approx(20)
    with pytest.raises(ValueError, match="window 0"):
        perplexity(Masked(), [1, 21, 3], window=3)


def test_a_huge_perplexity_is_infinite_not_an_error():
    class Sure(nn.Module):
        def forward(self, ids):
            return 1e4 * F.one_hot(torch.zeros_like(ids), VOCABULARY).double()

    assert perplexity(Sure(), [1, 2, 3], window=3).value == math.inf


def test_perplexity_of_gpt2_is_the_loop_of_its_documentation(rng):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.randint(3, 50, (75,), generator=rng)
    found = perplexity(model, ids, window=32, stride=20)
    nll, count, done = 0.0, 0, 0
    model.eval()
    for begin in range(0, 75, 20):
        end = min(begin + 32, 75)
        labels = ids[None, begin:end].clone()
        labels[:, : -(end - done)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nll += float(model(ids[None, begin:end], labels=labels).loss) * scored
        count, done = count + scored, end
        if end == 75:
            break
    assert (found.tokens, count) == (74, 74)
    assert found.nll == pytest.approx(nll, rel=1e-6)  # the loss of Hugging Face is taken in float32
    with pytest.raises(ValueError, match=r"window <= 32 \(positions of GPT2LMHeadModel\), got 33"):
        perplexity(model, ids, window=33)
    with pytest.raises(ValueError, match="vocabulary of GPT2LMHeadModel"):
        perplexity(model, ids + 30)
