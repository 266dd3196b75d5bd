"""Classifiers of torchvision and timm by name."""

import sys

import pytest
import torch

from image_classification.models import (
    ModelError,
    arch_info,
    create_model,
    head_tensors,
    identity_of,
    main_and_auxiliary_logits,
)


def needs_timm():
    pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize(
    "arch",
    [
        "torchvision/shufflenet_v2_x0_5",
        "torchvision/squeezenet1_1",
        "torchvision/regnet_x_400mf",
        "timm/resnet10t",
    ],
)
def test_builds_with_the_asked_number_of_classes(arch):
    if arch.startswith("timm"):
        needs_timm()
    model = create_model(arch, num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert identity_of(model).arch == arch


@pytest.mark.parametrize("arch", ["torchvision/googlenet", "torchvision/inception_v3"])
def test_auxiliary_heads_are_kept(arch):
    with torch.device("meta"):
        model = create_model(arch, num_classes=5)
        output = model(torch.empty(2, 3, 299, 299))
        logits, auxiliary = main_and_auxiliary_logits(output)
        assert logits.shape == (2, 5)
        assert [aux.shape for aux in auxiliary] == [(2, 5)] * (2 if "googlenet" in arch else 1)
        assert main_and_auxiliary_logits(model.eval()(torch.empty(2, 3, 299, 299)))[1] == ()
    assert model.transform_input
    assert len(head_tensors(model)) == 2 * (1 + len(auxiliary))
    with pytest.raises(TypeError, match="logits"):
        main_and_auxiliary_logits({"out": logits})


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("torchvision/vit_b_32", 64),
        ("torchvision/maxvit_t", 448),
        ("torchvision/swin_t", 64),
        ("timm/vit_tiny_patch16_224", 64),
        ("timm/resnet10t", 64),
    ],
)
def test_image_size_is_passed_where_it_matters(arch, size):
    if arch.startswith("timm"):
        needs_timm()
    with torch.device("meta"):
        model = create_model(arch, num_classes=3, image_size=size).eval()
        assert model(torch.empty(1, 3, size, size)).shape == (1, 3)


def test_arch_info():
    assert arch_info("resnet50").image_size == 224
    assert arch_info("resnet20").image_size == 32
    assert arch_info("torchvision/inception_v3").image_size == 299
    assert arch_info("torchvision/efficientnet_b0").mean == (0.485, 0.456, 0.406)
    assert arch_info("torchvision/vit_b_16").fixed_size
    assert not arch_info("torchvision/resnet50").fixed_size
    needs_timm()
    info = arch_info("timm/xception41")
    assert (info.image_size, info.resize, info.mean) == (299, 331, (0.5, 0.5, 0.5))
    assert arch_info("timm/swin_tiny_patch4_window7_224").fixed_size


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("torchvision/resnet5O", {}, r" resnet50\b.*\?"),
        ("torchvision/fcn_resnet50", {}, "arch='torchvision/fcn_resnet50'"),
        ("timm/resnet5Od", {}, r" resnet50d\b.*\?"),
        ("timm/hf-hub:someone/model", {}, "arch='timm/hf-hub:someone/model'"),
        ("timm/resnet50.no_such_tag", {}, "no_such_tag"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, "weights='DEFAULT'"),
        ("timm/resnet10t", {"pretrained": True}, "pretrained=True"),
        ("timm/resnet10t", {"checkpoint_path": "x.pth"}, "checkpoint_path='x.pth'"),
        ("torchvision/resnet18", {"no_such": 1}, "no_such"),
        ("torchvision/vit_b_16", {"image_size": 225}, "224"),
        ("torchvision/maxvit_t", {"image_size": 65}, "224"),
    ],
)
def test_impossible_networks_are_refused(arch, options, words):
    if arch.startswith("timm"):
        needs_timm()
    with pytest.raises(ModelError, match=words), torch.device("meta"):
        create_model(arch, **options)
    if not options:
        with pytest.raises(ModelError, match=words):
            arch_info(arch)


def test_options_reach_the_constructor():
    with torch.device("meta"):
        assert create_model("torchvision/resnet18", width_per_group=64).fc.in_features == 512
        assert create_model("torchvision/mobilenet_v2", width_mult=0.5).features[0][0].out_channels == 16


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for ask in (create_model, arch_info):
        with pytest.raises(ModelError, match=r"lucidprune\[timm\]"):
            ask("timm/resnet50")
    with pytest.raises(ModelError, match="torchvision/densenet121"):
        create_model("densenet121")
