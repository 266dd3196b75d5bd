"""One run of a network in a trial, forward or backward, with what it left or where it stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.models.module_tree import is_leaf
from image_classification.models.running import ModuleCall, following
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.code_lines import line_raising
from pruning.engine.examples import Pass, output_tensors, output_values
from pruning.engine.groups import Place
from pruning.engine.kept_state import state_kept
from pruning.engine.numbers_noted import NumbersNoted
from pruning.engine.own_gradients import gradients
from pruning.engine.proof.agreement_of_runs import Failure, TrialRun, call_difference, summary
from pruning.engine.proof.decisions import Decisions
from pruning.engine.proof.rehearsal import as_float
from pruning.engine.requests_noted import Requests
from pruning.engine.stand_ins import stand_ins
from pruning.engine.steady import Steady, seed_generators
from pruning.engine.wrapped_tensors import is_wrapped


class _DifferenceError(Exception):
    """Ends a run at the first module that computes something else."""


def run_through(
    model: nn.Module,
    one: Pass,
    graph: ChannelGraph,
    mask: np.ndarray | None,
    expected: TrialRun | None = None,
    decisions: Decisions | None = None,
) -> TrialRun:
    """Run the network and summarise the output of every leaf module, channel by channel.

    Args:
        model: Cut or masked.
        one: What it is given.
        graph: Tells where the channels are.
        mask: Which of them stay, in a masked network.
        expected: A run to agree with: the first difference ends this one as a failure.
        decisions: Notes what values decide, or decides instead.
    """
    run = TrialRun([], [], decisions=[] if decisions is None else decisions.taken)
    leaving = _summarising(run, one, graph, mask, expected)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    example = as_float(one.example, dtype)
    seed_generators()
    with (
        state_kept(model, one.written),
        following(model, leaving=leaving) as running,
        Requests(running) as requests,
        Steady(full_precision=True) if one.unsteady else contextlib.nullcontext(),
        NumbersNoted(model, running) as given,
        contextlib.nullcontext() if decisions is None else decisions,
    ):
        try:
            result = example.run(model)
            run.outputs = output_tensors(result)
            run.values = dict(output_values(result))
            run.steps = requests.steps
            run.numbers = given.numbers
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


def _summarising(
    run: TrialRun, one: Pass, graph: ChannelGraph, mask: np.ndarray | None, expected: TrialRun | None
) -> Callable[[ModuleCall, nn.Module, object], None]:
    """Return what to do when a module returns: summarise its output, and compare it; see `run_through`."""
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
                moments = summary(output, places.get((call.name, call.number), []), mask)
                run.calls.append((call.name, moments))
                if expected is not None:
                    run.failure = call_difference(expected, run, len(run.calls) - 1)
            if run.failure is not None:
                raise _DifferenceError

    return leaving


def gradients_of(model: nn.Module, one: Pass) -> dict[str, Tensor] | Failure:
    """Gradients of all that a pass gives, by the names of the parameters; or how the backward pass fails."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    seed_generators()
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
        except Exception as error:  # as in `run_through`
            if _lacks_memory(error):
                raise
            return Failure("", f"the backward pass raises {_in_words(error)}", raised=True)


def _lacks_memory(error: Exception) -> bool:
    """Whether the machine is to blame, which says nothing about a cut."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _in_words(error: BaseException) -> str:
    """`ValueError (model.py:57): …`, one line."""
    line = line_raising(error)
    first = (str(error).strip().splitlines() or [""])[0][:160]
    return f"{type(error).__name__}{f' ({line})' if line else ''}: {first}"
