"""Working ahead: the next item is made in a thread while the consumer uses the present one."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def one_ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield what `items` yields, while a thread already makes the next one.

    Only that thread advances `items`, so whatever they use needs no lock of its own; an error of theirs reaches the
    consumer in its turn. An item must stay valid while the next one is made.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:

        def advance() -> Future[object]:
            return thread.submit(next, items, _END)

        following = advance()
        try:
            while (item := following.result()) is not _END:
                following = advance()
                yield item  # type: ignore[misc]  # not the end, so an Item
        finally:
            following.exception()  # the thread has let go of them
            thread.submit(items.close).result()
