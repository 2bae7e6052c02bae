"""Perplexity of a causal language model, exact to rounding, with the conditions it depends on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decompositions.progress import Progress
from tnlayers.calling import device_of, evaluating, logits_of
from tnlayers.texts import Bos, Windows, check_tokens, max_positions, token_windows, window_words

DEFAULT_WINDOW = 2048
TOKENS_A_CALL = 4096
CHUNK = 2**24
"""Logits that are widened and normalized at a time."""
PROBE = 8
"""Tokens of the test whether a model sees what it should predict."""


@dataclass(frozen=True)
class Perplexity:
    """`value = exp(nll / tokens)`, with everything that it depends on.

    Args:
        value: perplexity a token.
        nll: negative log-likelihood of the scored tokens, total, in nats.
        tokens: tokens scored, each once.
        windows: number of windows.
        window: tokens the model saw at once.
        stride: tokens between the beginnings of two windows.
        bos: "none", "start" or "window" (see `token_windows`).

    Example:
        >>> print(Perplexity(2.0, 10 * math.log(2), 10, 1, window=16, stride=16, bos="none"))
        perplexity 2 (nll 6.93147 over 10 tokens; 1 windows; window 16, stride 16, no BOS)
    """

    value: float
    nll: float
    tokens: int
    windows: int
    window: int
    stride: int
    bos: str

    @property
    def conditions(self) -> str:
        """Window, stride and BOS in words."""
        return window_words(self.window, self.stride, self.bos)

    def __str__(self) -> str:
        return (
            f"perplexity {self.value:.5g} (nll {self.nll:.6g} over {self.tokens} tokens; {self.windows} windows; "
            f"{self.conditions})"
        )


def perplexity(
    model: nn.Module,
    texts: str | Sequence[str] | Tensor | Sequence[int] | Windows,
    tokenizer: Any = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
    bos_id: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a causal language model: exp of the mean negative log-likelihood of the scored tokens.

    `log P = sum over scored t of log softmax(logits at t - 1)[token t]`, each token scored once; the mean is over
    tokens, not over windows. Log-softmax in float32 (float64 for float64 logits), sums in float64. The value does not
    depend on the batch size beyond rounding: only windows of one length share a call, and nothing is padded.
    Cost: one forward pass of `window` tokens for every `stride` tokens, and one of 8 tokens that tests causality.

    Args:
        model: `model(ids (batch, length))` returns logits (batch, length, vocabulary): a tensor, a tuple that begins
            with it, or an output with `.logits`.
        texts: a text, texts, token ids, or `Windows` already made (then the next options are not used).
        tokenizer: for texts.
        window: None: 2048, or the model's maximum where that is smaller.
        stride: None: windows that do not overlap.
        bos: see `token_windows`.
        bos_id: None: the tokenizer's BOS, else the one of the model's configuration.
        batch_size: windows a call; None: as many as make 4096 tokens.
        progress: called as (windows done, windows, "perplexity").

    Raises:
        ValueError: a window longer than the model's positions, ids beyond its vocabulary, a model that sees the token
            it should predict, logits that give no finite likelihood (by window number).

    Example:
        >>> class Uniform(nn.Module):
        ...     def forward(self, ids):
        ...         return torch.zeros(*ids.shape, 8)
        >>> found = perplexity(Uniform(), [1, 2, 3, 4, 5], window=4)
        >>> round(found.value, 4), found.tokens
        (8.0, 3)
    """
    longest = max_positions(model)
    if isinstance(texts, Windows):
        windows = texts
    else:
        size = min(DEFAULT_WINDOW, longest or DEFAULT_WINDOW) if window is None else window
        if bos_id is None and getattr(tokenizer, "bos_token_id", None) is None:
            bos_id = getattr(getattr(model, "config", None), "bos_token_id", None)
        windows = token_windows(texts, tokenizer, window=size, stride=stride, bos=bos, bos_id=bos_id)
    if longest is not None and windows.window > longest:
        raise ValueError(
            f"perplexity: expected window <= {longest} (positions of {type(model).__name__}), got {windows.window}; "
            f"use window={longest}"
        )
    if batch_size is None:
        batch_size = max(1, TOKENS_A_CALL // windows.window)
    if batch_size < 1:
        raise ValueError(f"perplexity: expected batch_size >= 1, got {batch_size}")
    used = windows.ids if windows.bos_id is None else torch.cat([windows.ids, windows.ids.new_tensor([windows.bos_id])])
    check_tokens(model, used, caller="perplexity")
    device, nll, done = device_of(model), 0.0, 0
    with evaluating(model):
        _check_causal(model, windows[0][0].to(device))
        for group in _same_length(windows, batch_size):
            ids = torch.stack([row for row, _ in group]).to(device)
            logits = logits_of(_forward(model, ids))
            if logits.shape[:-1] != ids.shape:
                raise ValueError(
                    f"perplexity: expected logits {(*ids.shape, 'vocabulary')}, got {tuple(logits.shape)}; "
                    "is this a causal language model?"
                )
            ids = ids.to(logits.device)  # the last layer may lie elsewhere than the first
            losses = torch.stack([_nll(logits[k], ids[k], n) for k, (_, n) in enumerate(group)]).tolist()
            for k, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise ValueError(f"perplexity: the logits of window {done + k} must be finite, got NaN or infinity")
            nll, done = nll + math.fsum(losses), done + len(group)
            if progress is not None:
                progress(done, len(windows), "perplexity")
    mean = nll / windows.scored
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, nll, windows.scored, len(windows), windows.window, windows.stride, windows.bos)


def _forward(model: nn.Module, ids: Tensor) -> Any:
    """Call without the key-value cache that generation would want."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        return model(ids, use_cache=False)
    return model(ids)


def _same_length(windows: Windows, batch_size: int) -> Iterator[list[tuple[Tensor, int]]]:
    """Neighbouring windows of one length, at most batch_size together."""
    group: list[tuple[Tensor, int]] = []
    for row in windows:
        if group and (len(group) == batch_size or len(row[0]) != len(group[0][0])):
            yield group
            group = []
        group.append(row)
    yield group


def _nll(logits: Tensor, ids: Tensor, scored: int) -> Tensor:
    """Negative log-likelihood of the last `scored` of ids (length,) under logits (length, vocabulary), float64."""
    first, rows = len(ids) - scored, max(1, CHUNK // logits.shape[-1])
    total = logits.new_zeros((), dtype=torch.float64)
    for begin in range(first, len(ids), rows):
        end = min(begin + rows, len(ids))
        part = logits[begin - 1 : end - 1]
        part = part if part.dtype == torch.float64 else part.float()
        total += F.cross_entropy(part, ids[begin:end], reduction="none").double().sum()
    return total


def _check_causal(model: nn.Module, ids: Tensor) -> None:
    """Another last token must not change the logits before it: a masked model would be scored on what it can see."""
    short = ids[:PROBE]
    others = ids[ids != short[-1]]
    if len(short) < 2 or not len(others):
        return
    changed = torch.cat([short[:-1], others[:1]])
    logits = logits_of(_forward(model, torch.stack([short, changed])))
    if logits.ndim != 3 or logits.shape[1] != len(short):
        return  # refused by its shape later on
    one, two = logits[:, :-1].float()
    parameter = next(model.parameters(), logits)
    tolerance = max(1e-3, 8 * torch.finfo(parameter.dtype).eps if parameter.is_floating_point() else 0)
    if float((one - two).abs().max()) > tolerance * float(one.abs().max()):  # False for NaN, which has its own message
        raise ValueError(
            f"perplexity: {type(model).__name__} sees the token it should predict (a later token changes earlier "
            "logits), so it is no causal language model; use metric similarity or accuracy"
        )
