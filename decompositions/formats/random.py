"""Random networks whose dense tensor has exactly the asked scale, whatever the format and the ranks."""

from math import isfinite, prod, sqrt
from typing import TypeVar

import torch

from decompositions.formats.algebra import norm
from decompositions.formats.network import Network, dense_size

N = TypeVar("N", bound=Network)


def fill_random(
    skeleton: N,
    *,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> N:
    """Draw the cores of a network whose shapes are given, then rescale so that `‖W‖ = std sqrt(numel(W))` exactly.

    Cores are Gaussian; the scale is spread evenly over them, so that no core starts with a far larger gradient.

    Args:
        skeleton: a network of any values (usually on the meta device); only its shapes and labels count.
        std: root mean square of the entries of the dense tensor, in this draw and not only on average.
        generator: source of randomness; None is torch's global one.
        dtype: of the cores; None is torch's default dtype. Half types are drawn in float32.
        device: of the cores; "meta" draws nothing.

    Example:
        >>> from decompositions import TT, fill_random, norm
        >>> net = fill_random(TT.skeleton((5, 5), (4,), rank=2), std=0.1)
        >>> round(norm(net).item(), 5)
        1.0
    """
    if not (isfinite(std) and std >= 0):
        raise ValueError(f"random: std must be a finite number >= 0, got {std}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    device = torch.device("cpu" if device is None else device)
    outside = set(skeleton.outside)
    if device.type == "meta":
        return skeleton.to(device=device, dtype=dtype)
    draw = torch.complex128 if dtype.is_complex else torch.float64
    source = torch.device(generator.device) if generator is not None else device
    cores = []
    for core, leg in zip(skeleton.cores, skeleton.legs, strict=True):
        bonds = prod(size for label, size in zip(leg, core.shape, strict=True) if label not in outside)
        values = torch.randn(core.shape, dtype=draw, device=source, generator=generator)
        cores.append(values.to(device) / sqrt(sqrt(bonds)))  # entries of W of order one: norm cannot overflow
    net = skeleton.replace(cores)
    size = float(norm(net.detach()))
    factor = (std * sqrt(dense_size(net)) / size) ** (1 / len(cores)) if size > 0 else 0.0
    return net.replace([(core * factor).to(dtype) for core in cores])
