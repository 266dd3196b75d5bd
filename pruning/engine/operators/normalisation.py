"""Batch, layer and group normalisation: their vectors carry labels, and statistics over channels are noted."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.labeller import Labeller, along
from pruning.engine.labels import Value, support
from pruning.engine.operators import unknowns
from pruning.engine.operators.products import by_blocks
from pruning.engine.operators.register import (
    Statistics,
    arguments,
    as_channel,
    named_arguments,
    note_size,
    operator,
)
from pruning.engine.traces import Operation


def normalise_kept(func: OpOverload, args: Args, kwargs: Kwargs, kept: np.ndarray) -> Outputs:
    """The normalisation with statistics over the kept elements, and zero for the others."""
    result = func(*args, **kwargs)
    first = result[0] if isinstance(result, (tuple, list)) else result
    named = named_arguments(func, args, kwargs)
    # In place, which keeps the strides.
    if "layer_norm" in str(func) and _is_vector(kept, first.dim() - len(named["normalized_shape"])):
        _layer_norm_kept(first, named, kept)
    else:
        first.copy_(_normalise_kept(str(func), named, torch.from_numpy(kept).to(first.device)))
    return result


def _is_vector(kept: np.ndarray, first: int) -> bool:
    """Whether what is kept goes along a single dimension, from the given one on."""
    dims = support(kept)
    return len(dims) == 1 and dims[0] >= first


def _layer_norm_kept(output: Tensor, named: Kwargs, kept: np.ndarray) -> None:
    """Write a layer norm over the kept positions of one dimension into `output`, and zero for the others."""
    x: Tensor = named["input"]
    (dim,) = support(kept)
    shape = list(named["normalized_shape"])
    own = dim - x.dim() + len(shape)  # the same dimension among the normalised ones
    index = torch.from_numpy(np.flatnonzero(kept)).to(x.device)
    shape[own] = len(index)
    weight, bias = (
        None if named.get(key) is None else named[key].index_select(own, index) for key in ("weight", "bias")
    )
    few = F.layer_norm(x.index_select(dim, index), shape, weight, bias, named["eps"])
    output.zero_().index_copy_(dim, index, few)


def _normalise_kept(name: str, named: Kwargs, kept: Tensor) -> Tensor:
    """One normalisation over the elements that `kept` (broadcastable to the input) marks."""
    x: Tensor = named["input"]
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


def _num_groups(named: Kwargs) -> int:
    """Of a group norm, whose operators have two names for it."""
    return int(named["group"] if "group" in named else named["num_groups"])


def _group_norm_kept(named: Kwargs, kept: Tensor) -> Tensor:
    x = named["input"]
    groups = _num_groups(named)
    index = torch.nonzero(kept.reshape(-1)).flatten()
    weight, bias = (None if named[key] is None else named[key][index] for key in ("weight", "bias"))
    output = torch.zeros_like(x)
    output[:, index] = F.group_norm(x[:, index], groups, weight, bias, named["eps"])
    return output


KEPT = Statistics("normalisation", normalise_kept)


@operator(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_no_update "
    "cudnn_batch_norm miopen_batch_norm",
    statistics=KEPT,
    constants=unknowns.batch_norm,
)
@operator(
    "_batch_norm_with_update _batch_norm_with_update_functional _batch_norm_impl_index batch_norm "
    "native_batch_norm_legit instance_norm",
    statistics=KEPT,
)
def batch_norm(run: Labeller, operation: Operation) -> list[Value]:
    """Per-channel scale and shift; its vectors carry the channels' atoms.

    In training mode on a reshaped weight (weight standardisation) the statistics run over the weight's
    input channels.
    """
    named = arguments(operation)
    x = run.at(named["input"])
    vectors = [
        named[key] for key in ("weight", "bias", "running_mean", "running_var") if named.get(key) is not None
    ]
    rank = len(x.shape)
    value = run.combine(operation, [x, *(as_channel(run.at(ref), rank) for ref in vectors)], x.shape)
    if named.get("training", named.get("use_input_stats", False)) or named.get("running_mean") is None:
        for slot in x.slots:
            if slot.shape[1] == 1:
                run.note_statistics(operation, slot)
    return [value, *[Value(run.info(out).shape if out is not None else ()) for out in operation.outputs[1:]]]


@operator("native_layer_norm layer_norm _fused_rms_norm rms_norm", statistics=KEPT)
def layer_norm(run: Labeller, operation: Operation) -> list[Value]:
    """Statistics over the last dimensions, channels among them: they are taken over the kept ones."""
    named = arguments(operation)
    x = run.at(named["input"])
    count = len(named["normalized_shape"])
    dims = range(len(x.shape) - count, len(x.shape))
    vectors = [run.at(named[key]) for key in ("weight", "bias") if named.get(key) is not None]
    value = run.combine(operation, [x, *vectors], x.shape)
    for slot in x.slots:
        if any(slot.shape[dim] > 1 for dim in dims):
            run.note_statistics(operation, slot)
    return [value, *[Value(run.info(out).shape if out is not None else ()) for out in operation.outputs[1:]]]


@operator("native_group_norm group_norm", statistics=KEPT)
def group_norm(run: Labeller, operation: Operation) -> list[Value]:
    """Whole groups go where there are many (exact); else the same position of every group (statistics change)."""
    named = arguments(operation)
    x = run.at(named["input"])
    groups = _num_groups(named)
    vectors = [
        as_channel(run.at(named[k]), len(x.shape)) for k in ("weight", "bias") if named.get(k) is not None
    ]
    value = run.combine(operation, [x, *vectors], x.shape)
    atoms = run.collapse(value, 1).reshape(groups, -1)
    if by_blocks(run, operation, atoms.reshape(-1), groups):
        heads = run.table.unite_along(atoms, (1,)).reshape(-1)
        run.group_counts.append((operation.module, "num_groups", heads))
        note_size(run, operation, heads)
    else:
        run.table.unite_along(atoms, (0,))
        run.note_statistics(operation, along(atoms.reshape(-1), 1, len(x.shape)))
    return [value, *[Value(run.info(out).shape if out is not None else ()) for out in operation.outputs[1:]]]
