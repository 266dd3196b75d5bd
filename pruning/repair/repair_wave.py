"""The wave of repairs: layer after layer, in the order in which they run, each from all calibration images.

Original and rewritten network run side by side. Where a layer to be solved for is reached, all passes sleep; what it
reads now and what it gave before become sums; the sums become weights; and the passes go on with them. A layer that is
called several times is solved for once, at its last call, from the rows of all its calls.
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
    """What a repair did to one layer.

    Attributes:
        parameter: The weights.
        before, after: Held-out error of the layer's outputs as a share of their variance.
        ridge: λ; 0 where only the constant, or nothing, changed, and where weights are held at zero.
        num_inputs: Inputs of the layer: what has to be found per output.
        num_rows: Rows that were fitted.
    """

    parameter: str
    before: float
    after: float
    ridge: float
    num_inputs: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Pair:
    """One batch in both networks.

    Attributes:
        original, rewritten: Run the network on the batch.
        held_out: The batch judges, it does not fit.
    """

    original: Callable[[], Outputs]
    rewritten: Callable[[], Outputs]
    held_out: bool


@contextlib.contextmanager
def failing_together(distributed: Distributed) -> Iterator[None]:
    """What fails on one rank, memory among others, fails on all, so that none waits for it. Collective.

    What stands within must not be collective itself.
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
        contraction: In the rewritten network.
        step: Between the positions whose rows are used.
        fit, judge: The images to fit and those held out.
    """

    contraction: Contraction
    step: int
    fit: Evidence
    judge: Evidence


class Wave:
    """Solves layer after layer.

    Args:
        original: The network before the cut.
        rewritten: The network after it; its weights change in place.
        elements: Parameter → which elements of the original stand in the cut one (`kept_elements`).
        layers: Parameter to be solved for → how the network reads through it.
        num_images: Images to fit, of all ranks together.
        ridges: λ to choose from.
        supports: Parameter → bool mask of the weights that are left; the others stay zero.
        distributed: Sums are added up over ranks, and rank 0's solution is everyone's.
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
        # Of the original and the rewritten network, shared by all passes (see `ContractionMode`).
        self._numbers: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def run(
        self, pairs: Sequence[Pair], in_flight: int | None = None
    ) -> tuple[list[RepairedLayer], list[tuple[Outputs, Outputs]]]:
        """Repair every layer from these batches. Collective.

        Args:
            pairs: The batches.
            in_flight: How many may be under way together; where there are more, they are run again for every layer.

        Returns:
            The layers, and what both networks give for every held-out batch in the end.
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
        """The layers in order, divided into those that one pass solves for.

        What has passed a layer that is called again went through its old weights, so it stands alone.
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
            If the passes run on to the end, what the networks give for the batches held out.
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
        """Add the rows of all calls of one layer in some batches."""
        with contextlib.ExitStack() as stack:
            flights = self._take_off(pairs, [name], stack)
            for _ in range(self.layers[name].calls):
                self._add(self._next(flights), [pair.held_out for pair in pairs])

    def _take_off(
        self, pairs: Sequence[Pair], stops: Collection[str], stack: contextlib.ExitStack
    ) -> list[tuple[Flight, Flight]]:
        """Passes of both networks over each batch, that stop at these layers; the stack ends them."""
        one, two = self._numbers
        return [
            (
                stack.enter_context(Flight(self.original, pair.original, stops, one)),
                stack.enter_context(Flight(self.rewritten, pair.rewritten, stops, two)),
            )
            for pair in pairs
        ]

    def _next(self, flights: Sequence[tuple[Flight, Flight]]) -> list[tuple[Stop, Stop]]:
        """All passes at their next stop."""
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
        """Add the rows of one call of a layer, whose name it is."""
        name = stops[0][1].contraction.parameter
        problem = self._problems.setdefault(name, self._new_problem(stops[0][1].contraction))
        for (before, after), judges in zip(stops, held_out, strict=True):
            contraction = after.contraction
            group, column = self._columns(before.contraction, contraction)
            targets = before.outputs(problem.step)[group, :, column].transpose(1, 2) - self._bias(contraction)
            evidence = problem.judge if judges else problem.fit
            evidence.add(contraction.rows(problem.step), targets)
        return name

    def _new_problem(self, contraction: Contraction) -> _Problem:
        """A layer's problem without rows."""
        groups, inputs, outputs = contraction.positions.shape
        reader = self.layers[contraction.parameter]
        num_rows = reader.calls * reader.rows_per_image * self.num_images
        step = step_for(num_rows, inputs, contraction.num_dims)
        device = self._tensors[contraction.parameter].device
        fit = evidence_for(groups, inputs, outputs, round(num_rows / step**contraction.num_dims), device)
        return _Problem(contraction, step, fit, fit.empty_like())

    def _bias(self, contraction: Contraction) -> Tensor:
        """(G, 1, M) what the operator adds in the rewritten network."""
        groups, _, outputs = contraction.positions.shape
        if contraction.bias is None:
            return torch.zeros(1, device=self._tensors[contraction.parameter].device)
        return self._tensors[contraction.bias].detach().reshape(groups, 1, outputs)

    def _columns(self, before: Contraction, after: Contraction) -> tuple[Tensor, Tensor]:
        """(G, 1) group and (G, M) column of the original's outputs that each output of the cut layer was."""
        element = self.elements.get(after.parameter)
        if element is None:  # nothing of it was cut
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
        """Put a solution into the parameter, and its constant where it can be taken up; rank 0's, everywhere."""
        parameter = self._tensors[contraction.parameter].data
        flat = parameter.flatten().clone()  # flatten may be a view
        flat[positions.flatten()] = self._shared(solution.weights).to(parameter.dtype).flatten()
        parameter.copy_(flat.view_as(parameter))
        taker = self.layers[contraction.parameter].constant
        if taker is not None:
            tensor = self._tensors[taker.tensor].data
            tensor += (self._shared(solution.bias).flatten() * taker.sign).to(tensor.dtype)

    def _shared(self, values: Tensor) -> Tensor:
        """Rank 0's values: solutions of equal sums may differ in the last bit between machines."""
        values = values.contiguous()
        if self.distributed.is_distributed:
            torch.distributed.broadcast(values, src=0)
        return values

    def _report(self) -> list[RepairedLayer]:
        """The figures of all layers, read from the device at once."""
        if not self._figures:
            return []
        rows = torch.stack(list(self._figures.values())).tolist()
        return [
            RepairedLayer(name, before, after, ridge, self.layers[name].num_inputs, int(num_rows))
            for name, (before, after, ridge, num_rows) in zip(self._figures, rows, strict=True)
        ]
