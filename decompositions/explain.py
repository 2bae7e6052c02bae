"""Say in words what a network is and what applying it costs."""

from math import prod

from decompositions.formats.algebra import numel
from decompositions.formats.network import Network, dense_size
from decompositions.formats.plan import plan_apply, plan_dense


def explain(net: Network, batch: int = 1024) -> str:
    """Describe a network: modes, equation, ranks, parameters, and every contraction plan with its predicted cost.

    Args:
        net: any network.
        batch: rows of x to plan for.

    Returns:
        Text to print. FLOPs are of one forward pass; predicted times serve the choice between plans only.

    Example:
        >>> from decompositions import LowRank, explain
        >>> print(explain(LowRank.random(row_modes=(64,), col_modes=(64,), rank=4)).splitlines()[0])
        LowRank 64 | 64: equation ab,bc,dc->ad, tree, ranks (4, 4)
    """
    rows, cols = ("x".join(map(str, modes)) for modes in (net.row_modes, net.col_modes))
    modes = f"{rows} | {cols}" if cols else rows
    kind = "tree" if net.is_tree else "not a tree: no gauge, no rounding"
    count, dense = numel(net), dense_size(net)
    lines = [
        f"{type(net).__name__} {modes}: equation {net.equation}, {kind}, ranks {net.ranks}",
        f"{count:,} parameters in {len(net.cores)} cores, {count / dense:.2%} of {dense:,} dense ({net.dtype})",
    ]
    if not net.cols:
        plan = plan_dense(net)
        lines.append(f"to_dense: {plan.calls} steps, {plan.flops:,} FLOPs")
        lines.extend(f"  {step.equation}" for step in plan.steps)
        return "\n".join(lines)
    multiply = 2 * batch * prod(net.row_modes) * prod(net.col_modes)
    lines.append(f"apply to {batch} rows (a dense weight: {multiply:,} FLOPs):")
    for rank, plan in enumerate(plan_apply(net, batch)):
        mark = "->" if rank == 0 else "  "
        lines.append(
            f"{mark} {plan.strategy:<6} {plan.flops:>16,} FLOPs  {plan.kept:>14,} bytes kept  {plan.calls} calls  "
            f"~{plan.forward_seconds * 1e3:.3g} ms forward, ~{plan.seconds * 1e3:.3g} ms with backward"
        )
        lines.extend(f"       {step.left:>2} {step.right:>2}  {step.equation}" for step in plan.steps)
    return "\n".join(lines)
