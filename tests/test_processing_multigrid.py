"""Axis ids stand at their tokens: padded, truncated, with special tokens, saved, loaded, and while a model writes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import build_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from modeling_heptapod import Axis, GoldTagAxis, MultiGridProcessor, RandomAxis, make_axis
from tests.clean_room import run_alone, run_beside
from tests.tiny_multigrid import tiny_multigrid


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
    out = processor(["f('é", "x"], padding=True, padding_side="right", return_tensors="pt")
    assert out.keys() == {"input_ids", "attention_mask", "axis_ids"} and processor.model_input_names == list(out)
    assert out.input_ids.tolist() == [[*b"f('\xc3\xa9"], [ord("x"), *[PAD] * 4]]
    assert out.attention_mask.tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert out.axis_ids.tolist() == [[[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [[0] * 5, [0] * 5]]
    assert {value.dtype for value in out.values()} == {torch.int64}
    assert (processor.axis_names, processor.axis_vocab_sizes) == (["bracket", "string"], [5, 6])


def test_ids_are_those_of_the_axes(processor):
    texts = [*random_texts(30), SOURCE[:2000]]
    out = processor(texts, padding=True, split_special_tokens=True, return_tensors="pt", return_offsets_mapping=True)
    assert out.axis_ids.shape == (len(texts), len(AXES), out.input_ids.shape[1])
    for text, ids, mask, rows in zip(texts, out.input_ids, out.attention_mask, out.axis_ids):
        encoded = processor.tokenizer(text, split_special_tokens=True, return_offsets_mapping=True)
        assert ids[mask == 1].tolist() == encoded["input_ids"]
        assert processor.tokenizer.decode(ids[mask == 1]) == text
        expected = [axis.annotate(text, encoded["offset_mapping"]) for axis in processor.axes]
        assert rows[:, mask == 1].tolist() == expected == processor.annotate(text, encoded["offset_mapping"])
        assert not rows[:, mask == 0].any()
    assert out.offset_mapping.shape == (*out.input_ids.shape, 2)
    lists = processor(texts, split_special_tokens=True)
    assert [len(row) for row in lists["axis_ids"][0]] == [len(lists["input_ids"][0])] * len(AXES)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("truncation_side", ["left", "right"])
def test_sides_and_special_tokens(with_ends, padding_side, truncation_side):
    with_ends.tokenizer.padding_side, with_ends.tokenizer.truncation_side = padding_side, truncation_side
    texts = ["f('é€', ing)", "def", "(\U0001f419\U0001f419"]
    whole = [with_ends(text, add_special_tokens=False)["axis_ids"][0] for text in texts]
    for length in (3, 5, 8, 30):
        out = with_ends(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
        assert out.axis_ids.shape == (3, len(AXES), length)
        for text, rows, ids, mask, meta in zip(texts, whole, out.input_ids, out.attention_mask, out.axis_ids):
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
        ids = [by_bytes(text, truncation=True, max_length=length)["axis_ids"] for text in (first, second)]
        assert ids[0] == ids[1] == [[row[:length] for row in by_bytes(first)["axis_ids"][0]]]


def test_special_tokens_in_a_text_may_be_text(processor):
    text = "x = '<|endoftext|>' # <|pad|>"
    out = processor(text, split_special_tokens=True, return_tensors="pt")
    assert not {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id} & set(out.input_ids[0].tolist())
    assert processor.decode(out.input_ids[0]) == text


def test_without_axes_it_is_a_tokenizer(by_bytes):
    processor = MultiGridProcessor(by_bytes.tokenizer)
    out = processor("abc", return_tensors="pt")
    assert out.keys() == {"input_ids", "attention_mask"} and out.input_ids.tolist() == [[97, 98, 99]]
    assert (processor.axes, processor.axis_names, processor.axis_vocab_sizes) == ((), [], [])


def test_text_without_tokens(processor):
    out = processor(["", "a"], padding=True, return_tensors="pt")
    assert out.axis_ids.shape == (2, len(AXES), 1) and not out.axis_ids[0].any()
    for tensors, dtype in (("pt", torch.int64), ("np", np.dtype("int64"))):
        out = processor("", return_tensors=tensors)
        assert {name: tuple(values.shape) for name, values in out.items()} == {
            "input_ids": (1, 0),
            "attention_mask": (1, 0),
            "axis_ids": (1, len(AXES), 0),
        }
        assert {values.dtype for values in out.values()} == {dtype}


# ---- special tokens, chats, and the calling convention of transformers' processors

CHAT = "{% for m in messages %}{% if m.role == 'user' %}<|turn|>{{ m.content }}{% else %}{% generation %}"
CHAT += "{{ m.content }}<|endoftext|>{% endgeneration %}{% endif %}{% endfor %}"
TURN = 258
ASKED, ANSWERED = {"role": "user", "content": "f("}, {"role": "assistant", "content": "[é"}


@pytest.fixture
def for_chats(by_bytes):
    by_bytes.tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    by_bytes.tokenizer.add_tokens(["(def"])
    by_bytes.tokenizer.chat_template = CHAT
    return MultiGridProcessor(by_bytes.tokenizer, ["bracket", "token_kind"])


def test_special_tokens_in_a_text_are_their_ids(for_chats):
    """As for the tokenizer; axes see the text without them, as they do while a model writes."""
    text = "<|turn|>f('<|endoftext|>é(def<|turn|>"
    for options in ({}, {"truncation": True, "max_length": 8}, {"padding": "max_length", "max_length": 12}):
        options["padding_side"] = "right"
        out = for_chats(text, return_special_tokens_mask=True, **options)
        ids = out["input_ids"][0]
        assert ids == for_chats.tokenizer(text, **options)["input_ids"]
        assert ids[:8] == [TURN, *b"f('", EOS, *"é".encode(), 259][:8]
        mask = out["special_tokens_mask"][0]
        assert mask == [int(x in (TURN, EOS, PAD)) for x in ids]
        plain = iter(zip(*for_chats("f('é(def", split_special_tokens=True)["axis_ids"][0]))
        assert list(zip(*out["axis_ids"][0])) == [(0, 0) if special else next(plain) for special in mask]
    many = [piece for text in random_texts(40, seed=5) for piece in (text, "<|turn|>")]
    text = "".join(many)
    out = for_chats(text, return_tensors="pt")
    assert (out.input_ids == TURN).sum() == 40 and (out.input_ids == EOS).any()
    reading, states, rows = (), [axis.start() for axis in for_chats.axes], []
    for token in out.input_ids[0].tolist():
        if token in (TURN, EOS):
            rows.append([0, 0])
            continue
        characters, reading = for_chats.new_characters(reading, token)
        steps = [axis.step(state, characters) for axis, state in zip(for_chats.axes, states)]
        states = [state for _, state in steps]
        rows.append([axis_id for axis_id, _ in steps])
    assert out.axis_ids[0].T.tolist() == rows


def test_the_tokenizer_decides_on_special_tokens_unless_told(for_chats):
    for_chats.tokenizer.split_special_tokens = True
    assert TURN not in for_chats("<|turn|>")["input_ids"][0]
    assert for_chats("<|turn|>", split_special_tokens=False)["input_ids"] == [[TURN]]


def test_chats(for_chats, tmp_path):
    first, second = [ASKED, ANSWERED], [{**ASKED, "content": "é(def x"}]
    by_tokenizer = [for_chats.tokenizer.apply_chat_template(x, return_dict=True)["input_ids"] for x in (first, second)]
    for_chats.save_pretrained(tmp_path)
    for processor in (for_chats, AutoProcessor.from_pretrained(tmp_path)):
        one = processor.apply_chat_template(first, tokenize=True, return_dict=True)
        assert (
            one["input_ids"] == by_tokenizer[:1]
            and one["axis_ids"] == processor("<|turn|>f([é<|endoftext|>")["axis_ids"]
        )
        assert processor.apply_chat_template(first, tokenize=True) == by_tokenizer[:1]
        assert processor.apply_chat_template(first) == "<|turn|>f([é<|endoftext|>"
        options = {"padding": True, "padding_side": "left"}
        out = processor.apply_chat_template(
            [first, second], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        )
        ids = [row[mask == 1].tolist() for row, mask in zip(out.input_ids, out.attention_mask)]
        assert ids == by_tokenizer and out.attention_mask[1].tolist() == [0] + [1] * 6
        assert out.axis_ids.shape == (2, 2, 7) and not out.axis_ids[1, :, :2].any()
    masked = for_chats.apply_chat_template(first, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert masked["assistant_masks"] == [[0, 0, 0, 1, 1, 1, 1]]


def test_arguments_may_come_in_dicts(for_chats):
    expected = for_chats(["(", "f(x"], padding=True, return_tensors="pt")
    for given in (
        {"text_kwargs": {"padding": True, "return_tensors": "pt"}},
        {"text_kwargs": {"padding": True}, "common_kwargs": {"return_tensors": "pt"}, "images": None, "audio": None},
        {"text_kwargs": {"padding": True, "stride": None}, "images_kwargs": {}, "return_tensors": "pt"},
        {"common_kwargs": {"padding": False}, "text_kwargs": {"padding": "longest"}, "return_tensors": "pt"},
        {"padding": True, "return_tensors": "pt", "verbose": True, "return_mm_token_type_ids": False},
    ):
        out = for_chats(text=["(", "f(x"], **given)
        assert out.keys() == expected.keys()
        assert all(torch.equal(out[name], expected[name]) for name in out)


# ---- batches of rows


def test_rows_of_a_dataset_make_a_batch(by_bytes):
    """The usual recipe: `datasets.map(processor)` and a stock collator."""
    texts = ["x = 1\n", "def f(x):\n    return x\n", "", "é"]
    rows = Dataset.from_dict({"text": texts}).map(
        lambda batch: dict(by_bytes(batch["text"])), batched=True, batch_size=2, remove_columns=["text"]
    )
    for side in ("right", "left"):
        by_bytes.tokenizer.padding_side = side
        expected = by_bytes(texts, padding=True, return_tensors="pt")
        for features in (list(rows), list(rows.with_format("torch")), list(rows.with_format("numpy"))):
            batch = DataCollatorWithPadding(by_bytes)(features)
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch), side
        batch = DataCollatorForLanguageModeling(by_bytes, mlm=False)(list(rows))
        assert torch.equal(batch["axis_ids"], expected.axis_ids)
        assert torch.equal(batch["labels"], expected.input_ids.masked_fill(expected.attention_mask == 0, -100))
        labelled = [{**row, "labels": [7] * len(row["input_ids"])} for row in rows]
        batch = DataCollatorWithPadding(by_bytes)(labelled)
        assert torch.equal(batch["labels"], torch.where(expected.attention_mask == 1, 7, -100))
    columns = {name: rows[name] for name in rows.column_names}
    out = by_bytes.pad(columns, pad_to_multiple_of=32, padding_side="right", return_tensors="np")
    assert out["axis_ids"].shape == (4, len(AXES), 32) and out["axis_ids"].dtype == np.int64
    assert by_bytes.pad([rows[2]], return_tensors="pt").axis_ids.shape == (1, len(AXES), 0)
    assert by_bytes.pad([rows[0]]).data == {name: [value] for name, value in rows[0].items()}


def test_a_trainer_takes_these_batches(by_bytes, tmp_path):
    texts = ["x = 1\n", "def f(x):\n    return x\n"] * 2
    rows = [{name: column[0] for name, column in by_bytes(text).items()} for text in texts]
    config = {"axis_names": by_bytes.axis_names, "axis_vocab_sizes": by_bytes.axis_vocab_sizes}
    model = tiny_multigrid(vocab_size=258, **config)
    options = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no"
    )
    collate = DataCollatorForLanguageModeling(by_bytes, mlm=False)
    trainer = Trainer(model, options, train_dataset=rows, data_collator=collate, processing_class=by_bytes)
    batch = collate(rows)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert trainer.train().training_loss > 0
    assert trainer.evaluate(rows)["eval_loss"] < expected


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ("ab", TypeError, "`encoded_inputs` must be a list of dicts or a dict"),
        ([], ValueError, "`encoded_inputs` must be at least one row with `input_ids`"),
        ([{"axis_ids": [[1]]}], ValueError, "`encoded_inputs` must be at least one row with `input_ids`"),
        ([{"input_ids": [1]}], ValueError, "`encoded_inputs` must have `axis_ids` of the axes"),
        ([{"input_ids": [1]}, {"ids": [1]}], ValueError, "rows with the same names"),
        ([{"input_ids": [1], "axis_ids": [[1], [1]]}], ValueError, r"`axis_ids` must be \[4, 1\] .* got \[2, 1\]"),
        ([{"input_ids": [1], "axis_ids": [[1]] * 4, "labels": [1, 2]}], ValueError, r"`labels` must be \[1\]"),
        ({"input_ids": [[1]], "axis_ids": []}, ValueError, "columns of equal length"),
    ],
)
def test_rows_that_make_no_batch_are_named(by_bytes, rows, error, message):
    with pytest.raises(error, match=message):
        by_bytes.pad(rows)


# ---- while a model writes


def written(processor, token_ids):
    """Axis ids of tokens that come one by one, `[axes][tokens]`, and the characters of each."""
    states, pending, rows, pieces = [axis.start() for axis in processor.axes], (), [], []
    for token_id in token_ids:
        processor.new_characters(pending, 65)  # another beam
        characters, pending = processor.new_characters(pending, token_id)
        pieces.append(characters)
        steps = [axis.step(state, characters) for axis, state in zip(processor.axes, states)]
        states = [state for _, state in steps]
        rows.append([axis_id for axis_id, _ in steps])
    return [list(row) for row in zip(*rows)], pieces


def test_tokens_one_by_one_give_the_same_ids(processor):
    for text in [*(text for text in random_texts(60, seed=1) if text), SOURCE[:3000]]:
        out = processor(text, split_special_tokens=True, return_tensors="pt")
        rows, pieces = written(processor, out.input_ids[0])
        assert rows == out.axis_ids[0].tolist() and "".join(pieces) == text


def test_characters_of_other_tokenizers():
    processor = MultiGridProcessor(sentencepiece_like(), AXES)
    for text in ("def f(x): return 'abc'", "ing for  x", "a"):
        ids = processor(text)["input_ids"][0]
        assert len(ids) < len(text) or text == "a"
        rows, pieces = written(processor, ids)
        assert "".join(pieces) == text
        assert rows == processor(text)["axis_ids"][0]


def test_a_token_of_a_character_and_a_part_of_the_next():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        sign: place for place, sign in enumerate([*alphabet, "a\u00c3"])
    }  # the first byte of an e with an accent
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "\u00c3")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    processor = MultiGridProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer), AXES)
    ids = processor("(aéb")["input_ids"][0]
    assert len(ids) == 4
    assert written(processor, ids)[1] == ["(", "a", "é", "b"]


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
    assert config["axes"] == [make_axis(spec).to_dict() for spec in AXES]
    for loaded in (AutoProcessor.from_pretrained(tmp_path), MultiGridProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is MultiGridProcessor
        for text in random_texts(10, seed=2):
            assert loaded(text)["axis_ids"] == processor(text)["axis_ids"]
    assert MultiGridProcessor.from_pretrained(tmp_path, axes=["constant"]).axis_names == ["constant"]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()


def test_an_axis_of_ones_own(by_bytes, tmp_path):
    class ChosenLetters(Axis):
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

    MultiGridProcessor(by_bytes.tokenizer, [ChosenLetters(letters="yo")]).save_pretrained(tmp_path)
    assert MultiGridProcessor.from_pretrained(tmp_path)("you")["axis_ids"] == [[[1, 1, 0]]]
    config = (tmp_path / "processor_config.json").read_text(encoding="utf-8")
    (tmp_path / "processor_config.json").write_text(config.replace("ChosenLetters", "NoSuchLetters"))
    with pytest.raises(ValueError, match="'vowels' is of class 'NoSuchLetters'.*import the module that defines it"):
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
assert [axis.to_dict() for axis in again.axes] == [axis.to_dict() for axis in processor.axes]
print(type(processor).__name__, type(processor.axes[0]).__module__.split(".")[0], len(again.axes))
"""


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("first", ["modeling_heptapod", "transformers.models.auto.processing_auto"])
def test_auto_processor_knows_the_class_before_it_is_imported(by_bytes, tmp_path, first):
    by_bytes.save_pretrained(tmp_path)
    code = f"""
import sys
import {first}
from transformers import AutoProcessor
import modeling_heptapod
assert "modeling_heptapod.multigrid.processing_multigrid" not in sys.modules
processor = AutoProcessor.from_pretrained({str(tmp_path)!r})
assert type(processor) is modeling_heptapod.MultiGridProcessor
assert len(processor("ab")["axis_ids"][0]) == {len(AXES)}
"""
    run_beside(code)


# ---- bad input


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"text": 3}, TypeError, "`text` must be a string"),
        ({"text": ["a", None]}, TypeError, "`text` must be a string"),
        ({"text": []}, ValueError, "at least one text"),
        ({"text": "a", "images": []}, TypeError, "`images` must be None"),
        ({"text": "a", "text_kwargs": []}, TypeError, "`text_kwargs` must be a dict"),
        ({"text": "a", "text_kwargs": {"padding": True}, "padding": True}, ValueError, "`padding` was given twice"),
        ({"text": "a", "stride": 2}, TypeError, "does not support the keyword argument `stride`"),
        (
            {"text": "a", "text_kwargs": {"text_pair": "b"}},
            TypeError,
            "does not support the keyword argument `text_pair`",
        ),
        ({"text": "a", "pading": True}, TypeError, "unexpected keyword argument `pading`"),
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
    assert processor("ab c")["axis_ids"] == [[[1, 1, 0, 0]]]
    processor.save_pretrained(tmp_path)
    loaded = MultiGridProcessor.from_pretrained(tmp_path)
    assert loaded.axis_vocab_sizes == [2]
    with pytest.raises(ValueError, match="'gold' has no gold tags for the text"):
        loaded("ab c")
    with pytest.raises(ValueError, match="'gold' cannot be continued"):
        loaded.axes[0].start()
