"""`--device` of verbs that compute in this process: declared once, and checked before anything is read."""

from __future__ import annotations

import argparse

import torch

from image_classification.config import ConfigError

_SHOWN = 160


def declare_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` to a verb's arguments; `device_named` reads it."""
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="NAME",
        help="where to compute: cpu, cuda, cuda:1 and so on; default: the GPU, if there is one",
    )


def device_named(word: str) -> torch.device:
    """Return the device named by a word.

    Raises:
        ConfigError: There is no such device here, or it holds no data (meta).
    """
    try:
        device = torch.device(word)
        torch.zeros(1, device=device).item()
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # torch raises all kinds of errors for missing devices
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise ConfigError(
            f"--device {word}: {reason}: give cpu, or a GPU that is here, such as cuda:0"
        ) from error
    return device
