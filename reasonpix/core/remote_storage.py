"""Run folders on a remote store: whatever fsspec reaches, by a URL such as `s3://bucket/run`."""

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
    """A folder on a remote store. Raises `RunError` when the URL or its package is of no use.

    An object store (S3, Google, Azure) shows an object when all of it has arrived. Elsewhere (SFTP,
    SMB, HDFS) a draft is moved to its name; where a move does not replace a file, rewriting one
    removes the old one a moment before.
    """

    beat_s: float = 10
    """Seconds between two signs of life of the holder."""
    stale_s: float = 60
    """A holder on another machine that was silent for so many seconds is taken for dead."""

    def __init__(self, url: str) -> None:
        self.url = url
        """What it was opened by, with a password that `str` leaves out."""
        self._shown, self._secret = _without_secret(url)
        self._protocol = url.partition("://")[0]
        self._is_object_store = self._protocol in _OBJECT_STORES
        self._fs, self._root = self._connected(url)
        self._lines = threading.Lock()
        self._uploads = threading.Lock()
        self._journals: dict[str, _Journal] = {}
        self._holder: Lease | None = None

    def __str__(self) -> str:
        """Its URL, without a password."""
        return self._shown

    def read(self, name: str) -> bytes:
        """A file's content."""
        if name in self._journals:
            self._write_journals(lambda journal: True)
        with self._explained(name, "read", FileNotFoundError):
            data: bytes = self._fs.cat_file(self._path(name))
            return data

    def write(self, name: str, data: bytes) -> None:
        """By one request, or by a draft that is moved."""
        self._commit(name, lambda path: self._fs.pipe_file(path, data))

    def upload(self, file: Path, name: str) -> None:
        """Write a file of this machine, which need not fit into memory."""
        self._commit(name, lambda path: self._fs.put_file(str(file), path))

    def download(self, name: str, file: Path) -> None:
        """Fetch a file to this machine. Raises `FileNotFoundError` where there is none."""
        with self._explained(name, "read", FileNotFoundError):
            self._fs.get_file(self._path(name), str(file))

    def version(self, name: str) -> str | None:
        """Another one whenever the file was written; None where there is none."""
        self._fs.invalidate_cache()
        with self._explained(name, "read", FileNotFoundError), suppress(FileNotFoundError):
            return str(self._fs.ukey(self._path(name)))
        return None

    def _commit(self, name: str, send: Callable[[str], object]) -> None:
        if self._holder is not None:
            self._holder.check()
        path = self._path(name)
        with self._explained(name, "written"):
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
        """By one listing, never from a cache."""
        return [name for name in self._listed(folder, "file") if name[0] != "."]

    def folders(self, folder: str) -> list[str]:
        """By one listing. An object store knows no empty folders."""
        return self._listed(folder, "directory")

    def _listed(self, folder: str, kind: str) -> list[str]:
        self._fs.invalidate_cache()
        path = self._path(folder)
        with self._explained(folder, "listed", FileNotFoundError, NotADirectoryError):
            try:
                entries = self._fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        found = (e["name"].rstrip("/").rpartition("/") for e in entries if e["type"] == kind)
        # A store may list a folder, or a file of its name, in itself.
        return sorted(name for parent, _, name in found if parent.strip("/") == path.strip("/"))

    def exists(self, name: str) -> bool:
        """Asks for the file alone."""
        self._fs.invalidate_cache()
        with self._explained(name, "read"), suppress(FileNotFoundError):
            return bool(self._fs.info(self._path(name))["type"] == "file")
        return False

    def rename(self, name: str, to: str) -> None:
        """A move; on an object store a copy, then a removal.

        A process that is killed in between leaves both, so whoever renames must take a file that
        still has its old name for not renamed.
        """
        with self._explained(name, "renamed"):
            if self._is_object_store:
                self._fs.cp_file(self._path(name), self._path(to))
                self._fs.rm_file(self._path(name))
            else:
                self._move(self._path(name), self._path(to))

    def remove(self, name: str) -> None:
        """The files of a folder go one by one."""
        self._fs.invalidate_cache()
        path = self._path(name)
        with self._explained(name, "removed"), suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)
            if self._fs.find(path):  # some stores pass over what they may not remove
                raise PermissionError("the store kept it")

    def size(self, folder: str) -> int:
        """By one listing on an object store."""
        self._fs.invalidate_cache()
        with self._explained(folder, "listed"), suppress(FileNotFoundError):
            files = self._fs.find(self._path(folder), detail=True).values()
            return sum(int(file["size"] or 0) for file in files)
        return 0

    def tidy(self) -> None:
        """Drafts are known by their names; an object store has none."""
        if self._is_object_store:
            return
        stages = [f"stages/{name}" for name in self.folders("stages")]
        for folder in ("", "stages", *stages):
            for name in self._listed(folder, "file"):
                if name[0] == "." and name.endswith(".tmp"):
                    self.remove(f"{folder}/{name}" if folder else name)

    # -- The journal

    def append(self, name: str, line: str) -> None:
        """No store adds to a file: while the folder is held, lines wait to be written together.

        The file is written anew every 10 s, less often as it grows, and when the folder is let go.
        """
        with self._lines:
            if name not in self._journals:
                try:
                    with self._explained(name, "read", FileNotFoundError):
                        before = self._fs.cat_file(self._path(name))
                except FileNotFoundError:
                    before = b""
                self._journals[name] = _Journal(before)
            self._journals[name].add(line)
        if self._holder is None:
            self._write_journals(lambda journal: True)
            self._journals.clear()

    def _write_journals(self, due: Callable[[_Journal], bool]) -> None:
        with self._uploads:
            for name, journal in list(self._journals.items()):
                if journal.waits and due(journal):
                    with self._lines:
                        data, journal.waits = bytes(journal.text), False
                    try:
                        self.write(name, data)
                    except RunError:
                        journal.waits = True
                        raise
                    journal.written = time.monotonic()

    # -- The holder

    @contextmanager
    def held(self) -> Iterator[None]:
        """By an object `holder` that gives a sign of life every `beat_s` seconds.

        A holder of this machine whose process has ended is followed at once, one of another machine
        after `stale_s` seconds of silence. No store has a lock that ends with its process, so two
        may hold the folder for a moment: the first one finds that out and stops. Nothing is
        corrupted meanwhile: files appear complete, and a shard has the same bytes whoever computes
        it. At worst some answers are paid for twice.
        """
        holder = Lease(self, self._created, self.beat_s, self.stale_s)
        holder.take()
        self._holder = holder
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=(holder, ended), daemon=True)
        beats.start()
        try:
            yield
        except BaseException:
            with suppress(RunError):  # what went wrong first counts
                self._write_journals(lambda journal: True)
            raise
        else:
            self._write_journals(lambda journal: True)
        finally:
            ended.set()
            beats.join()
            self._journals.clear()
            self._holder = None
            with suppress(RunError):
                holder.let_go()

    def holder(self) -> str | None:
        """Whoever gave a sign of life lately."""
        return Lease(self, self._created, self.beat_s, self.stale_s).other()

    def _beat(self, holder: Lease, ended: threading.Event) -> None:
        while not ended.wait(self.beat_s):
            with suppress(RunError):  # the network may be away for a while
                holder.beat()
                self._write_journals(lambda journal: journal.is_due(self.beat_s))

    def _created(self, name: str, data: bytes) -> bool:
        """Write a file that is not there yet; exclusively, where the store can do that."""
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
            # Another was faster, the store has no exclusive writing, or it has no writing at all:
            # a plain write tells.
            return False
        return True

    # -- The store

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _connected(self, url: str) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise RunError(
                f"{self} is on a remote store, which needs fsspec: pip install 'reasonpix[remote]'"
            ) from error
        if "::" in url:
            raise RunError(f"{self} chains stores; name one alone")
        if self._secret and self._is_object_store:
            raise RunError(
                f"{self} holds a key; take it out of the URL and give it as the store's own tools "
                "take it (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
            )
        # Listings are never to come from a cache. Other protocols pass options on to their library.
        options: dict[str, Any] = {"use_listings_cache": False} if self._is_object_store else {}
        if self._protocol in ("s3", "s3a"):
            # By one request: of an object that is replaced meanwhile, several give parts of both.
            options["max_concurrency"] = 1
        try:
            fs, path = url_to_fs(url, **options)
        except ImportError as error:
            package = _PACKAGES.get(self._protocol)
            mend = f"pip install {package}" if package else self._masked(error)
            raise RunError(f"{self} needs a package that is not installed: {mend}") from error
        except Exception as error:
            raise self._failed("", "reached", error) from self._cause(error)
        root = str(path).rstrip("/")
        if not root and self._is_object_store and self._protocol != "memory":
            raise RunError(f"{self} names no bucket; write {self._protocol}://BUCKET/RUN")
        return fs, root

    @contextmanager
    def _explained(self, name: str, done: str, *passing: type[Exception]) -> Iterator[None]:
        """What the store refuses, in words of ours."""
        try:
            yield
        except Exception as error:  # each store's library has exceptions of its own
            if isinstance(error, (ReasonpixError, *passing)):
                raise
            raise self._failed(name, done, error) from self._cause(error)

    def _failed(self, name: str, done: str, error: Exception) -> RunError:
        kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
        if isinstance(error, FileNotFoundError):
            mend = "see that the bucket or folder is there, or name another"
        elif any(word in kinds for word in ("Permission", "Credential", "Auth", "Token")):
            mend = "see that the credentials are set and allow it"
        elif any(word in kinds for word in ("Connect", "Timeout", "Endpoint", "gaierror")):
            mend = "see that the network and the endpoint are up"
        elif "Protocol not known" in str(error):
            mend = "name one that fsspec knows"
        elif isinstance(error, NotImplementedError):
            mend = "this protocol cannot hold a run; name another"
        else:
            mend = "see what the store says"
        where = f"{self}/{name}" if name else str(self)
        return RunError(
            f"{where} cannot be {done}: {self._masked(error)}; {mend}, then run the same command "
            "again: what was finished is kept"
        )

    def _masked(self, error: Exception) -> str:
        what = " ".join(str(error).split()) or type(error).__name__
        return what.replace(self._secret, "***") if self._secret else what

    def _cause(self, error: Exception) -> Exception | None:
        """The error for the traceback, unless it tells a password."""
        return None if self._secret and self._secret in str(error) else error


def open_storage(where: str | Path) -> Storage:
    """The storage at a path of this machine, or at a URL that fsspec knows (`s3://bucket/run`)."""
    url = str(where)
    if "://" not in url:
        return LocalStorage(Path(where))
    if url.startswith("file://"):
        return LocalStorage(Path(url.removeprefix("file://")))
    return RemoteStorage(url)


class _Journal:
    """A file that grows by lines: what it holds, and whether the store lacks some of it."""

    def __init__(self, before: bytes) -> None:
        self.text = bytearray(before)
        if before and not before.endswith(b"\n"):
            self.text += b"\n"
        self.waits = False
        self.written = time.monotonic()

    def add(self, line: str) -> None:
        self.text += line.encode() + b"\n"
        self.waits = True

    def is_due(self, every_s: float) -> bool:
        """Long files are written less often: a tenth of a megabyte a second is enough."""
        wait = max(every_s, 10 * len(self.text) / _MEGABYTE)
        return time.monotonic() - self.written >= wait


def _without_secret(url: str) -> tuple[str, str]:
    """The URL to show, and the password in it ("": none)."""
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
