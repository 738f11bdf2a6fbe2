from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from reasonpix.cli.main import cli
from reasonpix.errors import PluginError
from reasonpix.plugin import registry
from reasonpix.plugin.components import Options
from reasonpix.plugin.fakes import FakeCaptioner
from tests.conftest import Distribution, WriteRecipe

CAPTIONER = """
from reasonpix.plugin.fakes import FakeCaptioner
from reasonpix.plugin.hookspecs import hookimpl
class Mine(FakeCaptioner):
    name = "mine"
@hookimpl
def captioners():
    return [Mine]
"""


def told(name: str, slot: str = "captioner") -> str:
    with pytest.raises(PluginError) as raised:
        registry.find(slot, name)
    return str(raised.value)


def test_a_plugin_is_found_by_its_entry_point(distribution: Distribution) -> None:
    distribution("my-dist", {"mine": "mine_module"}, mine_module=CAPTIONER)
    assert "mine" in registry.names()
    assert "mine_module" not in sys.modules  # listing imports nothing
    assert issubclass(registry.find("captioner", "mine"), FakeCaptioner)
    assert list(registry.offers("mine")) == ["captioner"]


def test_unknown_names_say_what_is_near() -> None:
    assert told("fake-captoner").startswith(
        "no captioner 'fake-captoner'; did you mean 'fake-captioner'?"
    )
    assert "fake-grounder" not in told("fake-groundr")  # not a captioner


def test_a_plugin_of_another_slot() -> None:
    assert (
        told("fake-grounder")
        == "plugin 'fake-grounder' is for the slot `grounder`, not for `captioner`"
    )


BROKEN = {
    "raises on import": ("1 / 0\n", "ZeroDivisionError: division by zero"),
    "misses a package": (
        "import no_such_package\n",
        "ModuleNotFoundError: No module named 'no_such",
    ),
    "is no Python": ("def\n", "SyntaxError"),
    "has an unknown hook": (
        "from reasonpix.plugin.hookspecs import hookimpl\n"
        "@hookimpl\ndef captoiners():\n    return []\n",
        "(broken): unknown hook 'captoiners'; did you mean 'captioners'?",
    ),
    "has a hook with arguments": (
        "from reasonpix.plugin.hookspecs import hookimpl\n"
        "@hookimpl\ndef captioners(x):\n    return []\n",
        "PluginValidationError",
    ),
    "raises in a hook": (
        "from reasonpix.plugin.hookspecs import hookimpl\n"
        "@hookimpl\ndef captioners():\n    1 / 0\n",
        "hook captioners() raised ZeroDivisionError",
    ),
    "gives no list": (
        "from reasonpix.plugin.hookspecs import hookimpl\n"
        "@hookimpl\ndef captioners():\n    return 7\n",
        "hook captioners() raised TypeError",
    ),
    "gives a class of another slot": (
        "from reasonpix.plugin.fakes import FakeGrounder\n"
        "from reasonpix.plugin.hookspecs import hookimpl\n"
        "class Mine(FakeGrounder):\n    name = 'mine'\n"
        "@hookimpl\ndef captioners():\n    return [Mine]\n",
        "hook captioners() returned <class 'broken.Mine'>, which is not a subclass of Captioner",
    ),
    "gives an abstract class": (
        "from reasonpix.plugin import Captioner, hookimpl\n"
        "class Mine(Captioner):\n    name = 'mine'\n"
        "@hookimpl\ndef captioners():\n    return [Mine]\n",
        "of package broken-dist is broken (broken): class Mine does not implement caption()",
    ),
    "gives an object": (
        "from reasonpix.plugin.hookspecs import hookimpl\n"
        "@hookimpl\ndef captioners():\n    return [7]\n",
        "hook captioners() returned 7, which is not a subclass of Captioner",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_says_what_is_wrong_with_it(how: str, distribution: Distribution) -> None:
    source, what = BROKEN[how]
    distribution("broken-dist", {"mine": "broken"}, broken=source)
    message = told("mine")
    assert what in message
    assert "plugin 'mine'" in message


def test_a_plugin_that_offers_nothing_under_its_name(distribution: Distribution) -> None:
    distribution("my-dist", {"other": "mine_module"}, mine_module=CAPTIONER)
    assert told("other") == "plugin 'other' offers no component of that name"


def test_one_name_of_two_packages_is_an_error(distribution: Distribution) -> None:
    distribution("one-dist", {"mine": "one_module"}, one_module=CAPTIONER)
    distribution("two-dist", {"mine": "two_module"}, two_module=CAPTIONER)
    assert told("mine") == (
        "plugin 'mine' is offered twice, by one-dist and two-dist: uninstall one of them"
    )


def test_one_package_that_is_seen_twice_is_one(
    distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = distribution("my-dist", {"mine": "mine_module"}, mine_module=CAPTIONER)
    monkeypatch.syspath_prepend(f"{site}/../{site.name}")
    assert registry.find("captioner", "mine").name == "mine"


def test_broken_plugins_that_nobody_names_hurt_nobody(
    distribution: Distribution,
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distribution("broken-dist", {"broken-plugin": "broken"}, broken="1 / 0\n")
    distribution("one-dist", {"twice": "one_module"}, one_module=CAPTIONER)
    distribution("two-dist", {"twice": "two_module"}, two_module=CAPTIONER)
    monkeypatch.chdir(tmp_path)
    write_recipe(source={"use": "fake-source", "count": 2})
    for command in (
        "recipes ls",
        "recipes check recipe.yaml",
        "recipes schema",
        "generate recipe.yaml --out run",
        "publish run --out dataset",
        "gallery run",
    ):
        result = CliRunner().invoke(cli, command.split())
        assert (result.exit_code, result.stderr) == (0, ""), command
    listed = CliRunner().invoke(cli, ["plugins", "ls"])
    assert listed.exit_code == 0
    assert (
        "broken-plugin        broken: plugin 'broken-plugin' of package broken-d" in listed.output
    )
    assert "twice                broken: plugin 'twice' is offered twice" in listed.output
    assert "fake-captioner       captioner    reasonpix 0.1.0" in listed.output

    write_recipe(captioner="broken-plugin")
    named = CliRunner().invoke(cli, ["recipes", "check", "recipe.yaml"])
    assert named.exit_code == 2
    assert "plugin 'broken-plugin' of package broken-dist is broken" in named.stderr
    assert "ZeroDivisionError: division by zero" in named.stderr


# -- checkpoints and identities ------------------------------------------------------------------


def model_options(model: str) -> Options:
    cls = registry.find("captioner", "trial-model-captioner")
    return cls.Options.model_validate({"model": model})


@pytest.mark.usefixtures("trial")
def test_a_checkpoint_name_becomes_its_folder(tmp_path: Path, trial: Path) -> None:
    assert registry.checkpoint("trial/bees") == trial / "checkpoints" / "bees"
    assert registry.checkpoint("Salesforce/blip2-opt-2.7b") is None
    assert registry.checkpoint("fake-captioner/of-nobody") is None
    assert registry.checkpoint(str(tmp_path)) is None
    with pytest.raises(PluginError, match="no checkpoint 'trial/bee'; did you mean 'trial/bees'"):
        registry.checkpoint("trial/bee")
    component = registry.build("captioner", "trial-model-captioner", model_options("trial/bees"))
    assert component.options.model == str(trial / "checkpoints" / "bees")


@pytest.mark.usefixtures("trial")
def test_weights_enter_the_identity_by_content(tmp_path: Path) -> None:
    def identity(model: str, **more: object) -> dict[str, object]:
        options = model_options(model).model_copy(update=more)
        return registry.fingerprint_facts("captioner", "trial-model-captioner", options)

    by_name = identity("trial/bees")
    copy = tmp_path / "weights"
    copy.mkdir()
    (copy / "caption.txt").write_text("a bee and a rabbit\n")
    assert identity(str(copy)) == by_name
    (copy / "README.md").write_text("a card\n")
    assert identity(str(copy)) == by_name
    (copy / "caption.txt").write_text("a cat\n")
    assert identity(str(copy)) != by_name
    assert identity("trial/rabbits") != by_name
    assert identity("trial/bees", batch_size=1, device="cpu") == by_name
    assert identity("trial/bees", dtype="bfloat16") != by_name
    assert identity("hub/name", revision="a") != identity("hub/name", revision="b")
    json.dumps(by_name)
