"""The statistics that each model configuration starts with."""

import math

import pytest
import torch
from torch import nn

from image_classification.models import ModelError, create_model
from image_classification.models.initialization import MODEL_CONFIGS


@pytest.mark.parametrize("config", [None, *MODEL_CONFIGS])
@pytest.mark.parametrize("arch", ["resnet50", "resnet56", "mobilenet_v2_cifar"])
def test_convolutions_and_batch_norms(arch, config):
    torch.manual_seed(0)
    model = create_model(arch, num_classes=10, model_config=config)
    fan_in = config in ("fanin", "grp-fanin")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            channels = module.weight.shape[1] if fan_in else module.weight.shape[0]
            expected = math.sqrt(2.0 / (channels * math.prod(module.kernel_size)))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(module.weight.mean().item()) < expected * 0.03, name
    zero = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()]
    blocks = {"resnet50": 16, "resnet56": 27, "mobilenet_v2_cifar": 10}[arch]
    assert len(zero) == (blocks if config in ("grp-fanin", "grp-fanout") else 0)
    last = {"resnet50": ".bn3", "resnet56": ".bn2", "mobilenet_v2_cifar": ".conv.3"}[arch]
    assert all(name.endswith(last) for name in zero)


def test_zeroed_blocks_pass_their_input():
    torch.manual_seed(0)
    block = create_model("resnet20", model_config="grp-fanout").layer1[1].eval()
    images = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(block(images), images, rtol=0, atol=0)


def test_vgg_starts_as_in_torchvision():
    torch.manual_seed(0)
    model = create_model("vgg11_bn_x8", num_classes=10)
    assert model.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.classifier[0].bias.any()
    assert not model.features[0].bias.any()


@pytest.mark.parametrize(
    ("arch", "config", "words"),
    [
        ("vgg16_bn_cifar_x8", "grp-fanin", "model_config='grp-fanin'.*classic"),
        ("resnet20", "fan-in", r"model_config='fan-in'.* fanin\?"),
        ("torchvision/resnet18", "fanin", "model_config='fanin'.*torchvision/resnet18"),
    ],
)
def test_a_configuration_that_cannot_apply_is_an_error(arch, config, words):
    with pytest.raises(ModelError, match=words):
        create_model(arch, model_config=config)
