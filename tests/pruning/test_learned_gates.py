"""Learned gates: noise, relaxation, hypernetwork, resource loss, and how gates become widths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from image_classification.config import ConfigError, SettingError, told
from image_classification.models import create_model
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.engine.constraints import Constraints
from pruning.engine.trace_groups import trace_groups
from pruning.training.gate_flags import GateFlags
from pruning.training.learned.gate_settings import GateSettings
from pruning.training.learned.parametrisations import HyperGates, build_gates, draw_noise, harden, soft_gates
from pruning.training.learned.widths import inner_groups, mask_at, widths_of_gates
from pruning.training.pruning_config import PruningConfig


def network(arch: str = "resnet20", **constraints: Any) -> tuple[nn.Module, Any, CostModel]:
    model = create_model(arch, num_classes=10).eval()
    images = torch.randn(2, 3, 16, 16)
    graph = trace_groups(model, images, constraints=Constraints(**{"min_width": 0.1, **constraints}))
    return model, graph, CostModel(graph, model, images, ("macs", "params"))


class TestNoise:
    def test_gumbel_as_published_nearly_never_closes_a_fresh_gate(self) -> None:
        noise = draw_noise("gumbel", 200_000, 0, 0).double()
        assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
        assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
        assert float((soft_gates(torch.tensor(3.0), 0.4, noise) < 0.5).float().mean()) < 1e-4
        # P(closed | θ) = exp(−exp(θ + base)); at a logit of −1 both happen.
        closed = (soft_gates(torch.tensor(-1.0), 0.4, noise) < 0.5).double().mean()
        assert float(closed) == pytest.approx(math.exp(-math.exp(-1)), abs=0.01)

    def test_logistic_is_the_noise_of_a_binary_concrete_variable(self) -> None:
        noise = draw_noise("logistic", 200_000, 0, 0).double()
        for logit in (-1.0, 0.5, 3.0):
            kept = (soft_gates(torch.tensor(logit), 0.4, noise) >= 0.5).double().mean()
            assert float(kept) == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.01)

    @pytest.mark.parametrize("kind", ["gumbel", "logistic"])
    def test_it_is_a_function_of_seed_and_step(self, kind: str) -> None:
        noise = draw_noise(kind, 50, 3, 7)
        assert torch.equal(noise, draw_noise(kind, 50, 3, 7))
        assert not torch.equal(noise, draw_noise(kind, 50, 3, 8))
        assert not torch.equal(noise, draw_noise(kind, 50, 4, 7))
        assert noise.isfinite().all()
        draw_noise(kind, 5, -1, 1)


class TestGate:
    def test_formula(self) -> None:
        logits, noise = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
        expected = [
            1 / (1 + math.exp(-(a + n) / 0.4)) for a, n in zip(logits.tolist(), noise.tolist(), strict=True)
        ]
        torch.testing.assert_close(
            soft_gates(logits, 0.4, noise), torch.tensor(expected, dtype=torch.float64)
        )

    def test_hard_gates_have_the_derivative_of_soft_ones(self) -> None:
        logits = torch.tensor([-2.0, -0.1, 0.0, 0.3, 4.0], requires_grad=True)
        soft = soft_gates(logits, 0.4)
        hard = harden(soft)
        assert hard.tolist() == [0, 0, 1, 1, 1]
        assert harden(torch.linspace(0.5, 0.99, 1000)).eq(1).all(), "not rounded"
        (straight,) = torch.autograd.grad(hard.sum(), logits, retain_graph=True)
        (plain,) = torch.autograd.grad(soft.sum(), logits)
        assert torch.equal(straight, plain)


class TestHypernetwork:
    def test_inputs_are_orthogonal_and_fixed(self) -> None:
        gates = build_gates("hyper", [4, 8, 6], 0)
        assert isinstance(gates, HyperGates)
        torch.testing.assert_close(gates.inputs @ gates.inputs.T, torch.eye(3), atol=1e-5, rtol=0)
        assert "inputs" not in dict(gates.named_parameters())
        deep = build_gates("hyper", [2] * 80, 0)
        assert isinstance(deep, HyperGates)
        torch.testing.assert_close(deep.inputs.T @ deep.inputs, torch.eye(64), atol=1e-5, rtol=0)

    def test_shapes_layers_and_dependence(self) -> None:
        gates = build_gates("hyper", [4, 8, 6], 0)
        assert isinstance(gates, HyperGates)
        assert (gates.gru.input_size, gates.gru.hidden_size, gates.gru.bidirectional) == (64, 128, True)
        theta = gates()
        assert theta.shape == (18,)
        # The layers know of each other: every θ depends on the GRU, which reads all inputs both ways.
        for index in range(3):
            (gradient,) = torch.autograd.grad(gates()[0], gates.heads[index].parameters(), allow_unused=True)[
                :1
            ]
            assert bool(gradient.abs().sum() > 0) == (index == 0)
        (gradient,) = torch.autograd.grad(theta[-1], [gates.gru.weight_ih_l0])
        assert gradient.abs().sum() > 0

    def test_a_function_of_the_seed_that_draws_nothing_else(self) -> None:
        state = torch.get_rng_state()
        first, again, other = (build_gates("hyper", [4, 8], seed)() for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)

    def test_simple_gates_start_at_nothing(self) -> None:
        assert torch.equal(build_gates("simple", [4, 8], 0)(), torch.zeros(12))

    def test_or_as_published_from_a_normal_distribution(self) -> None:
        theta = build_gates("simple", [400, 800], 0, "normal")()
        assert torch.equal(theta, build_gates("simple", [400, 800], 0, "normal")())
        assert abs(float(theta.detach().mean())) < 0.1
        assert float(theta.detach().std()) == pytest.approx(1, abs=0.1)
        with pytest.raises(SettingError, match="gate_init"):
            GateSettings(gates="hyper", gate_init="normal")


class TestInnerGroups:
    def test_of_a_residual_network(self) -> None:
        _, graph, _ = network()
        names = [group.name for group in inner_groups(graph)]
        assert names == [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]

    def test_of_a_mobile_network_the_depthwise_layer_shares_the_gate(self) -> None:
        _, graph, _ = network("mobilenet_v2_cifar")
        inner = inner_groups(graph)
        for group in inner:
            kinds = {member.role for member in graph.members(group)}
            assert "out" in kinds
        sums = {group.name for group in graph.prunable} - {group.name for group in inner}
        assert sums
        assert len(inner) >= 17


class TestWidths:
    def gates(self, graph: Any, groups: Any, seed: int = 0) -> dict[int, np.ndarray]:
        generator = np.random.default_rng(seed)
        return {group.index: generator.normal(0.5, 1.0, group.width) for group in groups}

    @pytest.mark.parametrize("constraints", [{}, {"round_to": 4}, {"min_width": 0.5}])
    def test_the_budget_is_met_and_only_just(self, constraints: dict[str, Any]) -> None:
        _, graph, costs = network(**constraints)
        logits = self.gates(graph, graph.prunable)
        budget = Budget({"macs": 0.6, "params": 0.65})
        cut = widths_of_gates(graph, graph.prunable, costs, budget, logits)
        for metric, share in budget.shares.items():
            assert cut.share[metric] <= share + 1e-6
        for index, kept in cut.keep.items():
            group = graph.groups[index]
            assert len(kept) in graph.allowed_widths(group)
            order = np.argsort(logits[index], kind="stable")
            assert sorted(order[group.width - len(kept) :].tolist()) == kept.tolist()
        # The next lower threshold would be over the budget.
        values = np.unique(np.concatenate(list(logits.values())))
        wider = mask_at(graph, graph.prunable, logits, values[values < cut.threshold][-1])
        assert any(
            costs.cost(metric, wider) > share * costs.baseline(metric)
            for metric, share in budget.shares.items()
        )

    def test_gates_on_the_budget_are_taken_as_they_are(self) -> None:
        _, graph, costs = network()
        group = graph.group("layer3.1.conv1")
        logits = {group.index: np.where(np.arange(group.width) < 40, 2.0, -2.0)}
        mask = graph.keep_mask({group: range(40)})
        share = costs.cost("macs", mask) / costs.baseline("macs")
        cut = widths_of_gates(graph, [group], costs, Budget({"macs": share}), logits)
        assert cut.keep[group.index].tolist() == list(range(40))
        assert (cut.num_closed, cut.num_opened) == (0, 0)
        assert "taken as they are" in cut.describe()

    @pytest.mark.parametrize(("shift", "what"), [(-5.0, "num_opened"), (5.0, "num_closed")])
    def test_gates_that_miss_the_budget_are_adjusted_and_reported(self, shift: float, what: str) -> None:
        _, graph, costs = network()
        groups = inner_groups(graph)
        logits = {index: values + shift for index, values in self.gates(graph, groups).items()}
        cut = widths_of_gates(graph, groups, costs, Budget({"macs": 0.6}), logits)
        assert getattr(cut, what) > 0
        assert 0.55 < cut.share["macs"] <= 0.6 + 1e-6
        assert "is not the budget" in cut.describe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_temperature": 0.0}, "--gate-temperature"),
        ({"gate_epochs": 0}, "--gate-epochs"),
        ({"gate_lr": 0.0}, "--gate-lr"),
        ({"gate_weight_decay": -1.0}, "--gate-weight-decay"),
        ({"matching_weight": -1.0}, "--matching-weight"),
        ({"matching_weight": 0.0}, "--gate-task-weight 0"),
        ({"gate_task_weight": -1.0}, "--gate-task-weight"),
        ({"resource_weight": 0.0}, "--resource-weight"),
        ({"resource_growth": 0.9}, "--resource-growth"),
        ({"iterative_pruning": True}, "--iterative-pruning"),
        ({"one_shot_pruning": 0.5}, "--one-shot-pruning"),
        ({"pruning_criterion": "magnitude"}, "--pruning-criterion"),
        ({"saliency_passes": 2}, "--saliency-passes"),
        ({"saliency_explanation": None}, "--selector"),
        ({"selector": "x.pth"}, "--saliency-explanation gradcam"),
    ],
)
def test_unusable_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PruningConfig(**{"pruning_method": "learned", "saliency_explanation": "gradcam", **settings})
    assert message in told(caught.value)


def test_published_constants_are_the_defaults() -> None:
    flags = GateFlags()
    assert (flags.gate_lr, flags.gate_weight_decay, flags.matching_weight) == (1e-3, 1e-3, 10.0)
    assert (flags.resource_weight, flags.gate_temperature, flags.gate_base) == (1.0, 0.4, 3.0)
    assert (flags.gate_epochs, flags.gate_noise, flags.gates, flags.gate_groups) == (
        200,
        "gumbel",
        "simple",
        "inner",
    )
