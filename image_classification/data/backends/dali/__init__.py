"""The backends `dali-gpu` and `dali-cpu`: NVIDIA DALI, if it is installed. The loader is imported on first use."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from image_classification.data.backends.backend import register_backend
from image_classification.data.device_stage import DeviceStage
from image_classification.data.loader import LoaderOptions
from image_classification.data.manifest import Manifest
from image_classification.data.plan import Planner

if TYPE_CHECKING:
    from image_classification.data.backends.dali.dali_loader import DaliLoader

_NOT_INSTALLED = (
    "NVIDIA DALI is not installed: pip install nvidia-dali-cuda120 (with a driver for CUDA 13 also "
    "nvidia-dali-cuda130), or choose pytorch"
)


def is_available() -> bool:
    """Whether DALI is installed."""
    return (
        importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    )


def _problem_on_cpu(device: torch.device) -> str | None:
    return None if is_available() else _NOT_INSTALLED


def _problem_on_gpu(device: torch.device) -> str | None:
    if not is_available():
        return _NOT_INSTALLED
    return None if device.type == "cuda" else "it needs a CUDA device: choose dali-cpu"


@register_backend(
    "dali-gpu", problem=_problem_on_gpu, preference=lambda device: 2 if device.type == "cuda" else 0
)
def make_gpu_loader(
    manifest: Manifest, planner: Planner, stage: DeviceStage, options: LoaderOptions
) -> DaliLoader:
    """Create a loader that decodes with nvJPEG and resizes on the loader's CUDA device."""
    from image_classification.data.backends.dali.dali_loader import DaliLoader

    return DaliLoader(manifest, planner, stage, options, gpu=True)


@register_backend(
    "dali-cpu", problem=_problem_on_cpu, preference=lambda device: 0 if device.type == "cuda" else 2
)
def make_cpu_loader(
    manifest: Manifest, planner: Planner, stage: DeviceStage, options: LoaderOptions
) -> DaliLoader:
    """Create a loader that decodes and resizes on the CPU."""
    from image_classification.data.backends.dali.dali_loader import DaliLoader

    return DaliLoader(manifest, planner, stage, options)
