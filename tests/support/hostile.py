"""Hostile files: each is created in place of a good one."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Path to create, content of the good file, file that exists once code has been run.
Maker = Callable[[Path, bytes, Path], None]
MAKERS: dict[str, Maker] = {}


class Attack:
    """Creates a file when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def maker(name: str) -> Callable[[Maker], Maker]:
    """Register a maker."""

    def put(make: Maker) -> Maker:
        MAKERS[name] = make
        return make

    return put


def _content(name: str, change: Callable[[bytes], bytes]) -> None:
    @maker(name)
    def make(path: Path, good: bytes, canary: Path) -> None:
        path.write_bytes(change(good))


def _flipped(good: bytes, place: float) -> bytes:
    """Return the content with one bit flipped."""
    position = min(int(place * len(good)), len(good) - 1)
    return good[:position] + bytes([good[position] ^ 32]) + good[position + 1 :]


_content("empty", lambda good: b"")
_content("one byte", lambda good: good[:1])
_content("64 bytes", lambda good: good[:64])
_content("a quarter", lambda good: good[: len(good) // 4])
_content("a half", lambda good: good[: len(good) // 2])
_content("all but a byte", lambda good: good[:-1])
_content("first bit flipped", lambda good: _flipped(good, 0))
_content("middle bit flipped", lambda good: _flipped(good, 0.5))
_content("text", lambda good: b"nothing of the kind\n" * 40)
_content("zeros", lambda good: bytes(4096))
_content("noise", lambda good: random.Random(0).randbytes(4096))
_content("no UTF-8", lambda good: b"name: \xff\xfe\xc3\x28\n")
_content("UTF-16", lambda good: "name: [1, 2]\n".encode("utf-16"))
_content("100,000 brackets", lambda good: b"[" * 100_000)
_content("100,000 tables", lambda good: b'{"a":' * 100_000)
_content("a million elements", lambda good: b"<a>" * 1_000_000)
_content("no numbers", lambda good: b'{"groups": [NaN, Infinity], "format": NaN, "removed": NaN}')
_content("long numbers", lambda good: b'{"format": ' + b"9" * 20_000 + b"}")
_content("aliases", lambda good: b"a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nepochs: [*c, *c]\n")
_content("entities", lambda good: b"<!DOCTYPE a [<!ENTITY b 'bbbb'><!ENTITY c '&b;&b;&b;'>]><a>&c;&c;</a>")
_content("a foreign tag", lambda good: b"epochs: !!python/object/apply:os.system ['touch canary']\n")
_content(
    "a bitmap of 4 gigapixels",
    lambda good: b"BM" + bytes(16) + b"\xff\xff\0\0\xff\xff\0\0\1\0\x18" + bytes(99),
)


@maker("pickle with code")
def _pickle(path: Path, good: bytes, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"data": Attack(canary)}, protocol=2))


@maker("torch.save with code")
def _torch(path: Path, good: bytes, canary: Path) -> None:
    torch.save({"format": "lucidprune", "version": 2, "state_dict": Attack(canary)}, path)


@maker("old torch.save with code")
def _old_torch(path: Path, good: bytes, canary: Path) -> None:
    content = {"state_dict": {"a": torch.zeros(2)}, "args": Attack(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=False)


@maker("npz with code")
def _npz(path: Path, good: bytes, canary: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, format=np.array([Attack(canary)], dtype=object))


@maker("npz of 2⁴⁰ numbers")
def _large_npz(path: Path, good: bytes, canary: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.npy", header.getvalue() + bytes(100))


@maker("one number, 2⁴⁰ times")
def _expanded(path: Path, good: bytes, canary: Path) -> None:
    state = {"conv1.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}
    torch.save({"format": "lucidprune", "version": 2, "digest": "", "state_dict": state}, path)


@maker("one list, 10¹² times")
def _lists(path: Path, good: bytes, canary: Path) -> None:
    content: list[Any] = [0]
    for _ in range(12):
        content = [content] * 10
    torch.save({"format": "lucidprune", "version": 2, "digest": "", "callbacks": {"a": {"b": content}}}, path)


@maker("a list in 200 others")
def _deep(path: Path, good: bytes, canary: Path) -> None:
    content: list[Any] = []
    for _ in range(200):
        content = [content]
    torch.save({"format": "lucidprune", "version": 2, "digest": "", "callbacks": {"a": {"b": content}}}, path)


@maker("zip bomb")
def _zip_bomb(path: Path, good: bytes, canary: Path) -> None:
    """Write members that all claim to hold terabytes, and hold 8 MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", bytes(8 << 20))
        archive.writestr("train/a/0.png", bytes(8 << 20))
        # The central directory may claim anything.
        for info in archive.infolist():
            info.file_size = 8 << 40


@maker("tar bomb")
def _tar_bomb(path: Path, good: bytes, canary: Path) -> None:
    with gzip.open(path, "wb") as file:
        info = tarfile.TarInfo("train/a/0.png")
        info.size = 1 << 40
        file.write(info.tobuf() + bytes(1 << 16))


@maker("a directory")
def _directory(path: Path, good: bytes, canary: Path) -> None:
    path.mkdir()


@maker("a pipe")
def _pipe(path: Path, good: bytes, canary: Path) -> None:
    os.mkfifo(path)


@maker("a link to nothing")
def _dangling(path: Path, good: bytes, canary: Path) -> None:
    path.symlink_to(path.with_name("absent"))


@maker("a link to itself")
def _circular(path: Path, good: bytes, canary: Path) -> None:
    path.symlink_to(path.name)


@maker("a device without an end")
def _device(path: Path, good: bytes, canary: Path) -> None:
    path.symlink_to("/dev/zero")


@maker("a terabyte of zeros")
def _sparse(path: Path, good: bytes, canary: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


if os.geteuid() != 0:  # root, for whom nothing is closed

    @maker("closed to this user")
    def _closed(path: Path, good: bytes, canary: Path) -> None:
        path.write_bytes(good)
        path.chmod(0)
