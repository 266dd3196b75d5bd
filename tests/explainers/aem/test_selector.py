"""The selector: published shapes, class gate, masks, what is matched, and which inputs it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from explainers.aem import MASK_PRESETS, Selector, SelectorExplanation, load_selector, save_selector
from explainers.aem.saved_selector import load_black_box
from explainers.aem.selector import SelectorDesign, default_num_scales, design_selector
from explainers.differentiable.explanation import network_digest
from image_classification.config import ConfigError, SettingError, told
from image_classification.models import WeightsError, create_model
from tests.support.explained import make_images, randomise

SIZE = 32


@pytest.fixture
def black_box() -> nn.Module:
    torch.manual_seed(0)
    return randomise(create_model("resnet20", num_classes=5, image_size=SIZE), make_images(8, SIZE))


def make_selector(
    model: nn.Module, kind: str = "rbf", decoder: str = "published", size: int = SIZE
) -> Selector:
    torch.manual_seed(1)
    design = design_selector(
        model,
        torch.zeros(1, 3, size, size),
        kind=kind,
        geometry=MASK_PRESETS["cifar"].scaled(size),
        num_classes=5,
        decoder=decoder,
    )
    return Selector(design)


def published_design(
    widths: tuple[int, ...], sides: tuple[int, ...], num_classes: int, kind: str
) -> SelectorDesign:
    geometry = MASK_PRESETS["cifar" if num_classes == 10 else "imagenet"]
    taps = tuple(f"stage{index}" for index in range(len(widths)))
    return SelectorDesign(
        kind, "published", num_classes, taps, widths, tuple((side, side) for side in sides), geometry
    )


#: Channels and sides of the encoder's scales, number of classes, tensors of the published file: shapes in any order.
LEVEL = {
    "64-32": [(128, 64, 3, 3), (32, 64, 3, 3), (32, 32, 3, 3), (32, 64, 1, 1)],
    "32-16": [(64, 32, 3, 3), (16, 32, 3, 3), (16, 16, 3, 3), (16, 32, 1, 1)],
    "1280-96": [(384, 1280, 3, 3), (96, 192, 3, 3), (96, 96, 3, 3), (96, 192, 1, 1)],
    "96-32": [(128, 96, 3, 3), (32, 64, 3, 3), (32, 32, 3, 3), (32, 64, 1, 1)],
    "32-24": [(96, 32, 3, 3), (24, 48, 3, 3), (24, 24, 3, 3), (24, 48, 1, 1)],
    "2048-1024": [(4096, 2048, 3, 3), (1024, 2048, 3, 3), (1024, 1024, 3, 3), (1024, 2048, 1, 1)],
    "1024-512": [(2048, 1024, 3, 3), (512, 1024, 3, 3), (512, 512, 3, 3), (512, 1024, 1, 1)],
    "512-256": [(1024, 512, 3, 3), (256, 512, 3, 3), (256, 256, 3, 3), (256, 512, 1, 1)],
}
PUBLISHED = [
    ((16, 32, 64), (32, 16, 8), 10, "rbf", ["64-32", "32-16"], [(10, 64), (3, 16, 32, 32)]),
    ((16, 32, 64), (32, 16, 8), 10, "real-x", ["64-32", "32-16"], [(10, 64), (2, 16, 1, 1)]),
    (
        (24, 32, 96, 1280),
        (56, 28, 14, 7),
        1000,
        "rbf",
        ["1280-96", "96-32", "32-24"],
        [(1000, 1280), (3, 24, 56, 56)],
    ),
    (
        (256, 512, 1024, 2048),
        (56, 28, 14, 7),
        1000,
        "rbf",
        ["2048-1024", "1024-512", "512-256"],
        [(1000, 2048), (3, 256, 56, 56)],
    ),
]


@pytest.mark.parametrize(
    ("widths", "sides", "num_classes", "kind", "levels", "rest"),
    PUBLISHED,
    ids=["resnet56", "resnet56 real-x", "mobilenet_v2", "resnet50"],
)
def test_tensors_have_the_published_shapes(
    widths: tuple[int, ...],
    sides: tuple[int, ...],
    num_classes: int,
    kind: str,
    levels: list[str],
    rest: list[tuple[int, ...]],
) -> None:
    with torch.device("meta"), torch.no_grad():
        selector = Selector(published_design(widths, sides, num_classes, kind))
    matrices = sorted(tuple(p.shape) for p in selector.parameters() if p.dim() > 1)
    assert matrices == sorted([shape for level in levels for shape in LEVEL[level]] + rest)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in selector.modules())
    assert norms == 4 * len(levels)
    vectors = [p for p in selector.parameters() if p.dim() == 1]
    assert len(vectors) == 2 * norms + (kind == "rbf")  # the only bias is the RBF head's


def test_files_that_do_not_say_which_output_is_the_row_keep_their_masks() -> None:
    """Before it was recorded the first output moved the column."""
    design = published_design((16, 32, 64), (32, 16, 8), 10, "rbf")
    plain = design.to_plain()
    assert SelectorDesign.from_plain(plain) == design
    del plain["row_first"]
    with torch.device("meta"):
        before, now = Selector(SelectorDesign.from_plain(plain)), Selector(design)
    raw = torch.tensor([[5.0, -7.0, 4.0]])
    assert torch.equal(before.mask(raw, 32), now.mask(raw, 32).transpose(2, 3))
    assert torch.equal(before.centres(raw, 32)[0], now.centres(raw, 32)[0].flip(1))


def test_scales_are_those_published() -> None:
    def taps(arch: str, size: int) -> list[tuple[int, int]]:
        model = create_model(arch, num_classes=10)
        design = design_selector(
            model,
            torch.zeros(1, 3, size, size),
            kind="rbf",
            geometry=MASK_PRESETS["cifar"].scaled(size),
            num_classes=10,
            num_scales=default_num_scales(224 if "cifar" not in arch and size > 32 else 32),
        )
        return [(width, side[0]) for width, side in zip(design.widths, design.sizes, strict=True)]

    assert taps("resnet56", 32) == [(16, 32), (32, 16), (64, 8)]
    assert taps("mobilenet_v2_cifar", 32) == [(32, 16), (96, 8), (1280, 4)]
    assert taps("mobilenet_v2_cifar_isp", 32) == [(32, 32), (96, 16), (1280, 8)]
    assert taps("resnet34", 64) == [(64, 16), (128, 8), (256, 4), (512, 2)]
    assert taps("resnet50", 64) == [(256, 16), (512, 8), (1024, 4), (2048, 2)]
    assert taps("mobilenet_v2", 64) == [(24, 16), (32, 8), (96, 4), (1280, 2)]
    assert default_num_scales(224) == 4
    assert default_num_scales(48) == 3


@pytest.mark.parametrize("decoder", ["published", "light"])
@pytest.mark.parametrize("kind", ["rbf", "real-x"])
@pytest.mark.parametrize("size", [32, 50])
def test_any_size_gives_masks(black_box: nn.Module, kind: str, decoder: str, size: int) -> None:
    selector = make_selector(black_box, kind, decoder, size).eval()
    images = make_images(3, size)
    raw = SelectorExplanation(selector).raw(black_box, images, torch.tensor([0, 1, 2]))
    assert raw.shape == ((3, 3) if kind == "rbf" else (3, 2, size, size))
    mask = selector.mask(raw, size)
    assert mask.shape == (3, 1, size, size)
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert selector.mask(raw, 2 * size).shape == (3, 1, 2 * size, 2 * size)
    sample = selector.sample(raw, 1.0, hard=True)
    assert set(sample.unique().tolist()) <= {0.0, 1.0}
    explanation = SelectorExplanation(selector)
    phi = explanation(black_box, images, torch.tensor([0, 1, 2]))
    assert phi.shape == (3, explanation.size)
    assert phi.dtype == torch.float32


def test_light_is_lighter() -> None:
    with torch.device("meta"), torch.no_grad():
        widths, sides = (256, 512, 1024, 2048), (56, 28, 14, 7)
        published = published_design(widths, sides, 1000, "rbf")
        counts = [
            sum(p.numel() for p in Selector(dataclasses.replace(published, decoder=decoder)).parameters())
            for decoder in ("published", "light")
        ]
    assert counts[0] == 143_483_395
    assert counts[1] < counts[0] / 40


def test_the_class_gate_is_the_formula(black_box: nn.Module) -> None:
    selector = make_selector(black_box).double().eval()
    seen: list[Tensor] = []
    selector.decoder.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[0]))
    torch.manual_seed(0)
    features = [
        torch.randn(2, width, *size, dtype=torch.float64)
        for width, size in zip(selector.design.widths, selector.design.sizes, strict=True)
    ]
    classes = torch.tensor([4, 1])
    selector(features, classes)
    deepest, expected = features[-1], torch.empty_like(features[-1])
    for n in range(2):
        weights = selector.embedding.weight[classes[n]]
        for v in range(deepest.shape[2]):
            for u in range(deepest.shape[3]):
                inner = (deepest[n, :, v, u] * weights).sum().item()
                expected[n, :, v, u] = deepest[n, :, v, u] / (1 + torch.tensor(-inner).exp())
    torch.testing.assert_close(seen[-1], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(seen[0], features[0])


def test_real_x_masks_are_the_formula(black_box: nn.Module) -> None:
    selector = make_selector(black_box, "real-x")
    raw = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    raw[0, :, 0, 0] = 0
    cells = selector.cells(raw)
    for n in range(2):
        for v in range(4):
            for u in range(4):
                a, b = abs(float(raw[n, 0, v, u])), abs(float(raw[n, 1, v, u]))
                assert float(cells[n, 0, v, u]) == pytest.approx(a / (a + b + 1e-8), abs=1e-12)


def test_training_starts_from_the_initial_width(black_box: nn.Module) -> None:
    selector = make_selector(black_box)
    assert selector.head.bias is not None
    assert selector.head.bias.tolist() == [0, 0, MASK_PRESETS["cifar"].initial_width]


def test_phi_is_differentiable_through_the_networks_channels(black_box: nn.Module) -> None:
    """Against central differences in float64: the derivative of φ by a gate on a channel."""
    model, selector = black_box.double(), make_selector(black_box).double().eval()
    explanation, images = SelectorExplanation(selector), make_images(2, SIZE).double()
    classes = torch.tensor([0, 3])
    gate = torch.ones(16, dtype=torch.float64, requires_grad=True)
    handle = model.layer1[0].relu1.register_forward_hook(
        lambda _module, _inputs, output: output * gate[None, :, None, None]
    )
    try:
        phi = explanation(model, images, classes)
        (gradient,) = torch.autograd.grad(phi[1, 2], gate)
        step = 1e-5
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                gate[3] += sign * step
                values.append(float(explanation(model, images, classes)[1, 2]))
                gate[3] -= sign * step
    finally:
        handle.remove()
    assert float(gradient[3]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8)
    assert gradient.abs().max() > 0


def test_kept_channels_leave_phi_of_the_masked_network(black_box: nn.Module) -> None:
    """A network without some channels explains as the whole one with them at zero."""
    selector = make_selector(black_box).eval()
    explanation = SelectorExplanation(selector)
    images, classes = make_images(2, SIZE), torch.tensor([0, 3])
    removed, kept = [2, 9], [c for c in range(64) if c not in (2, 9)]

    class Narrow(nn.Module):
        """The same up to its last stage, which hands on fewer channels."""

        def __init__(self, whole: nn.Module) -> None:
            super().__init__()
            self.stem = nn.Sequential(whole.conv1, whole.bn1, whole.relu)
            self.layer1, self.layer2 = whole.layer1, whole.layer2
            self.layer3 = nn.Sequential(whole.layer3, Take(kept))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3))

    class Take(nn.Module):
        def __init__(self, channels: list[int]) -> None:
            super().__init__()
            self.channels = channels

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.channels]

    def zeroed(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, removed] = 0
        return output

    handle = black_box.layer3.register_forward_hook(zeroed)
    with torch.no_grad():
        expected = explanation(black_box, images, classes)
        handle.remove()
        rewritten = explanation.rewritten({"layer3": torch.tensor(kept)})
        torch.testing.assert_close(rewritten(Narrow(black_box), images, classes), expected)
        assert (explanation(black_box, images, classes) - expected).abs().max() > 0
    assert explanation.kept == {}


def test_autocast_leaves_the_raw_output_and_masks_in_full_precision(black_box: nn.Module) -> None:
    selector = make_selector(black_box).eval()
    explanation = SelectorExplanation(selector)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        raw = explanation.raw(black_box, make_images(2, SIZE), torch.tensor([0, 1]))
        assert raw.dtype == selector.mask(raw, SIZE).dtype == selector.phi(raw).dtype == torch.float32


def test_a_selector_comes_back_from_its_file(black_box: nn.Module, tmp_path: Path) -> None:
    selector = make_selector(black_box).eval()
    path = tmp_path / "selector.pth.tar"
    save_selector(path, selector, black_box, {"agreement": 93.0})
    loaded = load_selector(path)
    assert loaded.design == selector.design
    assert loaded.figures == {"agreement": 93.0}
    assert not any(parameter.requires_grad for parameter in loaded.selector.parameters())
    images, classes = make_images(2, SIZE), torch.tensor([0, 3])
    assert torch.equal(
        loaded(black_box, images, classes), SelectorExplanation(selector)(black_box, images, classes)
    )
    loaded.check_network(black_box, image_size=SIZE, num_classes=5)
    again = load_black_box(path)
    assert network_digest(again) == network_digest(black_box)
    assert torch.equal(again(images), black_box(images))


def other_weights() -> nn.Module:
    torch.manual_seed(9)
    return create_model("resnet20", num_classes=5, image_size=SIZE)


@pytest.mark.parametrize(
    ("model", "size", "classes", "message"),
    [
        (other_weights, SIZE, 5, "weights of resnet20"),
        (lambda: create_model("resnet32", num_classes=5), SIZE, 5, "resnet20.* resnet32"),
        (None, 48, 5, "32 pixels"),
        (None, SIZE, 6, "5 classes"),
    ],
)
def test_a_selector_of_something_else_is_refused(
    black_box: nn.Module, tmp_path: Path, model: object, size: int, classes: int, message: str
) -> None:
    path = tmp_path / "selector.pth.tar"
    save_selector(path, make_selector(black_box), black_box)
    network = black_box if model is None else model()  # type: ignore[operator]
    with pytest.raises(SettingError, match=message) as caught:
        load_selector(path).check_network(network, image_size=size, num_classes=classes)
    assert caught.value.setting == "selector"
    assert told(caught.value).startswith(f"--selector {path}: ")


def test_files_that_hold_no_selector_are_refused(black_box: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"selector=.*none\.pth\.tar"):
        load_selector(tmp_path / "none.pth.tar")
    torch.save(black_box.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"selector=.*python -m explainers train-selector"):
        load_selector(tmp_path / "weights.pth")
    path = tmp_path / "selector.pth.tar"
    save_selector(path, make_selector(black_box), black_box)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "damaged.pth.tar").write_bytes(content)
    with pytest.raises(WeightsError):
        load_selector(tmp_path / "damaged.pth.tar")
    payload = torch.load(path, weights_only=True)
    payload["callbacks"]["selector"]["design"]["widths"] = [16, 32, 63]
    torch.save(payload, path)
    with pytest.raises(WeightsError):
        load_selector(path)
    payload["callbacks"]["selector"]["design"] = {"kind": "rbf"}
    torch.save(payload, path)
    with pytest.raises(WeightsError):
        load_selector(path)


def test_other_images_are_refused(black_box: nn.Module) -> None:
    explanation = SelectorExplanation(make_selector(black_box).eval())
    with pytest.raises(ValueError, match="32 pixels"):
        explanation(black_box, make_images(1, 48), torch.tensor([0]))
    with pytest.raises(SettingError, match=r"^image_size=4: "):
        make_selector(create_model("torchvision/resnet18", num_classes=5), size=4)


@pytest.mark.parametrize(
    "broken", [{"kind": "disc"}, {"decoder": "heavy"}, {"widths": (1, 2)}, {"taps": ("a",)}]
)
def test_impossible_designs_are_refused(broken: dict[str, object]) -> None:
    design = published_design((16, 32, 64), (32, 16, 8), 10, "rbf")
    assert SelectorDesign.from_plain(design.to_plain()) == design
    with pytest.raises(ValueError, match=r"^kind=|^decoder=|2 scales"):
        dataclasses.replace(design, **broken)  # type: ignore[arg-type]


def test_digests_ignore_wrapping_and_notice_weights(black_box: nn.Module) -> None:
    digest = network_digest(black_box)
    assert digest == network_digest(nn.DataParallel(black_box))
    assert digest == network_digest(black_box.to(memory_format=torch.channels_last))
    with torch.no_grad():
        black_box.fc.bias[0] += 1e-6
    assert digest != network_digest(black_box)
