"""Models and a tokenizer as small as can be, for texts and evaluation; what else a test of them shares."""

import math
from types import SimpleNamespace

import torch
from torch import nn

from tnlayers.texts import Texts

VOCABULARY = 23


class TinyLM(nn.Module):
    """A causal transformer of one layer; `wrap` makes its output what other libraries return."""

    def __init__(self, positions=16, causal=True, wrap=lambda logits: logits, dtype=torch.float64):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, 8), nn.Embedding(positions, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)
        self.config = SimpleNamespace(max_position_embeddings=positions, bos_token_id=1)
        self.causal, self.wrap = causal, wrap
        self.calls = []
        self.to(dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(3)

    def get_input_embeddings(self):
        return self.embed

    def hidden(self, ids):
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        return self.block(self.embed(ids) + self.place(torch.arange(length)), src_mask=mask)

    def forward(self, ids):
        self.calls.append(tuple(ids.shape))
        return self.wrap(self.head(self.hidden(ids)))


class Words:
    """Tokenizer of the tests: a number a word; 0 pads, 1 begins, 2 ends."""

    pad_token_id, bos_token_id = 0, 1

    def __init__(self, *, side="right", pad=0, maximum=10**30, special=True):
        self.padding_side, self.pad_token_id, self.model_max_length, self.special = side, pad, maximum, special
        self.known = {}

    def __call__(self, texts, *, add_special_tokens=True, truncation=False, max_length=None):
        if isinstance(texts, str):
            return {"input_ids": self.encode(texts, add_special_tokens, max_length if truncation else None)}
        return {"input_ids": [self.encode(t, add_special_tokens, max_length if truncation else None) for t in texts]}

    def encode(self, text, special, longest):
        ids = [self.known.setdefault(word, 3 + len(self.known)) for word in text.split()]
        special = special and self.special
        if longest is not None:
            ids = ids[: longest - 2 * special]
        return [1, *ids, 2] if special else ids


class Encoder(nn.Module):
    """Bidirectional: hidden states of padding are NaN, so that nothing may read them."""

    def __init__(self, wrap=lambda h: SimpleNamespace(last_hidden_state=h), dtype=torch.float32):
        super().__init__()
        self.embed, self.mix, self.wrap = nn.Embedding(40, 6), nn.Linear(6, 6), wrap
        self.to(dtype)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask[..., None]
        mean = x.sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        hidden = torch.tanh(self.mix(x + mean))
        return self.wrap(torch.where(attention_mask[..., None] != 0, hidden, math.nan))


SENTENCES = Texts(
    ("one two three four", "five", "six one", "two two two", "nine ten one", "five six"), (0, 1, 0, 1, 1, 0)
)


def tokens(rng, n=61):
    return torch.randint(3, VOCABULARY, (n,), generator=rng)


def everything(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return state, modes, grads, hooks, torch.is_grad_enabled(), torch.get_num_threads()


def same(a, b):
    return all(torch.equal(a[0][name], b[0][name]) for name in a[0]) and a[1:] == b[1:]


def stop(*told):
    raise KeyboardInterrupt
