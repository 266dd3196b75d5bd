"""Callbacks of predictor and selector training: choosing the best model, logging loss parts, showing masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from explainers.aem.objectives import SelectorObjective
from image_classification.callbacks import Callback, TrainLoop
from image_classification.config import check
from image_classification.data.loader import Loader
from image_classification.extras import optional_import
from image_classification.observe.figures import Figure, register_figures
from image_classification.plain_data import Plain

with optional_import():
    from torchvision.utils import make_grid

register_figures(
    "train",
    {"kl": Figure(".4f", steers=True), "area": Figure(".4f", steers=True), "tv": Figure(".2f")},
)
register_figures(
    ("held_out", "val"),
    {
        "kl": Figure(".4f", steers=True),
        "agreement": Figure(".2f", "%", steers=True),
        "area": Figure(".2f", "%", steers=True),
        "samples": Figure(".0f"),
    },
)

BestBy = Literal["agreement", "kl"]
Measure = Callable[[nn.Module, Loader], dict[str, float]]


class Judge(Callback):
    """Keeps the model that scores best on held-out training images; validation images are only measured.

    The model is judged on the held-out images every `interval` iterations and at the end of each epoch; if it beats the
    best so far, it is saved as the run's best. Validation figures are logged at the end of each epoch and have no
    influence on that choice.

    Args:
        name: Key of the record in checkpoints.
        record: Description of the model for its file (plain data); the figures are added under `figures`.
        measure: Measures the model on a loader and returns figures, including `agreement`. Collective.
        held_out: Training images held out from training.
        val: Validation split, or None.
        interval: Iterations between two judgements.
        best_by: "agreement" (the higher the better, as published) or "kl" (the lower the better).
    """

    def __init__(
        self,
        name: str,
        record: Mapping[str, object],
        measure: Measure,
        held_out: Loader,
        val: Loader | None,
        interval: int,
        best_by: BestBy,
    ) -> None:
        self.name = name
        self.best_by = best_by
        self.record = dict(record)
        self.measure = measure
        self.held_out = held_out
        self.val = val
        self.interval = interval

    def on_step_end(self, trainer: TrainLoop) -> None:
        """Judge the model if an interval has passed."""
        if trainer.state.iteration % self.interval == 0:
            self._judge(trainer)

    def on_epoch_end(self, trainer: TrainLoop) -> None:
        """Judge the model unless the last iteration just did; measure the validation split."""
        if trainer.state.iteration % self.interval:
            self._judge(trainer)
        if self.val is not None:
            share_buffers(trainer)
            figures = self.measure(trainer.state.model, self.val)
            self._log(trainer, "val", figures)

    def _judge(self, trainer: TrainLoop) -> None:
        share_buffers(trainer)
        figures = self.measure(trainer.state.model, self.held_out)
        self._log(trainer, "held_out", figures)
        state = trainer.state
        score = -figures["kl"] if self.best_by == "kl" else figures["agreement"]
        # Of two models with equal scores, the one trained longer is kept; any score beats one that is not finite (NaN).
        if state.best is None or math.isnan(state.best) or score >= state.best:
            state.best = score
            self.record["figures"] = figures | {"iteration": float(state.iteration)}
            trainer.save(is_best=True)

    def _log(self, trainer: TrainLoop, prefix: str, figures: Mapping[str, float]) -> None:
        state = trainer.state
        trainer.logger.scalars(prefix, figures, (state.epoch,), state.iteration)

    def state_dict(self) -> dict[str, object]:
        """Return the record and the figure that the best model is chosen by."""
        return {**self.record, "best_by": self.best_by}

    def load_state_dict(self, state: Plain) -> None:
        """Restore the figures; `check_record` has already compared the model's description.

        Raises:
            ConfigError: The best so far was chosen by another figure, which cannot be compared with this one.
        """
        before = state.get("best_by", self.best_by)
        check(
            before == self.best_by,
            f"--best-by {self.best_by}: the run to --resume keeps its best by {before}: give --best-by {before}",
        )
        self.record["figures"] = dict(state.get("figures", {}))


class LossParts(Callback):
    """Adds the parts of the selector's loss to the figures of every logging step."""

    def __init__(self, objective: SelectorObjective) -> None:
        self.objective = objective

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Add `train.kl`, `train.area` and `train.tv`."""
        parts = self.objective.read_parts(trainer.distributed)
        figures |= {f"train.{name}": value for name, value in parts.items()}


class FixedImages(Callback):
    """Shows the masks of the same images over training in TensorBoard: image, mask, masked image.

    Args:
        masks: Returns the masks (N, 1, S, S) of images under the model's current weights.
        loader: Its first images are shown.
        interval: Iterations between two pages.
    """

    num_images = 8

    def __init__(self, masks: Callable[[nn.Module, Tensor], Tensor], loader: Loader, interval: int) -> None:
        self.masks = masks
        self.loader = loader
        self.interval = interval
        self._images: Tensor | None = None

    def on_fit_start(self, trainer: TrainLoop) -> None:
        """Read the images and show the masks that training begins with."""
        self.loader.set_epoch(0)
        batch = next(iter(self.loader))
        self._images = batch.images[: self.num_images].clone()
        self._show(trainer)

    def on_step_end(self, trainer: TrainLoop) -> None:
        """Show the masks if an interval has passed."""
        if trainer.state.iteration % self.interval == 0:
            self._show(trainer)

    @torch.no_grad()
    def _show(self, trainer: TrainLoop) -> None:
        if self._images is None or not len(self._images):
            return
        with trainer.precision.autocast():
            masks = self.masks(trainer.state.model, self._images).float()
        grid = mask_grid(self._images.float(), masks)
        trainer.logger.image("masks/fixed_images", grid, trainer.state.iteration)


def mask_grid(images: Tensor, masks: Tensor) -> Tensor:
    """Build rows of image, mask and masked image side by side, (3, height, width) in [0, 1].

    Args:
        images: (N, 3, S, S), normalised; each is stretched to its own range.
        masks: (N, 1, S, S) in [0, 1].
    """
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shown = (images - low) / (high - low).clamp(min=1e-6)
    triples = torch.stack([shown, masks.expand_as(shown), shown * masks], 1)
    grid: Tensor = make_grid(triples.flatten(0, 1), nrow=3)
    return grid


def share_buffers(trainer: TrainLoop) -> None:
    """Broadcast rank 0's batch-norm statistics to all ranks, as the saved model will have them. Collective."""
    if trainer.distributed.world_size > 1:
        for buffer in trainer.state.model.buffers():
            torch.distributed.broadcast(buffer, src=0)
