"""`python -m explainers plot-casm`: pages of images, their masked-in, masked-out and inpainted versions, and the masks,
as published.

    python -m explainers plot-casm DATA --casm-path CASMS/L100/checkpoint.pth.tar --plots-path plots --columns 7

Rows: image, masked in, masked out, masked out and inpainted, mask (Żołna et al. 2020, figure 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from explainers.casm.casm_paths import casm_name, casm_networks
from explainers.casm.inpaint import import_opencv
from explainers.casm.modify import binarised, modified
from explainers.plots import Pixels, to_image
from explainers.verbs.attribution_job import (
    ImageConfig,
    ImagesJob,
    check_writable,
    image_loader,
    input_preset,
    open_split,
)
from image_classification.config import check, flag, section
from image_classification.data.dataset import Preset
from image_classification.data.progress import progress_bar
from image_classification.extras import optional_import
from image_classification.figure_writing import save_figure
from image_classification.joining import setup_distributed
from image_classification.verbs import configured

with optional_import():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

#: Grey value of removed pixels, as published.
GREY = 0.35
ROWS = ("image", "masked in", "masked out", "inpainted", "mask")
_CELL_INCHES = 1.25


@dataclasses.dataclass(kw_only=True)
class PlotConfig:
    """What is drawn"""

    casm_path: Path = flag(None, "--casm-path", metavar="FILE", help="the saliency mapping")
    plots_path: Path = flag(None, "--plots-path", metavar="DIR", help="folder of the pages")
    columns: int = flag(7, "--columns", help="images per page")

    def __post_init__(self) -> None:
        check(self.casm_path is not None, "--casm-path is missing: give the file of a saliency mapping")
        check(self.plots_path is not None, "--plots-path is missing: give the folder to write pages into")
        check(self.columns >= 1, f"--columns {self.columns}: a page needs at least 1 image")


@dataclasses.dataclass(kw_only=True)
class PlottedConfig(ImageConfig):
    """Which images, and how they are cut."""

    num_images: int | None = flag(
        28,
        "--num-images",
        "--num-pictures",
        "-n",
        parse=int,
        help="number of images to draw, the same random ones every time",
    )
    annotation_path: str | None = None
    pot: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotCasmConfig(ImagesJob):
    """Configuration of `plot-casm`."""

    plot: PlotConfig = section(PlotConfig)
    images: PlottedConfig = section(PlottedConfig)


def run(configs: PlotCasmConfig) -> int:
    """Run the verb; see the module docstring."""
    plot, data = configs.plot, configs.data
    with setup_distributed(configs.distributed) as distributed:
        check_writable(plot.plots_path, "--plots-path")
        import_opencv()
        dataset, manifest = open_split(data, configs.images, distributed)
        (network,) = casm_networks([plot.casm_path], data, dataset, distributed.device)
        preset = input_preset(data, dataset, [network])
        loader = image_loader(manifest, preset, data, configs.images, distributed)
        share = math.ceil(len(manifest) / distributed.world_size)
        with loader, progress_bar("drawing", share, distributed.is_main) as advance:
            for batch in loader:
                if not len(batch):
                    continue
                with torch.inference_mode():
                    masks = network.casm(batch.images)[1]
                for begin in range(0, len(batch), plot.columns):
                    part = slice(begin, begin + plot.columns)
                    columns = columns_of(batch.images[part], masks[part], preset)
                    path = plot.plots_path / f"page-{int(batch.sample_ids[begin]):06d}.png"
                    save_page(path, columns, casm_name(plot.casm_path), plot.columns)
                advance(len(batch))
        distributed.barrier()
        if distributed.is_main:
            print(f"{len(manifest):,} images drawn in {plot.plots_path}")
    return 0


def columns_of(images: Tensor, masks: Tensor, preset: Preset) -> list[list[Pixels]]:
    """Return the five cells of each image, in the order of `ROWS`, each (S, S, 3) in [0, 1].

    Args:
        images: (N, 3, S, S), normalised.
        masks: (N, 1, S, S) in [0, 1].
        preset: Preset that holds the normalisation.
    """
    kept = binarised(masks)
    painted = modified(images, kept, "inpainted", preset.mean, preset.std)
    columns = []
    for image, mask, binary, filled in zip(images, masks, kept, painted, strict=True):
        pixels = to_image(image.float().cpu().numpy(), preset.mean, preset.std)
        inside = binary[0].cpu().numpy()[..., None]
        columns.append(
            [
                pixels,
                np.where(inside, pixels, GREY),
                np.where(inside, GREY, pixels),
                to_image(filled.float().cpu().numpy(), preset.mean, preset.std),
                np.repeat(mask[0].float().cpu().numpy()[..., None], 3, axis=2),
            ]
        )
    return columns


def save_page(path: Path, columns: Sequence[Sequence[Pixels]], title: str, num_columns: int) -> None:
    """Write a page; shorter pages keep the cell size."""
    figure = Figure(figsize=(num_columns * _CELL_INCHES + 0.35, len(ROWS) * _CELL_INCHES + 0.3), dpi=130)
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    width = figure.get_figwidth()
    grid = figure.add_gridspec(
        len(ROWS),
        num_columns,
        left=0.3 / width,
        right=1 - 0.05 / width,
        bottom=0.05 / height,
        top=1 - 0.25 / height,
        wspace=0.03,
        hspace=0.03,
    )
    for row, name in enumerate(ROWS):
        for column, cells in enumerate(columns):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(cells[row], vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column == 0:
                axes.set_ylabel(name, fontsize=8)
    figure.suptitle(title, fontsize=9, y=1 - 0.06 / height, va="top")
    save_figure(figure, path)


VERB = configured(PlotCasmConfig, run)
