"""Options that make no sense, missing packages and missing folders are named before any work."""

import ast
import importlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import train
from argument_checks import (
    check_can_write,
    check_can_write_file,
    check_number,
    check_training_arguments,
    need,
    pin_memory_for_devices_only,
    prompt_text,
)
from loading import check_family, check_folder, may_run_code

from tests.saved_models import save_tiny


SCRIPTS = Path(train.__file__).parent

# Of every script each number, and what it cannot be.
NUMBERS = {
    "evaluate_model.py": {
        "--batch_size": ["-2", "0", "x", "1.5"],
        "--max_length": ["0", "1", "-5"],
        "--stride": ["0", "-1"],
        "--max_validation_bytes": ["0", "-3"],
        "--validation_split_percentage": ["0", "-1", "101", "nan"],
    },
    "sample.py": {"--max_new_tokens": ["0", "-1"], "--seed": ["-1", str(2**32)]},
    "sample_axes.py": {"--max_new_tokens": ["0", "-1"], "--seed": ["-1"]},
    "infill.py": {"--page": ["-1"], "--max_denoising_steps": ["0", "-4"], "--seed": ["-1"]},
    "export_onnx.py": {"--max_new_tokens": ["0", "-1"]},
    "distill_axis.py": {
        "--num_clusters": ["1", "-2"],
        "--context_length": ["0", "1001"],
        "--name": ["../x"],
        "--max_leaf_nodes": ["1"],
        "--max_tokens": ["0", "-9"],
        "--seed": ["-1"],
        "--layer": ["x"],
    },
    "demo_app.py": {"--port": ["0", "-1", "70000"]},
    "experiments/multigrid_experiment.py": {"--seeds": ["1", "0"], "--jobs": ["0", "-1"]},
}

# Runs a script with wrong options again and again, and shows how each ended.
WRONG = """
import contextlib, io, json, runpy, sys
script, cases = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, script.rsplit("/", 1)[0])
name = script.rsplit("/", 1)[1].removesuffix(".py")
main = __import__(name).main
found = []
for words in cases:
    sys.argv, shown = [script, *words], io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            main()
        found.append([0, shown.getvalue()])
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        found.append([code, shown.getvalue() + str(error)])
print(json.dumps(found))
"""


def outcomes(script, cases, cwd):
    process = subprocess.run(
        [sys.executable, "-c", WRONG, str(SCRIPTS / script), json.dumps(cases)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("script", NUMBERS)
def test_every_number_of_every_script_is_checked_before_any_work(script, tmp_path):
    """In a folder where there is no model: work would end with another message."""
    names = [(name, value) for name, values in NUMBERS[script].items() for value in values]
    is_positional = script not in ("demo_app.py", "experiments/multigrid_experiment.py")
    cases = [[*(["outputs/leap-tiny"] if is_positional else []), name, value] for name, value in names]
    for (name, value), (code, shown) in zip(names, outcomes(script, cases, tmp_path), strict=True):
        assert code == 2 and f"argument {name}: must be" in shown and value in shown, (name, value, shown)


MAKE = {
    "outputs/leap-tiny": "`make demo` makes it",
    "outputs/multigrid-tiny": "`make demo FAMILY=multigrid` makes it",
    "outputs/leap-judge": "`make judge` makes it",
    "outputs/mine": r"`python training/train\.py .* --output_dir outputs/mine` makes one",
    "/nowhere/at/all": r"`python training/train\.py",
    "./here": r"`python training/train\.py",
}


@pytest.mark.parametrize("name", MAKE)
def test_a_folder_that_is_not_there_says_what_makes_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for check in (may_run_code, check_folder):
        with pytest.raises(ValueError, match=f"there is no folder {name}: {MAKE[name]}"):
            check(name)
    with pytest.raises(ValueError, match=r"holds no model: there is no config\.json in it"):
        check_folder(tmp_path)


FOLDER_OF = {
    "evaluate_model.py": [],
    "sample.py": [],
    "sample_axes.py": [],
    "infill.py": [],
    "export_onnx.py": [],
    "distill_axis.py": [],
    "demo_app.py": [],
    "publish.py": ["--repo_id", "me/x"],
    "model_card.py": [],
}


@pytest.mark.parametrize("text", ["", os.fsdecode(b"\xff")])
def test_a_prompt_is_text(text):
    assert prompt_text("é") == "é"
    with pytest.raises(ArgumentTypeError, match="must be a text|must be UTF-8 text"):
        prompt_text(text)


# Of each script that is for some families, one that it is not for, and what there is for that.
NOT_FOR = {
    "sample": ("heptapod", "infill.py"),
    "sample_axes": ("leap", "sample.py"),
    "infill": ("multigrid", "sample_axes.py"),
    "export_onnx": ("hierarchical_lm", "sample.py"),
    "distill_axis": ("heptapod", "infill.py"),
}


@pytest.mark.parametrize("script", NOT_FOR)
def test_a_model_of_another_family_is_named_with_what_there_is_for_it(script, tmp_path, monkeypatch):
    if script in NEEDS:
        for module in NEEDS[script][1]:
            pytest.importorskip(module)
    family, other = NOT_FOR[script]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", str(tmp_path)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ValueError, match=f"holds a {family}, for which there is training/{other}"):
        importlib.import_module(script).main()


def test_a_family_that_no_script_is_for_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    check_family(str(tmp_path), but=("heptapod",))
    with pytest.raises(ValueError, match="holds a gpt2; this script is for leap, multigrid"):
        check_family(str(tmp_path), ("leap", "multigrid"))


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_page_is_of_text(content, tmp_path):
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match="--text_file .*text (must be a UTF-8 text file|is empty)"):
        importlib.import_module("infill").choose_page(None, str(tmp_path / "text"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("script", FOLDER_OF)
def test_every_script_says_what_makes_a_missing_folder(script, tmp_path):
    ((code, shown),) = outcomes(script, [["outputs/heptapod-tiny", *FOLDER_OF[script]]], tmp_path)
    assert code == 1 and "there is no folder outputs/heptapod-tiny: `make demo FAMILY=heptapod` makes it" in shown


def test_code_of_a_folder_may_run_and_of_a_name_only_where_it_is_allowed(tmp_path, monkeypatch):
    save_tiny("leap", tmp_path / "own")
    assert may_run_code(str(tmp_path / "own")) is True
    config = json.loads((tmp_path / "own" / "config.json").read_text(encoding="utf-8"))
    config["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling.Model"
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has its code from someone/else on the Hub.*--trust_remote_code allows it"):
        may_run_code(str(tmp_path / "own"))
    assert may_run_code(str(tmp_path / "own"), trust_remote_code=True) is True

    found, asked = {"me/with-code": {"auto_map": {"AutoConfig": "x.X"}}, "me/without": {}}, []

    def get_config_dict(name, **options):
        asked.append(options)
        return found[name], {}

    monkeypatch.setattr("loading.PreTrainedConfig.get_config_dict", get_config_dict)
    with pytest.raises(ValueError, match="me/with-code brings its own code, .*: --trust_remote_code allows it"):
        may_run_code("me/with-code")
    assert may_run_code("me/with-code", True) is True and may_run_code("me/without") is False
    assert may_run_code("me/without", revision="v1") is False and asked[-2:] == [{}, {"revision": "v1"}]


def test_an_adapter_takes_no_model_with_code_from_elsewhere(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert may_run_code(str(tmp_path)) is True
    for name in ("someone/else", None):
        adapter.write_text(json.dumps({"base_model_name_or_path": name}))
        with pytest.raises(ValueError, match=f"has its code from {name}, .*--trust_remote_code allows it"):
            may_run_code(str(tmp_path))
    assert may_run_code(str(tmp_path), True) is True


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("size", [0, 40])
def test_a_file_of_a_folder_that_was_cut_off_is_named(name, size, tmp_path):
    save_tiny("leap", tmp_path)
    check_folder(tmp_path)
    os.truncate(tmp_path / name, size)
    for check in (check_folder, may_run_code):
        with pytest.raises(ValueError, match=f"{tmp_path / name} (cannot be read, or )?is damaged"):
            check(str(tmp_path))


def test_output_that_cannot_be_written_is_named_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_can_write("--output_dir", tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir() and not list((tmp_path / "new" / "folder").iterdir())
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        with pytest.raises(ValueError, match=f"--output_dir {folder} must be a folder that can be written to"):
            check_can_write("--output_dir", folder)


def test_a_file_that_cannot_be_written_is_named_before_any_work(tmp_path):
    (tmp_path / "file").write_text("before")
    check_can_write_file("--output", tmp_path / "file")
    check_can_write_file("--output", tmp_path / "new" / "file")
    assert (tmp_path / "file").read_text() == "before" and not (tmp_path / "new" / "file").exists()
    with pytest.raises(ValueError, match=f"--output {tmp_path} must be a file that can be written: "):
        check_can_write_file("--output", tmp_path)
    with pytest.raises(ValueError, match=f"--output: its folder {tmp_path / 'file'} must be a folder that can"):
        check_can_write_file("--output", tmp_path / "file" / "x.json")


def test_figures_do_not_go_into_a_folder(tmp_path, monkeypatch):
    save_tiny("leap", tmp_path)
    evaluate_model = importlib.import_module("evaluate_model")
    monkeypatch.setattr(evaluate_model, "load_texts", None)
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", str(tmp_path), "--output", str(tmp_path)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ValueError, match="--output .* must be a file that can be written"):
        evaluate_model.main()


# Of each script that works first and writes then, what it is given beside the folder of a model.
WRITES = {
    "evaluate_model.py": ["--output", "{file}/x.json"],
    "infill.py": ["--output_dir", "{file}"],
    "export_onnx.py": ["--output_dir", "{file}"],
    "distill_axis.py": ["--output_dir", "{file}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", WRITES)
def test_scripts_say_before_they_work_that_they_cannot_write(script, tmp_path):
    save_tiny("heptapod" if script == "infill.py" else "leap", tmp_path / "model")
    (tmp_path / "file").write_text("")
    words = [word.format(file=tmp_path / "file") for word in WRITES[script]]
    ((code, shown),) = outcomes(script, [[str(tmp_path / "model"), *words]], tmp_path)
    assert code == 1 and "must be a folder that can be written to" in shown and words[0] in shown


@pytest.mark.parametrize("file", ["tokenizer_config.json", "processor_config.json"])
def test_code_that_a_tokenizer_takes_from_elsewhere_is_seen(file, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "someone/else--x.X"]}}))
    with pytest.raises(ValueError, match="has its code from someone/else on the Hub"):
        may_run_code(str(tmp_path))


def test_missing_packages_are_named_with_their_extra(monkeypatch):
    need("train", "json", "torch")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib, not_there, which the extra `train` installs.*\[train\]"):
        need("train", "json", "matplotlib", "not_there")


# What each script needs that transformers does not bring, and the extra that does.
NEEDS = {
    "train": ("train", ["accelerate", "evaluate", "matplotlib", "jinja2", "psutil"]),
    "classify": ("finetune", ["accelerate", "datasets", "evaluate", "sklearn"]),
    "evaluate_model": ("eval", ["evaluate"]),
    "publish": ("eval", ["jinja2"]),
    "model_card": ("eval", ["jinja2"]),
    "infill": ("plots", ["matplotlib", "PIL"]),
    "denoising_animation": ("plots", ["matplotlib", "PIL"]),
    "export_onnx": ("deploy", ["onnx", "onnxruntime", "onnxscript"]),
    "distill_axis": ("axes", ["sklearn"]),
    "experiments/multigrid_experiment": ("axes", ["nltk", "scipy", "sklearn"]),
    "demo_app": ("app", ["gradio", "matplotlib", "PIL"]),
}


@pytest.mark.parametrize("script", NEEDS)
def test_scripts_say_what_they_need_before_they_begin(script, monkeypatch):
    """Before anything heavy is imported: the module ends there, with one message for all that is missing."""
    extra, modules = NEEDS[script]
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    source = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
    with pytest.raises(ImportError, match=f"{', '.join(modules)}, which the extra `{extra}` installs"):
        exec(
            compile(source, f"{script}.py", "exec"), {"__name__": script, "__file__": __file__, "__doc__": "one\nline"}
        )


def test_the_extras_bring_what_scripts_ask_for():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    extras = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    packages = {"sklearn": "scikit-learn", "PIL": "pillow", "scipy": "scikit-learn"}  # which needs it
    for extra, modules in NEEDS.values():
        brought = " ".join(extras[extra])
        assert all(packages.get(module, module) in brought for module in modules), (extra, modules, brought)


PRINTING = sorted(
    path.relative_to(SCRIPTS).with_suffix("").as_posix()
    for path in [*SCRIPTS.glob("*.py"), SCRIPTS / "experiments" / "multigrid_experiment.py"]
    if "def main(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", PRINTING)
def test_text_that_the_terminal_cannot_show_ends_no_script(script, monkeypatch):
    """Models write any bytes, and paths hold any letters: a terminal of few letters shows escapes."""
    for module in NEEDS.get(script, ("", []))[1]:
        pytest.importorskip(module)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script.rpartition("/")[2]).main()
    print("caf\xe9 \ufffd")
    terminal.flush()
    assert ended.value.code == 0 and terminal.buffer.getvalue().endswith(rb"caf\xe9 \ufffd" + b"\n")


@pytest.mark.parametrize(
    ("bounds", "fits", "wrong", "words"),
    [
        ({"least": 1}, [1, 2.5], [0, -1, math.nan, math.inf], "at least 1"),
        ({"above": 0, "most": 5}, [0.1, 5], [0, 5.1, math.nan], "at most 5 and above 0"),
        ({}, [0, -3, 10**400], [math.nan, -math.inf], "finite"),
    ],
)
def test_numbers_outside_their_bounds_are_named(bounds, fits, wrong, words):
    check_number("--x", None, **bounds)
    for value in fits:
        check_number("--x", value, **bounds)
    for value in wrong:
        finite = "" if math.isfinite(value) or not bounds else "finite and "
        with pytest.raises(ValueError, match=f"--x must be {finite}{words}, got {value}"):
            check_number("--x", value, **bounds)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", -2),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", math.nan),
        ("learning_rate", -1e-3),
        ("weight_decay", math.inf),
        ("adam_beta1", 1.0),
        ("adam_beta2", 2.0),
        ("max_grad_norm", math.nan),
        ("num_train_epochs", 0.0),
        ("num_train_epochs", math.nan),
        ("max_steps", 0),
        ("max_steps", -5),
        ("save_steps", -1),
        ("eval_steps", -0.5),
        ("save_total_limit", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("data_seed", -1),
    ],
)
def test_arguments_that_trainer_would_take_are_named(name, value, tmp_path):
    args = train.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    check_training_arguments(args)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"--{name} must be .*, got {value}"):
        check_training_arguments(args)


def test_memory_is_not_pinned_without_a_device(tmp_path):
    """torch would warn of it at each start."""
    args = train.TrainingArguments(str(tmp_path), report_to=[])
    if args.device.type != "cpu":
        pytest.skip("there is a device")
    assert args.dataloader_pin_memory
    pin_memory_for_devices_only(args)
    assert args.dataloader_pin_memory is False


def imports_of(script, seen):
    """Names of modules in the order in which a script imports them, those of modules beside it included."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in [node.module] if isinstance(node, ast.ImportFrom) else names:
            ours = next(
                (path for path in (script.parent / f"{name}.py", SCRIPTS / f"{name}.py") if path.exists()), None
            )
            if ours is None:
                yield name.split(".")[0]
            elif ours not in seen:
                seen.add(ours)
                yield from imports_of(ours, seen)
                yield ours.stem


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS.rglob("*.py") if "__main__" in path.read_text()], ids=lambda path: path.stem
)
def test_scripts_import_argument_checks_before_transformers(script):
    before = list(itertools.takewhile(lambda name: name != "argument_checks", imports_of(script, set())))
    assert {"transformers", "modeling_heptapod", "accelerate", "peft", "lm_eval", "datasets"}.isdisjoint(before)


@pytest.mark.slow
def test_scripts_do_not_show_warnings_of_torchao():
    """Transformers imports it where it is installed, for quantized weights."""
    pytest.importorskip("torchao")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import argument_checks, transformers.integrations.torchao"
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0 and "Failed to load" not in done.stderr and "pytree" not in done.stderr, done.stderr
