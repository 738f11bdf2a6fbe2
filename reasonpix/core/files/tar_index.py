"""The samples of a WebDataset tar, and where their members are in it."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from reasonpix.core.files.ignored import Ignored, why_hidden


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """The members of one sample by kind, the first word of their suffix: `input` of a.input.png."""

    key: str
    """The members' name up to the first dot, with the folder."""
    members: Mapping[str, Member]
    number: int = 1
    """2 for the second sample of a key, and so on."""

    def __str__(self) -> str:
        """The key, and the number if it is not the first."""
        return self.key if self.number == 1 else f"{self.key} ({self.number})"


@dataclass
class TarIndex:
    """The samples of a tar in the order of their first members."""

    samples: list[Sample]
    repeated: frozenset[str]
    """Keys of several samples."""
    ignored: list[Ignored] = field(default_factory=list)


def index_tar(file: Path) -> TarIndex:
    """Index an uncompressed tar file, also one of several tars, one after another.

    Members with the same key belong together wherever they are, until a kind repeats, which begins
    another sample. Raises `OSError` and `tarfile.TarError`, also if a part of the file is damaged.
    """
    ignored: list[Ignored] = []
    pieces: dict[str, list[tuple[int, dict[str, Member]]]] = {}
    for member in _members(file, ignored):
        folder, _, name = member.name.rpartition("/")
        own, dot, suffix = name.partition(".")
        if not dot:
            ignored.append(Ignored(member.name, "a member without a suffix"))
            continue
        key, kind = f"{folder}/{own}" if folder else own, suffix.partition(".")[0]
        of_key = pieces.setdefault(key, [])
        if not of_key or kind in of_key[-1][1]:
            of_key.append((member.offset, {}))
        of_key[-1][1][kind] = member
    ordered = [
        (position, Sample(key, members, number))
        for key, of_key in pieces.items()
        for number, (position, members) in enumerate(of_key, 1)
    ]
    samples = [sample for _, sample in sorted(ordered, key=lambda entry: entry[0])]
    repeated = frozenset(key for key, of_key in pieces.items() if len(of_key) > 1)
    return TarIndex(samples, repeated, ignored)


def _members(file: Path, ignored: list[Ignored]) -> Iterator[Member]:
    """The regular files of a tar, with hard links as the files that they link to."""
    found: dict[str, Member] = {}
    # Without ignore_zeros, what follows the first of several tars in a file would be lost.
    with file.open("rb") as data, tarfile.open(file, "r:", ignore_zeros=True) as tar:
        end = 0
        for info in tar:
            _check_gap(data, end, info.offset)
            end = tar.offset
            name = info.name.removeprefix("./")
            if info.isdir():
                continue
            if reason := why_hidden(name):
                ignored.append(Ignored(name, reason))
            elif info.issym() or not (info.isfile() or info.islnk()) or info.issparse():
                ignored.append(Ignored(name, "a member that is not a plain file"))
            elif info.islnk():
                target = found.get(info.linkname.removeprefix("./"))
                if target is None:
                    ignored.append(Ignored(name, "a link to a member that is not there"))
                else:
                    yield target._replace(name=name)
            else:
                found[name] = Member(name, info.offset_data, info.size)
                yield found[name]
        _check_gap(data, end, file.stat().st_size)


def _check_gap(data: BinaryIO, start: int, stop: int) -> None:
    """Raise `tarfile.ReadError` if there is anything but zeros, which `tarfile` passes over."""
    if start < stop:
        data.seek(start)
    while start < stop:
        block = data.read(min(stop - start, 1 << 20))
        if not block or block.count(0) < len(block):
            raise tarfile.ReadError(f"it is damaged after byte {start}")
        start += len(block)
