"""Checks that a network can be rewritten: a bare module whose parameters are whole, independent tensors."""

from __future__ import annotations

import torch
from torch import nn

from image_classification.config import SettingError

#: Names of classes whose parameters are shards or views of one buffer; by name, since their packages may be missing.
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
_FAKE_QUANTISERS = ("FakeQuantizeBase", "FakeQuantizerBase", "FakeQuantizedLinear")
_QUANTISED = ("torch.ao.nn.quantized.", "torchao.")


def check_bare(model: object) -> None:
    """Refuse an object that is not a network, is wrapped, or holds parameters that cannot be cut.

    Raises:
        SettingError: The network is refused; the message says what to pass instead.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise SettingError("model", name, "give a torch.nn.Module")
    for module_name, module in model.named_modules():
        problem = _problem_of_module(module)
        if problem is not None:
            where = f"{name}, module {module_name!r}" if module_name else name
            raise SettingError("model", where, problem)
    wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    if wrapped or hasattr(model, "_orig_mod") or hasattr(model, "_forward_module"):
        raise SettingError(
            "model",
            name,
            "give the bare network (`model.module`, or what torch.compile was given), and wrap it again after every "
            "rewrite",
        )
    for parameter_name, parameter in model.named_parameters():
        problem = _problem_of_parameter(parameter)
        if problem is not None:
            raise SettingError("model", name, f"parameter {parameter_name!r} {problem}")


def _problem_of_module(module: nn.Module) -> str | None:
    """Return why a module cannot be cut and what to do, or None."""
    ancestors = {kind.__name__ for kind in type(module).__mro__}
    if not ancestors.isdisjoint(_SHARDED):
        return (
            "its parameters are sharded over the ranks (FSDP, ZeRO), and shards cannot be cut: prune the plain network "
            "before it is sharded, or train it with DDP"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule's code is fixed: prune the Python module that it was made from, and script it again"
    if type(module).__module__.startswith(_QUANTISED) or not ancestors.isdisjoint(_FAKE_QUANTISERS):
        return (
            "its weights are quantised, or trained as if they were: prune the float network, and prepare or quantise "
            "it afterwards"
        )
    return None


def _problem_of_parameter(parameter: nn.Parameter) -> str | None:
    """Return why a parameter cannot be cut and what to do, or None."""
    if hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):  # DTensor, ZeRO
        return (
            "is sharded over the ranks, and shards cannot be cut: prune the plain network before it is sharded, or "
            "train it with DDP"
        )
    if type(parameter.data).__module__.startswith(_QUANTISED):
        return "is quantised: prune the float network, and quantise it afterwards"
    return None
