"""`torch.compile` on inputs of varying lengths: one graph for the first, one more for all others, as for GPT-2."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel

from tests import tiny_hierarchical_lm, tiny_leap, tiny_multigrid


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


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
                outputs = run(**inputs)
                if train:
                    outputs.loss.backward()
                results.append([outputs.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return graphs.frame_count


def text(length):
    return {"input_ids": tiny_leap.random_ids(2, length)}


@pytest.mark.slow
def test_the_peer():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, resid_pdrop=0.0, embd_pdrop=0.0))
    assert compilations(model, text, train=False) == 2


@pytest.mark.parametrize("train", [False, True], ids=["no-grad", "training"])
@pytest.mark.parametrize(
    "variant",
    [name if name == "plain-scale" else pytest.param(name, marks=pytest.mark.slow) for name in LEAP],
)
def test_leap(variant, train):
    """Without gradients each pass also fills a cache."""
    assert compilations(tiny_leap.tiny_leap(**LEAP[variant]), text, train) == 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "decay", "additive"])
def test_bidirectional_leap(variant):
    model = tiny_leap.tiny_leap("LeapForMaskedLM", **LEAP[variant])
    assert compilations(model, text, train=True) == 2


@pytest.mark.parametrize("train", [False, True], ids=["no-grad", "training"])
@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow) for name in MULTIGRID if "lstm" not in name],
)
def test_multigrid(variant, train):
    model = tiny_multigrid.tiny_multigrid(**MULTIGRID[variant])
    assert compilations(model, lambda length: tiny_multigrid.random_grid(model, 2, length), train) == 2


@pytest.mark.parametrize("train", [False, True], ids=["no-grad", "training"])
@pytest.mark.parametrize(
    "variant",
    [name if name == "two" else pytest.param(name, marks=pytest.mark.slow) for name in HIERARCHICAL],
)
def test_hierarchical_lm(variant, train):
    """Without gradients each pass also fills a cache. A text of one step, or one block of losses, is another program."""
    model = tiny_hierarchical_lm.tiny_hierarchical_lm(**HIERARCHICAL[variant], num_hidden_layers=1)
    one_step, one_block = max(model.config.strides) > min(LENGTHS), variant == "losses" and train
    expected = 3 if one_step or one_block else 2
    assert compilations(model, text, train) == expected


@pytest.mark.slow
def test_hierarchical_lm_with_batches_of_varying_sizes():
    model = tiny_hierarchical_lm.tiny_hierarchical_lm(**HIERARCHICAL["two"], num_hidden_layers=1)

    def rows(number):
        return {"input_ids": tiny_hierarchical_lm.random_ids(number, 40)}

    assert compilations(model, rows, train=False, sizes=(2, 3, 5, 4, 7)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant", "train"),
    [
        ("leap", "default", True),
        ("leap", "plain-scale", False),
        ("multigrid", "axes", False),
        ("hierarchical", "stride", True),
        ("hierarchical", "two", False),
    ],
)
def test_the_default_compiler_takes_open_lengths(family, variant, train):
    """It asks more of sizes than the graphs alone do."""
    torch.use_deterministic_algorithms(False)
    inputs = text
    if family == "leap":
        model = tiny_leap.tiny_leap(**LEAP[variant])
    elif family == "hierarchical":
        model = tiny_hierarchical_lm.tiny_hierarchical_lm(**HIERARCHICAL[variant], num_hidden_layers=1)
    else:
        model = tiny_multigrid.tiny_multigrid(**MULTIGRID[variant])
        inputs = partial(tiny_multigrid.random_grid, model, 2)
    assert compilations(model, inputs, train, sizes=(40, 57, 19), backend="inductor") == 2
