"""What all methods promise: conservation, batches that do not mix, an untouched model, maps that know the weights."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers import (
    EBP,
    LRP,
    RAP,
    Centre,
    GradCAM,
    IntegratedGradients,
    UnsupportedOperatorError,
    create_method,
    method_names,
)
from explainers.attribution.gradcam import class_activation, find_layer
from explainers.attribution.method import Method, frozen_copy
from image_classification.models import create_model
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from tests.support.explained import make_images, randomise

CONSERVING = {
    "lrp zplus": LRP(),
    "lrp epsilon-plus-flat": LRP("epsilon-plus-flat"),
    "ebp to the images": EBP(stop="input"),
    "ebp": EBP(),
    "rap": RAP(),
}
ALL: dict[str, Method] = CONSERVING | {
    "gradcam": GradCAM(),
    "ig": IntegratedGradients(steps=4),
    "ebp contrastive": EBP(contrastive=True),
    "centre": Centre(),
}


def check_conserved(model: nn.Module, size: int, tolerance: float = 1e-3) -> None:
    images = make_images(3, size, seed=4)
    with torch.no_grad():
        targets = model(images).argmax(1)
    for name, method in CONSERVING.items():
        result = method.prepare(model, images)(images, targets)
        ratio = result.arrived / result.started
        assert (ratio - 1).abs().max() < tolerance, f"{name}: {ratio.tolist()}"
        assert torch.isfinite(result.map).all()


def narrowed(arch: str) -> dict[str, int]:
    """Odd widths for some layers, as pruning leaves them."""
    layers = {
        "resnet56": {
            f"layer{stage}.{block}.conv1": 3 + 2 * block + stage for stage in (1, 2, 3) for block in range(9)
        },
        "resnet50": {
            f"layer{stage}.{block}.conv2": 13 + 5 * stage for stage in (1, 2, 3) for block in range(3)
        }
        | {"conv1": 37, "layer4.1.conv1": 101},
        "vgg16_bn": {"features.0": 17, "features.14": 99, "features.40": 61, "classifier.0": 333},
    }
    return layers[arch.removesuffix("_cifar")]


@pytest.mark.parametrize("arch", ["resnet56", "vgg16_bn_cifar", "mobilenet_v2_cifar"])
def test_relevance_is_conserved(arch: str, randomised) -> None:
    check_conserved(randomised(arch, 32), 32)


def test_relevance_is_conserved_in_a_narrowed_network(randomised) -> None:
    check_conserved(randomised("resnet56", 32, widths=narrowed("resnet56")), 32)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vgg16_bn", "resnet50", "torchvision/densenet121", "mobilenet_v2"])
def test_relevance_is_conserved_at_full_size(arch: str, randomised) -> None:
    check_conserved(randomised(arch, 224), 224)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vgg16_bn", "resnet50"])
def test_relevance_is_conserved_at_full_size_when_narrowed(arch: str, randomised) -> None:
    check_conserved(randomised(arch, 224, widths=narrowed(arch)), 224)


def pruned(arch: str, size: int) -> nn.Module:
    """A network that the engine has taken 20 to 70 % of every group's channels from."""
    torch.manual_seed(0)
    model = create_model(arch, num_classes=10).eval()
    graph = trace_groups(model, make_images(1, min(size, 64)))
    keep = {}
    for group in graph.prunable:
        share = 0.3 + 0.5 * torch.rand(()).item()
        width = max(graph.min_width_of(group), round(share * group.width))
        keep[group] = torch.randperm(group.width)[:width].sort().values
    report = prune_channels(model, graph, keep)
    assert report.macs[1] < 0.6 * report.macs[0]
    return randomise(model, make_images(8, size, seed=1))


def test_relevance_is_conserved_in_a_pruned_network() -> None:
    check_conserved(pruned("resnet20", 32), 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("vgg16_bn", 224),
        ("resnet50", 224),
        ("resnet56", 32),
        ("torchvision/densenet121", 224),
        ("mobilenet_v2", 224),
    ],
)
def test_relevance_is_conserved_at_full_size_when_pruned(arch: str, size: int) -> None:
    check_conserved(pruned(arch, size), size)


@pytest.mark.parametrize("name", ALL)
def test_a_image_has_the_same_map_in_any_batch(name: str, randomised) -> None:
    # float64, because the kernels for one image round differently, and RAP amplifies that to some percent
    model = randomised("resnet20", 32).double()
    images, targets = make_images(5, 32, seed=2).double(), torch.tensor([0, 3, 3, 9, 1])
    prepared = ALL[name].prepare(model, images[:2])
    together = prepared(images, targets)
    assert together.map.shape == (5, 32, 32)
    assert together.map.dtype == torch.float32
    assert together.started.shape == together.arrived.shape == (5,)
    assert together.signed or (together.map >= 0).all()
    for row in range(5):
        alone = prepared(images[row : row + 1], targets[row : row + 1])
        torch.testing.assert_close(alone.map[0], together.map[row], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_the_model_stays_exactly_as_it_was(name: str, randomised) -> None:
    model = randomised("resnet20", 32).train()
    model.layer1.eval()  # a mixture of modes
    model(make_images(4, 32)).sum().backward()
    calls = []
    handle = model.fc.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    images = make_images(2, 32)
    prepared = ALL[name].prepare(model, images)
    prepared(images, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="targets"):
        prepared(images, torch.tensor([0, 99]))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )
    assert hooks == 1
    handle.remove()


@pytest.mark.parametrize("name", [name for name in ALL if name != "centre"])
def test_maps_change_when_the_weights_are_randomised(name: str, randomised) -> None:
    images, targets = make_images(4, 32), torch.arange(4)
    maps = [
        ALL[name].prepare(randomised("resnet20", 32, seed=seed), images)(images, targets).map.flatten(1)
        for seed in (0, 1)
    ]
    centred = [each - each.mean(1, keepdim=True) for each in maps]
    correlation = F.cosine_similarity(*centred, dim=1)
    assert correlation.max() < 0.98


def test_half_precision_networks_and_channels_last_are_explained(randomised) -> None:
    model = randomised("resnet20", 32)
    images, targets = make_images(2, 32), torch.tensor([0, 1])
    expected = LRP().prepare(model, images)(images, targets)
    last = LRP().prepare(model.to(memory_format=torch.channels_last), images)
    found = last(images.to(memory_format=torch.channels_last), targets)
    torch.testing.assert_close(found.map, expected.map, rtol=1e-3, atol=1e-6)
    half = copy.deepcopy(model).bfloat16()
    result = LRP().prepare(half, images.bfloat16())(images.bfloat16(), targets)
    assert result.map.dtype == torch.float32
    assert next(half.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(result.arrived, result.started, rtol=1e-3, atol=1e-4)


def test_memory_does_not_grow_over_batches(randomised) -> None:
    """Without help of the garbage collector, which may not run for a long time: nothing may refer to itself."""

    def num_tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    model, images = randomised("resnet20", 32), make_images(2, 32)
    prepared = [method.prepare(model, images) for method in ALL.values()]
    for method in prepared:
        method(images, torch.tensor([0, 1]))
    gc.collect()
    gc.disable()
    try:
        before = num_tensors()
        for _ in range(3):
            for method in prepared:
                method(images, torch.tensor([0, 1]))
        assert num_tensors() <= before
    finally:
        gc.enable()


class Attention(nn.Module):
    """Has a product of two signals as matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2)
        return self.fc((x @ (x.transpose(1, 2) @ x)).mean(2))


@pytest.mark.parametrize("name", CONSERVING)
def test_an_unsupported_operator_is_named(name: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match="aten::bmm"):
        ALL[name].prepare(Attention(), make_images(1, 4))
    gradients = IntegratedGradients(steps=4).prepare(Attention(), make_images(1, 4))
    assert gradients(make_images(2, 4), torch.tensor([0, 1])).map.shape == (2, 4, 4)


def test_requests_that_make_no_sense_are_refused(randomised) -> None:
    prepared = LRP().prepare(randomised("resnet20", 32), make_images(1, 32))
    with pytest.raises(ValueError, match=r"targets .*\(1,\).*\b2\b"):
        prepared(make_images(2, 32), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"targets .*torch\.float32"):
        prepared(make_images(1, 32), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"images .*\(3, 32, 32\)"):
        prepared(make_images(1, 32)[0], torch.tensor([1]))
    with pytest.raises(ValueError, match="10 classes"):
        prepared(make_images(1, 32), torch.tensor([10]))


def test_published_rap_is_the_same_on_plain_networks_and_diverges_with_negative_inputs(randomised) -> None:
    images, targets = make_images(2, 32), torch.tensor([0, 1])
    plain = randomised("vgg11_bn_cifar_x4", 32)
    ours, published = (RAP(flag).prepare(plain, images)(images, targets) for flag in (False, True))
    torch.testing.assert_close(ours.map, published.map)
    mobile = randomised("mobilenet_v2_cifar", 32)
    published = RAP(as_published=True).prepare(mobile, images)(images, targets)
    assert ((published.arrived / published.started).abs() > 100).all()


def test_the_register() -> None:
    assert {"gradcam", "lrp", "ebp", "rap", "ig", "centre"} <= set(method_names())
    assert create_method("gcam", layer="layer3") == GradCAM(layer="layer3")
    assert create_method("lrp", composite="epsilon-plus-flat").name == "lrp"
    with pytest.raises(ValueError, match=r"method='grad-cam'.* gradcam\?"):
        create_method("grad-cam")
    with pytest.raises(ValueError, match=r"'composit'.* composite\?"):
        create_method("lrp", composit="zplus")
    with pytest.raises(ValueError, match=r"composite='alpha'.*zplus"):
        LRP("alpha")
    with pytest.raises(ValueError, match=r"stop='here'.*last-pool"):
        EBP(stop="here")
    with pytest.raises(ValueError, match="steps=0"):
        IntegratedGradients(steps=0)


def test_a_network_that_cannot_be_copied_is_named() -> None:
    model = nn.Conv2d(3, 2, 1)
    model.kept = model.weight * 2  # a tensor with history
    with pytest.raises(TypeError, match="Conv2d"):
        frozen_copy(model)


# --- Grad-CAM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "size", "layer"),
    [
        ("resnet56", 32, "layer3"),
        (
            "vgg16_bn_cifar_x8",
            64,
            "features.42",
        ),  # the ReLU before the last pool, as the published program reads it
        ("vgg16_bn_cifar_x8", 32, "features.42"),
        ("torchvision/vgg11_bn", 64, "features.27"),
        ("mobilenet_v2_cifar", 32, "features"),
        ("torchvision/resnet18", 64, "layer4"),
        ("torchvision/densenet121", 64, "features"),
        ("torchvision/squeezenet1_1", 64, "classifier.2"),
        ("timm/convnext_atto", 64, "stages"),
    ],
)
def test_the_layer_is_found_by_structure(arch: str, size: int, layer: str) -> None:
    model = create_model(arch, num_classes=10).eval()
    assert find_layer(model, make_images(1, size)) == layer


def test_gradcam_equals_captums() -> None:
    captum = pytest.importorskip("captum.attr")
    images, targets = make_images(3, 64), torch.tensor([0, 4, 7])
    for arch, layer in (("torchvision/resnet18", "layer4"), ("torchvision/densenet121", "features.norm5")):
        torch.manual_seed(0)
        model = randomise(create_model(arch, num_classes=10), images)
        expected = captum.LayerGradCam(model, model.get_submodule(layer)).attribute(images, targets)
        expected = F.interpolate(expected.relu(), size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
        found = GradCAM(layer).prepare(model, images)(images, targets).map
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)


def test_gradcam_is_right_where_an_in_place_relu_follows() -> None:
    def network(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 4),
        )

    images, targets = make_images(3, 8), torch.tensor([0, 1, 2])
    maps = [GradCAM("1").prepare(network(flag).eval(), images)(images, targets).map for flag in (True, False)]
    torch.testing.assert_close(maps[0], maps[1])
    # by hand: A before the ReLU, the mean gradient that of the active pixels
    model = network(False).eval()
    with torch.no_grad():
        features = model[1](model[0](images))
    weight = model[5].weight[targets]  # (3, 5)
    gradient = weight[:, :, None, None] / 36 * (features > 0)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    expected = F.interpolate(expected[:, None], size=(8, 8), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(maps[0], expected.detach())


def test_gradcam_can_be_differentiated_through(randomised) -> None:
    model = randomised("resnet20", 32).double()
    images, targets = make_images(2, 32).double(), torch.tensor([1, 2])
    maps, logits = class_activation(model, "layer3", images, targets, create_graph=True)
    assert logits.requires_grad
    weight = model.layer3[2].conv2.weight
    (gradient,) = torch.autograd.grad(maps.pow(2).sum(), weight)
    step, index = 1e-5, (3, 2, 1, 1)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[index] += sign * step
        values.append(class_activation(model, "layer3", images, targets)[0].pow(2).sum())
        with torch.no_grad():
            weight[index] -= sign * step
    slope = float(values[0] - values[1]) / (2 * step)
    assert float(gradient[index]) == pytest.approx(slope, rel=1e-4)
    assert weight.grad is None


def test_gradcam_names_layers_that_do_not_do(randomised) -> None:
    model, images = randomised("resnet20", 32), make_images(1, 32)
    with pytest.raises(ValueError, match=r"'layer33'.* layer3\?"):
        GradCAM("layer33").prepare(model, images)
    with pytest.raises(ValueError, match=r"'fc'.*\(1, 10\)"):
        GradCAM("fc").prepare(model, images)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            self.unused(images)
            return self.fc(self.conv(self.conv(images)).mean((2, 3)))

    with pytest.raises(ValueError, match=r"'conv'.* 2 "):
        GradCAM("conv").prepare(Twice(), images)
    with pytest.raises(UnsupportedOperatorError, match="'unused'"):
        GradCAM("unused").prepare(Twice(), images)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(UnsupportedOperatorError):
        GradCAM().prepare(flat, make_images(1, 4))


# --- Integrated gradients, and the others against libraries -------------------------------------------------------


def test_integrated_gradients_are_complete_and_equal_captums(randomised) -> None:
    captum = pytest.importorskip("captum.attr")
    model = randomised("vgg11_bn_cifar_x8", 32).double()
    images, targets = make_images(2, 32).double(), torch.tensor([1, 2])
    found = IntegratedGradients(steps=12).prepare(model, images)(images, targets)
    expected = captum.IntegratedGradients(model).attribute(
        images, 0.0, target=targets, n_steps=12, method="gausslegendre"
    )
    torch.testing.assert_close(found.map, expected.sum(1).detach().float(), rtol=1e-4, atol=1e-6)
    fine = IntegratedGradients(steps=400).prepare(model, images)(images, targets)
    torch.testing.assert_close(fine.arrived, fine.started, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("arch", ["vgg11_bn_cifar_x4", "torchvision/resnet18"])
def test_lrp_reproduces_zennits_rules(arch: str) -> None:
    """zennit's rules on its own canonised network, biases without relevance; an independent implementation."""
    zennit = pytest.importorskip("zennit")
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer

    assert zennit is not None
    images = make_images(2, 32)
    torch.manual_seed(0)
    model = randomise(create_model(arch, num_classes=10), images)
    canonizers = [ResNetCanonizer()] if "resnet" in arch else [SequentialMergeBatchNorm()]
    composite = EpsilonPlusFlat(canonizers=canonizers, zero_params="bias")
    targets = torch.tensor([1, 2])
    reference = copy.deepcopy(model)
    x = images.clone().requires_grad_()
    with composite.context(reference) as changed:
        logits = changed(x)
        start = F.one_hot(targets, 10) * logits.detach()
        (expected,) = torch.autograd.grad(logits, x, start)
    found = LRP("epsilon-plus-flat").prepare(model, images)(images, targets)
    expected = expected.sum(1)
    assert (found.map - expected).abs().max() <= 2e-3 * expected.abs().max()


class ReluTwice(nn.Module):
    """The last map is the output of a module that runs twice, as torchvision's blocks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.second(self.relu(self.first(images))))
        return self.head(x.mean((2, 3)))


def test_grad_cam_finds_a_layer_that_it_can_use() -> None:
    prepared = GradCAM().prepare(ReluTwice().eval(), make_images(2, 16))
    assert prepared.layer == "second"
    assert prepared(make_images(2, 16), torch.tensor([0, 2])).map.shape == (2, 16, 16)


def test_published_rules_lose_what_units_without_contributions_have() -> None:
    """Two units, the second active by its bias alone: z+ loses its relevance, ours gives it to what it sees."""
    layer = nn.Conv2d(2, 2, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.ReLU(), layer, nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        layer.weight[1] *= -1
        layer.bias[1] = 100.0
    images, targets = make_images(1, 2).abs(), torch.tensor([0])
    for method in (LRP(), LRP(as_published=True)):
        result = method.prepare(model, images)(images, targets)
        share = float(result.arrived / result.started)
        assert (share < 0.9) == method.as_published
        assert method.as_published or share == pytest.approx(1, abs=1e-4)


def test_published_excitation_takes_the_formula_whatever_the_signs() -> None:
    """x ⊙ w⁺ᵀ(P ⊘ w⁺x) on signed images, by hand; ours lets negative inputs count through negative weights."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)).double().eval()
    images = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, positive = images.flatten(), model[1].weight.detach()[1].clamp(min=0)
    expected = (x * positive / (positive @ x)).view(3, 2, 2).sum(0).clamp(min=0)
    settings = {"stop": "input", "as_published": True}
    found = EBP(**settings).prepare(model, images)(images, torch.tensor([1])).map[0]
    torch.testing.assert_close(found, expected.float())
    ours = EBP(stop="input").prepare(model, images)(images, torch.tensor([1])).map[0]
    assert not torch.allclose(ours, expected.float())
