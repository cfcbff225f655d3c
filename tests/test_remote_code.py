"""Code in saved folders: flat, whole, of its own folder."""

import json
import os
import sys
from pathlib import Path

import pytest

import modeling_heptapod
from modeling_heptapod import LeapConfig
from modeling_heptapod.common import remote_code
from modeling_heptapod.common.remote_code import write_code
from tests.clean_room import run_alone
from tests.saved_models import FAMILIES
from tests.tiny import mostly_slow
from tests.tiny_leap import tiny_leap


PACKAGE = Path(modeling_heptapod.__file__).parent


def tree(folder, **files):
    """Modules by dotted names, `leap__model` being `leap/model.py`."""
    for name, source in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def test_modules_of_this_package_have_names_of_their_own():
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names)) > 40


def test_two_modules_of_one_name_are_refused(tmp_path):
    tree(tmp_path, a__model="from ..b.rows import x\nfrom .rows import y\n", a__rows="y = 1\n", b__rows="x = 1\n")
    with pytest.raises(ValueError, match="rows.py and .*rows.py would be one file in a saved folder"):
        write_code([tmp_path / "a" / "model.py"], tmp_path / "out")


def test_relative_imports_are_written_anew(tmp_path):
    """Also those inside of functions and over several lines; words that look like one stay."""
    source = '"""Text.\n\nfrom ..deep.down import nothing\n"""\nfrom ..deep.down import (\n    x,\n    y,\n)\n\n\n'
    source += "def f():\n    from .near import z\n\n    return x + y + z\n"
    tree(tmp_path, a__model=source, a__near="z = 4\n", deep__down="x, y = 1, 2\n", a__other="never = 1\n")
    write_code([tmp_path / "a" / "model.py"], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.py", "near.py", "down.py"}
    written = (tmp_path / "out" / "model.py").read_text(encoding="utf-8")
    assert written == source.replace("from ..deep.down import (", "from .down import (")


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    """Saving is not to take longer than the weights."""
    read, parse = [], remote_code.ast.parse
    tree(tmp_path, a__model="from .rows import x\n", a__rows="x = 1\n")
    with monkeypatch.context() as patch:  # pytest parses, too, to show a failure
        patch.setattr(remote_code.ast, "parse", lambda source, path: read.append(path.name) or parse(source, path))
        for _ in range(2):
            write_code([tmp_path / "a" / "model.py"], tmp_path / "out")
    assert sorted(read) == ["model.py", "rows.py"]
    tree(tmp_path, a__rows="x = 2\n")
    os.utime(tmp_path / "a" / "rows.py", ns=(0, 1))  # clocks of file systems may stand still between two writes
    write_code([tmp_path / "a" / "model.py"], tmp_path / "out")
    assert (tmp_path / "out" / "rows.py").read_text(encoding="utf-8") == "x = 2\n"


def test_c_source_becomes_a_module(tmp_path):
    """Transformers loads Python files only. What was saved is saved again as it is."""
    source = '/* \\n {"x"} */\nint one = 1;\n'
    tree(tmp_path, a__model="from .kernel import SOURCE\n", a__kernel="SOURCE = None\n")
    (tmp_path / "a" / "kernel.c").write_text(source, encoding="utf-8")
    write_code([tmp_path / "a" / "model.py"], tmp_path / "out")
    write_code([tmp_path / "out" / "model.py"], tmp_path / "again")
    written = (tmp_path / "out" / "kernel.py").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.py", "kernel.py"}
    assert (tmp_path / "again" / "kernel.py").read_text(encoding="utf-8") == written
    names = {}
    exec(written, names)
    assert names["SOURCE"] == source
    for wrong in ('char *x = """";\n', "int one = 1; \\"):
        (tmp_path / "a" / "kernel.c").write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match="kernel.c must not contain three double quotes"):
            write_code([tmp_path / "a" / "model.py"], tmp_path / "out")


def test_the_c_source_of_a_saved_folder_is_that_of_the_package(tmp_path):
    LeapConfig().save_pretrained(tmp_path)
    write_code([tmp_path / "focus_cpu_source.py"], tmp_path / "again")
    names = {}
    exec((tmp_path / "again" / "focus_cpu_source.py").read_text(encoding="utf-8"), names)
    assert names["SOURCE"] == (PACKAGE / "leap" / "focus_cpu_source.c").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", ["from . import rows", "from ..a import rows"])
def test_imports_of_packages_are_refused(line, tmp_path):
    tree(tmp_path, a__model=f"x = 1\n{line}\n", a__rows="", a____init__="")
    with pytest.raises(ValueError, match="model.py, line 2: a relative import must be of a module"):
        write_code([tmp_path / "a" / "model.py"], tmp_path / "out")


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ("leap",)))
def test_a_config_alone_makes_models_elsewhere(family, tmp_path):
    names = {"leap": "Leap", "hierarchical_lm": "HierarchicalLM", "heptapod": "Heptapod", "multigrid": "MultiGrid"}
    config = getattr(modeling_heptapod, f"{names[family]}Config")(vocab_size=30, hidden_size=32, num_attention_heads=2)
    config.save_pretrained(tmp_path / "config")
    code = f"""
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained({str(tmp_path / "config")!r}, trust_remote_code=True)
print(type(AutoModel.from_config(config, trust_remote_code=True)).__name__)
"""
    assert run_alone(code, tmp_path).split()[-1] == f"{names[family]}Model"


def test_code_that_was_there_before_is_pushed(tmp_path, monkeypatch):
    """`save_pretrained(push_to_hub=True)` pushes what has changed since it began, and the code is written before."""
    pushed = []

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        pushed.extend(path.name for path in Path(working_dir).iterdir() if path.name not in files_timestamps)

    monkeypatch.setattr(LeapConfig, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.configuration_utils.hf_api", lambda: _Hub())
    LeapConfig().save_pretrained(str(tmp_path), push_to_hub=True, repo_id="me/leap")
    assert {"config.json", "modeling_leap.py", "configuration_leap.py", "cache_checks.py"} <= set(pushed)


class _Hub:
    def create_repo(self, repo_id, **kwargs):
        return type("Repository", (), {"repo_id": repo_id})


def test_a_class_of_ones_own_keeps_its_place(tmp_path, monkeypatch):
    """Registered as the documentation of Transformers says, in a file of the user's."""
    source = "from modeling_heptapod import LeapForCausalLM\n\n\nclass Mine(LeapForCausalLM):\n    pass\n"
    tree(tmp_path, my_leap=source)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_leap

    my_leap.Mine.register_for_auto_class("AutoModelForCausalLM")
    my_leap.Mine(tiny_leap().config).save_pretrained(tmp_path / "saved")
    del sys.modules["my_leap"]
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "my_leap.Mine" and auto_map["AutoModel"] == "modeling_leap.LeapModel"
    assert (tmp_path / "saved" / "my_leap.py").read_text(encoding="utf-8") == source


def test_what_is_saved_again_is_of_its_own_folder(tmp_path):
    config = LeapConfig()
    config.auto_map = {"AutoConfig": "me/leap--configuration_leap.LeapConfig"}
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == LeapConfig._auto_classes


def test_a_subclass_of_a_config_brings_the_code_of_the_family(tmp_path):
    class MyConfig(LeapConfig):
        pass

    MyConfig().save_pretrained(tmp_path)
    assert (tmp_path / "modeling_leap.py").is_file()
