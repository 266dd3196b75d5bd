"""Agreement of ranks before a job begins: on its settings, and on the files named by flags.

Ranks on several machines may see different disks, or a shared one with delay. Rank 0 decides: settings must equal its
own, and a rank whose file differs from rank 0's receives rank 0's.
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
#: Settings that may differ between machines. Only rank 0 writes and decides about `resume`; data sets are compared
#: separately.
_OF_A_MACHINE = ("workers", "prefetch", "data", "resume", "workspace", "raport_file", "tensorboard")


def agreed(configs: C, distributed: Distributed) -> C:
    """Return a job's configuration that makes all ranks do the same. Collective.

    Returns:
        `configs`, with the path of a copy for each file that differs from rank 0's.

    Raises:
        ConfigError: A rank was started with other settings than rank 0; raised on every rank.
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
    """Return the path at which this rank reads rank 0's file of a name. Collective.

    Returns:
        `path`, or, on a rank where that file is missing or differs, a copy that lives as long as the process. If rank 0
            has no such file, nothing is sent, and opening it fails as usual.
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
    """Send a file's content from rank 0 to all; ranks with a `copy` path store it there."""
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
    """Return a folder of this process, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="lucidprune_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _digest(path: Path) -> str | None:
    """Return the digest of a file's content; None if it cannot be read."""
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
