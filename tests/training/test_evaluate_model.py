"""training/evaluate_model.py: each figure against another computation, and all families measured without this package."""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate_model
import numpy as np
import pytest
import torch
from corpora import PackedBlocks, annotate, encode, load_texts
from objectives import sum_nats
from provenance import weights_digest

from tests.saved_models import AXES, FAMILIES, PAGE, save_tiny
from tests.tiny_leap import tiny_leap


CORPUS = argparse.__file__  # one file of real text on every machine
SIZE = 200
WINDOW, STRIDE = 24, 10
FOLDERS = {**{family: (family, {}) for family in FAMILIES}, "factored": ("multigrid", {"axis_order": "factored"})}
CAUSAL = [name for name in FOLDERS if name != "heptapod"]

# Measures folder after folder, in a process that cannot import this package.
ALONE = """
import runpy, sys
sys.modules["modeling_heptapod"] = None
script, *folders = sys.argv[1:]
sys.path.insert(0, script.rsplit("/", 1)[0])
for folder in folders:
    sys.argv = [script, folder, "--dataset_name", {corpus!r}, "--max_validation_bytes", "{size}", "--batch_size", "3"]
    if not folder.endswith("heptapod"):
        sys.argv += ["--max_length", "{window}", "--stride", "{stride}"]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (family, options) in FOLDERS.items():
        save_tiny(family, folder / name, **options)
    return folder


@pytest.fixture(scope="module")
def measured(folders):
    """What the script printed, and by the name of each folder what it wrote."""
    script = folders / "alone.py"
    script.write_text(ALONE.format(corpus=CORPUS, size=SIZE, window=WINDOW, stride=STRIDE))
    names = [folders / name for name in FOLDERS]
    process = subprocess.run(
        [sys.executable, script, Path(evaluate_model.__file__), *names],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=folders,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, {
        name: json.loads((folders / name / "evaluation.json").read_text(encoding="utf-8")) for name in FOLDERS
    }


@pytest.fixture(scope="module")
def text():
    (text,) = load_texts(CORPUS, max_validation_bytes=SIZE).validation
    return text


def tracks_of(folder, text):
    model, processing = evaluate_model.load_model(folder)
    axes = getattr(processing, "axes", ())
    tokenizer = getattr(processing, "tokenizer", processing)
    return model, encode([text], tokenizer), annotate([text], tokenizer, axes) if axes else None


@torch.no_grad()
def nats_one_by_one(model, stream, meta, window, stride):
    """Each token alone, from the window that it belongs to by its place, in float64; axis ids likewise."""
    model = model.double()
    rows = []
    for place in range(1, len(stream)):
        start = math.ceil(max(place + 1 - window, 0) / stride) * stride
        context = place - start
        assert context >= min(window - stride, place) and context < window
        ids = torch.from_numpy(stream[None, start : place + 1].astype(np.int64))
        inputs = (
            {} if meta is None else {"axis_ids": torch.from_numpy(meta[None, :, start : place + 1].astype(np.int64))}
        )
        outputs = model(ids, **inputs)
        row = [-outputs.logits[0, -2].log_softmax(-1)[ids[0, -1]].item()]
        for axis, logits in enumerate(outputs.axis_logits if meta is not None else ()):
            row.append(-logits[0, -2].log_softmax(-1)[inputs["axis_ids"][0, axis, -1]].item())
        rows.append(row)
    return np.array(rows).T


@pytest.mark.parametrize("name", CAUSAL)
def test_each_token_costs_what_it_costs_alone(name, folders, measured, text):
    model, stream, meta = tracks_of(folders / name, text)
    expected = nats_one_by_one(model, stream, meta, WINDOW, STRIDE)
    results = measured[1][name]
    names = ["text", *(AXES if meta is not None else ())]
    assert list(results["losses"]) == names
    assert len(stream) - 1 == results["tokens"] == SIZE + 1  # bytes, and the end of the text
    for loss, nats in zip(results["losses"].values(), expected, strict=True):
        assert loss["nats_per_token"] == pytest.approx(nats.mean(), rel=1e-5)
        assert loss["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / SIZE, rel=1e-5)
    text_nats = expected.sum() if name == "factored" else expected[0].sum()
    assert results["text_pays_for_axes"] == (name == "factored")
    assert results["sliding_window_bits_per_byte"] == pytest.approx(text_nats / math.log(2) / SIZE, rel=1e-5)
    assert results["least_context"] == WINDOW - STRIDE
    nats = expected.sum(0) if name == "factored" else expected[0]
    stretches = [nats[start : start + WINDOW] for start in range(0, len(nats), WINDOW)]
    error = evaluate_model.error_over_text(*np.array([(part.sum(), len(part)) for part in stretches]).T)
    assert results["standard_error_over_text"] == pytest.approx(error / math.log(2) / SIZE, rel=1e-4)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 13, 14, 31])
@pytest.mark.parametrize("window, stride", [(8, 3), (8, 7), (8, 1), (40, 20), (2, 1)])
def test_streams_of_any_length(length, window, stride):
    model, stream = tiny_leap(), np.arange(length, dtype=np.uint16)
    nats = evaluate_model.sliding_window_nats(model, stream, window=window, stride=stride, batch_size=2)
    np.testing.assert_allclose(nats, nats_one_by_one(model, stream, None, window, stride), rtol=2e-5)


def test_a_stride_of_one_less_than_the_window_gives_the_figure_of_training(folders, text):
    model, stream, _ = tracks_of(folders / "leap", text)
    blocks = torch.utils.data.default_collate(list(PackedBlocks(stream, WINDOW, pad_token_id=257)))
    with torch.no_grad():
        expected = sum_nats(model(blocks["input_ids"]).logits, blocks["labels"]).sum().item()
    assert evaluate_model.sliding_window_nats(model, stream, window=WINDOW, stride=WINDOW - 1).sum() == pytest.approx(
        expected
    )


@pytest.mark.slow
def test_the_bound_of_pages_and_its_error(folders):
    model, processor = evaluate_model.load_model(folders / "heptapod")
    pages = torch.from_numpy(processor.paginate("def f(x):\n    return x\n" * 8))
    few, error = evaluate_model.diffusion_bound(model, pages, batch_size=2, num_samples=4)
    many, small_error = evaluate_model.diffusion_bound(model, pages, batch_size=len(pages), num_samples=400)
    assert few.shape == (len(pages),) and len(pages) == 4
    assert error == pytest.approx(10 * small_error, rel=0.7)
    alone = [evaluate_model.diffusion_bound(model, page[None], batch_size=1, num_samples=400)[1] for page in pages]
    assert small_error == pytest.approx(math.hypot(*alone), rel=0.2)  # of a sum of pages that are drawn on their own
    assert few.sum() == pytest.approx(many.sum(), abs=4 * error)
    # Whatever is drawn, it costs about as much as cells that nothing is known of: the weights are random.
    assert many.sum() > 0.5 * pages.numel() * math.log(260)


def test_errors_of_pages_add_up_in_squares():
    class Known:
        device = "cpu"

        def elbo(self, pages, **_):
            return SimpleNamespace(nats=pages.flatten(), standard_error=pages.flatten())

    nats, error = evaluate_model.diffusion_bound(Known(), torch.tensor([[[3.0]], [[4.0]], [[12.0]]]), 2, num_samples=2)
    assert nats.tolist() == [3, 4, 12] and error == pytest.approx(13)


def test_errors_of_pages_are_in_bits_per_byte(folders, measured, text):
    model, processor = evaluate_model.load_model(folders / "heptapod")
    pages, results = torch.from_numpy(processor.paginate(text)), measured[1]["heptapod"]
    nats, error = evaluate_model.diffusion_bound(model, pages, batch_size=3)  # as was measured: the same masks
    over_text = evaluate_model.error_over_text(nats, np.ones(len(pages)))
    expected = {
        "bound_bits_per_byte": nats.sum(),
        "bound_standard_error": error,
        "standard_error_over_text": over_text,
    }
    for name, figure in expected.items():
        assert results[name] == pytest.approx(figure / math.log(2) / SIZE, rel=1e-4)
    assert results["mask_samples"] == evaluate_model.MASK_SAMPLES


@pytest.mark.parametrize("name", ["leap", "heptapod"])
def test_bytes_are_counted_and_not_characters(name, folders):
    options = {"window": WINDOW} if name == "leap" else {}
    results = evaluate_model.evaluate(folders / name, ["é" * 40, "☃"], CORPUS, **options)
    assert results["held_out_bytes"] == 2 * 40 + 3
    if name == "leap":
        bits = results["losses"]["text"]["nats_per_token"] * results["tokens"] / math.log(2)
    else:
        bits = results["bits_per_cell"] * results["cells"]
    figure = results["sliding_window_bits_per_byte" if name == "leap" else "bound_bits_per_byte"]
    assert figure == pytest.approx(bits / (2 * 40 + 3))


def test_error_over_text_is_that_of_resampled_stretches():
    generator = np.random.default_rng(0)
    sizes = generator.choice([100.0, 30.0], 60)
    nats = sizes * generator.normal(2.0, 0.5, 60)
    draws = generator.integers(60, size=(4000, 60))
    resampled = (nats[draws].sum(1) / sizes[draws].sum(1)).std() * sizes.sum()
    assert evaluate_model.error_over_text(nats, sizes) == pytest.approx(resampled, rel=0.1)
    assert evaluate_model.error_over_text(np.ones(4), np.ones(4)) == 0
    assert evaluate_model.error_over_text(nats[:1], sizes[:1]) is None


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_measured_says_of_what_and_where(name, folders, measured, text):
    printed, results = measured[0], measured[1][name]
    assert results["model_type"] == FOLDERS[name][0]
    assert results["held_out_bytes"] == SIZE
    assert results["held_out_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert results["dataset"] == "argparse.py" and str(folders) not in results["dataset"]
    assert results["weights_sha256"] == weights_digest(folders / name)
    assert results["generation"]["tokens_per_second"] > 0 and results["standard_error_over_text"] > 0
    assert results["device"] and results["threads"] >= 1 and "evaluate_model.py" in results["command"]
    assert {"python", "torch", "transformers"} == set(results["versions"])
    figure = results["bound_bits_per_byte" if name == "heptapod" else "sliding_window_bits_per_byte"]
    assert f"{figure:.3f} bits per byte" in printed
    if name == "heptapod":
        assert results["page"] == list(PAGE) and results["generation"]["new_tokens"] == PAGE[0] * PAGE[1]
        assert results["cells"] % (PAGE[0] * PAGE[1]) == 0 and results["bound_standard_error"] > 0
        assert results["bits_per_cell"] * results["cells"] == pytest.approx(figure * SIZE)
        assert results["generation"]["max_denoising_steps"] == 3
    else:
        assert results["generation"]["prompt_tokens"] == 6 and results["generation"]["new_tokens"] == 12


@pytest.mark.parametrize("name", FOLDERS)
def test_generation_writes_as_many_tokens_as_it_says(name, folders, monkeypatch):
    model, stream, meta = tracks_of(folders / name, "import os\n" * 5)
    generate, written = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **inputs: written.append(generate(**inputs)))
    if name == "heptapod":
        speed, shape = evaluate_model.page_speed(model, *PAGE), (1, *PAGE)
        assert speed["new_tokens"] == PAGE[0] * PAGE[1]
    else:
        speed, shape = evaluate_model.generation_speed(model, stream, meta, prompt=9, new=7), (1, 9 + 7)
        assert (speed["prompt_tokens"], speed["new_tokens"]) == (9, 7)
    assert [ids.shape for ids in written] == [shape] * (1 + evaluate_model.SPEED_ROUNDS)


def test_the_window_is_that_of_training(folders, text, tmp_path):
    save_tiny("leap", tmp_path)
    assert evaluate_model.evaluate(tmp_path, [text], CORPUS)["window"] == 512  # all positions
    (tmp_path / "results.json").write_text(json.dumps({"block_size": 20}))
    results = evaluate_model.evaluate(tmp_path, [text], CORPUS)
    assert (results["window"], results["stride"]) == (20, 10)


def test_what_is_no_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="there is no folder .*nowhere: `python training/train.py"):
        evaluate_model.main()
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", "me/nowhere"])
    with pytest.raises(ValueError, match="me/nowhere is neither a folder nor a name on the Hub"):
        evaluate_model.main()


@pytest.mark.parametrize(
    "option, value", [("batch_size", -2), ("batch_size", 0), ("window", 0), ("window", 1), ("stride", 0)]
)
def test_numbers_that_score_nothing_are_named(option, value):
    """Before a model is looked for."""
    flag = "max_length" if option == "window" else option
    with pytest.raises(ValueError, match=f"--{flag} must be at least ., got {value}"):
        evaluate_model.evaluate(Path("nowhere"), ["text"], CORPUS, **{option: value})


def test_a_grid_has_no_window(folders):
    with pytest.raises(ValueError, match="--max_length and --stride are not used for a grid"):
        evaluate_model.evaluate(folders / "heptapod", ["text"], CORPUS, stride=2)


def test_a_model_that_gives_no_numbers_is_not_measured(folders, tmp_path, monkeypatch):
    model, tokenizer = evaluate_model.load_model(folders / "leap")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ("--dataset_name", CORPUS, "--max_validation_bytes", "50", "--max_length", "8")
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", str(tmp_path), *options])
    monkeypatch.setattr(evaluate_model, "generation_speed", lambda *_, **__: {"tokens_per_second": 1.0})
    with pytest.raises(ValueError, match=r"evaluation\.json was not written: sliding_window_bits_per_byte"):
        evaluate_model.main()
    assert not (tmp_path / "evaluation.json").exists()


def test_bad_arguments_are_named(tmp_path):
    model, stream = tiny_leap(), np.arange(9)
    for window, stride, message in [
        (1, 1, "--max_length"),
        (8, 0, "--stride"),
        (8, 8, "--stride must lie between 1 and"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_model.sliding_window_nats(model, stream, window=window, stride=stride)
    tiny_leap("LeapForMaskedLM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LeapForMaskedLM"):
        evaluate_model.load_model(tmp_path)


def test_a_folder_has_no_revision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", str(tmp_path), "--revision", "main"])
    with pytest.raises(SystemExit):
        evaluate_model.main()
    assert "argument --revision: is of a name on the Hub" in capsys.readouterr().err
