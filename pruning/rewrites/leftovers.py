"""Detection of leftovers of an earlier step that would make training fail after a rewrite."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

log = logging.getLogger(__name__)


def warn_of_leftovers(model: nn.Module, known: Sequence[Optimizer]) -> None:
    """Warn of leftovers that would make training fail after a rewrite."""
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
    """Return the name of a parameter still referenced by an earlier forward pass's graph, or None."""
    mark = "lucidprune"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # The node that accumulates the parameter's gradient lives as long as something refers to it. If nothing else
        # does, it is freed with `notes`, and the second iteration gets a new node without the mark.
        for _ in range(2):
            notes = _notes_of(parameter)
            if notes.pop(mark, False):
                return name
            notes[mark] = True
            del notes
    return None


def _notes_of(parameter: nn.Parameter) -> dict[str, object]:
    """Return the metadata of the graph node that accumulates a parameter's gradient."""
    with torch.enable_grad():
        made_by: Any = parameter.view_as(parameter).grad_fn
    notes: dict[str, object] = made_by.next_functions[0][0].metadata
    return notes
