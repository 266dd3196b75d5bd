"""The images of a training job: their sizes, the number set aside, and the loaders of this rank."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TypeVar

from image_classification.config import ConfigError
from image_classification.data.backends import choose_backend
from image_classification.data.build import Loaders, build_loaders
from image_classification.data.data_config import DataConfig
from image_classification.data.dataset import IMAGENET_NUM_TRAIN, IMAGENET_PRESET, SMALL_SIDE, Dataset
from image_classification.data.layouts import open_dataset
from image_classification.distributed import Distributed
from image_classification.job_config import CommonConfig
from image_classification.models import ModelConfig, saved_input
from image_classification.models.registry import IMAGENET_CLASSES
from image_classification.network_input import NetworkInput
from image_classification.plain_data import Plain
from image_classification.precision import Precision
from image_classification.shared_dataset import open_together
from image_classification.weights_origin import WeightsOrigin

D = TypeVar("D", bound=CommonConfig)


def notes_of_images(loaders: Loaders, config: DataConfig) -> list[str]:
    """Return notes on the choices made about the images, for the log."""
    preset = loaders.preset
    notes = []
    small = preset.augmentation == "cifar" and preset.image_size <= SMALL_SIDE
    if small and config.augmentation == "default":
        notes.append(
            f"small images: {preset.image_size} × {preset.image_size} pixels, shifted and mirrored while training "
            "(--image-size, --augmentation)"
        )
    if loaders.calibration is not None:
        notes.append(f"{loaders.calibration.num_samples} training images are kept aside for calibration")
    return notes


def given_input(model: ModelConfig, resumed: Plain | None, teacher: str | None) -> NetworkInput | None:
    """Return the input of the network that a job starts from, or else of its teacher."""
    if resumed is not None and isinstance(resumed["structure"], dict) and "input" in resumed["structure"]:
        return NetworkInput.from_plain(resumed["structure"]["input"])
    # A new head is for other classes, and their images differ too.
    started_from = None if model.new_head else model.pretrained_weights
    for path in (started_from, teacher):
        if path is not None and (images := saved_input(path)) is not None:
            return images
    return None


def setting_aside(configs: D, num_images: int) -> D:
    """Return the configuration with the number of calibration images filled in."""
    return dataclasses.replace(configs, data=dataclasses.replace(configs.data, calibration_size=num_images))


def open_loaders(
    configs: CommonConfig,
    distributed: Distributed,
    precision: Precision,
    calibration_batches: int = 0,
    images: NetworkInput | None = None,
    origin: WeightsOrigin | None = None,
) -> Loaders:
    """Open the data set and build this rank's loaders.

    Args:
        configs, distributed, precision, calibration_batches: See `prepare`.
        images: Input of a given network, which replaces the data set's preset.
        origin: Origin of the weights, for the names of the classes.
    """
    config = configs.data
    dataset = None
    if choose_backend(config.data_backend, distributed.device).needs_dataset:

        def open_it() -> Dataset:
            with naming_the_flag("DATA"):
                return open_dataset(
                    config.data,
                    multi_label=configs.loss.multi_label,
                    progress=distributed.is_main,
                    rescan=config.rescan,
                    difficult=config.difficult,
                )

        dataset = open_together(open_it, distributed)
        dataset = dataclasses.replace(dataset, preset=dataset.preset.for_network(images))
    if dataset is not None and origin is not None:
        with naming_the_flag("DATA"):
            dataset = origin.name_classes(dataset)
    if calibration_batches and not config.calibration_size:
        num_batches = calibration_batches * distributed.world_size
        config = dataclasses.replace(config, calibration_size=_set_aside_for(num_batches, config, dataset))
    with naming_the_flag("DATA"):
        return build_loaders(
            config,
            dataset,
            seed=configs.train.seed,
            rank=distributed.rank,
            world_size=distributed.world_size,
            device=distributed.device,
            memory_format=precision.memory_format,
            num_classes=configs.model.num_classes or IMAGENET_CLASSES,
            training=not configs.train.evaluate,
        )


def _set_aside_for(num_batches: int, config: DataConfig, dataset: Dataset | None) -> int:
    """Return the number of calibration images: at most a twentieth of the training set, at least one per class."""
    preset = IMAGENET_PRESET if dataset is None else dataset.preset
    size = num_batches * config.resolved_preset(preset).batch_size
    if dataset is None:
        return min(size, IMAGENET_NUM_TRAIN // 20)
    return max(min(size, len(dataset.train) // 20), dataset.num_classes)


@contextlib.contextmanager
def naming_the_flag(name: str) -> Iterator[None]:
    """Turn a ValueError about given data into a `ConfigError` that names the argument."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
