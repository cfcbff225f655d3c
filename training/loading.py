"""Where a saved model is, and whether the code that it brings may run."""

import json
import os
import re
from pathlib import Path

from transformers import PreTrainedConfig


DEMO = re.compile(r"outputs/(leap|hierarchical_lm|heptapod|multigrid)-tiny/?")
TRUST_HELP = (
    "run the code that a name on the Hub brings, on this machine; a folder that train.py wrote needs no such leave"
)


def add_model_arguments(parser, name: str = "folder", **options) -> None:
    """The two arguments that `may_run_code` takes."""
    parser.add_argument(name, help="what train.py wrote, or a name on the Hub", **options)
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)


def how_to_make(name: str) -> str:
    """The command that makes a folder of this name."""
    demo = DEMO.fullmatch(name)
    if demo is not None:
        return "`make demo` makes it" if demo[1] == "leap" else f"`make demo FAMILY={demo[1]}` makes it"
    if name.rstrip("/") == "outputs/leap-judge":
        return "`make judge` makes it"
    return f"`python training/train.py --config_name configs/leap-tiny --output_dir {name}` makes one"


def check_folder(folder: str | os.PathLike) -> None:
    """A folder with a model has to be on this machine.

    Raises:
        ValueError: naming the command that makes it.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}: {how_to_make(str(folder))}")
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{folder} holds no model: there is no config.json in it; {how_to_make(str(folder))}")


def check_name(name: str) -> None:
    """What can only be a folder has to be there; of what may be a name on the Hub nothing is said.

    Raises:
        ValueError: naming the command that makes the folder.
    """
    if (
        Path(name).is_dir()
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        or name.startswith(("outputs/", "./", "../"))
    ):
        check_folder(name)


def may_run_code(name: str, trust_remote_code: bool = False, **options) -> bool:
    """Whether the code that a model brings may run: that of a folder, or where the user says so.

    Args:
        name: a folder, or a name on the Hub.
        trust_remote_code: what the user says.
        options: for reading the config of a name on the Hub, as `revision`.

    Raises:
        ValueError: where there is no such model, and where it needs code that may not run.
    """
    check_name(name)
    if Path(name).is_dir():
        elsewhere = _code_from_elsewhere(Path(name))
        if elsewhere and not trust_remote_code:
            raise ValueError(
                f"{name} has its code from {', '.join(elsewhere)} on the Hub, which would run on this machine: "
                "--trust_remote_code allows it"
            )
        return True
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is neither a folder nor a name on the Hub that can be read: {error}\nOf folders, {how_to_make(name)}"
        ) from error
    if "auto_map" in config and not trust_remote_code:
        raise ValueError(f"{name} brings its own code, which would run on this machine: --trust_remote_code allows it")
    return trust_remote_code


def _code_from_elsewhere(folder):
    """Names on the Hub that the configs of a folder take their code from, as `name--module.Class`."""
    names = set()
    for path in folder.glob("*config.json"):
        try:
            auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {})
        except (OSError, ValueError, AttributeError):
            continue  # transformers will say so
        for reference in auto_map.values():
            for each in reference if isinstance(reference, list) else [reference]:
                if isinstance(each, str) and "--" in each:
                    names.add(each.split("--")[0])
    return sorted(names)
