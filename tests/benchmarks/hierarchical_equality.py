"""Does a hierarchical LM that goes on from its cache give what the parallel forward gives?

Logits over 1,024 tokens with random weights of standard deviation 0.1 (trained models are tamer), and the tokens that
`generate` writes: greedily, with beams and for a left-padded batch, with the cache and without any.
"""

import harness
import torch
from recurrent_equality import logits_in_steps, same_tokens

from modeling_heptapod import HierarchicalLMConfig, HierarchicalLMForCausalLM


SHAPE = {"vocab_size": 256, "hidden_sizes": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
STRIDED = {"compression_factors": [1, 2, 8], "strides": [1, 1, 4], "window_sizes": None}
VARIANTS = {
    "1": {"compression_factors": 1, "window_sizes": None},
    "1, 2": {"compression_factors": [1, 2], "window_sizes": None},
    "1, 2, 4 of different widths": {
        "compression_factors": [1, 2, 4],
        "hidden_sizes": [32, 48, 64],
        "window_sizes": None,
    },
    "1, 2, 8 with strides 1, 1, 4": STRIDED,
    "predicted from all": {**STRIDED, "predict_from_all": True},
    "merged into all": {**STRIDED, "merge_into": "all"},
    "windows 32, 0, none": {"compression_factors": [1, 2, 4], "window_sizes": [32, 0, None]},
    "windows of blocks": {"compression_factors": [1, 2, 4], "window_sizes": [32, 16, 8], "window_type": "block"},
    "windows everywhere, strides": {**STRIDED, "window_sizes": [32, 64, 16]},
    "merged by cross attention": {**STRIDED, "window_sizes": [32, 64, None], "merge": "cross_attention"},
    "compressed by attention": {
        **STRIDED,
        "window_sizes": [32, 64, None],
        "compressor": ["conv", "conv", "attention"],
    },
}


def make_model(**options):
    torch.manual_seed(0)
    config = HierarchicalLMConfig(**{**SHAPE, "initializer_range": 0.1, **options})
    model = HierarchicalLMForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def main():
    report, quick = harness.start("The hierarchical LM from its cache against the parallel forward")
    tokens, new_tokens = (96, 8) if quick else (1_024, 128)
    prompts = [torch.randint(0, 256, (length,)) for length in ((1, 5, 23) if quick else (1, 7, 63, 200))]
    ids = torch.randint(0, 256, (1, tokens))
    worst, all_same = 0.0, True
    for name, options in list(VARIANTS.items())[: 4 if quick else None]:
        model = make_model(**options)
        with torch.no_grad():
            parallel = model(ids, use_cache=False).logits
        stepwise = (logits_in_steps(model, ids) - parallel).abs().max().item()
        in_chunks = (logits_in_steps(model, ids, (tokens // 2 - 3, tokens // 2 - 5)) - parallel).abs().max().item()
        with torch.no_grad():
            rounding = (model.double()(ids, use_cache=False).logits - parallel).abs().max().item()
        model.float()
        same = {
            "greedy": same_tokens(model, prompts[-2:-1], new_tokens),
            "beams": same_tokens(model, prompts[-2:-1], new_tokens // 4, num_beams=4),
            "padded": same_tokens(model, prompts, new_tokens // 2),
        }
        report.row(
            hierarchies=name,
            largest_logit=parallel.abs().max().item(),
            max_difference_one_token_at_a_time=stepwise,
            max_difference_in_chunks=in_chunks,
            parallel_float32_from_float64=rounding,
            greedy_identical=same["greedy"],
            beams_identical=same["beams"],
            left_padded_batch_identical=same["padded"],
        )
        worst, all_same = max(worst, stepwise, in_chunks), all_same and all(same.values())
    report.check("max difference of logits, worst of all", worst, "<=", 1e-4)
    report.check("generated tokens identical everywhere", all_same, "==", True)
    report.note(
        f"float32, {tokens:,} tokens, random weights; {new_tokens} new tokens greedily, {new_tokens // 4} with 4 beams, "
        f"{new_tokens // 2} in a padded batch of lengths {', '.join(str(len(prompt)) for prompt in prompts)}; each against "
        "the prompt alone without a cache. Windows are none where none are named."
    )
    report.finish()


if __name__ == "__main__":
    main()
