"""`python -m explainers plot-casm`: pictures, what the mask keeps and removes, inpainted, and the mask, as published.

    python -m explainers plot-casm DATA --casm-path CASMS/L100/checkpoint.pth.tar --plots-path plots --columns 7

Rows: picture, masked in, masked out, masked out and inpainted, mask (Żołna et al. 2020, figure 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from explainers.casm.files import casm_networks
from explainers.casm.model import casm_name
from explainers.casm.modify import binarised, modified
from explainers.inpaint import import_opencv
from explainers.job import PictureConfig, check_writable, input_preset, open_split, picture_loader
from explainers.plots import Picture, to_picture
from image_classification.cli import parse_config
from image_classification.config import check, flag
from image_classification.data.build import ReadConfig
from image_classification.data.dataset import Preset
from image_classification.data.progress import progress_bar
from image_classification.distributed import DistributedConfig, setup_distributed

#: Grey of what is taken out, as published.
GREY = 0.35
ROWS = ("picture", "masked in", "masked out", "inpainted", "mask")
_CELL_INCHES = 1.25


@dataclasses.dataclass(kw_only=True)
class PlotConfig:
    """What is drawn"""

    casm_path: Path | None = flag(None, "--casm-path", metavar="FILE", help="the saliency mapping")
    plots_path: Path | None = flag(None, "--plots-path", metavar="DIR", help="folder of the pages")
    columns: int = flag(7, "--columns", help="pictures per page")

    def __post_init__(self) -> None:
        check(self.casm_path is not None, "--casm-path is missing: give the file of a saliency mapping")
        check(self.plots_path is not None, "--plots-path is missing: give the folder to write pages into")
        check(self.columns >= 1, f"--columns {self.columns}: a page needs at least 1 picture")


@dataclasses.dataclass(kw_only=True)
class PlottedConfig(PictureConfig):
    """Which pictures, and how they are cut."""

    num_pictures: int | None = flag(
        28, "--num-pictures", "-n", parse=int, help="draw so many pictures, drawn once and for all"
    )
    annotation_path: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run the verb; see the module's text."""
    sections = {
        "plot": PlotConfig, "pictures": PlottedConfig, "data": ReadConfig, "distributed": DistributedConfig,
    }  # fmt: skip
    configs = parse_config(
        sections, argv, prog="python -m explainers plot-casm", description="Pages of saliency masks (CASM)."
    )
    plot, data = configs["plot"], configs["data"]
    with setup_distributed(configs["distributed"]) as distributed:
        check_writable(plot.plots_path, "--plots-path")
        import_opencv()
        dataset, manifest = open_split(data, configs["pictures"], distributed)
        (network,) = casm_networks([plot.casm_path], data, dataset, distributed.device)
        preset = input_preset(data, dataset, [network])
        loader = picture_loader(manifest, preset, data, configs["pictures"], distributed)
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
            print(f"{len(manifest):,} pictures drawn in {plot.plots_path}")
    return 0


def columns_of(images: Tensor, masks: Tensor, preset: Preset) -> list[list[Picture]]:
    """The five cells of each picture, as `ROWS` has them, each (S, S, 3) in [0, 1].

    Args:
        images: (N, 3, S, S), normalised.
        masks: (N, 1, S, S) in [0, 1].
        preset: Of the normalisation.
    """
    kept = binarised(masks)
    painted = modified(images, kept, "inpainted", preset.mean, preset.std)
    columns = []
    for image, mask, binary, filled in zip(images, masks, kept, painted, strict=True):
        picture = to_picture(image.float().cpu().numpy(), preset.mean, preset.std)
        inside = binary[0].cpu().numpy()[..., None]
        columns.append(
            [
                picture,
                np.where(inside, picture, GREY),
                np.where(inside, GREY, picture),
                to_picture(filled.float().cpu().numpy(), preset.mean, preset.std),
                np.repeat(mask[0].float().cpu().numpy()[..., None], 3, axis=2),
            ]
        )
    return columns


def save_page(path: Path, columns: Sequence[Sequence[Picture]], title: str, num_columns: int) -> None:
    """Write a page; shorter ones keep the size of their cells."""
    figure = Figure(figsize=(num_columns * _CELL_INCHES + 0.35, len(ROWS) * _CELL_INCHES + 0.3), dpi=130)
    FigureCanvasAgg(figure)
    height, width = figure.get_figheight(), figure.get_figwidth()
    grid = figure.add_gridspec(
        len(ROWS), num_columns, left=0.3 / width, right=1 - 0.05 / width, bottom=0.05 / height, top=1 - 0.25 / height,
        wspace=0.03, hspace=0.03,
    )  # fmt: skip
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
    figure.savefig(path)
