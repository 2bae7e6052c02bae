"""Diagrams: every network of the table is drawn whole, and its numbers are in the picture."""

import re
import xml.etree.ElementTree as ET

import pytest
from cases import ALL

from decompositions import CP, TT, Monarch, TensorRing, Tree, Tucker, draw

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("case", ALL, ids=repr)
def test_every_network_is_drawn_whole(case):
    net = case()
    root = ET.fromstring(draw(net))
    disks = [node for node in root.iter(f"{SVG}circle") if float(node.get("r")) > 10]
    dots = [node for node in root.iter(f"{SVG}circle") if float(node.get("r")) < 10]
    owners = {label: sum(label in leg for leg in net.legs) for leg in net.legs for label in leg}
    hyper = [label for label, count in owners.items() if count > 2 or (count == 2 and label in net.outside)]
    assert len(disks) == len(net.cores)
    assert len(dots) == len(hyper)
    numbers = sorted(node.text for node in root.iter(f"{SVG}text"))
    assert numbers == sorted([*map(str, range(len(net.cores))), *map(str, net.shape), *map(str, net.ranks)])
    left, top, width, height = map(float, root.get("viewBox").split())
    points = [(float(node.get("cx")), float(node.get("cy"))) for node in (*disks, *dots)]
    points += [(float(node.get("x")), float(node.get("y"))) for node in root.iter(f"{SVG}text")]
    assert all(left <= x <= left + width and top <= y <= top + height for x, y in points)
    centers = [(node.get("cx"), node.get("cy")) for node in (*disks, *dots)]
    assert len(set(centers)) == len(centers)  # nothing lies on anything
    assert net.__repr__() in root.find(f"{SVG}title").text


def test_lines_levels_and_circles():
    def places(net):
        nodes = ET.fromstring(draw(net)).iter(f"{SVG}circle")
        return [(float(n.get("cx")), float(n.get("cy"))) for n in nodes if float(n.get("r")) > 10]

    assert {y for _, y in places(TT.random(row_modes=(2, 3), col_modes=(4,), rank=2))} == {0.0}
    levels = places(Tree.random(row_modes=(2, 3), col_modes=(4, 2), rank=2))
    assert len({y for _, y in levels}) == 3
    ring = places(TensorRing.random(row_modes=(2, 3), col_modes=(4, 2), rank=2))
    assert len({round(x * x + y * y, 3) for x, y in ring}) == 1
    assert len(places(Monarch.random(row_modes=(2, 3), col_modes=(4, 2)))) == 2


def test_neighbours_on_a_line_are_joined_by_straight_lines():
    """Tucker's core has number 0 and stands between its two factors."""
    paths = draw(Tucker.random(row_modes=(4,), col_modes=(5,), rank=2)).split("<path ")[1:]
    bonds = [line for line in paths if 'stroke="#444444"' in line]
    assert len(bonds) == 2
    for line in bonds:
        _, y0, _, *via_and_end = line.split('"')[1].removeprefix("M ").split()
        assert {y0, via_and_end[1], via_and_end[3]} == {"0.0"}


def test_a_file_is_written_and_labels_cannot_break_it(tmp_path):
    net = CP.random(row_modes=(3, 4), col_modes=(5,), rank=2)
    file = tmp_path / "cp.svg"
    text = draw(net, file)
    assert file.read_text(encoding="utf-8") == text
    odd = net._unchecked(net.cores, tuple((f"<{a}&", b) for a, b in net.legs), ("<i0&", "<i1&"), ("<i2&",))
    ET.fromstring(draw(odd))
    assert not re.search(r"nan|inf", text)


def test_refusal(unchecked):
    with pytest.raises(TypeError, match="draw: expected a Network, got int"):
        draw(3)
