"""The flags of pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from image_classification.config import ConfigError, check, flag
from pruning.budget import Budget
from pruning.channel_graph import Constraints
from pruning.criteria import (
    FEATURE_CHOICES,
    NORMALISATIONS,
    Discriminant,
    criterion_class,
)
from pruning.criteria.base import FeatureCriterion
from pruning.learned.flags import GateFlags
from pruning.rates import RateSearch, parse_rates
from pruning.saliency_flags import SaliencyFlags
from pruning.search import SEARCHES, Search, build_search

DEFAULT_BUDGET = ("macs=0.5",)


_AS_MANY_AS_POSSIBLE = 1 << 20
METHODS = ("scores", "learned")
#: Flags that say how scores prune; gates that learn have no use for them.
_OF_SCORES = (
    "iterative_pruning", "one_shot_pruning", "pruning_step", "pruning_delta", "pruning_start", "pruning_warmup",
    "pruning_criterion", "pruning_search", "pruning_shortlist", "score_features", "score_normalisation",
    "calibration_batches", "judge_batches", "di_ridge", "di_precision", "prune_rate",
)  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class PruningConfig(SaliencyFlags, GateFlags):
    """Pruning"""

    pruning_method: str = flag(
        "scores", "--pruning-method", choices=METHODS,
        help="scores: channels go by a criterion, with --iterative-pruning or --one-shot-pruning; learned: gates learn "
        "before training, so that the explanation stays as it is (ISP).",
    )  # fmt: skip

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
        [], "--budget", metavar="METRIC=SHARE", repeatable=True,
        help="Share of a cost (macs, params, memory, latency) that may remain; may be repeated; macs=0.5 if none.",
    )  # fmt: skip
    pruning_step: int = flag(50, "--pruning-step", help="Iterations between two rewrites.")
    pruning_delta: float = flag(
        5e-3, "--pruning-delta", help="Share of the original cost that one rewrite removes."
    )
    pruning_start: int = flag(0, "--pruning-start", help="Iteration from which the intervals are counted.")
    pruning_warmup: int = flag(
        0,
        "--pruning-warmup",
        help="Iterations in which the learning rate comes back linearly after a rewrite.",
    )
    pruning_criterion: str = flag(
        "discriminant", "--pruning-criterion",
        help="What makes a channel important; CRITERION+saliency takes two together.",
    )  # fmt: skip
    pruning_search: str | None = flag(
        None, "--pruning-search", choices=SEARCHES,
        help="Which channels give way; greedy by default, global with --one-shot-pruning.",
    )  # fmt: skip
    pruning_shortlist: int = flag(
        4,
        "--pruning-shortlist",
        help="Candidates that greedy measures after estimating all; 0: all, 1: trust the estimate.",
    )
    score_features: str = flag(
        "post", "--score-features", choices=FEATURE_CHOICES,
        help="Feature maps that criteria look at: the layer's own (pre, as published) or the next one's input (post).",
    )  # fmt: skip
    score_normalisation: str = flag(
        "mean",
        "--score-normalisation",
        choices=NORMALISATIONS,
        help="How global compares scores of different groups.",
    )
    calibration_batches: int = flag(
        10, "--calibration-batches", help="Batches per process that scores are made of."
    )
    judge_batches: int = flag(2, "--judge-batches", help="How many of them greedy judges its candidates by.")
    di_ridge: float = flag(0.1, "--di-ridge", help="Ridge ρ of the discriminant criterion.")
    di_precision: str = flag(
        "auto",
        "--di-precision",
        choices=("auto", "float32", "float64"),
        help="Arithmetic of the discriminant criterion.",
    )
    round_to: int = flag(
        1, "--round-to", help="Keep channel counts multiples of this; 8 suits most hardware."
    )
    min_width: float = flag(
        0.1, "--min-width", help="Least share (below 1) or count of channels that a group keeps."
    )
    prune_ignore: list[str] = flag(
        [],
        "--prune-ignore",
        metavar="PATTERN",
        repeatable=True,
        help="Modules that are left alone, such as 'layer4.*'.",
    )
    prune_limit: list[str] = flag(
        [], "--prune-limit", metavar="PATTERN=LEAST", repeatable=True,
        help="Least share or count of channels that matching groups keep, such as 'layer1.*=0.5'.",
    )  # fmt: skip
    prune_rate: list[str] = flag(
        [], "--prune-rate", metavar="PATTERN[=SHARE]", repeatable=True,
        help="With --one-shot-pruning: cut matching groups only, each by this share of its channels (default: that "
        "of --one-shot-pruning); may be repeated.",
    )  # fmt: skip

    def __post_init__(self) -> None:
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
                f"--pruning-search {self.pruning_search} and --prune-rate exclude each other: the rates say what goes",
            )
            parse_rates(self.prune_rate, share)
        check(self.pruning_step >= 1, f"--pruning-step {self.pruning_step}: must be at least 1 iteration")
        check(self.pruning_start >= 0, f"--pruning-start {self.pruning_start} is negative")
        check(self.pruning_warmup >= 0, f"--pruning-warmup {self.pruning_warmup} is negative")
        check(
            self.pruning_warmup <= self.pruning_step,
            f"--pruning-warmup {self.pruning_warmup} is longer than --pruning-step {self.pruning_step}",
        )
        check(self.pruning_shortlist >= 0, f"--pruning-shortlist {self.pruning_shortlist} is negative")
        check(
            self.calibration_batches >= 1,
            f"--calibration-batches {self.calibration_batches}: at least 1 is needed",
        )
        check(self.judge_batches >= 1, f"--judge-batches {self.judge_batches}: at least 1 is needed")
        check(self.di_ridge > 0, f"--di-ridge {self.di_ridge}: must be positive")
        try:
            self.constraints()
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.check_gates()
        check(
            0 < self.pruning_delta <= 1,
            f"--pruning-delta {self.pruning_delta}: give the share that one rewrite removes, above 0 and at most 1",
        )
        if self.active:
            Budget.parse(self.budget_words())
            self.check_saliency(self.criteria(), self.learned)
        if not self.active:
            self._check_unused(
                [field.name for field in dataclasses.fields(self)],
                "--iterative-pruning, --one-shot-pruning or --pruning-method learned",
            )
        elif self.learned:
            self._check_unused(list(_OF_SCORES), "--pruning-method scores")
        else:
            gate_flags = [field.name for field in dataclasses.fields(GateFlags)]
            self._check_unused(gate_flags, "--pruning-method learned")
            self._check_scores()

    def _check_scores(self) -> None:
        """The criteria exist, and flags of other criteria, searches and intervals are left out.

        Raises:
            ConfigError: Naming the flag.
        """
        try:
            kinds = [criterion_class(name) for name in self.criteria()]
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if not self.iterative_pruning:
            intervals = ["pruning_step", "pruning_delta", "pruning_start", "pruning_warmup"]
            self._check_unused(intervals, "--iterative-pruning")
        search = None if self.prune_rate else self.search_name()
        if search != "greedy":
            self._check_unused(["pruning_shortlist"], "--pruning-search greedy")
        if search != "global":
            self._check_unused(["score_normalisation"], "--pruning-search global")
        if not any(issubclass(kind, Discriminant) for kind in kinds):
            self._check_unused(["di_ridge", "di_precision"], "--pruning-criterion discriminant")
        if not any(issubclass(kind, FeatureCriterion) for kind in kinds):
            self._check_unused(["score_features"], "a criterion of feature maps, such as discriminant")

    def check_evaluation(self, evaluate: bool) -> None:
        """Refuse to leave pruning out silently where the network is only measured.

        Raises:
            ConfigError: Pruning is asked for and so is `--evaluate`.
        """
        check(
            not (self.active and evaluate),
            "--iterative-pruning, --one-shot-pruning and --pruning-method learned have no effect with --evaluate: "
            "leave one out",
        )

    def _check_unused(self, names: list[str], needed: str) -> None:
        """Flags that mean nothing without another one are refused rather than ignored."""
        for field in dataclasses.fields(self):
            default = field.default_factory() if callable(field.default_factory) else field.default
            name = "--" + field.name.replace("_", "-")
            check(
                field.name not in names or getattr(self, field.name) == default,
                f"{name} has no effect without {needed}: add it, or leave {name} out",
            )

    @property
    def learned(self) -> bool:
        """Whether gates learn what goes."""
        return self.pruning_method == "learned"

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.iterative_pruning or self.one_shot_pruning is not None or self.learned

    def wanted_batches(self) -> int:
        """Calibration batches per process where `--calibration-size` leaves it open; gates learn on all they may."""
        if not self.active:
            return 0
        return _AS_MANY_AS_POSSIBLE if self.learned else self.calibration_batches

    def criteria(self) -> list[str]:
        """The parts of `--pruning-criterion`."""
        return self.pruning_criterion.split("+")

    def budget_words(self) -> list[str]:
        """The budget as METRIC=SHARE, the default one included."""
        if self.one_shot_pruning is not None:
            return [f"macs={1 - self.one_shot_pruning:.12g}"]
        return self.budget or list(DEFAULT_BUDGET)

    def search_name(self) -> str:
        """The search, default included."""
        return self.pruning_search or ("greedy" if self.iterative_pruning else "global")

    def search(self) -> Search:
        """The search with its settings."""
        if self.prune_rate:
            return RateSearch(parse_rates(self.prune_rate, self.one_shot_pruning))
        return build_search(self.search_name(), self.pruning_shortlist, self.score_normalisation)

    def constraints(self) -> Constraints:
        """What the flags demand of the widths.

        Raises:
            ConfigError, ValueError: A limit that cannot be read or is out of range.
        """
        limits = parse_limits(self.prune_limit)
        return Constraints(self.round_to, self.min_width, tuple(self.prune_ignore), limits)


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """Read `--prune-limit`: `["layer1.*=0.5"]`.

    Raises:
        ConfigError: A word is not PATTERN=LEAST.
    """
    limits: dict[str, float] = {}
    for word in words:
        pattern, equals, least = word.rpartition("=")
        try:
            limits[pattern] = float(least)
        except ValueError:
            equals = ""
        check(
            bool(equals and pattern), f"--prune-limit {word!r}: write PATTERN=LEAST, such as 'layer1.*=0.5'"
        )
    return limits
