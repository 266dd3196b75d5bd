"""Forward passes that stop at every contraction that is to be repaired, and resume when told to.

A repaired layer sees what all repairs before it have changed, so layers are solved in the order in which they run, each
from all calibration images. Running the network once per layer would cost as many passes as it has layers. Instead the
passes over all batches are under way at the same time, each in a thread of its own that sleeps at the layer in
question: one pass per batch in all, and what is held in memory is what a network holds between two layers.

Only one thread runs at any time, and always when `advance` waits for it, so nothing here is concurrent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from types import TracebackType

import torch
from torch import Tensor, nn

from image_classification.models.running import Outputs
from pruning.repair.contractions import Contraction, ContractionMode


class _AbandonedError(BaseException):
    """Unwinds the forward pass of a flight that is not needed any more."""


class Stop:
    """A pass that sleeps at a contraction.

    Attributes:
        contraction: Which one.
        output: What it gives with the weights as they are, its bias included.
    """

    def __init__(self, contraction: Contraction, compute: Callable[[], Tensor]) -> None:
        self.contraction = contraction
        self.compute = compute

    def outputs(self, step: int) -> Tensor:
        """(G, R, M) with the weights as they are, of every `step`-th position."""
        return self.contraction.outputs(self.compute(), step)


class Flight:
    """One forward pass of a network on one batch.

    Args:
        model: The network, in the mode that it is to run in.
        forward: Runs it on the batch.
        stops: Names of the parameters at whose contractions the pass stops.
        numbers: See `ContractionMode`.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[], Outputs],
        stops: Collection[str],
        numbers: dict[str, Tensor] | None = None,
    ) -> None:
        self._result: Outputs = None
        self._forward = forward
        self._mode = ContractionMode(model, self._visit, stops, numbers)
        self._stop: Stop | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._finished = False
        self._to_pass, self._to_caller = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="calibration pass")
        self._thread.start()

    def advance(self) -> Stop | None:
        """Run to the next stop; None when the pass has ended.

        Raises:
            Exception: What the network raised.
        """
        self._stop = None
        if not self._finished:
            self._to_pass.release()
            self._to_caller.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def finish(self) -> Outputs:
        """Run to the end without a stop; what the network gives."""
        while self.advance() is not None:
            pass
        return self._result

    def __enter__(self) -> Flight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def abandon(self) -> None:
        """End the pass where it is."""
        if not self._finished:
            self._abandoned = True
            self._to_pass.release()
            self._to_caller.acquire()
        self._thread.join()

    def _run(self) -> None:
        self._to_pass.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad(), self._mode:
                    self._result = self._forward()
        except _AbandonedError:
            pass
        except BaseException as error:  # it belongs to whoever waits
            self._error = error
        finally:
            self._finished = True
            self._stop = None
            self._to_caller.release()

    def _visit(self, contraction: Contraction, compute: Callable[[], Tensor]) -> Tensor:
        self._stop = Stop(contraction, compute)
        self._to_caller.release()
        self._to_pass.acquire()
        if self._abandoned:
            raise _AbandonedError
        return compute()
