"""Flags of the training under a teacher."""

from __future__ import annotations

import dataclasses
from typing import Literal

from explainers.differentiable.matching import Match
from image_classification.config import check, check_file, flag
from image_classification.precision import PrecisionConfig
from image_classification.train_config import TrainConfig
from pruning.training.unused_flags import refuse_unused


@dataclasses.dataclass(kw_only=True)
class DistillConfig:
    """Teacher"""

    teacher: str | None = flag(
        None,
        "--teacher",
        metavar="FILE",
        reads=True,
        help="Weights of a trained network that the student learns from: a LucidPrune checkpoint, or others'.",
    )
    teacher_arch: str | None = flag(
        None,
        "--teacher-arch",
        metavar="NAME",
        help="Architecture of --teacher; LucidPrune checkpoints say theirs.",
    )
    teacher_mode: Literal["evaluation", "train"] = flag(
        "evaluation",
        "--teacher-mode",
        help="train: the teacher's batch norms take each batch's statistics and its dropout drops, as in the published "
        "unstructured pruning, which never puts it into evaluation mode.",
    )
    distill: Literal["none", "logit"] = flag(
        "none", "--distill", help="Learn the teacher's logits beside the targets."
    )
    distill_temperature: float = flag(4.0, "--distill-temperature", help="Temperature T of --distill logit.")
    distill_weight: float = flag(
        0.5, "--distill-weight", help="Share α of --distill logit; the targets' loss has 1 − α."
    )
    match: Literal["none", Match] = flag(
        "none",
        "--match",
        help="Keep the attribution maps of the teacher: sensitivity-weighted (swa), equally weighted (ewa); for "
        "comparison Grad-CAM scaled to [0, 1] (gradcam) and plain attention transfer (attention).",
    )
    match_weight: float = flag(100.0, "--match-weight", help="Weight of the matching loss.")
    match_layer: list[str] = flag(
        [],
        "--match-layer",
        setting="layers",
        metavar="LAYER[=TEACHER'S]",
        repeatable=True,
        help="Module whose output is matched, and the teacher's where it has another name; may be repeated; by "
        "default the last feature map that everything goes through, in either network.",
    )
    stochastic: bool = flag(
        False, "--stochastic", help="Leave a random share of the teacher's channels out of every step's maps."
    )
    drop_percent: float = flag(
        0.3,
        "--drop-percent",
        setting="drop_share",
        metavar="SHARE",
        help="That share, between 0 and 1 (0.3 is 30 %).",
    )

    def __post_init__(self) -> None:
        if self.teacher is None:
            refuse_unused(self, ("teacher_arch", "teacher_mode", "distill", "match"), "--teacher FILE")
        else:
            check_file(self.teacher, f"--teacher {self.teacher}: there is no such file")
            check(
                self.distill != "none" or self.match != "none",
                "--teacher has no effect alone: add --distill logit, --match swa, or both",
            )
        if self.distill == "none":
            refuse_unused(self, ("distill_temperature", "distill_weight"), "--distill logit")
        if self.match == "none":
            refuse_unused(self, ("match_weight", "match_layer", "stochastic"), "--match swa (or ewa, …)")
        if not self.stochastic:
            refuse_unused(self, ("drop_percent",), "--stochastic")
        check(self.distill_temperature > 0, f"--distill-temperature {self.distill_temperature}: not positive")
        check(
            0 < self.distill_weight <= 1,
            f"--distill-weight {self.distill_weight}: give a share between 0 and 1",
        )
        check(self.match_weight > 0, f"--match-weight {self.match_weight}: not positive")
        check(0 < self.drop_percent < 1, f"--drop-percent {self.drop_percent}: give a share between 0 and 1")

    @property
    def active(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None


def check_combination(config: DistillConfig, train: TrainConfig, precision: PrecisionConfig) -> None:
    """Refuse flags that cannot be combined with a teacher, before anything is opened.

    Raises:
        ConfigError: There is such a combination; the message names both flags.
    """
    if not config.active:
        return
    check(
        not train.evaluate,
        "--teacher has no effect with --evaluate: leave one out (`python -m explainers compare` shows both networks)",
    )
    check(
        config.match == "none" or not precision.compile,
        f"--match {config.match} and --compile exclude each other: the loss needs feature maps and a second "
        "derivative, which compiled graphs do not give; leave --compile out (--distill logit alone works with it)",
    )
