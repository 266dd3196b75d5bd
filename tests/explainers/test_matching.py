"""Attribution matching: the formulas against slow float64 ones, the gradient against finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from support.explained import Tiny, make_images
from torch import Tensor, nn

from explainers.attribution.gradcam import find_layer
from explainers.attribution.record import UnsupportedOperatorError
from explainers.differentiable.matching import (
    MATCHES,
    SENSITIVE,
    AttributionMatcher,
    attribution_map,
    kept_channels,
    map_distance,
    sensitivities,
)
from image_classification.models import create_model

LAYER = "conv3"


def twin(tiny: nn.Module, seed: int = 5) -> nn.Module:
    """A frozen teacher like `tiny`, with other weights."""
    teacher = copy.deepcopy(tiny)
    generator = torch.Generator().manual_seed(seed)
    for parameter in teacher.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return teacher.eval().requires_grad_(False)


def matching_loss(
    matcher: AttributionMatcher, student: nn.Module, teacher: nn.Module, images: Tensor
) -> Tensor:
    view = matcher.look(teacher, images)
    with matcher.watch(student) as features:
        logits = student(images)
    return matcher.loss(features, logits, view)


def slow_map(kind: str, model: nn.Module, images: Tensor, classes: list[int]) -> list[list[list[float]]]:
    """M by loops over images, pixels and channels; ∂z/∂A by central differences on A."""
    with torch.no_grad():
        before = model.conv3(model.pool(_trunk(model, images)))

        def head(features: Tensor) -> Tensor:
            hidden = model.fc1(features.relu().flatten(1)).relu()
            return model.fc2(hidden)

        maps = []
        for n, k in enumerate(classes):
            a = before[n : n + 1]
            _, channels, height, width = a.shape
            found = [[0.0] * width for _ in range(height)]
            for c in range(channels):
                weight = 0.0
                for i in range(height):
                    for j in range(width):
                        step = torch.zeros_like(a)
                        step[0, c, i, j] = 1e-6
                        weight += float((head(a + step) - head(a - step))[0, k]) / 2e-6
                for i in range(height):
                    for j in range(width):
                        value = float(a[0, c, i, j])
                        found[i][j] += weight * value if kind in SENSITIVE else value**2 / channels
            maps.append([[max(v, 0.0) for v in row] for row in found])
    return maps


def _trunk(model: nn.Module, images: Tensor) -> Tensor:
    x = model.bn1(model.conv1(images)).relu()
    return (model.conv2(x) + x).relu()


@pytest.mark.parametrize("kind", MATCHES)
def test_maps_against_loops(tiny: nn.Module, kind: str) -> None:
    images = make_images(3, 6).double()
    teacher = twin(tiny)
    view = AttributionMatcher(kind, ((LAYER, LAYER),)).look(teacher, images)
    expected = torch.tensor(slow_map(kind, teacher, images, view.classes.tolist()), dtype=torch.float64)
    torch.testing.assert_close(view.maps[0], expected, rtol=1e-6, atol=1e-8)
    assert (view.logits == teacher(images)).all()
    assert not view.maps[0].requires_grad


def slow_distance(kind: str, student: Tensor, teacher: Tensor) -> float:
    """By hand, image by image."""
    total = 0.0
    for first, second in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
        if kind == "gradcam":
            first, second = ([(v - min(m)) / (max(m) - min(m)) for v in m] for m in (first, second))
        else:
            first, second = ([v / math.sqrt(sum(x * x for x in m)) for v in m] for m in (first, second))
        squares = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
        total += math.sqrt(squares) if kind == "attention" else squares / len(first)
    return total / len(student)


@pytest.mark.parametrize("kind", MATCHES)
def test_distance_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(4, 3, 5, dtype=torch.float64), torch.rand(4, 3, 5, dtype=torch.float64)
    assert map_distance(kind, student, teacher).item() == pytest.approx(slow_distance(kind, student, teacher))
    assert map_distance(kind, 7 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    zero = torch.zeros_like(student).requires_grad_()
    map_distance(kind, zero, teacher).backward()
    assert torch.isfinite(zero.grad).all()  # a map without any value is no NaN


@pytest.mark.parametrize("kind", MATCHES)
@pytest.mark.parametrize("training", [False, True])
def test_gradient_against_finite_differences(tiny: nn.Module, kind: str, training: bool) -> None:
    """Through the second order, at every parameter that the map depends on, batch statistics included."""
    teacher = twin(tiny)
    student = tiny.train(training).requires_grad_()
    images = make_images(12, 6, seed=2).double()
    matcher = AttributionMatcher(kind, ((LAYER, LAYER),))
    matching_loss(matcher, student, teacher, images).backward()
    generator, num_nonzero = torch.Generator().manual_seed(1), 0
    for name, parameter in student.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for index in torch.randint(parameter.numel(), (3,), generator=generator).tolist():
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[index] += step
                values.append(matching_loss(matcher, student, teacher, images).item())
                with torch.no_grad():
                    parameter.view(-1)[index] -= step
            numeric = (values[0] - values[1]) / 2e-6
            got = gradient.view(-1)[index].item()
            assert got == pytest.approx(numeric, rel=1e-4, abs=1e-8), name
            num_nonzero += abs(numeric) > 1e-7
    behind = student.fc2.weight.grad
    assert num_nonzero > 8
    if kind in SENSITIVE:  # weights behind the layer count through the sensitivity alone
        assert behind is not None
        assert behind.abs().max() > 1e-6
    else:
        assert behind is None


@pytest.mark.parametrize("kind", MATCHES)
def test_identical_networks_have_no_loss_and_no_gradient(tiny: nn.Module, kind: str) -> None:
    teacher = copy.deepcopy(tiny).requires_grad_(False)
    loss = matching_loss(
        AttributionMatcher(kind, ((LAYER, LAYER), ("conv1", "conv1"))),
        tiny,
        teacher,
        make_images(3, 6).double(),
    )
    assert loss.item() == pytest.approx(0, abs=1e-20)
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-10 for p in tiny.parameters())


def test_several_layers_add_up(tiny: nn.Module) -> None:
    teacher, images = twin(tiny), make_images(3, 6).double()
    alone = [
        matching_loss(AttributionMatcher("swa", (pair,)), tiny, teacher, images).item()
        for pair in (("conv1", "conv1"), (LAYER, LAYER))
    ]
    both = AttributionMatcher("swa", (("conv1", "conv1"), (LAYER, LAYER)))
    assert matching_loss(both, tiny, teacher, images).item() == pytest.approx(sum(alone))


def test_student_of_another_width_and_size(tiny: nn.Module) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 9, 3, padding=1)
            self.head = nn.Linear(9, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.wide(images).relu().mean((2, 3)))

    torch.manual_seed(0)
    student = Other().double()
    loss = matching_loss(
        AttributionMatcher("swa", (("wide", LAYER),)), student, twin(tiny), make_images(2, 6).double()
    )
    loss.backward()
    assert loss > 0
    assert student.wide.weight.grad.abs().max() > 0


def test_stochastic_matching_leaves_a_share_out_by_step(tiny: nn.Module) -> None:
    kept = kept_channels(10, 0.3, (0, 1, 0))
    assert kept.tolist().count(0.0) == 3
    assert torch.equal(kept, kept_channels(10, 0.3, (0, 1, 0)))
    assert kept_channels(1, 0.9, (0,)).tolist() == [1.0]
    drawn = torch.stack([kept_channels(10, 0.3, (0, step, 0)) for step in range(400)]).mean(0)
    assert (drawn - 0.7).abs().max() < 0.1
    teacher, images = twin(tiny), make_images(3, 6).double()
    matcher = AttributionMatcher("swa", ((LAYER, LAYER),), drop_share=0.4, seed=2)
    with torch.no_grad():
        features = teacher.conv3(teacher.pool(_trunk(teacher, images)))
    view = matcher.look(teacher, images, step=7)
    leaf = features.clone().requires_grad_()
    logits = teacher.fc2(teacher.fc1(leaf.relu().flatten(1)).relu())
    (weights,) = sensitivities(logits, view.classes, [leaf], create_graph=False)
    kept = kept_channels(5, 0.4, (2, 7, 0)).bool()
    expected = attribution_map("swa", features[:, kept], weights[:, kept])
    torch.testing.assert_close(view.maps[0], expected)
    assert not torch.equal(view.maps[0], matcher.look(teacher, images, step=8).maps[0])


def test_half_precision_and_channels_last_agree_with_float32() -> None:
    torch.manual_seed(0)
    student = create_model("resnet20", num_classes=4, widths={"layer3.0.conv1": 20}).eval()
    teacher = create_model("resnet20", num_classes=4).eval().requires_grad_(False)
    images, matcher = make_images(4, 32), AttributionMatcher("swa", (("layer3", "layer3"),))

    def gradient(autocast: bool, memory_format: torch.memory_format) -> tuple[float, Tensor]:
        placed = copy.deepcopy(student).to(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = matching_loss(matcher, placed, teacher, images.contiguous(memory_format=memory_format))
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in placed.parameters() if p.grad is not None])

    exact, direction = gradient(False, torch.contiguous_format)
    same, channels_last = gradient(False, torch.channels_last)
    assert same == pytest.approx(exact, rel=1e-4)
    torch.testing.assert_close(channels_last, direction, rtol=1e-3, atol=1e-6)
    rough, half = gradient(True, torch.contiguous_format)
    assert rough == pytest.approx(exact, rel=0.05)
    assert nn.functional.cosine_similarity(half, direction, dim=0) > 0.97


@pytest.mark.parametrize(
    "arch",
    [
        "vgg11_bn_cifar_x8",
        "mobilenet_v2_cifar",
        "torchvision/shufflenet_v2_x0_5",
        "timm/mobilenetv3_small_050",
    ],
)
def test_default_layer_of_other_families(arch: str, randomised: Callable[..., nn.Module]) -> None:
    teacher = randomised(arch, 64, num_classes=4).requires_grad_(False)
    student = randomised(arch, 64, num_classes=4, seed=1)
    images = make_images(8, 64)
    name = find_layer(teacher, images)
    loss = matching_loss(AttributionMatcher("swa", ((name, name),)), student, teacher, images)
    loss.backward()
    assert torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


def test_hooks_are_gone_also_after_an_error(tiny: nn.Module) -> None:
    matcher = AttributionMatcher("swa", ((LAYER, LAYER),))
    with pytest.raises(RuntimeError), matcher.watch(tiny):
        raise RuntimeError("stop")
    matching_loss(matcher, tiny, twin(tiny), make_images(2, 6).double())
    assert not any(module._forward_hooks for module in tiny.modules())


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda m, x: AttributionMatcher("swe", ((LAYER, LAYER),)), ValueError, r"kind='swe'.*swa\?"),
        (lambda m, x: AttributionMatcher("swa", ()), ValueError, r"layers=\(\)"),
        (lambda m, x: AttributionMatcher("swa", ((LAYER, LAYER),), 1.0), ValueError, "drop_share=1.0"),
        (
            lambda m, x: AttributionMatcher("swa", (("conv9", "conv9"),)).look(m, x),
            ValueError,
            "'conv9'",
        ),
        (
            lambda m, x: AttributionMatcher("swa", (("fc1", "fc1"),)).look(m, x),
            ValueError,
            r"'fc1'.*\(2, 6\)",
        ),
        (lambda m, x: AttributionMatcher("swa", (("relu", "relu"),)).look(m, x), ValueError, "'relu'.* 2 "),
    ],
)
def test_layers_that_cannot_be_matched_are_refused(
    tiny: nn.Module, attempt: Callable, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attempt(tiny.requires_grad_(False), make_images(2, 6).double())


def test_a_full_device_is_not_blamed_on_the_layer(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        AttributionMatcher("swa", ((LAYER, LAYER),)).look(
            tiny.requires_grad_(False), make_images(2, 6).double()
        )


def test_layer_that_logits_do_not_depend_on() -> None:
    class Aside(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            self.conv3(self.conv1(images).detach())
            return self.fc2(self.fc1(torch.ones(len(images), 45)))

    with pytest.raises(UnsupportedOperatorError):
        AttributionMatcher("swa", ((LAYER, LAYER),)).look(Aside().requires_grad_(False), make_images(2, 6))
