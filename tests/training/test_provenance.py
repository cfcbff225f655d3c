"""training/provenance.py: what figures are of."""

import os
import shlex
import subprocess
import sys

import pytest
import torch
from provenance import commit, provenance, weights_digest
from safetensors.torch import save_file


def git(folder, *command):
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *command], cwd=folder, check=True, capture_output=True)


def test_a_changed_tree_is_dirty(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert commit(folder) is None
    git(folder, "init", "-q")
    assert commit(folder) is None  # nothing is committed yet
    (folder / "script.py").write_text("pass\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()
    assert commit(folder) == head[:12]
    (folder / "results.json").write_text("{}\n")  # results lie beside the code
    assert commit(folder) == head[:12]
    (folder / "script.py").write_text("print()\n")
    assert commit(folder) == f"{head[:12]}-dirty"
    git(folder, "add", "script.py")
    assert commit(folder) == f"{head[:12]}-dirty"
    git(folder, "commit", "-q", "-m", "second")
    assert commit(folder) not in (None, head[:12]) and "dirty" not in commit(folder)


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    assert commit(sys.prefix) is None


@pytest.mark.parametrize("processes", [None, "2"])
def test_the_command_can_be_typed_again(processes, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset_name", "two words", "it's"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    launcher = ["python"]
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        launcher = ["torchrun", "--nproc_per_node", processes]
    about = provenance(torch.device("cpu"))
    assert shlex.split(about["command"]) == [*launcher, *sys.argv]
    assert about["threads"] == torch.get_num_threads() and about["versions"]["torch"] == torch.__version__


def test_a_digest_is_of_names_dtypes_and_values(tmp_path):
    def digest(name, **tensors):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        return weights_digest(folder)

    a, b = torch.arange(4.0), torch.zeros(2)
    whole = digest("whole", a=a, b=b)
    others = [
        digest("names", a=a, c=b),
        digest("values", a=a + 1, b=b),
        digest("shapes", a=a.view(2, 2), b=b),
        digest("dtypes", a=a.view(torch.int32), b=b),
        digest("fewer", a=a),
    ]
    assert len({whole, *others}) == 6
    parts = tmp_path / "parts"
    parts.mkdir()
    save_file({"b": b}, parts / "model-00001-of-00002.safetensors")
    save_file({"a": a}, parts / "model-00002-of-00002.safetensors")
    assert weights_digest(parts) == whole
