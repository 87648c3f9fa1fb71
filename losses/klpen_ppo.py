"""Proximal policy optimisation with a penalty on the KL from the old policy, whose coefficient adapts."""

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    dispatch,
)
from torch import Tensor

from ..estimators.calls import distribution_from_parameters
from ..estimators.heads import PolicyDistribution
from .functional import adapted_beta, kl_penalty_objective, masked_mean
from .ppo import Comparison, PPOLoss


class KLPENPPOLoss(PPOLoss):
    r"""PPO with a penalty on the distance from the old policy, and a coefficient β that adapts to it.

    .. math::
        L = -\mathbb{E}_t\left[r_t A_t - β\, \text{KL}\left[π_\text{old}(\cdot|s_t)\,|\,π_θ(\cdot|s_t)\right]\right]
        + \dots

    with the critic's and the entropy's term of `PPOLoss`, whose arguments, outputs and errors it shares. After the
    loss is computed, β is multiplied by ``increment`` if the mean KL is above 1.5 ``dtarg``, and by ``decrement`` if
    it is below ``dtarg`` / 1.5. `reset` puts it back to its start.

    π_old is made from its parameters in the data (``loc`` and ``scale``, say), which therefore are among the
    in_keys. Further output: ``kl``, per sample, shape ``[*B, 1]``.

    Args:
        actor_network: see `PPOLoss`.
        critic_network: see `PPOLoss`.
        dtarg: the KL aimed at.
        beta: β to start with.
        increment: at least 1.
        decrement: at most 1.
        samples_mc_kl: draws from which the KL is estimated where it has no closed form.
        kwargs: see `PPOLoss`.

    Raises:
        ValueError: ``increment`` is below 1 or ``decrement`` above.
        NotImplementedError: the policy has several probabilistic modules, whose distribution can't be made from
            the data; ``delay_actor=True`` doesn't need to.

    See Schulman et al. 2017 (arXiv:1707.06347), section 4.

    """

    _schedulable_buffers = frozenset({"beta"})
    _first_metrics = ("kl",)

    beta: Tensor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None = None,
        *,
        dtarg: float = 0.01,
        beta: float | Tensor = 1.0,
        increment: float = 2.0,
        decrement: float = 0.5,
        samples_mc_kl: int = 1,
        **kwargs: Any,
    ) -> None:
        if not increment >= 1:
            raise ValueError(f"increment is {increment}, but must be at least 1")
        if not 0 <= decrement <= 1:
            raise ValueError(f"decrement is {decrement}, but must be in [0, 1]")
        super().__init__(actor_network, critic_network, **kwargs)
        draws = [m for m in actor_network.modules() if isinstance(m, ProbabilisticTensorDictModule)]
        if len(draws) > 1 and not self.delay_actor:
            raise NotImplementedError(
                f"the policy draws its action in {len(draws)} modules, and the data holds the parameters of the last "
                "one's distribution alone: use delay_actor=True, or one module with a CompositeDistribution"
            )
        self.dtarg = dtarg
        self.increment = increment
        self.decrement = decrement
        self.samples_mc_kl = samples_mc_kl
        self.register_coeff_buffer("beta", beta, device=kwargs.get("device"))
        self._initial_beta = float(beta)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss and its metrics (see the class), for data of batch size ``[*B]``; β adapts."""
        old = None if self.delay_actor else self._old_policy(tensordict)
        new = self._compare(tensordict)
        kl = self._divergence(old, new)
        # A copy, since β changes before the backward pass. As a product, since torch.compile computes a clone anew in
        # the backward pass, from the β that has changed by then.
        beta = self.beta.prod()
        log_weight, _ = self._log_weights(new)
        gain = kl_penalty_objective(log_weight, self._normalized(new), kl, beta)
        objective = self._reduce_loss(-gain, new.tensordict)
        result = self._losses(new, {"loss_objective": objective, "kl": kl.detach()})
        with torch.no_grad():
            mean_kl = masked_mean(kl, new.mask)
            self.beta.copy_(adapted_beta(self.beta, mean_kl, self.dtarg, self.increment, self.decrement))
        return result

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from super()._find_in_keys()
        if not self.delay_actor:
            yield from self.actor_network.dist_params_keys

    def _old_policy(self, tensordict: TensorDictBase) -> PolicyDistribution:
        parameters = self.actor_network.dist_params_keys
        self._require_entries(tensordict, parameters, "it is a parameter of the policy that collected the data")
        filled = self._padding_filled(tensordict, tensordict, dict.fromkeys(parameters, 1.0))
        return distribution_from_parameters(self.actor_network, filled)

    def _divergence(self, old: PolicyDistribution | None, new: Comparison) -> Tensor:
        """KL[π_old | π_θ] at each sample; π_old is the delayed policy if there is one."""
        if old is None:
            with torch.no_grad():
                heads = self._proximal_heads(new.tensordict, new.advantage)
        else:
            heads = new.heads.like(old)
        kl = new.heads.divergence_from(heads, self.samples_mc_kl)
        return self._only_valid(kl, new.tensordict)

    def reset(self) -> None:
        """Put β back to its start."""
        self.beta.fill_(self._initial_beta)
