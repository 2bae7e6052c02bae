"""Jobs on knowledge graphs: folders that rebuild alone, predictions by name, tables as files."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kg_models import family, written

from tnlayers import kg
from tnlayers.kg.folder import make_model, parse_options
from tnlayers.kg.job import TrainConfig, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return written(tmp_path_factory.mktemp("family"), family())


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The same without what training has never seen."""
    return written(tmp_path_factory.mktemp("seen"), family(unseen=False))


TRAINING = {"epochs": 6, "lr": 0.02, "batch_size": 16, "every": 3}
OPTIONS = {"entity_dim": 12, "relation_dim": 2, "dropouts": [0.0, 0.1, 0.1]}


def config(data, out, **changed):
    made = {
        "options": OPTIONS,
        "training": {"epochs": 6, "lr": 0.02, "batch_size": 16, "every": 3},
        "seed": 1,
        "threads": 1,
    }
    return TrainConfig(str(data), out, **{**made, **changed})


@pytest.fixture(scope="module")
def trained(seen, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    return out, run(config(seen, out))


# --- folders ---


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TuckER", {"entity_dim": 4, "relation_dim": 2, "shared": False, "entity_bias": True, "dtype": "float64"}),
        ("TTER", {"entity_dim": 4, "relation_dim": 3, "rank": [2, 2]}),
        ("MEIM", {}),
        ("ComplEx", {"dim": 3}),
        ("RESCAL", {}),
        ("RotH", {"entity_dim": 4}),
        ("LPITF", {"dim": 3, "learn_curvature": True}),
        (
            "MIGTF",
            {"tucker": {"model": "TuckER", "options": {"entity_dim": 4, "relation_dim": 2}}, "hyperbolic_dim": 3},
        ),
    ],
)
def test_every_model_is_rebuilt_from_its_folder_alone(name, options, seen, tmp_path):
    graph = kg.load_triples(seen)
    model = make_model(name, graph, options)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    state = torch.get_rng_state()
    folder = kg.save_kg(model, tmp_path / "net", graph, options=options, about={"note": 1})
    again = kg.load_kg(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert (again.name, again.about) == (name, {"note": 1})
    h, r = graph.train[:5, :2].T
    assert torch.equal(again.model.score_all(h, r), model.eval().score_all(h, r))
    for split in ("train", "valid", "test"):
        assert torch.equal(again.triples.split(split), graph.split(split))
    assert dict(again.triples.entity_to_id) == dict(graph.entity_to_id)
    found = kg.embeddings(model)
    assert all(len(rows) == graph.num_entities for rows in found.entities.values())
    assert all(len(rows) == graph.num_relations for rows in found.relations.values())
    assert found.relations


def test_ranks_found_by_training_are_kept(seen, tmp_path):
    training = {"epochs": 4, "lr": 0.05, "batch_size": 16, "optimizer": "RankAdaptive"}
    run(config(seen, tmp_path / "out", training=training))
    held = kg.load_kg(tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert list(held.model.maps.network.ranks) == next(iter(log[-1]["ranks"].values()))


def test_tables_are_told_from_cores_of_the_same_size():
    graph = kg.load_triples({"train": [(f"e{k}", "r", f"e{k + 1}") for k in range(5)]}, inverse=False)
    model = kg.TuckER(graph, entity_dim=6, relation_dim=6, batch_norm=False)  # 6 entities: the core has 6 rows too
    found = kg.embeddings(model)
    assert list(found.entities) == ["entities"]
    model.train()
    assert kg.embeddings(model).entities.keys() == found.entities.keys()
    assert model.training
    net = make_network(graph)
    with pytest.raises(ValueError, match="ScoreTensor holds no table of its 6 entities"):
        kg.embeddings(net)


def make_network(graph):
    from decompositions import TT

    net = TT.random(row_modes=(1, 2, 3, 2, 3), rank=2)
    return kg.ScoreTensor(6, 1, inverse=False, network=net)


@pytest.mark.parametrize("file", ["kg.json", "names.json", "triples.safetensors", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_damaged_folders_are_refused_by_name(file, damage, seen, tmp_path):
    graph = kg.load_triples(seen)
    folder = kg.save_kg(kg.TuckER(graph, 4, 2), tmp_path / "net", graph, options={"entity_dim": 4, "relation_dim": 2})
    content = (folder / file).read_bytes()
    if damage == "gone":
        (folder / file).unlink()
    else:
        half = len(content) // 2
        (folder / file).write_bytes(
            content[:half] if damage == "cut" else content[:half] + b"\xff" * (len(content) - half)
        )
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(file)):
        kg.load_kg(folder)


def test_options_that_make_another_model_are_refused_and_nothing_is_left(seen, tmp_path):
    graph = kg.load_triples(seen)
    with pytest.raises(ValueError, match=r"must take back every tensor, but load: .*expected 4, then products = 5"):
        kg.save_kg(kg.TuckER(graph, 4, 2), tmp_path / "net", graph, options={"entity_dim": 5, "relation_dim": 2})
    with pytest.raises(ValueError, match="plain JSON"):
        kg.save_kg(kg.TuckER(graph, 4, 2), tmp_path / "net", graph, options={}, about={"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


# --- the job ---


def test_train_writes_everything_and_goes_on_where_it_was(trained, seen):
    out, result = trained
    assert {path.name for path in out.iterdir()} == {
        "model", "checkpoint.pt", "log.jsonl", "metrics.json", "settings.json", "index.html",
    }  # fmt: skip
    found = json.loads((out / "metrics.json").read_text())
    assert found["test"]["mrr"] == result.metrics["test"].mrr
    assert found["parameters"] == result.parameters == kg.load_kg(out).model.parameter_count()
    assert len((out / "log.jsonl").read_text().splitlines()) == 6
    page = (out / "index.html").read_text()
    assert "grandparent of" in page
    assert "://" not in page.replace("http://www.w3.org", "")
    again = run(config(seen, out))
    assert again.history.losses == result.history.losses
    assert again.metrics["test"].mrr == result.metrics["test"].mrr
    with pytest.raises(ValueError, match=r"holds another run: seed = 2 \(there: 1\)"):
        run(config(seen, out, seed=2))


def test_a_run_that_is_killed_goes_on_bit_for_bit(seen, tmp_path, trained):
    out = tmp_path / "out"
    code = (
        "import sys; from tnlayers.kg.job import TrainConfig, run\n"
        "import os, signal\n"
        "def progress(done, whole, text):\n"
        "    if done == 14: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"run(TrainConfig({str(seen)!r}, {str(out)!r}, options={OPTIONS!r}, seed=1, threads=1,"
        f" training={ ({**TRAINING, 'checkpoint_seconds': 1e-9})!r}), progress)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (out / "checkpoint.pt").is_file()
    assert not (out / "model").exists()
    result = run(config(seen, out, training={**TRAINING, "checkpoint_seconds": 1e-9}))
    assert result.history.losses == trained[1].history.losses
    one, other = (kg.load_kg(folder).model.state_dict() for folder in (out, trained[0]))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_recipes_by_name(seen, tmp_path):
    for name in ("tucker-umls", "rot-h-wn18rr"):
        changed = {"entity_dim": 4}
        result = run(config(seen, tmp_path / name, recipe=name, options=changed, training={"epochs": 1}))
        recipe = kg.recipes.RECIPES[name]
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        assert settings["model"] == recipe.model == kg.load_kg(tmp_path / name).name
        assert settings["training"]["lr"] == recipe.training["lr"]
        assert settings["training"]["epochs"] == len(result.history.epochs) == 1
        assert kg.load_kg(tmp_path / name).options["entity_dim"] == 4
    with pytest.raises(ValueError, match=r"no recipe is called 'tucker', expected one of .*tucker-umls"):
        config(seen, tmp_path / "x", recipe="tucker")


def test_job_refusals(data, seen, trained, tmp_path):
    with pytest.raises(ValueError, match="no training option 'epoch', expected one of epochs"):
        config(seen, tmp_path / "x", training={"epoch": 3})
    with pytest.raises(ValueError, match=r"no model is called 'tuker', expected one of .*TuckER"):
        config(seen, tmp_path / "x", model="tuker")
    with pytest.raises(ValueError, match="TuckER has no option 'dim', expected one of entity_dim"):
        run(config(seen, tmp_path / "x", options={"dim": 3}))
    with pytest.raises(FileNotFoundError, match="OUT must be a folder, or a new one"):
        run(config(seen, tmp_path / "no" / "x"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        run(config(seen, tmp_path / "mine", overwrite=True))
    with pytest.raises(ValueError, match="MIGTF is made on a trained model, expected one as the option 'tucker'"):
        run(config(seen, tmp_path / "x", model="MIGTF", options={}))
    with pytest.raises(ValueError, match="TuckER is not made on another model"):
        run(config(seen, tmp_path / "x", base=str(trained[0])))
    with pytest.raises(ValueError, match="was trained on another graph"):
        run(config(data, tmp_path / "x", model="MIGTF", options={}, base=str(trained[0])))
    assert not (tmp_path / "x").exists()


def test_a_model_on_a_trained_one(seen, trained, tmp_path):
    result = run(
        config(seen, tmp_path / "out", model="migtf", base=str(trained[0]), options={"hyperbolic_dim": 3},
               training={"epochs": 0})
    )  # fmt: skip
    assert result.metrics["test"].mrr == pytest.approx(trained[1].metrics["test"].mrr)  # starts where TuckER ended
    held, base = kg.load_kg(tmp_path / "out"), kg.load_kg(trained[0])
    assert torch.equal(held.model.tucker.entities.weight, base.model.entities.weight)


def test_options_as_text():
    found = parse_options(("a=3", "b=.5", "c=.2,.3", "d=none", "e=row", "f=RankAdaptive", "g=(1,2)"))
    assert found == {"a": 3, "b": 0.5, "c": [0.2, 0.3], "d": None, "e": "row", "f": "RankAdaptive", "g": [1, 2]}
    for wrong in (("a",), ("=3",), ("a=1", "a=2")):
        with pytest.raises(ValueError, match="KEY=VALUE, each key once"):
            parse_options(wrong)


# --- predictions ---


def test_predictions_are_the_scores_in_order(trained):
    held = kg.load_kg(trained[0])
    graph = held.triples
    found = kg.predict(held.model, graph, head="person 2", relation="parent of", count=1000)
    h, r = graph.entity_ids(["person 2"]), graph.relation_ids(["parent of"])
    scores = held.model.score_all(h, r)[0].double()
    assert [a.score for a in found.answers] == scores.sort(descending=True).values.tolist()
    assert {a.name for a in found.answers if a.known == "train"} == {"person 4", "person 5"}
    assert found.known == 2
    fresh = kg.predict(held.model, graph, head="person 2", relation="parent of", count=1000, filtered=True)
    assert [a.name for a in fresh.answers] == [a.name for a in found.answers if not a.known]
    heads = kg.predict(held.model, graph, relation="grandparent of", tail="person 4", count=1000)
    assert {(a.name, a.known) for a in heads.answers if a.known} == {("person 1", "valid")}
    scores = held.model.score_heads(graph.relation_ids(["grandparent of"]), graph.entity_ids(["person 4"]))[0].double()
    assert [a.score for a in heads.answers] == scores.sort(descending=True).values.tolist()
    between = kg.predict(held.model, graph, head="person 1", tail="person 6")
    assert {(a.name, a.known) for a in between.answers} == {("parent of", ""), ("grandparent of", "test")}
    held.model.train()
    kg.predict(held.model, graph, head="person 1", tail="person 6")
    assert held.model.training


def test_what_predict_refuses(data, trained):
    held = kg.load_kg(trained[0])
    with pytest.raises(ValueError, match=r"no entity 'person 99' .*like it: person 9"):
        kg.predict(held.model, held.triples, head="person 99", relation="parent of")
    with pytest.raises(ValueError, match=r"no relation 'parent' .*like it: parent of"):
        kg.predict(held.model, held.triples, head="person 9", relation="parent")
    with pytest.raises(ValueError, match="two of head, relation and tail must be given, got 1"):
        kg.predict(held.model, held.triples, head="person 9")
    graph = kg.load_triples(data)
    model = kg.TuckER(graph, 4, 2)
    with pytest.raises(ValueError, match="no training triple has the relation 'knows'; the model has never seen it"):
        kg.predict(model, graph, head="person 1", relation="knows")
    with pytest.warns(UserWarning, match="no training triple has the entity 'stranger'"):
        kg.predict(model, graph, relation="parent of", tail="stranger")
    with pytest.raises(ValueError, match="ask with the triples it was made from"):
        kg.predict(held.model, graph, head="person 1", relation="parent of")
    with torch.no_grad():
        held.model.entities.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="scores must be finite"):
        kg.predict(held.model, held.triples, head="person 1", relation="parent of")


# --- export ---


def test_tables_as_files(trained, tmp_path):
    held = kg.load_kg(trained[0])
    weight = held.model.entities.weight.detach().numpy()
    kg.export_embeddings(held.model, held.triples, tmp_path / "npy")
    assert np.array_equal(np.load(tmp_path / "npy" / "entities.npy"), weight)
    names = json.loads((tmp_path / "npy" / "names.json").read_text())
    assert names["entities"] == held.triples.entity_labels
    assert names["relations"] == ["grandparent of", "parent of", "grandparent of^-1", "parent of^-1"]
    (file,) = kg.export_embeddings(held.model, held.triples, tmp_path, form="w2v", what="entities")
    first, *lines = file.read_text().splitlines()
    assert first == f"{len(weight)} {weight.shape[1]}"
    assert [line.split()[0] for line in lines] == [name.replace(" ", "_") for name in names["entities"]]
    assert np.array_equal(np.array([line.split()[1:] for line in lines], dtype=np.float32), weight)
    with pytest.raises(ValueError, match=r"holds entities.w2v.txt; give overwrite=True"):
        kg.export_embeddings(held.model, held.triples, tmp_path, form="w2v", what="entities")
    twins = kg.load_triples({"train": [("a b", "r", "a_b")]})
    with pytest.raises(ValueError, match="names must differ when blanks are '_', got 'a b' and 'a_b'"):
        kg.export_embeddings(kg.TuckER(twins, 3, 2), twins, tmp_path / "t", form="w2v")
    assert not (tmp_path / "t").exists()


def test_parquet_or_what_is_missing(trained, tmp_path):
    held = kg.load_kg(trained[0])
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        with pytest.raises(ImportError, match=f"parquet needs pandas and pyarrow .{error.name} is missing"):
            kg.export_embeddings(held.model, held.triples, tmp_path / "p", form="parquet")
        assert not (tmp_path / "p").exists()
        return
    file, _ = kg.export_embeddings(held.model, held.triples, tmp_path / "p", form="parquet")
    table = pandas.read_parquet(file)
    assert list(table["name"]) == held.triples.entity_labels
    assert np.array_equal(table.drop(columns="name").to_numpy(), held.model.entities.weight.detach().numpy())


def test_points_of_a_hyperbolic_model_are_exported(seen, tmp_path):
    graph = kg.load_triples(seen)
    model = kg.RotH(graph, entity_dim=4, std=2.0)
    kg.export_embeddings(model, graph, tmp_path / "out", what="entities")
    points = np.load(tmp_path / "out" / "entities-ball.npy")
    norm = np.linalg.norm(points, axis=1)
    assert norm.max() < 1
    # curvature 1: the distance from the origin is twice the length of the tangent vector
    expected = 2 * model.entities.detach().double().norm(dim=1).numpy()
    np.testing.assert_allclose(2 * np.arctanh(norm), expected, rtol=1e-6)
