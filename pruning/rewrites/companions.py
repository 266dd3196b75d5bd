"""What trains along with the network: optimizers and averages, found inside their wrappers and checked.

A rewrite slices their state. One that was forgotten, or keeps tensors where nothing can slice them, would fail or mix
parameters up long after; so it is refused when pruning starts, or before the rewrite that it would spoil.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from image_classification.config import SettingError

log = logging.getLogger(__name__)
Average = nn.Module | MutableMapping[str, Tensor]
#: Optimizers that keep parameters in vectors or shards of their own, by name.
_UNCUTTABLE = ("LBFGS", "ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")


# -- optimizers --------------------------------------------------------------------------------------------


def optimizers_in(given: object) -> list[Optimizer]:
    """Every optimizer in what a user gives, those inside wrappers included (SAM, Lookahead, Accelerate).

    Raises:
        SettingError: It is not an optimizer and holds none.
    """
    if given is None:
        return []
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    found: list[Optimizer] = []
    for one in several:
        inside = list(_walk(one, set()))
        if not inside:
            raise SettingError(
                "optimizer", type(one).__name__, "give a torch.optim.Optimizer, or a list of them"
            )
        found += [optimizer for optimizer in inside if all(optimizer is not other for other in found)]
    return found


def _walk(holder: object, seen: set[int]) -> Iterator[Optimizer]:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, Optimizer):
        yield holder
    for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, Optimizer):
                yield from _walk(inner, seen)


def check_wrappers(model: nn.Module, given: object) -> None:
    """Refuse wrappers around optimizers that keep tensors of their own, such as the slow weights of a Lookahead.

    Raises:
        SettingError: Naming the wrapper and where it keeps them.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for wrapper in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(wrapper, Optimizer) or not hasattr(wrapper, "__dict__"):
            continue  # an optimizer is looked at as one
        for name, value in vars(wrapper).items():
            if _has_tensors(value, own):
                raise _kept_elsewhere(wrapper, repr(name))


def _kept_elsewhere(optimizer: object, place: str) -> SettingError:
    return SettingError(
        "optimizer",
        type(optimizer).__name__,
        f"it keeps tensors in {place}, outside its state, where they cannot be cut: keep them in "
        "`state[parameter]`, or prune with another one",
    )


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose state cannot follow the network's rewrites.

    Raises:
        SettingError: One of another network, or with tensors outside its state.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if any(kind.__name__ in _UNCUTTABLE for kind in type(optimizer).__mro__):
            raise SettingError(
                "optimizer",
                name,
                "it keeps all parameters in one vector or in shards, which cannot be cut: prune with another one",
            )
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(id(parameter) in own for parameter in held):
            raise SettingError(
                "optimizer",
                name,
                "it holds none of this network's parameters: give the one that trains it (made after the network was "
                "moved or copied)",
            )
        place = _tensors_elsewhere(optimizer, {*own, *map(id, held)})
        if place is not None:
            raise _kept_elsewhere(optimizer, place)


def _tensors_elsewhere(optimizer: Optimizer, parameters: set[int]) -> str | None:
    """Where an optimizer keeps tensors beside its state; None if nowhere."""
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups", "defaults") and _has_tensors(value, parameters):
            return repr(name)
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != "params" and _has_tensors(value, parameters):
                return f"the parameter group's {name!r}"
    return None


def _has_tensors(value: object, parameters: set[int]) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 1 and id(value) not in parameters
    if isinstance(value, Mapping):
        return any(_has_tensors(item, parameters) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_has_tensors(item, parameters) for item in value)


class OptimizerWatch:
    """Notes every optimizer that takes a step, until the owner is gone."""

    def __init__(self, owner: object) -> None:
        seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        handle = register_optimizer_step_post_hook(lambda optimizer, _args, _kwargs: seen.add(optimizer))
        self._seen = seen
        weakref.finalize(owner, handle.remove)

    def check_none_forgotten(self, model: nn.Module, known: Sequence[Optimizer]) -> None:
        """Refuse to cut parameters whose state lies in an optimizer that nobody gave.

        Raises:
            SettingError: Naming the optimizer.
        """
        own = {id(parameter) for parameter in model.parameters()}
        states = {id(optimizer.state) for optimizer in known}
        for optimizer in list(self._seen):
            if id(optimizer.state) in states:
                continue
            for parameter, state in optimizer.state.items():
                held = [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
                if id(parameter) in own and held:
                    raise SettingError(
                        "optimizer",
                        None if not known else [type(one).__name__ for one in known],
                        f"{type(optimizer).__name__} has been training this network, and its state would keep the "
                        "old widths: give it too (several as a list)",
                    )


def warn_of_leftovers(model: nn.Module, known: Sequence[Optimizer]) -> None:
    """Warn of what would make training fail after a rewrite."""
    held = alive_graph(model)
    if held is not None:
        log.warning(
            "the graph of an earlier forward pass still refers to %r: drop the loss, the outputs and any DDP wrapper "
            "before a rewrite, or the next backward pass fails",
            held,
        )
    groups = [group for one in known for group in one.param_groups]
    told = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and id(parameter) not in told:
            log.warning(
                "%r has a gradient, but is in no optimizer that was given. If one trains it, give it as `optimizer`: "
                "its state must be rewritten too",
                name,
            )
            return


def alive_graph(model: nn.Module) -> str | None:
    """Name of a parameter that the graph of an earlier forward pass still refers to; None if there is none."""
    mark = "lucidprune"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # The node that collects the parameter's gradient lives as long as something refers to it. If nothing else
        # does, it is gone with `notes`, and the second look meets a new one without the mark.
        for _ in range(2):
            notes = _notes_of(parameter)
            if notes.pop(mark, False):
                return name
            notes[mark] = True
            del notes
    return None


def _notes_of(parameter: nn.Parameter) -> dict[str, object]:
    """What may be noted on the node of the graph that collects a parameter's gradient."""
    with torch.enable_grad():
        made_by: Any = parameter.view_as(parameter).grad_fn
    notes: dict[str, object] = made_by.next_functions[0][0].metadata
    return notes


# -- averages ----------------------------------------------------------------------------------------------


def averages_in(given: object, model: nn.Module) -> list[Average]:
    """The averages of a network in what a user gives, those inside wrappers included.

    Args:
        given: A copy of the network, a wrapper that holds one (`AveragedModel`, timm's `ModelEma`), a state dict, or a
            list of these; None for none.
        model: The network.

    Raises:
        SettingError: It is not an average of this network.
    """
    if given is None:
        return []
    several = given if isinstance(given, (list, tuple)) else [given]
    return [_average_in(one, model) for one in several]


def _average_in(given: object, model: nn.Module) -> Average:
    problems = []
    for candidate in _candidates(given):
        if candidate is model:
            continue
        problem = _difference(candidate, model)
        if problem is None:
            return candidate
        problems.append(problem)
    # Of several candidates the nearest one: another shape says more than another name.
    problems.sort(key=lambda problem: problem.startswith("it has no"))
    problems.append("give a copy of the network, a wrapper that holds one, or a state dict")
    raise SettingError("ema", type(given).__name__, f"it is not an average of this network: {problems[0]}")


def _candidates(given: object) -> Iterable[Average]:
    if isinstance(given, MutableMapping):
        yield given
        return
    if isinstance(given, nn.Module):
        yield given
    for value in vars(given).values() if hasattr(given, "__dict__") else ():
        if isinstance(value, nn.Module):
            yield value
    if isinstance(given, nn.Module):
        yield from given.children()


def _difference(average: Average, model: nn.Module) -> str | None:
    """What keeps an average from being one of the network; None if it is."""
    if isinstance(average, nn.Module):
        tensors: dict[str, Tensor] = {**dict(average.named_parameters(remove_duplicate=False))}
    else:
        tensors = dict(average)
    for name, parameter in model.named_parameters():
        if name not in tensors:
            return f"it has no {name!r}"
        if tensors[name].shape != parameter.shape:
            return f"its {name!r} is {tuple(tensors[name].shape)} and the network's {tuple(parameter.shape)}"
    return None
