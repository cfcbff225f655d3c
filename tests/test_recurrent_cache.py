"""The caches: what they count, hold, forget and reorder, and that decoding from them equals the parallel forward."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from modeling_heptapod import RecurrentCache, StaticRecurrentCache
from modeling_heptapod.common.transformers_versions import CACHE
from modeling_heptapod.leap import focus_cpu
from tests.tiny import mostly_slow
from tests.tiny_leap import VARIANTS, random_ids, tiny_config, tiny_leap


def states(cache):
    """All state tensors of a cache."""
    tensors = []
    for layer in cache.layers:
        for held in (layer.conv_states, layer.recurrent_states):
            tensors.extend(state for state in held.values() if state is not None)
    return tensors


def decode(model, ids, cuts, cache=None, **kwargs):
    """Logits of `ids`, fed in the chunks between `cuts`."""
    seq, logits = ids.shape[1], []
    for start, end in zip([0, *cuts], [*cuts, seq]):
        outputs = model(ids[:, start:end], past_key_values=cache, use_cache=True, **kwargs)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1), cache


CUTS = {
    "one at a time": list(range(1, 90)),
    "several at once": list(range(3, 90, 3)),
    "a prompt, then one at a time": list(range(40, 90)),
    "two chunks": [70],
    "of every size": [1, 2, 4, 5, 20, 21, 60, 88],
}


@pytest.fixture(params=["C", "torch"])
def form(request, monkeypatch):
    """The mixing step as it is compiled, and without that."""
    if request.param == "torch":
        monkeypatch.setattr(focus_cpu, "_library", lambda head_dim: None)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticRecurrentCache])
@pytest.mark.parametrize("cuts", mostly_slow(CUTS, CUTS.keys() - {"two chunks", "of every size"}))
@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("default", "exp", "alibi-null", "additive-alibi")))
@torch.no_grad()
def test_decoding_equals_the_parallel_forward(variant, cuts, cache_class):
    model = tiny_leap(**VARIANTS[variant])
    ids = random_ids(2, 90)
    logits, cache = decode(model, ids, CUTS[cuts], cache_class(model.config))
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert int(cache.get_seq_length()) == 90


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_decoding_in_other_dtypes(variant, dtype):
    model = tiny_leap(**VARIANTS[variant]).to(dtype)
    ids = random_ids(2, 40)
    logits, _ = decode(model, ids, [5, 6, 7, 20, *range(30, 40)])
    expected = model(ids).logits
    assert logits.dtype == expected.dtype == dtype
    error = (logits - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt()
    assert error < {torch.float64: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]


@pytest.mark.parametrize("variant", ["default", "additive", "alibi"])
def test_decoding_under_autocast_and_in_inference_mode(variant):
    model = tiny_leap(**VARIANTS[variant])
    ids = random_ids(2, 40)
    with torch.inference_mode():
        logits, _ = decode(model, ids, [5, 6, 7, 20, *range(30, 40)])
        expected = model(ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, cache = decode(model, ids, [5, 6, 7, 20, *range(30, 40)])
    assert all(state.dtype == torch.float32 for state in states(cache))
    assert (low - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_with_gradients_equal_steps_without(variant):
    model = tiny_leap(**VARIANTS[variant])
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected, _ = decode(model, ids, list(range(20, 40)))
    logits, _ = decode(model, ids, list(range(20, 40)))
    assert logits.requires_grad
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["default", "additive", "alibi"])
@torch.no_grad()
def test_steps_that_return_attentions_equal_steps_that_do_not(variant):
    model = tiny_leap(**VARIANTS[variant])
    ids = random_ids(2, 30)
    logits, _ = decode(model, ids, list(range(10, 30)), output_attentions=True)
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    outputs = model(ids[:, :1], past_key_values=model(ids, use_cache=True).past_key_values, output_attentions=True)
    assert outputs.attentions[0].shape == (2, model.config.num_attention_heads, 1, 2)


@pytest.mark.slow
@torch.no_grad()
def test_4096_tokens_one_at_a_time():
    model = tiny_leap()
    ids = random_ids(1, 4096)
    expected = model(ids).logits
    cache, worst = None, 0.0
    for i in range(4096):
        outputs = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        worst = max(worst, (outputs.logits[0, 0] - expected[0, i]).abs().max().item())
    assert worst <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "absolute"])
@torch.no_grad()
def test_4096_tokens_of_every_variant(variant):
    model = tiny_leap(**{"max_position_embeddings": 4096, **VARIANTS[variant]})
    ids = random_ids(1, 4096)
    logits, _ = decode(model, ids, list(range(1, 4096)))
    parallel = model(ids).logits
    exact = model.double()(ids).logits
    # Where float32 itself is far from float64 (gelu gates amplify), recurrent and parallel are both that far.
    assert (logits - parallel).abs().max() <= max(1e-4, 3 * (parallel - exact).abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padded_chunks(variant):
    """Chunked prefill of left-padded rows, one of which sees nothing but pads at first."""
    model = tiny_leap(**VARIANTS[variant])
    ids, mask = random_ids(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[0, :45] = 0
    mask[1, :3] = 0
    alone = [model(ids[i : i + 1, 60 - mask[i].sum() :]).logits for i in range(3)]
    for cuts in ([20], [1, 2, 40], [30, 31, 44, 45, 46, 47]):
        for whole_mask in (True, False):
            if not whole_mask and model.config.position_embedding_type in ("rotary", "absolute"):
                continue  # positions are counted from the mask
            cache, logits = None, []
            for start, end in zip([0, *cuts], [*cuts, 60]):
                part = mask[:, (0 if whole_mask else start) : end]
                outputs = model(ids[:, start:end], attention_mask=part, past_key_values=cache, use_cache=True)
                cache = outputs.past_key_values
                logits.append(outputs.logits)
            logits = torch.cat(logits, dim=1)
            for i in range(3):
                torch.testing.assert_close(logits[i][mask[i].bool()], alone[i][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticRecurrentCache])
@torch.no_grad()
def test_positions_go_on_after_a_padded_chunk(cache_class):
    """The first pads come after a chunk without any, when rows begin to differ."""
    model = tiny_leap(position_embedding_type="rotary")
    ids, mask = random_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, 7] = 0
    cache = cache_class(model.config)
    for start, end in ((0, 5), (5, 8), (8, 10)):
        logits = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
    assert cache.lengths().tolist() == [9, 10]
    for row in range(2):
        alone = model(ids[row : row + 1, mask[row].bool()]).logits
        torch.testing.assert_close(logits[row], alone[0, -2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pad_as_a_single_step_changes_nothing():
    model = tiny_leap(position_embedding_type="none", window_sizes=[None, 4, 8, 70])
    ids = random_ids(2, 10)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 10] = 0
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    plain = model(ids[1:], use_cache=True).past_key_values
    model(ids[1:, :1], past_key_values=plain)
    for state, expected in zip(states(cache), states(plain)):
        torch.testing.assert_close(state[1:], expected, rtol=1e-4, atol=1e-4)
    before = states(model(ids[:1], use_cache=True).past_key_values)[0]
    after = states(cache)[0][:1]
    heads = model.config.num_attention_heads
    torch.testing.assert_close(after[:, 2 * heads :], before[:, 2 * heads :])  # means of the global layer


@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticRecurrentCache])
@torch.no_grad()
def test_layers_are_stock_and_states_are_float32(cache_class):
    model = tiny_leap(mixer="additive").bfloat16()
    cache = cache_class(model.config)
    assert cache.get_seq_length() == 0 and not cache.has_previous_state(0)
    model(random_ids(2, 12), past_key_values=cache)
    model(random_ids(2, 1), past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [LinearAttentionLayer] * 4
    assert len(states(cache)) == 8 and all(state.dtype == torch.float32 for state in states(cache))
    assert cache.get_seq_length() == 13 and cache.has_previous_state(0)
    assert cache.get_mask_sizes(5, 0) == (18, 0)


@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticRecurrentCache])
@torch.no_grad()
def test_reset(cache_class):
    for variant in ("default", "additive"):
        model = tiny_leap(**VARIANTS[variant])
        ids = random_ids(2, 30)
        cache = cache_class(model.config)
        decode(model, ids, [20, 21], cache)
        addresses = [state.data_ptr() for state in states(cache)]
        cache.reset()
        assert cache.get_seq_length() == 0 and not cache.has_previous_state(0)
        logits, _ = decode(model, ids, [3, 4, 5], cache)
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        if cache_class is StaticRecurrentCache:  # compiled steps know where it is
            assert [state.data_ptr() for state in states(cache)] == addresses


@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticRecurrentCache])
@torch.no_grad()
def test_reorder(cache_class):
    model = tiny_leap()
    ids, order = random_ids(3, 30), torch.tensor([2, 0, 2])
    cache = cache_class(model.config)
    model(ids[:, :29], past_key_values=cache)
    cache.reorder_cache(order)
    logits = model(ids[order][:, 29:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids[order]).logits[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticRecurrentCache])
@torch.no_grad()
def test_a_copy_goes_its_own_way(cache_class):
    model = tiny_leap()
    ids = random_ids(2, 30)
    cache = cache_class(model.config)
    model(ids[:, :20], past_key_values=cache)
    other = copy.deepcopy(cache)
    model(random_ids(2, 5, seed=7), past_key_values=other)
    assert cache.get_seq_length() == 20 and other.get_seq_length() == 25
    logits = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 20:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_returned_cache_is_the_given_one_and_models_keep_nothing():
    model = tiny_leap()
    buffers = {name for name, _ in model.named_buffers()}
    cache = RecurrentCache(model.config)
    assert model(random_ids(1, 5), past_key_values=cache, use_cache=True).past_key_values is cache
    assert model(random_ids(1, 5), use_cache=False).past_key_values is None
    assert {name for name, _ in model.named_buffers()} == buffers
    first, second = random_ids(1, 12, seed=3), random_ids(1, 12, seed=4)
    interleaved = [RecurrentCache(model.config) for _ in range(2)]
    for i in range(12):
        outputs = [model(x[:, i : i + 1], past_key_values=c) for x, c in zip((first, second), interleaved)]
    for x, output in zip((first, second), outputs):
        torch.testing.assert_close(output.logits, model(x).logits[:, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_stock_caches_get_a_clear_error():
    model = tiny_leap()
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with pytest.raises(TypeError, match=rf"{CACHE}.*RecurrentCache"):
            model(random_ids(1, 5), past_key_values=cache)


@pytest.mark.parametrize("long", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_bytes_of_state_do_not_grow(long):
    for variant in ("default", "additive-alibi"):
        model = tiny_leap(**VARIANTS[variant])
        sizes = []
        for seq in (20, 1000, long):
            cache, ids = RecurrentCache(model.config), random_ids(1, seq)
            for chunk in ids.split(10_000, dim=1):
                model.model(chunk, past_key_values=cache)
            model.model(ids[:, :1], past_key_values=cache)
            sizes.append(sum(state.untyped_storage().nbytes() for state in states(cache)))
        assert sizes[0] == sizes[1] == sizes[2] > 0


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_step_equals_eager_and_compiles_once():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    model = tiny_leap()
    ids = random_ids(1, 40)
    expected = model(ids).logits
    cache = StaticRecurrentCache(model.config)
    model(ids[:, :20], past_key_values=cache)
    graphs = CompileCounterWithBackend("inductor")
    step = torch.compile(model.forward, fullgraph=True, backend=graphs)
    for i in range(20, 40):
        logits = step(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected[:, i : i + 1], rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1


def test_configs_of_layers_that_are_not_recurrent_are_not_for_these_caches():
    config = tiny_config()
    assert config.layer_types == ["linear_attention"] * 4
    assert not RecurrentCache(config).is_compileable and StaticRecurrentCache(config).is_compileable
