"""Networks and arms of the rank-adaptive benchmark: rank-adaptive training, DLRT, and what users did before."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, ranks_under, svd, ttm_svd, tucker2
from decompositions import round as cut
from tnlayers.main_job.data import Dataset
from tnlayers.main_job.training import learning_rate

BATCH = 128
SETTLE = 0.6
SMALL = 0.1
"""Start of the networks, of torch's standard deviation: a full one would be what the tolerance measures."""


# --- networks: every dense layer is made by `linear` or `conv`, so that one function serves all arms ---


def lenet(linear: Callable[[int, int], nn.Module], conv: Callable[[int, int, int], nn.Module]) -> nn.Sequential:
    """20-50-500-10, 430,500 weights; the first convolution (500) and the last layer (5,000) stay dense."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), conv(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def mlp(linear: Callable[[int, int], nn.Module], conv: Any) -> nn.Sequential:
    """784-500-500-500-500-10; the last layer stays dense."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (784, 500, 500, 500):
        layers += [linear(width, 500), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(500, 10))


def vgg6(linear: Any, conv: Callable[[int, int, int], nn.Module]) -> nn.Sequential:
    """Five 3 x 3 convolutions 32-64-128-256-256 with batch norm, three pools and a mean, one linear layer."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    for n, m, pool in ((32, 64, True), (64, 128, False), (128, 256, True), (256, 256, False)):
        layers += [conv(n, m, 3), nn.BatchNorm2d(m), nn.ReLU()] + ([nn.MaxPool2d(2)] if pool else [])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(1024, 10))


NETS = {"lenet": lenet, "mlp": mlp, "vgg6": vgg6}
PADDED = {"lenet": 0, "mlp": 0, "vgg6": 1}
MODES = {(800, 500): ((5, 10, 10), (8, 10, 10)), (784, 500): ((5, 10, 10), (7, 14, 8)), (500, 500): ((5, 10, 10),) * 2}


def dense(net: str) -> nn.Sequential:
    return NETS[net](nn.Linear, lambda n, m, k: nn.Conv2d(n, m, k, padding=PADDED[net]))


def tensor_net(net: str, format: str, rank: int) -> nn.Sequential:
    """Linear layers as `low_rank` or `ttm`, convolutions as Tucker-2, from small random networks."""

    def linear(width: int, out: int) -> nn.Module:
        std = SMALL / math.sqrt(3 * width)
        rows, cols = MODES[width, out]
        factory = (
            tnlayers.random_network(LowRank, rank=min(rank, out), std=std)
            if format == "low_rank"
            else tnlayers.random_network(TTMatrix, rank=rank, std=std, row_modes=rows, col_modes=cols)
        )
        return tnlayers.Linear(width, out, network=factory)

    def conv(width: int, out: int, side: int) -> nn.Module:
        std = SMALL / math.sqrt(3 * width * side**2)
        ranks = (min(rank, out), min(rank, width))
        factory = tnlayers.random_network(Tucker, rank=ranks, modes=(0, 1), std=std)
        return tnlayers.Conv2d(width, out, side, padding=PADDED[net], network=factory)

    return NETS[net](linear, conv)


def networks(model: nn.Module) -> list[tnlayers.NetworkLayer]:
    return [module for module in model.modules() if isinstance(module, tnlayers.NetworkLayer)]


def parameters(model: nn.Module) -> int:
    """Numbers stored, each network as its format counts (LowRank merged)."""
    inside = {id(p) for layer in networks(model) for p in layer.cores}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return rest + sum(layer.numel() for layer in networks(model))


def tolerance_of(model: nn.Module, share: float, whole: int) -> int:
    """Parameters that the networks may hold, so that the whole model keeps `share` of the dense one."""
    return int(share * whole) - (parameters(model) - sum(layer.numel() for layer in networks(model)))


# --- arms: each takes data, a share of the parameters and a learning rate, and returns the trained model ---


class Loop:
    """Epochs of one schedule over one data set."""

    def __init__(self, data: Dataset, epochs: int, seed: int) -> None:
        self.data, self.epochs = data, epochs
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = epochs * math.ceil(len(data.train_x) / BATCH)
        self.flip = data.shape[0] == 3

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr: float,
        begin: float = 0,
        end: float = 1,
        *,
        several: bool = False,
    ) -> None:
        """The part of the schedule from `begin` to `end` of the steps; `several`: the optimizer calls backward."""
        model.train()
        first, last, step = round(begin * self.steps), round(end * self.steps), 0
        for _ in range(self.epochs):
            order = torch.randperm(len(self.data.train_x), generator=self.generator)
            for rows in order.split(BATCH):
                step += 1
                if not first < step <= last:
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step - 1, self.steps, lr)
                x = self.data.train_x[rows]
                if self.flip:
                    mirrored = torch.rand(len(x), 1, 1, 1, generator=self.generator) < 0.5
                    x = torch.where(mirrored, x.flip(-1), x)

                def closure(x: torch.Tensor = x, rows: torch.Tensor = rows) -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), self.data.train_y[rows])
                    loss.backward()
                    return loss

                if several:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)


def train_dense(net: str, loop: Loop, lr: float, **_: Any) -> nn.Module:
    model = dense(net)
    loop.run(model, adamw(model, lr), lr)
    return model


def train_adaptive(
    net: str, loop: Loop, lr: float, *, share: float, whole: int, format: str, start: int = 2, every: int = 1
) -> nn.Module:
    model = tensor_net(net, format, start)
    optimizer = tnlayers.RankAdaptive(
        model,
        lr,
        tol=0.1,
        reserve=2,
        every=every,
        budget=tolerance_of(model, share, whole),
        settle=round(SETTLE * loop.steps),
        weight_decay=0.01,
    )
    loop.run(model, optimizer, lr)
    return tnlayers.compact(model)


def train_dlrt(net: str, loop: Loop, lr: float, *, tol: float, whole: int) -> nn.Module:
    """DLRT: the rank-adaptive augmented BUG on matrices, Euler steps without momentum, plain SGD for the rest."""
    model = tensor_net(net, "low_rank", 64)
    for layer in networks(model):
        layer.reset_parameters()
    inner = partial(torch.optim.SGD, lr=lr)
    loop.run(model, tnlayers.RankAdaptive(model, lr, method="augmented", tol=tol, inner=inner), lr, several=True)
    return tnlayers.compact(model)


def uniform_rank(net: str, format: str, share: float, whole: int) -> int:
    rank = 1
    while parameters(tensor_net(net, format, rank + 1)) <= share * whole:
        rank += 1
    return rank


def train_fixed(net: str, loop: Loop, lr: float, *, share: float, whole: int, format: str) -> nn.Module:
    """The largest uniform rank that fits, AdamW on the factors, torch's standard deviation."""
    model = tensor_net(net, format, uniform_rank(net, format, share, whole))
    for layer in networks(model):
        layer.reset_parameters()
    loop.run(model, adamw(model, lr), lr)
    return model


def cut_to_share(model: nn.Module, share: float, whole: int) -> None:
    """Round every network so that all together keep the share, with the least sum of relative squared errors."""
    layers = networks(model)
    nets = [layer.network.detach() for layer in layers]
    ranks, _ = ranks_under(nets, tolerance_of(model, share, whole))
    for layer, net, own in zip(layers, nets, ranks, strict=True):
        layer.set_network(cut(net, rank=own))


def train_pruned(net: str, loop: Loop, lr: float, *, share: float, whole: int, format: str) -> nn.Module:
    """High ranks by AdamW for the first part, then the least singular values are cut, then the rest of the schedule."""
    model = tensor_net(net, format, 32)
    for layer in networks(model):
        layer.reset_parameters()
    loop.run(model, adamw(model, lr), lr, 0, SETTLE)
    cut_to_share(model, share, whole)
    loop.run(model, adamw(model, lr), lr, SETTLE, 1)
    return model


def train_svd(net: str, loop: Loop, lr: float, *, share: float, whole: int, format: str) -> nn.Module:
    """The dense network for the first part, then decomposed and cut to the share, then the rest of the schedule."""
    start = dense(net)
    loop.run(start, adamw(start, lr), lr, 0, SETTLE)
    model = tensor_net(net, format, 1)
    for a, b in zip(start, model, strict=True):
        if isinstance(b, tnlayers.Conv2d):
            b_new = tnlayers.Conv2d.from_dense(a, partial(tucker2, tol=1e-3))
        elif isinstance(b, tnlayers.Linear):
            rows, cols = MODES[b.in_features, b.out_features]
            recipe = (
                partial(svd, tol=1e-3)
                if format == "low_rank"
                else partial(ttm_svd, tol=1e-3, row_modes=rows, col_modes=cols)
            )
            b_new = tnlayers.Linear.from_dense(a, recipe)
        else:
            b.load_state_dict(a.state_dict())
            continue
        model[list(model).index(b)] = b_new
    cut_to_share(model, share, whole)
    loop.run(model, adamw(model, lr), lr, SETTLE, 1)
    return model


ARMS = {
    "dense": train_dense,
    "rank-adaptive": train_adaptive,
    "DLRT (augmented BUG)": train_dlrt,
    "fixed rank": train_fixed,
    "prune ranks": train_pruned,
    "SVD, then fine-tune": train_svd,
}
