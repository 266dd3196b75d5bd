"""Temporary disabling of activation checkpointing.

A checkpointed block runs its forward pass again in the backward pass. Hooks that gate its modules would act on only one
of the two runs, and the gates of the first would get no derivative. Inside `checkpoints_passed_through` such a block
runs as if it were not checkpointed: once, with all its activations kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch.utils import checkpoint

#: Names in `torch.utils.checkpoint` of the wrappers of a call without reentrant autograd; they differ between versions.
_GENERATORS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)


class _PlainFunction:
    """Replacement of the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., object], _preserve_rng_state: bool, *args: object) -> object:
        return function(*args)


def _plain_generator(*_args: object, **_kwargs: object) -> Iterator[None]:
    """Replacement of the code that runs before and after a checkpointed function."""
    yield


@contextlib.contextmanager
def checkpoints_passed_through() -> Iterator[None]:
    """Make `torch.utils.checkpoint` just call its function inside the block, in both of its variants."""
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
