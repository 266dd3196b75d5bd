"""CASM's parts: decoder, taps, loss, store, presets, changed images, the mask as an explanation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from explainers.casm import Casm, CasmDecoder, CasmExplanation, load_casm, save_casm
from explainers.casm.casm_objective import (
    decoder_loss,
    mask_figures,
    negative_entropy,
    published_figures,
    published_summary,
    summary,
)
from explainers.casm.casm_paths import casm_name, find_casms
from explainers.casm.classifier_taps import find_casm_taps
from explainers.casm.decoder import enlarged
from explainers.casm.inpaint import inpaint
from explainers.casm.modify import BASELINES, baseline_masks, binarised, modified
from explainers.casm.presets import PRESETS, CasmConfig
from explainers.casm.store import PastClassifiers
from explainers.differentiable.features import FeatureTaps
from explainers.measures.localization import saliency_threshold
from image_classification.checkpoint import save_atomically
from image_classification.config import ConfigError
from image_classification.models import create_model, read_safely
from image_classification.models.weights_reading import WeightsError
from tests.support.explained import make_images

Randomised = Callable[..., nn.Module]

# ---------------------------------------------------------------------------- decoder and taps


def test_a_resnet50_has_the_published_decoder() -> None:
    with torch.device("meta"):
        decoder = CasmDecoder((64, 256, 512, 1024, 2048))
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {"final.0.weight": (1, 320, 3, 3), "final.0.bias": (1,)}
    for index, channels in enumerate((256, 512, 1024, 2048), 1):
        expected[f"conv1x1_{index}.0.weight"] = (64, channels, 1, 1)
        expected |= {
            f"conv1x1_{index}.1.{name}": (64,) for name in ("weight", "bias", "running_mean", "running_var")
        }
        expected[f"conv1x1_{index}.1.num_batches_tracked"] = ()
    assert shapes == expected


def test_decoder_against_float64() -> None:
    torch.manual_seed(0)
    decoder = CasmDecoder((2, 3, 4), width=5).double().eval()
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    base, near, far = (torch.randn(1, c, s, s, dtype=torch.float64) for c, s in ((2, 4), (3, 4), (4, 2)))
    parts = [base]
    for index, features in ((1, near), (2, far)):
        convolution, norm, _ = decoder.get_submodule(f"conv1x1_{index}")
        mixed = torch.einsum("oc,nchw->nohw", convolution.weight[:, :, 0, 0], features)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        mixed = (mixed - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        mixed = mixed.clamp(min=0)
        parts.append(mixed if index == 1 else _bilinear_double(mixed))
    joined = nn.functional.pad(torch.cat(parts, 1), (1, 1, 1, 1))
    kernel, bias = decoder.final[0].weight[0], decoder.final[0].bias
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for row in range(4):
        for column in range(4):
            expected[row, column] = (joined[0, :, row : row + 3, column : column + 3] * kernel).sum() + bias[
                0
            ]
    torch.testing.assert_close(decoder([base, near, far])[0, 0], torch.sigmoid(expected))


def _bilinear_double(features: torch.Tensor) -> torch.Tensor:
    """2×2 to 4×4 by hand: each output pixel's centre lies at (i + ½)/2 − ½ of the input, clamped to it."""
    positions = [min(max((i + 0.5) / 2 - 0.5, 0.0), 1.0) for i in range(4)]
    weights = torch.tensor([[1 - p, p] for p in positions], dtype=torch.float64)
    return torch.einsum("ia,jb,ncab->ncij", weights, weights, features)


def test_masks_are_enlarged_in_blocks() -> None:
    small = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    large = enlarged(small, (4, 4))
    assert torch.equal(large[0, 0], small[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("arch", "size", "names"),
    [
        ("resnet50", 64, ("maxpool", "layer1", "layer2", "layer3", "layer4")),
        ("resnet20", 32, ("relu", "layer1", "layer2", "layer3")),
        ("torchvision/densenet121", 64, ("features.pool0", "features.denseblock1")),
    ],
)
def test_the_decoder_reads_the_stem_and_every_stage(arch: str, size: int, names: tuple[str, ...]) -> None:
    model = create_model(arch, num_classes=4)
    model.train()
    taps = find_casm_taps(model, torch.zeros(1, 3, size, size))
    assert taps.names[: len(names)] == names
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    casm = Casm(model.eval(), CasmDecoder(taps.channels, 8).eval(), taps.names, size)
    logits, mask = casm(make_images(2, size))
    assert logits.shape == (2, 4)
    assert mask.shape == (2, 1, size, size)
    assert bool(((mask > 0) & (mask < 1)).all())


class InPlaceStem(nn.Module):
    """A stem whose residual sum and ReLU work in place, on the tensor that a module returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.stage1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(6, 2)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        first = self.conv1(images)
        second = self.conv2(first)
        second += first
        return self.relu(second)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.stage2(self.stage1(self.stem(images))).mean((2, 3)))


def test_the_base_is_what_enters_the_first_stage_also_where_it_was_changed_in_place() -> None:
    torch.manual_seed(0)
    model, images = InPlaceStem(), make_images(2, 16)
    taps = find_casm_taps(model, images)
    assert taps.names[-2:] == ("stage1", "stage2")
    with torch.no_grad(), FeatureTaps(model, taps.names) as caught:
        model(images)
        base = caught.features[0]
        torch.testing.assert_close(base, model.stem(images))


def test_a_network_of_one_scale_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(images).relu().mean((2, 3)))

    with pytest.raises(ValueError, match="image_size=16"):
        find_casm_taps(Flat(), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"\[4\]"):
        CasmDecoder((4,))


# ---------------------------------------------------------------------------- loss and statistics


def _slow_loss(clean, masked, targets, mask, lambda_r: float, adversarial: bool) -> float:
    confusion, size = [], []
    for i, target in enumerate(targets.tolist()):
        exponentials = [math.exp(z) for z in masked[i].tolist()]
        p = [e / sum(exponentials) for e in exponentials]
        right = max(range(len(p)), key=lambda k: clean[i, k].item()) == target
        wrong = max(range(len(p)), key=lambda k: p[k]) != target
        if adversarial:
            confusion.append(math.log(p[target]))
        else:
            confusion.append(sum(q * math.log(q) for q in p) if right else 0.0)
        size.append(max((1.0 if right and wrong else 0.0) - mask[i].mean().item(), 0.0))
    return sum(confusion) / len(confusion) - lambda_r * sum(size) / len(size)


@pytest.mark.parametrize("adversarial", [False, True])
def test_loss_against_a_slow_float64(adversarial: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    clean, masked = (torch.randn(12, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 4, (12,), generator=generator)
    clean[range(8), targets[:8]] += 9  # eight are right when whole
    masked[range(4), targets[:4]] += 9  # four of them also when masked
    mask = torch.rand(12, 1, 3, 3, generator=generator, dtype=torch.float64)
    loss = decoder_loss(clean, masked, targets, mask, lambda_r=2.5, adversarial=adversarial)
    assert loss.item() == pytest.approx(_slow_loss(clean, masked, targets, mask, 2.5, adversarial), rel=1e-12)


def test_the_size_term_is_there() -> None:
    """As published, on today's PyTorch, it would vanish: boolean + boolean never equals 2."""
    clean, masked = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    mask = torch.full((1, 1, 2, 2), 0.25, requires_grad=True)
    target = torch.tensor([0])
    decoder_loss(clean, masked, target, mask, lambda_r=8.0, adversarial=False).backward()
    assert torch.equal(
        mask.grad, torch.full_like(mask, 8.0 / 4)
    )  # smaller masks are better where f is confused
    mask.grad = None
    decoder_loss(clean, clean, target, mask, lambda_r=8.0, adversarial=False).backward()
    assert not mask.grad.any()


def test_mask_statistics_by_hand() -> None:
    mask = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]], [[[0.2, 0.2], [0.2, 0.2]]]], dtype=torch.float64)
    figures = mask_figures(mask)
    half = math.log(2)
    fifth = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    expected = torch.tensor(
        [[0.5, 0.25, 2 * half / 4, 0.5 * (0.5 + 0.5)], [0.2, 0.04, fifth, 0.0]], dtype=torch.float64
    )
    torch.testing.assert_close(figures, expected)
    total = summary(figures.sum(0), 2)
    assert total["mask_mean"] == pytest.approx(0.35)
    assert total["mask_std"] == pytest.approx(0.15)
    assert math.isnan(summary(torch.zeros(4), 0)["mask_mean"])


def test_entropy_of_sure_and_unsure_predictions() -> None:
    values = negative_entropy(torch.tensor([[0.0, 0.0, 0.0, 0.0], [90.0, 0.0, 0.0, 0.0]]))
    assert values.tolist() == pytest.approx([-math.log(4), 0.0], abs=1e-6)


# ---------------------------------------------------------------------------- thinning


def test_presets_are_the_published_ones() -> None:
    settings = {name: CasmConfig(reproduce=name).thinning for name in PRESETS}
    assert {name: (t.fixed, t.past, t.store_every, t.lambda_r) for name, t in settings.items()} == {
        "F": (True, 0.0, 0, 2.5),
        "L": (False, 0.0, 0, 14.0),
        "FL": (False, 0.5, 0, 7.5),
        "L100": (False, 0.5, 100, 10.0),
        "L1000": (False, 0.5, 1000, 10.0),
    }
    adversarial = [CasmConfig(reproduce=name, adversarial=True).thinning.lambda_r for name in PRESETS]
    assert adversarial == [9.0, 18.0, 11.0, 17.0, 17.0]


def test_flags_override_a_preset() -> None:
    thinning = CasmConfig(reproduce="L100", hp=0.25, smf=7, lambda_r=3.0).thinning
    assert (thinning.past, thinning.store_every, thinning.lambda_r) == (0.25, 7, 3.0)
    assert CasmConfig(reproduce="L", fixed_classifier=True).thinning.fixed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hp": 1.5}, "--hp 1.5"),
        ({"smf": 10}, "--smf 10 .*--hp"),
        ({"num_past": 5}, "--num-past 5 .*--hp"),
        ({"reproduce": "F", "hp": 0.5}, "--hp .*--fixed-classifier"),
        ({"reproduce": "L100", "smf": -1}, "--smf -1"),
        ({"pot": 0.0}, "--pot 0.0"),
        ({"lambda_r": -1.0}, "--lambda-r"),
        ({"clip_casm": 0.0}, "--clip-casm"),
        ({"lrde": 0}, "--lrde 0"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CasmConfig(**settings)


def _numbered(value: float) -> nn.Module:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, value)
    return model


def test_past_classifiers_are_bounded_and_replaced() -> None:
    store = PastClassifiers(capacity=3, every=2, share=1.0, seed=0)
    for iteration in range(40):
        if store.wants(iteration):
            store.add(_numbered(iteration), iteration)
        assert len(store) == min(iteration // 2 + 1, 3)
    kept = sorted(int(state["weight"]) for state in store.states)
    assert len(set(kept)) == 3
    assert kept[-1] == 38  # the newest is always in
    again = PastClassifiers(3, 2, 1.0, 0)
    again.load_state_dict(store.state_dict())
    assert [again.drawn(i) for i in range(9)] == [store.drawn(i) for i in range(9)]
    assert {store.drawn(i) for i in range(50)} == {0, 1, 2}


def test_a_stored_classifier_judges_as_it_was() -> None:
    model = _numbered(2.0)
    store = PastClassifiers(2, 0, 0.5, seed=3)
    assert store.wants(0)
    store.add(model, 0)
    assert not store.wants(1)  # first only
    nn.init.constant_(model.weight, 5.0)
    judge = store.judge(0, model)
    assert judge.weight.item() == 2.0
    assert not judge.training
    assert not judge.weight.requires_grad
    share = np.mean([store.drawn(i) is not None for i in range(2000)])
    assert 0.46 < share < 0.54
    assert PastClassifiers(2, 1, 0.0, 0).wants(0) is False


# ---------------------------------------------------------------------------- files, explanation


@pytest.fixture
def casm(randomised: Randomised) -> Casm:
    torch.manual_seed(5)
    model = randomised("resnet20", 32, num_classes=5)
    return Casm.for_classifier(model, 32, width=6).eval()


def test_a_casm_survives_its_file(casm: Casm, tmp_path: Path) -> None:
    path = tmp_path / "a.pth.tar"
    save_casm(path, casm)
    loaded = load_casm(path)
    images = make_images(3, 32)
    with torch.no_grad():
        for before, after in zip(casm(images), loaded(images), strict=True):
            assert torch.equal(before, after)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.image_size == 32


def test_a_pruned_classifier_keeps_its_casm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=5, widths={"layer1.0.conv1": 5}).eval()
    casm = Casm.for_classifier(model, 32, width=6).eval()
    casm.kept = {"layer3": torch.arange(64)}
    save_casm(tmp_path / "p.pth.tar", casm)
    loaded = load_casm(tmp_path / "p.pth.tar")
    assert loaded.classifier.layer1[0].conv1.out_channels == 5
    assert loaded.kept["layer3"].tolist() == list(range(64))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda payload: payload.pop("casm"), "python -m explainers train-casm"),
        (lambda payload: payload["casm"].pop("taps"), "taps"),
        (lambda payload: payload["casm"].update(taps=["maxpool", "layer4"]), "'maxpool'.*resnet20"),
        (lambda payload: payload["casm"].update(width=7), r"decoder.*conv1x1_1\.0\.weight"),
    ],
)
def test_files_that_hold_no_sound_casm(
    casm: Casm, tmp_path: Path, spoil: Callable[[dict], object], message: str
) -> None:
    path = tmp_path / "a.pth.tar"
    save_casm(path, casm)
    payload = read_safely(path)
    spoil(payload)
    save_atomically(payload, path)  # with a digest of what is left
    with pytest.raises(WeightsError, match=message):
        load_casm(path)


def test_folders_of_casms(casm: Casm, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--casms-path .*nowhere"):
        find_casms(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"--casms-path .*checkpoint\.pth\.tar"):
        find_casms(tmp_path)
    (tmp_path / "L100").mkdir()
    save_casm(tmp_path / "L100" / "checkpoint.pth.tar", casm)
    (tmp_path / "L100" / "checkpoint-3.pth.tar").touch()
    save_casm(tmp_path / "one.pth.tar", casm)
    (tmp_path / "notes.txt").touch()
    assert [casm_name(path) for path in find_casms(tmp_path)] == ["L100", "one.pth.tar"]


def test_the_mask_as_an_explanation(casm: Casm) -> None:
    explanation = CasmExplanation(casm)
    images, classes = make_images(2, 32), torch.zeros(2, dtype=torch.int64)
    phi = explanation(casm.classifier, images, classes)
    assert phi.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(phi.view(2, 1, 32, 32), casm(images)[1])
    weight = casm.classifier.layer1[0].conv1.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(phi.sum(), weight)
    assert gradient.abs().sum() > 0
    frozen = copy.deepcopy(casm.classifier).requires_grad_(False)
    assert not explanation(frozen, images, classes).requires_grad  # the decoder itself is frozen


def test_removed_channels_count_as_zero(casm: Casm) -> None:
    explanation = CasmExplanation(casm)
    images, classes = make_images(2, 32), torch.zeros(2, dtype=torch.int64)
    kept = torch.tensor([0, 2, 3, 9])
    zeroed = torch.zeros(64)
    zeroed[kept] = 1
    handle = casm.classifier.layer3.register_forward_hook(lambda m, i, out: out * zeroed[:, None, None])
    with torch.no_grad():
        expected = explanation(casm.classifier, images, classes)
    handle.remove()
    handle = casm.classifier.layer3.register_forward_hook(lambda m, i, out: out[:, kept])
    casm.classifier.fc = nn.Linear(4, 5)
    with torch.no_grad():
        got = explanation.rewritten({"layer3": kept})(casm.classifier, images, classes)
    handle.remove()
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="'layer9'"):
        explanation.rewritten({"layer9": kept})


# ---------------------------------------------------------------------------- changed images


def test_masks_are_binarised_at_their_own_quantile() -> None:
    mask = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) ** 2
    kept = binarised(mask)
    assert kept.dtype == torch.bool
    for soft, hard in zip(mask, kept, strict=True):
        assert np.array_equal(hard[0].numpy(), soft[0].numpy() > saliency_threshold(soft[0].numpy()))
        assert hard.float().mean() == pytest.approx(soft.mean().item(), abs=2 / 64)


def test_masked_in_and_out_share_the_image() -> None:
    images = make_images(2, 16)
    mask = torch.rand(2, 1, 16, 16) < 0.3
    inside, outside = (
        modified(images, mask, kind, (0.5,) * 3, (0.2,) * 3) for kind in ("masked in", "masked out")
    )
    assert torch.equal(inside + outside, images)
    assert not outside[mask.expand_as(images)].any()
    assert modified(images, mask, "whole", (0.5,) * 3, (0.2,) * 3) is images


def test_baseline_masks() -> None:
    ids = torch.tensor([3, 40])
    masks = {name: baseline_masks(name, ids, 14) for name in BASELINES}
    assert not masks["zeros"].any()
    assert masks["ones"].all()
    grid = masks["random grid"]
    assert grid.shape == (2, 1, 14, 14)
    assert torch.equal(grid[:, :, 0:4, 0:4], grid[:, :, :1, :1].expand(2, 1, 4, 4))
    assert not torch.equal(grid[0], grid[1])
    assert torch.equal(baseline_masks("random pixels", ids[1:], 14)[0], masks["random pixels"][1])
    assert baseline_masks("random pixels", torch.arange(50), 20).float().mean() == pytest.approx(
        0.5, abs=0.02
    )


def test_inpainting_fills_from_around_and_touches_nothing_else() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    colour = torch.tensor([0.8, 0.2, 0.6])
    flat = ((colour - torch.tensor(mean)) / torch.tensor(std))[:, None, None].expand(3, 20, 20)
    images = flat.clone()[None].repeat(2, 1, 1, 1)
    images[0, :, 8:12, 8:12] = 3.0
    mask = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    mask[0, :, 7:13, 7:13] = True
    mask[1] = True
    filled = inpaint(images, mask, mean, std)
    torch.testing.assert_close(filled[0], flat, atol=3 / 255 / min(std), rtol=0)  # OpenCV computes in 8 bits
    assert torch.equal(filled[0][:, ~mask[0, 0]], images[0][:, ~mask[0, 0]])
    assert not filled[1].any()  # nothing to fill from
    with pytest.raises(ValueError, match=r"masks.*torch\.float32.*bool"):
        inpaint(images, mask.float(), mean, std)


def test_published_statistics_of_masks() -> None:
    """As score.py has them: −s·log2 s, squared differences, deviation of a sample; slowly, pixel by pixel."""
    masks = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = published_summary(published_figures(masks).sum(0), 3)
    pixels = [mask[0].tolist() for mask in masks]
    means = [sum(map(sum, rows)) / 20 for rows in pixels]
    mean = sum(means) / 3
    entropy = [-s * math.log2(s) for rows in pixels for row in rows for s in row]
    across = [(row[i] - row[i + 1]) ** 2 for rows in pixels for row in rows for i in range(4)]
    down = [(rows[j][i] - rows[j + 1][i]) ** 2 for rows in pixels for j in range(3) for i in range(5)]
    assert got == pytest.approx(
        {
            "avg_mask": mean,
            "std_mask": math.sqrt(sum((m - mean) ** 2 for m in means) / 2),
            "entropy": sum(entropy) / 60,
            "tv": sum(across) / len(across) + sum(down) / len(down),
        }
    )


def test_masks_can_be_enlarged_bilinearly(tmp_path: Path) -> None:
    classifier = create_model("resnet18", num_classes=3).eval()
    casm = Casm.for_classifier(classifier, 64, 8, "bilinear").eval()
    save_casm(tmp_path / "casm.pth.tar", casm)
    again, images = load_casm(tmp_path / "casm.pth.tar"), make_images(1, 64)
    with torch.no_grad():
        small = casm.decoder(_features(casm, images))
        expected = F.interpolate(small, size=(64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(again(images)[1], expected)
        assert not torch.equal(enlarged(small, (64, 64)), expected)


def _features(casm: Casm, images: torch.Tensor) -> list[torch.Tensor]:
    with FeatureTaps(casm.classifier, casm.taps) as taps:
        casm.classifier(images)
        return taps.features


def test_a_published_file_is_sent_to_the_import(tmp_path: Path) -> None:
    torch.save({"state_dict_classifier": {}, "state_dict_decoder": {}}, tmp_path / "casm.chk")
    with pytest.raises(WeightsError, match="python -m pruning import"):
        load_casm(tmp_path / "casm.chk")
