"""C source, compiled once a machine and loaded; nothing is loaded that another user could have written.

Libraries are kept in `$XDG_CACHE_HOME/heptapod` (`~/.cache/heptapod`), one for each source, set of flags, compiler and kind of
CPU. A file's name ends in the checksum of its contents: one that was cut short or changed is built again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path


_COMPILE_SECONDS = 180
_ASK_SECONDS = 20  # a compiler about itself
_STALE_SECONDS = 3600  # what a compile that was killed left behind
_SCRATCH = "build-"


class BuildError(RuntimeError):
    """There is no library, and why."""


def find_compiler() -> str:
    """Path of `$CC`, `cc`, `gcc` or `clang`. Raises a `BuildError` where there is none."""
    names = (os.environ.get("CC") or "cc", "gcc", "clang")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None or os.name != "posix":
        raise BuildError("no C compiler was found")
    return compiler


def load_library(path: Path) -> ctypes.CDLL:
    """The library of `compile_library`. Raises an `OSError`, and removes the file, where the system cannot load it."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        raise


def compile_library(compiler: str, name: str, source: str, flags: list[str]) -> Path:
    """Compile C source for this CPU, unless that was done before.

    Args:
        compiler (`str`): path of the C compiler.
        name (`str`): what the file's name begins with.
        source (`str`): the C source.
        flags (`list[str]`): for the compiler.

    Returns:
        `Path`: of the library.

    Raises:
        BuildError: where the compiler fails, is killed or takes too long.
        OSError: where the folder cannot be written to, or belongs to others or may be written to by others.
        RuntimeError: where there is no home directory.
    """
    tuning, macros = _for_this_cpu(compiler)
    about = (source, *flags, *tuning, macros, platform.system(), platform.machine(), *platform.libc_ver())
    stem = f"{name}_{hashlib.sha256(chr(10).join(about).encode()).hexdigest()[:16]}"
    folder = _folder()
    for path in folder.glob(f"{stem}_*.so"):
        with suppress(FileNotFoundError):  # another process has just removed it
            if path.name == _file_name(stem, _own_file(path)):
                return path
            path.unlink()
    _clean(folder)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
        written, built = Path(scratch, f"{name}.c"), Path(scratch, f"{name}.so")
        written.write_text(source, encoding="utf-8")
        _run([compiler, *flags, *tuning, str(written), "-o", str(built), "-lm"], _COMPILE_SECONDS, scratch)
        built.chmod(0o600)
        _to_disk(built)
        path = folder / _file_name(stem, built.read_bytes())
        os.replace(built, path)  # whole or not at all, whoever else is compiling
    with suppress(OSError):  # not every file system can do this with a folder
        _to_disk(folder)
    return path


def _file_name(stem, contents):
    return f"{stem}_{hashlib.sha256(contents).hexdigest()}.so"


def _folder():
    """Where libraries are, this user's alone."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else Path.home() / ".cache") / "heptapod"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder, folder.stat())
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PermissionError(f"nothing may be executed from {folder}, its file system says")
    return folder


def _own_file(path):
    """Contents of a file of this user's alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise PermissionError(f"{path} is no file")
        _check_owner(path, about)
        return file.read()


def _check_owner(path, about):
    if about.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user, who could put other code there")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {path}, and put other code there: `chmod go-w {path}`")


def _clean(folder):
    """Remove what compiles left behind that were killed."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            if time.time() - scratch.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(scratch)


@cache
def _for_this_cpu(compiler):
    """Flags for this very CPU, and the macros that the compiler defines with them: its version, what the CPU can do."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    for tuning in (["-march=native"] if x86 else ["-mcpu=native"], []):
        with suppress(BuildError):  # native is not known everywhere
            macros = _run([compiler, *tuning, "-dM", "-E", "-x", "c", os.devnull], _ASK_SECONDS)
            return tuning + ["-mprefer-vector-width=512"] * ("__AVX512F__" in macros), macros
    raise BuildError(f"{compiler} is no C compiler that says what it defines (-dM -E)")


def _run(command, seconds, scratch=None):
    """Output of a command, which is ended after `seconds`, and whatever it started with it."""
    environment = {**os.environ, "LC_ALL": "C"}
    if scratch is not None:
        environment["TMPDIR"] = scratch
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"{command[0]} took longer than {seconds} seconds") from error
            raise
    if process.returncode:
        text = errors.decode(errors="replace").strip()[-2000:]
        raise BuildError(f"{command[0]} failed with exit code {process.returncode}: {text}")
    return out.decode(errors="replace")


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["BuildError", "compile_library", "find_compiler", "load_library"]
