"""Recovery after compression: least squares, blocks, distillation; resumed, interrupted, refused."""

import copy
import hashlib
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from decompositions import as_operator, kronecker_svd, svd, to_matrix, ttm_svd
from tests.cases import CASES
from tests.loops import generator
from tnlayers.recovery import Recovery, RecoveryWarning, distill, find_blocks, reconstruct, solve_linear
from tnlayers.recovery.descent import factor
from tnlayers.recovery.feed import Feed, Store, call

ROOT = Path(__file__).parent.parent


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 12))


class Encoder(nn.Module):
    """Embedding, two of torch's encoder layers, called by keywords with an attention mask as transformers' models."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True) for _ in range(2)
        )

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        return {"last_hidden_state": x}


def sentences(seed: int, count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens in which the second half of some rows is padding."""
    made = []
    for k in range(count):
        ids = torch.randint(0, 50, (8, 10), generator=generator(seed + k))
        mask = torch.ones(8, 10, dtype=torch.long)
        mask[4:, 6:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def shortened(model: nn.Module, rank: int = 6, **options) -> nn.Module:
    """A compressed copy."""
    made = copy.deepcopy(model)
    tnlayers.tensorize(made, partial(svd, rank=rank), spectra=False, skip_if_no_gain=False, **options)
    return made


def vectors(seed: int, count: int = 6) -> list[torch.Tensor]:
    return [torch.randn(32, 24, generator=generator(seed + k)) for k in range(count)]


def output(model, batch):
    with torch.no_grad():
        made = call(model.eval(), batch)
    if not isinstance(made, dict):
        return made
    made = made["last_hidden_state"]
    return made[batch["attention_mask"].bool()]


def error(model, teacher, batches) -> float:
    wrong = sum(float((output(model, b) - output(teacher, b)).square().sum()) for b in batches)
    return wrong / sum(float(output(teacher, b).square().sum()) for b in batches)


def digest(model: nn.Module) -> str:
    made = hashlib.sha256()
    for name, value in model.state_dict().items():
        made.update(name.encode())
        made.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else bytes(str(value), "utf8"))
    return made.hexdigest()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- least squares ---

RECIPES = {
    "svd": partial(svd, rank=3),
    "ttm": partial(ttm_svd, rank=3, row_modes=(3, 4), col_modes=(5, 2)),
    "padded": partial(ttm_svd, rank=3, row_modes=(4, 4), col_modes=(4, 3)),
    "kronecker": partial(kronecker_svd, rank=2, row_modes=(3, 4), col_modes=(5, 2)),
}


def padded(weight: torch.Tensor, recipe):
    """The recipe on a weight with zero rows and columns up to its modes."""
    rows, cols = (
        torch.Size(recipe.keywords.get(f"{side}_modes", (n,)))
        for side, n in zip(("row", "col"), weight.shape, strict=True)
    )
    return recipe(F.pad(weight, (0, cols.numel() - weight.shape[1], 0, rows.numel() - weight.shape[0])))


def double_layer(kind: str, *, bias: bool = True):
    weight = torch.randn(12, 10, dtype=torch.float64, generator=generator(1))
    layer = tnlayers.Linear(10, 12, bias, network=padded(weight, RECIPES[kind]))
    return layer.double()


def jacobian_of(layer, core, x):
    """Dense columns of the output in one core (and the bias), by autograd: the slow truth."""
    parts = [layer.cores[core]] + ([] if layer.bias is None else [layer.bias])

    def made(*values):
        names = [f"cores.{core}"] + ([] if layer.bias is None else ["bias"])
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).flatten()

    found = torch.autograd.functional.jacobian(made, tuple(p.detach() for p in parts))
    return torch.cat([part.flatten(1) for part in found], 1), made(*(p.detach() for p in parts)).detach()


@torch.no_grad()
def relative(layer, x, y) -> float:
    return float((layer(x) - y).double().square().sum() / y.double().square().sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", RECIPES)
def test_solve_linear_is_the_optimum_over_its_core(kind, bias):
    layer = double_layer(kind, bias=bias)
    x = torch.randn(80, 10, dtype=torch.float64, generator=generator(2))
    y = torch.randn(80, 12, dtype=torch.float64, generator=generator(3))
    before = copy.deepcopy(layer)
    done = solve_linear(layer, x, y, ridge=1e-14)
    columns, now = jacobian_of(before, done.core, x)
    change = torch.linalg.lstsq(columns, (y.flatten() - now), driver="gelsd").solution
    best = float((y.flatten() - now - columns @ change).square().sum() / y.square().sum())
    assert done.after == pytest.approx(relative(layer, x, y), rel=1e-9)
    assert done.before == pytest.approx(relative(before, x, y), rel=1e-9)
    if kind == "padded":  # rows that are cut stay put, so that this is a bound
        assert best * (1 - 1e-9) <= done.after < done.before
    else:
        assert done.after == pytest.approx(best, rel=1e-7)
    changed = [not torch.equal(a, b) for a, b in zip(before.cores, layer.cores, strict=True)]
    assert changed == [k == done.core for k in range(len(changed))]


def test_solve_linear_recovers_a_weight_of_the_same_inner_space():
    layer = double_layer("svd")
    truth = copy.deepcopy(layer)
    with torch.no_grad():
        truth.cores[0].normal_(generator=generator(4))
        truth.bias.normal_(generator=generator(5))
    x = torch.randn(5, 8, 10, dtype=torch.float64, generator=generator(6))
    done = solve_linear(layer, x, truth(x).detach(), ridge=1e-16)
    assert done.after < 1e-20 < done.before
    assert torch.allclose(layer.weight, truth.weight, atol=1e-9)
    assert torch.allclose(layer.bias, truth.bias, atol=1e-9)
    assert done.tokens == 40


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("ridge", [1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("kind", RECIPES)
def test_solve_linear_never_increases_the_error(kind, ridge, tokens):
    layer = double_layer(kind).float()
    x = torch.randn(tokens, 10, generator=generator(7))
    y = layer(x).detach() + 1e-3 * torch.randn(tokens, 12, generator=generator(8))
    before = relative(layer, x, y)
    done = solve_linear(layer, x, y, ridge=ridge)
    after = relative(layer, x, y)
    assert after <= before * (1 + 1e-4)  # float32 in the forward that this test makes
    assert done.after <= done.before
    assert all(bool(core.isfinite().all()) for core in layer.cores)


def test_a_large_ridge_keeps_the_present_core():
    layer = double_layer("svd", bias=False)
    kept = layer.cores[0].detach().clone()
    x = torch.randn(30, 10, dtype=torch.float64, generator=generator(7))
    y = torch.randn(30, 12, dtype=torch.float64, generator=generator(8))
    changes = []
    for ridge in (1e-4, 1e2, 1e8):
        with torch.no_grad():
            layer.cores[0].copy_(kept)
        solve_linear(layer, x, y, ridge=ridge)
        changes.append(float((layer.cores[0].detach() - kept).norm()))
    assert changes[0] > changes[1] > changes[2]
    assert changes[2] < 1e-5


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_solve_linear_on_every_format(case):
    net = case()
    if not net.cols:
        net = as_operator(net, 1)
    if not net.cols or net.dtype.is_complex:
        pytest.skip("no operator of real numbers")
    rows, cols = to_matrix(net).shape
    layer = tnlayers.Linear(cols, rows, network=net)
    x = torch.randn(60, cols, dtype=torch.float64, generator=generator(2))
    y = torch.randn(60, rows, dtype=torch.float64, generator=generator(3))
    before = copy.deepcopy(layer)
    done = solve_linear(layer, x, y, ridge=1e-13)
    columns, now = jacobian_of(before, done.core, x)
    change = torch.linalg.lstsq(columns, y.flatten() - now, driver="gelsd").solution
    best = float((y.flatten() - now - columns @ change).square().sum() / y.square().sum())
    assert done.after == pytest.approx(best, rel=1e-5, abs=1e-12)


def test_masked_tokens_do_not_count():
    layer = double_layer("svd")
    other = copy.deepcopy(layer)
    x = torch.randn(4, 9, 10, dtype=torch.float64, generator=generator(2))
    y = torch.randn(4, 9, 12, dtype=torch.float64, generator=generator(3))
    mask = torch.rand(4, 9, generator=generator(4)) < 0.6
    done = solve_linear(layer, torch.where(mask[..., None], x, 1e6), torch.where(mask[..., None], y, 1e6), mask=mask)
    assert done.tokens == int(mask.sum())
    solve_linear(other, x[mask], y[mask])
    assert torch.equal(layer.cores[0], other.cores[0])


def test_solve_linear_refuses(unchecked):
    layer = double_layer("svd")
    x, y = torch.randn(20, 10, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"must be a tnlayers\.Linear, got Linear"):
        solve_linear(nn.Linear(10, 12), x, y)
    with pytest.raises(ValueError, match="inputs must have 10 features last"):
        solve_linear(layer, y, y)
    with pytest.raises(ValueError, match="same leading axes"):
        solve_linear(layer, x, y[:3])
    with pytest.raises(ValueError, match="ridge must be a finite number >= 0, got -1"):
        solve_linear(layer, x, y, ridge=-1)
    with pytest.raises(ValueError, match="must be finite"):
        solve_linear(layer, x * float("nan"), y)
    with pytest.raises(ValueError, match="at least one token"):
        solve_linear(layer, x, y, mask=torch.zeros(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="ridge=0 the features must have full rank, expected 3"):
        solve_linear(layer, x[:2], y[:2], ridge=0)
    layer.cores[0].requires_grad_(False)
    with pytest.raises(ValueError, match="core 0, which owns most rows, is frozen"):
        solve_linear(layer, x, y)


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


# --- stopped, interrupted, resumed ---


@pytest.mark.parametrize("optimizer", ["adamw", "rank_adaptive"])
def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(optimizer):
    teacher = mlp()
    model = shortened(teacher, rank=8)
    count = 0

    def loss(made, target, batch):
        nonlocal count
        count += torch.is_grad_enabled()
        return F.mse_loss(made, target) * (float("nan") if count > 25 else 1.0)

    with pytest.warns(RecoveryWarning, match=r"stopped early, the loss is nan after step 25.*Lower lr"):
        done = distill(model, teacher, vectors(0), loss=loss, steps=100, every=10, optimizer=optimizer)
    assert done.steps == 25
    assert done.reason == "stopped early: the loss is nan after step 25"
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert error(model, teacher, vectors(0)) < error(shortened(teacher, rank=8), teacher, vectors(0))


def test_a_block_that_diverges_keeps_what_it_had():
    teacher = mlp()
    model = shortened(teacher, rank=8)
    with pytest.warns(RecoveryWarning, match="reconstruct: stopped early, [024]: the loss is"):
        done = reconstruct(model, teacher, vectors(0), steps=30, every=5, lr=1e30)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(row.after <= row.before for row in done.blocks)
    assert done.reason.startswith("0: stopped early")


class Stop(Exception):
    pass


def stopping(at: int, exception: type[BaseException] = Stop):
    calls = []

    def progress(done, total, text):
        calls.append(done)
        if len(calls) == at:
            raise exception

    return progress


@pytest.mark.parametrize("method", ["distill", "rank_adaptive", "reconstruct"])
def test_an_interrupt_leaves_a_good_model(method):
    teacher = mlp()
    model = shortened(teacher, rank=8).train()
    ranks = [layer.network.ranks for layer in model if isinstance(layer, tnlayers.Linear)]
    start = error(shortened(teacher, rank=8), teacher, vectors(0))
    run = reconstruct if method == "reconstruct" else distill
    more = {"optimizer": method} if method == "rank_adaptive" else {}
    with pytest.raises(KeyboardInterrupt):
        run(model, teacher, vectors(0), steps=50, every=5, progress=stopping(33, KeyboardInterrupt), **more)
    assert model.training
    assert error(model, teacher, vectors(0)) < start
    if method != "rank_adaptive":
        assert [layer.network.ranks for layer in model if isinstance(layer, tnlayers.Linear)] == ranks
    assert all(getattr(module, "_window", None) is None for module in model.modules())
    model(vectors(0)[0]).sum().backward()


@pytest.mark.parametrize("stops", [[7], [13, 20], [1, 2, 25]])
@pytest.mark.parametrize("method", ["distill", "rank_adaptive", "reconstruct"])
def test_a_resumed_run_gives_the_same_bits(method, stops, tmp_path):
    teacher = mlp()
    path = tmp_path / "run.pt"

    def run(**options):
        torch.manual_seed(5)
        model = shortened(teacher, rank=6)
        if method == "reconstruct":
            done = reconstruct(model, teacher, vectors(0), steps=12, every=4, generator=generator(1), **options)
        else:
            kind = "adamw" if method == "distill" else method
            extra = {"optimizer": kind, "validate": vectors(50, 2), "lr": 5e-3}
            done = distill(model, teacher, vectors(0), steps=32, every=4, generator=generator(1), **extra, **options)
        return model, done

    whole, done = run()
    for stop in stops:
        with pytest.raises(Stop):
            run(checkpoint=path, progress=stopping(stop))
    model, resumed = run(checkpoint=path)
    assert same(model, whole)
    assert (resumed.before, resumed.after, resumed.steps) == (done.before, done.after, done.steps)
    assert [m._replace(seconds=0) for m in resumed.history] == [m._replace(seconds=0) for m in done.history]
    assert resumed.blocks == done.blocks
    again, loaded = run(checkpoint=path, progress=stopping(1))  # it is finished: no step is taken
    assert same(again, whole)
    assert loaded == resumed
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


KILLED = """
import os, signal, sys
from tests.test_recover import generator, mlp, shortened, vectors
import torch, tnlayers
from tnlayers.recovery import distill
torch.set_num_threads(1)
def progress(done, total, text):
    if done == 17:
        os.kill(os.getpid(), signal.SIGKILL)
teacher = mlp()
distill(shortened(teacher), teacher, vectors(0), steps=30, every=5, optimizer="rank_adaptive", generator=generator(1),
        checkpoint=sys.argv[1], progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_run_resumes(tmp_path):
    path = tmp_path / "run.pt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    teacher = mlp()
    made: list[tuple[nn.Module, int]] = []
    first: list[int] = []
    for checkpoint in (path, None):
        model = shortened(teacher)
        options = {"steps": 30, "every": 5, "optimizer": "rank_adaptive", "checkpoint": checkpoint}
        told = len(first)
        distill(model, teacher, vectors(0), generator=generator(1), progress=lambda *a: first.append(a[0]), **options)
        made.append((model, first[told]))
    assert [step for _, step in made] == [16, 1]
    assert same(made[0][0], made[1][0])


def test_checkpoints_of_another_run_are_refused(tmp_path):
    teacher, path = mlp(), tmp_path / "run.pt"
    distill(shortened(teacher), teacher, vectors(0), steps=3, checkpoint=path)
    with pytest.raises(ValueError, match=r"is of another run: lr is 0\.002 here, 0\.001 there; delete it"):
        distill(shortened(teacher), teacher, vectors(0), steps=3, lr=2e-3, checkpoint=path)
    with pytest.raises(ValueError, match=r"is of another run: 0\.cores\.0 is \[32, 5\] here, \[32, 6\] there"):
        distill(shortened(teacher, rank=5), teacher, vectors(0), steps=3, checkpoint=path)
    with pytest.raises(ValueError, match="is of another run: task is 'reconstruct' here, 'distill' there"):
        reconstruct(shortened(teacher), teacher, vectors(0), steps=3, checkpoint=path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is damaged or of another kind"):
        distill(shortened(teacher), teacher, vectors(0), steps=3, checkpoint=path)
    torch.save({"kind": "x"}, path)
    with pytest.raises(ValueError, match="expected a checkpoint of a recovery"):
        distill(shortened(teacher), teacher, vectors(0), steps=3, checkpoint=path)


def test_recovery_prints_and_survives_json():
    import json

    teacher = mlp()
    done = reconstruct(shortened(teacher), teacher, vectors(0), steps=2, every=1)
    text = str(done)
    assert text.startswith("reconstruct: relative squared error of the output ")
    assert "block" in text
    assert "6 steps in" in text
    assert Recovery.from_dict(json.loads(json.dumps(done.to_dict()))) == done
    assert [moment.block for moment in done.history] == ["0", "0", "2", "2", "4", "4"]
