"""Compiled libraries: kept whole and this user's alone, built again where they are not, and torch where there are none."""

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modeling_heptapod.common import cpu_kernels, native_library
from modeling_heptapod.common.native_library import BuildError, compile_library, find_compiler, load_library
from modeling_heptapod.heptapod import local_attention_cpu, local_attention_operator
from modeling_heptapod.heptapod.local_attention import local_attention, naive_local_attention
from modeling_heptapod.hierarchical_lm import windowed_attention_cpu, windowed_attention_operator
from modeling_heptapod.leap import focus_cpu
from modeling_heptapod.leap.focus import FocusSettings, focus_mixing, naive_focus_mixing


SOURCE = "int answer(void) { return 42; }\n"
FLAGS = ["-shared", "-fPIC"]


@pytest.fixture
def compiler():
    try:
        return find_compiler()
    except BuildError:
        pytest.skip("there is no C compiler")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where libraries of a test are kept; they are wanted, whatever the environment says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HEPTAPOD_NATIVE", raising=False)
    return tmp_path / "cache" / "heptapod"


def build(compiler, source=SOURCE):
    return compile_library(compiler, "answer", source, FLAGS)


def script(path, text):
    path.write_bytes(b"#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_a_library_is_compiled_once(compiler, folder):
    before = os.umask(0)
    try:
        path = build(compiler)
    finally:
        os.umask(before)
    assert load_library(path).answer() == 42
    assert list(folder.iterdir()) == [path]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600
    written = path.stat().st_mtime_ns, path.stat().st_ino
    assert build(compiler) == path and (path.stat().st_mtime_ns, path.stat().st_ino) == written
    assert build(compiler, SOURCE.replace("42", "43")) != path


@pytest.mark.parametrize(
    "harm",
    [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: x[:-1] + bytes([x[-1] ^ 1]), lambda x: x + b"\0"],
    ids=["cut short", "empty", "one bit", "longer"],
)
def test_a_library_that_is_not_whole_is_built_again(compiler, folder, harm):
    """Loading one that was cut short ended the process, each time."""
    path = build(compiler)
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    again = build(compiler)
    assert load_library(again).answer() == 42
    assert list(folder.iterdir()) == [again]


def test_the_kind_of_cpu_is_part_of_the_name(compiler, folder, monkeypatch):
    path = build(compiler)
    flags, macros = native_library._for_this_cpu(compiler)
    monkeypatch.setattr(native_library, "_for_this_cpu", lambda _: (flags, macros + "#define __NEWER_CPU__ 1\n"))
    assert build(compiler) != path


def test_it_does_not_take_proc_to_know_the_cpu(compiler, monkeypatch):
    """The compiler says what `native` means; a machine that it does not know gets code without it."""
    _, macros = native_library._for_this_cpu(compiler)
    assert "__VERSION__" in macros
    picky = ["for a in $@; do case $a in *=native) exit 1;; esac; done", f'exec {compiler} "$@"']
    old = script(Path(os.environ["XDG_CACHE_HOME"]).with_name("picky"), "\n".join(picky).encode())
    assert native_library._for_this_cpu(old)[0] == []
    assert load_library(build(old)).answer() == 42


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_may_write_to_is_refused(compiler, folder, what):
    path = build(compiler)
    for mode in (0o770, 0o702):
        (folder if what == "folder" else path).chmod(mode)
        with pytest.raises(PermissionError, match="writable by other users.*chmod go-w"):
            build(compiler)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_others_is_refused(compiler, folder, what, monkeypatch):
    path, check = build(compiler), native_library._check_owner
    theirs = folder if what == "folder" else path

    def as_another_user(place, about):
        monkeypatch.setattr(os, "geteuid", lambda: about.st_uid + (place == theirs))
        check(place, about)

    monkeypatch.setattr(native_library, "_check_owner", as_another_user)
    with pytest.raises(PermissionError, match=f"{theirs.name} belongs to another user"):
        build(compiler)


def test_a_link_is_refused(compiler, folder, tmp_path):
    path = build(compiler)
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(OSError):
        build(compiler)


def test_what_cannot_be_loaded_is_not_kept(folder):
    folder.mkdir(parents=True)
    path = folder / "no_library.so"
    path.write_text("no library")
    with pytest.raises(OSError):
        load_library(path)
    assert not path.exists()


def test_remains_of_killed_compiles_are_removed(compiler, folder):
    folder.mkdir(parents=True, mode=0o700)
    old, new = folder / "build-old", folder / "build-new"
    for scratch in (old, new):
        scratch.mkdir()
        (scratch / "focus.c").write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    build(compiler)
    assert not old.exists() and new.exists()


def test_processes_may_compile_at_once(compiler, folder):
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("native_library", {native_library.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.load_library(module.compile_library({compiler!r}, "answer", {SOURCE!r}, {FLAGS!r})).answer() == 42
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert all(path.suffix == ".so" for path in folder.iterdir())


def test_a_compiler_that_speaks_another_encoding(compiler, tmp_path):
    """Its version is not UTF-8, nor are its warnings."""
    foreign = script(tmp_path / "cc", b"echo 'gcc d\xe9j\xe0' >&2\nexec " + os.fsencode(compiler) + b' "$@"\n')
    assert load_library(build(foreign)).answer() == 42
    broken = script(tmp_path / "broken", b"case $* in *-dM*) exit 0;; esac\necho 'erreur: d\xe9j\xe0' >&2\nexit 3\n")
    with pytest.raises(BuildError, match="exit code 3: erreur: d"):
        build(broken)


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(native_library, "_COMPILE_SECONDS", 0.5)
    note = tmp_path / "pid"
    hanging = script(
        tmp_path / "cc", f"case $* in *-dM*) exit 0;; esac\nsleep 300 & echo $! > {note}; wait\n".encode()
    )
    began = time.time()
    with pytest.raises(BuildError, match="took longer than 0.5 seconds"):
        build(hanging)
    assert time.time() - began < 60
    child = int(note.read_text(encoding="utf-8"))
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":  # nobody waits for it any more
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the compiler's child lives")


BROKEN = {
    "switched off": None,
    "no compiler": "no C compiler was found",
    "a compiler that fails": "failed with exit code 1: broken",
    "a compiler that is killed": "failed with exit code -9",
    "a compiler that writes nothing": "No such file",
    "a compiler that writes no library": "file too short|invalid ELF|not a mach-o",
    "a file for a folder": "Not a directory",
    "a read-only file system": "Read-only file system",
    "no home": "home directory",
    "a folder of others": "writable by other users",
}


@pytest.mark.parametrize("how", BROKEN)
def test_without_a_library_torch_does_it(how, monkeypatch, tmp_path, folder, caplog, request):
    """With one warning that says why, whatever sizes are asked for."""
    if "compiler" not in how and how != "switched off":
        request.getfixturevalue("compiler")
    answers = b"case $* in *-dM*) exit 0;; esac\n"
    scripts = {
        "a compiler that fails": b"echo broken >&2\nexit 1\n",
        "a compiler that is killed": b"kill -9 $$\n",
        "a compiler that writes nothing": b"exit 0\n",
        "a compiler that writes no library": b'while [ "$1" != -o ]; do shift; done\necho no > $2\n',
    }
    if how == "switched off":
        monkeypatch.setenv("HEPTAPOD_NATIVE", "0")
    elif how == "no compiler":
        monkeypatch.setattr(native_library.shutil, "which", lambda name: None)
    elif how in scripts:
        monkeypatch.setenv("CC", script(tmp_path / "cc", answers + scripts[how]))
    elif how == "a file for a folder":
        monkeypatch.setenv("XDG_CACHE_HOME", script(tmp_path / "file", b""))
    elif how == "no home":
        for name in ("HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    elif how == "a folder of others":
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    else:

        def mkdir(*_, **__):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", mkdir)
    for module in (focus_cpu, local_attention_cpu, windowed_attention_cpu):
        monkeypatch.setattr(module, "_library", module._library.__wrapped__)
    monkeypatch.setattr(cpu_kernels, "_missing", set())
    monkeypatch.setattr(logging.getLogger("modeling_heptapod"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        for head_dim in (4, 6):
            mix_in_torch(head_dim)
            attend_in_torch(head_dim)
            assert not windowed_attention_operator.has_kernel(torch.zeros(1, 5, 2, head_dim), 3)
    if BROKEN[how] is None:
        assert not caplog.records
        return
    for record, what in zip(caplog.records, ("LEAP's mixing", "Local attention", "Windowed attention"), strict=True):
        assert record.message.startswith(f"{what} runs in torch, which is slower")
        assert any(reason in record.message for reason in BROKEN[how].split("|")), record.message


def mix_in_torch(head_dim):
    settings, qfkv = FocusSettings(scale=0.7, window=4), torch.randn(1, 10, 4, 2, head_dim)
    assert not focus_cpu.is_supported(qfkv, settings)
    out, _ = focus_mixing(qfkv, settings)
    torch.testing.assert_close(out, naive_focus_mixing(qfkv, settings), rtol=1e-5, atol=1e-5)


def attend_in_torch(head_dim):
    q, k, v = torch.randn(3, 1, 2, 5, 6, head_dim)
    assert not local_attention_operator.has_kernel(q, 1)
    torch.testing.assert_close(local_attention(q, k, v, 1), naive_local_attention(q, k, v, 1), rtol=1e-5, atol=1e-5)


def test_the_mixing_step_is_compiled_again_where_it_is_not_whole(compiler, folder):
    path = cpu_kernels.compile_kernels(compiler, "focus", focus_cpu.SOURCE, [*cpu_kernels.FLAGS, "-DHEAD_DIM=2"])
    os.truncate(path, path.stat().st_size // 2)
    assert focus_cpu._library.__wrapped__(2) is not None
    assert [file.stat().st_size > 10_000 for file in folder.iterdir()] == [True]
