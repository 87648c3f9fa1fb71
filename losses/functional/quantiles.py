"""Quantile regression of returns, for ensembles of critics whose atoms are quantiles."""

import torch
from torch import Tensor


def truncated_mixture(atoms: Tensor, drop: int) -> Tensor:
    """The atoms of all critics as one mixture, without its highest, against overestimation.

    Args:
        atoms: shape ``[N, *B, M]``.
        drop: d; N · d atoms are left out.

    Returns:
        The N(M − d) least atoms in ascending order, shape ``[*B, N(M − d)]``.

    Examples:
        >>> truncated_mixture(torch.tensor([[1.0, 5.0], [2.0, 3.0]]), drop=1)
        tensor([1., 2.])

    See Kuznetsov et al. 2020 (arXiv:2005.04269), equation 11.

    """
    critics, each = atoms.shape[0], atoms.shape[-1]
    mixture = atoms.movedim(0, -2).flatten(-2).sort(-1).values
    return mixture[..., : critics * (each - drop)]


def quantile_huber_loss(atoms: Tensor, target: Tensor) -> Tensor:
    r"""Loss whose least value has the atoms at the quantiles τ_m = (2m − 1) / 2M of the targets.

    .. math::
        L = \frac{1}{M} \sum_m \frac{1}{K} \sum_i \left|τ_m - 1[u_{mi} < 0]\right|\,
        \text{Huber}(u_{mi}), \qquad u_{mi} = y_i - θ^m

    with Huber(u) = u²/2 where \|u\| < 1, else \|u\| − 1/2.

    Args:
        atoms: θ, shape ``[*N, *B, M]``.
        target: y, shape ``[*B, K]``, a constant.

    Returns:
        Shape ``[*N, *B]``.

    Examples:
        >>> quantile_huber_loss(torch.tensor([0.0]), torch.tensor([2.0, -1.0]))
        tensor(0.5000)

    See Dabney et al. 2018, Distributional reinforcement learning with quantile regression (arXiv:1710.10044),
    equations 9 and 10.

    """
    count = atoms.shape[-1]
    tau = (torch.arange(count, dtype=atoms.dtype, device=atoms.device) + 0.5) / count
    error = _errors(atoms, target)
    size = error.abs()
    huber = torch.where(size < 1, error.square() / 2, size - 0.5)
    weight = (tau.unsqueeze(-1) - (error.detach() < 0).to(tau.dtype)).abs()
    return (weight * huber).mean((-2, -1))


def mean_atom_distance(atoms: Tensor, target: Tensor) -> Tensor:
    r"""Mean of \|y_i − θ^m\| over all pairs: shapes ``[*N, *B, M]`` and ``[*B, K]`` to ``[*N, *B]``.

    Examples:
        >>> mean_atom_distance(torch.tensor([0.0]), torch.tensor([2.0, -1.0]))
        tensor(1.5000)

    """
    return _errors(atoms, target).abs().mean((-2, -1))


def _errors(atoms: Tensor, target: Tensor) -> Tensor:
    """u_{mi} = y_i − θ^m."""
    return target.unsqueeze(-2) - atoms.unsqueeze(-1)
