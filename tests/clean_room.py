"""Python in processes of their own: with this repository, or where nothing of it is to be found."""

import os
import subprocess
import sys
from pathlib import Path


_BLOCK = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "modeling_heptapod"):
            raise ImportError(f"{name} is blocked in this test")


sys.meta_path.insert(0, Blocked())
"""


def run_alone(code: str, folder: Path, *arguments, home: str = "home") -> str:
    """What `code` prints in another interpreter and folder, without Triton and this package.

    `home`, below `folder`, is where remote code is kept.
    """
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "clean_room.py").write_text(_BLOCK + code)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HOME": str(folder / home), "HF_HUB_OFFLINE": "1"}
    return _run([elsewhere / "clean_room.py", *arguments], cwd=elsewhere, env=env)


def run_beside(code: str) -> str:
    """What `code` prints in another interpreter that finds this package."""
    return _run(["-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})


def _run(command, **kwargs):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout
