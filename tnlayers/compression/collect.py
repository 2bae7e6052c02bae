"""One pass over calibration data: hooks that watch, and cannot change what the model computes."""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decompositions import ActivationFactor
from decompositions.progress import Progress
from decompositions.weighted import CalibrationWarning
from tnlayers.calling import call
from tnlayers.compression.activations import features_of, input_rows, kind_of, output_rows, rows_in, uses
from tnlayers.compression.calibration import (
    MODES,
    ActivationScale,
    Calibration,
    GradientGram,
    LayerStatistics,
    Mode,
    Uses,
)
from tnlayers.surgery import Policy, Site, sites, stand_in_for, why_not

Preserve = Callable[[Any, Any], Tensor]
"""What the compression should preserve: (outputs of the model, batch) -> tensor."""

WIDE = 8192
"""Widths above which a layer keeps a diagonal in place of a factor (n^2 numbers)."""

ENTRIES = 1 << 22
"""Entries of the patches of a kernel that are laid out at once."""


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[Any] | str | None = None,
    mode: Mode = "factor",
    *,
    exclude: Sequence[Any] = (),
    gradients: bool | Preserve = False,
    outputs: bool = False,
    wide: int = WIDE,
    mask: str = "attention_mask",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 50,
    source: str = "",
    progress: Progress | None = None,
) -> Calibration:
    """Triangular factors of what every layer sees, in one pass: `X^H X = R^H R`, never a Gram matrix.

    The model runs in evaluation mode, not compiled, and is as it was afterwards. Memory: n^2 numbers a layer (see
    `ActivationFactor`), shared by layers that are handed the same tensor, whatever the number of tokens; and a copy of
    the input that was seen last.
    A layer whose weight is read without a call (`nn.MultiheadAttention.out_proj`) sees nothing: it has 0 tokens here,
    and `compress` warns of it. Where the axes before the features are those of no mask, every row counts, padding too.
    With `gradients`, factors of the gradients at the layers' outputs are kept too, so that errors can be measured where
    they matter: of `v . z` with z what is to be preserved and v standard normal, so that `E (g . dy)^2 = ‖dz‖^2`; where
    z are logits, of `log p(label)` with labels drawn from the model itself (Fisher: twice the Kullback-Leibler
    divergence); where z has no axes, of that number (a loss).

    Args:
        model: called as `model(batch)`, `model(*batch)` for a tuple or list, `model(**batch)` for a dict.
        batches: of what the model takes; with a checkpoint the same ones in every run.
        targets: name patterns or module types; all layers that can be replaced by default.
        mode: of the inputs: "factor", "diagonal" (squares and magnitudes) or "none".
        exclude: name patterns or module types to leave out.
        gradients: True, or a function (outputs, batch) -> z; True takes `logits`, `last_hidden_state` or the first
            tensor of the outputs.
        outputs: keep factors of the layers' outputs.
        wide: inputs and gradients of more features are kept as a diagonal (the logits of a language model).
        mask: key of a batch (a dict) that says which tokens count, (batch, tokens) of 0 and 1; decoders have "decoder_"
            before it. "" counts every token.
        seed: of v and of the labels, each batch for itself.
        dtype: of the factors.
        checkpoint: file that is written every `every` batches and from which a killed collection goes on.
        every: see above.
        source: what the data are, in your words; a checkpoint of another source is refused.
        progress: called as (done, total, text); total is 0 where `batches` has no length.

    Returns:
        Calibration; `save` it once, and every later size needs no further pass.

    Raises:
        ValueError: no batch; NaN or infinity in what a layer sees (named) or in z; a pattern that matches nothing; a
            batch that is no tensor, sequence or dict; a mask of another kind; a lazy layer without numbers; a
            checkpoint of other layers, another mode or other statistics.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> held = tnlayers.collect(model, [torch.randn(10, 3)], gradients=True)
        >>> held.layers["2"].inputs.factor.shape, held.layers["2"].gradients.factor.shape
        (torch.Size([4, 4]), torch.Size([2, 2]))
    """
    if mode not in MODES:
        raise ValueError(f"collect: mode must be one of {MODES}, got {mode!r}")
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(
            f"collect: batches must be an iterable of batches, got one {type(batches).__name__}; put it in a list"
        )
    lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(f"collect: all weights must be initialised, got a lazy {lazy[0]}; run one forward pass first")
    wanted = targets_of("collect", model, targets, exclude)
    held = Calibration(mode, {site.name: LayerStatistics(kind_of(site.module)) for site in wanted}, source=source)
    if checkpoint is not None and Path(checkpoint).exists():
        found = Calibration.load(checkpoint)
        if found.mode != mode or found.layers.keys() != held.layers.keys():
            raise ValueError(
                f"collect: the checkpoint must be of the same layers and mode, expected {mode!r} and "
                f"{len(held.layers)} layers, got {found.mode!r} and {len(found.layers)} in {str(checkpoint)!r}; remove "
                "it, or give another name"
            )
        if found.source != source:
            raise ValueError(
                f"collect: the checkpoint must be of the same data, expected {source!r}, got {found.source!r} in "
                f"{str(checkpoint)!r}; remove it, or give another name"
            )
        seen = [layer for layer in found.layers.values() if layer.kind and layer.tokens]
        for what, asked in (("gradients", bool(gradients)), ("outputs", outputs)):
            if seen and asked != any(getattr(layer, what) is not None for layer in seen):
                raise ValueError(
                    f"collect: the checkpoint must hold the same statistics, got one {'without' if asked else 'with'} "
                    f"{what} in {str(checkpoint)!r}; remove it, or give another name"
                )
        held = found
    total = len(batches) if isinstance(batches, Sized) else 0
    skipped, written = held.batches, held.batches
    backward = bool(gradients)
    watched = _watched(wanted, held, mode, backward, outputs, wide, dtype)
    with torch.inference_mode(False), watched as watch, _evaluating(model, backward, wanted), _eager():
        for number, batch in enumerate(batches):
            if number < skipped:
                continue
            watch.masks = _masks(batch, mask)
            generator = torch.Generator().manual_seed(seed + number)
            with torch.set_grad_enabled(backward):
                if not isinstance(batch, Mapping | tuple | list | Tensor):
                    raise ValueError(
                        f"collect: a batch must be a tensor, a sequence or a dict, got {type(batch).__name__}"
                    )
                made = call(model, batch)
                watch.flush()
                if backward:
                    z = gradients(made, batch) if callable(gradients) else _preserved(made)
                    value, power = _probe(z, callable(gradients), made, watch.masks, generator)
                    watch.backward(value)
                    held.power += power
            held.batches = number + 1
            if progress is not None:
                progress(held.batches, total, "calibration")
            if checkpoint is not None and held.batches - written >= every:
                held.save(checkpoint)
                written = held.batches
    if held.batches == 0:
        raise ValueError("collect: batches must hold at least one batch, got none")
    if checkpoint is not None and written != held.batches:
        held.save(checkpoint)
    if not any(layer.tokens for layer in held.layers.values()):
        warnings.warn(
            "collect: no layer saw a token that counts: empty batches, masks of zeros, or a model that does not call "
            "its layers; compress would go by plain errors",
            CalibrationWarning,
            stacklevel=2,
        )
    return held


def targets_of(name: str, model: nn.Module, targets: Sequence[Any] | str | None, exclude: Sequence[Any]) -> list[Site]:
    """Layers that the patterns name and that can be replaced; quantized ones that are named are refused.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [site.name for site in targets_of("collect", model, "2", ())]
        ['2']
    """
    quantized = [site.name for site in sites(model) if _is_quantized(site.module)]
    keys = ("*",) if targets is None else (targets,) if isinstance(targets, str | type) else tuple(targets)
    rules = Policy.read(name, dict.fromkeys(keys, len), exclude)
    named = [n for n in quantized if targets is None or any(r == n for r in keys)]
    if named:
        raise ValueError(
            f"{name}: layers must have floating weights, got quantized ones: {', '.join(named[:5])}; dequantize the "
            "model first (transformers: model.dequantize()), or exclude them"
        )
    found = [site for site in sites(model) if stand_in_for(site.module) is not None]
    rules.check(name, found, targets is not None)
    chosen = [s for s in found if rules.recipe_for(s) and not rules.excludes(s)]
    wanted = [s for s in chosen if not why_not(s.module)]
    if not wanted:
        reason = "".join(f" ({s.name or 'the model itself'}: {why_not(s.module)})" for s in chosen[:1])
        raise ValueError(f"{name}: the model must have a layer that can be replaced, got none{reason}; look at targets")
    return wanted


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module stands for a matrix that it keeps in another form than floating numbers."""
    if not hasattr(module, "in_features"):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return not (weight.is_floating_point() or weight.is_complex())
    return hasattr(module, "qweight") or callable(weight)


@contextmanager
def _eager() -> Iterator[None]:
    """Without compiled code and attention's fused kernels, which know no hooks."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _evaluating(model: nn.Module, gradients: bool, wanted: Sequence[Site]) -> Iterator[None]:
    """Evaluation mode; with gradients, the weights of the layers (and no others) ask for one."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    grads = [parameter.grad for parameter, _ in asked]
    try:
        model.eval()
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        if gradients:
            for site in wanted:
                site.module.weight.requires_grad_(True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for (parameter, required), grad in zip(asked, grads, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = grad


def _masks(batch: Any, key: str) -> dict[str, Tensor]:
    """Masks of a batch by name: which tokens count.

    Raises:
        ValueError: a mask that does not say so (of pairs of tokens, or added to scores).
    """
    if not isinstance(batch, Mapping):
        return {}
    found = {name: batch[name] for name in (key, f"decoder_{key}") if isinstance(batch.get(name), Tensor)}
    for name, value in found.items():
        if value.ndim != 2 or not bool(((value == 0) | (value == 1)).all()):
            raise ValueError(
                f"collect: {name} must be (batch, tokens) of zeros and ones, got shape {tuple(value.shape)}, values "
                f"{[round(float(v), 4) for v in value.unique()[:3]]}; name the key of such a mask, or give mask='' to "
                "count every token"
            )
    return {name: value.bool() for name, value in found.items()}


def _preserved(made: Any) -> Tensor:
    """Logits, hidden state or first floating tensor of a model's outputs."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(made, name, None), Tensor):
            return getattr(made, name)
    pieces = made.values() if isinstance(made, Mapping) else made if isinstance(made, tuple | list) else (made,)
    for piece in pieces:
        if isinstance(piece, Tensor) and piece.is_floating_point():
            return piece
    raise ValueError(
        "collect: gradients=True looks for a floating tensor in the outputs, got none; give a function "
        "(outputs, batch) -> tensor"
    )


def _probe(
    z: Tensor, chosen: bool, made: Any, masks: Mapping[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, float]:
    """A number whose gradient says how z reacts, and the size of z to which its square is relative."""
    if not isinstance(z, Tensor) or not z.requires_grad:
        raise ValueError("collect: what is to be preserved must depend on the layers, got a tensor that does not")
    if not bool(torch.isfinite(z).all()):
        raise ValueError("collect: what is to be preserved must be finite, got NaN or infinity in the outputs")
    if z.ndim == 0:
        return z, 1.0
    weights = torch.ones(z.shape[:-1], device=z.device)
    if not chosen:
        fitting = [m for m in masks.values() if m.shape == z.shape[: m.ndim] and z.ndim == m.ndim + 1]
        if fitting:
            weights = fitting[-1].to(z.device, torch.float32)
    if not chosen and z is getattr(made, "logits", None) and z.shape[-1] > 1:
        log_p = torch.log_softmax(z.float(), -1)
        flat = log_p.detach().exp().reshape(-1, z.shape[-1])
        labels = torch.multinomial(flat.cpu(), 1, generator=generator).to(z.device).view(*z.shape[:-1], 1)
        return (log_p.gather(-1, labels).squeeze(-1) * weights).sum(), float(weights.sum())
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    weighted = z.float() * weights.unsqueeze(-1)
    return (weighted * noise).sum(), float(weighted.detach().double().square().sum())


class _Pending:
    """Inputs that were handed to one or more layers in a row and are not yet counted."""

    def __init__(self, leader: str, x: Tensor, mask: Tensor | None) -> None:
        # the values are copied: the model may overwrite them before they are counted; the tensor itself is held so that
        # its memory cannot become another one's
        self.leader, self.x, self.values, self.mask = leader, x, x.clone(), mask
        self.version, self.seen = _version(x), {leader}

    def is_same(self, x: Tensor) -> bool:
        """Whether a tensor is this very one, unchanged."""
        mine = self.x
        return (
            x.data_ptr() == mine.data_ptr()
            and x.shape == mine.shape
            and x.stride() == mine.stride()
            and x.dtype == mine.dtype
            and _version(x) == self.version
        )


def _version(x: Tensor) -> int | None:
    """Counter of what was written; a tensor of inference mode has none."""
    return None if x.is_inference() else x._version


class _Watch:
    """The hooks' state: adds what layers see to a calibration."""

    def __init__(self, wanted: Sequence[Site], held: Calibration, mode: Mode, wide: int, dtype: torch.dtype) -> None:
        self.held, self.mode, self.wide, self.dtype = held, mode, wide, dtype
        self.modules: dict[str, Any] = {site.name: site.module for site in wanted}
        self.masks: Mapping[str, Tensor] = {}
        self.replayed = False
        """Whether the layers are called again by the backward pass (gradient checkpoints), which does not count."""
        self._pending: _Pending | None = None

    def see_input(self, name: str, x: Tensor) -> None:
        """Count a layer's input, once for all layers that are handed it in a row."""
        if self.replayed:
            return
        layer, module = self.held.layers[name], self.modules[name]
        mask = self._mask(name, x.shape[: x.ndim - 1] if layer.kind == "matrix" else x.shape)
        if layer.kind == "table":
            picked = x if mask is None else x[mask.to(x.device)]
            layer.inputs = layer.inputs or Uses(len(module.weight))
            try:
                layer.inputs.add(uses(module, picked))
            except ValueError as error:
                raise ValueError(f"collect: {name}: {error}") from None
            layer.tokens = layer.inputs.count
            return
        if layer.kind == "" or self.mode == "none":
            layer.tokens += rows_in(module, x) if mask is None or layer.kind != "matrix" else int(mask.sum())
            return
        if self._pending is not None and self._pending.is_same(x):
            leader = self.held.layers[self._pending.leader]
            together = layer.inputs is leader.inputs or (layer.tokens == leader.tokens == 0 and layer.inputs is None)
            together = together and features_of(module)[0] == features_of(self.modules[self._pending.leader])[0]
            if together and layer.kind == leader.kind == "matrix" and name not in self._pending.seen:
                self._pending.seen.add(name)
                layer.inputs = leader.inputs
                return
        self.flush()
        if layer.inputs is None:
            features = features_of(module)[0]
            layer.inputs = self._statistic(features, x, self.mode == "factor")
        self._pending = _Pending(name, x.detach(), mask)

    def flush(self) -> None:
        """Count what is pending; layers that shared its factor before and did not see it now get one of their own."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        layer, module = self.held.layers[pending.leader], self.modules[pending.leader]
        for name, other in self.held.layers.items():
            if other.inputs is layer.inputs and name not in pending.seen:
                other.inputs = copy.deepcopy(layer.inputs)
        before = layer.inputs.count
        try:
            if layer.kind == "kernel":
                sides = len(module.kernel_size)
                x = pending.values if pending.values.ndim == sides + 2 else pending.values.unsqueeze(0)
                positions = rows_in(module, x) // max(1, len(x))
                each = max(1, ENTRIES // max(1, positions * features_of(module)[0]))
                for part in x.split(each):
                    layer.inputs.update(input_rows(module, part))
            else:
                layer.inputs.update(input_rows(module, pending.values), pending.mask)
        except ValueError as error:
            raise ValueError(f"collect: {', '.join(sorted(pending.seen))}: {error}") from None
        for name in pending.seen:
            self.held.layers[name].tokens += layer.inputs.count - before

    def see_output(self, name: str, y: Tensor, what: str) -> None:
        """Count a layer's outputs, or the gradients there."""
        layer, module = self.held.layers[name], self.modules[name]
        if layer.kind == "":
            return
        rows = output_rows(module, y)
        factor = getattr(layer, what)
        if factor is None:
            width = features_of(module)[1]
            factor = self._statistic(width, y, True)
            if what == "gradients" and width <= self.wide:
                factor = GradientGram(width, dtype=self.dtype, device=y.device)
            setattr(layer, what, factor)
        try:
            factor.update(rows, None if layer.kind == "kernel" else self._mask(name, rows.shape[:-1]))
        except ValueError as error:
            raise ValueError(f"collect: {what} of {name}: {error}") from None

    def _statistic(self, features: int, like: Tensor, whole: bool) -> ActivationFactor | ActivationScale:
        if whole and features <= self.wide:
            return ActivationFactor(features, dtype=self.dtype, device=like.device)
        return ActivationScale(features)

    def backward(self, value: Tensor) -> None:
        """Run the backward pass, whose hooks see the gradients; no `.grad` is touched."""
        weights = [module.weight for module in self.modules.values()]
        self.replayed = True
        try:
            torch.autograd.grad(value, weights, allow_unused=True)
        finally:
            self.replayed = False

    def _mask(self, name: str, shape: torch.Size) -> Tensor | None:
        """Which of the tokens of this shape count; None: all."""
        order = sorted(self.masks, key=lambda key: ("decoder" in name) != key.startswith("decoder_"))
        for key in order:
            mask = self.masks[key]
            if shape == mask.shape:
                return mask
            if len(shape) == 1 and shape[0] == mask.numel():
                return mask.reshape(-1)
        return None


@contextmanager
def _watched(
    wanted: Sequence[Site], held: Calibration, mode: Mode, gradients: bool, outputs: bool, wide: int, dtype: torch.dtype
) -> Iterator[_Watch]:
    """Hooks on the layers that are wanted, removed at the end."""
    watch = _Watch(wanted, held, mode, wide, dtype)
    handles = []

    def before(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            watch.see_input(name, x)

    def after(name: str, y: Any) -> None:
        if isinstance(y, Tensor):
            if outputs and not watch.replayed:
                watch.see_output(name, y, "outputs")
            if gradients and y.requires_grad:
                y.register_hook(lambda g: watch.see_output(name, g, "gradients"))

    for site in wanted:
        name = site.name
        handles.append(
            site.module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            )
        )
        handles.append(site.module.register_forward_hook(lambda module, args, y, name=name: after(name, y)))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
