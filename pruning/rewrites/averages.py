"""Averages of a network's weights, which are cut like the network: found inside their wrappers and checked against
it.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from torch import Tensor, nn

from image_classification.config import SettingError

#: A copy of the network, or a state dict.
Average = nn.Module | MutableMapping[str, Tensor]


def averages_in(given: object, model: nn.Module) -> list[Average]:
    """Find the averages of a network in a user's argument, including those inside wrappers.

    Args:
        given: A copy of the network, a wrapper that holds one (`AveragedModel`, timm's `ModelEma`), a state dict, or a
            list of these; None for none.
        model: The network.

    Raises:
        SettingError: `given` is not an average of this network.
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
    # Of several candidates, report the closest: a different shape is more telling than a different name.
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
    """Return why an average does not belong to the network; None if it does."""
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
