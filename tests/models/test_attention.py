"""Attention of any width computes what PyTorch's own does, and a cut network is built again with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from image_classification.models.attention import CutAttention, attention_of_any_width
from image_classification.models.structure_build import build_from_structure
from image_classification.models.structure_capture import capture_structure
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups

OPTIONS = {
    "packed": {},
    "batch first, no bias": {"batch_first": True, "bias": False},
    "other keys": {"kdim": 8, "vdim": 10},
    "longer": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


def signals(options: dict[str, object], batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    def signal(length: int, width: object) -> Tensor:
        shape = (2, length) if options.get("batch_first") else (length, 2)
        return torch.randn(*(shape if batched else (length,)), width, dtype=torch.float64)

    return signal(4, 12), signal(5, options.get("kdim", 12)), signal(5, options.get("vdim", 12))


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_of_any_width_equals_that_of_pytorch(name: str) -> None:
    torch.manual_seed(0)
    options = OPTIONS[name]
    attention = nn.MultiheadAttention(12, 3, **options).double().eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden = torch.rand(6, 4, 5) > 0.7
    hidden[..., 0] = False
    for batched, weights, average, masked in itertools.product([True, False], repeat=4):
        masks = {}
        if masked:
            padding = torch.arange(5) == 4
            masks = {
                "attn_mask": hidden if batched else hidden[:3],
                "key_padding_mask": padding.expand(2, 5) if batched else padding,
            }
        given = signals(options, batched)
        choices = {"need_weights": weights, "average_attn_weights": average, **masks}
        expected = attention(*given, **choices)
        with attention_of_any_width(attention):
            assert type(attention) is CutAttention
            found = attention(*given, **choices)
        assert type(attention) is nn.MultiheadAttention
        torch.testing.assert_close(found, expected)


def test_a_causal_hint_does_what_it_does_in_pytorch() -> None:
    attention = nn.MultiheadAttention(12, 3).double().eval()
    x, _, _ = signals({}, batched=True)
    causal = torch.ones(4, 4).triu(1).bool()
    options = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    expected = attention(x, x, x, **options)
    with attention_of_any_width(attention), pytest.raises(RuntimeError, match="attn_mask"):
        attention(x, x, x, is_causal=True)
    with attention_of_any_width(attention):
        torch.testing.assert_close(attention(x, x, x, **options), expected)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 20, batch_first=True)
        self.stem, self.encoder = nn.Linear(6, 16), nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.fc(self.encoder(self.stem(x), src_key_padding_mask=padding).mean(1))


def test_a_cut_encoder_is_saved_built_again_and_takes_padding_in_both_modes() -> None:
    """PyTorch's fast path, which packs padded sequences in evaluation, cannot read the cut tensors."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 7, 6)
    graph = trace_groups(model, x)
    assert {group.name: group.width for group in graph.prunable} == {
        "stem": 16,
        "encoder.layers.0.self_attn": 4,
        "encoder.layers.0.linear1": 20,
        "encoder.layers.1.self_attn": 4,
        "encoder.layers.1.linear1": 20,
    }
    keep = {"stem": range(10), "encoder.layers.0.self_attn": [0, 2], "encoder.layers.1.linear1": range(8)}
    prune_channels(model, graph, keep)
    assert model.encoder.layers[0].self_attn.num_heads == 2
    loaded = build_from_structure(capture_structure(model, factory=Encoder), factory=Encoder).eval()
    loaded.load_state_dict(model.state_dict())
    padding = torch.arange(7).expand(2, 7) > torch.tensor([[6], [4]])
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        packed = model(x, padding)
    assert torch.equal(packed, loaded(x, padding))
    model(x, padding).sum().backward()
