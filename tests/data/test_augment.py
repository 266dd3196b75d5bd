"""Automatic augmentation: every operation and every range against torchvision's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from image_classification.data.augment import (
    KINDS,
    AutoAugment,
    Operations,
    RandAugment,
    TrivialAugmentWide,
    apply_operation,
    apply_operations,
    make_policy,
)
from image_classification.data.philox import Stream, uniforms
from tests.support.images import smooth_image

SIZE = (40, 56)


def sample_image(seed=0):
    return torch.from_numpy(np.array(smooth_image(*SIZE, seed))).permute(2, 0, 1).contiguous()


def torchvision_operation(image, name, magnitude):
    """What torchvision's own policies do for an operation."""
    policy = v2.RandAugment()
    return policy._apply_image_or_video_transform(
        image, name, magnitude, interpolation=InterpolationMode.NEAREST, fill={}
    )


def magnitudes_of(name):
    signed = {"Rotate": 27.0, "ShearX": 0.27, "ShearY": 0.9, "TranslateX": 13.7, "TranslateY": 7.2}
    signed |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.6)
    if name in signed:
        return signed[name], -signed[name]
    return {"Posterize": (5.0, 2.0), "Solarize": (0.7, 0.0)}.get(name, (0.0,))


@pytest.mark.parametrize("name", KINDS)
def test_each_operation_is_torchvisions(name):
    image = sample_image()
    for magnitude in magnitudes_of(name):
        ours = apply_operation(image, name, magnitude)
        assert torch.equal(ours, torchvision_operation(image, name, magnitude))
        assert name == "Identity" or not torch.equal(ours, image)


def test_a_batch_is_each_image_by_itself():
    images = torch.stack([sample_image(seed) for seed in range(12)])
    numbers = uniforms(0, Stream.AUGMENT, 0, np.arange(12), 4)
    operations = RandAugment(SIZE, magnitude=20).choose(numbers)
    before = images.clone()
    result = apply_operations(images, operations)
    assert torch.equal(images, before)
    for i in range(12):
        expected = images[i]
        for kind, magnitude in zip(operations.kinds[i], operations.magnitudes[i], strict=True):
            expected = torchvision_operation(expected, KINDS[kind], magnitude)
        assert torch.equal(result[i], expected)


def spaces(space, num_bins):
    return {name: (make(num_bins, *SIZE), signed) for name, (make, signed) in space.items()}


@pytest.mark.parametrize(
    ("policy_at", "transform", "num_bins", "strengths"),
    [
        (lambda m: RandAugment(SIZE, magnitude=m), v2.RandAugment, 31, (0, 4, 9, 17, 30)),
        (lambda m: TrivialAugmentWide(), v2.TrivialAugmentWide, 31, (0, 4, 9, 17, 30)),
    ],
)
def test_ranges_are_torchvisions(policy_at, transform, num_bins, strengths):
    expected = spaces(transform._AUGMENTATION_SPACE, num_bins)
    seen = set()
    for strength in strengths:
        policy = policy_at(strength)
        grid = (np.arange(14) + 0.5) / 14
        for sign in (0.1, 0.9):
            if isinstance(policy, RandAugment):
                numbers = np.stack([grid, grid, np.full(14, sign), np.full(14, sign)], axis=1)
            else:
                numbers = np.stack([grid, np.full(14, (strength + 0.5) / 31), np.full(14, sign)], axis=1)
            operations = policy.choose(numbers)
            for kind, magnitude in zip(operations.kinds[:, 0], operations.magnitudes[:, 0], strict=True):
                table, signed = expected[KINDS[kind]]
                value = 0.0 if table is None else float(table[strength])
                assert magnitude == pytest.approx(-value if signed and sign < 0.5 else value, abs=1e-5)
                seen.add(KINDS[kind])
    assert seen == set(expected)


@pytest.mark.parametrize("learned_on", ["imagenet", "cifar10"])
def test_autoaugment_is_the_published_policy(learned_on):
    reference = v2.AutoAugment(AutoAugmentPolicy(learned_on))._get_policies(AutoAugmentPolicy(learned_on))
    table = spaces(v2.AutoAugment._AUGMENTATION_SPACE, 10)
    policy = AutoAugment(SIZE, learned_on)
    for i, pair in enumerate(reference):
        for below in (True, False):
            shares = [max(p - 1e-9, 0.0) if below else p for _, p, _ in pair]
            operations = policy.choose(np.array([[(i + 0.5) / len(reference), *shares, 0.9, 0.1]]))
            for k, (name, _, strength) in enumerate(pair):
                applied = below and pair[k][1] > 0
                assert KINDS[operations.kinds[0, k]] == (name if applied else "Identity")
                magnitudes, signed = table[name]
                value = 0.0 if magnitudes is None or not applied else float(magnitudes[strength])
                expected = -value if signed and k == 1 else value
                assert operations.magnitudes[0, k] == pytest.approx(expected, abs=1e-5)


def test_operations_are_drawn_uniformly():
    numbers = uniforms(1, Stream.AUGMENT, 0, np.arange(14_000), 4)
    kinds, counts = np.unique(RandAugment(SIZE).choose(numbers).kinds, return_counts=True)
    assert len(kinds) == 14
    assert counts.min() > 1800
    assert counts.max() < 2200
    signs = TrivialAugmentWide().choose(numbers[:, :3])
    rotations = signs.magnitudes[signs.kinds == KINDS.index("Rotate")]
    assert 0.4 < (rotations < 0).mean() < 0.6


def test_names_and_errors():
    assert make_policy("none", SIZE) is None
    assert make_policy("randaugment", SIZE).name == "randaugment(2, 9)"
    with pytest.raises(ValueError, match="auto_augment='augmix'"):
        make_policy("augmix", SIZE)
    with pytest.raises(ValueError, match="31"):
        RandAugment(SIZE, magnitude=31)


def test_identity_leaves_images_alone():
    images = torch.stack([sample_image(0), sample_image(1)])
    nothing = Operations(np.zeros((2, 1), np.int64), np.zeros((2, 1)))
    assert torch.equal(apply_operations(images, nothing), images)
