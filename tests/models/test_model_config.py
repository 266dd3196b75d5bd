"""Each flag that chooses a network has its effect."""

import copy

import pytest
import torch

from image_classification.config import ConfigError, flag_fields
from image_classification.models import (
    ModelConfig,
    ModelError,
    build_from_structure,
    build_model,
    capture_structure,
    create_model,
    identity_of,
)


def test_every_field_is_a_flag_and_the_default_is_resnet50():
    spellings = {name for _, spec in flag_fields(ModelConfig) for name in spec.names}
    assert {"--arch", "-a", "--model-config", "-c", "--num-classes", "--pretrained-weights"} <= spellings
    assert len(flag_fields(ModelConfig)) == len(ModelConfig.__dataclass_fields__)
    assert ModelConfig().arch == "resnet50"


def test_arch_config_classes_options_and_image_size():
    config = ModelConfig(
        arch="resnet20", model_config="grp-fanin", num_classes=12, arch_option=["shortcut=B"]
    )
    model = build_model(config, num_classes=10, image_size=40)
    assert model.fc.out_features == 12
    assert not model.layer1[0].bn2.weight.any()
    assert model.layer2[0].downsample[0].out_channels == 32
    assert identity_of(model).image_size == 40
    assert build_model(ModelConfig(arch="resnet20"), num_classes=10).fc.out_features == 10
    assert build_model(ModelConfig(arch="resnet20"), num_classes=10, device="meta").fc.weight.is_meta


def test_pretrained_weights_ema_and_new_head(tmp_path):
    model, average = create_model("resnet20", num_classes=10), create_model("resnet20", num_classes=10)
    path = str(tmp_path / "c.pth")
    structure = capture_structure(model).to_plain()
    content = {"format": "lucidprune", "version": 1, "structure": structure, "state_dict": model.state_dict()}
    torch.save({**content, "ema": average.state_dict()}, path)

    def built(num_classes=10, **kwargs):
        return build_model(
            ModelConfig(arch="resnet20", pretrained_weights=path, **kwargs), num_classes=num_classes
        )

    assert torch.equal(built(pretrained_ema=False).fc.weight, model.fc.weight)
    for asked in (None, True):
        assert torch.equal(built(pretrained_ema=asked).fc.weight, average.fc.weight)
    with pytest.raises(ModelError, match="new_head"):
        built(num_classes=4)
    other = built(num_classes=4, new_head=True)
    assert other.fc.out_features == 4
    assert torch.equal(other.conv1.weight, average.conv1.weight)
    torch.save(copy.deepcopy(model).state_dict(), path)
    assert torch.equal(built(model_config="fanin").conv1.weight, model.conv1.weight)
    with pytest.raises(FileNotFoundError, match=r"c\.pthx"):
        build_model(ModelConfig(arch="resnet20", pretrained_weights=path + "x"), num_classes=10)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"arch": ""}, "--arch"),
        ({"model_config": "fan"}, "model_config='fan'"),
        ({"num_classes": 0}, "--num-classes 0"),
        ({"new_head": True}, "--new-head .* --pretrained-weights"),
        ({"pretrained_ema": False}, "--pretrained-ema"),
        ({"arch_option": ["shortcut"]}, "--arch-option 'shortcut'.*KEY=VALUE"),
        ({"arch_option": ["a=1", "a=2"]}, "--arch-option a "),
        ({"arch_option": ["a=[1"]}, r"--arch-option 'a=\[1'"),
    ],
)
def test_settings_that_cannot_apply(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**kwargs)


def test_fewer_classes_than_the_data_has():
    with pytest.raises(ConfigError, match="--num-classes 5"):
        build_model(ModelConfig(arch="resnet20", num_classes=5), num_classes=10)


@pytest.mark.parametrize("arch", ["resnet20", "torchvision/mobilenet_v3_small", "timm/test_efficientnet"])
def test_momentum_and_epsilon_of_batch_norms_travel_with_the_network(arch):
    """Batch norms of every architecture have them, and so has the network that a checkpoint's structure builds."""
    config = ModelConfig(arch=arch, bn_momentum=0.02, bn_eps=2e-3)
    model = build_model(config, num_classes=3)
    for network in (model, build_from_structure(capture_structure(model))):
        norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        assert {(norm.momentum, norm.eps) for norm in norms} == {(0.02, 2e-3)}


def test_networks_without_batch_norms_have_no_such_settings():
    with pytest.raises(ModelError, match=r"bn_eps=0.001"):
        build_model(ModelConfig(arch="torchvision/vgg11", bn_eps=1e-3), num_classes=3)
