"""Compact storage of many paths: a single byte string, since a Python string takes about a hundred bytes per path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 16


def _encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _decoded(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


class Paths(Sequence[str]):
    """An immutable sequence of N paths.

    Attributes:
        joined: Bytes of all paths, in UTF-8 (surrogates for other bytes), each followed by a NUL.
        ends: (N,) int64 position after each path's NUL.
    """

    def __init__(self, joined: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.joined = joined
        self.ends = ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> Paths:
        """Pack paths; packed ones are returned unchanged."""
        if isinstance(paths, Paths):
            return paths
        encoded = [_encoded(path) for path in paths]
        joined = np.frombuffer(b"".join(path + b"\0" for path in encoded), np.uint8)
        return cls(joined, np.cumsum([len(path) + 1 for path in encoded], dtype=np.int64))

    @classmethod
    def concatenated(cls, parts: Sequence[Paths]) -> Paths:
        """Concatenate several sequences."""
        offsets = np.cumsum([0, *(len(part.joined) for part in parts)])
        ends = [part.ends + offset for part, offset in zip(parts, offsets, strict=False)]
        empty = np.zeros(0, np.uint8)
        return cls(
            np.concatenate([empty, *(part.joined for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *ends]),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], name: str) -> Paths:
        """Build a sequence from the output of `to_arrays`."""
        return cls(arrays[name], arrays[f"{name}.ends"])

    def to_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return the sequence as named arrays, for a file."""
        return {name: self.joined, f"{name}.ends": self.ends}

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]
        start = self.ends[place - 1] if place else 0
        return _decoded(self.joined[start : self.ends[place] - 1].tobytes())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            yield from map(_decoded, self.rows(start, start + _CHUNK).joined.tobytes().split(b"\0")[:-1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        packed = Paths.of(other)
        return np.array_equal(self.ends, packed.ends) and np.array_equal(self.joined, packed.joined)

    __hash__ = None  # type: ignore[assignment]

    def rows(self, start: int, stop: int) -> Paths:
        """Return paths start to stop, without copying their bytes."""
        begin = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop]
        return Paths(self.joined[begin : int(ends[-1]) if len(ends) else begin], ends - begin)

    def subset(self, ids: NDArray[np.int64]) -> Paths:
        """Return some paths, in the given order."""
        starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]]) if len(self) else self.ends
        parts = []
        for begin in range(0, len(ids), _CHUNK):
            chosen = ids[begin : begin + _CHUNK]
            lengths = self.ends[chosen] - starts[chosen]
            ends = np.cumsum(lengths)
            # Source position of every byte: its path's start in the source, plus its offset within the path.
            places = np.arange(int(ends[-1])) + np.repeat(starts[chosen] - (ends - lengths), lengths)
            parts.append(Paths(self.joined[places], ends))
        return Paths.concatenated(parts)
