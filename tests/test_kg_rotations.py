"""RotH, RefH, AttH against their formulas in the Poincaré ball, near and far; their flat twins; float32 far out."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tnlayers import hyperbolic as H
from tnlayers.kg import AttE, AttH, RefE, RefH, RotE, RotH

F64 = torch.float64
GRAPH = SimpleNamespace(num_entities=9, num_relations=6, inverse=True)
HYPERBOLIC, FLAT = [RotH, RefH, AttH], [RotE, RefE, AttE]


def stirred(kind, rng, size=0.4, dim=6, dtype=F64, **options):
    """A model in general position: other curvatures for all relations, biases and contexts that are not small."""
    model = kind(GRAPH, entity_dim=dim, dtype=F64, std=size, generator=rng, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("bias", "context", "raw")):
                parameter.normal_(generator=rng)
    return model.to(dtype)


def batch(rng, size=15):
    return [torch.randint(n, (size,), generator=rng) for n in (9, 6, 9)]


def matrix(angles, reflect):
    """Block diagonal of [[cos, -sin], [sin, cos]] or [[cos, sin], [sin, -cos]]."""
    s = -1 if reflect else 1
    return torch.block_diag(
        *(torch.tensor([[math.cos(a), -s * math.sin(a)], [math.sin(a), s * math.cos(a)]], dtype=F64) for a in angles)
    )


def turned(model, x, r):
    """Turn of one vector, by dense matrices and a softmax."""
    if not model.attention:
        return matrix(model.turn.angles[r].tolist(), model.reflect) @ x
    both = [
        matrix(part.angles[r].tolist(), k) @ x for k, part in enumerate((model.turn.rotations, model.turn.reflections))
    ]
    weights = torch.stack([model.turn.context[r] @ z for z in both]).div(math.sqrt(len(x))).softmax(0)
    return weights[0] * both[0] + weights[1] * both[1]


def by_definition(model, h, r, t):
    """The paper's score of one triple, in the Poincaré ball (or the flat space)."""
    with torch.no_grad():
        head, tail, shift = model.entities[h], model.entities[t], model.translations[r]
        first = None if model.first_translations is None else model.first_translations[r]
        bias = model.head_bias[h] + model.tail_bias[t]
        if not hasattr(model, "curvatures"):
            q = turned(model, head if first is None else head + first, r) + shift
            return bias - (q - tail).square().sum()
        c = model.curvatures()[r]
        if first is not None:
            head = H.poincare_log0(H.mobius_add(H.poincare_exp0(head, c), H.poincare_exp0(first, c), c), c)
        q = H.mobius_add(H.poincare_exp0(turned(model, head, r), c), H.poincare_exp0(shift, c), c)
        return bias - H.poincare_distance(q, H.poincare_exp0(tail, c), c).square()


@pytest.mark.parametrize("kind", HYPERBOLIC + FLAT)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("size", [1e-3, 0.4, 0.7])
def test_scores_are_the_formula(kind, first, size, rng):
    model = stirred(kind, rng, size, first_translation=first)
    h, r, t = batch(rng, 5)
    tails, heads = model.score_all(h, r), model.score_heads(r, t)
    for b in range(5):
        for e in range(9):
            assert torch.isclose(tails[b, e], by_definition(model, h[b], r[b], e), rtol=1e-8, atol=1e-10)
            assert torch.isclose(heads[b, e], by_definition(model, t[b], (r[b] + 3) % 6, e), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", HYPERBOLIC + FLAT)
def test_chunks_and_pairs_change_nothing(kind, rng):
    model = stirred(kind, rng)
    h, r, t = batch(rng)
    query = model.query(h, r)
    whole = model.against(query)
    parts = torch.cat([model.against(query, slice(a, a + 4)) for a in (0, 4, 8)], 1)
    assert torch.allclose(parts, whole, rtol=1e-12, atol=1e-12)
    some = torch.tensor([7, 0, 7])
    assert torch.allclose(model.against(query, some), whole[:, some], rtol=1e-12, atol=1e-12)
    own = torch.randint(9, (15, 3), generator=rng)
    assert torch.allclose(model.paired(query, own), whole.gather(1, own), rtol=1e-12, atol=1e-12)
    assert torch.allclose(model(h, r, t), whole.gather(1, t[:, None])[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kinds", list(zip(HYPERBOLIC, FLAT, strict=True)), ids=lambda k: k[0].__name__)
def test_the_flat_limit_is_the_twin_at_twice_the_distances(kinds, rng):
    c = 1e-9
    curved = kinds[0](GRAPH, entity_dim=6, curvature=c, std=0.5, dtype=F64, generator=rng)
    flat = kinds[1](GRAPH, entity_dim=6, dtype=F64)
    flat.load_state_dict(curved.state_dict(), strict=False)
    assert torch.allclose(curved.curvatures(), torch.full((6,), c, dtype=F64), rtol=1e-6)
    h, r, _ = batch(rng)
    assert torch.allclose(curved.score_all(h, r), 4 * flat.score_all(h, r), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", HYPERBOLIC + FLAT)
def test_gradients(kind, rng):
    model = stirred(kind, rng, dim=4, first_translation=True)
    h, r, _ = batch(rng, 3)
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model.score_all(h, r)

    scores = Scores()

    def function(*values):
        return torch.func.functional_call(scores, {f"model.{n}": v for n, v in zip(names, values, strict=True)}, ())

    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("kind", HYPERBOLIC)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gradients_where_points_meet(kind, dtype, rng):
    """Query and entity at the origin, query equal to an entity: finite, and not stuck at the origin."""
    model = kind(GRAPH, entity_dim=4, std=0.0, dtype=dtype)
    h, r, t = batch(rng)
    F.cross_entropy(model.score_all(h, r), t).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():  # the translation alone moves the query off the origin, where all entities still are
        model.translations.normal_(std=0.5, generator=rng)
        model.zero_grad()
    F.cross_entropy(model.score_all(h, r), t).backward()
    assert bool((model.entities.grad[t.unique()].norm(dim=1) > 0).all())
    with torch.no_grad():
        q = H.lorentz_log0(H.lorentz_exp0(2 * model.translations[0]))
        model.entities[3] = q / 2
    model.zero_grad()
    scores = model.score_all(torch.tensor([0]), torch.tensor([0]))
    assert abs(float(scores[0, 3].detach())) <= 20 * torch.finfo(dtype).eps * math.sinh(float(q.norm())) ** 2
    scores.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize("radius", [1.0, 4.0, 8.0, 16.0])
def test_float32_far_from_the_origin(radius, rng):
    """The stated error of sinh^2(√c d / 2), for the numbers as they are: near pairs too, where it is the worst."""
    graph = SimpleNamespace(num_entities=400, num_relations=6, inverse=True)
    model = RotH(graph, entity_dim=32, dtype=F64, generator=rng)
    with torch.no_grad():
        model.raw_curvatures.normal_(generator=rng)
        v = torch.randn(400, 32, dtype=F64, generator=rng)
        v[200:] = v[:200] + 1e-2 * v[200:]
        model.entities.copy_(
            v / v.norm(dim=1, keepdim=True) * torch.rand(400, 1, dtype=F64, generator=rng) * radius / 2
        )
        model.translations.mul_(100)
    model = model.float()
    h, r = torch.arange(400), torch.randint(6, (400,), generator=rng)
    query = model.query(h, r).detach()
    query[:200, :-2] = (
        query[:200, -2:-1] * H.lorentz_exp0(2 * model.entities[200:], 1.0).detach()[:, 1:]
    )  # near an entity
    scores = model.against(query).detach().double()
    exact = model.double().against(query.double()).detach()
    root = query[:, -2:-1].double()
    found, wanted = (torch.sinh(root / 2 * (-s).clamp_min(0).sqrt()).square() for s in (scores, exact))
    a = torch.arcsinh(query[:, :-2].double().norm(dim=1, keepdim=True))
    b = 2 * root * model.entities.detach().norm(dim=1)
    eps = torch.finfo(torch.float32).eps
    size = torch.sinh(a) * torch.sinh(b)
    # the last rounding, of the score, moves sinh^2 by d^2 eps sinh(d)
    score = eps * root.square() * -exact * (1 + wanted) * 4
    far = eps * 4 * (a - b).abs().mul(wanted + wanted.sqrt())
    assert bool(((found - wanted).abs() <= 32 * eps * (size + wanted) + score + far).all())
    shared = a + b - root * (-exact).sqrt()
    distance = root * (-exact).sqrt()
    digits = ((scores - exact).abs() <= 2e-3 * exact.abs())[(shared < 8) & (distance >= 1)]
    assert bool(digits.all())
    assert bool(torch.isfinite(scores).all())
    assert float(scores.max()) <= 0


def test_cycles_are_learned(rng):
    """Adam on all parameters, curvatures among them: a graph of one cycle a relation is fitted."""
    model = RotH(GRAPH, entity_dim=6, std=0.05, generator=rng)
    h = torch.arange(9).repeat(6)
    r = torch.arange(6).repeat_interleave(9)
    t = (h + torch.where(r < 3, r + 1, 8 - r)) % 9
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model.score_all(h, r), t).backward()
        optimizer.step()
    assert float((model.score_all(h, r).argmax(1) == t).float().mean()) > 0.9
    c = model.curvatures().detach()
    assert bool((c > 0).all())
    assert float((c - 1).abs().max()) > 0.01


def test_sizes_and_starts(rng):
    count = RotH(SimpleNamespace(num_entities=40_943, num_relations=22, inverse=True), 32).parameter_count()
    assert count == 40_943 * 34 + 22 * (32 + 16 + 1)  # 1.39 M
    fixed = RotH(GRAPH, 4, curvature=50.0, learn_curvature=False)
    assert not fixed.raw_curvatures.requires_grad
    assert torch.allclose(fixed.curvatures(), torch.tensor(50.0))
    with torch.no_grad():
        for parameter in fixed.parameters():
            parameter.fill_(float("nan"))
    fixed.reset_parameters(rng)
    assert all(bool(torch.isfinite(p).all()) for p in fixed.parameters())


def test_refusals(unchecked):
    with pytest.raises(ValueError, match=r"RotE: entity_dim must be even, as coordinates turn in pairs, got 5"):
        RotE(GRAPH, 5)
    with pytest.raises(ValueError, match=r"AttH: curvature must be a positive number, got 0"):
        AttH(GRAPH, 4, curvature=0)
    with pytest.raises(ValueError, match=r"RefH: std must be at least 0, got -1"):
        RefH(GRAPH, 4, std=-1)
    with pytest.raises(TypeError, match=r"RotH: without inverse relations this model has no query for heads"):
        RotH(SimpleNamespace(num_entities=9, num_relations=6, inverse=False), 4).query_heads(
            torch.tensor([0]), torch.tensor([0])
        )
