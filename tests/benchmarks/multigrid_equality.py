"""Does a MultiGrid that goes on from its cache give what the parallel forward gives, on every axis?

Main and meta logits over 1,024 tokens with random weights of standard deviation 0.1 (trained models are tamer), and the tokens
and tracks that `generate` writes: greedily, with beams and for a left-padded batch, with the cache and without any.
"""

import harness
import torch

from modeling_heptapod import MultiGridConfig, MultiGridForCausalLM


SHAPE = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
AXES = {"axis_names": ["kind", "bracket"], "axis_vocab_sizes": [20, 8]}
LIGHT = {"axis_hidden_size": 32, "cross_feed_forward": False}
VARIANTS = {
    "transformer": {},
    "transformer, factored": {"axis_order": "factored"},
    "leap": {"core": "leap"},
    "leap, factored": {"core": "leap", "axis_order": "factored"},
    "lstm": {"core": "lstm"},
    "lstm, factored": {"core": "lstm", "axis_order": "factored"},
    "transformer, light": LIGHT,
    "leap, light": {**LIGHT, "core": "leap"},
    "lstm, light, factored": {**LIGHT, "core": "lstm", "axis_order": "factored"},
}


def make_model(positions, **options):
    torch.manual_seed(0)
    config = MultiGridConfig(**SHAPE, **AXES, max_position_embeddings=positions, initializer_range=0.1, **options)
    model = MultiGridForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_grid(length):
    tracks = [torch.randint(0, size, (1, length)) for size in AXES["axis_vocab_sizes"]]
    return {"input_ids": torch.randint(0, 256, (1, length)), "axis_ids": torch.stack(tracks, dim=1)}


@torch.no_grad()
def logits_of(model, grid, sizes, use_cache=True):
    """Main and meta logits side by side, of chunks one after the other."""
    factored = model.config.axis_order == "factored"
    cache, logits, place = None, [], 0
    for size in sizes:
        ids, tracks = (grid[name][..., place : place + size] for name in ("input_ids", "axis_ids"))
        place += size
        known = factored and place < grid["axis_ids"].shape[2]
        after = grid["axis_ids"][..., place] if known else None
        out = model(ids, axis_ids=tracks, next_axis_ids=after, past_key_values=cache, use_cache=use_cache)
        cache = out.past_key_values
        logits.append(torch.cat((out.logits, *out.axis_logits), dim=-1))
    return torch.cat(logits, dim=1)


def same_tokens(model, prompts, new_tokens, **options):
    """Whether a left-padded batch with the cache gets the tokens and tracks that each prompt gets alone without any."""
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    width = max(lengths)
    batch = {
        name: torch.cat([torch.nn.functional.pad(prompt[name], (width - n, 0)) for prompt, n in zip(prompts, lengths)])
        for name in ("input_ids", "axis_ids")
    }
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    options["return_dict_in_generate"] = True
    together = model.generate(**batch, attention_mask=mask, **options)
    for row, (prompt, n) in enumerate(zip(prompts, lengths)):
        ones = torch.ones_like(prompt["input_ids"])
        alone = model.generate(**prompt, attention_mask=ones, use_cache=False, **options)
        if alone.sequences.shape[1] != n + new_tokens:
            return False
        for name in ("sequences", "axis_sequences"):
            if not torch.equal(alone[name][0][..., n:], together[name][row][..., width:]):
                return False
    return True


def main():
    report, quick = harness.start("MultiGrid from its cache against the parallel forward")
    tokens, new_tokens = (96, 8) if quick else (1_024, 128)
    lengths = (1, 5, 23) if quick else (1, 7, 63, 200)
    prompts, grid = [random_grid(length) for length in lengths], random_grid(tokens)
    worst, all_same = 0.0, True
    for name, options in VARIANTS.items():
        model = make_model(tokens, **options)
        parallel = logits_of(model, grid, [tokens], use_cache=False)
        steps = logits_of(model, grid, [1] * tokens)
        chunks = [tokens // 2 - 3, tokens // 2 - 5, *[1] * 8]
        differences = [(other - parallel).abs() for other in (steps, logits_of(model, grid, chunks))]
        rounding = (logits_of(model.double(), grid, [tokens], use_cache=False) - parallel).abs().max().item()
        model.float()
        same = {
            "greedy": same_tokens(model, prompts[-2:-1], new_tokens),
            "beams": same_tokens(model, prompts[-2:-1], new_tokens // 4, num_beams=4),
            "padded": same_tokens(model, prompts, new_tokens // 2),
        }
        main_axis = slice(0, SHAPE["vocab_size"])
        report.row(
            model=name,
            largest_logit=parallel.abs().max().item(),
            max_difference_main_one_token_at_a_time=differences[0][..., main_axis].max().item(),
            max_difference_meta_one_token_at_a_time=differences[0][..., main_axis.stop :].max().item(),
            max_difference_in_chunks=differences[1].max().item(),
            parallel_float32_from_float64=rounding,
            greedy_identical=same["greedy"],
            beams_identical=same["beams"],
            left_padded_batch_identical=same["padded"],
        )
        worst = max(worst, *(difference.max().item() for difference in differences))
        all_same = all_same and all(same.values())
    report.check("max difference of logits of any axis, worst of all", worst, "<=", 1e-4)
    report.check("generated tokens and tracks identical everywhere", all_same, "==", True)
    report.note(
        f"float32, {tokens:,} tokens, two axes, random weights; {new_tokens} new tokens greedily, {new_tokens // 4} with 4 "
        f"beams, {new_tokens // 2} in a padded batch of lengths {', '.join(map(str, lengths))}; each against the prompt alone "
        "without a cache. Light: meta streams of half the width, readings without a feed-forward."
    )
    report.finish()


if __name__ == "__main__":
    main()
