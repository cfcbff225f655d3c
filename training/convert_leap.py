"""Turn a checkpoint of the prototype (pip's `leap-transformer` 1.0.1) into ours, with the same logits.

    python training/convert_leap.py --source path/to/prototype --output outputs/leap-converted

The source is a folder with `config.json` and weights of `LeapForCausalLM` or `FastformerForCausalLM`, as the prototype's
`save_pretrained` or `Trainer` writes it. The prototype does not have to be installed.
"""

from pathlib import Path

import torch
from loading import read_json, read_weights
from redaction import Parser

from modeling_heptapod import LeapConfig, LeapForCausalLM


# The prototype adds this to every denominator: a sink.
SINK_WEIGHT = 1e-5

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Names of the prototype's parameters by our names.
OUTSIDE = {
    "model.embed_tokens.weight": "word_embedding.weight",
    "lm_head.weight": "proj_logits.weight",
    "model.norm.weight": "last_norm.weight",
    "model.norm.bias": "last_norm.bias",
}
FEED_FORWARD = {
    "post_attention_layernorm.weight": "boom_norm.weight",
    "post_attention_layernorm.bias": "boom_norm.bias",
    "mlp.up_proj.weight": "boom.weight",
    "mlp.down_proj.weight": "unboom.weight",
}
FOCUS_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "input_layernorm.bias": "attn_norm.bias",
    "mixer.qfkv_proj.weight": "projections.weight",
    "mlp.up_proj.bias": "boom.bias",
    "mlp.down_proj.bias": "unboom.bias",
    **FEED_FORWARD,
}
ADDITIVE_LAYER = {
    "input_layernorm.weight": "attention.attn_norm.weight",
    "input_layernorm.bias": "attention.attn_norm.bias",
    "mixer.qkv_proj.weight": "attention.projections.weight",
    "mixer.query_vector": "attention.query_attn",
    "mixer.key_vector": "attention.key_attn",
    **FEED_FORWARD,
}


def convert_config(source: dict) -> LeapConfig:
    """Convert the prototype's configuration.

    Args:
        source (`dict`): the prototype's `config.json`.

    Raises:
        ValueError: for a `model_type` that is not the prototype's, or a missing field.
    """
    kind = source.get("model_type")
    if kind not in ("LeapForCausalLM", "FastformerForCausalLM"):
        raise ValueError(f"`model_type` must be 'LeapForCausalLM' or 'FastformerForCausalLM', got {kind!r}.")
    additive = kind == "FastformerForCausalLM"
    heads = "n_heads" if additive else "n_head"
    fields = ("vocab_size", "hidden_size", "n_layer", heads, "n_positions", "window_sizes", "rescale")
    missing = [name for name in (*fields, "hidden_dropout_prob", "initializer_range") if name not in source]
    if missing:
        raise ValueError(f"The prototype's config lacks {', '.join(f'`{name}`' for name in missing)}.")
    positions = source["n_positions"]
    return LeapConfig(
        vocab_size=source["vocab_size"],
        hidden_size=source["hidden_size"],
        num_hidden_layers=source["n_layer"],
        num_attention_heads=source[heads],
        mixer="additive" if additive else "focus",
        weight_function="exp",
        rescale=source["rescale"],
        output_gate="none" if additive else "sigmoid",
        # A window as long as the longest sequence is global.
        window_sizes=[None if window >= positions else window for window in source["window_sizes"]],
        position_embedding_type="absolute",
        max_position_embeddings=positions,
        sink_weight=SINK_WEIGHT,
        hidden_dropout=source["hidden_dropout_prob"],
        attention_dropout=source["hidden_dropout_prob"],
        initializer_range=source["initializer_range"],
        tie_word_embeddings=True,
        **{name: source[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in source},
    )


def convert_state_dict(source: dict[str, torch.Tensor], config: LeapConfig) -> dict[str, torch.Tensor]:
    """Convert the prototype's state dict.

    Args:
        source (`dict`): the prototype's state dict; the output embedding may be left out, it is tied.
        config (`LeapConfig`): from `convert_config`.

    Raises:
        ValueError: for missing or unknown keys, tensors of another shape, an output bias that is not zero, and an output
            embedding that is not tied.
    """
    additive = config.mixer == "additive"
    body, layer_names = ("fastformer_model", ADDITIVE_LAYER) if additive else ("leap_model", FOCUS_LAYER)
    names = {**OUTSIDE, "model.embed_positions.weight": f"{body}.position_embeddings.weight"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"{body}.decoders.{i}.{theirs}" for ours, theirs in layer_names.items()}

    source = dict(source)
    source.setdefault("proj_logits.weight", source.get("word_embedding.weight"))
    output_bias = source.pop("proj_logits.bias", None)
    missing = sorted(name for name in names.values() if source.get(name) is None)
    unknown = sorted(set(source) - set(names.values()))
    if missing or unknown:
        raise ValueError(f"Keys do not match the prototype's: missing {missing}, unknown {unknown}.")
    if not torch.equal(source["proj_logits.weight"], source["word_embedding.weight"]):
        raise ValueError("`proj_logits.weight` is not `word_embedding.weight`, but the prototype ties them.")
    if output_bias is not None and output_bias.any():
        raise ValueError("`proj_logits.bias` is not zero, but our output layer has no bias.")

    state = {ours: source[theirs] for ours, theirs in names.items()}
    with torch.device("meta"):
        expected = LeapForCausalLM(config).state_dict()
    for name in set(expected) - set(state):  # the additive prototype's feed-forward has no biases
        state[name] = torch.zeros(expected[name].shape, dtype=state["model.norm.bias"].dtype)
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"`{names[name]}` has shape {list(tensor.shape)}, by the config {list(expected[name].shape)}."
            )
    return state


def convert(config: dict, state_dict: dict[str, torch.Tensor]) -> LeapForCausalLM:
    """A `LeapForCausalLM` with the same logits as the prototype."""
    ours = convert_config(config)
    state = convert_state_dict(state_dict, ours)
    model = LeapForCausalLM(ours)
    model.load_state_dict(state)
    return model.eval()


def load_prototype(folder: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read config and state dict from a folder of the prototype.

    Raises:
        FileNotFoundError: for a missing folder, `config.json` or weights.
        ValueError: for a damaged file.
    """
    folder = Path(folder)
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"`--source`: there is no config.json in {folder}.")
    if not files:
        raise FileNotFoundError(f"`--source`: there is neither {' nor '.join(WEIGHT_FILES)} in {folder}.")
    config = read_json(folder / "config.json")
    return config, read_weights(files[0])


def main():
    parser = Parser(description="Convert a checkpoint of leap-transformer 1.0.1.")
    parser.add_argument("--source", required=True, help="folder with the prototype's config.json and weights")
    parser.add_argument("--output", required=True, help="folder to write our model to")
    args = parser.parse_args()
    model = convert(*load_prototype(args.source))
    model.save_pretrained(args.output)
    print(f"{model.num_parameters():,} parameters, {model.config.mixer} mixer: {args.output}")


if __name__ == "__main__":
    main()
