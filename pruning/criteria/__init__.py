"""Criteria of channel importance. Importing this package registers all of them.

criterion = create_criterion("discriminant", features="post") scores = score_groups(model, graph, batches, criterion)
# pruning/criteria/scoring.py
"""

from pruning.criteria.bn_scale import BNScale
from pruning.criteria.combine import (
    DEFAULT_NORMALISATION,
    NORMALISATIONS,
    Combined,
    combine_scores,
    normalise_scores,
)
from pruning.criteria.criterion import (
    FEATURE_CHOICES,
    Criterion,
    FeatureCriterion,
    GradientCriterion,
    GroupWeights,
    NetworkCriterion,
    WeightCriterion,
    WeightMember,
    create_criterion,
    criterion_class,
    criterion_names,
    register_criterion,
)
from pruning.criteria.discriminant import Discriminant, discriminant_scores
from pruning.criteria.fisher import Fisher
from pruning.criteria.fpgm import FPGM
from pruning.criteria.hrank import HRank
from pruning.criteria.magnitude import Magnitude, MagnitudeL2
from pruning.criteria.random_scores import Random
from pruning.criteria.reconstruction import Reconstruction
from pruning.criteria.saliency import Saliency
from pruning.criteria.taylor import Taylor, Taylor2019
from pruning.criteria.torch_pruning import TorchPruningImportance

__all__ = [
    "DEFAULT_NORMALISATION",
    "FEATURE_CHOICES",
    "FPGM",
    "NORMALISATIONS",
    "BNScale",
    "Combined",
    "Criterion",
    "Discriminant",
    "FeatureCriterion",
    "Fisher",
    "GradientCriterion",
    "GroupWeights",
    "HRank",
    "Magnitude",
    "MagnitudeL2",
    "NetworkCriterion",
    "Random",
    "Reconstruction",
    "Saliency",
    "Taylor",
    "Taylor2019",
    "TorchPruningImportance",
    "WeightCriterion",
    "WeightMember",
    "combine_scores",
    "create_criterion",
    "criterion_class",
    "criterion_names",
    "discriminant_scores",
    "normalise_scores",
    "register_criterion",
]
