"""The window of Transformers versions: what is stated, and what is refused."""

import re
from pathlib import Path

import pytest

from modeling_heptapod.transformers_versions import NEWEST, OLDEST, check_version
from tests.clean_room import run_beside


ROOT = Path(__file__).parent.parent
BEYOND = f"{NEWEST[0]}.{NEWEST[1] + 1}"


def test_versions_of_the_window_pass():
    for version in ("{}.{}.0".format(*OLDEST), "{}.{}.7".format(*NEWEST), "{}.{}.0.dev0".format(*NEWEST)):
        check_version(version)


@pytest.mark.parametrize("version", ["4.57.6", f"{OLDEST[0]}.{OLDEST[1] - 1}.9", f"{BEYOND}.0", f"{BEYOND}.0.dev0"])
def test_other_versions_are_refused_by_name(version):
    window = f"transformers>={OLDEST[0]}.{OLDEST[1]},<{BEYOND}"
    with pytest.raises(ImportError, match=f"{re.escape(window)}, but {re.escape(version)} is installed"):
        check_version(version)


@pytest.mark.parametrize("module", ["modeling_heptapod", "modeling_heptapod.modeling_leap"])
def test_the_import_refuses_before_anything_else(module):
    code = f"""
import sys, transformers
transformers.__version__ = "{BEYOND}.0"
try:
    import {module}
except ImportError as error:
    print(error, [name for name in sys.modules if name.startswith("modeling_heptapod.configuration")])
"""
    printed = run_beside(code)
    assert f"{BEYOND}.0 is installed" in printed and printed.rstrip().endswith("[]")


def test_pyproject_states_the_same_window():
    assert f'"transformers>={OLDEST[0]}.{OLDEST[1]},<{BEYOND}"' in (ROOT / "pyproject.toml").read_text()
