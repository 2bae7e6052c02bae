"""Where the time of a job goes."""

import time


class Clock:
    """Seconds by phase; every moment since it was made belongs to one.

    Example:
        >>> clock = Clock()
        >>> clock.lap("open")
        >>> clock.lap("write")
        >>> list(clock.seconds)
        ['open', 'write']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What has passed since the last call belongs to this phase, beside what was its own before."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
