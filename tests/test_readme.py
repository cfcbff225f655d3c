"""The README's code runs as it is printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.saved_models import save_with_results


ROOT = Path(__file__).parent.parent


def test_quickstart_runs_as_printed():
    code = re.search(r"## Quickstart\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 12
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def add(a, b):\n    return")


@pytest.mark.slow  # five commands, each of which reads the standard library
def test_evaluate_and_publish_run_as_printed(tmp_path):
    """On an untrained folder in the place of the demo's."""
    save_with_results("leap", tmp_path / "outputs" / "leap-tiny")
    (tmp_path / "training").symlink_to(ROOT / "training")
    (tmp_path / "hub_cards").mkdir()
    text = (ROOT / "README.md").read_text()
    text = text[text.index("## Evaluate") : text.index("## Where is what")]
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
