"""Text to pages and back: nothing lost, nothing in the wrong cell; what is clipped is counted; holes where told."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import build_tokenizer
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TextDiffusionStreamer,
)

from modeling_heptapod import HeptapodProcessor
from modeling_heptapod.heptapod.processing_heptapod import REGIONS, region_mask
from tests.clean_room import run_alone, run_beside
from tests.tiny_heptapod import tiny_heptapod


SOURCE = Path(__file__).read_text(encoding="utf-8")
NEWLINE, BLANK, PAD, MASK = 10, 259, 257, 258  # of the byte tokenizer
CHARACTERS = [
    *"abc  \t\n\n\n.(é",
    "\r",
    "\r\n",
    "\u2028",
    "\u00a0",
    "\x00",
    "\U0001f419",
    "<|mask|>",
    "<|blank|>",
    "    ",
]


def random_texts(number, longest=40, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(CHARACTERS, k=draw.randint(0, longest))) for _ in range(number)]


@pytest.fixture(scope="module", params=["byte", "bpe"])
def processor(request):
    return HeptapodProcessor(build_tokenizer(request.param, [SOURCE], vocab_size=400, for_pages=True))


@pytest.fixture(scope="module")
def by_bytes():
    return HeptapodProcessor(build_tokenizer("byte", [], for_pages=True))


def tokens_of(processor, text):
    """Tokens of a text, line by line, with an id for each newline: written without the processor."""
    ids = []
    for number, line in enumerate(text.split("\n")):
        ids += [processor.newline_token_id] if number else []
        ids += processor.tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def test_a_page_by_hand(by_bytes):
    out = by_bytes("ab\n\nlonger one\nx", height=6, width=5)
    assert out.keys() == {"input_ids", "attention_mask"}
    rows = ["ab\n__", "\n____", "longe", "r one", "\n____", "x____"]
    assert out.input_ids.tolist() == [[[BLANK if c == "_" else ord(c) for c in row] for row in rows]]
    assert out.input_ids.dtype == out.attention_mask.dtype == torch.int64
    assert out.attention_mask.shape == (1, 6, 5) and out.attention_mask.all()
    assert by_bytes.decode(out.input_ids[0]) == "ab\n\nlonger one\nx"


def test_texts_come_back(processor):
    draw = random.Random(1)
    for text in [*random_texts(300), SOURCE[:3000], "", "\n", "\n\n\n", "no newline", "one\n"]:
        width = draw.choice([None, *range(1, 13)])
        out = processor(text, width=width)
        assert processor.decode(out.input_ids[0]) == text
        height, width = out.input_ids.shape[1:]
        roomy = processor(text, height=height + draw.randint(0, 3), width=width)
        assert processor.decode(roomy.input_ids[0]) == text
        assert processor.decode(roomy.input_ids[0].flatten()) == text
        assert torch.equal(roomy.input_ids[:, :height], out.input_ids)
        assert (roomy.input_ids[:, height:] == processor.blank_token_id).all()


def test_rows_are_lines(processor):
    """Each row is tokens, then maybe a newline, then blanks; only a full row or the last text has no newline."""
    for text in random_texts(200, seed=2):
        page = processor(text, width=7).input_ids[0]
        assert page[page != processor.blank_token_id].tolist() == tokens_of(processor, text)
        written = [row[row != processor.blank_token_id].tolist() for row in page]
        for number, (row, content) in enumerate(zip(page.tolist(), written)):
            assert row[: len(content)] == content  # blanks come last
            assert processor.newline_token_id not in content[:-1]
            ends = content[-1:] == [processor.newline_token_id]
            assert ends or len(content) == 7 or not any(written[number + 1 :])
        assert sum(row[-1:] == [processor.newline_token_id] for row in written) == text.count("\n")


def test_different_texts_have_different_pages(processor):
    texts = sorted(set(random_texts(300, longest=5, seed=3)))
    pages = processor(texts, height=12, width=6).input_ids
    assert len(pages.flatten(1).unique(dim=0)) == len(texts)


def test_pages_of_different_size_in_a_batch(processor):
    texts = random_texts(20, seed=4)
    sizes = [random.Random(i).randint(1, 9) for i in range(20)]
    out = processor(texts, width=sizes)
    assert processor.batch_decode(out.input_ids) == texts
    pad = processor.tokenizer.pad_token_id
    for text, width, page, mask in zip(texts, sizes, out.input_ids, out.attention_mask):
        alone = processor(text, width=width).input_ids[0]
        assert torch.equal(page[: len(alone), :width], alone)
        assert mask[: len(alone), :width].all() and mask.sum() == alone.numel()
        assert torch.equal(page == pad, mask == 0)
    out = processor(["a", "b\nc"], height=[3, 2], width=[1, 4])
    assert out.input_ids.shape == (2, 3, 4) and out.attention_mask.sum((1, 2)).tolist() == [3, 8]


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_labels_are_the_page_without_pads_and_open_cells(by_bytes, return_tensors):
    texts = ["ab\ncdef\n", "longer one"]
    regions = [None, (0, 0, 1, 3)]
    out = by_bytes(texts, mask_region=regions, return_labels=True, return_tensors=return_tensors)
    ids, labels, mask = (torch.as_tensor(out[name]) for name in ("input_ids", "labels", "attention_mask"))
    assert labels.dtype == ids.dtype == torch.int64 and labels.shape == (2, 2, 10)
    assert torch.equal(labels == -100, (mask == 0) | (ids == MASK))
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert (labels == BLANK).any()  # blank cells are predicted like others
    assert "labels" not in by_bytes(texts)


def test_clipping_by_hand(by_bytes):
    text = "ab\nlonger one\nlast\nnot on it\n"
    out = by_bytes(text, height=3, width=5, overflow="truncate", return_num_truncated_tokens=True)
    rows = ["ab\n__", "long\n", "last\n"]
    assert out.input_ids.tolist() == [[[BLANK if c == "_" else ord(c) for c in row] for row in rows]]
    assert out.num_truncated_tokens.tolist() == [len("er one") + len("not on it\n")]
    end = by_bytes("abcdefg", height=1, width=5, overflow="truncate", return_num_truncated_tokens=True)
    assert by_bytes.batch_decode(end.input_ids) == ["abcde"] and end.num_truncated_tokens.tolist() == [2]


def test_what_is_clipped_is_counted(processor):
    texts = random_texts(200, seed=5)
    out = processor(texts, height=3, width=6, overflow="truncate", return_num_truncated_tokens=True)
    for text, page, clipped in zip(texts, out.input_ids, out.num_truncated_tokens.tolist()):
        kept = int((page != processor.blank_token_id).sum())
        assert kept + clipped == len(tokens_of(processor, text))
        if not clipped:
            assert processor.decode(page) == text
        for line, row in zip(text.split("\n"), page):
            content = row[~torch.isin(row, torch.tensor([processor.blank_token_id, processor.newline_token_id]))]
            assert content.tolist() == tokens_of(processor, line)[: len(content)]
    assert any(out.num_truncated_tokens) and not all(out.num_truncated_tokens)


def test_clipping_warns_unless_asked(by_bytes, monkeypatch):
    from modeling_heptapod.heptapod import processing_heptapod

    said = []
    monkeypatch.setattr(processing_heptapod.logger, "warning", said.append)
    by_bytes(["abc\n", "ab"], width=2, height=1, overflow="truncate")
    assert len(said) == 1 and "[2, 0]" in said[0]
    by_bytes(["abc\n", "ab"], width=2, height=1, overflow="truncate", return_num_truncated_tokens=True)
    by_bytes(["a\n", "ab"], width=2, height=1, overflow="truncate")
    assert len(said) == 1


def test_paginate_loses_nothing(processor):
    for text in [SOURCE, *random_texts(30, seed=6)]:
        pages = processor.paginate(text, height=5, width=9)
        assert pages.dtype == np.int64 and pages.shape[1:] == (5, 9)
        assert processor.decode(pages.reshape(-1, 9)) == text
        whole = processor(text, width=9).input_ids[0].numpy()
        if text:
            assert len(pages) == -(-len(whole) // 5)
            np.testing.assert_array_equal(pages.reshape(-1, 9)[: len(whole)], whole)
    assert processor.paginate("", height=5, width=9).shape == (0, 5, 9)


# ---- holes


def cells(*rows):
    return [[c == "#" for c in row] for row in rows]


@pytest.mark.parametrize(
    "region, expected",
    [
        ("top", cells("####", "####", "....", "....", "....")),
        ("middle", cells("....", "####", "####", "....", "....")),
        ("bottom", cells("....", "....", "....", "####", "####")),
        ("hole", cells("....", ".##.", ".##.", ".##.", "....")),
        ("frame", cells("####", "#..#", "#..#", "#..#", "####")),
        ("all", cells("####", "####", "####", "####", "####")),
        ((1, 0, 3, 2), cells("....", "##..", "##..", "##..", "....")),
        ((4, 3, 1, 1), cells("....", "....", "....", "....", "...#")),
        (np.eye(5, 4, dtype=bool), np.eye(5, 4, dtype=bool).tolist()),
        (torch.eye(5, 4, dtype=torch.bool), np.eye(5, 4, dtype=bool).tolist()),
    ],
)
def test_regions(by_bytes, region, expected):
    assert region_mask(region, 5, 4).tolist() == expected
    closed = by_bytes("abcd" * 5, width=4).input_ids
    out = by_bytes(["abcd" * 5, "abc"], width=[4, 2], mask_region=[region, None])
    is_masked = out.input_ids[0] == MASK
    assert is_masked.tolist() == expected
    assert torch.equal(out.input_ids[0][~is_masked], closed[0][~is_masked]) and out.attention_mask[0].all()
    assert not (out.input_ids[1] == MASK).any()


def test_cells_of_laid_out_pages_are_opened(by_bytes):
    out = by_bytes(["a\nb\nc\n", "abcdefgh"], width=[2, 4], height=[3, 3])
    before = out.input_ids.clone()
    for pages in (out.input_ids, out.input_ids.numpy()):
        opened = by_bytes.mask_cells(pages, "bottom")
        assert torch.equal(
            opened == MASK, torch.tensor([[[0] * 4] * 2 + [[1, 1, 0, 0]], [[0] * 4] * 2 + [[1] * 4]]) > 0
        )
        assert torch.equal(opened[opened != MASK], before[opened != MASK]) and torch.equal(out.input_ids, before)
    assert torch.equal(by_bytes.mask_cells(before[1], (0, 0, 1, 1)).flatten()[1:], before[1].flatten()[1:])
    expected = by_bytes.mask_cells(before, "bottom")
    for small in (before.numpy().astype(np.uint16), before.numpy().astype(np.int32), before.int()):
        opened = by_bytes.mask_cells(small, "bottom")
        assert opened.dtype == torch.int64 and torch.equal(opened, expected)
    with pytest.raises(ValueError, match="`mask_region`"):
        by_bytes.mask_cells(before, "edge")


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (32, 64)])
def test_regions_of_pages_of_any_size(size):
    for region in REGIONS:
        assert region_mask(region, *size).shape == size
        assert region_mask(region, *size).any() != (region == "frame" and size == (1, 1))
    np.testing.assert_array_equal(region_mask("frame", *size), ~region_mask("hole", *size))


def test_regions_count_the_cells_of_their_own_page(by_bytes):
    out = by_bytes(["a\nb\nc\n", "a\nb\nc\nd\ne\nf\n"], width=[2, 4], mask_region="bottom")
    assert (out.input_ids[0] == MASK).tolist() == [[False] * 4] * 2 + [[True] * 2 + [False] * 2] + [[False] * 4] * 3
    assert (out.input_ids[1] == MASK).any(1).tolist() == [False] * 4 + [True] * 2


def test_special_tokens_in_a_text_are_text(processor):
    text = "<|mask|> <|pad|>\n<|blank|><|endoftext|>\n"
    out = processor(text, width=40)
    special = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|mask|>", "<|pad|>", "<|endoftext|>")]
    assert not torch.isin(out.input_ids, torch.tensor(special)).any()
    assert processor.decode(out.input_ids[0]) == text


def test_decoding_shows_open_cells_and_leaves_out_the_rest(by_bytes):
    page = by_bytes("abc\nd\u00e9f\n", height=3, width=4, mask_region=(0, 1, 2, 2)).input_ids[0]
    assert by_bytes.decode(page) == "a\u2591\u2591\nd\u2591\u2591f\n"
    assert by_bytes.decode(page, mask_text="?") == "a??\nd??f\n"
    assert by_bytes.decode(page.tolist(), "") == by_bytes.decode(page.numpy(), "") == "a\ndf\n"
    named = by_bytes.decode(page, skip_special_tokens=False)
    assert named.count("<|mask|>") == 4 and named.count("<|blank|>") == 3
    page[2] = torch.tensor([BLANK, PAD, by_bytes.tokenizer.eos_token_id, ord("x")])
    assert by_bytes.decode(page, "") == "a\ndfx"
    page[0] = torch.tensor([0xC3, MASK, 0xA9, ord("\n")])  # half a character on either side
    assert by_bytes.decode(page, "?").startswith("\ufffd?\ufffd\n")
    with pytest.raises(ValueError, match=r"`token_ids` must be .*\[1, 3, 4\]; see `batch_decode`"):
        by_bytes.decode(page[None])


def test_a_streamer_can_decode_with_the_processor(by_bytes, capsys):
    page = by_bytes("abc\nde\n", height=3, width=4)
    streamer = TextDiffusionStreamer(by_bytes)
    streamer.put_draft(page.input_ids.flatten(1))
    streamer.put(page.input_ids.flatten(1))
    streamer.end()
    assert capsys.readouterr().out.endswith("abc\nde\n\n")


# ---- chats, the calling convention of transformers' processors, batches of rows

CHAT = "{% for m in messages %}<|turn|>{{ m.content }}\n{% endfor %}"


def test_special_tokens_become_their_ids_where_asked_for(by_bytes, tmp_path):
    tokenizer = build_tokenizer("byte", [], for_pages=True)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    HeptapodProcessor(tokenizer, height=2, width=8).save_pretrained(tmp_path)
    turn, hello = tokenizer.convert_tokens_to_ids("<|turn|>"), {"role": "user", "content": "hi<|mask|>"}
    for processor in (HeptapodProcessor(tokenizer, height=2, width=8), AutoProcessor.from_pretrained(tmp_path)):
        out = processor("<|turn|>a<|mask|>\n", split_special_tokens=False)
        assert out.input_ids[0, 0].tolist() == [turn, ord("a"), MASK, NEWLINE, *[BLANK] * 4]
        assert processor.decode(out.input_ids[0]) == "a\u2591\n"
        assert not torch.isin(processor("<|turn|>", height=1).input_ids, torch.tensor([turn])).any()
        one = processor.apply_chat_template([hello], tokenize=True, return_dict=True)
        assert one.input_ids[0, 0].tolist() == [turn, *b"hi", MASK, NEWLINE, *[BLANK] * 3]
        two = processor.apply_chat_template(
            [[hello], [hello, {**hello, "content": "yo"}]],
            tokenize=True,
            return_dict=True,
            processor_kwargs={"height": 3, "return_labels": True},
        )
        assert two.input_ids.shape == two.labels.shape == (2, 3, 8) and (two.input_ids[1] == turn).sum() == 2
        assert torch.equal(two.input_ids[0, :2], one.input_ids[0])
        spelled = processor.apply_chat_template(
            [hello], tokenize=True, processor_kwargs={"split_special_tokens": True, "height": 4}
        )
        assert processor.decode(spelled[0]) == "<|turn|>hi<|mask|>\n"
        assert processor.apply_chat_template([hello]) == "<|turn|>hi<|mask|>\n"


def test_arguments_may_come_in_dicts(by_bytes):
    expected = by_bytes(["a", "b\nc"], height=3, return_tensors="np")
    for given in (
        {"text_kwargs": {"height": 3}, "common_kwargs": {"return_tensors": "np"}, "images": None, "videos": None},
        {"text_kwargs": {"padding": "longest", "truncation": None}, "height": 3, "return_tensors": "np"},
        {"height": 3, "padding": True, "add_special_tokens": False, "verbose": False, "return_tensors": "np"},
    ):
        out = by_bytes(text=["a", "b\nc"], **given)
        assert all(np.array_equal(out[name], expected[name]) for name in expected) and out.keys() == expected.keys()
    out = by_bytes(["a", "b\nc"], height=3, common_kwargs={"height": 9, "return_tensors": "np"})  # the call wins
    assert np.array_equal(out["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="`height` was given twice: in `text_kwargs` and by itself"):
        by_bytes("a", height=3, text_kwargs={"height": 4})
    lists = by_bytes(["a", "b\nc"], height=3, return_tensors=None)
    assert lists["input_ids"] == expected["input_ids"].tolist()


def test_rows_of_a_dataset_make_a_batch(by_bytes):
    """The usual recipe: `datasets.map(processor)` and a stock collator; pages of different size."""
    texts = ["a\nb\nc\n", "abcdefgh", ""]
    rows = Dataset.from_dict({"text": texts}).map(
        lambda row: {name: page[0] for name, page in by_bytes(row["text"], return_labels=True).items()},
        remove_columns=["text"],
    )
    expected = by_bytes(texts, return_labels=True)
    for features in (list(rows), list(rows.with_format("torch"))):
        batch = DataCollatorWithPadding(by_bytes)(features)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    ids = [{"input_ids": row["input_ids"]} for row in rows]
    batch = DataCollatorForLanguageModeling(by_bytes, mlm=False)(ids)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with_number = [{**row, "number": 3} for row in rows]
    assert by_bytes.pad(with_number, return_tensors="pt").number.tolist() == [3, 3, 3]
    sized = HeptapodProcessor(by_bytes.tokenizer, height=4, width=9)
    assert DataCollatorWithPadding(sized)(list(rows))["labels"].shape == (3, 4, 9)
    columns = {name: rows[name] for name in rows.column_names}
    assert sized.pad(columns)["input_ids"] == sized.pad(list(rows), return_tensors="np")["input_ids"].tolist()


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([{"input_ids": [1, 2]}], {}, r"`input_ids` must be pages \[height, width\], got one of shape \[2\]"),
        ([{"input_ids": [[1, 2]], "labels": [1, 2]}], {}, r"`labels` must be \[1, 2\] like its page, got \[2\]"),
        ([{"input_ids": [[1, 2]]}], {"max_length": 3}, "`max_length` must be None"),
        ([{"input_ids": [[1, 2]]}], {"pad_to_multiple_of": 8}, "`pad_to_multiple_of` must be None"),
        ([{"input_ids": [[1, 2]]}], {"padding": "max_length"}, "`padding` must be True or 'longest'"),
        ([{"input_ids": [[1] * 10]}], {}, "at most the processor's width, 9, got 10"),
        ([{"input_ids": [[1]] * 5}], {}, "at most the processor's height, 4, got 5"),
        ([{"labels": [[1]]}], {}, "at least one row with `input_ids`"),
    ],
)
def test_rows_that_make_no_batch_are_named(by_bytes, rows, options, message):
    with pytest.raises(ValueError, match=message):
        HeptapodProcessor(by_bytes.tokenizer, height=4, width=9).pad(rows, **options)


def test_columns_of_unequal_length_make_no_batch(by_bytes):
    page = [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"columns of equal length, got \{'input_ids': 2, 'labels': 1\}"):
        by_bytes.pad({"input_ids": [page, page], "labels": [page]})


# ---- saving


def test_saved_and_loaded(processor, tmp_path):
    saved = HeptapodProcessor(processor.tokenizer, height=4, width=11, overflow="truncate")
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert config == {
        "auto_map": {"AutoProcessor": "processing_heptapod.HeptapodProcessor"},
        "blank_token": "<|blank|>",
        "height": 4,
        "overflow": "truncate",
        "processor_class": "HeptapodProcessor",
        "width": 11,
    }
    assert (tmp_path / "processing_heptapod.py").is_file()
    for loaded in (AutoProcessor.from_pretrained(tmp_path), HeptapodProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is HeptapodProcessor
        for text in random_texts(20, seed=7):
            expected = saved(text, return_num_truncated_tokens=True)
            assert torch.equal(loaded(text, return_num_truncated_tokens=True).input_ids, expected.input_ids)
            assert expected.input_ids.shape == (1, 4, 11)
    assert AutoProcessor.from_pretrained(tmp_path, width=3).width == 3
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()


CLEAN_ROOM = """
import torch
from transformers import AutoModelForMaskedLM, AutoProcessor

folder, texts = sys.argv[1], torch.load(sys.argv[1] + "/texts.pt")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
out = processor(texts, height=40, width=12, mask_region="hole")
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
torch.save({**out, "written": model.generate(**out, max_denoising_steps=2)}, folder + "/out.pt")
assert processor.batch_decode(processor(texts, height=40, width=12).input_ids) == texts
processor.save_pretrained(folder + "/again")
again = AutoProcessor.from_pretrained(folder + "/again", trust_remote_code=True)
assert again.batch_decode(again(texts, height=40, width=12).input_ids) == texts
print(type(processor).__name__, type(processor).__module__.split(".")[0])
"""


def test_a_saved_folder_works_without_this_package(by_bytes, tmp_path):
    """The model and its processor in one folder, from text to text."""
    model = tiny_heptapod(vocab_size=260, mask_token_id=MASK, pad_token_id=PAD)
    model.save_pretrained(tmp_path)
    by_bytes.save_pretrained(tmp_path)
    texts = random_texts(5, seed=8)
    torch.save(texts, tmp_path / "texts.pt")
    said = run_alone(CLEAN_ROOM, tmp_path, tmp_path)
    assert said.split() == ["HeptapodProcessor", "transformers_modules"]
    expected = by_bytes(texts, height=40, width=12, mask_region="hole")
    expected["written"] = model.generate(**expected, max_denoising_steps=2)
    for name, value in torch.load(tmp_path / "out.pt").items():
        assert torch.equal(value, expected[name]), name
    assert "\u2591" not in "".join(by_bytes.batch_decode(expected["written"]))
    assert (tmp_path / "again" / "processing_heptapod.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["modeling_heptapod", "transformers.models.auto.processing_auto"])
def test_auto_processor_knows_the_class_before_it_is_imported(by_bytes, tmp_path, first):
    by_bytes.save_pretrained(tmp_path)
    code = f"""
import sys
import {first}
from transformers import AutoProcessor
import modeling_heptapod
assert "modeling_heptapod.heptapod.processing_heptapod" not in sys.modules
processor = AutoProcessor.from_pretrained({str(tmp_path)!r})
assert type(processor) is modeling_heptapod.HeptapodProcessor
assert processor.decode(processor("ab").input_ids[0]) == "ab"
"""
    run_beside(code)


# ---- bad input


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"text": 3}, TypeError, "`text` must be a string"),
        ({"text": ["a", None]}, TypeError, "`text` must be a string"),
        ({"text": []}, ValueError, "at least one text"),
        ({"text": "a", "height": 0}, ValueError, "`height` must be an integer of at least 1, got 0"),
        ({"text": "a", "width": 2.5}, ValueError, "`width` must be an integer of at least 1, got 2.5"),
        ({"text": "a", "width": [1, 2]}, ValueError, "`width` must be one number or one for each of 1 texts, got 2"),
        ({"text": "a", "overflow": "scroll"}, ValueError, "`overflow` must be one of .*'scroll'"),
        (
            {"text": ["a", "a\nb\n"], "height": 1, "width": 9},
            ValueError,
            "Text 1 takes 2 rows of 9 cells, its page has 1",
        ),
        ({"text": "a", "mask_region": "edge"}, ValueError, "`mask_region` must be one of .*frame.*'edge'"),
        ({"text": "a", "mask_region": ["top", "top"]}, ValueError, "`mask_region` must have one entry for each of 1"),
        ({"text": "a", "mask_region": (0, 0, 2, 1)}, ValueError, r"`mask_region` .*\(0, 0, 2, 1\) .* 1 x 1"),
        ({"text": "a", "mask_region": (0, 0, 0, 1)}, ValueError, "`mask_region`"),
        ({"text": "a", "mask_region": (-1, 0, 1, 1)}, ValueError, "`mask_region`"),
        ({"text": "a", "mask_region": np.ones((1, 1))}, ValueError, r"boolean array \[1, 1\]"),
        ({"text": "a", "mask_region": np.ones((2, 1), dtype=bool)}, ValueError, r"boolean array \[1, 1\]"),
        ({"text": "a", "max_length": 3}, TypeError, "does not support the keyword argument `max_length`"),
        ({"text": "a", "truncation": True}, TypeError, "does not support the keyword argument `truncation`"),
        (
            {"text": "a", "add_special_tokens": True},
            TypeError,
            "does not support the keyword argument `add_special_tokens`",
        ),
        ({"text": "a", "hight": 3}, TypeError, "unexpected keyword argument `hight`"),
        ({"text": "a", "images": [1]}, TypeError, "`images` must be None"),
        ({"text": "a", "padding": False}, ValueError, "`padding` must be True"),
        ({"text": "a", "height": 2, "text_kwargs": {"height": 2}}, ValueError, "`height` was given twice"),
    ],
)
def test_bad_input_is_named(by_bytes, arguments, error, message):
    with pytest.raises(error, match=message):
        by_bytes(**arguments)


def test_pages_need_a_size(by_bytes):
    for name, size in (("height", {"width": 3}), ("width", {"height": 3})):
        with pytest.raises(ValueError, match=f"`{name}` of the pages must be given"):
            by_bytes.paginate("a", **size)
    with pytest.raises(ValueError, match="`width` must be an integer"):
        by_bytes.paginate("a", height=3, width=0)


def test_tokenizers_that_cannot_make_pages_are_named(by_bytes):
    plain = build_tokenizer("byte", [])
    with pytest.raises(ValueError, match=r"`blank_token` '<\|blank\|>' is not in the vocabulary"):
        HeptapodProcessor(plain)
    with pytest.raises(ValueError, match="`tokenizer` has no mask_token"):
        HeptapodProcessor(plain, blank_token="<|pad|>")
    tokenizer = build_tokenizer("byte", [], for_pages=True)
    for bad in ("<|mask|>", "<|pad|>", "Ċ"):  # the last one is the newline
        with pytest.raises(ValueError, match="different newline, blank, mask and padding tokens"):
            HeptapodProcessor(tokenizer, blank_token=bad)
    with pytest.raises(ValueError, match="`overflow`"):
        HeptapodProcessor(tokenizer, overflow="wrapped")
    with pytest.raises(ValueError, match="`height`"):
        HeptapodProcessor(tokenizer, height=-1)
    with pytest.raises(TypeError):
        HeptapodProcessor("byte")

    vocabulary = {"a": 0, "[MASK]": 1, "[PAD]": 2, "<|blank|>": 3, "\n": 4, "[UNK]": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    with pytest.raises(ValueError, match="a newline as one token"):
        HeptapodProcessor(PreTrainedTokenizerFast(tokenizer_object=words, **special))
    words.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    with pytest.raises(ValueError, match="does not decode text unchanged"):
        HeptapodProcessor(PreTrainedTokenizerFast(tokenizer_object=words, **special))


@pytest.mark.parametrize(
    "change",
    [
        normalizers.Lowercase(),
        normalizers.NFC(),
        normalizers.NFD(),
        normalizers.NFKC(),
        normalizers.Replace(Regex(" +$"), ""),
        normalizers.Replace("\r", ""),
        normalizers.BertNormalizer(handle_chinese_chars=False, strip_accents=False, lowercase=False),
    ],
    ids=lambda change: type(change).__name__,
)
def test_tokenizers_that_change_text_are_named(change):
    tokenizer = build_tokenizer("byte", [], for_pages=True)
    HeptapodProcessor(tokenizer)
    tokenizer.backend_tokenizer.normalizer = change
    with pytest.raises(ValueError, match="does not decode text unchanged"):
        HeptapodProcessor(tokenizer)


def test_numpy_and_trainer_names(by_bytes):
    out = by_bytes("ab", return_tensors="np")
    assert isinstance(out["input_ids"], np.ndarray)
    assert by_bytes.model_input_names == ["input_ids", "attention_mask"]
