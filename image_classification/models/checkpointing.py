"""Activation checkpointing, passed through for a while.

A checkpointed block runs its forward pass again in the backward pass. Hooks that gate its modules would act on one of
the two runs only, and the gates of the first would get no derivative. Inside `checkpoints_passed_through` such a block
runs as if it were not checkpointed: once, with all its activations kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch.utils import checkpoint

#: Names in `torch.utils.checkpoint` of what wraps a call without reentrant autograd; they differ between versions.
_GENERATORS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)


class _PlainFunction:
    """Stands in for the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., object], _preserve_rng_state: bool, *args: object) -> object:
        return function(*args)


def _plain_generator(*_args: object, **_kwargs: object) -> Iterator[None]:
    """Stands in for what runs before and after the call of a checkpointed function."""
    yield


@contextlib.contextmanager
def checkpoints_passed_through() -> Iterator[None]:
    """`torch.utils.checkpoint` calls what it is given, and nothing else, in either of its variants."""
    plain: dict[str, object] = {"CheckpointFunction": _PlainFunction}
    plain |= {name: _plain_generator for name in _GENERATORS if hasattr(checkpoint, name)}
    before = {name: getattr(checkpoint, name) for name in plain}
    try:
        for name, stand_in in plain.items():
            setattr(checkpoint, name, stand_in)
        yield
    finally:
        for name, original in before.items():
            setattr(checkpoint, name, original)
