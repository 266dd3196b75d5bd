"""Tracking of the running modules of a network, and of the number of each call.

    with following(model, entering=look) as running:
        model(images)

Hooks that need more than a tensor (the module they are in, the second call of a shared layer, the module that raised)
all follow the network this way. The hooks are removed at the end of the block, also after an exception.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from image_classification.models.module_tree import named_modules


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        name: The module's qualified name; "" is the network itself.
        number: Index of the call of that module within the forward pass, from 0.
    """

    name: str
    number: int


#: Positional and keyword arguments of a call, of any kind.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
#: Output of a network or module: a tensor, or tensors nested in any structure.
Outputs = Any
#: (call, module, positional arguments, keyword arguments) → replacements of both kinds of arguments, or None to keep
#: them.
Entering = Callable[[ModuleCall, nn.Module, Args, Kwargs], tuple[Args, Kwargs] | None]
#: (call, module, output) → replacement of the output, or None to keep it.
Leaving = Callable[[ModuleCall, nn.Module, Outputs], object]


class Running:
    """State of a network being followed; created by `following`.

    Attributes:
        stack: Calls in progress, outermost first.
        passing: Whether a forward pass of the network is in progress. A module that runs outside one is being
            recomputed by a checkpoint in the backward pass.
        failed: Name of the innermost module that raised an exception which no enclosing module has handled.
    """

    def __init__(self) -> None:
        self.stack: list[ModuleCall] = []
        self.passing = False
        self.failed: str | None = None
        self._num_calls: dict[str, int] = {}
        self._handled: list[BaseException | None] = []

    @property
    def innermost(self) -> str:
        """Name of the innermost running module, "" outside all."""
        return self.stack[-1].name if self.stack else ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all running modules, outermost first."""
        return tuple(call.name for call in self.stack)

    def num_calls(self, name: str) -> int:
        """Return how often a module has been entered in this forward pass."""
        return self._num_calls.get(name, 0)

    def restart(self) -> None:
        """Start another forward pass."""
        self.stack.clear()
        self.failed = None
        self._num_calls.clear()
        self._handled.clear()

    def enter(self, name: str) -> ModuleCall:
        """Record the start of a module call."""
        number = self.num_calls(name)
        if not self.passing and number == 1:  # recomputation of the only call of the pass
            number = 0
        call = ModuleCall(name, number)
        self._num_calls[name] = number + 1
        self.stack.append(call)
        self.failed = None
        self._handled.append(sys.exception())
        return call

    def leave(self, name: str) -> ModuleCall | None:
        """Record the end of a module call; returns None if it ended by an exception."""
        if self.innermost != name or not self.stack:  # another hook refused its arguments before it started
            return None
        call, handled = self.stack.pop(), self._handled.pop()
        # Hooks that are always called run while the module's exception is being handled. An exception that was already
        # being handled before the module started does not count.
        if sys.exception() is handled:
            self.failed = None
            return call
        if self.failed is None:
            self.failed = call.name
        return None


@contextlib.contextmanager
def following(
    model: nn.Module,
    names: Iterable[str] | None = None,
    *,
    entering: Entering | None = None,
    leaving: Leaving | None = None,
    around: Callable[[], contextlib.AbstractContextManager[object]] | None = None,
) -> Iterator[Running]:
    """Follow the modules of a network through its forward passes.

    Args:
        model: The bare network. Stack and counts start over with each of its forward passes.
        names: Qualified names of the modules to follow ("" is the network itself); all by default.
        entering: Called before a module runs.
        leaving: Called after it, unless it raised.
        around: Creates a context for each forward pass of the network.

    Yields:
        The state of the running modules.

    Raises:
        ValueError: There is no module of that name.
    """
    modules = dict(named_modules(model))
    chosen = list(modules if names is None else dict.fromkeys(names))
    for name in chosen:
        if name not in modules:
            raise ValueError(f"the network has no module {name!r}")
    running = Running()
    context = contextlib.ExitStack()

    def start(_module: nn.Module, _args: object) -> None:
        context.close()  # of an aborted pass
        running.restart()
        running.passing = True
        if around is not None:
            context.enter_context(around())

    def finish(_module: nn.Module, _args: object, _output: object) -> None:
        running.passing = False
        context.close()

    with contextlib.ExitStack() as stack:
        stack.callback(context.close)
        stack.callback(model.register_forward_pre_hook(start).remove)
        for name in chosen:
            before = modules[name].register_forward_pre_hook(
                _before(running, name, entering), with_kwargs=True
            )
            stack.callback(before.remove)
            after = modules[name].register_forward_hook(_after(running, name, leaving), always_call=True)
            stack.callback(after.remove)
        stack.callback(model.register_forward_hook(finish, always_call=True).remove)
        yield running


def _before(
    running: Running, name: str, entering: Entering | None
) -> Callable[[nn.Module, Args, Kwargs], tuple[Args, Kwargs] | None]:
    def hook(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        call = running.enter(name)
        return None if entering is None else entering(call, module, args, kwargs)

    return hook


def _after(
    running: Running, name: str, leaving: Leaving | None
) -> Callable[[nn.Module, Args, object], object]:
    def hook(module: nn.Module, args: Args, output: object) -> object:
        call = running.leave(name)
        return None if call is None or leaving is None else leaving(call, module, output)

    return hook


def with_first_argument(args: Args, kwargs: Kwargs, change: Callable[[Any], object]) -> tuple[Args, Kwargs]:
    """Return a module's arguments with the first one changed, whether given by position or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: change(kwargs[first])}
