"""What the layers of a model saw: factors of their inputs and of the gradients at their outputs, in one file."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Inexact
from torch import Tensor

from decompositions import ActivationFactor
from decompositions.linalg import accumulate_dtype
from tnlayers.files import atomic_target

Mode = Literal["factor", "diagonal", "none"]
MODES = ("factor", "diagonal", "none")
PARTS = ("inputs", "outputs", "gradients")
KIND = "tnlayers calibration"
VERSION = 1


class Statistic(Protocol):
    """What `ActivationFactor` and its cheaper relatives have in common."""

    features: int
    count: int

    def update(self, x: Any, mask: Any = None) -> None:
        """Add rows."""

    def merge(self, other: Any) -> None:
        """Add what another one has seen."""

    def state(self) -> dict[str, Tensor]:
        """Plain tensors."""


class ActivationScale:
    """Sums of squares and of magnitudes of activations, a number a feature: what diagonal weightings need.

    Args:
        features: n.

    Example:
        >>> held = ActivationScale(2)
        >>> held.update(torch.tensor([[3.0, -1.0], [4.0, 1.0]]))
        >>> held.squares.tolist(), held.magnitudes.tolist(), held.count
        ([25.0, 2.0], [7.0, 2.0], 2)
    """

    def __init__(self, features: int) -> None:
        self.features, self.count = features, 0
        self.squares: Tensor = torch.zeros(features, dtype=torch.float64)
        self.magnitudes: Tensor = torch.zeros(features, dtype=torch.float64)

    def update(self, x: Inexact[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add activations (..., n); `mask` (...) says which count.

        Raises:
            ValueError: NaN or infinity; nothing was added then.
        """
        rows = x.detach().reshape(-1, self.features) if mask is None else x.detach()[mask.to(x.device)]
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("ActivationScale.update: activations must be finite, got NaN or infinity")
        rows = rows.abs().double()
        self.count += len(rows)
        self.squares = self.squares + rows.square().sum(0).cpu()
        self.magnitudes = self.magnitudes + rows.sum(0).cpu()

    def merge(self, other: "ActivationScale") -> None:
        """Add what another one has seen."""
        self.count += other.count
        self.squares = self.squares + other.squares
        self.magnitudes = self.magnitudes + other.magnitudes

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, from which `from_state` goes on."""
        return {"squares": self.squares, "magnitudes": self.magnitudes, "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "ActivationScale":
        """Inverse of `state`."""
        made = cls(len(state["squares"]))
        made.squares, made.magnitudes, made.count = state["squares"], state["magnitudes"], int(state["count"])
        return made


class Uses:
    """How often every row of a table was picked.

    Args:
        features: rows of the table.

    Example:
        >>> held = Uses(3)
        >>> held.add(torch.tensor([0.0, 3.0, 1.0]))
        >>> held.smoothed.tolist()
        [1.0, 2.25, 0.75]
    """

    def __init__(self, features: int) -> None:
        self.features, self.count = features, 0
        self.counts: Tensor = torch.zeros(features, dtype=torch.float64)

    def add(self, counts: Inexact[Tensor, "rows"]) -> None:
        """Add uses, (rows,)."""
        self.counts = self.counts + counts.double().cpu()
        self.count = int(self.counts.sum())

    def merge(self, other: "Uses") -> None:
        """Add what another one has seen."""
        self.add(other.counts)

    @property
    def smoothed(self) -> Tensor:
        """Uses with those expected of rows that were never picked.

        Their share is that of the rows picked once (Good and Turing), spread evenly over them; a table whose every use
        was of another row counts half.

        References:
            I. J. Good, The population frequencies of species and the estimation of population parameters, Biometrika
            1953.
        """
        unseen = self.counts == 0
        if not bool(unseen.any()) or self.count == 0:
            return self.counts if self.count else torch.ones_like(self.counts)
        share = min(0.5, max(1, int((self.counts == 1).sum())) / self.count)
        return torch.where(unseen, share * self.count / int(unseen.sum()), self.counts * (1 - share))

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, from which `from_state` goes on."""
        return {"uses": self.counts}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Uses":
        """Inverse of `state`."""
        made = cls(len(state["uses"]))
        made.add(state["uses"])
        return made


def _alike(one: Any, other: Any) -> bool:
    """Whether two statistics are of one kind and width."""
    return type(one) is type(other) and bool(one.features == other.features)


class GradientGram:
    """Gram matrix of the gradients at a layer's outputs, `G^H G`, in double precision.

    Unlike inputs, gradients weigh errors under a ridge of a tenth of their mean square (`WeightedSpectrum`): here
    the squared condition number of a Gram matrix does no harm, and its products cost a third of a streaming QR.

    Args:
        features: m.
        dtype: of products and of `factor`.

    Example:
        >>> g = torch.randn(50, 3, dtype=torch.float64)
        >>> held = GradientGram(3, dtype=torch.float64)
        >>> held.update(g)
        >>> torch.allclose(held.factor.T @ held.factor, g.T @ g), held.count
        (True, 50)
    """

    def __init__(
        self, features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        self.features, self.count = features, 0
        self.dtype: torch.dtype = accumulate_dtype(dtype)
        self.gram: Tensor = torch.zeros(
            features, features, dtype=torch.promote_types(self.dtype, torch.float64), device=device
        )

    def update(self, x: Inexact[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add gradients (..., m); `mask` (...) says which count.

        Raises:
            ValueError: NaN or infinity; nothing was added then.
        """
        x = x.detach()
        rows = x.reshape(-1, self.features) if mask is None else x[mask.to(x.device)]
        rows = rows.to(device=self.gram.device, dtype=self.dtype)
        largest = float(rows.abs().max()) if rows.numel() else 0.0
        if not isfinite(largest):
            raise ValueError("GradientGram.update: gradients must be finite, got NaN or infinity")
        self.count += len(rows)
        if largest > 0:  # squares of small numbers stay in range
            rows = rows / largest
            self.gram = self.gram + (rows.mH @ rows).to(self.gram) * largest**2

    def merge(self, other: "GradientGram") -> None:
        """Add what another one has seen."""
        self.count += other.count
        self.gram = self.gram + other.gram.to(self.gram)

    @property
    def factor(self) -> Tensor:
        """Upper triangle L with `L^H L = G^H G + eps I`, eps what the products' rounding asks for."""
        size = float(self.gram.diagonal().real.mean())
        if size == 0:
            return torch.zeros_like(self.gram, dtype=self.dtype)
        eye = torch.eye(self.features, dtype=self.gram.dtype, device=self.gram.device)
        eps = 4 * torch.finfo(self.dtype).eps * self.features
        while True:  # ends: a diagonal beyond the sum of the eigenvalues is dominant
            lower, failed = torch.linalg.cholesky_ex(self.gram / size + eps * eye)
            if not int(failed):
                return (lower.mH * sqrt(size)).to(self.dtype)
            eps *= 10

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, from which `from_state` goes on."""
        return {"gram": self.gram, "count": torch.tensor(self.count), "like": torch.zeros(0, dtype=self.dtype)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "GradientGram":
        """Inverse of `state`."""
        made = cls(len(state["gram"]), dtype=state["like"].dtype, device=state["gram"].device)
        made.gram, made.count = state["gram"], int(state["count"])
        return made


def statistic_of(state: Mapping[str, Tensor]) -> Any:
    """Whatever these tensors are the state of."""
    if "uses" in state:
        return Uses.from_state(state)
    if "gram" in state:
        return GradientGram.from_state(state)
    return ActivationScale.from_state(state) if "squares" in state else ActivationFactor.from_state(dict(state))


@dataclass
class LayerStatistics:
    """What one layer saw.

    Args:
        kind: "matrix", "kernel", "table", or "" where only that the layer exists is known.
        inputs: of the rows that its weight is multiplied with; `Uses` for a table, in every mode; else None in mode
            "none", and where the layer was not called.
        outputs: factor of its outputs, if asked for.
        gradients: of the gradients at its outputs, if asked for (`GradientGram`).
        tokens: rows that it saw, padding left out.

    Example:
        >>> LayerStatistics("matrix").tokens
        0
    """

    kind: str
    inputs: Any = None
    outputs: Any = None
    gradients: Any = None
    tokens: int = 0

    def parts(self) -> Iterator[tuple[str, Any]]:
        """The statistics there are, by name."""
        for name in PARTS:
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


@dataclass
class Calibration:
    """What `collect` found; every later compression of the model, at any size, needs no more than this.

    Layers that were handed the same tensor (queries, keys and values) share one factor.

    Args:
        mode: of the inputs: "factor", "diagonal" or "none".
        layers: by name.
        batches: seen.
        power: expected square of what the gradients belong to, summed over all that was seen (`‖z‖^2`, the number of
            labels, or of batches for a loss); 0 without gradients.
        source: of the data, in the caller's words.

    Example:
        >>> import tempfile, tnlayers
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> held = tnlayers.collect(model, [torch.randn(10, 3) for _ in range(2)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = held.save(f"{folder}/calibration.safetensors")
        ...     again = Calibration.load(file)
        >>> again.layers["2"].inputs.factor.shape, again.layers["2"].tokens
        (torch.Size([4, 4]), 20)
    """

    mode: Mode = "factor"
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    batches: int = 0
    power: float = 0.0
    source: str = ""

    @property
    def has_gradients(self) -> bool:
        """Whether gradients were collected."""
        return any(layer.gradients is not None for layer in self.layers.values())

    def __str__(self) -> str:
        lines = [f"calibration: {len(self.layers)} layers, {self.batches} batches, mode {self.mode}"]
        for name, layer in self.layers.items():
            held = ", ".join(f"{part} {value.features}" for part, value in layer.parts()) or "nothing"
            lines.append(f"  {name or '(model)'}: {layer.kind or 'not weighted'}, {layer.tokens:,} tokens, {held}")
        return "\n".join(lines)

    def merge(self, other: "Calibration") -> None:
        """Add what another worker, or another run over other data, has seen; layers may be known to one side alone.

        Raises:
            ValueError: another mode, other layers, or other statistics of a layer that both have seen.
        """
        if other.mode != self.mode or other.layers.keys() != self.layers.keys():
            raise ValueError(
                f"Calibration.merge: both must be of the same layers and mode, expected {self.mode!r} and "
                f"{len(self.layers)} layers, got {other.mode!r} and {len(other.layers)}"
            )
        for name, layer in self.layers.items():
            own, others = dict(layer.parts()), dict(other.layers[name].parts())
            seen = bool(layer.tokens and other.layers[name].tokens)
            same = [own.get(p) is None or others.get(p) is None or _alike(own[p], others[p]) for p in PARTS]
            if not all(same) or (seen and own.keys() != others.keys()):
                raise ValueError(f"Calibration.merge: {name!r} must have the same statistics, got others")
        merged: dict[tuple[int, int], Any] = {}
        for name, layer in self.layers.items():
            for part in PARTS:
                mine, theirs = getattr(layer, part), getattr(other.layers[name], part)
                key = id(mine), id(theirs)  # shared here and there: added once
                if key not in merged:
                    merged[key] = copy.deepcopy(theirs if mine is None else mine)
                    if mine is not None and theirs is not None:
                        merged[key].merge(theirs)
                setattr(layer, part, merged[key])
            layer.tokens += other.layers[name].tokens
        self.batches += other.batches
        self.power += other.power

    def gather(self, group: Any = None) -> None:
        """Merge the calibrations of all workers, in the order of their ranks: every worker then holds the same bits.

        Every worker of the process group calls it, after `collect` over batches of its own.
        """
        import torch.distributed as dist

        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, self.state(), group=group)
        whole = Calibration.from_state(*gathered[0])
        for state in gathered[1:]:
            whole.merge(Calibration.from_state(*state))
        self.layers, self.batches, self.power = whole.layers, whole.batches, whole.power

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and what JSON can hold."""
        tensors: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        rows: dict[str, Any] = {}
        for number, (name, layer) in enumerate(self.layers.items()):
            parts = {}
            for part, value in layer.parts():
                key = owners.setdefault(id(value), f"{number}.{part}")
                parts[part] = key
                if key == f"{number}.{part}":
                    tensors |= {f"{key}.{what}": t.detach().cpu().contiguous() for what, t in value.state().items()}
            rows[name] = {"kind": layer.kind, "tokens": layer.tokens, "parts": parts}
        head = {"kind": KIND, "version": VERSION, "mode": self.mode, "batches": self.batches, "power": self.power}
        head["source"] = self.source
        return tensors, head | {"layers": rows}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> "Calibration":
        """Inverse of `state`."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            key, _, what = name.rpartition(".")
            states.setdefault(key, {})[what] = tensor
        made = {key: statistic_of(state) for key, state in states.items()}
        layers = {
            name: LayerStatistics(
                row["kind"], tokens=int(row["tokens"]), **{part: made[key] for part, key in row["parts"].items()}
            )
            for name, row in head["layers"].items()
        }
        return cls(head["mode"], layers, int(head["batches"]), float(head["power"]), head.get("source", ""))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whole or not at all.

        Raises:
            ValueError: a folder that does not exist.
        """
        from safetensors.torch import save_file

        file = Path(path)
        if not file.parent.is_dir() or file.is_dir():
            raise ValueError(f"Calibration.save: expected a file name in a folder that exists, got {str(path)!r}")
        tensors, head = self.state()
        with atomic_target(file) as temporary:
            save_file(tensors or {"none": torch.zeros(0)}, temporary, metadata={"tnlayers": json.dumps(head)})
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> "Calibration":
        """Read what `save` wrote; no code of the file is run.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, or one of another kind or version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"Calibration.load: expected a file that collect or save wrote, got {str(path)!r}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as handle:
                head = json.loads((handle.metadata() or {}).get("tnlayers", "{}"))
                tensors = {name: handle.get_tensor(name) for name in handle.keys() if name != "none"}  # noqa: SIM118
            if not isinstance(head, dict) or head.get("kind") != KIND or head.get("version") != VERSION:
                raise ValueError(f"expected a {KIND} of version {VERSION}")
            return cls.from_state(tensors, head)
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Calibration.load: {str(path)!r} cannot be read ({error}); collect again") from None
