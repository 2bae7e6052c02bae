"""Relations as rotations, reflections and translations of hyperbolic space (RotH, RefH, AttH) or of flat space.

The parameters of an entity are a vector e of the tangent space at the origin. It stands for the point exp_0(e) of the
Poincaré ball, at distance 2 |e|, of *every* curvature: each relation trains a curvature c_r of its own, and entities
are compared with a query in that query's space. All that is computed in the Lorentz model, whose points have no edge.
"""

from math import expm1, log, pi
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tnlayers.dense import exactly
from tnlayers.hyperbolic import lorentz_add, lorentz_exp0, lorentz_log0
from tnlayers.kg.model import Entities, KGModel
from tnlayers.poincare import _root


class Rotations(nn.Module):
    """An angle for every relation and pair of coordinates: `(cos a x - sin a y, sin a x + cos a y)`, or reflections.

    With `reflect`, `(cos a x + sin a y, sin a x - cos a y)`. Parameters: num_relations dim / 2, uniform in [-π, π].

    Example:
        >>> import torch
        >>> turn, x = Rotations(3, 4), torch.ones(2, 4)
        >>> torch.allclose(turn(x, torch.tensor([0, 2])).norm(dim=1), x.norm(dim=1))
        True
    """

    def __init__(self, num_relations: int, dim: int, *, reflect: bool = False, **factory: Any) -> None:
        super().__init__()
        self.reflect = reflect
        self.angles = nn.Parameter(torch.empty(num_relations, dim // 2, **factory))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the angles anew."""
        nn.init.uniform_(self.angles, -pi, pi, generator=generator)

    def forward(self, x: Float[Tensor, "B d"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B d"]:
        """Turn row b by the angles of its relation."""
        angles = self.angles[relations]
        cos, sin = angles.cos(), angles.sin()
        first, second = x[:, 0::2], x[:, 1::2]
        if self.reflect:
            second = -second
        return torch.stack([cos * first - sin * second, sin * first + cos * second], -1).flatten(1)


class RotationsAndReflections(nn.Module):
    """`p Rot x + (1 - p) Ref x` with attention: p / (1 - p) = exp(<a_r, Rot x - Ref x> / sqrt(d)).

    Example:
        >>> import torch
        >>> mix, x = RotationsAndReflections(3, 4), torch.ones(2, 4)
        >>> bool((mix(x, torch.tensor([0, 2])).norm(dim=1) <= x.norm(dim=1)).all())
        True
    """

    def __init__(self, num_relations: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.rotations, self.reflections = (Rotations(num_relations, dim, reflect=k, **factory) for k in (False, True))
        self.context = nn.Parameter(torch.empty(num_relations, dim, **factory))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw angles and contexts anew."""
        self.rotations.reset_parameters(generator)
        self.reflections.reset_parameters(generator)
        nn.init.normal_(self.context, std=1e-3, generator=generator)

    def forward(self, x: Float[Tensor, "B d"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B d"]:
        """Mix row b by its relation."""
        rotated, reflected = self.rotations(x, relations), self.reflections(x, relations)
        difference = rotated - reflected
        weight = ((self.context[relations] * difference).sum(1, keepdim=True) * x.shape[1] ** -0.5).sigmoid()
        return reflected + weight * difference


class _Turned(KGModel):
    """What the six models share: tables of entities, translations and biases, and a kind of turn."""

    reflect: ClassVar[bool] = False
    attention: ClassVar[bool] = False

    def __init__(
        self,
        triples: Any,
        entity_dim: int = 32,
        *,
        first_translation: bool = False,
        std: int | float = 1e-3,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
        name = type(self).__name__
        if entity_dim < 2 or entity_dim % 2:
            raise ValueError(f"{name}: entity_dim must be even, as coordinates turn in pairs, got {entity_dim}")
        if not std >= 0:
            raise ValueError(f"{name}: std must be at least 0, got {std}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.std = std
        self.entities = nn.Parameter(torch.empty(self.num_entities, entity_dim, **factory))
        self.translations = nn.Parameter(torch.empty(self.num_relations, entity_dim, **factory))
        self.first_translations = (
            nn.Parameter(torch.empty(self.num_relations, entity_dim, **factory)) if first_translation else None
        )
        self.head_bias, self.tail_bias = (nn.Parameter(torch.empty(self.num_entities, **factory)) for _ in range(2))
        self.turn: RotationsAndReflections | Rotations = (
            RotationsAndReflections(self.num_relations, entity_dim, **factory)
            if self.attention
            else Rotations(self.num_relations, entity_dim, reflect=self.reflect, **factory)
        )
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw everything anew, as at the start: tangent vectors at `std`, biases zero."""
        for table in (self.entities, self.translations, self.first_translations):
            if table is not None:
                nn.init.normal_(table, std=self.std, generator=generator)
        nn.init.zeros_(self.head_bias)
        nn.init.zeros_(self.tail_bias)
        self.turn.reset_parameters(generator)

    def against(self, query: Float[Tensor, "B e"], entities: Entities = None) -> Float[Tensor, "B n"]:
        """See `KGModel`: one product (B, d) x (d, n), and elementwise functions of it."""
        if entities is None:
            return self._compare(query, self.entities, self.tail_bias)
        return self._compare(query, self.entities[entities], self.tail_bias[entities])

    def paired(self, query: Float[Tensor, "B e"], tails: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """See `KGModel`."""
        return self._compare(query, self.entities[tails], self.tail_bias[tails])

    def _compare(self, query: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__}: a model must compare queries with entities")


class RotE(_Turned):
    """`-|q - e_t|^2 + b_h + b_t` with q = Rot(r) e_h + r: the flat twin of RotH.

    Args:
        triples: whose num_entities, num_relations and inverse are read.
        entity_dim: d, even.
        first_translation: translate by a vector of the relation before the rotation too.
        std: of entities and translations at the start.
        generator: source of randomness of the start.
        device: of all parameters.
        dtype: of all parameters.

    Raises:
        ValueError: an odd entity_dim.

    References:
        I. Chami, A. Wolf, D.-C. Juan, F. Sala, S. Ravi, C. Re, Low-dimensional hyperbolic knowledge graph embeddings,
        ACL 2020, arXiv 2005.00545.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> model = RotE(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), entity_dim=6)
        >>> model.score_all(torch.tensor([0, 1]), torch.tensor([3, 2])).shape
        torch.Size([2, 7])
    """

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B d1"]:
        """See `KGModel`: q and the bias of the head, (B, d + 1)."""
        x = self.entities[heads]
        if self.first_translations is not None:
            x = x + self.first_translations[relations]
        q = self.turn(x, relations) + self.translations[relations]
        return torch.cat([q, self.head_bias[heads][:, None]], 1)

    def _compare(self, query: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        with exactly(table.device):
            q, own = query[:, :-1], query[:, -1:] - query[:, :-1].square().sum(1, keepdim=True)
            return own + 2 * _products(q, table) + (bias - table.square().sum(-1))


class RefE(RotE):
    """RotE with reflections `(cos a x + sin a y, sin a x - cos a y)` in place of rotations.

    Example:
        >>> from types import SimpleNamespace
        >>> RefE(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), entity_dim=6).parameter_count()
        92
    """

    reflect = True


class AttE(RotE):
    """RotE with rotations and reflections mixed by attention, see `RotationsAndReflections`.

    Example:
        >>> from types import SimpleNamespace
        >>> AttE(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), entity_dim=6).parameter_count()
        128
    """

    attention = True


class RotH(_Turned):
    """`-d(q, e_t)^2 + b_h + b_t` with q = Rot(r) e_h ⊕ r in hyperbolic space of the relation's curvature.

    Entities and translations are tangent vectors at the origin, mapped by the exponential map of the Poincaré ball,
    `tanh(√c |e|) e / (√c |e|)`, at distance 2 |e|; ⊕ is the Möbius sum, d the geodesic distance; for c -> 0 the score
    is that of RotE with distances doubled. Ordinary optimizers act: nothing can leave the space.

    A query meets all entities by the law of cosines in half angles, `sinh^2(√c d / 2) = sinh^2((a - b) / 2) +
    sinh a sinh b (1 - cos θ) / 2` with a, b = √c times the distances from the origin and θ the angle between. It
    cancels nowhere but in 1 - cos θ, which one matrix product has to within d_e eps: sinh^2 errs by d_e eps sinh a
    sinh b at most. So √c d >= 1 has three digits in float32 while a + b - √c d, twice the length that the geodesics
    from the origin share, is below 8 (in float64: 27).

    Without inverse relations (?, r, t) takes a query for every head: x -> x ⊕ r is no isometry, so that r cannot be
    moved to the tail's side of the distance. In Lorentz coordinates <x ⊕ r, y> has the term (x·r) (x·y), quadratic in
    the head: two products with all heads, whose sum cancels where half angles do not. Attention is not linear either.

    Args:
        triples: whose num_entities, num_relations and inverse are read.
        entity_dim: d_e, even.
        curvature: c > 0 of every relation at the start; trained as softplus of a parameter.
        learn_curvature: whether it is trained.
        first_translation: translate before the rotation too, as the authors' code of RotH (not the paper) does.
        std: of entities and translations at the start.
        generator: source of randomness of the start.
        device: of all parameters.
        dtype: of all parameters; the published runs are in float64.

    Raises:
        ValueError: an odd entity_dim, a curvature that is not positive.

    References:
        I. Chami, A. Wolf, D.-C. Juan, F. Sala, S. Ravi, C. Re, Low-dimensional hyperbolic knowledge graph embeddings,
        ACL 2020, arXiv 2005.00545.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> model = RotH(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), entity_dim=6)
        >>> model.score_all(torch.tensor([0, 1]), torch.tensor([3, 2])).shape, model.curvatures().detach()
        (torch.Size([2, 7]), tensor([1., 1., 1., 1.]))
    """

    def __init__(
        self,
        triples: Any,
        entity_dim: int = 32,
        *,
        curvature: int | float = 1.0,
        learn_curvature: bool = True,
        first_translation: bool = False,
        std: int | float = 1e-3,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < curvature < float("inf"):
            raise ValueError(f"{type(self).__name__}: curvature must be a positive number, got {curvature}; take 1.0")
        self._start_curvature = float(curvature)
        super().__init__(
            triples,
            entity_dim,
            first_translation=first_translation,
            std=std,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.raw_curvatures = nn.Parameter(
            self.translations.new_empty(self.num_relations), requires_grad=learn_curvature
        )
        self._reset_curvatures()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw everything anew, as at the start."""
        super().reset_parameters(generator)
        self._reset_curvatures()

    def _reset_curvatures(self) -> None:
        if "raw_curvatures" in self._parameters:
            c = self._start_curvature  # softplus is the identity far out
            nn.init.constant_(self.raw_curvatures, log(expm1(c)) if c < 30 else c)

    def curvatures(self) -> Float[Tensor, "R"]:
        """Curvature c_r > 0 of every relation's space."""
        return F.softplus(self.raw_curvatures)

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B d2"]:
        """See `KGModel`: √c times the space part of q in Lorentz coordinates, √c, the bias of the head: (B, d + 2)."""
        c, x = self.curvatures()[relations], self.entities[heads]
        if self.first_translations is not None:
            start = lorentz_add(lorentz_exp0(2 * x, c), lorentz_exp0(2 * self.first_translations[relations], c), c)
            x = lorentz_log0(start, c) / 2
        turned = lorentz_exp0(2 * self.turn(x, relations), c)
        q = lorentz_add(turned, lorentz_exp0(2 * self.translations[relations], c), c)
        root = c.sqrt()[:, None]
        return torch.cat([root * q[:, 1:], root, self.head_bias[heads][:, None]], 1)

    def _compare(self, query: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        with exactly(table.device):
            w, root, own = query[:, :-2], query[:, -2:-1], query[:, -1:]
            size = _root(w.square().sum(1, keepdim=True))
            norms = _root(table.square().sum(-1)).clamp_min(torch.finfo(table.dtype).tiny ** 0.5)
            angles = _products(torch.cat([size, -w], 1), F.pad(table / norms[..., None], (1, 0), value=1.0))
            lengths = _products(root, norms[..., None])
            # sinh^2((a - b) / 2) + sinh a sinh b (1 - cos θ) / 2 with sinh a = size and b = 2 lengths
            apart = torch.sinh(torch.arcsinh(size) / 2 - lengths).square() + torch.sinh(2 * lengths) * angles / 2
            return own + bias - 4 / root.square() * _SquareArcsinh.apply(apart)


class RefH(RotH):
    """RotH with reflections in place of rotations.

    Example:
        >>> from types import SimpleNamespace
        >>> RefH(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), entity_dim=6).parameter_count()
        96
    """

    reflect = True


class AttH(RotH):
    """RotH with rotations and reflections mixed by attention in the tangent space, see `RotationsAndReflections`.

    Example:
        >>> from types import SimpleNamespace
        >>> AttH(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), entity_dim=6).parameter_count()
        132
    """

    attention = True


def _products(q: Tensor, table: Tensor) -> Tensor:
    """(B, d) with a table (n, d) of all rows, or (B, k, d) of each."""
    return q @ table.mT if table.ndim == 2 else (table @ q[..., None])[..., 0]


class _SquareArcsinh(torch.autograd.Function):
    """arsinh(√x)^2, smooth at 0; what rounding has made negative counts as 0, with the gradient there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0).sqrt_().arcsinh_().square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x = x.clamp_min(torch.finfo(x.dtype).tiny)  # arsinh(√x) / sqrt(x (1 + x)) is 1 there
        return gradient * x.sqrt().arcsinh_() * torch.rsqrt(x) * torch.rsqrt(1 + x)
