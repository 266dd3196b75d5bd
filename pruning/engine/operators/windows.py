"""Operators that slide over channels, as efficient channel attention and local response normalisation do.

What stays moves together, so its windows hold other neighbours. Like a mean over channels, the operator is then taken
over those that are kept: the network computes what it would if it had never had the others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from image_classification.models.running import Args, Kwargs
from pruning.engine.labeller import Labeller
from pruning.engine.labels import Slot, Value, support
from pruning.engine.operators.register import OPERATORS, Statistics, named_arguments
from pruning.engine.traces import Operation

#: (arguments by name, dimension of the input) → (extent of the window, stride, padding before); None: no such window.
Geometry = Callable[[Kwargs, int], "tuple[int, int, int] | None"]


def slide(
    run: Labeller, operation: Operation, x: Value, slot: Slot, window: tuple[int, int, int] | None
) -> Slot | None:
    """Return the labels after a window slid over channels with stride 1; None if that cannot be followed.

    Args:
        x: Labels of the operator's input.
        slot: Labels of the dimension that the window slides along.
        window: Its extent, stride and the padding before.
    """
    dims = support(slot)
    followed = OPERATORS[operation.func].statistics is not None
    if not followed or len(dims) != 1 or window is None or window[1] != 1:
        return None
    dim = dims[0]
    shape = run.out_shape(operation)
    first = window[0] // 2 - window[2]  # what a window is labelled by stands in its middle
    if len(shape) != len(x.shape) or first < 0 or first + shape[dim] > x.shape[dim]:
        return None
    run.note_statistics(operation, slot)
    return slot.take(range(first, first + shape[dim]), axis=dim)


def kept_windows(geometry: Geometry) -> Statistics:
    """The operator over what is kept of its first input; elsewhere its result is zero."""

    def over_kept(func: OpOverload, args: Args, kwargs: Kwargs, kept: np.ndarray) -> Tensor:
        dim = next(d for d, extent in enumerate(kept.shape) if extent > 1)
        window = geometry(named_arguments(func, args, kwargs), dim)
        assert window is not None
        stays = torch.from_numpy(kept.reshape(-1)).to(args[0].device)
        some: Tensor = func(args[0].index_select(dim, stays.nonzero().flatten()), *args[1:], **kwargs)
        # However many channels there are, the result is shorter by the same number.
        length = len(stays) - int(stays.sum()) + some.shape[dim]
        places = stays[window[0] // 2 - window[2] :][:length].nonzero().flatten()
        shape = [length if d == dim else size for d, size in enumerate(some.shape)]
        return some.new_zeros(shape).index_copy(dim, places, some)

    return Statistics("window", over_kept)
