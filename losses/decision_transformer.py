"""Decision transformers: policies learned as sequence models."""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, dispatch

from ..estimators.calls import distribution
from ..estimators.modules import check_distribution, check_keyed
from .functional.soft_actor_critic import temperature_loss
from .policy import ActionHeads
from .reduction import check_scalar_output_mode, has_metrics
from .supervised import SupervisedLoss
from .temperature import TemperatureLoss, continuous_target_entropy
from .utils import check_distance, distance_loss


class DTLoss(SupervisedLoss):
    r"""Distance of a decision transformer's actions from those in the data.

    .. math::
        L = \mathbb{E}\left[d(π(\hat R_{\le t}, s_{\le t}, a_{<t}),\ a_t)\right]

    in ``loss``. Padded steps (`LossModule.loss_mask_key`) don't count.

    Args:
        actor_network: the policy; writes the action at ``action`` (the key ``action_pred``), for each step of the
            sequences it reads.
        loss_function: d: ``"l2"``, ``"l1"`` or ``"smooth_l1"`` (`distance_loss`).
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: of the action's shape, without
            a last dimension of 1.
        device: ignored; the loss has no tensor of its own.

    Raises:
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, predicted action and that in the data have different shapes.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> policy = TensorDictModule(torch.nn.Linear(3, 2), ["observation"], ["action"])
        >>> data = TensorDict({"observation": torch.zeros(4, 5, 3), "action": torch.ones(4, 5, 2)}, [4, 5])
        >>> DTLoss(policy, reduction="none")(data)["loss"].shape
        torch.Size([4, 5, 2])

    See Chen et al. 2021, Decision transformer: reinforcement learning via sequence modeling (arXiv:2106.01345).

    """

    @dataclass
    class _AcceptedKeys:
        """The action in the data, and the one that the policy writes."""

        action_target: NestedKey = "action"
        action_pred: NestedKey = "action"

    _data_keys = ("action_target",)
    _sorts_in_keys = True

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        *,
        loss_function: str = "l2",
        reduction: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(reduction)
        self.loss_function = check_distance(loss_function)
        check_keyed(actor_network, "actor_network", type(self).__name__)
        self.convert_to_functional(actor_network, "actor_network")
        self.out_keys = ["loss"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss (see the class), for data of batch size ``[*B]``."""
        data = self._read(tensordict, "action_target", networks=("actor_network",))
        target = self._get(data, "action_target")
        (prediction,) = self._predict("actor_network", data, "action_pred")
        self._require_shape(prediction, "the policy's action", target, self.tensor_keys.action_target)
        loss = distance_loss(prediction, target, self.loss_function)
        return TensorDict({"loss": self._reduce_loss(loss, tensordict)})


class OnlineDTLoss(SupervisedLoss, TemperatureLoss):
    r"""Maximum likelihood of the actions in the data, for a stochastic decision transformer that keeps exploring.

    .. math::
        L_π = -\mathbb{E}\left[\log π(a_t|\hat R_{\le t}, s_{\le t}, a_{<t})\right], \qquad
        L_H = -α\, \mathbb{E}\left[H[π]\right], \qquad L_α = α\, \mathbb{E}\left[H[π] - \bar H\right]

    in ``loss_log_likelihood``, ``loss_entropy`` and ``loss_alpha``; α is a constant in the second and the policy in
    the third. Also in the output: ``alpha`` and ``entropy``. Padded steps (`LossModule.loss_mask_key`) don't count.

    Args:
        actor_network: the policy, with a distribution (``get_dist``).
        alpha_init: α to start with.
        min_alpha: its least value. None: no bound.
        max_alpha: its greatest value. None: no bound.
        fixed_alpha: keep α; ``loss_alpha`` is then without gradient.
        target_entropy: :math:`\bar H`; ``"auto"``: minus the number of the action's dimensions, as the ``spec`` of
            the actor says.
        samples_mc_entropy: draws from which the entropy is estimated where it has no closed form.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        scalar_output_mode: ``"exclude"`` leaves ``alpha`` and ``entropy`` out where the reduction is "none".

    Raises:
        TypeError: the policy has no distribution.
        ValueError: an argument that can't be used.
        RuntimeError: the target entropy is "auto" and the actor has no ``spec``; on call, the action in the data
            hasn't the shape of the policy's.
        KeyError: on call, an entry is missing; the message says how to rename it.

    Examples:
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Sampler, TensorDictModule
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Unflatten(-1, (2, 1)))
        >>> policy = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(lambda x: network(x).exp().unbind(-2), ["observation"], ["loc", "scale"]),
        ...     Sampler(["loc", "scale"], ["action"], distribution_class=torch.distributions.Normal),
        ... )
        >>> data = TensorDict({"observation": torch.zeros(4, 5, 3), "action": torch.ones(4, 5, 1)}, [4, 5])
        >>> OnlineDTLoss(policy, target_entropy=-1.0, reduction="none")(data)["loss_log_likelihood"].shape
        torch.Size([4, 5])

    See Zheng et al. 2022, Online decision transformer (arXiv:2202.05607), equations 5 to 7.

    """

    @dataclass
    class _AcceptedKeys:
        """``action_target``: the action in the data. ``action_pred`` is there for TorchRL's sake: nothing reads it."""

        action_target: NestedKey = "action"
        action_pred: NestedKey = "action"

    _schedulable_buffers = frozenset({"target_entropy"})
    _data_keys = ("action_target",)
    _sorts_in_keys = True
    _target_entropy_name = "target_entropy"

    target_entropy: torch.Tensor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        *,
        alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        fixed_alpha: bool = False,
        target_entropy: str | float = "auto",
        samples_mc_entropy: int = 1,
        reduction: str | None = None,
        scalar_output_mode: str | None = None,
    ) -> None:
        super().__init__(reduction)
        check_distribution(actor_network, type(self).__name__)
        check_scalar_output_mode(scalar_output_mode)
        wanted: Any = continuous_target_entropy(target_entropy, None, actor_network)
        self.samples_mc_entropy = samples_mc_entropy
        self.scalar_output_mode = scalar_output_mode
        self.convert_to_functional(actor_network, "actor_network")
        self._set_temperature(alpha_init, min_alpha, max_alpha, fixed=fixed_alpha, target_entropy=wanted)
        metrics = ["alpha", "entropy"] if has_metrics(self.reduction, scalar_output_mode) else []
        self.out_keys = ["loss_log_likelihood", "loss_entropy", "loss_alpha", *metrics]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and their metrics (see the class), for data of batch size ``[*B]``."""
        data = self._read(tensordict, "action_target", networks=("actor_network",))
        key = self.tensor_keys.action_target
        with self._parameters_in("actor_network"):
            dist = distribution(self.actor_network, data)
        heads = ActionHeads(dist, key, data.ndim)
        (entropy,) = heads.entropies(self.samples_mc_entropy).values()
        alpha = self._bounded_alpha()
        losses = {
            "loss_log_likelihood": -heads.log_prob(data),
            "loss_entropy": -alpha * entropy,
            "loss_alpha": temperature_loss(entropy, self.log_alpha.exp(), self.target_entropy),
        }
        out = {name: self._reduce_loss(loss, tensordict) for name, loss in losses.items()}
        if has_metrics(self.reduction, self.scalar_output_mode):
            out |= {"alpha": alpha, "entropy": self._metric(entropy, tensordict)}
        return TensorDict(out)
