"""Slow truths, written without the library's plans, gauges or decompositions."""

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from decompositions import Network


def dense(net: Network, cores: Sequence[Tensor] | None = None) -> Tensor:
    """The dense tensor: multiply the cores by broadcasting, one after the other, and sum a label after its last use.

    No einsum and no contraction order: differentiable, and independent of the code under test.
    """
    cores = net.cores if cores is None else cores
    value, labels = torch.ones((), dtype=cores[0].dtype), []
    for k, (core, leg) in enumerate(zip(cores, net.legs, strict=True)):
        joint = labels + [label for label in leg if label not in labels]
        order = sorted(range(len(leg)), key=lambda axis: joint.index(leg[axis]))
        sizes = dict(zip(leg, core.shape, strict=True))
        value = value.reshape(*value.shape, *[1] * (len(joint) - len(labels)))
        value = value * core.permute(order).reshape([sizes.get(label, 1) for label in joint])
        later = {label for other in net.legs[k + 1 :] for label in other} | set(net.outside)
        done = [axis for axis, label in enumerate(joint) if label not in later]
        value = value.sum(done) if done else value
        labels = [label for label in joint if label in later]
    return value.permute([labels.index(label) for label in net.outside])


def entry(net: Network, index: Sequence[int]) -> complex:
    """One entry of the dense tensor by plain loops over every summed index."""
    fixed = dict(zip(net.outside, index, strict=True))
    total = 0.0
    for values in product(*(range(r) for r in net.ranks)):
        at = fixed | dict(zip(net.bonds, values, strict=True))
        total += prod(
            complex(core[tuple(at[label] for label in leg)]) for core, leg in zip(net.cores, net.legs, strict=True)
        )
    return total


def matmul(net: Network, x: Tensor, cores: Sequence[Tensor] | None = None) -> Tensor:
    """`y = x W^T` with the dense matrix W."""
    rows, cols = prod(net.row_modes), prod(net.col_modes)
    batch = x.shape[: x.ndim - len(net.cols)]
    y = x.reshape(prod(batch), cols) @ dense(net, cores).reshape(rows, cols).T
    return y.reshape(*batch, *net.row_modes)


def unfolding(x: Tensor, first: Sequence[int]) -> np.ndarray:
    """The matrix with the axes `first` as rows and all others as columns."""
    rest = [k for k in range(x.ndim) if k not in first]
    array = np.transpose(x.detach().numpy(), [*first, *rest])
    return array.reshape(prod(x.shape[k] for k in first), -1)


def singular_values(x: Tensor, first: Sequence[int]) -> np.ndarray:
    """Singular values of an unfolding, in full."""
    return np.linalg.svd(unfolding(x, first), compute_uv=False)


def tail(x: Tensor, first: Sequence[int], rank: int) -> float:
    """Frobenius norm of what a best approximation of this rank leaves of an unfolding (Eckart-Young)."""
    return float(np.sqrt(np.sum(singular_values(x, first)[rank:] ** 2)))


def relative(approximation: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error in double precision; absolute where exact is zero. Scaled, so that 1e30 is no harm."""
    double = torch.complex128 if exact.is_complex() or approximation.is_complex() else torch.float64
    approximation, exact = approximation.detach().to(double), exact.detach().to(double)
    unit = float(exact.abs().max()) if exact.numel() else 0.0
    unit = unit or 1.0
    size = float(torch.linalg.vector_norm(exact / unit)) or 1.0
    return float(torch.linalg.vector_norm((approximation - exact) / unit)) / size


def kron(matrices: Sequence[Tensor]) -> np.ndarray:
    """Kronecker product by loops over entries."""
    result = np.ones((1, 1))
    for matrix in matrices:
        factor = matrix.numpy()
        (a, b), (c, d) = result.shape, factor.shape
        out = np.zeros((a * c, b * d), dtype=factor.dtype)
        for i, j, k, m in product(range(a), range(b), range(c), range(d)):
            out[i * c + k, j * d + m] = result[i, j] * factor[k, m]
        result = out
    return result


def with_spectrum(m: int, n: int, spectrum: Sequence[float], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A matrix with known singular values, made in double precision and cast at the end."""
    double = torch.complex128 if dtype.is_complex else torch.float64
    k = min(m, n)
    s = torch.zeros(k, dtype=torch.float64)
    s[: min(k, len(spectrum))] = torch.tensor(list(spectrum), dtype=torch.float64)[:k]
    u = torch.linalg.qr(torch.randn(m, k, dtype=double, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, k, dtype=double, generator=generator)).Q
    return ((u * s) @ v.mH).to(dtype)


def graded(shape: Sequence[int], decades: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor whose unfoldings all decay over about `decades` decades: a Gaussian core, graded along every mode."""
    double = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.randn(tuple(shape), dtype=double, generator=generator)
    for k, n in enumerate(shape):
        q = torch.linalg.qr(torch.randn(n, n, dtype=double, generator=generator)).Q
        weights = 10.0 ** (-decades * torch.arange(n, dtype=torch.float64) / max(n - 1, 1))
        x = torch.movedim(torch.tensordot(q * weights, x, dims=([1], [k])), 0, k)
    return x.to(dtype)


def sides(net: Network, bond: str) -> tuple[set[int], set[int]]:
    """Cores on the two sides of a bond of a tree: grow the set that holds core 0 without crossing the bond."""
    near = {0}
    for _ in net.cores:
        crossing = {label for k in near for label in net.legs[k]} - set(net.outside) - {bond}
        near |= {k for k, leg in enumerate(net.legs) if crossing & set(leg)}
    return near, set(range(len(net.cores))) - near


def bond_axes(net: Network, bond: str) -> list[int]:
    """Dense axes on core 0's side of a bond."""
    near = {label for k in sides(net, bond)[0] for label in net.legs[k]}
    return [axis for axis, label in enumerate(net.outside) if label in near]


def isometry_defect(net: Network, center: int) -> float:
    """Largest entry of Q^H Q - I over all cores but the center, each unfolded with the bond toward the center."""
    worst, reached, bonds = 0.0, [center], set(net.bonds)
    for near in reached:  # grows while it is walked: breadth first from the center
        for bond in bonds & set(net.legs[near]):
            (k,) = (k for k, leg in enumerate(net.legs) if bond in leg and k != near)
            q = unfolding(net.cores[k], [axis for axis, label in enumerate(net.legs[k]) if label != bond])
            worst = max(worst, abs(q.conj().T @ q - np.eye(q.shape[1])).max())
            reached.append(k)
        bonds -= set(net.legs[near])
    assert len(reached) == len(net.cores)
    return worst
