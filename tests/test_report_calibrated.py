"""What calibration adds to a report: weighted spectra, errors and shares, and the curve of error against size."""

import dataclasses
import json
import math

import numpy as np
import pytest
from test_report import EVIL, check_page, converted, kept, png_size, report

from tnlayers.figures import DASH_DOTTED, spectrum_figure
from tnlayers.frontier import FrontierPoint, frontier_figure, frontier_table
from tnlayers.page import figure_png
from tnlayers.report import LayerRow, Report

POINTS = tuple(FrontierPoint(k, p, e) for k, p, e in ((0.9, 930, 0.04), (0.7, 790, 0.12), (0.5, 650, 0.26)))


def weighted(name="encoder.layer.0.attention.output.dense", **changes):
    values = {"weighted": {"0": tuple(k**-1.5 for k in range(1, 65))}, "weighted_error": 0.0875, "share": 0.25}
    return converted(name, **(values | changes))


def calibrated(*rows, **changes):
    values = {"title": "compress", "targeted": (700, 490), "frontier": POINTS, "error": 0.12, "measured": 0.131}
    return Report(rows or (weighted(), kept()), 1000, 790, **(values | changes))


# --- table --------------------------------------------------------------------------------------------------------


def test_head_line_tells_the_two_ratios_apart():
    head, second = str(calibrated()).splitlines()[:2]
    assert head == "compress: targeted layers keep 70.0 %, whole model 79.0 %"
    assert second == ("1 of 2 layers converted, parameters 1,000 -> 790, predicted error 0.12, measured error 0.131")
    assert (
        str(calibrated(targeted=None))
        .splitlines()[0]
        .endswith("parameters 1,000 -> 790 (79%), predicted error 0.12, measured error 0.131")
    )
    assert "whole model 0.045 %" in str(dataclasses.replace(calibrated(), params_dense=1_000_000, params=450))


def test_keep_is_the_share_of_the_targeted_weights():
    assert calibrated().keep == 0.7
    assert calibrated(targeted=None).keep is None
    assert calibrated(targeted=(0, 0)).keep == 1.0


def test_table_has_weighted_columns_where_a_row_has_them():
    lines = str(calibrated()).splitlines()
    header = next(line for line in lines if line.startswith("layer"))
    expected = "layer shape format ranks even dense now ratio error weighted share"
    assert header.split() == expected.split()
    row = next(line for line in lines if line.startswith("encoder"))
    assert row.split()[0] == "encoder.layer.0.attention.output.dense"  # not shortened: other columns gave way
    assert row.split()[-3:] == ["0.335", "0.0875", "25%"]
    assert max(map(len, lines)) <= 120
    only = str(calibrated(weighted(share=None), kept()))
    assert " weighted" in only.splitlines()[3]
    assert " share" not in only.splitlines()[3]
    assert "nan" in str(calibrated(weighted(weighted_error=math.nan)))


def test_reports_without_calibration_stay_as_they_were():
    text = str(report(converted(), kept()))
    header = next(line for line in text.splitlines() if line.startswith("layer"))
    expected = "layer kind shape format ranks even dense now ratio FLOPs error bound"
    assert header.split() == expected.split()
    assert "error against size" not in text
    page = check_page(report(converted(), kept()).html()).text
    for word in ("unweighted", "Error against size", "Whole model", "Predicted error", "share"):
        assert word not in page
    data = report(converted()).to_dict()
    assert list(data) == ["kind", "version", "title", "params_dense", "params", "compression", "budget", "rows"]
    assert not {"weighted", "weighted_error", "share"} & set(data["rows"][0])


def test_table_ends_with_the_frontier():
    lines = str(calibrated()).splitlines()
    at = lines.index("error against size:")
    assert [line.split() for line in lines[at + 3 :]] == [
        ["dense", "100%", "0", "1,000"],
        ["keep", "90%", "93%", "0.04", "930"],
        ["keep", "70%,", "chosen", "79%", "0.12", "790"],
        ["keep", "50%", "65%", "0.26", "650"],
    ]


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        calibrated(),
        calibrated(targeted=None, frontier=(), measured=None),
        calibrated(weighted(spectra={}), weighted("b", weighted={"1": (math.inf, 0.0)}, weighted_error=0.0, share=0.0)),
        calibrated(error=math.inf, frontier=(FrontierPoint(0.1, 3, math.inf), FrontierPoint(0, 0, 0))),
        calibrated(error=0.0, targeted=(0, 0)),
    ],
)
def test_json_round_trip(before, tmp_path):
    text = before.to_json(tmp_path / "report.json")
    after = Report.from_dict(json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")))
    assert after == before


def test_json_takes_numbers_of_numpy_and_leaves_spectra_out():
    row = weighted(weighted_error=np.float32(0.5), share=np.float64(0.25), weighted={0: np.ones(3, np.float32)})
    before = calibrated(
        row,
        error=np.float32(0.5),
        targeted=(np.int64(4), np.int64(2)),
        frontier=(FrontierPoint(np.float32(0.5), np.int64(7), np.float32(0.25)),),
    )
    data = json.loads(before.to_json())
    assert data["rows"][0]["weighted"] == {"0": [1.0, 1.0, 1.0]}
    assert (data["rows"][0]["weighted_error"], data["error"], data["targeted"]) == (0.5, 0.5, [4, 2])
    assert data["frontier"] == [{"keep": 0.5, "params": 7, "error": 0.25}]
    short = Report.from_dict(json.loads(calibrated().to_json(spectra=False)))
    assert short.rows[0].weighted == {}
    assert short.rows[0].weighted_error == 0.0875


def test_files_of_before_calibration_load():
    row = {
        "name": "fc", "kind": "Linear", "shape": [8, 8], "status": "converted", "reason": "", "format": "LowRank",
        "ranks": [2], "break_even_rank": 3, "params_dense": 72, "params": 40, "flops_dense": 128, "flops": 64,
        "error": 0.5, "output_bound": None, "spectra": {"r": [2.0, 1.0]}, "cuts": {"r": 1},
    }  # fmt: skip
    old = {
        "kind": "tnlayers report", "version": 1, "title": "tensorize", "params_dense": 72, "params": 40,
        "compression": 40 / 72, "rows": [row],
    }  # fmt: skip
    after = Report.from_dict(old)
    assert (after.targeted, after.frontier, after.error, after.measured) == (None, (), None, None)
    assert (after.rows[0].weighted, after.rows[0].weighted_error, after.rows[0].share) == ({}, None, None)
    assert after.rows[0].spectra == {"r": (2.0, 1.0)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(targeted=3), "targeted of a report must be a list, got 3"),
        (lambda d: d.update(targeted=[1.5, 2]), "expected ints, got 1.5 in targeted"),
        (lambda d: d.update(targeted=[3]), r"targeted must be parameters before and now, both >= 0, got \(3,\)"),
        (lambda d: d.update(targeted=[3, -1]), "both >= 0, got"),
        (lambda d: d.update(frontier={}), "frontier of a report must be a list"),
        (lambda d: d["frontier"].append(3), r"point \(3\) of the frontier must be a dict, got 3"),
        (lambda d: d["frontier"][1].pop("keep"), r"expected a number, got None in keep of point \(1\)"),
        (lambda d: d["frontier"][0].pop("params"), "needs 'params'"),
        (lambda d: d["frontier"][0].update(error="much"), r"got 'much' in error of point \(0\)"),
        (lambda d: d["frontier"][0].update(error=-0.5), "params and error must be >= 0, got 930 and -0.5"),
        (lambda d: d["frontier"][0].update(keep="nan"), "keep must be a share >= 0, got nan"),
        (lambda d: d.update(params_dense=0), "a frontier needs a model with parameters, got params_dense=0"),
        (lambda d: d.update(error=True), "expected a number, got True in error of the report"),
        (lambda d: d["rows"][0].update(share=1.5), "share must be in 0 to 1, got 1.5"),
        (lambda d: d["rows"][0].update(share="x"), r"got 'x' in share of row \(0\)"),
        (lambda d: d["rows"][0].update(weighted=[1.0]), "weighted of a row .0. must be a dict"),
        (lambda d: d["rows"][0].update(weighted={"0": ["x"]}), r"expected a number, got 'x' in weighted of row \(0\)"),
    ],
)
def test_from_dict_refuses_by_name(change, match):
    data = calibrated().to_dict()
    change(data)
    with pytest.raises(ValueError, match=match):
        Report.from_dict(data)


def test_shares_may_miss_one_by_rounding():
    assert LayerRow("fc", "Linear", (8, 8), "kept", share=1 + 1e-7).share > 1
    with pytest.raises(ValueError, match=r"share must be in 0 to 1, got -0\.1"):
        LayerRow("fc", "Linear", (8, 8), "kept", share=-0.1)


# --- page and files -----------------------------------------------------------------------------------------------


def test_page_tells_ratios_errors_and_the_curve():
    page = check_page(calibrated().html())
    for expected in (
        "targeted layers keep 70.0 %, whole model 79.0 %",
        "Keep70.0 %700 \u2192 490, weights of the targeted layers",
        "Whole model79.0 %1k \u2192 790 parameters, 1.27\u00d7 smaller",
        "Predicted error0.12of the model's output; measured 0.131",
        "Largest weighted error0.0875encoder.layer.0.attention.output.dense",
        "weighted error 0.0875, 25% of the squared error",
        "keep 70%, chosen79%0.12790",
        "break-even rank",
    ):
        assert expected in page.text
    assert page.rows == 3 + 5
    curve, _, spectra = page.alts
    assert curve == (
        "Parameters of the whole model and predicted error. dense: 100% (1,000), 0; keep 90%: 93% (930), 0.04; "
        "keep 70%, chosen: 79% (790), 0.12; keep 50%: 65% (650), 0.26. Measured error at what was chosen: 0.131."
    )
    first = 17**-1.5, 17**-0.8
    assert f"bond 0: 16 of 64 kept, the first discarded is {first[0]:.3g} weighted and {first[1]:.3g} unweighted" in (
        spectra
    )
    assert "break-even rank 192." in spectra


@pytest.mark.parametrize(
    "changes",
    [
        {"error": None},
        {"error": None, "measured": None, "targeted": None},
        {"error": math.nan, "measured": math.inf},
        {"frontier": (FrontierPoint(0.5, 1, math.inf),)},
        {"frontier": (FrontierPoint(1.0, 1000, 0.0),), "error": 0.0},
    ],
)
def test_page_of_unusual_curves(changes):
    page = check_page(calibrated(**changes).html())
    assert "Error against size" in page.text


def test_page_escapes_and_breaks_names():
    rows = (weighted(EVIL, weighted={EVIL: (1.0, 0.5)}, spectra={}, cuts={EVIL: 1}), weighted("a.b", spectra={}))
    text = calibrated(*rows, title=EVIL).html()
    page = check_page(text)
    assert "<script>alert" not in text
    assert "a.<wbr>b" in text
    assert "a.b" in page.text


def test_figures_are_written(tmp_path):
    rows = (weighted("a"), weighted("b", spectra={}), weighted("c", weighted={}, spectra={}, cuts={}))
    written = calibrated(*rows).figures(tmp_path)
    names = ["parameters.png", "error-against-size.png", "spectrum-000-a.png", "spectrum-001-b.png"]
    assert [file.name for file in written] == names
    assert png_size(written[1].read_bytes()) == (1024, 640)


# --- curve --------------------------------------------------------------------------------------------------------


def lines_of(figure, marker):
    return [line for line in figure.axes[0].lines if line.get_marker() == marker]


def test_frontier_figure_ends_at_the_dense_model():
    figure = frontier_figure(POINTS[::-1], 1000, chosen=(790, 0.12), measured=0.3)
    axes = figure.axes[0]
    (curve,) = lines_of(figure, "None")
    np.testing.assert_allclose(curve.get_xdata(), [0.65, 0.79, 0.93, 1])
    np.testing.assert_allclose(curve.get_ydata(), [0.26, 0.12, 0.04, 0])
    for marker, place in (("s", (1, 0)), ("D", (0.79, 0.12)), ("x", (0.79, 0.3))):
        (mark,) = lines_of(figure, marker)
        np.testing.assert_allclose((mark.get_xdata()[0], mark.get_ydata()[0]), place)
    low, high = axes.get_ylim()
    assert low == 0
    assert high > 0.3
    figure.draw_without_rendering()
    assert "80%\n800" in [label.get_text() for label in axes.get_xticklabels()]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "predicted, by budget",
        "dense, 1k",
        "chosen: 79%, error 0.12",
        "measured: 0.3",
    ]
    assert axes.get_xlabel() == "parameters of the whole model"
    assert axes.get_ylabel() == "predicted relative error"
    assert png_size(figure_png(figure)) == (1024, 640)


@pytest.mark.parametrize(
    ("points", "dense"),
    [
        ((), 5),
        ((FrontierPoint(1.0, 5, 0.0),), 5),
        ((FrontierPoint(0.0, 0, 1e9), FrontierPoint(2.0, 10**12, 1e-12)), 10**11),
        (tuple(FrontierPoint(k / 50, 10**6 + k, 1 / (k + 1)) for k in range(50)), 2 * 10**6),
    ],
)
def test_frontier_figure_of_unusual_curves(points, dense):
    assert png_size(figure_png(frontier_figure(points, dense, size=(4, 3), dpi=100))) == (400, 300)


def test_frontier_figure_says_what_it_cannot_draw():
    figure = frontier_figure([*POINTS, FrontierPoint(0.1, 300, math.nan)], 1000, chosen=(300, math.nan), measured=0.2)
    assert "1 of 4 errors not finite" in [text.get_text() for text in figure.axes[0].texts]
    assert lines_of(figure, "D") == []
    with pytest.raises(ValueError, match="dense must be the parameters of the dense model, >= 1, got 0"):
        frontier_figure(POINTS, 0)


def test_frontier_table_marks_what_was_chosen():
    def labels(chosen):
        return [cells[0].text for cells in frontier_table(POINTS, 1000, chosen=chosen)]

    assert labels(None) == ["dense", "keep 90%", "keep 70%", "keep 50%"]
    assert labels((0.7, 790, 0.12)) == ["dense", "keep 90%", "keep 70%, chosen", "keep 50%"]
    assert labels((None, 790, None)) == ["dense", "keep 90%", "keep 70%, chosen", "keep 50%"]
    assert labels((0.66, 760, 0.14)) == ["dense", "keep 90%", "keep 70%", "keep 66%, chosen", "keep 50%"]
    assert labels((None, 760, 0.14))[3] == "chosen"
    assert labels((0.7, 790, 0.09)).count("keep 70%, chosen") == 1  # same size, other error: a row of its own
    assert len(labels((0.7, 790, 0.09))) == 5


# --- spectra ------------------------------------------------------------------------------------------------------


def curves(figure):
    """Whole lines of a spectrum figure, pale: (values, colour, whether it is dash-dotted)."""
    lines = [line for line in figure.axes[0].lines if line.get_alpha() == 0.35]
    return [(list(line.get_ydata()), line.get_color(), line._unscaled_dash_pattern[1] is not None) for line in lines]


def verticals(figure):
    lines = [line for line in figure.axes[0].lines if list(line.get_ydata()) == [0, 1]]
    return [line.get_xdata()[0] for line in lines]


def legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_spectrum_figure_has_both_spectra_the_rank_and_the_break_even_rank():
    figure = spectrum_figure({"r": [4.0, 2.0, 1.0, 0.5]}, {"r": 2}, weighted={"r": [1.0, 9.0, 0.9]}, break_even=3)
    (first, blue, solid), (second, orange, dashed) = curves(figure)
    np.testing.assert_allclose(first, [1, 1 / 9, 0.1])
    np.testing.assert_allclose(second, [1, 0.5, 0.25, 0.125])
    assert (solid, dashed) == (False, True)
    assert blue != orange
    assert verticals(figure) == [2, 3]
    assert legend(figure) == ["weighted", "unweighted", "rank kept", "break-even"]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert (2, pytest.approx(1 / 9)) in dots
    assert (2, 0.5) in dots
    assert [text.get_text() for text in figure.axes[0].texts] == ["2", "3"]


def test_spectrum_figure_of_bonds_that_lack_a_kind():
    figure = spectrum_figure({"a": [1.0, 0.5], "b": [1.0, 0.4]}, {"a": 1}, weighted={"c": [1.0, 0.1], "a": [1.0, 0.3]})
    drawn = curves(figure)
    assert sorted(values[1] for values, _, _ in drawn) == [0.1, 0.3, 0.4, 0.5]
    colors = {values[1]: color for values, color, _ in drawn}
    assert colors[0.3] == colors[0.5]  # one colour a bond
    assert len(set(colors.values())) == 3
    assert legend(figure)[:3] == ["a: 1 of 2", "b: 2", "c: 2"]
    assert verticals(figure) == [1]
    only = spectrum_figure({}, {"a": 1}, weighted={"a": [1.0, 0.3]}, break_even=99)
    assert legend(only) == ["weighted", "rank kept"]  # a break-even rank beyond the last index is left out
    assert verticals(only) == [1]


def test_spectrum_figure_marks_the_cut_where_the_weighted_one_cannot_be_drawn():
    figure = spectrum_figure({"r": [1.0, 0.5]}, {"r": 1}, weighted={"r": [math.nan, 1.0]}, break_even=2)
    assert verticals(figure) == [1, 2]
    assert "weighted: 1 of 2 singular values not finite" in [text.get_text() for text in figure.axes[0].texts]
    assert legend(figure) == ["unweighted", "rank kept", "break-even"]
    with pytest.raises(ValueError, match=r"must name bonds of spectra \['0', '1'\], got '2'"):
        spectrum_figure({"0": [1.0]}, {"2": 1}, weighted={"1": [1.0]})


def test_numbers_above_the_axes_do_not_touch():
    spectra = {"r": list(np.arange(1, 385) ** -0.5)}
    figure = spectrum_figure(spectra, {"r": 114}, weighted=spectra, break_even=191, size=(3.7, 2.55), dpi=100)
    figure.draw_without_rendering()
    one, other = (text.get_window_extent() for text in figure.axes[0].texts)
    assert not one.overlaps(other)


def test_without_weighted_spectra_a_figure_is_as_before():
    figure = spectrum_figure({"a": [1.0, 0.5], "b": [1.0, 0.1]}, {"a": 1})
    assert figure.legends == []
    assert all(line.get_linestyle() != DASH_DOTTED for line in figure.axes[0].lines)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a: 1 of 2", "b: 2"]
