"""What an ``action_space`` argument means: how a discrete action is written, and which values belong to it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .functional.q_learning import greedy_binary_value, greedy_value, value_of_index, value_of_parts

_ACCEPTED = "'one-hot', 'mult-one-hot', 'binary', 'categorical' or a spec of one of these"
# By the name of the spec's class: the library works without the package that has them.
_SPECS = {"OneHot": "one_hot", "MultiOneHot": "mult_one_hot", "Binary": "binary", "Categorical": "categorical"}


@dataclass(frozen=True)
class ActionSpace:
    """How a discrete action is written, by ``name``.

    ================  ===============================================================================
    ``one_hot``       shape ``[*B, actions]``, one element set
    ``mult_one_hot``  the one-hot actions of several ``heads``, one after the other; values add up
    ``binary``        shape ``[*B, parts]``, any elements set; values of the parts that are add up
    ``categorical``   its index, shape ``[*B]`` or ``[*B, 1]``
    ================  ===============================================================================

    ``heads`` is the number of actions of each head. In the methods ``action_value`` has shape ``[*B, actions]``.
    """

    name: str
    heads: tuple[int, ...] | None = None

    def value(self, action_value: Tensor, action: Tensor) -> Tensor:
        """Q(s, a) of an action, shape ``[*B]``.

        Raises:
            RuntimeError: the shapes don't fit.

        """
        if self.name == "categorical":
            return value_of_index(action_value, self.index(action_value, action))
        self._check_parts(action_value, action)
        return value_of_parts(action_value, action)

    def greedy_value(self, action_value: Tensor, choosing_value: Tensor | None = None) -> Tensor:
        """Q(s, a*) of the greedy action by ``choosing_value`` (None: by ``action_value``), shape ``[*B]``.

        Raises:
            RuntimeError: the values are not as many as the actions of all heads.

        """
        choosing_value = action_value if choosing_value is None else choosing_value
        if self.name == "binary":
            return greedy_binary_value(action_value, choosing_value)
        return greedy_value(action_value, choosing_value, self.heads)

    def index(self, action_value: Tensor, action: Tensor) -> Tensor:
        """The index of an action, shape ``[*B]``.

        Raises:
            RuntimeError: the shapes don't fit.
            ValueError: an action of this space is more than one choice.

        """
        if self.name == "one_hot":
            self._check_parts(action_value, action)
            return (action != 0).byte().argmax(-1)  # byte: booleans have no largest
        if self.name != "categorical":
            raise ValueError(f"an action of the action space {self.name!r} is more than one choice: it has no index")
        batch = action_value.shape[:-1]
        if action.shape not in (batch, (*batch, 1)):
            raise RuntimeError(
                f"the action (categorical) has shape {tuple(action.shape)}, but the values of the actions have shape "
                f"{tuple(action_value.shape)}: one index per sample is wanted"
            )
        return action.reshape(batch)

    def _check_parts(self, action_value: Tensor, action: Tensor) -> None:
        if action.shape != action_value.shape:
            raise RuntimeError(
                f"the action ({self.name}) has shape {tuple(action.shape)}, but the values of the actions have shape "
                f"{tuple(action_value.shape)}: both must agree"
            )


def find_action_space(action_space: Any, network: nn.Module | None = None, *, one_choice: bool = False) -> ActionSpace:
    """The action space that an argument ``action_space`` means, or that ``network`` says if that is None.

    Args:
        action_space: ``"one-hot"``, ``"mult-one-hot"``, ``"binary"`` or ``"categorical"``, with hyphens or
            underscores; or a spec: OneHot, MultiOneHot, Binary, Categorical, or a Composite with a leaf ``"action"``.
        network: a network one of whose modules has an attribute ``action_space`` (and for several heads ``var_nums``,
            the number of actions of each), as TorchRL's Q-value modules do.
        one_choice: an action must be one of those that there are values of.

    Raises:
        ValueError: it is something else; more than one choice, though ``one_choice``; or of several heads, and nobody
            says how many actions each has.

    Examples:
        >>> find_action_space("one-hot")
        ActionSpace(name='one_hot', heads=None)

    """
    modules = [] if network is None else list(network.modules())
    if action_space is None:
        found = (getattr(module, "action_space", None) for module in modules)
        action_space = next((space for space in found if space is not None), None)
        if action_space is None:
            raise ValueError(f"action_space is not given, and the network doesn't say; it can be {_ACCEPTED}")
    spec = None if isinstance(action_space, str) else _leaf(action_space)
    name = _normalised(action_space) if spec is None else _name_of(spec)
    if one_choice and name not in ("one_hot", "categorical"):
        raise ValueError(
            f"action_space is {name!r}, but an action must be one choice, which 'one-hot' and 'categorical' can write"
        )
    if name != "mult_one_hot":
        return ActionSpace(name)
    heads = getattr(spec, "nvec", None)
    if heads is None:
        heads = next((n for n in (getattr(module, "var_nums", None) for module in modules) if n is not None), None)
    if heads is None:
        raise ValueError(
            "the action space 'mult_one_hot' leaves open how many actions each head has: give a MultiOneHot spec, or "
            "var_nums to the network's QValueModule"
        )
    return ActionSpace(name, tuple(int(n) for n in heads))


def _normalised(name: str) -> str:
    normalised = name.replace("-", "_").replace("multi_", "mult_")
    if normalised not in _SPECS.values():
        raise ValueError(f"action_space is {name!r}; it can be {_ACCEPTED}")
    return normalised


def _leaf(spec: Any) -> Any:
    """The spec of the action in a Composite; any other spec as it is."""
    if type(spec).__name__ != "Composite":
        return spec
    for key in spec.keys(True, True):
        if key == "action" or key[-1] == "action":
            return spec[key]
    raise ValueError(f"action_space is a Composite without a leaf 'action': {spec!r}")


def _name_of(spec: Any) -> str:
    names = [cls.__name__ for cls in type(spec).__mro__]
    # A MultiCategorical is a Categorical to Python, but not one index per sample.
    found = None if "MultiCategorical" in names else next((_SPECS[name] for name in names if name in _SPECS), None)
    if found is None:
        raise ValueError(f"action_space is a {type(spec).__name__}; it can be {_ACCEPTED}")
    return found
