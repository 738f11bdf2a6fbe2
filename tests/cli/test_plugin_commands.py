from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner, Result

from reasonpix import __version__
from reasonpix.cli import plugin_commands
from reasonpix.cli.main import cli
from reasonpix.errors import PluginError
from reasonpix.plugin import API_VERSION
from tests.conftest import Distribution, Shell

HELLO = """
import click
from reasonpix.errors import ReasonpixError

@click.command("hello")
@click.argument("name")
def hello(name: str) -> None:
    \"\"\"Greet NAME.\"\"\"
    if name == "nobody":
        raise ReasonpixError("nobody is there; greet somebody")
    click.echo(f"Hello, {name}!")
"""


@pytest.fixture
def hello(distribution: Distribution) -> None:
    distribution(
        "reasonpix-hello",
        {"hello": "hello_cli:hello"},
        group=plugin_commands.GROUP,
        hello_cli=HELLO,
    )


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def test_a_package_adds_a_command(hello: None) -> None:
    assert "hello      Greet NAME." in call("--help").output
    assert call("hello", "--help").output.startswith("Usage: ")
    assert call("hello", "world").output == "Hello, world!\n"


def test_an_error_of_an_added_command_is_explained_in_one_line(hello: None) -> None:
    result = call("hello", "nobody")
    assert result.exit_code == 1
    assert result.stderr == "nobody is there; greet somebody\n"


def test_other_commands_do_not_import_an_added_one(hello: None) -> None:
    assert call("plugins", "ls", "--help").exit_code == 0
    assert "hello_cli" not in sys.modules


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import sys; sys.exit(7)", "SystemExit: 7"),
        ("hello = 1", "hello_cli:hello is not a click command"),
        ("", "AttributeError: module 'hello_cli' has no attribute 'hello'"),
    ],
)
def test_a_broken_command_names_its_package(
    distribution: Distribution, shell: Shell, source: str, problem: str
) -> None:
    entry = {"hello": "hello_cli:hello"}
    site = distribution("odd-hello", entry, group=plugin_commands.GROUP, hello_cli=source)
    done = shell("hello", "world", "--loud", path=(site,))
    assert done.returncode == 1
    assert done.stderr == f"command 'hello' of package odd-hello is broken: {problem}\n"
    listed = shell("--help", path=(site,))  # the other commands still work
    assert listed.returncode == 0 and "(command 'hello' of package odd-hello" in listed.stdout


def test_a_command_that_two_packages_add(hello: None, distribution: Distribution) -> None:
    distribution("other-hello", {"hello": "other:hello"}, group=plugin_commands.GROUP)
    result = call("--debug", "hello", "world")
    assert isinstance(result.exception, PluginError)
    assert str(result.exception) == (
        "command 'hello' is offered by other-hello and reasonpix-hello: uninstall one of them"
    )


def test_a_built_in_command_is_not_replaced(distribution: Distribution) -> None:
    distribution(
        "reasonpix-hello",
        {"status": "hello_cli:hello"},
        group=plugin_commands.GROUP,
        hello_cli=HELLO,
    )
    assert "Greet" not in call("status", "--help").output
    shown = call("--help")
    assert shown.exit_code == 0 and "Greet" not in shown.stdout
    assert shown.stderr == (
        "command 'status' of package reasonpix-hello is ignored: reasonpix has a command of this "
        "name\n"
    )


def test_a_command_for_another_plugin_api_is_not_imported(distribution: Distribution) -> None:
    entry = {"hello": "hello_cli:hello"}
    site = distribution("new-hello", entry, group=plugin_commands.GROUP, hello_cli=HELLO)
    (metadata,) = site.glob("*/entry_points.txt")
    metadata.write_text(f"{metadata.read_text()}\n[reasonpix.api]\n2.0 = hello_cli\n")
    sys.modules.pop("hello_cli", None)
    result = call("hello", "world")
    assert result.exit_code == 1
    assert result.stderr == (
        "command 'hello': package new-hello 1.0 was written for plugin API 2.0, but reasonpix "
        f"{__version__} provides {API_VERSION}: upgrade reasonpix\n"
    )
    assert "hello_cli" not in sys.modules


def test_a_command_of_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugin_commands.PACKAGES, "portrait", "reasonpix-portrait")
    result = call("portrait", "me")
    assert result.exit_code == 2
    assert "no such command 'portrait'; install reasonpix-portrait" in result.output
    assert "No such command 'landscape'" in call("landscape").output
