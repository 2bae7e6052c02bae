"""Small models, compressed copies of them, and how far they are apart: what the tests of recovery share."""

import copy
import hashlib
from functools import partial

import torch
from torch import nn

import tnlayers
from decompositions import svd
from tests.loops import generator
from tnlayers.recovery.feed import call


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 12))


class Encoder(nn.Module):
    """Embedding, two of torch's encoder layers, called by keywords with an attention mask as transformers' models."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True) for _ in range(2)
        )

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        return {"last_hidden_state": x}


def sentences(seed: int, count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens in which the second half of some rows is padding."""
    made = []
    for k in range(count):
        ids = torch.randint(0, 50, (8, 10), generator=generator(seed + k))
        mask = torch.ones(8, 10, dtype=torch.long)
        mask[4:, 6:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def shortened(model: nn.Module, rank: int = 6, **options) -> nn.Module:
    """A compressed copy."""
    made = copy.deepcopy(model)
    tnlayers.tensorize(made, partial(svd, rank=rank), spectra=False, skip_if_no_gain=False, **options)
    return made


def vectors(seed: int, count: int = 6) -> list[torch.Tensor]:
    return [torch.randn(32, 24, generator=generator(seed + k)) for k in range(count)]


def output(model, batch):
    with torch.no_grad():
        made = call(model.eval(), batch)
    if not isinstance(made, dict):
        return made
    made = made["last_hidden_state"]
    return made[batch["attention_mask"].bool()]


def error(model, teacher, batches) -> float:
    wrong = sum(float((output(model, b) - output(teacher, b)).square().sum()) for b in batches)
    return wrong / sum(float(output(teacher, b).square().sum()) for b in batches)


def digest(model: nn.Module) -> str:
    made = hashlib.sha256()
    for name, value in model.state_dict().items():
        made.update(name.encode())
        made.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else bytes(str(value), "utf8"))
    return made.hexdigest()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
