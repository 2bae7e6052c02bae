"""Optimizers that train networks: ranks found by the training."""

from tnlayers.optim.callbacks import lightning_callback as lightning_callback
from tnlayers.optim.callbacks import trainer_callback as trainer_callback
from tnlayers.optim.models import compact as compact
from tnlayers.optim.options import RankLimitWarning as RankLimitWarning
from tnlayers.optim.rank_adaptive import RankAdaptive as RankAdaptive
