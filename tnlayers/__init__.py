"""Neural-network layers whose weight is a tensor network, and the conversion of whole models."""

from tnlayers.init import random_network as random_network
from tnlayers.linear import Linear as Linear
from tnlayers.rank_change import RankChangeWarning as RankChangeWarning
