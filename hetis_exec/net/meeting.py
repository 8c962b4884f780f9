"""Where the processes of a run find each other: a store of torch.distributed.

It holds addresses, the run's token, and what has kept a party from coming. Whoever can reach the store
can join the run; it listens on the loopback interface unless the user gives another address.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed

from hetis_exec.errors import ExecutorError

distributed: Any = torch.distributed

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
DRIVER_KEY = "driver"
FAILED_KEY = "failed"
RECORD_BYTES_MAX = 1 << 20
DRIVER_FIELDS = {"host": str, "port": int, "token": str, "digest": str}
WORKER_FIELDS = {"host": str, "port": int, "uuid": str, "nccl": str}


@dataclass(frozen=True, slots=True)
class MeetingPlace:
    """Where the store is.

    Attributes:
        prefix: of all keys of this run; another try has another one.
        bind: this host's address, on which its processes listen and from which they call.
        interface: of gloo, where the user has chosen one; else gloo uses ``bind`` as well.
        start_s: how long to wait for the others.
    """

    host: str
    port: int
    prefix: str = "run"
    bind: str = LOOPBACK
    interface: str = ""
    start_s: float = 180.0

    @property
    def gloo_bind(self) -> str:
        """What :func:`hetis_exec.net.wires.gloo_group` is to bind to."""
        return f"interface:{self.interface}" if self.interface else self.bind

    @property
    def nccl_interface(self) -> str:
        """The interface for NCCL; empty where only an address is known."""
        return self.interface or (LOOPBACK_INTERFACE if self.bind == LOOPBACK else "")


class Meeting:
    """Records of the parties of a run, by name."""

    def __init__(self, place: MeetingPlace, store: Any) -> None:
        self.place = place
        self._server = store
        self.store = distributed.PrefixStore(place.prefix, store)

    def announce(self, name: str, record: dict[str, Any]) -> None:
        """Write a record, for all to read.

        Raises:
            ExecutorError: the store is gone.
        """
        try:
            self.store.set(name, json.dumps(record))
        except RuntimeError as error:
            raise self._gone(error) from error

    def look_up(self, name: str, fields: dict[str, type], timeout_s: float | None = None) -> dict[str, Any]:
        """Wait for a record.

        Raises:
            ExecutorError: it does not come, or says what has kept its writer from coming.
        """
        patience_s = self.place.start_s if timeout_s is None else timeout_s
        try:
            self.store.wait([name], timedelta(seconds=patience_s))
            text = self.store.get(name)
        except distributed.DistStoreError as error:
            raise ExecutorError(f"nothing has been heard of the {name.replace('/', ' of device ')} for "
                                f"{patience_s:g} s") from error
        except RuntimeError as error:
            raise self._gone(error) from error
        record = _record(text)
        if FAILED_KEY in record:
            raise ExecutorError(str(record[FAILED_KEY]))
        if any(type(record.get(key)) is not kind for key, kind in fields.items()):
            raise ExecutorError(f"the record of {name} is none: {sorted(record)}")
        return record

    def failure(self) -> tuple[int, str] | None:
        """(device, reason) of a party that has failed before it could call the driver."""
        try:
            if not self.store.check([FAILED_KEY]):
                return None
            record = _record(self.store.get(FAILED_KEY))
        except RuntimeError as error:
            raise self._gone(error) from error
        return int(record.get("device", -1)), str(record.get("reason", ""))

    def _gone(self, error: Exception) -> ExecutorError:
        return ExecutorError(f"the store at {self.place.host}:{self.place.port} cannot be reached: {error}")


def _record(text: bytes) -> dict[str, Any]:
    if len(text) > RECORD_BYTES_MAX:
        raise ExecutorError(f"a store record of {len(text)} bytes; at most {RECORD_BYTES_MAX} are taken")
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ExecutorError(f"a record in the store is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ExecutorError("a record in the store is no object")
    return record


def host_meeting(host: str = LOOPBACK, port: int = 0, **settings: Any) -> Meeting:
    """Open a store that listens on ``host`` and nowhere else.

    Raises:
        ExecutorError: that is not possible.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ExecutorError(f"no store can listen at {host}:{port}: {error}") from error
    place = MeetingPlace(host, listening.getsockname()[1], **settings)
    # The store owns its socket from here on.
    store = distributed.TCPStore(place.host, place.port, is_master=True, wait_for_workers=False,
                                 timeout=timedelta(seconds=place.start_s),
                                 master_listen_fd=listening.detach())
    return Meeting(place, store)


def join_meeting(place: MeetingPlace) -> Meeting:
    """Go to a store.

    Raises:
        ExecutorError: it cannot be reached.
    """
    try:
        store = distributed.TCPStore(place.host, place.port, is_master=False, wait_for_workers=False,
                                     timeout=timedelta(seconds=place.start_s))
    except RuntimeError as error:
        raise ExecutorError(f"the store at {place.host}:{place.port} cannot be reached: {error}") from error
    return Meeting(place, store)
