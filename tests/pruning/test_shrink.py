"""Masked networks become smaller ones with the same outputs; what only looks dead stays."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.commands import status_of
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from image_classification.models import create_model, load_weights, model_for_weights
from pruning import ShrinkReport, load_pruned, save_pruned, shrink, trace_groups
from pruning.__main__ import main
from pruning.engine.groups import Place
from pruning.engine.named_tensors import named_tensors
from pruning.engine.operators.unknowns import NotFollowedError
from pruning.engine.proof.rehearsal import condition
from pruning.masked.constants import observed_constants
from pruning.masked.folding import Folding
from pruning.masked.shrinking import largest_difference

TOLERANCE = 1e-5


def make_images(size: int, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def assert_equal_outputs(before: nn.Module, after: nn.Module, *sizes: int) -> None:
    """In float64, since networks of random weights amplify rounding; on images that shrinking did not see."""
    before, after = copy.deepcopy(before).double().eval(), copy.deepcopy(after).double().eval()
    for size in sizes:
        images = make_images(size, seed=99).double() * 2
        with torch.no_grad():
            expected, got = before(images), after(images)
        assert expected.std() > 1e-3, "the comparison would see nothing"
        # Constants are computed and folded in float32.
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def conditioned(model: nn.Module, size: int) -> nn.Module:
    """Weights that tell channels apart, activations of a sensible scale."""
    torch.manual_seed(0)
    condition(model, (make_images(size),))
    return model.eval()


def mask_channels(model: nn.Module, size: int, share: float = 0.4) -> int:
    """Zero a share of every group's rows, with what follows along them (BN scale and shift); counts the units."""
    graph = trace_groups(model, make_images(size))
    rng, gone = np.random.default_rng(0), np.zeros(graph.num_units, dtype=bool)
    for group in graph.prunable:
        gone[rng.permutation(group.units)[: int(share * group.width)]] = True
    tensors = named_tensors(model)
    for axis in graph.axes:
        if axis.role != "in" and not axis.tensor.endswith(("running_mean", "running_var")):
            slices = np.flatnonzero((axis.units >= 0) & gone[np.maximum(axis.units, 0)])
            tensors[axis.tensor].data.index_fill_(axis.dim, torch.from_numpy(slices), 0)
    return int(gone.sum())


def shrunk(model: nn.Module, size: int) -> tuple[nn.Module, ShrinkReport]:
    smaller = copy.deepcopy(model)
    return smaller, shrink(smaller, make_images(size))


# -- the networks of the field ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("vgg16_bn_cifar", 32),
        ("mobilenet_v2_cifar", 32),
        ("torchvision/efficientnet_b0", 64),
        ("torchvision/densenet121", 64),
        ("resnet20", 32),
    ],
)
def test_masked_networks_become_small_and_stay_equal(tmp_path: Path, arch: str, size: int) -> None:
    model = conditioned(create_model(arch, num_classes=10), size)
    count = mask_channels(model, size)
    smaller, report = shrunk(model, size)
    assert report.num_removed == count
    assert report.kept == ()
    assert report.macs[1] < 0.5 * report.macs[0]
    assert report.num_parameters[1] < 0.5 * report.num_parameters[0]
    assert report.num_parameters[1] == sum(p.numel() for p in smaller.parameters())
    assert report.max_difference <= TOLERANCE
    assert_equal_outputs(model, smaller, size, size + 32)
    save_pruned(tmp_path / "small.pth", smaller)
    assert_equal_outputs(model, load_pruned(tmp_path / "small.pth"), size)


def zero_rows(model: nn.Module, layers: dict[str, str], rows: Tensor) -> None:
    """As the DI program masks: rows of convolutions, with scale and shift of their batch norms."""
    with torch.no_grad():
        for conv, norm in layers.items():
            model.get_submodule(conv).weight[rows] = 0
            model.get_submodule(norm).weight[rows] = 0
            model.get_submodule(norm).bias[rows] = 0


def test_masked_resnet50_with_its_shortcuts() -> None:
    """Inner layers lose every third channel; the stream of stage 2 every fifth, in all that write to it."""
    model = conditioned(create_model("resnet50", num_classes=10), 64)
    inner = {
        f"{n}.{c}": f"{n}.bn{c[-1]}"
        for n, b in model.named_modules()
        if hasattr(b, "conv3")
        for c in ("conv1", "conv2")
    }
    for conv, norm in inner.items():
        zero_rows(model, {conv: norm}, torch.arange(0, model.get_submodule(conv).out_channels, 3))
    stream = {f"layer2.{i}.conv3": f"layer2.{i}.bn3" for i in range(4)}
    zero_rows(model, {**stream, "layer2.0.downsample.0": "layer2.0.downsample.1"}, torch.arange(0, 512, 5))
    smaller, report = shrunk(model, 64)
    assert smaller.layer2[0].downsample[0].out_channels == 512 - 103
    assert smaller.layer3[0].downsample[0].in_channels == 512 - 103
    assert smaller.layer4[1].conv2.weight.shape[:2] == (341, 341)
    assert report.macs[1] < 0.6 * report.macs[0]
    assert report.kept == ()
    assert_equal_outputs(model, smaller, 64)


def test_one_producer_alone_keeps_a_coupled_channel() -> None:
    model = conditioned(create_model("resnet50", num_classes=10), 64)
    zero_rows(model, {"layer2.0.downsample.0": "layer2.0.downsample.1"}, torch.arange(10))
    smaller, report = shrunk(model, 64)
    assert not report.changed
    (kept,) = report.kept
    assert kept.count == 10
    assert "coupled with channels of layer2.0.conv3" in kept.reason
    assert "no channel is provably dead" in report.describe()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), smaller.parameters(), strict=True))


def test_rows_of_zeros_under_batch_norms_that_were_left() -> None:
    """Only the convolution's rows are zero: the batch norm makes a constant of them, dead where ReLU cuts it off."""
    model = conditioned(create_model("vgg16_bn_cifar", num_classes=10), 32)
    conv, norm = model.features[0], model.features[1]
    with torch.no_grad():
        conv.weight[:20] = 0
        conv.bias[:20] = 0
        norm.running_mean.zero_()
        norm.bias[:12], norm.bias[12:20] = -0.3, 0.2
    smaller, report = shrunk(model, 32)
    assert report.widths == {"features.0": (64, 52)}
    (kept,) = report.kept
    assert kept.count == 8
    assert "features.3 pads its input with zeros" in kept.reason
    assert_equal_outputs(model, smaller, 32, 48)


def test_vision_transformers_lose_what_no_layer_norm_sees() -> None:
    model = conditioned(create_model("timm/vit_tiny_patch16_224", num_classes=10, depth=2), 224)
    mask_channels(model, 224)
    smaller, report = shrunk(model, 224)
    assert smaller.blocks[1].mlp.fc1.out_features < 768
    assert smaller.embed_dim == 192
    assert smaller.patch_embed.proj.out_channels == 192
    assert any("statistics of" in kept.reason for kept in report.kept)
    assert_equal_outputs(model, smaller, 224)


# -- constants -------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Padded convolution, then 1×1 and linear layers with and without biases; what follows differs by test."""

    def __init__(self, bias: bool = False, activation: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 1, bias=bias), nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12, 9), nn.Linear(9, 5)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.activation(self.bn2(self.conv2(x)))
        return self.fc2(self.activation(self.fc1(x.mean((2, 3)))))


@pytest.mark.parametrize("activation", [F.relu, F.silu, torch.sigmoid, F.hardswish, F.relu6])
@pytest.mark.parametrize("bias", [False, True])
def test_constants_are_folded_where_that_is_exact(bias: bool, activation: Callable[[Tensor], Tensor]) -> None:
    model = conditioned(Chain(bias, activation), 8)
    with torch.no_grad():
        model.bn1.weight[:3], model.bn1.bias[:3] = 0, torch.tensor([0.7, 2.0, 9.0])
        model.bn2.weight[4:6], model.bn2.bias[4:6] = 0, 1.5
        model.fc1.weight[1:3] = 0
    smaller, report = shrunk(model, 8)
    assert {name: after for name, (_, after) in report.widths.items()} == {"conv1": 5, "conv2": 10, "fc1": 7}
    assert report.num_folded == 3
    assert "folded" in report.describe()
    assert_equal_outputs(model, smaller, 8, 24)


def test_a_sum_of_constants_is_one() -> None:
    class Sum(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.bn3 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.activation(self.bn1(self.conv1(x)) + self.bn3(self.side(x)))
            return self.fc2(self.fc1(self.bn2(self.conv2(x)).mean((2, 3))))

    model = conditioned(Sum(), 8)
    with torch.no_grad():
        for norm in (model.bn1, model.bn3):
            norm.weight[:3], norm.bias[:3] = 0, 0.4
        model.bn1.weight[3] = 0
    smaller, report = shrunk(model, 8)
    assert report.widths == {"conv1": (8, 5)}
    assert_equal_outputs(model, smaller, 8)


def test_offsets_travel_through_pooling_and_concatenation() -> None:
    """A dead channel of a dense block is a constant for the transition, whose offset the next block's norms take up."""
    model = conditioned(create_model("torchvision/densenet121", num_classes=10), 64)
    with torch.no_grad():
        model.features.denseblock1.denselayer3.conv2.weight[:5] = 0
    smaller, report = shrunk(model, 64)
    assert report.widths == {"features.denseblock1.denselayer3.conv2": (32, 27)}
    assert_equal_outputs(model, smaller, 64, 96)


def test_constants_stay_where_nothing_can_take_them_up() -> None:
    class Bare(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.conv2(x))  # neither bias nor batch norm
            return self.fc2(self.fc1(x.mean((2, 3))))

    model = conditioned(Bare(), 8)
    with torch.no_grad():
        model.conv1.weight[:3] = 0
        model.bn1.weight[:3], model.bn1.bias[:3] = 0, torch.tensor([0.7, 0.0, -0.7])
    _, report = shrunk(model, 8)
    assert report.widths == {"conv1": (8, 6)}
    (kept,) = report.kept
    assert "constant other than zero" in kept.reason
    assert "no bias" in kept.reason


# -- both directions -----------------------------------------------------------------------------------------


def test_what_nobody_reads_goes_through_the_whole_chain() -> None:
    """Zero columns of the last layer make channels dead, and these their own inputs."""
    model = conditioned(Chain(), 8)
    with torch.no_grad():
        model.fc2.weight[:, 3:] = 0  # six of nine hidden units
        model.fc1.weight[:3, 7:] = 0  # what is left reads 7 of 12
        model.conv2.weight[:7, 2:] = 0  # and these 2 of 8
    smaller, report = shrunk(model, 8)
    assert {name: after for name, (_, after) in report.widths.items()} == {"conv1": 2, "conv2": 7, "fc1": 3}
    assert_equal_outputs(model, smaller, 8)


def test_a_layer_keeps_one_channel() -> None:
    model = conditioned(Chain(), 8)
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.bn2.weight.zero_()
        model.bn2.bias.zero_()
        model.fc1.bias.copy_(torch.arange(9.0))
    images = make_images(8)
    before = model(images)
    smaller, report = shrunk(model, 8)
    assert report.widths["conv2"] == (12, 1)
    assert any("last channel" in kept.reason for kept in report.kept)
    torch.testing.assert_close(smaller(images), before, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_is_dead_on_the_examples_only_stays() -> None:
    """A channel that ReLU cuts off on all ordinary images is not dead for certain."""
    model = conditioned(Chain(), 8)
    with torch.no_grad():
        model.bn1.bias[0] = -1000.0
        model.conv2.weight[:, 1] *= 1e-30
    _, report = shrunk(model, 8)
    assert not report.changed


def test_squeeze_and_excitation_of_a_dead_channel() -> None:
    model = conditioned(create_model("torchvision/efficientnet_b0", num_classes=10), 64)
    block = model.features[3][1].block
    with torch.no_grad():
        block[1][0].weight[:7] = 0  # the depthwise convolution
        block[1][1].bias[:7] = 0
        block[1][1].running_mean[:7] = 0
    smaller, report = shrunk(model, 64)
    assert list(report.widths.values()) == [(240, 233)]
    assert smaller.features[3][1].block[2].fc1.in_channels == 233
    assert_equal_outputs(model, smaller, 64)


def test_networks_that_look_at_values_are_followed_backwards_only() -> None:
    class Looking(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.conv1(x))
            x = x * (x > 0.1)
            return self.fc2(self.fc1(self.bn2(self.conv2(x)).mean((2, 3))))

    model = conditioned(Looking(), 8)
    with torch.no_grad():
        model.conv2.weight[:, 5:] = 0
    place = Place("conv2", "input", 0, 1, np.arange(8), (1, 8, 8, 8), True, True)
    with pytest.raises(NotFollowedError, match="gt"):
        observed_constants(model, (make_images(8),), [place])
    smaller, report = shrunk(model, 8)
    assert report.widths == {"conv1": (8, 5)}
    assert_equal_outputs(model, smaller, 8)


def test_auxiliary_classifiers_stay_as_they_are() -> None:
    """They do not run in evaluation, so that nothing is proved about what they read of their own."""
    model = conditioned(create_model("torchvision/googlenet", num_classes=10), 64)
    mask_channels(model, 64)
    smaller, report = shrunk(model, 64)
    assert {kept.reason for kept in report.kept} == {"it belongs to a part that runs in training only"}
    assert all(kept.group.startswith("aux") for kept in report.kept)
    assert_equal_outputs(model, smaller, 64)


def test_constants_are_those_of_every_image() -> None:
    """What the NaN run calls constant really is, on images of any scale; what it does not call so varies."""
    model = conditioned(create_model("torchvision/efficientnet_b0", num_classes=10), 64)
    mask_channels(model, 64, 0.3)
    graph = trace_groups(model, make_images(64))
    places = [p for p in graph.places if p.kind == "input" and p.consumer]
    found = observed_constants(model, (make_images(64),), places)
    seen: dict[str, Tensor] = {}
    for place in places:
        model.get_submodule(place.module).register_forward_pre_hook(
            lambda module, args, name=place.module: seen.__setitem__(name, args[0])
        )
    with torch.no_grad():
        model(make_images(64) * torch.tensor([0.1, 10.0]).reshape(2, 1, 1, 1))
    num_constant = 0
    for number, place in enumerate(places):
        values = seen[place.module].movedim(place.dim, 0).flatten(1)
        constant = torch.from_numpy(~np.isnan(found[number]))
        expected = torch.from_numpy(found[number])[constant, None].float().expand(-1, values.shape[1])
        torch.testing.assert_close(values[constant], expected)
        assert (values[~constant].std(1) > 0).all()
        num_constant += int(constant.sum())
    assert num_constant > 1000


# -- around it --------------------------------------------------------------------------------------------------


def test_the_network_is_left_tidy() -> None:
    model = conditioned(create_model("resnet20", num_classes=10), 32)
    mask_channels(model, 32)
    model.train()
    model.layer1.eval()
    shrink(model, make_images(32))
    assert model.training
    assert not model.layer1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.isnan().any() for p in (*model.parameters(), *model.buffers()))
    model.train()(make_images(32)).sum().backward()


def test_masks_of_torch_are_understood(tmp_path: Path) -> None:
    model = conditioned(create_model("vgg16_bn_cifar", num_classes=10), 32)
    for module in (model.features[3], model.features[7]):
        torch_prune.ln_structured(module, "weight", amount=0.25, n=1, dim=0)
        module.weight = module.weight.detach()  # only leaves of the autograd graph can be copied
        rows = module.weight_mask.flatten(1)[:, 0] == 0
        with torch.no_grad():
            module.bias[rows] = 0
            norm = model.features[[*model.features].index(module) + 1]
            norm.bias[rows], norm.running_mean[rows] = -0.1, 0
    path = tmp_path / "masked.pth"
    torch.save({"arch": "vgg16_bn_cifar", "state_dict": model.state_dict()}, path)
    smaller, report = shrunk(model, 32)
    assert report.widths == {"features.3": (64, 48), "features.7": (128, 96)}
    assert_equal_outputs(model, smaller, 32)
    assert main(["shrink", str(path), str(tmp_path / "out.pth"), "--no-latency"]) == 0
    assert_equal_outputs(model, model_for_weights(None, tmp_path / "out.pth"), 32)


def test_the_verb_reports_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = conditioned(create_model("resnet20", num_classes=7), 32)
    count = mask_channels(model, 32)
    save_pruned(tmp_path / "masked.pth", model)
    words = ["shrink", str(tmp_path / "masked.pth"), str(tmp_path / "out.pth"), "--example-size", "32"]
    assert main([*words, "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    assert f"{count} dead channels" in out
    whose = (
        f"a selector or saliency mapping (CASM) that was trained for {tmp_path / 'masked.pth'} does not fit"
    )
    for what in ("MACs per image", "parameters", "bytes", "latency", "outputs differ by", whose):
        assert what in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["removed_channels"] == count
    assert report["num_bytes"][1] < report["num_bytes"][0]
    assert len(report["seconds_per_batch"]) == 2
    assert_equal_outputs(model, model_for_weights("resnet20", tmp_path / "out.pth"), 32)


def test_nothing_dead_gives_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pruned(tmp_path / "dense.pth", conditioned(create_model("resnet20", num_classes=7), 32))
    assert main(["shrink", str(tmp_path / "dense.pth"), str(tmp_path / "out.pth")]) == 0
    assert "no channel is provably dead" in capsys.readouterr().out
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "dense.pth").read_bytes()


def test_a_published_file_can_be_shrunk_as_it_is(tmp_path: Path) -> None:
    """Architecture and classes are read off the file."""
    model = conditioned(create_model("resnet18", num_classes=6), 64)
    zero_rows(model, {"layer1.0.conv1": "layer1.0.bn1"}, torch.arange(16))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {"epoch": 3, "arch": "resnet18", "state_dict": state, "best_prec1": np.float64(50)},
        tmp_path / "di.pth.tar",
    )
    words = [
        "shrink",
        str(tmp_path / "di.pth.tar"),
        str(tmp_path / "out.pth"),
        "--example-size",
        "64",
        "--no-latency",
    ]
    assert main(words) == 0
    assert load_weights(tmp_path / "out.pth").state["layer1.0.conv1.weight"].shape[0] == 48


FACTORY = """
from torch import nn
def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
"""


def test_a_network_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shrink_users_network.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import shrink_users_network as users

    model = conditioned(users.build(), 16)
    with torch.no_grad():
        model[1].weight[:3], model[1].bias[:3] = 0, -1
    torch.save(model.state_dict(), tmp_path / "users.pth")
    words = [
        "shrink",
        str(tmp_path / "users.pth"),
        str(tmp_path / "out.pth"),
        "--example-size",
        "16",
        "--no-latency",
    ]
    assert main([*words, "--factory", "shrink_users_network:build"]) == 0
    smaller = load_pruned(tmp_path / "out.pth", factory=users.build)
    assert smaller[0].out_channels == 5
    assert_equal_outputs(model, smaller, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.pth", "out.pth"], "absent.pth does not exist"),
        (["plain.pth", "out.pth"], "give --arch"),
        (["plain.pth", "plain.pth", "--arch", "resnet20"], "that is CHECKPOINT"),
        (["plain.pth", "out.pth", "--arch", "resnet20", "--factory", "a:b"], "exclude each other"),
        (["plain.pth", "out.pth", "--factory", "nowhere:build"], "nowhere"),
        (["plain.pth", "out.pth", "--factory", "json:nothing"], "nothing"),
        (["plain.pth", "out.pth", "--factory", "json"], "MODULE:FUNCTION"),
        (["plain.pth", "out.pth", "--arch", "resnet20", "--example-size", "0"], "--example-size: '0'"),
        (["plain.pth", "out.pth", "--arch", "resnet32"], "resnet32|does not fit"),
        (
            ["plain.pth", "out.pth", "--arch", "resnet20", "--num-classes", "5"],
            "give --num-classes 3 to keep its classifier\n",
        ),
    ],
)
def test_errors_name_what_to_change(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("resnet20", num_classes=3).state_dict(), "plain.pth")
    assert status_of(main, ["shrink", *words]) == 2
    assert re.search(message, capsys.readouterr().err, re.IGNORECASE)


def test_nan_outputs_are_not_equal() -> None:
    model = conditioned(Chain(), 8)
    with torch.no_grad():
        model.fc2.bias[0] = torch.nan
    with pytest.raises(ValueError, match="outputs"):
        shrink(model, make_images(8))
    assert largest_difference([torch.ones(2)], [torch.tensor([1.0, torch.nan])]) == float("inf")


def test_a_stream_that_nobody_reads_keeps_one_channel() -> None:
    """Each of its channels could go as long as another one stays: the choice must come to an end."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.branch(x)).mean((2, 3)))

    model = Stream()
    with torch.no_grad():
        model.head.weight.zero_()
        model.branch.weight.zero_()
        model.branch.weight[0, 2] = 1
    report = shrink(model, make_images(8))
    assert [after for _, after in report.widths.values()] == [1]
    torch.testing.assert_close(model(make_images(8)), model.head.bias.expand(2, 4))


def test_weights_that_a_hook_computes_are_left_alone() -> None:
    model = conditioned(Chain(), 8)
    with torch.no_grad():
        model.conv1.weight[:3] = 0
        model.bn1.weight[:3] = model.bn1.bias[:3] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model.conv2)
    before = model(make_images(8))
    shrink(model, make_images(8))
    torch.testing.assert_close(model(make_images(8)), before, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_mean_over_everything_takes_up_no_offset() -> None:
    class Centred(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv2(F.relu(self.bn1(self.conv1(x))))
            return self.fc2(self.fc1((self.bn2(x) - x.mean()).mean((2, 3))))

    found = Folding(Centred().eval(), (make_images(8),)).sinks("conv2")
    assert isinstance(found, str)
    assert "elsewhere than to batch norms" in found


def test_masked_channels_that_stay_are_named_by_the_layer_that_is_masked() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=4).eval()
    with torch.no_grad():
        model.layer2[0].downsample[0].weight[3:5] = 0
    report = shrink(model, torch.randn(2, 3, 64, 64))
    (kept,) = report.kept
    assert (kept.layers, kept.count) == (("layer2.0.downsample.0",), 2)
    assert "layer2.0.conv2" in kept.reason, "what is coupled with it and not zero"
    assert "2 masked channels of layer2.0.downsample.0 stay" in report.describe()
