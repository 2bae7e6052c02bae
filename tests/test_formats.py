"""Every network of the table: what it stands for, what it does, how it travels; always against the dense truth."""

import copy
import io
import pickle
from math import prod, sqrt

import pytest
import reference
import torch
import torch.utils._pytree as pytree
from cases import ALL, CASES, LOOPS, OPERATORS, TREES

from decompositions import (
    TT,
    LowRank,
    Network,
    TTMatrix,
    Tucker,
    add,
    apply,
    as_operator,
    explain,
    fill_random,
    inner,
    norm,
    numel,
    plan_apply,
    round,
    scale,
    to_dense,
    to_matrix,
    transpose,
)

EVERY = pytest.mark.parametrize("case", ALL, ids=repr)
OPERATOR = pytest.mark.parametrize("case", OPERATORS, ids=repr)
SUMMABLE = pytest.mark.parametrize("case", [case for case in ALL if case.summable], ids=repr)
EPS = 1e-12
REAL_HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64, *REAL_HALF)


def leaf(net: Network) -> tuple[Network, list[torch.Tensor]]:
    """The network with cores that require grad, and those cores."""
    cores = [core.detach().clone().requires_grad_() for core in net.cores]
    return net.replace(cores), cores


def same_gradients(value: torch.Tensor, truth: torch.Tensor, inputs, rng, tol=EPS) -> None:
    """Value and every gradient agree, for a random cotangent."""
    assert reference.relative(value, truth) < tol
    cotangent = torch.randn(truth.shape, dtype=truth.dtype, generator=rng)
    got = torch.autograd.grad(value, inputs, cotangent)
    want = torch.autograd.grad(truth, inputs, cotangent)
    assert max(map(reference.relative, got, want)) < tol


def batch_of(net: Network, batch: tuple[int, ...], rng) -> torch.Tensor:
    return torch.randn(*batch, *net.col_modes, dtype=net.dtype, generator=rng)


# --- the dense tensor ---


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_to_dense_value_and_gradient(case, dtype, rng):
    net, cores = leaf(case(dtype, rng))
    value = to_dense(net)
    assert value.shape == net.shape
    same_gradients(value, reference.dense(net), cores, rng)


@EVERY
def test_reference_is_the_sum_over_bonds(case, rng):
    net = case(generator=rng)
    if prod(net.ranks) > 2000:
        assert net.order > 20  # the long chain: too many sums for a loop
        return
    index = [int(torch.randint(n, (), generator=rng)) for n in net.shape]
    assert abs(reference.entry(net, index) - reference.dense(net)[tuple(index)].item()) < 1e-12 * sqrt(prod(net.shape))


@OPERATOR
def test_to_matrix_groups_rows_and_columns(case):
    net = case()
    matrix = to_matrix(net)
    assert matrix.shape == (prod(net.row_modes), prod(net.col_modes))
    assert reference.relative(matrix.reshape(net.shape), reference.dense(net)) < EPS


def test_rank_one_ttmatrix_is_a_kronecker_product(rng):
    factors = [torch.randn(shape, dtype=torch.float64, generator=rng) for shape in ((2, 3), (4, 1), (3, 2))]
    net = TTMatrix([factors[0][..., None], factors[1][None, ..., None], factors[2][None]])
    assert abs(to_matrix(net).numpy() - reference.kron(factors)).max() < 1e-14


# --- apply ---


@OPERATOR
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_apply_value_and_gradient(case, batch, rng):
    net, cores = leaf(case(generator=rng))
    x = batch_of(net, batch, rng).requires_grad_()
    y = apply(net, x)
    assert y.shape == (*batch, *net.row_modes)
    same_gradients(y, reference.matmul(net, x), [x, *cores], rng)


@OPERATOR
def test_every_plan_gives_the_same_value_and_gradient(case, rng):
    net, cores = leaf(case(generator=rng))
    x = batch_of(net, (5,), rng).requires_grad_()
    plans = plan_apply(net, 5)
    assert {plan.strategy for plan in plans} >= {"merge", "path"}
    assert [plan.burden for plan in plans] == sorted(plan.burden for plan in plans)
    for plan in plans:
        same_gradients(apply(net, x, plan=plan), reference.matmul(net, x), [x, *cores], rng)


@OPERATOR
def test_a_plan_serves_every_batch(case, rng):
    net = case(generator=rng)
    for plan in plan_apply(net, 1024):
        for batch in ((), (0,), (1,), (3, 2)):
            x = batch_of(net, batch, rng)
            y = apply(net, x, plan=plan)
            assert y.shape == (*batch, *net.row_modes)
            assert reference.relative(y, reference.matmul(net, x)) < EPS


@OPERATOR
def test_empty_batch_has_gradients(case):
    net, cores = leaf(case())
    x = torch.zeros(0, 3, *net.col_modes, dtype=net.dtype, requires_grad=True)
    y = apply(net, x)
    assert y.shape == (0, 3, *net.row_modes)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(core.grad is not None and not core.grad.any() for core in cores)


@OPERATOR
def test_non_contiguous_input_and_cores(case, rng):
    net = case(generator=rng)
    wide = torch.randn(*reversed((4, *net.col_modes)), 2, dtype=net.dtype, generator=rng)
    x = wide[..., 1].permute(*reversed(range(wide.ndim - 1)))
    strided = net.replace(
        [torch.stack([core, core], -1)[..., 0].mT.contiguous().mT if core.ndim > 1 else core for core in net.cores]
    )
    assert reference.relative(apply(strided, x), reference.matmul(net, x)) < EPS


@OPERATOR
def test_apply_linear_in_x_and_transpose_is_the_adjoint(case, rng):
    net = case(generator=rng)
    x, y = batch_of(net, (3,), rng), torch.randn(3, *net.row_modes, dtype=net.dtype, generator=rng)
    back = apply(transpose(net), y)
    assert back.shape == x.shape
    assert abs(torch.sum(apply(net, x) * y) - torch.sum(x * back)) < 1e-11 * (1 + torch.sum(x * back).abs())


# --- algebra ---


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_transpose_keeps_the_type_and_moves_the_axes(case, dtype):
    net = case(dtype)
    flipped = transpose(net)
    rows, order = len(net.rows), net.order
    assert type(flipped) is type(net)
    assert (flipped.row_modes, flipped.col_modes) == (net.col_modes, net.row_modes)
    truth = reference.dense(net).permute(*range(rows, order), *range(rows))
    assert reference.relative(to_dense(flipped), truth) < EPS
    assert reference.relative(to_dense(transpose(flipped)), reference.dense(net)) < EPS


@EVERY
def test_as_operator_splits_anywhere(case):
    net = case()
    for num_rows in range(net.order + 1):
        split = as_operator(net, num_rows)
        assert (len(split.rows), split.shape) == (num_rows, net.shape)
    with pytest.raises(ValueError, match=rf"num_rows must be in 0\.\.{net.order} .* got {net.order + 1}"):
        as_operator(net, net.order + 1)


@SUMMABLE
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_add_value_and_gradient(case, dtype, rng):
    (a, cores_a), (b, cores_b) = leaf(case(dtype, rng)), leaf(case(dtype, rng))
    total = add(a, b)
    assert type(total) is type(a)
    if len(a.cores) > 1:
        assert total.ranks == tuple(2 * r for r in a.ranks)
    same_gradients(to_dense(total), reference.dense(a) + reference.dense(b), [*cores_a, *cores_b], rng)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_scale_value_and_gradient(case, dtype, rng):
    net, cores = leaf(case(dtype, rng))
    factor = torch.tensor(-0.3, dtype=dtype, requires_grad=True)
    same_gradients(to_dense(scale(net, factor)), factor * reference.dense(net), [factor, *cores], rng)
    scaled = scale(net, -0.3)
    assert reference.relative(to_dense(scaled), -0.3 * reference.dense(net)) < EPS
    (changed,) = (a for a, b in zip(net.cores, scaled.cores, strict=True) if a is not b)
    assert changed.numel() == min(core.numel() for core in net.cores)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_inner_and_norm_value_and_gradient(case, dtype, rng):
    (a, cores_a), (b, cores_b) = leaf(case(dtype, rng)), leaf(case(dtype, rng))
    dense_a, dense_b = reference.dense(a), reference.dense(b)
    # the inner product may cancel, so it is compared on the scale of the norms
    unit = (torch.linalg.vector_norm(dense_a) * torch.linalg.vector_norm(dense_b)).detach()
    value, truth = inner(a, b) / unit, torch.sum(dense_a.conj() * dense_b) / unit
    assert abs(value - truth) < EPS
    inputs = [*cores_a, *cores_b]
    one = torch.ones((), dtype=dtype)
    pairs = zip(torch.autograd.grad(value, inputs, one), torch.autograd.grad(truth, inputs, one), strict=True)
    for got, want in pairs:
        assert torch.linalg.vector_norm(got - want) < 1e-11 * (1 + torch.linalg.vector_norm(want))
    same_gradients(norm(a), torch.linalg.vector_norm(reference.dense(a)), cores_a, rng)
    with torch.no_grad():
        assert reference.relative(norm(a), torch.linalg.vector_norm(dense_a)) < EPS


def test_inner_of_different_formats(rng):
    """Only the modes must agree; bonds of the same name stay apart."""
    options = {"dtype": torch.complex128, "generator": rng}
    a = TT.random(row_modes=(4, 3), col_modes=(5,), rank=2, **options)
    b = Tucker.random(row_modes=(4, 3), col_modes=(5,), rank=2, **options)
    c = transpose(TT.random(row_modes=(5,), col_modes=(4, 3), rank=3, **options))
    for left, right in ((a, b), (b, a), (a, c), (c, b)):
        truth = torch.sum(reference.dense(left).conj() * reference.dense(right))
        assert reference.relative(inner(left, right), truth) < 1e-11


def test_norm_of_a_cancelling_sum_is_accurate(rng):
    net = TT.random(row_modes=(4, 5, 6), rank=3, dtype=torch.float64, generator=rng)
    near = net.replace([net.cores[0] * (1 + 1e-10), *net.cores[1:]])
    difference = norm(add(net, scale(near, -1.0)))
    assert abs(difference / norm(net) - 1e-10) < 1e-14


def test_norm_at_zero_has_the_zero_subgradient():
    net, cores = leaf(LowRank(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(4, 2)))
    norm(net).backward()
    assert all(not core.grad.any() for core in cores)


@EVERY
def test_numel_and_sizes(case):
    net = case()
    merged = min(net.cores[1].shape) * sum(net.shape) if case.id.startswith("lowrank") else None
    assert numel(net) == (merged or sum(core.numel() for core in net.cores))
    assert net.shape == tuple(reference.dense(net).shape) == net.row_modes + net.col_modes
    assert len(net.ranks) == len(net.bonds) == len({label for leg in net.legs for label in leg}) - net.order
    text = explain(net)
    assert f"{numel(net):,} parameters" in text
    assert ("not a tree" in text) == (not net.is_tree)


def test_tree_test_of_the_whole_table():
    ours = ("cp", "cp-mode1-rank1", "kronecker-three", "monarch-two", "monarch-rank1", "monarch-three")
    rings = ("tensor-ring", "tensor-ring-matrix", "tensor-ring-turned")
    plain = ("hyper-edge", "ring", "double-bond", "monarch", "hadamard-outside")
    assert {case.id for case in LOOPS} == {*ours, *rings, *plain}
    assert {case.id for case in TREES} >= {
        "cp-matrix",
        "cp-order1",
        "kronecker-two",
        "tensor-ring-order1",
        "monarch-one",
    }
    assert {case.id for case in CASES if type(case()).__name__ in ("LowRank", "Tucker", "TT", "TTMatrix", "Tree")} <= {
        case.id for case in TREES
    }


# --- random ---


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_has_exactly_the_asked_rms(case, dtype, rng):
    shapes = case()
    eps = torch.finfo(dtype).eps
    for std in (1.0, 0.03):
        net = fill_random(shapes, std=std, dtype=dtype, generator=rng)
        assert net.dtype == dtype
        dense = reference.dense(net.to(torch.promote_types(dtype, torch.float64)))
        rms = dense.abs().square().mean().sqrt().item()
        assert abs(rms / std - 1) < 2 * eps * len(net.cores)


@pytest.mark.parametrize(
    "net",
    [
        LowRank.random(row_modes=(3,), col_modes=(2,), rank=10**9, std=1e-3, dtype=torch.float64),
        TT.random(row_modes=(2,) * 12, rank=10**9, std=1e-3, dtype=torch.float64),
        TT.random(row_modes=(1,) * 300, rank=1, std=1e-3, dtype=torch.float64),
        TTMatrix.random(row_modes=(2, 2, 3), col_modes=(3, 2, 2), rank=10**9, std=1e-3, dtype=torch.float64),
        Tucker.random(row_modes=(2,) * 8, rank=10**9, std=1e-3, dtype=torch.float64),
    ],
    ids=repr,
)
def test_random_at_extreme_ranks_and_orders(net):
    assert abs(float(norm(net)) / sqrt(prod(net.shape)) - 1e-3) < 1e-13
    sizes = [float(core.abs().max()) for core in net.cores]
    assert max(sizes) < 1e3 * min(sizes) or len(sizes) > 100  # no core is born far larger than the others


def test_random_is_seeded_and_checks_its_arguments():
    def draw(seed):
        return TT.random(row_modes=(3, 4), rank=2, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(to_dense(draw(1)), to_dense(draw(1)))
    assert not torch.equal(to_dense(draw(1)), to_dense(draw(2)))
    assert not to_dense(TT.random(row_modes=(3, 4), rank=2, std=0.0)).any()
    assert TT.random(row_modes=(3, 4), rank=2, device="meta", dtype=torch.float16).cores[0].is_meta
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"random: std must be a finite number >= 0, got {std}"):
            TT.random(row_modes=(3, 4), rank=2, std=std)


# --- derivatives of every order, transforms ---


@EVERY
def test_gradcheck(case, rng):
    net, cores = leaf(case(generator=rng))
    if len(cores) > 20:
        cores = cores[:1]
    rest = net.cores[len(cores) :]

    def build(given):
        return net.replace([*given, *rest])

    assert torch.autograd.gradcheck(lambda *given: to_dense(build(given)), cores, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *given: norm(build(given)), cores, fast_mode=True)
    if net.cols:
        x = batch_of(net, (2,), rng).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, *given: apply(build(given), x), (x, *cores), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda x, *given: apply(build(given), x), (x, *cores), fast_mode=True)


@EVERY
def test_pytree_round_trip(case):
    net = case()
    leaves, spec = pytree.tree_flatten(net)
    assert len(leaves) == len(net.cores)
    back = pytree.tree_unflatten(leaves, spec)
    assert type(back) is type(net)
    assert (back.legs, back.rows, back.cols) == (net.legs, net.rows, net.cols)
    assert all(a is b for a, b in zip(back.cores, net.cores, strict=True))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path({"w": net})[0]]
    assert keys == [f"['w'][{k}]" for k in range(len(net.cores))]
    assert pytree.tree_map(lambda core: None, net).cores == (None,) * len(net.cores)  # leaves may be anything


@EVERY
def test_func_grad_returns_a_network(case, rng):
    net = case(generator=rng)
    gradient = torch.func.grad(lambda w: to_dense(w).square().sum())(net)
    assert type(gradient) is type(net)
    live, cores = leaf(net)
    want = torch.autograd.grad(reference.dense(live).square().sum(), cores)
    assert max(map(reference.relative, gradient.cores, want)) < EPS
    slope = torch.func.grad(lambda w: norm(w))(net)
    want = torch.autograd.grad(torch.linalg.vector_norm(reference.dense(live)), cores)
    assert max(map(reference.relative, slope.cores, want)) < 1e-11


@OPERATOR
def test_vmap_over_inputs_and_over_stacked_cores(case, rng):
    nets = [case(generator=rng) for _ in range(3)]
    x = batch_of(nets[0], (3, 2), rng)
    over_x = torch.vmap(lambda row: apply(nets[0], row))(x)
    assert reference.relative(over_x, reference.matmul(nets[0], x)) < EPS
    stacked = pytree.tree_map(lambda *cores: torch.stack(cores), *nets)
    over_both = torch.vmap(apply)(stacked, x)
    assert (
        reference.relative(over_both, torch.stack([reference.matmul(n, v) for n, v in zip(nets, x, strict=True)])) < EPS
    )
    each = torch.vmap(torch.func.grad(lambda w, v: apply(w, v).square().sum()))(stacked, x)
    alone = torch.func.grad(lambda w, v: apply(w, v).square().sum())(nets[1], x[1])
    assert max(reference.relative(a[1], b) for a, b in zip(each.cores, alone.cores, strict=True)) < EPS


@EVERY
@pytest.mark.parametrize("travel", ["deepcopy", "pickle", "torch.save"])
def test_copies(case, travel):
    net = case()
    if travel == "deepcopy":
        back = copy.deepcopy(net)
    elif travel == "pickle":
        back = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        back = torch.load(buffer, weights_only=False)
    assert type(back) is type(net)
    assert (back.legs, back.rows, back.cols) == (net.legs, net.rows, net.cols)
    for a, b in zip(back.cores, net.cores, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_other_dtypes(case, dtype, rng):
    """Value within a few roundings of the exact value of the same cores; the dtype is kept."""
    net = case(dtype, rng)
    exact = net.to(torch.promote_types(dtype, torch.float64))
    tol = 4 * sqrt(len(net.cores)) * torch.finfo(dtype).eps
    value = to_dense(net)
    assert value.dtype == dtype
    assert reference.relative(value, reference.dense(exact)) < tol
    if net.cols:
        x = batch_of(exact, (3,), rng).to(dtype)
        y = apply(net, x)
        assert y.dtype == dtype
        assert reference.relative(y, reference.matmul(exact, x.to(exact.dtype))) < 2 * tol
    # half precision is summed in float32
    fine = torch.finfo(torch.float32 if dtype in REAL_HALF else dtype).eps
    assert reference.relative(norm(net), torch.linalg.vector_norm(reference.dense(exact))) < 40 * fine
    assert reference.relative(inner(net, net), torch.linalg.vector_norm(reference.dense(exact)) ** 2) < 80 * fine


@OPERATOR
@pytest.mark.compile
def test_compile_fullgraph(case, rng):
    net, cores = leaf(case(generator=rng))
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(w, x):
        return apply(w, x)

    for batch in ((2,), (5,)):
        x = batch_of(net, batch, rng).requires_grad_()
        same_gradients(run(net, x), reference.matmul(net, x), [x, *cores], rng)


@pytest.mark.compile
def test_compiled_plan_serves_changing_ranks(rng):
    """A stored plan has no sizes in it: one trace with dynamic bonds serves every rank."""
    nets = [TT.random(row_modes=(4,), col_modes=(5, 6), rank=r, dtype=torch.float64, generator=rng) for r in (2, 3, 4)]
    plan = plan_apply(nets[0], 8)[0]
    x = batch_of(nets[0], (8,), rng)
    torch._dynamo.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    run = torch.compile(lambda cores, x: apply(nets[0].replace(cores), x, plan=plan), fullgraph=True, backend=backend)
    for net in nets:
        assert reference.relative(run(net.cores, x), reference.matmul(net, x)) < EPS
    assert len(frames) <= 2


# --- refusals ---


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def chain():
    return TT([zeros(4, 2), zeros(2, 5, 3), zeros(3, 6)], num_rows=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TT([zeros(4, 2), zeros(3, 6)]), r"TT: label 'b0' must have one size, expected 2 .* got 3 in core 1"),
        (lambda: TT([zeros(4, 2), zeros(2, 5)], axes=(0, 2)), r"TT: axes must be a permutation of 0\.\.1 .*\(0, 2\)"),
        (lambda: TT([zeros(4, 2), zeros(2, 5)], num_rows=3), r"TT: num_rows must be in 0\.\.2 .* got 3"),
        (
            lambda: TT([zeros(4, 2), zeros(2, 5, 1)]),
            r"core 1 needs one axis per label, expected 2 .* got shape \(2, 5, 1\)",
        ),
        (lambda: TT([]), "at least one core, got none"),
        (lambda: LowRank(zeros(4, 0), zeros(0, 3), zeros(5, 3)), "sizes must be at least 1, got 0"),
        (lambda: Tucker(zeros(2, 3), [zeros(4, 2)]), r"expected 1 of 0\.\.1, got \(0, 1\)"),
        (lambda: Tucker(zeros(2, 3), [zeros(4, 2), zeros(4, 2)]), "'r1' must have one size, expected 3 .* got 2"),
        (lambda: Tucker(zeros(2, 3), [zeros(4, 2)], modes=(2,)), r"0\.\.1, got \(2,\)"),
        (lambda: TTMatrix([zeros(4, 2)[..., None], zeros(2, 5, 6)]), "'b0' must have one size, expected 1 .* got 2"),
        (lambda: Network((zeros(2, 3),), (("i", "r"),), ("i",)), "must join two cores or more, got 'r' in one core"),
        (
            lambda: Network((zeros(2, 2),), (("i", "i"),), ("i",)),
            r"a core may carry a label once, got legs \('i', 'i'\)",
        ),
        (lambda: Network((zeros(2),), (("i",),), ("i",), ("i",)), "outside labels must be distinct"),
        (lambda: Network((zeros(2),), (("i",),), ("i", "j")), "outside label 'j' must belong to a core"),
        (lambda: Network((zeros(2),), (("i",), ("j",)), ("i",)), "legs needs one tuple per core, expected 1, got 2"),
        (lambda: TT.random(row_modes=(4, 5, 6), rank=(2,)), r"TT: rank needs one entry per bond, expected 2, got 1"),
        (lambda: TT.random(row_modes=(4, 5, 6), rank=(5, 2)), r"rank of bond 0 must be in 1\.\.4 .* got 5"),
        (lambda: TT.random(row_modes=(4, 5), rank=0), "rank must be at least 1, got 0"),
        (lambda: TT.random(row_modes=(4, 5), rank=1, axes=(0, 2)), r"axes must be a permutation of 0\.\.1 .*\(0, 2\)"),
        (lambda: Tucker.random(row_modes=(4, 5), rank=(2, 6)), r"rank of mode 1 must be in 1\.\.5 .* got 6"),
        (lambda: Tucker.random(row_modes=(4, 5), rank=2, modes=(0, 2)), r"0\.\.1, got \(0, 2\)"),
        (lambda: TTMatrix.random(row_modes=(4, 5), col_modes=(2,), rank=2), r"equal lengths, got \(4, 5\) and \(2,\)"),
        (lambda: apply(chain(), zeros(7, 6, 5)), r"expected \(\.\.\., 5, 6\), got \(7, 6, 5\); a flat x needs"),
        (lambda: apply(chain(), zeros(6)), r"expected \(\.\.\., 5, 6\), got \(6,\)"),
        (lambda: apply(as_operator(chain(), 3), zeros(4)), r"needs column modes, got rows \(4, 5, 6\) only"),
        (lambda: add(chain(), as_operator(chain(), 2)), "add: networks must have the same labels"),
        (
            lambda: add(chain(), TT([zeros(4, 1), zeros(1, 5, 1), zeros(1, 7)], 1)),
            r"expected \(4, 5, 6\), got \(4, 5, 7\)",
        ),
        (lambda: inner(chain(), transpose(chain())), r"inner: .* expected \(4, 5, 6\), got \(5, 6, 4\)"),
    ],
)
def test_value_errors_name_the_rule_and_both_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TT([zeros(4, 2), zeros(2, 5, dtype=torch.float64)]), "share dtype .*float32 .* got torch.float64"),
        (lambda: TT([zeros(4, dtype=torch.int64)]), "floating or complex, got torch.int64 for core 0"),
        (lambda: Network(([1.0, 2.0],), (("i",),), ("i",)), "must be tensors, got list for core 0"),
        (lambda: TT.random(row_modes=(4, 5), rank=2.0), "rank must be an int, a sequence of ints or None, got 2.0"),
        (lambda: TT.random(row_modes=(4, 5), rank=True), "rank must be an int"),
        (lambda: TT.random(row_modes=(4, 5), rank=(1.5,)), "rank entries must be ints, got 1.5 for bond 0"),
        (lambda: scale(chain(), 1j), "torch.float32 needs a real factor, got 1j"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_type_errors(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_an_annotation_knows_too():
    with pytest.raises(ValueError, match=r"'a' must have one size, expected 2 .* got 3"):
        LowRank(zeros(4, 2), zeros(3, 3), zeros(5, 3))


def test_what_has_no_sum_or_no_gauge_is_refused_by_name():
    by_id = {case.id: case() for case in ALL}
    with pytest.raises(ValueError, match=r"add: every core must be joined .* got core 0 with legs"):
        add(by_id["monarch"], by_id["monarch"])
    for case in LOOPS:
        with pytest.raises(ValueError, match=r"round: the network must be a tree .*hyper-edges and rings"):
            round(case(), tol=0.1)


def test_networks_are_immutable_and_print_themselves():
    net = chain()
    with pytest.raises(AttributeError):
        net.cores = ()
    assert repr(net) == "TT(4 | 5x6, ranks=(2, 3), float32)"
    assert net.equation == "ab,bcd,de->ace"
    assert net.detach().cores[0].data_ptr() == net.cores[0].data_ptr()
    assert net.to(torch.float16).dtype == torch.float16
