"""Working ahead in a thread: order, errors, clean ends."""

from __future__ import annotations

import threading

import pytest

from image_classification.data.backends.dali.dali_loader import one_ahead


class Source:
    """Counts to three, and remembers how far it got, in which threads, and that it was closed."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.made, self.threads, self.closed = 0, set(), False
        self.reached = [threading.Event() for _ in range(4)]
        self.fail_at = fail_at

    def __call__(self):
        try:
            for number in range(4):
                if number == self.fail_at:
                    raise KeyError("broken")
                self.made += 1
                self.threads.add(threading.get_ident())
                self.reached[number].set()
                yield number
        finally:
            self.closed = True


def test_same_items_in_order_from_one_other_thread():
    source = Source()
    assert list(one_ahead(source())) == [0, 1, 2, 3]
    assert threading.get_ident() not in source.threads
    assert len(source.threads) == 1


def test_the_next_item_is_made_while_the_present_one_is_used_and_no_more():
    source = Source()
    items = one_ahead(source())
    assert next(items) == 0
    assert source.reached[1].wait(10)  # nobody asked for it yet
    assert source.made == 2
    items.close()


def test_an_error_comes_in_its_turn():
    source = Source(fail_at=2)
    items = one_ahead(source())
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(KeyError, match="broken"):
        next(items)
    assert source.closed


def test_leaving_early_closes_the_source():
    source = Source()
    items = one_ahead(source())
    next(items)
    items.close()
    assert source.closed
