"""Train, prune, fine-tune or evaluate a network:  python main.py DATA [flags]  (see --help and README.md).

Composes the parts that `image_classification.job` builds; every decision lives beside the code that it concerns.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from image_classification import job as jobs
from image_classification.cli import parse_config
from image_classification.distributed import Distributed
from pruning.callback import PruningCallback
from pruning.config import PruningConfig

SECTIONS: dict[str, type] = {**jobs.SECTIONS, "pruning": PruningConfig}

DESCRIPTION = (
    "Train, prune, fine-tune and evaluate image classifiers on folders, CIFAR, VOC or the embedded shapes."
)


def run(configs: Mapping[str, Any], distributed: Distributed) -> None:
    """One process's share of the job."""
    pruning: PruningConfig = configs["pruning"]
    job = jobs.prepare(configs, distributed, pruning.calibration_batches if pruning.active else 0)
    try:
        model = jobs.make_model(job)
        if configs["train"].evaluate:
            jobs.evaluate(job, model)
            return
        callbacks = []
        if pruning.active:
            assert job.loaders.calibration is not None
            size = job.loaders.preset.image_size
            callbacks.append(PruningCallback(pruning, job.loaders.calibration, size, job.multi_label))
        jobs.make_trainer(job, model, callbacks=callbacks).fit()
    finally:
        job.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    configs = parse_config(SECTIONS, argv, prog="main.py", description=DESCRIPTION)
    return jobs.run_job(configs, run)


if __name__ == "__main__":
    sys.exit(main())
