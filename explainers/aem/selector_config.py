"""Flags of `train-predictor` and `train-selector`. Constants not given default to the published ones for the image
size.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from explainers.aem.masks import MASK_PRESETS, MaskGeometry
from explainers.aem.objectives import SelectorWeights
from explainers.aem.selector import DECODER, LIGHT_WIDTH, DecoderName, Kind
from explainers.aem.selector_callbacks import BestBy
from explainers.differentiable.explanation import EXPLAIN_HELP, EXPLAINED, ExplainedClass
from image_classification.config import ConfigError, check, check_file, flag, section
from image_classification.job_config import JobConfig
from image_classification.optim import OptimConfig
from image_classification.schedules import ScheduleConfig
from image_classification.train_config import TrainConfig

#: Largest image side that takes the CIFAR constants; larger images take the ImageNet ones.
LARGEST_CIFAR_LIKE = 64


class LossConstants(NamedTuple):
    """λ1, λ2 and α of the selector's loss."""

    area: float
    smoothness: float
    exponent: float


#: Published constants for each data set.
LOSS_PRESETS = {"cifar": LossConstants(0.2, 1e-3, 0.3), "imagenet": LossConstants(1.0, 1e-4, 0.5)}


def preset_name(image_size: int) -> str:
    """Name of the data set whose constants apply to images of this side."""
    return "cifar" if image_size <= LARGEST_CIFAR_LIKE else "imagenet"


def _published(name: str) -> str:
    """Describe the default of a loss constant, for `--help`."""
    small, large = getattr(LOSS_PRESETS["cifar"], name), getattr(LOSS_PRESETS["imagenet"], name)
    return f"default: {small:g} up to {LARGEST_CIFAR_LIKE} pixels, else {large:g}"


@dataclasses.dataclass(kw_only=True)
class ImitationConfig:
    """Flags shared by predictor and selector training."""

    temperature: float = 1.0
    num_scales: int | None = None
    hard_samples: bool = flag(
        False, "--hard-samples", help="masks of 0 and 1 only (straight-through gradients)"
    )
    evaluation_interval: int = flag(
        300, "--evaluation-interval", help="iterations between judgements on held-out training images"
    )
    best_by: BestBy = flag(
        "agreement",
        "--best-by",
        help="what decides on held-out images which one is kept; agreement as published, kl (lower is better) tells "
        "more of them apart",
    )

    def __post_init__(self) -> None:
        check(self.temperature > 0, f"--temperature {self.temperature} must be above 0")
        check(self.evaluation_interval >= 1, f"--evaluation-interval {self.evaluation_interval}: at least 1")
        check(self.num_scales is None or self.num_scales >= 2, f"--num-scales {self.num_scales}: at least 2")


@dataclasses.dataclass(kw_only=True)
class PredictorConfig(ImitationConfig):
    """Predictor"""

    selector_type: Kind = flag(
        "rbf",
        "--selector-type",
        "--selector-kind",
        setting="kind",
        help="masks that it learns to judge: rbf, or per pixel as in REAL-X",
    )
    predictor_init: Literal["black-box", "fresh"] = flag(
        "black-box", "--predictor-init", help="weights that it starts from"
    )
    mask_preset: str = flag(
        "auto",
        "--mask-preset",
        choices=("auto", *MASK_PRESETS),
        help="published frame and widths of RBF masks, scaled to the images; auto: cifar up to "
        f"{LARGEST_CIFAR_LIKE} pixels",
    )
    mask_travel: float | None = flag(
        None, "--mask-travel", parse=float, help="farthest distance of a centre from the middle, in pixels"
    )
    mask_widths: tuple[float, ...] | None = flag(
        None, "--mask-widths", nargs=2, parse=float, help="least and largest width σ of the masks, in pixels"
    )
    initial_width: float | None = flag(
        None, "--initial-width", parse=float, help="width σ that the selector starts with, in pixels"
    )
    temperature: float = flag(0.1, "--temperature", help="temperature of the relaxed Bernoulli samples")
    num_scales: int | None = flag(
        None,
        "--num-scales",
        parse=int,
        help="real-x: number of the deepest scales that the selector will read; it fixes the size of the mask's cells",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        geometry = {
            "--mask-preset": self.mask_preset != "auto",
            "--mask-travel": self.mask_travel is not None,
            "--mask-widths": self.mask_widths is not None,
            "--initial-width": self.initial_width is not None,
        }
        for name, given in geometry.items():
            check(
                not given or self.selector_type == "rbf",
                f"{name} has no effect with --selector-type {self.selector_type}: leave it out",
            )
        check(
            self.num_scales is None or self.selector_type == "real-x",
            "--num-scales has no effect on an RBF predictor: give it to train-selector",
        )

    def geometry(self, image_size: int) -> MaskGeometry:
        """Frame and widths for images of a size.

        Raises:
            ConfigError: The numbers do not form a valid frame or range.
        """
        name = preset_name(image_size) if self.mask_preset == "auto" else self.mask_preset
        geometry = MASK_PRESETS[name].scaled(image_size)
        given: dict[str, dict[str, float]] = {}
        if self.mask_travel is not None:
            given["--mask-travel"] = {"travel": self.mask_travel}
        if self.mask_widths is not None:
            least, most = self.mask_widths
            given["--mask-widths"] = {"least_width": least, "most_width": most}
        if self.initial_width is not None:
            given["--initial-width"] = {"initial_width": self.initial_width}
        for flag_name, values in given.items():
            try:
                geometry = dataclasses.replace(geometry, **values)  # type: ignore[arg-type]
            except ValueError as error:
                raise ConfigError(f"{flag_name}: {error}") from error
        return geometry


@dataclasses.dataclass(kw_only=True)
class SelectorConfig(ImitationConfig):
    """Selector"""

    predictor: str | None = flag(
        None,
        "--predictor",
        metavar="FILE",
        reads=True,
        help="what train-predictor wrote for the same network",
    )
    selector_type: Kind | None = flag(
        None,
        "--selector-type",
        "--selector-kind",
        help="kind of masks; default: the kind that the predictor judges",
    )
    decoder: DecoderName = flag(
        DECODER,
        "--decoder",
        help="published: sub-pixel up-sampling, as many channels as the network; light: at most "
        f"{LIGHT_WIDTH} channels",
    )
    num_scales: int | None = flag(
        None,
        "--num-scales",
        parse=int,
        help="deepest scales of the network that are read; default: 3 below 96 pixels, else 4, as published",
    )
    lamda: float | None = flag(
        None, "--lamda", "--lambda", parse=float, help=f"λ1, weight of the mask's area; {_published('area')}"
    )
    smoothness_loss_coeff: float | None = flag(
        None,
        "--smoothness-loss-coeff",
        parse=float,
        help=f"λ2, weight of the total variation; {_published('smoothness')}",
    )
    alpha: float | None = flag(
        None, "--alpha", parse=float, help=f"α, exponent of the area term; {_published('exponent')}"
    )
    temperature: float = flag(
        ImitationConfig.temperature, "--temperature", help="temperature of the relaxed Bernoulli samples"
    )
    explained_class: ExplainedClass = flag(
        EXPLAINED,
        "--explain",
        help=EXPLAIN_HELP,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.predictor is not None,
            "--predictor is missing: give what `python -m explainers train-predictor` wrote",
        )
        check_file(str(self.predictor), f"--predictor {self.predictor}: there is no such file")
        for name in ("lamda", "smoothness_loss_coeff"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"--{name.replace('_', '-')} {value} is negative")
        check(self.alpha is None or self.alpha > 0, f"--alpha {self.alpha} must be above 0")

    def weights(self, image_size: int) -> SelectorWeights:
        """Constants of the loss for images of a size."""
        published = LOSS_PRESETS[preset_name(image_size)]
        return SelectorWeights(
            area=published.area if self.lamda is None else self.lamda,
            smoothness=published.smoothness
            if self.smoothness_loss_coeff is None
            else self.smoothness_loss_coeff,
            exponent=published.exponent if self.alpha is None else self.alpha,
            temperature=self.temperature,
            hard=self.hard_samples,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainerJobConfig(JobConfig):
    """A training verb: the main job's sections, with Adam at 1e-4 as published.

    Note: the published Adam decays every parameter; here biases and norms, the bias of the selector's width among them,
    do not decay unless `--bn-weight-decay` is given.
    """

    optim: OptimConfig = section(OptimConfig, optimizer="adam")
    schedule: ScheduleConfig = section(ScheduleConfig, lr=1e-4, lr_schedule="constant")

    def __post_init__(self) -> None:
        check(self.train.figures == "all", "--figures is of classifiers' predictions: leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorJobConfig(ExplainerJobConfig):
    """Configuration of `train-predictor`."""

    train: TrainConfig = section(TrainConfig, epochs=100)
    explainer: PredictorConfig = section(PredictorConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectorJobConfig(ExplainerJobConfig):
    """Configuration of `train-selector`."""

    train: TrainConfig = section(TrainConfig, epochs=5)
    explainer: SelectorConfig = section(SelectorConfig)
