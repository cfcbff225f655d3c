"""Cache on disk of tokens, annotations and pages of a corpus.

    stream = Cache(folder).array([texts, tokenizer_json], lambda: encode(texts, tokenizer))

The name of a file is a hash of everything that its content depends on, so no file is out of date, and all may be deleted at
any time. A file ends with the SHA-256 of the bytes before it, and a damaged file is computed again. Unfinished files of killed
processes are removed by the next one.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from locks import lock
from transformers.utils import logging


logger = logging.get_logger(__name__)

DIGEST_SIZE = 32
UNFINISHED = ".heptapod-unfinished-"  # prefix of their names


class Cache:
    """A folder of files whose names are hashes of their inputs.

    Args:
        folder: the folder, created when needed. `None` turns the cache off.
        code: source files that compute the content; they are part of every hash.

    Raises:
        ValueError: naming `--cache_dir`, if the folder cannot be created.
    """

    def __init__(self, folder: str | os.PathLike | None, code: list[str | os.PathLike] = ()):
        self.folder = None
        if folder is not None:
            try:
                self.folder = Path(folder).expanduser()
                self.folder.mkdir(parents=True, exist_ok=True)
            except (OSError, RuntimeError) as error:  # RuntimeError: without a home folder
                raise ValueError(f"--cache_dir {folder} must be a folder that can be written to: {error}") from error
            self._clean()
        self.code = [Path(file).read_text(encoding="utf-8") for file in code]

    def array(self, made_of: list[str], make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array that `make()` returns, or a read-only memory map of an earlier one with the same inputs."""
        path = self._path(made_of, ".npy")
        if path is not None and _is_whole(path):
            return np.load(path, mmap_mode="r")
        array = make()
        is_kept = path is not None and self._write(path, lambda file: np.save(file, array))
        return np.load(path, mmap_mode="r") if is_kept else array

    def text(self, made_of: list[str], make: Callable[[], str]) -> str:
        """The same for a string."""
        path = self._path(made_of, ".txt")
        if path is not None and _is_whole(path):
            return path.read_bytes()[:-DIGEST_SIZE].decode()
        text = make()
        if path is not None:
            self._write(path, lambda file: file.write(text.encode()))
        return text

    def _path(self, made_of, ending):
        if self.folder is None:
            return None
        digest = hashlib.sha256()
        for part in (*self.code, *made_of):
            part = part.encode()
            digest.update(len(part).to_bytes(8, "big") + part)
        return self.folder / (digest.hexdigest()[:32] + ending)

    def _write(self, path, write):
        """Write a file atomically. Returns whether it exists: a full disk is no error."""
        file = None
        try:
            with tempfile.NamedTemporaryFile(prefix=UNFINISHED, dir=path.parent, delete=False) as file:
                lock(file)
                hashed = _Hashed(file)
                write(hashed)
                file.write(hashed.digest.digest())
                file.flush()
                os.replace(file.name, path)
        except OSError as error:
            if file is not None:
                Path(file.name).unlink(missing_ok=True)
            logger.warning_once(f"--cache_dir {self.folder}: {path.name} could not be kept there: {error}")
            return False
        return True

    def _clean(self):
        """Remove unfinished files whose writers have ended, so that their locks are free."""
        for path in self.folder.glob(f"{UNFINISHED}*"):
            try:
                with path.open("rb") as file:
                    lock(file)
                    path.unlink()
            except OSError:
                continue  # being written, or removed


class _Hashed:
    """A file whose written bytes update a digest."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content):
        self.digest.update(content)
        return self.file.write(content)


def _is_whole(path):
    """Returns whether a file ends with the digest of the bytes before it."""
    try:
        left, digest = path.stat().st_size - DIGEST_SIZE, hashlib.sha256()
        with path.open("rb") as file:
            while left > 0 and (piece := file.read(min(left, 2**20))):
                digest.update(piece)
                left -= len(piece)
            if file.read() == digest.digest():
                return True
    except FileNotFoundError:
        return False
    except OSError as error:
        logger.warning(f"--cache_dir: {path} cannot be read and is computed again: {error}")
        return False
    logger.warning(f"--cache_dir: {path} is damaged and is computed again")
    return False


def default_folder() -> str:
    """The folder below the user's cache folder (XDG)."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "heptapod", "training")
