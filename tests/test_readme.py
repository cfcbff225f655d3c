"""The README's code runs as it is printed."""

import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_quickstart_runs_as_printed():
    code = re.search(r"## Quickstart\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 12
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def add(a, b):\n    return")
