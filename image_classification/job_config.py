"""The configuration of training jobs, a field per section."""

from __future__ import annotations

import dataclasses

from image_classification.checkpoint import CheckpointConfig
from image_classification.config import section
from image_classification.data.data_config import DataConfig
from image_classification.joining import DistributedConfig
from image_classification.losses import LossConfig
from image_classification.models import ModelConfig
from image_classification.observe.log import LogConfig
from image_classification.optim import OptimConfig
from image_classification.precision import PrecisionConfig
from image_classification.schedules import ScheduleConfig
from image_classification.train_config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Configuration of every training job, a field per section."""

    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    train: TrainConfig = section(TrainConfig)
    loss: LossConfig = section(LossConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    distributed: DistributedConfig = section(DistributedConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig(CommonConfig):
    """The plain training job; other packages add their own sections."""

    optim: OptimConfig = section(OptimConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
