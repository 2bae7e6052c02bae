"""Compressed models without tnlayers: dense folders, and layers of low rank as two plain layers in a row."""

import copy
import json
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.checkpoint import _unique_tensors
from tnlayers.conv import ConvolutionLayer
from tnlayers.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from tnlayers.convert import densify
from tnlayers.embedding import Embedding
from tnlayers.frozen import best_cut, merge
from tnlayers.layer import NetworkLayer
from tnlayers.linear import Linear
from tnlayers.pretrained import two_layers
from tnlayers.pretrained.folder import (
    PLAN_FILE,
    as_pretrained,
    load_folder,
    make_skeleton,
    versions,
    write_beside,
    written_folder,
)
from tnlayers.pretrained.hub import quiet
from tnlayers.pretrained.model import Pretrained, open_pretrained
from tnlayers.pretrained.two_layers import TwoLayers
from tnlayers.surgery import is_transposed, keep_hooks, replace, sites, weight_key

ARGUMENTS = {
    "Linear": ("in_features", "out_features"),
    "Embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    "Conv": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    "ConvTranspose": (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
    ),
}


def export_dense(source: Pretrained | nn.Module | str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a compressed model as an ordinary folder of dense weights, for programs that know nothing of tnlayers.

    A model of transformers becomes what `AutoModel.from_pretrained(out)` opens (its layers transposed back where the
    class wants that); one of timm, timm's own layout; any other, its dense state dict. Weights that were tied are tied
    where their dense values are equal; where they are not (a padding row that only the embedding keeps), both are
    stored and the configuration says so. The source is not changed. Memory: one dense model.

    Args:
        source: a model, what `open_pretrained` or `load_folder` returned, or a folder.
        out: a new or empty folder.
        overwrite: replace a folder that holds a model.

    Returns:
        The path of the folder.

    Raises:
        ValueError: a folder that is not empty; a model whose class does not take the tensors.

    Example:
        >>> import tempfile, tnlayers
        >>> from decompositions import LowRank
        >>> net = nn.Sequential(tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=2)))
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     out = export_dense(net, f"{parent}/dense")
        ...     [p.name for p in out.iterdir()]
        ['model.safetensors']
    """
    held = _opened("export_dense", source)
    with written_folder(out, overwrite, "export_dense") as temporary:
        if held.kind == "transformers":
            model = _dense_twin(held)
            write_beside(held, temporary, model.config)
            with quiet():
                model.save_pretrained(temporary)
        else:
            dense = densify(copy.deepcopy(held.model))
            if held.kind == "timm":
                about = {**held.config, "num_classes": getattr(dense, "num_classes", None)}
                about["pretrained_cfg"] = _plain_settings(getattr(dense, "pretrained_cfg", None))
                (temporary / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            _save_tensors({key: t.clone() for key, t in dense.state_dict().items()}, temporary)
    return Path(out)


def as_two_linear(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Replace tensor layers, in place, by two plain layers of torch in a row, where their network is such a product.

    A linear layer `U S V^T x + b` becomes `nn.Linear(n, r, bias=False)` and `nn.Linear(r, m)`; a convolution, the same
    kernel with r channels and a pointwise one; an embedding, a table of width r and a linear map (a padding vector
    outside their span costs one more column). S goes to the side where it is free. Any network that a cut separates
    into rows and columns will do. Ties of the table with an output layer stay ties.

    Returns:
        The model, and what stayed as it was: {name: reason}.

    Raises:
        TypeError: no module.

    Example:
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=2))
        >>> as_two_linear(nn.Sequential(layer))
        (Sequential(
          (0): TwoLayers(
            (0): Linear(in_features=8, out_features=2, bias=False)
            (1): Linear(in_features=2, out_features=6, bias=True)
          )
        ), {})
    """
    kept: dict[str, str] = {}
    tables: dict[Any, nn.Parameter] = {}
    for site in sites(model):
        layer = site.module
        if isinstance(layer, NetworkLayer):
            cut = best_cut(layer.network.detach())
            if cut is None:
                kept[site.name] = f"a core of {layer.network!r} has rows and columns: no product of two matrices"
                continue
            left, right = merge(layer.network, cut)
            assert right is not None
            try:
                pair = two_plain_layers(layer, left, right)
            except ValueError as error:
                kept[site.name] = str(error)
                continue
            for parameter in pair.parameters():
                parameter.requires_grad_(layer.cores[0].requires_grad)
            if (bias := getattr(layer, "bias", None)) is not None:
                pair[1].bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            key = (*weight_key(layer), cut)
            for part in pair:
                weight: Any = part.weight
                tied = tables.setdefault((key, tuple(weight.shape)), weight)
                if tied is not weight and torch.equal(tied, weight):
                    part.weight = tied
            keep_hooks(layer, pair)
            pair.train(layer.training)
            if not site.name:
                model = pair
            else:
                replace(model, site, pair)
    return model, kept


def export_two_linear(
    source: Pretrained | nn.Module | str | Path, out: str | Path, *, overwrite: bool = False
) -> tuple[Path, dict[str, str]]:
    """Write a compressed model with plain layers alone: pairs of low rank stay pairs, other formats become dense.

    The folder holds configuration and tokenizer, `model.safetensors`, `two_linear.json` (which layers are pairs), and
    `load_two_linear.py`, whose `load(folder)` builds the model with torch, safetensors and transformers or timm. The
    source is not changed.

    Args:
        source: a model, what `open_pretrained` or `load_folder` returned, or a folder.
        out: a new or empty folder.
        overwrite: replace a folder that holds a model.

    Returns:
        The path of the folder, and which layers were made dense: {name: reason}.

    Raises:
        ValueError: a folder that is not empty.

    Example:
        >>> import tempfile, tnlayers
        >>> from decompositions import LowRank
        >>> net = nn.Sequential(tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=2)))
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     out, dense = export_two_linear(net, f"{parent}/pairs")
        ...     two_layers.load(out, nn.Sequential(nn.Linear(8, 8)))[0]
        TwoLayers(
          (0): Linear(in_features=8, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=8, bias=True)
        )
    """
    held = _opened("export_two_linear", source)
    before = {n for n, m in held.model.named_modules(remove_duplicate=False) if isinstance(m, NetworkLayer)}
    model, kept = as_two_linear(copy.deepcopy(held.model))
    model = densify(model)
    if "" in before:
        raise ValueError("export_two_linear: the model itself is one layer; put it into an nn.Sequential")
    rows = {}
    for name in sorted(before):
        module = model.get_submodule(name)
        parts = list(module) if isinstance(module, TwoLayers) else [module]
        if all(type(part).__name__ in two_layers.PLAIN for part in parts):
            rows[name] = [{"type": type(part).__name__, "arguments": _arguments(part)} for part in parts]
    tensors, ties = _unique_tensors(model)
    about = {
        "format_version": two_layers.FORMAT_VERSION,
        "versions": versions(),
        "kind": held.kind,
        "class": type(held.model).__name__,
        "layers": rows,
        "dense": kept,
        "ties": ties,
    }
    with written_folder(out, overwrite, "export_two_linear") as temporary:
        write_beside(held, temporary)
        _save_tensors(tensors, temporary)
        (temporary / "two_linear.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        text = Path(two_layers.__file__).read_text(encoding="utf-8")
        (temporary / "load_two_linear.py").write_text(text, encoding="utf-8")
    return Path(out), kept


@singledispatch
def two_plain_layers(layer: NetworkLayer, left: Tensor, right: Tensor) -> TwoLayers:
    """Two layers of torch with the function of `layer`, without its bias' values, for the weight `left @ right`.

    Another layer is one more registration.

    Raises:
        ValueError: a layer that has no such form; the message is the reason.

    Example:
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(5, 4, network=tnlayers.random_network(LowRank, rank=2))
        >>> pair = two_plain_layers(layer, torch.ones(4, 2), torch.ones(2, 5))
        >>> pair.weight[0]
        tensor([2., 2., 2., 2., 2.], grad_fn=<SelectBackward0>)
    """
    raise ValueError(f"{type(layer).__name__} has no form of two plain layers")


@two_plain_layers.register
def _(layer: Linear, left: Tensor, right: Tensor) -> TwoLayers:
    m, n, r = layer.out_features, layer.in_features, left.shape[1]
    return _pair(
        nn.Linear(n, r, bias=False, device="meta"),
        nn.Linear(r, m, layer.bias is not None, device="meta"),
        right[:, :n],
        left[:m],
    )


@two_plain_layers.register
def _(layer: Embedding, left: Tensor, right: Tensor) -> TwoLayers:
    v, d = layer.num_embeddings, layer.embedding_dim
    left, right = left[:v].clone(), right[:, :d]
    if layer.padding_vector is not None:
        left, right = _with_row(left, right, layer.padding_idx or 0, layer.padding_vector)
    r = left.shape[1]
    table = nn.Embedding(v, r, layer.padding_idx, device="meta")
    return _pair(table, nn.Linear(r, d, bias=False, device="meta"), left, right.mT)


def _with_row(left: Tensor, right: Tensor, row: int, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Factors whose product has `vector` as its row: by their span where it holds it, else by one more column."""
    wide, wanted = right.double().cpu(), vector.double().cpu()  # the CPU's solver takes any rank
    solution = torch.linalg.lstsq(wide.mT, wanted.unsqueeze(1)).solution.squeeze(1).to(left.dtype)
    rest = torch.linalg.vector_norm(solution.double() @ wide - wanted)
    if rest <= 4 * torch.finfo(left.dtype).eps * torch.linalg.vector_norm(wanted):
        left[row] = solution.to(left.device)
        return left, right
    left[row] = 0
    column = torch.zeros_like(left[:, :1])
    column[row] = 1
    return torch.cat([left, column], 1), torch.cat([right, vector.unsqueeze(0)])


@two_plain_layers.register
def _(layer: ConvolutionLayer, left: Tensor, right: Tensor) -> TwoLayers:
    _one_group(layer)
    kind: Any = layer.dense_class
    settings = {name: getattr(layer, name) for name in layer.arguments}
    out, r = layer.out_channels, left.shape[1]
    first = kind(**{**settings, "out_channels": r}, bias=False, device="meta")
    second = kind(r, out, 1, bias=layer.bias is not None, device="meta")
    return _pair(first, second, right.reshape(first.weight.shape), left[:out].reshape(second.weight.shape))


@two_plain_layers.register(ConvTranspose1d)
@two_plain_layers.register(ConvTranspose2d)
@two_plain_layers.register(ConvTranspose3d)
def _(layer: ConvolutionLayer, left: Tensor, right: Tensor) -> TwoLayers:
    _one_group(layer)
    kind: Any = layer.dense_class
    plain: Any = getattr(nn, kind.__name__.replace("Transpose", ""))
    settings = {name: getattr(layer, name) for name in layer.arguments}
    width, r = layer.in_channels, left.shape[1]
    first = plain(width, r, 1, bias=False, device="meta")
    second = kind(**{**settings, "in_channels": r}, bias=layer.bias is not None, device="meta")
    return _pair(first, second, left[:width].mT.reshape(first.weight.shape), right.reshape(second.weight.shape))


def _one_group(layer: ConvolutionLayer) -> None:
    if layer.groups != 1:
        raise ValueError(f"a {type(layer).__name__} with groups={layer.groups} shares its factor between groups")


def _pair(first: Any, second: Any, one: Tensor, two: Tensor) -> TwoLayers:
    first.weight, second.weight = nn.Parameter(one.contiguous().clone()), nn.Parameter(two.contiguous().clone())
    return TwoLayers(first, second)


def _arguments(module: nn.Module) -> dict[str, Any]:
    name = type(module).__name__.rstrip("123d")
    found = {key: getattr(module, key) for key in ARGUMENTS[name]}
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    return found if name == "Embedding" else {**found, "bias": module.bias is not None}


def _opened(who: str, source: Any) -> Pretrained:
    if isinstance(source, str | Path):
        return load_folder(source) if (Path(source) / PLAN_FILE).is_file() else open_pretrained(source)
    return as_pretrained(who, source)


def _plain_settings(settings: Any) -> dict[str, Any]:
    """What timm says of input sizes and classes, without where the weights came from."""
    names = ("num_classes", "input_size", "crop_pct", "interpolation", "mean", "std", "first_conv", "classifier")
    return {name: settings[name] for name in names if isinstance(settings, dict) and name in settings}


def _save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _dense_twin(held: Pretrained) -> Any:
    """A dense model of the same class and function, in new memory only where a layer was replaced."""
    net, twin = held.model, make_skeleton("export_dense", held)
    state = net.state_dict()
    values: dict[str, Any] = {}
    dense: dict[Any, Tensor] = {}
    for name, module in twin.named_modules(remove_duplicate=False):
        layer = net.get_submodule(name)
        if isinstance(layer, NetworkLayer):
            padded = getattr(layer, "padding_vector", None) is not None
            key = (weight_key(layer), is_transposed(module), padded)
            if key not in dense:
                with torch.no_grad():
                    weight = layer.weight.detach()
                dense[key] = (weight.mT if is_transposed(module) else weight).contiguous()
            values[f"{name}.weight"] = dense[key]
            if layer.bias is not None:
                values[f"{name}.bias"] = layer.bias.detach()
    values = {key: values.get(key, state.get(key)) for key in twin.state_dict()}
    lacking = sorted(key for key, value in values.items() if value is None)
    if lacking:
        raise ValueError(f"export_dense: {type(net).__name__} must hold the tensors of its class, lacks {lacking[:5]}")
    ties = dict(getattr(twin, "all_tied_weights_keys", None) or {})
    untied = {other: first for other, first in ties.items() if not torch.equal(values[other], values[first])}
    twin.load_state_dict(values, assign=True)
    for other, first in ties.items():
        if other not in untied:
            parent, _, key = other.rpartition(".")
            twin.get_submodule(parent)._parameters[key] = twin.get_parameter(first)
    if untied:
        twin.config.tie_word_embeddings = False
        twin.all_tied_weights_keys = {other: first for other, first in ties.items() if other not in untied}
    twin.generation_config = getattr(net, "generation_config", None)
    return twin
