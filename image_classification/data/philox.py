"""Counter-based random numbers: Philox4x32-10 in vectorised numpy.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), table 2 and section 3.3. A draw is a
function of its coordinates (seed, stream, epoch, sample id), with no state to carry: a sample's augmentation in an
epoch does not depend on batch, rank, worker or restarts.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_CHUNK = 1 << 14


class Stream(IntEnum):
    """Purposes with independent random numbers for the same seed, epoch and sample."""

    ORDER = 0
    WINDOW = 1
    FLIP = 2
    AUGMENT = 3
    MIXUP = 4
    SYNTHETIC = 5


def philox4x32(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Ten rounds of Philox4x32.

    Args:
        counters: (4, …) 32-bit words held in uint64.
        key: Two 32-bit words.

    Returns:
        (4, …) 32-bit words held in uint64.
    """
    word0, word1, word2, word3 = counters
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0 = word0 * _MULTIPLIERS[0]
        product1 = word2 * _MULTIPLIERS[1]
        word0, word1, word2, word3 = (
            (product1 >> _WORD) ^ word1 ^ np.uint64(key0),
            product1 & _LOW,
            (product0 >> _WORD) ^ word3 ^ np.uint64(key1),
            product0 & _LOW,
        )
        key0 = (key0 + _WEYL[0]) & 0xFFFFFFFF
        key1 = (key1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([word0, word1, word2, word3])


def words64(seed: int, stream: int, epoch: int, sample_ids: ArrayLike, count: int) -> NDArray[np.uint64]:
    """Return independent 64-bit words, a pure function of the arguments and of each sample id alone.

    Args:
        seed: Any integer; its low 64 bits are the key.
        stream: Purpose of the numbers; below 2^16.
        epoch: Below 2^32.
        sample_ids: (N,) integers below 2^32.
        count: Words per sample, at most 2^17.

    Returns:
        (N, count) uint64.
    """
    ids = np.asarray(sample_ids).astype(np.uint64).reshape(-1)
    num_blocks = (count + 1) // 2
    block_words = (np.uint64(stream) << np.uint64(16)) | np.arange(num_blocks, dtype=np.uint64)
    counters = np.empty((4, ids.size, num_blocks), dtype=np.uint64)
    counters[0] = (ids & _LOW)[:, None]
    counters[1] = np.uint64(epoch & 0xFFFFFFFF)
    counters[2] = block_words[None, :]
    counters[3] = 0
    first, second, third, fourth = philox4x32(counters, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    pairs = np.stack([(first << _WORD) | second, (third << _WORD) | fourth], axis=-1)
    return pairs.reshape(ids.size, 2 * num_blocks)[:, :count]


def uniforms(seed: int, stream: int, epoch: int, sample_ids: ArrayLike, count: int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1) with 53 random bits: (N, count) float64. Arguments as for `words64`."""
    words = words64(seed, stream, epoch, sample_ids, count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """Return the order of an epoch: samples sorted by a random 64-bit key each (ties, practically none, by id)."""
    keys = np.empty(num_samples, np.uint64)
    for start in range(
        0, num_samples, _CHUNK
    ):  # a chunk's intermediate results fit into the processor's cache
        ids = np.arange(start, min(start + _CHUNK, num_samples))
        keys[start : start + len(ids)] = words64(seed, Stream.ORDER, epoch, ids, 1)[:, 0]
    return np.argsort(keys, kind="stable")
