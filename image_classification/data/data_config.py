"""Flags of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from image_classification.channel_statistics import Triple
from image_classification.config import check, flag
from image_classification.data.augment import PolicyName
from image_classification.data.backends import backend_names
from image_classification.data.bad_samples import BadSamplePolicy
from image_classification.data.dataset import Augmentation, Preset
from image_classification.data.loader import LoaderOptions
from image_classification.data.workers import num_cores
from image_classification.network_input import EvaluationGeometry, check_normalisation


@dataclass(kw_only=True)
class ReadConfig:
    """What is loaded, and how: all that jobs need which look at images and train nothing."""

    data: str = flag(
        "shapes",
        "data",
        nargs="?",
        help="directory (ImageNet, CIFAR or VOC layout), archive, or the generated `shapes`, `shapes-multi`",
    )
    data_backend: str = flag(
        "auto",
        "--data-backend",
        choices=backend_names,
        help="what decodes and crops; auto: DALI where it is installed (dali-gpu with CUDA, else dali-cpu), or pytorch",
    )
    rescan: bool = flag(
        False,
        "--rescan",
        help="look at every image file for changes; otherwise folders' times say where to look, which misses a file "
        "that was overwritten in place",
    )
    workers: int = flag(
        min(4, num_cores()),
        "--workers",
        "-j",
        help="processes (pytorch) or threads (DALI, resident) that decode; default: the cores, at most 4",
    )
    batch_size: int | None = flag(
        None,
        "--batch-size",
        "-b",
        help="images per process and step; default: the data set's (256, CIFAR 128, shapes 64)",
    )
    image_size: int | None = flag(
        None,
        "--image-size",
        parse=int,
        help="side of the network's input in pixels; default: the given network's, else the data set's",
    )
    resize: int | None = flag(
        None,
        "--resize",
        parse=int,
        help="short side of evaluation images before the centre crop, in pixels; default: the data set's proportion",
    )
    geometry: EvaluationGeometry | None = flag(
        None,
        "--geometry",
        help="images that are not augmented: crop (short side resized, centre cut out) or whole (the image stretched to"
        " the input's size, as published for VOC); default: the given network's, else crop",
    )
    difficult: bool = flag(
        False,
        "--difficult",
        help="VOC: objects that are marked as difficult count as others do, as published for attribution preservation",
    )
    on_bad_sample: BadSamplePolicy = flag(
        LoaderOptions.on_bad_sample, "--on-bad-sample", help="what to do about an image that cannot be read"
    )
    prefetch: int = flag(
        LoaderOptions.prefetch, "--prefetch", help="batches read ahead (per worker with pytorch)"
    )
    mean: tuple[float, ...] | None = flag(
        None,
        "--mean",
        nargs=3,
        parse=float,
        help="normalisation, of values in 0 … 1; default: the given network's, else the data set's",
    )
    std: tuple[float, ...] | None = flag(None, "--std", nargs=3, parse=float, help="as --mean")

    def __post_init__(self) -> None:
        check(
            self.batch_size is None or self.batch_size >= 1,
            f"--batch-size {self.batch_size} must be at least 1",
        )
        most = max(64, 8 * num_cores())
        check(
            0 <= self.workers <= most,
            f"--workers {self.workers} is not between 0 and {most}, which is more than this machine can use",
        )
        check(self.prefetch >= 1, f"--prefetch {self.prefetch} must be at least 1")
        for name in ("image_size", "resize"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")
        check_normalisation(self.mean, self.std)

    def resolved_preset(self, preset: Preset) -> Preset:
        """Return the data set's settings, overridden by the flags.

        Raises:
            ConfigError: `--resize` is below `--image-size`.
        """
        size = self.image_size or preset.image_size
        resize = self.resize or round(size * preset.resize / preset.image_size)
        check(resize >= size, f"--resize {resize} is smaller than --image-size {size}: raise --resize")
        return replace(
            preset,
            image_size=size,
            resize=resize,
            mean=_triple(self.mean or preset.mean),
            std=_triple(self.std or preset.std),
            geometry=self.geometry or preset.geometry,
            batch_size=self.batch_size or preset.batch_size,
        )


@dataclass(kw_only=True)
class DataConfig(ReadConfig):
    """What is loaded, and how."""

    augmentation: Augmentation = flag(
        "default",
        "--augmentation",
        help="geometry of training: imagenet (random-resized crop, flip), cifar (pad 4, crop, flip) or none (as in "
        "evaluation); default: the data set's",
    )
    auto_augment: PolicyName = flag("none", "--auto-augment", help="automatic augmentation policy")
    mixup: float = flag(0.0, "--mixup", help="α of mixup; 0 is off")
    cutmix: float = flag(
        0.0, "--cutmix", help="α of CutMix; 0 is off; with --mixup each pair takes one of the two"
    )
    calibration_size: int = flag(
        0,
        "--calibration-size",
        help="training images kept aside, stratified by class, for scoring; never trained on",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.mixup >= 0, f"--mixup {self.mixup} must not be negative; 0 is off")
        check(self.cutmix >= 0, f"--cutmix {self.cutmix} must not be negative; 0 is off")
        check(self.calibration_size >= 0, f"--calibration-size {self.calibration_size} must not be negative")


def _triple(values: tuple[float, ...]) -> Triple:
    first, second, third = values
    return first, second, third
