"""Exit codes of jobs, and a program's first seconds, in which there is nothing to save yet.

Imports the standard library only: `answer_signals_while_importing` stands before everything else.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_SAVED = 75
"""Exit code of a process that was asked to stop (SIGTERM, SIGUSR1), saved and wants to be started
again: EX_TEMPFAIL of sysexits.h, "try again later". `multiproc.py` hands it on; the Slurm and Kubernetes
files start the job again."""

EXIT_PEER = 69
"""Exit code of a process that stops because another rank failed: EX_UNAVAILABLE of sysexits.h. `multiproc.py` looks
for the rank that failed by itself."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def code_of_stop(number: int) -> int:
    """Exit code of a process that a signal found with nothing to save."""
    return 128 + number if number == signal.SIGINT else EXIT_SAVED


def answer_signals_while_importing() -> None:
    """From now on, until other handlers are set, signals end the process at once with the codes of a job."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(2, f"stopped by {name} before anything began: the same command starts again\n".encode())
    os._exit(code_of_stop(number))
