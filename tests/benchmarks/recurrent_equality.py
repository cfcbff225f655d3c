"""Do tokens fed one at a time through the recurrent state give what the parallel forward gives?

Logits over 4,096 tokens with random untied weights of standard deviation 0.2 (trained models are far tamer), and the
tokens that `generate` writes: greedily, with beams and for a left-padded batch, with the state and without any cache.
"""

import harness
import torch


VARIANTS = {
    "default": {},
    "the prototype's options": {**harness.PROTOTYPE_OPTIONS, "max_position_embeddings": 8192},
    "decay, exp": {"position_embedding_type": "alibi", "weight_function": "exp"},
    "no rescale, gelu gate": {"rescale": None, "output_gate": "gelu"},
    "no gate, no positions": {"output_gate": "none", "position_embedding_type": "none"},
    "additive": {"mixer": "additive", "position_embedding_type": "alibi"},
}


@torch.no_grad()
def logits_in_steps(model, ids, chunks=()):
    """Logits with `chunks` of several tokens fed first and the rest one at a time."""
    cache, logits, place = None, [], 0
    for size in [*chunks, *[1] * (ids.shape[1] - sum(chunks))]:
        out = model(ids[:, place : place + size], past_key_values=cache, use_cache=True)
        cache, place = out.past_key_values, place + size
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def same_tokens(model, prompts, new_tokens, **options):
    """Whether a left-padded batch with the recurrent state gives what each prompt gives alone without a cache."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with_state = model.generate(ids, attention_mask=mask, **options)[:, length:]
    same = True
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], use_cache=False, **options)
        same = (
            same
            and alone.shape[1] == len(prompt) + new_tokens
            and torch.equal(alone[0, len(prompt) :], with_state[row])
        )
    return same


def main():
    report, quick = harness.start("Recurrent against parallel")
    tokens, new_tokens = (128, 16) if quick else (4_096, 256)
    variants = list(VARIANTS.items())[: 2 if quick else None]

    worst, all_same, first = 0.0, True, None
    for name, options in variants:
        torch.manual_seed(0)
        model = harness.leap(initializer_range=0.2, tie_word_embeddings=False, **options).eval()
        ids = torch.randint(0, model.config.vocab_size, (1, tokens))
        with torch.no_grad():
            parallel = model(ids, use_cache=False).logits
        stepwise = (logits_in_steps(model, ids) - parallel).abs().max().item()
        in_chunks = (logits_in_steps(model, ids, (tokens // 2 - 3, tokens // 2 - 5)) - parallel).abs().max().item()
        with torch.no_grad():
            rounding = (model.double()(ids, use_cache=False).logits - parallel).abs().max().item()
        model.float()
        prompts = [torch.randint(0, model.config.vocab_size, (length,)) for length in (1, 7, 63, 200)]
        same = {
            "greedy": same_tokens(model, prompts[2:3], new_tokens),
            "beams": same_tokens(model, prompts[2:3], new_tokens, num_beams=4),
            "padded": same_tokens(model, prompts, new_tokens),
        }
        report.row(
            model=name,
            largest_logit=parallel.abs().max().item(),
            max_difference_one_token_at_a_time=stepwise,
            max_difference_in_chunks=in_chunks,
            parallel_float32_from_float64=rounding,
            greedy_identical=same["greedy"],
            beams_identical=same["beams"],
            left_padded_batch_identical=same["padded"],
        )
        first = max(stepwise, in_chunks) if first is None else first
        worst, all_same = max(worst, stepwise, in_chunks), all_same and all(same.values())

    report.check("max difference of logits, default", first, "<=", 1e-4)
    report.check("max difference of logits, worst of all options", worst, "<=", 1e-4)
    report.check("generated tokens identical everywhere", all_same, "==", True)
    report.note(
        f"float32, {tokens:,} tokens, random untied weights, initializer_range=0.2; {new_tokens} new tokens, 4 beams, "
        "padded batch of lengths 1, 7, 63, 200; each against the prompt alone without a cache."
    )
    report.note(
        "Without rescaling, float32 itself is as far from float64 in the parallel form as the two forms are apart."
    )
    report.finish()


if __name__ == "__main__":
    main()
