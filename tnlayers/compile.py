"""`torch.compile` with bonds as dynamic dimensions: a change of ranks is no reason to compile again."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from tnlayers.layer import NetworkLayer
from tnlayers.surgery import network_layers, sites


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """Compile a model as `torch.compile` does, so that ranks may change without another compilation.

    torch specialises a program on the shapes of parameters. Here, and for this model only, the bond axes of all cores
    are dynamic and bonds of equal size are not taken for the same one. The layers keep their present plans, whatever
    their ranks become: `layer.plan(batch=)` (or `tensorize(example_input=)`) before this call chooses for what batch.

    Guarantee: rank changes compile nothing, except to and from rank 1, which torch always specialises on, and where a
    frozen layer is thawed or the other way round. Values and gradients are those of the eager model. In training by
    `RankAdaptive` or the Riemannian optimizers a program contracts the affine weight of the window, from the probes
    (W_open + xi, doubled ranks): twice or three times compiled, whatever the ranks do after; windows of one core
    (`window="center"`) have a program a core.

    Args:
        model: any module; modules that are no network layers are compiled as torch does.
        options: passed on to `torch.compile` (backend, fullgraph, mode, dynamic, ...).

    Returns:
        The compiled module, which shares the model's parameters; deep copies and pickles of it behave as it does.

    Raises:
        TypeError: not a module.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> from decompositions import round as cut
        >>> layer = tnlayers.Linear(16, 16, network=tnlayers.random_network(LowRank, rank=6))
        >>> compiled = tnlayers.compile(layer, backend="eager")
        >>> layer.set_network(cut(layer.network.detach(), rank=3))
        >>> torch.allclose(compiled(torch.ones(2, 16)), layer(torch.ones(2, 16)), atol=1e-6)
        True
    """
    sites(model)  # refuses by name what is no model
    for _, layer in network_layers(model):
        layer.pin_plan()
        _mark_bonds(layer)
        if layer._window is not None:
            layer._window.lay_out()
    compiled: Any = torch.compile(model, **options)
    if compiled is not model:  # it is under disable=True
        # entered and left around each call by the very wrapper that torch.compile returns, as for its own `dynamic=`
        compiled.dynamo_ctx.enter_exit_hooks.append(_dynamic_bonds)
    return compiled


def _mark_bonds(layer: NetworkLayer) -> None:
    """Let dynamo take the bond axes as dynamic from the first compilation on, not only after they have changed."""
    outside = set(layer.network.outside)
    for core, leg in zip(layer.cores, layer.network.legs, strict=True):
        for axis, label in enumerate(leg):
            if label not in outside and core.shape[axis] > 1:
                torch._dynamo.maybe_mark_dynamic(core, axis)


def _dynamic_bonds() -> Callable[[], None]:
    """Set what the compilation of a changing model needs; return what sets it back."""
    undo = [change() for change in _changes()]

    def leave() -> None:
        for revert in undo:
            revert()

    return leave


@cache
def _changes() -> tuple[Callable[[], Callable[[], None]], ...]:
    """Setters that return their reverters; made at first use, as torch's compiler takes seconds to import."""
    import torch.fx.experimental._config

    tracing: Any = torch._dynamo.config
    symbolic: Any = torch.fx.experimental._config
    return (
        tracing._make_closure_patcher(force_parameter_static_shapes=False),
        symbolic._make_closure_patcher(use_duck_shape=False),
    )
