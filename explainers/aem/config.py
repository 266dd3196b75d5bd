"""Flags of `train-predictor` and `train-selector`. Constants that are not given are the published ones for the size."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

from explainers.aem.masks import MASK_PRESETS, MaskGeometry
from explainers.aem.objectives import SelectorWeights
from explainers.aem.selector import DECODERS, KINDS
from image_classification.config import ConfigError, check, flag
from image_classification.job import SECTIONS
from image_classification.optim import OptimConfig
from image_classification.schedules import ScheduleConfig
from image_classification.trainer import TrainConfig

#: Pictures up to this side take the constants of CIFAR, larger ones those of ImageNet.
LARGEST_CIFAR_LIKE = 64
#: λ1, λ2 and α by preset.
LOSS_PRESETS = {"cifar": (0.2, 1e-3, 0.3), "imagenet": (1.0, 1e-4, 0.5)}
C = TypeVar("C")


def with_defaults(config_class: type[C], **defaults: Any) -> type[C]:
    """The same configuration section with other defaults; flags, help and checks stay."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(config_class)
    changed = [
        (name, hints[name], dataclasses.field(default=value, metadata=fields[name].metadata))
        for name, value in defaults.items()
    ]
    return dataclasses.make_dataclass(
        config_class.__name__, changed, bases=(config_class,), kw_only=True,
        namespace={"__doc__": config_class.__doc__},
    )  # fmt: skip


def training_sections(explainer: type, epochs: int) -> dict[str, type]:
    """The sections of a training verb: the main job's, with Adam at 1e-4 as published, and the verb's own.

    Note: the published Adam decays every parameter; here biases and norms, the bias of the selector's width among them,
    do not decay unless `--bn-weight-decay` is given.
    """
    return {
        **SECTIONS,
        "train": with_defaults(TrainConfig, epochs=epochs),
        "optim": with_defaults(OptimConfig, optimizer="adam"),
        "schedule": with_defaults(ScheduleConfig, lr=1e-4, lr_schedule="constant"),
        "explainer": explainer,
    }


def preset_name(image_size: int) -> str:
    """Whose constants pictures of this side take."""
    return "cifar" if image_size <= LARGEST_CIFAR_LIKE else "imagenet"


@dataclasses.dataclass(kw_only=True)
class PredictorConfig:
    """Predictor"""

    selector_type: str = flag(
        "rbf", "--selector-type", "--selector-kind", choices=KINDS,
        help="masks that it learns to judge: rbf, or per pixel as in REAL-X",
    )  # fmt: skip
    predictor_init: str = flag(
        "black-box", "--predictor-init", choices=("black-box", "fresh"),
        help="weights that it starts from",
    )  # fmt: skip
    mask_preset: str = flag(
        "auto", "--mask-preset", choices=("auto", *MASK_PRESETS),
        help="published frame and widths of RBF masks, scaled to the pictures; auto: cifar up to 64 pixels",
    )  # fmt: skip
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
    hard_samples: bool = flag(
        False, "--hard-samples", help="masks of 0 and 1 only (straight-through gradients)"
    )
    num_scales: int | None = flag(
        None, "--num-scales", parse=int,
        help="real-x: deepest scales that the selector will read; they say how large a cell of its mask is",
    )  # fmt: skip
    evaluation_interval: int = flag(
        300, "--evaluation-interval", help="iterations between judgements on held-out training pictures"
    )
    best_by: str = flag(
        "agreement", "--best-by", choices=("agreement", "kl"),
        help="what decides on held-out pictures which one is kept; agreement as published, kl (lower is better) tells "
        "more of them apart",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self.temperature > 0, f"--temperature {self.temperature} must be above 0")
        check(self.evaluation_interval >= 1, f"--evaluation-interval {self.evaluation_interval}: at least 1")
        geometry = (
            ("--mask-preset", self.mask_preset != "auto"),
            ("--mask-travel", self.mask_travel is not None),
            ("--mask-widths", self.mask_widths is not None),
            ("--initial-width", self.initial_width is not None),
        )
        for name, given in geometry:
            check(
                not given or self.selector_type == "rbf",
                f"{name} has no effect with --selector-type {self.selector_type}: leave it out",
            )
        check(
            self.num_scales is None or self.selector_type == "real-x",
            "--num-scales has no effect on an RBF predictor: give it to train-selector",
        )
        check(self.num_scales is None or self.num_scales >= 2, f"--num-scales {self.num_scales}: at least 2")

    def geometry(self, image_size: int) -> MaskGeometry:
        """Frame and widths for pictures of a size.

        Raises:
            ConfigError: Numbers that make no frame or range.
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
class SelectorConfig:
    """Selector"""

    predictor: str | None = flag(
        None, "--predictor", metavar="FILE", help="what train-predictor wrote for the same network"
    )
    selector_type: str | None = flag(
        None, "--selector-type", "--selector-kind", choices=KINDS,
        help="kind of masks; default: the kind that the predictor judges",
    )  # fmt: skip
    decoder: str = flag(
        "published", "--decoder", choices=DECODERS,
        help="published: sub-pixel up-sampling, as many channels as the network; light: at most 64 channels",
    )  # fmt: skip
    num_scales: int | None = flag(
        None, "--num-scales", parse=int,
        help="deepest scales of the network that are read; default: 3 below 96 pixels, else 4, as published",
    )  # fmt: skip
    lamda: float | None = flag(
        None,
        "--lamda",
        "--lambda",
        parse=float,
        help="λ1, weight of the mask's area; default: 0.2 up to 64 pixels, 1.0",
    )
    smoothness_loss_coeff: float | None = flag(
        None, "--smoothness-loss-coeff", parse=float,
        help="λ2, weight of the total variation; default: 1e-3 up to 64 pixels, 1e-4",
    )  # fmt: skip
    alpha: float | None = flag(
        None, "--alpha", parse=float, help="α, exponent of the area term; default: 0.3 up to 64 pixels, 0.5"
    )
    temperature: float = flag(1.0, "--temperature", help="temperature of the relaxed Bernoulli samples")
    hard_samples: bool = flag(
        False, "--hard-samples", help="masks of 0 and 1 only (straight-through gradients)"
    )
    evaluation_interval: int = flag(
        300, "--evaluation-interval", help="iterations between judgements on held-out training pictures"
    )
    best_by: str = flag(
        "agreement", "--best-by", choices=("agreement", "kl"),
        help="what decides on held-out pictures which one is kept; agreement as published, kl (lower is better) tells "
        "more of them apart",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(
            self.predictor is not None,
            "--predictor is missing: give what `python -m explainers train-predictor` wrote",
        )
        check(Path(str(self.predictor)).is_file(), f"--predictor {self.predictor}: there is no such file")
        check(self.temperature > 0, f"--temperature {self.temperature} must be above 0")
        check(self.evaluation_interval >= 1, f"--evaluation-interval {self.evaluation_interval}: at least 1")
        check(self.num_scales is None or self.num_scales >= 2, f"--num-scales {self.num_scales}: at least 2")
        for name in ("lamda", "smoothness_loss_coeff"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"--{name.replace('_', '-')} {value} is negative")
        check(self.alpha is None or self.alpha > 0, f"--alpha {self.alpha} must be above 0")

    def weights(self, image_size: int) -> SelectorWeights:
        """Constants of the loss for pictures of a size."""
        area, smoothness, exponent = LOSS_PRESETS[preset_name(image_size)]
        return SelectorWeights(
            area=area if self.lamda is None else self.lamda,
            smoothness=smoothness if self.smoothness_loss_coeff is None else self.smoothness_loss_coeff,
            exponent=exponent if self.alpha is None else self.alpha,
            temperature=self.temperature,
            hard=self.hard_samples,
        )
