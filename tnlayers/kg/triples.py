"""Triples (head, relation, tail) with their vocabularies, from files, tables or PyKEEN."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tnlayers.kg.describe import CARDINALITIES, Description, cardinalities, first_of_each, repeated
from tnlayers.kg.readers import KINDS, OPENKE, Columns, kind_of, placed, read_file, read_openke, read_table

SPLITS = ("train", "valid", "test")
STEMS = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test", "testing")}
Labels = tuple[list[Any], list[Any], list[Any]]


@dataclass(frozen=True, eq=False)
class Triples:
    """Numbered triples in three splits, and the names of what the numbers stand for.

    Made by `load_triples`; or by hand from ids. The splits hold no inverse triples; with `inverse` the relation r + R
    is the inverse of r, R = len(relation_to_id), and `directed` adds the inverse triples (t, r + R, h).

    Args:
        train: (n, 3) int64: head, relation, tail.
        valid: likewise, maybe empty.
        test: likewise, maybe empty.
        entity_to_id: name -> number from 0.
        relation_to_id: name -> number from 0, inverse ones not among them.
        inverse: whether models answer heads as tails of inverse relations.
        name: of the data.
        duplicates: split -> repeated lines that were left out.
        dropped: split -> triples left out because of something that is not in train.
        literals: statements left out because their object is a literal.

    Raises:
        ValueError: ids outside the vocabularies, numbers that are not 0, 1, ..., an empty training split.

    Example:
        >>> triples = load_triples({"train": [("ann", "knows", "bob"), ("bob", "knows", "cid")]})
        >>> triples.num_entities, triples.num_relations, triples.train.tolist()
        (3, 2, [[0, 0, 1], [1, 0, 2]])
        >>> triples.directed("train").tolist()
        [[0, 0, 1], [1, 0, 2], [1, 1, 0], [2, 1, 1]]
    """

    train: Int[Tensor, "n 3"]
    valid: Int[Tensor, "v 3"]
    test: Int[Tensor, "s 3"]
    entity_to_id: Mapping[str, int]
    relation_to_id: Mapping[str, int]
    inverse: bool = True
    name: str = ""
    duplicates: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    literals: int = 0

    def __post_init__(self) -> None:
        for what, ids in (("entity_to_id", self.entity_to_id), ("relation_to_id", self.relation_to_id)):
            if sorted(ids.values()) != list(range(len(ids))):
                raise ValueError(f"Triples: {what} must number its {len(ids)} names 0, 1, ..., each number once")
        limit = torch.tensor([len(self.entity_to_id), len(self.relation_to_id), len(self.entity_to_id)])
        for split in SPLITS:
            part = getattr(self, split)
            if part.ndim != 2 or part.shape[1] != 3 or part.dtype != torch.int64:
                raise ValueError(
                    f"Triples: {split} must be int64 (n, 3), got {part.dtype} of shape {tuple(part.shape)}"
                )
            if bool(((part < 0) | (part >= limit)).any()):
                raise ValueError(
                    f"Triples: {split} needs ids below {limit[0]} (entities) and {limit[1]} (relations), got up to "
                    f"{part.amax(0).tolist()}"
                )
        if not len(self.train):
            raise ValueError("Triples: the training split is empty; there is nothing to learn from")

    def __repr__(self) -> str:
        sizes = "".join(f", {split}={len(self.split(split))}" for split in SPLITS)
        counts = f"entities={self.num_entities}, relations={len(self.relation_to_id)}, inverse={self.inverse}"
        return f"Triples(name={self.name!r}, {counts}{sizes})"

    @property
    def num_entities(self) -> int:
        """Entities of the vocabulary, those without a training triple included."""
        return len(self.entity_to_id)

    @property
    def num_relations(self) -> int:
        """Relations a model holds: with `inverse`, twice those of the data."""
        return len(self.relation_to_id) * (2 if self.inverse else 1)

    @cached_property
    def entity_labels(self) -> list[str]:
        """Name of every entity, by number."""
        return sorted(self.entity_to_id, key=self.entity_to_id.__getitem__)

    @cached_property
    def relation_labels(self) -> list[str]:
        """Name of every relation of the data, by number."""
        return sorted(self.relation_to_id, key=self.relation_to_id.__getitem__)

    @cached_property
    def known(self) -> Int[Tensor, "k 3"]:
        """Triples of all splits: what a filtered evaluation does not count as a mistake."""
        return torch.cat([self.train, self.valid, self.test])

    def split(self, name: str) -> Int[Tensor, "n 3"]:
        """The triples of "train", "valid" or "test", without inverse ones."""
        if name not in SPLITS:
            raise ValueError(f"Triples: a split is one of {', '.join(SPLITS)}, got {name!r}")
        found: Tensor = getattr(self, name)
        return found

    def directed(self, name: str) -> Int[Tensor, "n 3"]:
        """The triples of a split; with `inverse` followed by (t, r + R, h) for each of them."""
        part = self.split(name)
        if not self.inverse:
            return part
        back = part.flip(1)
        back[:, 1] += len(self.relation_to_id)
        return torch.cat([part, back])

    def entity_ids(self, names: Iterable[str | int]) -> Int[Tensor, n]:
        """Numbers of entities; an unknown name is refused with those most like it."""
        return _ids("entity", names, self.entity_to_id)

    def relation_ids(self, names: Iterable[str | int]) -> Int[Tensor, n]:
        """Numbers of relations; an unknown name is refused with those most like it."""
        return _ids("relation", names, self.relation_to_id)

    @cached_property
    def cardinality(self) -> list[str]:
        """Class of every relation of the data over all splits, "1-1", "1-N", "N-1" or "N-N" (threshold 1.5)."""
        return cardinalities(self.known, len(self.relation_to_id))

    def describe(self) -> Description:
        """Counts, repeated triples, entities and relations never trained, relations by cardinality.

        Example:
            >>> print(load_triples({"train": [("a", "r", "b")], "test": [("a", "r", "c")]}, name="toy").describe())
            toy: 3 entities, 1 relations (+ 1 inverse)
                                               train  valid  test
            triples                                1      0     1
            entities not in train                  0      0     1
            triples with something not in train    0      0     1
            relations 1-1: 0, 1-N: 1, N-1: 0, N-N: 0
        """
        entities = torch.zeros(self.num_entities, dtype=torch.bool)
        relations = torch.zeros(len(self.relation_to_id), dtype=torch.bool)
        entities[self.train[:, (0, 2)]] = True
        relations[self.train[:, 1]] = True
        parts = {split: self.split(split) for split in SPLITS}

        def unseen(part: Tensor) -> int:
            fine = entities[part[:, 0]] & entities[part[:, 2]] & relations[part[:, 1]]
            return len(part) - int(fine.sum())

        return Description(
            name=self.name,
            entities=self.num_entities,
            relations=len(self.relation_to_id),
            inverse=self.inverse,
            triples={split: len(part) for split, part in parts.items()},
            duplicates=dict(self.duplicates),
            seen={split: 0 if split == "train" else repeated(part, self.train) for split, part in parts.items()},
            unseen_entities={split: int((~entities[part[:, (0, 2)].unique()]).sum()) for split, part in parts.items()},
            unseen_triples={split: unseen(part) for split, part in parts.items()},
            dropped=dict(self.dropped),
            literals=self.literals,
            cardinality={kind: self.cardinality.count(kind) for kind in CARDINALITIES},
        )


def load_triples(
    source: str | os.PathLike[str] | Mapping[str, Any],
    inverse: bool = True,
    columns: str | Sequence[str] = "hrt",
    *,
    unseen: str = "keep",
    literals: str = "drop",
    delimiter: str | None = None,
    header: bool | None = None,
    name: str | None = None,
) -> Triples:
    r"""Read triples and number their names; entities and relations that only valid or test have are numbered too.

    Names are numbered in sorted order over all splits; blanks at their ends are no part of them. Repeated lines of a
    split are left out and counted; the order is that of the files. A folder holds train, valid (validation, val, dev)
    and test in .tsv, .csv, .txt, .nt (N-Triples; a blank node of one label is one entity in all files) or .parquet,
    each maybe packed (.gz, .bz2, .xz); a split without a file is empty. A folder of OpenKE's (entity2id.txt,
    relation2id.txt, train2id.txt, ...) keeps its ids. About .3 s for 10^5 triples.

    Args:
        source: a folder; one file (all of it is training); a mapping of "train", "valid", "test" to files, pandas
            DataFrames, or rows of three labels (text or whole numbers); or the name of a PyKEEN dataset, numbered as
            PyKEEN numbers it ("nations", "umls", "kinships" come with PyKEEN, others it downloads).
        inverse: whether models answer (?, r, t) as (t, r^-1, ?).
        columns: the order of the columns: "hrt" is head, relation, tail; "htr-" has the relation third and a fourth
            column that is left out. Three names ask for columns of a header, those of head, relation and tail.
        unseen: what is done with valid and test triples whose entity or relation no training triple has. "keep":
            they stay and are ranked, the protocol of the literature; "drop": they are left out and counted, and the
            vocabulary is that of train; "error".
        literals: "drop" leaves N-Triples statements with a literal object out and counts them; "keep" makes an entity
            of each literal.
        delimiter: between columns; None: a tab in .tsv, a comma in .csv, in .txt a tab if the first line has one and
            blanks otherwise.
        header: whether the first line names the columns; None: if it names head, relation and tail in a usual way.
        name: of the data; None: that of the folder.

    Raises:
        FileNotFoundError: no such folder or file.
        TypeError: another source, such as a table alone.
        ImportError: the name of a PyKEEN dataset without PyKEEN, .parquet without pandas or pyarrow.
        ValueError: a malformed line (file and number), no training triples, unseen names under `unseen="error"`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.tsv").write_text("ann\tknows\tbob\nbob\tknows\tcid\n")
        >>> _ = (folder / "test.tsv").write_text("cid\tknows\tdan\n")
        >>> triples = load_triples(folder)
        >>> triples.entity_to_id
        {'ann': 0, 'bob': 1, 'cid': 2, 'dan': 3}
        >>> triples.test.tolist(), triples.describe().unseen_entities["test"]
        ([[2, 0, 3]], 1)
    """
    for what, value, allowed in (
        ("unseen", unseen, ("keep", "drop", "error")),
        ("literals", literals, ("drop", "keep")),
    ):
        if value not in allowed:
            raise ValueError(f"load_triples: {what} must be one of {', '.join(allowed)}, got {value!r}")
    places = placed(columns)
    if delimiter == "":
        raise ValueError("load_triples: delimiter must be what stands between columns, got ''; None finds it")
    if not isinstance(source, str | os.PathLike | Mapping):
        raise TypeError(
            f"load_triples: expected a folder, a file, a name or a mapping of splits, got {type(source).__name__}; "
            "pass {'train': ...} with it"
        )
    if isinstance(source, Mapping):
        unknown = set(source) - set(SPLITS)
        if unknown or "train" not in source:
            raise ValueError(
                f"load_triples: a mapping has the keys train, valid and test (train at least), got {', '.join(source)}"
            )
        parts = dict(source)
    else:
        path = Path(source)
        if not path.exists():
            return _from_pykeen(str(source), inverse, name)
        name = path.name.split(".")[0] if name is None else name
        parts = _files(path) if path.is_dir() else {"train": path}
        if not parts:
            if places != placed("hrt"):
                raise ValueError(f"load_triples: {path} is OpenKE's, head, tail, relation; got columns={columns!r}")
            found, order = read_openke(path)
            return _numbered(found, inverse, unseen, name, order)
    read: dict[str, Columns] = {}
    for split, part in parts.items():
        if isinstance(part, str | os.PathLike):
            read[split] = read_file(Path(part), columns, delimiter, header, literals)
        else:
            read[split] = read_table(split, part, columns)
    return _numbered(read, inverse, unseen, name or "")


def _files(folder: Path) -> dict[str, Path]:
    """The file of every split; none for a folder of OpenKE's."""
    found: dict[str, Path] = {}
    there = sorted(file for file in folder.iterdir() if file.is_file())
    for split, stems in STEMS.items():
        files = [file for file in there if file.name.split(".")[0].lower() in stems and kind_of(file)[0]]
        if len(files) > 1:
            raise ValueError(
                f"load_triples: {folder} has {len(files)} files of {split} ({', '.join(file.name for file in files)}); "
                "pass a mapping of the splits to files"
            )
        if files:
            found[split] = files[0]
    if "train" not in found and (folder / OPENKE["train"]) in there:
        return {}
    if "train" not in found:
        others = [file.name for file in there if file.name.lower().startswith("train")]
        got = f", got {', '.join(others)}" if others else ""
        raise FileNotFoundError(
            f"load_triples: {folder} has no training file, expected train with one of {', '.join(KINDS)} (or packed)"
            f"{got}"
        )
    return found


def _numbered(
    read: Mapping[str, Columns],
    inverse: bool,
    unseen: str,
    name: str,
    order: tuple[list[str], list[str]] | None = None,
) -> Triples:
    """Vocabularies, ids, and what was left out; `order` holds entities and relations that are numbered already."""
    if not read["train"].heads:
        left = f" ({read['train'].literals} statements with a literal were left out)" if read["train"].literals else ""
        raise ValueError(f"load_triples: the training split is empty{left}; there is nothing to learn from")
    source = read.values() if unseen != "drop" else [read["train"]]
    entities = _vocabulary(part for columns in source for part in (columns.heads, columns.tails))
    relations = _vocabulary(columns.relations for columns in source)
    if order is not None:
        entities, relations = (
            {label: number for number, label in enumerate(x for x in labels if unseen != "drop" or x in seen)}
            for labels, seen in zip(order, (entities, relations), strict=True)
        )
    splits, duplicates, dropped = {}, {}, {}
    for split in SPLITS:
        columns = read.get(split, Columns([], [], []))
        ids = np.stack(
            [
                np.fromiter((ids.get(label, -1) for label in labels), np.int64, len(labels))
                for labels, ids in zip(columns[:3], (entities, relations, entities), strict=True)
            ],
            axis=1,
        )
        kept = ids[(ids >= 0).all(1)]
        rows = torch.from_numpy(kept)
        first = first_of_each(rows)
        dropped[split], duplicates[split] = len(ids) - len(rows), len(rows) - len(first)
        splits[split] = rows[first]
    triples = Triples(
        **splits,
        entity_to_id={str(label): number for label, number in entities.items()},
        relation_to_id={str(label): number for label, number in relations.items()},
        inverse=inverse,
        name=name,
        duplicates=duplicates,
        dropped=dropped,
        literals=sum(columns.literals for columns in read.values()),
    )
    if unseen == "error":
        report = triples.describe()
        for split, count in (report.unseen_triples or {}).items():
            if count:
                raise ValueError(
                    f"load_triples: {count} triples of {split} have an entity or a relation that no training triple "
                    "has; unseen='keep' ranks them, unseen='drop' leaves them out"
                )
    return triples


def _vocabulary(parts: Iterable[list[Any]]) -> dict[Any, int]:
    """Labels numbered in sorted order: integers by value, everything else as text; 1 and "1" are one name."""
    found: set[Any] = set().union(*parts)
    if all(type(label) is int for label in found):
        return {label: number for number, label in enumerate(sorted(found))}
    ids = {name: number for number, name in enumerate(sorted(set(map(str, found))))}
    return {label: ids[str(label)] for label in sorted(found, key=str)}


def _ids(what: str, names: Iterable[str | int], ids: Mapping[str, int]) -> Tensor:
    if isinstance(names, str):
        names = [names]
    found = []
    for name in map(str, names):  # labels that were whole numbers are text now
        if name not in ids:
            close = difflib.get_close_matches(name, list(ids), 3, 0.6) if len(ids) <= 200_000 else []
            like = f"; like it: {', '.join(close)}" if close else ""
            raise ValueError(f"Triples: no {what} {name!r} among {len(ids)}{like}")
        found.append(ids[name])
    return torch.tensor(found, dtype=torch.int64)


def _from_pykeen(name: str, inverse: bool, title: str | None) -> Triples:
    """A dataset that PyKEEN has, with PyKEEN's ids and its order of triples."""
    if os.sep in name or kind_of(Path(name))[0]:
        raise FileNotFoundError(f"load_triples: no file or folder {name}")
    try:
        datasets: Any = importlib.import_module("pykeen.datasets")
    except ImportError:
        raise ImportError(
            f"load_triples: no folder {name}, and datasets by name are PyKEEN's; pip install 'tnlayers[kg]'"
        ) from None
    try:
        datasets.dataset_resolver.lookup(name)
    except (KeyError, ValueError):
        raise FileNotFoundError(f"load_triples: no folder {name}, and PyKEEN has no dataset of that name") from None
    data = datasets.get_dataset(dataset=name)
    empty = torch.zeros(0, 3, dtype=torch.int64)
    train, valid, test = (
        empty if part is None else part.mapped_triples.long() for part in (data.training, data.validation, data.testing)
    )
    return Triples(
        train,
        valid,
        test,
        entity_to_id=dict(data.training.entity_to_id),
        relation_to_id=dict(data.training.relation_to_id),
        inverse=inverse,
        name=name if title is None else title,
    )
