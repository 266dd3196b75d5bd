"""Calibration batches in chunks of a few images: most are fitted, some are held out for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

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
    chunks = _held_out_together(chunks, size, task)
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


def _held_out_together(chunks: Sequence[Chunk], size: int, task: Task) -> list[Chunk]:
    """Join the images held out of several batches to chunks of at most `size`: small ones take longer per image."""
    found: list[Chunk] = []
    last: int | None = None
    for chunk in chunks:
        joined = None
        if chunk.held_out and task.divides(chunk.batch):
            if last is not None and found[last].num_images + chunk.num_images <= size:
                joined = _joined(found[last], chunk)
            if last is not None and joined is not None:
                found[last] = joined
                continue
            last = len(found)
        found.append(chunk)
    return found


def _joined(first: Chunk, second: Chunk) -> Chunk | None:
    """Return both chunks as one, or None if their batches differ in anything but the images."""
    leaves, form = tree_flatten(first.batch)
    others, other_form = tree_flatten(second.batch)
    if form != other_form:
        return None
    joined: list[object] = []
    for one, other in zip(leaves, others, strict=True):
        if _per_image(one, first.num_images) and _per_image(other, second.num_images):
            if (one.dtype, one.shape[1:]) != (other.dtype, other.shape[1:]):
                return None
            joined.append(torch.cat([one, other]))
        elif one is other:
            joined.append(one)
        else:
            return None
    return Chunk(tree_unflatten(joined, form), first.num_images + second.num_images, True)


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

    return tree_map(lambda leaf: leaf[start:stop] if _per_image(leaf, count) else leaf, batch)


def _per_image(leaf: object, count: int) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count
