"""Pictures of knowledge-graph models: what is drawn, read back from the figure."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tnlayers import kg
from tnlayers.hyperbolic import lift, lorentz_distance
from tnlayers.kg import Epoch, History
from tnlayers.kg.embedding_tables import ball_points, degrees
from tnlayers.kg.figures import Point, _covering, disk, entity_map, history_figure, mrr_figure, principal_axes
from tnlayers.page import figure_png


@pytest.fixture(scope="module")
def graph():
    rows = [(f"e{k}", "r", f"e{j}") for k in range(12) for j in range(12) if j % (k + 1) == 1 or j == k + 1]
    return kg.load_triples({"train": rows})


def dots(figure):
    return np.asarray(figure.axes[0].collections[0].get_offsets())


def test_mrr_over_parameters():
    points = [Point("TuckER", 300, 0.89, 0.01), Point("TuckER", 100, 0.86, 0.02), Point("RotH", 50, 0.8, note="d 4")]
    figure = mrr_figure(points, "umls $x$")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines["TuckER"].get_xdata()) == [100, 300]
    assert list(lines["TuckER"].get_ydata()) == [0.86, 0.89]
    assert axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low < 0.8 < 0.9 < high
    assert [text.get_text() for text in axes.texts] == ["d 4"]
    assert len(figure_png(figure)) > 5000
    with pytest.raises(ValueError, match="mrr_figure: expected points"):
        mrr_figure([])


def boxes(figure, start=""):
    """Of texts alone, without the lines to their points."""
    figure.draw_without_rendering()
    return [Text.get_window_extent(text) for text in figure.axes[0].texts if text.get_text().startswith(start)]


def test_notes_cover_neither_points_nor_each_other():
    points = [Point(name, n, mrr, 0.02, f"d {k}") for name, n, mrr, k in CROWDED]
    figure = mrr_figure(points)
    found = boxes(figure)
    assert len(found) == len(points)
    assert not any(a.overlaps(b) for k, a in enumerate(found) for b in found[:k])
    dots = figure.axes[0].transData.transform([(p.parameters, p.mrr) for p in points])
    assert not any(box.contains(*dot) for box in found for dot in dots)


CROWDED = [
    ("TuckER", 1736, 0.336, 8), ("TuckER", 5008, 0.369, 16), ("DistMult", 1816, 0.265, 8), ("LPITF", 454, 0.08, 2),
    ("DistMult", 3632, 0.317, 16), ("LPITF", 1816, 0.218, 8), ("DistMult", 7264, 0.577, 32), ("CP", 7264, 0.61, 16),
]  # fmt: skip


def test_points_in_a_box_are_counted(rng):
    points = 200 * torch.rand(300, 2, generator=rng).numpy() - 50
    count = _covering(points)
    for box in ((-30, 10, 40, 95), (-90, -90, 400, 400), (160, 0, 300, 90), (20, 20, 20, 60)):
        inside = (np.floor(points) >= box[:2]) & (np.floor(points) < box[2:])
        assert count(Bbox.from_extents(*box)) == inside.all(1).sum()


def test_many_models_look_different():
    names = [f"model {k}" for k in range(20)]
    axes = mrr_figure([Point(name, 10 + k, 0.5) for k, name in enumerate(names)]).axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 20
    past = History((Epoch(1, 0.5, 0.1, 0.01), Epoch(2, 0.4, 0.1, 0.01)), None, "epochs")
    axes = history_figure(dict.fromkeys(names, past)).axes[0]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in axes.lines}) == 20


def test_names_on_the_disk_stand_inside_and_apart(graph):
    model = kg.LPITF(graph, dim=2, curvature=1.0).double()
    angle = torch.arange(12) * torch.pi / 6
    with torch.no_grad():  # a ring near the rim, where a name to the right would cross it
        model.entities.copy_(torch.stack([angle.cos(), angle.sin()], 1) * torch.sinh(torch.tensor(2.6)))
    figure = entity_map(model, graph)
    found = boxes(figure, "e")
    assert len(found) == 6
    assert not any(a.overlaps(b) for k, a in enumerate(found) for b in found[:k])
    corners = figure.axes[0].transData.inverted().transform(np.concatenate([box.corners() for box in found]))
    assert np.linalg.norm(corners, axis=1).max() < 1
    dots = figure.axes[0].transData.transform(np.asarray(figure.axes[0].collections[0].get_offsets()))
    assert not any(box.contains(*dot) for box in found for dot in dots)


def test_circles_of_the_disk_are_told(graph):
    near = kg.LPITF(graph, dim=2, std=1e-3)
    texts = [text.get_text() for text in entity_map(near, graph).axes[0].texts]
    _, factor = disk(ball_points(near))
    steps = ", ".join(f"{k / factor:.2g}" for k in (1, 2, 3))
    assert f"circles: distance {steps} from the centre, drawn times {factor:.2g}" in texts
    far = kg.LPITF(graph, dim=2, std=1.0)
    assert "circles: distance 1, 2, 3 from the centre" in [t.get_text() for t in entity_map(far, graph).axes[0].texts]


def test_training_curves():
    epochs = tuple(Epoch(k, 1 / k, 0.1, 0.01, mrr=0.3 + 0.1 * (k == 4) if k % 2 == 0 else None) for k in range(1, 7))
    past = History(epochs, 4, "epochs")
    figure = history_figure({"TuckER": past, "RotH": History(epochs[:2], None, "epochs")}, "umls")
    upper, lower = figure.axes
    assert list(upper.lines[0].get_ydata()) == [1 / k for k in range(1, 7)]
    assert list(lower.lines[0].get_xdata()) == [2, 4, 6]
    assert list(lower.lines[1].get_xdata()) == [4]  # the ring
    assert len(history_figure({"a": History(epochs[:1], None, "epochs")}).axes) == 1
    with pytest.raises(ValueError, match="at least one epoch"):
        history_figure({"a": History((), None, "epochs")})


def test_flat_models_are_drawn_on_principal_axes(graph):
    model = kg.TuckER(graph, 5, 2)
    figure = entity_map(model, graph)
    xy, shares = principal_axes(model.entities.weight)
    order = np.argsort(degrees(graph.train, 12).numpy(), kind="stable")
    np.testing.assert_allclose(dots(figure), xy[order])
    centred = model.entities.weight.detach().double()
    centred = centred - centred.mean(0)
    values = torch.linalg.svdvals(centred)
    np.testing.assert_allclose((xy**2).sum(0), values[:2].square(), rtol=1e-9)
    np.testing.assert_allclose(shares, values[:2].square() / values.square().sum(), rtol=1e-9)
    assert "principal axes" in figure.axes[0].get_title(loc="left")
    values = figure.axes[0].collections[0].get_array()
    np.testing.assert_allclose(values, np.log10(np.maximum(degrees(graph.train, 12).numpy()[order], 1)))


def test_the_disk_keeps_distances_from_the_origin(graph):
    model = kg.LPITF(graph, dim=5, curvature=0.7, std=0.8).double()
    points = ball_points(model)
    origin = lift(torch.zeros(12, 5, dtype=torch.float64), 0.7)
    rho = lorentz_distance(lift(model.entities.detach(), 0.7), origin, 0.7) * 0.7**0.5
    torch.testing.assert_close(2 * torch.arctanh(points.norm(dim=1)), rho)
    xy, factor = disk(points)
    np.testing.assert_allclose(2 * np.arctanh(np.linalg.norm(xy, axis=1)), factor * rho.numpy(), rtol=1e-9)
    figure = entity_map(model, graph)
    assert "Poincaré disk" in figure.axes[0].get_title(loc="left")
    assert np.linalg.norm(dots(figure), axis=1).max() < 1
    assert len(figure_png(figure)) > 5000


@pytest.mark.parametrize("size", [1e-6, 1.0, 18.0])
def test_points_near_the_centre_or_the_rim_are_scaled_to_be_seen(size):
    tangent = torch.randn(40, 3, dtype=torch.float64)
    norm = tangent.norm(dim=1, keepdim=True)
    points = tangent / norm * torch.tanh(size * torch.rand(40, 1, dtype=torch.float64).clamp_min(0.3))
    xy, factor = disk(points)
    radius = np.linalg.norm(xy, axis=1)
    assert 0.35 < np.quantile(radius, 0.9) < 0.98
    assert (factor == 1.0) == (size == 1.0)
    flat = torch.tensor([[0.3, 0.4], [-0.6, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(disk(flat)[0], flat, atol=1e-12)  # two dimensions are drawn as they are


def test_edges_of_the_disk():
    xy, factor = disk(torch.zeros(3, 4))  # the start of MIG-TF: all at the origin
    assert factor == 1.0
    assert not xy.any()
    assert disk(torch.tensor([[0.5], [-0.5]]))[0].shape == (2, 2)


def test_models_without_a_table_are_not_drawn():
    from decompositions import TT

    graph = kg.load_triples({"train": [(f"e{k}", "r", f"e{k + 1}") for k in range(5)]}, inverse=False)
    model = kg.ScoreTensor(6, 1, inverse=False, network=TT.random(row_modes=(1, 2, 3, 2, 3), rank=2))
    with pytest.raises(ValueError, match="no table of its 6 entities"):
        entity_map(model, graph)
