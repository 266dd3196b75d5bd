"""Access to a CUDA device through NVIDIA's management library (the module `pynvml`)."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


def open_gpu(device: torch.device) -> tuple[ModuleType, object] | None:
    """Return the initialised library and its handle of a CUDA device; None without GPU, driver or `pynvml`.

    The device is found by its UUID, since NVML does not know CUDA_VISIBLE_DEVICES. A caller that receives a handle must
    call the library's `nvmlShutdown` when done.
    """
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    for name in (f"GPU-{uuid}", f"MIG-{uuid}"):
        try:
            return nvml, nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            continue
    nvml.nvmlShutdown()
    return None
