"""Run folders on a remote store that fsspec supports, by a URL such as `s3://bucket/run`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from reasonpix.core.lease import Lease
from reasonpix.core.storage import LocalStorage, Storage
from reasonpix.errors import ReasonpixError, RunError

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "smb": "smbprotocol",
}
_MEGABYTE = 1_000_000


class RemoteStorage(Storage):
    """A folder on a remote store. Raises `RunError` when the URL or its package cannot be used.

    Object stores (S3, Google, Azure) write objects atomically. Elsewhere (SFTP, SMB, HDFS) a draft
    is written and moved to its final name; if a move cannot replace a file, the old one is removed
    first.
    """

    heartbeat_s: float = 10
    """Seconds between heartbeats of the holder."""
    stale_s: float = 60
    """A holder on another machine without a heartbeat for this long is considered dead."""

    def __init__(self, url: str) -> None:
        self.url = url
        """The URL as given, including a password that `str` hides."""
        self._shown, self._secret = _without_secret(url)
        self._protocol = url.partition("://")[0]
        self._is_object_store = self._protocol in _OBJECT_STORES
        self._fs, self._root = self._connect(url)
        self._lines = threading.Lock()
        self._uploads = threading.Lock()
        self._journals: dict[str, _Journal] = {}
        self._lease: Lease | None = None

    def __str__(self) -> str:
        """Its URL, without a password."""
        return self._shown

    def read(self, name: str) -> bytes:
        """A file's content."""
        if name in self._journals:
            self._write_journals(lambda journal: True)
        with self._explain_errors(name, "read", FileNotFoundError):
            data: bytes = self._fs.cat_file(self._path(name))
            return data

    def write(self, name: str, data: bytes) -> None:
        """By one request, or by moving a draft."""
        self._commit(name, lambda path: self._fs.pipe_file(path, data))

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file to the store, without reading it into memory."""
        self._commit(name, lambda path: self._fs.put_file(str(file), path))

    def download(self, name: str, file: Path) -> None:
        """Copy a file to this machine. Raises `FileNotFoundError`."""
        with self._explain_errors(name, "read", FileNotFoundError):
            self._fs.get_file(self._path(name), str(file))

    def version(self, name: str) -> str | None:
        """A tag that changes whenever the file is written; None if there is no file."""
        self._fs.invalidate_cache()
        with self._explain_errors(name, "read", FileNotFoundError), suppress(FileNotFoundError):
            return str(self._fs.ukey(self._path(name)))
        return None

    def _commit(self, name: str, send: Callable[[str], object]) -> None:
        if self._lease is not None:
            self._lease.check()
        path = self._path(name)
        with self._explain_errors(name, "written"):
            if self._is_object_store:
                send(path)
                return
            folder, _, own = path.rpartition("/")
            draft = f"{folder}/.{own}.{uuid4().hex}.tmp"
            self._fs.makedirs(folder, exist_ok=True)
            try:
                send(draft)
                self._move(draft, path)
            except BaseException:
                with suppress(Exception):
                    self._fs.rm_file(draft)
                raise

    def _move(self, path: str, to: str) -> None:
        try:
            self._fs.mv(path, to)
        except OSError:
            if not (self._fs.exists(path) and self._fs.exists(to)):
                raise
            self._fs.rm_file(to)
            self._fs.mv(path, to)

    def names(self, folder: str) -> list[str]:
        """By one listing, never cached."""
        return [name for name in self._list(folder, "file") if name[0] != "."]

    def folders(self, folder: str) -> list[str]:
        """By one listing. Object stores have no empty folders."""
        return self._list(folder, "directory")

    def _list(self, folder: str, kind: str) -> list[str]:
        self._fs.invalidate_cache()
        path = self._path(folder)
        with self._explain_errors(folder, "listed", FileNotFoundError, NotADirectoryError):
            try:
                entries = self._fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        parts = (e["name"].rstrip("/").rpartition("/") for e in entries if e["type"] == kind)
        # Some stores list a folder, or a file of its name, as its own entry.
        return sorted(name for parent, _, name in parts if parent.strip("/") == path.strip("/"))

    def exists(self, name: str) -> bool:
        """By a request for this file."""
        self._fs.invalidate_cache()
        with self._explain_errors(name, "read"), suppress(FileNotFoundError):
            return bool(self._fs.info(self._path(name))["type"] == "file")
        return False

    def rename(self, name: str, to: str) -> None:
        """A move; on an object store a copy, then a removal.

        A kill in between leaves both files, so callers must treat a file that still has its old
        name as not renamed.
        """
        with self._explain_errors(name, "renamed"):
            if self._is_object_store:
                self._fs.cp_file(self._path(name), self._path(to))
                self._fs.rm_file(self._path(name))
            else:
                self._move(self._path(name), self._path(to))

    def remove(self, name: str) -> None:
        """File by file."""
        self._fs.invalidate_cache()
        path = self._path(name)
        with self._explain_errors(name, "removed"), suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)
            if self._fs.find(path):  # some stores skip files they may not remove
                raise PermissionError("the store did not remove it")

    def size(self, folder: str) -> int:
        """By one listing, on an object store."""
        self._fs.invalidate_cache()
        with self._explain_errors(folder, "listed"), suppress(FileNotFoundError):
            files = self._fs.find(self._path(folder), detail=True).values()
            return sum(int(file["size"] or 0) for file in files)
        return 0

    def remove_drafts(self) -> None:
        """Those of the run folder and its stages; object stores have none."""
        if self._is_object_store:
            return
        stages = [f"stages/{name}" for name in self.folders("stages")]
        for folder in ("", "stages", *stages):
            for name in self._list(folder, "file"):
                if name[0] == "." and name.endswith(".tmp"):
                    self.remove(f"{folder}/{name}" if folder else name)

    # -- The journal

    def append(self, name: str, line: str) -> None:
        """While the folder is locked, lines are buffered, because no store can append to a file.

        The file is rewritten every 10 s, less often as it grows, and when the lock is released.
        """
        with self._lines:
            if name not in self._journals:
                try:
                    with self._explain_errors(name, "read", FileNotFoundError):
                        before = self._fs.cat_file(self._path(name))
                except FileNotFoundError:
                    before = b""
                self._journals[name] = _Journal(before)
            self._journals[name].add(line)
        if self._lease is None:
            self._write_journals(lambda journal: True)
            self._journals.clear()

    def _write_journals(self, due: Callable[[_Journal], bool]) -> None:
        with self._uploads:
            for name, journal in list(self._journals.items()):
                if journal.is_dirty and due(journal):
                    with self._lines:
                        data, journal.is_dirty = bytes(journal.text), False
                    try:
                        self.write(name, data)
                    except RunError:
                        journal.is_dirty = True
                        raise
                    journal.written = time.monotonic()

    # -- The lock

    @contextmanager
    def lock(self) -> Iterator[None]:
        """By an object `holder` with a heartbeat every `heartbeat_s` seconds.

        The lock of a dead process on this machine is taken over immediately, that of a process on
        another machine after `stale_s` seconds without a heartbeat. No store has a lock that ends
        with its process, so two processes may hold it for a moment; the first one notices and
        stops. Nothing is corrupted meanwhile: files are written atomically, and a shard has the
        same bytes whoever computes it. At worst some answers are paid for twice.
        """
        lease = self._new_lease()
        lease.acquire()
        self._lease = lease
        stop = threading.Event()
        heartbeats = threading.Thread(target=self._send_heartbeats, args=(lease, stop), daemon=True)
        heartbeats.start()
        try:
            yield
        except BaseException:
            with suppress(RunError):  # the first error counts
                self._write_journals(lambda journal: True)
            raise
        else:
            self._write_journals(lambda journal: True)
        finally:
            stop.set()
            heartbeats.join()
            self._journals.clear()
            self._lease = None
            with suppress(RunError):
                lease.release()

    def holder(self) -> str | None:
        """The process that sent the last heartbeat, if it was recent."""
        return self._new_lease().holder()

    def _new_lease(self) -> Lease:
        return Lease(self, self._create, self.heartbeat_s, self.stale_s)

    def _send_heartbeats(self, lease: Lease, stop: threading.Event) -> None:
        while not stop.wait(self.heartbeat_s):
            with suppress(RunError):  # the network may be down for a while
                lease.renew()
                self._write_journals(lambda journal: journal.is_due(self.heartbeat_s))

    def _create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists, exclusively if the store supports that."""
        if self.exists(name):
            return False
        path = self._path(name)
        try:
            if self._is_object_store:
                self._fs.pipe_file(path, data, mode="create")
            else:
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                with self._fs.open(path, "xb") as file:
                    file.write(data)
        except Exception:
            # Another process was faster, or the store cannot write exclusively, or not at all. The
            # caller's plain write will show which.
            return False
        return True

    # -- The store

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _connect(self, url: str) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise RunError(
                f"{self} is on a remote store, which needs fsspec: pip install 'reasonpix[remote]'"
            ) from error
        if "::" in url:
            raise RunError(f"{self} chains stores; give a single one")
        if self._secret and self._is_object_store:
            raise RunError(
                f"{self} contains a key; remove it from the URL and configure it as the store's "
                "tools expect (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
            )
        # Listings must not be cached. Other protocols pass unknown options on to their library.
        options: dict[str, Any] = {"use_listings_cache": False} if self._is_object_store else {}
        if self._protocol in ("s3", "s3a"):
            # In one request: several could return parts of two versions of an object.
            options["max_concurrency"] = 1
        try:
            fs, path = url_to_fs(url, **options)
        except ImportError as error:
            package = _PACKAGES.get(self._protocol)
            fix = f"pip install {package}" if package else self._masked(error)
            raise RunError(f"{self} needs a package that is not installed: {fix}") from error
        except Exception as error:
            raise self._failed("", "reached", error) from self._cause(error)
        root = str(path).rstrip("/")
        if not root and self._is_object_store and self._protocol != "memory":
            raise RunError(f"{self} lacks a bucket; write {self._protocol}://BUCKET/RUN")
        return fs, root

    @contextmanager
    def _explain_errors(self, name: str, done: str, *passing: type[Exception]) -> Iterator[None]:
        """Raise `RunError`, which says how to fix it, for errors of the store."""
        try:
            yield
        except Exception as error:  # each library has its own exceptions
            if isinstance(error, (ReasonpixError, *passing)):
                raise
            raise self._failed(name, done, error) from self._cause(error)

    def _failed(self, name: str, done: str, error: Exception) -> RunError:
        kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
        if isinstance(error, FileNotFoundError):
            fix = "check that the bucket or folder exists, or use another"
        elif any(word in kinds for word in ("Permission", "Credential", "Auth", "Token")):
            fix = "check that the credentials are set and have access"
        elif any(word in kinds for word in ("Connect", "Timeout", "Endpoint", "gaierror")):
            fix = "check the network and the endpoint"
        elif "Protocol not known" in str(error):
            fix = "use a protocol that fsspec knows"
        elif isinstance(error, NotImplementedError):
            fix = "this protocol cannot hold a run; use another"
        else:
            fix = "fix what the store reports"
        where = f"{self}/{name}" if name else str(self)
        return RunError(
            f"{where} cannot be {done}: {self._masked(error)}; {fix}, then run the same command "
            "again: finished work is kept"
        )

    def _masked(self, error: Exception) -> str:
        message = " ".join(str(error).split()) or type(error).__name__
        return message.replace(self._secret, "***") if self._secret else message

    def _cause(self, error: Exception) -> Exception | None:
        """The error for the traceback, unless it reveals a password."""
        return None if self._secret and self._secret in str(error) else error


def open_storage(location: str | Path) -> Storage:
    """The storage at a local path, or at a URL that fsspec knows (`s3://bucket/run`)."""
    url = str(location)
    if "://" not in url:
        return LocalStorage(Path(location))
    if url.startswith("file://"):
        return LocalStorage(Path(url.removeprefix("file://")))
    return RemoteStorage(url)


class _Journal:
    """A file of lines that is buffered in memory."""

    def __init__(self, stored: bytes) -> None:
        self.text = bytearray(stored)
        if stored and not stored.endswith(b"\n"):
            self.text += b"\n"
        self.is_dirty = False
        self.written = time.monotonic()

    def add(self, line: str) -> None:
        self.text += line.encode() + b"\n"
        self.is_dirty = True

    def is_due(self, every_s: float) -> bool:
        """Whether to write it now: long files are written less often, at 0.1 MB per second."""
        interval_s = max(every_s, 10 * len(self.text) / _MEGABYTE)
        return time.monotonic() - self.written >= interval_s


def _without_secret(url: str) -> tuple[str, str]:
    """The URL without its password, and the password ("" if it has none)."""
    protocol, _, rest = url.partition("://")
    rest, question, _ = rest.rstrip("/").partition("?")
    authority = rest.partition("/")[0]
    user, at, tail = authority.rpartition("@")
    if at:
        tail += rest[len(authority) :]
    elif ":" in authority and "@" in rest and not authority.startswith("arn:"):
        user, at, tail = rest.rpartition("@")  # a key with a "/" in it
    else:
        tail = rest
    _, colon, secret = user.partition(":")
    shown = "***@" if colon else f"{user}{at}"
    return f"{protocol}://{shown}{tail}{question and '?***'}", secret
