"""The one look of every report: a column model rendered as text or HTML, and a page that fetches nothing."""

from __future__ import annotations

import base64
import html
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT_WIDTH = 120
ELLIPSIS = "\u2026"
NOTHING = "\u2013"


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, what it means, and where it is shown.

    Args:
        label: heading.
        meaning: one sentence, shown when the pointer rests on the heading and listed below the table.
        numeric: aligned to the right, sorted by value.
        flexible: takes the width that is left in text, and is shortened in the middle.
        html_only: left out of the text table.

    Example:
        >>> Column("error", "relative Frobenius error", numeric=True).label
        'error'
    """

    label: str
    meaning: str = ""
    numeric: bool = False
    flexible: bool = False
    html_only: bool = False


@dataclass(frozen=True)
class Cell:
    """What stands in a table: text, the value it sorts by (None: last), and a style (`good`, `bad`, `quiet`).

    Example:
        >>> Cell("1.2k", 1200).sort
        1200
    """

    text: str
    sort: float | int | str | None = None
    style: str = ""


def printable(text: str) -> str:
    r"""Text whose control characters (also the terminal's, and lone surrogates) are written as escapes.

    Example:
        >>> printable("fc\x1b1")
        'fc\\x1b1'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shorten(text: str, width: int) -> str:
    """At most `width` characters: the middle gives way, since layer names differ at both ends.

    Example:
        >>> shorten("model.layers.11.self_attn.q_proj", 16)
        'model.\u2026tn.q_proj'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) * 3 // 5
    head = width - 1 - tail
    return text[:head] + ELLIPSIS + (text[-tail:] if tail else "")


def compact(count: float | int) -> str:
    """Three significant digits and a letter: 784, 4.35k, 201k, 1.24M, 7.6G.

    Example:
        >>> [compact(n) for n in (784, 4352, 200960, 999999, 1_240_000)]
        ['784', '4.35k', '201k', '1M', '1.24M']
    """
    for power, letter in ((0, ""), (3, "k"), (6, "M"), (9, "G"), (12, "T")):
        value = float(f"{count / 10**power:.3g}")
        if abs(value) < 1000 or letter == "T":
            return f"{value:g}{letter}"
    raise AssertionError(count)


def number(value: float | int | None) -> str:
    """Three significant digits; a dash for None; `nan` and `inf` by name.

    Example:
        >>> number(0.012345), number(None)
        ('0.0123', '\u2013')
    """
    if value is None:
        return NOTHING
    return f"{value:.3g}" if math.isfinite(value) else str(float(value))


def percent(part: float | int, whole: float | int) -> str:
    """`part / whole` as percent with three significant digits; a dash where there is no whole.

    Example:
        >>> percent(1, 8), percent(1, 0)
        ('12.5%', '\u2013')
    """
    if not whole:
        return NOTHING
    value = 100 * part / whole
    return f"{value:.0f}%" if abs(value) >= 99.95 else f"{value:.3g}%"


def by(sizes: Sequence[int]) -> str:
    """Sizes of a shape: `256x784`.

    Example:
        >>> by((256, 784))
        '256x784'
    """
    return "x".join(map(str, sizes)) if sizes else "scalar"


def text_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, width: int = TEXT_WIDTH) -> str:
    """Table as plain text of at most `width` columns, drawn by rich; flexible columns are shortened to fit.

    Example:
        >>> print(text_table([Column("layer"), Column("rank", numeric=True)], [[Cell("fc1"), Cell("8")]]))
        layer  rank
        ───────────
        fc1       8
    """
    from rich.box import Box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [k for k, column in enumerate(columns) if not column.html_only]
    cells = [[printable(row[k].text) for k in shown] for row in rows]
    heads = [columns[k] for k in shown]
    needed = [max([cell_len(h.label), *(cell_len(row[k]) for row in cells)]) for k, h in enumerate(heads)]
    fixed = sum(n for n, head in zip(needed, heads, strict=True) if not head.flexible) + 2 * (len(heads) - 1)
    flexible = sum(head.flexible for head in heads)
    room = max(8, (width - fixed) // flexible) if flexible else 0
    rule = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
    table = Table(box=rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for head in heads:
        table.add_column(
            Text(head.label), justify="right" if head.numeric else "left", no_wrap=True, overflow="ellipsis"
        )
    for row in cells:
        table.add_row(*(Text(shorten(c, room) if h.flexible else c) for c, h in zip(row, heads, strict=True)))
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, legacy_windows=False, force_terminal=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def html_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, caption: str = "") -> str:
    """Table whose headings sort it (buttons, so that the keyboard works too); everything is escaped.

    Example:
        >>> "&lt;script&gt;" in html_table([Column("layer")], [[Cell("<script>")]])
        True
    """
    head = "".join(
        f'<th scope="col"{_classes("n" if c.numeric else "")} aria-sort="none">'
        f'<button type="button" title="{_escape(c.meaning)}">{_escape(c.label)}</button></th>'
        for c in columns
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_classes('n' if c.numeric else '', 'name' if c.flexible else '', cell.style)}{_sort_key(cell)}>"
            f"{_breakable(cell.text) if c.flexible else _escape(cell.text)}</td>"
            for c, cell in zip(columns, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    title = f'<caption class="hidden">{_escape(caption)}</caption>' if caption else ""
    meanings = "".join(f"<dt>{_escape(c.label)}</dt><dd>{_escape(c.meaning)}</dd>" for c in columns if c.meaning)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(caption or "table")}">'
        f"<table>{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
        + (f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>\n" if meanings else "")
    )


def tiles(pairs: Sequence[tuple[str, str, str]]) -> str:
    """Totals on top of a page: (what, the number, one line of context) each.

    Example:
        >>> "8.3" in tiles([("smaller", "8.3", "times")])
        True
    """
    return (
        '<ul class="tiles">'
        + "".join(
            f'<li><span class="what">{_escape(what)}</span><strong>{_escape(value)}</strong>'
            f'<span class="context">{_escape(context)}</span></li>'
            for what, value, context in pairs
        )
        + "</ul>\n"
    )


def gallery(pictures: Sequence[tuple[str, str, str]]) -> str:
    """Pictures side by side: (caption, remark under it, `inline_image`) each.

    Example:
        >>> gallery([("fc1", "rank 8", "")]).count("<figure>")
        1
    """
    return (
        '<div class="gallery">'
        + "".join(
            f"<figure><figcaption><b>{_escape(caption)}</b> <span>{_escape(remark)}</span></figcaption>"
            f"{image}</figure>\n"
            for caption, remark, image in pictures
        )
        + "</div>\n"
    )


def beside(left: str, right: str) -> str:
    """Two pieces of a page side by side, one below the other where it is narrow.

    Example:
        >>> beside("<p>a</p>", "<p>b</p>").count("<div>")
        2
    """
    return f'<div class="beside"><div>{left}</div><div>{right}</div></div>\n'


def paragraph(text: str) -> str:
    """One escaped paragraph.

    Example:
        >>> paragraph("a < b")
        '<p>a &lt; b</p>\\n'
    """
    return f"<p>{_escape(text)}</p>\n"


def figure_png(figure: Figure, *, transparent: bool = False) -> bytes:
    """PNG of a figure, which is emptied afterwards; transparent for a page, whose colours then show through.

    Example:
        >>> from tnlayers.figures import spectrum_figure
        >>> figure_png(spectrum_figure({"0": [1.0, 0.1]}))[:4]
        b'\\x89PNG'
    """
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script the font lacks
        figure.savefig(out, format="png", facecolor="none" if transparent else "white", metadata={"Software": None})
    figure.clear()
    return out.getvalue()


def inline_image(png: bytes, alt: str) -> str:
    """`<img>` that carries its picture, at half its pixel size (sharp on dense screens).

    Raises:
        ValueError: the bytes are no PNG.

    Example:
        >>> from tnlayers.figures import spectrum_figure
        >>> inline_image(figure_png(spectrum_figure({"0": [1.0]})), "a < b")[:34]
        '<img class="figure" alt="a &lt; b"'
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"inline_image: expected the bytes of a PNG, got {png[:8]!r}; draw it with figure_png")
    width, height = (int.from_bytes(png[at : at + 4], "big") // 2 for at in (16, 20))
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<img class="figure" alt="{_escape(alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
    )


def inline_drawing(svg: str, alt: str) -> str:
    """`<img>` that carries a drawing of this library, at its own size.

    Raises:
        ValueError: the text is no SVG document.

    Example:
        >>> from decompositions import TT, draw
        >>> inline_drawing(draw(TT.random(row_modes=(4, 5), rank=2)), "a < b")[:34]
        '<img class="figure" alt="a &lt; b"'
    """
    if not svg.startswith("<svg"):
        raise ValueError(f"inline_drawing: expected an SVG document, got {svg[:20]!r}; make it with draw")
    data = base64.b64encode(svg.encode()).decode("ascii")
    return f'<img class="figure" alt="{_escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def unfolded(summary: str, lines: Sequence[str]) -> str:
    """A line that opens a list of lines.

    Example:
        >>> unfolded("ranks", ["fc: 3"])
        '<details><summary>ranks</summary><ul><li>fc: 3</li></ul></details>\\n'
    """
    entries = "".join(f"<li>{_escape(line)}</li>" for line in lines)
    return f"<details><summary>{_escape(summary)}</summary><ul>{entries}</ul></details>\n"


def html_page(title: str, sections: Sequence[tuple[str, str]], *, lead: str = "") -> str:
    """One self-contained page: no request leaves it (a content policy forbids them), light and dark.

    Args:
        title: heading and window title; escaped.
        sections: (heading, body) each; headings are escaped, bodies are HTML made by the functions of this module.
        lead: one line of text under the title; escaped.

    Example:
        >>> page = html_page("fc <1>", [("Layers", paragraph("none"))])
        >>> "<title>fc &lt;1&gt;</title>" in page, "://" in page
        (True, False)
    """
    body = "".join(
        f"<section>{f'<h2>{_escape(heading)}</h2>' if heading else ''}\n{content}</section>\n"
        for heading, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        f"<header><h1>{_escape(title)}</h1>{f'<p>{_escape(lead)}</p>' if lead else ''}</header>\n"
        f"{body}</main>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _classes(*names: str) -> str:
    names = tuple(name for name in names if name)
    return f' class="{" ".join(names)}"' if names else ""


def _breakable(text: str) -> str:
    """Escaped, with leave to break a line after a dot: dotted names break between their parts."""
    return _escape(text).replace(".", ".<wbr>")


def _sort_key(cell: Cell) -> str:
    if cell.sort is None:
        return ""
    if isinstance(cell.sort, float) and math.isnan(cell.sort):
        return ' data-v="Infinity"'
    text = str(cell.sort).replace("inf", "Infinity") if isinstance(cell.sort, float) else str(cell.sort)
    return f' data-v="{_escape(text)}"'


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { --ink:#1f2933; --quiet:#66707c; --line:#e3e7ec; --back:#fff; --raised:#f6f8fa; --accent:#0072b2;
  --good:#00724f; --bad:#b34700; color-scheme:light dark; }
@media (prefers-color-scheme:dark) { :root { --ink:#e6e9ed; --quiet:#9aa5b1; --line:#323a44; --back:#15191e;
  --raised:#1d232a; --accent:#58b0e3; --good:#4cc79b; --bad:#f0935a; }
  img.figure { filter:invert(1) hue-rotate(180deg); } }
* { box-sizing:border-box; }
body { margin:0; background:var(--back); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1240px; margin:0 auto; padding:32px 24px 64px; }
h1 { font-size:26px; line-height:1.25; margin:0 0 4px; overflow-wrap:anywhere; }
h2 { font-size:18px; margin:40px 0 12px; }
header p, figcaption span, .context, .what, dd { color:var(--quiet); }
header p { margin:0; overflow-wrap:anywhere; }
.tiles { list-style:none; margin:24px 0 0; padding:0; display:grid; gap:12px;
  grid-template-columns:repeat(auto-fit,minmax(170px,1fr)); }
.tiles li { background:var(--raised); border:1px solid var(--line); border-radius:8px; padding:12px 16px; }
.tiles span { display:block; font-size:13px; overflow-wrap:anywhere; }
.tiles strong { display:block; font-size:24px; line-height:1.3; font-weight:600; font-variant-numeric:tabular-nums; }
.scroll { overflow:auto; max-height:80vh; border:1px solid var(--line); border-radius:8px; }
table { border-collapse:collapse; width:100%; font-size:13.5px; font-variant-numeric:tabular-nums; }
th { position:sticky; top:0; background:var(--raised); padding:0; text-align:left; white-space:nowrap;
  box-shadow:inset 0 -1px var(--line); z-index:1; }
th button { all:unset; box-sizing:border-box; width:100%; padding:8px 12px; cursor:pointer; font-weight:600; }
th button:focus-visible, summary:focus-visible { outline:2px solid var(--accent); outline-offset:-2px; }
th.n, td.n { text-align:right; }
th[aria-sort=ascending] button::after { content:" \\25B2"; font-size:9px; }
th[aria-sort=descending] button::after { content:" \\25BC"; font-size:9px; }
td { padding:6px 12px; border-top:1px solid var(--line); white-space:nowrap; vertical-align:top; }
td.name { white-space:normal; overflow-wrap:anywhere; min-width:220px; font-weight:500; }
td.wrap { white-space:normal; min-width:180px; }
tbody tr:hover { background:var(--raised); }
.quiet { color:var(--quiet); } .good { color:var(--good); } .bad { color:var(--bad); font-weight:600; }
details { margin:10px 0; font-size:13.5px; } summary { cursor:pointer; color:var(--quiet); }
dl { display:grid; grid-template-columns:max-content 1fr; gap:4px 16px; margin:10px 0; }
dt { font-weight:600; } dd { margin:0; }
.gallery { display:grid; gap:24px 28px; grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr)); }
.beside { display:grid; gap:16px 28px; align-items:start;
  grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr)); } .beside > div { min-width:0; }
figure { margin:0; min-width:0; } figcaption { font-size:13.5px; margin-bottom:6px; overflow-wrap:anywhere; }
img.figure { display:block; max-width:100%; height:auto; }
.hidden { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); }
@media print { .scroll { max-height:none; overflow:visible; } figure { break-inside:avoid; } }
"""

_SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const th = button.parentElement, body = th.closest("table").tBodies[0], at = th.cellIndex;
  const up = th.getAttribute("aria-sort") !== "ascending", numeric = th.classList.contains("n");
  for (const other of th.parentElement.cells) other.setAttribute("aria-sort", "none");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => { const v = row.cells[at].dataset.v; return v === undefined ? null : numeric ? Number(v) : v; };
  body.append(...[...body.rows].map(row => [key(row), row]).sort(([a], [b]) =>
    a === null || b === null ? (a === null) - (b === null) :
    (numeric ? a - b || 0 : a.localeCompare(b, undefined, {numeric: true})) * (up ? 1 : -1)).map(([, row]) => row));
}));
"""
