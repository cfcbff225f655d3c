"""Hierarchical LMs against the oracle in `tests/reference/`, and what must leave no trace: pads, neighbours, the future."""

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_heptapod import HierarchicalCache, HierarchicalLMForCausalLM, HierarchicalLMModel
from modeling_heptapod.common.transformers_versions import CACHE
from modeling_heptapod.hierarchical_lm.hierarchy_merges import ConcatMerge
from tests.reference.hierarchical_lm import HierarchicalDescription, hierarchical_logits, hierarchical_streams
from tests.tiny_hierarchical_lm import SOME_FAST, VARIANTS, random_ids, tiny_config, tiny_hierarchical_lm


SEQ = 21
ALL_LOSSES = {
    "reconstruction_loss_weight": 0.1,
    "prophet_loss_weight": 0.2,
    "quantized_prophet_loss_weight": 0.3,
    "next_latent_loss_weight": 0.4,
}


def describe(config):
    """The oracle's plain numbers from a configuration."""
    return HierarchicalDescription(
        factors=config.compression_factors,
        strides=config.strides,
        heads=config.num_attention_heads,
        head_dims=config.head_dim,
        windows=config.window_sizes,
        layers=config.num_hidden_layers,
        blocks=config.window_type == "block",
        predict=config.predict_index,
        predict_from_all=config.predict_from_all,
        merge=config.merge,
        merge_into_all=config.merge_into == "all",
        coarse_to_fine=config.merge_direction == "coarse_to_fine",
        attention_norms=config.attention_norm,
        compressors=config.compressor,
        xpos=config.use_xpos,
        xpos_base=config.xpos_scale_base,
        shared_attention=config.shared_attention,
        rms_norm_eps=config.rms_norm_eps,
        layer_norm_eps=config.layer_norm_eps,
    )


# --- the whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merging", [True, False])
@pytest.mark.parametrize("variant", SOME_FAST)
def test_logits_and_streams_equal_the_oracle(variant, merging):
    model = tiny_hierarchical_lm(**VARIANTS[variant]).double()
    ids = random_ids(2, SEQ)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        out = model(ids, ablate_merge=not merging, output_hierarchy_hidden_states=True)
        for row in range(2):
            logits = hierarchical_logits(weights, ids[row].tolist(), describe(model.config), merging)
            torch.testing.assert_close(out.logits[row], logits, rtol=1e-5, atol=1e-5)  # angles are float32
            streams = hierarchical_streams(weights, ids[row].tolist(), describe(model.config), merging)
            assert len(out.hierarchy_hidden_states) == len(streams)
            for stream, expected in zip(out.hierarchy_hidden_states, streams):
                torch.testing.assert_close(stream[row], torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seq", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_short_sequences(variant, seq):
    """One token; fewer than a factor; fewer than a dilation."""
    model = tiny_hierarchical_lm(**VARIANTS[variant]).double()
    ids = random_ids(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :seq]).logits, model(ids).logits[:, :seq], rtol=1e-5, atol=1e-5)


def test_one_hierarchy_is_a_plain_decoder():
    model = tiny_hierarchical_lm(compression_factors=1, window_sizes=None)
    names = {name.split(".")[1] for name in model.model.state_dict()} | {x.split(".")[0] for x in model.state_dict()}
    assert not any("merge" in name or "compressors" in name for name in model.state_dict()), names


# --- pads leave no trace -----------------------------------------------------------------------------------------------


def pad(rows, side, pad_id=0, width=None):
    width = width or max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_rows_equal_rows_alone(variant, side):
    model = tiny_hierarchical_lm(pad_token_id=3, **VARIANTS[variant]).double()
    with torch.no_grad():
        model.get_input_embeddings().weight[3].normal_()
    rows = [random_ids(1, n, seed=n)[0] for n in (1, 7, 30, 61)]
    ids, mask = pad(rows, side, pad_id=3, width=64)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hierarchy_hidden_states=True, output_hidden_states=True)
        for i, row in enumerate(rows):
            alone = model(row[None], output_hierarchy_hidden_states=True, output_hidden_states=True)
            torch.testing.assert_close(out.logits[i][mask[i].bool()], alone.logits[0], rtol=1e-5, atol=1e-5)
            for stream, expected in zip(out.hierarchy_hidden_states, alone.hierarchy_hidden_states):
                torch.testing.assert_close(stream[i, : expected.shape[1]], expected[0], rtol=1e-5, atol=1e-5)
            for state, expected in zip(out.hidden_states, alone.hidden_states):
                if model.config.strides[model.config.predict_index] == 1:
                    torch.testing.assert_close(state[i][mask[i].bool()], expected[0], rtol=1e-5, atol=1e-5)
        single = model(ids[1:2], attention_mask=mask[1:2]).logits  # a batch of one, padded
        torch.testing.assert_close(single[0], out.logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_get_no_gradient(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant])
    ids = random_ids(2, 40, vocab_size=49)  # 49 occurs at pads only
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[1, 30:] = 0
    ids[mask == 0] = 49
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    logits[mask.bool()].square().sum().backward()
    assert torch.equal(embeds.grad[mask == 0], torch.zeros_like(embeds.grad[mask == 0]))
    # The last token may come after the last step of a predicting hierarchy with a stride.
    assert (embeds.grad[mask == 1].abs().sum(-1) > 0).sum() >= (mask == 1).sum() - 1


def test_empty_rows_are_finite():
    model = tiny_hierarchical_lm(**VARIANTS["stride"])
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
        assert out.logits.isfinite().all() and not out.logits[1].any()
        more = model(ids, attention_mask=torch.ones(2, 9), past_key_values=out.past_key_values).logits
        torch.testing.assert_close(more[1:], model(ids[1:]).logits, rtol=1e-4, atol=1e-4)


# --- packed rows equal separate rows -----------------------------------------------------------------------------------

LENGTHS = (1, 30, 2, 50, 17)


def packing(how):
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "position_ids": {"position_ids": position_ids},
        "cu_seq_lens_q": {"cu_seq_lens_q": bounds.long()},
        "cu_seq_lens_q as a collator gives it": {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(LENGTHS),
            "max_length_k": max(LENGTHS),
            "position_ids": position_ids,
        },
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]},
    }[how]


HOW = ["position_ids", "cu_seq_lens_q", "cu_seq_lens_q as a collator gives it", "seq_idx"]


@pytest.mark.parametrize("how", HOW)
def test_packed_rows_in_every_notation(how):
    model, ids = tiny_hierarchical_lm(**VARIANTS["stride"]), random_ids(1, sum(LENGTHS))
    with torch.no_grad():
        separate = torch.cat([model(row).logits for row in ids.split(LENGTHS, dim=1)], dim=1)
        torch.testing.assert_close(model(ids, **packing(how)).logits, separate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_equal_separate_rows(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant]).double()
    ids = random_ids(1, sum(LENGTHS))
    weight = torch.randn(1, sum(LENGTHS), 50, dtype=torch.float64)
    logits = model(ids, **packing("seq_idx")).logits
    (logits * weight).sum().backward()
    packed_grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.zero_grad()
    separate = torch.cat([model(row).logits for row in ids.split(LENGTHS, dim=1)], dim=1)
    (separate * weight).sum().backward()
    torch.testing.assert_close(logits, separate, rtol=1e-5, atol=1e-5)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) == len(packed_grads)
    for packed_grad, grad in zip(packed_grads, grads):
        torch.testing.assert_close(packed_grad, grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_of_a_padded_batch(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant]).double()
    ids = random_ids(2, 40)
    segments = torch.tensor([[5] * 40, [7] * 3 + [2] * 22 + [7] * 15])
    mask = torch.ones(2, 40)
    mask[0, :6] = 0
    mask[1, 20:25] = 0
    with torch.no_grad():
        logits = model(ids, seq_idx=segments, attention_mask=mask).logits
        for row, start, end in ((0, 6, 40), (1, 0, 3), (1, 3, 20), (1, 25, 40)):
            alone = model(ids[row : row + 1, start:end]).logits[0]
            torch.testing.assert_close(logits[row, start:end], alone, rtol=1e-5, atol=1e-5)


def test_packed_rows_fill_no_cache():
    model, ids = tiny_hierarchical_lm(), random_ids(1, sum(LENGTHS))
    assert model(ids, use_cache=True, **packing("seq_idx")).past_key_values is None
    with pytest.raises(ValueError, match=f"{CACHE}"):
        model(ids, past_key_values=HierarchicalCache(model.config), **packing("seq_idx"))


# --- causality ---------------------------------------------------------------------------------------------------------


class Streams:
    """Keeps the streams that go into the first layer and come out of each."""

    def __init__(self, model):
        self.kept = []
        model.model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: self.kept.append(args), with_kwargs=True
        )
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output: self.kept.append(output))

    def __call__(self, model, ids):
        self.kept = []
        with torch.no_grad():
            out = model(ids, output_hierarchy_hidden_states=True)
        return [*self.kept, out.hierarchy_hidden_states], out.logits


@pytest.mark.parametrize("variant", SOME_FAST)
def test_no_hierarchy_sees_the_future(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant])
    strides, factors, seq = model.config.strides, model.config.compression_factors, 40
    ids, streams_of = random_ids(1, seq), Streams(model)
    streams, logits = streams_of(model, ids)
    for place in range(seq):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 50
        changed, changed_logits = streams_of(model, other)
        assert len(changed) == model.config.num_hidden_layers + 2
        for depth, pair in enumerate(zip(streams, changed)):
            for h, (a, b) in enumerate(zip(*pair)):
                first = -(-place // strides[h])  # the first step that is made of nothing earlier than this token
                differs = (a != b).any(-1)[0]
                assert not differs[:first].any(), (depth, h, place)
                reached = range(first, min(len(differs), -(-(place + factors[h]) // strides[h])))
                if depth == 0:  # exactly the windows of the compressor that hold it
                    assert differs.nonzero().flatten().tolist() == list(reached), (h, place)
        differs = (logits != changed_logits).any(-1)[0]
        assert not differs[:place].any()
        if strides[model.config.predict_index] == 1:
            assert differs[place]


def test_windows_reach_exactly_as_far_as_they_say():
    """What a window adds to a token shift's reach, through one layer without a merge."""

    def reach(**how):
        model = tiny_hierarchical_lm(num_hidden_layers=1, **how)
        ids = random_ids(1, 60)
        other = ids.clone()
        other[0, 20] = (other[0, 20] + 1) % 50
        with torch.no_grad():
            a, b = (model(x, output_hierarchy_hidden_states=True).hierarchy_hidden_states[-1] for x in (ids, other))
        return (a != b).any(-1)[0].nonzero().flatten().tolist()

    # Both shifts reach one step each, and a window of w steps w - 1 more.
    assert reach(compression_factors=1, window_sizes=0) == [20, 21]
    assert reach(compression_factors=1, window_sizes=1) == [20, 21, 22]
    assert reach(compression_factors=1, window_sizes=4) == list(range(20, 26))
    assert reach(compression_factors=1, window_sizes=4, window_type="block") == [*range(20, 28), 28]
    # The compressor's windows of four, in steps of four.
    assert reach(compression_factors=[1, 4], window_sizes=[0, 2]) == list(range(20, 24 + 3 * 4))
    assert reach(compression_factors=[1, 4], strides=[1, 4], window_sizes=[0, 2]) == [5, 6, 7, 8]


# --- attentions and hidden states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SOME_FAST)
def test_asking_for_attentions_changes_nothing(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant]).double()
    config, ids = model.config, random_ids(2, 23)
    with torch.no_grad():
        plain = model(ids).logits
        out = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, plain)
    attending = [h for h, window in enumerate(config.window_sizes) if window != 0]
    assert len(out.attentions) == len(attending) * config.num_hidden_layers
    for i, weights in enumerate(out.attentions):
        h = attending[i % len(attending)]
        steps = -(-23 // config.strides[h])
        assert weights.shape == (2, config.num_attention_heads[h], steps, steps)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        distance = torch.arange(steps)[:, None] - torch.arange(steps)
        assert not weights[..., (distance < 0) | (distance % config.dilations[h] != 0)].any()
        if config.window_sizes[h] is not None and config.window_type == "sliding":
            assert not weights[..., distance >= config.window_sizes[h] * config.dilations[h]].any()
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    cache, states = None, []
    with torch.no_grad():
        for t in range(23):
            step = model(ids[:, t : t + 1], past_key_values=cache, output_attentions=True, use_cache=True)
            cache = step.past_key_values
            states.append(step.logits)
    torch.testing.assert_close(torch.cat(states, dim=1), plain, rtol=1e-5, atol=1e-5)


def test_the_context_of_layers_goes_to_their_device():
    """As accelerate sends the arguments of layers that are spread over devices."""
    model, contexts = tiny_hierarchical_lm(**VARIANTS["stride"]), []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda *args: contexts.append(args[2]["context"]), with_kwargs=True
    )
    with torch.no_grad():
        model(random_ids(2, 9), attention_mask=(torch.arange(9) > torch.tensor([[2], [-1]])).long())
    hook.remove()
    plans = send_to_device({"context": contexts[0]}, "meta")["context"].streams
    assert len(plans) > 1 and all(plan.token_positions.is_meta and plan.rotary[0].is_meta for plan in plans)


@pytest.mark.parametrize("variant", ["two", "stride", "blocks", "cross"])
def test_eager_attention_equals_sdpa(variant):
    model = tiny_hierarchical_lm(**VARIANTS[variant])
    assert model.config._attn_implementation == "sdpa"
    ids = random_ids(2, 70)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


# --- training ----------------------------------------------------------------------------------------------------------


def loss_grads(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    # Reentrant checkpoints give zeros where a plain backward pass gives nothing.
    return loss.detach(), [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in model.parameters()]


def test_every_loss_is_returned_by_name_and_adds_up():
    ids = random_ids(2, 30)
    plain = tiny_hierarchical_lm(**VARIANTS["stride"])
    out = plain(ids, labels=ids)
    torch.testing.assert_close(out.loss, ForCausalLMLoss(out.logits, ids, vocab_size=50))
    assert torch.equal(out.loss, out.ce_loss)
    assert out.reconstruction_loss is None and out.next_latent_loss is None
    assert plain.auxiliary_losses is None

    model = tiny_hierarchical_lm(**VARIANTS["stride"], **ALL_LOSSES)
    out = model(ids, labels=ids)
    # The weight of the next-latent loss is inside, one for each hierarchy.
    expected = out.ce_loss + 0.1 * out.reconstruction_loss + 0.2 * out.prophet_loss
    expected = expected + 0.3 * out.quantized_prophet_loss + out.next_latent_loss
    torch.testing.assert_close(out.loss, expected)
    assert all(x > 0 for x in (out.reconstruction_loss, out.prophet_loss, out.next_latent_loss))
    assert out.hierarchy_hidden_states is None
    out.loss.backward()
    untrained = [name for name, x in model.named_parameters() if x.grad is None or not x.grad.any()]
    # The last layers of the next-latent networks begin at zero, so those before them get no gradient yet.
    assert all(name.startswith("auxiliary_losses.next_latent") for name in untrained), untrained
    assert model(ids).loss is None


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_losses_of_padded_and_packed_rows_are_those_of_rows_alone(how):
    # More steps ahead than the empty slots that keep packed sequences apart.
    model = tiny_hierarchical_lm(**VARIANTS["stride"], **ALL_LOSSES, next_latent_rollouts=9).double()
    rows = [random_ids(1, n, seed=n) for n in (30, 30)]
    names = ["reconstruction_loss", "prophet_loss", "quantized_prophet_loss", "next_latent_loss"]
    with torch.no_grad():
        alone = model(torch.cat(rows), labels=torch.cat(rows))
        if how == "packed":
            ids, more = torch.cat(rows, dim=1), {"seq_idx": torch.arange(2).repeat_interleave(30)[None]}
        else:
            ids, more = nn.functional.pad(torch.cat(rows), (9, 0), value=4), {}
            more["attention_mask"] = nn.functional.pad(torch.ones(2, 30), (9, 0))
        labels = ids.clone()
        labels[:, :9] = labels[:, :9] if how == "packed" else -100
        out = model(ids, labels=labels, **more)
    for name in names:
        torch.testing.assert_close(out[name], alone[name], rtol=1e-5, atol=1e-6)


def test_gradient_accumulation_equals_one_batch():
    model = tiny_hierarchical_lm(**VARIANTS["stride"], **ALL_LOSSES).double()
    ids = random_ids(4, 20)
    num_items = ids[:, 1:].numel()
    whole, grads = loss_grads(model, input_ids=ids, labels=ids, num_items_in_batch=num_items)
    model.zero_grad()
    total = 0
    for i in range(4):
        loss = model(ids[i : i + 1], labels=ids[i : i + 1], num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole)
    for parameter, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(torch.zeros_like(grad) if parameter.grad is None else parameter.grad, grad)
    torch.testing.assert_close(whole, model(ids, labels=ids).loss.detach())


def test_given_shifted_labels_count_as_they_are():
    model = tiny_hierarchical_lm(**VARIANTS["two"], **ALL_LOSSES)
    ids = random_ids(2, 20)
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        expected = model(ids, labels=ids, num_items_in_batch=38)
        out = model(ids, labels=torch.full_like(ids, -100), shift_labels=shifted, num_items_in_batch=38)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.next_latent_loss, expected.next_latent_loss)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("losses", [False, True])
def test_what_can_be_trained_gets_a_gradient(variant, losses):
    """Or DistributedDataParallel waits for it."""
    model = tiny_hierarchical_lm(**VARIANTS[variant], **(ALL_LOSSES if losses else {})).train()
    ids = random_ids(2, 40)
    model(ids, labels=ids).loss.backward()
    assert [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None] == []


def test_rows_too_short_for_a_rollout_have_gradients_of_zero():
    model = tiny_hierarchical_lm(**VARIANTS["stride"], **ALL_LOSSES).train()
    ids = random_ids(2, 4)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.loss.isfinite()
    assert [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None] == []


def test_merging_can_be_ablated_in_generate():
    model, ids = tiny_hierarchical_lm(**VARIANTS["two"]), random_ids(1, 9)
    written = model.generate(ids, ablate_merge=True, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        logits = model.lm_head(model.model(written[:, :-1], ablate_merge=True).last_hidden_state)
        assert not torch.allclose(model(written[:, :-1]).logits, logits)
    assert torch.equal(logits[:, 8:].argmax(-1), written[:, 9:])


def test_own_parameters_that_a_checkpoint_lacks_are_initialised(tmp_path):
    model = tiny_hierarchical_lm(**VARIANTS["stride"], compressor=["conv", "conv", "attention"])
    for name, std in (("tap_embed", 0.2), ("up_bias", 0.0)):
        kept = {key: value for key, value in model.state_dict().items() if name not in key}
        assert len(kept) < len(model.state_dict())
        model.save_pretrained(tmp_path, state_dict=kept)
        found = HierarchicalLMForCausalLM.from_pretrained(tmp_path).state_dict()
        values = torch.cat([value.flatten() for key, value in found.items() if name in key])
        assert abs(values.std() - std) <= 0.2 * std, name


def test_heads_of_losses_are_no_linear_layers():
    """They are never called, so an adapter on one would do nothing."""
    heads = tiny_hierarchical_lm(**VARIANTS["stride"], **ALL_LOSSES).auxiliary_losses
    for name, module in heads.named_modules():
        if isinstance(module, nn.Linear):
            assert "next_latent" in name


def test_autocast_leaves_the_streams_in_float32():
    model = tiny_hierarchical_lm("HierarchicalLMModel", **VARIANTS["stride"])
    seen = []
    for norm in model.embed_norms:
        norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_ids(1, 20))
    assert seen == [torch.float32] * 3


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", ["two", "stride", "cross-all"])
def test_gradient_checkpointing_equals_plain(variant, use_reentrant):
    model = tiny_hierarchical_lm(**VARIANTS[variant]).train()
    ids = random_ids(2, 40)
    plain_loss, plain = loss_grads(model, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss, grads = loss_grads(model, input_ids=ids, labels=ids)
    assert torch.equal(loss, plain_loss)
    for grad, expected in zip(grads, plain):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("variant", SOME_FAST)
def test_bfloat16(variant):
    model = tiny_hierarchical_lm(**{"initializer_range": 0.1, **VARIANTS[variant], **ALL_LOSSES}).train()
    ids = random_ids(2, 40)
    plain, plain_grads = loss_grads(model, input_ids=ids, labels=ids)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss.detach() - plain) < 0.02 * plain.abs()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in model.parameters()]
    together = [torch.cat([x.flatten() for x in each]) for each in (grads, plain_grads)]
    assert nn.functional.cosine_similarity(*together, dim=0) > 0.98
    model.bfloat16().eval()
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=50).shape == (2, 45)


# --- heads, inputs, saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["two", "blocks", "cross", "cross-all"])
def test_norms_have_the_epsilon_of_the_config(variant):
    model = tiny_hierarchical_lm(layer_norm_eps=0.3, rms_norm_eps=0.2, **VARIANTS[variant])
    kinds = {nn.LayerNorm: 0.3, nn.RMSNorm: 0.2, ConcatMerge: 0.2}
    for kind, epsilon in kinds.items():
        epsilons = {module.eps for module in model.modules() if isinstance(module, kind)}
        assert epsilons <= {epsilon}, kind
    first = model.model.layers[0].blocks[0].input_layernorm
    assert type(first) is (nn.LayerNorm if variant == "blocks" else nn.RMSNorm)


def test_logits_to_keep_and_inputs_embeds():
    model, ids = tiny_hierarchical_lm(), random_ids(2, 10)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, logits)
        assert torch.equal(model(ids.int()).logits, logits)
        assert torch.equal(model(ids, position_ids=torch.arange(10)[None]).logits, logits)
        assert torch.equal(model(ids, return_dict=False)[0], logits)


def test_tied_weights_are_one_tensor():
    model = tiny_hierarchical_lm(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert tiny_hierarchical_lm().lm_head.weight is not tiny_hierarchical_lm().get_input_embeddings().weight


def test_shared_attention_is_held_once():
    shared = tiny_hierarchical_lm(
        shared_attention=True, compression_factors=[1, 2, 4], hidden_sizes=[16, 24, 16], window_sizes=None
    )
    names = [name for name in shared.state_dict() if "qkv_proj" in name and "layers.0" in name]
    assert names == [f"model.layers.0.blocks.{h}.self_attn.qkv_proj.weight" for h in (0, 1)]
    before = shared(random_ids(1, 20), output_hierarchy_hidden_states=True, ablate_merge=True).hierarchy_hidden_states
    with torch.no_grad():
        shared.model.layers[0].blocks[0].self_attn.qkv_proj.weight.mul_(2)
    after = shared(random_ids(1, 20), output_hierarchy_hidden_states=True, ablate_merge=True).hierarchy_hidden_states
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [False, True, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_changes_no_weight(variant, tmp_path):
    model = tiny_hierarchical_lm(**VARIANTS[variant], **ALL_LOSSES)
    model.save_pretrained(tmp_path)
    loaded = HierarchicalLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(a, b), name
    ids = random_ids(2, 19)
    out, expected = loaded(ids, labels=ids), model(ids, labels=ids)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)


def test_options_overridden_at_loading_are_completed_and_checked(tmp_path):
    tiny_hierarchical_lm().save_pretrained(tmp_path)
    model = HierarchicalLMForCausalLM.from_pretrained(tmp_path, window_sizes=3, mlp_ratio=2)
    assert model.config.window_sizes == [3, 3]
    model(random_ids(1, 5))
    with pytest.raises(ValueError, match="`strides`.*got stride 3"):
        HierarchicalLMForCausalLM.from_pretrained(tmp_path, strides=3)


def test_initial_weights_have_the_configured_size():
    torch.manual_seed(0)
    config = tiny_config(
        compression_factors=[1, 4], hidden_sizes=64, initializer_range=0.05, compressor="attention", window_sizes=None
    )
    for name, parameter in HierarchicalLMForCausalLM(config).named_parameters():
        if parameter.dim() > 1:
            assert abs(parameter.std() - 0.05) < 0.01, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name))), name


def test_resized_embeddings():
    model = tiny_hierarchical_lm()
    ids = random_ids(1, 9)
    logits = model(ids).logits
    model.resize_token_embeddings(60)
    assert model.config.vocab_size == 60 and model(ids).logits.shape[-1] == 60
    torch.testing.assert_close(model(ids).logits[..., :50], logits)


@pytest.mark.parametrize("size", [60, 30])
def test_resized_embeddings_with_losses_that_tell_tokens(size, tmp_path):
    model, ids = tiny_hierarchical_lm(**VARIANTS["stride"], **ALL_LOSSES), random_ids(2, 20) % 30
    heads = {c: x.weight.detach().unflatten(0, (int(c), 50)) for c, x in model.auxiliary_losses.prophet.items()}
    model.resize_token_embeddings(size)
    for c, head in model.auxiliary_losses.prophet.items():
        kept = head.weight.unflatten(0, (int(c), size))[:, : min(size, 50)]
        assert torch.equal(kept, heads[c][:, :size])
    loss = model(ids, labels=ids).loss
    loss.backward()
    model.save_pretrained(tmp_path)
    again = HierarchicalLMForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids, labels=ids).loss, loss)


# --- bad input ---------------------------------------------------------------------------------------------------------

EMBEDS = torch.zeros(1, 4, 16)
IDS = torch.zeros(1, 4, dtype=torch.long)

BAD_INPUTS = {
    "float ids": ({"input_ids": IDS.float()}, TypeError, "input_ids"),
    "ids without batch": ({"input_ids": IDS[0]}, ValueError, "input_ids"),
    "no ids": ({"input_ids": IDS[:, :0]}, ValueError, "input_ids"),
    "no rows": ({"input_ids": IDS[:0]}, ValueError, "input_ids"),
    "ids beyond the vocabulary": ({"input_ids": IDS + 50}, ValueError, "input_ids.*50"),
    "negative ids": ({"input_ids": IDS - 1}, ValueError, "input_ids"),
    "neither": ({}, ValueError, "input_ids.*inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, ValueError, "input_ids.*inputs_embeds"),
    "empty embeds": ({"inputs_embeds": EMBEDS[:, :0]}, ValueError, "inputs_embeds"),
    "embeds of another dtype": ({"inputs_embeds": EMBEDS.long()}, TypeError, "inputs_embeds"),
    "embeds of another width": ({"inputs_embeds": EMBEDS[..., :15]}, ValueError, "inputs_embeds"),
    "short mask": ({"input_ids": IDS, "attention_mask": IDS[:, :3]}, ValueError, "attention_mask"),
    "long mask": ({"input_ids": IDS, "attention_mask": torch.ones(1, 5)}, ValueError, "attention_mask"),
    "mask of another batch": ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, ValueError, "attention_mask"),
    "4D mask": ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 4, 4)}, ValueError, "attention_mask"),
    "short seq_idx": ({"input_ids": IDS, "seq_idx": IDS[:, :3]}, ValueError, "seq_idx"),
    "cu_seq_lens_q of a batch": (
        {"input_ids": IDS.expand(2, 4), "cu_seq_lens_q": torch.tensor([0, 4, 8])},
        ValueError,
        "cu_seq_lens_q",
    ),
    "short position_ids": ({"input_ids": IDS, "position_ids": IDS[:, :3]}, ValueError, "position_ids"),
}


@pytest.mark.parametrize("head", ["HierarchicalLMModel", "HierarchicalLMForCausalLM"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gives_an_error_that_names_it(head, case):
    inputs, error, match = BAD_INPUTS[case]
    with pytest.raises(error, match=match):
        tiny_hierarchical_lm(head)(**inputs)


@pytest.mark.parametrize("ids", [IDS.float(), IDS + 50])
def test_bad_input_is_named_with_all_losses(ids):
    with pytest.raises((TypeError, ValueError), match="`input_ids` must be"):
        tiny_hierarchical_lm(**ALL_LOSSES)(ids, labels=IDS)


def test_public_classes_are_what_they_say():
    for cls in (HierarchicalLMModel, HierarchicalLMForCausalLM):
        assert cls.config_class.model_type == "hierarchical_lm" and cls.__doc__
