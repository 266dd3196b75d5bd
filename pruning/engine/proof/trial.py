"""One trial: the network with some units cut must compute what the masked network does.

Masked means: all slices that carry removed units are zeroed in the full network, and statistics over channels
(LayerNorm, some GroupNorms, weight standardisation, means) are taken over the kept channels: as in a network that never
had the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.computed_weights import computes_weights
from pruning.engine.cutting import Changes, plan_network, tensor_cuts
from pruning.engine.examples import Pass
from pruning.engine.own_gradients import differing
from pruning.engine.proof.agreement_of_runs import (
    MODULE_TOLERANCE,
    Failure,
    TrialRun,
    difference,
    drift,
    other_numbers,
    other_steps,
    other_values,
)
from pruning.engine.proof.decisions import Decisions
from pruning.engine.proof.rehearsal import in_type, masked, rehearsal
from pruning.engine.proof.skipped_zeros import SkippedZeros
from pruning.engine.proof.trial_run import gradients_of, run_through
from pruning.engine.undisturbed import set_trace_mode, undisturbed

_ROUNDING_SHARE = 0.1  # of a difference that is not put down to rounding


class Trial:
    """A cut that can be tried several times.

    Args:
        model: The network, under rehearsal.
        passes: The ways in which it is run.
        graph: Its channel graph. Attributes may come and go between two tries; what is masked must stay the same.
        mask: (num_units,) bool, True for the units that stay.
        rehearsed: The weights are substitutes. With its own, a network may diverge, which says nothing about the cut,
            and gradients may be too small to compare.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: Sequence[Pass],
        graph: ChannelGraph,
        mask: np.ndarray,
        rehearsed: bool = True,
    ) -> None:
        self.graph = graph
        self._rehearsed = rehearsed
        self._model = model
        self._passes = passes
        self._mask = mask
        # What the masked network computes, by the number of the trace; the second in double precision.
        self._expected: dict[int, TrialRun] = {}
        self._exact: dict[int, TrialRun] = {}
        # (number of the pass, ids of the attributes that followed) of the tries in which all agreed.
        self._agreed: set[tuple[int, frozenset[int]]] = set()
        # By the same: what the cut network did in a try for exceptions, which has not been compared yet.
        self._ahead: dict[tuple[int, frozenset[int]], TrialRun] = {}

    def failure(self, repeats: bool = True) -> Failure | None:
        """Cut the network, compare it with the masked one, and put it back; None if they agree.

        A second try ends at the first module whose output differs, since the expected outputs are known by then. Passes
        in which the same graph with the same attributes agreed before are not run again.

        Args:
            repeats: Also run the passes that repeat another operator by operator as long as nothing is cut.
        """
        if self._mask.all():
            return None
        following = self._following()
        for number, one in enumerate(self._passes):
            if (number, following) in self._agreed or (self._is_repeat(number) and not repeats):
                continue
            found = self._ahead.pop((number, following), None)
            found = found or self._run_cut(one, self._expected.get(one.trace))
            failure = self._failure_of(one, found)
            if failure is not None and not self._is_rounding(one, found, failure):
                return failure
            by_gradients = one.own_gradients and self._rehearsed
            failure = self._failure_of_gradients(one) if by_gradients else None
            if failure is not None:
                return failure
            self._agreed.add((number, following))
        return None

    def _failure_of(self, one: Pass, found: TrialRun) -> Failure | None:
        if found.failure is not None:
            return found.failure
        expected = self._expected_of(one)
        if not self._rehearsed and not expected.is_finite():
            return None
        return self._disagreement(one, expected, found)

    def _disagreement(self, one: Pass, expected: TrialRun, found: TrialRun) -> Failure | None:
        """How the cut network's run differs from the masked one's; None if they agree."""
        again = functools.partial(self._run_masked, one)
        return (
            difference(expected, found)
            or other_steps(one, expected, found)
            or other_values(expected, found, again)
            or other_numbers(expected, found, again)
        )

    def _failure_of_gradients(self, one: Pass) -> Failure | None:
        """Compare the backward passes of the cut and the masked network; None if they agree.

        A network with statistics over channels or computed weights has no masked version with the same gradients; there
        the backward pass only has to run.
        """
        with self._cut(one):
            found = gradients_of(self._model, one)
        if isinstance(found, Failure):
            return found
        if self.graph.statistics or computes_weights(self._model):
            return None
        with self._masked(one):
            expected = gradients_of(self._model, one)
        if isinstance(expected, Failure):
            return None
        cuts = tensor_cuts(self.graph, self._mask)
        name = differing(expected, found, cuts, MODULE_TOLERANCE)
        return None if name is None else Failure("", f"the gradient of {name!r} changes")

    def _is_rounding(self, one: Pass, found: TrialRun, failure: Failure) -> bool:
        """Whether only rounding made the difference: nearly equal values that decide, a range that wears digits.

        Args:
            one: The pass.
            found: What the cut network did in it.
            failure: How that differs from what the masked one does.
        """
        if failure.raised or (math.isinf(failure.size) and not one.decides):
            return False
        as_decided = one.decides and self._follows(one, self._expected_of(one))
        return as_decided or self._agrees_in_double(one, found, failure)

    def _agrees_in_double(self, one: Pass, found: TrialRun, failure: Failure) -> bool:
        """Whether the difference is gone in double precision; of what no value decides only if rounding explains it."""
        with in_type(self._model, torch.float64):
            exact = None if one.decides else self._run_cut(one)
            if exact is not None and drift(exact, found) < _ROUNDING_SHARE * failure.size:
                return False
            if one.trace not in self._exact:
                self._exact[one.trace] = self._run_masked(one)
            expected = self._exact[one.trace]
            if one.decides and self._follows(one, expected):
                return True
            exact = exact or self._run_cut(one)
            if exact.failure is not None or expected.failure is not None:
                return False  # it does not run in double precision
            return self._disagreement(one, expected, exact) is None

    def _follows(self, one: Pass, expected: TrialRun) -> bool:
        """Whether the cut network does what a run of the masked one does, if it decides alike by the same values."""
        decisions = Decisions(expected.decisions)
        with self._cut(one):
            found = run_through(self._model, one, self.graph, None, decisions=decisions)
        agrees = found.failure is None and self._disagreement(one, expected, found) is None
        return agrees and decisions.followed

    def exception(self) -> Failure | None:
        """The exception that the cut network raises; None if it runs, whatever it computes.

        What it computes is kept for `failure` then.
        """
        if self._mask.all():
            return None
        self._ahead.clear()
        following = self._following()
        for number, one in enumerate(self._passes):
            if (number, following) in self._agreed or self._is_repeat(number):
                continue
            run = self._run_cut(one)
            if run.failure is not None:
                self._ahead.clear()
                return run.failure
            self._ahead[number, following] = run
        return None

    def _following(self) -> frozenset[int]:
        return frozenset(id(axis) for axis in self.graph.attributes)

    def _is_repeat(self, number: int) -> bool:
        """Whether a pass repeats another operator by operator as long as nothing is cut."""
        return any(other.trace == self._passes[number].trace for other in self._passes[:number])

    def _expected_of(self, one: Pass) -> TrialRun:
        """What the masked network computes in a pass; run once for all that repeat it."""
        if one.trace not in self._expected:
            self._expected[one.trace] = self._run_masked(one)
        return self._expected[one.trace]

    def _run_cut(self, one: Pass, expected: TrialRun | None = None) -> TrialRun:
        with self._cut(one):
            return run_through(self._model, one, self.graph, None, expected)

    def _run_masked(self, one: Pass) -> TrialRun:
        decisions = Decisions() if one.decides else None
        with self._masked(one):
            return run_through(self._model, one, self.graph, self._mask, decisions=decisions)

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
        with masked(self._model, self.graph, self._mask, one.trace, one.divisors), SkippedZeros():
            yield


class Trials:
    """The same network under several cuts. The one that failed last is tried first.

    Args:
        model, passes, graph: See `Trial`.
        masks: One per cut, and whether also the passes are run in it that repeat others.

    Attributes:
        first, second: The trials of the first two cuts.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: Sequence[Pass],
        graph: ChannelGraph,
        masks: Sequence[tuple[np.ndarray, bool]],
    ) -> None:
        self.graph = graph
        self._trials = [(Trial(model, passes, graph, mask), repeats) for mask, repeats in masks]
        self.first, self.second = (trial for trial, _ in self._trials[:2])

    def failure(self) -> Failure | None:
        """The first failure under any of the cuts."""
        for place, (trial, repeats) in enumerate(self._trials):
            failure = trial.failure(repeats)
            if failure is not None:
                self._trials.insert(0, self._trials.pop(place))
                return failure
        return None

    def raises(self) -> bool:
        """Whether the network raises an exception under any of the cuts."""
        return any(trial.exception() is not None for trial, _ in self._trials)


def failure_of_cut(model: nn.Module, graph: ChannelGraph, mask: np.ndarray) -> Failure | None:
    """Try the very cut that is about to be made, in all passes of the graph: in rehearsal, then with its own weights.

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
    with undisturbed(model):
        with rehearsal(model, passes):
            failure = Trial(model, passes, graph, mask).failure()
        if failure is not None:
            return failure
        # Values of its own may lead it along other paths.
        with in_type(model, torch.float32):
            return Trial(model, passes, graph, mask, rehearsed=False).failure()
