"""Text files of a folder."""

import bz2
import gzip
import os
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Installed packages, tests and generated documentation are not the library's source.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "pydoc_data", "__pycache__"}


def _is_stdlib_source(path: Path) -> bool:
    # _sysconfigdata contains paths of the machine that built this Python
    return path.suffix == ".py" and not NOT_STDLIB & set(path.parts) and not path.name.startswith("_sysconfigdata")


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def read_file(path: Path) -> str | None:
    """The decompressed text of a file with unchanged line ends; None if it is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--dataset_name: {path} cannot be read: {error}") from error
    unpack = {".gz": gzip.decompress, ".bz2": bz2.decompress}.get(path.suffix, bytes)
    try:
        text = unpack(data).decode("utf-8")
    except (OSError, EOFError, ValueError):  # errors of gzip, bz2 and decode for other content
        return None
    return None if "\0" in text else text


def folder_files(folder: Path, is_stdlib: bool) -> list[str]:
    """Sorted relative paths of files below a folder that may be text: those that are not hidden, or the library's source."""
    wanted, left_out = (_is_stdlib_source, NOT_STDLIB) if is_stdlib else (_is_visible, set())
    names = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]  # not read at all
        here = Path(where).relative_to(folder)
        linked = [name for name in folders if os.path.islink(os.path.join(where, name)) and _is_visible(here / name)]
        if linked and not is_stdlib:  # links may form cycles, or lead to the same text
            logger.warning(f"--dataset_name {folder}: links to folders are left out, e.g. {here / linked[0]}")
        names += [here / name for name in files if wanted(here / name) and (folder / here / name).is_file()]
    return [name.as_posix() for name in sorted(names)]


def read_folder(folder: Path, dataset: str) -> dict[str, str]:
    """All text files below a folder as {relative path: text}, sorted by path, without empty files."""
    names = folder_files(folder, dataset == "stdlib")
    texts = {name: read_file(folder / name) for name in tqdm(names, desc="Reading", unit=" files", disable=None)}
    skipped = [name for name, text in texts.items() if text is None]
    if skipped and len(skipped) == len(texts):
        raise ValueError(
            f"--dataset_name {dataset} is not text: none of its {len(skipped)} files is UTF-8, e.g. {skipped[0]}"
        )
    if skipped:
        logger.warning(
            f"--dataset_name {dataset}: left out {len(skipped)} files that are not UTF-8 text, e.g. {skipped[0]}"
        )
    return {name: text for name, text in texts.items() if text}
