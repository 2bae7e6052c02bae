"""Settings of published runs as data: which model, how it is made, how it is trained, and where that is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tnlayers.kg.losses import NegativeSampling


@dataclass(frozen=True)
class Recipe:
    """One run of a paper or its code, in the words of this package.

    Args:
        model: name of a class of `tnlayers.kg`.
        options: of the class, beside the triples.
        training: arguments of `train`.
        data: the graph it is for.
        source: where the settings are from.
        differs: what cannot be said in these words, or is chosen here because the source leaves it open.
        base: name of the recipe of a first stage, whose model this one is made from.

    Example:
        >>> recipe = RECIPES["tucker-wn18rr"]
        >>> recipe.model, recipe.options["relation_dim"], recipe.training["lr"]
        ('TuckER', 30, 0.003)
    """

    model: str
    options: Mapping[str, Any]
    training: Mapping[str, Any]
    data: str
    source: str
    differs: str = ""
    base: str | None = field(default=None)

    def short(self, epochs: int = 1, **changes: Any) -> dict[str, Any]:
        """The arguments of `train` for a trial of a few epochs.

        Example:
            >>> RECIPES["tucker-umls"].short(2)["epochs"]
            2
        """
        return {**self.training, "epochs": epochs, **changes}


_TUCKER = {"batch_size": 128, "label_smoothing": 0.1, "smoothing": "published", "optimizer": "Adam", "epochs": 500}
_BALAZEVIC = "I. Balazevic, C. Allen, T. Hospedales, EMNLP 2019, arXiv:1901.09590, and the README of its code"
_PYKEEN = {
    "batch_size": 128, "label_smoothing": 0.1, "smoothing": "others", "optimizer": "Adam", "epochs": 100, "lr": 3e-3,
}  # fmt: skip
_PYKEEN_SOURCE = "the CPU run of PyKEEN 1.11.1's TuckER that figures here are compared with (LCWA, BCE with logits)"
_MIGTF = "arXiv:2504.02589 (AISTATS 2025) and the defaults of its code"
_ROTATION = "I. Chami et al., ACL 2020, arXiv:2005.00545, and the README of its code"
_R_TUCKER = "the README of the R-TuckER code, March 2024"
_R_TUCKER_DIFFERS = (
    "published: a step of 2000 in Frobenius norm, which is lr sqrt(R N N) here, decayed by .9981 an epoch, and a "
    "penalty of 1e-4 to 3e-9 on the norm of the tensor, which is left out"
)

RECIPES: dict[str, Recipe] = {
    "tucker-wn18rr": Recipe(
        "TuckER",
        {"entity_dim": 200, "relation_dim": 30, "dropouts": (0.2, 0.2, 0.3)},
        {**_TUCKER, "lr": 3e-3},
        "WN18RR",
        _BALAZEVIC,
    ),
    "tucker-fb15k237": Recipe(
        "TuckER",
        {"entity_dim": 200, "relation_dim": 200, "dropouts": (0.3, 0.4, 0.5)},
        {**_TUCKER, "lr": 5e-4},
        "FB15k-237",
        _BALAZEVIC,
    ),
    "tucker-umls": Recipe(
        "TuckER",
        {"entity_dim": 100, "relation_dim": 30, "dropouts": (0.2, 0.2, 0.2)},
        _PYKEEN,
        "umls",
        _PYKEEN_SOURCE,
    ),
    "tucker-kinships": Recipe(
        "TuckER",
        {"entity_dim": 100, "relation_dim": 30, "dropouts": (0.2, 0.2, 0.2)},
        _PYKEEN,
        "kinships",
        _PYKEEN_SOURCE,
    ),
    "r-tucker-wn18rr": Recipe(
        "RTuckER",
        {"ranks": (10, 200)},
        {
            "batch_size": 512, "epochs": 1450, "optimizer": "R-TuckER SGD", "lr": 0.0104, "lr_decay": 0.9981,
            "label_smoothing": 0.1,
        },
        "WN18RR",
        _R_TUCKER,
        _R_TUCKER_DIFFERS,
    ),
    "r-tucker-fb15k237": Recipe(
        "RTuckER",
        {"ranks": (200, 20)},
        {
            "batch_size": 512, "epochs": 1450, "optimizer": "R-TuckER SGD", "lr": 0.0063, "lr_decay": 0.9981,
            "label_smoothing": 0.1,
        },
        "FB15k-237",
        _R_TUCKER,
        _R_TUCKER_DIFFERS,
    ),
    "mig-tf-wn18rr": Recipe(
        "MIGTF",
        {"hyperbolic_dim": 50, "curvature": 1 / 1.3},
        {**_TUCKER, "lr": 3e-3},
        "WN18RR",
        _MIGTF,
        "made from the model of the base recipe, which stays frozen; the published c = 1.3 is 1 / curvature",
        base="tucker-wn18rr",
    ),
    "rot-h-wn18rr": Recipe(
        "RotH",
        {"entity_dim": 32},
        {
            "batch_size": 500, "epochs": 500, "optimizer": "Adam", "lr": 1e-3, "every": 5, "patience": 20,
            "loss": NegativeSampling(50, filtered=False, weight=None),
        },
        "WN18RR",
        _ROTATION,
        "published in float64 and with 50 negatives of heads and tails together; here of tails of both directions",
    ),
    "rot-h-fb15k237": Recipe(
        "RotH",
        {"entity_dim": 32},
        {
            "batch_size": 500, "epochs": 500, "optimizer": "Adagrad", "lr": 0.05, "every": 5, "patience": 20,
            "loss": NegativeSampling(50, filtered=False, weight=None),
        },
        "FB15k-237",
        _ROTATION,
        "epochs, batch size and validation as for WN18RR, which the source leaves open",
    ),
    "rot-h-yago310": Recipe(
        "RotH",
        {"entity_dim": 32},
        {
            "batch_size": 1000, "epochs": 500, "optimizer": "Adam", "lr": 5e-4, "every": 5, "patience": 20,
            "loss": "1-vs-all", "label_smoothing": 0.0,
        },
        "YAGO3-10",
        _ROTATION,
        "validation as for WN18RR, which the source leaves open",
    ),
    "meim-wn18rr": Recipe(
        "MEIM",
        {"blocks": 3, "block_dim": 100},
        {
            "batch_size": 1024, "epochs": 500, "optimizer": "Adam", "lr": 3e-3, "loss": "1-vs-all",
            "label_smoothing": 0.0,
        },
        "WN18RR",
        "Tran, Takasu, IJCAI 2022, arXiv:2209.15597: blocks and their size",
        "the settings of training are chosen here: only the abstract was at hand; without its soft orthogonality",
    ),
}  # fmt: skip
"""Settings by name."""
