"""Images of heat-maps: colours that mean something, pages with everything on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from explainers.plots import Panel, overlay, save_grid, save_image, scaled, to_image


def test_scaling_keeps_zero_and_resists_one_bright_pixel() -> None:
    heatmap = np.full((20, 20), 0.5)
    heatmap[0, 0] = 1000
    assert scaled(heatmap, signed=False)[5, 5] == 1
    signed = np.array([[-2.0, 0.0, 1.0]])
    np.testing.assert_allclose(scaled(signed, signed=True), [[-1, 0, 0.5]], atol=0.02)
    np.testing.assert_allclose(scaled(signed, signed=False), [[0, 0, 1]], atol=0.02)
    assert not scaled(np.zeros((3, 3)), signed=True).any()
    assert np.isfinite(scaled(np.array([[np.nan, np.inf, 1.0]]), signed=True)).all()
    one = np.zeros((30, 30))
    one[3, 3] = 2  # the percentile is 0: the maximum scales
    assert scaled(one, signed=False)[3, 3] == 1


def test_colours_tell_for_from_against_and_zero_shows_the_image() -> None:
    image = np.full((1, 3, 3), 0.5)
    shown = overlay(image, np.array([[-1.0, 0.0, 1.0]]), signed=True)
    assert shown[0, 0, 2] > shown[0, 0, 0] + 0.2  # against: blue
    assert shown[0, 2, 0] > shown[0, 2, 2] + 0.2  # for: red
    np.testing.assert_allclose(shown[0, 1], 0.5)
    shown = overlay(image, np.array([[0.0, 0.5, 1.0]]), signed=False)
    np.testing.assert_allclose(shown[0, 0], 0.5)
    assert shown[0, 2].sum() > shown[0, 1].sum()
    assert ((shown >= 0) & (shown <= 1)).all()


def test_normalisation_is_undone() -> None:
    image = np.zeros((3, 2, 2))
    np.testing.assert_allclose(to_image(image, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))[0, 0], [0.1, 0.2, 0.3])
    assert to_image(image + 10, (0.1,) * 3, (0.5,) * 3).max() == 1


def test_files_are_written(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((8, 8, 3))
    save_image(tmp_path / "a.png", image)
    stored = np.asarray(Image.open(tmp_path / "a.png")) / 255
    np.testing.assert_allclose(stored, image, atol=0.003)
    heatmap = image[..., 0] - 0.5
    rows = [
        [Panel("cat 98 %", image), Panel("lrp", image, heatmap, True), Panel("gradcam", image, heatmap)]
        for _ in range(2)
    ]
    save_grid(tmp_path / "page.png", rows, title="two images")
    with Image.open(tmp_path / "page.png") as page:
        width, height = page.size
        pixels = np.asarray(page.convert("RGB"))
    assert width > 3 * 1.7 * 110
    assert height > 2 * 1.7 * 110
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    save_grid(tmp_path / "plain.png", [[Panel("only an image", image)]])
    assert (tmp_path / "plain.png").stat().st_size > 1000
