"""What a corpus was turned into, kept on disk so that the next start need not do it again.

    stream = Cache(folder).array([texts, tokenizer_json], lambda: encode(texts, tokenizer))

The name of a file is a hash of all that its content depends on, so nothing here is ever out of date: it may be deleted
at any time, and is never deleted by us.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Cache:
    """A folder of files that are named by what they were made of.

    Args:
        folder: where; made when needed. `None`: nothing is kept.
        code: source files whose content decides what is made, part of every name.

    Raises:
        ValueError: naming `--cache_dir` where there can be no such folder.
    """

    def __init__(self, folder: str | os.PathLike | None, code: list[str | os.PathLike] = ()):
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--cache_dir {folder} must be a folder that can be written to: {error}") from error
        self.code = [Path(file).read_text(encoding="utf-8") for file in code]

    def array(self, made_of: list[str], make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make()` returns, or returned when it was last made of the same; then mapped into memory, read-only."""
        path = self._path(made_of, ".npy")
        if path is None:
            return make()
        if not path.exists():
            array = make()
            self._write(path, lambda file: np.save(file, array))
        return np.load(path, mmap_mode="r")

    def text(self, made_of: list[str], make: Callable[[], str]) -> str:
        """The same for a string."""
        path = self._path(made_of, ".txt")
        if path is None:
            return make()
        if not path.exists():
            text = make()
            self._write(path, lambda file: file.write(text.encode()))
        return path.read_bytes().decode()

    def _path(self, made_of, ending):
        if self.folder is None:
            return None
        digest = hashlib.sha256()
        for part in (*self.code, *made_of):
            part = part.encode()
            digest.update(len(part).to_bytes(8, "big") + part)
        return self.folder / (digest.hexdigest()[:32] + ending)

    def _write(self, path, write):
        """In one go: whoever finds the file finds all of it."""
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            write(file)
        os.replace(file.name, path)


def default_folder() -> str:
    """Below the user's cache folder, as XDG names it."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "heptapod", "training")
