"""The lock of a folder on a remote store: an object that its holder rewrites as a heartbeat."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from reasonpix.core.storage import Storage, process_name
from reasonpix.errors import RunError

_NAME = "holder"
_FACTS = frozenset({"who", "machine", "pid", "token", "time"})


class Lease:
    """The lease of a folder by this process.

    `create(name, data)` writes a file unless it exists, and returns whether it did.
    """

    def __init__(
        self,
        storage: Storage,
        create: Callable[[str, bytes], bool],
        heartbeat_s: float,
        stale_s: float,
    ) -> None:
        self._storage = storage
        self._create = create
        self._heartbeat_s = heartbeat_s
        self._stale_s = stale_s
        self._token = uuid4().hex
        self._new_holder = ""

    def acquire(self) -> None:
        """Acquire the lease. Raises `RunError` if another live process holds it."""
        if not self._create(_NAME, self._facts()):
            other = self._read()
            if other is None:
                time.sleep(0.5)  # without atomic writes, it may be half written
                other = self._read()
            if other is not None and self._is_alive(other):
                raise self._in_use(other)
            self._storage.write(_NAME, self._facts())
        # If two processes write at the same time, the last one wins.
        other = self._read()
        if other is not None and other["token"] != self._token:
            raise self._in_use(other)

    def renew(self) -> None:
        """Send a heartbeat. Raises `RunError` when another process has taken over."""
        other = self._read()
        if other is not None and other["token"] != self._token:
            self._new_holder = other["who"]
        self.check()
        self._storage.write(_NAME, self._facts())

    def check(self) -> None:
        """Raise `RunError` if `renew` found that another process has taken over."""
        if self._new_holder:
            raise RunError(
                f"{self._storage} was taken over by {self._new_holder}, because this process sent "
                f"no heartbeat for {self._stale_s:.0f} s; let that process finish"
            )

    def holder(self) -> str | None:
        """The live process that holds the folder, for messages; None if none does."""
        other = self._read()
        if other is None or time.time() - other["time"] > self._stale_s:
            return None
        if other["machine"] == _machine() and not _is_running(other["pid"]):
            return None
        return str(other["who"])

    def release(self) -> None:
        """Free the folder, unless another process has taken over."""
        holder = self._read()
        if holder is not None and holder["token"] == self._token:
            self._storage.remove(_NAME)

    def _facts(self) -> bytes:
        facts = {
            "who": process_name(),
            "machine": _machine(),
            "pid": os.getpid(),
            "token": self._token,
            "time": time.time(),
        }
        return json.dumps(facts).encode() + b"\n"

    def _read(self) -> dict[str, Any] | None:
        try:
            holder = json.loads(self._storage.read(_NAME))
            return holder if set(holder) >= _FACTS else None
        except (FileNotFoundError, ValueError, TypeError):
            return None  # free, or the lock file of a local run that was copied here

    def _is_alive(self, other: dict[str, Any]) -> bool:
        if other["machine"] == _machine() and not _is_running(other["pid"]):
            return False
        if abs(time.time() - other["time"]) < self._stale_s:
            return True
        # The clocks may differ: watch for a heartbeat.
        time.sleep(1.5 * self._heartbeat_s)
        return self._read() not in (None, other)

    def _in_use(self, other: dict[str, Any]) -> RunError:
        age = max(0.0, time.time() - other["time"])
        fix = "wait for it, or stop it first"
        if other["machine"] != _machine():
            fix += f"; if it was killed, try again in {max(1.0, self._stale_s - age):.0f} s"
        return RunError(
            f"{self._storage} is in use by {other['who']} (last heartbeat {age:.0f} s ago); {fix}"
        )


def _machine() -> str:
    """Equal for two processes if and only if they can see each other's process ids."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(facts)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # a process of another user
    return True
