"""Loading of saved models: checks of their files, and permission to run the code that they bring."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

import argument_checks  # noqa: F401  before transformers, see there
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
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of configs, generation configs and tokenizers
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TRUST_HELP = "run code from the Hub on this machine; not needed for a folder that train.py wrote"


def add_model_arguments(parser, name: str = "folder", **options) -> None:
    """Add the arguments for `may_run_code`."""
    parser.add_argument(name, help="a folder that train.py wrote, or a name on the Hub", **options)
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)


def read_json(path: Path) -> dict:
    """Content of a JSON file with an object.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file that cannot be read, is damaged, or holds no object; the message contains its name.
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
    """State dict in a file of safetensors or of `torch.save`.

    Raises:
        ValueError: for a file that holds no state dict or is damaged; the message contains its name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle may raise anything
        raise ValueError(f"{path} holds no weights, or is damaged: {error!r}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
    ):
        raise ValueError(f"{path} holds no weights: it must hold tensors by their names, as of `model.state_dict()`")
    return weights


def check_family(name: str, families: Collection[str] = (), but: Collection[str] = ()) -> None:
    """Check that a model is of one of the families, or of none of `but`.

    Raises:
        ValueError: naming the script for its family.
    """
    family = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if (families and family not in families) or family in but:
        script = SHOWN_BY.get(family)
        other = f", for which there is training/{script}" if script else f"; this script is for {', '.join(families)}"
        raise ValueError(f"{name} holds a {family}{other}")


def how_to_make(name: str) -> str:
    """The command that creates a folder of this name."""
    demo = DEMO.fullmatch(name)
    if demo is not None:
        return "`make demo` makes it" if demo[1] == "leap" else f"`make demo FAMILY={demo[1]}` makes it"
    if name.rstrip("/") == "outputs/leap-judge":
        return "`make judge` makes it"
    return f"`python training/train.py --config_name configs/leap-tiny --output_dir {name}` makes one"


def check_folder(folder: str | os.PathLike) -> None:
    """Check that a folder exists, holds a model, and that its files are not damaged.

    Raises:
        ValueError: naming the command that creates the folder, or the damaged file.
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
    """Check a folder. A name that may be one on the Hub is not checked.

    Raises:
        ValueError: naming the command that creates the folder.
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
        ValueError: unless exactly one of them is given, for a missing model, and for a configuration with weights.
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
    """Load the processor of a saved model, or its tokenizer in families without a processor."""
    auto_class = AutoProcessor if model_type in ("heptapod", "multigrid") else AutoTokenizer
    return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code)


def may_run_code(name: str, trust_remote_code: bool = False, **options) -> bool:
    """Returns whether the code that a model brings may run: that of a folder, or with `trust_remote_code`.

    Args:
        name: a folder, or a name on the Hub.
        trust_remote_code: permission of the user.
        options: options for reading the config of a name on the Hub, as `revision`.

    Raises:
        ValueError: for a missing model, and for one that needs code without the permission to run it.
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
    """Other repositories and folders from which the code of a folder, or the model of an adapter in it, is loaded."""
    return _code_from_elsewhere(folder) + _model_from_elsewhere(folder)


def _code_from_elsewhere(folder):
    """Repositories of the Hub in the configs of a folder, given as `name--module.Class`."""
    names = set()
    for path in folder.glob("*config.json"):
        for reference in references_of(path):
            if "--" in reference:
                names.add(f"{reference.split('--')[0]} on the Hub")
    return sorted(names)


def _model_from_elsewhere(folder):
    """The base model of an adapter in a folder, which may bring code."""
    if not (folder / "adapter_config.json").is_file():
        return []
    name = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    return [] if Path(name).resolve() == folder.resolve() else [name]


def references_of(path: Path) -> list[str]:
    """The classes in the `auto_map` of a config as `module.Class`, slow and fast tokenizers included.

    Raises:
        ValueError: for a damaged file; the message contains its name.
    """
    auto_map = read_json(path).get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise ValueError(f"{path} is damaged: `auto_map` must hold names and classes, got {auto_map}")
    references = []
    for reference in auto_map.values():
        references += reference if isinstance(reference, list) else [reference]
    return [reference for reference in references if isinstance(reference, str)]
