"""A network's forward pass as a list of ATen operators, recorded while it really runs.

A `TorchDispatchMode` sees every operator below autograd, whatever Python code asked for it. Tensors become
numbered values; an operator that works in place makes a new version of its tensor, so that each value is
written once. Running for real, on one or two small images, keeps data-dependent code and constant index
tables working, and costs one forward pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor argument: the number of its value."""

    value: int


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What is known of a value beside its labels.

    Attributes:
        shape: Its shape.
        repeated: Dimensions of stride 0, along which it was expanded.
        name: Qualified name if it is a floating-point parameter or buffer.
        data: The tensor itself where it is a whole-number or boolean constant (an index table).
        derived: It follows from the input images.
    """

    shape: tuple[int, ...]
    repeated: frozenset[int]
    name: str | None = None
    data: Tensor | None = None
    derived: bool = False


@dataclasses.dataclass(frozen=True)
class ViewStep:
    """One operator of the chain that made a view of a tensor."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One executed operator.

    Attributes:
        index: Position among all operators of the pass.
        func: The ATen overload.
        args, kwargs: Its arguments with tensors replaced by `Ref`.
        outputs: Values it made; None for outputs that are no tensors.
        module: Qualified name of the innermost module that was running.
        stack: Names of all modules that were running, outermost first.
        writes_to: For a write through a view: (value of the whole tensor before, the chain of views, value
            of the whole tensor after).
        replayed: A view that is taken anew, since what lies behind it was written; the network did not run it.
    """

    index: int
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int | None, ...]
    module: str
    stack: tuple[str, ...]
    writes_to: tuple[int, tuple[ViewStep, ...], int] | None = None
    replayed: bool = False


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """One call of a module: its tensor inputs and outputs, and which call of that module it was."""

    module: str
    call: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_leaf: bool


@dataclasses.dataclass
class Trace:
    """One forward pass: operators, values, module calls, and the values given and returned.

    `scaled` holds queries of attentions that scale by their width unasked, and the module where that happens.
    """

    operations: list[Operation]
    tensors: list[TensorInfo]
    calls: list[ModuleCall]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    training: bool
    scaled: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    _makers: dict[int, Operation] = dataclasses.field(default_factory=dict, repr=False)

    def maker(self, value: int) -> Operation | None:
        """The operator that made a value; None for inputs and parameters."""
        if not self._makers:
            for operation in self.operations:
                self._makers.update((out, operation) for out in operation.outputs if out is not None)
        return self._makers.get(value)

    @property
    def used_names(self) -> set[str]:
        """Names of all parameters and buffers that took part."""
        return {info.name for info in self.tensors if info.name is not None}


def tensor_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First qualified name of every parameter and buffer, with all names it is known by."""
    names: dict[int, list[str]] = {}
    for source in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in source:
            names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: tuple(aliases) for aliases in names.values()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, by its first qualified name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever is run inside, the network's modes, buffers and the random state are as before afterwards.

    Inside there is no autograd, no autocast, full float32 precision, and attention runs as plain operators.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.data, buffer.detach().clone()) for buffer in model.buffers()]
    first = next(iter(model.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(plain_kernels())
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            forget_cached(model)
            for buffer, storage, values in buffers:
                buffer.data = storage
                buffer.copy_(values)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Full float32 precision, and transformer layers as single operators."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    backends: Any = torch.backends
    products, convolutions = backends.cuda.matmul, backends.cudnn.conv
    before = (products.fp32_precision, convolutions.fp32_precision)
    torch.backends.mha.set_fastpath_enabled(False)
    products.fp32_precision = convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        products.fp32_precision, convolutions.fp32_precision = before


def set_trace_mode(model: nn.Module, training: bool) -> None:
    """Evaluation mode, or training mode with normalisation and dropout still as in evaluation.

    The latter takes the training paths of a network (auxiliary heads) without batch statistics or noise.
    On the way modules drop what they keep from one evaluation to the next (see `forget_cached`).
    """
    model.train()
    model.train(training)
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.training = False


def forget_cached(model: nn.Module) -> None:
    """Modules that keep tensors from one evaluation to the next drop them; all modes are as before.

    Attention biases that were looked up in a table are often kept so. The modules drop them when they are put
    into training mode, since their parameters change then, as they do in a rewrite.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, training in modes.items():
        module.training = training


def is_leaf(module: nn.Module) -> bool:
    """Whether a module does its work itself; parametrizations of its tensors don't count as parts."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def record(model: nn.Module, images: tuple[Any, ...], *, training: bool = False) -> Trace:
    """Run the network once and record it. Call inside `undisturbed`.

    Args:
        model: The network.
        images: Its positional arguments.
        training: Take the training paths (see `set_trace_mode`).
    """
    set_trace_mode(model, training)
    recorder = _Recorder(model)
    widths = _ScalesByWidth(recorder)
    inputs = tuple(recorder.adopt_input(leaf) for leaf in tree_leaves(images) if isinstance(leaf, Tensor))
    with recorder.watching_modules(model), widths, recorder:
        result = model(*images)
    outputs = tuple(
        recorder.value_of(leaf) for leaf in tree_leaves(as_tree(result)) if isinstance(leaf, Tensor)
    )
    return Trace(
        recorder.operations, recorder.tensors, recorder.calls, inputs, outputs, training, widths.found
    )


def as_tree(result: Any) -> Any:
    """Dataclass and mapping outputs as plain dicts, so that their tensors are found."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return dict(result) if isinstance(result, Mapping) else result


class _ScalesByWidth(TorchFunctionMode):
    """Notes the queries of scaled dot products whose scale follows from the width of a head.

    The operators below only show a number by then, which a narrower head would not have.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = kwargs["query"] if "query" in kwargs else args[0]
            self.found.append((self._recorder.value_of(query), self._recorder.running))
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Numbers tensors and writes down operators; keeps every tensor alive so that identities stay unique."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.tensors: list[TensorInfo] = []
        self.calls: list[ModuleCall] = []
        self._alive: list[Any] = []
        self._values: dict[int, int] = {}
        self._views: dict[int, tuple[Tensor, tuple[ViewStep, ...]]] = {}
        self._seen_whole: dict[int, int] = {}
        self._stack: list[tuple[str, tuple[int, ...]]] = []
        self._num_calls: dict[str, int] = {}
        self._names = {id(tensor): name for name, tensor in named_tensors(model).items()}

    def adopt_input(self, tensor: Tensor) -> int:
        """Number an input image tensor."""
        return self._new_value(tensor, derived=True)

    @property
    def running(self) -> str:
        """Qualified name of the innermost module that is running."""
        return self._stack[-1][0] if self._stack else ""

    def value_of(self, tensor: Tensor) -> int:
        """The number of a tensor's current value; one that was not seen before is a constant."""
        known = self._values.get(id(tensor))
        return self._new_value(tensor, derived=False) if known is None else known

    def _new_value(self, tensor: Tensor, derived: bool) -> int:
        self._alive.append(tensor)
        countable = not (tensor.is_floating_point() or tensor.is_complex())
        repeated = {d for d, size in enumerate(tensor.shape) if size > 1 and tensor.stride(d) == 0}
        self.tensors.append(
            TensorInfo(
                shape=tuple(tensor.shape),
                repeated=frozenset(repeated),
                name=None if countable or derived else self._names.get(id(tensor)),
                data=tensor if countable and not derived else None,
                derived=derived,
            )
        )
        self._values[id(tensor)] = len(self.tensors) - 1
        return len(self.tensors) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refs, kwrefs = tree_map(self._to_ref, (args, kwargs))
        derived = any(
            self.tensors[leaf.value].derived for leaf in tree_leaves((refs, kwrefs)) if isinstance(leaf, Ref)
        )
        result = func(*args, **kwargs)
        returned = list(result) if isinstance(result, (tuple, list)) else [result]
        target = self._mutated_argument(func, args, kwargs)
        outputs = tuple(
            self._new_value(out, derived) if isinstance(out, Tensor) else None for out in returned
        )
        writes_to = self._after_write(target, derived) if target is not None else None
        if target is None:
            self._note_views(func, args, kwargs, returned)
        self._append(func, refs, kwrefs, outputs, writes_to)
        return result

    def _to_ref(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        whole, chain = self._views.get(id(leaf), (None, ()))
        if whole is not None and self._seen_whole[id(leaf)] != self.value_of(whole):
            self._look_again(leaf, whole, chain)
        return Ref(self.value_of(leaf))

    def _look_again(self, view: Tensor, whole: Tensor, chain: tuple[ViewStep, ...]) -> None:
        """The tensor behind a view was written since: take the view anew."""
        current, value = whole, self.value_of(whole)
        for step in chain:
            kwargs = {key: item for key, item in step.kwargs.items() if key != "_position"}
            result = step.func(current, *step.args, **kwargs)
            returned = list(result) if isinstance(result, (tuple, list)) else [result]
            derived = self.tensors[value].derived
            outputs = tuple(self._new_value(out, derived) for out in returned)
            self._append(step.func, (Ref(value), *step.args), kwargs, outputs, None, replayed=True)
            position = step.kwargs.get("_position", 0)
            current, value = returned[position], outputs[position]
        self._values[id(view)] = value
        self._seen_whole[id(view)] = self.value_of(whole)

    def _append(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: tuple[int | None, ...],
        writes_to: tuple[int, tuple[ViewStep, ...], int] | None,
        replayed: bool = False,
    ) -> None:
        stack = tuple(name for name, _ in self._stack)
        index = len(self.operations)
        self.operations.append(
            Operation(index, func, args, kwargs, outputs, self.running, stack, writes_to, replayed)
        )

    @staticmethod
    def _mutated_argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if func.namespace != "aten" or not func._schema.is_mutable or not func._schema.returns:
            return None
        alias = func._schema.returns[0].alias_info
        if alias is None or not alias.is_write:
            return None
        tensor = kwargs.get("out", args[0] if args else None)
        return tensor if isinstance(tensor, Tensor) else None

    def _after_write(self, target: Tensor, derived: bool) -> tuple[int, tuple[ViewStep, ...], int] | None:
        """A write through a view also makes a new version of the tensor that it looks into."""
        whole, chain = self._views.get(id(target), (None, ()))
        if whole is None:
            return None
        before = self.value_of(whole)
        after = self._new_value(whole, derived or self.tensors[before].derived)
        self._seen_whole[id(target)] = after
        return before, chain, after

    def _note_views(self, func: Any, args: Any, kwargs: dict[str, Any], returned: list[Any]) -> None:
        if not args or not isinstance(args[0], Tensor) or not func._schema.returns:
            return
        if func._schema.returns[0].alias_info is None:
            return
        whole, chain = self._views.get(id(args[0]), (args[0], ()))
        for position, out in enumerate(returned):
            if isinstance(out, Tensor) and out is not args[0]:
                picked = {**kwargs, "_position": position} if len(returned) > 1 else kwargs
                self._views[id(out)] = (whole, (*chain, ViewStep(func, tuple(args[1:]), picked)))
                self._seen_whole[id(out)] = self.value_of(whole)

    @contextlib.contextmanager
    def watching_modules(self, model: nn.Module) -> Iterator[None]:
        """Keep track of which module is running."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._stack.append((name, tuple(self.value_of(tensor) for tensor in tensors)))

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not self._stack:
                return
            _, inputs = self._stack.pop()
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            call = self._num_calls.get(name, 0)
            self._num_calls[name] = call + 1
            outputs = tuple(self.value_of(tensor) for tensor in tensors)
            self.calls.append(ModuleCall(name, call, inputs, outputs, is_leaf(module)))

        return hook
