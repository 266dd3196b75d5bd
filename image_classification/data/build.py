"""Construction of loaders from the configuration: backend, geometry and augmentation, and the three splits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch

from image_classification.config import SettingError
from image_classification.data.augment import Policy, make_policy
from image_classification.data.backends import Backend, choose_backend, find_backend
from image_classification.data.calibration import split_calibration
from image_classification.data.data_config import DataConfig, ReadConfig
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
from image_classification.models.registry import IMAGENET_CLASSES

logger = logging.getLogger(__name__)
# Smallest number of steps per epoch for the default batch size, down to `_LEAST_BATCH`.
_STEPS_OF_AN_EPOCH = 20
_LEAST_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Placement of a loader: device, seed and rank.

    Attributes:
        device, memory_format: Device and memory format of the images.
        seed: Seed of order, crops, augmentation and mixing.
        rank, world_size: Rank of this process and number of processes.
    """

    device: torch.device
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    memory_format: torch.memory_format = torch.contiguous_format

    def stage(self, preset: Preset) -> DeviceStage:
        """Create the device stage for a kind of image."""
        return DeviceStage(preset.mean, preset.std, device=self.device, memory_format=self.memory_format)


@dataclass
class Loaders:
    """The loaders of a job on one rank.

    Attributes:
        train, val: Loaders of the two splits; the training loader has no sample of the calibration split.
        calibration: Evaluation images from the training split, classes mixed; None unless requested.
        backend: The chosen backend.
        preset: Image size, normalisation and other settings in use.
    """

    train: Loader
    val: Loader
    calibration: Loader | None
    backend: str
    preset: Preset

    def close(self) -> None:
        """Close all loaders."""
        for loader in (self.train, self.val, self.calibration):
            if loader is not None:
                loader.close()


def training_geometry(augmentation: Augmentation, preset: Preset) -> Geometry:
    """Return the geometry of an augmentation for a data set."""
    size = (preset.image_size, preset.image_size)
    if augmentation == "default":
        augmentation = preset.augmentation
    if augmentation == "imagenet":
        return RandomResizedCrop(size, scale=preset.crop_scale)
    if augmentation == "cifar":
        return PadCrop(size)
    return evaluation_geometry(preset)


def evaluation_geometry(preset: Preset) -> Geometry:
    """Return the geometry of evaluation: resize and centre crop, or the whole image."""
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
    """Create a loader of real images.

    Args:
        backend: A backend from `choose_backend`, or its name.
        manifest, planner, stage: See `PlannedLoader`.
        config: Settings of workers, prefetch and the policy for bad samples.
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
    """Create a loader of evaluation images, for validation, calibration or explanation.

    Args:
        manifest: The split; each sample occurs once over all ranks.
        preset: Preset with the flags applied; see `DataConfig.resolved_preset`.
        config: Backend, batch size and the like.
        place: Device and rank.
        with_boxes, with_masks: Whether batches include them.
    """
    planner = _planner(manifest, evaluation_geometry(preset), preset, place)
    backend = choose_backend(config.data_backend, place.device)
    return make_loader(
        backend, manifest, planner, place.stage(preset), config, with_boxes=with_boxes, with_masks=with_masks
    )


def training_loader(
    manifest: Manifest, preset: Preset, config: DataConfig, place: Placement
) -> PlannedLoader:
    """Create the loader of the training split, augmented as configured. Arguments as for `evaluation_loader`."""
    # Use the AutoAugment pairs learned on the data set's kind of image.
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
    """Build the loaders of a training job on one rank.

    Args:
        config: The flags.
        dataset: The data set; may be None for synthetic data.
        device, memory_format: Device and memory format of the images.
        seed: Seed of order, crops, augmentation, mixing and the calibration split.
        rank, world_size: Rank of this process and number of processes.
        num_classes: Number of classes for synthetic data without a data set.
        training: False if nothing is trained: the training split is then read like the others, however small it is.

    Raises:
        SettingError: The backend cannot work here, settings cannot be combined, or the training split is smaller than a
            global batch.
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
    """Lower the preset's default batch size for a small training set: a power of two, at most the whole set."""
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
    """Build loaders that read no images, with the data set's lengths if there is one."""
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
