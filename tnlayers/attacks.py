"""Inputs made to mislead a model: one step (FGSM) and projected steps (PGD) in the largest-entry norm.

All sizes are in the units of the input given. Of pixels that were normalised as `(pixel - mean) / std` the sizes are
`eps / std`, and the valid range is `[(0 - mean) / std, (1 - mean) / std]`: tensors that broadcast over x serve that.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = int | float | Tensor
"""A number, or a tensor that broadcasts over x."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, labels) -> scalar to be increased."""

SUMMED: Loss = partial(F.cross_entropy, reduction="sum")
"""Signs are those of the mean, and small gradients of large batches do not underflow."""


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Size,
    *,
    low: Size | None = None,
    high: Size | None = None,
    loss: Loss = SUMMED,
) -> Tensor:
    """Fast gradient sign method: `clamp(x + eps sign(d loss / dx), low, high)`.

    The model is in evaluation mode meanwhile, each module is put back into its own mode, and no parameter's `.grad` is
    touched. Guarantee: `|x' - x| <= eps` to rounding, `low <= x' <= high`. Cost: one forward and backward.

    Args:
        model: x -> outputs.
        x: floating inputs, batch first.
        y: labels, as `loss` takes them.
        eps: largest change of an entry, >= 0, in the units of x.
        low: least valid entry of x; None: unbounded.
        high: largest valid one.
        loss: of a batch; each of its samples is attacked by its own part of it.

    Returns:
        Inputs of the shape of x, without a graph.

    Raises:
        TypeError: an x that is not floating.
        ValueError: a negative eps; an x outside [low, high]; a gradient that is not finite.

    References:
        I. J. Goodfellow, J. Shlens, C. Szegedy, Explaining and harnessing adversarial examples, ICLR 2015.

    Example:
        >>> x = torch.tensor([[0.5, 0.95]])
        >>> fgsm(nn.Identity(), x, torch.tensor([0]), 0.1, low=0, high=1).tolist()
        [[0.4000000059604645, 1.0]]
    """
    _check("fgsm", x, eps, low, high)
    with _evaluating(model):
        return _inside(x.detach() + eps * _direction("fgsm", model, x, y, loss), low, high)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Size,
    step: Size,
    steps: int,
    *,
    low: Size | None = None,
    high: Size | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    loss: Loss = SUMMED,
) -> Tensor:
    """Projected gradient descent: `steps` times `z <- clamp(z + step sign(d loss / dz))` into `|z - x| <= eps`.

    As `fgsm` it leaves the model's modes and gradients alone, and z stays within [low, high]. `pgd` with one step of
    size eps from x itself is `fgsm`. Cost: `steps` forwards and backwards.

    Args:
        model: x -> outputs.
        x: floating inputs, batch first.
        y: labels, as `loss` takes them.
        eps: largest change of an entry, >= 0, in the units of x.
        step: of one step; eps / 4 is usual.
        steps: how many, >= 1.
        low: least valid entry of x; None: unbounded.
        high: largest valid one.
        random_start: begin at a uniform random point of the box instead of x.
        generator: of that point.
        loss: as for `fgsm`.

    Returns:
        Inputs of the shape of x, without a graph.

    Raises:
        TypeError: an x that is not floating.
        ValueError: a negative eps or step; no step; an x outside [low, high]; a gradient that is not finite.

    References:
        A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, Towards deep learning models resistant to adversarial
        attacks, ICLR 2018.

    Example:
        >>> x = torch.tensor([[0.5, 0.95]])
        >>> z = pgd(nn.Identity(), x, torch.tensor([0]), 0.1, 0.03, 10, low=0, high=1)
        >>> bool(torch.allclose(z, torch.tensor([[0.4, 1.0]])))
        True
    """
    _check("pgd", x, eps, low, high)
    if not bool((torch.as_tensor(step) >= 0).all()):
        raise ValueError(f"pgd: step must be >= 0, got {step}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"pgd: steps must be an int >= 1, got {steps!r}")
    start = x.detach()
    least, most = _inside(start - eps, low, high), _inside(start + eps, low, high)
    z = start
    if random_start:
        source = x.device if generator is None else generator.device
        shift = torch.rand(x.shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
        z = (start + (2 * shift - 1) * eps).clamp(least, most)
    with _evaluating(model):
        for _ in range(steps):
            z = (z + step * _direction("pgd", model, z, y, loss)).clamp(least, most)
    return z


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    eps: Size,
    *,
    attack: Callable[[nn.Module, Tensor, Tensor, Size], Tensor] = fgsm,
) -> float:
    """Part of the samples whose largest output is still at their label after an attack of size eps; 0 to 1.

    The model is measured in evaluation mode and put back into its own. eps = 0 gives the accuracy without an attack
    (exactly: `attack` is not called then).

    Args:
        model: x -> one output a class.
        batches: pairs of inputs and labels.
        eps: size of the attack, in the units of the inputs.
        attack: called as (model, x, y, eps); `functools.partial(pgd, step=.01, steps=10, low=0, high=1)` for others.

    Raises:
        ValueError: no samples; what the attack refuses.

    Example:
        >>> batches = [(torch.tensor([[0.6, 0.4], [1.0, 0.0]]), torch.tensor([0, 0]))]
        >>> robust_accuracy(nn.Identity(), batches, 0.0), robust_accuracy(nn.Identity(), batches, 0.2)
        (1.0, 0.5)
    """
    right = count = 0
    with _evaluating(model):
        for x, y in batches:
            z = attack(model, x, y, eps) if bool((torch.as_tensor(eps) != 0).any()) else x
            with torch.no_grad():
                right += int((model(z).argmax(1) == y).sum())
            count += len(y)
    if not count:
        raise ValueError("robust_accuracy: expected at least one sample, got none; a loader serves one pass only?")
    return right / count


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if any(training for _, training in modes):
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _direction(name: str, model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Sign of the gradient of the loss; parameters collect nothing."""
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(at), y.clone()), at)
    if not bool(gradient.isfinite().all()):
        raise ValueError(f"{name}: the gradient of the input must be finite, got NaN or infinity; is the model finite?")
    return gradient.sign()


def _inside(x: Tensor, low: Size | None, high: Size | None) -> Tensor:
    """The nearest point of the valid range."""
    if low is not None:
        x = torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device))
    if high is not None:
        x = torch.minimum(x, torch.as_tensor(high, dtype=x.dtype, device=x.device))
    return x


def _check(name: str, x: Tensor, eps: Size, low: Size | None, high: Size | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: x must be a floating tensor, got {kind}; attack embeddings, not tokens")
    if not bool((torch.as_tensor(eps) >= 0).all()):
        raise ValueError(f"{name}: eps must be >= 0, got {eps}")
    if not torch.equal(_inside(x.detach(), low, high), x):
        raise ValueError(
            f"{name}: x must lie within [low, high], expected {low} to {high}, got {float(x.min()):g} to "
            f"{float(x.max()):g}; give the range in the units of x (after normalisation)"
        )
