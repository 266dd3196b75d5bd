"""Finds tensors in plain attributes that a forward pass makes itself when they are missing: tables made on demand.

A network that is loaded or moved makes them again, for its widths then. If their numbers depend on a width
(`10000 ** (i / width)`), these would not be the kept part of the present ones: they stay constants, which are not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from image_classification.models.module_tree import named_modules
from image_classification.models.plain_tensors import plain_tensors
from pruning.engine.kept_state import state_kept


def made_on_demand(model: nn.Module, names: Collection[str], run: Callable[[], object]) -> set[str]:
    """Return those of the plain tensors that a pass makes anew when their attribute is empty or gone.

    One module is tried of every class that holds them in the same attribute.

    Args:
        model: The network.
        names: Names of plain tensors, as `plain_tensors` gives them.
        run: Runs the network.
    """
    modules = dict(named_modules(model))
    places: dict[tuple[type[nn.Module], str], list[str]] = {}
    for name in names:
        owner, _, place = name.rpartition(".")
        places.setdefault((type(modules[owner]), place.partition("[")[0]), []).append(name)
    return {
        name
        for (_, attribute), alike in places.items()
        for name in alike
        if _is_made_again(model, modules[alike[0].rpartition(".")[0]], attribute, run)
    }


def _is_made_again(model: nn.Module, module: nn.Module, attribute: str, run: Callable[[], object]) -> bool:
    for empty in (_as_empty, _as_gone):
        with state_kept(model):
            empty(vars(module), attribute)
            try:
                run()
            except Exception:  # whatever a network raises that lacks a constant
                continue
            if any(name.partition("[")[0] == attribute for name in plain_tensors(module)):
                return True
    return False


def _as_empty(attributes: dict[str, Any], name: str) -> None:
    value = attributes[name]
    attributes[name] = type(value)() if type(value) in (list, dict) else None


def _as_gone(attributes: dict[str, Any], name: str) -> None:
    del attributes[name]
