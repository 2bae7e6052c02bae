"""Before and after: one measurement for both, with the original's embeddings in place of the original."""

from pathlib import Path
from typing import Any

from torch import Tensor

from decompositions.progress import Progress
from tnlayers.compression.inputs import (
    body_of,
    choose_inputs,
    longest_text,
    padding_tokenizer,
    picture_inputs,
)
from tnlayers.evaluation.evaluate import embeddings, evaluate
from tnlayers.evaluation.result import Evaluation
from tnlayers.pretrained.model import Pretrained
from tnlayers.texts import batches

METRICS = ("size", "perplexity", "similarity", "speed", "memory")
"""What needs no labels."""


class Measure:
    """Measures a model whenever it is called; its first call makes the embeddings that later ones are compared with.

    So the original need not be kept for it.

    Args:
        held: the model, which may change between two calls.
        metrics: of `METRICS`; None: size, and perplexity of a decoder or similarity of embeddings (of the model below
            its head) of others.
        path: texts or pictures; None: size alone.
        count: how many.
        skip: those that calibration takes.
        seed: of the order.
        length: tokens a text is cut at.
        batch_size: rows of a batch.
        column: of the texts.
        progress: see `evaluate`.

    Raises:
        ValueError: metrics that these data cannot give; see `choose_inputs`.

    Example:
        >>> import torch
        >>> held = Pretrained(torch.nn.Linear(2, 2), kind="module")
        >>> Measure(held, None, None, count=1, skip=0, seed=0, length=8, batch_size=1)("before")["parameters"].value
        6
    """

    def __init__(
        self,
        held: Pretrained,
        metrics: tuple[str, ...] | None,
        path: Path | None,
        *,
        count: int,
        skip: int,
        seed: int,
        length: int,
        batch_size: int,
        column: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.held, self.length, self.batch_size, self.progress = held, length, batch_size, progress
        self.told, self.data, self.tokenizer = "", None, None
        self.reference: Tensor | None = None
        usual = ("size",) if path is None else ("size", "perplexity" if is_causal(held) else "similarity")
        self.metrics = tuple(dict.fromkeys(usual if metrics is None else metrics))
        pictures = path is not None and path.is_dir()
        if self.metrics != ("size",) and path is None:
            raise ValueError(f"compress: {', '.join(self.metrics)} need data; give --test or --calib")
        if pictures and "perplexity" in self.metrics:
            raise ValueError("compress: perplexity is of texts, got a folder of pictures; choose other --metrics")
        if path is None or self.metrics == ("size",):
            return
        taken, self.told = choose_inputs(path, count=count, seed=seed, column=column, skip=skip)
        if pictures:
            self.data = picture_inputs(held, taken, batch_size=batch_size).batches
        elif held.tokenizer is None:
            raise ValueError(f"compress: texts need a tokenizer, got none beside {held.source}; save it there")
        else:
            self.data, self.tokenizer, self.length = (
                taken,
                padding_tokenizer(held.tokenizer),
                longest_text(held, length),
            )

    def __call__(self, title: str) -> Evaluation:
        """Measure the model as it is now."""
        others = tuple(metric for metric in self.metrics if metric != "similarity")
        shared: dict[str, Any] = {
            "texts": self.data, "max_length": self.length if self.tokenizer is not None else None, "title": title,
            "progress": self.progress,
        }  # fmt: skip
        rows: tuple[Any, ...] = ()
        said: dict[str, Any] = {}
        if others:
            batch_size = None if "perplexity" in others else self.batch_size
            found = evaluate(self.held.model, self.tokenizer, metrics=others, batch_size=batch_size, **shared)
            rows, said = found.metrics, dict(found.conditions)
        if "similarity" in self.metrics:
            body, pooling = body_of(self.held.model), self.held.pooling or "mean"
            if self.reference is None:
                self.reference = embeddings(body, self._encoded(), pooling=pooling, progress=self.progress)
            shared |= {"pooling": pooling, "reference": self.reference, "batch_size": self.batch_size}
            found = evaluate(body, self.tokenizer, metrics=("similarity",), **shared)
            rows, said = rows + found.metrics, said | dict(found.conditions)
        return Evaluation(rows, said, title)

    def _encoded(self) -> Any:
        if self.tokenizer is None:
            return self.data
        assert self.data is not None
        return batches(self.data, self.tokenizer, batch_size=self.batch_size, max_length=self.length, sort=True)


def is_causal(held: Pretrained) -> bool:
    """Whether the model predicts the next token.

    Example:
        >>> import torch
        >>> is_causal(Pretrained(torch.nn.Linear(2, 2), kind="module"))
        False
    """
    name = type(held.model).__name__
    return "CausalLM" in name or "LMHead" in name
