"""A page of Grad-CAM maps of the network in training, in TensorBoard after every validation."""

from __future__ import annotations

import torch
from torch import Tensor

from explainers.attribution.gradcam import GradCAM
from explainers.attribution.record import UnsupportedOperatorError
from explainers.plots import overlay
from image_classification.callbacks import Callback, TrainLoop
from image_classification.data.loader import Batch


class SaliencyGallery(Callback):
    """Explains the same few images after every validation: the first ones that the run trains on.

    The maps are computed on a copy of the network in evaluation mode, so that training is not affected. A network
    pruned meanwhile is copied at its current widths. Rank 0 only.

    Args:
        num_images: Number of images on the page.
    """

    def __init__(self, num_images: int = 8) -> None:
        self.num_images = num_images
        self._chosen: tuple[Tensor, Tensor] | None = None
        self._possible = True

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Keep the first images."""
        if self._chosen is None and trainer.distributed.is_main:
            targets = batch.targets[: self.num_images]
            classes = targets if targets.dim() == 1 else targets.argmax(1)
            self._chosen = batch.images[: self.num_images].detach().float().clone(), classes.clone()

    def on_evaluate_end(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Explain the kept images; warn once if Grad-CAM cannot explain the network."""
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
    """Arrange images above their maps, (3, 2·H, N·W) in [0, 1]; each image is scaled by its own range."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shown = ((images - low) / (high - low).clamp(min=1e-6)).cpu()
    columns = []
    for image, heatmap in zip(shown, maps.cpu(), strict=True):
        below = overlay(image.permute(1, 2, 0).numpy(), heatmap.numpy(), False)
        columns.append(torch.cat([image, torch.from_numpy(below).permute(2, 0, 1).float()], dim=1))
    return torch.cat(columns, dim=2).clamp(0, 1)
