"""Recovery after compression: blocks fitted to those of the original, or the whole model distilled from it."""

from tnlayers.recovery.blocks import reconstruct as reconstruct
from tnlayers.recovery.capture import find_blocks as find_blocks
from tnlayers.recovery.distillation import distill as distill
from tnlayers.recovery.least_squares import LeastSquares as LeastSquares
from tnlayers.recovery.least_squares import solve_linear as solve_linear
from tnlayers.recovery.result import BlockRow as BlockRow
from tnlayers.recovery.result import Moment as Moment
from tnlayers.recovery.result import Recovery as Recovery
from tnlayers.recovery.result import RecoveryWarning as RecoveryWarning
