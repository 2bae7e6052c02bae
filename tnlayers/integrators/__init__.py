"""Integrators of matrix and tensor ODEs on networks of low rank."""

from tnlayers.integrators.fields import DenseField as DenseField
from tnlayers.integrators.fields import Field as Field
from tnlayers.integrators.fields import OperatorField as OperatorField
from tnlayers.integrators.fields import kronecker_sum as kronecker_sum
from tnlayers.integrators.integrate import Solution as Solution
from tnlayers.integrators.integrate import integrate as integrate
