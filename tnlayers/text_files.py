"""Texts and labels from `.txt`, `.jsonl`, `.tsv` and `.csv` files; a malformed line is reported by its number."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

KINDS = (".txt", ".jsonl", ".tsv", ".csv")
TEXT_NAMES = ("text", "sentence")
LABEL_NAMES = ("label", "labels")

Record = tuple[int, Sequence[Any]]


@dataclass(frozen=True)
class Texts(Sequence[str]):
    """Texts in the order of their file, with labels where the file has them; a sequence of strings.

    Args:
        texts: none is blank.
        labels: class numbers, one a text; None without labels.
        classes: names of the labels 0, 1, ...; empty if the file holds the numbers themselves.
        dropped: blank lines and blank texts that were left out.
        source: name of the file.

    Raises:
        ValueError: as many labels as texts are needed.

    Example:
        >>> texts = Texts(("good", "bad"), labels=(1, 0), classes=("negative", "positive"))
        >>> len(texts), texts[0], [texts.classes[k] for k in texts.labels]
        (2, 'good', ['positive', 'negative'])
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    dropped: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.texts):
            raise ValueError(f"Texts: expected {len(self.texts)} labels (one a text), got {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Texts: ...
    def __getitem__(self, at: int | slice) -> str | Texts:
        return self.take(range(*at.indices(len(self)))) if isinstance(at, slice) else self.texts[at]

    def __str__(self) -> str:
        kinds = len(set(self.labels)) if self.labels is not None else 0
        labelled = f" with {kinds} different labels" if kinds else ""
        return f"{len(self)} texts{labelled} of {self.source or 'memory'}, {self.dropped} blank ones dropped"

    def take(self, indices: Sequence[int]) -> Texts:
        """The texts at these places, with their labels."""
        labels = None if self.labels is None else tuple(self.labels[k] for k in indices)
        return Texts(tuple(self.texts[k] for k in indices), labels, self.classes, self.dropped, self.source)


def read_texts(
    path: str | os.PathLike[str],
    *,
    column: str | int | None = None,
    labelled: str | int | bool = False,
    header: bool | None = None,
    classes: Sequence[str] = (),
) -> Texts:
    r"""Read one text a line from `.txt`, `.jsonl`, `.tsv` or `.csv`, each also as `.gz` or `.xz`.

    A line ends at \n (or \r\n) alone; spaces around a text are kept; blank texts are dropped and counted. In `.tsv`
    quotes are ordinary characters (as in GLUE), in `.csv` they quote. Every row must have as many columns as the first.

    Args:
        path: the file, UTF-8 with or without a byte order mark.
        column: where the text is: the field of a JSON object, a column's name, or its number from 0. None: "text",
            then "sentence", then the only column that is not the label.
        labelled: where the label is, in the same words; True: "label", or the only other column.
        header: whether the first row holds the names of the columns (`.tsv`, `.csv`). None: it does if a column is
            asked for by name or one of its cells is "text", "sentence" or "label".
        classes: names of the labels 0, 1, ... in the order of the model. Without them labels that are integers are
            taken as they are, and others are numbered in alphabetical order.

    Returns:
        The texts, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, a damaged one, a malformed line (by its number), an unknown column, no text.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "reviews.tsv"
        >>> _ = file.write_text("sentence\tlabel\na fine film\t1\n\nno\t0\n")
        >>> texts = read_texts(file, labelled=True)
        >>> list(texts), texts.labels, texts.dropped
        (['a fine film', 'no'], (1, 0), 1)
    """
    file = Path(path)
    kind, unpack = _kind(file)
    if kind == ".txt":
        if labelled is not False:
            raise ValueError(f"read_texts: a .txt file has no labels, got labelled={labelled!r}; use .tsv or .jsonl")
        records: Iterator[Record] = ((n, (line,)) for n, line in _lines(file, unpack))
    elif kind == ".jsonl":
        records = _json_records(file, unpack, column, labelled)
    else:
        records = _table_records(file, unpack, kind, column, labelled, header)
    texts: list[str] = []
    labels: list[tuple[int, Any]] = []
    dropped = 0
    for line, cells in records:
        if not cells or not cells[0].strip():
            dropped += 1
            continue
        texts.append(cells[0])
        labels += [(line, cell) for cell in cells[1:]]
    if not texts:
        raise ValueError(f"read_texts: {file} holds no text ({dropped} blank lines); is it the right file?")
    if labelled is False:
        return Texts(tuple(texts), dropped=dropped, source=file.name)
    numbers, names = _numbered(file, labels, tuple(classes))
    return Texts(tuple(texts), numbers, names, dropped, file.name)


def read_document(path: str | os.PathLike[str]) -> str:
    r"""The whole file as one text (`.txt`, also `.gz`, `.xz`), blank lines kept: what perplexity is measured on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, a damaged one, or one that is not UTF-8 (by line).

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "play.txt.gz"
        >>> _ = file.write_bytes(gzip.compress(b"ROMEO:\n\nHo\n"))
        >>> read_document(file)
        'ROMEO:\n\nHo\n'
    """
    file = Path(path)
    kind, unpack = _kind(file)
    if kind != ".txt":
        raise ValueError(f"read_document: expected a .txt file (.gz, .xz), got {file}; use read_texts for {kind}")
    return "".join(line for _, line in _lines(file, unpack, keep_ends=True))


# --- lines and records ---


def _kind(file: Path) -> tuple[str, Callable[..., Any]]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    packed = openers.get(file.suffix.lower())
    kind = Path(file.stem if packed else file).suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"read_texts: expected one of {', '.join(KINDS)} (also .gz, .xz), got {file}; rename it")
    if file.is_dir():
        raise ValueError(f"read_texts: expected a file, got the folder {file}")
    if not file.exists():
        raise FileNotFoundError(f"read_texts: expected a file, got {file}, which does not exist")
    return kind, packed or open


def _lines(file: Path, unpack: Callable[..., Any], *, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines; bytes are split before they are decoded, so that only a line feed ends a line."""
    number = 0
    try:
        with unpack(file, "rb") as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line if keep_ends else line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"read_texts: {file}, line {number}: expected UTF-8, got byte {error.object[error.start]:#04x}; "
            "convert it with iconv"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"read_texts: {file} is damaged after line {number} ({error}); fetch it again") from None


def _bad(file: Path, line: int, rule: str) -> ValueError:
    return ValueError(f"read_texts: {file}, line {line}: {rule}")


def _json_records(
    file: Path, unpack: Callable[..., Any], column: str | int | None, labelled: str | int | bool
) -> Iterator[Record]:
    wanted: list[tuple[str, ...]] = [TEXT_NAMES if column is None else (str(column),)]
    if labelled is not False:
        wanted.append(LABEL_NAMES if labelled is True else (str(labelled),))
    for number, line in _lines(file, unpack):
        if not line.strip():
            yield number, ()
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad(file, number, f"expected a JSON object, got {line[:40]!r} ({error})") from None
        if not isinstance(entry, dict):
            raise _bad(file, number, f"expected a JSON object, got {type(entry).__name__}")
        cells = []
        for names in wanted:
            found = [name for name in names if name in entry]
            if not found:
                raise _bad(file, number, f"expected the field {' or '.join(names)}, got {sorted(entry)}; give its name")
            cells.append(entry[found[0]])
        if not isinstance(cells[0], str):
            raise _bad(file, number, f"the text must be a string, got {type(cells[0]).__name__}")
        yield number, cells


def _table_records(
    file: Path,
    unpack: Callable[..., Any],
    kind: str,
    column: str | int | None,
    labelled: str | int | bool,
    header: bool | None,
) -> Iterator[Record]:
    rows = _split_rows(file, unpack) if kind == ".tsv" else _quoted_rows(file, unpack)
    first: Sequence[str] | None = None
    chosen: list[int] = []
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            yield number, ()
            continue
        if first is None:
            first = row
            known = {cell.strip().lower() for cell in row} & {*TEXT_NAMES, *LABEL_NAMES}
            named = isinstance(column, str) or isinstance(labelled, str) or bool(known)
            titled = named if header is None else header
            chosen = _columns(file, row if titled else None, len(row), column, labelled)
            if titled:
                continue
        if len(row) != len(first):
            raise _bad(file, number, f"expected {len(first)} columns as in the first row, got {len(row)}")
        yield number, [row[k] for k in chosen]


def _split_rows(file: Path, unpack: Callable[..., Any]) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t")) for number, line in _lines(file, unpack))


def _quoted_rows(file: Path, unpack: Callable[..., Any]) -> Iterator[tuple[int, list[str]]]:
    """Rows of a `.csv`, numbered by their first line (quotes may span lines)."""
    reader = csv.reader((line for _, line in _lines(file, unpack, keep_ends=True)), strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # 128 KiB are less than a document
    at = 1
    try:
        for row in reader:
            yield at, row
            at = reader.line_num + 1
    except csv.Error as error:
        raise _bad(file, at, f"expected comma-separated values, got {error}; check its quotes") from None
    finally:
        csv.field_size_limit(limit)


def _columns(
    file: Path, names: Sequence[str] | None, width: int, column: str | int | None, labelled: str | int | bool
) -> list[int]:
    """Numbers of the text's column and of the label's."""
    titles = [name.strip() for name in names] if names is not None else []

    def find(what: str | int) -> int:
        if isinstance(what, str):
            if what not in titles:
                raise ValueError(
                    f"read_texts: {file}: expected a column of {titles or 'a file without header'}, got {what!r}"
                )
            return titles.index(what)
        if not 0 <= what < width:
            raise ValueError(f"read_texts: {file}: expected a column number from 0 to {width - 1}, got {what}")
        return what

    def guess(known: Sequence[str], taken: int | None, option: str) -> int:
        lower = [title.lower() for title in titles]
        left = [k for k in range(width) if k != taken]
        found = [lower.index(name) for name in known if name in lower] or (left if len(left) == 1 else [])
        if not found:
            raise ValueError(
                f"read_texts: {file} has {width} columns {titles or '(no header)'}; say which one with {option}="
            )
        return found[0]

    text = None if column is None else find(column)
    if labelled is False:
        return [guess(TEXT_NAMES, None, "column") if text is None else text]
    if labelled is True:
        if text is None and not titles:
            raise ValueError(f"read_texts: {file} has no header; say where the text is with column=")
        label = guess(LABEL_NAMES, text, "labelled")
    else:
        label = find(labelled)
    text = guess(TEXT_NAMES, label, "column") if text is None else text
    if text == label:
        raise ValueError(f"read_texts: {file}: text and label must be two columns, got column {text} for both")
    return [text, label]


def _numbered(
    file: Path, labels: Sequence[tuple[int, Any]], classes: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Labels as class numbers, and the names of the classes."""
    words = []
    for line, label in labels:
        if not isinstance(label, str | int) or not str(label).strip():
            raise _bad(file, line, f"the label must be a word or an integer, got {label!r}")
        words.append(str(int(label)) if isinstance(label, bool) else str(label).strip())
    if not classes and all(word.removeprefix("-").isdecimal() for word in words):
        for (line, _), word in zip(labels, words, strict=True):
            if int(word) < 0:
                raise _bad(file, line, f"the label must be >= 0, got {word}")
        return tuple(map(int, words)), ()
    names = classes or tuple(sorted(set(words)))
    number = {name: k for k, name in enumerate(names)}
    for (line, _), word in zip(labels, words, strict=True):
        if word not in number:
            raise _bad(file, line, f"the label must be one of {list(names)}, got {word!r}")
    return tuple(number[word] for word in words), names
