"""TuckER as published, its parameters, its dropout, its batch norm; TTER; entity tables that are networks."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, to_dense
from tnlayers.kg import TTER, TuckER
from tnlayers.kg.dropping import drop, multiply_dropped

GRAPH = SimpleNamespace(num_entities=12, num_relations=8, inverse=True)
B = 30


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(size=B, graph=GRAPH):
    g = torch.Generator().manual_seed(1)
    return [
        torch.randint(n, (size,), generator=g) for n in (graph.num_entities, graph.num_relations, graph.num_entities)
    ]


def stirred(model):
    """The same model with running statistics, norms and biases that are not those of the start."""
    model.train()
    for _ in range(3):
        model.score_all(*batch()[:2])
    with torch.no_grad():
        for norm in (model.norm0, model.norm1):
            if norm is not None:
                norm.weight.normal_()
                norm.bias.normal_()
        if model.bias is not None:
            model.bias.normal_()
    return model


def published(model, heads, relations, training, masks=lambda x, p: x):
    """The formula of the paper's code, row by row, with dense maps."""
    core, table = model.maps.cores
    e, h = model.entities.weight, (model.entities if model.heads is None else model.heads).weight

    def norm(x, n):
        return (
            x
            if n is None
            else F.batch_norm(x, n.running_mean.clone(), n.running_var.clone(), n.weight, n.bias, training)
        )

    x = masks(norm(h[heads], model.norm0), model.dropouts[0])
    maps = (table[relations] @ core.reshape(len(core), -1)).view(-1, e.shape[1], e.shape[1])
    maps = masks(maps, model.dropouts[1])
    y = masks(norm(torch.bmm(x[:, None], maps)[:, 0], model.norm1), model.dropouts[2])
    scores = y @ e.T
    return scores if model.bias is None else scores + model.bias


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("entity_bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_published_formula(shared, batch_norm, entity_bias, training):
    model = TuckER(GRAPH, 7, 5, shared=shared, batch_norm=batch_norm, entity_bias=entity_bias, dropouts=(0, 0, 0))
    stirred(model).train(training)
    h, r, _ = batch()
    expected = published(model, h, r, training)
    torch.testing.assert_close(model.score_all(h, r), expected)
    parameters, weight = list(model.parameters()), torch.randn(B, 12)
    wanted = torch.autograd.grad((published(model, h, r, training) * weight).sum(), parameters)
    found = torch.autograd.grad((model.score_all(h, r) * weight).sum(), parameters)
    for g, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("masks", ["relation", "row"])
def test_dropout_of_the_maps(masks):
    """The same draws in the published order: "row" is the published law, "relation" shares the masks of maps."""
    model = stirred(TuckER(GRAPH, 7, 5, masks=masks))
    h, r, _ = batch()
    distinct, where = r.unique(return_inverse=True)

    def once(x, p):
        if x.ndim == 3 and masks == "relation":
            return x * drop(torch.ones(len(distinct), 7, 7), p)[where]
        return drop(x, p)

    torch.manual_seed(4)
    expected = published(model, h, r, True, once)
    torch.manual_seed(4)
    torch.testing.assert_close(model.score_all(h, r), expected)


@pytest.mark.parametrize("masks", ["relation", "row"])
def test_dropout_has_the_mean_of_the_model_without(masks):
    model = TuckER(GRAPH, 6, 4, batch_norm=False, masks=masks, dropouts=(0.2, 0.3, 0.4))
    h, r, _ = batch(5)
    with torch.no_grad():
        draws = torch.stack([model.score_all(h, r) for _ in range(4000)])
        exact = model.eval().score_all(h, r)
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5)
    assert float(error.max()) < 5  # standard errors, of 60 entries


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_products_are_those_of_the_steps_one_by_one(dtype, rng):
    """With the same draws: values and gradients, of maps that no row, one and many take."""
    x, maps = (torch.randn(s, generator=rng, dtype=dtype, requires_grad=True) for s in ((9, 4), (5, 4, 3)))
    which, weight = torch.tensor([0, 3, 3, 3, 1, 0, 3, 4, 3]), torch.randn(9, 3, generator=rng, dtype=dtype)
    results = []
    for made in (
        lambda: multiply_dropped(x, maps, which, 0.3),
        lambda: torch.bmm(x[:, None], drop(maps[which], 0.3))[:, 0],
    ):
        torch.manual_seed(2)
        y = made()
        results.append((y, *torch.autograd.grad((y * weight).sum(), (x, maps))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert float(results[0][2][2].abs().max()) == 0  # no row took it
    torch.testing.assert_close(multiply_dropped(x, maps, which, 0.0), torch.bmm(x[:, None], maps[which])[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        torch.testing.assert_close(multiply_dropped(x, maps, which, 0.3).to(dtype), results[0][0], atol=0.2, rtol=0.1)


def test_drop_is_exact_in_rate_and_mean():
    torch.manual_seed(0)
    x = torch.ones(2**20)
    for p in (0.2, 0.71, 0.5):
        y = drop(x, p)
        rate = round(p * 65536) / 65536
        assert sorted(y.unique().tolist()) == pytest.approx([0.0, 1 / (1 - rate)])
        assert abs(float((y == 0).double().mean()) - rate) < 5 * (rate * (1 - rate) / 2**20) ** 0.5
    assert drop(x, 0.0) is x
    assert drop(x, 0.3, training=False) is x
    a = torch.randn(7, 3, requires_grad=True)
    torch.manual_seed(1)
    y = drop(a, 0.4)
    (g,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(y, a * g)
    neighbours = drop(torch.ones(10**6), 0.5).reshape(-1, 4)  # four share a draw, and are independent all the same
    correlation = torch.corrcoef(neighbours.T) - torch.eye(4)
    assert float(correlation.abs().max()) < 5 / (250_000**0.5)


def test_parameters_are_those_of_the_papers():
    def count(entities, relations, d_e, d_r, **options):
        graph = SimpleNamespace(num_entities=entities, num_relations=relations, inverse=True)
        options.setdefault("batch_norm", False)
        return TuckER(graph, d_e, d_r, device="meta", **options).parameter_count()

    assert count(135, 92, 100, 30, batch_norm=True) == 316_660  # what PyKEEN reports on UMLS
    assert count(104, 50, 100, 30, batch_norm=True) == 312_300  # and on Kinships
    wn = 40_943 * 200 + 22 * 30 + 30 * 200**2
    assert count(40_943, 22, 200, 30) == wn
    assert round(wn / 1e6, 2) == 9.39
    assert round(count(14_541, 474, 200, 200) / 1e6, 1) == 11.0
    assert round(count(123_182, 74, 200, 30) / 1e6, 1) == 25.8
    assert count(40_943, 22, 200, 30, entity_bias=True) == wn + 40_943
    assert count(40_943, 22, 200, 30, shared=False) == wn + 40_943 * 200


def test_the_published_start():
    graph = SimpleNamespace(num_entities=400, num_relations=300, inverse=True)
    model = TuckER(graph, 40, 30, generator=torch.Generator().manual_seed(5))
    core, relations = (core.detach() for core in model.maps.cores)
    assert 0.99 < float(core.max()) < 1
    assert -1 < float(core.min()) < -0.99
    assert float(core.std()) == pytest.approx(3**-0.5, rel=0.02)
    assert float(relations.std()) == pytest.approx((2 / 330) ** 0.5, rel=0.05)
    assert float(model.entities.weight.detach().std()) == pytest.approx((2 / 440) ** 0.5, rel=0.03)
    again = TuckER(graph, 40, 30, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    model.reset_parameters(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("make", [TuckER, TTER])
def test_in_evaluation_nothing_depends_on_the_batch(make):
    options = {"rank": 3} if make is TTER else {}
    model = stirred(make(GRAPH, 7, 5, entity_bias=True, **options)).eval()
    h, r, t = batch()
    with torch.no_grad():
        whole = model.score_all(h, r)
        for b in (0, 7):
            torch.testing.assert_close(model.score_all(h[b : b + 1], r[b : b + 1])[0], whole[b])
        order = torch.randperm(B)
        torch.testing.assert_close(model.score_all(h[order], r[order]), whole[order])
        query = model.query(h, r)
        chunks = [model.against(query, slice(a, a + 5)) for a in (0, 5, 10)]
        torch.testing.assert_close(torch.cat(chunks, 1), whole)
        torch.testing.assert_close(model.against(query, torch.tensor([3, 3, 0])), whole[:, [3, 3, 0]])
        torch.testing.assert_close(model(h, r, t), whole.gather(1, t[:, None])[:, 0])
        relations = torch.stack([model(h, torch.full_like(r, k), t) for k in range(4)], 1)
        torch.testing.assert_close(model.score_relations(h, t), relations)
        torch.testing.assert_close(model.score_heads(r, t), model.score_all(t, model.inverted(r)))
        before = copy.deepcopy(model.state_dict())
        model.score_all(h, r)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("score", ["all", "paired"])
def test_few_rows_of_a_large_table(score):
    """Their gradient travels as a sparse one; what arrives is dense, and that of the formula."""
    graph = SimpleNamespace(num_entities=2000, num_relations=8, inverse=True)
    model = TuckER(graph, 7, 5, dropouts=(0, 0, 0))
    h, r, t = batch(20, graph)
    h[3], t[5] = h[4], h[0]
    weight = torch.randn(20, 2000)
    scores = published(model, h, r, True)
    if score == "all":
        found, wanted = model.score_all(h, r) * weight, scores * weight
    else:
        found, wanted = model(h, r, t), scores.gather(1, t[:, None])
    parameters = list(model.parameters())
    expected = torch.autograd.grad(wanted.sum(), parameters)
    found.sum().backward()
    for parameter, e in zip(parameters, expected, strict=True):
        assert parameter.grad.layout == torch.strided
        torch.testing.assert_close(parameter.grad, e)
    torch.optim.Adam(parameters, fused=True).step()


def test_a_batch_of_one_row_trains():
    model = stirred(TuckER(GRAPH, 7, 5, dropouts=(0, 0, 0)))
    h, r, _ = batch(1)
    before = model.norm0.running_mean.clone()
    y = model.train().score_all(h, r)
    torch.testing.assert_close(y, copy.deepcopy(model).eval().score_all(h, r))
    assert torch.equal(model.norm0.running_mean, before)
    assert model.score_all(h[:0], r[:0]).shape == (0, 12) if model.eval() else None


@pytest.mark.parametrize("make", [TuckER, TTER])
def test_bf16_autocast(make):
    options = {"rank": 4} if make is TTER else {}
    model = stirred(make(GRAPH, 8, 6, dropouts=(0.2, 0, 0), **options)).float()
    h, r, t = batch()
    torch.manual_seed(2)
    exact = copy.deepcopy(model).score_all(h, r).detach()
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.score_all(h, r)
        F.cross_entropy(scores.float(), t).backward()
    assert scores.dtype == torch.bfloat16
    assert model.norm1.running_var.dtype == torch.float32
    torch.testing.assert_close(scores.float(), exact, rtol=0, atol=0.04 * float(exact.abs().max()))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


TABLES = {
    "ttm": lambda: tnlayers.random_network(TTMatrix, rank=3, order=2),
    "low": lambda: tnlayers.random_network(LowRank, rank=3),
    "tucker": lambda: tnlayers.random_network(Tucker, rank=2, order=2),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shared", [True, False])
def test_entity_tables_that_are_networks(name, shared):
    model = TuckER(GRAPH, 8, 5, entity_table=TABLES[name](), shared=shared, dropouts=(0, 0, 0))
    h, r, t = batch()
    expected = published(model, h, r, True)
    torch.testing.assert_close(model.score_all(h, r), expected)
    query = model.query(h, r)
    whole = model.against(query)
    torch.testing.assert_close(model.against(query, slice(3, 9)), whole[:, 3:9])
    torch.testing.assert_close(model.paired(query, t[:, None]), whole.gather(1, t[:, None]))
    rms = float(model.entities.weight.detach().square().mean() ** 0.5)
    assert rms == pytest.approx((2 / 20) ** 0.5, rel=0.15)  # Xavier's, up to the padding of the modes
    optimizer = tnlayers.RankAdaptive(model, lr=1e-3, tol=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.score_all(h, r), t)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    shipped = tnlayers.compact(model).eval()
    assert torch.isfinite(shipped.score_all(h, r)).all()


def test_the_relation_rank_is_found():
    """R and W are a tree: a relation table of rank 2 is rounded to it, and the scores stay."""
    model = TuckER(GRAPH, 8, 6).eval()
    with torch.no_grad():
        model.maps.cores[1].copy_(torch.randn(8, 2) @ torch.randn(2, 6))
    h, r, _ = batch()
    before = model.score_all(h, r).detach()
    tnlayers.RankAdaptive(model, lr=0.0, tol=1e-6)
    torch.testing.assert_close(model.score_all(h, r).detach(), before)
    from decompositions import round as cut

    assert cut(model.maps.network, tol=1e-8).ranks == (2,)


@pytest.mark.parametrize("make", [TuckER, TTER])
def test_saved_and_loaded(tmp_path, make):
    options = {"rank": 3} if make is TTER else {}
    model = stirred(make(GRAPH, 7, 5, **options)).eval()
    tnlayers.save(model, tmp_path / "m")
    other = make(GRAPH, 7, 5, **options).eval()
    tnlayers.load(tmp_path / "m", other)
    h, r, _ = batch()
    assert torch.equal(other.score_all(h, r), model.score_all(h, r))
    third = make(GRAPH, 7, 5, **options).eval()
    third.load_state_dict(model.state_dict())
    assert torch.equal(third.score_all(h, r), model.score_all(h, r))


def test_tter_is_tucker_with_a_train_for_a_core():
    model = stirred(TTER(GRAPH, 7, 5, rank=(3, 2), dropouts=(0, 0, 0)))
    middle, relations, first, second = model.maps.cores
    core = torch.einsum("kab,ia,jb->kij", middle, first, second)
    torch.testing.assert_close(to_dense(model.maps.network), torch.einsum("rk,kij->rij", relations, core))
    twin = TuckER(GRAPH, 7, 5, dropouts=(0, 0, 0))
    with torch.no_grad():
        for mine, theirs in zip(twin.maps.cores, (core, relations), strict=True):
            mine.copy_(theirs)
    twin.entities.load_state_dict(model.entities.state_dict())
    for name in ("norm0", "norm1"):
        getattr(twin, name).load_state_dict(getattr(model, name).state_dict())
    h, r, _ = batch()
    torch.testing.assert_close(twin.eval().score_all(h, r), model.eval().score_all(h, r))
    big = TTER(GRAPH, 60, 50, rank=20, generator=torch.Generator().manual_seed(0)).maps
    middle, _, first, second = (core.detach() for core in big.cores)
    entries = torch.einsum("kab,ia,jb->kij", middle, first, second)
    assert float(entries.std()) == pytest.approx(3**-0.5, rel=0.1)


def test_refusals():
    with pytest.raises(ValueError, match=r"TuckER: dropouts must be rates in \[0, 1\), got 1.0"):
        TuckER(GRAPH, 4, 3, dropouts=(0.1, 1.0, 0.1))
    with pytest.raises(ValueError, match="dropouts are 3 rates"):
        TuckER(GRAPH, 4, 3, dropouts=(0.1, 0.1))
    with pytest.raises(ValueError, match="entity_dim must be an int >= 1, got 0"):
        TuckER(GRAPH, 0, 3)
    with pytest.raises(ValueError, match="rank must be an int >= 1, got 0"):
        TTER(GRAPH, 4, 3, rank=(0, 2))
    with pytest.raises(ValueError, match="masks must be 'relation' or 'row', got 'all'"):
        TuckER(GRAPH, 4, 3, masks="all")
    with pytest.raises(ValueError, match="entity_table must be 'dense'"):
        TuckER(GRAPH, 4, 3, entity_table="tt")
