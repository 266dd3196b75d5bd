"""Running a network without leaving a trace in it, in the modes and with the kernels that an analysis needs."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from image_classification.models.attention import attention_of_any_width
from image_classification.models.modes import attention_in_steps, exact_float32, modes_restored, quieten
from image_classification.models.module_tree import named_modules, set_mode, walked_once
from image_classification.process_state import ProcessState
from pruning.engine.kept_state import state_kept


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore the network's modes, buffers, attributes and the random state on exit, whatever runs inside.

    Inside there is no autograd, no autocast from outside, full float32 precision, and attention runs as plain
    operators.
    """
    first = next(iter(model.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(few_objects_to_collect())
        stack.enter_context(walked_once(model))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_other_generators_kept())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_ATTENTION_BY_OPERATORS.changed())
        stack.enter_context(plain_kernels())
        stack.enter_context(attention_of_any_width(model))
        stack.enter_context(state_kept(model))
        stack.callback(forget_cached, model)
        with modes_restored(model):
            yield


_ATTENTION_BY_OPERATORS = ProcessState(lambda: sdpa_kernel(SDPBackend.MATH))


@contextlib.contextmanager
def _other_generators_kept() -> Iterator[None]:
    """Restore the generators of NumPy and Python on exit."""
    numpy_state, state = np.random.get_state(), random.getstate()  # noqa: NPY002  # see `seed_generators`
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(state)


@contextlib.contextmanager
def few_objects_to_collect() -> Iterator[None]:
    """Exclude objects that exist already from garbage collections inside.

    Recordings and trials make many small objects, which would trigger collections of all objects of the process.
    """
    if (
        gc.get_freeze_count()
    ):  # other code has set objects aside already: they could not be told apart afterwards
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Use full float32 precision, no outer autocast, and transformer layers as single operators.

    An autocast within the network does not cache casts of weights, which the next pass would otherwise reuse.
    """
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with exact_float32(), attention_in_steps():
            torch.clear_autocast_cache()
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)


def set_trace_mode(model: nn.Module, training: bool) -> None:
    """Set evaluation mode, or training mode with PyTorch's normalisation and dropout still as in evaluation.

    The latter takes the training paths of a network (auxiliary heads) without batch statistics or noise. A class of the
    network's own may do more in training than the layer that it extends; within it, `Requests` keeps them as in
    evaluation. This also makes modules drop what they cache between evaluations (see `forget_cached`).
    """
    set_mode(model, True)
    set_mode(model, training)
    quieten((module for _, module in named_modules(model)), extended=False)


def forget_cached(model: nn.Module) -> None:
    """Make modules drop the tensors that they cache between evaluations; modes are unchanged.

    Attention biases looked up in a table are often cached like this. The modules drop them when they are put into
    training mode, since their parameters change then, as they do in a rewrite.
    """
    with modes_restored(model):
        model.train()
