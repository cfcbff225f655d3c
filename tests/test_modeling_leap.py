"""LEAP models against the oracle in `tests/reference/leap.py`, and what must leave no trace: pads, neighbours, the future."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_heptapod import (
    LeapForCausalLM,
    LeapForMaskedLM,
    LeapForSequenceClassification,
    LeapModel,
    RecurrentCache,
)
from modeling_heptapod.common.transformers_versions import CACHE
from modeling_heptapod.leap import modeling_leap
from tests.reference.leap import LeapDescription, leap_logits
from tests.tiny import mostly_slow
from tests.tiny_leap import VARIANTS, random_ids, tiny_config, tiny_leap


SEQ = 21


def describe(config):
    """The oracle's plain numbers from a configuration."""
    return LeapDescription(
        heads=config.num_attention_heads,
        windows=list(config.window_sizes),
        mixer=config.mixer,
        weight=config.weight_function,
        rescale=config.rescale,
        gate=config.output_gate,
        positions=config.position_embedding_type,
        sink_weight=config.sink_weight,
        causal=config.is_causal,
        layer_norm_eps=config.layer_norm_eps,
    )


def oracle(model, ids, **kwargs):
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        return leap_logits(weights, ids.tolist(), describe(model.config), **kwargs)


# --- the whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("default", "exp", "alibi-null", "additive-alibi")))
def test_logits_equal_the_oracle(head, variant):
    model = tiny_leap(head, **VARIANTS[variant]).double()
    ids = random_ids(2, SEQ)
    real = torch.ones(2, SEQ, dtype=torch.bool)
    real[0, :8] = False
    with torch.no_grad():
        logits = model(ids, attention_mask=real.long()).logits
    expected = oracle(model, ids, real=real.tolist())
    assert not expected[real].isnan().any()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-5)  # angles are float32


@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, ("default", "exp", "alibi-null", "additive-alibi")))
def test_packed_logits_equal_the_oracle(head, variant):
    model = tiny_leap(head, **VARIANTS[variant]).double()
    ids = random_ids(2, SEQ)
    sequences = torch.tensor([[0] * 1 + [1] * 12 + [2] * 8, [5] * 6 + [3] * 6 + [0] * 9])
    with torch.no_grad():
        logits = model(ids, seq_idx=sequences).logits
    torch.testing.assert_close(logits, oracle(model, ids, sequences=sequences.tolist()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [7, 70])
def test_equal_ids_that_do_not_touch_are_different_sequences(length):
    model = tiny_leap().double()
    ids = random_ids(1, 3 * length)
    with torch.no_grad():
        logits = model(ids, seq_idx=torch.tensor([5, 3, 5]).repeat_interleave(length)[None]).logits
        expected = model(ids, seq_idx=torch.tensor([0, 1, 2]).repeat_interleave(length)[None]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_the_oracle_tells_every_option_apart():
    model = tiny_leap(sink_weight=0.1).double()
    ids = random_ids(1, 9)
    weights, description = model.state_dict(), describe(model.config)
    logits = leap_logits(weights, ids.tolist(), description)
    for change in (
        {"heads": 2},
        {"windows": [None, 4, 7, 16]},
        {"weight": "exp"},
        {"rescale": None},
        {"gate": "gelu"},
        {"positions": "none"},
        {"positions": "alibi"},
        {"sink_weight": 0.0},
        {"causal": False},
        {"layer_norm_eps": 1e-2},
    ):
        other = leap_logits(weights, ids.tolist(), dataclasses.replace(description, **change))
        assert (other - logits).abs().max() > 1e-6, change


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
@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_rows_equal_rows_alone(variant, head, side):
    model = tiny_leap(head, pad_token_id=3, **VARIANTS[variant]).double()
    with torch.no_grad():
        model.get_input_embeddings().weight[3].normal_()
    rows = [random_ids(1, n, seed=n)[0] for n in (1, 7, 30, 90)]
    ids, mask = pad(rows, side, pad_id=3, width=95)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(logits[i][mask[i].bool()], alone, rtol=1e-9, atol=1e-9)
        by_dict = model(ids, attention_mask={"linear_attention": mask}).logits
        torch.testing.assert_close(by_dict, logits)


@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_between_tokens_take_no_place(variant, head):
    model = tiny_leap(head, **VARIANTS[variant]).double()
    ids, mask = random_ids(3, 70), torch.rand(3, 70, generator=torch.Generator().manual_seed(3)) < 0.6
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, output_hidden_states=True)
        for row in range(3):
            alone = model(ids[row, mask[row]][None], output_hidden_states=True)
            torch.testing.assert_close(outputs.logits[row, mask[row]], alone.logits[0], rtol=1e-5, atol=1e-5)
            for states, expected in zip(outputs.hidden_states, alone.hidden_states):
                torch.testing.assert_close(states[row, mask[row]], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_get_no_gradient(variant, head):
    model = tiny_leap(head, **VARIANTS[variant])
    ids = random_ids(2, 40, vocab_size=49)  # 49 occurs at pads only
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[1, 30:] = 0
    ids[mask == 0] = 49
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    logits[mask.bool()].square().sum().backward()
    assert torch.equal(embeds.grad[mask == 0], torch.zeros_like(embeds.grad[mask == 0]))
    assert (embeds.grad[mask == 1].abs().sum(-1) > 0).all()

    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 13] = -100  # a pad would predict it
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    grad = model.get_input_embeddings().weight.grad
    assert torch.equal(grad[49], torch.zeros_like(grad[49])) and grad.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_leave_no_trace_in_the_state(variant):
    model = tiny_leap(**VARIANTS[variant])
    rows = [random_ids(1, n, seed=n)[0] for n in (1, 7, 90)]
    ids, mask = pad(rows, "left")
    follow = random_ids(3, 1, seed=9)
    full_mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        logits = model(follow, attention_mask=full_mask, past_key_values=cache).logits
        for i, row in enumerate(rows):
            alone = model(row[None], use_cache=True).past_key_values
            expected = model(follow[i : i + 1], past_key_values=alone).logits
            torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-4, atol=1e-4)


# --- packed rows equal separate rows -----------------------------------------------------------------------------------

LENGTHS = (1, 30, 2, 70, 17)


def packing(how):
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    if how == "position_ids":
        return {"position_ids": position_ids}
    if how == "cu_seq_lens_q":
        return {"cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0)}
    if how == "cu_seq_lens_q as a collator gives it":
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        longest = max(LENGTHS)
        return {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
            "position_ids": position_ids,
        }
    return {"seq_idx": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]}


HOW = ["position_ids", "cu_seq_lens_q", "cu_seq_lens_q as a collator gives it", "seq_idx"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
def test_packed_rows_in_every_notation(head, how):
    model, ids = tiny_leap(head), random_ids(1, sum(LENGTHS))
    with torch.no_grad():
        separate = torch.cat([model(row).logits for row in ids.split(LENGTHS, dim=1)], dim=1)
        torch.testing.assert_close(model(ids, **packing(how)).logits, separate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_equal_separate_rows(variant, head):
    model = tiny_leap(head, **VARIANTS[variant]).double()
    ids = random_ids(1, sum(LENGTHS))
    weight = torch.randn(1, sum(LENGTHS), 50, dtype=torch.float64)

    logits = model(ids, **packing("seq_idx")).logits
    (logits * weight).sum().backward()
    packed_grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.zero_grad()
    separate = torch.cat([model(row).logits for row in ids.split(LENGTHS, dim=1)], dim=1)
    (separate * weight).sum().backward()
    torch.testing.assert_close(logits, separate, rtol=1e-9, atol=1e-9)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) == len(packed_grads)
    for packed_grad, grad in zip(packed_grads, grads):
        torch.testing.assert_close(packed_grad, grad, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("variant", ["default", "alibi"])
def test_packed_rows_of_a_batch(variant):
    model = tiny_leap(**VARIANTS[variant])
    ids = random_ids(2, 40)
    positions = torch.stack((torch.arange(40), torch.cat((torch.arange(25), torch.arange(15)))))
    with torch.no_grad():
        logits = model(ids, position_ids=positions).logits
        torch.testing.assert_close(logits[:1], model(ids[:1]).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1:, 25:], model(ids[1:, 25:]).logits, rtol=1e-4, atol=1e-4)


def test_the_last_packed_sequence_goes_on_from_the_cache():
    model = tiny_leap()
    ids = random_ids(1, 60)
    with torch.no_grad():
        cache = model(ids[:, :50], seq_idx=(torch.arange(50) >= 20).long()[None], use_cache=True).past_key_values
        positions = torch.arange(30, 40)[None]
        logits = model(ids[:, 50:], past_key_values=cache, position_ids=positions).logits
        torch.testing.assert_close(logits, model(ids[:, 20:]).logits[:, 30:], rtol=1e-4, atol=1e-4)


# --- causality ---------------------------------------------------------------------------------------------------------


def reach(model, place, seq=70, **kwargs):
    """Per hidden state, which positions change when the token at `place` does, in bits."""
    ids = random_ids(1, seq)
    other = ids.clone()
    other[0, place] = (other[0, place] + 1) % 50
    with torch.no_grad():
        states, others = (model(x, output_hidden_states=True, **kwargs).hidden_states for x in (ids, other))
    return [(a != b).any(-1)[0] for a, b in zip(states, others)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_layer_sees_the_future(variant):
    model = tiny_leap(**VARIANTS[variant])
    windows = model.config.window_sizes
    for place in (0, 33, 69):
        changed = reach(model, place)
        assert len(changed) == len(windows) + 1
        assert changed[0].nonzero().flatten().tolist() == [place]
        for layer_changed in changed[1:]:
            assert not layer_changed[:place].any() and layer_changed[place]
        assert windows[0] == 3 or changed[1][-1]  # and the past does matter


@pytest.mark.parametrize("variant", VARIANTS)
def test_bidirectional_layers_see_both_sides(variant):
    model = tiny_leap("LeapForMaskedLM", **VARIANTS[variant])
    changed = reach(model, 33)
    first, last = changed[-1].nonzero().flatten()[[0, -1]]
    assert first == 0 and last == 69
    model = tiny_leap("LeapForMaskedLM", **{**VARIANTS[variant], "window_sizes": [5, 1, 1, 1]})
    poolings = 2 if model.config.mixer == "additive" else 1
    assert reach(model, 33)[-1].nonzero().flatten().tolist() == list(range(33 - 4 * poolings, 34 + 4 * poolings))


def test_windows_reach_exactly_as_far_as_they_say():
    model = tiny_leap(window_sizes=[5, 1, 3, 1])
    changed = reach(model, 20)
    for states, last in zip(changed, (20, 24, 24, 26, 26)):
        assert states.nonzero().flatten().tolist() == list(range(20, last + 1))


def test_is_causal_can_be_given_to_a_base_model():
    model = tiny_leap("LeapModel")
    ids = random_ids(1, 20)
    masked = LeapForMaskedLM(tiny_config()).eval()
    masked.model.load_state_dict(model.state_dict())
    with torch.no_grad():
        states = model(ids, is_causal=False)
        assert states.past_key_values is None
        assert torch.equal(states.last_hidden_state, masked.model(ids).last_hidden_state)
        assert not torch.equal(states.last_hidden_state, model(ids).last_hidden_state)


# --- attentions --------------------------------------------------------------------------------------------------------


class Recorder:
    """Keeps what went into and came out of every mixer."""

    def __init__(self, model):
        self.inputs, self.outputs = [], []
        for layer in model.model.layers:
            layer.mixer.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs, output):
        self.inputs.append(args[0].detach())
        self.outputs.append(output[0].detach())


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("situation", ["padded", "torn", "packed"])
@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rebuilt_attention_times_values_is_the_mixers_output(variant, head, situation):
    model = tiny_leap(head, **VARIANTS[variant]).double()
    config, batch, seq = model.config, 2, 70
    ids, mask, segments = random_ids(batch, seq), torch.ones(batch, seq, dtype=torch.bool), None
    kwargs = {}
    if situation != "packed":
        mask[0, :40] = False
        mask[1, 60:] = False
        if situation == "torn":
            mask[0, 50:53], mask[1, 5:25] = False, False
        kwargs = {"attention_mask": mask.long()}
    else:
        segments = (torch.arange(seq) // 25).expand(batch, seq)
        kwargs = {"seq_idx": segments}
    with torch.no_grad():
        plain = model(ids, **kwargs).logits
        recorder = Recorder(model)
        outputs = model(ids, output_attentions=True, **kwargs)
    torch.testing.assert_close(outputs.logits[mask], plain[mask], rtol=1e-9, atol=1e-9)
    assert len(outputs.attentions) == config.num_hidden_layers

    def by_head(x):
        x = x.view(batch, seq, -1, config.num_attention_heads, config.head_dim).unbind(2)
        return [part.transpose(1, 2) for part in x]  # [batch, heads, seq, head_dim]

    for i, attentions in enumerate(outputs.attentions):
        mixer, x, out = model.model.layers[i].mixer, recorder.inputs[i], recorder.outputs[i]
        assert attentions.shape == (batch, config.num_attention_heads, seq, 2)
        matrix = mixer.attention_matrix(attentions, is_causal=config.is_causal, segment_ids=segments)
        chosen = torch.tensor([6, 2])
        rows = mixer.attention_matrix(attentions, config.is_causal, segments, positions=chosen)
        torch.testing.assert_close(rows, matrix[..., chosen, :], rtol=0, atol=1e-7)
        norm = standardized if config.rescale is not None else (lambda values: values)
        if config.mixer == "focus":
            rebuilt = matrix @ norm(by_head(mixer.qfkv_proj(x))[-1])
            weights = attentions[..., 0]
        else:
            q, k, v = by_head(mixer.qkv_proj(x))
            pooled_q = matrix[:, :, 0] @ norm(q).masked_fill(~mask[:, None, :, None], 0)
            pooled_k = matrix[:, :, 1] @ norm(pooled_q * k).masked_fill(~mask[:, None, :, None], 0)
            rebuilt = pooled_k * v
            weights = attentions
        rebuilt = rebuilt.transpose(1, 2).flatten(2)
        torch.testing.assert_close(rebuilt[mask], out[mask], rtol=1e-9, atol=1e-9)
        assert (weights.transpose(1, 2)[~mask] == -math.inf).all() and weights.transpose(1, 2)[mask].isfinite().all()


def test_attentions_are_float32_and_from_every_layer():
    model = tiny_leap().bfloat16()
    attentions = model(random_ids(1, 9), output_attentions=True).attentions
    assert [a.dtype for a in attentions] == [torch.float32] * 4
    assert model(random_ids(1, 9)).attentions is None


# --- training ----------------------------------------------------------------------------------------------------------


def loss_grads(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("head", ["LeapForCausalLM", "LeapForMaskedLM"])
def test_gradient_accumulation_equals_one_batch(head):
    model = tiny_leap(head).double()
    ids = random_ids(8, 20)
    labels = ids.clone()
    for row in range(8):
        labels[row, : 2 * row] = -100  # rows count differently
    counted = labels[:, 1:] if head == "LeapForCausalLM" else labels
    num_items = (counted != -100).sum()
    whole, whole_grads = loss_grads(model, input_ids=ids, labels=labels, num_items_in_batch=num_items)
    model.zero_grad()
    total = 0
    for i in range(8):
        loss = model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole)
    for parameter, grad in zip(model.parameters(), whole_grads):
        torch.testing.assert_close(parameter.grad, grad)
    torch.testing.assert_close(whole, model(ids, labels=labels).loss.detach())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", ["default", "alibi", "additive"])
def test_gradient_checkpointing_equals_plain(variant, use_reentrant):
    model = tiny_leap(**VARIANTS[variant]).train()
    ids = random_ids(2, 40)
    plain_loss, plain = loss_grads(model, input_ids=ids, labels=ids)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    loss, grads = loss_grads(model, input_ids=ids, labels=ids)
    assert torch.equal(loss, plain_loss)
    for grad, expected in zip(grads, plain):
        torch.testing.assert_close(grad, expected)


def test_losses():
    ids = random_ids(2, 12)
    model = tiny_leap()
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(
        outputs.loss, nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    torch.testing.assert_close(outputs.loss, ForCausalLMLoss(outputs.logits, ids, vocab_size=50))
    masked = tiny_leap("LeapForMaskedLM")
    labels = ids.clone()
    labels[:, ::2] = -100
    outputs = masked(ids, labels=labels)
    torch.testing.assert_close(
        outputs.loss, nn.functional.cross_entropy(outputs.logits[:, 1::2].flatten(0, 1), ids[:, 1::2].flatten())
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_autocast_trains(variant):
    model = tiny_leap(initializer_range=0.05, **VARIANTS[variant]).train()
    ids = random_ids(2, 40)
    plain, plain_grads = loss_grads(model, input_ids=ids, labels=ids)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss.detach() - plain) < 0.02 * plain.abs()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32
    together = [
        torch.cat([x.flatten() for x in grads]) for grads in ([p.grad for p in model.parameters()], plain_grads)
    ]
    # A gelu gate amplifies: rounding the weights alone, in float32, turns its gradient as far.
    least = 0.8 if model.config.output_gate == "gelu" else 0.98
    assert nn.functional.cosine_similarity(*together, dim=0) > least


@pytest.mark.parametrize("variant", ["default", "additive"])
def test_dropout_is_on_in_training_only(variant):
    model = tiny_leap(attention_dropout=0.3, hidden_dropout=0.3, **VARIANTS[variant])
    quiet = tiny_leap(**VARIANTS[variant])
    ids = random_ids(1, 30)
    assert torch.equal(model(ids).logits, quiet(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.config.hidden_dropout = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not torch.equal(model(ids).logits, model(ids).logits)  # that of the mixers alone
    torch.manual_seed(0)
    mean = torch.stack([model.model.layers[0].mixer._dropout(torch.ones(1000)) for _ in range(20)]).mean()
    assert abs(mean - 1) < 0.05


@pytest.mark.parametrize("variant", ["default", "alibi", "additive"])
def test_dropout_is_where_it_belongs(variant, monkeypatch):
    """What is dropped, in order, and at which rate; with nothing dropped the logits are those of evaluation."""
    model = tiny_leap(attention_dropout=0.2, hidden_dropout=0.3, num_hidden_layers=1, **_one_layer(variant))
    ids, dropped, from_mlp = random_ids(1, 9), [], []
    expected = model(ids).logits

    def record(x, p=0.5, training=True, inplace=False):
        if training:
            dropped.append((tuple(x.shape), p))
            from_mlp.append(any(x is output for output in outputs))
        return x

    outputs = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    monkeypatch.setattr(nn.functional, "dropout", record)
    torch.testing.assert_close(model.train()(ids).logits, expected)

    whole, heads, logits = ((1, 9, 32), 0.3), ((1, 9, 4, 8), 0.2), ((1, 9, 4), 0.2)
    mixing = {"default": [heads, heads, logits, heads], "alibi": [heads, heads, logits], "additive": [heads, heads]}
    assert dropped == [whole, *mixing[variant], whole]
    assert from_mlp == [False] * (len(dropped) - 1) + [True]
    dropped.clear()
    model.eval()(ids)
    assert not dropped


def _one_layer(variant):
    return {**VARIANTS[variant], "window_sizes": [4]}


@pytest.mark.parametrize("variant", ["default", "additive"])
def test_norms_have_the_epsilon_of_the_config(variant):
    model = tiny_leap(layer_norm_eps=0.3, **VARIANTS[variant])
    epsilons = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert epsilons == [0.3] * (2 * 4 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_forward_equals_eager(variant):
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    model = tiny_leap(**VARIANTS[variant])
    ids = random_ids(2, 100)
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, fullgraph=True)(ids).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_training_step_equals_eager():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    model = tiny_leap().train()
    ids = random_ids(2, 100)
    loss, grads = loss_grads(model, input_ids=ids, labels=ids)
    compiled_loss, compiled = loss_grads(torch.compile(model), input_ids=ids, labels=ids)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-4)
    for grad, expected in zip(compiled, grads):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_models_of_two_scales_are_compiled_in_one_process():
    """The second makes an open number of the scale, of which a graph cannot ask whether it is finite."""
    ids = random_ids(2, 12)
    for more in ({}, {"mixer": "additive", "position_embedding_type": "alibi", "sink_weight": 0.1, "rescale": None}):
        model = tiny_leap(num_hidden_layers=1, **more)
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# --- torch.func ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["default", "alibi-null", "additive", "absolute"])
def test_gradients_of_each_row(variant):
    """As the tutorial of `torch.func` makes them, by `grad` and `vmap`: the mixing is plain operations there."""
    model, ids = tiny_leap(**VARIANTS[variant]), random_ids(3, 20)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, row):
        return torch.func.functional_call(model, weights, (row[None],), {"labels": row[None]}).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    for row in range(3):
        model.zero_grad()
        model(ids[row : row + 1], labels=ids[row : row + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        torch.func.grad(lambda x: model(inputs_embeds=x, use_cache=True).logits.sum())(torch.randn(1, 4, 32))


# --- heads and inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_reads_the_last_real_token(side):
    model = tiny_leap("LeapForSequenceClassification", num_labels=3, pad_token_id=0)
    rows = [random_ids(1, n, seed=n)[0].clamp_min(1) for n in (1, 5, 12)]
    ids, mask = pad(rows, side, width=14)
    with torch.no_grad():
        expected = torch.cat([model(row[None]).logits for row in rows])
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)
        if side == "right":  # without a mask, by the pad token
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        embeds = model.get_input_embeddings()(ids)
        by_embeds = model(inputs_embeds=embeds, attention_mask=mask).logits
        torch.testing.assert_close(by_embeds, expected, rtol=1e-4, atol=1e-4)


def test_classification_asks_which_embeddings_are_pads():
    """GPT-2 takes the last place of every row, with a warning."""
    model = tiny_leap("LeapForSequenceClassification", num_labels=3, pad_token_id=0)
    embeds = model.get_input_embeddings()(random_ids(2, 6))
    with pytest.raises(ValueError, match="need an `attention_mask`, or `input_ids` and a `config.pad_token_id`"):
        model(inputs_embeds=embeds)
    alone, mask = model(inputs_embeds=embeds[:1]).logits, torch.ones(2, 6)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits[:1], alone)


def test_classification_takes_a_mask_by_layer_type():
    model, ids = tiny_leap("LeapForSequenceClassification", num_labels=3), random_ids(4, 6)
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    by_dict = model(ids, attention_mask={"linear_attention": mask}).logits
    assert torch.equal(by_dict, model(ids, attention_mask=mask).logits)
    torch.testing.assert_close(by_dict, model(ids[:, :4], attention_mask=mask[:, :4]).logits)


def test_classification_losses():
    rows, mask = random_ids(3, 6), torch.ones(3, 6, dtype=torch.long)
    model = tiny_leap("LeapForSequenceClassification", num_labels=3)
    outputs = model(rows, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 2, 1])))
    with pytest.raises(ValueError, match="pad_token_id"):
        model(rows)
    assert model(rows[:1]).logits.shape == (1, 3)
    regression = tiny_leap("LeapForSequenceClassification", num_labels=1)
    outputs = regression(rows, attention_mask=mask, labels=torch.tensor([0.5, 2.0, 1.0]))
    expected = nn.functional.mse_loss(outputs.logits[:, 0], torch.tensor([0.5, 2.0, 1.0]))
    torch.testing.assert_close(outputs.loss, expected)


def test_logits_to_keep_and_inputs_embeds():
    model, ids = tiny_leap(), random_ids(2, 10)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, logits)
        assert torch.equal(model(ids.int()).logits, logits)
        assert torch.equal(model(ids, position_ids=torch.arange(10)[None]).logits, logits)


def test_a_masked_lm_changes_its_own_copy_of_the_config():
    config = tiny_config()
    model = LeapForMaskedLM(config)
    assert config.is_causal and not model.config.is_causal and not model.model.config.is_causal
    with pytest.raises(ValueError, match="is_causal"):
        LeapForCausalLM(model.config)


def test_a_masked_lm_of_a_causal_checkpoint_warns(monkeypatch, tmp_path):
    warnings = []
    monkeypatch.setattr(modeling_leap.logger, "warning_once", warnings.append)
    LeapForMaskedLM(tiny_config()).save_pretrained(tmp_path / "masked")
    LeapForMaskedLM.from_pretrained(tmp_path / "masked")
    assert not any("both directions" in warning for warning in warnings)
    LeapForCausalLM(tiny_config()).save_pretrained(tmp_path / "causal")
    LeapForMaskedLM.from_pretrained(tmp_path / "causal")
    assert sum("both directions" in warning for warning in warnings) == 1


def test_tied_weights_are_one_tensor():
    for head in ("LeapForCausalLM", "LeapForMaskedLM"):
        model = tiny_leap(head, tie_word_embeddings=True)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert tiny_leap(head).lm_head.weight is not tiny_leap(head).get_input_embeddings().weight


def test_initial_weights_have_the_configured_size():
    model = LeapForCausalLM(tiny_config(hidden_size=64, initializer_range=None, mixer="additive"))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert abs(parameter.std() - 64**-0.5) < 0.2 * 64**-0.5, name
        else:
            assert torch.equal(
                parameter, torch.full_like(parameter, float("norm.weight" in name or "layernorm.weight" in name))
            ), name


def test_loading_does_not_change_weights_or_slopes(tmp_path):
    model = tiny_leap(position_embedding_type="alibi")
    model.save_pretrained(tmp_path)
    loaded = LeapForCausalLM.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a, b), name
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8])
    for layer in loaded.model.layers:
        assert torch.equal(layer.mixer.alibi_slopes, slopes)
    assert torch.equal(loaded(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


# --- bad input ---------------------------------------------------------------------------------------------------------

EMBEDS = torch.zeros(1, 4, 32)
IDS = torch.zeros(1, 4, dtype=torch.long)

BAD_INPUTS = {
    "float ids": ({"input_ids": IDS.float()}, TypeError, "input_ids"),
    "bool ids": ({"input_ids": IDS.bool()}, TypeError, "input_ids"),
    "ids without batch": ({"input_ids": IDS[0]}, ValueError, "input_ids"),
    "no ids": ({"input_ids": IDS[:, :0]}, ValueError, "input_ids"),
    "ids beyond the vocabulary": ({"input_ids": IDS + 50}, ValueError, "input_ids.*50"),
    "negative ids": ({"input_ids": IDS - 1}, ValueError, "input_ids"),
    "neither": ({}, ValueError, "input_ids.*inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, ValueError, "input_ids.*inputs_embeds"),
    "empty embeds": ({"inputs_embeds": EMBEDS[:, :0]}, ValueError, "inputs_embeds"),
    "flat embeds": ({"inputs_embeds": EMBEDS[0]}, ValueError, "inputs_embeds"),
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
    "2D cu_seq_lens_q": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([[0, 4]])}, ValueError, "cu_seq_lens_q"),
    "short position_ids": ({"input_ids": IDS, "position_ids": IDS[:, :3]}, ValueError, "position_ids"),
    "embeds of another dtype": ({"inputs_embeds": EMBEDS.long()}, (TypeError, ValueError), "inputs_embeds"),
    "embeds of another width": ({"inputs_embeds": EMBEDS[..., :31]}, ValueError, "inputs_embeds"),
}


@pytest.mark.parametrize("head", ["LeapModel", "LeapForCausalLM", "LeapForMaskedLM", "LeapForSequenceClassification"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gives_an_error_that_names_it(head, case):
    inputs, error, match = BAD_INPUTS[case]
    with pytest.raises(error, match=match):
        tiny_leap(head)(**inputs)


def test_hidden_states_are_what_layers_give_to_each_other():
    model, given = tiny_leap().model, []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == len(given) + 1 and all(map(torch.equal, states, given))


def test_bidirectional_models_have_no_cache():
    model = tiny_leap("LeapForMaskedLM")
    with pytest.raises(ValueError, match=f"`{CACHE}` was given, but a bidirectional model has no past"):
        model.model(IDS, past_key_values=RecurrentCache(model.config))
    assert model.model(IDS, use_cache=True).past_key_values is None


def test_learned_positions_end_where_they_end():
    model = tiny_leap(position_embedding_type="absolute", max_position_embeddings=8)
    assert model(random_ids(1, 8)).logits.isfinite().all()
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(random_ids(1, 9))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(random_ids(1, 2), position_ids=torch.tensor([[7, 8]]))
    padded = torch.ones(1, 12, dtype=torch.long)
    padded[:, :4] = 0
    assert model(random_ids(1, 12), attention_mask=padded).logits.isfinite().all()  # eight real tokens
    for kind in ("rotary", "alibi", "none"):
        longer = tiny_leap(position_embedding_type=kind, max_position_embeddings=8)
        assert longer(random_ids(1, 100)).logits.isfinite().all()


def test_public_classes_are_what_they_say():
    for cls in (LeapModel, LeapForCausalLM, LeapForMaskedLM, LeapForSequenceClassification):
        assert cls.config_class.model_type == "leap" and cls.__doc__
