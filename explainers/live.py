"""What a network looks at while it trains: a page of Grad-CAM maps in TensorBoard after every validation."""

from __future__ import annotations

import torch
from torch import Tensor

from explainers.gradcam import GradCAM
from explainers.plots import overlay
from explainers.record import UnsupportedOperatorError
from image_classification.callbacks import Callback
from image_classification.data.loader import Batch
from image_classification.trainer import Trainer


class SaliencyGallery(Callback):
    """Explains the same few pictures again and again, those that the run trained on first.

    The maps are computed on a copy of the network in evaluation mode, so training does not notice; pruned networks are
    copied at the width that they have by then. Rank 0 only.

    Args:
        num_pictures: Pictures of the page.
    """

    def __init__(self, num_pictures: int = 8) -> None:
        self.num_pictures = num_pictures
        self._chosen: tuple[Tensor, Tensor] | None = None
        self._possible = True

    def on_batch_start(self, trainer: Trainer, batch: Batch) -> None:
        """Keep the first pictures."""
        if self._chosen is None and trainer.distributed.is_main:
            targets = batch.targets[: self.num_pictures]
            classes = targets if targets.dim() == 1 else targets.argmax(1)
            self._chosen = batch.images[: self.num_pictures].detach().float().clone(), classes.clone()

    def on_evaluate_end(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """Explain them; a network that Grad-CAM cannot explain is a message, once."""
        if self._chosen is None or not self._possible:
            return
        images, classes = self._chosen
        try:
            maps = GradCAM().prepare(trainer.state.model, images[:1])(images, classes).map
        except (UnsupportedOperatorError, TypeError, ValueError) as error:
            self._possible = False
            trainer.logger.message(f"no saliency maps in TensorBoard: {error}")
            return
        trainer.logger.image("explanations/gradcam", _page(images, maps), trainer.state.iteration)


def _page(images: Tensor, maps: Tensor) -> Tensor:
    """Pictures above their maps, (3, 2·H, N·W) in [0, 1]; each picture is scaled by its own range."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shown = ((images - low) / (high - low).clamp(min=1e-6)).cpu()
    columns = []
    for picture, heatmap in zip(shown, maps.cpu(), strict=True):
        below = overlay(picture.permute(1, 2, 0).numpy(), heatmap.numpy(), False)
        columns.append(torch.cat([picture, torch.from_numpy(below).permute(2, 0, 1).float()], dim=1))
    return torch.cat(columns, dim=2).clamp(0, 1)
