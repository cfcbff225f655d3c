"""C source, compiled once per machine and loaded. Files that another user could have written are never loaded.

Libraries are cached in `$XDG_CACHE_HOME/heptapod` (`~/.cache/heptapod`), one for each source, set of flags, compiler and kind of
CPU. A file name ends in the checksum of the contents, so truncated and modified files are compiled again.
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
_ASK_SECONDS = 20  # for the macros of a compiler
_STALE_SECONDS = 3600  # age of folders that killed compilations left
_SCRATCH = "build-"


class BuildError(RuntimeError):
    """The reason for which a library could not be compiled."""


def find_compiler() -> str:
    """Path of `$CC`, `cc`, `gcc` or `clang`. Raises a `BuildError` if there is none."""
    names = (os.environ.get("CC") or "cc", "gcc", "clang")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None or os.name != "posix":
        raise BuildError("no C compiler was found")
    return compiler


def load_library(path: Path) -> ctypes.CDLL:
    """Load a library of `compile_library`. Raises an `OSError`, and removes the file, if the system cannot load it."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        raise


def compile_library(compiler: str, name: str, source: str, flags: list[str]) -> Path:
    """Compile C source for this CPU, unless the library is cached.

    Args:
        compiler (`str`): path of the C compiler.
        name (`str`): beginning of the file name.
        source (`str`): the C source.
        flags (`list[str]`): flags for the compiler.

    Returns:
        `Path`: path of the library.

    Raises:
        BuildError: if the compiler fails, is killed or takes too long.
        OSError: if the folder is not writable, belongs to another user or is writable by other users.
        RuntimeError: if there is no home directory.
    """
    tuning, macros = _for_this_cpu(compiler)
    about = (source, *flags, *tuning, macros, platform.system(), platform.machine(), *platform.libc_ver())
    stem = f"{name}_{hashlib.sha256(chr(10).join(about).encode()).hexdigest()[:16]}"
    folder = _folder()
    for path in folder.glob(f"{stem}_*.so"):
        with suppress(FileNotFoundError):  # another process removed it
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
        os.replace(built, path)  # atomic, also with other processes compiling
    with suppress(OSError):  # not all file systems support this for folders
        _to_disk(folder)
    return path


def _file_name(stem, contents):
    return f"{stem}_{hashlib.sha256(contents).hexdigest()}.so"


def _folder():
    """The folder of the libraries, which only this user can write to."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else Path.home() / ".cache") / "heptapod"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder, folder.stat())
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PermissionError(f"the file system of {folder} is mounted without permission to execute files")
    return folder


def _own_file(path):
    """Contents of a file that only this user can write to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise PermissionError(f"{path} is not a file")
        _check_owner(path, about)
        return file.read()


def _check_owner(path, about):
    if about.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user, who could replace the code")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} is writable by other users, who could replace the code: `chmod go-w {path}`")


def _clean(folder):
    """Remove folders that killed compilations left."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            if time.time() - scratch.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(scratch)


@cache
def _for_this_cpu(compiler):
    """Flags for the CPU of this machine, and the macros that the compiler defines with them: version and CPU features."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    for tuning in (["-march=native"] if x86 else ["-mcpu=native"], []):
        with suppress(BuildError):  # not all compilers support native
            macros = _run([compiler, *tuning, "-dM", "-E", "-x", "c", os.devnull], _ASK_SECONDS)
            return tuning + ["-mprefer-vector-width=512"] * ("__AVX512F__" in macros), macros
    raise BuildError(f"{compiler} is not a C compiler that lists its macros (-dM -E)")


def _run(command, seconds, scratch=None):
    """Output of a command, which is killed after `seconds` with all processes that it started."""
    environment = {**os.environ, "LC_ALL": "C"}
    if scratch is not None:
        environment["TMPDIR"] = scratch
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
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
