"""Every criterion's pure part against loops in float64, the registry, and one written by a user."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruning.criteria import (
    FeatureCriterion,
    GroupWeights,
    TorchPruningImportance,
    WeightMember,
    combine_scores,
    create_criterion,
    criterion_names,
    normalise_scores,
    register_criterion,
)
from pruning.criteria.fpgm import total_distances
from pruning.criteria.gate_derivatives import Gate
from pruning.criteria.hrank import mean_ranks
from pruning.criteria.magnitude import powered_norms
from pruning.criteria.sample_losses import sample_losses


def member(
    module: nn.Module, name: str, dim: int, role: str, positions: list[int] | None = None
) -> WeightMember:
    values = getattr(module, name.rpartition(".")[2]).detach()
    index = torch.arange(values.shape[dim]) if positions is None else torch.tensor(positions)
    return WeightMember(name, module, values, dim, role, index)


def coupled_group() -> tuple[GroupWeights, nn.Conv2d, nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]:
    """Units 0…3 made by one convolution and, in other places, by the last four channels of another."""
    torch.manual_seed(0)
    first, second, norm, reader = (
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(2, 6, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1),
    )
    nn.init.normal_(norm.weight)
    members = (
        member(first, "first.weight", 0, "out"),
        member(first, "first.bias", 0, "along"),
        member(second, "second.weight", 0, "out", [-1, -1, 3, 2, 1, 0]),
        member(norm, "norm.weight", 0, "along"),
        member(norm, "norm.bias", 0, "along"),
        member(reader, "reader.weight", 1, "in"),
    )
    return GroupWeights("first", 4, members), first, second, norm, reader


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("members", ["out", "all"])
def test_magnitude_against_loops(power: int, members: str) -> None:
    group, first, second, _, reader = coupled_group()
    expected = []
    for unit in range(4):
        weights = [*first.weight[unit].flatten().tolist(), *second.weight[5 - unit].flatten().tolist()]
        if members == "all":
            weights += reader.weight[:, unit].flatten().tolist()
        expected.append(sum(abs(w) ** power for w in weights) ** (1 / power))
    scores = create_criterion("magnitude", power=power, members=members).score_group(group)
    assert scores.tolist() == pytest.approx(expected, rel=1e-6)
    if power == 2:
        assert torch.equal(create_criterion("magnitude-l2", members=members).score_group(group), scores)


def test_bn_scale_against_loops() -> None:
    group, _, _, norm, _ = coupled_group()
    scores = create_criterion("bn-scale").score_group(group)
    assert scores.tolist() == pytest.approx([abs(g) for g in norm.weight.tolist()])
    bare = GroupWeights("first", 4, group.members[:3])
    assert create_criterion("bn-scale").score_group(bare) is None


def test_fpgm_against_loops() -> None:
    group, first, second, _, _ = coupled_group()

    def distances(filters: Tensor) -> list[float]:
        rows = filters.flatten(1).tolist()
        return [sum(math.dist(row, other) for other in rows) for row in rows]

    own, coupled = distances(first.weight), distances(second.weight)
    expected = [own[unit] + coupled[5 - unit] for unit in range(4)]
    assert create_criterion("fpgm").score_group(group).tolist() == pytest.approx(expected, rel=1e-6)
    wide = torch.randn(5, 9000)
    assert total_distances(wide).tolist() == pytest.approx(distances(wide), rel=1e-9)


def test_hrank_against_singular_values() -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 4, 6, 5)
    maps[:, 1] = maps[:, 1, :, :1] * maps[:, 1, :1]  # rank 1
    maps[0, 2] = 0
    expected = []
    for channel in range(4):
        ranks = []
        for image in range(3):
            values = torch.linalg.svdvals(maps[image, channel].double())
            ranks.append(int((values > 1e-5 * values.max()).sum()) if values.max() > 0 else 0)
        expected.append(sum(ranks) / 3)
    assert mean_ranks(maps).tolist() == pytest.approx(expected)
    assert mean_ranks(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).tolist() == [0.0, 0.5]
    assert (
        create_criterion("hrank", num_images=1).score(maps, torch.zeros(3)).tolist()
        == mean_ranks(maps[:1]).tolist()
    )


def test_gradient_criteria_against_loops() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(2, 5, 3, dtype=torch.float64)
    taylor, fisher, squared = [0.0] * 3, [0.0] * 3, [0.0] * 3
    for unit in range(3):
        for objective in range(2):
            values = gradients[objective, :, unit].tolist()
            taylor[unit] += sum(abs(v) for v in values)
            fisher[unit] += sum(v * v for v in values) / 2
            squared[unit] += (sum(values) / 5) ** 2
    assert create_criterion("taylor").reduce(gradients).tolist() == pytest.approx(taylor)
    assert create_criterion("fisher").reduce(gradients).tolist() == pytest.approx(fisher)
    assert create_criterion("taylor-2019").reduce(gradients).tolist() == pytest.approx(squared)


def test_random_depends_on_seed_and_name_only() -> None:
    def scores(name: str, seed: int) -> list[float]:
        return create_criterion("random", seed=seed).score_group(GroupWeights(name, 5, ())).tolist()

    state = torch.get_rng_state()
    assert scores("a", 0) == scores("a", 0)
    assert scores("a", 0) != scores("b", 0)
    assert scores("a", 0) != scores("a", 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_combination() -> None:
    first = {0: torch.tensor([3.0, 4.0]), 1: torch.tensor([1.0]), 2: torch.zeros(2)}
    second = {0: torch.tensor([0.0, 2.0]), 2: torch.tensor([0.0, 5.0])}
    combined = combine_scores(first, second, 0.25)
    assert combined[0].tolist() == pytest.approx([0.75 * 0.6, 0.75 * 0.8 + 0.25])
    assert combined[2].tolist() == pytest.approx([0, 0.25])
    assert 1 not in combined
    with pytest.raises(ValueError, match=r"1\.5"):
        combine_scores(first, second, 1.5)


def test_normalisation() -> None:
    scores = {0: torch.tensor([1.0, 3.0]), 1: torch.zeros(2)}
    expected = {
        "mean": [0.5, 1.5],
        "sum": [0.25, 0.75],
        "max": [1 / 3, 1],
        "l2": [10**-0.5, 3 * 10**-0.5],
        "none": [1, 3],
    }
    for method, values in expected.items():
        normalised = normalise_scores(scores, method)
        assert normalised[0].tolist() == pytest.approx(values)
        assert normalised[1].tolist() == [0, 0]
    assert normalise_scores(scores, "macs", {0: 2.0, 1: 1.0})[0].tolist() == [0.5, 1.5]
    with pytest.raises(ValueError, match="normalisation='macs'"):
        normalise_scores(scores, "macs")
    with pytest.raises(ValueError, match="normalisation='median'"):
        normalise_scores(scores, "median")


def test_registry_names_the_nearest() -> None:
    assert {"discriminant", "magnitude", "bn-scale", "taylor", "fisher", "fpgm", "hrank", "random"} <= set(
        criterion_names()
    )
    with pytest.raises(ValueError, match=r"criterion='fischer'.* fisher\?"):
        create_criterion("fischer")
    with pytest.raises(ValueError, match="criterion='magnitude'"):
        create_criterion("magnitude", colour="red")
    with pytest.raises(ValueError, match=r"'fisher'.*\bFisher\b"):
        register_criterion("fisher")(type("Other", (FeatureCriterion,), {}))
    with pytest.raises(ValueError, match=r"'a\+b'.*'\+'"):
        register_criterion("a+b")


def test_a_custom_criterion() -> None:
    @register_criterion("mean-activation")
    class MeanActivation(FeatureCriterion):
        """Channels that are rarely active."""

        average = "samples"

        def score(self, features: Tensor, targets: Tensor) -> Tensor:
            return features.flatten(2).abs().mean(2).sum(0)

    scores = create_criterion("mean-activation", features="pre").score(torch.ones(2, 3, 4, 4), torch.zeros(2))
    assert scores.tolist() == [2, 2, 2]


def test_default_loss_takes_indices_and_probabilities() -> None:
    logits, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    soft = nn.functional.one_hot(targets, 3)
    assert torch.allclose(sample_losses(logits, targets), sample_losses(logits, soft))


def fake_functions() -> types.SimpleNamespace:
    """Function objects with the names of Torch-Pruning's module; importances compare them, nobody calls them."""
    kinds = ("conv", "depthwise_conv", "linear", "batchnorm", "layernorm", "groupnorm", "prelu")
    names = [f"prune_{kind}_{side}_channels" for kind in kinds for side in ("out", "in")]
    return types.SimpleNamespace(**{name: types.SimpleNamespace(name=name) for name in names})


class FilterNorms:
    """An importance in the form that Torch-Pruning documents: sums over members, by root position."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def __call__(self, group: Any) -> Tensor:
        total = torch.zeros(len(group[0].idxs))
        for number, (dep, idxs) in enumerate(group):
            root = group[number].root_idxs
            assert dep.layer is dep.target.module
            assert dep.pruning_fn is dep.handler
            if dep.pruning_fn is self.functions.prune_conv_out_channels:
                total.scatter_add_(
                    0, torch.tensor(root), dep.layer.weight.detach()[idxs].flatten(1).abs().sum(1)
                )
            elif dep.pruning_fn is self.functions.prune_batchnorm_out_channels:
                total.scatter_add_(0, torch.tensor(root), dep.layer.weight.detach()[idxs].abs())
        return total


def test_torch_pruning_importance_through_the_adapter() -> None:
    group, *_ = coupled_group()
    functions = fake_functions()
    scores = TorchPruningImportance(FilterNorms(functions), functions).score_group(group)
    expected = create_criterion("magnitude").score_group(group) + create_criterion("bn-scale").score_group(
        group
    )
    assert scores.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert TorchPruningImportance(lambda group: None, functions).score_group(group) is None
    with pytest.raises(ValueError, match=r"\(3,\).*\b4\b.*'first'"):
        TorchPruningImportance(lambda group: torch.ones(3), functions).score_group(group)


def test_real_torch_pruning() -> None:
    importance = pytest.importorskip(
        "torch_pruning.pruner.importance", reason="Torch-Pruning is not installed"
    )
    group, *_ = coupled_group()
    ours = TorchPruningImportance(
        importance.GroupMagnitudeImportance(
            p=1, group_reduction="sum", normalizer=None, target_types=[nn.Conv2d]
        )
    ).score_group(group)
    expected = create_criterion("magnitude", members="all").score_group(group)
    assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    scale = TorchPruningImportance(importance.BNScaleImportance(normalizer=None)).score_group(group)
    assert scale.tolist() == pytest.approx(create_criterion("bn-scale").score_group(group).tolist(), rel=1e-6)


def test_complex_weights_are_scored_by_both_parts() -> None:
    """Spectral layers (Fourier neural operators) hold complex weights."""
    rows = torch.tensor([[3 + 4j, 0], [0, 1j], [0, 0]])
    assert powered_norms(rows, 1).tolist() == pytest.approx([5, 1, 0])
    assert powered_norms(rows, 2).tolist() == pytest.approx([25, 1, 0])
    both = 26**0.5
    assert total_distances(rows).tolist() == pytest.approx([both + 5, both + 1, 6])


def test_the_gate_of_a_complex_activation() -> None:
    """Its derivative is that of a real factor, as autograd has it."""
    values = torch.randn(2, 3, 4, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0))
    gate = torch.ones(2, 3, requires_grad=True)
    (values.requires_grad_() * gate[:, :, None]).abs().sum().backward()
    assert gate.grad is not None
    expected, gate.grad = gate.grad, None
    Gate.apply(values, gate, 1).abs().sum().backward()
    torch.testing.assert_close(gate.grad, expected)
