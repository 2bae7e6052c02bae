"""Sources in memory: tensors, arrays, and functions that compute their entries."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cross_approx.sources.packing import Packing, natural_dtype, packing, to_torch, torch_dtype
from cross_approx.sources.source import Source


class TensorSource(Source):
    """Entries of a torch tensor; gradients flow through them.

    Args:
        x: the tensor, on any device.
        dtype, scale, offset, fill_value, missing: as in `as_source`.
        mask: source that is nonzero where an entry is missing.

    Example:
        >>> import torch
        >>> TensorSource(torch.eye(3)).slab((slice(0, 2), slice(1, 3))).tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """

    def __init__(self, x: Tensor, *, dtype: torch.dtype | None = None, mask: Source | None = None, **stored: Any):
        if x.layout is not torch.strided or x.is_quantized or x.is_meta:
            raise TypeError(f"as_source: expected a dense tensor with data, got {x.layout} on {x.device}; densify it")
        super().__init__(x.shape, packing("as_source", x.dtype, dtype=dtype, **stored), x.device, mask)
        self._x = x

    def _values(self, stored: Tensor) -> Tensor:
        self._bytes += stored.numel() * stored.element_size()
        return self.packing.unpack(stored)

    def _entries(self, index: Tensor) -> Tensor:
        if not self.shape:
            return self._values(self._x.repeat(len(index)))
        return self._values(self._x[index.to(self.device).unbind(1)])

    def _fibers(self, index: Tensor, axis: int) -> Tensor:
        rest = torch.cat((index[:, :axis], index[:, axis + 1 :]), 1).to(self.device)
        fibers = self._x.movedim(axis, -1)
        return self._values(fibers[rest.unbind(1)] if rest.shape[1] else fibers.repeat(len(index), 1))

    def _slab(self, ranges: list[range]) -> Tensor:
        return self._values(self._x[tuple(slice(r.start, r.stop, r.step) for r in ranges)]).clone()


class ArraySource(Source):
    """Entries of a numpy array or memmap: any byte order and strides; of a memmap only the pages asked for are read.

    Args:
        x: the array. The mask of a masked array counts as `mask`, unless that is given.
        device: of the values, the CPU if None.
        dtype, scale, offset, fill_value, missing: as in `as_source`.
        mask: source that is nonzero where an entry is missing.

    Example:
        >>> import numpy as np, torch
        >>> ArraySource(np.asfortranarray(np.eye(3, dtype=">f8"))).entries(torch.tensor([[2, 2], [0, 1]]))
        tensor([1., 0.], dtype=torch.float64)
    """

    def __init__(
        self,
        x: np.ndarray,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mask: Source | None = None,
        **stored: Any,
    ) -> None:
        if isinstance(x, np.ma.MaskedArray):
            hidden = np.ma.getmask(x)
            mask = ArraySource(np.asarray(hidden)) if mask is None and hidden is not np.ma.nomask else mask
            x = np.ma.getdata(x)
        pack = packing("as_source", torch_dtype("as_source", x.dtype), dtype=dtype, **stored)
        super().__init__(x.shape, pack, torch.device(device or "cpu"), mask)
        self._x = x

    def _values(self, stored: Any) -> Tensor:
        values = to_torch(stored)
        self._bytes += values.numel() * values.element_size()
        return self.packing.unpack(values).to(self.device)

    def _entries(self, index: Tensor) -> Tensor:
        if not self.shape:
            return self._values(np.broadcast_to(self._x, len(index)))
        return self._values(self._x[tuple(index.cpu().numpy().T)])

    def _fibers(self, index: Tensor, axis: int) -> Tensor:
        rest = np.delete(index.cpu().numpy(), axis, 1)
        fibers = np.moveaxis(self._x, axis, -1)
        # without other axes every fiber is the array itself
        return self._values(
            fibers[tuple(rest.T)] if rest.shape[1] else np.broadcast_to(fibers, (len(rest), len(fibers)))
        )

    def _slab(self, ranges: list[range]) -> Tensor:
        return self._values(self._x[tuple(slice(r.start, r.stop, r.step) for r in ranges)])


class FunctionSource(Source):
    """Entries computed by a function of the index; gradients flow through them.

    Args:
        function: maps indices (B, d), int64, to values (B,), a tensor or an array; with `vectorize`, d Python integers
            to one number.
        shape: sizes of the modes.
        dtype: of the values. None evaluates the entry (0, ..., 0) once to see it, and counts that evaluation.
        device: where the indices are given and the values returned, the CPU if None.
        vectorize: the function takes one index at a time.
        batch: at most so many indices in one call.

    Raises:
        ValueError: a wrong shape, values of another shape than (B,).
        TypeError: complex values where `dtype` is real, values that are no numbers.

    Example:
        >>> import torch
        >>> source = FunctionSource(lambda index: 1.0 / (1 + index.sum(1)), (4, 4))
        >>> source.entries(torch.tensor([[1, 2]])), source.evaluations
        (tensor([0.2500]), 2)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        vectorize: bool = False,
        batch: int | None = None,
    ) -> None:
        if isinstance(shape, int) or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 0 for n in shape):
            raise ValueError(f"as_source: shape must be a tuple of sizes >= 0, got {shape!r}")
        if batch is not None and batch < 1:
            raise ValueError(f"as_source: batch must be at least 1, got {batch}")
        self._function = function
        self._vectorize, self._batch = vectorize, batch
        device = torch.device(device or "cpu")
        # float64 stands in for the probe: packing refuses a dtype that is not of values
        super().__init__(shape, packing("as_source", torch.float64, dtype=dtype), device)
        self.probed: Tensor | None = None  # value of the entry (0, ..., 0), where its dtype was asked for
        if dtype is None and 0 not in self.shape:
            self._count(entries=1)
            with torch.no_grad():
                probed = self._call(torch.zeros(1, len(self.shape), dtype=torch.int64, device=device))
            self.packing = Packing(natural_dtype(probed.dtype))
            self.probed = probed.detach().to(self.dtype)
            self._bytes += self.probed.numel() * self.probed.element_size()

    def _call(self, index: Tensor) -> Tensor:
        values: Any
        if self._vectorize:
            numbers = [self._function(*row) for row in index.tolist()]
            if any(isinstance(number, Tensor) for number in numbers):
                values = torch.stack([torch.as_tensor(number, device=self.device) for number in numbers])
            else:  # numpy keeps float32 scalars and Python floats (double) apart
                values = np.asarray(numbers)
        else:
            values = self._function(index)
        if isinstance(values, np.ndarray):
            torch_dtype("as_source", values.dtype)
            values = to_torch(values)
        if not isinstance(values, Tensor):
            raise TypeError(f"as_source: the function must return a tensor or an array, got {type(values).__name__}")
        if values.shape != (len(index),):
            raise ValueError(
                f"as_source: the function must return one value an index, expected shape (B = {len(index)},), "
                f"got {tuple(values.shape)}; it takes indices (B, d), or d integers with vectorize=True"
            )
        return values

    def _entries(self, index: Tensor) -> Tensor:
        parts = []
        for block in index.to(self.device).split(self._batch or len(index)):
            values = self._call(block)
            if values.is_complex() and not self.dtype.is_complex:
                raise TypeError(f"as_source: expected values of {self.dtype}, got {values.dtype}; pass dtype=")
            parts.append(values.to(self.device, self.dtype))
            self._bytes += parts[-1].numel() * parts[-1].element_size()
        return torch.cat(parts)
