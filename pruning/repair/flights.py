"""Forward passes that stop at every contraction to be repaired, and resume on demand.

A repaired layer sees the effect of all repairs before it, so layers are solved in the order in which they run, each
from all calibration images. Running the network once per layer would cost as many passes as there are layers. Instead,
the passes over all batches are in flight at the same time, each in its own thread that sleeps at the layer in question.
This takes one pass per batch in total, and memory only for what a network holds between two layers.

Only one thread runs at any time, and always when `advance` waits for it, so nothing here is concurrent.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Collection
from types import TracebackType

import torch
from torch import Tensor, nn

from image_classification.models.running import Outputs
from pruning.repair.contractions import Contraction, ContractionMode


class _AbandonedError(BaseException):
    """Unwinds the forward pass of a flight that is no longer needed."""


class Stop:
    """A pass stopped at a contraction.

    Attributes:
        contraction: The contraction.
        output: Its output with the current weights, including its bias.
    """

    def __init__(self, contraction: Contraction, compute: Callable[[], Tensor]) -> None:
        self.contraction = contraction
        self.compute = compute

    def outputs(self, step: int) -> Tensor:
        """Return the outputs (G, R, M) with the current weights, at every `step`-th position."""
        return self.contraction.outputs(self.compute(), step)


class Flight:
    """One forward pass of a network on one batch.

    Args:
        model: The network, in the mode to run it in.
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
        self._device, self._context = torch.get_default_device(), contextvars.copy_context()
        self._to_pass, self._to_caller = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="calibration pass")
        self._thread.start()

    def advance(self) -> Stop | None:
        """Run to the next stop; None when the pass has ended.

        Raises:
            Exception: Any exception raised by the network.
        """
        self._stop = None
        if not self._finished:
            self._to_pass.release()
            self._to_caller.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def finish(self) -> Outputs:
        """Run to the end without stopping, and return the network's outputs."""
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
                # A thread begins with PyTorch's own defaults, and without the caller's variables.
                with torch.no_grad(), self._on_device(), self._mode:
                    self._result = self._context.run(self._forward)
        except _AbandonedError:
            pass
        except BaseException as error:  # raised again in the waiting thread
            self._error = error
        finally:
            self._finished = True
            self._stop = None
            self._to_caller.release()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make tensors on the caller's default device, which for a new thread is the CPU."""
        return contextlib.nullcontext() if self._device.type == "cpu" else self._device

    def _visit(self, contraction: Contraction, compute: Callable[[], Tensor]) -> Tensor:
        self._stop = Stop(contraction, compute)
        self._to_caller.release()
        self._to_pass.acquire()
        if self._abandoned:
            raise _AbandonedError
        return compute()
