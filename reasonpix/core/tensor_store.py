"""Tensors by key, in atomically written safetensors files."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonpix.core.atomic import remove_drafts, write_atomically
from reasonpix.core.parallel import Size, prefetch
from reasonpix.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

SHARD = Size(rows=1024, bytes=256_000_000)
"""Size of a shard: what is buffered in memory, and what a killed process loses at most."""

_LOG = logging.getLogger(__name__)
_STALE_S = 3600.0


class Shards:
    """A folder of tensors by key, to which tensors are only added.

    A shard is named by the SHA-256 of its bytes; one that does not match is damaged and removed.
    Shards are memory-mapped, so the system decides what stays in memory. Raises `RunError` for a
    folder that cannot be read or written.
    """

    def __init__(self, folder: Path, size: Size = SHARD) -> None:
        self.folder = folder
        self._shard_size = size
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._buffer: dict[str, Tensor] = {}
        self._buffered_bytes = 0

    def refresh(self) -> None:
        """Open new files of the folder; each is read once to verify its digest."""
        remove_drafts(self.folder, _STALE_S)  # another process may be writing right now
        files = sorted(self.folder.glob("*.safetensors"))
        new = [file for file in files if file.stem not in self._files]
        for file, is_valid in prefetch(self._verify, iter(new)):
            if not is_valid:
                _LOG.warning("%s is damaged; its tensors are computed again", file)
                with suppress(OSError):
                    file.unlink()
                continue
            self._open(file)

    def _open(self, file: Path) -> None:
        from safetensors import safe_open

        opened: Any = safe_open(file, framework="pt")
        self._files[file.stem] = opened
        self._file_of.update(dict.fromkeys(opened.keys(), file.stem))

    @staticmethod
    def _verify(file: Path) -> tuple[Path, bool]:
        try:
            with file.open("rb") as stream:
                return file, hashlib.file_digest(stream, "sha256").hexdigest() == file.stem
        except FileNotFoundError:  # another process found the damage first
            return file, False
        except OSError as error:
            raise RunError(
                f"{file} cannot be read: {error.strerror}; make it readable, or name another folder"
            ) from error

    def __contains__(self, key: str) -> bool:
        """Whether there is such a tensor, written or buffered."""
        return key in self._file_of or key in self._buffer

    def __getitem__(self, key: str) -> Tensor:
        """A copy of a written tensor. Raises `KeyError`."""
        tensor: Tensor = self._files[self._file_of[key]].get_tensor(key)
        return tensor.clone()  # the mapping is shared

    def add(self, key: str, tensor: Tensor) -> None:
        """Buffer a tensor; a shard is written once it is full."""
        self._buffer[key] = tensor.contiguous()
        self._buffered_bytes += tensor.nbytes
        if (
            len(self._buffer) >= self._shard_size.rows
            or self._buffered_bytes >= self._shard_size.bytes
        ):
            self.flush()

    def flush(self) -> None:
        """Write the buffer."""
        from safetensors.torch import save

        if not self._buffer:
            return
        data = save(self._buffer)
        file = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomically(file, data)
        self._buffer, self._buffered_bytes = {}, 0
        self._open(file)
