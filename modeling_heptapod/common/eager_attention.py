"""Eager attention, which returns its weights."""

import torch
from torch import nn


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """Eager attention with the arguments of transformers' attention interface.

    `eager_attention_forward` of transformers' models does not replace it: it takes no boolean masks, does not read
    `is_causal`, and computes the softmax of float64 in float32.

    Args:
        attention_mask (`torch.Tensor` of shape `[1 or batch, 1, queries, keys]`, *optional*): boolean, or 0 and large
            negative numbers.
        is_causal (`bool`, *optional*): whether queries attend to keys up to their own without a mask, `module.is_causal` when
            not given.

    Returns:
        The output `[batch, queries, heads, head_dim]` and the weights `[batch, heads, queries, keys]`.
    """
    logits = query @ key.transpose(2, 3) * scaling
    is_causal = module.is_causal if is_causal is None else is_causal
    if attention_mask is None and is_causal and query.shape[2] > 1:  # one query sees all keys
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
    out = nn.functional.dropout(weights, dropout, module.training) @ value
    return out.transpose(1, 2), weights


__all__ = ["eager_attention"]
