"""Reports failures as they happen, and lets no broken CUDA context fail the tests after it."""

import os
import sys
from pathlib import Path

import pytest
import torch


class FailuresAtOnce:
    """Prints each failure when it comes: a run that is cut off has told why."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed and "tests/gpu/" in report.nodeid:
            self.terminal.write_line(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-3000:]}")


@pytest.hookimpl(trylast=True)  # after the terminal's reporter
def pytest_configure(config):
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(terminal))


def pytest_collection_modifyitems(items):
    """Compiled steps first, since they take longest; then what is likeliest to fail; whole models of base size last."""
    here = Path(__file__).parent
    if not all(item.path.is_relative_to(here) for item in items):
        return
    order = ("compiled", "low_precision", "head_dims", "options", "static_cache", "generation")
    ranks = {name: rank for rank, name in enumerate(order)}

    def rank(item):
        if "base_configuration" in item.name:
            return len(order) + 1
        return min((ranks[name] for name in order if name in item.name), default=len(order))

    items.sort(key=rank)


def context_is_broken() -> bool:
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an illegal address every call of the process fails: xdist replaces its worker, without xdist the run ends."""
    report = yield
    if call.excinfo is not None and context_is_broken():
        text = f"{item.nodeid} broke the CUDA context\n{report.longreprtext[-3000:]}"
        if hasattr(item.config, "workerinput"):
            print(text, file=sys.stderr, flush=True)
            os._exit(1)
        pytest.exit(text, returncode=1)
    return report
