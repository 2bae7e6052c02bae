"""Training: the loop against one in the open, optimizers, validation, logs, refusals."""

import copy
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from kg_models import Bilinear, Mapped, answers_of, bits, equal, graph
from torch.nn.functional import binary_cross_entropy_with_logits

import tnlayers
from tnlayers.kg import Epoch, History, KGModel, Loss, OneToN, evaluate, train
from tnlayers.kg.batches import Batches, derived
from tnlayers.kg.optimizers import make_optimizer
from tnlayers.surgery import network_layers

F64 = torch.float64
ROOT = Path(__file__).parents[1]
module = sys.modules["tnlayers.kg.train"]  # `tnlayers.kg.train` is the function


# --- the loop ---


def test_training_is_the_loop_in_the_open():
    """Adam on dense targets, with decay, schedule and clipping: the same weights."""
    triples = graph()
    model = Bilinear(triples, norm=True, dtype=F64)
    other = copy.deepcopy(model)
    options = {"lr": 0.05, "lr_decay": 0.8, "clip": 0.02}

    def schedule(step, steps):
        assert steps == 3 * len(batches)
        return 1 - step / steps

    answers = answers_of(triples)
    batches = Batches(answers, 16)
    history = train(
        model, triples, epochs=3, batch_size=16, optimizer="Adam", schedule=schedule, seed=5, memory=1, **options
    )
    adam = torch.optim.Adam(other.parameters())
    losses, step = [], 0
    for epoch in range(3):
        total = 0.0
        for batch in batches.epoch(derived(5, epoch, "order")):
            dense = torch.zeros(len(batch.heads), triples.num_entities, dtype=F64)
            dense[batch.rows, batch.tails] = 1
            logits = other.score_all(batch.heads, batch.relations)
            loss = binary_cross_entropy_with_logits(logits, 0.9 * dense + 0.1 / triples.num_entities)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 0.02)
            adam.param_groups[0]["lr"] = 0.05 * 0.8**epoch * schedule(step, 3 * len(batches))
            adam.step()
            step += 1
            total += loss.item() * len(dense)
        losses.append(total / len(answers))
    torch.testing.assert_close(list(history.losses), losses, rtol=1e-12, atol=0)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3]
    assert history.best is None
    assert history.seconds > 0


@pytest.mark.parametrize("loss", ["1-N", "softmax", "1-vs-all", "negative sampling"])
@pytest.mark.parametrize("inverse", [True, False])
def test_every_loss_learns_the_training_split(loss, inverse):
    triples = graph(entities=15, relations=2, count=60, inverse=inverse)
    model = Bilinear(triples, dim=12)
    view = {"split": "train", "direction": "both" if inverse else "tail"}
    before = evaluate(model, triples, **view).mrr
    history = train(model, triples, epochs=60, batch_size=16, lr=0.05, loss=loss, every=20, validation=view, seed=0)
    assert before < 0.5
    assert evaluate(model, triples, **view).mrr == history.best_mrr > 0.9
    assert history.losses[-1] < history.losses[0]


def test_bf16_learns():
    triples = graph(entities=15, relations=2, count=60)
    model = Bilinear(triples, dim=12)
    train(model, triples, epochs=60, batch_size=16, lr=0.05, amp=True, seed=0)
    assert evaluate(model, triples, "train").mrr > 0.9
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_seeds_and_generators():
    triples = graph()

    def trained(**options):
        model = Bilinear(triples, dropout=0.3)
        train(model, triples, epochs=2, batch_size=16, **options)
        return bits(model)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = trained(seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # left as it was
    torch.manual_seed(4)
    assert equal(first, trained(seed=1))
    assert not equal(first, trained(seed=2))
    given = [trained(generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert equal(*given)
    torch.manual_seed(3)
    drawn = [trained(), trained()]
    assert not equal(*drawn)  # torch's own generator moves on
    torch.manual_seed(3)
    assert equal(drawn[0], trained())


def test_a_model_in_evaluation_is_left_so():
    model = Bilinear(graph(), dropout=0.2).eval()
    train(model, graph(), epochs=1)
    assert not any(part.training for part in model.modules())


# --- optimizers ---


def test_optimizers_by_name_class_partial_callable_and_instance():
    triples = graph()
    model = Bilinear(triples)
    cases = {
        "AdamW": None,
        "Adagrad": "Adagrad",
        "Adam": torch.optim.Adam,
        "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
        "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.3),
        "RMSprop": torch.optim.RMSprop(model.parameters(), lr=0.3),
    }
    for name, asked in cases.items():
        made = make_optimizer(model, asked, lr=0.1, weight_decay=0.01, steps=10)
        assert type(made).__name__ == name
        assert made.param_groups[0]["lr"] == (0.3 if name in ("NAdam", "RMSprop") else 0.1)
        start = bits(model)
        train(model, triples, epochs=1, lr=0.1, optimizer=asked)
        assert not equal(start, bits(model))
    assert (
        make_optimizer(model, functools.partial(torch.optim.SGD, lr=0.5), lr=0.1, weight_decay=0, steps=1).defaults[
            "lr"
        ]
        == 0.5
    )
    mapped = Mapped(triples)
    made = make_optimizer(mapped, "RankAdaptive", lr=0.1, weight_decay=0.02, steps=10)
    assert made.settle_at == 6
    assert [group["weight_decay"] for group in made.param_groups] == [0.02, 0.02]
    partial = functools.partial(tnlayers.RankAdaptive, tol=0.3)
    assert type(make_optimizer(Mapped(triples), partial, lr=0.1, weight_decay=0, steps=10)) is tnlayers.RankAdaptive


@pytest.mark.parametrize("method", ["RiemannianSGD", "RiemannianAdam", "RankAdaptive", "augmented"])
def test_optimizers_of_networks(method):
    triples = graph(entities=15, relations=2, count=60)
    model = Mapped(triples, dim=12)
    asked = method
    if method == "augmented":
        asked = functools.partial(tnlayers.RankAdaptive, method="augmented", tol=0.05)
    history = train(model, triples, epochs=12, batch_size=16, lr=0.05, optimizer=asked, every=4, seed=0)
    assert history.losses[-1] < history.losses[0]
    assert all(layer._window is None for _, layer in network_layers(model))  # no probe is left
    assert evaluate(model, triples, "valid").mrr == history.best_mrr
    seen = [epoch.ranks["map"] for epoch in history.epochs]
    assert model.map.network.ranks == seen[history.best - 1]
    if method == "RankAdaptive":
        assert len(set(seen)) > 1


# --- validation ---


def scripted(monkeypatch, values):
    """Validation says what it is told; which weights it saw."""
    left, seen = iter(values), []

    class Said:
        def __init__(self, mrr):
            self.mrr, self.mr, self.hits = mrr, 1 / mrr, {1: mrr, 3: mrr, 10: mrr}

    def said(model, triples, **options):
        assert options == {"split": "valid"}
        seen.append(bits(model))
        return Said(next(left))

    monkeypatch.setattr(module, "evaluate", said)
    return seen


@pytest.mark.parametrize(
    ("mrr", "patience", "best", "count", "stopped"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.9], 2, 2, 4, "patience"),  # an equal one is not better
        ([0.1, 0.3, 0.2, 0.4, 0.9], 2, 5, 5, "epochs"),
        ([0.5, 0.3, 0.2, 0.4, 0.4], None, 1, 5, "epochs"),
        ([0.5, 0.3, 0.2, 0.4, 0.4], 4, 1, 5, "patience"),
    ],
)
def test_early_stopping_keeps_the_best_weights(mrr, patience, best, count, stopped, monkeypatch, unchecked):
    seen = scripted(monkeypatch, mrr)
    model = Bilinear(graph(), norm=True, dropout=0.1)
    history = train(model, graph(), epochs=10, batch_size=16, lr=0.05, every=2, patience=patience, seed=0)
    assert (history.best, len(seen), history.stopped) == (2 * best, count, stopped)
    assert history.mrr == {2 * k + 2: value for k, value in enumerate(mrr[:count])}
    assert history.best_mrr == mrr[best - 1]
    assert len(history.epochs) == 2 * count
    assert equal(bits(model), seen[best - 1])


def test_patience_alone_validates_every_ten_epochs_and_at_the_end(monkeypatch, unchecked):
    scripted(monkeypatch, [0.1, 0.2, 0.3])
    assert list(train(Bilinear(graph()), graph(), epochs=25, patience=2).mrr) == [10, 20, 25]


# --- files ---


def test_a_bar_of_the_training(capfd, unchecked):
    train(Bilinear(graph()), graph(), epochs=2, batch_size=32, seed=0, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err
    assert "epoch" in err
    model = Bilinear(graph())
    before = bits(model)
    with pytest.raises(TypeError, match="train: progress must be True, False or a callable, got 'yes'"):
        train(model, graph(), epochs=1, progress="yes")
    assert equal(bits(model), before)


def test_log_progress_and_tensorboard(tmp_path):
    log, seen = tmp_path / "logs" / "run.jsonl", []
    options = {"batch_size": 32, "lr": 0.02, "every": 2, "seed": 0, "log": log}
    triples = graph()
    history = train(
        Mapped(triples), triples, epochs=4, optimizer="RankAdaptive",
        progress=lambda done, whole, text: seen.append((done, whole, text)), **options,
    )  # fmt: skip
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == list(history.losses)
    assert ["mrr" in line for line in lines] == [False, True, False, True]
    assert lines[1]["hits"].keys() == {"1", "3", "10"}
    assert lines[0]["ranks"].keys() == {"map"}
    steps = len(Batches(answers_of(triples), 32)) * 4
    assert [(done, whole) for done, whole, _ in seen] == [(k + 1, steps) for k in range(steps)]
    assert seen[-1][2].startswith("epoch 3, loss ")
    assert "valid MRR" in seen[-1][2]
    train(Bilinear(triples), triples, epochs=2, **options)  # another run begins its log anew
    assert len(log.read_text().splitlines()) == 2
    assert str(history).startswith("4 epochs in ")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(Bilinear(graph()), graph(), epochs=3, every=1, tensorboard=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss", "lr", "seconds", "valid/mrr", "valid/mr", "valid/hits@10"} <= set(events.Tags()["scalars"])
    torch.testing.assert_close([event.value for event in events.Scalars("loss")], list(history.losses))


def test_a_missing_tensorboard_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"needs TensorBoard; pip install 'tnlayers\[tensorboard\]'"):
        train(Bilinear(graph()), graph(), epochs=1, tensorboard=tmp_path)


# --- refusals ---


class Diverging(Bilinear):
    """NaN in the 12th step."""

    calls = 0

    def query(self, heads, relations):
        self.calls += 1
        return super().query(heads, relations) * (float("nan") if self.calls == 12 else 1.0)


@pytest.mark.parametrize("look", [1, 64])
def test_a_loss_that_is_not_finite_is_refused_with_its_place(look, tmp_path, monkeypatch):
    triples = graph()
    each = len(Batches(answers_of(triples), 16))
    assert 6 < each < 12
    monkeypatch.setattr(module, "LOOK", look)
    model = Diverging(triples)
    if look > 1:  # as on a GPU: looked at later, but no checkpoint holds what came of it
        monkeypatch.setattr(module._Run, "look", property(lambda self: 64, lambda self, value: None), raising=False)
    before = Bilinear(triples)
    train(before, triples, epochs=1, batch_size=16, seed=0)
    file = tmp_path / "run.pt"
    with pytest.raises(ValueError, match=rf"got nan in epoch 2, batch {12 - each} of {each} \(lr = 0.001\); lower lr"):
        train(model, triples, epochs=3, batch_size=16, seed=0, checkpoint=file, checkpoint_seconds=0.0)
    kept = torch.load(file, weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in kept["model"].values())
    if look == 1:
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        assert kept["progress"]["step"] == 12 - each - 1


def unseen():
    triples = graph()
    train = triples.train[triples.train[:, 1] != 1]
    return type(triples)(train, triples.valid, triples.test, triples.entity_to_id, triples.relation_to_id)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "bce"}, "loss must be one of 1-N, softmax, 1-vs-all, negative sampling, or a Loss, got 'bce'"),
        ({"loss": "softmax", "smoothing": "published"}, "a softmax is smoothed uniformly"),
        ({"label_smoothing": 1.5}, r"smoothing must lie in \[0, 1\), got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be a number above 0, got nan"),
        ({"clip": 0.0}, "clip must be a number above 0, got 0.0"),
        ({"optimizer": "adam"}, "optimizer must be one of AdamW, Adam, Adagrad, SGD, Riemannian.*got 'adam'"),
        ({"triples": graph(entities=24)}, "the model has 23 entities and 6 relations .* the graph 24 and 6"),
        ({"triples": graph(inverse=False)}, r"the graph 23 and 3 \(inverse=False\); make the model from these"),
        ({"triples": unseen()}, r"every relation needs a training triple, 1 have none \(r1\); load_triples"),
        ({"triples": graph(valid=0), "every": 1}, "validation needs triples, the split 'valid' is empty"),
    ],
)
def test_refusals(options, message):
    model = Bilinear(graph())
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        train(model, **{"triples": graph(), "epochs": 1, **options})
    assert equal(bits(model), before)


def test_refused_types(unchecked):
    with pytest.raises(TypeError, match="expected a KGModel, got Linear"):
        train(torch.nn.Linear(2, 2), graph(), epochs=1)
    with pytest.raises(TypeError, match="optimizer must be a name, an optimizer or a callable, got int"):
        train(Bilinear(graph()), graph(), epochs=1, optimizer=3)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got int"):
        train(Bilinear(graph()), graph(), epochs=1, optimizer=lambda model: 3)
    with pytest.raises(ValueError, match="must have parameters that require gradients, got none"):
        train(Bilinear(graph()).requires_grad_(False), graph(), epochs=1)


def test_a_loss_of_ones_own():
    """Anything with `backward` can be minimized: here the same in other words."""

    class Mine(Loss):
        def backward(self, model, batch, context, memory):
            return OneToN(0.1).backward(model, batch, context, memory)

    one, two = Bilinear(graph()), Bilinear(graph())
    train(one, graph(), epochs=2, loss=Mine(), seed=0)
    train(two, graph(), epochs=2, seed=0)
    assert equal(bits(one), bits(two))
    assert isinstance(one, KGModel)


def test_histories():
    history = History((Epoch(1, 0.7, 0.1, 0.01),), None, "max_seconds")
    assert str(history) == "1 epochs in 0.1 s, loss 0.7, ended by max_seconds"
    assert str(History((), None, "epochs")) == "no epoch done"
    assert history.best_mrr is None
