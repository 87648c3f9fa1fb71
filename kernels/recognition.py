"""Recognises arguments whose form was met before, so that what depends on the form alone is found out once.

What a call does before it launches (compare shapes, look for modes and subclasses, choose tiles) takes longer than the
launch, and nearly every call brings arguments of the form that the one before had.
"""

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

try:  # what `torch.compile` guards its code with: one call into C++ for all tensors
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # then nothing is recognised
    TensorGuards = None  # type: ignore[assignment, misc]

_MOST_FORMS = 8  # of one setting: looking through them must take less than finding out anew
_MOST_SETTINGS = 1024


class Recognition:
    """What was found out about arguments, kept for others of the same form.

    The form is the type of each argument, which of them are one tensor, and of each tensor shape, strides, dtype,
    device, whether it requires a gradient, and the keys that its operators are dispatched by, those that modes and
    transforms add among them. The value of a number isn't part of it. No tensor is kept.
    """

    def __init__(self) -> None:
        self._of_kinds: dict[tuple[type, ...], _OfKinds] = {}

    def __call__(self, setting: Hashable, arguments: Sequence[Any]) -> tuple[tuple[Tensor, ...], Any]:
        """The tensors among the arguments, and what was found out about such with the same ``setting``, or None."""
        of_kinds = self._of_kinds.get(tuple(map(type, arguments))) or self._new_kinds(arguments)
        tensors = of_kinds.tensors(arguments)
        for is_form_of, found in of_kinds.forms.get(setting, ()):
            if is_form_of(*tensors):
                return tensors, found
        if _repeats(tensors):  # which no form is of
            setting, distinct = _without_repetitions(setting, tensors)
            for is_form_of, found in of_kinds.forms.get(setting, ()):
                if is_form_of(*distinct):
                    return tensors, found
        return tensors, None

    def remember(self, setting: Hashable, arguments: Sequence[Any], found: Any) -> None:
        """Keep what was found out about arguments of this form, the latest few of each setting."""
        if TensorGuards is None:
            return
        of_kinds = self._of_kinds.get(tuple(map(type, arguments))) or self._new_kinds(arguments)
        tensors = of_kinds.tensors(arguments)
        if _repeats(tensors):
            setting, tensors = _without_repetitions(setting, tensors)
        if len(of_kinds.forms) >= _MOST_SETTINGS:
            of_kinds.forms.clear()
        form = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # crashes without them
        of_kinds.forms[setting] = ((form, found), *of_kinds.forms.get(setting, ())[: _MOST_FORMS - 1])

    def _new_kinds(self, arguments: Sequence[Any]) -> "_OfKinds":
        """Get ready for arguments of these types."""
        tensors = items([i for i, x in enumerate(arguments) if isinstance(x, Tensor)])
        found = self._of_kinds[tuple(map(type, arguments))] = _OfKinds(tensors, {})
        return found


class _OfKinds(NamedTuple):
    """For arguments of the same types: what picks the tensors, and the forms that were met, latest first."""

    tensors: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    forms: dict[Hashable, tuple[tuple[Callable[..., bool], Any], ...]]


def _repeats(tensors: Sequence[Tensor]) -> bool:
    return len(set(map(id, tensors))) < len(tensors)


def _without_repetitions(setting: Hashable, tensors: Sequence[Tensor]) -> tuple[Hashable, tuple[Tensor, ...]]:
    """The distinct ones of the ``tensors``, and the ``setting`` with the places of all among them."""
    distinct = {id(x): x for x in tensors}
    places = {key: place for place, key in enumerate(distinct)}
    return (setting, tuple([places[id(x)] for x in tensors])), tuple(distinct.values())


def items(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that gives what is at the ``places`` of a sequence, without a loop."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda sequence: tuple([sequence[i] for i in places])
