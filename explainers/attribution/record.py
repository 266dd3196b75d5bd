"""A network's forward pass recorded as a list of ATen operators, for propagating relevance back through it.

Attribution rules need to know what a network computes, not how it is written: with modules or functions, with one ReLU
module used in ten places, in place or not. So the pass is recorded while it runs, below modules and functions, where
every network of torchvision and timm consists of the same few dozen operators (`torch.fx` traces 71 of 75 of those
networks, and leaves each operator with many spellings; `torch.export` fixes the batch size). A new record is made for
each batch, so any batch size, width or control flow works.

In the record, each call has its own inputs and outputs. An in-place operator appears as its functional counterpart, and
the values it overwrote are kept. Steps that do not depend on the images (a standardised weight, a position table) are
left out.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map

from explainers.attribution.linear_map import LinearMap
from image_classification.models import main_and_auxiliary_logits
from image_classification.models.operators import OperatorFacts, OperatorKind, facts_of
from image_classification.models.running import Args, Kwargs, ModuleCall, Outputs, Running, following
from image_classification.plain_data import PlainValue


class UnsupportedOperatorError(NotImplementedError):
    """A method has no rule for an operator of the network; the message names operator and module."""


class Kind(enum.Enum):
    """The kinds of operators that attribution rules tell apart."""

    WEIGHTED = "linear in its input, with weights"
    BATCH_NORM = "batch normalisation with stored statistics"
    PASS = "element by element: activation, normalisation, product or sum with a constant"
    SHARE = "a sum, average or maximum over inputs: homogeneous of degree 1"
    MOVE = "rearranges, repeats, drops or pads elements"
    GATE = "product of two signals"
    OTHER = "none of these"


_TWO_SIGNALS = {
    "aten::add": Kind.SHARE,
    "aten::sub": Kind.SHARE,
    "aten::mul": Kind.GATE,
    "aten::div": Kind.GATE,
}
#: Operators for which the kind alone determines the attribution rule.
_KINDS = {
    OperatorKind.BATCH_NORM: Kind.BATCH_NORM,
    OperatorKind.MOVEMENT: Kind.MOVE,
    OperatorKind.LINEAR: Kind.SHARE,
}
_ACTIVATIONS = (OperatorKind.POINTWISE, OperatorKind.NORMALISATION)


class Value:
    """A tensor that depends on the images, at one point in the forward pass.

    Attributes:
        tensor: Its elements at that point.
        step: The step that computed it; None for the images.
        num_uses: Number of steps that read it.
        nonnegative: Whether it is known to hold no negative elements, whatever the images.
        past_weights: Whether a weighted layer lies between the images and this value.
    """

    __slots__ = ("handle", "nonnegative", "num_uses", "past_weights", "step", "tensor")

    def __init__(self, tensor: Tensor, step: Step | None = None) -> None:
        self.tensor = tensor
        self.handle = tensor  # the network's own object; keeping it alive keeps its id from being reused
        self.step = step
        self.num_uses = 0
        self.nonnegative = False
        self.past_weights = False


@dataclasses.dataclass(eq=False)
class Step:
    """One operator of the forward pass.

    Attributes:
        op: The functional ATen operator.
        args, kwargs: Its arguments; tensors that depend on the images appear as `Value`.
        inputs: Those values, each once.
        outputs: Floating-point results, in order.
        where: Name of the innermost module that was running ("" outside all).
        kind: See `Kind`.
        linear: The weights of a WEIGHTED step.
    """

    op: OpOverload
    args: Args
    kwargs: Kwargs
    inputs: list[Value]
    outputs: list[Value]
    where: str
    kind: Kind = Kind.OTHER
    linear: LinearMap | None = None

    @property
    def name(self) -> str:
        """The operator's name, such as `aten::relu`."""
        name: str = self.op._schema.name
        return name

    @property
    def facts(self) -> OperatorFacts:
        """The known facts about the operator."""
        return facts_of(self.name)

    @property
    def is_average_pool(self) -> bool:
        """Whether it averages over pixels."""
        return self.facts.pools == "average"

    @property
    def is_pool(self) -> bool:
        """Whether it takes an average or a maximum over pixels."""
        return bool(self.facts.pools)

    @property
    def is_activation(self) -> bool:
        """Whether it is an activation or a normalisation, not arithmetic with a constant."""
        return self.facts.kind in _ACTIVATIONS

    @property
    def is_bounded(self) -> bool:
        """Whether its result lies in a fixed interval, as that of a gate does."""
        return self.facts.bounded

    def describe(self) -> str:
        """Operator and module, for messages."""
        return f"operator {self.name} in module {self.where or '(the network itself)'!r}"

    def argument(self, *names: str, default: PlainValue = None) -> PlainValue:
        """Return the argument for the first of these names that the operator has, or its default if not given."""
        schema = self.op._schema.arguments
        for index, argument in enumerate(schema):
            if argument.name in names:
                if index < len(self.args) and not argument.kwarg_only:
                    return self.args[index]
                return self.kwargs.get(argument.name, argument.default_value)
        return default

    def compute(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the operator on other tensors in place of its `inputs`; return the floating-point results."""
        replaced = {id(value): tensor for value, tensor in zip(self.inputs, inputs, strict=True)}

        def fill(leaf: object) -> object:
            return replaced[id(leaf)] if isinstance(leaf, Value) else leaf

        return _floats(self.op(*tree_map(fill, self.args), **tree_map(fill, self.kwargs)))


@dataclasses.dataclass
class Record:
    """The forward pass of one batch.

    Attributes:
        images: The images, (B, C, H, W).
        logits: The network's output, (B, num_classes).
        steps: In the order of computation.
        module_outputs: Name and output of each module, in the order of returning; the network itself is "".
    """

    images: Value
    logits: Value
    steps: list[Step]
    module_outputs: list[tuple[str, Value]]

    @property
    def values(self) -> Iterator[Value]:
        """Iterate over all values, images first."""
        yield self.images
        for step in self.steps:
            yield from step.outputs

    def close(self) -> None:
        """Release the record's tensors.

        Steps and values refer to each other, so without this the tensors of a batch would stay until the garbage
        collector happens to run, and memory would grow over batches.
        """
        for step in self.steps:
            for value in step.outputs:
                value.step = None
            step.inputs.clear()
            step.outputs.clear()

    def bottlenecks(self) -> list[Value]:
        """Return the values that every path from the images to the logits goes through, in order.

        A value is a bottleneck if, between its computation and its last use, no other value that reaches the logits is
        alive.
        """
        reaching = self._reaching()
        last_use: dict[int, int] = {id(self.logits): len(self.steps)}
        for index, step in enumerate(self.steps):
            if any(id(output) in reaching for output in step.outputs):
                for value in step.inputs:
                    last_use[id(value)] = index
        found = [self.images]
        busy_until = last_use[id(self.images)]
        for index, step in enumerate(self.steps):
            alive = [output for output in step.outputs if id(output) in reaching]
            # Nothing computed earlier is read after this step, and only one value is left alive.
            if len(alive) == 1 and busy_until <= index:
                found.append(alive[0])
            busy_until = max([busy_until, *(last_use[id(output)] for output in alive)])
        return found

    def _reaching(self) -> set[int]:
        """Return the ids of the values that the logits depend on."""
        reaching = {id(self.logits)}
        for step in reversed(self.steps):
            if any(id(output) in reaching for output in step.outputs):
                reaching.update(id(value) for value in step.inputs)
        return reaching


def record_forward(model: nn.Module, images: Tensor) -> Record:
    """Run a network on a batch and record its operators.

    Args:
        model: In evaluation mode; its parameters do not change. Hooks on its modules are set for the duration of the
            call.
        images: (B, C, H, W).

    Raises:
        UnsupportedOperatorError: The network writes in place into part of a tensor that it reads elsewhere.
        ValueError: Its output does not depend on the images, or is not (B, num_classes).
    """
    recorder = _Recorder(images)
    with torch.no_grad(), following(model, leaving=recorder.note_output) as running, recorder:
        recorder.running = running
        logits, _ = main_and_auxiliary_logits(model(recorder.images.handle))
    output = recorder.value_of(logits)
    if output is None or output is recorder.images:
        raise ValueError("the network's output does not depend on its input: there is nothing to attribute")
    if logits.dim() != 2:
        raise ValueError(
            f"the network returns shape {tuple(logits.shape)}; attribution needs logits (B, num_classes)"
        )
    output.num_uses += 1
    return Record(recorder.images, output, recorder.steps, recorder.module_outputs)


def is_feature_map(value: Value, record: Record, *, to_one_row: bool = False) -> bool:
    """Whether a value is a feature map (B, C, h, w): more than one pixel, not an average of a larger map, not the
    images.

    Maps with their channels last, (B, h, w, C), are recognised by their aspect ratio, which differs from that of the
    images.

    Args:
        value: A value of the record.
        record: The forward pass.
        to_one_row: How closely the aspect ratio must agree. True: to within one row of the map, for decoders, which
            expect channels in dimension 1. False: within a factor of 2, since each side of a small map is rounded
            separately; this accepts some channels-last maps (timm's Swin).
    """
    if value is record.images or value.tensor.dim() != 4:
        return False
    if value.step is not None and value.step.is_average_pool:
        return False
    (height, width), (full_height, full_width) = value.tensor.shape[2:], record.images.tensor.shape[2:]
    if height * width <= 1:
        return False
    if to_one_row:
        return height <= full_height and abs(height - width * full_height / full_width) <= 1
    return 0.5 < (full_height / height) / (full_width / width) < 2


class _Recorder(TorchDispatchMode):
    """Runs every ATen operator while it is active and records those that depend on the images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.images = Value(images.detach().view_as(images))
        self.steps: list[Step] = []
        self.running = Running()
        self.module_outputs: list[tuple[str, Value]] = []
        self._values = {id(self.images.handle): self.images}
        self._overwritten: set[int] = set()

    def note_output(self, call: ModuleCall, _module: nn.Module, output: object) -> None:
        """Record a module's output."""
        value = self.value_of(output)
        if value is not None:
            self.module_outputs.append((call.name, value))

    def value_of(self, tensor: object) -> Value | None:
        """Return the current value of a tensor of the network; None if the tensor does not depend on the images."""
        return self._values.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Outputs:
        kwargs = kwargs or {}
        inputs: list[Value] = []
        for leaf in tree_iter((args, kwargs)):
            value = self.value_of(leaf)
            if value is not None and value not in inputs:
                inputs.append(value)
        if not inputs or facts_of(func._schema.name).kind is OperatorKind.LAYOUT:
            return func(*args, **kwargs)
        values_in = [tree_map(self._as_value, args), tree_map(self._as_value, kwargs)]
        step = Step(_functional(func), values_in[0], values_in[1], inputs, [], self.running.innermost)
        self._check_current(step, args, kwargs)
        written = _written(func, args, kwargs)
        for tensor in written:
            self._keep_old_content(tensor)
        results = func(*args, **kwargs)
        # A stale value left under a reused id would be wrong, so `handle` keeps every tracked object alive.
        for tensor in written or _floats(results):
            value = Value(tensor, step)
            step.outputs.append(value)
            self._values[id(tensor)] = value
        for value in inputs:
            value.num_uses += 1
        _classify(step)
        self.steps.append(step)
        return results

    def _as_value(self, leaf: object) -> object:
        value = self.value_of(leaf)
        return leaf if value is None else value

    def _keep_old_content(self, tensor: Tensor) -> None:
        """Before a tensor is overwritten, give all values that share its memory their own copy."""
        memory = tensor.untyped_storage().data_ptr()
        for value in list(self._values.values()):
            if value.handle.untyped_storage().data_ptr() == memory:
                if value.tensor is value.handle:
                    value.tensor = value.handle.clone()
                if value.handle is not tensor:
                    self._overwritten.add(id(value.handle))

    def _check_current(self, step: Step, args: Args, kwargs: Kwargs) -> None:
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self._overwritten:
                raise UnsupportedOperatorError(
                    f"{step.describe()} reads a tensor that was changed in place through another view of it: "
                    "attribution cannot follow that; write the network without the in-place operation"
                )


def _floats(results: Outputs) -> list[Tensor]:
    """Return the floating-point tensors among an operator's results."""
    leaves, _ = tree_flatten(results)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _functional(func: OpOverload) -> OpOverload:
    """Return the functional counterpart of an operator (`aten::relu` for `aten::relu_`), or the operator unchanged."""
    name = func._schema.name.removeprefix("aten::")
    if name.endswith("_") and func._schema.is_mutable and hasattr(torch.ops.aten, name[:-1]):
        packet = getattr(torch.ops.aten, name[:-1])
        overload = func._overloadname
        if hasattr(packet, overload):
            functional: OpOverload = getattr(packet, overload)
            return functional
    return func


def _written(func: OpOverload, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """Return the tensors that an operator overwrites."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            tensor = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(tensor, Tensor):
                written.append(tensor)
    return written


def _classify(step: Step) -> None:
    """Set a step's kind, weights and known facts about its results."""
    linear, signal = linear_map_of(step)
    if linear is not None and step.inputs == [signal]:
        step.kind = Kind.WEIGHTED
        step.linear = linear
    else:
        step.kind = _kind_of(step)
    if step.facts.kind is OperatorKind.BATCH_NORM or (
        len(step.outputs) > 1 and step.kind in (Kind.PASS, Kind.BATCH_NORM)
    ):
        del step.outputs[1:]  # saved statistics
    nonnegative = _is_nonnegative(step)
    for output in step.outputs:
        output.nonnegative = nonnegative
        output.past_weights = step.kind is Kind.WEIGHTED or any(value.past_weights for value in step.inputs)


def _kind_of(step: Step) -> Kind:
    kind = step.facts.kind
    same_shape = bool(step.outputs) and step.outputs[0].tensor.shape == step.inputs[0].tensor.shape
    if kind in _KINDS:
        return _KINDS[kind]
    if kind in _ACTIVATIONS and same_shape:
        return Kind.PASS
    if kind is OperatorKind.ARITHMETIC:
        num_signals = sum(isinstance(leaf, Value) for leaf in tree_iter((step.args, step.kwargs)))
        if num_signals == 1 or (step.name == "aten::mul" and len(step.inputs) == 1):
            return Kind.PASS if same_shape else Kind.OTHER
        if len(step.inputs) == 2 or step.name == "aten::add":
            return _TWO_SIGNALS.get(step.name, Kind.OTHER)
    return Kind.OTHER


def _is_nonnegative(step: Step) -> bool:
    if step.facts.nonnegative:
        return True
    if step.name in ("aten::hardtanh", "aten::clamp", "aten::clamp_min"):
        low = step.argument("min_val", "min")
        return isinstance(low, (int, float)) and low >= 0
    known = all(value.nonnegative for value in step.inputs)
    if step.name == "aten::constant_pad_nd":
        return known and step.argument("value") >= 0
    if step.name in ("aten::cat", "aten::stack"):
        constants = (leaf for leaf in tree_iter(step.args) if isinstance(leaf, Tensor))
        return known and not any(constants)
    bicubic = step.name == "aten::upsample_bicubic2d"
    if step.kind in (Kind.MOVE, Kind.SHARE) and not bicubic:
        return known and step.name != "aten::sub"
    return known and step.kind is Kind.GATE


def linear_map_of(step: Step) -> tuple[LinearMap | None, Value | None]:
    """Return a step's weights and the value they apply to; (None, None) unless it is a map with constant weights."""
    if step.name in ("aten::convolution", "aten::_convolution", "aten::cudnn_convolution"):
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        settings = tuple(step.argument(name) for name in names)
        signal, weight, bias = step.argument("input", "self"), step.argument("weight"), step.argument("bias")
    elif step.name == "aten::addmm":
        if step.argument("alpha") != 1 or step.argument("beta") != 1:
            return None, None
        settings = None
        signal, weight, bias = step.argument("mat1"), step.argument("mat2"), step.argument("self")
    elif step.name == "aten::mm":
        settings = None
        signal = step.argument("self")
        weight = step.argument("mat2")
        bias = None
    else:
        return None, None
    if isinstance(signal, Tensor) or not isinstance(weight, Tensor):
        return None, None
    return LinearMap(weight, bias, settings), signal
