"""Writing a page: given cells kept, mask_schedule, orders, distributions, options, on a model small enough to enumerate."""

import itertools
import json
import math
import re
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TextDiffusionStreamer,
)
from transformers.generation import RepetitionPenaltyLogitsProcessor
from transformers.modeling_outputs import MaskedLMOutput

from modeling_heptapod import HeptapodForMaskedLM
from modeling_heptapod.heptapod import generation_heptapod
from modeling_heptapod.heptapod.generation_config_heptapod import DEFAULTS, HeptapodGenerationConfig
from modeling_heptapod.heptapod.generation_heptapod import HeptapodGenerateOutput, HeptapodGenerationMixin
from modeling_heptapod.heptapod.samplers import (
    MASK_SCHEDULES,
    SAMPLERS,
    Sampler,
    num_masked_after,
    within_entropy_bound,
)
from tests.reference.grid_generation import schedule_left, write_page
from tests.tiny_heptapod import VARIANTS, random_page, tiny_heptapod


MASK, PAD, SYMBOLS = 7, 8, 7
EVERY_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)


class StubConfig(PreTrainedConfig):
    model_type = "heptapod-stub"
    vocab_size: int = 9
    mask_token_id: int | None = MASK
    pad_token_id: int | None = PAD
    grid_size: tuple[int, int] | None = None
    self_conditioning: bool = False


class Stub(HeptapodGenerationMixin, PreTrainedModel):
    """Logits that depend on all cells, their places, and on `self_conditioning_logits`; it remembers how it was called."""

    config: StubConfig
    config_class = StubConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, 12)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.lm_head = nn.Linear(12, config.vocab_size)
        self.calls = []
        self.post_init()

    def forward(self, input_ids, attention_mask=None, self_conditioning_logits=None, return_dict=None):
        self.calls.append((input_ids.clone(), attention_mask, self_conditioning_logits))
        assert len(self.calls) < 1000, "this page is never finished"
        here = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        here = here.unsqueeze(1)
        x = self.embed_tokens(input_ids).movedim(-1, 1) * here
        if self_conditioning_logits is not None:
            x = x + self_conditioning_logits[..., :1].softmax(1).movedim(-1, 1)
        mean = (x * here).sum((2, 3), keepdim=True) / here.sum((2, 3), keepdim=True)
        row = torch.arange(x.shape[2]).view(-1, 1) * 0.7
        column = torch.arange(x.shape[3]) * 1.3
        x = torch.tanh(self.conv(x) + mean + torch.sin(row + column))
        return MaskedLMOutput(logits=self.lm_head(x.movedim(1, -1)))


def stub(seed=0, **config):
    torch.manual_seed(seed)
    model = Stub(StubConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.lm_head.weight.mul_(0.6)
        model.lm_head.bias[-2:] = 5.0  # were they allowed, they would be everywhere
    return model


def prompts(batch=3, height=4, width=5, share=0.6, seed=1):
    """Pages of random symbols with other cells open in each row, `[batch, height, width]`."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randint(SYMBOLS, (batch, height, width), generator=generator)
    shares = share * torch.linspace(0.4, 1, batch).view(-1, 1, 1)
    return pages.masked_fill(torch.rand(pages.shape, generator=generator) < shares, MASK)


def details(model, pages, **options):
    return model.generate(pages, return_dict_in_generate=True, output_scores=True, output_history=True, **options)


REGIONS = {
    "top": (slice(0, 2), slice(None)),
    "bottom": (slice(4, 6), slice(None)),
    "middle": (slice(2, 4), slice(None)),
    "hole": (slice(2, 4), slice(2, 4)),
}


@EVERY_SAMPLER
@pytest.mark.parametrize("region", [*REGIONS, "frame", "all"])
def test_given_cells_never_change(sampler, region):
    model = stub()
    given = torch.randint(SYMBOLS, (2, 6, 6))
    is_masked = torch.ones(6, 6, dtype=torch.bool)
    if region == "frame":
        is_masked[2:4, 2:4] = False
    elif region != "all":
        is_masked[:] = False
        is_masked[REGIONS[region]] = True
    pages = given.masked_fill(is_masked, MASK)
    for options in (
        {},
        {"do_sample": True, "remask_threshold": 1.0},
        {"stability_threshold": 1, "max_denoising_steps": 3},
    ):
        before = pages.clone()
        out = details(model, pages, sampler=sampler, **options)
        assert torch.equal(pages, before)
        for step in (*out.history, out.sequences):
            assert torch.equal(step[:, ~is_masked], given[:, ~is_masked])
        assert (out.sequences[:, is_masked] < SYMBOLS).all()
        assert torch.equal(out.unmask_step >= 0, is_masked.expand(2, 6, 6))


@EVERY_SAMPLER
def test_a_page_without_open_cells_comes_back_without_a_call(sampler):
    model, pages = stub(), torch.randint(SYMBOLS, (2, 3, 4))
    out = details(model, pages, sampler=sampler)
    assert torch.equal(out.sequences, pages) and out.nfe == 0 and not model.calls
    assert (out.unmask_step == -1).all() and not out.scores.any() and torch.equal(out.history, pages[None])
    assert torch.equal(model.generate(pages, sampler=sampler), pages)


def test_entropies_add_up_to_the_bound_and_no_further():
    entropy = torch.tensor([[1.0, 0.5, 1.5, 9.0], [4.0, 5.0, 6.0, 7.0]])
    is_masked = torch.tensor([[True, True, True, False], [False, True, True, True]])
    chosen = within_entropy_bound(entropy, is_masked, 3.0)
    assert chosen.tolist() == [[True, True, True, False], [False, True, False, False]]
    assert within_entropy_bound(entropy, is_masked, 2.9)[0].tolist() == [True, True, False, False]


def test_counts_by_hand():
    open_after = lambda mask_schedule: [
        num_masked_after(i, torch.tensor([16, 3]), 4, mask_schedule).tolist() for i in range(4)
    ]
    assert open_after("cosine") == [[14, 2], [11, 1], [6, 0], [0, 0]]
    assert [num_masked_after(i, torch.tensor([10]), 3, "cosine").item() for i in range(3)] == [8, 5, 0]
    assert open_after("linear") == [[12, 2], [8, 1], [4, 0], [0, 0]]


def test_a_page_without_masked_tokens_warns(monkeypatch):
    warnings = []
    monkeypatch.setattr(generation_heptapod.logger, "warning_once", warnings.append)
    model, page = tiny_heptapod(), random_page(1, 4, 5)
    assert torch.equal(model.generate(page), page)
    assert any(f"no mask token ({model.config.mask_token_id})" in warning for warning in warnings)
    warnings.clear()
    page[0, 1, 2] = model.config.mask_token_id
    model.generate(page)
    assert not any("no mask token" in warning for warning in warnings)


@pytest.mark.parametrize("mask_schedule", MASK_SCHEDULES)
@pytest.mark.parametrize("max_denoising_steps", [1, 2, 3, 6, 7, 32])
def test_counts_fall_to_zero_in_the_iterations_given(mask_schedule, max_denoising_steps):
    num_masked = torch.arange(1, 200)
    left = torch.stack(
        [num_masked_after(i, num_masked, max_denoising_steps, mask_schedule) for i in range(max_denoising_steps)]
    )
    written = -left.diff(dim=0, prepend=num_masked[None])
    for row, n in enumerate(num_masked.tolist()):
        steps = min(n, max_denoising_steps)
        assert (written[:steps, row] >= 1).all() and not left[steps - 1 :, row].any()
        assert left[:steps, row].tolist() == [
            schedule_left(i, n, max_denoising_steps, mask_schedule) for i in range(steps)
        ]
        if mask_schedule == "linear":
            assert written[:steps, row].max() - written[:steps, row].min() <= 1


@pytest.mark.parametrize("mask_schedule", MASK_SCHEDULES)
@pytest.mark.parametrize("sampler", ["confidence", "random"])
def test_each_row_has_counts_of_its_own(sampler, mask_schedule):
    model, pages = stub(), prompts()
    pages[1] = torch.randint(SYMBOLS, (4, 5))
    pages[1, 0, :2] = MASK  # fewer cells than iterations
    out = details(model, pages, sampler=sampler, mask_schedule=mask_schedule, max_denoising_steps=4)
    num_masked = (pages == MASK).sum((1, 2))
    for row, n in enumerate(num_masked.tolist()):
        left = [n - int(((out.unmask_step[row] >= 0) & (out.unmask_step[row] <= i)).sum()) for i in range(4)]
        assert left == num_open_after_all(n, 4, mask_schedule), row
    assert out.nfe == 4 and [len(ids) for ids, _, _ in model.calls] == [3, 3, 2, 2]


def num_open_after_all(num_masked, max_denoising_steps, mask_schedule):
    return [schedule_left(i, num_masked, max_denoising_steps, mask_schedule) for i in range(max_denoising_steps)]


def predict_with(model, height, width):
    def predict(page):
        with torch.no_grad():
            return model(torch.tensor(page).view(1, height, width)).logits.flatten(0, 2).tolist()

    return predict


ORACLE_CASES = {
    "raster": {"sampler": "raster"},
    "cosine": {"sampler": "confidence", "max_denoising_steps": 6},
    "linear": {"sampler": "confidence", "mask_schedule": "linear", "max_denoising_steps": 5},
    "margin": {"sampler": "margin", "max_denoising_steps": 6},
    "margin one by one": {"sampler": "margin", "max_denoising_steps": 100},
    "one by one": {"sampler": "confidence", "max_denoising_steps": 100},
    "at once": {"sampler": "confidence", "max_denoising_steps": 1},
    "entropy_bound": {"sampler": "entropy_bound", "entropy_bound": 1.5},
    "entropy one by one": {"sampler": "entropy_bound", "entropy_bound": 0.0},
    "entropy in three": {"sampler": "entropy_bound", "entropy_bound": 0.5, "max_denoising_steps": 3},
    "raster reopened": {"sampler": "raster", "remask_threshold": 0.5},
    "reopened": {"sampler": "confidence", "max_denoising_steps": 6, "remask_threshold": 0.5},
    "one by one reopened": {"sampler": "confidence", "max_denoising_steps": 100, "remask_threshold": 0.7},
    "entropy reopened": {"sampler": "entropy_bound", "entropy_bound": 1.5, "remask_threshold": 0.6},
    "raster until stable": {"sampler": "raster", "stability_threshold": 1},
    "until stable for two": {"sampler": "confidence", "max_denoising_steps": 20, "stability_threshold": 2},
    "all together": {
        "sampler": "entropy_bound",
        "entropy_bound": 0.5,
        "max_denoising_steps": 9,
        "remask_threshold": 0.4,
        "stability_threshold": 2,
    },
}


@pytest.mark.parametrize("case", ORACLE_CASES)
def test_rows_of_a_batch_are_written_as_the_oracle_writes_them_alone(case):
    options, model = ORACLE_CASES[case], stub().double()
    pages = prompts(batch=4)
    out = details(model, pages, **options)
    longest = 0
    for row, page in enumerate(pages):
        oracle = write_page(predict_with(model, 4, 5), page.flatten().tolist(), MASK, {MASK, PAD}, **options)
        written, unmask_step, history = oracle
        assert out.sequences[row].flatten().tolist() == written, row
        assert out.unmask_step[row].flatten().tolist() == unmask_step, row
        assert out.history[: len(history), row].flatten(1).tolist() == history, row
        assert (out.history[len(history) :, row] == out.sequences[row]).all()
        longest = max(longest, len(history) - 1)
    assert out.nfe == longest == len(out.history) - 1


def test_the_oracle_cases_reopen_and_stop_early():
    """Otherwise the test above would say nothing about either."""
    pages = prompts(batch=4)
    for case, options in ORACLE_CASES.items():
        out = details(stub().double(), pages, **options)
        reopens = ((out.history[:-1] != MASK) & (out.history[1:] == MASK)).any()
        assert reopens == ("remask_threshold" in options), case
    full = details(stub().double(), pages, sampler="raster").nfe
    assert details(stub().double(), pages, **ORACLE_CASES["raster until stable"]).nfe < full


@EVERY_SAMPLER
@pytest.mark.parametrize("do_sample", [False, True])
def test_reopening_ends(sampler, do_sample):
    pages = prompts()
    num_masked = int((pages == MASK).sum((1, 2)).max())
    out = details(stub(), pages, sampler=sampler, do_sample=do_sample, remask_threshold=1.0, max_denoising_steps=9)
    assert (out.sequences < SYMBOLS).all() and out.nfe <= 2 * num_masked
    if sampler != "raster":
        assert out.nfe <= 9
    reopens = (out.history[:-1] != MASK) & (out.history[1:] == MASK)
    assert reopens.any() and reopens.sum(0).max() == 1


def test_noise_of_confidence_fades():
    """With Gumbel noise of scale 1 the first cell is drawn in proportion to its confidence; the last step has none."""
    model, rows = stub().double(), 4000
    page = torch.randint(SYMBOLS, (1, 3, 4), generator=torch.Generator().manual_seed(3))
    page[0, 0, 1] = page[0, 2, 2] = page[0, 1, 0] = MASK
    logits = model(page).logits[..., :SYMBOLS].log_softmax(-1)[page == MASK]
    confidence = logits.max(-1).values.exp()
    # Two steps of one cell and a third: half of the noise is left in the first of two, none in the second.
    options = {"max_denoising_steps": 3, "mask_schedule": "linear", "choice_temperature": 1.5, "seed": 0}
    out = details(model, page.expand(rows, -1, -1), **options)
    first = (out.unmask_step[page.expand(rows, -1, -1) == MASK].view(rows, 3) == 0).double().mean(0)
    expected = confidence / confidence.sum()
    assert ((first - expected).abs() < 4 * (expected * (1 - expected) / rows).sqrt()).all(), (first, expected)
    assert len({tuple(x) for x in out.unmask_step.flatten(1).tolist()}) == 6
    once = details(model, page, max_denoising_steps=1, choice_temperature=1e6, seed=0)
    assert torch.equal(once.sequences, details(model, page, max_denoising_steps=1).sequences)
    at_end = details(model, page.expand(64, -1, -1), max_denoising_steps=2, choice_temperature=1e6, seed=0)
    assert at_end.nfe == 2 and len({tuple(x) for x in at_end.unmask_step.flatten(1).tolist()}) == 3


@pytest.mark.parametrize("sampler", ["confidence", "margin", "random"])
@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_remasking_by_chance_keeps_the_schedule(rate, sampler):
    rows, steps = 400, 5
    page = torch.full((1, 4, 5), MASK)
    page[0, 0] = torch.arange(5)
    pages = page.expand(rows, -1, -1)
    options = {"sampler": sampler, "mask_schedule": "linear", "max_denoising_steps": steps, "do_sample": True}
    out = details(stub(), pages, remask_rate=rate, seed=0, **options)
    is_masked = (out.history == MASK).flatten(2)  # [steps + 1, rows, cells]
    for step in range(steps):
        before, after = is_masked[step], is_masked[step + 1]
        remasked, generated = (~before & after).sum(1), 15 - before.sum(1)
        left = schedule_left(step, 15, steps, "linear")
        assert torch.equal(after.sum(1), remasked.clamp_min(left)), step
        chance = (left / generated.double().clamp_min(1)).clamp_max(rate) * (generated > 0)
        expected, deviation = (generated * chance).sum(), (generated * chance * (1 - chance)).sum().sqrt()
        assert (remasked.sum() - expected).abs() <= 4 * deviation, step
    assert out.nfe == steps and (is_masked[1:] & ~is_masked[:-1]).any(0).sum() > 0
    assert (out.sequences[:, 0] == page[:, 0]).all() and (out.sequences < SYMBOLS).all()
    twice = (is_masked[1:] & ~is_masked[:-1]).sum(0).max()
    assert twice > 1  # unlike below a threshold
    assert torch.equal(
        details(stub(), pages, remask_rate=0.0, seed=0, **options).history,
        details(stub(), pages, seed=0, **options).history,
    )


def test_temperatures_of_the_first_and_the_last_step():
    pages, model = torch.full((2, 4, 5), MASK), stub()
    options = {"do_sample": True, "max_denoising_steps": 4, "seed": 0}
    same = details(model, pages, temperature=[0.7, 0.7], **options)
    plain = details(model, pages, temperature=0.7, **options)
    assert torch.equal(same.sequences, plain.sequences) and torch.allclose(same.scores, plain.scores)
    out = details(model, pages, temperature=[1e-6, 1e6], **options)
    assert out.scores[out.unmask_step == 0].abs().max() < 1e-6  # the most probable token alone
    even = torch.full((), -math.log(SYMBOLS))
    assert torch.allclose(out.scores[out.unmask_step == 3], even, atol=1e-3)
    # In between it is in proportion to the steps, those of each row.
    pages[1] = 0
    pages[1, 0, :2] = MASK
    out = details(model, pages, temperature=[2.0, 0.5], **options)
    for row, steps in ((0, 4), (1, 2)):
        for step in range(steps):
            at, before = out.unmask_step[row] == step, out.history[step, row]
            logits = model(before[None]).logits[0][..., :SYMBOLS][at] / (2 - 1.5 * step / (steps - 1))
            expected = logits.log_softmax(-1).gather(1, out.sequences[row][at].unsqueeze(1)).squeeze(1)
            assert torch.allclose(out.scores[row][at], expected, atol=1e-5), (row, step)


@pytest.mark.parametrize("options", [{"sampler": "raster"}, {"sampler": "entropy_bound"}])
def test_options_that_a_sampler_does_not_read_are_errors(options):
    for name in ("choice_temperature", "remask_rate"):
        with pytest.raises(
            ValueError, match=f"`{name}` needs one of the samplers .*'confidence'.* 0.5 for '{options['sampler']}'"
        ):
            stub().generate(prompts(), **{name: 0.5}, **options)
    with pytest.raises(ValueError, match="`choice_temperature` needs one of the samplers .*'margin'"):
        stub().generate(prompts(), sampler="random", choice_temperature=0.5)
    with pytest.raises(ValueError, match="`temperature` of the first and the last step.*max_denoising_steps"):
        stub().generate(prompts(), do_sample=True, temperature=[1.0, 0.5], **options)
    stub().generate(prompts(), sampler="entropy_bound", max_denoising_steps=5, do_sample=True, temperature=[1.0, 0.5])


def test_the_confidence_map():
    pages, model = prompts(), stub()
    out = details(model, pages, sampler="raster")
    assert torch.allclose(out.confidence, out.scores.exp()) and (out.confidence[pages != MASK] == 1).all()
    assert (out.confidence[pages == MASK] < 1).all() and out.seconds > 0
    sampled = details(model, pages, sampler="raster", do_sample=True, temperature=0.2, seed=0)
    at = (sampled.unmask_step == 0) & (pages == MASK)
    logits = model(pages).logits[..., :SYMBOLS][at].softmax(-1)
    assert torch.allclose(
        sampled.confidence[at], logits.gather(1, sampled.sequences[at].unsqueeze(1)).squeeze(1), atol=1e-6
    )


def test_raster_is_reading_order():
    pages = prompts()
    out = details(stub(), pages, sampler="raster", max_denoising_steps=2)  # which raster has no use for
    for row, page in enumerate(pages):
        at = out.unmask_step[row][page == MASK]
        assert at.tolist() == list(range(len(at)))
    assert out.nfe == (pages == MASK).sum((1, 2)).max()


def test_finished_rows_are_left_out():
    model, pages = stub(), prompts()
    num_masked = (pages == MASK).sum((1, 2))
    model.generate(pages, sampler="raster")
    for iteration, (ids, attention_mask, _) in enumerate(model.calls):
        assert len(ids) == (num_masked > iteration).sum() and attention_mask is None


# ---- distributions


def enumerate_pages(model, order):
    """Probability of each page of 2 x 2 cells of 3 symbols, written in an order: `[3, 3, 3, 3]`, float64."""
    pages = torch.tensor(list(itertools.product(range(3), repeat=4)))
    log_probability = torch.zeros(len(pages), dtype=torch.float64)
    for step, cell in enumerate(order):
        prompt = pages.clone()
        prompt[:, list(order[step:])] = model.config.mask_token_id
        with torch.no_grad():
            logits = model(prompt.view(-1, 2, 2)).logits.double().flatten(1, 2)[:, cell, :3]
        log_probability += logits.log_softmax(-1).gather(1, pages[:, cell : cell + 1]).squeeze(1)
    return log_probability.exp().view(3, 3, 3, 3)


def chi_square(pages, expected):
    """Pearson's statistic of drawn pages `[n, 2, 2]` against the enumerated distribution."""
    cells = pages.flatten(1)
    index = (cells * torch.tensor([27, 9, 3, 1])).sum(1)
    observed = torch.bincount(index, minlength=81).double()
    expected = expected.flatten() * len(pages)
    return float(((observed - expected) ** 2 / expected).sum())


# 80 degrees of freedom: 99.9% of samples of the right distribution stay below.
CHI_SQUARE_999 = 124.84
ORDERS = list(itertools.permutations(range(4)))


def tiny_stub():
    model = stub(seed=3, vocab_size=5, mask_token_id=3, pad_token_id=4)
    with torch.no_grad():  # all 81 pages are probable enough to be counted
        model.lm_head.weight.mul_(0.4)
        model.lm_head.bias[:3].mul_(0.1)
    return model


def draw_pages(model, number=30000, **options):
    pages = torch.full((number, 2, 2), model.config.mask_token_id)
    return model.generate(pages, do_sample=True, seed=5, **options)


@pytest.mark.parametrize("mask_schedule", MASK_SCHEDULES)
def test_samples_at_one_cell_an_iteration_are_the_models_own_distribution(mask_schedule):
    model = tiny_stub()
    raster = enumerate_pages(model, range(4))
    averaged = sum(enumerate_pages(model, order) for order in ORDERS) / len(ORDERS)
    assert raster.sum().item() == pytest.approx(1) and 30000 * min(raster.min(), averaged.min()) > 5

    in_raster_order = draw_pages(model, sampler="raster")
    in_random_order = draw_pages(model, sampler="random", mask_schedule=mask_schedule, max_denoising_steps=4)
    assert chi_square(in_raster_order, raster) < CHI_SQUARE_999
    assert chi_square(in_random_order, averaged) < CHI_SQUARE_999
    # The test can tell: another order, and all cells at once, are other distributions.
    assert chi_square(in_random_order, raster) > 2 * CHI_SQUARE_999
    assert chi_square(in_raster_order, averaged) > 2 * CHI_SQUARE_999
    at_once = draw_pages(model, sampler="random", max_denoising_steps=1)
    assert chi_square(at_once, averaged) > 2 * CHI_SQUARE_999


def test_random_orders_are_uniform():
    model = tiny_stub()
    out = model.generate(
        torch.full((24000, 2, 2), 3), sampler="random", max_denoising_steps=4, seed=2, return_dict_in_generate=True
    )
    orders = out.unmask_step.flatten(1).tolist()
    observed = torch.tensor([orders.count(list(order)) for order in ORDERS]).double()
    assert observed.sum() == 24000
    assert ((observed - 1000) ** 2 / 1000).sum() < 49.73  # 23 degrees of freedom, 99.9%


def test_scores_of_a_raster_page_add_up_to_its_probability():
    model = tiny_stub()
    raster = enumerate_pages(model, range(4))
    pages = torch.full((50, 2, 2), 3)
    out = details(model, pages, sampler="raster", do_sample=True)
    for page, scores in zip(out.sequences.flatten(1).tolist(), out.scores):
        assert scores.sum().exp().item() == pytest.approx(raster[tuple(page)].item(), rel=1e-4)


def top_p(probabilities, share):
    """The fewest symbols that make up a share, the others without a chance."""
    order = probabilities.argsort(descending=True)
    kept = order[: int((probabilities[order].cumsum(0) < share).sum()) + 1]
    only = torch.zeros_like(probabilities).index_copy(0, kept, probabilities[kept])
    return only / only.sum()


@pytest.mark.parametrize(
    "options, shape, left",
    [
        ({"temperature": 2.0}, lambda x: (x / 2).softmax(-1), 3),
        ({"temperature": 0.5}, lambda x: (x * 2).softmax(-1), 3),
        ({"top_k": 2}, lambda x: x.masked_fill(x == x.min(), -torch.inf).softmax(-1), 2),
        ({"top_k": 2, "temperature": 3.0}, lambda x: (x.masked_fill(x == x.min(), -torch.inf) / 3).softmax(-1), 2),
        ({"top_p": 0.6}, lambda x: top_p(x.softmax(-1), 0.6), 2),
        ({"top_p": 0.6, "temperature": 0.2}, lambda x: top_p((x * 5).softmax(-1), 0.6), 1),
    ],
)
def test_what_is_drawn_is_shaped_as_told(options, shape, left):
    model = tiny_stub()
    with torch.no_grad():
        expected = shape(model(torch.full((1, 1, 1), 3)).logits[0, 0, 0, :3].double())
    assert (expected > 0).sum() == left
    out = details(model, torch.full((20000, 1, 1), 3), do_sample=True, seed=1, **options)
    observed = out.sequences.flatten().bincount(minlength=3).double()
    assert not observed[expected == 0].any()
    likely = expected > 0
    statistic = ((observed - 20000 * expected)[likely] ** 2 / (20000 * expected[likely])).sum()
    assert statistic < 13.8  # 2 degrees of freedom, 99.9%
    torch.testing.assert_close(out.scores.flatten().exp().double(), expected[out.sequences.flatten()])


@EVERY_SAMPLER
def test_narrow_sampling_is_greedy(sampler):
    model, pages = stub(), prompts()
    how = {"sampler": sampler, "max_denoising_steps": 1 if sampler == "random" else 5}
    greedy = partial(model.generate, pages, **how)
    expected = greedy()
    for narrow in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(greedy(do_sample=True, **narrow), expected)
    warped, plain = details(model, pages, temperature=9.0, top_k=2, top_p=0.1, **how), details(model, pages, **how)
    assert torch.equal(warped.sequences, expected)  # without sampling they do nothing
    assert torch.equal(warped.scores, plain.scores)
    assert not torch.equal(greedy(do_sample=True), expected)


@pytest.mark.parametrize("sampler", ["confidence", "entropy_bound"])
def test_the_order_does_not_depend_on_the_warpers(sampler):
    """With top_k=1 each draw has probability 1 and no entropy: no cell would be surer than another, or doubtful."""
    how = {"sampler": sampler, "max_denoising_steps": 5, "entropy_bound": 1.5, "remask_threshold": 0.5}
    model, pages = stub(), prompts()
    expected = details(model, pages, **how)
    out = details(model, pages, do_sample=True, top_k=1, **how)
    assert torch.equal(out.history, expected.history) and torch.equal(out.unmask_step, expected.unmask_step)
    assert ((out.history[:-1] != MASK) & (out.history[1:] == MASK)).any()
    assert not out.scores.any()  # drawn with certainty
    assert (expected.scores[pages == MASK] < 0).all()


# ---- padding


@EVERY_SAMPLER
def test_cells_off_the_page_are_never_written(sampler):
    model = stub()
    small, large = prompts(1, 2, 3, share=2.0), prompts(1, 4, 5, share=2.0)
    pages = torch.full((2, 4, 5), PAD)
    mask = torch.zeros(2, 4, 5, dtype=torch.long)
    pages[0, :2, :3], pages[1], mask[0, :2, :3], mask[1] = small, large, 1, 1
    pages[0, 3, 3] = MASK  # not a hole: it is off the page
    out = details(model, pages, attention_mask=mask, sampler=sampler, max_denoising_steps=4, remask_threshold=0.3)
    assert torch.equal(out.sequences[mask == 0], pages[mask == 0])
    assert (out.unmask_step[mask == 0] == -1).all()
    assert (out.sequences[mask == 1] < SYMBOLS).all()
    if sampler != "random":
        how = {"sampler": sampler, "max_denoising_steps": 4, "remask_threshold": 0.3}
        assert torch.equal(out.sequences[:1, :2, :3], model.generate(small, **how))
        assert torch.equal(out.sequences[1:], model.generate(large, **how))
    assert torch.equal(
        model.generate(pages, attention_mask=mask.bool(), sampler="raster"),
        model.generate(pages, attention_mask=mask.int(), sampler="raster"),
    )


def test_pads_without_a_mask_are_an_error():
    pages = prompts()
    pages[0, 3] = PAD
    with pytest.raises(ValueError, match=f"padding token {PAD}.*attention_mask"):
        stub().generate(pages)
    assert stub(pad_token_id=None).generate(pages).shape == pages.shape


# ---- the model itself


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_grid_model_writes_as_the_oracle(variant):
    model = tiny_heptapod(**VARIANTS[variant]).double()
    mask, pad = model.config.mask_token_id, model.config.pad_token_id
    pages = random_page(3, 3, 4).masked_fill(prompts(3, 3, 4) == MASK, mask)
    options = {"sampler": "confidence", "max_denoising_steps": 4, "remask_threshold": 0.1}
    out = details(model, pages, **options)
    assert torch.equal(out.sequences[pages != mask], pages[pages != mask])
    for row, page in enumerate(pages):
        previous = None

        def predict(ids):
            nonlocal previous
            with torch.no_grad():
                feedback = {"self_conditioning_logits": previous} if previous is not None else {}
                logits = model(torch.tensor(ids).view(1, 3, 4), **feedback).logits
            previous = logits if model.config.self_conditioning else None
            return logits.flatten(0, 2).tolist()

        written, unmask_step, _ = write_page(predict, page.flatten().tolist(), mask, {mask, pad}, **options)
        assert out.sequences[row].flatten().tolist() == written
        assert out.unmask_step[row].flatten().tolist() == unmask_step


@pytest.mark.parametrize("variant", VARIANTS)
def test_pages_of_the_grid_model_do_not_depend_on_their_neighbours_in_a_batch(variant):
    model = tiny_heptapod(**VARIANTS[variant]).double()
    mask, pad = model.config.mask_token_id, model.config.pad_token_id
    small, large = random_page(1, 2, 3), random_page(1, 4, 5)
    small[0, :, 1] = large[0, 1:3, 1:3] = mask  # no cell far from given ones: some variants tell such cells not apart
    pages, here = torch.full((2, 4, 5), pad), torch.zeros(2, 4, 5, dtype=torch.long)
    pages[0, :2, :3], pages[1], here[0, :2, :3], here[1] = small, large, 1, 1
    for sampler in ("confidence", "entropy_bound", "raster"):
        how = {"sampler": sampler, "max_denoising_steps": 4, "entropy_bound": 3.0}
        out = model.generate(pages, attention_mask=here, **how)
        assert torch.equal(out[:1, :2, :3], model.generate(small, **how)), sampler
        assert torch.equal(out[1:], model.generate(large, **how)), sampler
        assert (out[here == 0] == pad).all()


@EVERY_SAMPLER
def test_half_precision(sampler):
    model = tiny_heptapod().bfloat16()
    pages = random_page(2, 4, 5)
    pages[:, 1:3] = model.config.mask_token_id
    out = details(model, pages, sampler=sampler, do_sample=True, temperature=0.7, top_p=0.9, remask_threshold=0.05)
    assert (out.sequences < model.config.mask_token_id).all() and out.scores.dtype == torch.float32
    assert torch.equal(out.sequences[:, [0, 3]], pages[:, [0, 3]])


def test_samples_of_the_grid_model_are_its_own_distribution():
    model = tiny_heptapod(vocab_size=5, mask_token_id=3, pad_token_id=4, hidden_size=16, initializer_range=0.3)
    with torch.no_grad():  # all 81 pages are probable enough to be counted, and not equally so
        model.lm_head.weight.mul_(0.4)
    raster = enumerate_pages(model, range(4))
    averaged = sum(enumerate_pages(model, order) for order in ORDERS) / len(ORDERS)
    assert 12000 * min(raster.min(), averaged.min()) > 5
    assert chi_square(draw_pages(model, 12000, sampler="raster"), raster) < CHI_SQUARE_999
    in_random_order = draw_pages(model, 12000, sampler="random", max_denoising_steps=4)
    assert chi_square(in_random_order, averaged) < CHI_SQUARE_999
    assert chi_square(in_random_order, raster) > 2 * CHI_SQUARE_999


# ---- options


class Forbid(LogitsProcessor):
    """No token of a set, in the columns of another; remembers what it was given."""

    def __init__(self, tokens, columns):
        self.tokens, self.columns, self.seen = tokens, columns, []

    def __call__(self, input_ids, scores, rows, columns):
        self.seen.append((input_ids, scores.clone(), rows, columns))
        there = torch.isin(columns, torch.tensor(self.columns))
        scores = scores.clone()
        scores[there[:, None] & torch.isin(torch.arange(scores.shape[1]), torch.tensor(self.tokens))] = -torch.inf
        return scores


@EVERY_SAMPLER
@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_processors_rule_cells(sampler, do_sample):
    model, pages = stub(), prompts()
    forbid = Forbid([0, 1, 2], [1, 3])
    out = model.generate(pages, logits_processor=[forbid], sampler=sampler, do_sample=do_sample, temperature=0.1)
    written = (pages == MASK) & torch.isin(torch.arange(5), torch.tensor([1, 3]))
    assert written.any() and (out[written] > 2).all()
    ids = model.calls[0][0]
    with torch.no_grad():
        logits = model(ids).logits
    for page, (seen, scores, rows, columns) in zip(ids, forbid.seen):  # the calls of the first iteration, row by row
        assert torch.equal(seen, page.flatten().expand(len(rows), -1)) and (page[rows, columns] == MASK).all()
        torch.testing.assert_close(scores[:, :SYMBOLS], logits[0, rows, columns][:, :SYMBOLS])
        assert (scores[:, [MASK, PAD]] == -torch.inf).all()
        logits = logits[1:]


def test_stock_processors_work_and_see_the_page():
    model, pages = stub(), prompts()
    penalised = model.generate(pages, sampler="raster", logits_processor=[RepetitionPenaltyLogitsProcessor(1e6)])
    for page in penalised[:, :1, :3].flatten(1):  # of seven symbols none comes twice where that can be helped
        assert len(page.unique()) > 1
    with pytest.raises(ValueError, match="logits_processor.*without any token"):
        model.generate(pages, logits_processor=[Forbid(list(range(SYMBOLS)), [0, 1, 2, 3, 4])])
    for bad in (Forbid([1], [0]), [3]):
        with pytest.raises(TypeError, match="logits_processor"):
            model.generate(pages, logits_processor=bad)


@EVERY_SAMPLER
def test_seeds_and_generators(sampler):
    model, pages = stub(), prompts()
    write = partial(model.generate, pages, sampler=sampler, do_sample=True, max_denoising_steps=4)
    state = torch.get_rng_state()
    first = write(seed=1)
    assert torch.equal(first, write(seed=1)) and not torch.equal(first, write(seed=2))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(first, write(generator=generator)) and not torch.equal(first, write(generator=generator))
    assert torch.equal(first, write(generator=torch.Generator().manual_seed(1), seed=2))  # the generator wins
    assert torch.equal(state, torch.get_rng_state())  # nothing was taken from the global one
    torch.manual_seed(4)
    by_global = write()
    assert not torch.equal(by_global, write())
    torch.manual_seed(4)
    assert torch.equal(by_global, write())
    with pytest.raises(TypeError, match="generator"):
        write(generator=1)


def test_stability_ends_a_row():
    class Settled(Stub):
        """Its first prediction is its last."""

        def forward(self, input_ids, **kwargs):
            self.calls.append(input_ids)
            return MaskedLMOutput(logits=self.table.expand(len(input_ids), -1, -1, -1))

    model = Settled(StubConfig())
    model.table = torch.randn(4, 5, 9)
    pages = prompts()
    expected = model.generate(pages, sampler="raster")
    for threshold in (1, 3):
        for sampler in SAMPLERS:
            out = details(model, pages, sampler=sampler, stability_threshold=threshold, entropy_bound=0.0)
            assert torch.equal(out.sequences, expected) and out.nfe == threshold + 1
    out = details(model, pages, sampler="raster", stability_threshold=3, remask_threshold=1.0)
    assert torch.equal(out.sequences, expected) and out.nfe == 4


@EVERY_SAMPLER
def test_self_conditioning_feeds_the_last_logits_back(sampler):
    model, pages = stub(self_conditioning=True), prompts()
    forward, outputs = model.forward, []

    def remember(**kwargs):
        outputs.append((kwargs["input_ids"], forward(**kwargs).logits))
        return MaskedLMOutput(logits=outputs[-1][1])

    model.forward = remember
    out = details(model, pages, sampler=sampler, max_denoising_steps=5)
    assert model.calls[0][2] is None
    for iteration in range(1, out.nfe):
        alive = (out.history[iteration] == MASK).any(-1).any(-1)
        before = (out.history[iteration - 1] == MASK).any(-1).any(-1)
        expected = outputs[iteration - 1][1][alive[before]]
        assert torch.equal(model.calls[iteration][2], expected)
        assert torch.equal(model.calls[iteration][0], out.history[iteration][alive])
    plain = stub()
    plain.generate(pages, sampler=sampler)
    assert all(previous is None for _, _, previous in plain.calls)


@EVERY_SAMPLER
def test_details_agree_with_each_other(sampler):
    pages = prompts()
    out = details(stub(), pages, sampler=sampler, do_sample=True, max_denoising_steps=5)
    assert isinstance(out, HeptapodGenerateOutput)
    assert out.history.shape == (out.nfe + 1, *pages.shape)
    assert torch.equal(out.history[0], pages) and torch.equal(out.history[-1], out.sequences)
    for iteration, page in enumerate(out.history):
        known = out.unmask_step < iteration
        assert torch.equal(page, torch.where(known, out.sequences, MASK))
    assert torch.equal(out.scores != 0, pages == MASK) and out.scores.dtype == torch.float32
    short = stub().generate(pages, sampler=sampler, return_dict_in_generate=True)
    assert short.scores is None and short.history is None and short.unmask_step is not None


def test_flat_and_empty_pages():
    model, pages = stub(), prompts()
    expected = model.generate(pages, sampler="raster")
    flat = model.generate(pages.flatten(1), height=4, width=5, sampler="raster")
    assert torch.equal(flat, expected.flatten(1))
    sized = stub(grid_size=(4, 5))
    out = details(sized, pages.flatten(1), sampler="raster")
    assert torch.equal(out.sequences, expected.flatten(1))
    assert out.unmask_step.shape == out.scores.shape == (3, 20) and out.history.shape[1:] == (3, 20)

    empty = torch.full((1, 4, 5), MASK)
    assert torch.equal(model.generate(height=4, width=5), model.generate(empty))
    assert torch.equal(sized.generate(), model.generate(empty))
    assert sized.generate(height=2).shape == (1, 2, 5) and model.generate(height=1, width=1).shape == (1, 1, 1)
    assert torch.equal(model.generate(pages, height=4), model.generate(pages))


class Drafts:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.put_values, self.drafts, self.ended = [], [], False

    def put(self, value):
        self.put_values.append(value)

    def put_draft(self, value):
        self.drafts.append(value)

    def end(self):
        self.ended = True


@EVERY_SAMPLER
def test_streaming_drafts(sampler):
    model, pages, streamer = stub(), prompts(), Drafts()
    out = details(model, pages, streamer=streamer, sampler=sampler, max_denoising_steps=5)
    assert torch.equal(out.sequences, details(stub(), pages, sampler=sampler, max_denoising_steps=5).sequences) or (
        sampler == "random"
    )
    prompt, page = streamer.put_values
    assert torch.equal(prompt, pages.flatten(1)) and torch.equal(page, out.sequences.flatten(1)) and streamer.ended
    assert len(streamer.drafts) == out.nfe
    for draft, before, after in zip(streamer.drafts, out.history, out.history[1:]):
        with torch.no_grad():
            likeliest = model(before).logits[..., :SYMBOLS].argmax(-1)
        assert torch.equal(draft, torch.where(after == MASK, likeliest, after).flatten(1))
    assert torch.equal(streamer.drafts[-1], page)


def test_a_streamer_without_drafts_and_a_page_without_holes():
    streamer = Drafts()
    pages = torch.randint(SYMBOLS, (1, 2, 3))
    stub().generate(pages, streamer=streamer)
    assert torch.equal(torch.cat(streamer.put_values), pages.flatten(1).expand(2, -1)) and streamer.ended
    assert not streamer.drafts


def test_transformers_diffusion_streamer(capsys):
    class Letters:
        def decode(self, ids, **kwargs):
            return "".join("abcdefg?_"[int(id)] for id in ids)

    model, pages = stub(), prompts(batch=1)
    out = details(model, pages, streamer=TextDiffusionStreamer(Letters(), skip_prompt=True), max_denoising_steps=4)
    printed = capsys.readouterr().out
    assert printed.count("\033[33m") == 4  # four drafts in yellow
    assert printed.endswith(Letters().decode(out.sequences.flatten()) + "\n") and "?" not in printed
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(prompts(), streamer=TextDiffusionStreamer(Letters()))


# ---- configuration


def test_options_are_saved_and_loaded_with_the_model(tmp_path):
    model, pages = stub(), prompts()
    assert type(model.generation_config) is HeptapodGenerationConfig
    model.generation_config = HeptapodGenerationConfig(
        sampler="entropy_bound", entropy_bound=0.7, temperature=0.5, seed=3
    )
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    del saved["transformers_version"]
    assert saved == {"sampler": "entropy_bound", "entropy_bound": 0.7, "temperature": 0.5, "seed": 3}

    loaded = Stub.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is HeptapodGenerationConfig
    assert loaded.generation_config == model.generation_config
    assert torch.equal(loaded.generate(pages), model.generate(pages, sampler="entropy_bound", entropy_bound=0.7))
    # What is not set comes from the model's own, and options of the call come first.
    same = loaded.generate(pages, generation_config=HeptapodGenerationConfig(entropy_bound=5.0))
    assert torch.equal(same, model.generate(pages, sampler="entropy_bound", entropy_bound=5.0))
    raster = details(loaded, pages, generation_config=HeptapodGenerationConfig(entropy_bound=5.0), sampler="raster")
    assert raster.nfe == (pages == MASK).sum((1, 2)).max()
    assert loaded.generation_config == model.generation_config  # a call leaves it as it is
    drawn = loaded.generate(pages, do_sample=True)
    assert torch.equal(drawn, loaded.generate(pages, do_sample=True))
    assert not torch.equal(drawn, loaded.generate(pages, do_sample=True, temperature=None))  # None: off


def test_loading_without_or_with_options_given(tmp_path):
    stub().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert Stub.from_pretrained(tmp_path).generation_config == HeptapodGenerationConfig()
    given = HeptapodGenerationConfig(max_denoising_steps=3)
    assert Stub.from_pretrained(tmp_path, generation_config=given).generation_config == given
    (tmp_path / "generation_config.json").write_text('{"num_beams": 4}')
    with pytest.raises(ValueError, match="num_beams"):
        Stub.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", [False, True])
def test_loading_with_fields_of_the_model_changed(auto, tmp_path):
    """The class itself hands the fields on to whoever loads the generation config; these are none of its business."""
    tiny_heptapod().save_pretrained(tmp_path)
    HeptapodGenerationConfig(max_denoising_steps=3).save_pretrained(tmp_path)
    cls = AutoModelForMaskedLM if auto else HeptapodForMaskedLM
    changes = {"hidden_dropout": 0.1, "self_conditioning": True, "output_attentions": True, "id2label": {0: "a"}}
    model = cls.from_pretrained(tmp_path, attn_implementation="eager", local_files_only=True, **changes)
    assert model.config.hidden_dropout == 0.1 and hasattr(model, "self_conditioning_proj")
    assert model.generation_config.to_diff_dict() == HeptapodGenerationConfig(max_denoising_steps=3).to_diff_dict()


def test_the_generation_config_is_looked_for_where_the_model_is(tmp_path):
    tiny_heptapod().save_pretrained(tmp_path / "inside")
    HeptapodGenerationConfig(max_denoising_steps=3).save_pretrained(tmp_path / "inside")
    model = HeptapodForMaskedLM.from_pretrained(tmp_path, subfolder="inside", hidden_dropout=0.1)
    assert model.generation_config.max_denoising_steps == 3


def test_options_of_loading_reach_the_generation_config(tmp_path, monkeypatch):
    tiny_heptapod().save_pretrained(tmp_path)
    how = {"revision": "v1", "token": "hf_none", "cache_dir": tmp_path / "cache", "local_files_only": True}
    given = {}
    load = classmethod(lambda cls, name, **kwargs: given.update(kwargs) or cls())
    monkeypatch.setattr(HeptapodGenerationConfig, "from_pretrained", load)
    HeptapodForMaskedLM.from_pretrained(tmp_path, **how)
    assert how.items() <= given.items()


def test_old_options_in_a_model_config_are_none_of_generation():
    config = tiny_heptapod().config
    config.top_k, config.do_sample = 5, True  # as config.json files of older versions hold them
    empty = HeptapodGenerationConfig().to_diff_dict()
    assert HeptapodGenerationConfig.from_model_config(config).to_diff_dict() == empty
    assert HeptapodForMaskedLM(config).generation_config.to_diff_dict() == empty


def test_a_config_of_another_class_counts_by_its_values():
    model, pages = stub(), prompts()
    stock = GenerationConfig(do_sample=True, temperature=0.7)
    expected = model.generate(pages, do_sample=True, temperature=0.7, seed=1)
    assert torch.equal(model.generate(pages, generation_config=stock, seed=1), expected)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(pages, generation_config=GenerationConfig(num_beams=2))
    with pytest.raises(TypeError, match="generation_config.*dict"):
        model.generate(pages, generation_config={"sampler": "raster"})


def test_trainer_can_align_special_tokens():
    config = HeptapodGenerationConfig()
    assert config.eos_token_id is config.bos_token_id is config.pad_token_id is None
    config.pad_token_id = 3
    assert HeptapodGenerationConfig(**config.to_diff_dict()) == config


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "spiral"}, "`sampler` must be one of .*raster.*'spiral'"),
        ({"mask_schedule": "cubic"}, "`mask_schedule` must be one of .*linear.*'cubic'"),
        ({"max_denoising_steps": 0}, "`max_denoising_steps` must be an integer of at least 1, got 0"),
        ({"max_denoising_steps": -3}, "`max_denoising_steps`"),
        ({"max_denoising_steps": 2.5}, "`max_denoising_steps`"),
        ({"max_denoising_steps": True}, "`max_denoising_steps`"),
        ({"entropy_bound": -0.1}, "`entropy_bound` must not be negative, got -0.1"),
        ({"entropy_bound": math.nan}, "`entropy_bound`"),
        ({"remask_threshold": 1.5}, "`remask_threshold` must be a probability"),
        ({"stability_threshold": 0}, "`stability_threshold`"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"temperature": "hot"}, "`temperature`"),
        ({"top_k": -1}, "`top_k`"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"top_p": 1.1}, "`top_p`"),
        ({"do_sample": "yes"}, "`do_sample`"),
        ({"seed": "1"}, "`seed`"),
        ({"num_beams": 4}, r"Unknown generation options \['num_beams'\]; there are .*max_denoising_steps"),
        ({"max_new_tokens": 4}, "max_new_tokens"),
        ({"temperature": math.inf}, "`temperature` must be positive and finite"),
        ({"temperature": [1.0, 0.0]}, "`temperature` must be positive"),
        ({"temperature": [1.0, 0.5, 0.2]}, "`temperature` must be positive.*, or two such numbers"),
        ({"choice_temperature": -1.0}, "`choice_temperature` must be finite and not negative"),
        ({"choice_temperature": math.inf}, "`choice_temperature`"),
        ({"remask_rate": 1.5}, "`remask_rate` must be a probability"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HeptapodGenerationConfig(**options)
    with pytest.raises(ValueError, match=message):
        stub().generate(prompts(), **options)


@pytest.mark.parametrize("option", DEFAULTS)
def test_every_option_has_a_default_and_a_check(option):
    default = DEFAULTS[option]
    assert getattr(HeptapodGenerationConfig(**{option: default}), option) == default
    assert HeptapodGenerationConfig(**{option: None}) == HeptapodGenerationConfig()
    for wrong in ([1], "unknown", -1):
        with pytest.raises(ValueError, match=f"`{option}` must .*{re.escape(repr(wrong))}"):
            HeptapodGenerationConfig(**{option: wrong})


def test_a_new_sampler_is_an_entry_of_the_table(monkeypatch):
    class Last(Sampler):
        def choose(self, is_masked, rows, step, prediction):
            return is_masked & (is_masked.flip(1).cumsum(1).flip(1) == 1)

    with pytest.raises(ValueError, match="`sampler` must be one of .*'last'"):
        stub().generate(prompts(), sampler="last")
    monkeypatch.setitem(SAMPLERS, "last", Last)
    pages = prompts()
    out = details(stub(), pages, sampler="last")
    for row, page in enumerate(pages):
        at = out.unmask_step[row][page == MASK]
        assert at.tolist() == list(range(len(at)))[::-1]


def test_a_new_mask_schedule_is_an_entry_of_the_table(monkeypatch):
    with pytest.raises(ValueError, match="`mask_schedule` must be one of .*'late'"):
        stub().generate(prompts(), mask_schedule="late")
    monkeypatch.setitem(MASK_SCHEDULES, "late", lambda num_masked, done, last: num_masked)
    num_masked = torch.tensor([9, 2, 0])
    left = [num_masked_after(step, num_masked, 4, "late").tolist() for step in range(4)]
    assert left == [[8, 1, 0], [7, 0, 0], [6, 0, 0], [0, 0, 0]]  # one token a step at least, all in the last one
    out = details(stub(), torch.full((1, 3, 3), MASK), mask_schedule="late", max_denoising_steps=4)
    assert out.unmask_step.flatten().sort().values.tolist() == [0, 1, 2, *[3] * 6]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"mask_token_id": None}, "`config.mask_token_id` is not set"),
        ({"mask_token_id": 9}, r"`config.mask_token_id` must be in the vocabulary \[0, 9\), got 9"),
        ({"mask_token_id": -1}, "`config.mask_token_id`"),
        ({"mask_token_id": PAD}, "must differ"),
    ],
)
def test_models_that_cannot_write_say_so(config, message):
    with pytest.raises(ValueError, match=message):
        stub(**config).generate(prompts())


PAGES = prompts()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "`height` and `width`"),
        ({"height": 3}, ValueError, "`height` and `width`"),
        ({"height": 0, "width": 3}, ValueError, "`height` must be an integer of at least 1, got 0"),
        ({"height": 3, "width": 2.0}, ValueError, "`width`"),
        ({"attention_mask": PAGES, "height": 3, "width": 3}, ValueError, "`attention_mask` was given without"),
        ({"input_ids": PAGES.tolist()}, TypeError, "`input_ids` must be a tensor, got list"),
        ({"input_ids": PAGES.float()}, TypeError, "`input_ids` must hold integers"),
        ({"input_ids": PAGES[0, 0]}, ValueError, r"`input_ids` must be \[batch, height, width\].*\[5\]"),
        ({"input_ids": PAGES.flatten(1)}, ValueError, "now None and None"),
        ({"input_ids": PAGES.flatten(1), "height": 5, "width": 5}, ValueError, r"now 5 and 5.*\[3, 20\]"),
        ({"input_ids": PAGES, "height": 5}, ValueError, r"differ from those of `input_ids` \[3, 4, 5\]"),
        (
            {"input_ids": PAGES, "attention_mask": PAGES[:, :2]},
            ValueError,
            r"`attention_mask`.*\[3, 4, 5\].*\[3, 2, 5\]",
        ),
        ({"input_ids": PAGES, "attention_mask": PAGES.float()}, TypeError, "`attention_mask` must hold integers"),
    ],
)
def test_bad_pages_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        stub().generate(**arguments)


def test_a_batch_of_no_pages_is_refused():
    with pytest.raises(ValueError, match=r"at least one page of at least one cell, got \[0, 3, 4\]"):
        details(stub(), torch.zeros(0, 3, 4, dtype=torch.long))
