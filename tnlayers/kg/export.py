"""Tables of a trained model as files that other programs read: npy, parquet, word2vec text."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnlayers.files import write_atomic
from tnlayers.kg.embedding_tables import ball_points, embeddings
from tnlayers.kg.model import KGModel
from tnlayers.kg.triples import Triples

NAMES_FILE = "names.json"


def export_embeddings(
    model: KGModel,
    triples: Triples,
    out: str | os.PathLike[str],
    *,
    form: str = "npy",
    what: str = "both",
    overwrite: bool = False,
) -> list[Path]:
    """Write the rows of entities and relations, in the order of the vocabulary, float32 (float64 where the model is).

    One file a table: `entities.npy`, or `entities-NAME.npy` where a model has several; likewise relations (inverse ones
    last, as NAME^-1), and `entities-ball` for points in the Poincaré ball. "npy" is numpy's, with `names.json` beside;
    "parquet" has the columns name, x0, x1, ...; "w2v" is the text of word2vec, "count width" and a line each, blanks
    in names written as "_". Files are written whole or not at all.

    Args:
        model: trained.
        triples: its graph.
        out: folder; it is made, its parent must exist.
        form: "npy", "parquet" (needs pandas and pyarrow) or "w2v".
        what: "entities", "relations" or "both".
        overwrite: replace files that are there.

    Returns:
        The files.

    Raises:
        ImportError: parquet without pandas or pyarrow.
        ValueError: an unknown form, a file in the way, names that word2vec text cannot tell apart.

    Example:
        >>> import tempfile
        >>> from tnlayers.kg import TuckER, load_triples
        >>> graph = load_triples({"train": [("a", "r", "b"), ("b", "r", "c")]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = export_embeddings(TuckER(graph, entity_dim=4, relation_dim=2), graph, folder, form="w2v")
        ...     [file.name for file in files], files[0].read_text().splitlines()[0]
        (['entities.w2v.txt', 'relations.w2v.txt'], '3 4')
    """
    writers: dict[str, tuple[str, Callable[[list[str], np.ndarray], bytes]]] = {
        "npy": (".npy", _npy),
        "parquet": (".parquet", _parquet),
        "w2v": (".w2v.txt", _w2v),
    }
    if form not in writers:
        raise ValueError(f"export: the form must be one of {', '.join(writers)}, got {form!r}")
    if what not in ("entities", "relations", "both"):
        raise ValueError(f"export: what must be entities, relations or both, got {what!r}")
    if form == "parquet":
        _pandas()
    folder = Path(out)
    if not folder.is_dir() and (folder.exists() or not folder.parent.is_dir()):
        raise FileNotFoundError(f"export: expected a folder, or a new one in a folder that exists, got {out}")
    end, write = writers[form]
    names = {"entities": list(triples.entity_labels), "relations": _relation_names(triples)}
    tables = _tables(model, what)
    files = {folder / f"{stem}{end}": (stem.partition("-")[0], rows) for stem, rows in tables.items()}
    there = [file.name for file in files if file.exists()]
    if there and not overwrite:
        raise ValueError(f"export: {folder} holds {', '.join(there)}; give overwrite=True (--overwrite) or another")
    contents = {file: write(names[kind], _numpy(rows)) for file, (kind, rows) in files.items()}
    if form == "npy":
        contents[folder / NAMES_FILE] = (json.dumps(names, ensure_ascii=False, indent=0) + "\n").encode()
    folder.mkdir(exist_ok=True)
    for file, content in contents.items():
        write_atomic(file, content)
    return list(contents)


def _tables(model: KGModel, what: str) -> dict[str, Tensor]:
    """Stem of the file -> rows."""
    found, made = embeddings(model), {}
    for kind, tables in (("entities", found.entities), ("relations", found.relations)):
        if what in (kind, "both"):
            for name, rows in tables.items():
                made[kind if len(tables) == 1 else f"{kind}-{name.replace('.', '_')}"] = rows
    points = ball_points(model)
    if points is not None and what != "relations":
        made["entities-ball"] = points
    return made


def _relation_names(triples: Triples) -> list[str]:
    names = list(triples.relation_labels)
    return names + [f"{name}^-1" for name in names] if triples.inverse else names


def _numpy(rows: Tensor) -> np.ndarray:
    kept = rows.detach().cpu()
    kept = kept if kept.dtype in (torch.float64, torch.complex64, torch.complex128) else kept.float()
    found: np.ndarray = kept.numpy()
    return found


def _npy(names: list[str], rows: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, rows)
    return out.getvalue()


def _w2v(names: list[str], rows: np.ndarray) -> bytes:
    words = ["_".join(name.split()) or "_" for name in names]
    if len(set(words)) < len(words):
        seen: dict[str, str] = {}
        pair = next((seen[w], n) for w, n in zip(words, names, strict=True) if seen.setdefault(w, n) != n)
        raise ValueError(f"export: names must differ when blanks are '_', got {pair[0]!r} and {pair[1]!r}; take npy")
    digits = 17 if rows.dtype == np.float64 else 9
    lines = [f"{len(words)} {rows.shape[1]}"]
    lines += [
        " ".join([word, *(f"{x:.{digits}g}" for x in row)]) for word, row in zip(words, rows.tolist(), strict=True)
    ]
    return ("\n".join(lines) + "\n").encode()


def _parquet(names: Sequence[str], rows: np.ndarray) -> bytes:
    out = io.BytesIO()
    columns: dict[str, Any] = {"name": list(names)} | {f"x{k}": column for k, column in enumerate(rows.T)}
    _pandas().DataFrame(columns).to_parquet(out, index=False, engine="pyarrow")
    return out.getvalue()


@functools.cache
def _pandas() -> Any:
    try:
        pandas: Any = importlib.import_module("pandas")
        importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(
            f"export: parquet needs pandas and pyarrow ({error.name} is missing); pip install pandas pyarrow, or take "
            "--form npy"
        ) from None
    return pandas
