"""Thinning, the choice of classifiers that a mask must confuse: the published presets, and flags that override them.

Żołna et al. 2020, section 3.2 and appendix.
"""

from __future__ import annotations

import dataclasses

from explainers.casm.decoder import UPSAMPLE, WIDTH, Upsample
from image_classification.config import check, flag

NUM_PAST = 30


@dataclasses.dataclass(frozen=True)
class Thinning:
    """The choice of classifiers that judge masked images.

    Attributes:
        fixed: The classifier is not trained; the mask depends on this one classifier.
        past: Probability that a stored earlier classifier judges instead of the current one.
        store_every: Batches between two stored classifiers; 0 stores the first one only.
        lambda_r: Weight of the size term.
    """

    fixed: bool
    past: float
    store_every: int
    lambda_r: float


@dataclasses.dataclass(frozen=True)
class _Preset:
    fixed: bool
    past: float
    store_every: int
    lambda_entropy: float
    lambda_adversarial: float


#: Name in the paper → settings: F first (fixed), L last, FL first and last, L100 and L1000 every 100 and 1,000 batches.
PRESETS = {
    "F": _Preset(True, 0.0, 0, 2.5, 9.0),
    "L": _Preset(False, 0.0, 0, 14.0, 18.0),
    "FL": _Preset(False, 0.5, 0, 7.5, 11.0),
    "L100": _Preset(False, 0.5, 100, 10.0, 17.0),
    "L1000": _Preset(False, 0.5, 1000, 10.0, 17.0),
}


@dataclasses.dataclass(kw_only=True)
class CasmConfig:
    """Saliency mapping"""

    reproduce: str = flag(
        "L",
        "--reproduce",
        choices=tuple(PRESETS),
        help="Published thinning: F fixed classifier, L the last, FL first and last, L100 and L1000 past ones too.",
    )
    adversarial: bool = flag(
        False, "--adversarial", help="Masks maximise the classifier's loss instead of its entropy."
    )
    fixed_classifier: bool | None = flag(
        None, "--fixed-classifier", help="Do not train the classifier; default: as --reproduce says."
    )
    hp: float | None = flag(
        None,
        "--hp",
        metavar="SHARE",
        help="Probability that a past classifier judges a batch; default: as --reproduce says.",
    )
    smf: int | None = flag(
        None,
        "--smf",
        metavar="N",
        help="Store the classifier every N batches, 0: only the first; default: as --reproduce says.",
    )
    num_past: int = flag(
        NUM_PAST, "--num-past", help="Most classifiers that are stored; then one is replaced at random."
    )
    lambda_r: float | None = flag(
        None, "--lambda-r", help="Weight of the size of masks; default: as --reproduce and --adversarial say."
    )
    pot: float = flag(0.2, "--pot", help="Share of the training set that one epoch shows.")
    lr: float = flag(1e-3, "--lr", help="Learning rate of the classifier (SGD).")
    lr_casm: float = flag(1e-3, "--lr-casm", help="Learning rate of the decoder (Adam).")
    lrde: int = flag(20, "--lrde", help="Epochs between two drops of both learning rates to a tenth.")
    momentum: float = flag(0.9, "--momentum", "--mom", help="Momentum of the classifier's SGD.")
    weight_decay: float = flag(1e-4, "--weight-decay", "--wd", help="Weight decay of classifier and decoder.")
    clip_casm: float = flag(10.0, "--clip-casm", help="Largest gradient norm of the decoder.")
    decoder_width: int = flag(
        WIDTH, "--decoder-width", help="Channels that the decoder reduces each stage to."
    )

    upsample: Upsample = flag(
        UPSAMPLE,
        "--upsample",
        help="How masks are brought to the images' size: each element a block, as published by default, or bilinear.",
    )

    def __post_init__(self) -> None:
        check(self.hp is None or 0 <= self.hp <= 1, f"--hp {self.hp}: a probability lies in [0, 1]")
        check(self.smf is None or self.smf >= 0, f"--smf {self.smf} is negative; 0 stores the first only")
        check(self.num_past >= 1, f"--num-past {self.num_past}: at least 1 classifier must be stored")
        check(0 < self.pot <= 1, f"--pot {self.pot}: a share lies in (0, 1]")
        check(self.lrde >= 1, f"--lrde {self.lrde}: give at least 1 epoch")
        check(0 <= self.momentum < 1, f"--momentum: {self.momentum} is outside [0, 1)")
        check(self.decoder_width >= 1, f"--decoder-width {self.decoder_width}: give at least 1 channel")
        for name in ("lr", "lr_casm", "clip_casm"):
            value = getattr(self, name)
            check(value > 0, f"--{name.replace('_', '-')}: {value} is not positive")
        check(self.weight_decay >= 0, f"--weight-decay: {self.weight_decay} is negative")
        check(
            self.lambda_r is None or self.lambda_r >= 0,
            f"--lambda-r: {self.lambda_r} is negative, which would reward large masks",
        )
        thinning = self.thinning
        check(
            not (thinning.fixed and thinning.past > 0),
            "--hp with a fixed classifier has no effect, all past ones are the same: leave --hp or --fixed-classifier "
            "out",
        )
        check(
            self.smf is None or thinning.past > 0,
            f"--smf {self.smf} has no effect where past classifiers never judge: raise --hp or choose FL, L100, L1000",
        )
        check(
            self.num_past == NUM_PAST or thinning.past > 0,
            f"--num-past {self.num_past} has no effect where past classifiers never judge: raise --hp",
        )

    @property
    def thinning(self) -> Thinning:
        """Return the preset with the flags applied."""
        preset = PRESETS[self.reproduce]
        published = preset.lambda_adversarial if self.adversarial else preset.lambda_entropy
        return Thinning(
            preset.fixed if self.fixed_classifier is None else self.fixed_classifier,
            preset.past if self.hp is None else self.hp,
            preset.store_every if self.smf is None else self.smf,
            published if self.lambda_r is None else self.lambda_r,
        )

    @property
    def name(self) -> str:
        """Default name of a CASM with these settings."""
        return f"{self.reproduce}-adversarial" if self.adversarial else self.reproduce
