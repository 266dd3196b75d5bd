"""Torch-Pruning on networks of other libraries, with the help that its own examples give it.

Its users name the layers, or the heads, whose outputs it must leave alone, the tensors that the outputs hold, the
projections of attention with their numbers of heads, and put the widths that attention modules remember right
afterwards. Several answers to these questions are tried, and the first with which the network runs counts.
"""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

Given = tuple[Any, ...]
Transform = Callable[[Any], list[Tensor]]

_NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads", "heads")
_HEAD_WIDTHS = ("attention_head_size", "head_dim")
_WIDTHS = ("all_head_size",)
_PROJECTIONS = frozenset({"query", "key", "value", "q_proj", "k_proj", "v_proj", "q", "k", "v"})
_MOST_IGNORED = 0.5  # of the parameters: who ignores more does not prune


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way of calling Torch-Pruning: modules that it leaves alone, and the tensors in an output, if it is told."""

    ignored: tuple[str, ...]
    transform: Transform | None

    def cut(self, original: nn.Module, given: Given, share: float) -> nn.Module:
        """Return a copy of the network that lost this share of its channels.

        Raises:
            RuntimeError: Torch-Pruning raised, and where.
        """
        model = copy.deepcopy(original).requires_grad_(True)
        try:
            _cut(model, given, share, self.ignored, self.transform)
        except Exception as error:  # any failure is a result; its traceback would hold the network
            told = f"{type(error).__name__} ({_place(error)}): {error}"
        else:
            return model
        raise RuntimeError(" ".join(told.split()))


def attempts(original: nn.Module, heads: list[str], tensors: Transform) -> list[Attempt]:
    """Return the ways to be tried: the layers that make the outputs are ignored, the modules around them, or the last
    of these (a YOLO also returns what its head reads); outputs as they are, or as tensors.
    """
    ignored = dict.fromkeys((tuple(heads), _around(original, heads), _around(original, heads[-1:])))
    return [Attempt(names, transform) for names in ignored for transform in (None, tensors)]


def _place(error: Exception) -> str:
    """The last line of code that an exception went through: whose fault it is."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    folder = Path(frame.filename).parent.name
    return f"{folder}/{Path(frame.filename).name}:{frame.lineno}"


def _around(model: nn.Module, heads: list[str]) -> tuple[str, ...]:
    """Return the outermost module around each head that holds a minor part of the parameters."""
    total = _size(model)
    found = []
    for name in heads:
        parent = name.rpartition(".")[0]
        while parent and _size(model.get_submodule(parent)) < _MOST_IGNORED * total:
            name, parent = parent, parent.rpartition(".")[0]
        found.append(name)
    return tuple(dict.fromkeys(found))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cut(
    model: nn.Module, given: Given, share: float, ignored: Sequence[str], transform: Transform | None
) -> None:
    import torch_pruning as tp

    attentions = {name: heads for name, module in model.named_modules() if (heads := _num_heads(module))}
    num_heads = {
        layer: heads
        for name, heads in attentions.items()
        for layer in _projections(model.get_submodule(name))
    }
    tp.pruner.MagnitudePruner(
        model,
        given,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=share,
        forward_fn=lambda network, arguments: network(*arguments),
        output_transform=transform,
        num_heads=num_heads,
        ignored_layers=[model.get_submodule(name) for name in ignored],
    ).step()
    for name, heads in attentions.items():
        _put_widths_right(model.get_submodule(name), heads)


def _num_heads(module: nn.Module) -> int:
    """The number of heads of an attention module with projections of its own; 0 for all other modules."""
    if not _projections(module):
        return 0
    numbers = [getattr(module, name) for name in _NUM_HEADS if isinstance(getattr(module, name, None), int)]
    return numbers[0] if numbers else 0


def _projections(module: nn.Module) -> list[nn.Linear]:
    return [
        layer
        for name, layer in module.named_children()
        if name in _PROJECTIONS and isinstance(layer, nn.Linear)
    ]


def _put_widths_right(module: nn.Module, heads: int) -> None:
    """Give an attention module the widths that it remembers, as they are after the cut."""
    width = _projections(module)[0].out_features
    for names, value in ((_HEAD_WIDTHS, width // heads), (_WIDTHS, width)):
        for name in names:
            if hasattr(module, name):
                setattr(module, name, value)
