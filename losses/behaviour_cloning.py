"""Behaviour cloning."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor

from ..estimators.calls import distribution
from ..estimators.modules import check_keyed, has_distribution
from .functional.imitation import classification_loss
from .policy import ActionHeads
from .reduction import align, without_padding
from .supervised import SupervisedLoss
from .utils import check_distance, distance_loss

Distance = Callable[[Tensor, Tensor], Tensor]

SQUARED_ERROR: Distance = partial(distance_loss, loss_function="l2")


class BCLoss(SupervisedLoss):
    r"""Imitate the actions in the data.

    .. math::
        L = -\mathbb{E}_{(s, a) \sim \mathcal{D}}\left[\log π(a|s)\right] \quad\text{or}\quad
        \mathbb{E}_{(s, a) \sim \mathcal{D}}\left[d(π(s), a)\right]

    in ``loss_bc``: the likelihood of a policy that has a distribution, a distance d of one that hasn't (squared
    error, or cross-entropy where the action is an integer), or what ``loss_function`` says. Log-probabilities of
    several action heads add up. Neither padded steps (`LossModule.loss_mask_key`) count, nor what is marked in the
    entry ``pad_mask`` (``set_keys(pad_mask=...)``; True is padding): one value per sample, per action of a chunk, or
    per element of the action.

    Args:
        actor_network: the policy; writes the action, or has a distribution of it, such as a
            ``ProbabilisticTensorDictSequential``.
        loss_function: ``"l1"``, ``"l2"`` (also ``"mse"``), ``"smooth_l1"`` or ``"cross_entropy"`` (the policy
            writes logits), or a function of the policy's deterministic action and the one in the data, element by
            element. None: as above.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: of shape ``[*B]``, or of the action's for a distance,
            without a last dimension of 1.

    Raises:
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the policy's action and that in the data have different shapes.

    Examples:
        >>> policy = TensorDictModule(torch.nn.Linear(3, 4), ["observation"], ["action"])
        >>> data = TensorDict({"observation": torch.randn(2, 3), "action": torch.randn(2, 4)}, [2])
        >>> BCLoss(policy, loss_function="l1")(data)["loss_bc"].shape
        torch.Size([])
        >>> BCLoss(policy, reduction="none")(data)["loss_bc"].shape
        torch.Size([2, 4])

    See Pomerleau 1991, Efficient training of artificial neural networks for autonomous navigation,
    https://doi.org/10.1162/neco.1991.3.1.88, and Goecks et al. 2020 (arXiv:1910.04281).

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read. ``action`` is a list if the policy has several heads; ``pad_mask`` is optional."""

        action: NestedKey | list[NestedKey] = "action"
        pad_mask: NestedKey | None = None

    _data_keys = ("action",)

    def __init__(
        self,
        actor_network: TensorDictModule,
        *,
        loss_function: Distance | str | None = None,
        reduction: str | None = None,
    ) -> None:
        super().__init__(reduction)
        self.stochastic = has_distribution(actor_network)
        heads = list(actor_network.dist_sample_keys) if self.stochastic else []
        if len(heads) > 1:
            if loss_function is not None:
                raise ValueError(
                    f"loss_function is {loss_function!r}, but must be None for a policy with several heads: {heads}"
                )
            self.set_keys(action=heads)
        self.loss_function = _distance(loss_function)
        check_keyed(actor_network, "actor_network", type(self).__name__)
        self.convert_to_functional(actor_network, "actor_network")
        self.out_keys = ["loss_bc"]

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from super()._find_in_keys()
        if self.tensor_keys.pad_mask is not None:
            yield self.tensor_keys.pad_mask

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss (see the class), for data of batch size ``[*B]``."""
        data = self._read(tensordict, "action", networks=("actor_network",))
        for key in self._keys("action"):
            action = data.get(key)
            data.set(key, without_padding(action, self._counted(tensordict, action)))
        likelihood = self.stochastic and self.loss_function is None
        loss = -self._log_prob(data) if likelihood else self._error(data)
        mask = self._counted(tensordict, loss)
        return TensorDict({"loss_bc": self._reduce_loss(loss, tensordict, mask=mask)})

    def _counted(self, tensordict: TensorDictBase, like: Tensor) -> Tensor | None:
        """What counts, in the shape of ``like``: neither a padded step nor marked in the pad mask."""
        mask = self._mask(tensordict, like)
        key = self.tensor_keys.pad_mask
        padded = None if key is None else tensordict.get(key, None)
        if padded is None:
            return mask
        filled = align(padded == 0, like, f"the pad mask {key!r}")
        return filled if mask is None else filled & mask

    def _log_prob(self, data: TensorDictBase) -> Tensor:
        with self._parameters_in("actor_network"):
            dist = distribution(self.actor_network, data)
        heads = ActionHeads(dist, self._keys("action")[0], data.ndim)
        return heads.log_prob(data)

    def _error(self, data: TensorDictBase) -> Tensor:
        key = self._keys("action")[0]
        action = data.get(key)
        (prediction,) = self._predict("actor_network", data, "action")
        discrete = not (action.is_floating_point() or action.dtype == torch.bool)
        loss_function = self.loss_function or (classification_loss if discrete else SQUARED_ERROR)
        if loss_function is classification_loss:
            return classification_loss(prediction, action)
        self._require_shape(prediction, f"the policy's {key!r}", action, key)
        return loss_function(prediction, action.to(prediction.dtype))


def _distance(loss_function: Distance | str | None) -> Distance | None:
    """The function of prediction and target that the argument ``loss_function`` means; None where it is None."""
    if not isinstance(loss_function, str):
        return loss_function
    if loss_function == "cross_entropy":
        return classification_loss
    name = check_distance("l2" if loss_function == "mse" else loss_function)
    return partial(distance_loss, loss_function=name)
