"""`python -m explainers attribute`: heat-maps of images as .npy and as overlays, and pages of them.

    python -m explainers attribute shapes --checkpoint m.pth.tar --method gradcam --method lrp --output maps/ -n 40

writes `maps/gradcam/<image>.npy` and `.png` for each image, and `maps/page-000000.png`, ….
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from torch import Tensor

from explainers.attribution.method import Attribution, Prepared
from explainers.differentiable.explanation import EXPLAINED, ExplainedClass
from explainers.plots import Panel, Pixels, overlay, save_grid, save_image, to_image
from explainers.verbs.attribution_job import (
    ImagesJob,
    Network,
    NetworkConfig,
    check_writable,
    image_loader,
    open_networks,
    open_split,
)
from explainers.verbs.method_flags import MethodConfig, method_config
from image_classification.config import check, flag, section
from image_classification.data.dataset import Preset
from image_classification.data.loader import Batch
from image_classification.data.manifest import Manifest
from image_classification.data.progress import progress_bar
from image_classification.file_writing import atomic_file
from image_classification.joining import setup_distributed
from image_classification.verbs import configured


@dataclasses.dataclass(kw_only=True)
class OutputConfig:
    """What is written."""

    output: str = flag("maps", "--output", "-o", metavar="DIR", help="folder for maps and pages")
    explain: ExplainedClass = flag(
        EXPLAINED,
        "--explain",
        help="the class to explain: the network's prediction, or the image's label (the first of several)",
    )
    rows: int = flag(8, "--rows", help="images per page")
    files: bool = flag(
        True, "--files", help="write a .npy and a .png per image and method, in addition to the pages"
    )

    def __post_init__(self) -> None:
        check(self.rows >= 1, f"--rows {self.rows}: a page needs at least 1 image")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeConfig(ImagesJob):
    """Configuration of `attribute`."""

    network: NetworkConfig = section(NetworkConfig)
    method: MethodConfig = section(method_config())
    output: OutputConfig = section(OutputConfig)


def run(configs: AttributeConfig) -> int:
    """Run the verb; see the module docstring."""
    check(
        len(configs.network.checkpoint) == 1,
        "--checkpoint: attribute explains one network; `localize` compares several",
    )
    output = Path(configs.output.output)
    with setup_distributed(configs.distributed) as distributed:
        check_writable(output, "--output")
        data = configs.data
        dataset, manifest = open_split(data, configs.images, distributed)
        (network,), preset, example = open_networks(configs.network, data, dataset, distributed.device)
        prepared = network.prepare(configs.method.methods(), example)
        writer = _Writer(output, configs.output, manifest, preset)
        loader = image_loader(manifest, preset, data, configs.images, distributed)
        share = math.ceil(len(manifest) / distributed.world_size)
        with loader, progress_bar("explaining", share, distributed.is_main) as advance:
            for batch in loader:
                if len(batch):
                    writer.write(batch, network, prepared)
                    advance(len(batch))
        distributed.barrier()
        if distributed.is_main:
            print(f"{len(manifest):,} images explained in {output}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Explained:
    """One image of a batch with its maps by method."""

    sample_id: int
    image: Pixels
    title: str
    maps: dict[str, tuple[np.ndarray, bool]]


class _Writer:
    """Writes the maps of batches.

    Args:
        folder: Output folder.
        config: What to write.
        manifest: Names of images and classes.
        preset: Normalisation to undo for display.
    """

    def __init__(self, folder: Path, config: OutputConfig, manifest: Manifest, preset: Preset) -> None:
        self.folder = folder
        self.config = config
        self.manifest = manifest
        self.preset = preset

    def write(self, batch: Batch, network: Network, prepared: dict[str, Prepared]) -> None:
        """Explain a batch and write files and pages."""
        logits = network.predict(batch.images)
        targets = self._targets(batch, logits)
        results = {name: method(batch.images, targets) for name, method in prepared.items()}
        explained = list(self._explained(batch, logits, targets, results))
        if self.config.files:
            for entry in explained:
                self._write_files(entry)
        for begin in range(0, len(explained), self.config.rows):
            self._write_page(explained[begin : begin + self.config.rows])

    def _targets(self, batch: Batch, logits: Tensor) -> Tensor:
        """Return the class to explain for each image, (B,)."""
        if self.config.explain == "predicted":
            return logits.argmax(1)
        return batch.targets if batch.targets.dim() == 1 else batch.targets.argmax(1)

    def _explained(
        self, batch: Batch, logits: Tensor, targets: Tensor, results: dict[str, Attribution]
    ) -> Iterator[_Explained]:
        many = self.manifest.targets.multi_label
        chances = (logits.sigmoid() if many else logits.softmax(1)).gather(1, targets[:, None])[:, 0].tolist()
        arrays = {name: (result.map.cpu().numpy(), result.signed) for name, result in results.items()}
        names = self.manifest.class_names
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            target = int(targets[row])
            truth = batch.targets[row].cpu()
            labels = [int(truth)] if truth.dim() == 0 else truth.gt(0.5).nonzero()[:, 0].tolist()
            mark = "" if target in labels else f"\n(labelled {', '.join(names[label] for label in labels)})"
            title = f"{names[target]} {100 * chances[row]:.0f} %{mark}"
            image = to_image(batch.images[row].float().cpu().numpy(), self.preset.mean, self.preset.std)
            maps = {name: (values[row], signed) for name, (values, signed) in arrays.items()}
            yield _Explained(sample_id, image, title, maps)

    def _write_files(self, entry: _Explained) -> None:
        relative = PurePosixPath(self.manifest.paths[entry.sample_id])
        for method, (heatmap, signed) in entry.maps.items():
            # The suffix stays, so that images of the same name and different formats get different files.
            path = self.folder / method / relative
            with atomic_file(path.with_name(f"{path.name}.npy")) as file:
                np.save(file, heatmap)
            save_image(path.with_name(f"{path.name}.png"), overlay(entry.image, heatmap, signed))

    def _write_page(self, entries: Sequence[_Explained]) -> None:
        rows = []
        for entry in entries:
            maps = [
                Panel(name, entry.image, heatmap, signed) for name, (heatmap, signed) in entry.maps.items()
            ]
            rows.append([Panel(entry.title, entry.image), *maps])
        save_grid(self.folder / f"page-{entries[0].sample_id:06d}.png", rows)


VERB = configured(AttributeConfig, run)
