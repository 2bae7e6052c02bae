"""A network as a parametrization of any module's weight, for `torch.nn.utils.parametrize`."""

from math import prod
from typing import Any

from torch import Tensor, nn

from decompositions import Network, to_dense
from tnlayers.dense import Recipe


class NetworkWeight(nn.Module):
    """`torch.nn.utils.parametrize.register_parametrization(module, "weight", NetworkWeight(recipe))`.

    The dense weight is made from the cores at every use, so that any module can have one (recurrent layers, layers of
    other libraries), at the price of the dense product: memory of the parameters and of their moments is saved, not
    FLOPs. The layers of this package multiply by the network instead. Cores are the parameters
    `module.parametrizations.weight.original0, ...`; `parametrize.remove_parametrizations` leaves the dense weight.

    Args:
        recipe: dense weight -> Network, such as `functools.partial(svd, rank=8)`; used again when the weight is set.

    Raises:
        TypeError: a recipe that does not return a Network.
        ValueError: a network that does not cover the weight.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from torch.nn.utils import parametrize
        >>> from decompositions import svd
        >>> lstm = nn.LSTM(16, 32)
        >>> _ = parametrize.register_parametrization(lstm, "weight_hh_l0", NetworkWeight(partial(svd, rank=4)))
        >>> [tuple(p.shape) for p in lstm.parametrizations.weight_hh_l0.parameters()]
        [(128, 4), (4, 4), (32, 4)]
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self._shape: tuple[int, ...] = ()
        self._network: Any = None  # labels; the cores are the originals

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Cores for a dense weight."""
        net = self.recipe(weight.detach())
        if not isinstance(net, Network):
            raise TypeError(f"NetworkWeight: the recipe must return a Network, got {type(net).__name__}")
        self._shape = tuple(weight.shape)
        rows, cols = self._matrix()
        have = _matrix_shape(net)
        if have[0] < rows or have[1] < cols:
            raise ValueError(f"NetworkWeight: the network must cover the weight, expected {rows} x {cols}, got {net!r}")
        self._network = net.to("meta")
        return tuple(core.to(weight.dtype).contiguous() for core in net.cores)

    def forward(self, *cores: Tensor) -> Tensor:
        """The dense weight."""
        net = self._network._unchecked(cores, self._network.legs, self._network.rows, self._network.cols)
        rows, cols = self._matrix()
        have = _matrix_shape(net)
        return to_dense(net).reshape(have)[:rows, :cols].reshape(self._shape)

    def _matrix(self) -> tuple[int, int]:
        return self._shape[0], prod(self._shape[1:])


def _matrix_shape(net: Network) -> tuple[int, int]:
    """Rows and columns of the matrix of a network; a network without columns is split after its first axis."""
    rows, cols = net.row_modes, net.col_modes
    return (prod(rows), prod(cols)) if cols else (rows[0], prod(rows[1:]))
