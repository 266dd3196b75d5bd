"""Statistics over channels, recomputed from the kept channels only.

LayerNorm, GroupNorm with few groups, weight standardisation, a mean or a maximum over channels change their
values when channels leave. What a pruned network computes is then not the network with zeroed channels, but the
one whose statistics never saw them. This mode is that reference: inside it, the marked normalisations use the
kept elements and give zero for the others, and the marked reductions see the kept channels only.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
from torch import Tensor
from torch._ops import OpOverload

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.code_lines import line_running
from pruning.engine.operator_mode import OperatorMode
from pruning.engine.operators import OPERATORS, operator_named

#: (family of operators, line of the network's code)
_Where = tuple[str | None, str]


@dataclasses.dataclass
class Statistics:
    """One normalisation or reduction over channels.

    Attributes:
        trace: Which recorded pass it belongs to (0: evaluation).
        ordinal: Its position among the operators of its family (see `family_of`) that the pass runs at the same line.
        module, operator: Where it was met.
        dim, rank: The input's dimension that carries units, and its number of dimensions.
        units: Unit of every position along `dim`.
        line: Where in the network's code; "" where there is none, and `ordinal` counts the whole family.
        times: How many operators of its family the recorded pass ran there; 0 where there is no line.
        order: Its position among all operators of its family in the pass; -1 where `ordinal` is that.
    """

    trace: int
    ordinal: int
    module: str
    operator: str
    dim: int
    rank: int
    units: np.ndarray
    line: str = ""
    times: int = 0
    order: int = -1

    def without_line(self) -> Statistics:
        """Return the same by its position in the whole pass, for files: another version of the code has other lines."""
        ordinal = self.ordinal if self.order < 0 else self.order
        return dataclasses.replace(self, ordinal=ordinal, line="", times=0, order=-1)


def family_of(operator: str) -> str | None:
    """Return the family of an operator name (`native_layer_norm`); None if the operator takes no statistics."""
    known = operator_named(operator)
    return None if known is None or known.statistics is None else known.statistics.family


class StatisticsOverKept(OperatorMode):
    """Recomputes the given statistics from the units that stay.

    They are found again by line, so that a loop that ends sooner or a branch that is not taken moves no others. What a
    loop runs more often than when it was recorded is taken as the last time that was.

    Args:
        uses: From `ChannelGraph.statistics`.
        mask: Boolean over unit ids: True for what stays.
        trace: Which recorded pass is being run.
    """

    def __init__(self, uses: Iterable[Statistics], mask: np.ndarray, trace: int = 0) -> None:
        super().__init__()
        self._counts: Counter[_Where] = Counter()
        self._kept: dict[_Where, dict[int, np.ndarray]] = {}
        self._times: dict[_Where, int] = {}
        for use in uses:
            stays = (use.units < 0) | mask[np.maximum(use.units, 0)]
            if use.trace == trace and not stays.all():
                kept = stays.reshape([-1 if d == use.dim else 1 for d in range(use.rank)])
                where = (family_of(use.operator), use.line)
                there = self._kept.setdefault(where, {})
                there[use.ordinal] = there.get(use.ordinal, True) & kept
                self._times[where] = use.times

    def restart(self) -> None:
        """Reset the counters for another pass."""
        self._counts.clear()

    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        """See `OperatorMode`."""
        known = OPERATORS.get(func)
        if known is None or known.statistics is None:
            return func(*args, **kwargs)
        kept = self._kept_at(known.statistics.family)
        if kept is not None and isinstance(args[0], Tensor):
            kept = _for_shape(kept, tuple(args[0].shape)) if kept.ndim == args[0].dim() else None
        if kept is None:
            return func(*args, **kwargs)
        return known.statistics.over_kept(func, args, kwargs, kept)

    def _kept_at(self, family: str) -> np.ndarray | None:
        """What stays of the input of the operator that is running; None where all of it does."""
        found = None
        for where in dict.fromkeys(((family, ""), (family, line_running()[0]))):
            ordinal = self._counts[where]
            self._counts[where] += 1
            if self._times.get(where):
                ordinal = min(ordinal, self._times[where] - 1)
            found = self._kept.get(where, {}).get(ordinal, found)
        return found


def _for_shape(kept: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Adapt the kept elements to a tensor of another size than in the example; None if that cannot be determined.

    Channels that were flattened with their positions get as many positions each as the current images have.
    """
    for dim, extent in enumerate(kept.shape):
        if extent in (1, shape[dim]):
            continue
        stays = kept.reshape(-1)
        each = math.gcd(extent, *(np.flatnonzero(np.diff(stays)) + 1).tolist())
        blocks = stays[::each]
        if kept.size != extent or shape[dim] % len(blocks):
            return None
        sizes = [shape[dim] if d == dim else 1 for d in range(kept.ndim)]
        kept = np.repeat(blocks, shape[dim] // len(blocks)).reshape(sizes)
    return kept
