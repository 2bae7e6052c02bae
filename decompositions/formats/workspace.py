"""Memory that stays warm between calls, for dense weights merged from cores at every step."""

import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64


class Workspace:
    """One block of memory on the CPU, lent to one tensor at a time.

    The system maps a large fresh block page by page, which costs several passes over warm memory, and does so at every
    step. This block, as large as the largest request was, is kept instead, and lent again once nothing refers to the
    tensor any more, autograd's graph included: a weak reference tells. A layer that runs twice before its backward
    gets fresh memory for the second call, so the first one's numbers are never overwritten. Copies and pickles start
    without a block.

    Example:
        >>> import torch
        >>> workspace = Workspace()
        >>> first = workspace.take(6, torch.float32, torch.device("cpu"))
        >>> second = workspace.take(6, torch.float32, torch.device("cpu"))  # while the first one lives
        >>> where = first.data_ptr()
        >>> second.data_ptr() == where
        False
        >>> del first
        >>> workspace.take(6, torch.float32, torch.device("cpu")).data_ptr() == where
        True
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._lent: weakref.ref[Any] | None = None

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a flat tensor of uninitialised memory: the block's where it is free, else fresh memory."""
        size = numel * dtype.itemsize
        with self._lock:
            busy = self._lent is not None and self._lent() is not None
            if busy or device.type != "cpu" or size == 0:
                return torch.empty(numel, dtype=dtype, device=device)
            if self._block is None or self._block.size < size + ALIGNMENT:
                self._block = np.empty(size + ALIGNMENT, dtype=np.uint8)
            start = -self._block.ctypes.data % ALIGNMENT
            lent = self._block[start : start + size]
            self._lent = weakref.ref(lent)
        return torch.from_numpy(lent).view(dtype)  # torch holds `lent` as long as the memory is in use

    def release(self) -> None:
        """Give the block back to the system, once nothing uses it."""
        with self._lock:
            self._block = self._lent = None

    @property
    def nbytes(self) -> int:
        """Bytes held between calls."""
        return 0 if self._block is None else self._block.nbytes

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()
