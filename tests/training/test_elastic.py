import os
import socket
import threading

import pytest
from torch.distributed import TCPStore

from unimoe.errors import UserError
from unimoe.training.elastic import PORT, check_overwrite, own_store


@pytest.fixture
def outliving(monkeypatch):
    """The store that torchrun keeps over restarts."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    return store


def test_the_first_process_holds_the_store_of_a_start(outliving, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    store = own_store()
    assert store is not None and store.port != outliving.port
    assert outliving.get(PORT).decode() == os.environ["MASTER_PORT"] == str(store.port)
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"


def test_nobody_goes_to_the_store_of_an_earlier_start(outliving, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        outliving.set(PORT, str(dead.getsockname()[1]))
    fresh = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    late = threading.Timer(0.5, outliving.set, (PORT, str(fresh.port)))
    late.start()
    assert own_store() is None
    assert os.environ["MASTER_PORT"] == str(fresh.port)
    late.join()


def test_without_torchrun_there_is_nothing_to_do(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert own_store() is None
    check_overwrite()


def test_no_restart_throws_away_what_there_is(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="--overwrite true does not go with"):
        check_overwrite()
