"""FGSM and PGD against the formulas; what they leave alone; ranges, units and refusals."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank
from tnlayers.attacks import fgsm, pgd, robust_accuracy

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        tnlayers.Conv2d(1, 4, 3, network=tnlayers.random_network(LowRank, rank=2)),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Dropout(0.5),
        tnlayers.Linear(4 * 36, 5, network=tnlayers.random_network(LowRank, rank=3)),
    ).to(dtype)


def batch(count: int = 16, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 8, 8, dtype=dtype, generator=generator(1))
    return x, torch.randint(0, 5, (count,), generator=generator(2))


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    at = x.clone().requires_grad_()
    F.cross_entropy(model(at), y).backward()
    assert at.grad is not None
    model.zero_grad()
    return at.grad


@pytest.mark.parametrize("bounded", [False, True])
def test_fgsm_is_its_formula(bounded):
    model, (x, y) = small_model(), batch()
    found = fgsm(model, x, y, 0.2, **({"low": 0, "high": 1} if bounded else {}))
    model.eval()
    want = x + 0.2 * gradient(model, x, y).sign()
    assert torch.equal(found, want.clamp(0, 1) if bounded else want)
    assert not found.requires_grad


@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_is_its_formula(steps):
    model, (x, y) = small_model(), batch()
    eps, step = 0.1, 0.03
    found = pgd(model, x, y, eps, step, steps, low=0.0, high=1.0, generator=generator(3))
    model.eval()
    shift = torch.rand(x.shape, generator=generator(3), dtype=F64)
    z = (x + eps * (2 * shift - 1)).clamp(0, 1)
    for _ in range(steps):
        z = z + step * gradient(model, z, y).sign()
        z = (x + (z - x).clamp(-eps, eps)).clamp(0, 1)
    torch.testing.assert_close(found, z, rtol=1e-12, atol=1e-12)


def test_one_full_step_of_pgd_is_fgsm():
    model, (x, y) = small_model(), batch()
    one = pgd(model, x, y, 0.1, 0.1, 1, low=0, high=1, random_start=False)
    torch.testing.assert_close(one, fgsm(model, x, y, 0.1, low=0, high=1))


def test_random_starts_are_those_of_the_generator():
    model, (x, y) = small_model(), batch()
    runs = [pgd(model, x, y, 0.1, 0.0, 1, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert float((runs[0] - x).abs().max()) <= 0.1 + 1e-12
    assert float((runs[0] - x).abs().max()) > 0.09
    state = torch.get_rng_state()
    pgd(model, x, y, 0.1, 0.05, 2, generator=generator(0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("attack", [fgsm, partial(pgd, step=0.2, steps=5)], ids=["fgsm", "pgd"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_changes_stay_within_eps_and_the_range(attack, dtype):
    model, (x, y) = small_model(dtype), batch(dtype=dtype)
    x[0], x[1] = 0.0, 1.0
    for eps in (0.0, 1e-3, 0.3, 5.0):
        z = attack(model, x, y, eps=eps, low=0, high=1)
        assert float((z - x).abs().max()) <= eps * (1 + 1e-6) + 1e-7
        assert 0 <= float(z.min()) <= float(z.max()) <= 1
        assert z.dtype == dtype
    assert torch.equal(attack(model, x, y, eps=0.0), x)


def test_attacks_raise_the_loss_and_pgd_more_than_one_step():
    model, (x, y) = small_model(), batch(64)
    model.eval()

    def loss(z: Tensor) -> float:
        return float(F.cross_entropy(model(z), y).detach())

    strong = pgd(model, x, y, 0.1, 0.02, 20, random_start=False)
    assert loss(x) < loss(fgsm(model, x, y, 0.1)) < loss(strong)


@pytest.mark.parametrize("attack", [fgsm, partial(pgd, step=0.2, steps=2)], ids=["fgsm", "pgd"])
def test_modes_gradients_statistics_and_flags_are_left_alone(attack):
    model, (x, y) = small_model(), batch()
    model[1].eval()  # a user's frozen statistics in a model that trains
    F.cross_entropy(model(x), y).backward()
    modes = [module.training for module in model.modules()]
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    x.requires_grad_()
    attack(model, x, y, eps=0.1)
    assert x.grad is None
    assert [module.training for module in model.modules()] == modes
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert torch.equal(p.grad, before[name][1])
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
    with torch.no_grad():
        a = attack(model, x, y, eps=0.1)
    with torch.inference_mode():
        b = attack(model, x, y, eps=0.1)
    assert a.shape == b.shape == x.shape


def test_modes_come_back_after_an_error():
    model, (x, y) = small_model(), batch()
    with torch.no_grad():
        model[5].bias.fill_(float("nan"))
    for attack in (fgsm, partial(pgd, step=0.2, steps=2)):
        with pytest.raises(ValueError, match="gradient of the input must be finite, got NaN"):
            attack(model, x, y, eps=0.1)
        assert model.training


def test_the_model_is_attacked_in_evaluation_mode():
    """Dropout off, running statistics used: the same answer twice, and that of the model in evaluation."""
    model, (x, y) = small_model(), batch()
    first = fgsm(model, x, y, 0.1)
    assert torch.equal(first, fgsm(model, x, y, 0.1))
    assert torch.equal(first, fgsm(model.eval(), x, y, 0.1))


def test_a_normalised_input_takes_sizes_and_range_in_its_own_units():
    """Pixels through the normalisation, or normalised inputs with eps / std: the same images."""
    mean, std = torch.tensor(0.4, dtype=F64), torch.tensor([0.3], dtype=F64).reshape(1, 1, 1, 1)
    inside, (x, y) = small_model(), batch()

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inside((pixels - mean) / std)

    want = fgsm(Pixels(), x, y, 0.1, low=0, high=1)
    found = fgsm(inside, (x - mean) / std, y, 0.1 / std, low=(0 - mean) / std, high=(1 - mean) / std)
    torch.testing.assert_close(found * std + mean, want)
    strong = pgd(Pixels(), x, y, 0.1, 0.03, 4, low=0, high=1, random_start=False)
    found = pgd(
        inside, (x - mean) / std, y, 0.1 / std, 0.03 / std, 4, low=(0 - mean) / std, high=(1 - mean) / std,
        random_start=False,
    )  # fmt: skip
    torch.testing.assert_close(found * std + mean, strong)


def test_small_gradients_of_a_sure_model_still_have_a_sign():
    """The loss is summed: a mean over the batch would underflow in single precision."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    x, y = torch.tensor([[-50.0, 51.0]] * 4096), torch.zeros(4096, dtype=torch.long)
    assert torch.equal(fgsm(model, x, y, 0.5)[0], torch.tensor([-49.5, 50.5]))
    assert torch.equal(fgsm(model, x, y, 0.5, loss=F.cross_entropy), x)


def test_another_loss():
    x, y = batch()
    model = small_model().eval()

    def margin(outputs: Tensor, labels: Tensor) -> Tensor:
        return -outputs.gather(1, labels[:, None]).sum()

    at = x.clone().requires_grad_()
    margin(model(at), y).backward()
    assert torch.equal(fgsm(model, x, y, 0.1, loss=margin), x + 0.1 * at.grad.sign())


def test_robust_accuracy_counts():
    model = nn.Sequential(nn.Identity())
    x = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.1, 0.9]])
    y = torch.tensor([0, 0, 0])
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    assert robust_accuracy(model, batches, 0) == pytest.approx(2 / 3)
    assert robust_accuracy(model, batches, 0.2) == pytest.approx(1 / 3)
    assert robust_accuracy(model, batches, 0.6) == 0.0
    assert model.training
    attack = partial(pgd, step=0.05, steps=20, low=0, high=1)
    assert robust_accuracy(model, batches, 0.2, attack=attack) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        robust_accuracy(model, [], 0.1)
    trained = small_model()
    x, y = batch(64)
    want = float((trained.eval()(x).argmax(1) == y).double().mean())
    assert robust_accuracy(trained.train(), [(x, y)], 0) == want
    assert trained.training


def test_a_model_in_training_by_an_optimizer_of_ours_is_attacked_between_two_steps():
    model, (x, y) = small_model(), batch()
    optimizer = tnlayers.CondLR(model, 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adversarial = fgsm(model, x, y, 0.05, low=0, high=1)
        assert all(p.grad is None for p in model.parameters())
        F.cross_entropy(model(adversarial), y).backward()
        optimizer.step()
    assert max(optimizer.conditions().values()) <= 1.5


def test_what_makes_no_sense_is_refused():
    model, (x, y) = small_model(), batch()
    for attack in (fgsm, partial(pgd, step=0.1, steps=1)):
        with pytest.raises(ValueError, match=r"eps must be >= 0, got -0.1"):
            attack(model, x, y, eps=-0.1)
        with pytest.raises(ValueError, match=r"eps must be >= 0, got nan"):
            attack(model, x, y, eps=float("nan"))
        with pytest.raises(ValueError, match=r"x must lie within \[low, high\], expected 0.5 to 1"):
            attack(model, x, y, eps=0.1, low=0.5, high=1)
        with pytest.raises(TypeError, match=r"x must be a floating tensor, got torch.int64"):
            attack(model, y, y, eps=0.1)
    with pytest.raises(ValueError, match="pgd: step must be >= 0, got -1"):
        pgd(model, x, y, 0.1, -1, 1)
    for steps in (0, True, 1.5):
        with pytest.raises(ValueError, match="pgd: steps must be an int >= 1"):
            pgd(model, x, y, 0.1, 0.1, steps)


def test_torchattacks_agrees():
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = small_model(torch.float32).eval(), batch(dtype=torch.float32)
    torch.testing.assert_close(fgsm(model, x, y, 0.1, low=0, high=1), torchattacks.FGSM(model, eps=0.1)(x, y))
    theirs = torchattacks.PGD(model, eps=0.1, alpha=0.03, steps=5, random_start=False)(x, y)
    found = pgd(model, x, y, 0.1, 0.03, 5, low=0, high=1, random_start=False)
    torch.testing.assert_close(found, theirs)
