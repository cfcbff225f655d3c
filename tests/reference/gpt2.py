"""GPT-2's weights under the names that a MultiGrid without axes has for them. Imports nothing from the package."""

_RENAMED = {
    "transformer": "model",
    "wte": "embed_tokens",
    "wpe": "embed_positions",
    "h": "layers",
    "ln_f": "norm",
    "ln_1": "self_block.input_layernorm",
    "ln_2": "self_block.post_attention_layernorm",
    "attn": "self_block.mixer",
    "c_attn": "qkv_proj",
    "mlp": "self_block.mlp",
    "c_fc": "up_proj",
}


def from_gpt2(weights: dict) -> dict:
    """A state dict, or gradients by name, of a `GPT2LMHeadModel` as one of ours; its `Conv1D` holds matrices transposed."""
    ours = {}
    for name, value in weights.items():
        parts = name.split(".")
        is_matrix = parts[-1] == "weight" and parts[-2] in ("c_attn", "c_fc", "c_proj")
        if parts[-2] == "c_proj":
            parts[-2] = "o_proj" if parts[-3] == "attn" else "down_proj"
        ours[".".join(_RENAMED.get(part, part) for part in parts)] = value.t() if is_matrix else value
    return ours
