"""`python -m explainers train-selector`: a selector learns which part of a picture a classifier needs.

    python -m explainers train-selector shapes --arch resnet20 --pretrained-weights f.pth.tar \\
        --predictor q/model_best.pth.tar --lamda 0.2 --smoothness-loss-coeff 1e-3 --temperature 1 --workspace g/

writes `g/model_best.pth.tar` (best agreement on held-out training pictures) and `g/checkpoint.pth.tar` (the latest,
for `--resume auto`). The classifier is frozen and serves as the selector's encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from explainers.aem.callbacks import LossParts
from explainers.aem.config import SelectorConfig, training_sections
from explainers.aem.evaluation import SelectorMasks, judge_masks
from explainers.aem.objectives import SelectorObjective
from explainers.aem.predictor import check_predictor, load_predictor
from explainers.aem.saved import SELECTOR_RECORD, selector_record
from explainers.aem.selector import Selector, design_selector
from explainers.aem.training import (
    HELD_OUT_BATCHES,
    build_black_box,
    build_trainer,
    check_configs,
    check_record,
    example_images,
)
from explainers.explanation import network_digest
from image_classification import job as jobs
from image_classification.cli import parse_config
from image_classification.data.loader import Loader
from image_classification.distributed import Distributed

EPOCHS = 5


def main(argv: Sequence[str]) -> int:
    """Run the verb; see the module's text."""
    configs = parse_config(
        training_sections(SelectorConfig, EPOCHS),
        argv,
        prog="python -m explainers train-selector",
        description="Train a selector: it predicts where a network looks, as one mask per picture.",
    )
    check_configs(configs, "train-selector")
    return jobs.run_job(configs, run)


def run(configs: Mapping[str, Any], distributed: Distributed) -> None:
    """One process's share."""
    config: SelectorConfig = configs["explainer"]
    predictor, judged = load_predictor(str(config.predictor), device=distributed.device)
    job = jobs.prepare(configs, distributed, HELD_OUT_BATCHES)
    try:
        black_box = build_black_box(job)
        predictor = job.precision.place(predictor)
        num_classes, image_size = job.loaders.train.num_classes, job.loaders.preset.image_size
        check_predictor(
            judged, black_box, path=str(config.predictor), image_size=image_size, num_classes=num_classes,
            kind=config.selector_type,
        )  # fmt: skip
        with jobs.naming_the_flag("--image-size"):
            design = design_selector(
                black_box, example_images(job), kind=judged.kind, geometry=judged.geometry,
                num_classes=num_classes, decoder=config.decoder, num_scales=config.num_scales,
            )  # fmt: skip
        torch.manual_seed(configs["train"].seed)
        selector = Selector(design)
        job.precision.place(selector)
        objective = SelectorObjective(
            black_box, predictor, config.weights(image_size), multi_label=job.multi_label
        )
        num_parameters = sum(parameter.numel() for parameter in selector.parameters())
        job.logger.message(
            f"{design.kind} selector of {configs['model'].arch}: reads {', '.join(design.taps)}; "
            f"{num_parameters:,} parameters; {objective.weights}"
        )
        record = {
            **selector_record(selector, black_box, judged.digest),
            "predictor": network_digest(predictor),
        }
        check_record(job, SELECTOR_RECORD, record)
        build_trainer(
            job,
            selector,
            objective,
            name=SELECTOR_RECORD,
            record=record,
            measure=partial(_measure, job, black_box, predictor),
            interval=config.evaluation_interval,
            best_by=config.best_by,
            masks=partial(_masks, black_box),
            callbacks=[LossParts(objective)],
            describe=lambda _model: {"arch": configs["model"].arch, "structure": None},
        ).fit()
    finally:
        job.close()


def _measure(
    job: jobs.Job, black_box: nn.Module, predictor: nn.Module, selector: nn.Module, loader: Loader
) -> dict[str, float]:
    """Figures of the masks themselves, without noise."""
    assert isinstance(selector, Selector)
    return judge_masks(
        SelectorMasks(selector, black_box),
        predictor,
        loader,
        precision=job.precision,
        distributed=job.distributed,
        multi_label=job.multi_label,
        max_batches=job.configs["train"].max_batches,
    )


def _masks(black_box: nn.Module, selector: nn.Module, images: Tensor) -> Tensor:
    """Masks (N, 1, S, S) of pictures."""
    assert isinstance(selector, Selector)
    return SelectorMasks(selector, black_box)(images)[1]
