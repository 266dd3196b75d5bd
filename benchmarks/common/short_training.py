"""A short training of a small network on images in memory, with the same steps for every method of a benchmark.

One cycle of the learning rate, SGD with Nesterov momentum, label smoothing, a translation by up to two pixels, and
flips that alternate: an image is mirrored in every second epoch, so that two epochs show both sides of all images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

_PAD = 2
_SMOOTHING = 0.1
_MOMENTUM = 0.9
_WEIGHT_DECAY = 5e-4
_JUDGED_AT_ONCE = 500

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ImagesInMemory:
    """Normalised images (N, 3, H, W) float32 and classes (N,) of both splits; `calibration` is held out of training."""

    train: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.train[1].max()) + 1

    def to(self, device: torch.device) -> ImagesInMemory:
        """Return the images on a device."""
        train, calibration, val = (
            (images.to(device), labels.to(device))
            for images, labels in (self.train, self.calibration, self.val)
        )
        return ImagesInMemory(train, calibration, val)


def read_images(folder: Path | None, cache: Path, num_calibration: int) -> ImagesInMemory:
    """Decode `train` and `val` (or `test`) class folders of equally large images, once for all runs.

    Args:
        folder: Folder with class folders for each split; None for a little noise, for quick runs.
        cache: File that caches the decoded pixels.
        num_calibration: Number of training images to hold out, equally many of every class; the same in all runs.
    """
    if not cache.is_file():
        if folder is None:
            splits = {"train": _noise(600), "val": _noise(100)}
        else:
            val = next(split for split in (folder / "val", folder / "test") if split.is_dir())
            splits = {"train": _decoded(folder / "train"), "val": _decoded(val)}
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(splits, cache)
    splits = torch.load(cache, weights_only=True)
    pixels, labels = splits["train"]
    mean, std = (f(pixels[::10].float(), dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    per_class = math.ceil(num_calibration / (int(labels.max()) + 1))
    held = torch.cat([order[labels[order] == c][:per_class] for c in labels.unique()])
    rest = order[~torch.isin(order, held)]

    def normalised(chosen: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (pixels[chosen].float() - mean) / std
        return scaled.contiguous(memory_format=torch.channels_last), labels[chosen]

    shuffled = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(1))]
    val_pixels, val_labels = splits["val"]
    return ImagesInMemory(
        normalised(rest), normalised(shuffled), ((val_pixels.float() - mean) / std, val_labels)
    )


def _noise(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8), torch.arange(count) % 10


def _decoded(split: Path) -> tuple[Tensor, Tensor]:
    pixels, labels = [], []
    for label, folder in enumerate(sorted(path for path in split.iterdir() if path.is_dir())):
        for path in sorted(folder.iterdir()):
            pixels.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps and learning rate: up to `peak` within the first `rise` of all steps, down to 0 in the others."""

    epochs: float
    peak: float
    batch_size: int = 256
    rise: float = 0.15

    def num_steps(self, num_images: int) -> int:
        """Return the number of optimizer steps of the training."""
        return round(self.epochs * (num_images // self.batch_size))

    def rate(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        done = (step + 0.5) / num_steps
        return self.peak * min(done / self.rise, (1 - done) / (1 - self.rise))


def make_optimizer(model: nn.Module) -> torch.optim.SGD:
    """Create SGD with weight decay, except on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=_MOMENTUM, nesterov=True)


class ShortTraining:
    """The loop. A pruning method is called through hooks, and may replace the network.

    Args:
        model: Trained in place.
        images: Splits.
        schedule: Steps and learning rate.
        seed: Seed of order and translation.
        bf16: Whether forward passes run under autocast to bfloat16.
    """

    def __init__(
        self, model: nn.Module, images: ImagesInMemory, schedule: Schedule, seed: int, *, bf16: bool = False
    ) -> None:
        self.bf16 = bf16
        self.model = model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(model)
        self.images, self.schedule, self.seed = images, schedule, seed
        self.num_steps = schedule.num_steps(len(images.train[1]))
        self.teacher: nn.Module | None = None

    def run(
        self,
        *,
        after_backward: Callable[[], None] = lambda: None,
        after_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Train.

        Args:
            after_backward: Called between backward pass and optimizer step.
            after_step: Called with the number of steps done.
        """
        for step, (shown, targets) in enumerate(self._batches()):
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.rate(step, self.num_steps)
            self.model.train()
            self.optimizer.zero_grad()
            self._loss(shown, targets).backward()
            after_backward()
            self.optimizer.step()
            after_step(step + 1)

    def _loss(self, shown: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(self.model, shown, bf16=self.bf16)
        loss = nn.functional.cross_entropy(logits, targets, label_smoothing=_SMOOTHING)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            wanted = logits_of(self.teacher, shown, bf16=self.bf16).softmax(1)
        return 0.5 * loss + 0.5 * nn.functional.cross_entropy(logits, wanted)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the augmented batches of all steps."""
        random = torch.Generator().manual_seed(
            self.seed
        )  # on the host, so that all devices see the same order
        pixels, labels = self.images.train
        mirrored = (torch.rand(len(labels), generator=random) < 0.5).to(labels.device)
        size, left = self.schedule.batch_size, self.num_steps
        while left:
            order = torch.randperm(len(labels), generator=random).to(labels.device)
            for start in range(0, len(order) - size + 1, size)[:left]:
                chosen = order[start : start + size]
                yield augmented(pixels[chosen], mirrored[chosen], random), labels[chosen]
            left -= min(left, len(order) // size)
            mirrored = ~mirrored


def augmented(batch: Tensor, mirrored: Tensor, random: torch.Generator) -> Tensor:
    """Shift images by up to two pixels both ways (edges reflected), and mirror some of them.

    Args:
        batch: (N, 3, H, W).
        mirrored: (N,) bool.
        random: Draws the translations.
    """
    count, _, height, width = batch.shape
    device = batch.device
    padded = nn.functional.pad(batch, (_PAD,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * _PAD + 1, (2, count, 1), generator=random).to(device)
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    number = torch.arange(count, device=device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def logits_of(model: nn.Module, shown: Tensor, *, bf16: bool) -> Tensor:
    """Run a forward pass and return logits (N, classes) float32."""
    with torch.autocast(shown.device.type, torch.bfloat16, enabled=bf16):
        logits: Tensor = model(shown)
    return logits.float()


@torch.no_grad()
def top1(model: nn.Module, images: tuple[Tensor, Tensor], *, bf16: bool = False) -> float:
    """Return the percentage of images whose largest logit is their class."""
    model.eval()
    right = 0
    for shown, labels in zip(images[0].split(_JUDGED_AT_ONCE), images[1].split(_JUDGED_AT_ONCE), strict=True):
        logits = logits_of(model, shown.contiguous(memory_format=torch.channels_last), bf16=bf16)
        right += int((logits.argmax(1) == labels).sum())
    return 100 * right / len(images[1])
