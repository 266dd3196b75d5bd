"""`python -m explainers evaluate-selector`: figures of a trained selector on a split.

    python -m explainers evaluate-selector shapes --selector g/model_best.pth.tar --predictor q/model_best.pth.tar \\
        --json figures.json

With a predictor: KL, agreement and area of the masks. Where the split has pixel masks or boxes: how often the mask's
highest pixel lies on the labelled object (all pictures), and its ROC-AUC against the object's pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from explainers.aem.evaluation import SelectorMasks, judge_masks
from explainers.aem.files import OpenedSelector, SelectorFileConfig, open_selector
from explainers.aem.predictor import check_predictor, load_predictor
from explainers.ground_truth import annotated
from explainers.job import PictureConfig, check_writable, picture_loader
from explainers.localization import pixel_auc, pointing_hit
from explainers.localize import needed_annotations
from image_classification.cli import parse_config, to_plain
from image_classification.config import check, flag
from image_classification.data.build import ReadConfig
from image_classification.data.loader import Batch
from image_classification.distributed import Distributed, DistributedConfig, setup_distributed
from image_classification.precision import Precision, PrecisionConfig


@dataclasses.dataclass(kw_only=True)
class EvaluateConfig(SelectorFileConfig):
    """What is measured"""

    predictor: str | None = flag(
        None, "--predictor", metavar="FILE", help="judges masked pictures: KL, agreement, area"
    )
    localization: bool = flag(
        True, "--localization", help="compare masks with pixel masks or boxes, where the split has them"
    )
    json: str | None = flag(None, "--json", metavar="FILE", help="also write the figures as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.predictor is None or Path(self.predictor).is_file(),
            f"--predictor {self.predictor}: there is no such file",
        )
        check(
            self.predictor is not None or self.localization,
            "--no-localization without --predictor leaves nothing to measure: give --predictor FILE",
        )


def main(argv: Sequence[str]) -> int:
    """Run the verb; see the module's text."""
    sections = {
        "explainer": EvaluateConfig, "pictures": PictureConfig, "data": ReadConfig,
        "precision": PrecisionConfig, "distributed": DistributedConfig,
    }  # fmt: skip
    configs = parse_config(
        sections, argv, prog="python -m explainers evaluate-selector", description="Figures of a selector."
    )
    config: EvaluateConfig = configs["explainer"]
    if config.json is not None:
        check_writable(Path(config.json).absolute().parent, "--json")
    with setup_distributed(configs["distributed"]) as distributed:
        figures = _measure(configs, distributed)
        if distributed.is_main:
            for name, value in figures.items():
                print(f"{name:<20} {value:.4f}")
            if config.json is not None:
                Path(config.json).write_text(as_json(figures, to_plain(configs)), encoding="utf-8")
    return 0


def as_json(figures: Mapping[str, float], config: dict[str, Any]) -> str:
    """Figures and configuration as JSON: NaN becomes null."""
    plain = {name: None if math.isnan(value) else value for name, value in figures.items()}
    return json.dumps({"figures": plain, "config": config}, indent=2, allow_nan=False) + "\n"


def _measure(configs: Mapping[str, object], distributed: Distributed) -> dict[str, float]:
    """All figures that can be had."""
    config, data, pictures = configs["explainer"], configs["data"], configs["pictures"]
    assert isinstance(config, EvaluateConfig)
    assert isinstance(data, ReadConfig)
    assert isinstance(pictures, PictureConfig)
    opened = open_selector(config, data, pictures, distributed)
    table = opened.manifest.targets
    annotated_split = table.mask_paths is not None or table.boxes is not None
    localizing = config.localization and annotated_split
    check(
        localizing or config.predictor is not None,
        f"{data.data} has neither masks nor boxes in its {pictures.split} split, and there is no --predictor: nothing "
        "can be measured; give --predictor FILE",
    )
    precision = Precision(configs["precision"], distributed.device)  # type: ignore[arg-type]
    figures: dict[str, float] = {}
    with_masks, with_boxes = needed_annotations(opened.manifest, ["point"]) if localizing else (False, False)
    loader = picture_loader(
        opened.manifest,
        opened.preset,
        data,
        pictures,
        distributed,
        with_masks=with_masks,
        with_boxes=with_boxes,
    )
    with loader:
        if config.predictor is not None:
            predictor, record = load_predictor(config.predictor, device=distributed.device)
            check_predictor(
                record, opened.black_box, path=config.predictor, image_size=opened.preset.image_size,
                num_classes=opened.dataset.num_classes, kind=opened.explanation.design.kind,
            )  # fmt: skip
            figures |= judge_masks(
                SelectorMasks(opened.explanation.selector, opened.black_box), predictor, loader,
                precision=precision, distributed=distributed, multi_label=opened.dataset.multi_label,
            )  # fmt: skip
        if localizing:
            figures |= localisation_figures(opened, loader, distributed)
    return figures


@torch.no_grad()
def localisation_figures(
    opened: OpenedSelector, loader: Iterable[Batch], distributed: Distributed
) -> dict[str, float]:
    """Whether masks lie on objects, over all pictures with a labelled object in view. Collective.

    The class that is explained is the network's own; the object is any that the picture's label names.

    Returns:
        `on_object`: share of pictures where the mask's highest pixel (an RBF mask's centre) lies on the object, in
            percent.
        `within_object`: the same with the object's holes filled (the middle of a ring).
        `auc`: mean ROC-AUC of the mask against the object's pixels, percent.
        `width`: mean σ of RBF masks in pixels.
        `objects`: number of pictures.
    """
    selector = opened.explanation.selector
    rbf = selector.design.kind == "rbf"
    hits, filled, aucs, widths, count, defined = 0.0, 0.0, 0.0, 0.0, 0, 0
    for batch in loader:
        if not len(batch):
            continue
        raw, _ = opened.explanation.raw_and_logits(opened.black_box, batch.images)
        masks = selector.mask(raw, batch.images.shape[-1])[:, 0].cpu().numpy()
        sigmas = selector.centres(raw, batch.images.shape[-1])[1].tolist() if rbf else [0.0] * len(batch)
        for truth in annotated(batch):
            wanted = [truth.masks[label] for label in truth.labels if label in truth.masks]
            if not wanted:
                continue
            thing = np.logical_or.reduce(wanted)
            area = pixel_auc(masks[truth.row], thing)
            hits += pointing_hit(masks[truth.row], thing)
            filled += pointing_hit(masks[truth.row], ndimage.binary_fill_holes(thing))
            widths += sigmas[truth.row]
            count += 1
            if not math.isnan(area):
                aucs, defined = aucs + area, defined + 1
    (total,) = distributed.all_reduce_sum(
        torch.tensor(
            [hits, filled, aucs, widths, count, defined], dtype=torch.float64, device=distributed.device
        )
    )
    hits, filled, aucs, widths, count, defined = total.tolist()
    figures = {
        "on_object": 100 * hits / count if count else math.nan,
        "within_object": 100 * filled / count if count else math.nan,
        "auc": 100 * aucs / defined if defined else math.nan,
        "objects": float(count),
    }
    return figures | ({"width": widths / count} if rbf and count else {})
