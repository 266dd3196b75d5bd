"""The PyTorch backend: plans executed with Pillow in the worker processes of a torch DataLoader."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset, Sampler

from image_classification.data.backends.backend import register_backend
from image_classification.data.bad_samples import BadSamples
from image_classification.data.decode import Decoded, decode_batch
from image_classification.data.loader import PlannedLoader
from image_classification.data.plan import BatchPlan, Planner

Item = TypeVar("Item")


class _PlannedImages(Dataset[Decoded]):
    """A data set indexed by plans, whose items are batches."""

    def __init__(self, planner: Planner, samples: BadSamples) -> None:
        self.planner = planner
        self.samples = samples

    def __getitem__(self, plan: BatchPlan) -> Decoded:
        return decode_batch(plan, self.planner, self.samples)


class _Plans(Sampler[BatchPlan]):
    """Passes the plans of the current stream to the DataLoader."""

    def __init__(self) -> None:
        self.current: Iterator[BatchPlan] = iter(())

    def __iter__(self) -> Iterator[BatchPlan]:
        return self.current


def _as_it_is(decoded: Item) -> Item:
    """Collate function that does nothing: an item already is a batch."""
    return decoded


def _quiet_at_the_end(worker: int) -> None:
    """Show no traceback of the worker's thread that hands tensors over, if the job ends (Ctrl-C) while it takes one."""
    show = sys.excepthook

    def show_others(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, (EOFError, ConnectionError)):
            show(kind, error, trace)

    sys.excepthook = show_others


@register_backend("pytorch", preference=lambda device: 1)
class PyTorchLoader(PlannedLoader):
    """See `PlannedLoader`. Workers start with the first batch and live until `close`, across epochs."""

    _torch_loader: DataLoader[Decoded] | None = None
    _sampler: _Plans

    def decoded(self, plans: Iterator[BatchPlan]) -> Generator[Decoded, None, None]:
        """See `PlannedLoader.decoded`."""
        if self.workers == 0:
            for plan in plans:
                yield decode_batch(plan, self.planner, self.samples)
            return
        if self._torch_loader is None:
            self._sampler = _Plans()
            self._torch_loader = DataLoader(
                _PlannedImages(self.planner, self.samples),
                batch_size=None,
                sampler=self._sampler,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                worker_init_fn=_quiet_at_the_end,
                pin_memory=self.stage.device.type == "cuda",
                prefetch_factor=max(1, self.prefetch),
                persistent_workers=True,
            )
        self._sampler.current = plans
        yield from self._torch_loader

    def close(self) -> None:
        """See `Loader.close`."""
        super().close()
        self._torch_loader = None  # deleting its iterator stops the workers
