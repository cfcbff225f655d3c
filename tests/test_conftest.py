"""tests/conftest.py itself: what it promises to all other tests."""

import socket

import pytest
import torch

from tests.conformance import upstream


def test_unwritten_memory_is_nan():
    for empty in (torch.empty(7), torch.empty_like(torch.ones(7)), torch.ones(1).new_empty(7, dtype=torch.bfloat16)):
        assert empty.isnan().all()


@pytest.mark.parametrize("run", [0, 1])
def test_every_test_starts_from_the_same_seed(run, drawn=[]):  # noqa: B006  the list outlives the first run
    drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[-1])


def test_network_is_out_of_reach():
    for address in (("192.0.2.1", 80), ("example.org", 443)):
        with socket.socket() as client, pytest.raises(PermissionError, match="network"):
            client.connect(address)


def test_this_machine_is_within_reach():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())


def test_conformance_without_an_index_is_an_error(monkeypatch):
    """A run that tested nothing must not look green, unless somebody says that there is no index."""

    def unreachable():
        raise OSError("pip could not download it")

    monkeypatch.setattr(upstream, "fetch", unreachable)
    monkeypatch.setattr(upstream, "PACKAGE", "transformers_tests_of_nobody")
    monkeypatch.delenv("HEPTAPOD_OFFLINE", raising=False)
    with pytest.raises(RuntimeError, match="nothing was tested: pip could not download it. Set HEPTAPOD_OFFLINE=1"):
        upstream.load("test_modeling_common")
    monkeypatch.setenv("HEPTAPOD_OFFLINE", "1")
    with pytest.raises(pytest.skip.Exception, match="pip could not download it"):
        upstream.load("test_modeling_common")
