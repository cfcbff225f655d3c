"""tests/conftest.py itself: what it promises to all other tests."""

import socket
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conformance import conftest as conformance
from tests.conformance import upstream


ROOT = Path(__file__).parent.parent


def test_unwritten_memory_is_nan():
    for empty in (torch.empty(7), torch.empty_like(torch.ones(7)), torch.ones(1).new_empty(7, dtype=torch.bfloat16)):
        assert empty.isnan().all()


@pytest.mark.parametrize("run", [0, 1])
def test_every_test_starts_from_the_same_seed(run, drawn=[]):  # noqa: B006  the list outlives the first run
    drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[-1])


def test_network_is_out_of_reach():
    for address in (("192.0.2.1", 80), ("example.org", 443)):
        with socket.socket() as client, pytest.raises(PermissionError, match="network"):
            client.connect(address)


def test_this_machine_is_within_reach():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())


def test_conformance_without_an_index_is_an_error(monkeypatch):
    """A run that tested nothing must not look green, unless somebody says that there is no index."""

    def unreachable():
        raise OSError("pip could not download it")

    monkeypatch.setattr(upstream, "fetch", unreachable)
    monkeypatch.setattr(upstream, "PACKAGE", "transformers_tests_of_nobody")
    monkeypatch.delenv("HEPTAPOD_OFFLINE", raising=False)
    with pytest.raises((RuntimeError, pytest.skip.Exception)) as found:
        upstream.load("test_modeling_common")
    assert found.type is RuntimeError  # a skipped test here would look green, too
    assert "nothing was tested: pip could not download it. Set HEPTAPOD_OFFLINE=1" in str(found.value)
    monkeypatch.setenv("HEPTAPOD_OFFLINE", "1")
    with pytest.raises(pytest.skip.Exception, match="pip could not download it"):
        upstream.load("test_modeling_common")


def test_nobody_says_offline_for_us():
    """`HEPTAPOD_OFFLINE=1` would have conformance look green where the index is only out of reach."""
    for name in ("Makefile", ".ci/run"):
        assert "HEPTAPOD_OFFLINE" not in (ROOT / name).read_text(encoding="utf-8")


def test_what_pip_could_not_download_is_said(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "a hint\nERROR: No matching distribution found")
    monkeypatch.setattr(upstream, "CACHE", tmp_path)
    monkeypatch.setattr(upstream.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(
        OSError, match="source distribution of transformers==.*: ERROR: No matching distribution found"
    ):
        upstream.fetch()
    failed.returncode, failed.stderr = 0, ""  # and brought nothing
    with pytest.raises(OSError, match="pip said nothing"):
        upstream.fetch()
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


def test_tests_are_those_of_the_installed_version_and_there_are_some(monkeypatch, tmp_path):
    names = []

    def download(version, folder):
        names.append(version)
        archive = Path(folder) / f"transformers-{version}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for name in wanted:
                tar.add(__file__, f"transformers-{version}/{name}")
        return archive

    monkeypatch.setattr(upstream, "CACHE", tmp_path)
    monkeypatch.setattr(upstream, "_download", download)
    wanted = ["tests/test_of_nothing_common.py", "src/test_modeling_common.py"]
    with pytest.raises(OSError, match="carries no tests"):
        upstream.fetch()
    wanted = ["tests/test_modeling_common.py", "tests/models/test_modeling_bert.py"]
    for version in ("5.98.0", "5.99.1", "5.99.1"):
        monkeypatch.setattr(upstream.transformers, "__version__", version)
        folder = upstream.fetch()
        assert folder == tmp_path / version and [path.name for path in folder.iterdir()] == ["test_modeling_common.py"]
    assert names[1:] == ["5.98.0", "5.99.1"]


def test_conformance_runs_where_it_is_named_and_nowhere_else():
    def is_ignored(*arguments):
        config = SimpleNamespace(invocation_params=SimpleNamespace(dir=ROOT), args=arguments)
        return conformance.pytest_ignore_collect(conformance.HERE / "test_leap_conformance.py", config)

    for named in ("tests/conformance", "tests/conformance/test_leap_conformance.py::TestLeap", conformance.HERE):
        assert is_ignored("tests/test_focus.py", str(named)) is None
    assert is_ignored() is is_ignored("tests") is is_ignored("tests/test_focus.py") is True
