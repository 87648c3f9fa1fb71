"""What the losses that learn action values Q(s, a) from stored transitions share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, skip_existing
from tensordict.utils import unravel_key
from torch import Tensor

from ..estimators.calls import written_by
from ..estimators.keys import is_locked_at
from ..estimators.modules import check_keyed, is_recurrent, keys_read
from ..estimators.steps import any_right, expand_right, widened_right
from ..estimators.td import TD0Estimator
from ..kernels import EnsembleLoss, Target, ensemble_loss, value_target
from ..kernels.checks import check_positive
from .base import LossModule
from .ensemble import MEMBERS_IN_TURN
from .networks import Parameters
from .parameters import not_recomputed, parts_of
from .reduction import without_padding
from .utils import ValueEstimators


class ActionValueLoss(LossModule):
    r"""Base of the losses that move Q(s_t, a_t) towards a target such as :math:`r_t + γ(1 - \text{term}_t) v(s_{t+1})`.

    A loss finds v(s_{t+1}) itself, and leaves the target to its value estimator (`make_value_estimator`). The
    error of each sample is written to the input as its priority in a replay buffer, the only entry that changes.

    An ensemble of networks (`convert_to_functional` with ``expand_dim``) is one batched computation; a network that
    can't run under `torch.vmap` is called once for each member: if PyTorch's recurrent layers are in it, or
    ``deactivate_vmap`` is set.
    """

    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS: tuple[ValueEstimators, ...] = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )
    deactivate_vmap = False

    loss_function: str

    def _take_qvalue_network(
        self,
        network: TensorDictModule | list[TensorDictModule],
        size: int,
        *,
        delay: bool,
        shared: Iterable[Tensor] | None,
        one_alone: bool = False,
    ) -> None:
        """Make an ensemble ``qvalue_network`` of ``size`` networks; those of their parameters in ``shared`` stay fixed.

        A single network is an ensemble of one, whose parameters have a dimension for it, unless ``one_alone``.

        Raises:
            TypeError: ``size`` is no integer; a network doesn't say what it reads.
            ValueError: ``size`` is less than one, or not the length of a list of networks.

        """
        check_positive("num_qvalue_nets", size)
        if isinstance(network, list | tuple):
            if len(network) not in (1, size):
                raise ValueError(f"num_qvalue_nets is {size}, but qvalue_network is a list of {len(network)}")
            if len(network) == 1:
                (network,) = network
        for one in network if isinstance(network, list | tuple) else (network,):
            check_keyed(one, "qvalue_network", type(self).__name__)
        self.num_qvalue_nets = size
        self.delay_qvalue = delay
        self.convert_to_functional(
            network,
            "qvalue_network",
            expand_dim=None if one_alone and size == 1 else size,
            create_target_params=delay,
            compare_against=shared,
        )

    # --- reading ------------------------------------------------------------------------------------------------

    def _transitions(
        self, tensordict: TensorDictBase, current: Sequence[str], following: Sequence[str]
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """What the networks ``current`` read of the observations, and ``following`` of the next ones: new TensorDicts.

        A network may read what one before it in the list writes. Inputs that don't count are made finite, since their
        NaN or inf would reach the gradients through a network, as 0 · NaN, or other samples in one that mixes them:
        those of padded steps (`loss_mask_key`), and of the next observations of terminal steps.

        Raises:
            KeyError: an entry is missing, or all of done and terminated.
            RuntimeError: the priority can't be written, since ``tensordict`` is locked.

        """
        current_keys, next_keys = self._read_by(current), self._read_by(following)
        self._get(tensordict, "reward")
        priority = self.tensor_keys.priority
        if is_locked_at(tensordict, priority) and tensordict.get(priority, None) is None:
            raise RuntimeError(
                f"{type(self).__name__} writes the entry {priority!r}, which the locked TensorDict "
                "doesn't have: unlock it, or set the entry before it is locked"
            )
        terminated, _ = self._terminated(tensordict)
        data = self._inputs(tensordict, current_keys, current)
        next_data = self._inputs(tensordict, next_keys, following, "next")
        if next_data.batch_size != tensordict.batch_size:
            next_data.batch_size = tensordict.batch_size

        terminal = terminated if terminated.dtype == torch.bool else terminated != 0
        if terminal.ndim != tensordict.ndim + 1 or terminal.shape[-1] != 1:
            terminal = any_right(terminal, tensordict.ndim).unsqueeze(-1)

        def finite(x: Tensor) -> Tensor:
            return torch.where(_beside(terminal, x), x.nan_to_num(0.0, 0.0, 0.0), x) if x.is_floating_point() else x

        for key in next_keys:
            x = next_data.get(key, None)
            if isinstance(x, Tensor):
                next_data.set(key, finite(x))
            elif isinstance(x, TensorDictBase):  # not `set` below it, which would change the input
                next_data.set(key, x.apply(finite))
        data = self._padding_filled(data, tensordict, dict.fromkeys(current_keys))
        return data, self._padding_filled(next_data, tensordict, dict.fromkeys(next_keys))

    def _inputs(
        self, tensordict: TensorDictBase, keys: list[NestedKey], networks: Sequence[str], prefix: str = ""
    ) -> TensorDictBase:
        """A new TensorDict of the entries ``keys``, below the entry ``prefix`` if that is given.

        The ``networks`` may do without some of them, see `_require_inputs`.
        """
        source = tensordict.get(prefix) if prefix else tensordict
        try:
            return source.select(*keys)
        except KeyError:
            self._require_inputs(tensordict, keys, networks, f"the networks {', '.join(networks)} read it", prefix)
            return source.select(*keys, strict=False)

    def _taken_action(self, tensordict: TensorDictBase, key: NestedKey | None = None) -> Tensor:
        """The actions in the data, of the head ``key`` if there are several, whether or not a network reads them.

        Those of padded steps, which may stand for none at all, are 0.
        """
        key = self._keys("action")[0] if key is None else key
        self._require_entries(tensordict, [key], "rename it with set_keys(action=...)")
        action = tensordict.get(key)
        mask = self._mask(tensordict, self._get(tensordict, "reward"))
        if mask is None:
            return action
        mask = mask.squeeze(-1)
        return without_padding(action, expand_right(mask, action) if action.ndim >= mask.ndim else mask)

    def _read_by(self, networks: Sequence[str]) -> list[NestedKey]:
        """What the networks read of which none before it writes."""
        networks = tuple(networks)
        if torch.compiler.is_compiling():  # what is kept now would be found changed in the next call
            return self._find_reads(networks)
        if networks not in self._reads:
            self._reads[networks] = self._find_reads(networks)
        return self._reads[networks]

    def _find_reads(self, networks: Sequence[str]) -> list[NestedKey]:
        read: dict[NestedKey, None] = {}
        written: set[NestedKey] = set()
        for name in networks:
            network = getattr(self, name)
            read |= dict.fromkeys(key for key in keys_read(network) if key not in written)
            written |= {unravel_key(key) for key in network.out_keys}
        return list(read)

    # --- computing ----------------------------------------------------------------------------------------------

    def _ensemble(
        self,
        name: str,
        data: TensorDictBase,
        key: NestedKey,
        *,
        target: bool = False,
        detach: bool = False,
        members: Tensor | None = None,
    ) -> Tensor:
        """What every member of the ensemble ``name`` writes at ``key`` for ``data``, shape ``[N, *B, *F]``.

        ``data`` is left as it is. A network that isn't an ensemble counts as one of a single member. ``members`` are
        the indices of those that are asked (None: all); see `_parameters_in` for the other options.
        """
        params = self._parameters_of(name, target=target, detach=detach)
        if getattr(self, f"{name}_params").ndim == 0:
            return self._call(name, data, key, params).unsqueeze(0)
        compiling = isinstance(params, TensorDictBase)
        if members is not None:
            params = params[members] if isinstance(params, TensorDictBase) else [x[members] for x in params]
        parts = parts_of(params, self._whole[name]) if isinstance(params, TensorDictBase) else params

        perceptron = self._perceptrons[name]
        if perceptron is not None and perceptron.out_key == key and not skip_existing():
            values = perceptron(data, parts)
            if values is not None:
                return values
        # Compiled, a linear layer under vmap would be good for data [B, T, F] of one B and T alone.
        few = compiling or len(parts[0]) <= MEMBERS_IN_TURN
        in_turn = few or is_recurrent(getattr(self, name))
        if self.deactivate_vmap or (in_turn and self.vmap_randomness != "same"):
            each: Any = zip(*(x.unbind(0) for x in parts), strict=True)
            if isinstance(params, TensorDictBase):
                each = params.unbind(0)
            with not_recomputed(name):
                return torch.stack([self._call(name, data, key, one) for one in each])

        def member(*one: Any) -> Tensor:
            return self._call(name, data, key, one[0] if compiling else one)

        with not_recomputed(name):
            return torch.vmap(member, randomness=self.vmap_randomness)(*([params] if compiling else parts))

    def _ensemble_values(
        self,
        data: TensorDictBase,
        tensordict: TensorDictBase,
        *,
        target: bool = False,
        detach: bool = False,
        members: Tensor | None = None,
    ) -> Tensor:
        """Q_i(s, a) of the actions in ``data``, shape ``[N, *B]``; see `_ensemble` for the options."""
        key = self.tensor_keys.state_action_value
        values = self._ensemble("qvalue_network", data, key, target=target, detach=detach, members=members)
        return self._one_per_sample(values, key, tensordict)

    def _call(self, name: str, data: TensorDictBase, key: NestedKey, params: Parameters) -> Tensor:
        """What the network ``name`` with ``params`` writes at ``key`` for ``data``, which is left as it is."""
        with self._with_parameters(name, params):
            x = written_by(getattr(self, name), data).get(key, None)
        if x is None:
            raise KeyError(
                f"{type(self).__name__}: the network {name} doesn't write {key!r} but {getattr(self, name).out_keys}; "
                "say which is the value with set_keys"
            )
        return x

    def _one_per_sample(self, x: Tensor, key: NestedKey, tensordict: TensorDictBase) -> Tensor:
        """``x``, shape ``[*E, *B, 1]`` with the batch of the reward, as ``[*E, *B]``.

        Raises:
            RuntimeError: it has another shape: it would broadcast by accident.

        """
        reward_key = self._keys("reward")[0]
        shape = self._get(tensordict, "reward").shape
        if x.shape[-len(shape) :] != shape:
            raise RuntimeError(
                f"{type(self).__name__}: {key!r} has shape {tuple(x.shape)}, but {reward_key!r} has shape "
                f"{tuple(shape)}: both must have one value per sample"
            )
        return x.squeeze(-1)

    def _value_target(self, tensordict: TensorDictBase, next_value: Tensor) -> Tensor:
        """The target of each sample, shape ``[*B]``, without gradient; ``next_value`` is v(s_{t+1}), shape ``[*B]``."""
        if tensordict.ndim == 0:  # a single transition: estimators want a dimension of time
            return self._value_target(tensordict.unsqueeze(0), next_value.unsqueeze(0)).squeeze(0)
        tensordict = self._marked_padding(tensordict)
        with torch.no_grad():
            return self.value_estimator.value_estimate(tensordict, next_value=next_value.unsqueeze(-1)).squeeze(-1)

    def _target(
        self,
        tensordict: TensorDictBase,
        next_values: Tensor,
        *,
        log_prob: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> Target:
        """The target y of each sample and the value v' of its next state, both of shape ``[*B]`` and constants.

        v' is the least of ``next_values``, shape ``[N, *B]``, less α log π if that is given. For the plain one-step
        estimate, which asks for nothing but the step itself, both are one fused operation.
        """
        next_values, log_prob = next_values.detach(), None if log_prob is None else log_prob.detach()
        estimator = self.value_estimator
        if type(estimator) is not TD0Estimator or estimator.average_rewards:
            next_value = next_values.amin(0)
            if log_prob is not None:
                next_value = next_value - alpha * log_prob  # type: ignore[operator]  # given together
            return Target(self._value_target(tensordict, next_value), next_value)
        steps = estimator.one_step(tensordict)
        reward, terminated, gamma = (x.squeeze(-1) if x.ndim > 0 else x for x in steps)
        target = value_target(
            next_values, reward, terminated, gamma, log_prob=log_prob, alpha=alpha, backend=estimator.backend
        )
        return target._replace(value_target=self._only_valid(target.value_target, tensordict))

    def _ensemble_loss(
        self, values: Tensor, target: Tensor, tensordict: TensorDictBase, *, priority: str = "square", **options: Any
    ) -> EnsembleLoss:
        """The reduced loss of ``values``, shape ``[N, *B]``, against the ``target``, and each sample's priority.

        See `fusedrl.kernels.ensemble_loss` for the options.
        """
        mask, weights = self._mask(tensordict, target), self._priority_weights(tensordict, target)
        return ensemble_loss(
            values,
            target,
            self.loss_function,
            priority=priority,
            mask=mask,
            weights=weights,
            reduction=self.reduction,
            **options,
        )

    def _write_priority(self, tensordict: TensorDictBase, td_error: Tensor) -> None:
        """Write the priority of each sample, shape ``[*B]``, 0 for padding: the last thing that a loss does."""
        priority = self._only_valid(td_error.detach(), tensordict)
        # A locked TensorDict takes no other tensor; elsewhere a stale priority may have another shape or dtype.
        locked = is_locked_at(tensordict, self.tensor_keys.priority)
        tensordict.set(self.tensor_keys.priority, priority, inplace=locked)


def _beside(column: Tensor, x: Tensor) -> Tensor:
    """A value per sample, shape ``[*B, 1]``, with as many dimensions as ``x``, with which it then broadcasts."""
    return column if x.ndim == column.ndim else widened_right(column.squeeze(-1), x)
