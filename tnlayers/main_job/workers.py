"""The main job under torchrun: who this worker is, and what the workers tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.distributed import prepare
from tnlayers.main_job.config import JobConfig
from tnlayers.main_job.rows import JobError, Key, RowStore


def number() -> int:
    """Of this worker, from 0; worker 0 alone prints and writes."""
    return torch.distributed.get_rank() if count() > 1 else 0


def count() -> int:
    """How many workers there are."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


@contextmanager
def joined() -> Iterator[None]:
    """The process group of the workers that torchrun started; nothing in an ordinary process."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or count() > 1:
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def told(value: Any) -> Any:
    """What worker 0 has here; all workers ask at the same place."""
    box = [value]
    if count() > 1:
        torch.distributed.broadcast_object_list(box, group_src=0)
    return box[0]


def mean(value: float) -> float:
    """Mean of the workers' values."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total) / count()


def share(rows: Tensor) -> Tensor:
    """Part of a batch that falls to this worker; it may be empty.

    Example:
        >>> share(torch.arange(3))
        tensor([0, 1, 2])
    """
    return rows.tensor_split(count())[number()]


def prepared(model: nn.Module) -> nn.Module:
    """What to call in place of a model in training."""
    made: nn.Module = prepare(model) if count() > 1 else model
    return made


@dataclass
class Followed:
    """What the other workers know of the store of worker 0.

    Args:
        folder: of the results.
        settings: what the numbers depend on.
        keys: rows that are there.
    """

    folder: Path
    settings: dict[str, Any]
    keys: set[Key] = field(default_factory=set)

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    def path(self, name: str) -> Path:
        """Path of a file in the folder."""
        return self.folder / name


@contextmanager
def opened(config: JobConfig, settings: dict[str, Any]) -> Iterator[RowStore | Followed]:
    """The store on worker 0, what there is to know of it on the others.

    Raises:
        JobError: on all workers, where worker 0 cannot use the folder.
    """
    folder = Path(config.out)
    if number() > 0:
        found = told(None)
        if isinstance(found, str):
            raise JobError(found)
        yield Followed(folder, settings, set(found))
        return
    try:
        store = RowStore.open(folder, settings, overwrite=config.overwrite)
    except JobError as error:
        told(str(error))
        raise
    with store:
        told([row.key for row in store])
        yield store
