"""Every micro-network is cut exactly, and what should be prunable is."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pruning.engine.gates import Gates
from pruning.engine.proof.rehearsal import condition
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import ChannelGraph, trace_groups

sys.path.insert(0, str(Path(__file__).parent))
import micro_foreign  # noqa: F401  enters its networks
from micro_networks import REGISTRY

# Networks in which something has to stay whole, with the layers that must be named as such.
STAYS = {
    "InputResidual": {"b"},
    "HardCodedSlices": {"a"},
    "ZeroPaddedLambda": {"b", "b#2"},
    "FusedOneHead": {"attn.q"},
    "PlainOneHead": {"attn.q"},
    "SilentBranch": {"b"},
    "FlatWeight": {"a"},
    "Projected": {"layer", "layer#2"},
    "SparseExperts": {"gate"},
    "Deformed": {"points", "masks"},
    "HeadsInBatch": {"position"},
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    model = REGISTRY[name]().double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    condition(model.float(), (images.float(),))
    return model.double(), images


def random_keep(graph: ChannelGraph, seed: int) -> dict[str, list[int]]:
    generator = np.random.default_rng(seed)
    keep = {}
    for group in graph.prunable:
        count = int(generator.integers(1, group.width + 1))
        keep[group.name] = sorted(generator.choice(group.width, count, replace=False).tolist())
    return keep


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_gated_equals_pruned(name: str) -> None:
    model, images = make(name)
    graph = trace_groups(model, images)
    assert graph.prunable, graph.frozen
    for seed in range(3):
        cut, followed = copy.deepcopy(model), copy.deepcopy(graph)
        keep = random_keep(graph, seed)
        with torch.no_grad(), Gates(model, graph) as gates:
            gates.set_keep(keep)
            expected = model(images)
        prune_channels(cut, followed, keep)
        with torch.no_grad():
            found = cut(images)
        assert (expected - found).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_only_what_must_stay_is_frozen(name: str) -> None:
    model, images = make(name)
    graph = trace_groups(model, images)
    frozen = {group for group, reason in graph.frozen.items() if "output" not in reason}
    assert frozen == STAYS.get(name, set()), graph.frozen


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_following_a_rewrite_equals_tracing_again(name: str) -> None:
    model, images = make(name)
    graph = trace_groups(model, images)
    keep = {group.name: range((group.width + 1) // 2) for group in graph.prunable}
    prune_channels(model, graph, keep)
    again = trace_groups(model, images, choices=graph.choices)
    assert _widths(graph) == _widths(again)


def _widths(graph: ChannelGraph) -> list[tuple[str, int, int]]:
    return sorted((m.tensor, m.dim, g.width) for g in graph.groups for m in graph.members(g) if g.width > 1)


def test_a_graph_survives_the_file(tmp_path: Path) -> None:
    model, images = make("Transformer")
    graph = trace_groups(model, images)
    prune_channels(model, graph, random_keep(graph, 5))
    torch.save(graph.state_dict(), tmp_path / "graph.pt")
    loaded = ChannelGraph.from_state(torch.load(tmp_path / "graph.pt", weights_only=True))
    assert loaded.signature() == graph.signature()
    assert loaded.macs == graph.macs
    assert [group.original_width for group in loaded.groups] == [
        group.original_width for group in graph.groups
    ]
    keep = {group.name: range(1) for group in graph.prunable}
    cut = copy.deepcopy(model)
    assert prune_channels(model, graph, keep) == prune_channels(cut, loaded, keep)
    assert torch.equal(model(images), cut(images))
    with pytest.raises(ValueError, match="Group"):
        ChannelGraph.from_state({"groups": [{"name": "x"}]})
