"""Checkpoints that are checked for completeness and for the settings of their run.

A checkpoint is a folder that `Trainer` writes file by file. `run.json` is written first: a resumed run compares its settings
with it. `checksums.json` is written last: it shows that no file is missing or damaged.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from locks import fcntl, lock
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

RUN, CHECKSUMS = "run.json", "checksums.json"
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0")  # of one process, and of FSDP's two formats
ONLY_MODEL = ", as with --save_only_model"


class WholeCheckpoints:
    """Mixin before `Trainer`: writes both files into each checkpoint.

    Attributes:
        describe_run (`Callable[[], dict]` or `None`): returns the content of `run.json`, called at each checkpoint.
    """

    describe_run: Callable[[], dict] | None = None

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote it
            folder.mkdir(parents=True)
            if self.describe_run is not None:
                (folder / RUN).write_text(json.dumps(self.describe_run(), indent=2) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            write_checksums(folder)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # Next come the trainer's state and the deletion of older checkpoints, after all processes have written their files.
        self.accelerator.wait_for_everyone()


def write_checksums(folder: Path) -> None:
    """Write `checksums.json`: size and SHA-256 of each file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    found = {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files}
    unfinished = folder / f"{CHECKSUMS}.unfinished"
    unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(folder / CHECKSUMS)


def _digest(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def damage_of(folder: Path, num_processes: int = 1) -> str | None:
    """A description of what is missing or damaged in a checkpoint; `None` for a complete one.

    Args:
        folder: the checkpoint.
        num_processes: number of processes that wrote it, used if the checkpoint does not contain it.
    """
    if (folder / CHECKSUMS).is_file():
        try:
            listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
            for name, (size, digest) in listed.items():
                path = folder / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != size:
                    return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
                if _digest(path) != digest:
                    return f"{name} is not what was saved"
        except (OSError, ValueError, TypeError, AttributeError) as error:
            return f"{CHECKSUMS} is damaged: {error}"
    return _damage_by_structure(folder, num_processes)


def _damage_by_structure(folder, num_processes):
    """Missing and truncated files, the only damage that is visible without checksums."""
    if folder.exists() and not folder.is_dir():
        return "it is no folder"
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if not all(isinstance(state[name], int) for name in ("global_step", "max_steps")):
            return "trainer_state.json has no steps"
        num_processes = read_run(folder).get("processes", num_processes)
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"trainer_state.json, config.json or {RUN} is damaged: {error}"
    if (folder / "latest").is_file():  # DeepSpeed's, which checks its own
        return None
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*")):
        return "model.safetensors is missing"
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} is damaged: {error}"
    ranks = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]
    wanted = [OPTIMIZER, ("scheduler.pt",), *((name,) for name in ranks)]
    missing = [names[0] for names in wanted if not any((folder / name).exists() for name in names)]
    if missing:
        return f"{missing[0]} is missing" + (ONLY_MODEL if len(missing) == len(wanted) else "")
    for path in [*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]:
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut off or empty"
    return None


def read_run(folder: Path) -> dict:
    """Content of `run.json` in a checkpoint; empty if there is none.

    Raises:
        ValueError: for content of another form.
    """
    path = folder / RUN
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(run, dict) or (run and not {"settings", "length", "processes"} <= run.keys()):
        raise ValueError(f"{path} must hold `settings`, `length` and `processes`")
    return run


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The numbered checkpoints in a folder, complete or not, the last one first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path).isdecimal()]
    return sorted(found, key=lambda path: int(step_of(path)), reverse=True)


def step_of(checkpoint: Path) -> str:
    """The number in `checkpoint-<number>`."""
    return checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def find_checkpoint(resume_from: str, output_dir: str, num_processes: int = 1) -> str | None:
    """The folder to resume from: `resume_from` itself, or the last complete checkpoint if it is "last".

    A warning lists skipped checkpoints. Without any complete one a warning is given and `None` is returned: the run starts from the
    beginning, as after a kill before the first checkpoint was complete.

    Raises:
        ValueError: naming `--resume_from_checkpoint`, for a given checkpoint that is damaged or does not exist, and for a
            folder that holds models without training state only.
    """
    if resume_from != "last":
        damage = damage_of(Path(resume_from), num_processes)
        if damage is not None:
            raise ValueError(f"--resume_from_checkpoint {resume_from} is not a complete checkpoint: {damage}")
        return resume_from
    for folder in checkpoints_in(output_dir):
        damage = damage_of(folder, num_processes)
        if damage is None:
            return str(folder)
        if damage.endswith(ONLY_MODEL):
            raise ValueError(f"--resume_from_checkpoint last: {folder} cannot be resumed: {damage}")
        logger.warning(f"--resume_from_checkpoint last: {folder} is not complete and is skipped: {damage}")
    logger.warning(
        f"--resume_from_checkpoint last: there is no complete checkpoint in {output_dir}, so training starts from the beginning"
    )
    return None


def check_begins_alone(output_dir: str, checkpoint: str | None, num_processes: int = 1) -> None:
    """Check that a folder holds no complete checkpoint of another run.

    Files and links with the names of new checkpoints are errors as well.

    Raises:
        ValueError: naming `--output_dir`.
    """
    for path in checkpoints_in(output_dir):
        if path.is_symlink() or not path.is_dir():
            raise ValueError(
                f"--output_dir {output_dir}: {path.name} is a file or a link, where a checkpoint may have to be written: remove it, "
                "or give another folder"
            )
    if checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve():
        return
    for folder in checkpoints_in(output_dir):
        damage = damage_of(folder, num_processes)
        if damage is None or damage.endswith(ONLY_MODEL):
            raise ValueError(
                f"--output_dir {output_dir} holds {folder.name} of another run: resume that run with --resume_from_checkpoint last, "
                "or give another folder"
            )
        logger.warning(f"--output_dir: {folder} is not a complete checkpoint and is ignored: {damage}")


_locked = set()  # descriptors of folders


def _let_go():
    while _locked:
        os.close(_locked.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)  # workers of a data loader may outlive a killed run


@contextmanager
def alone_in(output_dir: str) -> Iterator[None]:
    """Context manager that locks a folder against other runs. The lock ends with the process, also when it is killed.

    Forked processes do not hold it.

    Raises:
        ValueError: naming `--output_dir`, if another run holds the lock.
    """
    folder = os.open(output_dir, os.O_RDONLY) if fcntl is not None else None
    try:
        if folder is not None:
            _locked.add(folder)
            _lock(folder, output_dir)
        yield
    finally:
        if folder in _locked:
            _locked.remove(folder)
            os.close(folder)


def _lock(folder, output_dir):
    try:
        lock(folder)
    except BlockingIOError as error:
        raise ValueError(
            f"--output_dir {output_dir}: another run writes into it; wait for its end, or give another folder"
        ) from error
    except OSError as error:  # not every file system has locks
        logger.warning(f"--output_dir {output_dir}: a second run in it would not be noticed: {error}")


def check_same_run(checkpoint: str, run: dict, is_last: bool) -> None:
    """Check that a resumed run has the settings of the run that saved the checkpoint.

    Args:
        checkpoint: the checkpoint to resume.
        run: `settings`, `length`, `processes` and `sharded` of the resumed run.
        is_last: whether it was given as "last". A checkpoint given by its path may have another number of processes.

    Raises:
        ValueError: naming `--resume_from_checkpoint` and each setting that differs.
    """
    saved, name = read_run(Path(checkpoint)), f"--resume_from_checkpoint {checkpoint}"
    sharded = saved.get("sharded", any(Path(checkpoint).glob("pytorch_model_fsdp*")))
    if sharded != run["sharded"]:
        way = "with" if sharded else "without"
        raise ValueError(
            f"{name} was saved {way} --fsdp, which lays weights and optimizer out in another way: resume it {way} --fsdp"
        )
    if not saved:
        logger.warning(f"{name} has no record of its settings: only its model and its length are compared")
        return
    if is_last and saved["processes"] != run["processes"]:
        raise ValueError(
            f"{name} was saved by {saved['processes']} processes, and here are {run['processes']}: where that is meant, give this "
            "folder in place of `last`"
        )
    differ = [
        f"{option}: {saved['settings'].get(option)!r} there, {value!r} here"
        for option, value in run["settings"].items()
        if saved["settings"].get(option, value) != value  # another version may lack an option
    ]
    # --max_steps is compared with the schedule; --num_train_epochs has a default, so it may not have been given.
    is_asked = "--max_steps" not in run["length"] and (
        "--num_train_epochs" not in run["length"] or "--num_train_epochs" in saved["length"]
    )
    if is_asked and run["length"] != saved["length"]:
        there, here = (" ".join(map(str, *length.items())) for length in (saved["length"], run["length"]))
        differ.append(f"its length: {there} there, {here} here")
    if differ:
        raise ValueError(
            f"{name} is of a run with other settings; {'; '.join(differ)}. Give what it was trained with, or begin a new run in "
            "another --output_dir"
        )
