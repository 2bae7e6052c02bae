"""Stored numbers and the values they stand for: integers, scale and offset, fill values (CF conventions, 8.1)."""

import base64
import binascii
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL = (torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16)
"""Stored types whose every number float32 holds exactly."""

WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.float64}
"""Types that torch stores but hardly computes with."""


def natural_dtype(stored: torch.dtype) -> torch.dtype:
    """Dtype of the values of a store: its own if floating or complex, else one that holds its integers.

    Bool and integers of up to 16 bits become float32, and so do 8-bit floating types; longer integers become float64
    (which rounds beyond 2^53).

    Example:
        >>> natural_dtype(torch.uint8), natural_dtype(torch.int32), natural_dtype(torch.float16)
        (torch.float32, torch.float64, torch.float16)
    """
    if stored in SMALL or (stored.is_floating_point and stored.itemsize == 1):
        return torch.float32
    return stored if stored.is_floating_point or stored.is_complex else torch.float64


def torch_dtype(name: str, dtype: np.dtype[Any]) -> torch.dtype:
    """The torch dtype of a numpy one, of either byte order.

    Raises:
        TypeError: anything but bool, integers, and floating or complex numbers of at most 8 bytes a part.

    Example:
        >>> torch_dtype("doc", np.dtype(">f4"))
        torch.float32
    """
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8):
        raise TypeError(
            f"{name}: entries must be bool, integer, floating or complex numbers of torch, got {dtype}; convert"
        )
    return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype


def to_torch(values: Any) -> Tensor:
    """Tensor of its own memory with the numbers of an array of any byte order and strides.

    Example:
        >>> to_torch(np.array([1, 2], dtype=">i2")[::-1])
        tensor([2, 1], dtype=torch.int16)
    """
    array = np.asarray(values)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def over(values: Any) -> Tensor:
    """Tensor over the memory of an array where torch can read that; a copy where it cannot.

    Example:
        >>> array = np.zeros(2)
        >>> over(array)[0] = 1
        >>> array.tolist()
        [1.0, 0.0]
    """
    array = np.asarray(values)
    readable = array.dtype.isnative and array.flags.writeable and all(step >= 0 for step in array.strides)
    return torch.from_numpy(array) if readable else to_torch(array)


@dataclass(frozen=True)
class Packing:
    """How a stored number becomes a value: `stored * scale + offset`, or `missing` where it equals a fill value.

    The arithmetic runs in double precision and is rounded once, to `dtype`.

    Args:
        dtype: of the values.
        scale: CF `scale_factor`.
        offset: CF `add_offset`.
        fills: stored numbers that mean "nothing here"; NaN matches NaN.
        missing: what stands for them; None leaves NaN there, which a source refuses.

    Example:
        >>> packing = Packing(torch.float64, scale=0.5, offset=1.0, fills=(-1,), missing=0.0)
        >>> packing.unpack(torch.tensor([-1, 0, 2], dtype=torch.int16)).tolist()
        [0.0, 1.0, 2.0]
    """

    dtype: torch.dtype
    scale: int | float = 1
    offset: int | float = 0
    fills: tuple[int | float, ...] = ()
    missing: int | float | None = None

    @property
    def mark(self) -> int | float:
        """What stands at a missing entry."""
        return float("nan") if self.missing is None else self.missing

    def unpack(self, stored: Tensor) -> Tensor:
        """Values of stored numbers, in the same shape."""
        raw = stored.to(_computed(stored.dtype))
        values = raw
        if self.scale != 1 or self.offset != 0:
            values = raw.to(torch.complex128 if raw.is_complex() else torch.float64) * self.scale + self.offset
        values = values.to(self.dtype)
        for fill in self.fills:
            values = values.masked_fill(raw.isnan() if fill != fill else raw == fill, self.mark)
        return values


def packing(
    name: str,
    stored: torch.dtype,
    *,
    dtype: torch.dtype | None = None,
    scale: int | float | None = None,
    offset: int | float | None = None,
    fill_value: int | float | None = None,
    missing: int | float | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Packing:
    """Packing of a store from what the caller says, and where the caller is silent from the store's CF attributes.

    Args:
        name: who asks, for messages.
        stored: dtype in the store.
        dtype: of the values; None takes `natural_dtype(stored)`.
        scale: instead of the attribute `scale_factor`.
        offset: instead of the attribute `add_offset`.
        fill_value: instead of the attributes `_FillValue` and `missing_value`.
        missing: finite value of the missing entries; None refuses them when they are read.
        attributes: of the store. Fill values there that its dtype cannot hold match nothing and are left out.

    Raises:
        ValueError: a dtype that is not floating or drops imaginary parts, a scale that is zero or not finite, a
            `fill_value` that the store cannot hold, attributes that are no numbers.

    Example:
        >>> packing("doc", torch.int16, attributes={"scale_factor": 0.1, "_FillValue": -999}).fills
        (-999,)
    """
    attributes = attributes or {}
    dtype = natural_dtype(stored) if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: dtype must be a torch.dtype, got {type(dtype).__name__}; write torch.float64")
    if not (dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)):
        raise ValueError(f"{name}: values need a floating or complex dtype, got {dtype}; leave dtype out")
    if stored.is_complex and not dtype.is_complex:
        raise ValueError(f"{name}: complex entries need a complex dtype, got {dtype}; leave dtype out")
    if str(attributes.get("_Unsigned", "false")).lower() == "true":
        raise ValueError(f"{name}: expected numbers as stored, got the attribute _Unsigned; decode it (xarray does)")
    scale = _one(name, "scale", scale, attributes.get("scale_factor", 1))
    offset = _one(name, "offset", offset, attributes.get("add_offset", 0))
    if scale == 0:
        raise ValueError(f"{name}: scale must not be zero, got {scale}; leave it out")
    if missing is not None:
        missing = _one(name, "missing", missing, 0)
        if not torch.tensor(missing, dtype=torch.float64).to(dtype).isfinite():
            raise ValueError(f"{name}: missing must be a finite {dtype}, got {missing}; take a smaller one")
    if fill_value is not None:
        if not isinstance(fill_value, Real):
            raise TypeError(f"{name}: fill_value must be a number, got {type(fill_value).__name__}")
        fills = _held(stored, [fill_value])
        if not fills:
            raise ValueError(f"{name}: fill_value must be a number of {stored}, got {fill_value}; it matches nothing")
    else:
        numbers = [
            number
            for key in ("_FillValue", "missing_value")
            if attributes.get(key) is not None
            for number in _numbers(name, key, attributes[key])
        ]
        fills = _held(stored, numbers)
    return Packing(dtype, scale, offset, fills, missing)


def _computed(stored: torch.dtype) -> torch.dtype:
    if stored.is_floating_point and stored.itemsize == 1:
        return torch.float32
    return WIDER.get(stored, stored)


def _held(stored: torch.dtype, numbers: list[Any]) -> tuple[int | float, ...]:
    """Those of the numbers that the dtype holds, rounded as the store rounds them, each once."""
    found: list[int | float] = []
    computed = _computed(stored)
    for number in numbers:
        if stored.is_floating_point or stored.is_complex:
            real = computed.to_real() if computed.is_complex else computed
            found.append(float(torch.tensor(float(number), dtype=torch.float64).to(real)))
        elif number == number and abs(number) != float("inf") and int(number) == number:
            low, high = (0, 1) if stored is torch.bool else (torch.iinfo(stored).min, torch.iinfo(stored).max)
            if low <= int(number) <= high:
                found.append(float(number) if computed.is_floating_point else int(number))
    return tuple(dict.fromkeys(found))


def _one(name: str, what: str, given: Any, attribute: Any) -> float:
    key = {"scale": "scale_factor", "offset": "add_offset"}.get(what, what)
    numbers = [given] if given is not None else _numbers(name, key, attribute)
    if len(numbers) != 1 or isinstance(numbers[0], bool) or not isinstance(numbers[0], Real):
        raise TypeError(f"{name}: {what} must be one real number, got {numbers}")
    number = float(numbers[0])
    if not isfinite(number):
        raise ValueError(f"{name}: {what} must be finite, got {number}")
    return number


def _numbers(name: str, key: str, value: Any) -> list[Any]:
    """Numbers of an attribute: one, several, or (in zarr 3) a double in base64."""
    numbers = []
    for item in np.atleast_1d(np.asarray(value)).tolist():
        if isinstance(item, bytes):
            item = item.decode()
        if isinstance(item, str):
            try:
                item = float(item)
            except ValueError:
                try:
                    (item,) = struct.unpack("<d", base64.b64decode(item, validate=True))
                except (binascii.Error, struct.error):
                    raise ValueError(
                        f"{name}: the attribute {key} must be a number, got {item!r}; pass cf=False and the numbers"
                    ) from None
        numbers.append(item)
    return numbers
