"""What the values of a pass decide (an order, a mask, a path), so that another pass can decide alike.

The cut network sums fewer terms than the masked one, so its scores differ in the last digits, and a detector that sorts
its boxes by them may take two in the other order. With the decisions of the masked network the rest can be compared,
provided that each was made on the same values up to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.operator_mode import OperatorMode
from pruning.engine.traces import JUMPS

#: Of the arguments of a decision, in which a logarithm or a small difference may magnify rounding. All that modules and
#: the network give is compared more strictly.
_TOLERANCE = 1e-2
_MOST_NUMBERS = (
    1 << 20
)  # of an operator's arguments; larger ones are masks of activations, and are not stored
_WITH_PLACES = (
    "max_pool",
    "adaptive_max_pool",
    "fractional_max_pool",
)  # which only their backward pass reads


@dataclasses.dataclass(frozen=True)
class Decision:
    """An operator that decides, with copies of its arguments (in a row, as PyTree orders them) and of its result."""

    func: OpOverload
    given: list[object]
    result: Outputs


class Decisions(OperatorMode):
    """Notes the decisions of a pass, or replaces them by those of another.

    Args:
        others: Decisions to follow; None: the pass decides by itself.

    Attributes:
        taken: The decisions, if it decided by itself.
        followed: Whether it met the others' decisions only, on the same values up to rounding.
    """

    def __init__(self, others: Sequence[Decision] | None = None) -> None:
        super().__init__()
        self.taken: list[Decision] = []
        self.followed = True
        self._others = None if others is None else list(reversed(others))

    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        """See `OperatorMode`."""
        result = func(*args, **kwargs)
        if not _decides(func, result):
            return result
        given = tree_leaves((args, kwargs))
        real = [leaf for leaf in given if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not real or max(leaf.numel() for leaf in real) > _MOST_NUMBERS:
            return result
        with _disable_current_modes():  # what follows is no step of the network
            if self._others is not None:
                return self._as_others(func, given, result)
            self.taken.append(Decision(func, [_copied(leaf) for leaf in given], tree_map(_copied, result)))
            return result

    def _as_others(self, func: OpOverload, given: list[object], result: Outputs) -> Outputs:
        other = self._others.pop() if self._others else None
        if other is None or other.func is not func or len(other.given) != len(given):
            self.followed = False
        elif [_shape(leaf) for leaf in other.given] == [_shape(leaf) for leaf in given]:
            self.followed = self.followed and all(map(_is_close, other.given, given))
            return tree_map(_copied, other.result)
        return result  # of channels, of which there are fewer now


def _decides(func: OpOverload, result: Outputs) -> bool:
    """Whether an operator's result may jump where its arguments barely change."""
    name = func.overloadpacket.__name__
    if func._schema.is_mutable or name.startswith(_WITH_PLACES):
        return False
    if name in JUMPS:
        return True
    return any(
        not (leaf.is_floating_point() or leaf.is_complex()) if isinstance(leaf, Tensor) else leaf is not None
        for leaf in tree_leaves(result)
    )


def _copied(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _shape(leaf: object) -> object:
    return leaf.shape if isinstance(leaf, Tensor) else None


def _is_close(left: object, right: object) -> bool:
    """Whether two arguments are the same up to rounding, measured by the largest number of the first."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return left == right
    if not left.is_floating_point():
        return torch.equal(left, right)
    apart = (left != right) & ~(left.isnan() & right.isnan())
    if not bool(apart.any()):
        return True
    largest = left[left.isfinite()].abs().max()
    return bool((left - right)[apart].abs().max() <= _TOLERANCE * largest)
