"""The record of a forward pass: complete, functional, and the same numbers as the network's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers.attribution.canonize import CanonicalNetwork, fuse_batch_norms, merge_batch_norms
from explainers.attribution.record import Kind, Record, Step, UnsupportedOperatorError, record_forward
from image_classification.models import create_model
from tests.support.explained import make_images, randomise

FAST = [
    ("resnet20", 32),
    ("vgg11_bn_cifar_x4", 32),
    ("mobilenet_v2_cifar", 32),
    ("torchvision/resnet18", 64),
    ("torchvision/squeezenet1_1", 64),
    ("torchvision/shufflenet_v2_x0_5", 64),
    ("torchvision/mobilenet_v3_small", 64),
    ("torchvision/mnasnet0_5", 64),
    ("timm/ghostnet_050", 64),
]
SLOW = [
    ("resnet50", 64),
    ("torchvision/densenet121", 64),
    ("torchvision/googlenet", 64),
    ("timm/inception_v4", 96),
    ("torchvision/efficientnet_b0", 64),
    ("torchvision/regnet_y_400mf", 64),
    ("torchvision/convnext_tiny", 64),
    ("torchvision/alexnet", 96),
    ("timm/seresnet50", 64),
    ("timm/resnest14d", 64),
    ("timm/nf_resnet50", 64),
    ("timm/tf_efficientnet_b0", 64),
    ("timm/res2net50_26w_4s", 64),
    ("timm/dla34", 64),
    ("timm/vovnet39a", 64),
    ("timm/repvgg_a0", 64),
    ("timm/xception41", 64),
]


def replay(record: Record, steps: list[Step], images: Tensor) -> Tensor:
    """Logits of other images by the steps alone."""
    values = {record.images: images}
    for step in steps:
        inputs = [values[value] for value in step.inputs]
        if step.linear is not None:
            results = [step.linear.apply(inputs[0], step.linear.weight)]
            if step.linear.bias is not None:
                shape = (1, -1, *[1] * (results[0].dim() - 2)) if step.linear.settings else (-1,)
                results = [results[0] + step.linear.bias.view(shape)]
        else:
            results = step.compute(inputs)
        values |= dict(zip(step.outputs, results, strict=False))
    return values[record.logits]


def check_canonical(arch: str, size: int) -> None:
    torch.manual_seed(0)
    images = make_images(3, size)
    model = randomise(create_model(arch, num_classes=10), images).double()
    images = images.double()  # rounding in float32 alone moves some of these logits by 1e-5
    with torch.no_grad():
        expected = model(images)
        tolerance = 1e-9 * expected.abs().max().clamp(min=1)
        network = CanonicalNetwork(model)
        record = network.record(images)
        assert torch.equal(record.logits.tensor, expected)
        assert (replay(record, record.steps, images) - expected).abs().max() <= tolerance
        merged = merge_batch_norms(record)
        assert (replay(record, merged, images) - expected).abs().max() <= tolerance
        # a record made of other images serves too: nothing of them is left in the steps
        other = network.record(make_images(3, size, seed=9).double())
        assert (replay(other, merge_batch_norms(other), images) - expected).abs().max() <= tolerance
        fused = fuse_batch_norms(model, images[:1])
        assert (fused(images) - expected).abs().max() <= tolerance


@pytest.mark.parametrize(("arch", "size"), FAST)
def test_the_canonical_copy_computes_the_same(arch: str, size: int) -> None:
    check_canonical(arch, size)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "size"), SLOW)
def test_the_canonical_copy_computes_the_same_on_large_networks(arch: str, size: int) -> None:
    check_canonical(arch, size)


def test_steps_are_functional_and_know_their_module(tiny: nn.Module) -> None:
    record = record_forward(tiny, make_images(2, 6).double())
    assert all(not step.name.endswith("_") for step in record.steps)
    relus = [step for step in record.steps if step.name == "aten::relu"]
    assert [step.where for step in relus] == ["relu", "relu", "", ""]
    for step in relus:  # what an in-place ReLU overwrote is kept
        assert torch.equal(step.outputs[0].tensor, step.inputs[0].tensor.relu())
        assert (step.inputs[0].tensor < 0).any()
    kinds = [step.kind for step in record.steps]
    assert kinds.count(Kind.WEIGHTED) == 5
    assert kinds.count(Kind.BATCH_NORM) == 1
    assert kinds.count(Kind.SHARE) == 2  # the sum and the pool


def test_batch_norms_merge_only_where_nothing_else_reads_the_layer(tiny: nn.Module) -> None:
    record = record_forward(tiny, make_images(2, 6).double())
    merged = merge_batch_norms(record)
    assert [step.kind for step in merged].count(Kind.BATCH_NORM) == 0
    assert len(merged) == len(record.steps) - 1

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            x = self.conv(images)
            return (self.bn(x) + x).mean((2, 3))

    forked = Forked().eval()
    record = record_forward(forked, make_images(2, 6))
    assert [step.kind for step in merge_batch_norms(record)].count(Kind.BATCH_NORM) == 1
    fused = fuse_batch_norms(forked, make_images(1, 6))
    assert isinstance(fused.bn, nn.BatchNorm2d)


def test_fusion_takes_every_batch_norm_of_a_resnet_and_leaves_the_model(randomised) -> None:
    model = randomised("resnet20", 32)
    before = copy.deepcopy(model.state_dict())
    fused = fuse_batch_norms(model.train(), make_images(1, 32))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not fused.training


def test_fusion_keeps_activation_and_dropout_inside_timms_batch_norm() -> None:
    images = make_images(2, 64)
    model = randomise(create_model("timm/mobilenetv3_small_050", num_classes=10), images)
    fused = fuse_batch_norms(model, images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_used_twice_is_not_fused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return self.bn2(self.conv(self.bn1(self.conv(images)))).mean((2, 3))

    images = make_images(4, 6)
    model = randomise(Shared(), images)
    fused = fuse_batch_norms(model, images)
    assert isinstance(fused.bn1, nn.BatchNorm2d)
    torch.testing.assert_close(fused(images), model(images))


def test_bottlenecks_are_where_everything_goes_through() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, images: Tensor) -> Tensor:
            x = self.a(images)
            unused = self.c(images)  # reaches nothing
            assert unused is not None
            return torch.cat([self.b(x), x], dim=1).mean((2, 3))

    record = record_forward(Branches().eval(), make_images(1, 6))
    names = [value.step.where if value.step else "images" for value in record.bottlenecks()]
    assert names == ["images", "a", "", ""]  # a's output, the concatenation, the mean; not b's


def test_an_in_place_write_into_a_view_is_refused_by_name() -> None:
    class Sneaky(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            x = images * 2
            x[:, :1].relu_()
            return x.mean((2, 3))

    with pytest.raises(UnsupportedOperatorError, match="aten::mean"):
        record_forward(Sneaky().eval(), make_images(1, 4))


def test_output_without_input_or_of_another_shape_is_refused() -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), 3)

    with pytest.raises(ValueError, match=r"output.*input"):
        record_forward(Constant(), make_images(1, 4))
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\)"):
        record_forward(nn.Conv2d(3, 2, 1).eval(), make_images(1, 4))


def test_hooks_are_gone_after_recording_also_after_a_failure(tiny: nn.Module) -> None:
    def num_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.modules())

    record_forward(tiny, make_images(1, 6).double())
    assert num_hooks() == 0
    with pytest.raises(RuntimeError):
        record_forward(tiny, make_images(1, 12).double())  # does not fit the linear layer
    assert num_hooks() == 0


def test_padding_of_the_images_is_a_move_and_nonnegativity_is_tracked() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = F.relu(self.conv(F.pad(images, (1, 1, 1, 1))))
            x = torch.cat([F.pad(x, (1, 1), value=-1.0), F.pad(x, (1, 1))], dim=1)
            return (F.hardtanh(x, 0.0, 6.0) - 1).mean((2, 3))

    record = record_forward(Padded().eval(), make_images(1, 6))
    known = {step.name: step.outputs[0].nonnegative for step in record.steps}
    assert known["aten::relu"]
    assert known["aten::hardtanh"]
    assert not known["aten::cat"]
    assert not known["aten::sub"]
    pads = [step.outputs[0].nonnegative for step in record.steps if step.name == "aten::constant_pad_nd"]
    assert pads == [False, False, True]
