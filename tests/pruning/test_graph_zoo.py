"""A cross-section of the benchmark's zoo at small size: cut exactly, and the expected parts are prunable."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from image_classification.models.factory import create_model
from pruning.engine.gates import Gates
from pruning.engine.proof.rehearsal import condition
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups

# name, image size, least number of prunable groups, whether only the output may be frozen
NETWORKS = [
    ("resnet20", 32, 12, True),
    ("resnet50", 64, 37, True),
    ("mobilenet_v2", 64, 25, True),
    ("torchvision/shufflenet_v2_x0_5", 64, 16, False),
    ("torchvision/googlenet", 96, 55, True),
    ("torchvision/regnet_x_400mf", 64, 20, True),
    ("timm/res2net50_26w_4s", 64, 40, True),
    ("timm/skresnet18", 64, 18, True),
    ("timm/cspresnet50", 64, 40, True),
    ("timm/vit_tiny_patch16_224", 224, 25, True),
    ("timm/nf_resnet50", 64, 30, True),
]
SLOW = [
    ("torchvision/densenet121", 64, 100, True),
    ("torchvision/inception_v3", 139, 80, True),
    ("torchvision/swin_t", 64, 10, False),
    ("timm/swin_tiny_patch4_window7_224", 224, 25, True),
    ("timm/resnest14d", 64, 15, True),
    ("timm/mixnet_s", 64, 20, True),
    ("timm/ghostnet_100", 64, 20, True),
    ("timm/dpn68", 64, 27, True),
]


@pytest.mark.parametrize(
    ("name", "size", "prunable", "complete"),
    [*NETWORKS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cut_network_equals_gated(name: str, size: int, prunable: int, complete: bool) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model: Any = create_model(name, num_classes=10).eval()
    images = torch.randn(2, 3, size, size)
    condition(model, (images,))
    graph = trace_groups(model, images)
    assert len(graph.prunable) >= prunable, graph.frozen
    if complete:
        assert set(graph.frozen.values()) == {"the network's output"}
    generator = np.random.default_rng(0)
    keep = {}
    for group in graph.prunable:
        count = int(generator.integers(1, group.width + 1))
        keep[group.name] = np.sort(generator.choice(group.width, count, replace=False))
    with torch.no_grad(), Gates(model, graph) as gates:
        gates.set_keep(keep)
        expected = model(images)
    cut = copy.deepcopy(model)
    report = prune_channels(cut, graph, keep)
    with torch.no_grad():
        found = cut(images)
    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()
    assert report.macs[1] < report.macs[0]
