"""EmbeddingBag whose table is a network: a bag adds up what its tokens gather before that is contracted further."""

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Inexact, Int
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.network import Labels, dense_size
from decompositions.formats.plan import BATCH, Plan, Step, Work, bucket, plan_path, run
from tnlayers.dense import NetworkFactory, Recipe
from tnlayers.embedding import TableLayer, gather, gathered_legs, readable, reading, rows_first
from tnlayers.frozen import frozen_weight
from tnlayers.layer import Shapes, probed

MODES = ("sum", "mean", "max")
HINT_LENGTH = 16
"""Tokens in a bag that a plan is made for before the layer has seen an input."""


class BagPlan(NamedTuple):
    """`steps` contract what every token gathered, the bags are reduced, `after` contracts what they hold.

    Strategies: "merge" reduces rows of the dense table; "rows" contracts every token to its row and reduces these;
    "sums" reduces the gathered slices themselves and contracts the sums with the cores that have no row modes (sums and
    means only: they are linear).
    """

    strategy: str
    cores: tuple[int, ...]  # contracted token by token
    steps: tuple[Step, ...]
    labels: Labels  # of what is reduced, besides the token's
    others: tuple[int, ...]  # contracted bag by bag
    after: tuple[Step, ...]
    flops: int
    bytes: int
    forward_seconds: float
    seconds: float
    kept: int  # bytes of gathered slices and intermediate results that backward needs
    work: Work  # the FLOPs of each step, and the labels that they are a product of


class EmbeddingBag(TableLayer):
    """`torch.nn.EmbeddingBag` whose table (num_embeddings, embedding_dim) is a network.

    `y_b = sum over t in bag b of w_t W[token_t]`, or their mean or maximum; an empty bag gives zeros, a padding token
    counts as absent. A sum commutes with the contraction: a bag of a low-rank table adds up rows of U, of width r, and
    multiplies the sum by S V^T once. Where the table is smaller than that work it is merged; otherwise it is never
    made. As torch's, the reduction has no second derivative.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: width.
        max_norm: refused: it rewrites single rows, which share all their parameters here.
        norm_type: unused, as `max_norm` is refused.
        scale_grad_by_freq: refused, likewise.
        mode: "sum", "mean" or "max".
        sparse: refused: gradients of cores are dense (and small).
        include_last_offset: offsets end with the number of tokens.
        padding_idx: tokens with this index are left out of their bag and send no gradient.
        device: of the cores.
        dtype: of the cores.
        network: a Network, or a callable (shape, dtype, device) -> Network such as `tnlayers.random_network(...)`.
        recipe: a callable dense table -> Network.

    Raises:
        ValueError: a refused option, an unknown mode, an impossible padding_idx, a network that does not cover the
            table.
        TypeError: a complex network (torch reduces real bags only).

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.EmbeddingBag(1000, 64, mode="sum", network=tnlayers.random_network(LowRank, rank=4))
        >>> layer(torch.tensor([7, 7, 999]), torch.tensor([0, 2])).shape, layer(torch.tensor([[1, 999]])).shape
        (torch.Size([2, 64]), torch.Size([1, 64]))
    """

    dense_class = nn.EmbeddingBag
    arguments = ("num_embeddings", "embedding_dim", "mode", "include_last_offset", "padding_idx")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"EmbeddingBag: mode must be one of {MODES}, got {mode!r}")
        self.mode, self.include_last_offset, self._hint_length = mode, bool(include_last_offset), HINT_LENGTH
        refused = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        self._start_table(num_embeddings, embedding_dim, padding_idx, refused, network, recipe, dtype, device)
        if self.cores[0].is_complex():
            raise TypeError(
                f"EmbeddingBag: the network must be real, got {self.cores[0].dtype}; torch reduces real bags only"
            )

    def alternatives(self, batch: int | None = None) -> tuple[BagPlan, ...]:
        """All plans for `batch` bags of the length the stored plan was made for, best predicted first."""
        bags = batch or self._hint or 1024
        return tuple(self._bag_plans(bags * self._hint_length, bags))

    def example_input(self, batch: int) -> Tensor:
        """Bags of random tokens, of the length the stored plan was made for."""
        return torch.randint(self.num_embeddings, (batch, self._hint_length), device=self.cores[0].device)

    def _hint_sizes(self) -> tuple[int, ...]:
        return (self._hint_length,)

    def _bag_plans(self, tokens: int, bags: int) -> list[BagPlan]:
        """All plans for so many tokens in so many bags, best predicted first."""
        net = self._contracted
        legs, sizes, item = gathered_legs(net), net.sizes, net.dtype.itemsize
        per_token, per_bag = {**sizes, BATCH: tokens}, {**sizes, BATCH: bags}
        every = tuple(range(len(legs)))
        carriers = tuple(k for k in every if BATCH in legs[k])
        others = tuple(k for k in every if k not in carriers)
        wanted = set(net.cols).union(*(legs[k] for k in others))
        left = tuple(dict.fromkeys(label for k in carriers for label in legs[k] if label in wanted))

        dense = plan_path(net.legs, sizes, net.outside, item)
        rows = plan_path(legs, per_token, (BATCH, *net.cols), item)
        ways: list[tuple[str, tuple[int, ...], Labels, Plan, Plan | None]] = [
            ("merge", (), net.cols, dense, None),
            ("rows", every, net.cols, rows, None),
        ]
        if self.mode != "max":
            first = plan_path([legs[k] for k in carriers], per_token, (BATCH, *left), item)
            after = plan_path([(BATCH, *left), *(legs[k] for k in others)], per_bag, (BATCH, *net.cols), item)
            ways.append(("sums", carriers, left, first, after))
        plans = []
        for strategy, cores, labels, first, last in ways:
            width = prod(sizes[label] for label in labels)
            fused = strategy == "merge" or (len(cores) == 1 and not first.steps)  # reduced where it lies
            slices = 0 if fused else sum(prod(per_token[label] for label in legs[k]) for k in cores if k in carriers)
            first = reading(first, item * slices, item * width * (2 * tokens + bags), ((tokens * width, labels),))
            parts = [first] if last is None else [first, reading(last, 0)]
            flops, moved = sum(part.flops for part in parts), sum(part.bytes for part in parts)
            forward, seconds = sum(part.forward_seconds for part in parts), sum(part.seconds for part in parts)
            after_steps = () if last is None else last.steps
            kept = dense_size(net) if strategy == "merge" else slices + (0 if fused else tokens * width)
            plans.append(
                BagPlan(
                    strategy,
                    cores,
                    first.steps,
                    labels,
                    others,
                    after_steps,
                    flops,
                    moved,
                    forward,
                    seconds,
                    item * kept,
                    tuple(entry for part in parts for entry in part.work),
                )
            )
        return sorted(plans, key=lambda made: made.seconds)

    def _plan_for_bags(self, tokens: int, bags: int) -> BagPlan:
        """Plan for a call: the stored one while tracing, else the one of the powers of two above both counts."""
        if torch.compiler.is_compiling():
            stored: BagPlan = self._stored
            return stored
        if self._forced is not None:
            return self._forced
        key = (bucket(tokens), bucket(bags))
        plan: BagPlan | None = self._plans.get(key)
        if plan is None:
            known = probed and tokens == bags * self._hint_length
            plan = probed.get(self._probe_key(key[1])) if known else None
            plan = self._plans[key] = plan or self._bag_plans(*key)[0]
            if self._hint is None and tokens > 0 and bags > 0:
                self._hint, self._hint_length, self._stored = bags, max(1, tokens // bags), plan
        return plan

    def forward(
        self,
        tokens: Int[Tensor, "..."],
        offsets: Int[Tensor, "..."] | None = None,
        per_sample_weights: Inexact[Tensor, "..."] | None = None,
    ) -> Inexact[Tensor, "bags dim"]:
        """Reduce bags of tokens.

        Args:
            tokens: (bags, length), every bag as long, or (n,) with offsets; int64 or int32.
            offsets: where each bag starts, ascending from 0; ends with n if `include_last_offset`.
            per_sample_weights: of tokens' shape and the cores' dtype; mode "sum" only.

        Returns:
            (bags, embedding_dim).

        Raises:
            TypeError: tokens or offsets that are no integers, weights of another dtype.
            ValueError: shapes, offsets or weights that do not fit (values of offsets: eager mode on the CPU, a device
                assertion elsewhere).
            IndexError: a token out of range, likewise.
        """
        self._check_tokens(tokens)
        bounds = self._bounds(tokens, offsets)
        weights = self._sample_weights(tokens, per_sample_weights)
        return self._recomputed(lambda flat: self._bags(flat, bounds, weights), tokens.reshape(-1).long())

    def _bags(self, flat: Tensor, bounds: Tensor, weights: Tensor | None) -> Tensor:
        net, bags = self._contracted, bounds.shape[0] - 1
        if (table := frozen_weight(self)) is not None:
            return self._reduce(table, flat, bounds, weights, self.padding_idx)
        plan = self._plan_for_bags(flat.shape[0], bags)
        if plan.strategy == "merge":
            table = self._dense().reshape(prod(self._row_modes), -1)
            return self._reduce(table, flat, bounds, weights, self.padding_idx)[:, : self.embedding_dim]
        sizes = net.sizes
        inner = [sizes[label] for label in plan.labels]
        if not plan.steps and len(plan.cores) == 1:  # one core holds all row modes: it is reduced where it lies
            (k,) = plan.cores
            slices = rows_first(net.cores[k], net.legs[k], net.rows).flatten(1)
            y = self._reduce(slices, flat, bounds, weights, self.padding_idx)
        else:
            index, padding = torch.arange(flat.shape[0], device=flat.device), None
            if self.padding_idx is not None:  # gathered once, in front: where all padding tokens point
                padding, index = 0, torch.where(torch.eq(flat, self.padding_idx), 0, index + 1)
                flat = torch.cat([flat.new_full((1,), self.padding_idx), flat])
            operands = gather(net, flat)
            rows = run(plan.steps, [operands[k] for k in plan.cores]).reshape(flat.shape[0], prod(inner))
            y = self._reduce(rows, index, bounds, weights, padding)
        if plan.strategy == "sums":
            y = run(plan.after, [y.reshape(bags, *inner), *(net.cores[k] for k in plan.others)])
        return y.reshape(bags, prod(self._col_modes))[:, : self.embedding_dim]

    def _reduce(
        self, rows: Tensor, index: Tensor, bounds: Tensor, weights: Tensor | None, padding: int | None
    ) -> Tensor:
        """Sum, mean or maximum of `rows[index]` within every bag, by torch's fused kernel."""
        if weights is not None:
            weights = weights.reshape(-1).to(rows.dtype)
        return F.embedding_bag(
            index,
            rows,
            bounds,
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=True,
            padding_idx=padding,
        )

    def _bounds(self, tokens: Tensor, offsets: Tensor | None) -> Tensor:
        """Where bags begin and end, (bags + 1,), from what the user gave."""
        if tokens.ndim == 2:
            if offsets is not None:
                raise ValueError(
                    f"EmbeddingBag: tokens of 2 axes (bags, length) take no offsets, got {tuple(offsets.shape)}"
                )
            return torch.arange(tokens.shape[0] + 1, device=tokens.device) * tokens.shape[1]
        if tokens.ndim != 1:
            raise ValueError(
                f"EmbeddingBag: tokens must be (bags, length) or (n,) with offsets, got shape {tuple(tokens.shape)}"
            )
        if offsets is None or offsets.ndim != 1:
            got = None if offsets is None else tuple(offsets.shape)
            raise ValueError(f"EmbeddingBag: tokens of 1 axis need offsets of 1 axis, got {got}")
        if offsets.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"EmbeddingBag: offsets must be int64 or int32, got {offsets.dtype}")
        if self.include_last_offset and offsets.shape[0] == 0:
            raise ValueError("EmbeddingBag: include_last_offset needs at least one offset, got none")
        bounds = offsets.long()
        if not self.include_last_offset:
            bounds = torch.cat([bounds, bounds.new_full((1,), tokens.shape[0])])
        if not torch.compiler.is_compiling():
            _check_bounds(bounds, tokens.shape[0])
        return bounds

    def _sample_weights(self, tokens: Tensor, weights: Tensor | None) -> Tensor | None:
        if weights is None:
            return None
        if self.mode != "sum":
            raise ValueError(f"EmbeddingBag: per_sample_weights needs mode='sum', got mode={self.mode!r}")
        if weights.shape != tokens.shape:
            raise ValueError(
                f"EmbeddingBag: per_sample_weights must have the shape of tokens, expected {tuple(tokens.shape)}, "
                f"got {tuple(weights.shape)}"
            )
        if weights.dtype != self.cores[0].dtype:
            raise TypeError(
                f"EmbeddingBag: per_sample_weights must have the dtype of the cores, expected {self.cores[0].dtype}, "
                f"got {weights.dtype}"
            )
        return weights

    def flops(self, batch: int = 1, length: int = HINT_LENGTH) -> int:
        """Multiply-adds times two of reducing `batch` bags of `length` tokens, additions of the bags counted."""
        return self._bag_plans(batch * length, batch)[0].flops

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Additions of one bag of a dense table."""
        return _length(seen) * weight_shape[1]

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        """One bag."""
        return self._bag_plans(_length(seen), 1)[0], 1

    def output_bound(self, difference: Tensor) -> float:
        """Bound of `‖y - y'‖` for one token of weight 1, and for a mean: the largest row norm of the difference.

        Of a maximum, whose coordinates come from different tokens: the norm of the largest entry of every column.
        """
        wide = difference.double()
        if self.mode == "max":
            return float(torch.linalg.vector_norm(wide.abs().amax(0)))
        return float(torch.linalg.vector_norm(wide, dim=1).max())

    def plan_for_shapes(self, seen: Shapes) -> None:
        """Make the stored plan for a call with these shapes: so many bags of so many tokens."""
        self._hint_length = _length(seen)
        self.plan(batch=max(1, seen.output[0]))

    def extra_repr(self) -> str:
        """Sizes, mode, padding, format and equation."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        last = ", include_last_offset=True" if self.include_last_offset else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}{last}{padding}, {self._repr_network()}"


def _length(seen: Shapes | None) -> int:
    """Tokens of one bag, on average."""
    return HINT_LENGTH if seen is None else max(1, prod(seen.input) // max(1, seen.output[0]))


def _check_bounds(bounds: Tensor, tokens: int) -> None:
    """Torch reads memory of others where offsets descend: they must not pass."""
    if not readable(bounds):
        return
    fine = (bounds[0] == 0) & (bounds[-1] == tokens) & (bounds.diff() >= 0).all()
    if bounds.device.type != "cpu":
        torch._assert_async(fine)  # without waiting for the device, as torch's own index kernels do
    elif not bool(fine):
        raise ValueError(
            f"EmbeddingBag: offsets must ascend from 0 to the number of tokens, {tokens}, got {bounds.tolist()[:8]} "
            "(the end appended unless include_last_offset)"
        )
