"""Fingerprints and seeds that depend on JSON values alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(facts: Any) -> str:
    """Twelve hex digits that change when `facts` (JSON values) do."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def seed_of(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on `parts` alone."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
