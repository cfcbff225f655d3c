"""What a training run may be asked for, for all families: that it changes nothing, or what it should."""

import fcntl
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from corpora import DataArguments, PackedBlocks, Texts, annotate, build_tokenizer, encode, load_texts
from corpus_cache import Cache
from corpus_streaming import StreamedExamples, StreamedTexts, stream_texts
from objectives import objective_for
from training_callbacks import Samples
from transformers import TrainingArguments

from modeling_heptapod import make_axis
from tests.training import tiny_runs


CAUSAL = [family for family in tiny_runs.FAMILIES if family != "heptapod"]


def losses(family, folder, **options):
    with tiny_runs.masks_of_pages():
        run = tiny_runs.trainer(family, folder, **options)
        run.train()
    return tiny_runs.losses(run)


@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
def test_accumulated_gradients_are_those_of_the_whole_batch(family, tmp_path):
    """8 times 1 is once 8. The grid draws its masks anew for each batch: with the same masks, that is."""
    whole = losses(family, tmp_path)
    parts = losses(family, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert len(whole) == 4
    for step, expected in whole.items():
        assert parts[step] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
def test_checkpointed_gradients_are_the_same(family, tmp_path):
    assert losses(family, tmp_path, activation_checkpointing=True) == losses(family, tmp_path)


@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
def test_mixed_precision_costs_little(family, tmp_path):
    """Losses in bfloat16 autocast are near those in float32, and not the same."""
    precise, mixed = losses(family, tmp_path), losses(family, tmp_path, bf16=True)
    assert mixed != precise
    for step, (loss, _) in precise.items():
        assert mixed[step][0] == pytest.approx(loss, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
def test_compiled_training_has_the_same_losses(family, tmp_path):
    torch._dynamo.reset()
    # Fewer steps: what is compiled differs, so that rounding does.
    plain = losses(family, tmp_path, max_steps=2)
    compiled = losses(family, tmp_path, max_steps=2, torch_compile=True)
    for step, expected in plain.items():
        assert compiled[step] == pytest.approx(expected, rel=1e-4)


def isolated_columns(family, config, parts):
    tokenizer = build_tokenizer("byte", [])
    if family != "multigrid":
        return tokenizer, encode(parts, tokenizer, isolated=True), None
    axes = [make_axis("token_kind"), make_axis("bracket")]
    return tokenizer, encode(parts, tokenizer, isolated=True), annotate(parts, tokenizer, axes, isolated=True)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("order", ["parallel", "factored"])
def test_isolated_texts_are_separate_texts(family, order, tmp_path):
    """A block of several texts costs, label by label, what each costs alone."""
    if order == "factored" and family != "multigrid":
        pytest.skip("only MultiGrid has two orders")
    axes = {"axis_names": ["token_kind", "bracket"], "axis_vocab_sizes": [11, 5], "axis_order": order}
    config = tiny_runs.config_of(family, **(axes if family == "multigrid" else {}))
    objective_class = objective_for(config)
    model = objective_class.auto_class.from_config(config).double().eval()
    parts = ["f(x)\n", "[a, b]", "def g():\n    return 1"]
    tokenizer, stream, meta = isolated_columns(family, config, parts)
    (block,) = PackedBlocks(stream, len(stream), None, meta, isolate_at=tokenizer.eos_token_id)

    def nats(inputs):
        inputs = {name: value[None] for name, value in inputs.items()}
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="none")

    together, alone = nats(block), []
    for part in parts:
        tokenizer, stream, meta = isolated_columns(family, config, [part])
        (one,) = PackedBlocks(stream, len(stream), None, meta)
        alone += [nats(one), torch.zeros(1)]  # the beginning of the next text, which nothing predicts
    torch.testing.assert_close(together, torch.cat(alone)[:-1].double(), rtol=0, atol=1e-12)
    assert (together == 0).sum() == len(parts) - 1


@pytest.mark.parametrize("block_size", [2, 3, 5, 9, 40])
def test_isolated_blocks_lose_nothing(block_size):
    tokenizer = build_tokenizer("byte", [])
    parts = ["abc", "d", "efghijkl", "mn"]
    stream = encode(parts, tokenizer, isolated=True)
    end = tokenizer.eos_token_id
    blocks = list(PackedBlocks(stream, block_size, tokenizer.pad_token_id, isolate_at=end))
    predicted = torch.cat([block["labels"][1:] for block in blocks])
    assert predicted[predicted != -100].tolist() == [token for part in parts for token in [*part.encode(), end]]
    for block in blocks:
        ids, places = block["input_ids"], block["position_ids"]
        begins = torch.zeros(len(ids), dtype=torch.bool)
        begins[1:] = (ids[1:] == end) & (ids[:-1] == end)
        begins[0] = True
        assert torch.equal(places == 0, begins)
        assert torch.equal((places[1:] == places[:-1] + 1), ~begins[1:])


@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
def test_isolated_packing_is_trained(family, tmp_path):
    """Pages hold one text each, so that it changes nothing for the grid."""
    isolated = losses(family, tmp_path, packing="isolated", max_steps=2)
    assert (isolated == losses(family, tmp_path, max_steps=2)) == (family == "heptapod")


@pytest.mark.parametrize(
    "family",
    [
        family if family in ("leap", "heptapod") else pytest.param(family, marks=pytest.mark.slow)
        for family in tiny_runs.FAMILIES
    ],
)
def test_samples_are_in_the_log_and_change_nothing(family, tmp_path, capsys):
    plain = losses(family, tmp_path)
    with tiny_runs.masks_of_pages():
        run = tiny_runs.trainer(family, tmp_path, eval_strategy="steps", eval_steps=2)
        run.add_callback(Samples(run.objective.sample))
        run.train(ignore_keys_for_eval=run.objective.ignore_keys)
    assert tiny_runs.losses(run) == plain
    samples = [entry for entry in run.state.log_history if "sample" in entry]
    assert [entry["step"] for entry in samples] == [2, 4]
    beginning = run.objective.eval_dataset[0]["input_ids"].flatten()[:6].tolist()
    written = bytes(token for token in beginning if token < 256).decode()
    assert all(entry["sample"].startswith(written) and len(entry["sample"]) > 16 for entry in samples)
    assert capsys.readouterr().out.count("--- a sample at step") == 2
    run.model.train()
    numbers = torch.manual_seed(5).get_state()
    Samples(run.objective.sample).on_evaluate(run.args, run.state, None, run.model)
    assert torch.equal(torch.get_rng_state(), numbers) and run.model.training


def arguments(tmp_path, **options):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)


@pytest.mark.parametrize(
    ("model", "data", "args", "message"),
    [
        ({}, {}, {"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1"),
        ({"train_tokens": 5}, {}, {"max_steps": 3}, "--train_tokens and --max_steps"),
        ({"train_tokens": 5, "train_minutes": 1.0}, {}, {}, "--train_minutes and --train_tokens"),
        ({"train_tokens": 0}, {}, {}, "--train_tokens must be at least 1, got 0"),
        ({"train_minutes": float("nan")}, {}, {}, "--train_minutes must be finite and above 0, got nan"),
        ({}, {}, {"per_device_train_batch_size": -2}, "--per_device_train_batch_size must be at least 1, got -2"),
        ({}, {"block_size": 1}, {}, "--block_size must be at least 2, got 1"),
        (
            {},
            {"validation_split_percentage": 0.0},
            {},
            "--validation_split_percentage must lie between 0 and 100, got 0",
        ),
        ({}, {"streaming": True}, {}, "--streaming needs"),
        ({"early_stopping_patience": 0}, {}, {}, "--early_stopping_patience must be at least 1, got 0"),
        ({"early_stopping_patience": 2}, {}, {}, "--early_stopping_patience needs --load_best_model_at_end"),
    ],
)
def test_what_does_not_go_together_is_named(model, data, args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.check_arguments(
            train.ModelArguments(config_name="", **model), DataArguments(**data), arguments(tmp_path, **args)
        )


def test_processes_that_would_train_on_their_own_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun started 2 processes.*--use_cpu true"):
        train.check_arguments(train.ModelArguments(config_name=""), DataArguments(), args)


@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
def test_a_stream_has_the_examples_of_the_text_in_memory(family, tmp_path):
    """Joined over texts, each of them once, in an order of the seed's."""
    texts, data_args = tiny_runs.texts(), DataArguments(block_size=32, axes=["token_kind"], cache_dir="none")
    for packing in ("continuous", "isolated"):
        data_args.packing = packing
        config = tiny_runs.config_of(family)
        whole = objective_for(config)(texts, data_args, config).train_dataset
        orders = []
        for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1)):
            stream = StreamedExamples(texts.train, seed, buffer=7)
            examples = list(objective_for(config)(texts, data_args, config, stream).train_dataset.one_pass(epoch))
            orders.append([tuple(example["input_ids"].flatten().tolist()) for example in examples])
            assert stream.bytes_read == sum(len(text.encode()) for text in texts.train)
        assert orders[0] == orders[1] and orders[0] != orders[2] != orders[3] != orders[0]
        key = lambda example: [value.flatten().tolist() for _, value in sorted(example.items())]
        assert sorted(map(key, examples)) == sorted(key(whole[number]) for number in range(len(whole)))


def test_streamed_files_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus_streaming.PIECE", 100)
    lines = [f"line {number} é\n" for number in range(400)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    documents, memory = stream_texts(DataArguments(str(tmp_path), max_validation_bytes=150))
    read = list(documents)
    assert "".join(sorted("".join(read + list(held_out(documents))).splitlines(True), key=lines.index)) == "".join(
        lines
    )
    assert all(text.endswith("\n") and 100 <= len(text) < 130 for text in read[:-1])
    assert memory.train[: len(read)] == read and "".join(held_out(documents)).startswith("".join(memory.validation))
    assert 149 <= sum(len(text.encode()) for text in memory.validation) <= 150 and not set(memory.validation) & set(
        read
    )
    with pytest.raises(ValueError, match="--dataset_name .* is too short for --streaming"):
        stream_texts(DataArguments(str(tmp_path / "a.txt"), validation_split_percentage=1e-6))


def test_what_is_no_text_is_left_out_of_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus_streaming.PIECE", 100)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n")
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b no")
    (tmp_path / "broken.bz2").write_bytes(b"BZh9 no")
    (tmp_path / "zeros.txt").write_bytes(b"x" * 100 + b"\n" + b"a\0b")
    documents, _ = stream_texts(DataArguments(str(tmp_path)))
    everything = {*documents, *held_out(documents)}
    assert everything == {f"{number}\n" for number in range(40)} | {"x" * 100 + "\n"}
    with pytest.raises(ValueError, match="--max_validation_bytes must be positive, got 0"):
        stream_texts(DataArguments(str(tmp_path), max_validation_bytes=0))


def test_a_stream_goes_on_with_another_pass(monkeypatch):
    """Without an end, so that Trainer finds its place again in whatever pass it was killed."""
    stream = StreamedExamples(["abc", "d"], seed=0, buffer=2)
    stream.examples_of = lambda texts: iter("".join(texts))
    read = list(itertools.islice(stream, 12))
    assert [sorted(read[start : start + 4]) for start in (0, 4, 8)] == [list("abcd")] * 3
    assert read == [letter for number in range(3) for letter in stream.one_pass(number)]
    for _ in range(2):  # from the beginning each time
        assert list(itertools.islice(stream, 4)) == read[:4] and stream.bytes_read == 4
    stream.examples_of = lambda texts: iter(())
    with pytest.raises(ValueError, match="--dataset_name holds less text than one example"):
        next(iter(stream))
    monkeypatch.setattr(torch.utils.data, "get_worker_info", object)
    with pytest.raises(ValueError, match="--dataloader_num_workers must be 0"):
        next(iter(stream))


def test_a_sample_continues_the_first_text_that_holds_any(tmp_path):
    data_args, config = DataArguments(block_size=32, cache_dir="none"), tiny_runs.config_of("leap")
    texts = tiny_runs.texts()
    texts.validation = ["", "def f(x):\n    return x\n"]
    objective = objective_for(config)(texts, data_args, config)
    config = tiny_runs.config_of("leap")
    model = objective.auto_class.from_config(config).eval()
    assert objective.sample(model).startswith("def f(x):")


def held_out(documents):
    return StreamedTexts(documents.read, lambda name: not documents.held_out(name))


def test_a_streamed_corpus_is_known_by_its_files(tmp_path):
    """Also by those that are not held in memory when it begins."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text\n" * 9)
    sizes = lambda: StreamedTexts(None, None, {path.name: path for path in sorted(tmp_path.iterdir())}).sizes()
    before = sizes()
    assert before == ["'a.txt' 45", "'b.txt' 45"] and sizes() == before
    (tmp_path / "b.txt").write_text("text\n" * 9 + "x")
    assert sizes() == ["'a.txt' 45", "'b.txt' 46"]


@pytest.mark.parametrize(
    "read", [lambda options: load_texts(*options), lambda options: stream_texts(DataArguments(*options))]
)
def test_what_has_no_configurations_is_given_none(read, tmp_path):
    for dataset in ("stdlib", str(tmp_path)):
        with pytest.raises(
            ValueError, match=f"--dataset_config_name en is of a named data set, which --dataset_name {dataset}"
        ):
            read((dataset, "en"))


def test_a_named_data_set_is_streamed(tmp_path):
    rows = [{"body": f"text {number}\n"} for number in range(200)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # By the name of a builder, as a name on the Hub would be.
    import datasets

    original = datasets.load_dataset
    load = lambda name, config, streaming: original("json", data_dir=str(tmp_path / "data"), streaming=streaming)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load)
        documents, memory = stream_texts(DataArguments("some/name", text_column_name="body"))
        both = [*documents, *held_out(documents)]
        with pytest.raises(ValueError, match="--text_column_name text: no such column"):
            stream_texts(DataArguments("some/name"))
    assert sorted(both) == sorted(row["body"] for row in rows)
    assert memory.validation == list(held_out(documents))


def test_what_is_kept_is_found_again_and_never_out_of_date(tmp_path):
    config = tiny_runs.config_of("multigrid")
    make = lambda **changes: objective_for(config)(
        tiny_runs.texts(),
        DataArguments(**{"block_size": 32, "cache_dir": str(tmp_path), "axes": ["bracket"], **changes}),
        config,
    )
    first = make()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 4  # tokens and annotations of both parts
    again = make(block_size=16)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept
    for name in ("stream", "meta"):
        found = getattr(again.train_dataset, name)
        assert isinstance(found, np.memmap) and np.array_equal(found, getattr(first.train_dataset, name))
    for changes in ({"axes": ["token_kind"]}, {"packing": "isolated"}, {"tokenizer_name": "bpe", "vocab_size": 300}):
        before = len(list(tmp_path.iterdir()))
        make(**changes)
        assert len(list(tmp_path.iterdir())) >= before + 2
    assert len(make(tokenizer_name="bpe", vocab_size=300).processing_class.tokenizer) == 300


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: data + b"more",
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "half", "one byte short", "a changed bit", "longer", "zeros"],
)
def test_what_is_damaged_is_made_anew(harm, tmp_path, caplog):
    expected, made = np.arange(3000, dtype=np.uint16), []

    def keep():
        cache = Cache(tmp_path)
        array = cache.array(["a"], lambda: made.append("array") or expected)
        return array, cache.text(["a"], lambda: made.append("text") or "é" * 400)

    keep()
    assert made == ["array", "text"]
    keep()
    assert made == ["array", "text"]
    for path in list(tmp_path.iterdir()):
        path.write_bytes(harm(path.read_bytes()))
    array, text = keep()
    assert np.array_equal(array, expected) and text == "é" * 400
    assert made == ["array", "text"] * 2 and caplog.text.count("is damaged and is computed again") == 2
    keep()
    assert len(made) == 4


KILLED_WHILE_WRITING = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import numpy
from corpus_cache import Cache
numpy.save = lambda file, array: (file.write(b"half"), os.kill(os.getpid(), signal.SIGKILL))
Cache({folder!r}).array(["a"], lambda: numpy.arange(9))
"""


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    folder, scripts = str(tmp_path), str(Path(train.__file__).parent)
    (tmp_path / "tmpfile").write_text("of somebody else")
    code = KILLED_WHILE_WRITING.format(scripts=scripts, folder=folder)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (unfinished,) = tmp_path.glob(".heptapod-unfinished-*")
    with unfinished.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as if its process lived
        Cache(tmp_path)
        assert unfinished.exists()
    assert np.array_equal(Cache(tmp_path).array(["a"], lambda: np.arange(9)), np.arange(9))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".npy"]


def test_a_cache_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, caplog):
    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert np.array_equal(Cache(tmp_path).array(["a"], lambda: np.arange(9)), np.arange(9))
    assert "could not be kept there: [Errno 28] No space left" in caplog.text and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    config, make = tiny_runs.config_of("leap"), lambda folder: DataArguments(block_size=32, cache_dir=folder)
    with pytest.raises(ValueError, match="--cache_dir .*file must be a folder"):
        objective_for(config)(tiny_runs.texts(), make(str(tmp_path / "file")), config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # by default, it is done without
    objective_for(config)(tiny_runs.texts(), DataArguments(block_size=32), config)
    assert "the cache is off: --cache_dir" in caplog.text


def test_what_is_kept_has_the_name_of_all_that_it_was_made_of(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("first")
    keep = lambda made_of, text: Cache(tmp_path, [code]).text(made_of, lambda: text)
    parts = [["ab", "c"], ["a", "bc"], ["abc"]]
    first = [keep(made_of, str(made_of)) for made_of in parts]
    assert first == [keep(made_of, "anew") for made_of in parts] == [str(made_of) for made_of in parts]
    code.write_text("second")
    assert keep(["abc"], "anew") == "anew"


def test_ids_of_bytes_are_made_without_the_tokenizer(monkeypatch):
    """And are the same as with it: streams, annotations and pages."""
    import corpora
    import objectives

    parts = ["é\n\n", "", "def f(x):\r\n  '☃'  # " + "long " * 30 + "\n\n", "\n", "no end"]
    config = tiny_runs.config_of("heptapod")
    processor = objective_for(config)(Texts(parts, parts), DataArguments(cache_dir="none"), config).processing_class
    axes = [make_axis("token_kind"), make_axis("string")]
    tokenizer = build_tokenizer("byte", [])
    assert corpora.is_byte_tokenizer(tokenizer) and corpora.is_byte_tokenizer(processor.tokenizer)
    assert not corpora.is_byte_tokenizer(build_tokenizer("bpe", parts * 9, vocab_size=270))
    found = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(corpora, "is_byte_tokenizer", lambda tokenizer: False)
            monkeypatch.setattr(objectives, "is_byte_tokenizer", lambda tokenizer: False)
        found.append(
            [encode(parts, tokenizer), annotate(parts, tokenizer, axes), objectives._paginate(parts, processor, None)]
        )
    for fast, slow in zip(*found):
        assert np.array_equal(fast, slow) and fast.dtype == slow.dtype


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_trackers_get_every_named_loss(tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    run = tiny_runs.trainer("hierarchical_lm", tmp_path, report_to=[tracker], project="tiny", run_name="tiny")
    run.train()
    expected = [entry["ce_loss"] for entry in run.state.log_history if "ce_loss" in entry]
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        found = [event.value for event in events.Scalars("train/ce_loss")]
    else:
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_metric_values("tiny", "tiny", "train/ce_loss")
        found = [row["value"] for row in rows]
    assert found == pytest.approx(expected) and len(found) == 4


@pytest.mark.parametrize("family", tiny_runs.FAMILIES)
def test_training_stops_early_with_its_best_model(family, tmp_path):
    """Where each step climbs the loss, the first evaluation was the best."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "bits_per_byte", "greater_is_better": False}
    stop = train.EarlyStoppingCallback(2)
    run = tiny_runs.trainer(family, tmp_path, [stop], **options, **best, learning_rate=0.5)
    step = run.training_step

    def climb(*args, **kwargs):
        loss = step(*args, **kwargs)
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()
        return loss

    run.training_step = climb
    run.train(ignore_keys_for_eval=run.objective.ignore_keys)
    bits = [entry["eval_bits_per_byte"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(bits) == 3 and bits == sorted(bits)
    again = run.evaluate(ignore_keys=run.objective.ignore_keys)["eval_bits_per_byte"]
    assert again == pytest.approx(bits[0], rel=1e-6)
