"""Origin of a figure: machine, versions, command, commit and weights, written beside it."""

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from redaction import redact_all, redact_command
from safetensors import safe_open


def provenance(device: torch.device) -> dict:
    """Information that is needed to measure again.

    Args:
        device: device of the model.

    Returns:
        `device` and `threads`, `versions` of Python, torch and transformers, `command` without secrets, and `commit` of these
        scripts: `None` outside of a git repository, with `-dirty` where a tracked file was changed.
    """
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": shlex.join(redact_command([*_launcher(), *sys.argv])),
        "commit": commit(Path(__file__).parent),
    }


def write_figures(path: Path, figures: dict) -> None:
    """Write figures as JSON, without secrets.

    Raises:
        ValueError: for figures that are not finite; the message contains their names, and nothing is written.
    """
    names = [name for name, value in _leaves("", figures) if isinstance(value, float) and not math.isfinite(value)]
    if names:
        raise ValueError(f"{path} was not written: {', '.join(names)} of this model would be NaN or infinite")
    path.write_text(json.dumps(redact_all(figures), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _leaves(name, value):
    if not isinstance(value, (dict, list)):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(f"{name}.{key}" if name else str(key), part)


def _launcher():
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's
    return ["python"] if processes is None else ["torchrun", "--nproc_per_node", processes]


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of this machine's processor if it is known."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["cpu"]


def machine() -> dict:
    """Processor of this machine, its number of cores and matrix units, and the GPU if there is one."""
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
    except OSError:  # not Linux
        pass
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "units": units, "gpu": gpu}


def kind_of_processor(device: dict) -> str:
    """Name for processors that are fast at the same things, from `machine()`: the newest of their vector and matrix units."""
    return device["units"][-1] if device["units"] else platform.machine().lower()


def commit(folder: Path) -> str | None:
    """Commit of a folder, 12 digits; with `-dirty` if tracked files differ from it, `None` without git."""
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def weights_digest(folder: Path) -> str:
    """SHA-256 of a folder's weights by name, which assigns figures to weights; it does not depend on the number of files."""
    files = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), path)
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        with safe_open(path, "pt") as tensors:
            weights = tensors.get_tensor(name)
        digest.update(f"{name} {weights.dtype} {list(weights.shape)}".encode())
        digest.update(weights.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _git(folder, *command):
    return subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
