"""Calibration batches in chunks of a few images: most are fitted, some are held out for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from image_classification.config import SettingError
from image_classification.distributed import Distributed
from pruning.task import Batch, Task, inputs_or_parts, num_samples

_FEW = 2


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A few images of a batch.

    Attributes:
        batch: The batch, with the first dimension of its tensors cut.
        num_images: Number of images in it.
        held_out: Whether the images are held out from fitting.
    """

    batch: Batch
    num_images: int
    held_out: bool


def parted(batches: Sequence[Batch], share: float, task: Task) -> list[Chunk]:
    """Divide every batch into images to fit and images to hold out.

    Args:
        batches: Calibration batches. A batch that cannot be divided is held out or fitted as a whole.
        share: Share of the images to hold out.
        task: Determines which batches can be divided.
    """
    parts: list[Chunk] = []
    for number, batch in enumerate(batches):
        count = num_samples(batch)
        if count and not task.divides(batch):
            held_out = int((number + 1) * share) > int(number * share)
            parts.append(Chunk(batch, count, held_out))
        elif count:
            spared = min(max(round(count * share), 1), count - 1)
            parts.append(Chunk(_part(batch, count, spared, count), count - spared, False))
            if spared:
                parts.append(Chunk(_part(batch, count, 0, spared), spared, True))
    return parts


def chunks_of(
    batches: Sequence[Batch], share: float, size: int, task: Task, distributed: Distributed
) -> list[Chunk]:
    """Divide batches into chunks of at most `size` images, holding out a share of every batch. Collective.

    If no batch is large enough to spare an image, all images are used for both fitting and evaluation. Batches that
    cannot be divided become whole chunks, of which about this share is held out.

    Raises:
        SettingError: There are no images on some rank, or all images are identical.
    """
    chunks: list[Chunk] = []
    for part in parted(batches, share, task):
        count = part.num_images
        if count <= size or not task.divides(part.batch):
            chunks.append(part)
            continue
        for start in range(0, count, size):
            stop = min(start + size, count)
            chunks.append(Chunk(_part(part.batch, count, start, stop), stop - start, part.held_out))
    device = next(
        (leaf.device for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)), torch.device("cpu")
    )
    here = torch.tensor([not chunks, any(chunk.held_out for chunk in chunks)], device=device).double()
    (total,) = distributed.all_reduce_sum(here)
    without, judging = total.tolist()
    if without:
        where = (
            "" if not distributed.is_distributed else f" on {without:.0f} of {distributed.world_size} ranks"
        )
        raise SettingError(
            "calibration",
            None,
            f"a repair needs images, and there are none{where}: give some, or repair='none'",
        )
    if not judging:
        chunks = [*chunks, *(dataclasses.replace(chunk, held_out=True) for chunk in chunks)]
    return chunks


def few_of(chunk: Chunk, task: Task) -> Chunk:
    """Return the first images of a chunk, enough to see what a network does with them; all if it cannot be divided."""
    if chunk.num_images <= _FEW or not task.divides(chunk.batch):
        return chunk
    return Chunk(_part(chunk.batch, chunk.num_images, 0, _FEW), _FEW, chunk.held_out)


def check_differ(chunks: Sequence[Chunk], distributed: Distributed) -> None:
    """Refuse images that are all identical, since a fit to them does not generalise. Collective.

    Raises:
        SettingError: All images are identical.
    """
    first: list[Tensor] | None = None
    found: list[Tensor] = []
    for chunk in chunks:
        parts = tree_leaves(inputs_or_parts(chunk.batch))
        leaves = [leaf for leaf in parts if _is_images(leaf, chunk.num_images)]
        first = first or [leaf[:1] for leaf in leaves]
        found += [(leaf != one).any().double() for leaf, one in zip(leaves, first, strict=True)]
    differ = torch.stack(found).sum() if found else torch.ones(())  # other values cannot be compared
    here = sum(chunk.num_images for chunk in chunks)
    counts = differ.new_tensor([here, here > 1])
    differing, count, several = torch.cat(distributed.all_reduce_sum(differ[None], counts)).tolist()
    if not differing and several:
        raise SettingError(
            "calibration",
            None,
            f"all {count:.0f} calibration images are equal (a single one is fitted to and held out), and weights "
            "fitted to them would fit nothing else: give different images, or repair='none'",
        )


def _is_images(leaf: object, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 1 and len(leaf) == count


def _part(batch: Batch, count: int, start: int, stop: int) -> Batch:
    """Return some images of a batch by cutting the tensors that have one entry per image."""

    def cut(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != count:
            return leaf
        return leaf[start:stop]

    return tree_map(cut, batch)
