"""Where a saved model is, and whether the code that it brings may run."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig


DEMO = re.compile(r"outputs/(leap|hierarchical_lm|heptapod|multigrid)-tiny/?")
SHOWN_BY = {
    "leap": "sample.py",
    "hierarchical_lm": "sample.py",
    "heptapod": "infill.py",
    "multigrid": "sample_axes.py",
}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TRUST_HELP = "run the code that a name on the Hub brings, on this machine; a folder that train.py wrote needs no such permission"


def add_model_arguments(parser, name: str = "folder", **options) -> None:
    """The two arguments that `may_run_code` takes."""
    parser.add_argument(name, help="a folder that train.py wrote, or a name on the Hub", **options)
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)


def read_json(path: Path) -> dict:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: naming a file that cannot be read, is damaged, or holds something else than names and values.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, or is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must hold names and values, and is a {type(content).__name__}")
    return content


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """What a file of safetensors holds, or one of `torch.save`.

    Raises:
        ValueError: naming a file that holds something else, or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of anything may be read what is no pickle
        raise ValueError(f"{path} holds no weights, or is damaged: {error!r}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
    ):
        raise ValueError(f"{path} holds no weights: it must hold tensors by their names, as of `model.state_dict()`")
    return weights


def check_family(name: str, families: Collection[str] = (), but: Collection[str] = ()) -> None:
    """A model is of one of these families, or of any but those.

    Raises:
        ValueError: naming what else there is for it.
    """
    family = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if (families and family not in families) or family in but:
        script = SHOWN_BY.get(family)
        other = f", for which there is training/{script}" if script else f"; this script is for {', '.join(families)}"
        raise ValueError(f"{name} holds a {family}{other}")


def how_to_make(name: str) -> str:
    """The command that makes a folder of this name."""
    demo = DEMO.fullmatch(name)
    if demo is not None:
        return "`make demo` makes it" if demo[1] == "leap" else f"`make demo FAMILY={demo[1]}` makes it"
    if name.rstrip("/") == "outputs/leap-judge":
        return "`make judge` makes it"
    return f"`python training/train.py --config_name configs/leap-tiny --output_dir {name}` makes one"


def check_folder(folder: str | os.PathLike) -> None:
    """A folder with a model has to be on this machine, and whole as far as can be told from its files.

    Raises:
        ValueError: naming the command that makes it, or the file that is damaged.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}: {how_to_make(str(folder))}")
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{folder} holds no model: there is no config.json in it; {how_to_make(str(folder))}")
    for path in filter(Path.is_file, Path(folder).iterdir()):
        if path.match("*config.json") or path.name == "tokenizer.json":
            read_json(path)
        elif path.suffix == ".safetensors":
            _check_weights(path)


def _check_weights(path):
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


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


def choose_source(model_name_or_path: str | None, config_name: str | None) -> str:
    """The folder or name of the model to train: `model_name_or_path` has weights, `config_name` has none.

    Raises:
        ValueError: unless exactly one of them is given, where there is no such model, and for a configuration with weights.
    """
    if (model_name_or_path is None) == (config_name is None):
        raise ValueError(
            "one of --model_name_or_path (trained weights) and --config_name (untrained, as configs/leap-tiny) must be given, got "
            f"{'neither' if config_name is None else 'both'}"
        )
    if config_name is None:
        check_name(model_name_or_path)
        return model_name_or_path
    folder = Path(config_name)
    if config_name.startswith("configs/") and not folder.is_dir():
        raise ValueError(
            f"--config_name {config_name}: there is no such folder; there are "
            "configs/{leap,hierarchical_lm,heptapod,multigrid}-{tiny,small,base}"
        )
    weights = sorted(path.name for pattern in WEIGHTS for path in folder.glob(pattern))
    if weights:
        raise ValueError(
            f"--config_name {config_name} must be a folder without weights, got {', '.join(weights)}: "
            "--model_name_or_path trains them further"
        )
    return config_name


def load_processing_class(name: str | Path, model_type: str, trust_remote_code: bool):
    """The tokenizer of a saved model, or its processor in families that have one."""
    auto_class = AutoProcessor if model_type in ("heptapod", "multigrid") else AutoTokenizer
    return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code)


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
        elsewhere = from_elsewhere(Path(name))
        if elsewhere and not trust_remote_code:
            raise ValueError(
                f"{name} has its code from {', '.join(elsewhere)}, which would run on this machine: "
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


def from_elsewhere(folder: Path) -> list[str]:
    """What a folder takes its code from, or an adapter in it its model, which may bring code as well."""
    return _code_from_elsewhere(folder) + _model_from_elsewhere(folder)


def _code_from_elsewhere(folder):
    """What of the Hub the configs of a folder take their code from, as `name--module.Class`."""
    names = set()
    for path in folder.glob("*config.json"):
        for reference in references_of(path):
            if "--" in reference:
                names.add(f"{reference.split('--')[0]} on the Hub")
    return sorted(names)


def _model_from_elsewhere(folder):
    """What an adapter in a folder takes its model from, which may bring code as well."""
    if not (folder / "adapter_config.json").is_file():
        return []
    name = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    return [] if Path(name).resolve() == folder.resolve() else [name]


def references_of(path: Path) -> list[str]:
    """The classes in the `auto_map` of a config, as `module.Class`, those of lists of a slow and a fast tokenizer too.

    Raises:
        ValueError: naming a file that is damaged.
    """
    auto_map = read_json(path).get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise ValueError(f"{path} is damaged: `auto_map` must hold names and classes, got {auto_map}")
    references = []
    for reference in auto_map.values():
        references += reference if isinstance(reference, list) else [reference]
    return [reference for reference in references if isinstance(reference, str)]
