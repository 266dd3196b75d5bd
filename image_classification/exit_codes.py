"""Exit codes of jobs, and signal handling during start-up, when there is nothing to save yet.

Imports only the standard library, since `answer_signals_while_importing` is called before everything else.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_SAVED = 75
"""Exit code of a process that was asked to stop (SIGTERM, SIGUSR1), saved, and should be restarted.

EX_TEMPFAIL of sysexits.h, "try again later". `multiproc.py` passes it on; the Slurm and Kubernetes files restart the
job.
"""

EXIT_PEER = 69
"""Exit code of a process that stops because another rank failed: EX_UNAVAILABLE of sysexits.h.

`multiproc.py` looks for the rank that failed first.
"""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def code_of_stop(number: int) -> int:
    """Return the exit code of a process stopped by a signal with nothing to save."""
    return 128 + number if number == signal.SIGINT else EXIT_SAVED


def answer_signals_while_importing() -> None:
    """Make signals end the process at once with the exit codes of a job, until other handlers are installed."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(2, f"stopped by {name} before anything began: the same command starts again\n".encode())
    os._exit(code_of_stop(number))
