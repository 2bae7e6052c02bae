"""What a recovery did: errors before and after, its history, why it stopped."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from tnlayers.page import Cell, Column, number, text_table


class RecoveryWarning(UserWarning):
    """A recovery that stopped early; the message says where, what was kept and what to do."""


class Moment(NamedTuple):
    """One entry of a history.

    Args:
        step: steps done.
        seconds: since the start, those of interrupted calls included.
        loss: mean of the steps since the entry before.
        validation: loss on the batches kept back, None where none were given or the time was short.
        block: of a reconstruction, "" otherwise.
    """

    step: int
    seconds: float
    loss: float
    validation: float | None
    block: str = ""


class BlockRow(NamedTuple):
    """One block of a reconstruction.

    Args:
        name: of the block in both models.
        before: `‖block'(x') - block(x)‖^2 / ‖block(x)‖^2` on the calibration data.
        solved: the same after the layers that were solved by least squares.
        after: the same at the end.
        layers: names of these layers.
        steps: of descent.
        reason: why it stopped.
    """

    name: str
    before: float
    solved: float
    after: float
    layers: tuple[str, ...]
    steps: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**self._asdict(), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "BlockRow":
        """Inverse of `to_dict`."""
        return cls(**{**plain, "layers": tuple(plain["layers"])})


@dataclass(frozen=True)
class Recovery:
    """What `reconstruct` and `distill` return.

    Args:
        kind: "reconstruct" or "distill".
        measure: what `before` and `after` are.
        before: before the first step.
        after: of the model as it is left.
        steps: done, over interrupted calls.
        seconds: spent, over interrupted calls.
        reason: why it stopped.
        history: one `Moment` every `every` steps.
        blocks: one row a block of a reconstruction.

    Example:
        >>> print(Recovery("distill", "loss on 2 validation batches", 0.5, 0.125, 100, 2.0, "all 100 steps are done"))
        distill: loss on 2 validation batches 0.5 -> 0.125
        100 steps in 2.0 s; all 100 steps are done
    """

    kind: str
    measure: str
    before: float
    after: float
    steps: int
    seconds: float
    reason: str
    history: tuple[Moment, ...] = ()
    blocks: tuple[BlockRow, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON and for checkpoints.

        Example:
            >>> Recovery("distill", "loss", 1.0, 0.5, 3, 0.1, "done").to_dict()["after"]
            0.5
        """
        plain = asdict(self)
        plain["history"] = [moment._asdict() for moment in self.history]
        plain["blocks"] = [row.to_dict() for row in self.blocks]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Recovery":
        """Inverse of `to_dict`.

        Example:
            >>> one = Recovery("distill", "loss", 1.0, 0.5, 3, 0.1, "done", (Moment(3, 0.1, 0.7, None),))
            >>> Recovery.from_dict(one.to_dict()) == one
            True
        """
        history = tuple(Moment(**moment) for moment in plain["history"])
        blocks = tuple(BlockRow.from_dict(row) for row in plain["blocks"])
        return cls(**{**plain, "history": history, "blocks": blocks})

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.measure} {number(self.before)} -> {number(self.after)}"]
        if self.blocks:
            columns = [Column("block"), *(Column(title, numeric=True) for title in ("before", "solved", "after"))]
            rows = [
                [Cell(row.name), *(Cell(number(value)) for value in (row.before, row.solved, row.after))]
                for row in self.blocks
            ]
            lines.append(text_table(columns, rows))
        lines.append(f"{self.steps} steps in {self.seconds:.1f} s; {self.reason}")
        return "\n".join(lines)
