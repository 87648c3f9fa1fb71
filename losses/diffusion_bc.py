"""Behaviour cloning of a diffusion policy."""

from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch

from .supervised import SupervisedLoss
from .utils import distance_loss


class DiffusionBCLoss(SupervisedLoss):
    r"""Predict the noise that was added to an expert's action.

    .. math::
        L = \mathbb{E}_{(s, a),\, k,\, ε}\left[‖ε - ε_θ(a^k, s, k)‖^2\right], \qquad
        a^k = \sqrt{\bar α_k}\, a + \sqrt{1 - \bar α_k}\, ε, \quad ε \sim \mathcal{N}(0, 1)

    in ``loss_diffusion_bc``, with a diffusion step k drawn uniformly for each sample. Padded steps
    (`LossModule.loss_mask_key`) don't count.

    Args:
        actor_network: the policy. Its ``module`` has the number of diffusion steps ``num_steps``; the noise schedule,
            a method ``add_noise(action, k)`` that returns a^k and ε; and ε_θ, a ``score_network`` from the
            concatenation of a^k, s and k, shape ``[*B, A + S + 1]``, to ``[*B, A]`` (such as TorchRL's
            ``DiffusionActor``).
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: of the action's shape, without
            a last dimension of 1.

    Raises:
        TypeError: the policy has no such module.
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the predicted noise hasn't the action's shape.

    Examples:
        >>> class Denoiser(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_steps, self.score_network = 10, torch.nn.Linear(2 + 4 + 1, 2)
        ...     def add_noise(self, action, k):
        ...         noise, kept = torch.randn_like(action), 1 - k.unsqueeze(-1) / 10
        ...         return kept.sqrt() * action + (1 - kept).sqrt() * noise, noise
        >>> policy = TensorDictModule(Denoiser(), ["observation"], ["action"])
        >>> data = TensorDict({"observation": torch.randn(8, 4), "action": torch.randn(8, 2)}, [8])
        >>> DiffusionBCLoss(policy)(data)["loss_diffusion_bc"].shape
        torch.Size([])

    See Chi et al. 2023, Diffusion policy: visuomotor policy learning via action diffusion (arXiv:2303.04137),
    equation 5; Ho et al. 2020, Denoising diffusion probabilistic models (arXiv:2006.11239), for the noise.

    """

    @dataclass
    class _AcceptedKeys:
        """The expert's action, and what the policy knows."""

        action: NestedKey = "action"
        observation: NestedKey = "observation"

    _data_keys = ("observation", "action")

    def __init__(self, actor_network: TensorDictModule, *, reduction: str | None = "mean") -> None:
        super().__init__(reduction)
        denoiser = getattr(actor_network, "module", None)
        missing = [name for name in ("num_steps", "add_noise", "score_network") if not hasattr(denoiser, name)]
        if missing:
            raise TypeError(
                f"DiffusionBCLoss needs an actor_network whose module has {', '.join(missing)}, but that is a "
                f"{type(denoiser).__name__}"
            )
        self.convert_to_functional(actor_network, "actor_network")
        self.out_keys = ["loss_diffusion_bc"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss (see the class), for data of batch size ``[*B]``."""
        data = self._read(tensordict, "action", "observation")
        action, observation = self._get(data, "action"), self._get(data, "observation")
        with self._parameters_in("actor_network"):
            denoiser = self.actor_network.module
            step = torch.randint(denoiser.num_steps, action.shape[:-1], device=action.device)
            noisy_action, noise = denoiser.add_noise(action, step)
            inputs = [noisy_action, observation, step.unsqueeze(-1).to(noisy_action.dtype)]
            predicted_noise = denoiser.score_network(torch.cat(inputs, -1))
        self._require_shape(predicted_noise, "the predicted noise", noise, self.tensor_keys.action)
        loss = distance_loss(predicted_noise, noise, "l2")
        return TensorDict({"loss_diffusion_bc": self._reduce_loss(loss, tensordict)})
