"""Lock for one job per workspace: a second job is refused, naming the first one's process, host and start time.

The lock is a file that records its holder, under a POSIX record lock of the operating system, which ends with its
process in any case and is not inherited by data workers. So a dead process leaves no lock behind on its own machine. A
network file system may not support record locks, or not across machines; there the file's age decides: the owner
touches it every `HEARTBEAT` seconds, and a file not touched for `STALE_AFTER` seconds may be taken over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from image_classification.config import SettingError
from image_classification.plain_data import Plain
from image_classification.small_files import parse_json

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

FILENAME = ".lucidprune.lock"
HEARTBEAT = 10.0
"""Seconds between two heartbeats."""
STALE_AFTER = 45.0
"""Seconds without a heartbeat after which a lock of another machine may be taken over."""

_OPENING = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_held_here: set[Path] = set()


class WorkspaceLock:
    """Keeps other jobs out of a workspace until `release`, or until this process ends.

    Args:
        workspace: Existing folder.
        setting: Setting that chose the folder, for messages.

    Raises:
        SettingError: Another job is using the workspace.
        OSError: The folder cannot be written to.
    """

    def __init__(self, workspace: Path, setting: str = "workspace") -> None:
        self.setting = setting
        self.path = workspace.resolve() / FILENAME
        self._ended = threading.Event()
        if self.path in _held_here:
            raise self._refusal({"pid": os.getpid(), "host": socket.gethostname()})
        self._descriptor = self._acquire()
        _held_here.add(self.path)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(_identity()).encode(), 0)
        self._inode = os.fstat(self._descriptor).st_ino
        threading.Thread(target=self._beat, name="workspace lock", daemon=True).start()

    def release(self) -> None:
        """Release the lock and remove its file."""
        if self._ended.is_set():
            return
        self._ended.set()
        _held_here.discard(self.path)
        with contextlib.suppress(OSError):  # the workspace may no longer exist
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
        os.close(self._descriptor)

    def _acquire(self) -> int:
        while True:
            descriptor = self._open()
            try:
                free = self._is_free(descriptor)
                with contextlib.suppress(FileNotFoundError):
                    if free and os.stat(self.path).st_ino == os.fstat(descriptor).st_ino:
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner has just removed it: there is another file, or none

    def _open(self) -> int:
        """Open the file, creating it if missing. A link or pipe in its place must not be written to or waited for."""
        try:
            descriptor = os.open(self.path, _OPENING, 0o666)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
        raise SettingError(
            self.setting,
            str(self.path.parent),
            f"its {FILENAME} is no regular file: remove it, or choose another folder",
        )

    def _is_free(self, descriptor: int) -> bool:
        """Try to take the lock: True if taken; False to try again.

        Raises:
            SettingError: Another job holds the lock.
        """
        owner = _read(descriptor)
        try:
            if fcntl is None:
                raise OSError
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            supported = True
        except (BlockingIOError, PermissionError):
            raise self._refusal(owner) from None
        except OSError:
            supported = False  # this file system does not support locks
        if not owner:
            return True
        if owner.get("host") == socket.gethostname() and owner.get("boot") == _boot():
            if not supported and _is_alive(owner):
                raise self._refusal(owner)
            return True
        return self._wait_for_stale(descriptor, owner)

    def _wait_for_stale(self, descriptor: int, owner: Plain) -> bool:
        """Watch another machine's lock until it is stale, or its owner shows a heartbeat."""
        touched = os.fstat(descriptor).st_mtime_ns
        age = max(_now_of(self.path.parent) - touched / 1e9, 0.0)
        if age < STALE_AFTER:
            logger.warning(
                "%s was held by %s %.0f s ago: waiting %.0f s for a sign of life",
                self.path.parent,
                _shown(owner),
                age,
                STALE_AFTER - age,
            )
        end = time.monotonic() + STALE_AFTER - age
        while time.monotonic() < end:
            time.sleep(min(1.0, max(end - time.monotonic(), 0.0)))
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path).st_mtime_ns != touched:
                    raise self._refusal(owner)
        return True

    def _refusal(self, owner: Plain) -> SettingError:
        return SettingError(
            self.setting,
            str(self.path.parent),
            f"another job is at work in it ({_shown(owner)}): wait for it, end it, or choose another folder",
        )

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def _identity() -> Plain:
    """Identify this process in a way that remains unique afterwards, since process ids are reused."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "began": _began(os.getpid()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read(descriptor: int) -> Plain:
    """Read the holder from a lock file; nothing if the file is empty, torn or not a lock of ours."""
    with contextlib.suppress(ValueError):
        content = parse_json(os.pread(descriptor, 4096, 0))
        if isinstance(content, dict) and {"pid", "host"} <= content.keys():
            return content
    return {}


def _shown(owner: Plain) -> str:
    since = f", since {owner['time']}" if "time" in owner else ""
    return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}{since}"


def _is_alive(owner: Plain) -> bool:
    pid = owner.get("pid")
    return isinstance(pid, int) and _began(pid) is not None and _began(pid) == owner.get("began")


def _boot() -> str | None:
    """Return an id of the machine's current boot."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _began(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; None if there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        # The program's name, in parentheses, may contain spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _now_of(folder: Path) -> float:
    """Return the file system's current time in seconds, which may differ from this machine's on a server."""
    probe = folder / f".clock-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
