"""`tnlayers eval`: open one model or two, read the data, measure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decompositions.progress import Progress
from tnlayers.compression.inputs import open_model, padding_tokenizer
from tnlayers.evaluation.evaluate import evaluate
from tnlayers.evaluation.result import Evaluation
from tnlayers.texts import read_document, read_texts, sample

BOS: dict[str, Any] = {"auto": "auto", "yes": True, "no": False, "start": "start"}


@dataclass(frozen=True)
class EvalConfig:
    """What `tnlayers eval` is told.

    Args:
        source: name or folder of the model.
        texts: file of texts.
        document: one long text, for perplexity.
        labelled: file of texts with labels.
        label: where the label is; None for "label".
        column: where the text is.
        reference: model that embeddings are compared with.
        metrics: names; None for those that the data suit.
        count: texts taken, in an order of their own; None for all.
        seed: of that order.
        window: of perplexity.
        stride: of perplexity.
        bos: "auto", "yes", "start" or "no".
        length: tokens a text is cut at.
        batch_size: rows of a batch.
        against: another model, measured first, for one table of both.
        task: see `open_pretrained`.
        device: where the models run.

    Raises:
        ValueError: nothing to measure on, or settings that contradict each other.

    Example:
        >>> EvalConfig("model", texts=Path("texts.jsonl")).bos
        'auto'
    """

    source: str
    texts: Path | None = None
    document: Path | None = None
    labelled: Path | None = None
    label: str | None = None
    column: str | None = None
    reference: str | None = None
    metrics: tuple[str, ...] | None = None
    count: int | None = None
    seed: int = 0
    window: int | None = None
    stride: int | None = None
    bos: str = "auto"
    length: int | None = None
    batch_size: int | None = None
    against: str | None = None
    task: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.texts is not None and self.document is not None:
            raise ValueError("eval: give --texts or --document, not both")
        if self.texts is None and self.document is None and self.labelled is None and self.metrics != ("size",):
            raise ValueError("eval: nothing to measure on; give --texts, --document or --labelled")
        if self.bos not in BOS:
            raise ValueError(f"eval: --bos must be one of {', '.join(BOS)}, got {self.bos!r}")
        if self.reference is not None and self.texts is None:
            raise ValueError("eval: --reference compares embeddings of texts; give --texts")


def run(config: EvalConfig, progress: Progress | None = None) -> list[Evaluation]:
    """Evaluations of `against` (if there is one) and of the model."""
    texts: Any = None
    if config.texts is not None:
        texts = read_texts(config.texts, column=config.column)
        if config.count is not None:
            texts = sample(texts, min(config.count, len(texts)), config.seed)
    elif config.document is not None:
        texts = read_document(config.document)
    labelled = None
    if config.labelled is not None:
        labelled = read_texts(config.labelled, column=config.column, labelled=config.label or True)
        if config.count is not None:
            labelled = sample(labelled, min(config.count, len(labelled)), config.seed)
    reference = None
    if config.reference is not None:
        reference = open_model("eval", config.reference, task=config.task, device=config.device).model
    found = []
    for source in (config.against, config.source):
        if source is None:
            continue
        held = open_model("eval", source, task=config.task, device=config.device)
        if held.tokenizer is None and (texts is not None or labelled is not None):
            raise ValueError(f"eval: texts need a tokenizer, got none beside {source}; save it there")
        found.append(
            evaluate(
                held.model,
                padding_tokenizer(held.tokenizer),
                texts=texts,
                labelled=labelled,
                reference=reference,
                metrics=config.metrics,
                window=config.window,
                stride=config.stride,
                bos=BOS[config.bos],
                max_length=config.length,
                batch_size=config.batch_size,
                pooling=held.pooling or "mean",
                seed=config.seed,
                title=source,
                progress=progress,
            )
        )
    return found
