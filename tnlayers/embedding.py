"""Embedding whose table is a network; rows are contracted from gathered slices, never from the dense table."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Inexact, Int
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.cost import rates_for
from decompositions.formats.plan import BATCH, Plan, bucket, plan_path, run
from tnlayers.frozen import Form, Forms, frozen_weight, merge
from tnlayers.layer import NetworkFactory, NetworkLayer, Recipe, Shapes, copy_settings, run_recipe, unchanged_rng


class Embedding(NetworkLayer):
    """`torch.nn.Embedding` whose table (num_embeddings, embedding_dim) is a network.

    A token's index is written in the mixed radix of the row modes; each core with row modes is sliced at its digits and
    the slices are contracted, batched over tokens. Where the table is smaller than that work, it is merged and indexed.
    The dense weight has standard deviation 1 at the start, as torch's.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: width.
        padding_idx: tokens with this index get a constant vector (zero at the start) and send no gradient.
        max_norm: refused: it rewrites single rows, which share all their parameters here.
        norm_type: unused, as `max_norm` is refused.
        scale_grad_by_freq: refused, likewise.
        sparse: refused: gradients of cores are dense (and small).
        device: of the cores.
        dtype: of the cores.
        network: a Network, or a callable (shape, dtype, device) -> Network such as `tnlayers.random_network(...)`.
        recipe: a callable dense table -> Network.

    Raises:
        ValueError: a refused option, an impossible padding_idx, a network that does not cover the table.
        IndexError: a token out of range (eager mode, CPU; a device assertion elsewhere, as in torch).

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import TTMatrix
        >>> layer = tnlayers.Embedding(1000, 64, network=tnlayers.random_network(TTMatrix, rank=4))
        >>> layer(torch.tensor([[1, 999]])).shape
        torch.Size([1, 2, 64])
    """

    padding_vector: Tensor | None
    _frozen_under_budget_only = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        refused = {"max_norm": max_norm is not None, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        for what, given in refused.items():
            if given:
                raise ValueError(
                    f"Embedding: {what} acts on single rows, which share their parameters here; expected it unset, "
                    f"got {what}={ {'max_norm': max_norm}.get(what, True) }; use torch.nn.Embedding"
                )
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"Embedding: sizes must be at least 1, got ({num_embeddings}, {embedding_dim})")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"Embedding: padding_idx must be within {num_embeddings} rows, got {padding_idx}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.bias = None
        self._start((num_embeddings, embedding_dim), network, recipe, dtype, device, 1.0)
        first = self.cores[0]
        if padding_idx is None:
            self.padding_vector = None  # no buffer: torch.export miscounts the buffers after one that is None
        else:
            vector = torch.zeros(embedding_dim, dtype=first.dtype, device=first.device)
            self.register_buffer("padding_vector", vector)

    @classmethod
    def from_dense(cls, embedding: nn.Module, recipe: Recipe) -> "Embedding":
        """Layer that stands in for a trained `nn.Embedding`; the padding row keeps its very values.

        Args:
            embedding: an `nn.Embedding` without max_norm, scale_grad_by_freq and sparse.
            recipe: a callable dense table -> Network.

        Raises:
            TypeError: another module.
            ValueError: an option that a shared table cannot have.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"Embedding.from_dense: expected a torch.nn.Embedding, got {type(embedding).__name__}")
        weight = embedding.weight
        net = run_recipe("Embedding.from_dense", recipe, weight.detach())
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            embedding.max_norm,
            embedding.norm_type,
            embedding.scale_grad_by_freq,
            embedding.sparse,
            network=net,
        )
        if layer.padding_vector is not None:
            layer.padding_vector.copy_(weight[layer.padding_idx].detach())
        copy_settings(embedding, layer, weight, None)
        return layer

    def to_dense_module(self) -> nn.Embedding:
        """Return the `nn.Embedding` with the same function."""
        first = self.cores[0]
        with unchanged_rng(first.device):
            dense = nn.Embedding(
                self.num_embeddings, self.embedding_dim, self.padding_idx, device=first.device, dtype=first.dtype
            )
        with torch.no_grad():
            dense.weight.copy_(self.weight)
        copy_settings(self, dense, first, None)
        return dense

    @property
    def weight(self) -> Tensor:
        """The dense table (num_embeddings, embedding_dim), differentiable with respect to the cores."""
        table = self._shaped(self._dense())
        if self.padding_vector is None or self.padding_idx is None:
            return table
        rows = torch.arange(self.num_embeddings, device=table.device).unsqueeze(-1)
        return torch.where(torch.eq(rows, self.padding_idx), self.padding_vector, table)

    def _shaped(self, dense: Tensor) -> Tensor:
        return dense.reshape(prod(self._row_modes), -1)[: self.num_embeddings, : self.embedding_dim]

    def _make_plan(self, rows: int) -> Plan:
        """Gather and contract for `rows` tokens, or ("merge") make the table and index it."""
        net = self.network
        sizes = {**net.sizes, BATCH: rows}
        item = net.dtype.itemsize
        gathered = plan_path(gathered_legs(net), sizes, (BATCH, *net.cols), item)
        table = plan_path(net.legs, net.sizes, net.outside, item)
        merged = table._replace(strategy="merge", bytes=table.bytes + 2 * item * rows * prod(net.col_modes))
        return min((gathered, merged), key=lambda plan: plan.seconds)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Inexact[Tensor, "*batch dim"]:
        """Look tokens up: any shape of int64 or int32 indices."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"Embedding: tokens must be int64 or int32, got {tokens.dtype}")
        if not torch.compiler.is_compiling():
            _check_range(tokens, self.num_embeddings, padded=prod(self._row_modes) > self.num_embeddings)
        net = self.network
        flat = tokens.reshape(-1).long()
        if (table := frozen_weight(self)) is not None:
            y = F.embedding(flat, table)
        elif (plan := self._plan_for(flat.shape[0])).strategy == "merge":
            y = self._dense().reshape(prod(self._row_modes), -1).index_select(0, flat)
        else:
            y = run(plan.steps, _gather(net, flat)).reshape(flat.shape[0], prod(self._col_modes))
        y = y[:, : self.embedding_dim]
        if self.padding_vector is not None and self.padding_idx is not None:
            y = torch.where(torch.eq(flat, self.padding_idx).unsqueeze(-1), self.padding_vector, y)
        return y.reshape(*tokens.shape, self.embedding_dim)

    def _frozen_forms(self, batch: int | None) -> Forms:
        """The whole table; a look-up reads and writes one row a token."""
        rows, item, rates = batch or self._hint or 1024, self.cores[0].itemsize, rates_for(None)
        read = rates.call + 2 * item * rows * self.embedding_dim / rates.stream
        form = Form("dense", read, item * prod(self.weight_shape))
        return Forms(self._make_plan(bucket(rows)).seconds, (form,))

    def _merge(self, form: Form) -> tuple[Tensor, Tensor | None]:
        return self._shaped(merge(self.network, None)[0]).contiguous(), None

    def flops(self, batch: int = 1) -> int:
        """Multiply-adds times two of looking up `batch` tokens."""
        return self._make_plan(batch).flops

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Zero: a dense table is only read."""
        return 0

    def sample_flops(self, seen: Shapes | None) -> int:
        """Multiply-adds times two of one sample, all its tokens."""
        return self.flops(1 if seen is None else max(1, prod(seen.input[1:])))

    def output_bound(self, difference: Tensor) -> float:
        """Bound of `‖y - y'‖` for one token: the largest row norm of the difference."""
        return float(torch.linalg.vector_norm(difference.double(), dim=1).max())

    def plan_for_shapes(self, seen: Shapes) -> None:
        """Make the stored plan for a call with these shapes: every token is a row."""
        self.plan(batch=max(1, prod(seen.input)))

    def settings(self) -> dict[str, Any]:
        """Sizes and the padding index."""
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
        }

    def _reset_rest(self, generator: torch.Generator | None = None) -> None:
        if self.padding_vector is not None:
            self.padding_vector.zero_()

    def extra_repr(self) -> str:
        """Sizes, padding, format and equation."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._repr_network()}"


def _check_range(tokens: Tensor, rows: int, padded: bool) -> None:
    """Padded tables have more rows than tokens: an index in between must not pass in silence."""
    unreadable = type(tokens) is not Tensor or torch._C._functorch.is_batchedtensor(tokens)  # fake tensors, vmap
    if unreadable or tokens.numel() == 0 or tokens.is_meta:
        return
    if tokens.device.type == "cpu":
        low, high = tokens.aminmax()
        if int(low) < 0 or int(high) >= rows:
            raise IndexError(f"Embedding: tokens must be in 0..{rows - 1}, got {int(low)}..{int(high)}")
    elif padded:  # on a device without waiting for it, as torch's own index kernels do
        torch._assert_async(((tokens >= 0) & (tokens < rows)).all())


def gathered_legs(net: Network) -> list[tuple[str, ...]]:
    """Labels of the cores after slicing: the token label first in place of the row labels."""
    rows = set(net.rows)
    return [
        ((BATCH,) if rows.intersection(leg) else ()) + tuple(label for label in leg if label not in rows)
        for leg in net.legs
    ]


def _gather(net: Network, flat: Tensor) -> list[Tensor]:
    """Slice every core that has row modes at the tokens' digits; the token axis comes first."""
    digits: dict[str, Any] = {}
    rest = flat
    for label, size in zip(reversed(net.rows), reversed(net.row_modes), strict=True):
        digits[label] = rest % size
        rest = rest // size
    operands = []
    for core, leg in zip(net.cores, net.legs, strict=True):
        own = [axis for axis, label in enumerate(leg) if label in digits]
        if own:
            others = [axis for axis in range(core.ndim) if axis not in own]
            index = torch.zeros_like(flat)
            for axis in own:
                index = index * core.shape[axis] + digits[leg[axis]]
            core = core.permute(*own, *others).reshape(-1, *(core.shape[axis] for axis in others))
            core = core.index_select(0, index)
        operands.append(core)
    return operands
