"""Every rule against slow float64 matrices: single layers, then whole passes through a tiny network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explainers import EBP, LRP, RAP
from explainers.attribution import weight_rules
from explainers.attribution.linear_map import LinearMap
from explainers.attribution.rap import start
from tests.support.explained import Tiny, make_images

Array = NDArray[np.float64]


def ratio(a: Array, b: Array) -> Array:
    """a ⊘ b."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)


def dense(linear: LinearMap, shape: tuple[int, ...]) -> Array:
    """The layer as a matrix (outputs, inputs), column by column."""
    columns = []
    for index in range(int(np.prod(shape))):
        unit = torch.zeros(int(np.prod(shape)), dtype=torch.float64)
        unit[index] = 1
        columns.append(linear.apply(unit.view(1, *shape), linear.weight).flatten().numpy())
    return np.stack(columns, axis=1)


def reference_spread(W: Array, weights: Array, R: Array, total: Array) -> Array:
    """Relevance of outputs without contributions, evenly over the inputs that their layer connects them to."""
    seen = np.zeros_like(W)
    seen[weights] = 1.0
    result = np.zeros(W.shape[1])
    for j in range(len(R)):
        if total[j] == 0:
            result += seen[j] / seen[j].sum() * R[j]
    return result


def reference_z_plus(W: Array, connected: Array, x: Array, R: Array) -> Array:
    result, total = np.zeros_like(x), np.zeros_like(R)
    for j in range(len(R)):
        positive = np.array([max(x[i] * W[j, i], 0) for i in range(len(x))])
        total[j] = positive.sum()
        if total[j] != 0:
            result += positive / total[j] * R[j]
    return result + reference_spread(W, connected, R, total)


def reference_z_box(W: Array, connected: Array, x: Array, R: Array) -> Array:
    low, high = x.min(), x.max()
    result, total = np.zeros_like(x), np.zeros_like(R)
    for j in range(len(R)):
        parts = np.array(
            [x[i] * W[j, i] - low * max(W[j, i], 0) - high * min(W[j, i], 0) for i in range(len(x))]
        )
        total[j] = parts.sum()
        if total[j] != 0:
            result += parts / total[j] * R[j]
    return result + reference_spread(W, connected, R, total)


def reference_epsilon(W: Array, x: Array, R: Array) -> Array:
    result = np.zeros_like(x)
    for j in range(len(R)):
        z = sum(x[i] * W[j, i] for i in range(len(x)))
        result += x * W[j] / (z + (1e-6 if z >= 0 else -1e-6)) * R[j]
    return result


def reference_relative(W: Array, x: Array, R: Array, convolution: bool) -> Array:
    """RAP of explainers' rules, unit by unit, positive and negative contributions joined."""
    result = np.zeros_like(x)
    for j in range(len(R)):
        if R[j] == 0:
            continue
        parts = x * W[j]
        positive, negative = np.clip(parts, 0, None), -np.clip(parts, None, 0)
        P, N = positive.sum(), negative.sum()
        g_plus = g_minus = 0.0
        if P != 0:
            g_plus = (max(R[j], 0) if convolution else R[j]) / P
        if N != 0:
            g_minus = (min(R[j], 0) / N if convolution else 0.0) + (R[j] / (P + N) if P + N else 0.0)
        result += positive * g_plus + negative * g_minus
    reached = result != 0
    surplus = result.sum() - R.sum()
    return result - reached * surplus / max(reached.sum(), 1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3×3": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (2, 5, 5)),
    "grouped, dilated": (lambda: nn.Conv2d(4, 4, 2, dilation=2, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), (3, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), (3, 3, 3)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
}


def linear_map(layer: nn.Module) -> LinearMap:
    if isinstance(layer, nn.Linear):
        return LinearMap(layer.weight.t(), layer.bias, None)
    padding, out = list(layer.padding), list(layer.output_padding)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    settings = (list(layer.stride), padding, list(layer.dilation), transposed, out, layer.groups)
    return LinearMap(layer.weight, layer.bias, settings)


@pytest.fixture(params=LAYERS)
def layer_case(request: pytest.FixtureRequest) -> tuple[LinearMap, tuple[int, ...], Array, Array]:
    torch.manual_seed(0)
    build, shape = LAYERS[request.param]
    with torch.no_grad():
        layer = linear_map(build().double().requires_grad_(False))
        ones = LinearMap(torch.ones_like(layer.weight), None, layer.settings)
        return layer, shape, dense(layer, shape), dense(ones, shape) != 0


def apply_rule(
    rule: Callable[..., Tensor],
    layer: LinearMap,
    x: Array,
    R: Array,
    shape: tuple[int, ...],
    **options: object,
) -> Array:
    like = layer.apply(torch.from_numpy(x).view(1, *shape), layer.weight)
    # A second image in the batch, all different: images must not mix.
    inputs = torch.stack([torch.from_numpy(x).view(shape), torch.randn(shape, dtype=torch.float64).abs()])
    relevance = torch.cat([torch.from_numpy(R).view_as(like), torch.randn_like(like)])
    return rule(layer, inputs, relevance, **options)[0].flatten().numpy()


def random_case(W: Array, *, nonnegative: bool, seed: int = 0) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=W.shape[1])
    x[generator.random(len(x)) < 0.3] = 0
    R = generator.normal(size=W.shape[0])
    R[generator.random(len(R)) < 0.2] = 0
    return np.abs(x) if nonnegative else x, R


@pytest.mark.parametrize("nonnegative", [True, False])
def test_z_plus(layer_case, nonnegative: bool) -> None:
    layer, shape, W, connected = layer_case
    x, R = random_case(W, nonnegative=nonnegative)
    found = apply_rule(weight_rules.z_plus, layer, x, R, shape, nonnegative=nonnegative)
    np.testing.assert_allclose(found, reference_z_plus(W, connected, x, R), atol=1e-12)
    assert found.sum() == pytest.approx(R.sum(), abs=1e-10)


def test_units_that_only_their_bias_makes_active_spread_their_relevance(layer_case) -> None:
    layer, shape, W, connected = layer_case
    x, R = np.zeros(W.shape[1]), random_case(W, nonnegative=True)[1]
    found = apply_rule(weight_rules.z_plus, layer, x, R, shape, nonnegative=True)
    np.testing.assert_allclose(found, reference_spread(W, connected, R, np.zeros_like(R)), atol=1e-12)
    assert found.sum() == pytest.approx(R.sum(), abs=1e-10)


def test_z_box(layer_case) -> None:
    layer, shape, W, connected = layer_case
    x, R = random_case(W, nonnegative=False)
    found = apply_rule(weight_rules.z_box, layer, x, R, shape)
    np.testing.assert_allclose(found, reference_z_box(W, connected, x, R), atol=1e-10)


def test_epsilon(layer_case) -> None:
    layer, shape, W, _ = layer_case
    x, R = random_case(W, nonnegative=False)
    found = apply_rule(weight_rules.epsilon, layer, x, R, shape)
    np.testing.assert_allclose(found, reference_epsilon(W, x, R), rtol=1e-9, atol=1e-9)


def test_flat(layer_case) -> None:
    layer, shape, W, connected = layer_case
    x, R = random_case(W, nonnegative=False)
    found = apply_rule(weight_rules.flat, layer, x, R, shape)
    np.testing.assert_allclose(found, reference_spread(W, connected, R, np.zeros_like(R)), atol=1e-12)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_relative(layer_case, nonnegative: bool) -> None:
    layer, shape, W, _ = layer_case
    x, R = random_case(W, nonnegative=nonnegative)
    found = apply_rule(weight_rules.relative, layer, x, R, shape, nonnegative=nonnegative)
    expected = reference_relative(W, x, R, layer.settings is not None)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert found.sum() == pytest.approx(R.sum(), abs=1e-10)


def test_the_published_rule_for_negative_inputs_doubles_the_sum(layer_case) -> None:
    layer, shape, W, _ = layer_case
    x, R = random_case(W, nonnegative=False)
    found = apply_rule(weight_rules.relative_published, layer, x, R, shape)
    convolution = layer.settings is not None
    expected = reference_relative(W, np.clip(x, 0, None), R, convolution)
    expected += reference_relative(W, np.clip(-x, 0, None), R, convolution)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert found.sum() == pytest.approx(2 * R.sum(), abs=1e-9)


def test_padding_before_the_layer_gets_no_relevance(layer_case) -> None:
    layer, shape, W, _ = layer_case
    x, R = random_case(W, nonnegative=True)
    seen = torch.ones(2, *shape, dtype=torch.float64)
    seen[..., 0] = 0
    x = (torch.from_numpy(x).view(shape) * seen[0]).flatten().numpy()
    hidden = (seen[0] == 0).flatten().numpy()
    for rule in (weight_rules.z_box, weight_rules.flat):
        found = apply_rule(rule, layer, x, R, shape, seen=seen)
        assert np.all(found[hidden] == 0)


def test_raps_start_is_the_published_one() -> None:
    """C_i = c_i + (b·P/(P+N))·c_i⁺ ⊘ P + (b·N/(P+N))·c_i⁻ ⊘ N; R_i = |C_i|·ΣC/Σ|C|."""
    generator = np.random.default_rng(0)
    x, w, b = np.abs(generator.normal(size=9)), generator.normal(size=9), 0.7
    c = x * w
    P, N = np.clip(c, 0, None).sum(), np.clip(c, None, 0).sum()
    C = (
        c
        + ratio(b * P / (P + N) * np.clip(c, 0, None), np.full(9, P))
        + ratio(b * N / (P + N) * np.clip(c, None, 0), np.full(9, N))
    )
    expected = np.abs(C) * C.sum() / np.abs(C).sum()
    logit = torch.tensor([c.sum() + b])
    found = start(torch.from_numpy(x)[None], torch.from_numpy(w)[None], logit)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.sum() == pytest.approx(float(logit))


class Reference:
    """A pass through `Tiny` with dense matrices, and back by the rules of a method, one image at a time."""

    def __init__(self, model: Tiny, image: Tensor, *, merge: bool, by_magnitude: bool = False) -> None:
        self.model, self.merge, self.by_magnitude = model, merge, by_magnitude
        norm = model.bn1
        self.scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
        weight = model.conv1.weight * self.scale.view(-1, 1, 1, 1) if merge else model.conv1.weight
        self.W1, self.C1 = self._matrix(weight, (3, 6, 6), 1)
        self.W2, self.C2 = self._matrix(model.conv2.weight, (4, 6, 6), 1)
        self.W3, self.C3 = self._matrix(model.conv3.weight, (4, 3, 3), 0)
        self.F1, self.F2 = model.fc1.weight.detach().numpy(), model.fc2.weight.detach().numpy()
        with torch.no_grad():
            x = image[None]
            self.x = x.flatten().numpy()
            h1 = norm(model.conv1(x)).relu()
            branch = model.conv2(h1)
            h2 = (branch + h1).relu()
            pooled = model.pool(h2)
            h3 = model.conv3(pooled).relu()
            h4 = model.fc1(h3.flatten(1)).relu()
            self.logits = model.fc2(h4)[0].numpy()
            self.h1, self.branch, self.pooled, self.h3, self.h4 = (
                value.flatten().numpy() for value in (h1, branch, pooled, h3, h4)
            )
            self.h2 = h2[0].numpy()

    def _matrix(self, weight: Tensor, shape: tuple[int, ...], padding: int) -> tuple[Array, Array]:
        settings = ([1, 1], [padding, padding], [1, 1], False, [0, 0], 1)
        weight = weight.detach()
        ones = torch.ones_like(weight)
        return (
            dense(LinearMap(weight, None, settings), shape),
            dense(LinearMap(ones, None, settings), shape) != 0,
        )

    def through_pool(self, R: Array) -> Array:
        """2×2 maximum: the (first) winner takes all."""
        result = np.zeros_like(self.h2)
        relevance = R.reshape(4, 3, 3)
        for c in range(4):
            for i in range(3):
                for j in range(3):
                    window = self.h2[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                    di, dj = np.unravel_index(np.argmax(window), (2, 2))
                    result[c, 2 * i + di, 2 * j + dj] += relevance[c, i, j]
        return result.ravel()

    def through_sum(self, R: Array) -> tuple[Array, Array]:
        """Branch and shortcut in proportion, or by magnitude."""
        if self.by_magnitude:
            total = np.abs(self.branch) + np.abs(self.h1)
            return R * ratio(np.abs(self.branch), total), R * ratio(np.abs(self.h1), total)
        total = self.branch + self.h1
        return R * ratio(self.branch, total), R * ratio(self.h1, total)

    def back(self, R4: Array, linear: Callable, conv: Callable, first: Callable) -> Array:
        """Relevance of the image from that of `h4`."""
        R3 = linear(self.F1, self.h3, R4)
        R_pooled = conv(self.W3, self.C3, self.pooled, R3)
        to_branch, to_shortcut = self.through_sum(self.through_pool(R_pooled))
        R1 = to_shortcut + conv(self.W2, self.C2, self.h1, to_branch)
        return first(self.W1, self.C1, self.x, R1)


def everywhere(W: Array) -> Array:
    return np.ones_like(W, dtype=bool)


IMAGES = make_images(3, 6, seed=5).double()
TARGETS = torch.tensor([0, 1, 2])


def check(
    tiny: nn.Module, method: LRP | EBP | RAP, merge: bool, expected_of: Callable[[Reference, int], Array]
) -> None:
    found = method.prepare(tiny, IMAGES)(IMAGES, TARGETS)
    for index in range(3):
        reference = Reference(tiny, IMAGES[index], merge=merge)
        expected = expected_of(reference, int(TARGETS[index])).reshape(3, 6, 6)
        heatmap = expected.sum(0)
        if not found.signed:
            heatmap = np.clip(heatmap, 0, None)
        np.testing.assert_allclose(found.map[index].numpy(), heatmap, rtol=2e-5, atol=1e-6)
        assert float(found.arrived[index]) == pytest.approx(expected.sum(), rel=1e-5, abs=1e-6)
        assert float(found.started[index]) == pytest.approx(float(found.arrived[index]), rel=2e-3, abs=1e-4)


def test_lrp_zplus_through_a_network(tiny: nn.Module) -> None:
    def expected(ref: Reference, target: int) -> Array:
        def linear(W: Array, x: Array, R: Array) -> Array:
            return reference_z_plus(W, everywhere(W), x, R)

        R = np.zeros(3)
        R[target] = ref.logits[target]
        return ref.back(linear(ref.F2, ref.h4, R), linear, reference_z_plus, reference_z_box)

    check(tiny, LRP(), False, expected)


def test_lrp_epsilon_plus_flat_through_a_network(tiny: nn.Module) -> None:
    def flat(W: Array, connected: Array, x: Array, R: Array) -> Array:
        return reference_spread(W, connected, R, np.zeros_like(R))

    def expected(ref: Reference, target: int) -> Array:
        R = np.zeros(3)
        R[target] = ref.logits[target]
        start_relevance = reference_epsilon(ref.F2, ref.h4, R)
        return ref.back(start_relevance, reference_epsilon, reference_z_plus, flat)

    check(tiny, LRP("epsilon-plus-flat"), True, expected)


def test_excitation_backprop_through_a_network(tiny: nn.Module) -> None:
    def linear(W: Array, x: Array, R: Array) -> Array:
        return reference_z_plus(W, everywhere(W), x, R)

    def expected(ref: Reference, target: int) -> Array:
        return ref.back(linear(ref.F2, ref.h4, np.eye(3)[target]), linear, reference_z_plus, reference_z_plus)

    check(tiny, EBP(stop="input"), True, expected)

    def contrastive(ref: Reference, target: int) -> Array:
        one = np.eye(3)[target]
        difference = linear(ref.F2, ref.h4, one) - linear(-ref.F2, ref.h4, one)
        return ref.back(difference, linear, reference_z_plus, reference_z_plus)

    check(tiny, EBP(contrastive=True, stop="input"), True, contrastive)


def test_excitation_backprop_stops_before_the_last_pool(tiny: nn.Module) -> None:
    def linear(W: Array, x: Array, R: Array) -> Array:
        return reference_z_plus(W, everywhere(W), x, R)

    found = EBP().prepare(tiny, IMAGES)(IMAGES, TARGETS)
    for index, target in enumerate(TARGETS.tolist()):
        ref = Reference(tiny, IMAGES[index], merge=True)
        R = linear(ref.F1, ref.h3, linear(ref.F2, ref.h4, np.eye(3)[target]))
        stopped = ref.through_pool(reference_z_plus(ref.W3, ref.C3, ref.pooled, R)).reshape(4, 6, 6)
        np.testing.assert_allclose(found.map[index].numpy(), stopped.sum(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("as_published", [True, False])
def test_rap_through_a_network(tiny: nn.Module, as_published: bool) -> None:
    def linear(W: Array, x: Array, R: Array) -> Array:
        return reference_relative(W, x, R, convolution=False)

    def conv(W: Array, connected: Array, x: Array, R: Array) -> Array:
        return reference_relative(W, x, R, convolution=True)

    def expected(ref: Reference, target: int) -> Array:
        c = ref.h4 * ref.F2[target]
        R4 = np.abs(c) * ref.logits[target] / np.abs(c).sum()
        result = ref.back(R4, linear, conv, reference_z_box)
        return result * np.sign(ref.logits[target])

    found = RAP(as_published).prepare(tiny, IMAGES)(IMAGES, TARGETS)
    for index in range(3):
        reference = Reference(tiny, IMAGES[index], merge=False, by_magnitude=not as_published)
        relevance = expected(reference, int(TARGETS[index])).reshape(3, 6, 6)
        np.testing.assert_allclose(
            found.map[index].numpy(), np.clip(relevance.sum(0), 0, None), rtol=2e-5, atol=1e-6
        )
        assert float(found.started[index]) == pytest.approx(float(found.arrived[index]), rel=1e-4)


def test_gates_take_no_relevance_and_equal_factors_share() -> None:
    class Gated(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.signal, self.gate = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.how = how

        def forward(self, images: Tensor) -> Tensor:
            x, g = self.signal(images), self.gate(images)
            match self.how:
                case "sigmoid":
                    x = torch.sigmoid(g) * x
                case "rescaled":
                    x = x * ((torch.tanh(g) + 1) / 2)
                case "broadcast":
                    x = g.mean((2, 3), keepdim=True).softmax(1) * x
                case "quotient":
                    x = x / (g.abs() + 1)
                case "neither":
                    x = x * g
            return x.sum((2, 3))

    images = make_images(2, 4)
    for how in ("sigmoid", "rescaled", "broadcast", "quotient", "neither"):
        torch.manual_seed(0)
        model = Gated(how).eval()
        before = LRP().prepare(model, images)(images, torch.tensor([1, 2]))
        torch.testing.assert_close(before.arrived, before.started, rtol=1e-4, atol=1e-5)
        with torch.no_grad():  # other gates of the same function: shares of the signal's inputs stay
            scaled = Gated(how).eval()
            scaled.load_state_dict(model.state_dict())
            scaled.gate.weight += torch.randn_like(scaled.gate.weight)
        after = LRP().prepare(scaled, images)(images, torch.tensor([1, 2]))
        shares = [result.map.flatten(1) / result.started[:, None] for result in (before, after)]
        if how == "broadcast":  # one gate for all pixels: where the relevance lies does not depend on it
            torch.testing.assert_close(shares[0], shares[1], rtol=1e-3, atol=1e-5)
