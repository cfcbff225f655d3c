"""Flex and flash attention of transformers on a CPU, without a compiler and without the package `flash_attn`."""

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex_integration


def use_flex_attention(model, monkeypatch):
    """Flex attention without its compiler."""
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda _compile, **kwargs: create_block_mask(**kwargs))
    monkeypatch.setattr(
        flex_integration,
        "compile_friendly_flex_attention",
        lambda *x, training, **kwargs: flex_attention(*x, **kwargs),
    )
    model.set_attn_implementation("flex_attention")


def use_flash_attention(model, monkeypatch):
    """Transformers' flash attention, with kernels of torch for the two that the package `flash_attn` has."""

    def kernel(query, key, value, causal, softmax_scale):  # [batch, length, heads, head_dim], aligned at the end
        queries, keys = query.shape[1], key.shape[1]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
        parts = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*parts, mask, scale=softmax_scale).transpose(1, 2)

    def kernel_of_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs):
        lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(lengths_q), max(lengths_k)) == (max_seqlen_q, max_seqlen_k)
        sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
        return torch.cat([kernel(*(x.unsqueeze(0) for x in each), **kwargs)[0] for each in sequences])

    def kernel_options(is_causal, softmax_scale, **kwargs):
        return {
            "causal": is_causal,
            "softmax_scale": softmax_scale,
            **{name: x for name, x in kwargs.items() if name.startswith("max_seqlen")},
        }

    pad, unpad = flash_utils._pad_input, flash_utils._unpad_input
    loaded = ((kernel, kernel_of_sequences, None, pad, unpad), (kernel_options, None))
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args: loaded)
    model.config._attn_implementation = "flash_attention_2"  # setting it by method needs the package
