"""What scripts print and write of a run, against arithmetic of this file: bits, bytes, errors, speeds, steps, texts."""

import bz2
import contextlib
import hashlib
import io
import itertools
import json
import math
import re
import statistics
import sys
import time
from types import SimpleNamespace

import evaluate_model
import infill
import matplotlib.pyplot as plt
import model_card
import numpy as np
import objectives
import publish
import pytest
import sample
import sample_axes
import torch
import train
import training_callbacks
from corpora import build_tokenizer, encode
from corpus_streaming import StreamedExamples
from page_score import baselines, score_pages
from provenance import weights_digest
from run_report import bits_before, last_sample, precision_of, step_of_weights, text_loss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerState,
)

from modeling_heptapod import HeptapodProcessor
from tests.saved_models import PAGE, save_tiny, save_with_results
from tests.training import tiny_runs


# Of characters that take one to four bytes, so that bytes, characters and tokens are different numbers.
TEXT = "".join(f"Der {i}. Käfer saß für {i * i} € auf № {i % 7} \U0001f41e\n" for i in range(300))
OTHER = "".join(f"{i} Füchse, ein Wörterbuch und {3 * i} ½\n" for i in range(90))
BLOCK, BATCH, ACCUMULATED, STEPS, SEED = 32, 2, 3, 4, 7
WINDOW, STRIDE = 24, 10
CONFIG = {
    "model_type": "leap",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "window_sizes": [4],
}


def in_process(main, *arguments, **patches):
    """Run a script's `main` here, with parts of `train` replaced; what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        for name, value in patches.items():
            patch.setattr(training_callbacks if name == "time" else train, name, value)
        main()
    return printed.getvalue()


def train_in(folder, *more, **patches):
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "corpus.txt").write_bytes(TEXT.encode())
    options = {"config_name": folder / "config", "output_dir": folder / "out", "dataset_name": folder / "corpus.txt"}
    options |= {
        "tokenizer_name": "bpe",
        "vocab_size": 290,
        "block_size": BLOCK,
        "validation_split_percentage": 20,
        "seed": SEED,
    }
    options |= {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATED, "cache_dir": "none"}
    options |= {"max_steps": STEPS, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"learning_rate": 1e-2, "disable_tqdm": "true", "use_cpu": "true"}
    flags = itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())
    return in_process(train.main, *flags, *more, **patches)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Folder, results, what was printed, and what the curve was drawn of. Each step takes 0.25 s by the clock."""
    folder, drawn = tmp_path_factory.mktemp("learned"), []
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.25).__next__, time=time.time)
    printed = train_in(
        folder,
        *("--eval_on_start", "true", "--save_strategy", "no"),
        time=clock,
        plot_curve=lambda *arguments: drawn.append(arguments),
    )
    return folder / "out", json.loads((folder / "out" / "results.json").read_text(encoding="utf-8")), printed, drawn[0]


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    """A run in which each step makes the model worse, so that the best weights are not the last."""

    class ClimbingTrainer(train.ShardingTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for parameter in model.parameters():
                parameter.grad.neg_()
            return loss

    folder = tmp_path_factory.mktemp("climbed")
    best = ("--load_best_model_at_end", "true", "--save_strategy", "steps", "--save_steps", "1")
    printed = train_in(folder, *best, ShardingTrainer=ClimbingTrainer)
    return folder / "out", json.loads((folder / "out" / "results.json").read_text(encoding="utf-8")), printed


def split(text):
    """What is trained on and what is held out: from the first line behind four fifths of the characters on."""
    cut = text.index("\n", round(0.8 * len(text))) + 1
    return text[:cut], text[cut:]


def ids_of(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.eos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@torch.no_grad()
def bits_of_blocks(model, ids, num_bytes):
    """Bits per byte of blocks that share no context, token by token in float64."""
    model, nats = model.double().eval(), 0.0
    for start in range(0, len(ids) - 1, BLOCK - 1):
        block = torch.tensor([ids[start : start + BLOCK]])
        logs = model(block).logits[0].log_softmax(-1)
        nats -= sum(logs[place, token].item() for place, token in enumerate(block[0, 1:]))
    return nats / math.log(2) / num_bytes


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def number_behind(words, printed):
    return float(re.search(re.escape(words) + r"\s+([\d.]+)", printed)[1])


# --- train.py ----------------------------------------------------------------------------------------------------------


def test_bits_before_and_after_training_are_those_of_the_models(learned):
    folder, results, printed, _ = learned
    held_out = split(TEXT)[1]
    ids, num_bytes = ids_of(folder, held_out), len(held_out.encode())
    assert len({len(ids), len(held_out), num_bytes}) == 3  # tokens, characters, bytes
    after = bits_of_blocks(load(folder), ids, num_bytes)
    torch.manual_seed(SEED)
    before = bits_of_blocks(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), ids, num_bytes)
    assert before > after + 0.1
    figures = {"before training": before, "after training": after}
    figures["bz2 -9"] = 8 * len(bz2.compress(held_out.encode(), 9)) / num_bytes
    for words, expected in figures.items():
        assert number_behind(words, printed) == pytest.approx(expected, abs=6e-4)
    names = ("bits_per_byte_before", "bits_per_byte", "bits_per_byte_bz2")
    assert [results[name] for name in names] == pytest.approx(list(figures.values()), rel=1e-5)
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    logged = {entry["step"]: entry["eval_bits_per_byte"] for entry in history if "eval_bits_per_byte" in entry}
    assert [logged[0], logged[STEPS]] == pytest.approx([before, after], rel=1e-5)


def test_figures_of_a_run_are_those_of_its_text(learned):
    folder, results, printed, _ = learned
    trained_on, held_out = (part.encode() for part in split(TEXT))
    expected = {
        "dataset": "corpus.txt",
        "train_bytes": len(trained_on),
        "held_out_bytes": len(held_out),
        "held_out_sha256": hashlib.sha256(held_out).hexdigest(),
        "vocab_size": 290,
        "block_size": BLOCK,
        "parameters": sum(parameter.numel() for parameter in load(folder).parameters()),
        "steps": STEPS,
        "weights_of_step": STEPS,
        "resumed_at_step": None,
        "processes": 1,
        "tokens_per_step": BATCH * ACCUMULATED * BLOCK,
        "precision": "float32",
        "tokenizer": "bpe",
        "packing": "continuous",
        "tokens_per_example": BLOCK,
        "wrapper": "LeapForCausalLM",
        "threads": torch.get_num_threads(),
        "weights_sha256": weights_digest(folder),
    }
    assert {name: results[name] for name in expected} == expected
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    (runtime,) = [entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry]
    assert results["train_seconds"] == pytest.approx(runtime, abs=0.06)
    assert results["seconds_to_first_step"] > 0
    assert f"bits per byte on {len(held_out):,} held-out bytes" in printed
    assert f"{STEPS} steps in {results['train_seconds']:.0f} s, float32" in printed


def test_the_speed_of_a_run_is_in_tokens_a_second(learned):
    _, results, _, _ = learned
    assert results["tokens_per_second"] == pytest.approx(BATCH * ACCUMULATED * BLOCK / 0.25)


def test_the_curve_is_in_bits_per_byte(learned):
    """The loss is of tokens, of which the training text has fewer than bytes."""
    folder, _, _, (history, _, factor, _, names) = learned
    trained_on, _ = split(TEXT)
    predicted = len(ids_of(folder, trained_on)) - 1
    assert factor == pytest.approx(predicted / len(trained_on.encode()) / math.log(2))
    entry = next(entry for entry in history if "loss" in entry)
    assert text_loss(entry, names) == entry["loss"]


def test_the_curve_draws_what_was_logged(tmp_path, monkeypatch):
    """In bits per byte, each at its step, beside bz2; a run that was never evaluated has no line of held-out text."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_bits_per_byte": 5.0}]
    history.append({"step": 4, "eval_bits_per_byte": 4.5})
    for entries, expected in (
        (history, {"training batches": [(1, 6.0), (2, 4.0)], "held-out text": [(2, 5.0), (4, 4.5)]}),
        (history[:2], {"training batches": [(1, 6.0), (2, 4.0)]}),
        (history[2:], {"held-out text": [(2, 5.0), (4, 4.5)]}),
    ):
        train.plot_curve(entries, {"bits_per_byte_bz2": 2.5}, 2.0, tmp_path / "curve.png", [])
        drawn = {line.get_label(): list(zip(*line.get_data())) for line in plt.gca().lines}
        bz2_line = drawn.pop("bz2 -9 on the held-out text")
        assert drawn == expected and [bits for _, bits in bz2_line] == [2.5, 2.5]


def test_the_seconds_to_the_first_step_begin_with_the_process(capsys, monkeypatch):
    monkeypatch.setattr(training_callbacks.psutil, "Process", lambda: SimpleNamespace(create_time=lambda: 1000.0))
    clock = SimpleNamespace(time=iter([1012.3456, 1020.0]).__next__, perf_counter=lambda: 0.0)
    monkeypatch.setattr(training_callbacks, "time", clock)
    speed, state = training_callbacks.Speed(), SimpleNamespace(is_world_process_zero=True)
    for _ in range(2):
        speed.on_step_begin(None, state, None)
        speed.on_step_end(None, state, None)
    assert speed.seconds == 12.35 and capsys.readouterr().out == "seconds to the first step: 12.3\n"


def test_no_token_is_counted_twice_in_a_step(tmp_path):
    """A batch that is larger than the text holds all of it. The weights are cast after the training."""
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.25).__next__, time=time.time)
    more = ("--per_device_train_batch_size", 4000, "--max_steps", 3, "--save_strategy", "no")
    train_in(tmp_path, *more, "--eval_strategy", "no", "--bf16_full_eval", "true", time=clock)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    examples = (len(ids_of(tmp_path / "out", split(TEXT)[0])) - 1) // (BLOCK - 1)
    assert results["tokens_per_step"] == examples * BLOCK
    assert results["tokens_per_second"] == pytest.approx(examples * BLOCK / 0.25, abs=0.1)
    assert results["precision"] == "float32"


def test_figures_of_a_run_on_pages(tmp_path):
    """Cells, bits and errors of a grid that train.py trained: both units are of one sum, and the bound is that of its weights."""
    (tmp_path / "config").mkdir()
    config = {"model_type": "heptapod", **tiny_runs.CONFIGS["heptapod"]}
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    (tmp_path / "corpus.txt").write_bytes(TEXT.encode())
    options = {
        "config_name": tmp_path / "config",
        "output_dir": tmp_path / "out",
        "dataset_name": tmp_path / "corpus.txt",
    }
    options |= {
        "validation_split_percentage": 20,
        "per_device_train_batch_size": 4,
        "cache_dir": "none",
        "max_steps": 2,
    }
    options |= {"max_validation_bytes": 900, "save_strategy": "no", "disable_tqdm": "true", "use_cpu": "true"}
    printed = in_process(
        train.main, *itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    held_out = split(TEXT)[1].encode()[:900].decode(errors="ignore")
    height, width = config["grid_size"]
    rows = sum(-(-len(line.encode()) // width) for line in held_out.splitlines(keepends=True))
    cells = -(-rows // height) * height * width
    expected = {"page": [height, width], "held_out_cells": cells, "held_out_bytes": len(held_out.encode())}
    expected |= {"tokens_per_example": height * width, "tokens_per_step": 4 * height * width, "elbo_samples": 8}
    assert {name: results[name] for name in expected} == expected

    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    # Batches of eight pages, all drawn from one generator.
    pages, generator = torch.from_numpy(processor.paginate(held_out)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = [model.eval().elbo(some, num_samples=8, generator=generator) for some in pages.split(8)]
    bits = sum(each.nats.double().sum().item() for each in found) / math.log(2)
    error = math.sqrt(sum(each.standard_error.double().square().sum().item() for each in found)) / math.log(2)
    num_bytes = len(held_out.encode())
    figures = [results[name] for name in ("bits_per_byte", "bits_per_cell", "bits_per_byte_standard_error")]
    assert figures == pytest.approx([bits / num_bytes, bits / cells, error / num_bytes], rel=1e-4)
    error /= num_bytes
    words = f"  after training   {results['bits_per_byte']:.3f} +- {error:.3f} (an upper bound: the negative ELBO)"
    assert words in printed.splitlines() and 0 < error < 0.1 * results["bits_per_byte"]


def test_the_step_that_the_weights_are_of(climbed):
    folder, results, printed = climbed
    held_out = split(TEXT)[1]
    of_weights = bits_of_blocks(load(folder), ids_of(folder, held_out), len(held_out.encode()))
    assert (results["steps"], results["weights_of_step"]) == (STEPS, 1)
    assert [results["bits_per_byte"], number_behind("after training", printed)] == pytest.approx(
        [of_weights] * 2, abs=6e-4
    )
    assert results["bits_per_byte_before"] is None and "before training" not in printed
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "The weights are those of step 1, the best by the held-out text when they were saved." in card
    assert f"**{of_weights:.3f}**" in card


def test_the_step_that_the_weights_are_of_was_saved():
    """The best evaluation may be of a step that was not."""
    args, state = SimpleNamespace(load_best_model_at_end=True), TrainerState(global_step=40, best_global_step=30)
    assert step_of_weights(args, state) == 40
    state.best_model_checkpoint = "out/checkpoint-20"
    assert step_of_weights(args, state) == 20
    args.load_best_model_at_end = False
    assert step_of_weights(args, state) == 40


@pytest.mark.parametrize(
    ("options", "dtype", "expected"),
    [
        ({}, torch.float32, "float32"),
        ({}, torch.bfloat16, "bfloat16"),
        ({"bf16": True}, torch.float32, "bfloat16 autocast"),
        ({"fp16": True}, torch.float32, "float16 autocast"),
    ],
)
def test_the_precision_is_that_of_the_products(options, dtype, expected):
    args = SimpleNamespace(**{"bf16": False, "fp16": False, **options})
    assert precision_of(args, SimpleNamespace(dtype=dtype)) == expected


def test_figures_before_training_are_of_step_zero():
    later = {"step": 5, "eval_bits_per_byte": 2.0, "eval_loss": 1.0}
    start = {"step": 0, "eval_bits_per_byte": 8.0, "eval_loss": 5.0}
    assert bits_before([later]) is None
    assert bits_before([{"step": 0, "sample": "text"}, start, later]) == 8.0
    log = [{"step": 0, "sample": "first"}, start, {"step": 7, "sample": "last"}, later]
    assert last_sample(log) == {"step": 7, "text": "last"} and last_sample([start]) is None


# --- evaluate_model.py -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(learned, tmp_path_factory):
    """What evaluate_model.py wrote and printed of the trained folder and a text that it was not trained on."""
    other, output = tmp_path_factory.mktemp("other") / "other.txt", tmp_path_factory.mktemp("out") / "evaluation.json"
    other.write_bytes(OTHER.encode())
    options = ("--validation_split_percentage", "20", "--max_length", WINDOW, "--stride", STRIDE, "--batch_size", "3")
    printed = in_process(evaluate_model.main, learned[0], "--dataset_name", other, *options, "--output", output)
    return json.loads(output.read_text(encoding="utf-8")), printed


def test_the_text_that_is_named_is_the_one_that_is_measured(learned, measured):
    """Windows by hand, each token once, with the context that its window gives it."""
    results, printed = measured
    held_out = split(OTHER)[1]
    ids, num_bytes = ids_of(learned[0], held_out), len(held_out.encode())
    assert results["dataset"] == "other.txt" and "of other.txt" in printed
    assert results["held_out_sha256"] == hashlib.sha256(held_out.encode()).hexdigest()
    assert results["held_out_bytes"] == num_bytes and f"on {num_bytes:,} held-out bytes" in printed

    model, nats = load(learned[0]).double().eval(), []
    for place in range(1, len(ids)):
        start = math.ceil(max(place + 1 - WINDOW, 0) / STRIDE) * STRIDE
        with torch.no_grad():
            logs = model(torch.tensor([ids[start:place]])).logits[0, -1].log_softmax(-1)
        nats.append(-logs[ids[place]].item())
    bits = sum(nats) / math.log(2) / num_bytes
    assert results["sliding_window_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert float(re.search(r"([\d.]+) bits per byte with a sliding window", printed)[1]) == pytest.approx(
        bits, abs=6e-4
    )
    assert results["tokens"] == len(nats)
    how = {"window": WINDOW, "stride": STRIDE, "least_context": WINDOW - STRIDE, "text_pays_for_axes": False}
    assert {name: results[name] for name in how} == how
    assert results["generation"]["prompt_tokens"] == 6 and results["generation"]["new_tokens"] == 12
    assert results["model_type"] == "leap" and results["weights_sha256"] == weights_digest(learned[0])
    text = results["losses"]["text"]
    assert [text["nats_per_token"], text["bits_per_byte"]] == pytest.approx([statistics.mean(nats), bits], rel=1e-5)
    assert f"text: {statistics.mean(nats):.3f} nats per token, {bits:.3f} bits per byte" in printed

    # The error of a sum of stretches of a window each, whose share of the tokens is known.
    stretches = [nats[start : start + WINDOW] for start in range(0, len(nats), WINDOW)]
    residuals = [sum(stretch) - len(stretch) * statistics.mean(nats) for stretch in stretches]
    error = math.sqrt(len(stretches) / (len(stretches) - 1) * sum(x * x for x in residuals))
    error = error / math.log(2) / num_bytes
    assert results["standard_error_over_text"] == pytest.approx(error, rel=1e-4)
    assert f"with a sliding window of {WINDOW} tokens, stride {STRIDE}, +- {error:.3f} over text" in printed


def test_figures_of_pages_by_hand(monkeypatch):
    """Three pages of known nats, in bits per byte and per cell, with errors in the same units."""
    nats, error, num_bytes = np.array([10.0, 30.0, 20.0]), 1.5, 40
    monkeypatch.setattr(evaluate_model, "diffusion_bound", lambda model, pages, batch_size: (nats, error))
    monkeypatch.setattr(evaluate_model, "page_speed", lambda *_: {})
    processor = SimpleNamespace(height=2, width=5, paginate=lambda text: np.zeros((1, 2, 5), dtype=np.int64))
    results = evaluate_model.measure_grid(None, processor, ["a", "b", "c"], num_bytes, 2)
    assert results["bound_bits_per_byte"] == pytest.approx(60 / math.log(2) / 40)
    assert results["bits_per_cell"] == pytest.approx(60 / math.log(2) / 30)
    assert results["bound_standard_error"] == pytest.approx(1.5 / math.log(2) / 40)
    # Of a sum of three: the root of three times their variance.
    assert results["standard_error_over_text"] == pytest.approx(math.sqrt(3 * nats.var(ddof=1)) / math.log(2) / 40)
    assert (results["cells"], results["page"]) == (30, [2, 5])


def test_bits_of_pages_while_training():
    """The mean of what is evaluated, in nats a cell, over all cells and bytes; not that of the last batch."""
    objective = object.__new__(objectives.MaskedPages)
    objective.held_out_cells, objective.held_out_bytes = 60, 40
    output = SimpleNamespace(losses=np.array([1.0, 3.0, 8.0]))
    figures = objective.trainer_options()["compute_metrics"](output)
    assert figures == {"bits_per_byte": pytest.approx(4.0 * 60 / 40 / math.log(2))}


def test_what_is_printed_of_pages(tmp_path, monkeypatch):
    results = {"held_out_bytes": 4321, "dataset": "book.txt", "page": [2, 5], "device": "a machine", "threads": 3}
    results |= {"bound_bits_per_byte": 2.3456, "bound_standard_error": 0.0123, "standard_error_over_text": 0.0457}
    results |= {"generation": {"tokens_per_second": 1234.4}}
    monkeypatch.setattr(evaluate_model, "evaluate", lambda *_: results)
    (tmp_path / "book.txt").write_bytes(TEXT.encode())
    (tmp_path / "config.json").write_text("{}")
    printed = in_process(evaluate_model.main, tmp_path, "--dataset_name", tmp_path / "book.txt")
    assert printed.splitlines() == [
        f"{tmp_path} on 4,321 held-out bytes of book.txt",
        "  at most 2.346 bits per byte (the negative ELBO; +- 0.012 by the draw of masks, +- 0.046 over text)",
        "  writes 1,234 tokens per second on a machine, 3 threads",
        f"written: {tmp_path / 'evaluation.json'}",
    ]
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == results


def test_figures_of_an_earlier_version_are_not_taken(tmp_path, monkeypatch):
    (tmp_path / "evaluation.json").write_text(json.dumps({"generation": {"num_iterations": 3}}))
    monkeypatch.setattr(model_card, "weights_digest", lambda _: "of others")
    assert model_card.read_evaluation(tmp_path) is None
    monkeypatch.setattr(model_card, "weights_digest", lambda _: None)
    with pytest.raises(ValueError, match="evaluation.json was written by an earlier version: run evaluate_model.py"):
        model_card.read_evaluation(tmp_path)


def test_speed_leaves_out_the_warm_up_and_the_prompt(monkeypatch):
    clock, durations = [0.0], iter([100.0, 4.0, 2.0, 8.0] * 2)

    def generate(**_):
        clock[0] += next(durations)

    model = SimpleNamespace(generate=generate, device=torch.device("cpu"))
    model.generation_config = SimpleNamespace(max_denoising_steps=6)
    monkeypatch.setattr(evaluate_model, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    stream = np.arange(20)
    speed = evaluate_model.generation_speed(model, stream, None, prompt=9, new=7)
    assert speed == {"tokens_per_second": 7 / 4, "prompt_tokens": 9, "new_tokens": 7}
    speed = evaluate_model.page_speed(model, 3, 5)
    assert speed == {"tokens_per_second": 3 * 5 / 4, "new_tokens": 15, "max_denoising_steps": 6}


# --- bytes, characters, tokens -----------------------------------------------------------------------------------------


def test_a_stream_counts_bytes_and_not_characters():
    examples = StreamedExamples(["Käfer", "№ 7", "plain"], seed=0)
    examples.examples_of = lambda texts: ({"text": text} for text in texts)
    assert len(list(examples.one_pass(0))) == 3
    assert examples.bytes_read == 6 + 5 + 5


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 70_000])
def test_tokens_beyond_two_bytes_are_whole(size):
    """The largest id of a vocabulary of just 65,536 entries takes two bytes, that of the next larger one does not."""
    words = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")
    assert len(tokenizer) == size
    stream = encode([f"w5 w{size - 1}", f"w{size - 2}"], tokenizer)
    assert stream.tolist() == [1, 5, size - 1, 1, size - 2, 1]
    assert stream.itemsize == (2 if size == 2**16 else 4)


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 70_000])
def test_pages_of_tokens_beyond_two_bytes_are_whole(size, monkeypatch):
    page = np.array([[[5, size - 1]]])
    monkeypatch.setattr(objectives.HeptapodProcessor, "paginate", lambda self, text: page)
    pages = objectives._paginate(["a", "b"], SimpleNamespace(tokenizer=range(size)), desc=None)
    assert pages.tolist() == [[[5, size - 1]]] * 2
    assert pages.itemsize == (2 if size == 2**16 else 4)


# --- which text --------------------------------------------------------------------------------------------------------


def test_a_folder_is_evaluated_on_what_it_held_out(tmp_path, monkeypatch):
    save_with_results("leap", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    calls = []
    monkeypatch.setattr(publish, "evaluate", lambda *arguments: calls.append(arguments) or {"figures": 1})
    publish.evaluate_if_needed(tmp_path)
    ((folder, texts, name),) = calls
    assert (folder, name) == (tmp_path, results["dataset"])
    text = "".join(texts).encode()
    assert hashlib.sha256(text).hexdigest() == results["held_out_sha256"]
    assert len(text) == results["held_out_bytes"]
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == {"figures": 1}


def test_figures_of_a_card_stand_at_their_texts():
    results = {"dataset": "book.txt", "block_size": 64, "bits_per_byte": 2.5}
    evaluation = {"dataset": "stdlib", "window": 32, "stride": 16, "sliding_window_bits_per_byte": 2.25}
    figures = model_card._eval_results(results, evaluation)
    assert [(each.dataset_name, each.metric_value, each.metric_args) for each in figures] == [
        ("book.txt", 2.5, {"block_size": 64}),
        ("stdlib", 2.25, {"window": 32, "stride": 16}),
    ]
    grid = {"dataset": "book.txt", "page": [2, 5], "bits_per_byte": 2.5, "elbo_samples": 8}
    evaluation = {"dataset": "stdlib", "bound_bits_per_byte": 2.25, "mask_samples": 4}
    for given, expected in (
        (None, ("book.txt", 2.5, {"mask_samples": 8})),
        (evaluation, ("stdlib", 2.25, {"mask_samples": 4})),
    ):
        (figure,) = model_card._eval_results(grid, given)
        assert (figure.dataset_name, figure.metric_value, figure.metric_args) == expected


# --- cards -------------------------------------------------------------------------------------------------------------


def causal_evaluation(losses):
    figures = {"window": 64, "stride": 24, "least_context": 40, "sliding_window_bits_per_byte": 5.4321}
    figures |= {"generation": {"tokens_per_second": 1234.4, "prompt_tokens": 16, "new_tokens": 32}}
    return {**figures, "losses": {name: {"nats_per_token": n, "bits_per_byte": b} for name, n, b in losses}}


EVALUATIONS = {
    "leap": causal_evaluation([("text", 1.5, 2.25)]),
    "hierarchical_lm": causal_evaluation([("text", 1.5, 2.25)]),
    "multigrid": causal_evaluation([("text", 1.5, 2.25), ("token_kind", 0.75, 0.875), ("bracket", 0.125, 0.625)]),
    "heptapod": {
        "bound_bits_per_byte": 6.5432,
        "bound_standard_error": 0.0345,
        "mask_samples": 4,
        "generation": {"tokens_per_second": 1234.4, "new_tokens": 64, "max_denoising_steps": 3},
    },
}
BEFORE = "| before training | 9.876 | |"
AFTER = [
    "| **after training, blocks of 20 tokens that share no context** | **7.654** | |",
    "| **after training, sliding window of 64 tokens**: each predicted once, with at least 40 before it; 8,765 bytes of "
    "`book.txt` | **5.432** | 0.099 (over text) |",
    "It writes 1,234 tokens per second on another computer, 7 threads (32 tokens after 16, greedy, one text at a time). "
    "Measured by",
]
PLAIN = "`, 4,321 parameters, tokenizer `byte` with 258 entries."
SAID = {
    "leap": [*AFTER, "`LeapForCausalLM" + PLAIN],
    "hierarchical_lm": [BEFORE, *AFTER, "`HierarchicalLMForCausalLM" + PLAIN],
    "multigrid": [
        *(BEFORE, *AFTER, f"`MultiGridForCausalLM{PLAIN.removesuffix('.')}, axes token_kind, bracket."),
        *("| text | 1.500 | 2.250 |", "| token_kind | 0.750 | 0.875 |", "| bracket | 0.125 | 0.625 |"),
    ],
    "heptapod": [
        "`HeptapodForMaskedLM`, 4,321 parameters, tokenizer `byte` with 260 entries.",
        "| before training, upper bound from one draw of masks | 9.876 | |",
        "| **after training, upper bound (negative ELBO)** | **7.654** | 0.012 (draw of masks) |",
        "| the same by `evaluate_model.py`, on 8,765 bytes of `book.txt` | 6.543 | 0.035 (draw of masks), 0.099 (over pages) |",
        "draws of masks were made of each page. Standard errors over text say how much other text of the same kind and "
        "size would change a figure; the spread over",
        "It writes 1,234 tokens per second on another computer, 7 threads (a page of 64 cells in 3 denoising steps). Measured by",
    ],
}
OF_ALL = [
    "| `bz2 -9` | 3.210 | |",
    "python training/evaluate_model.py it",
    "at commit `0123456789ab-dirty`; all figures are in `evaluation.json`.",
    "the machine that trained it. Trained from scratch: 17 steps of 99 tokens in 12 s on a computer, 1 threads, float32.",
    "python training/train.py --of_this test",
    "Commit `abcdef123456`; python 3.1, torch 2.3. All figures are in `results.json`.",
]


@pytest.mark.parametrize("family", SAID)
def test_every_figure_of_a_card_is_what_its_words_say(family, tmp_path):
    """No two figures are equal, but those that are the same."""
    save_with_results(family, tmp_path)
    about = {"dataset": "book.txt", "held_out_bytes": 8765, "standard_error_over_text": 0.0987, "threads": 7}
    about |= {
        "device": "another computer",
        "command": "python training/evaluate_model.py it",
        "commit": "0123456789ab-dirty",
    }
    about |= {"weights_sha256": weights_digest(tmp_path), **EVALUATIONS[family]}
    (tmp_path / "evaluation.json").write_text(json.dumps(about))
    model_card.write_card(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    lines = card.splitlines()
    for line in SAID[family] + OF_ALL:
        assert line in lines, line
    begins = [
        "150 bytes of `stdlib` were held out where no other text is named",
        "Data: 12,345 bytes of `stdlib`, the source",
    ]
    if family == "heptapod":
        begins[0] += (
            ", laid on pages of 4 x 16 cells that share no context; blank cells are paid for like others, and 8"
        )
    assert all(any(line.startswith(words) for line in lines) for words in begins)
    assert (BEFORE in lines) == ("before training" in card and family != "heptapod")
    if family == "multigrid":
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        for order, words in (
            ("parallel", "cost nothing, so these figures are those of the tokens alone"),
            ("factored", "the sum of all axes"),
        ):
            (tmp_path / "config.json").write_text(json.dumps({**config, "axis_order": order}))
            model_card.write_card(tmp_path)
            assert words in (tmp_path / "README.md").read_text(encoding="utf-8")


# --- what models write -------------------------------------------------------------------------------------------------


def test_a_sample_is_as_long_as_asked_for(tmp_path, monkeypatch):
    save_tiny("leap", tmp_path)
    calls = []
    model = SimpleNamespace(generate=lambda **options: calls.append((torch.initial_seed(), options)))
    model.to = lambda device: model
    monkeypatch.setattr(sample.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    in_process(sample.main, tmp_path, "--prompt", "ab", "--max_new_tokens", 7, "--seed", 3)
    ((seed, options),) = calls
    assert (seed, options["max_new_tokens"], options["input_ids"].tolist()) == (3, 7, [[97, 98]])


def test_the_share_of_a_page_that_is_written_as_it_was(tmp_path):
    save_tiny("heptapod", tmp_path / "model")
    (tmp_path / "text.txt").write_text("import os\n" * 30)
    arguments = ("--text_file", tmp_path / "text.txt", "--page", 1, "--mask_region", "top", "--max_denoising_steps", 3)
    printed = in_process(infill.main, tmp_path / "model", *arguments, "--seed", 5, "--output_dir", tmp_path)
    height, width = PAGE
    rows = -(-height // 3)
    # A line takes a row, and the page is the second one; what is left of each row is blank.
    processor = AutoProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    page = torch.from_numpy(processor.paginate("import os\n" * 30)[1:2])
    opened = page.clone()
    opened[:, :rows] = processor.tokenizer.mask_token_id
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    written = model.generate(opened, max_denoising_steps=3, seed=5)
    assert f"--- the page, {rows * width} cells masked" in printed
    assert "--- generated in 3 forward passes\n" in printed
    blank = processor.blank_token_id
    # "o" is the only letter that a line has twice.
    for name, cells in (
        ("the model", written[0, :rows].flatten().tolist()),
        ("all blanks", [blank] * rows * width),
        ("all spaces", [32] * rows * width),
        ("all 'o'", [ord("o")] * rows * width),
    ):
        pairs = list(zip(cells, page[0, :rows].flatten().tolist()))
        right = sum(a == b != blank for a, b in pairs)
        wrote, there = sum(a != blank for a, _ in pairs), sum(b != blank for _, b in pairs)
        precision, recall = right / max(wrote, 1), right / there
        shares = f"{precision:.2f} {recall:.2f} {2 * right / (wrote + there):.2f}"
        line = f"{name} {shares} {sum(a == b for a, b in pairs) / len(pairs):.2f}"
        assert line in [" ".join(row.split()) for row in printed.splitlines()]
    printed = in_process(infill.main, tmp_path / "model", *arguments, "--seed", 5, "--do_sample")
    written = model.generate(opened, max_denoising_steps=3, seed=5, do_sample=True)
    assert infill.rows_of(written[0], processor) in printed


def test_a_printed_page_keeps_its_rows_and_columns():
    tokenizer = build_tokenizer("byte", [], for_pages=True)
    processor = HeptapodProcessor(tokenizer, 4, 8)
    page = processor("ab\ncd\n", mask_region=(0, 1, 2, 3))["input_ids"][0]
    assert infill.rows_of(page, processor) == "a\u2591\u2591\u2591\nc\u2591\u2591\u2591"
    page[0, 1:4] = processor.blank_token_id
    page[0, 5] = ord("e")
    assert infill.rows_of(page, processor) == "a    e\nc\u2591\u2591\u2591"


BLANK = 259


def score_rows(filled, original):
    """Of pages of one row; `_` is a blank. A last cell that is right is given, so that it does not count."""
    pages = [
        torch.tensor([[[BLANK if sign == "_" else ord(sign) for sign in f"{row}z"]] for row in rows])
        for rows in (filled, original)
    ]
    is_masked = torch.ones_like(pages[0], dtype=torch.bool)
    is_masked[..., -1] = False
    return score_pages(*pages, is_masked, BLANK)


@pytest.mark.parametrize(
    ("filled", "original", "precision", "recall", "f1", "with_blanks"),
    [
        (["_______"], ["ab c;__"], 0, 0, 0, 2 / 7),
        (["ab c;__"], ["ab c;__"], 1, 1, 1, 1),
        (["ab x;__"], ["ab c;__"], 4 / 5, 4 / 5, 4 / 5, 6 / 7),
        (["ab_____"], ["ab c;__"], 1, 2 / 5, 4 / 7, 4 / 7),
        (["ab c;xy"], ["ab c;__"], 5 / 7, 1, 10 / 12, 5 / 7),
        (["       "], ["ab c;__"], 1 / 7, 1 / 5, 2 / 12, 1 / 7),
        (["_______"], ["_______"], math.nan, math.nan, math.nan, 1),
        (["x______"], ["_______"], 0, 0, 0, 6 / 7),
        (["ab_____", "x______"], ["ab c;__", "_______"], 2 / 3, 2 / 5, 4 / 8, 10 / 14),
    ],
)
def test_blanks_score_nothing(filled, original, precision, recall, f1, with_blanks):
    score = score_rows(filled, original)
    shares = (score.precision, score.recall, score.f1, score.right_with_blanks)
    assert shares == pytest.approx((precision, recall, f1, with_blanks), nan_ok=True)


def test_scores_of_pages_are_those_of_scikit_learn_and_their_error_is_that_of_a_ratio():
    metrics = pytest.importorskip("sklearn.metrics")
    signs = np.random.default_rng(0).choice(list("ab__"), size=(2, 9, 40))
    signs[0, :, 20:30] = signs[1, :, 20:30]
    signs[:, 0, 5:] = "_"  # a page that hardly counts
    score = score_rows(*[["".join(row) for row in rows] for rows in signs])
    expected = metrics.precision_recall_fscore_support(
        signs[1].ravel(), signs[0].ravel(), labels=["a", "b"], average="micro"
    )
    assert (score.precision, score.recall, score.f1) == pytest.approx(expected[:3])
    twice_right = 2 * ((signs[0] == signs[1]) & (signs[0] != "_")).sum(1)
    cells = (signs != "_").sum((0, 2))
    residuals = twice_right - expected[2] * cells
    error = math.sqrt(9 / 8 * (residuals**2).sum()) / cells.sum()
    assert score.f1_of_pages.mean().item() == pytest.approx(expected[2])
    assert score.f1_of_pages.std().item() / 3 == pytest.approx(error)


def test_what_pages_of_one_token_are_compared_with():
    processor = HeptapodProcessor(build_tokenizer("byte", [], for_pages=True))
    assert processor.blank_token_id == BLANK
    page = torch.tensor([[[*b"bbb\n\n\n   ccaa", BLANK, BLANK, BLANK, BLANK]]])
    is_masked = torch.ones_like(page, dtype=torch.bool)
    is_masked[..., :2] = False  # so that "a" and "c" are more frequent than "b"
    found = baselines(page, is_masked, processor)
    assert {name: set(pages[is_masked].tolist()) for name, pages in found.items()} == {
        "all blanks": {BLANK},
        "all spaces": {32},
        "all 'a'": {97},
    }
    assert all(torch.equal(pages[~is_masked], page[~is_masked]) for pages in found.values())
    assert list(baselines(page[..., 3:9], is_masked[..., 3:9], processor)) == ["all blanks", "all spaces"]
    with pytest.raises(ValueError, match=r"one shape, got \[\[1, 1, 17\], \[1, 17\], \[1, 1, 17\]\]"):
        score_pages(page, page[0], is_masked, BLANK)


def test_pages_that_are_shown_are_at_least_half_written(tmp_path, monkeypatch):
    save_tiny("heptapod", tmp_path)
    processor, (height, width) = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True), PAGE
    full, half, less = (
        ("x" * (width - 1) + "\n") * height,
        "y" * (width * height // 2),
        "z" * (width * height // 2 - 1),
    )
    texts = SimpleNamespace(validation=[less, half, less, full])
    monkeypatch.setattr(infill, "load_texts", lambda *_, **__: texts)
    shown = [processor.decode(infill.choose_page(processor, None, number)[0]) for number in (0, 1)]
    assert shown == [half, full]
    with pytest.raises(ValueError, match="--page 2: there are 2 pages"):
        infill.choose_page(processor, None, 2)


def test_the_share_of_meta_tokens_that_the_annotator_would_give(tmp_path, monkeypatch):
    """Of what was written; the prompt, where all agree, does not count."""
    save_tiny("multigrid", tmp_path)
    prompt, written = "x = ", "(1)\n"
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    kinds, brackets = processor.annotate(prompt + written)
    kinds[len(prompt)] += 1  # one of four differs
    ids = torch.tensor([list((prompt + written).encode())])
    output = SimpleNamespace(sequences=ids, axis_sequences=torch.tensor([[kinds, brackets]]))
    calls = []

    def generate(axis_source, max_new_tokens, **_):
        calls.append((axis_source, max_new_tokens, torch.rand(()).item()))
        return output

    model = SimpleNamespace(generate=generate, to=lambda device: model)
    monkeypatch.setattr(sample_axes.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    printed = in_process(sample_axes.main, tmp_path, "--prompt", prompt, "--max_new_tokens", 4, "--seed", 6)
    drawn = torch.rand((), generator=torch.Generator().manual_seed(6)).item()  # the same for both
    assert calls == [("predicted", 4, drawn), ("annotated", 4, drawn)]
    said = "of the generated axis ids equal the annotated ones (the most frequent one alone:"
    kinds[len(prompt)] -= 1
    often = [max(track[len(prompt) :].count(entry) for entry in range(99)) / 4 for track in (kinds, brackets)]
    assert printed.count(f"{processor.axis_names[0]}: 75% {said} {often[0]:.0%})") == 2
    assert printed.count(f"{processor.axis_names[1]}: 100% {said} {often[1]:.0%})") == 2
