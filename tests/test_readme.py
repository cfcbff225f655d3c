"""The README's code runs as it is printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from data import build_tokenizer

import modeling_heptapod
from modeling_heptapod import HeptapodProcessor, MetaAxis, MultiGridProcessor, make_axis
from tests.saved_models import save_with_results
from tests.tiny_heptapod import tiny_heptapod
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


ROOT = Path(__file__).parent.parent


def blocks(heading, language="python"):
    """The blocks of code below a heading, down to the next of its rank."""
    section = re.split(r"^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [part for part in section if part.startswith(f"{heading}\n")]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def run(code, folder, **env):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",  # models write any letters
        timeout=600,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_axes_of_the_table_can_be_made():
    """The second column of MultiGrid's table of axes: names, calls, scripts."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## MultiGrid\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[1] for line in section.split("\n") if line.startswith("| ") and line.count(" | ") == 2]
    examples = [example for cell in cells[1:] for example in re.findall(r"`(.*?)`", cell)]
    assert len(examples) == 12
    for example in examples:
        if example.endswith(".py"):
            assert (ROOT / example).is_file()
        else:
            called = example.split("(")[0]
            known = {called: getattr(modeling_heptapod, called, None)}
            assert isinstance(eval(example, known) if "(" in example else make_axis(example), MetaAxis), example


def save_tiny_models(folder):
    """What `make demo` of each family leaves in `folder`/outputs, untrained and smaller."""
    tokenizer, page_tokenizer = build_tokenizer("byte", []), build_tokenizer("byte", [], for_pages=True)
    processor = MultiGridProcessor(tokenizer, ["token_kind", "bracket"])
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    axes = {"axis_names": processor.axis_names, "axis_vocab_sizes": processor.axis_vocab_sizes}
    page_ids = {"vocab_size": len(page_tokenizer), "pad_token_id": page_tokenizer.pad_token_id}
    page_ids["mask_token_id"] = page_tokenizer.mask_token_id
    models = {
        "leap": (tiny_leap(**ids), tokenizer),
        "hierarchical_lm": (tiny_hierarchical_lm(**ids), tokenizer),
        "heptapod": (tiny_heptapod(grid_size=(4, 32), **page_ids), HeptapodProcessor(page_tokenizer, 4, 32)),
        "multigrid": (tiny_multigrid(**ids, **axes), processor),
    }
    for family, (model, processor) in models.items():
        for part in (model, processor):
            part.save_pretrained(folder / "outputs" / f"{family}-tiny")


def test_quickstart_runs_as_printed():
    (code,) = blocks("Quickstart")
    assert len(code.strip().splitlines()) <= 12
    assert run(code, ROOT).startswith("def add(a, b):\n    return")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package and nothing else of this repository, installed from a wheel of what git knows of it."""
    folder = tmp_path_factory.mktemp("installed")
    clone, target = folder / "clone", folder / "site"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    wheel, install = blocks("Install", "bash")[0].strip().splitlines()
    assert install.endswith(" accelerate")  # which is here already
    install = install.removesuffix(" accelerate")
    for command, more in ((wheel, "--no-build-isolation"), (install, f"--no-deps --target {target}")):
        command = f"{sys.executable} -m {command} {more} --quiet --disable-pip-version-check"  # and no network
        done = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return target


def test_the_wheel_is_the_whole_package(installed):
    modules, shipped = (
        {path.relative_to(folder) for path in (folder / "modeling_heptapod").rglob("*.py")}
        for folder in (ROOT, installed)
    )
    assert shipped == modules
    assert not (installed / "training").exists() and not (installed / "tests").exists()


def test_a_new_user_without_a_checkout(installed, tmp_path):
    """As printed, for each family where the names of the folders differ only; in one process, which imports once."""
    save_tiny_models(tmp_path)
    causal, grid = blocks("Install")
    assert all(len(code.strip().splitlines()) <= 13 for code in (causal, grid))
    families = ("leap", "hierarchical_lm", "multigrid")
    codes = {family: causal.replace("leap-tiny", f"{family}-tiny") for family in families} | {"heptapod": grid}
    checks = f"""
for family, code in {codes!r}.items():
    names = {{}}
    exec(code.replace("outputs/mine", f"outputs/my-{{family}}"), names)
    before, after = names["model"].state_dict(), names["again"].state_dict()
    assert set(before) == set(after) and all(before[name].equal(after[name]) for name in before)
    assert names["model"].config.model_type == family
    module = names["modeling_heptapod"]
print("from", module.__file__)
"""
    printed = run(checks, tmp_path, PYTHONPATH=str(installed))
    assert printed.count("def area(width, height):") == 4
    assert f"from {installed}" in printed and str(ROOT / "modeling_heptapod") not in printed
    for family in codes:
        folders = [tmp_path / "outputs" / name for name in (f"{family}-tiny", f"my-{family}")]
        names, mine = ({path.name for path in folder.iterdir()} for folder in folders)
        assert names <= mine  # code, processor and all
        weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
        assert weights[0] != weights[1]  # it learned


def test_fine_tuning_runs_as_printed(tmp_path):
    """All four, in one process, which imports once; what they write is what they were asked to."""
    save_tiny_models(tmp_path)
    codes = blocks("Fine-tune")
    assert len(codes) == 4
    printed = run(f"for code in {codes!r}:\n    exec(code, {{}})", tmp_path, PYTHONPATH=str(ROOT))
    assert re.search(r"^\[[01] [01]\]$", printed, re.MULTILINE)  # two rows, told apart or not
    saved = {str(path.relative_to(tmp_path / "outputs")) for path in tmp_path.glob("outputs/*/*.safetensors")}
    assert saved >= {"lora/adapter_model.safetensors", "merged/model.safetensors", "sft/model.safetensors"}
    assert "lora/model.safetensors" not in saved


@pytest.mark.slow  # torch.onnx takes its time
def test_deployment_runs_as_printed(tmp_path):
    save_tiny_models(tmp_path)
    codes, (command,) = blocks("Pipelines and deployment"), blocks("Pipelines and deployment", "bash")
    printed = run(f"for code in {codes!r}:\n    exec(code, {{}})", tmp_path)
    assert printed.count("import os\n") >= 2 and "'token_str'" in printed and " of the size" in printed
    (tmp_path / "training").symlink_to(ROOT / "training")
    arguments = shlex.split(command.removeprefix(".venv/bin/python "))
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "import os" in done.stdout and (tmp_path / "outputs/leap-tiny/onnx/step.onnx").is_file()


@pytest.mark.slow  # five commands, each of which reads the standard library
def test_evaluate_and_publish_run_as_printed(tmp_path):
    """On an untrained folder in the place of the demo's."""
    save_with_results("leap", tmp_path / "outputs" / "leap-tiny")
    (tmp_path / "training").symlink_to(ROOT / "training")
    (tmp_path / "hub_cards").mkdir()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text[text.index("## Evaluate") : text.index("## Fine-tune")]
    commands = re.findall(r"```bash\n\.venv/bin/python (.*?)\n```", text, re.DOTALL)
    assert len(commands) == 4 == text.count("```bash")
    printed = []
    for command in commands:
        run = subprocess.run(
            [sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert run.returncode == 0, run.stderr
        printed.append(run.stdout)
    assert "bits per byte with a sliding window" in printed[0] and "|stdlib_next_line" in printed[1]
    assert "nothing was pushed to me/leap-tiny" in printed[2]
    assert (tmp_path / "hub_cards" / "leap-tiny.md").is_file()


def test_a_test_stands_behind_each_tick():
    """Every row of the table names tests that exist, and every cross a reason that is given."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Which family does what")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"][
        2:
    ]
    reasons = section.split("\n\n")[-2]
    above = []
    for _, *ticks, tests in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", tests) or above  # "the same"
        assert tests
        for path, name in tests:
            assert not name or re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
                name
            )
        for tick in ticks:
            assert tick == "yes" or re.search(r"\([1-8]\)$", tick)[0] + " " in reasons, tick
        above = tests
