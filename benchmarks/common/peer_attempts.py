"""Torch-Pruning on networks of other libraries, with the help that its own examples give it.

Its users name the layers, or the heads, whose outputs it must leave alone, the tensors that the outputs hold, the
projections of attention with their numbers of heads, and put the widths that attention modules remember right
afterwards. Several answers to these questions are tried, and the first with which the network runs counts.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

Given = tuple[Any, ...]
Transform = Callable[[Any], list[Tensor]]

_NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads", "heads")
_HEAD_WIDTHS = ("attention_head_size", "head_dim")
_WIDTHS = ("all_head_size",)
_PROJECTIONS = frozenset({"query", "key", "value", "q_proj", "k_proj", "v_proj", "q", "k", "v"})
_MOST_LEVELS = 3
_MOST_IGNORED = 0.5  # of the parameters: who ignores more does not prune


def attempts(
    original: nn.Module, given: Given, share: float, heads: list[str], tensors: Transform
) -> Iterator[nn.Module]:
    """Yield a copy of the network for every way of cutting it that Torch-Pruning comes through.

    Args:
        original: The network.
        given: Its arguments.
        share: Share of the channels that go.
        heads: Names of the layers that make the outputs.
        tensors: Returns the tensors in an output.

    Raises:
        RuntimeError: It comes through none: what it raised at first.
    """
    failed = ""
    passed = False
    for ignored in _ignored(original, heads):
        for transform in (None, tensors):
            model = copy.deepcopy(original).requires_grad_(True)
            try:
                _cut(model, given, share, ignored, transform)
            except Exception as error:  # any failure is a result; its traceback would hold the network
                failed = failed or f"{type(error).__name__} ({_place(error)}): {error}"
            else:
                passed = True
                yield model
    if not passed:
        raise RuntimeError(" ".join(failed.split()))


def _place(error: Exception) -> str:
    """The last line of code that an exception went through: whose fault it is."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    folder = Path(frame.filename).parent.name
    return f"{folder}/{Path(frame.filename).name}:{frame.lineno}"


def _ignored(model: nn.Module, heads: list[str]) -> Iterator[list[str]]:
    """Yield the layers that make the outputs, then the modules around them, as long as these are a minor part."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    names = heads
    for _ in range(_MOST_LEVELS + 1):
        yield names
        around = []
        for name in names:
            parent = name.rpartition(".")[0]
            size = sum(parameter.numel() for parameter in model.get_submodule(parent).parameters())
            around.append(parent if parent and size < _MOST_IGNORED * num_parameters else name)
        around = list(dict.fromkeys(around))
        if around == names:
            return
        names = around


def _cut(
    model: nn.Module, given: Given, share: float, ignored: list[str], transform: Transform | None
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
