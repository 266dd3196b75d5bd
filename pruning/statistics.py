"""Statistics over channels, recomputed from the kept channels only.

LayerNorm, GroupNorm with few groups, weight standardisation, a mean or a maximum over channels change their
values when channels leave. What a pruned network computes is then not the network with zeroed channels, but the
one whose statistics never saw them. This mode is that reference: inside it, the marked normalisations use the
kept elements and give zero for the others, and the marked reductions see the kept channels only.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


NORMALISATION, REDUCTION = "normalisation", "reduction"
_NORMALISATIONS = ("layer_norm", "group_norm", "batch_norm", "rms_norm")
REDUCTIONS = frozenset(
    {
        "mean",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "logsumexp",
        "linalg_vector_norm",
        "norm",
    }
)


def family_of(operator: str) -> str | None:
    """The family that an operator counts in, by its name (`native_layer_norm`); None if in neither."""
    if any(kind in operator for kind in _NORMALISATIONS):
        return NORMALISATION
    return REDUCTION if operator in REDUCTIONS else None


class StatisticsOverKept(TorchDispatchMode):
    """Recomputes the given statistics from the units that stay.

    Args:
        uses: From `ChannelGraph.statistics`.
        mask: Boolean over unit ids: True for what stays.
        trace: Which recorded pass is being run.
    """

    def __init__(self, uses: Iterable[Statistics], mask: np.ndarray, trace: int = 0) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()
        self._kept: dict[tuple[str | None, int], np.ndarray] = {}
        for use in uses:
            stays = (use.units < 0) | mask[np.maximum(use.units, 0)]
            if use.trace == trace and not stays.all():
                kept = stays.reshape([-1 if d == use.dim else 1 for d in range(use.rank)])
                key = (family_of(use.operator), use.ordinal)
                self._kept[key] = self._kept.get(key, True) & kept

    def restart(self) -> None:
        """Begin another pass."""
        self._counts.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        family = family_of(func.overloadpacket.__name__)
        if family is None:
            return func(*args, **kwargs)
        kept = self._kept.get((family, self._counts[family]))
        self._counts[family] += 1
        if kept is None:
            return func(*args, **kwargs)
        if family == REDUCTION:
            return func(_only_kept(args[0], kept), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        named = {argument.name: argument.default_value for argument in func._schema.arguments}
        named.update(zip([argument.name for argument in func._schema.arguments], args, strict=False))
        named.update(kwargs)
        first = result[0] if isinstance(result, (tuple, list)) else result
        first.copy_(
            _normalise_kept(str(func), named, torch.from_numpy(kept).to(first.device))
        )  # keeps strides
        return result


def _only_kept(x: Tensor, kept: np.ndarray) -> Tensor:
    """The slices of x that stay, along every dimension that `kept` varies in."""
    for dim in range(kept.ndim):
        if kept.shape[dim] > 1:
            index = torch.from_numpy(
                np.flatnonzero(kept.any(axis=tuple(d for d in range(kept.ndim) if d != dim)))
            )
            x = x.index_select(dim, index.to(x.device))
    return x


def _normalise_kept(name: str, named: dict[str, Any], kept: Tensor) -> Tensor:
    """One normalisation over the elements that `kept` (broadcastable to the input) marks."""
    x = named["input"]
    if "group_norm" in name:
        return _group_norm_kept(named, kept)
    if "batch_norm" in name:
        dims: tuple[int, ...] = tuple(d for d in range(x.dim()) if d != 1)
        shape = [1, -1] + [1] * (x.dim() - 2)
    else:
        dims = tuple(range(x.dim() - len(named["normalized_shape"]), x.dim()))
        shape = list(named["normalized_shape"])
    weights = kept.to(x.dtype).expand_as(x)
    count = weights.sum(dim=dims, keepdim=True)
    centred = "rms" not in name
    mean = (x * weights).sum(dim=dims, keepdim=True) / count if centred else torch.zeros_like(count)
    variance = ((x - mean).square() * weights).sum(dim=dims, keepdim=True) / count
    eps = named.get("eps")
    output = (x - mean) * torch.rsqrt(variance + (torch.finfo(x.dtype).eps if eps is None else eps))
    if named.get("weight") is not None:
        output = output * named["weight"].reshape(shape)
    if named.get("bias") is not None:
        output = output + named["bias"].reshape(shape)
    return output * weights


def _group_norm_kept(named: dict[str, Any], kept: Tensor) -> Tensor:
    x, groups = named["input"], int(named.get("group", named.get("num_groups", 1)))
    index = torch.nonzero(kept.reshape(-1)).flatten()
    weight, bias = (None if named[key] is None else named[key][index] for key in ("weight", "bias"))
    output = torch.zeros_like(x)
    output[:, index] = F.group_norm(x[:, index], groups, weight, bias, named["eps"])
    return output
