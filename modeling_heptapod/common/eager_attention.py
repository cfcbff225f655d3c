"""Eager attention, for `output_attentions=True` and `attn_implementation="eager"`."""

import torch
from torch import nn


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=False, **kwargs):
    """Eager attention with a boolean mask; the arguments are those of transformers' attention interface.

    Returns:
        Output `[batch, queries, heads, head_dim]` and weights `[batch, heads, queries, keys]`.
    """
    logits = query @ key.transpose(2, 3) * scaling
    if is_causal and query.shape[2] > 1:  # a single query attends to all keys
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
    out = nn.functional.dropout(weights, dropout, module.training) @ value
    return out.transpose(1, 2), weights


__all__ = ["eager_attention"]
