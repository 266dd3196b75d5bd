"""Flags of the training loop."""

from __future__ import annotations

import dataclasses
from typing import Literal

from image_classification.config import check, flag
from image_classification.nan_guard import NanPolicy

#: Which figures are computed for multi-label data.
Figures = Literal["all", "published"]


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """Training"""

    epochs: int = flag(90, "--epochs", help="Length of the training in epochs.")
    run_epochs: int = flag(-1, "--run-epochs", help="Epochs of this invocation, then save and end; -1: all.")
    optimizer_batch_size: int = flag(
        -1,
        "--optimizer-batch-size",
        help="Images per optimizer step over all processes, by accumulation; -1: no accumulation.",
    )
    seed: int = flag(0, "--seed", help="Seed of weights, data order, augmentation and dropout.")
    use_ema: float | None = flag(
        None, "--use-ema", metavar="DECAY", help="Average the weights with this decay (0.9999); judged too."
    )
    early_stopping_patience: int = flag(
        -1,
        "--early-stopping-patience",
        metavar="N",
        help="End the training when the figure that decides which network is best has not risen for N epochs; "
        "-1: train to the end.",
    )
    sync_batchnorm: bool = flag(
        False,
        "--sync-batchnorm",
        help="Batch norms take mean and variance over the images of all processes (GPUs only).",
    )
    on_nan: NanPolicy = flag("stop", "--on-nan", help="When the loss is not finite.")
    nan_budget: int = flag(0, "--nan-budget", help="Most updates that --on-nan skip may leave out.")
    evaluate: bool = flag(False, "--evaluate", help="Only measure the network on the validation set.")
    figures: Figures = flag(
        "all",
        "--figures",
        help="With several labels per image: all, best by mAP over classes; published: mAP and F1 over images only, as "
        "the attribution-preservation program counts them, best by that mAP.",
    )
    training_only: bool = flag(False, "--training-only", help="Do not validate.")
    prof: int = flag(
        -1,
        "--prof",
        metavar="N",
        help="Run only N iterations of each epoch and validation, to measure speed.",
    )

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"--epochs: {self.epochs} is not a positive count")
        check(
            self.run_epochs == -1 or self.run_epochs >= 1,
            f"--run-epochs: {self.run_epochs} is not a positive count",
        )
        check(
            self.early_stopping_patience == -1 or self.early_stopping_patience >= 1,
            f"--early-stopping-patience: {self.early_stopping_patience} is not a positive count",
        )
        check(
            self.early_stopping_patience == -1 or not (self.training_only or self.evaluate),
            "--early-stopping-patience goes by the validation: leave --training-only and --evaluate out",
        )
        check(0 <= self.seed < 1 << 62, f"--seed: {self.seed} is not between 0 and 2^62")
        check(self.use_ema is None or 0 <= self.use_ema < 1, f"--use-ema: {self.use_ema} is outside [0, 1)")
        check(self.nan_budget >= 0, f"--nan-budget: {self.nan_budget} is negative")
        check(
            (self.on_nan == "skip") == (self.nan_budget > 0),
            "--on-nan skip and --nan-budget N (N ≥ 1) belong together: give both or neither",
        )
        check(not (self.evaluate and self.training_only), "--evaluate and --training-only exclude each other")
        check(self.prof == -1 or self.prof >= 1, f"--prof: {self.prof} is not a positive count")

    @property
    def max_batches(self) -> int | None:
        """Largest number of validation batches on each rank; None for all."""
        return None if self.prof < 0 else self.prof

    def accumulation_steps(self, batch_size: int, world_size: int) -> int:
        """Return the number of micro-batches per optimizer step.

        Raises:
            ConfigError: `--optimizer-batch-size` is not a multiple of the images of one pass.
        """
        if self.optimizer_batch_size == -1:
            return 1
        at_once = batch_size * world_size
        check(
            self.optimizer_batch_size >= at_once and self.optimizer_batch_size % at_once == 0,
            f"--optimizer-batch-size: {self.optimizer_batch_size} is not a multiple of --batch-size {batch_size} × "
            f"{world_size} process(es) = {at_once}; change one of them",
        )
        return self.optimizer_batch_size // at_once
