"""MultiGrid's static cache against the dynamic one and against whole forward passes, in eager mode and compiled."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

from modeling_heptapod import MultiGridCache, StaticMultiGridCache
from modeling_heptapod.common.cache_checks import held_states
from modeling_heptapod.common.transformers_versions import CACHE
from modeling_heptapod.multigrid.multigrid_cores import lstm_step
from tests.attention_kernels import use_flash_attention, use_flex_attention
from tests.compiled_generation import compile_config
from tests.test_generation_multigrid import BOTH_ORDERS, GREEDY, WITH_TRACKS, left_padded, two_axes, with_annotator
from tests.tiny import mostly_slow
from tests.tiny_multigrid import SOME_FAST, VARIANTS, random_grid, tiny_multigrid


SEQ, ROOM = 23, 29
PADS = [(0, slice(0, 5)), (1, slice(9, 12)), (1, slice(14, 15))]  # before a row, and between its tokens
STATIC = {"cache_implementation": "static", "disable_compile": True}
WITH_ATTENTION = [name for name, options in VARIANTS.items() if "core" not in options]
ONE_OF_A_CORE = ("axes", "leap", "lstm")


def padded_grid(model):
    """Inputs of three rows, one of them without pads."""
    mask = torch.ones(3, SEQ, dtype=torch.long)
    for row, places in PADS:
        mask[row, places] = 0
    return {**random_grid(model, 3, SEQ), "attention_mask": mask}


def run(model, inputs, sizes, cache=None, start=0, new_masks=False, **kwargs):
    """All logits of chunks of `sizes`, side by side, and the cache after the last. The mask is of all tokens, or of the new."""
    logits = []
    for size in sizes:
        end = start + size
        part = {name: x[..., start:end] for name, x in inputs.items() if name != "attention_mask"}
        if "attention_mask" in inputs:
            part["attention_mask"] = inputs["attention_mask"][:, start if new_masks else 0 : end]
        with torch.no_grad():
            out = model(**part, past_key_values=cache, use_cache=True, **kwargs)
        cache, start = out.past_key_values, end
        logits.append(torch.cat((out.logits, *(out.axis_logits or ())), dim=-1))
    return torch.cat(logits, dim=1), cache


def real(logits, mask):
    return logits[mask.bool()]


def addresses(cache):
    tensors = [x for layer in cache.layers for x in held_states(layer).values()]
    tensors += [x for x in (cache.seen_tokens, cache.past_mask) if x is not None]
    return [x.data_ptr() for x in tensors]


@pytest.fixture
def compiler(fresh_compiler):
    torch.use_deterministic_algorithms(False)


# --- what it holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [SEQ, ROOM])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", SOME_FAST)
def test_steps_and_chunks_equal_the_dynamic_cache_and_whole_rows(variant, attention, room):
    if attention == "eager" and variant not in WITH_ATTENTION:
        pytest.skip("its core is no transformer")
    model = tiny_multigrid(**VARIANTS[variant]).double()
    model.set_attn_implementation(attention)
    inputs = padded_grid(model)
    mask = inputs["attention_mask"]
    whole = model(**inputs, use_cache=False)
    whole = torch.cat((whole.logits, *(whole.axis_logits or ())), dim=-1)
    factored = model.config.axis_order == "factored"  # logits at the end of a chunk do not know the next axis ids
    for sizes in ([1] * SEQ, [10, 1, 1, 3, 1, 1, 6], [3, 9, 11]):
        expected, _ = run(model, inputs, sizes, MultiGridCache(model.config))
        logits, cache = run(model, inputs, sizes, StaticMultiGridCache(model.config, room))
        torch.testing.assert_close(real(logits, mask), real(expected, mask), rtol=1e-9, atol=1e-9)
        if not factored:
            torch.testing.assert_close(real(logits, mask), real(whole, mask), rtol=1e-9, atol=1e-9)
        assert int(cache.get_seq_length()) == SEQ
        assert cache.lengths().tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("variant", ONE_OF_A_CORE)
def test_pads_that_come_after_tokens_without_any(variant):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    inputs = padded_grid(model)
    inputs = {name: x[1:] for name, x in inputs.items()}  # the first pad is at 9
    sizes, mask = [4, 1, 1, 4, 1, 1, 1, 1, 9], inputs["attention_mask"]
    expected, _ = run(model, inputs, sizes, MultiGridCache(model.config))
    for new_masks in (False, True):
        logits, _ = run(model, inputs, sizes, StaticMultiGridCache(model.config, ROOM), new_masks=new_masks)
        torch.testing.assert_close(real(logits, mask), real(expected, mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_a_mask_of_new_tokens_and_none_leave_pads_of_the_past_masked(new_tokens):
    model = two_axes().double()
    inputs = padded_grid(model)
    mask = inputs["attention_mask"]
    mask[:, -new_tokens:] = 1
    expected, _ = run(model, inputs, [SEQ])
    for given in (None, mask[:, -new_tokens:], mask):
        cache = StaticMultiGridCache(model.config, ROOM)
        run(model, inputs, [SEQ - new_tokens], cache)
        part = {name: inputs[name][..., -new_tokens:] for name in ("input_ids", "axis_ids")}
        out = model(**part, attention_mask=given, past_key_values=cache)
        torch.testing.assert_close(out.logits, expected[:, -new_tokens:, :50], rtol=1e-9, atol=1e-9)


def test_tokens_of_the_past_can_be_masked_and_pads_cannot_be_unmasked():
    """As with the dynamic cache, with attention."""
    model = two_axes().double()
    inputs, results = random_grid(model, 2, SEQ), []
    for cache in (MultiGridCache(model.config), StaticMultiGridCache(model.config, ROOM)):
        mask = torch.ones(2, SEQ, dtype=torch.long)
        run(model, {**inputs, "attention_mask": mask}, [15], cache)
        mask[0, 3:6] = 0
        results.append(run(model, {**inputs, "attention_mask": mask}, [1, 2], cache, start=15)[0])
        results.append(run(model, inputs, [1, 1], cache, start=18)[0])  # they stay masked
        mask[0, 3] = 1
        with pytest.raises(ValueError, match="`attention_mask` keeps tokens that were pads when"):
            run(model, {**inputs, "attention_mask": mask}, [1], cache, start=20)
    for got, expected in zip(results[2:], results[:2]):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_layers_are_stock_and_keep_their_memory():
    for variant, kind in (("axes", StaticLayer), ("leap", LinearAttentionLayer), ("lstm", LinearAttentionLayer)):
        model = tiny_multigrid(**VARIANTS[variant]).bfloat16()
        cache = StaticMultiGridCache(model.config, ROOM)
        assert [type(layer) for layer in cache.layers] == [kind] * 4 and cache.is_compileable
        assert (
            int(cache.get_seq_length()) == 0
            and not cache.has_tokens
            and not MultiGridCache(model.config).is_compileable
        )
        inputs = padded_grid(model)
        run(model, inputs, [7], cache)
        before = addresses(cache)
        run(model, inputs, [1, 1, 5, 1], cache, start=7)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        assert addresses(cache) == before
        if variant == "axes":
            heads = 2 + 2 * 2
            assert cache.layers[0].keys.shape == (3, heads, ROOM, 8) and cache.layers[0].keys.dtype == torch.bfloat16
            assert cache.past_mask.shape == (3, ROOM) and cache.get_mask_sizes(1, 0) == (ROOM, 0)


@pytest.mark.parametrize("variant", ["plain", *ONE_OF_A_CORE])
def test_reset_is_for_another_prompt_of_the_same_batch(variant):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    inputs = padded_grid(model)
    cache = StaticMultiGridCache(model.config, ROOM)
    run(model, inputs, [12, 1, 1], cache)
    before = addresses(cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0 and not cache.has_tokens
    other = random_grid(model, 3, SEQ, seed=4)
    logits, _ = run(model, other, [4, 1, 1, 5], cache)
    expected, _ = run(model, other, [4, 1, 1, 5], MultiGridCache(model.config))
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert addresses(cache) == before


@pytest.mark.parametrize("order", [[2, 0, 0], [1], [2, 2, 1, 0, 1]], ids=["as many", "fewer", "more"])
@pytest.mark.parametrize("variant", ONE_OF_A_CORE)
def test_rows_are_reordered(variant, order):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    inputs, order = padded_grid(model), torch.tensor(order)
    results = []
    for cache in (MultiGridCache(model.config), StaticMultiGridCache(model.config, ROOM)):
        run(model, inputs, [16], cache)
        other = copy.deepcopy(cache)
        cache.reorder_cache(order)
        moved = {name: x[order] for name, x in inputs.items()}
        results.append(run(model, moved, [1, 3, 1], cache, start=16)[0])
        results.append(run(model, inputs, [1, 3, 1], other, start=16)[0])  # a copy goes its own way
    for got, expected in zip(results[2:], results[:2]):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ONE_OF_A_CORE)
def test_packed_rows_fill_it_as_they_fill_the_dynamic_one(variant):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    inputs, seq_idx = random_grid(model, 2, SEQ), (torch.arange(SEQ) >= 9).long().expand(2, -1)
    expected, _ = run(model, inputs, [SEQ], seq_idx=seq_idx)
    logits, cache = run(model, inputs, [SEQ], StaticMultiGridCache(model.config, ROOM), seq_idx=seq_idx)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    if variant == "axes":
        with pytest.raises(ValueError, match=f"`{CACHE}` holds packed sequences"):
            run(model, inputs, [1], cache)


@pytest.mark.parametrize(
    "use_attention", [pytest.param(use_flex_attention, marks=pytest.mark.slow), use_flash_attention]
)
def test_other_attention_implementations(use_attention, monkeypatch):
    model = two_axes().double()
    inputs, sizes = padded_grid(model), [12, 3, 1, 1, 6]
    unpadded = random_grid(model, 2, SEQ)
    expected = [run(model, x, sizes)[0] for x in (inputs, unpadded)]
    use_attention(model, monkeypatch)
    mask = inputs["attention_mask"]
    logits, _ = run(model, inputs, sizes, StaticMultiGridCache(model.config, ROOM))
    torch.testing.assert_close(real(logits, mask), real(expected[0], mask), rtol=1e-9, atol=1e-9)
    logits, _ = run(model, unpadded, sizes, StaticMultiGridCache(model.config, ROOM))
    torch.testing.assert_close(logits, expected[1], rtol=1e-9, atol=1e-9)


def test_attentions_cover_its_memory():
    model = two_axes()
    inputs, cache = random_grid(model, 2, SEQ), StaticMultiGridCache(model.config, ROOM)
    run(model, inputs, [20], cache)
    weights = model(**{k: x[..., 20:21] for k, x in inputs.items()}, past_key_values=cache, output_attentions=True)
    expected = model(**{k: x[..., :21] for k, x in inputs.items()}, output_attentions=True).attentions
    for got, whole in zip(weights.attentions, expected):
        assert got.shape == (2, 6, 1, ROOM) and not got[..., 21:].any()
        torch.testing.assert_close(got[..., :21], whole[..., -1:, :], rtol=1e-4, atol=1e-5)


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[10, 1], [11], [4, 4, 3], [1] * 11])
def test_a_full_cache_is_named_and_not_written_past_its_end(sizes):
    model = two_axes()
    inputs, cache = random_grid(model, 2, SEQ), StaticMultiGridCache(model.config, 10)
    held = sum(sizes[:-1])
    if held:
        run(model, inputs, sizes[:-1], cache)
    match = f"`{CACHE}` is full: .*`max_cache_len`=10 tokens and holds {held}, but {sizes[-1]} more"
    with pytest.raises(ValueError, match=match):
        run(model, inputs, sizes[-1:], cache, start=held)
    assert int(cache.get_seq_length()) == held
    left = 10 - held
    if left:  # nothing was written: what fits goes on
        logits, _ = run(model, inputs, [left], cache, start=held)
        torch.testing.assert_close(logits, run(model, inputs, [10])[0][:, held:], rtol=1e-4, atol=1e-4)


def with_compiled_steps(forward, cache):
    """A forward pass whose steps are compiled by hand, as on a CPU they have to be."""
    step = torch.compile(forward, fullgraph=True, backend="eager")
    return lambda *args, **kwargs: (step if cache.has_tokens else forward)(*args, **kwargs)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_generate_names_a_cache_that_is_too_short(compiled):
    """A compiled step does not read the count."""
    model = tiny_multigrid(num_hidden_layers=1)
    cache = StaticMultiGridCache(model.config, 12)
    if compiled:
        model.forward = with_compiled_steps(model.forward, cache)
    with pytest.raises(ValueError, match=f"`{CACHE}` is full: .*`max_cache_len`=12"):
        model.generate(**random_grid(model, 2, 9), past_key_values=cache, max_new_tokens=8, **GREEDY)
    assert int(cache.get_seq_length()) == 12


def test_its_length_is_checked():
    attention, leap = tiny_multigrid(), tiny_multigrid(core="leap")
    with pytest.raises(ValueError, match="`max_cache_len` must be given with core='transformer', got None"):
        StaticMultiGridCache(attention.config)
    for model in (attention, leap):
        with pytest.raises(ValueError, match="`max_cache_len` must be at least 1, got 0"):
            StaticMultiGridCache(model.config, 0)
        with pytest.raises(TypeError, match="`max_cache_len` must be an integer, got 2.5"):
            StaticMultiGridCache(model.config, 2.5)
    cache = StaticMultiGridCache(leap.config, 3)  # states have no length
    run(leap, random_grid(leap, 2, SEQ), [SEQ], cache)
    assert int(cache.get_seq_length()) == SEQ and cache.max_cache_len is None


def test_positions_beyond_the_table_are_named():
    model = two_axes(max_position_embeddings=10)
    inputs, cache = random_grid(model, 2, SEQ), StaticMultiGridCache(model.config, ROOM)
    run(model, inputs, [8, 2], cache)
    with pytest.raises(ValueError, match=r"`position_ids`.*\[0, 10\), got values from 10 to 10"):
        run(model, inputs, [1], cache, start=10)


# --- generate ----------------------------------------------------------------------------------------------------------


def same(out, expected):
    for name in {"sequences", "axis_sequences"} & expected.keys():
        assert torch.equal(out[name], expected[name]), name


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("factored", "lstm")))
def test_every_way_to_generate(variant):
    model = tiny_multigrid(**{"pad_token_id": 0, "initializer_range": 0.4, **VARIANTS[variant]})
    _, padded = left_padded(model, (1, 7, 12))
    for batch in (padded, random_grid(model, 2, 9)):
        for how in (
            {},
            {"prefill_chunk_size": 5},
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        ):
            written = []
            for kind in ({}, STATIC):
                torch.manual_seed(3)
                written.append(model.generate(**batch, max_new_tokens=9, **{**WITH_TRACKS, **how}, **kind))
            same(*written)
            assert type(written[1].past_key_values) is StaticMultiGridCache


@BOTH_ORDERS
def test_annotated_and_forced_axes(order):
    model = two_axes(order, initializer_range=0.5)
    processor, _, annotated = with_annotator(model)
    _, batch = left_padded(model, (3, 12))
    forced = random_grid(model, 2, 10, seed=5)["axis_ids"]
    for how in (
        {**annotated, "processor": processor},
        {"axis_source": {"kind": "forced"}, "forced_axis_ids": forced},
        {
            "axis_source": {"kind": "forced", **annotated["axis_source"]},
            "forced_axis_ids": forced,
            "processor": processor,
        },
    ):
        for beams in (1, 3):
            if beams > 1 and "forced_axis_ids" in how:
                continue  # rows of `forced_axis_ids` are not repeated
            how["num_beams"] = beams
            same(
                model.generate(**batch, max_new_tokens=10, **WITH_TRACKS, **how, **STATIC),
                model.generate(**batch, max_new_tokens=10, **WITH_TRACKS, **how),
            )


@pytest.mark.parametrize("variant", ["factored", "leap", "lstm-factored"])
def test_generation_goes_on_from_a_static_cache(variant):
    """A second prompt of several tokens, over a padded batch; then, after a reset, another text."""
    model = tiny_multigrid(**VARIANTS[variant])
    _, batch = left_padded(model, (4, 9))
    cache, plain = StaticMultiGridCache(model.config, 40), MultiGridCache(model.config)
    written = []
    for held in (cache, plain):
        kind = {"past_key_values": held, "disable_compile": True}
        first = model.generate(**batch, max_new_tokens=6, **WITH_TRACKS, **kind)
        more = random_grid(model, 2, 5, seed=2)
        follow = {
            "input_ids": torch.cat((first.sequences, more["input_ids"]), dim=1),
            "axis_ids": torch.cat((first.axis_sequences, more["axis_ids"]), dim=2),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 11), value=1),
        }
        written.append(model.generate(**follow, max_new_tokens=10, **WITH_TRACKS, **kind))
    same(*written)
    cache.reset()
    again = random_grid(model, 2, 11, seed=6)
    out = model.generate(**again, max_new_tokens=10, past_key_values=cache, disable_compile=True, **WITH_TRACKS)
    same(out, model.generate(**again, max_new_tokens=10, use_cache=False, **WITH_TRACKS))


def test_prompts_of_embeddings():
    model = two_axes()
    _, batch = left_padded(model, (7, 12))
    expected = model.generate(**batch, max_new_tokens=9, **WITH_TRACKS)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    out = model.generate(inputs_embeds=embeds, **batch, max_new_tokens=9, **WITH_TRACKS, **STATIC)
    assert torch.equal(out.sequences, expected.sequences[:, 12:])


def test_generate_makes_room_for_the_longest_text_so_far():
    """So that a compiled step is for shorter ones, too."""
    model = two_axes()

    def room(prompt, steps, **kwargs):
        out = model.generate(**random_grid(model, 2, prompt), max_new_tokens=steps, **WITH_TRACKS, **STATIC, **kwargs)
        return out.past_key_values.max_cache_len

    assert room(9, 6) == 14 and room(9, 20) == 28 and room(5, 3) == 28
    assert room(5, 3, max_cache_len=35) == 35


# --- compiled ----------------------------------------------------------------------------------------------------------


def compiled_steps(model, inputs, cache, first, backend="eager", graphs=None):
    """Logits of single tokens from `first` on by a compiled step, and the counter of its graphs."""
    graphs = graphs or CompileCounterWithBackend(backend)
    step = torch.compile(model.forward, fullgraph=True, backend=graphs)
    logits = []
    for place in range(first, inputs["input_ids"].shape[1]):
        part = {name: x[..., place : place + 1].clone() for name, x in inputs.items() if name != "attention_mask"}
        with torch.no_grad():
            out = step(**part, past_key_values=cache, use_cache=True)
        logits.append(torch.cat((out.logits, *(out.axis_logits or ())), dim=-1))
    return torch.cat(logits, dim=1), graphs


def one_layer(variant):
    windows = {"window_sizes": [3]} if variant == "leap" else {}
    return tiny_multigrid(**{**VARIANTS[variant], "num_hidden_layers": 1, **windows})


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("plain", "leap-factored", "lstm-factored")))
def test_all_steps_are_one_graph(variant, padded):
    model = (tiny_multigrid(**VARIANTS[variant]) if "leap" in variant else one_layer(variant)).double()
    inputs = padded_grid(model) if padded else random_grid(model, 2, SEQ)
    expected, _ = run(model, inputs, [16] + [1] * 7)
    cache, graphs = StaticMultiGridCache(model.config, ROOM), None
    for _ in range(2):  # again after a reset
        run(model, inputs, [16], cache)
        logits, graphs = compiled_steps(model, inputs, cache, 16, graphs=graphs)
        torch.testing.assert_close(logits, expected[:, 16:], rtol=1e-9, atol=1e-9)
        assert graphs.frame_count == 1 and int(cache.get_seq_length()) == SEQ
        cache.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("variant", ["axes", "leap", "lstm"])
def test_the_default_compiler(variant):
    model = one_layer(variant)
    inputs = padded_grid(model)
    expected, _ = run(model, inputs, [16] + [1] * 7)
    cache = StaticMultiGridCache(model.config, ROOM)
    run(model, inputs, [16], cache)
    logits, graphs = compiled_steps(model, inputs, cache, 16, backend="inductor")
    torch.testing.assert_close(logits, expected[:, 16:], rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("variant", mostly_slow(("plain", "axis", "factored", "leap", "lstm"), ("axis",)))
def test_generate_compiles_its_steps(variant):
    """As on a GPU: one graph for all steps of two texts, one more for those of a shorter one with pads."""
    model, (config, graphs) = one_layer(variant), compile_config()
    _, padded = left_padded(model, (3, 7))
    how, counts = {**WITH_TRACKS, "max_new_tokens": 8}, []
    for batch in (random_grid(model, 2, 9), random_grid(model, 2, 6), padded, padded):
        out = model.generate(**batch, **how, cache_implementation="static", compile_config=config)
        same(out, model.generate(**batch, **how))
        counts.append(len(graphs))
    assert counts == [1, 1, 2, 2]


def test_one_token_of_an_lstm_without_its_kernel():
    """What compiled steps compute, alone: against `nn.LSTM`, from states that are not zero."""
    lstm = torch.nn.LSTM(6, 5, batch_first=True).double()
    x, state = torch.randn(3, 1, 6).double(), tuple(torch.randn(1, 3, 5).double() for _ in range(2))
    out, after = lstm_step(lstm._parameters, x, state)
    expected, expected_after = lstm(x, state)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, expected_after)


def test_the_weights_of_compiled_steps_are_those_of_the_lstm(tmp_path):
    """Wherever parameters were replaced: by a copy, by loading, by conversion."""
    model = tiny_multigrid(**VARIANTS["lstm"])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    grown = copy.deepcopy(model)
    grown.add_axis("depth", 4)
    models = {
        "copied": copy.deepcopy(model),
        "loaded": loaded,
        "in bf16": copy.deepcopy(model).bfloat16(),
        "grown": grown,
    }
    for name, other in models.items():
        for module in other.modules():
            if hasattr(module, "lstm"):
                assert all(module.weights[key] is x for key, x in module.lstm.named_parameters()), name
                assert len(module.weights) == 4
