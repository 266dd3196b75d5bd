"""A network's forward pass as a list of ATen operators, recorded while it really runs.

A `TorchDispatchMode` sees every operator below autograd, whatever Python code called it. Tensors become numbered
values; an operator that works in place makes a new version of its tensor, so that each value is written once. Running
for real, on one or two small images, keeps data-dependent code and constant index tables working, and costs one forward
pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from image_classification.models.attention import attention_of_any_width
from image_classification.models.modes import exact_float32, modes_restored, quieten
from image_classification.models.module_tree import named_modules, set_mode, walked_once
from image_classification.models.running import Args, Kwargs, ModuleCall, Running, following
from pruning.engine.code_lines import line_running
from pruning.engine.examples import output_tensors, tensors_in
from pruning.engine.kept_state import state_kept
from pruning.engine.own_gradients import has_gradient_hooks, own_functions_noted
from pruning.engine.steady import Steady, as_in_evaluation, is_unsteady

_OF_GRADIENTS = frozenset({Tensor.register_hook, Tensor.retain_grad})
_NEEDS_NO_ZERO = frozenset({"div", "log", "log2", "log10", "reciprocal", "rsqrt"})


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor argument: the number of its value."""

    value: int


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Properties of a value beside its labels.

    Attributes:
        shape: Shape of the tensor.
        repeated: Dimensions of stride 0, along which it was expanded.
        name: Qualified name if it is a parameter or buffer of real or complex numbers, or a buffer of booleans.
        derived: It depends on the input images.
        dtype: Data type of the tensor.
    """

    shape: tuple[int, ...]
    repeated: frozenset[int]
    name: str | None = None
    derived: bool = False
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class ViewStep:
    """One operator of the chain that made a view of a tensor."""

    func: OpOverload
    args: Args
    kwargs: Kwargs


@dataclasses.dataclass(frozen=True)
class Operation:
    """One executed operator.

    Attributes:
        index: Position among all operators of the pass.
        func: The ATen overload.
        args, kwargs: Its arguments with tensors replaced by `Ref`.
        outputs: Values it made; None for outputs that are not tensors.
        module: Qualified name of the innermost module that was running.
        stack: Names of all modules that were running, outermost first.
        writes_to: For a write through a view: (value of the whole tensor before, the chain of views, value
            of the whole tensor after).
        replayed: A view that is recorded again, since its base was written to; the network did not run it.
        line: Line of the network's code that called it (see `code_lines.py`).
    """

    index: int
    func: OpOverload
    args: Args
    kwargs: Kwargs
    outputs: tuple[int | None, ...]
    module: str
    stack: tuple[str, ...]
    writes_to: tuple[int, tuple[ViewStep, ...], int] | None = None
    replayed: bool = False
    line: str = ""


@dataclasses.dataclass(frozen=True)
class TracedCall:
    """One call of a module: its tensor inputs and outputs, and which call of that module it was."""

    module: str
    call: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_leaf: bool


@dataclasses.dataclass
class Trace:
    """One forward pass: operators, values, module calls, and the values given and returned.

    `scaled` holds queries of attentions that scale by their width unasked, and the module where that happens;
    `steps` what the network's code asked of PyTorch, as (module, function); `results` the tensors it returned;
    `written` the names of the parameters that it wrote into; `unsteady` says that it drew random numbers or computed in
    half precision, `own_gradients` that hooks or functions of the network's own take part in a backward pass.
    """

    operations: list[Operation]
    tensors: list[TensorInfo]
    calls: list[TracedCall]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    training: bool
    scaled: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    steps: frozenset[tuple[str, str]] = frozenset()
    results: list[Tensor] = dataclasses.field(default_factory=list, repr=False)
    written: frozenset[str] = frozenset()
    unsteady: bool = False
    own_gradients: bool = False
    _makers: dict[int, Operation] = dataclasses.field(default_factory=dict, repr=False)

    def maker(self, value: int) -> Operation | None:
        """Return the operator that produced a value; None for inputs and parameters."""
        if not self._makers:
            for operation in self.operations:
                self._makers.update((out, operation) for out in operation.outputs if out is not None)
        return self._makers.get(value)

    @property
    def divisors(self) -> frozenset[str]:
        """Names of the vectors that are divided by or whose logarithm is taken: they cannot be zero."""
        found: set[str] = set()
        for operation in self.operations:
            name = str(operation.func.overloadpacket).removeprefix("aten.").rstrip("_")
            if name in _NEEDS_NO_ZERO:
                found.update(self._vectors_behind(operation.args[-1]))
        return frozenset(found)

    def _vectors_behind(self, argument: object) -> Iterator[str]:
        """Yield the names of vectors that a value is, or was computed from element-wise without the images."""
        if not isinstance(argument, Ref) or self.tensors[argument.value].derived:
            return
        info = self.tensors[argument.value]
        maker = self.maker(argument.value)
        if info.name is not None and math.prod(info.shape) == max(info.shape, default=0):
            yield info.name
        elif maker is not None:
            for part in maker.args:
                same_size = isinstance(part, Ref) and math.prod(self.tensors[part.value].shape) == math.prod(
                    info.shape
                )
                if same_size:
                    yield from self._vectors_behind(part)

    @property
    def used_names(self) -> set[str]:
        """Return the names of all parameters and buffers that took part."""
        return {info.name for info in self.tensors if info.name is not None}


def tensor_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the first qualified name of every parameter and buffer to all of its names."""
    names: dict[int, list[str]] = {}
    for source in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in source:
            names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: tuple(aliases) for aliases in names.values()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, by its first qualified name; parameters first."""
    parameters: dict[int, tuple[str, Tensor]] = {}
    buffers: dict[int, tuple[str, Tensor]] = {}
    for module_name, module in named_modules(model):
        prefix = f"{module_name}." if module_name else ""
        for found, table in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (prefix + name, tensor))
    return dict([*parameters.values(), *buffers.values()])


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore the network's modes, buffers, attributes and the random state on exit, whatever runs inside.

    Inside there is no autograd, no autocast from outside, full float32 precision, and attention runs as plain
    operators.
    """
    first = next(iter(model.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(few_objects_to_collect())
        stack.enter_context(walked_once(model))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(plain_kernels())
        stack.enter_context(attention_of_any_width(model))
        stack.enter_context(state_kept(model))
        stack.callback(forget_cached, model)
        with modes_restored(model):
            yield


@contextlib.contextmanager
def few_objects_to_collect() -> Iterator[None]:
    """Exclude objects that exist already from garbage collections inside.

    Recordings and trials make many small objects, which would trigger collections of all objects of the process.
    """
    if (
        gc.get_freeze_count()
    ):  # other code has set objects aside already: they could not be told apart afterwards
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Use full float32 precision, no outer autocast, and transformer layers as single operators.

    An autocast within the network does not cache casts of weights, which the next pass would otherwise reuse.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    cache = torch.is_autocast_cache_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_autocast_cache_enabled(False)
    try:
        with exact_float32():
            torch.clear_autocast_cache()
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def set_trace_mode(model: nn.Module, training: bool) -> None:
    """Set evaluation mode, or training mode with PyTorch's normalisation and dropout still as in evaluation.

    The latter takes the training paths of a network (auxiliary heads) without batch statistics or noise. A class of the
    network's own may do more in training than the layer that it extends; within it, `Requests` keeps them as in
    evaluation. This also makes modules drop what they cache between evaluations (see `forget_cached`).
    """
    set_mode(model, True)
    set_mode(model, training)
    quieten((module for _, module in named_modules(model)), extended=False)


def forget_cached(model: nn.Module) -> None:
    """Make modules drop the tensors that they cache between evaluations; modes are unchanged.

    Attention biases looked up in a table are often cached like this. The modules drop them when they are put into
    training mode, since their parameters change then, as they do in a rewrite.
    """
    with modes_restored(model):
        model.train()


def is_leaf(module: nn.Module) -> bool:
    """Whether a module does its work itself; parametrizations of its tensors don't count as parts."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def record(model: nn.Module, images: Args, kwargs: Kwargs | None = None, *, training: bool = False) -> Trace:
    """Run the network once and record it. Call inside `undisturbed`.

    Args:
        model: The network.
        images: Its positional arguments.
        kwargs: Its keyword arguments.
        training: Take the training paths (see `set_trace_mode`).

    Raises:
        OutputError: It returns something in which tensors cannot be looked for.
    """
    set_trace_mode(model, training)
    torch.manual_seed(0)
    recorder = _Recorder(model)
    arguments = (images, kwargs or {})
    inputs = tuple(recorder.adopt_input(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    with (
        state_kept(model),
        recorder.parameters_kept(),
        recorder.watching_modules(model),
        Requests(recorder.watched, recorder) as requests,
        Steady(full_precision=False),
        own_functions_noted() as own_functions,
        recorder,
    ):
        result = model(*images, **(kwargs or {}))
        results = output_tensors(result)
        outputs = tuple(recorder.value_of(leaf) for leaf in results)
    return Trace(
        recorder.operations,
        recorder.tensors,
        recorder.calls,
        inputs,
        outputs,
        training,
        requests.scaled,
        frozenset(requests.steps),
        results,
        frozenset(recorder.written),
        recorder.unsteady,
        bool(own_functions) or has_gradient_hooks(model),
    )


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is what `torch.func` (vmap, grad) shows inside: it has no storage, and lacks dimensions."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor wrapped by `torch.func`."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class Requests(TorchFunctionMode):
    """Records the PyTorch functions that the network's code calls, before PyTorch dispatches them.

    Batch norms and dropouts work as in evaluation, whichever mode the network is in.

    Args:
        running: The running modules.
        recorder: The recorder that numbers tensors; None if the numbers do not matter.

    Attributes:
        steps: (module, function) of every call that returns tensors.
        scaled: Queries of scaled dot products whose scale follows from the width of a head, with the module. The
            operators below only show a constant, which would differ for a narrower head.
    """

    def __init__(self, running: Running, recorder: _Recorder | None = None) -> None:
        super().__init__()
        self.steps: set[tuple[str, str]] = set()
        self.scaled: list[tuple[int, str]] = []
        self._running = running
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        args, kwargs = as_in_evaluation(func, args, kwargs or {})
        module = self._running.innermost
        if func in _OF_GRADIENTS and not (args[0].requires_grad and torch.is_grad_enabled()):
            return RemovableHandle(OrderedDict())  # of a gradient that this pass does not have
        attends = func is F.scaled_dot_product_attention and kwargs.get("scale") is None
        if attends and self._recorder is not None:
            query = unwrapped(kwargs["query"] if "query" in kwargs else args[0])
            self.scaled.append((self._recorder.value_of(query), module))
        result = func(*args, **kwargs)
        if isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):
            self.steps.add((module, getattr(func, "__name__", str(func))))
        return result


class _Recorder(TorchDispatchMode):
    """Numbers tensors and records operators. Tensors are freed when the network drops them, which keeps memory low."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
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
        tensors = named_tensors(model)
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        # `parameter.data` is another object with the same storage.
        self._parameters = {_storage(tensor): (name, tensor) for name, tensor in model.named_parameters()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip Dynamo: importing it takes seconds, and it would leave this mode uncompiled anyway."""
        return False

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
        repeated = {d for d, size in enumerate(tensor.shape) if size > 1 and tensor.stride(d) == 0}
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

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
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
        line = line_running(record.__code__)
        self.operations.append(
            Operation(index, func, args, kwargs, outputs, self.running, stack, writes_to, replayed, line)
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
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
