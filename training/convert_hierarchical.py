"""Turn a model of the prototype (pip's `simple-hierarchical-transformer` 0.4.0) into ours, with the same logits and losses.

    python training/convert_hierarchical.py --state_dict prototype.pt --arguments prototype.json --output outputs/converted

The prototype has no checkpoints of its own: `prototype.pt` is `torch.save(model.state_dict(), ...)` (or safetensors),
`prototype.json` holds the arguments of `HierarchicalTransformer(...)`. The prototype does not have to be installed.
"""

from pathlib import Path

import torch
from loading import read_json, read_weights
from redaction import Parser

from modeling_heptapod import HierarchicalLMConfig, HierarchicalLMForCausalLM


# The prototype's defaults of the arguments that can be converted.
DEFAULTS = {
    "seq_len": 2048,
    "dim_head": 64,
    "heads": 8,
    "ff_mult": 4,
    "hierarchies": 1,
    "window_sizes": None,
    "hierarchical_stride": 1,
    "hierarchy_merge_all": False,
    "predict_hierarchy": None,
    "predict_use_all_hierarchy": False,
    "recon_loss_weight": 0.1,
    "next_latent_loss_weight": 0.25,
    "next_latent_loss_type": "mse_and_cosine_sim",
    "num_rollouts": 1,
    "chunk_summarizers": None,
    "detach_summaries": True,
    "dynamics_hidden_dim": None,
    "dynamics_num_layers": 3,
    "dynamic_rollout_loss_weight": True,
    "dynamic_loss_decay": 1.0,
    "rollout_weights": None,
    "ignore_index": 0,
    "use_flash_attn": False,
}
REQUIRED = ("num_tokens", "dim", "depth")
LOSS_TYPES = {"mse_and_cosine_sim": "mse_and_cosine", "mse": "mse", "smooth_l1": "smooth_l1"}

# Recomputed from `rope_parameters`; the same for every model of the prototype.
FREQUENCIES = ("rotary_emb.freqs", "rel_pos.inv_freq")


def convert_config(arguments: dict, block_windows: bool = False) -> HierarchicalLMConfig:
    """Convert the arguments of the prototype's constructor to a configuration.

    Args:
        arguments (`dict`): the keyword arguments of `HierarchicalTransformer(...)`.
        block_windows (`bool`): whether windows are blocks that attend to one complete block before them, as with versions
            of `local-attention` in which `exact_windowsize` is off by default.

    Raises:
        ValueError: for missing or unknown arguments, and for custom losses and summarizers.
    """
    given = _check_arguments(arguments)
    factors = _listed(given["hierarchies"], 1)
    windows = [
        # A window wider than the prototype's longest sequence is a global one.
        None if window is not None and window > given["seq_len"] // factor else window
        for window, factor in zip(_listed(given["window_sizes"], len(factors)), factors)
    ]
    return HierarchicalLMConfig(
        vocab_size=given["num_tokens"],
        compression_factors=factors,
        strides=given["hierarchical_stride"],
        hidden_sizes=given["dim"],
        num_hidden_layers=given["depth"],
        num_attention_heads=given["heads"],
        head_dim=given["dim_head"],
        mlp_ratio=given["ff_mult"],
        # The prototype's exact window does not count the position itself, ours does.
        window_sizes=[window + 1 if window and not block_windows else window for window in windows],
        window_type="block" if block_windows else "sliding",
        attention_norm=["layer_norm" if window else "rms_norm" for window in windows],
        use_xpos=[window is None for window in windows],
        predict_hierarchy=given["predict_hierarchy"],
        predict_from_all=given["predict_use_all_hierarchy"],
        merge_into="all" if given["hierarchy_merge_all"] else "predicting",
        max_position_embeddings=given["seq_len"],
        rms_norm_eps=1e-12,
        pad_token_id=given["ignore_index"] if 0 <= given["ignore_index"] < given["num_tokens"] else None,
        reconstruction_loss_weight=given["recon_loss_weight"],
        next_latent_loss_weight=given["next_latent_loss_weight"],
        next_latent_loss_type=LOSS_TYPES[given["next_latent_loss_type"]],
        next_latent_rollouts=given["num_rollouts"],
        next_latent_rollout_weights=given["rollout_weights"],
        next_latent_dynamic_weights=given["dynamic_rollout_loss_weight"],
        next_latent_dynamic_decay=given["dynamic_loss_decay"],
        detach_summaries=given["detach_summaries"],
        dynamics_hidden_size=given["dynamics_hidden_dim"],
        dynamics_num_layers=given["dynamics_num_layers"],
    )


def _check_arguments(arguments):
    """Checked arguments with the prototype's defaults."""
    missing = [name for name in REQUIRED if name not in arguments]
    unknown = sorted(set(arguments) - {*REQUIRED, *DEFAULTS})
    if missing or unknown:
        raise ValueError(f"`arguments` do not match the prototype's: missing {missing}, unknown {unknown}.")
    for name in ("num_tokens", "depth"):
        if not isinstance(arguments[name], int):
            raise ValueError(f"`{name}` must be a whole number, got {arguments[name]!r}.")
    given = {**DEFAULTS, **arguments}
    if _any(given["chunk_summarizers"]):
        raise ValueError("`chunk_summarizers` are code: override `AuxiliaryLosses.make_summarizer` with it.")
    if given["next_latent_loss_type"] not in LOSS_TYPES:
        raise ValueError(
            f"`next_latent_loss_type` must be one of {tuple(LOSS_TYPES)}, got {given['next_latent_loss_type']!r}."
        )
    return given


def _listed(value, length):
    return list(value) if isinstance(value, (list, tuple)) else [value] * length


def _any(summarizers):
    return any(one is not None for one in _listed(summarizers, 1))


def parameter_names(config: HierarchicalLMConfig) -> dict[str, str]:
    """Names of the prototype's parameters by our names, for a config from `convert_config`."""
    names = {"model.embed_tokens.weight": "token_emb.weight", "lm_head.weight": "to_logits.weight"}
    for h, factor in enumerate(config.compression_factors):
        names |= _both(f"model.embed_norms.{h}", f"post_token_emb_norms.{h}") | _both(f"model.norms.{h}", f"norms.{h}")
        if factor > 1:
            names |= _both(f"model.compressors.{h}.conv_in", f"compressors.{h}.compress_fn.1.conv")
            names |= _both(f"model.compressors.{h}.conv_out", f"compressors.{h}.compress_fn.3")
        elif config.hidden_sizes[h] != config.hidden_size:
            names[f"model.compressors.{h}.weight"] = f"compressors.{h}.compress_fn.weight"
    for layer in range(config.num_hidden_layers):
        for h, window in enumerate(config.window_sizes):
            ours, theirs = f"model.layers.{layer}.blocks.{h}", f"layers.{layer}.{h}"
            if window is None:
                names[f"{ours}.input_layernorm.weight"] = f"{theirs}.attn.norm.gamma"
            elif window > 0:
                names |= _both(f"{ours}.input_layernorm", f"{theirs}.attn.norm")
            if window != 0:
                names[f"{ours}.self_attn.qkv_proj.weight"] = f"{theirs}.attn.to_qkv.weight"
                names[f"{ours}.self_attn.o_proj.weight"] = f"{theirs}.attn.to_out.weight"
            names[f"{ours}.post_attention_layernorm.weight"] = f"{theirs}.ff.net.0.gamma"
            names[f"{ours}.mlp.up_proj.weight"] = f"{theirs}.ff.net.1.weight"
            names[f"{ours}.mlp.down_proj.weight"] = f"{theirs}.ff.net.3.weight"
        if config.num_hierarchies > 1:
            ours, theirs = f"model.layers.{layer}.merge", f"hierarchical_merges.{layer}.net"
            names |= {f"{ours}.up_projs.{h}.weight": f"{theirs}.1.weight" for h in range(config.num_hierarchies)}
            names |= {f"{ours}.up_bias": f"{theirs}.1.bias"} | _both(f"{ours}.down_proj", f"{theirs}.3")
    return names | _loss_names(config)


def _loss_names(config):
    names = {}
    for h, factor in enumerate(config.compression_factors):
        if config.reconstruction_loss_weight > 0 and factor > 1:
            names[f"auxiliary_losses.reconstruction.{factor}.weight"] = f"compressors.{h}.to_recon.weight"
        if config.next_latent_loss_weight[h] > 0:
            ours = f"auxiliary_losses.next_latent.{factor}"
            if config.hidden_sizes[h] != config.hidden_size:
                names |= _both(f"{ours}.summarizer.proj", f"chunk_summarizers.{h}.proj")
            names |= _both(f"{ours}.dynamics.norm", f"latent_dynamics.{h}.net.0")
            for layer in range(config.dynamics_num_layers):
                names |= _both(f"{ours}.dynamics.layers.{layer}", f"latent_dynamics.{h}.net.{2 * layer + 1}")
    return names


def _both(ours, theirs):
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}


def convert_state_dict(source: dict[str, torch.Tensor], config: HierarchicalLMConfig) -> dict[str, torch.Tensor]:
    """Convert the prototype's state dict.

    Args:
        source (`dict`): the prototype's state dict. Parameters of losses with weight 0 are dropped.
        config (`HierarchicalLMConfig`): from `convert_config`.

    Raises:
        ValueError: for missing or unknown keys, or tensors of another shape.
    """
    names = parameter_names(config)
    gain = "hierarchical_merges.{}.net.0.gamma"
    read = {*names.values(), *(gain.format(i) for i in range(config.num_hidden_layers) if config.num_hierarchies > 1)}
    missing = sorted(read - set(source))
    unused = ("chunk_summarizers.", "latent_dynamics.")
    unknown = sorted(
        name for name in set(source) - read if not name.endswith(FREQUENCIES) and not name.startswith(unused)
    )
    if missing or unknown:
        raise ValueError(f"Keys do not match the prototype's: missing {missing}, unknown {unknown}.")
    with torch.device("meta"):
        expected = HierarchicalLMForCausalLM(config).state_dict()
    state = {}
    for ours, theirs in names.items():
        tensor = source[theirs]
        if theirs.endswith("conv.weight") and tensor.dim() == 3:
            tensor = tensor.transpose(1, 2).flatten(1)  # [out, in, tap] -> [out, tap * in]
        elif theirs.endswith("compress_fn.3.weight"):
            tensor = tensor.squeeze(-1)
        elif ".merge.up_projs." in ours:  # the norm's gain, and of all streams one
            _, _, layer, _, _, h, _ = ours.split(".")
            tensor = (tensor * source[gain.format(layer)]).split(config.hidden_sizes, dim=1)[int(h)]
        if tensor.shape != expected[ours].shape:
            raise ValueError(
                f"`{theirs}` becomes {list(tensor.shape)}, by the arguments it is {list(expected[ours].shape)}."
            )
        if theirs.endswith("to_qkv.weight"):
            h = int(theirs.split(".")[2])
            if config.window_sizes[h] is None:
                tensor = _half_split(tensor, config.num_attention_heads[h])
        state[ours] = tensor.contiguous()
    return state


def _half_split(qkv, heads):
    """Reorder queries and keys from interleaved rotary pairs to pairs that are half a head apart."""
    qkv = qkv.unflatten(0, (3, heads, -1, 2))  # the last two: pair, first or second of it
    return torch.cat((qkv[:2].transpose(2, 3).flatten(0, 3), qkv[2:].flatten(0, 3)))


def convert(arguments: dict, state_dict: dict[str, torch.Tensor], block_windows: bool = False):
    """A `HierarchicalLMForCausalLM` with the same logits and losses as the prototype."""
    config = convert_config(arguments, block_windows)
    state = convert_state_dict(state_dict, config)
    model = HierarchicalLMForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def load_prototype(state_dict: str | Path, arguments: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read arguments and state dict from their files.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a damaged file.
    """
    for name, path in (("state_dict", state_dict), ("arguments", arguments)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"`--{name}`: there is no file {path}.")
    return read_json(Path(arguments)), read_weights(Path(state_dict))


def main():
    parser = Parser(description="Turn a model of pip's simple-hierarchical-transformer into ours.")
    parser.add_argument("--state_dict", required=True, help="file with the prototype's state dict")
    parser.add_argument("--arguments", required=True, help="JSON file with the arguments of its constructor")
    parser.add_argument("--output", required=True, help="folder to write our model to")
    parser.add_argument(
        "--block_windows",
        action="store_true",
        help="the prototype was trained with windows that were not exact (see convert_config)",
    )
    args = parser.parse_args()
    model = convert(*load_prototype(args.state_dict, args.arguments), args.block_windows)
    model.save_pretrained(args.output)
    print(f"{model.num_parameters():,} parameters, hierarchies {model.config.compression_factors}: {args.output}")


if __name__ == "__main__":
    main()
