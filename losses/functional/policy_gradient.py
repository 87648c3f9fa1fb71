"""REINFORCE, A2C and the PPO family: what they maximise, and what they log.

An objective is what the papers maximise, one value per sample; a loss is its negative. Tensors of one call have
one shape ``[*B, 1]`` unless said otherwise. A ``mask`` is bool and broadcastable to that shape: True marks the
samples that count, and what stands at the others is never read into a result.

`ClipPPOLoss` runs its objective, the gradient and what is logged of them as one operator,
`fusedrl.kernels.clip_ppo_loss`; what it computes is `clip_ppo_objective`, `approximate_kl`, `clip_fraction`,
`effective_sample_size` (of all samples together) and `largest_ratio`. Those are here for losses of one's own, and tests
hold the operator to them. Critics learn by `fusedrl.kernels.value_loss`.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from ...kernels.checks import Scalar
from ...kernels.dispatch import as_input
from ...kernels.ppo_problem import SMALLEST_STD

# --- samples that count -----------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor | None = None, dim: int | None = None) -> Tensor:
    """Mean of ``x`` over the samples that count, over all dimensions or ``dim`` alone; 0 where none counts.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([True, True, False]))
        tensor(1.5000)

    """
    if mask is None:
        return x.mean() if dim is None else x.mean(dim)
    mask = mask.expand_as(x)
    kept = torch.where(mask, x, 0)
    # float16 holds the mean of a large batch, but not its sum.
    dtype = torch.promote_types(x.dtype, torch.float32)
    if dim is None:
        return (kept.sum(dtype=dtype) / mask.sum().clamp_min(1)).to(x.dtype)
    return (kept.sum(dim, dtype=dtype) / mask.sum(dim).clamp_min(1)).to(x.dtype)


def fill_padding(x: Tensor, mask: Tensor | None, batch_ndim: int) -> Tensor:
    """``x`` in which the samples that don't count have the mean and the variance of those that do.

    For statistics that can't be told which samples count. The others are set to one standard deviation above and
    below the mean in turn, for each index of the dimensions after the first ``batch_ndim`` by itself. Of an odd number
    the first three are further from it, one on either side, and on it. A single one is set to the mean, and the
    variance is then smaller.

    Examples:
        >>> fill_padding(torch.tensor([1.0, 3.0, 7.0, 8.0]), torch.tensor([True, True, False, False]), 1)
        tensor([1., 3., 3., 1.])

    """
    if mask is None:
        return x
    dims = tuple(range(batch_ndim))
    count = mask.sum(dims, keepdim=True).clamp_min(1)
    mean = torch.where(mask, x, 0).sum(dims, keepdim=True) / count
    std = (torch.where(mask, x - mean, 0).square().sum(dims, keepdim=True) / count).sqrt()
    padding = ~mask
    number, total = padding.flatten(0, batch_ndim - 1).cumsum(0).view(mask.shape), padding.sum(dims, keepdim=True)
    offset = torch.where(number % 2 == 1, std, -std)
    odd = torch.where((number == 3) | (total == 1), 0, 1.5**0.5 * offset)  # its squares add up to 3 variances
    return torch.where(mask, x, mean + torch.where((total % 2 == 1) & (number <= 3), odd, offset))


# --- REINFORCE and A2C ------------------------------------------------------------------------------------------


def policy_gradient_objective(log_prob: Tensor, advantage: Tensor) -> Tensor:
    r"""Likelihood-ratio objective, whose gradient is that of the expected return if A is a constant.

    .. math::
        L_t = A_t \log π_θ(a_t|s_t)

    Args:
        log_prob: log π_θ(a_t|s_t), shape ``[*B, 1]``.
        advantage: A_t, the same shape: a return, less a baseline that doesn't depend on the action.

    Examples:
        >>> policy_gradient_objective(torch.tensor([-0.5, -1.0]), torch.tensor([2.0, -1.0]))
        tensor([-1.,  1.])

    See Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
    https://doi.org/10.1007/BF00992696, section 5.

    """
    return log_prob * advantage


# --- PPO: the objectives ----------------------------------------------------------------------------------------


def ppo_objective(log_weight: Tensor, advantage: Tensor) -> Tensor:
    r"""Importance-weighted advantage, the surrogate of conservative policy iteration.

    .. math::
        L_t = r_t A_t, \qquad \log r_t = \log π_θ(a_t|s_t) - \log π_\text{old}(a_t|s_t)

    Args:
        log_weight: log r_t, shape ``[*B, 1]``.
        advantage: A_t, the same shape.

    Examples:
        >>> ppo_objective(torch.tensor([0.5]).log(), torch.tensor([4.0]))
        tensor([2.])

    See Schulman et al. 2017, Proximal policy optimization algorithms (arXiv:1707.06347), equation 6.

    """
    return log_weight.exp() * advantage


def clip_ppo_objective(
    log_weight: Tensor,
    advantage: Tensor,
    clip_low: Scalar,
    clip_high: Scalar,
    proximal_log_weight: Tensor | None = None,
) -> Tensor:
    r"""Clipped surrogate: no gain is left in moving the policy further than the clip range from the old one.

    .. math::
        L_t = \min\left(r_t A_t,\ \text{clip}(r_t,\ 1 - ε_\text{low},\ 1 + ε_\text{high}) A_t\right)

    The policy that the range is centred on (π_prox) need not be the one that collected the data (π_old). Then

    .. math::
        L_t = \min\left(r_t A_t,\ \text{clip}(p_t,\ 1 - ε_\text{low},\ 1 + ε_\text{high})
        \frac{r_t}{p_t} A_t\right), \qquad \log p_t = \log π_θ(a_t|s_t) - \log π_\text{prox}(a_t|s_t).

    Args:
        log_weight: log r_t, shape ``[*B, 1]``.
        advantage: A_t, the same shape.
        clip_low: ε_low.
        clip_high: ε_high.
        proximal_log_weight: log p_t, the same shape; None (or log r_t itself) where π_prox is π_old.

    Examples:
        >>> ratio = torch.tensor([0.5, 0.5, 1.5, 1.5])
        >>> clip_ppo_objective(ratio.log(), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.2)
        tensor([ 0.5000, -0.8000,  1.2000, -1.5000])

    See Schulman et al. 2017 (arXiv:1707.06347), equation 7; Yu et al. 2025, DAPO (arXiv:2503.14476), equation 10
    for ε_high ≠ ε_low; Hilton et al. 2021, Batch size-invariance for policy optimization (arXiv:2110.00641) for
    π_prox ≠ π_old.

    """
    center = log_weight if proximal_log_weight is None else proximal_log_weight
    proximal_weight = center.detach().exp()
    low, high = 1 - as_input(clip_low, center), 1 + as_input(clip_high, center)
    # One after the other, which may be a number and a tensor.
    clipped_weight = proximal_weight.clamp(min=low).clamp(max=high)
    if center is not log_weight:
        clipped_weight = clipped_weight * (log_weight - center).detach().exp()  # r/p, which holds no gradient
    # The minimum is the clipped one where p is past the end that A pushes it to. It is selected before the exponential,
    # which may overflow: its gradient would be 0 · ∞.
    is_clipped = torch.where(advantage > 0, proximal_weight > high, proximal_weight < low)
    return torch.where(is_clipped, clipped_weight, torch.where(is_clipped, 0, log_weight).exp()) * advantage


def kl_penalty_objective(log_weight: Tensor, advantage: Tensor, kl: Tensor, beta: Scalar) -> Tensor:
    r"""Surrogate with a penalty on the distance from the old policy.

    .. math::
        L_t = r_t A_t - β\, \text{KL}\left[π_\text{old}(\cdot|s_t)\,|\,π_θ(\cdot|s_t)\right]

    Args:
        log_weight: log r_t, shape ``[*B, 1]``.
        advantage: A_t, the same shape.
        kl: the divergence at s_t, the same shape.
        beta: β.

    Examples:
        >>> kl_penalty_objective(torch.zeros(1), torch.tensor([2.0]), torch.tensor([0.5]), 3.0)
        tensor([0.5000])

    See Schulman et al. 2017 (arXiv:1707.06347), equation 8.

    """
    return ppo_objective(log_weight, advantage) - beta * kl


def adapted_beta(beta: Tensor, kl: Tensor, target: float, increment: float, decrement: float) -> Tensor:
    """Coefficient β of the KL penalty for the next step: larger where the policy moved too far, else smaller.

    It is multiplied by ``increment`` where ``kl`` > 1.5 ``target``, by ``decrement`` where ``kl`` < ``target`` / 1.5.

    Examples:
        >>> adapted_beta(torch.tensor(1.0), torch.tensor(0.1), 0.01, 2.0, 0.5)
        tensor(2.)

    See Schulman et al. 2017 (arXiv:1707.06347), section 4.

    """
    # A tensor before the division: of a quotient of numbers PyTorch 2.11 makes a constant of the compiled code.
    target = as_input(target, kl)
    return torch.where(kl > 1.5 * target, beta * increment, torch.where(kl < target / 1.5, beta * decrement, beta))


def weight_excess(log_weight: Tensor, max_ratio: Scalar) -> Tensor:
    r"""How far log r_t exceeds the logarithm of the largest ratio allowed: max(log r_t − log ``max_ratio``, 0).

    Subtracted from log r_t it caps the ratio as if π_old had given the action more probability. It holds no
    gradient, so that a capped sample still moves the policy.

    See Hilton et al. 2021 (arXiv:2110.00641), appendix.

    Examples:
        >>> weight_excess(torch.tensor([2.0, 8.0]).log(), 4.0).exp()
        tensor([1., 2.])

    """
    return (log_weight.detach() - torch.as_tensor(as_input(max_ratio, log_weight)).log()).clamp_min(0)


# --- PPO: the advantage -----------------------------------------------------------------------------------------


def normalize_advantage(
    advantage: Tensor,
    exclude_dims: tuple[int, ...] = (),
    mask: Tensor | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    r"""Advantage with mean 0 and (unbiased) standard deviation 1 over the samples that count.

    .. math::
        \hat A_t = \frac{A_t - \bar A}{\max(σ_A,\ 10^{-6})}

    A single sample has no spread: it stays as it is. So does an advantage all of whose dimensions are excluded.

    Args:
        advantage: A_t, any shape.
        exclude_dims: dimensions along which each index has statistics of its own (agents, objectives).
        mask: the samples that count; the result is 0 at the others.
        group: take the statistics over all ranks of this process group. The shapes of the excluded dimensions
            must agree between ranks, the others needn't. The statistics then hold no gradient.

    Raises:
        ValueError: a dimension of ``exclude_dims`` doesn't exist.

    Examples:
        >>> normalize_advantage(torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.,  0.,  1.])

    """
    ndim = advantage.ndim
    if any(not -ndim <= dim < ndim for dim in exclude_dims):
        raise ValueError(
            f"normalize_advantage_exclude_dims is {tuple(exclude_dims)}, but the advantage has {ndim} dimensions "
            f"(shape {tuple(advantage.shape)})"
        )
    excluded = {dim % ndim for dim in exclude_dims}
    dims = [dim for dim in range(ndim) if dim not in excluded]
    if not dims:
        return advantage
    mask = torch.ones_like(advantage, dtype=torch.bool) if mask is None else mask.expand_as(advantage)
    # float16 holds neither the square of the smallest spread nor the sum of a large batch.
    x = torch.where(mask, advantage, 0).to(torch.promote_types(advantage.dtype, torch.float32))
    count, total = _sum_over_ranks(torch.stack([mask.to(x.dtype).sum(dims, True), x.sum(dims, True)]), group)
    deviation = torch.where(mask, x - total / count.clamp_min(1), 0)
    square = _sum_over_ranks(deviation.square().sum(dims, True), group)
    # The bound is put on the variance: the root's gradient at 0 is infinite.
    std = (square / (count - 1).clamp_min(1)).clamp_min(SMALLEST_STD**2).sqrt()
    return torch.where(count > 1, deviation / std, x).to(advantage.dtype)


def _sum_over_ranks(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    if group is None:
        return x
    x = x.detach()
    dist.all_reduce(x, group=group)
    return x


# --- PPO: what is logged ----------------------------------------------------------------------------------------


def approximate_kl(log_weight: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Estimate of KL[π_old | π_θ] from the old policy's own actions: the mean of −log r_t. A 0-d tensor.

    Unbiased, and negative at times: see Schulman 2020, Approximating KL divergence (estimator k1),
    http://joschu.net/blog/kl-approx.html.
    """
    return masked_mean(-log_weight, mask)


def clip_fraction(log_weight: Tensor, clip_low: Scalar, clip_high: Scalar, mask: Tensor | None = None) -> Tensor:
    """Share of the samples whose ratio lies outside [1 − ε_low, 1 + ε_high]. A 0-d tensor.

    Examples:
        >>> clip_fraction(torch.tensor([0.5, 1.0, 1.1, 1.5]).log(), 0.2, 0.2)
        tensor(0.5000)

    """
    weight = log_weight.exp()
    outside = (weight < 1 - clip_low) | (weight > 1 + clip_high)
    return masked_mean(outside.to(log_weight.dtype), mask)


def effective_sample_size(log_weight: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Share of the samples along dimension 0 that are as good as samples from π_θ itself.

    .. math::
        \frac{1}{N} \frac{\left(\sum_n r_n\right)^2}{\sum_n r_n^2}

    Args:
        log_weight: log r, shape ``[N, *rest]``.
        mask: the samples that count.

    Returns:
        Shape ``[*rest]``, between 1/N and 1; 0 if there are no samples.

    Examples:
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]).log())
        tensor(0.5000)

    See Kong 1992, A note on importance sampling using standardized weights.

    """
    if not log_weight.shape[0]:
        return log_weight.sum(0)
    mask = torch.ones_like(log_weight, dtype=torch.bool) if mask is None else mask.expand_as(log_weight)
    log_weight = torch.where(mask, log_weight, -torch.inf)
    # Relative to the largest weight nothing overflows, and the sum of squares is at least 1.
    weight = torch.where(mask, (log_weight - log_weight.amax(0)).exp(), 0)
    return weight.sum(0).square() / weight.square().sum(0).clamp_min(1) / mask.sum(0).clamp_min(1)


def largest_ratio(log_weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The largest r_t of the samples that count, 0 where none does. A 0-d tensor."""
    if log_weight.numel() == 0:
        return log_weight.new_zeros(())
    ratio = log_weight.exp()
    return (ratio if mask is None else torch.where(mask, ratio, 0)).max()


def explained_variance(value: Tensor, value_target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""How much of the value target's variance along dimension 0 the critic predicts: 1 is all of it.

    .. math::
        1 - \frac{\text{Var}[\hat V - V]}{\text{Var}[\hat V]}

    Args:
        value: V, shape ``[N, *rest]``.
        value_target: V̂, the same shape.
        mask: the samples that count.

    Returns:
        Shape ``[*rest]``.

    Examples:
        >>> explained_variance(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 4.0]))
        tensor(0.)

    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask, dim=0)).square(), mask, dim=0)

    if not value_target.is_floating_point():  # a count, such as of steps
        value_target = value_target.to(value.dtype)
    # A constant target has nothing to explain.
    smallest = torch.finfo(value_target.dtype).eps
    return 1 - variance(value_target - value) / variance(value_target).clamp_min(smallest)
