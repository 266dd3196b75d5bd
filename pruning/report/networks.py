"""The network before and after: costs, layer widths, size of the files. Nothing is run on data here."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from image_classification.models import identity_of, model_for_weights
from image_classification.plain_data import Plain
from pruning.costs import CostModel, cost_named, cost_names
from pruning.engine.trace_groups import trace_groups
from pruning.files.saved_network import pruned_state


def cost_rows() -> dict[str, tuple[str, str, float]]:
    """Return metric → (display name, unit, divisor) for costs that hold on every machine, and for the file size."""
    costs = [cost_named(name) for name in cost_names()]
    rows = {cost.name: (cost.title, cost.unit, cost.divisor) for cost in costs if not cost.measured}
    return rows | {"file": ("Weights on disk", "MiB", 2**20)}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the report.

    Attributes:
        name: `original` or `pruned`.
        model: The network, in evaluation mode.
        weights: File that the weights come from; None for fresh weights, of which only the structure is meaningful.
    """

    name: str
    model: nn.Module
    weights: Path | None


def load_network(name: str, path: Path, arch: str | None = None) -> Network:
    """Load a network from a checkpoint, on the CPU."""
    model = model_for_weights(arch, path)
    return Network(name, model.eval().requires_grad_(False), path)


def unpruned(network: Network) -> Network | None:
    """Build a network's unpruned architecture by its name, with fresh weights; None if it has no such name."""
    identity = identity_of(network.model)
    if identity is None:
        return None
    return Network("original", identity.build().eval().requires_grad_(False), None)


def costs_of(model: nn.Module, image_size: int) -> dict[str, float]:
    """Return metric → cost, for the metrics of `cost_rows`."""
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    graph = trace_groups(model, images)
    metrics = [name for name in cost_names() if not cost_named(name).measured]
    costs = CostModel(graph, model, images[:1], metrics).report()
    return {**costs, "file": float(weights_size(model))}


def weights_size(model: nn.Module) -> int:
    """Return the size in bytes of the network as a separate file: structure and tensors, no optimizer."""
    buffer = io.BytesIO()
    torch.save(pruned_state(model), buffer)
    return buffer.getbuffer().nbytes


def layer_widths(before: nn.Module, after: nn.Module) -> list[Plain]:
    """Return the output channels of every convolution and linear layer, in order of declaration.

    Returns:
        Rows `layer`, `kind`, `before`, `after`.
    """
    was = dict(before.named_modules())
    rows = []
    for name, module in after.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() >= 2 and name in was:
            axis = 1 if "Transpose" in type(module).__name__ else 0
            other = was[name].get_parameter("weight")
            rows.append(
                {
                    "layer": name,
                    "kind": type(module).__name__,
                    "before": int(other.shape[axis]),
                    "after": int(weight.shape[axis]),
                }
            )
    return rows


def widths_beside(models: Sequence[nn.Module]) -> list[Plain]:
    """Return the output channels of every convolution and linear layer for networks of the same architecture.

    Returns:
        Rows `layer`, `kind`, `widths` (one per network).
    """
    rows: list[Plain] = []
    for others in zip(*(layer_widths(models[0], model) for model in models), strict=True):
        row = others[0]
        rows.append(
            {"layer": row["layer"], "kind": row["kind"], "widths": [other["after"] for other in others]}
        )
    return rows


def same_architecture(before: nn.Module, after: nn.Module) -> bool:
    """Whether two networks have the same modules, whatever their widths."""
    return [name for name, _ in before.named_modules()] == [name for name, _ in after.named_modules()]
