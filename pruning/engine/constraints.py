"""The user's constraints on widths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from image_classification.config import SettingError, check_setting

#: Least share of its channels that a group keeps, as in Kung & Hou (2020, Commun. Inf. Syst. 20(3)).
DEFAULT_MIN_WIDTH = 0.1


@dataclasses.dataclass(frozen=True)
class Constraints:
    """The user's constraints on widths.

    Attributes:
        round_to: Pruned widths are multiples of this many channels (hardware likes 8). A group may also keep its
            original width, whatever that is.
        min_width: Units that every group keeps: a count, or a share if below 1.
        ignored: Name patterns (`layer4.*`) of modules whose own channels stay (what they read may shrink).
        limits: Name pattern of groups or modules (as `ignored`) to the units, count or share, that their groups
            keep at least.
        pairs: Names of two submodules that are cut alike, such as a network and its momentum teacher. A copy that takes
            no gradients is recognised automatically.
    """

    round_to: int = 1
    min_width: float = DEFAULT_MIN_WIDTH
    ignored: tuple[str, ...] = ()
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        whole = self.round_to >= 1 and self.round_to == int(self.round_to)
        check_setting(whole, "round_to", self.round_to, "give a whole number ≥ 1")
        for name in ("ignored", "limits"):
            if isinstance(getattr(self, name), str):
                raise SettingError(name, getattr(self, name), "give a sequence of patterns, not one string")
        _check_least("min_width", self.min_width, str(self.min_width))
        for pattern, least in self.limits.items():
            _check_least("limits", least, f"{pattern}={least}")


def _check_least(setting: str, least: float, given: str) -> None:
    """Refuse a value that is neither a share nor a count.

    Raises:
        SettingError: The value is invalid; the message quotes `given`, the user's input.
    """
    possible = 0 < least < math.inf and (least <= 1 or least == int(least))
    check_setting(possible, setting, given, "give a share in (0, 1) or a whole number ≥ 1")


#: No demands: groups may shrink to one unit.
UNCONSTRAINED = Constraints(min_width=1)
