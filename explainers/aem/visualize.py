"""`python -m explainers visualize`: a page of images, their masks by a selector, and the masked images.

python -m explainers visualize shapes --selector g/model_best.pth.tar --num-images 6 --output masks.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from explainers.aem.mask_pages import MaskedImage, save_mask_page
from explainers.aem.opened_selector import OpenedSelector, SelectorFileConfig, open_selector
from explainers.differentiable.explanation import explained_classes
from explainers.plots import to_image
from explainers.verbs.attribution_job import ImageConfig, Split, check_writable, image_loader
from image_classification.config import check, flag, section
from image_classification.data.data_config import ReadConfig
from image_classification.data.loader import Batch
from image_classification.figure_writing import check_figure
from image_classification.joining import DistributedConfig, setup_distributed
from image_classification.models import main_and_auxiliary_logits
from image_classification.verbs import configured

_THRESHOLD = 0.5


@dataclasses.dataclass(kw_only=True)
class VisualizeConfig(SelectorFileConfig):
    """What is shown"""

    num_images: int = flag(
        6, "--num-images", "--num-pictures", "--num-im-show", "-n", help="number of images"
    )
    split: Split = flag(ImageConfig.split, "--split", help="split that they are drawn from")
    predictor: str | None = flag(
        None, "--predictor", metavar="FILE", help="also say what this predictor sees in the masked images"
    )
    binarised: bool = flag(
        False, "--binarised", help="a further column: the mask's pixels from 0.5 on, as published"
    )
    output: str = flag(
        "masks.png",
        "--output",
        "-o",
        metavar="FILE",
        help="the page; the suffix says the format, such as .pdf",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_images >= 1, f"--num-images {self.num_images}: give at least 1")
        check(
            self.predictor is None or Path(self.predictor).is_file(),
            f"--predictor {self.predictor}: there is no such file",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualizeJobConfig:
    """Configuration of `visualize`."""

    explainer: VisualizeConfig = section(VisualizeConfig)
    data: ReadConfig = section(ReadConfig)
    distributed: DistributedConfig = section(DistributedConfig)


def run(configs: VisualizeJobConfig) -> int:
    """Run the verb; see the module docstring."""
    config = configs.explainer
    data = configs.data
    output = Path(config.output)
    check_figure(output, "--output")
    check_writable(output.absolute().parent, "--output")
    with setup_distributed(configs.distributed) as distributed:
        images = ImageConfig(split=config.split, num_images=config.num_images)
        opened = open_selector(config, data, images, distributed)
        predictor = None
        if config.predictor is not None:
            predictor = opened.load_predictor(config.predictor, distributed.device)
        loader = image_loader(opened.manifest, opened.preset, data, images, distributed)
        rows: list[MaskedImage] = []
        with loader:
            for batch in loader:
                if len(batch):
                    rows += _rows(opened, predictor, batch, config)
        if rows:  # with several processes each would write its share; only rank 0's page is kept
            save_mask_page(
                output.with_stem(output.stem + (f"-{distributed.rank}" if distributed.rank else "")), rows
            )
        if distributed.is_main:
            print(f"masks of {len(rows)} images in {output}")
    return 0


@torch.no_grad()
def _rows(
    opened: OpenedSelector, predictor: torch.nn.Module | None, batch: Batch, config: VisualizeConfig
) -> Iterator[MaskedImage]:
    """Yield one row per image of a batch."""
    images = batch.images
    selector = opened.explanation.selector
    size = images.shape[-1]
    labels = None
    if config.explained_class == "label":
        labels = explained_classes("label", batch.targets, batch.targets)
    raw, logits = opened.explanation.raw_and_logits(opened.black_box, images, labels)
    masks = selector.mask(raw, size)
    said = _said(opened, logits)
    said_masked = ["masked"] * len(images)
    if predictor is not None:
        masked_logits, _ = main_and_auxiliary_logits(predictor(images * masks))
        said_masked = [f"masked: {text}" for text in _said(opened, masked_logits)]
    rbf = selector.centres(raw, size) if selector.design.kind == "rbf" else None
    mean, std = opened.preset.mean, opened.preset.std
    for index, (image, mask) in enumerate(zip(images.cpu(), masks.cpu(), strict=True)):
        centre = None
        if rbf is not None:
            x, y = rbf[0][index].tolist()
            centre = (x, y)
        yield MaskedImage(
            title=said[index],
            masked_title=said_masked[index],
            image=to_image(image.numpy(), mean, std),
            masked=to_image((image * mask).numpy(), mean, std),
            mask=mask[0].numpy(),
            centre=centre,
            width=None if rbf is None else float(rbf[1][index]),
            binary=(mask[0] >= _THRESHOLD).numpy() if config.binarised else None,
        )


def _said(opened: OpenedSelector, logits: Tensor) -> list[str]:
    """Return the prediction per image as text, such as `square 97 %`."""
    chances = logits.sigmoid() if opened.dataset.multi_label else logits.softmax(1)
    best, classes = chances.max(1)
    names = opened.dataset.class_names
    return [
        f"{names[index]} {100 * chance:.0f} %"
        for index, chance in zip(classes.tolist(), best.tolist(), strict=True)
    ]


VERB = configured(VisualizeJobConfig, run)
