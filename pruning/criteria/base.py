"""What a criterion is: three small base classes, one per kind of evidence, and the registry of names.

A criterion gives every unit of every coupled group a number: how much would be lost without it. It is a pure
function (tested against its formula) inside a thin class:

    WeightCriterion     looks at the parameters only:          score_group(group) -> (width,)
    FeatureCriterion    looks at feature maps of a batch:      score(features, targets) -> (C,)
    GradientCriterion   looks at derivatives by channel gates: reduce(gate_gradients) -> (U,)

`pruning/scoring.py` collects the evidence for all groups in one pass, adds scores up over batches, members of a
group and ranks, and divides by what `average` names. A new criterion is a subclass and one decorator.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.models import main_and_auxiliary_logits

FEATURE_CHOICES = ("pre", "post")
"""Which feature map shows a unit: `pre`, the output of the layer that makes it (before batch norm, as published);
`post`, the input of the layer that reads it (after batch norm, activation and residual addition)."""

AVERAGES = ("none", "batches", "samples")

Loss = Callable[[Any, Tensor], Tensor]
FeatureGate = Callable[[str, Tensor], Tensor]
"""(name of a module, its output as something outside of the network reads it) → the output with its units' gates."""


@dataclasses.dataclass(frozen=True)
class WeightMember:
    """One dimension of one parameter whose slices belong to a group's units.

    Attributes:
        name: Qualified name of the parameter.
        module: The module that holds it.
        values: The parameter, detached.
        dim: The dimension.
        role: "out" (the layer makes the units), "in" (the layer reads them), "along" (vectors that follow).
        positions: (size of `dim`,) int64: unit 0 … width−1 of every slice, -1 for those of no unit.
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
        mine = self.positions >= 0
        total = torch.zeros(width, dtype=torch.float64, device=per_slice.device)
        return total.index_add(0, self.positions[mine], per_slice[mine].double())


@dataclasses.dataclass(frozen=True)
class GroupWeights:
    """A group as a weight criterion sees it."""

    name: str
    width: int
    members: tuple[WeightMember, ...]

    def with_role(self, role: str) -> Iterator[WeightMember]:
        """The members of one role."""
        return (member for member in self.members if member.role == role)


class Criterion:
    """What all criteria share.

    Attributes:
        name: The name it is registered under.
        average: What the summed scores are divided by in the end: "none", "batches" or "samples".
        announces_unscored: Whether people are told of groups that it has nothing to score by.
    """

    name: ClassVar[str] = ""
    average: ClassVar[str] = "none"
    announces_unscored: ClassVar[bool] = True

    def warnings(self) -> list[str]:
        """What a user should know about the scores just made; asked for once per pass."""
        return []


class WeightCriterion(Criterion, abc.ABC):
    """Scores from the parameters alone; calibration batches are not read."""

    @abc.abstractmethod
    def score_group(self, group: GroupWeights) -> Tensor | None:
        """Scores of one group, (width,), the smallest the least important; None if it has nothing to go by."""


class FeatureCriterion(Criterion, abc.ABC):
    """Scores from feature maps of one forward pass without gradients.

    Args:
        features: One of `FEATURE_CHOICES`.

    Attributes:
        pending_bytes: How much `summarise` may leave lying before `finish` is called.
    """

    pending_bytes: ClassVar[int] = 0

    def __init__(self, features: str = "post") -> None:
        if features not in FEATURE_CHOICES:
            raise ValueError(f"--score-features {features!r}: choose from {', '.join(FEATURE_CHOICES)}")
        self.features = features

    @abc.abstractmethod
    def score(self, features: Tensor, targets: Tensor) -> Tensor:
        """Scores of the channels of one feature map.

        Args:
            features: (N, C, …) any floating type and memory layout; must not be kept or changed.
            targets: (N,) int64 class indices or (N, L) soft or multi-hot.

        Returns:
            (C,) a sum over the batch.
        """

    def summarise(self, features: Tensor, targets: Tensor) -> Any:
        """What to remember of a feature map until `finish`; an object with `nbytes`. By default its scores."""
        return self.score(features, targets)

    def finish(self, summaries: Sequence[Any], targets: Tensor) -> list[Tensor]:
        """Scores, (C,) each, of several feature maps of one batch from their summaries."""
        return list(summaries)

    def must_repeat(self) -> bool:
        """Asked after every batch: whether its scores are no good and the batch is to be passed once more."""
        return False


class GradientCriterion(Criterion, abc.ABC):
    """Scores from derivatives of one or more numbers per picture by gates m = 1 on the units.

    A gate multiplies the unit wherever a layer reads it, so m = 0 is the network without the unit, and the
    derivatives of coupled members are summed before any square or absolute value, as the chain rule has it.

    Args:
        loss: (logits, targets) → mean loss over the batch; cross-entropy by default.

    Attributes:
        pieces: A batch is passed in so many parts, one after the other, to save memory; exact where scores are sums
            over pictures.
    """

    average: ClassVar[str] = "samples"
    pieces: ClassVar[int] = 1

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss: Loss = loss or cross_entropy

    def objectives(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Run the network; scalars, each a sum over the pictures, to be differentiated one by one."""
        logits, _ = main_and_auxiliary_logits(model(images))
        return (self.loss(logits, targets) * len(images),)

    def watched(self) -> tuple[str, ...]:
        """Modules whose outputs the objectives read on their own, beside the layers of the network."""
        return ()

    def gated_objectives(
        self, model: nn.Module, images: Tensor, targets: Tensor, gate: FeatureGate
    ) -> tuple[Tensor, ...]:
        """As `objectives`; every output that is `watched` is passed through `gate(module, output)` where it is read."""
        return self.objectives(model, images, targets)

    @abc.abstractmethod
    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Scores of a batch.

        Args:
            gate_gradients: (K, N, U) float64: derivative of objective k of picture n by the gate of unit u.

        Returns:
            (U,) a sum over the batch (or over batches, as `average` says).
        """


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in float32; targets are class indices (N,) or probabilities (N, L)."""
    return F.cross_entropy(outputs.float(), targets if targets.dim() == 1 else targets.float())


C = TypeVar("C", bound=type[Criterion])
_REGISTRY: dict[str, type[Criterion]] = {}


def register_criterion(name: str) -> Callable[[C], C]:
    """Class decorator: make a criterion known to `create_criterion` and `--pruning-criterion` under a name.

    Raises:
        ValueError: The name is taken by another class, or holds a "+".
    """
    if not name or "+" in name:
        raise ValueError(f"criterion name {name!r}: give a name without '+', which combines criteria")

    def register(cls: C) -> C:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(
                f"criterion name {name!r} is taken by {_REGISTRY[name].__qualname__}: choose another"
            )
        if cls.average not in AVERAGES:
            raise ValueError(
                f"criterion {name!r}: average is {cls.average!r}, choose from {', '.join(AVERAGES)}"
            )
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
        ValueError: There is no such criterion; the nearest name is suggested.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, criterion_names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"--pruning-criterion {name!r}: {hint}there are {', '.join(criterion_names())}")
    return _REGISTRY[name]


def create_criterion(name: str, **options: Any) -> Criterion:
    """A criterion by its name.

    Args:
        name: One of `criterion_names()`.
        options: Its constructor's arguments.

    Raises:
        ValueError: There is no such criterion (the nearest name is suggested), or no such option.
    """
    try:
        return criterion_class(name)(**options)
    except TypeError as error:
        raise ValueError(f"--pruning-criterion {name}: {error}") from error
