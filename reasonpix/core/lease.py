"""Who is at work in a folder of a remote store: an object that is written again and again."""

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

from reasonpix.core.storage import Storage, whoami
from reasonpix.errors import RunError

_NAME = "holder"
_FACTS = frozenset({"who", "machine", "pid", "token", "time"})


class Lease:
    """This process as the holder of a folder.

    `create(name, data)` writes a file that is not there yet, and says whether it did.
    """

    def __init__(
        self,
        storage: Storage,
        create: Callable[[str, bytes], bool],
        beat_s: float,
        stale_s: float,
    ) -> None:
        self._storage = storage
        self._create = create
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._token = uuid4().hex
        self._taken_by = ""

    def take(self) -> None:
        """Become the holder. Raises `RunError` when another process is, and gives signs of life."""
        if not self._create(_NAME, self._facts()):
            other = self._read()
            if other is None:
                time.sleep(0.5)  # where files do not appear complete, it may be arriving
                other = self._read()
            if other is not None and self._is_alive(other):
                raise self._in_use(other)
            self._storage.write(_NAME, self._facts())
        # Of two that came at once, the last to write has it.
        other = self._read()
        if other is not None and other["token"] != self._token:
            raise self._in_use(other)

    def beat(self) -> None:
        """Give a sign of life, unless another process has taken over."""
        other = self._read()
        if other is not None and other["token"] != self._token:
            self._taken_by = other["who"]
        self.check()
        self._storage.write(_NAME, self._facts())

    def check(self) -> None:
        """Raise `RunError` when another process was seen to have taken over."""
        if self._taken_by:
            raise RunError(
                f"{self._storage} was taken over by {self._taken_by}, as this process had given no "
                f"sign of life for {self._stale_s:.0f} s; let that one go on"
            )

    def other(self) -> str | None:
        """The process that holds the folder, in words; None where none gives signs of life."""
        other = self._read()
        if other is None or time.time() - other["time"] > self._stale_s:
            return None
        if other["machine"] == _machine() and not _runs(other["pid"]):
            return None
        return str(other["who"])

    def let_go(self) -> None:
        """Leave the folder to others."""
        holder = self._read()
        if holder is not None and holder["token"] == self._token:
            self._storage.remove(_NAME)

    def _facts(self) -> bytes:
        facts = {
            "who": whoami(),
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
            return None  # nobody, or what a local run left in a folder that was copied here

    def _is_alive(self, other: dict[str, Any]) -> bool:
        if other["machine"] == _machine() and not _runs(other["pid"]):
            return False
        if abs(time.time() - other["time"]) < self._stale_s:
            return True
        # Clocks may differ: see whether it beats.
        time.sleep(1.5 * self._beat_s)
        return self._read() not in (None, other)

    def _in_use(self, other: dict[str, Any]) -> RunError:
        age = max(0.0, time.time() - other["time"])
        mend = "wait for it, or stop it first"
        if other["machine"] != _machine():
            mend += f"; if it was killed, come back in {max(1.0, self._stale_s - age):.0f} s"
        return RunError(
            f"{self._storage} is in use by {other['who']} (last sign of life {age:.0f} s ago); "
            f"{mend}"
        )


def _machine() -> str:
    """The same for processes that see each other's ids, and for no others."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(facts)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True
