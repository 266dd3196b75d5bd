"""Normalisations whose statistics run over channels, recomputed from the kept channels only.

LayerNorm, GroupNorm with few groups and weight standardisation change their values when channels leave. What a
pruned network computes is then not the network with zeroed channels, but the one whose statistics never saw
them. This mode is that reference: inside it, the marked normalisations use the kept elements and give zero for
the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass
class Statistics:
    """One normalisation over channels.

    Attributes:
        trace: Which recorded pass it belongs to (0: evaluation).
        ordinal: Its position among the normalisations of the pass.
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


def is_normalisation(func: Any) -> bool:
    """Whether an operator counts among the normalisations of a pass."""
    name = str(func)
    return any(kind in name for kind in ("layer_norm", "group_norm", "batch_norm", "rms_norm"))


class StatisticsOverKept(TorchDispatchMode):
    """Recomputes the given normalisations from the units that stay.

    Args:
        uses: From `ChannelGraph.statistics`.
        mask: Boolean over unit ids: True for what stays.
        trace: Which recorded pass is being run.
    """

    def __init__(self, uses: Iterable[Statistics], mask: np.ndarray, trace: int = 0) -> None:
        super().__init__()
        self._count = 0
        self._kept: dict[int, np.ndarray] = {}
        for use in uses:
            stays = (use.units < 0) | mask[np.maximum(use.units, 0)]
            if use.trace == trace and not stays.all():
                kept = stays.reshape([-1 if d == use.dim else 1 for d in range(use.rank)])
                self._kept[use.ordinal] = self._kept.get(use.ordinal, True) & kept

    def restart(self) -> None:
        """Begin another pass."""
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not is_normalisation(func):
            return result
        kept = self._kept.get(self._count)
        self._count += 1
        if kept is None:
            return result
        named = {argument.name: argument.default_value for argument in func._schema.arguments}
        named.update(zip([argument.name for argument in func._schema.arguments], args, strict=False))
        named.update(kwargs or {})
        first = result[0] if isinstance(result, (tuple, list)) else result
        first.copy_(
            _normalise_kept(str(func), named, torch.from_numpy(kept).to(first.device))
        )  # keeps strides
        return result


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
