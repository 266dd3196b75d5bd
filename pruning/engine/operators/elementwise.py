"""Operators that work element by element, copy, or make tensors: labels stay where they are."""

from __future__ import annotations

from pruning.engine.labeller import Labeller, operation_name
from pruning.engine.labels import Value, support
from pruning.engine.operators import unknowns
from pruning.engine.operators.register import (
    all_dims,
    always,
    as_channel,
    operator,
    pointwise,
    tensor_arguments,
)
from pruning.engine.traces import Operation

operator("clone alias detach", keeps_offsets=always)(pointwise)
operator("mul mul_", constants=unknowns.product)(pointwise)
operator("where", constants=unknowns.carried)(pointwise)  # of what it does not choose nothing matters


@operator(
    "hardswish hardswish_ leaky_relu leaky_relu_ floor_divide mish prelu _prelu_kernel rrelu_with_noise "
    "native_dropout bernoulli_ bernoulli dropout feature_dropout _to_copy contiguous lift_fresh lift celu "
    "selu elu hardtanh relu6 log_sigmoid_forward _conj uniform_ normal_ nan_to_num lerp addcmul addcdiv "
    "clamp clamp_ complex polar fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask"
)
def same_place(run: Labeller, operation: Operation) -> Value:
    """Element-wise operators that PyTorch does not tag as such."""
    if operation_name(operation.func) in ("prelu", "_prelu_kernel"):
        return _prelu(run, operation)
    return pointwise(run, operation)


def _prelu(run: Labeller, operation: Operation) -> Value:
    x, weight = run.at(operation.args[0]), run.at(operation.args[1])
    if len(weight.shape) == 1 and weight.shape[0] > 1:
        weight = as_channel(weight, len(x.shape))
    return run.combine(operation, [x, weight], x.shape)


@operator("copy_ copy")
def copied(run: Labeller, operation: Operation) -> Value:
    """The source's labels replace the target's, except that both must keep the same shape."""
    target, source = run.at(operation.args[0]), run.at(operation.args[1])
    shape = run.out_shape(operation)
    if not target.slots and len(target.free) == sum(size > 1 for size in target.shape):
        return run.combine(operation, [source, Value(shape, free=all_dims(shape))], shape)
    return run.combine(operation, [target, source], shape)


@operator(
    "zeros ones full empty rand randn new_zeros new_ones new_full new_empty fill_ zero_ scalar_tensor empty_strided "
    "new_empty_strided"
)
def filled(run: Labeller, operation: Operation) -> Value:
    """One number everywhere, or noise: any extent would do."""
    shape = run.out_shape(operation)
    return Value(shape, free=all_dims(shape))


@operator("arange linspace randint randperm eye tril triu tril_indices")
def made(run: Labeller, operation: Operation) -> Value:
    """Numbers that come from nowhere: of a fixed size."""
    for leaf in tensor_arguments(operation):
        run.freeze_value(run.at(leaf), f"{run.describe(operation)} depends on the position")
    return Value(run.out_shape(operation))


@operator("rand_like randn_like full_like zeros_like ones_like empty_like")
def as_large(run: Labeller, operation: Operation) -> Value:
    """Numbers from nowhere in the shape of another tensor: as wide as that where it is labelled."""
    x = run.at(operation.args[0])
    shape = run.out_shape(operation)
    labelled = {dim for slot in x.slots for dim in support(slot)}
    noise = operation_name(operation.func).startswith("rand")
    return Value(shape, x.slots, x.free if noise else all_dims(shape) - labelled)
