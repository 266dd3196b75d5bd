"""The DALI backends: plans executed by an NVIDIA DALI pipeline, on the CPU or on the GPU.

The pipeline keeps no state: it is fed paths, windows and flips batch by batch (`external_source`), so that it can be
thrown away and built again (0.1 s) at any position. JPEGs are decoded only as far as the window reaches
(`decoders.image_slice`, bit-identical to cutting the whole picture), and resized by the antialiased triangle filter:
DALI's own, except for training on the CPU, where torch's is five times as fast and the same as Pillow's also at the
border (DALI's repeats the last pixel there).

What DALI cannot do is name or skip a damaged file, and a file that is missing or empty kills its pipeline. So each
file is looked at once before it is first fed; a suspicious one is decoded on the host to be sure, and replaced if the
policy says so. Should DALI fail all the same, every file of the batch is decoded on the host, and a new pipeline goes
on from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from image_classification.config import ConfigError
from image_classification.data.ahead import one_ahead
from image_classification.data.decode import Decoded, UnreadableError, decode_batch, open_sample
from image_classification.data.loader import PlannedLoader
from image_classification.data.plan import BatchPlan

logger = logging.getLogger(__name__)

_JPEG = b"\xff\xd8\xff"
_END_OF_IMAGE = b"\xff\xd9"
_OTHER_FORMATS = (
    b"\x89PNG\r\n\x1a\n",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xffO\xffQ",
    *(f"P{kind}".encode() for kind in range(1, 7)),
)
_HEAD_BYTES, _TAIL_BYTES = 16, 1024
_INPUTS = ("paths", "starts", "shapes", "roi_starts", "roi_ends", "flips")


def is_available() -> bool:
    """Whether DALI is installed."""
    return (
        importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    )


def looks_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a picture that DALI decodes and, if it is a JPEG, has an end-of-image marker.

    A JPEG that was cut off is otherwise noticed only by windows that reach down to the missing part.
    """
    try:
        with open(path, "rb", buffering=0) as stream:
            head = stream.read(_HEAD_BYTES)
            if not head.startswith(_JPEG):
                return head.startswith(_OTHER_FORMATS)
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            return _END_OF_IMAGE in stream.read(_TAIL_BYTES)
    except OSError:
        return False


class Regions(NamedTuple):
    """What is decoded of each picture, and which part of that is resized."""

    starts: NDArray[np.int32]
    """(N, 2) top, left of the part to decode, raw pixels."""
    shapes: NDArray[np.int32]
    """(N, 2) height, width of the part to decode."""
    roi_starts: NDArray[np.float32]
    """(N, 2) top, left of the window, relative to the decoded part."""
    roi_ends: NDArray[np.float32]
    """(N, 2) bottom, right of the window, relative to the decoded part."""


def regions(plan: BatchPlan, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> Regions:
    """Split windows into whole pixels to decode and a region to resize.

    Args:
        plan: With `crop_first` the part to decode is the window; else it also has the margin that the filter sees.
        heights, widths: (N,) raw sizes.
    """
    low, extent = plan.windows[:, :2], plan.windows[:, 2:]
    high = low + extent
    start, stop = np.floor(low), np.ceil(high)
    if not plan.crop_first:
        # the triangle filter reaches as far as one output pixel, and at least one raw pixel
        reach = np.ceil(np.maximum(extent / np.array(plan.size), 1.0)) + 1
        raw = np.stack([heights, widths], axis=1).astype(np.float64)
        start, stop = np.maximum(start - reach, 0), np.minimum(stop + reach, raw)
    return Regions(
        start.astype(np.int32),
        (stop - start).astype(np.int32),
        (low - start).astype(np.float32),
        (np.minimum(high, stop) - start).astype(np.float32),
    )


def resize_parts(parts: Sequence[Tensor], plan: BatchPlan, pool: ThreadPoolExecutor) -> Tensor:
    """Resize and mirror windows that have been cut out.

    Args:
        parts: (h, w, 3) uint8 of various sizes.
        plan: Output size and flips.
        pool: Threads to work in; torch gives up Python's lock meanwhile.

    Returns:
        (N, H, W, 3) uint8, plane by plane in memory, which is how the filter leaves them.
    """
    planes = np.empty((len(parts), 3, *plan.size), dtype=np.uint8)

    def resize(row: int) -> None:
        picture = parts[row].permute(2, 0, 1)[None]
        if picture.shape[2:] != plan.size:
            picture = F.interpolate(picture, size=plan.size, mode="bilinear", antialias=True)
        # NumPy's copy: torch's would start a team of compute threads for each thread of the pool
        plane = picture[0].numpy()
        planes[row] = plane[:, :, ::-1] if plan.flips[row] else plane

    for _ in pool.map(resize, range(len(parts))):
        pass
    return torch.from_numpy(planes).permute(0, 2, 3, 1)


class _Ahead(NamedTuple):
    """A plan that is read ahead.

    Attributes:
        plan: With substitutes.
        pipeline: The one that was started on it, which may have died since; None if none was.
        bad: Reasons by id of the samples that were found unreadable.
    """

    plan: BatchPlan
    pipeline: Any
    bad: dict[int, str]


class DaliLoader(PlannedLoader):
    """See `PlannedLoader`.

    Args:
        gpu: Decode (nvJPEG, with the hardware decoder where there is one) and resize on the loader's CUDA device.

    Raises:
        ConfigError: DALI is not installed, or there is no CUDA device for `gpu`.
    """

    def __init__(self, *args: Any, gpu: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = name = "dali-gpu" if gpu else "dali-cpu"
        if not is_available():
            raise ConfigError(
                f"--data-backend {name} needs NVIDIA DALI: pip install nvidia-dali-cuda120 (with a driver for CUDA 13 "
                "also nvidia-dali-cuda130), or choose --data-backend pytorch"
            )
        if gpu and self.stage.device.type != "cuda":
            raise ConfigError(f"--data-backend {name} needs a CUDA device: choose --data-backend dali-cpu")
        self.gpu = gpu
        self._pipeline: Any = None
        self._screened = np.zeros(len(self.manifest), dtype=bool)

    def _decoded(self, plans: Iterator[BatchPlan]) -> Generator[Decoded, None, None]:
        """See `PlannedLoader._decoded`."""
        decoded = self._executed(plans)
        # Resized pictures are copies; otherwise they lie in DALI's buffers, which the next batch would take back.
        return one_ahead(decoded) if self._resizes_on_host else decoded

    def _executed(self, plans: Iterator[BatchPlan]) -> Generator[Decoded, None, None]:
        """Execute plans, reading ahead within DALI."""
        ahead: deque[_Ahead] = deque()
        with ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="screen") as pool:
            try:
                while True:
                    while len(ahead) < self._depth and (plan := next(plans, None)) is not None:
                        ahead.append(self._start(plan, pool))
                    if not ahead:
                        return
                    entry = ahead.popleft()
                    pictures = self._take(entry, pool)
                    if pictures is None and not self._is_refused(entry):
                        entry, pictures = self._again(entry, pool)
                        ahead = deque(
                            later if self._is_refused(later) else self._start(later.plan, pool)
                            for later in ahead
                        )
                    if pictures is None:
                        yield self._without_dali(entry)
                        continue
                    yield Decoded(entry.plan, pictures, entry.bad)
                    del pictures
                    self._pipeline.release_outputs()
            finally:
                self._drain(sum(entry.pipeline is self._pipeline for entry in ahead))

    def _start(self, plan: BatchPlan, pool: ThreadPoolExecutor, *, distrust: bool = False) -> _Ahead:
        """Look at files that are about to be used for the first time, and start the pipeline on the plan.

        Args:
            plan: Unreadable samples in it are replaced if the policy says so.
            pool: Threads to look at files with.
            distrust: Decode all pictures on the host first, whatever they look like.
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
        """The unreadable ones among samples, with reasons: what does not look whole is decoded to be sure."""
        new = ids if distrust else ids[~self._screened[ids]]
        if not new.size:
            return {}
        whole = pool.map(looks_whole, [self.manifest.path(i) for i in new])
        bad: dict[int, str] = {}
        for sample_id, is_whole in zip(new.tolist(), whole, strict=True):
            if distrust or not is_whole or self.samples.known[sample_id]:
                try:
                    open_sample(sample_id, self.samples)
                except UnreadableError as error:
                    bad[sample_id] = str(error)
                    self.samples.known[sample_id] = True
                    continue
            self._screened[sample_id] = True
        return bad

    def _again(self, entry: _Ahead, pool: ThreadPoolExecutor) -> tuple[_Ahead, Tensor | None]:
        """A second try with a new pipeline, for a batch that was lost with the old one."""
        self._pipeline = None
        second = self._start(entry.plan, pool, distrust=True)
        second.bad.update(entry.bad)
        return second, self._take(second, pool)

    def _is_refused(self, entry: _Ahead) -> bool:
        """Whether the policy stops at this batch."""
        return bool(entry.bad) and self.samples.policy == "stop"

    def _without_dali(self, entry: _Ahead) -> Decoded:
        """A batch that is refused, or that DALI cannot decode although the host can."""
        if self._is_refused(entry):
            return Decoded(entry.plan, torch.empty(0, dtype=torch.uint8), entry.bad)
        decoded = decode_batch(entry.plan, self.planner, self.samples)
        decoded.bad.update(entry.bad)
        return decoded

    def _feed(self, plan: BatchPlan) -> Any:
        """Start the pipeline on a plan. Returns the pipeline; None if that failed, which ends the pipeline."""
        try:
            if self._pipeline is None:
                self._pipeline = self._build()
                # the first run of a pipeline starts as many at once as its queue is deep: spend it on one picture
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
        ids, manifest = plan.sample_ids, self.manifest
        part = regions(plan, manifest.heights[ids], manifest.widths[ids])
        paths = [np.frombuffer(os.fsencode(manifest.path(i)), dtype=np.uint8) for i in ids]
        for name, value in zip(_INPUTS, (paths, *part, plan.flips.astype(np.int32)), strict=True):
            if name in self._fed_names:
                self._pipeline.feed_input(name, value)

    def _wait(self, num_running: int) -> None:
        """Let the pipeline finish what it works on."""
        for _ in range(num_running):
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()

    def _take(self, entry: _Ahead, pool: ThreadPoolExecutor) -> Tensor | None:
        """The pipeline's next output, (N, H, W, 3) uint8; None if the pipeline died or was not started on this."""
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

        pictures = torch.empty((len(plan), *plan.size, 3), dtype=torch.uint8, device=self.stage.device)
        stream = torch.cuda.current_stream(self.stage.device)
        feed_ndarray(output.as_tensor(), pictures, cuda_stream=stream)
        stream.synchronize()  # DALI may reuse its buffer from now on; the consumer's own stream does not wait
        return pictures

    def _lost(self, error: RuntimeError) -> None:
        """Give up the pipeline after a failure; what was read ahead is fed again to the next one."""
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning("DALI failed and is started anew: %s", reason)
        self._pipeline = None

    def _drain(self, num_running: int) -> None:
        """Get rid of what was read ahead, so that the pipeline can be used again."""
        try:
            if self._pipeline is not None:
                self._wait(num_running)
        except RuntimeError as error:
            self._lost(error)

    @property
    def _resizes_on_host(self) -> bool:
        """Whether the pipeline only decodes. A filter that sees beyond the window is left to DALI."""
        return not self.gpu and self.planner.geometry.crop_first

    @property
    def _depth(self) -> int:
        """Batches in the pipeline's queue: those read ahead and the one that the consumer has."""
        return self.prefetch + 1

    @property
    def _fed_names(self) -> tuple[str, ...]:
        """Inputs that the graph of this geometry has."""
        geometry = self.planner.geometry
        left_out = set() if geometry.flip and not self._resizes_on_host else {"flips"}
        if geometry.crop_first:
            left_out |= {"roi_starts", "roi_ends"}
        return tuple(name for name in _INPUTS if name not in left_out)

    def _build(self) -> Any:
        """Build the pipeline.

        Raises:
            ConfigError: DALI cannot start, for want of a driver for example.
        """
        pipeline_def: Any = importlib.import_module("nvidia.dali").pipeline_def
        geometry = self.planner.geometry
        decoding = self._decoding_options()
        device_id = (self.stage.device.index or 0) if self.gpu else None

        @pipeline_def(
            batch_size=self.planner.batch_size,
            num_threads=max(1, self.workers),
            device_id=device_id,
            prefetch_queue_depth=self._depth,
        )
        def pictures() -> Any:
            size = None if self._resizes_on_host else geometry.size
            return _graph(size, inside=geometry.inside, names=self._fed_names, decoding=decoding)

        try:
            pipeline = pictures()
            pipeline.build()
        except RuntimeError as error:
            advice = "choose --data-backend pytorch"
            if self.gpu:
                advice = (
                    "choose --data-backend dali-cpu, or install the DALI build for the driver "
                    "(nvidia-dali-cuda120 or nvidia-dali-cuda130)"
                )
            raise ConfigError(f"--data-backend {self.name}: DALI cannot start ({error}); {advice}") from error
        return pipeline

    def _decoding_options(self) -> dict[str, Any]:
        """Arguments of the decoder that depend on the device."""
        if not self.gpu:
            return {"device": "cpu"}
        return {
            "device": "mixed",
            "hw_decoder_load": 0.65,  # DALI's default: the share of pictures for the hardware decoder
            # buffers for the largest picture at once, instead of growing through the first epoch
            "preallocate_width_hint": int(self.manifest.widths.max()),
            "preallocate_height_hint": int(self.manifest.heights.max()),
            "jpeg_fancy_upsampling": True,  # the chroma filter of the CPU decoders
        }

    def close(self) -> None:
        """See `Loader.close`."""
        super().close()
        self._pipeline = None


def _graph(
    size: tuple[int, int] | None, *, inside: bool, names: tuple[str, ...], decoding: dict[str, Any]
) -> Any:
    """The pipeline's graph: read, decode, resize, mirror; (H, W, 3) uint8 per sample.

    Args:
        size: Output height and width; None to only decode.
        inside: Whether windows never leave the picture; else it is decoded whole and padded with black.
        names: Inputs to have.
        decoding: Options of the decoder.
    """
    fn: Any = importlib.import_module("nvidia.dali.fn")
    types: Any = importlib.import_module("nvidia.dali.types")
    kinds = {"paths": (types.UINT8, 1), "starts": (types.INT32, 1), "shapes": (types.INT32, 1),
             "roi_starts": (types.FLOAT, 1), "roi_ends": (types.FLOAT, 1), "flips": (types.INT32, 0)}  # fmt: skip
    inputs = {
        name: fn.external_source(name=name, dtype=kinds[name][0], ndim=kinds[name][1], batch=True)
        for name in names
    }
    encoded = fn.io.file.read(inputs["paths"])
    decoding = {**decoding, "output_type": types.RGB, "adjust_orientation": False}
    window: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
    if inside:
        part = fn.decoders.image_slice(encoded, inputs["starts"], inputs["shapes"], **window, **decoding)
    else:
        whole = fn.decoders.image(encoded, **decoding)
        part = fn.slice(
            whole, inputs["starts"], inputs["shapes"], **window, out_of_bounds_policy="pad", fill_values=0
        )
    if size is None:
        return part
    region = {}
    if "roi_starts" in inputs:
        region = {"roi_start": inputs["roi_starts"], "roi_end": inputs["roi_ends"]}
    resized = fn.resize(part, size=size, interp_type=types.INTERP_LINEAR, antialias=True, **region)
    return fn.flip(resized, horizontal=inputs["flips"]) if "flips" in inputs else resized
