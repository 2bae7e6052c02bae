"""The standard diagram of a tensor network, as SVG."""

import os
from collections import deque
from html import escape
from math import atan2, cos, hypot, pi, sin

from decompositions.formats.network import Network

Point = tuple[float, float]
STEP = 90.0
RADIUS = 16.0
LEG = 44.0
COLORS = {"core": "#4c72b0", "row": "#c44e52", "col": "#55a868", "bond": "#444444"}


def draw(net: Network, path: str | os.PathLike[str] | None = None) -> str:
    """Draw a network: a disk a core, a line a bond with its rank, an open leg a mode with its size.

    Rows point up and are red, columns point down and are green (in rings and trees both point outward). A hyper-edge,
    which joins more than two ends, is a small black dot. Chains are drawn as lines, trees in levels below their
    center, everything else on a circle. Read off the labels alone, so that every network can be drawn.

    Args:
        net: any network.
        path: file to write as well.

    Returns:
        The SVG document.

    Raises:
        TypeError: no network.

    Example:
        >>> from decompositions import TT
        >>> svg = draw(TT.random(row_modes=(4, 5, 6), rank=3))
        >>> svg.count("<circle"), svg.startswith("<svg")
        (3, True)
    """
    if not isinstance(net, Network):
        raise TypeError(f"draw: expected a Network, got {type(net).__name__}")
    places, line = _places(net)
    sizes, outside = net.sizes, set(net.outside)
    ends: dict[str, list[int]] = {}
    for k, leg in enumerate(net.legs):
        for label in leg:
            ends.setdefault(label, []).append(k)
    middle = (sum(x for x, _ in places) / len(places), sum(y for _, y in places) / len(places))
    lines: list[str] = []
    texts: list[str] = []
    dots: list[str] = []
    free: dict[int, list[tuple[str, str]]] = {k: [] for k in range(len(places))}  # open legs of each core
    seen: dict[tuple[int, ...], int] = {}
    meets: list[str] = []  # kinds of the hyper-edges drawn so far
    reach = list(places)  # all that the picture must show
    for label, owners in ends.items():
        kind = "row" if label in net.rows else "col" if label in outside else "bond"
        if len(owners) == 1:
            free[owners[0]].append((label, kind))
            continue
        if len(owners) == 2 and kind == "bond":
            a, b = places[owners[0]], places[owners[1]]
            bend = _bend(seen, owners)
            jump = line and abs(a[0] - b[0]) > 1.5 * STEP  # would run through the cores between
            via = _via(a, b, 46.0 if jump and not bend else bend)
            lines.append(_curve(a, via, b, COLORS["bond"]))
            texts.append(_text(_half(a, via, b), str(sizes[label]), COLORS["bond"]))
            continue
        dot = _dot(kind, meets.count(kind), [places[k] for k in owners], line)
        meets.append(kind)
        lines += [_curve(dot, _via(dot, places[k], 0.0), places[k], COLORS[kind]) for k in owners]
        dots.append(f'<circle cx="{dot[0]:.1f}" cy="{dot[1]:.1f}" r="4" fill="#111111"/>')
        if kind == "bond":
            texts.append(_text((dot[0] + 12, dot[1] - 8), str(sizes[label]), COLORS["bond"]))
        else:
            end = (dot[0], dot[1] + (-LEG if kind == "row" else LEG))
            reach.append(dot)
            lines.append(_curve(dot, _via(dot, end, 0.0), end, COLORS[kind]))
            texts.append(_text(_beyond(dot, end), str(sizes[label]), COLORS[kind]))
    for k, own in free.items():
        for (label, kind), end in zip(own, _leg_ends(places[k], own, middle, line), strict=True):
            lines.append(_curve(places[k], _via(places[k], end, 0.0), end, COLORS[kind]))
            texts.append(_text(_beyond(places[k], end), str(sizes[label]), COLORS[kind]))
    disks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{COLORS["core"]}" stroke="#223355"/>' for x, y in places
    ]
    names = [_text(place, str(k), "#ffffff") for k, place in enumerate(places)]
    drawn = _document(net, [*lines, *dots, *disks, *names, *texts], reach)
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(drawn)
    return drawn


def _neighbours(net: Network) -> list[set[int]]:
    outside = set(net.outside)
    found: list[set[int]] = [set() for _ in net.cores]
    for label in net.bonds:
        owners = [k for k, leg in enumerate(net.legs) if label in leg and label not in outside]
        for a in owners:
            found[a] |= set(owners) - {a}
    return found


def _places(net: Network) -> tuple[list[Point], bool]:
    """Where the cores go, and whether they are on a line."""
    count, near = len(net.cores), _neighbours(net)
    ends = [k for k in range(count) if len(near[k]) <= 1]
    if count <= 2 or (net.is_tree and all(len(own) <= 2 for own in near)):
        order: list[int] = []
        last: int | None = None
        current = ends[0] if ends else 0
        while len(order) < count:
            order.append(current)
            following = [k for k in sorted(near[current]) if k != last and k not in order]
            rest = [k for k in range(count) if k not in order]
            last, current = current, (following or rest or [current])[0]
        places: list[Point] = [(0.0, 0.0)] * count
        for at, k in enumerate(order):
            places[k] = (at * STEP, 0.0)
        return places, True
    if net.is_tree:
        return _levels(near), False
    if any(sum(label in leg for leg in net.legs) > 1 for label in net.outside):
        return [(k * STEP, 0.0) for k in range(count)], True  # room above and below for the edges that modes share
    radius = max(STEP / (2 * sin(pi / count)), STEP * 0.7)
    angles = [2 * pi * k / count - pi / 2 for k in range(count)]
    return [(radius * cos(angle), radius * sin(angle)) for angle in angles], False


def _levels(near: list[set[int]]) -> list[Point]:
    """Children below their parents, leaves side by side; the root is the core with the shallowest tree."""

    def depth(start: int) -> int:
        far, queue = {start: 0}, deque([start])
        while queue:
            k = queue.popleft()
            for other in near[k] - set(far):
                far[other] = far[k] + 1
                queue.append(other)
        return max(far.values())

    root = min(range(len(near)), key=lambda k: (depth(k), k))
    places: list[Point] = [(0.0, 0.0)] * len(near)
    column = 0.0
    stack: list[tuple[int, int, int, bool]] = [(root, -1, 0, False)]
    while stack:
        k, parent, level, finished = stack.pop()
        children = sorted(near[k] - {parent})
        if finished:
            places[k] = (sum(places[c][0] for c in children) / len(children), level * STEP)
        elif children:
            stack.append((k, parent, level, True))
            stack += [(child, k, level + 1, False) for child in reversed(children)]
        else:
            places[k] = (column * STEP, level * STEP)
            column += 1
    return places


def _bend(seen: dict[tuple[int, ...], int], owners: list[int]) -> float:
    """The second bond of a pair is bent to one side, the third to the other."""
    pair = tuple(sorted(owners))
    seen[pair] = seen.get(pair, 0) + 1
    times = seen[pair] - 1
    return (40.0 if times % 2 else -40.0) * ((times + 1) // 2)


def _via(a: Point, b: Point, bend: float) -> Point:
    """Control point of a curve from a to b: the middle, moved sideways."""
    length = hypot(b[0] - a[0], b[1] - a[1]) or 1.0
    return (
        (a[0] + b[0]) / 2 - bend * (b[1] - a[1]) / length,
        (a[1] + b[1]) / 2 + bend * (b[0] - a[0]) / length,
    )


def _half(a: Point, via: Point, b: Point) -> Point:
    """Above the middle of the curve, or right of it, where its number stands."""
    x, y = (a[0] + 2 * via[0] + b[0]) / 4, (a[1] + 2 * via[1] + b[1]) / 4
    length = hypot(b[0] - a[0], b[1] - a[1]) or 1.0
    across, up = (b[1] - a[1]) / length, -(b[0] - a[0]) / length
    side = -1 if up > 1e-6 or (abs(up) <= 1e-6 and across < 0) else 1
    return x + side * 12 * across, y + side * 12 * up


def _dot(kind: str, before: int, owners: list[Point], line: bool) -> Point:
    """Where the ends of a hyper-edge meet: between them, rows above and columns below, each in a place of its own."""
    x, y = sum(p[0] for p in owners) / len(owners), sum(p[1] for p in owners) / len(owners)
    shift = 26.0 * ((before + 1) // 2) * (1 if before % 2 else -1)
    if line:
        return (x + 8 * before, {"row": -54.0, "col": 54.0}.get(kind, -30.0) * (1 + 0.7 * before))
    return (x + shift, y + {"row": -20.0, "col": 20.0}.get(kind, 0.0))


def _leg_ends(place: Point, legs: list[tuple[str, str]], middle: Point, line: bool) -> list[Point]:
    """Ends of the open legs of a core: up and down on a line, outward elsewhere, fanned out."""
    ends = []
    away = (place[0] - middle[0], place[1] - middle[1])
    length = hypot(*away)
    for label, kind in legs:
        same = [other for other, k in legs if not line or k == kind]
        spread = (same.index(label) - (len(same) - 1) / 2) * 0.6
        if line:
            base = -pi / 2 if kind == "row" else pi / 2
        elif length < 1:
            base = pi / 2
        else:
            base = pi / 2 if away[1] > 0.3 * length and abs(away[0]) < 2 * STEP else atan2(away[1], away[0])
        ends.append((place[0] + LEG * cos(base + spread), place[1] + LEG * sin(base + spread)))
    return ends


def _beyond(a: Point, b: Point) -> Point:
    length = hypot(b[0] - a[0], b[1] - a[1]) or 1.0
    return b[0] + 11 * (b[0] - a[0]) / length, b[1] + 11 * (b[1] - a[1]) / length


def _curve(a: Point, via: Point, b: Point, color: str) -> str:
    points = f"M {a[0]:.1f} {a[1]:.1f} Q {via[0]:.1f} {via[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
    return f'<path d="{points}" fill="none" stroke="{color}" stroke-width="2"/>'


def _text(place: Point, text: str, color: str) -> str:
    return (
        f'<text x="{place[0]:.1f}" y="{place[1] + 4:.1f}" font-size="12" font-family="sans-serif" '
        f'text-anchor="middle" fill="{color}">{escape(text)}</text>'
    )


def _document(net: Network, parts: list[str], places: list[Point]) -> str:
    margin = LEG + 30
    left, right = min(x for x, _ in places) - margin, max(x for x, _ in places) + margin
    top, bottom = min(y for _, y in places) - margin - 22, max(y for _, y in places) + margin
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} {top:.0f} {right - left:.0f} {bottom - top:.0f}" '
        f'width="{right - left:.0f}" height="{bottom - top:.0f}"><title>{escape(repr(net))}</title>'
        f'<rect x="{left:.0f}" y="{top:.0f}" width="100%" height="100%" fill="#ffffff"/>' + "".join(parts) + "</svg>\n"
    )
