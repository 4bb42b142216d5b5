"""What processes say of errors before they have joined, with a store as torchrun provides it."""

import os
import time
from contextlib import suppress
from unittest.mock import patch

import pytest
from torch._C._distributed_c10d import TCPStore

from fastsae.distributed.launch import ARRIVED, common_store, one_voice, place
from fastsae.shards import Shards


def outcome(shards: Shards, port: int, errors: list[str | None]) -> str | None:
    """What a process says whose rank has this error, process 0 last; one without an error joins."""
    rank = str(shards.rank)
    ranks = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with patch.dict(os.environ, ranks | where | {"TORCHELASTIC_USE_AGENT_STORE": "True"}):
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
