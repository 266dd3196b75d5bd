"""A network's forward pass as a list of ATen operators, recorded while it really runs.

Running for real, on one or two small images, keeps data-dependent code and constant index tables working, and costs one
forward pass.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from image_classification.models.running import Args, Kwargs
from pruning.engine.examples import output_tensors
from pruning.engine.kept_state import state_kept
from pruning.engine.own_gradients import has_gradient_hooks, own_functions_noted
from pruning.engine.recorder import Recorder
from pruning.engine.requests_noted import Requests
from pruning.engine.steady import Steady, seed_generators
from pruning.engine.traces import Trace
from pruning.engine.undisturbed import set_trace_mode


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
    seed_generators()
    recorder = Recorder(model, record.__code__)
    arguments = (images, kwargs or {})
    inputs = tuple(recorder.adopt_input(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    with (
        state_kept(model),
        recorder.parameters_kept(),
        recorder.watching_modules(model),
        Requests(recorder.watched, recorder.value_of) as requests,
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
