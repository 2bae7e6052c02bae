"""Recovery after compression: blocks fitted to their originals, models distilled from them; what is refused."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from tests.loops import generator
from tests.recovering import Convolutions, Encoder, digest, error, mlp, output, sentences, shortened, vectors
from tnlayers.recovery import distill, find_blocks, reconstruct
from tnlayers.recovery.descent import factor
from tnlayers.recovery.feed import Feed, Store

# --- blocks ---


def test_find_blocks():
    assert find_blocks(Encoder()) == ["layers.0", "layers.1"]
    assert find_blocks(mlp()) == ["0", "2", "4"]
    assert find_blocks(Convolutions()) == ["body.0", "body.1"]
    assert find_blocks(Encoder(), "layers.*") == ["layers.0", "layers.1"]  # one level a dot
    assert find_blocks(Encoder(), ["layers.1.linear?", "embedding"]) == [
        "layers.1.linear1",
        "layers.1.linear2",
        "embedding",
    ]
    with pytest.raises(ValueError, match=r"got 'layer\.\*'; perhaps 'layers"):
        find_blocks(Encoder(), "layer.*")
    with pytest.raises(ValueError, match=r"holds no nn\.ModuleList"):
        find_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("sequential", [True, False])
def test_reconstruction_of_an_mlp_halves_the_error_on_other_data(sequential):
    teacher = mlp()
    model = shortened(teacher, rank=8)
    before, held, kept = error(model, teacher, vectors(100)), vectors(100), digest(teacher)
    done = reconstruct(
        model, teacher, vectors(0, 20), steps=150, lr=5e-3, sequential=sequential, generator=generator(0)
    )
    share = 0.5 if sequential else 0.65
    assert error(model, teacher, held) < share * before
    assert done.after < share * done.before
    assert done.after == pytest.approx(error(model, teacher, vectors(0, 20)), rel=1e-4)
    assert [row.name for row in done.blocks] == ["0", "2", "4"]
    assert all(row.after <= row.solved <= row.before for row in done.blocks)
    assert all(row.layers == ("Linear",) for row in done.blocks)
    assert digest(teacher) == kept
    assert done.reason == "all 3 blocks are done"


def test_least_squares_alone_lowers_the_error():
    teacher = mlp()
    model, other = shortened(teacher, rank=8), shortened(teacher, rank=8)
    held = vectors(100)
    done = reconstruct(model, teacher, vectors(0, 20), steps=0)
    assert error(model, teacher, held) < 0.95 * error(other, teacher, held)
    assert done.steps == 0
    nothing = reconstruct(other, teacher, vectors(0, 20), steps=0, closed_form=False)
    assert nothing.after == pytest.approx(nothing.before)
    assert all(row.layers == () for row in nothing.blocks)


def test_sequential_makes_up_for_blocks_before():
    teacher = mlp()
    errors = {}
    for sequential in (True, False):
        model = copy.deepcopy(teacher)
        with torch.no_grad():  # wrong and frozen: only blocks that see what it gives can make up for it
            model[0].weight.mul_(0.6)
        model[0].requires_grad_(False)
        start = error(model, teacher, vectors(100))
        options = {"blocks": ["2", "4"], "steps": 100, "lr": 5e-3, "sequential": sequential}
        reconstruct(model, teacher, vectors(0, 20), **options)
        errors[sequential] = error(model, teacher, vectors(100))
    assert errors[False] == pytest.approx(start, rel=1e-2)
    assert errors[True] < 0.5 * start


def test_reconstruction_of_an_encoder_with_padding():
    teacher = Encoder()
    model = shortened(teacher, rank=6, exclude=["*out_proj", "embedding"])
    model.train()
    teacher.train()
    held = sentences(100)
    before = error(model, teacher, held)
    model.train(), teacher.train()
    kept = digest(teacher)
    done = reconstruct(model, teacher, sentences(0, 20), steps=100, lr=3e-3)
    assert model.training
    assert all(m.training for m in (*model.modules(), *teacher.modules()))
    assert digest(teacher) == kept
    assert error(model, teacher, held) < 0.5 * before
    assert {"linear1", "linear2"} & set(done.blocks[0].layers)


def test_what_padding_holds_does_not_matter():
    teacher, made = Encoder(), []
    for junk in (0, 17):
        batches = sentences(0)
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = junk
        model = shortened(teacher, rank=6, exclude=["*out_proj", "embedding"])
        model.embedding.requires_grad_(False)
        reconstruct(model, teacher, batches, steps=5, generator=generator(0))
        distill(model, teacher, batches, steps=5, generator=generator(0))
        made.append(model)
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_reconstruction_of_convolutions():
    teacher = Convolutions()
    with torch.no_grad():
        for _ in range(5):
            teacher(torch.randn(16, 3, 8, 8))
    model = shortened(teacher, rank=5)
    batches = [torch.randn(16, 3, 8, 8, generator=generator(k)) for k in range(8)]
    held = [torch.randn(16, 3, 8, 8, generator=generator(100))]
    before, statistics = error(model, teacher, held), model.body[0][1].running_mean.clone()
    done = reconstruct(model, teacher, batches, steps=80, lr=5e-3)
    assert error(model, teacher, held) < 0.5 * before
    assert torch.equal(model.body[0][1].running_mean, statistics)
    assert [row.layers for row in done.blocks] == [(), ()]


def test_activations_beyond_the_budget_go_to_files():
    teacher = Encoder()
    made = []
    for budget in (2**30, 3000, 0):
        model = shortened(teacher, rank=6, exclude=["*out_proj", "embedding"])
        reconstruct(model, teacher, sentences(0), steps=4, cache_bytes=budget, generator=generator(0))
        made.append(digest(model))
    assert made[0] == made[1] == made[2]


def test_store_keeps_structure_and_cleans_up():
    with Store(budget=100) as store:
        for k in range(4):
            store.append({"a": torch.full((10,), float(k)), "b": [None, "word", torch.ones(1000)[:2]]})
        assert [float(store[k]["a"][0]) for k in range(4)] == [0, 1, 2, 3]
        assert store[3]["b"][1] == "word"
        files = list(Path(store._folder.name).iterdir())
        assert len(files) == 2
        assert max(file.stat().st_size for file in files) < 3000  # a view without its base
    assert not files[0].exists()


def test_frozen_parameters_stay_and_gradients_are_dropped():
    teacher = mlp()
    model = shortened(teacher, rank=8)
    model[0].requires_grad_(False)
    model[2].cores[0].requires_grad_(False)
    kept = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("0.") or k == "2.cores.0"}
    reconstruct(model, teacher, vectors(0), steps=5)
    distill(model, teacher, vectors(0), steps=5)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())
    assert all(p.grad is None for p in (*model.parameters(), *teacher.parameters()))
    assert all(p.requires_grad for p in teacher.parameters())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        return self.layers[0](self.layers[0](x))


def test_reconstruct_refuses(unchecked):
    teacher = mlp()
    model = shortened(teacher)
    x = vectors(0)
    with pytest.raises(ValueError, match="expected at least one batch, got no batches"):
        reconstruct(model, teacher, [])
    with pytest.raises(TypeError, match=r"list of batches or another re-iterable, got Tensor"):
        reconstruct(model, teacher, x[0])
    with pytest.raises(TypeError, match="generator that can be read once"):
        reconstruct(model, teacher, (batch for batch in x))
    with pytest.raises(TypeError, match=r"teacher must be a torch\.nn\.Module, got int"):
        reconstruct(model, 3, x)
    with pytest.raises(ValueError, match=r"got 0\.bias of the teacher in the memory of 0\.bias"):
        reconstruct(model, model, x)
    with pytest.raises(ValueError, match="steps must be an int >= 0, got -1"):
        reconstruct(model, teacher, x, steps=-1)
    with pytest.raises(ValueError, match="seconds must be a finite number > 0, got 0"):
        reconstruct(model, teacher, x, seconds=0)
    with pytest.raises(ValueError, match="schedule must be one of"):
        reconstruct(model, teacher, x, schedule="cosinus")
    with pytest.raises(ValueError, match="must match a module, got '7'"):
        reconstruct(model, teacher, x, blocks="7")
    with pytest.raises(ValueError, match="teacher must have the model's modules, got none named '4'"):
        reconstruct(model, teacher[:3], x)
    twice = Twice()
    with pytest.raises(ValueError, match=r"called once a pass, got 2 calls of 'layers\.0'"):
        reconstruct(copy.deepcopy(twice), twice, [torch.ones(2, 8)])
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
        reconstruct(model, teacher, [torch.full((2, 24), float("nan"))])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        reconstruct(model, teacher, x)
    training = shortened(teacher)
    _ = tnlayers.RankAdaptive(training, lr=0.1)
    with pytest.raises(ValueError, match=r"0 is in training by an optimizer that finds ranks; give tnlayers\.compact"):
        reconstruct(training, teacher, x)


# --- distillation ---


@pytest.mark.parametrize("loss", ["output", "hidden", "logits", "callable"])
@pytest.mark.parametrize("optimizer", ["adamw", "rank_adaptive"])
def test_distillation_halves_the_error_on_other_data(loss, optimizer):
    teacher = mlp()
    model = shortened(teacher, rank=8)
    sizes = sum(layer.numel() for layer in model if isinstance(layer, tnlayers.Linear))
    held, kept = vectors(100), digest(teacher)

    def measured() -> float:
        if loss != "logits":  # which leaves a constant a row free
            return error(model, teacher, held)
        pairs = [(F.log_softmax(output(model, x), -1), F.log_softmax(output(teacher, x), -1)) for x in held]
        return sum(float(F.kl_div(a, b, log_target=True, reduction="batchmean")) for a, b in pairs)

    before = measured()
    how = (lambda made, target, batch: F.l1_loss(made, target)) if loss == "callable" else loss
    lr = 5e-3 if optimizer == "adamw" else 2e-3
    done = distill(
        model, teacher, vectors(0, 20), loss=how, epochs=15, lr=lr, optimizer=optimizer, generator=generator(0)
    )
    assert measured() < 0.5 * before
    assert done.after < done.before
    assert done.steps == 300
    assert done.reason == "all 300 steps are done"
    assert sum(layer.numel() for layer in model if isinstance(layer, tnlayers.Linear)) <= sizes
    assert digest(teacher) == kept
    assert all(getattr(module, "_window", None) is None for module in model.modules())


def test_rank_adaptive_moves_ranks_under_the_budget():
    teacher = mlp()
    with torch.no_grad():  # one layer needs rank 2 only, but is given 6 as all are
        teacher[2].weight.copy_(torch.randn(32, 2) @ torch.randn(2, 32) / 4)
    model = shortened(teacher, rank=6)
    sizes = sum(layer.numel() for layer in model if isinstance(layer, tnlayers.Linear))
    before = error(model, teacher, vectors(100))
    distill(model, teacher, vectors(0, 20), steps=200, lr=2e-3, optimizer="rank_adaptive", generator=generator(0))
    ranks = [layer.network.ranks[0] for layer in model if isinstance(layer, tnlayers.Linear)]
    assert ranks[1] < 6 < max(ranks)
    assert sum(layer.numel() for layer in model if isinstance(layer, tnlayers.Linear)) <= sizes
    assert error(model, teacher, vectors(100)) < 0.5 * before


def test_distillation_of_an_encoder():
    teacher = Encoder()
    model = shortened(teacher, rank=6, exclude=["*out_proj", "embedding"])
    held = sentences(100)
    before = error(model, teacher, held)
    done = distill(
        model,
        teacher,
        sentences(0, 20),
        loss="hidden",
        steps=150,
        lr=3e-3,
        validate=sentences(200, 2),
        generator=generator(0),
    )
    assert error(model, teacher, held) < 0.5 * before
    assert done.measure == "loss on the batches kept back"
    assert [moment.step for moment in done.history] == [50, 100, 150]
    assert done.after == min(moment.validation for moment in done.history)


def test_the_best_state_on_what_is_kept_back_is_kept():
    teacher = mlp()
    model = shortened(teacher, rank=8)
    start = copy.deepcopy(model)
    rate = iter([1e-3] * 20 + [0.5] * 1000)
    done = distill(
        model,
        teacher,
        vectors(0),
        steps=60,
        lr=1.0,
        schedule=lambda part: next(rate),
        validate=vectors(100, 2),
        every=10,
        generator=generator(0),
    )
    values = [moment.validation for moment in done.history]
    assert min(values) == values[1] == done.after < done.before
    assert values[-1] > done.before
    assert error(model, teacher, vectors(100, 2)) < error(start, teacher, vectors(100, 2))


def test_seconds_are_enough_as_a_limit():
    teacher = mlp()
    model = shortened(teacher, rank=8)
    told = []
    done = distill(model, teacher, vectors(0), seconds=0.5, lr=5e-3, progress=lambda *a: told.append(a))
    assert done.reason.startswith("the time of")
    assert done.steps == len(told) > 0
    assert done.after < done.before
    assert told[0][1] == 0  # whole seconds
    done = reconstruct(model, teacher, vectors(0), seconds=0.5)
    assert len(done.blocks) == 3


def test_schedules():
    assert factor("constant", 0.9) == 1
    assert factor("linear", 1.0) == 0
    assert factor("cosine", 0.01) == pytest.approx(0.2)
    assert factor(lambda part: part / 2, 0.5) == 0.25


def test_the_teacher_is_asked_once_where_its_outputs_fit():
    teacher, calls = mlp(), []
    teacher.register_forward_hook(lambda *a: calls.append(1))
    made = {}
    for budget in (2**20, 0):
        model = shortened(mlp(), rank=8)
        calls.clear()
        distill(
            model, teacher, vectors(0), epochs=5, cache_bytes=budget, validate=vectors(9, 2), generator=generator(0)
        )
        made[budget] = len(calls), digest(model)
    assert made[2**20][0] == 6 + 2
    assert made[0][0] >= 30
    assert made[2**20][1] == made[0][1]


def test_a_loader_serves():
    data = torch.utils.data.TensorDataset(torch.randn(64, 24))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    teacher = mlp()
    model, other = shortened(teacher), shortened(teacher)
    distill(model, teacher, loader, epochs=2)
    feed = Feed(loader, generator(0))
    for _ in range(6):
        next(feed)
    again = Feed(loader, generator(0))
    again.load(feed.state())
    assert torch.equal(next(feed)[1][0], next(again)[1][0])
    reconstruct(other, teacher, loader, steps=2)


def test_a_model_in_bfloat16_is_trained_in_float32():
    teacher = mlp().bfloat16()
    teacher.register_buffer("kept", torch.ones(2, dtype=torch.float16))
    model = shortened(teacher, rank=8)
    held = vectors(100)
    before, objects = error(model, teacher, held_half(held)), [id(p) for p in model.parameters()]
    seen = set()
    model[0].register_forward_hook(lambda m, a, o: seen.add(o.dtype))
    # steps of this size are lost in bfloat16
    done = distill(model, teacher, vectors(0, 20), steps=200, lr=3e-3)
    assert seen == {torch.float32}
    seen.clear()
    reconstruct(model, teacher, vectors(0, 20), steps=5, lr=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.kept.dtype == torch.float16
    assert [id(p) for p in model.parameters()] == objects
    assert error(model, teacher, held_half(held)) < 0.5 * before
    assert done.after < done.before


def held_half(batches):
    return [batch.bfloat16() for batch in batches]


def test_distill_refuses(unchecked):
    teacher = mlp()
    model = shortened(teacher)
    x = vectors(0)
    with pytest.raises(ValueError, match="give a limit, expected epochs=, steps= or seconds="):
        distill(model, teacher, x)
    with pytest.raises(ValueError, match="epochs or steps, got epochs=1 and steps=2"):
        distill(model, teacher, x, epochs=1, steps=2)
    with pytest.raises(ValueError, match="loss must be one of"):
        distill(model, teacher, x, steps=1, loss="outputs")
    with pytest.raises(TypeError, match=r"optimizer must be one of .* got int"):
        distill(model, teacher, x, steps=1, optimizer=3)
    with pytest.raises(TypeError, match="optimizer must return a torch optimizer, got int"):
        distill(model, teacher, x, steps=1, optimizer=lambda model: 3)
    with pytest.raises(ValueError, match="no validate"):
        distill(model, teacher, x, steps=1, validate=[])
    with pytest.raises(ValueError, match="lr must be a finite number > 0, got nan"):
        distill(model, teacher, x, steps=1, lr=float("nan"))
    with pytest.raises(ValueError, match="must be finite before the first step, got nan"):
        distill(model, teacher, [x[0] * float("nan")], steps=1)
    with pytest.raises(ValueError, match="of model and teacher must have one shape"):
        distill(model, teacher[:3], x, steps=1)
    with pytest.raises(ValueError, match="needs a layer whose weight is a tree network"):
        distill(mlp(1), teacher, x, steps=1, optimizer="rank_adaptive")
    with pytest.raises(TypeError, match="loss must return a tensor of one number"):
        distill(model, teacher, x, steps=1, loss=lambda a, b, c: a)
    assert digest(model) == digest(shortened(teacher))
