"""From configuration to loaders: choice of the backend, geometry and augmentation, and the three splits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch

from image_classification.channel_statistics import Triple
from image_classification.config import SettingError, check, flag
from image_classification.data.augment import Policy, PolicyName, make_policy
from image_classification.data.backends import Backend, backend_names, choose_backend, find_backend
from image_classification.data.bad_samples import BadSamplePolicy
from image_classification.data.calibration import split_calibration
from image_classification.data.dataset import (
    IMAGENET_NUM_TRAIN,
    IMAGENET_NUM_VAL,
    IMAGENET_PRESET,
    Augmentation,
    Dataset,
    Preset,
)
from image_classification.data.device_stage import DeviceStage
from image_classification.data.loader import Loader, LoaderOptions, PlannedLoader
from image_classification.data.manifest import Manifest
from image_classification.data.mixup import Mixup
from image_classification.data.plan import (
    CentreCrop,
    Geometry,
    PadCrop,
    Planner,
    RandomResizedCrop,
    WholeImage,
)
from image_classification.data.workers import num_cores
from image_classification.models.registry import IMAGENET_CLASSES
from image_classification.network_input import EvaluationGeometry, check_normalisation

logger = logging.getLogger(__name__)
_STEPS_OF_AN_EPOCH = 20  # that a default batch leaves at least, down to batches of `_LEAST_BATCH`
_LEAST_BATCH = 16


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
        """The device stage for a kind of image."""
        return DeviceStage(preset.mean, preset.std, device=self.device, memory_format=self.memory_format)


@dataclass
class Loaders:
    """The loaders of a job on one rank.

    Attributes:
        train, val: Of the two splits; the training loader has no sample of the calibration split.
        calibration: Evaluation images from the training split, classes mixed; None unless asked for.
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


def training_geometry(augmentation: Augmentation, preset: Preset) -> Geometry:
    """The geometry that an augmentation means for a data set."""
    size = (preset.image_size, preset.image_size)
    if augmentation == "default":
        augmentation = preset.augmentation
    if augmentation == "imagenet":
        return RandomResizedCrop(size, scale=preset.crop_scale)
    if augmentation == "cifar":
        return PadCrop(size)
    return evaluation_geometry(preset)


def evaluation_geometry(preset: Preset) -> Geometry:
    """Resize and centre crop, or the whole image."""
    if preset.geometry == "whole":
        return WholeImage((preset.image_size, preset.image_size))
    return CentreCrop((preset.image_size, preset.image_size), preset.resize)


def make_loader(
    backend: Backend | str,
    manifest: Manifest,
    planner: Planner,
    stage: DeviceStage,
    config: ReadConfig,
    *,
    mixup: Mixup | None = None,
    with_boxes: bool = False,
    with_masks: bool = False,
) -> PlannedLoader:
    """A loader of real images.

    Args:
        backend: From `choose_backend`, or the name of one.
        manifest, planner, stage: See `PlannedLoader`.
        config: For workers, prefetch and the policy for bad samples.
        mixup, with_boxes, with_masks: See `LoaderOptions`.

    Raises:
        SettingError: The backend does not exist, does not work on the stage's device, or reads no images.
    """
    if isinstance(backend, str):
        backend = find_backend(backend)
    problem = backend.problem(stage.device)
    if not backend.needs_dataset:
        problem = "it loads no images: choose another backend"
    if problem is not None:
        raise SettingError("data_backend", backend.name, problem)
    options = LoaderOptions(
        on_bad_sample=config.on_bad_sample,
        mixup=mixup,
        with_boxes=with_boxes,
        with_masks=with_masks,
        prefetch=config.prefetch,
        workers=config.workers,
    )
    loader = backend.make(manifest, planner, stage, options)
    assert isinstance(loader, PlannedLoader), f"backend {backend.name} made a {type(loader).__name__}"
    return loader


def evaluation_loader(
    manifest: Manifest,
    preset: Preset,
    config: ReadConfig,
    place: Placement,
    *,
    with_boxes: bool = False,
    with_masks: bool = False,
) -> PlannedLoader:
    """A loader of evaluation images: validation, calibration, explanation.

    Args:
        manifest: The split; each sample comes once over all ranks.
        preset: With the flags applied, see `DataConfig.resolved_preset`.
        config: Backend, batch size and the like.
        place: Device and rank.
        with_boxes, with_masks: Whether batches carry them.
    """
    planner = _planner(manifest, evaluation_geometry(preset), preset, place)
    backend = choose_backend(config.data_backend, place.device)
    return make_loader(
        backend, manifest, planner, place.stage(preset), config, with_boxes=with_boxes, with_masks=with_masks
    )


def training_loader(
    manifest: Manifest, preset: Preset, config: DataConfig, place: Placement
) -> PlannedLoader:
    """The loader of the training split, augmented as configured. Arguments as `evaluation_loader`."""
    # the pairs of AutoAugment are those learned on the data set's kind of image
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
    manifest: Manifest,
    geometry: Geometry,
    preset: Preset,
    place: Placement,
    *,
    training: bool = False,
    policy: Policy | None = None,
) -> Planner:
    return Planner(
        manifest.heights,
        manifest.widths,
        geometry,
        batch_size=preset.batch_size,
        seed=place.seed,
        rank=place.rank,
        world_size=place.world_size,
        training=training,
        policy=policy,
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
    num_classes: int = IMAGENET_CLASSES,
    training: bool = True,
) -> Loaders:
    """The loaders of a training job on one rank.

    Args:
        config: The flags.
        dataset: What to load; None is allowed for synthetic data.
        device, memory_format: Of the images.
        seed: Of order, crops, augmentation, mixing and the calibration split.
        rank, world_size: This process among all.
        num_classes: For synthetic data without a data set.
        training: Off where nothing is trained: the training split is then read like the others, however small it is.

    Raises:
        SettingError: A backend that cannot work here, settings that do not go together, or a training split smaller
            than a global batch.
    """
    place = Placement(device=device, seed=seed, rank=rank, world_size=world_size, memory_format=memory_format)
    backend = choose_backend(config.data_backend, device)
    if not backend.needs_dataset:
        return _made_up(backend, config, dataset, place, num_classes)
    if dataset is None:
        raise SettingError("data_backend", backend.name, "needs a data set; without one choose synthetic")
    kept_aside: Manifest | None = None
    if config.calibration_size:
        dataset, kept_aside = split_calibration(dataset, config.calibration_size, seed)
    preset = config.resolved_preset(dataset.preset)
    if training and config.batch_size is None:
        preset = _batch_that_fits(preset, len(dataset.train), place)
    calibration = None
    if kept_aside is not None:
        calibration = evaluation_loader(kept_aside, preset, config, place)
    return Loaders(
        train=(training_loader if training else evaluation_loader)(dataset.train, preset, config, place),
        val=evaluation_loader(dataset.val, preset, config, place),
        calibration=calibration,
        backend=backend.name,
        preset=preset,
    )


def _batch_that_fits(preset: Preset, num_images: int, place: Placement) -> Preset:
    """The preset, with the default batch lowered for a small training set: to a power of two, and at most all of it."""
    most = num_images // place.world_size
    if most < 1:
        return preset
    for_some_steps = max(_LEAST_BATCH, 1 << max(most // _STEPS_OF_AN_EPOCH, 1).bit_length() - 1)
    size = min(preset.batch_size, for_some_steps, most)
    if size < preset.batch_size and place.rank == 0:
        logger.warning(
            "the training set has %d images: batches of %d per process in place of the default %d (--batch-size)",
            num_images,
            size,
            preset.batch_size,
        )
    return replace(preset, batch_size=size)


def _made_up(
    backend: Backend, config: DataConfig, dataset: Dataset | None, place: Placement, num_classes: int
) -> Loaders:
    """Loaders that read no images, as long as those of the data set where there is one."""
    num_train, num_val = IMAGENET_NUM_TRAIN, IMAGENET_NUM_VAL
    preset = IMAGENET_PRESET
    multi_label = False
    if dataset is not None:
        num_train, num_val = len(dataset.train), len(dataset.val)
        preset, multi_label = dataset.preset, dataset.multi_label
        num_classes = dataset.num_classes
    preset = config.resolved_preset(preset)
    make = partial(
        backend.make,
        num_classes=num_classes,
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
    return Loaders(train, make(num_samples=num_val), calibration, backend.name, preset)


def _triple(values: tuple[float, ...]) -> Triple:
    first, second, third = values
    return first, second, third
