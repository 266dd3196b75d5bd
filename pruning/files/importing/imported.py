"""The result of an import, and saving it: networks, a selector, a saliency mapping, each in LucidPrune's format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from explainers.aem import MaskGeometry, Selector
from explainers.aem.predictor import PredictorRecord, describe_predictor, save_predictor
from explainers.aem.saved_selector import SELECTOR_RECORD, save_selector, selector_record
from explainers.casm import Casm, save_casm
from image_classification.checkpoint import save_atomically
from image_classification.checkpoint_format import FORMAT
from image_classification.models import arch_info, identity_of, remember_input
from image_classification.plain_data import Plain
from pruning.files.saved_network import save_pruned

_ENDINGS = (".pth.tar", ".pth", ".pt", ".chk")


@dataclasses.dataclass
class Imported:
    """Parts of a published file as LucidPrune objects.

    Attributes:
        format: Name of the published format.
        networks: Role ("classifier", "predictor", "encoder") to network, in evaluation mode.
        selector: The selector's decoder, if the file has one.
        selector_of: Role of the network that the selector explains; None if the file does not contain the whole
            network.
        selector_arch: Architecture of its encoder.
        mask_kind: "rbf" or "real-x", the masks that the predictor judges.
        geometry: Geometry of these masks.
        casm: Classifier and saliency decoder, if the file has one.
        facts: Epoch, iteration, best figure, as plain data.
        remarks: Notes for the user.
    """

    format: str
    networks: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    selector: Selector | None = None
    selector_of: str | None = None
    selector_arch: str | None = None
    mask_kind: str = "rbf"
    geometry: MaskGeometry | None = None
    casm: Casm | None = None
    facts: Plain = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)

    def save(self, out: str | Path) -> dict[str, Path]:
        """Write every part; the classifier (or the only part) gets the name `out`, the others get names derived from
        it.

        Returns:
            Part to file.

        Raises:
            OSError: A file cannot be written.
        """
        out = Path(out)
        for network in self.networks.values():
            remember_input(network, arch_info(arch_of(network)).network_input)
        paths = dict(_named(out, [*self.networks, *(["selector"] if self.selector else [])]))
        record = {"format": self.format, **self.facts}
        for role, network in self.networks.items():
            if self.casm is not None and network is self.casm.classifier:
                save_casm(paths[role], self.casm)
            elif role == "predictor" and self.geometry is not None and "classifier" in self.networks:
                save_predictor(paths[role], network, self._predictor_record(self.geometry))
            else:
                save_pruned(paths[role], network, imported=record)
        if self.selector is not None:
            self._save_selector(paths["selector"])
        return paths

    def _predictor_record(self, geometry: MaskGeometry) -> PredictorRecord:
        box = self.networks["classifier"]
        identity = identity_of(box)
        assert identity is not None
        return describe_predictor(box, self.mask_kind, geometry, identity.num_classes)

    def _save_selector(self, path: Path) -> None:
        assert self.selector is not None
        if self.selector_of is not None:
            save_selector(path, self.selector, self.networks[self.selector_of])
            return
        unknown = selector_record(self.selector, nn.Module(), digest="") | {
            "arch": self.selector_arch,
            "digest": None,
        }
        content = {
            "format": FORMAT,
            "arch": self.selector_arch,
            "structure": None,
            "state_dict": self.selector.state_dict(),
            "callbacks": {SELECTOR_RECORD: unknown},
        }
        save_atomically(content, path)


def _named(out: Path, roles: list[str]) -> Iterator[tuple[str, Path]]:
    ending = next((ending for ending in _ENDINGS if out.name.endswith(ending)), "")
    stem = out.name.removesuffix(ending)
    main = "classifier" if "classifier" in roles else roles[0]
    for role in roles:
        yield role, out if role == main else out.with_name(f"{stem}-{role}{ending}")


def arch_of(network: nn.Module) -> str:
    """Return the name that a network was built by."""
    identity = identity_of(network)
    assert identity is not None
    return identity.arch


def facts_of(content: object, keys: tuple[str, ...]) -> Plain:
    """Return the entries of a published file that are plain numbers or words."""
    found: Plain = {}
    if not isinstance(content, Mapping):
        return found
    for key in keys:
        value = content.get(key)
        if isinstance(value, (Tensor, np.generic, np.ndarray)) and np.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, (bool, int, float, str)):
            found[key] = value
    return found
