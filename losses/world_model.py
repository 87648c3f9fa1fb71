"""The loss of a deterministic world model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import unravel_key
from torch import Tensor

from ..estimators.modules import keys_read
from .supervised import SupervisedLoss
from .utils import check_distance, distance_loss

LOSSES = ("reward", "done", "reconstruction", "latent")


class WorldModelLoss(SupervisedLoss):
    r"""Distance of a world model's predictions from what happened.

    .. math::
        L_i = w_i\, \mathbb{E}\left[d_i(\hat y_i, y_i)\right], \qquad i \in \{\text{reward, done, reconstruction,
        latent}\}

    in ``loss_reward``, ``loss_done``, ``loss_reconstruction`` and ``loss_latent``, those that ``losses`` names.

    ===============  ==================================  ==========================================
    i                prediction                          target
    ===============  ==================================  ==========================================
    reward           ``("next", "reward")``              the same entry of the data
    done             ``("next", "done")``                the same entry of the data, 0 or 1
    reconstruction   ``reconstructed_observation``       ``observation``
    latent           ``predicted_latent``                ``target_latent``
    ===============  ==================================  ==========================================

    The model writes the predictions. It finds the reward and the flags of the data under ``("next", "true_reward")``,
    ``"true_done"`` and ``"true_terminated"``. Either latent may also be in the data. Padded steps
    (`LossModule.loss_mask_key`) don't count.

    Args:
        world_model: a TensorDictModule.
        losses: which of them; ``["reward"]`` by default.
        reward_loss: d of the reward: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        done_loss: d of done.
        reconstruction_loss: d of the reconstruction.
        latent_loss: d of the latent.
        reward_weight: w of the reward.
        done_weight: w of done.
        reconstruction_weight: w of the reconstruction.
        latent_weight: w of the latent.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: of the target's shape, without
            a last dimension of 1.

    Raises:
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing, or the model doesn't write it.
        RuntimeError: on call, prediction and target have different shapes.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule
        >>> model = TensorDictModule(torch.nn.Linear(3, 1), ["observation"], [("next", "reward")])
        >>> data = TensorDict({"observation": torch.zeros(4, 3), "next": {"reward": torch.ones(4, 1)}}, [4])
        >>> list(WorldModelLoss(model)(data).keys())
        ['loss_reward']

    See Ha & Schmidhuber 2018, World models (arXiv:1803.10122).

    """

    @dataclass
    class _AcceptedKeys:
        """Predictions and targets. Those of reward, done and terminated are under "next"."""

        reward: NestedKey = "reward"
        true_reward: NestedKey = "true_reward"
        done: NestedKey = "done"
        true_done: NestedKey = "true_done"
        terminated: NestedKey = "terminated"
        true_terminated: NestedKey = "true_terminated"
        observation: NestedKey = "observation"
        reconstructed_observation: NestedKey = "reconstructed_observation"
        predicted_latent: NestedKey = "predicted_latent"
        target_latent: NestedKey = "target_latent"

    def __init__(
        self,
        world_model: TensorDictModuleBase,
        *,
        losses: Sequence[str] | None = None,
        reward_loss: str = "l2",
        done_loss: str = "l2",
        reconstruction_loss: str = "l2",
        latent_loss: str = "l2",
        reward_weight: float = 1.0,
        done_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        latent_weight: float = 1.0,
        reduction: str | None = None,
    ) -> None:
        super().__init__(reduction)
        losses = ["reward"] if losses is None else list(losses)
        unknown = [name for name in losses if name not in LOSSES]
        if unknown:
            raise ValueError(f"losses has {unknown}; it can have {', '.join(map(repr, LOSSES))}")
        distances = (reward_loss, done_loss, reconstruction_loss, latent_loss)
        weights = (reward_weight, done_weight, reconstruction_weight, latent_weight)
        self._distances = {n: check_distance(d, f"{n}_loss") for n, d in zip(LOSSES, distances, strict=True)}
        self._weights = dict(zip(LOSSES, weights, strict=True))
        self.losses = [name for name in LOSSES if name in losses]
        self.world_model = world_model
        self.out_keys = [f"loss_{name}" for name in self.losses]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses (see the class), for data of batch size ``[*B]``."""
        data = self._inputs(tensordict)
        targets = {name: data.get(key) for name, key in self._true_keys().items()}
        out = self.world_model(data)
        terms = {}
        for name in self.losses:
            key, prediction = self._prediction(name, out)
            if name == "latent":
                target_key = self.tensor_keys.target_latent
                self._require_entries(out, [target_key], "say which is the target with set_keys(target_latent=...)")
                target = self._only_valid(out.get(target_key), tensordict)
            else:
                target_key, target = f"the {name} of the data", targets[name]
            self._require_shape(prediction, key, target, target_key)
            loss = distance_loss(prediction, target.to(prediction.dtype), self._distances[name])
            terms[f"loss_{name}"] = self._weights[name] * self._reduce_loss(loss, tensordict)
        return TensorDict(terms)

    def _inputs(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A copy of the data with its reward and its flags out of the model's way."""
        self._require(tensordict, *(name for name in ("reward", "done") if name in self.losses))
        if "reconstruction" in self.losses:
            self._require(tensordict, "observation")
        data = tensordict.copy()
        if (following := data.get("next", None)) is not None:
            following.batch_size = data.batch_size
        for name in ("reward", "done", "terminated"):
            key = self._keys(name)[0]
            if data.get(key, None) is not None:
                data.rename_key_(key, self._true(name))
        inputs = keys_read(self.world_model)
        self._require_inputs(data, inputs, ["world_model"], "the world model reads it")
        for key in {*inputs, *self._true_keys().values()}:
            x = data.get(key, None)
            if x is not None:  # the model may do without some of its inputs
                data.set(key, self._only_valid(x, tensordict))
        return data

    def _true_keys(self) -> dict[str, NestedKey]:
        """Where the copy of the data has the targets that the losses need, but for the latent."""
        keys = {"reward": self._true("reward"), "done": self._true("done")}
        keys["reconstruction"] = self.tensor_keys.observation
        return {name: key for name, key in keys.items() if name in self.losses}

    def _true(self, name: str) -> NestedKey:
        return unravel_key(("next", getattr(self.tensor_keys, f"true_{name}")))

    def _prediction(self, name: str, out: TensorDictBase) -> tuple[NestedKey, Tensor]:
        of = {"reconstruction": "reconstructed_observation", "latent": "predicted_latent"}.get(name, name)
        key = self._keys(of)[0]
        prediction = out.get(key, None)
        if prediction is None:
            raise KeyError(
                f"WorldModelLoss: the world model doesn't write {key!r}, which loss_{name} needs; say what it writes "
                f"with set_keys({of}=...)"
            )
        return key, prediction

    def _find_in_keys(self) -> Iterator[NestedKey]:
        moved = [self._true(name) for name in ("reward", "done", "terminated")]
        yield from (key for key in keys_read(self.world_model) if key not in moved)
        for name in self.losses:
            if name == "latent":  # what the model doesn't write of the two is in the data
                latents = (*self._keys("predicted_latent"), *self._keys("target_latent"))
                yield from (key for key in latents if key not in self.world_model.out_keys)
            else:
                yield from self._keys("observation" if name == "reconstruction" else name)
