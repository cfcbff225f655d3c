"""What the tiny models of all families have in common."""

import pytest
import torch

import modeling_heptapod


def mostly_slow(values, fast):
    """Parameters of a test that takes long: all `values`, those that are not in `fast` marked slow."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def build_tiny(head: str, config, seed: int, also: str = "norm"):
    """A model in evaluation mode. Biases, norms and what has `also` in its name are random, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = getattr(modeling_heptapod, head)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or also in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_ids(batch, seq, vocab_size=50, seed=1):
    """Token ids `[batch, seq]` from the whole vocabulary."""
    return torch.randint(vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def a_loop_of_ones_own(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Greedy, as transformers' guide to `custom_generate` writes loops."""
    first, unfinished = True, torch.ones(len(input_ids), dtype=torch.bool)
    while unfinished.any():
        length = None if first else 1
        inputs = model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=first, next_sequence_length=length, **kwargs
        )
        outputs = model(**inputs, return_dict=True)
        kwargs, first = model._update_model_kwargs_for_generation(outputs, kwargs), False
        tokens = outputs.logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat((input_ids, tokens), dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
    return input_ids
