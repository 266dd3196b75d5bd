"""Operators that work element by element, copy, or make tensors: labels stay where they are."""

from __future__ import annotations

from pruning.labelling import Labeller, operation_name
from pruning.labels import Value
from pruning.operators.register import all_dims, as_channel, pointwise, rule, tensor_arguments
from pruning.tracing import Operation


@rule("hardswish", "hardswish_", "leaky_relu", "leaky_relu_", "floor_divide", "mish", "prelu",
      "_prelu_kernel", "rrelu_with_noise", "native_dropout", "bernoulli_", "bernoulli", "dropout",
      "feature_dropout", "_to_copy", "contiguous", "alias", "detach", "lift_fresh", "lift", "celu", "selu",
      "elu", "hardtanh", "relu6", "log_sigmoid_forward", "_conj", "uniform_", "normal_", "nan_to_num", "lerp",
      "addcmul", "addcdiv", "clamp", "clamp_")  # fmt: skip
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


@rule("copy_", "copy")
def copied(run: Labeller, operation: Operation) -> Value:
    """The source's labels replace the target's, except that both must keep the same shape."""
    target, source = run.at(operation.args[0]), run.at(operation.args[1])
    shape = run.out_shape(operation)
    if not target.slots and len(target.free) == sum(size > 1 for size in target.shape):
        return run.combine(operation, [source, Value(shape, free=all_dims(shape))], shape)
    return run.combine(operation, [target, source], shape)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "fill_", "zero_",
      "scalar_tensor", "empty_strided", "new_empty_strided", "full_like", "zeros_like", "ones_like",
      "empty_like")  # fmt: skip
def filled(run: Labeller, operation: Operation) -> Value:
    """One number everywhere: any extent would do."""
    shape = run.out_shape(operation)
    return Value(shape, free=all_dims(shape), constant=True)


@rule("arange", "linspace", "rand", "randn", "randint", "randperm", "eye", "tril", "triu", "tril_indices")
def made(run: Labeller, operation: Operation) -> Value:
    """Numbers that come from nowhere: of a fixed size."""
    for leaf in tensor_arguments(operation):
        run.freeze_value(run.at(leaf), f"{run.describe(operation)} depends on the position")
    return Value(run.out_shape(operation))


@rule("rand_like", "randn_like")
def noise(run: Labeller, operation: Operation) -> Value:
    """Random numbers in the shape of another tensor."""
    return pointwise(run, operation)
