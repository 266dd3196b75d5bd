"""`python -m explainers train-selector`: a selector learns which part of an image a classifier needs.

    python -m explainers train-selector shapes --arch resnet20 --pretrained-weights f.pth.tar \\
        --predictor q/model_best.pth.tar --lamda 0.2 --smoothness-loss-coeff 1e-3 --temperature 1 --workspace g/

writes `g/model_best.pth.tar` (best agreement on held-out training images) and `g/checkpoint.pth.tar` (the latest,
for `--resume auto`). The classifier is frozen and serves as the selector's encoder.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from explainers.aem.mask_quality import SelectorMasks, judge_masks
from explainers.aem.objectives import SelectorObjective
from explainers.aem.predictor import PredictorRecord, check_predictor, load_predictor
from explainers.aem.saved_selector import SELECTOR_RECORD, selector_record
from explainers.aem.selector import Selector, design_selector
from explainers.aem.selector_callbacks import LossParts
from explainers.aem.selector_config import SelectorJobConfig
from explainers.aem.training import (
    HELD_OUT_BATCHES,
    build_black_box,
    build_trainer,
    check_configs,
    check_record,
    example_images,
)
from explainers.differentiable.explanation import ExplainedClass, network_digest
from image_classification import job as jobs
from image_classification.data.loader import Loader
from image_classification.distributed import Distributed
from image_classification.job_config import JobConfig
from image_classification.job_data import naming_the_flag
from image_classification.job_outcome import run_job
from image_classification.verbs import configured


def start(configs: SelectorJobConfig) -> int:
    """Run the verb; see the module docstring."""
    check_configs(configs, "train-selector")
    return run_job(configs, run)


def run(configs: SelectorJobConfig, distributed: Distributed) -> None:
    """Run one process's share of the training."""
    config = configs.explainer
    predictor, judged = load_predictor(str(config.predictor), device=distributed.device)
    job = jobs.prepare(configs, distributed, HELD_OUT_BATCHES)
    try:
        black_box = build_black_box(job)
        predictor = job.precision.place(predictor)
        selector = _new_selector(job, black_box, judged)
        objective = SelectorObjective(
            black_box,
            predictor,
            config.weights(job.loaders.preset.image_size),
            multi_label=job.multi_label,
            explained=config.explained_class,
        )
        _announce(job, selector, objective)
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
            measure=partial(_measure, job, black_box, predictor, config.explained_class),
            interval=config.evaluation_interval,
            best_by=config.best_by,
            masks=partial(_masks, black_box),
            callbacks=[LossParts(objective)],
            describe=lambda _model: {"arch": configs.model.arch, "structure": None},
        ).fit()
    finally:
        job.close()


def _new_selector(
    job: jobs.Job[SelectorJobConfig], black_box: nn.Module, judged: PredictorRecord
) -> Selector:
    """Build a fresh selector for the kind of masks that the predictor was trained on.

    Raises:
        SettingError: The predictor belongs to another black box, or the network has too few scales.
    """
    config = job.configs.explainer
    num_classes = job.loaders.train.num_classes
    check_predictor(
        judged,
        black_box,
        path=str(config.predictor),
        image_size=job.loaders.preset.image_size,
        num_classes=num_classes,
        kind=config.selector_type,
    )
    with naming_the_flag("--image-size"):
        design = design_selector(
            black_box,
            example_images(job),
            kind=judged.kind,
            geometry=judged.geometry,
            num_classes=num_classes,
            decoder=config.decoder,
            num_scales=config.num_scales,
        )
    torch.manual_seed(job.configs.train.seed)
    selector = Selector(design)
    job.precision.place(selector)
    return selector


def _announce(job: jobs.Job[SelectorJobConfig], selector: Selector, objective: SelectorObjective) -> None:
    num_parameters = sum(parameter.numel() for parameter in selector.parameters())
    job.logger.message(
        f"{selector.design.kind} selector of {job.configs.model.arch}: reads {', '.join(selector.design.taps)}; "
        f"{num_parameters:,} parameters; {objective.weights}"
    )


def _measure(
    job: jobs.Job[JobConfig],
    black_box: nn.Module,
    predictor: nn.Module,
    explained: ExplainedClass,
    selector: nn.Module,
    loader: Loader,
) -> dict[str, float]:
    """Measure the masks as probabilities, without noise."""
    assert isinstance(selector, Selector)
    return judge_masks(
        SelectorMasks(selector, black_box, explained),
        predictor,
        loader,
        precision=job.precision,
        distributed=job.distributed,
        multi_label=job.multi_label,
        max_batches=job.configs.train.max_batches,
    )


def _masks(black_box: nn.Module, selector: nn.Module, images: Tensor) -> Tensor:
    """Return the masks (N, 1, S, S) of images."""
    assert isinstance(selector, Selector)
    return SelectorMasks(selector, black_box)(images)[1]


VERB = configured(SelectorJobConfig, start)
