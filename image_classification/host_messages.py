"""Messages between ranks on the host: JSON, never pickles, and errors that all of them raise."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from image_classification.config import ConfigError, SettingError
from image_classification.plain_data import PlainValue


def bytes_tensor(payload: bytes) -> torch.Tensor:
    """Return the bytes as a tensor on the host."""
    return (
        torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if payload
        else torch.zeros(0, dtype=torch.uint8)
    )


def attempt(decide: Callable[[], object]) -> list[PlainValue]:
    """Return [value], or [None, error] with the parts of a `SettingError` or the message of another error."""
    try:
        return [decide()]
    except SettingError as error:
        return [None, [error.setting, str(error.value), error.problem]]
    except (ValueError, OSError) as error:
        return [None, [str(error)]]


def outcome(attempt: list[PlainValue]) -> PlainValue:
    """Return the value of `attempt`, or raise its error."""
    if len(attempt) == 1:
        return attempt[0]
    raise SettingError(*attempt[1]) if len(attempt[1]) == 3 else ConfigError(attempt[1][0])


def encode(value: object) -> bytes:
    """Return JSON, or the reason for the failure, because the other ranks wait in the collective and need to know."""
    try:
        return json.dumps(["", value]).encode()
    except (TypeError, ValueError) as error:
        return json.dumps([str(error), None]).encode()


def decode(payload: bytes, rank: int) -> PlainValue:
    """Return the value given to a rank's `encode`, or raise the error that it reported."""
    problem, value = json.loads(payload)
    if problem:
        raise TypeError(f"rank {rank} cannot send its object as JSON: {problem}")
    return value
