"""Triples of files and tables: tsv, csv, txt, N-Triples, parquet, OpenKE; a malformed line is told by its number."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

KINDS = (".tsv", ".csv", ".txt", ".nt", ".parquet")
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
OPENKE = {"train": "train2id.txt", "valid": "valid2id.txt", "test": "test2id.txt"}
CODE = r"\\u[0-9A-Fa-f]{4}|\\U[0-9A-Fa-f]{8}"
IRI = rf"<[^<>\"{{}}|^`\\\x00-\x20]*(?:(?:{CODE})[^<>\"{{}}|^`\\\x00-\x20]*)*>"
BLANK = r"_:[^\s<>\"]*[^\s<>\".]"
STATEMENT = re.compile(
    rf"\s*({IRI}|{BLANK})\s*({IRI})\s*({IRI}|{BLANK}|(\"(?:[^\"\\]|\\.)*\")(?:\^\^{IRI}|@[\w-]+)?)\s*\.\s*(?:#.*)?"
)
ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)")
KEPT = '"\\\n\r'
"""Characters that stay escaped in the label of a literal."""


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
        if len(set(columns)) != 3:
            raise ValueError(f"load_triples: columns by name are three different ones, got {', '.join(columns)}")
        return None
    if sorted(columns.replace("-", "")) != ["h", "r", "t"]:
        raise ValueError(
            f"load_triples: columns holds h, r and t once each, and - for a column to leave out, got {columns!r}; "
            "'hrt' is head, relation, tail"
        )
    return columns.index("h"), columns.index("r"), columns.index("t"), len(columns)


def named(header: Sequence[str], columns: Sequence[str], where: str) -> tuple[int, int, int, int]:
    """Places of the columns that are asked for by name."""
    header = [cell.strip() for cell in header]
    for name in columns:
        if header.count(name) != 1:
            many = "no column" if name not in header else "more than one column"
            raise ValueError(f"load_triples: {where} has {many} {name!r}, got {', '.join(map(repr, header))}")
    head, relation, tail = (header.index(name) for name in columns)
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
    if not path.is_file():
        raise FileNotFoundError(f"load_triples: no file {path}")
    kind, _ = kind_of(path)
    if kind == ".parquet":
        return _parquet(path, columns)
    text = _text(path)
    if kind == ".nt":
        return _statements(path, text, literals)
    if kind == ".csv":
        return _quoted(path, text, columns, "," if delimiter is None else delimiter, header)
    if delimiter is None:
        first = next((line for line in text.split("\n", 50) if line.strip()), "")
        delimiter = "\t" if kind == ".tsv" or "\t" in first else " "
    return _plain(path, text, columns, delimiter, header)


def read_table(where: str, table: Any, columns: str | Sequence[str]) -> Columns:
    """Labels of a DataFrame, of an array or of rows: text, or whole numbers."""
    header = [str(column) for column in table.columns] if hasattr(table, "columns") else None
    places = placed(columns)
    if places is None:
        if header is None:
            raise ValueError(
                f"load_triples: columns by name need a DataFrame with a header, got {type(table).__name__}"
            )
        places = named(header, columns, where)
    elif header is not None:
        places = recognized(header) or places
    head, relation, tail, width = places
    expected = f"load_triples: {where} must be rows of {width} labels"
    try:  # as objects: numpy would make the text "nan" of a missing label beside text
        rows = np.asarray(table, dtype=object)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{expected} ({error})") from None
    if rows.ndim and not len(rows):
        return Columns([], [], [])
    if rows.ndim != 2 or rows.shape[1] != width:
        got = f"the shape {rows.shape}" if rows.ndim else type(table).__name__
        raise ValueError(f"{expected}, got {got}")
    parts = [[_name(label) for label in rows[:, place]] for place in (head, relation, tail)]
    for place, part, what in zip((head, relation, tail), parts, ("head", "relation", "tail"), strict=True):
        if None in part:
            row = part.index(None)
            label = rows[row, place]
            if label is None or _missing(label) or (isinstance(label, str) and not label.strip()):
                raise ValueError(f"load_triples: {where} row {row}: the {what} is missing ({label!r})")
            raise ValueError(
                f"load_triples: {where} row {row}: a label is text or a whole number, got the {what} {label!r}"
            )
    return Columns(parts[0], parts[1], parts[2])


def _name(label: Any) -> str | int | None:
    """A label as it is numbered; None for what is none, such as True, which would be one entity with 1."""
    if isinstance(label, str):
        return str(label).strip() or None
    return int(label) if isinstance(label, Integral) and not isinstance(label, bool) else None


def _missing(label: Any) -> bool:
    """NaN, and pandas' NA, whose comparisons have no truth value."""
    try:
        return bool(label != label)
    except (TypeError, ValueError):
        return True


def _parquet(path: Path, columns: str | Sequence[str]) -> Columns:
    try:
        pandas: Any = importlib.import_module("pandas")
        importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(
            f"load_triples: {path.name} needs pandas and pyarrow ({error.name} is missing); pip install pandas pyarrow"
        ) from None
    try:
        frame = pandas.read_parquet(io.BytesIO(_bytes(path)), engine="pyarrow")
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise ValueError(f"load_triples: {path.name} cannot be read as parquet ({error})") from None
    return read_table(path.name, frame, columns)


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    unpack = PACKED.get(path.suffix.lower())
    if unpack is None:
        return data
    try:
        if not data:
            raise ValueError("no bytes")
        return unpack(data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"load_triples: {path.name} is damaged, it cannot be unpacked ({error})") from None


def _text(path: Path) -> str:
    data = _bytes(path)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"load_triples: {path.name} line {line} is not UTF-8; expected text in UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"load_triples: {path.name} line {line} holds a zero byte; expected text in UTF-8") from None
    return text


def _plain(path: Path, text: str, columns: str | Sequence[str], delimiter: str, header: bool | None) -> Columns:
    """Rows that a mark divides, nothing quoted; a space stands for any blanks."""
    mark = None if delimiter == " " else delimiter
    rows = [line.split(mark) for line in text.split("\n") if line and not line.isspace()]
    return _columns(path, rows, columns, header, lambda: _numbers(text), "a tab" if mark == "\t" else repr(delimiter))


def _quoted(path: Path, text: str, columns: str | Sequence[str], delimiter: str, header: bool | None) -> Columns:
    """Rows of comma-separated values; a quoted cell may hold the comma and line ends."""
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ValueError(
            f"load_triples: {path.name}: the delimiter of csv is one character and no quote, got {delimiter!r}"
        )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    rows, numbers = [], []
    try:
        for row in reader:
            if len(row) > 1 or any(cell.strip() for cell in row):
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
        more = "columns='hrt-' leaves a fourth one out" if len(rows[bad]) > width else "delimiter= says what divides"
        raise ValueError(
            f"load_triples: {path.name} line {numbers()[bad]}: expected {width} columns divided by {divider}, got "
            f"{len(rows[bad])} ({_short(rows[bad])}); {more}"
        )
    del rows[:skip]
    parts = [[row[place].strip() for row in rows] for place in (head, relation, tail)]
    for part, name in zip(parts, ("head", "relation", "tail"), strict=True):
        if "" in part:
            line = numbers()[part.index("") + skip]
            raise ValueError(f"load_triples: {path.name} line {line}: the {name} is empty")
    return Columns(parts[0], parts[1], parts[2])


def _statements(path: Path, text: str, literals: str) -> Columns:
    """Subject, predicate and object of N-Triples; IRIs without their brackets."""
    read, left_out = Columns([], [], []), 0
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
        try:
            terms = [_label(found[k]) for k in (1, 2, 3)]
        except ValueError as error:
            raise ValueError(f"load_triples: {path.name} line {number}: {error}") from None
        for part, term in zip(read[:3], terms, strict=True):
            part.append(term)
    return read._replace(literals=left_out)


def _label(term: str) -> str:
    """A term without brackets and with the characters that \\u and \\U stand for: two spellings are one name."""
    name = term[1:-1] if term.startswith("<") else term
    return ESCAPE.sub(_character, name) if "\\" in name else name


def _character(code: re.Match[str]) -> str:
    digits = code[1] or code[2]
    if digits is None:
        return code[0]
    number = int(digits, 16)
    if number > 0x10FFFF or 0xD800 <= number < 0xE000:
        raise ValueError(f"{code[0]} stands for no character")
    return code[0] if chr(number) in KEPT else chr(number)


def read_openke(folder: Path) -> tuple[dict[str, Columns], tuple[list[str], list[str]]]:
    """Labels of OpenKE's folder by split, and the names of entities and relations in the order of their ids.

    Every file begins with the count of its lines. Names are followed by their id; triples are head, tail, relation.
    """
    entities, relations = (_openke_names(folder / name) for name in ("entity2id.txt", "relation2id.txt"))
    limits = (len(entities), len(entities), len(relations))
    read = {}
    for split, name in OPENKE.items():
        path, found = folder / name, Columns([], [], [])
        for number, line in _counted(path) if split == "train" or path.is_file() else ():
            ids = _whole(line.split())
            if ids is None or len(ids) != 3:
                raise ValueError(
                    f"load_triples: {name} line {number}: expected the ids of head, tail and relation, got "
                    f"{_short([line])}"
                )
            for k, what, limit in zip(ids, ("head", "tail", "relation"), limits, strict=True):
                if k >= limit:
                    raise ValueError(
                        f"load_triples: {name} line {number}: the {what} must be below {limit}, got {k}; the columns "
                        "are head, tail, relation"
                    )
            found.heads.append(entities[ids[0]])
            found.relations.append(relations[ids[2]])
            found.tails.append(entities[ids[1]])
        read[split] = found
    return read, (entities, relations)


def _openke_names(path: Path) -> list[str]:
    names: dict[int, str] = {}
    lines = _counted(path)
    for number, line in lines:
        name, last = ([*line.rsplit(None, 1), ""])[:2]  # a name may hold blanks
        name, ids = name.strip(), _whole([last])
        if ids is None or not name:
            raise ValueError(
                f"load_triples: {path.name} line {number}: expected a name and its id, got {_short([line])}"
            )
        if ids[0] >= len(lines) or ids[0] in names:
            raise ValueError(
                f"load_triples: {path.name} line {number}: ids are 0 to {len(lines) - 1}, each once, got {ids[0]}"
            )
        names[ids[0]] = name
    ordered = [names[k] for k in range(len(lines))]
    if len(set(ordered)) != len(ordered):
        twice = Counter(ordered).most_common(1)[0][0]
        raise ValueError(f"load_triples: {path.name} gives {twice!r} more than one id")
    return ordered


def _counted(path: Path) -> list[tuple[int, str]]:
    """Lines that are not blank after the first, with their numbers; the first says how many they are."""
    if not path.is_file():
        raise FileNotFoundError(f"load_triples: no file {path}, which an OpenKE folder has")
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    count = _whole(lines[0][1].split()) if lines else None
    if count is None or len(count) != 1:
        got = _short([lines[0][1]]) if lines else "an empty file"
        raise ValueError(f"load_triples: {path.name} line 1: expected the count of the lines that follow, got {got}")
    if count[0] != len(lines) - 1:
        raise ValueError(f"load_triples: {path.name} line 1 counts {count[0]} lines, {len(lines) - 1} follow")
    return lines[1:]


def _whole(words: Sequence[str]) -> list[int] | None:
    """Numbers from 0 written in digits; None if a word is something else."""
    return [int(word) for word in words] if all(word.isascii() and word.isdigit() for word in words) else None


def _short(row: Sequence[str]) -> str:
    text = " | ".join(row)
    return repr(text if len(text) <= 60 else text[:57] + "...")
