"""The wave of repairs: layers are repaired in the order in which they run, each from all calibration images.

The original and the rewritten network run side by side. At each layer to solve for, all passes sleep. The layer's
inputs in the rewritten network and its outputs in the original are accumulated into sums, the weights are solved for,
and the passes continue with them. A layer that is called several times is solved for once, at its last call, from the
rows of all its calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from image_classification.distributed import Distributed
from image_classification.models.running import Outputs
from pruning.engine.named_tensors import named_tensors
from pruning.repair.contractions import Contraction
from pruning.repair.flights import Flight, Stop
from pruning.repair.solution import RIDGES, Solution, solve
from pruning.repair.sparse_solution import solve_on_support
from pruning.repair.sums import Evidence, evidence_for, step_for
from pruning.repair.survey import Reader


@dataclasses.dataclass(frozen=True)
class RepairedLayer:
    """The result of repairing one layer.

    Attributes:
        parameter: Name of the weights.
        before, after: Held-out error of the layer's outputs as a share of their variance.
        ridge: λ; 0 if only the constant or nothing changed, and if weights are held at zero.
        num_inputs: Number of inputs of the layer, the unknowns per output.
        num_rows: Number of rows fitted.
    """

    parameter: str
    before: float
    after: float
    ridge: float
    num_inputs: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Pair:
    """One batch run through both networks.

    Attributes:
        original, rewritten: Run the network on the batch.
        held_out: Whether the batch is held out from fitting.
    """

    original: Callable[[], Outputs]
    rewritten: Callable[[], Outputs]
    held_out: bool


@contextlib.contextmanager
def failing_together(distributed: Distributed) -> Iterator[None]:
    """Make a failure on one rank (such as out of memory) a failure on all, so that no rank is left waiting. Collective.

    The block itself must not contain collectives.
    """
    error: RuntimeError | None = None
    try:
        yield
    except RuntimeError as found:
        error = found
    count = distributed.sum_on_hosts(error is not None)
    if error is not None:
        raise error
    if count:
        raise RuntimeError(f"it failed on {count} of the other ranks")


@dataclasses.dataclass
class _Problem:
    """The least-squares problem of one layer.

    Attributes:
        contraction: Its contraction in the rewritten network.
        step: Step between the positions whose rows are used.
        fit, judge: Sums over the images to fit and those held out.
    """

    contraction: Contraction
    step: int
    fit: Evidence
    judge: Evidence


def _is_same_use(one: Contraction, other: Contraction) -> bool:
    """Whether two calls use the elements of a parameter in the same places: not as a matrix and its transpose, say."""
    if one.positions.shape != other.positions.shape:
        return False
    rows = torch.equal(one.positions[:, :, 0], other.positions[:, :, 0])
    return rows and torch.equal(one.positions[:, 0], other.positions[:, 0])


class Wave:
    """Solves layer after layer.

    Args:
        original: The network before the cut.
        rewritten: The network after it; its weights change in place.
        elements: Parameter → indices of the original's elements kept in the cut one (`kept_elements`).
        layers: Parameter to solve for → its `Reader`.
        num_images: Number of images to fit, over all ranks.
        ridges: λ to choose from.
        supports: Parameter → bool mask of the remaining weights; the others stay zero.
        distributed: Ranks to sum over; all ranks use rank 0's solution.
    """

    def __init__(
        self,
        original: nn.Module,
        rewritten: nn.Module,
        elements: Mapping[str, Tensor],
        layers: Mapping[str, Reader],
        num_images: int,
        *,
        ridges: Sequence[float] = RIDGES,
        supports: Mapping[str, Tensor] | None = None,
        distributed: Distributed | None = None,
    ) -> None:
        self.supports = supports or {}
        self.original = original
        self.rewritten = rewritten
        self.elements = elements
        self.layers = layers
        self.num_images = num_images
        self.ridges = ridges
        self.distributed = distributed or Distributed()
        self._tensors = named_tensors(rewritten)
        self._problems: dict[str, _Problem] = {}
        self._figures: dict[str, Tensor] = {}
        self._unpaired: set[str] = (
            set()
        )  # layers left as they are: their rows in the two networks are not the same
        # Caches for the original and the rewritten network, shared by all passes (see `ContractionMode`).
        self._numbers: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def run(
        self, pairs: Sequence[Pair], in_flight: int | None = None
    ) -> tuple[list[RepairedLayer], list[tuple[Outputs, Outputs]]]:
        """Repair every layer from these batches. Collective.

        Args:
            pairs: The batches.
            in_flight: Largest number of pairs in flight at once; if there are more, they are run again for every layer.

        Returns:
            The layers, and both networks' final outputs for every held-out batch.
        """
        size = len(pairs) if in_flight is None else min(in_flight, len(pairs))
        squads = [pairs[begin : begin + size] for begin in range(0, len(pairs), size)]
        one_by_one = self.distributed.sum_on_hosts(len(squads) > 1) > 0
        segments = self._segments(one_by_one=one_by_one)
        results: list[tuple[Outputs, Outputs]] | None = None
        for segment in segments:
            if one_by_one:
                with failing_together(self.distributed):
                    for squad in squads:
                        self._visit(segment[0], squad)
                self._solve(self._problems.pop(segment[0]))
            else:
                results = self._fly(segment, pairs, finishes=segment is segments[-1])
        if results is None or self.layers[segments[-1][0]].calls > 1:
            with failing_together(self.distributed):
                results = [(pair.original(), pair.rewritten()) for pair in pairs if pair.held_out]
        return self._report(), results

    def _segments(self, *, one_by_one: bool) -> list[list[str]]:
        """Divide the layers, in order, into segments that are solved for in one pass.

        A layer that is called again stands alone, since data after its earlier calls went through its old weights.
        """
        segments: list[list[str]] = []
        joins = False
        for name, reader in self.layers.items():
            alone = one_by_one or reader.calls > 1
            if joins and not alone:
                segments[-1].append(name)
            else:
                segments.append([name])
            joins = not alone
        return segments

    def _fly(
        self, segment: Sequence[str], pairs: Sequence[Pair], *, finishes: bool
    ) -> list[tuple[Outputs, Outputs]] | None:
        """Solve for some layers in one pass of each network over all batches.

        Returns:
            The networks' outputs for the held-out batches, if the passes run to the end.
        """
        calls = Counter[str]()
        held_out = [pair.held_out for pair in pairs]
        with contextlib.ExitStack() as stack:
            flights = self._take_off(pairs, segment, stack)
            while calls.total() < sum(self.layers[name].calls for name in segment):
                with failing_together(self.distributed):
                    name = self._add(self._next(flights), held_out)
                calls[name] += 1
                if calls[name] == self.layers[name].calls:
                    self._solve(self._problems.pop(name))
            if not finishes:
                return None
            with failing_together(self.distributed):
                return [
                    (before.finish(), after.finish())
                    for (before, after), judges in zip(flights, held_out, strict=True)
                    if judges
                ]

    def _visit(self, name: str, pairs: Sequence[Pair]) -> None:
        """Add the rows of all calls of one layer for some batches."""
        with contextlib.ExitStack() as stack:
            flights = self._take_off(pairs, [name], stack)
            for _ in range(self.layers[name].calls):
                self._add(self._next(flights), [pair.held_out for pair in pairs])

    def _take_off(
        self, pairs: Sequence[Pair], stops: Collection[str], stack: contextlib.ExitStack
    ) -> list[tuple[Flight, Flight]]:
        """Start passes of both networks over each batch that stop at these layers; the stack ends them."""
        one, two = self._numbers
        return [
            (
                stack.enter_context(Flight(self.original, pair.original, stops, one)),
                stack.enter_context(Flight(self.rewritten, pair.rewritten, stops, two)),
            )
            for pair in pairs
        ]

    def _next(self, flights: Sequence[tuple[Flight, Flight]]) -> list[tuple[Stop, Stop]]:
        """Advance all passes to their next stop."""
        stops = [(before.advance(), after.advance()) for before, after in flights]
        found = [(one, two) for one, two in stops if one is not None and two is not None]
        names = {stop.contraction.parameter for pair in found for stop in pair}
        if len(found) != len(stops) or len(names) != 1:
            raise RuntimeError(
                f"repair: the passes of the two networks part at {sorted(names)}: their operators depend on the images"
            )
        return found

    # -- the sums ------------------------------------------------------------------------------------------

    def _add(self, stops: Sequence[tuple[Stop, Stop]], held_out: Sequence[bool]) -> str:
        """Add the rows of one call of a layer and return the layer's name."""
        name = stops[0][1].contraction.parameter
        problem = self._problems.setdefault(name, self._new_problem(stops[0][1].contraction))
        for (before, after), judges in zip(stops, held_out, strict=True):
            contraction = after.contraction
            if name in self._unpaired or not _is_same_use(contraction, problem.contraction):
                self._unpaired.add(name)
                continue
            group, column = self._columns(before.contraction, contraction)
            targets = before.outputs(problem.step)[group, :, column].transpose(1, 2) - self._bias(contraction)
            inputs = contraction.rows(problem.step)
            if (
                inputs.shape[1] != targets.shape[1]
            ):  # an expert that is given other tokens than before the cut
                self._unpaired.add(name)
                continue
            evidence = problem.judge if judges else problem.fit
            evidence.add(inputs, targets)
        return name

    def _new_problem(self, contraction: Contraction) -> _Problem:
        """Create a layer's problem without rows."""
        groups, inputs, outputs = contraction.positions.shape
        reader = self.layers[contraction.parameter]
        num_rows = reader.calls * reader.rows_per_image * self.num_images
        step = step_for(num_rows, inputs, contraction.num_dims)
        device = self._tensors[contraction.parameter].device
        fit = evidence_for(groups, inputs, outputs, round(num_rows / step**contraction.num_dims), device)
        return _Problem(contraction, step, fit, fit.empty_like())

    def _bias(self, contraction: Contraction) -> Tensor:
        """Return what the operator adds in the rewritten network, (G, 1, M)."""
        groups, _, outputs = contraction.positions.shape
        if contraction.bias is None:
            return torch.zeros(1, device=self._tensors[contraction.parameter].device)
        return self._tensors[contraction.bias].detach().reshape(groups, 1, outputs)

    def _columns(self, before: Contraction, after: Contraction) -> tuple[Tensor, Tensor]:
        """Return the original's group (G, 1) and column (G, M) of each output of the cut layer."""
        element = self.elements.get(after.parameter)
        if element is None:  # the parameter was not cut
            element = torch.arange(self._tensors[after.parameter].numel())
        place = torch.full((int(before.positions.max()) + 1,), -1)
        groups, inputs, outputs = before.positions.shape
        numbers = torch.arange(groups * outputs).reshape(groups, 1, outputs).expand(groups, inputs, outputs)
        place[before.positions.flatten()] = numbers.flatten()
        number = place[element[after.positions[:, 0, :]]]
        device = self._tensors[after.parameter].device
        return (number[:, :1] // outputs).to(device), (number % outputs).to(device)

    # -- the solution --------------------------------------------------------------------------------------

    def _solve(self, problem: _Problem) -> None:
        contraction = problem.contraction
        name = contraction.parameter
        if self.distributed.sum_on_hosts(name in self._unpaired):
            return
        problem.fit.reduce(self.distributed)
        problem.judge.reduce(self.distributed)
        weights = self._tensors[name].detach().flatten()
        positions = contraction.positions.to(weights.device)
        has_bias = self.layers[name].constant is not None
        fit = problem.fit
        judge = problem.judge
        present = weights[positions]
        with failing_together(self.distributed):
            if name in self.supports:
                support = self.supports[name].to(weights.device).flatten()[positions]
                solution = solve_on_support(fit, judge, present, support, has_bias=has_bias)
            else:
                solution = solve(fit, judge, present, has_bias=has_bias, ridges=self.ridges)
        self._write(contraction, positions, solution)
        self._figures[name] = torch.cat([solution.figures, problem.fit.num_rows[None]])

    def _write(self, contraction: Contraction, positions: Tensor, solution: Solution) -> None:
        """Write a solution into the parameter, and its constant if something can absorb it; rank 0's on all ranks."""
        parameter = self._tensors[contraction.parameter].data
        flat = parameter.flatten().clone()  # flatten may return a view
        flat[positions.flatten()] = self._shared(solution.weights).to(parameter.dtype).flatten()
        parameter.copy_(flat.view_as(parameter))
        taker = self.layers[contraction.parameter].constant
        if taker is not None:
            tensor = self._tensors[taker.tensor].data
            tensor += (self._shared(solution.bias).flatten() * taker.sign).to(tensor.dtype)

    def _shared(self, values: Tensor) -> Tensor:
        """Broadcast rank 0's values: solutions of equal sums may differ in the last bit between machines."""
        values = values.contiguous()
        if self.distributed.is_distributed:
            torch.distributed.broadcast(values, src=0)
        return values

    def _report(self) -> list[RepairedLayer]:
        """Return the figures of all layers, read from the device at once."""
        if not self._figures:
            return []
        rows = torch.stack(list(self._figures.values())).tolist()
        return [
            RepairedLayer(name, before, after, ridge, self.layers[name].num_inputs, int(num_rows))
            for name, (before, after, ridge, num_rows) in zip(self._figures, rows, strict=True)
        ]
