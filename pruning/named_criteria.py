"""Criteria by name, with the settings that they have: what `--pruning-criterion` and `Pruner(criterion=…)` take."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from image_classification.config import ConfigError, check
from pruning.criteria import Criterion, Discriminant, create_criterion, criterion_class
from pruning.criteria.base import FeatureCriterion, GradientCriterion
from pruning.criteria.combined import Combined
from pruning.criteria.saliency import Saliency
from pruning.loss_change import SampleLoss, sample_losses
from pruning.original import OriginalExplanations
from pruning.saliency_flags import SaliencyFlags


def _mean_loss(loss: SampleLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of a per-sample loss."""
    return loss(logits, targets).mean()


def make_criterion(
    name: str,
    features: str = "post",
    ridge: float = 0.1,
    precision: str = "auto",
    originals: OriginalExplanations | None = None,
    flags: SaliencyFlags | None = None,
    loss: SampleLoss = sample_losses,
) -> Criterion:
    """A criterion by name, with the settings that it has.

    Args:
        name: One of `criterion_names()`, or two of them with a "+", the second of which is saliency.
        features: Feature maps to look at, for criteria that look at any.
        ridge, precision: Of the discriminant criterion.
        originals: The explanation that the saliency criterion goes by.
        flags: Of the saliency criterion; their defaults when None.
        loss: Per-sample loss that criteria by the loss's derivatives (taylor, fisher) go by.

    Raises:
        ConfigError: There is no such criterion, or saliency without an explanation.
    """
    flags = flags or SaliencyFlags()
    first, plus, second = name.partition("+")
    if plus:
        check(
            second == "saliency" and first not in ("", "saliency"),
            f"--pruning-criterion {name}: a combination is CRITERION+saliency, such as discriminant+saliency",
        )
        one, other = (
            make_criterion(part, features, ridge, precision, originals, flags, loss)
            for part in (first, second)
        )
        return Combined(one, other, flags.saliency_weight)
    options: dict[str, Any] = {}
    try:
        kind = criterion_class(name)
        if issubclass(kind, FeatureCriterion):
            options["features"] = features
        if issubclass(kind, Discriminant):
            options |= {"ridge": ridge, "precision": precision}
        if issubclass(kind, GradientCriterion) and "loss" in inspect.signature(kind).parameters:
            options["loss"] = functools.partial(_mean_loss, loss)
        if issubclass(kind, Saliency):
            check(
                originals is not None,
                "--pruning-criterion saliency needs an explanation: give --selector FILE, or --saliency-explanation "
                "gradcam",
            )
            options |= {
                "originals": originals, "max_passes": flags.saliency_passes, "target": flags.saliency_target,
            }  # fmt: skip
        return create_criterion(name, **options)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
