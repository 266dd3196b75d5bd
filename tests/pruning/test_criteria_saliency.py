"""The saliency score against finite differences, brute-force removal and its definition."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from support.explanations import ReadOut
from support.ranks import RecordedRank
from torch import Tensor, nn

from explainers.differentiable.gated_features import gated_features
from explainers.differentiable.gradcam_explanation import GradCamExplanation
from explainers.differentiable.remembered import OriginalExplanations, image_keys
from image_classification.config import ConfigError
from pruning.criteria import Combined, Saliency, combine_scores, create_criterion, normalise_scores
from pruning.criteria.by_name import CriterionSettings, make_criterion
from pruning.criteria.saliency import random_signs
from pruning.criteria.scoring import score_groups
from pruning.engine.gates import Gates
from pruning.engine.surgery import prune_channels
from pruning.engine.tap_channels import output_place, staying_channels
from pruning.engine.trace_groups import trace_groups

SIZE = 12
Batches = list[tuple[Tensor, Tensor]]


class Small(nn.Module):
    """A stem, a residual block, a stage of half the size; feature maps at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.outer, self.outer_norm = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.sum = nn.ReLU(inplace=True)
        self.down, self.down_norm = nn.Conv2d(16, 24, 3, 2, padding=1, bias=False), nn.BatchNorm2d(24)
        self.last = nn.ReLU(inplace=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(images)))
        y = self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x)))))
        y = self.sum(x + y)
        y = self.last(self.down_norm(self.down(y)))
        return self.fc(y.mean((2, 3)))


READ_OUT = ReadOut(("sum", "last"), (16, 24))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.05, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        for _ in range(60):
            model(torch.randn(64, 3, SIZE, SIZE))
    return model.eval()


def make_batches(num_batches: int = 2, size: int = 16, seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, SIZE, SIZE, generator=generator), torch.zeros(size, dtype=torch.long))
        for _ in range(num_batches)
    ]


def remembered(model: nn.Module, batches: Batches, explanation: Any = READ_OUT) -> OriginalExplanations:
    originals = OriginalExplanations(explanation)
    originals.remember(model, batches)
    return originals


def trace(model: nn.Module) -> Any:
    return trace_groups(model, torch.randn(2, 3, SIZE, SIZE))


def phi_of_gates(
    model: nn.Module, graph: Any, originals: OriginalExplanations, batches: Batches
) -> Callable[[Tensor], Tensor]:
    """Gates (num_units,) → φ (N, K) in float64, all images."""
    wide = copy.deepcopy(model).double()

    def phi(values: Tensor) -> Tensor:
        def gate(tap: str, feature: Tensor) -> Tensor:
            place = output_place(graph, tap)
            assert place is not None
            units = torch.from_numpy(np.where(place.units >= 0, place.units, graph.num_units))
            return feature * F.pad(values, (0, 1), value=1.0)[units].reshape(1, -1, 1, 1)

        with Gates(wide, graph) as gates, gated_features(gate):
            gates.values = values
            rows = [originals.present(wide, x.double(), originals.lookup(x)[0]) for x, _ in batches]
        return torch.cat(rows).detach()

    return phi


def jacobian(
    model: nn.Module, graph: Any, originals: OriginalExplanations, batches: Batches, units: Any
) -> Tensor:
    """∂φ/∂m of some units at m = 1 by central differences, (units, N, K) float64."""
    phi, step, rows = phi_of_gates(model, graph, originals, batches), 1e-6, []
    for unit in units:
        up, down = torch.ones(2, graph.num_units, dtype=torch.float64)
        up[unit], down[unit] = 1 + step, 1 - step
        rows.append((phi(up) - phi(down)) / (2 * step))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["read-out", "gradcam"])
@pytest.mark.parametrize("name", ["stem", "inner", "down"])
def test_curvature_is_the_squared_jacobian(network: nn.Module, kind: str, name: str) -> None:
    """Also where the explanation reads the group's feature maps itself, and where it holds a derivative itself."""
    graph, batches = trace(network), make_batches(1)
    explanation = READ_OUT if kind == "read-out" else GradCamExplanation.of(network, batches[0][0])
    originals = remembered(network, batches, explanation)
    group = graph.group(name)
    scores = score_groups(network, graph, batches, Saliency(originals, max_passes=64))[group.index]
    exact = jacobian(network, graph, originals, batches, group.units[:8]).square().sum(2).mean(1)
    torch.testing.assert_close(scores[:8], exact, rtol=2e-3, atol=1e-9)


def removed_one_by_one(
    model: nn.Module, graph: Any, originals: OriginalExplanations, group: Any, batches: Batches
):
    """How far φ is from the original one after each unit has really been removed, (width,)."""
    moved = []
    for unit in range(group.width):
        smaller, follower, after = copy.deepcopy(model), copy.deepcopy(graph), copy.deepcopy(originals)
        keep = {group.index: [u for u in range(group.width) if u != unit]}
        staying = staying_channels(follower, follower.keep_mask(keep), after.present.taps)
        prune_channels(smaller, follower, keep)
        after.follow(staying)
        moved.append(after.moved(smaller, batches))
    return np.array(moved)


def test_rank_correlation_with_brute_force(network: nn.Module) -> None:
    graph, batches = trace(network), make_batches(2, 32)
    originals = remembered(network, batches)
    scores = score_groups(network, graph, batches, Saliency(originals))
    everything: list[tuple[float, float]] = []
    for group in graph.prunable:
        moved = removed_one_by_one(network, graph, originals, group, batches)
        assert spearmanr(moved, scores[group.index])[0] >= 0.9, group.name
        everything += zip(moved, scores[group.index].tolist(), strict=True)
    assert spearmanr(*zip(*everything, strict=True))[0] >= 0.9


def test_the_original_pulls(network: nn.Module) -> None:
    """After the network has moved, score = E‖r − J‖² − E‖r‖², and removal that leads back is preferred."""
    graph, batches = trace(network), make_batches(1)
    originals = remembered(network, batches)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    group = graph.group("inner")
    exact = jacobian(network, graph, originals, batches, group.units)
    classes, original = originals.lookup(batches[0][0])
    residual = (originals.present(network, batches[0][0], classes) - original).detach().double()
    expected = ((residual - exact).square().sum(2) - residual.square().sum(1)).mean(1)
    scores = score_groups(network, graph, batches, Saliency(originals))[group.index]
    torch.testing.assert_close(scores, expected, rtol=2e-3, atol=1e-5)
    assert (scores < 0).any()
    moved = removed_one_by_one(network, graph, originals, group, batches)
    present = score_groups(network, graph, batches, Saliency(originals, target="present"))[group.index]
    torch.testing.assert_close(present, exact.square().sum(2).mean(1), rtol=2e-3, atol=1e-9)
    with_pull, without = (spearmanr(moved, some)[0] for some in (scores, present))
    assert with_pull > 0.9
    assert with_pull > without


def test_random_projections_are_unbiased_and_as_exact_as_stated(network: nn.Module) -> None:
    graph, batches = trace(network), make_batches(4, 32)
    originals = remembered(network, batches, dataclasses.replace(READ_OUT, size=40))
    with torch.no_grad():
        network.fc.weight.mul_(1.1)
        network.down.weight.mul_(1.05)
    exact = score_groups(network, graph, batches, Saliency(originals, max_passes=40))
    probed = score_groups(network, graph, batches, Saliency(originals, max_passes=8))
    curvature = score_groups(network, graph, batches, Saliency(originals, max_passes=40, target="present"))
    stated = (2 / (8 * 128)) ** 0.5
    errors = torch.cat([(probed[i] - exact[i]) / curvature[i] for i in exact])
    # Images are not alike (the effective number is smaller than N), hence the factor.
    assert errors.square().mean().sqrt() < 2 * stated
    assert errors.mean().abs() < 1.5 * stated
    again = score_groups(network, graph, batches, Saliency(originals, max_passes=8))
    assert all(torch.equal(probed[i], again[i]) for i in exact)


def test_signs_belong_to_the_image() -> None:
    images = torch.randn(4, 3, 5, 5)
    keys = image_keys(images)
    assert image_keys(images.to(memory_format=torch.channels_last)) == keys
    assert image_keys(images[[2, 0]]) == [keys[2], keys[0]]
    assert len(set(keys)) == 4
    signs = random_signs(keys, 3, 7)
    assert signs.shape == (3, 4, 7)
    assert torch.equal(random_signs([keys[2]], 3, 7)[:, 0], signs[:, 2])
    assert signs.abs().eq(1).all()


@pytest.mark.parametrize("max_passes", [4, 2])
def test_two_ranks_equal_one(network: nn.Module, max_passes: int) -> None:
    graph, batches = trace(network), make_batches(3)
    originals = remembered(network, batches)
    together = score_groups(network, graph, batches, Saliency(originals, max_passes))
    other = RecordedRank()
    score_groups(network, graph, batches[1:], Saliency(originals, max_passes), distributed=other)
    first = RecordedRank(others=tuple(other.sent))
    ranks = score_groups(network, graph, batches[:1], Saliency(originals, max_passes), distributed=first)
    for index, scores in together.items():
        torch.testing.assert_close(ranks[index], scores, rtol=1e-9, atol=1e-12)


def test_removed_channels_are_zeros_to_the_explanation(network: nn.Module) -> None:
    """The pruned network's explanation is the one with closed gates; also after two rewrites and a checkpoint."""
    graph, batches = trace(network), make_batches(1)
    originals = remembered(network, batches)
    values = torch.ones(graph.num_units, dtype=torch.float64)
    gone = {"stem": [1, 5], "down": [0, 7, 20]}
    for name, units in gone.items():
        values[graph.group(name).units[units]] = 0
    closed = phi_of_gates(network, graph, originals, batches)(values)
    for name, units in gone.items():
        group = graph.group(name)
        keep = {group.index: [u for u in range(group.width) if u not in units]}
        staying = staying_channels(graph, graph.keep_mask(keep), originals.present.taps)
        prune_channels(network, graph, keep)
        originals.follow(staying)
    resumed = OriginalExplanations(READ_OUT)
    resumed.load_state_dict(originals.state_dict())
    for some in (originals, resumed):
        classes, original = some.lookup(batches[0][0])
        phi = some.present(network, batches[0][0], classes)
        torch.testing.assert_close(phi.double(), closed, rtol=1e-4, atol=1e-5)
        expected = (closed - original.double()).square().mean()
        assert some.moved(network, batches) == pytest.approx(float(expected), rel=1e-3)
    assert originals.kept["sum"].tolist() == [c for c in range(16) if c not in (1, 5)]
    score_groups(network, graph, batches, Saliency(resumed))


def test_the_network_is_left_as_it_was(network: nn.Module) -> None:
    graph, batches = trace(network), make_batches(1)
    network.train()
    before, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    originals = remembered(network, batches)
    scores = score_groups(network, graph, batches, Saliency(originals))
    assert sorted(scores) == sorted(group.index for group in graph.prunable)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_unknown_images_are_refused(network: nn.Module) -> None:
    graph, batches = trace(network), make_batches(1)
    with pytest.raises(ValueError, match="`remember`"):
        score_groups(network, graph, batches, Saliency(OriginalExplanations(READ_OUT)))
    originals = remembered(network, batches)
    with pytest.raises(ValueError, match="--calibration-size"):
        score_groups(network, graph, make_batches(1, seed=9), Saliency(originals))


def test_a_image_that_occurs_twice_survives_a_checkpoint(network: nn.Module) -> None:
    images, targets = make_batches(1)[0]
    batches = [(images[[0, 1, 0, 2, 3]], targets[:5]), (images[[4, 1]], targets[:2])]
    originals, resumed = remembered(network, batches), OriginalExplanations(READ_OUT)
    resumed.load_state_dict(originals.state_dict())
    for known, again in zip(originals.lookup(images[:5]), resumed.lookup(images[:5]), strict=True):
        assert torch.equal(known, again)


def test_an_image_that_another_decoder_has_read_is_the_same(network: nn.Module) -> None:
    """Off by a grey level here and there, also after a resume; the random signs of the score are the same too."""
    images, targets = make_batches(1)[0]
    originals, resumed = remembered(network, [(images, targets)]), OriginalExplanations(READ_OUT)
    resumed.load_state_dict(originals.state_dict())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    decoded = (images + 0.017 * torch.randint(-1, 2, images.shape))[order]
    for found, known in zip(resumed.lookup(decoded), originals.lookup(images[order]), strict=True):
        assert torch.equal(found, known)
    assert resumed.keys(decoded) == originals.keys(images[order])


def test_combination_with_another_criterion(network: nn.Module) -> None:
    graph, batches = trace(network), make_batches(1)
    originals = remembered(network, batches)
    settings = CriterionSettings(saliency_weight=0.3)
    both = make_criterion("discriminant+saliency", settings, originals=originals)
    assert isinstance(both, Combined)
    parts = [
        score_groups(network, graph, batches, some)
        for some in (create_criterion("discriminant"), Saliency(originals))
    ]
    expected = combine_scores(*parts, 0.3)
    for index, scores in score_groups(network, graph, batches, both).items():
        torch.testing.assert_close(scores, expected[index])


@pytest.mark.parametrize("method", ["mean", "sum", "max", "l2"])
def test_negative_scores_keep_their_order_when_normalised(method: str) -> None:
    scores = torch.tensor([-3.0, 1.0, 2.0, -0.5], dtype=torch.float64)
    (normalised,) = normalise_scores({0: scores}, method).values()
    assert torch.equal(normalised.argsort(), scores.argsort())
    assert torch.equal(normalised.sign(), scores.sign())


def test_bad_settings_are_named() -> None:
    originals = OriginalExplanations(READ_OUT)
    with pytest.raises(ValueError, match="max_passes=0"):
        Saliency(originals, max_passes=0)
    with pytest.raises(ValueError, match="target='nearest'"):
        Saliency(originals, target="nearest")
    with pytest.raises(ConfigError, match="originals=None"):
        make_criterion("saliency")
    with pytest.raises(ConfigError, match="discriminant\\+saliency"):
        make_criterion("saliency+discriminant", originals=originals)
    with pytest.raises(ConfigError, match=r"criterion='tailor'.* taylor\?"):
        make_criterion("tailor+saliency", originals=originals)
    with pytest.raises(ValueError, match="weight=2"):
        Combined(Saliency(originals), Saliency(originals), 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(network: nn.Module, dtype: torch.dtype) -> None:
    graph, batches = trace(network), make_batches(2)
    originals = remembered(network, batches)
    exact = score_groups(network, graph, batches, Saliency(originals, target="present"))
    half = score_groups(
        network,
        graph,
        batches,
        Saliency(originals, target="present"),
        autocast=lambda: torch.autocast("cpu", dtype=dtype),
    )
    for index, scores in exact.items():
        assert torch.corrcoef(torch.stack([scores, half[index]]))[0, 1] > 0.95
