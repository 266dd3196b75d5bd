"""Which networks can be rewritten: bare modules whose parameters are whole tensors of their own."""

from __future__ import annotations

import torch
from torch import nn

from image_classification.config import SettingError

#: Classes whose parameters are shards or views of one buffer, by name: their packages need not be installed.
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
_FAKE_QUANTISERS = ("FakeQuantizeBase", "FakeQuantizerBase", "FakeQuantizedLinear")
_QUANTISED = ("torch.ao.nn.quantized.", "torchao.")


def check_bare(model: object) -> None:
    """Refuse what is no network, is wrapped, or holds parameters that cannot be cut.

    Raises:
        SettingError: Saying what to give instead.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise SettingError("model", name, "give a torch.nn.Module")
    for module_name, module in model.named_modules():
        where = f"{name}, module {module_name!r}" if module_name else name
        ancestors = [kind.__name__ for kind in type(module).__mro__]
        if any(kind in ancestors for kind in _SHARDED):
            raise SettingError(
                "model",
                where,
                "its parameters are sharded over the ranks (FSDP, ZeRO), and shards cannot be cut: prune the plain "
                "network before it is sharded, or train it with DDP",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise SettingError(
                "model",
                where,
                "a ScriptModule's code is fixed: prune the Python module that it was made from, and script it again",
            )
        quantised = type(module).__module__.startswith(_QUANTISED)
        if quantised or any(kind in ancestors for kind in _FAKE_QUANTISERS):
            raise SettingError(
                "model",
                where,
                "its weights are quantised, or trained as if they were: prune the float network, and prepare or "
                "quantise it afterwards",
            )
    wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    if wrapped or hasattr(model, "_orig_mod") or hasattr(model, "_forward_module"):
        raise SettingError(
            "model",
            name,
            "give the bare network (`model.module`, or what torch.compile was given), and wrap it again after every "
            "rewrite",
        )
    for parameter_name, parameter in model.named_parameters():
        if hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):  # DTensor, ZeRO
            raise SettingError(
                "model",
                name,
                f"parameter {parameter_name!r} is sharded over the ranks, and shards cannot be cut: prune the plain "
                "network before it is sharded, or train it with DDP",
            )
        if type(parameter.data).__module__.startswith(_QUANTISED):
            raise SettingError(
                "model",
                name,
                f"parameter {parameter_name!r} is quantised: prune the float network, and quantise it afterwards",
            )
