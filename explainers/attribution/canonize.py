"""The canonical form of a network that attribution rules are applied to, and the fusion of batch norms behind it.

`CanonicalNetwork` is an evaluation-mode copy whose forward passes are recorded (`record.py`): every call is a separate
step, nothing is in place, and functions and modules are treated alike. In the record, a batch norm that is the only
reader of a convolution or linear layer can be merged into it; rules then see one layer with the effective weights. Any
other batch norm stays a separate step.

`fuse_batch_norms` does the same to modules, for use elsewhere (exported networks run faster).
"""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from explainers.attribution.method import dtype_of, frozen_copy
from explainers.attribution.record import Kind, Record, Step, record_forward
from image_classification.models import unwrap

_PLAIN_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class CanonicalNetwork:
    """A copy of a network that records what it computes.

    Args:
        model: Any classifier; it is copied, not modified.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = frozen_copy(model)
        self.dtype = dtype_of(self.model)

    def record(self, images: Tensor) -> Record:
        """Run the copy on (B, C, H, W) images; see `record_forward`."""
        return record_forward(self.model, images.to(self.dtype))


def merge_batch_norms(record: Record) -> list[Step]:
    """Return the steps of a record, with each batch norm merged into the layer whose only reader it is.

    The merged step takes the batch norm's place: it leads from the layer's input to the batch norm's output and has the
    weights of both. The record does not change.
    """
    merged: list[Step] = []
    gone: set[int] = set()
    for step in record.steps:
        layer = layer_before(step)
        if layer is None:
            merged.append(step)
            continue
        assert layer.linear is not None
        scale, shift = batch_norm_map(step)
        linear = layer.linear.scaled(scale, shift)
        gone.add(id(layer))
        merged.append(
            Step(
                layer.op,
                layer.args,
                layer.kwargs,
                layer.inputs,
                step.outputs,
                layer.where,
                Kind.WEIGHTED,
                linear,
            )
        )
    return [step for step in merged if id(step) not in gone]


def layer_before(step: Step) -> Step | None:
    """Return the layer that a batch norm can be merged into (linear, no other reader), or None."""
    if step.kind is not Kind.BATCH_NORM or len(step.inputs) != 1:
        return None
    layer = step.inputs[0].step
    if layer is None or layer.linear is None or step.inputs[0].num_uses != 1 or not layer.linear.can_scale():
        return None
    return layer


def batch_norm_map(step: Step) -> tuple[Tensor, Tensor]:
    """Return the per-channel scale and shift of a batch norm, both (C,)."""
    mean, variance = step.argument("running_mean"), step.argument("running_var")
    weight, bias = step.argument("weight"), step.argument("bias")
    scale = torch.rsqrt(variance + step.argument("eps", "epsilon"))
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def fuse_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """Copy a network in evaluation mode and fuse its batch norms into the weighted layers before them.

    A pair is fused where the forward pass on `example` runs the layer once and only that batch norm reads it. Other
    batch norms are left alone. Logits are the same up to rounding.

    Args:
        model: Any network, bare or wrapped; not modified.
        example: (B, C, H, W) images on the network's device.

    Returns:
        The copy; `nn.Identity` replaces each fused batch norm, so that module names do not change.
    """
    fused = copy.deepcopy(unwrap(model)).eval()
    with contextlib.closing(record_forward(fused, example.to(dtype_of(fused)))) as record:
        _fuse_all(fused, record)
    return fused


def _fuse_all(model: nn.Module, record: Record) -> None:
    """Fuse, in place, every batch norm that the record allows."""
    calls: dict[str, int] = {}
    for step in record.steps:
        if step.kind in (Kind.WEIGHTED, Kind.BATCH_NORM):
            calls[step.where] = calls.get(step.where, 0) + 1
    for step in record.steps:
        layer = layer_before(step)
        if layer is not None and calls[layer.where] == calls[step.where] == 1:
            _fuse(model, layer, step)


def _fuse(model: nn.Module, layer: Step, batch_norm: Step) -> None:
    """Fold one batch norm into its layer, if both are modules of known kinds."""
    linear, norm = model.get_submodule(layer.where), model.get_submodule(batch_norm.where)
    # The recorded weight must be the module's own parameter. A standardised or reparametrised weight, or one that a
    # hook computes before each pass, would be recomputed and overwrite the fused one.
    own = linear._parameters.get("weight")
    if not isinstance(linear, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) or layer.linear is None:
        return
    if norm._forward_hooks or norm._forward_pre_hooks:
        return  # hooks would be lost with the module
    if own is None or own.untyped_storage().data_ptr() != layer.linear.weight.untyped_storage().data_ptr():
        return
    if type(norm) in _PLAIN_BATCH_NORMS:
        substitute: nn.Module = nn.Identity()
    elif isinstance(norm, nn.BatchNorm2d) and isinstance(getattr(norm, "act", None), nn.Module):
        # timm's batch norm with dropout and activation inside: these are kept.
        inside = (getattr(norm, "drop", None), getattr(norm, "act", None))
        substitute = nn.Sequential(*[part for part in inside if isinstance(part, nn.Module)])
    else:
        return
    scale, shift = batch_norm_map(batch_norm)
    scaled = layer.linear.scaled(scale, shift)
    weight = scaled.weight.t() if isinstance(linear, nn.Linear) else scaled.weight
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=linear.weight.requires_grad)
    assert scaled.bias is not None
    linear.bias = nn.Parameter(scaled.bias.detach().clone(), requires_grad=linear.weight.requires_grad)
    parent, _, name = batch_norm.where.rpartition(".")
    setattr(model.get_submodule(parent), name, substitute)
