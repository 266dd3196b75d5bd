"""Learning-rate schedules, stepped per iteration.

A schedule is a pure function of the iteration, so a resumed run needs no scheduler state, only the iteration.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from image_classification.config import check, flag

LR_PER_256 = 0.1


@dataclasses.dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate"""

    lr: float | None = flag(
        None,
        "--lr",
        "--learning-rate",
        help="Learning rate of an optimizer step; default: 0.1 per 256 images of a step.",
    )
    lr_schedule: Literal["constant", "step", "linear", "cosine", "exponential"] = flag(
        "cosine", "--lr-schedule", help="Shape of the learning-rate schedule."
    )
    warmup: float = flag(0.0, "--warmup", help="Epochs of linear warm-up, per iteration; may be a fraction.")
    end_lr: float = flag(
        0.0, "--end-lr", help="Learning rate at the end of linear and cosine, least of exponential."
    )
    lr_step_epochs: list[float] = flag(
        [30, 60, 80], "--lr-step-epochs", nargs="+", help="Epochs of the drops of step."
    )
    lr_step_factor: float = flag(0.1, "--lr-step-factor", help="Factor of each drop of step.")
    lr_exponential_factor: float = flag(
        1e-3, "--lr-exponential-factor", help="Share of the learning rate that exponential leaves at the end."
    )

    def __post_init__(self) -> None:
        check(self.lr is None or self.lr > 0, f"--lr: {self.lr} is not positive")
        check(self.warmup >= 0, f"--warmup: {self.warmup} is negative")
        check(self.end_lr >= 0, f"--end-lr: {self.end_lr} is negative")
        check(0 < self.lr_step_factor <= 1, f"--lr-step-factor: {self.lr_step_factor} is outside (0, 1]")
        check(
            0 < self.lr_exponential_factor <= 1,
            f"--lr-exponential-factor: {self.lr_exponential_factor} is outside (0, 1]",
        )


class Schedule:
    """Learning rate as a function of the iteration (an optimizer step).

    Args:
        config: Shape of the curve.
        steps_per_epoch: Optimizer steps in one epoch.
        epochs: Length of the whole training, not only of this invocation.
        images_per_step: Images per step over all processes and accumulation; the default learning rate scales with it
            (Goyal et
            al. 2017, arXiv:1706.02677).

    Attributes:
        lr: The highest learning rate.
    """

    def __init__(
        self, config: ScheduleConfig, steps_per_epoch: int, epochs: int, images_per_step: int = 256
    ) -> None:
        check(
            config.warmup < max(epochs, 1),
            f"--warmup: {config.warmup} epochs of warm-up do not fit into --epochs {epochs}",
        )
        self.lr = LR_PER_256 * images_per_step / 256 if config.lr is None else config.lr
        check(config.end_lr <= self.lr, f"--end-lr: {config.end_lr} is above --lr {self.lr}")
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.warmup_steps = round(config.warmup * steps_per_epoch)
        self.total_steps = max(epochs * steps_per_epoch, 1)

    def lr_at(self, iteration: int) -> float:
        """Return the learning rate of the `iteration`-th optimizer step, counted from 0."""
        config = self.config
        if iteration < self.warmup_steps:
            return self.lr * (iteration + 1) / self.warmup_steps
        progress = (iteration - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        progress = min(progress, 1.0)
        if config.lr_schedule == "constant":
            return self.lr
        if config.lr_schedule == "step":
            drops = sum(iteration >= epoch * self.steps_per_epoch for epoch in config.lr_step_epochs)
            return self.lr * config.lr_step_factor**drops
        if config.lr_schedule == "linear":
            return config.end_lr + (self.lr - config.end_lr) * (1 - progress)
        if config.lr_schedule == "cosine":
            return config.end_lr + (self.lr - config.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        decay: float = config.lr_exponential_factor**progress
        return max(self.lr * decay, config.end_lr)

    def apply(self, optimizer: torch.optim.Optimizer, iteration: int, factor: float = 1.0) -> float:
        """Set the learning rate of every parameter group for this iteration, times `factor`; return it."""
        lr = self.lr_at(iteration) * factor
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr
