"""Plugins that were written for another version of the plugin API are reported, not imported."""

from __future__ import annotations

import sys

import pytest

from reasonpix import __version__
from reasonpix.errors import PluginError
from reasonpix.plugin import API_VERSION, registry
from tests.conftest import Distribution

PLUGIN = """
from reasonpix.plugin import hookimpl
from reasonpix.plugin.fakes import FakeCaptioner

class Mine(FakeCaptioner):
    name = "mine"

@hookimpl
def captioners():
    return [Mine]
"""


def install(distribution: Distribution, declared: str) -> None:
    site = distribution("my-dist", {"mine": "mine_module"}, mine_module=PLUGIN)
    (metadata,) = site.glob("*/entry_points.txt")
    text = f"{metadata.read_text()}\n[reasonpix.api]\n{declared} = mine_module\n"
    metadata.write_text(text)


def test_this_version_of_the_api_is_accepted(distribution: Distribution) -> None:
    install(distribution, API_VERSION)
    assert registry.find("captioner", "mine").name == "mine"


@pytest.mark.parametrize(
    ("declared", "upgrade"), [("0.9", "my-dist"), ("2.0", "reasonpix"), ("1.99", "reasonpix")]
)
def test_an_incompatible_plugin_is_named_with_both_versions(
    declared: str, upgrade: str, distribution: Distribution
) -> None:
    install(distribution, declared)
    with pytest.raises(PluginError) as raised:
        registry.find("captioner", "mine")
    assert str(raised.value) == (
        f"plugin 'mine': package my-dist 1.0 was written for plugin API {declared}, but reasonpix "
        f"{__version__} provides {API_VERSION}: upgrade {upgrade}"
    )
    assert "mine_module" not in sys.modules


@pytest.mark.parametrize("declared", ["latest", "1." + 5000 * "1", "1.\u0661"])
def test_a_version_that_cannot_be_read(declared: str, distribution: Distribution) -> None:
    install(distribution, declared)
    with pytest.raises(PluginError) as raised:
        registry.find("captioner", "mine")
    assert str(raised.value) == (
        f"plugin 'mine': package my-dist 1.0 declares the plugin API version {declared[:20]!r}; "
        "it must be MAJOR.MINOR, such as 1.0"
    )
