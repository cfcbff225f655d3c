"""Imports Transformers' own test mixins, at the version that is installed.

The mixins are not in the wheel, but the source distribution on the package index carries them as `tests/test_*.py`.
They are fetched once per version into `.cache/` and imported as the package `transformers_tests`. What they import
from folders that the source distribution leaves out is replaced by the stubs below.
"""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from unittest import mock

import pytest
import transformers


PACKAGE = "transformers_tests"
CACHE = Path(__file__).resolve().parent / ".cache"

# What `ConfigTester` passes to a configuration and expects back: the fields common to all, none at its default.
CONFIG_COMMON_KWARGS = {
    "architectures": ["LeapModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "low", 1: "middle", 2: "high"},
    "is_encoder_decoder": True,
    "label2id": {"low": 0, "middle": 1, "high": 2},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "multi_label_classification",
    "return_dict": False,
}


def _needs_several_processes(*args, **kwargs):
    raise NotImplementedError("the launcher of the distributed tests is not part of the source distribution")


STUBS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
    "distributed_testing_utils": dict.fromkeys(
        (
            "_get_distributed_backend",
            "_get_distributed_device_type",
            "_get_rank_device",
            "_set_rank_device",
            "_start_rank_processes",
            "run_distributed",
        ),
        _needs_several_processes,
    ),
}


def _download(version, folder):
    """Downloads the source distribution of `version` into `folder` and returns its path."""
    requirement = f"transformers=={version}"
    # Only transformers itself from source: the packages that pip needs to read its metadata may be wheels.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise OSError(f"pip did not download {requirement} within ten minutes") from None
    archives = list(Path(folder).glob("*.tar.gz"))
    if result.returncode != 0 or not archives:
        reason = (result.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise OSError(f"pip could not download the source distribution of {requirement}: {reason}")
    return archives[0]


def fetch():
    """Returns the folder with the installed version's `test_*.py`, downloading them on the first call.

    Raises:
        OSError: the package index cannot be reached, or has no source distribution of this version.
    """
    version = transformers.__version__
    target = CACHE / version
    if target.is_dir():
        return target
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        archive = _download(version, scratch)
        unpacked = Path(scratch) / "tests"
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if member.isfile() and path.parts[1:-1] == ("tests",) and path.suffix == ".py":
                    with tar.extractfile(member) as source, open(unpacked / path.name, "wb") as copy:
                        shutil.copyfileobj(source, copy)
        if not (unpacked / "test_modeling_common.py").exists():
            raise OSError(f"the source distribution of transformers=={version} carries no tests")
        # Another process may have been faster, which is as good.
        with contextlib.suppress(OSError):
            unpacked.rename(target)
    return target


def _add_module(name, path=None, **attributes):
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = path
    vars(module).update(attributes)
    sys.modules[name] = module


def load(name):
    """Imports the upstream test module `name`, e.g. `test_modeling_common`.

    Raises:
        RuntimeError: the upstream tests cannot be had. With `HEPTAPOD_OFFLINE=1` the calling test module is skipped instead.
    """
    if PACKAGE not in sys.modules:
        try:
            folder = fetch()
        except OSError as error:
            if os.environ.get("HEPTAPOD_OFFLINE") == "1":
                pytest.skip(
                    f"HEPTAPOD_OFFLINE=1: Transformers' own tests are not available: {error}", allow_module_level=True
                )
            raise RuntimeError(
                f"Transformers' own tests are not available, so nothing was tested: {error}. Set HEPTAPOD_OFFLINE=1 to skip "
                "them where there is no package index."
            ) from error
        _add_module(PACKAGE, path=[str(folder)])
        for stub, attributes in STUBS.items():
            parent, _, _ = stub.rpartition(".")
            if parent:
                _add_module(f"{PACKAGE}.{parent}", path=[])
            _add_module(f"{PACKAGE}.{stub}", **attributes)
    # Upstream runs from its own checkout and imports the library by folder; here it is the installed one.
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")
