"""`python -m explainers evaluate-selector`: figures of a trained selector on a split.

    python -m explainers evaluate-selector shapes --selector g/model_best.pth.tar --predictor q/model_best.pth.tar \\
        --json figures.json

With a predictor, it reports KL, agreement and area of the masks. If the split has pixel masks or boxes, it also reports
how often the mask's highest pixel lies on the labelled object (over all images), and the mask's ROC-AUC against the
object's pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from explainers.aem.mask_quality import SelectorMasks, judge_masks
from explainers.aem.opened_selector import OpenedSelector, SelectorFileConfig, open_selector
from explainers.differentiable.explanation import EXPLAINED, ExplainedClass, explained_classes
from explainers.measures.ground_truth import annotated
from explainers.measures.localization import pixel_auc, pointing_hit
from explainers.measures.tables import without_nan
from explainers.verbs.attribution_job import ImagesJob, check_writable, image_loader
from explainers.verbs.ground_truth_checks import needed_annotations
from image_classification.config import check, flag, section
from image_classification.data.loader import Batch
from image_classification.distributed import Distributed
from image_classification.extras import optional_import
from image_classification.file_writing import write_text
from image_classification.joining import setup_distributed
from image_classification.precision import Precision, PrecisionConfig
from image_classification.resolved_config import to_plain
from image_classification.verbs import configured

with optional_import():
    from scipy import ndimage


@dataclasses.dataclass(kw_only=True)
class EvaluateConfig(SelectorFileConfig):
    """What is measured"""

    predictor: str | None = flag(
        None, "--predictor", metavar="FILE", help="judges masked images: KL, agreement, area"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSelectorConfig(ImagesJob):
    """Configuration of `evaluate-selector`."""

    explainer: EvaluateConfig = section(EvaluateConfig)
    precision: PrecisionConfig = section(PrecisionConfig)


def run(configs: EvaluateSelectorConfig) -> int:
    """Run the verb; see the module docstring."""
    config = configs.explainer
    if config.json is not None:
        check_writable(Path(config.json).absolute().parent, "--json")
    with setup_distributed(configs.distributed) as distributed:
        figures = _measure(configs, distributed)
        if distributed.is_main:
            for name, value in figures.items():
                print(f"{name:<20} {value:.4f}")
            if config.json is not None:
                write_text(Path(config.json), as_json(figures, to_plain(configs)))
    return 0


def as_json(figures: Mapping[str, float], config: Mapping[str, object]) -> str:
    """Return figures and configuration as JSON, with NaN written as null."""
    plain = {"figures": without_nan(figures), "config": config}
    return json.dumps(plain, indent=2, allow_nan=False) + "\n"


def _measure(configs: EvaluateSelectorConfig, distributed: Distributed) -> dict[str, float]:
    """Compute every figure that the split and the settings allow."""
    config, data, images = configs.explainer, configs.data, configs.images
    opened = open_selector(config, data, images, distributed)
    table = opened.manifest.targets
    annotated_split = table.mask_paths is not None or table.boxes is not None
    localizing = config.localization and annotated_split
    check(
        localizing or config.predictor is not None,
        f"{data.data} has neither masks nor boxes in its {images.split} split, and there is no --predictor: nothing "
        "can be measured; give --predictor FILE",
    )
    precision = Precision(configs.precision, distributed.device)
    figures: dict[str, float] = {}
    with_masks, with_boxes = needed_annotations(opened.manifest, ["point"]) if localizing else (False, False)
    loader = image_loader(
        opened.manifest,
        opened.preset,
        data,
        images,
        distributed,
        with_masks=with_masks,
        with_boxes=with_boxes,
    )
    with loader:
        if config.predictor is not None:
            predictor = opened.load_predictor(config.predictor, distributed.device)
            figures |= judge_masks(
                SelectorMasks(opened.explanation.selector, opened.black_box, config.explained_class),
                predictor,
                loader,
                precision=precision,
                distributed=distributed,
                multi_label=opened.dataset.multi_label,
            )
        if localizing:
            figures |= localisation_figures(opened, loader, distributed, config.explained_class)
    return figures


@torch.no_grad()
def localisation_figures(
    opened: OpenedSelector,
    loader: Iterable[Batch],
    distributed: Distributed,
    explained: ExplainedClass = EXPLAINED,
) -> dict[str, float]:
    """Measure how well masks lie on objects, over all images with a labelled object in view. Collective.

    The explained class is the network's prediction or the label; any object that the image's label names counts as the
    object.

    Returns:
        `on_object`: share of images where the mask's highest pixel (an RBF mask's centre) lies on the object, in
            percent.
        `within_object`: the same with the object's holes filled (the middle of a ring).
        `auc`: mean ROC-AUC of the mask against the object's pixels, percent.
        `width`: mean σ of RBF masks in pixels.
        `objects`: number of images.
    """
    explanation = opened.explanation
    selector = explanation.selector
    rbf = selector.design.kind == "rbf"
    # Hits, hits with holes filled, AUCs, widths σ, images, images with a defined AUC.
    sums = np.zeros(6)
    for batch in loader:
        if not len(batch):
            continue
        size = batch.images.shape[-1]
        labels = explained_classes(explained, batch.targets, batch.targets) if explained == "label" else None
        raw, _ = explanation.raw_and_logits(opened.black_box, batch.images, labels)
        masks = selector.mask(raw, size)[:, 0].cpu().numpy()
        widths = selector.centres(raw, size)[1].tolist() if rbf else [0.0] * len(batch)
        for truth in annotated(batch):
            wanted = [truth.masks[label] for label in truth.labels if label in truth.masks]
            if not wanted:
                continue
            mask = masks[truth.row]
            target = np.logical_or.reduce(wanted)
            hit = pointing_hit(mask, target)
            hit_filled = pointing_hit(mask, ndimage.binary_fill_holes(target))
            auc = pixel_auc(mask, target)
            defined = not math.isnan(auc)
            sums += [hit, hit_filled, auc if defined else 0.0, widths[truth.row], 1, defined]
    (total,) = distributed.all_reduce_sum(torch.tensor(sums, device=distributed.device))
    hits, hits_filled, aucs, width, count, num_defined = total.tolist()
    figures = {
        "on_object": 100 * hits / count if count else math.nan,
        "within_object": 100 * hits_filled / count if count else math.nan,
        "auc": 100 * aucs / num_defined if num_defined else math.nan,
        "objects": float(count),
    }
    if rbf and count:
        figures["width"] = width / count
    return figures


VERB = configured(EvaluateSelectorConfig, run)
