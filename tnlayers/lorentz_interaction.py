"""The Lorentz interaction of three points (MIG-TF), of one pair with all thirds by one matrix product.

With D(x, y) half the squared Lorentz distance and 0 the origin,

    N(u, t, v) = D(u, t) + D(0, v) - D(u, v) - D(t, v) - D(0, u) - D(0, t),    S = N / (u_0 t_0 + u_0 v_0 + t_0 v_0).

In the flat limit N is `-|u + t - v|^2 / 2`, a translation score. Points are given by their space coordinates, any
numbers; times count from the origin's, `û = u_0 - 1/√c = |u|^2 / (u_0 + 1/√c)`, so that nothing of the size of 1/c, and
no difference of squares, is ever formed:

    N = (u + t)·v - (û + t̂ + 1/√c) v̂ - (û + t̂)/√c + û t̂ - u·t,

which is linear in (v, v̂). `curvature` is the library's, -c the sectional one; the papers' c is 1/curvature. Space
coordinates have the unit of 1/√c; their squares must be numbers, |x| < 1e18 in float32 and 1e153 in float64. Values are
not checked here: these functions run in every step of training.

References:
    MIG-TF, mixed-geometry tensor factorization: arXiv 2504.02589.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tnlayers.dense import exactly


class Curvature(nn.Module):
    """A curvature c > 0: a number, or trained as exp(log_curvature), which stays positive.

    Args:
        curvature: c at the start.
        learn: whether log_curvature () is a Parameter.
        device: of that Parameter.
        dtype: of that Parameter.

    Raises:
        ValueError: not a positive number.

    Example:
        >>> Curvature(0.5)(), [name for name, _ in Curvature(0.5, learn=True).named_parameters()]
        (0.5, ['log_curvature'])
    """

    log_curvature: nn.Parameter | None

    def __init__(
        self,
        curvature: int | float = 1.0,
        learn: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < curvature < math.inf:
            raise ValueError(
                f"Curvature: c must be a positive number (the space has curvature -c), got {curvature}; take 1.0"
            )
        self.start = float(curvature)
        value = torch.tensor(math.log(curvature), device=device, dtype=dtype) if learn else None
        self.log_curvature = None if value is None else nn.Parameter(value)

    def forward(self) -> float | Tensor:
        """The number c, or a tensor () with a gradient where it is trained."""
        return self.start if self.log_curvature is None else self.log_curvature.exp()

    def reset_parameters(self) -> None:
        """Back to the start."""
        if self.log_curvature is not None:
            nn.init.constant_(self.log_curvature, math.log(self.start))

    def extra_repr(self) -> str:
        """The number at the start, and whether it is trained."""
        return f"{self.start:.6g}, learn={self.log_curvature is not None}"


def interaction_query(
    u: Float[Tensor, "*b d"], t: Float[Tensor, "*b d"], curvature: float | Tensor
) -> Float[Tensor, "*b e"]:
    """What N and S of known u and t need to know to meet any v: `[u + t, -(û + t̂ + 1/√c), offset, u_0 t_0, u_0 + t_0]`.

    The offset is `û t̂ - (û + t̂)/√c - u·t`. N and S are symmetric in u and t. Cost: O(d) a row.

    Args:
        u, t: (..., d) space coordinates.
        curvature: c > 0, a number or a tensor ().

    Returns:
        (..., d + 4) for `interaction_scores`.

    Example:
        >>> import torch
        >>> interaction_query(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)
        tensor([[ 0.,  0., -1.,  0.,  1.,  2.]])
    """
    root = curvature**-0.5
    (u_up, u0), (t_up, t0) = _times(u, root), _times(t, root)
    offset = u_up * t_up - root * (u_up + t_up) - (u * t).sum(-1, keepdim=True)
    return torch.cat([u + t, -(u_up + t_up + root), offset, u0 * t0, u0 + t0], -1)


def interaction_inverse_query(
    t: Float[Tensor, "*b d"], v: Float[Tensor, "*b d"], curvature: float | Tensor
) -> Float[Tensor, "*b e"]:
    """The query for known t and v, to be compared with any u (or for known u and v, with any t).

    `[v - t, t̂ - v̂ - 1/√c, t·v - t̂ v̂ - (t̂ + v̂)/√c, t_0 v_0, t_0 + v_0]`: N is linear in (u, û) too. Cost: O(d) a row.

    Args:
        t, v: (..., d) space coordinates.
        curvature: c > 0, a number or a tensor ().

    Returns:
        (..., d + 4) for `interaction_scores`.

    Example:
        >>> import torch
        >>> u, t, v = torch.tensor([[1.0]]), torch.tensor([[0.5]]), torch.tensor([[2.0]])
        >>> here, there = interaction_query(u, t, 1.0), interaction_inverse_query(t, v, 1.0)
        >>> torch.allclose(interaction_scores(here, v, 1.0), interaction_scores(there, u, 1.0))
        True
    """
    root = curvature**-0.5
    (t_up, t0), (v_up, v0) = _times(t, root), _times(v, root)
    offset = (t * v).sum(-1, keepdim=True) - t_up * v_up - root * (t_up + v_up)
    return torch.cat([v - t, t_up - v_up - root, offset, t0 * v0, t0 + v0], -1)


def interaction_scores(
    query: Float[Tensor, "B e"], points: Tensor, curvature: float | Tensor, *, normalized: bool = True
) -> Float[Tensor, "B n"]:
    """S (or N) of every row of a query with every point: one product (B, d + 1) x (d + 1, n), in the points' precision.

    -3 < S < 2, and its error is a few eps (20 at most) whatever the points, as the denominator grows with the
    coordinates of the numerator; that of N grows with their squares. Autocast does not act here.
    Cost: 2 B n (d + 1) FLOPs, and an outer product for S.

    Args:
        query: (B, d + 4), as the query functions make it.
        points: (n, d) space coordinates that all rows share, or (B, k, d) each row's own.
        curvature: c > 0, that of the query.
        normalized: S, else N.

    Returns:
        (B, n), or (B, k).

    Example:
        >>> import torch
        >>> u, t, v = torch.randn(3, 1, 2, dtype=torch.float64)
        >>> flat = interaction_scores(interaction_query(u, t, 1e-12), v, 1e-12, normalized=False)
        >>> torch.allclose(flat, -(u + t - v).square().sum(1) / 2)
        True
    """
    with exactly(points.device):
        query = query.to(points.dtype)
        root, d = curvature**-0.5, points.shape[-1]
        up, time = _times(points, root)
        linear, offset, product, total = query.split([d + 1, 1, 1, 1], -1)
        lifted = torch.cat([points, up], -1)
        if points.ndim > 2:
            numerator, time = (lifted @ linear[..., None])[..., 0] + offset, time[..., 0]
            return numerator / (product + total * time) if normalized else numerator
        numerator = torch.addmm(offset, linear, lifted.mT)
        # the outer sum as a product too: its backward are products, not sums over B x n temporaries
        return numerator / torch.addmm(product, total, time.mT) if normalized else numerator


def _times(x: Tensor, root: float | Tensor) -> tuple[Tensor, Tensor]:
    """x_0 - 1/√c and x_0, for 1/√c = root."""
    square = x.square().sum(-1, keepdim=True)
    time = (square + root**2).sqrt()
    return square / (time + root), time
