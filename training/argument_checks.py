"""Checks of the scripts' options, made before any work is done."""

import io
import logging
import math
import os
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path


NUMPY_SEEDS = 2**32 - 1  # the largest

# Scripts import this module before transformers, which imports torchao if it is installed. torchao warns that kernels for
# other devices cannot be loaded, and torch warns of a deprecated call in it.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def need(extra: str, *modules: str) -> None:
    """Check that packages are installed.

    Args:
        extra: the extra of this project that installs them.
        modules: names of their modules.

    Raises:
        ImportError: for missing packages; the message contains them and the extra.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"this script needs {', '.join(missing)}, which the extra `{extra}` installs: in a clone `pip install -e .[{extra}]`"
        )


def escape_unprintable() -> None:
    r"""Print characters that the terminal's encoding lacks as escapes such as `\ufffd`, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_number(
    name: str, value: float | None, least: float | None = None, most: float | None = None, above: float | None = None
) -> None:
    """Check that a number is finite, at least `least`, at most `most` and greater than `above`. `None` is accepted.

    Raises:
        ValueError: naming it.
    """
    if value is None:
        return
    wanted = [
        f"{words} {bound}"
        for words, bound in (("at least", least), ("at most", most), ("above", above))
        if bound is not None
    ]
    is_finite = isinstance(value, int) or math.isfinite(value)  # an int may be too large for a float
    if not is_finite:
        wanted.insert(0, "finite")
    fits = is_finite and (least is None or value >= least)
    if not fits or (most is not None and value > most) or (above is not None and value <= above):
        raise ValueError(f"{name} must be {' and '.join(wanted)}, got {value}")


def check_can_write(name: str, folder: str | os.PathLike) -> None:
    """Check that a folder can be written to, and create it if it does not exist.

    Raises:
        ValueError: naming the option.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} {folder} must be a folder that can be written to: {error}") from error


def check_can_write_file(name: str, path: str | os.PathLike) -> None:
    """Check that a file can be written. It may exist.

    Raises:
        ValueError: naming the option.
    """
    path = Path(path)
    check_can_write(f"{name}: its folder", path.parent)
    try:
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{name} {path} must be a file that can be written: {error}") from error


def whole(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an argparse option that is a whole number in these bounds."""
    return _number(int, "a whole number", least=least, most=most)


def real(**bounds: float) -> Callable[[str], float]:
    """The `type` of an argparse option that is a finite number; bounds as for `check_number`."""
    return _number(float, "a number", **bounds)


def prompt_text(text: str) -> str:
    """The `type` of an argparse option that is a text to continue."""
    if not text:
        raise ArgumentTypeError("must be a text of at least one character, got none")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"must be UTF-8 text, got {text!r}") from None
    return text


def _number(kind, words, **bounds):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"must be {words}, got {text!r}") from None
        try:
            check_number("it", value, **bounds)
        except ValueError as error:
            raise ArgumentTypeError(str(error).removeprefix("it ")) from None
        return value

    return parse


# Lower bounds of TrainingArguments, inclusive and exclusive.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "eval_delay": 0,
    "save_total_limit": 1,
    "seed": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "label_smoothing_factor": 0,
    "neftune_noise_alpha": 0,
    "torch_empty_cache_steps": 1,
    "dataloader_prefetch_factor": 1,
    "ddp_bucket_cap_mb": 1,
    "ddp_timeout": 1,
}
ABOVE = {"num_train_epochs": 0, "logging_steps": 0, "eval_steps": 0, "save_steps": 0}


def pin_memory_for_devices_only(args) -> None:
    """Set `dataloader_pin_memory` of `TrainingArguments` to `False` on a CPU, where torch would warn and not pin."""
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"


def check_training_arguments(args) -> None:
    """Check numbers that `Trainer` accepts and does not use as given.

    Raises:
        ValueError: naming the argument.
    """
    for name, least in AT_LEAST.items():
        check_number(f"--{name}", getattr(args, name, None), least=least)
    for name, above in ABOVE.items():
        check_number(f"--{name}", getattr(args, name, None), above=above)
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(args, name) >= 1:
            raise ValueError(f"--{name} must be below 1, got {getattr(args, name)}")
    for name in ("seed", "data_seed"):
        check_number(f"--{name}", getattr(args, name), most=NUMPY_SEEDS)
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(f"--max_steps must be at least 1, or -1 for full epochs, got {args.max_steps}")
