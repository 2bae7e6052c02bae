"""Geometry of trees of fixed ranks: gauges, tangent vectors, projection, transport, retraction."""

from decompositions.geometry.chain import Chain as Chain
from decompositions.geometry.chain import longest_path as longest_path
from decompositions.geometry.checks import check_geometry as check_geometry
from decompositions.geometry.checks import check_gradient as check_gradient
from decompositions.geometry.derivatives import hessian_vector_product as hessian_vector_product
from decompositions.geometry.derivatives import riemannian_gradient as riemannian_gradient
from decompositions.geometry.gauges import Gauges as Gauges
from decompositions.geometry.gauges import gauges as gauges
from decompositions.geometry.retraction import retract as retract
from decompositions.geometry.tangent import Tangent as Tangent
from decompositions.geometry.tangent import center_gradients as center_gradients
from decompositions.geometry.tangent import dimension as dimension
from decompositions.geometry.tangent import project as project
from decompositions.geometry.tangent import transport as transport
