"""Two plain layers in a row where one of low rank was, and the folders that hold such models.

This file is copied into every folder that `export_two_linear` writes, as `load_two_linear.py`: it needs torch,
safetensors, and transformers or timm, but not tnlayers.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

FORMAT_VERSION = 1
PLAIN = (
    "Linear",
    "Embedding",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
)
"""The layers of torch.nn that such a folder may ask for."""

FIRST = ("in_features", "in_channels", "num_embeddings", "padding_idx")
SECOND = ("out_features", "out_channels")
WINDOW = ("kernel_size", "stride", "padding", "dilation", "output_padding", "groups")
"""Settings of the one layer, by which of the two has them; those of WINDOW are with the one that has the kernel."""


class TwoLayers(nn.Sequential):
    """`nn.Sequential` of two layers that stand for one; models that ask that one for weight, bias or sizes find them.

    Example:
        >>> import torch
        >>> pair = TwoLayers(nn.Linear(6, 2, bias=False), nn.Linear(2, 4))
        >>> pair.weight.shape, pair.out_features, pair(torch.ones(3, 6)).shape
        (torch.Size([4, 6]), 4, torch.Size([3, 4]))
    """

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer, computed: r (m + n) numbers are held, m n returned."""
        first, second = (getattr(module, "weight") for module in self)  # noqa: B009
        if isinstance(self[0], nn.Embedding):
            return first @ second.mT
        if self._transposed():
            return (first.flatten(1).mT @ second.flatten(1)).unflatten(1, second.shape[1:])
        return (second.flatten(1) @ first.flatten(1)).unflatten(1, first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second layer."""
        return getattr(self[1], "bias", None)

    def _transposed(self) -> bool:
        return type(self[1]).__name__.startswith("ConvTranspose")

    def __getattr__(self, name: str) -> Any:
        if name in FIRST:
            return getattr(self[0], name)
        if name == "embedding_dim" and isinstance(self[0], nn.Embedding):
            return self[1].out_features
        if name in SECOND and not isinstance(self[0], nn.Embedding):
            return getattr(self[1], name)
        if name in WINDOW:
            return getattr(self[1 if self._transposed() else 0], name)
        return super().__getattr__(name)


def build(rows: list[dict[str, Any]]) -> nn.Module:
    """One layer, or two in a row, of the given types and arguments; numbers are drawn.

    Raises:
        ValueError: a type that is not listed in PLAIN.

    Example:
        >>> build([{"type": "Linear", "arguments": {"in_features": 3, "out_features": 2}}])
        Linear(in_features=3, out_features=2, bias=True)
    """
    for row in rows:
        if row["type"] not in PLAIN:
            raise ValueError(f"load_two_linear: a layer must be one of {PLAIN}, got {row['type']!r}")
    made = [getattr(nn, row["type"])(**row["arguments"]) for row in rows]
    return made[0] if len(made) == 1 else TwoLayers(*made)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Build the model of a folder and give it its numbers; no tnlayers, and no code of the folder but this.

    Args:
        folder: what `export_two_linear` wrote.
        model: the dense model, changed in place; needed for classes that neither transformers nor timm has.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: a folder of another version, or a class that must be given as `model`.

    Example:
        >>> load("no/such/folder")
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such file or directory: 'no/such/folder/two_linear.json'
    """
    from safetensors.torch import load_file

    root = Path(folder)
    about = json.loads((root / "two_linear.json").read_text(encoding="utf-8"))
    if about.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"load_two_linear: expected format version {FORMAT_VERSION}, got {about.get('format_version')}"
        )
    if model is None:
        model = _dense_model(root, about)
    for name, rows in about["layers"].items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, build(rows))
    tensors = load_file(root / "model.safetensors")
    tensors.update({other: tensors[first] for other, first in about["ties"].items()})
    model.load_state_dict(tensors, assign=True)
    for other, first in about["ties"].items():
        to, _, key = other.rpartition(".")
        parameters = model.get_submodule(to)._parameters
        if key in parameters:
            parameters[key] = model.get_parameter(first)
    return model.eval()


def _dense_model(root: Path, about: dict[str, Any]) -> Any:
    if about["kind"] == "timm":
        timm = importlib.import_module("timm")
        config = json.loads((root / "config.json").read_text(encoding="utf-8"))
        return timm.create_model(config["architecture"], pretrained=False, **config["model_args"])
    if about["kind"] != "transformers":
        raise ValueError(f"load_two_linear: build the {about['class']} in your own code and give it as model=")
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    found: Any = getattr(transformers, about["class"], None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        build_model: Any = found._from_config  # type: ignore[attr-defined]
        return build_model(config)
    raise ValueError(f"load_two_linear: expected a model class of transformers, got {about['class']!r}")


if __name__ == "__main__":
    print(load(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
