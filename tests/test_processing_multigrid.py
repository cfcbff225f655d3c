"""Meta ids stand at their tokens: padded, truncated, with special tokens, saved, loaded, and while a model writes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from data import build_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from modeling_heptapod import GoldTagAxis, MetaAxis, MultiGridProcessor, RandomAxis, make_axis
from tests.clean_room import run_alone, run_beside


SOURCE = Path(__file__).read_text(encoding="utf-8")
EOS, PAD = 256, 257  # of the byte tokenizer
AXES = ["token_kind", "bracket", {"class": "RandomAxis", "name": "noise", "size": 7, "seed": 3}, "affix"]
CHARACTERS = [*"abc fx(['\"#\n\té€", "\U0001f419", "e\u0301", "<|endoftext|>", "ing ", "def "]


def random_texts(number, longest=40, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(CHARACTERS, k=draw.randint(0, longest))) for _ in range(number)]


def sentencepiece_like():
    """A tokenizer that writes the first word of a text differently and knows no bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"], initial_alphabet=CHARACTERS)
    tokenizer.train_from_iterator([SOURCE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<s>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module", params=["byte", "bpe"])
def processor(request):
    return MultiGridProcessor(build_tokenizer(request.param, [SOURCE], vocab_size=330), AXES)


@pytest.fixture
def by_bytes():
    return MultiGridProcessor(build_tokenizer("byte", []), AXES)


@pytest.fixture
def with_ends(by_bytes):
    """A processor whose tokenizer writes a special token before and after each text."""
    by_bytes.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", EOS)]
    )
    return by_bytes


def test_ids_by_hand():
    processor = MultiGridProcessor(build_tokenizer("byte", []), ["bracket", "string"])
    out = processor(["f('é", "x"], padding=True, return_tensors="pt")
    assert out.keys() == {"input_ids", "attention_mask", "meta_ids"} and processor.model_input_names == list(out)
    assert out.input_ids.tolist() == [[*b"f('\xc3\xa9"], [ord("x"), *[PAD] * 4]]
    assert out.attention_mask.tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert out.meta_ids.tolist() == [[[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [[0] * 5, [0] * 5]]
    assert {value.dtype for value in out.values()} == {torch.int64}
    assert (processor.axis_names, processor.axis_vocab_sizes) == (["bracket", "string"], [5, 6])


def test_ids_are_those_of_the_axes(processor):
    texts = [*random_texts(30), SOURCE[:2000]]
    out = processor(texts, padding=True, return_tensors="pt", return_offsets_mapping=True)
    assert out.meta_ids.shape == (len(texts), len(AXES), out.input_ids.shape[1])
    for text, ids, mask, rows in zip(texts, out.input_ids, out.attention_mask, out.meta_ids):
        encoded = processor.tokenizer(text, split_special_tokens=True, return_offsets_mapping=True)
        assert ids[mask == 1].tolist() == encoded["input_ids"]
        assert processor.tokenizer.decode(ids[mask == 1]) == text
        expected = [axis.annotate(text, encoded["offset_mapping"]) for axis in processor.axes]
        assert rows[:, mask == 1].tolist() == expected == processor.annotate(text, encoded["offset_mapping"])
        assert not rows[:, mask == 0].any()
    assert out.offset_mapping.shape == (*out.input_ids.shape, 2)
    lists = processor(texts)
    assert [len(row) for row in lists["meta_ids"][0]] == [len(lists["input_ids"][0])] * len(AXES)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("truncation_side", ["left", "right"])
def test_sides_and_special_tokens(with_ends, padding_side, truncation_side):
    with_ends.tokenizer.padding_side, with_ends.tokenizer.truncation_side = padding_side, truncation_side
    texts = ["f('é€', ing)", "def", "(\U0001f419\U0001f419"]
    whole = [with_ends(text, add_special_tokens=False)["meta_ids"][0] for text in texts]
    for length in (3, 5, 8, 30):
        out = with_ends(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
        assert out.meta_ids.shape == (3, len(AXES), length)
        for text, rows, ids, mask, meta in zip(texts, whole, out.input_ids, out.attention_mask, out.meta_ids):
            count = min(length, len(text.encode()) + 2)
            here = slice(length - count, None) if padding_side == "left" else slice(count)
            assert mask[here].all() and mask.sum() == count
            assert ids[here][0] == ids[here][-1] == EOS and not meta[:, here][:, [0, -1]].any()
            kept = slice(-(count - 2), None) if truncation_side == "left" else slice(count - 2)
            assert ids[here][1:-1].tolist() == [*text.encode()][kept]
            assert meta[:, here][:, 1:-1].tolist() == [row[kept] for row in rows]
            assert not meta[:, mask == 0].any()


def test_what_is_cut_off_leaves_no_trace(by_bytes):
    """The first byte of a character alone tells nothing of it, also where a text is cut behind it."""
    for first, second in (("('é", "('è"), ("x = '\U0001f419", "x = '\U0001f41a")):
        length = len(first.encode()) - 1
        ids = [by_bytes(text, truncation=True, max_length=length)["meta_ids"] for text in (first, second)]
        assert ids[0] == ids[1] == [[row[:length] for row in by_bytes(first)["meta_ids"][0]]]


def test_special_tokens_in_a_text_are_text(processor):
    text = "x = '<|endoftext|>' # <|pad|>"
    out = processor(text, return_tensors="pt")
    assert not {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id} & set(out.input_ids[0].tolist())
    assert processor.decode(out.input_ids[0]) == text


def test_without_axes_it_is_a_tokenizer(by_bytes):
    processor = MultiGridProcessor(by_bytes.tokenizer)
    out = processor("abc", return_tensors="pt")
    assert out.keys() == {"input_ids", "attention_mask"} and out.input_ids.tolist() == [[97, 98, 99]]
    assert (processor.axes, processor.axis_names, processor.axis_vocab_sizes) == ((), [], [])


def test_text_without_tokens(processor):
    out = processor(["", "a"], padding=True, return_tensors="pt")
    assert out.meta_ids.shape == (2, len(AXES), 1) and not out.meta_ids[0].any()
    for tensors, dtype in (("pt", torch.int64), ("np", np.dtype("int64"))):
        out = processor("", return_tensors=tensors)
        assert {name: tuple(values.shape) for name, values in out.items()} == {
            "input_ids": (1, 0),
            "attention_mask": (1, 0),
            "meta_ids": (1, len(AXES), 0),
        }
        assert {values.dtype for values in out.values()} == {dtype}


# ---- while a model writes


def written(processor, token_ids):
    """Meta ids of tokens that come one by one, `[axes][tokens]`, and the characters of each."""
    states, pending, rows, pieces = [axis.start() for axis in processor.axes], (), [], []
    for token_id in token_ids:
        processor.new_characters(pending, 65)  # another beam
        characters, pending = processor.new_characters(pending, token_id)
        pieces.append(characters)
        steps = [axis.step(state, characters) for axis, state in zip(processor.axes, states)]
        states = [state for _, state in steps]
        rows.append([meta_id for meta_id, _ in steps])
    return [list(row) for row in zip(*rows)], pieces


def test_tokens_one_by_one_give_the_same_ids(processor):
    for text in [*(text for text in random_texts(60, seed=1) if text), SOURCE[:3000]]:
        out = processor(text, return_tensors="pt")
        rows, pieces = written(processor, out.input_ids[0])
        assert rows == out.meta_ids[0].tolist() and "".join(pieces) == text


def test_characters_of_other_tokenizers():
    processor = MultiGridProcessor(sentencepiece_like(), AXES)
    for text in ("def f(x): return 'abc'", "ing for  x", "a"):
        ids = processor(text)["input_ids"][0]
        assert len(ids) < len(text) or text == "a"
        rows, pieces = written(processor, ids)
        assert "".join(pieces) == text
        assert rows == processor(text)["meta_ids"][0]


def test_bytes_that_make_no_character(by_bytes):
    """A model may write anything: what can be read is read as the tokenizer decodes it."""
    ids = [ord("("), 0xA9, 0xC3, ord("["), 0xC3, EOS, 0xA9, 0xE2, 0x82, ord("x")]
    _, pieces = written(by_bytes, ids)
    assert pieces == ["(", "", "", "\ufffd\ufffd[", "", "", "é", "", "", "\ufffdx"]
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.choice([0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 65, 66, EOS]) for _ in range(20)] + [65]
        assert "".join(written(by_bytes, ids)[1]) == by_bytes.tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_complete_nothing(by_bytes):
    rows, pieces = written(by_bytes, [EOS, ord("("), EOS, PAD, ord("x")])
    assert pieces == ["", "(", "", "", "x"]
    assert rows[1] == [0, 1, 1, 1, 1]


# ---- saving


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert config.keys() == {"auto_map", "axes", "processor_class"}
    assert config["auto_map"] == {"AutoProcessor": "processing_multigrid.MultiGridProcessor"}
    assert config["axes"] == [make_axis(spec).to_spec() for spec in AXES]
    for loaded in (AutoProcessor.from_pretrained(tmp_path), MultiGridProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is MultiGridProcessor
        for text in random_texts(10, seed=2):
            assert loaded(text)["meta_ids"] == processor(text)["meta_ids"]
    assert MultiGridProcessor.from_pretrained(tmp_path, axes=["constant"]).axis_names == ["constant"]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()


def test_an_axis_of_ones_own(by_bytes, tmp_path):
    class Vowels(MetaAxis):
        def __init__(self, name="vowels", letters="aeiou"):
            super().__init__(name, ("no", "yes"))
            self.letters = letters

        def start(self):
            return 0

        def step(self, state, characters):
            for character in characters:
                state = int(character in self.letters)
            return state, state

        def arguments(self):
            return {"letters": self.letters}

    MultiGridProcessor(by_bytes.tokenizer, [Vowels(letters="yo")]).save_pretrained(tmp_path)
    assert MultiGridProcessor.from_pretrained(tmp_path)("you")["meta_ids"] == [[[1, 1, 0]]]
    config = (tmp_path / "processor_config.json").read_text(encoding="utf-8")
    (tmp_path / "processor_config.json").write_text(config.replace("Vowels", "Consonants"))
    with pytest.raises(ValueError, match="'vowels' is of class 'Consonants'.*import the module that defines it"):
        MultiGridProcessor.from_pretrained(tmp_path)


CLEAN_ROOM = """
sys.modules["nltk"] = None
import torch
from transformers import AutoProcessor

folder, texts = sys.argv[1], torch.load(sys.argv[1] + "/texts.pt")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
torch.save([axis.annotate(text) for axis in processor.axes if "part" not in axis.name for text in texts], folder + "/ids.pt")
try:
    processor(texts)
except ImportError as error:
    print(error)
processor.save_pretrained(folder + "/again")
again = AutoProcessor.from_pretrained(folder + "/again", trust_remote_code=True)
assert [axis.to_spec() for axis in again.axes] == [axis.to_spec() for axis in processor.axes]
print(type(processor).__name__, type(processor.axes[0]).__module__.split(".")[0], len(again.axes))
"""


def test_a_saved_folder_works_without_this_package(by_bytes, tmp_path):
    tree = {"class": "DecisionTreeAxis", "nodes": [[1, 96, 1, 2], [1], [2]], "vocabulary": ["none", "a", "b"]}
    axes = ["constant", *AXES, "indentation", "string", tree, "part_of_speech"]
    processor = MultiGridProcessor(by_bytes.tokenizer, axes)
    processor.save_pretrained(tmp_path)
    texts = random_texts(5, seed=3)
    torch.save(texts, tmp_path / "texts.pt")
    said = run_alone(CLEAN_ROOM, tmp_path, tmp_path).strip().split("\n")
    assert said == [
        "this axis needs NLTK: `pip install nltk`.",
        f"MultiGridProcessor transformers_modules {len(axes)}",
    ]
    assert torch.load(tmp_path / "ids.pt") == [axis.annotate(text) for axis in processor.axes[:-1] for text in texts]


@pytest.mark.parametrize("first", ["modeling_heptapod", "transformers.models.auto.processing_auto"])
def test_auto_processor_knows_the_class_before_it_is_imported(by_bytes, tmp_path, first):
    by_bytes.save_pretrained(tmp_path)
    code = f"""
import sys
import {first}
from transformers import AutoProcessor
import modeling_heptapod
assert "modeling_heptapod.processing_multigrid" not in sys.modules
processor = AutoProcessor.from_pretrained({str(tmp_path)!r})
assert type(processor) is modeling_heptapod.MultiGridProcessor
assert len(processor("ab")["meta_ids"][0]) == {len(AXES)}
"""
    run_beside(code)


# ---- bad input


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"text": 3}, TypeError, "`text` must be a string"),
        ({"text": ["a", None]}, TypeError, "`text` must be a string"),
        ({"text": []}, ValueError, "at least one text"),
        ({"text": "a", "images": []}, TypeError, "images"),
    ],
)
def test_bad_input_is_named(by_bytes, arguments, error, message):
    with pytest.raises(error, match=message):
        by_bytes(**arguments)


@pytest.mark.parametrize(
    "axes, error, message",
    [
        (["affix", "affix"], ValueError, r"`axes` must have different names, got \['affix', 'affix'\]"),
        ("affix", ValueError, "`axes` must be a sequence of axes, got 'affix'"),
        (RandomAxis(), ValueError, "`axes` must be a sequence of axes, got RandomAxis"),
        (["syntax"], ValueError, "'syntax' is neither a .json file nor one of"),
        ([3], TypeError, "an axis is made from"),
    ],
)
def test_bad_axes_are_named(by_bytes, axes, error, message):
    with pytest.raises(error, match=message):
        MultiGridProcessor(by_bytes.tokenizer, axes)


def test_gold_tags_serve_for_training_only(by_bytes, tmp_path):
    axis = GoldTagAxis(texts=[("ab c", ((0, 2, "N"),))])
    processor = MultiGridProcessor(by_bytes.tokenizer, [axis])
    assert processor("ab c")["meta_ids"] == [[[1, 1, 0, 0]]]
    processor.save_pretrained(tmp_path)
    loaded = MultiGridProcessor.from_pretrained(tmp_path)
    assert loaded.axis_vocab_sizes == [2]
    with pytest.raises(ValueError, match="'gold' has no gold tags for the text"):
        loaded("ab c")
    with pytest.raises(ValueError, match="'gold' cannot be continued"):
        loaded.axes[0].start()
