"""Fastformer's additive attention, as causal and windowed running means."""

from dataclasses import replace

import torch
from torch import nn

from .configuration_leap import LeapConfig
from .focus import attention_matrix
from .focus_functions import log_weight, standardize
from .leap_mixing import RunningMeanMixer


class AdditiveMixer(RunningMeanMixer):
    """Fastformer's additive attention (arXiv 2108.09084, equations 3 to 6), causal and windowed as in the prototype.

    Queries are pooled with weights from a learned vector; keys times pooled queries are pooled likewise; the output is
    the pooled keys times the values. Its `attentions` are `[batch, heads, seq, 2]`: the log weights of both poolings.
    Its `attention_matrix` `[batch, heads, 2, seq, seq]` holds the weights of both.
    """

    def __init__(self, config: LeapConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.query_vector = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.key_vector = nn.Parameter(torch.empty(self.num_heads, self.head_dim))

    def _mix(self, inputs, rows, cache, is_causal, single_step, output_attentions):
        batch, seq, _ = inputs.shape
        context = rows, cache, is_causal, single_step and not output_attentions
        qkv = self.qkv_proj(inputs).view(batch, seq, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).unbind(2)
        pooled_q, query_logs = self._pool(q, self.query_vector, 0, *context)
        pooled_k, key_logs = self._pool(pooled_q * k, self.key_vector, 1, *context)
        out = (pooled_k * v).to(inputs.dtype).reshape(batch, seq, -1)
        if not output_attentions:
            return out, None
        return out, torch.stack((query_logs, key_logs), dim=-1).transpose(1, 2)

    @staticmethod
    def _without_pads(attentions, mask):
        return attentions.masked_fill(~mask[:, None, :, None], -torch.inf)

    def _pool(self, x, vector, state_idx, rows, cache, is_causal, single_step):
        vector = vector.to(x.dtype)
        if self.settings.normalize:
            x, vector = standardize(x), standardize(vector)
        logits = (x * vector).sum(-1) * self.settings.scale
        if single_step:
            return self._step_mean(logits[:, 0], x, cache, state_idx), None
        logs = log_weight(logits, self.settings.weight_function)
        if rows.padding_mask is not None:
            logs = logs.masked_fill(~rows.padding_mask.unsqueeze(-1), -torch.inf)
        return self._dropout(self._mean(logs, x, rows, cache, is_causal, state_idx)), logs

    def attention_matrix(self, attentions, is_causal=True, segment_ids=None, positions=None):
        settings = replace(self.settings, causal=is_causal)
        matrices = (
            attention_matrix(logs, settings, self.alibi_slopes, segment_ids, positions)
            for logs in attentions.unbind(-1)
        )
        return torch.stack(tuple(matrices), dim=2)


__all__ = ["AdditiveMixer"]
