"""Around a recovery: what is refused, the modes and dtypes of both models meanwhile, and the file it resumes from."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.files import atomic_target
from tnlayers.freeze import thaw
from tnlayers.surgery import network_layers

KIND = "tnlayers recovery"
HALF = (torch.float16, torch.bfloat16)


def check_models(name: str, model: nn.Module, teacher: nn.Module) -> None:
    """Refuse models that cannot be recovered, before any work.

    Raises:
        TypeError: no modules.
        ValueError: nothing to train; parameters in common, which training would change in the teacher; on the meta
            device; in training by an optimizer of ranks.
    """
    for what, module in (("model", model), ("teacher", teacher)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: {what} must be a torch.nn.Module, got {type(module).__name__}")
        for key, p in module.named_parameters():
            if p.is_meta:
                raise ValueError(f"{name}: {key} of the {what} is on the meta device; load the numbers first")
    trained = {p.untyped_storage().data_ptr(): key for key, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"{name}: the model has no parameter that requires grad, expected one; requires_grad_(True)")
    for key, value in (*teacher.named_parameters(), *teacher.named_buffers()):
        own = trained.get(value.untyped_storage().data_ptr()) if value.numel() else None
        if own is not None:
            raise ValueError(
                f"{name}: the teacher must stay as it is, got {key} of the teacher in the memory of {own}, which is "
                "trained; compress a copy.deepcopy of the original"
            )
    for key, layer in network_layers(model):
        if layer._window is not None:
            raise ValueError(
                f"{name}: {key} is in training by an optimizer that finds ranks; give tnlayers.compact(model)"
            )


@contextmanager
def at_work(model: nn.Module, teacher: nn.Module) -> Iterator[None]:
    """Both models in evaluation mode (no dropout), caches of decoders off; the model's 16-bit tensors in float32.

    At exit modes and dtypes are as they were, gradients are gone, and so are merged weights of `freeze`.
    Grad mode is on, whatever the caller's.
    """
    thaw(model)
    modes = [(module, module.training) for each in (model, teacher) for module in each.modules()]
    configs: dict[int, Any] = {id(m.config): m.config for m, _ in modes if hasattr(m, "config")}
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(_restore_modes, modes)
        model.eval()
        teacher.eval()
        for config in configs.values():
            if getattr(config, "use_cache", False) is True:
                config.use_cache = False  # a cache would grow with every call of a block
                stack.callback(setattr, config, "use_cache", True)
        torch.backends.mha.set_fastpath_enabled(False)  # torch's fused encoder passes over the hooks of its layers
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.callback(_widened(model))
        yield


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _widened(model: nn.Module) -> Callable[[], None]:
    """Bring 16-bit tensors to float32; what undoes it."""
    narrow = {id(p): p.dtype for p in model.parameters() if p.dtype in HALF}
    held = [(m, key, b) for m in model.modules() for key, b in m._buffers.items()]
    buffers = [(m, key, b.dtype) for m, key, b in held if b is not None and b.dtype in HALF]
    if narrow or buffers:
        for p in model.parameters():
            p.grad = None
        model._apply(lambda t: t.float() if t.dtype in HALF else t)

    def undo() -> None:
        for p in model.parameters():
            p.grad = None
        if narrow:
            model._apply(lambda t: t.to(narrow.get(id(t), t.dtype)))
        for module, key, dtype in buffers:
            held = module._buffers[key]
            module._buffers[key] = None if held is None else held.to(dtype)

    return undo


def copied(module: nn.Module) -> dict[str, Any]:
    """State dict in memory of its own."""
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in module.state_dict().items()}


def is_finite(state: dict[str, Any]) -> bool:
    """Whether all floating tensors of a state dict are finite."""
    return all(bool(v.isfinite().all()) for v in state.values() if isinstance(v, Tensor) and v.is_floating_point())


class Clock:
    """Seconds of this call and of those that were interrupted."""

    def __init__(self, earlier: float = 0.0) -> None:
        self.earlier, self._start = earlier, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds until now."""
        return self.earlier + time.monotonic() - self._start


class Checkpoint:
    """The file that a recovery resumes from; with no path it is never written.

    Args:
        name: of the caller, for messages.
        path: of the file.
        config: the options that must agree, plain data.
        model: names and shapes must agree too.

    Raises:
        ValueError: the file is of something else; the message says what differs.
    """

    def __init__(
        self, name: str, path: str | os.PathLike[str] | None, config: dict[str, Any], model: nn.Module
    ) -> None:
        shapes = {k: list(v.shape) for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        self.path = path
        self.head: dict[str, Any] = {"kind": KIND, "task": name, "config": config, "model": shapes}
        self.found: dict[str, Any] | None = None
        if path is not None and os.path.exists(path):
            self.found = self._read(name, path)

    def _read(self, name: str, path: str | os.PathLike[str]) -> dict[str, Any]:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise almost any type on a damaged file
            line = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{name}: the checkpoint {os.fspath(path)} is damaged or of another kind ({line}); delete it"
            ) from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{name}: expected a checkpoint of a recovery, got {os.fspath(path)}; give another path")
        pairs = [("task", name, content["task"])]
        for part in ("config", "model"):
            own, other = self.head[part], content[part]
            pairs += [(key, own.get(key), other.get(key)) for key in sorted({*own, *other})]
        for key, own, other in pairs:
            if own != other:
                raise ValueError(
                    f"{name}: the checkpoint {os.fspath(path)} is of another run: {key} is {_said(own)} here, "
                    f"{_said(other)} there; delete it, or give another path"
                )
        return content

    def write(self, **content: Any) -> None:
        """Replace the file, whole or not at all."""
        if self.path is not None:
            with atomic_target(self.path) as temporary:
                torch.save({**self.head, **content}, temporary)


def _said(value: Any) -> str:
    return "absent" if value is None else repr(value)
