"""What processes say of errors before they have joined, with a store as torchrun provides it, or
one that process 0 serves."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from unittest.mock import patch

import pytest
from torch._C._distributed_c10d import TCPStore

from fastsae.distributed.launch import ARRIVED, common_store, one_voice, place
from fastsae.shards import Shards
from tests.distributed.processes import free_port

KILLED = """
import os, signal
from fastsae.distributed.launch import joined
with joined(None, "cpu") as shards:
    shards.all_of(None)
    if shards.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    shards.all_of(None)
"""


def outcome(
    shards: Shards, port: int, errors: list[str | None], torchrun: bool = True
) -> str | None:
    """What a process says whose rank has this error, process 0 last; one without an error joins."""
    rank = str(shards.rank)
    ranks = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    where |= {"TORCHELASTIC_USE_AGENT_STORE": str(torchrun)}
    with patch.dict(os.environ, ranks | where):
        if shards.rank == 0:
            time.sleep(0.2)
        try:
            with suppress(SystemExit), one_voice():
                if error := errors[shards.rank]:
                    raise OSError(error)
                if shards.rank == 0:
                    common_store(place()).set(ARRIVED, "")
        except OSError as error:
            return str(error)
    return None


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (["none here", "none here"], ["none here", None]),
        ([None, "none here"], [None, "process 1: none here"]),
        (["none here", "nor here"], ["none here", "process 1: nor here"]),
        (["none here", None], ["none here", None]),
    ],
)
def test_an_error_before_processes_join_is_said_once(processes, errors, said):
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    assert processes.run((1, 2), outcome, store.port, errors) == said


def test_process_0_serves_its_store_until_others_have_read_it(processes):
    """As under torchrun on several machines with TORCH_DISABLE_SHARE_RDZV_TCP_STORE."""
    errors = ["none here", "none here"]
    assert processes.run((1, 2), outcome, free_port(), errors, False) == ["none here", None]


def test_a_process_says_that_another_one_was_killed():
    """Without torchrun, which may end it before it can."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED],
            env={**os.environ, **where, "RANK": str(rank)},
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        errors = [one.communicate(timeout=100)[1] for one in started]
    finally:
        for one in started:
            one.kill()
    assert "LostError: process 0: another process has ended" in errors[0]


def test_an_error_where_nobody_else_was_started(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(OSError, match="^none here$"), one_voice():
        raise OSError("none here")
