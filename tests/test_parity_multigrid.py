"""MultiGrid equals an oracle in plain loops, and without axes transformers' GPT-2: logits, losses and gradients."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.reference.gpt2 import from_gpt2
from tests.reference.multigrid import GridDescription, multigrid_logits, multigrid_losses
from tests.tiny import mostly_slow
from tests.tiny_multigrid import VARIANTS, random_grid, random_ids, tiny_multigrid


SEQ = 11
# A plain decoder of the transformer core is held against transformers' own below.
WITH_ORACLE = [name for name in VARIANTS if name != "plain"]


def describe(config):
    """What the oracle needs to know, read from the configuration."""
    return GridDescription(
        axes=config.num_axes,
        heads=config.num_attention_heads,
        axis_heads=config.axis_num_attention_heads,
        layers=config.num_hidden_layers,
        core=config.core,
        factored=config.axis_order == "factored",
        axis_weights=list(config.axis_shares),
        main_loss_weight=config.main_loss_weight,
        windows=config.window_sizes,
        cross_feed_forward=config.cross_feed_forward,
        layer_norm_eps=config.layer_norm_eps,
    )


def rows_of(batch):
    return zip(batch["input_ids"].tolist(), batch["axis_ids"].tolist())


@pytest.mark.parametrize("variant", WITH_ORACLE)
def test_logits_of_every_axis_equal_the_oracles(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    batch, d = random_grid(model, 2, SEQ), describe(model.config)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    with torch.no_grad():
        out = model(**batch)
    for row, (ids, axis_ids) in enumerate(rows_of(batch)):
        expected, expected_meta = multigrid_logits(weights, ids, axis_ids, d)
        assert expected.std() > 0.1
        torch.testing.assert_close(out.logits[row], expected.float(), rtol=0, atol=1e-5)
        found = [logits[row] for logits in out.axis_logits or ()]
        torch.testing.assert_close(found, [x.float() for x in expected_meta], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", [name for name in WITH_ORACLE if "factored" in name])
def test_the_last_token_given_the_meta_tokens_after_it(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    batch, d = random_grid(model, 2, SEQ), describe(model.config)
    given = random_grid(model, 2, 1, seed=7)["axis_ids"][..., 0]
    with torch.no_grad():
        logits = model(**batch, next_axis_ids=given).logits
        without = model(**batch).logits
    assert torch.equal(logits[:, :-1], without[:, :-1]) and not torch.allclose(logits[:, -1], without[:, -1])
    for row, (ids, axis_ids) in enumerate(rows_of(batch)):
        expected, _ = multigrid_logits(model.state_dict(), ids, axis_ids, d, given[row].tolist())
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", mostly_slow(WITH_ORACLE, ("axes", "light", "factored", "leap-factored", "lstm")))
def test_losses_and_gradients_equal_the_oracles(variant):
    model = tiny_multigrid(**VARIANTS[variant], main_loss_weight=0.3).double()
    batch, d = random_grid(model, 1, SEQ), describe(model.config)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    loss, main, metas = multigrid_losses(weights, *next(rows_of(batch)), d)
    out = model(**batch, labels=batch["input_ids"])
    for found, expected in zip((out.loss, out.main_loss, *(out.axis_losses or ())), (loss, main, *metas), strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)  # losses are float32
    loss.backward()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        assert expected.any(), name
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- GPT-2 -------------------------------------------------------------------------------------------------------------


def gpt2_and_ours(tied):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, tie_word_embeddings=tied
    )
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") or "ln" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ours = tiny_multigrid(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    ours.load_state_dict(from_gpt2(theirs.state_dict()))
    return theirs, ours


@pytest.mark.parametrize("tied", [False, True])
def test_without_axes_it_is_gpt2(tied):
    theirs, ours = gpt2_and_ours(tied)
    ids, mask = random_ids(2, 40), torch.ones(2, 40).long()
    mask[1, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for length in (1, 2, 17, 40):
            expected = theirs(ids[:, :length]).logits
            torch.testing.assert_close(ours(ids[:, :length]).logits, expected, rtol=0, atol=1e-5)
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        found = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_without_axes_it_learns_as_gpt2_does(tied):
    theirs, ours = gpt2_and_ours(tied)
    theirs, ours, ids = theirs.double(), ours.double(), random_ids(2, 20)
    losses = [model(ids, labels=ids).loss for model in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-10)
    for loss in losses:
        loss.backward()
    expected = from_gpt2({name: parameter.grad for name, parameter in theirs.named_parameters()})
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


def test_without_axes_it_generates_what_gpt2_does():
    theirs, ours = gpt2_and_ours(True)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 50}
    for beams in (1, 3):
        expected = theirs.generate(random_ids(2, 9), num_beams=beams, **how)
        assert torch.equal(ours.generate(random_ids(2, 9), num_beams=beams, **how), expected)
