"""Settings of published runs: each trains a small model, and says what the paper says."""

from typing import Any

import pytest
from kg_models import graph

from tnlayers import kg
from tnlayers.kg import RECIPES, train

EPOCHS = 25
"""Of a trial: so many lower the loss of every recipe."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_in_short_form(name):
    """Made small, on a small graph, with their own training; models of which this package has none yet are left out."""
    recipe = RECIPES[name]
    assert recipe.source
    assert recipe.base is None or recipe.base in RECIPES
    kind = getattr(kg, recipe.model, None)
    if kind is None:
        pytest.skip(f"no {recipe.model} yet")
    triples = graph()
    small = {"entity_dim": 6, "relation_dim": 3, "block_dim": 4, "hyperbolic_dim": 3, "ranks": (3, 5)}
    options = {key: small.get(key, value) for key, value in recipe.options.items()}
    first: Any = triples
    if recipe.base is not None:
        base = RECIPES[recipe.base]
        first = getattr(kg, base.model)(triples, **{key: small.get(key, value) for key, value in base.options.items()})
    model = kind(first, **options)
    history = train(model, triples, **recipe.short(EPOCHS, batch_size=32, every=None, patience=None), seed=0)
    assert len(history.losses) == EPOCHS
    assert sum(history.losses[-5:]) / 5 < history.losses[0]


def test_published_settings():
    wn, fb = RECIPES["tucker-wn18rr"], RECIPES["tucker-fb15k237"]
    assert (wn.options["entity_dim"], wn.options["relation_dim"], wn.training["lr"]) == (200, 30, 3e-3)
    assert (fb.options["entity_dim"], fb.options["relation_dim"], fb.training["lr"]) == (200, 200, 5e-4)
    for recipe in (wn, fb):
        training = recipe.training
        assert (training["smoothing"], training["label_smoothing"], training["batch_size"]) == ("published", 0.1, 128)
        assert training["epochs"] == 500
