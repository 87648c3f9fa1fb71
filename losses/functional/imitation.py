"""Learning from demonstrations: behaviour cloning, adversarial imitation, action chunks."""

import torch
from torch import Tensor
from torch.nn import functional as F


def classification_loss(logits: Tensor, action: Tensor) -> Tensor:
    r"""Cross-entropy of a discrete action, :math:`-\log \text{softmax}(z)_a`.

    Args:
        logits: z, shape ``[*B, K]``.
        action: the index of the action, integers of shape ``[*B]`` or ``[*B, 1]``; or its probabilities (such as a
            one-hot vector), shape ``[*B, K]``.

    Returns:
        Shape ``[*B]``.

    Raises:
        RuntimeError: the shapes don't agree.

    Examples:
        >>> classification_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])

    """
    log_prob = logits.log_softmax(-1)
    if action.shape == logits.shape:
        return -(action * log_prob).sum(-1)
    index = action.unsqueeze(-1) if action.ndim == logits.ndim - 1 else action
    if index.is_floating_point() or index.shape != (*logits.shape[:-1], 1):
        raise RuntimeError(
            f"the action has shape {tuple(action.shape)} and dtype {action.dtype}, but the logits have shape "
            f"{tuple(logits.shape)}: it must be one index for each sample, or have a probability for each logit"
        )
    return -log_prob.gather(-1, index.long()).squeeze(-1)


def discriminator_loss(expert: Tensor, collector: Tensor) -> Tensor:
    r"""What a discriminator minimises, one value per pair of samples.

    .. math::
        L = -\log D(s^E, a^E) - \log\left(1 - D(s, a)\right)

    A logarithm is never below −100, so that a certain discriminator has a finite loss.

    Args:
        expert: D of what the expert did, the probability that it was the expert, any shape.
        collector: D of what the policy did, the same shape.

    Examples:
        >>> discriminator_loss(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0]))
        tensor([1.3863, 0.0000])

    See Ho & Ermon 2016, Generative adversarial imitation learning (arXiv:1606.03476), equation 17.

    """
    ones, zeros = torch.ones_like(expert), torch.zeros_like(collector)
    of_expert = F.binary_cross_entropy(expert, ones, reduction="none")
    return of_expert + F.binary_cross_entropy(collector, zeros, reduction="none")


def gradient_penalty(gradients: Tensor) -> Tensor:
    r"""How far a discriminator is from slope 1, :math:`(‖∇_x D(x)‖_2 - 1)^2`.

    Args:
        gradients: ∇D, shape ``[*B, F]``.

    Returns:
        Shape ``[*B, 1]``.

    Examples:
        >>> gradient_penalty(torch.tensor([[3.0, 4.0]]))
        tensor([[16.]])

    See Gulrajani et al. 2017, Improved training of Wasserstein GANs (arXiv:1704.00028), equation 3.

    """
    return (gradients.norm(dim=-1, keepdim=True) - 1).square()


def standard_normal_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    r"""KL[N(μ, σ²) | N(0, 1)] of independent dimensions, :math:`\frac12 \sum_i (μ_i^2 + σ_i^2 - 1 - \log σ_i^2)`.

    Args:
        mu: μ, shape ``[*B, F]``.
        log_var: log σ², the same shape.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> standard_normal_divergence(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
        tensor([0.5000])

    See Kingma & Welling 2014, Auto-encoding variational Bayes (arXiv:1312.6114), appendix B.

    """
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(-1)
