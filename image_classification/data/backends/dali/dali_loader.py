"""The DALI backends: plans executed by an NVIDIA DALI pipeline, on the CPU or on the GPU.

The pipeline keeps no state: it is fed paths, windows and flips batch by batch (`external_source`), so that it can be
discarded and rebuilt (0.1 s) at any position. JPEGs are decoded only as far as the window reaches
(`decoders.image_slice`, bit-identical to cutting the whole image), and resized by the antialiased triangle filter:
DALI's own, except for training on the CPU, where torch's filter is five times as fast and equals Pillow's even at the
border (DALI's repeats the last pixel there).

DALI cannot name or skip a damaged file, and a missing or empty file kills its pipeline. So each file is checked once
before it is first fed, or by the scan of the data set if there was one; a suspicious file is decoded on the host to be
sure, and replaced if the policy says so. If DALI still fails, every file of the batch is decoded on the host, and a new
pipeline continues from there.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from image_classification.config import SettingError
from image_classification.data.backends.dali.graph import INPUTS, build_graph, regions, resize_parts
from image_classification.data.decode import Decoded, UnreadableError, decode_batch, open_sample
from image_classification.data.device_stage import DeviceStage
from image_classification.data.imagefile import read_header
from image_classification.data.loader import LoaderOptions, PlannedLoader
from image_classification.data.manifest import Manifest
from image_classification.data.plan import BatchPlan, Planner
from image_classification.plain_data import Plain

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

logger = logging.getLogger(__name__)

#: DALI's `Pipeline`, whose methods have no types, or None.
_Pipeline = Any


#: Messages of DALI and CUDA when memory runs out, and after errors that no pipeline of this process survives.
_OUT_OF_MEMORY = (
    "out of memory",
    "bad_alloc",
    "memory allocation",
    "allocation failed",
    "cudaErrorMemoryAllocation",
)
_FATAL = (
    "CUDA error",
    "CUDA runtime API error",
    "CUDA driver API error",
    "illegal memory access",
    "unspecified launch",
)
#: Number of DALI failures without a bad file after which the job ends, and of good batches after which they are
#: forgotten.
_MAX_UNEXPLAINED, _GOOD_BATCHES = 3, 200


class _Ahead(NamedTuple):
    """A prefetched plan.

    Attributes:
        plan: The plan, with substitutes.
        pipeline: The pipeline started on it, which may have died since; None if there is none.
        bad: Reasons by id for samples found unreadable.
    """

    plan: BatchPlan
    pipeline: _Pipeline
    bad: dict[int, str]


class DaliLoader(PlannedLoader):
    """See `PlannedLoader`.

    Args:
        gpu: Decode (nvJPEG, with the hardware decoder if there is one) and resize on the loader's CUDA device.
    """

    def __init__(
        self,
        manifest: Manifest,
        planner: Planner,
        stage: DeviceStage,
        options: LoaderOptions,
        *,
        gpu: bool = False,
    ) -> None:
        super().__init__(manifest, planner, stage, options)
        self.gpu = gpu
        self._pipeline: _Pipeline = None
        self._num_unexplained = self._num_good = 0
        self._reason = ""
        intact = self.manifest.intact
        self._screened = np.zeros(len(self.manifest), dtype=bool) if intact is None else intact.copy()

    def decoded(self, plans: Iterator[BatchPlan]) -> Generator[Decoded, None, None]:
        """See `PlannedLoader.decoded`."""
        # A batch that is ready must not wait for the next plan, so a thread makes plans in advance.
        decoded = self._executed(one_ahead(plan for plan in plans))
        # Images resized on the host are copies; otherwise they lie in DALI's buffers, which the next batch would reuse.
        return one_ahead(decoded) if self._resizes_on_host else decoded

    def _executed(self, plans: Generator[BatchPlan, None, None]) -> Generator[Decoded, None, None]:
        """Execute plans, prefetching within DALI."""
        ahead: deque[_Ahead] = deque()
        with ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="screen") as pool:
            try:
                while True:
                    while len(ahead) < self._depth and (plan := next(plans, None)) is not None:
                        ahead.append(self._start(plan, pool))
                    if not ahead:
                        return
                    entry = ahead.popleft()
                    images = self._take(entry, pool)
                    if images is None and not self._is_refused(entry):
                        entry, images = self._again(entry, pool)
                        ahead = deque(
                            later if self._is_refused(later) else self._start(later.plan, pool)
                            for later in ahead
                        )
                    if images is None:
                        yield self._without_dali(entry)
                        continue
                    self._num_good += 1
                    yield Decoded(entry.plan, images, entry.bad)
                    del images
                    self._pipeline.release_outputs()
            finally:
                plans.close()
                self._drain(sum(entry.pipeline is self._pipeline for entry in ahead))

    def _start(self, plan: BatchPlan, pool: ThreadPoolExecutor, *, distrust: bool = False) -> _Ahead:
        """Check files about to be used for the first time, and start the pipeline on the plan.

        Args:
            plan: Unreadable samples in it are replaced if the policy says so.
            pool: Threads for checking files.
            distrust: Decode all images on the host first, even if they look sound.
        """
        bad: dict[int, str] = {}
        while True:
            found = self._examine(plan.sample_ids, pool, distrust=distrust)
            bad |= found
            if not found:
                return _Ahead(plan, self._feed(plan), bad)
            if self.samples.policy == "stop":
                return _Ahead(plan, None, bad)
            plan = self.planner.plan(plan.epoch, plan.step, self.samples.resolve(plan.sample_ids))

    def _examine(self, ids: NDArray[np.int64], pool: ThreadPoolExecutor, *, distrust: bool) -> dict[int, str]:
        """Return the unreadable samples, with reasons: files that do not look sound are decoded to be sure."""
        new = ids if distrust else ids[~self._screened[ids]]
        if not new.size:
            return {}
        headers = pool.map(read_header, [self.manifest.path(i) for i in new])
        bad: dict[int, str] = {}
        for sample_id, header in zip(new.tolist(), headers, strict=True):
            if distrust or not header.intact or self.samples.known[sample_id]:
                try:
                    open_sample(sample_id, self.samples)
                except UnreadableError as error:
                    bad[sample_id] = str(error)
                    self.samples.known[sample_id] = True
                    continue
            self._screened[sample_id] = True
        return bad

    def _again(self, entry: _Ahead, pool: ThreadPoolExecutor) -> tuple[_Ahead, Tensor | None]:
        """Retry with a new pipeline a batch that was lost with the old one.

        Raises:
            SettingError: DALI fails repeatedly on files that can be decoded.
        """
        self._pipeline = None
        second = self._start(entry.plan, pool, distrust=True)
        if not second.bad:
            self._num_unexplained = 1 + (0 if self._num_good >= _GOOD_BATCHES else self._num_unexplained)
            if self._num_unexplained > _MAX_UNEXPLAINED:
                problem = (
                    f"DALI failed {self._num_unexplained} times in {self._num_good} batches, on files that can all be "
                    f"decoded (the last time: {self._reason}): choose pytorch"
                )
                raise SettingError("data_backend", "dali-gpu" if self.gpu else "dali-cpu", problem)
            self._num_good = 0
        second.bad.update(entry.bad)
        return second, self._take(second, pool)

    def _is_refused(self, entry: _Ahead) -> bool:
        """Whether the policy stops at this batch."""
        return bool(entry.bad) and self.samples.policy == "stop"

    def _without_dali(self, entry: _Ahead) -> Decoded:
        """Return a batch that is refused, or that the host can decode but DALI cannot."""
        if self._is_refused(entry):
            return Decoded(entry.plan, torch.empty(0, dtype=torch.uint8), entry.bad)
        decoded = decode_batch(entry.plan, self.planner, self.samples)
        decoded.bad.update(entry.bad)
        return decoded

    def _feed(self, plan: BatchPlan) -> _Pipeline:
        """Start the pipeline on a plan and return the pipeline; None if that failed, which discards the pipeline."""
        try:
            if self._pipeline is None:
                self._pipeline = self._build()
                # The first run of a pipeline starts as many iterations at once as its queue is deep: spend it on one
                # image.
                for _ in range(self._depth):
                    self._send(plan.rows(0, 1, plan.step))
                self._pipeline.schedule_run()
                self._wait(self._depth)
            self._send(plan)
            self._pipeline.schedule_run()
        except RuntimeError as error:
            self._lost(error)
        return self._pipeline

    def _send(self, plan: BatchPlan) -> None:
        """Put a batch into the pipeline's inputs."""
        ids = plan.sample_ids
        manifest = self.manifest
        part = regions(plan, manifest.heights[ids], manifest.widths[ids])
        paths = [np.frombuffer(os.fsencode(manifest.path(i)), dtype=np.uint8) for i in ids]
        for name, value in zip(INPUTS, (paths, *part, plan.flips.astype(np.int32)), strict=True):
            if name in self._fed_names:
                self._pipeline.feed_input(name, value)

    def _wait(self, num_running: int) -> None:
        """Let the pipeline finish its running iterations."""
        for _ in range(num_running):
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()

    def _take(self, entry: _Ahead, pool: ThreadPoolExecutor) -> Tensor | None:
        """Return the pipeline's next output, (N, H, W, 3) uint8; None if it died or was not started on this plan."""
        if entry.pipeline is None or entry.pipeline is not self._pipeline:
            return None
        plan = entry.plan
        try:
            (output,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            self._lost(error)
            return None
        if self._resizes_on_host:
            parts = [torch.from_dlpack(output[i]) for i in range(len(plan))]
            return resize_parts(parts, plan, pool)
        if not self.gpu:
            return torch.from_dlpack(output.as_tensor())
        from nvidia.dali.plugin.pytorch import feed_ndarray

        images = torch.empty((len(plan), *plan.size, 3), dtype=torch.uint8, device=self.stage.device)
        stream = torch.cuda.current_stream(self.stage.device)
        feed_ndarray(output.as_tensor(), images, cuda_stream=stream)
        stream.synchronize()  # DALI may reuse its buffer from now on; the consumer's own stream does not wait
        return images

    def _lost(self, error: RuntimeError) -> None:
        """Discard the pipeline after a failure; prefetched plans are fed again to the next one.

        Raises:
            OutOfMemoryError: Memory ran out: a new pipeline would not help.
            RuntimeError: CUDA failed irrecoverably for this process.
        """
        self._pipeline = None
        text = str(error)
        self._reason = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        if any(words in text for words in _OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(f"DALI: {self._reason}") from error
        if any(words in text for words in _FATAL):
            raise error
        logger.warning("DALI failed and is started again: %s", self._reason)

    def _drain(self, num_running: int) -> None:
        """Discard prefetched batches, so that the pipeline can be used again."""
        try:
            if self._pipeline is not None:
                self._wait(num_running)
        except RuntimeError as error:
            self._lost(error)

    @property
    def _resizes_on_host(self) -> bool:
        """Whether the pipeline only decodes. Resizing stays in DALI if the filter reaches beyond the window."""
        return not self.gpu and self.planner.geometry.crop_first

    @property
    def _depth(self) -> int:
        """Number of batches in the pipeline's queue: those prefetched and the consumer's current one."""
        return self.prefetch + 1

    @property
    def _fed_names(self) -> tuple[str, ...]:
        """Names of the inputs of the graph for this geometry."""
        geometry = self.planner.geometry
        left_out = set() if geometry.flip and not self._resizes_on_host else {"flips"}
        if geometry.crop_first:
            left_out |= {"roi_starts", "roi_ends"}
        return tuple(name for name in INPUTS if name not in left_out)

    def _build(self) -> _Pipeline:
        """Build the pipeline.

        Raises:
            SettingError: DALI cannot start, for example without a driver.
        """
        pipeline_def: Callable[..., Callable[[Callable[[], DataNode]], Callable[[], _Pipeline]]] = (
            importlib.import_module("nvidia.dali").pipeline_def
        )
        geometry = self.planner.geometry
        decoding = self._decoding_options()
        device_id = (self.stage.device.index or 0) if self.gpu else None

        @pipeline_def(
            batch_size=self.planner.batch_size,
            num_threads=max(1, self.workers),
            device_id=device_id,
            prefetch_queue_depth=self._depth,
        )
        def images() -> DataNode:
            size = None if self._resizes_on_host else geometry.size
            return build_graph(size, inside=geometry.inside, names=self._fed_names, decoding=decoding)

        try:
            pipeline = images()
            pipeline.build()
        except RuntimeError as error:
            name, advice = "dali-cpu", "choose pytorch"
            if self.gpu:
                name = "dali-gpu"
                advice = (
                    "choose dali-cpu, or install the DALI build for the driver (nvidia-dali-cuda120 or "
                    "nvidia-dali-cuda130)"
                )
            raise SettingError("data_backend", name, f"DALI cannot start ({error}); {advice}") from error
        return pipeline

    def _decoding_options(self) -> Plain:
        """Return the decoder's arguments that depend on the device."""
        if not self.gpu:
            return {"device": "cpu"}
        height, width = usual_largest(self.manifest, ~self.samples.known)
        return {
            "device": "mixed",
            "hw_decoder_load": 0.65,  # DALI's default: the share of images for the hardware decoder
            # Preallocate buffers that suffice for nearly all images, instead of growing through the first epoch.
            "preallocate_width_hint": width,
            "preallocate_height_hint": height,
            "jpeg_fancy_upsampling": True,  # the chroma filter of the CPU decoders
        }

    def close(self) -> None:
        """See `Loader.close`."""
        super().close()
        self._pipeline = None


def usual_largest(manifest: Manifest, readable: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the height and width that 999 of 1000 readable images do not exceed: one giant must not fill the GPU."""
    heights = manifest.heights[readable]
    widths = manifest.widths[readable]
    if not len(heights):
        return 1, 1
    height, width = (int(np.percentile(sides, 99.9, method="higher")) for sides in (heights, widths))
    return height, width


Item = TypeVar("Item")
_END = object()


def one_ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield from `items` while a thread prepares the next one.

    Only that thread advances `items`, so they need no locks; an error reaches the consumer in order. An item must stay
    valid while the next one is prepared.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:

        def advance() -> Future[object]:
            return thread.submit(next, items, _END)

        following = advance()
        try:
            while (item := following.result()) is not _END:
                following = advance()
                yield item  # type: ignore[misc]  # not the end, so an Item
        finally:
            following.exception()  # wait until the thread has released `items`
            thread.submit(items.close).result()
