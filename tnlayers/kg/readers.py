"""Files of triples: delimited text (tsv, csv, txt) and N-Triples, plain or packed; a malformed line by its number."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KINDS = (".tsv", ".csv", ".txt", ".nt")
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
NAMES = {  # what a header may call the columns
    "h": {"h", "head", "s", "subj", "subject", "source", "from"},
    "r": {"r", "rel", "relation", "p", "pred", "predicate", "property", "edge"},
    "t": {"t", "tail", "o", "obj", "object", "target", "to"},
}
IRI, BLANK = r"<[^<>\"{}|^`\x00-\x20]*>", r"_:[^\s<>\"]*[^\s<>\".]"
STATEMENT = re.compile(
    rf"\s*({IRI}|{BLANK})\s*({IRI})\s*({IRI}|{BLANK}|(\"(?:[^\"\\]|\\.)*\")(?:\^\^{IRI}|@[\w-]+)?)\s*\.\s*(?:#.*)?"
)
ESCAPE = re.compile(r"\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})")


class Columns(NamedTuple):
    """Labels of a file: heads, relations, tails, and how many statements with a literal object were left out."""

    heads: list[Any]
    relations: list[Any]
    tails: list[Any]
    literals: int = 0


def kind_of(path: Path) -> tuple[str, str]:
    """The ending that says what a file holds, and the one that says how it is packed; "" for none or an unknown one."""
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    kind = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    return (kind if kind in KINDS else ""), packed


def placed(columns: str | Sequence[str]) -> tuple[int, int, int, int] | None:
    """Places of head, relation, tail in a row, and its width; None if the columns are asked for by name."""
    if not isinstance(columns, str):
        if len(columns) != 3:
            raise ValueError(
                f"load_triples: columns by name are those of head, relation and tail (3), got {len(columns)}"
            )
        return None
    if sorted(columns.replace("-", "")) != ["h", "r", "t"]:
        raise ValueError(
            f"load_triples: columns holds h, r and t once each, and - for a column to leave out, got {columns!r}; "
            "'hrt' is head, relation, tail"
        )
    return columns.index("h"), columns.index("r"), columns.index("t"), len(columns)


def named(header: Sequence[str], columns: Sequence[str], where: str) -> tuple[int, int, int, int]:
    """Places of the columns that are asked for by name."""
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"load_triples: {where} has no column {missing[0]!r}, got {', '.join(map(repr, header))}")
    head, relation, tail = (list(header).index(name) for name in columns)
    return head, relation, tail, len(header)


def recognized(header: Sequence[str]) -> tuple[int, int, int, int] | None:
    """Places in a header that names head, relation and tail in one of the usual ways; None if it is no header."""
    cells = [str(cell).strip().lower() for cell in header]
    found = [[k for k, cell in enumerate(cells) if cell in NAMES[letter]] for letter in "hrt"]
    if any(len(places) != 1 for places in found):
        return None
    return found[0][0], found[1][0], found[2][0], len(cells)


def read_file(
    path: Path, columns: str | Sequence[str], delimiter: str | None, header: bool | None, literals: str
) -> Columns:
    """Labels of one file, in its order."""
    kind, _ = kind_of(path)
    text = _text(path)
    if kind == ".nt":
        return _statements(path, text, literals)
    if kind == ".csv":
        return _quoted(path, text, columns, delimiter or ",", header)
    if delimiter is None:
        first = next((line for line in text.split("\n", 50) if line.strip()), "")
        delimiter = "\t" if kind == ".tsv" or "\t" in first else " "
    return _plain(path, text, columns, delimiter, header)


def _text(path: Path) -> str:
    data = path.read_bytes()
    unpack = PACKED.get(path.suffix.lower())
    if unpack is not None:
        try:
            data = unpack(data)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"load_triples: {path.name} is damaged, it cannot be unpacked ({error})") from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"load_triples: {path.name} line {line} is not UTF-8") from None


def _plain(path: Path, text: str, columns: str | Sequence[str], delimiter: str, header: bool | None) -> Columns:
    """Rows that a character divides, nothing quoted; a space stands for any blanks."""
    mark = None if delimiter == " " else delimiter
    rows = [line.split(mark) for line in text.split("\n") if line and not line.isspace()]
    return _columns(path, rows, columns, header, lambda: _numbers(text), "a tab" if mark == "\t" else repr(delimiter))


def _quoted(path: Path, text: str, columns: str | Sequence[str], delimiter: str, header: bool | None) -> Columns:
    """Rows of comma-separated values; a quoted cell may hold the comma and line ends."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, numbers = [], []
    try:
        for row in reader:
            if row:
                rows.append(row)
                numbers.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"load_triples: {path.name} line {reader.line_num} is malformed: {error}") from None
    return _columns(path, rows, columns, header, lambda: numbers, repr(delimiter))


def _numbers(text: str) -> list[int]:
    return [number for number, line in enumerate(text.split("\n"), 1) if line and not line.isspace()]


def _columns(
    path: Path,
    rows: list[list[str]],
    columns: str | Sequence[str],
    header: bool | None,
    numbers: Callable[[], list[int]],
    divider: str,
) -> Columns:
    if not rows:
        return Columns([], [], [])
    where = placed(columns)
    skip = 0
    if where is None:
        where, skip = named(rows[0], columns, path.name), 1
    elif header is not False:
        found = recognized(rows[0])
        if found is not None:
            where, skip = found, 1  # names say more than an order that was left at its default
        elif header:
            skip = 1
    head, relation, tail, width = where
    if any(len(row) != width for row in rows):
        bad = next(k for k, row in enumerate(rows) if len(row) != width)
        raise ValueError(
            f"load_triples: {path.name} line {numbers()[bad]}: expected {width} columns divided by {divider}, got "
            f"{len(rows[bad])} ({_short(rows[bad])}); columns='hrt-' leaves a fourth one out"
        )
    del rows[:skip]
    read = Columns([row[head] for row in rows], [row[relation] for row in rows], [row[tail] for row in rows])
    for part, name in zip(read[:3], ("head", "relation", "tail"), strict=True):
        if "" in part:
            line = numbers()[part.index("") + skip]
            raise ValueError(f"load_triples: {path.name} line {line}: the {name} is empty")
    return read


def _statements(path: Path, text: str, literals: str) -> Columns:
    """Subject, predicate and object of N-Triples; IRIs without their brackets."""
    heads, relations, tails, left_out = [], [], [], 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace() or line.lstrip().startswith("#"):
            continue
        found = STATEMENT.fullmatch(line)
        if found is None:
            raise ValueError(
                f"load_triples: {path.name} line {number}: expected '<subject> <predicate> <object> .', got "
                f"{_short([line])}"
            )
        if found[4] is not None and literals == "drop":
            left_out += 1
            continue
        heads.append(_label(found[1]))
        relations.append(_label(found[2]))
        tails.append(found[3] if found[4] is not None else _label(found[3]))
    return Columns(heads, relations, tails, left_out)


def _label(term: str) -> str:
    name = term[1:-1] if term.startswith("<") else term
    return ESCAPE.sub(lambda code: chr(int(code[1] or code[2], 16)), name) if "\\" in name else name


def _short(row: Sequence[str]) -> str:
    text = " | ".join(row)
    return repr(text if len(text) <= 60 else text[:57] + "...")
