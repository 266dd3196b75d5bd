"""Optimizers that train a network: found inside their wrappers, and checked before their state is cut.

An optimizer that was forgotten, or that keeps tensors where they cannot be sliced, would fail or mix up parameters much
later. It is refused when pruning starts, or before the rewrite that it would spoil.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from image_classification.config import SettingError

#: Names of optimizers that keep parameters in their own vectors or shards.
_UNCUTTABLE = ("LBFGS", "ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")


def optimizers_in(given: object) -> list[Optimizer]:
    """Find every optimizer in a user's argument, including those inside wrappers (SAM, Lookahead, Accelerate).

    Raises:
        SettingError: `given` neither is nor contains an optimizer.
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
    """Refuse wrappers around optimizers that keep their own tensors, such as the slow weights of a Lookahead.

    Raises:
        SettingError: There is such a wrapper; the message names it and where it keeps the tensors.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for wrapper in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(wrapper, Optimizer) or not hasattr(wrapper, "__dict__"):
            continue  # optimizers have a check of their own
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
        SettingError: An optimizer belongs to another network or keeps tensors outside its state.
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
    """Return where an optimizer keeps tensors other than its state, or None."""
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
    """Records every optimizer that takes a step, for as long as the owner exists."""

    def __init__(self, owner: object) -> None:
        seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        handle = register_optimizer_step_post_hook(lambda optimizer, _args, _kwargs: seen.add(optimizer))
        self._seen = seen
        weakref.finalize(owner, handle.remove)

    def check_none_forgotten(self, model: nn.Module, known: Sequence[Optimizer]) -> None:
        """Refuse to cut parameters whose state is in an optimizer that was not passed.

        Raises:
            SettingError: There is such an optimizer; the message names it.
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
