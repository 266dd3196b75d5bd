"""Free widths of our own networks: built narrower, consistent, and contradictions named."""

import pytest
import torch

from image_classification.models import ModelError, create_model

NARROW = {
    "resnet18": {"conv1": 24, "layer1.0.conv1": 10, "layer2.0.conv2": 40, "layer4.1.conv1": 33},
    "resnet50": {"conv1": 48, "layer1.0.conv2": 17, "layer3.0.conv3": 500, "layer4.0.downsample.0": 777},
    "resnext50_32x4d": {"layer1.0.conv1": 64, "layer2.3.conv2": 96},
    "resnet20": {"conv1": 10, "layer1.2.conv1": 5, "layer2.0.conv2": 17, "layer3.0.conv2": 40},
    "resnet20_isp": {"conv1": 10, "layer2.0.conv2": 17, "layer3.0.conv2": 40},
    "resnet20_b": {"conv1": 10, "layer2.0.downsample.0": 9, "layer3.0.conv2": 5},
    "vgg11_bn": {"features.0": 7, "features.25": 11, "classifier.0": 31, "classifier.3": 15},
    "vgg11_bn_voc": {"features.25": 11},
    "vgg11_bn_cifar": {"features.25": 11},
    "mobilenet_v2": {
        "features.0.0": 16,
        "features.1.conv.1": 8,
        "features.3.conv.0.0": 50,
        "features.4.conv.2": 20,
        "features.18.0": 100,
    },
    "mobilenet_v2_cifar_isp": {
        "conv1": 20,
        "layers.0.conv1": 24,
        "layers.0.conv3": 18,
        "layers.1.shortcut.0": 22,
        "layers.6.conv3": 50,
        "layers.16.conv1": 700,
        "conv2": 100,
    },
}


@pytest.mark.parametrize("arch", NARROW)
def test_widths_are_built_and_run(arch):
    torch.manual_seed(0)
    model = create_model(arch, num_classes=4, widths=NARROW[arch])
    modules = dict(model.named_modules())
    for name, width in NARROW[arch].items():
        assert modules[name].weight.shape[0] == width, name
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_uncoupled_layers_keep_their_width_and_coupled_ones_follow():
    model = create_model("resnet20", widths={"conv1": 10})
    assert [block.conv2.out_channels for block in model.layer1] == [10, 10, 10]
    assert model.layer1[0].conv1.out_channels == 16
    assert model.layer2[0].conv2.out_channels == 32
    assert (model.layer2[0].downsample.pad_front, model.layer2[0].downsample.pad_back) == (11, 11)


@pytest.mark.parametrize(
    ("arch", "widths", "words"),
    [
        (
            "resnet18",
            {"conv1": 48, "layer1.1.conv2": 64},
            "'layer1.1.conv2' .* 'conv1'",
        ),
        (
            "resnet50",
            {"layer2.0.conv3": 99, "layer2.0.downsample.0": 98},
            "'layer2.0.downsample.0'",
        ),
        ("resnet50", {"layer2.0.conv9": 99}, "'layer2.0.conv9'"),
        ("resnet50", {"layer1.0.conv1": 0}, "'layer1.0.conv1'"),
        ("resnet50", {"layer1.0.conv1": True}, "'layer1.0.conv1'"),
        ("resnext50_32x4d", {"layer1.0.conv2": 100}, "'layer1.0.conv2'"),
        ("resnet20", {"layer2.0.conv2": 15}, "'layer2.0.conv2' .* 'conv1'"),
        ("mobilenet_v2", {"features.2.conv.1.0": 90}, "'features.2.conv.1.0'"),
        ("mobilenet_v2", {"features.3.conv.2": 23}, "'features.3.conv.2' .* 'features.2.conv.2'"),
        ("vgg16_bn_cifar", {"features.1": 3}, "'features.1'"),
        ("torchvision/resnet18", {"conv1": 3}, "arch='torchvision/resnet18'.*'widths'"),
    ],
)
def test_contradictions_name_the_module(arch, widths, words):
    with pytest.raises(ModelError, match=words), torch.device("meta"):
        create_model(arch, widths=widths)
