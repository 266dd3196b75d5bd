"""Settings of a pruner that most users leave as they are."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

from image_classification.distributed import Distributed
from pruning.task import Example, Mode, Task
from pruning.task.explained import Autocast, Explained

#: Training iterations between rewrites.
DEFAULT_STEP = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunerSettings:
    """How a pruner works within a training job.

    Attributes:
        start: Iteration from which intervals are counted.
        max_batches: Calibration batches that one rewrite scores channels by.
        judge_batches: How many of them candidates are judged by: scores need many images, a choice between whole
            candidates few (benchmarks/rewrite.py measures what is lost).
        mode: "train" for networks that return their losses only while they train; see `Task`.
        training_example: What the network takes in training mode, targets included; by default the example.
        distributed: All ranks call `step` together, each with its share of the calibration data; by default those of
            the process group, if there is one.
        autocast: Context factory for forward passes on calibration data.
        originals: An explanation to follow through rewrites; criteria may use it.
    """

    start: int = 0
    max_batches: int = 10
    judge_batches: int = 2
    mode: Mode = Task.mode
    training_example: Example | None = None
    distributed: Distributed | None = None
    autocast: Autocast = nullcontext
    originals: Explained | None = None
