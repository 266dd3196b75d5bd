"""Code shared by the verbs of `python -m explainers`: flags, the data set, the networks, the output folder."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from explainers.attribution.method import Method, Prepared
from image_classification.config import ConfigError, check, flag, section
from image_classification.data.build import Placement, evaluation_loader
from image_classification.data.data_config import ReadConfig
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.layouts import open_dataset
from image_classification.data.layouts.annotations import read_imagenet_boxes
from image_classification.data.loader import PlannedLoader
from image_classification.data.manifest import Manifest
from image_classification.distributed import Distributed
from image_classification.joining import DistributedConfig
from image_classification.models import (
    class_names_of,
    identity_of,
    input_of,
    main_and_auxiliary_logits,
    model_for_weights,
    remember_input,
)
from image_classification.network_input import NetworkInput
from image_classification.shared_dataset import open_together

Split = Literal["val", "train"]


@dataclasses.dataclass(kw_only=True)
class WeightsConfig:
    """How checkpoints are read."""

    arch: str | None = flag(
        None,
        "--arch",
        "-a",
        metavar="NAME",
        help="architecture of the checkpoints; not needed for LucidPrune checkpoints",
    )
    ema: bool | None = flag(
        None,
        "--ema",
        help="take the averaged weights of the checkpoints, or with --no- the last ones; default: the averaged ones "
        "where there are any",
    )


@dataclasses.dataclass(kw_only=True)
class NetworkConfig(WeightsConfig):
    """Which networks are explained."""

    checkpoint: list[str] = flag(
        [],
        "--checkpoint",
        "--path",
        metavar="FILE",
        repeatable=True,
        help="weights of a network: a LucidPrune checkpoint (pruned ones too), a plain state dict, torchvision's; "
        "may be given several times",
    )

    def __post_init__(self) -> None:
        check(bool(self.checkpoint), "--checkpoint is missing: give the weights of the network to explain")
        for path in self.checkpoint:
            check(Path(path).is_file(), f"--checkpoint {path}: there is no such file")


@dataclasses.dataclass(kw_only=True)
class ImageConfig:
    """Which images, and how they are cut."""

    split: Split = flag("val", "--split", help="split whose images are explained")
    num_images: int | None = flag(
        None,
        "--num-images",
        "--num-pictures",
        "-n",
        parse=int,
        help="number of images to explain, the same random ones every time; default: all",
    )
    pot: float | None = flag(
        None,
        "--pot",
        parse=float,
        metavar="SHARE",
        help="in place of --num-images: this share of the images, above 0 and at most 1",
    )
    annotation_path: str | None = flag(
        None,
        "--annotation-path",
        metavar="DIR",
        help="boxes of ImageNet images: a folder with one XML file per image",
    )

    def __post_init__(self) -> None:
        check(
            self.num_images is None or self.num_images >= 1,
            f"--num-images {self.num_images}: give at least 1, or leave it out for all",
        )
        check(self.pot is None or 0 < self.pot <= 1, f"--pot {self.pot}: a share lies in (0, 1]")
        check(
            self.pot is None or self.num_images is None,
            "--pot and --num-images exclude each other: leave one out",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesJob:
    """Configuration of every verb that reads images; verbs add their own sections."""

    images: ImageConfig = section(ImageConfig)
    data: ReadConfig = section(ReadConfig)
    distributed: DistributedConfig = section(DistributedConfig)


@dataclasses.dataclass(frozen=True)
class Network:
    """A loaded network.

    Attributes:
        name: Its name in tables.
        model: In evaluation mode, on the device, without gradients.
    """

    name: str
    model: nn.Module

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        return main_and_auxiliary_logits(self.model(images))[0]

    def prepare(self, methods: dict[str, Method], example: Tensor) -> dict[str, Prepared]:
        """Bind methods to the network."""
        return {name: method.prepare(self.model, example) for name, method in methods.items()}


def open_split(
    data: ReadConfig, images: ImageConfig, distributed: Distributed, *, masked: bool = False
) -> tuple[Dataset, Manifest]:
    """Open the data set and the part of it to explain, with boxes if `--annotation-path` gives them.

    Args:
        data, images, distributed: Flags and ranks.
        masked: Only use images with pixel masks, if only some images of the set have one: those listed by the set
            (VOC's `ImageSets/Segmentation`), else those that have a mask. The choice is printed.
    """

    def open_it() -> Dataset:
        dataset = open_dataset(
            data.data,
            progress=distributed.is_main,
            require_val=images.split == "val",
            rescan=data.rescan,
            difficult=data.difficult,
        )
        if not masked:
            return dataset
        manifest, which = masked_images(dataset, getattr(dataset, images.split), images.split)
        if which and distributed.is_main:
            print(f"{data.data}: {which}")
        if images.split == "val":
            return dataclasses.replace(dataset, val=manifest)
        return dataclasses.replace(dataset, train=manifest)

    dataset = open_together(open_it, distributed)
    manifest: Manifest = getattr(dataset, images.split)
    count = images.num_images
    if images.pot is not None:
        count = max(round(images.pot * len(manifest)), 1)
    if count is not None and count < len(manifest):
        # Taking every k-th image would favour some classes if classes alternate.
        chosen = np.random.default_rng(0).permutation(len(manifest))[:count]
        manifest = manifest.subset(np.sort(chosen))
    if images.annotation_path is not None:
        folder = Path(images.annotation_path)
        check(folder.is_dir(), f"--annotation-path {folder}: there is no such folder")
        boxes, classes = read_imagenet_boxes(folder, manifest.paths, manifest.class_names)
        targets = dataclasses.replace(manifest.targets, boxes=boxes, box_classes=classes)
        manifest = dataclasses.replace(manifest, targets=targets)
    return dataset, manifest


def masked_images(dataset: Dataset, manifest: Manifest, split: Split) -> tuple[Manifest, str]:
    """Return the images of a split that have masks, and a description of that choice; "" if no image was left out."""
    paths = manifest.targets.mask_paths
    if paths is None or all(paths) or not any(paths):
        return manifest, ""
    if dataset.open_masked is not None:
        listed, name = dataset.open_masked(split)
        return listed, f"the {len(listed):,} images of {name} are read, which have masks"
    chosen = manifest.subset([index for index, path in enumerate(paths) if path])
    return chosen, f"{len(chosen):,} of {len(manifest):,} images have masks; these are read"


def load_networks(
    config: NetworkConfig, data: ReadConfig, dataset: Dataset, device: torch.device
) -> list[Network]:
    """Load all networks and check them against the data set.

    Raises:
        ConfigError: A network has another number of classes.
        ModelError, WeightsError: A file cannot be loaded or holds another architecture than `--arch`.
    """
    names = distinct_names(config.checkpoint)
    networks = []
    for name, path in zip(names, config.checkpoint, strict=True):
        num_classes = None if config.arch is None else dataset.num_classes
        model = model_for_weights(
            config.arch,
            path,
            num_classes=num_classes,
            image_size=data.image_size,
            ema=config.ema,
            device=device,
        )
        identity = identity_of(model)
        check(
            identity is None or identity.num_classes == dataset.num_classes,
            f"--checkpoint {path} has {identity.num_classes if identity else 0} classes, but {data.data} has "
            f"{dataset.num_classes}: give the data that it was trained on",
        )
        known = class_names_of(model)
        check(
            known in (None, dataset.class_names),
            f"--checkpoint {path}: its classes have other names, or another order, than those of {data.data}: give the "
            "data that it was trained on",
        )
        networks.append(Network(name, model.to(device).eval().requires_grad_(False)))
    return networks


def open_networks(
    config: NetworkConfig, data: ReadConfig, dataset: Dataset, device: torch.device
) -> tuple[list[Network], Preset, Tensor]:
    """Return all networks, the size and normalisation of their images, and a blank image for preparing methods.

    Raises: As `load_networks` and `input_preset`.
    """
    networks = load_networks(config, data, dataset, device)
    preset = input_preset(data, dataset, networks)
    for network in networks:
        if input_of(network.model) is None:
            remember_input(network.model, preset.network_input)
    return networks, preset, torch.zeros(1, 3, preset.image_size, preset.image_size, device=device)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return short names for files: the fewest trailing parts of their paths that make them distinct."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(paths)):
            break
    return [name if names.count(name) == 1 else f"{name}#{index}" for index, name in enumerate(names, 1)]


def input_preset(data: ReadConfig, dataset: Dataset, networks: Sequence[Network]) -> Preset:
    """Return size, geometry and normalisation of the images.

    They come from the flags, else from the networks' training, else from the data set.

    Raises:
        ConfigError: The networks were trained with different images, and no flag chooses.
    """
    presets = {
        data.resolved_preset(dataset.preset.for_network(images)) for images in _inputs(networks, dataset)
    }
    if len(presets) > 1:
        first, second, *_ = presets
        for name in ("image_size", "resize", "mean", "std", "geometry"):
            values = (getattr(first, name), getattr(second, name))
            if values[0] != values[1]:
                raise ConfigError(
                    f"the checkpoints were trained with different images ({name.replace('_', ' ')} "
                    f"{' and '.join(sorted(map(str, values)))}): choose with --{name.replace('_', '-')}"
                )
    return presets.pop() if presets else data.resolved_preset(dataset.preset)


def _inputs(networks: Sequence[Network], dataset: Dataset) -> Iterator[NetworkInput]:
    """Yield the input that each network was trained with, if it is recorded."""
    for network in networks:
        images = input_of(network.model)
        identity = identity_of(network.model)
        if images is not None:
            yield images
        elif identity is not None and identity.image_size:
            preset = dataset.preset
            resize = round(identity.image_size * preset.resize / preset.image_size)
            yield dataclasses.replace(preset.network_input, image_size=identity.image_size, resize=resize)


def image_loader(
    manifest: Manifest,
    preset: Preset,
    data: ReadConfig,
    images: ImageConfig,
    distributed: Distributed,
    *,
    with_masks: bool = False,
    with_boxes: bool = False,
) -> PlannedLoader:
    """Create a loader of the images to explain."""
    place = Placement(device=distributed.device, rank=distributed.rank, world_size=distributed.world_size)
    return evaluation_loader(
        manifest,
        preset,
        data,
        place,
        with_masks=with_masks,
        with_boxes=with_boxes,
    )


def check_writable(folder: Path, flag_name: str) -> None:
    """Create a folder and check that files can be written into it.

    Raises:
        ConfigError: They cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        raise ConfigError(
            f"{flag_name} {folder} cannot be written to ({error.strerror}): choose another folder"
        ) from error
