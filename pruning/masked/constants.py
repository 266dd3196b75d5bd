"""What in a network does not depend on the image: one run in which "unknown" is NaN.

The images are NaN. Every operator carries NaN on, except where a zero makes its operand irrelevant: a zero weight
in a contraction, a zero factor of a product, a batch norm's channel whose scale is zero (each operator says what
comes of unknown inputs, in `engine/operators/`). Whatever is a number in the end is the same for all
images, whatever the other weights are: this is a proof, not a sample. What looks at values in ways that NaN could
not show (comparisons, sorting) is refused.

Zero padding makes a constant map uneven at its border. Where padding meets a constant other than zero, the outcome
counts as unknown, so that what is called constant is so at every image size.
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
    """What consumers read that is the same for every image and at every pixel.

    Args:
        model: The network; it is left as it was.
        images: Its positional arguments; only their shapes matter.
        places: Inputs of modules. Of those whose module does not run in evaluation nothing is reported.

    Returns:
        Number of the place to (positions along its dimension,) float64: the constant, NaN where there is none.

    Raises:
        NotFollowedError: The network looks at values.
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
    """(positions,) the common value along everything else, or NaN."""
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
        """Operators inside are the plain ones."""
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
