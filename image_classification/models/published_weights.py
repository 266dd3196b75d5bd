"""Weights published by libraries, by name: `torchvision/resnet50:IMAGENET1K_V2`, `timm/resnet50.a1_in1k`.

Published weights are converted once to a LucidPrune checkpoint in the cache. They come from the library's own cache or,
with a network connection, from the library's source. The checkpoint includes the library's metadata: class names, and
size and normalisation of the images. Without a tag (`torchvision/resnet50`, `timm/resnet50`) the library's default
weights are used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from image_classification.cache import default_cache_dir, ensure_directory, locked
from image_classification.checkpoint import save_atomically
from image_classification.checkpoint_format import FORMAT
from image_classification.config import nearest
from image_classification.models.external import build_pretrained, check_known, import_library
from image_classification.models.factory import arch_info, create_model, remember_input
from image_classification.models.structure_capture import capture_structure
from image_classification.models.weights_reading import WeightsError, read_file
from image_classification.network_input import NetworkInput
from image_classification.plain_data import Plain
from image_classification.published_name import is_published


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights as published by a library.

    Attributes:
        arch: Name of the architecture in LucidPrune.
        state: Its tensors.
        num_classes: Number of logits.
        class_names: Names by class index, if the library knows them.
        images: The network input that they were trained for.
    """

    arch: str
    state: dict[str, Tensor]
    num_classes: int
    class_names: list[str] | None
    images: NetworkInput


def weights_file(path: str | Path) -> Path:
    """Return `path` itself, or the cached file for the name of published weights.

    Raises:
        WeightsError: The library has no such weights, or they cannot be downloaded.
        ModelError: The library has no such network, or is not installed.
    """
    if not is_published(path):
        return Path(path)
    library, _, name = str(path).partition("/")
    full_name, fetch = _torchvisions(name) if library == "torchvision" else _timms(name)
    file = default_cache_dir() / "weights" / f"{library}-{full_name}.pth.tar"
    if not file.is_file():
        with locked(file):
            if not file.is_file():  # otherwise another process has created it in the meantime
                save_atomically(_payload(fetch()), file)
    return file


def _payload(published: Published) -> Plain:
    """Return the checkpoint of these weights."""
    info = arch_info(published.arch)
    size = published.images.image_size if info.fixed_size else None
    model = create_model(published.arch, num_classes=published.num_classes, image_size=size)
    model.load_state_dict(published.state)
    remember_input(model, published.images)
    return {
        "format": FORMAT,
        "arch": published.arch,
        "structure": capture_structure(model).to_plain(),
        "class_names": published.class_names,
        "state_dict": model.state_dict(),
    }


def _torchvisions(name: str) -> tuple[str, Callable[[], Published]]:
    """Return the weights' full name and their loader: `resnet50:IMAGENET1K_V2`, or `resnet50` for the default
    weights.
    """
    name, _, tag = name.partition(":")
    check_known("torchvision", name)
    choices = import_library("torchvision").get_model_weights(name)
    tags = list(choices.__members__)
    if tag not in ("", *tags):
        among = ", ".join(tags) or "none"
        raise WeightsError(f"torchvision/{name}:{tag}: it publishes {among}{nearest(tag, tags)}")
    if not tags:
        raise WeightsError(f"torchvision/{name}: torchvision publishes no weights of it; give a file")
    entry = choices[tag or "DEFAULT"]

    def fetch() -> Published:
        read_file(
            _downloaded(f"torchvision/{name}:{entry.name}", entry.url)
        )  # which runs no code, unlike the next step
        preset = entry.transforms()
        images = NetworkInput(
            preset.crop_size[0], preset.resize_size[0], tuple(preset.mean), tuple(preset.std)
        )
        names = list(entry.meta["categories"])
        state = build_pretrained("torchvision", name, entry).state_dict()
        return Published(f"torchvision/{name}", state, len(names), names, images)

    return f"{name}-{entry.name}", fetch


def _downloaded(name: str, url: str) -> Path:
    """Return the file in torch.hub's cache, downloading it if it is missing.

    Raises:
        WeightsError: There is no network connection, or the downloaded file is not the requested one.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if file.is_file():
        return file
    ensure_directory(file.parent)
    digest = re.search(r"-([0-9a-f]{8,})\.", file.name)
    try:
        torch.hub.download_url_to_file(url, str(file), digest.group(1) if digest else None)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{name} is not in {file.parent}, and cannot be fetched ({error}): get {url} where there is a network, and "
            "put it there or give its path with --arch"
        ) from None
    return file


def _timms(name: str) -> tuple[str, Callable[[], Published]]:
    """Return the weights' full name and their loader: `resnet50.a1_in1k`, or `resnet50` for the default weights."""
    timm = import_library("timm")
    info = arch_info(f"timm/{name}")
    config = timm.get_pretrained_cfg(name)
    if not config.has_weights:
        raise WeightsError(f"timm/{name}: timm publishes no weights of it; give a file")
    full_name = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)

    def fetch() -> Published:
        try:
            network = build_pretrained("timm", full_name)
        except Exception as error:  # from the network, the hub or the file: each library raises its own
            raise WeightsError(
                f"timm/{full_name} is not in the cache of the Hugging Face Hub, and cannot be fetched "
                f"({' '.join(str(error).split())[:300]}): build it once where there is a network, and bring the cache "
                "(HF_HOME) here or give the file's path with --arch"
            ) from None
        subset = timm.data.infer_imagenet_subset(network)
        names = config.label_names or (subset and timm.data.ImageNetInfo(subset).label_names())
        images = info.network_input
        return Published(
            f"timm/{config.architecture}",
            network.state_dict(),
            config.num_classes,
            names and list(names),
            images,
        )

    return full_name, fetch
