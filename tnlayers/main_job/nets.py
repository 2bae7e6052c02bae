"""The networks of the main job: dense, with ranks chosen for conversion, and with tensor layers from the start."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from decompositions import TTMatrix, Tucker, svd, tucker2, unfold
from tnlayers.conv import Conv2d
from tnlayers.dense import Recipe
from tnlayers.init import RandomNetwork, random_network
from tnlayers.linear import Linear

NETS = ("mlp", "cnn")
HIDDEN = 512
START_RANK = 2
START_SIZE = 0.1
"""Start of the rank-adaptive layers, of torch's standard deviation: a full one would be what the tolerance measures."""
SMALLEST_SIDE = 8
LENET_SIDE = 20
"""Images of at least this side get the 5 x 5 kernels of LeNet, smaller ones 3 x 3."""
MINOR = 0.05
"""Layers with a smaller share of the parameters stay dense: nothing is gained there."""

Shape = tuple[int, int, int]
Dense = nn.Linear | nn.Conv2d


def dense_net(net: str, shape: Shape, classes: int) -> nn.Sequential:
    """Network of `torch.nn` layers for images of a shape.

    `mlp` has two hidden layers of 512. `cnn` is LeNet-5 as Caffe ships it (20 and 50 channels of 5 x 5, 500 hidden
    units: 431,080 parameters on MNIST); on images smaller than 20 pixels it has 32 and 64 channels of 3 x 3 and 256
    hidden units; on images above 44 pixels a mean over a 5 x 5 grid keeps the linear layer small.

    Args:
        net: "mlp" or "cnn".
        shape: (channels, height, width) of an image.
        classes: width of the output.

    Raises:
        ValueError: another name, or images smaller than 8 pixels for the cnn.

    Example:
        >>> sum(p.numel() for p in dense_net("cnn", (1, 28, 28), 10).parameters())
        431080
    """
    if net not in NETS:
        raise ValueError(f"dense_net: expected one of {NETS}, got {net!r}")
    if net == "mlp":
        return _mlp(shape, classes)
    if min(shape[1:]) < SMALLEST_SIDE:
        raise ValueError(f"dense_net: the cnn needs images of at least 8 x 8, got {shape[1]} x {shape[2]}; use the mlp")
    return _lenet(shape, classes) if min(shape[1:]) >= LENET_SIDE else _small_cnn(shape, classes)


def _mlp(shape: Shape, classes: int) -> nn.Sequential:
    return _sequence(
        flatten=nn.Flatten(),
        fc1=nn.Linear(prod(shape), HIDDEN),
        relu1=nn.ReLU(),
        fc2=nn.Linear(HIDDEN, HIDDEN),
        relu2=nn.ReLU(),
        fc3=nn.Linear(HIDDEN, classes),
    )


def _lenet(shape: Shape, classes: int) -> nn.Sequential:
    sides = [((side - 4) // 2 - 4) // 2 for side in shape[1:]]
    grid = [side if side <= 8 else 5 for side in sides]
    return _sequence(
        conv1=nn.Conv2d(shape[0], 20, 5),
        pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(20, 50, 5),
        pool2=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
        grid=nn.Identity() if grid == sides else nn.AdaptiveAvgPool2d(tuple(grid)),
        flatten=nn.Flatten(),
        fc1=nn.Linear(50 * prod(grid), 500),
        relu3=nn.ReLU(),
        fc2=nn.Linear(500, classes),
    )


def _small_cnn(shape: Shape, classes: int) -> nn.Sequential:
    return _sequence(
        conv1=nn.Conv2d(shape[0], 32, 3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 3, padding=1),
        relu2=nn.ReLU(),
        grid=nn.AdaptiveAvgPool2d(4),
        flatten=nn.Flatten(),
        fc1=nn.Linear(64 * 16, 256),
        relu3=nn.ReLU(),
        fc2=nn.Linear(256, classes),
    )


def _sequence(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def parameter_count(model: nn.Module) -> int:
    """Numbers the model stores and trains; of a network every core counts in full.

    Example:
        >>> parameter_count(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in model.parameters())


def major_layers(model: nn.Module) -> dict[str, Dense]:
    """Linear and convolution layers whose weight holds at least 5 % of the model's parameters, by name.

    Example:
        >>> list(major_layers(dense_net("cnn", (1, 28, 28), 10)))
        ['conv2', 'fc1']
    """
    least = MINOR * parameter_count(model)
    kinds = (nn.Linear, nn.Conv2d)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.weight.numel() >= least
    }


# -- tensor layers from the start ------------------------------------------------------------------------------------


def scratch_net(net: str, shape: Shape, classes: int, share: float) -> nn.Sequential:
    """Return `dense_net` with fresh tensor layers, at most `share` of its parameters.

    The rule: the layers of `major_layers` are replaced. A convolution becomes a Tucker network with half of its
    channels as ranks; every linear layer a TT-matrix of one common rank, the largest that fits. If even rank 1 does
    not fit, the channel ranks are halved again.

    Args:
        net: "mlp" or "cnn".
        shape: (channels, height, width) of an image.
        classes: width of the output.
        share: parameters allowed, as a part of the dense network's.

    Raises:
        ValueError: the layers that stay dense already exceed the share.

    Example:
        >>> model = scratch_net("cnn", (1, 28, 28), 10, share=0.08)
        >>> parameter_count(model) <= 0.08 * 431080
        True
    """
    model = dense_net(net, shape, classes)
    for name, factory in scratch_networks(model, share).items():
        setattr(model, name, _fresh(getattr(model, name), factory))
    return model


def scratch_networks(model: nn.Module, share: float) -> dict[str, RandomNetwork]:
    """Factory of a fresh network for every major layer of a dense model, by the rule of `scratch_net`."""
    major = major_layers(model)
    budget = share * parameter_count(model) - _kept(model, major)
    for halvings in range(1, 8):
        fits = [made for rank in range(1, 257) if _numel(made := _networks(major, rank, halvings), major) <= budget]
        if fits:
            return fits[-1]
    raise _too_small("scratch_net", share, model, major)


def adaptive_net(net: str, shape: Shape, classes: int, share: float) -> tuple[nn.Sequential, int]:
    """Return the network of `scratch_net` at small ranks and small weights, and what its ranks may grow to.

    Args:
        net: "mlp" or "cnn".
        shape: (channels, height, width) of an image.
        classes: width of the output.
        share: parameters allowed, as a part of the dense network's.

    Returns:
        The network, and the parameters that its tensor layers may hold together.

    Raises:
        ValueError: the layers that stay dense leave too little for rank 1.

    Example:
        >>> model, budget = adaptive_net("cnn", (1, 28, 28), 10, share=0.08)
        >>> model.fc1.network.ranks, budget
        ((2,), 28406)
    """
    model = dense_net(net, shape, classes)
    major = major_layers(model)
    budget = int(share * parameter_count(model) - _kept(model, major))
    if budget < _numel(_small(major, 1), major):
        raise _too_small("adaptive_net", share, model, major)
    for name, factory in _small(major, START_RANK).items():
        setattr(model, name, _fresh(major[name], factory))
    return model, budget


def _small(major: dict[str, Dense], rank: int) -> dict[str, RandomNetwork]:
    """Factories of the formats of `scratch_net` at one rank for every bond."""
    return {
        name: random_network(Tucker, rank=rank, modes=(0, 1), gain=START_SIZE)
        if isinstance(module, nn.Conv2d)
        else random_network(TTMatrix, rank=rank, order=2, gain=START_SIZE)
        for name, module in major.items()
    }


def _networks(major: dict[str, Dense], rank: int, halvings: int) -> dict[str, RandomNetwork]:
    made = {}
    for name, module in major.items():
        out, width = module.weight.shape[:2]
        if isinstance(module, nn.Conv2d):
            ranks = (max(1, out >> halvings), max(1, width >> halvings))
            made[name] = random_network(Tucker, rank=ranks, modes=(0, 1))
        else:
            made[name] = random_network(TTMatrix, rank=rank, order=2)
    return made


def _numel(networks: dict[str, RandomNetwork], major: dict[str, Dense]) -> int:
    meta = torch.device("meta")
    return sum(
        core.numel()
        for name, factory in networks.items()
        for core in factory(tuple(major[name].weight.shape), torch.float32, meta).cores
    )


def _fresh(dense: Dense, factory: RandomNetwork) -> nn.Module:
    if isinstance(dense, nn.Linear):
        return Linear(dense.in_features, dense.out_features, network=factory)
    size, padding = dense.kernel_size, dense.padding
    return Conv2d(dense.in_channels, dense.out_channels, size, padding=padding, network=factory)


def _kept(model: nn.Module, major: dict[str, Dense]) -> int:
    """Parameters that stay as they are: minor layers and all biases."""
    return parameter_count(model) - sum(module.weight.numel() for module in major.values())


def _too_small(function: str, share: float, model: nn.Module, major: dict[str, Dense]) -> ValueError:
    total = parameter_count(model)
    return ValueError(
        f"{function}: no ranks fit, expected at most {share:.1%} of {total:,} parameters, but {_kept(model, major):,} "
        f"stay dense; raise the share"
    )


# -- conversion of a trained network ---------------------------------------------------------------------------------


@dataclass
class _Bonds:
    """One layer on its way from rank 1 upwards: `LowRank` (one bond) or Tucker-2 (two)."""

    weight: Tensor
    ranks: list[int]
    squares: list[Tensor]

    @classmethod
    def of(cls, weight: Tensor) -> _Bonds:
        axes = (0,) if weight.ndim == 2 else (0, 1)
        values = [torch.linalg.svdvals(unfold(weight.detach().double(), axis)) for axis in axes]
        return cls(weight, [1] * len(axes), [v.square() / v.square().sum().clamp_min(1e-300) for v in values])

    def count(self, ranks: list[int]) -> int:
        out, width, *kernel = self.weight.shape
        if len(ranks) == 1:
            return ranks[0] * (out + width + ranks[0])
        return ranks[0] * out + ranks[1] * width + ranks[0] * ranks[1] * prod(kernel)

    def grown(self, bond: int) -> list[int]:
        return [rank + (k == bond) for k, rank in enumerate(self.ranks)]

    def recipe(self) -> Recipe:
        return partial(svd, rank=self.ranks[0]) if len(self.ranks) == 1 else partial(tucker2, rank=tuple(self.ranks))


def choose_recipes(model: nn.Module, share: float) -> dict[str, Recipe]:
    """Recipes for `tensorize` that bring a trained model to at most `share` of its parameters.

    The rule: the layers of `major_layers` are converted, linear ones by SVD, convolutions to Tucker-2. All ranks start
    at 1; then, as long as it fits, the rank grows by one where that removes most of the relative squared error of its
    weight for each parameter it costs. A network never gets as large as the weight it stands for.

    Args:
        model: dense and trained.
        share: parameters allowed, as a part of the model's.

    Raises:
        ValueError: even rank 1 exceeds the share.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> recipes = choose_recipes(dense_net("mlp", (1, 8, 8), 10), share=0.1)
        >>> sorted(recipes), recipes["fc1"].keywords["rank"] > 1
        (['fc1', 'fc2'], True)
    """
    major = major_layers(model)
    layers = {name: _Bonds.of(module.weight) for name, module in major.items()}
    left = share * parameter_count(model) - _kept(model, major) - sum(b.count(b.ranks) for b in layers.values())
    if left < 0:
        raise _too_small("choose_recipes", share, model, major)
    while steps := [step for bonds in layers.values() for step in _steps(bonds, left)]:
        _, cost, bonds, ranks = max(steps, key=lambda step: step[0])
        bonds.ranks, left = ranks, left - cost
    return {name: bonds.recipe() for name, bonds in layers.items()}


def _steps(bonds: _Bonds, left: float) -> list[tuple[float, int, _Bonds, list[int]]]:
    """Ways to grow one layer that fit: (relative squared error removed for a parameter, cost, layer, ranks)."""
    found = []
    for k, squares in enumerate(bonds.squares):
        rank, ranks = bonds.ranks[k], bonds.grown(k)
        cost = bonds.count(ranks) - bonds.count(bonds.ranks)
        gains = bonds.count(ranks) < bonds.weight.numel()
        if rank < len(squares) and cost <= left and gains:
            found.append((float(squares[rank]) / cost, cost, bonds, ranks))
    return found
