"""The job of `main.py`: train, prune, fine-tune or evaluate a network.

It composes the parts built by `image_classification.job`; every decision is made in the code that it concerns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from explainers.live import SaliencyGallery
from image_classification import job as jobs
from image_classification.callbacks import Callback
from image_classification.config import check, section
from image_classification.distributed import Distributed
from image_classification.job_config import JobConfig
from image_classification.job_outcome import run_job
from image_classification.verbs import configured
from pruning.training import distill_config, unstructured_config
from pruning.training.distill_config import DistillConfig
from pruning.training.distill_setup import build_distillation
from pruning.training.learned.learned_pruning import LearnedPruning
from pruning.training.pruning_config import PruningConfig
from pruning.training.repair_flags import RepairConfig
from pruning.training.scored import PruningCallback
from pruning.training.unstructured import UnstructuredPruning
from pruning.training.unstructured_config import UnstructuredConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MainConfig(JobConfig):
    """Configuration of a training job of this program."""

    pruning: PruningConfig = section(PruningConfig)
    unstructured: UnstructuredConfig = section(UnstructuredConfig)
    repair: RepairConfig = section(RepairConfig)
    distill: DistillConfig = section(DistillConfig)


def run(configs: MainConfig, distributed: Distributed) -> None:
    """Run one process's share of the job."""
    pruning, repair = configs.pruning, configs.repair
    pruning.check_evaluation(configs.train.evaluate)
    pruning.check_files()
    stops_early = configs.train.early_stopping_patience > 0
    check(
        not (stops_early and (pruning.active or configs.unstructured.active)),
        "--early-stopping-patience could end a training before its network is as small as asked: leave it out here, "
        "and give it to the fine-tuning",
    )
    unstructured_config.check_combination(configs.unstructured, configs.train, pruning, repair)
    distill_config.check_combination(configs.distill, configs.train, configs.precision)
    batches = pruning.wanted_batches() or unstructured_config.wanted_batches(configs.unstructured, repair)
    job = jobs.prepare(configs, distributed, batches, configs.distill.teacher)
    try:
        model = jobs.make_model(job)
        if configs.train.evaluate:
            jobs.evaluate(job, model)
            return
        callbacks: list[Callback] = []
        if pruning.active:
            assert job.loaders.calibration is not None
            size = job.loaders.preset.image_size
            method = LearnedPruning if pruning.learned else PruningCallback
            callbacks.append(method(pruning, job.loaders.calibration, size, job.multi_label, repair))
        if configs.unstructured.active:
            calibration = job.loaders.calibration
            callbacks.append(
                UnstructuredPruning(configs.unstructured, calibration, job.multi_label, repair.repair)
            )
        distillation = build_distillation(job, model, configs.distill)
        objective = None
        if distillation is not None:
            objective = distillation.objective
            callbacks.append(distillation)
        if configs.log.tensorboard is not None:
            callbacks.append(SaliencyGallery())
        jobs.make_trainer(job, model, objective=objective, callbacks=callbacks).fit()
    finally:
        job.close()


def run_main(configs: MainConfig) -> int:
    """Run the job on all ranks and return its exit code."""
    return run_job(configs, run)


def _prune(given: Mapping[str, object]) -> dict[str, object]:
    """Default to iterative pruning, unless another method is given."""
    ways = ("iterative_pruning", "one_shot_pruning", "pruning_method", "unstructured_pruning")
    return {} if any(given.get(way) for way in ways) else {"iterative_pruning": True}


#: `lucidprune train`, `prune` and `evaluate`.
TRAIN = configured(MainConfig, run_main)
PRUNE = configured(MainConfig, run_main, _prune)
EVALUATE = configured(MainConfig, run_main, lambda given: {"evaluate": True})
