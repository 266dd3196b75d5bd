"""The synthetic backend: one random batch, repeated. It measures the speed of the rest of the job."""

from __future__ import annotations

from collections.abc import Generator

import torch

from image_classification.config import SettingError
from image_classification.data.backends.backend import register_backend
from image_classification.data.loader import Batch, CursorLoader
from image_classification.data.philox import Stream, words64


@register_backend("synthetic", aliases=("syntetic",), needs_dataset=False)
class SyntheticLoader(CursorLoader):
    """Yields the same batch of noise, on the device from the start.

    Args:
        num_samples: Number of samples per epoch over all ranks.
        num_classes: Number of classes of the random labels.
        size: Height and width of the images.
        batch_size: Batch size per rank.
        device, memory_format: Device and memory format of the images.
        training: Drop the incomplete last batch, and continue from epoch to epoch.
        multi_label: Multi-hot targets instead of a class index.
        seed, rank, world_size: The batch is a function of seed and rank.

    Raises:
        SettingError: Training has fewer samples than a global batch.
    """

    manifest = None

    def __init__(
        self,
        *,
        num_samples: int,
        num_classes: int,
        size: tuple[int, int],
        batch_size: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        training: bool = False,
        multi_label: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        full, rest = divmod(num_samples, batch_size * world_size)
        super().__init__(
            num_samples=num_samples,
            num_classes=num_classes,
            batch_size=batch_size,
            num_steps=full if training else full + (rest > 0),
            training=training,
            seed=seed,
            world_size=world_size,
            fingerprint=f"synthetic {num_samples} {num_classes} {size}",
        )
        if training and full == 0:
            problem = f"{num_samples} synthetic samples are fewer than {world_size} × {batch_size}: lower it"
            raise SettingError("batch_size", batch_size, problem)
        self.rank = rank
        self.world_size = world_size
        generator = torch.Generator().manual_seed(
            int(words64(seed, Stream.SYNTHETIC, 0, [rank], 1)[0, 0] >> 1)
        )
        images = torch.randn((batch_size, 3, *size), generator=generator)
        self._images = images.to(device, memory_format=memory_format)
        targets = torch.randint(num_classes, (batch_size,), generator=generator)
        if multi_label:
            targets = torch.nn.functional.one_hot(targets, num_classes).float()
        self._targets = targets.to(device)

    def _batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """See `CursorLoader._batches`."""
        while True:
            for at_step in range(step, len(self)):
                start = (at_step * self.world_size + self.rank) * self.batch_size
                num = max(0, min(self.batch_size, self.num_samples - start))
                yield Batch(self._images[:num], self._targets[:num], torch.arange(start, start + num))
            if not self.training:
                return
            step = 0
