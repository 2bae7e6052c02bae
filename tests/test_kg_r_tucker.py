"""R-TuckER and the optimizers of shared factors: steps against dense projections, ranks, resuming, bookkeeping."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tnlayers
from decompositions import TT, Tucker, to_dense
from decompositions.geometry import gauges, project
from decompositions.geometry.shared_tucker import shared_gauges, shared_project
from tnlayers import RankAdaptive, RiemannianAdam, RiemannianSGD, compact
from tnlayers.kg import RTuckER, load_triples, r_tucker_optimizer
from tnlayers.kg.ranking import evaluate
from tnlayers.kg.score_tensor import ScoreTensor
from tnlayers.kg.tucker import TuckER
from tnlayers.optim import SharedRiemannianAdam, SharedRiemannianSGD

F64 = torch.float64
GRAPH = SimpleNamespace(num_entities=9, num_relations=6, inverse=True)
SHARED = ((0,), (1, 2))


def make(ranks=(2, 3), seed=0, graph=GRAPH, **options):
    return RTuckER(graph, ranks, generator=torch.Generator().manual_seed(seed), dtype=F64, **options)


def target(graph=GRAPH, seed=3):
    sizes = (graph.num_relations, graph.num_entities, graph.num_entities)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=F64)


def everything(graph=GRAPH):
    """All queries, in the order of X."""
    relations, heads = torch.meshgrid(
        torch.arange(graph.num_relations), torch.arange(graph.num_entities), indexing="ij"
    )
    return heads.reshape(-1), relations.reshape(-1)


def distance(model, wanted):
    heads, relations = everything(model)
    return 0.5 * (model.score_all(heads, relations) - wanted.reshape(-1, wanted.shape[-1])).square().sum()


def step(model, optimizer, wanted):
    optimizer.zero_grad()
    loss = distance(model, wanted)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def dense(model):
    return to_dense(model.network).detach()


def projected(model, z):
    """The dense projection of z onto the tangent space at a model."""
    core, relations, heads, tails = (core.detach() for core in model.network.cores)
    if model.shared:
        return shared_project(shared_gauges(core, [relations, tails], SHARED), z).to_dense()
    return project(gauges(Tucker(core, [relations, heads, tails])), z).to_dense()


# --- the model ---


@pytest.mark.parametrize(
    ("entities", "relations", "ranks", "shared", "count"),
    [
        (14_541, 474, (200, 20), False, 756_440),
        (14_541, 474, (200, 20), True, 465_620),
        (40_943, 22, (10, 200), False, 16_777_420),
        (40_943, 22, (10, 200), True, 8_588_820),
    ],
)
def test_parameters_are_those_of_the_published_sizes(entities, relations, ranks, shared, count):
    graph = SimpleNamespace(num_entities=entities, num_relations=relations, inverse=True)
    model = RTuckER(graph, ranks, shared=shared)
    r, e = ranks
    assert model.parameter_count() == relations * r + (1 if shared else 2) * entities * e + r * e * e == count
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("shared", [True, False])
def test_scores_are_entries_of_the_tensor(shared):
    model = make((2, 3), shared=shared, std=0.3)
    core, relations, heads, tails = (core.detach() for core in model.cores)
    assert torch.equal(heads, tails) == shared
    expected = torch.einsum("abc,ia,jb,kc->ijk", core, relations, heads, tails)
    h, r = everything()
    torch.testing.assert_close(model.score_all(h, r).detach(), expected.reshape(-1, 9), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expected.square().mean().sqrt(), torch.tensor(0.3, dtype=F64))
    torch.testing.assert_close(tails.mT @ tails, torch.eye(3, dtype=F64), rtol=0, atol=1e-12)


def test_ranks_of_heads_and_tails_may_differ_without_sharing():
    assert make((2, 3, 4), shared=False).network.ranks == (2, 3, 4)
    assert make((9, 2)).network.ranks == (4, 2, 2)  # what such a tensor can have
    assert make((9, 2, 2), shared=False).network.ranks == (4, 2, 2)


@pytest.mark.parametrize("shared", [True, False])
def test_to_tucker_and_back(shared):
    model = make((2, 3), shared=shared)
    optimizer = r_tucker_optimizer(model, 0.05)
    for _ in range(3):
        step(model, optimizer, target())
    tucker = model.to_tucker().eval()
    h, r = everything()
    torch.testing.assert_close(tucker.score_all(h, r), model.score_all(h, r), rtol=1e-10, atol=1e-10)
    back = RTuckER.from_tucker(tucker)
    assert (back.shared, back.network.ranks) == (shared, (2, 3, 3))
    torch.testing.assert_close(back.score_all(h, r), model.score_all(h, r), rtol=1e-10, atol=1e-10)
    assert len(set(map(id, back.cores))) == (3 if shared else 4)


def test_tables_of_different_widths_become_one_of_the_larger():
    model = make((2, 3, 4), shared=False)
    tucker = model.to_tucker().eval()
    assert tucker.entity_dim == 4
    h, r = everything()
    torch.testing.assert_close(tucker.score_all(h, r), model.score_all(h, r), rtol=1e-10, atol=1e-10)


def test_ranks_that_no_tensor_has_are_taken_from_a_tucker_and_dropped_by_an_optimizer():
    tucker = TuckER(GRAPH, 2, 5, batch_norm=False, dropouts=(0.0, 0.0, 0.0), dtype=F64).eval()
    model = RTuckER.from_tucker(tucker)
    h, r = everything()
    for _ in range(2):
        torch.testing.assert_close(tucker.score_all(h, r), model.score_all(h, r), rtol=1e-10, atol=1e-10)
        optimizer = r_tucker_optimizer(model)
    assert optimizer.ranks() == {"": (4, 2, 2)}


# --- the step ---

SGD = [(True, SharedRiemannianSGD), (False, RiemannianSGD)]


@pytest.mark.parametrize(("shared", "kind"), SGD)
def test_a_small_step_is_minus_the_projected_gradient(shared, kind):
    model, wanted = make(shared=shared, std=1.0), target()
    before, lr = dense(model), 1e-6
    expected = projected(model, before - wanted)
    optimizer = kind(model, lr)
    step(model, optimizer, wanted)
    moved = (dense(model) - before) / -lr
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)
    assert float((before - wanted - expected).norm()) > 1.0  # the projection matters


@pytest.mark.parametrize(("shared", "kind"), SGD)
def test_normalized_steps_do_not_know_the_scale_of_the_loss(shared, kind):
    models = [make(shared=shared, std=1.0) for _ in range(2)]
    for model, factor in zip(models, (1.0, 1e6), strict=True):
        optimizer = kind(model, 1e-4, momentum=0.5, normalize=True)
        before = dense(model)
        for k in range(3):
            optimizer.zero_grad()
            (factor * distance(model, target())).backward()
            optimizer.step()
            if k == 0:
                assert abs(float((dense(model) - before).norm()) / 1e-4 - 1) < 1e-3
    torch.testing.assert_close(dense(models[0]), dense(models[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_momentum_is_carried_by_transport(shared):
    """Small steps add up the projected gradients with their decay."""
    model, wanted, lr = make(shared=shared, std=1.0), target(), 1e-5
    optimizer = (SharedRiemannianSGD if shared else RiemannianSGD)(model, lr, momentum=0.8)
    moment, before = torch.zeros_like(wanted), dense(model)
    for _ in range(4):
        gradient = projected(model, dense(model) - wanted)
        moment = 0.8 * projected(model, moment) + gradient
        step(model, optimizer, wanted)
        torch.testing.assert_close((dense(model) - before) / -lr, moment, rtol=0, atol=2e-2)
        before = dense(model)
    assert float(moment.norm()) > 2.5 * float(gradient.norm())


MAKERS = [
    partial(SharedRiemannianSGD, lr=0.05, momentum=0.8, weight_decay=0.01),
    partial(SharedRiemannianSGD, lr=0.5, momentum=0.5, normalize=True),
    partial(SharedRiemannianAdam, lr=0.02, weight_decay=0.01),
    partial(SharedRiemannianAdam, lr=0.02, stabilize_every=2),
]


@pytest.mark.parametrize("optimize", MAKERS)
def test_iterates_depend_on_the_tensor_alone(optimize):
    models = [make(std=0.5), make(std=0.5)]
    torch.manual_seed(1)
    core, relations, _, tails = (core.detach() for core in models[1].cores)
    a, b = torch.randn(2, 2, dtype=F64), torch.randn(3, 3, dtype=F64)
    turned = torch.einsum(
        "abc,ax,by,cz->xyz", core, torch.linalg.inv(a).mT, torch.linalg.inv(b).mT, torch.linalg.inv(b).mT
    )
    table = tails @ b
    models[1].set_network(models[1].network.replace([turned, relations @ a, table, table]))
    torch.testing.assert_close(dense(models[0]), dense(models[1]), rtol=0, atol=1e-12)
    for model in models:
        optimizer = optimize(model)
        losses = [step(model, optimizer, target()) for _ in range(6)]
        assert losses[-1] < losses[0]
    torch.testing.assert_close(dense(models[0]), dense(models[1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("optimize", MAKERS)
def test_factors_stay_orthonormal_and_one(optimize):
    model = make()
    optimizer = optimize(model)
    for _ in range(60):
        step(model, optimizer, target())
    _, relations, _, tails = (core.detach() for core in model.cores)
    assert model.cores[2] is model.cores[3]
    for factor in (relations, tails):
        torch.testing.assert_close(factor.mT @ factor, torch.eye(factor.shape[1], dtype=F64), rtol=0, atol=1e-12)


def test_float32_bases_stay_orthonormal():
    model = make((3, 4)).float()
    optimizer = SharedRiemannianAdam(model, 0.01)
    for _ in range(120):
        step(model, optimizer, target().float())
    tails = model.cores[3].detach()
    assert float((tails.mT @ tails - torch.eye(4)).norm()) < 1e-5


def planted(ranks, seed=7):
    """A tensor of shared multilinear ranks."""
    return dense(make(ranks, seed=seed, std=1.0))


@pytest.mark.parametrize("optimize", [partial(SharedRiemannianSGD, lr=0.5), partial(SharedRiemannianAdam, lr=0.05)])
def test_a_tensor_of_these_ranks_is_found(optimize):
    wanted = planted((2, 3))
    model = make((2, 3), std=1.0)
    optimizer = optimize(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for _ in range(250):
        step(model, optimizer, wanted)
        if isinstance(optimizer, SharedRiemannianAdam):
            schedule.step()
    assert float((dense(model) - wanted).norm()) < 0.02 * float(wanted.norm())


def test_weight_decay_shrinks_the_tensor_itself():
    model = make()
    optimizer = SharedRiemannianSGD(model, 0.1, weight_decay=0.5)
    before = dense(model)
    (0.0 * distance(model, target())).backward()
    optimizer.step()
    torch.testing.assert_close(dense(model), 0.95 * before, rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return made


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_no_step_makes_an_object_of_entities_by_entities(shared, adaptive):
    graph = SimpleNamespace(num_entities=3000, num_relations=4, inverse=True)
    model = RTuckER(graph, (3, 12), shared=shared, adaptive=adaptive)
    with Largest() as seen:
        optimizer = r_tucker_optimizer(model, 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model.score_all(torch.arange(16), torch.arange(16) % 4).square().mean().backward()
            optimizer.step()
    assert 3000 * 16 <= seen.numel <= 3000 * 32  # scores; tables of doubled ranks


# --- ranks that a tolerance finds ---


def fitted(wanted, steps=250, *, start=(1, 1), **options):
    model = make(start, adaptive=True, std=0.1)
    optimizer = SharedRiemannianAdam(model, 0.05, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for _ in range(steps):
        step(model, optimizer, wanted)
        schedule.step()
    return model, optimizer


@pytest.mark.parametrize("start", [(1, 1), (6, 9)])
def test_ranks_are_found_from_below_and_from_above(start):
    wanted = planted((2, 4))
    model, optimizer = fitted(wanted, start=start, tol=0.02, settle=200)
    assert optimizer.ranks() == {"": (2, 4, 4)}
    assert model.network.ranks == (2, 4, 4)  # settled: without reserve
    assert float((dense(model) - wanted).norm()) < 0.05 * float(wanted.norm())


def test_without_reserve_ranks_are_stuck_at_a_stationary_point_of_their_rank():
    wanted = planted((2, 4))
    with_, without = (fitted(wanted, 120, tol=0.3, reserve=k)[1].ranks()[""] for k in (1, 0))
    assert with_ >= without
    assert with_[1] > 1


def test_compact_leaves_the_reserve_out():
    model, optimizer = fitted(planted((2, 4)), 40, tol=0.05)
    ranks = optimizer.ranks()[""]
    assert model.network.ranks != ranks
    small = compact(model)
    assert small.network.ranks == ranks
    assert small.cores[2] is small.cores[3]
    cut = dense(small)
    del small  # a live copy is pointed out when ranks change
    assert float((cut - dense(model)).norm()) <= 0.06 * float(dense(model).norm())
    optimizer.settle()
    torch.testing.assert_close(dense(model), cut, rtol=0, atol=1e-10)
    assert model.network.ranks == ranks
    step(model, optimizer, planted((2, 4)))
    assert model.network.ranks == ranks


def test_max_rank_is_a_cap_with_the_reserve():
    model, optimizer = fitted(target(), 30, tol=0.01, max_rank=3)
    assert max(model.network.ranks) == 3
    assert max(optimizer.ranks()[""]) <= 3


# --- bookkeeping ---


@pytest.mark.parametrize("options", [{}, {"tol": 0.1}, {"tol": 0.1, "settle": 7}])
@pytest.mark.parametrize("kind", [SharedRiemannianSGD, SharedRiemannianAdam])
def test_resumed_runs_agree_bit_by_bit(kind, options):
    lr = 0.02 if kind is SharedRiemannianAdam else 0.1
    straight = make()
    optimizer = kind(straight, lr, **options)
    for _ in range(5):
        step(straight, optimizer, target())
    weights, state = copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed = make(seed=5)
    again = kind(resumed, lr, **options)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    for _ in range(5):
        losses = {step(model, own, target()) for model, own in ((straight, optimizer), (resumed, again))}
        assert len(losses) == 1
    assert all(torch.equal(a, b) for a, b in zip(straight.cores, resumed.cores, strict=True))
    assert optimizer.ranks() == again.ranks()


@pytest.mark.parametrize("shared", [True, False])
def test_saved_models_are_loaded_at_their_ranks(shared, tmp_path):
    model = make((2, 3), shared=shared, adaptive=True)
    optimizer = r_tucker_optimizer(model, 0.02)
    step(model, optimizer, target())
    small = compact(model)
    tnlayers.save(small, tmp_path / "scores")
    loaded = tnlayers.load(tmp_path / "scores", make((4, 5), shared=shared, adaptive=True))
    assert isinstance(loaded, RTuckER)
    assert (loaded.shared, loaded.cores[2] is loaded.cores[3]) == (shared, shared)
    torch.testing.assert_close(dense(loaded), dense(small), rtol=0, atol=0)
    del small
    assert step(loaded, r_tucker_optimizer(loaded, 0.02), target()) > step(loaded, r_tucker_optimizer(loaded), target())


def test_a_replaced_weight_opens_a_new_window():
    model = make()
    optimizer = SharedRiemannianAdam(model, 0.02)
    step(model, optimizer, target())
    other = make(seed=8)
    model.set_network(other.network.detach())
    torch.testing.assert_close(dense(model), dense(other), rtol=0, atol=1e-12)
    assert optimizer.ranks() == {"": (2, 3, 3)}
    for _ in range(3):
        step(model, optimizer, target())
    table = torch.randn(9, 3, dtype=F64)
    with pytest.raises(ValueError, match="heads and tails share a table"):
        model.set_network(model.network.replace([*model.network.detach().cores[:3], table]))


def test_another_optimizer_may_take_over():
    model = make()
    first = SharedRiemannianAdam(model, 0.02, tol=0.1)
    step(model, first, target())
    before = dense(model)
    second = SharedRiemannianSGD(model, 0.1)
    torch.testing.assert_close(dense(model), before, rtol=0, atol=1e-10)
    step(model, second, target())
    assert float((dense(model) - before).norm()) > 1e-3


def test_other_parameters_go_to_the_inner_optimizer():
    both = torch.nn.ModuleDict({"scores": make(), "scale": torch.nn.Linear(1, 1, bias=False, dtype=F64)})
    optimizer = SharedRiemannianAdam(both, 0.02)
    assert isinstance(optimizer.inner, torch.optim.AdamW)
    before, weight = dense(both["scores"]), both["scale"].weight.detach().clone()
    (both["scale"].weight.sum() * distance(both["scores"], target())).backward()
    optimizer.step()
    assert not torch.equal(weight, both["scale"].weight)
    assert not torch.equal(before, dense(both["scores"]))


def test_gradients_that_are_not_finite_move_nothing():
    model = make()
    optimizer = SharedRiemannianAdam(model, 0.02)
    before = dense(model)
    (distance(model, target()) * float("nan")).backward()
    with pytest.raises(ValueError, match="SharedRiemannianAdam: gradients must be finite"):
        optimizer.step()
    assert torch.equal(before, dense(model))


def test_a_model_in_training_is_evaluated_as_its_compact_copy():
    names = [chr(97 + k) for k in range(9)]
    rows = [(names[k], "r", names[(k + 1) % 9]) for k in range(9)] + [(names[0], "s", names[4])]
    triples = load_triples({"train": rows[2:], "valid": rows[:1], "test": rows[1:2]})
    model = make((2, 4), graph=triples)
    optimizer = r_tucker_optimizer(model, 0.1)
    wanted = torch.zeros(triples.num_relations, 9, 9, dtype=F64)
    h, r, t = triples.directed("train").unbind(1)
    wanted[r, h, t] = 1
    for _ in range(20):
        step(model, optimizer, wanted)
    assert evaluate(model, triples, "train").mrr == evaluate(compact(model), triples, "train").mrr > 0.5


@pytest.mark.parametrize(
    ("options", "keywords", "kind"),
    [
        ({}, {}, SharedRiemannianAdam),
        ({}, {"method": "sgd"}, SharedRiemannianSGD),
        ({"shared": False}, {}, RiemannianAdam),
        ({"shared": False}, {"method": "sgd"}, RiemannianSGD),
        ({"adaptive": True}, {"tol": 0.2}, SharedRiemannianAdam),
        ({"adaptive": True}, {"method": "sgd"}, SharedRiemannianSGD),
        ({"adaptive": True, "shared": False}, {}, RankAdaptive),
    ],
)
def test_optimizers_descend(options, keywords, kind):
    model = make((2, 3), **options)
    optimizer = r_tucker_optimizer(model, 0.02, **keywords)
    assert type(optimizer) is kind
    losses = [step(model, optimizer, target()) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]


def test_lr_is_the_root_mean_square_change_of_a_score():
    model = make(std=1.0)
    optimizer = r_tucker_optimizer(model, 1e-4, method="sgd")
    before = dense(model)
    step(model, optimizer, target())
    assert abs(float((dense(model) - before).square().mean().sqrt()) / 1e-4 - 1) < 1e-2


def test_refusals():
    for wrong in ((3,), (3, 0), (1, 2, 3, 4), (True, 2), (2.0, 2)):
        with pytest.raises(ValueError, match="RTuckER: ranks are ints >= 1"):
            make(wrong)
    with pytest.raises(ValueError, match="share a table, expected equal ranks, got 3 and 4"):
        make((2, 3, 4))
    model = make()
    with pytest.raises(ValueError, match=r"method must be one of \('adam', 'sgd'\), got 'sdg'"):
        r_tucker_optimizer(model, method="sdg")
    with pytest.raises(ValueError, match="the ranks of this model stay"):
        r_tucker_optimizer(model, tol=0.1)
    with pytest.raises(ValueError, match="ranks of separate tables adapt by method='adam'"):
        r_tucker_optimizer(make(shared=False, adaptive=True), method="sgd")
    with pytest.raises(TypeError, match="expected an RTuckER, got Linear"):
        r_tucker_optimizer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two factors of which are one Parameter"):
        SharedRiemannianSGD(make(shared=False), 0.1)
    with pytest.raises(ValueError, match=r"tol must be a number in \[0, 1\), or None, got 1.5"):
        SharedRiemannianAdam(model, 0.1, tol=1.5)
    train = ScoreTensor(9, 6, inverse=True, network=tnlayers.random_network(TT, rank=3))
    train.cores[0] = train.cores[2]
    with pytest.raises(ValueError, match="shared factors need a core with a matrix for every mode"):
        SharedRiemannianSGD(train, 0.1)
    with pytest.raises(ValueError, match="batch norms and a bias are no part"):
        RTuckER.from_tucker(TuckER(GRAPH, 3, 2))
    with pytest.raises(TypeError, match="expected a TuckER, got RTuckER"):
        RTuckER.from_tucker(model)
