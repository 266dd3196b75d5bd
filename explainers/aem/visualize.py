"""`python -m explainers visualize`: what a selector keeps of some pictures, as one page.

python -m explainers visualize shapes --selector g/model_best.pth.tar --num-images 6 --output masks.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from explainers.aem.files import OpenedSelector, SelectorFileConfig, open_selector
from explainers.aem.plots import MaskedPicture, save_mask_page
from explainers.aem.predictor import check_predictor, load_predictor
from explainers.job import PictureConfig, check_writable, picture_loader
from explainers.plots import to_picture
from image_classification.cli import parse_config
from image_classification.config import check, flag
from image_classification.data.build import ReadConfig
from image_classification.distributed import DistributedConfig, setup_distributed
from image_classification.models import main_and_auxiliary_logits


@dataclasses.dataclass(kw_only=True)
class VisualizeConfig(SelectorFileConfig):
    """What is shown"""

    num_images: int = flag(6, "--num-images", "--num-im-show", "-n", help="number of pictures")
    split: str = flag("val", "--split", choices=("val", "train"), help="split that they are drawn from")
    predictor: str | None = flag(
        None, "--predictor", metavar="FILE", help="also say what this predictor sees in the masked pictures"
    )
    output: str = flag(
        "masks.png", "--output", "-o", metavar="FILE", help="the page; the suffix says the format"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_images >= 1, f"--num-images {self.num_images}: give at least 1")
        check(
            self.predictor is None or Path(self.predictor).is_file(),
            f"--predictor {self.predictor}: there is no such file",
        )


def main(argv: Sequence[str]) -> int:
    """Run the verb; see the module's text."""
    configs = parse_config(
        {"explainer": VisualizeConfig, "data": ReadConfig, "distributed": DistributedConfig},
        argv,
        prog="python -m explainers visualize",
        description="Pictures, a selector's masks, masked pictures.",
    )
    config: VisualizeConfig = configs["explainer"]
    data: ReadConfig = configs["data"]
    output = Path(config.output)
    check_writable(output.absolute().parent, "--output")
    with setup_distributed(configs["distributed"]) as distributed:
        pictures = PictureConfig(split=config.split, num_pictures=config.num_images)
        opened = open_selector(config, data, pictures, distributed)
        predictor = None
        if config.predictor is not None:
            predictor, record = load_predictor(config.predictor, device=distributed.device)
            check_predictor(
                record, opened.black_box, path=config.predictor, image_size=opened.preset.image_size,
                num_classes=opened.dataset.num_classes, kind=opened.explanation.design.kind,
            )  # fmt: skip
        loader = picture_loader(opened.manifest, opened.preset, data, pictures, distributed)
        rows: list[MaskedPicture] = []
        with loader:
            for batch in loader:
                if len(batch):
                    rows += _rows(opened, predictor, batch.images)
        if rows:  # with several processes each would write its share; rank 0's is the page
            save_mask_page(
                output.with_stem(output.stem + (f"-{distributed.rank}" if distributed.rank else "")), rows
            )
        if distributed.is_main:
            print(f"masks of {len(rows)} pictures in {output}")
    return 0


@torch.no_grad()
def _rows(
    opened: OpenedSelector, predictor: torch.nn.Module | None, images: Tensor
) -> Iterator[MaskedPicture]:
    """Rows of a batch."""
    selector, size = opened.explanation.selector, images.shape[-1]
    raw, logits = opened.explanation.raw_and_logits(opened.black_box, images)
    masks = selector.mask(raw, size)
    said = _said(opened, logits)
    said_masked = ["masked"] * len(images)
    if predictor is not None:
        masked_logits, _ = main_and_auxiliary_logits(predictor(images * masks))
        said_masked = [f"masked: {text}" for text in _said(opened, masked_logits)]
    rbf = selector.centres(raw, size) if selector.design.kind == "rbf" else None
    mean, std = opened.preset.mean, opened.preset.std
    for index, (image, mask) in enumerate(zip(images.cpu(), masks.cpu(), strict=True)):
        x, y = (None, None) if rbf is None else rbf[0][index].tolist()
        yield MaskedPicture(
            title=said[index],
            masked_title=said_masked[index],
            picture=to_picture(image.numpy(), mean, std),
            masked=to_picture((image * mask).numpy(), mean, std),
            mask=mask[0].numpy(),
            centre=None if x is None or y is None else (x, y),
            width=None if rbf is None else float(rbf[1][index]),
        )


def _said(opened: OpenedSelector, logits: Tensor) -> list[str]:
    """`square 97 %` per picture."""
    chances = logits.sigmoid() if opened.dataset.multi_label else logits.softmax(1)
    best, classes = chances.max(1)
    names = opened.dataset.class_names
    return [
        f"{names[index]} {100 * chance:.0f} %"
        for index, chance in zip(classes.tolist(), best.tolist(), strict=True)
    ]
