"""Integrators of matrix and tensor ODEs on networks of low rank."""

from tnlayers.integrators.fields import DenseField as DenseField
from tnlayers.integrators.fields import Field as Field
from tnlayers.integrators.integrate import Solution as Solution
from tnlayers.integrators.integrate import integrate as integrate
from tnlayers.integrators.operators import KroneckerField as KroneckerField
from tnlayers.integrators.operators import OperatorField as OperatorField
from tnlayers.integrators.operators import kronecker_sum as kronecker_sum
