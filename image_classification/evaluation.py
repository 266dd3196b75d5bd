"""Exact evaluation over ranks: every image counts once, sums are reduced before they are divided."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from image_classification.data.loader import Loader
from image_classification.distributed import Distributed
from image_classification.losses import LossConfig, build_loss
from image_classification.metrics import ClassificationMetrics, Metrics, MultiLabelMetrics
from image_classification.models import evaluating, main_and_auxiliary_logits
from image_classification.observe.figures import VALIDATIONS, Figure, register_figures
from image_classification.observe.log import Logger
from image_classification.observe.meters import latency_figures
from image_classification.precision import Precision

register_figures(VALIDATIONS, {"loss": Figure(".5f", steers=True), "samples": Figure(".0f")})

Mark = torch.cuda.Event | float


class _BatchClock:
    """Measures the seconds of each forward pass, by CUDA events on a GPU, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[Mark, Mark]] = []

    def mark(self) -> Mark:
        """Return a point in time, on the device's own clock if it has one."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def add(self, start: Mark, end: Mark) -> None:
        self._marks.append((start, end))

    def seconds(self) -> list[float]:
        """Return all durations; syncs with the device once."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [_seconds_between(start, end) for start, end in self._marks]


def _seconds_between(start: Mark, end: Mark) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - start


class Evaluator:
    """Measures a network on a loader.

    Args:
        loader: Evaluation loader; ranks may have different numbers of batches, or none.
        precision: Autocast of the forward pass.
        distributed: Ranks to reduce over.
        multi_label: Compute mAP and F1 instead of top-1 and top-5.
        max_batches: Stop after this many batches on each rank; None for all.
        published: For multi-label data, only the figures over images; see `MultiLabelMetrics`.
    """

    def __init__(
        self,
        loader: Loader,
        precision: Precision,
        distributed: Distributed,
        *,
        multi_label: bool = False,
        max_batches: int | None = None,
        published: bool = False,
    ) -> None:
        self.loader = loader
        self.precision = precision
        self.distributed = distributed
        self.multi_label = multi_label
        self.max_batches = max_batches
        self.published = published
        # Label smoothing and mixup shape training; validation uses the plain loss, which is comparable between runs.
        self._criterion = build_loss(LossConfig(multi_label=multi_label))
        self._latencies: list[float] = []

    @property
    def headline(self) -> str:
        """The figure that decides which checkpoint is best; larger is better."""
        if not self.multi_label:
            return "top1"
        return "map_images" if self.published else "map"

    def __call__(
        self,
        model: nn.Module,
        logger: Logger,
        *,
        prefix: str = "val",
        forward: Callable[..., object] | None = None,
    ) -> dict[str, float]:
        """Evaluate; collective over ranks.

        Args:
            model: The network itself (without DDP, which would wait for ranks without a batch).
            logger: Shows progress.
            prefix: Prefix of the keys: `val`, or `val_ema` for averaged weights.
            forward: Callable to use instead of `model`, such as its compiled form.

        Returns:
            Under the prefix: `loss`, the metrics in percent, `samples`, `total_ips`, `compute_ips` (images/s over
            all ranks), `data_time` (mean seconds per batch) and `compute_latency…` (seconds per batch on this rank).
        """
        with evaluating(model):
            figures = self._run(model if forward is None else forward, logger)
        latencies = latency_figures(self._latencies, prefix)
        return {f"{prefix}.{name}": value for name, value in figures.items()} | latencies

    @torch.inference_mode()
    def _run(self, forward: Callable[..., object], logger: Logger) -> dict[str, float]:
        metrics: Metrics = ClassificationMetrics()
        if self.multi_label:
            metrics = MultiLabelMetrics(self.published)
        sums = torch.zeros(2, dtype=torch.float64, device=self.distributed.device)
        clock = _BatchClock(self.distributed.device)
        data_seconds = 0.0
        begin = time.perf_counter()
        self.loader.set_epoch(0)
        num_batches = min(len(self.loader), self.max_batches or len(self.loader))
        batches = iter(self.loader)
        with logger.progress(num_batches, "validation") as bar:
            for _ in range(num_batches):
                asked = time.perf_counter()
                batch = next(batches)
                data_seconds += time.perf_counter() - asked
                if len(batch):  # the last batch of an uneven split may be empty on this rank
                    start = clock.mark()
                    with self.precision.autocast():
                        logits, _ = main_and_auxiliary_logits(forward(batch.images))
                    clock.add(start, clock.mark())
                    self._add(sums, metrics, logits.float(), batch.targets)
                bar.update()
        figures = self._figures(sums, metrics)
        self._latencies = clock.seconds()
        return figures | self._speed(figures["samples"], data_seconds, time.perf_counter() - begin)

    def _add(self, sums: Tensor, metrics: Metrics, logits: Tensor, targets: Tensor) -> None:
        count = len(logits)
        loss = self._criterion(logits, targets).double()
        sums += torch.stack([loss * count, loss.new_full((), count)])
        metrics.update(logits, targets)

    def _figures(self, sums: Tensor, metrics: Metrics) -> dict[str, float]:
        (total,) = self.distributed.all_reduce_sum(sums)
        loss, samples = total.tolist()
        return {
            "loss": loss / samples if samples else float("nan"),
            **metrics.compute(self.distributed),
            "samples": samples,
        }

    def _speed(self, samples: float, data_seconds: float, wall: float) -> dict[str, float]:
        compute = sum(self._latencies)
        return {
            "total_ips": samples / wall,
            "compute_ips": samples / compute if compute else 0.0,
            "data_time": data_seconds / max(len(self._latencies), 1),
        }
