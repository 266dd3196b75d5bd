"""The last stage, shared by all backends: automatic augmentation on uint8 images, normalisation, memory format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from image_classification.config import check_setting
from image_classification.data.augment import Operations, apply_operations
from image_classification.data.sending import sent

_NUM_AT_ONCE = 4


class DeviceStage:
    """Converts uint8 images to normalised float32 on the training device.

    Args:
        mean, std: Constants per channel, for pixel values scaled to 0 … 1.
        device: Device of the result.
        memory_format: `torch.contiguous_format` or `torch.channels_last`.

    Raises:
        SettingError: There are not three channels, or a deviation is not positive.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        check_setting(len(mean) == 3, "mean", mean, "give three numbers")
        check_setting(len(std) == 3 and min(std) > 0, "std", std, "give three positive numbers")
        self.device = device
        self.memory_format = memory_format
        self._scale = [1.0 / (255.0 * deviation) for deviation in std]
        self._offset = [centre / deviation for centre, deviation in zip(mean, std, strict=True)]
        self._scale_tensor = torch.tensor(self._scale, device=device).view(3, 1, 1)
        self._offset_tensor = torch.tensor(self._offset, device=device).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, operations: Operations | None = None) -> Tensor:
        """Finish a batch.

        Args:
            pixels: (N, H, W, 3) uint8, on the host or the device; not modified, and not referenced by the result.
            operations: Automatic augmentation of these N images.

        Returns:
            (N, 3, H, W) float32 on the device.
        """
        pixels = sent(pixels, self.device).permute(0, 3, 1, 2)
        if operations is not None and len(pixels):
            pixels = apply_operations(pixels, operations)
        images = torch.empty(pixels.shape, device=self.device, memory_format=self.memory_format)
        if self.device.type != "cpu":
            torch.mul(pixels, self._scale_tensor, out=images)
            return images.sub_(self._offset_tensor)
        # Processing a few images at a time keeps them in the cache, twice as fast as whole batches.
        for start in range(0, len(images), _NUM_AT_ONCE):
            some = slice(start, start + _NUM_AT_ONCE)
            self._normalise(pixels[some], images[some])
        return images

    def _normalise(self, pixels: Tensor, images: Tensor) -> None:
        """Normalise with each memory format's longest possible innermost loop, which is fastest on a CPU."""
        if self.memory_format == torch.channels_last:
            num, _, height, width = images.shape
            rows = images.permute(0, 2, 3, 1).view(num, height, width * 3)
            rows.copy_(pixels.permute(0, 2, 3, 1).reshape(num, height, width * 3))
            rows.mul_(self._scale_tensor.view(3).repeat(width)).sub_(
                self._offset_tensor.view(3).repeat(width)
            )
            return
        for channel, (scale, offset) in enumerate(zip(self._scale, self._offset, strict=True)):
            images[:, channel].copy_(pixels[:, channel]).mul_(scale).sub_(offset)
