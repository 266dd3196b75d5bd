"""CASM on the validation set after each epoch: accuracy on whole and on masked-out images, statistics of masks.

Here the mask is used unthresholded, in (0, 1); the published evaluations binarise it (`score-casm`, `eval-casm`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from explainers.casm.casm_objective import mask_figures, negative_entropy, summary
from explainers.casm.model import Casm
from image_classification.data.loader import Batch, Loader
from image_classification.distributed import Distributed
from image_classification.extras import optional_import
from image_classification.models import evaluating
from image_classification.observe.figures import Figure, register_figures
from image_classification.observe.log import Logger
from image_classification.precision import Precision

with optional_import():
    from torchvision.utils import make_grid

register_figures(
    ("train", "val"),
    {
        "masked_top1": Figure(".2f", "%", steers=True),
        "mask_mean": Figure(".3f", steers=True),
        "mask_std": Figure(".3f"),
        "mask_entropy": Figure(".3f", "nats"),
        "mask_tv": Figure(".4f"),
    },
)
register_figures("val", {"masked_entropy": Figure(".3f", "nats")})

_NUM_SHOWN = 8


class CasmValidation:
    """Measures a CASM on a loader; collective.

    Args:
        loader: Validation images.
        precision: Autocast of the forward passes.
        distributed: Ranks to sum over.
        max_batches: Largest number of batches on each rank, None for all.
    """

    def __init__(
        self, loader: Loader, precision: Precision, distributed: Distributed, max_batches: int | None = None
    ) -> None:
        self.loader = loader
        self.precision = precision
        self.distributed = distributed
        self.max_batches = max_batches

    def __call__(self, casm: Casm, logger: Logger, iteration: int) -> dict[str, float]:
        """Measure a CASM: `val.top1` on whole images, `val.masked_top1` and `val.masked_entropy` (nats) on masked-out
        ones, ….

        Classifier and decoder are in evaluation mode meanwhile; their modes are restored.
        """
        with evaluating(casm):
            return self._run(casm, logger, iteration)

    @torch.inference_mode()
    def _run(self, casm: Casm, logger: Logger, iteration: int) -> dict[str, float]:
        sums = torch.zeros(8, dtype=torch.float64, device=self.distributed.device)
        self.loader.set_epoch(0)
        num_batches = min(len(self.loader), self.max_batches or len(self.loader))
        batches = iter(self.loader)
        with logger.progress(num_batches, "validation") as bar:
            for index in range(num_batches):
                batch = next(batches)
                if len(batch):
                    mask, added = self._judge(casm, batch)
                    sums += added
                    if index == 0:
                        logger.image("casm/masks", _gallery(batch.images, mask), iteration)
                bar.update()
        (total,) = self.distributed.all_reduce_sum(sums)
        whole, masked, entropy, count = total[:4].tolist()
        figures = {
            "top1": 100 * whole / count if count else math.nan,
            "masked_top1": 100 * masked / count if count else math.nan,
            "masked_entropy": entropy / count if count else math.nan,
            **summary(total[4:], count),
            "samples": count,
        }
        return {f"val.{name}": value for name, value in figures.items()}

    def _judge(self, casm: Casm, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the masks of a batch, and the sums of its figures (8,)."""
        with self.precision.autocast():
            logits, mask = casm(batch.images)
            masked, _ = casm(batch.images * (1 - mask))
        right = (logits.argmax(1) == batch.targets).sum().double()
        still = (masked.argmax(1) == batch.targets).sum().double()
        entropy = -negative_entropy(masked).sum().double()
        count = torch.full_like(right, len(batch))
        return mask, torch.cat([torch.stack([right, still, entropy, count]), mask_figures(mask).sum(0)])


def _gallery(images: Tensor, mask: Tensor) -> Tensor:
    """Stack images, their masked-out versions and masks vertically: (3, H, W) in 0 … 1."""
    shown = images[:_NUM_SHOWN].float()
    low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
    bright = (shown - low) / (high - low).clamp(min=1e-6)
    masks = mask[:_NUM_SHOWN].float()
    rows = torch.cat([bright, bright * (1 - masks), masks.expand_as(bright)])
    grid: Tensor = make_grid(rows, nrow=len(shown))
    return grid
