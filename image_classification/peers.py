"""When another rank has failed: what a rank raises of it, and how errors of Gloo and NCCL that mean it are known."""

from __future__ import annotations

import os

#: What Gloo, NCCL and the store of the process group say when the other end has gone.
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Broken pipe",
    "Did the remote server shutdown",
)
#: What Gloo and NCCL say when the other end is there and does not answer.
_PEER_SILENT = ("Timed out waiting", "Watchdog caught collective operation timeout", "timed out after")


class PeerError(RuntimeError):
    """Another rank failed and has said why; this one stops with it."""


def peer_loss(error: Exception) -> str | None:
    """What to tell people when an error only means that another rank failed; None for any other error."""
    if isinstance(error, PeerError):
        return str(error)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return None
    for kinds, what in ((_PEER_GONE, "ended"), (_PEER_SILENT, "gave no answer within --dist-timeout")):
        said = next((words for words in kinds if words in str(error)), None)
        if said is not None:
            return f"another rank {what}, and this one cannot go on without it ({said})"
    return None
