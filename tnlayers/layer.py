"""The base of every layer whose weight is a network: cores as Parameters, structure as plain data, plans."""

import copy
from collections.abc import Callable
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decompositions import Network, as_operator, fill_random, numel, scale
from decompositions import norm as network_norm
from decompositions.formats.network import Labels, check_labels
from decompositions.formats.plan import HEAVY, Plan, Step, bucket, plan_dense, run
from decompositions.formats.workspace import Workspace
from decompositions.linalg import spectral_bound
from tnlayers.dense import NetworkFactory, Recipe, run_recipe
from tnlayers.frozen import release
from tnlayers.init import RandomNetwork
from tnlayers.rank_change import announce, remember_copy, resize_, watch
from tnlayers.window import Movable

probed: dict[tuple[Any, ...], Any] = {}
"""Plans that were measured to be the fastest, by layer kind, settings, shapes and machine."""


class Structure(NamedTuple):
    """What a network is besides its numbers."""

    format: type[Network]
    legs: tuple[Labels, ...]
    rows: Labels
    cols: Labels

    @classmethod
    def of(cls, net: Network) -> "Structure":
        """Read the structure off a network."""
        return cls(type(net), net.legs, net.rows, net.cols)


class Shapes(NamedTuple):
    """Shapes that a layer saw in one call, batch first."""

    input: tuple[int, ...]
    output: tuple[int, ...]


class NetworkLayer(Movable):
    """A layer whose weight is a network.

    Subclasses say what the weight's shape is and what to do with x. `state_dict` holds the cores (`cores.0`, ...) and
    the ordinary entries; `load_state_dict` adopts the ranks it finds.

    Example:
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 4, network=tnlayers.random_network(LowRank, rank=2))
        >>> isinstance(layer, tnlayers.NetworkLayer), list(layer.state_dict())
        (True, ['bias', 'cores.0', 'cores.1', 'cores.2'])
    """

    weight_shape: tuple[int, ...]
    bias: nn.Parameter | None
    _dense_steps: tuple[Step, ...]
    _memory = "keep"

    def _start(
        self,
        weight_shape: tuple[int, ...],
        network: Network | NetworkFactory | None,
        recipe: Recipe | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        std: float,
    ) -> None:
        """Make the first network from what the user gave, and register its cores."""
        name = type(self).__name__
        self.weight_shape, self._std = weight_shape, std
        self._plans: dict[Any, Any] = {}
        self._hint: int | None = None
        self._workspace = Workspace()
        self.bias = None  # a subclass gives itself one afterwards; plans look at the settings before
        asked = dtype, None if device is None else torch.device(device).type
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = torch.get_default_device() if device is None else torch.device(device)
        if (network is None) == (recipe is None):
            raise ValueError(
                f"{name}: expected exactly one of network= (a Network or a callable (shape, dtype, device) -> Network) "
                f"and recipe= (a callable dense weight -> Network), got network={network!r} and recipe={recipe!r}; "
                "for example network=tnlayers.random_network(LowRank, rank=8)"
            )
        if recipe is not None:
            dense = torch.randn(weight_shape, dtype=dtype, device=device) * std
            net = self._fit(run_recipe(name, recipe, dense))
            size = float(network_norm(net))
            wanted = std * sqrt(prod(weight_shape))  # truncation lost variance; the layer starts at the dense one's
            net = scale(net, wanted / size) if size > 0 else net
        else:
            if isinstance(network, RandomNetwork):
                network = network.or_std(std)
            if not isinstance(network, Network) and (isinstance(network, type) or not callable(network)):
                raise TypeError(
                    f"{name}: network must be a Network or a callable (shape, dtype, device) -> Network, got "
                    f"{network!r}; for example network=tnlayers.random_network(LowRank, rank=8)"
                )
            net = self._fit(network if isinstance(network, Network) else network(weight_shape, dtype, device))
            if asked[0] not in (None, net.dtype) or asked[1] not in (None, net.device.type):
                raise TypeError(
                    f"{name}: the network must have the dtype and device asked for, expected {dtype} on {device}, "
                    f"got {net.dtype} on {net.device}"
                )
        self.cores = nn.ParameterList([nn.Parameter(core.detach().contiguous().clone()) for core in net.cores])
        self._structure = Structure.of(net)
        self._row_modes, self._col_modes = net.row_modes, net.col_modes  # ranks may change, modes may not
        self.register_load_state_dict_pre_hook(_adopt_ranks)
        self.register_load_state_dict_post_hook(_watch_cores)  # assign=True makes new Parameters
        self.register_state_dict_post_hook(_current_cores)
        watch(self.cores)
        self._replan()

    def _fit(self, net: Network) -> Network:
        """Refuse a network that cannot be this layer's weight; a network without columns is split after axis 0."""
        name = type(self).__name__
        if not isinstance(net, Network):
            raise TypeError(f"{name}: network must be a decompositions.Network, got {type(net).__name__}")
        if not net.cols and net.order > 1:
            net = as_operator(net, 1)
        out, *rest = self.weight_shape
        have, need = (prod(net.row_modes), prod(net.col_modes)), (out, prod(rest))
        kernel = len(rest) > 1 and have[1] != need[1]
        if have[0] < need[0] or have[1] < need[1] or kernel:
            raise ValueError(
                f"{name}: the network must cover the weight, expected rows >= {need[0]} and columns "
                f"{'=' if len(rest) > 1 else '>='} {need[1]} (weight {self.weight_shape}), "
                f"got row modes {net.row_modes} and column modes {net.col_modes}"
            )
        return net

    @property
    def weight(self) -> Tensor:
        """The dense weight, of torch's shape, differentiable with respect to the cores."""
        raise TypeError("NetworkLayer.weight: expected a layer, got the base")

    @property
    def network(self) -> Network:
        """The current network; its cores are the layer's Parameters, but inside a window that has moved."""
        moved = self._window is not None and not self._window.still(self._active_probes())
        return self._with_cores(self._core_list() if moved else list(self.cores))

    def _with_cores(self, cores: list[Tensor]) -> Network:
        s = self._structure
        return s.format._unchecked(tuple(cores), s.legs, s.rows, s.cols)

    @property
    def _contracted(self) -> Network:
        """The network that forward contracts: in a window its cores are functions of the probes."""
        return self._with_cores(self._core_list())

    def set_network(self, network: Network) -> None:
        """Replace the weight, at any ranks: the one call that changes ranks.

        The Parameter objects stay (optimizers, ties and hooks keep them) and their gradients are dropped. Call it after
        `backward`: a graph built before can no longer be run backward (torch says so), but may stay alive. Optimizers
        lose the moments of the replaced cores, with a RankChangeWarning once; a live deep copy (an averaged model)
        keeps the old ranks and is pointed out once. Processes that share the cores' memory do not see the change.

        Args:
            network: same format, labels, modes, dtype and device as now; only ranks may differ.

        Raises:
            ValueError: anything but the ranks differs (make another layer with `from_dense` or `network=`), or a core
                is not finite.

        Example:
            >>> import torch, tnlayers
            >>> from decompositions import LowRank
            >>> from decompositions import round as cut
            >>> layer = tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=4))
            >>> layer.set_network(cut(layer.network, rank=2))
            >>> layer.network.ranks
            (2, 2)
        """
        name = type(self).__name__
        network = self._fit(network)
        first = self.cores[0]
        if len(network.cores) != len(self.cores):
            raise ValueError(f"{name}.set_network: expected {len(self.cores)} cores, got {len(network.cores)}")
        if network.dtype != first.dtype or network.device != first.device:
            raise ValueError(
                f"{name}.set_network: expected cores of {first.dtype} on {first.device}, got {network.dtype} on "
                f"{network.device}; convert with network.to(...) or the layer with layer.to(...)"
            )
        if Structure.of(network) != self._structure or network.shape != self._row_modes + self._col_modes:
            raise ValueError(
                f"{name}.set_network: only ranks may change, expected a network like {self.network!r} "
                f"({self.network.equation}), got {network!r} ({network.equation}); make another layer instead"
            )
        if not all(bool(torch.isfinite(core).all()) for core in network.cores if not core.is_meta):
            raise ValueError(f"{name}.set_network: cores must be finite, got NaN or infinity in {network!r}")
        release(self)
        resized = network.ranks != self.network.ranks
        self.close_window()
        for parameter, core in zip(self.cores, network.cores, strict=True):
            resize_(parameter, core)
        self._replan()
        announce(self, list(self.cores), resized=resized)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the cores anew at the present ranks; the dense weight gets the standard deviation of torch's layer.

        Everything else a layer owns (bias, padding vector) is reset too, so that a model made on the meta device and
        moved with `to_empty` holds no uninitialised memory afterwards.
        """
        release(self)
        self.close_window()
        first = self.cores[0]
        fresh = fill_random(
            self.network.detach(), std=self._std, generator=generator, dtype=first.dtype, device=first.device
        )
        with torch.no_grad():
            for parameter, core in zip(self.cores, fresh.cores, strict=True):
                parameter.copy_(core)
        self._reset_rest(generator)

    def _reset_rest(self, generator: torch.Generator | None = None) -> None:
        """Reset what is not a core: as torch, a bias from U(-b, b) with b = 1 / sqrt(fan_in)."""
        if self.bias is not None:
            bound = 1 / sqrt(prod(self.weight_shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def plan(self, batch: int | None = None, *, probe: bool = False, memory: str | None = None) -> Any:
        """Plan for `batch` rows and keep that plan as the stored one; with None return the stored plan.

        The stored plan is what compiled and exported programs use for every batch. It is made for 1024 rows, then for
        the first batch that an eager call brings. `print(layer.plan())` shows it, `tnlayers.explain(layer)` the others.

        Args:
            batch: rows of x (images, tokens) to plan for.
            probe: measure the plans predicted to be near the best, forward and backward, and take the fastest. Takes
                some forty calls; the choice serves every layer of equal shapes in this process.
            memory: what later eager calls hold for backward (`kept` of a plan). "keep", as at first: the results that
                backward needs, where a plan that holds more than the dense layer would (its weight, the cores and a
                quarter of x) must be faster by a quarter; "any": by the fastest plan; "recompute": nothing but the
                input and the cores, by the fastest plan and another forward pass.

        Raises:
            ValueError: a batch below 1, another word for memory, probe without a batch.

        Example:
            >>> import tnlayers
            >>> from decompositions import LowRank
            >>> layer = tnlayers.Linear(64, 64, network=tnlayers.random_network(LowRank, rank=4))
            >>> layer.plan(batch=16, memory="recompute").flops <= 2 * 16 * 4 * (64 + 4 + 64)
            True
        """
        name = type(self).__name__
        if memory not in (None, "keep", "any", "recompute"):
            raise ValueError(f"{name}.plan: memory must be 'keep', 'any' or 'recompute', got {memory!r}")
        if (batch is None and probe) or (batch is not None and batch < 1):
            raise ValueError(f"{name}.plan: batch must be at least 1 (and given for a probe), got {batch}")
        if memory is not None:
            self._memory = memory
        if batch is not None:
            self._hint = batch
            if probe:
                self._probe(bucket(batch))
        if batch is not None or memory is not None:
            pinned, self._pinned = self._pinned, False
            self._replan()
            self._pinned = pinned
        return self._stored

    def pin_plan(self) -> None:
        """Keep the stored plan from now on, whatever the ranks: its steps name labels, not sizes.

        What `tnlayers.compile` asks for, as another plan is another program; `plan(batch=)` still makes another one.
        """
        self._pinned = True
        self._hint = 1024 if self._hint is None else self._hint  # nor does the first eager call choose another

    def _probe(self, rows: int) -> None:
        """Measure the alternatives for `rows` and remember the fastest."""
        from tnlayers.explain import measure

        plan, _ = min(measure(self, rows), key=lambda pair: self.rank_plan(*pair))
        probed[self._probe_key(rows)] = plan

    def _probe_key(self, rows: int) -> tuple[Any, ...]:
        s, first = self._structure, self.cores[0]
        return (
            type(self),
            tuple(sorted((k, str(v)) for k, v in self.settings().items())),
            (s.legs, s.rows, s.cols),
            tuple(tuple(core.shape) for core in self.cores),
            (first.dtype, first.device, torch.get_num_threads()),
            (rows, *self._hint_sizes()),
            self._memory == "keep",
        )

    def _hint_sizes(self) -> tuple[int, ...]:
        """Sizes besides the batch that plans depend on."""
        return ()

    def alternatives(self, batch: int | None = None) -> tuple[Any, ...]:
        """All plans considered for `batch` rows, best predicted first."""
        raise TypeError("NetworkLayer.alternatives: expected a layer, got the base")

    def example_input(self, batch: int) -> Tensor:
        """A random input of `batch` rows (images, tokens), for measurements."""
        raise TypeError("NetworkLayer.example_input: expected a layer, got the base")

    def _replan(self) -> None:
        self._plans.clear()
        if not self._pinned:
            self._dense_steps = plan_dense(self.network).steps
            self._stored = self._make_plan(bucket(1024 if self._hint is None else self._hint))

    def _make_plan(self, rows: int, backward: bool = True) -> Any:
        """Fastest plan: a measured one, else as predicted for forward and backward, or for forward alone."""
        plan = probed.get(self._probe_key(rows)) if backward and probed else None
        if plan is not None:
            return plan
        plans = self.alternatives(rows)
        if not backward:
            return min(plans, key=lambda plan: plan.forward_seconds)
        return min(plans, key=self.rank_plan)

    def rank_plan(self, plan: Any, seconds: float | None = None) -> float:
        """What plans are compared by: predicted (or the given) seconds, more for a heavy plan where memory counts."""
        seconds = plan.seconds if seconds is None else seconds
        return seconds * (HEAVY if self._memory == "keep" and getattr(plan, "heavy", False) else 1.0)

    @property
    def _recompute(self) -> bool:
        """Whether backward runs the forward steps again."""
        return self._memory == "recompute"

    def _plan_for(self, rows: int) -> Plan:
        """Plan for a batch: the stored one while tracing, else the one of its power-of-two bucket."""
        if torch.compiler.is_compiling():
            return self._stored
        if self._forced is not None:
            return self._forced
        key = bucket(rows), torch.is_grad_enabled()
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan(*key)
            if self._hint is None and rows > 0:
                self._hint, self._stored = rows, plan
        return plan

    def _recomputed(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Call `run(x)`; under memory="recompute" nothing but x is kept for backward."""
        if self._recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(run, x, use_reentrant=False)
        return run(x)

    def _core_list(self) -> list[Tensor]:
        """The cores; past the list's own indexing, which costs as much as a small product."""
        if self._window is not None:
            return list(self._window.cores(self._active_probes()))
        cores = self.cores
        held: Any = cores._parameters
        return list(held.values()) if len(held) == len(cores) else list(cores)  # parametrized ones are elsewhere

    def _dense(self) -> Tensor:
        """Dense tensor in the network's own modes, by the plan made outside traced code."""
        if self._window is not None:
            dense = self._window.dense(self._active_probes())
            if dense is not None:
                return dense
        return run(self._dense_steps, self._core_list())

    def numel(self) -> int:
        """Parameters of the weight, as its format counts them."""
        return numel(self.network)

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Multiply-adds times two of the dense layer for one sample (one row or position where nothing was seen)."""
        raise TypeError("NetworkLayer.dense_flops: expected a layer class, got the base")

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        """The plan for one sample, and how many rows or positions that is more than `dense_flops` counts."""
        raise TypeError("NetworkLayer._sample_plan: expected a layer, got the base")

    def sample_flops(self, seen: Shapes | None) -> int:
        """Multiply-adds times two of this layer for one sample, as `dense_flops` counts."""
        plan, parts = self._sample_plan(seen)
        return int(plan.flops) // parts

    def plan_for_shapes(self, seen: Shapes) -> None:
        """Make the stored plan for a call with these shapes."""
        self.plan(batch=max(1, seen.input[0]))

    def output_bound(self, difference: Tensor) -> float:
        """Bound of `‖y - y'‖ / ‖x‖` for two weights that differ by `difference`: its spectral norm.

        Above 2,048 on the smaller side the Frobenius norm stands in, which is larger.
        """
        return spectral_bound(difference.flatten(1))

    def to_dense_module(self) -> nn.Module:
        """Return the `torch.nn` layer with the same function."""
        raise TypeError("NetworkLayer.to_dense_module: expected a layer, got the base")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NetworkLayer":
        result = super()._apply(fn, recurse)  # a move may change dtype or device, hence the plans
        if self._window is not None:
            with torch.no_grad():
                still = self._window.still(self._active_probes())
                self._window.move(fn)
                if still:
                    self._window.watch(self._active_probes())
        self._replan()
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}: the weight is computed from the cores and cannot be assigned; "
                "use set_network, or tensorize the dense model after tying its weights"
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self.cores)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NetworkLayer":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        if self._window is not None and new._window is not None and self._window.still(self._active_probes()):
            new._window.watch(new._active_probes())
        remember_copy(self, new)
        return new

    def settings(self) -> dict[str, Any]:
        """Constructor settings besides the network, as plain data: what a file must agree on."""
        raise TypeError("NetworkLayer.settings: expected a layer, got the base")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _repr_network(self) -> str:
        return f"{self.network!r}, {self.network.equation}"


def _current_cores(module: NetworkLayer, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state dict holds the weight as it is now: inside a window that has moved, at doubled ranks."""
    if module._window is not None and not module._window.still(module._active_probes()):
        with torch.no_grad():
            for k, core in enumerate(module._core_list()):
                state_dict[f"{prefix}cores.{k}"] = core.detach().contiguous()


def _watch_cores(module: NetworkLayer, incompatible: Any) -> None:
    watch(module.cores)


def _adopt_ranks(
    module: NetworkLayer,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Resize the cores to the ranks found in a state dict, so that loading works across ranks."""
    release(module)
    module.close_window()
    found = [state_dict.get(f"{prefix}cores.{k}") for k in range(len(module.cores))]
    if any(core is None for core in found):
        if f"{prefix}weight" in state_dict:
            error_msgs.append(
                f"{prefix}: expected cores, got a dense weight; load it into the dense model and tensorize, or use "
                f"{type(module).__name__}.from_dense"
            )
        return  # torch reports missing keys itself
    cores = [core for core in found if core is not None]
    if all(core.shape == own.shape for core, own in zip(cores, module.cores, strict=True)):
        return
    s = module._structure
    try:
        sizes = check_labels(s.format.__name__, [tuple(core.shape) for core in cores], s.legs, s.rows, s.cols)
        own = module.network.sizes
        for label in (*s.rows, *s.cols):
            if sizes[label] != own[label]:
                raise ValueError(f"{s.format.__name__}: mode {label!r} has size {own[label]}, got {sizes[label]}")
    except ValueError as error:
        error_msgs.append(f"{prefix}cores: {error}")
        return
    for parameter, core in zip(module.cores, cores, strict=True):
        if parameter.shape != core.shape:
            resize_(parameter, torch.empty(core.shape, dtype=parameter.dtype, device=parameter.device))
    module._replan()
