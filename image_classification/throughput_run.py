"""One rank of a throughput measurement: a training job without validation and checkpoints.

`throughput.py` starts it once per process, as `python -m image_classification.throughput_run FLAGS`.
"""

from __future__ import annotations

import sys

import torch

from image_classification import job as jobs
from image_classification.cli import parse_config
from image_classification.distributed import Distributed
from image_classification.job_config import JobConfig
from image_classification.job_outcome import run_job


def run(configs: JobConfig, distributed: Distributed) -> None:
    """Train one process's share; the figures are in the workspace's report."""
    job = jobs.prepare(configs, distributed)
    try:
        jobs.make_trainer(job, jobs.make_model(job)).fit()
        if distributed.device.type == "cuda":
            gib = torch.cuda.max_memory_reserved(distributed.device) / 2**30
            job.logger.log((), {"gpu.peak_memory_gib": gib})
    finally:
        job.close()


if __name__ == "__main__":
    sys.exit(run_job(parse_config(JobConfig, sys.argv[1:], prog="throughput"), run))
