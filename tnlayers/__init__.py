"""Neural-network layers whose weight is a tensor network, and the conversion of whole models."""

import importlib as _importlib
import typing as _typing

from tnlayers.bilinear import Bilinear as Bilinear
from tnlayers.checkpoint import load as load
from tnlayers.checkpoint import save as save
from tnlayers.compile import compile as compile
from tnlayers.contraction_layers import TensorContraction as TensorContraction
from tnlayers.contraction_layers import TensorRegression as TensorRegression
from tnlayers.conv import Conv1d as Conv1d
from tnlayers.conv import Conv2d as Conv2d
from tnlayers.conv import Conv3d as Conv3d
from tnlayers.conv_transpose import ConvTranspose1d as ConvTranspose1d
from tnlayers.conv_transpose import ConvTranspose2d as ConvTranspose2d
from tnlayers.conv_transpose import ConvTranspose3d as ConvTranspose3d
from tnlayers.convert import densify as densify
from tnlayers.convert import summary as summary
from tnlayers.convert import tensorize as tensorize
from tnlayers.embedding import Embedding as Embedding
from tnlayers.embedding_bag import EmbeddingBag as EmbeddingBag
from tnlayers.explain import explain as explain
from tnlayers.freeze import Freeze as Freeze
from tnlayers.freeze import FreezeRow as FreezeRow
from tnlayers.freeze import freeze as freeze
from tnlayers.freeze import thaw as thaw
from tnlayers.hyperbolic_tucker import HyperbolicTucker as HyperbolicTucker
from tnlayers.init import random_network as random_network
from tnlayers.layer import NetworkLayer as NetworkLayer
from tnlayers.linear import Linear as Linear
from tnlayers.optim import CondLR as CondLR
from tnlayers.optim import RankAdaptive as RankAdaptive
from tnlayers.optim import RankLimitWarning as RankLimitWarning
from tnlayers.optim import RiemannianAdam as RiemannianAdam
from tnlayers.optim import RiemannianSGD as RiemannianSGD
from tnlayers.optim import compact as compact
from tnlayers.optim import condition_penalty as condition_penalty
from tnlayers.optim import geoopt_manifold as geoopt_manifold
from tnlayers.parametrize import NetworkWeight as NetworkWeight
from tnlayers.rank_change import RankChangeWarning as RankChangeWarning
from tnlayers.report import LayerRow as LayerRow
from tnlayers.report import Report as Report
from tnlayers.shuffled import Shuffled as Shuffled

if _typing.TYPE_CHECKING:
    from tnlayers.compression.calibration import Calibration as Calibration
    from tnlayers.compression.collect import collect as collect
    from tnlayers.compression.compress import compress as compress
    from tnlayers.compression.problems import Weighed as Weighed
    from tnlayers.compression.problems import weigh as weigh
    from tnlayers.evaluation.evaluate import evaluate as evaluate
    from tnlayers.evaluation.perplexity import perplexity as perplexity
    from tnlayers.pretrained.exported import export_dense as export_dense
    from tnlayers.pretrained.exported import export_two_linear as export_two_linear
    from tnlayers.pretrained.folder import save_folder as save_folder
    from tnlayers.pretrained.model import open_pretrained as open_pretrained
    from tnlayers.recovery import distill as distill
    from tnlayers.recovery import reconstruct as reconstruct
    from tnlayers.texts import read_texts as read_texts

_LATER = {
    "Calibration": "tnlayers.compression.calibration",
    "collect": "tnlayers.compression.collect",
    "compress": "tnlayers.compression.compress",
    "Weighed": "tnlayers.compression.problems",
    "weigh": "tnlayers.compression.problems",
    "evaluate": "tnlayers.evaluation.evaluate",
    "perplexity": "tnlayers.evaluation.perplexity",
    "export_dense": "tnlayers.pretrained.exported",
    "export_two_linear": "tnlayers.pretrained.exported",
    "save_folder": "tnlayers.pretrained.folder",
    "open_pretrained": "tnlayers.pretrained.model",
    "distill": "tnlayers.recovery",
    "reconstruct": "tnlayers.recovery",
    "read_texts": "tnlayers.texts",
}
"""Rooms that are loaded when they are asked for: `import tnlayers` stays near `import torch`."""


def __getattr__(name: str) -> _typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tnlayers' has no attribute {name!r}")
    return getattr(_importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
