"""Creation of criteria by name and settings, as in `Pruner(criterion=…)`."""

from __future__ import annotations

import dataclasses
import inspect

from image_classification.config import SettingError, check_setting
from image_classification.plain_data import Plain
from pruning.criteria import Criterion, Discriminant, create_criterion, criterion_class
from pruning.criteria.combine import DEFAULT_WEIGHT, Combined
from pruning.criteria.criterion import DEFAULT_FEATURES, FeatureCriterion, Features, GradientCriterion
from pruning.criteria.discriminant import DEFAULT_PRECISION, PUBLISHED_RIDGE, Precision
from pruning.criteria.saliency import DEFAULT_PASSES, DEFAULT_TARGET, Saliency, Target
from pruning.task import Loss
from pruning.task.explained import Explained

DEFAULT_CRITERION = "discriminant"
#: Criteria that can be combined with another one.
SECOND_CRITERIA = ("saliency", "reconstruction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriterionSettings:
    """Settings of all criteria; each criterion uses those that apply to it.

    Attributes:
        features: Feature maps to use, for criteria that use any.
        ridge, precision: See `Discriminant`.
        saliency_passes, saliency_target: See `Saliency`.
        saliency_weight: β of a combination, the share of the second criterion.
    """

    features: Features = DEFAULT_FEATURES
    ridge: float = PUBLISHED_RIDGE
    precision: Precision = DEFAULT_PRECISION
    saliency_passes: int = DEFAULT_PASSES
    saliency_target: Target = DEFAULT_TARGET
    saliency_weight: float = DEFAULT_WEIGHT


def make_criterion(
    name: str,
    settings: CriterionSettings | None = None,
    *,
    loss: Loss | None = None,
    originals: Explained | None = None,
) -> Criterion:
    """Create a criterion by name.

    Args:
        name: One of `criterion_names()`, or two of them with a "+", the second one of `SECOND_CRITERIA`.
        settings: Settings of the criteria.
        loss: (outputs, batch) → losses, for criteria that use derivatives of the loss (taylor, fisher); defaults to the
            loss of the task they run with.
        originals: The explanation used by the saliency criterion.

    Raises:
        SettingError: There is no such criterion, or saliency is requested without an explanation.
    """
    settings = settings or CriterionSettings()
    first, plus, second = name.partition("+")
    if not plus:
        return _single(name, settings, loss, originals)
    check_setting(
        second in SECOND_CRITERIA and first not in ("", second),
        "criterion",
        name,
        f"a combination is CRITERION+{' or CRITERION+'.join(SECOND_CRITERIA)}, such as discriminant+saliency",
    )
    one = _single(first, settings, loss, originals)
    other = _single(second, settings, loss, originals)
    return Combined(one, other, settings.saliency_weight)


def _single(
    name: str, settings: CriterionSettings, loss: Loss | None, originals: Explained | None
) -> Criterion:
    options: Plain = {}
    kind = criterion_class(name)
    if issubclass(kind, FeatureCriterion):
        options["features"] = settings.features
    if issubclass(kind, Discriminant):
        options |= {"ridge": settings.ridge, "precision": settings.precision}
    if issubclass(kind, GradientCriterion) and "loss" in inspect.signature(kind).parameters:
        options["loss"] = loss
    if issubclass(kind, Saliency):
        if originals is None:
            raise SettingError(
                "originals",
                None,
                "the saliency criterion needs an explanation: give an `OriginalExplanations`, of a selector, a CASM or "
                "Grad-CAM, in `PrunerSettings`",
            )
        options["originals"] = originals
        options["max_passes"] = settings.saliency_passes
        options["target"] = settings.saliency_target
    return create_criterion(name, **options)
