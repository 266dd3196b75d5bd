"""Code shared by the verbs that read a trained selector: they open its file, its network and its images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from explainers.aem.predictor import check_predictor, load_predictor
from explainers.aem.saved_selector import SelectorExplanation, load_black_box, load_selector
from explainers.differentiable.explanation import EXPLAIN_HELP, EXPLAINED, ExplainedClass
from explainers.verbs.attribution_job import ImageConfig, open_split
from image_classification.config import check, flag
from image_classification.data.data_config import ReadConfig
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.manifest import Manifest
from image_classification.distributed import Distributed
from image_classification.models import input_of


@dataclasses.dataclass(kw_only=True)
class SelectorFileConfig:
    """Selector"""

    selector: str | None = flag(
        None, "--selector", metavar="FILE", help="what train-selector wrote; it holds the network too"
    )
    explained_class: ExplainedClass = flag(
        EXPLAINED,
        "--explain",
        help=EXPLAIN_HELP,
    )

    def __post_init__(self) -> None:
        check(
            self.selector is not None,
            "--selector is missing: give what `python -m explainers train-selector` wrote",
        )
        check(Path(str(self.selector)).is_file(), f"--selector {self.selector}: there is no such file")


@dataclasses.dataclass(frozen=True)
class OpenedSelector:
    """A selector with its network and the images to explain.

    Attributes:
        explanation: The selector.
        black_box: The network it explains.
        dataset, manifest: The data set and the part of it that is used.
        preset: Size and normalisation of the images.
    """

    explanation: SelectorExplanation
    black_box: nn.Module
    dataset: Dataset
    manifest: Manifest
    preset: Preset

    def load_predictor(self, path: str, device: torch.device) -> nn.Module:
        """Load a predictor and check that it imitates this black box on images of this size.

        Raises: As `predictor.load_predictor` and `check_predictor`.
        """
        predictor, record = load_predictor(path, device=device)
        check_predictor(
            record,
            self.black_box,
            path=path,
            image_size=self.preset.image_size,
            num_classes=self.dataset.num_classes,
            kind=self.explanation.design.kind,
        )
        return predictor


def open_selector(
    config: SelectorFileConfig, data: ReadConfig, images: ImageConfig, distributed: Distributed
) -> OpenedSelector:
    """Load a selector and its network, and open the data that it was trained on.

    Raises:
        ConfigError: The data has other classes than the selector was trained on, or `--image-size` differs.
    """
    path = str(config.selector)
    device = distributed.device
    explanation = load_selector(path, device=device)
    black_box = load_black_box(path, device=device)
    dataset, manifest = open_split(data, images, distributed)
    if data.image_size is None:
        data = dataclasses.replace(data, image_size=explanation.design.image_size)
    preset = data.resolved_preset(dataset.preset.for_network(input_of(black_box)))
    explanation.check_network(black_box, image_size=preset.image_size, num_classes=dataset.num_classes)
    return OpenedSelector(explanation, black_box, dataset, manifest, preset)
