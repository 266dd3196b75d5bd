"""One trial: the network with some units cut must compute what the masked network does.

Masked means: all slices that carry removed units are zeroed in the full network, and statistics over channels
(LayerNorm, some GroupNorms, weight standardisation, means) are taken over the kept channels: as in a network that never
had the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.models.module_tree import is_leaf
from image_classification.models.running import ModuleCall, following
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.code_lines import line_raising
from pruning.engine.computed_weights import computes_weights
from pruning.engine.cutting import Changes, plan_network, tensor_cuts
from pruning.engine.examples import Pass, output_tensors
from pruning.engine.groups import Group, Place
from pruning.engine.kept_state import state_kept
from pruning.engine.own_gradients import differing, gradients
from pruning.engine.proof.rehearsal import as_float, in_type, masked, rehearsal
from pruning.engine.requests_noted import Requests
from pruning.engine.stand_ins import stand_ins
from pruning.engine.steady import Steady
from pruning.engine.undisturbed import set_trace_mode, undisturbed
from pruning.engine.wrapped_tensors import is_wrapped

TOLERANCE = 1e-4
_MODULE_TOLERANCE = 1e-3
_NOTHING = 1e-9  # share of an output's largest number that counts as zero


@dataclasses.dataclass
class Failure:
    """The place and cause of a failed trial: the innermost module, a message, and whether it raised an exception."""

    module: str
    message: str
    raised: bool = False


class _DifferenceError(Exception):
    """Ends a run at the first module whose output differs."""


class Trial:
    """A cut that can be tried several times.

    Args:
        model: The network, under rehearsal.
        passes: The ways in which it is run.
        graph: Its channel graph. Attributes may come and go between two tries; what is masked must stay the same.
        mask: (num_units,) bool, True for the units that stay.
    """

    def __init__(
        self, model: nn.Module, passes: Sequence[Pass], graph: ChannelGraph, mask: np.ndarray
    ) -> None:
        self.graph = graph
        self._model = model
        self._passes = passes
        self._mask = mask
        self._expected: dict[int, _Run] = {}
        # (number of the pass, ids of the attributes that followed) of the tries in which all agreed.
        self._agreed: set[tuple[int, frozenset[int]]] = set()

    def failure(self, repeats: bool = True) -> Failure | None:
        """Cut the network, compare it with the masked one, and put it back; None if they agree.

        A second try ends at the first module whose output differs, since the expected outputs are known by then. Passes
        in which the same graph with the same attributes agreed before are not run again.

        Args:
            repeats: Also run the passes that repeat another operator by operator as long as nothing is cut.
        """
        if self._mask.all():
            return None
        following = frozenset(id(axis) for axis in self.graph.attributes)
        for number, one in enumerate(self._passes):
            is_repeat = any(other.trace == one.trace for other in self._passes[:number])
            if (number, following) in self._agreed or (is_repeat and not repeats):
                continue
            failure = self._failure_in(one)
            if failure is not None and not self._agrees_in_double(one, failure):
                return failure
            failure = self._failure_of_gradients(one) if one.own_gradients else None
            if failure is not None:
                return failure
            self._agreed.add((number, following))
        return None

    def _failure_in(self, one: Pass) -> Failure | None:
        found = self._run_cut(one, self._expected.get(one.trace))
        if found.failure is not None:
            return found.failure
        expected = self._expected_of(one)
        return _difference(expected, found) or _other_steps(one, expected, found)

    def _failure_of_gradients(self, one: Pass) -> Failure | None:
        """Compare the backward passes of the cut and the masked network; None if they agree.

        A network with statistics over channels or computed weights has no masked version with the same gradients; there
        the backward pass only has to run.
        """
        with self._cut(one):
            found = _gradients(self._model, one)
        if isinstance(found, Failure):
            return found
        if self.graph.statistics or computes_weights(self._model):
            return None
        with self._masked(one):
            expected = _gradients(self._model, one)
        if isinstance(expected, Failure):
            return None
        cuts = tensor_cuts(self.graph, self._mask)
        name = differing(expected, found, cuts, _MODULE_TOLERANCE)
        return None if name is None else Failure("", f"the gradient of {name!r} changes")

    def _agrees_in_double(self, one: Pass, failure: Failure) -> bool:
        """Whether the difference is due to rounding only: near ties that decide, or a range that costs precision."""
        if failure.raised:
            return False
        with in_type(self._model, torch.float64):
            found = self._run_cut(one)
            expected = self._run_masked(one)
        if found.failure is not None or expected.failure is not None:  # it does not run in double precision
            return False
        return _difference(expected, found) is None and _other_steps(one, expected, found) is None

    def raises(self) -> bool:
        """Whether the cut network raises an exception, whatever it computes otherwise."""
        return any(self._run_cut(one).failure is not None for one in _distinct(self._passes))

    def _expected_of(self, one: Pass) -> _Run:
        """Return the masked network's run of a pass; computed once for all passes that repeat it."""
        if one.trace not in self._expected:
            self._expected[one.trace] = self._run_masked(one)
        return self._expected[one.trace]

    def _run_cut(self, one: Pass, expected: _Run | None = None) -> _Run:
        with self._cut(one):
            return _run(self._model, one, self.graph, None, expected)

    def _run_masked(self, one: Pass) -> _Run:
        with self._masked(one):
            return _run(self._model, one, self.graph, self._mask)

    @contextlib.contextmanager
    def _cut(self, one: Pass) -> Iterator[None]:
        set_trace_mode(self._model, one.training)
        changes = Changes()
        plan_network(self._model, self.graph, self._mask, changes)
        changes.apply()
        try:
            yield
        finally:
            changes.revert()

    @contextlib.contextmanager
    def _masked(self, one: Pass) -> Iterator[None]:
        set_trace_mode(self._model, one.training)
        with masked(self._model, self.graph, self._mask, one.trace, one.divisors):
            yield


def _distinct(passes: Sequence[Pass]) -> list[Pass]:
    """Return the first pass of each trace."""
    return list({one.trace: one for one in reversed(passes)}.values())[::-1]


class Trials:
    """The same network under several cuts. The one that failed last is tried first.

    Args:
        model, passes, graph: See `Trial`.
        masks: One per cut.

    Attributes:
        first: The trial of the first cut.
    """

    def __init__(
        self, model: nn.Module, passes: Sequence[Pass], graph: ChannelGraph, masks: Sequence[np.ndarray]
    ) -> None:
        self.graph = graph
        self._trials = [Trial(model, passes, graph, mask) for mask in masks]
        self.first = self._trials[0]

    def failure(self, repeats: bool = True) -> Failure | None:
        """The first failure under any of the cuts; `repeats` as for `Trial.failure`."""
        for trial in list(self._trials):
            failure = trial.failure(repeats)
            if failure is not None:
                self._trials.remove(trial)
                self._trials.insert(0, trial)
                return failure
        return None


def failure_of_cut(model: nn.Module, graph: ChannelGraph, mask: np.ndarray) -> Failure | None:
    """Try the very cut that is about to be made, in all passes of the graph.

    Args:
        model: The network, with its own weights.
        graph: Its channel graph; a graph loaded from a checkpoint has no passes until `give_examples` provides
            examples.
        mask: (num_units,) bool, True for the units that stay.
    """
    if not graph.passes or mask.all():
        return None
    device = next(model.parameters()).device
    passes = []
    for one in graph.passes:
        example = one.example.map(lambda tensor: tensor.to(device))
        passes.append(dataclasses.replace(one, example=example))
    with undisturbed(model), rehearsal(model, passes):
        return Trial(model, passes, graph, mask).failure()


MaskMaker = Callable[[ChannelGraph], np.ndarray]


def random_mask(graph: ChannelGraph, groups: Sequence[Group], seed: int = 7) -> np.ndarray:
    """Return a random mask that keeps between 30 % and 70 % of each group's units, differently for each group."""
    generator = np.random.Generator(np.random.Philox(seed))
    mask = np.ones(graph.num_units, dtype=bool)
    for group in groups:
        count = int(np.clip(round(group.width * generator.uniform(0.3, 0.7)), 1, group.width - 1))
        mask[group.units] = False
        mask[group.units[generator.choice(group.width, count, replace=False)]] = True
    return mask


def random_halves(graph: ChannelGraph) -> np.ndarray:
    """Return a mask that keeps roughly a random half of every prunable group."""
    return random_mask(graph, graph.prunable)


def one_in_ten(graph: ChannelGraph) -> np.ndarray:
    """Return a mask that keeps a random tenth of every prunable group; at least two units, since one has no spread."""
    generator = np.random.Generator(np.random.Philox(11))
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable:
        count = min(max(2, round(group.width / 10)), group.width - 1)
        mask[group.units] = False
        mask[group.units[generator.choice(group.width, count, replace=False)]] = True
    return mask


def equal_widths(graph: ChannelGraph) -> np.ndarray:
    """Return a mask that keeps the last units of all prunable groups, the same number in each that is wide enough.

    A forward that compares two widths decides otherwise when they come out equal, and a slice that ends at a fixed
    number meets other channels when those before it go.
    """
    mask = np.ones(graph.num_units, dtype=bool)
    if graph.prunable:
        common = max(1, min(group.width for group in graph.prunable) // 2)
        for group in graph.prunable:
            mask[group.units[: group.width - common]] = False
    return mask


def all_but_one(graph: ChannelGraph) -> np.ndarray:
    """Return a mask without the first unit of every prunable group. Old and new width are coprime."""
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable:
        mask[group.units[0]] = False
    return mask


def different_widths(graph: ChannelGraph) -> np.ndarray:
    """Return a mask that keeps different numbers of units in groups of the same width, as far as possible; at least
    two.

    Random numbers can come out equal, and then a number that counts two kinds of channels is right for both.
    """
    mask = np.ones(graph.num_units, dtype=bool)
    rank: Counter[int] = Counter()
    for group in graph.prunable:
        count = min(2 + rank[group.width] % max(1, group.width - 2), group.width - 1)
        mask[group.units[count:]] = False
        rank[group.width] += 1
    return mask


#: The cuts that every graph must stand.
MASKS: tuple[MaskMaker, ...] = (random_halves, one_in_ten, equal_widths, different_widths)


@dataclasses.dataclass
class _Run:
    """The result of a trial run: one summary per module call, outputs and steps, or the failure that stopped it."""

    calls: list[tuple[str, np.ndarray]]
    outputs: list[Tensor]
    steps: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    failure: Failure | None = None


def _run(
    model: nn.Module,
    one: Pass,
    graph: ChannelGraph,
    mask: np.ndarray | None,
    expected: _Run | None = None,
) -> _Run:
    """Run the network and summarise the output of every leaf module, channel by channel.

    Args:
        model: Cut or masked.
        one: What it is given.
        graph: Tells where the channels are.
        mask: Which of them stay, in a masked network.
        expected: A run to agree with: the first difference ends this one as a failure.
    """
    run = _Run([], [])
    places: dict[tuple[str, int], list[Place]] = {}
    for place in graph.places:
        if place.kind == "output" and place.is_leaf:
            places.setdefault((place.module, place.call), []).append(place)

    def leaving(call: ModuleCall, module: nn.Module, output: object) -> None:
        # Of a module that the recorded pass did not call (an expert that got no token) the channels are not known.
        known = call.name in one.called and is_leaf(module)
        if known and isinstance(output, Tensor) and output.is_floating_point() and not is_wrapped(output):
            # Summarising is not a step of the network, nor one of its statistics.
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                summary = _summary(output, places.get((call.name, call.number), []), mask)
                run.calls.append((call.name, summary))
                if expected is not None:
                    run.failure = _call_difference(expected, run, len(run.calls) - 1)
            if run.failure is not None:
                raise _DifferenceError

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    example = as_float(one.example, dtype)
    torch.manual_seed(0)
    with (
        state_kept(model, one.written),
        following(model, leaving=leaving) as running,
        Requests(running) as requests,
        Steady(full_precision=True) if one.unsteady else contextlib.nullcontext(),
    ):
        try:
            run.outputs = output_tensors(example.run(model))
            run.steps = requests.steps
        except _DifferenceError:
            pass
        except Exception as error:  # whatever a network raises on a cut is what we want to know
            if _lacks_memory(error):
                raise
            where = running.failed or ""
            kind = type(model.get_submodule(where)).__name__
            message = f"{kind} {where!r} raises {_in_words(error)}"
            run.failure = Failure(where, message, raised=True)
    return run


def _gradients(model: nn.Module, one: Pass) -> dict[str, Tensor] | Failure:
    """Return the gradients of all outputs of a pass by parameter name, or the failure of the backward pass."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    torch.manual_seed(0)
    with (
        state_kept(model, one.written),
        stand_ins(model, lambda parameter: parameter.data),
        following(model) as running,
        Requests(running),
        Steady(full_precision=True) if one.unsteady else contextlib.nullcontext(),
        torch.enable_grad(),
    ):
        try:
            return gradients(model, output_tensors(as_float(one.example, dtype).run(model)))
        except Exception as error:  # as in `_run`
            if _lacks_memory(error):
                raise
            return Failure("", f"the backward pass raises {_in_words(error)}", raised=True)


def _lacks_memory(error: Exception) -> bool:
    """Whether the machine ran out of memory, which says nothing about a cut."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _in_words(error: BaseException) -> str:
    """Format an exception in one line: `ValueError (model.py:57): …`."""
    line = line_raising(error)
    first = (str(error).strip().splitlines() or [""])[0][:160]
    return f"{type(error).__name__}{f' ({line})' if line else ''}: {first}"


def _summary(output: Tensor, places: list[Place], mask: np.ndarray | None) -> np.ndarray:
    """Return mean and mean square of every kept channel, (2, C); of the whole tensor if it has no known channels."""
    if output.numel() == 0:  # a head that was given no boxes
        return np.zeros((2, 1), dtype=np.float32)
    values = output.detach().float()
    if not places or values.dim() != len(places[0].shape):
        return _moments(values, list(range(values.dim()))).reshape(2, 1)
    stays = [
        slice(None) if mask is None else (place.units < 0) | mask[np.maximum(place.units, 0)]
        for place in places
    ]
    for place, chosen in list(zip(places, stays, strict=True))[1:]:
        if not isinstance(chosen, slice):
            index = torch.from_numpy(np.flatnonzero(chosen))
            values = values.index_select(place.dim, index.to(values.device))
    # What goes along the first dimension that carries channels is left out of the short result.
    moments = _moments(values, [dim for dim in range(values.dim()) if dim != places[0].dim])
    kept: np.ndarray = moments[:, stays[0]]
    return kept


def _moments(values: Tensor, over: list[int]) -> np.ndarray:
    """Return the mean and mean square over some dimensions, (2, …), without an intermediate of the tensor's size."""
    if not over:
        return torch.stack([values, values.square()]).cpu().numpy()
    count = math.prod(values.shape[dim] for dim in over)
    lengths = torch.linalg.vector_norm(values, dim=over)
    return torch.stack([values.mean(over), lengths.square() / count]).cpu().numpy()


def _difference(expected: _Run, found: _Run) -> Failure | None:
    if expected.failure is not None:
        return expected.failure
    for number in range(min(len(expected.calls), len(found.calls))):
        failure = _call_difference(expected, found, number)
        if failure is not None:
            return failure
    if len(expected.outputs) != len(found.outputs):
        return Failure("", "the number of outputs changes")
    for left, right in zip(expected.outputs, found.outputs, strict=True):
        if left.shape != right.shape:
            return Failure("", "the shape of the output changes")
        if left.numel() == 0:  # a detector that finds nothing
            continue
        error = _error(left, right)
        if not error <= TOLERANCE:
            return Failure("", f"the output differs by {error:.1e}")
    return None


def _error(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference, relative to the largest value of the same channel.

    Boxes in pixels and scores may share a tensor: relative to the largest value of all, a wrong score would go
    unnoticed. Which dimension holds the channels is not known, so each is tried, the images' aside.
    """
    left, right = (torch.view_as_real(t) if t.is_complex() else t for t in (expected, found))
    if not left.is_floating_point():
        left, right = left.float(), right.float()
    error, size = (left - right).abs(), left.abs()
    least = float(size.max()) * _NOTHING + 1e-12
    worst = float(error.max() / size.max().clamp(min=least))
    for dim in range(1, left.dim()):
        others = [other for other in range(left.dim()) if other != dim]
        worst = max(worst, float((error.amax(others) / size.amax(others).clamp(min=least)).max()))
    return worst if not math.isnan(float(error.sum())) else math.nan


def _other_steps(one: Pass, expected: _Run, found: _Run) -> Failure | None:
    """A function that only the whole network calls, or only the cut one: somewhere a width decides.

    The whole network is the one that was recorded, or the masked one: where values decide, these two may differ.
    """
    fewest = min(one.steps ^ found.steps, expected.steps ^ found.steps, key=len)
    for module, name in sorted(fewest):
        which = "cut" if (module, name) in found.steps else "whole"
        where = repr(module) if module else "the network itself"
        return Failure(module, f"only the {which} network calls {name!r} in {where}: a width decides there")
    return None


def _call_difference(expected: _Run, found: _Run, number: int) -> Failure | None:
    """Compare one call of a module; None if they agree, or if the expected run has no such call."""
    if number >= len(expected.calls):
        return None
    name, left = expected.calls[number]
    other, right = found.calls[number]
    if name != other or left.shape != right.shape:
        return Failure(other, f"the path or shape changes at {other!r}")
    # Rows: mean and mean square. Means near 0 (behind an instance norm) are rounding, so both rows are measured by the
    # second: the mean by the root of the largest mean square, the mean square by itself.
    power = max(float(left[1].max()), 1e-12)
    error = np.abs(left - right).max(axis=1)
    if not (error[0] <= _MODULE_TOLERANCE * power**0.5 and error[1] <= _MODULE_TOLERANCE * power):
        return Failure(name, f"{name!r} computes something else on fewer channels")
    return None
