"""Checkpoints: written atomically, rotated, and complete enough to continue bit for bit.

A checkpoint is a dictionary of tensors and plain data, so that it loads with `weights_only=True`:

    format, version, digest "lucidprune", 2, over all tensors: see `checkpoint_format`, which validates files
    arch, structure         description of the network (`models.structure`), including the widths of a pruned one
    state_dict, ema         weights; averaged weights or None
    optimizer, scaler       their states
    epoch, iteration        position in the schedule (the learning rate is a function of the iteration)
    loader                  position in the data
    steps_per_epoch         iterations per epoch, to check that the position means the same
    class_names             names by class index, None if the data has none
    ema_updates             number of updates of the averaged weights
    best_prec1, best_epoch  best validation figure so far of networks of this size, or None; its epoch
    rng                     random states of every rank
    callbacks               states of the callbacks by name
    config                  the resolved configuration
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, ClassVar, cast

import numpy as np
import torch

from image_classification.background import Background, snapshot
from image_classification.checkpoint_format import FORMAT, sealed
from image_classification.config import SettingError, check, check_setting, flag
from image_classification.distributed import Distributed
from image_classification.file_writing import TEMPORARY, atomic_file, copy_file, reason_of
from image_classification.plain_data import Plain
from image_classification.workspace_lock import WorkspaceLock

#: Entries needed to resume training.
TRAINING_STATE = (
    *("arch", "structure", "state_dict", "ema", "optimizer", "scaler", "epoch", "iteration", "best_prec1"),
    *("lr_factor", "num_skipped", "loader", "callbacks", "world_size", "steps_per_epoch", "rng"),
    *("training_sums", "config"),
)
BEST_FILENAME = "model_best.pth.tar"
SUFFIXES = (".pth", ".pt", ".tar", ".ckpt")
_GATHERED = re.compile(r"checkpoint-(\d+)\.pth\.tar")


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints"""

    #: Name of the setting that chooses the folder, for messages.
    folder_setting: ClassVar[str] = "workspace"

    workspace: Path = flag(
        Path("./"), "--workspace", help="Folder of everything a run writes.", metavar="DIR"
    )
    resume: str | None = flag(
        None,
        "--resume",
        metavar="FILE|auto",
        help="Continue from a checkpoint; auto: from the workspace's, if there is one.",
    )
    checkpoint_filename: str = flag(
        "checkpoint.pth.tar", "--checkpoint-filename", help="Name of the latest checkpoint."
    )
    gather_checkpoints: int = flag(
        0,
        "--gather-checkpoints",
        nargs="?",
        const=-1,
        metavar="N",
        help="Keep checkpoint-EPOCH.pth.tar of every epoch (no number) or of the last N epochs.",
    )
    checkpoint_interval: int = flag(
        0,
        "--checkpoint-interval",
        metavar="N",
        help="Save every N iterations too; 0: at the end of epochs only.",
    )
    checkpoints: bool = flag(True, "--checkpoints", help="Write checkpoints.")
    checkpoint_beside: bool = flag(
        True,
        "--checkpoint-beside",
        help="Write checkpoints alongside training, which stands still only while its state is copied to the host's "
        "memory; otherwise until the file is on disk.",
    )

    def __post_init__(self) -> None:
        check(
            self.gather_checkpoints >= -1, f"--gather-checkpoints: {self.gather_checkpoints} is not a count"
        )
        check(self.checkpoint_interval >= 0, f"--checkpoint-interval: {self.checkpoint_interval} is negative")
        self._check_name()
        if not self.checkpoints:
            check(
                self.checkpoint_interval == 0, "--checkpoint-interval and --no-checkpoints exclude each other"
            )
            check(
                self.gather_checkpoints == 0, "--gather-checkpoints and --no-checkpoints exclude each other"
            )

    def _check_name(self) -> None:
        """Check that the latest checkpoint's name has the right suffix and is not the name of another file of the
        run.
        """
        name = self.checkpoint_filename
        check(
            Path(name).name == name,
            f"--checkpoint-filename: {name!r} is a path; the folder is given by --workspace",
        )
        check(
            name.endswith(SUFFIXES) and not name.startswith("."),
            f"--checkpoint-filename: {name!r} is not a checkpoint's name: it must end in {', '.join(SUFFIXES)}",
        )
        check(
            name != BEST_FILENAME and not _GATHERED.fullmatch(name),
            f"--checkpoint-filename: {name!r} is the name of the best checkpoint, or of an epoch's: choose another",
        )


class _ErrnoWriter:
    """File object for `torch.save` that records the operating system's error.

    torch reports a full disk as a bare RuntimeError of its zip writer ("unexpected pos"); this object keeps the reason.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def naming_the_reason(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield a file for torch to write to, whose failures raise the operating system's error instead of torch's."""
    writer = _ErrnoWriter(file)
    try:
        yield cast(IO[bytes], writer)
    except RuntimeError as error:
        if writer.error is not None:
            raise writer.error from error
        raise


def save_atomically(payload: Plain, path: Path) -> None:
    """`torch.save` through `atomic_file`; a LucidPrune checkpoint (`format`) gets its version and digest."""
    if payload.get("format") == FORMAT:
        payload = sealed(payload)
    with atomic_file(path) as file, naming_the_reason(file) as writer:
        torch.save(payload, writer)


@contextlib.contextmanager
def naming_workspace(config: CheckpointConfig) -> Iterator[None]:
    """Turn the operating system's error about a workspace into a `SettingError` that names the flag."""
    try:
        yield
    except OSError as error:
        remedy = "choose another folder, or leave checkpoints out (--no-checkpoints)"
        problem = f"cannot be written ({reason_of(error)}); {remedy}"
        raise SettingError(config.folder_setting, str(config.workspace), problem) from None


@contextlib.contextmanager
def workspace_alone(config: CheckpointConfig, distributed: Distributed) -> Iterator[None]:
    """Keep other jobs out of the workspace inside the block. Collective.

    Raises:
        SettingError: Another job is using the workspace, or it cannot be written to.
    """
    locks: list[WorkspaceLock] = []

    def take() -> None:
        with naming_workspace(config):
            config.workspace.mkdir(parents=True, exist_ok=True)
            locks.append(WorkspaceLock(config.workspace, config.folder_setting))

    distributed.check_on_main(take)
    try:
        yield
    finally:
        for lock in locks:
            lock.release()


def capture_rng() -> Plain:
    """Return the random states of this process (torch, CUDA, NumPy, Python) as JSON-able data."""
    version, internal, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    return {
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": _to_hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "numpy": [
            legacy["state"]["key"].tolist(),
            int(legacy["state"]["pos"]),
            int(legacy["has_gauss"]),
            float(legacy["gauss"]),
        ],
        "python": [version, list(internal), gauss],
    }


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def restore_rng(state: Plain) -> None:
    """Restore random states from `capture_rng`. A CUDA state is ignored on machines without CUDA."""
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


class Checkpointer:
    """Writes a run's checkpoints on rank 0 and keeps as many as configured.

    Files are written alongside training, one save at a time. The error of a failed save is raised by the next `check`,
    `save` or `finish`; the previous file of that name is then still intact.

    Args:
        config: Which checkpoints to keep.
        distributed: Only the main process writes.
        say: Prints a message, such as that a previous run's checkpoint was set aside.

    Attributes:
        stood_still: Seconds for which training has waited for saves; readers may reset it.
    """

    def __init__(
        self, config: CheckpointConfig, distributed: Distributed, say: Callable[[str], None]
    ) -> None:
        self.config = config
        self.distributed = distributed
        self.path = config.workspace / config.checkpoint_filename
        self.best_path = config.workspace / BEST_FILENAME
        self.stood_still = 0.0
        self._say = say
        self._fresh = False
        self._background = Background()

    def prepare(self, resumed: Path | None) -> None:
        """Check that the workspace can be written to. Collective.

        Raises:
            SettingError: The workspace cannot be written to.
        """
        if self.config.checkpoints:
            self.distributed.check_on_main(self._prepare)
        self._fresh = resumed is None

    def claim(self) -> None:
        """Move an older run's files aside, when a fresh run is about to train. Collective.

        This is not done earlier, so that a run refused for a wrong flag leaves the older one for `--resume auto`.
        """
        if self.config.checkpoints:
            self.distributed.check_on_main(self._claim)

    def _prepare(self) -> None:
        probe = self.config.workspace / f".write-test-{os.getpid()}"
        with naming_workspace(self.config):
            self.config.workspace.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        for name in (self.path.name, BEST_FILENAME, "checkpoint-*.pth.tar"):
            for torn in self.config.workspace.glob(f".{name}.*{TEMPORARY}"):
                torn.unlink(missing_ok=True)  # incomplete file of a killed run

    def _claim(self) -> None:
        if self._fresh:
            numbered = sorted(path for _, path in self._numbered())
            for path in (self.path, self.best_path, *numbered):
                self._set_aside(path)
        self._fresh = False

    def _set_aside(self, path: Path) -> None:
        if not path.exists():
            return
        number = 1
        while (kept := path.with_name(f"{path.name}.previous-{number}")).exists():
            number += 1
        path.rename(kept)
        self._say(f"{path} of an earlier run was kept as {kept.name}; --resume auto would have continued it")

    def save(self, payload: Plain, *, is_best: bool = False, end_of_epoch: bool = False) -> None:
        """Write the latest checkpoint, and the best and the epoch's checkpoint if they apply; see `check`.

        The latest is written last: a run that is killed in between resumes before this save, and repeats it.

        Raises:
            OSError: This save failed, or with `checkpoint_beside` the one before.
        """
        if not self.config.checkpoints or not self.distributed.is_main:
            return
        begin = time.perf_counter()
        self._claim()
        paths = [self.path]
        if is_best:
            paths.append(self.best_path)
        gathering = end_of_epoch and self.config.gather_checkpoints != 0
        if gathering:
            # `epoch` is the next one; the file is named after the one that ended, counted from 0.
            paths.append(self.config.workspace / f"checkpoint-{payload['epoch'] - 1}.pth.tar")
        self._background.finish()
        content = snapshot(payload) if self.config.checkpoint_beside else payload
        self._background.start(lambda: self._write(content, paths, gathering))
        if not self.config.checkpoint_beside:
            self._background.finish()
        self.stood_still += time.perf_counter() - begin

    def _write(self, payload: Plain, paths: Sequence[Path], gathering: bool) -> None:
        first, *others = reversed(paths)
        save_atomically({"format": FORMAT, **payload}, first)
        if gathering:
            self._rotate()  # before the latest: a killed run that has finished would not rotate any more
        for path in others:
            copy_file(first, path)

    def check(self) -> None:
        """Raise the error of a failed save, without waiting.

        Raises:
            OSError: A save failed; the message names the file and the remedy.
        """
        self._background.check()

    def finish(self) -> None:
        """Wait until the last save is on disk; raises as `check` does."""
        self._background.finish()

    def finished(self) -> contextlib.AbstractContextManager[None]:
        """Wait on exit for saves made inside the block, also after an error; raises as `check` does."""
        return self._background.finished()

    def _rotate(self) -> None:
        if self.config.gather_checkpoints < 0:
            return
        for _, path in self._numbered()[: -self.config.gather_checkpoints]:
            path.unlink()

    def _numbered(self) -> list[tuple[int, Path]]:
        """Return the kept per-epoch checkpoints in the workspace, by rising epoch."""
        matches = [
            (_GATHERED.fullmatch(path.name), path)
            for path in self.config.workspace.glob("checkpoint-*.pth.tar")
        ]
        return sorted((int(match[1]), path) for match, path in matches if match)

    def resume_path(self) -> Path | None:
        """Return the checkpoint to resume from, or None for a fresh start. Collective: rank 0 decides for all.

        A job restarted by the launcher after a failure resumes from its own last checkpoint.

        Raises:
            SettingError: A named file does not exist: training from scratch instead would be a surprise.
        """
        found = self.distributed.decide_on_main(self._resume_path)
        return None if found is None else Path(found)

    def _resume_path(self) -> str | None:
        """See `resume_path`."""
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if self.config.resume is None or self.config.resume == "auto":
            automatic = self.config.resume == "auto" or (restarted and self.config.checkpoints)
            return str(self.path) if automatic and self.path.is_file() else None
        path = Path(self.config.resume)
        check_setting(
            path.is_file(), "resume", str(path), "no such file; leave it out (or say auto) to start afresh"
        )
        return str(self.path if restarted and self.path.is_file() else path)
