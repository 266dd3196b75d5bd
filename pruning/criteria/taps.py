"""Taps on the inputs and outputs of modules, with hooks that cannot be left behind.

A context manager removes the hooks on exit, also after an exception in the forward pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from image_classification.models.running import (
    Args,
    Kwargs,
    ModuleCall,
    Outputs,
    following,
    with_first_argument,
)

Action = Callable[[Tensor], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Tap:
    """A tapped input or output, and the action on it.

    Attributes:
        module: Qualified name.
        kind: "input" (the module's first argument) or "output".
        call: Which call of the module within a forward pass, from 0.
        action: Called with the tensor; its result, unless None, replaces the tensor.
    """

    module: str
    kind: str
    call: int
    action: Action


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Iterable[Tap]) -> Iterator[None]:
    """Tap a network while the context is open.

    Args:
        model: The bare network (no DDP or compiled wrapper).
        taps: The taps; several taps on the same tensor act in order.

    Raises:
        ValueError: The network has no module of a tap's name.
    """
    actions: dict[tuple[str, ModuleCall], list[Action]] = {}
    for tap in taps:
        actions.setdefault((tap.kind, ModuleCall(tap.module, tap.call)), []).append(tap.action)

    def act(kind: str, call: ModuleCall, tensor: Outputs) -> Outputs:
        """Return the tensor's replacement, or the tensor itself if there is none."""
        for action in actions.get((kind, call), ()):
            result = action(tensor)
            if result is not None:
                tensor = result
        return tensor

    def entering(
        call: ModuleCall, _module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        if ("input", call) not in actions:
            return None
        return with_first_argument(args, kwargs, lambda tensor: act("input", call, tensor))

    def leaving(call: ModuleCall, _module: nn.Module, output: Outputs) -> Outputs:
        if ("output", call) not in actions:
            return None
        if isinstance(output, tuple):
            return (act("output", call, output[0]), *output[1:])
        return act("output", call, output)

    names = [call.name for _, call in actions]
    with following(model, names, entering=entering, leaving=leaving):
        yield
