"""The progress of long work: a bar for people, or whatever the caller does with (done, in all, text)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Progress = Callable[[int, int, str], None]
"""Called as (done, in all, text) after every step; a number in all that is not known is 0."""


def reporting(name: str, progress: bool | Progress | None) -> AbstractContextManager[Progress]:
    """What to call after every step, within; the bar, if there is one, ends with the block, however that ends.

    `progress` is looked at by the call itself: call it before work begins.

    Args:
        name: of the function that was given `progress`, for messages.
        progress: True for a bar on stderr, drawn by rich; False or None for nothing; or the callable itself.

    Returns:
        A context manager for one `with`; it gives what is called as (done, in all, text).

    Raises:
        TypeError: none of these.
        ImportError: True, and rich cannot be imported.

    Example:
        >>> seen = []
        >>> with reporting("train", lambda done, whole, text: seen.append((done, whole, text))) as report:
        ...     report(1, 2, "epoch 1")
        >>> seen
        [(1, 2, 'epoch 1')]
    """
    if callable(progress):
        return nullcontext(progress)
    if progress is None or progress is False:
        return nullcontext(_silent)
    if progress is not True:
        raise TypeError(
            f"{name}: progress must be True, False or a callable, got {progress!r}; a callable is given "
            "(done, in all, text)"
        )
    try:
        import rich.progress  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{name}: progress=True draws its bar with rich, expected it installed, got {error}; pip install rich, or "
            "pass a callable (done, in all, text)"
        ) from error
    return _bar()


def _silent(done: int, whole: int, text: str) -> None:
    pass


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    # where the line is narrow the bar gives way first, then the end of the text
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=None, table_column=Column(max_width=40)),
        TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, whole, text: bars.update(task, completed=done, total=whole or None, description=text)
