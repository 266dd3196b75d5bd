"""Taps on the inputs and outputs of modules that cannot be left behind.

Hooks live in a context manager: they are removed when it is left, also by an exception in the forward pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Action = Callable[[Tensor], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Tap:
    """A place to look at, and what to do there.

    Attributes:
        module: Qualified name.
        kind: "input" (the module's first argument) or "output".
        call: Which call of the module within a forward pass, from 0.
        action: Gets the tensor; what it returns, if anything, takes the tensor's place.
    """

    module: str
    kind: str
    call: int
    action: Action


class Taps:
    """Hooks of several taps; made by `tapped`. Counts calls, so that repeated modules are told apart."""

    def __init__(self, model: nn.Module, taps: Iterable[Tap]) -> None:
        self._actions: dict[tuple[str, str, int], list[Action]] = {}
        for tap in taps:
            self._actions.setdefault((tap.module, tap.kind, tap.call), []).append(tap.action)
        self._num_calls: dict[tuple[str, str], int] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._model = model

    def install(self) -> None:
        """Register one hook per tapped side of a module.

        Raises:
            ValueError: The network has no module of that name.
        """
        modules = dict(self._model.named_modules())
        for name, kind in dict.fromkeys((name, kind) for name, kind, _ in self._actions):
            if name not in modules:
                raise ValueError(
                    f"the network has no module {name!r}: was it rewritten without its channel graph?"
                )
            if kind == "output":
                handle = modules[name].register_forward_hook(self._output_hook(name))
            else:
                handle = modules[name].register_forward_pre_hook(self._input_hook(name), with_kwargs=True)
            self._handles.append(handle)

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def restart(self) -> None:
        """Count calls from 0 again; before every forward pass."""
        self._num_calls.clear()

    def _act(self, name: str, kind: str, tensor: Any) -> Tensor | None:
        call = self._num_calls.get((name, kind), 0)
        self._num_calls[name, kind] = call + 1
        replaced = False
        for action in self._actions.get((name, kind, call), ()):
            result = action(tensor)
            if result is not None:
                tensor, replaced = result, True
        return tensor if replaced else None

    def _output_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                first = self._act(name, "output", output[0])
                return None if first is None else (first, *output[1:])
            return self._act(name, "output", output)

        return hook

    def _input_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                first = self._act(name, "input", args[0])
                return None if first is None else ((first, *args[1:]), kwargs)
            key = next(iter(kwargs))
            first = self._act(name, "input", kwargs[key])
            return None if first is None else (args, {**kwargs, key: first})

        return hook


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Iterable[Tap]) -> Iterator[Taps]:
    """Tap a network for as long as the context is open.

    Args:
        model: The bare network (no DDP or compiled wrapper).
        taps: What to look at; several taps of one place act in their order.

    Raises:
        ValueError: The network has no module of a tap's name.
    """
    hooks = Taps(model, taps)
    try:
        hooks.install()
        yield hooks
    finally:
        hooks.remove()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode and the random states are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    first = next(iter(model.parameters()), None)
    devices = [first.device] if first is not None and first.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training
