"""The table of schemes: a later one needs a row here."""

from collections.abc import Callable

from decompositions import Network
from tnlayers.integrators.bug import augmented, bug, corrected, midpoint
from tnlayers.integrators.parallel import parallel, parallel2
from tnlayers.integrators.splitting import splitting
from tnlayers.integrators.steps import Stepper

SCHEMES: dict[str, Callable[[Stepper, Network, float, float], Network]] = {
    "splitting": splitting,
    "strang": lambda step, net, t, h: splitting(step, net, t, h, symmetric=True),
    "bug": bug,
    "augmented": augmented,
    "midpoint": midpoint,
    "parallel": parallel,
    "parallel2": parallel2,
    "corrected": corrected,
}

ORDERS = {
    "splitting": 1,
    "strang": 2,
    "bug": 1,
    "augmented": 1,
    "midpoint": 2,
    "parallel": 1,
    "parallel2": 2,
    "corrected": 1,
}
FIXED = ("splitting", "strang", "bug")
"""Schemes that keep the ranks of the start."""
