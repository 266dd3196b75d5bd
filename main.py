"""Train, prune, fine-tune or evaluate a network:  python main.py DATA [flags]  (see --help and README.md).

Composes the parts that `image_classification.job` builds; every decision lives beside the code that it concerns.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from explainers.live import SaliencyGallery
from image_classification import job as jobs
from image_classification.callbacks import Callback
from image_classification.cli import parse_config
from image_classification.distributed import Distributed
from pruning import distill, unstructured
from pruning.callback import PruningCallback
from pruning.config import PruningConfig
from pruning.learned.callback import LearnedPruning

SECTIONS: dict[str, type] = {
    **jobs.SECTIONS, "pruning": PruningConfig, "unstructured": unstructured.UnstructuredConfig,
    "distill": distill.DistillConfig,
}  # fmt: skip

DESCRIPTION = (
    "Train, prune, fine-tune and evaluate image classifiers on folders, CIFAR, VOC or the embedded shapes."
)


def run(configs: Mapping[str, Any], distributed: Distributed) -> None:
    """One process's share of the job."""
    pruning: PruningConfig = configs["pruning"]
    pruning.check_evaluation(configs["train"].evaluate)
    pruning.check_files()
    unstructured.check_combination(configs)
    distill.check_combination(configs)
    job = jobs.prepare(configs, distributed, pruning.wanted_batches())
    try:
        model = jobs.make_model(job)
        if configs["train"].evaluate:
            jobs.evaluate(job, model)
            return
        callbacks: list[Callback] = []
        if pruning.active:
            assert job.loaders.calibration is not None
            size = job.loaders.preset.image_size
            method = LearnedPruning if pruning.learned else PruningCallback
            callbacks.append(method(pruning, job.loaders.calibration, size, job.multi_label))
        if configs["unstructured"].active:
            callbacks.append(unstructured.UnstructuredPruning(configs["unstructured"]))
        distillation = distill.build_distillation(job, model, configs["distill"])
        objective = None
        if distillation is not None:
            objective = distillation.objective
            callbacks.append(distillation)
        if configs["log"].tensorboard is not None:
            callbacks.append(SaliencyGallery())
        jobs.make_trainer(job, model, objective=objective, callbacks=callbacks).fit()
    finally:
        job.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    configs = parse_config(SECTIONS, argv, prog="main.py", description=DESCRIPTION)
    return jobs.run_job(configs, run)


if __name__ == "__main__":
    sys.exit(main())
