"""The frontier against every choice there is."""

import itertools
import random

import pytest

from decompositions.knapsack import Frontier, Option


def instance(seed: int, step: int = 1) -> list[list[Option]]:
    draw = random.Random(seed)
    return [
        [
            Option(draw.randint(0, 40) * step, draw.choice([0.0, draw.random(), draw.random() * 1e-6]))
            for _ in range(draw.randint(1, 6))
        ]
        for _ in range(draw.randint(1, 5))
    ]


def every(groups: list[list[Option]]) -> list[tuple[int, float]]:
    return [(sum(o.price for o in chosen), sum(o.error for o in chosen)) for chosen in itertools.product(*groups)]


@pytest.mark.parametrize("seed", range(60))
def test_every_budget_is_optimal(seed: int) -> None:
    groups = instance(seed, step=1 + seed % 7)
    frontier, choices = Frontier(groups), every(groups)
    least, most = min(p for p, _ in choices), max(p for p, _ in choices)
    assert frontier.least == least
    for budget in {
        least,
        most,
        most + 10,
        *random.Random(seed).sample(range(least, most + 1), min(20, most + 1 - least)),
    }:
        chosen = frontier.within(budget)
        assert frontier.price(chosen) <= budget
        assert frontier.error(chosen) == pytest.approx(min(e for p, e in choices if p <= budget), abs=1e-15)
    for _, error in random.Random(seed).sample(choices, min(10, len(choices))):
        chosen = frontier.cheapest(error * (1 + 1e-12))
        assert frontier.error(chosen) <= error * (1 + 1e-12)
        assert frontier.price(chosen) == min(p for p, e in choices if e <= error * (1 + 1e-12))


@pytest.mark.parametrize("seed", range(20))
def test_a_coarse_table_never_exceeds_a_budget_and_loses_a_unit_a_group_at_most(seed: int) -> None:
    groups = [[Option(p * 997 + 1, e) for p, e in group] for group in instance(seed)]
    frontier, choices = Frontier(groups, cells=25), every(groups)
    for budget in random.Random(seed).sample([p for p, _ in choices], min(20, len(choices))):
        chosen = frontier.within(budget)
        assert frontier.price(chosen) <= budget
        lower = budget - len(groups) * frontier.unit
        reachable = [e for p, e in choices if p <= lower]
        if reachable:
            assert frontier.error(chosen) <= min(reachable) + 1e-15


def test_it_refuses_what_it_cannot_meet() -> None:
    frontier = Frontier([[Option(3, 1.0), Option(5, 0.5)]])
    with pytest.raises(ValueError, match="expected at least 3, got 2"):
        frontier.within(2)
    with pytest.raises(ValueError, match=r"expected at least 0\.5"):
        frontier.cheapest(0.1)
    for groups, message in (
        ([[]], "got none in group 0"),
        ([[Option(-1, 0.0)]], "whole numbers"),
        ([[Option(1, float("nan"))]], "finite"),
        ([[Option(1.5, 0.0)]], "whole numbers"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            Frontier(groups)
    with pytest.raises(ValueError, match="cells"):
        Frontier([[Option(1, 0.0)]], cells=0)


def test_without_groups_nothing_is_chosen() -> None:
    assert Frontier([]).within(0) == []
