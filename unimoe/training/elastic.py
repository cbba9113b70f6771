"""Runs under torchrun, which restarts all processes when one dies."""

import os
import socket
import time

from torch.distributed import TCPStore, is_torchelastic_launched  # type: ignore[attr-defined]

from unimoe.errors import UserError

PORT = "unimoe/port"


def own_store() -> TCPStore | None:
    """Create a rendezvous store for the processes of this start, hosted by rank 0. Keep the result alive.

    torchrun's own store outlives a restart and keeps addresses of dead processes, which new processes would
    try to reach (https://github.com/pytorch/pytorch/issues/135712). None where torchrun did not start this
    process, or has no such store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"]
    outliving = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False)
    own = None
    if os.environ["RANK"] == "0":
        own = TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        outliving.set(PORT, str(own.port))
    while not _listens(address, port := int(outliving.get(PORT))):  # that of an earlier start
        time.sleep(0.1)
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return own


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def check_processes(expected: int) -> None:
    """Raises UserError if torchrun started more or fewer processes than the trainer ``expected``.

    Each of them would train a run of its own.
    """
    if is_torchelastic_launched() and (started := int(os.environ["WORLD_SIZE"])) != expected:
        raise UserError(
            f"torchrun started {started} processes, but trainer.devices times trainer.num_nodes is {expected}"
        )


def check_overwrite() -> None:
    """Raises UserError if a restart by torchrun would delete the run's progress."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise UserError(
            "--overwrite true does not go with torchrun's --max-restarts, since every restart would begin "
            "anew; delete the output folder instead"
        )
