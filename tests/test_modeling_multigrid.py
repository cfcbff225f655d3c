"""MultiGrid: GPT-2 without axes, the same step by step as at once, and what must leave no trace: pads, neighbours, the future."""

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from modeling_heptapod import MultiGridCache, MultiGridForCausalLM
from modeling_heptapod.multigrid import multigrid_blocks
from modeling_heptapod.multigrid.multigrid_cores import grouped_linear
from tests.attention_kernels import use_flash_attention, use_flex_attention
from tests.tiny import mostly_slow
from tests.tiny_multigrid import SOME_FAST, TWO_AXES, VARIANTS, random_grid, random_ids, tiny_config, tiny_multigrid


WITH_AXES = [name for name, options in VARIANTS.items() if options.get("axis_names")]
FACTORED = [name for name, options in VARIANTS.items() if options.get("axis_order") == "factored"]
CORES = ["axes", "leap", "lstm"]


def all_logits(outputs):
    """Of the main axis and then of each axis."""
    return [outputs.logits, *(outputs.axis_logits or ())]


def run(model, grid, first=0, last=None, **kwargs):
    """The logits of positions `first` to `last`, which know in the factored order what follows them, and the cache."""
    ids, axis_ids = grid["input_ids"], grid["axis_ids"]
    last = ids.shape[1] if last is None else last
    if model.config.axis_order == "factored" and last < ids.shape[1]:
        kwargs["next_axis_ids"] = axis_ids[:, :, last]
    with torch.no_grad():
        outputs = model(ids[:, first:last], axis_ids=axis_ids[:, :, first:last], **kwargs)
    return all_logits(outputs), outputs.past_key_values


def assert_same(logits, expected, at=slice(None), tolerance=1e-4):
    assert len(logits) == len(expected)
    for x, y in zip(logits, expected):
        torch.testing.assert_close(x[at], y[at], rtol=tolerance, atol=tolerance)


def loss_grads(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


# --- without axes it is GPT-2 ------------------------------------------------------------------------------------------


def gpt2_and_ours(**options):
    """A random GPT-2 and a MultiGrid without axes that has its weights."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.2}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes, **dropout, **special)).eval()
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ours = tiny_multigrid(**options)
    names = {
        "transformer.wte": "model.embed_tokens",
        "transformer.wpe": "model.embed_positions",
        "transformer.ln_f": "model.norm",
        "lm_head": "lm_head",
    }
    parts = {
        "ln_1": "input_layernorm",
        "attn.c_attn": "mixer.qkv_proj",
        "attn.c_proj": "mixer.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    names |= {f"transformer.h.{i}.{a}": f"model.layers.{i}.self_block.{b}" for i in (0, 1) for a, b in parts.items()}
    weights = {}
    for name, weight in gpt2.state_dict().items():
        module, _, kind = name.rpartition(".")
        is_conv = name.endswith("weight") and ".c_" in name  # GPT-2 keeps these transposed
        weights[f"{names[module]}.{kind}"] = weight.t() if is_conv else weight
    ours.load_state_dict(weights)
    return gpt2, ours


def test_eager_attention_of_one_more_token():
    """A single query has the whole past before it, and no mask."""
    model = tiny_multigrid()
    model.set_attn_implementation("eager")
    grid = random_grid(model, 2, 9)
    with torch.no_grad():
        expected = model(**grid, use_cache=False).logits[:, -1]
        cache = model(grid["input_ids"][:, :-1], grid["axis_ids"][..., :-1], use_cache=True).past_key_values
        more = model(grid["input_ids"][:, -1:], grid["axis_ids"][..., -1:], past_key_values=cache)
    torch.testing.assert_close(more.logits[:, -1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_attention", [use_flex_attention, use_flash_attention])
@pytest.mark.parametrize("variant", mostly_slow(["plain", "light", "factored"], ("factored",)))
def test_every_attention_implementation_is_the_same(variant, use_attention, monkeypatch):
    """Of whole rows, padded and packed ones, and of chunks and single tokens after cached ones."""
    model = tiny_multigrid(**VARIANTS[variant]).double()
    assert model._supports_flash_attn and model._supports_flex_attn
    grid, place = random_grid(model, 3, 21), torch.arange(21)
    mask = (place >= torch.tensor([[0], [4], [9]])).long()
    packed = {"seq_idx": (place >= torch.tensor([[6], [13], [20]])).long()}

    def logits_of_real_tokens():
        logits = [run(model, grid, use_cache=False)[0], run(model, grid, use_cache=False, **packed)[0]]
        for with_pads in (False, True):
            cache = None
            for first, last in ((0, 12), (12, 17), (17, 18)):
                pads = {"attention_mask": mask[:, :last]} if with_pads else {}
                more, cache = run(model, grid, first, last, past_key_values=cache, use_cache=True, **pads)
                logits.append([x[mask[:, first:last].bool()] for x in more])
        return logits

    expected = logits_of_real_tokens()
    use_attention(model, monkeypatch)
    for logits, others in zip(logits_of_real_tokens(), expected, strict=True):
        assert_same(logits, others, tolerance=1e-9)
    with torch.no_grad():
        attentions = model(**grid, output_attentions=True, attention_mask=mask).attentions
    assert attentions[0].shape == (3, 2 + len(grid["axis_ids"][0]) * model.config.axis_num_attention_heads, 21, 21)


def test_packed_rows_with_pads_are_an_error_with_flash_attention(monkeypatch):
    model = tiny_multigrid()
    use_flash_attention(model, monkeypatch)
    rows = {"attention_mask": torch.tensor([[0, 1, 1, 1]]), "seq_idx": torch.tensor([[0, 0, 1, 1]])}
    with pytest.raises(ValueError, match="`attention_mask` must be 1 everywhere in packed rows with flash attention"):
        model(**random_grid(model, 1, 4), **rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_axes_it_is_gpt2(attention):
    gpt2, ours = gpt2_and_ours()
    ours.set_attn_implementation(attention)
    ids = random_ids(3, 40)
    with torch.no_grad():
        theirs = gpt2(ids, output_hidden_states=True)
        outputs = ours(ids, labels=ids, output_hidden_states=True)
        torch.testing.assert_close(outputs.logits, theirs.logits, rtol=1e-5, atol=1e-5)
        assert outputs.axis_logits is None and outputs.axis_losses is None and outputs.main_hidden_states is None
        torch.testing.assert_close(outputs.loss, gpt2(ids, labels=ids).loss)
        assert torch.equal(outputs.loss, outputs.main_loss)
        assert len(outputs.hidden_states) == len(theirs.hidden_states) == 3
        for x, y in zip(outputs.hidden_states, theirs.hidden_states):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_plain_decoder_has_no_other_weights_than_gpt2():
    gpt2, ours = gpt2_and_ours()
    assert ours.num_parameters() == gpt2.num_parameters() + ours.lm_head.weight.numel()  # theirs are tied
    tied = tiny_multigrid(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


# --- step by step as at once -------------------------------------------------------------------------------------------

PIECES = {"one at a time": [1] * 20, "chunks": [5, 1, 7, 4, 3], "prompt and tokens": [14, 1, 1, 1, 1, 1, 1]}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("variant", SOME_FAST)
def test_cached_logits_equal_parallel_ones(variant, pieces):
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 2, 21)
    expected, _ = run(model, grid, last=20)
    cache, first, parts = None, 0, []
    for number in PIECES[pieces]:
        logits, cache = run(model, grid, first, first + number, past_key_values=cache, use_cache=True)
        parts.append(logits)
        first += number
    assert cache.get_seq_length() == 20
    assert_same([torch.cat(x, dim=1) for x in zip(*parts)], expected)


def left_padded(model, lengths, width, pad_id=3):
    """A grid of rows of their lengths behind pads, its mask, and the rows alone."""
    grid = random_grid(model, len(lengths), width)
    mask = torch.ones(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    grid["input_ids"] = grid["input_ids"].where(mask.bool(), pad_id)
    alone = [{name: x[i : i + 1, ..., width - n :] for name, x in grid.items()} for i, n in enumerate(lengths)]
    return grid, mask, alone


@pytest.mark.parametrize("lengths", [(1, 7, 16), (4,)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padded_rows_equal_rows_alone_step_by_step(variant, lengths):
    model = tiny_multigrid(pad_token_id=3, **VARIANTS[variant])
    grid, mask, alone = left_padded(model, [n + 5 for n in lengths], 21)
    prompt = 16  # the last five come one or two at a time
    parts, cache, first = [], None, 0
    for number in (prompt, 1, 2, 1, 1):
        given = {"attention_mask": mask[:, : first + number], "past_key_values": cache, "use_cache": True}
        logits, cache = run(model, grid, first, first + number, **given)
        parts.append(logits)
        first += number
    logits = [torch.cat(x, dim=1) for x in zip(*parts)]
    for row, one in enumerate(alone):
        expected, _ = run(model, one)
        length = one["input_ids"].shape[1]
        assert_same([x[row : row + 1, 21 - length : 20] for x in logits], [x[:, :-1] for x in expected])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_can_be_reordered_for_beams(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 3, 12)
    order = torch.tensor([2, 0, 0])
    _, cache = run(model, grid, last=8, use_cache=True)
    cache.reorder_cache(order)
    mixed = {name: torch.cat((x[order][..., :8], x[..., 8:]), dim=-1) for name, x in grid.items()}
    logits, _ = run(model, mixed, 8, 11, past_key_values=cache)
    expected, _ = run(model, mixed, last=11)
    assert_same(logits, [x[:, 8:] for x in expected])


@pytest.mark.parametrize("variant", ["plain", "axes", "factored"])
def test_attention_can_forget_its_last_tokens(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 2, 12)
    _, cache = run(model, grid, last=9, use_cache=True)
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    logits, _ = run(model, grid, 5, 11, past_key_values=cache)
    assert_same(logits, [x[:, 5:] for x in run(model, grid, last=11)[0]])


def test_attention_forgets_which_of_its_last_tokens_were_pads():
    model = tiny_multigrid(**TWO_AXES)
    grid, mask = random_grid(model, 2, 12), torch.ones(2, 9, dtype=torch.long)
    mask[1, :2], mask[1, 6:] = 0, 0
    _, cache = run(model, grid, last=9, use_cache=True, attention_mask=mask)
    cache.crop(-4)
    assert cache.lengths().tolist() == [5, 3]
    logits, _ = run(model, grid, 5, 11, past_key_values=cache)
    assert_same([x[1:] for x in logits], [x[1:, 3:] for x in run(model, grid, 2, 11)[0]])


@pytest.mark.parametrize("variant", ["leap", "lstm"])
def test_recurrent_cores_keep_a_state_of_constant_size(variant):
    model = tiny_multigrid(**VARIANTS[variant])

    def numbers(length):
        _, cache = run(model, random_grid(model, 1, length), use_cache=True)
        states = [x for layer in cache.layers for s in (layer.conv_states, layer.recurrent_states) for x in s.values()]
        assert all(x.dtype == torch.float32 for x in states if x is not None)
        return sum(x.numel() for x in states if x is not None)

    assert numbers(10) == numbers(300)  # and no longest text: there are 128 positions
    _, cache = run(model, random_grid(model, 1, 5), use_cache=True)
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)


@pytest.mark.parametrize("variant", ["axes", "leap", "lstm"])
def test_a_cache_starts_over_after_reset(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 2, 9)
    expected, cache = run(model, grid, use_cache=True)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same(run(model, grid, past_key_values=cache)[0], expected)


@pytest.mark.parametrize("variant", ["leap", "lstm"])
def test_states_of_models_in_half_precision_are_float32(variant):
    model = tiny_multigrid(**VARIANTS[variant]).bfloat16()
    _, cache = run(model, random_grid(model, 2, 9), use_cache=True)
    layer = cache.layers[0]
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    assert {x.dtype for x in states if x is not None} == {torch.float32}


def test_an_empty_cache_and_none_are_the_same():
    model = tiny_multigrid(**TWO_AXES)
    grid = random_grid(model, 2, 9)
    cache = MultiGridCache(model.config)
    logits, given_back = run(model, grid, past_key_values=cache, use_cache=True)
    assert given_back is cache and cache.get_seq_length() == 9
    assert_same(logits, run(model, grid, use_cache=False)[0])
    assert run(model, grid, use_cache=False)[1] is None


def test_a_cache_is_made_and_returned_where_it_is_wanted():
    model = tiny_multigrid(**TWO_AXES)
    grid, cache = random_grid(model, 2, 9), MultiGridCache(model.config)
    assert isinstance(run(model, grid)[1], MultiGridCache)
    assert run(model, grid, past_key_values=cache, use_cache=False)[1] is None and cache.get_seq_length() == 9
    assert run(model.train(), grid)[1] is None and isinstance(run(model, grid, use_cache=True)[1], MultiGridCache)
    assert run(tiny_multigrid(use_cache=False, **TWO_AXES), grid)[1] is None


@pytest.mark.parametrize("variant, is_known", [("axes", False), ("factored", False), ("factored", True)])
def test_few_logits_are_the_last_of_all(variant, is_known):
    """Also where they know the axis ids that follow, in rows that are padded on the right."""
    model = tiny_multigrid(**VARIANTS[variant])
    grid, mask = random_grid(model, 2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    more = {"next_axis_ids": torch.tensor([[1, 2], [3, 0]])} if is_known else {}
    with torch.no_grad():
        whole = all_logits(model(**grid, **more, attention_mask=mask))
        for few in (1, 3):
            last = all_logits(model(**grid, **more, attention_mask=mask, logits_to_keep=few))
            assert_same(last, [x[:, -few:] for x in whole])
        chosen = all_logits(model(**grid, **more, attention_mask=mask, logits_to_keep=torch.tensor([0, 5])))
    assert_same(chosen, [x[:, [0, 5]] for x in whole])


@pytest.mark.parametrize("variant", ["axes", "factored"])
def test_a_mask_of_new_tokens_leaves_the_past_in_sight(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid, mask = random_grid(model, 2, 12), torch.ones(2, 4, dtype=torch.long)
    mask[1, 0] = 0
    whole = torch.cat((torch.ones(2, 8, dtype=torch.long), mask), dim=1)
    logits = []
    for given in (mask, whole):
        _, cache = run(model, grid, last=8, use_cache=True)
        logits.append(run(model, grid, 8, 12, past_key_values=cache, attention_mask=given)[0])
    assert_same(*logits)


# --- causality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("variant", SOME_FAST)
def test_no_axis_sees_the_future_of_any_axis(variant, use_cache):
    """Every token of every axis is changed, one at a time; a position sees its past, and the factored main axis one axis id more."""
    model = tiny_multigrid(**VARIANTS[variant]).double()
    config, seq = model.config, 9
    grid = random_grid(model, 1, seq)
    expected, _ = run(model, grid, use_cache=use_cache)
    factored = config.axis_order == "factored"
    for axis in range(-1, config.num_axes):
        for place in range(seq):
            ids, axis_ids = grid["input_ids"].clone(), grid["axis_ids"].clone()
            if axis < 0:
                ids[0, place] = (ids[0, place] + 1) % config.vocab_size
            else:
                axis_ids[0, axis, place] = (axis_ids[0, axis, place] + 1) % config.axis_vocab_sizes[axis]
            logits, _ = run(model, {"input_ids": ids, "axis_ids": axis_ids}, use_cache=use_cache)
            for stream, (x, y) in enumerate(zip(logits, expected)):
                changed = (x != y).any(-1)[0]
                first = place - 1 if factored and axis >= 0 and stream == 0 else place
                assert not changed[: max(first, 0)].any(), (axis, place, stream)
                assert changed[max(first, 0)], (axis, place, stream)  # and what is seen does matter, across axes too


@pytest.mark.parametrize("variant", [name for name in WITH_AXES if name != "axis"])
def test_in_one_layer_axes_see_the_main_axis_and_not_each_other(variant):
    options = {**VARIANTS[variant], "num_hidden_layers": 1}
    model = tiny_multigrid(**options | ({"window_sizes": [None]} if options.get("core") == "leap" else {}))
    grid = random_grid(model, 1, 9)
    expected, _ = run(model, grid)
    for axis, size in enumerate(model.config.axis_vocab_sizes):
        axis_ids = grid["axis_ids"].clone()
        axis_ids[0, axis, 4] = (axis_ids[0, axis, 4] + 1) % size
        logits, _ = run(model, {**grid, "axis_ids": axis_ids})
        changed = [not torch.equal(x, y) for x, y in zip(logits, expected)]
        assert changed == [i in (0, axis + 1) for i in range(len(logits))]
    other = {**grid, "input_ids": (grid["input_ids"] + 1) % 50}
    assert not any(torch.equal(x, y) for x, y in zip(run(model, other)[0], expected))


@pytest.mark.parametrize("variant", WITH_AXES)
def test_meta_and_main_are_not_swapped(variant):
    """With the loss of one axis only, the head of no other axis learns."""
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 2, 9)
    outputs = model(**grid, labels=grid["input_ids"])
    heads = [model.lm_head, *model.axis_lm_heads]
    for place, loss in enumerate((outputs.main_loss, *outputs.axis_losses)):
        model.zero_grad()
        loss.backward(retain_graph=True)
        learns = [head.weight.grad is not None and bool(head.weight.grad.any()) for head in heads]
        assert learns == [i == place for i in range(len(heads))]


# --- pads leave no trace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", SOME_FAST)
def test_padded_rows_equal_rows_alone(variant, side, use_cache):
    model = tiny_multigrid(pad_token_id=3, **VARIANTS[variant]).double()
    lengths, width = (1, 7, 30), 33
    grid, mask, alone = left_padded(model, lengths, width)
    if side == "right":
        grid, mask = {name: x.flip(-1) for name, x in grid.items()}, mask.flip(-1)
        alone = [{name: x.flip(-1) for name, x in one.items()} for one in alone]
    logits, _ = run(model, grid, attention_mask=mask, use_cache=use_cache)
    for row, one in enumerate(alone):
        at = mask[row].bool()
        assert_same([x[row : row + 1][:, at] for x in logits], run(model, one)[0], tolerance=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_get_no_gradient(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    config = model.config
    grid = random_grid(model, 2, 30)
    ids, axis_ids = grid["input_ids"] % 49, grid["axis_ids"]  # the last of each vocabulary occurs at pads only
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[1, 25:] = 0
    ids[mask == 0] = 49
    sizes = torch.tensor(config.axis_vocab_sizes, dtype=torch.long).view(1, -1, 1)
    axis_ids = (
        torch.where(mask[:, None].bool(), axis_ids % (sizes - 1), sizes - 1) if len(sizes.flatten()) else axis_ids
    )
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 13] = -100  # a pad would predict it
    model.train()(ids, axis_ids=axis_ids, attention_mask=mask, labels=labels).loss.backward()
    grads = [table.weight.grad for table in (model.model.embed_tokens, *model.model.axis_embed_tokens)]
    for grad in grads:
        assert not grad[-1].any() and grad.any()

    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = all_logits(model(inputs_embeds=embeds, axis_ids=axis_ids, attention_mask=mask))
    sum(x[mask.bool()].square().sum() for x in logits).backward()
    assert not embeds.grad[mask == 0].any() and (embeds.grad[mask == 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("variant", CORES)
def test_a_chunk_of_pads_alone_changes_nothing(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid, mask, (_, short) = left_padded(model, (12, 5), 12)
    _, cache = run(model, grid, 0, 6, attention_mask=mask[:, :6], use_cache=True)
    logits, _ = run(model, grid, 6, 12, attention_mask=mask, past_key_values=cache)
    assert_same([x[1:, 1:] for x in logits], run(model, short)[0])
    # in all rows at once, between tokens
    grid, mask = random_grid(model, 2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[:, 5:8] = 0
    _, cache = run(model, grid, 0, 5, attention_mask=mask[:, :5], use_cache=True)
    run(model, grid, 5, 8, attention_mask=mask[:, :8], past_key_values=cache)
    logits, _ = run(model, grid, 8, 12, attention_mask=mask, past_key_values=cache)
    tokens = {name: x[..., mask[0].bool()] for name, x in grid.items()}
    expected = [x[:, 5:] for x in run(model, tokens)[0]]
    assert_same(logits, expected)
    mask[0] = 1  # in one row, while the other one goes on
    _, cache = run(model, grid, 0, 5, attention_mask=mask[:, :5], use_cache=True)
    run(model, grid, 5, 8, attention_mask=mask[:, :8], past_key_values=cache)
    logits, _ = run(model, grid, 8, 12, attention_mask=mask, past_key_values=cache)
    assert_same([x[1:] for x in logits], [x[1:] for x in expected])


# --- packed rows equal separate rows -----------------------------------------------------------------------------------

LENGTHS = (1, 9, 2, 20, 7)


def packing(how):
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    if how == "position_ids":
        return {"position_ids": position_ids}
    if how == "position_ids and a mask of ones":
        return {"position_ids": position_ids, "attention_mask": torch.ones_like(position_ids)}
    if how == "cu_seq_lens_q":
        return {"cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0)}
    return {"seq_idx": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]}


@pytest.mark.parametrize("how", ["position_ids", "position_ids and a mask of ones", "cu_seq_lens_q", "seq_idx"])
@pytest.mark.parametrize("variant", SOME_FAST)
def test_packed_rows_equal_separate_rows(variant, how):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    grid = random_grid(model, 1, sum(LENGTHS))
    logits, _ = run(model, grid, use_cache=how == "seq_idx", **packing(how))
    rows = zip(grid["input_ids"].split(LENGTHS, dim=-1), grid["axis_ids"].split(LENGTHS, dim=-1))
    separate = [run(model, {"input_ids": ids, "axis_ids": axis_ids})[0] for ids, axis_ids in rows]
    assert_same(logits, [torch.cat(x, dim=1) for x in zip(*separate)], tolerance=1e-6)


@pytest.mark.parametrize("variant", CORES)
def test_equal_ids_that_do_not_touch_are_different_sequences(variant):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    grid = random_grid(model, 1, 21)
    logits = [run(model, grid, seq_idx=torch.tensor(x).repeat_interleave(7)[None])[0] for x in ([5, 3, 5], [0, 1, 2])]
    assert_same(*logits, tolerance=1e-9)


@pytest.mark.parametrize("variant", ["leap", "lstm"])
def test_the_last_packed_sequence_goes_on_from_the_cache(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 1, 30)
    _, cache = run(model, grid, 0, 20, seq_idx=(torch.arange(20) >= 8).long()[None], use_cache=True)
    positions = torch.arange(12, 22)[None]
    logits, _ = run(model, grid, 20, 30, past_key_values=cache, position_ids=positions)
    assert_same(logits, [x[:, 12:] for x in run(model, grid, 8, 30)[0]])


@pytest.mark.parametrize("variant", FACTORED)
def test_the_next_meta_tokens_are_those_of_the_next_real_token(variant):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    grid, mask = random_grid(model, 2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, 3:7], mask[0, 12:], mask[1, :2], mask[1, 8] = 0, 0, 0, 0
    following = torch.tensor([[1, 2], [3, 0]])
    packed = {"seq_idx": (torch.arange(14) >= 10).long().expand(2, 14)}
    for given in ({}, {"next_axis_ids": following}, packed):
        logits, _ = run(model, grid, attention_mask=mask, **given)
        for row in range(2):
            at, own = mask[row].bool(), {name: x[row : row + 1] for name, x in given.items()}
            one = {name: x[row : row + 1, ..., at] for name, x in grid.items()}
            own = {name: x[:, at] if name == "seq_idx" else x for name, x in own.items()}
            assert_same([x[row : row + 1, at] for x in logits], run(model, one, **own)[0], tolerance=1e-6)


@pytest.mark.parametrize("variant", CORES)
def test_pads_anywhere_in_rows_with_axes(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid, mask = random_grid(model, 2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, 3:8], mask[0, 14], mask[1, :2], mask[1, 8:13] = 0, 0, 0, 0
    parts, cache = [], None
    for first, last in ((0, 6), (6, 14), (14, 15), (15, 20)):
        given = {"attention_mask": mask[:, :last], "past_key_values": cache, "use_cache": True}
        logits, cache = run(model, grid, first, last, **given)
        parts.append(logits)
    logits = [torch.cat(x, dim=1) for x in zip(*parts)]
    for row in range(2):
        at = mask[row].bool()
        one = {name: x[row : row + 1, ..., at] for name, x in grid.items()}
        assert_same([x[row : row + 1, at] for x in logits], run(model, one)[0])


@pytest.mark.parametrize("variant", ["axes", "lstm", "leap"])
def test_packed_rows_do_not_go_on_where_their_past_would_be_taken_for_one_sequence(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 1, 30)
    options = {"past_key_values": None, "use_cache": True}
    _, options["past_key_values"] = run(model, grid, 0, 20, seq_idx=(torch.arange(20) >= 8).long()[None], **options)
    if variant == "axes":
        with pytest.raises(ValueError, match="packed sequences"):
            run(model, grid, 20, 30, **options)
    with pytest.raises(ValueError, match="packed sequences"):
        model.generate(**grid, **options, max_new_tokens=2, pad_token_id=0)
    options["past_key_values"].reset()
    run(model, grid, 0, 20, seq_idx=torch.zeros(1, 20, dtype=torch.long), **options)
    run(model, grid, 20, 30, **options)


# --- the factored order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FACTORED)
def test_main_logits_are_those_of_the_forward_pass(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 2, 9)
    following = torch.tensor([[1, 2], [3, 0]])
    with torch.no_grad():
        outputs = model(**grid, next_axis_ids=following)
        unknown = model(**grid)
        assert torch.equal(outputs.logits[:, :-1], unknown.logits[:, :-1])
        assert not torch.equal(outputs.logits[:, -1], unknown.logits[:, -1])
        states = unknown.main_hidden_states[:, -1:]
        torch.testing.assert_close(model.main_logits(states, following.unsqueeze(-1)), outputs.logits[:, -1:])
        shorter = model(**grid, next_axis_ids=following, logits_to_keep=3)
        torch.testing.assert_close(shorter.logits, outputs.logits[:, -3:])
        assert shorter.main_hidden_states.shape[1] == 3


def test_the_factored_loss_is_a_code_length():
    """Over all pairs of a next meta and a next main token, the probabilities that the two losses stand for sum to one."""
    model = tiny_multigrid(axis_names=["kind"], axis_vocab_sizes=[3], vocab_size=4, axis_order="factored").double()
    ids, axis_ids = torch.tensor([[1, 3]]), torch.tensor([[[2, 0]]])
    total = 0.0
    for token in range(4):
        for tag in range(3):
            grid = {"input_ids": ids.clone(), "axis_ids": axis_ids.clone()}
            grid["input_ids"][0, 1], grid["axis_ids"][0, 0, 1] = token, tag
            outputs = model(**grid, labels=grid["input_ids"])
            total += torch.exp(-outputs.main_loss - outputs.axis_losses[0]).item()
    assert abs(total - 1) < 1e-6  # cross-entropy is taken in float32


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", WITH_AXES)
def test_losses_by_name(variant):
    model = tiny_multigrid(main_loss_weight=0.3, **VARIANTS[variant])
    grid = random_grid(model, 3, 12)
    labels = grid["input_ids"].clone()
    labels[0, :5] = -100
    with torch.no_grad():
        outputs = model(**grid, labels=labels)
    counted = labels[:, 1:] != -100
    losses = []
    for logits, ids in zip(all_logits(outputs), (grid["input_ids"], *grid["axis_ids"].unbind(1))):
        losses.append(nn.functional.cross_entropy(logits[:, :-1][counted], ids[:, 1:][counted]))
    torch.testing.assert_close(outputs.main_loss, losses[0])
    torch.testing.assert_close(torch.stack(outputs.axis_losses), torch.stack(losses[1:]))
    torch.testing.assert_close(outputs.loss, 0.3 * losses[0] + 0.7 * torch.stack(losses[1:]).mean())


def test_targets_of_the_axes_can_be_given():
    model = tiny_multigrid(**TWO_AXES)
    grid = random_grid(model, 2, 9)
    targets = grid["axis_ids"].clone()
    targets[:, 1, 4:] = -100
    with torch.no_grad():
        default = model(**grid, labels=grid["input_ids"])
        given = model(**grid, labels=grid["input_ids"], axis_targets=targets)
    assert torch.equal(given.axis_losses[0], default.axis_losses[0])
    expected = nn.functional.cross_entropy(default.axis_logits[1][:, :3].flatten(0, 1), targets[:, 1, 1:4].flatten())
    torch.testing.assert_close(given.axis_losses[1], expected)


@pytest.mark.parametrize("variant", ["plain", "axes", "factored"])
def test_targets_can_be_given_shifted(variant):
    """As `shift_labels`, in place of `labels`: where sequences are split over devices, say."""
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 3, 12)
    labels = grid["input_ids"].clone()
    labels[0, :5] = labels[1, 7] = -100
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        expected = model(**grid, labels=labels)
        given = model(**grid, labels=grid["input_ids"], shift_labels=shifted)
    losses = [(x.loss, x.main_loss, *(x.axis_losses or ())) for x in (given, expected)]
    torch.testing.assert_close(*losses)


def test_shifted_targets_of_the_axes_can_be_given():
    model = tiny_multigrid(**TWO_AXES)
    grid = random_grid(model, 2, 9)
    targets = random_grid(model, 2, 9, seed=5)
    shifted = {"shift_labels": targets["input_ids"], "axis_targets": targets["axis_ids"]}
    with torch.no_grad():
        outputs = model(**grid, labels=grid["input_ids"], **shifted)
    tracks = (targets["input_ids"], *targets["axis_ids"].unbind(1))
    for logits, ids, loss in zip(all_logits(outputs), tracks, (outputs.main_loss, *outputs.axis_losses), strict=True):
        torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))


@pytest.mark.parametrize("variant", ["plain", "axes", "factored"])
def test_gradient_accumulation_equals_one_batch(variant):
    model = tiny_multigrid(**VARIANTS[variant]).double()
    grid = random_grid(model, 4, 12)
    labels = grid["input_ids"].clone()
    for row in range(4):
        labels[row, : 2 * row] = -100  # rows count differently
    number = (labels[:, 1:] != -100).sum()
    whole, grads = loss_grads(model, **grid, labels=labels, num_items_in_batch=number)
    torch.testing.assert_close(whole, model(**grid, labels=labels).loss.detach())
    model.zero_grad()
    total = 0
    for row in range(4):
        one = {name: x[row : row + 1] for name, x in grid.items()}
        loss = model(**one, labels=labels[row : row + 1], num_items_in_batch=number).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole)
    for parameter, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant):
    model = tiny_multigrid(**VARIANTS[variant]).train()
    grid = random_grid(model, 2, 12)
    model(**grid, labels=grid["input_ids"]).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", ["plain", "light", "factored", "leap", "lstm"])
def test_gradient_checkpointing_equals_plain(variant, use_reentrant):
    model = tiny_multigrid(**VARIANTS[variant]).train()
    grid = random_grid(model, 2, 12)
    plain_loss, plain = loss_grads(model, **grid, labels=grid["input_ids"])
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    loss, grads = loss_grads(model, **grid, labels=grid["input_ids"])
    torch.testing.assert_close(loss, plain_loss)
    for x, y in zip(grads, plain):
        torch.testing.assert_close(x, y)


def test_dropout_is_for_training_only():
    model = tiny_multigrid(**TWO_AXES, hidden_dropout=0.3, attention_dropout=0.3)
    grid = random_grid(model, 2, 9)
    expected, _ = run(tiny_multigrid(**TWO_AXES), grid)
    assert_same(run(model, grid)[0], expected, tolerance=0)
    model.train()
    for option in ("hidden_dropout", "attention_dropout"):
        model = tiny_multigrid(**TWO_AXES, **{option: 0.3}).train()
        assert not torch.equal(run(model, grid)[0][0], expected[0])


@pytest.mark.parametrize("variant", ["plain", "axes", "light"])
def test_dropout_is_where_it_belongs(variant, monkeypatch):
    """What is dropped, in order; with nothing dropped the logits are those of evaluation."""
    model = tiny_multigrid(**{**VARIANTS[variant], "num_hidden_layers": 1}, hidden_dropout=0.3)
    grid, dropped, made = random_grid(model, 2, 9), [], []
    expected, _ = run(model, grid)

    def record(x, p=0.5, training=True, inplace=False):
        if training:
            assert p == 0.3
            dropped.append(next((name for name, output in made if x is output), tuple(x.shape)))
        return x

    def keep(name, function):
        def call(*args):
            result = function(*args)
            made.extend((name, x) for x in (result[0] if type(result) is tuple else [result]))
            return result

        return call

    monkeypatch.setattr(nn.functional, "dropout", record)
    monkeypatch.setattr(multigrid_blocks, "grouped_mlp", keep("feed-forward", multigrid_blocks.grouped_mlp))
    for core in (model.model.layers[0].core, model.model.layers[0].cross_core):
        if core is not None:
            monkeypatch.setattr(core, "mix", keep("mixing", core.mix))
    assert_same(run(model.train(), grid)[0], expected)
    streams = 1 if variant == "plain" else 2
    embedded = [(2, 9, 16), (2, 2, 9, 8 if variant == "light" else 16)][:streams]
    read = ["mixing"] * 2 if variant == "light" else ["mixing", "feed-forward"] * 2
    assert dropped == embedded + ["mixing", "feed-forward"] * streams + (read if streams > 1 else [])


@pytest.mark.parametrize("variant", ["axes", "factored"])
def test_norms_have_the_epsilon_of_the_config(variant):
    model = tiny_multigrid(layer_norm_eps=0.3, **VARIANTS[variant])
    epsilons = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    # Of each layer two for each of three streams, and three for each of four readings; at the end one for each stream.
    assert epsilons == [0.3] * (2 * (3 * 2 + 4 * 3) + 3 + (variant == "factored"))


# --- axes together -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_one_batched_product_equals_a_loop(bias):
    linears = [nn.Linear(6, 10, bias=bias) for _ in range(3)]
    x = torch.randn(3, 4, 70, 6, requires_grad=True)
    out = grouped_linear(linears, x)
    expected = torch.stack([linear(part) for linear, part in zip(linears, x)])
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    parameters = [x, *(p for linear in linears for p in linear.parameters())]
    grads = torch.autograd.grad((out * weight).sum(), parameters)
    for grad, other in zip(grads, torch.autograd.grad((expected * weight).sum(), parameters)):
        torch.testing.assert_close(grad, other)


def test_batched_products_are_for_training_on_many_rows(monkeypatch):
    """In inference the number of axes must not change a bit, so that axes can be added."""
    products, baddbmm = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args: products.append(1) or baddbmm(*args))
    linears, x = [nn.Linear(6, 10) for _ in range(3)], torch.randn(3, 4, 70, 6)
    grouped_linear(linears, x)
    assert products == [1]
    with torch.no_grad():
        grouped_linear(linears, x)
    grouped_linear(linears, x[:, :1])
    assert products == [1]


def test_leaves_that_were_replaced_or_hooked_are_called():
    x = torch.randn(2, 4, 70, 6)
    linears = [nn.Linear(6, 10), nn.Linear(6, 10)]
    seen = []
    linears[1].register_forward_hook(lambda module, args, output: seen.append(output) or output + 1)
    torch.testing.assert_close(grouped_linear(linears, x)[1], seen[0] + 1)

    linears, grads = [nn.Linear(6, 10), nn.Linear(6, 10)], []
    linears[1].register_full_backward_pre_hook(lambda module, grad: grads.append(grad[0]))
    grouped_linear(linears, x.requires_grad_()).sum().backward()
    assert [grad.shape for grad in grads] == [(4, 70, 10)]

    linears = [nn.Linear(6, 10), nn.Linear(6, 10)]
    linears[1].forward = lambda x: seen[0]
    torch.testing.assert_close(grouped_linear(linears, x)[1], seen[0])

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    linears = [nn.Linear(6, 10), Adapter(6, 10)]
    torch.testing.assert_close(grouped_linear(linears, x)[1], linears[1](x[1]))


@pytest.mark.parametrize("core", ["transformer", "leap", "lstm"])
def test_what_layers_are_told_goes_to_their_device(core):
    """As accelerate sends the arguments of layers that are spread over devices."""
    model, contexts = tiny_multigrid(**TWO_AXES, core=core), []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda *args: contexts.append(args[2]["context"]), with_kwargs=True
    )
    run(model, random_grid(model, 2, 9), attention_mask=(torch.arange(9) > torch.tensor([[2], [-1]])).long())
    hook.remove()
    moved = send_to_device({"context": contexts[0]}, "meta")["context"]

    def tensors(x):
        if isinstance(x, torch.Tensor):
            return [x]
        parts = x if isinstance(x, tuple) else vars(x).values() if hasattr(x, "__dict__") else ()
        return [tensor for part in parts for tensor in tensors(part)]

    assert len(tensors(moved)) == len(tensors(contexts[0])) > 0
    assert all(tensor.is_meta for tensor in tensors(moved))


@pytest.mark.parametrize("variant", WITH_AXES)
def test_training_mode_computes_the_same(variant):
    """Long enough for the batched products that inference does without."""
    model = tiny_multigrid(**VARIANTS[variant])
    grid = random_grid(model, 4, 80)
    logits = all_logits(model.train()(**grid))
    assert_same(logits, run(model.eval(), grid)[0], tolerance=1e-5)


def test_attentions_are_of_all_streams():
    model = tiny_multigrid(**VARIANTS["light"])
    grid = random_grid(model, 2, 9)
    with torch.no_grad():
        plain = model(**grid)
        outputs = model(**grid, output_attentions=True)
    assert_same(all_logits(outputs), all_logits(plain), tolerance=1e-5)
    assert [x.shape for x in outputs.attentions] == [(2, 2 + 2 * 1, 9, 9)] * 2
    for x in outputs.attentions:
        torch.testing.assert_close(x.sum(-1), torch.ones(2, 4, 9))
        assert not x.triu(1).any()
    assert plain.attentions is None
    for core in ("leap", "lstm"):
        other = tiny_multigrid(**VARIANTS[core])
        with torch.no_grad():
            assert other(**random_grid(other, 2, 9), output_attentions=True).attentions is None


def test_meta_streams_join_along_the_batch():
    """As `DataParallel` joins what each device gives back."""
    model = tiny_multigrid(**VARIANTS["light"]).model
    ids, axis_ids = random_ids(3, 9), torch.stack([random_ids(3, 9, size) for size in (7, 5)], dim=1)
    with torch.no_grad():
        whole = model(ids, axis_ids=axis_ids).axis_hidden_states
        parts = [model(ids[rows], axis_ids=axis_ids[rows]).axis_hidden_states for rows in ([0], [1, 2])]
    assert whole.shape == (3, 2, 9, 8)
    torch.testing.assert_close(torch.cat(parts), whole)


# --- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_to_the_last_bit(variant, tmp_path):
    model = tiny_multigrid(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = MultiGridForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_dict()["axis_names"] == model.config.axis_names and not loaded.training
    grid = random_grid(model, 2, 9)
    assert_same(run(loaded, grid)[0], run(model, grid)[0], tolerance=0)


def test_initial_weights():
    torch.manual_seed(0)
    model = MultiGridForCausalLM(tiny_config(**TWO_AXES, hidden_size=128, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.04 < parameter.std() < 0.06, name


def test_the_vocabulary_can_grow():
    model = tiny_multigrid(**TWO_AXES)
    grid = random_grid(model, 2, 9)
    expected, _ = run(model, grid)
    model.resize_token_embeddings(60)
    logits, _ = run(model, grid)
    assert logits[0].shape[-1] == 60
    assert_same([logits[0][..., :50], *logits[1:]], expected, tolerance=1e-6)


# --- errors ------------------------------------------------------------------------------------------------------------


def bad_inputs():
    ids, axis_ids = random_ids(2, 9), torch.zeros(2, 2, 9, dtype=torch.long)
    embeds = torch.zeros(2, 9, 16)
    yield "no ids", {"axis_ids": axis_ids}, "input_ids"
    yield "two kinds of ids", {"input_ids": ids, "inputs_embeds": embeds, "axis_ids": axis_ids}, "input_ids"
    yield "floats for ids", {"input_ids": ids.float(), "axis_ids": axis_ids}, "input_ids"
    yield "integers for embeddings", {"inputs_embeds": embeds.long(), "axis_ids": axis_ids}, "inputs_embeds"
    yield "narrow embeddings", {"inputs_embeds": embeds[..., :4], "axis_ids": axis_ids}, "inputs_embeds"
    yield "ids without a batch", {"input_ids": ids[0], "axis_ids": axis_ids}, "input_ids"
    yield "an id outside", {"input_ids": ids + 48, "axis_ids": axis_ids}, r"input_ids.*\[0, 50\)"
    yield "no axis ids", {"input_ids": ids}, "axis_ids.*kind.*bracket"
    yield "short axis ids", {"input_ids": ids, "axis_ids": axis_ids[..., :8]}, r"axis_ids.*\[2, 2, 9\].*\[2, 2, 8\]"
    yield "one axis of two", {"input_ids": ids, "axis_ids": axis_ids[:, :1]}, r"axis_ids.*\[2, 1, 9\]"
    yield "no axis of axis ids", {"input_ids": ids, "axis_ids": axis_ids[:, 0]}, "axis_ids"
    yield "floats for axis ids", {"input_ids": ids, "axis_ids": axis_ids.float()}, "axis_ids"
    outside = axis_ids.clone()
    outside[1, 1, 3] = 5
    yield "an axis id outside", {"input_ids": ids, "axis_ids": outside}, r"'bracket'.*\[0, 5\).*0 to 5"
    yield "a short mask", {"input_ids": ids, "axis_ids": axis_ids, "attention_mask": ids[:, :4]}, "attention_mask"
    yield "short positions", {"input_ids": ids, "axis_ids": axis_ids, "position_ids": ids[:, :4]}, "position_ids"
    far = {"input_ids": ids, "axis_ids": axis_ids, "position_ids": torch.arange(120, 129)[None]}
    yield "a far position", far, "max_position_embeddings"
    stock = {"input_ids": ids, "axis_ids": axis_ids, "past_key_values": DynamicCache()}
    yield "a stock cache", stock, "MultiGridCache"
    yield "no cache at all", {**stock, "past_key_values": ()}, "MultiGridCache.*got tuple"
    yield (
        "targets of one axis",
        {"input_ids": ids, "axis_ids": axis_ids, "labels": ids, "axis_targets": ids},
        "axis_targ",
    )
    yield "next tokens", {"input_ids": ids, "axis_ids": axis_ids, "next_axis_ids": ids[:, :2]}, "factored"


@pytest.mark.parametrize("case", list(bad_inputs()), ids=lambda case: case[0])
def test_bad_inputs_are_named(case):
    _, inputs, message = case
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_multigrid(**TWO_AXES)(**inputs)


def test_other_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"axis_ids.*\[2, 0, 9\]"):
        tiny_multigrid()(random_ids(2, 9), axis_ids=torch.zeros(2, 1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        tiny_multigrid(max_position_embeddings=8)(random_ids(1, 9))
    model = tiny_multigrid(**VARIANTS["factored"])
    grid = random_grid(model, 2, 9)
    with pytest.raises(ValueError, match=r"next_axis_ids.*\[2, 2\].*\[2, 3\]"):
        model(**grid, next_axis_ids=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"next_axis_ids.*'kind'.*\[0, 7\)"):
        model(**grid, next_axis_ids=torch.full((2, 2), 7))
    with pytest.raises(ValueError, match=r"next_axis_ids.*\[2, 2, 1\]"):
        model.main_logits(torch.zeros(2, 1, 16), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="`next_axis_ids` need axis_order='factored'"):
        tiny_multigrid(**TWO_AXES)(**grid, next_axis_ids=torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="factored"):
        tiny_multigrid(**TWO_AXES).main_logits(torch.zeros(2, 1, 16), torch.zeros(2, 2, 1, dtype=torch.long))
