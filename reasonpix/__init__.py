"""reasonpix: datasets for image editing by instructions that need reasoning, and models on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasonpix.deployment.server.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    # Not imported above: nothing else here needs what it imports.
    if name == "Client":
        from reasonpix.deployment.server.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
