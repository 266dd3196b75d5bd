"""Runs a training job among the ranks and turns its outcome into an exit code and a line."""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from image_classification.agreement import agreed
from image_classification.checkpoint import workspace_alone
from image_classification.config import is_told, out_of_memory, told
from image_classification.distributed import Distributed
from image_classification.exit_codes import EXIT_PEER, EXIT_SAVED
from image_classification.interrupts import StoppedAtOnce, StopRequested, stopping_at_once
from image_classification.job_config import CommonConfig
from image_classification.joining import setup_distributed
from image_classification.observe.log_of_commands import log_names_flags
from image_classification.peers import peer_loss

D = TypeVar("D", bound=CommonConfig)


#: As in shells for a program ended by SIGTERM: stopped without a state to resume from.
EXIT_STOPPED = 128 + signal.SIGTERM


def run_job(configs: D, body: Callable[[D, Distributed], None]) -> int:
    """Run `body` among the ranks and turn the outcome into an exit code.

    Returns:
        0; `EXIT_SAVED` after a signal, once the state is saved or if there is none to save; `EXIT_STOPPED` if it must
            not be saved; 2 for an error that a user can fix, reported in one line, as for a wrong command line; 1 for
            any other error, with a traceback; `EXIT_PEER` if another rank failed; 130 after Ctrl-C.
    """
    try:
        with stopping_at_once() as decided, log_names_flags():
            return _run(configs, body, decided)
    except StoppedAtOnce as stop:
        print(stop, file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else EXIT_SAVED


def _run(configs: D, body: Callable[[D, Distributed], None], decided: Callable[[], None]) -> int:
    try:
        with setup_distributed(configs.distributed) as distributed, contextlib.ExitStack() as stack:
            configs = agreed(configs, distributed)
            if configs.checkpoint.checkpoints and not configs.train.evaluate:
                stack.enter_context(workspace_alone(configs.checkpoint, distributed))
            body(configs, distributed)
    except StopRequested as stop:
        decided()
        if not stop.saved:
            print(
                f"{stop}; nothing was saved (--no-checkpoints): the same command starts over", file=sys.stderr
            )
            return EXIT_STOPPED
        print(f"{stop}; --resume auto continues", file=sys.stderr)
        return EXIT_SAVED
    except StoppedAtOnce:
        raise
    except KeyboardInterrupt:
        decided()
        path = configs.checkpoint.workspace / configs.checkpoint.checkpoint_filename
        if configs.checkpoint.checkpoints and path.is_file():
            said = "the last checkpoint is whole, --resume auto continues from it"
        else:
            said = "there is no checkpoint to continue from"
        print(f"interrupted; {said}", file=sys.stderr)
        return 130
    except Exception as error:
        decided()
        lost = peer_loss(error)
        if lost is not None:
            print(f"error: {lost}", file=sys.stderr)
            return EXIT_PEER
        if out_of_memory(error):
            advice = "lower --batch-size (--optimizer-batch-size keeps the effective size), or add --amp"
            print(f"error: out of memory: {advice}\n{error}", file=sys.stderr)
            return 2
        if is_told(error):
            print(f"error: {told(error)}", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    return 0
