"""Our own networks against published sizes and against torchvision's, and what `create_model` promises."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from image_classification.models import (
    ArchInfo,
    ModelError,
    arch_info,
    build_from_structure,
    capture_structure,
    create_model,
    identity_of,
    model_names,
    registry,
    unwrap,
)
from image_classification.models.layers import PooledShortcut, ZeroPadShortcut

# Parameters in millions and GMACs at the architecture's size: torchvision's documentation for ImageNet;
# He et al. 2015 (table 6) for CIFAR ResNets; timm for resnext101_32x4d.
PUBLISHED = {
    "resnet18": (11.690, 1.814),
    "resnet34": (21.798, 3.664),
    "resnet50": (25.557, 4.089),
    "resnet101": (44.549, 7.801),
    "resnet152": (60.193, 11.514),
    "resnext50_32x4d": (25.029, 4.230),
    "resnext101_32x4d": (44.178, 7.98),
    "resnext101_32x8d": (88.791, 16.414),
    "vgg11_bn": (132.869, 7.609),
    "vgg13_bn": (133.054, 11.308),
    "vgg16_bn": (138.366, 15.470),
    "vgg19_bn": (143.678, 19.632),
    "mobilenet_v2": (3.505, 0.301),
}
CIFAR_PUBLISHED = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}
SAME_AS_TORCHVISION = sorted(set(PUBLISHED) - {"resnext101_32x4d"})


def on_meta(arch: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return create_model(arch, **kwargs)


@pytest.mark.parametrize("arch", PUBLISHED)
def test_imagenet_sizes_are_the_published_ones(arch, measure):
    num_parameters, macs = measure(on_meta(arch), 224)
    assert num_parameters / 1e6 == pytest.approx(PUBLISHED[arch][0], abs=6e-4)
    assert macs / 1e9 == pytest.approx(PUBLISHED[arch][1], rel=4e-3)


@pytest.mark.parametrize("arch", CIFAR_PUBLISHED)
def test_cifar_resnet_sizes(arch, measure):
    num_parameters, macs = measure(on_meta(arch, num_classes=10), 32)
    assert num_parameters / 1e6 == pytest.approx(CIFAR_PUBLISHED[arch], rel=0.02)
    if arch == "resnet56":
        assert macs / 1e6 == pytest.approx(125.5, abs=0.5)
    with_projection, _ = measure(on_meta(f"{arch}_b", num_classes=10), 32)
    assert with_projection - num_parameters == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def test_cifar_variants_of_other_families(measure):
    num_parameters, macs = measure(on_meta("vgg16_bn_cifar", num_classes=10), 32)
    assert num_parameters == 14_728_266
    assert macs / 1e6 == pytest.approx(313.2, abs=0.2)
    num_parameters, macs = measure(on_meta("mobilenet_v2_cifar", num_classes=10), 32)
    assert num_parameters == 2_236_682
    assert macs / 1e6 == pytest.approx(87.976, abs=1e-3)


@pytest.mark.parametrize("arch", SAME_AS_TORCHVISION)
def test_names_and_shapes_are_torchvisions(arch):
    ours = {name: tensor.shape for name, tensor in on_meta(arch).state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in on_meta(f"torchvision/{arch}").state_dict().items()}
    assert ours == theirs
    assert list(ours) == list(theirs)


def assert_same_logits(arch, randomise_bn, size):
    reference = randomise_bn(torchvision.models.get_model(arch, weights=None)).eval()
    model = create_model(arch).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2"])
def test_logits_are_torchvisions_given_its_weights(arch, randomise_bn):
    assert_same_logits(arch, randomise_bn, size=65)


@pytest.mark.slow
def test_vgg_logits_are_torchvisions_given_its_weights(randomise_bn):
    assert_same_logits("vgg16_bn", randomise_bn, size=96)


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_narrow_vggs_divide_all_widths(divisor):
    wide = on_meta("vgg16_bn", num_classes=20).state_dict()
    for name, tensor in on_meta(f"vgg16_bn_x{divisor}", num_classes=20).state_dict().items():
        shape = list(wide[name].shape)
        for dim, size in enumerate(shape):
            tied = (name == "features.0.weight" and dim == 1) or size in (3, 20)
            shape[dim] = size if tied else size // divisor
        assert list(tensor.shape) == shape, name


def test_voc_layout_has_the_published_names():
    state = on_meta("vgg16_bn_voc_x8", num_classes=20).state_dict()
    convolutions = [name for name, tensor in state.items() if tensor.dim() == 4]
    assert convolutions == [f"features.{n}.weight" for n in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)]
    assert [name for name in state if name.startswith("classifier")] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    assert list(state["classifier.1.weight"].shape) == [20, 3136]
    assert list(on_meta("vgg16_bn_voc", num_classes=20).classifier[1].weight.shape) == [20, 25088]
    assert arch_info("vgg16_bn_voc").image_size == 227


@pytest.mark.parametrize(
    "arch",
    [
        "resnet18",
        "resnet20",
        "resnet20_b",
        "resnet20_isp",
        "vgg11_bn_cifar_x8",
        "mobilenet_v2_cifar",
        "mobilenet_v2_cifar_isp",
    ],
)
@pytest.mark.parametrize("size", [32, 47])
def test_any_image_size_forwards_and_trains(arch, size):
    torch.manual_seed(0)
    model = create_model(arch, num_classes=5)
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arch", model_names())
def test_every_operation_is_a_module_of_its_own(arch):
    """Each leaf module is called exactly once, and none works in place."""
    model = on_meta(arch, num_classes=3).eval()
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            assert not getattr(module, "inplace", False), name
            module.register_forward_hook(
                lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
            )
    size = arch_info(arch).image_size
    model(torch.empty(1, 3, size, size, device="meta"))
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    assert calls == dict.fromkeys(leaves, 1)


def test_zero_padded_shortcut():
    module = ZeroPadShortcut(4, 10, stride=2)
    images = torch.randn(2, 4, 5, 5, requires_grad=True)
    output = module(images)
    assert output.shape == (2, 10, 3, 3)
    expected = torch.zeros(2, 10, 3, 3)
    expected[:, 3:7] = images.detach()[:, :, ::2, ::2]
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.sum().backward()
    assert images.grad.sum() == 2 * 4 * 9
    assert not list(module.state_dict())


def test_pooled_shortcut():
    images = torch.randn(2, 4, 5, 6)
    output = PooledShortcut(4, 10)(images)
    assert output.shape == (2, 10, 3, 3)
    assert not output[:, 4:].any()
    torch.testing.assert_close(output[:, :4, 0, 1], images[:, :, :2, 2:4].mean((2, 3)))
    torch.testing.assert_close(output[:, :4, 2, 1], images[:, :, 4, 2:4].mean(2))


def test_shortcut_as_option_equals_the_name():
    by_option = on_meta("resnet20", shortcut="B").state_dict()
    assert list(by_option) == list(on_meta("resnet20_b").state_dict())
    with pytest.raises(ModelError, match="shortcut='C'"):
        on_meta("resnet20", shortcut="C")


def test_hyphenated_names_of_the_field():
    assert list(on_meta("resnext101-32x4d").state_dict()) == list(on_meta("resnext101_32x4d").state_dict())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"arch": "resnet5O"}, r"arch='resnet5O'.*resnet50.*\?"),
        ({"arch": "convolve"}, "arch='convolve'.*vgg16_bn"),
        ({"arch": "densenet121"}, "torchvision/densenet121"),
        ({"arch": "resnet50d"}, "timm/resnet50d"),
        ({"arch": "resnet20", "shortcutt": "A"}, r"'shortcutt'.* shortcut\?"),
        ({"arch": "resnet20", "num_classes": 0}, "num_classes=0"),
        ({"arch": "vgg16_bn", "image_size": 16}, "image_size=16"),
        ({"arch": "resnet20", "image_size": -1}, "image_size=-1"),
    ],
)
def test_impossible_networks_are_refused(kwargs, words):
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=words):
        create_model(**kwargs)


def test_a_model_remembers_its_making():
    model = create_model("resnet20", num_classes=7, model_config="fanin", image_size=40, shortcut="B")
    before = list(model.state_dict())
    for seen in (
        model,
        copy.deepcopy(model),
        nn.DataParallel(model),
        torch.optim.swa_utils.AveragedModel(model),
    ):
        identity = identity_of(seen)
        assert (identity.arch, identity.model_config, identity.num_classes) == ("resnet20", "fanin", 7)
        assert (identity.image_size, identity.options) == (40, {"shortcut": "B"})
    assert list(identity.build().state_dict()) == before
    assert identity_of(nn.Linear(1, 1)) is None
    assert unwrap(torch.compile(model)) is model


def test_a_new_architecture_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))

    @registry.register("toy", ArchInfo(8, 8), options=("width",))
    def build(num_classes, model_config, width=4):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.Linear(width, num_classes))

    assert "toy" in model_names()
    assert arch_info("toy").image_size == 8
    model = create_model("toy", num_classes=3, width=5)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    model[1].weight.data, model[1].bias.data = (
        model[1].weight.data[:2].clone(),
        model[1].bias.data[:2].clone(),
    )
    model[2].weight.data = model[2].weight.data[:, :2].clone()
    model[1].out_features = model[2].in_features = 2
    assert build_from_structure(capture_structure(model))[2].in_features == 2
