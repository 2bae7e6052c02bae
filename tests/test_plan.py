"""Plans: plain data made from shapes, whose numbers are those of the contraction they describe."""

import json
import pickle
from math import prod

import pytest
import reference
import torch
from cases import ALL, OPERATORS

from decompositions import TT, LowRank, TTMatrix, Tucker, apply, explain, plan_apply
from decompositions.formats.contract import batch_letters, split_equation
from decompositions.formats.plan import BATCH, Step, bucket, extend, plan_dense, plan_path, run

EVERY = pytest.mark.parametrize("case", ALL, ids=repr)
OPERATOR = pytest.mark.parametrize("case", OPERATORS, ids=repr)


def operands_used(steps) -> list[int]:
    return [k for step in steps for k in (step.left, step.right) if k >= 0]


@EVERY
def test_plans_are_plain_data_and_use_every_operand_once(case):
    net = case()
    for plan, count in [(plan_dense(net), len(net.cores))] + [
        (plan, len(net.cores) + 1) for plan in (plan_apply(net, 16) if net.cols else ())
    ]:
        assert sorted(operands_used(plan.steps)) == list(range(count + plan.calls - 1 if plan.calls else 0))
        assert plan.calls == max(count - 1, plan.calls)
        steps = tuple(Step(*step) for step in json.loads(json.dumps(plan.steps)))
        assert plan._replace(steps=steps) == plan == pickle.loads(pickle.dumps(plan))
        assert all(len(set(step.equation) - set(",->")) <= 52 for step in steps)
        for k, step in enumerate(plan.steps):  # an operand exists before it is used
            assert max(step.left, step.right) < count + k


@EVERY
def test_cost_is_the_cost_of_the_steps(case):
    """Run the steps on real tensors and add up what they touch."""
    net = case(torch.float32)
    plan = plan_dense(net)
    values = extend(plan.steps, net.cores)
    flops = moved = 0
    for step, result in zip(plan.steps, values[len(net.cores) :], strict=True):
        inputs, output = step.equation.split("->")
        operands = [values[k] for k in (step.left, step.right) if k >= 0]
        sizes = {
            letter: size
            for letters, value in zip(inputs.split(","), operands, strict=True)
            for letter, size in zip(letters, value.shape, strict=True)
        }
        assert tuple(sizes[letter] for letter in output) == tuple(result.shape)
        flops += (2 if len(operands) == 2 else 1) * prod(sizes.values())
        moved += 4 * (sum(value.numel() for value in operands) + result.numel())
    assert (plan.flops, plan.bytes) == (flops, moved)


@OPERATOR
def test_plans_come_from_shapes_alone_and_are_remembered(case):
    net = case()
    assert plan_apply(net.to("meta"), 64) == plan_apply(net, 64)
    assert plan_apply(net, 64) is plan_apply(net.replace([core + 1 for core in net.cores]), 64)
    assert plan_apply(net, 1)[0].seconds <= plan_apply(net, 4096)[0].seconds
    order = [plan.burden for plan in plan_apply(net, 64)]
    assert order == sorted(order)


def test_heavy_plans_must_be_faster_by_a_quarter():
    """Heavy: holds more for backward than the dense weight, the cores and a quarter of x."""
    net = TTMatrix.random(row_modes=(4, 4, 8, 8), col_modes=(8, 8, 4, 4), rank=(32, 35, 32), device="meta")
    plans = plan_apply(net, 128)
    limit = 4 * (1024 * 1024 + sum(core.numel() for core in net.cores) + 128 * 1024 // 4)
    assert [plan.heavy for plan in plans] == [plan.kept > limit for plan in plans]
    assert any(plan.heavy and plan.seconds < plans[0].seconds for plan in plans)
    assert not plans[0].heavy
    assert all(plan.burden == plan.seconds * (1.25 if plan.heavy else 1) for plan in plans)
    # what a batch brings along is not held against it: low rank stays low rank at any batch
    slim = LowRank.random(row_modes=(1024,), col_modes=(1024,), rank=51, device="meta")
    for batch in (1, 128, 1 << 16):
        assert plan_apply(slim, batch)[0].strategy != "merge"


def test_merge_is_chosen_where_it_is_cheaper():
    """FLOPs do not decide alone, and of equal plans the merge is named."""
    full = LowRank.random(row_modes=(512,), col_modes=(512,), rank=500, device="meta")
    slim = LowRank.random(row_modes=(2048,), col_modes=(2048,), rank=2, device="meta")
    assert plan_apply(full, 1 << 16)[0].strategy == "merge"
    assert plan_apply(slim, 1)[0].strategy == "path"
    merge = plan_apply(full, 1 << 16)[0]
    gemm = 2 * 512 * 512 * (1 << 16)
    assert gemm < merge.flops < 1.02 * gemm
    plans = {plan.strategy: plan for plan in plan_apply(slim, 8)}
    # x V, S, U in the cheapest order: S meets the eight rows, or the smaller side
    assert min(plan.flops for plan in plans.values()) == 2 * 8 * (2048 * 2 + 2 * 2 + 2 * 2048)


def test_a_merged_weight_is_predicted_at_its_floor():
    """Assembling W costs r / batch of the dense products, forward and backward: no plan can hide it."""
    net = TTMatrix.random(row_modes=(8,) * 4, col_modes=(8,) * 4, rank=(64, 204, 64), device="meta")
    merge = next(plan for plan in plan_apply(net, 512) if plan.strategy == "merge")
    dense = 2 * 512 * 4096 * 4096
    assert 1 + 204 / 512 <= merge.flops / dense <= 1.1 + 204 / 512
    assert merge.kept >= 4 * 4096 * 4096  # the weight is kept for backward unless it is recomputed


@pytest.mark.parametrize(
    ("modes", "rank"), [((4, 4, 8, 8), (3, 3, 6, 6)), ((32, 32), (18, 18)), ((8, 8, 8, 8), (6, 6, 6, 6))]
)
def test_tucker_is_run_without_copies(modes, rank):
    """Feature-major Tucker: every product reads and writes its operands as they lie in memory but for the last."""
    net = Tucker.random(row_modes=modes, col_modes=modes, rank=rank * 2, device="meta")
    best = plan_apply(net, 128)[0]
    assert best.strategy in ("fused", "sweep")
    core = 2 * 128 * prod(rank) ** 2
    assert core < best.flops < 3.2 * core
    for step in best.steps:
        left, right, out = split_equation(step.equation)
        assert not right or batch_letters(left, right, out) is not None or "@" not in step.equation


def test_str_of_a_plan_is_for_people():
    text = str(plan_apply(LowRank.random(row_modes=(64,), col_modes=(64,), rank=4), 8)[0])
    assert "FLOPs" in text
    assert "bytes kept for backward" in text
    assert text.count("->") == 3


def test_bucket_is_the_next_power_of_two():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]


def test_more_labels_than_letters(rng):
    """59 labels, one plan; every step re-letters."""
    modes = tuple(2 if k % 5 == 0 else 1 for k in range(20))
    net = TTMatrix.random(row_modes=modes, col_modes=modes[::-1], rank=2, dtype=torch.float64, generator=rng)
    assert len(net.sizes) == 59
    x = torch.randn(3, *net.col_modes, dtype=torch.float64, generator=rng)
    for plan in plan_apply(net, 4):
        assert reference.relative(apply(net, x, plan=plan), reference.matmul(net, x)) < 1e-12


def test_a_path_of_loose_operands(rng):
    """Summing a lone label, outer products, and a batch label that stays."""
    inputs, sizes = [(BATCH, "a"), (BATCH, "b"), ("c",)], {BATCH: 3, "a": 4, "b": 5, "c": 2}
    values = [torch.randn([sizes[label] for label in labels], generator=rng) for labels in inputs]
    got = run(plan_path(inputs, sizes, ("c", BATCH, "b")).steps, values)
    assert reference.relative(got, torch.einsum("za,zb,c->czb", *values)) < 1e-6
    only = plan_path([("a", "b")], sizes, ("b",))
    assert run(only.steps, [torch.ones(4, 5)]).tolist() == [4.0] * 5
    assert (only.flops, only.bytes) == (20, 4 * (20 + 5))


def test_explain_shows_every_plan():
    net = TT.random(row_modes=(4, 4), col_modes=(4, 4), rank=3)
    text = explain(net, batch=128)
    for plan in plan_apply(net, 128):
        assert f"{plan.flops:,} FLOPs" in text
        assert all(step.equation in text for step in plan.steps)
    assert text.count("->  ") + text.count("-> ") >= 1
    assert "a dense weight: 65,536 FLOPs" in text
    assert "to_dense: 3 steps" in explain(TT.random(row_modes=(4, 4, 4, 4), rank=3))
