"""Damaged, foreign and odd files: one behaviour on every backend."""

from __future__ import annotations

import logging
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_classification.config import SettingError
from image_classification.data import decode
from image_classification.data.backends import dali
from image_classification.data.backends.dali import dali_loader
from image_classification.data.bad_samples import BadSampleError, BadSamples
from image_classification.data.decode import UnreadableError, cut, open_image
from image_classification.data.imagefile import Header
from image_classification.data.plan import CentreCrop, RandomResizedCrop, WholeImage
from tests.support.images import (
    loader_of,
    manifest_of,
    smooth_image,
    to_levels,
    varied_sizes,
    write_jpegs,
    write_png16,
)

needs_dali = pytest.mark.skipif(not dali.is_available(), reason="DALI is not installed")
BACKENDS = ["pytorch", "resident", pytest.param("dali-cpu", marks=needs_dali)]
BAD = 5


def damage(path, kind):
    """Turn a JPEG into a bad file."""
    data = path.read_bytes()
    contents = {
        "truncated": data[: len(data) // 2],
        "cut at the end": data[: -len(data) // 50],
        "header only": data[:250],
        "empty": b"",
        "random bytes": np.random.default_rng(0).bytes(3000),
        "text": b"not an image\n" * 40,
    }
    if kind == "missing":
        path.unlink()
    elif kind == "gif":
        smooth_image(50, 60, 0).save(path, format="GIF")
    elif kind == "truncated png":
        smooth_image(50, 60, 0).save(path, format="PNG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(contents[kind])


KINDS = [
    "truncated",
    "cut at the end",
    "header only",
    "empty",
    "random bytes",
    "text",
    "missing",
    "gif",
    "truncated png",
]


def damaged_manifest(root, kind, *, after_scan):
    """Twelve images of which number 5 is bad, found by the scan or only afterwards."""
    names = write_jpegs(root, varied_sizes(12, seed=3))
    if after_scan:
        manifest = manifest_of(root, names)
        damage(root / names[BAD], kind)
        return manifest
    damage(root / names[BAD], kind)
    return manifest_of(root, names)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("after_scan", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_stop_names_the_file_and_the_flag(tmp_path, backend, kind, after_scan):
    manifest = damaged_manifest(tmp_path, kind, after_scan=after_scan)
    ids = []
    with (
        loader_of(manifest, backend, CentreCrop((32, 32), 40), batch_size=3) as loader,
        pytest.raises(BadSampleError, match=r"0005\.jpg .* `on_bad_sample` substitute"),
    ):
        for batch in loader:
            ids += batch.sample_ids.tolist()
    assert ids == [0, 1, 2]  # what comes before is delivered


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("after_scan", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_substitute_takes_the_next_sample(tmp_path, backend, kind, after_scan, caplog):
    manifest = damaged_manifest(tmp_path, kind, after_scan=after_scan)
    with (
        caplog.at_level(logging.WARNING),
        loader_of(
            manifest, backend, CentreCrop((32, 32), 40), batch_size=3, on_bad_sample="substitute"
        ) as loader,
    ):
        for _ in range(2):
            batches = [(batch.sample_ids, batch.images.clone(), batch.targets) for batch in loader]
            assert torch.cat([ids for ids, _, _ in batches]).tolist() == [
                0,
                1,
                2,
                3,
                4,
                6,
                6,
                7,
                8,
                9,
                10,
                11,
            ]
            assert torch.equal(batches[1][1][2], batches[2][1][0])
            assert batches[1][2][2] == 6 % 4
        assert loader.num_substituted == 2
    named = [record for record in caplog.records if "0005.jpg cannot be read" in record.getMessage()]
    assert len(named) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_substitutes_in_training_are_cut_as_themselves(tmp_path, backend):
    """An image that stands in for another one has the window that it has for itself in that epoch."""
    manifest = damaged_manifest(tmp_path, "truncated", after_scan=True)
    options = {"batch_size": 6, "training": True, "on_bad_sample": "substitute", "seed": 4}
    with loader_of(manifest, backend, RandomResizedCrop((24, 24)), **options) as loader:
        for epoch in range(2):
            batches = [(batch.sample_ids, to_levels(batch.images)) for batch in loader]
            ids, images = torch.cat([ids for ids, _ in batches]), torch.cat([images for _, images in batches])
            assert sorted(ids.tolist()) == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]
            plan = loader.planner.plan(epoch, 0, np.array([BAD + 1]))
            decoded = open_image(manifest.path(BAD + 1))
            expected = cut(decoded, plan.windows[0], (24, 24), flip=bool(plan.flips[0]), crop_first=True)
            for image in images[ids == BAD + 1]:
                assert (image - torch.from_numpy(expected.copy()).permute(2, 0, 1)).abs().max() < 2.1
        assert loader.num_substituted == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_that_are_all_bad(tmp_path, backend):
    names = write_jpegs(tmp_path, varied_sizes(6, seed=3))
    manifest = manifest_of(tmp_path, names)
    for i in (3, 4, 5):
        damage(tmp_path / names[i], ("truncated", "empty", "missing")[i - 3])
    with loader_of(manifest, backend, WholeImage((8, 8)), batch_size=6, on_bad_sample="substitute") as loader:
        (batch,) = loader
    assert batch.sample_ids.tolist() == [0, 1, 2, 0, 0, 0]
    assert loader.num_substituted == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_can_be_read(tmp_path, backend):
    names = write_jpegs(tmp_path, varied_sizes(3))
    manifest = manifest_of(tmp_path, names)
    for name in names:
        damage(tmp_path / name, "empty")
    with (
        loader_of(manifest, backend, WholeImage((8, 8)), workers=0, on_bad_sample="substitute") as loader,
        pytest.raises(BadSampleError, match="3 images"),
    ):
        list(loader)


@needs_dali
@pytest.mark.parametrize("kind", ["truncated", "empty", "missing", "gif"])
def test_a_pipeline_that_fails_is_replaced(tmp_path, kind, monkeypatch):
    """Should a file get past the first look, DALI's own failure costs no sample."""
    monkeypatch.setattr(dali_loader, "read_header", lambda path: Header(1, 1, 1, True))
    manifest = damaged_manifest(tmp_path, kind, after_scan=True)
    with (
        loader_of(
            manifest, "dali-cpu", WholeImage((32, 32)), batch_size=2, on_bad_sample="substitute"
        ) as loader,
        loader_of(
            manifest, "pytorch", WholeImage((32, 32)), batch_size=2, workers=0, on_bad_sample="substitute"
        ) as reference,
    ):
        for _ in range(2):
            for batch, expected in zip(loader, reference, strict=True):
                assert torch.equal(batch.sample_ids, expected.sample_ids)
                assert (to_levels(batch.images) - to_levels(expected.images)).abs().max() < 2.1
        assert loader.num_substituted == reference.num_substituted == 2


def test_a_file_that_changed_since_the_scan(tmp_path):
    names = write_jpegs(tmp_path, [(50, 60), (50, 60)])
    manifest = manifest_of(tmp_path, names)
    smooth_image(20, 30, 1).save(tmp_path / names[1])
    with (
        loader_of(manifest, "pytorch", WholeImage((8, 8)), workers=0) as loader,
        pytest.raises(BadSampleError, match=r"0001\.jpg .* 20×30 pixels"),
    ):
        list(loader)


def odd_files(root):
    """Unusual images that every backend must read, all named .JPEG."""
    base = smooth_image(60, 80, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90°", which nobody does
    grey = np.asarray(base.convert("L")).astype(np.uint16)
    rng = np.random.default_rng(0)
    base.convert("CMYK").save(root / "cmyk.JPEG")
    base.convert("L").save(root / "grey.JPEG")
    base.save(root / "progressive.JPEG", progressive=True)
    base.save(root / "444.JPEG", subsampling=0)
    base.save(root / "turned.JPEG", exif=exif)
    base.save(root / "png.JPEG", format="PNG")
    base.save(root / "webp.JPEG", format="WEBP", quality=90)
    base.save(root / "bmp.JPEG", format="BMP")
    base.quantize(32).save(root / "palette.JPEG", format="PNG")
    with_alpha = base.convert("RGBA")
    with_alpha.putalpha(Image.fromarray(rng.integers(0, 256, (60, 80), dtype=np.uint8)))
    with_alpha.save(root / "rgba.JPEG", format="PNG")
    write_png16(root / "grey16.JPEG", grey * 257)
    write_png16(root / "rgb16.JPEG", np.asarray(base).astype(np.uint16) * 257)
    Image.new("RGB", (1, 1), (9, 99, 200)).save(root / "pixel.JPEG", quality=95)
    smooth_image(3, 20_000, 5).save(root / "long.JPEG")
    base.save(root / "trailing.JPEG")
    (root / "trailing.JPEG").write_bytes((root / "trailing.JPEG").read_bytes() + b"more" * 500)
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_odd_files_agree(tmp_path, backend, training):
    names = odd_files(tmp_path)
    if backend == "resident":
        names.remove("long.JPEG")  # all images would be padded to its size
    manifest = manifest_of(tmp_path, names)
    geometry = RandomResizedCrop((24, 24)) if training else CentreCrop((24, 24), 28)
    options = {"batch_size": len(names), "training": training}
    with (
        loader_of(manifest, backend, geometry, **options) as loader,
        loader_of(manifest, "pytorch", geometry, workers=0, **options) as reference,
    ):
        for batch, expected in zip(loader, reference, strict=True):
            difference = (to_levels(batch.images) - to_levels(expected.images)).abs()
            largest = difference.amax(dim=(1, 2, 3))
            assert dict(
                zip([names[i] for i in batch.sample_ids], largest.tolist(), strict=True)
            ) == pytest.approx(dict.fromkeys([names[i] for i in batch.sample_ids], 0.0), abs=2.1)
        assert loader.num_substituted == 0


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    write_png16(tmp_path / "a.png", values)
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert np.abs(pixels[..., 0] - values / 257.0).max() <= 0.5


def test_threads_that_decode_leave_the_warnings_as_they_were(tmp_path, monkeypatch):
    """Pillow's warnings are ignored while an image is decoded; the second of two that overlap ends last."""
    inside, going_on = ([threading.Event(), threading.Event()] for _ in range(2))
    whole = decode.stored_size

    def waiting(image):
        number = int(Path(image.filename).stem)
        inside[number].set()
        going_on[number].wait(60)
        return whole(image)

    monkeypatch.setattr(decode, "stored_size", waiting)
    before = list(warnings.filters)
    threads = []
    for number in range(2):
        path = tmp_path / f"{number}.png"
        smooth_image(20, 20, number).save(path)
        threads.append(threading.Thread(target=open_image, args=(path,)))
        threads[-1].start()
        inside[number].wait(60)
    for thread, event in zip(threads, going_on, strict=True):
        event.set()
        thread.join()
    assert list(warnings.filters) == before


def test_reasons(tmp_path):
    smooth_image(20, 20, 0).save(tmp_path / "a.gif")
    with pytest.raises(UnreadableError, match="format"):
        open_image(tmp_path / "a.gif")
    with pytest.raises(UnreadableError, match=r"b\.jpg"):
        open_image(tmp_path / "b.jpg")


def test_unknown_policy(tmp_path):
    manifest = manifest_of(tmp_path, write_jpegs(tmp_path, [(40, 40)]))
    with pytest.raises(ValueError, match="on_bad_sample='skip'"):
        BadSamples(manifest, "skip")


class BrokenPipeline:
    """Fails for another reason than a file."""

    def __init__(self, message: str) -> None:
        self.message = message

    def build(self) -> None:
        pass

    def feed_input(self, name: str, value: object) -> None:
        pass

    def schedule_run(self) -> None:
        raise RuntimeError(self.message)


@needs_dali
@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (
            "[/opt/dali/alloc.cc] CUDA allocation failed: out of memory",
            torch.OutOfMemoryError,
            "DALI: .*out of memory",
        ),
        ("CUDA runtime API error cudaErrorIllegalAddress (700)", RuntimeError, "cudaErrorIllegalAddress"),
        (
            "Internal error of the executor",
            SettingError,
            "data_backend='dali-cpu'.*Internal error of the executor.*pytorch",
        ),
    ],
)
def test_failures_that_are_no_files_fault_end_the_job(tmp_path, monkeypatch, message, kind, words):
    """They are neither taken for bad files nor survived for ever, pipeline after pipeline."""
    built: list[BrokenPipeline] = []

    def make() -> BrokenPipeline:
        built.append(BrokenPipeline(message))
        return built[-1]

    monkeypatch.setattr("nvidia.dali.pipeline_def", lambda **options: lambda graph: make)
    manifest = manifest_of(tmp_path, write_jpegs(tmp_path, [(40, 50)] * 24))
    with (
        loader_of(
            manifest, "dali-cpu", WholeImage((32, 32)), batch_size=2, on_bad_sample="substitute"
        ) as loader,
        pytest.raises(kind, match=words),
    ):
        list(loader)
    assert len(built) <= 16
    assert loader.num_substituted == 0


@needs_dali
def test_buffers_are_made_for_usual_images(tmp_path):
    manifest = manifest_of(tmp_path, write_jpegs(tmp_path, [(40, 50)] * 3))
    manifest.heights[1], manifest.widths[1] = 65500, 65500  # a header that lies
    loader = loader_of(manifest, "dali-cpu", WholeImage((32, 32)), batch_size=2)
    assert dali_loader.usual_largest(manifest, ~loader.samples.known) == (40, 50)


@needs_dali
def test_what_a_gpu_decodes_with(tmp_path, monkeypatch):
    """The chroma filter of the CPU's decoders, and buffers of the usual size: asked for, without a GPU to do it."""
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(dali_loader, "build_graph", lambda *of, decoding, **more: asked.append(decoding))
    monkeypatch.setattr(
        "nvidia.dali.pipeline_def",
        lambda **options: lambda graph: lambda: (graph(), BrokenPipeline("CUDA error"))[1],
    )
    manifest = manifest_of(tmp_path, write_jpegs(tmp_path, [(40, 50)] * 4))
    with (
        loader_of(manifest, "dali-cpu", WholeImage((32, 32)), batch_size=2) as loader,
        pytest.raises(RuntimeError, match="CUDA error"),
    ):
        loader.gpu = True
        list(loader)
    (decoding,) = asked
    assert decoding["device"] == "mixed"
    assert decoding["jpeg_fancy_upsampling"] is True
    assert (decoding["preallocate_height_hint"], decoding["preallocate_width_hint"]) == (40, 50)
