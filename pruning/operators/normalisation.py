"""Batch, layer and group normalisation: their vectors carry labels, and statistics over channels are noted."""

from __future__ import annotations

from pruning.labelling import Labeller, along
from pruning.labels import Value
from pruning.operators.products import by_blocks
from pruning.operators.register import arguments, as_channel, note_size, rule
from pruning.tracing import Operation


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm", "native_batch_norm_legit",
      "_batch_norm_with_update_functional", "_batch_norm_impl_index", "instance_norm")  # fmt: skip
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


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
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


@rule("native_group_norm", "group_norm")
def group_norm(run: Labeller, operation: Operation) -> list[Value]:
    """Whole groups go where there are many (exact); else the same position of every group (statistics change)."""
    named = arguments(operation)
    x, groups = run.at(named["input"]), int(named.get("group", named.get("num_groups", 1)))
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
