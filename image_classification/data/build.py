"""From configuration to loaders: choice of the backend, geometry and augmentation, and the three splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from image_classification.config import ConfigError, check, flag
from image_classification.data import dali
from image_classification.data.augment import POLICY_NAMES, make_policy
from image_classification.data.bad_samples import POLICIES
from image_classification.data.calibration import split_calibration
from image_classification.data.dali import DaliLoader
from image_classification.data.dataset import IMAGENET_PRESET, Dataset, Preset
from image_classification.data.device_stage import DeviceStage
from image_classification.data.folder import FolderLoader
from image_classification.data.loader import Loader, PlannedLoader
from image_classification.data.manifest import Manifest
from image_classification.data.mixup import Mixup
from image_classification.data.plan import (
    CentreCrop,
    Geometry,
    PadCrop,
    Planner,
    RandomResizedCrop,
    WholePicture,
)
from image_classification.data.resident import ResidentLoader
from image_classification.data.synthetic import NUM_TRAIN_SAMPLES, NUM_VAL_SAMPLES, SyntheticLoader
from image_classification.data.workers import num_cores

BACKENDS = ("auto", "dali-gpu", "dali-cpu", "pytorch", "resident", "synthetic", "syntetic")
AUGMENTATIONS = ("default", "imagenet", "cifar", "none")


@dataclass(kw_only=True)
class ReadConfig:
    """What is loaded, and how: all that jobs need which look at pictures and train nothing."""

    data: str = flag(
        "shapes", "data", nargs="?",
        help="directory (ImageNet, CIFAR or VOC layout), archive, or the generated `shapes`, `shapes-multi`",
    )  # fmt: skip
    data_backend: str = flag(
        "auto", "--data-backend", choices=BACKENDS,
        help="who decodes and cuts; auto: DALI where it is installed (dali-gpu with CUDA, else dali-cpu), or pytorch",
    )  # fmt: skip
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
        help="pictures per process and step; default: the data set's (256, CIFAR 128, shapes 64)",
    )
    image_size: int | None = flag(
        None, "--image-size", parse=int, help="side of the network's input in pixels; default: the data set's"
    )
    resize: int | None = flag(
        None, "--resize", parse=int,
        help="short side of evaluation pictures before the centre crop, in pixels; default: the data set's proportion",
    )  # fmt: skip
    on_bad_sample: str = flag(
        "stop", "--on-bad-sample", choices=POLICIES, help="what to do about a picture that cannot be read"
    )
    prefetch: int = flag(2, "--prefetch", help="batches read ahead (per worker with pytorch)")
    mean: tuple[float, ...] | None = flag(
        None,
        "--mean",
        nargs=3,
        parse=float,
        help="normalisation, of values in 0 … 1; default: the data set's",
    )
    std: tuple[float, ...] | None = flag(
        None, "--std", nargs=3, parse=float, help="normalisation, of values in 0 … 1; default: the data set's"
    )

    def __post_init__(self) -> None:
        check(
            self.batch_size is None or self.batch_size >= 1,
            f"--batch-size {self.batch_size} must be at least 1",
        )
        check(self.workers >= 0, f"--workers {self.workers} must not be negative")
        check(self.prefetch >= 1, f"--prefetch {self.prefetch} must be at least 1")
        for name in ("image_size", "resize"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")
        for name in ("mean", "std"):
            value = getattr(self, name)
            check(value is None or len(value) == 3, f"--{name} takes three numbers, not {value}")
        check(self.std is None or min(self.std) > 0, f"--std {self.std} must be positive")

    def resolved_preset(self, preset: Preset) -> Preset:
        """The data set's settings with the flags' on top.

        Raises:
            ConfigError: `--resize` below `--image-size`.
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
            batch_size=self.batch_size or preset.batch_size,
        )


@dataclass(kw_only=True)
class DataConfig(ReadConfig):
    """What is loaded, and how."""

    augmentation: str = flag(
        "default", "--augmentation", choices=AUGMENTATIONS,
        help="geometry of training: imagenet (random-resized crop, flip), cifar (pad 4, crop, flip) or none (as in "
        "evaluation); default: the data set's",
    )  # fmt: skip
    auto_augment: str = flag(
        "none", "--auto-augment", choices=POLICY_NAMES, help="automatic augmentation policy"
    )
    mixup: float = flag(0.0, "--mixup", help="α of mixup; 0 is off")
    cutmix: float = flag(
        0.0, "--cutmix", help="α of CutMix; 0 is off; with --mixup each pair takes one of the two"
    )
    calibration_size: int = flag(
        0,
        "--calibration-size",
        help="training pictures kept aside, stratified by class, for scoring; never trained on",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.mixup >= 0, f"--mixup {self.mixup} must not be negative; 0 is off")
        check(self.cutmix >= 0, f"--cutmix {self.cutmix} must not be negative; 0 is off")
        check(self.calibration_size >= 0, f"--calibration-size {self.calibration_size} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a loader's batches go.

    Attributes:
        device, memory_format: Of the images.
        seed: Of order, crops, augmentation and mixing.
        rank, world_size: This process among all.
    """

    device: torch.device
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    memory_format: torch.memory_format = torch.contiguous_format

    def stage(self, preset: Preset) -> DeviceStage:
        """The device stage for a kind of picture."""
        return DeviceStage(preset.mean, preset.std, device=self.device, memory_format=self.memory_format)


@dataclass
class Loaders:
    """The loaders of a job on one rank.

    Attributes:
        train, val: Of the two splits; the training loader has no sample of the calibration split.
        calibration: Evaluation pictures from the training split, classes mixed; None unless asked for.
        backend: The one that was chosen.
        preset: Image size, normalisation and so on that were used.
    """

    train: Loader
    val: Loader
    calibration: Loader | None
    backend: str
    preset: Preset

    def close(self) -> None:
        """Close all of them."""
        for loader in (self.train, self.val, self.calibration):
            if loader is not None:
                loader.close()


def choose_backend(name: str, device: torch.device) -> str:
    """Resolve "auto" and the older spelling of "synthetic"."""
    if name == "syntetic":
        return "synthetic"
    if name != "auto":
        return name
    if not dali.is_available():
        return "pytorch"
    return "dali-gpu" if device.type == "cuda" else "dali-cpu"


def training_geometry(augmentation: str, preset: Preset) -> Geometry:
    """The geometry that `--augmentation` means for a data set."""
    size = (preset.image_size, preset.image_size)
    if augmentation == "default":
        augmentation = preset.augmentation
    if augmentation == "imagenet":
        return RandomResizedCrop(size, scale=preset.crop_scale)
    if augmentation == "cifar":
        return PadCrop(size)
    return evaluation_geometry(preset)


def evaluation_geometry(preset: Preset) -> Geometry:
    """Resize and centre crop."""
    return CentreCrop((preset.image_size, preset.image_size), preset.resize)


def make_loader(
    backend: str,
    manifest: Manifest,
    planner: Planner,
    stage: DeviceStage,
    config: ReadConfig,
    **options: Any,
) -> PlannedLoader:
    """A loader of real pictures.

    Args:
        backend: "dali-gpu", "dali-cpu", "pytorch" or "resident".
        manifest, planner, stage: See `PlannedLoader`.
        config: For workers, prefetch and the policy for bad samples.
        options: `mixup`, `with_boxes`, `with_masks` of `PlannedLoader`.
    """
    classes: dict[str, Callable[..., PlannedLoader]] = {
        "dali-gpu": partial(DaliLoader, gpu=True),
        "dali-cpu": DaliLoader,
        "pytorch": FolderLoader,
        "resident": ResidentLoader,
    }
    if backend not in classes:
        raise ConfigError(
            f"--data-backend {backend} does not load pictures: choose one of {', '.join(classes)}"
        )
    return classes[backend](
        manifest,
        planner,
        stage,
        on_bad_sample=config.on_bad_sample,
        prefetch=config.prefetch,
        workers=config.workers,
        **options,
    )


def evaluation_loader(
    manifest: Manifest,
    preset: Preset,
    config: ReadConfig,
    place: Placement,
    *,
    shuffle: bool = False,
    whole: bool = False,
    with_boxes: bool = False,
    with_masks: bool = False,
) -> PlannedLoader:
    """A loader of evaluation pictures: validation, calibration, explanation.

    Args:
        manifest: The split; each sample comes once over all ranks.
        preset: With the flags applied, see `DataConfig.resolved_preset`.
        config: Backend, batch size and the like.
        place: Device and rank.
        shuffle: Order by (seed, epoch) instead of by id.
        whole: Stretch the whole picture to the input size instead of the centre crop.
        with_boxes, with_masks: Whether batches carry them.
    """
    size = (preset.image_size, preset.image_size)
    geometry: Geometry = WholePicture(size) if whole else evaluation_geometry(preset)
    planner = _planner(manifest, geometry, preset, place, shuffle=shuffle)
    backend = choose_backend(config.data_backend, place.device)
    return make_loader(
        backend, manifest, planner, place.stage(preset), config, with_boxes=with_boxes, with_masks=with_masks
    )


def training_loader(
    manifest: Manifest, preset: Preset, config: DataConfig, place: Placement
) -> PlannedLoader:
    """The loader of the training split, augmented as configured. Arguments as `evaluation_loader`."""
    # the pairs of AutoAugment are those learned on the data set's kind of picture
    learned_on = "cifar10" if preset.augmentation == "cifar" else "imagenet"
    size = (preset.image_size, preset.image_size)
    policy = make_policy(config.auto_augment, size, learned_on=learned_on)
    geometry = training_geometry(config.augmentation, preset)
    planner = _planner(manifest, geometry, preset, place, training=True, policy=policy)
    mixup = None
    if config.mixup or config.cutmix:
        mixup = Mixup(config.mixup, config.cutmix, num_classes=len(manifest.class_names), seed=place.seed)
    backend = choose_backend(config.data_backend, place.device)
    return make_loader(backend, manifest, planner, place.stage(preset), config, mixup=mixup)


def _planner(
    manifest: Manifest, geometry: Geometry, preset: Preset, place: Placement, **options: Any
) -> Planner:
    return Planner(
        manifest.heights,
        manifest.widths,
        geometry,
        batch_size=preset.batch_size,
        seed=place.seed,
        rank=place.rank,
        world_size=place.world_size,
        **options,
    )


def build_loaders(
    config: DataConfig,
    dataset: Dataset | None,
    *,
    device: torch.device,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    memory_format: torch.memory_format = torch.contiguous_format,
    num_classes: int = 1000,
) -> Loaders:
    """The loaders of a training job on one rank.

    Args:
        config: The flags.
        dataset: What to load; None is allowed for synthetic data.
        device, memory_format: Of the images.
        seed: Of order, crops, augmentation, mixing and the calibration split.
        rank, world_size: This process among all.
        num_classes: For synthetic data without a data set.

    Raises:
        ConfigError: A backend that cannot work here, or flags that do not go together.
        ValueError: A training split smaller than a global batch.
    """
    place = Placement(device=device, seed=seed, rank=rank, world_size=world_size, memory_format=memory_format)
    backend = choose_backend(config.data_backend, device)
    if backend == "synthetic":
        return _synthetic(config, dataset, place, num_classes)
    if dataset is None:
        raise ConfigError(f"--data-backend {backend} needs a data set; without one choose synthetic")
    kept_aside: Manifest | None = None
    if config.calibration_size:
        dataset, kept_aside = split_calibration(dataset, config.calibration_size, seed)
    preset = config.resolved_preset(dataset.preset)
    calibration = None
    if kept_aside is not None:
        calibration = evaluation_loader(kept_aside, preset, config, place)
    return Loaders(
        train=training_loader(dataset.train, preset, config, place),
        val=evaluation_loader(dataset.val, preset, config, place),
        calibration=calibration,
        backend=backend,
        preset=preset,
    )


def _synthetic(config: DataConfig, dataset: Dataset | None, place: Placement, num_classes: int) -> Loaders:
    """Loaders of noise, as long as the data set's where there is one."""
    preset = config.resolved_preset(IMAGENET_PRESET if dataset is None else dataset.preset)
    num_train, num_val, multi_label = NUM_TRAIN_SAMPLES, NUM_VAL_SAMPLES, False
    if dataset is not None:
        num_train, num_val, multi_label = len(dataset.train), len(dataset.val), dataset.multi_label
    make = partial(
        SyntheticLoader,
        num_classes=num_classes if dataset is None else dataset.num_classes,
        size=(preset.image_size, preset.image_size),
        batch_size=preset.batch_size,
        device=place.device,
        memory_format=place.memory_format,
        multi_label=multi_label,
        seed=place.seed,
        rank=place.rank,
        world_size=place.world_size,
    )
    calibration = make(num_samples=config.calibration_size) if config.calibration_size else None
    train = make(num_samples=num_train - config.calibration_size, training=True)
    return Loaders(train, make(num_samples=num_val), calibration, "synthetic", preset)


def _triple(values: tuple[float, ...]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third
