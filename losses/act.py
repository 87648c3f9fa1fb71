"""Action chunking with transformers."""

from collections.abc import Iterator
from dataclasses import dataclass

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch

from ..estimators.modules import check_keyed, keys_read
from .functional.imitation import standard_normal_divergence
from .supervised import SupervisedLoss
from .utils import distance_loss


class ACTLoss(SupervisedLoss):
    r"""Reconstruct chunks of actions through the latent variable of a conditional variational autoencoder.

    .. math::
        L = \mathbb{E}\left[\frac{1}{HA} ‖\hat a_{t:t+H} - a_{t:t+H}‖_1
        + β\, KL\left[q(z|a_{t:t+H}, s_t)\ |\ \mathcal{N}(0, 1)\right]\right]

    in ``loss_act``; its two parts, without β and without gradient, are in ``loss_reconstruction`` and ``loss_kl``.
    Padded steps (`LossModule.loss_mask_key`) don't count.

    Args:
        actor_network: the model; reads ``observation`` and ``action_chunk`` (shape ``[*B, H, A]``) and writes the
            reconstruction ``action_pred`` and the posterior's ``mu`` and ``log_var`` (shape ``[*B, Z]``). It is given
            observation and chunk by these names, whatever they are called in the data.
        kl_weight: β.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: of shape ``[*B]``.

    Raises:
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, reconstruction and chunk have different shapes.

    Examples:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bias = torch.nn.Parameter(torch.zeros(()))
        ...     def forward(self, observation, action_chunk):
        ...         latent = torch.zeros_like(observation)
        ...         return action_chunk + self.bias, latent + 1, latent
        >>> names = ["observation", "action_chunk"], ["action_pred", "mu", "log_var"]
        >>> data = TensorDict({"observation": torch.ones(4, 2), ("vla_action", "chunk"): torch.ones(4, 5, 3)}, [4])
        >>> ACTLoss(TensorDictModule(Model(), *names), kl_weight=3.0)(data)["loss_act"]
        tensor(3., grad_fn=<MeanBackward0>)

    See Zhao et al. 2023, Learning fine-grained bimanual manipulation with low-cost hardware (arXiv:2304.13705).

    """

    @dataclass
    class _AcceptedKeys:
        """The entries in the data, and those that the model writes."""

        observation: NestedKey = "observation"
        action_chunk: NestedKey = ("vla_action", "chunk")
        action_pred: NestedKey = "action_pred"
        mu: NestedKey = "mu"
        log_var: NestedKey = "log_var"

    _data_keys = ("observation", "action_chunk")

    def __init__(
        self, actor_network: TensorDictModule, *, kl_weight: float = 10.0, reduction: str | None = "mean"
    ) -> None:
        super().__init__(reduction)
        self.kl_weight = kl_weight
        check_keyed(actor_network, "actor_network", type(self).__name__)
        self.convert_to_functional(actor_network, "actor_network")
        self.out_keys = ["loss_act", "loss_reconstruction", "loss_kl"]

    def _find_in_keys(self) -> Iterator[NestedKey]:
        for name in self._data_keys:
            yield from self._keys(name)
        yield from (key for key in keys_read(self.actor_network) if key not in self._data_keys)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss and its parts (see the class), for data of batch size ``[*B]``."""
        data = self._inputs(tensordict)
        chunk = data.get("action_chunk")
        prediction, mu, log_var = self._predict("actor_network", data, "action_pred", "mu", "log_var")
        self._require_shape(prediction, self.tensor_keys.action_pred, chunk, self.tensor_keys.action_chunk)
        reconstruction = distance_loss(prediction, chunk, "l1").flatten(tensordict.ndim).mean(-1)
        kl = standard_normal_divergence(mu, log_var)
        self._require_shape(kl, "the posterior's divergence", reconstruction, "the reconstruction's error")
        terms = {
            "loss_act": reconstruction + self.kl_weight * kl,
            "loss_reconstruction": reconstruction.detach(),
            "loss_kl": kl.detach(),
        }
        return TensorDict({name: self._reduce_loss(term, tensordict) for name, term in terms.items()})

    def _inputs(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the model reads, observation and chunk by the model's names for them."""
        given = self._read(tensordict, "observation", "action_chunk")
        given.set("action_chunk", self._get(given, "action_chunk"))
        given.set("observation", self._get(given, "observation"))
        for key in keys_read(self.actor_network):
            if given.get(key, None) is None:
                self._require_inputs(tensordict, [key], ["actor_network"], "it is one of the in_keys of actor_network")
                x = tensordict.get(key, None)
                if x is not None:  # the model may do without it
                    given.set(key, self._only_valid(x, tensordict))
        return given
