"""Structure as plain data: round trips of narrowed networks, and refusal of what does not fit."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from image_classification.models import (
    Structure,
    StructureError,
    build_from_structure,
    capture_structure,
    create_model,
    model_names,
)


def round_trip(model, factory=None):
    """Through JSON, into a new network with the same weights."""
    plain = json.loads(json.dumps(capture_structure(model, factory=factory).to_plain()))
    rebuilt = build_from_structure(Structure.from_plain(plain), factory=factory)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    return rebuilt


def assert_same_function(model, rebuilt, size):
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(images), model.eval()(images), rtol=0, atol=0)


def narrowed_resnet18(narrow, arch="resnet18"):
    model = create_model(arch, num_classes=6)
    block = model.layer2[0]
    narrow(50, [block.conv1, block.bn1], [block.conv2])
    return model


@pytest.mark.parametrize("arch", ["resnet18", "torchvision/resnet18"])
def test_narrowed_resnet(arch, narrow):
    model = narrowed_resnet18(narrow, arch)
    structure = capture_structure(model)
    assert structure.attributes == {
        "layer2.0.conv1": {"out_channels": 50},
        "layer2.0.bn1": {"num_features": 50},
        "layer2.0.conv2": {"in_channels": 50},
    }
    assert_same_function(model, round_trip(model), 40)


def test_narrowed_groups(narrow):
    model = create_model("resnext50_32x4d", num_classes=4)
    block = model.layer1[0]
    narrow(64, [block.conv1, block.bn1, block.conv2, block.bn2], [block.conv3])
    block.conv2.in_channels = 64
    with pytest.raises(StructureError, match=r"'layer1\.0\.conv2' \(Conv2d\)"):
        capture_structure(model)
    block.conv2.groups = 16
    assert_same_function(model, round_trip(model), 33)


@pytest.mark.parametrize("arch", model_names())
def test_unpruned_networks_have_no_changes(arch):
    with torch.device("meta"):
        model = create_model(arch, num_classes=3)
    structure = capture_structure(model)
    assert structure.attributes == {}
    rebuilt = build_from_structure(Structure.from_plain(structure.to_plain()), device="meta")
    assert capture_structure(rebuilt) == structure


def test_narrowed_depthwise_and_zero_padded(narrow):
    model = create_model("mobilenet_v2_cifar", num_classes=4)
    conv = model.features[2].conv
    narrow(60, [conv[0][0], conv[0][1], conv[1][0], conv[1][1]], [conv[2]])
    conv[1][0].in_channels = conv[1][0].groups = 60
    assert_same_function(model, round_trip(model), 32)

    model = create_model("resnet20", num_classes=4)
    narrow(
        24,
        [m for b in model.layer2 for m in (b.conv2, b.bn2)],
        [model.layer2[1].conv1, model.layer2[2].conv1],
    )
    model.layer2[0].downsample.pad_back = 0
    narrow(24, [], [model.layer3[0].conv1])
    model.layer3[0].downsample.pad_back = 24
    with pytest.raises(StructureError, match=r"layer3\.0\.downsample.*pad_back"):
        capture_structure(model)
    model.layer3[0].downsample.pad_front, model.layer3[0].downsample.pad_back = 16, 8
    narrow(
        48,
        [m for b in model.layer3 for m in (b.conv2, b.bn2)],
        [b.conv1 for b in model.layer3[1:]] + [model.fc],
    )
    assert_same_function(model, round_trip(model), 32)


@pytest.mark.parametrize("arch", ["timm/convnextv2_atto", "timm/vit_tiny_patch16_224"])
def test_narrowed_timm(arch, narrow):
    pytest.importorskip("timm")
    model = create_model(arch, num_classes=3)
    for name, module in model.named_modules():
        if name.endswith("0.mlp"):
            kept = module.fc1.weight.shape[0] // 3
            narrow(kept, [module.fc1], [module.fc2])
            if hasattr(getattr(module, "grn", None), "weight"):
                narrow(kept, [module.grn], [])
    assert_same_function(model, round_trip(model), 224)


def test_a_buffer_outside_the_state_dict_is_restored_or_refused():
    class Blur(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.ones(4, 1, 3, 3) / 9, persistent=False)
            self.register_buffer("ramp", torch.arange(4.0), persistent=False)

    model = Blur()
    model.kernel = model.kernel[[1, 3]]
    model.ramp = model.ramp[[1, 3]]
    structure = capture_structure(model, factory=Blur)
    rebuilt = build_from_structure(Structure.from_plain(structure.to_plain()), factory=Blur)
    torch.testing.assert_close(rebuilt.kernel, model.kernel)
    torch.testing.assert_close(rebuilt.ramp, torch.tensor([1.0, 3.0]))
    for forged in ([[3, 1]], [[1, 4]], [[1, 2, 3]], [[-1, 3]], [], [[1, 3], [0]]):
        with pytest.raises(StructureError, match="'ramp' does not fit"):
            build_from_structure(dataclasses.replace(structure, kept={"ramp": forged}), factory=Blur)
    for garbage in ([], {"ramp": 3}, {"ramp": [["1"]]}, {3: [[1]]}):
        with pytest.raises(StructureError, match="kept"):
            Structure.from_plain(structure.to_plain() | {"kept": garbage})
    model.ramp = torch.tensor([1.0, 2.5])
    with pytest.raises(StructureError, match=r"'ramp'.*persistent=True"):
        capture_structure(model, factory=Blur)


def test_a_table_with_nan_is_a_part_of_itself():
    class Gaps(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("ramp", torch.tensor([0.0, torch.nan, 2.0, torch.nan]), persistent=False)

    model = Gaps()
    model.ramp = model.ramp[[1, 2]]
    rebuilt = build_from_structure(capture_structure(model, factory=Gaps), factory=Gaps)
    torch.testing.assert_close(rebuilt.ramp, model.ramp, equal_nan=True)


class Positions(nn.Module):
    """A table of positions and channels, made longer on demand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", self.made(4), persistent=False)

    def made(self, length):
        return torch.arange(float(length))[:, None] * torch.tensor([1.0, 10.0, 100.0])


def test_a_table_that_has_grown_and_was_cut_is_restored():
    """It grew along positions, and lost a channel: a network of its own length with its own channels is built."""
    model = Positions()
    model.table = model.made(9)[:, [0, 2]]
    rebuilt = build_from_structure(capture_structure(model, factory=Positions), factory=Positions)
    torch.testing.assert_close(rebuilt.table, model.table[:4])


def test_what_no_file_holds_and_a_factory_makes_otherwise_is_told(caplog):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("noise", torch.randn(3), persistent=False)
            self.register_buffer("ramp", torch.arange(3.0), persistent=False)
            self.register_buffer("saved", torch.randn(3))

    with caplog.at_level("WARNING"):
        capture_structure(Random(), factory=Random)
    assert "noise" in caplog.text
    assert "persistent=True" in caplog.text
    assert "ramp" not in caplog.text
    assert "saved" not in caplog.text


class Tied(nn.Module):
    """Integers that a forward uses, a shared weight, a frozen and a marked parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.split = 4, (8, 8)
        self.expand = nn.Sequential(nn.Linear(3, 16, bias=False))
        self.tied = nn.ModuleList([nn.Linear(3, 16, bias=False)])
        self.tied[0].weight = self.expand[0].weight
        self.tied[0].weight.owner = "ours"
        self.scale = nn.Parameter(torch.ones(16), requires_grad=False)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        left, right = (self.expand(x) * self.scale + self.tied[0](x)).split(self.split, dim=1)
        return self.out((left * right).view(len(x), self.heads, -1).flatten(1))


def test_users_own_class_with_shared_and_frozen_parameters():
    model = Tied()
    model.expand[0].weight.data = model.expand[0].weight.data[:12].clone()
    model.expand[0].out_features = model.tied[0].out_features = 12
    model.scale.data, model.heads, model.split = model.scale.data[:12].clone(), 3, (6, 6)
    model.out.weight.data, model.out.in_features = model.out.weight.data[:, :6].clone(), 6
    rebuilt = round_trip(model, Tied)
    assert rebuilt.expand[0].weight is rebuilt.tied[0].weight
    assert rebuilt.tied[0].weight.owner == "ours"
    assert not rebuilt.scale.requires_grad
    assert rebuilt.expand[0].weight.requires_grad
    assert rebuilt.split == (6, 6)
    assert isinstance(rebuilt.split, tuple)
    x = torch.randn(5, 3)
    torch.testing.assert_close(rebuilt(x), model(x), rtol=0, atol=0)
    structure = capture_structure(model, factory=Tied)
    assert structure.arch is None
    with pytest.raises(StructureError, match="factory"):
        build_from_structure(structure)
    with pytest.raises(StructureError, match="create_model"):
        capture_structure(model)
    torn = copy.deepcopy(structure)
    torn.shapes["tied.0.weight"] = [11, 3]
    with pytest.raises(StructureError, match=r"'tied\.0\.weight'.*'expand\.0\.weight'"):
        build_from_structure(torn, factory=Tied)


def test_rebuilding_keeps_the_random_state_of_capture_and_wrappers_do_not_matter(narrow):
    model = narrowed_resnet18(narrow)
    plain = capture_structure(model).to_plain()
    state = torch.get_rng_state()
    assert capture_structure(nn.DataParallel(model)).to_plain() == plain
    assert capture_structure(torch.compile(model)).to_plain() == plain
    assert capture_structure(create_model("torchvision/regnet_x_400mf")).attributes == {}
    assert capture_structure(copy.deepcopy(model)).to_plain() == plain
    torch.manual_seed(3)
    before = torch.get_rng_state()
    capture_structure(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(before, state)


def test_narrow_widths_and_options_are_part_of_a_structure():
    model = create_model("resnet20", num_classes=3, shortcut="B", widths={"layer1.0.conv1": 5})
    structure = capture_structure(model)
    assert structure.options == {"shortcut": "B", "widths": {"layer1.0.conv1": 5}}
    assert structure.attributes == {}
    assert_same_function(model, round_trip(model), 32)


def test_another_number_of_classes(narrow):
    model = narrowed_resnet18(narrow)
    keep = 300
    for module in (model.layer4[0].conv2, model.layer4[0].bn2, model.layer4[1].conv2, model.layer4[1].bn2):
        narrow(keep, [module], [])
    narrow(keep, list(model.layer4[0].downsample), [model.layer4[1].conv1, model.fc])
    changed = build_from_structure(capture_structure(model).with_num_classes(11))
    assert list(changed.fc.weight.shape) == [11, keep]
    assert (changed.fc.in_features, changed.fc.out_features) == (keep, 11)
    assert changed.layer2[0].conv1.out_channels == 50
    assert changed.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 11)


def test_options_that_are_not_plain_data_are_refused():
    model = create_model("torchvision/resnet18", norm_layer=nn.BatchNorm2d)
    with pytest.raises(StructureError, match="norm_layer"):
        capture_structure(model)


def test_a_changed_module_is_named():
    model = create_model("resnet20")
    model.layer2[1].relu1 = nn.Identity()
    with pytest.raises(StructureError, match=r"'layer2\.1\.relu1'"):
        capture_structure(model)
    model = create_model("resnet20")
    model.extra = nn.ReLU()
    with pytest.raises(StructureError, match="'extra'"):
        capture_structure(model)
    model = create_model("resnet20")
    model.layer1[0].conv1.weight.data = model.layer1[0].conv1.weight.data[:9].clone()
    with pytest.raises(StructureError, match=r"'layer1\.0\.conv1' \(Conv2d\)"):
        capture_structure(model)


HOSTILE = {
    "larger tensor": (
        lambda p: p["shapes"].update({"layer2.0.conv1.weight": [10**9, 3, 3, 3]}),
        r"layer2\.0\.conv1",
    ),
    "zero width": (
        lambda p: p["shapes"].update({"layer2.0.conv1.weight": [0, 16, 3, 3]}),
        r"layer2\.0\.conv1",
    ),
    "fewer dimensions": (lambda p: p["shapes"].update({"fc.weight": [10]}), "'fc'"),
    "unknown tensor": (lambda p: p["shapes"].update({"fc.evil": [1]}), r"fc\.evil"),
    "missing tensor": (lambda p: p["shapes"].pop("layer3.2.bn1.bias"), r"layer3\.2\.bn1"),
    "unknown module": (lambda p: p["attributes"].update({"no.such": {"x": 1}}), r"no\.such"),
    "unknown attribute": (lambda p: p["attributes"].update({"conv1": {"evil": 1}}), "evil"),
    "dunder": (lambda p: p["attributes"].update({"conv1": {"__class__": 1}}), "__class__"),
    "growing attribute": (lambda p: p["attributes"].update({"conv1": {"out_channels": 99}}), "out_channels"),
    "negative attribute": (lambda p: p["attributes"].update({"conv1": {"groups": -1}}), "groups"),
    "zero groups": (lambda p: p["attributes"].update({"conv1": {"groups": 0}}), "groups"),
    "list for a number": (lambda p: p["attributes"].update({"conv1": {"groups": [1]}}), "groups"),
    "other length": (lambda p: p["attributes"].update({"conv1": {"stride": [1, 1, 1]}}), "stride"),
    "attribute without tensor": (
        lambda p: p["attributes"].update({"fc": {"in_features": 3}}),
        r"'fc' \(Linear\)",
    ),
    "string attribute": (lambda p: p["attributes"].update({"conv1": {"groups": "1"}}), "groups"),
    "bool attribute": (lambda p: p["attributes"].update({"conv1": {"groups": True}}), "groups"),
    "absurd classes": (lambda p: p.update(num_classes=10**12), "num_classes"),
    "absurd option": (lambda p: p["options"].update(widths={"conv1": 10**12}), "options"),
    "option of a wrong type": (lambda p: p["options"].update(widths=[3]), "widths"),
    "unknown arch": (lambda p: p.update(arch="os.system"), "os.system"),
    "arch of a wrong type": (lambda p: p.update(arch=3), "arch"),
    "download": (lambda p: p.update(arch="torchvision/resnet18", options={"weights": "DEFAULT"}), "weights"),
    "missing key": (lambda p: p.pop("shapes"), "keys"),
    "more keys": (lambda p: p.update(code="import os"), "keys"),
    "shapes no table": (lambda p: p.update(shapes=[1]), "shapes"),
    "shape no list": (lambda p: p["shapes"].update({"fc.weight": 3}), r"fc\.weight"),
    "module name no string": (lambda p: p["attributes"].update({3: {}}), "3"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_structures_are_refused(case):
    change, words = HOSTILE[case]
    plain = capture_structure(create_model("resnet20", num_classes=10)).to_plain()
    change(plain)
    with pytest.raises(ValueError, match=words):
        build_from_structure(Structure.from_plain(plain))


@pytest.mark.parametrize("garbage", [None, [], "resnet50", 3, {}, {"arch": "resnet50"}])
def test_garbage_is_refused_as_a_structure(garbage):
    with pytest.raises(StructureError):
        Structure.from_plain(garbage)


def test_meta_and_dtype(narrow):
    structure = capture_structure(narrowed_resnet18(narrow))
    model = build_from_structure(structure, device="meta")
    assert model.conv1.weight.is_meta
    assert model.layer2[0].conv1.weight.shape[0] == 50
