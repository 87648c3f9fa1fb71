"""Model-based policy search with Gaussian beliefs about the state."""

import torch
from torch import Tensor

from ...kernels.dtypes import full_precision


def saturating_cost(mean: Tensor, covariance: Tensor, target: Tensor | None, weights: Tensor | None) -> Tensor:
    r"""Expected cost of a state that is known up to a Gaussian: 0 at the target, 1 far from it.

    .. math::
        \mathbb{E}_x\left[1 - \exp\left(-\tfrac12 (x - x^*)^\top W (x - x^*)\right)\right]
        = 1 - \frac{\exp\left(-\tfrac12 (m - x^*)^\top W (I + SW)^{-1} (m - x^*)\right)}{\sqrt{\det(I + SW)}},
        \qquad x \sim \mathcal{N}(m, S)

    Args:
        mean: m, shape ``[*B, F]``.
        covariance: S, shape ``[*B, F, F]``.
        target: x*, shape ``[F]``. None: the origin.
        weights: W, positive semidefinite, shape ``[F, F]``. None: the identity.

    Returns:
        Shape ``[*B]``; computed in float32 at least.

    Examples:
        >>> saturating_cost(torch.zeros(1, 1), torch.tensor([[[3.0]]]), None, None)  # 1 - 1 / sqrt(4)
        tensor([0.5000])

    See Deisenroth & Rasmussen 2011, PILCO: a model-based and data-efficient approach to policy search, ICML,
    equations 24 and 25.

    """
    dtype = torch.promote_types(mean.dtype, torch.float32)  # there is no linear algebra for less
    m, s = mean.to(dtype), covariance.to(dtype)
    identity = torch.eye(m.shape[-1], dtype=dtype, device=m.device)
    w = identity if weights is None else weights.to(identity)
    distance = m if target is None else m - target.to(m)
    with full_precision(m):
        spread = identity + s @ w
        # Neither checks that it can be solved, which on a GPU would wait for it.
        solved = torch.linalg.solve_ex(spread, distance.unsqueeze(-1)).result
        quadratic = ((distance.unsqueeze(-2) @ w) @ solved).squeeze(-1).squeeze(-1)
        cost = 1 - torch.exp(-0.5 * (quadratic + torch.linalg.slogdet(spread).logabsdet))
    return cost.to(mean.dtype)
