"""`generate` with a cache gives what the parallel forward gives, in every mode."""

import pickle

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from modeling_heptapod import HierarchicalCache
from modeling_heptapod.common.transformers_versions import CACHE
from tests.tiny import mostly_slow
from tests.tiny_hierarchical_lm import SOME_FAST, VARIANTS, random_ids, tiny_hierarchical_lm


# No token is a pad by its id: `generate` would mask it in a prompt, and beam search wants an id.
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 50}


def left_padded(lengths, pad_id=0):
    rows = [random_ids(1, n, seed=n) for n in lengths]
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad_id) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return rows, ids, mask


def in_chunks(model, ids, sizes, mask=None):
    """Logits of the chunks one after the other, and the cache after the last."""
    cache, logits, at = None, [], 0
    with torch.no_grad():
        for size in sizes:
            seen = None if mask is None else mask[:, : at + size]
            out = model(ids[:, at : at + size], attention_mask=seen, past_key_values=cache, use_cache=True)
            cache, at = out.past_key_values, at + size
            logits.append(out.logits)
    assert at == ids.shape[1] == cache.get_seq_length()
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("variant", SOME_FAST)
def test_steps_and_chunks_equal_the_parallel_forward(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant]).double()
    ids = random_ids(2, 75)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for sizes in ([1] * 75, [20] + [1] * 55, [3, 1, 16, 9, 1, 1, 2, 31, 11], [40, 35]):
        logits, _ = in_chunks(model, ids, sizes)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # angles are float32


@pytest.mark.parametrize("window_type", ["sliding", "block"])
def test_windows_above_33(window_type):
    """Chunks of whole sequences are at least 32 steps long; wider windows make longer ones."""
    options = {"window_sizes": [36, 40], "strides": [1, 2], "window_type": window_type, "xpos_scale_base": 512}
    model = tiny_hierarchical_lm(**options).double()
    ids = random_ids(1, 180)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        masked = model(ids, use_cache=False, output_attentions=True).logits  # one mask for the whole sequence
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)
    for sizes in ([60] + [1] * 120, [1, 90, 89]):
        logits, _ = in_chunks(model, ids, sizes)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_steps_equal_the_parallel_forward(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant])
    ids = random_ids(1, 1024)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    logits, _ = in_chunks(model, ids, [5] + [1] * 1019)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", SOME_FAST)
def test_padded_chunks_equal_rows_alone(variant):
    """Chunks that are all pads for some rows, and rows that begin at every phase of a stride."""
    model = tiny_hierarchical_lm(pad_token_id=3, **VARIANTS[variant]).double()
    with torch.no_grad():
        model.get_input_embeddings().weight[3].normal_()
    rows, ids, mask = left_padded((40, 1, 17, 30, 23), pad_id=3)
    more = random_ids(5, 4, seed=7)
    for sizes in ([40], [40 - 9] + [1] * 9, [12, 1, 1, 1, 14, 2] + [1] * 9, [1] * 40):
        logits, _ = in_chunks(model, ids, sizes, mask)
        longer, longer_mask = torch.cat((ids, more), dim=1), torch.cat((mask, mask.new_ones(5, 4)), dim=1)
        follow, _ = in_chunks(model, longer, [*sizes, 1, 3], longer_mask)
        for i, row in enumerate(rows):
            with torch.no_grad():
                alone = model(torch.cat((row, more[i : i + 1]), dim=1), use_cache=False).logits[0]
            torch.testing.assert_close(logits[i, 40 - row.shape[1] :], alone[:-4], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(follow[i, -4:], alone[-4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", SOME_FAST)
def test_every_variant_generates_what_it_computes_without_a_cache(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant])
    prompt = random_ids(2, 20)
    tokens = model.generate(prompt, max_new_tokens=40, **GREEDY)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :-1], use_cache=False).logits[:, 19:].argmax(-1), tokens[:, 20:])
    assert len(tokens[0].unique()) > 5
    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=40, use_cache=False, **GREEDY))
    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=40, prefill_chunk_size=7, **GREEDY))


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("plain", "two", "stride", "blocks")))
def test_padding_in_every_variant(variant):
    model = tiny_hierarchical_lm(pad_token_id=0, **VARIANTS[variant])
    with torch.no_grad():
        model.get_input_embeddings().weight[0].normal_()  # a pad embedding that is not zero
    rows, ids, mask = left_padded((1, 7, 43))
    how = {"max_new_tokens": 25, **GREEDY}
    tokens = model.generate(ids, attention_mask=mask, **how)
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, prefill_chunk_size=20, **how))
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, use_cache=False, **how))
    for i, row in enumerate(rows):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **how)
        assert torch.equal(tokens[i, 43:], alone[0, row.shape[1] :]), i
    single = model.generate(ids[1:2], attention_mask=mask[1:2], **how)  # a batch of one, padded
    assert torch.equal(single[0, 43:], tokens[1, 43:])


@pytest.mark.parametrize("variant", SOME_FAST)
def test_beam_search(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant])
    prompt = random_ids(2, 20)
    how = {"num_beams": 4, "max_new_tokens": 20, "num_return_sequences": 2, **GREEDY}
    tokens = model.generate(prompt, **how)
    assert tokens.shape == (4, 40)
    assert torch.equal(tokens, model.generate(prompt, use_cache=False, **how))


@pytest.mark.parametrize("variant", ["two", "stride", "predict-all"])
def test_beam_search_over_a_padded_batch(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant])
    rows, ids, mask = left_padded((1, 7, 30))
    how = {"num_beams": 4, "max_new_tokens": 20, **GREEDY}
    tokens = model.generate(ids, attention_mask=mask, **how)
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, use_cache=False, **how))
    for i, row in enumerate(rows):
        assert torch.equal(tokens[i, 30:], model.generate(row, **how)[0, row.shape[1] :]), i


def test_sampling_with_a_seed():
    model = tiny_hierarchical_lm(**VARIANTS["stride"])
    prompt, how = random_ids(2, 20), {"do_sample": True, "max_new_tokens": 30, "pad_token_id": 50, "top_k": 20}
    draws = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        draws.append(model.generate(prompt, use_cache=use_cache, **how))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    torch.manual_seed(4)
    assert not torch.equal(draws[0], model.generate(prompt, **how))


@pytest.mark.parametrize("padded", [False, True])
def test_prompts_of_embeddings(padded):
    model = tiny_hierarchical_lm(**VARIANTS["stride"])
    _, ids, mask = left_padded((7, 30) if padded else (30, 30))
    embeds = model.get_input_embeddings()(ids).detach()
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY)[:, 30:]
    by_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=20, **GREEDY)
    assert torch.equal(by_embeds, tokens)


@pytest.mark.parametrize("variant", SOME_FAST)
def test_generation_goes_on_from_a_returned_cache(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant])
    how = {"return_dict_in_generate": True, **GREEDY}
    first = model.generate(random_ids(2, 9), max_new_tokens=8, **how)
    follow = torch.cat((first.sequences, random_ids(2, 5, seed=2)), dim=1)
    more = model.generate(follow, past_key_values=first.past_key_values, max_new_tokens=15, **GREEDY)
    assert torch.equal(more, model.generate(follow, max_new_tokens=15, use_cache=False, **GREEDY))


def test_a_padded_batch_goes_on_from_a_returned_cache():
    model = tiny_hierarchical_lm(**VARIANTS["stride"])
    _, ids, mask = left_padded((3, 20))
    first = model.generate(ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
    follow = torch.cat((first.sequences, random_ids(2, 5, seed=2)), dim=1)
    mask = torch.nn.functional.pad(mask, (0, follow.shape[1] - mask.shape[1]), value=1)
    how = {"attention_mask": mask, "max_new_tokens": 15, **GREEDY}
    more = model.generate(follow, past_key_values=first.past_key_values, **how)
    assert torch.equal(more, model.generate(follow, use_cache=False, **how))


def test_a_given_cache_is_used():
    model = tiny_hierarchical_lm()
    cache = HierarchicalCache(model.config)
    out = model.generate(random_ids(1, 9), past_key_values=cache, max_new_tokens=6, **GREEDY)
    assert cache.get_seq_length() == out.shape[1] - 1
    assert torch.equal(out, model.generate(random_ids(1, 9), max_new_tokens=6, **GREEDY))


def test_a_cache_can_be_used_again_after_a_reset():
    model = tiny_hierarchical_lm(**VARIANTS["stride"])
    ids = random_ids(2, 30)
    logits, cache = in_chunks(model, ids, [10] + [1] * 20)
    cache.reset()
    assert len(pickle.dumps(cache)) < 1.1 * len(pickle.dumps(HierarchicalCache(model.config)))  # no memory is held
    with torch.no_grad():
        again = [model(ids[:, :10], past_key_values=cache).logits]
        again += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 30)]
    assert torch.equal(torch.cat(again, dim=1), logits)


@pytest.mark.parametrize("variant", ["stride", "hourglass"])
def test_a_reset_leaves_nothing_to_rows_that_begin_with_pads(variant):
    """A chunk of pads alone hands on what was there before it, which is nothing."""
    model = tiny_hierarchical_lm(pad_token_id=3, **VARIANTS[variant])
    _, ids, mask = left_padded((30, 5), pad_id=3)
    sizes = [20, 6, 1, 1, 1, 1]
    expected, cache = in_chunks(model, ids, sizes, mask)
    cache.reset()
    cache.reorder_cache(torch.tensor([5]))  # of rows there are none
    at, again = 0, []
    for size in sizes:
        with torch.no_grad():
            chunk = ids[:, at : at + size]
            again.append(model(chunk, attention_mask=mask[:, : at + size], past_key_values=cache).logits)
        at += size
    assert torch.equal(torch.cat(again, dim=1), expected)


def test_caches_and_modes_that_cannot_work_say_so():
    model = tiny_hierarchical_lm()
    prompt = random_ids(1, 9)
    with pytest.raises(TypeError, match=f"{CACHE}"):
        model(prompt, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(prompt, cache_implementation="quantized", max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="rows"):
        cache = model(prompt, use_cache=True).past_key_values
        model(random_ids(2, 1), past_key_values=cache)


def test_windowed_caches_do_not_grow():
    model = tiny_hierarchical_lm(compression_factors=[1, 2, 8], strides=[1, 1, 4], window_sizes=[5, 0, 3])
    ids = random_ids(1, 400)

    def held(tokens):
        _, cache = in_chunks(model, ids[:, :tokens], [3] + [1] * (tokens - 3))
        layers = [x for x in cache.layers if hasattr(x, "keys")]
        assert [x.keys.shape[2] for x in layers] == [4, 4] * 2
        return sum(x.keys.untyped_storage().nbytes() for x in layers)

    assert held(400) == held(40)
    _, cache = in_chunks(model, ids, [200, 200])
    assert all(x.keys.untyped_storage().nbytes() == x.keys.nbytes for x in cache.layers if hasattr(x, "keys"))


def test_long_contexts_keep_their_precision():
    """Decay by position leaves the range of floats many times over; only distances may count."""
    model = tiny_hierarchical_lm(compression_factors=[1, 2], window_sizes=[None, 6], xpos_scale_base=1)
    ids = random_ids(1, 300)
    logits, _ = in_chunks(model, ids, [5] + [1] * 295)
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match="xpos_scale_base"):
        model(ids)
    chunked, _ = in_chunks(model, ids, [25] * 12)
    torch.testing.assert_close(chunked, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_contexts_in_half_precision(dtype):
    model = tiny_hierarchical_lm(compression_factors=[1, 2], window_sizes=[None, 6], xpos_scale_base=4).to(dtype)
    ids = random_ids(1, 300)
    logits, cache = in_chunks(model, ids, [5] + [1] * 295)
    assert logits.isfinite().all() and cache.layers[0].keys.dtype == dtype
    longest = {torch.bfloat16: 240, torch.float16: 64}[dtype]
    with pytest.raises(ValueError, match="xpos_scale_base"):
        model(random_ids(1, longest + 1))
    with torch.no_grad():
        assert model(random_ids(1, longest)).logits.isfinite().all()
        cache = model(ids[:, :10]).past_key_values
        assert model(random_ids(1, longest // 2), past_key_values=cache).logits.isfinite().all()
        with pytest.raises(ValueError, match="after cached.*xpos_scale_base"):
            model(random_ids(1, longest // 2 + 1), past_key_values=model(ids[:, :10]).past_key_values)


def test_float16_autocast_is_told_of_what_float16_holds():
    model = tiny_hierarchical_lm(compression_factors=1, window_sizes=None, xpos_scale_base=4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert model(random_ids(1, 64)).logits.isfinite().all()
        with pytest.raises(ValueError, match="xpos_scale_base"):
            model(random_ids(1, 65))
        logits, _ = in_chunks(model, random_ids(1, 100), [1] * 100)
        assert logits.isfinite().all()


@pytest.mark.parametrize("seq_idx", [None, torch.zeros(1, 60).long()])
def test_the_longest_pass_is_finite_in_every_kernel(seq_idx):
    model = tiny_hierarchical_lm(compression_factors=1, window_sizes=None, xpos_scale_base=1)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with torch.no_grad(), sdpa_kernel(backend):
            assert model(random_ids(1, 60), seq_idx=seq_idx).logits.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padded_batches_in_half_precision(variant):
    model = tiny_hierarchical_lm(**{**VARIANTS[variant], "xpos_scale_base": 1}).bfloat16()
    _, ids, mask = left_padded((1, 7, 30))
    assert model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0).shape == (
        3,
        50,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_can_change_places(variant):
    """Also between prompts of different length, and while there is room left in the memory of keys."""
    model = tiny_hierarchical_lm(**VARIANTS[variant]).double()
    rows, ids, mask = left_padded((1, 7, 30))
    order, more = torch.tensor([2, 0, 0]), random_ids(3, 9, seed=5)
    first = torch.cat((ids, more[:, :4]), dim=1)
    _, cache = in_chunks(model, first, [30] + [1] * 4, torch.nn.functional.pad(mask, (0, 4), value=1))
    cache.reorder_cache(order)
    with torch.no_grad():
        for t in range(4, 9):
            logits = model(more[:, t : t + 1], past_key_values=cache).logits[:, 0]
            for i, source in enumerate(order):
                alone = torch.cat((rows[source], more[source : source + 1, :4], more[i : i + 1, 4 : t + 1]), dim=1)
                expected = model(alone, use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits[i], expected, rtol=1e-5, atol=1e-5)
