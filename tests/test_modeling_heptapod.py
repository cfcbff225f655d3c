"""Grid models against the oracle in `tests/reference/heptapod.py`; pads, shapes, loss and ELBO against definitions."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from corpora import build_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_heptapod import HeptapodForMaskedLM, HeptapodModel, HeptapodProcessor
from modeling_heptapod.heptapod import heptapod_blocks, local_attention
from modeling_heptapod.heptapod import masked_diffusion as objective
from modeling_heptapod.heptapod import modeling_heptapod as module
from modeling_heptapod.heptapod.masked_diffusion import (
    masked_diffusion_loss,
    sample_eval_masks,
    sample_mask,
    token_nll,
)
from tests.attention_kernels import use_flash_attention, use_flex_attention
from tests.reference.heptapod import HeptapodDescription, heptapod_logits, window
from tests.tiny_heptapod import MASK, PAD, VARIANTS, random_page, tiny_config, tiny_heptapod


def describe(config):
    """The oracle's plain numbers from a configuration."""
    layers = []
    for layer, kind in enumerate(config.attention_types):
        radius, dilation = (x if isinstance(x, int) else x[layer] for x in (config.local_radius, config.dilation))
        layers.append(None if kind == "global" else window(radius, dilation if kind == "dilated" else 1))
    return HeptapodDescription(
        heads=config.num_attention_heads,
        layers=layers,
        global_heads=config.num_global_heads,
        rope_theta=config.rope_theta,
        borders=config.use_absolute_position_embeddings,
        layer_norm_eps=config.layer_norm_eps,
        spans=config.adaptive_span,
        offset_biases=config.use_relative_position_bias,
    )


def oracle(model, page, **kwargs):
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        return heptapod_logits(weights, page.tolist(), describe(model.config), **kwargs)


def part_of_page(height, width, share=0.75, batch=2, seed=3):
    return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < share


# --- the whole model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_oracle(variant):
    model = tiny_heptapod(**VARIANTS[variant]).double()
    page, real = random_page(2, 4, 7), part_of_page(4, 7)
    with torch.no_grad():
        logits = model(page, attention_mask=real.long()).logits
    expected = oracle(model, page, real=real.tolist())
    assert not expected[real].isnan().any()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-5)  # angles are float32


def test_logits_of_a_page_in_tiles_equal_the_oracle():
    model = tiny_heptapod(num_hidden_layers=1, attention_types=["local"], num_global_heads=1).double()
    page = random_page(1, 16, 18)
    with torch.no_grad():
        torch.testing.assert_close(model(page).logits, oracle(model, page), rtol=1e-5, atol=1e-5)


def test_logits_with_feedback_equal_the_oracle():
    model = tiny_heptapod(**VARIANTS["feedback"]).double()
    page = random_page(2, 3, 4)
    previous = 2 * torch.randn(2, 3, 4, 20, dtype=torch.float64)
    with torch.no_grad():
        logits = model(page, self_conditioning_logits=previous).logits
        assert (logits - model(page).logits).abs().max() > 0.1
    torch.testing.assert_close(logits, oracle(model, page, self_conditioning_logits=previous), rtol=1e-5, atol=1e-5)


def test_the_oracle_tells_every_option_apart():
    model = tiny_heptapod(**VARIANTS["split"]).double()
    page = random_page(1, 4, 6)
    weights, description = model.state_dict(), describe(model.config)
    logits = heptapod_logits(weights, page.tolist(), description)
    for change in (
        {"heads": 2},
        {"layers": [window(1), window(1, 3)]},
        {"layers": [window(2), window(1, 2)]},
        {"layers": [window(1), None]},
        {"global_heads": 2},
        {"rope_theta": 90.0},
        {"borders": False},
        {"layer_norm_eps": 1e-2},
    ):
        other = heptapod_logits(weights, page.tolist(), dataclasses.replace(description, **change))
        assert (other - logits).abs().max() > 1e-6, change
    adaptive = tiny_heptapod(**VARIANTS["adaptive"]).double()
    weights, description = adaptive.state_dict(), describe(adaptive.config)
    logits = heptapod_logits(weights, page.tolist(), description)
    for change in ({"spans": False}, {"offset_biases": False}):
        other = heptapod_logits(weights, page.tolist(), dataclasses.replace(description, **change))
        assert (other - logits).abs().max() > 1e-6, change


@pytest.mark.parametrize("head", ["HeptapodModel", "HeptapodForMaskedLM"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_pages_give_the_same(variant, head):
    model = tiny_heptapod(head, **VARIANTS[variant])
    page, real = random_page(2, 5, 9), part_of_page(5, 9).long()
    with torch.no_grad():
        out = model(page, attention_mask=real, output_hidden_states=True)
        flat = model(page.flatten(1), attention_mask=real.flatten(1), grid_size=(5, 9), output_hidden_states=True)
        model.config.grid_size = [5, 9]
        by_config = model(page.flatten(1), attention_mask=real.flatten(1))
        assert model(page[:, :3])[0].shape[:3] == (2, 3, 9)  # other pages may have other sizes
    assert out[0].shape[:3] == (2, 5, 9)
    assert torch.equal(flat[0], out[0].flatten(1, 2)) and torch.equal(by_config[0], flat[0])
    for one, other in zip(out.hidden_states, flat.hidden_states):
        assert torch.equal(one.flatten(1, 2), other)


def test_embeddings_instead_of_tokens():
    model = tiny_heptapod()
    page = random_page(2, 5, 9)
    embeds = model.get_input_embeddings()(page)
    with torch.no_grad():
        expected = model(page).logits
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)
        flat = model(inputs_embeds=embeds.flatten(1, 2), grid_size=(5, 9)).logits
    assert torch.equal(flat, expected.flatten(1, 2))


class LowBitLinear(nn.Module):
    """Weights in int8 with a scale for each output, as quantization libraries hold them."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.data / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.scale * self.weight).to(x.dtype).T


def test_borders_survive_quantization():
    """Of a weight's dtype nothing follows for the features: rounded to integers they would all be 0."""
    model, page = tiny_heptapod(), random_page(1, 4, 5)
    with torch.no_grad():
        expected = model(page).logits
        model.model.embed_positions.proj = LowBitLinear(model.model.embed_positions.proj)
        assert (model(page).logits - expected).abs().max() < 0.1
        model.model.embed_positions.proj.weight = None  # some libraries hide it
        model.model.embed_positions.proj.forward = lambda x: torch.zeros(*x.shape[:-1], 32)
        model(page)


@pytest.mark.parametrize("variant", ["default", "feedback"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(where, variant, tmp_path):
    """They are on the meta device but for the time in which their own module is called."""
    model, page = tiny_heptapod(**VARIANTS[variant]), random_page(2, 4, 5)
    previous = {"self_conditioning_logits": model(page).logits.detach()} if variant == "feedback" else {}
    seen = torch.where(page > 9, MASK, page)
    with torch.no_grad():
        expected = model(page, labels=page).loss, model(page, **previous).logits, model.generate(seen)
        offload = cpu_offload(model, "cpu") if where == "cpu" else disk_offload(model, str(tmp_path), "cpu")
        assert offload.model.embed_positions.proj.weight.device.type == "meta"
        for one, other in zip((model(page, labels=page).loss, model(page, **previous).logits), expected):
            torch.testing.assert_close(one, other)
        assert torch.equal(model.generate(seen), expected[2])


class Adapted(nn.Module):
    """An embedding with an adapter on top, wrapped as adapter libraries do: none of its attributes but the weight."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.change = nn.Parameter(0.3 * torch.randn_like(base.weight))

    def forward(self, ids):
        return self.base(ids) + self.change[ids]


def test_adapted_embeddings():
    model, page = tiny_heptapod(**VARIANTS["feedback"] | {"tie_word_embeddings": False}), random_page(2, 3, 4)
    plain = tiny_heptapod(**VARIANTS["feedback"] | {"tie_word_embeddings": False})
    model.model.embed_tokens = Adapted(model.model.embed_tokens)
    with torch.no_grad():
        plain.model.embed_tokens.weight.add_(model.model.embed_tokens.change)
        previous = 2 * torch.randn(2, 3, 4, 20)
        for inputs in ({"labels": page}, {"self_conditioning_logits": previous}):
            torch.testing.assert_close(model(page, **inputs).logits, plain(page, **inputs).logits)
    with pytest.raises(ValueError, match="input_ids.*20"):
        model(page + 20)


# --- who sees whom ---------------------------------------------------------------------------------------------------


def reach(model, place, height=12, width=13):
    """Per hidden state, the cells that change when the token at `place` does."""
    page = random_page(1, height, width)
    other = page.clone()
    other[(0, *place)] = (other[(0, *place)] + 1) % MASK
    with torch.no_grad():
        states, others = (model(x, output_hidden_states=True).hidden_states for x in (page, other))
    return [{tuple(cell) for cell in (a != b).any(-1)[0].nonzero().tolist()} for a, b in zip(states, others)]


@pytest.mark.parametrize("size", [(12, 13), (20, 21)])  # dense and tiled
def test_cells_see_their_window_and_no_further(size):
    height, width = size
    for types, windows, dilations, layers in (
        (["local", "local"], [1, 2], 5, (window(1), window(2))),
        (["dilated", "dilated"], 1, [2, 3], (window(1, 2), window(1, 3))),
        (["local", "dilated"], [1, 2], 3, (window(1), window(2, 3))),
    ):
        model = tiny_heptapod(attention_types=types, local_radius=windows, dilation=dilations)
        for place in ((0, 0), (6, 5), (height - 1, 3)):
            changed, cells = reach(model, place, height, width), {place}
            for got, offsets in zip(changed, ([0], *layers)):
                cells = {(y + a, x + b) for y, x in cells for a in offsets for b in offsets}
                cells = {(y, x) for y, x in cells if 0 <= y < height and 0 <= x < width}
                assert got == cells


@pytest.mark.parametrize("variant", ["global", "split"])
def test_global_heads_see_the_whole_page(variant):
    model = tiny_heptapod(**VARIANTS[variant])
    assert len(reach(model, (0, 0))[1]) == 12 * 13


def test_rows_are_not_columns():
    for variant in VARIANTS:
        model = tiny_heptapod(**VARIANTS[variant])
        page = random_page(1, 6, 6)
        with torch.no_grad():
            upright = model(page).logits
            turned = model(page.transpose(1, 2)).logits.transpose(1, 2)
        assert (upright - turned).abs().max() > 0.05, variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cells_of_an_empty_page_know_where_they_are(variant):
    model = tiny_heptapod(**{**VARIANTS[variant], "use_absolute_position_embeddings": True})
    page = torch.full((1, 5, 6), MASK)
    with torch.no_grad():
        logits = model(page).logits.flatten(0, 2)
    assert torch.pdist(logits).min() > 0.05
    if variant == "no borders":
        with torch.no_grad():
            logits = tiny_heptapod(**VARIANTS[variant])(page).logits.flatten(0, 2)
        assert torch.pdist(logits).max() < 1e-4


# --- pads leave no trace ---------------------------------------------------------------------------------------------

PAGES = [(3, 9), (12, 4), (1, 1), (17, 20), (1, 12)]


def batch_of(pages, height, width, place=(0, 0)):
    """Pages of different size in one batch, their first cell at `place`."""
    ids = torch.full((len(pages), height, width), PAD)
    real = torch.zeros(len(pages), height, width, dtype=torch.long)
    for i, page in enumerate(pages):
        cells = (i, slice(place[0], place[0] + page.shape[0]), slice(place[1], place[1] + page.shape[1]))
        ids[cells], real[cells] = page, 1
    return ids, real


@pytest.mark.parametrize("place", [(0, 0), (3, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pages_in_a_batch_equal_pages_alone(variant, place):
    model = tiny_heptapod(**VARIANTS[variant]).double()
    with torch.no_grad():
        model.get_input_embeddings().weight[PAD].normal_()
    pages = [random_page(1, *size, seed=i)[0] for i, size in enumerate(PAGES)]
    ids, real = batch_of(pages, 21, 23, place)
    with torch.no_grad():
        logits = model(ids, attention_mask=real).logits
        for i, page in enumerate(pages):
            alone = model(page[None]).logits[0]
            got = logits[i][real[i].bool()].view(*page.shape, -1)
            torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)  # float32 angles, elsewhere on the grid


@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_get_no_gradient(variant):
    model = tiny_heptapod(**VARIANTS[variant])
    ids, real = batch_of([random_page(1, *size, seed=i)[0] for i, size in enumerate(PAGES)], 17, 20)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=real).logits
    logits[real.bool()].square().sum().backward()
    assert torch.equal(embeds.grad[real == 0], torch.zeros_like(embeds.grad[real == 0]))
    assert (embeds.grad[real == 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("variant", ["default", "neighbors", "feedback"])
def test_labels_at_pads_do_not_count(variant):
    model = tiny_heptapod(**VARIANTS[variant] | {"pad_token_id": None}).train()
    ids, real = batch_of([random_page(1, *size, seed=i)[0] % 17 for i, size in enumerate(PAGES)], 17, 20)
    ids[real == 0] = 17  # a token that occurs at pads only
    losses = []
    for labels in (ids, ids.masked_fill(real == 0, -100)):
        torch.manual_seed(5)
        model.zero_grad()
        losses.append(model(ids, attention_mask=real, labels=labels).loss)
    assert torch.equal(*losses)
    losses[0].backward()
    grad = model.get_input_embeddings().weight.grad[17]
    if variant != "feedback":  # whose table takes part in every guess
        assert torch.equal(grad, torch.zeros_like(grad))


def test_the_pad_token_never_counts():
    model = tiny_heptapod()
    ids, real = batch_of([random_page(1, *size, seed=i)[0] for i, size in enumerate(PAGES)], 17, 20)
    for mask in (real, None):
        loss = model(ids, attention_mask=mask, labels=ids).loss
        assert torch.equal(model(ids, attention_mask=mask, labels=ids.masked_fill(real == 0, -100)).loss, loss)


@pytest.fixture
def said(monkeypatch):
    """What was warned of."""
    warnings = []
    for logger in (module.logger, objective.logger):
        monkeypatch.setattr(logger, "warning_once", warnings.append)
    return warnings


def test_pads_without_a_mask_are_warned_of(said):
    page = random_page(2, 4, 5)
    padded = page.clone()
    padded[0, 1, 2] = PAD
    mask = (padded != PAD).long()
    for head in ("HeptapodModel", "HeptapodForMaskedLM"):
        model = tiny_heptapod(head)
        for inputs in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": page}):
            model(**inputs)
        tiny_heptapod(head, pad_token_id=None)(padded)
        assert not said
        model(padded)
        assert len(said) == 1 and f"padding token {PAD}" in said.pop() and not said
    model.elbo(padded, mask, num_samples=2)
    assert not said
    model.elbo(padded, num_samples=2)
    assert len(said) == 1


def test_pads_that_trainer_counted_are_warned_of(said):
    model = tiny_heptapod()
    ids, real = batch_of([random_page(1, *size, seed=i)[0] for i, size in enumerate(PAGES)], 17, 20)
    right = ids.masked_fill(real == 0, -100)
    model(ids, attention_mask=real, labels=ids)
    model(ids, attention_mask=real, labels=right, num_items_in_batch=7)
    assert not said
    model(ids, attention_mask=real, labels=ids, num_items_in_batch=7)
    assert len(said) == 1 and "num_items_in_batch" in said[0]


# --- loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_what_it_says():
    """Drawn as the model draws, then cell by cell."""
    model = tiny_heptapod().double().train()
    page, labels = random_page(4, 5, 6), random_page(4, 5, 6)
    labels[0, 2:] = labels[3, :, 4] = -100
    torch.manual_seed(7)
    out = model(page, labels=labels)
    torch.manual_seed(7)
    masked, ratio = sample_mask(labels)
    assert masked.any() and not masked[labels == -100].any()
    seen = torch.where(masked, MASK, page)
    with torch.no_grad():
        logits = model(seen).logits
    assert torch.equal(out.logits, logits)
    total = 0.0
    for row, y, x in masked.nonzero().tolist():
        chances = logits[row, y, x, :MASK].exp()  # mask and pad are never written
        total -= math.log(chances[labels[row, y, x]] / chances.sum()) / ratio[row].item()
    torch.testing.assert_close(out.loss.item(), total / int((labels != -100).sum()))


def test_the_loss_for_embeddings_is_that_for_tokens():
    model = tiny_heptapod()
    page = random_page(2, 5, 6)
    embeds = model.get_input_embeddings()(page)
    assert torch.equal(model(inputs_embeds=embeds, labels=page).loss, model(page, labels=page).loss)


def exact_nats(model, page, given=None):
    """The bound's mean by enumeration of all sets of masked cells: `sum over S of CE(S) / (n choose |S|) / |S|`."""
    cells = [tuple(cell) for cell in torch.ones_like(page[0]).nonzero().tolist()]
    cells = [cell for cell in cells if given is None or not given[cell]]
    total = 0.0
    for number in range(1, len(cells) + 1):
        for chosen in itertools.combinations(cells, number):
            seen = page.clone()
            for cell in chosen:
                seen[(0, *cell)] = MASK
            with torch.no_grad():
                chances = model(seen).logits[0, ..., :MASK].log_softmax(-1)
                if model.config.self_conditioning:
                    first = model(seen).logits
                    chances = model(seen, self_conditioning_logits=first).logits[0, ..., :MASK].log_softmax(-1)
            nats = -sum(chances[(*cell, page[(0, *cell)])].item() for cell in chosen)
            total += nats / number / math.comb(len(cells), number)
    return total


def test_the_loss_averages_to_the_bound():
    model = tiny_heptapod().train()
    page = random_page(1, 2, 2)
    exact = exact_nats(model, page) / 4
    with torch.no_grad():
        losses = torch.stack([model(page.expand(64, -1, -1), labels=page.expand(64, -1, -1)).loss for _ in range(60)])
    error = losses.std() / len(losses) ** 0.5
    assert error < 0.05 * exact
    assert abs(losses.mean() - exact) < 4 * error


@pytest.mark.parametrize("variant", ["default", "feedback"])
def test_the_loss_in_evaluation_averages_to_the_bound(variant):
    """Also with feedback, which is always given there. The draw depends on the labels: other pages make other draws.

    Here the last row of each page, which no draw of the others depends on, makes them other pages.
    """
    model = tiny_heptapod(**VARIANTS[variant])
    page = random_page(1, 3, 2)
    given = torch.tensor([[False, False], [False, False], [True, True]])
    exact = exact_nats(model, page, given) / 4
    losses, draw = [], module.sample_eval_masks
    for i in range(60):
        batch = page.expand(64, -1, -1).clone()
        labels = batch.masked_fill(given, -100)
        names = (
            torch.arange(i * 64, (i + 1) * 64).view(64, 1, 1).expand(-1, 2, 2) + labels[:, :2]
        )  # others, to be drawn by
        drawn = draw(torch.cat((names, labels[:, 2:]), dim=1))
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "sample_eval_masks", lambda labels, drawn=drawn: drawn)
            losses.append(model(batch, labels=labels).loss)
    losses = torch.stack(losses)
    error = losses.std() / len(losses) ** 0.5
    assert error < 0.05 * exact
    assert abs(losses.mean() - exact) < 4 * error


@pytest.mark.parametrize("case", ["page", "hole", "feedback"])
def test_elbo_against_enumeration(case):
    model = tiny_heptapod(**VARIANTS["feedback" if case == "feedback" else "default"])
    page = random_page(1, 2, 3 if case == "hole" else 2)
    given = torch.tensor([[True, False, False], [False, False, True]]) if case == "hole" else None
    exact = exact_nats(model, page, given)
    labels = None if given is None else page.masked_fill(given, -100).expand(40, -1, -1)
    estimate = model.elbo(page.expand(40, -1, -1), num_samples=16, labels=labels)
    assert estimate.nats.shape == estimate.standard_error.shape == (40,)
    spread = estimate.nats.std()
    assert abs(estimate.nats.mean() - exact) < 4 * spread / 40**0.5
    # The stated error is the actual one: 40 independent estimates of one number.
    stated = estimate.standard_error.square().mean().sqrt()
    assert 0.6 < stated / spread < 1.6
    assert spread < 0.15 * exact


def test_elbo_is_for_each_page():
    model = tiny_heptapod()
    ids, real = batch_of([random_page(1, *size, seed=i)[0] for i, size in enumerate(PAGES)], 17, 20)
    real[2] = 0  # a page of nothing
    generator = torch.Generator().manual_seed(0)
    nats, error = model.elbo(ids, real, num_samples=8, generator=generator)
    assert nats[2] == error[2] == 0 and (nats[[0, 1, 3, 4]] > 10).all()
    again = model.elbo(ids, real, num_samples=8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.nats, nats)
    flat = model.elbo(
        ids.flatten(1),
        real.flatten(1),
        num_samples=8,
        generator=torch.Generator().manual_seed(0),
        grid_size=(17, 20),
    )
    torch.testing.assert_close(flat.nats, nats)
    for number in (0, 1, 3):
        with pytest.raises(ValueError, match=f"`num_samples`.*{number}"):
            model.elbo(ids, num_samples=number)


def test_elbo_masks_every_number_of_cells(monkeypatch):
    """With twice as many samples as cells each number has a stratum of its own."""
    masked, choose = [], objective.choose_cells

    def spy(*args):
        masked.append(choose(*args))
        return masked[-1]

    monkeypatch.setattr(objective, "choose_cells", spy)
    page = random_page(3, 3, 4)
    labels = page.clone()
    labels[:, 2] = -100
    tiny_heptapod().elbo(page, num_samples=16, labels=labels)
    assert [cells.sum((1, 2)).tolist() for cells in masked] == [[number] * 3 for number in range(1, 9) for _ in "ab"]
    assert not any(cells[:, 2].any() for cells in masked)
    chosen = torch.stack(masked)[:, :, :2].flatten(2)
    assert not torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[6, 0], chosen[6, 1])


class No64Bits(TorchDispatchMode):
    """A device that has no float64, as Apple's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{function} makes float64")
        return out


@pytest.mark.parametrize("variant", ["default", "feedback", "neighbors"])
def test_no_float64_is_needed(variant):
    model, page = tiny_heptapod(**VARIANTS[variant]), random_page(2, 4, 5)
    with No64Bits():
        nats, error = model.elbo(page, num_samples=4)
        assert nats.dtype == error.dtype == torch.float32
        model(page, labels=page)
        model.train()(page, labels=page).loss.backward()


@pytest.mark.parametrize("variant", ["default", "feedback"])
def test_a_page_of_one_cell_costs_its_logarithm(variant):
    model = tiny_heptapod(**VARIANTS[variant])
    page = random_page(3, 1, 1)
    empty = torch.full_like(page, MASK)
    with torch.no_grad():
        logits = model(empty).logits
        if variant == "feedback":
            logits = model(empty, self_conditioning_logits=logits).logits
        expected = -logits[..., :MASK].log_softmax(-1).gather(-1, page[..., None])
    nats, error = model.elbo(page, num_samples=4)
    torch.testing.assert_close(nats.float(), expected.flatten())
    torch.testing.assert_close(error, torch.zeros_like(error))


def test_ratios_are_uniform_and_cover_a_batch():
    labels = torch.zeros(8, 5, 5, dtype=torch.long)
    drawn = torch.stack([sample_mask(labels)[1] for _ in range(500)])
    assert (drawn > 0).all() and (drawn <= 1).all()
    assert (drawn.sort(-1).values.diff(dim=-1) - 1 / 8).abs().max() < 1e-5
    for row in drawn.T:  # each row alone
        assert abs(row.mean() - 0.5) < 0.06 and abs(row.std() - 12**-0.5) < 0.03


def test_ratios_of_several_processes_cover_what_is_between():
    """All seeded alike, as `Trainer` does it; each for itself as a single one."""
    labels = torch.zeros(2, 40, 50, dtype=torch.long)
    for seed in range(20):
        drawn = []
        for rank in range(3):
            torch.manual_seed(seed)
            drawn.append(sample_mask(labels, None, rank, 3))
        ratios = torch.stack([ratio for _, ratio in drawn])
        assert (ratios > 0).all() and (ratios <= 1).all()
        assert (ratios.flatten().sort().values.diff() - 1 / 6).abs().max() < 1e-5
        assert (ratios.diff().abs() - 1 / 2).abs().max() < 1e-5  # each process for itself covers all, too
        for masked, ratio in drawn:
            shares = masked.float().mean((1, 2))
            assert ((shares - ratio).abs() < 5 * (ratio * (1 - ratio) / 2000).sqrt() + 1e-3).all()
        # Of equal draws the mask of a smaller ratio would always lie within that of a larger one.
        pairs = [(one[row], other[row]) for (one, _), (other, _) in itertools.combinations(drawn, 2) for row in (0, 1)]
        assert sum(bool((one & ~other).any() and (other & ~one).any()) for one, other in pairs) >= 2
    torch.manual_seed(4)
    alone = sample_mask(labels)
    torch.manual_seed(4)
    assert all(torch.equal(x, y) for x, y in zip(sample_mask(labels, None, 0, 1), alone))


def test_training_draws_as_its_rank_and_evaluation_does_not(monkeypatch):
    model, page = tiny_heptapod(), random_page(2, 5, 6)
    evaluated = model(page, labels=page).loss
    seen, draw = [], module.sample_mask
    monkeypatch.setattr(module, "sample_mask", lambda *args: seen.append(draw(*args)) or seen[-1])
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert torch.equal(model.eval()(page, labels=page).loss, evaluated)
        torch.manual_seed(0)
        model.train()(page, labels=page)
    (_, first), (_, second) = seen  # evaluation draws otherwise
    assert (torch.cat((first, second)).sort().values.diff() - 1 / 4).abs().max() < 1e-5


def test_masks_have_their_ratio_and_spare_what_does_not_count():
    labels = torch.zeros(4, 60, 60, dtype=torch.long)
    labels[:, :, 30:] = -100
    for _ in range(5):
        masked, ratio = sample_mask(labels)
        assert not masked[:, :, 30:].any()
        shares = masked[:, :, :30].float().mean((1, 2))
        assert ((shares - ratio).abs() < 5 * (ratio * (1 - ratio) / 1800).sqrt() + 1e-3).all()


def test_evaluation_repeats_itself_and_training_does_not():
    model = tiny_heptapod()
    page = random_page(4, 5, 6)
    losses = [model(page, labels=page).loss for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(*losses) and torch.equal(model(page, labels=page).loss, losses[0])
    other = (page + 1) % MASK
    assert not torch.equal(sample_eval_masks(page)[0], sample_eval_masks(other)[0])
    model.train()
    assert not torch.equal(model(page, labels=page).loss, model(page, labels=page).loss)
    torch.manual_seed(1)
    loss = model(page, labels=page).loss
    torch.manual_seed(1)
    assert torch.equal(model(page, labels=page).loss, loss)


def test_the_draw_of_a_page_depends_on_the_page_alone():
    """Not on the batch, the order in it, nor the size that it is padded to; and it is a draw as in training."""
    pages = [random_page(1, 1 + i % 4, 2 + i % 3, seed=i)[0] for i in range(12)]
    alone = [sample_eval_masks(page[None]) for page in pages]
    batch = torch.full((12, 6, 7), -100)
    for row, page in zip(batch, pages):
        row[: page.shape[0], : page.shape[1]] = page
    for order in (torch.arange(12), torch.randperm(12)):
        masked, ratio = sample_eval_masks(batch[order])
        for row, which in enumerate(order.tolist()):
            height, width = pages[which].shape
            assert torch.equal(masked[row, :height, :width], alone[which][0][0]) and ratio[row] == alone[which][1]
            assert masked[row].sum() == alone[which][0].sum()
    masked, ratio = sample_eval_masks(random_page(400, 30, 30))
    assert (0 < ratio).all() and (ratio <= 1).all() and ratio.unique().numel() == 400
    assert abs(ratio.mean() - 0.5) < 0.06 and abs(ratio.std() - 12**-0.5) < 0.03
    shares = masked.float().mean((1, 2))
    assert ((shares - ratio).abs() < 5 * (ratio * (1 - ratio) / 900).sqrt() + 1e-3).all()


def test_the_output_names_the_cells_that_the_loss_counted():
    model, page = tiny_heptapod(), random_page(3, 4, 5)
    labels = page.clone()
    labels[0, 2:] = -100
    assert model(page).masked_labels is None
    for training in (False, True):
        model.train(training)
        torch.manual_seed(7)
        out = model(page, labels=labels)
        torch.manual_seed(7)
        masked, ratio = sample_mask(labels) if training else sample_eval_masks(labels)
        assert torch.equal(out.masked_labels, labels.masked_fill(~masked, -100)) and masked.any()
        nats = token_nll(out.logits, out.masked_labels, [MASK, PAD]).sum((1, 2))
        torch.testing.assert_close((nats / ratio).sum() / (labels != -100).sum(), out.loss)
        assert torch.equal(model.eval()(page, labels=labels, return_dict=False)[-1], model(page, labels=labels)[-1])
    flat = model(page.flatten(1), labels=labels.flatten(1), grid_size=(4, 5))
    assert torch.equal(flat.masked_labels.view(3, 4, 5), model(page, labels=labels).masked_labels)


def evaluation(tmp_path, batch_size, **kwargs):
    options = {"per_device_eval_batch_size": batch_size, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return Trainer(args=TrainingArguments(str(tmp_path), **options), **kwargs)


def test_metrics_tell_masked_cells_from_shown_ones_whatever_the_batch(tmp_path):
    model = tiny_heptapod()
    rows = [{"input_ids": page, "labels": page} for page in random_page(8, 4, 5)]
    logits, counted, seen = [], [], []

    def metrics(prediction):
        logits, counted = prediction.predictions
        shown = prediction.label_ids[counted == -100]
        seen.append((len(shown), int((counted != -100).sum())))
        right = (logits.argmax(-1) == counted)[counted != -100]
        return {"accuracy": float(right.mean())}

    with torch.no_grad():
        out = [model(row["input_ids"][None], labels=row["labels"][None]) for row in rows]
    logits, counted = (torch.cat([x[name] for x in out]) for name in ("logits", "masked_labels"))
    right = (logits.argmax(-1) == counted)[counted != -100].float().mean().item()
    for batch_size in (1, 3, 8):
        found = evaluation(tmp_path, batch_size, model=model, compute_metrics=metrics).evaluate(rows)
        assert found["eval_loss"] == pytest.approx(torch.stack([x.loss for x in out]).mean().item(), rel=1e-5)
        assert found["eval_accuracy"] == pytest.approx(right)
    assert seen == [(int((counted == -100).sum()), int((counted != -100).sum()))] * 3


def test_pages_of_unequal_size_are_predicted(tmp_path):
    """Padded to the processor's size by the stock collator, or kept apart by `eval_do_concat_batches`."""
    tokenizer = build_tokenizer("byte", [], for_pages=True)
    special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_heptapod(vocab_size=len(tokenizer), **special)
    processor = HeptapodProcessor(tokenizer, height=5, width=11)
    texts = ["ab\ncd\n", "abcdefgh\n", "x", "a\nb\nc\n"]
    of_text = [HeptapodProcessor(tokenizer)(text, return_labels=True) for text in texts]
    rows = [{name: page[0] for name, page in page.items()} for page in of_text]
    with torch.no_grad():
        alone = [model(**page) for page in of_text]
    for batch_size in (1, 3):
        trainer = evaluation(tmp_path, batch_size, model=model, data_collator=DataCollatorWithPadding(processor))
        (logits, counted), labels, _ = trainer.predict(rows)
        assert logits.shape == (4, 5, 11, len(tokenizer)) and counted.shape == labels.shape == (4, 5, 11)
        for row, page, out in zip(range(4), of_text, alone):
            height, width = page.input_ids.shape[1:]
            np.testing.assert_allclose(logits[row, :height, :width], out.logits[0], rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(counted[row, :height, :width], out.masked_labels[0])
            assert (counted[row] != -100).sum() == (out.masked_labels != -100).sum()
            np.testing.assert_array_equal(labels[row, :height, :width], page.labels[0])
    trainer = evaluation(tmp_path, 1, model=model)
    trainer.args.eval_do_concat_batches = False
    found = trainer.predict(rows)
    assert [x.shape for x in found.label_ids] == [tuple(page.labels.shape) for page in of_text]


def test_collators_for_language_modeling():
    """Without `mlm` they give the clean page, which is right; with it pages that are masked twice, which is refused."""
    tokenizer = build_tokenizer("byte", [], for_pages=True)
    special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_heptapod(vocab_size=len(tokenizer), grid_size=(4, 5), **special)
    processor = HeptapodProcessor(tokenizer)
    whole = processor(["ab\ncd\n", "abcdefgh\n"], return_labels=True)
    rows = [{"input_ids": processor(text).input_ids[0]} for text in ("ab\ncd\n", "abcdefgh\n")]
    batch = DataCollatorForLanguageModeling(processor, mlm=False)(rows)
    assert torch.equal(model(**batch).loss, model(**whole).loss)
    with pytest.raises(AttributeError, match="needs `mlm=False`"):
        DataCollatorForLanguageModeling(processor)
    for seed in range(20):
        options = {"mask_replace_prob": 0.0, "random_replace_prob": 1.0} if seed % 2 else {}
        rows = [{"input_ids": page.flatten()} for page in random_page(2, 4, 5, seed=seed)]
        batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=seed, **options)(rows)
        with pytest.raises(ValueError, match="pass the clean page, the model masks it itself"):
            model(**batch)


def test_a_mask_token_that_goes_unnoticed_does_not_count(monkeypatch):
    """As on devices that are not asked what they hold: it must not cost what no token may cost."""
    monkeypatch.setattr(module, "values_are_readable", lambda ids: False)
    model, page = tiny_heptapod(), random_page(2, 4, 5)
    labels = page.clone()
    labels[0, 1], labels[1, :, 3] = MASK, MASK
    with pytest.raises(ValueError, match="`labels` hold the mask token"):  # the first batch is looked at everywhere
        model(page, labels=labels)
    model(page, labels=page)
    torch.manual_seed(3)
    loss = model.train()(page, labels=labels).loss
    torch.manual_seed(3)
    assert torch.equal(model(page, labels=labels.masked_fill(labels == MASK, -100)).loss, loss)
    assert loss < 100


def test_logits_and_labels_on_different_devices():
    """As where the head is on another device than the embeddings; the meta device mixes with no other, either."""
    labels, ratio = random_page(2, 3, 4), torch.tensor([0.5, 1.0])
    about = {"labels": labels, "masked": labels > 5, "mask_ratio": ratio, "excluded": [MASK]}
    for number in (None, 24, torch.tensor(24)):
        loss = masked_diffusion_loss(torch.zeros(2, 3, 4, 20, device="meta"), **about, num_items_in_batch=number)
        assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_page_without_cells_in_a_batch(variant):
    """Its attention mask is 0 throughout: nothing of it is NaN, and the other page is as it is alone."""
    model = tiny_heptapod(**VARIANTS[variant])
    page, mask = random_page(2, 4, 5), torch.ones(2, 4, 5, dtype=torch.long)
    mask[1] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(page, attention_mask=mask).logits[:1], model(page[:1]).logits)
        both = model(page, attention_mask=mask, labels=page)
        torch.testing.assert_close(both.loss, model(page[:1], labels=page[:1]).loss)
        assert both.logits.isfinite().all() and (both.masked_labels[1] == -100).all()
        nats, error = model.elbo(page, attention_mask=mask, num_samples=2)
        assert nats[0] > 0 and nats[1] == error[1] == 0
        assert model(page, attention_mask=0 * mask, labels=page).loss == 0
    for wrong in (page[:, :0], page[:0], page[..., :0]):
        with pytest.raises(ValueError, match="`input_ids` must hold at least one page of at least one cell"):
            model.generate(wrong)


def test_rows_without_labels_give_zero():
    model = tiny_heptapod()
    page = random_page(2, 3, 3)
    loss = model(page, labels=torch.full_like(page, -100)).loss
    assert loss == 0


def test_a_loss_function_of_ones_own():
    model = tiny_heptapod()
    assert model.loss_function is masked_diffusion_loss
    model.loss_function = lambda logits, labels, masked, mask_ratio, excluded, **kwargs: (
        logits.sum() * 0 + len(excluded)
    )
    page = random_page(2, 3, 3)
    assert model(page, labels=page).loss == 2


# --- feedback and neighbours -----------------------------------------------------------------------------------------


def test_feedback_starts_as_nothing():
    torch.manual_seed(0)
    model = HeptapodForMaskedLM(tiny_config(self_conditioning=True)).eval()
    assert not model.self_conditioning_proj.weight.any()
    page = random_page(1, 3, 4)
    with torch.no_grad():
        logits = model(page).logits
        assert torch.equal(model(page, self_conditioning_logits=100 * torch.randn_like(logits)).logits, logits)


def count_calls(model, **inputs):
    calls = []
    hook = model.model.register_forward_hook(lambda module, args, output: calls.append(torch.is_grad_enabled()))
    model(**inputs)
    hook.remove()
    return calls


def test_half_of_the_training_steps_predict_twice():
    model = tiny_heptapod(**VARIANTS["feedback"]).train()
    page = random_page(2, 3, 4)
    calls = [count_calls(model, input_ids=page, labels=page) for _ in range(200)]
    assert all(call in ([True], [False, True]) for call in calls)  # the first prediction is without gradient
    assert abs(sum(len(call) == 2 for call in calls) / 200 - 0.5) < 0.15
    model.eval()
    assert count_calls(model, input_ids=page, labels=page) == [False, True]
    assert count_calls(model, input_ids=page) == [True]
    previous = model(page).logits
    assert count_calls(model, input_ids=page, labels=page, self_conditioning_logits=previous) == [True]
    assert count_calls(tiny_heptapod(), input_ids=page, labels=page) == [True]


def test_evaluation_feeds_the_first_prediction_back():
    model = tiny_heptapod(**VARIANTS["feedback"])
    page = random_page(2, 3, 4)
    out = model(page, labels=page)
    masked, _ = sample_eval_masks(page)
    seen = torch.where(masked, MASK, page)
    torch.testing.assert_close(out.logits, model(seen, self_conditioning_logits=model(seen).logits).logits)


@pytest.mark.parametrize("padded", [False, True])
def test_the_neighbor_loss_is_what_it_says(padded):
    model = tiny_heptapod(neighbor_loss_weight=0.3).double().train()
    plain = tiny_heptapod().double().train()
    plain.load_state_dict(model.state_dict(), strict=False)
    page, real = random_page(3, 4, 5), part_of_page(4, 5, batch=3) if padded else torch.ones(3, 4, 5, dtype=torch.bool)
    inputs = {"input_ids": page, "labels": page, "attention_mask": real.long()}
    torch.manual_seed(7)
    loss = model(**inputs).loss
    torch.manual_seed(7)
    expected = plain(**inputs).loss.item()
    torch.manual_seed(7)
    masked, ratio = sample_mask(page.masked_fill(~real, -100))
    with torch.no_grad():
        states = model.model(torch.where(masked, MASK, page), attention_mask=real.long()).last_hidden_state
        total = 0.0
        for row, y, x in masked.nonzero().tolist():
            # In the order of the projections: the cell below predicts what is above it, and so on.
            for projection, (i, j) in zip(model.neighbor_projs, ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1))):
                if 0 <= i < 4 and 0 <= j < 5 and real[row, i, j]:
                    logits = model.lm_head(projection(states[row, i, j]))[:MASK]
                    total -= logits.log_softmax(-1)[page[row, y, x]].item() / ratio[row].item()
    torch.testing.assert_close(loss.item(), expected + 0.3 * total / 4 / int(real.sum()))


def test_evaluation_leaves_the_neighbor_loss_out():
    model, plain = tiny_heptapod(neighbor_loss_weight=0.3), tiny_heptapod()
    plain.load_state_dict(model.state_dict(), strict=False)
    page = random_page(3, 4, 5)
    assert torch.equal(model(page, labels=page).loss, plain(page, labels=page).loss)


# --- training --------------------------------------------------------------------------------------------------------


def loss_grads(model, seed=0, **inputs):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_takes_part_in_every_step(variant):
    """What distributed training asks for; with feedback, whether the coin fell this way or that."""
    model = tiny_heptapod(**VARIANTS[variant]).train()
    page = random_page(2, 4, 5)
    for seed in range(6):
        _, grads = loss_grads(model, seed, input_ids=page, labels=page)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("variant", ["default", "neighbors"])
def test_num_items_in_batch_is_the_divisor(variant):
    model = tiny_heptapod(**VARIANTS[variant]).double().train()
    page = random_page(4, 5, 6)
    labels = page.clone()
    labels[0, 2:] = -100
    count = (labels != -100).sum()
    loss, grads = loss_grads(model, input_ids=page, labels=labels)
    for number in (count, int(count)):
        same, _ = loss_grads(model, input_ids=page, labels=labels, num_items_in_batch=number)
        torch.testing.assert_close(same, loss)
    third, third_grads = loss_grads(model, input_ids=page, labels=labels, num_items_in_batch=3 * count)
    torch.testing.assert_close(3 * third, loss)
    for one, other in zip(third_grads, grads):
        torch.testing.assert_close(3 * one, other)


def test_trainer_counts_the_cells_that_count(tmp_path):
    """Over all batches of a step, however unequal, and hands the number to the loss."""
    rows = []
    for i in range(4):
        page = random_page(1, 4, 5, seed=i)[0]
        labels = page.clone()
        labels[: i + 1] = -100
        rows.append({"input_ids": page, "labels": labels})
    seen = []
    model = tiny_heptapod()

    def spy(num_items_in_batch=None, **kwargs):
        seen.append(num_items_in_batch)
        return masked_diffusion_loss(num_items_in_batch=num_items_in_batch, **kwargs)

    model.loss_function = spy
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, args, train_dataset=rows).train()
    assert seen == [sum(int((row["labels"] != -100).sum()) for row in rows)] * 2


def test_trainer_counts_no_pads_of_the_processors_labels(tmp_path, said):
    """Pages of different size in a batch: what is divided by is the number of cells that count."""
    processor = HeptapodProcessor(build_tokenizer("byte", [], for_pages=True))
    tokenizer = processor.tokenizer
    batch = processor(["ab\ncd\n", "x", "abcdefgh\n", "a\nb\nc\n"], return_labels=True)
    rows = [{name: batch[name][i] for name in batch} for i in range(4)]
    counts, cells = [], []
    special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_heptapod(vocab_size=len(tokenizer), **special)

    def spy(num_items_in_batch=None, **kwargs):
        counts.append(int(num_items_in_batch))
        cells.append(int((kwargs["labels"] != -100).sum()))
        return masked_diffusion_loss(num_items_in_batch=num_items_in_batch, **kwargs)

    model.loss_function = spy
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": [], "max_steps": 1}
    args = TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **options)
    Trainer(model, args, train_dataset=rows).train()
    assert counts == [sum(cells)] * 2 == [int(batch.attention_mask.sum())] * 2
    assert sum(cells) < batch.input_ids.numel() and not said


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", ["default", "split", "feedback"])
def test_gradient_checkpointing_equals_plain(variant, use_reentrant):
    model = tiny_heptapod(attention_dropout=0.2, hidden_dropout=0.1, **VARIANTS[variant]).train()
    page = random_page(2, 17, 18)
    plain_loss, plain = loss_grads(model, input_ids=page, labels=page)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    loss, grads = loss_grads(model, input_ids=page, labels=page)
    assert torch.equal(loss, plain_loss)
    for grad, expected in zip(grads, plain):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_autocast_trains(variant):
    model = tiny_heptapod(**{"initializer_range": 0.05, **VARIANTS[variant]}).train()
    page = random_page(2, 17, 18)
    plain, plain_grads = loss_grads(model, input_ids=page, labels=page)
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(page, labels=page).loss
    loss.backward()
    assert abs(loss.detach() - plain) < 0.02 * plain.abs()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads)
    together = [torch.cat([x.flatten() for x in some]) for some in (grads, plain_grads)]
    assert nn.functional.cosine_similarity(*together, dim=0) > 0.98


def test_bfloat16_weights():
    model = tiny_heptapod(**VARIANTS["feedback"])
    page = random_page(2, 17, 18)
    with torch.no_grad():
        exact = model(page, self_conditioning_logits=model(page).logits).logits
        low = model.bfloat16()
        logits = low(page, self_conditioning_logits=low(page).logits).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_dropout_is_on_in_training_only():
    model = tiny_heptapod(attention_dropout=0.3, hidden_dropout=0.3)
    page = random_page(1, 5, 6)
    assert torch.equal(model(page).logits, tiny_heptapod()(page).logits)
    model.train()
    assert not torch.equal(model(page).logits, model(page).logits)
    for name in ("attention_dropout", "hidden_dropout"):
        one = tiny_heptapod(**{name: 0.3}).train()
        assert not torch.equal(one(page).logits, one(page).logits), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_is_where_it_belongs(attention, monkeypatch):
    """What is dropped, in order, and at which rate; with nothing dropped the logits are those of evaluation."""
    monkeypatch.setattr(local_attention, "has_kernel", lambda *_: False)  # torch's attention is watched
    model = tiny_heptapod(attention_dropout=0.2, hidden_dropout=0.3, attention_types=["local"], num_hidden_layers=1)
    model.set_attn_implementation(attention)
    page, dropped, outputs = random_page(1, 5, 6), [], {}
    expected = model(page).logits

    def keep(name):
        return lambda module, inputs, output: outputs.update({name: output[0] if type(output) is tuple else output})

    def record(x, p=0.5, training=True, inplace=False):
        if training and p:
            dropped.append(next((name for name, output in outputs.items() if x is output), tuple(x.shape)))
            assert p == (0.2 if x.shape[-1] == 30 else 0.3)
        return x

    def attend(*args, dropout_p=0.0, **kwargs):
        dropped.append(dropout_p)
        return real(*args, **kwargs)

    layer, real = model.model.layers[0], nn.functional.scaled_dot_product_attention
    layer.self_attn.register_forward_hook(keep("attention"))
    layer.mlp.register_forward_hook(keep("feed-forward"))
    monkeypatch.setattr(nn.functional, "dropout", record)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    torch.testing.assert_close(model.train()(page).logits, expected)
    weights = {"sdpa": 0.2, "eager": (1, 4, 30, 30)}[attention]
    assert dropped == [(1, 5, 6, 32), weights, "attention", "feed-forward"]
    dropped.clear()
    model.eval()(page)
    assert dropped == ([0.0] if attention == "sdpa" else [])


def test_norms_have_the_epsilon_of_the_config():
    model = tiny_heptapod(layer_norm_eps=0.3)
    epsilons = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert epsilons == [0.3] * (2 * 2 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_forward_equals_eager(variant):
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    model = tiny_heptapod(**VARIANTS[variant])
    page, real = random_page(2, 17, 18), part_of_page(17, 18).long()
    with torch.no_grad():
        expected = model(page, attention_mask=real).logits
        compiled = torch.compile(model, fullgraph=True)(page, attention_mask=real).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


# --- attentions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attentions_rebuild_the_output(variant, padded):
    model = tiny_heptapod(**VARIANTS[variant]).double()
    page, real = random_page(2, 17, 18), part_of_page(17, 18)
    kwargs = {"attention_mask": real.long()} if padded else {}
    inputs, outputs = [], []
    with torch.no_grad():
        plain = model(page, **kwargs)
        assert not plain.attentions
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
            layer.self_attn.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
        out = model(page, output_attentions=True, **kwargs)
        torch.testing.assert_close(out.logits, plain.logits)
        for layer, weights, states, attended in zip(model.model.layers, out.attentions, inputs, outputs):
            assert weights.shape == (2, 4, 17 * 18, 17 * 18)
            torch.testing.assert_close(weights.sum(-1).round(), weights.sum(-1))  # 1, or 0 where nothing is seen
            values = layer.self_attn.qkv_proj(states).view(2, 17 * 18, -1).chunk(3, dim=-1)[2]
            mixed = weights @ values.unflatten(-1, (4, 8)).transpose(1, 2)
            rebuilt = layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2)).view_as(attended)
            torch.testing.assert_close(rebuilt, attended)
            if padded:
                assert not weights.transpose(-1, -2)[:, :, 0][~real.flatten(1)[:, :1].expand(2, 4)].any()


def test_eager_attention_is_the_same(monkeypatch):
    for variant in VARIANTS:
        model, eager = (tiny_heptapod(**VARIANTS[variant]) for _ in range(2))
        eager.set_attn_implementation("eager")
        assert (model.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
        page, real = random_page(2, 17, 18), part_of_page(17, 18).long()
        with torch.no_grad():
            expected = model(page, attention_mask=real).logits
            with monkeypatch.context() as patch:
                patch.setattr(heptapod_blocks, "local_attention", None)  # eager attention does not go there
                logits = eager(page, attention_mask=real).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", ["global", "split"])
def test_attention_to_the_whole_page_equals_the_operator_bit_for_bit(variant, padded, monkeypatch):
    model, page, real = tiny_heptapod(**VARIANTS[variant]), random_page(2, 17, 18), part_of_page(17, 18)
    kwargs = {"attention_mask": real.long()} if padded else {}
    kept = real if padded else torch.ones_like(real)
    with torch.no_grad():
        logits = model(page, **kwargs).logits
        by_operator = lambda self, q, k, v, mask, dropout: heptapod_blocks.local_attention(
            q, k, v, None, padding_mask=real if padded else None
        )
        monkeypatch.setattr(heptapod_blocks.HeptapodAttention, "_global_attention", by_operator)
        assert torch.equal(model(page, **kwargs).logits[kept], logits[kept])


@pytest.mark.parametrize("variant", ["global", "split"])
def test_a_page_of_padding_alone_has_finite_gradients(variant, monkeypatch):
    """No attention is asked for a softmax of nothing, which not every backend has."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask, **kwargs):
        assert attn_mask.any(-1).all()
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, page, real = tiny_heptapod(**VARIANTS[variant]).train(), random_page(2, 5, 6), part_of_page(5, 6)
    real[1] = False
    model(page, attention_mask=real.long(), labels=page).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.fixture
def registered():
    """An attention function of one's own under the name "ours", and its calls."""
    calls = []

    def attend(attention, query, key, value, attention_mask, **kwargs):
        calls.append((query, attention_mask, kwargs))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](attention, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("ours", attend)
    AttentionMaskInterface.register("ours", sdpa_mask)
    yield calls
    del AttentionInterface._global_mapping["ours"], AttentionMaskInterface._global_mapping["ours"]


@pytest.mark.parametrize("variant, heads", [("default", []), ("global", [4, 4]), ("split", [1, 1])])
def test_registered_attention_functions(variant, heads, registered):
    """They get the heads that attend to the whole page, with a mask of their own kind; no other head."""
    model, page, real = tiny_heptapod(**VARIANTS[variant]), random_page(2, 17, 18), part_of_page(17, 18)
    with torch.no_grad():
        expected = model(page).logits, model(page, attention_mask=real.long()).logits[real]
        model.set_attn_implementation("ours")
        torch.testing.assert_close(model(page).logits, expected[0])
        assert [query.shape for query, mask, _ in registered] == [(2, n, 17 * 18, 8) for n in heads]
        assert all(mask is None for _, mask, _ in registered)
        registered.clear()
        torch.testing.assert_close(model(page, attention_mask=real.long()).logits[real], expected[1])
        expanded = real.flatten(1)[:, None, None, :].expand(2, 1, 17 * 18, -1)
        assert len(registered) == len(heads) and all(torch.equal(mask, expanded) for _, mask, _ in registered)
        assert all(kwargs == {"dropout": 0.0, "scaling": 8**-0.5} for _, _, kwargs in registered)


@pytest.mark.parametrize("use_attention", [use_flex_attention, use_flash_attention])
@pytest.mark.parametrize("padded", [False, True])
def test_every_attention_implementation_is_the_same(padded, use_attention, monkeypatch):
    model, page, real = tiny_heptapod(**VARIANTS["split"]).double(), random_page(2, 17, 18), part_of_page(17, 18)
    assert model._supports_flash_attn and model._supports_flex_attn
    kwargs = {"attention_mask": real.long()} if padded else {}
    kept = real if padded else torch.ones_like(real)
    with torch.no_grad():
        expected = model(page, **kwargs).logits[kept]
        use_attention(model, monkeypatch)
        torch.testing.assert_close(model(page, **kwargs).logits[kept], expected, rtol=1e-9, atol=1e-9)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_tied_weights_are_one_tensor():
    model = tiny_heptapod(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tiny_heptapod().lm_head.weight is not tiny_heptapod().model.embed_tokens.weight


@pytest.mark.parametrize("variant", ["default", "feedback", "neighbors"])
def test_loading_does_not_change_weights(variant, tmp_path):
    model = tiny_heptapod(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = HeptapodForMaskedLM.from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    page = random_page(1, 4, 5)
    assert torch.equal(loaded(page).logits, model(page).logits)


def test_optional_weights_exist_where_asked_for():
    names = {name for name, _ in tiny_heptapod().named_parameters()}
    assert not any("self_conditioning" in name or "neighbor" in name for name in names)
    assert hasattr(tiny_heptapod(**VARIANTS["feedback"]), "self_conditioning_proj")
    assert len(tiny_heptapod(**VARIANTS["neighbors"]).neighbor_projs) == 4


# --- bad input -------------------------------------------------------------------------------------------------------

PAGE = torch.zeros(1, 2, 3, dtype=torch.long)
EMBEDS = torch.zeros(1, 2, 3, 32)

BAD_INPUTS = {
    "float ids": ({"input_ids": PAGE.float()}, TypeError, "input_ids"),
    "ids without batch": ({"input_ids": PAGE[0, 0]}, ValueError, "input_ids"),
    "one axis too many": ({"input_ids": PAGE[None]}, ValueError, "input_ids"),
    "no rows": ({"input_ids": PAGE[:, :0]}, ValueError, r"input_ids.*\[1, 0, 3\]"),
    "ids beyond the vocabulary": ({"input_ids": PAGE + 20}, ValueError, "input_ids.*20"),
    "negative ids": ({"input_ids": PAGE - 1}, ValueError, "input_ids.*-1"),
    "neither": ({}, ValueError, "input_ids.*inputs_embeds"),
    "both": ({"input_ids": PAGE, "inputs_embeds": EMBEDS}, ValueError, "input_ids.*inputs_embeds"),
    "embeds of another dtype": ({"inputs_embeds": EMBEDS.long()}, TypeError, "inputs_embeds"),
    "embeds of another width": ({"inputs_embeds": EMBEDS[..., :31]}, ValueError, "inputs_embeds.*31"),
    "no cells": ({"inputs_embeds": EMBEDS[:, :, :0]}, ValueError, "inputs_embeds"),
    "flat without a size": ({"input_ids": PAGE[:, 0]}, ValueError, "3 cells.*grid_size"),
    "a size that does not fit": ({"input_ids": PAGE.flatten(1), "grid_size": (2, 2)}, ValueError, "2 x 2.*6 cells"),
    "a size that contradicts": ({"input_ids": PAGE, "grid_size": (3, 2)}, ValueError, r"\(3, 2\).*2 x 3"),
    "a size of three": ({"input_ids": PAGE, "grid_size": (1, 2, 3)}, ValueError, "`grid_size`.*height"),
    "a negative size": (
        {"input_ids": PAGE.flatten(1), "grid_size": (-2, -3)},
        ValueError,
        "`grid_size` must be a height",
    ),
    "a size of floats": (
        {"input_ids": PAGE.flatten(1), "grid_size": (2.0, 3)},
        ValueError,
        "`grid_size` must be a height",
    ),
    "a size of one number": (
        {"input_ids": PAGE.flatten(1), "grid_size": 6},
        ValueError,
        "`grid_size` must be a height",
    ),
    "short mask": ({"input_ids": PAGE, "attention_mask": PAGE[:, :1]}, ValueError, "attention_mask"),
    "flat mask": ({"input_ids": PAGE, "attention_mask": PAGE.flatten(1)}, ValueError, "attention_mask"),
}


@pytest.mark.parametrize("head", ["HeptapodModel", "HeptapodForMaskedLM"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gives_an_error_that_names_it(head, case):
    inputs, error, match = BAD_INPUTS[case]
    with pytest.raises(error, match=match):
        tiny_heptapod(head)(**inputs)


BAD_LABELS = {
    "float labels": (PAGE.float(), TypeError, "`labels`.*float"),
    "short labels": (PAGE[:, :1], ValueError, "`labels`"),
    "flat labels": (PAGE.flatten(1), ValueError, "`labels`"),
    "labels beyond the vocabulary": (PAGE + 20, ValueError, "`labels`.*20"),
    "labels of -1": (PAGE - 1, ValueError, "`labels`.*-1"),
    "the mask token": (PAGE + MASK, ValueError, "`labels`.*mask token.*18"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_give_an_error_that_names_them(case):
    labels, error, match = BAD_LABELS[case]
    with pytest.raises(error, match=match):
        tiny_heptapod()(PAGE, labels=labels)


def test_pages_that_are_masked_already_are_named():
    """A batch of the usual collator for masked language models, which would be masked twice."""
    page, model = random_page(1, 4, 5), tiny_heptapod()
    seen = torch.where(page > 9, MASK, page)
    labels = page.masked_fill(page <= 9, -100)
    with pytest.raises(ValueError, match="`labels` must be `input_ids` where they are not -100, but 20 of 20 differ"):
        model(page, labels=(page + 1) % MASK)
    for call in (model, model.elbo):
        with pytest.raises(ValueError, match=f"`input_ids` hold the mask token .{MASK}.*masks it itself"):
            call(seen, labels=labels)
    with pytest.raises(ValueError, match="`input_ids` hold the mask token"):
        model.elbo(seen)
    with pytest.raises(ValueError, match="`labels` hold the mask token"):
        model.elbo(page, labels=seen)
    assert model(seen, labels=page.masked_fill(page > 9, -100)).loss > 0  # masked cells that do not count may be there


def test_labels_need_a_mask_token():
    model = tiny_heptapod(mask_token_id=None)
    assert model(PAGE).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"`labels`.*mask_token_id"):
        model(PAGE, labels=PAGE)


def test_bad_previous_logits():
    logits = torch.zeros(1, 2, 3, 20)
    with pytest.raises(ValueError, match=r"`self_conditioning_logits`.*self_conditioning"):
        tiny_heptapod()(PAGE, self_conditioning_logits=logits)
    model = tiny_heptapod(**VARIANTS["feedback"])
    for wrong in (logits[..., :19], logits[:, :1], logits.flatten(1, 2)):
        with pytest.raises(ValueError, match=r"`self_conditioning_logits`.*\[1, 2, 3, 20\]"):
            model(PAGE, self_conditioning_logits=wrong)


def test_public_classes_are_what_they_say():
    for cls in (HeptapodModel, HeptapodForMaskedLM):
        assert cls.config_class.model_type == "heptapod" and cls.__doc__
