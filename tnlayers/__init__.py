"""Neural-network layers whose weight is a tensor network, and the conversion of whole models."""

from tnlayers.checkpoint import load as load
from tnlayers.checkpoint import save as save
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
from tnlayers.init import random_network as random_network
from tnlayers.layer import NetworkLayer as NetworkLayer
from tnlayers.linear import Linear as Linear
from tnlayers.rank_change import RankChangeWarning as RankChangeWarning
from tnlayers.report import LayerRow as LayerRow
from tnlayers.report import Report as Report
