"""What all value estimators share: keys, hyperparameter buffers, calling the value network, reading and writing.

An estimator reads reward, done and terminated under ``"next"``, obtains the values of the observation and of the
next observation from its value network, and leaves the mathematics to `fusedrl.estimators.functional`.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import dispatch
from torch import Tensor

from ..kernels.backend import check_backend
from ..kernels.checks import Scalar, as_index, broadcasts, check_positive
from .functional import widened
from .keys import KeyedEstimator, check_written, is_locked_at, under_next
from .modules import VMAP_RANDOMNESS, can_lack, device_of
from .precision import dtypes_kept
from .shifted import shifted_values
from .steps import Steps, any_right, cut, expand_right, standardize, valid_only, widened_right, without_padding
from .value_network import ValueNetwork

SHIFTED_VALID = "shifted_valid"
# What `split_trajectories` writes: False where a trajectory was padded to the length of the longest.
PADDING_MASK = ("collector", "mask")
IS_INIT = "is_init"


class Estimate(NamedTuple):
    """What an estimator writes."""

    advantage: Tensor
    value_target: Tensor
    value: Tensor
    next_value: Tensor
    valid: Tensor | None


def _of_network(name: str, doc: str) -> property:
    """A setting that is the value network's (`ValueNetwork`)."""
    return property(lambda self: getattr(self._network, name), lambda self, x: setattr(self._network, name, x), doc=doc)


class ValueEstimatorBase(KeyedEstimator):
    r"""Base of the estimators that turn rewards and values into advantages and value targets.

    A subclass says how: `_value_target`, and `_estimate` if its advantage isn't value target − value.

    Args:
        value_network: a TensorDictModule that writes the value. None: the values are in the TensorDict already.
        gamma: discount γ, a number or a tensor that broadcasts to the reward. Kept as a buffer whose dtype no
            ``.to(dtype)`` or ``.half()`` changes; a number is kept in float64. A subclass with a `forward` of its
            own may do without.
        shifted: call the network once on T + ``shifted_budget`` observations instead of 2T (see
            `fusedrl.estimators.shifted`). Steps that don't fit get advantage and value target 0 and a False under
            ``"shifted_valid"``. Only for one-step data and without ``target_params``. Values that are taken from the
            TensorDict are taken as they are.
        differentiable: let gradients through to the values of the current observations, and to the rewards. Next
            values are constants in `forward`, and ``params`` always are.
        skip_existing: take values that are present instead of calling the network. None: as
            `tensordict.nn.set_skip_existing` says.
        advantage_key, value_target_key, value_key: shorthands for `set_keys`.
        device: where γ (and λ) are put; by default where the parameters of the value network are.
        deactivate_vmap: call the network twice instead of once under `torch.vmap`, for networks that don't work there.
            One with PyTorch's recurrent layers is always called twice.
        value_chunk_size: call the network on at most so many elements of ``value_chunk_dim`` at a time.
        num_chunks: call it on so many parts of ``value_chunk_dim`` in turn. ``num_chunk`` is the same.
        value_chunk_dim: the batch dimension that is cut.
        shifted_budget: extra observations of a ``shifted`` call; 1 is enough without truncations inside.
        time_dim: the batch dimension of time. By default the one named ``"time"``, else the last.
        average_rewards: standardise the rewards over the batch before they are used.
        backend: what computes the estimate (see `fusedrl.kernels.backend`); None for the block's or process's.

    Raises:
        ValueError, TypeError: an argument that can't be used, when constructed.
        KeyError: an entry that is missing from the TensorDict, when called. It is then as it was.
        RuntimeError: shapes that differ, or a locked TensorDict, when called. It is as it was.
        NotImplementedError: a subclass doesn't say how, when called.

    Examples:
        The rewards to the end, of which those to come count a factor κ less with each step:
        target_t = r_t + γκ(1 − done_t) target_{t+1}. Any such recurrence is a `fusedrl.kernels.reverse_scan`. A loss
        takes the class, or an object of it, in ``make_value_estimator``.

        >>> from fusedrl.kernels import reverse_scan
        >>> from tensordict import TensorDict
        >>> class FadingEstimator(ValueEstimatorBase):
        ...     def __init__(self, *, kappa, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.kappa = kappa
        ...     def _value_target(self, steps, next_value, time_dim):
        ...         ends = (steps.done != 0) | (steps.terminated != 0)
        ...         coefficient = torch.where(ends, 0, self.kappa * steps.gamma)
        ...         return reverse_scan(coefficient, steps.reward, time_dim=time_dim, backend=self.backend)
        >>> zero, one = torch.zeros(3, 1), torch.ones(3, 1)
        >>> rollout = TensorDict(
        ...     {"state_value": zero, "next": {"state_value": zero, "reward": one, "done": zero}}, batch_size=[3]
        ... )
        >>> FadingEstimator(gamma=1.0, kappa=0.5, value_network=None)(rollout)["advantage"].flatten()
        tensor([1.7500, 1.5000, 1.0000])

    """

    # A one-step estimate doesn't ask where trajectories end, only which steps are terminal.
    needs_done = True

    def __init__(
        self,
        *,
        value_network: Any,
        gamma: Scalar | None = None,
        shifted: bool = False,
        differentiable: bool = False,
        skip_existing: bool | None = None,
        advantage_key: NestedKey | None = None,
        value_target_key: NestedKey | None = None,
        value_key: NestedKey | None = None,
        device: torch.device | str | None = None,
        deactivate_vmap: bool = False,
        value_chunk_size: int | None = None,
        num_chunks: int | None = None,
        num_chunk: int | None = None,
        value_chunk_dim: int = 0,
        shifted_budget: int = 1,
        time_dim: int | None = None,
        average_rewards: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(shifted, bool):
            raise ValueError(f"shifted must be True or False, but is {shifted!r}")
        check_positive("shifted_budget", shifted_budget)
        if None not in (num_chunks, num_chunk) and num_chunks != num_chunk:
            raise ValueError(f"num_chunks is {num_chunks} and num_chunk, which means the same, is {num_chunk}")
        self.shifted = shifted
        self.shifted_budget = shifted_budget
        self.differentiable = differentiable
        self.time_dim = None if time_dim is None else as_index("time_dim", time_dim)
        self.average_rewards = average_rewards
        self.backend = check_backend(backend)
        self._network = ValueNetwork(
            value_network,
            skip_existing=skip_existing,
            deactivate_vmap=deactivate_vmap,
            chunk_size=value_chunk_size,
            num_chunks=num_chunk if num_chunks is None else num_chunks,
            chunk_dim=value_chunk_dim,
        )
        device = device_of(value_network) if device is None else device
        if gamma is None and type(self).forward is ValueEstimatorBase.forward:
            raise TypeError(f"{type(self).__name__} needs gamma, or a forward of its own")
        if gamma is not None:
            self.register_buffer("gamma", as_hyperparameter("gamma", gamma, device))
        given = {"advantage": advantage_key, "value_target": value_target_key, "value": value_key}
        self.set_keys(**{name: key for name, key in given.items() if key is not None})

    @classmethod
    def for_loss(cls, loss_module: Any, **hyperparams: Any) -> "ValueEstimatorBase":
        """An estimator with the value network of ``loss_module``: its critic_network, else its value_network."""
        if "value_network" not in hyperparams:
            network = getattr(loss_module, "critic_network", None)
            hyperparams["value_network"] = getattr(loss_module, "value_network", None) if network is None else network
        # γ and λ join the parameters: from elsewhere they would be copied in every call, which no CUDA graph can hold.
        # Those of the network don't say where that is: an ensemble's holds none.
        hyperparams.setdefault("device", device_of(loss_module))
        return cls(**hyperparams)

    # -- settings ----------------------------------------------------------------------------------------------------

    @property
    def value_network(self) -> Any:
        """The value network. Its parameters are not this module's: they belong to whoever passed it."""
        return self._network.module

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "value_network":
            super().__setattr__(name, value)
            return
        # Not a setter, which a torch.nn.Module doesn't ask before it takes another for its child.
        network = self._network.calling(value)
        check_written(self._tensor_keys.value, value)
        self._network = network

    skip_existing = _of_network("skip_existing", "Whether values that are present are used instead of the network.")
    deactivate_vmap = _of_network("deactivate_vmap", "Whether the network is never called under `torch.vmap`.")

    @property
    def vmap_randomness(self) -> str:
        """How a network that draws random numbers behaves under `torch.vmap`."""
        return self._network.vmap_randomness

    def set_vmap_randomness(self, value: str) -> None:
        """Set `vmap_randomness`: ``"error"``, ``"different"`` or ``"same"``."""
        if value not in VMAP_RANDOMNESS:
            raise ValueError(f"vmap randomness is {value!r}, but must be one of {VMAP_RANDOMNESS}")
        self._network.vmap_randomness = value

    def _apply(self, fn: Any, recurse: bool = True) -> "ValueEstimatorBase":
        with dtypes_kept(self):
            super()._apply(fn, recurse)
        return self

    # -- estimates ---------------------------------------------------------------------------------------------------

    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Write advantage, value target and both values.

        Args:
            tensordict: batch size ``[*B, T]`` (see ``time_dim``), with the entries of `in_keys`. ``terminated``
                defaults to ``done``. ``steps_to_next_obs``, if there, is the n of n-step data: the discount is γⁿ.
                A False in ``("collector", "mask")``, if there, marks a padded step: the trajectory is truncated
                before it, its advantage and value target are 0, and whatever it holds enters nothing. A NaN in what
                the network reads of a next observation stands for one that wasn't stored: the current one's is read.
                Tensors given instead of it (``next_reward=...``) have as batch size the dimensions that they share.
            params: parameters of the value network, taken as constants; by default its own.
            target_params: parameters for the next values; by default ``params``.
            time_dim: the dimension of time, for this call.

        Returns:
            ``tensordict``; if called with tensors, the tuple of `out_keys`.

        """
        self._check_unlocked(tensordict)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            estimate = self._compute(tensordict, params, target_params, time_dim)
        advantage, value_target, *values = self._written()
        for key, x in zip(values, (estimate.value, estimate.next_value), strict=False):  # none without a network
            _write(tensordict, key, x)
        if estimate.valid is not None:
            tensordict.set(SHIFTED_VALID, estimate.valid)
        _write(tensordict, advantage, estimate.advantage)
        _write(tensordict, value_target, estimate.value_target)
        return tensordict

    def value_estimate(
        self,
        tensordict: TensorDictBase,
        target_params: TensorDictBase | None = None,
        next_value: Tensor | None = None,
        time_dim: int | None = None,
        continuation: Tensor | None = None,
        *,
        params: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The value target alone, with gradients to next values and rewards; ``tensordict`` is left as it is.

        Args:
            tensordict: as in `forward`; current observations aren't needed.
            target_params: parameters of the value network for the next values; by default its own.
            next_value: the next values, instead of the network's.
            time_dim: the dimension of time, for this call.
            continuation: the reward's shape; how likely it is that the trajectory goes on after the step, as a world
                model predicts it. It multiplies the discount, with gradients.
            params: those of the values of the current observations, which aren't needed here: nothing reads them.
            kwargs: passed to the value network.

        """
        dim = self._time_dim(tensordict, time_dim)
        steps = self._steps(tensordict, dim)
        if continuation is not None:
            steps = steps._replace(gamma=steps.gamma * continuation)
        key = self._tensor_keys.value
        if next_value is None:
            inputs = self._next_inputs(tensordict, steps)
            try:
                next_value = self._network.value(inputs, key, target_params, **kwargs)
            except KeyError as error:
                raise self._lacking(error, (inputs, "next")) from error
        self._check_value(under_next(key), next_value, steps)
        (next_value,) = valid_only(steps, next_value)
        (value_target,) = valid_only(steps, self._value_target(steps, next_value, dim))
        return value_target

    def _value_target(self, steps: Steps, next_value: Tensor, time_dim: int) -> Tensor:
        """The value target of each step."""
        raise NotImplementedError(
            f"{type(self).__name__} doesn't say what its value target is: it needs a method _value_target"
        )

    def _estimate(self, steps: Steps, value: Tensor, next_value: Tensor, time_dim: int) -> tuple[Tensor, Tensor]:
        """Advantage and value target of each step."""
        reward, dtype = widened(steps.reward, value, next_value)
        value_target = self._value_target(steps._replace(reward=reward), next_value, time_dim)
        return (value_target - value).to(dtype), value_target.to(dtype)

    def _compute(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
        time_dim: int | None,
        **kwargs: Any,
    ) -> Estimate:
        dim = self._time_dim(tensordict, time_dim)
        steps = self._steps(tensordict, dim)
        value, next_value, fitted = self._values(tensordict, steps, dim, params, target_params, **kwargs)
        steps = self._per_value(steps, value)
        key = self._tensor_keys.value
        self._check_value(key, value, steps)
        self._check_value(under_next(key), next_value, steps)
        if fitted is not None:
            steps = cut(steps, fitted, dim)
        valid_value, valid_next_value = valid_only(steps, value, next_value.detach())
        estimate = self._estimate(steps, valid_value, valid_next_value, dim)
        advantage, value_target = valid_only(steps, *estimate)
        return Estimate(advantage, value_target, value, next_value, fitted)

    def _written(self) -> list[NestedKey]:
        """The entries that `forward` writes: advantage and value target, and the values that a network gives."""
        keys = self._tensor_keys
        values = [] if self.value_network is None else [keys.value, under_next(keys.value)]
        return [keys.advantage, keys.value_target, *values]

    def _check_unlocked(self, tensordict: TensorDictBase) -> None:
        for key in self._written():
            if is_locked_at(tensordict, key):
                raise RuntimeError(
                    f"{type(self).__name__} writes the entry {key!r}, but the TensorDict is locked there: unlock it"
                )

    # -- reading -----------------------------------------------------------------------------------------------------

    def _time_dim(self, tensordict: TensorDictBase, time_dim: int | None) -> int:
        ndim = tensordict.ndim
        if ndim == 0:
            raise RuntimeError(
                f"{type(self).__name__} needs a TensorDict with a batch dimension, for time; this one has batch size ()"
            )
        dim = self.time_dim if time_dim is None else time_dim
        if dim is None:
            names = tensordict.names
            return names.index("time") if "time" in names else ndim - 1
        if not -ndim <= as_index("time_dim", dim) < ndim:
            raise IndexError(f"time_dim is {dim}, but the TensorDict has batch size {tuple(tensordict.batch_size)}")
        return dim % ndim

    def _steps(self, tensordict: TensorDictBase, time_dim: int) -> Steps:
        keys = self._tensor_keys
        reward, done, terminated = self._signals(tensordict)
        for key, mask in ((keys.done, done), (keys.terminated, terminated)):
            self._check_mask(key, mask, reward)
        steps = Steps(reward, done, terminated, self._discount(tensordict, reward))
        mask = tensordict.get(PADDING_MASK, None)
        if mask is not None:
            steps = cut(steps, any_right(mask != 0, tensordict.ndim), time_dim)
            steps = steps._replace(reward=valid_only(steps, reward)[0])
        return steps._replace(reward=standardize(steps.reward, steps.valid)) if self.average_rewards else steps

    def _check_mask(self, key: NestedKey, mask: Tensor, reward: Tensor) -> None:
        if mask.shape != reward.shape:
            raise RuntimeError(
                f"{under_next(key)} has shape {tuple(mask.shape)}, but {under_next(self._tensor_keys.reward)} has "
                f"shape {tuple(reward.shape)}: both must agree"
            )

    def _signals(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Reward, done and terminated."""
        keys = self._tensor_keys
        reward = self._get(tensordict, under_next(keys.reward), "reward")
        terminated = tensordict.get(under_next(keys.terminated), None)
        done = tensordict.get(under_next(keys.done), None)
        if done is None:
            if self.needs_done or terminated is None:
                raise self._missing(under_next(keys.done), "done")
            done = terminated
        return reward, done, done if terminated is None else terminated

    def _per_value(self, steps: Steps, value: Tensor) -> Steps:
        """``steps`` in the shape of the ``value``; a value of another shape is refused afterwards."""
        return steps

    def _discount(self, tensordict: TensorDictBase, reward: Tensor) -> Tensor:
        """γ, or γⁿ per step for n-step data."""
        n = tensordict.get(self._tensor_keys.steps_to_next_obs, None)
        if n is None:
            return self.gamma
        if self.shifted:
            raise ValueError(
                f"shifted=True takes the next observation of a step for the following step's observation, but the "
                f"entry {self._tensor_keys.steps_to_next_obs!r} says that this is n-step data: use shifted=False"
            )
        if not broadcasts(widened_right(n, reward).shape, reward.shape):
            raise RuntimeError(
                f"{self._tensor_keys.steps_to_next_obs!r} has shape {tuple(n.shape)}, but "
                f"{under_next(self._tensor_keys.reward)} has shape {tuple(reward.shape)}: both must agree"
            )
        return self.gamma ** expand_right(n, reward)

    def _values(
        self,
        tensordict: TensorDictBase,
        steps: Steps,
        time_dim: int,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, next values, and which steps fitted into a shifted call (None: all)."""
        if params is None and target_params is not None:
            raise ValueError("target_params are given without params: give both, or neither")
        if self.shifted and target_params is not None:
            raise ValueError("shifted=True calls the value network once, so it can't have target_params of its own")
        key = self._tensor_keys.value
        data = without_padding(self._inputs(tensordict), steps, self._network.in_keys)
        next_data = self._next_inputs(tensordict, steps, fill=self.shifted)
        params = None if params is None else params.detach()
        next_params = params if target_params is None else target_params
        valid = None
        stored = all(x.get(key, None) is not None for x in (data, next_data))
        try:
            if self.shifted and not stored:
                truncated = any_right((steps.done != 0) & (steps.terminated == 0), tensordict.ndim)
                value, next_value, valid = shifted_values(
                    partial(self._network.value, value_key=key, params=params, **kwargs),
                    data,
                    next_data,
                    truncated,
                    time_dim,
                    self.shifted_budget,
                )
            else:
                value, next_value = self._network.both(data, next_data, key, params, next_params, **kwargs)
        except KeyError as error:
            raise self._lacking(error, (data, ""), (next_data, "next")) from error
        return value, next_value, valid

    def _inputs(self, tensordict: TensorDictBase, prefix: str = "") -> TensorDictBase:
        """What the value network reads, or the value if that is there and to be used; ``prefix`` is for the error.

        The network may do without an input, as recurrent ones do without a hidden state: see `_lacking`.
        """
        value_key = self._tensor_keys.value
        if self._network.skips() and tensordict.get(value_key, None) is not None:
            return tensordict.select(value_key)
        if self.value_network is None:
            raise self._missing(unravel_key((prefix, value_key)) if prefix else value_key, "value")
        return tensordict.select(*self.value_network.in_keys, strict=False)

    def _next_inputs(self, tensordict: TensorDictBase, steps: Steps, *, fill: bool = False) -> TensorDictBase:
        """What the value network reads of the next observations, made finite where there is none.

        A terminal step's next value is never read, but NaN or inf there would reach the gradients through the
        network: 0 · NaN is NaN. A NaN elsewhere stands for a next observation that wasn't stored; the current
        observation takes its place, as a constant. With ``fill``, so it does where there is no entry at all: a
        shifted call reads the next observations of the steps that end a trajectory, and of no others.
        """
        source = tensordict.get("next").copy()
        inputs = self._network.in_keys
        if IS_INIT in inputs:
            # The next observations form trajectories of their own, which start (also) where those of the observations
            # do; inserted into a shifted call they continue a trajectory.
            is_init = self._get(tensordict, IS_INIT)
            starts = is_init | source.get(IS_INIT, is_init)
            source.set(IS_INIT, torch.zeros_like(is_init) if self.shifted else starts)
        for key in inputs if fill else ():
            current = tensordict.get(key, None)
            if current is not None and source.get(key, None) is None:
                source.set(key, current.detach())
        data = self._inputs(source, "next")
        data.batch_size = tensordict.batch_size
        terminal = any_right(steps.terminated != 0, tensordict.ndim)
        for key in inputs:
            x = data.get(key, None)
            if isinstance(x, Tensor) and x.is_floating_point():
                absent = x.isnan() | (expand_right(terminal, x) & x.isinf())
                current = tensordict.get(key, None)
                if current is not None and current.shape != x.shape:
                    raise RuntimeError(
                        f"{under_next(key)} has shape {tuple(x.shape)}, but {key!r} has shape {tuple(current.shape)}: "
                        "both must agree"
                    )
                data.set(key, torch.where(absent, 0 if current is None else current.detach(), x))
        return without_padding(data, steps, inputs)

    def _check_value(self, key: NestedKey, value: Tensor, steps: Steps) -> None:
        if value.shape != steps.reward.shape:
            raise RuntimeError(
                f"{key!r} has shape {tuple(value.shape)}, but {under_next(self._tensor_keys.reward)} has shape "
                f"{tuple(steps.reward.shape)}: both must agree"
            )

    def _lacking(self, error: KeyError, *inputs: tuple[TensorDictBase, str]) -> KeyError:
        """What to say of an ``error`` of the network: the first input it lacks; without one, it is raised again.

        Not such as it can do without: then the error is about something else.
        """
        for data, prefix in inputs:
            for key in self._network.in_keys if data.get(self._tensor_keys.value, None) is None else ():
                if data.get(key, None) is None and not can_lack(self.value_network, key):
                    return self._missing(unravel_key((prefix, key)) if prefix else key, None)
        raise error


def as_hyperparameter(name: str, x: Scalar, device: torch.device | str | None) -> Tensor:
    """γ or λ as a buffer: numbers in float64, tensors in the floating dtype they have; see `owned`.

    Raises:
        TypeError: it is neither; the message has its ``name``.

    """
    if isinstance(x, Tensor) and x.is_floating_point():
        return owned(x, device)
    try:
        return owned(torch.as_tensor(x, dtype=torch.float64), device)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a tensor, but is {x!r}") from None


def owned(x: Tensor, device: torch.device | str | None) -> Tensor:
    """What a module holds of the caller's ``x``: a copy, since to assign a coefficient or load a state writes it.

    One that requires grad is held itself: whoever optimises it means this very tensor.
    """
    return x.to(device) if x.requires_grad else x.to(device, copy=True)


def _write(tensordict: TensorDictBase, key: NestedKey, x: Tensor) -> None:
    """Set an entry, also beside those of a nested TensorDict whose batch size is all that they share.

    Such a batch size, with dimensions of features in it, is what `dispatch` gives a single entry.
    """
    path = (key,) if isinstance(key, str) else key
    for depth in range(1, len(path)):
        parent = tensordict.get(path[:depth], None)
        if parent is not None and x.shape[: parent.ndim] != parent.batch_size:
            parent.batch_size = tensordict.batch_size
    tensordict.set(key, x)
