"""Truncated quantile critics."""

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor

from .functional.quantiles import mean_atom_distance, quantile_huber_loss, truncated_mixture
from .functional.soft_actor_critic import soft_value, temperature_loss
from .sac import SACLoss
from .soft_actor_critic import QNetworks
from .utils import ValueEstimators


class TQCLoss(SACLoss):
    r"""Soft actor-critic whose critics give quantiles of the return, the highest of which are left out of the target.

    Each of N critics writes M atoms :math:`θ_n^m(s, a)`, its quantiles at :math:`τ_m = (2m - 1) / 2M`. The target
    pools the atoms of all target critics, without the d·N highest,

    .. math::
        y_i = r_t + γ(1 - \text{term}_t) \left(z_{(i)}(s_{t+1}, a') - α \log π(a'|s_{t+1})\right), \qquad
        i = 1, …, N(M - d),

    and each critic regresses to the quantiles of the mixture that is left:

    .. math::
        L_Q &= \sum_n \frac{1}{M} \sum_{m} \frac{1}{N(M-d)} \sum_{i}
            ρ^\text{Huber}_{τ_m}\left(y_i - θ_n^m(s_t, a_t)\right) \\
        L_π &= α \log π(a|s_t) - \frac{1}{NM} \sum_{n, m} θ_n^m(s_t, a) \\
        L_α &= \log α\,\left(-\log π(a|s_t) - \bar H\right)

    The losses are ``loss_actor``, ``loss_qvalue`` and ``loss_alpha``. Also in the output: ``alpha``, and ``entropy``,
    the mean of −log π(a|s_t). The priority of a sample, written to the input as ``td_error``, shape ``[*B]``, is the
    mean of \|y_i − θ_n^m\| of the critic for which it is largest.

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential`` whose action can be differentiated.
        qvalue_network: reads the action and writes atoms, shape ``[*B, M]``, at ``state_action_value``. An ensemble is
            made of it, each member drawn anew; a list of N networks is an ensemble as it is.
        num_qvalue_nets: N.
        top_quantiles_to_drop_per_net: d.
        alpha_init: α at the start.
        min_alpha: the least α.
        max_alpha: the greatest α.
        action_spec: an object with the ``shape`` of an action; by default the policy's.
        fixed_alpha: don't learn α. ``loss_alpha`` then has no gradient.
        target_entropy: H̄. ``"auto"``: minus the number of the action's dimensions.
        delay_qvalue: have target critics; otherwise the targets are the critics' own.
        separate_losses: parameters that the policy shares with the critics are trained by the policy's loss only.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        deactivate_vmap: call the critics one by one.
        skip_done_states: changes nothing, see `SACLoss`.
        use_prioritized_weights: False leaves the importance weights in the data unread.
        scalar_output_mode: see `SACLoss`.

    Raises:
        TypeError: a policy without a distribution; on call, one whose action can't be differentiated.
        ValueError: an argument that can't be used.
        RuntimeError: see `SACLoss`; on call, the critics write no more atoms than are dropped.
        KeyError: on call, an entry is missing; the message says how to rename it.

    See Kuznetsov et al. 2020, Controlling overestimation bias with truncated mixture of continuous distributional
    quantile critics (arXiv:2005.04269), section 3.

    """

    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0,)

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: QNetworks,
        *,
        num_qvalue_nets: int = 5,
        top_quantiles_to_drop_per_net: int = 2,
        alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        action_spec: Any = None,
        fixed_alpha: bool = False,
        target_entropy: str | float | Tensor = "auto",
        delay_qvalue: bool = True,
        separate_losses: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        skip_done_states: bool = False,
        use_prioritized_weights: str | bool = "auto",
        scalar_output_mode: str | None = None,
    ) -> None:
        if top_quantiles_to_drop_per_net < 0:
            raise ValueError(f"top_quantiles_to_drop_per_net must be 0 or more, but is {top_quantiles_to_drop_per_net}")
        super().__init__(
            actor_network,
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            alpha_init=alpha_init,
            min_alpha=min_alpha,
            max_alpha=max_alpha,
            action_spec=action_spec,
            fixed_alpha=fixed_alpha,
            target_entropy=target_entropy,
            delay_qvalue=delay_qvalue,
            separate_losses=separate_losses,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            skip_done_states=skip_done_states,
            use_prioritized_weights=use_prioritized_weights,
            scalar_output_mode=scalar_output_mode,
        )
        self.top_quantiles_to_drop_per_net = top_quantiles_to_drop_per_net

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and metrics (see the class), for transitions of batch size ``[*B]``."""
        data, next_data = self._transitions(
            tensordict, ["qvalue_network", "actor_network"], ["actor_network", "qvalue_network"]
        )
        alpha = self._bounded_alpha()
        with torch.no_grad():
            judged, next_log_prob = self._draw(self._policy(next_data, target=True), next_data, tensordict)
            next_atoms = truncated_mixture(
                self._atoms(judged, tensordict, target=True), self.top_quantiles_to_drop_per_net
            )
            next_value = soft_value(next_atoms, next_log_prob.unsqueeze(-1), alpha)
            target = self._atom_targets(tensordict, next_value)
        atoms = self._atoms(data, tensordict)
        judged, log_prob = self._draw(self._policy(data), data, tensordict)
        value = self._atoms(judged, tensordict, detach=True).mean((0, -1))

        losses = {
            "loss_actor": -soft_value(value, log_prob, alpha),
            "loss_qvalue": quantile_huber_loss(atoms, target).sum(0),
            "loss_alpha": temperature_loss(-log_prob, self.log_alpha, self.target_entropy),
        }
        losses = {name: self._reduce_loss(loss, tensordict) for name, loss in losses.items()}
        result = self._result(losses, alpha, self._metric(-log_prob, tensordict))
        self._write_priority(tensordict, mean_atom_distance(atoms.detach(), target).amax(0))
        return result

    def _atoms(self, data: TensorDictBase, tensordict: TensorDictBase, **options: Any) -> Tensor:
        """θ_n(s, a) of the actions in ``data``, shape ``[N, *B, M]``; see `_ensemble` for the options."""
        key = self.tensor_keys.state_action_value
        atoms = self._ensemble("qvalue_network", data, key, **options)
        reward = self._get(tensordict, "reward")
        if atoms.shape[1:-1] != reward.shape[:-1]:
            raise RuntimeError(
                f"{type(self).__name__}: {key!r} has shape {tuple(atoms.shape[1:])}, but {self._keys('reward')[0]!r} "
                f"has shape {tuple(reward.shape)}: [*batch, atoms] and [*batch, 1] are wanted"
            )
        if atoms.shape[-1] <= self.top_quantiles_to_drop_per_net:
            raise RuntimeError(
                f"{type(self).__name__}: top_quantiles_to_drop_per_net is {self.top_quantiles_to_drop_per_net}, but "
                f"the critics write {atoms.shape[-1]} atoms: none is left"
            )
        return atoms

    def _atom_targets(self, tensordict: TensorDictBase, next_atoms: Tensor) -> Tensor:
        """The target of each next atom, shape ``[*B, K]``: one-step estimates, of all atoms at once."""
        read = [key for name in ("reward", "done", "terminated") for key in self._keys(name)]
        n_steps = self.value_estimator.tensor_keys.steps_to_next_obs
        step = tensordict.select(*read, n_steps, *self._mask_keys(), strict=False)
        each = step.expand(next_atoms.shape[-1], *step.batch_size)
        return self._value_target(each, next_atoms.movedim(-1, 0)).movedim(0, -1)
