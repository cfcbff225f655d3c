"""Every test starts from the same seeds, sees NaN in memory that nobody wrote, and cannot reach the network."""

import logging
import os
import socket
import tempfile


# Before torch is imported, which reads it once. Tiny tensors gain nothing from a second thread, a busy machine makes threads
# wait for each other, and the last bits of a sum depend on their number: processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before transformers is imported: it reads both once. Modules of remote code and compiled C go to a folder of
# this run's own; workers share the compiled C.
_CACHE = tempfile.TemporaryDirectory(prefix="heptapod-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _CACHE.name
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = _CACHE.name

# Transformers imports torchao, which warns of kernels for other devices and registers classes in a way that torch warns of.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

import pytest
import torch
from transformers import set_seed


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
_connect = socket.socket.connect


def _connect_to_this_machine_only(self, address):
    host = address[0] if isinstance(address, tuple) else None
    if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
        raise PermissionError(f"tests must not use the network, tried to reach {address}")
    return _connect(self, address)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _connect_to_this_machine_only)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _reproducible():
    set_seed(0)
    # In deterministic mode torch.empty is filled with NaN; warn_only, since some CUDA operators have no such form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
