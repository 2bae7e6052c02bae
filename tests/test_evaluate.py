"""Evaluations: what they keep, how they compare, and a model that stays as it was."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import SENTENCES, Encoder, TinyLM, Words, everything, same, stop, tokens
from torch import nn

from tnlayers.calling import call, device_of, to_device
from tnlayers.evaluation.evaluate import (
    Evaluation,
    Metric,
    accuracy,
    compare,
    embeddings,
    evaluate,
    peak_memory,
    perplexity,
    throughput,
)
from tnlayers.texts import Texts, batches

# --- a model stays as it was ---


def test_nothing_of_the_model_changes(rng):
    model = TinyLM().train()
    model.block.eval()  # a mixture of modes
    model.head.weight.requires_grad_(False)
    ids = tokens(rng, 32)
    before = everything(model)
    first = perplexity(model, ids)
    embeddings(model, [ids[None, :8]], normalize=True)
    accuracy(nn.Sequential(model, nn.Flatten()), [(ids[None, :8], torch.tensor([0]))])
    throughput(model, ids[None, :8], seconds=0, warmup=1, threads=2)
    assert perplexity(model, ids) == first  # no dropout
    for work in (
        lambda: perplexity(model, ids, progress=stop),
        lambda: embeddings(model, [ids[None, :8]], progress=stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            work()
    assert same(everything(model), before)


def test_a_model_that_keeps_what_it_makes_at_its_first_call_still_trains():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(4, 4), None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.ones(4) * 2
            return self.inner(x) * self.scale

    model = Keeps()
    found = embeddings(model, [torch.ones(2, 4)])
    model(torch.ones(2, 4)).sum().backward()
    assert not found.is_inference()
    assert not found.requires_grad


# --- calling ---


def test_calling_any_kind_of_batch():
    class Record(nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    record = Record()
    assert call(record, {"a": 1}) == ((), {"a": 1})
    assert call(record, (1, 2)) == ((1, 2), {})
    assert call(record, 3) == ((3,), {})
    moved = to_device({"a": torch.ones(2), "b": [torch.ones(1), "x"]}, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1] == "x"
    assert device_of(nn.Identity()).type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_metrics_on_a_gpu(rng):
    model = TinyLM(dtype=torch.float32)
    ids = tokens(rng)
    wanted = perplexity(model, ids).value

    class OnGpu(TinyLM):
        def hidden(self, ids):
            length = ids.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
            return self.block(self.embed(ids) + self.place(torch.arange(length, device=ids.device)), src_mask=mask)

    there = OnGpu(dtype=torch.float32)
    there.load_state_dict(model.state_dict())
    there.cuda()
    assert perplexity(there, ids).value == pytest.approx(wanted, rel=1e-3)
    assert perplexity(there.bfloat16(), ids).value == pytest.approx(wanted, rel=0.1)
    found = peak_memory(lambda: torch.ones(1 << 20, device="cuda"), device="cuda")
    assert found.bytes == 4 << 20
    assert throughput(there, ids[None, :8], seconds=0).device.startswith("cuda")


# --- evaluations ---


def evaluation(value=8.0, window=64, **more):
    return Evaluation(
        (Metric("perplexity", "perplexity", value, 100), Metric("cosine", "similarity", 0.5, 7, change="absolute")),
        {"perplexity": {"window": window, "bos": "none"}, "similarity": {"texts": 7}},
        **more,
    )


@pytest.mark.parametrize("value", [1.5, math.inf, -math.inf, None, 0.0])
def test_an_evaluation_survives_json(value, tmp_path):
    found = evaluation(value, title="a\tb")
    text = found.to_json(tmp_path / "e.json")
    assert (tmp_path / "e.json").read_text() == text
    assert Evaluation.from_dict(json.loads(text)) == found
    assert "a\\tb" in str(found)
    assert found["cosine"].value == 0.5
    with pytest.raises(KeyError, match="expected one of"):
        found["bleu"]


def test_from_dict_refuses():
    good = evaluation().to_dict()
    for change, match in (
        ({"kind": "report"}, "expected kind"),
        ({"version": 2}, "version = 1, got 2"),
        ({"metrics": [{"name": "x"}]}, "what to_dict"),
        ({"metrics": 3}, "what to_dict"),
    ):
        with pytest.raises(ValueError, match=match):
            Evaluation.from_dict({**good, **change})
    with pytest.raises(ValueError, match="change must be one of"):
        Metric("x", "x", 1.0, 1, change="better")


def test_compare_states_conditions_once():
    text = compare(evaluation(8.0), evaluation(10.0))
    lines = text.splitlines()
    assert lines[0].split() == ["metric", "before", "after", "change"]
    assert lines[2].split() == ["perplexity", "8", "10", "+25.00%"]
    assert lines[3].split() == ["cosine", "0.5", "0.5", "+0.0000"]
    assert text.count("window 64, bos none") == 1
    assert text.count("texts 7") == 1


def test_compare_does_not_compare_what_cannot_be_compared():
    text = compare(evaluation(8.0), evaluation(10.0, window=32))
    assert "25" not in text
    assert "perplexity: not comparable, the conditions differ" in text
    assert "before: window 64" in text
    assert "after: window 32" in text
    alone = Evaluation((Metric("accuracy", "accuracy", 0.5, 9),), {"accuracy": {"samples": 9}})
    text = compare(evaluation(math.inf), alone)
    assert [line.split()[-1] for line in text.splitlines()[2:5]] == ["\u2013"] * 3
    assert "accuracy: samples 9" in text
    zero = compare(evaluation(0.0), evaluation(1.0))
    assert zero.splitlines()[2].split()[-1] == "\u2013"


# --- evaluate ---


def test_evaluate_a_language_model(rng):
    model = TinyLM(positions=32).train()
    before = everything(model)
    found = evaluate(model, Words(), texts=["a b c d", "e f g a b"], window=6, stride=3, bos=True, title="tiny")
    assert [metric.group for metric in found.metrics] == ["size", "size", "perplexity"]
    direct = perplexity(model, ["a b c d", "e f g a b"], Words(), window=6, stride=3, bos=True)
    assert (found["perplexity"].value, found["perplexity"].count) == (direct.value, direct.tokens)
    said = {"window": 6, "stride": 3, "bos": "window", "scored tokens": direct.tokens}
    assert found.conditions["perplexity"] == said
    assert found["parameters"].value == sum(p.numel() for p in model.parameters())
    assert found["MiB of weights"].value == found["parameters"].value * 8 / 2**20
    assert str(found).startswith("tiny\nmetric")
    assert same(everything(model), before)


def test_evaluate_an_encoder_against_its_original():
    pytest.importorskip("sklearn")
    model, tokenizer = Encoder(), Words(maximum=5)
    texts = Texts(SENTENCES.texts * 4, SENTENCES.labels * 4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.mix.weight += 0.3 * torch.randn(6, 6)
    names = ("similarity", "probe", "speed", "memory")
    options = {"texts": texts, "labelled": texts, "reference": model, "metrics": names, "seconds": 0, "batch_size": 5}
    one, two = (evaluate(m, tokenizer, **options) for m in (model, other))
    assert one["cosine, mean"].value == pytest.approx(1, abs=1e-6)
    assert two["cosine, mean"].value < 0.999
    assert one.conditions["similarity"]["max_length"] == 5
    assert one.conditions["similarity"]["texts that long"] == 12
    assert one.conditions["probe"]["trained on"] == 12
    assert one["probe accuracy"].count == 12
    assert one.conditions["speed"]["batch"] == 5
    given = evaluate(other, tokenizer, texts=texts, reference=embeddings(model, batches(texts, tokenizer)))
    assert given["cosine, mean"].value == pytest.approx(two["cosine, mean"].value, abs=1e-6)
    assert "not comparable" not in compare(one, two)


def test_evaluate_a_classifier_with_named_classes():
    class Guess(Encoder):
        config = SimpleNamespace(label2id={"NEGATIVE": 1, "POSITIVE": 0})

        def forward(self, input_ids, attention_mask):
            return (torch.tensor([[1.0, 0.0]]).expand(len(input_ids), 2),)

    texts = Texts(("a", "b", "c"), (1, 1, 0), ("negative", "positive"))
    assert evaluate(Guess(), Words(), labelled=texts)["accuracy"].value == pytest.approx(2 / 3)
    bare = Texts(("a", "b", "c"), (1, 1, 0))
    assert evaluate(Guess(), Words(), labelled=bare)["accuracy"].value == pytest.approx(1 / 3)


def test_evaluate_images_without_a_tokenizer(rng):
    images = [(torch.randn(4, 3, generator=rng), torch.tensor([0, 1, 0, 1]))]
    model = nn.Linear(3, 2)
    found = evaluate(model, labelled=images, texts=[x for x, _ in images], metrics=("accuracy", "speed", "memory"),
                     seconds=0)  # fmt: skip
    assert found["accuracy"].count == 4
    assert found["samples/s"].count == 3
    assert found["peak MiB of a call"].value >= 0


def test_evaluate_refuses_before_any_work():
    class Never(nn.Module):
        def forward(self, *args, **kwargs):
            raise AssertionError

    for options, match in (
        ({"metrics": ("perplexity",)}, "the metric perplexity needs texts"),
        ({"metrics": "similarity"}, "the metric similarity needs texts and reference"),
        ({"metrics": ("accuracy", "bleu"), "labelled": []}, r"must be of \('size', .*got 'bleu'"),
        ({"metrics": ("probe",), "labelled": SENTENCES}, "probe needs tokenizer"),
        ({"metrics": ("accuracy",), "labelled": Texts(("a",))}, "must have labels; read them with labelled=True"),
        ({"metrics": ("speed",), "texts": []}, "at least one batch"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate(Never(), **options)
    with pytest.raises(ValueError, match="probe needs labelled Texts, got list"):
        evaluate(Never(), Words(), metrics=("probe",), labelled=[])
