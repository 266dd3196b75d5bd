"""Settings of a pruner that most users leave at their defaults."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

from image_classification.distributed import Distributed
from pruning.task import Example, Mode, Task
from pruning.task.explained import Autocast, Explained

#: Default number of training iterations between rewrites.
DEFAULT_STEP = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunerSettings:
    """Settings of a pruner within a training job.

    Attributes:
        start: Iteration from which intervals are counted.
        max_batches: Number of calibration batches for scoring channels in one rewrite.
        judge_batches: Number of these batches for comparing candidates: scores need many images, a choice between whole
            candidates few (benchmarks/rewrite.py measures the loss).
        mode: "train" for networks that return their losses only in training mode; see `Task`.
        training_example: Example input for training mode, including targets; by default the example.
        distributed: All ranks call `step` together, each with its share of the calibration data; by default the ranks
            of the process group, if there is one.
        autocast: Context factory for forward passes on calibration data.
        originals: Explanation to follow through rewrites; criteria may use it.
    """

    start: int = 0
    max_batches: int = 10
    judge_batches: int = 2
    mode: Mode = Task.mode
    training_example: Example | None = None
    distributed: Distributed | None = None
    autocast: Autocast = nullcontext
    originals: Explained | None = None
