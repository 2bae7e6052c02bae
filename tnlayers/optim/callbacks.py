"""`RankAdaptive` in other people's loops: Hugging Face's Trainer, Lightning. Each is imported when it is asked for."""

from importlib import import_module
from typing import Any

from tnlayers.optim.rank_adaptive import RankAdaptive


def _flat(optimizer: RankAdaptive) -> dict[str, int]:
    """Largest rank of every layer, under names that loggers accept."""
    return {f"rank/{name or 'layer'}": max(ranks) for name, ranks in optimizer.ranks().items()}


def _inner(optimizer: Any) -> RankAdaptive:
    """The optimizer inside what a framework has wrapped around it."""
    seen = optimizer
    while not isinstance(seen, RankAdaptive):
        seen = getattr(seen, "optimizer", None)
        if seen is None:
            raise TypeError(
                f"rank_callback: the optimizer must be a RankAdaptive, got {type(optimizer).__name__}; pass it as "
                "Trainer(optimizers=(RankAdaptive(model, lr), None)), or return it from configure_optimizers"
            )
    return seen


def trainer_callback(settle: float = 0.6) -> Any:
    """A `transformers.TrainerCallback` that settles the ranks after a part of the steps and logs them.

    The optimizer is given to the Trainer itself: `Trainer(..., optimizers=(RankAdaptive(model, lr), None),
    callbacks=[trainer_callback()])`. Checkpoints of the Trainer hold the optimizer's state, ranks and probes included.

    Args:
        settle: part of the steps after which ranks stay.

    Raises:
        ImportError: without transformers.
        ValueError: a part outside [0, 1].
    """
    _check(settle)
    base: Any = _base("transformers", "TrainerCallback", "trainer_callback")

    class RankCallback(base):
        """See `trainer_callback`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The number of steps is known now."""
            optimizer = _inner(kwargs["optimizer"])
            if optimizer.settle_at is None:
                optimizer.settle_at = max(1, round(settle * state.max_steps))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            """Ranks beside the loss."""
            if logs is not None and kwargs.get("optimizer") is not None:
                logs.update(_flat(_inner(kwargs["optimizer"])))
                if state.log_history:  # the Trainer has filed a copy already
                    state.log_history[-1].update(_flat(_inner(kwargs["optimizer"])))

    return RankCallback()


def lightning_callback(settle: float = 0.6) -> Any:
    """A `lightning.Callback` that settles the ranks after a part of the steps and logs them.

    The optimizer is what `configure_optimizers` returns.

    Args:
        settle: part of the steps after which ranks stay.

    Raises:
        ImportError: without lightning.
        ValueError: a part outside [0, 1].
    """
    _check(settle)
    base: Any = _base("lightning.pytorch", "Callback", "lightning_callback")

    class RankCallback(base):
        """See `lightning_callback`."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """The number of steps is known now."""
            for wrapped in trainer.optimizers:
                optimizer = _inner(wrapped)
                if optimizer.settle_at is None:
                    optimizer.settle_at = max(1, round(settle * int(trainer.estimated_stepping_batches)))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            """Ranks beside the loss."""
            for wrapped in trainer.optimizers:
                pl_module.log_dict({k: float(v) for k, v in _flat(_inner(wrapped)).items()})

    return RankCallback()


def _base(module: str, name: str, asked: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ImportError:
        package = module.partition(".")[0]
        raise ImportError(f"{asked}: needs {package}; pip install {package}") from None


def _check(settle: float) -> None:
    if isinstance(settle, bool) or not isinstance(settle, int | float) or not 0 <= settle <= 1:
        raise ValueError(f"rank callback: settle must be a part of the steps in [0, 1], got {settle!r}")
