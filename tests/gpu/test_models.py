"""All families on a CUDA device: they compute what they compute on a CPU, and train, compile and generate."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import modeling_heptapod
from tests import tiny_heptapod, tiny_hierarchical_lm, tiny_leap, tiny_multigrid
from tests.tiny import random_ids


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TINY = {
    "leap": (tiny_leap, tiny_leap.tiny_leap),
    "hierarchical_lm": (tiny_hierarchical_lm, tiny_hierarchical_lm.tiny_hierarchical_lm),
    "heptapod": (tiny_heptapod, tiny_heptapod.tiny_heptapod),
    "multigrid": (tiny_multigrid, tiny_multigrid.tiny_multigrid),
}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
HEADS = {
    "leap": modeling_heptapod.LeapForCausalLM,
    "hierarchical_lm": modeling_heptapod.HierarchicalLMForCausalLM,
    "heptapod": modeling_heptapod.HeptapodForMaskedLM,
    "multigrid": modeling_heptapod.MultiGridForCausalLM,
}
NAMES = [
    *(f"leap:{name}" for name in tiny_leap.VARIANTS),
    *(f"hierarchical_lm:{name}" for name in ("two", "stride", "merge-all", "cross")),
    *(f"heptapod:{name}" for name in ("default", "split", "feedback", "neighbors")),
    *(f"multigrid:{name}" for name in ("axes", "light", "leap", "lstm", "leap-factored")),
]
CAUSAL = [name for name in NAMES if not name.startswith("heptapod")]


@pytest.fixture(autouse=True)
def full_precision():
    """Products in float32, so that both devices agree."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def build(name):
    """A tiny model on the CPU and a batch with labels."""
    family, variant = name.split(":")
    module, make = TINY[family]
    model = make(**module.VARIANTS[variant])
    if family == "heptapod":
        batch = {"input_ids": module.random_page(2, 9, 11)}
    elif family == "multigrid":
        batch = module.random_grid(model, 2, 40)
    else:
        batch = {"input_ids": random_ids(2, 70)}
    labels = {"labels": batch["input_ids"].clone()}
    if family == "heptapod":
        batch["input_ids"][:, ::2, ::3] = module.MASK  # the loss would draw its own masks, differently on each device
    return model, {**batch, **labels}


def to_cuda(batch):
    return {name: value.cuda() for name, value in batch.items()}


def loss_of(model, batch):
    if batch["input_ids"].dim() == 2:
        return model(**batch).loss
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), batch["labels"].flatten())


def gradients(model, batch):
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_loss_logits_and_gradients_equal_those_of_the_cpu(name):
    model, batch = build(name)
    expected_loss, expected = gradients(model, batch)
    device = copy.deepcopy(model).cuda()
    loss, got = gradients(device, to_cuda(batch))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    batch.pop("labels")
    logits = model(**batch).logits
    torch.testing.assert_close(device(**to_cuda(batch)).logits.cpu(), logits, rtol=1e-4, atol=1e-4)
    assert got.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-7, msg=key)


@pytest.mark.parametrize("name", ["leap:default", "hierarchical_lm:two", "heptapod:default", "multigrid:axes"])
def test_bf16_autocast(name):
    model, batch = build(name)
    expected = loss_of(model, batch).item()
    model, batch = model.cuda().train(), to_cuda(batch)
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["leap:default", "hierarchical_lm:two", "heptapod:default", "multigrid:axes"])
def test_weights_in_low_precision(name, dtype):
    model, batch = build(name)
    expected = loss_of(model, batch).item()
    loss, grads = gradients(model.cuda().to(dtype), to_cuda(batch))
    assert loss == pytest.approx(expected, rel=5e-2)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation_equals_that_of_the_cpu(name):
    model, batch = build(name)
    batch.pop("labels")
    expected = model.generate(**batch, max_new_tokens=24, **GREEDY)
    got = model.cuda().generate(**to_cuda(batch), max_new_tokens=24, **GREEDY)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("name", ["leap:default", "hierarchical_lm:stride", "multigrid:plain", "multigrid:leap-plain"])
@pytest.mark.parametrize("how", ["left pads", "beams", "sampling"])
def test_generation_in_other_ways(name, how):
    family, variant = name.split(":")
    module, make = TINY[family]
    model = make(**module.VARIANTS[variant])
    ids = random_ids(3, 20)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 12, **GREEDY}
    if how == "left pads":
        batch["attention_mask"][0, :7] = 0
        batch["attention_mask"][2, :1] = 0
    elif how == "beams":
        options["num_beams"] = 3
    else:
        got = model.cuda().generate(**to_cuda(batch), **{**options, "do_sample": True})
        assert got.shape == (3, 32)
        return
    expected = model.generate(**batch, **options)
    assert torch.equal(model.cuda().generate(**to_cuda(batch), **options).cpu(), expected)


def test_static_cache_generates_the_same_tokens():
    model, batch = build("leap:default")
    batch.pop("labels")
    model, batch = model.cuda(), to_cuda(batch)
    expected = model.generate(**batch, max_new_tokens=24, **GREEDY)
    got = model.generate(**batch, max_new_tokens=24, cache_implementation="static", **GREEDY)
    assert torch.equal(got, expected)


def test_pages_are_filled():
    model, batch = build("heptapod:default")
    page = batch["input_ids"].cuda()
    out = model.cuda().generate(page)
    out = out if isinstance(out, torch.Tensor) else out.sequences
    given = page != tiny_heptapod.MASK
    assert torch.equal(out.view_as(page)[given], page[given]) and (out != tiny_heptapod.MASK).all()


@pytest.mark.parametrize("name", ["leap:default", "hierarchical_lm:two", "heptapod:default", "multigrid:axes"])
def test_a_compiled_training_step(name):
    model, batch = build(name)
    model, batch = model.cuda().train(), to_cuda(batch)
    loss, expected = gradients(model, batch)
    torch._dynamo.reset()
    compiled_loss, got = gradients(torch.compile(model), batch)
    assert compiled_loss == pytest.approx(loss, rel=1e-4)
    for key, grad in expected.items():
        key = key if key in got else f"_orig_mod.{key}"
        torch.testing.assert_close(got[key], grad, rtol=5e-3, atol=5e-3 * grad.abs().max().item() + 1e-6, msg=key)


@pytest.mark.parametrize("family", HEADS)
def test_one_training_step_of_the_base_configuration(family, capsys):
    path = CONFIGS / f"{family}-base"
    config = AutoConfig.from_pretrained(path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = HEADS[family](config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    if family == "heptapod":
        ids = torch.randint(0, 256, (4, 32, 80), device="cuda")
        batch = {"input_ids": ids, "labels": ids}
    else:
        ids = torch.randint(0, 256, (4, 1024), device="cuda")
        batch = {"input_ids": ids, "labels": ids}
        if family == "multigrid":
            sizes = config.axis_vocab_sizes
            batch["axis_ids"] = torch.stack([torch.randint(0, n, (4, 1024), device="cuda") for n in sizes], 1)
    losses = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() / 2**30
    with capsys.disabled():
        print(json.dumps({"base step": family, "peak_GiB": round(peak, 2), "losses": [round(x, 4) for x in losses]}))
    assert all(0 < loss < 2 * losses[0] for loss in losses)  # three steps on random tokens say no more
