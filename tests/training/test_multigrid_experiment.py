"""The experiment of axes: its texts, models of equal size, runs that resume; and what its report says of known numbers."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import PackedBlocks, Texts, annotate, build_tokenizer, encode

from modeling_heptapod import make_axis


pytest.importorskip("sklearn", reason="the extra `axes` is not installed")

import experiment_texts
import multigrid_experiment as experiment
import multigrid_report as report


SETTINGS = {**experiment.SETTINGS, **experiment.QUICK, "steps": 4, "evaluations": 2}


# Texts


def test_a_book_is_prepared():
    book = "THE  Fée's\r\ntale_\n\n\n  [1] \u201cIt was,\u201d she\u2014said: 'no!'  \n\n***\n\nEnd."
    assert experiment_texts.prepare(book) == "the fee's tale\n1 it was, she said: 'no!'\nend."
    assert experiment_texts.middle("abcdef", 2) == "cd" and experiment_texts.middle("ab", 5) == "ab"


@pytest.mark.skipif(
    not (experiment_texts.SHARED / "fairy_tales").is_dir(), reason="../shared/data/fairy_tales is not here"
)
def test_fairy_tales_are_split_by_books():
    train, held_out = experiment_texts.fairy_tales(180_000, 20_000)
    assert len(train) == 18 and len(held_out) == 2  # the validation book is in neither
    assert {len(text) for text in train} == {10_000} == {len(text) for text in held_out}
    assert set("".join(train + held_out)) <= set("abcdefghijklmnopqrstuvwxyz0123456789 .,;:!?'\"()-\n")
    book = (experiment_texts.SHARED / "fairy_tales" / "ozaki_japanese.txt").read_text(encoding="utf-8")
    assert held_out[1] in experiment_texts.prepare(book)


def test_python_source_is_ascii_and_of_the_size_asked_for(monkeypatch):
    files = [f"# {letter}\n" * 10 for letter in "abcdéf"]
    monkeypatch.setattr(experiment_texts, "load_texts", lambda dataset: Texts(files[:5], files[5:]))
    train, held_out = experiment_texts.python_source(150, 25)
    assert list(map(len, train)) == [40, 40, 40, 30] and held_out == [files[5][:25]]
    assert {text[2] for text in train} == set("abcd")
    monkeypatch.setattr(experiment_texts, "load_texts", lambda dataset: Texts(files[4::-1], files[5:]))
    assert experiment_texts.python_source(150, 25)[0] == train  # their order is of their own


@pytest.fixture(scope="module")
def corpus():
    return experiment.Corpus("python", SETTINGS)


def test_columns_are_annotations_of_whole_texts(corpus):
    size = SETTINGS["block_size"]
    names = ("token_kind", "bracket")
    for name in names:
        expected = [0]
        for text in corpus.texts[1]:
            expected += [*make_axis(name).annotate(text), 0]
        (column,) = corpus.columns[name][1]
        assert column.tolist() == expected
    _, held_out = corpus.blocks(experiment.Grid(names, ""), SETTINGS)
    block = held_out[3]["axis_ids"]
    here = slice(3 * (size - 1), 3 * (size - 1) + size)
    assert block.tolist() == [corpus.columns[name][1][0, here].tolist() for name in names]
    assert not torch.equal(block[0], block[1])
    for alone, kind in ((True, experiment.BlocksAlone), (False, PackedBlocks)):
        assert {type(part) for part in corpus.blocks(experiment.Grid(names, "", alone=alone), SETTINGS)} == {kind}


def test_alone_a_block_is_annotated_from_its_beginning():
    texts = ["x = [1, 2,\n 3]\n", 's = """one\ntwo\nthree"""\n']
    tokenizer = build_tokenizer("byte", [])
    axes = [make_axis("string"), make_axis("bracket")]
    stream = encode(texts, tokenizer)
    whole = PackedBlocks(stream, 8, meta=annotate(texts, tokenizer, axes))
    alone = experiment.BlocksAlone(stream, 8, axes, tokenizer.eos_token_id)
    differ, ends = 0, 0
    for number in range(len(whole)):
        block, text = alone[number], ""
        expected = [[], []]
        for token in whole[number]["input_ids"].tolist():
            text = "" if token == 256 else text + chr(token)
            for row, axis in zip(expected, axes):
                row.append(axis.annotate(text)[-1] if text else 0)
        assert torch.equal(block["input_ids"], whole[number]["input_ids"])
        assert block["axis_ids"].tolist() == expected
        differ += expected != whole[number]["axis_ids"].tolist()
        ends += 256 in block["input_ids"][1:-1]
    assert differ and ends  # strings and brackets that were opened before, and a text that ends inside a block


# Models


def test_plain_decoders_are_as_large_as_the_largest_grid_of_their_size(corpus):
    settings = {**SETTINGS, "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2}
    models = experiment.models_of("python", corpus, settings)
    assert "learned" not in models  # not before there is such an axis
    assert next(iter(models)) == "plain" and models["plain"][1].hidden_size == 48
    sizes = {name: experiment.number_of_parameters(config) for name, (_, config) in models.items()}
    for name, (grid, config) in models.items():
        if grid.axes:
            rival = sizes[experiment.rival(grid.size)]
            assert 1 <= rival / sizes[name] < 1.01, name
            assert config.hidden_size == 48
        else:
            assert config.num_axes == 0
    assert models["all, light wiring"][1].axis_hidden_size == 16
    assert models["all, factored"][1].axis_order == "factored"
    assert sizes["all, light wiring"] < sizes["token kind"] < sizes["indentation + bracket"] < sizes["all lexer axes"]


def test_learning_rates_fall_with_the_width():
    settings = {"hidden_size": 48, "learning_rate": 5e-3}
    for width, rate in ((48, 5e-3), (96, 2.5e-3), (144, 5e-3 / 3)):
        config = experiment.MultiGridConfig(hidden_size=width)
        assert experiment.learning_rate(config, settings) == pytest.approx(rate, rel=1e-12)


# Runs


@pytest.fixture
def work(corpus, tmp_path, monkeypatch):
    work = experiment.Work({"python": corpus}, tmp_path, "abc")
    monkeypatch.setattr(experiment, "WORK", work, raising=False)
    return work


@pytest.mark.slow
def test_a_run_gives_its_curve_and_is_not_repeated(work, monkeypatch):
    task = experiment.Task("python", "token kind", 1)
    figures = experiment.run(task)
    assert [point["tokens"] for point in figures["curve"]] == [3 * 2 * 32, 4 * 2 * 32]
    assert figures["curve"][-1]["bits"] == figures["curve"][-1]["main"] and set(figures["curve"][0]["axes"]) == {
        "token_kind"
    }
    assert figures["rival"] == "plain, size of one axis" and not figures["looks_ahead"]
    assert json.loads((work.folder / task.path).read_text(encoding="utf-8")) == figures

    def never(*args):
        raise AssertionError("trained again")

    trained = experiment.train
    monkeypatch.setattr(experiment, "train", never)
    assert experiment.run(task) == figures
    for change in ({"learning_rate": 1.0}, {"steps": 3}):
        monkeypatch.setattr(work.corpora["python"], "settings", {**SETTINGS, **change})
        with pytest.raises(AssertionError, match="trained again"):
            experiment.run(task)
    monkeypatch.setattr(work.corpora["python"], "settings", SETTINGS)
    monkeypatch.setattr(experiment, "train", trained)
    (work.folder / task.path).unlink()
    again = experiment.run(task)
    assert again["curve"] == figures["curve"]
    assert experiment.run(experiment.Task("python", "token kind", 2))["curve"] != figures["curve"]


def test_seeds_pair_the_order_of_text(corpus):
    """Two models of one seed read the same blocks in the same order, none of them twice."""
    seen = {}

    class Watched:
        def __init__(self, blocks):
            self.blocks, self.stride, self.order = blocks, blocks.stride, []

        def __len__(self):
            return len(self.blocks)

        def __getitem__(self, index):
            self.order.append(index)
            return self.blocks[index]

    models = experiment.models_of("python", corpus, SETTINGS)
    for name in ("plain", "token kind"):
        grid, config = models[name]
        train, held_out = corpus.blocks(grid, SETTINGS)
        seen[name] = Watched(train)
        experiment.train(config, seen[name], held_out, SETTINGS, seed=3)
    order = seen["plain"].order
    assert order == seen["token kind"].order
    seen["plain"].order = []
    held_out = corpus.blocks(models["plain"][0], SETTINGS)[1]
    experiment.train(models["plain"][1], seen["plain"], held_out, SETTINGS, seed=4)
    assert sorted(order) != order != seen["plain"].order
    assert len(set(seen["plain"].order)) == len(seen["plain"].order) == SETTINGS["steps"] * SETTINGS["batch_size"]


def test_the_average_is_measured_and_the_rate_rises_over_the_warm_up(corpus, monkeypatch):
    grid, config = experiment.models_of("python", corpus, SETTINGS)["plain"]
    train, held_out = corpus.blocks(grid, SETTINGS)
    measured, rates, step = [], [], torch.optim.AdamW.step

    def noting_step(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting_step)
    monkeypatch.setattr(experiment, "measure", lambda model, *_: measured.append(model) or {"bits": 1.0})
    average, _ = experiment.train(config, train, held_out, {**SETTINGS, "warmup_steps": 3}, seed=0)
    assert len(measured) == 2 and all(model is average for model in measured)
    peak = experiment.learning_rate(config, SETTINGS)
    assert rates == pytest.approx([peak / 3, 2 * peak / 3, peak, peak])


def test_the_text_costs_all_axes_in_the_factored_order(corpus):
    models = experiment.models_of("python", corpus, SETTINGS)
    for name in ("all lexer axes", "all, factored"):
        grid, config = models[name]
        torch.manual_seed(0)
        model = experiment.MultiGridForCausalLM(config).eval()
        _, blocks = corpus.blocks(grid, SETTINGS)
        found = experiment.measure(model, blocks, size=4)
        main, metas = [], []
        for block in blocks:
            with torch.no_grad():
                outputs = model(input_ids=block["input_ids"][None], axis_ids=block["axis_ids"][None])
            main.append(torch.nn.functional.cross_entropy(outputs.logits[0, :-1], block["input_ids"][1:]).item())
            metas.append(
                [
                    torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:]).item()
                    for logits, ids in zip(outputs.axis_logits, block["axis_ids"])
                ]
            )
        main, metas = np.mean(main) / math.log(2), np.mean(metas, axis=0) / math.log(2)
        assert found["main"] == pytest.approx(main, rel=1e-4)
        assert list(found["axes"].values()) == pytest.approx(metas.tolist(), rel=1e-4)
        assert found["bits"] == pytest.approx(main + (metas.sum() if name == "all, factored" else 0), rel=1e-4)


def test_weights_are_averaged_over_more_and_more_steps():
    update, averages = experiment.averaged(0.9), [torch.zeros(1)]
    weights = []
    for number in range(1, 200):
        before = averages[0].item()
        update(averages, [torch.tensor([before + 1.0])], torch.tensor(number))
        weights.append(averages[0].item() - before)
    assert weights[0] == pytest.approx(1 - 2 / 11) and weights[-1] == pytest.approx(0.1, rel=1e-4)
    assert all(a >= b - 1e-4 for a, b in pairwise(weights))


# Report


def a_run(model, seed, bits, seconds=1.0, rival=None, looks_ahead=False, corpus="python"):
    """With bits after 100, 1,000 and 10,000 tokens, 100 a step."""
    curve = [{"tokens": 100 * 10**n, "bits": value, "main": value, "axes": {}} for n, value in enumerate(bits)]
    return {
        "corpus": corpus,
        "model": model,
        "seed": seed,
        "rival": rival,
        "looks_ahead": looks_ahead,
        "factored": False,
        "parameters": 10,
        "tokens_per_step": 100,
        "step_seconds": seconds,
        "curve": curve,
    }


def test_intervals_are_students():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert report.interval([1.0])[0] == 1 and math.isnan(report.interval([1.0])[1])


def test_curves_are_read_between_their_points():
    run = a_run("a", 0, [5.0, 3.0, 2.0])
    assert report.bits_at(run, 1000) == 3 and report.bits_at(run, 10**2.5) == pytest.approx(4)
    for tokens in (99, 10_001):
        with pytest.raises(ValueError, match="`tokens`"):
            report.bits_at(run, tokens)
    assert report.tokens_until(run, 4.0) == pytest.approx(10**2.5)
    assert report.tokens_until(run, 2.0) == pytest.approx(10_000)
    assert report.tokens_until(run, 6.0) == 100 and report.tokens_until(run, 1.9) == math.inf


def test_equal_seconds_are_those_that_both_have():
    slow, fast = a_run("slow", 0, [4.0, 2.0, 1.0], seconds=10.0), a_run("fast", 0, [5.0, 3.0, 2.0], seconds=1.0)
    assert (report.tokens_per_second(slow), report.tokens_per_second(fast)) == (10, 100)
    # The fast one ends after 100 s, when the slow one has read 1,000 tokens: 2.0 against 2.0.
    assert report.gain_at_equal_seconds(slow, fast) == pytest.approx(0.0)
    assert report.gain_at_equal_seconds(fast, slow) == pytest.approx(0.0)
    assert report.gain_at_equal_seconds(a_run("b", 0, [4.0, 1.5, 1.0], 10.0), fast) == pytest.approx(0.5)
    # When the fast one ends, one that is 1,000 times as slow has read 10 tokens, and was first measured after 100.
    slowest = a_run("slowest", 0, [4.0, 2.0, 1.0], seconds=1000.0)
    assert report.gain_at_equal_seconds(slowest, fast) is None is report.gain_at_equal_seconds(fast, slowest)
    assert report.compare([slowest], [fast])["gain_at_equal_seconds"] is None
    assert report.says(None) == "cannot be compared, since the slower run was not measured so early"


def test_runs_are_compared_seed_by_seed():
    ours = [a_run("a", seed, [5, 4, 2 + seed]) for seed in (1, 0, 2)]
    others = [a_run("b", seed, [5, 4, 2.5 + seed]) for seed in (0, 1, 2)]
    result = report.compare(ours, others)
    assert result["gain"] == (pytest.approx(0.5), pytest.approx(0.0))
    assert result["share_of_tokens"][0] < 1
    assert report.compare(others, ours)["share_of_tokens"] is None


def known_runs(leak=1.0, causal=0.0, control=0.0, alone=-0.4):
    """Grids that gain so much over their rivals, give or take what a seed does."""
    runs = []
    for seed in range(3):
        noise = 0.01 * seed
        for corpus, grids in (
            (
                "fairy_tales",
                {report.LEAKING: leak, report.CAUSAL: -0.05, "affixes": -0.1, "random": control, "constant": -0.2},
            ),
            (
                "python",
                {"all lexer axes": causal, "all lexer axes" + report.ALONE: alone, "learned": -0.3, "random": control},
            ),
        ):
            runs.append(a_run("plain", seed, [5, 4, 3.5], corpus=corpus))
            runs.append(a_run("plain, size of one axis", seed, [5, 4, 3.0], seconds=2.0, corpus=corpus))
            for model, gain in grids.items():
                ahead, rival = model == report.LEAKING, "plain, size of one axis"
                bits = [5, 4 - gain, 3.0 - gain + noise]
                runs.append(a_run(model, seed, bits, 4.0, rival, ahead, corpus))
    return runs


def test_the_verdict_is_computed_from_the_numbers():
    good, bad = report.report_on(known_runs(causal=0.2)), report.report_on(known_runs(causal=0.02))
    control = report.report_on(known_runs(causal=0.2, control=0.3))
    notes = {name: "\n".join(each["notes"]) for name, each in (("good", good), ("bad", bad), ("control", control))}
    assert (
        "part of speech gains 0.990 +- 0.025" in notes["good"]
        and "previous word it loses 0.060 +- 0.025" in notes["good"]
    )
    assert "The 1.050 +- 0.000 bits per character between the two are leakage" in notes["good"]
    assert (
        "Python source: all lexer axes gains 0.190 +- 0.025. Against a random axis instead, what it says gains 0.200"
        in notes["good"]
    )
    assert (
        "Python source, verdict: all lexer axes gains 0.190 +- 0.025: a real gain" in notes["good"]
        and good["checks"][0]["met"]
    )
    assert f"Fairy tales, verdict: {report.CAUSAL} loses 0.060 +- 0.025: no gain" in notes["good"]
    assert "all lexer axes neither gains nor loses (+0.010 +- 0.025)" in notes["bad"]
    assert (
        "Python source, verdict: all lexer axes neither gains nor loses (+0.010 +- 0.025): no gain" in notes["bad"]
        and not bad["checks"][0]["met"]
    )
    assert "since a control gains as much" in notes["control"]


def test_annotators_that_know_more_than_the_model_are_told():
    for alone, best, tells in ((0.1, "all lexer axes", True), (0.3, "all lexer axes" + report.ALONE, False)):
        notes = report.report_on(known_runs(causal=0.2, alone=alone))["notes"]
        verdict = next(note for note in notes if note.startswith("Python source, verdict"))
        assert f"verdict: {best} " in verdict and tells == ("have read what stands before each block" in verdict)
        memory = next(note for note in notes if note.startswith("Python source, what stands before the block"))
        assert memory.endswith(f"this {'gains' if tells else 'loses'} 0.100 +- 0.000 (all lexer axes).")


def test_a_smaller_plain_decoder_may_be_the_better_one():
    runs = known_runs(causal=0.2)
    for run in runs:
        run["parameters"] = 10 if run["model"].startswith("plain") else 9
    for parameters, bits, met in ((8, 2.7, False), (11, 2.7, True), (8, 3.1, True)):
        other = [
            {**a_run("plain, size of few", seed, [5, 4, bits], seconds=2.0), "parameters": parameters}
            for seed in range(3)
        ]
        result = report.report_on(runs + other)
        assert result["checks"][0]["met"] == met
        verdict = next(note for note in result["notes"] if note.startswith("Python source, verdict"))
        assert ("a real gain" in verdict) == met and ("plain, size of few" in verdict) != met
        row = next(row for row in result["rows"] if row["model"] == "all lexer axes")
        assert row["gain over equal parameters"] == pytest.approx(0.19)


def test_what_looks_ahead_is_never_the_best():
    result = report.report_on(known_runs(leak=3.0))
    verdict = next(note for note in result["notes"] if note.startswith("Fairy tales, verdict"))
    assert report.CAUSAL in verdict and report.LEAKING not in verdict
    rows = {(row["corpus"], row["model"]): row for row in result["rows"]}
    assert rows["fairy tales", report.LEAKING]["looks ahead"] and not rows["fairy tales", "affixes"]["looks ahead"]


def test_rows_and_pictures(tmp_path, monkeypatch):
    runs = known_runs(causal=0.2)
    result = report.report_on(runs)
    row = next(row for row in result["rows"] if row["model"] == "all lexer axes")
    assert row["gain over equal parameters"] == pytest.approx(0.19) and row["step ms"] == 4000
    assert row["bits per character"] == pytest.approx(2.81)
    # Bits fall from 3.8 after 1,000 tokens to 2.8 and a seed's noise after 10,000, on a line over their logarithm.
    noises = (0.0, 0.01, 0.02)
    shares = [10 ** (0.8 / (1 - noise)) / 10 for noise in noises]  # of 10,000, until the rival's 3.0
    assert row["share of its text needed"] == pytest.approx(np.mean(shares), rel=1e-3)
    # The rival takes half as long a step: when it ends, half of the text was read.
    gains = [3.0 - (3.8 - math.log10(5) * (1 - noise)) for noise in noises]
    assert row["gain at equal time"] == pytest.approx(np.mean(gains), rel=1e-3)
    assert row["equal time +-"] == pytest.approx(report.interval(gains)[1], rel=1e-3)
    assert "gain +-" not in next(row for row in result["rows"] if row["model"] == "plain")
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    for corpus in ("fairy_tales", "python"):
        report.draw(corpus, runs, result["rows"], tmp_path / f"{corpus}.png")
        assert (tmp_path / f"{corpus}.png").read_bytes().startswith(b"\x89PNG")
    assert [figure.get_suptitle() for figure in figures] == [
        "Fairy tales: dashed and hollow is what looks ahead",
        "Python source",
    ]
    for figure in figures:
        for axes in figure.axes:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels(which="both") if label.get_text()]
            inside = [box for box in boxes if axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1]
            assert all(left.x1 <= right.x0 for left, right in pairwise(sorted(inside, key=lambda box: box.x0)))
            assert figure.bbox.containsx(axes.xaxis.label.get_window_extent().x1)  # not cut off
    early = [
        {**row, "gain at equal time": None, "equal time +-": None} if "gain +-" in row else row
        for row in result["rows"]
    ]
    report.draw("python", runs, early, tmp_path / "early.png")  # as where a run was not measured so early


# The whole


def run_script(*arguments):
    env = {**os.environ, "PYTHONPATH": str(experiment.ROOT)}  # so that the package need not be installed
    command = [sys.executable, experiment.__file__, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_an_interval_needs_two_seeds():
    process = run_script("--seeds", "1")
    assert process.returncode == 2 and "argument --seeds: must be at least 2, got 1" in process.stderr


@pytest.mark.slow
def test_it_runs_quickly():
    pytest.importorskip("nltk", reason="the extra `axes` is not installed")
    results = Path(experiment.RESULTS) / "multigrid_experiment.json"
    before = results.read_bytes() if results.is_file() else None
    process = run_script("--quick", "--seeds", "2", "--jobs", "1")
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert {row["model"] for row in result["rows"] if row["corpus"] == "python"} >= {
        "learned",
        "all, factored",
        "plain",
    }
    assert any(note.startswith("Python source, verdict") for note in result["notes"])
    assert (results.read_bytes() if results.is_file() else None) == before
