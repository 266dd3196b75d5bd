"""Failures of other ranks: the error that this rank raises, and the recognition of Gloo and NCCL errors that mean
it.
"""

from __future__ import annotations

import os

#: Messages of Gloo, NCCL and the process group's store when the other end has gone.
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Broken pipe",
    "Did the remote server shutdown",
)
#: Messages of Gloo and NCCL when the other end exists but does not answer.
_PEER_SILENT = ("Timed out waiting", "Watchdog caught collective operation timeout", "timed out after")


class PeerError(RuntimeError):
    """Another rank failed and reported the reason; this rank stops with it."""


def peer_loss(error: Exception) -> str | None:
    """Return the message for users if an error only means that another rank failed; None for any other error."""
    if isinstance(error, PeerError):
        return str(error)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return None
    for kinds, what in ((_PEER_GONE, "ended"), (_PEER_SILENT, "gave no answer within --dist-timeout")):
        said = next((words for words in kinds if words in str(error)), None)
        if said is not None:
            return f"another rank {what}, and this one cannot go on without it ({said})"
    return None
