"""Finds the values in a network that do not depend on the image, in a single run in which "unknown" is NaN.

The images are NaN. Every operator propagates NaN, except where a zero makes its operand irrelevant: a zero weight in a
contraction, a zero factor of a product, a batch-norm channel whose scale is zero (each operator defines its result for
unknown inputs, in `engine/operators/`). Anything that is a number in the end is the same for all images, whatever the
other weights are: this is a proof, not a sample. Operators that read values in ways that NaN would not reveal
(comparisons, sorting) are refused.

Zero padding makes a constant map uneven at its border. If padding meets a constant other than zero, the result counts
as unknown, so that anything reported as constant is constant at every image size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from image_classification.models.running import Args, Kwargs, ModuleCall, Outputs, following
from pruning.engine.groups import Place
from pruning.engine.labeller import is_pointwise
from pruning.engine.operators import OPERATORS
from pruning.engine.operators.unknowns import carried, elementwise
from pruning.engine.undisturbed import set_trace_mode, undisturbed

_NAN = float("nan")


def observed_constants(model: nn.Module, images: Args, places: Iterable[Place]) -> dict[int, np.ndarray]:
    """Find the inputs of consumers that are the same for every image and at every pixel.

    Args:
        model: The network; it is not modified.
        images: Its positional arguments; only their shapes matter.
        places: Inputs of modules. Modules that do not run in evaluation mode are not reported.

    Returns:
        Number of the place to (positions along its dimension,) float64: the constant, NaN where the input is not
            constant.

    Raises:
        NotFollowedError: The network's computation depends on values.
    """
    wanted: dict[ModuleCall, list[tuple[int, Place]]] = {}
    for number, place in enumerate(places):
        wanted.setdefault(ModuleCall(place.module, place.call), []).append((number, place))
    found: dict[int, np.ndarray] = {}
    mode = ConstantPropagation()

    def entering(call: ModuleCall, _module: nn.Module, args: Args, kwargs: object) -> None:
        with mode.paused():
            for number, place in wanted.get(call, ()):
                if args:
                    found[number] = _per_position(args[0], place.dim)

    with undisturbed(model), following(model, [call.name for call in wanted], entering=entering):
        set_trace_mode(model, training=False)
        with mode:
            model(*tree_map(_unknown, images))
    return found


def _unknown(leaf: object) -> object:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return torch.full_like(leaf[:1], _NAN)
    return leaf


def _per_position(x: Tensor, dim: int) -> np.ndarray:
    """Return each position's common value along all other dimensions, or NaN: (positions,)."""
    values = x.detach().movedim(dim, 0).flatten(1)
    even = (values == values[:, :1]).all(dim=1)
    return torch.where(even, values[:, 0].double(), _NAN).cpu().numpy()


class ConstantPropagation(TorchDispatchMode):
    """Runs operators on tensors in which NaN means "depends on the image"."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run the operators inside the block unmodified."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Outputs:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        known = OPERATORS.get(func)
        if known is not None and known.constants is not None:
            return known.constants(func, args, kwargs)
        return elementwise(func, args, kwargs) if is_pointwise(func) else carried(func, args, kwargs)
