"""What ranks read for themselves, made one before a job begins: its settings, and the files that flags name.

Ranks on several machines may see other disks, or a shared one late. Rank 0 decides: settings must be its own, and a
rank that does not find what rank 0 reads under a name gets it from there.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

from image_classification.config import check, flag_fields, sections
from image_classification.distributed import Distributed
from image_classification.resolved_config import to_plain

C = TypeVar("C")
_CHUNK = 16 << 20
#: What may differ between machines. Rank 0 alone writes, and decides about `resume`; data sets are compared themselves.
_OF_A_MACHINE = ("workers", "prefetch", "data", "resume", "workspace", "raport_file", "tensorboard")


def agreed(configs: C, distributed: Distributed) -> C:
    """A job's configuration with which all ranks do the same. Collective.

    Returns:
        `configs`; where this rank does not have a file as rank 0 has it, with the name of a copy.

    Raises:
        ConfigError: On every rank, when one was started with other settings than rank 0.
    """
    if not distributed.is_distributed:
        return configs
    _check_settings(to_plain(configs), distributed)
    changed: dict[str, object] = {}
    for name in sections(type(configs)):
        section = getattr(configs, name)
        for field, spec in flag_fields(type(section)):
            path = getattr(section, field.name)
            if spec.reads and path is not None:
                found = shared_file(Path(path), distributed)
                section = dataclasses.replace(section, **{field.name: type(path)(found)})
        changed[name] = section
    return dataclasses.replace(configs, **changed)  # type: ignore[type-var]


def shared_file(path: Path, distributed: Distributed) -> Path:
    """Where this rank reads what rank 0 has under a name. Collective.

    Returns:
        `path`; on a rank that has no such file, or another one, a copy that lives as long as the process. Without a
        file on rank 0 nothing is sent, and opening it reports that.
    """
    if not distributed.is_distributed:
        return path
    digests = distributed.gather_objects(_digest(path))
    lacking = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if digests[0] is None or not lacking:
        return path
    if distributed.is_main:
        ranks = ", ".join(map(str, lacking))
        print(f"{path} is not the same, or not there, for rank(s) {ranks}: rank 0 sends it", flush=True)
    copy = _copies() / digests[0] / path.name if distributed.rank in lacking else None
    _send(path, copy, distributed)
    return copy or path


def _send(path: Path, copy: Path | None, distributed: Distributed) -> None:
    """A file's content goes from rank 0 to all; those with a `copy` keep it there."""
    source = path.open("rb") if distributed.is_main else None
    target = None
    if copy is not None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        target = copy.open("wb")
    try:
        while chunk := distributed.broadcast_bytes(b"" if source is None else source.read(_CHUNK)):
            if target is not None:
                target.write(chunk)
    finally:
        for file in (source, target):
            if file is not None:
                file.close()


@functools.cache
def _copies() -> Path:
    """A folder of this process's own, removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="lucidprune_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _digest(path: Path) -> str | None:
    """Of a file's content; None without one that can be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError:
        return None


def _check_settings(mine: dict[str, object], distributed: Distributed) -> None:
    for name in _OF_A_MACHINE:
        mine.pop(name, None)
    main: dict[str, object] = distributed.broadcast_object(mine)
    differing = {name: [value, main.get(name)] for name, value in mine.items() if value != main.get(name)}
    for rank, settings in enumerate(distributed.gather_objects(differing)):
        told = ", ".join(
            f"`{name}` {value} (rank 0: {other})" for name, (value, other) in list(settings.items())[:3]
        )
        check(
            not settings,
            f"rank {rank} was started with {told}: give all ranks the same command line and recipes",
        )
