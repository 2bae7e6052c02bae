"""Models of ours inside PyKEEN: the same scores, trained by its pipeline, and back."""

import gc
import logging
import pickle
import warnings
from functools import partial

import pytest
import torch

pytest.importorskip("pykeen")
warnings.filterwarnings("ignore")  # PyKEEN's own, on import

from pykeen import models  # noqa: E402
from pykeen.datasets import get_dataset  # noqa: E402
from pykeen.models import ERModel  # noqa: E402
from pykeen.pipeline import pipeline  # noqa: E402

import tnlayers  # noqa: E402
from decompositions import TTMatrix  # noqa: E402
from tnlayers import kg  # noqa: E402
from tnlayers.kg.pykeen import broadcast_scores  # noqa: E402
from tnlayers.optim import RankAdaptive, RiemannianAdam  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("pykeen").setLevel(logging.ERROR)

MODELS = {
    "TuckER": partial(kg.TuckER, entity_dim=6, relation_dim=3),
    "TuckER, two tables, bias": partial(kg.TuckER, entity_dim=6, relation_dim=3, shared=False, entity_bias=True),
    "TuckER, TT table": partial(
        kg.TuckER, entity_dim=8, relation_dim=3, entity_table=tnlayers.random_network(TTMatrix, rank=3)
    ),
    "TTER": partial(kg.TTER, entity_dim=6, relation_dim=3, rank=2),
    "MEIM": kg.MEIM,
    "ComplEx": partial(kg.ComplEx, dim=5),
    "RotH": partial(kg.RotH, entity_dim=6, std=0.3),
    "MIGTF": lambda of: kg.MIGTF(kg.TuckER(of, 6, 3), hyperbolic_dim=4, relation_std=0.5),
}


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    """PyKEEN collects garbage after every epoch: of a whole run of tests, many seconds each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def plain():
    return kg.load_triples("nations", inverse=False), get_dataset(dataset="nations")


@pytest.fixture(scope="module")
def nations():
    return kg.load_triples("nations"), get_dataset(dataset="nations", dataset_kwargs={"create_inverse_triples": True})


def made(name, triples):
    model = MODELS[name](triples).double()
    for value in model.parameters():
        if value.ndim > 1 and not bool(value.any()):
            torch.nn.init.normal_(value, std=0.3)  # the start of MIG-TF says nothing
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_scores_inside_pykeen_as_outside(name, nations):
    triples, data = nations
    model = made(name, triples)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = kg.er_model(model, data.training).eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    h, t, r = torch.arange(14), torch.arange(14).flip(0), torch.arange(14) * 3
    pykeen_r = 2 * r  # r^-1 is 2 r + 1 there
    expected = model.score_all(h, r).detach()
    torch.testing.assert_close(theirs.score_t(torch.stack([h, pykeen_r], 1)), expected)
    torch.testing.assert_close(theirs.score_t(torch.stack([h, pykeen_r + 1], 1)), model.score_all(h, r + 55))
    some = torch.tensor([3, 0, 9])
    torch.testing.assert_close(theirs.score_t(torch.stack([h, pykeen_r], 1), tails=some), expected[:, some])
    each = torch.stack([h, t], 1)
    torch.testing.assert_close(theirs.score_t(torch.stack([h, pykeen_r], 1), tails=each), expected.gather(1, each))
    torch.testing.assert_close(theirs.score_t(torch.stack([h, pykeen_r], 1), slice_size=5), expected)
    torch.testing.assert_close(
        theirs.score_hrt(torch.stack([h, pykeen_r, t], 1))[:, 0], expected.gather(1, t[:, None])[:, 0]
    )
    heads = theirs.score_h(torch.stack([pykeen_r, t], 1))
    pairs = torch.cartesian_prod(torch.arange(14), torch.arange(14))
    byhand = model(pairs[:, 1], r[pairs[:, 0]], t[pairs[:, 0]]).reshape(14, 14)
    torch.testing.assert_close(heads, byhand)
    relations = theirs.score_r(torch.stack([h, t], 1))
    torch.testing.assert_close(relations[:, ::2], model.score_relations(h, t))


def test_broadcasting_needs_one_query_a_row(nations):
    triples, _ = nations
    model, asked = made("TuckER", triples), []
    own = model.query
    model.query = lambda heads, relations: asked.append(len(heads)) or own(heads, relations)
    h, r, t = torch.arange(4)[:, None], torch.arange(4)[:, None], torch.arange(14)[None]
    full = broadcast_scores(model, h, r, t)
    assert asked == [4]
    torch.testing.assert_close(broadcast_scores(model, h, r, t[:, 3:9]), full[:, 3:9])
    torch.testing.assert_close(broadcast_scores(model, h[..., None], r[..., None], t[None]), full[:, None])
    several = broadcast_scores(model, h[:, None], r[None], t[None])  # (4, 4, 14): every head with every relation
    torch.testing.assert_close(several.diagonal(), full.mT)
    crossed = broadcast_scores(model, h.mT, r.mT, t.mT)  # (14, 4): the tails in the other axis
    torch.testing.assert_close(crossed, full.mT)
    assert broadcast_scores(model, h[1, 0], r[1, 0], t[0, 2]) == full[1, 2]
    assert asked == [4, 4, 4, 16, 4, 1]


@pytest.mark.parametrize("loop", ["lcwa", "slcwa"])
def test_the_pipeline_trains_the_model_in_place(loop, nations):
    triples, data = nations
    model = kg.TuckER(triples, entity_dim=8, relation_dim=4, dropouts=(0.0, 0.1, 0.1))
    before = kg.evaluate(model.eval(), triples).mrr
    arguments = kg.interaction(model).representations()
    result = pipeline(
        training=data.training, validation=data.validation, testing=data.testing, model=ERModel,
        model_kwargs=arguments, loss="BCEWithLogitsLoss", optimizer="adam", optimizer_kwargs={"lr": 0.02},
        training_loop=loop, training_kwargs={"num_epochs": 3, "batch_size": 64, "use_tqdm": False},
        evaluation_kwargs={"use_tqdm": False, "batch_size": 64}, random_seed=0, device="cpu",
    )  # fmt: skip
    assert kg.own_model(result.model) is model
    after = kg.evaluate(model.eval(), triples)
    assert after.mrr > before + 0.05
    assert after.mrr == pytest.approx(result.get_metric("mrr"), abs=1e-6)
    copy = kg.own_model(result.model, kg.TuckER(triples, entity_dim=8, relation_dim=4)).eval()
    assert torch.equal(copy.score_all(*triples.train[:5, :2].T), model.score_all(*triples.train[:5, :2].T))
    again = pickle.loads(pickle.dumps(result.model))
    assert torch.equal(again.interaction.model.entities.weight, model.entities.weight)


@pytest.mark.parametrize(
    ("name", "loop", "inverse"),
    [("TuckER", "lcwa", False), ("MIGTF", "slcwa", True), ("RotH", "lcwa", True), ("TTER", "slcwa", False)],
)
def test_after_early_stopping_metrics_are_those_of_our_evaluation(name, loop, inverse, request):
    triples, data = request.getfixturevalue("nations" if inverse else "plain")
    model = MODELS[name](triples)
    result = pipeline(
        training=data.training, validation=data.validation, testing=data.testing, model=ERModel,
        model_kwargs=kg.interaction(model).representations(), loss="BCEWithLogitsLoss", optimizer="adam",
        training_loop=loop, training_kwargs={"num_epochs": 2, "batch_size": 256, "use_tqdm": False}, stopper="early",
        stopper_kwargs={"frequency": 1, "patience": 1, "relative_delta": 0.9, "evaluation_batch_size": 64},
        evaluation_kwargs={"use_tqdm": False, "batch_size": 64}, random_seed=0, device="cpu",
    )  # fmt: skip
    found = kg.evaluate(model, triples)
    for side, ours in (("both", found), *found.by_direction.items()):
        assert ours.mrr == pytest.approx(result.get_metric(f"{side}.realistic.inverse_harmonic_mean_rank"), abs=1e-6)
        assert ours.hits[10] == pytest.approx(result.get_metric(f"{side}.realistic.hits_at_10"))


@pytest.mark.parametrize("name", MODELS)
def test_heads_as_candidates_without_inverse_relations(name, plain):
    triples, data = plain
    model = made(name, triples)
    theirs = kg.er_model(model, data.training).eval()
    r, t = torch.arange(14) * 3, torch.arange(14).flip(0)
    expected = torch.stack([model(torch.arange(14), r[k].expand(14), t[k].expand(14)) for k in range(14)])
    asked, own = [], model.query
    model.query = lambda heads, relations: asked.append(len(heads)) or own(heads, relations)
    torch.testing.assert_close(theirs.score_h(torch.stack([r, t], 1)), expected)
    torch.testing.assert_close(theirs.score_h(torch.stack([r, t], 1), heads=torch.tensor([3, 0])), expected[:, [3, 0]])
    assert bool(asked) == (name in ("RotH", "MIGTF"))  # the others need no query for a head
    torch.testing.assert_close(broadcast_scores(model, torch.arange(14), r[4], t[4]), expected[4])
    crossed = broadcast_scores(model, torch.arange(14)[:, None], r[None], t[None])
    torch.testing.assert_close(crossed, expected.mT)


@pytest.mark.parametrize("kind", [partial(RiemannianAdam, lr=0.01), partial(RankAdaptive, lr=0.01, tol=0.1)])
def test_an_optimizer_of_ours_goes_into_the_pipeline(kind, nations):
    triples, data = nations
    model = kg.TuckER(triples, entity_dim=8, relation_dim=4, dropouts=(0.0, 0.0, 0.0))
    before = model.maps.network.cores[1].clone()
    result = pipeline(
        training=data.training, testing=data.testing, model=kg.er_model(model, data.training, loss="BCEWithLogitsLoss"),
        optimizer=kg.pipeline_optimizer(model, kind), training_loop="lcwa",
        training_kwargs={"num_epochs": 2, "batch_size": 64, "use_tqdm": False},
        evaluation_kwargs={"use_tqdm": False}, random_seed=0, device="cpu",
    )  # fmt: skip
    assert result.losses[-1] < result.losses[0]
    after = model.maps.network.cores[1]
    assert after.shape != before.shape or not torch.equal(after, before)


def test_fresh_models_are_drawn_anew_and_others_kept(nations):
    triples, data = nations
    model = kg.TuckER(triples, entity_dim=6, relation_dim=3)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    kg.er_model(model, data.training)
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    torch.manual_seed(3)
    kg.er_model(model, data.training, fresh=True)
    first = model.entities.weight.clone()
    assert not torch.equal(first, start["entities.weight"])
    torch.manual_seed(3)
    kg.er_model(model, data.training, fresh=True)
    assert torch.equal(first, model.entities.weight)


def test_tables_serve_models_of_pykeen(nations):
    _, data = nations
    table = tnlayers.Embedding(14, 8, network=tnlayers.random_network(TTMatrix, rank=3))
    given = kg.representation(table)
    assert (given.max_id, given.shape) == (14, (8,))
    torch.testing.assert_close(given(torch.tensor([[1, 1], [3, 0]])), table.weight[torch.tensor([[1, 1], [3, 0]])])
    torch.testing.assert_close(given(None), table.weight)
    on_manifold = torch.nn.Parameter(torch.linalg.qr(torch.randn(14, 8)).Q)
    kept = on_manifold.detach().clone()
    model = ERModel(
        triples_factory=data.training, interaction="distmult", entity_representations=kg.representation(on_manifold),
        relation_representations_kwargs={"shape": 8},
    )  # fmt: skip
    assert torch.equal(on_manifold, kept)
    model.score_hrt(data.training.mapped_triples[:5]).sum().backward()
    assert on_manifold.grad is not None
    assert kg.own_model(model).score_all(torch.tensor([0]), torch.tensor([0])).shape == (1, 14)


def test_refusals(nations):
    triples, data = nations
    model = kg.TuckER(triples, entity_dim=6, relation_dim=3)
    plain = get_dataset(dataset="nations").training
    with pytest.raises(ValueError, match=r"expected 14 and 110 with .*=True, got 14 and 55 with False"):
        kg.er_model(model, plain)
    with pytest.raises(TypeError, match="expected a KGModel, got Linear"):
        kg.interaction(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"fresh=True needs reset_parameters\(\)"):
        kg.interaction(kg.KGModel(3, 2, inverse=False), fresh=True)
    theirs = kg.er_model(model, data.training)
    with pytest.raises(TypeError, match="into must be a TuckER, as trained, got ComplEx"):
        kg.own_model(theirs, kg.ComplEx(triples, dim=3))


TAKEN = {
    "TuckER": {"embedding_dim": 8, "relation_dim": 4},
    "TuckER, no norms": {"embedding_dim": 8, "apply_batch_normalization": False, "dropout_1": 0.1},
    "DistMult": {"embedding_dim": 8},
    "ComplEx": {"embedding_dim": 8},
    "CP": {"embedding_dim": 4, "rank": 3},
    "RESCAL": {"embedding_dim": 8},
}


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("name", TAKEN)
def test_a_model_that_pykeen_trained_is_one_of_ours(name, inverse, request):
    triples, data = request.getfixturevalue("nations" if inverse else "plain")
    kind = name.split(",")[0]
    theirs = pipeline(
        training=data.training, testing=data.testing, model=kind, model_kwargs=TAKEN[name],
        training_kwargs={"num_epochs": 2, "batch_size": 256, "use_tqdm": False},
        evaluation_kwargs={"use_tqdm": False, "batch_size": 64}, random_seed=0, device="cpu",
    ).model  # fmt: skip
    drawn = torch.random.get_rng_state()
    ours = getattr(kg, kind).from_pykeen(theirs)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert ours.training == theirs.training
    theirs.eval()
    ours.eval()
    h, r, t = triples.test.T
    seen = kg.as_model(theirs)
    torch.testing.assert_close(ours.score_all(h, r), seen.score_all(h, r), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.score_heads(r, t), seen.score_heads(r, t), rtol=1e-5, atol=1e-5)
    found, sought = kg.rank(ours, triples), kg.rank(theirs, triples)
    assert torch.equal(found.optimistic, sought.optimistic)
    assert torch.equal(found.pessimistic, sought.pessimistic)


def test_a_tucker_of_pykeen_brings_its_training_along(nations):
    _, data = nations
    theirs = models.TuckER(triples_factory=data.training, embedding_dim=6, relation_dim=3, dropout_0=0.1, dropout_2=0.0)
    theirs.interaction.head_batch_norm.momentum = 0.3
    ours = kg.TuckER.from_pykeen(theirs)
    assert ours.dropouts == (0.1, 0.4, 0.0)
    assert ours.norm0.momentum == 0.3
    assert ours.training
    ours.entities.weight.data.zero_()
    assert bool(theirs.entity_representations[0]().any())  # a copy


def test_what_a_model_of_ours_cannot_hold_is_refused(nations):
    _, data = nations
    factory = {"triples_factory": data.training}
    with pytest.raises(
        TypeError, match=r"TuckER.from_pykeen: .* with a TuckERInteraction, got TransE with a TransEInt"
    ):
        kg.TuckER.from_pykeen(models.TransE(**factory))
    with pytest.raises(TypeError, match=r"SimplE.from_pykeen: PyKEEN has no model with these scores"):
        kg.SimplE.from_pykeen(models.SimplE(**factory))
    for option in ({"normalizer": torch.nn.functional.normalize}, {"dropout": 0.2}):
        given = {"shape": 4, **option}
        model = ERModel(
            **factory, interaction="distmult", entity_representations_kwargs=given,
            relation_representations_kwargs={"shape": 4},
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"expected representations without normalizer and dropout, got Embedding"):
            kg.DistMult.from_pykeen(model)
