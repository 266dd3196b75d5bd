"""Repairs a rewritten network: the remaining channels compensate for removed ones, without labels, gradients or
training.

    plan = plan_repair(model, graph, mask)                        # before the cut: keeps a copy of the network
    prune_channels(model, graph, keep)
    report = plan.repair(model, batches)                          # weights of the cut layers change in place

A quarter of the calibration images is held out. It determines the ridge of every layer, whether a layer's solution is
kept, and finally whether the repaired network's outputs are closer to the original's than those of the cut network
(and, if there are targets, whether its loss has not increased). If not, the network is left as the cut left it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.config import SettingError, check_choice, check_setting
from image_classification.distributed import Distributed
from image_classification.models.modes import exact_float32
from image_classification.observe.html_table import html_table
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.examples import tensors_in
from pruning.engine.named_tensors import named_tensors
from pruning.repair.cut_layers import kept_elements, reading_parameters
from pruning.repair.image_chunks import Chunk, check_differ, chunks_of, few_of
from pruning.repair.norm_statistics import norms_of, remeasure
from pruning.repair.pass_memory import PassMemory
from pruning.repair.repair_wave import Pair, RepairedLayer, Wave, failing_together
from pruning.repair.solution import RIDGES
from pruning.repair.survey import Reader, layers_behind, survey
from pruning.task import Task, num_samples, to_device

log = logging.getLogger(__name__)
Method = Literal["none", "statistics", "least-squares"]
REPAIR_METHODS: tuple[Method, ...] = get_args(Method)
Scope = Literal["cut", "behind"]
REPAIR_SCOPES: tuple[Scope, ...] = get_args(Scope)
# Share of the outputs' variance below which re-estimating statistics is not worth its passes.
_LITTLE_TO_MEND = 0.1
_ALWAYS_IN_FLIGHT = 256  # running again for every layer costs much more than holding these


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """Settings of a repair.

    Attributes:
        method: `least-squares` solves for the weights of layers; `statistics` only re-estimates batch-norm statistics;
            `none` does no repair.
        scope: Which layers are solved for: those that lost inputs (`cut`), or all from the first of these on
            (`behind`), which also compensates what earlier layers could not.
        held_out: Share of the images held out from fitting.
        ridges: Ridges to choose from, relative to the mean square of a layer's inputs.
        chunk: Number of images per forward pass.
        in_flight: Number of images whose passes are in flight together, so that one pass of each network solves for all
            layers; beyond that, passes are run again for every layer. By default as many as need no more memory than
            training on the largest batch, but at least 256.
    """

    method: Method = "least-squares"
    scope: Scope = "behind"
    held_out: float = 0.25
    ridges: tuple[float, ...] = RIDGES
    chunk: int = 32
    in_flight: int | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, REPAIR_METHODS)
        check_choice("scope", self.scope, REPAIR_SCOPES)
        check_setting(0 < self.held_out < 1, "held_out", self.held_out, "give a share between 0 and 1")
        positive = bool(self.ridges) and all(0 < ridge < math.inf for ridge in self.ridges)
        check_setting(positive, "ridges", self.ridges, "give at least one positive number")
        check_setting(self.chunk >= 1, "chunk", self.chunk, "at least 1 image is needed")
        enough = self.in_flight is None or self.in_flight >= 1
        check_setting(enough, "in_flight", self.in_flight, "at least 1 image is needed")


@dataclasses.dataclass(frozen=True)
class RepairReport:
    """The result of a repair.

    Attributes:
        layers: The layers solved for, in the order in which they run; empty if the solution was not kept.
        statistics: Whether batch-norm statistics were re-estimated and brought the outputs closer.
        distance: Held-out mean squared difference of the outputs from the original's, as a share of their variance:
            after the cut, and after the repair.
        kept: Whether the repair was kept.
        seconds: Duration.
        problem: Why there is no least-squares solution, if the network cannot be solved for or memory ran out.
        undone: Why a solution was undone, if one was.
    """

    layers: tuple[RepairedLayer, ...]
    statistics: bool
    distance: tuple[float, float]
    kept: bool
    seconds: float
    problem: str = ""
    undone: str = ""

    def describe(self) -> str:
        """Return a one-line summary."""
        before, after = self.distance
        problem = f" ({self.problem})" if self.problem else ""
        if not self.kept:
            because = f"; {self.undone}" if self.undone else ""
            return f"repair: nothing was gained{problem}: outputs are off by {before:.3g} of their variance{because}"
        parts = []
        if self.layers:
            parts.append(f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''} by least squares")
        if self.statistics:
            parts.append("batch-norm statistics")
        text = f"repair: {', '.join(parts)}{problem}: outputs off by {before:.3g} → {after:.3g} of their variance"
        few = [layer for layer in self.layers if layer.num_rows < layer.num_inputs]
        if few:
            text += (
                f"; {len(few)} layers have more inputs than rows ({few[0].parameter}: {few[0].num_inputs} > "
                f"{few[0].num_rows}), where only the ridge decides: more images would help"
            )
        return text

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the layers solved for, and the summary."""
        columns = ("parameter", "error after the cut", "after the repair", "inputs", "rows")
        rows = [(one.parameter, one.before, one.after, one.num_inputs, one.num_rows) for one in self.layers]
        return html_table("Repair", columns, rows, [self.describe()])


@dataclasses.dataclass(frozen=True)
class _Judgement:
    """Distance of a network from the original on held-out images; `loss` is 0 if there is none."""

    distance: float
    loss: float

    def better_than(self, other: _Judgement) -> bool:
        """Whether the outputs are closer and the loss is no larger."""
        return self.distance < other.distance and self.loss <= other.loss

    def why_not_better_than(self, other: _Judgement) -> str:
        """Say which of the two figures speaks against this network, and by how much."""
        if not self.distance < other.distance:
            return f"would be off by {self.distance:.3g} instead of {other.distance:.3g} of their variance"
        return (
            f"would come closer ({self.distance:.3g}), but the held-out loss would rise from {other.loss:.4g} to "
            f"{self.loss:.4g}"
        )


class RepairPlan:
    """State of the network from before the cut that a repair needs; made by `plan_repair` or `plan_weight_repair`."""

    def __init__(
        self,
        original: nn.Module,
        settings: RepairSettings,
        cut: set[str],
        *,
        elements: Mapping[str, Tensor] | None = None,
        supports: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.original = original
        self.settings = settings
        self.cut = cut
        self.elements = elements or {}
        self.supports = supports or {}

    def repair(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        task: Task | None = None,
        judged: bool = False,
        distributed: Distributed | None = None,
    ) -> RepairReport:
        """Repair the rewritten network, in place. Collective.

        Args:
            model: The network after the cut; its modes and the random state are restored afterwards.
            batches: Calibration batches, as the task accepts them.
            task: How a network is run on a batch and evaluated; by default as a classifier.
            judged: Whether the task's loss must not rise on the held-out images either; needs targets.
            distributed: Ranks to sum over; all end with the same weights.

        Raises:
            SettingError: There are no calibration images, they are all identical, or the original network's outputs for
                them are not finite.
        """
        begin = time.perf_counter()
        distributed, task = distributed or Distributed(), task or Task()
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        batches = [to_device(batch, device) for batch in batches]
        chunks = chunks_of(batches, self.settings.held_out, self.settings.chunk, task, distributed)
        check_differ(chunks, distributed)
        largest = max(num_samples(batch) for batch in batches)
        repair = _Repair(self, model, chunks, largest, task, judged, distributed)
        with task.running(self.original), task.running(model), torch.no_grad(), exact_float32():
            report = repair.run(begin)
            repaired = repair.buffers_written()
        _restore(model, repaired)  # the task has put back what passes wrote into buffers
        return report


class _NothingToSolveError(Exception):
    """No layer can be solved for."""


class _Repair:
    """One repair of one network."""

    def __init__(
        self,
        plan: RepairPlan,
        model: nn.Module,
        chunks: list[Chunk],
        largest: int,
        task: Task,
        judged: bool,
        distributed: Distributed,
    ) -> None:
        self.largest = largest
        self.plan = plan
        self.model = model
        self.settings = plan.settings
        self.chunks = chunks
        self.task = task
        self.judged = judged
        self.distributed = distributed
        self.judging = [chunk for chunk in chunks if chunk.held_out]
        self.fitting = [chunk for chunk in chunks if not chunk.held_out]
        self.expected: list[Any] = []
        self._constants: set[str] = set()

    def run(self, begin: float) -> RepairReport:
        """Try least squares, then the statistics; each is kept only if it helps."""
        at_first = self._outputs()
        before = {name: tensor.detach().clone() for name, tensor in named_tensors(self.model).items()}
        layers: list[RepairedLayer] = []
        results: list[Any] = []
        problem = undone = ""
        if self.settings.method == "least-squares":
            try:
                layers, results = self._least_squares()
            except _NothingToSolveError as error:
                problem = str(error)
            except BaseException as error:
                _restore(self.model, before)
                if not isinstance(error, RuntimeError):
                    raise
                # Such as out of memory: the cut network trains on unrepaired.
                problem = str(error).splitlines()[0]
                log.warning("the rewrite is not repaired by least squares: %s", problem)
        if not self.expected:
            self.expected = [self.task.outputs(self.plan.original, chunk.batch) for chunk in self.judging]
        try:
            cut = best = self._judge(at_first)
        except SettingError:
            _restore(self.model, before)
            raise
        if layers:
            solved = self._judge(results)
            if solved.better_than(best):
                best = solved
            else:
                undone = f"by least squares they {solved.why_not_better_than(best)}"
                _restore(self.model, before)
                layers = []
        measured = False
        settled = bool(layers) and best.distance < _LITTLE_TO_MEND
        if self.settings.method != "none" and norms_of(self.model) and not settled:
            measured, best = self._statistics(best)
        seconds = time.perf_counter() - begin
        kept = bool(layers) or measured
        distances = (cut.distance, best.distance)
        return RepairReport(tuple(layers), measured, distances, kept, seconds, problem, undone)

    def buffers_written(self) -> dict[str, Tensor]:
        """Return the buffers that the repair may have changed, with their values: statistics of batch norms."""
        statistics = {
            id(tensor) for norm in norms_of(self.model) for tensor in (norm.running_mean, norm.running_var)
        }
        return {
            name: buffer.clone()
            for name, buffer in self.model.named_buffers()
            if id(buffer) in statistics or name in self._constants
        }

    def _outputs(self) -> list[Any]:
        return [self.task.outputs(self.model, chunk.batch) for chunk in self.judging]

    def _judge(self, results: Sequence[Any]) -> _Judgement:
        """Compare the network's outputs on the held-out images with the original's. Collective.

        Raises:
            SettingError: The original's outputs are not finite.
        """
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        total = torch.zeros(6, dtype=torch.float64, device=device)
        for chunk, expected, found in zip(self.judging, self.expected, results, strict=True):
            for one, two in zip(_tensors(expected), _tensors(found), strict=True):
                wide = one.double()
                difference = (wide - two.double()).square().sum()
                count = wide.new_tensor(wide.numel())
                total[:4] += torch.stack([difference, wide.square().sum(), wide.sum(), count])
            if self.judged:
                losses = self.task.losses(found, chunk.batch).double()
                total[4:] += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        (total,) = self.distributed.all_reduce_sum(total)
        difference, squares, sums, count, loss, samples = total.tolist()
        check_setting(
            math.isfinite(squares) and math.isfinite(sums),
            "calibration",
            None,
            "the network's outputs for the calibration images are not finite already before the cut: it has "
            "diverged, or the images hold NaN",
        )
        variance = squares - sums**2 / count if count else 0.0
        share = difference / variance if variance > 0 else difference
        mean_loss = loss / samples if samples else 0.0
        return _Judgement(
            share if math.isfinite(share) else math.inf, mean_loss if math.isfinite(mean_loss) else math.inf
        )

    def _statistics(self, best: _Judgement) -> tuple[bool, _Judgement]:
        """Re-estimate batch-norm statistics; return whether that helped, and the resulting distance."""
        buffers = {name: tensor.detach().clone() for name, tensor in self.model.named_buffers()}
        passes = [functools.partial(self.task.outputs, self.model, chunk.batch) for chunk in self.fitting]
        remeasure(self.model, passes, self.distributed)
        again = self._judge(self._outputs())
        if again.better_than(best):
            return True, again
        _restore(self.model, buffers)
        return False, best

    def _least_squares(self) -> tuple[list[RepairedLayer], list[Any]]:
        """Solve for the layers; return them and the network's outputs for the held-out images."""
        first = few_of(self.chunks[0], self.task)
        run = functools.partial(self.task.outputs, self.model, first.batch)
        with failing_together(self.distributed), PassMemory() as memory:
            readers = self._to_solve(survey(self.model, run, first.num_images))
        if not readers:
            raise _NothingToSolveError("no layer that reads the removed channels has weights of its own")
        self._constants = {reader.constant.tensor for reader in readers.values() if reader.constant}
        num_images = self.distributed.sum_on_hosts(sum(chunk.num_images for chunk in self.fitting))
        wave = Wave(
            self.plan.original,
            self.model,
            self.plan.elements,
            readers,
            num_images,
            ridges=self.settings.ridges,
            supports=self.plan.supports,
            distributed=self.distributed,
        )
        pairs = [
            Pair(
                functools.partial(self.task.outputs, self.plan.original, chunk.batch),
                functools.partial(self.task.outputs, self.model, chunk.batch),
                chunk.held_out,
            )
            for chunk in self.chunks
        ]
        layers, results = wave.run(pairs, self._in_flight(memory))
        self.expected = [before for before, _ in results]
        return layers, [after for _, after in results]

    def _to_solve(self, readers: dict[str, Reader]) -> dict[str, Reader]:
        """Return the layers to solve for. What the user has frozen, and lost nothing, stays as it is."""
        cut = self.plan.cut
        readers = layers_behind(readers, cut, self.plan.elements)
        if self.settings.scope == "cut":
            return {name: reader for name, reader in readers.items() if name in cut}
        tensors = named_tensors(self.model)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            return readers
        return {
            name: reader
            for name, reader in readers.items()
            if tensors[name].requires_grad or name in self.plan.elements
        }

    def _in_flight(self, memory: PassMemory) -> int:
        """Return how many pairs of passes may be in flight at once."""
        images = self.settings.in_flight
        if images is None:
            as_in_training = self.largest * memory.total // max(2 * memory.peak, 1)
            images = max(as_in_training, _ALWAYS_IN_FLIGHT)
        return max(images // max(chunk.num_images for chunk in self.chunks), 1)


def plan_repair(
    model: nn.Module,
    graph: ChannelGraph,
    mask: np.ndarray,
    settings: RepairSettings | None = None,
) -> RepairPlan:
    """Record what a repair needs, before the cut.

    Args:
        model: The network to be cut.
        graph: Its channel graph, before it shrinks.
        mask: Units to keep, from `graph.keep_mask`.
        settings: How to repair.

    Raises:
        SettingError: The network cannot be copied.
    """
    settings = settings or RepairSettings()
    original = copied(model, settings.method)
    elements = kept_elements(model, graph, mask)
    cut = reading_parameters(graph, mask)
    return RepairPlan(original, settings, cut, elements=elements)


def plan_weight_repair(
    model: nn.Module, masks: Mapping[str, Tensor], settings: RepairSettings | None = None
) -> RepairPlan:
    """Record what a repair needs, before single weights are set to zero; the repair keeps them at zero.

    Args:
        model: The network before its weights are set to zero.
        masks: Name of a parameter → bool mask of its shape: the remaining weights.
        settings: How to repair; layers without a mask are left alone.

    Raises:
        SettingError: The network cannot be copied.
    """
    settings = dataclasses.replace(settings or RepairSettings(), scope="cut")
    return RepairPlan(copied(model, settings.method), settings, set(masks), supports=masks)


def copied(model: nn.Module, method: Method) -> nn.Module:
    """Copy a network.

    Raises:
        SettingError: The network cannot be copied.
    """
    try:
        return copy.deepcopy(model).requires_grad_(False)
    except (RuntimeError, TypeError) as error:
        raise SettingError(
            "repair",
            method,
            f"a repair needs a copy of the network, and {type(model).__name__} cannot be copied ({error}): "
            "take 'none'",
        ) from error


def _tensors(result: Any) -> list[Tensor]:
    """Return the numeric tensors among a network's outputs."""
    return [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]


def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    tensors = named_tensors(model)
    for name, values in state.items():
        tensors[name].data.copy_(values)
