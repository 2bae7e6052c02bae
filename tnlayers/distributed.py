"""Training on several workers: gradients of cores and probes reduced during backward, torch's engines for the rest.

The order: process group, model, `prepare(model)`, optimizer. Launch with `torchrun`.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.frozen import release
from tnlayers.layer import NetworkLayer
from tnlayers.rank_change import announce, resize_
from tnlayers.reduction import Reduction, broadcast, groups
from tnlayers.surgery import network_layers
from tnlayers.training_state import is_sharded
from tnlayers.training_state import load_state as load_state
from tnlayers.training_state import save_state as save_state


class Replica(nn.Module):
    """What `prepare` returns for a model of tensor layers only, in place of DDP, which has nothing to reduce there.

    Buffers (of norms without parameters) become those of worker 0 at the end of every reduced backward.

    Args:
        module: the model.
        reduction: of its gradients.

    Example:
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=2))
        >>> [name for name, _ in Replica(layer, Reduction(None, None)).named_parameters()][:2]
        ['module.bias', 'module.cores.0']
    """

    def __init__(self, module: nn.Module, reduction: Reduction) -> None:
        super().__init__()
        self.module, self.reduction = module, reduction

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients without reduction."""
        return self.reduction.no_sync()


def prepare(
    model: nn.Module,
    engine: str | None = "ddp",
    *,
    process_group: Any = None,
    blocks: Iterable[nn.Module] = (),
    **options: Any,
) -> Any:
    """Make a model ready to be trained on several workers, before its optimizer is made; every worker calls it.

    The tensor layers of worker 0, ranks included, are copied to all. From then on the gradients of cores and probes are
    averaged at the end of every backward (see `tnlayers.reduction.Reduction`), which leaves them as one process would
    have them that had seen all batches: clipping, loss scaling and optimizers of any kind need nothing special.
    `RankAdaptive` decides ranks and bases on worker 0: cores are the same bits everywhere.

    What is returned has the attribute `reduction` (`bytes` of the last backward; `synchronize()` for a worker that ran
    none) and `no_sync` for accumulation, see `tnlayers.distributed.no_sync`. A backward through the outputs by
    `torch.autograd.grad` is reduced too; all workers must make it, or use `no_sync`.

    Args:
        model: on its device; replaced layers or another model need another call.
        engine: who reduces the other parameters. "ddp": `DistributedDataParallel`, or a thin wrapper of the same
            surface (`.module`, `.no_sync`) where tensor layers are all there is; "fsdp": torch's `fully_shard`, in
            place, cores and probes whole on every worker; None: the caller, who wraps this very module himself (it is
            marked, so that DDP ignores the cores).
        process_group: of the workers; all by default.
        blocks: "fsdp": modules to shard one by one before the model.
        options: of the engine.

    Returns:
        The model to call: wrapped ("ddp"), or the model itself.

    Raises:
        ValueError: no process group; an unknown engine; an optimizer of ours was made before; prepared already; another
            model than that of worker 0; reduced precision by `mp_policy`, which would cast inputs but no cores.
        TypeError: not a module.

    Example:
        >>> import tempfile, torch, tnlayers
        >>> from decompositions import LowRank
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.distributed.init_process_group("gloo", f"file://{folder}/group", rank=0, world_size=1)
        ...     layer = tnlayers.Linear(8, 6, False, network=tnlayers.random_network(LowRank, rank=2))
        ...     model = prepare(layer)
        ...     model(torch.ones(3, 8)).sum().backward()
        ...     torch.distributed.destroy_process_group()
        >>> model.reduction.bytes == 4 * (2 * 6 + 2 * 2 + 2 * 8 + 3)
        True
    """
    layers = _check(model, engine, options)
    group = torch.distributed.group.WORLD if process_group is None else process_group
    _take_ranks(layers, group)
    held = {id(p) for layer in layers for p in layer.cores}
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in held]
    rest = [p for p in model.parameters() if id(p) not in held and p.requires_grad]
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    everything = engine == "fsdp" or (engine == "ddp" and not rest)
    for module in [model] if everything else layers:
        broadcast([*module.parameters(), *module.buffers()], group)

    reduction = Reduction(model, group)
    reduction.install(model)
    made: Any = model
    if engine == "ddp" and rest:
        made = torch.nn.parallel.DistributedDataParallel(model, process_group=process_group, **options)
        reduction.switch = partial(setattr, made, "require_backward_grad_sync")
        reduction.wanted = lambda: made.require_backward_grad_sync
    elif engine == "ddp":
        made = Replica(model, reduction)
        reduction.buffers = partial(_buffers, model) if options.get("broadcast_buffers", True) else tuple
    elif engine == "fsdp" and rest:
        from torch.distributed.fsdp import fully_shard

        for module in [*blocks, model]:
            fully_shard(module, ignored_params={p for layer in layers for p in layer.cores}, **options)
        reduction.switch = made.set_requires_gradient_sync
        reduction.wanted = lambda: True
    made.reduction = reduction
    return made


def _check(model: nn.Module, engine: str | None, options: dict[str, Any]) -> list[NetworkLayer]:
    """The layers of a model that can be prepared."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: expected a torch.nn.Module, got {type(model).__name__}")
    if engine not in ("ddp", "fsdp", None):
        raise ValueError(f"prepare: engine must be 'ddp', 'fsdp' or None, got {engine!r}")
    if engine is None and options:
        raise ValueError(f"prepare: without an engine there are no options, got {sorted(options)}")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError(
            "prepare: expected a process group, got none; call torch.distributed.init_process_group first, "
            "in a script launched with torchrun"
        )
    layers = [layer for _, layer in network_layers(model)]
    if any(layer._window is not None for layer in layers):
        raise ValueError(
            "prepare: expected a model without optimizer of ours, got one whose layers are in training already; "
            "prepare first, then make the optimizer"
        )
    if any(layer in groups for layer in layers):
        raise ValueError("prepare: expected a model that was not prepared before, got one that was; use what that gave")
    if getattr(options.get("mp_policy"), "param_dtype", None) is not None:
        raise ValueError(
            f"prepare: mp_policy.param_dtype must be None, got {options['mp_policy'].param_dtype}: inputs would be "
            "cast, cores would not; use torch.autocast in the loop"
        )
    return layers


def _take_ranks(layers: list[NetworkLayer], group: Any) -> None:
    """Give the cores the sizes that they have on worker 0; the numbers come afterwards.

    Raises:
        ValueError: on all workers, where any has other layers than worker 0.
    """
    import torch.distributed as dist

    described = [
        (type(layer).__name__, layer.weight_shape, str(layer._structure), str(layer.cores[0].dtype), layer._row_modes)
        for layer in layers
    ]
    box: list[Any] = [described, [[tuple(core.shape) for core in layer.cores] for layer in layers]]
    dist.broadcast_object_list(box, group_src=0, group=group)
    same = torch.tensor(float(described == box[0]), device=_device(layers))
    dist.all_reduce(same, dist.ReduceOp.MIN, group=group)
    if not same:
        got = "the same here but others elsewhere" if described == box[0] else f"{len(described)} that differ"
        raise ValueError(
            "prepare: all workers must have the same layers (only ranks may differ), expected the "
            f"{len(box[0])} of worker 0, got {got}"
        )
    for layer, shapes in zip(layers, box[1], strict=True):
        release(layer)
        if shapes != [tuple(core.shape) for core in layer.cores]:
            for core, shape in zip(layer.cores, shapes, strict=True):
                resize_(core, core.new_zeros(shape))
            layer._replan()
            announce(layer, list(layer.cores), resized=True)


def _device(layers: list[NetworkLayer]) -> torch.device:
    return layers[0].cores[0].device if layers else torch.get_default_device()


def _buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that change in training: tensor layers have none of these."""
    others = (module for module in model.modules() if not isinstance(module, NetworkLayer))
    return [buffer for module in others for buffer in module._buffers.values() if buffer is not None]


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients of a prepared model without any reduction, whatever its engine.

    Run forward and backward of all micro-batches but the last inside; the last backward, outside, averages what has
    accumulated.

    Raises:
        ValueError: a model that was not prepared.

    Example:
        >>> from torch import nn
        >>> no_sync(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        ValueError: no_sync: expected what tnlayers.distributed.prepare returned, got a Linear
    """
    found: Reduction | None = getattr(model, "reduction", None)
    if found is None:
        raise ValueError(f"no_sync: expected what tnlayers.distributed.prepare returned, got a {type(model).__name__}")
    return found.no_sync()


def param_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Parameters in one group for those held whole and one for those that FSDP shards: optimizers mix no two kinds.

    Example:
        >>> from torch import nn
        >>> [len(group["params"]) for group in param_groups(nn.Linear(2, 2))]
        [2]
    """
    whole = [p for p in model.parameters() if not is_sharded(p)]
    sharded = [p for p in model.parameters() if is_sharded(p)]
    return [{"params": kind} for kind in (whole, sharded) if kind]


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters of which FSDP shards a part.

    All gradients together are scaled to a norm of at most `max_norm`, the same on all workers; all must call it.

    Args:
        parameters: cores, probes and others, sharded or not.
        max_norm: largest norm.
        norm_type: p of the norm.

    Returns:
        The norm before.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([p], 1.0), p.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    moved = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in moved if is_sharded(p) == kind] for kind in (False, True)]
    norms = []
    for members in filter(None, kinds):
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in members if p.grad is not None], norm_type)
        norms.append(norm.full_tensor() if is_sharded(norm) else norm)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms] or [torch.zeros(())]), norm_type)
    for members in filter(None, kinds):
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return total
