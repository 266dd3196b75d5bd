"""The loader protocol, its batch, and the cursor shared by all backends.

A cursor is (epoch, step) of the *consumer*: while batch k is being processed it is k + 1, however far the backend has
prefetched. Training continues from the cursor, so that leaving the loop in the middle of an epoch and re-entering it,
or loading a state into a new process, continues with the next sample. Evaluation always starts from the beginning. A
saved cursor counts samples, so that more or fewer processes can continue from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from image_classification.config import SettingError
from image_classification.data.bad_samples import BadSamplePolicy, BadSamples
from image_classification.data.decode import Decoded
from image_classification.data.device_stage import DeviceStage
from image_classification.data.manifest import Manifest
from image_classification.data.mixup import Mixup
from image_classification.data.plan import BatchPlan, Planner
from image_classification.data.sending import sent
from image_classification.plain_data import Plain


@dataclass
class Batch:
    """A batch on the training device; unpacks as `images, targets = batch`.

    Attributes:
        images: (N, 3, H, W) float32, normalised. N may be less than the batch size, or 0, in evaluation.
        targets: (N,) int64 class indices, or (N, L) float32 multi-hot or soft.
        sample_ids: (N,) int64 on the host, rows of the manifest.
        boxes: Per sample (k, 4) and (k,) classes in crop pixels, on the host, if the loader was created with them.

    masks: (N, H, W) uint8 on the host, if the loader was made with them.
    """

    images: Tensor
    targets: Tensor
    sample_ids: Tensor
    boxes: list[tuple[Tensor, Tensor]] | None = None
    masks: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        yield self.images
        yield self.targets

    def __len__(self) -> int:
        return len(self.sample_ids)


@runtime_checkable
class Loader(Protocol):
    """Yields batches of one split to one rank.

    Attributes:
        num_samples: Number of samples of the split, over all ranks.
        num_classes: Number of classes.
        batch_size: Batch size per rank.
        num_substituted: Number of samples replaced by substitutes so far.
    """

    num_samples: int
    num_classes: int
    batch_size: int
    num_substituted: int

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the split; None for synthetic data."""
        ...

    def __len__(self) -> int:
        """Return the number of steps per epoch, equal on all ranks."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. If the cursor is already in this epoch, it keeps its step."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches to the epoch's end: in training from the cursor, else from the start."""
        ...

    def state_dict(self) -> Plain:
        """Return the cursor, and the properties of the data that it is valid for."""
        ...

    def load_state_dict(self, state: Plain) -> None:
        """Restore a state; ValueError if the data differ or no batch begins at its position."""
        ...

    def close(self) -> None:
        """Stop processes and threads and free buffers. The loader can be iterated again."""
        ...


class CursorLoader(ABC):
    """Cursor, state and resources of a loader, independent of the source of its batches."""

    def __init__(
        self,
        *,
        num_samples: int,
        num_classes: int,
        batch_size: int,
        num_steps: int,
        training: bool,
        seed: int,
        world_size: int,
        fingerprint: str,
    ) -> None:
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.training = training
        self.num_substituted = 0
        self._num_steps = num_steps
        self._epoch, self._step = 0, 0
        self._resumed = False
        self._global_batch = batch_size * world_size
        self._identity = {"seed": seed, "fingerprint": fingerprint}
        self._stream: Generator[Batch, None, None] | None = None
        self._stream_at = (0, 0)
        self._turn = 0

    @abstractmethod
    def _batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Yield batches from a position on: to the epoch's end, or, in training, on through all later epochs."""

    def __len__(self) -> int:
        return self._num_steps

    def set_epoch(self, epoch: int) -> None:
        """See `Loader.set_epoch`."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        """See `Loader.__iter__`."""
        self._turn += 1
        turn, epoch = self._turn, self._epoch
        if not self.training and not self._resumed:
            self._step = 0
        self._resumed = False
        for step in range(self._step, self._num_steps):
            try:
                batch = next(self._stream_from(epoch, step))
            except BaseException:  # a stream that raised cannot continue, whatever the reason
                self._end_stream()
                raise
            self._step = step + 1
            at_end = self.training and step + 1 == self._num_steps
            self._stream_at = (epoch + 1, 0) if at_end else (epoch, step + 1)
            yield batch
            if turn != self._turn:
                raise RuntimeError(
                    "this loader is being iterated again: an older loop over it cannot continue"
                )
        self._step = 0
        if self.training:
            self._epoch = epoch + 1
        else:
            self._end_stream()

    def _stream_from(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Return the running stream if it is at this position, else a new one."""
        if self._stream is None or self._stream_at != (epoch, step):
            self._end_stream()
            self._stream = self._batches(epoch, step)
        return self._stream

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def state_dict(self) -> Plain:
        """See `Loader.state_dict`: plain numbers and strings."""
        position = {"epoch": self._epoch, "step": self._step, "global_batch": self._global_batch}
        return {**position, **self._identity}

    def load_state_dict(self, state: Plain) -> None:
        """See `Loader.load_state_dict`.

        Raises:
            ValueError: Data, augmentation or seed differ from the state's, or its position lies within one of this
                loader's batches.
        """
        hints = {
            "seed": "give the same `seed`",
            "fingerprint": "the files, their targets, or the image size and augmentation flags were changed",
        }
        missing = {"epoch", "step", "global_batch", *hints} - state.keys()
        if missing:
            raise ValueError(f"this is not a loader state: {', '.join(sorted(missing))} missing")
        for name, hint in hints.items():
            if state[name] != self._identity[name]:
                raise ValueError(
                    f"cannot resume in the middle of the data: {name} was {state[name]}, is {self._identity[name]} "
                    f"({hint}, or start with `pretrained_weights` instead of `resume`)"
                )
        num_done = int(state["step"]) * int(state["global_batch"])
        step, within = divmod(num_done, self._global_batch)
        if within:
            raise ValueError(
                f"cannot resume in the middle of a batch: {num_done} samples of the epoch are done, and all processes "
                f"together now take {self._global_batch} at a time: choose `batch_size` so that processes × "
                f"`batch_size` divides {num_done} ({state['global_batch']} did)"
            )
        self._epoch, self._step = int(state["epoch"]), step
        self._resumed = True

    def close(self) -> None:
        """See `Loader.close`."""
        self._end_stream()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Options for executing a plan; its content is up to the planner.

    Attributes:
        on_bad_sample: Policy for unreadable images.
        mixup: Mixing of batches, or None.
        with_boxes, with_masks: Whether batches include them.
        prefetch: Number of batches prefetched.
        workers: Number of decoding processes or threads; 0 to decode in this process.
    """

    on_bad_sample: BadSamplePolicy = "stop"
    mixup: Mixup | None = None
    with_boxes: bool = False
    with_masks: bool = False
    prefetch: int = 2
    workers: int = 2


class PlannedLoader(CursorLoader):
    """A loader of images that executes a plan. A backend is a subclass that implements `decoded`.

    Args:
        manifest: The split.
        planner: Its plan on this rank.
        stage: Turns uint8 images into normalised float32 images on the training device.
        options: Mixing, annotations, workers.

    Attributes:
        samples: The samples known to be unreadable, and their policy.

    Raises:
        SettingError: Boxes or masks are combined with automatic augmentation or mixing, which they do not follow.
    """

    def __init__(
        self, manifest: Manifest, planner: Planner, stage: DeviceStage, options: LoaderOptions
    ) -> None:
        policy = planner.policy
        mixup = options.mixup
        annotated = options.with_boxes or options.with_masks
        problem = "boxes and masks do not follow it: switch it off"
        if annotated and policy is not None:
            raise SettingError("auto_augment", policy.name, problem)
        if annotated and mixup is not None:
            setting = "mixup" if mixup.mixup else "cutmix"
            raise SettingError(setting, mixup.mixup or mixup.cutmix, problem)
        policy_name = "none" if policy is None else policy.name
        mixing = "none" if mixup is None else f"{mixup.mixup:g},{mixup.cutmix:g}"
        super().__init__(
            num_samples=len(manifest),
            num_classes=len(manifest.class_names),
            batch_size=planner.batch_size,
            num_steps=planner.num_steps,
            training=planner.training,
            seed=planner.seed,
            world_size=planner.world_size,
            fingerprint=f"{manifest.fingerprint} {planner.geometry} auto-augment={policy_name} mixup={mixing}",
        )
        self.manifest = manifest
        self.planner = planner
        self.stage = stage
        self.mixup = mixup
        self.samples = BadSamples(manifest, options.on_bad_sample)
        self.with_boxes = options.with_boxes
        self.with_masks = options.with_masks
        self.prefetch = options.prefetch
        self.workers = options.workers

    @abstractmethod
    def decoded(self, plans: Iterator[BatchPlan]) -> Generator[Decoded, None, None]:
        """Execute non-empty plans in order: one `Decoded` for each."""

    def plans(self, epoch: int, step: int) -> Iterator[BatchPlan]:
        """Yield the rank's plans from a position on, with known bad samples replaced and empty plans left out."""
        for at_epoch, at_step in self.planner.positions(epoch, step):
            ids = self.samples.resolve(self.planner.ids(at_epoch, at_step))
            if ids.size:
                yield self.planner.plan(at_epoch, at_step, ids)

    def _batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """See `CursorLoader._batches`."""
        on_host = self._on_host(epoch, step)
        if self.stage.device.type != "cuda":
            return on_host
        return _on_side_stream(on_host, self.stage.device)

    def _on_host(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Yield batches in order; a rank without samples in a step gets an empty batch."""
        decoded = self.decoded(self.plans(epoch, step))
        try:
            for at_epoch, at_step in self.planner.positions(epoch, step):
                planned = self.planner.ids(at_epoch, at_step)
                if planned.size == 0:
                    empty = torch.empty((0, *self.planner.geometry.size, 3), dtype=torch.uint8)
                    yield self._finish(Decoded(self.planner.plan(at_epoch, at_step, planned), empty))
                    continue
                result = next(decoded)
                self.samples.report(result.bad)
                self.num_substituted += int((result.plan.sample_ids != planned).sum())
                yield self._finish(result)
        finally:
            decoded.close()

    def _finish(self, decoded: Decoded) -> Batch:
        """Apply the device stage, targets and mixing."""
        plan = decoded.plan
        table = self.manifest.targets
        images = self.stage(decoded.images, plan.operations)
        targets = sent(table.lookup(plan.sample_ids), images.device)
        batch = Batch(images, targets, torch.from_numpy(plan.sample_ids))
        if self.mixup is not None:
            batch.images, batch.targets = self.mixup(images, targets, plan)
        if self.with_boxes:
            batch.boxes = table.boxes_in(plan.sample_ids, plan.windows, plan.flips, plan.size)
        if self.with_masks:
            batch.masks = table.masks_in(
                self.manifest.root, plan.sample_ids, plan.windows, plan.flips, plan.size
            )
        return batch


def _on_side_stream(
    batches: Generator[Batch, None, None], device: torch.device
) -> Generator[Batch, None, None]:
    """Copy and finish batches on a side stream, so that the next batch overlaps with the consumer's computation."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # constants and resident images were created there
    try:
        while True:
            with torch.cuda.stream(side):
                batch = next(batches, None)
            if batch is None:
                return
            consumer = torch.cuda.current_stream(device)
            consumer.wait_stream(side)
            for tensor in (batch.images, batch.targets):
                tensor.record_stream(consumer)
            yield batch
    finally:
        batches.close()
