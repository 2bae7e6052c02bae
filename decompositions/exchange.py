"""Networks to and from other libraries: tensorly's tensors, lists of cores (tntorch, torchTT, t3f), numpy."""

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decompositions.formats.cp import CP
from decompositions.formats.network import Network
from decompositions.formats.tensor_ring import TensorRing
from decompositions.formats.tt import TT
from decompositions.formats.tt_matrix import TTMatrix
from decompositions.formats.tucker import Tucker


@singledispatch
def to_tensorly(net: Network) -> Any:
    """The tensorly object of a network: CP, Tucker (all modes with factors), TT, TensorRing and TTMatrix have one.

    Cores are shared, not copied; tensorly's backend should be "pytorch". Rows and columns are forgotten, but for a
    TTMatrix.

    Raises:
        TypeError: a network of which tensorly has no counterpart.

    Example:
        >>> from decompositions import CP
        >>> to_tensorly(CP.random(row_modes=(3, 4, 5), rank=2)).rank
        2
    """
    raise TypeError(
        f"to_tensorly: tensorly has no counterpart of {net!r}, expected CP, Tucker, TT, TensorRing or TTMatrix; "
        "give it to_dense(net)"
    )


@to_tensorly.register
def _(net: CP) -> Any:
    from tensorly.cp_tensor import CPTensor

    factors = [core if core.ndim == 2 else core[:, None] for core in net.cores]
    return _in_torch(lambda: CPTensor((torch.ones_like(factors[0][0]), factors)))


@to_tensorly.register
def _(net: Tucker) -> Any:
    from tensorly.tucker_tensor import TuckerTensor

    if len(net.factors) != net.order:
        raise TypeError(
            f"to_tensorly: a Tucker tensor of tensorly has a factor for every mode, expected {net.order}, got "
            f"{len(net.factors)}"
        )
    order = [net.legs[0].index(f"r{k}") for k in range(net.order)]
    by_mode = {factor_leg[0]: factor for factor_leg, factor in zip(net.legs[1:], net.factors, strict=True)}
    return _in_torch(
        lambda: TuckerTensor((net.core.permute(order), [by_mode[label] for label in sorted(by_mode, key=_number)]))
    )


@to_tensorly.register
def _(net: TT) -> Any:
    from tensorly.tt_tensor import TTTensor

    if net.axes != tuple(range(net.order)):
        raise TypeError(f"to_tensorly: a train of tensorly has its axes in order, got axes {net.axes}")
    return _in_torch(lambda: TTTensor(to_cores(net)))


@to_tensorly.register
def _(net: TensorRing) -> Any:
    from tensorly.tr_tensor import TRTensor

    if net.axes != tuple(range(net.order)):
        raise TypeError(f"to_tensorly: a ring of tensorly has its axes in order, got axes {net.axes}")
    return _in_torch(lambda: TRTensor(to_cores(net)))


@to_tensorly.register
def _(net: TTMatrix) -> Any:
    from tensorly.tt_matrix import TTMatrix as Theirs

    return _in_torch(lambda: Theirs(to_cores(net)))


def _number(label: str) -> int:
    return int(label[1:])


def _in_torch(make: Callable[[], Any]) -> Any:
    import tensorly

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return make()


def from_tensorly(tensor: Any, num_rows: int | None = None) -> Network:
    """The network of a tensorly object: CPTensor, TuckerTensor, TTTensor, TRTensor or TTMatrix, of any backend.

    Args:
        tensor: what tensorly's decompositions return.
        num_rows: leading axes that are rows; all by default (a TTMatrix knows its own).

    Raises:
        TypeError: another object.

    Example:
        >>> import numpy as np
        >>> from tensorly.cp_tensor import CPTensor
        >>> net = from_tensorly(CPTensor((np.array([2.0, 1.0]), [np.ones((n, 2)) for n in (3, 4)])))
        >>> net.shape, net.ranks
        ((3, 4), (2,))
    """
    name = type(tensor).__name__
    if name == "CPTensor":
        weights, factors = tensor
        cores = [_tensor(factor) for factor in factors]
        if weights is not None:
            cores[0] = cores[0] * _tensor(weights).to(cores[0])
        return CP(cores if len(cores) > 1 else [cores[0].sum(1)], num_rows)
    if name == "TuckerTensor":
        core, factors = tensor
        return Tucker(_tensor(core), [_tensor(factor) for factor in factors], num_rows=num_rows)
    if name in ("TTTensor", "TRTensor", "TTMatrix"):
        return from_cores(list(tensor.factors), num_rows, ring=name == "TRTensor")
    raise TypeError(
        f"from_tensorly: expected a CPTensor, TuckerTensor, TTTensor, TRTensor or TTMatrix, got {name}; "
        "from_cores takes lists of cores"
    )


def to_cores(net: Network) -> list[Tensor]:
    """Cores as other libraries list them, with ranks of 1 at the ends of a chain.

    (r, n, r') in a train or ring, (r, m, n, r') in a TT-matrix, (n, r) for a CP.

    Raises:
        TypeError: a network that is none of these.

    Example:
        >>> [tuple(core.shape) for core in to_cores(TT.random(row_modes=(3, 4), rank=2))]
        [(1, 3, 2), (2, 4, 1)]
    """
    return _to_cores(net)


@singledispatch
def _to_cores(net: Network) -> list[Tensor]:
    raise TypeError(
        f"to_cores: expected a TT, TTMatrix, TensorRing or CP, got {net!r}; its cores are net.cores with net.legs"
    )


@_to_cores.register(TT)
@_to_cores.register(TTMatrix)
def _(net: Network) -> list[Tensor]:
    cores = list(net.cores)
    cores[0] = cores[0][None]
    cores[-1] = cores[-1][..., None]
    return cores


@_to_cores.register
def _(net: TensorRing) -> list[Tensor]:
    return list(net.cores) if net.order > 1 else [net.cores[0][None, :, None]]


@_to_cores.register
def _(net: CP) -> list[Tensor]:
    return list(net.cores)


def from_cores(cores: Sequence[Any], num_rows: int | None = None, *, ring: bool = False) -> Network:
    """The network of a list of cores, torch or numpy: what its shapes say.

    All of three axes (r, n, r'): a TT, or a TensorRing where the outer ranks are above 1 or `ring` is set; all of four
    (r, m, n, r'): a TTMatrix; all of two (n, r): a CP.

    Raises:
        TypeError: no list of arrays.
        ValueError: mixed orders (tntorch's mixtures of CP and TT), outer ranks that differ.

    Example:
        >>> import numpy as np
        >>> from_cores([np.ones((1, 3, 2)), np.ones((2, 4, 1))])
        TT(3x4, ranks=(2,), float64)
    """
    tensors = [_tensor(core) for core in cores]
    orders = sorted({core.ndim for core in tensors})
    if not tensors or len(orders) != 1 or orders[0] not in (2, 3, 4):
        raise ValueError(
            f"from_cores: all cores must have 2 (CP), 3 (train, ring) or 4 (TT-matrix) axes, got {len(tensors)} cores "
            f"of {orders} axes"
        )
    if orders == [2]:
        return CP(tensors, num_rows)
    first, last = tensors[0].shape[0], tensors[-1].shape[-1]
    if first != last:
        raise ValueError(f"from_cores: the outer ranks must agree, expected {first} at the end, got {last}")
    if orders == [3] and (ring or first > 1):
        return TensorRing(tensors if len(tensors) > 1 else [tensors[0].diagonal(dim1=0, dim2=2).sum(-1)], num_rows)
    if first > 1:
        raise ValueError(f"from_cores: a TT-matrix has outer ranks 1, got {first}")
    tensors[0] = tensors[0][0]
    tensors[-1] = tensors[-1][..., 0]
    return TT(tensors, num_rows) if orders == [3] else TTMatrix(tensors)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    raise TypeError(f"from_cores: expected torch tensors or numpy arrays, got {type(value).__name__}")


def to_numpy(net: Network) -> list[np.ndarray]:
    """The cores as numpy arrays (copies where they need grad or are on a device; float32 for bfloat16).

    `net.replace([torch.from_numpy(core) for core in cores])` goes back.

    Example:
        >>> from decompositions import LowRank
        >>> [core.shape for core in to_numpy(LowRank.random(row_modes=(4,), col_modes=(5,), rank=2))]
        [(4, 2), (2, 2), (5, 2)]
    """
    cores = [core.detach().cpu() for core in net.cores]
    return [(core.float() if core.dtype == torch.bfloat16 else core).numpy() for core in cores]
