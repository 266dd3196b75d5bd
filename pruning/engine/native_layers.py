"""Attributes of PyTorch's own layers: numbers that follow from shapes, and widths that must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import nn
from torch.nn.modules.rnn import RNNCellBase

from image_classification.models.attention import CutAttention
from image_classification.models.module_tree import named_modules
from pruning.engine.labeller import Labeller

_GATES = {"LSTM": 4, "GRU": 3}


def is_native(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own, whose attributes have known meanings; others stay unchanged."""
    return type(module).__module__.startswith("torch.nn") or isinstance(module, CutAttention)


def known_attributes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int
) -> Mapping[str, object]:
    """Return the attributes of one of PyTorch's own layers that follow from the shapes of its tensors."""
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(module, shapes)
    if isinstance(module, nn.RNNBase):
        found = {"input_size": shapes["weight_ih_l0"][1]}
        found["hidden_size"] = shapes["weight_ih_l0"][0] // _GATES.get(module.mode, 1)
        return found | ({"proj_size": shapes["weight_hr_l0"][0]} if "weight_hr_l0" in shapes else {})
    if isinstance(module, RNNCellBase):
        return {"input_size": shapes["weight_ih"][1], "hidden_size": shapes["weight_hh"][1]}
    vector = shapes.get("weight", shapes.get("running_mean"))
    if vector is None:
        return {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": vector[0], "out_channels": vector[1] * groups, "groups": groups}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": vector[1] * groups, "out_channels": vector[0], "groups": groups}
    if isinstance(module, nn.Linear):
        return {"in_features": vector[1], "out_features": vector[0]}
    if isinstance(module, nn.Bilinear):
        return dict(zip(("out_features", "in1_features", "in2_features"), vector, strict=True))
    if isinstance(module, (nn.modules.batchnorm._NormBase)):
        return {"num_features": vector[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": vector[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": tuple(vector)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": vector[0]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": vector[0], "embedding_dim": vector[1]}
    return {}


def _of_attention(module: nn.MultiheadAttention, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    if "in_proj_weight" in shapes:
        rows, width = shapes["in_proj_weight"]
        found = {"embed_dim": width, "kdim": width, "vdim": width}
        return found | {"num_heads": rows // (3 * module.head_dim)}
    found = {"embed_dim": shapes["q_proj_weight"][1], "kdim": shapes["k_proj_weight"][1]}
    return found | {
        "vdim": shapes["v_proj_weight"][1],
        "num_heads": shapes["q_proj_weight"][0] // module.head_dim,
    }


def tie_recurrent(model: nn.Module, labeller: Labeller) -> None:
    """Tie the hidden channels of all levels and both directions of a recurrent layer, since one number counts them.

    Projected channels stay, because PyTorch recognises a projection by its smaller width.
    """
    for name, module in named_modules(model):
        if isinstance(module, nn.RNNBase):
            for key in (("weight_ih", 0), ("weight_hh", 1)):
                widths = list(_widths(labeller, name, module, *key))
                for other in widths[1:]:
                    labeller.table.unite(widths[0], other, "counted by the same number")
                if module.proj_size:
                    labeller.table.freeze(
                        widths[0], f"the projection of {name!r} must stay narrower than its state"
                    )


def _widths(labeller: Labeller, name: str, module: nn.RNNBase, kind: str, dim: int) -> Iterator[np.ndarray]:
    for own, tensor in module.named_parameters():
        if own.startswith(f"{kind}_l"):
            full = f"{name}.{own}".lstrip(".")
            yield labeller.atoms_of(full, dim, tensor.shape[dim])
