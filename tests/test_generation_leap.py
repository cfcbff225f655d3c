"""`generate` on the recurrent form gives what the parallel forward gives, in every mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from modeling_heptapod import RecurrentCache, StaticRecurrentCache
from modeling_heptapod.common.transformers_versions import CACHE
from tests.tiny import mostly_slow
from tests.tiny_leap import VARIANTS, random_ids, tiny_leap


# No token is a pad by its id: `generate` would mask it in a prompt, and beam search wants an id.
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 50}


def left_padded(lengths, pad_id=0):
    rows = [random_ids(1, n, seed=n) for n in lengths]
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad_id) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return rows, ids, mask


@pytest.mark.parametrize("variant", ["default", pytest.param("alibi", marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_the_parallel_forward(variant):
    model = tiny_leap(**VARIANTS[variant])
    prompt = random_ids(2, 20)
    tokens = model.generate(prompt, max_new_tokens=256, **GREEDY)
    assert tokens.shape == (2, 276)
    # Teacher-forced: one parallel pass over the result says the same at every place as 256 passes over prefixes.
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :-1]).logits[:, 19:].argmax(-1), tokens[:, 20:])
    assert len(tokens[0].unique()) > 10


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("default", "alibi-null", "absolute", "additive-alibi")))
def test_every_variant_generates_what_it_computes_without_a_cache(variant):
    model = tiny_leap(**VARIANTS[variant])
    prompt = random_ids(2, 20)
    tokens = model.generate(prompt, max_new_tokens=30, **GREEDY)
    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=30, use_cache=False, **GREEDY))
    static = model.generate(prompt, max_new_tokens=30, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(tokens, static)
    chunked = model.generate(prompt, max_new_tokens=30, prefill_chunk_size=7, **GREEDY)
    assert torch.equal(tokens, chunked)


def test_a_left_padded_batch_generates_what_its_rows_do_alone():
    model = tiny_leap(pad_token_id=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[0].normal_()  # a pad embedding that is not zero
    rows, ids, mask = left_padded((1, 7, 63, 200))
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=256, **GREEDY)
    for i, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=256, **GREEDY)
        assert torch.equal(tokens[i, 200:], alone[0, row.shape[1] :]), i


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("default", "alibi-null", "absolute", "additive-alibi")))
def test_padding_in_every_variant(variant):
    model = tiny_leap(**VARIANTS[variant])
    rows, ids, mask = left_padded((1, 7, 63))
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=25, **GREEDY)
    chunked = model.generate(ids, attention_mask=mask, max_new_tokens=25, prefill_chunk_size=20, **GREEDY)
    assert torch.equal(tokens, chunked)
    static = model.generate(
        ids, attention_mask=mask, max_new_tokens=25, cache_implementation="static", disable_compile=True, **GREEDY
    )
    assert torch.equal(tokens, static)
    for i, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=25, **GREEDY)
        assert torch.equal(tokens[i, 63:], alone[0, row.shape[1] :]), i
    single = model.generate(ids[1:2], attention_mask=mask[1:2], max_new_tokens=25, **GREEDY)  # a batch of one, padded
    assert torch.equal(single[0, 63:], tokens[1, 63:])


@pytest.mark.parametrize("variant", ["default", "additive", "alibi", "absolute"])
def test_beam_search(variant):
    model = tiny_leap(**VARIANTS[variant])
    prompt = random_ids(2, 20)
    how = {"num_beams": 4, "max_new_tokens": 30, "num_return_sequences": 2, **GREEDY}
    tokens = model.generate(prompt, **how)
    assert tokens.shape == (4, 50)
    assert torch.equal(tokens, model.generate(prompt, use_cache=False, **how))


def test_beam_search_over_a_padded_batch():
    model = tiny_leap()
    rows, ids, mask = left_padded((1, 7, 40))
    how = {"num_beams": 4, "max_new_tokens": 30, **GREEDY}
    tokens = model.generate(ids, attention_mask=mask, **how)
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, use_cache=False, **how))
    for i, row in enumerate(rows):
        assert torch.equal(tokens[i, 40:], model.generate(row, **how)[0, row.shape[1] :]), i


@pytest.mark.slow
def test_beam_search_for_256_tokens():
    model = tiny_leap()
    prompt = random_ids(1, 20)
    how = {"num_beams": 4, "max_new_tokens": 256, **GREEDY}
    assert torch.equal(model.generate(prompt, **how), model.generate(prompt, use_cache=False, **how))


def test_sampling_with_a_seed():
    model = tiny_leap()
    prompt, how = random_ids(2, 20), {"do_sample": True, "max_new_tokens": 40, "pad_token_id": 50, "top_k": 20}
    draws = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        draws.append(model.generate(prompt, use_cache=use_cache, **how))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    torch.manual_seed(4)
    assert not torch.equal(draws[0], model.generate(prompt, **how))


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streaming():
    model, streamer = tiny_leap(), Collect()
    tokens = model.generate(random_ids(1, 9), max_new_tokens=20, streamer=streamer, **GREEDY)
    assert streamer.tokens == tokens[0].tolist() and streamer.ended


@pytest.mark.parametrize("padded", [False, True])
def test_prompts_of_embeddings(padded):
    model = tiny_leap()
    _, ids, mask = left_padded((7, 30) if padded else (30, 30))
    embeds = model.get_input_embeddings()(ids).detach()
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=40, **GREEDY)[:, 30:]
    by_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=40, **GREEDY)
    assert torch.equal(by_embeds, tokens)
    without = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=40, use_cache=False, **GREEDY)
    assert torch.equal(without, tokens)


@pytest.mark.parametrize("variant", ["default", "additive", "alibi", "absolute"])
def test_generation_goes_on_from_a_returned_cache(variant):
    model = tiny_leap(**VARIANTS[variant])
    prompt, how = random_ids(2, 20), {"return_dict_in_generate": True, **GREEDY}
    whole = model.generate(prompt, max_new_tokens=60, **GREEDY)
    first = model.generate(prompt, max_new_tokens=25, **how)
    assert isinstance(first.past_key_values, RecurrentCache)
    assert first.past_key_values.get_seq_length() == 44
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=35, **how)
    assert torch.equal(rest.sequences, whole)
    # A second turn: several tokens more, on top of what was generated.
    said = torch.cat((rest.sequences, random_ids(2, 13, seed=8)), dim=1)
    turn = model.generate(said, past_key_values=rest.past_key_values, max_new_tokens=20, **how)
    assert torch.equal(turn.sequences, model.generate(said, max_new_tokens=20, **GREEDY))


def test_a_padded_batch_goes_on_from_a_returned_cache():
    model = tiny_leap()
    _, ids, mask = left_padded((3, 20))
    first = model.generate(ids, attention_mask=mask, max_new_tokens=10, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat((mask, torch.ones(2, 10, dtype=torch.long)), dim=1)
    rest = model.generate(
        first.sequences, attention_mask=longer, past_key_values=first.past_key_values, max_new_tokens=10, **GREEDY
    )
    assert torch.equal(rest, model.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY))


def test_a_given_cache_is_used():
    model = tiny_leap()
    prompt = random_ids(1, 12)
    expected = model.generate(prompt, max_new_tokens=20, **GREEDY)
    for cache_class in (RecurrentCache, StaticRecurrentCache):
        cache = cache_class(model.config)
        tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=20, disable_compile=True, **GREEDY)
        assert torch.equal(tokens, expected) and int(cache.get_seq_length()) == 31


def test_caches_and_modes_that_cannot_work_say_so():
    model, prompt = tiny_leap(), random_ids(1, 12)
    with pytest.raises(TypeError, match=rf"{CACHE}.*RecurrentCache"):
        model.generate(prompt, past_key_values=DynamicCache(config=model.config), max_new_tokens=3, **GREEDY)
    for kind in ("quantized", "offloaded"):
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(prompt, cache_implementation=kind, max_new_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(prompt, assistant_model=tiny_leap(seed=1), max_new_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(prompt, prompt_lookup_num_tokens=2, max_new_tokens=3, **GREEDY)


@pytest.mark.parametrize("use_cache", [True, False])
def test_contexts_longer_than_the_position_table(use_cache):
    prompt = random_ids(1, 12)
    how = {"max_new_tokens": 30, "use_cache": use_cache, **GREEDY}
    for kind in ("rotary", "alibi", "none"):
        short = tiny_leap(position_embedding_type=kind, max_position_embeddings=16)
        roomy = tiny_leap(position_embedding_type=kind, max_position_embeddings=512)
        assert torch.equal(short.generate(prompt, **how), roomy.generate(prompt, **how))
    learned = tiny_leap(position_embedding_type="absolute", max_position_embeddings=16)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        learned.generate(prompt, **how)
    assert learned.generate(prompt, **{**how, "max_new_tokens": 5}).shape == (1, 17)


def test_an_end_of_sequence_token_ends_a_sequence():
    model = tiny_leap()
    prompt = random_ids(2, 12)
    tokens = model.generate(prompt, max_new_tokens=30, **GREEDY)
    end = tokens[0, 20].item()
    assert end != 0  # the pad, which ends nothing
    stopped = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    first = (tokens[0, 12:] == end).nonzero()[0].item() + 12
    assert torch.equal(stopped[0, : first + 1], tokens[0, : first + 1]) and not stopped[0, first + 1 :].any()


@pytest.mark.slow
@pytest.mark.parametrize("padded, backend", [(False, "inductor"), (True, "eager")])
def test_generation_with_a_compiled_step(padded, backend):
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    model, prompt = tiny_leap(), random_ids(1, 12)
    mask = torch.ones_like(prompt)
    mask[:, 3:7] = 0 if padded else 1
    forward, graphs = model.forward, CompileCounterWithBackend(backend)
    cache = StaticRecurrentCache(model.config)
    compiled = torch.compile(forward, backend=graphs)
    model.forward = lambda *args, **kwargs: (compiled if cache.has_previous_state(0) else forward)(*args, **kwargs)
    how = {"attention_mask": mask, "max_new_tokens": 30, **GREEDY}
    tokens = model.generate(prompt, past_key_values=cache, disable_compile=True, **how)
    model.forward = forward
    assert torch.equal(tokens, model.generate(prompt, **how))
    assert graphs.frame_count <= 2
