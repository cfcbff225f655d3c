"""lm_eval on saved causal models: as its command line is typed, batches of 1 and 8, scores against our own."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import evaluate_model
import pytest
from corpora import annotate, encode, hash_of
from corpus_files import NOT_STDLIB

from tests.saved_models import save_tiny


pytestmark = pytest.mark.slow  # a minute and a half: lm_eval starts slowly
TASKS = Path(evaluate_model.__file__).parent / "lm_eval_tasks"
LIMIT, WINDOW = 9, 512  # so that neither batch size divides the number of documents
# Folder -> what is saved there, and the `--model` that reads it.
MODELS = {
    "leap": ({}, "hf"),
    "hierarchical_lm": ({}, "hf"),
    "multigrid-plain": ({"axes": []}, "hf"),
    "multigrid": ({}, "multigrid"),
}
WRITE = """
task: write
custom_dataset: !function {tasks}/stdlib.lines
output_type: generate_until
test_split: test
doc_to_text: "{{{{context[-(4 + 13 * answer):]}}}}"
doc_to_target: ""
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""

# In a process of its own, as a user runs lm_eval: without our folders on the path.
RUN = """
import json, sys, sysconfig
from pathlib import Path

tasks, folder, models, limit = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
sys.modules["modeling_heptapod"] = None
from lm_eval import simple_evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager, get_task_dict

sysconfig.get_path = lambda name: str(folder / "stdlib")  # the whole of it takes long to read, and six times so

sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}/leap,trust_remote_code=True", "--device", "cpu",
            "--include_path", tasks, "--tasks", "stdlib_bits_per_byte,stdlib_next_line", "--batch_size", "1",
            "--limit", str(limit), "--output_path", f"{folder}/printed"]
cli_evaluate()

sys.path.insert(0, tasks)
import multigrid_lm

names = ["stdlib_bits_per_byte", "stdlib_next_line", "write"]
loaded = get_task_dict(names, TaskManager(include_path=[tasks, str(folder / "tasks")], include_defaults=False))
results = {}
for name, reader in models.items():
    for batch_size in (1, 8):
        pretrained = {"pretrained": f"{folder}/{name}"} | ({"trust_remote_code": True} if reader == "hf" else {})
        found = simple_evaluate(reader, pretrained, list(loaded.values()), batch_size=batch_size, limit=limit, device="cpu", bootstrap_iters=0)
        results[f"{name}-{batch_size}"] = {
            "figures": {task: values for task, values in found["results"].items()},
            "samples": {task: [sample["filtered_resps"] for sample in each] for task, each in found["samples"].items()},
            "documents": {task: [sample["doc"] for sample in each] for task, each in found["samples"].items()},
        }
for name, reader in (("multigrid", "hf"), ("factored", "multigrid")):
    try:
        simple_evaluate(reader, {"pretrained": f"{folder}/{name}", **({"trust_remote_code": True} if reader == "hf" else {})},
                        [loaded["stdlib_next_line"]], limit=1, device="cpu")
    except ValueError as error:
        results[f"error of {name}"] = str(error)
(folder / "results.json").write_text(json.dumps(results))
"""


def save_standard_library(folder):
    """The beginnings of a few of its files, so short that one window holds them: held-out ones, and one that is not."""
    library = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(library) for path in sorted(library.rglob("*.py")) if path.stat().st_size > WINDOW]
    names = [name for name in names if not NOT_STDLIB & set(name.parts)]
    held_out = [name for name in names if hash_of(name.as_posix()) < 0.05]
    for name in [*held_out[: 3 * LIMIT], next(name for name in names if name not in held_out)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((library / name).read_bytes()[: WINDOW - 20].decode(errors="ignore").encode())


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The folder of the models, and all results."""
    folder = tmp_path_factory.mktemp("scored")
    for name, (options, _) in MODELS.items():
        save_tiny(name.split("-")[0], folder / name, max_position_embeddings=WINDOW, **options)
    save_tiny("multigrid", folder / "factored", axis_order="factored")
    save_standard_library(folder / "stdlib")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "write.yaml").write_text(WRITE.format(tasks=TASKS))
    (folder / "script.py").write_text(RUN)
    models = json.dumps({name: reader for name, (_, reader) in MODELS.items()})
    process = subprocess.run(
        [sys.executable, "script.py", TASKS, folder, models, str(LIMIT)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return folder, json.loads((folder / "results.json").read_text(encoding="utf-8"))


def flat(value):
    return [x for each in value for x in flat(each)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_1_and_8_give_the_same(name, scored):
    one, eight = (scored[1][f"{name}-{size}"] for size in (1, 8))
    assert one["documents"] == eight["documents"]
    for task, samples in one["samples"].items():
        assert len(samples) == LIMIT
        for ours, theirs in zip(flat(samples), flat(eight["samples"][task]), strict=True):
            assert theirs == (pytest.approx(ours, abs=2e-3, rel=1e-6) if isinstance(ours, float) else ours)
    for task, figure in (("stdlib_bits_per_byte", "bits_per_byte,none"), ("stdlib_next_line", "acc,none")):
        assert one["figures"][task][figure] == pytest.approx(eight["figures"][task][figure], rel=1e-6)
    assert len(set(flat(one["samples"]["write"]))) > 1  # it does write something, and not always the same


@pytest.mark.parametrize("name", MODELS)
def test_bits_per_byte_are_those_of_our_own_evaluation(name, scored):
    folder, results = scored
    texts = [document["text"] for document in results[f"{name}-1"]["documents"]["stdlib_bits_per_byte"]]
    model, processing = evaluate_model.load_model(folder / name)
    axes, tokenizer = getattr(processing, "axes", ()), getattr(processing, "tokenizer", processing)
    nats = 0.0
    for text in texts:
        stream, meta = encode([text], tokenizer), annotate([text], tokenizer, axes) if axes else None
        # lm_eval begins with the same token, but does not ask for the end of the text.
        nats += evaluate_model.sliding_window_nats(model, stream, meta, window=WINDOW, stride=1)[0, :-1].sum()
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    measured = results[f"{name}-1"]["figures"]["stdlib_bits_per_byte"]["bits_per_byte,none"]
    assert measured == pytest.approx(bits, rel=1e-5)


def test_the_command_line_prints_what_is_measured(scored):
    folder, results = scored
    (path,) = (folder / "printed").rglob("results_*.json")
    printed = json.loads(path.read_text(encoding="utf-8"))["results"]
    for task, figure in (("stdlib_bits_per_byte", "bits_per_byte,none"), ("stdlib_next_line", "acc,none")):
        assert printed[task][figure] == results["leap-1"]["figures"][task][figure]


def test_what_lm_eval_cannot_score_is_said(scored):
    assert "axis_ids" in scored[1]["error of multigrid"]
    assert "axis_order='factored'" in scored[1]["error of factored"]


def test_a_model_with_axes_writes_with_annotated_ones(scored):
    folder, results = scored
    model, processor = evaluate_model.load_model(folder / "multigrid")
    documents, samples = (results["multigrid-1"][kind]["write"] for kind in ("documents", "samples"))
    differ = 0
    for document, sample in zip(documents, samples, strict=True):
        inputs = processor(document["context"][-(4 + 13 * document["answer"]) :], return_tensors="pt")
        ids = [
            model.generate(**inputs, axis_source=source, processor=processor, max_new_tokens=12, do_sample=False)
            for source in ("annotated", "predicted")
        ]
        new = [processor.decode(row[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) for row in ids]
        assert flat(sample) == [new[0].split("\n\n")[0]]
        differ += new[0] != new[1]
    assert differ


def test_documents_of_the_tasks(scored):
    folder, results = scored
    texts = [path.read_text(encoding="utf-8") for path in (folder / "stdlib").rglob("*.py")]
    for document in results["leap-1"]["documents"]["stdlib_next_line"]:
        assert len(document["choices"]) == 4 and document["context"].endswith("\n")
        assert len({*document["choices"]}) == 4
        so_far, next_line = document["context"], document["choices"][document["answer"]]
        assert any(so_far + next_line in text for text in texts)
