"""The Lorentz interaction against distances, its flat limit, and the layer on top of it: any optimizer, any network."""

import pytest
import torch
from torch import nn

import tnlayers
from decompositions import TT, TTMatrix, Tucker, to_dense
from tnlayers import hyperbolic as H
from tnlayers import lorentz_interaction as L

F64 = torch.float64


def by_distances(u, t, v, c, normalized=True):
    """Spec: S = [D(u,t) + D(0,v) - D(u,v) - D(t,v) - D(0,u) - D(0,t)] / (u0 t0 + u0 v0 + t0 v0), all pairs."""
    u, t, v = u[:, None], t[:, None], v[None]
    u, t, v = (x.expand(len(u), v.shape[1], -1) for x in (u, t, v))
    u, t, v, o = (H.lift(x, c) for x in (u, t, v, torch.zeros_like(u)))

    def half(x, y):
        return H.lorentz_square_distance(x, y, c) / 2

    numerator = half(u, t) + half(o, v) - half(u, v) - half(t, v) - half(o, u) - half(o, t)
    u0, t0, v0 = (x[..., 0] for x in (u, t, v))
    return numerator / (u0 * t0 + u0 * v0 + t0 * v0) if normalized else numerator


def triple(rng, d=5, scale=1.0, dtype=F64):
    return [(torch.randn(n, d, dtype=F64, generator=rng) * scale).to(dtype) for n in (4, 4, 7)]


@pytest.mark.parametrize("c", [0.3, 1.0, 1 / 1.3, 4.0])
@pytest.mark.parametrize("normalized", [True, False])
def test_one_product_is_the_six_distances(c, normalized, rng):
    u, t, v = triple(rng)
    found = L.interaction_scores(L.interaction_query(u, t, c), v, c, normalized=normalized)
    assert torch.allclose(found, by_distances(u, t, v, c, normalized), rtol=1e-12, atol=1e-13)
    own = L.interaction_scores(L.interaction_query(u, t, c), v[None].expand(4, -1, -1), c, normalized=normalized)
    assert torch.allclose(own, found, rtol=1e-13)
    # the other two places: u of all, and t of all, as both forms are symmetric in u and t
    for k in range(4):
        heads = L.interaction_scores(L.interaction_inverse_query(t[:1], v[:1], c), u, c, normalized=normalized)
        assert torch.allclose(heads[0, k], by_distances(u[k : k + 1], t[:1], v[:1], c, normalized), rtol=1e-12)
        relations = L.interaction_scores(L.interaction_inverse_query(u[:1], v[:1], c), t, c, normalized=normalized)
        assert torch.allclose(relations[0, k], by_distances(u[:1], t[k : k + 1], v[:1], c, normalized), rtol=1e-12)


def test_the_published_numerator_at_curvature_one(rng):
    """u0t0 - u.t - u0v0 + u.v - t0v0 + t.v - u0 - t0 + v0 + 2, as the repository of the paper writes it."""
    u, t, v = triple(rng)
    u0, t0, v0 = ((1 + x.square().sum(1)).sqrt() for x in (u, t, v))
    rows = u0 * t0 - (u * t).sum(1) - u0 - t0 + 2
    published = rows[:, None] - (u0 + t0)[:, None] * v0 + (u + t) @ v.T + v0
    assert torch.allclose(L.interaction_scores(L.interaction_query(u, t, 1.0), v, 1.0, normalized=False), published)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_flat_limit_is_a_translation_score(dtype, rng):
    """N -> -|u + t - v|^2 / 2 at the rate of c, also in float32, where 1/c is 1e12."""
    u, t, v = triple(rng, scale=0.6, dtype=dtype)
    limit = -(u + t)[:, None].sub(v[None]).square().sum(-1) / 2
    errors = []
    for c in (1e-2, 1e-4, 1e-12):
        found = L.interaction_scores(L.interaction_query(u, t, c), v, c, normalized=False)
        errors.append(float((found - limit).abs().max()))
    assert errors[2] <= (20 * torch.finfo(dtype).eps + 1e-12) * float(limit.abs().max())
    if dtype == F64:
        assert 95 < errors[0] / errors[1] < 105
        # S c -> N / 3: the order of outputs is that of the translation
        order = L.interaction_scores(L.interaction_query(u, t, 1e-10), v, 1e-10).argsort(1)
        assert torch.equal(order, limit.argsort(1))


def test_scores_are_bounded_and_exact_far_out(rng):
    """Coordinates up to 1e4 in float32: S errs by a few eps, although N is of the size 1e8."""
    for scale in (1e-3, 1.0, 1e2, 1e4):
        u, t, v = triple(rng, scale=scale, dtype=torch.float32)
        found = L.interaction_scores(L.interaction_query(u, t, 1.0), v, 1.0)
        exact = by_distances(u.double(), t.double(), v.double(), 1.0)
        assert float((found - exact).abs().max()) <= 20 * torch.finfo(torch.float32).eps
        assert float(found.abs().max()) <= 3


def test_gradients_of_the_interaction(rng):
    u, t, v = (x[:3, :2].requires_grad_() for x in triple(rng))
    c = torch.tensor(0.7, dtype=F64, requires_grad=True)
    for normalized in (True, False):
        assert torch.autograd.gradcheck(
            lambda u, t, v, c, n=normalized: L.interaction_scores(L.interaction_query(u, t, c), v, c, normalized=n),
            (u, t, v, c),
        )


# --- Bilinear ---


@pytest.mark.parametrize(
    "network",
    [
        tnlayers.random_network(Tucker, rank=(3, 2, 2)),
        tnlayers.random_network(TT, rank=3),
        tnlayers.random_network(TTMatrix, rank=2, row_modes=(2, 3, 1), col_modes=(2, 2, 5)),
    ],
)
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3)])
def test_bilinear_is_torchs(network, batch, rng):
    layer = tnlayers.Bilinear(4, 5, 6, dtype=F64, network=network)
    dense = layer.to_dense_module()
    assert isinstance(dense, nn.Bilinear)
    x1, x2 = (torch.randn(*batch, n, dtype=F64, generator=rng, requires_grad=True) for n in (4, 5))
    y = layer(x1, x2)
    assert torch.allclose(y, dense(x1, x2), atol=1e-13)
    if 0 not in batch:
        g = torch.randn(y.shape, dtype=F64, generator=rng)
        cores = torch.autograd.grad(y, [x1, x2, *layer.cores], g)
        same = torch.autograd.grad(dense(x1, x2), [x1, x2, dense.weight], g)
        assert torch.allclose(cores[0], same[0])
        assert torch.allclose(cores[1], same[1])
        pulled = torch.autograd.grad(layer.weight, list(layer.cores), same[2])
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(cores[2:], pulled, strict=True))
        layer.plan(memory="recompute")
        again = torch.autograd.grad(layer(x1, x2), list(layer.cores), g)
        assert all(torch.allclose(a, b) for a, b in zip(cores[2:], again, strict=True))


def test_bilinear_starts_like_torchs_and_is_explained(tmp_path, rng):
    torch.manual_seed(0)
    layer = tnlayers.Bilinear(20, 30, 40, network=tnlayers.random_network(Tucker, rank=8))
    torch_std = float(nn.Bilinear(20, 30, 40).weight.detach().std())
    assert abs(float(layer.weight.detach().square().mean().sqrt()) / torch_std - 1) < 0.05
    assert "FLOPs" in tnlayers.explain(layer, batch=16, measured=True)
    file = tmp_path / "layer.safetensors"
    tnlayers.save(layer, file)
    loaded = tnlayers.load(file, model=tnlayers.Bilinear(20, 30, 40, network=tnlayers.random_network(Tucker, rank=3)))
    assert torch.equal(loaded.weight, layer.weight)


def test_bilinear_refusals():
    factory = tnlayers.random_network(Tucker, rank=2)
    with pytest.raises(ValueError, match=r"rows 6 and columns 4, 5 \(or split ones\), got rows \(6,\) and columns \(5"):
        tnlayers.Bilinear(4, 5, 6, network=Tucker.random(row_modes=(6,), col_modes=(5, 4), rank=2))
    with pytest.raises(ValueError, match="widths must be at least 1, got in1 = 0"):
        tnlayers.Bilinear(0, 5, 6, network=factory)
    layer = tnlayers.Bilinear(4, 5, 6, network=factory)
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(3, 5\)"):
        layer(torch.ones(2, 4), torch.ones(3, 5))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Bilinear, got Linear"):
        tnlayers.Bilinear.from_dense(nn.Linear(2, 2), lambda w: w)


# --- the layer ---


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_layer_is_the_sum_of_its_parts(learn, batch, rng):
    layer = tnlayers.HyperbolicTucker(4, 5, 6, 3, 0.8, hyperbolic_dim=3, dtype=F64, learn_curvature=learn)
    x1, x2 = (torch.randn(*batch, n, dtype=F64, generator=rng) for n in (4, 5))
    u, t = (m(x).reshape(-1, 3) for m, x in ((layer.first, x1), (layer.second, x2)))
    expected = torch.stack([by_distances(u[i : i + 1], t[i : i + 1], layer.points, 0.8)[0] for i in range(len(u))])
    expected = expected.reshape(*batch, 6) + layer.tucker.to_dense_module()(x1, x2)
    assert torch.allclose(layer(x1, x2), expected, atol=1e-12)
    assert ("curvature.log_curvature" in layer.state_dict()) == learn
    assert torch.allclose(layer.lorentz_points(), H.lift(layer.points, 0.8))


def test_gradients_of_the_layer(rng):
    layer = tnlayers.HyperbolicTucker(3, 2, 4, 2, hyperbolic_dim=2, dtype=F64, learn_curvature=True)
    x1, x2 = (torch.randn(2, n, dtype=F64, generator=rng, requires_grad=True) for n in (3, 2))
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def function(x1, x2, *values):
        named = dict(zip(dict(layer.named_parameters()), values, strict=True))
        return torch.func.functional_call(layer, named, (x1, x2))

    assert torch.autograd.gradcheck(function, (x1, x2, *values))


@pytest.mark.parametrize("kind", ["network", "layer", "dense"])
def test_a_zero_start_leaves_the_order_of_scores(kind, rng):
    net = Tucker.random(row_modes=(50,), col_modes=(6, 5), rank=4, generator=rng, dtype=F64)
    layer = tnlayers.Bilinear(6, 5, 50, network=net)
    source = {"network": net, "layer": layer, "dense": layer.to_dense_module()}[kind]
    made = tnlayers.HyperbolicTucker.from_tucker(source, curvature=1 / 1.3)
    x1, x2 = (torch.randn(64, n, generator=rng, dtype=F64) for n in (6, 5))
    added = made.interaction(x1, x2)
    assert torch.equal(added, added[:, :1].expand_as(added))
    before = layer(x1, x2) if kind != "network" else made.tucker(x1, x2)
    assert torch.equal(made(x1, x2).argsort(stable=True, dim=1), before.argsort(stable=True, dim=1))
    made(x1, x2)[:, 3].sum().backward()
    assert float(made.points.grad[3].norm()) > 0  # and it can leave the start


def optimizers():
    yield "RankAdaptive", lambda m: tnlayers.RankAdaptive(m, lr=0.02, tol=0.05)
    yield "RiemannianSGD", lambda m: tnlayers.RiemannianSGD(m, lr=0.05)
    yield "RiemannianAdam", lambda m: tnlayers.RiemannianAdam(m, lr=0.02)
    yield "Adam", lambda m: torch.optim.Adam(m.parameters(), lr=0.02)


@pytest.mark.parametrize(("name", "make"), list(optimizers()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_optimizer_acts_on_the_core_and_the_points(name, make, rng):
    torch.manual_seed(3)
    layer = tnlayers.HyperbolicTucker(6, 5, 7, 3, hyperbolic_dim=4)
    target = tnlayers.HyperbolicTucker(6, 5, 7, 2, hyperbolic_dim=4, std=1.0)
    optimizer = make(layer)
    x1, x2 = (torch.randn(64, n, generator=rng) for n in (6, 5))
    with torch.no_grad():
        y = target(x1, x2)
        start, points = to_dense(layer.tucker.network).clone(), layer.points.clone()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x1, x2) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    net = tnlayers.compact(layer).tucker.network
    assert not torch.allclose(to_dense(net), start)
    assert not torch.allclose(layer.points, points)


def test_points_stay_on_the_hyperboloid_for_ten_thousand_steps(rng):
    """Whatever an optimizer does to the parameters: -x_0^2 + |x|^2 = -1/c to 1e-6 of x_0^2, in float32."""
    layer = tnlayers.HyperbolicTucker(2, 2, 3, 1, 0.7, hyperbolic_dim=2, bias=False, learn_curvature=True)
    layer.tucker.requires_grad_(False)
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    x1, x2 = torch.randn(2, 4, 2, generator=rng)
    picked = torch.tensor([0, 1, 2, 0])
    start = layer.lorentz_points().detach()
    for _ in range(10_000):
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(layer.interaction(x1, x2), picked).backward()
        optimizer.step()
    points = layer.lorentz_points().detach()
    assert float((points - start).norm()) > 0.1
    exact, c = points.double(), float(layer.curvature())
    drift = (H.lorentz_inner(exact, exact) + 1 / c).abs() / exact[:, 0].square()
    assert float(drift.max()) <= 1e-6


def test_autocast_leaves_the_points_in_float32(rng):
    layer = tnlayers.HyperbolicTucker(4, 5, 6, 2, hyperbolic_dim=3)
    x1, x2 = (torch.randn(3, n, generator=rng) for n in (4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer.interaction(x1, x2)
    assert low.dtype == torch.float32
    assert torch.allclose(low, layer.interaction(x1, x2), atol=0.02)


def test_resets_and_copies(rng):
    layer = tnlayers.HyperbolicTucker(4, 5, 6, 2, hyperbolic_dim=3, learn_curvature=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    layer.reset_parameters(rng)
    assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())
    other = tnlayers.HyperbolicTucker(4, 5, 6, 3, hyperbolic_dim=3, learn_curvature=True)
    other.load_state_dict(layer.state_dict())  # adopts the ranks
    x1, x2 = (torch.randn(3, n, generator=rng) for n in (4, 5))
    assert torch.equal(layer(x1, x2), other(x1, x2))


def test_refusals():
    with pytest.raises(ValueError, match=r"exactly one of rank, network and recipe, got rank=None"):
        tnlayers.HyperbolicTucker(4, 5, 6)
    with pytest.raises(ValueError, match=r"c must be a positive number .* got -1"):
        tnlayers.HyperbolicTucker(4, 5, 6, 2, -1)
    with pytest.raises(ValueError, match=r"hyperbolic_dim=0 and std=0.2"):
        tnlayers.HyperbolicTucker(4, 5, 6, 2, hyperbolic_dim=0)
    with pytest.raises(ValueError, match=r"network of order 3, modes \(out, in1, in2\), got \(4, 4\)"):
        tnlayers.HyperbolicTucker.from_tucker(Tucker.random(row_modes=(4,), col_modes=(4,), rank=2))
    with pytest.raises(TypeError, match=r"a network or a bilinear layer, got Linear"):
        tnlayers.HyperbolicTucker.from_tucker(nn.Linear(2, 2))
