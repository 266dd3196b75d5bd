"""Records every ATen operator of a pass, and every call of a module.

A `TorchDispatchMode` sees every operator below autograd, whatever Python code called it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from image_classification.models.module_tree import is_leaf
from image_classification.models.running import Args, Kwargs, ModuleCall, Running, following
from pruning.engine.code_lines import line_running
from pruning.engine.examples import tensors_in
from pruning.engine.named_tensors import named_tensors
from pruning.engine.operator_mode import OperatorMode
from pruning.engine.steady import is_unsteady
from pruning.engine.traces import Operation, Ref, TensorInfo, TracedCall, ViewStep
from pruning.engine.wrapped_tensors import is_wrapped


class Recorder(OperatorMode):
    """Numbers tensors and records operators. Tensors are freed when the network drops them, which keeps memory low.

    Args:
        model: The network.
        caller: Code of the function that runs it; the frames outside it are not the network's.
    """

    def __init__(self, model: nn.Module, caller: CodeType) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.tensors: list[TensorInfo] = []
        self.calls: list[TracedCall] = []
        # By identity, and only as long as they live.
        self._values: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self._views: MutableMapping[Tensor, tuple[Tensor, tuple[ViewStep, ...]]] = WeakTensorKeyDictionary()
        self._seen_whole: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self.written: dict[str, Tensor] = {}
        self.unsteady = False
        self.watched = Running()
        self._caller = caller
        self._tensors = named_tensors(model)  # kept alive: an identity is only theirs as long as they live
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        # `parameter.data` is another object with the same storage.
        self._parameters = {_storage(tensor): (name, tensor) for name, tensor in model.named_parameters()}

    def adopt_input(self, tensor: Tensor) -> int:
        """Assign a number to an input image tensor."""
        return self._new_value(tensor, derived=True)

    @property
    def running(self) -> str:
        """The qualified name of the innermost running module."""
        return self.watched.innermost

    def value_of(self, tensor: Tensor) -> int:
        """Return the number of a tensor's current value; a tensor not seen before is a constant."""
        known = self._values.get(tensor)
        return self._new_value(tensor, derived=False) if known is None else known

    def _new_value(self, tensor: Tensor, derived: bool) -> int:
        strided = tensor.layout == torch.strided
        repeated = {
            d for d, size in enumerate(tensor.shape) if strided and size > 1 and tensor.stride(d) == 0
        }
        self.tensors.append(
            TensorInfo(
                shape=tuple(tensor.shape),
                repeated=frozenset(repeated),
                name=None if _counts(tensor) or derived else self._name_of(tensor),
                derived=derived,
                dtype=tensor.dtype,
            )
        )
        self._values[tensor] = len(self.tensors) - 1
        return len(self.tensors) - 1

    def _name_of(self, tensor: Tensor) -> str | None:
        name = self._names.get(id(tensor))
        if name is None and tensor.numel() > 0:
            name, _ = self._parameters.get(_storage(tensor), (None, tensor))
        return name

    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Any:
        """See `OperatorMode`."""
        target = self._mutated_argument(func, args, kwargs)
        if target is not None and _counts(target) and not self._derives(args, kwargs):
            return func(*args, **kwargs)
        refs, kwrefs = tree_map(self._to_ref, (args, kwargs))
        derived = any(
            self.tensors[leaf.value].derived for leaf in tree_leaves((refs, kwrefs)) if isinstance(leaf, Ref)
        )
        self.unsteady = self.unsteady or is_unsteady(func, kwargs)
        if target is not None:
            self._before_write(target)
        result = func(*args, **kwargs)
        returned = list(result) if isinstance(result, (tuple, list)) else [result]
        outputs = tuple(
            self._new_value(out, derived) if isinstance(out, Tensor) else None for out in returned
        )
        writes_to = self._after_write(target, derived) if target is not None else None
        if target is None:
            self._note_views(func, args, kwargs, returned)
        self._append(func, refs, kwrefs, outputs, writes_to)
        return result

    def _derives(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether any argument depends on the images."""
        leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        known = (self._values.get(tensor) for tensor in leaves)
        return any(value is not None and self.tensors[value].derived for value in known)

    def _to_ref(self, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        whole, chain = self._views.get(leaf, (None, ()))
        if whole is not None and self._seen_whole[leaf] != self.value_of(whole):
            self._look_again(leaf, whole, chain)
        return Ref(self.value_of(leaf))

    def _look_again(self, view: Tensor, whole: Tensor, chain: tuple[ViewStep, ...]) -> None:
        """Record a view again if its tensor has been written to since."""
        current = whole
        value = self.value_of(whole)
        for step in chain:
            kwargs = {key: item for key, item in step.kwargs.items() if key != "_position"}
            result = step.func(current, *step.args, **kwargs)
            returned = list(result) if isinstance(result, (tuple, list)) else [result]
            derived = self.tensors[value].derived
            outputs = tuple(self._new_value(out, derived) for out in returned)
            self._append(step.func, (Ref(value), *step.args), kwargs, outputs, None, replayed=True)
            position = step.kwargs.get("_position", 0)
            current = returned[position]
            value = outputs[position]
        self._values[view] = value
        self._seen_whole[view] = self.value_of(whole)

    def _append(
        self,
        func: OpOverload,
        args: Args,
        kwargs: Kwargs,
        outputs: tuple[int | None, ...],
        writes_to: tuple[int, tuple[ViewStep, ...], int] | None,
        replayed: bool = False,
    ) -> None:
        stack = self.watched.names
        index = len(self.operations)
        line, written = line_running(self._caller)
        self.operations.append(
            Operation(
                index, func, args, kwargs, outputs, self.running, stack, writes_to, replayed, line, written
            )
        )

    @staticmethod
    def _mutated_argument(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor | None:
        if func.namespace != "aten" or not func._schema.is_mutable or not func._schema.returns:
            return None
        alias = func._schema.returns[0].alias_info
        if alias is None or not alias.is_write:
            return None
        tensor = kwargs.get("out", args[0] if args else None)
        return tensor if isinstance(tensor, Tensor) else None

    def _after_write(self, target: Tensor, derived: bool) -> tuple[int, tuple[ViewStep, ...], int] | None:
        """Record that a write through a view also makes a new version of its base tensor."""
        whole, chain = self._views.get(target, (None, ()))
        if whole is None:
            return None
        before = self.value_of(whole)
        after = self._new_value(whole, derived or self.tensors[before].derived)
        self._seen_whole[target] = after
        return before, chain, after

    def _note_views(self, func: OpOverload, args: Args, kwargs: Kwargs, returned: list[Any]) -> None:
        if not args or not isinstance(args[0], Tensor) or not func._schema.returns:
            return
        if func._schema.returns[0].alias_info is None:
            return
        whole, chain = self._views.get(args[0], (args[0], ()))
        for position, out in enumerate(returned):
            if isinstance(out, Tensor) and out is not args[0]:
                picked = {**kwargs, "_position": position} if len(returned) > 1 else kwargs
                self._views[out] = (whole, (*chain, ViewStep(func, tuple(args[1:]), picked)))
                self._seen_whole[out] = self.value_of(whole)

    @contextlib.contextmanager
    def watching_modules(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the running module, and record every call."""
        inputs: dict[ModuleCall, tuple[int, ...]] = {}

        def entering(call: ModuleCall, _module: nn.Module, args: object, kwargs: object) -> None:
            inputs[call] = self._values_in((args, kwargs))

        def leaving(call: ModuleCall, module: nn.Module, output: object) -> None:
            outputs = self._values_in(output)
            self.calls.append(TracedCall(call.name, call.number, inputs[call], outputs, is_leaf(module)))

        with following(model, entering=entering, leaving=leaving) as self.watched:
            yield

    def _values_in(self, tree: object) -> tuple[int, ...]:
        return tuple(self.value_of(leaf) for leaf in tensors_in(tree) if not is_wrapped(leaf))

    @contextlib.contextmanager
    def parameters_kept(self) -> Iterator[None]:
        """Restore parameters that the pass writes into."""
        try:
            yield
        finally:
            for name, tensor in self._parameters.values():
                if name in self.written:
                    tensor.data.copy_(self.written[name])

    def _before_write(self, target: Tensor) -> None:
        """Save a parameter's values before the pass first writes into it."""
        name, parameter = self._parameters.get(_storage(target), (None, target))
        if name is not None and name not in self.written:
            with _disable_current_modes():
                self.written[name] = parameter.detach().clone()


def _counts(tensor: Tensor) -> bool:
    """Whether a tensor holds integers (number of batches, a queue's pointer, positions) and so no channels."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors with the same elements at the same addresses."""
    if tensor.layout != torch.strided:  # sparse: their elements have no single address
        return tensor.device, id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
