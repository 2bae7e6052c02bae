"""The networks of a model in training: which there are, and the model without what training adds."""

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.gauge import cut_by
from tnlayers.layer import NetworkLayer

M = TypeVar("M", bound=nn.Module)


def trees(model: nn.Module) -> dict[int, tuple[list[str], list[NetworkLayer]]]:
    """Layers by the network they share: names and layers, in the order of the model."""
    found: dict[int, tuple[list[str], list[NetworkLayer]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, NetworkLayer) or not all(core.requires_grad for core in module.cores):
            continue
        if len({id(core) for core in module.cores}) < len(module.cores):
            continue  # one Parameter at two places: they cannot move apart, as points of the manifold may
        if module._window is not None and id(module.cores[0]) not in found:  # of another optimizer: its weight as it is
            with torch.no_grad():
                net = cut_by(module._contracted.detach(), _not_zero)[0]
            module.set_network(net)
        module.close_window()
        net = module.network
        if not net.is_tree or not net.bonds:
            continue
        names, layers = found.setdefault(id(module.cores[0]), ([], []))
        names.append(name)
        layers.append(module)
    return found


def _not_zero(bond: str, squares: Tensor, norm: float) -> int:
    """All but what rounding leaves of zeros."""
    return int((squares > (10 * torch.finfo(torch.float32).eps * norm) ** 2).sum())


def sizes_of(sizes: Mapping[str, int]) -> Callable[[str, Tensor, float], int]:
    """What `cut_by` asks, for given sizes."""
    return lambda bond, squares, norm: sizes[bond]


def centers(net: Network) -> list[int]:
    """Cores that move in turn: not those that are a matrix between two bonds, which their neighbours contain."""
    outside = set(net.outside)
    wanted = [k for k, leg in enumerate(net.legs) if outside & set(leg) or len(leg) > 2]
    return wanted or [0]


def compact(model: M) -> M:
    """A copy of a model in training with every network rounded to the ranks that its optimizer reports.

    What to evaluate, save and ship: without the directions in reserve, and without probes. A model that is not in
    training is copied as it is.

    Example:
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=2))
        >>> _ = tnlayers.RankAdaptive(layer, lr=0.01, tol=0.1)
        >>> layer.network.ranks != tnlayers.compact(layer).network.ranks
        True
    """
    made = copy.deepcopy(model)
    done: dict[int, Network] = {}
    for module in made.modules():
        if isinstance(module, NetworkLayer) and module._window is not None:
            window, key = module._window, id(module.cores[0])
            if key not in done:
                with torch.no_grad():
                    net = module.network.detach()
                done[key] = cut_by(net, sizes_of(window.ranks))[0]
            module.close_window()
            module.set_network(done[key])
    return made
