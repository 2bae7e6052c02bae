"""Optimizers that train networks: ranks found by the training, or fixed on their manifold."""

from tnlayers.optim.callbacks import lightning_callback as lightning_callback
from tnlayers.optim.callbacks import trainer_callback as trainer_callback
from tnlayers.optim.conditioned import CondLR as CondLR
from tnlayers.optim.manifolds import geoopt_manifold as geoopt_manifold
from tnlayers.optim.models import compact as compact
from tnlayers.optim.options import RankLimitWarning as RankLimitWarning
from tnlayers.optim.penalty import condition_penalty as condition_penalty
from tnlayers.optim.rank_adaptive import RankAdaptive as RankAdaptive
from tnlayers.optim.riemannian import RiemannianAdam as RiemannianAdam
from tnlayers.optim.riemannian import RiemannianSGD as RiemannianSGD
from tnlayers.optim.shared import SharedRiemannianAdam as SharedRiemannianAdam
from tnlayers.optim.shared import SharedRiemannianSGD as SharedRiemannianSGD
