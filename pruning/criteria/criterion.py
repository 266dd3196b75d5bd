"""Base classes of criteria, one for each of four kinds of evidence, and the registry of names.

A criterion gives every unit of every coupled group a number: its importance. It is a pure function (tested against its
formula) inside a thin class:

    WeightCriterion     uses the parameters only:          score_group(group) -> (width,)
    FeatureCriterion    uses feature maps of a batch:      score(features, targets) -> (C,)
    GradientCriterion   uses derivatives by channel gates: reduce(gate_gradients) -> (U,)
    NetworkCriterion    free to use anything:                     score_network(model, graph, …) -> {group: (width,)}

`scoring.py` collects the evidence for all groups in one pass, adds scores up over batches, members of a group and
ranks, and averages as its `average` says. A new criterion is a subclass and one decorator.
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
"""Choices of the feature map that represents a unit.

`pre` is the output of the layer that produces it (before batch norm, as published); `post` is the input of the layer
that reads it (after batch norm, activation and residual addition).
"""
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
        role: "out" (the layer produces the units), "in" (the layer reads them), "along" (vectors that follow the
            units).
        positions: (size of `dim`,) int64, on the CPU: unit 0 … width−1 of every slice, -1 for slices without a unit.
    """

    name: str
    module: nn.Module
    values: Tensor
    dim: int
    role: str
    positions: Tensor

    def slices(self) -> Tensor:
        """Return the parameter as (size of `dim`, everything else): one row per slice."""
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
    """The weights of a group, as seen by a weight criterion."""

    name: str
    width: int
    members: tuple[WeightMember, ...]

    def with_role(self, role: str) -> Iterator[WeightMember]:
        """Iterate over the members with one role."""
        return (member for member in self.members if member.role == role)


#: A feature criterion's summary of a feature map; an object with `nbytes`.
Summary = Any


class Criterion:
    """Base class of all criteria.

    Attributes:
        name: The name it is registered under.
        average: Divisor of the summed scores: "none", "batches" or "samples".
        announces_unscored: Whether groups that cannot be scored are named in a warning.
    """

    name: ClassVar[str] = ""
    average: ClassVar[Average] = "none"
    announces_unscored: ClassVar[bool] = True

    def check_targets(self, targets: Targets) -> None:
        """Refuse targets of a batch that the criterion cannot use; by default targets are ignored.

        Args:
            targets: The targets of the batch, of any kind; None if it has none.

        Raises:
            SettingError: The targets are unusable; the message says which ones are accepted.
        """

    def warnings(self) -> list[str]:
        """Return warnings about the latest scores for the user; called once per pass."""
        return []


class WeightCriterion(Criterion, abc.ABC):
    """Base class of scores computed from the parameters alone; calibration batches are not read."""

    @abc.abstractmethod
    def score_group(self, group: GroupWeights) -> Tensor | None:
        """Return scores of one group, (width,), the smallest the least important; None if it cannot be scored."""


class FeatureCriterion(Criterion, abc.ABC):
    """Base class of scores computed from feature maps of one forward pass without gradients.

    Args:
        features: One of `FEATURE_CHOICES`.

    Attributes:
        pending_bytes: Number of bytes of summaries that may accumulate before `finish` is called.
    """

    pending_bytes: ClassVar[int] = 0

    def __init__(self, features: Features = DEFAULT_FEATURES) -> None:
        check_choice("features", features, FEATURE_CHOICES)
        self.features = features

    @abc.abstractmethod
    def score(self, features: Tensor, targets: Targets) -> Tensor:
        """Compute the scores of the channels of one feature map.

        Args:
            features: (N, C, …) any floating type and memory layout; must not be stored or modified.
            targets: The targets of the batch, accepted by `check_targets`: for a classifier (N,) int64 class indices or
                (N, L) soft or multi-hot.

        Returns:
            Scores (C,), summed over the batch.
        """

    def summarise(self, features: Tensor, targets: Targets) -> Summary:
        """Summarise a feature map for `finish`, as an object with `nbytes`. By default its scores."""
        return self.score(features, targets)

    def finish(self, summaries: Sequence[Summary], targets: Targets) -> list[Tensor]:
        """Compute scores, (C,) each, of several feature maps of one batch from their summaries."""
        return list(summaries)

    def must_repeat(self) -> bool:
        """Whether a batch's scores are unsound and it has to be passed again; called after every batch."""
        return False


class GradientCriterion(Criterion, abc.ABC):
    """Base class of scores computed from derivatives of one or more numbers per sample by gates m = 1 on the units.

    A gate multiplies the unit wherever a layer reads it, so m = 0 is the network without the unit. Derivatives of
    coupled members are summed before any square or absolute value, as the chain rule demands.

    Args:
        loss: (outputs, batch) → losses, as in `Task`, whose own loss is the default.

    Attributes:
        pieces: Number of parts in which a batch is passed, to save memory; exact if scores are sums over images.
    """

    average: ClassVar[Average] = "samples"
    pieces: ClassVar[int] = 1

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss

    def losses(self, model: nn.Module, batch: Batch, task: Task) -> Tensor:
        """Run the network and return the losses of the batch's samples, (N,)."""
        if self.loss is not None:
            task = dataclasses.replace(task, loss=self.loss)
        return task.losses(task.outputs(model, batch), batch)

    def objectives(self, model: nn.Module, batch: Batch, task: Task) -> tuple[Tensor, ...]:
        """Run the network and return scalars, each a sum over the samples, to be differentiated one by one."""
        return (self.losses(model, batch, task).sum(),)

    def watched(self) -> tuple[str, ...]:
        """Names of modules whose outputs the objectives read directly, in addition to the network's own layers."""
        return ()

    def gated_objectives(
        self, model: nn.Module, batch: Batch, task: Task, gate: FeatureGate
    ) -> tuple[Tensor, ...]:
        """As `objectives`; every `watched` output is passed through `gate(module, output)` where it is read."""
        return self.objectives(model, batch, task)

    @abc.abstractmethod
    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Reduce gate gradients to the scores of a batch.

        Args:
            gate_gradients: (K, N, U) float64: derivative of objective k of sample n by the gate of unit u.

        Returns:
            Scores (U,), summed over the batch (or for the whole batch if `average` is "batches").
        """


class NetworkCriterion(Criterion, abc.ABC):
    """Base class of scores computed by the criterion's own passes over the calibration batches, all groups together."""

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
        """Return group index → (width,) scores, equal on all ranks, without groups that cannot be scored. Collective.

        Args:
            model: The network; must not be modified.
            graph: Its channel graph.
            groups: The groups to score.
            batches: This rank's batches on the network's device.
            task: How the network is run on a batch and evaluated.
            distributed: The ranks.
        """


C = TypeVar("C", bound=type[Criterion])
_REGISTRY: dict[str, type[Criterion]] = {}


def register_criterion(name: str) -> Callable[[C], C]:
    """Class decorator that registers a criterion by name for `create_criterion`, pruners and the command line.

    Raises:
        ValueError: The name is taken by another class or contains a "+", or `average` is not one of the three values.
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
    """Return the names of all registered criteria, sorted."""
    return sorted(_REGISTRY)


def criterion_class(name: str) -> type[Criterion]:
    """Return the class registered under a name.

    Raises:
        SettingError: There is no such criterion; the nearest name is suggested.
    """
    check_choice("criterion", name, criterion_names())
    return _REGISTRY[name]


def create_criterion(name: str, **options: object) -> Criterion:
    """Create a criterion by its name.

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
