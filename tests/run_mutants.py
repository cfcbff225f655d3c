"""Plants the one-line defects of `mutations.toml`, each in a copy of the tree, and says which of them no test notices.

    python tests/run_mutants.py                          # all of them: make mutants
    python tests/run_mutants.py focus.py window          # those whose file, description or test holds one of the words
    python tests/run_mutants.py --sample 50 --seed 1     # fifty drawn at random
    python tests/run_mutants.py --shard 2/4              # the second of four parts, for four machines

An entry of the table is a `file`, `what` the defect is, the `old` text (once in the file), the `new` text and the `test`
that notices: an id, or the name of a function with all its parameters. An entry that nothing can notice, because it
changes nothing, says why in `survives`.

A mutant is *caught* when a test fails or the file cannot be imported, *timed out* when the test does not end, *survived*
when all passes, *stale* when its text or test is not there any more or the test fails without it, and *skipped* where
this machine skips the test. The exit status is 1 if one survived or is stale.

Each worker is a process that has imported the libraries once and forks for each mutant; the project itself is imported
after the fork, from the worker's copy of the tree.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "numpy torch torch.export transformers transformers.trainer transformers.pipelines transformers.generation "
    "transformers.models.gpt2.modeling_gpt2 transformers.models.auto.modeling_auto accelerate datasets peft matplotlib"
)
FIELDS = {"file", "what", "old", "new", "test", "survives"}
OUTCOMES = ("caught", "timed out", "survived", "stale", "skipped", "known to survive")


@dataclass(frozen=True)
class Mutation:
    file: str
    what: str
    old: str
    new: str
    test: str
    survives: str = ""

    @property
    def test_file(self):
        return self.test.split("::")[0]


def read_table(path):
    """The mutations of a TOML file. Raises ValueError for an entry with missing or unknown fields."""
    entries = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("mutation", [])
    for entry in entries:
        missing = FIELDS - {"survives"} - entry.keys()
        if missing or entry.keys() - FIELDS:
            raise ValueError(f"{path}: missing {sorted(missing)}, unknown {sorted(entry.keys() - FIELDS)} in {entry}")
    return [Mutation(**entry) for entry in entries]


def why_stale(mutation, root):
    """Why a mutation cannot be planted in the tree at `root`, or None."""
    path = Path(root) / mutation.file
    if not path.is_file():
        return "there is no such file"
    source = path.read_text(encoding="utf-8")
    count = source.count(mutation.old)
    if count != 1:
        return f"the old text is there {count} times"
    if mutation.old == mutation.new:
        return "old and new text are the same"
    if path.suffix == ".py":
        try:
            ast.parse(source.replace(mutation.old, mutation.new))
        except SyntaxError as error:
            return f"the new text is no Python: {error}"
    return None


def copy_tree(root, target):
    """Copies what git tracks or would track; without git, all files that are not hidden."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        names = sorted(set(listed.stdout.rstrip("\0").split("\0")))
    else:
        paths = (path.relative_to(root) for path in Path(root).rglob("*") if path.is_file())
        names = [str(path) for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)]
    for name in names:
        if (Path(root) / name).is_file():
            (Path(target) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(root) / name, Path(target) / name)
    # a commit of its own: evaluations and model cards name the commit of the tree that they run from
    author = ["-c", "user.name=mutants", "-c", "user.email=mutants@localhost", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "A copy"]):
        subprocess.run(["git", "-C", str(target), *author, *arguments], capture_output=True, check=False)


# ---------------------------------------------------------------------------------------------------------------------
# The worker: reads jobs as lines of JSON, forks for each, writes what became of the tests
# ---------------------------------------------------------------------------------------------------------------------


class _Chosen:
    """A pytest plugin that keeps the tests asked for and notes how they end.

    `compiled` is a folder of C libraries. Tests with a defect find those there that tests without one had compiled. A defect in
    a source makes another library, whose name is another one.
    """

    def __init__(self, tests, compiled, mutated):
        self.tests, self.outcomes, self.seconds, self.failed = tests, {}, {}, []
        self.compiled, self.mutated = compiled, mutated

    def pytest_sessionstart(self):
        if self.mutated:
            _copy_libraries(self.compiled, _library_folder())

    def pytest_sessionfinish(self):
        if not self.mutated:
            _copy_libraries(_library_folder(), self.compiled)

    def of(self, nodeid):
        return [test for test in self.tests if nodeid == test or nodeid.startswith((test + "[", test + "::"))]

    def pytest_collection_modifyitems(self, config, items):
        items[:] = [item for item in items if self.of(item.nodeid)]

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        for test in self.of(report.nodeid):
            before = self.outcomes.get(test)
            if report.failed or before == "failed":
                self.outcomes[test] = "failed"
            elif report.skipped:
                self.outcomes[test] = before or "skipped"
            elif report.when == "call":
                self.outcomes[test] = "passed"
            self.seconds[test] = self.seconds.get(test, 0) + report.duration


def _library_folder():
    return Path(os.environ["XDG_CACHE_HOME"], "heptapod")  # as tests/conftest.py has set it


def _copy_libraries(source, target):
    for library in source.glob("*.so"):
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = target / f"{library.name}.{os.getpid()}"
        shutil.copy2(library, part)
        part.replace(target / library.name)  # at once: workers share a folder


def _run_tests(tree, scratch, job):
    """In the forked process: runs the tests of a job in the copy and writes what became of them."""
    os.chdir(tree)
    given = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tree), *given])  # for the processes that tests start
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    if job["mutated"]:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
    import pytest

    chosen = _Chosen(job["tests"], scratch.parents[1] / "compiled", job["mutated"])
    files = sorted({test.split("::")[0] for test in job["tests"]})
    options = ["-q", "--tb=short", "-m", "", "-p", "no:cacheprovider", "--rootdir", str(tree)]
    status = pytest.main([*options, *(["-x"] if job["mutated"] else []), *files], plugins=[chosen])
    elsewhere = [name for name, module in list(sys.modules.items()) if _is_of_another_tree(name, module, Path(tree))]
    result = {"outcomes": chosen.outcomes, "seconds": chosen.seconds, "failed": chosen.failed}
    result.update(status=int(status), elsewhere=elsewhere)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def _is_of_another_tree(name, module, tree):
    """Whether a module has the name of one in the copy and is not that one: an installed version, for example."""
    path, file = tree.joinpath(*name.split(".")), getattr(module, "__file__", None)
    ours = (path / "__init__.py").is_file() or path.with_suffix(".py").is_file()
    return ours and file is not None and not Path(file).resolve().is_relative_to(tree)


def _fork(tree, scratch, job):
    """Runs a job in a process of its own and returns its result; None where it crashed, "timed out" where it hung."""
    shutil.rmtree(scratch, ignore_errors=True)
    for name in ("tmp", "home"):
        (scratch / name).mkdir(parents=True)
    job["result"] = str(scratch / "result.json")
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            log = os.open(scratch / "log", os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _run_tests(tree, scratch, job)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    end = time.monotonic() + job["timeout"]
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"timed_out": True}
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests left running
    log = (scratch / "log").read_text(errors="replace")[-4000:]
    if not Path(job["result"]).exists():
        return {"crashed": True, "log": log}
    return {**json.loads(Path(job["result"]).read_text(encoding="utf-8")), "log": log}


def work(tree, scratch, libraries):
    """Serves jobs from standard input. A job plants `old` -> `new` in `file`, if there is one, and runs `tests`."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.dont_write_bytecode = False
    for library in ["pytest", *libraries.split()]:
        with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(library)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()
    for number, line in enumerate(sys.stdin, 1):
        job = json.loads(line)
        path = tree / job["file"] if job["mutated"] else None
        if path:
            source, stat = path.read_text(encoding="utf-8"), path.stat()
            path.write_text(source.replace(job["old"], job["new"]), encoding="utf-8")
            # Compiled files are told apart by size and seconds of the time.
            os.utime(path, (stat.st_atime, stat.st_mtime + 10 * number))
        try:
            reply = _fork(tree, scratch, job)
        finally:
            if path:
                path.write_text(source, encoding="utf-8")
                os.utime(path, (stat.st_atime, stat.st_mtime))
        print(json.dumps(reply), file=replies, flush=True)


class _Worker:
    def __init__(self, root, folder, libraries):
        tree, scratch = folder / "tree", folder / "scratch"
        copy_tree(root, tree)
        if (root.parent / "shared").is_dir():  # data that some tests look for beside the project
            (folder / "shared").symlink_to(root.parent / "shared")
        home = str(scratch / "home")
        # What tests/conftest.py sets before transformers is imported, which reads it once.
        own = {"HF_HOME": home, "XDG_CACHE_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        own["TMPDIR"] = str(scratch / "tmp")
        command = [sys.executable, __file__, "--worker", str(tree), str(scratch), "--libraries", libraries]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **own}
        )

    def run(self, tests, timeout, mutation=None):
        job = {"tests": tests, "timeout": timeout, "mutated": mutation is not None}
        if mutation is not None:
            job.update(file=mutation.file, old=mutation.old, new=mutation.new)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError("a worker ended; its output is above")
        return json.loads(reply)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of each mutant
# ---------------------------------------------------------------------------------------------------------------------


def _judge(mutation, reply):
    if reply.get("timed_out"):
        return "timed out", ""
    if reply.get("crashed"):
        return "caught", "the process ended"
    if reply["outcomes"].get(mutation.test) == "failed":
        failed = reply["failed"][0]
        return "caught", "" if failed == mutation.test else f"by {failed}"
    if mutation.test not in reply["outcomes"]:
        return ("caught", "nothing could be collected") if reply["status"] != 5 else ("survived", "no test was left")
    return "survived", ""


def run(mutations, root, workers, libraries, timeout, report):
    """Yields each mutation with its outcome and a note: first those that are stale, then the others as they end."""
    root = Path(root).resolve()
    alive = []
    for mutation in mutations:
        reason = why_stale(mutation, root)
        if reason:
            yield mutation, "stale", reason
        else:
            alive.append(mutation)
    if not alive:
        return
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        idle = queue.SimpleQueue()
        pool = [_Worker(root, Path(folder).resolve() / str(i), libraries) for i in range(workers)]
        for worker in pool:
            idle.put(worker)

        def lend(job):
            worker = idle.get()
            try:
                return job(worker)
            finally:
                idle.put(worker)

        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            # Once without a defect, the tests of a file together.
            files = collections.defaultdict(set)
            for mutation in alive:
                files[mutation.test_file].add(mutation.test)
            whole = [
                threads.submit(
                    lend, functools.partial(_Worker.run, tests=sorted(tests), timeout=timeout + 60 * len(tests))
                )
                for tests in files.values()
            ]
            sound, seconds = {}, {}
            for i, (file, future) in enumerate(zip(files, whole), 1):
                reply = future.result()
                if reply.get("elsewhere"):
                    raise RuntimeError(f"{file} ran code that is not of the copy: {reply['elsewhere']}")
                sound.update(reply.get("outcomes", {}))
                seconds.update(reply.get("seconds", {}))
                report(f"[{i}/{len(whole)}] {file}: {len(files[file])} tests without a defect")
                if any(sound.get(test) not in ("passed", "skipped") for test in files[file]):
                    report(reply.get("log", ""))

            jobs = {}
            for mutation in alive:
                state = sound.get(mutation.test)
                if state == "passed":
                    limit = max(timeout, 10 * seconds[mutation.test])
                    job = functools.partial(_Worker.run, tests=[mutation.test], timeout=limit, mutation=mutation)
                    jobs[threads.submit(lend, job)] = mutation
                elif state == "skipped":
                    yield mutation, "skipped", "the test is skipped here"
                else:
                    note = "the test fails without the defect" if state else "the test is not collected"
                    yield mutation, "stale", note
            for job in concurrent.futures.as_completed(jobs):
                yield jobs[job], *_judge(jobs[job], job.result())
        for worker in pool:
            worker.close()


def choose(mutations, words=(), sample=None, seed=0, shard=None):
    """The mutations that an invocation asks for, in the table's order."""
    if words:
        mutations = [m for m in mutations if any(word in f"{m.file} {m.what} {m.test}" for word in words)]
    if sample is not None and sample < len(mutations):
        kept = set(random.Random(seed).sample(range(len(mutations)), sample))
        mutations = [m for i, m in enumerate(mutations) if i in kept]
    if shard is not None:
        part, parts = shard
        mutations = mutations[part - 1 :: parts]
    return mutations


def _shard(text):
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, got {text!r}")
    return int(part), int(parts)


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutations whose file, description or test holds one of these")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project, %(default)s")
    parser.add_argument("--table", type=Path, help="tests/mutations.toml of the project")
    parser.add_argument("--sample", type=_positive, metavar="N", help="only N, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, %(default)s")
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="only part I of N")
    parser.add_argument("-n", "--workers", type=_positive, default=os.cpu_count() or 1, help="processes, %(default)s")
    parser.add_argument("--timeout", type=_positive, default=180, help="seconds for a mutant, at least; %(default)s")
    parser.add_argument("--check", action="store_true", help="only look whether all texts are there; runs no test")
    parser.add_argument("--libraries", default=LIBRARIES, help="imported once, before the forks")
    parser.add_argument("--worker", nargs=2, type=Path, metavar=("TREE", "SCRATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(*options.worker, options.libraries)

    table = options.table or options.root / "tests" / "mutations.toml"
    mutations = choose(read_table(table), options.words, options.sample, options.seed, options.shard)
    if not mutations:
        parser.error("no mutation of the table is asked for")
    counts = collections.defaultdict(collections.Counter)
    begin = time.monotonic()
    if options.check:
        reasons = ((mutation, why_stale(mutation, options.root)) for mutation in mutations)
        results = ((mutation, "stale", reason) for mutation, reason in reasons if reason)
    else:
        workers = min(options.workers, len(mutations))
        results = run(
            mutations, options.root, workers, options.libraries, options.timeout, functools.partial(print, flush=True)
        )
    for i, (mutation, outcome, note) in enumerate(results, 1):
        if mutation.survives and outcome == "survived":
            outcome, note = "known to survive", mutation.survives
        elif mutation.survives and outcome in ("caught", "timed out"):
            outcome, note = "stale", "it is caught, though the table says that it survives"
        counts[mutation.file][outcome] += 1
        line = f"[{i}/{len(mutations)}] {outcome}: {mutation.file}: {mutation.what} ({mutation.test})"
        print(line + (f": {note}" if note else ""), flush=True)
    if options.check:
        print(f"{len(mutations)} mutations, {sum(c['stale'] for c in counts.values())} stale")
        return int(bool(counts))
    return int(print_table(counts, time.monotonic() - begin))


def print_table(counts, seconds):
    """Prints the outcomes by file; returns whether one survived or is stale."""
    total = sum(counts.values(), collections.Counter())
    width = max(len(file) for file in counts)
    print("\n" + " | ".join(["file".ljust(width), *OUTCOMES]))
    for file in [*sorted(counts), ""]:
        row = counts[file] if file else total
        cells = (str(row[outcome]).rjust(len(outcome)) for outcome in OUTCOMES)
        print(" | ".join([(file or "total").ljust(width), *cells]))
    caught = total["caught"] + total["timed out"]
    judged = caught + total["survived"]
    print(f"{caught} of {judged} caught ({caught / max(judged, 1):.1%}) in {seconds / 60:.1f} minutes")
    return bool(total["survived"] or total["stale"])


if __name__ == "__main__":
    sys.exit(main())
