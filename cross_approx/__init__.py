"""Tensors from few of their entries. So far: dominant submatrices, which cross approximation rests on."""

from cross_approx.maxvol import maxvol as maxvol
