"""Geometry against torchvision and slow references; sharding, order, invariance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from image_classification.data import plan as plan_module
from image_classification.data.augment import RandAugment
from image_classification.data.decode import cut
from image_classification.data.philox import Stream, uniforms
from image_classification.data.plan import CentreCrop, PadCrop, Planner, RandomResizedCrop, WholeImage
from tests.support.images import smooth_image

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def planner(num=23, size=(50, 70), geometry=None, **options):
    heights, widths = np.full(num, size[0], np.int32), np.full(num, size[1], np.int32)
    return Planner(heights, widths, geometry or RandomResizedCrop((32, 32)), **options)


def slow_random_resized_crop(height, width, numbers, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Torchvision's loop, fed with the same numbers."""
    area = height * width
    for i in range(10):
        target = area * (scale[0] + numbers[i] * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + numbers[10 + i] * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[20] * (height - h + 1)), int(numbers[21] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        h, w = height, round(height * ratio[1])
    else:
        w, h = width, height
    w, h = max(1, min(w, width)), max(1, min(h, height))
    return (height - h) // 2, (width - w) // 2, h, w


@given(size=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_random_resized_crop_is_torchvisions(size, seed):
    numbers = uniforms(seed, Stream.WINDOW, 0, [0], 22)
    window = RandomResizedCrop((8, 8)).windows(
        np.array([size[0]], float), np.array([size[1]], float), numbers
    )
    assert tuple(window[0]) == slow_random_resized_crop(*size, numbers[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (2, 3000), (5, 5)])
def test_extreme_images_have_windows_inside(size):
    heights, widths = np.full(500, float(size[0])), np.full(500, float(size[1]))
    numbers = uniforms(0, Stream.WINDOW, 0, np.arange(500), 22)
    for geometry in (RandomResizedCrop((224, 224)), CentreCrop((224, 224), 256), WholeImage((224, 224))):
        top, left, height, width = geometry.windows(heights, widths, numbers).T
        assert (height > 0).all()
        assert (width > 0).all()
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height <= size[0] + 1e-9).all()
        assert (left + width <= size[1] + 1e-9).all()


def test_distribution_of_areas_and_ratios():
    numbers = uniforms(0, Stream.WINDOW, 0, np.arange(4000), 22)
    ones = np.ones(4000)
    _, _, height, width = RandomResizedCrop((8, 8)).windows(400 * ones, 400 * ones, numbers).T
    draw = transforms.RandomResizedCrop.get_params
    reference = torch.tensor([draw(torch.empty(3, 400, 400), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    area, ratio = height * width / 400**2, width / height
    assert 0.07 < area.min() < 0.09
    assert area.max() <= 1
    assert area.mean() == pytest.approx(
        (reference[:, 2] * reference[:, 3]).double().mean().item() / 400**2, abs=0.02
    )
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (256, 256), (100, 333), (333, 50), (61, 61)])
@pytest.mark.parametrize("resize", [64, 73])
def test_centre_crop_is_torchvisions_resize_and_centre_crop(size, resize):
    image = smooth_image(*size, seed=1)
    window = CentreCrop((56, 64), resize).windows(*np.array([[size[0]], [size[1]]], float), np.empty((1, 0)))[
        0
    ]
    ours = cut(image, window, (56, 64), flip=False, crop_first=False)
    theirs = np.asarray(v2.Compose([v2.Resize(resize), v2.CenterCrop((56, 64))])(image))
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1  # Pillow rounds box coordinates to float32
    assert difference.mean() < 0.05


def test_centre_crop_refuses_a_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="resize=200"):
        CentreCrop((224, 224), 200)


def test_pad_crop_is_the_cifar_recipe():
    image = smooth_image(32, 32, seed=2)
    padded = v2.Pad(4)(image)
    numbers = uniforms(0, Stream.WINDOW, 0, np.arange(300), 2)
    windows = PadCrop((32, 32)).windows(np.full(300, 32.0), np.full(300, 32.0), numbers)
    assert {int(top) for top in windows[:, 0]} == set(range(-4, 5))
    for top, left, height, width in windows[:20].astype(int):
        expected = padded.crop((left + 4, top + 4, left + 4 + width, top + 4 + height))
        window = np.array([top, left, height, width])
        assert np.array_equal(cut(image, window, (32, 32), flip=False, crop_first=True), np.asarray(expected))


def test_cut_flips_after_the_resize():
    image = smooth_image(40, 60, seed=3)
    window = np.array([3, 5, 30, 41])
    straight = cut(image, window, (16, 16), flip=False, crop_first=True)
    expected = image.crop((5, 3, 46, 33)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(straight, np.asarray(expected))
    assert np.array_equal(cut(image, window, (16, 16), flip=True, crop_first=True), straight[:, ::-1])


@given(
    num=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_evaluation_has_each_sample_once_in_order(num, batch_size, world_size, epoch):
    ranks = [planner(num, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({p.num_steps for p in ranks}) == 1
    ids = [p.ids(epoch, step) for step in range(ranks[0].num_steps) for p in ranks]
    assert np.array_equal(np.concatenate(ids), np.arange(num))
    assert all(len(part) <= batch_size for part in ids)


@given(num=st.integers(8, 60), batch_size=st.integers(1, 4), epoch=st.integers(0, 3), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_two_ranks_see_what_one_sees(num, batch_size, epoch, seed):
    options = {"training": True, "seed": seed, "policy": RandAugment((32, 32))}
    one = planner(num, batch_size=2 * batch_size, **options)
    two = [planner(num, batch_size=batch_size, rank=r, world_size=2, **options) for r in range(2)]
    small = planner(num, batch_size=batch_size, **options)
    assert one.num_steps == two[0].num_steps == num // (2 * batch_size)
    for step in range(one.num_steps):
        whole = one.batch(epoch, step)
        for parts in (
            [p.batch(epoch, step) for p in two],
            [small.batch(epoch, 2 * step + i) for i in range(2)],
        ):
            for name in ("sample_ids", "windows", "flips"):
                assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))
            kinds = np.concatenate([part.operations.kinds for part in parts])
            assert np.array_equal(kinds, whole.operations.kinds)


def test_training_visits_each_sample_at_most_once_and_epochs_differ():
    plan = planner(23, batch_size=4, training=True)
    epochs = [np.concatenate([plan.ids(epoch, step) for step in range(plan.num_steps)]) for epoch in range(2)]
    assert all(len(set(ids)) == len(ids) == 20 for ids in epochs)
    assert not np.array_equal(*epochs)
    first, second = (plan.plan(epoch, 0, np.arange(23)) for epoch in range(2))
    assert not np.array_equal(first.windows, second.windows)
    assert not np.array_equal(first.flips, second.flips)


def test_training_positions_run_on_and_evaluation_positions_end():
    training = planner(8, batch_size=4, training=True).positions(3, 1)
    assert [next(training) for _ in range(4)] == [(3, 1), (4, 0), (4, 1), (5, 0)]
    assert list(planner(8, batch_size=4).positions(0, 1)) == [(0, 1)]


def test_shuffled_evaluation_is_a_permutation_by_epoch():
    plan = planner(23, batch_size=4, shuffle=True)
    epochs = [np.concatenate([plan.ids(epoch, step) for step in range(plan.num_steps)]) for epoch in range(2)]
    assert all(sorted(ids) == list(range(23)) for ids in epochs)
    assert not np.array_equal(*epochs)


def test_the_order_of_an_epoch_is_computed_once(monkeypatch):
    """Although one reader is in the next epoch while another is in this one."""
    computed = []
    permutation = plan_module.permutation
    monkeypatch.setattr(
        plan_module, "permutation", lambda *place: computed.append(place[1]) or permutation(*place)
    )
    sizes = np.full(40, 8, np.int32)
    planner = Planner(sizes, sizes, RandomResizedCrop((8, 8)), batch_size=4, training=True)
    ahead, consumer = planner.positions(0, 0), planner.positions(0, 0)
    for _ in range(4):
        planner.ids(*next(ahead))
    for _ in range(26):
        place = next(ahead)
        planner.ids(*place)
        ids = planner.ids(*next(consumer))
    assert computed == [0, 1, 2]
    assert ids.tolist() == permutation(0, 2, 40)[20:24].tolist()


def test_too_few_samples_for_a_global_batch():
    with pytest.raises(ValueError, match=r"batch_size=4: .* 5 samples"):
        planner(5, batch_size=4, training=True, world_size=2)
