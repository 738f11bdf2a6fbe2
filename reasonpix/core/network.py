"""Connections: listening sockets, and the proxies that the environment names.

HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY are read as curl reads them. Addresses of this
machine are always reached directly. A proxy's URL may hold a password: it is never shown.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from ipaddress import IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from reasonpix.errors import ReasonpixError

if TYPE_CHECKING:
    from httpx2 import HTTPTransport

HUB_URL = "https://huggingface.co"

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def listen(host: str, port: int, backlog: int = 128) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one. Raises `ReasonpixError` if it is taken.

    Bind it before any slow work, so that a port conflict shows immediately.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        raise ReasonpixError(
            f"{host}:{port} cannot be served: {error}; choose others with --host and --port"
        ) from error


def url_of(host: str, listening: socket.socket) -> str:
    """The URL of a listening socket, such as http://127.0.0.1:8000."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"


# -- Proxies


@dataclass(frozen=True)
class Proxy:
    """A proxy, and the environment variable that names it."""

    variable: str
    url: str = field(repr=False)


def proxy_for(url: str) -> Proxy | None:
    """The proxy that leads to the server at `url`, None if it is reached directly.

    Raises `ReasonpixError` if the variable does not hold the URL of a proxy, or if its protocol
    needs a package that is not installed.
    """
    from urllib.request import getproxies

    try:
        server = urlsplit(url)
        host, port = server.hostname or "", server.port
    except ValueError:
        return None  # connecting to it will explain what is wrong
    proxies = getproxies()
    kind = next((kind for kind in (server.scheme, "all") if proxies.get(kind)), None)
    if kind is None or _is_this_machine(host) or _is_exempt(host, port, proxies.get("no", "")):
        return None
    variable = _variable(kind)
    return Proxy(variable, _checked(proxies[kind], variable, host))


def http_transport(url: str, **options: Any) -> HTTPTransport:
    """An httpx2 transport to the server at `url`, through its proxy if it has one.

    `options` are those of `httpx2.HTTPTransport`. Raises `ReasonpixError` as `proxy_for` does.
    """
    import httpx2

    proxy = proxy_for(url)
    if proxy is None:
        return httpx2.HTTPTransport(**options)
    try:
        return httpx2.HTTPTransport(proxy=proxy.url, **options)
    except (httpx2.InvalidURL, ValueError):
        pass  # outside of `except`, because these errors quote the URL
    raise _not_a_proxy(proxy.variable)


def exempt_this_machine(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add this machine to NO_PROXY, for libraries and child processes that make connections."""
    names = {name.lower(): value for name, value in environment.items()}
    if any(names.get(f"{kind}_proxy") for kind in ("http", "https", "all")):
        exempt = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
        entries = [entry for entry in re.split(r"[,\s]+", exempt) if entry]
        missing = [host for host in _LOOPBACK if host not in entries]
        environment["no_proxy"] = environment["NO_PROXY"] = ",".join([*entries, *missing])


def _variable(kind: str) -> str:
    """The name of the environment variable; lower case goes before upper case, as in curl."""
    for name in (f"{kind}_proxy", f"{kind}_proxy".upper()):
        if os.environ.get(name):
            return name
    return "the system's proxy settings"


def _checked(value: str, variable: str, host: str) -> str:
    url = value.strip() if "://" in value else f"http://{value.strip()}"
    url = re.sub(r"^socks(?=://)", "socks5", url, flags=re.IGNORECASE)  # as GNOME writes it
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:
        valid = False
    if not valid:
        raise _not_a_proxy(variable)
    return _supported(parts, url, variable, host)


def _supported(parts: SplitResult, url: str, variable: str, host: str) -> str:
    cure = f"or unset {variable}, or add {host} to NO_PROXY to reach it directly"
    if parts.scheme not in ("http", "https", "socks5", "socks5h"):
        raise ReasonpixError(
            f"{variable} names a proxy of the protocol {parts.scheme}, which is not supported; "
            f"use one of http, https, socks5 and socks5h, {cure}"
        )
    if parts.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ReasonpixError(
            f"{variable} names a SOCKS proxy, which needs another package: "
            f"pip install 'httpx2[socks]', {cure}"
        )
    return url


def _not_a_proxy(variable: str) -> ReasonpixError:
    return ReasonpixError(
        f"{variable} is not the URL of a proxy, such as http://proxy.example:3128 (characters of "
        "a password like @, : and / are written as %40, %3A and %2F); correct or unset it"
    )


# -- Exempt hosts


def _is_this_machine(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def _is_exempt(host: str, port: int | None, no_proxy: str) -> bool:
    """Whether NO_PROXY names the host. Entries that cannot be understood exempt nothing."""
    from urllib.request import proxy_bypass

    name = host.lower().rstrip(".")
    entries = filter(None, re.split(r"[,\s]+", no_proxy.lower()))
    return any(_entry_matches(entry, name, port) for entry in entries) or bool(proxy_bypass(host))


def _entry_matches(entry: str, host: str, port: int | None) -> bool:
    """Whether an entry names a host: `*`, a domain, an address or a network, also with a port."""
    if entry == "*":
        return True
    entry = entry.partition("://")[2] or entry
    network = re.sub(r"^\[(.*)\](/\d+)?$", r"\1\2", entry)
    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        pass  # a name, or an address with a port
    try:
        parts = urlsplit(f"//{entry}")
        named, named_port = (parts.hostname or "").lstrip("*.").rstrip("."), parts.port
    except ValueError:
        return False
    if not named or named_port not in (None, port):
        return False
    return host == named or host.endswith(f".{named}")
