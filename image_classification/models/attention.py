"""PyTorch's own attention at widths that its class does not allow.

`nn.MultiheadAttention` insists on heads × width of a head = width of the embedding. A pruned network has fewer heads,
or a narrower embedding, or both. `fit_attention` changes the class of such modules; they stay the same objects with the
same tensors under the same names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.models.module_tree import named_modules


class CutAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads and embedding have independent widths.

    The width of a head, `head_dim`, is unchanged; the number of heads and all other widths follow from the tensors.
    """

    # Disables the fast path of PyTorch's encoders, which reads the attention's tensors directly.
    _qkv_same_embed_dim = property(lambda self: False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`; same arguments and results, except for nested tensors."""
        batched = query.dim() == 3
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        q, k, v = (self._with_heads(x, batched) for x in self._projected(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._lengthened(k, self.bias_k), self._lengthened(v, self.bias_v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        # As in PyTorch, the hint replaces the mask if nothing else needs one.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(q, k, None if is_causal else attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            result = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            result = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        result = F.linear(result.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return result[0], None if weights is None else weights[0]
        return result if self.batch_first else result.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, heads × head_dim wide."""
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        signals = (query, key, value)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(signals, weights, biases, strict=True))
        return q, k, v

    def _with_heads(self, x: Tensor, batched: bool) -> Tensor:
        """Reshape (N, L, E), or (L, N, E) or (L, E), to (N, heads, L, head_dim)."""
        if not batched:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    def _lengthened(self, x: Tensor, bias: Tensor) -> Tensor:
        """Append one position, the same for all images, to (N, heads, S, head_dim)."""
        return torch.cat(
            [x, bias.view(1, 1, -1, self.head_dim).transpose(1, 2).expand(len(x), -1, -1, -1)], 2
        )

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Combine both masks into one that is added to the scores (N, heads, L, S)."""
        total = None
        if attn_mask is not None:
            total = _added(attn_mask, q)
            if total.dim() == 3:
                total = total.view(len(q), -1, *total.shape[1:])
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q).view(len(q), 1, 1, -1)
            total = padding if total is None else total + padding
        return None if total is None else F.pad(total, (0, k.shape[2] - total.shape[-1]))


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Convert a mask to an additive one: minus infinity where a boolean mask is true."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _is_native(attention: nn.MultiheadAttention) -> bool:
    """Whether the tensors have widths that PyTorch's class allows."""
    if attention.in_proj_weight is not None:
        rows, width = attention.in_proj_weight.shape
        rows //= 3
    else:
        rows, width = attention.q_proj_weight.shape
    return bool(rows == width == attention.num_heads * attention.head_dim)


def fit_attention(model: nn.Module, everywhere: bool = False) -> list[tuple[nn.Module, str, object]]:
    """Change attentions that PyTorch's class does not support to `CutAttention`, and keep their encoders off the fast
    path.

    Args:
        model: The network, in place.
        everywhere: Change all attentions of PyTorch's own class.

    Returns:
        The changes as (module, attribute, value before), for `restore`.
    """
    changed: list[tuple[nn.Module, str, object]] = []

    def change(module: nn.Module, attribute: str, value: object) -> None:
        changed.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)

    for _, module in named_modules(model):
        if type(module) is nn.MultiheadAttention and (everywhere or not _is_native(module)):
            change(module, "__class__", CutAttention)
    for _, module in named_modules(model):
        nested = isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
        if nested and any(isinstance(part, CutAttention) for part in module.modules()):
            change(module, "use_nested_tensor", False)
    return changed


def restore(changed: list[tuple[nn.Module, str, object]]) -> None:
    """Undo the changes of `fit_attention`."""
    for module, attribute, value in reversed(changed):
        setattr(module, attribute, value)


@contextlib.contextmanager
def attention_of_any_width(model: nn.Module) -> Iterator[None]:
    """Run all attentions of PyTorch's own class as `CutAttention` inside the block."""
    changed = fit_attention(model, everywhere=True)
    try:
        yield
    finally:
        restore(changed)
