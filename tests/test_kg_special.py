"""Special networks against their formulas and against their own networks; MEIM against block terms."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tnlayers
from decompositions import TTMatrix, to_dense
from tnlayers.kg import CP, MEIM, RESCAL, ComplEx, DistMult, SimplE
from tnlayers.kg.meim import BlockMaps

GRAPH = SimpleNamespace(num_entities=11, num_relations=6, inverse=True)
B, D = 24, 5


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(size=B):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(n, (size,), generator=g) for n in (11, 6, 11)]


def distmult(e, w, h, r, t):
    return (e[h] * w[r] * e[t]).sum(-1)


def cp(e, w, h, r, t):
    return (e[h, :D] * w[r] * e[t, D:]).sum(-1)


def simple(e, w, h, r, t):
    forth = (e[h, :D] * w[r, :D] * e[t, D:]).sum(-1)
    back = (e[t, :D] * w[r, D:] * e[h, D:]).sum(-1)
    return (forth + back) / 2


def complex_(e, w, h, r, t):
    e, w = (torch.complex(x[:, :D], x[:, D:]) for x in (e, w))
    return (e[h] * w[r] * e[t].conj()).sum(-1).real


FORMULAS = {DistMult: distmult, CP: cp, SimplE: simple, ComplEx: complex_}
TABLES = {"dense": "dense", "network": tnlayers.random_network(TTMatrix, rank=3, order=2)}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("table", TABLES)
def test_scores_are_those_of_the_formula_and_of_the_network(kind, table):
    model = kind(GRAPH, D, entity_table=TABLES[table])
    h, r, t = batch()
    every = torch.arange(11)
    expected = FORMULAS[kind](model.entities.weight, model.relations.weight, h[:, None], r[:, None], every[None])
    scores = model.score_all(h, r)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(to_dense(model.network)[r, h], expected)
    torch.testing.assert_close(model(h, r, t), expected.gather(1, t[:, None])[:, 0])
    torch.testing.assert_close(model.against(model.query(h, r), slice(2, 7)), expected[:, 2:7])
    torch.testing.assert_close(model.score_relations(h, t), to_dense(model.network)[:3, h, t].T)
    parameters, weight = list(model.parameters()), torch.randn(B, 11)
    wanted = torch.autograd.grad((expected * weight).sum(), parameters)
    found = torch.autograd.grad((scores * weight).sum(), parameters)
    for g, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, e)


def test_symmetry_tells_the_models_apart():
    h, r, t = batch()
    assert torch.allclose((m := DistMult(GRAPH, D))(h, r, t), m(t, r, h))
    for kind in (CP, SimplE, ComplEx):
        assert not torch.allclose((m := kind(GRAPH, D))(h, r, t), m(t, r, h))
    real = ComplEx(GRAPH, D)
    with torch.no_grad():
        real.relations.weight[:, D:] = 0  # real relations are symmetric, imaginary ones antisymmetric
    assert torch.allclose(real(h, r, t), real(t, r, h))
    turned = SimplE(GRAPH, D)
    with torch.no_grad():
        turned.relations.weight.copy_(turned.relations.weight.roll(D, dims=1))
    swapped = turned(h, r, t)
    with torch.no_grad():
        turned.relations.weight.copy_(turned.relations.weight.roll(D, dims=1))
    assert torch.allclose(swapped, turned(t, r, h))  # swapping the two relation parts swaps head and tail


@pytest.mark.parametrize("kind", FORMULAS)
def test_regularizers(kind):
    model = kind(GRAPH, D)
    h, r, t = batch()
    e, w = model.entities.weight, model.relations.weight
    if kind is ComplEx:
        e, w = (torch.complex(x[:, :D], x[:, D:]) for x in (e, w))
    head, tail = (e[h, :D], e[t, D:]) if kind is CP else (e[h], e[t])
    for power, found in ((3, model.n3(h, r, t)), (2, model.l2(h, r, t))):
        expected = sum((x.abs() ** power).sum() for x in (head, w[r], tail)) / B
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=rf"{kind.__name__}.n3: expected triples, got none"):
        model.n3(h[:0], r[:0], t[:0])


def test_the_modulus_has_a_finite_gradient_at_zero():
    model = ComplEx(GRAPH, D)
    with torch.no_grad():
        model.entities.weight.zero_()
    model.n3(*batch()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_rescal():
    model = RESCAL(GRAPH, D)
    h, r, t = batch()
    e, m = model.entities.weight, model.maps.weight
    dense = torch.einsum("hi,rij,tj->rht", e, m, e)
    torch.testing.assert_close(model.score_all(h, r), dense[r, h])
    torch.testing.assert_close(model(h, r, t), dense[r, h, t])
    torch.testing.assert_close(model.score_relations(h, t), dense[:3, h, t].T)
    expected = (e[h].square().sum() + e[t].square().sum() + m[r].square().sum()) / B
    torch.testing.assert_close(model.l2(h, r, t), expected)
    assert model.parameter_count() == 11 * D + 6 * D * D


def block_score(model, x, r):
    """`x_k M[r, k]` with dense block-diagonal maps."""
    maps = torch.einsum("rka,kaij->rkij", model.maps.relations, model.maps.core)
    dense = torch.stack([torch.block_diag(*blocks) for blocks in maps])
    return torch.einsum("bi,bij->bj", x, dense[r]), maps


@pytest.mark.parametrize("training", [True, False])
def test_meim_is_a_sum_of_block_terms(training):
    model = MEIM(GRAPH, blocks=3, block_dim=4, relation_dim=2, dropouts=(0, 0))
    h, r, t = batch()
    model.score_all(h, r)
    with torch.no_grad():
        for norm in (model.norm0, model.norm1):
            norm.weight.normal_()
            norm.bias.normal_()
    model.train(training)

    def norm(x, n):
        return F.batch_norm(x, n.running_mean.clone(), n.running_var.clone(), n.weight, n.bias, training)

    e = model.entities.weight
    y, maps = block_score(model, norm(e[h], model.norm0), r)
    expected = norm(y, model.norm1) @ e.T
    torch.testing.assert_close(model.score_all(h, r), expected)
    torch.testing.assert_close(model.maps.matrices(torch.tensor([5, 0])), maps[[5, 0]])
    if not training:
        several = torch.stack([model(h, torch.full_like(r, k), t) for k in range(3)], 1)
        torch.testing.assert_close(model.score_relations(h, t), several)
        torch.testing.assert_close(model.score_all(h[3:4], r[3:4])[0], expected[3])
    assert model.score_all(h[:0], r[:0]).shape == (0, 11) if not training else True


def test_block_maps_and_their_gradient():
    model = SimpleNamespace(maps=BlockMaps(6, 2, 3, 4))
    for parameter in model.maps.parameters():
        torch.nn.init.normal_(parameter)
    _, r, _ = batch()
    x = torch.randn(B, 6, requires_grad=True)
    y, expected = model.maps(x, r), block_score(model, x, r)[0]
    torch.testing.assert_close(y, expected)
    leaves, weight = [x, *model.maps.parameters()], torch.randn(B, 6)
    for g, e in zip(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(g, e)
    z = torch.randn(B, 6)
    scores = torch.stack([(block_score(model, x, torch.full_like(r, k))[0] * z).sum(1) for k in range(6)], 1)
    torch.testing.assert_close(model.maps.between(x, z), scores)


def test_the_penalties_of_meim():
    model = MEIM(GRAPH, blocks=2, block_dim=3, relation_dim=4)
    _, r, _ = batch()
    maps = block_score(model, torch.ones(B, 6), r)[1][r]
    expected = (maps.mT @ maps - torch.eye(3)).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(model.orthogonality(r), expected)
    norms = model.maps.relations[r].norm(dim=2)
    torch.testing.assert_close(model.row_norms(r), (norms - 1).square().sum(1).mean())
    with torch.no_grad():  # orthogonal maps cost nothing
        model.maps.core.zero_()
        model.maps.core[:, 0] = torch.linalg.qr(torch.randn(2, 3, 3))[0]
        model.maps.relations.zero_()
        model.maps.relations[:, :, 0] = 1
    assert float(model.orthogonality(r).detach()) < 1e-25 and float(model.row_norms(r).detach()) == 0
    with pytest.raises(ValueError, match="MEIM.orthogonality: expected relations, got none"):
        model.orthogonality(r[:0])


def test_meim_on_wn18rr_has_the_papers_size():
    graph = SimpleNamespace(num_entities=40_943, num_relations=22, inverse=True)
    model = MEIM(graph, device="meta", batch_norm=False)
    assert model.parameter_count() == 40_943 * 300 + 22 * 300 + 3 * 100**3


@pytest.mark.parametrize("kind", [*FORMULAS, RESCAL, MEIM])
def test_bf16_autocast_and_training(kind):
    model = (MEIM(GRAPH, 2, 4, dropouts=(0.1, 0.1)) if kind is MEIM else kind(GRAPH, D)).float()
    h, r, t = batch()
    exact = model.eval().score_all(h, r).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.score_all(h, r)
    assert scores.dtype == torch.bfloat16
    torch.testing.assert_close(scores.float(), exact, rtol=0, atol=0.04 * float(exact.abs().max()))
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.score_all(h, r), t)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", [*FORMULAS, RESCAL, MEIM])
def test_a_seed_is_a_model_and_so_is_a_file(kind, tmp_path):
    options = {"block_dim": 3} if kind is MEIM else {"dim": D}
    first, second = (kind(GRAPH, generator=torch.Generator().manual_seed(2), **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    tnlayers.save(first.eval(), tmp_path / "m")
    other = kind(GRAPH, **options).eval()
    tnlayers.load(tmp_path / "m", other)
    h, r, _ = batch()
    assert torch.equal(other.score_all(h, r), first.score_all(h, r))


def test_refusals():
    with pytest.raises(ValueError, match="DistMult: dim must be an int >= 1, got 0"):
        DistMult(GRAPH, 0)
    with pytest.raises(ValueError, match="MEIM: dropouts are 2 rates"):
        MEIM(GRAPH, 2, 3, dropouts=(0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="MEIM: blocks must be an int >= 1, got 0"):
        MEIM(GRAPH, 0, 3)
