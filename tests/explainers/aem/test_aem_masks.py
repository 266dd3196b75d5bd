"""RBF masks and relaxed samples against slow float64 versions of their formulas, and at the edges of half precision."""

from __future__ import annotations

import math

import pytest
import torch

from explainers.aem.masks import (
    MASK_PRESETS,
    MaskGeometry,
    centres_and_widths,
    random_rbf_masks,
    rbf_masks,
    relaxed_bernoulli,
    to_size,
)


def slow_rbf(x: float, y: float, sigma: float, size: int, scale: float = 1.0) -> list[list[float]]:
    return [
        [math.exp(-((u * scale - x) ** 2 + (v * scale - y) ** 2) / (2 * sigma**2)) for u in range(size)]
        for v in range(size)
    ]


def test_rbf_masks_are_the_formula() -> None:
    centres = torch.tensor([[3.2, 7.9], [0.0, 11.0]], dtype=torch.float64)
    widths = torch.tensor([2.5, 0.7], dtype=torch.float64)
    masks = rbf_masks(centres, widths, 12)
    assert masks.shape == (2, 1, 12, 12)
    expected = [slow_rbf(*c.tolist(), float(w), 12) for c, w in zip(centres, widths, strict=True)]
    torch.testing.assert_close(masks[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_masks_of_another_size_show_the_same_place() -> None:
    geometry = MASK_PRESETS["cifar"]
    masks = rbf_masks(
        torch.tensor([[10.0, 20.0]], dtype=torch.float64),
        torch.tensor([6.0], dtype=torch.float64),
        64,
        geometry,
    )
    expected = torch.tensor(slow_rbf(10, 20, 6, 64, scale=0.5), dtype=torch.float64)
    torch.testing.assert_close(masks[0, 0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [32, 224, 1000])
def test_the_peak_is_exactly_one_and_gradients_are_finite_in_half_precision(
    dtype: torch.dtype, size: int
) -> None:
    middle = size // 2
    centres = torch.tensor([[middle, middle], [0, 0]], dtype=dtype, requires_grad=True)
    widths = torch.tensor([0.4 * size, 1e-4], dtype=dtype, requires_grad=True)
    masks = rbf_masks(centres, widths, size)
    assert masks.dtype == torch.float32
    assert masks[0, 0, middle, middle] == 1.0 == masks.amax()
    assert masks[1, 0, 0, 0] == 1.0
    masks.mean().backward()
    assert centres.grad is not None
    assert centres.grad.isfinite().all()
    assert widths.grad is not None
    assert widths.grad.isfinite().all()


def test_the_area_grows_with_the_width() -> None:
    # The published way, dividing by the sampled maximum, has the wrong sign here.
    width = torch.tensor([10.0], requires_grad=True)
    rbf_masks(torch.tensor([[16.3, 15.6]]), width, 32).mean().backward()
    assert width.grad is not None
    assert width.grad > 0


def test_raw_outputs_become_centres_in_the_frame_and_positive_widths() -> None:
    raw = torch.tensor([[3.0, -2.0, 10.0], [1e4, -1e4, -1e4], [0, 0, 0]], dtype=torch.float64)
    centres, widths = centres_and_widths(raw, MASK_PRESETS["cifar"])
    for index, (a, b, w) in enumerate(raw.tolist()):
        assert centres[index, 1].item() == pytest.approx(14 * math.tanh(a / 14) + 16, abs=1e-12)
        assert centres[index, 0].item() == pytest.approx(14 * math.tanh(b / 14) + 16, abs=1e-12)
        softplus = max(w, 0) + math.log1p(math.exp(-abs(w)))
        assert widths[index].item() == pytest.approx(softplus, abs=1e-12)
    assert centres.min() >= 2
    assert centres.max() <= 30
    half_centres, half_widths = centres_and_widths(raw.half(), MASK_PRESETS["cifar"])
    assert half_centres.dtype == half_widths.dtype == torch.float32


#: Raw outputs of a published ImageNet selector, and every 56th pixel of the mask that its program draws from them.
PUBLISHED_RAW = (39.663536, -60.158360, 49.460827)
PUBLISHED_MASK = (
    (0.0051, 0.0101, 0.0055, 0.0008),
    (0.0839, 0.1644, 0.0894, 0.0135),
    (0.3799, 0.7441, 0.4048, 0.0611),
    (0.4773, 0.9351, 0.5083, 0.0767),
)


def test_a_mask_lies_where_the_published_program_draws_it() -> None:
    mask = rbf_masks(*centres_and_widths(torch.tensor([PUBLISHED_RAW]), MASK_PRESETS["imagenet"]), 224)[0, 0]
    assert divmod(int(mask.argmax()), 224) == (150, 57)  # the first raw output is the row
    torch.testing.assert_close(
        mask[::56, ::56] / mask.max(), torch.tensor(PUBLISHED_MASK), rtol=0, atol=6e-4
    )  # half precision


def test_published_constants_scale_with_the_images() -> None:
    cifar, imagenet = MASK_PRESETS["cifar"], MASK_PRESETS["imagenet"]
    assert (cifar.image_size, cifar.travel, cifar.least_width, cifar.most_width) == (32, 14, 5, 11)
    assert (imagenet.image_size, imagenet.travel, imagenet.least_width, imagenet.most_width) == (
        224,
        108,
        80,
        100,
    )
    assert (cifar.initial_width, imagenet.initial_width) == (10, 100)
    assert cifar.scaled(48) == MaskGeometry(48, 21.0, 7.5, 16.5, 15.0)
    assert imagenet.scaled(224) == imagenet


@pytest.mark.parametrize(
    "broken", [{"travel": 0}, {"travel": 17}, {"least_width": 0}, {"least_width": 12, "most_width": 11}]
)
def test_impossible_geometry_is_refused(broken: dict[str, float]) -> None:
    settings = {"travel": 14, "least_width": 5, "most_width": 11, "initial_width": 10} | broken
    with pytest.raises(ValueError, match=r"travel|widths"):
        MaskGeometry(32, **settings)


def test_random_masks_cover_frame_and_widths_and_repeat_with_their_generator() -> None:
    geometry = MASK_PRESETS["cifar"]
    device = torch.device("cpu")
    masks = random_rbf_masks(400, geometry, device, torch.Generator().manual_seed(1))
    assert torch.equal(masks, random_rbf_masks(400, geometry, device, torch.Generator().manual_seed(1)))
    flat = masks.flatten(1).argmax(1)
    rows, columns = flat // 32, flat % 32
    for position in (rows, columns):  # 16 ± 14, and near its ends
        assert 2 <= position.min() <= 4
        assert 28 <= position.max() <= 30
    areas = masks.mean((1, 2, 3))
    assert areas.max() < 2 * math.pi * 11**2 / 32**2
    assert areas.min() > 0.25 * 2 * math.pi * 5**2 / 32**2 * 0.8


def slow_relaxed(p: float, noise: float, temperature: float) -> float:
    logit = math.log(p) - math.log1p(-p) + math.log(noise) - math.log1p(-noise)
    return 1 / (1 + math.exp(-logit / temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.4])
def test_relaxed_samples_are_the_formula(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = 0.05 + 0.9 * torch.rand(50, generator=generator, dtype=torch.float64)
    noise = 0.05 + 0.9 * torch.rand(50, generator=generator, dtype=torch.float64)
    expected = [slow_relaxed(a, b, temperature) for a, b in zip(p.tolist(), noise.tolist(), strict=True)]
    sample = relaxed_bernoulli(p, temperature, uniform=noise)
    torch.testing.assert_close(sample, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_hard_samples_are_bernoulli_with_the_relaxed_gradient() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.5, 0.9]).expand(4000, 3)
    hard = relaxed_bernoulli(p, 0.5, hard=True)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert hard.mean(0).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    noise = torch.rand(20)
    gradients = []
    for as_hard in (False, True):
        leaf = torch.full((20,), 0.3, requires_grad=True)
        relaxed_bernoulli(leaf, 0.5, hard=as_hard, uniform=noise).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_certain_pixels_and_extreme_noise_stay_finite(dtype: torch.dtype) -> None:
    p = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5], dtype=dtype, requires_grad=True)
    noise = torch.tensor([0.0, 0.0, 1.0 - 1e-7, 1.0 - 1e-7, 0.0])
    sample = relaxed_bernoulli(p, 0.1, uniform=noise)
    assert sample.dtype == torch.float32
    assert sample.isfinite().all()
    sample.sum().backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()


def test_cells_keep_their_value_on_a_larger_grid() -> None:
    cells = torch.rand(2, 1, 4, 4)
    large = to_size(cells, 12)
    assert torch.equal(large, cells.repeat_interleave(3, 2).repeat_interleave(3, 3))
    assert to_size(cells, 4) is cells
