"""Which servers are reached through the proxies that the environment names."""

from __future__ import annotations

import pytest

from reasonpix.core.network import (
    exempt_this_machine,
    http_transport,
    proxy_for,
)
from reasonpix.errors import ReasonpixError

SERVER = "http://llm.example:8000/v1"
PASSWORD = "recognisable"


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("http://llm.example/v1", "HTTP_PROXY"),
        ("https://llm.example/v1", "https_proxy"),
        ("http://10.0.0.7:8000", "HTTP_PROXY"),
        ("http://[fd00::7]:8000", "HTTP_PROXY"),
    ],
)
def test_a_proxy_is_known_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, url: str, variable: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "proxy.example:3128")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3129")
    proxy = proxy_for(url)
    assert proxy is not None
    assert proxy.variable == variable
    assert proxy.url.startswith("http://proxy.example:312")


def test_all_proxy_serves_what_has_no_proxy_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://all.example:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://https.example:2")
    found = {url: proxy_for(f"{url}://llm.example") for url in ("http", "https")}
    assert {scheme: proxy and proxy.variable for scheme, proxy in found.items()} == {
        "http": "ALL_PROXY",
        "https": "HTTPS_PROXY",
    }


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost.",
        "api.localhost",
        "127.0.0.1",
        "127.8.9.10",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
    ],
)
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "no proxy at all"])
def test_this_machine_needs_no_proxy(
    monkeypatch: pytest.MonkeyPatch, host: str, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert proxy_for(f"http://{host}:8000/v1") is None
    http_transport(f"http://{host}:8000/v1").close()


@pytest.mark.parametrize(
    ("no_proxy", "url", "exempt"),
    [
        ("*", SERVER, True),
        ("llm.example", SERVER, True),
        (".example", SERVER, True),
        ("*.example", SERVER, True),
        ("other, llm.EXAMPLE.", SERVER, True),
        ("a.example llm.example", SERVER, True),
        ("http://llm.example/", SERVER, True),
        ("llm.example:8000", SERVER, True),
        ("llm.example:80", SERVER, False),
        ("m.example", SERVER, False),
        ("example.org", SERVER, False),
        ("llm.example:port,[::1", SERVER, False),
        ("10.0.0.0/8", "http://10.1.2.3:8000", True),
        ("10.0.0.7/8", "http://10.1.2.3:8000", True),
        ("10.1.2.3", "http://10.1.2.3:8000", True),
        ("11.0.0.0/8", "http://10.1.2.3:8000", False),
        ("fd00::/8", "http://[fd00::1]:8000", True),
        ("[fd00:0::1]", "http://[fd00::1]:8000", True),
        ("[fd00::1]:8000", "http://[fd00::1]:8000", True),
        ("[fd00::1]:80", "http://[fd00::1]:8000", False),
    ],
)
def test_no_proxy_is_read_in_all_its_forms(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, url: str, exempt: bool
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert (proxy_for(url) is None) is exempt


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "SOCKS"])
def test_a_socks_proxy_without_its_package_is_explained(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://me:{PASSWORD}@127.0.0.1:1080")
    with pytest.raises(ReasonpixError, match=r"^ALL_PROXY names a SOCKS proxy") as told:
        proxy_for(SERVER)
    assert "pip install 'httpx2[socks]'" in str(told.value)
    assert "add llm.example to NO_PROXY" in str(told.value)
    assert PASSWORD not in str(told.value)


@pytest.mark.parametrize(
    "value",
    [
        f"http://me:{PASSWORD}@",
        f"http://me:{PASSWORD}@proxy.example:port",
        f"http://me:{PASSWORD}@[::1",
        f"http://me:{PASSWORD} @proxy.example",
        f"http://me:{PASSWORD}#1@proxy.example:3128",
        f"http://me:{PASSWORD}@proxy.example:70000",
        f"http://me:{PASSWORD}@pro xy:1",
        f"http://me:{PASSWORD}@prox\x7fy:1",
    ],
)
def test_what_is_not_a_proxy_is_explained_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(ReasonpixError, match=r"^HTTP_PROXY is not the URL of a proxy") as told:
        http_transport(SERVER)
    assert PASSWORD not in repr(told.value)
    assert told.value.__context__ is None


@pytest.mark.parametrize("value", ["socks4://127.0.0.1:1", "ftp://127.0.0.1:1", "quic://x:1"])
def test_a_protocol_that_is_not_supported_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("http_proxy", value)
    with pytest.raises(ReasonpixError, match=rf"^http_proxy .* {value.partition(':')[0]},"):
        proxy_for(SERVER)


def test_a_password_is_not_in_the_description_of_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://me:{PASSWORD}@proxy.example:3128")
    assert PASSWORD not in repr(proxy_for(SERVER))
    http_transport(SERVER).close()


@pytest.mark.parametrize("url", ["", "no url", "http://[::1", "http://x:port"])
def test_what_is_not_a_server_has_no_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert proxy_for(url) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, None),
        ({"NO_PROXY": "x"}, "x"),
        ({"HTTP_PROXY": "http://p"}, "localhost,127.0.0.1,::1"),
        ({"all_proxy": "http://p", "NO_PROXY": "x, ::1"}, "x,::1,localhost,127.0.0.1"),
        ({"Https_Proxy": "p", "no_proxy": "y", "NO_PROXY": "x"}, "y,localhost,127.0.0.1,::1"),
    ],
)
def test_libraries_and_child_processes_reach_this_machine_directly(
    before: dict[str, str], after: str | None
) -> None:
    environment = dict(before)
    exempt_this_machine(environment)
    assert environment.get("NO_PROXY") == after
    exempt_this_machine(environment)  # a child process
    assert environment.get("NO_PROXY") == after
