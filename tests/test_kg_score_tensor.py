"""Scores as one network: every route against the dense tensor, training by the optimizers of networks."""

from types import SimpleNamespace

import pytest
import torch

import tnlayers
from decompositions import CP, TT, Network, Tree, Tucker, to_dense
from tnlayers.kg import RelationMaps, ScoreTensor
from tnlayers.kg.by_relation import PLACE, RELATION, ROW, group_by, routes

N, R, B = 9, 6, 25


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(format, **options):
    generator = torch.Generator().manual_seed(3)
    modes = options.pop("row_modes", (R, N, N))
    return format.random(row_modes=modes, generator=generator, std=1.0, **options)


def middle_train():
    """A chain head - relation - tail."""
    return draw(TT, row_modes=(N, R, N), rank=(4, 3)).replace(rows=("i1", "i0"), cols=("i2",))


def relation_with_head():
    """Relation and head in one core."""
    core, tail = torch.randn(R, N, 4), torch.randn(N, 4)
    return Network((core, tail), legs=(("r", "h", "a"), ("t", "a")), rows=("r", "h"), cols=("t",))


def block_terms():
    """Two Tucker blocks: the block is a hyper-edge of all four cores."""
    shapes = {"W": (2, 3, 4, 4), "R": (R, 2, 3), "E": (N, 2, 4), "T": (N, 2, 4)}
    legs = (("k", "a", "b", "c"), ("r", "k", "a"), ("h", "k", "b"), ("t", "k", "c"))
    return Network(tuple(torch.randn(s) for s in shapes.values()), legs=legs, rows=("r", "h"), cols=("t",))


NETWORKS = {
    "tucker": lambda: draw(Tucker, rank=(2, 3, 4)),
    "tucker_flat": lambda: draw(Tucker, rank=(6, 2, 2)),
    "tucker2": lambda: draw(Tucker, rank=(3, 4), modes=(0, 2)),
    "tt": lambda: draw(TT, rank=(3, 4)),
    "tt_middle": middle_train,
    "cp": lambda: draw(CP, rank=5),
    "tree": lambda: draw(Tree, rank=3, tree=((0,), ((1,), (2,)))),
    "joint": relation_with_head,
    "blocks": block_terms,
    "tt_table": lambda: draw(TT, row_modes=(R, 2, 5, 5, 2), rank=3),  # entities in two digits, one id of padding
    "tucker_table": lambda: draw(Tucker, row_modes=(R, 3, 3, 3, 3), rank=2),
    "tree_table": lambda: draw(Tree, row_modes=(R, 2, 5, 2, 5), rank=3, tree=((0,), ((1,), (2,)), ((3,), (4,)))),
}


def batch(size=B, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(n, (size,), generator=g) for n in (N, R, N)]


def model_of(name, **options):
    return ScoreTensor(N, R, inverse=True, network=NETWORKS[name](), **options)


def dense_of(model):
    net = model.network
    first = to_dense(net).reshape(R, -1, torch.Size(net.col_modes).numel())
    return first[:, :N, :N]


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_entries_of_the_dense_tensor_by_every_route(name):
    model = model_of(name)
    h, r, t = batch()
    dense = dense_of(model)
    found = model.alternatives(B)
    assert {route.strategy for route in found} == ({"rows"} if name == "joint" else {"rows", "relations"})
    for route in (None, *found):
        model._forced = route
        torch.testing.assert_close(model.score_all(h, r), dense[r, h])
    model._forced = None
    torch.testing.assert_close(model(h, r, t), dense[r, h, t])
    torch.testing.assert_close(model.score_heads(r, t), dense[model.inverted(r), t])
    torch.testing.assert_close(model.score_relations(h, t), dense[: R // 2, h, t].T)
    torch.testing.assert_close(model.weight, dense)


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_are_entries_of_the_dense_tensor_without_inverse_relations(name):
    model = ScoreTensor(N, R, inverse=False, network=NETWORKS[name]()).eval()
    _, r, t = batch()
    dense = dense_of(model)[r, :, t]
    assert model._asks_heads() == (name != "joint")  # whose heads have no core of their own
    torch.testing.assert_close(model.score_heads(r, t), dense)
    torch.testing.assert_close(model.score_heads(r, t, slice(3, 8)), dense[:, 3:8])
    torch.testing.assert_close(model.score_heads(r, t, torch.tensor([7, 0, 7])), dense[:, [7, 0, 7]])
    if model._asks_heads():
        own = torch.stack([t, r], dim=1)
        torch.testing.assert_close(model.paired(model.query_heads(r, t), own), dense.gather(1, own))
    assert not model.train()._asks_heads()


@pytest.mark.parametrize("name", NETWORKS)
def test_chunks_of_entities_and_rows_of_a_batch_are_independent(name):
    model = model_of(name)
    h, r, t = batch()
    whole = model.score_all(h, r)
    query = model.query(h, r)
    chunks = [model.against(query, slice(a, min(a + 4, N))) for a in range(0, N, 4)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole)
    torch.testing.assert_close(model.against(query, torch.tensor([7, 0, 7])), whole[:, [7, 0, 7]])
    negatives = torch.stack([t, h, r], dim=1)
    torch.testing.assert_close(model.paired(query, negatives), whole.gather(1, negatives))
    for b in (0, 11):
        torch.testing.assert_close(model.query(h[b : b + 1], r[b : b + 1]), query[b : b + 1])
    assert model.score_all(h[:0], r[:0]).shape == (0, N)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_the_cores_are_those_of_the_dense_tensor(name):
    model = model_of(name)
    h, r, _ = batch()
    weight = torch.randn(B, N)
    expected = torch.autograd.grad((dense_of(model)[r, h] * weight).sum(), list(model.cores))
    for route in (None, *model.alternatives(B)):
        model._forced = route
        found = torch.autograd.grad((model.score_all(h, r) * weight).sum(), list(model.cores))
        for g, e in zip(found, expected, strict=True):
            torch.testing.assert_close(g, e)


def test_the_cheapest_order_depends_on_batch_relations_and_ranks():
    def best(rows, distinct, longest, k, n):
        legs = ((ROW, "i"), (RELATION, "k"), ("k", "i", "j"))
        sizes = {ROW: rows, RELATION: distinct, PLACE: longest, "k": k, "i": n, "j": n}
        return routes(legs, ("j",), sizes, 4)

    few = best(128, 4, 40, 30, 200)
    assert (few[0].strategy, few[0].flops) == ("relations", 2 * (4 * 30 * 200**2 + 4 * 40 * 200**2))
    assert best(128, 128, 1, 2, 200)[0].strategy == "rows"  # all relations differ: nothing is shared
    assert best(4096, 2, 4090, 2, 64)[0].flops < max(route.flops for route in best(4096, 2, 4090, 2, 64))


def test_distinct_relations_meet_the_core_once(monkeypatch):
    net = Tucker.random(row_modes=(R, 64), col_modes=(64,), rank=30, modes=(0,))
    maps, relations = RelationMaps(R, 64, 64, network=net), torch.arange(128) % 3
    shapes = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: shapes.append((*a.shape, b.shape[1])) or product(a, b, **k))
    y = maps(torch.ones(128, 64), relations)
    assert (3, 6, 64 * 64) in shapes
    assert all(rows * cols <= 3 * 64 * 64 for rows, _, cols in shapes)
    torch.testing.assert_close(y, maps.weight.sum(1)[relations])


def test_groups_spread_and_collect():
    relations = torch.tensor([5, 2, 2, 9, 2, 5])
    groups = group_by(relations)
    x = torch.randn(6, 3)
    assert groups.distinct.tolist() == [2, 5, 9]
    assert groups.longest == 3
    torch.testing.assert_close(groups.collect(groups.spread(x)), x)
    maps = torch.randn(3, 3, 4)
    torch.testing.assert_close(
        groups.multiply(x, maps), torch.stack([x[b] @ maps[[2, 5, 9].index(int(relations[b]))] for b in range(6)])
    )


@pytest.mark.parametrize("name", ["tucker", "tt_middle", "tree_table"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "rank"])
def test_optimizers_of_networks_take_a_step(name, kind):
    model = model_of(name)
    make = {
        "sgd": lambda: tnlayers.RiemannianSGD(model, lr=1e-3),
        "adam": lambda: tnlayers.RiemannianAdam(model, lr=1e-3),
        "rank": lambda: tnlayers.RankAdaptive(model, lr=1e-3, tol=1e-3),
    }
    start = dense_of(model).detach().clone()
    optimizer = make[kind]()
    h, r, t = batch()

    def loss():
        return torch.nn.functional.cross_entropy(model.score_all(h, r), t)

    before = loss()
    torch.testing.assert_close(before, torch.nn.functional.cross_entropy(start[r, h], t))
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < float(before.detach())
    shipped = tnlayers.compact(model)
    with torch.no_grad():  # rounded to the ranks that the optimizer reports
        torch.testing.assert_close(shipped.score_all(h, r), model.score_all(h, r), rtol=0, atol=2e-2)
    if kind != "rank":
        assert shipped.network.ranks == model.network.ranks


def test_a_riemannian_step_is_that_of_the_dense_gradient():
    """The tangent step of SGD depends on X alone: the gradient with respect to X, projected, at a full-rank point."""
    net = draw(Tucker, rank=(R, N, N))  # full ranks: the manifold is the whole space, the projection the identity
    model = ScoreTensor(N, R, inverse=True, network=net)
    h, r, t = batch()
    dense = dense_of(model).detach().requires_grad_()
    torch.nn.functional.cross_entropy(dense[r, h], t).backward()
    optimizer = tnlayers.RiemannianSGD(model, lr=0.1, momentum=0.0)
    torch.nn.functional.cross_entropy(model.score_all(h, r), t).backward()
    optimizer.step()
    torch.testing.assert_close(tnlayers.compact(model).weight, dense.detach() - 0.1 * dense.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["tucker", "tt_table"])
@pytest.mark.parametrize("shared", [False, True])
def test_saved_and_loaded(tmp_path, name, shared):
    if shared:
        model = shared_tucker()
        other = ScoreTensor(N, R, inverse=True, shared=True, network=draw(Tucker, rank=(2, 2, 2)))
    else:
        model = model_of(name)
        other = ScoreTensor(
            N, R, inverse=True, network=draw(type(model.network), row_modes=model.network.shape, rank=1)
        )
    tnlayers.save(torch.nn.Sequential(model), tmp_path / "m")
    holder = torch.nn.Sequential(other)
    tnlayers.load(tmp_path / "m", holder)
    h, r, _ = batch()
    assert torch.equal(holder[0].score_all(h, r), model.score_all(h, r))
    assert len(list(holder.parameters())) == len(list(model.parameters()))


def shared_tucker():
    return ScoreTensor(N, R, inverse=True, shared=True, network=draw(Tucker, rank=(3, 4, 4)))


def test_a_shared_table_is_one_parameter():
    model = shared_tucker()
    assert model.cores[2] is model.cores[3]
    assert model.parameter_count() == sum(p.numel() for p in model.parameters()) == 3 * 16 + R * 3 + N * 4
    h, r, _ = batch()
    core, relations, table = model.cores[0], model.cores[1], model.cores[2]
    expected = torch.einsum("abc,ra,hb,tc->rht", core, relations, table, table)[r, h]
    torch.testing.assert_close(model.score_all(h, r), expected)
    weight = torch.randn(B, N)
    found = torch.autograd.grad((model.score_all(h, r) * weight).sum(), table)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), table))
    assert shared_copy_is_tied(model)


def shared_copy_is_tied(model):
    import copy

    made = copy.deepcopy(model).float()
    return made.cores[2] is made.cores[3] and made.cores[2] is not model.cores[2]


@pytest.mark.parametrize("optimizer", ["RiemannianSGD", "RiemannianAdam", "RankAdaptive"])
def test_optimizers_of_trees_refuse_a_shared_table_or_leave_it_to_the_inner_one(optimizer):
    make = getattr(tnlayers, optimizer)
    with pytest.raises(ValueError, match="tree network"):
        make(shared_tucker(), lr=0.1)
    both = torch.nn.ModuleList([shared_tucker(), model_of("tucker")])
    made = make(both, lr=0.1)
    inner = {id(p) for group in made.inner.param_groups for p in group["params"]}
    assert {id(p) for p in both[0].parameters()} == inner


def test_set_network_keeps_a_shared_table():
    model = shared_tucker()
    core, relations, table = (torch.randn(s) for s in ((2, 3, 3), (R, 2), (N, 3)))
    model.set_network(Tucker(core, [relations, table, table], num_rows=2))
    assert model.cores[2] is model.cores[3]
    assert model.network.ranks == (2, 3, 3)
    with pytest.raises(ValueError, match="heads and tails share a table"):
        model.set_network(Tucker(core, [relations, table, table + 1], num_rows=2))


def test_refusals():
    whole = Network((torch.randn(R, N, N),), (("r", "h", "t"),), ("r", "h"), ("t",))
    with pytest.raises(ValueError, match="tail modes must have cores of their own"):
        ScoreTensor(N, R, inverse=True, network=whole)
    with pytest.raises(ValueError, match=r"expected 6, then products >= 9 and >= 9, got \(6, 9, 8\)"):
        ScoreTensor(N, R, inverse=True, network=draw(CP, row_modes=(R, N, 8), rank=2))
    with pytest.raises(ValueError, match=r"products = 9 and = 9, got \(6, 10, 9\)"):
        RelationMaps(R, N, N, network=draw(CP, row_modes=(R, 10, N), rank=2))
    with pytest.raises(ValueError, match="a shared table needs equal cores"):
        ScoreTensor(N, R, inverse=True, shared=True, network=draw(Tucker, rank=(2, 3, 4)))
    with pytest.raises(IndexError, match=r"entities must be in 0\.\.8, got 0\.\.9"):
        model_of("tt_table").query(torch.tensor([0, 9]), torch.tensor([0, 0]))
    with pytest.raises(TypeError, match="a query is made of two tensors"):
        model_of("tucker").example_input(3)
    with pytest.raises(TypeError, match="expected a DenseRelations, got Linear"):
        RelationMaps.from_dense(torch.nn.Linear(2, 2), lambda w: w)


def test_relation_maps_of_a_train():
    net = Tree.random(row_modes=(R, 5), col_modes=(4,), rank=3, tree=((0,), (1,), (2,)))
    maps = RelationMaps(R, 5, 4, network=net)
    x, y = torch.randn(B, 5, requires_grad=True), torch.randn(B, 4)
    _, r, _ = batch()
    dense = to_dense(net)
    torch.testing.assert_close(maps.matrices(torch.tensor([4, 1])), dense[[4, 1]])
    torch.testing.assert_close(maps.between(x, y), torch.einsum("bi,rij,bj->br", x, dense, y))
    for route in maps.alternatives(B):
        maps._forced = route
        torch.testing.assert_close(maps(x, r), torch.einsum("bi,bij->bj", x, dense[r]))
    maps._forced = None
    assert torch.autograd.gradcheck(lambda z: maps(z, r), x)
    back = RelationMaps.from_dense(maps.to_dense_module(), lambda w: net)
    torch.testing.assert_close(back(x, r), maps(x, r))
    assert "relations" in tnlayers.explain(maps, batch=64)
    assert maps.flops(1) == maps.alternatives(1)[0].flops


def test_bf16_autocast_is_finite_and_close():
    model = model_of("tucker").float()
    h, r, _ = batch()
    exact = model.score_all(h, r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for route in (None, *model.alternatives(B)):
            model._forced = route
            scores = model.score_all(h, r)
            assert scores.dtype == torch.bfloat16
            torch.testing.assert_close(scores.float(), exact, rtol=0, atol=0.03 * float(exact.detach().abs().max()))
            scores.float().square().mean().backward()
    assert all(torch.isfinite(core.grad).all() for core in model.cores)


def test_a_fresh_model_of_a_factory():
    factory = tnlayers.random_network(Tucker, rank=(2, 3, 3), generator=torch.Generator().manual_seed(0))
    model = ScoreTensor(N, R, inverse=False, network=factory)
    assert model.num_relations == R
    assert round(float(model.weight.detach().square().mean() ** 0.5), 6) == 0.1
    assert SimpleNamespace(**model.settings()).shared is False
