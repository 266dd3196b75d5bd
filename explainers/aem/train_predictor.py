"""`python -m explainers train-predictor`: a copy of a classifier learns to imitate it on masked images.

    python -m explainers train-predictor shapes --arch resnet20 --pretrained-weights f.pth.tar --workspace q/

writes `q/model_best.pth.tar` (best agreement on held-out training images) and `q/checkpoint.pth.tar` (the latest,
for `--resume auto`).
"""

from __future__ import annotations

from functools import partial

from torch import nn

from explainers.aem.mask_quality import FixedRandomMasks, judge_masks
from explainers.aem.objectives import PredictorObjective, RandomMasks
from explainers.aem.predictor import PREDICTOR_RECORD, describe_predictor, new_predictor
from explainers.aem.selector import default_num_scales
from explainers.aem.selector_config import PredictorConfig, PredictorJobConfig
from explainers.aem.training import (
    HELD_OUT_BATCHES,
    build_black_box,
    build_trainer,
    check_configs,
    check_record,
    mask_grid_size,
)
from image_classification import job as jobs
from image_classification.data.loader import Loader
from image_classification.distributed import Distributed
from image_classification.job_config import JobConfig
from image_classification.job_data import naming_the_flag
from image_classification.job_outcome import run_job
from image_classification.verbs import configured


def start(configs: PredictorJobConfig) -> int:
    """Run the verb; see the module docstring."""
    check_configs(configs, "train-predictor")
    return run_job(configs, run)


def run(configs: PredictorJobConfig, distributed: Distributed) -> None:
    """Run one process's share of the training."""
    config = configs.explainer
    job = jobs.prepare(configs, distributed, HELD_OUT_BATCHES)
    try:
        black_box = build_black_box(job)
        image_size = job.loaders.preset.image_size
        with naming_the_flag("--image-size"):
            masks = _masks(job, config, black_box)
        record = describe_predictor(
            black_box, config.selector_type, masks.geometry, job.loaders.train.num_classes
        )
        plain = {**record.to_plain(), "figures": {}}
        # Checked before a network is built from what may be another kind of checkpoint.
        check_record(job, PREDICTOR_RECORD, plain)
        fresh = config.predictor_init == "fresh"
        predictor = jobs.make_model(job) if job.resumed else new_predictor(black_box, fresh=fresh)
        jobs.remember_data(job, predictor)
        predictor = job.precision.place(predictor)
        job.logger.message(
            f"predictor of {configs.model.arch} for {config.selector_type} masks of {image_size} pixels"
        )
        build_trainer(
            job,
            predictor,
            PredictorObjective(black_box, masks, multi_label=job.multi_label),
            name=PREDICTOR_RECORD,
            record=plain,
            measure=partial(_measure, job, black_box, masks),
            interval=config.evaluation_interval,
            best_by=config.best_by,
        ).fit()
    finally:
        job.close()


def _masks(job: jobs.Job[JobConfig], config: PredictorConfig, black_box: nn.Module) -> RandomMasks:
    """Build the random masks that the predictor is trained on."""
    image_size = job.loaders.preset.image_size
    grid = (image_size, image_size)
    if config.selector_type == "real-x":
        grid = mask_grid_size(job, black_box, config.num_scales or default_num_scales(image_size))
    geometry = config.geometry(image_size)
    return RandomMasks(config.selector_type, geometry, grid, config.temperature, config.hard_samples)


def _measure(
    job: jobs.Job[JobConfig],
    black_box: nn.Module,
    masks: RandomMasks,
    predictor: nn.Module,
    loader: Loader,
) -> dict[str, float]:
    """Measure a predictor on random masks, the same ones every time."""
    fixed = FixedRandomMasks(masks, black_box, job.distributed.rank)
    return judge_masks(
        fixed,
        predictor,
        loader,
        precision=job.precision,
        distributed=job.distributed,
        multi_label=job.multi_label,
        max_batches=job.configs.train.max_batches,
    )


VERB = configured(PredictorJobConfig, start)
