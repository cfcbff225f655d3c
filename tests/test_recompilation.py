"""`torch.compile` on inputs of varying lengths: one graph for the first, one more for all others, as for GPT-2."""

from functools import partial

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_heptapod.heptapod import local_attention
from modeling_heptapod.heptapod.local_attention_cpu import takes
from modeling_heptapod.hierarchical_lm import hierarchical_block
from tests import tiny_heptapod, tiny_hierarchical_lm, tiny_leap, tiny_multigrid
from tests.tiny import mostly_slow


pytestmark = pytest.mark.usefixtures("fresh_compiler")

LENGTHS = (40, 57, 64, 33, 19, 90, 7)
LEAP, MULTIGRID = tiny_leap.VARIANTS, tiny_multigrid.VARIANTS
HIERARCHICAL = {
    **tiny_hierarchical_lm.VARIANTS,
    "losses": {
        **tiny_hierarchical_lm.VARIANTS["predict-all"],
        "reconstruction_loss_weight": 0.1,
        "prophet_loss_weight": 0.1,
        "quantized_prophet_loss_weight": 0.1,
        "prophet_codebook_size": 8,
        "prophet_codebook_dim": 4,
        "prophet_num_codebooks": 2,
        "next_latent_loss_weight": 0.1,
        "next_latent_rollouts": 2,
    },
}


def compilations(model, make_inputs, train, sizes=LENGTHS, backend="eager"):
    """Graphs compiled for inputs of all sizes, whose results must be those of eager mode."""
    graphs = CompileCounterWithBackend(backend)
    model = model.train(train)
    compiled = torch.compile(model, backend=graphs)
    for size in sizes:
        inputs = make_inputs(size)
        if train:
            inputs["labels"] = inputs["input_ids"]
        with torch.set_grad_enabled(train):
            results = []
            for run in (compiled, model):
                model.zero_grad()
                torch.manual_seed(0)
                outputs = run(**inputs)
                if train:
                    outputs.loss.backward()
                results.append([outputs.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return graphs.frame_count


def text(length):
    return {"input_ids": tiny_leap.random_ids(2, length)}


def page(size):
    return {"input_ids": tiny_heptapod.random_page(2, *size)}


@pytest.mark.slow
def test_the_peer():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, resid_pdrop=0.0, embd_pdrop=0.0))
    assert compilations(model, text, train=False) == 2


@pytest.mark.parametrize("train", mostly_slow([False, True], (True,)), ids=["no-grad", "training"])
@pytest.mark.parametrize("variant", mostly_slow(LEAP, ("plain-scale",)))
def test_leap(variant, train):
    """Without gradients each pass also fills a cache."""
    assert compilations(tiny_leap.tiny_leap(**LEAP[variant]), text, train) == 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "alibi", "additive"])
def test_bidirectional_leap(variant):
    model = tiny_leap.tiny_leap("LeapForMaskedLM", **LEAP[variant])
    assert compilations(model, text, train=True) == 2


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["no-grad", "training"])
@pytest.mark.parametrize("variant", [name for name in MULTIGRID if "lstm" not in name])
def test_multigrid(variant, train):
    model = tiny_multigrid.tiny_multigrid(**MULTIGRID[variant])
    assert compilations(model, lambda length: tiny_multigrid.random_grid(model, 2, length), train) == 2


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["no-grad", "training"])
def test_multigrid_with_packed_rows(train):
    model = tiny_multigrid.tiny_multigrid(**MULTIGRID["axes"])

    def packed(length):
        position_ids = torch.cat((torch.arange(5), torch.arange(length - 5))).expand(2, -1)
        return {**tiny_multigrid.random_grid(model, 2, length), "position_ids": position_ids}

    assert compilations(model, packed, train) == 2


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no-grad", "training"])
@pytest.mark.parametrize("variant", mostly_slow(HIERARCHICAL, ("two",)))
def test_hierarchical_lm(variant, train):
    """Without gradients each pass also fills a cache. A text of one step, or one block of losses, is another program."""
    model = tiny_hierarchical_lm.tiny_hierarchical_lm(**HIERARCHICAL[variant], num_hidden_layers=1)
    one_step, one_block = max(model.config.strides) > min(LENGTHS), variant == "losses" and train
    expected = 3 if one_step or one_block else 2
    assert compilations(model, text, train) == expected


@pytest.mark.slow
def test_hierarchical_lm_without_kernels(monkeypatch):
    monkeypatch.setattr(hierarchical_block, "has_kernel", lambda *_: False)
    model = tiny_hierarchical_lm.tiny_hierarchical_lm(**HIERARCHICAL["two"], num_hidden_layers=1)
    assert compilations(model, text, train=False) == 2


@pytest.mark.slow
def test_hierarchical_lm_with_batches_of_varying_sizes():
    model = tiny_hierarchical_lm.tiny_hierarchical_lm(**HIERARCHICAL["two"], num_hidden_layers=1)

    def rows(number):
        return {"input_ids": tiny_hierarchical_lm.random_ids(number, 40)}

    assert compilations(model, rows, train=False, sizes=(2, 3, 5, 4, 7)) == 2


# Windows of all rows, strips of rows, both in one model, tiles: sizes, and graphs for them. Whole tiles are one more.
GRIDS = {
    "whole": ({"attention_types": ["global", "global"]}, [(h, 8) for h in (5, 7, 12, 9, 37)], 2),
    "rows": ({"attention_types": ["local", "local"]}, [(h, 8) for h in (16, 37, 40, 20, 31)], 2),
    "small": ({"attention_types": ["local", "local"]}, [(h, 8) for h in (5, 7, 12, 9, 4)], 2),
    "dilated": ({}, [(h, 8) for h in (5, 12, 7, 16, 37, 11, 20, 3)], 4),
    "tiles": ({"attention_types": ["local", "local"]}, [(h, 40) for h in (40, 53, 37, 60)], 3),
    "tiles of any width": ({"attention_types": ["local", "local"]}, [(40, 40), (53, 47), (37, 61)], 2),
}


@pytest.fixture
def in_torch(monkeypatch):
    monkeypatch.setattr(local_attention, "has_kernel", lambda q, radius: False)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["no-grad", "training"])
@pytest.mark.parametrize("case", GRIDS)
def test_grids(case, train, in_torch):
    """One graph for each way to look around, not one a height."""
    options, sizes, expected = GRIDS[case]
    assert compilations(tiny_heptapod.tiny_heptapod(**options), page, train, sizes) == expected


@pytest.mark.skipif(not takes(torch.zeros(1, 1, 1, 1, 1), 0), reason="the C source is not compiled here")
def test_grids_of_all_sizes_with_a_kernel():
    model = tiny_heptapod.tiny_heptapod(attention_types=["local", "dilated"])
    assert compilations(model, page, train=True, sizes=((5, 8), (37, 40), (16, 9), (3, 50))) == 2


@pytest.mark.slow
def test_pages_of_unequal_height(in_torch):
    """The last rows of one are padding, and below both the last strip has rows that are not there."""

    def padded_page(height):
        mask = torch.ones(2, height, 8, dtype=torch.long)
        mask[1, height // 3 :] = 0
        return {**page((height, 8)), "attention_mask": mask}

    model = tiny_heptapod.tiny_heptapod(**GRIDS["rows"][0])
    assert compilations(model, padded_page, train=True, sizes=(37, 20, 31)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant", "train"),
    [
        ("leap", "default", True),
        ("leap", "plain-scale", False),
        ("multigrid", "axes", False),
        ("hierarchical", "stride", True),
        ("hierarchical", "two", False),
        ("grid", "rows", True),
        ("grid", "tiles", True),
    ],
)
def test_the_default_compiler_takes_open_lengths(family, variant, train, monkeypatch, in_torch):
    """It asks more of sizes than the graphs alone do."""
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # masks as eager mode draws them
    torch.use_deterministic_algorithms(False)
    inputs, sizes = text, (40, 57, 19)
    if family == "grid":
        options, sizes, _ = GRIDS[variant]
        model, inputs, sizes = tiny_heptapod.tiny_heptapod(**options), page, sizes[:3]
    elif family == "leap":
        model = tiny_leap.tiny_leap(**LEAP[variant])
    elif family == "hierarchical":
        model = tiny_hierarchical_lm.tiny_hierarchical_lm(**HIERARCHICAL[variant], num_hidden_layers=1)
    else:
        model = tiny_multigrid.tiny_multigrid(**MULTIGRID[variant])
        inputs = partial(tiny_multigrid.random_grid, model, 2)
    assert compilations(model, inputs, train, sizes, backend="inductor") == (3 if family == "grid" else 2)
