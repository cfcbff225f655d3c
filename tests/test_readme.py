"""Code on the front page and on the pages in docs/ runs as it is printed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import build_tokenizer

import modeling_heptapod
from modeling_heptapod import Axis, HeptapodProcessor, MultiGridProcessor, make_axis
from tests.saved_models import save_with_results
from tests.tiny_heptapod import tiny_heptapod
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
SLOW = {"docs/deployment.md": "torch.onnx and torchao take their time"}

# Commands that no test runs as they are printed, by how they begin, and why not.
NOT_RUN = {
    "make ": "continuous integration runs them, or a reader who waits",
    'pip install "git+': "needs the network",
    "torchrun --standalone": "tests/training/test_distributed.py runs them",
    "torchrun --nnodes": "needs several machines, which the page says",
    "python -c": "needs a corpus that is not here, which the page says",
    "python training/train.py": "the same; tests/training/test_multigrid_training.py trains with an axis from a file",
    "python training/classify.py": "the same; tests/training/test_classify.py runs the script",
    ".venv/bin/python training/demo_app.py": "serves until it is stopped; tests/training/test_demo_app.py visits it",
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language="python"):
    """The blocks of code on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def commands(page):
    """The commands on a page, each on one line."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("  #")[0].split()) for line in lines if line.strip()]


def test_all_code_is_found():
    """Fences that `blocks` would not see."""
    for page in PAGES:
        fences = re.findall(r"^ *(```+\S*|~~~\S*)$", read(page), re.MULTILINE)
        assert set(fences) <= {"```", "```python", "```bash", "```bibtex"}, page
        assert len(fences) % 2 == 0 and "`````" not in read(page), page
    assert sum(len(blocks(page)) for page in PAGES) > 20


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
        "heptapod": (tiny_heptapod(grid_size=(4, 64), **page_ids), HeptapodProcessor(page_tokenizer, 4, 64)),
        "multigrid": (tiny_multigrid(**ids, **axes), processor),
    }
    for family, (model, processor) in models.items():
        for part in (model, processor):
            part.save_pretrained(folder / "outputs" / f"{family}-tiny")


RUN_ALL = """
import contextlib, io, json, sys, traceback
pages, outcomes = json.load(sys.stdin), {}
for page, codes in pages.items():
    printed, errors = io.StringIO(), []
    for code in codes:
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(code, page, "exec"), {"__name__": "__main__"})
            except Exception:
                errors.append(code + traceback.format_exc())
    outcomes[page] = printed.getvalue(), errors
print("OUTCOMES" + json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What the blocks of the fast pages print and raise: each on its own, all in one process, which imports once."""
    folder = tmp_path_factory.mktemp("pages")
    save_tiny_models(folder)
    for name in ("configs", "training"):
        (folder / name).symlink_to(ROOT / name)
    pages = {page: blocks(page) for page in PAGES if page not in SLOW}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        cwd=folder,
        input=json.dumps(pages),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.split("OUTCOMES")[1])


@pytest.mark.parametrize("page", [page for page in PAGES if page not in SLOW and blocks(page)])
def test_python_runs_as_printed(page, outcomes):
    _, errors = outcomes[1][page]
    assert not errors, "\n".join(errors)


def test_pages_do_what_they_say(outcomes):
    """Some of what they print and leave behind."""
    folder, pages = outcomes
    printed, _ = pages["docs/getting_started.md"]
    assert "def add(a, b):\n    return" in printed and printed.count("def area(width, height):") == 2
    assert "\u2591" * 64 in pages["docs/families/heptapod.md"][0]  # the second row, masked
    assert re.search(r"^\[[01] [01]\]$", pages["docs/fine_tuning.md"][0], re.MULTILINE)  # two rows, told apart or not
    saved = {str(path.relative_to(folder / "outputs")) for path in folder.glob("outputs/*/*.safetensors")}
    assert saved >= {"lora/adapter_model.safetensors", "merged/model.safetensors", "sft/model.safetensors"}
    assert "lora/model.safetensors" not in saved


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
    wheel, install = INSTALL
    assert install.endswith(" accelerate")  # which is here already
    install = install.removesuffix(" accelerate")
    for command, more in ((wheel, "--no-build-isolation"), (install, f"--no-deps --target {target}")):
        command = f"{sys.executable} -m {command} {more} --quiet --disable-pip-version-check"  # and no network
        done = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return target


INSTALL = [command for command in commands("docs/getting_started.md") if command.startswith("pip ")]


def test_the_wheel_is_the_whole_package(installed):
    sources, shipped = (
        {path.relative_to(folder) for path in (folder / "modeling_heptapod").rglob("*.[cp]*") if path.suffix != ".pyc"}
        for folder in (ROOT, installed)
    )
    assert shipped == sources and "focus_cpu_source.c" in {path.name for path in shipped}
    assert not (installed / "training").exists() and not (installed / "tests").exists()


def test_a_new_user_without_a_checkout(installed, tmp_path):
    """As printed, for each family where the names of the folders differ only; in one process, which imports once."""
    save_tiny_models(tmp_path)
    _, causal, grid = blocks("docs/getting_started.md")
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


@pytest.mark.slow  # torch.onnx takes its time
def test_deployment_runs_as_printed(tmp_path):
    save_tiny_models(tmp_path)
    page = "docs/deployment.md"
    (command,) = [command for command in commands(page) if "export_onnx" in command]
    printed = run(f"for code in {blocks(page)!r}:\n    exec(code, {{}})", tmp_path)
    assert printed.count("import os\n") >= 2 and "'token_str'" in printed and " of the size" in printed
    done = run_command(command, tmp_path)
    assert "import os" in done and (tmp_path / "outputs/leap-tiny/onnx/step.onnx").is_file()


def run_command(command, folder):
    """What a command prints in a folder that looks like a clone."""
    for name in ("training", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    arguments = shlex.split(command.removeprefix(".venv/bin/python "))
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # commands, each of which reads the standard library or trains
def test_commands_run_as_printed(tmp_path):
    """On an untrained folder in the place of the demo's, and a short text in the place of the reader's."""
    save_with_results("leap", tmp_path / "outputs" / "leap-tiny")
    (tmp_path / "hub_cards").mkdir()
    (tmp_path / "path" / "to").mkdir(parents=True)
    text = "".join(f"Line {number} of a text of one's own.\n" for number in range(900))
    for path in (tmp_path / "path" / "to" / "text", tmp_path / "my.txt"):
        path.write_text(text, encoding="utf-8")
    printed = {}
    for page in PAGES:
        for command in commands(page):
            if not left_out(command) and command.startswith(".venv/bin/python") and command not in printed:
                if "export_onnx" not in command:  # see above
                    printed[command] = run_command(command, tmp_path)
    found = "\n".join(printed.values())
    assert "bits per byte with a sliding window" in found and "|stdlib_next_line" in found
    assert "nothing was pushed to me/leap-tiny" in found
    assert (tmp_path / "hub_cards" / "leap-tiny.md").is_file()
    for name in ("mine", "tuned"):
        assert (tmp_path / "outputs" / name / "model.safetensors").is_file()


def left_out(command):
    return any(command.startswith(beginning) for beginning in NOT_RUN)


def test_every_command_is_run_or_says_why_not():
    found = [command for page in PAGES for command in commands(page)]
    for command in found:
        assert left_out(command) or command.startswith(".venv/bin/python ") or command in INSTALL, command
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in found), beginning
    for target in {command.split()[1] for command in found if command.startswith("make ")}:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target


def test_axes_of_the_table_can_be_made():
    """The second column of MultiGrid's table of axes: names, calls, scripts."""
    section = read("docs/families/multigrid.md").split("\n## Axes\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[1] for line in section.split("\n") if line.startswith("| ") and line.count(" | ") == 2]
    examples = [example for cell in cells[1:] for example in re.findall(r"`(.*?)`", cell)]
    assert len(examples) >= 12
    for example in examples:
        if example.endswith(".py"):
            assert (ROOT / example).is_file()
        else:
            called = example.split("(")[0]
            known = {called: getattr(modeling_heptapod, called, None)}
            assert isinstance(eval(example, known) if "(" in example else make_axis(example), Axis), example


def test_a_test_stands_behind_each_tick():
    """Every row of the table names tests that exist, and every cross a reason that is given."""
    section = read("docs/support.md")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    reasons = section.split("\n\n")[-1]
    above = []
    assert len(rows) > 20
    for _, *ticks, tests in rows[2:]:
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", tests) or above  # "the same"
        assert tests
        for path, name in tests:
            assert not name or re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
                name
            )
        for tick in ticks:
            assert tick == "yes" or re.search(r"\([1-9]\)$", tick)[0] + " " in reasons, tick
        above = tests
