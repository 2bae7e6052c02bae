"""The progress of a training run, for people: a bar, or whatever the caller does with (done, in all, text)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int, str], None]
"""Called as (steps done, steps in all, text) after every step."""


@contextmanager
def reporting(progress: bool | Report, steps: int) -> Iterator[Report]:
    """What to call after every step.

    Args:
        progress: True for a bar on stderr; False for nothing; or the callable itself.
        steps: in all.

    Example:
        >>> seen = []
        >>> with reporting(lambda done, whole, text: seen.append((done, whole, text)), 2) as report:
        ...     report(1, 2, "epoch 1")
        >>> seen
        [(1, 2, 'epoch 1')]
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, whole, text: None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=steps)
            yield lambda done, whole, text: bar.update(task, completed=done, description=text)
