"""Files of the CASM program (Żołna, Geras & Cho 2020): a ResNet-50 and the decoder of its saliency maps.

Keys: epoch, state_dict_classifier, state_dict_decoder, two optimizers, args (an argparse Namespace).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from explainers.casm import Casm
from explainers.casm.classifier_taps import find_casm_taps
from explainers.casm.decoder import CasmDecoder, Upsample
from image_classification.models import WeightsError, arch_info
from pruning.files.importing.architectures import build_network, classifier_part, recognise
from pruning.files.importing.imported import Imported, facts_of
from pruning.files.importing.published_part import load_part, state_of

NAME = "casm"


def matches(content: object) -> bool:
    """Whether a file's content looks like this format: it has two state dicts of these names."""
    return isinstance(content, Mapping) and bool(
        {"state_dict_classifier", "state_dict_decoder"} & content.keys()
    )


def read(content: object, source: Path, classifier: Path | None) -> Imported:
    """Build a classifier with a saliency mapping; see `import_checkpoint`."""
    part = classifier_part(state_of(content, source, "state_dict_classifier"))
    arch = recognise(part, small_images=False, families=("resn",))
    network = build_network(part, arch)
    decoder_part = state_of(content, source, "state_dict_decoder")
    image_size = arch_info(arch).image_size
    taps = find_casm_taps(network, torch.zeros(1, 3, image_size, image_size))
    reduction = decoder_part.tensors.get("conv1x1_1.0.weight")
    if reduction is None or reduction.dim() != 4:
        raise WeightsError(
            f"{source}: {decoder_part.called('conv1x1_1.0.weight')!r} is missing, of the decoder"
        )
    decoder = CasmDecoder(taps.channels, int(reduction.shape[0]))
    load_part(decoder, decoder_part, f"the decoder of {arch}")
    casm = Casm(network, decoder.eval(), taps.names, image_size, upsample=_upsample(content))
    return Imported(NAME, {"classifier": network}, casm=casm, facts=facts_of(content, ("epoch",)))


def _upsample(content: object) -> Upsample:
    """Return the mode for enlarging masks, from the program's own arguments."""
    arguments = content.get("args") if isinstance(content, Mapping) else None
    return "bilinear" if getattr(arguments, "upsample", "nearest") == "bilinear" else "nearest"
