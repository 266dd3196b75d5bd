"""A training job in miniature: images in memory, a network of two layers, everything else real."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_classification.callbacks import Callback, TrainState
from image_classification.checkpoint import CheckpointConfig, Checkpointer
from image_classification.data.loader import Batch
from image_classification.distributed import Distributed
from image_classification.ema import Ema
from image_classification.evaluation import Evaluator
from image_classification.losses import LossConfig, build_loss
from image_classification.models import create_model
from image_classification.objective import TaskObjective
from image_classification.observe.log import LogConfig, Logger
from image_classification.optim import OptimConfig, build_optimizer
from image_classification.precision import Precision, PrecisionConfig
from image_classification.schedules import Schedule, ScheduleConfig
from image_classification.train_config import TrainConfig
from image_classification.trainer import Trainer


class MemoryLoader:
    """The loader protocol over a tensor, with order and content a function of (epoch, step)."""

    manifest = None
    num_substituted = 0

    def __init__(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
        training: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.targets, self.batch_size, self.training = images, targets, batch_size, training
        self.rank, self.world_size = rank, world_size
        self.num_samples, self.num_classes = len(images), 10
        self.epoch = self.step = 0

    def __len__(self) -> int:
        return len(self.images) // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.step = epoch, 0

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = (
            torch.randperm(len(self.images), generator=generator)
            if self.training
            else torch.arange(len(self.images))
        )
        for step in range(self.step if self.training else 0, len(self)):
            begin = (step * self.world_size + self.rank) * self.batch_size
            ids = order[begin : begin + self.batch_size]
            self.step = step + 1
            yield Batch(self.images[ids], self.targets[ids], ids)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]

    def close(self) -> None:
        pass


def toy_data(num_samples: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise images (N, 3, 8, 8) with random labels of 10 classes."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(num_samples, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 10, (num_samples,), generator=generator)


class DropoutObjective(TaskObjective):
    """Draws from torch's generator in every step, so that a resume must restore it to continue identically."""

    def __call__(
        self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__call__(model, nn.functional.dropout(images, 0.2), targets)


MakeTrainer = Callable[..., Trainer]


@dataclasses.dataclass
class Recorder(Callback):
    """Records every event, and stops the run on request."""

    events: list[str] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    stop_at: int | None = None

    name = "recorder"

    def on_fit_start(self, trainer: Trainer) -> None:
        self.events.append("fit_start")

    def on_epoch_start(self, trainer: Trainer) -> None:
        self.events.append("epoch_start")

    def on_batch_start(self, trainer: Trainer, batch: Batch) -> None:
        self.events.append("batch_start")

    def on_backward_end(self, trainer: Trainer) -> None:
        assert all(p.grad is not None for p in trainer.state.model.parameters())
        self.events.append("backward_end")

    def on_step_end(self, trainer: Trainer) -> None:
        assert all(p.grad is None for p in trainer.state.model.parameters())
        self.events.append("step_end")
        if self.stop_at == trainer.state.iteration:
            raise KeyboardInterrupt

    def on_log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        self.events.append("log")
        self.losses.append(figures["train.loss"])
        figures["recorder.seen"] = 1.0

    def on_evaluate_end(self, trainer: Trainer, figures: dict[str, float]) -> None:
        self.events.append("evaluate_end")

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.events.append("epoch_end")

    def on_fit_end(self, trainer: Trainer) -> None:
        self.events.append("fit_end")

    def state_dict(self) -> dict[str, Any]:
        return {"count": len(self.events)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.events.append(f"restored {state['count']}")


def build_trainer(
    *,
    distributed: Distributed | None = None,
    callbacks: tuple[Callback, ...] = (),
    batch_size: int = 4,
    data: tuple[torch.Tensor, torch.Tensor] | None = None,
    lr: float = 0.05,
    ema: float | None = None,
    clip_norm: float | None = None,
    amp: bool = False,
    dropout: bool = False,
    workspace: Path,
    checkpoint: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    **train: Any,
) -> Trainer:
    """Create a miniature trainer; `train` overrides the fields of `TrainConfig`."""
    distributed = distributed or Distributed()
    torch.manual_seed(0)
    model = model or create_model("resnet20", num_classes=10, widths={"layer1.0.conv1": 4})
    config = TrainConfig(**{"epochs": 2, **train})
    precision = Precision(PrecisionConfig(amp=amp), distributed.device)
    model = precision.place(model)
    optimizer = build_optimizer(OptimConfig(), model, lr)
    images, targets = data or toy_data()
    place = (distributed.rank, distributed.world_size)
    loader = MemoryLoader(images, targets, batch_size, True, *place)
    steps = len(loader) // config.accumulation_steps(batch_size, distributed.world_size)
    schedule = Schedule(ScheduleConfig(lr=lr, lr_schedule="cosine"), steps, config.epochs)
    checkpoint_config = CheckpointConfig(workspace=workspace, **(checkpoint or {}))
    return Trainer(
        config,
        TrainState(model, optimizer, schedule, Ema(model, ema) if ema is not None else None),
        objective=(DropoutObjective if dropout else TaskObjective)(build_loss(LossConfig())),
        precision=precision,
        distributed=distributed,
        logger=Logger(LogConfig(raport_file="", console="plain"), workspace, is_main=False),
        checkpointer=Checkpointer(checkpoint_config, distributed, lambda text: None),
        train_loader=loader,
        evaluator=None
        if config.training_only
        else Evaluator(MemoryLoader(images[:10], targets[:10], 5, False), precision, Distributed()),
        callbacks=callbacks,
        clip_norm=clip_norm,
        print_freq=5,
    )
