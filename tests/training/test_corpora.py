"""training/corpora.py: what is read, how it is split, and that no byte gets lost on the way into the blocks."""

import bz2
import gzip
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import PackedBlocks, build_tokenizer, encode, load_texts
from transformers import AutoTokenizer


# Every byte value that UTF-8 text can hold turns up here, with line ends, blanks and special tokens spelled out.
HARD_TEXTS = [
    "".join(map(chr, range(1, 0x250))),
    "a\r\nb\rc\n\n\n  \t x ' s don't ,  .  \u00a0\u3000\ufeff",
    "<|endoftext|><|pad|>",
    "".join(chr(point) for point in range(0x800, 0x110000, 997) if not 0xD800 <= point < 0xE000),
    "\x00\x01 \x7f",
]


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request):
    texts = [Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")]
    return build_tokenizer(request.param, texts, vocab_size=400)


def test_folders_of_odd_files(tmp_path, caplog):
    """Names that are not UTF-8, links in circles, pipes: nothing is lost without a word, and nothing hangs."""
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n" * 20)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    expected = load_texts(str(tmp_path))
    assert "left out" not in caplog.text
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.txt"), "w", encoding="utf-8") as file:
        file.write("the fifth\n")
    (tmp_path / "circle").symlink_to(tmp_path)
    texts = load_texts(str(tmp_path))
    assert sorted(texts.train + texts.validation) == sorted([*expected.train, *expected.validation, "the fifth\n"])
    assert "links to folders are left out, e.g. circle" in caplog.text


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.txt").write_text("text")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for dataset in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ValueError, match=r"--dataset_name: .*mine\.txt cannot be read: .*Permission denied"):
            load_texts(str(dataset))


def test_tokenizers_give_back_every_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in HARD_TEXTS:
            ids = loaded(text, split_special_tokens=True)["input_ids"]
            assert loaded.decode(ids) == text
            assert loaded.eos_token_id not in ids
        assert loaded.eos_token_id is not None and loaded.pad_token_id is not None
        assert loaded.eos_token_id != loaded.pad_token_id


def test_byte_ids_are_the_bytes():
    tokenizer = build_tokenizer("byte", [])
    for text in HARD_TEXTS:
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == list(text.encode())
    assert len(tokenizer) == 258


def test_bpe_has_the_size_asked_for_and_is_shorter():
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    tokenizer = build_tokenizer("bpe", [text], vocab_size=400)
    assert len(tokenizer) == 400
    assert len(tokenizer(text)["input_ids"]) < 0.7 * len(text)


def test_prompts_are_padded_on_the_left(tmp_path):
    """On the right `generate` would continue a pad; saved with the tokenizer."""
    build_tokenizer("byte", []).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(["a", "bcd"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_tokens_of_pages_come_after_the_others():
    plain, pages = build_tokenizer("byte", []), build_tokenizer("byte", [], for_pages=True)
    assert [pages.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|pad|>")] == [256, 257]
    assert pages.mask_token_id == 258 and pages.convert_tokens_to_ids("<|blank|>") == 259 and len(pages) == 260
    assert {**pages.get_vocab(), **plain.get_vocab()} == pages.get_vocab()
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    assert len(build_tokenizer("bpe", [text], vocab_size=400, for_pages=True)) == 400
    for hard in [*HARD_TEXTS, "<|mask|><|blank|>"]:
        ids = pages(hard, split_special_tokens=True)["input_ids"]
        assert pages.decode(ids) == hard and max(ids, default=0) < 256
    with pytest.raises(ValueError, match="--vocab_size must be at least 260"):
        build_tokenizer("bpe", [text], vocab_size=259, for_pages=True)


def test_a_loaded_tokenizer_gets_the_tokens_of_pages(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "plain")
    pages = build_tokenizer(str(tmp_path / "plain"), [], for_pages=True)
    assert len(pages) == len(tokenizer) + 2 and pages.pad_token_id == tokenizer.pad_token_id
    pages.save_pretrained(tmp_path / "pages")
    again = build_tokenizer(str(tmp_path / "pages"), [], for_pages=True)
    assert again.get_vocab() == pages.get_vocab() and again.mask_token_id == pages.mask_token_id
    again.mask_token = "<|endoftext|>"  # what a tokenizer has it keeps
    again.save_pretrained(tmp_path / "own")
    assert build_tokenizer(str(tmp_path / "own"), [], for_pages=True).mask_token == "<|endoftext|>"


def test_a_saved_tokenizer_is_loaded_by_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = build_tokenizer(str(tmp_path), [])
    assert again.get_vocab() == tokenizer.get_vocab()


def test_stream_is_all_texts_between_separators(tokenizer):
    stream = encode(HARD_TEXTS, tokenizer)
    assert stream.dtype == np.uint16
    end = tokenizer.eos_token_id
    assert (stream == end).sum() == len(HARD_TEXTS) + 1 and stream[0] == stream[-1] == end
    assert tokenizer.decode([id for id in stream if id != end]) == "".join(HARD_TEXTS)


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 100])
def test_blocks_lose_nothing_but_the_tail(length):
    stream = np.arange(length, dtype=np.uint16)
    blocks = PackedBlocks(stream, block_size=9)
    predicted = [token for block in blocks for token in block["labels"][1:].tolist()]
    assert predicted == list(range(1, 1 + len(predicted)))
    assert 0 <= length - 1 - len(predicted) < 8
    for block in blocks:
        assert block["input_ids"].dtype == block["labels"].dtype == torch.int64
        assert block["input_ids"].shape == (9,) and torch.equal(block["input_ids"], block["labels"])


@pytest.mark.parametrize("length", [2, 9, 10, 16, 17, 18, 100])
def test_padded_blocks_lose_nothing(length):
    stream = np.arange(length, dtype=np.uint16)
    blocks = PackedBlocks(stream, block_size=9, pad_token_id=7777)
    predicted = [token for block in blocks for token in block["labels"][1:].tolist() if token != -100]
    assert predicted == list(range(1, length))
    for block in blocks:
        padding = block["labels"] == -100
        assert torch.equal(block["input_ids"] == 7777, padding)
        assert torch.equal(block["input_ids"][~padding], block["labels"][~padding])


def test_stdlib_is_source_text_split_by_file():
    first, again = load_texts("stdlib"), load_texts("stdlib")
    assert first == again
    assert not set(first.train) & set(first.validation)
    root = Path(sysconfig.get_path("stdlib"))
    all_texts = {*first.train, *first.validation}
    assert (root / "argparse.py").read_bytes().decode() in all_texts
    assert (root / "asyncio" / "events.py").read_bytes().decode() in all_texts
    for left_out in ("test/test_argparse.py", "idlelib/idle_test/test_query.py"):
        if (root / left_out).is_file():
            assert (root / left_out).read_bytes().decode() not in all_texts
    size = sum(map(len, first.train)) + sum(map(len, first.validation))
    assert size > 5_000_000
    assert 0.02 < sum(map(len, first.validation)) / size < 0.1


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for number in range(60):
        (tmp_path / "sub" / f"{number:02}.txt").write_bytes(f"text {number}\r\n".encode() * 10)
    return tmp_path


def test_folder_is_split_by_name_alone(folder):
    texts = load_texts(str(folder), validation_percent=25)
    assert not set(texts.train) & set(texts.validation)
    assert len(texts.train) + len(texts.validation) == 60

    # The same on every machine and in every process.
    numbers = sorted(int(text.split()[1]) for text in texts.validation)
    assert numbers == [3, 4, 5, 11, 14, 15, 17, 18, 28, 32, 41, 44, 49, 50, 54, 57, 59]

    # Neither the content nor another file moves a file to the other side.
    (folder / "sub" / "07.txt").write_text("changed")
    (folder / "new.txt").write_text("new")
    changed = load_texts(str(folder), validation_percent=25)
    assert {*texts.train, "changed"} - {"new"} >= {*changed.train} - {"new"}
    assert {*texts.validation, "changed"} >= {*changed.validation} - {"new"}


def test_folder_leaves_out_what_is_hidden_or_no_text(folder, caplog):
    texts = load_texts(str(folder))
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / "empty.txt").write_text("")
    assert load_texts(str(folder)) == texts


def test_compressed_files_are_unpacked(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(text.encode()))
    plain = load_texts(str(tmp_path / "plain.txt"))
    assert load_texts(str(tmp_path / "a.txt.gz")) == load_texts(str(tmp_path / "a.txt.bz2")) == plain


def test_of_one_file_the_tail_is_held_out(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "one.txt").write_text(text)
    texts = load_texts(str(tmp_path / "one.txt"), validation_percent=10)
    assert texts.train[0] + texts.validation[0] == text
    assert texts.validation[0].startswith("line ")
    assert len(texts.validation[0]) == pytest.approx(0.1 * len(text), rel=0.02)


@pytest.mark.parametrize(
    "text, held_out",
    [
        ("one\ntwo\n" + 200 * "x" + "\n", 200 * "x" + "\n"),  # the cut lies in the last line
        ("one\ntwo\n" + 200 * "x", 200 * "x"),
        (200 * "x" + "\n", 9 * "x" + "\n"),  # there is no other
        (200 * "x", 10 * "x"),
    ],
    ids=["last", "last, without an end", "only", "only, without an end"],
)
def test_lines_of_any_length_leave_something_to_hold_out(text, held_out, tmp_path):
    (tmp_path / "one.txt").write_text(text)
    texts = load_texts(str(tmp_path / "one.txt"))
    assert texts.train[0] + texts.validation[0] == text
    assert texts.validation == [held_out]


def test_max_validation_bytes_cuts_between_characters(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("é" * 50, encoding="utf-8")
    with pytest.raises(ValueError, match="--max_validation_bytes 1 is less than the first character"):
        load_texts(str(tmp_path), validation_percent=50, max_validation_bytes=1)
    for size, kept in [(2, 2), (99, 98), (100, 100), (101, 100), (333, 332)]:
        texts = load_texts(str(tmp_path), validation_percent=50, max_validation_bytes=size)
        assert "".join(texts.validation) == "é" * (kept // 2) and all(texts.validation)


def test_named_data_set(monkeypatch):
    import datasets

    def splits(**rows):
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_dict({"body": texts}) for name, texts in rows.items()}
        )

    texts = [f"text {number}" for number in range(200)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits(train=texts, validation=["held out"]))
    loaded = load_texts("owner/name", text_column="body")
    assert loaded.train == texts and loaded.validation == ["held out"]
    with pytest.raises(ValueError, match="--text_column_name text"):
        load_texts("owner/name")

    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits(train=texts))
    loaded = load_texts("owner/name", text_column="body")
    assert sorted(loaded.train + loaded.validation) == sorted(texts) and 1 <= len(loaded.validation) < 30

    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits(train=texts, validation=["", ""]))
    loaded = load_texts("owner/name", text_column="body")
    assert "".join(loaded.train + loaded.validation) == "".join(texts) and any(loaded.validation)


def _binary(path):
    path.write_bytes(b"\x7fELF\0\0" * 10)


def _latin_1(path):
    path.write_bytes("déjà vu\n".encode("latin-1"))


def _broken_gzip(path):
    path.write_bytes(gzip.compress(b"text" * 1000)[:30])


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("missing.txt", lambda path: None, "does not exist"),
        ("empty.txt", lambda path: path.write_bytes(b""), "is empty"),
        ("folder", lambda path: path.mkdir(), "is empty"),
        (
            "short.txt",
            lambda path: path.write_text("x"),
            "is too short, or --validation_split_percentage 5.0 does not fit",
        ),
        ("binary", _binary, "is not text"),
        ("latin-1.txt", _latin_1, "is not text"),
        ("broken.gz", _broken_gzip, "is not text"),
        ("binaries", lambda path: (path.mkdir(), _binary(path / "one")), "is not text"),
    ],
)
def test_bad_corpora_are_named(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"--dataset_name .*{name}.* {message}"):
        load_texts(str(tmp_path / name))


def test_bad_arguments_are_named(tmp_path):
    for percent in (0, 100, -3):
        with pytest.raises(ValueError, match="--validation_split_percentage"):
            load_texts("stdlib", validation_percent=percent)
    with pytest.raises(ValueError, match="--max_validation_bytes"):
        load_texts("stdlib", max_validation_bytes=0)
    with pytest.raises(ValueError, match="--vocab_size"):
        build_tokenizer("bpe", ["text"], vocab_size=200)
    with pytest.raises(ValueError, match="--tokenizer_name"):
        build_tokenizer(str(tmp_path / "missing"), [])
    stream = np.arange(8, dtype=np.uint16)
    with pytest.raises(ValueError, match="--block_size"):
        PackedBlocks(stream, block_size=1)
    with pytest.raises(ValueError, match="--block_size 9 .*too long"):
        PackedBlocks(stream, block_size=9)
    with pytest.raises(ValueError, match="--block_size 9 .*too long"):
        PackedBlocks(stream[:1], block_size=9, pad_token_id=0)
