"""Gradients of cores and probes averaged over workers, during backward: one flat bucket for each dtype and device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tnlayers.layer import NetworkLayer
from tnlayers.window import followers

groups: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Layers that `tnlayers.distributed.prepare` has seen, and the process group whose workers hold them alike."""


class Reduction:
    """Averages the gradients of all cores and probes of a model over workers, at the end of every backward.

    A backward arms it in two ways: through a hook on the model's outputs, so that a worker takes part whose batch
    reaches no layer at all, and through hooks on the Parameters, which follow the probes that optimizers make later.
    Either queues one callback, which runs before `backward()` returns: what `.grad` shows then is the average of what
    has accumulated, and all workers see the same bits. A gradient that some workers lack counts as zero there; one that
    all lack stays None.

    Cost: one all-reduce of `bytes` a backward, where `bytes` are those of the Parameters that move, and one number more
    for each of them (whether it has a gradient).

    Args:
        model: its layers are found.
        group: process group.
        switch: called with whether gradients are synchronized, for the engine that reduces the other parameters.
        wanted: whether that engine would synchronize now.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=2))
        >>> [tuple(p.shape) for p in Reduction(layer, None).parameters()]
        [(6, 2), (2, 2), (8, 2)]
    """

    bytes = 0
    """Handed to the all-reduce by the last backward."""
    count = 0
    """Reductions so far."""

    def __init__(
        self,
        model: nn.Module | None,
        group: Any,
        switch: Callable[[bool], None] | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> None:
        modules = () if model is None else model.modules()
        self.layers = [module for module in modules if isinstance(module, NetworkLayer)]
        self.group, self.switch, self.wanted = group, switch, wanted
        self.buffers: Callable[[], Iterable[Tensor]] = tuple  # that every reduction takes from worker 0
        self._off, self._queued = False, False
        self._hooked = WeakTensorKeyDictionary()

    def __reduce__(self) -> Any:
        return Reduction, (None, None)  # a copy of the model is nobody's worker

    def install(self, model: nn.Module) -> None:
        """Hook the model's outputs and its layers' Parameters."""
        for layer in self.layers:
            groups[layer] = self.group
            followers[layer] = WeakMethod(self.follow)
            self.follow(layer)
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def follow(self, layer: nn.Module) -> None:
        """Hook the Parameters that a layer has now: a window brings probes, `assign=True` other cores."""
        owned = [*layer.cores, *layer.probes] if "probes" in layer._modules else layer.cores  # type: ignore[misc]
        for p in owned:  # type: ignore[union-attr]
            if p.requires_grad and p.is_leaf and p not in self._hooked:
                self._hooked[p] = p.register_post_accumulate_grad_hook(self._arm)

    def parameters(self) -> list[Tensor]:
        """What is reduced now, the same on all workers: the moving probes of layers with a window, cores of others."""
        found = {}
        for layer in self.layers:
            for p in layer.cores if layer._window is None else layer._active_probes():
                if p.requires_grad:
                    found[id(p)] = p
        return list(found.values())

    def _before(self, module: nn.Module, args: Any) -> None:
        if self.group is None or torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            self._queued = False  # a backward that failed never came to its end
        for layer in self.layers:
            self.follow(layer)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.group is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(self._arm)

    def _arm(self, _: Tensor) -> None:
        """Queue the reduction once a backward."""
        if self._queued or self._off or (self.wanted is not None and not self.wanted()):
            return
        if not torch.distributed.is_initialized():  # the workers have parted: what is left is an ordinary model
            return
        self._queued = True
        torch.autograd.Variable._execution_engine.queue_callback(self._at_end)

    def _at_end(self) -> None:
        self._queued = False
        self.reduce()

    @torch.no_grad()
    def reduce(self) -> None:
        """Average `.grad` of all `parameters()` over the workers; all of them must call it."""
        import torch.distributed as dist

        buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for p in self.parameters():
            buckets.setdefault((p.dtype, p.device), []).append(p)
        flats = [_flatten(members) / dist.get_world_size(self.group) for members in buckets.values()]
        for work in [dist.all_reduce(flat, group=self.group, async_op=True) for flat in flats]:
            work.wait()
        for members, flat in zip(buckets.values(), flats, strict=True):
            _unflatten(members, flat)
        self.bytes = sum(flat.numel() * flat.itemsize for flat in flats)
        self.count += 1
        broadcast(self.buffers(), self.group)

    def synchronize(self) -> None:
        """Take part in the reduction that the other workers' backward makes, for a worker that ran none.

        Raises:
            ValueError: other parameters are reduced by an engine that waits for a backward of this worker too.
        """
        if self.wanted is not None:
            raise ValueError(
                "Reduction.synchronize: DDP and FSDP wait for a backward of every worker, expected a model of tensor "
                "layers only, got one with other parameters; run an empty batch, model(x[:0]).sum().backward()"
            )
        self.reduce()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """No reduction of any parameter in here: gradients accumulate, and the next backward outside averages them."""
        before, self._off = self._off, True
        if self.switch is not None:
            self.switch(False)
        try:
            yield
        finally:
            self._off = before
            if self.switch is not None:
                self.switch(not before)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], group: Any) -> None:
    """Copy tensors from worker 0 to all.

    Args:
        tensors: of the same shapes on all workers.
        group: process group.
    """
    import torch.distributed as dist

    for tensor in tensors:
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, group_src=0, group=group)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)


def _flatten(members: Sequence[Tensor]) -> Tensor:
    """Gradients in one vector; behind them one number each, whether there is a gradient."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in members]
    held = torch.tensor([float(p.grad is not None) for p in members])
    return torch.cat([*(part.reshape(-1) for part in parts), held.to(parts[0])])


def _unflatten(members: Sequence[Tensor], flat: Tensor) -> None:
    """Write averages where at least one worker has a gradient."""
    *parts, held = flat.split([*(p.numel() for p in members), len(members)])
    for p, part, some in zip(members, parts, (held.abs() > 0).tolist(), strict=True):
        if some and p.grad is None:
            p.grad = part.reshape(p.shape).clone()
        elif some and p.grad is not None:
            p.grad.copy_(part.reshape(p.shape))
