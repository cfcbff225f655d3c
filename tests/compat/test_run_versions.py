"""The runner of `make compat`: which versions it tries, and what its table says."""

from collections import Counter

import pytest

from modeling_heptapod.common.transformers_versions import OLDEST
from tests.compat.models import MODELS
from tests.compat.run_versions import counts_of, newest_on_the_index, resolve, table_of
from tests.test_unused_kwargs import MODELS as HEADS


def test_versions_by_word_and_number():
    assert resolve(["5.20.2", "oldest", "5.20.2"]) == ["5.20.2", "{}.{}.0".format(*OLDEST)]
    assert newest_on_the_index("transformers (5.24.0)\nAvailable versions: 5.24.0, 5.23.0\n") == "5.24.0"
    with pytest.raises(ValueError, match="pip names no newest version"):
        newest_on_the_index("ERROR: No matching distribution found for transformers")


def test_the_table_counts_what_failed(tmp_path):
    (tmp_path / "report.xml").write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.compat.compat_suite.TestForward" name="a"/>
        <testcase classname="tests.compat.compat_suite.TestForward" name="b"><failure message="no"/></testcase>
        <testcase classname="tests.compat.compat_suite.TestForward" name="c"><error message="no"/></testcase>
        <testcase classname="tests.test_unused_kwargs" name="d"><skipped/></testcase>
        <testcase classname="tests.test_unused_kwargs" name="e"/>
        </testsuite></testsuites>"""
    )
    counts = counts_of(tmp_path / "report.xml")
    assert counts == {"Forward": Counter(passed=1, failed=2), "unused_kwargs": Counter(passed=1, skipped=1)}
    lines = table_of({"5.17.0": counts, "5.24.0": {"Forward": Counter(passed=3)}}).split("\n")
    assert [line.split() for line in lines] == [
        ["transformers", "Forward", "unused_kwargs"],
        ["5.17.0", "2", "of", "3", "FAILED", "1"],
        ["5.24.0", "3", "0"],
    ]


def test_every_head_is_among_the_models():
    assert {head for head, _ in MODELS.values()} == set(HEADS)
