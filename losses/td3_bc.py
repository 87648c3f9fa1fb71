"""TD3 with behaviour cloning, for learning from stored data."""

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from .functional.deterministic import cloning_error, value_weight
from .td3 import TD3Loss


class TD3BCLoss(TD3Loss):
    r"""TD3 from stored data alone: its policy is held to the data's actions.

    .. math::
        L_\text{actor} = \mathbb{E}\left[\tfrac{1}{d} \lVert π(s) - a \rVert^2 - λ\, Q_1(s, π(s))\right], \qquad
        λ = \frac{α}{\mathbb{E}\left[|Q_1(s, π(s))|\right]}

    for actions of d dimensions, in ``loss_actor``; ``loss_qvalue`` is that of `TD3Loss`. Also in the output, without
    gradient: the first term of the loss, ``bc_loss``, and λ, ``lmbd``; ``state_action_value_actor`` Q_1(s, π(s)), of
    shape ``[*B]``; ``pred_value``, ``next_state_value`` and ``target_value``, as in `TD3Loss`. The priority
    ``td_error``, shape ``[*B]``, is written to the input; nothing else in it changes.

    λ and ``bc_loss`` are of the whole batch, and with ``reduction="none"`` the latter is a part of every sample's
    ``loss_actor``. Padded steps don't count in them, and samples count by their priority weights.

    The paper normalises the observations, by their mean and standard deviation in the data.

    Args:
        actor_network: the policy π: writes the action.
        qvalue_network: see `TD3Loss`.
        action_spec: see `TD3Loss`.
        bounds: see `TD3Loss`.
        num_qvalue_nets: see `TD3Loss`.
        policy_noise: see `TD3Loss`.
        noise_clip: see `TD3Loss`.
        alpha: α: 0 only imitates the data, a large one is TD3.
        loss_function: see `TD3Loss`.
        delay_actor: see `TD3Loss`.
        delay_qvalue: see `TD3Loss`.
        separate_losses: see `TD3Loss`.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        deactivate_vmap: see `TD3Loss`.
        use_prioritized_weights: see `TD3Loss`.

    Raises:
        TypeError: ``action_spec`` has no bounds; ``gamma`` (see `make_value_estimator`).
        ValueError: both or none of ``bounds`` and ``action_spec``; an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, a value has another shape than the reward, or the policy's action another than the
            data's, or the bounds don't fit it.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> class Value(torch.nn.Linear):
        ...     def forward(self, observation, action):
        ...         return super().forward(torch.cat([observation, action], -1))
        >>> actor = TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["action"])
        >>> value = TensorDictModule(Value(6, 1), ["observation", "action"], ["state_action_value"])
        >>> following = {"observation": torch.randn(8, 4), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> stored = {"observation": torch.randn(8, 4), "action": torch.rand(8, 2), "next": following}
        >>> out = TD3BCLoss(actor, value, bounds=(-1.0, 1.0), alpha=0.0)(TensorDict(stored, [8]))
        >>> bool(out["loss_actor"].isclose(out["bc_loss"]))
        True

    See Fujimoto and Gu 2021, A minimalist approach to offline reinforcement learning (arXiv:2106.06860), equations 3
    and 5.

    """

    def __init__(
        self,
        actor_network: TensorDictModule,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        action_spec: Any = None,
        bounds: Sequence[Any] | None = None,
        num_qvalue_nets: int = 2,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        alpha: float = 2.5,
        loss_function: str = "smooth_l1",
        delay_actor: bool = True,
        delay_qvalue: bool = True,
        separate_losses: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        use_prioritized_weights: bool | str = "auto",
    ) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, but is {alpha}")
        super().__init__(
            actor_network,
            qvalue_network,
            action_spec=action_spec,
            bounds=bounds,
            num_qvalue_nets=num_qvalue_nets,
            policy_noise=policy_noise,
            noise_clip=noise_clip,
            loss_function=loss_function,
            delay_actor=delay_actor,
            delay_qvalue=delay_qvalue,
            separate_losses=separate_losses,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.alpha = alpha
        self.out_keys = [
            "loss_actor", "loss_qvalue", "bc_loss", "lmbd", "pred_value", "state_action_value_actor",
            "next_state_value", "target_value",
        ]  # fmt: skip

    def _policy_terms(self, data: TensorDictBase, tensordict: TensorDictBase) -> dict[str, Tensor]:
        acted = self._with_action(data)
        value = self._first_value(acted, tensordict)
        action, data_action = self._get(acted, "action"), self._get(data, "action")
        self._require_shape(action, "the policy's action", data_action, self.tensor_keys.action)

        error = cloning_error(action, data_action, value.ndim)
        bc_loss = self._reduce_loss(error, tensordict, reduction="mean")
        lmbd = value_weight(self._reduce_loss(value.detach().abs(), tensordict, reduction="mean"), self.alpha)
        return {
            "loss_actor": self._reduce_loss(bc_loss - lmbd * value, tensordict),
            "bc_loss": bc_loss.detach(),
            "lmbd": lmbd,
            "state_action_value_actor": value.detach(),
        }

    def _first_value(self, acted: TensorDictBase, tensordict: TensorDictBase) -> Tensor:
        """Q_1 of the actions in ``acted``, shape ``[*B]``; it is a constant to Q's own parameters."""
        key = self.tensor_keys.state_action_value
        value = self._call("qvalue_network", acted, key, self.qvalue_network_params[0].detach())
        return self._one_per_sample(value, key, tensordict)
