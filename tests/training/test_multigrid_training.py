"""Axes beside a stream of tokens, and a MultiGrid through train.py and sample_axes.py."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import objectives
import pytest
import sample_axes
import torch
import train
from corpora import DataArguments, PackedBlocks, Texts, annotate, build_tokenizer, encode
from named_losses import losses_by_name
from objectives import AnnotatedTokens, choose_axes, objective_for
from run_report import text_loss
from run_settings import _definition_of
from torch.nn.parallel import scatter_gather
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from modeling_heptapod import Axis, ConstantAxis, MultiGridProcessor, RandomAxis, make_axis
from tests.tiny_multigrid import TWO_AXES, random_grid, tiny_multigrid


SCRIPTS = Path(objectives.__file__).parent
CONFIG = {
    "model_type": "multigrid",
    "vocab_size": 99,  # replaced by the tokenizer's
    "axis_names": ["replaced"],
    "axis_vocab_sizes": [2],
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
AXES = ["token_kind", "bracket"]
ALONE = (
    "import runpy, sys\nsys.modules['modeling_heptapod'] = None\nsys.argv = sys.argv[1:]\n"
    "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
)
TEXTS = ["f(x) # é\n", "ab = [1,\n 'cd']\n"]


class Ahead(Axis):
    """The next character, which nobody can know."""

    causal = False
    why_not_causal = "it reads the next character"

    def __init__(self, name="ahead"):
        super().__init__(name, ["other", "letter"])

    def ids_after(self, text):
        return [0, *(int(character.isalpha()) for character in text[1:]), 0]


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_annotations_stand_beside_their_tokens(name):
    tokenizer = build_tokenizer(name, TEXTS, vocab_size=270)
    stream, meta = encode(TEXTS, tokenizer), annotate(TEXTS, tokenizer, [make_axis(axis) for axis in AXES])
    assert meta.shape == (2, len(stream)) and meta.dtype == np.uint8
    ends = np.flatnonzero(stream == tokenizer.eos_token_id)
    assert len(ends) == 3 and not meta[:, ends].any()
    for row, axis in zip(meta, map(make_axis, AXES)):
        for text, start, stop in zip(TEXTS, ends, ends[1:]):
            seen, expected = "", []
            for token in range(start + 1, stop):
                written = tokenizer.decode(stream[start + 1 : token + 1])
                seen = seen if written.endswith("\ufffd") else written  # the first byte of é says nothing
                expected.append(axis.annotate(seen)[-1])
            assert seen == text and row[start + 1 : stop].tolist() == expected
    assert annotate(TEXTS, tokenizer, [RandomAxis(size=300)]).dtype == np.int32


@pytest.mark.parametrize("length", [9, 10, 17, 18, 100])
def test_blocks_of_tokens_and_meta_ids_are_cut_alike(length):
    stream = np.arange(length, dtype=np.uint16)
    meta = np.stack([stream % 7, stream % 11]).astype(np.uint8)
    for pad in (None, 7777):
        blocks = PackedBlocks(stream, 9, pad, meta)
        assert len(blocks) == len(PackedBlocks(stream, 9, pad))
        for block in blocks:
            assert block["axis_ids"].shape == (2, 9) and block["axis_ids"].dtype == torch.int64
            padding = block["labels"] == -100
            expected = torch.stack([block["input_ids"] % 7, block["input_ids"] % 11])
            assert torch.equal(block["axis_ids"], expected.masked_fill(padding, 0))
    with pytest.raises(ValueError, match="`meta` must be"):
        PackedBlocks(stream, 9, meta=meta[:, 1:])


def test_axes_by_name():
    assert [axis.name for axis in choose_axes(AXES)] == AXES
    for names, message in (
        (["bracket", "brakcet"], "--axes bracket brakcet: .*'brakcet'.* FILE.py:CLASS"),
        (["bracket", "bracket"], "--axes .*same name"),
        (["missing.json"], "--axes missing.json"),
        (["bracket", Ahead()], "--axes ahead: looks ahead"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_axes(names)


def test_an_axis_from_a_file(tmp_path):
    (tmp_path / "axis.json").write_text(json.dumps(ConstantAxis("mine", size=3).to_dict()))
    (axis,) = choose_axes([str(tmp_path / "axis.json")])
    assert axis.name == "mine" and len(axis.vocabulary) == 3
    (tmp_path / "axis.json").write_text("[]")
    with pytest.raises(ValueError, match="--axes .*axis.json.*a dict with a 'class'"):
        choose_axes([str(tmp_path / "axis.json")])


@pytest.mark.parametrize("missing", [ImportError("this axis needs NLTK"), LookupError("NLTK's data are not here")])
def test_what_an_axis_needs_is_missed_before_training(missing, monkeypatch):
    def ids_after(self, text):
        raise missing

    monkeypatch.setattr(ConstantAxis, "ids_after", ids_after)
    with pytest.raises(ValueError, match="--axes constant: .*NLTK"):
        choose_axes(["constant"])


def objective(**changes):
    config = AutoConfig.for_model(**{**CONFIG, **changes})
    return objective_for(config)(Texts(TEXTS * 4, TEXTS), DataArguments(block_size=16, axes=AXES), config)


def test_the_objective_of_a_multigrid():
    found = objective()
    assert type(found) is AnnotatedTokens
    special = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    assert found.config_options == {"vocab_size": 258, **special, "axis_names": AXES, "axis_vocab_sizes": [11, 5]}
    assert isinstance(found.processing_class, MultiGridProcessor)
    assert [axis.name for axis in found.processing_class.axes] == AXES
    assert found.train_dataset[0]["axis_ids"].shape == (2, 16)
    assert found.eval_dataset.meta.shape == (2, len(found.eval_dataset.stream))
    assert found.text_losses == ["main_loss"]
    assert objective(axis_order="factored").text_losses == ["main_loss", "token_kind_loss", "bracket_loss"]


def test_losses_by_name_are_named_by_their_axes():
    config = argparse.Namespace(axis_names=["a", "b"])
    outputs = {"loss": 1, "main_loss": 2, "axis_losses": (3, 4), "logits": 5}
    assert losses_by_name(outputs, config) == {"main_loss": 2, "a_loss": 3, "b_loss": 4}
    assert losses_by_name({"loss": 1, "ce_loss": 2}, argparse.Namespace()) == {"ce_loss": 2}


@pytest.mark.parametrize("order", ["parallel", "factored"])
def test_losses_by_name_of_several_devices(order, monkeypatch):
    """`DataParallel` puts the outputs of its devices side by side; scalars become vectors, also within a tuple."""

    def on_cpu(device, dim, *parts):  # torch's own gathers on accelerators only
        return torch.cat([part.view(1) for part in parts] if parts[0].dim() == 0 else parts, dim)

    monkeypatch.setattr(scatter_gather.Gather, "apply", on_cpu)
    model = tiny_multigrid(**TWO_AXES, axis_order=order).train()
    whole = random_grid(model, 4, 9)
    whole["labels"] = whole["input_ids"]
    halves = [{name: values[rows] for name, values in whole.items()} for rows in (slice(2), slice(2, 4))]
    gathered = scatter_gather.gather([model(**half) for half in halves], 0)
    expected = model(**whole)
    assert type(gathered) is type(expected) and type(gathered.axis_losses) is tuple
    for found, logits in zip((gathered.logits, *gathered.axis_logits), (expected.logits, *expected.axis_logits)):
        torch.testing.assert_close(found, logits)
    wanted, found = (losses_by_name(outputs, model.config) for outputs in (expected, gathered))
    assert list(found) == ["main_loss", "kind_loss", "bracket_loss"]
    for name, value in found.items():
        assert value.shape == (2,)
        torch.testing.assert_close(value.mean(), wanted[name])
    torch.testing.assert_close(gathered.loss.mean(), expected.loss)


def test_what_a_text_costs():
    entry = {"loss": 9.0, "main_loss": 2.0, "a_loss": 3.0}
    assert text_loss(entry, ["main_loss"]) == 2
    assert text_loss(entry, ["main_loss", "a_loss"]) == 5
    assert text_loss({"loss": 9.0}, ["ce_loss"]) == text_loss({"loss": 9.0}, []) == 9


@pytest.mark.parametrize("is_factored", [False, True])
def test_pads_cost_nothing_on_any_axis(is_factored):
    objective = object.__new__(AnnotatedTokens)
    objective.is_factored = is_factored
    sizes, labels = (7, 3, 4), torch.randint(3, (2, 5))
    labels[1, 3:] = -100
    logits, ids = [torch.randn(2, 5, size) for size in sizes], torch.randint(3, (2, 2, 5))
    found = objective._sum_nats((logits[0], logits[1:]), (labels, ids))
    expected = torch.zeros(2)
    for row, length in enumerate((5, 3)):
        for place in range(length - 1):
            targets = [labels[row, place + 1], *(ids[row, :, place + 1] if is_factored else ())]
            for scores, target in zip(logits, targets):
                expected[row] -= scores[row, place].log_softmax(-1)[target]
    torch.testing.assert_close(found, expected)


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, text=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module", params=["parallel", pytest.param("factored", marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """The folder of a run, and its order."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps({**CONFIG, "axis_order": request.param}))
    (folder / "config" / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7}))
    command = [
        *(SCRIPTS / "train.py", "--config_name", "config", "--output_dir", "out", "--dataset_name", argparse.__file__),
        *("--axes", *AXES, "--block_size", "32", "--per_device_train_batch_size", "2", "--max_steps", "6"),
        *("--per_device_eval_batch_size", "4", "--logging_steps", "2", "--learning_rate", "1e-2"),
        *("--eval_strategy", "steps", "--eval_steps", "3", "--max_validation_bytes", "300"),
        *("--disable_tqdm", "true", "--use_cpu", "true", "--eval_on_start", "true"),
    ]
    process = run(*command, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder, request.param


def held_out_text():
    text = Path(argparse.__file__).read_bytes().decode()
    return text[text.index("\n", round(0.95 * len(text))) + 1 :][:300]


def test_every_axis_is_in_the_log(trained):
    folder, _ = trained
    history = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    names = ["main_loss", "token_kind_loss", "bracket_loss"]
    entries = [entry for entry in history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        metas = (entry["token_kind_loss"] + entry["bracket_loss"]) / 2
        assert entry["loss"] == pytest.approx(0.5 * entry["main_loss"] + 0.5 * metas, rel=1e-4)
    assert all(f"eval_{name}" in entry for entry in history if "eval_loss" in entry for name in names)


def test_bits_per_byte_agree_with_an_independent_computation(trained):
    """Of the main axis, or in the factored order of all axes together; text and annotations from nothing of ours."""
    folder, order = trained
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    text = held_out_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True).double().eval()
    ids = [256, *text.encode(), 256]
    metas = [[0, *make_axis(axis).annotate(text), 0] for axis in AXES]
    nats = {"main": 0.0, "meta": 0.0}
    for start in range(0, len(ids) - 1, 31):
        here = slice(start, start + 32)
        block, meta = torch.tensor([ids[here]]), torch.tensor([[row[here] for row in metas]])
        with torch.no_grad():
            outputs = model(input_ids=block, axis_ids=meta)
        for position in range(block.shape[1] - 1):
            nats["main"] -= outputs.logits[0, position].log_softmax(-1)[block[0, position + 1]].item()
            for logits, row in zip(outputs.axis_logits, meta[0]):
                nats["meta"] -= logits[0, position].log_softmax(-1)[row[position + 1]].item()
    total = nats["main"] + (nats["meta"] if order == "factored" else 0)
    assert nats["meta"] > 100
    assert results["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text), rel=1e-5)
    assert results["bits_per_byte"] < results["bits_per_byte_before"]
    assert results["axes"] == {"token_kind": 11, "bracket": 5}


def test_the_folder_gives_tokenizer_and_axes_back(trained):
    folder, order = trained
    processor = AutoProcessor.from_pretrained(folder / "out", trust_remote_code=True)
    inputs = processor("f(x", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [list(b"f(x")]
    assert inputs["axis_ids"].tolist() == [[make_axis(axis).annotate("f(x") for axis in AXES]]
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert "{{" not in card and "{%" not in card
    assert "axes token_kind, bracket" in card and "AutoProcessor" in card and "AutoTokenizer" not in card
    assert ("sum of\nall axes" in card or "the sum of all axes" in card) == (order == "factored")


@pytest.mark.slow
def test_it_writes_with_its_tracks_without_the_package(trained):
    folder, _ = trained
    (folder / "alone.py").write_text(ALONE)
    prompt = ("--prompt", "def parse(", "--max_new_tokens", "20")
    process = run("alone.py", SCRIPTS / "sample_axes.py", "out", *prompt, cwd=folder)
    assert process.returncode == 0, process.stderr
    predicted, annotated = process.stdout.split("--- with axis ids annotated")
    assert "--- with axis ids predicted" in predicted and "def parse(" in predicted
    for axis in AXES:
        assert f"{axis}: 100% of the generated axis ids" in annotated
    kind = next(line for line in annotated.splitlines() if line.startswith("token_kind"))
    assert kind.split(None, 1)[1].startswith("aak aaaaap")  # `de` is a name, `def` a keyword, `(` opens


VOWELS = """from modeling_heptapod import Axis

class Vowels(Axis):
    def __init__(self, name="vowels"):
        super().__init__(name, ("no", "yes"))

    def start(self):
        return 0

    def step(self, state, characters):
        for character in characters:
            state = int(character in "aeiou")
        return state, state
"""


@pytest.mark.slow
def test_an_axis_of_ones_own_is_trained_saved_and_trained_further(tmp_path, monkeypatch):
    """And at the end a text is written where this package is not installed."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "my_axis.py").write_text(VOWELS)
    monkeypatch.chdir(tmp_path)
    common = f"--dataset_name {argparse.__file__} --block_size 32 --max_steps 1 --per_device_train_batch_size 2 --report_to none"
    common += " --max_validation_bytes 99 --use_cpu true --disable_tqdm true --save_strategy no --cache_dir none"
    for options in (
        "--config_name config --axes bracket my_axis.py:Vowels --output_dir first",
        "--model_name_or_path first --output_dir second",
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *options.split(), *common.split()])
        train.main()
        (tmp_path / "my_axis.py").unlink(missing_ok=True)
    (tmp_path / "alone.py").write_text(ALONE)
    shown = run(
        "alone.py", SCRIPTS / "sample_axes.py", "second", "--prompt", "a vowel", "--max_new_tokens", "9", cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    track = next(
        line for line in shown.stdout.split("--- with axis ids annotated")[1].splitlines() if line.startswith("vowels")
    )
    assert track.split(None, 1)[1].startswith("y  y y ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_axis.py", "the class in my_axis.py must be named as well, as my_axis.py:Vowels"),
        ("nowhere.py:Vowels", "there is no file nowhere.py"),
        ("my_axis.py:Consonants", "my_axis.py must define the class 'Consonants'"),
        ("my_axis.py:Peeking", r"Peeking: ValueError: axis 'vowels' \(Peeking\) looks ahead"),
        ("my_axis.py:Unnamed", "Unnamed: AttributeError: .* no attribute 'name'"),
        (
            "my_axis.py:Needy",
            r"Needy\(\) must work without arguments: .*missing 1 required positional argument: 'what'",
        ),
    ],
)
def test_files_without_the_axis_are_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = "class Needy(Vowels):\n    def __init__(self, what):\n        super().__init__()\n"
    more += "class Unnamed(Vowels):\n    def __init__(self):\n        pass\n"
    more += (
        "class Peeking(Vowels):\n    def ids_after(self, text):\n        return [*super().ids_after(text)[1:], 0]\n"
    )
    (tmp_path / "my_axis.py").write_text(VOWELS + more)
    with pytest.raises(ValueError, match=f"--axes {name}: .*{message}"):
        choose_axes([name])


def test_an_axis_is_known_by_its_arguments_and_one_of_ones_own_by_its_code_too(tmp_path):
    (tmp_path / "my_axis.py").write_text(VOWELS)
    (axis,) = choose_axes([f"{tmp_path}/my_axis.py:Vowels"])
    assert "aeiou" in _definition_of(axis) and _definition_of(make_axis("bracket")) == json.dumps(
        make_axis("bracket").to_dict()
    )


def test_tracks_stand_below_their_characters():
    processor = MultiGridProcessor(build_tokenizer("byte", []), ["bracket", ConstantAxis()])
    ids = processor("f(é)\n\ng")["input_ids"][0]
    characters = sample_axes.characters_of(processor, ids)
    assert "".join(characters) == "f(é)\n\ng" and "" in characters
    tracks = sample_axes.annotations_of(processor, characters)
    assert tracks == processor("f(é)\n\ng")["axis_ids"][0]
    characters, brackets = ["f", "(", "é", ")\n", "\n", "g", "["], [0, 1, 1, 0, 0, 0, 2]
    assert sample_axes.lines_with_tracks(processor, characters, [brackets, [0] * 7]).split("\n") == [
        "          f(é)",
        "bracket    ((",
        "constant",
        "          ",
        "          g[",
        "bracket    [",
        "constant",
    ]


def test_letters_are_of_their_own():
    assert sample_axes.letters_for(("none", "(", "[", "name", "number", "na")) == [" ", "(", "[", "n", "u", "a"]
