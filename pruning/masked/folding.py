"""Folding of constants that a layer no longer reads into its bias, or into the batch norms after it.

A consumer that loses a constant input c loses W·c from all its outputs. This is added to its own bias. If it has no
bias, the offset is followed through operators that pass it on unchanged (pooling, concatenation) to batch norms, whose
running means absorb it: BN(x + δ; μ) = BN(x; μ − δ).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from image_classification.models.running import Args
from pruning.engine.named_tensors import named_tensors, tensor_names
from pruning.engine.operators import keeps_offset
from pruning.engine.traces import Operation, Ref, Trace
from pruning.engine.tracing import record
from pruning.engine.undisturbed import undisturbed

_PLAIN_FORWARDS = tuple(layer.forward for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))


@dataclasses.dataclass(frozen=True)
class Sink:
    """A vector that absorbs an offset: `tensor[start : start + n] += sign · offset`."""

    tensor: str
    start: int
    sign: int


class NoSinkError(Exception):
    """An offset cannot be absorbed; the message says why."""


def is_plain(module: nn.Module) -> bool:
    """Whether the module contracts its input with exactly the numbers in its `weight`."""
    known = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
    if not known or type(module).forward not in _PLAIN_FORWARDS or hasattr(module, "parametrizations"):
        return False
    return isinstance(module.weight, nn.Parameter)  # the old weight_norm computes it in a hook


class Folding:
    """Finds and fills the sinks of a network's layers.

    Args:
        model: The network.
        images: Its positional arguments.
    """

    def __init__(self, model: nn.Module, images: Args) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        with undisturbed(model):
            self._trace = record(model, tuple(a[:1] if isinstance(a, Tensor) else a for a in images))
        self._readers = _readers(self._trace)
        self._shared = {name for name, aliases in tensor_names(model).items() if len(aliases) > 1}
        self._sinks: dict[str, tuple[Sink, ...] | str] = {}
        self._before: dict[str, Tensor] = {}

    def sinks(self, layer: str) -> tuple[Sink, ...] | str:
        """Return the sinks for an offset of a layer's outputs, or the reason why there are none."""
        if layer not in self._sinks:
            try:
                self._sinks[layer] = self._find(layer)
            except NoSinkError as error:
                self._sinks[layer] = str(error)
        return self._sinks[layer]

    def add(self, layer: str, offset: Tensor) -> None:
        """Add a constant to the layer's outputs: (outputs,) float64."""
        tensors = named_tensors(self._model)
        sinks = self.sinks(layer)
        assert not isinstance(sinks, str)
        for sink in sinks:
            self._before.setdefault(sink.tensor, tensors[sink.tensor].data.clone())
            target = tensors[sink.tensor].data[sink.start : sink.start + len(offset)]
            target.copy_(target.double() + sink.sign * offset.to(target.device))

    def undo(self) -> None:
        """Take back what was added."""
        tensors = named_tensors(self._model)
        for name, values in self._before.items():
            tensors[name].data.copy_(values)

    def _find(self, layer: str) -> tuple[Sink, ...]:
        module = self._modules[layer]
        if not is_plain(module):
            raise NoSinkError(f"{layer} computes its weights or inputs in its own way")
        if _pads_with_zeros(module):
            raise NoSinkError(f"{layer} pads its input with zeros")
        if sum(call.module == layer for call in self._trace.calls) != 1:
            raise NoSinkError(f"{layer} is used several times")
        if isinstance(module.bias, Tensor):
            name = f"{layer}.bias"
            if name in self._shared or name not in named_tensors(self._model):
                raise NoSinkError(f"the bias of {layer} is shared")
            return (Sink(name, 0, 1),)
        outputs = [call.outputs for call in self._trace.calls if call.module == layer]
        return tuple(self._follow(outputs[0][0], 0, layer))

    def _follow(self, value: int, start: int, layer: str) -> list[Sink]:
        reason = f"{layer} has no bias, and its output goes elsewhere than to batch norms"
        if value in self._trace.outputs or not self._readers.get(value):
            raise NoSinkError(reason)
        found: list[Sink] = []
        for operation in self._readers[value]:
            name = operation.func.overloadpacket.__name__
            if "batch_norm" in name and operation.args[0] == Ref(value):
                found.append(Sink(self._running_mean(operation, reason), start, -1))
            elif name == "cat":
                found += self._through_cat(operation, value, start, layer, reason)
            elif keeps_offset(self._trace, operation, value):
                output = operation.outputs[0]
                assert output is not None
                found += self._follow(output, start, layer)
            else:
                raise NoSinkError(reason)
        return found

    def _running_mean(self, operation: Operation, reason: str) -> str:
        mean = operation.args[3]
        name = self._trace.tensors[mean.value].name if isinstance(mean, Ref) else None
        if name is None or name in self._shared:
            raise NoSinkError(reason)
        uses = [op for op in self._trace.operations if mean in op.args]
        if len(uses) > 1:
            raise NoSinkError(f"{reason} that are used once")
        return name

    def _through_cat(
        self, operation: Operation, value: int, start: int, layer: str, reason: str
    ) -> list[Sink]:
        parts = operation.args[0]
        dim = operation.args[1] if len(operation.args) > 1 else 0
        if dim != 1:
            raise NoSinkError(reason)
        found = []
        position = start
        output = operation.outputs[0]
        assert output is not None
        for part in parts:
            if part.value == value:
                found += self._follow(output, position, layer)
            position += self._trace.tensors[part.value].shape[1]
        return found


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _pads_with_zeros(module: nn.Module) -> bool:
    padding = getattr(module, "padding", 0)
    pads = padding == "same" if isinstance(padding, str) else any(_as_tuple(padding))
    return pads and getattr(module, "padding_mode", "zeros") == "zeros"


def _readers(trace: Trace) -> dict[int, list[Operation]]:
    found: dict[int, list[Operation]] = {}
    for operation in trace.operations:
        for leaf in {
            leaf for leaf in tree_leaves((operation.args, operation.kwargs)) if isinstance(leaf, Ref)
        }:
            found.setdefault(leaf.value, []).append(operation)
    return found


def offset_of(module: nn.Module, columns: Tensor, constants: Tensor) -> Tensor:
    """Compute what the removal of constant inputs takes from a layer's outputs: (outputs,) float64.

    Args:
        module: A plain convolution or linear layer.
        columns: (k,) positions among its inputs.
        constants: (k,) float64, the constants that it reads there.
    """
    weight = module.get_parameter("weight").detach().double()
    weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    groups = getattr(module, "groups", 1)
    inputs = torch.zeros(weight.shape[1] * groups, dtype=torch.float64, device=weight.device)
    inputs[columns.to(weight.device)] = constants.to(weight.device)
    per_group = weight.reshape(groups, -1, weight.shape[1])
    return (per_group @ inputs.reshape(groups, -1, 1)).flatten()
