"""A network under analysis, with its recorded passes and constraints."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from image_classification.config import SettingError
from image_classification.models.modes import modes_restored
from image_classification.models.module_tree import named_modules
from image_classification.models.plain_tensors import plain_tensors
from pruning.engine.constraints import Constraints
from pruning.engine.examples import Example, OutputError, Pass
from pruning.engine.labeller import Labeller
from pruning.engine.made_on_demand import made_on_demand
from pruning.engine.named_tensors import named_tensors, tensor_names
from pruning.engine.pairs import untouched_twins
from pruning.engine.traces import Trace
from pruning.engine.tracing import record
from pruning.engine.undisturbed import set_trace_mode

logger = logging.getLogger(__name__)
_MOST_NAMES = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """A network under analysis.

    Attributes:
        model: The network.
        passes: Every example in evaluation, then every one in training.
        traces: The recorded passes that differ from each other; the first is the first example in evaluation.
        constraints: The user's demands.
        pairs: Submodules that are cut alike, by name.
        constants: Names of plain tensors that the passes use as constants, since they make them on demand.
        labelled: The latest propagated labels, by policy.
    """

    model: nn.Module
    passes: list[Pass]
    traces: list[Trace]
    constraints: Constraints
    pairs: Sequence[tuple[str, str]] = ()
    constants: frozenset[str] = frozenset()
    labelled: dict[frozenset[tuple[str, str]], Labeller] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The network's modules by their qualified names."""
        return dict(named_modules(self.model))

    @functools.cached_property
    def tensor_names(self) -> dict[str, tuple[str, ...]]:
        """See `named_tensors.tensor_names`."""
        return tensor_names(self.model)


def open_case(
    model: nn.Module,
    examples: Sequence[Example],
    training_examples: Sequence[Example],
    constraints: Constraints,
    pairs: Sequence[tuple[str, str]] = (),
) -> Case:
    """Record a network's passes. Call inside `undisturbed`.

    Args:
        model: The network.
        examples: Its inputs in evaluation mode.
        training_examples: Its inputs in training mode; `examples` if empty.
        constraints: The user's demands.
        pairs: Submodules that are cut alike, by name.

    Raises:
        SettingError: The network does not run on an example.
    """
    passes: list[Pass] = []
    traces: list[Trace] = []
    for example in examples:
        _enter(passes, traces, *_recorded(model, example, "example", training=False))
    for example in training_examples or examples:
        setting = "training_example" if training_examples else "example"
        try:
            example, trace = _recorded(model, example, setting, training=True)
        except SettingError as error:
            if training_examples:
                raise
            logger.warning(
                "only the evaluation of the network is looked at; what it does in training may break: %s",
                error.problem,
            )
            continue
        _enter(passes, traces, example, trace)
    constants = _leave_made_on_demand(model, passes[0], traces)
    used = {name for trace in traces for name in trace.used_names}
    return Case(model, passes, traces, constraints, [*pairs, *untouched_twins(model, used)], constants)


def _leave_made_on_demand(model: nn.Module, one: Pass, traces: Sequence[Trace]) -> frozenset[str]:
    """Take the names of the tensors from the traces that a pass makes itself when they are missing: constants."""
    met = plain_tensors(model).keys() & {name for trace in traces for name in trace.used_names}
    if not met:
        return frozenset()
    set_trace_mode(model, one.training)
    made = made_on_demand(model, sorted(met), lambda: one.example.run(model))
    for trace in traces:
        trace.tensors[:] = [
            dataclasses.replace(info, name=None) if info.name in made else info for info in trace.tensors
        ]
    return frozenset(made)


def _enter(passes: list[Pass], traces: list[Trace], example: Example, trace: Trace) -> None:
    """Add a pass, and its trace unless that repeats another."""
    number = next((i for i, other in enumerate(traces) if _same(other, trace)), len(traces))
    if number == len(traces):
        traces.append(trace)
    passes.append(
        Pass(
            example,
            trace.training,
            number,
            trace.steps,
            frozenset(call.module for call in trace.calls),
            written=trace.written,
            divisors=trace.divisors,
            unsteady=trace.unsteady,
            own_gradients=trace.own_gradients,
            decides=trace.decides,
        )
    )


def _recorded(model: nn.Module, example: Example, setting: str, training: bool) -> tuple[Example, Trace]:
    """Record the pass on two images of the example, or on all of it if the network does not run on fewer (graph
    networks).

    Raises:
        SettingError: The network does not run on it.
    """
    device = next(model.parameters()).device
    example = example.map(lambda tensor: tensor.to(device))
    try:
        few = example.few()
        return few, record(model, few.args, few.kwargs, training=training)
    except OutputError as error:
        raise SettingError(setting, _shapes(example), str(error)) from error
    except Exception:  # whatever a network raises on part of a batch
        pass
    try:
        return example, record(model, example.args, example.kwargs, training=training)
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        problem = f"the network does not run on it: {type(error).__name__}: {text}"
        if training:
            problem += "; give what it takes in training mode, targets included, as `training_example`"
        raise SettingError(setting, _shapes(example), problem) from error


def _shapes(example: Example) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in example.tensors) or "no tensor"


def _same(one: Trace, other: Trace) -> bool:
    """Whether two passes run the same operators on the same arguments and give the same result."""
    if (
        len(one.operations) != len(other.operations)
        or one.inputs != other.inputs
        or one.outputs != other.outputs
    ):
        return False
    for left, right in zip(one.operations, other.operations, strict=True):
        same = left.func is right.func and left.module == right.module and left.outputs == right.outputs
        if not same or repr((left.args, left.kwargs)) != repr((right.args, right.kwargs)):
            return False
    for mine, its in zip(one.tensors, other.tensors, strict=True):
        if mine.shape != its.shape or mine.name != its.name:
            return False
    with torch._C.DisableTorchFunctionSubclass():  # outputs may be of classes of the network's own
        return all(torch.equal(a, b) for a, b in zip(one.results, other.results, strict=True))


def refuse_unready(model: nn.Module) -> None:
    """Refuse a network that cannot be analysed at all.

    Raises:
        SettingError: It has no parameters, a lazy module that has not run yet, tensors that cannot be changed, a
            TorchScript module, or no modes.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = repr(name) if name else "the network"
            problem = f"{which} is a TorchScript module, whose layers cannot be cut: give the original"
            raise SettingError("model", type(model).__name__, problem)
    if next(iter(model.parameters()), None) is None:
        raise SettingError("model", type(model).__name__, "the network has no parameters: nothing to prune")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        reason = _unready(tensor)
        if reason is not None:
            raise SettingError("model", type(model).__name__, f"{name!r} {reason}")
    try:
        with modes_restored(model):
            pass
    except NotImplementedError as error:
        problem = f"its mode cannot be set ({error}): prune the network that it was exported from"
        raise SettingError("model", type(model).__name__, problem) from error


def _unready(tensor: Tensor) -> str | None:
    """Return why a parameter or buffer cannot be run or written to, and what to do; None if it can."""
    if is_lazy(tensor):
        return "is lazy and has no shape yet: run the network once on a batch first"
    if tensor.is_meta:
        return "is on the device meta and has no values yet: load the weights first"
    if tensor.is_inference():
        return "was made under torch.inference_mode() and cannot be changed: build the network outside of it"
    return None


def untouched_tensors(case: Case, widths: Collection[int]) -> tuple[str, ...]:
    """Return the names of the parameters that no pass has touched and that are not cut like others.

    And of such buffers and plain tensors in the shape of a parameter that is in use, since an average may be kept in
    them, and of vectors with an entry per channel that may go, since a branch that no pass takes may use them.
    (Tensors of other shapes may be features that a pass has left behind.)

    Args:
        case: The network.
        widths: Numbers of channels that may become fewer.
    """
    used = {name for trace in case.traces for name in trace.used_names} | case.constants
    followers = tuple(f"{second}." for _, second in case.pairs)
    parameters = dict(case.model.named_parameters())
    shapes = {
        parameter.shape for name, parameter in parameters.items() if name in used and parameter.dim() > 1
    }
    held = {name: tensor for name, tensor in named_tensors(case.model).items() if name not in parameters}
    others = [
        name
        for name, tensor in held.items()
        if tensor.shape in shapes
        or (_holds_values(tensor) and tensor.numel() in widths and tensor.numel() == max(tensor.shape) > 1)
    ]
    names = (name for name in (*parameters, *others) if not name.startswith(followers))
    return tuple(name for name in names if name not in used)


def _holds_values(tensor: Tensor) -> bool:
    """Whether a tensor is of a kind whose use a trace notes: no counters or positions."""
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def warn_of_untouched(names: Sequence[str]) -> None:
    """Warn of parameters that keep their shapes though their inputs may become narrower."""
    if not names:
        return
    shown = ", ".join(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        shown += f" and {len(names) - _MOST_NAMES} more"
    logger.warning(
        "no pass on the example touches these tensors, which stay as they are: %s. If the network uses them on "
        "other inputs or through another method, give examples of those too: `example=[a, b]`",
        shown,
    )
