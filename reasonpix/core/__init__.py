"""Files, images, text and hashing: the foundation of every other package.

Plugins that add commands, or talk to servers, may use the names below.
"""

from typing import TYPE_CHECKING

from reasonpix.core.lazy import lazy_exports

__all__ = [
    "atomic_dir",
    "decode",
    "encode_png",
    "http_transport",
    "listen",
    "proxy_for",
    "resized",
    "url_of",
    "write_atomically",
]

if TYPE_CHECKING:
    from reasonpix.core.atomic import atomic_dir, write_atomically
    from reasonpix.core.images import decode, encode_png, resized
    from reasonpix.core.network import http_transport, listen, proxy_for, url_of
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "atomic": ("atomic_dir", "write_atomically"),
            "images": ("decode", "encode_png", "resized"),
            "network": ("http_transport", "listen", "proxy_for", "url_of"),
        },
    )
