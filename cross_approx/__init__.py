"""Tensors from few of their entries: sources of entries in memory and out of it, dominant submatrices, and crosses."""

from cross_approx.chunked import ChunkedSource as ChunkedSource
from cross_approx.chunked import ChunkError as ChunkError
from cross_approx.digits import Quantization as Quantization
from cross_approx.maxvol import maxvol as maxvol
from cross_approx.maxvol import rect_maxvol as rect_maxvol
from cross_approx.out_of_core import DaskSource as DaskSource
from cross_approx.out_of_core import FolderSource as FolderSource
from cross_approx.out_of_core import Hdf5Source as Hdf5Source
from cross_approx.out_of_core import SafetensorsSource as SafetensorsSource
from cross_approx.out_of_core import XarraySource as XarraySource
from cross_approx.out_of_core import ZarrSource as ZarrSource
from cross_approx.quantized import qtt_cross as qtt_cross
from cross_approx.result import CrossResult as CrossResult
from cross_approx.skeleton import skeleton as skeleton
from cross_approx.source import Source as Source
from cross_approx.source import as_source as as_source
from cross_approx.tt import tt_cross as tt_cross
from cross_approx.ttm import ttm_cross as ttm_cross
from cross_approx.views import merge_axes as merge_axes
from cross_approx.views import pad_axes as pad_axes
from cross_approx.views import permute_axes as permute_axes
from cross_approx.views import split_axis as split_axis
