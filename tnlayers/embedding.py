"""Embedding whose table is a network; rows are contracted from gathered slices, never from the dense table."""

from math import prod
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Inexact, Int
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.cost import rates_for
from decompositions.formats.plan import BATCH, Plan, Work, bucket, plan_dense, plan_path, run
from tnlayers.dense import NetworkFactory, Recipe, copy_settings, exactly, run_recipe, unchanged_rng
from tnlayers.frozen import Form, Forms, frozen_weight, merge
from tnlayers.layer import NetworkLayer, Shapes

T = TypeVar("T", bound="TableLayer")


class TableLayer(NetworkLayer):
    """What Embedding and EmbeddingBag share: a table (num_embeddings, embedding_dim), perhaps with a padding row."""

    dense_class: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]
    """Names that torch's constructor, ours and the attributes share: the settings."""

    padding_vector: Tensor | None
    _frozen_under_budget_only = True

    def _start_table(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        refused: dict[str, Any],
        network: Network | NetworkFactory | None,
        recipe: Recipe | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """Refuse what a shared table cannot have, then make the network and the padding vector."""
        name = type(self).__name__
        for what, given in refused.items():
            if given is not None and given is not False:
                raise ValueError(
                    f"{name}: {what} acts on single rows, which share their parameters here; expected it unset, "
                    f"got {what}={given}; use torch.nn.{self.dense_class.__name__}"
                )
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"{name}: sizes must be at least 1, got ({num_embeddings}, {embedding_dim})")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"{name}: padding_idx must be within {num_embeddings} rows, got {padding_idx}")
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
    def from_dense(cls: type[T], embedding: nn.Module, recipe: Recipe) -> T:
        """Layer that stands in for a trained table; every setting is kept, the padding row keeps its very values.

        Args:
            embedding: torch's module of the same name, without max_norm, scale_grad_by_freq and sparse.
            recipe: a callable dense table -> Network.

        Raises:
            TypeError: another module.
            ValueError: an option that a shared table cannot have.
        """
        if not isinstance(embedding, cls.dense_class):
            expected = cls.dense_class.__name__
            raise TypeError(
                f"{cls.__name__}.from_dense: expected a torch.nn.{expected}, got {type(embedding).__name__}"
            )
        source: Any = embedding
        net = run_recipe(f"{cls.__name__}.from_dense", recipe, source.weight.detach())
        names = (*cls.arguments, "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        make: Any = cls
        layer: T = make(**{name: getattr(source, name) for name in names}, network=net)
        if layer.padding_vector is not None:
            layer.padding_vector.copy_(source.weight[layer.padding_idx].detach())
        copy_settings(source, layer, source.weight, None)
        return layer

    def to_dense_module(self) -> nn.Module:
        """Return torch's module with the same function."""
        first = self.cores[0]
        with unchanged_rng(first.device):
            dense: Any = self.dense_class(**self.settings(), device=first.device, dtype=first.dtype)
        with torch.no_grad(), exactly(first.device):
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

    def _frozen_forms(self, batch: int | None) -> Forms:
        """The whole table, without the padding vector; a look-up reads and writes one row a token."""
        plans = self.alternatives(bucket(batch or self._hint or 1024))
        merged = next(plan for plan in plans if plan.strategy == "merge").forward_seconds
        read = max(merged - plan_dense(self.network).forward_seconds, 0.0) + rates_for(None).call
        form = Form("dense", read, self.cores[0].itemsize * prod(self.weight_shape))
        return Forms(min(plan.forward_seconds for plan in plans), (form,))

    def _merge(self, form: Form) -> tuple[Tensor, Tensor | None]:
        return self._shaped(merge(self.network, None)[0]).contiguous(), None

    def _check_tokens(self, tokens: Tensor) -> None:
        name = type(self).__name__
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: tokens must be int64 or int32, got {tokens.dtype}")
        if not torch.compiler.is_compiling():
            _check_range(name, tokens, self.num_embeddings, padded=prod(self._row_modes) > self.num_embeddings)

    def settings(self) -> dict[str, Any]:
        """Sizes, the padding index, and whatever else torch's constructor takes."""
        return {name: getattr(self, name) for name in self.arguments}

    def _reset_rest(self, generator: torch.Generator | None = None) -> None:
        if self.padding_vector is not None:
            self.padding_vector.zero_()


class Embedding(TableLayer):
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

    dense_class = nn.Embedding
    arguments = ("num_embeddings", "embedding_dim", "padding_idx")

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
        refused = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        self._start_table(num_embeddings, embedding_dim, padding_idx, refused, network, recipe, dtype, device)

    def alternatives(self, batch: int | None = None) -> tuple[Plan, ...]:
        """Gather and contract for `batch` tokens, or ("merge") make the table and index it; best predicted first."""
        net, rows = self.network, batch or self._hint or 1024
        sizes = {**net.sizes, BATCH: rows}
        item = net.dtype.itemsize
        legs = gathered_legs(net)
        gathered = plan_path(legs, sizes, (BATCH, *net.cols), item)
        table = plan_path(net.legs, net.sizes, net.outside, item)
        plans = (
            reading(gathered, item * sum(prod(sizes[label] for label in leg) for leg in legs if BATCH in leg)),
            reading(table._replace(strategy="merge"), 0, 2 * item * rows * prod(net.col_modes)),
        )
        return tuple(sorted(plans, key=lambda plan: plan.seconds))

    def example_input(self, batch: int) -> Tensor:
        """Random tokens."""
        return torch.randint(self.num_embeddings, (batch,), device=self.cores[0].device)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Inexact[Tensor, "*batch dim"]:
        """Look tokens up: any shape of int64 or int32 indices."""
        self._check_tokens(tokens)
        y = self._recomputed(self._look_up, tokens.reshape(-1).long())
        return y.reshape(*tokens.shape, self.embedding_dim)

    def _look_up(self, flat: Tensor) -> Tensor:
        net = self._contracted
        if (table := frozen_weight(self)) is not None:
            y = F.embedding(flat, table)
        elif (plan := self._plan_for(flat.shape[0])).strategy == "merge":
            y = self._dense().reshape(prod(self._row_modes), -1).index_select(0, flat)
        else:
            y = run(plan.steps, gather(net, flat)).reshape(flat.shape[0], prod(self._col_modes))
        y = y[:, : self.embedding_dim]
        if self.padding_vector is not None and self.padding_idx is not None:
            y = torch.where(torch.eq(flat, self.padding_idx).unsqueeze(-1), self.padding_vector, y)
        return y

    def flops(self, batch: int = 1) -> int:
        """Multiply-adds times two of looking up `batch` tokens."""
        return self._make_plan(batch).flops

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Zero: a dense table is only read."""
        return 0

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        """All tokens of one sample."""
        return self._make_plan(1 if seen is None else max(1, prod(seen.input[1:]))), 1

    def output_bound(self, difference: Tensor) -> float:
        """Bound of `‖y - y'‖` for one token: the largest row norm of the difference."""
        return float(torch.linalg.vector_norm(difference.double(), dim=1).max())

    def plan_for_shapes(self, seen: Shapes) -> None:
        """Make the stored plan for a call with these shapes: every token is a row."""
        self.plan(batch=max(1, prod(seen.input)))

    def extra_repr(self) -> str:
        """Sizes, padding, format and equation."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._repr_network()}"


def _check_range(name: str, tokens: Tensor, rows: int, padded: bool) -> None:
    """Padded tables have more rows than tokens: an index in between must not pass in silence."""
    if not readable(tokens) or tokens.numel() == 0:
        return
    if tokens.device.type == "cpu":
        low, high = tokens.aminmax()
        if int(low) < 0 or int(high) >= rows:
            raise IndexError(f"{name}: tokens must be in 0..{rows - 1}, got {int(low)}..{int(high)}")
    elif padded:  # on a device without waiting for it, as torch's own index kernels do
        torch._assert_async(((tokens >= 0) & (tokens < rows)).all())


def readable(indices: Tensor) -> bool:
    """Whether an index tensor has values that may be looked at: no fake, batched (vmap) or meta tensor."""
    return type(indices) is Tensor and not torch._C._functorch.is_batchedtensor(indices) and not indices.is_meta


def gathered_legs(net: Network) -> list[tuple[str, ...]]:
    """Labels of the cores after slicing: the token label first in place of the row labels."""
    rows = set(net.rows)
    return [
        ((BATCH,) if rows.intersection(leg) else ()) + tuple(label for label in leg if label not in rows)
        for leg in net.legs
    ]


def reading(plan: Plan, gathered: int, moved: int = 0, work: Work = ()) -> Plan:
    """Add to a plan's contractions what lies around them, and predict forward and backward together.

    Gathered slices are new memory in forward, and their gradients again in backward: both go at the rate of scattered
    copies (that of page faults). `moved` bytes are read and written in order, `work` is what is computed meanwhile.
    Backward contracts twice as often.
    """
    rates = rates_for(None)
    forward = plan.forward_seconds + gathered / rates.scatter + moved / rates.stream
    seconds = 3 * plan.forward_seconds + 2 * gathered / rates.scatter + moved / rates.stream
    total = plan.bytes + gathered + moved
    flops = plan.flops + sum(part for part, _ in work)
    return plan._replace(flops=flops, bytes=total, forward_seconds=forward, seconds=seconds, work=plan.work + work)


def gather(net: Network, flat: Tensor) -> list[Tensor]:
    """Slice every core that has row modes at the tokens' digits; the token axis comes first."""
    digits: dict[str, Any] = {}
    rest = flat
    for label, size in zip(reversed(net.rows), reversed(net.row_modes), strict=True):
        digits[label] = rest % size
        rest = rest // size
    operands = []
    for core, leg in zip(net.cores, net.legs, strict=True):
        own = [label for label in net.rows if label in leg]
        if own:
            index = torch.zeros_like(flat)
            for label in own:
                index = index * core.shape[leg.index(label)] + digits[label]
            core = rows_first(core, leg, net.rows).index_select(0, index)
        operands.append(core)
    return operands


def rows_first(core: Tensor, leg: tuple[str, ...], rows: tuple[str, ...]) -> Tensor:
    """View a core as (its row modes, in the order of the rows, as one axis; its other axes)."""
    own = [leg.index(label) for label in rows if label in leg]
    others = [axis for axis in range(core.ndim) if axis not in own]
    return core.permute(*own, *others).reshape(-1, *(core.shape[axis] for axis in others))
