"""Implicit Q-learning of discrete actions."""

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor

from .action_space import find_action_space
from .iql import IQLLoss


class DiscreteIQLLoss(IQLLoss):
    r"""Implicit Q-learning whose networks Q give the values of all actions at once.

    .. math::
        L_\text{value} &= \mathbb{E}\left[|τ - 1(A < 0)| A^2\right], \qquad A = \min_i \bar Q_i(s)_a - V(s) \\
        L_\text{qvalue} &= \mathbb{E}\left[\sum_i d(Q_i(s)_a, r + γ(1 - \text{term}) V(s'))\right] \\
        L_\text{actor} &= -\mathbb{E}\left[\min\left(e^{β A}, 100\right) \log π(a|s)\right]

    where Q(s)_a is the value of the data's action a, the only one that is ever read. The losses, ``entropy`` and the
    priority are those of `IQLLoss`.

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential``.
        qvalue_network: Q: writes the values of all actions, shape ``[*B, A]``, in ``state_action_value``. It is
            multiplied (drawn anew) to ``num_qvalue_nets`` networks; a list of so many is taken as it is.
        value_network: V: writes ``state_value``.
        action_space: how the actions in the data are written: ``"one-hot"`` (None), ``"categorical"``, or a spec of
            one of these (see `action_space.find_action_space`).
        num_qvalue_nets: see `IQLLoss`.
        loss_function: see `IQLLoss`.
        temperature: see `IQLLoss`.
        expectile: see `IQLLoss`.
        separate_losses: see `IQLLoss`.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        scalar_output_mode: see `IQLLoss`.
        use_prioritized_weights: see `IQLLoss`.

    Raises:
        TypeError: a network is missing; ``gamma`` (see `make_value_estimator`).
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the shapes of values, action, log-probability and reward don't fit.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Sampler
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(torch.nn.Linear(4, 3), ["observation"], ["logits"]),
        ...     Sampler(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
        ... )
        >>> qvalue = TensorDictModule(torch.nn.Linear(4, 3), ["observation"], ["state_action_value"])
        >>> value = TensorDictModule(torch.nn.Linear(4, 1), ["observation"], ["state_value"])
        >>> following = {"observation": torch.randn(8, 4), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> stored = {"observation": torch.randn(8, 4), "action": torch.ones(8).long(), "next": following}
        >>> loss = DiscreteIQLLoss(actor, qvalue, value, action_space="categorical")
        >>> sorted(loss(TensorDict(stored, [8])).keys())
        ['entropy', 'loss_actor', 'loss_qvalue', 'loss_value']

    See Kostrikov et al. 2021, Offline reinforcement learning with implicit Q-learning (arXiv:2110.06169).

    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        value_network: TensorDictModule,
        *,
        action_space: Any = None,
        num_qvalue_nets: int = 2,
        loss_function: str = "smooth_l1",
        temperature: float = 1.0,
        expectile: float = 0.5,
        separate_losses: bool = False,
        reduction: str | None = None,
        scalar_output_mode: str | None = None,
        use_prioritized_weights: bool | str = "auto",
    ) -> None:
        super().__init__(
            actor_network,
            qvalue_network,
            value_network,
            num_qvalue_nets=num_qvalue_nets,
            loss_function=loss_function,
            temperature=temperature,
            expectile=expectile,
            separate_losses=separate_losses,
            reduction=reduction,
            scalar_output_mode=scalar_output_mode,
            use_prioritized_weights=use_prioritized_weights,
        )
        self._actions = find_action_space("one_hot" if action_space is None else action_space, one_choice=True)

    @property
    def action_space(self) -> str:
        """How actions are written: ``one_hot`` or ``categorical``."""
        return self._actions.name

    def _taken_action(self, tensordict: TensorDictBase, key: NestedKey | None = None) -> Tensor:
        """The data's action: its index, shape ``[*B]``, or one-hot, shape ``[*B, A]``; padded steps have the first.

        Raises:
            RuntimeError: it has another shape.

        """
        action, shape = self._get(tensordict, "action"), self._get(tensordict, "reward").shape
        index = self.action_space == "categorical"
        if index:
            fits, wanted = action.shape in (shape, shape[:-1]), "one index"
            action = action.squeeze(-1) if action.shape == shape else action
        else:
            fits, wanted = action.shape[:-1] == shape[:-1], "one vector"
        if not fits:
            raise RuntimeError(
                f"{type(self).__name__}: {self.tensor_keys.action!r} ({self.action_space}) has shape "
                f"{tuple(action.shape)}, but {self._keys('reward')[0]!r} has shape {tuple(shape)}: {wanted} per sample "
                "is wanted"
            )
        valid = self._mask(tensordict, action)
        if valid is None:
            return action
        first = 0 if index else (torch.arange(action.shape[-1], device=action.device) == 0).to(action.dtype)
        return torch.where(valid, action, first)

    def _ensemble_values(
        self, data: TensorDictBase, tensordict: TensorDictBase, *, target: bool = False, **options: Any
    ) -> Tensor:
        """Q_i(s)_a of the actions in ``data``, shape ``[N, *B]``."""
        key = self.tensor_keys.state_action_value
        values = self._ensemble("qvalue_network", data, key, target=target, **options)
        action = self._taken_action(tensordict)
        return self._actions.value(values, action.expand(len(values), *action.shape))
