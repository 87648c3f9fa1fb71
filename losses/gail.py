"""Generative adversarial imitation learning: the discriminator's loss."""

from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor

from ..estimators.modules import check_keyed, keys_read
from ..estimators.steps import expand_right
from .functional.imitation import discriminator_loss, gradient_penalty
from .supervised import SupervisedLoss


class GAILLoss(SupervisedLoss):
    r"""Tell an expert from the policy that imitates it.

    .. math::
        L = -\mathbb{E}_{(s, a) \sim π_E}\left[\log D(s, a)\right]
        - \mathbb{E}_{(s, a) \sim π}\left[\log(1 - D(s, a))\right]
        + λ\, \mathbb{E}_x\left[(‖∇_x D(x)‖_2 - 1)^2\right]

    in ``loss``. D is the probability that the expert acted: the discriminator ends in a sigmoid. The penalty (its
    mean, with λ, is also in ``gp_loss``) is taken at points x drawn uniformly from the lines between the expert's
    samples and the policy's. Padded steps (`LossModule.loss_mask_key`) don't count.

    Args:
        discriminator_network: writes D, shape ``[*B, 1]``, at ``d_logits`` (the key ``discriminator_pred``). It reads
            both the expert's and the policy's observation and action by the names that the expert's have.
        use_grad_penalty: have the penalty. Observation and action must be floating-point.
        gp_lambda: λ.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: of shape ``[*B]``.

    Raises:
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the expert's data and the policy's have different shapes.
        TypeError: on call, the gradient penalty of an entry of integers.

    Examples:
        >>> from tensordict.nn import TensorDictSequential
        >>> concatenate = TensorDictModule(lambda s, a: torch.cat([s, a], -1), ["observation", "action"], ["both"])
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Sigmoid())
        >>> discriminator = TensorDictSequential(concatenate, TensorDictModule(network, ["both"], ["d_logits"]))
        >>> expert = {"observation": torch.randn(4, 2), "action": torch.randn(4, 1)}
        >>> policy = {"collector_observation": torch.randn(4, 2), "collector_action": torch.randn(4, 1)}
        >>> loss = GAILLoss(discriminator, use_grad_penalty=True)
        >>> sorted(loss(TensorDict(expert | policy, [4])).keys())
        ['gp_loss', 'loss']

    See Ho & Ermon 2016, Generative adversarial imitation learning (arXiv:1606.03476); Gulrajani et al. 2017, Improved
    training of Wasserstein GANs (arXiv:1704.00028), for the penalty.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read, and the one that the discriminator writes."""

        expert_action: NestedKey = "action"
        expert_observation: NestedKey = "observation"
        collector_action: NestedKey = "collector_action"
        collector_observation: NestedKey = "collector_observation"
        discriminator_pred: NestedKey = "d_logits"

    _data_keys = ("expert_action", "expert_observation", "collector_action", "collector_observation")
    _sorts_in_keys = True

    def __init__(
        self,
        discriminator_network: TensorDictModule,
        *,
        use_grad_penalty: bool = False,
        gp_lambda: float = 10,
        reduction: str | None = None,
    ) -> None:
        super().__init__(reduction)
        if not isinstance(gp_lambda, (int, float, Tensor)):
            raise ValueError(f"gp_lambda must be a number, but is {gp_lambda!r}")
        self.use_grad_penalty = use_grad_penalty
        self.gp_lambda = gp_lambda
        check_keyed(discriminator_network, "discriminator_network", type(self).__name__)
        self.convert_to_functional(discriminator_network, "discriminator_network")
        self.out_keys = ["loss", "gp_loss"] if use_grad_penalty else ["loss"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss (see the class), for data of batch size ``[*B]``."""
        expert, collector = self._samples(tensordict)
        both = self._discriminate(torch.cat([expert, collector]) if expert.ndim else torch.stack([expert, collector]))
        of_expert, of_collector = both.reshape(2, *tensordict.shape, *both.shape[max(expert.ndim, 1) :])
        loss = discriminator_loss(of_expert, of_collector)
        if not self.use_grad_penalty:
            return TensorDict({"loss": self._reduce_loss(loss, tensordict)})
        penalty = self.gp_lambda * self._penalty(expert, collector)
        self._require_shape(loss, "the discriminator's probability", penalty, "the gradient penalty")
        loss = self._reduce_loss(loss + penalty, tensordict)
        return TensorDict({"gp_loss": self._metric(penalty, tensordict), "loss": loss})

    def _samples(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """The expert's and the policy's observation and action, as the discriminator reads them."""
        data = self._read(tensordict, *self._data_keys)
        keys = vars(self.tensor_keys)
        pairs = {keys[f"expert_{part}"]: keys[f"collector_{part}"] for part in ("observation", "action")}
        for key, other in pairs.items():
            self._require_shape(data.get(other), other, data.get(key), key)
        missing = [key for key in keys_read(self.discriminator_network) if key not in pairs]
        if missing:
            raise KeyError(
                f"GAILLoss: the discriminator reads {missing}, but is given {list(pairs)}: say what its observation "
                "and action are called with set_keys(expert_observation=..., expert_action=...)"
            )
        collector = TensorDict({key: data.get(other) for key, other in pairs.items()}, data.batch_size)
        return data.select(*pairs), collector

    def _discriminate(self, samples: TensorDictBase) -> Tensor:
        (probability,) = self._predict("discriminator_network", samples, "discriminator_pred")
        return probability

    def _penalty(self, expert: TensorDictBase, collector: TensorDictBase) -> Tensor:
        """The gradient penalty of each sample, shape ``[*B, 1]``."""
        keys = list(expert.keys(True, True))
        for key in keys:
            if not expert.get(key).is_floating_point():
                raise TypeError(f"GAILLoss: use_grad_penalty needs floating-point data, but {key!r} holds integers")
        first = expert.get(keys[0])
        share = torch.rand(expert.shape, dtype=first.dtype, device=first.device)
        pairs = [(expert.get(key), collector.get(key)) for key in keys]
        points = tuple(torch.lerp(y, x, expand_right(share, x).to(x.dtype)) for x, y in pairs)

        def total(points: tuple[Tensor, ...]) -> Tensor:
            return self._discriminate(TensorDict(dict(zip(keys, points, strict=True)), expert.batch_size)).sum()

        if torch.compiler.is_compiling():  # which doesn't trace torch.autograd.grad
            slopes = torch.func.grad(total)(points)
        else:  # a transform would refuse networks that count what they see, as batch normalisation does
            with torch.enable_grad():
                points = tuple(x.detach().requires_grad_() for x in points)
                slopes = torch.autograd.grad(total(points), points, create_graph=True)
        return gradient_penalty(torch.cat([slope.reshape(*expert.shape, -1) for slope in slopes], -1))
