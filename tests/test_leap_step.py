"""A token through all layers in one call of C: against the layers in float64, with everything that must be left to the layers."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from modeling_heptapod.common import plain_modules, step_program
from modeling_heptapod.common.step_program import load_steps
from modeling_heptapod.leap import leap_step, modeling_leap
from modeling_heptapod.leap.focus_cpu import _library as focus_library
from tests.leap_steps import watch_steps
from tests.tiny_leap import VARIANTS, random_ids, tiny_leap


FOCUS_VARIANTS = {name: options for name, options in VARIANTS.items() if not name.startswith("additive")}
FOCUS_VARIANTS["alibi"] = {**VARIANTS["alibi"], "window_sizes": [None, 64, 5, None]}  # the widest that C has
TOKENS = 12
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def compiled():
    if load_steps() is None or focus_library(8) is None:
        pytest.skip("there is no C compiler")


@pytest.fixture
def taken(monkeypatch):
    """For each single token of a forward pass, whether it went through C."""
    return watch_steps(monkeypatch)


@torch.no_grad()
def decode(model, ids, past=8, cache=None, **kwargs):
    """Logits of single tokens after `past` ones."""
    if cache is None:
        cache = model(ids[:, :past], use_cache=True).past_key_values
    steps = [
        model(ids[:, t : t + 1], past_key_values=cache, use_cache=True, **kwargs).logits
        for t in range(past, ids.shape[1])
    ]
    return torch.cat(steps, dim=1)


def exact(model, ids, past=8):
    """Logits of the parallel forward pass in float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(ids).logits[:, past:]


@pytest.mark.parametrize("batch", [slow(1), 3, slow(8)])
@pytest.mark.parametrize("variant", FOCUS_VARIANTS)
def test_float32(variant, batch, taken):
    model, ids = tiny_leap(**FOCUS_VARIANTS[variant]), random_ids(batch, 8 + TOKENS)
    logits = decode(model, ids)
    assert taken == [True] * TOKENS
    torch.testing.assert_close(logits.double(), exact(model, ids), rtol=0, atol=6e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("sizes", [(32, 128), (48, 50), (40, 3), (8, 1)])
def test_activations_and_widths(activation, sizes, taken):
    width, inner = sizes
    model = tiny_leap(hidden_act=activation, hidden_size=width, intermediate_size=inner)
    ids = random_ids(2, 8 + TOKENS)
    logits = decode(model, ids)
    assert all(taken)
    torch.testing.assert_close(logits.double(), exact(model, ids), rtol=0, atol=6e-5)


@torch.no_grad()
def only_mlp(hidden, biases, activation):
    """What one layer adds to `hidden` where its weights are 0 but for a unit matrix: activations of the biases `[steps, width]`."""
    width = biases.shape[1]
    model = tiny_leap(
        num_hidden_layers=1, window_sizes=[None], hidden_size=width, intermediate_size=width, hidden_act=activation
    ).to(hidden.dtype)
    layer = model.model.layers[0]
    for parameter in layer.parameters():
        parameter.zero_()
    layer.mlp.down_proj.weight.copy_(torch.eye(width))
    cache = model(torch.zeros(1, 3, dtype=torch.int64), use_cache=True).past_key_values
    rotary = model.model.rotary_emb(hidden.float(), torch.tensor([[3]]))
    results = []
    for bias in biases:
        layer.mlp.up_proj.bias.copy_(bias)
        results.append(leap_step.step_layers(model.model.layers, hidden, rotary, cache).flatten())
    return torch.stack(results)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_activations_of_all_sizes(activation):
    biases = torch.cat(
        (torch.linspace(-9, 9, 64 * 62), torch.tensor([0.0, 20, -20, 100, -100, 1e30, -1e30, 1e-30] * 16))
    )
    biases = biases.view(64, 64)
    exact = ACT2FN[activation](biases.double())
    error = (only_mlp(torch.zeros(1, 1, 64), biases, activation) - exact).abs()
    assert (error <= 4e-7 * (1 + biases.abs())).all()


def test_bf16_is_rounded_to_nearest():
    hidden, biases = torch.randn(1, 1, 64).bfloat16(), torch.randn(20, 64).bfloat16()
    expected = (hidden.flatten().float() + biases.float().relu()).bfloat16()
    assert torch.equal(only_mlp(hidden, biases, "relu"), expected)


def test_a_mixing_step_that_fails_is_told(monkeypatch):
    model, ids = tiny_leap(), random_ids(1, 9)
    decode(model, ids)
    make = leap_step._make_plan

    def spoil(*arguments):
        plan = copy.copy(make(*arguments))
        plan = plan._replace(mixing=type(plan.mixing).from_buffer_copy(plan.mixing))
        plan.mixing[2].heads = 0
        return plan

    monkeypatch.setattr(leap_step, "_make_plan", spoil)
    with pytest.raises(ValueError, match="The C source lacks the options or the sizes of this decoding step"):
        decode(model, ids)


def test_batches_of_several_sizes(taken):
    model = tiny_leap()
    for batch in (1, 3, 2, 1):
        ids = random_ids(batch, 8 + TOKENS)
        torch.testing.assert_close(decode(model, ids).double(), exact(model, ids), rtol=0, atol=6e-5)
    assert all(taken)


@pytest.mark.parametrize("batch", [1, 3])
def test_bf16_is_closer_to_the_exact_result_than_the_layers(batch, taken, monkeypatch):
    model, ids = tiny_leap(num_hidden_layers=6).bfloat16(), random_ids(batch, 8 + 40)
    logits = decode(model, ids)
    assert all(taken) and logits.dtype == torch.bfloat16
    monkeypatch.setattr(leap_step, "MOST_ROWS", 0)
    by_layers = decode(model, ids)
    assert not any(taken[40:])
    errors = [(x.double() - exact(model, ids)).square().mean().sqrt() for x in (logits, by_layers)]
    assert errors[0] < errors[1] < 0.05 * exact(model, ids).std()


@pytest.mark.parametrize("variant", ["default", "plain-scale"])
def test_threads_change_nothing(variant, taken, monkeypatch):
    monkeypatch.setattr(step_program, "_PARALLEL", 0)
    model, ids = tiny_leap(**VARIANTS[variant], intermediate_size=50), random_ids(3, 8 + TOKENS)
    results, before = [], torch.get_num_threads()
    with torch.no_grad():
        start = model(ids[:, :8], use_cache=True).past_key_values
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(decode(model, ids, cache=copy.deepcopy(start)))
    finally:
        torch.set_num_threads(before)
    assert all(taken)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_generate_writes_the_same(taken, monkeypatch):
    model, ids = tiny_leap(), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, **kwargs), model.generate(ids, num_beams=3, **kwargs)
    assert any(taken)
    monkeypatch.setattr(leap_step, "MOST_ROWS", 0)
    assert torch.equal(written[0], model.generate(ids, **kwargs))
    assert torch.equal(written[1], model.generate(ids, num_beams=3, **kwargs))


def test_static_caches_step_in_eager_mode(taken):
    model, ids = tiny_leap(), random_ids(2, 8 + TOKENS)
    cache = modeling_leap.StaticRecurrentCache(model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
    logits = decode(model, ids, cache=cache)
    assert all(taken)
    torch.testing.assert_close(logits.double(), exact(model, ids), rtol=0, atol=6e-5)


def test_weights_that_change_in_place_or_are_replaced_are_read(taken):
    model, ids = tiny_leap(), random_ids(1, 8 + TOKENS)
    for change in ("none", "in place", "data", "parameter", "module", "eps", "settings"):
        layer = model.model.layers[2]
        with torch.no_grad():
            if change == "in place":
                layer.mlp.up_proj.weight.mul_(1.5)
            elif change == "data":
                layer.mlp.down_proj.weight.data = torch.randn_like(layer.mlp.down_proj.weight)
            elif change == "parameter":
                layer.mixer.qfkv_proj.weight = torch.nn.Parameter(torch.randn_like(layer.mixer.qfkv_proj.weight))
            elif change == "module":
                layer.mlp.up_proj = copy.deepcopy(model.model.layers[0].mlp.up_proj)
            elif change == "eps":
                for each in model.model.layers:
                    each.input_layernorm.eps = 0.5
                    each.post_attention_layernorm.eps = 0.5
            elif change == "settings":
                for each in model.model.layers:
                    each.mixer.settings = replace(each.mixer.settings, scale=2 * each.mixer.settings.scale)
        logits = decode(model, ids)
        torch.testing.assert_close(logits.double(), exact(model, ids), rtol=0, atol=5e-5, msg=change)
    assert all(taken)


def test_a_transposed_weight_is_left_to_the_layers(taken):
    model, ids = tiny_leap(intermediate_size=32), random_ids(1, 8 + TOKENS)
    decode(model, ids)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.t()  # the same memory, in another order
    logits = decode(model, ids)
    assert taken == [True] * TOKENS + [False] * TOKENS
    torch.testing.assert_close(logits.double(), exact(model, ids), rtol=0, atol=6e-5)


class Louder(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_before(model):
    model.model.layers[1].mixer.qfkv_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def wrapped(model):
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)


def subclassed(model):
    model.model.layers[0].mlp.down_proj.__class__ = Louder


def parametrized(model):
    norm = torch.nn.utils.parametrizations.weight_norm(model.model.layers[3].mlp.up_proj)
    with torch.no_grad():
        norm.parametrizations.weight.original0.mul_(2)


def without_bias(model):
    model.model.layers[0].mlp.up_proj.bias = None


def with_bias(model):
    model.model.layers[0].mixer.qfkv_proj.bias = torch.nn.Parameter(torch.ones(4 * 32))


def swapped(model):
    layer = model.model.layers[1]
    layer.post_attention_layernorm = torch.nn.Linear(32, 32).eval()


def without_mlp(model):
    model.model.layers[0].mlp = torch.nn.Linear(32, 32).eval()


def in_training(model):
    model.model.layers[0].mlp.train()


def other_activation(model):
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh().eval()


def mixed_activations(model):
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU().eval()


def mixed_epsilons(model):
    model.model.layers[1].input_layernorm.eps = 0.5


def mixed_settings(model):
    mixer = model.model.layers[1].mixer
    mixer.settings = replace(mixer.settings, scale=2 * mixer.settings.scale)


def patched(model):
    forward = modeling_leap.LeapMLP.forward
    modeling_leap.LeapMLP.forward = lambda self, x: 2 * forward(self, x)


def patched_torch(model):
    forward = torch.nn.Linear.forward
    torch.nn.Linear.forward = lambda self, x: 2 * forward(self, x)


CHANGES = [hooked, hooked_before, wrapped, subclassed, parametrized, without_bias, with_bias, in_training]
CHANGES += [other_activation, mixed_activations, mixed_epsilons, mixed_settings, patched, patched_torch]
CHANGES += [without_mlp, swapped]


@pytest.mark.parametrize("after_a_step", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_called(change, after_a_step, taken, monkeypatch):
    for kind in (modeling_leap.LeapMLP, torch.nn.Linear):
        monkeypatch.setattr(kind, "forward", kind.forward)  # puts back what a change replaces
    model, ids = tiny_leap(hidden_dropout=0.0), random_ids(1, 8 + TOKENS)
    if after_a_step:
        decode(model, ids)
        assert all(taken)
        taken.clear()
    change(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(decode(model, ids), expected, rtol=0, atol=6e-5)
    assert taken == [False] * TOKENS


def test_lora_is_heard(taken):
    peft = pytest.importorskip("peft")
    model, ids = tiny_leap(), random_ids(1, 8 + TOKENS)
    decode(model, ids)
    config = peft.LoraConfig(target_modules=["qfkv_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids, use_cache=False).logits[:, 8:]
    taken.clear()
    torch.testing.assert_close(decode(adapted, ids), expected, rtol=0, atol=6e-5)
    assert not any(taken)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(decode(merged, ids), expected, rtol=0, atol=6e-5)
    assert all(taken[TOKENS:])


def test_what_watches_operations_sees_them(taken):
    model, ids = tiny_leap(), random_ids(1, 8 + TOKENS)
    cache = modeling_leap.RecurrentCache(model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
    with FlopCounterMode(display=False) as counter:
        decode(model, ids, cache=cache)
    products = sum(x.numel() for name, x in model.named_parameters() if "proj.weight" in name or "lm_head" in name)
    assert counter.get_total_flops() == 2 * TOKENS * products and not any(taken)
    with torch.autocast("cpu", torch.bfloat16):
        decode(model, ids)
    assert not any(taken)


def test_outputs_of_layers_are_there(taken):
    model, ids = tiny_leap(), random_ids(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        hidden = model(ids[:, 8:], past_key_values=copy.deepcopy(cache), output_hidden_states=True).hidden_states
        attentions = model(ids[:, 8:], past_key_values=copy.deepcopy(cache), output_attentions=True).attentions
        assert len(hidden) == 5 and len(attentions) == 4 and not any(taken)
        model(ids[:, 8:], past_key_values=cache)
    assert taken == [False, False, True]  # the hooks for these outputs stay


def test_embeddings_that_are_given_stay_as_they_are(taken):
    model, embeds = tiny_leap(), torch.randn(2, 9, 32)
    with torch.no_grad():
        cache = model(inputs_embeds=embeds[:, :8], use_cache=True).past_key_values
        token = embeds[:, 8:].clone()
        model(inputs_embeds=token, past_key_values=cache)
    assert all(taken) and torch.equal(token, embeds[:, 8:])


@torch.no_grad()
def test_positions_of_each_row_and_positions_of_all(taken):
    model, ids = tiny_leap(), random_ids(2, 9)
    for starts in ([[0]], [[0], [3]], [[5]]):
        positions = torch.arange(9) + torch.tensor(starts)
        cache = model(ids[:, :8], position_ids=positions[:, :8], use_cache=True).past_key_values
        logits = model(ids[:, 8:], past_key_values=cache, position_ids=positions[:, 8:]).logits
        expected = copy.deepcopy(model).double()(ids, position_ids=positions).logits[:, 8:]
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=6e-5)
    assert taken == [True] * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_all_modules_are_called(when, taken):
    model, ids, seen = tiny_leap(), random_ids(1, 8 + TOKENS), []
    decode(model, ids)
    register = getattr(torch.nn.modules.module, f"register_module_forward_{'pre_' if when == 'before' else ''}hook")
    handle = register(lambda module, *_: seen.append(type(module)))
    try:
        decode(model, ids)
    finally:
        handle.remove()
    assert modeling_leap.LeapMLP in seen and taken == [True] * TOKENS + [False] * TOKENS


class WatchFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


class WatchOperators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind, product", [(WatchFunctions, torch.nn.functional.linear), (WatchOperators, torch.ops.aten.mm.default)]
)
def test_modes_see_products(kind, product, taken):
    model, ids = tiny_leap(), random_ids(1, 8)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    watch = kind()
    watch.seen = set()
    with watch, torch.no_grad():
        model.model(inputs_embeds=torch.zeros(1, 1, 32), past_key_values=cache)
    assert product in watch.seen and not any(taken)


def test_the_state_is_checked(taken, monkeypatch):
    model, ids = tiny_leap(), random_ids(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        wrong = torch.zeros(1, 4, 3)
        monkeypatch.setattr(modeling_leap.LeapMixer, "packed_state", lambda mixer, cache: wrong)
        with pytest.raises(ValueError, match="`past_key_values` must be a contiguous torch.float32 of shape"):
            model(ids[:, 8:], past_key_values=cache)


def test_more_rows_are_left_to_the_layers(taken):
    model, ids = tiny_leap(), random_ids(9, 8 + TOKENS)
    torch.testing.assert_close(decode(model, ids).double(), exact(model, ids), rtol=0, atol=6e-5)
    assert not any(taken)


def test_other_dtypes_and_additive_models_are_left_to_the_layers(taken):
    ids = random_ids(1, 8 + TOKENS)
    for model, error in (
        (tiny_leap().double(), 6e-5),
        (tiny_leap().half(), 3e-2),
        (tiny_leap(mixer="additive"), 6e-5),
    ):
        torch.testing.assert_close(decode(model, ids).double(), exact(model, ids), rtol=0, atol=error)
    assert not any(taken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_what_is_not_finite_stays_so(activation, value, taken):
    model, ids = tiny_leap(hidden_act=activation), random_ids(1, 8 + TOKENS)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        model.model.layers[2].mlp.up_proj.bias[3] = value
    assert not decode(model, ids, cache=cache).isfinite().any()
    assert all(taken)


def test_models_copy_pickle_and_go(taken):
    model, ids = tiny_leap(), random_ids(1, 8 + TOKENS)
    logits, seen = decode(model, ids), len(plain_modules._seen)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for twin in twins:
            assert torch.equal(decode(twin, ids), logits)
            twin.model.layers[0].mlp.up_proj.bias.add_(1)
    assert torch.equal(decode(model, ids), logits) and all(taken)
    assert len(plain_modules._seen) == seen + 2
    del model, twins, twin
    assert len(plain_modules._seen) == seen - 1


def test_states_that_do_not_fit_are_named(taken):
    model, ids = tiny_leap(), random_ids(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        rotary = torch.ones(1, 1, 8), torch.ones(1, 1, 7)
        with pytest.raises(ValueError, match="`sin` must be a contiguous torch.float32 of shape"):
            leap_step.step_layers(model.model.layers, torch.randn(1, 1, 32), rotary, cache)
