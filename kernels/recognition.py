"""Recognises arguments whose form was met before, so that what depends on the form alone is found out once.

What a call does before it launches (compare shapes, look for modes and subclasses, choose tiles) takes longer than the
launch, and nearly every call brings arguments of the form that the one before had.
"""

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

try:  # what `torch.compile` guards its code with: one call into C++ for all tensors
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # then nothing is recognised
    TensorGuards = None  # type: ignore[assignment, misc]

_MOST_FORMS = 8  # of one setting: looking through them must take less than finding out anew
_MOST_SETTINGS = 1024
_KINDS = frozenset((Tensor, Parameter, float, int, bool, str, list, type(None)))


class Recognition:
    """What was found out about arguments, kept for others of the same form.

    The form is the type of each argument, which of them are one tensor, and of each tensor shape, strides, dtype,
    device, whether it requires a gradient, and the keys that its operators are dispatched by, those that modes and
    transforms add among them. The value of a number isn't part of it. No tensor is kept. Tensors of a subclass, and
    such as have no strides, are not recognised, and neither are arguments of uncommon types.
    """

    def __init__(self) -> None:
        self._of_kinds: dict[tuple[type, ...], _OfKinds] = {}

    def __call__(self, setting: Hashable, arguments: Sequence[Any]) -> tuple[tuple[Tensor, ...], Any]:
        """The tensors among the arguments, and what was found out about such with the same ``setting``, or None."""
        of_kinds = self._of_kinds.get(tuple(map(type, arguments)))
        if of_kinds is None:
            return tuple([x for x in arguments if isinstance(x, Tensor)]), None
        tensors = of_kinds.tensors(arguments)
        for is_form_of, found in of_kinds.forms.get(setting, ()):
            if is_form_of(*tensors):
                return tensors, found
        if _repeats(tensors):  # the forms are of distinct tensors, and the setting says which of them come twice
            setting, distinct = _without_repetitions(setting, tensors)
            for is_form_of, found in of_kinds.forms.get(setting, ()):
                if is_form_of(*distinct):
                    return tensors, found
        return tensors, None

    def remember(self, setting: Hashable, arguments: Sequence[Any], found: Any) -> None:
        """Keep what was found out about arguments of this form (not None), the latest few of each setting."""
        kinds = tuple(map(type, arguments))
        tensors: Sequence[Tensor] = [x for x in arguments if isinstance(x, Tensor)]
        if TensorGuards is None or not _KINDS.issuperset(kinds) or not all(map(_has_strides, tensors)):
            return
        of_kinds = self._of_kinds.get(kinds)
        if of_kinds is None:
            places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
            of_kinds = self._of_kinds[kinds] = _OfKinds(items(places), {})
        if _repeats(tensors):
            setting, tensors = _without_repetitions(setting, tensors)
        if len(of_kinds.forms) >= _MOST_SETTINGS:
            of_kinds.forms.clear()
        # Without the two keywords it crashes.
        is_form_of = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        of_kinds.forms[setting] = ((is_form_of, found), *of_kinds.forms.get(setting, ())[: _MOST_FORMS - 1])


class _OfKinds(NamedTuple):
    """For arguments of the same types: what picks the tensors, and the forms that were met, latest first."""

    tensors: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    forms: dict[Hashable, tuple[tuple[Callable[..., bool], Any], ...]]


def _has_strides(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested


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
