"""Matching of classes by name, between a data set and a network's logits or between splits.

An index means nothing by itself: a renamed folder shifts every class after it in the alphabet. So names are compared,
and if they are the same, or a subset, in another order, the labels are renumbered. Only ImageNet has two sets of names,
WordNet IDs and words; both are listed in the order of the IDs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from image_classification.config import nearest

_SHOWN = 5
_WORDNET = re.compile(r"n\d{8}")
_NUM_IMAGENET = 1000


def positions(
    names: Sequence[str], known: Sequence[str], *, data: str, source: str, remedy: str
) -> list[int]:
    """Return the position of each of `names` in `known`.

    Args:
        names: Names of the data's classes.
        known: Names of the target classes, in order.
        data, source: Their origins, for the message.
        remedy: What to do otherwise, for the message.

    Raises:
        ValueError: A name is not known.
    """
    if _are_numbers_of(names, known):
        return list(range(len(names)))
    index = {name: number for number, name in enumerate(known)}
    unknown = [name for name in names if name not in index]
    if unknown:
        missing = [name for name in known if name not in set(names)]
        raise ValueError(
            f"{data}: {len(unknown)} of its {len(names)} classes are not among the {len(known)} of {source}: "
            f"{_some(unknown)}{nearest(unknown[0], missing)} ({source} has {_some(missing or known)} besides). {remedy}"
        )
    return [index[name] for name in names]


def difference(names: Sequence[str], known: Sequence[str]) -> str | None:
    """Describe how the classes of `names` differ from `known`, which contains them all; None if they are equal."""
    if tuple(names) == tuple(known):
        return None
    if _are_numbers_of(names, known):
        return "the data names them by WordNet's numbers; they go by their order"
    if len(names) < len(known):
        return f"{len(names)} of its {len(known)} classes occur in the data"
    return "the data has its classes in another order, and labels are renumbered by name"


def _are_numbers_of(names: Sequence[str], known: Sequence[str]) -> bool:
    """Whether both have as many classes as ImageNet, one named by WordNet numbers and the other by words."""
    if len(names) != len(known) or len(names) != _NUM_IMAGENET:
        return False
    numbered = [all(_WORDNET.fullmatch(name) for name in each) for each in (names, known)]
    return numbered in ([True, False], [False, True])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
