"""Optimizers that train networks: ranks found by the training."""

from tnlayers.optim.models import compact as compact
from tnlayers.optim.rank_adaptive import RankAdaptive as RankAdaptive
from tnlayers.optim.rank_adaptive import RankLimitWarning as RankLimitWarning
