"""Transformers' own pipelines on saved folders: what they write, fill in and classify is what the models say."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from threading import Thread

import pytest
import torch
from corpora import build_tokenizer
from transformers import TextDiffusionStreamer, TextIteratorStreamer, TextStreamer, pipeline

from modeling_heptapod import HeptapodProcessor, MultiGridProcessor
from tests.tiny_heptapod import tiny_heptapod
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


PROMPTS = ["def f(x):", "import os", "é = ("]
HEIGHT, WIDTH = 3, 6
GREEDY = {"max_new_tokens": 10, "do_sample": False}
AXES = ["token_kind", "bracket"]
CAUSAL = {
    "leap": lambda **common: tiny_leap(**common),
    "hierarchical_lm": lambda **common: tiny_hierarchical_lm(
        compression_factors=[1, 2, 8], strides=[1, 1, 4], window_sizes=[5, 4, 3], **common
    ),
    "multigrid": lambda **common: tiny_multigrid(**common),
    "multigrid with axes": lambda **common: tiny_multigrid(**axes_of(AXES), **common),
}


def axes_of(names):
    processor = MultiGridProcessor(TOKENIZER, names)
    return {"axis_names": processor.axis_names, "axis_vocab_sizes": processor.axis_vocab_sizes}


TOKENIZER = build_tokenizer("byte", [], for_pages=True)
COMMON = {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id}


def saved(model, folder, processor=TOKENIZER):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=CAUSAL)
def writer(request, tmp_path):
    """A text-generation pipeline of a folder, what its calls need besides, and the model that was saved."""
    model = CAUSAL[request.param](**COMMON)
    names = AXES if model.config.model_type == "multigrid" and model.config.num_axes else []
    processor = MultiGridProcessor(TOKENIZER, names) if model.config.model_type == "multigrid" else TOKENIZER
    pipe = pipeline("text-generation", model=saved(model, tmp_path, processor), trust_remote_code=True)
    return pipe, {**GREEDY, **({"processor": processor} if names else {})}, model, processor


def written_by(model, processor, prompt, /, **options):
    inputs = processor(prompt, return_tensors="pt")
    options = {**GREEDY, "pad_token_id": TOKENIZER.pad_token_id, **options}
    return model.generate(**inputs, **options)[0].tolist()


def test_text_generation_is_generate(writer):
    pipe, options, model, processor = writer
    for prompt in PROMPTS:
        written = written_by(model, processor, prompt)
        assert pipe(prompt, return_tensors=True, **options)[0]["generated_token_ids"] == written
        text = TOKENIZER.decode(written[len(prompt.encode()) :], skip_special_tokens=True)
        assert pipe(prompt, **options)[0]["generated_text"] == prompt + text


def test_batches_are_single_prompts(writer):
    pipe, options, model, processor = writer
    batch = pipe(PROMPTS, batch_size=len(PROMPTS), return_tensors=True, **options)
    longest = max(len(prompt.encode()) for prompt in PROMPTS)
    for prompt, ((row),) in zip(PROMPTS, batch):
        row = row["generated_token_ids"]
        pads = longest - len(prompt.encode())
        assert row[:pads] == [TOKENIZER.pad_token_id] * pads
        assert row[pads:] == written_by(model, processor, prompt)


def test_beams_and_several_texts(writer):
    pipe, options, model, processor = writer
    beams = {"num_beams": 3, "num_return_sequences": 2}
    pair = pipe(PROMPTS[0], return_tensors=True, **options, **beams)
    assert pair[0]["generated_token_ids"] == written_by(model, processor, PROMPTS[0], num_beams=3)
    assert pair[0] != pair[1]


def test_streams_are_what_is_written(writer):
    pipe, options, model, processor = writer
    text = TOKENIZER.decode(written_by(model, processor, PROMPTS[0]))
    with redirect_stdout(StringIO()) as printed:
        pipe(PROMPTS[0], streamer=TextStreamer(TOKENIZER), **options)
    assert printed.getvalue() == text + "\n"
    pieces = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
    thread = Thread(target=pipe, args=(PROMPTS[0],), kwargs={"streamer": pieces, **options})
    thread.start()
    assert PROMPTS[0] + "".join(pieces) == text
    thread.join()


def test_axes_annotated_in_a_pipeline(tmp_path):
    model, processor = CAUSAL["multigrid with axes"](**COMMON), MultiGridProcessor(TOKENIZER, AXES)
    pipe = pipeline("text-generation", model=saved(model, tmp_path, processor), trust_remote_code=True)
    written = written_by(model, processor, PROMPTS[0], axis_source="annotated", processor=processor)
    assert written != written_by(model, processor, PROMPTS[0])
    options = {"axis_source": "annotated", "processor": processor, **GREEDY}
    assert pipe(PROMPTS[0], return_tensors=True, **options)[0]["generated_token_ids"] == written


def test_what_a_mask_hides_of_a_prompt_is_not_annotated():
    model, processor = CAUSAL["multigrid with axes"](**COMMON), MultiGridProcessor(TOKENIZER, AXES)
    hidden, prompt = (TOKENIZER(text, return_tensors="pt").input_ids for text in ("'((", PROMPTS[0]))
    ids, mask = torch.cat([hidden, prompt], dim=1), torch.ones(1, 3 + prompt.shape[1], dtype=torch.long)
    written = model.generate(ids, attention_mask=mask, processor=processor, **GREEDY)
    mask[:, :3] = 0
    masked = model.generate(ids, attention_mask=mask, processor=processor, **GREEDY)[:, 3:]
    assert torch.equal(masked, model.generate(prompt, processor=processor, **GREEDY))
    assert not torch.equal(masked, written[:, 3:])


def test_axes_without_a_processor_are_refused(tmp_path):
    model = CAUSAL["multigrid with axes"](**COMMON)
    pipe = pipeline("text-generation", model=saved(model, tmp_path), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"`axis_ids` must be .*or pass `processor`"):
        pipe(PROMPTS[0], **GREEDY)


def test_prompts_are_not_annotated_with_axes_that_look_ahead():
    names = ["bracket", "part_of_speech_word"]
    model, processor = tiny_multigrid(**axes_of(names), **COMMON), MultiGridProcessor(TOKENIZER, names)
    ids = TOKENIZER(PROMPTS[0], return_tensors="pt").input_ids
    with pytest.raises(ValueError, match=r"`axis_ids` of the prompt must be given: .*'part_of_speech_word'"):
        model.generate(ids, processor=processor, **GREEDY)


def masked_leap(folder):
    model = tiny_leap("LeapForMaskedLM", **COMMON)
    return model, pipeline("fill-mask", model=saved(model, folder), trust_remote_code=True)


def best(logits, number):
    values, tokens = logits.softmax(-1).topk(number)
    return tokens.tolist(), values.tolist()


def test_fill_mask_with_leap(tmp_path):
    model, pipe = masked_leap(tmp_path)
    texts = ["def <|mask|>(x):", "a, b = <|mask|>, 2  # both"]
    for text, batched in zip(texts, pipe(texts, top_k=4, batch_size=2)):
        ids = TOKENIZER(text, return_tensors="pt").input_ids
        with torch.no_grad():
            tokens, chances = best(model(ids).logits[ids == TOKENIZER.mask_token_id][0], 4)
        for filled in (batched, pipe(text, top_k=4)):
            assert [entry["token"] for entry in filled] == tokens
            torch.testing.assert_close([entry["score"] for entry in filled], chances, rtol=1e-4, atol=1e-6)
        assert filled[0]["sequence"] == text.replace("<|mask|>", TOKENIZER.decode([tokens[0]]))


def test_fill_mask_with_two_masks(tmp_path):
    model, pipe = masked_leap(tmp_path)
    text = "x = <|mask|> + <|mask|>"
    ids = TOKENIZER(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = [best(row, 3)[0] for row in model(ids).logits[ids == TOKENIZER.mask_token_id]]
    assert [[entry["token"] for entry in filled] for filled in pipe(text, top_k=3)] == expected


@pytest.fixture
def grid(tmp_path):
    model = tiny_heptapod(grid_size=(HEIGHT, WIDTH), mask_token_id=TOKENIZER.mask_token_id, **COMMON)
    processor = HeptapodProcessor(TOKENIZER, HEIGHT, WIDTH)
    return model, processor, pipeline("fill-mask", model=saved(model, tmp_path, processor), trust_remote_code=True)


def test_fill_mask_with_the_grid(grid):
    """A page written out cell by cell: all of them tokens of a flat page."""
    model, processor, pipe = grid
    page = processor("ab c\n\nde\n", mask_region=(0, 1, 1, 1))["input_ids"]
    with torch.no_grad():
        tokens, chances = best(model(page).logits[0, 0, 1], 3)
    filled = pipe(processor.decode(page[0], skip_special_tokens=False), top_k=3)
    assert [entry["token"] for entry in filled] == tokens
    torch.testing.assert_close([entry["score"] for entry in filled], chances, rtol=1e-4, atol=1e-6)
    page[0, 0, 1] = tokens[0]
    assert filled[0]["sequence"] == processor.decode(page[0])


def test_text_that_fills_no_page_is_refused(grid):
    with pytest.raises(ValueError, match=r"grid_size"):
        grid[2]("a<|mask|>b")


def test_the_grids_streamer_shows_drafts_and_the_page(grid):
    model, processor, _ = grid
    page = processor("ab c\n\nde\n", mask_region=(0, 1, 2, 3))["input_ids"]
    with redirect_stdout(StringIO()) as printed:
        done = model.generate(page, max_denoising_steps=3, streamer=TextDiffusionStreamer(TOKENIZER, skip_prompt=True))
    text = TOKENIZER.decode(done.flatten())
    assert printed.getvalue().count("\0337") == 3  # drafts
    assert printed.getvalue().rstrip("\n").endswith(text.rstrip("\n"))


@pytest.mark.parametrize("multi_label", [False, True])
def test_text_classification_with_leap(multi_label, tmp_path):
    labels = {"id2label": {0: "calm", 1: "loud", 2: "odd"}, "label2id": {"calm": 0, "loud": 1, "odd": 2}}
    kind = "multi_label_classification" if multi_label else "single_label_classification"
    model = tiny_leap("LeapForSequenceClassification", problem_type=kind, **labels, **COMMON)
    pipe = pipeline("text-classification", model=saved(model, tmp_path), trust_remote_code=True)
    for text, batched in zip(PROMPTS, pipe(PROMPTS, top_k=None, batch_size=3)):
        with torch.no_grad():
            logits = model(**TOKENIZER(text, return_tensors="pt")).logits[0]
        chances = (logits.sigmoid() if multi_label else logits.softmax(-1)).tolist()
        for scores in (batched, pipe(text, top_k=None)):
            by_name = {entry["label"]: entry["score"] for entry in scores}
            torch.testing.assert_close([by_name[x] for x in ("calm", "loud", "odd")], chances, rtol=1e-4, atol=1e-6)


CLEAN_ROOM = """
import json, sys
from transformers import AutoProcessor, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
folders, prompt, options = map(json.loads, sys.argv[1:])
tokens = {}
for name, folder in folders.items():
    if name == "fill-mask":
        pipe = pipeline(name, model=folder, trust_remote_code=True)
        tokens[name] = [x["token"] for x in pipe("a = <|mask|>")]
        assert type(pipe.model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
        continue
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    needed = {}
    if pipe.model.config.model_type == "multigrid" and pipe.model.config.num_axes:
        needed["processor"] = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tokens[name] = pipe(prompt, return_tensors=True, **options, **needed)[0]["generated_token_ids"]
    assert type(pipe.model).__module__.startswith("transformers_modules")
    assert type(pipe.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # by which Trainer shifts labels
assert "modeling_heptapod" not in sys.modules
print(json.dumps(tokens))
"""


@pytest.mark.slow
def test_folders_bring_their_own_code(tmp_path):
    """The same pipelines in a process that cannot import this package."""
    folders, expected = {}, {}
    for name, build in CAUSAL.items():
        model, processor = build(**COMMON), TOKENIZER
        if model.config.model_type == "multigrid":
            processor = MultiGridProcessor(TOKENIZER, AXES if model.config.num_axes else [])
        folders[name] = saved(model, tmp_path / name.replace(" ", "-"), processor)
        expected[name] = written_by(model, processor, PROMPTS[0])
    model, pipe = masked_leap(tmp_path / "masked")
    folders["fill-mask"] = str(tmp_path / "masked")
    expected["fill-mask"] = [entry["token"] for entry in pipe("a = <|mask|>")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [json.dumps(x) for x in (folders, PROMPTS[0], GREEDY)]
    done = subprocess.run(
        [sys.executable, "-c", CLEAN_ROOM, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "is not supported for" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
