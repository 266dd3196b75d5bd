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
from torch.utils._python_dispatch import TorchDispatchMode

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.operators import OPERATORS, operator_named


@dataclasses.dataclass
class Statistics:
    """One normalisation or reduction over channels.

    Attributes:
        trace: Which recorded pass it belongs to (0: evaluation).
        ordinal: Its position among the operators of its family (see `family_of`) in the pass.
        module, operator: Where it was met.
        dim, rank: The input's dimension that carries units, and its number of dimensions.
        units: Unit of every position along `dim`.
    """

    trace: int
    ordinal: int
    module: str
    operator: str
    dim: int
    rank: int
    units: np.ndarray


def family_of(operator: str) -> str | None:
    """Return the family of an operator name (`native_layer_norm`); None if the operator takes no statistics."""
    known = operator_named(operator)
    return None if known is None or known.statistics is None else known.statistics.family


class StatisticsOverKept(TorchDispatchMode):
    """Recomputes the given statistics from the units that stay.

    Args:
        uses: From `ChannelGraph.statistics`.
        mask: Boolean over unit ids: True for what stays.
        trace: Which recorded pass is being run.
    """

    def __init__(self, uses: Iterable[Statistics], mask: np.ndarray, trace: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._counts: Counter[str] = Counter()
        self._kept: dict[tuple[str | None, int], np.ndarray] = {}
        for use in uses:
            stays = (use.units < 0) | mask[np.maximum(use.units, 0)]
            if use.trace == trace and not stays.all():
                kept = stays.reshape([-1 if d == use.dim else 1 for d in range(use.rank)])
                key = (family_of(use.operator), use.ordinal)
                self._kept[key] = self._kept.get(key, True) & kept

    def restart(self) -> None:
        """Reset the counters for another pass."""
        self._counts.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip Dynamo: importing it takes seconds, and it would leave this mode uncompiled anyway."""
        return False

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Outputs:
        kwargs = kwargs or {}
        known = OPERATORS.get(func)
        if known is None or known.statistics is None:
            return func(*args, **kwargs)
        family = known.statistics.family
        kept = self._kept.get((family, self._counts[family]))
        self._counts[family] += 1
        if kept is not None and isinstance(args[0], Tensor):
            kept = _for_shape(kept, tuple(args[0].shape))
        if kept is None:
            return func(*args, **kwargs)
        return known.statistics.over_kept(func, args, kwargs, kept)


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
