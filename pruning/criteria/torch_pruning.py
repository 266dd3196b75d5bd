"""Importance functions written for Torch-Pruning (checked against 1.6.1) as criteria.

Torch-Pruning passes a group to an importance: a sequence of items (`dep`, `idxs`) with `root_idxs`, where `dep.layer`
is a module, `dep.pruning_fn` says which of its dimensions, `idxs` are the channels of that dimension and `root_idxs`
the positions in the root layer; the importance returns one number per root position. This file presents LucidPrune's
groups in that form, with Torch-Pruning's own function objects, because importances compare them.

    criterion = TorchPruningImportance(tp.importance.GroupMagnitudeImportance(p=2))

Torch-Pruning's own graph is not involved, so importances also work on networks that it cannot trace. Importances that
read gradients (GroupTaylorImportance) read `.grad`, as in Torch-Pruning itself.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from pruning.criteria.criterion import GroupWeights, WeightCriterion, WeightMember

_KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (nn.modules.conv._ConvNd, "conv"),
    (nn.Linear, "linear"),
    (nn.modules.batchnorm._BatchNorm, "batchnorm"),
    (nn.LayerNorm, "layernorm"),
    (nn.GroupNorm, "groupnorm"),
    (nn.PReLU, "prelu"),
)


@dataclasses.dataclass(frozen=True)
class Node:
    """The module of a dependency, `dep.target`."""

    module: nn.Module
    name: str


@dataclasses.dataclass(frozen=True)
class Dependency:
    """A dimension of a module; attribute names are Torch-Pruning's."""

    target: Node
    handler: Callable[..., object]

    @property
    def layer(self) -> nn.Module:
        """The module."""
        return self.target.module

    @property
    def pruning_fn(self) -> Callable[..., object]:
        """The function that would prune it."""
        return self.handler


@dataclasses.dataclass
class Item:
    """One member; unpacks as `dep, idxs`."""

    dep: Dependency
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Dependency | list[int]]:
        yield self.dep
        yield self.idxs


class TorchPruningImportance(WeightCriterion):
    """An `Importance` object of Torch-Pruning, or any callable that takes its groups.

    Args:
        importance: Called with one group; returns (width,) numbers, or None if it cannot score the group.
        functions: Module with `prune_conv_out_channels` and the like; by default Torch-Pruning's own module.

    Raises:
        ValueError: Torch-Pruning is not installed and no functions are given.
    """

    name = "torch-pruning"

    def __init__(self, importance: Callable[[list[Item]], Tensor | None], functions: object = None) -> None:
        self.importance = importance
        self.functions = functions if functions is not None else _torch_pruning_functions()

    def score_group(self, group: GroupWeights) -> Tensor | None:
        """Return the importance's scores, (width,) or None.

        Raises:
            ValueError: The importance returns something else.
        """
        items = [item for item in map(self._item, _one_per_side(group)) if item is not None]
        items.sort(
            key=lambda item: len(item.idxs) != group.width
        )  # the root, whose channels are the units, comes first
        scores = self.importance(items)
        if scores is not None and (not isinstance(scores, Tensor) or scores.shape != (group.width,)):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"importance {type(self.importance).__name__} gave {shape} for the {group.width} units of group "
                f"{group.name!r}; give one number per unit"
            )
        return scores

    def _item(self, member: WeightMember) -> Item | None:
        """Return a member in Torch-Pruning's form; None for modules unknown to Torch-Pruning."""
        kind = next((name for types, name in _KINDS if isinstance(member.module, types)), None)
        if kind is None:
            return None
        if kind == "conv" and member.role == "out" and _is_depthwise(member.module):
            kind = "depthwise_conv"
        side = "in" if member.role == "in" else "out"
        function = getattr(self.functions, f"prune_{kind}_{side}_channels")
        places = torch.nonzero(member.positions >= 0).flatten()
        node = Node(member.module, member.name.rpartition(".")[0])
        return Item(Dependency(node, function), places.tolist(), member.positions[places].tolist())


def _one_per_side(group: GroupWeights) -> Iterator[WeightMember]:
    """Iterate over members, without vectors that follow a weight of the same module (biases)."""
    seen: set[tuple[int, bool]] = set()
    for member in sorted(group.members, key=lambda m: not m.name.endswith("weight")):
        key = (id(member.module), member.role == "in")
        if key not in seen:
            seen.add(key)
            yield member


def _is_depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) == getattr(module, "out_channels", None) != 1


def _torch_pruning_functions() -> ModuleType:
    try:
        return importlib.import_module("torch_pruning.pruner.function")
    except ImportError as error:
        raise ValueError("Torch-Pruning is not installed: pip install torch-pruning") from error
