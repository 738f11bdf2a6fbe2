"""Tensors by key, in safetensors files that appear complete or not at all."""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonpix.core.parallel import Size, prefetch
from reasonpix.core.storage import write_atomically
from reasonpix.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

SHARD = Size(rows=1024, bytes=256_000_000)
"""A shard: what waits in memory to be written, and what a killed process loses at most."""

_LOG = logging.getLogger(__name__)
_STALE_S = 3600.0


class Shards:
    """A folder of tensors, each under a key of its own, that are added and never changed.

    A shard is named by the SHA-256 of its bytes. Those that do not match it are damaged: they are
    removed, and what they held is not there. Shards are memory-mapped, so that what is in memory is
    the system's to decide. Raises `RunError` for a folder that cannot be read or written.
    """

    def __init__(self, folder: Path, size: Size = SHARD) -> None:
        self.folder = folder
        self._size = size
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self._waiting: dict[str, Tensor] = {}
        self._weight = 0

    def refresh(self) -> None:
        """See what is in the folder; each file is read whole once, to see whether it is sound."""
        self._remove_drafts()
        found = sorted(self.folder.glob("*.safetensors"))
        new = [file for file in found if file.stem not in self._files]
        for file, sound in prefetch(self._is_sound, iter(new)):
            if not sound:
                _LOG.warning("%s is damaged: what it held is computed again", file)
                with suppress(OSError):
                    file.unlink()
                continue
            self._open(file)

    def _open(self, file: Path) -> None:
        from safetensors import safe_open

        opened: Any = safe_open(file, framework="pt")
        self._files[file.stem] = opened
        self._places.update(dict.fromkeys(opened.keys(), file.stem))

    @staticmethod
    def _is_sound(file: Path) -> tuple[Path, bool]:
        try:
            with file.open("rb") as stream:
                return file, hashlib.file_digest(stream, "sha256").hexdigest() == file.stem
        except FileNotFoundError:  # another process found the damage first
            return file, False
        except OSError as error:
            raise RunError(
                f"{file} cannot be read: {error.strerror}; see to it, or name another folder"
            ) from error

    def _remove_drafts(self) -> None:
        """What killed processes left half-written; another one may be writing right now."""
        for draft in self.folder.glob(".*.tmp"):
            with suppress(OSError):
                if time.time() - draft.stat().st_mtime > _STALE_S:
                    draft.unlink()

    def __contains__(self, key: str) -> bool:
        """Whether there is such a tensor, written or waiting."""
        return key in self._places or key in self._waiting

    def __getitem__(self, key: str) -> Tensor:
        """A copy of a tensor that is written. Raises `KeyError`."""
        tensor: Tensor = self._files[self._places[key]].get_tensor(key)
        return tensor.clone()  # the mapping is shared by all who ask

    def add(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor; it is written with others, once a shard is full."""
        self._waiting[key] = tensor.contiguous()
        self._weight += tensor.nbytes
        if len(self._waiting) >= self._size.rows or self._weight >= self._size.bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        from safetensors.torch import save

        if not self._waiting:
            return
        data = save(self._waiting)
        file = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomically(file, data)
        self._waiting, self._weight = {}, 0
        self._open(file)
