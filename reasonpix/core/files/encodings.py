"""Users' text files in UTF-8 or UTF-16, with or without a byte order mark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def decode_text(data: bytes) -> str:
    """A text file's content, with "\\n" for line ends of any system.

    Files from Windows may be UTF-16 or begin with a byte order mark; UTF-32 is read too. Raises
    `ValueError`, which names the line.
    """
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(error.encoding, errors="replace")
        line = before.count("\n") + 1
        raise ValueError(
            f"line {line} is not {encoding.upper()}: {error.reason}; save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """A text file. Raises `OSError`, and `ValueError` as `decode_text` does."""
    return decode_text(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """A JSON file's content. Raises `ValueError`, also for a key that is given twice."""
    return _parse(decode_text(data))


def parse_json_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the value of each line that is not blank.

    Raises `ValueError`, which names the line.
    """
    for number, line in enumerate(decode_text(data).split("\n"), 1):
        if line.strip():
            try:
                yield number, _parse(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Reject repeated keys: `json` would silently drop the first value."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return values


def read_front_matter(path: Path) -> dict[str, Any]:
    """The YAML mapping at the head of a Markdown file, such as a hub card; empty if it has none."""
    try:
        before, *parts = read_text(path).split("---\n", 2)
        metadata = yaml.safe_load(parts[0]) if len(parts) == 2 and not before else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
