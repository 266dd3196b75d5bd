"""The elastic agent behind `multiproc.py`: one log file per rank, forwarded signals, a reason for every stop.

A thin layer over `torch.distributed.elastic`, through its documented extension points: `LogsSpecs` decides
where the output of a rank goes, a subclass of `LocalElasticAgent` decides when the ranks of a node are
stopped or restarted.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SignalException

from image_classification.exit_codes import EXIT_PEER, EXIT_SAVED, STOP_SIGNALS
from image_classification.file_writing import unused_path

PEER_SECONDS = 10  # grace for healthy ranks when one died: they hang in a collective and have nothing to save
TAIL_LINES = 30
FAILED_KEY = "lucidprune/failed"  # key in the store shared by the agents of all nodes
STARTING_SECONDS = 10  # after this, a rank that handles no signals is signalled all the same
# Program that becomes a rank: it asks the kernel to end it with its launcher (PR_SET_PDEATHSIG is 1), redirects both
# streams in order to one file, and then executes the command under the same process id.
START = """
import ctypes, os, signal, sys
launcher, *command = sys.argv[1:]
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (AttributeError, OSError):
    pass
if os.getppid() != int(launcher):
    sys.exit("the launcher has gone")
if not os.environ["RANK_ON_TERMINAL"]:
    log = os.open(os.environ["RANK_LOG"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"{command[0]}: {error.strerror}")
"""
#: Text in the log of a rank that NCCL's watchdog ended because another rank did not answer.
_WATCHDOG = "Watchdog caught collective operation timeout"


def start_words(command: str, arguments: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return entry point and arguments of a rank started by this process."""
    return sys.executable, ("-I", "-S", "-c", START, str(os.getpid()), command, *arguments)


def answers(pid: int, number: int) -> bool:
    """Whether a process handles or ignores a signal; True if the system does not report it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = dict(line.split(":", 1) for line in status.splitlines())
    handled = int(masks.get("SigCgt", "0"), 16) | int(masks.get("SigIgn", "0"), 16)
    return bool(handled >> (number - 1) & 1)


def describe_exit(code: int) -> str:
    """Describe a process's exit code (negative: the signal that killed it) in words."""
    if code >= 0:
        known = {
            EXIT_SAVED: "left nothing unsaved and asks to be started again",
            EXIT_PEER: "lost another rank, which left no reason",
        }
        return known.get(code, f"ended with exit code {code}")
    name = signal.Signals(-code).name if -code in signal.valid_signals() else "unknown"
    hint = ""
    if -code == signal.SIGKILL:
        hint = "; if no one sent it, the machine ran out of memory: see dmesg"
    return f"was killed by signal {-code} ({name}{hint})"


class RankLogs(DefaultLogsSpecs):
    """One log file per rank: `rank_3.log`, after a restart `rank_3.1.log`.

    Rank 0's output is also shown on the screen. If the screen is a terminal, rank 0 writes to it directly, for its live
    display; its log file is then written by `log.Logger`, which finds the path in the variable RANK_LOG.

    Args:
        directory: Directory of the logs; a new temporary directory if None.
    """

    def __init__(self, directory: str | None) -> None:
        super().__init__(log_dir=tempfile.mkdtemp(prefix="lucidprune_ranks_"))  # for torch's own error files
        self.directory = Path(directory or self.root_log_dir)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.files: dict[int, Path] = {}  # by local rank
        self._screen: threading.Thread | None = None

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Choose the files of this attempt; called by the agent before each start of the ranks."""
        self.close()
        for local_rank, env in envs.items():
            log = unused_path(self.directory / f"rank_{env['RANK']}.log")
            log.touch()
            self.files[local_rank] = log
            shown = env["RANK"] == "0"
            env["RANK_LOG"] = str(log)
            env["RANK_ON_TERMINAL"] = "1" if shown and sys.stdout.isatty() else ""
            if shown and not sys.stdout.isatty():
                self._screen = threading.Thread(target=self._show, args=(log,), daemon=True)
                self._screen.start()
        return dataclasses.replace(super().reify(envs), tee_stdouts={}, tee_stderrs={})

    def close(self) -> None:
        """Show the rest of rank 0's log and forget this attempt's files."""
        self.files = {}
        if self._screen is not None:
            self._screen.join()
            self._screen = None

    def _show(self, path: Path) -> None:
        """Copy a growing log to the screen, until `close`."""
        with path.open("rb") as log:
            while True:
                # Checked before reading, so that nothing is missed at the end.
                last = path not in self.files.values()
                sys.stdout.buffer.write(log.read())
                sys.stdout.flush()
                if last:
                    return
                time.sleep(0.05)


class Agent(LocalElasticAgent):
    """The elastic agent of one node, with the stopping rules that `multiproc.py` describes.

    Args:
        spec: The job; its entry point and arguments are `start_words`.
        logs: Log files of the ranks.
        grace: Seconds that ranks have to save and leave after a signal.

    Attributes:
        reason: The job's exit code and why it ended; (0, "") unless something failed.
    """

    _pcontext: Any  # SubprocessContext while ranks run

    def __init__(self, spec: WorkerSpec, logs: RankLogs, grace: float) -> None:
        super().__init__(spec, logs)
        self.logs = logs
        self.grace = grace
        self.reason = (0, "")
        self.stop_signal: signal.Signals | None = None
        #: Local rank → non-zero exit code, in the order of observation.
        self.exits: dict[int, int] = {}
        self.deadline: float | None = None
        self._started_at: float | None = None  # None while there are no ranks
        self._told: set[int] = set()  # process ids that have been sent the stop signal

    def take_signals(self) -> None:
        """Handle signals from now on, even before there are ranks and while they are being started."""
        # torch would raise an exception for these at any point, and leave ranks that it has just started.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._receive)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        self.exits = {}
        self._told = set()
        self._started_at = time.monotonic()
        self.deadline = None if self.stop_signal is None else time.monotonic() + self.grace
        pids: dict[int, int] = super()._start_workers(worker_group)
        return pids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        self._started_at = None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        """Record a signal for `_forward`; exit if there are no ranks."""
        if signum == self.stop_signal == signal.SIGINT:
            raise SignalException("interrupted twice", signal.SIGINT)
        self.stop_signal, self._remaining_restarts = signal.Signals(signum), 0
        self.deadline = self.deadline or time.monotonic() + self.grace
        self._told = set()
        if self._started_at is None:
            raise SignalException("there are no ranks", self.stop_signal)

    def _forward(self) -> None:
        """Forward the stop signal to ranks that handle it (torch would also signal their data workers)."""
        if self.stop_signal is None or self._started_at is None:
            return
        starting = time.monotonic() < self._started_at + STARTING_SECONDS
        for handler in self._pcontext.subprocess_handlers.values():
            pid = handler.proc.pid
            if pid not in self._told and not (starting and not answers(pid, self.stop_signal)):
                self._told.add(pid)
                handler.proc.send_signal(self.stop_signal)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._forward()
        codes = {rank: handler.proc.poll() for rank, handler in self._pcontext.subprocess_handlers.items()}
        self.exits.update(
            {
                rank: self._own_code(rank, code)
                for rank, code in codes.items()
                if code and rank not in self.exits
            }
        )
        elsewhere = self._failure_elsewhere(worker_group)
        failures = {*self.exits.values(), *(elsewhere[:1] if elsewhere else ())}
        if self.deadline is None and failures:
            # Ranks that saved wait for the others, which may still be writing. A rank that lost another rank waits for
            # that rank's exit, which may be noticed later. After a crash there is nothing to wait for.
            patience = {frozenset({EXIT_SAVED}): self.grace, frozenset({EXIT_PEER}): PEER_SECONDS}
            self.deadline = time.monotonic() + patience.get(frozenset(failures), 0)
        running = None in codes.values()
        crashed = bool(failures - {EXIT_SAVED, EXIT_PEER, -(self.stop_signal or 0)})
        if self.deadline is not None and (running or self.exits):
            awaited = running or (failures == {EXIT_PEER} and (worker_group.group_world_size or 1) > 1)
            if awaited and not crashed and time.monotonic() < self.deadline:
                return RunResult(state=WorkerState.HEALTHY)
            self._end_ranks(worker_group, elsewhere)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _failure_elsewhere(self, group: WorkerGroup) -> tuple[int, str] | None:
        """Return exit code and reason of a failure on another node, or None."""
        if group.group_world_size == 1 or group.store is None:
            return None
        try:
            if not group.store.check([FAILED_KEY]):
                return None
            code, text = group.store.get(FAILED_KEY).decode().split(" ", 1)
        except RuntimeError as error:
            return 1, f"lost the node that hosts the rendezvous: {error}"
        return int(code), text

    def _end_ranks(self, group: WorkerGroup, elsewhere: tuple[int, str] | None) -> None:
        """Tell the other nodes the reason, end the ranks still running here, and report the reason last."""
        local_rank = self._culprit(elsewhere)
        hanging = self._hanging(elsewhere)
        log = None
        if hanging:
            ranks = ", ".join(str(group.workers[rank].global_rank) for rank in hanging)
            text = f"rank {ranks} on {os.uname().nodename} hangs: it still ran when the others had waited in vain"
            self.reason = (EXIT_PEER, text)
        elif local_rank is not None:
            log = self.logs.files[local_rank]
            rank = group.workers[local_rank].global_rank
            self.reason = self._describe_rank(local_rank, rank)
            if elsewhere is None and group.store is not None and (group.group_world_size or 1) > 1:
                group.store.set(FAILED_KEY, f"{self.reason[0]} {self.reason[1]}")
                time.sleep(1)  # the store may live in this process: let the others read it
            if self.exits[local_rank] == EXIT_SAVED or rank == 0:  # rank 0 is already on the screen
                log = None
        elif elsewhere is not None:
            self.reason = elsewhere
        else:
            stop_signal = self.stop_signal or signal.SIGTERM
            self.reason = (128 + stop_signal, f"ranks still ran {self.grace} s after {stop_signal.name}")
        if self.reason[0] == EXIT_SAVED:
            self._remaining_restarts = 0
        self._pcontext.close(signal.SIGKILL if hanging else signal.SIGTERM, PEER_SECONDS)
        self.logs.close()
        self._say_reason(log)

    def _hanging(self, elsewhere: tuple[int, str] | None) -> list[int]:
        """Return the local ranks that still run if all others, here and elsewhere, only lost another rank."""
        if {*self.exits.values(), *(elsewhere or ())[:1]} != {EXIT_PEER}:
            return []
        handlers = self._pcontext.subprocess_handlers.items()
        return [rank for rank, handler in handlers if handler.proc.poll() is None]

    def _own_code(self, local_rank: int, code: int) -> int:
        """Return a rank's exit code, taking into account that NCCL's watchdog aborts a rank because of another one."""
        if code != -signal.SIGABRT:
            return code
        return EXIT_PEER if _WATCHDOG in self.logs.files[local_rank].read_text(errors="replace") else code

    def _culprit(self, elsewhere: tuple[int, str] | None) -> int | None:
        """Return the local rank responsible: the first that failed by itself.

        If no rank did, here or elsewhere, it is one that saved, or else one that only lost another rank.
        """
        by_itself = [rank for rank, code in self.exits.items() if code not in (EXIT_SAVED, EXIT_PEER)]
        if by_itself:
            return by_itself[0]
        if elsewhere is not None and elsewhere[0] not in (EXIT_SAVED, EXIT_PEER):
            return None
        return min(self.exits, key=lambda rank: self.exits[rank] == EXIT_PEER, default=None)

    def _describe_rank(self, local_rank: int, rank: int) -> tuple[int, str]:
        """Return the job's exit code and reason for a rank that ended."""
        code = self.exits[local_rank]
        text = f"rank {rank} on {os.uname().nodename} {describe_exit(code)}"
        return code if code > 0 else 128 - code, text

    def _say_reason(self, log: Path | None) -> None:
        """Print the end of a rank's log, and below it why all ranks stop or restart."""
        if log is not None:
            lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print("\n  ".join([f"multiproc: {log} ends with", *lines]), file=sys.stderr)
        total = self._worker_group.spec.max_restarts
        left = int(self._remaining_restarts)
        what = f"starting all ranks again (restart {total - left + 1} of {total})" if left else "stopping"
        print(f"multiproc: {self.reason[1]}; {what}", file=sys.stderr, flush=True)
