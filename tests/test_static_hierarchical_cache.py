"""The static cache of the hierarchical LM against the dynamic one and whole passes, in eager mode and compiled."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

from modeling_heptapod import HierarchicalCache, StaticHierarchicalCache
from modeling_heptapod.common.cache_checks import held_states
from modeling_heptapod.common.transformers_versions import CACHE
from tests.compiled_generation import compile_config
from tests.test_generation_hierarchical_lm import GREEDY, left_padded
from tests.tiny import mostly_slow
from tests.tiny_hierarchical_lm import SOME_FAST, VARIANTS, random_ids, tiny_hierarchical_lm


SEQ, ROOM = 43, 50
STATIC = {"cache_implementation": "static", "disable_compile": True}


def tiny(variant, **options):
    model = tiny_hierarchical_lm(**{"pad_token_id": 3, **VARIANTS[variant], **options})
    with torch.no_grad():
        model.get_input_embeddings().weight[3].normal_()  # a pad embedding that is not zero
    return model


def padded(lengths=(SEQ, 1, 17, 30)):
    """Ids and mask of left-padded rows, which begin at every phase of a stride."""
    _, ids, mask = left_padded(lengths, pad_id=3)
    return ids, mask


def run(model, ids, sizes, cache, start=0, mask=None, new_masks=False):
    """Logits of chunks of `sizes`, side by side."""
    logits = []
    for size in sizes:
        end = start + size
        part = None if mask is None else mask[:, start if new_masks else 0 : end]
        with torch.no_grad():
            out = model(ids[:, start:end], attention_mask=part, past_key_values=cache)
        assert out.past_key_values is cache
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # angles are float32


def addresses(cache):
    tensors = [x for layer in cache.layers for x in held_states(layer).values()]
    return [x.data_ptr() for x in (*tensors, cache.seen_tokens)]


@pytest.fixture
def compiler(fresh_compiler):
    torch.use_deterministic_algorithms(False)


# --- what it holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [SEQ, 75])
@pytest.mark.parametrize("variant", SOME_FAST)
def test_steps_and_chunks_equal_whole_rows(variant, room):
    model = tiny(variant).double()
    ids = random_ids(2, SEQ)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for sizes in ([1] * SEQ, [9] + [1] * 20 + [5] + [1] * 9, [3, 1, 16, 1, 1, 2, 11, 1, 7]):
        cache = StaticHierarchicalCache(model.config, room)
        close(run(model, ids, sizes, cache), expected)
        assert int(cache.get_seq_length()) == SEQ and not cache.rows_differ


@pytest.mark.parametrize("variant", SOME_FAST)
def test_padded_rows_equal_the_dynamic_cache(variant):
    """In chunks that are all pads for some rows; pads also come after tokens without any, and as single tokens."""
    model = tiny(variant).double()
    ids, mask = padded()
    mask[0, 20:22] = mask[3, -2] = 0
    for sizes in ([SEQ - 9] + [1] * 9, [12, 1, 1, 1, 14, 2] + [1] * 12, [20] + [1] * 8 + [6, 9]):
        expected = run(model, ids, sizes, HierarchicalCache(model.config), mask=mask)
        for new_masks in (False, True):
            cache = StaticHierarchicalCache(model.config, ROOM)
            close(run(model, ids, sizes, cache, mask=mask, new_masks=new_masks), expected)
            assert cache.lengths().tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("variant", ["two", "stride"])
def test_steps_without_a_mask_go_on_after_pads(variant):
    model = tiny(variant).double()
    ids, mask = padded()
    mask[:, -9:] = 1
    expected = run(model, ids, [SEQ - 9] + [1] * 9, HierarchicalCache(model.config), mask=mask)[:, -9:]
    cache = StaticHierarchicalCache(model.config, ROOM)
    run(model, ids, [SEQ - 9], cache, mask=mask)
    close(run(model, ids, [1] * 9, cache, start=SEQ - 9), expected)


def test_windows_turn_over_many_times():
    """A ring of few keys, phases, and strides, over a text many times as long; xPos is far from its center."""
    model = tiny_hierarchical_lm(
        compression_factors=[1, 4, 8],
        strides=[1, 1, 2],
        window_sizes=[3, 2, 5],
        xpos_scale_base=8,
    ).double()
    ids = random_ids(2, 300)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    cache = StaticHierarchicalCache(model.config, 300)
    close(run(model, ids, [40] + [1] * 130 + [50] + [1] * 80, cache), expected)
    assert [layer.keys.shape[2] for layer in cache.layers[:3]] == [3, 2 * 4, 5 * 4]


@pytest.mark.parametrize("variant", ["plain", "stride", "no-attention"])
def test_layers_are_stock_and_keep_their_memory(variant):
    model = tiny(variant).bfloat16()
    cache = StaticHierarchicalCache(model.config, ROOM)
    with_keys = StaticLayer if variant != "no-attention" else LinearAttentionLayer
    assert isinstance(cache.layers[0], with_keys) and isinstance(cache.layers[-1], LinearAttentionLayer)
    assert cache.is_compileable and not cache.has_tokens and int(cache.get_seq_length()) == 0
    assert cache.get_mask_sizes(1, 0) == (ROOM, 0)
    ids, mask = padded()
    run(model, ids, [7], cache, mask=mask)
    before = addresses(cache)
    run(model, ids, [1, 1, 5, 1], cache, start=7, mask=mask)
    cache.reorder_cache(torch.tensor([2, 2, 0, 1]))
    assert addresses(cache) == before
    assert all(x.dtype == torch.bfloat16 for layer in cache.layers for x in held_states(layer).values())


def test_reset_is_for_another_prompt_of_the_same_batch():
    model = tiny("stride").double()
    ids, mask = padded()
    cache = StaticHierarchicalCache(model.config, ROOM)
    run(model, ids, [30, 1, 1], cache, mask=mask)
    before = addresses(cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0 and not cache.has_tokens and not cache.rows_differ
    other, sizes = random_ids(4, SEQ, seed=4), [6, 1, 1, 5] + [1] * 30
    close(run(model, other, sizes, cache), run(model, other, sizes, HierarchicalCache(model.config)))
    assert addresses(cache) == before


@pytest.mark.parametrize("order", [[2, 0, 0, 3], [1], [2, 3, 1, 0, 1]], ids=["as many", "fewer", "more"])
@pytest.mark.parametrize("variant", ["stride", "blocks"])
def test_rows_are_reordered(variant, order):
    model, order = tiny(variant).double(), torch.tensor(order)
    ids, mask = padded()
    results = []
    for cache in (HierarchicalCache(model.config), StaticHierarchicalCache(model.config, ROOM)):
        run(model, ids, [33], cache, mask=mask)
        run(model, ids, [1], cache, start=33)
        other = copy.deepcopy(cache)
        cache.reorder_cache(order)
        results.append(run(model, ids[order], [1, 1, 1, 1, 3, 1], cache, start=34))
        results.append(run(model, ids, [1, 1, 1, 1, 3, 1], other, start=34))  # a copy goes its own way
    for got, expected in zip(results[2:], results[:2]):
        close(got, expected)


def test_attentions_cover_its_memory():
    model = tiny("two").double()
    ids, cache = random_ids(2, SEQ), StaticHierarchicalCache(model.config, ROOM)
    run(model, ids, [SEQ - 1], cache)
    got = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
    expected = model(ids, output_attentions=True).attentions
    assert [list(x.shape) for x in got[:2]] == [[2, 2, 1, 5], [2, 2, 1, 25]]
    slots = (torch.arange(SEQ - 5, SEQ) % 5).tolist()  # factor 1: the last five steps
    close(got[0][..., slots], expected[0][..., -1:, -5:])
    close(got[1][..., :22], expected[1][..., -1:, 0::2])  # factor 2, step 42: the even ones
    assert not got[1][..., 22:].any()


def test_what_is_returned_is_not_changed_by_the_next_token():
    """Where the stream that predicts has a stride, its last step is kept in the cache, too."""
    model = tiny("merge-all")
    ids, cache = random_ids(1, 12), StaticHierarchicalCache(model.config, ROOM)
    run(model, ids, [5], cache)
    outs = [model.model(ids[:, t : t + 1], past_key_values=cache).last_hidden_state for t in range(5, 12)]
    copies = [model.model(ids[:, : t + 1], use_cache=False).last_hidden_state[:, -1:] for t in range(5, 12)]
    for out, expected in zip(outs, copies):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[10, 1], [11], [4, 4, 3], [1] * 11])
def test_a_full_cache_is_named_and_not_written_past_its_end(sizes):
    model = tiny("stride")
    ids, cache = random_ids(2, SEQ), StaticHierarchicalCache(model.config, 10)
    held = sum(sizes[:-1])
    run(model, ids, sizes[:-1], cache) if held else None
    match = f"`{CACHE}` is full: .*`max_cache_len`=10 tokens and holds {held}, but {sizes[-1]} more.*StaticHierarchicalCache"
    with pytest.raises(ValueError, match=match):
        run(model, ids, sizes[-1:], cache, start=held)
    assert int(cache.get_seq_length()) == held
    if held < 10:  # nothing was written: what fits goes on
        got = run(model, ids, [10 - held], cache, start=held)
        torch.testing.assert_close(got, model(ids[:, :10]).logits[:, held:], rtol=1e-4, atol=1e-4)


def test_its_length_is_checked():
    model = tiny_hierarchical_lm(compression_factors=[1, 2], window_sizes=[None, 6], xpos_scale_base=1)
    with pytest.raises(ValueError, match="`max_cache_len` must be at least 1, got 0"):
        StaticHierarchicalCache(model.config, 0)
    with pytest.raises(TypeError, match="`max_cache_len` must be an integer, got 2.5"):
        StaticHierarchicalCache(model.config, 2.5)
    ids = random_ids(1, 60)
    assert run(model, ids, [20] + [1] * 40, StaticHierarchicalCache(model.config, 60)).isfinite().all()
    with pytest.raises(ValueError, match="at most 60 steps.*got `max_cache_len`=61, which makes 61.*xpos_scale_base"):
        run(model, ids, [20], StaticHierarchicalCache(model.config, 61))
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="at most 16 steps"):
        run(model, ids, [10], StaticHierarchicalCache(model.config, 17))


def test_a_cache_of_another_length_or_model_is_refused():
    model = tiny("two")
    ids, cache = random_ids(2, 5), StaticHierarchicalCache(model.config, ROOM)
    run(model, ids, [4], cache)
    cache.max_cache_len = 30  # by hand
    with pytest.raises(ValueError, match=f"`{CACHE}` does not fit this model: layer 1 has keys of shape"):
        run(model, ids, [1], cache, start=4)
    with pytest.raises(ValueError, match=f"`{CACHE}` does not fit this model"):
        run(tiny("stride"), ids, [4], StaticHierarchicalCache(model.config, ROOM))


# --- generate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("stride",)))
def test_every_way_to_generate(variant):
    model = tiny(variant)
    ids, mask = padded((1, 7, 23))
    for batch in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": random_ids(2, 9)}):
        for how in (
            {},
            {"prefill_chunk_size": 5},
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        ):
            written = []
            for kind in ({}, STATIC):
                torch.manual_seed(3)
                how = {"max_new_tokens": 19, "return_dict_in_generate": True, **GREEDY, **how}
                written.append(model.generate(**batch, **how, **kind))
            assert torch.equal(*(out.sequences for out in written))
            assert type(written[1].past_key_values) is StaticHierarchicalCache


def test_generation_goes_on_from_a_static_cache():
    """A second prompt of several tokens, over a padded batch; then, after a reset, another text."""
    model = tiny("stride")
    ids, mask = padded((4, 9))
    cache, written = StaticHierarchicalCache(model.config, 40), []
    for held in (cache, HierarchicalCache(model.config)):
        kind = {"past_key_values": held, "disable_compile": True, **GREEDY}
        first = model.generate(ids, attention_mask=mask, max_new_tokens=6, **kind)
        follow = torch.cat((first, random_ids(2, 5, seed=2)), dim=1)
        longer = torch.nn.functional.pad(mask, (0, 11), value=1)
        written.append(model.generate(follow, attention_mask=longer, max_new_tokens=10, **kind))
    assert torch.equal(*written)
    cache.reset()
    again = random_ids(2, 11, seed=6)
    out = model.generate(again, max_new_tokens=10, past_key_values=cache, disable_compile=True, **GREEDY)
    assert torch.equal(out, model.generate(again, max_new_tokens=10, use_cache=False, **GREEDY))


def test_prompts_of_embeddings():
    model = tiny("stride")
    ids, mask = padded((7, 12))
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=9, **GREEDY)
    embeds = model.get_input_embeddings()(ids).detach()
    out = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=9, **GREEDY, **STATIC)
    assert torch.equal(out, expected[:, 12:])


# --- compiled ----------------------------------------------------------------------------------------------------------


def compiled_steps(model, ids, cache, first, graphs, prepare):
    """Logits of single tokens from `first` on by a compiled step."""
    step = torch.compile(model.forward, fullgraph=True, backend=graphs)
    logits = []
    for place in range(first, ids.shape[1]):
        if prepare:
            cache.prepare_step()
        with torch.no_grad():
            logits.append(step(ids[:, place : place + 1].clone(), past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("prepare", mostly_slow([False, True], (True,)))
@pytest.mark.parametrize("with_pads", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("stride",)))
def test_a_graph_for_each_stride(variant, with_pads, prepare):
    """Without knowledge of which streams have a step, one graph that computes all."""
    model = tiny(variant, num_hidden_layers=1).double()
    ids, mask = padded() if with_pads else (random_ids(2, SEQ), None)
    first = SEQ - 18
    if mask is not None:
        mask[:, first:] = 1
    expected = run(model, ids, [first] + [1] * 18, HierarchicalCache(model.config), mask=mask)[:, first:]
    cache, graphs = StaticHierarchicalCache(model.config, ROOM), CompileCounterWithBackend("eager")
    for _ in range(2):  # again after a reset
        run(model, ids, [first], cache, mask=mask)
        close(compiled_steps(model, ids, cache, first, graphs, prepare), expected)
        assert int(cache.get_seq_length()) == SEQ
        cache.reset()
    assert graphs.frame_count <= (len({1, *model.config.strides}) if prepare else 1)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("variant", ["stride", "cross", "attention-compressor"])
def test_the_default_compiler(variant, prepare):
    model = tiny(variant, num_hidden_layers=1)
    ids, mask = padded()
    mask[:, -9:] = 1
    expected = run(model, ids, [SEQ - 9] + [1] * 9, HierarchicalCache(model.config), mask=mask)[:, -9:]
    cache, graphs = StaticHierarchicalCache(model.config, ROOM), CompileCounterWithBackend("inductor")
    run(model, ids, [SEQ - 9], cache, mask=mask)
    got = compiled_steps(model, ids, cache, SEQ - 9, graphs, prepare)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["stride", "predict-all"])
def test_generate_compiles_its_steps(variant):
    """As on a GPU: a graph for each stride for all steps of two texts, as many for those of a shorter one with pads."""
    model, (config, graphs) = tiny(variant, num_hidden_layers=1), compile_config()
    ids, mask = padded((3, 7))
    batches = [{"input_ids": random_ids(2, 9)}, {"input_ids": random_ids(2, 6)}]
    batches += [{"input_ids": ids, "attention_mask": mask}] * 2
    counts, strides = [], len({1, *model.config.strides})
    for batch in batches:
        out = model.generate(
            **batch, max_new_tokens=12, cache_implementation="static", compile_config=config, **GREEDY
        )
        assert torch.equal(out, model.generate(**batch, max_new_tokens=12, **GREEDY))
        counts.append(len(graphs))
    assert counts == [strides, strides, 2 * strides, 2 * strides]
    how = {"cache_implementation": "static", "compile_config": config, "prefill_chunk_size": 4, **GREEDY}
    assert torch.equal(out, model.generate(**batch, max_new_tokens=12, **how))
    assert len(graphs) == counts[-1]  # chunks are not compiled
