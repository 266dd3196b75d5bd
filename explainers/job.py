"""What the verbs of `python -m explainers` share: their flags, the data set, the networks, the output folder."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from explainers.base import Method, Prepared, create_method, method_names, plain_name
from explainers.integrated_gradients import LARGEST_SMOOTHING, SIGNS
from image_classification.config import ConfigError, check, flag
from image_classification.data.build import Placement, ReadConfig, evaluation_loader
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.layouts import open_dataset
from image_classification.data.layouts.annotations import read_imagenet_boxes
from image_classification.data.loader import PlannedLoader
from image_classification.data.manifest import Manifest
from image_classification.distributed import Distributed
from image_classification.models import identity_of, main_and_auxiliary_logits, model_for_weights


@dataclasses.dataclass(kw_only=True)
class NetworkConfig:
    """Which networks are explained."""

    checkpoint: list[str] = flag(
        [], "--checkpoint", "--path", metavar="FILE", repeatable=True,
        help="weights of a network: a checkpoint of ours (pruned ones too), a plain state dict, torchvision's; may be "
        "given several times",
    )  # fmt: skip
    arch: str | None = flag(
        None, "--arch", "-a", metavar="NAME",
        help="architecture of the checkpoints; checkpoints of ours say theirs",
    )  # fmt: skip
    ema: bool = flag(False, "--ema", help="take the averaged weights of the checkpoints")

    def __post_init__(self) -> None:
        check(bool(self.checkpoint), "--checkpoint is missing: give the weights of the network to explain")
        for path in self.checkpoint:
            check(Path(path).is_file(), f"--checkpoint {path}: there is no such file")


@dataclasses.dataclass(kw_only=True)
class MethodConfig:
    """Which methods explain them."""

    method: list[str] = flag(
        ["gradcam"], "--method", "-m", repeatable=True, choices=method_names(aliases=True),
        help="attribution method; may be given several times",
    )  # fmt: skip
    layer: str | None = flag(
        None, "--layer", metavar="MODULE",
        help="gradcam: module whose output is the feature map; default: the last one with more than one pixel that "
        "everything goes through",
    )  # fmt: skip
    lrp_composite: str = flag(
        "zplus", "--lrp-composite", choices=("zplus", "epsilon-plus-flat"),
        help="lrp: rules of the layers; zplus as in the attribution-preservation paper",
    )  # fmt: skip
    ebp_contrastive: bool = flag(
        False, "--ebp-contrastive", help="ebp: subtract the walk from everything that is not the class"
    )
    ebp_stop: str = flag(
        "last-pool", "--ebp-stop", choices=("last-pool", "input"),
        help="ebp: where the walk ends; last-pool as published",
    )  # fmt: skip
    rap_as_published: bool = flag(
        False, "--rap-as-published",
        help="rap: rules of the published code for negative inputs and residual sums, which blow up on MobileNetV2 and "
        "ResNets",
    )  # fmt: skip
    ig_steps: int = flag(32, "--ig-steps", help="ig: points of the integral")
    ig_sign: str = flag(
        "all", "--ig-sign", choices=SIGNS,
        help="ig: show all attributions as published, their positive part, or absolute values",
    )  # fmt: skip
    ig_smooth: float = flag(
        0.0, "--ig-smooth", metavar="FRACTION",
        help="ig: smooth the map with a Gaussian, its σ this fraction of the picture's larger side; 0 as published, "
        "0.02 as for gradients in the pointing game",
    )  # fmt: skip
    selector: str | None = flag(
        None, "--selector", metavar="FILE", help="selector: what train-selector wrote for the network"
    )
    casm_path: str | None = flag(
        None, "--casm-path", metavar="FILE", help="casm: the trained saliency mapping, a file of train-casm"
    )

    def __post_init__(self) -> None:
        check(self.ig_steps >= 1, f"--ig-steps {self.ig_steps}: give at least 1")
        check(
            0 <= self.ig_smooth <= LARGEST_SMOOTHING,
            f"--ig-smooth {self.ig_smooth}: give a fraction of the picture's larger side, 0 to {LARGEST_SMOOTHING}",
        )
        self.method = list(dict.fromkeys(self.method))
        owners = {
            "--layer": (self.layer is not None, ("gradcam", "gcam")),
            "--lrp-composite": (self.lrp_composite != "zplus", ("lrp",)),
            "--ebp-contrastive": (self.ebp_contrastive, ("ebp",)),
            "--ebp-stop": (self.ebp_stop != "last-pool", ("ebp",)),
            "--rap-as-published": (self.rap_as_published, ("rap",)),
            "--ig-steps": (self.ig_steps != 32, ("ig", "integrated_gradients")),
            "--ig-sign": (self.ig_sign != "all", ("ig", "integrated_gradients")),
            "--ig-smooth": (self.ig_smooth != 0, ("ig", "integrated_gradients")),
            "--casm-path": (self.casm_path is not None, ("casm",)),
            "--selector": (self.selector is not None, ("selector",)),
        }
        for name, (given, owner) in owners.items():
            check(
                not given or bool(set(owner) & set(self.method)),
                f"{name} has no effect without --method {owner[0]}: add the method, or leave {name} out",
            )

    def methods(self) -> dict[str, Method]:
        """The chosen methods with their settings, by the name that was asked for."""
        settings: dict[str, dict[str, object]] = {
            "gradcam": {"layer": self.layer},
            "lrp": {"composite": self.lrp_composite},
            "ebp": {"contrastive": self.ebp_contrastive, "stop": self.ebp_stop},
            "rap": {"as_published": self.rap_as_published},
            "ig": {"steps": self.ig_steps, "sign": self.ig_sign, "smooth": self.ig_smooth},
            "casm": {"path": self.casm_path or ""},
            "selector": {"selector": self.selector},
        }
        return {name: create_method(name, **settings.get(plain_name(name), {})) for name in self.method}


@dataclasses.dataclass(kw_only=True)
class PictureConfig:
    """Which pictures, and how they are cut."""

    split: str = flag("val", "--split", choices=("val", "train"), help="split whose pictures are explained")
    geometry: str = flag(
        "crop", "--geometry", choices=("crop", "whole"),
        help="crop: short side resized, centre cut out; whole: the picture stretched to the input's size, as published "
        "for VOC",
    )  # fmt: skip
    num_pictures: int | None = flag(
        None,
        "--num-pictures",
        "-n",
        parse=int,
        help="explain so many pictures, drawn once and for all; default: all",
    )
    annotation_path: str | None = flag(
        None, "--annotation-path", metavar="DIR",
        help="boxes of ImageNet pictures: a folder with one XML file per picture",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(
            self.num_pictures is None or self.num_pictures >= 1,
            f"--num-pictures {self.num_pictures}: give at least 1, or leave it out for all",
        )


@dataclasses.dataclass(frozen=True)
class Network:
    """A loaded network.

    Attributes:
        name: What tables call it.
        model: In evaluation mode, on the device, without gradients.
    """

    name: str
    model: nn.Module

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return main_and_auxiliary_logits(self.model(images))[0]

    def prepare(self, methods: dict[str, Method], example: Tensor) -> dict[str, Prepared]:
        """The methods bound to it."""
        return {name: method.prepare(self.model, example) for name, method in methods.items()}


def open_split(
    data: ReadConfig, pictures: PictureConfig, distributed: Distributed
) -> tuple[Dataset, Manifest]:
    """The data set, and the part of it that is explained, with boxes where `--annotation-path` gives them."""
    with distributed.main_process_first("opening the data set"):
        dataset = open_dataset(data.data, progress=distributed.is_main, require_val=pictures.split == "val")
    manifest = dataset.val if pictures.split == "val" else dataset.train
    count = pictures.num_pictures
    if count is not None and count < len(manifest):
        # Regular steps would meet the same class again and again where classes take turns.
        chosen = np.random.default_rng(0).permutation(len(manifest))[:count]
        manifest = manifest.subset(np.sort(chosen))
    if pictures.annotation_path is not None:
        folder = Path(pictures.annotation_path)
        check(folder.is_dir(), f"--annotation-path {folder}: there is no such folder")
        boxes, classes = read_imagenet_boxes(folder, manifest.paths, manifest.class_names)
        targets = dataclasses.replace(manifest.targets, boxes=boxes, box_classes=classes)
        manifest = dataclasses.replace(manifest, targets=targets)
    return dataset, manifest


def load_networks(
    config: NetworkConfig, data: ReadConfig, dataset: Dataset, device: torch.device
) -> list[Network]:
    """All networks, checked against the data set.

    Raises:
        ConfigError: A network for another number of classes.
        ModelError, WeightsError: A file that cannot be loaded, or that holds another architecture than `--arch`.
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
            f"--checkpoint {path} tells {identity.num_classes if identity else 0} classes apart, but {data.data} has "
            f"{dataset.num_classes}: give the data that it was trained on",
        )
        networks.append(Network(name, model.to(device).eval().requires_grad_(False)))
    return networks


def open_networks(
    config: NetworkConfig, data: ReadConfig, dataset: Dataset, device: torch.device
) -> tuple[list[Network], Preset, Tensor]:
    """All networks, the size and normalisation of their pictures, and a blank picture to prepare methods with.

    Raises: As `load_networks` and `input_preset`.
    """
    networks = load_networks(config, data, dataset, device)
    preset = input_preset(data, dataset, networks)
    return networks, preset, torch.zeros(1, 3, preset.image_size, preset.image_size, device=device)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Short names for files: the last parts of their paths, as many as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(paths)):
            break
    return [name if names.count(name) == 1 else f"{name}#{index}" for index, name in enumerate(names, 1)]


def input_preset(data: ReadConfig, dataset: Dataset, networks: Sequence[Network]) -> Preset:
    """Size and normalisation of the pictures: the flags', else what the networks were trained with, else the set's."""
    if data.image_size is None:
        identities = [identity_of(network.model) for network in networks]
        sizes = {
            identity.image_size for identity in identities if identity is not None and identity.image_size
        }
        if len(sizes) > 1:
            raise ConfigError(
                f"the checkpoints were trained with pictures of {' and '.join(map(str, sorted(sizes)))} pixels: choose "
                "one size with --image-size"
            )
        if sizes:
            data = dataclasses.replace(data, image_size=sizes.pop())
    return data.resolved_preset(dataset.preset)


def picture_loader(
    manifest: Manifest, preset: Preset, data: ReadConfig, pictures: PictureConfig, distributed: Distributed,
    *, with_masks: bool = False, with_boxes: bool = False,
) -> PlannedLoader:  # fmt: skip
    """A loader of the pictures to explain."""
    place = Placement(device=distributed.device, rank=distributed.rank, world_size=distributed.world_size)
    return evaluation_loader(
        manifest,
        preset,
        data,
        place,
        whole=pictures.geometry == "whole",
        with_masks=with_masks,
        with_boxes=with_boxes,
    )


def check_writable(folder: Path, flag_name: str) -> None:
    """Make a folder, and make sure now that files can be written into it.

    Raises:
        ConfigError: They cannot.
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
