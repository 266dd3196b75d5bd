"""Images and networks for measurements, and the uniform cut that several benchmarks start from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.models import create_model
from pruning.costs.cost_model import CostModel
from pruning.criteria.magnitude import Magnitude
from pruning.criteria.scoring import score_groups
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.proof.rehearsal import condition


def smooth_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Return images (count, 3, size, size) with the falling spectrum of photographs, mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, size, size)
    side = 4
    while side <= size:
        layer = torch.randn(count, 3, side, side, generator=generator) / side**0.5
        images += nn.functional.interpolate(layer, size=(size, size), mode="bilinear", align_corners=False)
        side *= 2
    return (images - images.mean()) / images.std()


def conditioned_network(arch: str, images: Tensor, seed: int = 0) -> nn.Module:
    """Build a network with random weights and batch-norm statistics of the images, in evaluation mode."""
    torch.manual_seed(seed)
    model = create_model(arch)
    condition(model, (images,))
    return model.eval()


def uniform_cut(
    model: nn.Module, graph: ChannelGraph, costs: CostModel, share: float = 0.5
) -> dict[int, np.ndarray]:
    """Return the cut that keeps the same share of every group: the largest that leaves at most a share of the MACs.

    Args:
        model: The network.
        graph: Its groups. Each takes the allowed width nearest to the common share, and keeps its channels with the
            largest L1 norm.
        costs: Cost model of the network, with "macs".
        share: Share of the MACs that may remain.

    Returns:
        Group index → positions that stay, ascending.
    """
    scores = score_groups(model, graph, [], Magnitude())
    orders = {}
    for group in graph.prunable:
        # Groups without weights to rank by keep their first channels.
        of_group = scores.get(group.index, torch.zeros(group.width))
        orders[group.index] = np.argsort(-of_group.numpy(), kind="stable")

    def kept(part: float) -> dict[int, np.ndarray]:
        keep = {}
        for group in graph.prunable:
            widths = np.array(graph.allowed_widths(group))
            width = int(widths[np.abs(widths - part * group.width).argmin()])
            keep[group.index] = np.sort(orders[group.index][:width])
        return keep

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if costs.cost("macs", graph.keep_mask(kept(middle))) <= share * costs.baseline("macs"):
            low = middle
        else:
            high = middle
    return kept(low)
