"""Random numbers: Random123's known answers, independence of the batch, statistics."""

from __future__ import annotations

import numpy as np
import pytest

from image_classification.data.philox import Stream, permutation, philox4x32, uniforms, words64

# the published known-answer vectors of Random123 for philox4x32-10: counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    words = philox4x32(np.array(counter, dtype=np.uint64).reshape(4, 1), key)
    assert tuple(int(word) for word in words[:, 0]) == answer


def slow_philox(counter, key):
    """The definition of the paper, one block of plain integers at a time."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_words_are_the_definition_at_their_coordinates():
    seed, stream, epoch = (7 << 32) | 5, Stream.FLIP, 11
    words = words64(seed, stream, epoch, [3, 123456], 3)
    for row, sample_id in enumerate((3, 123456)):
        blocks = [slow_philox((sample_id, epoch, (stream << 16) | block, 0), (5, 7)) for block in range(2)]
        expected = [(a << 32) | b for block in blocks for a, b in (block[:2], block[2:])]
        assert [int(word) for word in words[row]] == expected[:3]


def test_a_sample_does_not_depend_on_its_batch():
    together = uniforms(1, Stream.WINDOW, 2, [5, 9, 700], 22)
    alone = uniforms(1, Stream.WINDOW, 2, [9], 22)
    assert np.array_equal(together[1:2], alone)
    assert np.array_equal(uniforms(1, Stream.WINDOW, 2, [9], 4), alone[:, :4])


@pytest.mark.parametrize(
    "other", [(2, 1, 3, 4), (1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 3, 5), (1 + 2**32, 1, 3, 4)]
)
def test_every_coordinate_matters(other):
    seed, stream, epoch, sample_id = other
    assert uniforms(seed, stream, epoch, [sample_id], 1) != uniforms(1, 1, 3, [4], 1)


def test_uniforms_are_uniform():
    numbers = uniforms(3, Stream.AUGMENT, 0, np.arange(20_000), 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.03


def test_order_is_a_permutation_that_changes_with_epoch_and_seed():
    orders = [permutation(0, 0, 5000), permutation(0, 1, 5000), permutation(1, 0, 5000)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(5000))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        ranks = [np.argsort(orders[i]) for i in (first, second)]
        assert abs(np.corrcoef(*ranks)[0, 1]) < 0.06


def test_order_is_the_same_for_ever():
    assert permutation(0, 0, 8).tolist() == [2, 0, 5, 7, 6, 3, 4, 1]
