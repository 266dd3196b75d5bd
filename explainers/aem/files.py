"""What the verbs that read a trained selector share: its file, its network, its pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from explainers.aem.saved import SelectorExplanation, load_black_box, load_selector
from explainers.job import PictureConfig, open_split
from image_classification.config import check, flag
from image_classification.data.build import ReadConfig
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.manifest import Manifest
from image_classification.distributed import Distributed


@dataclasses.dataclass(kw_only=True)
class SelectorFileConfig:
    """Selector"""

    selector: str | None = flag(
        None, "--selector", metavar="FILE", help="what train-selector wrote; it holds the network too"
    )

    def __post_init__(self) -> None:
        check(
            self.selector is not None,
            "--selector is missing: give what `python -m explainers train-selector` wrote",
        )
        check(Path(str(self.selector)).is_file(), f"--selector {self.selector}: there is no such file")


@dataclasses.dataclass(frozen=True)
class OpenedSelector:
    """A selector with its network and the pictures to look at.

    Attributes:
        explanation: The selector.
        black_box: The network that it explains.
        dataset, manifest: The data set and the part of it that is looked at.
        preset: Size and normalisation of the pictures.
    """

    explanation: SelectorExplanation
    black_box: nn.Module
    dataset: Dataset
    manifest: Manifest
    preset: Preset


def open_selector(
    config: SelectorFileConfig, data: ReadConfig, pictures: PictureConfig, distributed: Distributed
) -> OpenedSelector:
    """Load a selector and its network, and open the data that it was trained on.

    Raises:
        ConfigError: The data has other classes, or `--image-size` another size.
    """
    path, device = str(config.selector), distributed.device
    explanation = load_selector(path, device=device)
    black_box = load_black_box(path, device=device)
    dataset, manifest = open_split(data, pictures, distributed)
    if data.image_size is None:
        data = dataclasses.replace(data, image_size=explanation.design.image_size)
    preset = data.resolved_preset(dataset.preset)
    explanation.check_network(black_box, image_size=preset.image_size, num_classes=dataset.num_classes)
    return OpenedSelector(explanation, black_box, dataset, manifest, preset)
