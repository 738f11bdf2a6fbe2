"""The HTTP client of huggingface_hub: it uses proxies by the rules of `reasonpix.core.network`.

Its own client opens a connection pool for every proxy that the environment names, also for one that
it would never use, and its errors show their URLs.
"""

from __future__ import annotations

import os
from functools import cache
from threading import Lock
from urllib.parse import urlsplit

import httpx2

from reasonpix.core.network import HUB_URL, Proxy, http_transport, proxy_for
from reasonpix.errors import ReasonpixError


@cache
def connect_hub() -> None:
    """Give huggingface_hub, and the libraries that use it, this client.

    Its requests raise `ReasonpixError` for a proxy that cannot be used or that refuses to connect.
    """
    from huggingface_hub import set_client_factory

    set_client_factory(_client)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests to the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def check_hub_proxy() -> None:
    """Raise `ReasonpixError` if the proxy that is configured for the hub cannot be used."""
    if not is_offline():
        proxy_for(os.environ.get("HF_ENDPOINT") or HUB_URL)


def _client() -> httpx2.Client:
    from huggingface_hub.utils._http import hf_request_event_hook

    return httpx2.Client(
        transport=_Transport(),
        event_hooks={"request": [hf_request_event_hook]},
        follow_redirects=True,
        timeout=None,
    )


class _Transport(httpx2.BaseTransport):
    """Sends each request directly or through its proxy; the hub redirects to other hosts."""

    def __init__(self) -> None:
        self._transports: dict[Proxy | None, httpx2.HTTPTransport] = {}
        self._lock = Lock()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = str(request.url)
        proxy = proxy_for(url)
        with self._lock:
            transport = self._transports.get(proxy)
            if transport is None:
                transport = self._transports[proxy] = http_transport(url)
        try:
            return transport.handle_request(request)
        except httpx2.ProxyError as error:
            reason = str(error)
        # Outside of `except`: whoever shows the error does not show the proxy's.
        variable = proxy.variable if proxy else "the environment"
        raise ReasonpixError(
            f"the proxy in {variable} refuses to connect to {urlsplit(url).hostname}: {reason}; "
            f"correct or unset {variable}, or add the host to NO_PROXY to reach it directly"
        )

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
