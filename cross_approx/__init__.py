"""Tensors from few of their entries."""

from cross_approx.maxvol import maxvol as maxvol
from cross_approx.maxvol import rect_maxvol as rect_maxvol
from cross_approx.result import CrossResult as CrossResult
from cross_approx.skeleton import skeleton as skeleton
from cross_approx.tt import tt_cross as tt_cross
