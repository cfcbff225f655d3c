"""Axes that are added to and removed from a trained model: what was there predicts what it did, to the last bit."""

import copy

import pytest
import torch
from torch import nn

from modeling_heptapod import MultiGridForCausalLM
from tests.tiny_multigrid import SOME_FAST, TWO_AXES, VARIANTS, random_grid, tiny_multigrid


def all_logits(model, grid, **kwargs):
    with torch.no_grad():
        outputs = model(**grid, **kwargs)
    return [outputs.logits, *(outputs.axis_logits or ())]


def without(grid, axis):
    """A grid without one of its axes."""
    keep = [i for i in range(grid["axis_ids"].shape[1]) if i != axis]
    return {"input_ids": grid["input_ids"], "axis_ids": grid["axis_ids"][:, keep]}


def grow(model, size=9, **options):
    """Adds an axis; returns a grid for the model as it is now, and one for what it was."""
    model.add_axis("new", size, **options)
    grid = random_grid(model, 2, 12)
    return grid, without(grid, model.config.num_axes - 1)


def train(model, grid, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**grid, labels=grid["input_ids"]).loss.backward()
        optimizer.step()
    model.eval()


def disturb(model):
    """Weights of the last axis far from those it starts with, but for what the main stream reads of it."""
    with torch.no_grad():
        for layer in model.model.layers:
            for block in (layer.axis_self_blocks[-1], layer.axis_cross_blocks[-1]):
                for parameter in block.parameters():
                    parameter.normal_()
        model.model.axis_embed_tokens[-1].weight.normal_()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_axis_changes_no_bit(variant, trained):
    model = tiny_multigrid(**VARIANTS[variant])
    if trained:
        train(model, random_grid(model, 2, 12))
    before = copy.deepcopy(model)
    grid, old = grow(model)
    expected = all_logits(before, old)
    logits = all_logits(model, grid)
    assert len(logits) == len(expected) + 1 and logits[-1].shape == (2, 12, 9)
    assert all(torch.equal(x, y) for x, y in zip(logits, expected))
    grid["axis_ids"][:, -1] = (grid["axis_ids"][:, -1] + 1) % 9
    disturb(model)
    assert all(torch.equal(x, y) for x, y in zip(all_logits(model, grid), expected))
    cached = all_logits(model, grid, use_cache=True)
    assert all(torch.equal(x, y) for x, y in zip(cached, all_logits(before, old, use_cache=True)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_axis_just_added_is_removed_without_a_trace(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    before = copy.deepcopy(model)
    _, old = grow(model)
    model.remove_axis("new")
    assert all(torch.equal(x, y) for x, y in zip(all_logits(model, old), all_logits(before, old)))
    weights, expected = model.state_dict(), before.state_dict()
    assert list(weights) == list(expected) and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert model.config.axis_names == before.config.axis_names
    assert model.config.axis_shares == before.config.axis_shares


@pytest.mark.parametrize("variant", SOME_FAST)
def test_a_grown_model_learns_and_is_saved(variant, tmp_path):
    model = tiny_multigrid(**VARIANTS[variant])
    grid, _ = grow(model)
    before = all_logits(model, grid)
    train(model, grid)
    after = all_logits(model, grid)
    assert not any(torch.equal(x, y) for x, y in zip(before, after))
    other = {**grid, "axis_ids": grid["axis_ids"].clone()}
    other["axis_ids"][:, -1] = (other["axis_ids"][:, -1] + 1) % 9
    assert not torch.equal(all_logits(model, other)[0], after[0])  # the main axis reads the new one now
    model.save_pretrained(tmp_path)
    loaded = MultiGridForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.axis_names[-1] == "new" and loaded.config.axis_shares == model.config.axis_shares
    assert all(torch.equal(x, y) for x, y in zip(all_logits(loaded, grid), after))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_new_can_be_trained_alone(variant):
    model = tiny_multigrid(**VARIANTS[variant])
    old = {id(parameter) for parameter in model.parameters()}
    grid, _ = grow(model, freeze_rest=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) not in old), name
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, grid)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, frozen[name]) if name in frozen else parameter.grad is not None, name


def test_weights_of_axes():
    model = tiny_multigrid(**TWO_AXES)
    model.add_axis("new", 4)
    assert model.config.axis_names == ["kind", "bracket", "new"] and model.config.axis_vocab_sizes == [7, 5, 4]
    assert model.config.axis_shares == [0.5, 0.5, 1 / 3]
    model.remove_axis("kind")
    assert model.config.axis_names == ["bracket", "new"] and model.config.axis_shares == [0.5, 1 / 3]
    assert [head.out_features for head in model.axis_lm_heads] == [5, 4]
    plain = tiny_multigrid()
    plain.add_axis("new", 4)
    assert plain.config.axis_shares == [1.0]


def test_the_axis_that_is_named_is_removed():
    model = tiny_multigrid(**VARIANTS["weights"])
    grid = random_grid(model, 2, 9)
    bracket, depth = model.axis_lm_heads[1], model.model.layers[1].main_cross_blocks[2]
    model.remove_axis("kind")
    assert model.axis_lm_heads[0] is bracket and model.model.layers[1].main_cross_blocks[1] is depth
    assert model.config.axis_shares == [0.3, 0.4]
    assert [x.shape[-1] for x in all_logits(model, without(grid, 0))] == [50, 5, 3]
    for name in ("depth", "bracket"):
        model.remove_axis(name)
    assert model.config.num_axes == 0 and len(all_logits(model, without(grid, 0) | {"axis_ids": None})) == 1


def test_what_is_left_keeps_its_share():
    """Also where no weights were given, so that the others change nothing; and nothing of an axis is left at the end."""
    model = tiny_multigrid(**VARIANTS["factored"])
    model.remove_axis("bracket")
    assert model.config.axis_shares == [0.5] and model.next_axes is not None
    model.remove_axis("kind")
    assert model.next_axes is None and set(model.state_dict()) == set(tiny_multigrid().state_dict())


def test_a_grown_model_equals_one_built_with_the_axis():
    for variant in ("plain", "light", "factored", "leap"):
        grown = tiny_multigrid(**VARIANTS[variant])
        grid, _ = grow(grown)
        train(grown, grid)
        built = MultiGridForCausalLM(copy.deepcopy(grown.config)).eval()
        built.load_state_dict(grown.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(all_logits(built, grid), all_logits(grown, grid)))


def test_narrow_axes_on_a_plain_decoder():
    model = tiny_multigrid(axis_hidden_size=8)
    before = copy.deepcopy(model)
    grid, old = grow(model)
    assert model.model.axis_embed_positions.weight.shape == (128, 8)
    assert torch.equal(all_logits(model, grid)[0], all_logits(before, old)[0])
    model.remove_axis("new")
    assert model.model.axis_embed_positions is None


def test_the_first_axis_of_a_factored_model():
    model = tiny_multigrid(axis_order="factored")
    before = copy.deepcopy(model)
    grid, old = grow(model)
    assert torch.equal(all_logits(model, grid)[0], all_logits(before, old)[0])
    model.remove_axis("new")
    assert model.next_axes is None


def test_other_models_of_the_same_config_stay_as_they_are():
    model = tiny_multigrid(**TWO_AXES)
    twin = MultiGridForCausalLM(model.config).eval()
    grid = random_grid(twin, 2, 9)
    expected = all_logits(twin, grid)
    model.add_axis("new", 4)
    assert twin.config.axis_names == ["kind", "bracket"]
    assert all(torch.equal(x, y) for x, y in zip(all_logits(twin, grid), expected))


def test_new_weights_are_like_the_old_ones():
    model = tiny_multigrid(**TWO_AXES).bfloat16()
    grid, _ = grow(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(m.training for m in model.modules())
    assert all(x.dtype == torch.bfloat16 for x in all_logits(model, grid))


def test_new_weights_start_as_the_model_starts_them():
    model = tiny_multigrid(hidden_size=128, initializer_range=0.05)
    old = {id(parameter) for parameter in model.parameters()}
    grow(model, size=50)
    for name, parameter in model.named_parameters():
        closed = "main_cross_blocks" in name and ("o_proj" in name or "down_proj" in name)
        if id(parameter) in old:
            continue
        if name.endswith("bias") or closed:
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.04 < parameter.std() < 0.06, name


@pytest.mark.parametrize("training", [True, False])
def test_a_grown_model_is_in_the_mode_that_it_was_in(training):
    model = tiny_multigrid(**TWO_AXES).train(training)
    model.add_axis("new", 7)
    assert {module.training for module in model.modules()} == {training}
    model.remove_axis("kind")
    assert {module.training for module in model.modules()} == {training}


def test_grown_norms_have_the_epsilon_of_the_config():
    model = tiny_multigrid(layer_norm_eps=0.3, axis_order="factored")
    model.add_axis("kind", 7)
    epsilons = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    assert epsilons == {0.3}


def test_bad_values_are_named():
    model = tiny_multigrid(**TWO_AXES)
    for name in ("kind", "", "main", "a b", "../x", 3):
        with pytest.raises(ValueError, match=r"name.*kind.*bracket"):
            model.add_axis(name, 4)
    for size in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="vocab_size"):
            model.add_axis("new", size)
    with pytest.raises(ValueError, match=r"name.*kind.*bracket.*'new'"):
        model.remove_axis("new")
    assert model.config.axis_names == ["kind", "bracket"] and len(model.axis_lm_heads) == 2
