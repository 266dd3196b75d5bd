"""The flags of pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from image_classification.config import SettingError, check, flag
from pruning.costs import cost_names
from pruning.costs.budget import DEFAULT_DELTA, DEFAULT_SHARE, Budget
from pruning.criteria import Discriminant, criterion_class
from pruning.criteria.by_name import DEFAULT_CRITERION, CriterionSettings
from pruning.criteria.combine import DEFAULT_NORMALISATION, Normalisation
from pruning.criteria.criterion import DEFAULT_FEATURES, FeatureCriterion, Features
from pruning.criteria.discriminant import DEFAULT_PRECISION, PUBLISHED_RIDGE, Precision
from pruning.engine.constraints import DEFAULT_MIN_WIDTH, Constraints
from pruning.rewrites.pruner_settings import DEFAULT_STEP, PrunerSettings
from pruning.search import RateSearch, Search, SearchSettings, build_search, search_names
from pruning.search.greedy import LARGEST_INSTALMENT
from pruning.search.rates import parse_rates
from pruning.search.search import DEFAULT_SEARCH, ONE_SHOT_SEARCH
from pruning.training.gate_flags import GateFlags
from pruning.training.saliency_flags import SaliencyFlags
from pruning.training.unused_flags import refuse_unused

_AS_MANY_AS_POSSIBLE = 1 << 20
Method = Literal["scores", "learned"]
#: Flags of score-based pruning, which learned gates do not use.
_OF_SCORES = (
    "iterative_pruning",
    "one_shot_pruning",
    "pruning_step",
    "rewrites_per_epoch",
    "pruning_delta",
    "pruning_start",
    "pruning_warmup",
    "pruning_criterion",
    "pruning_search",
    "pruning_shortlist",
    "pruning_instalments",
    "score_features",
    "score_normalisation",
    "calibration_batches",
    "judge_batches",
    "di_ridge",
    "di_precision",
    "prune_rate",
)


@dataclasses.dataclass(kw_only=True)
class PruningConfig(SaliencyFlags, GateFlags):
    """Pruning"""

    pruning_method: Method = flag(
        "scores",
        "--pruning-method",
        help="scores: channels go by a criterion, with --iterative-pruning or --one-shot-pruning; learned: gates learn "
        "before training, so that the explanation stays as it is (ISP).",
    )

    iterative_pruning: bool = flag(
        False, "--iterative-pruning", help="Rewrite the network smaller while it trains."
    )
    one_shot_pruning: float | None = flag(
        None,
        "--one-shot-pruning",
        metavar="SHARE",
        help="Take this share of the MACs away at once, before training; with --prune-rate, of the channels it names.",
    )
    budget: list[str] = flag(
        [],
        "--budget",
        metavar="METRIC=SHARE",
        repeatable=True,
        help=f"Share of a cost ({', '.join(cost_names())}) that may remain; may be repeated; macs={DEFAULT_SHARE} if "
        "none.",
    )
    pruning_step: int = flag(
        DEFAULT_STEP, "--pruning-step", help="Iterations between two rewrites.", setting="step"
    )
    rewrites_per_epoch: int | None = flag(
        None,
        "--rewrites-per-epoch",
        parse=int,
        metavar="N",
        help="In place of --pruning-step: N rewrites in every epoch, evenly spaced; 2 is what the published program "
        "does, whatever its --pruning_step says.",
    )
    pruning_delta: float = flag(
        DEFAULT_DELTA,
        "--pruning-delta",
        help="Share of the original cost that one rewrite removes.",
        setting="delta",
    )
    pruning_start: int = flag(
        PrunerSettings.start, "--pruning-start", help="Iteration from which the intervals are counted."
    )
    pruning_warmup: int = flag(
        0,
        "--pruning-warmup",
        help="Iterations in which the learning rate comes back linearly after a rewrite.",
    )
    pruning_criterion: str = flag(
        DEFAULT_CRITERION,
        "--pruning-criterion",
        help="What makes a channel important; CRITERION+saliency takes two together.",
        setting="criterion",
    )
    pruning_search: str | None = flag(
        None,
        "--pruning-search",
        setting="search",
        help=f"Which channels leave: one of {', '.join(search_names())}; {DEFAULT_SEARCH} by default, "
        f"{ONE_SHOT_SEARCH} with --one-shot-pruning.",
    )
    pruning_shortlist: int = flag(
        SearchSettings.shortlist,
        "--pruning-shortlist",
        setting="shortlist",
        help="Candidates that greedy measures after estimating all; 0: all, 1: trust the estimate.",
    )
    pruning_instalments: int | None = flag(
        SearchSettings.instalments,
        "--pruning-instalments",
        parse=int,
        metavar="N",
        setting="instalments",
        help="Parts that greedy divides a rewrite into, each taken from the group that is then the best; 1 as "
        f"published, by default as many as keep each at {LARGEST_INSTALMENT:.0%} of the original cost.",
    )
    score_features: Features = flag(
        DEFAULT_FEATURES,
        "--score-features",
        setting="features",
        help="Feature maps that criteria look at: the layer's own (pre, as published) or the next one's input (post).",
    )
    score_normalisation: Normalisation = flag(
        DEFAULT_NORMALISATION,
        "--score-normalisation",
        setting="normalisation",
        help="How global compares scores of different groups.",
    )
    calibration_batches: int = flag(
        PrunerSettings.max_batches,
        "--calibration-batches",
        setting="max_batches",
        help="Batches per process that scores are made of.",
    )
    judge_batches: int = flag(
        PrunerSettings.judge_batches,
        "--judge-batches",
        help="How many of them greedy judges its candidates by.",
    )
    di_ridge: float = flag(
        PUBLISHED_RIDGE, "--di-ridge", help="Ridge ρ of the discriminant criterion.", setting="ridge"
    )
    di_precision: Precision = flag(
        DEFAULT_PRECISION,
        "--di-precision",
        help="Arithmetic of the discriminant criterion.",
        setting="precision",
    )
    round_to: int = flag(
        Constraints.round_to,
        "--round-to",
        help="Keep channel counts multiples of this; 8 suits most hardware.",
    )
    min_width: float = flag(
        DEFAULT_MIN_WIDTH,
        "--min-width",
        help="Least share (below 1) or count of channels that a group keeps.",
    )
    prune_ignore: list[str] = flag(
        [],
        "--prune-ignore",
        metavar="PATTERN",
        repeatable=True,
        help="Modules that are left alone, such as 'layer4.*'; may be repeated.",
        setting="ignored",
    )
    prune_limit: list[str] = flag(
        [],
        "--prune-limit",
        metavar="PATTERN=LEAST",
        repeatable=True,
        help="Least share or count of channels that matching groups keep, such as 'layer1.*=0.5'.",
        setting="limits",
    )
    prune_rate: list[str] = flag(
        [],
        "--prune-rate",
        metavar="PATTERN[=SHARE]",
        repeatable=True,
        setting="rates",
        help="With --one-shot-pruning: cut matching groups only, each by this share of its channels (default: that "
        "of --one-shot-pruning); may be repeated.",
    )

    def __post_init__(self) -> None:
        self._check_amount()
        self._check_intervals()
        for name in ("calibration_batches", "judge_batches"):
            value = getattr(self, name)
            check(value >= 1, f"--{name.replace('_', '-')} {value}: at least 1 is needed")
        check(self.di_ridge > 0, f"--di-ridge {self.di_ridge}: must be positive")
        self.constraints()
        self.gate_settings()
        if self.active:
            Budget.parse(self.budget_words())
            self.check_saliency(self.criteria(), self.learned)
        self._check_method()

    def _check_amount(self) -> None:
        """Check that exactly one of budget, share and rates sets the amount to remove."""
        both = self.iterative_pruning and self.one_shot_pruning is not None
        check(not both, "--iterative-pruning and --one-shot-pruning exclude each other: leave one out")
        share = self.one_shot_pruning
        check(
            share is None or 0 < share < 1,
            f"--one-shot-pruning {share}: give the share to remove, between 0 and 1",
        )
        check(share is None or not self.budget, "--one-shot-pruning sets the budget: leave --budget out")
        if self.prune_rate:
            check(share is not None, "--prune-rate has no effect without --one-shot-pruning: add it")
            check(
                self.pruning_search is None,
                f"--pruning-search {self.pruning_search} and --prune-rate exclude each other: rates leave no choice",
            )
            parse_rates(self.prune_rate, share)

    def _check_intervals(self) -> None:
        """Check the schedule of rewrites, their amounts, and the recovery in between."""
        check(self.pruning_step >= 1, f"--pruning-step {self.pruning_step}: must be at least 1 iteration")
        if self.rewrites_per_epoch is not None:
            check(
                self.rewrites_per_epoch >= 1,
                f"--rewrites-per-epoch {self.rewrites_per_epoch}: at least 1 is needed",
            )
            check(
                self.pruning_step == DEFAULT_STEP,
                "--pruning-step and --rewrites-per-epoch exclude each other: leave one out",
            )
        check(self.pruning_start >= 0, f"--pruning-start {self.pruning_start} is negative")
        check(self.pruning_warmup >= 0, f"--pruning-warmup {self.pruning_warmup} is negative")
        check(
            self.rewrites_per_epoch is not None or self.pruning_warmup <= self.pruning_step,
            f"--pruning-warmup {self.pruning_warmup} is longer than --pruning-step {self.pruning_step}",
        )
        check(
            0 < self.pruning_delta <= 1,
            f"--pruning-delta {self.pruning_delta}: give the share that one rewrite removes, above 0 and at most 1",
        )

    def _check_method(self) -> None:
        """Refuse flags of another pruning method.

        Raises:
            ConfigError: Such a flag is given; the message names it.
        """
        if not self.active:
            needed = "--iterative-pruning, --one-shot-pruning or --pruning-method learned"
            refuse_unused(self, [field.name for field in dataclasses.fields(self)], needed)
        elif self.learned:
            refuse_unused(self, _OF_SCORES, "--pruning-method scores")
        else:
            gate_flags = [field.name for field in dataclasses.fields(GateFlags)]
            refuse_unused(self, gate_flags, "--pruning-method learned")
            self._check_scores()

    def _check_scores(self) -> None:
        """Check that the criteria exist, and refuse flags of other criteria, searches and intervals.

        Raises:
            ConfigError: A flag is refused; the message names it.
        """
        kinds = [criterion_class(name) for name in self.criteria()]
        if not self.iterative_pruning:
            intervals = (
                "pruning_step",
                "rewrites_per_epoch",
                "pruning_delta",
                "pruning_start",
                "pruning_warmup",
            )
            refuse_unused(self, intervals, "--iterative-pruning")
        search = None if self.prune_rate else self.search_name()
        if search is not None:
            self.search()  # refuses invalid settings
        if search != "greedy":
            refuse_unused(self, ["pruning_shortlist", "pruning_instalments"], "--pruning-search greedy")
        if search != "global":
            refuse_unused(self, ["score_normalisation"], "--pruning-search global")
        if not any(issubclass(kind, Discriminant) for kind in kinds):
            refuse_unused(self, ["di_ridge", "di_precision"], "--pruning-criterion discriminant")
        if not any(issubclass(kind, FeatureCriterion) for kind in kinds):
            needed = "a criterion of feature maps, such as discriminant"
            refuse_unused(self, ["score_features"], needed)

    def interval(self, steps_per_epoch: int) -> int:
        """Return the number of iterations between two rewrites."""
        if self.rewrites_per_epoch is None:
            return self.pruning_step
        return max(steps_per_epoch // self.rewrites_per_epoch, 1)

    def check_evaluation(self, evaluate: bool) -> None:
        """Refuse pruning flags if the network is only evaluated, rather than ignoring them.

        Raises:
            ConfigError: Pruning and `--evaluate` are both requested.
        """
        check(
            not (self.active and evaluate),
            "--iterative-pruning, --one-shot-pruning and --pruning-method learned have no effect with --evaluate: "
            "leave one out",
        )

    @property
    def learned(self) -> bool:
        """Whether learned gates decide what to remove."""
        return self.pruning_method == "learned"

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.iterative_pruning or self.one_shot_pruning is not None or self.learned

    def wanted_batches(self) -> int:
        """Default number of calibration batches per process without `--calibration-size`; gates learn on all that are
        allowed.
        """
        if not self.active:
            return 0
        return _AS_MANY_AS_POSSIBLE if self.learned else self.calibration_batches

    def criteria(self) -> list[str]:
        """The parts of `--pruning-criterion`."""
        return self.pruning_criterion.split("+")

    def budget_words(self) -> list[str]:
        """The budget as METRIC=SHARE words, including the default."""
        if self.one_shot_pruning is not None:
            return [f"macs={1 - self.one_shot_pruning:.12g}"]
        return self.budget or [f"macs={DEFAULT_SHARE}"]

    def search_name(self) -> str:
        """Name of the search, including the default."""
        return self.pruning_search or (DEFAULT_SEARCH if self.iterative_pruning else ONE_SHOT_SEARCH)

    def search(self) -> Search:
        """Build the search with its settings."""
        if self.prune_rate:
            return RateSearch(parse_rates(self.prune_rate, self.one_shot_pruning))
        settings = SearchSettings(
            shortlist=self.pruning_shortlist,
            instalments=self.pruning_instalments,
            normalisation=self.score_normalisation,
        )
        return build_search(self.search_name(), settings)

    def criterion_settings(self) -> CriterionSettings:
        """Return the settings of the criteria."""
        return CriterionSettings(
            features=self.score_features,
            ridge=self.di_ridge,
            precision=self.di_precision,
            saliency_passes=self.saliency_passes,
            saliency_target=self.saliency_target,
            saliency_weight=self.saliency_weight,
        )

    def constraints(self) -> Constraints:
        """Return the flags' constraints on the widths.

        Raises:
            ConfigError, ValueError: A limit cannot be parsed or is out of range.
        """
        limits = parse_limits(self.prune_limit)
        return Constraints(self.round_to, self.min_width, tuple(self.prune_ignore), limits)


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """Parse `--prune-limit`: `["layer1.*=0.5"]`.

    Raises:
        SettingError: A word is not PATTERN=LEAST.
    """
    limits: dict[str, float] = {}
    for word in words:
        pattern, _, least = word.rpartition("=")
        try:
            limits[pattern] = float(least)
        except ValueError:
            pattern = ""
        if not pattern:
            raise SettingError("limits", word, "write PATTERN=LEAST, such as 'layer1.*=0.5'")
    return limits
