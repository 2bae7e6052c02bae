"""Walk a model, match a policy, replace modules: what conversion, compression and adapters share."""

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnlayers.contraction_layers import FlatLinear, TensorRegression
from tnlayers.conv import Conv1d, Conv2d, Conv3d
from tnlayers.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from tnlayers.embedding import Embedding
from tnlayers.embedding_bag import EmbeddingBag
from tnlayers.layer import NetworkLayer
from tnlayers.linear import Linear

T = TypeVar("T")

STAND_INS: dict[type[nn.Module], type[NetworkLayer]] = {
    nn.Linear: Linear,
    FlatLinear: TensorRegression,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.Embedding: Embedding,
    nn.EmbeddingBag: EmbeddingBag,
}
"""Which layer stands in for which module; another module type is one more row."""

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Site(NamedTuple):
    """One module of a model: all the names it is reachable by, the first one first."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


def sites(model: nn.Module) -> list[Site]:
    """Every module of the model once, with all its names (a shared module has several)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"sites: expected a torch.nn.Module, got {type(model).__name__}")
    found: dict[int, tuple[list[str], nn.Module]] = {}
    try:
        for name, module in model.named_modules(remove_duplicate=False):
            found.setdefault(id(module), ([], module))[0].append(name)
    except RecursionError:
        raise ValueError(f"sites: a {type(model).__name__} must not contain itself as a submodule") from None
    return [Site(tuple(names), module) for names, module in found.values()]


def stand_in_for(module: nn.Module) -> type[NetworkLayer] | None:
    """Layer class that can replace a module, None if there is none.

    A subclass counts only while it keeps torch's `forward` (and `_conv_forward`): another forward is another function.
    """
    for dense, layer in STAND_INS.items():
        own = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
        if isinstance(module, dense) and own == [getattr(dense, name, None) for name in ("forward", "_conv_forward")]:
            return layer
    hugging_face = sys.modules.get("transformers.pytorch_utils")
    if hugging_face is not None and type(module) is getattr(hugging_face, "Conv1D", None):
        return Linear
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as (in, out), as Hugging Face's `Conv1D` does."""
    return stand_in_for(module) is Linear and not isinstance(module, nn.Linear)


def why_not(module: nn.Module) -> str:
    """Say why a module of a convertible type cannot be replaced; empty if it can."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize); remove_parametrizations first"
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet (lazy module); run one forward pass first"
    if not isinstance(weight, Tensor):
        return "it has no weight tensor (quantized?); dequantize it first"
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed (weight_norm, pruning or similar); make it permanent first"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight is {weight.dtype}; dequantize it first"
    if weight.is_meta:
        return "its weight is on the meta device; load the numbers first"
    if weight.numel() == 0:
        return f"its weight is empty, shape {tuple(weight.shape)}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance (by another library?), which would be lost"
    for what in HOOKS:
        if getattr(module, what, None):
            return f"it carries hooks ({what.strip('_')}), which would be lost; remove them first"
    bias = getattr(module, "bias", None)
    if weight._backward_hooks or (bias is not None and bias._backward_hooks):
        return "its parameters carry hooks, which would be lost; remove them first"
    if bias is not None and bias.dtype != weight.dtype:
        return f"its bias is {bias.dtype} and its weight {weight.dtype}; a tensor layer has one dtype"
    extra = [
        name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in ("weight", "bias")
    ]
    if extra:
        return f"it has tensors of its own besides weight and bias: {', '.join(extra)}"
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option, None):
            return f"{option}={getattr(module, option)} acts on single rows, which share their parameters in a network"
    return ""


def replace(model: nn.Module, site: Site, new: nn.Module) -> None:
    """Put `new` in place of a module under all its names (hooks are the caller's business).

    Raises:
        ValueError: the site is the model itself, which has no parent to hold another module.
    """
    if "" in site.names:
        raise ValueError(
            f"replace: the model itself is the {type(site.module).__name__} to replace, expected a module inside it; "
            f"use {type(new).__name__}.from_dense, or wrap the model in nn.Sequential"
        )
    for name in site.names:
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, new)


class Policy(NamedTuple):
    """Rules in order: (pattern or type, value); the first that matches a module wins."""

    rules: tuple[tuple[Any, Any], ...]
    exclude: tuple[Any, ...]

    @classmethod
    def read(cls, name: str, policy: Mapping[Any, T] | Callable[..., T], exclude: Sequence[Any]) -> "Policy":
        """Normalize what the user gave: a mapping, or one value for every module."""
        if isinstance(exclude, (str, type)):
            exclude = (exclude,)
        if isinstance(policy, Mapping):
            rules: tuple[tuple[Any, Any], ...] = tuple(policy.items())
        elif callable(policy):
            rules = (("*", policy),)
        else:
            raise TypeError(
                f"{name}: policy must be a recipe or a mapping from name patterns or module types to recipes, "
                f"got {type(policy).__name__}"
            )
        for key, recipe in rules:
            if not callable(recipe):
                raise TypeError(
                    f"{name}: a recipe must be callable (dense weight -> Network), got {recipe!r} for {key!r}"
                )
        for key in (*(key for key, _ in rules), *exclude):
            if not (isinstance(key, str) or (isinstance(key, type) and issubclass(key, nn.Module))):
                raise TypeError(f"{name}: keys must be name patterns or nn.Module types, got {key!r}")
        return cls(rules, tuple(exclude))

    def check(self, name: str, candidates: Sequence[Site], policy_given: bool) -> None:
        """Refuse a pattern that matches no layer: a typing error must not convert less in silence."""
        names = [n for site in candidates for n in site.names if n]
        keys = (*(key for key, _ in self.rules), *self.exclude) if policy_given else self.exclude
        for key in keys:
            if any(_matches(key, site) for site in candidates):
                continue
            hint = ""
            if isinstance(key, str):
                inside = any(n.startswith(f"{key}.") for n in names)
                near = [f"{key}.*"] if inside else difflib.get_close_matches(key, names, n=3, cutoff=0.4)
                hint = f"; perhaps {', '.join(map(repr, near))}" if near else ""
            shown = key if isinstance(key, str) else key.__name__
            raise ValueError(
                f"{name}: every pattern must match a layer that can be replaced, got {shown!r}, which matches none "
                f"of {len(candidates)}{hint}"
            )

    def recipe_for(self, site: Site) -> Any | None:
        """Value of the first rule that matches, None if none does."""
        return next((value for key, value in self.rules if _matches(key, site)), None)

    def excludes(self, site: Site) -> bool:
        """Whether the site is excluded."""
        return any(_matches(key, site) for key in self.exclude)


def _matches(key: Any, site: Site) -> bool:
    if isinstance(key, str):
        return any(fnmatchcase(name, key) for name in site.names)
    return isinstance(site.module, key)


def owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each Parameter object (by id) is held, all of them."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def network_layers(model: nn.Module) -> Iterator[tuple[str, NetworkLayer]]:
    """Every network layer once, with its first name."""
    for name, module in model.named_modules():
        if isinstance(module, NetworkLayer):
            yield name, module


def tie_cores(first: NetworkLayer, other: NetworkLayer) -> None:
    """Let two layers of one weight share their core Parameters."""
    for k in range(len(first.cores)):
        other.cores[k] = first.cores[k]


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module take over another's forward and backward hooks (the very dictionaries: handles stay valid)."""
    for name in HOOKS[:4]:
        for attribute in (name, f"{name}_with_kwargs", f"{name}_always_called"):
            if hasattr(old, attribute) and hasattr(new, attribute):
                setattr(new, attribute, getattr(old, attribute))


def weight_key(layer: NetworkLayer) -> tuple[object, ...]:
    """What two layers of one weight have in common: the very cores, and the shape they stand for."""
    return (*(id(core) for core in layer.cores), layer.weight_shape)
