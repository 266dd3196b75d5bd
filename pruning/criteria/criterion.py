"""What a criterion is: four small base classes, one per kind of evidence, and the registry of names.

A criterion gives every unit of every coupled group a number: how much would be lost without it. It is a pure
function (tested against its formula) inside a thin class:

    WeightCriterion     looks at the parameters only:          score_group(group) -> (width,)
    FeatureCriterion    looks at feature maps of a batch:      score(features, targets) -> (C,)
    GradientCriterion   looks at derivatives by channel gates: reduce(gate_gradients) -> (U,)
    NetworkCriterion    looks as it likes:                     score_network(model, graph, …) -> {group: (width,)}

`scoring.py` collects the evidence for all groups in one pass, adds scores up over batches, members of a group and
ranks, and divides by what `average` names. A new criterion is a subclass and one decorator.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from image_classification.config import SettingError, check_choice
from image_classification.distributed import Distributed
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group
from pruning.task import Batch, Loss, Targets, Task
from pruning.task.explained import FeatureGate

Features = Literal["pre", "post"]
FEATURE_CHOICES: tuple[Features, ...] = get_args(Features)
"""Which feature map shows a unit: `pre`, the output of the layer that makes it (before batch norm, as published);
`post`, the input of the layer that reads it (after batch norm, activation and residual addition)."""
DEFAULT_FEATURES: Features = "post"

Average = Literal["none", "batches", "samples"]
AVERAGES: tuple[Average, ...] = get_args(Average)


@dataclasses.dataclass(frozen=True)
class WeightMember:
    """One dimension of one parameter whose slices belong to a group's units.

    Attributes:
        name: Qualified name of the parameter.
        module: The module that holds it.
        values: The parameter, detached.
        dim: The dimension.
        role: "out" (the layer makes the units), "in" (the layer reads them), "along" (vectors that follow).
        positions: (size of `dim`,) int64, on the CPU: unit 0 … width−1 of every slice, -1 for those of no unit.
    """

    name: str
    module: nn.Module
    values: Tensor
    dim: int
    role: str
    positions: Tensor

    def slices(self) -> Tensor:
        """The parameter as (size of `dim`, everything else): one row per slice."""
        return self.values.movedim(self.dim, 0).reshape(self.values.shape[self.dim], -1)

    def add_to_units(self, per_slice: Tensor, width: int) -> Tensor:
        """Sum numbers per slice, (size of `dim`,), into numbers per unit, (width,) float64."""
        place = torch.where(self.positions >= 0, self.positions, width).to(
            per_slice.device, non_blocking=True
        )
        total = torch.zeros(width + 1, dtype=torch.float64, device=per_slice.device)
        return total.index_add(0, place, per_slice.double())[:width]


@dataclasses.dataclass(frozen=True)
class GroupWeights:
    """A group as a weight criterion sees it."""

    name: str
    width: int
    members: tuple[WeightMember, ...]

    def with_role(self, role: str) -> Iterator[WeightMember]:
        """The members of one role."""
        return (member for member in self.members if member.role == role)


#: What a feature criterion remembers of a feature map; an object with `nbytes`.
Summary = Any


class Criterion:
    """What all criteria share.

    Attributes:
        name: The name it is registered under.
        average: What the summed scores are divided by in the end: "none", "batches" or "samples".
        announces_unscored: Whether a warning names the groups that it cannot score.
    """

    name: ClassVar[str] = ""
    average: ClassVar[Average] = "none"
    announces_unscored: ClassVar[bool] = True

    def check_targets(self, targets: Targets) -> None:
        """Refuse targets of a batch that the criterion cannot use; by default it looks at none.

        Args:
            targets: What the batch has for targets, of any kind; None where it has none.

        Raises:
            SettingError: Saying which targets it accepts.
        """

    def warnings(self) -> list[str]:
        """What a user should know about the scores just made; asked for once per pass."""
        return []


class WeightCriterion(Criterion, abc.ABC):
    """Scores from the parameters alone; calibration batches are not read."""

    @abc.abstractmethod
    def score_group(self, group: GroupWeights) -> Tensor | None:
        """Scores of one group, (width,), the smallest the least important; None if the group cannot be scored."""


class FeatureCriterion(Criterion, abc.ABC):
    """Scores from feature maps of one forward pass without gradients.

    Args:
        features: One of `FEATURE_CHOICES`.

    Attributes:
        pending_bytes: How many bytes of summaries may wait before `finish` is called.
    """

    pending_bytes: ClassVar[int] = 0

    def __init__(self, features: Features = DEFAULT_FEATURES) -> None:
        check_choice("features", features, FEATURE_CHOICES)
        self.features = features

    @abc.abstractmethod
    def score(self, features: Tensor, targets: Targets) -> Tensor:
        """Scores of the channels of one feature map.

        Args:
            features: (N, C, …) any floating type and memory layout; must not be kept or changed.
            targets: What the batch has for targets and `check_targets` lets pass: of a classifier (N,) int64 class
                indices or (N, L) soft or multi-hot.

        Returns:
            (C,) a sum over the batch.
        """

    def summarise(self, features: Tensor, targets: Targets) -> Summary:
        """What to remember of a feature map until `finish`; an object with `nbytes`. By default its scores."""
        return self.score(features, targets)

    def finish(self, summaries: Sequence[Summary], targets: Targets) -> list[Tensor]:
        """Scores, (C,) each, of several feature maps of one batch from their summaries."""
        return list(summaries)

    def must_repeat(self) -> bool:
        """Asked after every batch: whether its scores are unsound and the batch has to be passed once more."""
        return False


class GradientCriterion(Criterion, abc.ABC):
    """Scores from derivatives of one or more numbers per sample by gates m = 1 on the units.

    A gate multiplies the unit wherever a layer reads it, so m = 0 is the network without the unit, and the
    derivatives of coupled members are summed before any square or absolute value, as the chain rule has it.

    Args:
        loss: (outputs, batch) → losses as in `Task`, which by default has one.

    Attributes:
        pieces: A batch is passed in so many parts, one after the other, to save memory; exact where scores are sums
            over images.
    """

    average: ClassVar[Average] = "samples"
    pieces: ClassVar[int] = 1

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss

    def losses(self, model: nn.Module, batch: Batch, task: Task) -> Tensor:
        """Run the network: losses of the batch's samples, (N,)."""
        if self.loss is not None:
            task = dataclasses.replace(task, loss=self.loss)
        return task.losses(task.outputs(model, batch), batch)

    def objectives(self, model: nn.Module, batch: Batch, task: Task) -> tuple[Tensor, ...]:
        """Run the network; scalars, each a sum over the samples, to be differentiated one by one."""
        return (self.losses(model, batch, task).sum(),)

    def watched(self) -> tuple[str, ...]:
        """Modules whose outputs the objectives read on their own, beside the layers of the network."""
        return ()

    def gated_objectives(
        self, model: nn.Module, batch: Batch, task: Task, gate: FeatureGate
    ) -> tuple[Tensor, ...]:
        """As `objectives`; every output that is `watched` is passed through `gate(module, output)` where it is read."""
        return self.objectives(model, batch, task)

    @abc.abstractmethod
    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Scores of a batch.

        Args:
            gate_gradients: (K, N, U) float64: derivative of objective k of sample n by the gate of unit u.

        Returns:
            (U,) a sum over the batch (or over batches, as `average` says).
        """


class NetworkCriterion(Criterion, abc.ABC):
    """Scores from passes of its own over the calibration batches, all groups together."""

    @abc.abstractmethod
    def score_network(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        task: Task,
        distributed: Distributed,
    ) -> dict[int, Tensor]:
        """Group index → (width,) scores, equal on all ranks; groups that cannot be scored are left out. Collective.

        Args:
            model: The network; to be left as it is.
            graph: Its channel graph.
            groups: What to score.
            batches: This rank's batches on the network's device.
            task: How the network is run on a batch and judged.
            distributed: The ranks.
        """


C = TypeVar("C", bound=type[Criterion])
_REGISTRY: dict[str, type[Criterion]] = {}


def register_criterion(name: str) -> Callable[[C], C]:
    """Class decorator: make a criterion known by a name to `create_criterion`, pruners and the command line.

    Raises:
        ValueError: The name is taken by another class, or holds a "+"; or `average` is none of the three.
    """
    if not name or "+" in name:
        raise ValueError(f"criterion name {name!r}: give a name without '+', which combines criteria")

    def register(cls: C) -> C:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(
                f"criterion name {name!r} is taken by {_REGISTRY[name].__qualname__}: choose another"
            )
        check_choice("average", cls.average, AVERAGES)
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def criterion_names() -> list[str]:
    """Names of all registered criteria, sorted."""
    return sorted(_REGISTRY)


def criterion_class(name: str) -> type[Criterion]:
    """The class that is registered under a name.

    Raises:
        SettingError: There is no such criterion; the nearest name is suggested.
    """
    check_choice("criterion", name, criterion_names())
    return _REGISTRY[name]


def create_criterion(name: str, **options: object) -> Criterion:
    """A criterion by its name.

    Args:
        name: One of `criterion_names()`.
        options: Its constructor's arguments.

    Raises:
        SettingError: There is no such criterion (the nearest name is suggested), or no such option.
    """
    try:
        return criterion_class(name)(**options)
    except TypeError as error:
        raise SettingError("criterion", name, str(error)) from error
