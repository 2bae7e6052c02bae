"""The report: its table, JSON, figures and page, and the files they are written to."""

import json
import math
import os
import re
import stat
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from decompositions import LowRank, draw
from tnlayers import files
from tnlayers.figures import MAX_BARS, parameters_figure, spectrum_figure
from tnlayers.files import write_atomic
from tnlayers.page import (
    Cell,
    Column,
    compact,
    figure_png,
    html_page,
    html_table,
    inline_image,
    number,
    percent,
    printable,
    shorten,
    text_table,
)
from tnlayers.report import LayerRow, Report

EVIL = "<script>alert('x')</script>\x1b[31m\n&\"$\\frac$ \udc80"
VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}


def converted(name="fc1", **changes):
    values = {
        "kind": "Linear",
        "shape": (256, 784),
        "status": "converted",
        "reason": "",
        "format": "LowRank",
        "ranks": (16,),
        "break_even_rank": 192,
        "params_dense": 200960,
        "params": 16896,
        "flops_dense": 401408,
        "flops": 33280,
        "error": 0.335,
        "output_bound": 0.104,
        "spectra": {"0": tuple(k**-0.8 for k in range(1, 65))},
        "cuts": {"0": 16},
    }
    return LayerRow(name, **(values | changes))


def kept(name="head", reason="excluded", **changes):
    return LayerRow(name, "Linear", (10, 256), "kept", reason, params_dense=2570, params=2570, **changes)


def report(*rows):
    return Report(rows, sum(r.params_dense for r in rows) + 100, sum(r.params for r in rows) + 100)


class Page(HTMLParser):
    """Checks that tags balance, and collects what a browser would fetch, show or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.alts, self.scripts, self.rows = [], [], [], 0, 0
        self.text, self.ids = "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.fetched += [attrs[a] for a in ("src", "href", "srcset", "action", "data") if attrs.get(a)]
        assert not any(name.startswith("on") for name in attrs)
        self.scripts += tag == "script"
        self.rows += tag == "tr"
        if tag == "img":
            self.alts.append(attrs["alt"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def check_page(text):
    page = Page(text)
    assert "://" not in text
    assert re.search(r"url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(", text) is None
    assert page.fetched
    assert all(link.startswith("data:") for link in page.fetched)
    assert page.scripts == 1
    assert all(page.alts)
    assert all(c.isprintable() or c == "\n" for c in text)
    return page


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def pixels(data):
    image = pytest.importorskip("PIL.Image")
    import io

    return np.asarray(image.open(io.BytesIO(data)).convert("RGB")).astype(int)


# --- report -------------------------------------------------------------------------------------------------------


def test_compression_and_converted():
    both = report(converted(), kept())
    assert both.compression == (16896 + 2570 + 100) / (200960 + 2570 + 100)
    assert [row.name for row in both.converted] == ["fc1"]
    assert Report((), 0, 0).compression == 1.0


def test_table_holds_the_numbers():
    text = str(report(converted(), kept(reason="excluded by name")))
    row = next(line for line in text.splitlines() if line.startswith("fc1"))
    expected = "fc1 Linear 256x784 LowRank 16 192 201k 16.9k 8.41% 8.29% 0.335 0.104"
    assert row.split() == expected.split()
    assert "1 of 2 layers converted, parameters 203,630 -> 19,566 (9.61%)" in text
    assert "excluded by name: head" in text


def test_table_fits_120_columns_with_long_names_and_many_layers():
    rows = [
        converted(f"model.layers.{k}.{'very_long_' * 12}{k}", ranks=(100,) * 9, shape=(4,) * 12) for k in range(150)
    ]
    rows += [kept(f"{'deep.' * 30}{k}", reason="a reason that goes on and on " * 9) for k in range(50)]
    lines = str(report(*rows)).splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("\u2026" in line for line in lines) >= 200
    assert any(line.rstrip().endswith("more") or line.rstrip().endswith("layers") for line in lines)


def test_table_names_the_floor_of_merged_layers():
    """A merged weight saves memory, not time: the report says so, and warns above a third of the batch."""
    rows = [converted(f"fc{k}", floor=1.1 + 0.1 * k) for k in range(20)]
    text = report(*rows, converted("free"), kept()).table()
    assert "fc2: at least 1.30 x the dense layer\n" in text
    assert "fc3: at least 1.40 x the dense layer; a larger batch or smaller ranks would help" in text
    assert "and 8 more" in text
    assert "free: at least" not in text
    assert "at least" not in report(converted("free")).table()
    again = Report.from_dict(report(*rows).to_dict())
    assert [row.floor for row in again.rows] == [row.floor for row in rows]
    check_page(report(*rows).html())


def test_table_without_rows_and_without_conversion():
    assert "no layer" in str(Report((), 10, 10))
    text = str(report(kept("a"), kept("b"), kept("c", reason="")))
    assert "0 of 3 layers converted" in text
    assert "excluded: a, b" in text
    assert "no reason given: c" in text


def test_the_model_itself_has_a_label():
    lone = report(converted(""), kept(""))
    assert "(model)  Linear" in str(lone)
    assert "excluded: (model)" in str(lone)
    assert check_page(lone.html()).text.count("(model)") == 4


def test_table_keeps_control_characters_and_markup_out():
    text = str(report(converted(EVIL), kept("[red]x[/red]", reason=EVIL)))
    assert "\x1b" not in text
    assert "[red]x[/red]" in text
    assert "\\x1b[31m" in text


def test_table_names_non_finite_numbers():
    text = str(report(converted(error=math.nan, output_bound=math.inf)))
    assert " nan " in text
    assert text.splitlines()[4].endswith("inf")


@pytest.mark.parametrize(
    "rows",
    [
        (),
        (kept(),),
        (converted(), kept(), converted("c", spectra={}, cuts={}, error=None, output_bound=None)),
        (converted(EVIL, spectra={EVIL: (1.0, 0.5)}, cuts={EVIL: 1}),),
        (converted(error=math.inf, output_bound=-math.inf, spectra={"0": (math.inf, 1.0)}),),
    ],
)
def test_json_round_trip(rows, tmp_path):
    before = report(*rows)
    text = before.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Report.from_dict(json.loads(text)) == before


def test_json_round_trip_of_nan():
    after = Report.from_dict(json.loads(report(converted(error=math.nan)).to_json()))
    assert math.isnan(after.rows[0].error)


def test_json_takes_numpy_numbers_and_can_leave_spectra_out():
    row = converted(params=np.int64(7), shape=(np.int64(2), 3), error=np.float64(0.5), cuts={"0": np.int64(3)})
    data = json.loads(report(row).to_json(spectra=False))
    assert data["rows"][0]["params"] == 7
    assert data["rows"][0]["spectra"] == {}
    assert data["rows"][0]["cuts"] == {"0": 3}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(kind="other"), "kind = 'tnlayers report'"),
        (lambda d: d.update(version=99), "version = 1, got 99"),
        (lambda d: d.pop("params"), "needs 'params'"),
        (lambda d: d.update(params=True), "params of a report must be a int, got True"),
        (lambda d: d.update(rows={}), "rows of a report must be a list"),
        (lambda d: d["rows"].append(3), r"row \(1\) must be a dict, got 3"),
        (lambda d: d["rows"][0].update(extra=1), "unknown entries .'extra'"),
        (lambda d: d["rows"][0].pop("name"), "needs 'name'"),
        (lambda d: d["rows"][0].update(ranks=[1.5]), "expected ints, got 1.5"),
        (lambda d: d["rows"][0].update(error="big"), "expected a number, got 'big'"),
        (lambda d: d["rows"][0].update(status="lost"), "status must be one of .*'lost'"),
        (lambda d: d["rows"][0].update(params=-1), "params must be >= 0, got -1"),
        (lambda d: d["rows"][0].update(spectra={"0": ["x"]}), "expected a number, got 'x'"),
        (lambda d: d["rows"][0].update(break_even_rank="12"), "expected ints, got '12'"),
        (lambda d: d["rows"][0].update(diagram="<script>"), "must be an SVG document, got '<script>'"),
    ],
)
def test_from_dict_refuses_by_name(change, match):
    data = report(converted()).to_dict()
    change(data)
    with pytest.raises(ValueError, match=match):
        Report.from_dict(data)


def test_figures_are_written(tmp_path):
    rows = (converted(), kept(), converted("../../etc/passwd"), converted("a/b c", spectra={}), converted(EVIL))
    written = report(*rows).figures(tmp_path / "new" / "folder")
    names = [file.name for file in written]
    assert names[:3] == ["parameters.png", "spectrum-000-fc1.png", "spectrum-002-etc_passwd.png"]
    assert len(written) == 4
    assert {file.parent for file in written} == {tmp_path / "new" / "folder"}
    assert sorted(names) == sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert png_size(written[1].read_bytes()) == (1024, 640)
    assert Report((), 1, 1).figures(tmp_path / "none") == []


def test_figures_refuse_a_file_as_folder(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder"):
        report(converted()).figures(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


def test_page_is_self_contained(tmp_path):
    text = report(converted(), kept(), converted("no.spectra", spectra={}, cuts={})).html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text
    page = check_page(text)
    assert page.rows == 4
    assert len(page.alts) == 2
    assert "bond 0: 16 of 64 kept" in page.alts[1]
    for expected in ("9.01%", "201k", "no.spectra", "excluded", "2 of 3", "256x784"):
        assert expected in page.text


def test_page_draws_each_network_once_and_tells_the_budget(tmp_path):
    one, two = (draw(LowRank.random(row_modes=(6,), col_modes=(5,), rank=r)) for r in (2, 3))
    rows = (converted("a", diagram=one), converted("b", diagram=one), converted("c", diagram=two), kept())
    before = Report(rows, 10, 5, budget="budget: 7 of 9\na.r: rank 2, cuts <0.1>")
    page = check_page(before.html())
    drawn = [alt for alt in page.alts if alt.startswith("Diagram")]
    assert drawn == [f"Diagram of the network of {name}: LowRank, ranks 16." for name in "ac"]
    for expected in ("a and 1 more", "budget: 7 of 9", "a.r: rank 2, cuts <0.1>", "Every rank, and why"):
        assert expected in page.text
    assert Report.from_dict(json.loads(before.to_json())) == before
    assert all(row["diagram"] == "" for row in before.to_dict(spectra=False)["rows"])
    many = [converted(f"l{k}", diagram=one.replace("</svg>", f"<desc>{k}</desc></svg>")) for k in range(40)]
    assert sum(alt.startswith("Diagram") for alt in check_page(report(*many).html()).alts) == 24


def test_page_escapes_everything():
    rows = (converted(EVIL, kind=EVIL, format=EVIL, spectra={EVIL: (1.0, 0.5)}, cuts={EVIL: 1}), kept(reason=EVIL))
    text = Report(rows, 10, 5, title=EVIL).html()
    page = check_page(text)
    assert "<script>alert" not in text
    assert "<script>alert" in page.text


@pytest.mark.parametrize("rows", [(), (kept(), kept("b")), (converted(error=math.nan, spectra={"0": (math.nan,)}),)])
def test_page_of_unusual_reports(rows):
    page = check_page(report(*rows).html())
    assert f"{len(report(*rows).converted)} of {len(rows)}" in page.text
    if rows and rows[0].error:
        assert "nan" in page.text


def test_page_of_many_layers():
    spectra = {"0": tuple(np.arange(1, 20) ** -1.0)}
    rows = [converted(f"layers.{k}.mlp", spectra=spectra if k < 8 else {}, cuts={"0": 4}) for k in range(200)]
    page = check_page(report(*rows).html())
    assert page.rows == 201
    assert len(page.alts) == 9


# --- figures ------------------------------------------------------------------------------------------------------


def test_spectrum_figure_marks_the_cut():
    figure = spectrum_figure({"a": [4.0, 1.0, 2.0, 0.5], "b": [1.0, 0.1]}, {"a": 2}, "w")
    axes = figure.axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
    np.testing.assert_allclose(lines[0].get_ydata(), [1, 0.5, 0.25, 0.125])
    assert lines[0].get_alpha() == 0.35
    assert any(list(line.get_xdata()) == [2] and list(line.get_ydata()) == [0.5] for line in axes.lines)
    assert "2" in [text.get_text() for text in axes.texts]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a: 2 of 4", "b: 2"]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize(
    ("spectra", "remark"),
    [
        ({}, None),
        ({"0": []}, "no singular values"),
        ({"0": [0.0, 0.0]}, "all 2 singular values are zero"),
        ({"0": [math.nan, 1.0], "1": [1.0]}, "0: 1 of 2 singular values not finite"),
        ({"0": [1.0]}, None),
        ({"0": [1e-320, 0.0]}, None),
        ({"0": [1e300, 1.0, 0.0]}, None),
        ({f"_{k}$": [1.0, 0.1 * k] for k in range(20)}, None),
    ],
)
def test_spectrum_figure_of_unusual_spectra(spectra, remark):
    figure = spectrum_figure(spectra, dict.fromkeys(spectra, 1), "$\\frac{ \u6f22", size=(4, 3), dpi=100)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert remark is None or remark in texts
    assert png_size(figure_png(figure)) == (400, 300)


def test_spectrum_figure_refuses_wrong_cuts():
    with pytest.raises(ValueError, match=r"must name bonds of spectra \['0'\], got '1'"):
        spectrum_figure({"0": [1.0]}, {"1": 1})
    with pytest.raises(ValueError, match="rank >= 0, got -1"):
        spectrum_figure({"0": [1.0]}, {"0": -1})


def test_figures_have_ink_and_the_expected_size():
    figure = parameters_figure(["a", "b", "$x$"], [10**6, 500, 0], [10**3, 500, 0])
    data = figure_png(figure)
    assert png_size(data) == (1280, int((1.05 + 0.27 * 3) * 160))
    image = pixels(data)
    assert (np.abs(image - [0x00, 0x72, 0xB2]).sum(-1) < 12).sum() > 500
    assert (image == 255).all(-1).mean() > 0.5
    image = pixels(figure_png(spectrum_figure({"0": list(np.arange(1.0, 50) ** -1)}, {"0": 7}, "w")))
    assert image.shape == (640, 1024, 3)
    assert (np.abs(image - [0x00, 0x72, 0xB2]).sum(-1) < 12).sum() > 300
    assert not figure.axes  # emptied: nothing stays behind


def test_parameters_figure_adds_up_what_it_cannot_show():
    names = [f"l{k}" for k in range(100)]
    figure = parameters_figure(names, [k + 1 for k in range(100)], [1] * 100)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == MAX_BARS
    assert labels[:2] == ["l61", "l62"]
    assert labels[-1] == "61 smaller layers together"
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert f"{compact(sum(range(1, 62)))} \u2192 61" in texts


def test_parameters_figure_refuses():
    with pytest.raises(ValueError, match="of one length, got 1, 2, 1"):
        parameters_figure(["a"], [1, 2], [1])
    with pytest.raises(ValueError, match="counts must be >= 0, got -3"):
        parameters_figure(["a"], [1], [-3])
    assert png_size(figure_png(parameters_figure([], [], [])))


def test_figures_leave_pyplot_alone():
    report(converted()).html()
    if "matplotlib.pyplot" in sys.modules:
        import matplotlib.pyplot as plt

        assert plt.get_fignums() == []


# --- page ---------------------------------------------------------------------------------------------------------


def test_words():
    assert [compact(n) for n in (0, 7, 999, 1000, 12345, 999_500, 10**9, 5 * 10**15)] == [
        "0",
        "7",
        "999",
        "1k",
        "12.3k",
        "1M",
        "1G",
        "5000T",
    ]
    assert [number(x) for x in (None, 0.0, 1e-9, math.nan, math.inf)] == ["\u2013", "0", "1e-09", "nan", "inf"]
    assert [percent(*x) for x in ((1, 3), (2, 1), (0, 5), (1, 0), (999, 1000))] == [
        "33.3%",
        "200%",
        "0%",
        "\u2013",
        "99.9%",
    ]
    assert shorten("abcdefgh", 5) == "ab\u2026gh"
    assert [len(shorten("abcdefgh", k)) for k in range(1, 9)] == list(range(1, 9))
    assert printable("a\tb\u202e") == "a\\tb\\u202e"  # also what turns the direction of text


def test_text_table_aligns_and_shortens():
    columns = (Column("name", flexible=True), Column("n", numeric=True), Column("hidden", html_only=True))
    text = text_table(
        columns, [(Cell("x" * 100), Cell("5"), Cell("?")), (Cell("y"), Cell("1234"), Cell("?"))], width=40
    )
    lines = text.splitlines()
    assert max(map(len, lines)) == 40
    assert lines[2].endswith("   5")
    assert lines[3].endswith("1234")
    assert "hidden" not in text
    assert "?" not in text


def test_html_table_sorts_by_value():
    columns = (Column("name"), Column("n", "the number", numeric=True))
    rows = [(Cell("a", "a"), Cell("1k", 1000)), (Cell("b", "b"), Cell("-")), (Cell("c"), Cell("nan", math.nan))]
    text = html_table(columns, [*rows, (Cell("d"), Cell("inf", math.inf))])
    assert re.findall(r'class="n"( data-v="[^"]*")?>(.*?)</td>', text) == [
        (' data-v="1000"', "1k"),
        ("", "-"),
        (' data-v="Infinity"', "nan"),
        (' data-v="Infinity"', "inf"),
    ]
    assert 'aria-sort="none"' in text
    assert "<dd>the number</dd>" in text


def test_inline_image_refuses_what_is_no_png():
    with pytest.raises(ValueError, match="expected the bytes of a PNG"):
        inline_image(b"GIF89a", "x")


def test_html_page_is_light_and_dark():
    text = html_page("t", [("h <1>", "<p>body</p>")], lead="l & m")
    check_page(text)
    assert "prefers-color-scheme:dark" in text
    assert "<h2>h &lt;1&gt;</h2>" in text
    assert "l &amp; m" in text


# --- files --------------------------------------------------------------------------------------------------------


def test_write_atomic_writes_and_replaces(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, "h\u00e9llo\n")
    assert path.read_bytes() == b"h\xc3\xa9llo\n"
    path.chmod(0o640)
    write_atomic(str(path), b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_write_atomic_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("where", ["write", "sync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, where, error, exists):
    path = tmp_path / "x"
    if exists:
        path.write_text("old")

    def fail(*args):
        raise error

    def fail_halfway(self, data):
        with self.open("wb") as file:
            file.write(data[:2])
            raise error

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(Path, "write_bytes", fail_halfway)
        else:
            patch.setattr(os, "fsync" if where == "sync" else "replace", fail)
        with pytest.raises(type(error)):
            write_atomic(path, "something new")
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if exists else [])
    assert not exists or path.read_text() == "old"


def test_a_process_killed_mid_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    program = f"""
import importlib.util, os
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.atomic_target({str(path)!r}) as temporary:
    temporary.write_text("ne")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert path.read_text() == "old"


def test_write_atomic_follows_links_and_writes_to_devices(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    write_atomic(os.devnull, "gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_write_atomic_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder must exist"):
        write_atomic(tmp_path / "none" / "x", "")
    with pytest.raises(ValueError, match="got a folder"):
        write_atomic(tmp_path, "")
    with pytest.raises(TypeError, match="bytes or str, got int"):
        write_atomic(tmp_path / "x", 3)
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "x", "\udc80")
    assert list(tmp_path.iterdir()) == []


def test_long_names_leave_room_for_the_temporary_one(tmp_path):
    write_atomic(tmp_path / ("n" * 250), "x")
    assert (tmp_path / ("n" * 250)).read_text() == "x"
